"""The two encoders and the language model, built from transformers' own modules.

Only translation from our configs to theirs and the one choice that is LLaVA's: semantic features are an encoder layer's, before the
tower's final norm and without its class token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    SamVisionConfig,
    SiglipVisionConfig,
)
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPVisionEmbeddings
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from transformers.models.sam.modeling_sam import SamVisionEncoder
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

from agvas.config import AGVASConfig, LanguageConfig, PixelEncoderConfig, SemanticEncoderConfig
from agvas.stem import StemmedVisionEncoder
from agvas.trunk import Trunk
from agvas.vision_transformer import VisionTransformer


def _with_attention(config: Any) -> Any:
    """Modules built directly, not through a model's own constructor, find no attention chosen; ours is always SDPA."""
    config._attn_implementation = "sdpa"
    return config


def pixel_encoder(config: PixelEncoderConfig) -> SamVisionEncoder | VisionTransformer:
    """SAM's image encoder, or another ViT in its place: [B, 3, S, S] → `.last_hidden_state` [B, P, G, G]."""
    if config.kind != "sam":
        return VisionTransformer(config)
    sam = _with_attention(
        SamVisionConfig(
            hidden_size=config.width,
            output_channels=config.output_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            window_size=config.window,
            global_attn_indexes=list(config.global_layers),
            mlp_dim=config.mlp_width,
            num_pos_feats=config.output_width // 2,
            # SAM's own 1e-10 supposes pretrained weights and would never train; the usual 0.02 suits widths above 1000.
            initializer_range=config.width**-0.5,
        )
    )
    if config.stem == "linear":
        return SamVisionEncoder(sam)
    return StemmedVisionEncoder(sam, Trunk() if config.stem == "pretrained" else None)


def language_model(config: LanguageConfig) -> Qwen2ForCausalLM | LlamaForCausalLM:
    """Qwen2 or Llama with its head."""
    kind = LlamaForCausalLM if config.kind == "llama" else Qwen2ForCausalLM
    return kind(_language(config))


def _language(config: LanguageConfig) -> Qwen2Config | LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.width**-0.5,
    }
    return _with_attention(LlamaConfig(**sizes) if config.kind == "llama" else Qwen2Config(**sizes, use_sliding_window=False))


class SemanticEncoder(nn.Module):
    """LLaVA's tower and projector: [B, 3, s, s] → features [B, T, Ds] and image embeddings [B, T, D]."""

    def __init__(self, config: AGVASConfig) -> None:
        super().__init__()
        self.pre_layrnorm = None  # CLIP's, so spelled by transformers; CLIP alone has a class token, too
        if config.semantic.kind == "clip":
            clip = _clip(config.semantic)
            self.embeddings = CLIPVisionEmbeddings(clip)
            self.pre_layrnorm = nn.LayerNorm(clip.hidden_size, eps=clip.layer_norm_eps)
            self.encoder = CLIPEncoder(clip)
        else:
            tower = _siglip(config.semantic)
            self.embeddings = SiglipVisionEmbeddings(tower)
            self.encoder = SiglipEncoder(tower)
        # A composite config unsets the attention of the configs it is given: it gets its own. Both LLaVAs have this projector.
        vision, text = _siglip(config.semantic), _language(config.language)
        both = LlavaOnevisionConfig(vision_config=vision, text_config=text, vision_feature_layer=-1)
        self.projector = LlavaOnevisionMultiModalProjector(both)

    def forward(self, semantic_image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embeddings(semantic_image)
        if self.pre_layrnorm is not None:
            tokens = self.pre_layrnorm(tokens)
        features = self.encoder(inputs_embeds=tokens).last_hidden_state  # [B, T, Ds], or with a class token in front
        if self.pre_layrnorm is not None:
            features = features[:, 1:]
        return features, self.projector(features)  # [B, T, Ds], [B, T, D]


def _siglip(config: SemanticEncoderConfig) -> SiglipVisionConfig:
    return _with_attention(SiglipVisionConfig(**_sizes(config), vision_use_head=False))


def _clip(config: SemanticEncoderConfig) -> CLIPVisionConfig:
    return _with_attention(CLIPVisionConfig(**_sizes(config), hidden_act="quick_gelu"))


def _sizes(config: SemanticEncoderConfig) -> dict[str, int]:
    return {
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
