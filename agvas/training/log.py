"""The log of a run: log.jsonl and TensorBoard's events, the same numbers, each step once, also after a resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX import SummaryWriter

from agvas.writing import replacing


class Log:
    """A run's log from step `first` on."""

    def __init__(self, folder: Path, first: int, processes: int) -> None:
        self.path, self.processes = folder / "log.jsonl", processes
        if self.path.exists():  # what was logged after the last save comes again
            kept = [line for step, line in _logged(self.path) if step < first]
            with replacing(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.started, self.since, self.last = time.monotonic(), time.monotonic(), first - 1

    def write(self, step: int, values: dict[str, float], images: int) -> None:
        now = time.monotonic()
        rate = (step - self.last) * images / max(now - self.since, 1e-9)
        self.since, self.last = now, step
        speed = {"seconds": round(now - self.started, 1), "images_per_second": round(rate, 2), "processes": self.processes}
        line = {"step": step, **speed, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in (values | {"images_per_second": rate}).items():
            self.events.add_scalar(name, value, step)

    def close(self) -> None:
        self.events.close()


def _logged(path: Path) -> Iterator[tuple[int, str]]:
    """(step, line) of a log; half a last line, of a full disk or a power cut, is left out. Raises ValueError for any other that is none."""
    lines = path.read_text(errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: expected JSON with a step, got {line[:60]!r}; remove the line") from error
        yield step, line
