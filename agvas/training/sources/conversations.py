"""Conversations about pictures in the format of LLaVA-150k; no masks.

    [{"id": ..., "image": "000000033471.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat ...?"}, {"from": "gpt", "value": ...}]}]

One sample is one question with its answer, drawn among the record's turns. The turns before it are dropped: the model's template has one
question and one answer, so a question that leans on an earlier one ("and the left one?") is asked without it. "<image>" is taken out of
questions, where it marks the picture's place; any other control token is an error that names the record. Every record needs a picture: the
text-only ones of the larger LLaVA mixes have to be removed first.

WebAD's published layout could not be found; a file of this format is read whatever its origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, need_folder, read_json, take
from agvas.training.sources.texts import checked


@dataclass(frozen=True)
class Conversation:
    """A picture and the (question, answer) turns about it; `place` is the record in the file, "record 3"."""

    image: Path
    turns: tuple[tuple[str, str], ...]
    listed_in: Path
    place: str

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        return self.turns[int(rng.integers(len(self.turns)))]


def read_conversations(annotations: Path, images: Path) -> list[Conversation]:
    """The records in the file's order.

    Args:
        annotations: the JSON file.
        images: the folder that "image" is relative to.
    """
    need_folder(images, "the pictures that the conversations name")
    content = read_json(annotations, "a list of conversations")
    if not isinstance(content, list) or not content:
        raise DatasetError(annotations, None, "a list of conversations", f"{content!r:.60}", "restore the file from the release")
    listing = Listing()
    return [_conversation(entry, n, annotations, images, listing) for n, entry in enumerate(content)]


def _conversation(entry: Any, n: int, file: Path, images: Path, listing: Listing) -> Conversation:
    place = f"record {n}"
    image = listing.need(images / take(entry, "image", str, file, place), file, place)
    said = take(entry, "conversations", list, file, place)
    speakers = [take(turn, "from", str, file, place) for turn in said]
    if not said or speakers != ["human", "gpt"] * (len(said) // 2):
        expected = f"human and gpt in turn, ending with gpt, in {place}"
        raise DatasetError(file, None, expected, ", ".join(speakers) or "no turns", "complete or remove the record")
    values = [take(turn, "value", str, file, place) for turn in said]
    questions = [checked(value.replace("<image>", ""), file, f"a question of {place}") for value in values[::2]]
    answers = [checked(value, file, f"an answer of {place}") for value in values[1::2]]
    return Conversation(image, tuple(zip(questions, answers)), file, place)
