"""agvas-segment --watch: pictures that come into folders, each once, when it is whole, under a name of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from runtime.cli import output, segment, watch
from runtime.cli.watch import Watch
from runtime.picture_files import Found, by_name

ROOT = Path(__file__).parents[1]
AMPLE = 120.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Seconds that pass when the test says so."""
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def looked(watching: Watch) -> list[str]:
    """Names of what is whole now, which then is taken."""
    whole = watching.look()
    for state, path, _ in whole:
        watching._taken[path] = state
    return [Path(path).name for _, path, _ in whole]


def put(path: Path, content: bytes = b"a picture", at: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (1_700_000_000 + at, 1_700_000_000 + at))
    return path


def test_a_file_is_taken_once_when_it_has_not_changed_for_a_while(tmp_path: Path, clock: Callable[[float], None]) -> None:
    watching = Watch([str(tmp_path)], settled=0.5)
    assert looked(watching) == []
    put(tmp_path / "a.png", b"half", at=0)
    put(tmp_path / "begun.png", b"", at=0)
    put(tmp_path / ".hidden.png", at=0)
    put(tmp_path / "notes.txt", at=0)
    assert looked(watching) == []
    clock(0.4)
    put(tmp_path / "a.png", b"half a picture", at=1)  # still being written
    assert looked(watching) == []
    clock(0.4)
    assert looked(watching) == []
    clock(0.2)
    assert looked(watching) == ["a.png"]
    clock(5)
    assert looked(watching) == []


def test_what_changes_after_it_was_taken_is_taken_again(tmp_path: Path, clock: Callable[[float], None]) -> None:
    watching = Watch([str(tmp_path)], settled=0)
    put(tmp_path / "latest.jpg", at=0)
    assert looked(watching) == ["latest.jpg"]
    put(tmp_path / "latest.jpg", at=1)
    assert looked(watching) == ["latest.jpg"]
    assert looked(watching) == []
    (tmp_path / "latest.jpg").unlink()
    assert looked(watching) == [] and not watching._taken, "what is gone is forgotten"
    put(tmp_path / "latest.jpg", at=1)
    assert looked(watching) == ["latest.jpg"]


def test_what_changes_while_it_is_judged_is_taken_again(tmp_path: Path) -> None:
    put(tmp_path / "latest.jpg", at=0)

    def stop(_: float) -> None:
        raise StopIteration

    given = iter(Watch([str(tmp_path)], settled=0, sleep=stop))
    assert next(given) == (str(tmp_path), tmp_path / "latest.jpg")
    put(tmp_path / "latest.jpg", at=1)
    assert next(given) == (str(tmp_path), tmp_path / "latest.jpg")
    with pytest.raises(RuntimeError):  # a generator's StopIteration: it waits
        next(given)


def test_names_are_told_apart_once_and_anew_when_one_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told_apart, said = list[int](), list[str]()

    def tell_apart(files: list[str], errors: list[OSError]) -> Found:
        told_apart.append(len(files))
        return by_name(files, errors)

    monkeypatch.setattr(watch, "by_name", tell_apart)
    watching = Watch([str(tmp_path)], settled=0, say=said.append)
    put(tmp_path / "a.png")
    assert looked(watching) == ["a.png"]
    put(tmp_path / "a.png", b"another", at=1)
    assert looked(watching) == ["a.png"] and told_apart == [1]
    put(tmp_path / "b.png")
    put(tmp_path / "b_mask.png")
    assert looked(watching) == ["b.png"] and told_apart == [1, 3]
    put(tmp_path / "c_map.png")
    put(tmp_path / "c.png")
    assert looked(watching) == ["c.png"]
    assert len(said) == 1 and "left out what lies beside" in said[0], "once, or a line's log fills"


def test_kinds_that_are_not_read_are_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    watching = Watch([str(tmp_path)], settled=0, say=said.append)
    for number in range(3):
        put(tmp_path / f"{number}.gif")
        assert looked(watching) == []
    assert len(said) == 1 and "left out .gif" in said[0]


@pytest.mark.parametrize("kind", ["empty", "link", "loop", "pipe"])
def test_what_never_gets_content_is_a_picture_that_failed(kind: str, tmp_path: Path, clock: Callable[[float], None]) -> None:
    watching = Watch([str(tmp_path)], settled=0.5)
    if kind == "link":
        (tmp_path / "a.png").symlink_to(tmp_path / "nowhere.png")
    elif kind == "loop":
        (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    elif kind == "pipe":
        os.mkfifo(tmp_path / "a.png")
    else:
        put(tmp_path / "a.png", b"")
    assert looked(watching) == []
    clock(9)
    assert looked(watching) == [], "a sender may have begun"
    clock(1)
    assert looked(watching) == ["a.png"]
    clock(100)
    assert looked(watching) == []
    if kind == "empty":
        put(tmp_path / "a.png", b"a picture", at=1)
        looked(watching)
        clock(0.5)
        assert looked(watching) == ["a.png"]


def test_what_cannot_be_looked_at_for_a_while_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    watching = Watch([str(tmp_path)], settled=0, say=said.append)
    put(tmp_path / "a.png")
    assert looked(watching) == ["a.png"]

    def stale(path: str) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle", path)

    with monkeypatch.context() as patched:
        patched.setattr(watch, "_status", stale)
        put(tmp_path / "b.png")
        assert looked(watching) == looked(watching) == []
    assert looked(watching) == ["b.png"]
    assert [line.count("a.png") and "waiting for it (told once)" in line for line in said if "a.png" in line] == [True]


def test_a_subfolder_that_cannot_be_opened_for_a_while_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watch([str(tmp_path)], recursive=True, settled=0, say=lambda line: None)
    put(tmp_path / "deep" / "a.png", at=0)
    put(tmp_path / "b.png", at=1)
    assert looked(watching) == ["a.png", "b.png"]
    real = os.scandir

    def closed(name: str) -> Any:
        if Path(name).name == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(name)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", closed)
        assert looked(watching) == []
    assert looked(watching) == []


def test_a_picture_that_met_a_lost_folder_is_taken_when_the_folder_is_back(tmp_path: Path) -> None:
    rests: list[float] = []

    def back(_: float) -> None:
        rests.append(_)
        if len(rests) == 3:
            (tmp_path / "away").rename(tmp_path / "in")
        assert len(rests) < 100

    put(tmp_path / "in" / "a.png", at=0)
    put(tmp_path / "in" / "b.png", at=1)
    watching = Watch([str(tmp_path / "in")], settled=0, say=lambda line: None, sleep=back)
    given = iter(watching)
    assert next(given)[1].name == "a.png" and watching.waiting == 2
    assert next(given)[1].name == "b.png" and watching.waiting == 1
    (tmp_path / "in").rename(tmp_path / "away")  # before b could be read
    assert next(given)[1].name == "b.png" and len(rests) == 3


def test_a_picture_that_may_be_read_now_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no permission stops."""
    watching = Watch([str(tmp_path)], settled=0)
    put(tmp_path / "a.png")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        assert looked(watching) == ["a.png"]
        assert looked(watching) == []
    assert looked(watching) == ["a.png"]


def test_what_took_the_name_with_size_and_time_is_another_picture(tmp_path: Path) -> None:
    watching = Watch([str(tmp_path)], settled=0)
    put(tmp_path / "latest.bmp", b"one")
    assert looked(watching) == ["latest.bmp"]
    time.sleep(0.05)  # the system's own times are coarse
    put(tmp_path / ".part", b"two").rename(tmp_path / "latest.bmp")
    assert looked(watching) == ["latest.bmp"]


def test_what_a_backup_changes_is_no_other_picture(tmp_path: Path) -> None:
    watching = Watch([str(tmp_path)], settled=0)
    picture = put(tmp_path / "a.png")
    assert looked(watching) == ["a.png"]
    picture.chmod(0o600)
    os.link(picture, tmp_path / "kept")
    assert looked(watching) == []


@pytest.mark.parametrize("folder", [".", "./", "in", "in/", "./in", ".."])
def test_however_a_folder_is_named_each_picture_is_taken_once(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "here" / "in" if "in" in folder else tmp_path / "here"
    (tmp_path / "here" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "in" if folder == ".." else tmp_path / "here")
    put(place / "a.png")
    put(place / "sub" / "b.png", at=1)
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 3:
            raise InterruptedError

    taken = list[str]()
    with pytest.raises(InterruptedError):
        for _, path in Watch([folder], recursive=True, settled=0, sleep=rest):
            taken.append(path.name)
            assert len(taken) < 5
    assert taken == ["a.png", "b.png"]


@pytest.mark.parametrize("failing", [OSError(errno.ENOLCK, "No locks available"), PermissionError(errno.EACCES, "Permission denied")])
def test_where_no_lock_can_be_had_that_is_told(failing: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def locked(*_: Any) -> Iterator[None]:
        raise failing
        yield

    monkeypatch.setattr(output, "locked", locked)
    with pytest.warns(UserWarning, match="another --watch that writes there would not be noticed"), output.alone_in(str(tmp_path)):
        pass
    with pytest.warns(UserWarning, match="not be noticed"), pytest.raises(OSError, match="another"), output.alone_in(str(tmp_path)):
        raise OSError("another")


def test_a_long_look_is_followed_by_as_long_a_rest(clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    watching = Watch([], sleep=rests.append)

    def look() -> list[Any]:
        if len(rests) == 2:
            raise InterruptedError
        clock(3.0 if rests else 0.01)
        return []

    monkeypatch.setattr(watching, "look", look)
    with pytest.raises(InterruptedError):
        next(iter(watching))
    assert rests == [watch.EVERY, pytest.approx(3.0)]


def test_they_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    for at, name in ((3, "a.png"), (1, "c.png"), (2, "b.png")):
        put(tmp_path / name, at=at)
    assert looked(Watch([str(tmp_path)], settled=0)) == ["c.png", "b.png", "a.png"]


def test_a_folder_that_goes_and_comes_back_is_waited_for(tmp_path: Path, clock: Callable[[float], None]) -> None:
    said: list[str] = []
    watching = Watch([str(tmp_path / "in")], settled=0, say=said.append)
    put(tmp_path / "in" / "a.png")
    assert looked(watching) == ["a.png"]
    (tmp_path / "in").rename(tmp_path / "away")
    assert looked(watching) == looked(watching) == []
    assert len(said) == 1 and "waiting for it" in said[0]
    (tmp_path / "away").rename(tmp_path / "in")
    put(tmp_path / "in" / "b.png")
    assert looked(watching) == ["b.png"], "and what was taken before is not taken again"
    assert len(said) == 2 and "can be read again" in said[1]


def test_subfolders_are_looked_into_where_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "monday" / "a.png")
    assert looked(Watch([str(tmp_path)], settled=0)) == []
    assert looked(Watch([str(tmp_path)], settled=0, recursive=True)) == ["a.png"]


# The command


class Running:
    """agvas-segment --watch as a service runs it."""

    def __init__(self, bundle: Path, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "runtime.cli.segment", *map(str, arguments), "--bundle", str(bundle), "--engine", "onnxruntime"]
        command += ["--watch", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def record(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr and self.process.stderr.read()
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=AMPLE)
        return self.process.returncode, out, errors


@pytest.fixture
def running(tiny_bundle: Path) -> Iterator[Callable[..., Running]]:
    begun: list[Running] = []

    def begin(*arguments: str | Path) -> Running:
        begun.append(Running(tiny_bundle, *arguments))
        return begun[-1]

    yield begin
    for one in begun:
        one.process.kill()
        one.process.wait()


def save_whole(path: Path, seed: int) -> None:
    """As a careful sender does: under another name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    Image.fromarray(picture(seed)).save(temporary, path.suffix[1:])
    os.replace(temporary, path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_goes_on_until_it_is_stopped(number: signal.Signals, tmp_path: Path, running: Callable[..., Running]) -> None:
    (tmp_path / "in").mkdir()
    save_whole(tmp_path / "in" / "there.png", 0)
    one = running(tmp_path / "in", "--recursive", "--output", tmp_path / "out", "--settle", "0.2")
    first = one.record()
    assert first["image"] == str(tmp_path / "in" / "there.png") and first["mask"] == str(tmp_path / "out" / "there.png_mask.png")
    save_whole(tmp_path / "in" / "monday" / "there.png", 1)
    second = one.record()
    assert second["mask"] == str(tmp_path / "out" / "monday" / "there.png_mask.png")
    (tmp_path / "in" / "half.png").write_bytes((tmp_path / "in" / "there.png").read_bytes()[:200])
    assert "error" in one.record()
    save_whole(tmp_path / "in" / "half.png", 2)
    again = one.record()
    assert again["image"] == str(tmp_path / "in" / "half.png") and np.asarray(Image.open(again["mask"])).shape == picture(2).shape[:2]
    code, rest, errors = one.end(number)
    assert (code, rest) == (0, "") and "watching" in errors and "stopped; what was written so far is whole" in errors


def test_folders_of_two_stations_keep_their_results_apart(tmp_path: Path, running: Callable[..., Running]) -> None:
    for name in ("left", "right"):
        save_whole(tmp_path / name / "part.png", 0)
    one = running(tmp_path / "left", tmp_path / "right", "--output", tmp_path / "out", "--settle", "0")
    masks = {one.record()["mask"] for _ in range(2)}
    assert masks == {str(tmp_path / "out" / name / "part.png_mask.png") for name in ("left", "right")}
    one.end(signal.SIGTERM)


def test_two_watchers_do_not_write_to_one_folder(tmp_path: Path, running: Callable[..., Running], tiny_bundle: Path) -> None:
    for name in ("left", "right"):
        save_whole(tmp_path / name / "part.png", 0)
    first = running(tmp_path / "left", "--output", tmp_path / "out", "--settle", "0")
    first.record()
    second = running(tmp_path / "right", "--output", tmp_path / "out", "--settle", "0")
    out, errors = second.process.communicate(timeout=AMPLE)
    assert (second.process.returncode, out) == (2, "") and "expected no other --watch that writes there, got one" in errors
    save_whole(tmp_path / "left" / "next.png", 1)
    assert "mask" in first.record()
    first.end(signal.SIGTERM)
    third = running(tmp_path / "left", tmp_path / "right", "--output", tmp_path / "out", "--settle", "0")
    assert "mask" in third.record()
    below = running(tmp_path / "right", "--output", tmp_path / "out" / "right")
    assert below.process.wait(AMPLE) == 2
    third.end(signal.SIGTERM)


@pytest.mark.parametrize(("watching", "ended"), [(["--watch"], (0, "stopped")), ([], (130, "interrupted"))])
def test_a_service_stopped_while_its_model_is_opened_ends_as_always(
    watching: list[str], ended: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_whole(tmp_path / "part.png", 0)
    before = signal.getsignal(signal.SIGTERM)

    def opened(*given: Any, **settings: Any) -> Any:
        handler = signal.getsignal(signal.SIGTERM)
        assert callable(handler)
        handler(signal.SIGTERM, None)

    monkeypatch.setattr(segment, "Segmenter", opened)
    code = segment.main([str(tmp_path), *watching, "--bundle", "any", "--engine", "onnxruntime"])
    assert code == ended[0] and f"{ended[1]}; what was written so far is whole and stays" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in", "--watch", "--fail-on-ng"], "--fail-on-ng: expected no --watch beside it"),
        (["in", "--watch", "--strict"], "--strict: expected no --watch beside it"),
        (["in/a.png", "--watch"], "--watch: expected folders, got in/a.png"),
        (["nowhere", "--watch"], "--watch: expected folders, got nowhere"),
        (["in", "--settle", "1"], "--settle: expected --watch beside it"),
        (["in", "--watch", "--settle", "-1"], "--settle: expected seconds, 0 or more, got -1.0"),
        (["in", "--watch", "--settle", "nan"], "--settle: expected seconds, 0 or more, got nan"),
        (["in", "more/in", "--watch", "--output", "out"], "expected folders of different names"),
        (["in", "in", "--watch"], "expected each folder once"),
        (["in", "--watch", "--output", "in"], "expected a folder outside the pictures' own"),
        (["in", "more", "--watch", "--output", "."], "expected a folder outside the pictures' own"),
    ],
)
def test_what_cannot_be_watched_is_refused_at_once(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "in" / "a.png")
    put(tmp_path / "more" / "in" / "a.png")
    started = time.monotonic()
    assert segment.main([*arguments, "--bundle", "never opened", "--engine", "onnxruntime"]) == 2
    assert words in capsys.readouterr().err and time.monotonic() - started < AMPLE


def test_a_file_that_came_just_before_the_end_counts_as_not_judged(tmp_path: Path) -> None:
    watch = Watch([str(tmp_path)], settled=0, sleep=lambda seconds: None)
    Image.fromarray(picture(0)).save(tmp_path / "first.png")
    next(iter(watch))  # and the end comes while it is being judged
    Image.fromarray(picture(0)).save(tmp_path / "last.png")
    assert watch.left() == 2
