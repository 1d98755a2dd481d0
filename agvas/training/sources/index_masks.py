"""Segmentation sets with class-index masks: ADE20K (scene parsing) and COCO-Stuff.

ADE20K, as ADEChallengeData2016.zip unpacks: images/training/NAME.jpg, annotations/training/NAME.png with 0 for "other" and 1..150 for the
classes of objectInfo150.txt (a table with the columns Idx and Name; of synonyms the first is taken; in the release some cells have blanks
at their ends, "22 " and "bed ").

COCO-Stuff, as its README lays it out: images/train2017/NAME.jpg, annotations/train2017/NAME.png (the "stuffthingmaps") with 255 for
unlabelled and v for the class v + 1 of labels.txt ("1: person"), which belongs beside them. Classes with a hyphen ("wall-other",
"floor-tile") are no names that anyone says and are treated as unlabelled, as in LISA.

One sample is one image and one class drawn among those present. Which classes an image holds is known only once its mask is decoded, so an
image that turns out to hold none gives nothing, and the mixture draws again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, pictures_in, read_text
from agvas.training.sources.pictures import check_size, read_indices
from agvas.training.sources.texts import checked

ADE_OTHER = 0
STUFF_UNLABELLED = 255


@dataclass(frozen=True)
class IndexedImage:
    """One image with its mask of class indices; `names` and `ignored` are shared by all images of a set."""

    image: Path
    mask: Path
    names: Mapping[int, str]
    ignored: frozenset[int]

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[str, npt.NDArray[np.bool_]] | None:
        """(name, mask bool [H, W]) of a class drawn among those present; None where the mask holds none."""
        indices = read_indices(self.mask)
        check_size(indices, height, width, self.mask, self.image)
        present = [int(index) for index in np.unique(indices) if int(index) not in self.ignored]
        unknown = [index for index in present if index not in self.names]
        if unknown:
            remedy = "take masks and class names from the same release"
            raise DatasetError(self.mask, None, f"class indices of {min(self.names)}..{max(self.names)}", str(unknown[0]), remedy)
        if not present:
            return None
        chosen = int(rng.choice(present))
        return self.names[chosen], indices == chosen


def read_ade20k(root: Path, split: str = "training") -> tuple[list[IndexedImage], list[str]]:
    """Images by name; root is ADEChallengeData2016."""
    return _pairs(root, split, _ade_names(root / "objectInfo150.txt"), frozenset({ADE_OTHER}))


def read_coco_stuff(root: Path, split: str = "train2017") -> tuple[list[IndexedImage], list[str]]:
    """Images by name; root holds images, annotations and labels.txt."""
    labels = _stuff_labels(root / "labels.txt")
    names = {number - 1: f"the {name}" for number, name in labels.items() if number and "-" not in name}
    unsaid = {number - 1 for number, name in labels.items() if number and "-" in name}
    return _pairs(root, split, names, frozenset(unsaid | {STUFF_UNLABELLED}))


def _pairs(root: Path, split: str, names: Mapping[int, str], ignored: frozenset[int]) -> tuple[list[IndexedImage], list[str]]:
    images = need_folder(need_folder(root, "images and annotations") / "images" / split, "images")
    masks = pictures_in(need_folder(root / "annotations" / split, "masks of class indices"))
    listing = Listing()
    found = [IndexedImage(listing.need(images / f"{mask.stem}.jpg", mask, "its image"), mask, names, ignored) for mask in masks]
    if not found:
        raise DatasetError(root / "annotations" / split, None, "masks", "none", "unpack the annotations here")
    left_out = len(pictures_in(images)) - len(found)
    return found, [f"{left_out} images without a mask left out"] if left_out > 0 else []


def _ade_names(file: Path) -> dict[int, str]:
    text = read_text(file, "ADE20K's classes")
    header, *rows = [re.split(r"\s*\t\s*| {2,}", line.strip()) for line in text.splitlines() if line.strip()] or [[]]
    if "Idx" not in header or "Name" not in header:
        raise DatasetError(file, 1, "columns Idx and Name separated by tabs", " ".join(header) or "nothing", "restore it from the release")
    names = {}
    for line, row in enumerate(rows, 2):
        if len(row) != len(header) or not row[header.index("Idx")].isdigit():
            raise DatasetError(file, line, f"{len(header)} cells with a number as Idx", " ".join(row), "restore it from the release")
        name = checked(row[header.index("Name")].split(",")[0].split(";")[0], file, "a class name", line)
        names[int(row[header.index("Idx")])] = f"the {name}"
    if not names:
        raise DatasetError(file, None, "classes", "only the header", "restore it from the release")
    return names


def _stuff_labels(file: Path) -> dict[int, str]:
    labels = {}
    for line, text in enumerate(read_text(file, "COCO-Stuff's classes").splitlines(), 1):
        match = re.fullmatch(r"(\d+): (.+)", text.strip())
        if match:
            labels[int(match[1])] = checked(match[2], file, "a class name", line)
        elif text.strip():
            raise DatasetError(file, line, 'a number and a name ("1: person")', repr(text), "restore labels.txt from the release")
    if len(labels) < 2:
        raise DatasetError(file, None, "classes", "none", "restore labels.txt from the release")
    return labels
