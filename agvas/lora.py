"""LoRA adapters in peft's layout, added to the weights one tensor at a time: W + scale · B A.

The sum is made in float32 and stays there, whatever the base is stored in: rounding it to bfloat16 would lose a small adapter. What
cannot be added to a weight exactly (DoRA, biases, adapters of embeddings or of a base that peft changed first) is refused. Training
makes adapters (agvas/training).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agvas.torch_file import torch_file
from agvas.weights import LazyTensor, safetensors_file

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.default)?(?:\.weight)?$")
_UNMERGEABLE = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "megatron_config",
    "eva_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
)
# Beginnings that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA, MiCA) change it, and what they add is to that.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoRASettings:
    """What of adapter_config.json a merge needs: the scale is alpha / rank, or alpha / √rank.

    Attributes:
        alphas: patterns of layers whose alpha is another.
    """

    alpha: float
    rank_stabilised: bool = False
    alphas: tuple[tuple[str, float], ...] = ()

    def scale(self, layer: str, rank: int) -> float:
        patterns = (value for pattern, value in self.alphas if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha = next(patterns, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True)
class LoRA:
    """One layer's adapter: `down` [r, K] and `up` [N, r] for a weight [N, K]."""

    down: LazyTensor
    up: LazyTensor
    scale: float

    def added_to(self, weight: LazyTensor) -> LazyTensor:
        """The merged weight, in float32."""
        return LazyTensor(weight.shape, torch.float32, lambda: self._merge(weight.read()))

    def _merge(self, weight: Tensor) -> Tensor:
        # In peft's order, so that the result is its own to the bit.
        return weight.float() + (self.up.read().float() @ self.down.read().float()) * self.scale


def read_settings(path: Path) -> LoRASettings:
    """The settings in an adapter_config.json. ValueError where it is none, or of an adapter that no weight can take up."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        alpha, patterns = float(fields["lora_alpha"]), dict(fields.get("alpha_pattern") or {})
        kind = fields.get("peft_type", "LORA")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as peft's adapter configuration: {error!r}; copy the file again") from error
    used = [name for name in _UNMERGEABLE if fields.get(name)]
    if (start := fields.get("init_lora_weights")) not in _PLAIN_STARTS:
        used.append(f"init_lora_weights = {start}")
    if kind != "LORA" or used or fields.get("bias", "none") != "none":
        what = kind if kind != "LORA" else ", ".join(used) or f"bias = {fields['bias']}"
        raise ValueError(f"{path}: expected a plain LoRA, got one with {what}; merge it with peft (merge_and_unload) and give the result")
    alphas = tuple((pattern, float(value)) for pattern, value in patterns.items())
    return LoRASettings(alpha, bool(fields.get("use_rslora")), alphas)


def read_adapter(folder: Path) -> tuple[dict[str, LoRA], dict[str, LazyTensor]]:
    """An adapter folder: adapters by the layer's name and whole tensors (peft's modules_to_save), peft's own prefix taken off.

    Raises:
        ValueError: files missing or damaged; an adapter that cannot be merged.
    """
    settings = read_settings(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        tensors = safetensors_file(folder / WEIGHTS)
    elif (folder / PICKLED).is_file():
        tensors = torch_file(folder / PICKLED)
    else:
        raise ValueError(f"{folder} has {CONFIG} but neither {WEIGHTS} nor {PICKLED}; copy the whole folder")
    return split(folder, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, settings)


def has_factors(names: Mapping[str, object]) -> bool:
    """Whether a state dictionary holds adapters that are not yet merged."""
    return any(_FACTOR.match(name) for name in names)


def split(where: Path, tensors: Mapping[str, LazyTensor], settings: LoRASettings) -> tuple[dict[str, LoRA], dict[str, LazyTensor]]:
    """Adapters by layer, and the tensors that are none. ValueError where two factors are not a pair."""
    factors: dict[str, dict[str, LazyTensor]] = {}
    whole = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.match(name):
            factors.setdefault(match["layer"], {})[match["factor"]] = tensor
        elif "lora_" in name:
            raise ValueError(f"{where}: {name} is no adapter of a linear layer; merge it with peft (merge_and_unload) and give the result")
        else:
            whole[name.replace(".base_layer.", ".")] = tensor
    adapters = {}
    for layer, pair in factors.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[-1]:
            found = ", ".join(f"lora_{factor} {list(tensor.shape)}" for factor, tensor in sorted(pair.items()))
            raise ValueError(f"{where}: {layer}: expected lora_A [r, K] and lora_B [N, r], got {found}; copy the adapter again")
        adapters[layer] = LoRA(pair["A"], pair["B"], settings.scale(layer, pair["A"].shape[0]))
    return adapters, whole
