"""How often progress bars are drawn, the same for every command."""

from __future__ import annotations

import sys

LOG_SECONDS = 10.0


def pace() -> dict[str, float]:
    """tqdm's `mininterval` and `maxinterval`, seconds: on a terminal ten times a second; in a log one line in ten seconds is enough."""
    seconds = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    return {"mininterval": seconds, "maxinterval": seconds}
