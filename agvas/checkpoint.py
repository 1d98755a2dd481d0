"""Load and save AG-VAS checkpoints: a folder with config.json, tokenizer.json and weights.

The weights are model.safetensors, or its shards with an index, or parts.json, which points at a published base, a pixel encoder and what
was trained (parts.py). No code of a file is run. Loading is strict: a missing, unexpected or wrong-shaped tensor is named. Weights are
saved in the dtype the model has; nano's are 16 bit to keep the package small and are computed with in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTRopePositionEmbedding

from agvas.bundle_contents import MANIFEST
from agvas.config import AGVASConfig
from agvas.layouts import beyond
from agvas.lora import CONFIG as ADAPTER_CONFIG
from agvas.misplaced import misplaced
from agvas.model import AGVAS
from agvas.parts import EMBEDDINGS, HEAD, NEW_STAGES, TRAINED_FILE, Gathered, Parts, gather, model_type
from agvas.parts import FILE as PARTS_FILE
from agvas.weights import LazyTensor, LazyTensors, check_finite, in_type, index_of, overflows, safetensors_folder
from agvas.writing import disk_errors

NANO = Path(__file__).parent / "nano"
WEIGHTS = "model.safetensors"
TOWER = "semantic_encoder.encoder.layers."
_TABLES = (EMBEDDINGS, HEAD)
FILES = ("config.json", WEIGHTS, "tokenizer.json")
SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth")
INDEX = f"{WEIGHTS}.index.json"
LISTED = 12  # of what does not fit, so that the list stays readable


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or not an AG-VAS."""


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint given as "nano" or as a path, once all its files are seen to be there.

    Raises:
        CheckpointError: names what is missing and where, and how to import what is a checkpoint of another kind.
    """
    folder = NANO if str(checkpoint) == "nano" else Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {checkpoint} is not a folder; give nano or a folder with {', '.join(FILES)}")
    if (known := misplaced(folder)) is not None:
        raise CheckpointError(f"checkpoint {folder} is {known.layout}, no checkpoint: {known.use}")
    if (kind := model_type(folder)) is not None:
        raise CheckpointError(
            f"checkpoint {folder} is a {kind} of Hugging Face; put the parts together first: "
            f"agvas-import --base {folder} --pixel-encoder FILE --trained FOLDER --output CHECKPOINT"
        )
    if (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint {folder} is a bundle, which agvas-export has made of one: give the checkpoint that it was made of; the bundle "
            f"itself runs with agvas-segment --bundle {folder}"
        )
    stored = next((name for name in (WEIGHTS, INDEX, PARTS_FILE) if (folder / name).is_file()), WEIGHTS)
    if missing := [name for name in ("config.json", stored, "tokenizer.json") if not (folder / name).is_file()]:
        remedy = f"it needs {', '.join(FILES)}" if len(missing) < len(FILES) else "give nano, or a folder that has them"
        if stored in missing and any((folder / name).is_file() for name in (TRAINED_FILE, ADAPTER_CONFIG, "latest")):
            remedy += f"; it is what a training left: agvas-import --base FOLDER --trained {folder} --output CHECKPOINT"
        raise CheckpointError(f"checkpoint {folder} lacks {', '.join(missing)}; {remedy}")
    return folder


def weight_files(checkpoint: str | Path) -> list[Path]:
    """The files that make a checkpoint's weights what they are: model.safetensors, or its shards, or parts.json and what it names,
    of a base that is a checkpoint of this package its own.

    Raises:
        CheckpointError: see checkpoint_folder.
    """
    folder = checkpoint_folder(checkpoint)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        if (folder / INDEX).is_file():
            return [folder / INDEX, *(folder / shard for shard in sorted(set(index_of(folder / INDEX).values())))]
        parts = Parts.read(folder / PARTS_FILE)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    files = [folder / PARTS_FILE]
    base = folder / parts.base
    if base.resolve() != folder.resolve() and base.is_dir() and model_type(base) is None:
        files += weight_files(base)
    for given in (parts.base, parts.pixel_encoder, *parts.trained):
        path = folder / given if given is not None else folder / PARTS_FILE
        files += sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose config and tokenizer are read and whose tensors all fit, none of them in memory yet.

    Attributes:
        tensors: by the names of AGVAS.state_dict(), every one of them and no other, in the shapes of `config`.
    """

    folder: Path
    config: AGVASConfig
    tokenizer: Tokenizer
    tensors: LazyTensors

    def skeleton(self) -> AGVAS:
        """The model on the meta device: its shapes and names, no memory."""
        with torch.device("meta"):
            return AGVAS(self.config, self.tokenizer).eval()


def open_checkpoint(checkpoint: str | Path = "nano") -> OpenedCheckpoint:
    """Read everything of a checkpoint but its tensors' values.

    Raises:
        CheckpointError: missing files or parts, a config or tokenizer that is none, tensors missing, unexpected or of another shape.
    """
    examined = examine(checkpoint)
    return fitting(examined, f"{examined.weights} does not fit its config.json")


def fitting(examined: Examined, otherwise: str) -> OpenedCheckpoint:
    """The checkpoint. CheckpointError where it does not fit, with the problems behind `otherwise`."""
    if problems := examined.problems:
        listed = "; ".join(problems[:LISTED]) + (f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else "")
        raise CheckpointError(f"{otherwise}: {listed}")
    return examined.opened


@dataclass(frozen=True)
class Examined:
    """A checkpoint as it is found, whether it fits or not.

    Attributes:
        weights: the file that holds the weights or says where they are.
        problems: every tensor that is missing, unexpected or of another shape, in words.
    """

    opened: OpenedCheckpoint
    weights: Path
    gathered: Gathered
    problems: list[str]


def examine(checkpoint: str | Path) -> Examined:
    """Read everything but the tensors' values, and list what does not fit.

    Raises:
        CheckpointError: missing or damaged files or parts, a config or tokenizer that is none.
    """
    folder = checkpoint_folder(checkpoint)
    try:
        config = AGVASConfig.from_json((folder / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}; copy the file again") from error
    where, gathered = folder / WEIGHTS, Gathered()
    try:
        if (folder / PARTS_FILE).is_file() and not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
            where = folder / PARTS_FILE
            gathered = gather(folder, Parts.read(where))
        else:
            gathered.tensors = safetensors_folder(folder, WEIGHTS)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    tensors = computed_with(config, gathered)
    opened = OpenedCheckpoint(folder, config, tokenizer, tensors)
    return Examined(opened, where, gathered, sorted(gathered.problems + misfits(opened.skeleton(), tensors, gathered)))


def computed_with(config: AGVASConfig, gathered: Gathered) -> dict[str, LazyTensor]:
    """What of the tensors a model of this config has: of a published tower no layers behind the last that is computed, and a tied head."""
    layers = beyond(gathered.tensors, TOWER, config.semantic.layers) if gathered.published else set()
    kept = {name: tensor for name, tensor in gathered.tensors.items() if name not in layers}
    if config.language.tied_head and EMBEDDINGS in kept:
        kept.setdefault(HEAD, kept[EMBEDDINGS])
    return kept


def misfits(skeleton: AGVAS, tensors: Mapping[str, LazyTensor], gathered: Gathered) -> list[str]:
    """What tensors lack, have too much, or have in another shape than the model, each in words.

    Args:
        gathered: tells which part a tensor is from and what it is called there; empty where there are no parts.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    has_neck = skeleton.config.pixel.kind == "sam"
    problems = []
    for name in expected.keys() - tensors.keys():
        problems.append(f"missing {name} {list(expected[name])} ({_of_missing(name, has_neck, gathered)})")
    for name in tensors.keys() - expected.keys():
        problems.append(f"unexpected {name} {list(tensors[name].shape)} ({_of_misfit(name, gathered)})")
    for name in expected.keys() & tensors.keys():
        if (found := tensors[name].shape) != expected[name]:
            problems.append(f"{name} is {list(found)}, expected {list(expected[name])} ({_of_misfit(name, gathered, name in _TABLES)})")
    tokens = max(skeleton.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if tokens > (rows := skeleton.config.language.vocabulary):
        problems.append(f"tokenizer.json has ids up to {tokens - 1}, the vocabulary {rows} rows (give the tokenizer of these weights)")
    return problems


def load(checkpoint: str | Path = "nano", dtype: torch.dtype = torch.float32, left: str | None = None) -> AGVAS:
    """The model, on the CPU, in evaluation mode, in `dtype`.

    Args:
        left: a module that stays on the meta device, for a caller who reads its weights himself, one part at a time; None for all.

    Raises:
        CheckpointError: see open_checkpoint; a tensor holds NaN or infinite values, or some that `dtype` does not hold.
    """
    opened = open_checkpoint(checkpoint)
    model = opened.skeleton()
    tied = {HEAD} if opened.config.language.tied_head else set()
    kept = [name for name in opened.tensors if name not in tied and not (left and name.startswith(f"{left}."))]
    state = {name: _loaded(opened.tensors[name], dtype, name) for name in kept}
    model.load_state_dict(state, assign=True, strict=not tied and not left)  # open_checkpoint has compared every name
    if tied:
        model.language.tie_weights()
    fill_buffers(model)
    return model


def save(model: AGVAS, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json, model.safetensors and tokenizer.json, each whole or not at all.

    Args:
        dtype: of the floats, None for their own. A tensor with values beyond it, as a batch norm's variances can be, stays as it is.

    Raises:
        CheckpointError: a tensor holds NaN or infinite values.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: _stored(tensor.detach(), dtype, name).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.language.tied_head:
        del state[HEAD]  # the embeddings, which the file has once
    partial = {name: folder / f"{name}.partial" for name in FILES}
    partial["config.json"].write_text(model.config.to_json())
    with disk_errors(partial["model.safetensors"]):
        save_file(state, partial["model.safetensors"], metadata={"format": "pt"})
    model.tokenizer.save(str(partial["tokenizer.json"]))
    for name, path in partial.items():
        os.replace(path, folder / name)


def _loaded(lazy: LazyTensor, dtype: torch.dtype, name: str) -> Tensor:
    try:
        tensor = lazy.read()
        check_finite(tensor, name)
        return in_type(tensor, dtype, name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _stored(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    try:
        check_finite(tensor, name)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if dtype is None or not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    return tensor if overflows(tensor, made) else made


def _of_missing(name: str, has_neck: bool, gathered: Gathered) -> str:
    """Where a missing tensor ought to be, and what to do; `has_neck`: the pixel encoder is published with one."""
    if gathered.base is None:
        return "copy the whole checkpoint again"
    if name.startswith(NEW_STAGES) or (not has_neck and name.startswith("pixel_encoder.neck.")):
        return "it was trained: is the trained part whole, and given?"
    part = gathered.pixel_encoder if name.startswith("pixel_encoder.") and gathered.pixel_encoder is not None else gathered.base
    return f"{_whose(name, part, gathered)}: copy {'the whole file' if part.is_file() else 'every file of it'} again"


def _of_misfit(name: str, gathered: Gathered, resized: bool = False) -> str:
    """Where a tensor is from that does not belong here, and what to do; `resized`: a table or head that has another size."""
    if gathered.base is None:
        return "weights or config.json are of another model: copy the whole checkpoint again"
    whose = _whose(name, gathered.origins.get(name, gathered.base), gathered)
    if resized:
        return f"{whose}: embeddings and head were resized to different vocabularies, give both as they were trained"
    return f"{whose}: it is of another model, give the part that the others were made for"


def _whose(name: str, part: Path, gathered: Gathered) -> str:
    theirs = gathered.called(name)
    return f"of {part}" if theirs is None else f"{theirs} of {part}"


def fill_buffers(model: AGVAS) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, position ids) were made on the meta device: make them again."""
    rotary = model.language.model.rotary_emb
    frequencies, rotary.attention_scaling = rotary.compute_default_rope_parameters(rotary.config)
    rotary.inv_freq = frequencies
    rotary.original_inv_freq = frequencies.clone()
    for module in model.modules():
        if isinstance(getattr(module, "position_ids", None), torch.Tensor):
            module.position_ids = torch.arange(module.num_positions).unsqueeze(0)
        if isinstance(module, DINOv3ViTRopePositionEmbedding):
            module.inv_freq = 1 / module.base ** torch.arange(0, 1, 4 / module.head_dim, dtype=torch.float32)
