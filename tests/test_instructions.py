"""Questions and answers drawn around a picture's description: varied, but with the anchors always where inference needs them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from agvas.config import ANCHORS, ANSWER, INSTRUCTION, ov_7b
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import (
    ANSWERS,
    TARGETS,
    TEMPLATES,
    Description,
    all_instructions,
    dialogue,
    find_anchor_fault,
    object_dialogue,
    sample_instruction,
)
from runtime.prompts import MODES

DRAWS = 4000
DESCRIPTION = Description(
    expectation="A normal bolt has an even thread.",
    observation="A dark notch lies on the left flank.",
    diagnosis="The notch breaks the thread.",
    summary="A dark notch on the left flank: [NOR][ANO][SEG].",
    explanation="The thread should be even, yet {one} flank is notched.",
)


def draws(mode: str, count: int = DRAWS) -> list[tuple[str, str]]:
    rng = np.random.default_rng(7)
    return [dialogue(mode, DESCRIPTION, rng) for _ in range(count)]


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_ten_templates_or_more_and_every_one_is_drawn_with_every_target(mode: str) -> None:
    assert len(set(TEMPLATES[mode])) >= 10
    front = f"{DESCRIPTION.expectation} " if mode == "describe-then-segment-plus" else ""
    expected = {front + template.replace("{class_name}", target) for template in TEMPLATES[mode] for target in TARGETS}
    assert {question for question, _ in draws(mode)} == expected


@pytest.mark.parametrize("mode", MODES)
def test_the_default_instruction_of_each_mode_is_a_possible_draw(mode: str) -> None:
    default = ov_7b().prompts.instructions[mode]
    assert any(question.endswith(default) for question, _ in draws(mode))


def test_direct_mode_asks_the_default_half_of_the_time_and_always_answers_the_same() -> None:
    pairs = draws("direct")
    assert {answer for _, answer in pairs} == {ANSWER}
    # Half by rule and 1 in 72 of the other half by chance: 0.507; four standard deviations of 4000 draws are 0.032.
    assert abs(Counter(question for question, _ in pairs)[INSTRUCTION] / DRAWS - 0.507) < 0.032


def test_without_a_default_share_no_template_is_preferred() -> None:
    rng = np.random.default_rng(3)
    share = Counter(sample_instruction(rng, default_share=0.0) for _ in range(DRAWS))[INSTRUCTION] / DRAWS
    assert 0.0 < share < 0.05


def test_describe_then_segment_answers_with_the_summary_itself() -> None:
    for mode in ("describe-then-segment", "describe-then-segment-plus"):
        assert {answer for _, answer in draws(mode, 50)} == {DESCRIPTION.summary}


def test_the_expectation_stands_before_the_question_of_plus_and_nowhere_else() -> None:
    for mode in MODES:
        begins = {question.startswith(DESCRIPTION.expectation + " ") for question, _ in draws(mode, 50)}
        assert begins == {mode == "describe-then-segment-plus"}, mode


def test_segment_then_explain_says_the_anchors_first_and_the_explanation_after_with_every_answer_template() -> None:
    answers = {answer for _, answer in draws("segment-then-explain")}
    assert len(answers) == len(ANSWERS) and ANSWER + " " + DESCRIPTION.explanation in answers
    for answer in answers:
        assert find_anchor_fault(answer) is None
        assert answer.index("[SEG]") < answer.index(DESCRIPTION.explanation) and answer.endswith(DESCRIPTION.explanation)


def test_the_same_seed_draws_the_same_dialogue() -> None:
    for mode in MODES:
        assert draws(mode, 20) == draws(mode, 20)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "direct"])
def test_a_descriptive_mode_without_a_description_is_refused_and_direct_needs_none(mode: str) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"description: expected one for mode {mode}"):
        dialogue(mode, None, rng)
    assert dialogue("direct", None, rng)[1] == ANSWER


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mode: expected one of direct, .*got 'segment'"):
        dialogue("segment", DESCRIPTION, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("summary", "fault"),
    [
        ("A notch.", r"\[NOR\] stands 0 times"),
        ("A notch [NOR][ANO].", r"\[SEG\] stands 0 times"),
        ("A notch [NOR][ANO][SEG] [SEG].", r"\[SEG\] stands 2 times"),
        ("A notch [ANO][NOR][SEG].", "another order"),
    ],
)
def test_a_summary_with_wrong_anchors_never_becomes_an_answer(summary: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        dialogue("describe-then-segment", replace(DESCRIPTION, summary=summary), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("mode", "field", "text"),
    [
        ("segment-then-explain", "explanation", "A notch [SEG]."),
        ("segment-then-explain", "explanation", " "),
        ("describe-then-segment-plus", "expectation", "Even [NOR]."),
        ("describe-then-segment-plus", "expectation", ""),
    ],
)
def test_anchors_outside_the_summary_and_empty_fields_are_refused(mode: str, field: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"description.{field}"):
        dialogue(mode, replace(DESCRIPTION, **{field: text}), np.random.default_rng(0))


def test_an_object_is_asked_for_in_several_ways_with_its_name_as_given() -> None:
    rng = np.random.default_rng(2)
    pairs = {object_dialogue("the man in red {1}", rng) for _ in range(300)}
    assert len(pairs) >= 5 and {answer for _, answer in pairs} == {ANSWER}
    assert all("the man in red {1}" in question for question, _ in pairs)
    assert ("Please segment the man in red {1} in this image.", ANSWER) in pairs


@pytest.mark.parametrize("name", ["", "  ", "a [SEG] cup"])
def test_an_object_without_a_name_or_with_an_anchor_in_it_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected words without anchors"):
        object_dialogue(name, np.random.default_rng(0))


def test_all_instructions_are_the_library_once_each_and_teach_the_small_tokenizer_the_same_ids_every_time() -> None:
    texts = all_instructions()
    assert len(texts) == len(set(texts)) and texts == all_instructions()
    library = {template for templates in TEMPLATES.values() for template in templates}
    assert set(texts) == {template.format(class_name=target) for template in library for target in TARGETS}
    assert not any(anchor in text for text in texts for anchor in ANCHORS)
    one, other = (train_tokenizer([*texts, ANSWER], 512) for _ in range(2))
    assert one.to_str() == other.to_str() and one.get_vocab_size() == 512
