"""Instruction templates of direct segmentation (paper A.2, online generation): a template and a word for what is sought.

Only the direct mode's templates stand here; the other modes' belong to the instruction data set. The words are ours.
"""

from __future__ import annotations

import numpy as np

from agvas.config import INSTRUCTION

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


def all_instructions() -> tuple[str, ...]:
    """Every template with every target."""
    return tuple(template.format(class_name=target) for template in TEMPLATES for target in TARGETS)


def sample_instruction(rng: np.random.Generator, default_share: float = 0.5) -> str:
    """The default instruction half of the time, otherwise a random template with a random target."""
    if rng.random() < default_share:
        return INSTRUCTION
    return str(rng.choice(TEMPLATES)).format(class_name=rng.choice(TARGETS))
