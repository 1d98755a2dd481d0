"""GPTQ against an unblocked column loop of its own, and against plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration.gptq import Curvature, GPTQSettings, curvature, gptq, output_error, round_to_nearest, search_scales
from calibration.weights import QuantizedWeight

OUTPUTS, INPUTS, TOKENS = 19, 96, 400
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def layer(seed: int = 0, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of uneven scale, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, INPUTS, dtype=torch.float64)
    inputs = torch.randn(tokens, INPUTS, generator=generator, dtype=torch.float64) @ mixing
    return weight, inputs.T @ inputs


def column_loop(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, group: int, settings: GPTQSettings) -> np.ndarray:
    """GPTQ as its first equations say it (OBQ with a fixed order): after every column the inverse Hessian itself loses that column.

    No Cholesky factor, no blocks, no permutation of arrays.
    """
    remaining = weight.copy()
    damped = hessian + settings.damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    inverse = np.linalg.inv(damped)
    order = np.argsort(-np.diag(hessian), kind="stable") if settings.act_order else np.arange(len(hessian))
    codes = np.zeros(weight.shape, np.int8)
    most = 2 ** (settings.bits - 1) - 1
    for column in order:
        step = scales[:, column // group].astype(np.float64)
        codes[:, column] = np.clip(np.round(remaining[:, column] / step), -most - 1, most)
        error = (remaining[:, column] - codes[:, column] * step) / inverse[column, column]
        remaining -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "natural order"])
@pytest.mark.parametrize("block", [1, 7, 32, 128])
def test_every_block_size_gives_the_codes_of_the_column_loop(bits: int, act_order: bool, block: int) -> None:
    weight, hessian = layer()
    settings = GPTQSettings(bits=bits, group=32, block=block, act_order=act_order)
    got = gptq(weight, hessian, settings)
    wanted = column_loop(weight.numpy(), hessian.numpy(), got.scales, 32, settings)
    assert (got.codes == wanted).mean() > 0.999  # a tie of rounding may fall either way, and no two arithmetics agree to the last bit
    assert (got.bits, got.group, got.scales.shape) == (bits, 32, (OUTPUTS, INPUTS // 32))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_does_as_well_as_float64(device: str) -> None:
    weight, hessian = layer()
    settings = GPTQSettings(group=32)
    exact = output_error(weight, gptq(weight, hessian, settings), hessian)
    single = gptq(weight.float().to(device), hessian.float().to(device), settings)
    assert output_error(weight, single, hessian) < 1.03 * exact


@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_is_much_closer_than_after_plain_rounding(bits: int) -> None:
    weight, hessian = layer()
    settings = GPTQSettings(bits=bits, group=32)
    ours = output_error(weight, gptq(weight, hessian, settings), hessian)
    plain = output_error(weight, round_to_nearest(weight, settings), hessian)
    assert ours < 0.6 * plain


def test_act_order_does_better_than_natural_order_where_activity_is_uneven() -> None:
    errors = {}
    for act_order in (True, False):
        settings = GPTQSettings(group=32, act_order=act_order)
        errors[act_order] = [output_error(w, gptq(w, h, settings), h) for w, h in map(layer, range(5))]
    assert np.mean(errors[True]) < 0.9 * np.mean(errors[False])


def test_the_factor_is_that_of_the_inverse_in_the_order_of_rounding() -> None:
    _, hessian = layer()
    prepared = curvature(hessian, GPTQSettings())
    damped = hessian + prepared.damping * hessian.diagonal().mean() * torch.eye(INPUTS)
    inverse = torch.linalg.inv(damped)[prepared.order][:, prepared.order]
    torch.testing.assert_close(prepared.factor.T @ prepared.factor, inverse)
    assert torch.equal(prepared.factor, prepared.factor.triu())
    torch.testing.assert_close(prepared.importance, damped.diagonal())


def test_layers_may_share_one_factored_hessian() -> None:
    weight, hessian = layer()
    settings = GPTQSettings(group=32)
    shared = curvature(hessian, settings)
    assert isinstance(shared, Curvature)
    assert (gptq(weight, shared, settings).codes == gptq(weight, hessian, settings).codes).all()


def test_damping_is_raised_until_a_hessian_of_too_few_tokens_can_be_factored() -> None:
    weight, _ = layer()
    _, hessian = layer(tokens=5)
    hessian = hessian.float()
    hessian -= 1e-4 * hessian.diagonal().mean() * torch.eye(INPUTS)  # as rounding leaves it: not quite semi-definite
    hessian.diagonal().clamp_(min=0)
    prepared = curvature(hessian, GPTQSettings(damping=1e-9))
    assert prepared.damping > 1e-9
    assert np.isfinite(gptq(weight, prepared, GPTQSettings(group=32)).dequantized()).all()


def test_a_matrix_that_is_no_hessian_is_refused() -> None:
    _, hessian = layer()
    with pytest.raises(ValueError, match="positive semi-definite"):
        curvature(hessian + 1e3 * hessian.abs().max() * (1 - torch.eye(INPUTS)) * -1, GPTQSettings())
    with pytest.raises(ValueError, match="negative diagonal"):
        curvature(-hessian, GPTQSettings())
    with pytest.raises(ValueError, match="NaN"):
        curvature(hessian * torch.nan, GPTQSettings())
    with pytest.raises(ValueError, match=r"\[K, K\]"):
        curvature(hessian[:5], GPTQSettings())


def test_weights_of_inputs_that_were_never_seen_are_rounded_to_nearest_and_disturb_nothing() -> None:
    weight, hessian = layer()
    dead = [3, 40, 41]
    hessian[dead] = 0
    hessian[:, dead] = 0
    settings = GPTQSettings(group=32)
    got = gptq(weight, hessian, settings)
    steps = np.repeat(got.scales.astype(np.float64), 32, axis=1)[:, dead]
    assert (got.codes[:, dead] == np.clip(np.round(weight.numpy()[:, dead] / steps), -8, 7)).all()
    alive = [k for k in range(INPUTS) if k not in dead]
    wanted = column_loop(weight.numpy(), hessian.numpy(), got.scales, 32, settings)
    assert (got.codes[:, alive] == wanted[:, alive]).mean() > 0.999


def test_a_layer_that_never_saw_anything_is_rounded_to_nearest() -> None:
    weight, _ = layer()
    settings = GPTQSettings(group=32)
    got = gptq(weight, torch.zeros(INPUTS, INPUTS, dtype=torch.float64), settings)
    assert (got.codes == np.clip(np.round(weight.numpy() / np.repeat(got.scales.astype(np.float64), 32, axis=1)), -8, 7)).all()


def test_the_scale_is_the_best_of_a_fine_search_by_hand() -> None:
    weight, hessian = layer()
    felt = hessian.diagonal()
    scales = search_scales(weight, felt, GPTQSettings(group=32)).double()

    def error(row: int, group: int, scale: float) -> float:
        part = slice(32 * group, 32 * group + 32)
        rounded = torch.clamp(torch.round(weight[row, part] / scale), -8, 7) * scale
        return float(((rounded - weight[row, part]) ** 2 * felt[part]).sum())

    for row, group in ((0, 0), (7, 1), (18, 2)):
        largest = float(weight[row, 32 * group : 32 * group + 32].abs().max()) / 7
        by_hand = min(error(row, group, largest * fine / 1000) for fine in range(300, 1101))
        assert error(row, group, float(scales[row, group])) < 1.15 * by_hand
        assert error(row, group, float(scales[row, group])) <= error(row, group, float(np.float16(largest)))


def test_an_input_that_matters_more_pulls_the_scale_to_itself() -> None:
    weight = torch.full((1, 32), 0.49)
    weight[0, 0] = 7.0
    quiet, loud = torch.ones(32), torch.ones(32)
    loud[0], quiet[0] = 1e4, 1e-6
    settings = GPTQSettings(group=32)
    assert float(search_scales(weight, loud, settings)) == pytest.approx(1.0, rel=1e-3)
    assert float(search_scales(weight, quiet, settings)) < 0.6  # the outlier is clipped


def test_plain_rounding_clips_nothing_and_errs_by_half_a_step_at_most() -> None:
    weight, _ = layer()
    got = round_to_nearest(weight, GPTQSettings(group=32))
    steps = np.repeat(got.scales.astype(np.float64), 32, axis=1)
    assert (np.abs(got.dequantized() - weight.numpy()) <= 0.501 * steps).all()
    assert np.abs(got.codes).max() == 7


def test_group_0_is_one_scale_an_output() -> None:
    weight, hessian = layer()
    got = gptq(weight, hessian, GPTQSettings(bits=8, group=0))
    assert got.scales.shape == (OUTPUTS, 1) and got.group == INPUTS


def test_a_group_that_does_not_divide_the_inputs_is_refused_with_one_that_does() -> None:
    weight, hessian = layer()
    with pytest.raises(ValueError, match="groups of 128 divide, got 96; choose a group of 32"):
        gptq(weight, hessian, GPTQSettings())


def test_weights_of_zero_and_weights_too_small_for_float16_scales_stay_finite() -> None:
    weight, hessian = layer()
    weight[0] = 0
    weight[1] *= 1e-12
    got = gptq(weight, hessian, GPTQSettings(group=32))
    assert isinstance(got, QuantizedWeight) and (got.scales > 0).all()
    assert not got.dequantized()[0].any() and np.isfinite(got.dequantized()).all()


def test_weights_that_are_not_finite_or_beyond_float16_scales_are_refused() -> None:
    weight, hessian = layer()
    with pytest.raises(ValueError, match="expected finite"):
        gptq(weight * torch.inf, hessian, GPTQSettings(group=32))
    with pytest.raises(ValueError, match="float16"):
        gptq(weight * 1e6, hessian, GPTQSettings(group=32))


@pytest.mark.parametrize("setting", [{"bits": 3}, {"group": -1}, {"block": 0}, {"damping": 0.0}, {"damping": 11.0}])
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        GPTQSettings(**setting)  # type: ignore[arg-type]
