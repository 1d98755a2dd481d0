"""What bisecting builds of an engine that must be built, and what it takes as it is there. On a double of the GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorrt_machine import BOTH, GPU, Gpu, doubled
from test_bisect import broken

from engines.tensorrt_cache import engines_folder
from export import bisect as bisecting
from export.bisect import bisect
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.engine_builds import profiles


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    with doubled(getattr(request, "param", "tensorrt-rtx"), monkeypatch) as machine:
        yield machine


@pytest.fixture
def wrong(copy_of_bundle: Callable[[], Path]) -> Path:
    """A graph of a pixel encoder whose attention is wrong: what a builder makes of the right one."""
    return broken(copy_of_bundle(), "pixel_encoder", "Softmax", 0)[0] / "pixel_encoder" / "pixel_encoder.onnx"


@pytest.fixture
def worst_is_the_second(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose chain gets the golden picture 1 most wrong."""
    bundle = Bundle(tiny_bundle)
    golden = bundle.golden()
    golden["1.map"] = 1 - golden["1.map"]
    monkeypatch.setattr(bundle, "golden", lambda: golden)
    return bundle


def built(gpu: Gpu) -> list[str]:
    """The graphs that a builder was started for."""
    return [Path(request.graph).stem for request in gpu.requests]


@BOTH
def test_behind_a_stage_that_is_wrong_nothing_is_built(gpu: Gpu, wrong: Path, tiny_bundle: Path) -> None:
    gpu.graphs["pixel_encoder"] = wrong
    finding, errors = bisect(Bundle(tiny_bundle), gpu.engine, GPU)
    assert finding is not None and (finding.stage, finding.picture, list(errors)) == ("pixel_encoder", 0, ["pixel_encoder"])
    assert built(gpu)[0] == "pixel_encoder" and all(name.startswith("pixel_encoder") for name in built(gpu))


def test_stages_are_built_in_their_order_and_once_though_two_pictures_are_followed(gpu: Gpu, worst_is_the_second: Bundle) -> None:
    steps: list[tuple[str, int, int]] = []
    finding, errors = bisect(worst_is_the_second, gpu.engine, GPU, progress=lambda *told: steps.append(told))
    assert finding is None and list(errors) == built(gpu) == list(STAGES)
    assert [step for phase, step, _ in steps if phase == "stages"] == [0, 1, 2, 3, 4] * 2


def test_the_picture_that_the_chain_gets_most_wrong_comes_second_where_stages_must_be_built(gpu: Gpu, worst_is_the_second: Bundle) -> None:
    bundle = worst_is_the_second
    pictures = bisecting._pictures(bundle, gpu.engine, GPU, profiles(bundle), None)
    assert (next(pictures), built(gpu)) == (0, [])
    assert (list(pictures), built(gpu)) == ([1], list(STAGES))
    assert list(bisecting._pictures(bundle, "onnxruntime", bisecting.EngineOptions(), profiles(bundle), None)) == [1]


# agvas-verify --bisect, in this process


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def found(gpu: Gpu, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str | None]:
    """The stage that is found wrong; the user's cache is as it was."""

    def find(bundle: Path) -> str | None:
        folder, cache = engines_folder(), os.environ["AGVAS_CACHE"]
        before = content_of(folder)
        assert bisecting.main(["--bundle", str(bundle), "--engine", gpu.engine, "--device", "cuda:0"]) == 0
        monkeypatch.setenv("AGVAS_CACHE", cache)
        assert content_of(folder) == before
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        return told["finding"] and str(told["finding"]["stage"])

    return find


@BOTH
def test_engines_that_are_in_the_cache_are_not_built_again(gpu: Gpu, found: Callable[[Path], str | None], tiny_bundle: Path) -> None:
    gpu.build(tiny_bundle)
    del gpu.requests[:]
    assert found(tiny_bundle) is None and built(gpu) == []
    gpu.build(tiny_bundle, rebuild=True, workspace_mb=1)  # otherwise than bisecting asks for
    assert found(tiny_bundle) is None and built(gpu) == [*STAGES, *STAGES]


@BOTH
def test_engines_that_were_set_aside_are_those_that_are_looked_at(
    gpu: Gpu, found: Callable[[Path], str | None], wrong: Path, tiny_bundle: Path
) -> None:
    gpu.graphs["pixel_encoder"] = wrong
    assert gpu.build(tiny_bundle)["verified"] is False and not list(engines_folder().glob("*.engine"))
    del gpu.requests[:], gpu.graphs["pixel_encoder"]  # built again, it would be right
    assert found(tiny_bundle) == "pixel_encoder" and "pixel_encoder" not in built(gpu)
