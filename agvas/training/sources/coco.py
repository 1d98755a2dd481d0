"""Segmentation sets in COCO's JSON: COCO instances, PACO-LVIS, PartImageNet, and PASCAL-Part as VLPart converts it.

    {"images": [{id, file_name, height, width}], "annotations": [{id, image_id, category_id, segmentation}], "categories": [{id, name}]}

A segmentation is a list of polygons, a run-length encoding (compressed or not), or, in refCLEF, a list of encodings. One sample is one
image, one class drawn among those present, and the union of that class's annotations (LISA takes a single annotation for parts; "the handle
of the mug" with one handle of two marked would teach the model to leave one out). Part classes "mug:handle" are named "the mug handle" or
"the handle of the mug", as LISA does; synonyms in brackets ("cup_(drinkware)") are dropped. PASCAL-Part's own .mat files are not read:
LISA, whose set-up the paper adopts, takes VLPart's train.json.

Polygons may reach one pixel out of their image (rounding). Where one reaches further, its class is left out of that image and counted in a
remark: without the annotation alone, what it shows would be taught as background. Where more than one annotation in a hundred (and more
than one at all) is so, polygons and sizes do not belong together, which is an error. Polygons of fewer than three corners and annotations
without any are left out and counted in a remark, since LVIS has some. This is the only file that imports pycocotools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, read_json, take
from agvas.training.sources.pictures import check_size
from agvas.training.sources.texts import checked

SLACK = 1.0  # pixels
OUTSIDE_SHARE = 0.01  # of annotations

Shape = npt.NDArray[np.float64] | dict[str, Any]
"""A polygon x, y, x, y, ..., or a run-length encoding {"size": [height, width], "counts": ...}."""


@dataclass(frozen=True)
class CocoImage:
    """One image with its annotations by category; `names` is shared by all images of a file."""

    image: Path
    height: int
    width: int
    shapes: Mapping[int, tuple[Shape, ...]]
    names: Mapping[int, tuple[str, ...]]
    listed_in: Path

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[str, npt.NDArray[np.bool_]] | None:
        """(name, mask bool [H, W]) of a class drawn among those present; which one depends on rng only."""
        category = int(rng.choice(sorted(self.shapes)))
        names = self.names[category]
        mask = union(self.shapes[category], self.height, self.width, self.listed_in, str(self.image))
        check_size(mask, height, width, self.listed_in, self.image)
        return names[int(rng.integers(len(names)))], mask


def read_coco(annotations: Path, images: Path) -> tuple[list[CocoImage], list[str]]:
    """The images that have annotations, by id, and remarks on what is left out.

    Args:
        annotations: the JSON file.
        images: the folder that its file_name is relative to.
    """
    instances = Instances(annotations, need_folder(images, "the images that the annotations name"))
    names = {category: _names(name) for category, name in instances.categories.items()}
    shapes: dict[int, dict[int, list[Shape]]] = {}
    unusable: set[tuple[int, int]] = set()
    for entry in sorted(instances.annotations.values(), key=lambda entry: entry["id"]):
        parts, image, category = instances.shapes(entry), int(entry["image_id"]), int(entry["category_id"])
        if category not in names:
            place = f"annotation {entry['id']}"
            raise DatasetError(annotations, None, f"a category_id of the file's categories in {place}", str(category), "restore the file")
        if parts is None:
            unusable.add((image, category))
        elif parts:
            shapes.setdefault(image, {}).setdefault(category, []).extend(parts)
    for image, category in unusable:
        shapes.get(image, {}).pop(category, None)
    listing = Listing()
    found = []
    for key, by_category in sorted((key, by_category) for key, by_category in shapes.items() if by_category):
        path = listing.need(*instances.path(key), place=f"image {key}")
        size = instances.sizes[key]
        found.append(CocoImage(path, *size, {category: tuple(parts) for category, parts in by_category.items()}, names, annotations))
    remarks = instances.remarks()
    if not found:
        raise DatasetError(annotations, None, "annotated images", "none", "check the file")
    if len(found) < len(instances.sizes):
        remarks.append(f"{len(instances.sizes) - len(found)} images without annotations left out")
    return found, remarks


class Instances:
    """A COCO file's images, annotations and categories by id, checked as far as ids and shapes go."""

    def __init__(self, file: Path, images: Path) -> None:
        content = read_json(file, "COCO images, annotations and categories")
        self.file, self.images = file, images
        self.sizes: dict[int, tuple[int, int]] = {}
        self._names: dict[int, str] = {}
        for n, entry in enumerate(take(content, "images", list, file, "the file")):
            key = take(entry, "id", int, file, f"images[{n}]")
            self._names[key] = take(entry, "file_name", str, file, f"image {key}")
            self.sizes[key] = (take(entry, "height", int, file, f"image {key}"), take(entry, "width", int, file, f"image {key}"))
        self.categories: dict[int, str] = {}
        for n, entry in enumerate(take(content, "categories", list, file, "the file")):
            key = take(entry, "id", int, file, f"categories[{n}]")
            self.categories[key] = checked(take(entry, "name", str, file, f"category {key}"), file, f"the name of category {key}")
        self.annotations: dict[int, dict[str, Any]] = {}
        for n, entry in enumerate(take(content, "annotations", list, file, "the file")):
            key = take(entry, "id", int, file, f"annotations[{n}]")
            place = f"annotation {key}"
            if take(entry, "image_id", int, file, place) not in self.sizes:
                raise DatasetError(file, None, f"an image_id of the file's images in {place}", str(entry["image_id"]), "restore the file")
            take(entry, "category_id", int, file, place)
            self.annotations[key] = entry
        self._short = self._without = self._looked_at = 0
        self._outside: list[str] = []

    def path(self, image: int) -> tuple[Path, Path]:
        """(the picture's path, the file that names it)"""
        return self.images / self._names[image], self.file

    def shapes(self, entry: dict[str, Any]) -> tuple[Shape, ...] | None:
        """The polygons or encodings of an annotation, none where all are degenerate; None where one reaches out of its image."""
        place, file = f"annotation {entry['id']}", self.file
        height, width = self.sizes[entry["image_id"]]
        value = entry.get("segmentation")
        if not isinstance(value, (list, dict)):
            expected = f"polygons or a run-length encoding as 'segmentation' of {place}"
            raise DatasetError(file, None, expected, f"{value!r:.60}", "restore the file")
        self._looked_at += 1
        parts: list[Shape] = []
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _check_encoding(part, height, width, file, place)
                parts.append(part)
                continue
            polygon = _polygon(part, file, place)
            if out := _reach_out(polygon, height, width):
                self._outside.append(f"{out} in {place}")
                return None
            if len(polygon) < 6:
                self._short += 1
            else:
                parts.append(polygon)
        self._without += not parts
        return tuple(parts)

    def remarks(self) -> list[str]:
        """On what `shapes` left out. Raises DatasetError where more polygons reach out of their images than a mistake explains."""
        if len(self._outside) > max(1, OUTSIDE_SHARE * self._looked_at):
            found = f"{self._outside[0]}, and so in {len(self._outside)} of {self._looked_at} annotations"
            raise DatasetError(self.file, None, "polygons inside their images", found, "take annotations and sizes from one release")
        remarks = [f"{self._short} polygons of fewer than three corners left out"] if self._short else []
        if self._outside:
            first = self._outside[0]
            remarks.append(f"{len(self._outside)} annotations that reach out of their images left out, the first with {first}")
        return remarks + ([f"{self._without} annotations without a shape left out"] if self._without else [])


def union(shapes: tuple[Shape, ...], height: int, width: int, file: Path, place: str) -> npt.NDArray[np.bool_]:
    """bool [H, W], True where any shape is."""
    try:
        from pycocotools import mask as coco
    except ModuleNotFoundError as error:
        said = f'{file}: COCO masks need pycocotools, which is not installed; pip install "agvas[train]"'
        raise ModuleNotFoundError(said, name="pycocotools") from error
    mask = np.zeros((height, width), bool)
    polygons = [shape.tolist() for shape in shapes if isinstance(shape, np.ndarray)]
    encodings = coco.frPyObjects(polygons, height, width) if polygons else []
    for shape in shapes:
        if isinstance(shape, dict):
            counts = shape["counts"]
            if isinstance(counts, list):
                encodings.append(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width))
            else:
                encodings.append({"size": [height, width], "counts": counts.encode()})
    for encoding in encodings:
        try:
            mask |= coco.decode(encoding).astype(bool)
        except Exception as error:  # pycocotools raises ValueError or, from C, whatever a damaged string leads to
            expected = f"a run-length encoding of {height} x {width} in {place}"
            raise DatasetError(file, None, expected, str(error), "restore the file") from error
    return mask


def _check_encoding(part: dict[str, Any], height: int, width: int, file: Path, place: str) -> None:
    size = take(part, "size", list, file, place)
    if size != [height, width]:
        raise DatasetError(file, None, f"an encoding of size [{height}, {width}] (its image's) in {place}", str(size), "restore the file")
    counts = part.get("counts")
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != height * width:
            raise DatasetError(file, None, f"counts that sum to {height * width} in {place}", f"{counts!r:.60}", "restore the file")
    elif not isinstance(counts, str) or not counts.isascii():
        raise DatasetError(file, None, f"counts as a list or an ASCII string in {place}", f"{counts!r:.60}", "restore the file")


def _polygon(part: Any, file: Path, place: str) -> npt.NDArray[np.float64]:
    try:
        polygon = np.asarray(part, np.float64)
    except (TypeError, ValueError):
        polygon = np.empty((0, 0))
    if polygon.ndim != 1 or len(polygon) % 2 or not np.isfinite(polygon).all():
        raise DatasetError(file, None, f"a polygon x, y, x, y, ... in {place}", f"{part!r:.60}", "restore the file")
    return polygon


def _reach_out(polygon: npt.NDArray[np.float64], height: int, width: int) -> str:
    """Where a polygon goes that leaves its image by more than SLACK, "" for one that does not."""
    x, y = polygon[::2], polygon[1::2]
    if not len(x) or (min(x.min(), y.min()) >= -SLACK and x.max() <= width + SLACK and y.max() <= height + SLACK):
        return ""
    return f"x {x.min():g}..{x.max():g}, y {y.min():g}..{y.max():g} of {width} x {height} (width x height)"


def _names(category: str) -> tuple[str, ...]:
    """What a class may be called: one name, or two for a part."""
    words = [part.split("_(")[0].replace("_", " ").strip().lower() for part in category.split(":")]
    if len(words) == 2:
        return f"the {words[0]} {words[1]}", f"the {words[1]} of the {words[0]}"
    return (f"the {' '.join(words)}",)
