"""Calibration pictures: a user's folder, or procedural ones of many sizes and shapes from seeds that nothing else uses."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import ImageError
from runtime.images import read_image
from runtime.picture_files import find_images

# Training counts from 1,000,000, parity from 8,000,000,000.
FIRST_SEED = 9_000_000_000
SIZES = ((256, 256), (240, 320), (384, 384), (320, 200))


class CalibrationPictures(Sequence[np.ndarray]):
    """Pictures uint8 RGB [H, W, 3], each read or made when its turn comes, so that a folder of large ones fits in memory."""

    def __init__(self, readers: Sequence[Callable[[], np.ndarray]]) -> None:
        self._readers = list(readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, index: Any) -> Any:
        return self._readers[index]() if isinstance(index, int) else CalibrationPictures(self._readers[index])


def calibration_pictures(folder: Path | None, count: int, first_seed: int = FIRST_SEED) -> CalibrationPictures:
    """`count` pictures of the folder, spread evenly over its sorted names; without one, procedural pictures, a third free of defects.

    Raises:
        ImageError: a folder that is missing or has no pictures.
        ValueError: a folder with fewer pictures.
    """
    if folder is None:
        return CalibrationPictures([partial(_procedural, first_seed + i, *SIZES[i % len(SIZES)]) for i in range(count)])
    if not folder.exists() and not glob.has_magic(str(folder)):
        raise ImageError(f"{folder}: expected a folder of pictures, got no such folder; check the path")
    paths = find_images([str(folder)])
    if len(paths) < count:
        raise ValueError(f"{folder}: expected at least {count} pictures, got {len(paths)}; give more, or ask for fewer (--samples)")
    return CalibrationPictures([partial(read_image, paths[i * len(paths) // count]) for i in range(count)])


def _procedural(seed: int, height: int, width: int) -> np.ndarray:
    from agvas.training.procedural import make_sample  # OpenCV is loaded only where pictures are made

    return make_sample(seed, height, width).image
