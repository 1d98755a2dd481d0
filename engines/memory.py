"""How much memory a process may still take, what the machine has to spare or a container's limit leaves, and how much it took at most.

A container sees its host's memory, and is killed where it takes more than its own limit: both count.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's own
# By version of control groups: limit, use, and what of the use are files that give way.
LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", ("total_inactive_file", "total_active_file")),
)


def available_memory() -> int | None:
    """Bytes that a process can have before the system begins to swap or kill; None where the system does not tell.

    Files that were read count as used in a container (a bundle, when its hashes were checked) and give way to a process: they are free.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    for limit, use, statistics, files in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such version here, or "max": no limit
            left = int((CONTROL_GROUP / limit).read_text()) - int((CONTROL_GROUP / use).read_text())
            kinds = dict(line.split() for line in (CONTROL_GROUP / statistics).read_text().splitlines())
            found.append(left + sum(int(kinds.get(kind, 0)) for kind in files))
    return min(found) if found else None


def peak_memory() -> int | None:
    """Largest resident memory of this program so far, bytes; None where the system does not tell (Linux does).

    Not getrusage's: that survives fork and exec, and counts what started the program, too.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return None
