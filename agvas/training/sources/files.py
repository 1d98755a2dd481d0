"""Files of a data set: JSON, text and folder listings, with one way of saying what is missing or malformed.

A listing is read once for each folder, not once for each picture: published sets hold 100,000 pictures, often on a network drive.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from agvas.training.sources.errors import DatasetError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")

_JSON_NAMES = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", bool: "true or false"}


class Listing:
    """Says whether files exist, from one reading of each folder."""

    def __init__(self) -> None:
        self._folders: dict[str, frozenset[str]] = {}

    def holds(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            try:
                self._folders[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._folders[folder] = frozenset()
        return name in self._folders[folder]

    def need(self, path: Path, listed_in: Path, place: str) -> Path:
        """`path`, or DatasetError naming it and the record that lists it."""
        if not self.holds(path):
            raise DatasetError(listed_in, None, f"the file of {place}", f"no file {path}", "restore it, or give the right folder")
        return path


def need_folder(folder: Path, holding: str) -> Path:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise DatasetError(folder, None, f"a folder with {holding}", found, "give the folder as the data set's release unpacks it")
    return folder


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder, sorted by name; hidden files are left out."""
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
    return [folder / name for name in names]


def subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_text(path: Path, holding: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(path, None, "UTF-8 text", str(error), "save the file as UTF-8") from error
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DatasetError(path, None, f"a file with {holding}", found, "restore it as the data set's release has it") from error


def read_json(path: Path, holding: str) -> Any:
    try:
        return json.loads(read_text(path, holding))
    except json.JSONDecodeError as error:
        remedy = "download the file again: it is cut short or edited"
        raise DatasetError(path, error.lineno, f"JSON with {holding}", error.msg, remedy) from error


def take(entry: Any, key: str, kind: type, file: Path, place: str, line: int | None = None) -> Any:
    """entry[key] of the wanted JSON type. `place` says in words which entry it is ("annotation 12")."""
    if not isinstance(entry, dict):
        raise DatasetError(file, line, f"an object as {place}", f"{entry!r:.60}", "compare the file with the data set's release")
    if key not in entry:
        keys = ", ".join(map(str, list(entry)[:8])) or "nothing"
        raise DatasetError(file, line, f"{key!r} in {place}", keys, "compare the file with the data set's release")
    value = entry[key]
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        expected = f"{_JSON_NAMES[kind]} as {key!r} of {place}"
        raise DatasetError(file, line, expected, f"{value!r:.60}", "compare the file with the data set's release")
    return value
