"""Stages that take turns in memory: opening one closes the one before, so that a chain needs the memory of its largest stage.

For models whose stages together do not fit. Every picture opens every stage anew, which costs seconds per gigabyte; the language stage
stays open while it writes an answer. Calls wait for one another.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path

import numpy as np

from engines import Engine, EngineOptions, StageSpec, open_engine


class Turn:
    """The one open stage of a chain."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: TurnStage | None = None
        self._engine: Engine | None = None

    def run(self, stage: TurnStage, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._lock:
            if self._owner is not stage or self._engine is None:
                self._close()
                self._engine = open_engine(stage.graph, stage.spec, stage.engine, stage.options)
                self._owner = stage
            return self._engine.run(feeds)

    def close(self) -> None:
        """Let the open stage go."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._owner = self._engine = None
        give_back()


class TurnStage:
    """A stage that is opened when its turn comes; see engines.Engine."""

    def __init__(self, turn: Turn, graph: Path, spec: StageSpec, engine: str, options: EngineOptions) -> None:
        self.turn, self.graph, self.spec, self.engine, self.options = turn, graph, spec, engine, options

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises what open_engine and Engine.run raise."""
        return self.turn.run(self, feeds)


def give_back() -> None:
    """Give freed memory back to the system; glibc keeps it otherwise, and the next stage's comes on top."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (AttributeError, OSError):
            pass  # another C library than glibc has no such function, and no such habit
