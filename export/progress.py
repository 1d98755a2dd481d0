"""What a long export is doing: one line a step on stderr, and a bar where a step counts."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from runtime.progress import pace


def counted(number: int, what: str) -> str:
    """"1 layer", "2 layers"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


class Progress:
    """Announces steps with the seconds the last one took."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._step: str | None = None
        self._started = 0.0
        self._bar: tqdm | None = None

    def begin(self, step: str, total: int | None = None) -> None:
        self.end()
        self._step, self._started = step, time.monotonic()
        if total and not self.quiet:
            self._bar = tqdm(total=total, desc=step, unit="step", **pace())

    def advance(self) -> None:
        if self._bar:
            self._bar.update()

    def show(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what`: for work that counts by itself, with a bar of its own for each such work."""
        if self.quiet:
            return
        if self._bar is None or what != self._bar.desc:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, initial=done, desc=what, unit="step", **pace())
        self._bar.update(done - self._bar.n)

    def note(self, line: str) -> None:
        """A line between steps."""
        self.end()
        if not self.quiet:
            print(f"  {line}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._bar:
            self._bar.close()
            self._bar = None
        if self._step and not self.quiet:
            print(f"  {self._step}: {time.monotonic() - self._started:.1f} s", file=sys.stderr, flush=True)
        self._step = None
