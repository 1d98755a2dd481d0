"""Folders of the package's own commands that are given in a checkpoint's place: what each is, and where it belongs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Misplaced:
    """What a folder is, and what to do with it."""

    layout: str
    use: str


def misplaced(folder: Path) -> Misplaced | None:
    """None for a checkpoint, a bundle, a part, and what is not known."""
    calibration = f"agvas-export --checkpoint CHECKPOINT --calibration {folder}"
    if (folder / "plan.json").is_file() and (folder / "weights.safetensors").is_file():
        return Misplaced("a plan of agvas-calibrate", calibration)
    if _is_gptq(folder):
        return Misplaced("a language model in the GPTQ checkpoint layout", calibration)
    if (folder / "config.json").is_file() or not any((folder / name).is_file() for name in ("settings.json", "recipe.json")):
        return None
    if (folder / "checkpoint" / "config.json").is_file():
        return Misplaced("the folder of a training that has ended", f"give its model, {folder / 'checkpoint'}")
    return Misplaced("the folder of a training that has not ended", "the same agvas-train goes on, and leaves its model in checkpoint/")


def _is_gptq(folder: Path) -> bool:
    if (folder / "quantize_config.json").is_file():
        return True
    try:
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        return bool(settings["quant_method"] == "gptq")
    except (OSError, ValueError, TypeError, KeyError):
        return False
