"""GC10-DET: steel plate defects with bounding boxes in Pascal-VOC XML.

The truth is box-level: every box is filled, so a mask covers more than the defect. The paper counts this set among its segmentation data
and does not say what it does about that; masks drawn by hand can be given as a manifest instead.

Layout: pictures in folders by defect, 1/ ... 10/ in the release, images/images/DEFECT/ in the widely used copy; annotations by picture name
in lable/ (the release's spelling), lable/lable, label/label or label/. Files of one name in several folders are taken for one picture and
read once. Pictures without XML or boxes are left out: unlabelled is not normal. All others are anomalous. One XML file of the release has
an object by the name of "d", which is no defect's; public converters leave it out and so does this, with a remark. Any other unknown name
is an error. The release's own README could not be read; this is what public loaders of both copies show.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder
from agvas.training.sources.pictures import picture_size

LABEL_FOLDERS = ("lable/lable", "lable", "label/label", "label")
SLACK = 1.0  # pixels a box may reach out of its picture: annotators' tools count corners from 0 or 1
KINDS = {
    "1_chongkong": "punching hole",
    "2_hanfeng": "welding line",
    "3_yueyawan": "crescent gap",
    "4_shuiban": "water spot",
    "5_youban": "oil spot",
    "6_siban": "silk spot",
    "7_yiwu": "inclusion",
    "8_yahen": "rolled pit",
    "9_zhehen": "crease",
    "10_yaozhe": "waist folding",
    "10_yaozhed": "waist folding",
}
CORRUPT = "d"

Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels; right and bottom are the first not covered."""


@dataclass(frozen=True)
class BoxedImage:
    """One picture whose truth is its boxes, filled."""

    image: Path
    boxes: tuple[Box, ...]
    kind: str | None
    annotation: Path
    is_anomalous: bool = True
    category: str = "steel plate"

    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        mask = np.zeros((height, width), bool)
        for left, top, right, bottom in self.boxes:
            _check_box((left, top, right, bottom), height, width, self.annotation)
            mask[max(0, round(top)) : round(bottom), max(0, round(left)) : round(right)] = True
        return mask


def read_gc10(root: Path) -> tuple[list[BoxedImage], list[str]]:
    """The labelled pictures by name, and remarks on what is left out. Headers are read, pixels are not decoded."""
    need_folder(root, "pictures in folders by defect, and lable")
    labels = next((root / name for name in LABEL_FOLDERS if any((root / name).glob("*.xml"))), None)
    if labels is None:
        remedy = "unpack the annotations beside the pictures"
        raise DatasetError(root, None, f"XML files in one of {', '.join(LABEL_FOLDERS)}", "none", remedy)
    pictures = _pictures(root)
    listing = Listing()
    corrupt: list[Path] = []
    annotated = [(path, labels / f"{name}.xml") for name, path in sorted(pictures.items()) if listing.holds(labels / f"{name}.xml")]
    found = [_image(path, annotation, corrupt) for path, annotation in annotated]
    boxed = [image for image in found if image.boxes]
    if not boxed:
        remedy = "take pictures and annotations from one release"
        raise DatasetError(labels, None, "NAME.xml with boxes for the pictures", "none", remedy)
    left_out = len(pictures) - len(boxed)
    remarks = [f"{left_out} pictures without boxes left out"] if left_out else []
    return boxed, remarks + ([f"{len(corrupt)} objects named {CORRUPT!r} left out, the first in {corrupt[0].name}"] if corrupt else [])


def _pictures(root: Path) -> dict[str, Path]:
    """Pictures by name without suffix; of copies in several folders the first by path."""
    pictures: dict[str, Path] = {}
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() == ".jpg" and not path.name.startswith(".")):
        first = pictures.setdefault(path.stem, path)
        if os.path.getsize(first) != os.path.getsize(path):
            raise DatasetError(path, None, f"a copy of {first}", "a file of another size", "rename one of the two, and its annotation")
    return pictures


def _image(image: Path, annotation: Path, corrupt: list[Path]) -> BoxedImage:
    """`corrupt` takes the annotation once for each object that is left out."""
    try:
        everything = ElementTree.parse(annotation).getroot().findall("object")
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two: an encoding that is unknown or not kept
        raise DatasetError(annotation, None, "Pascal-VOC XML", str(error), "download it again") from error
    named = [(item, item.findtext("name", "").strip()) for item in everything]
    corrupt += [annotation for _, name in named if name == CORRUPT]
    objects = [item for item, name in named if name != CORRUPT]
    size = picture_size(image)
    boxes = tuple(_box(item, annotation) for item in objects)
    for box in boxes:
        _check_box(box, *size, annotation)
    names = dict.fromkeys(name for _, name in named if name != CORRUPT)
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise DatasetError(annotation, None, f"a defect of {', '.join(KINDS)}", repr(unknown[0]), "correct the name")
    return BoxedImage(image, boxes, " and ".join(dict.fromkeys(KINDS[name] for name in names)) or None, annotation)


def _box(item: ElementTree.Element, annotation: Path) -> Box:
    texts = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(text or "") for text in texts)
    except ValueError as error:
        raise DatasetError(annotation, None, "numbers as xmin, ymin, xmax and ymax", repr(texts), "correct the box") from error
    return left, top, right, bottom


def _check_box(box: Box, height: int, width: int, annotation: Path) -> None:
    left, top, right, bottom = box
    inside = -SLACK <= left and right <= width + SLACK and -SLACK <= top and bottom <= height + SLACK
    if not (inside and round(right) - max(0, round(left)) >= 1 and round(bottom) - max(0, round(top)) >= 1):
        found = f"x {left:g}..{right:g}, y {top:g}..{bottom:g}"
        raise DatasetError(annotation, None, f"a box inside {width} x {height} (width x height) with an area", found, "correct the box")
