"""instruct.jsonl and refused.jsonl: one JSON object a line, appended whole or not at all, so that a run can end at any moment.

A line is written and synced before its sample counts as done. What a crash left of a last line is cut off when the file is opened again;
a damaged line anywhere else is an error, never skipped. A picture whose mask was corrected is described again under the same names: of
such lines the last one counts. Paths in a line are relative to the file's own folder, so output and data set can be moved together.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from agvas.instruct.answers import FIELDS
from agvas.training.instructions import Description
from agvas.training.sources.errors import DatasetError

__all__ = [
    "ACCEPTED",
    "DESCRIBED",
    "REFUSED",
    "Entry",
    "Journal",
    "Refusal",
    "Usage",
    "latest",
    "read_entries",
    "read_refusals",
    "read_usage",
    "relative_path",
]

DESCRIBED = "instruct.jsonl"
REFUSED = "refused.jsonl"
ACCEPTED = "accepted.jsonl"
Place = tuple[str, str | None, str, str | None]
"""Image, mask, category and kind: what two descriptions of one thing have in common."""
_REMEDY = "restore the line, or move the file away to describe its samples again"


@dataclass(frozen=True)
class Entry:
    """A described sample.

    Attributes:
        id: hash of picture, mask, knowledge and prompt version (samples.py).
        image, mask: paths relative to the jsonl's folder, with forward slashes; mask is None where the data set keeps it in no file.
        category, kind: the data set's words; "class" in the file.
        description: the five fields; they stand side by side with the others in the file.
        model: who described it; "human" where a reviewer wrote it anew.
        attempts: answers that it took.
        usage: {"input_tokens", "output_tokens"} of all attempts, None where the endpoint did not say.
    """

    id: str
    image: str
    mask: str | None
    category: str
    kind: str | None
    description: Description
    model: str
    attempts: int
    usage: dict[str, int] | None

    @property
    def place(self) -> Place:
        return self.image, self.mask, self.category, self.kind

    def to_json(self) -> str:
        """One line, without its end."""
        record = {
            "id": self.id,
            "image": self.image,
            "mask": self.mask,
            "class": self.category,
            "kind": self.kind,
            **dataclasses.asdict(self.description),
            "model": self.model,
            "attempts": self.attempts,
            "usage": self.usage,
        }
        return json.dumps(record, ensure_ascii=False)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Entry:
        """Raises KeyError or TypeError where a field is missing or of a wrong type."""
        description = Description(**{name: _text(record, name) for name in FIELDS})
        texts = (_text(record, name) for name in ("id", "image"))
        mask, kind = (None if record[name] is None else _text(record, name) for name in ("mask", "kind"))
        attempts = record["attempts"]
        if not isinstance(attempts, int):
            raise TypeError(f"attempts is {attempts!r}")
        identity, image = texts
        return cls(identity, image, mask, _text(record, "class"), kind, description, _text(record, "model"), attempts, record["usage"])


@dataclass(frozen=True)
class Refusal:
    """A sample whose every answer was refused; `answer` is the last one, `reasons` those against it. The rest as in Entry."""

    id: str
    image: str
    mask: str | None
    category: str
    kind: str | None
    answer: str
    reasons: tuple[str, ...]
    model: str
    attempts: int
    usage: dict[str, int] | None

    def to_json(self) -> str:
        """One line, without its end."""
        record = dataclasses.asdict(self)
        record["class"] = record.pop("category")
        return json.dumps(record, ensure_ascii=False)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Refusal:
        """Raises KeyError or TypeError where a field is missing."""
        values = {field.name: record["class" if field.name == "category" else field.name] for field in dataclasses.fields(cls)}
        return cls(**(values | {"reasons": tuple(values["reasons"])}))


class Journal:
    """A jsonl file open for appending; only one process may have it open."""

    def __init__(self, path: Path) -> None:
        """Cuts off half a line at the end; `cut_bytes` says how much. Raises OSError, of it BlockingIOError where another run writes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        try:
            _lock(self._file.fileno(), path)
            self.cut_bytes = self._cut_half_line()
        except BaseException:
            self._file.close()
            raise

    def append(self, line: str) -> None:
        """Write one line and see it on the disk."""
        data = line.encode() + b"\n"
        while data:
            data = data[self._file.write(data) :]
        os.fsync(self._file.fileno())

    def _cut_half_line(self) -> int:
        size = self._file.seek(0, os.SEEK_END)
        position, tail = size, b""
        while position and b"\n" not in tail:
            step = min(position, 65536)
            position = self._file.seek(position - step)
            tail = self._file.read(step) + tail
        whole = position + tail.rfind(b"\n") + 1
        if whole < size:
            self._file.truncate(whole)
        return size - whole

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_entries(path: str | os.PathLike[str]) -> list[Entry]:
    """The described samples of an instruct.jsonl or accepted.jsonl, none where there is no file; half a last line is left out.

    Raises DatasetError for any other line that is no entry.
    """
    return [_build(Entry, Path(path), number, record) for number, record in _records(Path(path))]


def latest(entries: Iterable[Entry]) -> list[Entry]:
    """Of entries of one place the last, in the order of the file: an earlier one describes a mask or a prompt that is no more."""
    found: dict[Place, Entry] = {}
    for entry in entries:
        found.pop(entry.place, None)
        found[entry.place] = entry
    return list(found.values())


def read_refusals(path: str | os.PathLike[str]) -> list[Refusal]:
    """As read_entries, of a refused.jsonl."""
    return [_build(Refusal, Path(path), number, record) for number, record in _records(Path(path))]


@dataclass(frozen=True)
class Usage:
    """Tokens of all runs into a folder, as far as its lines tell them: not of `samples_without_usage`, whose endpoint did not, and not of
    samples that were left for a later run."""

    input_tokens: int
    output_tokens: int
    samples_without_usage: int


def read_usage(output: Path) -> Usage:
    """The sum over all lines of output's journals, superseded ones too: they were paid for. Raises DatasetError for a damaged one."""
    told = [entry.usage for entry in read_entries(output / DESCRIBED)] + [refusal.usage for refusal in read_refusals(output / REFUSED)]
    known = [usage for usage in told if usage is not None]
    tokens = [sum(usage[name] for usage in known) for name in ("input_tokens", "output_tokens")]
    return Usage(tokens[0], tokens[1], len(told) - len(known))


def relative_path(path: Path, folder: Path) -> str:
    """From `folder` to `path`, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DatasetError(path, number, "a JSON object", f"{line[:60]!r} ({error})", _REMEDY) from error


def _build(kind: type[Any], path: Path, number: int, record: Any) -> Any:
    try:
        return kind.from_record(record)
    except (KeyError, TypeError) as error:
        raise DatasetError(path, number, f"the fields of {path.name}", f"{type(error).__name__}: {error}", _REMEDY) from error


def _text(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not a text")
    return value


def _lock(descriptor: int, path: Path) -> None:
    """The kernel gives the lock back when the process ends, however it ends."""
    if sys.platform == "win32":
        return  # no advisory locks: the user must not start two runs with one output there
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(f"{path}: another agvas-instruct writes it; wait for its end or choose another --output") from error
