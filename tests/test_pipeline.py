"""The runtime's chain gives the reference's result: token for token, mask for mask, whatever the model says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import new_tiny, picture, teach

from agvas import AGVAS
from export.parity import pipeline_over, torch_stages
from runtime import pipeline
from runtime.pipeline import Pipeline, Trace, Vision

# Both sides compute in fp32 with torch; one pass over 40 tokens sums in another order than 10 passes over a cache do.
MAP_TOLERANCE = 2e-5


def chain(model: AGVAS) -> Pipeline:
    return pipeline_over(model, torch_stages(model))


def assert_same(model: AGVAS, image: np.ndarray, *, verified: bool) -> None:
    reference = model.segment(image)
    trace = chain(model).run(image, model.prompt_encoder.encode())
    assert trace.answer == reference.answer_ids
    assert trace.verified is verified
    np.testing.assert_allclose(trace.anomaly_map, reference.anomaly_map, atol=MAP_TOLERANCE)
    if reference.anchor_states is None:
        assert trace.anchor_states is None
    else:
        assert trace.anchor_states is not None
        np.testing.assert_allclose(trace.anchor_states[0], reference.anchor_states, atol=1e-4)


def said(model: AGVAS, text: str) -> tuple[int, ...]:
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    return (*ids, model.prompt_encoder.end_id)


@pytest.mark.parametrize("seed", range(3))
def test_the_expected_answer_is_verified_in_one_pass(tiny_model: AGVAS, seed: int) -> None:
    assert_same(tiny_model, picture(seed), verified=True)


def test_one_pass_means_one_language_call(tiny_model: AGVAS) -> None:
    stages = torch_stages(tiny_model)
    calls: list[int] = []
    language = stages["language"]
    original = language.run

    def counted(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(feeds["input_embeddings"].shape[1])
        return original(feeds)

    language.run = counted  # type: ignore[method-assign]
    pipeline_over(tiny_model, stages).run(picture(), tiny_model.prompt_encoder.encode())
    assert len(calls) == 1


@pytest.mark.parametrize("anchor_position", ["own", "predicting"])
def test_an_answer_that_leaves_the_template_midway_is_the_references(anchor_position: str) -> None:
    model = new_tiny(anchor_position)
    teach(model, said(model, "Sure, it is here: [NOR] and [ANO] and then [SEG]!"))
    reference = model.segment(picture())
    assert reference.anchor_states is not None, "the fixture must say its anchors"
    assert_same(model, picture(), verified=False)


def test_the_predicting_position_is_one_before_the_anchor() -> None:
    states = {}
    for position in ("own", "predicting"):
        model = new_tiny(position)
        teach(model, said(model, model.config.prompts.answer))
        assert_same(model, picture(), verified=True)
        segmented = model.segment(picture())
        assert segmented.anchor_states is not None
        states[position] = segmented.anchor_states
    # "Sure, it is [NOR][ANO][SEG].": [NOR]'s own state is the one that predicts [ANO].
    np.testing.assert_allclose(states["own"][0], states["predicting"][1], atol=1e-5)
    np.testing.assert_allclose(states["own"][1], states["predicting"][2], atol=1e-5)


def test_a_random_model_that_never_says_the_template_gives_the_references_tokens() -> None:
    model = new_tiny(seed=11)
    reference = model.segment(picture())
    assert reference.anchor_states is None
    assert not reference.mask.any()
    assert_same(model, picture(), verified=False)


def test_an_answer_without_one_anchor_is_an_empty_mask(tiny_model: AGVAS) -> None:
    model = teach(new_tiny(), said(tiny_model, "Sure, it is [NOR][SEG]."))
    trace = chain(model).run(picture(), model.prompt_encoder.encode())
    assert trace.anchor_states is None
    assert not trace.anomaly_map.any()
    assert_same(model, picture(), verified=False)


def test_an_answer_cut_by_the_length_limit_is_the_references(tiny_model: AGVAS) -> None:
    draft = tiny_model.prompt_encoder.encode().draft
    assert draft is not None
    for limit in (len(draft) - 1, len(draft) - 2, len(draft) - 3, 1):
        prompts = dataclasses.replace(tiny_model.config.prompts, max_new_tokens=limit)
        short = AGVAS(dataclasses.replace(tiny_model.config, prompts=prompts), tiny_model.tokenizer)
        short.load_state_dict(tiny_model.state_dict())
        assert_same(short.eval(), picture(), verified=False)


def test_a_free_instruction_reaches_the_model(tiny_model: AGVAS) -> None:
    instruction = "Find the scratches near the edge."
    reference = tiny_model.segment(picture(), instruction)
    trace = chain(tiny_model).run(picture(), tiny_model.prompt_encoder.encode(instruction))
    assert trace.answer == reference.answer_ids
    np.testing.assert_allclose(trace.anomaly_map, reference.anomaly_map, atol=MAP_TOLERANCE)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (200, 3), (56, 56), (57, 113)])
def test_every_size_comes_back_at_its_own_size(tiny_model: AGVAS, height: int, width: int) -> None:
    trace = chain(tiny_model).run(picture(0, height, width), tiny_model.prompt_encoder.encode())
    assert trace.anomaly_map.shape == (height, width)
    assert_same(tiny_model, picture(0, height, width), verified=True)


def test_what_is_forgotten_meanwhile_is_still_given_whole_and_stays_forgotten(
    tiny_model: AGVAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread forgets what this one is cutting."""
    see = chain(tiny_model).see(picture())
    vision = Vision(see.frame, Trace(see.tensors))
    keys = np.arange(2 * 5, dtype=np.float32).reshape(1, 1, 1, 5, 2)
    vision.keep(keys, -keys, tokens=3)
    original = pipeline._cut

    def forgotten_meanwhile(*arguments: Any) -> Any:
        vision.forget()
        return original(*arguments)

    monkeypatch.setattr(pipeline, "_cut", forgotten_meanwhile)
    past = vision.past()
    assert past is not None
    np.testing.assert_array_equal(past[0], keys[:, :, :, :3])
    np.testing.assert_array_equal(past[1], -keys[:, :, :, :3])
    assert vision.past() is None
