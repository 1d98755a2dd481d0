"""Writes a bundle: graphs, embeddings, tokenizer, traces, parity, and the manifest last.

Everything goes to a folder of another name that is renamed when it is whole (work.py). Weights stream from the checkpoint into the graphs'
files; whether the model is held in memory depends on the comparison with the reference alone. Reading is the runtime's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from agvas.checkpoint import CheckpointError, OpenedCheckpoint, load, open_checkpoint, weight_files
from agvas.config import ROLES, AGVASConfig
from agvas.interruption import held_back
from agvas.model import AGVAS
from agvas.weights import LazyTensor
from engines.cache import CUDA_FORM
from engines.memory import available_memory
from export.adapters import axis_sizes
from export.cuda_fusion import fuse
from export.estimate import TABLE, Estimate, estimate
from export.gate import Kept
from export.integer_weights import round_inputs, store_integers
from export.judging import Verdict, decide, judge, judge_streamed, why_failed
from export.onnx_writer import export_stage, stage_module, write
from export.outcomes import OutcomesOnDisk
from export.parity import (
    NOTHING_FOUND,
    ParityReport,
    outcome_of_reference,
)
from export.passes import LOW_TYPES, lower_precision
from export.pictures import Pictures, parity_pictures
from export.progress import Progress, counted
from export.quantisation import RTN, Quantisation, check_calibration, quantise
from export.settings import PICTURES, STREAMED_PICTURES, ExportSettings
from export.stage_weights import all_weights, stage_weights
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
from runtime.parity import GATES, Outcome, finite

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino", "numpy", "pillow", "tokenizers")

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
    if settings.calibration is not None:
        check_calibration(settings.calibration)
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
        verdict: Verdict | None = None
        kept, sensitivity = Kept(), dict[str, float]()
        if not settings.compare:
            (folder / PARITY).write_text(json.dumps({"passed": False, "compared": False}) + "\n", encoding="utf-8")
            _write_manifest(folder, Bundle(folder, check_hashes=False, unfinished=True).manifest, {PARITY})
        elif streamed:
            verdict = judge_streamed(folder, opened, settings, quantisation, memory, pictures, progress)
        else:
            if graphs:
                put = partial(_put, folder, graphs, opened.config, settings, quantisation)
                kept, sensitivity = decide(folder, put, model, settings, quantisation, pictures, reference, progress)
                quantisation = quantisation.without(kept.names)
            verdict = judge(folder, model, settings, quantisation, kept, sensitivity, pictures, reference, progress)
        if verdict is not None:
            _write_verdict(folder, verdict)
            if verdict.report.failures and settings.strict:
                raise ParityFailed(why_failed(verdict.report, settings, quantisation, kept, sensitivity))
    progress.end()
    return Bundle(settings.output, check_hashes=held), None if verdict is None else verdict.report


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


def _put(
    folder: Path,
    graphs: Mapping[str, ir.Model],
    config: AGVASConfig,
    settings: ExportSettings,
    quantisation: Quantisation,
    kept: Sequence[str],
) -> Bundle:
    """The bundle in this folder with these layers in float; `graphs` are the float graphs of the stages that hold integers."""
    left = quantisation.without(kept)
    for stage, graph in graphs.items():
        shutil.rmtree(folder / stage)  # not written over: an engine may still have the file mapped
        _write_stage(folder, stage, graph.clone(), settings, left)
    _write_manifest(folder, _manifest(config, settings, left))
    return Bundle(folder, unfinished=True)


def _write_verdict(folder: Path, verdict: Verdict) -> None:
    report, gate = verdict.report, verdict.gate
    manifest = Bundle(folder, check_hashes=False, unfinished=True).manifest  # before its files change
    np.savez_compressed(folder / GOLDEN, **verdict.golden)  # type: ignore[arg-type]
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
