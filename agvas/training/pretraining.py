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
from transformers.models.sam.modeling_sam import SamVisionEncoder

from agvas.model import AGVAS
from agvas.stem import StemmedVisionEncoder
from agvas.training.batch import Batch
from agvas.training.loop import Group, LoopSettings
from agvas.training.losses import MaskLossWeights, anchor_losses

PRIOR_LOGIT = -2.6  # about 7 % of all cells are anomalous


@dataclass(frozen=True)
class PretrainingSettings:
    """plain_until: plain samples come alone until this step, then they are the pool's share of a batch."""

    loop: LoopSettings = LoopSettings(
        steps=1200,
        global_batch=8,
        micro_batch=8,
        learning_rate=1e-3,
        warmup_steps=60,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        average_decay=0.997,
    )
    plain_until: int = 600
    weights: MaskLossWeights = field(default_factory=lambda: MaskLossWeights(bce=1.0, dice=0.1))


class PixelPretraining(nn.Module):
    """Pixel encoder and upscaling of a model under one kernel [P / 8]; a batch → {"mask": loss}."""

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
        self.requires_grad_(False)
        for parameter in self.learned():
            parameter.requires_grad_(True)

    def learned(self) -> Iterator[nn.Parameter]:
        encoder = self.encoder
        for part in (encoder.patch_embed if isinstance(encoder, StemmedVisionEncoder) else encoder, self.norms, self.upscaling):
            yield from part.parameters()
        yield self.kernel

    def groups(self) -> list[Group]:
        return [Group(list(self.learned()))]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        logit = self.logit(batch.pixel_image)
        return {"mask": anchor_losses(logit, batch.target, batch.valid, self.weights).mean()}

    def logit(self, pixel_image: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, M, M]."""
        pixels = _embeddings(self.encoder, pixel_image).movedim(1, -1)  # [B, G, G, P]
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


def _embeddings(encoder: SamVisionEncoder, pixel_image: Tensor) -> Tensor:
    """Of the stem alone where there is one: the ViT behind it adds nothing yet and costs more."""
    if isinstance(encoder, StemmedVisionEncoder):
        return encoder.patch_embed(pixel_image)[1]
    return encoder(pixel_image).last_hidden_state
