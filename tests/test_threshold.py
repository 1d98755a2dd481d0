"""The threshold's rule, and that it is judged on pictures that are drawn, held out and of both sorts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agvas import AGVAS, load
from agvas.config import nano
from benchmarks import threshold
from benchmarks.demo import FIRST_SEED
from benchmarks.threshold import RELATIVE, THRESHOLDS, Split, measured, photographs, procedural, proposed
from runtime.masking import MaskRule


def rows(*values: float) -> list[float]:
    return [*values, *[0.0] * (len(THRESHOLDS) - len(values))]


def test_the_threshold_finds_most_and_spares_most_and_the_relative_one_fills_best_there() -> None:
    elsewhere = [[1.0] * len(THRESHOLDS) for _ in RELATIVE]  # a good IoU at another threshold says nothing
    one, two = ([row.copy() for row in elsewhere] for _ in range(2))
    for place in range(len(RELATIVE)):  # one split's best is the last, the other's the first three: together the third
        one[place][2], two[place][2] = 0.2 + 0.01 * place, 0.9 if place < 3 else 0.1
    splits = [Split(50, 50, rows(1, 0.9, 0.9), rows(0.1, 0.3, 0.6), one), Split(50, 50, rows(0.9, 0.9, 0.7), rows(0.2, 0.4, 0.7), two)]
    assert proposed(splits) == MaskRule(THRESHOLDS[2], RELATIVE[2])


@pytest.mark.parametrize(("pictures", "place"), [(20, 0), (2000, 1)])
def test_of_thresholds_that_the_pictures_do_not_tell_apart_the_lowest_is_taken(pictures: int, place: int) -> None:
    """Youden's index is 1.5 and 1.55; its standard error at the best is 0.13 with 20 pictures of either sort, 0.013 with 2,000."""
    same = [[0.5] * len(THRESHOLDS) for _ in RELATIVE]
    assert proposed([Split(pictures, pictures, rows(0.8, 0.75), rows(0.7, 0.8), same)]).threshold == THRESHOLDS[place]


def test_of_equal_relative_thresholds_the_one_nearer_to_the_papers_is_taken() -> None:
    same = Split(1, 1, rows(1), rows(0), [[0.5] * len(THRESHOLDS) for _ in RELATIVE])
    assert proposed([same]) == MaskRule(THRESHOLDS[0], 1.0)


def test_what_a_rule_finds_is_counted_by_picture_and_its_masks_by_overlap() -> None:
    """Two cells of 0.9 and 0.5 with a defect on both; a normal picture that reaches 0.62."""
    truth, blank = np.array([[True, True, False, False]]), np.zeros((1, 4), bool)
    maps = {1: np.array([[0.9, 0.5, 0.2, 0.1]], np.float32), 2: np.array([[0.62, 0.5, 0.2, 0.1]], np.float32)}
    pictures = [(np.full((1, 4, 3), number, np.uint8), target) for number, target in ((1, truth), (2, blank))]
    split = measured(pictures, lambda image: maps[int(image[0, 0, 0])])
    assert split.found == [float(threshold < 0.9) for threshold in THRESHOLDS]
    assert split.empty == [float(threshold > 0.62) for threshold in THRESHOLDS]
    at = THRESHOLDS.index(0.7)
    assert split.iou[RELATIVE.index(0.5)][at] == 1.0  # above 0.45
    assert split.iou[RELATIVE.index(0.6)][at] == split.iou[RELATIVE.index(1.0)][at] == 0.5  # above 0.54, above 0.7
    assert split.iou[RELATIVE.index(0.2)][at] == round(2 / 3, 4)  # above 0.18


def test_both_kinds_of_pictures_have_defects_and_normals_and_come_again_alike() -> None:
    for pictures in (procedural, photographs):
        first, again = list(pictures(7)), list(pictures(7))
        assert {bool(truth.any()) for _, truth in first} == {True, False}
        assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
        assert all(image.dtype == np.uint8 and image.shape[:2] == truth.shape for image, truth in first)


def test_no_seed_is_the_demos_or_a_trainings() -> None:
    assert threshold.PHOTOGRAPH_SEED - FIRST_SEED > 40 * 1000 and 1_000_000 + 10_000_000 < threshold.PROCEDURAL_SEED < 8_000_000_000


def test_nanos_rule_is_what_was_proposed_for_it_and_what_is_written_of_it() -> None:
    root = Path(threshold.__file__).parents[1]
    rule = nano().mask_decoder.mask_rule
    assert MaskRule(**json.loads((root / "benchmarks" / "results" / "threshold_nano.json").read_text())["proposed"]) == rule
    assert load("nano").config.mask_decoder.mask_rule == rule
    assert f"With nano's {rule.threshold} and {rule.relative_threshold}," in (root / "runtime" / "README.md").read_text()


def test_the_command_tells_both_curves(tmp_path: Path, tiny_model: AGVAS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "load", lambda _: tiny_model)
    output = tmp_path / "threshold.json"
    assert threshold.main(["--procedural", "6", "--photographs", "1", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    MaskRule(**result["proposed"])
    assert set(result["splits"]) == {"procedural", "photographs"}
    for curves in result["splits"].values():
        assert len(curves["found"]) == len(curves["empty"]) == len(result["thresholds"])
        assert curves["empty"] == sorted(curves["empty"]) and curves["found"] == sorted(curves["found"], reverse=True)
        assert np.shape(curves["iou"]) == (len(result["relative_thresholds"]), len(result["thresholds"]))
