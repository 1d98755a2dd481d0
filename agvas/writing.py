"""Writing tensors to a disk that may be full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
