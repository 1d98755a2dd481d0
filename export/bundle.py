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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from agvas.checkpoint import CheckpointError, load
from agvas.config import ROLES
from agvas.model import AGVAS
from engines import EngineOptions
from export.adapters import axis_sizes
from export.onnx_writer import export_stage, stage_module, write
from export.parity import ParityReport, measure
from export.passes import lower_precision
from export.pictures import Pictures, parity_pictures
from export.progress import Progress
from runtime.bundle import EMBEDDINGS, GOLDEN, MANIFEST, PARITY, SCHEMA_VERSION, TOKENIZER, Bundle, FileRecord, Manifest, sha256_of
from runtime.contract import CONTRACT_VERSION, STAGES
from runtime.errors import AgvasError, OutputError, ParityFailed
from runtime.parity import GATES
from runtime.verify import gates_for, open_pipeline

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "openvino", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True)
class ExportSettings:
    """One export.

    Attributes:
        checkpoint: "nano" or a checkpoint folder.
        precision: fp32, fp16 or bf16.
        output: the bundle's folder.
        strict: fail when a gate fails; otherwise write the bundle with the failure in its manifest.
        images: folder of pictures to judge parity on; None takes procedural ones.
        pictures: how many at most.
    """

    checkpoint: str
    precision: str
    output: Path
    strict: bool = True
    images: Path | None = None
    pictures: int = 64


def export_bundle(settings: ExportSettings, progress: Progress) -> tuple[Bundle, ParityReport]:
    """Export a checkpoint and compare it with the reference.

    Raises:
        CheckpointError: see agvas.load.
        ParityFailed: a gate failed and `strict` is set.
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
    with _whole_or_nothing(settings.output) as folder:
        for stage in STAGES:
            progress.begin(f"export {stage}")
            graph = export_stage(stage_module(model, stage), stage, axis_sizes(model.config))
            if settings.precision != "fp32":
                lower_precision(graph, settings.precision)
            write(graph, folder / stage, stage)
        progress.begin("write embeddings and tokenizer")
        table = model.language.get_input_embeddings().weight.detach().numpy()
        np.save(folder / EMBEDDINGS, table.astype(np.float32 if settings.precision == "fp32" else np.float16))
        model.tokenizer.save(str(folder / TOKENIZER))
        np.savez_compressed(folder / GOLDEN)  # filled below, once the bundle can be opened
        _write_manifest(folder, _manifest(model, settings.precision))
        report = _verify(folder, model, settings.precision, pictures, progress)
        if report.failures and settings.strict:
            raise ParityFailed(
                f"the exported masks are not the reference's: {'; '.join(report.failures)}. No bundle was written; "
                "try --precision fp32, or --parity report to write it all the same and look into parity.json"
            )
    return Bundle(settings.output), report


def verification_engine(precision: str) -> str:
    """onnxruntime, the plainest; for bf16 OpenVINO, since onnxruntime's CPU provider has no bfloat16 kernels."""
    return "openvino" if precision == "bf16" else "onnxruntime"


def _verify(folder: Path, model: AGVAS, precision: str, pictures: Pictures, progress: Progress) -> ParityReport:
    bundle, options = Bundle(folder), EngineOptions()
    engine = verification_engine(precision)
    exported = open_pipeline(bundle, engine, options)
    progress.begin("compare with the reference", len(pictures))
    report, golden = measure(model, exported, engine, pictures, GATES[gates_for(bundle, options)], GATES["fp32"], progress.advance)
    np.savez_compressed(folder / GOLDEN, **golden)  # type: ignore[arg-type]
    (folder / PARITY).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    summary = {"engine": engine, "passed": not report.failures, **report.chain.to_json()}
    _write_manifest(folder, replace(bundle.manifest, parity=summary))
    return report


def _manifest(model: AGVAS, precision: str) -> Manifest:
    from importlib.metadata import version

    config = model.config
    return Manifest(
        schema_version=SCHEMA_VERSION,
        contract_version=CONTRACT_VERSION,
        model=config.name,
        precision=dict.fromkeys(STAGES, precision),
        lmm="float",
        preprocessing=config.preprocessing,
        prompts=config.prompts,
        threshold=config.mask_decoder.threshold,
        fusion_weight=config.mask_decoder.fusion_weight,
        sizes=axis_sizes(config),
        parity={},
        files={},
        tools={name: version(name) for name in TOOLS},
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
    width = 4 if precision == "fp32" else 2
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
