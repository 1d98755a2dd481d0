"""Another ViT in SAM's place (the paper's table 7): CLIP, SigLIP, DINOv2 or DINOv3, and a neck to the mask decoder's width.

The backbone is transformers' own model as it stands, and what is taken is its last_hidden_state; tokens of no patch are left out. The
paper does not say how features of another width become pixel embeddings: the neck is SAM's (two convolutions with norms), and is trained.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SamVisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.sam.modeling_sam import SamVisionEncoderOutput, SamVisionNeck

from agvas.config import PixelEncoderConfig


class VisionTransformer(nn.Module):
    """[B, 3, S, S] → `.last_hidden_state` [B, P, G, G], as SAM's encoder."""

    def __init__(self, config: PixelEncoderConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.backbone = _backbone(config)
        self.neck = SamVisionNeck(SamVisionConfig(hidden_size=config.width, output_channels=config.output_width))

    def forward(self, pixel_image: Tensor) -> SamVisionEncoderOutput:
        tokens = self.backbone(pixel_image).last_hidden_state[:, -self.grid * self.grid :]  # [B, G·G, W]: patches come last
        return SamVisionEncoderOutput(last_hidden_state=self.neck(tokens.unflatten(1, (self.grid, self.grid))))


def _backbone(config: PixelEncoderConfig) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "attn_implementation": "sdpa",
    }
    if config.kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=config.mlp_width))
    if config.kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=config.mlp_width, vision_use_head=False))
    if config.kind == "dinov2":
        ratio, rest = divmod(config.mlp_width, config.width)
        if rest:
            raise ValueError(f"pixel.mlp_width: expected a multiple of {config.width} with kind dinov2, got {config.mlp_width}")
        return Dinov2Model(Dinov2Config(**sizes, mlp_ratio=ratio, use_swiglu_ffn=config.gated))
    return DINOv3ViTModel(
        DINOv3ViTConfig(
            **sizes,
            intermediate_size=config.mlp_width,
            num_register_tokens=config.registers,
            use_gated_mlp=config.gated,
            hidden_act="silu" if config.gated else "gelu",
        )
    )
