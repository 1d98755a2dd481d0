"""The parts of one AG-VAS in their published layouts with its training, for the tests of agvas-import; and ways to damage a copy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import published
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SamModel

from agvas import AGVAS, load
from agvas.importing import ImportSettings, import_parts
from agvas.training.adaptation import Adaptation, LoRASettings, TrainedParts

ADAPTER = "trained/adapter_model.safetensors"
TABLES = ("language.model.embed_tokens.weight", "language.lm_head.weight")
TARGETS = ("q_proj", "v_proj", "down_proj")
TRAINED = TrainedParts(lora=LoRASettings(rank=3, alpha=7, targets=TARGETS))


class Published:
    """The parts of one AG-VAS, written once; do not write into them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.onevision, self.sam = folder, folder / "onevision", folder / "sam_vit_mini.pth"
        self.theirs = published.onevision(self.onevision)
        self.their_sam: SamModel = published.sam()
        published.write_sam_pth(self.their_sam, self.sam)
        self.their_sam.save_pretrained(folder / "sam_model")
        self.start = folder / "start"
        import_parts(ImportSettings(self.onevision, self.start, self.sam, untrained=5))
        adaptation = Adaptation(load(self.start), TRAINED, 0)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in adaptation.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        self.trained = folder / "trained"
        adaptation.save(self.trained)
        self.state = {f"model.{name}": tensor.clone() for name, tensor in adaptation.model.state_dict().items()}  # of the Objective
        self.merged: AGVAS = adaptation.merge()
        self.checkpoint = folder / "checkpoint"
        import_parts(ImportSettings(self.onevision, self.checkpoint, self.sam, (self.trained,)))


def same_tensors(found: AGVAS, expected: dict[str, Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def changed(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """One safetensors file of the parts, or the shards of the base as one file, with other tensors in it."""

    def apply(folder: Path) -> None:
        path = folder / file
        state: dict[str, Tensor] = {}
        for shard in sorted(path.parent.glob("model-*.safetensors")) or [path]:
            state |= load_file(shard)
            shard.unlink()
        (path.parent / "model.safetensors.index.json").unlink(missing_ok=True)
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return apply


def without(file: str, *patterns: str) -> Callable[[Path], None]:
    def change(state: dict[str, Tensor]) -> None:
        gone = [name for name in state if any(re.search(pattern, name) for pattern in patterns)]
        assert gone
        for name in gone:
            del state[name]

    return changed(file, change)


def trained_without(*names: str) -> Callable[[Path], None]:
    return without("trained/trained.safetensors", *names)


def in_json(file: str, **fields: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))

    return apply


def removed(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None
