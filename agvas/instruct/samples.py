"""Which samples there are to describe: what a record must offer, who it is, and what is shown of it.

A reader's records will do (agvas/training/sources): they need the attributes of Record and no base class, and a mask file, or else the
description would be read as a normal picture's.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from agvas.instruct.pictures import boxed, encode_jpeg, tinted
from agvas.instruct.references import References
from agvas.instruct.request import PROMPT_VERSION, knowledge_sentence
from agvas.training.sources.errors import DatasetError
from agvas.training.sources.pictures import picture_size, read_picture

__all__ = ["Explanations", "Record", "Sample", "identify", "mask_file", "picture_name", "read_explanations"]

_EXPLANATION_COLUMNS = ("class", "kind", "explanation")


class Record(Protocol):
    """One picture of a data set. Where the truth is kept in a file of its own, `mask` (Path or None) should name it; it may be absent."""

    @property
    def image(self) -> Path: ...
    @property
    def category(self) -> str: ...
    @property
    def kind(self) -> str | None: ...
    @property
    def is_anomalous(self) -> bool: ...
    def read_mask(self, height: int, width: int) -> npt.NDArray[np.bool_]: ...


Explanations = Mapping[tuple[str, str], str]
"""What an anomaly type means, by (category, kind)."""


@dataclass(frozen=True)
class Sample:
    """A record with what makes it itself: its identity, its truth and what is told about it."""

    record: Record
    id: str
    mask: npt.NDArray[np.bool_]  # [H, W]
    knowledge: str

    def draw(self, references: References, max_side: int) -> tuple[tuple[bytes, bytes, bytes], Path]:
        """The three visual prompts as JPEG (boxes, tint, nearest normal picture) and the path of the last.

        Raises:
            ValueError: a picture that cannot be read.
            LookupError: no normal picture of the category.
        """
        image = read_picture(self.record.image)
        nearest = references.nearest(image, self.record.category, apart_from=self.record.image)
        pictures = (boxed(image, self.mask), tinted(image, self.mask), read_picture(nearest))
        boxes, tint, normal = (encode_jpeg(picture, max_side) for picture in pictures)
        return (boxes, tint, normal), nearest


def identify(record: Record, explanations: Explanations) -> Sample:
    """Read a record's truth and say who it is; the picture is not decoded, so that a resumed run passes quickly over what is done.

    The identity is a hash of the picture's bytes, the mask's pixels, what is told about it and the prompt's version: a moved data set is
    recognised, a corrected mask or a new prompt is described again.

    Raises:
        ValueError: a picture or mask that cannot be read (DatasetError), or a mask without anomalous pixels.
    """
    mask = record.read_mask(*picture_size(record.image))
    if not mask.any():
        raise ValueError(f"{record.image}: expected anomalous pixels in its mask, found none; correct the mask or its label")
    explanation = explanations.get((record.category, record.kind)) if record.kind else None
    knowledge = knowledge_sentence(record.category, record.kind, explanation)
    digest = hashlib.sha256()
    pixels = repr(mask.shape).encode() + np.packbits(mask).tobytes()
    for part in (record.image.read_bytes(), pixels, knowledge.encode(), PROMPT_VERSION.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return Sample(record, digest.hexdigest()[:32], mask, knowledge)


def mask_file(record: Record) -> Path | None:
    """The file of the record's mask, None where its reader keeps none."""
    mask = getattr(record, "mask", None)
    return mask if isinstance(mask, Path) else None


def picture_name(record: Record) -> str:
    """What a person is told: the picture as the data set's manifest names it, its whole path where there is no manifest."""
    manifest = getattr(record, "manifest", None)
    if isinstance(manifest, Path) and record.image.is_relative_to(manifest.parent):
        return record.image.relative_to(manifest.parent).as_posix()
    return str(record.image)


def read_explanations(path: Path, records: Sequence[Record]) -> dict[tuple[str, str], str]:
    """What each anomaly type means, from a CSV with the columns class, kind, explanation.

    Raises DatasetError for a missing column, an empty cell, a pair given twice, or one that no record has (a misspelling would be lost).
    """
    known = {(record.category, record.kind) for record in records}
    result: dict[tuple[str, str], str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, strict=True, restval="")
            if missing := [name for name in _EXPLANATION_COLUMNS if name not in (lines.fieldnames or ())]:
                raise DatasetError(path, 1, f"the columns {', '.join(_EXPLANATION_COLUMNS)}", f"no {', '.join(missing)}", "add them")
            for row in lines:
                category, kind, explanation = (row[name].strip() for name in _EXPLANATION_COLUMNS)
                if not (category and kind and explanation):
                    raise DatasetError(path, lines.line_num, "three filled cells", "an empty one", "fill it or remove the line")
                if (category, kind) not in known:
                    found = f"class {category!r} with kind {kind!r}"
                    raise DatasetError(path, lines.line_num, "a class and kind of the data set", found, "correct the spelling")
                if (category, kind) in result:
                    raise DatasetError(path, lines.line_num, "each pair once", f"{category}, {kind} again", "keep one of them")
                result[category, kind] = explanation
    except OSError as error:
        raise DatasetError(path, None, "a readable file", str(error), "give a CSV to --explanations") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(path, None, "UTF-8 comma-separated values", str(error), "check quotes and encoding") from error
    return result
