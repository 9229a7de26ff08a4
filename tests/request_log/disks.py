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
_THIS_PROCESS = 0


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
    on a full disk.  For where nothing can be mounted.  The files are those of process ``pid``."""

    def __init__(self, folder: Path, pid: int = _THIS_PROCESS) -> None:
        self.folder = folder
        self._pid = pid
        self._before = resource.prlimit(pid, resource.RLIMIT_FSIZE)

    def fill(self, room: int = 0) -> None:
        largest = max(file.stat().st_size for file in self.folder.iterdir())
        self._limit((room or largest + 500, self._before[1]))

    def free(self) -> None:
        self._limit(self._before)

    def _limit(self, limits: tuple[int, int]) -> None:
        resource.prlimit(self._pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def small_disk(*, mounted: bool, size: int = SIZE) -> Iterator[TmpfsDisk | LimitedDisk]:
    """One to fill, of ``size`` bytes: a mounted one where that is permitted.  Not in pytest's
    folders, which it could not remove if a test was killed."""
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
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
