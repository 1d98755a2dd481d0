"""What a run would send, written to files and not sent: the three pictures and the exact body of the first request of each sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from agvas.instruct.references import References
from agvas.instruct.request import RequestSettings, first_request
from agvas.instruct.samples import Explanations, Record, identify, picture_name

__all__ = ["rehearse"]

PICTURES = ("boxes.jpg", "tint.jpg", "normal.jpg")
_STEM = 80  # characters: a file system takes names of 255 bytes


def rehearse(
    records: Sequence[Record],
    references: References,
    settings: RequestSettings,
    folder: Path,
    count: int,
    explanations: Explanations,
) -> list[tuple[Path, str]]:
    """Write one folder for each of the first `count` anomalous records, and return each with the picture's name.

    A folder is named by the picture's stem and the sample's id: two pictures may share a stem.

    Raises ValueError, LookupError or OSError for the first sample that could not be sent.
    """
    written = []
    for record in islice((record for record in records if record.is_anomalous), count):
        sample = identify(record, explanations)
        jpegs, _ = sample.draw(references, settings.max_side)
        place = folder / f"{record.image.stem[:_STEM]}-{sample.id}"
        place.mkdir(parents=True, exist_ok=True)
        for name, jpeg in zip(PICTURES, jpegs, strict=True):
            (place / name).write_bytes(jpeg)
        (place / "request.json").write_bytes(json.dumps(first_request(settings, jpegs, sample.knowledge)).encode())
        written.append((place, picture_name(record)))
    return written
