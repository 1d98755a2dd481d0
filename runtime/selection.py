"""Chooses the engine for `auto`: the fastest of those installed that reproduces the bundle's golden masks on this machine.

Measured, not assumed, and remembered: the choice is kept in the user's cache under the bundle's hash, the engines' versions and the
processor (on CUDA also the GPUs, their driver and the engines that were built), so that a new version, another machine or an engine built
anew measures again; removing that folder forgets all choices, and agvas-verify forgets one that it finds wrong. Only the device that was
asked for is considered.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path

from engines import INFERENCE_PRECISIONS, WAY_OF_COMPUTING, EngineError, EngineOptions, EngineUnavailable
from engines.cache import cache_folder, write_whole
from engines.tensorrt_cache import engines_folder, record_of
from runtime.bundle import Bundle
from runtime.parity import GATES
from runtime.pipeline import Pipeline
from runtime.verify import open_pipeline, verify

# (engine, inference precision), on the CPU and on CUDA.
CPU_CANDIDATES = (("openvino", "bf16"), ("openvino", "graph"), ("onnxruntime", "graph"))
# TensorRT's engines come into question where agvas-build has made them; nothing is built in passing.
CUDA_CANDIDATES = (("tensorrt", "graph"), ("tensorrt-rtx", "graph"), ("onnxruntime", "graph"))
# Beside them where the language model's weights are integers.
INTEGER_CANDIDATES = (("openvino", "bf16+int8"), ("openvino", "int8"), ("onnxruntime", "int8"))
PACKAGES = ("agvas", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
TIMED_RUNS = 5
REST = 0.02  # seconds before each turn: thread pools go on spinning for a while and would take the cores from whoever is next
NVIDIA = Path("/proc/driver/nvidia")  # read, since asking CUDA would load it


@dataclass(frozen=True)
class Choice:
    """The engine chosen and why the others were not.

    Attributes:
        milliseconds: median time of the first golden picture when it was measured, in turns with the last that was compared with it.
        rejected: reason by candidate.
        remembered: from an earlier measurement on this machine, not made now.
    """

    engine: str
    inference_precision: str
    milliseconds: float
    rejected: dict[str, str]
    remembered: bool = False

    @property
    def name(self) -> str:
        """As in `rejected`."""
        return f"{self.engine}/{self.inference_precision}"


def choose_engine(
    bundle: Bundle, options: EngineOptions, precision: str | None = None, *, remeasure: bool = False
) -> tuple[Pipeline, Choice]:
    """Open the fastest engine that passes the bundle's gates on `options.device`.

    Args:
        precision: consider this inference precision alone; None considers all.
        remeasure: measure now, whatever is remembered; what is found is remembered in its place.

    Raises:
        EngineUnavailable: none does, and the message has every candidate's reason; or none has this precision.
    """
    candidates = _considered(bundle, options.device, precision)
    cache = _remembered(bundle, options, precision)
    if not remeasure and (known := _read(cache)) is not None:
        try:
            # To judge: these very engines were verified when they were chosen, whether or not agvas-verify has noted its verdict.
            chosen = replace(options, inference_precision=known.inference_precision, to_judge=True)
            remembered = open_pipeline(bundle, known.engine, chosen)
        except EngineError as error:
            warnings.warn(
                f"engine auto: {known.engine} ({known.inference_precision}), which it had chosen, cannot be opened ({error}); the engines "
                "are measured again",
                stacklevel=3,
            )
        else:
            return remembered, replace(known, remembered=True)
    best: tuple[Pipeline, Choice] | None = None
    pipeline: Pipeline | None
    rejected: dict[str, str] = {}
    for engine, computes_in in candidates:
        name = f"{engine}/{computes_in}"
        tried = replace(options, inference_precision=computes_in, to_judge=True)
        pipeline = None  # the one before goes first, where it was not the best: a large model does not fit three times
        try:
            pipeline = open_pipeline(bundle, engine, tried)
            verification = verify(bundle, pipeline, tried)
            if not verification.passed:
                rejected[name] = "; ".join(verification.failures)
                continue
            times = _median_milliseconds(bundle, [pipeline] if best is None else [pipeline, best[0]])
        except EngineError as error:
            rejected[name] = str(error)
            continue
        choice = Choice(engine, computes_in, times[0], rejected)
        if best is None:
            best = pipeline, choice
            continue
        before = replace(best[1], milliseconds=times[1])
        best, slower = ((pipeline, choice), before) if times[0] < times[1] else ((best[0], before), choice)
        rejected[slower.name] = f"slower: {slower.milliseconds:.1f} ms, {best[1].name} in turns with it {best[1].milliseconds:.1f} ms"
    if best is None:
        reasons = " | ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise EngineUnavailable(f"no engine on device {options.device} can run this bundle: {reasons}")
    _write(cache, best[1])
    return best


def forget_choice(bundle: Bundle, options: EngineOptions, precision: str | None = None) -> None:
    """Forget what `choose_engine` chose for these, so that the next call measures again.

    Raises:
        OSError: it is remembered and cannot be removed.
    """
    _remembered(bundle, options, precision).unlink(missing_ok=True)


def candidates_for(bundle: Bundle, device: str) -> tuple[tuple[str, str], ...]:
    """(engine, inference precision) that come into question for a bundle on a device."""
    if device != "cpu":
        return CUDA_CANDIDATES
    return (*INTEGER_CANDIDATES, *CPU_CANDIDATES) if bundle.manifest.integer_weights else CPU_CANDIDATES


def _considered(bundle: Bundle, device: str, precision: str | None) -> tuple[tuple[str, str], ...]:
    """`candidates_for` in one inference precision; None takes all. Raises EngineUnavailable where there are none."""
    candidates = candidates_for(bundle, device)
    if precision is None:
        return candidates
    if found := tuple(candidate for candidate in candidates if candidate[1] == precision):
        return found
    offered = ", ".join(dict.fromkeys(computes_in for _, computes_in in candidates))
    why = remedy = ""
    if precision in {computes_in for _, computes_in in INTEGER_CANDIDATES} and device == "cpu":
        why = f", which rounds what is multiplied with integer weights; those of {bundle.folder}'s language model are no integers"
        remedy = ", or export with --lmm int8 or gptq4"
    raise EngineUnavailable(
        f"inference precision: expected one that engine auto considers for this bundle on device {device} ({offered}), "
        f"got {precision}{why}; ask for one of those, or for none{remedy}"
    )


def _median_milliseconds(bundle: Bundle, pipelines: Sequence[Pipeline]) -> list[float]:
    """Of each on the first golden picture, in turns: what else the machine does just then falls on all of them alike."""
    image = bundle.golden()["0.image"]

    def timed(pipeline: Pipeline) -> float:
        time.sleep(REST)
        return pipeline.run(image, pipeline.prompts.encode()).timings["total"]

    turns = [[timed(pipeline) for pipeline in pipelines] for _ in range(TIMED_RUNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def _remembered(bundle: Bundle, options: EngineOptions, precision: str | None) -> Path:
    return cache_folder() / "engine-choice" / f"{_key(bundle, options, precision)}.json"


def _key(bundle: Bundle, options: EngineOptions, precision: str | None) -> str:
    facts = [bundle.id, options.device, str(options.threads), str(precision), platform.machine(), _cpu_model()]
    facts += [str(WAY_OF_COMPUTING), repr(candidates_for(bundle, options.device)), str(_usable_cpus()), repr(GATES)]
    facts += [f"{name} {_installed(name)}" for name in PACKAGES]
    if options.device != "cpu":  # engines built since may be faster, or wrong
        facts += sorted(map(_engine_file, engines_folder().glob("*.engine")))
        facts += _gpus()
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _engine_file(path: Path) -> str:
    """A TensorRT engine by name and content, and whether agvas-verify failed it; that it passed tells a choice nothing new."""
    try:
        record = record_of(path)
    except EngineUnavailable:
        return path.name  # refused when it is opened
    return f"{path.name} {record.sha256}{'' if record.verified is None or record.verified.get('passed') else ' failed'}"


def _usable_cpus() -> int | None:
    """CPUs this process may use, which in a container are not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("model name", "Hardware", "CPU part"))), "")


def _gpus() -> list[str]:
    """Lines that name the driver and the models of the GPUs; none where NVIDIA's driver does not tell them in files (on a Jetson)."""
    told = []
    for path in (NVIDIA / "version", *sorted(NVIDIA.glob("gpus/*/information"))):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        told += [line for line in lines if line.startswith(("NVRM version", "Model"))]
    return told


def _installed(package: str) -> str:
    try:
        return package_version(package)
    except PackageNotFoundError:
        return "absent"


def _read(path: Path) -> Choice | None:
    """None where it is absent or not as we write it: measuring again is always right."""
    try:
        choice = Choice(**json.loads(path.read_text()))
        words = [choice.engine, *choice.rejected, *choice.rejected.values()]
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    ours = all(isinstance(word, str) for word in words) and isinstance(choice.milliseconds, float)
    return choice if ours and choice.inference_precision in INFERENCE_PRECISIONS else None


def _write(path: Path, choice: Choice) -> None:
    """A cache that cannot be written costs a measurement next time, which a warning tells, and nothing else."""
    try:
        write_whole(path, json.dumps(asdict(choice), indent=2).encode())
    except OSError as error:
        warnings.warn(
            f"{path.parent} cannot be written ({error.strerror or error}), so that engine auto will measure again at the next start; set "
            "AGVAS_CACHE to a folder that can be, or name the engine",
            stacklevel=2,
        )
