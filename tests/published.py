"""Miniature parts in the layouts that models are published in, each written by the library that publishes it so.

What has no such library at hand (SAM's own file) is written from transformers' module by the published names, read off
sam_vit_b_01ec64.pth: the other way round than agvas/layouts.py, and by other means.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SamConfig,
    SamModel,
    SiglipVisionConfig,
)

VOCABULARY = 448
MEAN, STD = [0.5, 0.25, 0.125], [0.5, 0.4, 0.3]


def spread(module: torch.nn.Module, seed: int) -> None:
    """Values of which no two tensors are alike, norms and biases included, so that none can stand for another unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(centre + 0.2 * torch.randn(tensor.shape, generator=generator))


def write_tokenizer(folder: Path, special: tuple[str, ...]) -> Tokenizer:
    """A base's tokenizer: it knows no anchors."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=added, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["Please segment the anomalies in this image."], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_processor(folder: Path) -> None:
    size = {"height": 45, "width": 45}
    fields = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 0.00392156862745098, "resample": 3, "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def onevision(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlavaOnevisionForConditionalGeneration:
    """LLaVA-OneVision in shards."""
    vision = SiglipVisionConfig(
        hidden_size=14,
        intermediate_size=29,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=45,
        patch_size=15,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=tied,
        max_position_embeddings=512,
    )
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, image_token_index=290, video_token_index=291)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    spread(model, 1)
    model.to(dtype).save_pretrained(folder, max_shard_size="30KB")
    write_tokenizer(folder, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"))
    write_processor(folder)
    return model


def llava_15(folder: Path) -> LlavaForConditionalGeneration:
    """LLaVA 1.5: a CLIP tower of which the last layer but one is taken, and Llama."""
    vision = CLIPVisionConfig(
        hidden_size=14, intermediate_size=29, num_hidden_layers=4, num_attention_heads=2, image_size=45, patch_size=15, projection_dim=8
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=290)).eval()
    spread(model, 2)
    model.save_pretrained(folder, max_shard_size="30KB")
    write_tokenizer(folder, ("<unk>", "<s>", "</s>", "<image>"))
    write_processor(folder)
    return model


def sam(seed: int = 3) -> SamModel:
    config = SamConfig(
        vision_config={
            "hidden_size": 12,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 23,
            "output_channels": 32,
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 56, "patch_size": 8},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 20, "iou_head_hidden_dim": 16},
    )
    model = SamModel(config).eval()
    spread(model, seed)
    return model


def write_sam_pth(model: SamModel, path: Path) -> None:
    """SAM's own file: one flat state dictionary of torch.save, image encoder, prompt encoder and mask decoder."""
    encoder = model.vision_encoder.state_dict()
    state = {
        "image_encoder.pos_embed": encoder["pos_embed"],
        "image_encoder.patch_embed.proj.weight": encoder["patch_embed.projection.weight"],
        "image_encoder.patch_embed.proj.bias": encoder["patch_embed.projection.bias"],
        "image_encoder.neck.0.weight": encoder["neck.conv1.weight"],
        "image_encoder.neck.1.weight": encoder["neck.layer_norm1.weight"],
        "image_encoder.neck.1.bias": encoder["neck.layer_norm1.bias"],
        "image_encoder.neck.2.weight": encoder["neck.conv2.weight"],
        "image_encoder.neck.3.weight": encoder["neck.layer_norm2.weight"],
        "image_encoder.neck.3.bias": encoder["neck.layer_norm2.bias"],
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.ones(2, 16),
        "prompt_encoder.no_mask_embed.weight": torch.ones(1, 32),
        "mask_decoder.iou_token.weight": torch.ones(1, 32),
    }
    for index in range(3):
        theirs, ours = f"image_encoder.blocks.{index}", f"layers.{index}"
        for kind in ("weight", "bias"):
            state[f"{theirs}.norm1.{kind}"] = encoder[f"{ours}.layer_norm1.{kind}"]
            state[f"{theirs}.norm2.{kind}"] = encoder[f"{ours}.layer_norm2.{kind}"]
            state[f"{theirs}.attn.qkv.{kind}"] = encoder[f"{ours}.attn.qkv.{kind}"]
            state[f"{theirs}.attn.proj.{kind}"] = encoder[f"{ours}.attn.proj.{kind}"]
            state[f"{theirs}.mlp.lin1.{kind}"] = encoder[f"{ours}.mlp.lin1.{kind}"]
            state[f"{theirs}.mlp.lin2.{kind}"] = encoder[f"{ours}.mlp.lin2.{kind}"]
        state[f"{theirs}.attn.rel_pos_h"] = encoder[f"{ours}.attn.rel_pos_h"]
        state[f"{theirs}.attn.rel_pos_w"] = encoder[f"{ours}.attn.rel_pos_w"]
    torch.save(state, path)
