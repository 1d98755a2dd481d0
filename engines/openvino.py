"""OpenVINO on the CPU: the fastest engine measured there, and the one that multiplies in bfloat16 natively.

The accuracy hint is set, not inherited: left alone OpenVINO picks bfloat16 for itself on CPUs that have it and quantises
activations dynamically. Its GPU plug-in is not offered, for want of a machine to verify it on.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from engines import EngineOptions
from engines.errors import EngineFailed, EngineUnavailable
from engines.spec import StageSpec

try:
    import openvino
except ImportError as error:
    raise EngineUnavailable('engine openvino is not installed; pip install "agvas[openvino]"') from error


class OpenVinoEngine:
    """One compiled graph; every calling thread has an inference request of its own, since a request holds its tensors."""

    def __init__(self, graph: Path, spec: StageSpec, options: EngineOptions) -> None:
        self.spec = spec
        if options.device != "cpu":
            raise EngineUnavailable(f"engine openvino runs on device cpu here, not {options.device}")
        core = openvino.Core()
        if options.inference_precision == "bf16" and not natively_bf16(core):
            raise EngineUnavailable(
                "inference precision bf16 was asked for, but this CPU does not multiply in bfloat16; use precision graph"
            )
        settings: dict[str, object] = {
            "INFERENCE_PRECISION_HINT": "bf16" if options.inference_precision == "bf16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        try:
            self._compiled = core.compile_model(str(graph), "CPU", settings)
        except Exception as error:  # OpenVINO raises RuntimeError and its own subclasses of Exception
            raise EngineFailed(f"openvino cannot load {graph.name}: {str(error).strip()[-400:]}") from error
        self._requests = threading.local()

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.spec.check_inputs(feeds)
        request = getattr(self._requests, "request", None)
        if request is None:
            request = self._requests.request = self._compiled.create_infer_request()
        try:
            request.infer(feeds, share_inputs=True)
            # Copied: the request's own tensors are overwritten by this thread's next call.
            return {output.name: request.get_tensor(output.name).data.copy() for output in self.spec.outputs}
        except Exception as error:
            raise EngineFailed(f"openvino failed in stage {self.spec.name}: {str(error).strip()[-400:]}") from error


def natively_bf16(core: openvino.Core | None = None) -> bool:
    """Whether this CPU multiplies in bfloat16."""
    return "BF16" in (core or openvino.Core()).get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def version() -> str:
    """The installed version."""
    return str(openvino.__version__)
