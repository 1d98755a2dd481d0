"""One picture of an anomaly set with its truth: a mask in which every non-zero pixel is anomalous, or no mask on a normal picture.

Published sets write anomalous pixels as 255, 1 or a palette colour, and resized releases have grey edges; all of these are non-zero, which
is also how their public loaders read them. Manifests (manifest.py) are stricter: 0 and 255 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.pictures import check_size, read_nonzero


class AnomalyRecord(Protocol):
    """What every reader of an anomaly set gives for one picture; manifest.Item is one too."""

    @property
    def image(self) -> Path: ...
    @property
    def is_anomalous(self) -> bool: ...
    @property
    def category(self) -> str: ...
    @property
    def kind(self) -> str | None: ...
    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        """bool [H, W], True where anomalous, of the size of the decoded image; DatasetError where the truth does not fit it."""


@dataclass(frozen=True)
class MaskedImage:
    """A picture whose truth is a mask file, any non-zero value anomalous; `mask` is None on a normal picture."""

    image: Path
    mask: Path | None
    category: str
    kind: str | None
    split: str | None

    @property
    def is_anomalous(self) -> bool:
        return self.mask is not None

    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        if self.mask is None:
            return np.zeros((height, width), bool)
        truth = read_nonzero(self.mask)
        check_size(truth, height, width, self.mask, self.image)
        check_anomalous(truth, self.mask)
        return truth


def check_anomalous(truth: npt.NDArray[np.bool_], file: Path) -> None:
    if not truth.any():
        raise DatasetError(file, None, "anomalous pixels", "none in the whole mask", "restore the mask, or take the picture out of the set")
