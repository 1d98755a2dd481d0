"""What a folder or file holds, told from its headers: a checkpoint, a bundle, or a part that a checkpoint is made of.

Nothing but names, shapes and types is read, so a checkpoint of any size is told in seconds; and it is told where it does not fit, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agvas import lora, parts
from agvas.checkpoint import NANO, CheckpointError, Examined, OpenedCheckpoint, examine
from agvas.weights import LazyTensor

MANIFEST = "manifest.json"
STAGES = ("pixel_encoder", "semantic_encoder", "spam", "language", "mask_decoder")
SHOWN = 12  # problems; --json has them all
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Contents:
    """What is there.

    Attributes:
        layout: in words.
        model: the configuration's name, where there is one.
        parts: of a checkpoint that points at its parts: role, path, layout and tensors of each.
        stages: by stage: parameters, bytes as stored, and parameters by type.
        vocabulary: rows of the table, the tokenizer's tokens, and each anchor's id (None where the tokenizer lacks it).
        unused: names that a part has and an AG-VAS does without.
        problems: what is missing, unexpected or of another shape.
        facts: what else there is to say.
    """

    path: str
    layout: str
    model: str | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.path}: {self.layout}{'' if self.model is None else f', model {self.model}'}"]
        lines += [f"  {part['role']}: {part['path']} ({part['layout']}, {part['tensors']} tensors)" for part in self.parts]
        for stage, held in self.stages.items():
            types = ", ".join(f"{kind} {share:,}" if len(held["types"]) > 1 else kind for kind, share in held["types"].items())
            parameters = "" if held["parameters"] is None else f"{held['parameters']:>14,} parameters "
            lines.append(f"  {stage:17} {parameters}{held['bytes'] / 1e6:>10,.1f} MB  {types}")
        if self.vocabulary:
            ids = self.vocabulary["anchors"].items()
            anchors = ", ".join(f"{anchor} {'MISSING' if number is None else number}" for anchor, number in ids)
            lines.append(f"  vocabulary: {self.vocabulary['rows']} rows, {self.vocabulary['tokens']} tokens; anchors {anchors}")
        if self.unused:
            lines.append(f"  not used: {len(self.unused)} tensors, such as {', '.join(self.unused[:3])}")
        lines += [f"  {fact}" for fact in self.facts]
        if self.problems:
            lines.append(f"  does not fit, {len(self.problems)} problems:")
            lines += [f"    {problem}" for problem in self.problems[:SHOWN]]
            lines += [f"    and {len(self.problems) - SHOWN} more (--json lists them)"] if len(self.problems) > SHOWN else []
        return lines


def contents(path: str | Path) -> Contents:
    """What there is at a path, or in "nano".

    Raises:
        CheckpointError: nothing there, or nothing that is known here; or a file of it is damaged.
    """
    place = NANO if str(path) == "nano" else Path(path)
    if not place.exists():
        raise CheckpointError(f"{path} is not there; give a checkpoint, a bundle, or a part: a folder or file")
    if (place / MANIFEST).is_file():
        return _bundle(place)
    if place.is_file() and place.suffix.lower() in PICTURES:
        raise CheckpointError(f"{path} is a picture; agvas-segment takes those, and agvas-inspect a checkpoint, a bundle, or a part")
    try:
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
        place = folder / path
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
    adapters: dict[str, lora.LoRA] = {}
    if kind in parts.LLAVAS:
        translated = parts.published_base(path)
        hint = f"agvas-import --base {path} --pixel-encoder FILE --trained FOLDER --output CHECKPOINT"
    else:
        try:
            translated = parts.pixel_encoder(path)
            hint = f"agvas-import --base FOLDER --pixel-encoder {path} --trained FOLDER --output CHECKPOINT"
        except ValueError as no_encoder:
            try:
                translated, adapters = parts.trained(path)
            except ValueError as nothing:
                raise CheckpointError(f"{nothing}" if kind is None else f"{no_encoder}") from nothing
            hint = f"agvas-import --base FOLDER --trained {path} --output CHECKPOINT"
    facts = [f"adapters for {len(adapters)} layers"] if adapters else []
    return Contents(
        str(path),
        f"a part of a checkpoint: {layout}",
        stages=stages_of(translated.tensors),
        unused=list(translated.unused),
        problems=[f"unexpected {name}" for name in translated.unknown],
        facts=[*facts, f"to use it: {hint}"],
    )


def _bundle(folder: Path) -> Contents:
    """A bundle by its manifest and its files' sizes; agvas-verify checks what is in them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: record["bytes"] for name, record in manifest["files"].items()}
        stages = {
            stage: {
                "parameters": None,
                "bytes": sum(size for name, size in sizes.items() if name.startswith(f"{stage}/")),
                "types": {precision: None},
            }
            for stage, precision in manifest["precision"].items()
        }
        parity, vocabulary = manifest["parity"], manifest["sizes"]["V"]
        anchors = manifest["prompts"]["anchors"]
        facts = [f"language model's weights: {manifest['lmm']}", f"{sum(sizes.values()) / 1e6:,.1f} MB in {len(sizes)} files"]
        if "mask_iou_mean" in parity:
            state = "passed" if parity.get("passed") else "FAILED"
            facts.append(f"parity {state} on {parity['images']} pictures ({parity['engine']}): mean mask IoU {parity['mask_iou_mean']:.4f}")
        if parity.get("compared") is False:
            facts.append("not compared with the reference (--parity none): no golden pictures for engine auto to choose by")
        facts.append(f"masks: threshold {manifest['threshold']:g}, relative threshold {manifest.get('relative_threshold', 1):g}")
        tokens = _tokens(folder, vocabulary, anchors) if (folder / "tokenizer.json").is_file() else {}
        found = {name: (folder / name).stat().st_size if (folder / name).is_file() else None for name in sizes}
        problems = [
            f"{name}: expected {sizes[name]:,} bytes, got {'no file' if size is None else f'{size:,}'}; copy or export the bundle again"
            for name, size in found.items()
            if size != sizes[name]
        ]
        return Contents(str(folder), "bundle", manifest["model"], stages=stages, vocabulary=tokens, facts=facts, problems=problems)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is no bundle's manifest ({error!r}); export the bundle again") from error


def _tokens(folder: Path, rows: int, anchors: list[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {anchor: tokenizer.token_to_id(anchor) for anchor in anchors}
    return {"rows": rows, "tokens": tokenizer.get_vocab_size(with_added_tokens=True), "anchors": ids}
