"""TensorRT and TensorRT for RTX: runs the engines that agvas-build made, one code path for both.

Nothing is built here: a build takes minutes, and one that was never compared with the reference must not slip into a line. So an engine
that failed agvas-verify is refused, and of one that it has not judged is warned. An execution context belongs to one thread, since two
threads in one give wrong numbers without an error: each has an Execution of its own.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineOptions
from engines.cuda import capability_here, device_index, free, select
from engines.errors import EngineFailed, EngineUnavailable, TensorMismatch
from engines.spec import StageSpec
from engines.tensorrt_cache import EngineKey, hash_of, load
from engines.tensorrt_execution import Call, Execution
from engines.tensorrt_kernels import KernelCache
from engines.tensorrt_library import TENSORRT_RTX, library

# Numeric types that both sides have. bfloat16 is not among them: NumPy has none, and the contract's borders are float32.
NUMPY_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "UINT8": "uint8", "BOOL": "bool"}


class TensorRtEngine:
    """One built engine; every calling thread has a context, a stream and memory of its own."""

    def __init__(self, graph: Path, spec: StageSpec, engine: str, options: EngineOptions) -> None:
        self.spec = spec
        if options.inference_precision != "graph":
            export = ", or export with --precision bf16" if options.in_bf16 else ""
            raise EngineUnavailable(
                f"engine {engine} computes what the graph states, not {options.inference_precision}; use precision graph{export}"
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
        self._kernels: KernelCache | None = None
        if engine == TENSORRT_RTX:
            fixed = all(least == most for least, _, most in self.record.profile.values())
            self._kernels = KernelCache(self.key.path.with_suffix(".kernels"), self._trt, self._engine, fixed)
        self._threads = threading.local()
        owned = [self._kernels] if self._kernels else []  # at exit, too: that keeps its kernels
        weakref.finalize(self, free, owned, self._runtime, self._engine)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.start(feeds).result()

    def start(self, feeds: dict[str, np.ndarray]) -> Call:
        """See engines.Queueing."""
        self.spec.check_inputs(feeds)
        self._check_profile(feeds)
        self._logger.forget()
        select(self._index)  # another engine may have left this thread on another GPU
        execution = getattr(self._threads, "execution", None)
        if execution is None:
            context = self._new_context()
            execution = Execution(self._engine, context, self.spec, self._index, self._logger, keeps=not self._low_memory)
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


def _nothing() -> None:
    """Of an engine that keeps no kernels there is nothing to do after a call."""


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
