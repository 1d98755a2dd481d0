"""Which parts of an AG-VAS learn (paper B.2): LoRA on the language model, SPAM, the refiner and AGMD, token embeddings and head.

Both encoders and the projector between tower and language model keep still, unless `encoders` says otherwise. What was trained can be
kept apart from the base, in peft's adapter layout beside one safetensors file, or merged into a whole checkpoint.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, LoraModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from agvas.model import AGVAS
from agvas.training.loop import Group
from agvas.writing import disk_errors

ADAPTER = "default"


@dataclass(frozen=True)
class LoRASettings:
    """Low-rank adapters of the language model's linear layers; rank 16 is the paper's, which gives no more. Layers, dropout and
    the ratio of alpha to rank, 2, are LISA's, whose rank is 8 and alpha 16."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"lora.{name}: expected 1 or more, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout: expected 0 or more and below 1, got {self.dropout}")


@dataclass(frozen=True)
class TrainedParts:
    """What learns, and how fast.

    Attributes:
        lora: None trains the language model itself, whole: for models too small to have been pretrained.
        encoders: whether pixel and semantic encoder (and projector) learn, too.
        slow, slow_share: parameters whose names begin so learn at this share of the rate.
        frozen: parameters whose names begin so keep still, whatever else is said.
    """

    lora: LoRASettings | None = LoRASettings()
    encoders: bool = False
    slow: tuple[str, ...] = ()
    slow_share: float = 1.0
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.slow_share < math.inf:
            raise ValueError(f"slow_share: expected a finite share above 0, got {self.slow_share:g}; `frozen` keeps parameters still")


class Adaptation:
    """A model made ready for training: `groups` are what the optimiser gets, `merge` ends it."""

    def __init__(self, model: AGVAS, parts: TrainedParts, seed: int) -> None:
        self.model, self.parts = model, parts
        model.requires_grad_(False)
        torch.manual_seed(seed)
        self._lora: LoraModel | None = None
        if parts.lora is not None:
            self._config = LoraConfig(
                r=parts.lora.rank,
                lora_alpha=parts.lora.alpha,
                lora_dropout=parts.lora.dropout,
                target_modules=list(parts.lora.targets),
                bias="none",
                task_type="CAUSAL_LM",
            )
            try:
                self._lora = LoraModel(model.language, self._config, ADAPTER)  # replaces the layers in place
            except ValueError as error:
                raise ValueError(f"lora.targets: expected names of linear layers, got {list(parts.lora.targets)}: {error}") from error
        else:
            model.language.requires_grad_(True)
        whole: list[nn.Module | None] = [model.spam, model.mask_decoder, model.language.get_input_embeddings(), model.language.lm_head]
        if model.config.pixel.kind != "sam":
            whole.append(model.pixel_encoder.neck)  # which no published backbone brings
        if parts.encoders:
            whole += [model.pixel_encoder, model.semantic_encoder]
        for part in whole:
            if part is not None:
                part.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if parts.frozen and name.startswith(parts.frozen):
                parameter.requires_grad_(False)

    def groups(self) -> list[Group]:
        fast: list[nn.Parameter] = []
        slow: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (slow if self.parts.slow and name.startswith(self.parts.slow) else fast).append(parameter)
        return [Group(fast), Group(slow, self.parts.slow_share)]

    def save(self, folder: Path) -> None:
        """What was trained, without the base: adapter_config.json and adapter_model.safetensors as peft has them, trained.safetensors
        with every other trained tensor under its name in the model, trained.json with these names, by which agvas-import sees that none is
        missing, and the model's config.json and tokenizer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        if self._lora is not None:
            self._config.save_pretrained(str(folder))
            adapter = get_peft_model_state_dict(self.model.language, adapter_name=ADAPTER)
            renamed = {f"base_model.model.{name}": tensor.detach().contiguous() for name, tensor in adapter.items()}
            with disk_errors(path := folder / "adapter_model.safetensors"):
                save_file(renamed, path, metadata={"format": "pt"})
        rest = {
            name: parameter.detach().contiguous().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and "lora_" not in name
        }
        # Buffers that a checkpoint keeps (the decoder's frequencies) belong to the modules that learn, and no base has them.
        parts = {name.partition(".")[0] for name in rest} - {"language"}
        persistent = self.model.state_dict().keys()
        rest |= {
            name: buffer.detach().contiguous().clone()
            for name, buffer in self.model.named_buffers()
            if name in persistent and name.partition(".")[0] in parts
        }
        with disk_errors(path := folder / "trained.safetensors"):
            save_file(rest, path, metadata={"format": "pt"})
        (folder / "config.json").write_text(self.model.config.to_json())
        self.model.tokenizer.save(str(folder / "tokenizer.json"))
        record = {"parts": sorted({name.split(".")[0] for name in rest}), "adapter": self._lora is not None, "tensors": sorted(rest)}
        (folder / "trained.json").write_text(json.dumps(record, indent=2) + "\n")

    def merge(self) -> AGVAS:
        """The model with its adapters added to the weights, as it was composed before."""
        if self._lora is not None:
            self._lora.merge_and_unload()
            self._lora = None
        self.model.requires_grad_(False)
        return self.model.eval()
