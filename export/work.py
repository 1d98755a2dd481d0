"""The folder that a bundle is written in until it is whole, and how it then takes its name.

It lies beside the output under another name. As long as it is not whole a file in it says so (UNFINISHED), and the runtime opens no such
folder: an interrupted export leaves nothing that opens. Where the work is long, that file also lists the stages that are whole, and the
same export goes on with them. What is in the folder is bundle.py's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agvas.interruption import held_back
from agvas.writing import FolderInUse, alone_in
from export.progress import counted
from runtime.bundle import MANIFEST, UNFINISHED
from runtime.errors import AgvasError, OutputError


@dataclass(frozen=True)
class Key:
    """What finished stages depend on.

    Attributes:
        sources: a hash of the checkpoint, this code and its tools.
        choices: options in words, as they were given.
    """

    sources: str
    choices: str


class Work:
    """A bundle's folder while it is written, this process's alone, and which of its stages are whole.

    Args:
        note: told where finished stages of other sources, which nothing can use any longer, are removed.

    Raises:
        OutputError: it holds finished stages of the same sources and other choices, with which these would go on.
    """

    def __init__(self, folder: Path, key: Key | None, note: Callable[[str], object] = lambda line: None) -> None:
        self.folder, self.key = folder, key
        self.stages: dict[str, dict[str, int]] = {}
        known, stages = _left(folder)
        if key is not None and known == asdict(key):
            self.stages = stages
        else:
            if key is not None and isinstance(known, dict) and stages:
                count = counted(len(stages), "finished stage")
                if known.get("sources") == key.sources:
                    raise OutputError(
                        f"{folder}: expected the beginnings of this export ({key.choices}), got {count} of another "
                        f"({known.get('choices')}); give its options again to go on with it, or remove the folder"
                    )
                note(f"begins anew: what {folder} held ({count}) was of another checkpoint, or of other code or versions")
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / MANIFEST).unlink(missing_ok=True)
        self._write()

    def kept(self) -> str:
        """In words, what the same export goes on with."""
        if not self.stages:
            return "no stage was finished"
        stay = "stays" if len(self.stages) == 1 else "stay"
        return f"{counted(len(self.stages), 'finished stage')} {stay} in {self.folder}, and the same command goes on with them"

    def has(self, stage: str) -> bool:
        """Whether an earlier export left the stage whole."""
        files = self.stages.get(stage)
        return files is not None and files == self._files(stage)

    def finished(self, stage: str) -> None:
        self.stages[stage] = self._files(stage)
        self._write()

    def _files(self, stage: str) -> dict[str, int]:
        folder = self.folder / stage
        return {path.name: path.stat().st_size for path in sorted(folder.iterdir())} if folder.is_dir() else {}

    def _write(self) -> None:
        partial = self.folder / f"{UNFINISHED}.partial"
        partial.write_text(json.dumps({"key": None if self.key is None else asdict(self.key), "stages": self.stages}))
        os.replace(partial, self.folder / UNFINISHED)


def _left(folder: Path) -> tuple[Any, dict[str, dict[str, int]]]:
    """Key and finished stages of what an export left in a folder, as Work writes them; None and none of what is no such folder."""
    try:
        found = json.loads((folder / UNFINISHED).read_text())
        return found["key"], dict(found["stages"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


def kept_folder(output: Path) -> Path:
    """Where an export that can be resumed works."""
    return output.parent / f".{output.name}.partial"


def left_over(output: Path) -> str:
    """In words, what an export that could be resumed left beside the output, told to one that does not go on with it; "" for nothing."""
    folder = kept_folder(output)
    if not folder.is_dir():
        return ""
    _, stages = _left(folder)
    held = f"{counted(len(stages), 'finished stage')}, which --resume and the same options go on with" if stages else "no finished stage"
    return f"this export begins anew; an earlier one left {folder} ({held}), which can be removed if no export is at work in it"


def _replace(work: Work, output: Path) -> None:
    """Give the new bundle its name; an older one there goes only after that has worked.

    Raises:
        OSError: it could not take it: its folder says again that it is not whole, with the stages that are, and an older one is as it was.
        KeyboardInterrupt: likewise; with words, where the bundle is there all the same.
    """
    try:
        with held_back("the bundle has taken its place"):
            (work.folder / UNFINISHED).unlink()
            _rename(work.folder, output)
    except (OSError, KeyboardInterrupt) as error:
        if work.folder.exists():
            work._write()
        elif isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{output} was written all the same") from None
        raise


def _rename(partial: Path, output: Path) -> None:
    """Whatever ends it, an interruption too, either the new bundle or an older one has the name. What cannot be removed of an older one
    is warned of: the new one is in its place."""
    if not output.exists():
        os.rename(partial, output)
        return
    older = output.parent / f".{output.name}.old-{uuid.uuid4().hex[:8]}"
    try:
        os.rename(output, older)
        os.rename(partial, output)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        if older.exists() and not output.exists():
            os.rename(older, output)
        elif older.exists():
            warnings.warn(f"{output} was written, but the older bundle could not be removed whole; remove {older}", stacklevel=2)


@contextlib.contextmanager
def whole_or_nothing(output: Path, key: Key | None, note: Callable[[str], object] = lambda line: None) -> Iterator[Work]:
    """A folder beside `output` that takes its name when the block ends well, and vanishes otherwise.

    With a key, whatever ends the block otherwise leaves what is finished, and says so; the next export with that key goes on with it.

    Args:
        note: as Work; also told what is kept where the error has no message that could say it.

    Raises:
        OutputError: as Work; another export is at work in the folder; the disk is full, or cannot be written to.
        KeyboardInterrupt: with words on what became of it.
    """
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}" if key is None else kept_folder(output)
    vanishes, work = key is None, None
    try:
        with alone_in(partial, "export"):
            work = Work(partial, key, note)
            yield work
            _replace(work, output)
            vanishes = False  # under its name; of this one there may be another export's by now
    except FolderInUse as error:
        raise OutputError(str(error)) from error
    except KeyboardInterrupt as interruption:
        if interruption.args:  # written all the same
            vanishes = False
            raise
        kept = work.kept() if key is not None and work is not None else "nothing of it was kept (--resume keeps finished stages)"
        raise KeyboardInterrupt(f"no bundle was written, an older one is untouched; {kept}") from None
    except Exception as error:
        kept = work.kept() if key is not None and work is not None else ""
        if isinstance(error, OSError) and not isinstance(error, AgvasError):
            stopped = f"{output}: export stopped by {error}; check the path, or choose another --output"
            if error.errno == errno.ENOSPC:
                stopped = f"the disk of {output} is full; free some space or choose another --output"
            raise OutputError("; ".join(filter(None, (stopped, kept)))) from error
        if kept:
            error.args = (". ".join(filter(None, (str(error), kept))), *error.args[1:])
            if kept not in str(error):  # of one that makes its words of something else than its arguments
                note(kept)
        raise
    finally:
        if vanishes:
            shutil.rmtree(partial, ignore_errors=True)
