"""A model's answer, read and checked: a Description, or every reason why it is none.

The model sees drawings of the ground truth that the trained model will never see; an answer that speaks of them is refused (hindsight.py).
All reasons are given at once, in words that can be sent back to the model. Nothing is repaired but white space; a text that is nearly
right is asked for again.
"""

from __future__ import annotations

import json
import re
from typing import Any

from agvas.config import ANCHORS
from agvas.instruct.hindsight import find_hindsight
from agvas.training.instructions import Description, find_anchor_fault

__all__ = ["FIELDS", "LENGTHS", "check_fields", "read_answer", "salvage_fields", "whole_characters"]

LENGTHS = {
    "expectation": (20, 400),  # stands in an instruction (describe-then-segment-plus), which is limited
    "observation": (20, 800),
    "diagnosis": (20, 800),
    "summary": (40, 600),
    "explanation": (80, 1500),
}
"""Fewest and most characters of each field."""
FIELDS = tuple(LENGTHS)

_DESCRIBED_BEFORE_ANCHORS = 20  # characters: the model must say what it sees before it points at it

_HALF_CHARACTER = re.compile("[\ud800-\udfff\ufffd]")  # what JSON's "\\ud83d" alone leaves, which no file takes, and its replacement
_CONTROL_TOKEN = re.compile(r"<\|.*?\|>|</?(?:think|image|img)\b[^>]*>", re.IGNORECASE)
_ANCHOR_LIKE = re.compile(r"\[\s*(?:NOR|ANO|SEG)\s*\]", re.IGNORECASE)


def read_answer(text: str, category: str = "", kind: str | None = None) -> tuple[Description | None, list[str]]:
    """The description that an answer holds and no reasons, or None and the reasons against it.

    The JSON object may stand in a code fence, after a <think> block, or between other words; its keys may have any case.

    Args:
        category, kind: words of these names are not held against the answer ("box" of a food box).
    """
    description, reasons = _read(text, category, kind)
    return description, [whole_characters(reason) for reason in reasons]


def _read(text: str, category: str, kind: str | None) -> tuple[Description | None, list[str]]:
    fields, reason = _find_object(text)
    if fields is None:
        return None, [reason]
    named: dict[str, Any] = {}
    reasons = []
    for key, value in fields.items():
        name = key.strip().lower()
        if name not in FIELDS:
            reasons.append(f"the JSON object has an unknown field {key!r}; expected only {', '.join(FIELDS)}")
        elif name in named:
            reasons.append(f"the field {name} stands twice")
        named[name] = value
    for name in FIELDS:
        if name not in named:
            reasons.append(f"the field {name} is missing")
        elif not isinstance(named[name], str):
            reasons.append(f"the field {name} must be a text, it is {type(named[name]).__name__}")
    if reasons:
        return None, reasons
    description = Description(**{name: " ".join(named[name].split()) for name in FIELDS})
    reasons = check_fields(description, category, kind)
    return (None, reasons) if reasons else (description, [])


def check_fields(description: Description, category: str = "", kind: str | None = None) -> list[str]:
    """The reasons why a description's texts cannot be trained on; none if they can."""
    reasons = []
    for name, (fewest, most) in LENGTHS.items():
        text = getattr(description, name)
        if not fewest <= len(text) <= most:
            reasons.append(f"the field {name} must have {fewest} to {most} characters, it has {len(text)}")
        elif not text[0].isalnum():  # spreadsheets, in which descriptions are reviewed, run texts that begin with = + - @
            reasons.append(f"the field {name} must begin with a letter or digit, it begins with {text[0]!r}")
        for word, phrases in find_hindsight(text, category, kind or ""):
            reasons.append(f"the field {name} mentions {', '.join(map(repr, phrases))} ({word}), which it must not")
        if _HALF_CHARACTER.search(text):
            reasons.append(f"the field {name} holds half a character (half of a surrogate pair); write it whole or leave it out")
        if found := _CONTROL_TOKEN.findall(text):
            reasons.append(f"the field {name} holds control tokens: {', '.join(found)}")
        if name != "summary" and _ANCHOR_LIKE.search(text):
            reasons.append(f"the field {name} holds {_ANCHOR_LIKE.findall(text)[0]}; only the summary may")
    return reasons + _check_anchors(description.summary)


def salvage_fields(text: str) -> dict[str, str]:
    """What of a refused answer a reviewer can correct: its known fields that are texts; the others are empty."""
    fields = _find_object(text)[0] or {}
    texts = {str(key).strip().lower(): whole_characters(" ".join(value.split())) for key, value in fields.items() if isinstance(value, str)}
    return {name: texts.get(name, "") if texts.get(name, "")[:1].isalnum() else "" for name in FIELDS}


def whole_characters(text: str) -> str:
    """`text` as any file and request takes it: U+FFFD for each half of a character."""
    return _HALF_CHARACTER.sub("\ufffd", text)


def _check_anchors(summary: str) -> list[str]:
    wanted = "".join(ANCHORS)
    if fault := find_anchor_fault(summary):
        return [f"the summary must hold {wanted} once each and in this order, but {fault}"]
    if len(_ANCHOR_LIKE.findall(summary)) != len(ANCHORS):
        return [f"the summary must hold {wanted} once each, in capitals and without spaces"]
    if len(summary[: summary.index(ANCHORS[0])].strip()) < _DESCRIBED_BEFORE_ANCHORS:
        return [f"the summary must describe what is seen before {wanted}"]
    return []


def _find_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """The first JSON object of the answer, or None and why there is none."""
    spoken = text.rpartition("</think>")[2]
    begin = spoken.find("{")
    if begin < 0:
        return None, "the answer holds no JSON object"
    try:
        value, end = json.JSONDecoder(object_pairs_hook=_no_key_twice).raw_decode(spoken[begin:])
    except (json.JSONDecodeError, RecursionError, _KeyTwice) as error:
        return None, f"the answer is not valid JSON: {error}"
    if "{" in spoken[begin + end :]:
        return None, "the answer holds more than one JSON object"
    return value, ""


class _KeyTwice(ValueError):
    pass


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise _KeyTwice(f"the field {', '.join(sorted(twice))} stands twice")
    return dict(pairs)
