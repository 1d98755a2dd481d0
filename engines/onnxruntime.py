"""onnxruntime: the CPU provider everywhere, the CUDA provider where onnxruntime-gpu is installed.

onnxruntime-gpu lists CUDA as available where its libraries cannot be loaded and then computes on the CPU in silence, so the
provider is checked after the session was made. TensorRT through onnxruntime is not offered: engines are built by ourselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineOptions
from engines.errors import EngineFailed, EngineUnavailable
from engines.spec import StageSpec

try:
    import onnxruntime
except ImportError as error:
    raise EngineUnavailable('engine onnxruntime is not installed; pip install "agvas[cpu]", or "agvas[gpu]" for CUDA') from error


# How exactly a product with integer weights is computed: 0 in the graph's own type, 4 with its other factor in int8 (measured on
# 512 × 768 and int4: relative error 6.5e-3, 1.7 times as fast).
MATMULNBITS_LEVEL = {"graph": "0", "int8": "4"}


class OnnxRuntimeEngine:
    """One graph in one session; sessions may run in several threads."""

    def __init__(self, graph: Path, spec: StageSpec, options: EngineOptions) -> None:
        self.spec = spec
        if options.inference_precision not in MATMULNBITS_LEVEL:
            raise EngineUnavailable(
                f"onnxruntime has no inference precision {options.inference_precision}: it computes what the graph states; "
                "use engine openvino, or export the bundle in that precision"
            )
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        # Left alone, onnxruntime would choose level 4 for every integer weight.
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", MATMULNBITS_LEVEL[options.inference_precision])
        # Five sessions take turns on one picture: a pool that spins after its turn takes the cores from the next stage.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if options.low_memory:
            # The arena keeps the largest activations for good. Weights are still repacked for the processor: without, two layers of the
            # paper's language model took 3.5 times as long and 1.0 GB of 4.5 less.
            settings.enable_cpu_mem_arena = False
            settings.enable_mem_pattern = False
        settings.log_severity_level = 3  # warnings about constant folding are of no use to a user
        provider, provider_options = _provider(options.device)
        try:
            self._session = onnxruntime.InferenceSession(str(graph), settings, providers=[provider], provider_options=[provider_options])
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise EngineFailed(f"onnxruntime cannot load {graph.name} on {options.device}: {_reason(error)}") from error
        if self._session.get_providers()[0] != provider:
            raise EngineUnavailable(
                f"onnxruntime has {provider} but could not start it on {options.device} (it would compute on the CPU); "
                "check the driver and the CUDA libraries, or ask for device cpu"
            )
        self._outputs = [output.name for output in spec.outputs]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.spec.check_inputs(feeds)
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as error:
            raise EngineFailed(f"onnxruntime failed in stage {self.spec.name}: {_reason(error)}") from error


def version() -> str:
    """The installed version."""
    return str(onnxruntime.__version__)


def _provider(device: str) -> tuple[str, dict[str, Any]]:
    if device == "cpu":
        return "CPUExecutionProvider", {}
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise EngineUnavailable(
            f"device {device} was asked for, but this onnxruntime has no CUDA provider; "
            'pip uninstall onnxruntime, then pip install "agvas[gpu]"'
        )
    return "CUDAExecutionProvider", {"device_id": int(device.split(":")[1])}


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "bfloat16" in text or "NOT_IMPLEMENTED" in text:  # a missing kernel is told by operator and node, never by type
        return f"{text} (the CPU provider has no bfloat16 kernels: for a bf16 bundle use engine openvino, or export fp32 or fp16)"
    return text
