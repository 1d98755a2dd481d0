"""sha256 of files, read or remembered: a model's weights are gigabytes, which every process that opens an engine would read again.

What was read is remembered for as long as the system tells the same of the file, as build tools do: its size, its inode, and when its
content and its status changed (who sets the first time back changes the second). A file that changed in the last seconds before it was
read could change once more within the same tick of its file system's clock, so it is not remembered (git's rule for "racily clean" files).
What still goes unseen, a disk that was written past the system or a clock that was set back, `sha256_of` finds, which always reads: so
are bundles opened, by agvas-build and agvas-verify always. What a process has read itself counts more than what is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from engines.cache import write_whole

TICK_NS = 2_000_000_000  # of the coarsest clock that a file system has, FAT's

State = tuple[int, ...]

# What this process has read itself, by absolute path.
_read: dict[str, tuple[State, str]] = {}
_NEVER: tuple[State, str] = ((), "")


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in blocks.

    Raises:
        OSError: it cannot be read.
    """
    began, state = time.time_ns(), _state(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if max(state[1:3]) < began - TICK_NS and _state(path) == state:
        _read[str(path.absolute())] = state, digest.hexdigest()
    return digest.hexdigest()


def remembered_sha256(path: Path, memory: Path) -> str:
    """The same, as this process has read it, else as the file `memory` tells, else read now; kept there where it can be written.

    Raises:
        OSError: the file cannot be read.
    """
    name, state, kept = str(path.absolute()), _state(path), _kept(memory)
    found, (seen, digest) = kept.get(name), _read.get(name, _NEVER)
    if seen != state:
        if isinstance(found, dict) and found.get("state") == list(state) and isinstance(found.get("sha256"), str):
            return str(found["sha256"])
        digest = sha256_of(path)
        if _read.get(name, _NEVER) != (state, digest):  # too young, or changed meanwhile
            return digest
    if found != (told := {"state": list(state), "sha256": digest}):
        # Another process may be writing, too: the last one's stays, and what is lost is read again.
        with contextlib.suppress(OSError):
            there = {other: entry for other, entry in kept.items() if Path(other).is_file()}
            write_whole(memory, (json.dumps(there | {name: told}, indent=1) + "\n").encode())
    return digest


def _state(path: Path) -> State:
    """What the system tells of a file: size, when content and status changed, inode."""
    told = path.stat()
    return told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino


def _kept(memory: Path) -> dict[str, Any]:
    """By absolute path {"state", "sha256"}; none where there is no such file, or a damaged one."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(kept := json.loads(memory.read_bytes()), dict):
            return kept
    return {}
