"""Referring expressions: refCOCO, refCOCO+, refCOCOg and refCLEF.

    ROOT/refcoco/instances.json and refs(unc).p       COCO annotations, and a list of {ref_id, ann_id, image_id, split, sentences: [{sent}]}
    ROOT/images/mscoco/images/train2014/*.jpg         of refCLEF: ROOT/images/saiapr_tc-12/*

As in the release's refer.py and in LISA, with refs(umd).p for refCOCOg and refs(unc).p for the others. The .p file is a pickle; it is read
by plain_pickle.py, which refuses everything but data. A .json file with the same list is read as well. One sample is one reference of the
split, one of its sentences drawn, and the mask of its annotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agvas.training.sources.coco import Instances, Shape, union
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, read_json, take
from agvas.training.sources.pictures import check_size
from agvas.training.sources.plain_pickle import read_plain_pickle
from agvas.training.sources.texts import checked

PLACES = {
    "refcoco": ("refs(unc).p", "images/mscoco/images/train2014"),
    "refcoco+": ("refs(unc).p", "images/mscoco/images/train2014"),
    "refcocog": ("refs(umd).p", "images/mscoco/images/train2014"),
    "refclef": ("refs(unc).p", "images/saiapr_tc-12"),
}
"""By set: the references' file below ROOT/SET, and the pictures' folder below ROOT."""


@dataclass(frozen=True)
class Reference:
    """One object of one image and the sentences that refer to it."""

    image: Path
    sentences: tuple[str, ...]
    shapes: tuple[Shape, ...]
    height: int
    width: int
    listed_in: Path

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[str, npt.NDArray[np.bool_]] | None:
        """(sentence, mask bool [H, W])"""
        sentence = self.sentences[int(rng.integers(len(self.sentences)))]
        mask = union(self.shapes, self.height, self.width, self.listed_in, str(self.image))
        check_size(mask, height, width, self.listed_in, self.image)
        return sentence, mask


def read_referring(
    root: Path, name: str, annotations: str | None = None, images: str | None = None, split: str = "train"
) -> tuple[list[Reference], list[str]]:
    """The references of a split by their id, and remarks on what is left out.

    Args:
        root: the folder with refcoco, refcoco+, refcocog, refclef and images.
        name: one of PLACES.
        annotations: another references' file below root / name, .p or .json.
        images: another folder of pictures below root.
    """
    default_file, default_images = PLACES[name]
    need_folder(root / name, f"instances.json and {default_file}")
    file = root / name / (annotations or default_file)
    instances = Instances(root / name / "instances.json", need_folder(root / (images or default_images), "the pictures"))
    content = read_json(file, "referring expressions") if file.suffix == ".json" else read_plain_pickle(file)
    if not isinstance(content, list):
        raise DatasetError(file, None, "a list of references", type(content).__name__, "restore the file from the release")
    listing = Listing()
    found: dict[int, Reference] = {}
    for n, entry in enumerate(content):
        place = f"refs[{n}]"
        if take(entry, "split", str, file, place) == split:
            reference = _reference(entry, place, file, instances, listing)
            if reference is not None:
                found[take(entry, "ref_id", int, file, place)] = reference
    if not found:
        splits = sorted({str(entry["split"]) for entry in content})
        raise DatasetError(file, None, f"references of split {split}", ", ".join(splits) or "none", "give another split")
    return [found[key] for key in sorted(found)], instances.remarks()


def _reference(entry: dict[str, Any], place: str, file: Path, instances: Instances, listing: Listing) -> Reference | None:
    key = take(entry, "ann_id", int, file, place)
    if key not in instances.annotations:
        raise DatasetError(file, None, f"an ann_id of {instances.file} in {place}", str(key), "take both files from one release")
    annotation = instances.annotations[key]
    if take(entry, "image_id", int, file, place) != annotation["image_id"]:
        found = f"image_id {entry['image_id']}"
        raise DatasetError(file, None, f"the image of annotation {key} ({annotation['image_id']}) in {place}", found, "restore the files")
    sentences = tuple(
        checked(take(sentence, "sent", str, file, place), file, f"a sentence of {place}")
        for sentence in take(entry, "sentences", list, file, place)
    )
    if not sentences:
        raise DatasetError(file, None, f"sentences in {place}", "none", "restore the file from the release")
    shapes = instances.shapes(annotation)
    if not shapes:
        return None  # counted in the remarks of `instances`
    path = listing.need(*instances.path(annotation["image_id"]), place=f"image {annotation['image_id']}")
    return Reference(path, sentences, shapes, *instances.sizes[annotation["image_id"]], listed_in=instances.file)
