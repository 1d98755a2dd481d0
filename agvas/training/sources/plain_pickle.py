"""Pickles that hold nothing but containers, texts and numbers, read without running anything.

A pickle runs code only by looking up a class or function and calling it; here every such look-up raises, whatever its name, and so do
persistent ids and extension codes, so the only things that can come into being are those the format has opcodes of its own for. What came
out is checked once more. The referring sets are published as pickles (refs(unc).p) and in no other form.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from agvas.training.sources.errors import DatasetError

_PLAIN = (str, bytes, int, float, bool, type(None))


class _Refused(pickle.UnpicklingError):
    pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _Refused(f"a look-up of {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused("a persistent id")


def read_plain_pickle(path: Path) -> Any:
    """The dicts, lists, tuples, sets, texts and numbers of a pickle; DatasetError where it asks for anything else.

    Texts of Python 2 are taken as UTF-8. The file is trusted to be of reasonable size: it may still fill the memory, as any file may.
    """
    try:
        with path.open("rb") as file:
            value = _PlainUnpickler(file, encoding="utf-8").load()
    except FileNotFoundError as error:
        raise DatasetError(path, None, "a file with referring expressions", "no such file", "restore it from the release") from error
    except _Refused as error:
        remedy = "do not open this file with pickle.load: it would run code; download it from its publisher again"
        raise DatasetError(path, None, "a pickle of lists, dicts, texts and numbers only", str(error), remedy) from error
    except Exception as error:  # a damaged pickle raises nearly anything: EOFError, KeyError, UnicodeDecodeError, MemoryError
        raise DatasetError(path, None, "a pickle", f"{type(error).__name__}: {error}", "download the file again") from error
    _check_plain(value, path)
    return value


def _check_plain(value: Any, path: Path) -> None:
    """Of every value reachable; shared and cyclic containers are visited once."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if type(current) in _PLAIN:
            continue
        if id(current) in seen:
            continue
        seen.add(id(current))
        if type(current) is dict:
            waiting += [*current.keys(), *current.values()]
        elif type(current) in (list, tuple, set, frozenset):
            waiting += current
        else:
            found = type(current).__qualname__
            raise DatasetError(path, None, "a pickle of lists, dicts, texts and numbers only", found, "download the file again")
