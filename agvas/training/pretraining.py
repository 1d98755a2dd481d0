"""Pixel pretraining: what a small AG-VAS gets in place of the paper's pretrained SAM, from procedural samples alone.

A mask decoder on embeddings that say nothing stays at the constant answer, so the pixel encoder (its stem, where there is one) and the
decoder's upscaling learn first, read by one learned kernel. `hand_over` starts the decoder's hypernetworks from that kernel, so that
nothing learned is lost when the whole model takes over. BCE leads: from scratch, Dice stalls before there is anything to overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from agvas.model import AGVAS
from agvas.stem import StemmedVisionEncoder
from agvas.training.batch import Batch
from agvas.training.loop import Group, LoopSettings
from agvas.training.losses import MaskLossWeights, anchor_losses

PRIOR_LOGIT = -2.6  # about 7 % of all cells are anomalous


@dataclass(frozen=True)
class PretrainingSettings:
    """plain_until: plain samples come alone until this step, then they are the pool's share of a batch.

    side: of the pieces of pictures it learns from, pixels; a stem takes any that its grids divide, and learns three times as many samples
    of half its own side in the same time. None shows whole pictures, as an encoder with absolute positions needs them.
    """

    loop: LoopSettings = LoopSettings(
        steps=4800,
        global_batch=32,
        micro_batch=32,
        learning_rate=2e-3,
        warmup_steps=40,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        average_decay=0.997,
    )
    plain_until: int = 0
    side: int | None = 256
    weights: MaskLossWeights = field(default_factory=lambda: MaskLossWeights(bce=1.0, dice=0.1))


class PixelPretraining(nn.Module):
    """Pixel encoder and upscaling of a model under one kernel [P / 8]; a batch → {"mask": loss}, with a stem also {"cells": loss}.

    The stem's cells are read by a kernel of their own, too: what they know is learned sooner where no patch stands between.
    """

    def __init__(self, model: AGVAS, weights: MaskLossWeights, seed: int) -> None:
        super().__init__()
        self.weights = weights
        self.encoder = model.pixel_encoder
        self.norms = nn.ModuleList(block.layer_norm4 for block in model.mask_decoder.transformer.layers)
        self.upscaling = model.mask_decoder.upscaling
        width = self.upscaling[3].out_channels
        noise = torch.randn(width, generator=torch.Generator().manual_seed(seed)) * 0.3
        # Features begin near GELU(1), so this sum puts every pixel at PRIOR_LOGIT. Without it the rush to that constant drives
        # half of the features below GELU's bend, where nothing is learned any more.
        self.kernel = nn.Parameter(noise - noise.mean() + PRIOR_LOGIT / (width * 0.841))
        self.cell_kernel: nn.Conv2d | None = None
        if isinstance(self.encoder, StemmedVisionEncoder):
            self.cell_kernel = nn.Conv2d(self.encoder.patch_embed.from_cells.in_channels, 1, 1)
            nn.init.constant_(self.cell_kernel.bias, PRIOR_LOGIT)
        self.requires_grad_(False)
        for parameter in self.learned():
            parameter.requires_grad_(True)

    def learned(self) -> Iterator[nn.Parameter]:
        """All but a pretrained trunk, and but the ViT behind a stem."""
        encoder = self.encoder
        for part in (encoder.patch_embed if isinstance(encoder, StemmedVisionEncoder) else encoder, self.norms, self.upscaling):
            for name, parameter in part.named_parameters():
                if not name.startswith("trunk."):
                    yield parameter
        yield self.kernel
        if self.cell_kernel is not None:
            yield from self.cell_kernel.parameters()

    def groups(self) -> list[Group]:
        return [Group(list(self.learned()))]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        def loss(logit: Tensor) -> Tensor:
            return anchor_losses(logit, batch.target, batch.valid, self.weights).mean()

        if self.cell_kernel is None:
            return {"mask": loss(self.read(self.encoder(batch.pixel_image).last_hidden_state))}
        stem = self.encoder.patch_embed  # alone: the ViT behind it adds nothing yet and costs more
        cells, halves, patches = stem.features(batch.pixel_image)
        return {"mask": loss(self.read(stem.embed(cells, halves, patches))), "cells": loss(self.cell_kernel(cells).squeeze(1))}

    def read(self, embeddings: Tensor) -> Tensor:
        """Logits [B, M, M] of pixel embeddings [B, P, G, G]."""
        pixels = embeddings.movedim(1, -1)  # [B, G, G, P]
        for norm in self.norms:  # all that the decoder's blocks do to the pixels before they have learned to do more
            pixels = norm(pixels)
        return torch.einsum("bchw,c->bhw", self.upscaling(pixels.movedim(-1, 1)), self.kernel)


@torch.no_grad()
def hand_over(kernel: Tensor, model: AGVAS) -> None:
    """Let the hypernetworks begin with the kernel: whole for [SEG], half of it against minus half for [ANO] and [NOR]."""
    shares = {"normal": -0.5, "anomalous": 0.5, "segment": 1.0}
    for hypernetwork, role in zip(model.mask_decoder.hypernetworks, model.mask_decoder.roles, strict=True):
        hypernetwork.proj_out.weight.mul_(0.1)
        hypernetwork.proj_out.bias.copy_(shares[role] * kernel)

