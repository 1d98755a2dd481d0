"""The folder that a bundle is written in: what is kept, what is told, whatever ends the writing and whenever it does."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agvas.checkpoint import CheckpointError
from engines import EngineFailed
from export.work import Key, kept_folder, whole_or_nothing
from runtime.bundle import UNFINISHED

KEY = Key("sources", "--precision fp32")
KEPT = "2 finished stages stay in .*bundle.partial, and the same command goes on with them"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


@pytest.fixture
def older(output: Path) -> Path:
    """A bundle that stands at the output already."""
    output.mkdir()
    (output / "older").write_text("older")
    return output


def export(output: Path, key: Key | None = KEY, fault: BaseException | None = None, notes: list[str] | None = None) -> list[str]:
    """The stages that had to be made."""
    made = []
    with whole_or_nothing(output, key, (notes if notes is not None else []).append) as work:
        for stage in ("a", "b"):
            if not work.has(stage):
                (work.folder / stage).mkdir(exist_ok=True)
                (work.folder / stage / "weights").write_text(stage)
                work.finished(stage)
                made.append(stage)
        if fault is not None:
            raise fault
    return made


def press() -> None:
    """What Python does when Ctrl-C has come."""
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler)
    handler(signal.SIGINT, None)


def press_twice_after(monkeypatch: pytest.MonkeyPatch, renamed: Callable[[Path, Path], bool]) -> None:
    """Ctrl-C, and once more, as soon as a file that `renamed` (old name, new name) tells has another name."""
    original = os.rename

    def renaming(source: Any, target: Any) -> None:
        original(source, target)
        if renamed(Path(source), Path(target)):
            press()
            press()

    monkeypatch.setattr(os, "rename", renaming)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there", ["nothing", "older"])
def test_stages_are_kept_where_the_bundle_cannot_take_its_name(
    there: str, output: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there == "older":
        request.getfixturevalue("older")
    original = os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(source) == kept_folder(output):
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match=f"Input/output error.*; {KEPT}"):
        export(output)
    assert names(output.parent) == [".bundle.partial"] + ["bundle"] * (there == "older")
    assert (kept_folder(output) / UNFINISHED).exists(), "and opens nowhere"
    monkeypatch.undo()
    assert export(output) == [] and names(output) == ["a", "b"]


@pytest.mark.parametrize("key", [KEY, None])
def test_ctrl_c_twice_between_the_renames_gives_the_older_bundle_its_name_back(
    key: Key | None, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_twice_after(monkeypatch, lambda source, target: source == older)
    with pytest.raises(KeyboardInterrupt, match="no bundle was written, an older one is untouched; " + (KEPT if key else "nothing of it")):
        export(older, key)
    assert names(older.parent) == [".bundle.partial"] * bool(key) + ["bundle"] and names(older) == ["older"]
    monkeypatch.undo()
    assert export(older, key) == ([] if key else ["a", "b"])


def test_an_older_bundle_that_cannot_be_removed_is_warned_of_and_the_new_one_is_there(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.unlink

    def failing(path: Any, *, dir_fd: int | None = None) -> None:
        if Path(path).name == "older":
            raise PermissionError(errno.EACCES, "Permission denied")
        original(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", failing)
    with pytest.warns(UserWarning, match=r"bundle was written, but the older bundle could not be removed whole; remove .*\.bundle\.old-"):
        assert export(older, None) == ["a", "b"]
    assert names(older) == ["a", "b"]


def test_ctrl_c_twice_once_the_new_bundle_is_in_place_says_so(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    press_twice_after(monkeypatch, lambda source, target: target == older)
    with pytest.warns(UserWarning, match="remove .*old-"), pytest.raises(KeyboardInterrupt, match="bundle was written all the same"):
        export(older)
    assert names(older) == ["a", "b"]


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"key": 1, "stages": 2}', "{"])
def test_a_record_of_stages_that_is_none_begins_anew(content: str, output: Path) -> None:
    kept_folder(output).mkdir()
    (kept_folder(output) / UNFINISHED).write_text(content)
    assert export(output) == ["a", "b"]


@pytest.mark.parametrize("fault", [CheckpointError("damaged"), EngineFailed("damaged"), RuntimeError("damaged"), MemoryError()])
def test_whatever_ends_an_export_says_what_is_kept(fault: Exception, output: Path) -> None:
    with pytest.raises(type(fault), match=KEPT) as raised:
        export(output, fault=fault)
    assert raised.value is fault and str(fault).startswith("damaged. 2" if fault.args[0].startswith("damaged") else "2")
    assert export(output) == []


def test_an_error_whose_words_are_its_own_lets_a_note_say_what_is_kept(output: Path) -> None:
    notes: list[str] = []
    with pytest.raises(UnicodeDecodeError):
        export(output, fault=UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), notes=notes)
    assert len(notes) == 1 and notes[0].startswith("2 finished stages stay in ")
    assert json.loads((kept_folder(output) / UNFINISHED).read_text())["stages"].keys() == {"a", "b"}
