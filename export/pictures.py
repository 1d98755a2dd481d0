"""Pictures that parity is judged on: a user's folder, or procedural ones of many sizes and shapes from seeds unused in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime.images import find_images, read_image

# Training uses seeds from 1,000,000 up to its pool's size.
FIRST_SEED = 8_000_000_000
SIZES = ((240, 320), (256, 256), (320, 200), (180, 400), (384, 384))


class ProceduralPictures(Sequence[np.ndarray]):
    """`count` pictures uint8 RGB [H, W, 3], a third of them free of defects, each made when it is asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        from agvas.training.procedural import make_sample

        if not 0 <= index < self.count:
            raise IndexError(index)
        height, width = SIZES[index % len(SIZES)]
        return make_sample(FIRST_SEED + index, height, width).image


class FolderPictures(Sequence[np.ndarray]):
    """At most `count` pictures of a folder, read when asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = find_images([str(folder)])[:count]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return read_image(self.paths[index])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (read_image(path) for path in self.paths)


def parity_pictures(folder: Path | None, count: int) -> Sequence[np.ndarray]:
    """The folder's pictures, or procedural ones where none is given."""
    return ProceduralPictures(count) if folder is None else FolderPictures(folder, count)
