"""Builds one TensorRT engine from one ONNX graph, in a process of its own.

A builder may crash on a graph it does not like, or be killed for its memory; in a child that is an error with a name and a log, and
the caller lives. Precision is in the graph: the network is strongly typed, and TF32, which the libraries have on and which keeps 10 bits of
float32's 23, is taken off. What the builder made of attention is read from its own layer list, since "it built" says nothing of whether
attention is one kernel or ten.

    python -m engines.tensorrt_builder < request.json        # the child; `build` starts it
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.cache import write_whole
from engines.cuda import free_memory, select
from engines.errors import EngineFailed
from engines.memory import available_memory, peak_memory
from engines.tensorrt_library import TENSORRT, library, sm

# By input: least, usual and largest shape.
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

CHILD = (sys.executable, "-m", "engines.tensorrt_builder")
# How `_build` builds, by number: raised with whatever makes other engines of the same graph and shapes, so that none of the former pass
# for what is built now. 1 left TF32 on.
RECIPE = 2
# Host memory of a build, measured with TensorRT for RTX 1.7.1 (benchmarks/results/tensorrt_rtx_builds.json): the library and its
# compiler, and per byte of the graph what the parser, the optimiser and the serialised engine hold at once.
BASE_BYTES = 350 << 20
BYTES_PER_GRAPH_BYTE = 3.3
# Names of the kernels that hold a whole attention, in the builder's list of layers.
FUSED_ATTENTION = re.compile(r"_gemm_mha|fused_mha|fmha")
INT4_WEIGHTS = re.compile(r"Datatype: Int4", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(r"bad_alloc|out of memory|OutOfMemory|MemoryError|Cannot allocate memory|insufficient memory", re.IGNORECASE)
# What the builder says when no kernel of a layer does with the workspace that it is limited to.
WORKSPACE_TOO_SMALL = re.compile(r"increas\w+ the (?:allowed )?workspace size", re.IGNORECASE)
# How the list of layers begins, and a line of it: TensorRT for RTX 1.7, TensorRT 10 (not seen here).
LAYERS_FOLLOW = re.compile(r"^(?:Layers|Engine Layer Information):\s*$", re.MULTILINE)
LAYER = re.compile(r"\s*(?:Name: .*LayerType: |Layer\()")
OPAQUE = "{ForeignNode["  # TensorRT 10's name of a part of the graph that another compiler made one layer of


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    Attributes:
        engine: "tensorrt" or "tensorrt-rtx".
        graph: the .onnx file; its data lies beside it.
        output: where the engine goes.
        capability: compute capability of the GPU it is for; tensorrt builds for the one it runs on.
        profile: shapes of every input.
        workspace_mb: most scratch memory a layer may take on the GPU; None leaves it to the builder.
        timing_cache: file with the measured times of kernels, read and written by tensorrt; None for none.
        device: number of the GPU that tensorrt builds on; tensorrt-rtx builds on none.
        force: build where memory will not do by the estimate, too.
    """

    engine: str
    graph: str
    output: str
    capability: str
    profile: Profile
    workspace_mb: int | None = None
    timing_cache: str | None = None
    device: int = 0
    force: bool = False


@dataclass(frozen=True)
class BuildReport:
    """What a build took and made.

    Attributes:
        cpu_seconds: of all threads; beside `seconds` it tells whether the machine was busy with other things.
        peak_rss_bytes: most host memory the build held; None where the system does not tell.
        layers: kernels and copies in the engine; None where the builder listed none.
        attention: attentions in the graph (softmax whose result is a matrix product's factor).
        attention_fused: of them, those that became one kernel; None where the builder listed no layers, or such as hide what is in them.
        unfused: names of the others' softmax nodes; none where that is not known.
        int4_layers: kernels that read weights in 4 bit; elsewhere such weights are unpacked once and take four times the memory. None as
            `attention_fused`.
    """

    seconds: float
    cpu_seconds: float
    bytes: int
    peak_rss_bytes: int | None
    layers: int | None
    attention: int
    attention_fused: int | None
    unfused: tuple[str, ...]
    int4_layers: int | None


def build(request: BuildRequest, log: Path, progress: Callable[[str, int, int], None] | None = None) -> BuildReport:
    """Build in a child process.

    Args:
        log: file for everything the builder says; kept when the build fails, removed when it does not.
        progress: called with (phase, steps done, steps in all) as the builder tells them.

    Raises:
        EngineFailed: too little memory, a graph that the builder refuses, a crash; names the graph, the reason and the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    what = f"{request.engine} cannot build {Path(request.graph).name} for compute capability {request.capability}"
    report: dict[str, Any] = {}
    with open(log, "wb") as lines:
        process = subprocess.Popen(
            CHILD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=lines,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert process.stdin and process.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once: its exit code says more
                process.stdin.write(json.dumps(asdict(request)))
                process.stdin.close()
            for line in process.stdout:
                said = json.loads(line) if line.startswith("{") else {}
                if "phase" in said and progress:
                    progress(said["phase"], said["step"], said["steps"])
                report = said.get("report", report)
            code = process.wait()
        finally:
            if process.poll() is None:  # interrupted: the child must not go on building
                process.kill()
                process.wait()
    if code == 0 and report:
        log.unlink()
        return BuildReport(**{**report, "unfused": tuple(report["unfused"])})
    raise EngineFailed(f"{what}: {_reason(code, log, request.workspace_mb)}; the builder's log is {log}")


def _reason(code: int, log: Path, workspace_mb: int | None) -> str:
    """Why a child ended, in words: what it said last, or what ended it."""
    text = log.read_text(errors="replace")
    errors = [line for line in text.splitlines() if line.startswith(("error:", "ERROR", "INTERNAL_ERROR"))]
    last = errors[-1].split(":", 1)[1].strip()[:500] if errors else ""
    said = f" ({last})" if last else ""
    if workspace_mb is not None and code > 0 and WORKSPACE_TOO_SMALL.search(text[-20000:]):
        return f"a layer needs more scratch memory than --workspace {workspace_mb} allows{said}; give a larger one, or leave it out"
    if OUT_OF_MEMORY.search(text[-20000:]) or code == -9:
        return f"out of memory{said}; end other programs, give a smaller --workspace or --max-batch, or build elsewhere"
    if code < 0:
        return f"the builder crashed (signal {-code}){f' after: {last}' if last else ''}; this graph and this version do not go together"
    return last or f"the builder ended with exit code {code} and said nothing"


# The child


def main() -> int:
    request = BuildRequest(**json.load(sys.stdin))
    try:
        if not request.force:
            check_memory(request)
        report = _build(request)
    except Exception as error:  # told by its words: the parent reads the log
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    _tell({"report": asdict(report)})
    return 0


def check_memory(request: BuildRequest) -> None:
    """Refuse before the work what would be killed in the middle of it: for the host's memory and, of TensorRT, for that of its GPU.

    Of the GPU's no more is known than that the engine has its weights there: what layers, their scratch memory and the kernels that are
    tried take comes on top. In the child, since who asks a GPU holds some of its memory, which the parent would for all the build.

    Raises:
        EngineFailed: the system has less memory free than the build is likely to take, or the GPU less than it takes at the least.
    """
    graph = Path(request.graph)
    size = sum(path.stat().st_size for path in graph.parent.glob(f"{graph.stem}.*"))
    needed, free = int(BASE_BYTES + BYTES_PER_GRAPH_BYTE * size), available_memory()
    if free is not None and free < needed:
        raise EngineFailed(
            f"building {graph.name} takes about {needed >> 20} MiB of memory, {free >> 20} MiB are free (swap does not count); end other "
            "programs, build on another machine, or go on all the same with --force"
        )
    free = free_memory(request.device) if request.engine == TENSORRT else None
    if free is not None and free < size:
        raise EngineFailed(
            f"building {graph.name} takes more than {size >> 20} MiB of memory on GPU {request.device}, its weights alone, "
            f"{free >> 20} MiB are free there; end other programs on it (nvidia-smi lists them), export smaller weights (--lmm gptq4), "
            "take a larger GPU, or go on all the same with --force"
        )


def _build(request: BuildRequest) -> BuildReport:
    started = time.monotonic()
    trt = library(request.engine)
    logger = _logger(trt)
    if request.engine == TENSORRT:
        select(request.device)  # before the builder, which takes the thread's GPU for its own
    builder = trt.Builder(logger)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.graph):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineFailed(f"the parser refuses the graph: {reasons}")
    config = builder.create_builder_config()
    _clear_tf32(trt, config)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the list of layers, for `_attention`
    config.progress_monitor = _monitor(trt)
    if request.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mb << 20)
    if request.engine != TENSORRT:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[sm(request.capability)], 0)
    config.add_optimization_profile(_profile(builder, network, request.profile))
    timings = _read_timings(config, request)
    attention = _attentions(trt, network)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise EngineFailed(logger.errors[-1] if logger.errors else "the builder made no engine and gave no reason")
    Path(request.output).write_bytes(serialized)
    _keep_timings(timings, request)
    return BuildReport(
        seconds=round(time.monotonic() - started, 3),
        cpu_seconds=round(time.process_time(), 3),
        bytes=serialized.nbytes,
        peak_rss_bytes=peak_memory(),
        layers=len(logger.layers) or None,
        attention=len(attention),
        **_made_of(attention, logger.layers),
    )


def _made_of(attention: list[str], layers: list[str]) -> dict[str, Any]:
    """What the layers tell of a BuildReport: "attention_fused", "unfused", "int4_layers".

    TensorRT may list a whole part of the graph as one layer, {ForeignNode[first...last]}: what is in it cannot be told.
    """
    fused = {name for name in attention if any(FUSED_ATTENTION.search(_name(line)) and f"{name}]" in line for line in layers)}
    opaque = not layers or any(OPAQUE in _name(line) for line in layers)
    if opaque and len(fused) < len(attention):
        told: dict[str, Any] = {"attention_fused": None, "unfused": ()}
    else:
        told = {"attention_fused": len(fused), "unfused": tuple(name for name in attention if name not in fused)}
    return told | {"int4_layers": None if opaque else sum(bool(INT4_WEIGHTS.search(line)) for line in layers)}


def _tell(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Writes every message at once, so that a crash leaves the last one; keeps errors and the layers."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            print(f"{severity.name}: {message}", file=sys.stderr, flush=True)
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if LAYERS_FOLLOW.search(message):
                self.layers += [line.strip() for line in message.splitlines() if LAYER.match(line)]

    return Log()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Tells the outermost phase's steps; inner ones come by the thousand."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps
                _tell({"phase": phase_name, "step": 0, "steps": num_steps})

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                _tell({"phase": phase_name, "step": step + 1, "steps": self.steps[phase_name]})
            return True

    return Monitor()


def _strongly_typed(trt: Any) -> int:
    """The creation flag; a version whose networks are all strongly typed may have none."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _clear_tf32(trt: Any, config: Any) -> None:
    """float32 in the graph is float32 in the kernels; a version without the flag has no TF32 to take off."""
    flag = getattr(trt.BuilderFlag, "TF32", None)
    if flag is not None:
        config.clear_flag(flag)


def _profile(builder: Any, network: Any, shapes: Profile) -> Any:
    profile = builder.create_optimization_profile()
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if names != shapes.keys():
        raise EngineFailed(f"expected shapes of the graph's inputs {sorted(names)}, got those of {sorted(shapes)}")
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, tuple(least), tuple(usual), tuple(most))
    return profile


def _read_timings(config: Any, request: BuildRequest) -> Any:
    """TensorRT's measured kernel times, set on the config; None for TensorRT for RTX, which measures nothing while building.

    A file of another version or GPU, or a damaged one, which the library refuses in one call or the other, counts as none.
    """
    if request.engine != TENSORRT or request.timing_cache is None:
        return None
    contents = [b""]
    with contextlib.suppress(OSError):  # none yet
        contents.insert(0, Path(request.timing_cache).read_bytes())
    for content in contents:
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _keep_timings(timings: Any, request: BuildRequest) -> None:
    """Write them, whole, since another build may be reading. Failing to costs the time of measuring again, nothing else."""
    if timings is not None and request.timing_cache:
        with contextlib.suppress(OSError):
            write_whole(Path(request.timing_cache), bytes(timings.serialize()))


def _attentions(trt: Any, network: Any) -> list[str]:
    """Names of the softmax layers whose result, cast or reshaped, is a factor of a matrix product."""
    readers: dict[str, list[Any]] = {}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        for index in range(layer.num_inputs):
            if (tensor := layer.get_input(index)) is not None:
                readers.setdefault(tensor.name, []).append(layer)
    through = (trt.LayerType.CAST, trt.LayerType.SHUFFLE, trt.LayerType.IDENTITY)

    def multiplied(layer: Any) -> bool:
        for reader in readers.get(layer.get_output(0).name, ()):
            if reader.type == trt.LayerType.MATRIX_MULTIPLY or (reader.type in through and multiplied(reader)):
                return True
        return False

    return [layer.name for layer in layers if layer.type == trt.LayerType.SOFTMAX and multiplied(layer)]


def _name(line: str) -> str:
    return line.split(",", 1)[0]


if __name__ == "__main__":
    # Its own messages go to the parent; a library that prints must not come between them.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main())
