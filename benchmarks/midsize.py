"""A checkpoint about ten times nano's size with random weights, to measure latency beyond toys without anything to download.

    python -m benchmarks.midsize --output midsize
    agvas-export --checkpoint midsize --precision fp32 --lmm float --output bundle-midsize --pictures 8

Times do not depend on what weights have learned, but on what is said: a model that misses the fixed answer generates up to its limit. So
the head is written, not drawn: each answer token follows from the one before it, and direct mode is verified in one pass as a trained
model's is. The masks are of no meaning, yet they are the same picture's in every candidate, which is what parity compares.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from agvas import AGVAS, AGVASConfig, load, save
from agvas.config import LanguageConfig, MaskDecoderConfig, PixelEncoderConfig, SemanticEncoderConfig, SPAMConfig, nano

# Where a layer adds to what it was given: small, so that a position's state still tells which token stands there.
RESIDUAL_SCALE = 0.02
VIT_SHARE = 0.1


def midsize() -> AGVASConfig:
    """nano's parts, wider and deeper; windows of 14 on a grid that they do not divide, as in ViT-H; grouped keys as in Qwen2-7B."""
    small = nano()
    return dataclasses.replace(
        small,
        name="midsize",
        pixel=PixelEncoderConfig(608, 16, 256, 8, 4, 1024, 14, (3, 7), output_width=128, stem="convolutional"),
        semantic=SemanticEncoderConfig(224, 16, 384, 8, 6, 1536),
        language=LanguageConfig(small.language.vocabulary, 512, 14, 8, 2, 1408, max_positions=2048),
        spam=SPAMConfig(width=128, heads=4),
        mask_decoder=MaskDecoderConfig(layers=2, heads=4, mlp_width=512),
        preprocessing=dataclasses.replace(small.preprocessing, pixel_size=608, semantic_size=224),
    )


def random_checkpoint(config: AGVASConfig, seed: int = 0) -> AGVAS:
    """Random weights with nano's tokenizer that say the fixed answer.

    The head's row of each answer token is the embedding of the token before it; all other rows are zero. Embeddings of random tokens are
    nearly at right angles, and no token comes twice, so the arg-max is never close.
    """
    torch.manual_seed(seed)
    model = AGVAS(config, load("nano").tokenizer).eval()
    prompt = model.prompt_encoder.encode()
    if prompt.draft is None:
        raise ValueError("config: expected a fixed answer in direct mode, got none; a random model cannot write one")
    before = (prompt.suffix[-1], *prompt.draft[:-1])
    if len(set(before)) != len(before):
        raise ValueError(f"config: expected an answer without repeated tokens, got {prompt.draft}; change prompts.answer")
    with torch.no_grad():
        table = model.language.get_input_embeddings().weight
        table.normal_()
        for layer in model.language.model.layers:
            layer.self_attn.o_proj.weight.mul_(RESIDUAL_SCALE)
            layer.mlp.down_proj.weight.mul_(RESIDUAL_SCALE)
        head = model.language.lm_head.weight
        head.zero_()
        for token, last in zip(prompt.draft, before, strict=True):
            head[token] = table[last] / table.shape[1] ** 0.5
        for name, parameter in model.pixel_encoder.named_parameters():
            if "pos" in name:
                parameter.normal_(std=0.02)
        # The stem speaks and the ViT adds a little, as in training's beginning: maps follow the picture's contrasts. A random ViT's alone
        # hardly differ from place to place, and a mask would be the rounding of whatever computed it.
        model.pixel_encoder.neck.layer_norm2.weight.fill_(VIT_SHARE)
        model.mask_decoder.queries.normal_()  # at the scale of trained ones: the three maps differ
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    model = random_checkpoint(midsize(), options.seed)
    save(model, options.output)
    count, small = (sum(p.numel() for p in one.parameters()) / 1e6 for one in (model, load("nano")))
    print(f"{options.output}: {count:.1f} M parameters, random (nano has {small:.1f} M)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
