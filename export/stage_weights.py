"""A stage's weights by the names of its module, none of them in memory.

A stage is exported on the meta device, where there are no values; what its graph's initializers hold comes from here. A checkpoint's
tensors are taken as they are, buffers that no checkpoint holds are made again, and the batch norms of a convolutional stem are folded into
its convolutions when those are read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from agvas.checkpoint import OpenedCheckpoint, fill_buffers
from agvas.stem import ConvolutionNorm
from agvas.weights import LazyTensor, LazyTensors
from export.adapters import PARTS


def whole_name(stage: str, name: str) -> str | None:
    """What AGVAS calls a tensor of a stage's module; None where it has none of that name."""
    for ours, whole in PARTS[stage].items():
        if name.startswith(f"{ours}."):
            return whole + name[len(ours) :]
    return None


def all_weights(opened: OpenedCheckpoint) -> dict[str, LazyTensor]:
    """Every tensor that AGVAS computes with, by its name there: the checkpoint's and the buffers that it does not hold."""
    skeleton = opened.skeleton()
    fill_buffers(skeleton)
    made = {name: held(buffer) for name, buffer in skeleton.named_buffers() if not buffer.is_meta}
    return {**opened.tensors, **made}


def stage_weights(weights: LazyTensors, skeleton: nn.Module, stage: str) -> dict[str, LazyTensor]:
    """Of all weights those of a stage, by the names of its module (export.adapters).

    Args:
        skeleton: the model on the meta device, whose stem, where there is one, says which batch norms are folded into what.
    """
    found = {}
    for ours, whole in PARTS[stage].items():
        for name, tensor in weights.items():
            if name == whole or name.startswith(f"{whole}."):
                found[ours + name[len(whole) :]] = tensor
        for name, module in skeleton.get_submodule(whole).named_modules(prefix=ours):
            if isinstance(module, ConvolutionNorm) and len(module) == 3:
                found[f"{name}.0.weight"], found[f"{name}.0.bias"] = _folded(found, name, module)
    return found


def held(tensor: Tensor) -> LazyTensor:
    """One that is in memory already: a buffer that the model makes itself."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor, constant=True)


def _folded(weights: LazyTensors, name: str, module: ConvolutionNorm) -> tuple[LazyTensor, LazyTensor]:
    """Weight and bias of a convolution with its batch norm folded into it, in fp32 before any precision is lowered."""
    convolution = weights[f"{name}.0.weight"]
    norm = [weights[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    epsilon = module[1].eps

    def fold(part: int) -> Callable[[], Tensor]:
        def read() -> Tensor:
            mean, variance, scale, shift = (tensor.read().float() for tensor in norm)
            fused = fuse_conv_bn_weights(convolution.read().float(), None, mean, variance, epsilon, scale, shift)
            return fused[part].detach()

        return read

    outputs = convolution.shape[:1]
    return LazyTensor(convolution.shape, torch.float32, fold(0)), LazyTensor(outputs, torch.float32, fold(1))
