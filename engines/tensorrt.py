"""TensorRT and TensorRT for RTX: runs the engines that agvas-build made, one code path for both.

Nothing is built here: a build takes minutes, and one that was never compared with the reference must not slip into a line. So an engine
that failed agvas-verify is refused, and of one that it has not judged is warned. Memory on the device and its pinned twin on the host are
bound once and only grow; copies, kernels and copies back are queued on the stage's own stream and waited for with an event; a call with
the same shapes as the one before is captured into a CUDA graph and queued in one call from then on. What one stage computes for another
stays on the device: the other's stream waits there for the first one's event, so that a chain is queued without the host waiting in
between, and stages that need nothing of each other (the two encoders) run at the same time as far as the device has room. An execution
context belongs to one thread, since two threads in one give wrong numbers without an error.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineOptions
from engines.cache import write_whole
from engines.cuda import Buffer, Graph, Pool, Stream, capability_here, device_index, free, select
from engines.errors import EngineFailed, EngineUnavailable, TensorMismatch
from engines.spec import Joined, StageSpec
from engines.tensorrt_cache import EngineKey, hash_of, load
from engines.tensorrt_library import TENSORRT_RTX, library

# Numeric types that both sides have. bfloat16 is not among them: NumPy has none, and the contract's borders are float32.
NUMPY_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "BOOL": "bool"}


class TensorRtEngine:
    """One built engine; every calling thread has a context, a stream and memory of its own."""

    def __init__(self, graph: Path, spec: StageSpec, engine: str, options: EngineOptions) -> None:
        self.spec = spec
        if options.inference_precision != "graph":
            raise EngineUnavailable(
                f"engine {engine} computes what the graph states, not {options.inference_precision}; use precision graph, "
                "or export the bundle in that precision"
            )
        self._index = device_index(options.device)
        self._low_memory = options.low_memory
        self._trt = library(engine)
        capability = capability_here(options.device)
        self.key = EngineKey(spec.name, hash_of(graph), engine, self._trt.__version__, capability)
        named = f"--bundle {graph.parent.parent} --engine {engine} --device {options.device}"
        self._rebuild = f"agvas-build {named}"
        content, self.record = load(self.key, self._rebuild)
        if not options.to_judge:
            self._check_verdict(named)
        select(self._index)
        self._logger = _logger(self._trt)
        self._runtime = self._trt.Runtime(self._logger)
        self._check_validity(content)
        self._engine = self._runtime.deserialize_cuda_engine(content)
        del content  # gigabytes, of which the engine has its own by now
        if self._engine is None:
            raise EngineFailed(f"{self.key.path}: {engine} cannot load it: {self._logger.last()}; run {self._rebuild} --rebuild")
        self._check_tensors()
        self._kernels: _KernelCache | None = None
        if engine == TENSORRT_RTX:
            fixed = all(least == most for least, _, most in self.record.profile.values())
            self._kernels = _KernelCache(self.key.path.with_suffix(".kernels"), self._trt, self._engine, fixed)
        self._threads = threading.local()
        owned = [self._kernels] if self._kernels else []  # at exit, too: that keeps its kernels
        weakref.finalize(self, free, owned, self._runtime, self._engine)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.start(feeds).result()

    def start(self, feeds: dict[str, np.ndarray]) -> _Call:
        """See engines.Queueing."""
        self.spec.check_inputs(feeds)
        self._check_profile(feeds)
        self._logger.forget()
        select(self._index)  # another engine may have left this thread on another GPU
        execution = getattr(self._threads, "execution", None)
        if execution is None:
            context = self._new_context()
            execution = _Execution(self._engine, context, self.spec, self._index, self._logger, keeps=not self._low_memory)
            self._threads.execution = execution
        return execution.start(feeds, self._kernels.called if self._kernels else _nothing)

    def _new_context(self) -> Any:
        context = self._kernels.context() if self._kernels else self._engine.create_execution_context()
        if context is None:
            raise EngineFailed(f"stage {self.spec.name}: no execution context: {self._logger.last()} (too little memory on the GPU?)")
        return context

    def _check_verdict(self, named: str) -> None:
        """Refuse an engine that gave other masks than the reference; warn of one that was never compared with it."""
        verdict = self.record.verified
        if verdict is None:
            # No stage is named: Python shows the same words from the same line once, not for each of a chain's engines.
            warnings.warn(
                f"the engines of {self.key.engine} for compute capability {self.key.capability} have not been compared with the reference; "
                f"run agvas-verify {named}, which notes its verdict beside them",
                RuntimeWarning,
                stacklevel=2,
            )
        elif not verdict.get("passed"):
            reasons = "; ".join(verdict.get("failures", ())) or "its sidecar does not say how"
            raise EngineUnavailable(
                f"{self.key.path}: expected an engine that gives the reference's masks, found one that agvas-verify failed ({reasons}); "
                f"run {self._rebuild} --rebuild, or judge it again with agvas-verify {named}"
            )

    def _check_validity(self, content: bytes) -> None:
        """TensorRT for RTX can say what is wrong with an engine before loading it."""
        ask = getattr(self._runtime, "get_engine_validity", None)
        if ask is None:
            return
        validity, diagnostics = ask(content)
        flags = self._trt.EngineInvalidityDiagnostics.__members__.items()
        reasons = ", ".join(name for name, flag in flags if int(diagnostics) & int(flag)) or str(diagnostics)
        if validity == self._trt.EngineValidity.INVALID:
            raise EngineUnavailable(
                f"{self.key.path}: expected an engine that runs on compute capability {self.key.capability} with this driver, "
                f"found one that does not ({reasons}); update the driver, or run {self._rebuild} --rebuild"
            )
        if validity == self._trt.EngineValidity.SUBOPTIMAL:
            warnings.warn(  # no stage is named, as in _check_verdict
                f"{self.key.engine} finds that engines built for compute capability {self.key.capability} may be slower here than they "
                f"need be ({reasons}); update the driver, or run {self._rebuild} --rebuild on this GPU",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_tensors(self) -> None:
        """The engine's tensors are the stage's, in types that NumPy has."""
        found = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            kind = self._engine.get_tensor_dtype(name).name
            if kind not in NUMPY_TYPES:
                raise EngineFailed(f"stage {self.spec.name}: tensor {name} is {kind}, which NumPy lacks; export it as float32")
            found[name] = NUMPY_TYPES[kind]
        expected = {tensor.name: tensor.dtype for tensor in (*self.spec.inputs, *self.spec.outputs)}
        if found != expected:
            raise EngineFailed(
                f"stage {self.spec.name}: expected tensors {expected}, the engine has {found}; run {self._rebuild} --rebuild"
            )

    def _check_profile(self, feeds: dict[str, np.ndarray]) -> None:
        for name, (least, _, most) in self.record.profile.items():
            shape = feeds[name].shape
            if not all(low <= size <= high for low, size, high in zip(least, shape, most)):
                raise TensorMismatch(
                    f"stage {self.spec.name}: expected {name} between {least} and {most}, got {list(shape)}; "
                    f"more pictures at once take {self._rebuild} --max-batch N --rebuild"
                )


class _Execution:
    """One thread's context, stream and memory; one call at a time is on its way."""

    def __init__(self, engine: Any, context: Any, spec: StageSpec, device: int, logger: Any, keeps: bool) -> None:
        self._context = context
        self._spec = spec
        self._device = device
        self._logger = logger
        self._stream = Stream()
        self._types = {tensor.name: np.dtype(tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)}
        self._fetched = [tensor.name for tensor in spec.outputs if not tensor.stays]
        # One for each: calls in turn then find each tensor where it was, and a graph captured there is right again.
        self._pools = {tensor.name: Pool(keeps) for tensor in spec.outputs if tensor.stays}
        # Keys and values are written and read where they lie. What else stays is copied there, on the device, which takes microseconds:
        # the stage's own memory then never changes, nor does its graph, however many pictures are on their way.
        self._in_place = spec.feeds_itself
        self._buffers = {name: Buffer() for name in self._types if not (self._in_place and name in self._pools)}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}  # those that the context has taken
        self._bound: _Bound | None = None  # in the call before
        self._graph: Graph | None = None
        self._graph_of: _Bound | None = None
        self._capture = True
        self._work: _Work | None = None  # of the call before
        self._call: weakref.ref[_Call] | None = None  # that call, where somebody still waits for it
        self._held: list[_OnDevice] = []  # what it reads and writes
        self._engine = engine  # a context must not outlive its engine
        self._owned: list[Any] = [self._stream, *self._buffers.values(), *self._pools.values()]  # closing the stream waits for its work
        weakref.finalize(self, free, self._owned, engine, context).atexit = False  # at exit the driver frees

    def start(self, feeds: dict[str, np.ndarray], ended: Callable[[], None]) -> _Call:
        self._end_call()
        self._set_shapes({name: value.shape for name, value in feeds.items()})
        work = _Work(self._stream)
        made = {name: _OnDevice(pool, self._shapes[name], self._types[name], self._device, work) for name, pool in self._pools.items()}
        values: dict[str, Any] = dict(feeds)
        placed = {name: value for name, value in values.items() if isinstance(value, Joined) or self._is_here(value)}
        self._held = [part for value in (*placed.values(), *made.values()) for part in _parts(value) if self._is_here(part)]
        self._set_addresses({name: value for name, value in (placed | made).items() if not isinstance(value, Joined)})
        for name in values.keys() - placed.keys():
            np.copyto(self._host(name), values[name])
        self._queue(_Bound(self._shapes, dict(self._addresses), frozenset(placed)), placed, made)
        self._stream.mark()
        self._work = work
        call = _Call(self, made, ended)
        self._call = weakref.ref(call)
        return call

    def finish(self) -> tuple[dict[str, np.ndarray], float]:
        """Wait for the call: what is fetched of it, and what it took on the device in milliseconds."""
        self._wait()
        return {name: self._host(name).copy() for name in self._fetched}, self._stream.milliseconds()

    def _end_call(self) -> None:
        """The call before leaves the memory that the next one takes."""
        call = self._call() if self._call is not None else None
        if call is not None:
            call.settle()
        self._wait()

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._held = []

    def _queue(self, bound: _Bound, placed: dict[str, Any], made: dict[str, _OnDevice]) -> None:
        """A call's work, in order on the stream; what other calls have still to compute for it is waited for there."""
        again, self._bound = bound == self._bound, bound
        for part in self._held:
            part.work.before(self._stream)
        self._stream.begin()
        for name, value in placed.items():
            if isinstance(value, Joined) or not self._in_place:
                self._place(name, value)
        if bound != self._graph_of and again and self._capture and self._can_be_captured():
            self._drop_graph()
            self._graph = self._captured(bound)
        if self._graph is not None and bound == self._graph_of:
            self._graph.launch()
        else:
            self._enqueue(bound)
        if not self._in_place:
            for name, value in made.items():
                self._stream.copy(value.block.address, self._buffers[name].address, self._size(name))

    def _is_here(self, value: Any) -> bool:
        return isinstance(value, _OnDevice) and value.device == self._device  # from another GPU it comes over the host

    def _place(self, name: str, value: Any) -> None:
        """Copy a feed into this thread's buffer, each part from where it is."""
        buffer, row, start = self._buffers[name], 0, 0
        for part in _parts(value):
            size = part.size * self._types[name].itemsize
            if self._is_here(part):
                self._stream.copy(buffer.address + start, part.block.address, size)
            else:
                rows = slice(row, row + part.shape[1])
                self._host(name)[:, rows] = np.asarray(part)
                buffer.upload(size, self._stream, start)
            row, start = row + part.shape[1], start + size

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """The inputs' shapes, from which the library infers the outputs'."""
        if all(self._shapes.get(name) == shape for name, shape in shapes.items()):
            return
        self._shapes = {}  # until all is set: an error in between must not leave half of it as known
        self._drop_graph()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineFailed(f"stage {self._spec.name}: {name} {list(shape)} was refused: {self._logger.last()}")
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as error:
            raise EngineFailed(f"stage {self._spec.name}: its outputs' shapes were not found: {error} ({self._logger.last()})") from error
        if unknown:
            raise EngineFailed(f"stage {self._spec.name}: the shapes of {', '.join(unknown)} are not known before running")
        self._shapes = shapes | {tensor.name: tuple(self._context.get_tensor_shape(tensor.name)) for tensor in self._spec.outputs}

    def _set_addresses(self, on_device: dict[str, _OnDevice]) -> None:
        """Where every tensor lies: keys and values that are on the device in their blocks, everything else in this thread's buffers."""
        for name in self._types:
            if self._in_place and name in on_device:
                address = on_device[name].block.address
            else:
                self._buffers[name].reserve(self._size(name), crosses=name not in on_device)
                address = self._buffers[name].address
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise EngineFailed(f"stage {self._spec.name}: the memory of {name} was refused: {self._logger.last()}")
                self._addresses[name] = address

    def _enqueue(self, bound: _Bound) -> None:
        """Copies in, kernels, copies out, in order on the stream; what was placed already, and what stays there, is not copied."""
        for tensor in self._spec.inputs:
            if tensor.name not in bound.placed:
                self._buffers[tensor.name].upload(self._size(tensor.name), self._stream)
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise EngineFailed(f"stage {self._spec.name} failed: {self._logger.last()}")
        for name in self._fetched:
            self._buffers[name].download(self._size(name), self._stream)

    def _can_be_captured(self) -> bool:
        """TensorRT for RTX may still be compiling kernels for these shapes; TensorRT cannot be asked."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(int(self._stream.handle)))

    def _captured(self, bound: _Bound) -> Graph | None:
        """The work of `_enqueue` as a graph; None, with a warning, for an engine that has to wait for the host in between."""
        graph = Graph(self._stream)
        try:
            with graph:
                self._enqueue(bound)
        except EngineFailed as error:
            self._capture = False
            warnings.warn(f"stage {self._spec.name} runs without a CUDA graph, a little slower: {error}", RuntimeWarning, stacklevel=4)
            return None
        self._owned.append(graph)
        self._graph_of = bound
        return graph

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._owned.remove(self._graph)
            self._graph.close()
        self._graph = self._graph_of = None

    def _host(self, name: str) -> np.ndarray:
        return self._buffers[name].host(self._shapes[name], self._types[name])

    def _size(self, name: str) -> int:
        return int(np.prod(self._shapes[name], dtype=np.int64)) * self._types[name].itemsize


@dataclass(frozen=True)
class _Bound:
    """What a context is set to in a call, and a CUDA graph is captured for; of two equal ones the second does the same work."""

    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    placed: frozenset[str]  # inputs that are not copied from the host within


class _Work:
    """What a call put on its stream. The stream may have been closed meanwhile, for which its work was waited for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._done = False

    def wait(self) -> None:
        """Until it is done; a call that the stream got later is waited for, too."""
        if not self._done:
            self._stream.wait()
            self._done = True

    def before(self, stream: Stream) -> None:
        """What is queued on a stream from now on waits for it there."""
        if not self._done:
            stream.wait_for(self._stream)


class _Call:
    """See engines.Pending."""

    def __init__(self, execution: _Execution, resident: dict[str, _OnDevice], ended: Callable[[], None]) -> None:
        self.resident = resident
        self.milliseconds: float | None = None
        self._execution: _Execution | None = execution  # until its end
        self._ended = ended
        self._fetched: dict[str, np.ndarray] = {}
        self._error: EngineFailed | None = None

    def result(self) -> dict[str, np.ndarray]:
        self.settle()
        if self._error is not None:
            raise self._error
        return self._fetched | self.resident  # type: ignore[operator, return-value]

    def settle(self) -> None:
        """Wait for the end, and take the numbers out of the memory that the next call writes."""
        execution, self._execution = self._execution, None
        if execution is None:
            return
        try:
            self._fetched, self.milliseconds = execution.finish()
        except EngineFailed as error:
            self._error = error
        self._ended()


class _OnDevice:
    """See engines.Resident. Its memory may outlive the engine, and goes back to its pool with the last who needs it.

    It may be given out before its values are there: who is not on the stream that computes them waits for `work`.
    """

    def __init__(self, pool: Pool, shape: tuple[int, ...], dtype: np.dtype[Any], device: int, work: _Work) -> None:
        self.shape = shape
        self.dtype = dtype
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.device = device
        self.work = work
        self.block = pool.take(self.size * dtype.itemsize)
        weakref.finalize(self, pool.give_back, self.block).atexit = False

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.work.wait()
        select(self.device)
        return self.block.fetch(self.shape, self.dtype).astype(dtype or self.dtype, copy=False)


def _parts(value: Any) -> tuple[Any, ...]:
    return value.parts if isinstance(value, Joined) else (value,)


def _nothing() -> None:
    """Of an engine that keeps no kernels there is nothing to do after a call."""


class _KernelCache:
    """Kernels that TensorRT for RTX compiled on this device, kept beside the engine so that the next start does not compile them again.

    Where shapes are free, it runs on kernels for any shape until those for the ones that came are compiled in the background, and tells
    nobody when they are. So after the first call, the second, the fourth and so on, and when the engine is let go, the cache is written
    if it has grown. Where shapes are fixed, all is compiled before the first call.
    """

    def __init__(self, path: Path, trt: Any, engine: Any, fixed: bool) -> None:
        self._path = path
        self._engine = engine
        self._config = engine.create_runtime_config()
        if fixed and hasattr(self._config, "dynamic_shapes_kernel_specialization_strategy"):  # not in its first versions
            self._config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache = self._config.create_runtime_cache()
        self._kept = self._read()  # bytes
        self._config.set_runtime_cache(self._cache)
        self._lock = threading.Lock()
        self._calls = 0
        self._due = 1  # the call after which to look

    def context(self) -> Any:
        with self._lock:
            return self._engine.create_execution_context(self._config)

    def called(self) -> None:
        """A call has ended."""
        with self._lock:
            self._calls += 1
            if self._calls >= self._due:
                self._due = 2 * self._calls
                self._keep()

    def close(self) -> None:
        with self._lock:
            self._keep()

    def _read(self) -> int:
        """How many bytes of kernels the library took: none where there are none yet, or where they are another driver's."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return 0
        return len(content) if self._cache.deserialize(content) else 0

    def _keep(self) -> None:
        """Failing to write costs a compilation next time, nothing else."""
        content = self._cache.serialize()
        if content is not None and content.nbytes > self._kept:
            with contextlib.suppress(OSError):
                write_whole(self._path, bytes(content))
                self._kept = content.nbytes


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps each thread's last error, since the library returns None or False and says why here alone."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._here = threading.local()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._here.error = message

        def forget(self) -> None:
            """What comes is not to be explained by what was."""
            self._here.error = ""

        def last(self) -> str:
            return getattr(self._here, "error", "").strip() or "the library gave no reason"

    return Log()
