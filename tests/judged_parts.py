"""Small data sets that are judged, whose metrics can be counted by hand, and predictions on them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.datasets import Judged
from benchmarks.evaluation import Prediction

HEIGHT, WIDTH = 11, 17
HEADER = "image,mask,label,class,split"


def truth() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:6, 3:13] = True  # 40 of 187 pixels
    return mask


def write_dataset(root: Path, *rows: tuple[str, int, str, str]) -> Path:
    """Rows of (name, label, class, split); anomalous images are white where anomalous, and grey elsewhere."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    lines = [HEADER]
    for name, label, category, split in rows:
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        if label:
            pixels[truth()] = 255
            Image.fromarray(truth().astype(np.uint8) * 255).save(root / f"masks/{name}.png")
        Image.fromarray(pixels).save(root / f"images/{name}.png")
        lines.append(f"images/{name}.png,{f'masks/{name}.png' if label else ''},{label},{category},{split}")
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


def perfect(item: Judged) -> Prediction:
    with Image.open(item.image) as opened:
        mask = np.asarray(opened)[..., 0] == 255
    return Prediction(mask.astype(np.float32), mask, float(mask.any()))


def says(anomaly_map: Any, mask: Any, score: Any = 0.5) -> Callable[[Judged], Prediction]:
    return lambda item: Prediction(anomaly_map, mask, score)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_mvtec(root: Path) -> Path:
    """Two categories; `bolt` has a normal image, `nut` a faint anomaly besides the plain one."""
    for category, kind, name, level in (
        ("bolt", "good", "0", None),
        ("bolt", "cut", "0", 255),
        ("nut", "cut", "0", 255),
        ("nut", "cut", "1", 91),
    ):
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        (root / category / "test" / kind).mkdir(parents=True, exist_ok=True)
        if level is not None:
            pixels[truth()] = level
            (root / category / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(truth().astype(np.uint8) * 255).save(root / category / "ground_truth" / kind / f"{name}_mask.png")
        Image.fromarray(pixels).save(root / category / "test" / kind / f"{name}.png")
    return root
