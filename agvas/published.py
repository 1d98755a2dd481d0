"""The configuration of an AG-VAS made of published parts: what their files and tensors say, and what the paper says where they are silent.

A base's sizes come from its config.json, a pixel encoder's from its tensors, means and deviations from the base's image processor (the
class's defaults are another model's). What no file tells is listed as assumed. A variant that this package's modules do not compute
exactly is refused, field by field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from agvas.config import (
    ROLES,
    AGVASConfig,
    LanguageConfig,
    MaskDecoderConfig,
    PixelEncoderConfig,
    SemanticEncoderConfig,
    SPAMConfig,
    prompts_of_roles,
    published_prompts,
)
from agvas.weights import LazyTensor
from runtime.preprocess import Preprocessing
from runtime.prompts import Prompts

EMBEDDINGS, HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # segment_anything/modeling/sam.py
BICUBIC = 3

Tensors = Mapping[str, LazyTensor]


class Derived(NamedTuple):
    """A configuration, and what in it no file says, in words."""

    config: AGVASConfig
    assumed: tuple[str, ...]


def derive(base: Path, tensors: Tensors, pixel_encoder: Path | None = None, pixel_size: int = 1024) -> Derived:
    """The configuration of a LLaVA base in Hugging Face's layout with whatever parts have been put to it.

    Args:
        tensors: of all parts, by our names.
        pixel_encoder: where the pixel encoder is from; what no tensor of a ViT tells stands in its folder.
        pixel_size: side of the pixel encoder's pictures where its positions leave it open (DINOv3's rotary ones).

    Raises:
        ValueError: a file missing, a variant that is not computed here, a part missing.
    """
    from transformers import AutoConfig  # slow to import, and needed here alone

    try:
        theirs = AutoConfig.from_pretrained(base, local_files_only=True)
    except Exception as error:  # the library raises what its validators do
        raise ValueError(f"{base / 'config.json'} cannot be read: {error}; copy the file again") from error
    where = base / "config.json"
    _same(where, "projector_hidden_act", theirs.projector_hidden_act, "gelu")
    language = _language(where, theirs, tensors)
    semantic = _semantic(where, theirs)
    spam, decoder, assumed = _trained(tensors)
    if "pixel_encoder.pos_embed" in tensors or pixel_encoder is None:
        pixel, statistics = sam_config(tensors), (SAM_MEAN, SAM_STD)
    else:
        pixel, statistics = vit_config(pixel_encoder, tensors, pixel_size), _statistics(pixel_encoder, resampled=False)
    preprocessing = Preprocessing(pixel.image_size, *statistics, semantic.image_size, *_statistics(base))
    name = f"agvas-{base.resolve().name}"
    prompts = prompts_of_roles(published_prompts(language.kind), decoder.roles)
    return Derived(AGVASConfig(name, pixel, semantic, language, spam, decoder, preprocessing, prompts), assumed)


def sam_config(tensors: Tensors) -> PixelEncoderConfig:
    """SAM's sizes, all of which its tensors tell. ValueError where they are no SAM's."""
    try:
        _, grid, _, width = tensors["pixel_encoder.pos_embed"].shape
        patch = tensors["pixel_encoder.patch_embed.projection.weight"].shape[-1]
        output_width = tensors["pixel_encoder.neck.conv1.weight"].shape[0]
        mlp_width = tensors["pixel_encoder.layers.0.mlp.lin1.weight"].shape[0]
        sides: list[int] = []
        while (name := f"pixel_encoder.layers.{len(sides)}.attn.rel_pos_h") in tensors:
            reach, head_width = tensors[name].shape
            sides.append((reach + 1) // 2)
    except (KeyError, ValueError) as error:
        raise ValueError(f"the pixel encoder is no SAM ViT ({error} missing); give SAM's .pth, or transformers' SamModel") from error
    windows = {side for side in sides if side != grid}
    if len(windows) > 1:
        raise ValueError(f"the pixel encoder has windows of {sorted(windows)}, expected one size; it is no SAM ViT")
    global_layers = tuple(index for index, side in enumerate(sides) if side == grid)
    window = windows.pop() if windows else grid
    return PixelEncoderConfig(
        grid * patch, patch, width, len(sides), width // head_width, mlp_width, window, global_layers, output_width
    )


def vit_config(folder: Path, tensors: Tensors, size: int) -> PixelEncoderConfig:
    """The sizes of a CLIP, SigLIP, DINOv2 or DINOv3 that stands in SAM's place; its neck's width is the trained one's, 256 without."""
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises what its validators do
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}; copy the file again") from error
    theirs = getattr(theirs, "vision_config", theirs)
    where = folder / "config.json"
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "clip_vision_model": ("clip", {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
        "siglip_vision_model": ("siglip", {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}),
        "dinov2": ("dinov2", {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}),
        "dinov3_vit": (
            "dinov3",
            {"layer_norm_eps": 1e-5, "rope_theta": 100.0, "query_bias": True, "key_bias": False, "value_bias": True, "mlp_bias": True},
        ),
    }
    kind, fixed = variants[theirs.model_type]
    for name, expected in fixed.items():
        _same(where, name, getattr(theirs, name), expected)
    gated = bool(getattr(theirs, "use_swiglu_ffn", False) or getattr(theirs, "use_gated_mlp", False))
    if kind == "dinov3":
        _same(where, "hidden_act", theirs.hidden_act, "silu" if gated else "gelu")
    width = theirs.hidden_size
    neck = tensors.get("pixel_encoder.neck.conv1.weight")
    return PixelEncoderConfig(
        size if kind == "dinov3" else theirs.image_size,
        theirs.patch_size,
        width,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        int(width * theirs.mlp_ratio) if kind == "dinov2" else theirs.intermediate_size,
        0,
        (),
        256 if neck is None else neck.shape[0],
        kind=kind,
        registers=theirs.num_register_tokens if kind == "dinov3" else 0,
        gated=gated,
    )


def with_anchors(tokenizer: Tokenizer, prompts: Prompts) -> list[str]:
    """Add the anchors that a base's tokenizer lacks, as special tokens, behind its last one; those added."""
    missing = [anchor for anchor in prompts.anchors if tokenizer.token_to_id(anchor) is None]
    tokenizer.add_special_tokens([AddedToken(anchor, special=True, normalized=False) for anchor in missing])
    return missing


def with_vocabulary(config: AGVASConfig, tensors: Tensors) -> AGVASConfig:
    """The config with as many tokens as the embedding table of the parts has rows: training may have resized it."""
    if EMBEDDINGS not in tensors:
        return config
    tied = config.language.tied_head and HEAD not in tensors
    return replace(config, language=replace(config.language, vocabulary=tensors[EMBEDDINGS].shape[0], tied_head=tied))


def highest_token(tokenizer: Tokenizer) -> int:
    """The largest id that the tokenizer gives."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values())


def _language(where: Path, both: Any, tensors: Tensors) -> LanguageConfig:
    theirs = both.text_config
    kind = theirs.model_type
    if kind not in ("qwen2", "llama"):
        raise ValueError(f"{where}: text_config is a {kind}, expected qwen2 or llama; this package computes no other language model")
    rope = dict(theirs.rope_parameters or {})
    _same(where, "text_config.rope_type", rope.get("rope_type", "default"), "default")
    _same(where, "text_config.hidden_act", theirs.hidden_act, "silu")
    heads, width = theirs.num_attention_heads, theirs.hidden_size
    head_width = getattr(theirs, "head_dim", None) or width // heads
    _same(where, "text_config.head_dim", head_width, width // heads)
    if kind == "llama":
        _same(where, "text_config.attention_bias", theirs.attention_bias, False)
        _same(where, "text_config.mlp_bias", theirs.mlp_bias, False)
    elif theirs.use_sliding_window:
        raise ValueError(f"{where}: text_config.use_sliding_window: expected false, got true; this package computes full attention")
    if EMBEDDINGS not in tensors:
        raise ValueError(f"{where.parent} has no token embeddings (language_model.model.embed_tokens.weight); copy every shard")
    return LanguageConfig(
        vocabulary=tensors[EMBEDDINGS].shape[0],
        width=width,
        layers=theirs.num_hidden_layers,
        heads=heads,
        key_value_heads=theirs.num_key_value_heads,
        mlp_width=theirs.intermediate_size,
        rope_theta=float(rope["rope_theta"]),
        norm_epsilon=theirs.rms_norm_eps,
        max_positions=theirs.max_position_embeddings,
        tied_head=bool(both.tie_word_embeddings) and HEAD not in tensors,  # a training may have given it a head of its own
        kind=kind,
    )


def _semantic(where: Path, theirs: Any) -> SemanticEncoderConfig:
    """The tower as far as the layer whose output is taken: hidden_states[0] is the embeddings, so -1 is every layer and -2 all but one."""
    vision = theirs.vision_config
    kinds = {
        "siglip_vision_model": ("siglip", "gelu_pytorch_tanh", 1e-6, "full"),
        "clip_vision_model": ("clip", "quick_gelu", 1e-5, "default"),
    }
    if vision.model_type not in kinds:
        raise ValueError(f"{where}: vision_config is a {vision.model_type}, expected one of {', '.join(kinds)}")
    kind, activation, epsilon, strategy = kinds[vision.model_type]
    _same(where, "vision_config.hidden_act", vision.hidden_act, activation)
    _same(where, "vision_config.layer_norm_eps", vision.layer_norm_eps, epsilon)
    _same(where, "vision_feature_select_strategy", theirs.vision_feature_select_strategy, strategy)
    layer = theirs.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"{where}: vision_feature_layer: expected one layer, got {layer}; this package projects one layer's features")
    layers = vision.num_hidden_layers + 1 + layer if layer < 0 else layer
    return SemanticEncoderConfig(
        vision.image_size, vision.patch_size, vision.hidden_size, layers, vision.num_attention_heads, vision.intermediate_size, kind
    )


def _trained(tensors: Tensors) -> tuple[SPAMConfig | None, MaskDecoderConfig, tuple[str, ...]]:
    """SPAM and mask decoder by their tensors' shapes; the paper's where there are none."""
    blocks = 0
    while f"mask_decoder.transformer.layers.{blocks}.self_attn.q_proj.weight" in tensors:
        blocks += 1
    if not blocks:
        return SPAMConfig(256, 8), MaskDecoderConfig(2, 8, 2048), ()
    mlp_width = tensors["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0]
    anchors = tensors["mask_decoder.queries"].shape[0]
    roles = {1: ROLES[2:], 2: ROLES[:2]}.get(anchors, ROLES)
    spam = SPAMConfig(tensors["spam.query.weight"].shape[0], 8) if "spam.query.weight" in tensors else None
    heads = ("mask_decoder.heads = 8", "spam.heads = 8")[: 1 if spam is None else 2]
    assumed = (*heads, "the prompts (the paper's)", "fusion weight and threshold 0.5")
    return spam, MaskDecoderConfig(blocks, 8, mlp_width, roles=roles), assumed


def _statistics(base: Path, resampled: bool = True) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of an encoder's input, in grey levels, from its own image processor; `resampled`: its filter is ours, too."""
    places = (base / "preprocessor_config.json", base / "processor_config.json")
    for path in places:
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_text())
            fields = fields.get("image_processor", fields)
            mean, std = ([float(value) for value in fields[name]] for name in ("image_mean", "image_std"))
            scale, resample = float(fields.get("rescale_factor", 1 / 255)), fields.get("resample", BICUBIC)
        except KeyError as error:
            if path != places[-1]:
                continue
            raise ValueError(f"{path} lacks {error}; copy preprocessor_config.json of the base") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; copy the file again") from error
        if resampled:
            _same(path, "resample", resample, BICUBIC)
        if not math.isclose(scale, 1 / 255, rel_tol=1e-3) or len(mean) != 3 or len(std) != 3:
            raise ValueError(f"{path}: expected three means and deviations and rescale_factor 1/255, got {mean}, {std} and {scale}")
        # Rounded, since a scale of eight digits must not make 127.5 something else.
        in_levels = [round(value / scale, 3) for value in (*mean, *std)]
        return (in_levels[0], in_levels[1], in_levels[2]), (in_levels[3], in_levels[4], in_levels[5])
    raise ValueError(f"{base} lacks preprocessor_config.json (mean and deviation of its pictures); copy it from where that is published")


def _same(where: Path, name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{where}: {name}: expected {expected!r}, got {found!r}; this package does not compute that variant")
