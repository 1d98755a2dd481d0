"""Writes a bundle: graphs, embeddings, tokenizer, traces, parity, and the manifest last.

Everything goes to a folder of another name that is renamed when it is whole, so an interrupted export leaves nothing that opens.
Reading is the runtime's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from agvas.checkpoint import CheckpointError, load
from agvas.config import ROLES
from agvas.model import AGVAS
from engines import EngineOptions
from export.adapters import axis_sizes
from export.gate import MEASURED, GateBudget, Kept, by_sensitivity, search, sensitivities
from export.integer_weights import round_inputs, store_integers
from export.onnx_writer import export_stage, stage_module, write
from export.parity import ParityReport, hardest, measure, outcome_of_reference
from export.passes import LOW_TYPES, lower_precision
from export.pictures import Pictures, parity_pictures
from export.progress import Progress
from export.quantisation import ENCODERS, Quantisation, fake_quantised, quantise
from runtime.bundle import EMBEDDINGS, GOLDEN, MANIFEST, PARITY, SCHEMA_VERSION, TOKENIZER, Bundle, FileRecord, Manifest, sha256_of
from runtime.contract import CONTRACT_VERSION, STAGES
from runtime.errors import AgvasError, OutputError, ParityFailed
from runtime.parity import GATES, Outcome, compare, finite
from runtime.verify import limits, open_pipeline, run_outcome

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True)
class ExportSettings:
    """One export.

    Attributes:
        checkpoint: "nano" or a checkpoint folder.
        precision: fp32, fp16, bf16, or int8: both encoders' linear layers in 8 bit, all else fp32.
        output: the bundle's folder.
        strict: fail when a gate fails; otherwise write the bundle with the failure in its manifest.
        images: folder of pictures to judge parity on; None takes procedural ones.
        pictures: how many at most.
        lmm: the language model's weights: float, int8 or gptq4.
        calibration: folder of the plan, or of a GPTQ checkpoint, that they come from; None calibrates on procedural pictures.
        gates: what to change of the precision's gates, by field of runtime.parity.Gates.
        budget: how far layers may go back to float when a gate fails.
    """

    checkpoint: str
    precision: str
    output: Path
    strict: bool = True
    images: Path | None = None
    pictures: int = 64
    lmm: str = "float"
    calibration: Path | None = None
    gates: Mapping[str, Any] = field(default_factory=dict)
    budget: GateBudget = GateBudget()

    def stage_precision(self, stage: str) -> str:
        """What a stage computes in, as the manifest tells it."""
        return self.precision if self.precision != "int8" or stage in ENCODERS else "fp32"


def export_bundle(settings: ExportSettings, progress: Progress) -> tuple[Bundle, ParityReport]:
    """Export a checkpoint and compare it with the reference.

    Raises:
        CheckpointError: see agvas.load.
        ParityFailed: a gate failed and `strict` is set; of integers, with as many layers back in float as the budget allows.
        PlanError, GPTQCheckpointError, RequestError: a calibration that does not fit what is asked for.
        OutputError: the output cannot be written, or is something else than a bundle.
        EngineUnavailable: no engine here can run graphs of this precision to verify them.
    """
    _check_output(settings.output)
    pictures = parity_pictures(settings.images, settings.pictures)  # first: a wrong folder should not be told after the export
    progress.begin("load checkpoint")
    model = load(settings.checkpoint)
    if model.spam is None or model.mask_decoder.roles != ROLES:
        raise CheckpointError(f"{settings.checkpoint} is an ablation ({model.config.name}) and has no bundle; measure it with agvas-eval")
    _check_space(settings.output, model, settings.precision)
    quantisation = _quantise(settings, model, progress)
    with _whole_or_nothing(settings.output) as folder:
        graphs = {}  # in float, of the stages that hold integers
        for stage in STAGES:
            progress.begin(f"export {stage}")
            graph = export_stage(stage_module(model, stage), stage, axis_sizes(model.config))
            _write_stage(folder, stage, graph, settings, quantisation)
            if quantisation.in_stage(stage)[0]:
                graphs[stage] = graph
        progress.begin("write embeddings and tokenizer")
        table = model.language.get_input_embeddings().weight.detach().numpy()
        np.save(folder / EMBEDDINGS, table.astype(np.float16 if settings.precision in LOW_TYPES else np.float32))
        model.tokenizer.save(str(folder / TOKENIZER))
        np.savez_compressed(folder / GOLDEN)  # filled below, once the bundle can be opened
        _write_manifest(folder, _manifest(model, settings, quantisation))
        progress.begin("run the reference", len(pictures))
        reference = []
        for picture in pictures:
            reference.append(outcome_of_reference(model.segment(picture)))
            progress.advance()
        kept, sensitivity = Kept(), dict[str, float]()
        if graphs:
            kept, sensitivity = _decide(folder, graphs, model, settings, quantisation, pictures, reference, progress)
            quantisation = quantisation.without(kept.names)
        report = _verify(folder, model, settings, quantisation, kept, sensitivity, pictures, reference, progress)
        if report.failures and settings.strict:
            if kept.stopped:
                raise ParityFailed(
                    f"the exported masks are not the reference's: {'; '.join(report.failures)}, though {len(kept.names)} layers were put "
                    f"back to float, and {kept.stopped}. No bundle was written; calibrate on pictures of your own, allow more layers, "
                    "or choose a higher precision"
                )
            raise ParityFailed(
                f"the exported masks are not the reference's: {'; '.join(report.failures)}. No bundle was written; "
                "try --precision fp32, or --parity report to write it all the same and look into parity.json"
            )
    return Bundle(settings.output), report


def verification_engine(precision: str) -> str:
    """onnxruntime, the plainest; for bf16 OpenVINO, since onnxruntime's CPU provider has no bfloat16 kernels."""
    return "openvino" if precision == "bf16" else "onnxruntime"


def _quantise(settings: ExportSettings, model: AGVAS, progress: Progress) -> Quantisation:
    """The integers asked for; none for a bundle in float."""
    if settings.lmm == "float" and settings.precision != "int8":
        return Quantisation()
    progress.begin("calibrate" if settings.calibration is None else "read the calibration", 1)
    return quantise(model, settings.lmm, settings.precision == "int8", settings.calibration, progress.show)


def _write_stage(folder: Path, stage: str, graph: ir.Model, settings: ExportSettings, quantisation: Quantisation) -> None:
    """One stage's graph with its integers, in its precision. The graph given stays in float where there are integers."""
    weights, ranges = quantisation.in_stage(stage)
    if weights:
        graph = graph.clone()
        store_integers(graph, weights)
        round_inputs(graph, ranges)
    if settings.stage_precision(stage) in LOW_TYPES:
        lower_precision(graph, settings.precision)
    write(graph, folder / stage, stage)


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
    threshold = model.config.mask_decoder.threshold

    def put(names: Sequence[str]) -> Bundle:
        left = quantisation.without(names)
        for stage, graph in graphs.items():
            shutil.rmtree(folder / stage)  # not written over: an engine may still have the file mapped
            _write_stage(folder, stage, graph.clone(), settings, left)
        _write_manifest(folder, _manifest(model, settings, left))
        return Bundle(folder)

    def trial(names: Sequence[str]) -> list[str]:
        progress.begin(f"try with {len(names)} layers in float", len(pictures))
        bundle = put(names) if names else Bundle(folder)  # as it was written
        pipeline = open_pipeline(bundle, engine, options)
        ours = []
        for picture in pictures:
            ours.append(run_outcome(pipeline, picture, threshold)[0])
            progress.advance()
        return limits(bundle, options).failures(compare(ours, reference))

    failures = trial(())
    if not failures:
        return Kept(trials=[(0, [])]), {}
    progress.begin("measure each layer's effect", len(quantisation.weights))
    chosen = hardest(reference, threshold)[:MEASURED]
    found = sensitivities(model, quantisation, [pictures[i] for i in chosen], [reference[i] for i in chosen], progress.advance)
    kept = search(by_sensitivity(found), trial, settings.budget, failures)
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
    bundle, options = Bundle(folder), EngineOptions()
    engine = verification_engine(settings.precision)
    exported = open_pipeline(bundle, engine, options)
    progress.begin("compare with the reference", len(pictures))
    twin = fake_quantised(model, quantisation) if quantisation.weights else None
    gates = limits(bundle, options)
    report, golden = measure(model, exported, engine, pictures, gates, GATES["fp32"], progress.advance, reference, twin)
    np.savez_compressed(folder / GOLDEN, **golden)  # type: ignore[arg-type]
    kept_float = {
        name: f"changed the anomaly map by {sensitivity[name]:.1e} on average when alone in integers" for name in kept.names
    }
    gate = {
        "limits": asdict(gates),
        "kept_float": kept_float,
        "trials": [{"kept_float": count, "failures": failures} for count, failures in kept.trials],
        "sensitivity": {name: sensitivity[name] for name in by_sensitivity(sensitivity)},
    }
    (folder / PARITY).write_text(json.dumps(finite(report.to_json() | {"gate": gate}), indent=2) + "\n", encoding="utf-8")
    summary = {"engine": engine, "passed": not report.failures, **report.chain.to_json(), "golden": report.golden.to_json()}
    manifest = replace(bundle.manifest, parity=summary)
    if quantisation.weights or kept.names:
        manifest = replace(manifest, quantisation=manifest.quantisation | {"kept_float": kept_float})
    _write_manifest(folder, manifest)
    return report


def _manifest(model: AGVAS, settings: ExportSettings, quantisation: Quantisation) -> Manifest:
    from importlib.metadata import version

    config = model.config
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
        fusion_weight=config.mask_decoder.fusion_weight,
        sizes=axis_sizes(config),
        parity={},
        files={},
        tools={name: version(name) for name in TOOLS},
        gates=asdict(replace(GATES[named], **settings.gates)) if settings.gates else {},
        quantisation={"plan": dict(quantisation.source), "layers": quantisation.in_words()} if quantisation.weights else {},
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    files = {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


def _check_output(output: Path) -> None:
    if output.exists() and not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is not a bundle; choose another --output, or remove it")


def _check_space(output: Path, model: AGVAS, precision: str) -> None:
    """Refuse before the work, not after it, when the disk cannot hold the bundle."""
    width = 2 if precision in LOW_TYPES else 4
    needed = int(sum(parameter.numel() for parameter in model.parameters()) * width * 1.1) + (32 << 20)
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{output} needs about {needed >> 20} MiB and {existing} has {free >> 20} MiB free; free some, or choose another --output"
        )


def _replace(partial: Path, output: Path) -> None:
    """Give the new bundle its name; an older one there goes only after that has worked."""
    if not output.exists():
        os.rename(partial, output)
        return
    old = output.parent / f".{output.name}.old-{uuid.uuid4().hex[:8]}"
    os.rename(output, old)
    try:
        os.rename(partial, output)
    except OSError:
        os.rename(old, output)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block ends well and vanishes otherwise."""
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        _replace(partial, output)
    except AgvasError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"the disk of {output} is full; free some space or choose another --output") from error
        raise OutputError(f"{output}: export stopped by {error}; check the path, or choose another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
