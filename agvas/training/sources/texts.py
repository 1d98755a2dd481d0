"""Texts of data sets: none may hold one of the model's control tokens.

A text with "<|im_end|>" or "[SEG]" in it would end the conversation or forge an anchor. It is refused, naming file and record, rather than
stripped: what is left of such a sentence is seldom a sentence.
"""

from __future__ import annotations

import re
from pathlib import Path

from agvas.config import ANCHORS
from agvas.training.sources.errors import DatasetError

_CONTROL = re.compile(r"<\|[^<>|\s]{1,60}\|>|<image>|<video>|" + "|".join(map(re.escape, ANCHORS)))


def control_tokens(text: str) -> list[str]:
    """What looks like a token of the conversation template, an image's place or an anchor, in the text's order."""
    return _CONTROL.findall(text)


def checked(text: str, file: Path, place: str, line: int | None = None) -> str:
    """`text` without outer white space; DatasetError where nothing is left or a control token stands in it."""
    found = control_tokens(text)
    if found:
        remedy = "remove the token from the text, or the record from the file"
        raise DatasetError(file, line, f"{place} without control tokens", ", ".join(sorted(set(found))), remedy)
    if not text.strip():
        raise DatasetError(file, line, f"{place} with words", repr(text), "write the text, or remove the record from the file")
    return text.strip()
