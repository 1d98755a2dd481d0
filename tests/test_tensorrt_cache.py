"""The cache of engines: what counts as built, what is set aside, and what stays whole when several processes are at it. No library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import EngineFailed, EngineUnavailable, tensorrt_cache
from engines.tensorrt_builder import RECIPE, BuildReport, BuildRequest, Profile
from engines.tensorrt_cache import EngineKey, EngineRecord, build_into_cache, load, record_of

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
