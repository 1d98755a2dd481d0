"""A model's answer, read or refused: every reason at once, and never a word of what only the describer could see."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_server import GOOD

from agvas.instruct.answers import FIELDS, LENGTHS, check_fields, read_answer, salvage_fields
from agvas.instruct.request import _EXAMPLE, SYSTEM_PROMPT, RequestSettings, first_request, knowledge_sentence, with_reasons
from agvas.training.instructions import Description


def answer(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


def reasons(text: str, category: str = "bolt") -> list[str]:
    description, found = read_answer(text, category)
    assert (description is None) == bool(found)
    return found


def test_a_good_answer_becomes_its_description() -> None:
    description, found = read_answer(answer(), "bolt")
    assert not found and description == Description(**{name.lower(): text for name, text in GOOD.items()})


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{answer()}\n```",
        f"```\n{answer()}```",
        f"Here it is:\n\n{answer()}\nI hope it helps.",
        f'<think>Maybe {{"Expectation": 1}} or so ... </think>\n{answer()}',
        answer().replace("Expectation", "expectation").replace("Summary", "SUMMARY"),
        json.dumps(GOOD, indent=4).replace("even thread", "even \\n  thread"),
    ],
    ids=["fence", "fence without language", "words around it", "thoughts", "case of keys", "white space"],
)
def test_an_answer_may_come_wrapped(text: str) -> None:
    description, found = read_answer(text)
    assert not found and description is not None and description.expectation == GOOD["Expectation"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON object"),
        ("I cannot help with that.", "no JSON object"),
        (answer()[:-30], "not valid JSON"),
        ("[" * 5000 + "{" * 5000, "not valid JSON"),
        (answer() + answer(), "more than one JSON object"),
        ('{"Expectation": "a", "Expectation": "b"}', "Expectation stands twice"),
        (json.dumps({name: text for name, text in GOOD.items() if name != "Diagnosis"}), "the field diagnosis is missing"),
        (answer(Diagnosis=["a", "b"]), "diagnosis must be a text, it is list"),
        (answer(Severity="high"), "unknown field 'Severity'"),
        (answer(summary=GOOD["Summary"]), "the field summary stands twice"),
        (answer(Diagnosis="Bad."), "diagnosis must have 20 to 800 characters, it has 4"),
        (answer(Expectation="long " * 200), "expectation must have 20 to 400 characters, it has 999"),
        (answer(Diagnosis="=SUM(A1:A9) interrupts the thread here."), "must begin with a letter or digit"),
        (answer(Diagnosis="The notch interrupts the thread.<|im_end|>"), "control tokens"),
    ],
)
def test_what_is_no_such_object_is_refused_with_the_reason(text: str, reason: str) -> None:
    assert any(reason in found for found in reasons(text)), reasons(text)


@pytest.mark.parametrize("field", GOOD)
def test_no_field_may_tell_of_what_only_the_describer_saw(field: str) -> None:
    """What does, tests/test_instruct_hindsight.py holds."""
    (reason,) = reasons(answer(**{field: f"The outlined area is dark. {GOOD[field]}"}))
    assert reason == f"the field {field.lower()} mentions 'outlined area' (outline), which it must not"


def test_words_of_the_kind_are_not_held_against_an_answer() -> None:
    text = answer(Observation="The mask has shifted to the left of the pads by half of their width.")
    assert read_answer(text, "pcb", "mask_shift")[1] == [] and "'mask'" in read_answer(text, "pcb", "scratch")[1][0]


def test_a_category_may_be_called_by_its_name_but_a_bounding_box_may_not() -> None:
    text = answer(Observation="The lower edge of the box is torn open; the boxes' print is intact.")
    assert reasons(text, "food_box") == [] and "box" in reasons(text, "food_can")[0]
    assert "bounding box" in reasons(answer(Observation="The bounding box lies at the lower edge of it."), "food_box")[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Summary": "A small dark notch on the left flank of the thread."}, "[NOR] stands 0 times"),
        ({"Summary": "A small dark notch on the left flank of the thread [NOR][ANO]."}, "[SEG] stands 0 times"),
        ({"Summary": "A small dark notch on the left flank: [ANO][NOR][SEG]."}, "another order"),
        ({"Summary": "A small dark notch on the left flank: [NOR][ANO][SEG][SEG]."}, "[SEG] stands 2 times"),
        ({"Summary": "A small dark notch on the left flank: [NOR][ANO][SEG] [seg]."}, "in capitals"),
        ({"Summary": "[NOR][ANO][SEG] A small dark notch on the left flank of it."}, "before [NOR][ANO][SEG]"),
        ({"Explanation": GOOD["Explanation"] + " [SEG]"}, "explanation holds [SEG]"),
        ({"Expectation": GOOD["Expectation"] + " [ nor ]"}, "expectation holds [ nor ]"),
    ],
)
def test_the_anchors_stand_once_each_in_order_at_the_summarys_end_and_nowhere_else(changes: dict[str, str], reason: str) -> None:
    assert any(reason in found for found in reasons(answer(**changes))), reasons(answer(**changes))


def test_all_reasons_come_at_once() -> None:
    summary = "A small dark notch on the left flank of the thread."
    changes = {"Diagnosis": "Bad.", "Observation": "The masked notch lies on the left flank.", "Summary": summary}
    assert len(reasons(answer(**changes))) == 3


def test_a_reviewer_is_given_what_can_be_corrected() -> None:
    assert salvage_fields(answer(Diagnosis=3, Observation="=cmd"))["expectation"] == GOOD["Expectation"]
    assert salvage_fields(answer(Diagnosis=3, Observation="=cmd")) | {"expectation": ""} == {
        "expectation": "", "observation": "", "diagnosis": "", "summary": GOOD["Summary"], "explanation": GOOD["Explanation"],
    }  # fmt: skip
    assert set(salvage_fields("nonsense").values()) == {""}


def test_the_prompts_own_example_keeps_its_rules_and_the_prompt_names_every_field_and_limit() -> None:
    assert check_fields(Description(**_EXAMPLE), "tile") == []
    for field in FIELDS:
        assert f'"{field}"' in SYSTEM_PROMPT and f"{LENGTHS[field][1]} characters" in SYSTEM_PROMPT


def test_knowledge_is_one_sentence_of_what_is_known() -> None:
    full = knowledge_sentence("metal_nut", "flip_side", "the nut lies on its wrong face.")
    assert "'metal nut'" in full and "'flip side'" in full and full.endswith("lies on its wrong face.") and full.count(".") == 1
    assert knowledge_sentence("nut", None, None).count(".") == 1 and "None" not in knowledge_sentence("nut", None, None)


def test_options_that_were_not_set_are_not_sent() -> None:
    plain = first_request(RequestSettings("m"), (b"1", b"2", b"3"), "K.")
    assert plain.keys() == {"model", "messages"}
    full = first_request(RequestSettings("m", 0.0, 900, True), (b"1", b"2", b"3"), "K.")
    assert (full["temperature"], full["max_tokens"], full["response_format"]) == (0.0, 900, {"type": "json_object"})


def test_a_second_request_holds_the_first_the_answer_and_the_reasons() -> None:
    first = first_request(RequestSettings("m"), (b"1", b"2", b"3"), "K.")
    second = with_reasons(first, "bad answer", ["too short", "no anchors"])
    assert second["messages"][:2] == first["messages"] and len(first["messages"]) == 2
    assert second["messages"][2] == {"role": "assistant", "content": "bad answer"}
    assert "- too short\n- no anchors" in second["messages"][3]["content"]
