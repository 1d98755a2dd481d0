"""CrackForest (CFD): road cracks, image/NAME.jpg with the truth in groundTruth/NAME.mat.

The .mat holds a struct groundTruth with Segmentation [H, W]; 1 is road and everything above it (2, in a few files also 3 and 4) crack, as
public converters have it. The same repository holds seg/NAME.seg, the annotation tool's text form of the same truth, which is not read.
The release has 155 pictures and 118 truths: a picture without one is left out, since unlabelled is not normal. All are anomalous.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, pictures_in
from agvas.training.sources.masked import check_anomalous
from agvas.training.sources.matlab import read_matlab
from agvas.training.sources.pictures import check_size

ROAD = 1


@dataclass(frozen=True)
class CrackImage:
    """One road picture; `mask` is its .mat file."""

    image: Path
    mask: Path
    is_anomalous: bool = True
    category: str = "road"
    kind: str | None = "crack"

    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        truth = read_matlab(self.mask).get("groundTruth")
        labels = getattr(truth, "Segmentation", None)
        if not isinstance(labels, np.ndarray) or labels.ndim != 2 or labels.dtype.kind not in "iuf":
            found = "no groundTruth" if truth is None else f"{type(labels).__name__}"
            raise DatasetError(self.mask, None, "groundTruth.Segmentation as a matrix of labels", found, "restore it from the release")
        if labels.min() < ROAD:
            raise DatasetError(self.mask, None, "labels from 1 (road)", str(labels.min()), "restore it from the release")
        mask = labels > ROAD
        check_size(mask, height, width, self.mask, self.image)
        check_anomalous(mask, self.mask)
        return mask


def read_crackforest(root: Path) -> tuple[list[CrackImage], list[str]]:
    """The labelled pictures by name, and a remark on those without truth."""
    pictures = pictures_in(need_folder(need_folder(root, "image and groundTruth") / "image", "road pictures"))
    truths = need_folder(root / "groundTruth", ".mat files")
    listing = Listing()
    labelled = [CrackImage(path, truths / f"{path.stem}.mat") for path in pictures if listing.holds(truths / f"{path.stem}.mat")]
    if not labelled:
        raise DatasetError(truths, None, "NAME.mat for the pictures in image/", "none", "clone the release's repository again")
    left_out = len(pictures) - len(labelled)
    return labelled, [f"{left_out} pictures without groundTruth/NAME.mat left out"] if left_out else []
