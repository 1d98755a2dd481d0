"""Outcomes of many pictures, their maps and masks in a file: the reference's are compared with again and again, and large cameras' pictures
(60 MB each at 12 megapixels) would not fit in memory together.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.parity import Outcome


@dataclass(frozen=True)
class _Kept:
    offset: int
    anchor_states: np.ndarray | None
    answer: tuple[int, ...]
    error: str


class OutcomesOnDisk(Sequence[Outcome]):
    """A list of outcomes to append to, each read when asked for; the file has no name and goes with the object, or the process."""

    def __init__(self, folder: Path) -> None:
        """folder: of a disk with 5 bytes for each pixel."""
        self._file = tempfile.TemporaryFile(dir=folder)
        self._kept: list[_Kept] = []

    def append(self, outcome: Outcome) -> None:
        offset = self._file.seek(0, 2)
        np.save(self._file, outcome.anomaly_map)
        np.save(self._file, outcome.mask)
        self._kept.append(_Kept(offset, outcome.anchor_states, outcome.answer, outcome.error))

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return [self[place] for place in range(*index.indices(len(self)))]
        kept = self._kept[index]
        self._file.seek(kept.offset)
        anomaly_map, mask = np.load(self._file), np.load(self._file)
        return Outcome(mask, anomaly_map, kept.anchor_states, kept.answer, kept.error)
