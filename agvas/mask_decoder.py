"""The token refiner and AGMD, the Anchor-Guided Mask Decoder (paper §3.1, eq. 4-8, and B.4).

Two-way attention blocks, upscaling and per-query MLPs are SAM's; what is new is what goes in (three anchors and three learnable
queries instead of prompts) and what comes out (one absolute and two relative maps instead of three guesses). The paper's
"refined pixel features" are taken as SAM's: upscaled four times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamLayerNorm, SamTwoWayTransformer

from agvas.config import MaskDecoderConfig


class Maps(NamedTuple):
    """Logits and probabilities over the padded square; M = 4 G. None: an ablation without that kind of anchor."""

    logit_absolute: Tensor | None  # [B, M, M]
    logit_relative: Tensor | None  # [B, 2, M, M], normal then anomalous
    probability_absolute: Tensor | None  # [B, M, M]
    probability_relative: Tensor | None  # [B, 2, M, M]
    anomaly_map: Tensor  # [B, M, M]


class TokenRefiner(nn.Sequential):
    """Two linear layers D → W shared by the anchors, with a GELU between (the paper names none; without one they are one layer)."""

    def __init__(self, language_width: int, width: int) -> None:
        super().__init__(nn.Linear(language_width, language_width), nn.GELU(), nn.Linear(language_width, width))


class MaskDecoder(nn.Module):
    """Maps from the anchors' states [B, K, D] (in the order of `roles`; K = 3 but in an ablation) and pixel embeddings [B, P, G, G]."""

    def __init__(self, config: MaskDecoderConfig, language_width: int, width: int, grid: int) -> None:
        super().__init__()
        self.fusion_weight = config.fusion_weight
        self.grid = grid
        self.refiner = TokenRefiner(language_width, width)
        self.roles = config.roles
        self.queries = nn.Parameter(torch.randn(len(self.roles), width) * 0.02)
        self.register_buffer("frequencies", torch.randn(2, width // 2))
        blocks = SamMaskDecoderConfig(
            hidden_size=width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            mlp_dim=config.mlp_width,
            attention_downsample_rate=2,
        )
        blocks._attn_implementation = "sdpa"
        self.transformer = SamTwoWayTransformer(blocks)
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2),
            SamLayerNorm(width // 4, data_format="channels_first"),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.hypernetworks = nn.ModuleList(SamFeedForward(width, width, width // 8, 3) for _ in self.roles)

    def forward(self, anchor_states: Tensor, pixel_embeddings: Tensor) -> Maps:
        anchors = self.refiner(anchor_states)  # [B, K, P]
        batch = anchors.shape[0]
        tokens = torch.cat([anchors, self.queries.expand(batch, -1, -1)], dim=1).unsqueeze(1)  # [B, 1, 2 K, P] eq. 4
        tokens, pixels = self.transformer(
            point_embeddings=tokens,
            image_embeddings=pixel_embeddings,
            image_positional_embeddings=self.positions(),
            attention_similarity=None,
        )  # [B, 1, 2 K, P], [B, 1, G·G, P] eq. 5
        pixels = pixels.squeeze(1).transpose(1, 2).unflatten(2, (self.grid, self.grid))  # [B, P, G, G]
        features = self.upscaling(pixels)  # [B, P / 8, M, M]
        queries = tokens[:, 0, len(self.roles) :]  # [B, K, P]
        kernels = torch.stack([mlp(queries[:, i]) for i, mlp in enumerate(self.hypernetworks)], dim=1)  # [B, K, P / 8]
        return self.fuse((kernels @ features.flatten(2)).unflatten(2, features.shape[2:]))

    def fuse(self, logits: Tensor) -> Maps:
        """Maps from the logits [B, K, M, M] of the anchors; an ablation's map is what is left of equation 8."""
        absolute = logits[:, -1].sigmoid() if "segment" in self.roles else None  # eq. 6
        relative = logits[:, :2].softmax(dim=1) if "anomalous" in self.roles else None  # eq. 7
        if absolute is None or relative is None:
            fused = relative[:, 1] if relative is not None else absolute
            assert fused is not None
        else:
            fused = self.fusion_weight * absolute + (1 - self.fusion_weight) * relative[:, 1]  # eq. 8
        return Maps(
            None if absolute is None else logits[:, -1], None if relative is None else logits[:, :2], absolute, relative, fused
        )

    def positions(self) -> Tensor:
        """SAM's random Fourier features of the grid's cell centres: [1, P, G, G]."""
        kind = self.frequencies.device.type
        # In training it would round the angles to 16 bit. (The meta device knows none.)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.positions()
        side = (torch.arange(self.grid, device=self.frequencies.device, dtype=torch.float32) + 0.5) / self.grid
        centres = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1) * 2 - 1  # [G, G, (x, y)] in -1..1
        angles = 2 * math.pi * (centres @ self.frequencies.float())  # [G, G, P / 2]
        return torch.cat([angles.sin(), angles.cos()], dim=-1).permute(2, 0, 1).unsqueeze(0).to(self.frequencies.dtype)
