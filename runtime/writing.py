"""Files that appear whole or not at all, whoever reads the folder meanwhile; and results, which go wherever they are wanted."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

from runtime.errors import OutputError, RequestError


def make_folder(folder: str | os.PathLike[str], name: str) -> None:
    """With the folders that it lies in.

    Args:
        name: the folder in words, for the error.

    Raises:
        OutputError: it cannot be made, or a file of that name is there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            got, remedy = "a file, or a path that leads through one", "choose another"
        else:
            got, remedy = error.strerror or str(error), "choose another or change its permissions"
        raise OutputError(f"{name}: expected a folder to write to, got {got}; {remedy}") from error


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write under a temporary name in the same folder, then rename: within one file system that is atomic.

    For files that a user has named, where engines.cache.write_whole is for those of the cache: the folder has to be there, a name may be as
    long as the file system takes, what is half written is hidden from a watcher of the folder, and errors say what to do.

    Raises:
        OutputError: the disk is full, or the folder cannot be written to; an older file is as it was.
        RequestError: a name too long for the file system.
    """
    # Not tempfile: its files are private to the user (0600), and masks are read by others on the line.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C, too
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        if error.errno == errno.ENAMETOOLONG:
            raise RequestError(
                f"{path}: expected a name that the file system takes, got one of {len(os.fsencode(path.name))} bytes; rename the picture"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{path}: expected room for {len(data)} bytes, got a full disk, quota or limit ({error.strerror}); "
                "free some space or choose another folder"
            ) from error
        raise OutputError(f"{path}: expected a writable file, got {error}; choose another folder or change its permissions") from error


def write_result(path: Path, text: str) -> None:
    """A command's JSON where its user wants it, be that a device or pipe, which nothing can be renamed over; a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    if (path.is_file() or not path.exists()) and not path.is_symlink() and os.access(path.parent, os.W_OK):
        return write_whole(path, text.encode())
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{path}: expected a file that can be written, with room for {len(text)} bytes, got {error.strerror or error}; free some space "
            "or name another file"
        ) from error
