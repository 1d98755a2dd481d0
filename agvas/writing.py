"""Writing to a disk that may be full, and to a folder that another process may be writing to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError

from agvas.weights import DTYPES, LazyTensors

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "I8"}
UNLOCKABLE = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without locks on folders, as NFS has none


class FolderInUse(ValueError):
    """A folder that another process writes to."""


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Tell in words of a file that cannot be written; what safetensors says, an exception of its own, becomes the OSError that it is.

    Raises:
        OSError: names the file and what to do. The library writes beside it and renames: an older file of that name is untouched.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path}: expected to be written whole, got: {error}; free some space, then the same command again") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which then takes its place: after a power cut, too, there is the old one or the new one, whole.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with disk_errors(partial):
            yield partial
            on_disk(partial)
            os.replace(partial, path)
            if os.name == "posix":  # Windows opens no folders
                on_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def on_disk(path: Path) -> None:
    """Wait until what was written to a file, or the names in a folder, would outlast a power cut."""
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_tensors(path: Path, tensors: LazyTensors, metadata: Mapping[str, str] | None = None) -> None:
    """A .safetensors file of tensors that are read one after the other: the library's own writer wants all of them in memory.

    The file is written where it is; give a name beside the final one, and rename it.

    Raises:
        OSError: the disk is full.
        ValueError: one that reads otherwise than it says.
    """
    # The library's order, in which every tensor begins at a multiple of its numbers' size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.bytes]}
        end += tensor.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with disk_errors(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            values = tensors[name].read()
            if tuple(values.shape) != tensors[name].shape or values.dtype != tensors[name].dtype:
                found = f"{values.dtype} {list(values.shape)}"
                raise ValueError(f"{name}: expected {tensors[name].dtype} {list(tensors[name].shape)}, got {found}")
            file.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
