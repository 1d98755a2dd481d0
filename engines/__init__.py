"""Execution back-ends: `open_engine` opens one exported graph on one back-end and device, or says why it cannot.

Each back-end is one file and imports its library there. An engine or device that was asked for and cannot be had raises; nothing
falls back. Choosing among engines is the runtime's business.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engines.cuda import GPU
from engines.errors import EngineError, EngineFailed, EngineUnavailable, TensorMismatch
from engines.spec import Joined, Resident, StageSpec, TensorSpec

# onnxruntime's official builds tell Microsoft about sessions and models over the network from 1.29 on, unless this stands in the
# environment before it is loaded. A line's PC calls nobody: a user who wants it says ORT_DISABLE_TELEMETRY=0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

ENGINES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
INFERENCE_PRECISIONS = ("graph", "bf16", "int8", "bf16+int8")
# To be raised where what an engine computes changes with its package's version the same: choices made before are made again.
WAY_OF_COMPUTING = 2
THREADS_PER_PROCESSOR = 64  # more is a slip, which engines would try until memory is gone


@dataclass(frozen=True)
class EngineOptions:
    """How a back-end runs a graph.

    Attributes:
        device: "cpu" or "cuda:N".
        threads: CPU threads of one inference; 0 leaves it to the back-end.
        inference_precision: "graph" computes in the types the graph states (or wider); "bf16" lets OpenVINO multiply in
            bfloat16 on CPUs that do so natively, whatever the graph states; "int8" rounds what is multiplied with integer
            weights to 8 bit, token by token (blocks of inputs with a scale each), which is faster than integer weights alone;
            "bf16+int8" does both, in OpenVINO.
        low_memory: keep no memory between calls; slower. A chain then also has one stage in memory at a time.
        to_judge: open a TensorRT engine to compare it with the reference: one that failed that before, too, and without a warning one
            that was never compared.
    """

    device: str = "cpu"
    threads: int = 0
    inference_precision: str = "graph"
    low_memory: bool = False
    to_judge: bool = False

    def __post_init__(self) -> None:
        if self.device != "cpu" and not GPU.fullmatch(self.device):
            raise ValueError(f"device: expected cpu or cuda:N (cuda:0 is the first GPU), got {self.device!r}")
        if self.threads < 0:
            raise ValueError(f"threads: expected 0 (the engine's choice) or more, got {self.threads}")
        if self.threads > (most := THREADS_PER_PROCESSOR * (os.cpu_count() or 1)):
            raise ValueError(f"threads: expected {most} at most, {THREADS_PER_PROCESSOR} a processor, got {self.threads}; 0 is usual")
        if self.inference_precision not in INFERENCE_PRECISIONS:
            raise ValueError(f"inference_precision: expected one of {INFERENCE_PRECISIONS}, got {self.inference_precision!r}")

    @property
    def coarser(self) -> frozenset[str]:
        """The types, coarser than the graph may state, that the engine is asked to compute in: of "bf16" and "int8"."""
        return frozenset(self.inference_precision.split("+")) - {"graph"}

    @property
    def in_bf16(self) -> bool:
        """Whether bfloat16 is asked for, whatever the graph states."""
        return "bf16" in self.coarser

    @property
    def rounds_inputs(self) -> bool:
        """Whether what is multiplied with integer weights is to be rounded to 8 bit."""
        return "int8" in self.coarser


class Engine(Protocol):
    """One graph, loaded. `run` may be called from several threads at once."""

    spec: StageSpec

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. One that its spec lets stay on the device may be a Resident, and may be fed as one.

        Raises:
            TensorMismatch: feeds that do not fit the stage.
            EngineFailed: the back-end could not compute.
        """
        ...


class Pending(Protocol):
    """A call that was queued on a device, see Queueing.

    Attributes:
        resident: the outputs that stay on the device, by name: may be fed to other calls at once, which wait for them there.
        milliseconds: what the device took, its copies included, once the call has ended; None before.
    """

    @property
    def resident(self) -> Mapping[str, Resident]: ...

    @property
    def milliseconds(self) -> float | None: ...

    def result(self) -> dict[str, np.ndarray]:
        """Wait for all outputs by name, as Engine.run gives them. In the thread that started the call."""
        ...


class Queueing(Engine, Protocol):
    """An engine whose device works on while the host goes on."""

    def start(self, feeds: dict[str, np.ndarray]) -> Pending:
        """`run` without waiting. A feed may be a Joined, too. A thread's next call of the same engine waits for this one.

        Raises:
            TensorMismatch: feeds that do not fit the stage.
            EngineFailed: the device refused the work.
        """
        ...


def open_engine(graph: Path, spec: StageSpec, engine: str, options: EngineOptions | None = None) -> Engine:
    """Load `graph` (an .onnx file) on a back-end.

    Raises:
        EngineUnavailable: unknown, not installed, without this device, or (TensorRT) not built for it or found wrong; says what to
            install or do.
        EngineFailed: the back-end refuses the graph.
    """
    options = options or EngineOptions()
    if engine == "onnxruntime":
        from engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, spec, options)
    if engine == "openvino":
        from engines.openvino import OpenVinoEngine

        return OpenVinoEngine(graph, spec, options)
    if engine in ("tensorrt", "tensorrt-rtx"):
        from engines.tensorrt import TensorRtEngine

        return TensorRtEngine(graph, spec, engine, options)
    raise EngineUnavailable(f"engine {engine!r} is unknown; valid: {', '.join(ENGINES)}")


__all__ = [
    "ENGINES",
    "INFERENCE_PRECISIONS",
    "Engine",
    "EngineError",
    "EngineFailed",
    "EngineOptions",
    "EngineUnavailable",
    "Joined",
    "Pending",
    "Queueing",
    "Resident",
    "StageSpec",
    "TensorMismatch",
    "TensorSpec",
    "open_engine",
]
