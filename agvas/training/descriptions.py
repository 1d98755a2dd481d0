"""What a person would say of a procedural sample: what is wrong, where and how large, in the five fields of Anomaly-Instruct.

Sentences are built from the sample's kind and mask, so they are true of the crop that is shown. They say nothing of colour or cause: the
mask does not know them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agvas.config import ANCHORS
from agvas.training.instructions import Description

# What each kind of defect is called, and why it breaks the normal state.
NAMES = {
    "scratch": ("a scratch", "something hard was drawn across the surface"),
    "crack": ("a crack", "the material has come apart"),
    "crack_net": ("a net of cracks", "the material has come apart in many places"),
    "cut": ("a cut", "the surface was slit open"),
    "hole": ("a hole", "material is gone"),
    "dent": ("a dent", "the surface was pressed in"),
    "stain": ("a stain", "something has discoloured the surface"),
    "large_patch": ("a large patch", "the surface has another tone there"),
    "clouding": ("a clouded area", "the surface has lost its even tone"),
    "corrosion": ("corrosion", "the surface has been eaten away"),
    "spalling": ("spalling", "a layer has broken off"),
    "exposed_bar": ("an exposed bar", "the cover over it has broken off"),
    "missing": ("a missing part", "something that belongs there is gone"),
    "extra_part": ("a foreign object", "something lies there that does not belong"),
    "fibre": ("a fibre", "something lies there that does not belong"),
    "fray": ("a frayed place", "the material has come loose"),
    "inclusion": ("an inclusion", "foreign material is embedded there"),
    "wrinkle": ("a wrinkle", "the surface is folded"),
    "contamination": ("contamination", "foreign matter lies on the surface"),
    "texture_break": ("a break in the texture", "the pattern does not go on there"),
    "misplaced_thread": ("a misplaced thread", "the weave is out of order"),
    "smear": ("a smear", "the surface was wiped while wet or soiled"),
    "burn": ("a burn", "heat has marked the surface"),
    "colour_shift": ("a shift of colour", "the surface has another colour there"),
    "unevenness": ("an uneven area", "the surface is not flat there"),
    "band": ("a band", "a strip of the surface differs from the rest"),
    "foreign_texture": ("a foreign texture", "another material shows there"),
    "bubble": ("a bubble", "something is trapped under the surface"),
    "burr": ("a burr", "material stands out over the edge"),
    "peel": ("a peeled area", "the coating has come off"),
}
EXPECTATIONS = (
    "The surface should be even and whole.",
    "A good part shows an even surface without marks.",
    "The normal state is an unbroken, regular surface.",
)
SIZES = ((0.003, "tiny"), (0.02, "small"), (0.1, "medium"), (1.0, "large"))  # up to this share of the picture
ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "centre", "right")


def describe(kind: str, mask: npt.NDArray[np.bool_], rng: np.random.Generator) -> Description:
    """The five fields for a sample of that kind ("" and an empty mask: normal). mask: bool [H, W]."""
    anchors = "".join(ANCHORS)
    expectation = str(rng.choice(EXPECTATIONS))
    if not mask.any():
        return Description(
            expectation=expectation,
            observation="No anomaly is visible.",
            diagnosis="Nothing breaks the normal state.",
            summary=f"No anomaly is visible. {anchors}",
            explanation="No anomaly is visible: nothing breaks the normal state.",
        )
    name, reason = NAMES[kind]
    observation = f"There is {name} in the {place(mask)} of the image, {size(mask)} in size."
    return Description(
        expectation=expectation,
        observation=observation,
        diagnosis=f"It is an anomaly because {reason}.",
        summary=f"{observation} {anchors}",
        explanation=f"{observation} It is an anomaly because {reason}.",
    )


def all_sentences() -> tuple[str, ...]:
    """Everything that can be said, once or nearly so: what nano's tokenizer is made for."""
    places = [f"{row} {column}" for row in ROWS for column in COLUMNS]
    sentences = [*EXPECTATIONS, "No anomaly is visible.", "No anomaly is visible: nothing breaks the normal state."]
    for number, (name, reason) in enumerate(NAMES.values()):
        word = SIZES[number % len(SIZES)][1]
        sentences.append(f"There is {name} in the {places[number % len(places)]} of the image, {word} in size.")
        sentences.append(f"It is an anomaly because {reason}.")
    return tuple(sentences)


def place(mask: npt.NDArray[np.bool_]) -> str:
    """Where a mask's centre of mass lies, in a grid of three by three: "upper left", "centre", "middle right"."""
    rows, columns = np.nonzero(mask)
    row = ROWS[min(2, int(3 * (rows.mean() + 0.5) / mask.shape[0]))]
    column = COLUMNS[min(2, int(3 * (columns.mean() + 0.5) / mask.shape[1]))]
    return "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"


def size(mask: npt.NDArray[np.bool_]) -> str:
    """How much of the picture a mask takes, in a word."""
    share = float(mask.mean())
    return next(word for limit, word in SIZES if share <= limit)
