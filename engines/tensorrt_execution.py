"""One thread's work with a built TensorRT engine: its context, stream and memory, calls on their way, and what of them stays on the device.

Memory on the device and its pinned twin on the host are bound once and only grow; copies, kernels and copies back are queued on the
stage's own stream and waited for with an event; a call with the same shapes as the one before is captured into a CUDA graph and queued in
one call from then on. What one stage computes for another stays on the device: the other's stream waits there for the first one's event,
so that a chain is queued without the host waiting in between, and stages that need nothing of each other (the two encoders) run at the
same time as far as the device has room.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.cuda import Buffer, Graph, Pool, Stream, free, select
from engines.errors import EngineFailed
from engines.spec import Joined, StageSpec


class Execution:
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
        self._call: weakref.ref[Call] | None = None  # that call, where somebody still waits for it
        self._held: list[OnDevice] = []  # what it reads and writes
        self._engine = engine  # a context must not outlive its engine
        self._owned: list[Any] = [self._stream, *self._buffers.values(), *self._pools.values()]  # closing the stream waits for its work
        weakref.finalize(self, free, self._owned, engine, context).atexit = False  # at exit the driver frees

    def start(self, feeds: dict[str, np.ndarray], ended: Callable[[], None]) -> Call:
        self._end_call()
        self._set_shapes({name: value.shape for name, value in feeds.items()})
        work = _Work(self._stream)
        made = {name: OnDevice(pool, self._shapes[name], self._types[name], self._device, work) for name, pool in self._pools.items()}
        values: dict[str, Any] = dict(feeds)
        placed = {name: value for name, value in values.items() if isinstance(value, Joined) or self._is_here(value)}
        self._held = [part for value in (*placed.values(), *made.values()) for part in _parts(value) if self._is_here(part)]
        self._set_addresses({name: value for name, value in (placed | made).items() if not isinstance(value, Joined)})
        for name in values.keys() - placed.keys():
            np.copyto(self._host(name), values[name])
        self._queue(_Bound(self._shapes, dict(self._addresses), frozenset(placed)), placed, made)
        self._stream.mark()
        self._work = work
        call = Call(self, made, ended)
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

    def _queue(self, bound: _Bound, placed: dict[str, Any], made: dict[str, OnDevice]) -> None:
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
        return isinstance(value, OnDevice) and value.device == self._device  # from another GPU it comes over the host

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

    def _set_addresses(self, on_device: dict[str, OnDevice]) -> None:
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


class Call:
    """See engines.Pending."""

    def __init__(self, execution: Execution, resident: dict[str, OnDevice], ended: Callable[[], None]) -> None:
        self.resident = resident
        self.milliseconds: float | None = None
        self._execution: Execution | None = execution  # until its end
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


class OnDevice:
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
