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
from collections.abc import Iterator
from pathlib import Path

from agvas.interruption import held_back
from agvas.writing import FolderInUse, alone_in
from runtime.bundle import MANIFEST, UNFINISHED
from runtime.errors import AgvasError, OutputError


class Work:
    """A bundle's folder while it is written, this process's alone, and which of its stages are whole."""

    def __init__(self, folder: Path, key: str | None) -> None:
        self.folder, self.key = folder, key
        self.stages: dict[str, dict[str, int]] = {}
        try:
            found = json.loads((folder / UNFINISHED).read_text())
        except (OSError, ValueError):
            found = {}
        if key is not None and found.get("key") == key:
            self.stages = found["stages"]
        else:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / MANIFEST).unlink(missing_ok=True)
        self._write()

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
        partial.write_text(json.dumps({"key": self.key, "stages": self.stages}))
        os.replace(partial, self.folder / UNFINISHED)


def kept_folder(output: Path) -> Path:
    """Where an export that can be resumed works."""
    return output.parent / f".{output.name}.partial"


def _replace(partial: Path, output: Path) -> None:
    """Give the new bundle its name; an older one there goes only after that has worked.

    Raises:
        KeyboardInterrupt: with words, where one came meanwhile: the bundle is there all the same.
    """
    try:
        with held_back("the bundle has taken its place"):
            _rename(partial, output)
    except KeyboardInterrupt:
        if partial.exists():
            raise
        raise KeyboardInterrupt(f"{output} was written all the same") from None


def _rename(partial: Path, output: Path) -> None:
    if not output.exists():
        os.rename(partial, output)
        return
    old = output.parent / f".{output.name}.old-{uuid.uuid4().hex[:8]}"
    os.rename(output, old)
    try:
        os.rename(partial, output)
    except OSError:
        os.rename(old, output)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def whole_or_nothing(output: Path, key: str | None) -> Iterator[Work]:
    """A folder beside `output` that takes its name when the block ends well, and vanishes otherwise.

    With a key, an interruption leaves it, and the next export with the same key begins with it.
    """
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}" if key is None else kept_folder(output)
    keep = False
    try:
        with alone_in(partial, "export"):
            yield Work(partial, key)
            (partial / UNFINISHED).unlink()
            _replace(partial, output)
            keep = True  # under its name; of this one there may be another export's by now
    except FolderInUse as error:
        keep = True
        raise OutputError(str(error)) from error
    except AgvasError:
        raise
    except KeyboardInterrupt as interruption:
        keep = key is not None or bool(interruption.args)
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"the disk of {output} is full; free some space or choose another --output") from error
        raise OutputError(f"{output}: export stopped by {error}; check the path, or choose another --output") from error
    finally:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
