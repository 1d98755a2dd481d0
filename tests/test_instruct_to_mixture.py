"""What agvas-instruct writes is what the mixture reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from agvas.instruct.journal import ACCEPTED, DESCRIBED, Entry
from agvas.training.instructions import Description
from agvas.training.mixture import Mixture, MixtureSettings


def test_of_two_descriptions_of_a_picture_the_later_is_trained(tmp_path: Path) -> None:
    """As its mask was corrected in between."""
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "part.png")
    Image.fromarray(np.eye(20, 30, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    lines = []
    for number, (mask, words) in enumerate((("mask.png", "Old."), ("mask.png", "New."), (None, "Sound."), ("mask.png", "Newest."))):
        description = Description("It should be even.", "A hole is in it.", "It is gone.", f"{words} [NOR][ANO][SEG]", "It breaks it.")
        lines.append(Entry(f"{number:016}", "part.png", mask, "plate", None, description, "a model", 1, None).to_json())
    (tmp_path / DESCRIBED).write_text("\n".join(lines) + "\n")
    source = {"kind": "anomaly-instruct", "root": ".", "modes": ["describe-then-segment"]}
    (tmp_path / "mixture.json").write_text(json.dumps({"instruct": {"probability": 1, "sources": [source]}}))
    mixture = Mixture(MixtureSettings.read(tmp_path / "mixture.json"))
    assert {mixture.sample(0, step, 0).answer.split(".")[0] for step in range(40)} == {"Newest", "Sound"}
    described = mixture.describe()
    assert "| 2 " in described and "2 older descriptions of pictures that were described again left out" in described


def test_an_accepted_description_becomes_a_question_and_its_answer(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "instruct"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder.parent / "part.png")
    mask = np.zeros((20, 30), np.uint8)
    mask[4:9, 5:12] = 255
    Image.fromarray(mask).save(folder.parent / "mask.png")
    summary = "A dark hole lies in the upper left. [NOR][ANO][SEG]"
    description = Description("It should be even.", "A hole is in it.", "Material is gone.", summary, "The hole breaks the surface.")
    entry = Entry("0" * 16, "../part.png", "../mask.png", "plate", "hole", description, "a model", 1, None)
    (folder / ACCEPTED).write_text(entry.to_json() + "\n")
    source = {"kind": "anomaly-instruct", "root": "data/instruct", "annotations": ACCEPTED, "modes": ["describe-then-segment"]}
    (tmp_path / "mixture.json").write_text(json.dumps({"instruct": {"probability": 1, "sources": [source]}}))
    sample = Mixture(MixtureSettings.read(tmp_path / "mixture.json")).sample(0, 0, 0)
    assert sample.answer == summary and sample.relative
    assert sample.mask is not None
    np.testing.assert_array_equal(sample.mask, mask == 255)
