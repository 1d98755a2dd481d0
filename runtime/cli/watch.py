"""Pictures as they come into folders: what a camera or a transfer leaves there, each once it is whole.

Folders are looked through again and again, which works on network shares too, where the system's own notices do not. A file counts as
whole when it has not changed for a while; one that changes after it was taken (a slow transfer that paused, `latest.jpg`) is taken again.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.errors import ImageError
from runtime.picture_files import Found, by_name, files_in

EVERY = 0.1  # seconds between two looks
SETTLED = 0.5
EMPTY_FOR = 10  # times as long, and as many seconds at least, until a file without content is taken for a picture that failed


class _State(NamedTuple):
    """What is told of a file without opening it."""

    written: int  # ns
    size: int  # bytes; 0 of what is no file
    readable: bool
    inode: int
    changed: int  # ns; of owner, links and all else

    def same(self, other: _State) -> bool:
        """Backups and chmod change a file's time of change alone, and some shares give another inode with each look; a file that took
        another's name has both."""
        return self[:3] == other[:3] and (self.inode == other.inode or self.changed == other.changed)


class Watch:
    """Pictures of folders, forever: those that are there, then those that come, in the order of their times.

    Args:
        folders: none needs to hold pictures yet.
        recursive: look into subfolders, too.
        settled: seconds for which a file must not have changed.
        say: told in words, once, what cannot be read any longer, or can be again, and what is left out.
        sleep: waits for some seconds; for tests.

    Attributes:
        waiting: pictures seen at the last look that have not been given yet; more may have come since.
    """

    _given: str | None = None  # the picture that whoever iterates is at

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
        self._told: set[tuple[str, str]] = set()
        self._found: dict[str, tuple[list[str], list[str], Found]] = {}
        self.waiting = 0

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        """(folder of those watched, picture)."""
        while True:
            begun = time.monotonic()
            if not (whole := self.look()):
                self._sleep(max(EVERY, time.monotonic() - begun))  # in folders of many thousands, half of a core is enough
            for state, path, folder in whole:
                self._taken[path] = state  # of before it is read: what changes meanwhile is taken again
                self._given = path
                yield folder, Path(path)
                self._given = None
                self.waiting -= 1
                if not os.path.exists(os.path.dirname(path) or "."):
                    self._taken.pop(path, None)  # it may not have been read: it is judged when its folder is there again

    def left(self) -> int:
        """How many pictures lie there at the end that were not judged: one more look, and the one that was being judged."""
        self.look()
        return self.waiting + (self._given is not None and self._given not in self._waiting)

    def look(self) -> list[tuple[_State, str, str]]:
        """(state, picture, folder) of those that are whole and not taken yet, oldest first."""
        now, found, unseen = time.monotonic(), dict[str, tuple[_State, str]](), set[Path]()
        for folder in self._folders:
            for path, state in self._states(folder, unseen):
                found.setdefault(path, (state, folder))
        # What is gone is forgotten, else a line's months would not fit into memory; not what merely cannot be seen now.
        self._taken = {path: state for path, state in self._taken.items() if path in found or _within(path, unseen)}
        waiting, whole = dict[str, tuple[_State, float]](), []
        for path, (state, folder) in found.items():
            if (taken := self._taken.get(path)) is not None and taken.same(state):
                continue
            before, since = self._waiting.get(path, (None, now))
            waiting[path] = state, since if before is not None and before.same(state) else now
            if now - waiting[path][1] >= (self._settled if state.size else max(EMPTY_FOR * self._settled, EMPTY_FOR)):
                whole.append((state, path, folder))
        self._waiting, self.waiting = waiting, len(waiting)
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
        unseen.update(Path(error.filename) for error in errors)
        for path in map(str, found.pictures):
            try:
                told = _status(path)
            except OSError as error:
                if error.errno != errno.ENOENT:  # not moved away since
                    self._tell(path, f"expected a file that can be looked at, got {error}; waiting for it")
                    unseen.add(Path(path))
                continue
            if not stat.S_ISDIR(told.st_mode):  # folders may be called as pictures are
                size = told.st_size if stat.S_ISREG(told.st_mode) else 0
                yield path, _State(told.st_mtime_ns, size, os.access(path, os.R_OK), told.st_ino, told.st_ctime_ns)

    def _pictures_of(self, folder: str, files: list[str], errors: list[OSError]) -> Found:
        """Told apart from masks and other files once for as long as the names stay, which takes most of a look's time."""
        reasons = [str(error) for error in errors]
        before = self._found.get(folder)
        if before is None or before[:2] != (files, reasons):
            found = by_name(files, errors)
            before = self._found[folder] = files, reasons, found
            for path, reason in found.left_out:
                self._tell(folder, f"left out {path if os.path.isdir(path) else path.suffix.lower()}: {reason}")
            if found.beside:
                self._tell(folder, "left out what lies beside the pictures it is of, called _mask, _overlay or _map: masks or results")
        return before[2]

    def _tell(self, name: str, words: str) -> None:
        """Once: a line's log does not fill."""
        if (name, words) not in self._told:
            self._told.add((name, words))
            self._say(f"{name}: {words} (told once)")


def _status(path: str) -> os.stat_result:
    """Of the file, or of a link that leads nowhere."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return os.lstat(path)
        raise


def _within(path: str, places: set[Path]) -> bool:
    """Whether a file is one of these or lies in one."""
    return bool(places) and not places.isdisjoint((Path(path), *Path(path).parents))
