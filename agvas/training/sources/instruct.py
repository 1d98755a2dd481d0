"""Anomaly-Instruct: pictures with the five fields of a description (paper 3.3), one JSON object a line.

    {"image": "...", "mask": "...", "class": "...", "kind": "...", "expectation": "...", "observation": "...", "diagnosis": "...",
     "summary": "... [NOR][ANO][SEG] ...", "explanation": "..."}

Paths are relative to the file's folder and may lead out of it ("../real-iad/..."), since the pictures stay where their release put them.
Non-zero mask pixels are anomalous; "mask" null or "" is a normal picture, "kind" may be null. The summary holds each anchor once, in the
order [NOR], [ANO], [SEG]; the other fields hold none. Further keys are ignored. Of lines with the same image, mask, class and kind the last
one counts: agvas-instruct describes a picture again when its mask was corrected, and keeps the older line.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agvas.config import ANCHORS
from agvas.training.instructions import Description
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.files import Listing, read_text, take
from agvas.training.sources.masked import MaskedImage
from agvas.training.sources.texts import checked, control_tokens

FIELDS = ("expectation", "observation", "diagnosis", "summary", "explanation")


@dataclass(frozen=True)
class DescribedImage:
    """A picture with its truth and its description, and where that stands."""

    picture: MaskedImage
    description: Description
    file: Path
    line: int

    @property
    def is_anomalous(self) -> bool:
        return self.picture.is_anomalous


def read_instruct(file: Path) -> tuple[list[DescribedImage], list[str]]:
    """The records that count, in the file's order, and a remark on older ones; blank lines are passed over."""
    listing = Listing()
    records: dict[MaskedImage, DescribedImage] = {}
    older = 0
    for line, text in enumerate(read_text(file, "described pictures").split("\n"), 1):
        if text.strip():
            record = _record(text, line, file, listing)
            older += records.pop(record.picture, None) is not None
            records[record.picture] = record
    if not records:
        raise DatasetError(file, None, "at least one record", "an empty file", "write it with agvas-instruct")
    return list(records.values()), [f"{older} older descriptions of pictures that were described again left out"] if older else []


def _record(text: str, line: int, file: Path, listing: Listing) -> DescribedImage:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(file, line, "one JSON object a line", error.msg, "write the line again") from error
    place = "the record"
    image = _path(take(entry, "image", str, file, place, line), "image", file, line, listing)
    category = checked(take(entry, "class", str, file, place, line), file, "class", line)
    mask, kind = (_text_or_none(entry, key, file, line) for key in ("mask", "kind"))
    picture = MaskedImage(image, _path(mask, "mask", file, line, listing) if mask else None, category, kind, None)
    return DescribedImage(picture, Description(**{name: _field(entry, name, file, line) for name in FIELDS}), file, line)


def _text_or_none(entry: dict[str, Any], key: str, file: Path, line: int) -> str | None:
    """entry[key], which must be there; None where it is null or empty."""
    if entry.get(key, "") is None:
        return None
    return str(take(entry, key, str, file, "the record", line)).strip() or None


def _field(entry: Any, name: str, file: Path, line: int) -> str:
    value: str = take(entry, name, str, file, "the record", line)
    if name != "summary":
        return checked(value, file, name, line)
    found = control_tokens(value)
    if tuple(found) != ANCHORS:
        expected = f"a summary with {', '.join(ANCHORS)} once each, in this order, and no other control token"
        raise DatasetError(file, line, expected, ", ".join(found) or "none", "write the summary again")
    return value.strip()


def _path(cell: str, key: str, file: Path, line: int, listing: Listing) -> Path:
    path = Path(os.path.normpath(file.parent / cell))
    if not cell or os.path.isabs(cell):
        raise DatasetError(file, line, f"a path relative to {file.parent} as {key!r}", repr(cell), "write it relative to the file's folder")
    if not listing.holds(path):
        raise DatasetError(file, line, f"a file as {key!r}", f"no file {path}", "correct the path or restore the file")
    return path
