"""Which texts tell of what only the describer saw, by the system prompt's own list, and which honest ones only sound like it."""

from __future__ import annotations

import pytest

from agvas.instruct.hindsight import find_hindsight
from agvas.instruct.request import SYSTEM_PROMPT


@pytest.mark.parametrize(
    "words",
    [
        "ground truth", "Ground-Truth", "groundtruths", "ground_truth", "mask", "Masks", "masked", "masking", "unmasked",
        "box", "boxes", "boxed", "bounding box", "bounding-boxes", "bbox", "green outline", "green thin rectangle",
        "reference", "References", "referenced", "referencing", "prior knowledge", "overlay", "overlaid",
        "annotated", "annotation", "annotators", "highlighted", "second image", "normal picture", "image 2", "tint", "tinted", "tinting",
    ],
)  # fmt: skip
def test_words_without_an_honest_use_are_found_in_their_inflections(words: str) -> None:
    assert find_hindsight(f"A dark notch, see the {words}, there.")


# Words of SYSTEM_PROMPT's rules, each with sentences that break its rule.
TELLING = {
    "ground truth": ["As the ground truth has it, the notch is on the left."],
    "annotations": ["The annotations end at the thread."],
    "masks": ["The masks follow the notch."],
    "boxes": ["The notch fills the lower one of the boxes."],
    "frames": [
        "The framed region is darker.",
        "The framed dark area is rough.",
        "The framed scratch is deep.",
        "A green frame lies around it.",
        "The frames mark two notches.",
    ],
    "outlines": [
        "Look at the outlined area.",
        "The area outlined here is dark.",
        "The defect is outlined in green.",
        "The notch is outlined in bright red.",
    ],
    "tints": ["The red-tinted region is rough.", "The tints show a notch.", "The region is tinted."],
    "overlays": ["The overlay covers the notch."],
    "highlighted": ["The highlighted flank is dark."],
    "highlighted regions": [
        "The marked area is dark.",
        "The region that is marked is dark.",
        "The indicated locations are dark.",
        "The circled spot is dark.",
    ],
    "nor their colours": [
        "The red region is rough.",
        "These red areas are rough.",
        "The notch is marked in red.",
        "The defect is shown in red.",
        "The defective pixels are shaded in light green.",
        "The red shading ends at the thread.",
        "The red colour marks the notch.",
        "The area coloured red is rough.",
        "The shaded region is rough.",
    ],
    "a reference": ["The reference has no notch.", "The reference specimen is even."],
    "a comparison": [
        "A comparison shows the notch.",
        "Compared with the good sample the flank is dark.",
        "In comparison to the normal specimen it is dark.",
        "Compared to the normal part, the flank is dark.",
        "Compared with its defect-free counterpart, the flank is dark.",
    ],
    "a normal specimen's picture": [
        "Unlike the normal specimen shown, it is dark.",
        "The good sample provided has no notch.",
        "The sound bolt sample is bright.",
        "An intact part is shown for orientation.",
        "The specimen's picture has no notch.",
        "The photo of a normal bolt has no notch.",
        "The normal one shown has an even thread.",
    ],
    "several pictures": [
        "Both pictures show it.",
        "In all images the notch is dark.",
        "The plain picture has it, too.",
        "The other photo has none.",
        "In the first of the pictures it is even.",
    ],
    "prior knowledge": [
        "Prior knowledge says it is a notch.",
        "It is a notch, as known beforehand.",
        "It is known that the bolt is anomalous.",
        "As is already known, the flank is cut.",
        "The known anomaly lies on the left.",
        "The label says it is a notch.",
        "According to the label this is a notch.",
        "The bolt is labelled as defective.",
        "The class label fits the notch.",
    ],
    "something was given to you": [
        "The given information says it is a notch.",
        "I was told that it is a notch.",
        "It was given to me as a notch.",
        "The information given names a notch.",
        "As given, the flank is dark.",
    ],
    "provided": ["The provided description fits the notch.", "The details that were provided fit.", "As provided, the flank is dark."],
}


@pytest.mark.parametrize("rule", TELLING)
def test_these_are_the_system_prompts_own_words(rule: str) -> None:
    assert rule in SYSTEM_PROMPT.partition("Rules, without exception:")[2]


@pytest.mark.parametrize("sentence", [sentence for sentences in TELLING.values() for sentence in sentences])
def test_what_the_system_prompt_forbids_is_found(sentence: str) -> None:
    assert find_hindsight(f"On the left lies a dark notch. {sentence}", "bolt", "cut_notch")


@pytest.mark.parametrize(
    "sentence",
    [
        "It looks like boxwood.",
        "The gearbox is of damask, by preference.",
        "A green stain lies beside it.",
        "The reflection is weak.",
        "A red stain runs down the flank.",
        "There is a red spot on the thread.",
        "A reddish area of rust surrounds it.",
        "The line is marked with red paint.",
        "A red area of corrosion surrounds the head.",
        "The area marked '3' is scratched.",
        "The label on the bottle is torn.",
        "The label says 'MILK' in smeared letters.",
        "The labels are printed askew.",
        "The bottle is labelled 500 ml.",
        "The picture frame has a chip.",
        "The frame of the door is bent.",
        "The frame shows scratches.",
        "The head is framed by two ribs.",
        "The outline of the tile is no longer square.",
        "A sharply outlined dark spot lies there.",
        "The letters have dark outlines.",
        "The surface is marked by scratches.",
        "A marked dent lies there.",
        "The heavily marked area is rough.",
        "A normal specimen has an even thread.",
        "Unlike a sound bolt, it is cut.",
        "Compared with the rest of the thread it is dark.",
        "Compared with the intact glaze around it, the break is bright.",
        "In comparison with its neighbours the tooth is short.",
        "A groove is provided along the edge.",
        "The seal is provided by a gasket.",
        "At a given point the thread ends.",
        "This is also known as a burr.",
        "The solder mask is scratched.",
        "The Solder-Mask has peeled off.",
        "Part of the normal glaze remains.",
        "The highlights on the metal are broken.",
        "The lower left of the picture is dark.",
        "The image shows a notch.",
        "The print shows two dots.",
    ],
)
def test_an_honest_sentence_passes(sentence: str) -> None:
    assert find_hindsight(f"On the left lies a dark notch. {sentence}", "bolt", "cut_notch") == []


def test_category_and_kind_may_be_called_by_their_own_words_and_their_plurals() -> None:
    assert find_hindsight("The mask has shifted off the pads.", "pcb", "mask_shift") == []
    assert find_hindsight("Both boxes are torn, one box more.", "food_box") == []
    assert find_hindsight("The tinted glass is cracked.", "tinted-glass") == []
    assert find_hindsight("The mask has shifted off the pads.", "pcb", "scratch") == [("mask", ["mask"])]
    assert find_hindsight("The mask follows the bounding box.", "food_box") == [
        ("mask", ["mask"]), ("box", ["bounding box"]), ("bounding box", ["bounding"]),
    ]  # fmt: skip
