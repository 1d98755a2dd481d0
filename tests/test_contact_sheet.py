"""The contact sheet of a data set: which pictures stand on it, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from judged_parts import HEIGHT, WIDTH, perfect, truth
from PIL import Image

from agvas.training.sources.manifest import read_manifest
from benchmarks import contact_sheet
from benchmarks.contact_sheet import ContactSheet
from benchmarks.evaluation import Observation, Prediction


def observed(parts: Path, ious: Sequence[float | None]) -> list[Observation]:
    """Of the same picture with another IoU each; the order is the caption's score."""
    (item, *_) = read_manifest(parts)
    said = perfect(item)
    return [Observation(item, said._replace(score=float(order)), True, truth(), iou, iou, 0.0) for order, iou in enumerate(ious)]


def shown(sheet: ContactSheet) -> tuple[list[int], ...]:
    return tuple([row.order for row in rows] for rows in (sheet._best, sheet._worst, sheet._drawn))


def test_a_sheet_keeps_the_best_the_worst_and_a_fair_draw(parts: Path) -> None:
    ious = [0.5, None, 0.9, 0.1, 0.9, 0.3, None, 0.0, 0.7] * 3
    drawn = []
    for _ in range(2):
        sheet = ContactSheet("parts", parts, rows=3)
        for seen in observed(parts, ious):
            sheet.add(seen)
        best, worst, random_rows = shown(sheet)
        assert best == [2, 4, 11] and worst == [7, 16, 25]
        assert len(set(random_rows)) == 3
        drawn.append((random_rows, sheet.image().tobytes()))
    assert drawn[0] == drawn[1], "the same pictures must give the same sheet"


@pytest.mark.parametrize(
    ("ious", "best", "worst", "drawn"),
    [
        ([0.5], [0], [], []),
        ([0.5, None], [0], [], [1]),
        ([0.1, 0.9, 0.5], [1, 2], [0], []),
        ([0.0, 0.0, 0.0], [0, 1], [2], []),
    ],
)
def test_a_small_sets_picture_stands_on_its_sheet_once(
    parts: Path, ious: list[float | None], best: list[int], worst: list[int], drawn: list[int]
) -> None:
    sheet = ContactSheet("parts", parts, rows=3)
    for seen in observed(parts, ious):
        sheet.add(seen)
    rows = {name: [row.order for row in rows] for name, rows in sheet._parts()}
    expected = {"best IoU": best, "worst IoU": worst, "drawn at random": drawn}
    assert rows == {name: orders for name, orders in expected.items() if orders}


def test_a_sheet_shows_picture_truth_map_and_mask_side_by_side(parts: Path, tmp_path: Path) -> None:
    sheet = ContactSheet("parts", parts, rows=1)
    (item, *_) = read_manifest(parts)
    heat = np.zeros((HEIGHT, WIDTH), np.float32)
    heat[:, :9] = 1 / 3
    left = np.zeros((HEIGHT, WIDTH), bool)
    left[:, :9] = True
    sheet.add(Observation(item, Prediction(heat, left, 0.5), None, None, None, None, 0.0))
    sheet.save(tmp_path / "parts.png")
    assert [file.name for file in tmp_path.glob("parts.png*")] == ["parts.png"]
    with Image.open(tmp_path / "parts.png") as saved:
        pixels = np.asarray(saved)
    assert pixels.shape[1] == contact_sheet.WIDTH
    middle = 2 * contact_sheet.LINE + contact_sheet.LINE + contact_sheet.GAP + contact_sheet.LINE + contact_sheet.SIDE // 2
    lefts = [contact_sheet.GAP + column * (contact_sheet.SIDE + contact_sheet.GAP) for column in range(4)]

    def at(column: int, share: float) -> list[int]:
        return [int(level) for level in pixels[middle, lefts[column] + int(share * contact_sheet.SIDE)]]

    assert at(0, 0.9) == [90, 90, 90] and at(0, 0.5) == [255, 255, 255]  # the anomaly is white in the picture
    assert at(1, 0.5) == [48, 48, 48]  # nothing is known
    assert at(2, 0.25) == [255, 0, 0] and at(2, 0.75) == [0, 0, 0]
    assert at(3, 0.25) == [255, 255, 255] and at(3, 0.75) == [0, 0, 0]


def test_a_defect_thinner_than_a_thumbnails_pixel_does_not_vanish() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[501] = True
    thumbnail = np.asarray(contact_sheet._thumbnail(contact_sheet._black_and_white(mask)))
    assert thumbnail.shape == (contact_sheet.SIDE, contact_sheet.SIDE, 3) and thumbnail.max() > 30
