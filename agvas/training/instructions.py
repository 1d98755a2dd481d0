"""What is asked and what is answered: templates filled anew at every step (paper A.2, online generation).

A picture's description (its five fields) is made once, offline; here a template of the wanted mode and a word for what is sought are drawn
around it, so that no picture always comes with the same words. Direct mode has one answer only, since inference verifies that answer
in one pass. The words are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agvas.config import ANSWER, INSTRUCTION
from runtime.prompts import DIRECT, MODES

TARGETS = ("anomalies", "defects", "flaws", "damaged areas", "irregularities", "faults")
TEMPLATES = (
    "Please segment the {class_name} in this image.",
    "Segment the {class_name} in this image.",
    "Can you segment the {class_name} in this picture?",
    "Find the {class_name} and output the segmentation mask.",
    "Where are the {class_name} on this part? Please give the mask.",
    "Show me the {class_name} on this surface as a mask.",
    "Mark all {class_name}.",
)


@dataclass(frozen=True)
class Description:
    """The five fields of Anomaly-Instruct (paper §3.3) for one picture, plain sentences.

    Attributes:
        expectation: what the object should look like.
        observation: what deviates, where, in which shape and size.
        diagnosis: why that breaks the normal state.
        summary: the answer of describe-then-segment; holds [NOR], [ANO] and [SEG] once each, in this order.
        explanation: one coherent paragraph.
    """

    expectation: str
    observation: str
    diagnosis: str
    summary: str
    explanation: str


def all_instructions() -> tuple[str, ...]:
    """Every template with every target."""
    return tuple(template.format(class_name=target) for template in TEMPLATES for target in TARGETS)


def sample_instruction(rng: np.random.Generator, default_share: float = 0.5) -> str:
    """The default instruction half of the time, otherwise a random template with a random target."""
    if rng.random() < default_share:
        return INSTRUCTION
    return str(rng.choice(TEMPLATES)).format(class_name=rng.choice(TARGETS))


def dialogue(mode: str, description: Description | None, rng: np.random.Generator) -> tuple[str, str]:
    """(instruction, answer) of one anomaly picture in one of the four modes.

    Raises:
        ValueError: an unknown mode; any mode but direct without a description.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == DIRECT:
        return sample_instruction(rng), ANSWER
    raise NotImplementedError


def object_dialogue(name: str, rng: np.random.Generator) -> tuple[str, str]:
    """(instruction, answer) for a thing, part or referring expression of general segmentation ("the man in red")."""
    return f"Please segment {name} in this image.", ANSWER
