"""The gate that decides: the fewest layers back in float, found by trials of the chain itself, within a budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import picture

from agvas import AGVAS
from calibration.gptq import GPTQSettings, round_to_nearest
from calibration.truth import linear_of
from calibration.weights import QuantizedWeight
from export.gate import GateBudget, by_sensitivity, search, sensitivities, with_effect
from export.parity import outcome_of_reference
from export.quantisation import Quantisation, encoder_ranges, fake_quantised
from runtime import preprocess
from runtime.parity import GATES, Gates, Outcome, compare

LAYERS = [f"layer{i}" for i in range(16)]
FAILED = ["mean mask IoU 0.1 is below 0.9"]


def needing(count: int, tried: list[int]) -> Callable[[Sequence[str]], list[str]]:
    """A chain that passes once the `count` most sensitive layers are float."""

    def trial(names: Sequence[str]) -> list[str]:
        assert list(names) == LAYERS[: len(names)]
        tried.append(len(names))
        return [] if len(names) >= count else FAILED

    return trial


@pytest.mark.parametrize("count", range(1, 17))
def test_no_layer_more_than_needed_is_put_back_to_float(count: int) -> None:
    tried: list[int] = []
    kept = search(LAYERS, needing(count, tried), GateBudget(layers=16), FAILED)
    assert kept.names == tuple(LAYERS[:count]) and not kept.failures and not kept.stopped
    assert [number for number, _ in kept.trials] == [0, *tried] and len(tried) <= 9  # doubling, then halving


def test_a_budget_of_layers_is_kept_and_what_fails_then_is_told() -> None:
    kept = search(LAYERS, needing(9, []), GateBudget(layers=6), FAILED)
    assert kept.names == tuple(LAYERS[:6]) and kept.failures == FAILED
    assert kept.stopped == "no more than 6 layers may stay float (--gate-budget)"


def test_a_budget_of_none_tries_nothing() -> None:
    tried: list[int] = []
    kept = search(LAYERS, needing(1, tried), GateBudget(layers=0), FAILED)
    assert kept.failures == FAILED and not tried and not kept.names


def test_a_budget_of_seconds_begins_no_further_trial() -> None:
    tried: list[int] = []
    kept = search(LAYERS, needing(9, tried), GateBudget(layers=16, seconds=0), FAILED)
    assert kept.failures and "0 seconds were spent" in kept.stopped and len(tried) <= 1


def test_the_seconds_of_measuring_count() -> None:
    tried: list[int] = []
    kept = search(LAYERS, needing(9, tried), GateBudget(layers=16, seconds=60), FAILED, started=time.monotonic() - 61)
    assert kept.failures and "60 seconds were spent" in kept.stopped and not tried


def test_left_open_the_budget_is_a_quarter_of_the_layers() -> None:
    assert [GateBudget().most(layers) for layers in (1, 3, 16, 196)] == [1, 1, 4, 49]


def test_the_most_sensitive_come_first_and_nan_before_all() -> None:
    assert by_sensitivity({"a": 0.1, "b": 0.3, "c": float("nan"), "d": 0.2}) == ["c", "b", "d", "a"]


def test_what_changed_nothing_is_never_put_back() -> None:
    assert with_effect({"a": 0.0, "b": 0.1, "c": float("nan"), "d": 0.0, "e": float("inf")}) == ["c", "e", "b"]
    assert with_effect({"a": 0.0}) == []


@pytest.mark.parametrize(("effects", "why"), [(3, "no other layer has a measured effect"), (0, "no layer has a measured effect")])
def test_where_no_layer_with_an_effect_is_left_the_search_ends_and_says_so(effects: int, why: str) -> None:
    tried: list[int] = []
    for budget in (GateBudget(), GateBudget(layers=3), GateBudget(layers=16)):
        kept = search(LAYERS[:effects], needing(9, tried), budget, FAILED, layers=16)
        assert kept.names == tuple(LAYERS[:effects]) and kept.failures == FAILED and kept.stopped == why
    assert max(tried, default=0) == effects


def test_a_quarter_is_of_all_integer_layers_and_not_of_those_with_an_effect() -> None:
    kept = search(LAYERS[:7], needing(4, []), GateBudget(), FAILED, layers=16)
    assert kept.names == tuple(LAYERS[:4]) and not kept.failures
    kept = search(LAYERS[:7], needing(5, []), GateBudget(), FAILED, layers=16)
    assert kept.stopped == "no more than 4 layers may stay float (--gate-budget)"


def test_layers_that_there_was_no_time_to_measure_are_not_said_to_have_no_effect() -> None:
    kept = search([], needing(1, []), GateBudget(seconds=60), FAILED, started=time.monotonic() - 61, layers=16)
    assert kept.stopped == "60 seconds were spent (--gate-budget)"


# Sensitivities, on the tiny model


def in_eight_bits(model: AGVAS, names: Sequence[str], spoil: str = "") -> Quantisation:
    """8-bit weights; those of one layer with every code zero."""
    weights = {name: round_to_nearest(linear_of(model, name).weight.detach(), GPTQSettings(bits=8, group=0)) for name in names}
    if spoil:
        whole = weights[spoil]
        weights[spoil] = QuantizedWeight(np.zeros_like(whole.codes), whole.scales, 8, whole.group)
    ranges = encoder_ranges(model, [picture()])
    return Quantisation(weights, {name: float(ranges[name].max()) for name in names if name in ranges})


NAMES = ("language.model.layers.0.mlp.down_proj", "language.model.layers.2.self_attn.o_proj", "pixel_encoder.layers.0.mlp.lin1")


@pytest.mark.parametrize("spoil", NAMES)
def test_a_layer_that_was_spoilt_is_found_and_the_model_is_left_as_it_was(spoil: str, tiny_model: AGVAS) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    reference = [outcome_of_reference(tiny_model.segment(picture()))]
    found = sensitivities(tiny_model, in_eight_bits(tiny_model, NAMES, spoil), [picture()], reference)
    assert by_sensitivity(found)[0] == spoil and found.keys() == set(NAMES)
    assert all(value > 0 for value in found.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in tiny_model.modules())


def test_a_sensitivity_is_what_the_fake_quantised_model_shows(tiny_model: AGVAS) -> None:
    """The slow oracle: a copy of the whole model with that layer alone in integers, and its own map."""
    name = NAMES[2]
    quantisation = in_eight_bits(tiny_model, NAMES)
    reference = outcome_of_reference(tiny_model.segment(picture()))
    found = sensitivities(tiny_model, quantisation, [picture()], [reference])
    pixel, semantic, _ = preprocess.encoder_images(picture(), tiny_model.config.preprocessing)
    inputs = torch.from_numpy(pixel)[None], torch.from_numpy(semantic)[None], [tiny_model.prompt_encoder.encode()], [reference.answer]
    with torch.inference_mode():
        ours, wanted = (model(*inputs).maps.anomaly_map for model in (fake_quantised(tiny_model, quantisation.only([name])), tiny_model))
    assert found[name] == pytest.approx(float((ours - wanted).abs().mean()), rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_changes_the_answer_comes_first_and_a_tied_table_stays(tied: bool, tiny_model: AGVAS) -> None:
    model = copy.deepcopy(tiny_model)
    table = model.language.get_input_embeddings().weight
    if tied:
        model.language.lm_head.weight = table
    names = (*NAMES, "language.lm_head")
    reference = [outcome_of_reference(model.segment(picture()))]
    answer = reference[0].answer
    reference[0] = Outcome(reference[0].mask, reference[0].anomaly_map, np.zeros((3, 8), np.float32), answer)  # judged whatever it says
    before = table.detach().clone()
    found = sensitivities(model, in_eight_bits(model, names, "language.lm_head"), [picture()], reference)
    assert by_sensitivity(found)[0] == "language.lm_head" and found["language.lm_head"] == float("inf")
    assert torch.equal(table, before) and (model.language.lm_head.weight is table) == tied
    twin = fake_quantised(model, in_eight_bits(model, names).only(["language.lm_head"]))
    assert torch.equal(twin.language.get_input_embeddings().weight, before), "the bundle's table is in float"


def test_measuring_stops_when_the_time_is_spent(tiny_model: AGVAS) -> None:
    reference = [outcome_of_reference(tiny_model.segment(picture()))]
    assert sensitivities(tiny_model, in_eight_bits(tiny_model, NAMES), [picture()], reference, until=0.0) == {}


def test_pictures_without_anchors_measure_nothing(tiny_model: AGVAS) -> None:
    silent = Outcome(np.zeros((41, 67), bool), np.zeros((41, 67), np.float32), None, (9,))
    assert sensitivities(tiny_model, in_eight_bits(tiny_model, NAMES[:1]), [picture()], [silent]) == {NAMES[0]: 0.0}


# Limits


def outcome(share: float, cosine: float = 1.0) -> Outcome:
    """A mask of that share of 100 pixels, anchors turned by the cosine."""
    anomaly_map = (np.arange(100) < 100 * share).astype(np.float32).reshape(10, 10)
    states = np.tile([cosine, np.sqrt(1 - cosine**2)], (3, 1)).astype(np.float32)
    return Outcome(anomaly_map > 0.5, anomaly_map, states, (1,))


def test_flips_are_a_share_of_the_pictures() -> None:
    gates = Gates(0, 0, 0.02, None, None)
    flipped, same = (outcome(0), outcome(0.1)), (outcome(0.1), outcome(0.1))
    for count, failures in ((100, 0), (49, 1)):
        pairs = [flipped, *[same] * (count - 1)]
        assert len(gates.failures(compare([a for a, _ in pairs], [b for _, b in pairs]))) == failures


def test_the_cosine_of_anchor_states_can_be_a_gate() -> None:
    parity = compare([outcome(0.1, 0.9)], [outcome(0.1)])
    assert GATES["gptq4"].failures(parity) == ["an anchor state's cosine is 0.9000, below 0.95"]
    assert not Gates(0.9, 0.9, 0, None, None).failures(parity)


def test_the_laxer_of_two_gates_is_laxer_in_every_number() -> None:
    lax = GATES["fp32"].allowing(GATES["gptq4"])
    assert lax == GATES["gptq4"].allowing(GATES["fp32"]) == replace(GATES["gptq4"], anchor_cosine_min=None)
    assert GATES["int8"].allowing(Gates(0.99, 0.1, 0.5, 1, 1, 0.99)) == Gates(0.97, 0.1, 0.5, None, None, 0.98)
