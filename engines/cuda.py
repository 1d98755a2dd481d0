"""CUDA's runtime through NVIDIA's own Python bindings: devices, pinned and device memory, streams, events, captured graphs.

A thin layer: every call's error code becomes an exception with CUDA's own words, and what was allocated is freed with its owner.
Nothing else of CUDA is used, and no framework.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from typing import Any

import numpy as np

from engines.errors import EngineFailed, EngineUnavailable, let_interrupt_pass

# The name of a GPU.
GPU = re.compile(r"cuda:[0-9]+")


class _Capture(threading.local):
    """Whether this thread is capturing: then a list of what the collector came upon meanwhile, which `free` frees afterwards."""

    found: list[tuple[list[Any], tuple[Any, ...]]] | None = None


_capture = _Capture()


def runtime() -> Any:
    """The bindings.

    Raises:
        EngineUnavailable: not installed.
    """
    handled = sys.exc_info()[1]
    try:
        from cuda.bindings import runtime as bindings
    except (ImportError, OSError) as error:
        let_interrupt_pass(error, handled)
        raise EngineUnavailable(f'CUDA\'s Python bindings are not installed ({error}); pip install "agvas[cuda]"') from error
    return bindings


def capability_here(device: str) -> str:
    """Compute capability ("8.9") of a device ("cuda:N").

    Raises:
        ValueError: no name of a device.
        EngineUnavailable: no bindings, no driver, or no such device.
    """
    index, count, cuda = device_index(device), gpus_here(device), runtime()
    if index >= count:
        raise EngineUnavailable(f"device {device}: expected cuda:0 to cuda:{count - 1}; choose one of them")
    attributes = cuda.cudaDeviceAttr
    major = check(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMajor, index))
    minor = check(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMinor, index))
    return f"{major}.{minor}"


def gpus_here(device: str) -> int:
    """How many GPUs the driver knows, at least one.

    Args:
        device: what was asked for, for the message.

    Raises:
        EngineUnavailable: no bindings, no driver, or none that it knows.
    """
    cuda = runtime()
    error, count = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess or not count:
        raise EngineUnavailable(f"device {device}: no CUDA GPU here ({_words(cuda, error)}); check the driver with nvidia-smi")
    return int(count)


def select(index: int) -> None:
    """Make GPU `index` the one that this thread works on; every thread begins on GPU 0.

    Raises:
        EngineFailed: CUDA refused.
    """
    check(runtime().cudaSetDevice(index))


def free_memory(index: int) -> int | None:
    """Bytes free on GPU `index`, which becomes this thread's; None where it has the host's memory (a Jetson's), see engines.memory.

    There CUDA counts the files that were read, which give way, as used. Who asks holds some hundred MB of that GPU until the process ends.

    Raises:
        EngineFailed: CUDA refused.
    """
    select(index)
    cuda = runtime()
    if check(cuda.cudaDeviceGetAttribute(cuda.cudaDeviceAttr.cudaDevAttrIntegrated, index)):
        return None
    free, _ = check(cuda.cudaMemGetInfo())
    return int(free)


def device_index(device: str) -> int:
    """N of "cuda:N".

    Raises:
        ValueError: no name of a device.
        EngineUnavailable: another kind of device.
    """
    if device == "cpu":
        raise EngineUnavailable(f"device {device}: TensorRT runs on a GPU; ask for device cuda:0, or use engine onnxruntime or openvino")
    if not GPU.fullmatch(device):
        raise ValueError(f"device: expected cuda:N (cuda:0 is the first GPU), got {device!r}")
    return int(device.removeprefix("cuda:"))


def check(returned: tuple[Any, ...]) -> Any:
    """What a call of the bindings gives behind its error code: nothing, one value, or several.

    Raises:
        EngineFailed: CUDA refused.
    """
    cuda, (error, *values) = runtime(), returned
    if error != cuda.cudaError_t.cudaSuccess:
        raise EngineFailed(f"CUDA: {_words(cuda, error)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _words(cuda: Any, error: Any) -> str:
    _, text = cuda.cudaGetErrorString(error)
    return f"{text.decode() if isinstance(text, bytes) else text} ({error.name})"


class Stream:
    """One queue of GPU work that other streams wait for where they are told to alone, and events before and behind its last call."""

    def __init__(self) -> None:
        cuda = self._cuda = runtime()
        self.handle = check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        # Blocking: a thread that waits sleeps, and leaves its core to the picture being read next.
        self._begun, self._done = (check(cuda.cudaEventCreateWithFlags(cuda.cudaEventBlockingSync)) for _ in range(2))
        self._closed = False

    def begin(self) -> None:
        """Put an event before what is queued next."""
        check(self._cuda.cudaEventRecord(self._begun, self.handle))

    def mark(self) -> None:
        """Put an event behind what was queued so far."""
        check(self._cuda.cudaEventRecord(self._done, self.handle))

    def wait(self) -> None:
        """Sleep until everything before the mark is done."""
        if not self._closed:
            check(self._cuda.cudaEventSynchronize(self._done))

    def wait_for(self, other: Stream) -> None:
        """Queue a wait on the device for everything before the other's mark."""
        if other is not self and not other._closed:
            check(self._cuda.cudaStreamWaitEvent(self.handle, other._done, 0))

    def milliseconds(self) -> float:
        """What the device took from `begin` to `mark`, which must have been waited for."""
        return float(check(self._cuda.cudaEventElapsedTime(self._begun, self._done)))

    def copy(self, to: int, source: int, size: int, way: str = "DeviceToDevice") -> None:
        """Queue the copy of `size` bytes from one address to another; `way` as in CUDA's names (HostToDevice)."""
        cuda = self._cuda
        if size:
            check(cuda.cudaMemcpyAsync(to, source, size, getattr(cuda.cudaMemcpyKind, f"cudaMemcpy{way}"), self.handle))

    def close(self) -> None:
        """Wait for its work, and end."""
        cuda, self._closed = self._cuda, True
        cuda.cudaStreamSynchronize(self.handle)
        for event in (self._begun, self._done):
            cuda.cudaEventDestroy(event)
        cuda.cudaStreamDestroy(self.handle)


class Graph:
    """Work that was captured once from a stream and is queued again in one call."""

    def __init__(self, stream: Stream) -> None:
        self._cuda = runtime()
        self._stream = stream
        self._executable: Any = None

    def __enter__(self) -> Graph:
        cuda = self._cuda
        _capture.found = []  # before it begins: the collector may come at any moment
        # Thread-local: other threads' allocations do not spoil this capture; for this thread's own see `free`.
        begun = cuda.cudaStreamBeginCapture(self._stream.handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        if begun[0] != cuda.cudaError_t.cudaSuccess:
            _free_found()
        check(begun)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        ended = self._cuda.cudaStreamEndCapture(self._stream.handle)
        _free_found()
        self._keep(ended, told=error is not None)

    def _keep(self, ended: tuple[Any, ...], told: bool) -> None:
        """Make what was captured ready to be queued; where an error inside is being told already, only destroy it."""
        cuda = self._cuda
        if told and ended[0] != cuda.cudaError_t.cudaSuccess:
            return  # the capture is invalid because of that error, and there is no graph
        graph = check(ended)
        try:
            if not told:
                self._executable = check(cuda.cudaGraphInstantiate(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)

    def launch(self) -> None:
        check(self._cuda.cudaGraphLaunch(self._executable, self._stream.handle))

    def close(self) -> None:
        if self._executable is not None:
            self._cuda.cudaGraphExecDestroy(self._executable)
            self._executable = None


def free(owned: list[Any], *held: object) -> None:
    """Close what is owned, in order; what is only held (a library's objects, which free their memory as they go) goes with the call.

    For finalisers. The collector may run one in the middle of a capture, and memory freed by the thread that captures makes its graph
    invalid: then all of it waits for the capture's end.
    """
    if _capture.found is not None:
        _capture.found.append((owned, held))
        return
    for thing in owned:
        thing.close()


def _free_found() -> None:
    """Free what `free` had to leave."""
    found, _capture.found = _capture.found or [], None
    for owned, held in found:
        free(owned, *held)


class Buffer:
    """A tensor's memory on the device and, where it crosses, its pinned twin on the host: grown for a larger tensor and never shrunk.

    Attributes:
        address: of the device memory; changes when it grows.
        bytes: how many there are.
    """

    def __init__(self) -> None:
        self._cuda = runtime()
        self.address = 0
        self.bytes = 0
        self._pinned = 0

    def reserve(self, size: int, crosses: bool = True) -> None:
        """Make room for `size` bytes, at least one, since TensorRT takes no null address for an empty tensor.

        Args:
            crosses: on the host, too.
        """
        cuda, size = self._cuda, max(size, 1)
        if size > self.bytes:
            crosses = crosses or bool(self._pinned)
            self.close()
            self.address = int(check(cuda.cudaMalloc(size)))
            self.bytes = size
        if crosses and not self._pinned:
            self._pinned = int(check(cuda.cudaMallocHost(self.bytes)))

    def host(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """The pinned memory's first bytes as an array."""
        import ctypes

        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = memoryview((ctypes.c_ubyte * size).from_address(self._pinned))
        return np.ndarray(shape, dtype, memory) if size else np.empty(shape, dtype)

    def upload(self, size: int, stream: Stream, start: int = 0) -> None:
        """Queue the copy of `size` bytes from the pinned memory to the device, from byte `start` of both on."""
        stream.copy(self.address + start, self._pinned + start, size, "HostToDevice")

    def download(self, size: int, stream: Stream) -> None:
        """Queue the copy of `size` bytes from the device to the pinned memory."""
        stream.copy(self._pinned, self.address, size, "DeviceToHost")

    def close(self) -> None:
        cuda = self._cuda
        if self.address:
            cuda.cudaFree(self.address)
        if self._pinned:
            cuda.cudaFreeHost(self._pinned)
        self.address = self._pinned = self.bytes = 0


class Block:
    """Memory on the device alone, of a size that stays.

    Raises:
        EngineFailed: there is not that much.
    """

    def __init__(self, size: int) -> None:
        self._cuda = runtime()
        self.address = int(check(self._cuda.cudaMalloc(size)))
        self.bytes = size

    def fetch(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """The first bytes as an array of the host's. They must have been waited for."""
        array, cuda = np.empty(shape, dtype), self._cuda
        if array.nbytes:
            check(cuda.cudaMemcpy(array.ctypes.data, self.address, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost))
        return array

    def close(self) -> None:
        if self.address:
            self._cuda.cudaFree(self.address)
        self.address = 0


class Pool:
    """Blocks that one thread takes and that come back, from any thread, when nobody needs what lies in them.

    What grows with every call would otherwise be allocated and freed with every call, for which a device stands still.

    Args:
        keeps: keep what came back for the next to take; otherwise it is freed.
    """

    def __init__(self, keeps: bool) -> None:
        self._keeps = keeps
        self._back: list[Block] = []  # append and pop are whole steps: a finaliser takes no lock, which its own thread may hold

    def take(self, size: int) -> Block:
        """A block of `size` bytes or more: the smallest, and of those the one of the lowest address."""
        fitting = [block for block in list(self._back) if block.bytes >= size]
        if fitting:
            block = min(fitting, key=lambda block: (block.bytes, block.address))
            self._back.remove(block)
            return block
        self._free_all()  # too small for what grows
        return Block(_with_room(size))

    def give_back(self, block: Block) -> None:
        if self._keeps:
            self._back.append(block)
        if not self._keeps:  # asked again: the pool may have been closed meanwhile
            self._free_all()
            free([block])

    def close(self) -> None:
        """Free what came back, and from now on what comes back."""
        self._keeps = False
        self._free_all()

    def _free_all(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                free([self._back.pop()])


def _with_room(size: int) -> int:
    """`size` or up to an eighth more, at least 256 bytes."""
    step = max(256, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step
