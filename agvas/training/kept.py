"""What a run keeps of itself as JSON, and the comparison of its settings with those of the command that would go on with it.

The files are replaced whole, and one that is damaged all the same is named. Which settings may change in a run is the caller's to say.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from agvas.writing import replacing

_ABSENT = object()


def write_kept(path: Path, content: Any) -> None:
    """Raises OSError, naming the file, where it cannot be written; an older one is as it was."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def read_kept(path: Path, remedy: str) -> Any:
    """ValueError, with the remedy, for a file that is no JSON: half of one, or what a power cut left."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a whole JSON file, got {error}; {remedy}") from error


def keep_settings(path: Path, settings: dict[str, Any], may_change: Collection[str] = (), may_grow: Collection[str] = ()) -> list[str]:
    """Write a run's settings beside it, or see that they are the ones it was begun with; the changes, "steps was 2, is 3", in words.

    Args:
        may_change: settings that a run may go on with another value of; the file then has the new one.
        may_grow: numbers that may become larger.

    Raises:
        ValueError: the folder holds another run, says which settings differ; or one of a version that kept others; or the file is damaged.
        OSError: the file cannot be written.
    """
    if not path.exists():
        write_kept(path, settings)
        return []
    remedy = "if this command began the run, remove the file and run it again: the state beside it stays; else choose another folder"
    found = read_kept(path, remedy)
    different = list(differences(found, json.loads(json.dumps(settings, default=str))))
    allowed = [each for each in different if _ABSENT not in each and (each[0] in may_change or (each[0] in may_grow and _grew(*each[1:])))]
    refused = [each for each in different if each not in allowed]
    if known := [each for each in refused if _ABSENT not in each]:
        listed = "; ".join(in_words(*each) for each in known)
        raise ValueError(f"{path} describes another run ({listed}); choose another folder, or remove this one to start again")
    if refused:
        names = ", ".join(name for name, *_ in refused)
        raise ValueError(
            f"{path}: expected the settings that this version of agvas-train keeps, got another version's, without or with {names}: "
            "whether this is the same run cannot be told; go on with that version, or choose another folder to start again"
        )
    if allowed:
        write_kept(path, settings)
    return [in_words(*each) for each in allowed]


def differences(found: Any, wanted: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting that differs, "pool.samples", with what it was and is."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from differences(found.get(key, _ABSENT), wanted.get(key, _ABSENT), f"{name}.{key}" if name else key)
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, pair in enumerate(zip(found, wanted)):
            yield from differences(*pair, f"{name}[{number}]")
    elif found != wanted:
        yield name, found, wanted


def in_words(name: str, before: Any, now: Any) -> str:
    return f"{name} was {before}, is {now}"


def _grew(before: Any, now: Any) -> bool:
    return isinstance(before, (int, float)) and isinstance(now, (int, float)) and now > before
