"""What all the package's command lines share, whatever they do: unknown options with the nearest name, and warnings as lines."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

_UNKNOWN = "unrecognized arguments: "  # argparse's words; where they are translated, its message stays as it is
_CHOICES = re.compile(r"invalid choice: '?(.+?)'? \(choose from (.+)\)$")
_ALIKE = 0.75  # of difflib's 0..1: --treshold is --threshold, --verbose is no --version


class Parser(argparse.ArgumentParser):
    """argparse's, but that an unknown option is told in one line, and that and an unknown choice with the nearest one that there is."""

    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"(?<!\S)--[^\s=]+", message) if message.startswith(_UNKNOWN) else []
        if not unknown:
            if found := _CHOICES.search(message):
                nearest = difflib.get_close_matches(found[1], found[2].replace("'", "").split(", "), 1)
                message += f"; did you mean {nearest[0]}?" if nearest else ""
            super().error(message)
        told = []
        for option in unknown:
            nearest = difflib.get_close_matches(option, self._option_string_actions, 1, _ALIKE)
            told.append(f"{option}; did you mean {nearest[0]}?" if nearest else f"{option};")
        self.exit(2, f"{self.prog}: unknown option {' '.join(told)} {self.prog} --help lists them all\n")


@contextmanager
def warnings_as_lines(say: Callable[[str], None]) -> Iterator[None]:
    """Python's warnings in the words of a command, without the path and the line of source that Python shows.

    Args:
        say: is given "warning: …".
    """
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        yield


def on_stderr(command: str) -> Callable[[str], None]:
    """Prints a line as a command's own."""
    return lambda line: print(f"{command}: {line}", file=sys.stderr)
