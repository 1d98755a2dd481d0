"""onnxruntime: the CPU provider everywhere, the CUDA provider where onnxruntime-gpu is installed.

onnxruntime-gpu lists CUDA as available where its libraries cannot be loaded and then computes on the CPU in silence, so the
provider is checked after the session was made. On a GPU inputs and outputs are bound to memory there that is kept between calls of the
same shapes, and a graph that runs on the GPU throughout is captured by onnxruntime into a CUDA graph. A stage that feeds itself (the
language model's keys and values) grows with every call: its outputs stay on the GPU instead, and are fed back there. TensorRT through
onnxruntime is not offered: engines are built by ourselves.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineOptions
from engines.errors import EngineFailed, EngineUnavailable, let_interrupt_pass
from engines.spec import StageSpec

_handled = sys.exc_info()[1]
try:
    import onnxruntime
except (ImportError, OSError) as error:  # it may be there, and a library that it needs may not
    let_interrupt_pass(error, _handled)
    raise EngineUnavailable(f'engine onnxruntime is not installed ({error}); pip install "agvas[cpu]", or "agvas[gpu]" for CUDA') from error


# How exactly a product with integer weights is computed: 0 in the graph's own type, 4 with its other factor in int8 (measured on
# 512 × 768 and int4: relative error 6.5e-3, 1.7 times as fast).
MATMULNBITS_LEVEL = {"graph": "0", "int8": "4"}
CUDA = "CUDAExecutionProvider"
DEVICE = "cuda"  # what onnxruntime calls its memory
# What onnxruntime says of a graph that it cannot capture.
CAPTURE_REFUSED = "graph capture"
NO_CAPTURE = "-1"
ROUNDS_INPUTS = b"\x22\x0eQuantizeLinear"  # a node's op_type in an ONNX file
# c [1, 1] = MatMulInteger(a: uint8 [1, 4], b: int8 [4, 1]) in opset 10; tests/test_integer_weights.py makes it with onnx.
FOUR_BYTES = (
    b'\x08\x05:[\n\x18\n\x01a\n\x01b\x12\x01c"\rMatMulInteger\x12\x00Z\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02\x08\x01\n\x02\x08\x04'
    b"Z\x13\n\x01b\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08\x04\n\x02\x08\x01b\x13\n\x01c\x12\x0e\n\x0c\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\n"
)


class OnnxRuntimeEngine:
    """One graph in one session; sessions may run in several threads."""

    def __init__(self, graph: Path, spec: StageSpec, options: EngineOptions) -> None:
        self.spec = spec
        if options.inference_precision not in MATMULNBITS_LEVEL:
            raise EngineUnavailable(
                f"onnxruntime has no inference precision {options.inference_precision}: it computes what the graph states, or rounds what "
                "integer weights are multiplied with; use precision graph or int8, or engine openvino"
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
        self._captures = False
        if provider == CUDA:
            # Known sizes make shapes constants, which would otherwise be computed on the CPU, and no graph captured.
            for name, size in spec.sizes:
                settings.add_free_dimension_override_by_name(name, size)
        try:
            if provider != CUDA and ROUNDS_INPUTS in graph.read_bytes() and bytes_saturate():
                # Inputs are rounded to 8 bits as the graph says, and multiplied in fp32. session.x64quantprecision, made for such CPUs,
                # gives weights with a scale for each output one zero point, which DequantizeLinear then refuses.
                settings.add_session_config_entry("session.disable_quant_qdq", "1")
            if provider == CUDA and not spec.feeds_itself:
                try:
                    self._session = _session(graph, settings, provider, provider_options | {"enable_cuda_graph": "1"})
                    self._captures = True
                except Exception as error:  # some of the graph (its shapes, mostly) is computed on the CPU: known from the message alone
                    if CAPTURE_REFUSED not in str(error):
                        raise
            if not self._captures:
                self._session = _session(graph, settings, provider, provider_options)
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise EngineFailed(f"onnxruntime cannot load {graph.name} on {options.device}: {_reason(error)}") from error
        if self._session.get_providers()[0] != provider:
            raise EngineUnavailable(
                f"onnxruntime has {provider} but could not start it on {options.device} (it would compute on the CPU); "
                "check the driver and the CUDA libraries, or ask for device cpu"
            )
        self._outputs = [output.name for output in spec.outputs]
        self._bound: _Bound | _Growing | None = None
        if provider == CUDA:
            number = provider_options["device_id"]
            if spec.feeds_itself:
                self._bound = _Growing(self._session, spec, number)
            else:
                self._bound = _Bound(self._session, self._outputs, number, self._captures)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.spec.check_inputs(feeds)
        try:
            if self._bound is not None:
                return self._bound.run(feeds)
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as error:
            raise EngineFailed(f"onnxruntime failed in stage {self.spec.name}: {_reason(error)}") from error


class _Bound:
    """Memory on the GPU for a stage's inputs and outputs, so that calls neither allocate nor capture again: in a chain each has one shape.

    A first call finds out the outputs' shapes; from the second on with the same inputs' shapes everything is bound. Other shapes run
    unbound, and take the former's place when they come twice in a row. A captured graph belongs to its addresses and onnxruntime runs one
    at a time, so calls from several threads take turns.
    """

    def __init__(self, session: Any, outputs: list[str], device: int, captures: bool) -> None:
        self._session = session
        self._names = outputs
        self._device = device
        self._captures = captures
        self._lock = threading.Lock()
        self._last: dict[str, tuple[int, ...]] | None = None  # inputs' shapes of the call before
        self._shapes: dict[str, tuple[int, ...]] | None = None  # those that are bound
        self._binding: Any = None
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._graph = 0

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes = {name: array.shape for name, array in feeds.items()}
        with self._lock:
            again, self._last = shapes == self._last, shapes
            if shapes != self._shapes:
                if not again or any(not array.size for array in feeds.values()):  # what is empty has no memory to bind
                    return self._once(feeds)
                self._bind(shapes, feeds)
            for name, array in feeds.items():
                self._inputs[name].update_inplace(np.ascontiguousarray(array))
            options = onnxruntime.RunOptions()
            if self._captures:
                options.add_run_config_entry("gpu_graph_id", str(self._graph))
            self._session.run_with_iobinding(self._binding, options)
            return {name: _own(value.numpy()) for name, value in self._outputs.items()}

    def _once(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        options = onnxruntime.RunOptions()
        if self._captures:
            options.add_run_config_entry("gpu_graph_id", NO_CAPTURE)
        return dict(zip(self._names, self._session.run(self._names, feeds, options), strict=True))

    def _bind(self, shapes: dict[str, tuple[int, ...]], feeds: dict[str, np.ndarray]) -> None:
        known = self._once(feeds)
        self._shapes = self._binding = None  # the former memory is freed before the new one is taken
        self._inputs, self._outputs = {}, {}
        binding, value = self._session.io_binding(), onnxruntime.OrtValue
        for name, array in feeds.items():
            # Of a copy: in the CPU's memory a value is a view of its array, and the caller's must not change with the next call.
            self._inputs[name] = value.ortvalue_from_numpy(array.copy(order="C"), DEVICE, self._device)
            binding.bind_ortvalue_input(name, self._inputs[name])
        for name, array in known.items():
            self._outputs[name] = value.ortvalue_from_shape_and_type(array.shape, array.dtype, DEVICE, self._device)
            binding.bind_ortvalue_output(name, self._outputs[name])
        self._binding, self._shapes = binding, shapes
        self._graph += 1  # the number of a former graph would replay that one, at its own addresses


class _Growing:
    """A stage whose outputs come back as inputs: those stay on the GPU, whatever their size, and nothing is kept between calls."""

    def __init__(self, session: Any, spec: StageSpec, device: int) -> None:
        self._session = session
        self._spec = spec
        self._device = device

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        binding = self._session.io_binding()
        for name, array in feeds.items():
            if isinstance(array, _OnDevice):
                binding.bind_ortvalue_input(name, array.value)
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for output in self._spec.outputs:
            if output.stays:
                binding.bind_output(output.name, DEVICE, self._device)
            else:
                binding.bind_output(output.name)
        self._session.run_with_iobinding(binding)
        results = zip(self._spec.outputs, binding.get_outputs(), strict=True)
        return {output.name: _OnDevice(value) if output.stays else _own(value.numpy()) for output, value in results}  # type: ignore[misc]


class _OnDevice:
    """See engines.Resident."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.shape: tuple[int, ...] = tuple(value.shape())
        self.dtype = np.dtype(np.float32)  # of every float between stages
        self.ndim = len(self.shape)
        self.size = math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _own(self.value.numpy()).astype(dtype or self.dtype, copy=False)


def version() -> str:
    """The installed version."""
    return str(onnxruntime.__version__)


def _own(array: np.ndarray) -> np.ndarray:
    """The array, copied where it is a view of memory that the next call overwrites (a value on the GPU comes as a copy)."""
    return array if array.flags.owndata else array.copy()


def _session(graph: Path, settings: Any, provider: str, provider_options: dict[str, Any]) -> Any:
    return onnxruntime.InferenceSession(str(graph), settings, providers=[provider], provider_options=[provider_options])


@functools.cache
def bytes_saturate() -> bool:
    """Whether products of bytes saturate on this CPU, found by one: x86 without VNNI adds them in pairs in 16 bits."""
    session = onnxruntime.InferenceSession(FOUR_BYTES, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"a": np.full((1, 4), 255, np.uint8), "b": np.full((4, 1), 127, np.int8)})
    return bool(sums != 4 * 255 * 127)


def _provider(device: str) -> tuple[str, dict[str, Any]]:
    if device == "cpu":
        return "CPUExecutionProvider", {}
    if CUDA not in onnxruntime.get_available_providers():
        raise EngineUnavailable(
            f"device {device} was asked for, but this onnxruntime has no CUDA provider; on a machine with an NVIDIA GPU, "
            'pip install "agvas[gpu]" in an environment of its own; without one, leave the device out to run on the CPU'
        )
    _load_cuda_libraries()
    return CUDA, {
        "device_id": int(device.split(":")[1]),
        # The graph states what is computed in: left alone, fp32 products would be rounded to TF32's 10 bits.
        "use_tf32": "0",
        # Left alone, the arena doubles: of a model of 16 GB half of the GPU's memory could be reserved for nothing.
        "arena_extend_strategy": "kSameAsRequested",
    }


@functools.cache
def _load_cuda_libraries() -> None:
    """Those that pip installed beside onnxruntime-gpu (its extras cuda and cudnn), which the system's loader does not look for."""
    # Since 1.31 each session warns that CUDA is no plug-in.
    onnxruntime.set_default_logger_severity(3)
    if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
        with contextlib.redirect_stdout(io.StringIO()):  # it prints; what is missing shows when the provider does not start
            onnxruntime.preload_dlls()


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "bfloat16" in text or "NOT_IMPLEMENTED" in text:  # a missing kernel is told by operator and node, never by type
        return f"{text} (the CPU provider has no bfloat16 kernels: for a bf16 bundle use engine openvino, or export fp32 or fp16)"
    return text
