"""Writes a bundle: graphs, embeddings, tokenizer, traces, parity, and the manifest last.

Everything goes to a folder of another name that is renamed when it is whole (work.py). Weights stream from the checkpoint into the graphs'
files; whether the model is held in memory depends on the comparison with the reference alone. Reading is the runtime's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from agvas.checkpoint import CheckpointError, OpenedCheckpoint, load, open_checkpoint, weight_files
from agvas.config import ROLES, AGVASConfig
from agvas.interruption import held_back
from agvas.model import AGVAS
from agvas.weights import LazyTensor
from engines import EngineOptions
from engines.cache import CUDA_FORM
from engines.memory import available_memory
from export.adapters import axis_sizes
from export.cuda_fusion import fuse
from export.estimate import TABLE, Estimate, estimate
from export.gate import MEASURED, GateBudget, Kept, by_sensitivity, search, sensitivities, with_effect
from export.half_range import FULL_SIZE, HalfRange
from export.integer_weights import round_inputs, store_integers
from export.onnx_writer import export_stage, stage_module, write
from export.outcomes import OutcomesOnDisk
from export.parity import (
    NOTHING_FOUND,
    WORDS_PICTURES,
    ParityReport,
    hardest,
    measure,
    measure_modes,
    other_modes,
    outcome_of_reference,
)
from export.passes import LOW_TYPES, lower_precision
from export.pictures import Pictures, parity_pictures
from export.progress import Progress, counted
from export.quantisation import ENCODERS, RTN, Quantisation, fake_quantised, quantise
from export.stage_weights import all_weights, stage_weights
from export.streamed_reference import in_pieces, measure_streamed
from export.streamed_tensor import StreamedTensor
from export.work import Key, kept_folder, left_over, whole_or_nothing
from runtime.bundle import (
    EMBEDDINGS,
    GOLDEN,
    MANIFEST,
    PARITY,
    SCHEMA_VERSION,
    TOKENIZER,
    UNFINISHED,
    Bundle,
    FileRecord,
    Manifest,
    sha256_of,
)
from runtime.contract import CONTRACT_VERSION, STAGES
from runtime.errors import OutputError, ParityFailed, RequestError
from runtime.parity import GATES, Outcome, compare, finite, together
from runtime.verify import limits, open_pipeline, run_outcome

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino", "numpy", "pillow", "tokenizers")

NAMED = 3  # layers that a failed search names
PICTURES, STREAMED_PICTURES = 64, 2  # that parity is judged on where nothing else is asked for; layer by layer each takes minutes


@dataclass(frozen=True)
class ExportSettings:
    """One export.

    Attributes:
        checkpoint: "nano" or a checkpoint folder.
        precision: fp32, fp16, bf16, or int8: both encoders' linear layers in 8 bit, all else fp32.
        output: the bundle's folder.
        strict: fail when a gate fails; otherwise write the bundle with the failure in its manifest.
        compare: compare with the reference; otherwise the bundle says that nobody did, and has no traces for agvas-verify.
        images: folder of pictures to judge parity on; None takes procedural ones.
        pictures: how many at most; None for PICTURES, or STREAMED_PICTURES where the reference is computed layer by layer.
        lmm: the language model's weights: float, int8 or gptq4.
        calibration: folder of the plan, or of a GPTQ checkpoint, that they come from; quantisation.RTN for plain rounding; None
            calibrates on procedural pictures.
        gates: what to change of the precision's gates, by field of runtime.parity.Gates.
        budget: how far layers may go back to float when a gate fails.
        head: the language model's head: float or int8.
        streamed: compute the reference layer by layer; None does so where the model does not fit the memory.
        resume: keep finished stages of an interrupted export, and go on with those of an earlier one; None does so where the reference is
            computed layer by layer.
        force: go on where the estimate says that memory or disk will not do.
        threshold, relative_threshold: the bundle's, in place of the checkpoint's (runtime.masking); None keeps those. Parity is judged by
            them, too.
    """

    checkpoint: str
    precision: str
    output: Path
    strict: bool = True
    images: Path | None = None
    pictures: int | None = None
    lmm: str = "float"
    calibration: Path | None = None
    gates: Mapping[str, Any] = field(default_factory=dict)
    budget: GateBudget = GateBudget()
    head: str = "float"
    compare: bool = True
    streamed: bool | None = None
    resume: bool | None = None
    force: bool = False
    threshold: float | None = None
    relative_threshold: float | None = None

    @property
    def calibrates(self) -> bool:
        """Whether export has to calibrate by itself, for which the model has to be in memory."""
        return self.calibration is None and (self.lmm != "float" or self.precision == "int8")

    def stage_precision(self, stage: str) -> str:
        """What a stage computes in, as the manifest tells it.

        In bf16 the mask decoder stays fp32: its 8 bits alone moved nano's maps by 6e-3, all the other stages' by 1.5e-5.
        """
        if self.precision == "bf16" and stage == "mask_decoder":
            return "fp32"
        return self.precision if self.precision != "int8" or stage in ENCODERS else "fp32"


def export_bundle(settings: ExportSettings, progress: Progress) -> tuple[Bundle, ParityReport | None]:
    """Export a checkpoint and compare it with the reference; None where no comparison was asked for.

    Raises:
        CheckpointError: see agvas.load.
        ParityFailed: a gate failed and `strict` is set; of integers, with as many layers back in float as the budget allows.
        PlanError, GPTQCheckpointError, RequestError: a calibration that does not fit what is asked for.
        OutputError: the output cannot be written, or is something else than a bundle.
        EngineUnavailable: no engine here can run graphs of this precision to verify them.
    """
    if settings.output.is_symlink():  # what it points at is replaced, not the link
        settings = replace(settings, output=settings.output.resolve())
    _check_output(settings.output)
    pictures = parity_pictures(settings.images, settings.pictures or PICTURES)  # first: a wrong folder should not be told after the export
    progress.begin("open checkpoint")
    opened = open_checkpoint(settings.checkpoint)
    rule = opened.config.mask_decoder.mask_rule.changed(settings.threshold, settings.relative_threshold)
    decoder = replace(opened.config.mask_decoder, threshold=rule.threshold, relative_threshold=rule.relative_threshold)
    opened = replace(opened, config=replace(opened.config, mask_decoder=decoder))
    if opened.config.spam is None or opened.config.mask_decoder.roles != ROLES:
        raise CheckpointError(f"{settings.checkpoint} is an ablation ({opened.config.name}) and has no bundle; measure it with agvas-eval")
    memory = available_memory()
    needs = estimate(opened.tensors, settings.precision, settings.lmm, settings.head, memory)
    streamed = settings.streamed if settings.streamed is not None else memory is not None and needs.whole_memory > memory
    pictures = pictures[: STREAMED_PICTURES if streamed and settings.pictures is None else len(pictures)]
    _check_needs(settings, needs, memory, streamed, len(pictures), progress)
    key = _key(settings, opened) if settings.resume or (settings.resume is None and streamed) else None
    if key is None and (left := left_over(settings.output)):
        progress.note(left)
    progress.begin("load checkpoint")
    held = not streamed and (settings.compare or settings.calibrates)
    model = load(settings.checkpoint) if held else opened.skeleton()
    model.config = opened.config
    weights = all_weights(opened)
    given = None if settings.calibrates else _quantise(settings, model, opened, progress)  # one that does not fit is told before the work
    reference = _reference(model, settings, pictures, progress) if held and settings.compare else ()
    quantisation = _quantise(settings, model, opened, progress) if given is None else given
    with whole_or_nothing(settings.output, key, progress.note) as work:
        folder = work.folder
        graphs = {}  # in float, of the stages that hold integers
        skeleton = opened.skeleton()
        for stage in STAGES:
            searched = bool(quantisation.in_stage(stage)[0]) and settings.compare and not streamed
            if work.has(stage) and not searched:
                continue
            progress.begin(f"export {stage}")
            needed = stage_weights(weights, skeleton, stage)
            graph = export_stage(stage_module(skeleton, stage), stage, axis_sizes(opened.config), needed)
            progress.begin(f"write {stage}")
            shutil.rmtree(folder / stage, ignore_errors=True)  # half a stage, or what a comparison that was killed left beside a whole one
            _write_stage(folder, stage, graph, settings, quantisation)
            work.finished(stage)
            if searched:
                graphs[stage] = graph
        progress.begin("write embeddings and tokenizer")
        _write_embeddings(folder / EMBEDDINGS, weights[TABLE], settings.precision)
        opened.tokenizer.save(str(folder / TOKENIZER))
        np.savez_compressed(folder / GOLDEN)  # filled below, once the bundle can be opened
        progress.begin("hash")
        _write_manifest(folder, _manifest(opened.config, settings, quantisation))
        report: ParityReport | None = None
        kept, sensitivity = Kept(), dict[str, float]()
        if not settings.compare:
            (folder / PARITY).write_text(json.dumps({"passed": False, "compared": False}) + "\n", encoding="utf-8")
            _write_manifest(folder, Bundle(folder, check_hashes=False, unfinished=True).manifest, {PARITY})
        elif streamed:
            report = _verify_streamed(folder, opened, settings, quantisation, memory, pictures, progress)
        else:
            if graphs:
                kept, sensitivity = _decide(folder, graphs, model, settings, quantisation, pictures, reference, progress)
                quantisation = quantisation.without(kept.names)
            report = _verify(folder, model, settings, quantisation, kept, sensitivity, pictures, reference, progress)
        if report is not None and report.failures and settings.strict:
            raise ParityFailed(_failed(report, settings, quantisation, kept, sensitivity))
    progress.end()
    return Bundle(settings.output, check_hashes=held), report


def verification_engine(precision: str) -> str:
    """onnxruntime, the plainest; for bf16 OpenVINO, since onnxruntime's CPU provider has no bfloat16 kernels."""
    return "openvino" if precision == "bf16" else "onnxruntime"


def _quantise(settings: ExportSettings, model: AGVAS, opened: OpenedCheckpoint, progress: Progress) -> Quantisation:
    """The integers asked for; none for a bundle in float."""
    if settings.lmm == settings.head == "float" and settings.precision != "int8":
        return Quantisation()
    progress.begin("calibrate" if settings.calibrates else "read the calibration")
    encoders = settings.precision == "int8"
    return quantise(model, opened.tensors, settings.lmm, encoders, settings.calibration, settings.head, progress.show)


def _write_embeddings(path: Path, table: LazyTensor, precision: str) -> None:
    """The token table as .npy, which NumPy maps; its rows stream."""
    kind = ir.DataType.FLOAT16 if precision in LOW_TYPES else ir.DataType.FLOAT
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind.numpy())), "fortran_order": False, "shape": table.shape}
        np.lib.format.write_array_header_1_0(file, header)
        StreamedTensor(table, TABLE).as_type(kind, TABLE).tofile(file)


def _write_stage(folder: Path, stage: str, graph: ir.Model, settings: ExportSettings, quantisation: Quantisation) -> None:
    """One stage's graph with its integers, in its precision. The graph given stays in float where there are integers."""
    weights, ranges = quantisation.in_stage(stage)
    with held_back():  # passes wrap what is raised in them
        if weights:
            graph = graph.clone()
            store_integers(graph, weights)
            round_inputs(graph, ranges)
        if settings.stage_precision(stage) in LOW_TYPES:
            lower_precision(graph, settings.precision)
    write(graph, folder / stage, stage)
    write_cuda_form(folder / stage, stage)


def write_cuda_form(folder: Path, stage: str) -> None:
    """Beside a stage's graph its form for onnxruntime on CUDA, over the same weights; none where nothing of it is fused."""
    model = ir.load(folder / f"{stage}.onnx")
    if fuse(model):
        ir.save(model, folder / f"{stage}{CUDA_FORM}")


def _decide(
    folder: Path,
    graphs: Mapping[str, ir.Model],
    model: AGVAS,
    settings: ExportSettings,
    quantisation: Quantisation,
    pictures: Pictures,
    reference: Sequence[Outcome],
    progress: Progress,
) -> tuple[Kept, dict[str, float]]:
    """Which layers stay float, and the sensitivities that chose them (none where none had to). The folder then holds the graphs so."""
    options, engine = EngineOptions(), verification_engine(settings.precision)
    rule = model.config.mask_decoder.mask_rule

    def put(names: Sequence[str]) -> Bundle:
        left = quantisation.without(names)
        for stage, graph in graphs.items():
            shutil.rmtree(folder / stage)  # not written over: an engine may still have the file mapped
            _write_stage(folder, stage, graph.clone(), settings, left)
        _write_manifest(folder, _manifest(model.config, settings, left))
        return Bundle(folder, unfinished=True)

    def trial(names: Sequence[str]) -> list[str]:
        progress.begin(f"try with {len(names)} layers in float", len(pictures))
        bundle = put(names) if names else Bundle(folder, unfinished=True)  # as it was written
        pipeline = open_pipeline(bundle, engine, options)
        parts = []
        for picture, wanted in zip(pictures, reference, strict=True):
            parts.append(compare([run_outcome(pipeline, picture, rule)[0]], [wanted]))
            progress.advance()
        return limits(bundle, options).failures(together(parts))

    failures = trial(())
    if not failures:
        return Kept(trials=[(0, [])]), {}
    started, found = time.monotonic(), dict[str, float]()
    if settings.budget.most(len(quantisation.weights)):
        progress.begin("measure each layer's effect", len(quantisation.weights))
        chosen, until = hardest(reference, rule)[:MEASURED], started + settings.budget.seconds
        found = sensitivities(model, quantisation, [pictures[i] for i in chosen], [reference[i] for i in chosen], progress.advance, until)
    kept = search(with_effect(found), trial, settings.budget, failures, started, len(quantisation.weights))
    put(kept.names)  # the last trial was not always the chosen one
    return kept, found


def _verify(
    folder: Path,
    model: AGVAS,
    settings: ExportSettings,
    quantisation: Quantisation,
    kept: Kept,
    sensitivity: Mapping[str, float],
    pictures: Pictures,
    reference: Sequence[Outcome],
    progress: Progress,
) -> ParityReport:
    bundle, options = Bundle(folder, unfinished=True), EngineOptions()
    engine = verification_engine(settings.precision)
    exported = open_pipeline(bundle, engine, options)
    progress.begin("compare with the reference", len(pictures))
    twin = fake_quantised(model, quantisation) if quantisation.weights else None
    gates, ranges = limits(bundle, options), HalfRange(bundle, engine)
    report, golden = measure(model, exported, engine, pictures, gates, GATES["fp32"], progress.advance, reference, twin, ranges)
    if modes := other_modes(model):
        hard = hardest(reference, model.config.mask_decoder.mask_rule)[:WORDS_PICTURES]
        progress.begin("compare the modes that write", len(modes) * len(hard))
        report = replace(report, modes=measure_modes(model, exported, [pictures[index] for index in hard], progress.advance))
    del exported  # its weights; what follows opens the stages again, one by one
    report = _within_half_range(report, ranges, progress)
    np.savez_compressed(folder / GOLDEN, **golden)  # type: ignore[arg-type]
    kept_float = {name: f"{_effect(sensitivity[name])} when alone in integers" for name in kept.names}
    gate = {
        "limits": asdict(gates),
        "kept_float": kept_float,
        "trials": [{"kept_float": count, "failures": failures} for count, failures in kept.trials],
        "stopped": kept.stopped,
        "sensitivity": {name: sensitivity[name] for name in by_sensitivity(sensitivity)},
    }
    _write_report(folder, bundle.manifest, report, golden, gate)
    return report


def _effect(sensitivity: float) -> str:
    return "changed the answer" if math.isinf(sensitivity) else f"changed the anomaly map by {sensitivity:.1e} on average"


def _failed(
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


def _verify_streamed(
    folder: Path,
    opened: OpenedCheckpoint,
    settings: ExportSettings,
    quantisation: Quantisation,
    memory: int | None,
    pictures: Pictures,
    progress: Progress,
) -> ParityReport:
    bundle, options = Bundle(folder, check_hashes=False, unfinished=True), EngineOptions()
    engine, gates = verification_engine(settings.precision), limits(bundle, options)
    progress.begin("compare with the reference, layer by layer", len(pictures))
    ranges = HalfRange(bundle, engine, in_pieces(bundle, memory))
    report, golden = measure_streamed(opened, bundle, engine, memory, pictures, gates, progress.advance, quantisation, ranges)
    if ranges.watches and memory is not None and memory < FULL_SIZE:
        progress.note(f"not looked for fp16's end: it takes {FULL_SIZE >> 30} GiB of memory, and {memory / 2**30:.1f} are available")
    else:
        report = _within_half_range(report, ranges, progress)
    gate = {"limits": asdict(gates), "kept_float": {}, "trials": [], "not_searched": "the model was not held in memory"}
    _write_report(folder, bundle.manifest, report, golden, gate)
    return report


def _within_half_range(report: ParityReport, ranges: HalfRange, progress: Progress) -> ParityReport:
    """The report with what fp16 stages reach, and with a failure for each that leaves fp16's range."""
    if not ranges.watches:
        return report
    progress.begin("look for fp16's end")
    ranges.measure()
    progress.note(f"largest number in fp16: {ranges.largest()}")
    return replace(report, fp16_range=ranges.to_json(), failures=[*report.failures, *ranges.failures()])


def _write_report(
    folder: Path, manifest: Manifest, report: ParityReport, golden: Mapping[str, np.ndarray], gate: Mapping[str, Any]
) -> None:
    np.savez_compressed(folder / GOLDEN, **golden)  # type: ignore[arg-type]
    (folder / PARITY).write_text(json.dumps(finite(report.to_json() | {"gate": gate}), indent=2) + "\n", encoding="utf-8")
    summary = {"engine": report.engine, "passed": not report.failures, **report.chain.to_json(), "golden": report.golden.to_json()}
    manifest = replace(manifest, parity=summary)
    if manifest.quantisation or gate["kept_float"]:
        manifest = replace(manifest, quantisation=manifest.quantisation | {"kept_float": gate["kept_float"]})
    _write_manifest(folder, manifest, {MANIFEST, PARITY, GOLDEN})


def _manifest(config: AGVASConfig, settings: ExportSettings, quantisation: Quantisation) -> Manifest:
    from importlib.metadata import version

    precision = {stage: settings.stage_precision(stage) for stage in STAGES}
    named = next(name for name in GATES if name in {settings.lmm, *precision.values()})
    return Manifest(
        schema_version=SCHEMA_VERSION,
        contract_version=CONTRACT_VERSION,
        model=config.name,
        precision=precision,
        lmm=settings.lmm,
        preprocessing=config.preprocessing,
        prompts=config.prompts,
        threshold=config.mask_decoder.threshold,
        relative_threshold=config.mask_decoder.relative_threshold,
        fusion_weight=config.mask_decoder.fusion_weight,
        sizes=axis_sizes(config),
        parity={} if settings.compare else {"passed": False, "compared": False},
        files={},
        tools={name: version(name) for name in TOOLS},
        gates=asdict(replace(GATES[named], **settings.gates)) if settings.gates else {},
        quantisation={"plan": dict(quantisation.source), "layers": quantisation.in_words()} if quantisation.weights else {},
    )


def _write_manifest(folder: Path, manifest: Manifest, changed: Collection[str] | None = None) -> None:
    """Write the manifest with every file's size and hash.

    Args:
        changed: names of what was written since the given manifest was; None reads every file, which takes a minute for 16 GB.
    """

    def record(path: Path) -> FileRecord:
        name = path.relative_to(folder).as_posix()
        if changed is not None and name in manifest.files and name not in changed:
            return manifest.files[name]
        return FileRecord(path.stat().st_size, sha256_of(path))

    files = {
        path.relative_to(folder).as_posix(): record(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, UNFINISHED)
    }
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


def _check_output(output: Path) -> None:
    if output.exists() and not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is not a bundle; choose another --output, or remove it")
    if output.is_mount():
        raise OutputError(f"{output} is a mount point, which nothing whole can replace; choose a folder in it: {output / 'bundle'}")
    existing = _beside(output)
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):  # told now, and not after hours of calibration
        what = "no permission to" if existing.is_dir() else "a file"
        raise OutputError(f"{output}: expected to write in {existing}, got {what}; choose another --output, or change permissions")


def _beside(output: Path) -> Path:
    """The nearest folder above the output that exists: where it is written until it is whole."""
    return next(parent for parent in output.absolute().parents if parent.exists())


def _reference(model: AGVAS, settings: ExportSettings, pictures: Pictures, progress: Progress) -> Sequence[Outcome]:
    """What the reference says of the pictures: before the stages are made, for where it finds nothing no bundle can be judged.

    Where it says no anchors at all, parity tells that.
    """
    progress.begin("run the reference", len(pictures))
    reference, answered, found = OutcomesOnDisk(_beside(settings.output)), False, False
    for picture in pictures:
        reference.append(outcome := outcome_of_reference(model.segment(picture)))
        answered |= outcome.anchor_states is not None
        found |= bool(outcome.mask.any())
        progress.advance()
    if settings.strict and answered and not found:
        raise ParityFailed(f"{NOTHING_FOUND.format(len(reference))}, or --parity none to compare nothing. No bundle was written")
    return reference


def _check_needs(settings: ExportSettings, needs: Estimate, memory: int | None, streamed: bool, pictures: int, progress: Progress) -> None:
    """Tell what the export will take, and refuse before the work, not after it, where disk or memory will not do."""
    existing = _beside(settings.output)
    free = shutil.disk_usage(existing).free + sum(path.stat().st_size for path in kept_folder(settings.output).rglob("*") if path.is_file())
    needed = needs.export_memory
    if settings.compare:
        needed = max(needed, needs.streamed_memory if streamed else needs.whole_memory)
    seconds = needs.export_seconds + (needs.picture_seconds * pictures if streamed and settings.compare else 0)
    judged = f"on {counted(pictures, 'picture')}"
    beside = ["calibrating"] * settings.calibrates + [f"comparing {judged}"] * (settings.compare and not streamed)
    how = "; nothing is compared"
    if settings.compare:
        how = f"; the reference computes layer by layer, {judged}" if streamed else ""
    progress.note(
        f"about {max(needs.disk / 1e9, 0.1):.1f} GB of disk, {needed / 1e9:.1f} GB of memory and "
        f"{counted(max(1, round(seconds / 60)), 'minute')} on two cores{', without ' * bool(beside)}{' and '.join(beside)}{how}"
    )
    if settings.force:
        return
    if free < needs.disk:
        raise OutputError(
            f"{settings.output} needs about {needs.disk >> 20} MiB and {existing} has {free >> 20} MiB free; free some, choose another "
            "--output, or go on all the same with --force"
        )
    if memory is not None and memory < needed:
        raise RequestError(
            f"--checkpoint: this export needs about {needed >> 20} MiB of memory and {memory >> 20} MiB are available; close other "
            "programs, or go on all the same with --force"
        )


def _key(settings: ExportSettings, opened: OpenedCheckpoint) -> Key:
    """What an export's finished stages depend on: the checkpoint's files by name, size and time, this code, the tools; and the settings."""
    from importlib.metadata import version

    def sha256(told: object) -> str:
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def states(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    read = [opened.folder / "config.json", opened.folder / "tokenizer.json", *weight_files(opened.folder)]
    choices = f"--precision {settings.precision} --lmm {settings.lmm} --head {settings.head}"
    if settings.calibration is not None:
        choices += f" --calibration {settings.calibration}"
        if settings.calibration != RTN:
            plan = sha256(states([path for path in sorted(settings.calibration.rglob("*")) if path.is_file()]))
            choices += f", whose files are {plan[:8]}"
    return Key(sha256((states(read), _code_sha256(), [version(tool) for tool in TOOLS], CONTRACT_VERSION)), choices)


def _code_sha256() -> str:
    """Of the packages that make a stage: another commit's stages are other stages."""
    top = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in (path for package in ("agvas", "calibration", "export") for path in sorted((top / package).rglob("*.py"))):
        digest.update(path.relative_to(top).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
