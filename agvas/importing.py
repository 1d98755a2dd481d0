"""Puts a checkpoint together from published parts: a small folder with config.json, tokenizer.json and parts.json. No weight is copied.

The configuration is the trained part's own where it brings one (agvas-train writes it), else what the base's and the pixel encoder's files
say. The folder is opened before it gets its name, so one that stands there fits, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from agvas.checkpoint import CheckpointError, OpenedCheckpoint, examine, fitting, open_checkpoint
from agvas.config import AGVASConfig
from agvas.mask_decoder import MaskDecoder
from agvas.parts import FILE, LLAVAS, NEW_STAGES, Gathered, Parts, deepspeed_weights, gather, model_type
from agvas.published import Derived, derive, with_anchors, with_vocabulary
from agvas.spam import SPAM
from agvas.torch_file import torch_file
from agvas.vision_transformer import VisionTransformer
from agvas.writing import disk_errors

UNTRAINED = "untrained.safetensors"
PIXEL_SIZE = 1024  # side of the pictures of a pixel encoder that takes any


@dataclass(frozen=True)
class ImportSettings:
    """One import; paths as the user gave them.

    Attributes:
        base, pixel_encoder, trained: see parts.Parts.
        output: the folder to write.
        config, tokenizer: files to take instead of what the parts bring.
        untrained: seed of the parts that a training will make, where none of them exists yet; None where they must.
        pixel_size: side of the pictures of a pixel encoder that takes any (DINOv3); None for PIXEL_SIZE.
    """

    base: Path
    output: Path
    pixel_encoder: Path | None = None
    trained: tuple[Path, ...] = ()
    config: Path | None = None
    tokenizer: Path | None = None
    untrained: int | None = None
    pixel_size: int | None = None


@dataclass(frozen=True)
class Imported:
    """The checkpoint, and what a user should know of it, in words."""

    opened: OpenedCheckpoint
    notes: tuple[str, ...]


def import_parts(settings: ImportSettings) -> Imported:
    """Write `settings.output`, or nothing.

    Raises:
        CheckpointError: parts that are missing, damaged, or do not fit together; says which tensors, and what to give.
    """
    output = settings.output
    if output.exists() and not (output / FILE).is_file():
        raise CheckpointError(f"{output} exists and was not written by agvas-import; choose another --output")
    given = [("--base", settings.base), ("--pixel-encoder", settings.pixel_encoder), *(("--trained", path) for path in settings.trained)]
    for option, path in given:
        if path is None:
            continue
        if not path.exists():
            raise CheckpointError(f"{option} {path}: no such file or folder; correct the path")
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            raise CheckpointError(f"{output} would replace {path}, which it is to be made of; choose another --output")
    if settings.base.is_file():
        swapped = settings.pixel_encoder is not None and settings.pixel_encoder.is_dir()
        what = "are --base and --pixel-encoder swapped?" if swapped else "give the folder that holds its config.json and weights"
        raise CheckpointError(f"--base {settings.base}: expected a folder of Hugging Face's or of this package, got a file; {what}")
    _check_given(settings)
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    try:
        notes = _write(partial, settings)
        fitting(examine(partial), "the parts do not fit together")
        if output.exists():
            shutil.rmtree(output)
        os.rename(partial, output)
    except ValueError as error:
        raise CheckpointError(str(error).replace(f"{partial}{os.sep}", f"{output}{os.sep}")) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Imported(open_checkpoint(output), tuple(notes))


def _check_given(settings: ImportSettings) -> None:
    """CheckpointError for a base that is none, and for what would be taken and not used, or used in place of what the base has."""
    base, encoder = settings.base, settings.pixel_encoder
    if not (base / "config.json").is_file():
        inside = sorted(path.parent for path in base.glob("*/config.json") if model_type(path.parent) in LLAVAS)
        remedy = f"{inside[0]} looks like one" if inside else "copy it from where the base is published"
        raise CheckpointError(
            f"--base {base}: expected a folder of Hugging Face's or a checkpoint of this package, got one that has no config.json; {remedy}"
        )
    if encoder is not None and model_type(base) is None:
        raise CheckpointError(
            f"--pixel-encoder {encoder}: expected none with --base {base}, a checkpoint that has one; leave it out, or give the "
            "published base"
        )
    if settings.pixel_size is not None and (encoder is None or model_type(encoder) != "dinov3_vit"):
        raise CheckpointError(
            f"--pixel-size {settings.pixel_size}: expected it with a DINOv3 alone, got {encoder or 'no --pixel-encoder'}, whose own size "
            "holds; leave it out"
        )


def _write(folder: Path, settings: ImportSettings) -> list[str]:
    given = [_from(folder, path) for path in settings.trained]
    pixel = None if settings.pixel_encoder is None else _from(folder, settings.pixel_encoder)
    parts = Parts(_from(folder, settings.base), pixel, tuple(given))
    gathered = gather(folder, parts)
    notes = list(gathered.notes)
    for path in settings.trained:
        states = deepspeed_weights(path) if path.is_dir() else None
        if states is not None and any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in torch_file(states, "module").values()):
            notes.append(f"{states} holds 16-bit weights; the optimiser's float32 ones are what zero_to_fp32.py in {path} writes")
    config = _config(settings, gathered, notes)
    tokenizer = _tokenizer(settings, config, notes)
    if settings.untrained is None and not any(name.startswith("mask_decoder.") for name in gathered.tensors):
        raise ValueError("no part has a mask decoder; give what a training left (--trained FOLDER), or --untrained to train one from here")
    if settings.untrained is not None:
        if any(name.startswith(NEW_STAGES) for name in gathered.tensors):
            raise ValueError("--untrained: the parts hold SPAM or a mask decoder already; leave it out")
        _new_parts(folder / UNTRAINED, config, settings.untrained)
        parts = dataclasses.replace(parts, trained=(*parts.trained, UNTRAINED))
        notes.append(f"SPAM and mask decoder are random (seed {settings.untrained}): train them before anything else")
    (folder / "config.json").write_text(config.to_json())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / FILE).write_text(parts.to_json())
    return notes


def _from(folder: Path, path: Path) -> str:
    """The path for parts.json: absolute ones as they are, others from the folder, which may then move together with what they name.

    Where folders are links, from where they lead: that is where ".." goes on. What a link of a file is called stays.
    """
    return str(path) if path.is_absolute() else os.path.relpath(path.parent.resolve() / path.name, folder.resolve())


def _config(settings: ImportSettings, gathered: Gathered, notes: list[str]) -> AGVASConfig:
    own = [path / "config.json" for path in (*reversed(settings.trained), settings.base) if path.is_dir() and model_type(path) is None]
    file = next((path for path in ([settings.config] if settings.config else own) if path.is_file()), settings.config)
    derived = None
    if model_type(settings.base) is not None:
        derived = derive(settings.base, gathered.tensors, settings.pixel_encoder, settings.pixel_size or PIXEL_SIZE)
    if file is None:
        if derived is None:
            raise ValueError(f"{settings.base} has no config.json; give a LLaVA in Hugging Face's layout or a checkpoint of this package")
        notes += [f"assumed, since no file says it: {text}" for text in derived.assumed]
        return derived.config
    try:
        config = with_vocabulary(AGVASConfig.from_json(file.read_text()), gathered.tensors)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error
    if derived is not None:
        _compare(file, config, derived, notes)
    return config


def _compare(file: Path, config: AGVASConfig, derived: Derived, notes: list[str]) -> None:
    """Sizes that leave no trace in a tensor's shape (heads, epsilons, rotary base) must be the base's, too."""
    differing = []
    for part in ("pixel", "semantic", "language"):
        ours, theirs = dataclasses.asdict(getattr(config, part)), dataclasses.asdict(getattr(derived.config, part))
        differing += [f"{part}.{name} is {ours[name]}, the base's {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise ValueError(f"{file} does not belong to this base and pixel encoder: {'; '.join(differing)}; give those it was trained on")
    if config.preprocessing != derived.config.preprocessing:
        notes.append(f"means, deviations or sizes of the pictures are those of {file}, which differ from the published parts'")


def _tokenizer(settings: ImportSettings, config: AGVASConfig, notes: list[str]) -> Tokenizer:
    places = [path / "tokenizer.json" for path in (*reversed(settings.trained), settings.base) if path.is_dir()]
    file = settings.tokenizer or next((path for path in places if path.is_file()), None)
    if file is None:
        raise ValueError(f"{settings.base} lacks tokenizer.json; copy it from where the base is published, or give --tokenizer FILE")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} cannot be read: {error}; copy the file again") from error
    if added := with_anchors(tokenizer, config.prompts):
        ids = ", ".join(f"{anchor} = {tokenizer.token_to_id(anchor)}" for anchor in added)
        notes.append(f"added to the tokenizer of {file}: {ids}; where the training gave them other ids, give its --tokenizer FILE")
    return tokenizer


def _new_parts(path: Path, config: AGVASConfig, seed: int) -> None:
    """SPAM and mask decoder, and a ViT's neck, as their modules start."""
    torch.manual_seed(seed)
    width = config.pixel.output_width
    decoder = MaskDecoder(config.mask_decoder, config.language.width, width, config.pixel.grid)
    state = {f"mask_decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    if config.spam is not None:
        spam = SPAM(config.semantic.width, width, config.spam.width, config.spam.heads, config.language.width)
        state |= {f"spam.{name}": tensor for name, tensor in spam.state_dict().items()}
    if config.pixel.kind != "sam":
        neck = VisionTransformer(dataclasses.replace(config.pixel, layers=1)).neck  # the backbone is not kept
        state |= {f"pixel_encoder.neck.{name}": tensor for name, tensor in neck.state_dict().items()}
    with disk_errors(path):
        save_file(state, path, metadata={"format": "pt"})


