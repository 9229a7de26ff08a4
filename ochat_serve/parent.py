"""What a process does when the one that has started it dies."""

import os
import signal
import threading
import time
from multiprocessing import parent_process

LOOK_INTERVAL_S = 1
# A front end whose parent was killed tells its streams so, which takes it some seconds.
ORPHAN_GRACE_S = 10


def end_with_parent() -> None:
    """Watch, from a thread, for the death of the process that has started this one by
    ``multiprocessing``: asked to end then, and ``ORPHAN_GRACE_S`` later made to.

    A parent that was killed tells nobody, and an engine that lives on holds the device that the
    next server needs.  The system's own signal (``PR_SET_PDEATHSIG``) would come when the thread
    that has started this process ends, which need not be the process's end.
    """
    threading.Thread(target=_end_with_parent, name="parent watch", daemon=True).start()


def _end_with_parent() -> None:
    # Unknown for as long as the main module is imported.
    while (parent := parent_process()) is None or os.getppid() == parent.pid:
        time.sleep(LOOK_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)
