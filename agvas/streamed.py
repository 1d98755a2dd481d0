"""The reference on a machine that cannot hold it: modules whose weights are read when they compute and let go afterwards.

A module on the meta device gets hooks: what owns parameters itself (a linear layer, a norm, an embedding) has them while its forward runs
and not before or after, so of a model one layer's weights are in memory at a time, in fp32 as the reference holds them. The computation
is the module's own, so results are those of the model in memory. Every call reads the weights anew: this is for few pictures, not for
speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from agvas.weights import LazyTensors


def stream(module: nn.Module, tensors: LazyTensors, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Let a module on the meta device compute on the CPU with weights that are read while it does.

    Args:
        module: its parameters stay on the meta device outside of `forward`.
        tensors: by the module's names, buffers included.

    Raises:
        ValueError: a parameter or buffer that there is no tensor for, or one of another shape.
    """
    for path, owner in module.named_modules():
        own = {**dict(owner.named_parameters(recurse=False)), **dict(owner.named_buffers(recurse=False))}
        named = {name: f"{path}.{name}" if path else name for name, tensor in own.items() if tensor.is_meta}
        for name, whole in named.items():
            if whole not in tensors or tensors[whole].shape != tuple(own[name].shape):
                found = list(tensors[whole].shape) if whole in tensors else "none"
                raise ValueError(f"{whole}: expected a tensor {list(own[name].shape)}, got {found}; give the module's own weights")
        if named:
            _Streamed(owner, named, own, tensors, dtype)
    return module


class _Streamed:
    """One module's own parameters and buffers: real while it computes, meta otherwise."""

    def __init__(
        self, owner: nn.Module, named: Mapping[str, str], empty: Mapping[str, torch.Tensor], tensors: LazyTensors, dtype: torch.dtype
    ) -> None:
        self.named, self.empty, self.tensors, self.dtype = named, empty, tensors, dtype
        owner.register_forward_pre_hook(self.fetch)
        owner.register_forward_hook(self.release, always_call=True)

    def fetch(self, owner: nn.Module, _: Any) -> None:
        for name, whole in self.named.items():
            tensor = self.tensors[whole].read()
            tensor = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            if isinstance(self.empty[name], nn.Parameter):
                owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            else:
                owner._buffers[name] = tensor

    def release(self, owner: nn.Module, *_: Any) -> None:
        for name in self.named:
            if isinstance(self.empty[name], nn.Parameter):
                owner._parameters[name] = self.empty[name]  # type: ignore[assignment]
            else:
                owner._buffers[name] = self.empty[name]
