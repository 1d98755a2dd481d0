"""Anomaly sets in the layout of MVTec AD: a folder for each class with train, test and ground_truth.

    class/train/good/*.png        normal
    class/test/good/*.png         normal
    class/test/KIND/NAME.png      anomalous, its mask in class/ground_truth/KIND/NAME_mask.png or NAME.png; non-zero is anomalous

Three sources of the paper come so. GoodsAD: its README says "same as MVTec AD"; public loaders read .jpg pictures and masks NAME.png.
DTD-Synthetic: classes such as Woven_001, one KIND "bad"; seen in public loaders only. MIAD: classes such as catenary_dropper; its own page
could not be read, public loaders and a README agree on these folders but not on the masks' names, so both are taken.

What is learned from these sets is a mask's shape, and no page says which levels it is written in. agvas-eval reads MVTec AD itself, whose
masks are known, in benchmarks/datasets.py, and is stricter where a figure would move in silence: levels other than 0 and 255, and a mask
without its picture, are errors there and are taken, or passed over, here. On the set as published both find the same.
"""

from __future__ import annotations

from pathlib import Path

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, pictures_in, subfolders
from agvas.training.sources.masked import MaskedImage

NORMAL = "good"


def read_mvtec(root: Path, split: str | None = None) -> list[MaskedImage]:
    """All pictures sorted by class, split, kind and name; with `split` ("train" or "test") only that part's."""
    need_folder(root, "a folder for each class")
    classes = [folder for folder in subfolders(root) if (folder / "train").is_dir() or (folder / "test").is_dir()]
    if not classes:
        found = ", ".join(folder.name for folder in subfolders(root)[:6]) or "no folders"
        raise DatasetError(root, None, "class folders with train and test", found, "give the folder that holds the classes")
    listing = Listing()
    images: list[MaskedImage] = []
    for folder in classes:
        for part in ("train", "test"):
            if split in (None, part) and (folder / part).is_dir():
                images += [image for kind in subfolders(folder / part) for image in _images(folder, part, kind, listing)]
    if not images:
        raise DatasetError(root, None, f"pictures of split {split or 'train or test'}", "none", "check the split and the download")
    return images


def _images(folder: Path, part: str, kind: Path, listing: Listing) -> list[MaskedImage]:
    if kind.name == NORMAL:
        return [MaskedImage(path, None, folder.name, None, part) for path in pictures_in(kind)]
    if part == "train":
        raise DatasetError(kind, None, f"only {NORMAL} below train", kind.name, "move anomalous pictures to test, with their masks")
    return [MaskedImage(path, _mask(folder, kind, path, listing), folder.name, kind.name, part) for path in pictures_in(kind)]


def _mask(folder: Path, kind: Path, image: Path, listing: Listing) -> Path:
    truth = folder / "ground_truth" / kind.name
    for name in (f"{image.stem}_mask.png", f"{image.stem}.png"):
        if listing.holds(truth / name):
            return truth / name
    remedy = "restore the mask, or remove the picture: an anomaly without a mask cannot be learned from"
    raise DatasetError(image, None, f"its mask {image.stem}_mask.png or {image.stem}.png in {truth}", "neither", remedy)
