"""The threshold's rule, and that it is judged on pictures that are drawn, held out and of both sorts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agvas import AGVAS
from benchmarks import threshold
from benchmarks.demo import FIRST_SEED
from benchmarks.threshold import THRESHOLDS, photographs, procedural, proposed


def split(*ious: float) -> dict[str, list[float]]:
    return {"iou": [*ious, *[0.0] * (len(THRESHOLDS) - len(ious))], "empty_normal": [0.0] * len(THRESHOLDS)}


def test_the_highest_threshold_that_keeps_enough_on_both_is_proposed() -> None:
    splits = {"procedural": split(0.2, 0.3, 0.4, 0.36, 0.3), "photographs": split(0.1, 0.2, 0.19, 0.17, 0.2)}
    assert proposed(splits, 0.85) == THRESHOLDS[3]  # 0.30 is too little on the first, and 0.17 just enough on the second
    assert proposed(splits, 0.9) == THRESHOLDS[2]
    with pytest.raises(ValueError, match="no threshold keeps 1.0 of the best IoU everywhere"):
        proposed(splits, 1.0)


def test_both_kinds_of_pictures_have_defects_and_normals_and_come_again_alike() -> None:
    for pictures in (procedural, photographs):
        first, again = list(pictures(7)), list(pictures(7))
        assert {bool(truth.any()) for _, truth in first} == {True, False}
        assert all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
        assert all(image.dtype == np.uint8 and image.shape[:2] == truth.shape for image, truth in first)


def test_no_seed_is_the_demos_or_a_trainings() -> None:
    assert threshold.PHOTOGRAPH_SEED - FIRST_SEED > 40 * 1000 and 1_000_000 + 10_000_000 < threshold.PROCEDURAL_SEED < 8_000_000_000


def test_the_command_tells_both_curves(tmp_path: Path, tiny_model: AGVAS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "load", lambda _: tiny_model)
    output = tmp_path / "threshold.json"
    assert threshold.main(["--procedural", "6", "--photographs", "1", "--keep", "0", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["proposed"] == THRESHOLDS[-1]  # any share of the best will do
    for curves in result["splits"].values():
        assert len(curves["iou"]) == len(curves["empty_normal"]) == len(result["thresholds"])
        assert curves["empty_normal"] == sorted(curves["empty_normal"])
