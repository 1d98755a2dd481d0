"""What a data set that cannot be read says, the same way in every reader of training and evaluation."""

from __future__ import annotations

from pathlib import Path


class DatasetError(ValueError):
    """A data set that cannot be read: which file and line, what was expected, what was found, and what to do."""

    def __init__(self, file: Path, line: int | None, expected: str, found: str, remedy: str) -> None:
        place = f"{file}, line {line}" if line is not None else str(file)
        super().__init__(f"{place}: expected {expected}, found {found}; {remedy}")
        self.file, self.line, self.expected, self.found, self.remedy = file, line, expected, found, remedy
