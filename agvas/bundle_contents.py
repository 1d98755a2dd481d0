"""What a bundle holds, told from its manifest and its files' sizes, without torch: a target has none.

agvas/contents.py tells of checkpoints and their parts in the same form, and reads tensors' headers for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agvas.misread import misread

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # in the folder that an export works in until the bundle is whole
SHOWN = 12  # problems; --json has them all


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


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, or was to become one."""
    return (folder / MANIFEST).is_file() or (folder / UNFINISHED).is_file()


def bundle_contents(folder: Path) -> Contents:
    """Of a bundle; agvas-verify checks what is in its files.

    Raises:
        ValueError: a manifest that is none; an export that was not finished.
    """
    if (folder / UNFINISHED).is_file():
        raise ValueError(
            f"{folder} is an export that was not finished; run the same agvas-export command again (with --resume it goes on with "
            "the stages that are finished here), or remove the folder"
        )
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
        raise ValueError(f"{folder / MANIFEST} is no bundle's manifest: {misread(error)}; export the bundle again") from error


def _tokens(folder: Path, rows: int, anchors: list[str]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {anchor: tokenizer.token_to_id(anchor) for anchor in anchors}
    return {"rows": rows, "tokens": tokenizer.get_vocab_size(with_added_tokens=True), "anchors": ids}
