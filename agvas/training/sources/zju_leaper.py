"""ZJU-Leaper: fabric pictures by number, lists of normal and defective numbers, masks of the defective ones.

    Images/000001.jpg (or .png)      Annotations/masks/000001.png      non-zero is defective
    ImageSets/total.json, ImageSets/Groups/group1.json, ImageSets/Patterns/pattern1.json:
        {"normal": {"train": [...], "test": [...]}, "defect": {"train": [...], "test": [...]}}

As in the release's own dataset_api/zl_fabric.py. That API reads numbers as they stand in the lists; a list of integers is padded to six
digits here. The boxes of Annotations/xmls are not read: every defective picture has a mask.
"""

from __future__ import annotations

from pathlib import Path

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, read_json, take
from agvas.training.sources.masked import MaskedImage


def read_zju_leaper(root: Path, annotations: str = "ImageSets/total.json", split: str | None = None) -> list[MaskedImage]:
    """Normal pictures, then defective ones, in the list's order.

    Args:
        annotations: the list below root; a group's or a pattern's takes only its pictures.
        split: "train" or "test"; both by default.
    """
    need_folder(root / "Images", "pictures by number")
    masks = root / "Annotations/masks"
    file = root / annotations
    content = read_json(file, "the numbers of normal and defective pictures")
    listing = Listing()
    images: list[MaskedImage] = []
    for label in ("normal", "defect"):
        lists = take(content, label, dict, file, "the file")
        for part in ("train", "test"):
            if split not in (None, part):
                continue
            for number in take(lists, part, list, file, label):
                if isinstance(number, bool) or not isinstance(number, (int, str)):
                    raise DatasetError(file, None, f"numbers in {label}.{part}", repr(number), "compare with the release")
                name, place = f"{number:06d}" if isinstance(number, int) else number, f"{label}.{part} {number}"
                image = next((path for path in (root / f"Images/{name}.jpg", root / f"Images/{name}.png") if listing.holds(path)), None)
                image = image or listing.need(root / f"Images/{name}.jpg", file, place)
                mask = listing.need(masks / f"{name}.png", file, place) if label == "defect" else None
                images.append(MaskedImage(image, mask, "fabric", "fabric defect" if mask else None, part))
    if not images:
        raise DatasetError(file, None, f"pictures of split {split or 'train or test'}", "none", "check the split")
    return images
