"""The trivial maps that a model has to be better than."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import baselines, predictors


def test_the_command_offers_every_baseline() -> None:
    assert predictors.BASELINES == baselines.BASELINES


@pytest.mark.parametrize("name", baselines.BASELINES)
@pytest.mark.parametrize("shape", [(53, 71), (401, 307), (3, 5), (1, 1), (7, 900)])
def test_every_baseline_gives_a_float32_map_of_the_images_size_within_0_and_1(name: baselines.Baseline, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(19).integers(0, 256, (*shape, 3), dtype=np.uint8)
    anomaly_map = baselines.anomaly_map(name, image)
    assert anomaly_map.dtype == np.float32 and anomaly_map.shape == shape
    assert anomaly_map.min() >= 0.0 and anomaly_map.max() <= 1.0


@pytest.mark.parametrize("name", baselines.BASELINES)
@pytest.mark.parametrize("grey", [0, 90, 255])
def test_a_uniform_image_is_normal_for_every_baseline(name: baselines.Baseline, grey: int) -> None:
    rounding = 1e-6  # the Gaussian's weights add up to 1 in float32 only nearly
    assert baselines.anomaly_map(name, np.full((53, 71, 3), grey, np.uint8)).max() < rounding


@pytest.mark.parametrize("side", [101, 503])  # below and above the size that is reduced
def test_the_median_map_is_the_distance_in_grey_levels_over_128(side: int) -> None:
    image = np.full((side, side, 3), 90, np.uint8)
    image[40:46, 20:60] = 90 + 64
    image[70, 10:90] = 90 - 32  # a scratch one pixel thin
    anomaly_map = baselines.median_map(image)
    assert anomaly_map[43, 40] == 0.5 and anomaly_map[70, 50] == 0.25 and anomaly_map[5, 5] == 0.0


def test_the_gradient_map_of_a_ramp_is_its_slope_over_64() -> None:
    image = np.repeat((np.arange(60, dtype=np.uint8) * 4)[None, :, None], 40, axis=0).repeat(3, axis=2)
    for ramp in (image, image.transpose(1, 0, 2).copy()):
        assert baselines.gradient_map(ramp)[20, 20] == pytest.approx(4 / 64, rel=1e-3)


def test_a_baseline_refuses_what_is_not_uint8_rgb() -> None:
    with pytest.raises(ValueError, match=r"got float64 \[5, 7, 3\]"):
        baselines.median_map(np.zeros((5, 7, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got uint8 \[5, 7\]"):
        baselines.gradient_map(np.zeros((5, 7), np.uint8))
    with pytest.raises(ValueError, match="expected one of constant"):
        baselines.anomaly_map("mean", np.zeros((5, 7, 3), np.uint8))  # type: ignore[arg-type]
