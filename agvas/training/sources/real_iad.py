"""Real-IAD: a JSON file for each class with the pictures of train and test, and the pictures in one folder for each resolution.

    realiad_jsons/CLASS.json                  {"meta": {"prefix": "CLASS/", "normal_class": "OK"}, "train": [...], "test": [...]}
    realiad_1024/CLASS/OK/S0001/*.jpg         entries: category, anomaly_class, image_path and mask_path (null on normal pictures),
    realiad_1024/CLASS/NG/KIND/S0001/*.png    paths relative to the resolution's folder and the prefix

Read from public loaders (anomalib, moviad, Dinomaly's README); the data set's own page could not be read. They differ in where the JSON
archive unpacks: realiad_jsons/realiad_jsons is taken where it exists, realiad_jsons otherwise, or what `annotations` says. Non-zero mask
pixels are anomalous. An anomalous picture to which the release names no mask (its users report some) is left out with a remark: it is
neither normal nor can it be learned from. A mask that is named and not there is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, read_json, take
from agvas.training.sources.masked import MaskedImage

KINDS = {
    "AK": "pit",
    "BX": "deformation",
    "CH": "abrasion",
    "HS": "scratch",
    "PS": "damage",
    "QS": "missing parts",
    "YW": "foreign object",
    "ZW": "contamination",
}
"""The release's abbreviations, in the words of the data set's paper; another one is kept as it is."""


def read_real_iad(
    root: Path, annotations: str | None = None, images: str = "realiad_1024", split: str | None = None
) -> tuple[list[MaskedImage], list[str]]:
    """Pictures by class and in the files' order, and a remark on those left out.

    Args:
        annotations: folder of the JSON files below root, e.g. "realiad_jsons_sv"; by default as the docstring above says.
        images: folder of the resolution below root.
        split: "train" or "test"; both by default.
    """
    need_folder(root, f"{images} and realiad_jsons")
    need_folder(root / images, "a folder for each class")
    if annotations is None:
        annotations = "realiad_jsons/realiad_jsons" if (root / "realiad_jsons/realiad_jsons").is_dir() else "realiad_jsons"
    files = sorted(need_folder(root / annotations, "CLASS.json files").glob("*.json"))
    if not files:
        raise DatasetError(root / annotations, None, "CLASS.json files", "none", "unpack realiad_jsons.zip here")
    listing = Listing()
    found: list[MaskedImage] = []
    without: list[Path] = []
    for file in files:
        content = read_json(file, "the pictures of a class")
        meta = take(content, "meta", dict, file, "the file")
        folder = root / images / take(meta, "prefix", str, file, "meta")
        normal = take(meta, "normal_class", str, file, "meta")
        for part in ("train", "test"):
            if split in (None, part):
                entries = take(content, part, list, file, "the file")
                pictures = [_image(entry, f"{part}[{n}]", file, folder, normal, part, listing) for n, entry in enumerate(entries)]
                found += [picture for picture in pictures if isinstance(picture, MaskedImage)]
                without += [picture for picture in pictures if isinstance(picture, Path)]
    if not found:
        raise DatasetError(root / annotations, None, f"pictures of split {split or 'train or test'}", "none", "check the split")
    return found, [f"{len(without)} anomalous pictures without a mask left out, the first {without[0].name}"] if without else []


def _image(entry: Any, place: str, file: Path, folder: Path, normal: str, part: str, listing: Listing) -> MaskedImage | Path:
    """The path alone of an anomalous picture to which no mask is named."""
    kind = take(entry, "anomaly_class", str, file, place)
    category = take(entry, "category", str, file, place)
    image = listing.need(folder / take(entry, "image_path", str, file, place), file, place)
    if kind == normal:
        return MaskedImage(image, None, category, None, part)
    if entry.get("mask_path", "") in (None, ""):
        return image
    mask = listing.need(folder / take(entry, "mask_path", str, file, place), file, place)
    return MaskedImage(image, mask, category, KINDS.get(kind, kind), part)
