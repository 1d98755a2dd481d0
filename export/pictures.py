"""Pictures that parity is judged on: a user's folder, or procedural ones of many sizes and shapes from seeds unused in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.images import read_image
from runtime.picture_files import find_images

# Training uses seeds from 1,000,000 up to its pool's size.
FIRST_SEED = 8_000_000_000
SIZES = ((240, 320), (256, 256), (320, 200), (180, 400), (384, 384))


class Pictures(Sequence[np.ndarray]):
    """Pictures uint8 RGB [H, W, 3], each read or made when its turn comes, so that a folder of large ones fits in memory."""

    def __init__(self, readers: list[Callable[[], np.ndarray]]) -> None:
        self._readers = readers

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, index: Any) -> Any:
        return self._readers[index]() if isinstance(index, int) else Pictures(self._readers[index])


def parity_pictures(folder: Path | None, count: int) -> Pictures:
    """At most `count` pictures of the folder, evenly over its sorted names, which may stand for classes; without one, `count` procedural
    pictures, a third of them free of defects.

    Raises:
        ImageError: one of the folder's cannot be read; found out here, before any work.
    """
    if folder is not None:
        paths = find_images([str(folder)])
        chosen = [paths[index * len(paths) // count] for index in range(count)] if count < len(paths) else paths
        for path in chosen:
            read_image(path)
        return Pictures([partial(read_image, path) for path in chosen])
    return Pictures([partial(procedural_picture, FIRST_SEED + i, *SIZES[i % len(SIZES)]) for i in range(count)])


def procedural_picture(seed: int, height: int, width: int) -> np.ndarray:
    """One picture of the training generator; OpenCV is imported only where pictures are made."""
    from agvas.training.procedural import make_sample

    return make_sample(seed, height, width).image
