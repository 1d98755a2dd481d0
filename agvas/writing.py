"""Writing to a disk that may be full, and to a folder that another process may be writing to."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

UNLOCKABLE = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without locks on folders, as NFS has none


class FolderInUse(ValueError):
    """A folder that another process writes to."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise what safetensors says of a file that it cannot write, an exception of its own, as the OSError that it is.

    Raises:
        OSError: names the file and what to do. The library writes beside it and renames: an older file of that name is untouched.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: expected to be written whole, got: {error}; free some space, then the same command again") from error


@contextmanager
def alone_in(folder: Path, work: str) -> Iterator[None]:
    """Make the folder and have it for this process alone; the system gives it back with the process, however that ends.

    Nothing is locked on Windows and on file systems that cannot.

    Args:
        work: what the other process is doing, for the error: "calibration".

    Raises:
        FolderInUse: another process has it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        opened = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FolderInUse(f"{folder}: another {work} is at work in it; wait for it, or choose another output") from error
            except OSError as error:
                if error.errno not in UNLOCKABLE:
                    raise
            if _is(opened, folder):  # and not what its last holder has renamed or removed meanwhile
                yield
                return
        finally:
            os.close(opened)


def _is(opened: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(folder))
    except FileNotFoundError:
        return False
