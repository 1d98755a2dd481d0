"""The rule that cuts a mask from a map, alone and through a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agvas import AGVAS
from runtime import Segmenter
from runtime.bundle import Manifest
from runtime.errors import RequestError
from runtime.masking import MaskRule

MAP = np.array([[0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]], np.float32)


def test_one_is_the_papers_mask() -> None:
    for threshold in (0.0, 0.25, 0.7, 0.8, 1.0):
        np.testing.assert_array_equal(MaskRule(threshold).mask(MAP), MAP > np.float32(threshold))


@pytest.mark.parametrize(
    ("rule", "held"),
    [
        (MaskRule(0.7, 0.5), 4),  # above 0.4
        (MaskRule(0.7, 0.25), 6),  # above 0.2
        (MaskRule(0.7, 0), 7),  # whatever is above nothing
        (MaskRule(0.7, 0.95), 1),  # the threshold is lower than 0.76
        (MaskRule(0.3, 0.5), 5),  # a mask never lacks what lies above the threshold
        (MaskRule(0.8, 0.5), 0),  # nothing exceeds the threshold, so nothing is grown
        (MaskRule(1, 0), 0),
    ],
)
def test_a_mask_grows_from_what_exceeds_the_threshold(rule: MaskRule, held: int) -> None:
    mask = rule.mask(MAP)
    assert mask.dtype == bool and mask.sum() == held
    assert mask.any() == bool((MAP > np.float32(rule.threshold)).any())


def test_a_peak_just_at_the_threshold_is_normal_in_float32_too() -> None:
    peak = np.array([[0.3, 0.1]], np.float32)
    assert not MaskRule(0.3, 0.2).mask(peak).any()
    assert MaskRule(float(np.nextafter(np.float32(0.3), np.float32(0))), 0.2).mask(peak).all()


def test_a_map_of_nan_has_no_mask() -> None:
    assert not MaskRule(0.5, 0.5).mask(np.full((2, 2), np.nan, np.float32)).any()


@pytest.mark.parametrize("given", [-0.1, 1.1, float("nan"), "0.5", True, [0.5]])
def test_what_is_no_number_in_0_to_1_is_refused_by_name(given: Any) -> None:
    with pytest.raises(RequestError, match=r"^threshold: expected a number in 0\.\.1"):
        MaskRule(given)
    with pytest.raises(RequestError, match=r"^relative_threshold: expected a number in 0\.\.1"):
        MaskRule(0.5, given)


def test_a_bundle_has_its_own_rule_and_a_caller_another(copy_of_bundle: Callable[[], Path], tiny_bundle: Path) -> None:
    image = np.random.default_rng(3).integers(0, 256, (40, 52, 3), np.uint8)
    plain = Segmenter(tiny_bundle, engine="onnxruntime")(image)
    low, high = float(plain.anomaly_map.min()), float(plain.anomaly_map.max())
    threshold, relative = (low + 3 * high) / 4, (3 * low + high) / 4 / high
    folder = copy_of_bundle()
    path = folder / "manifest.json"
    manifest = replace(Manifest.from_json(path.read_text()), threshold=threshold, relative_threshold=relative)
    path.write_text(manifest.to_json())
    result = Segmenter(folder, engine="onnxruntime")(image)
    np.testing.assert_array_equal(result.mask, plain.anomaly_map > np.float32(relative * high))
    assert result.to_json()["relative_threshold"] == relative
    given = Segmenter(folder, engine="onnxruntime", relative_threshold=1)(image)
    np.testing.assert_array_equal(given.mask, plain.anomaly_map > np.float32(threshold))
    assert 0 < given.area < result.area


def test_a_manifest_of_before_has_the_papers_rule(tiny_bundle: Path) -> None:
    fields = json.loads((tiny_bundle / "manifest.json").read_text())
    del fields["relative_threshold"], fields["sha256"]
    fields["schema_version"] = 1
    assert Manifest.from_json(json.dumps(fields)).mask_rule == MaskRule(fields["threshold"], 1.0)


def test_the_reference_cuts_its_masks_by_the_same_rule(tiny_model: AGVAS, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(3).integers(0, 256, (40, 52, 3), np.uint8)
    first = tiny_model.segment(image)
    rule = MaskRule(first.score * 0.99, 0.5)
    decoder = replace(tiny_model.config.mask_decoder, threshold=rule.threshold, relative_threshold=rule.relative_threshold)
    monkeypatch.setattr(tiny_model, "config", replace(tiny_model.config, mask_decoder=decoder))
    np.testing.assert_array_equal(tiny_model.segment(image).mask, rule.mask(first.anomaly_map))
