"""The table of single pictures that agvas-eval writes: a CSV line for each, as soon as it is judged.

Every line is handed to the system at once, so an evaluation that is interrupted keeps what it has done, under the file's name with
`.partial` behind; the next run's lines take their place. A whole table is never overwritten.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import TracebackType

import numpy as np

from benchmarks.evaluation import Observation

__all__ = ["COLUMNS", "PerImageTable"]

COLUMNS = ("dataset", "image", "label", "category", "kind", "score", "area", "iou", "ap", "text", "seconds")


class PerImageTable:
    """A CSV file open for writing, complete when its `with` ends well. An empty cell means unknown or undefined.

    label is 1 for anomalous, 0 for normal; area counts the predicted mask's pixels; iou and ap are of this picture alone; image is its path
    below the data set's folder.
    """

    def __init__(self, path: Path) -> None:
        """ValueError where the file exists."""
        if path.exists():
            raise ValueError(f"--csv: expected a new file, got {path}, which exists; move it away or give another name")
        self._path, self.partial, self.lines = path, path.with_name(path.name + ".partial"), 0
        self._file = self.partial.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)
        self._file.flush()

    def __enter__(self) -> PerImageTable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Gives a whole table its name; what an error or an interruption cut off stays `partial`, unless it holds no line."""
        self._file.close()
        if kind is None:
            os.replace(self.partial, self._path)
        elif self.lines == 0:
            self.partial.unlink(missing_ok=True)

    def write(self, dataset: str, root: Path, seen: Observation) -> None:
        item = seen.item
        self._writer.writerow(
            (
                dataset,
                Path(os.path.relpath(item.image, root)).as_posix(),
                "" if seen.is_anomalous is None else int(seen.is_anomalous),
                item.category,
                item.kind or "",
                f"{seen.prediction.score:.6f}",
                int(np.count_nonzero(seen.prediction.mask)),
                "" if seen.iou is None else f"{seen.iou:.6f}",
                "" if seen.ap is None else f"{seen.ap:.6f}",
                seen.prediction.text,
                f"{seen.seconds:.4f}",
            )
        )
        self._file.flush()
        self.lines += 1
