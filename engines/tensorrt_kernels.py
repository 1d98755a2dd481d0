"""What TensorRT for RTX compiled on this device, kept from one start to the next."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

from engines.cache import write_whole


class KernelCache:
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
