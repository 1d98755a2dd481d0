"""How busy others made the machine while something was measured: their share of the processors' time, as Linux counts it.

A load average looks back over minutes before a run; this looks at the run itself. Time of the processors is the kernel's (/proc/stat),
from it the own processes' is taken (/proc/PID/stat), and what is left is everybody else's. Where a machine is virtual, what its host
gave to other guests is told apart ("steal"). Nothing is told on systems that count otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
BUSY = 0.05  # share of the processors' time beyond which figures are marked


@dataclass(frozen=True)
class Counted:
    """Seconds that have been counted up to a moment: all of the usable processors', idle among them, those busy, stolen, and our own."""

    total: float
    busy: float
    steal: float
    own: float


def counted(processes: Iterable[int], proc: Path = PROC) -> Counted | None:
    """At this moment, for this process, its ended children and `processes` with theirs; None where the system does not tell."""
    try:
        ticks = os.sysconf("SC_CLK_TCK")
        usable = os.sched_getaffinity(0)
        fields = [line.split() for line in (proc / "stat").read_text().splitlines() if line.startswith("cpu")]
        rows = [[int(value) for value in row[1:9]] for row in fields if row[0] in {f"cpu{number}" for number in usable}]
        own = sum(_ticks(proc / str(number) / "stat") for number in {os.getpid(), *processes})
    except (AttributeError, OSError, ValueError, IndexError):
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in user's.
    user, nice, system, idle, waiting, irq, softirq, steal = (sum(column) / ticks for column in zip(*rows, strict=True))
    busy = user + nice + system + irq + softirq
    return Counted(busy + idle + waiting + steal, busy, steal, own / ticks)


def _ticks(stat: Path) -> int:
    """User and system time of a process's threads and of its ended children. The name, in brackets, may hold spaces."""
    fields = stat.read_text().rpartition(")")[2].split()
    return sum(int(value) for value in fields[11:15])


def other_work(before: Counted | None, after: Counted | None) -> dict[str, Any]:
    """{"others", "steal"}: shares of the usable processors' time between two moments, and "seconds" of it; or {"reason"}.

    Others' work on processors that may not be used is not in it. Counters move in hundredths of a second: a short run is told roughly.
    """
    if before is None or after is None:
        return {"reason": "this system does not count its processors' time as Linux does"}
    total = after.total - before.total
    if total <= 0:
        return {"reason": "the processors' counters did not move"}
    others = (after.busy - before.busy) - (after.own - before.own)
    shares = {"others": max(0.0, others) / total, "steal": (after.steal - before.steal) / total}
    return {name: round(share, 4) for name, share in shares.items()} | {"seconds": round(total, 2)}


def taken(told: Mapping[str, Any]) -> float | None:
    """The share that others and the host's guests took together, of what `other_work` told; None where it could not tell."""
    return told["others"] + told["steal"] if "others" in told else None


def in_words(told: Mapping[str, Any]) -> str:
    """A sentence of what `other_work` told, with what it means for the figures."""
    share = taken(told)
    if share is None:
        return f"What other processes took of the processors is not told: {told['reason']}."
    verdict = ": times and ratios are not to be trusted" if share > BUSY else ""
    shares = f"{told['others']:.1%} of the processors' time while this was measured, the host's other guests {told['steal']:.1%}"
    return f"Other processes took {shares}{verdict}."
