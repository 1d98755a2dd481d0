"""Pictures as they come into folders: what a camera or a transfer leaves there, each once it is whole.

Folders are looked through again and again, which works on network shares too, where the system's own notices do not. A file counts as
whole when it has not changed for a while; one that changes after it was taken (a slow transfer that paused, `latest.jpg`) is taken again.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime.errors import ImageError
from runtime.picture_files import Found, files_in, pictures_among

EVERY = 0.1  # seconds between two looks
SETTLED = 0.5

_State = tuple[int, int, int]


class Watch:
    """Pictures of folders, forever: those that are there, then those that come, in the order of their times.

    Args:
        folders: none needs to hold pictures yet.
        recursive: look into subfolders, too.
        settled: seconds for which a file must not have changed.
        say: told in words when a folder cannot be read any longer, and when it can be again.
        sleep: waits for some seconds; for tests.
    """

    def __init__(
        self,
        folders: Sequence[str],
        *,
        recursive: bool = False,
        settled: float = SETTLED,
        say: Callable[[str], object] = lambda line: print(line, file=sys.stderr),
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._folders, self._recursive, self._settled, self._say, self._sleep = folders, recursive, settled, say, sleep
        self._taken: dict[str, _State] = {}
        self._waiting: dict[str, tuple[_State, float]] = {}
        self._lost: set[str] = set()
        self._found: dict[str, tuple[list[str], list[str], Found]] = {}

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        """(folder of those watched, picture)."""
        while True:
            begun = time.monotonic()
            if not (whole := self.look()):
                self._sleep(max(EVERY, time.monotonic() - begun))  # in folders of many thousands, half of a core is enough
            for state, path, folder in whole:
                self._taken[path] = state  # of before it is read: what changes meanwhile is taken again
                yield folder, Path(path)

    def look(self) -> list[tuple[_State, str, str]]:
        """(state, picture, folder) of those that are whole and not taken yet, oldest first."""
        now, found, unseen = time.monotonic(), dict[str, tuple[_State, str]](), set[Path]()
        for folder in self._folders:
            for path, state in self._states(folder, unseen):
                found.setdefault(path, (state, folder))
        # What is gone is forgotten, else a line's months would not fit into memory; not what merely cannot be seen now.
        self._taken = {path: state for path, state in self._taken.items() if path in found or not unseen.isdisjoint(Path(path).parents)}
        waiting, whole = dict[str, tuple[_State, float]](), []
        for path, (state, folder) in found.items():
            if self._taken.get(path) == state:
                continue
            before, since = self._waiting.get(path, (None, now))
            waiting[path] = state, since if before == state else now
            if now - waiting[path][1] >= self._settled:
                whole.append((state, path, folder))
        self._waiting = waiting
        return sorted(whole)

    def _states(self, folder: str, unseen: set[Path]) -> Iterator[tuple[str, _State]]:
        try:
            files, errors = files_in(folder, recursive=self._recursive)
        except ImageError as error:
            if folder not in self._lost:
                self._say(f"{error}; waiting for it")
            self._lost.add(folder)
            unseen.add(Path(folder))
            return
        if folder in self._lost:
            self._say(f"{folder}: can be read again")
            self._lost.remove(folder)
        found = self._pictures_of(folder, files, errors)
        unseen.update(path for path, _ in found.left_out)
        for path in map(str, found.pictures):
            try:
                told = os.stat(path)
            except OSError:  # moved away since
                continue
            if told.st_size and stat.S_ISREG(told.st_mode):  # an empty one is only begun
                yield path, (told.st_mtime_ns, told.st_size, told.st_ino)

    def _pictures_of(self, folder: str, files: list[str], errors: list[OSError]) -> Found:
        """Told apart from masks and other files once for as long as the names stay, which takes most of a look's time."""
        reasons = [str(error) for error in errors]
        before = self._found.get(folder)
        if before is None or before[:2] != (files, reasons):
            before = self._found[folder] = files, reasons, pictures_among(folder, files, errors)
        return before[2]
