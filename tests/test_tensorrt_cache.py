"""The cache of engines: what counts as built, what is set aside, and what stays whole when several processes are at it. No library."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import EngineFailed, EngineUnavailable, tensorrt_cache
from engines.cache import locked
from engines.tensorrt_builder import RECIPE, BuildReport, BuildRequest, Profile
from engines.tensorrt_cache import (
    EngineKey,
    EngineRecord,
    build_into_cache,
    engines_folder,
    hashes,
    load,
    record_of,
    set_aside,
    set_verified,
)

KEY = EngineKey("spam", "0123456789abcdef", "tensorrt", "10.3.0", "8.7")
PROFILE: Profile = {"x": ((1, 8), (1, 8), (1, 8))}

Build = Callable[..., tuple[EngineRecord, bool]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """`build_into_cache` of KEY with a builder whose engines are its requests' numbers."""
    count = 0

    def builder(request: BuildRequest, log: Path, progress: Any = None, **settings: Any) -> BuildReport:
        nonlocal count
        count += 1
        Path(request.output).write_text(f"engine {count}")
        return BuildReport(1.0, 1.0, len(f"engine {count}"), 1 << 20, 3, 1, 1, (), 0)

    monkeypatch.setattr(tensorrt_cache, "build", builder)
    graph = tmp_path / "spam.onnx"
    graph.write_bytes(b"graph")
    return lambda profile=PROFILE, **settings: build_into_cache(KEY, graph, profile, **settings)


def test_an_engine_of_another_recipe_is_refused_with_the_command_and_built_again(build: Build) -> None:
    build()
    sidecar = KEY.path.with_suffix(".json")
    fields = json.loads(sidecar.read_text())
    assert fields.pop("recipe") == RECIPE > 1  # as sidecars were written while TF32 was left on
    sidecar.write_text(json.dumps(fields))
    assert record_of(KEY.path).recipe == 1
    with pytest.raises(EngineUnavailable, match=f"expected an engine of build recipe {RECIPE}, found one of 1.*agvas-build --rebuild"):
        load(KEY, "agvas-build")
    assert build()[1] is False
    assert build()[1] is True and load(KEY, "")[0] == b"engine 2"


def test_stages_that_are_built_at_once_share_no_file_of_times(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files: list[str | None] = []

    def builder(request: BuildRequest, *others: Any) -> BuildReport:
        files.append(request.timing_cache)
        raise EngineFailed("that is far enough")

    monkeypatch.setattr(tensorrt_cache, "build", builder)
    for stage in ("spam", "language"):
        with pytest.raises(EngineFailed, match="far enough"):
            build_into_cache(dataclasses.replace(KEY, stage=stage), tmp_path / "spam.onnx", PROFILE)
    assert len(set(files)) == 2


def test_what_was_compiled_of_an_engine_is_set_aside_with_it(build: Build) -> None:
    build()
    sha256 = record_of(KEY.path).sha256
    KEY.path.with_suffix(".kernels").write_bytes(b"kernels")
    assert set_aside(KEY.path, "of another engine") is None and load(KEY, "")[1].sha256 == sha256
    aside = set_aside(KEY.path, sha256)
    kept = sorted(path.name for path in engines_folder().iterdir() if path.suffix != ".lock")
    assert aside is not None and kept == [aside.name, f"{aside.name}.json", f"{aside.name}.kernels"]


def test_a_verdict_is_noted_of_the_engine_that_was_verified_alone(build: Build) -> None:
    build()
    first = hashes()[KEY.path]
    build(rebuild=True)
    assert not set_verified(KEY.path, first, {"passed": False}) and record_of(KEY.path).verified is None
    assert set_verified(KEY.path, hashes()[KEY.path], {"passed": True}) and record_of(KEY.path).verified == {"passed": True}


def test_an_engine_is_not_set_aside_in_the_middle_of_its_build(build: Build) -> None:
    """Who verified the old one waits for the new one, and finds that it is another."""
    build()
    first, moved = hashes()[KEY.path], list[Path | None]()
    with locked(KEY.path.with_suffix(".lock")):
        waiting = threading.Thread(target=lambda: moved.append(set_aside(KEY.path, first)))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and KEY.path.is_file()
        record = dataclasses.replace(record_of(KEY.path), sha256="of the new one")
        KEY.path.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(record)))
    waiting.join(10)
    assert moved == [None] and KEY.path.is_file()


@pytest.mark.parametrize(
    ("profile", "cached"),
    [
        ({"x": ((1, 8), (1, 8), (4, 8))}, True),
        ({"x": ((1, 8), (1, 8), (2, 8))}, True),
        ({"x": ((1, 8), (1, 8), (5, 8))}, False),
        ({"x": ((0, 8), (1, 8), (4, 8))}, False),
        ({"x": ((1, 8), (2, 8), (4, 8))}, False),  # tuned for another shape
        ({"z": ((1, 8), (1, 8), (4, 8))}, False),
    ],
)
def test_an_engine_that_takes_more_than_is_asked_for_is_not_built_over(profile: Profile, cached: bool, build: Build) -> None:
    build({"x": ((1, 8), (1, 8), (4, 8))})
    assert build(profile)[1] is cached


# What goes wrong


@pytest.mark.parametrize("field", ["stage", "graph", "engine", "version", "capability"])
def test_an_engine_under_the_name_of_another_is_refused(field: str, build: Build) -> None:
    """As one that was renamed, so that it would be found on a machine or by a library that it does not fit."""
    build()
    other = dataclasses.replace(KEY, **{field: "9.9"})
    for suffix in (".engine", ".json"):
        KEY.path.with_suffix(suffix).rename(other.path.with_suffix(suffix))
    words = {"capability": "compute capability", "graph": "graph hash"}.get(field, field)
    message = f"expected an engine for {words} 9.9, found one for {getattr(KEY, field)}; run agvas-build --rebuild"
    with pytest.raises(EngineUnavailable, match=re.escape(message)):
        load(other, "agvas-build")


def test_a_build_that_another_process_is_at_is_waited_for_and_not_made_twice(build: Build) -> None:
    told: list[str] = []
    asking = threading.Thread(target=lambda: build(progress=lambda phase, done, total: told.append(phase)))
    with locked(KEY.path.with_suffix(".lock")):
        asking.start()
        ends = time.monotonic() + 10
        while not told and time.monotonic() < ends:
            time.sleep(0.01)
        assert asking.is_alive() and not KEY.path.exists()
    asking.join(10)
    assert told == ["waiting for another process that builds it"]
    assert build()[1] is True and load(KEY, "")[0] == b"engine 1"


def test_a_new_engine_never_stands_beside_what_belongs_to_the_old_one(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    kernels = KEY.path.with_suffix(".kernels")
    kernels.write_bytes(b"of the first engine")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(tensorrt_cache, "write_whole", full)
        with pytest.raises(EngineFailed, match="cannot be written .*No space left on device.; free some space or set AGVAS_CACHE"):
            build(rebuild=True)
    assert KEY.path.read_bytes() == b"engine 2" and not KEY.path.with_suffix(".json").exists() and not kernels.exists()
    assert build()[1] is False, "an engine that nothing tells of is none"


def test_a_build_that_fails_leaves_the_engine_that_was_there(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build()

    def crashing(request: BuildRequest, *others: Any) -> BuildReport:
        Path(request.output).write_text("half of an eng")
        raise EngineFailed("the builder crashed (signal 11)")

    monkeypatch.setattr(tensorrt_cache, "build", crashing)
    with pytest.raises(EngineFailed, match="crashed"):
        build(rebuild=True)
    assert load(KEY, "")[0] == b"engine 1" and not list(engines_folder().glob(".*"))


def test_a_cache_that_cannot_be_written_is_told_before_the_work(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGVAS_CACHE", str(tmp_path / "spam.onnx" / "cache"))  # below a file
    with pytest.raises(EngineFailed, match="spam.onnx/cache/.* cannot be written .*set AGVAS_CACHE to another folder"):
        build()
