"""review.csv: one line for each sample, in which people accept, correct or reject what the model wrote; and what becomes of it.

The journals are never changed. A sample that has no line yet gets one; a line that a person may have touched stays as it is, so the file
can be edited between runs. Accepted lines, corrected texts included, pass the same checks as a model's answer and become accepted.jsonl.

A picture that was described again, since its mask or the prompt changed, has its newest description alone: an older line is dropped or,
where a person has touched it, has "superseded" as its status and is not accepted, whatever it says.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from agvas.instruct.answers import FIELDS, check_fields, salvage_fields
from agvas.instruct.journal import ACCEPTED, DESCRIBED, REFUSED, Entry, Refusal, latest, read_entries, read_refusals
from agvas.training.instructions import Description
from agvas.training.sources.errors import DatasetError

__all__ = ["REVIEW", "Decisions", "Samples", "apply_review", "update_review"]

REVIEW = "review.csv"
COLUMNS = ("id", "accept", "status", "image", "class", "kind", *FIELDS, "reasons")
_YES = ("yes", "y", "1", "true")
_NO = ("no", "n", "0", "false")
_SUPERSEDED = "superseded"
_ENCODING = "utf-8-sig"  # spreadsheets read UTF-8 as such only with a byte-order mark

Row = dict[str, str]


@dataclass(frozen=True)
class Samples:
    """How many samples review.csv has to decide on, and how many older descriptions of theirs (`superseded`) no longer count."""

    samples: int
    superseded: int


@dataclass(frozen=True)
class Decisions:
    """How many samples were accepted, rejected and not yet marked (`unmarked`); `edited` of the accepted have corrected texts, and
    `superseded` older descriptions of theirs no longer count."""

    accepted: int
    rejected: int
    unmarked: int
    edited: int
    superseded: int


def update_review(output: Path) -> Samples:
    """Bring output/review.csv up to date with the journals.

    A line of a refused sample that nobody touched is replaced once the sample has been described; of what was described again, see above.

    Raises DatasetError for a damaged journal or a review file that cannot be read; it is then left alone.
    """
    entries, older = _of_each_place(read_entries(output / DESCRIBED))
    untouched: dict[str, list[Row]] = {}
    for refusal in read_refusals(output / REFUSED):
        untouched.setdefault(refusal.id, []).append(_refusal_row(refusal))
    rows = {identity: row for _, identity, row in _read(output)}
    before = dict(rows)
    for identity, row in before.items():
        if identity in older and _is_one_of(row, [_entry_row(entry) for entry in older[identity]]):
            del rows[identity]
        elif identity in older:
            rows[identity] = row | {"status": _SUPERSEDED}
        elif row["status"] == _SUPERSEDED and identity in entries:  # its mask was corrected back
            rows[identity] = row | {"status": _entry_row(entries[identity])["status"]}
    for identity, entry in entries.items():
        if identity not in rows or _is_one_of(rows[identity], untouched.get(identity, [])):
            rows[identity] = _entry_row(entry)
    for identity, versions in untouched.items():
        if identity not in older and (identity not in rows or _is_one_of(rows[identity], versions)):
            rows[identity] = versions[-1]
    if rows != before or not (output / REVIEW).is_file():
        _write(output, list(rows.values()))
    return Samples(sum(identity not in older for identity in rows), sum(map(len, older.values())))


def _of_each_place(entries: list[Entry]) -> tuple[dict[str, Entry], dict[str, list[Entry]]]:
    """(the entries that count, those that were superseded), by id; an id stands in one of the two."""
    current = {entry.id: entry for entry in latest(entries)}
    older: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.id not in current:
            older.setdefault(entry.id, []).append(entry)
    return current, older


def apply_review(output: Path, accept_unmarked: bool = False) -> Decisions:
    """Write output/accepted.jsonl: the accepted lines of review.csv with their texts as they stand there.

    Where nothing is accepted and nothing rejected, nothing is written: an empty file would look like everybody's no.

    Args:
        accept_unmarked: also take described samples whose `accept` is empty (refused ones never).

    Raises DatasetError, and writes nothing, for a decision that is neither yes nor no, an unknown id, or an accepted text that fails the
    checks; it names the first line and says how many more there are.
    """
    entries, older = _of_each_place(read_entries(output / DESCRIBED))
    refusals = {refusal.id: refusal for refusal in read_refusals(output / REFUSED)}
    if not entries and not refusals:
        raise DatasetError(output / DESCRIBED, None, "described samples", "none", "give the --output of an earlier run")
    update_review(output)
    accepted: list[Entry] = []
    faults: list[DatasetError] = []
    rejected = unmarked = edited = 0
    for line, identity, row in _read(output):
        if identity in older:
            continue
        decision = row["accept"].strip().lower()
        known = entries.get(identity) or refusals.get(identity)
        if decision and decision not in (*_YES, *_NO):
            faults.append(_fault(output, line, "yes, no or nothing in column accept", repr(row["accept"]), "write one of them"))
        elif known is None:
            faults.append(_fault(output, line, "an id of a described or refused sample", identity, "remove the line"))
        elif decision in _NO and decision:
            rejected += 1
        elif decision in _YES or (accept_unmarked and isinstance(known, Entry)):
            entry = _accepted(known, Description(**{name: " ".join(row[name].split()) for name in FIELDS}))
            if reasons := check_fields(entry.description, entry.category, entry.kind):
                found = "; ".join(reasons)
                if isinstance(known, Refusal):
                    found = f"a refused answer that is still to be corrected: {found}"
                faults.append(_fault(output, line, "a text that can be trained on", found, "correct it or write no"))
            edited += entry is not known
            accepted.append(entry)
        else:
            unmarked += 1
    if faults:
        first = faults[0]
        more = f" ({len(faults) - 1} more lines have faults)" if len(faults) > 1 else ""
        raise DatasetError(first.file, first.line, first.expected, first.found, first.remedy + more)
    counting = latest(accepted)  # a refused answer that was corrected and a later description may both be accepted
    if accepted or rejected:
        _replace(output / ACCEPTED, "".join(entry.to_json() + "\n" for entry in counting).encode())
    superseded = sum(map(len, older.values())) + len(accepted) - len(counting)
    return Decisions(len(counting), rejected, unmarked, edited, superseded)


def _accepted(known: Entry | Refusal, description: Description) -> Entry:
    """`known` itself where its text is unchanged."""
    if isinstance(known, Entry):
        return known if known.description == description else replace(known, description=description, model=f"{known.model}, edited")
    place = (known.id, known.image, known.mask, known.category, known.kind)
    return Entry(*place, description, f"{known.model}, edited", known.attempts, known.usage)


def _is_one_of(row: Row, versions: list[Row]) -> bool:
    """Whether a line is as this file wrote it."""
    return {name: cell for name, cell in row.items() if cell or name in COLUMNS} in versions


def _entry_row(entry: Entry) -> Row:
    texts = {name: getattr(entry.description, name) for name in FIELDS}
    return _row(entry, "described", texts, "")


def _refusal_row(refusal: Refusal) -> Row:
    return _row(refusal, "refused", salvage_fields(refusal.answer), " | ".join(refusal.reasons))


def _row(known: Entry | Refusal, status: str, texts: dict[str, str], reasons: str) -> Row:
    place = {"id": known.id, "accept": "", "status": status, "image": known.image, "class": known.category, "kind": known.kind or ""}
    return {**place, **texts, "reasons": reasons}


def _read(output: Path) -> Iterator[tuple[int, str, Row]]:
    """(line, id, row) of the review file; nothing where there is none yet."""
    path = output / REVIEW
    if not path.is_file():
        return
    seen: set[str] = set()
    try:
        with path.open(newline="", encoding=_ENCODING) as file:
            lines = csv.DictReader(file, strict=True)
            if missing := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
                found = f"no {', '.join(missing)}"
                raise DatasetError(path, 1, f"the columns {', '.join(COLUMNS)}", found, "save it with all columns and commas between them")
            for row in lines:
                if None in row or None in row.values():
                    raise DatasetError(path, lines.line_num, f"{len(lines.fieldnames or ())} cells", "another number", "restore the line")
                if row["id"] in seen:
                    raise DatasetError(path, lines.line_num, "each id once", f"{row['id']} again", "keep one of the lines")
                seen.add(row["id"])
                yield lines.line_num, row["id"], dict(row)
    except UnicodeDecodeError as error:
        raise DatasetError(path, None, "UTF-8 text", str(error), "save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise DatasetError(path, None, "comma-separated values", str(error), "check quotes and line ends") from error


def _write(output: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    columns = dict.fromkeys((*COLUMNS, *(name for row in rows for name in row)))  # a reviewer's own columns stay
    table = csv.DictWriter(text, list(columns), restval="")
    table.writeheader()
    table.writerows(rows)
    _replace(output / REVIEW, text.getvalue().encode(_ENCODING))


def _replace(path: Path, content: bytes) -> None:
    """The whole file or none of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _fault(output: Path, line: int, expected: str, found: str, remedy: str) -> DatasetError:
    return DatasetError(output / REVIEW, line, expected, found, remedy)
