"""LoRA adapters in peft's layout, added to the weights one tensor at a time: W + scale · B A.

The sum is made in float32 and stays there, whatever the base is stored in: rounding it to bfloat16 would lose a small adapter. What
cannot be added to a weight exactly (DoRA, biases, adapters of embeddings or of a base that peft changed first) is refused. Training
makes adapters (agvas/training).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from agvas.misread import misread
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
_STACK = ".layers."
# Beginnings that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA, MiCA) change it, and what they add is to that.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoRASettings:
    """What a configuration says of the adapters. Layers are named as in the model that peft was given.

    Attributes:
        file: that says it: adapter_config.json, or a run's settings.json.
        alpha: an adapter's scale is alpha / rank, or alpha / √rank where it is `rank_stabilised`.
        rank: None where it is not said.
        alphas, ranks: patterns of layers whose alpha or rank is another.
        targets: ends of the layers' names, or a pattern of whole names; None where it is not said which layers have adapters.
        excluded: likewise, layers that have none all the same.
        numbers: of the layers that `targets` as ends are looked for in; empty for all.
        stacks: what stands before such a number; empty for anything.
        whole: modules trained without adapters (modules_to_save).
    """

    file: Path
    alpha: float
    rank_stabilised: bool = False
    rank: int | None = None
    alphas: tuple[tuple[str, float], ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    targets: str | tuple[str, ...] | None = None
    excluded: str | tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    stacks: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def scale(self, layer: str, rank: int) -> float:
        alpha = _of_pattern(self.alphas, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def rank_of(self, layer: str) -> int | None:
        return _of_pattern(self.ranks, layer, self.rank)

    def adapts(self, layer: str) -> bool:
        """Whether peft gives this layer an adapter."""
        if self.targets is None or _named(self.excluded, layer) or any(re.match(rf"(^|.*\.){name}($|\..*)", layer) for name in self.whole):
            return False
        if isinstance(self.targets, str) or layer in self.targets or not self.numbers:
            return _named(self.targets, layer)
        stacks = self.stacks or (r"[^.]*",)
        number = next((match[1] for stack in stacks if (match := re.match(rf"(?:^|.*?\.){stack}\.(\d+)\.", layer))), None)
        return _named(self.targets, layer) and number is not None and int(number) in self.numbers


_Value = TypeVar("_Value")


def _of_pattern(patterns: tuple[tuple[str, _Value], ...], layer: str, otherwise: _Value) -> _Value:
    return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", layer)), otherwise)


def _named(names: str | tuple[str, ...], layer: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


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
        settings = _settings(path, fields)
        kind = fields.get("peft_type", "LORA")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{path} cannot be read as peft's adapter configuration: {misread(error)}; copy the file again") from error
    used = [name for name in _UNMERGEABLE if fields.get(name)]
    if (start := fields.get("init_lora_weights")) not in _PLAIN_STARTS:
        used.append(f"init_lora_weights = {start}")
    if kind != "LORA" or used or fields.get("bias", "none") != "none":
        what = kind if kind != "LORA" else ", ".join(used) or f"bias = {fields['bias']}"
        raise ValueError(f"{path}: expected a plain LoRA, got one with {what}; merge it with peft (merge_and_unload) and give the result")
    return settings


def _settings(path: Path, fields: Mapping[str, Any]) -> LoRASettings:
    def several(field: str) -> tuple[Any, ...]:
        given = fields.get(field)
        return (given,) if isinstance(given, (str, int)) else tuple(given or ())

    def layers(field: str) -> str | tuple[str, ...]:
        given = fields.get(field)
        return given if isinstance(given, str) else several(field)

    alphas, ranks = (dict(fields.get(field) or {}) for field in ("alpha_pattern", "rank_pattern"))
    settings = LoRASettings(
        path,
        float(fields["lora_alpha"]),
        bool(fields.get("use_rslora")),
        None if fields.get("r") is None else int(fields["r"]),
        tuple((pattern, float(value)) for pattern, value in alphas.items()),
        tuple((pattern, int(value)) for pattern, value in ranks.items()),
        None if layers("target_modules") in ((), "all-linear") else layers("target_modules"),
        layers("exclude_modules"),
        several("layers_to_transform"),
        several("layers_pattern"),
        several("modules_to_save"),
    )
    of_whole_names = [names for names in (settings.targets, settings.excluded) if isinstance(names, str)]
    for pattern in (*alphas, *ranks, *settings.stacks, *settings.whole, *of_whole_names):
        re.compile(pattern)
    return settings


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, and what is said of them.

    Attributes:
        layers: by the layer's name: as `split` gives them the file's, behind it ours.
        names: by the layer's name in `layers`, the one in the model that peft was given.
        settings: None where there are no adapters.
    """

    layers: dict[str, LoRA] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    settings: LoRASettings | None = None

    def misranked(self) -> list[str]:
        """Adapters of another rank than their configuration says, in words."""
        if self.settings is None:
            return []
        of_ranks: dict[tuple[int, int], list[str]] = {}
        for layer, adapter in self.layers.items():
            found, said = adapter.down.shape[0], self.settings.rank_of(self.names[layer])
            if said is not None and found != said:
                of_ranks.setdefault((found, said), []).append(self.names[layer])
        return [
            f"{listed(layers)}: expected adapters of rank {said}, as {self.settings.file} says, got rank {found}; "
            f"give the {self.settings.file.name} that was written with them"
            for (found, said), layers in of_ranks.items()
        ]

    def incomplete(self, part: Path, weights: Iterable[str]) -> list[str]:
        """What of these there is none of, though the configuration names its layer, in words.

        Args:
            weights: every matrix that an adapter can be added to, by our names, without ".weight".
        """
        if self.settings is None:
            return []
        # What peft was given may have been our language model, or a LLaVA: the layers that are there tell. Its head is called so in both.
        stems = {"language.model": "model"}
        stems |= {ours.partition(_STACK)[0]: theirs.partition(_STACK)[0] for ours, theirs in self.names.items() if _STACK in ours}
        lacking = []
        for layer in weights:
            stem, stack, rest = layer.partition(_STACK)
            if stack and stem in stems:
                name = f"{stems[stem]}{stack}{rest}"
            elif not stack and stem.startswith("language."):
                name = stem.removeprefix("language.")
            else:
                continue
            if layer not in self.layers and self.settings.adapts(name):
                lacking.append(name)
        if not lacking:
            return []
        layers = "a layer" if len(lacking) == 1 else f"{len(lacking)} layers"
        return [
            f"{part} lacks the adapters of {layers} that {self.settings.file.name} names ({listed(lacking)}): copy it again, or give the "
            "base that it was trained on"
        ]


def listed(names: Collection[str]) -> str:
    """The first three of some names, and how many others there are."""
    return ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_adapter(folder: Path) -> tuple[Adapters, dict[str, LazyTensor]]:
    """An adapter folder: adapters by the layer's name and whole tensors (peft's modules_to_save), peft's own prefix taken off.

    Raises:
        ValueError: files missing or damaged; an adapter that cannot be merged.
    """
    settings = read_settings(folder / CONFIG)
    if (file := folder / WEIGHTS).is_file():
        tensors = safetensors_file(file)
    elif (file := folder / PICKLED).is_file():
        tensors = torch_file(file)
    else:
        raise ValueError(f"{folder} has {CONFIG} but neither {WEIGHTS} nor {PICKLED}; copy the whole folder")
    adapters, whole = split(folder, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, settings)
    if not adapters.layers:
        raise ValueError(f"{file}: expected the adapters that {CONFIG} tells of, got none; copy the adapter again")
    if lacking := [module for module in settings.whole if not any(module in name for name in whole)]:
        raise ValueError(f"{file} lacks {listed(lacking)}, which {CONFIG} names in modules_to_save; copy the adapter again")
    return adapters, whole


def has_factors(names: Mapping[str, object]) -> bool:
    """Whether a state dictionary holds adapters that are not yet merged."""
    return any(_FACTOR.match(name) for name in names)


def split(where: Path, tensors: Mapping[str, LazyTensor], settings: LoRASettings) -> tuple[Adapters, dict[str, LazyTensor]]:
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
    return Adapters(adapters, {layer: layer for layer in adapters}, settings), whole
