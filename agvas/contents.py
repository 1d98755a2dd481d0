"""What a folder or file holds, told from its headers: a checkpoint, a bundle, or a part that a checkpoint is made of.

Nothing but names, shapes and types is read, so a checkpoint of any size is told in seconds; and it is told where it does not fit, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agvas import lora, parts
from agvas.bundle_contents import MANIFEST, Contents, bundle_contents, is_bundle
from agvas.checkpoint import NANO, CheckpointError, Examined, OpenedCheckpoint, examine
from agvas.misplaced import misplaced
from agvas.weights import LazyTensor

STAGES = ("pixel_encoder", "semantic_encoder", "spam", "language", "mask_decoder")
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")


def contents(path: str | Path) -> Contents:
    """What there is at a path, or in "nano".

    Raises:
        CheckpointError: nothing there, or nothing that is known here; or a file of it is damaged.
    """
    place = NANO if str(path) == "nano" else Path(path)
    if not place.exists():
        raise CheckpointError(f"{path} is not there; give a checkpoint, a bundle, or a part: a folder or file")
    if place.is_file() and place.suffix.lower() in PICTURES:
        raise CheckpointError(f"{path} is a picture; agvas-segment takes those, and agvas-inspect a checkpoint, a bundle, or a part")
    try:
        if is_bundle(place):
            return bundle_contents(place)
        if (known := misplaced(place)) is not None:
            return Contents(str(place), known.layout, facts=[f"to use it: {known.use}"])
        if place.is_dir() and (place / "config.json").is_file() and parts.model_type(place) is None and not _is_trained(place):
            return _examined(examine(place))
        return _part(place)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def checkpoint_contents(opened: OpenedCheckpoint) -> Contents:
    """Of a checkpoint that was opened already."""
    return _examined(examine(opened.folder))


def stages_of(tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, Any]]:
    """Parameters, bytes and types by stage; tensors of one storage (a tied head) count once each, as a bundle has them."""
    stages: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        held = stages.setdefault(name.partition(".")[0], {"parameters": 0, "bytes": 0, "types": {}})
        count, kind = tensor.bytes // tensor.dtype.itemsize, str(tensor.dtype).removeprefix("torch.")
        held["parameters"] += count
        held["bytes"] += tensor.bytes
        held["types"][kind] = held["types"].get(kind, 0) + count
    return {stage: stages[stage] for stage in (*STAGES, *sorted(stages.keys() - set(STAGES))) if stage in stages}


def _examined(examined: Examined) -> Contents:
    opened, gathered = examined.opened, examined.gathered
    config, tokenizer = opened.config, opened.tokenizer
    layout = {"model.safetensors": "AG-VAS checkpoint", parts.FILE: "AG-VAS checkpoint that points at its parts"}
    if examined.weights.name == "model.safetensors" and not examined.weights.is_file():
        layout["model.safetensors"] = "AG-VAS checkpoint in shards"
    facts = []
    if gathered.merged:
        facts.append(f"adapters are added to {len(gathered.merged)} weights as they are read, in float32")
    if config.spam is None or len(config.mask_decoder.roles) < 3:
        facts.append("an ablation of the paper's: it has no bundle, agvas-eval measures it")
    return Contents(
        str(opened.folder),
        layout[examined.weights.name],
        config.name,
        _parts_of(examined),
        stages_of(opened.tensors),
        {
            "rows": config.language.vocabulary,
            "tokens": tokenizer.get_vocab_size(with_added_tokens=True),
            "anchors": {anchor: tokenizer.token_to_id(anchor) for anchor in config.prompts.anchors},
        },
        [name for names in gathered.unused.values() for name in names],
        examined.problems,
        facts,
    )


def _parts_of(examined: Examined) -> list[dict[str, Any]]:
    if examined.weights.name != parts.FILE:
        return []
    named, folder, gathered = parts.Parts.read(examined.weights), examined.weights.parent, examined.gathered
    given = [("base", named.base), ("pixel encoder", named.pixel_encoder), *(("trained", path) for path in named.trained)]
    found = []
    for role, path in given:
        if path is None:
            continue
        place = parts.place(folder, path)
        tensors = sum(origin == place for origin in gathered.origins.values()) + 2 * sum(p == place for p in gathered.merged.values())
        found.append({"role": role, "path": path, "layout": layout_of(place), "tensors": tensors})
    return found


def layout_of(path: Path) -> str:
    """The layout of a part, in words."""
    kind = parts.model_type(path) if path.is_dir() else None
    if kind is not None:
        return f"Hugging Face {kind}"
    if path.is_file():
        return "safetensors" if path.suffix == ".safetensors" else "torch"
    if (path / "latest").is_file() or (path / parts.MODEL_STATES).is_file():
        return "DeepSpeed"
    if _is_trained(path):
        return "peft adapter and trained parts" if (path / lora.CONFIG).is_file() else "trained parts"
    if (path / lora.CONFIG).is_file():
        return "peft adapter"
    return "AG-VAS checkpoint" if (path / "config.json").is_file() else "state dictionary"


def _is_trained(folder: Path) -> bool:
    return (folder / parts.TRAINED_FILE).is_file()


def _part(path: Path) -> Contents:
    """A part by itself: what of an AG-VAS it holds."""
    layout = layout_of(path)
    kind = parts.model_type(path) if path.is_dir() else None
    adapters, problems = lora.Adapters(), []
    if kind in parts.LLAVAS:
        translated = parts.published_base(path)
        hint = f"agvas-import --base {path} --pixel-encoder FILE --trained FOLDER --output CHECKPOINT"
    else:
        try:
            translated = parts.pixel_encoder(path)
            hint = f"agvas-import --base FOLDER --pixel-encoder {path} --trained FOLDER --output CHECKPOINT"
        except ValueError as no_encoder:
            try:
                found = parts.trained(path)
            except ValueError as nothing:
                raise CheckpointError(f"{nothing}; a bundle has {MANIFEST}" if kind is None else f"{no_encoder}") from nothing
            translated, adapters, problems = found.whole, found.adapters, list(found.problems)
            hint = f"agvas-import --base FOLDER --trained {path} --output CHECKPOINT"
    facts = [f"adapters for {len(adapters.layers)} layers"] if adapters.layers else []
    return Contents(
        str(path),
        f"a part of a checkpoint: {layout}",
        stages=stages_of(translated.tensors),
        unused=list(translated.unused),
        problems=[*problems, *(f"unexpected {name}" for name in translated.unknown)],
        facts=[*facts, f"to use it: {hint}"],
    )
