"""What is asked and what is answered: templates filled anew at every step (paper A.2, online generation).

A picture's description (its five fields) is made once, offline (agvas/instruct); here a template of the wanted mode and a word for what is
sought are drawn around it, so that no picture always comes with the same words. Direct mode has one answer only, since inference verifies
that answer in one pass. A normal picture has a description where its data set has one, and is asked about in direct mode elsewhere. The
words are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from agvas.config import ANCHORS, ANSWER, INSTRUCTION
from runtime.prompts import DIRECT, MODES, PLUS, with_normal_state

__all__ = [
    "ANSWERS",
    "Description",
    "TARGETS",
    "TEMPLATES",
    "all_instructions",
    "dialogue",
    "every_question",
    "find_anchor_fault",
    "object_dialogue",
    "sample_instruction",
    "with_anchors",
]

TARGETS = ("anomalies", "defects", "flaws", "damaged areas", "irregularities", "faults")

_DESCRIBE = (
    "What {class_name} are present in this image? Please describe the {class_name} and then output the segmentation map.",
    "Describe the {class_name} in this image, then segment them.",
    "Which {class_name} do you see? Describe them first and segment them afterwards.",
    "Tell me what the {class_name} look like and where they are, then give the mask.",
    "Look for {class_name}. Say what you find, then output the segmentation mask.",
    "Please describe the {class_name} on this part and then segment them.",
    "Are there {class_name} in this image? Describe them and output the mask.",
    "First put the {class_name} into words, then mark them in a mask.",
    "Describe position, shape and look of the {class_name}, then output the mask.",
    "What is wrong here? Describe the {class_name}, then show them as a mask.",
    "Inspect this image: describe all {class_name} and then segment them.",
    "Write a short description of the {class_name}, followed by the segmentation map.",
)

TEMPLATES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        DIRECT: (
            "Please segment the {class_name} in this image.",
            "Segment the {class_name} in this image.",
            "Can you segment the {class_name} in this picture?",
            "Find the {class_name} and output the segmentation mask.",
            "Where are the {class_name} on this part? Please give the mask.",
            "Show me the {class_name} on this surface as a mask.",
            "Mark all {class_name}.",
            "Output a mask of the {class_name}.",
            "Inspect this image and segment all {class_name}.",
            "Which pixels belong to {class_name}? Please output the mask.",
            "Please locate the {class_name} and segment them.",
            "I need a segmentation mask of the {class_name} in this image.",
        ),
        "describe-then-segment": _DESCRIBE,
        PLUS: _DESCRIBE,  # what tells the two apart is the expectation in front
        "segment-then-explain": (
            "Please segment the {class_name} in this image and explain the result.",
            "Segment the {class_name} in this image, then explain them.",
            "Find the {class_name}, output the mask and give your reasons.",
            "Output a mask of the {class_name} and explain why they are not normal.",
            "Please mark the {class_name} and then tell me what they are.",
            "Where are the {class_name}? Give the mask first, then an explanation.",
            "Segment all {class_name} and say what is wrong with them.",
            "Show me the {class_name} as a mask and explain your decision.",
            "Can you segment the {class_name} in this picture and explain what you see?",
            "Locate the {class_name}, segment them and describe why they matter.",
            "Inspect this image: segment the {class_name}, then explain the finding.",
            "Give the segmentation map of the {class_name} and explain it.",
        ),
    }
)
"""Questions by mode, "{class_name}" where a word of TARGETS goes. Each mode's default instruction (agvas/config.py) is one of them."""

ANSWERS = (
    "Sure, it is [NOR][ANO][SEG]. {explanation}",
    "It is [NOR][ANO][SEG]. {explanation}",
    "Here is the result: [NOR][ANO][SEG]. {explanation}",
    "The segmentation is [NOR][ANO][SEG]. {explanation}",
    "[NOR][ANO][SEG]. {explanation}",
    "Sure, the mask is [NOR][ANO][SEG]. The reasons: {explanation}",
    "Sure, [NOR][ANO][SEG]. This is what it shows: {explanation}",
    "Of course, it is [NOR][ANO][SEG]. {explanation}",
    "The result is [NOR][ANO][SEG]. {explanation}",
    "Yes, it is [NOR][ANO][SEG]. {explanation}",
)
"""Answers of segment-then-explain."""

OBJECT_TEMPLATES = (
    "Please segment {name} in this image.",
    "Segment {name} in this image.",
    "Can you segment {name} in this picture?",
    "Find {name} and output the segmentation mask.",
    "Please output a mask of {name}.",
    "Show me {name} as a mask.",
    "Please locate and segment {name}.",
    "I need a segmentation mask of {name} in this image.",
    "Which pixels belong to {name}? Please output the mask.",
    "Mark {name} in this picture.",
)


@dataclass(frozen=True)
class Description:
    """The five fields of Anomaly-Instruct (paper §3.3) for one picture, plain sentences.

    Attributes:
        expectation: what the object should look like; one sentence.
        observation: what deviates, where, in which shape and size; of a normal picture, that nothing does.
        diagnosis: why that breaks the normal state, or that nothing does.
        summary: the answer of describe-then-segment; holds [NOR], [ANO] and [SEG] once each, in this order.
        explanation: one coherent paragraph.
    """

    expectation: str
    observation: str
    diagnosis: str
    summary: str
    explanation: str


def all_instructions() -> tuple[str, ...]:
    """Every template of every mode with every target, each text once, always in the same order: small tokenizers are trained on it."""
    return tuple(dict.fromkeys(text for mode in MODES for text in every_question(mode)))


def every_question(mode: str) -> tuple[str, ...]:
    """Every template of a mode with every target; in the -plus mode without the sentence that is put in front."""
    return tuple(template.format(class_name=target) for template in TEMPLATES[mode] for target in TARGETS)


def sample_instruction(rng: np.random.Generator, default_share: float = 0.5) -> str:
    """Direct mode's question: the default half of the time, otherwise a random template with a random target."""
    if rng.random() < default_share:
        return INSTRUCTION
    return _question(DIRECT, rng)


def dialogue(mode: str, description: Description | None, rng: np.random.Generator) -> tuple[str, str]:
    """(instruction, answer) of one anomaly picture in one of the four modes.

    Direct mode needs no description. The -plus mode puts the expectation in front of the question, as a user who knows the part would.

    Raises:
        ValueError: an unknown mode; any mode but direct without a description; a description whose anchors do not stand once each, in
            order, in the summary alone, or whose needed field is empty.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == DIRECT:
        return sample_instruction(rng), ANSWER
    if description is None:
        raise ValueError(f"description: expected one for mode {mode}, got None; only {DIRECT} answers without")
    question = _question(mode, rng)
    if mode == "segment-then-explain":
        explanation = _sentence(description, "explanation")
        return question, _drawn(ANSWERS, rng).format(explanation=explanation)
    if fault := find_anchor_fault(description.summary):
        raise ValueError(f"description.summary: expected {''.join(ANCHORS)}, once each and in this order; {fault}: {description.summary!r}")
    if mode == PLUS:
        question = with_normal_state(question, _sentence(description, "expectation"))
    return question, description.summary


def object_dialogue(name: str, rng: np.random.Generator) -> tuple[str, str]:
    """(instruction, answer) for a thing, part or referring expression of general segmentation ("the man in red").

    The name stands in the question as it is given, articles included. Raises ValueError for one that is empty or holds an anchor.
    """
    name = _name_of(name)
    return _drawn(OBJECT_TEMPLATES, rng).format(name=name), ANSWER


def with_anchors(answer: str, anchors: Sequence[str]) -> str:
    """The answer with these of the three anchors alone: what a checkpoint without the others is taught."""
    for anchor in ANCHORS:
        if anchor not in anchors:
            answer = answer.replace(anchor, "")
    return answer


def find_anchor_fault(text: str) -> str | None:
    """What is wrong with the anchors of an answer, in words; None where each stands once and they come in order."""
    for anchor in ANCHORS:
        if (count := text.count(anchor)) != 1:
            return f"{anchor} stands {count} times"
    places = [text.index(anchor) for anchor in ANCHORS]
    return None if places == sorted(places) else "they come in another order"


def _question(mode: str, rng: np.random.Generator) -> str:
    return _drawn(TEMPLATES[mode], rng).format(class_name=_drawn(TARGETS, rng))


def _drawn(library: Sequence[str], rng: np.random.Generator) -> str:
    return library[int(rng.integers(len(library)))]


def _sentence(description: Description, field: str) -> str:
    text: str = getattr(description, field).strip()
    if not text:
        raise ValueError(f"description.{field}: expected a sentence, got an empty text")
    if found := [anchor for anchor in ANCHORS if anchor in text]:
        raise ValueError(f"description.{field}: expected no anchors, got {', '.join(found)} in {text!r}; only the summary holds them")
    return text


def _name_of(name: str) -> str:
    words = " ".join(name.replace("_", " ").split())
    if not words or any(anchor in words for anchor in ANCHORS):
        raise ValueError(f"name: expected words without anchors, got {name!r}")
    return words
