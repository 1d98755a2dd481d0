"""Miniatures of published anomaly sets, by their published names; each mask is `truth`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 11, 17


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (10, 20, 30)).save(path)
    return path


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:5, 3:10] = True
    return mask


def mask_file(path: Path, value: int = 255, mask: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((truth() if mask is None else mask).astype(np.uint8) * np.uint8(value)).save(path)
    return path


def write_goods(root: Path) -> Path:
    """Masks named as GoodsAD's in one class and as MVTec's in the other."""
    picture(root / "drink_can/train/good/001001.jpg")
    picture(root / "drink_can/test/good/001002.jpg")
    picture(root / "drink_can/test/opened/001003.jpg")
    mask_file(root / "drink_can/ground_truth/opened/001003.png")
    picture(root / "Woven_001/train/good/000.png")
    picture(root / "Woven_001/test/bad/000.png")
    mask_file(root / "Woven_001/ground_truth/bad/000_mask.png", value=1)
    return root


def write_real_iad_set(root: Path) -> Path:
    folder = root / "realiad_1024/audiojack"
    picture(folder / "OK/S0001/a_OK_C1.jpg")
    picture(folder / "OK/S0002/b_OK_C1.jpg")
    picture(folder / "NG/HS/S0003/c_NG_C1.jpg")
    mask_file(folder / "NG/HS/S0003/c_NG_C1.png")
    write_real_iad(root)
    return root


def write_real_iad(root: Path, folder: str = "realiad_jsons", **changes: Any) -> Path:
    scratched = {
        "category": "audiojack",
        "anomaly_class": "HS",
        "image_path": "NG/HS/S0003/c_NG_C1.jpg",
        "mask_path": "NG/HS/S0003/c_NG_C1.png",
    } | changes
    content = {
        "meta": {"prefix": "audiojack/", "normal_class": "OK", "pre_transform": False},
        "train": [{"category": "audiojack", "anomaly_class": "OK", "image_path": "OK/S0001/a_OK_C1.jpg", "mask_path": None}],
        "test": [{"category": "audiojack", "anomaly_class": "OK", "image_path": "OK/S0002/b_OK_C1.jpg", "mask_path": None}, scratched],
    }
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "audiojack.json").write_text(json.dumps(content))
    return root / folder / "audiojack.json"


def write_leaper_set(root: Path) -> Path:
    for number in (1, 2, 3):
        picture(root / f"Images/{number:06d}.jpg")
    mask_file(root / "Annotations/masks/000003.png")
    write_leaper(root / "ImageSets/total.json", ["000001"], ["000002"], ["000003"])
    write_leaper(root / "ImageSets/Groups/group1.json", [], [], [3])
    return root


def write_leaper(file: Path, train: list[Any], test: list[Any], defects: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"normal": {"train": train, "test": test}, "defect": {"train": defects, "test": []}}))
