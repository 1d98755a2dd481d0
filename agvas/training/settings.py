"""Settings dataclasses from JSON: what is left out keeps its default, what is unknown or of another type is named."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from agvas.training.sources.errors import DatasetError

T = TypeVar("T")


def read_settings(path: Path, defaults: T) -> T:
    """`defaults` with what the JSON file says put in.

    Raises:
        ValueError: a file that is none (DatasetError), a name that is not a setting, a value of another type; says where.
    """
    content = read_own_json(path, "settings")
    try:
        return changed(defaults, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_own_json(path: Path, holding: str) -> Any:
    """The content of a JSON file that the user wrote; DatasetError, with the line where there is one, for a file that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        remedy = "correct it there: names and texts in double quotes, a comma between two entries and none after the last"
        raise DatasetError(path, error.lineno, f"JSON with {holding}", f"{error.msg} (column {error.colno})", remedy) from error
    except UnicodeDecodeError as error:
        raise DatasetError(path, None, f"JSON with {holding}", str(error), "save the file as UTF-8") from error
    except OSError as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        remedy = "correct the path, or write the file as agvas/training/README.md shows"
        raise DatasetError(path, None, f"a JSON file with {holding}", found, remedy) from error


def without_quotes(value: Any, kind: type) -> str:
    """A hint to add to an error: that a text would be what is wanted if it were no text. Empty where it would not."""
    try:
        meant = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return ""
    if isinstance(meant, float) and not math.isfinite(meant):
        return ""  # Python reads NaN and Infinity as JSON
    fits = isinstance(meant, (int, float) if kind is float else kind) and isinstance(meant, bool) == (kind is bool)
    return f"; write {value.strip()} without quotes" if fits else ""


def meant(name: str, allowed: Iterable[str]) -> str:
    """A hint to add to an error: the name that comes near. Empty where none does."""
    near = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def changed(defaults: T, values: Any, where: str = "") -> T:
    """A frozen dataclass with some fields replaced, nested objects likewise."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'settings'}: expected an object, got {json.dumps(values)[:60]}")
    hints = typing.get_type_hints(type(defaults))
    new = {}
    for name, value in values.items():
        place = f"{where}.{name}" if where else name
        if name not in hints:
            raise ValueError(f"{place}: not a setting; expected one of {', '.join(hints)}{meant(name, hints)}")
        new[name] = _value(hints[name], getattr(defaults, name), value, place)
    return dataclasses.replace(defaults, **new)  # type: ignore[type-var]


def _value(hint: Any, default: Any, value: Any, place: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    origin = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(kind):
        return changed(default if default is not None else kind(), value, place)  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        inner = typing.get_args(kind)
        if inner[1:] != (Ellipsis,) and len(inner) != len(value):
            raise ValueError(f"{place}: expected {len(inner)} values, got {len(value)}")
        return tuple(_value(inner[0], None, item, f"{place}[{number}]") for number, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and kind is not bool):
        got = f"{json.dumps(value)[:60]}{without_quotes(value, origin)}"
        raise ValueError(f"{place}: expected {getattr(origin, '__name__', origin)}, got {got}")
    return value
