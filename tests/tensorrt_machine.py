"""A machine with a doubled GPU, the bundle's engines "built" on it, and what its stages are fed: for the tests of the TensorRT runner."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_double import CudaDouble, TensorRtDouble

from engines import EngineOptions, EngineUnavailable, open_engine, tensorrt_cache
from engines.tensorrt import TensorRtEngine
from engines.tensorrt_builder import BuildReport, BuildRequest
from engines.tensorrt_cache import EngineKey
from runtime.bundle import Bundle
from runtime.contract import SPAM, STAGES
from runtime.engine_builds import BuildSettings, build_engines

trt = pytest.importorskip("tensorrt_rtx", reason='its names and types are the double\'s: pip install "agvas[tensorrt-rtx]"')
cudart = pytest.importorskip("cuda.bindings.runtime", reason='pip install "agvas[cuda]"')

GPU = EngineOptions(device="cuda:0")
BOTH = pytest.mark.parametrize("gpu", ["tensorrt", "tensorrt-rtx"], indirect=True)

Feeds = dict[str, np.ndarray]


@dataclasses.dataclass
class Gpu:
    """A machine with a doubled GPU and the library of one engine."""

    engine: str
    cuda: CudaDouble
    trt: TensorRtDouble
    graphs: dict[str, Path]  # another graph to "build" a stage from
    requests: list[BuildRequest]  # that a builder was started for

    def build(self, bundle: Path, **settings: Any) -> dict[str, Any]:
        return build_engines(Bundle(bundle), BuildSettings(self.engine, **settings))

    def open(self, bundle: Path, stage: str = "spam", options: EngineOptions = GPU) -> TensorRtEngine:
        engine = open_engine(Bundle(bundle, check_hashes=False).graph(stage), STAGES[stage], self.engine, options)
        assert isinstance(engine, TensorRtEngine)
        return engine

    def key(self, bundle: Path, stage: str = "spam") -> EngineKey:
        return EngineKey(stage, Bundle(bundle).graph_hash(stage), self.engine, self.trt.__version__, self.cuda.capability or "")


@contextlib.contextmanager
def doubled(engine: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A machine with one GPU of compute capability 8.9 and the library of `engine`; at the end no work may be left on a stream."""
    cuda = CudaDouble(cudart)
    double = TensorRtDouble(trt, cuda, rtx=engine == "tensorrt-rtx", version="1.7.1.116" if engine == "tensorrt-rtx" else "10.3.0")
    machine = Gpu(engine, cuda, double, {}, [])

    def build(request: BuildRequest, log: Path, progress: Any = None) -> BuildReport:
        machine.requests.append(request)
        graph = machine.graphs.get(Path(request.graph).stem, Path(request.graph))
        Path(request.output).write_text(str(graph))
        return BuildReport(1.0, 1.0, len(str(graph)), 1 << 20, 3, 1, 1, (), 0)

    def library(name: str) -> Any:
        assert name == engine
        return double

    monkeypatch.setattr("engines.cuda.runtime", lambda: cuda)
    for module in ("engines.tensorrt", "engines.tensorrt_builder", "engines.tensorrt_library"):
        monkeypatch.setattr(f"{module}.library", library)
    monkeypatch.setattr(tensorrt_cache, "build", build)
    yield machine
    assert not [stream for stream, work in cuda.streams.items() if work], "work was left on a stream"


def spam_feeds(bundle: Path, seed: int = 0, batch: int = 1) -> Feeds:
    sizes = Bundle(bundle, check_hashes=False).manifest.sizes | {"B": batch}
    rng = np.random.default_rng(seed)
    return {
        tensor.name: rng.normal(size=[axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]).astype(np.float32)
        for tensor in SPAM.inputs
    }


def language_feeds(bundle: Path, tokens: int, past: int, seed: int = 0) -> Feeds:
    sizes = Bundle(bundle, check_hashes=False).manifest.sizes
    rng = np.random.default_rng(seed)
    kept = (sizes["L"], 1, sizes["H"], past, sizes["C"])
    return {
        "input_embeddings": rng.normal(size=(1, tokens, sizes["D"])).astype(np.float32),
        "positions": np.arange(past, past + tokens)[None],
        "past_keys": rng.normal(size=kept).astype(np.float32),
        "past_values": rng.normal(size=kept).astype(np.float32),
        "rows": np.array([tokens - 1]),
    }


def reference(bundle: Path, stage: str, feeds: Feeds) -> Feeds:
    return open_engine(Bundle(bundle, check_hashes=False).graph(stage), STAGES[stage], "onnxruntime").run(feeds)


def assert_equal(ours: Feeds, wanted: Feeds) -> None:
    assert ours.keys() == wanted.keys()
    for name in wanted:
        assert ours[name].dtype == wanted[name].dtype and ours[name].shape == wanted[name].shape
        np.testing.assert_allclose(np.asarray(ours[name]), np.asarray(wanted[name]), rtol=1e-5, atol=1e-5, err_msg=name)


def install_only(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TensorRT's libraries the machine's own, for `auto`, which asks for both."""

    def library(engine: str) -> Any:
        if engine != gpu.engine:
            raise EngineUnavailable(f"engine {engine} is not installed")
        return gpu.trt

    monkeypatch.setattr("engines.tensorrt.library", library)


def give_verdict(gpu: Gpu, bundle: Path, verdict: dict[str, Any] | None, stage: str = "spam") -> Path:
    """Of agvas-verify, in the sidecar of a stage's engine, whose path is returned."""
    path = gpu.key(bundle, stage).path
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "verified": verdict}))
    return path
