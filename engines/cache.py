"""The user's cache folder, files written whole into it, a lock that holds between processes, and the hash that names a graph.

What lies there can be made again: engines, timings, choices. Removing the folder costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from engines.errors import EngineUnavailable

POLL_SECONDS = 0.2
# What ends the name of a graph in onnxruntime's own operators, for its CUDA provider alone (export/cuda_fusion.py).
CUDA_FORM = ".cuda.onnx"


def cache_folder() -> Path:
    """$AGVAS_CACHE, or agvas in the user's cache folder; of a user without a home, a folder of their own among temporary ones.

    Raises:
        EngineUnavailable: another user has made that folder.
    """
    if folder := os.environ.get("AGVAS_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "agvas"
    try:
        return Path.home() / ".cache" / "agvas"
    except RuntimeError:  # $HOME is unset, and a container's user is a number that no list of users has
        return _temporary_folder()


def _temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir())
    if not hasattr(os, "getuid"):  # Windows, where it is the user's own
        return folder / "agvas"
    folder, user = folder / f"agvas-{os.getuid()}", os.getuid()
    with contextlib.suppress(OSError):  # it is there already, or cannot be made, which is told where a file is written
        folder.mkdir(mode=0o700)
    try:
        owner = folder.lstat().st_uid
    except OSError:
        return folder
    if owner != user:  # all users may write there, and engines that lie in a cache are run
        raise EngineUnavailable(f"{folder}: expected a cache of user {user}, found one of user {owner}; set AGVAS_CACHE to another folder")
    return folder


def graph_hash(files: Mapping[str, str]) -> str:
    """One hash of a graph from its files' names and sha256, so that other weights in the same graph are another graph.

    Its form in onnxruntime's own operators does not count: no engine is built of that.
    """
    counted = sorted(name for name in files if not name.endswith(CUDA_FORM))
    return hashlib.sha256("\n".join(f"{name} {files[name]}" for name in counted).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file at `path`; other processes and threads that ask for it wait until this one is done or has died.

    The system frees the lock with its holder, so nothing stale can stay behind; the empty file itself stays, since removing it while
    another waits on it would let two in.

    Args:
        waiting: called once when the lock is held elsewhere.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        told = False
        while not _try_lock(file):
            if not told and waiting:
                waiting()
            told = True
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            _unlock(file)


if sys.platform == "win32":  # factory PCs run it, too
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
