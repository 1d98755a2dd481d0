"""Mosaics keep every picture and its mask in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import picture
from PIL import Image

from benchmarks.datasets import read_dataset
from benchmarks.mosaics import main
from runtime.images import read_image


def test_pictures_and_masks_lie_in_the_same_places(tmp_path: Path) -> None:
    lines = ["image,mask,label"]
    for number in range(6):  # the last two fill no frame, and one is of another size
        height = 30 if number != 1 else 31
        Image.fromarray(picture(number, height, 40)).save(tmp_path / f"{number}.png")
        mask = np.zeros((height, 40), np.uint8)
        mask[number : number + 3, 5:9] = 255
        Image.fromarray(mask).save(tmp_path / f"{number}_mask.png")
        lines.append(f"{number}.png,{number}_mask.png,1")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    assert main([str(tmp_path), "--across", "2", "--output", str(tmp_path / "frames")]) == 0
    (item,) = read_dataset("manifest", tmp_path / "frames")
    rgb, truth = read_image(item.image), item.read_mask(60, 80)
    for number, (top, left) in zip((0, 2, 3, 4), ((0, 0), (0, 40), (30, 0), (30, 40)), strict=True):
        np.testing.assert_array_equal(rgb[top : top + 30, left : left + 40], picture(number, 30, 40))
        assert truth[top : top + 30, left : left + 40].sum() == 12 and truth[top + number, left + 5]
