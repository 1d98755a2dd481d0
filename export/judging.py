"""Whether an exported chain's masks are the reference's: what the gates judge, which layers go back to float for them, and what is told.

The measuring is parity.py's, the order in which layers go back to float gate.py's; here both meet the bundle that is being written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agvas.checkpoint import OpenedCheckpoint
from agvas.model import AGVAS
from engines import EngineOptions
from engines.errors import EngineUnavailable
from export.gate import MEASURED, Kept, by_sensitivity, search, sensitivities, with_effect
from export.half_range import FULL_SIZE, HalfRange
from export.parity import WORDS_PICTURES, ParityReport, chain_failures, hardest, measure, measure_modes, other_modes
from export.pictures import Pictures
from export.progress import Progress, counted
from export.quantisation import Quantisation, fake_quantised
from export.settings import ExportSettings
from export.streamed_reference import in_pieces, measure_streamed
from runtime.bundle import Bundle
from runtime.masking import MaskRule
from runtime.parity import GATES, Outcome, Parity, compare, together
from runtime.pipeline import Pipeline
from runtime.verify import limits, open_pipeline, run_outcome

NAMED = 3  # layers that a failed search names


def verification_engine(precision: str) -> str:
    """onnxruntime, the plainest; for bf16 OpenVINO, since onnxruntime's CPU provider has no bfloat16 kernels."""
    return "openvino" if precision == "bf16" else "onnxruntime"


@dataclass(frozen=True)
class Verdict:
    """What a comparison leaves: its report, the reference's traces for the bundle, and the gate's own record for parity.json."""

    report: ParityReport
    golden: Mapping[str, np.ndarray]
    gate: Mapping[str, Any]


def decide(
    folder: Path,
    put: Callable[[Sequence[str]], Bundle],
    model: AGVAS,
    settings: ExportSettings,
    quantisation: Quantisation,
    pictures: Pictures,
    reference: Sequence[Outcome],
    progress: Progress,
) -> tuple[Kept, dict[str, float]]:
    """Which layers stay float, and the sensitivities that chose them (none where none had to). The folder then holds the graphs so.

    Args:
        folder: the bundle as it was written, all in integers.
        put: writes the bundle there with these layers in float.
        reference: the reference's outcome of each picture.
    """
    engine, rule = verification_engine(settings.precision), model.config.mask_decoder.mask_rule
    judged, _ = _judged(Bundle(folder, unfinished=True), engine)

    def trial(names: Sequence[str]) -> list[str]:
        what = f"try with {counted(len(names), 'layer')} put back to float" if names else "try with all layers asked for in integers"
        progress.begin(what, len(judged) * len(pictures))
        bundle = put(names) if names else Bundle(folder, unfinished=True)
        failures = []
        for options in judged:
            parity = _chain(open_pipeline(bundle, engine, options), pictures, reference, rule, progress)
            failures += _told_of(options, limits(bundle, options).failures(parity))
        return failures

    failures = trial(())
    if not failures:
        return Kept(trials=[(0, [])]), {}
    started, found = time.monotonic(), dict[str, float]()
    if settings.budget.most(len(quantisation.weights)):
        progress.begin("measure each layer's effect", len(quantisation.weights))
        chosen, until = hardest(reference, rule)[:MEASURED], started + settings.budget.seconds
        hard = [pictures[i] for i in chosen], [reference[i] for i in chosen]
        found = sensitivities(model, quantisation, *hard, progress.advance, until, rounds_inputs=len(judged) > 1)
    kept = search(with_effect(found), trial, settings.budget, failures, started, len(quantisation.weights))
    put(kept.names)  # the last trial was not always the chosen one
    return kept, found


def _judged(bundle: Bundle, engine: str) -> tuple[list[EngineOptions], str]:
    """How the engine computes what the gates judge, and why not in another way.

    That is as the graphs state and, of a language model in 8 bit, once more with its inputs rounded to 8 bits while running. In 4 bit that
    is the target's choice, for agvas-verify to judge there.
    """
    if bundle.manifest.lmm != "int8":
        return [EngineOptions()], ""
    rounding = EngineOptions(inference_precision="int8")
    try:
        open_pipeline(bundle, engine, rounding)
    except EngineUnavailable as error:
        return [EngineOptions()], f"not with the language model's inputs in 8 bits: {error}"
    return [EngineOptions(), rounding], ""


def _chain(pipeline: Pipeline, pictures: Pictures, reference: Sequence[Outcome], rule: MaskRule, progress: Progress) -> Parity:
    """The exported chain's agreement with the reference."""
    parts = []
    for picture, wanted in zip(pictures, reference, strict=True):
        parts.append(compare([run_outcome(pipeline, picture, rule)[0]], [wanted]))
        progress.advance()
    return together(parts)


def _told_of(options: EngineOptions, failures: list[str]) -> list[str]:
    """Failures with the way of computing that they are of, where it is not the graphs' own."""
    return [f"with inputs in 8 bits, {failure}" for failure in failures] if options.rounds_inputs else failures


def judge(
    folder: Path,
    model: AGVAS,
    settings: ExportSettings,
    quantisation: Quantisation,
    kept: Kept,
    sensitivity: Mapping[str, float],
    pictures: Pictures,
    reference: Sequence[Outcome],
    progress: Progress,
) -> Verdict:
    """The bundle in this folder against the reference held in memory."""
    bundle, engine = Bundle(folder, unfinished=True), verification_engine(settings.precision)
    (options, *rounding), not_judged = _judged(bundle, engine)
    if not_judged:
        progress.note(f"judged {not_judged}")
    exported = open_pipeline(bundle, engine, options)
    progress.begin("compare with the reference", len(pictures))
    twin = fake_quantised(model, quantisation) if quantisation.weights else None
    gates, ranges = limits(bundle, options), HalfRange(bundle, engine)
    report, golden = measure(model, exported, engine, pictures, gates, GATES["fp32"], progress.advance, reference, twin, ranges)
    rule = model.config.mask_decoder.mask_rule
    if modes := other_modes(model):
        hard = hardest(reference, rule)[:WORDS_PICTURES]
        progress.begin("compare the modes that write", len(modes) * len(hard))
        report = replace(report, modes=measure_modes(model, exported, [pictures[index] for index in hard], progress.advance))
    del exported  # its weights; what follows opens the stages again
    for coarser in rounding:
        progress.begin("compare with inputs in 8 bits", len(pictures))
        parity = _chain(open_pipeline(bundle, engine, coarser), pictures, reference, rule, progress)
        failures = _told_of(coarser, chain_failures(limits(bundle, coarser), parity))
        report = replace(report, int8_inputs=parity, failures=[*report.failures, *failures])
    gate = {
        "limits": asdict(gates),
        "kept_float": {name: f"{_effect(sensitivity[name])} when alone in integers" for name in kept.names},
        "trials": [{"kept_float": count, "failures": failures} for count, failures in kept.trials],
        "stopped": kept.stopped,
        "sensitivity": {name: sensitivity[name] for name in by_sensitivity(sensitivity)},
        "not_judged": not_judged,
    }
    return Verdict(_within_half_range(report, ranges, progress), golden, gate)


def judge_streamed(
    folder: Path,
    opened: OpenedCheckpoint,
    settings: ExportSettings,
    quantisation: Quantisation,
    memory: int | None,
    pictures: Pictures,
    progress: Progress,
) -> Verdict:
    """The bundle in this folder against the reference computed layer by layer."""
    bundle, options = Bundle(folder, check_hashes=False, unfinished=True), EngineOptions()
    engine, gates = verification_engine(settings.precision), limits(bundle, options)
    progress.begin("compare with the reference, layer by layer", len(pictures))
    ranges = HalfRange(bundle, engine, in_pieces(bundle, memory))
    report, golden = measure_streamed(opened, bundle, engine, memory, pictures, gates, progress.advance, quantisation, ranges)
    if ranges.watches and memory is not None and memory < FULL_SIZE:
        progress.note(f"not looked for fp16's end: it takes {FULL_SIZE >> 30} GiB of memory, and {memory / 2**30:.1f} are available")
    else:
        report = _within_half_range(report, ranges, progress)
    not_judged = "not with the language model's inputs in 8 bits: the model was not held in memory" if settings.lmm == "int8" else ""
    if not_judged:
        progress.note(f"judged {not_judged}")
    searched = {"kept_float": {}, "trials": [], "not_searched": "the model was not held in memory", "not_judged": not_judged}
    return Verdict(report, golden, {"limits": asdict(gates), **searched})


def _within_half_range(report: ParityReport, ranges: HalfRange, progress: Progress) -> ParityReport:
    """The report with what fp16 stages reach, and with a failure for each that leaves fp16's range."""
    if not ranges.watches:
        return report
    progress.begin("look for fp16's end")
    ranges.measure()
    progress.note(f"largest number in fp16: {ranges.largest()}")
    return replace(report, fp16_range=ranges.to_json(), failures=[*report.failures, *ranges.failures()])


def _effect(sensitivity: float) -> str:
    return "changed the answer" if math.isinf(sensitivity) else f"changed the anomaly map by {sensitivity:.1e} on average"


def why_failed(
    report: ParityReport, settings: ExportSettings, quantisation: Quantisation, kept: Kept, sensitivity: Mapping[str, float]
) -> str:
    """That a gate failed, which layers a search found the most sensitive, and what may help."""
    told = f"the exported masks are not the reference's: {'; '.join(report.failures)}"
    if kept.stopped:
        told += f", though {counted(len(kept.names), 'layer')} went back to float, and {kept.stopped}"
        if worst := with_effect(sensitivity)[:NAMED]:
            told += f"; the most sensitive, alone in integers: {', '.join(f'{name} {_effect(sensitivity[name])}' for name in worst)}"
    remedies = ["--precision fp32"]
    if quantisation.weights and (kept.stopped or not kept.trials):  # otherwise the integers passed, and something else did not
        remedies = ["a larger --gate-budget"] if "--gate-budget" in kept.stopped else []
        if settings.lmm != "float" or settings.precision == "int8":
            remedies.append("--calibration with a plan that agvas-calibrate made of your own pictures")
        remedies += [f"{option} float" for option, choice in (("--lmm", settings.lmm), ("--head", settings.head)) if choice != "float"]
        if settings.precision != "fp32":
            remedies.append(f"--precision {'fp16' if settings.precision == 'int8' else 'fp32'}")
    told += f". No bundle was written; try {', '.join(remedies)}"
    return f"{told}, or --parity report to write it all the same and look into parity.json"
