"""The fake-quantised truth: the reference with the weights that the integers stand for, computed in float.

What separates it from the reference is quantisation alone, what separates it from an exported graph is conversion alone (design.md,
parity comparison 2).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from calibration.weights import QuantizedWeight

Module = TypeVar("Module", bound=nn.Module)


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name. Raises ValueError naming it where the model has none."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        found = "nothing of that name" if layer is None else type(layer).__name__
        raise ValueError(f"{name}: expected a linear layer of the model, got {found}; use weights made from this checkpoint")
    return layer


def put_weight(model: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    """Give a linear layer the dequantised weight, in the layer's dtype and on its device: a parameter of its own, so that the embeddings
    of a tied head stay as they are.

    Raises:
        ValueError: no such layer, or one of another shape.
    """
    layer = linear_of(model, name)
    if tuple(layer.weight.shape) != quantized.codes.shape:
        found = list(quantized.codes.shape)
        raise ValueError(f"{name}: expected a weight {list(layer.weight.shape)}, got {found}; use weights made from this checkpoint")
    weight = torch.from_numpy(quantized.dequantized()).to(layer.weight.device, layer.weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)


def fake_quantize(model: Module, weights: Mapping[str, QuantizedWeight]) -> Module:
    """A deep copy of the model whose named linear layers hold dequantised weights; the model itself stays as it is.

    Raises:
        ValueError: a weight that is not one of this model's.
    """
    twin = copy.deepcopy(model)
    for name, quantized in weights.items():
        put_weight(twin, name, quantized)
    return twin
