"""Disks that are really full, and folders that are really not ours."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 512 * 1024
_NOBODY = 65534


class TmpfsDisk:
    """A file system of so many bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, room: int = 0) -> None:
        """Until nothing fits; of some kinds of disks until files larger than ``room`` do not."""
        with self._ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass

    def free(self) -> None:
        self._ballast.unlink()


class LimitedDisk:
    """Files may not grow beyond what they are: the kernel cuts a write short, then refuses, as
    on a full disk.  For where nothing can be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, room: int = 0) -> None:
        largest = max(file.stat().st_size for file in self.folder.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (room or largest + 500, self._before[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@contextmanager
def small_disk(*, mounted: bool) -> Iterator[TmpfsDisk | LimitedDisk]:
    """One to fill: a mounted one where that is permitted.  Not in pytest's folders, which it
    could not remove if a test was killed."""
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    is_mounted = mounted and subprocess.run(mount, capture_output=True).returncode == 0
    disk = TmpfsDisk(folder) if is_mounted else LimitedDisk(folder)
    try:
        yield disk
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            disk.free()
        shutil.rmtree(folder)


@contextmanager
def folder_of_a_plain_user() -> Iterator[Path]:
    """Root may write everywhere: within the context this process is nobody."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, _NOBODY, _NOBODY)
        os.seteuid(_NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(folder)
