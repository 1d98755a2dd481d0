"""How progress bars are drawn, the same for every command."""

from __future__ import annotations

import sys
from typing import Any, TextIO

LOG_SECONDS = 10.0


def pace() -> dict[str, Any]:
    """tqdm's `mininterval` and `maxinterval`, seconds, and `file`: on a terminal ten times a second, each bar drawn over the last; in a
    log, where nothing can be drawn over, a line in ten seconds."""
    if sys.stderr.isatty():
        return {"mininterval": 0.1, "maxinterval": 0.1, "file": sys.stderr}
    return {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "file": Lines(sys.stderr)}


class Lines:
    """A text file on which each drawing of a bar is a line of its own: no carriage returns, no blanks to wipe the last one out."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        if line := text.strip():
            self._file.write(line + "\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
