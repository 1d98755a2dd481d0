"""Replays a bundle's golden traces on this machine's engine: does it still give the reference's masks? No torch.

The traces are the PyTorch reference's own, written by export: a few pictures, every stage's outputs, the answer and the map. The
verdict is on masks (runtime.parity); the stages' relative errors stand beside it to tell where a difference begins.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines import EngineFailed, EngineOptions, EngineUnavailable, open_engine
from engines.memory import peak_memory
from runtime.bundle import Bundle
from runtime.contract import AXIS_NAMES, STAGES
from runtime.errors import BundleCorrupt
from runtime.images import read_image
from runtime.masking import MaskRule
from runtime.one_at_a_time import Turn, TurnStage, give_back
from runtime.parity import GATES, Gates, Outcome, Parity, compare, finite, relative_error, together, worst
from runtime.pipeline import NotFinite, Pipeline, Stage, Trace, first_pass
from runtime.prompts import DIRECT

# Keys and values repeat the states' error and would triple the file.
NOT_TRACED = ("present_keys", "present_values")
# Mean mask IoU that another engine's rounding may cost on the golden pictures beyond what export's own cost.
GOLDEN_SLACK = 0.01


@dataclass(frozen=True)
class Verification:
    """Outcome of a verification.

    Attributes:
        passed: every gate held.
        failures: broken gates in words, and once the reason where there was no map.
        parity: agreement with the reference.
        stage_errors: largest relative error by tensor, over the traces; each stage is fed by this engine's own predecessors.
            NaN where a tensor holds one or has another shape; what comes after a NaN that ended the chain is missing.
        seconds: what it took.
    """

    passed: bool
    failures: list[str]
    parity: Parity
    stage_errors: dict[str, float]
    seconds: float


def open_pipeline(bundle: Bundle, engine: str, options: EngineOptions) -> Pipeline:
    """All five stages of a bundle on one engine; with `options.low_memory`, one of them in memory at a time (runtime.one_at_a_time).

    Of those the smallest is opened here and let go.

    Raises:
        EngineUnavailable, EngineFailed: see engines.open_engine.
    """
    manifest = bundle.manifest
    check_precision(bundle, options)
    # The chain sees one picture at a time, and an engine that knows plans for it.
    specs = {name: spec.fixed({"B": 1}, AXIS_NAMES) for name, spec in STAGES.items()}
    prompts = bundle.prompt_encoder()
    if DIRECT in manifest.prompts.instructions:
        specs["language"] = specs["language"].expecting(first_pass(prompts.encode(), manifest.sizes))
    turn = Turn()

    def opened(name: str) -> Stage:
        graph, chosen = bundle.graph(name, engine, options.device), stage_options(name, options)
        if options.low_memory:
            return TurnStage(turn, graph, specs[name], engine, chosen)
        return open_engine(graph, specs[name], engine, chosen)

    if options.low_memory:  # what this engine or device lacks is told now, by a stage of little weight, and not by every picture
        as_asked = [name for name in specs if stage_options(name, options) == options]
        graphs = {name: bundle.graph(name, engine, options.device) for name in as_asked}
        smallest = min(as_asked, key=lambda name: sum(file.stat().st_size for file in graphs[name].parent.iterdir()))
        open_engine(graphs[smallest], specs[smallest], engine, options)
        give_back()
    stages = {name: opened(name) for name in specs}
    return Pipeline(
        stages,
        manifest.preprocessing,
        prompts,
        bundle.embeddings(),
        manifest.sizes,
    )


def check_precision(bundle: Bundle, options: EngineOptions) -> None:
    """Refuse an inference precision that would do nothing for a bundle.

    Raises:
        EngineUnavailable: inputs of integer weights are to be rounded, and there are no such weights.
    """
    if options.rounds_inputs and not bundle.manifest.integer_weights:
        others = "graph or bf16" if options.in_bf16 else "graph"
        raise EngineUnavailable(
            f"inference precision {options.inference_precision} rounds what is multiplied with integer weights, and {bundle.folder} has "
            f"none (lmm float); use precision {others}, or export with --lmm int8 or gptq4"
        )


def stage_options(stage: str, options: EngineOptions) -> EngineOptions:
    """How a stage is run: what draws the map computes in its graph's precision, whatever the engine is asked for.

    The mask decoder alone in bfloat16 changed nano's maps by 6e-3, a pixel in sixteen of a small mask, and its share of the time is
    small. (Bundles in bf16 keep it in fp32 as well, see export.bundle.)
    """
    return replace(options, inference_precision="graph") if stage == "mask_decoder" else options


def run_outcome(pipeline: Pipeline, image: np.ndarray, rule: MaskRule) -> tuple[Outcome, dict[str, np.ndarray]]:
    """Outcome of one picture and its tensors; where the engine fails, one without a map, which no gate lets pass, and no tensors."""
    try:
        return computed_outcome(pipeline, image, rule)
    except EngineFailed as error:
        return _without_map(image, error), {}


def computed_outcome(pipeline: Pipeline, image: np.ndarray, rule: MaskRule) -> tuple[Outcome, dict[str, np.ndarray]]:
    """Outcome of one picture and its tensors; where a NaN ends the chain, one without a map, and the tensors up to there.

    Raises:
        EngineFailed: the engine could not compute, which says nothing about what it computes.
    """
    try:
        trace = pipeline.run(image, pipeline.prompts.encode())
    except NotFinite as error:
        return _without_map(image, error), error.tensors
    return outcome_of(trace, rule), trace.tensors


def _without_map(image: np.ndarray, error: EngineFailed) -> Outcome:
    size = image.shape[:2]
    return Outcome(np.zeros(size, bool), np.full(size, np.nan, np.float32), None, (), str(error))


def outcome_of(trace: Trace, rule: MaskRule) -> Outcome:
    """What parity compares of a pipeline's trace."""
    states = None if trace.anchor_states is None else trace.anchor_states[0]
    return Outcome(rule.mask(trace.anomaly_map), trace.anomaly_map, states, trace.answer)


def gates_for(bundle: Bundle, options: EngineOptions) -> str:
    """Name of the gates that hold: the coarsest precision in the graphs or asked of the engine."""
    precisions = {*bundle.manifest.precision.values(), bundle.manifest.lmm, *options.coarser}
    return next((name for name in GATES if name in precisions), "fp32")


def limits(bundle: Bundle, options: EngineOptions) -> Gates:
    """The gates that hold: those that export judged by, or laxer ones where the engine is asked for a coarser precision."""
    named, asked = gates_for(bundle, EngineOptions()), gates_for(bundle, options)
    gates = Gates(**bundle.manifest.gates) if bundle.manifest.gates else GATES[named]
    return gates if asked == named else gates.allowing(GATES[asked])


def golden_limits(bundle: Bundle, options: EngineOptions) -> Gates:
    """`limits` for the golden pictures, which are the hardest of those that export judged.

    A bundle may pass as a whole while they alone do not; where they fell short in export, an engine is asked to lose little more than
    that. What a failed export lost excuses nothing.
    """
    gates, golden = limits(bundle, options), bundle.manifest.parity.get("golden")
    if not golden or not bundle.manifest.parity.get("passed"):
        return gates
    mean, least = golden["mask_iou_mean"], golden["mask_iou_min"]
    return replace(
        gates,
        mask_iou_mean=gates.mask_iou_mean if mean >= gates.mask_iou_mean else mean - GOLDEN_SLACK,
        mask_iou_min=gates.mask_iou_min if least >= gates.mask_iou_min else least - 5 * GOLDEN_SLACK,
        flips=max(gates.flips, golden["flips"] / golden["images"]),
    )


def verify(bundle: Bundle, pipeline: Pipeline, options: EngineOptions, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Replay the golden traces and judge them by the bundle's gates.

    Args:
        progress: called with (traces done, traces in all).

    Raises:
        EngineFailed: the engine could not compute a trace (out of memory, for instance). One that computes NaN is judged.
    """
    started = time.monotonic()
    golden = bundle.golden()
    rule = bundle.manifest.mask_rule
    count = trace_count(golden)
    parts, errors = [], dict[str, float]()
    for i in range(count):
        outcome, tensors = computed_outcome(pipeline, golden[f"{i}.image"], rule)
        parts.append(compare([outcome], [golden_outcome(golden, i, rule)]))
        for name, tensor in tensors.items():
            wanted = golden.get(f"{i}.tensor.{name}")
            if wanted is not None:
                # After another answer the language stage's rows are others: that is the answers' gate's to judge.
                same = wanted.shape == tensor.shape
                errors[name] = worst(errors.get(name), relative_error(tensor, wanted) if same else float("nan"))
        if progress:
            progress(i + 1, count)
    parity = together(parts)
    failures = golden_limits(bundle, options).failures(parity)
    return Verification(not failures, failures, parity, errors, time.monotonic() - started)


def trace_count(golden: dict[str, np.ndarray]) -> int:
    """How many pictures golden.npz holds."""
    count = sum(key.endswith(".image") for key in golden)
    if not count:
        raise BundleCorrupt("golden.npz holds no trace; export the bundle again")
    return count


def golden_outcome(golden: dict[str, np.ndarray], index: int, rule: MaskRule) -> Outcome:
    """The reference's outcome of one trace."""
    anomaly_map = golden[f"{index}.map"]
    return Outcome(
        rule.mask(anomaly_map),
        anomaly_map,
        golden.get(f"{index}.anchor_states"),
        tuple(golden[f"{index}.answer"].tolist()),
    )


def compare_on_images(
    pipeline: Pipeline, other: Pipeline, images: Sequence[Path], rule: MaskRule, progress: Callable[[int, int], None] | None
) -> Parity:
    """Agreement of two pipelines on a user's own pictures, of which there may be more than fit into memory."""
    parts = []
    for i, path in enumerate(images):
        image = read_image(path)
        parts.append(compare([run_outcome(pipeline, image, rule)[0]], [run_outcome(other, image, rule)[0]]))
        if progress:
            progress(i + 1, len(images))
    return together(parts)


def peak_rss_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    if (found := peak_memory()) is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows: a report without this number beats no report
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summary(bundle: Bundle, verification: Verification) -> dict[str, Any]:
    """The JSON line of agvas-verify."""
    return {
        "bundle": str(bundle.folder),
        "passed": verification.passed,
        "failures": verification.failures,
        "parity": verification.parity.to_json(),
        "threshold": bundle.manifest.threshold,
        "relative_threshold": bundle.manifest.relative_threshold,
        "stage_relative_errors": finite(verification.stage_errors),
        "bytes": bundle.bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "seconds": round(verification.seconds, 3),
    }
