"""A random checkpoint of any size, written tensor by tensor: what full-size measurements are made on, since no published one is at hand.

Values have the scales of trained ones, so that nothing overflows or vanishes on the way, and the language model says the fixed answer: of
the handful of tokens in it, each one's row in the head points where its predecessor's embedding does. All else is noise; masks mean
nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from agvas.config import AGVASConfig
from agvas.model import AGVAS
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions

VICUNA = ("<s>", "</s>")
TABLE, HEAD = "language.model.embed_tokens.weight", "language.lm_head.weight"
# Standard deviation of the answer's embeddings: about what all layers together add to a token.
SPOKEN = 0.5
WRITTEN_AT_ONCE = 1 << 24  # values
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_random_checkpoint(
    config: AGVASConfig, folder: Path, dtype: torch.dtype, progress: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Write config.json, tokenizer.json and model.safetensors; memory is a few of the largest tensor's rows.

    Args:
        progress: told (bytes written, bytes in all).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(config)
    with torch.device("meta"):
        model = AGVAS(config, tokenizer)
    (folder / "config.json").write_text(config.to_json())
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = spoken_rows(model)
    state = model.state_dict()
    header, offset = {}, 0
    for name, tensor in state.items():
        length = tensor.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in state.items():
            for first, block in _blocks(name, tensor, 2 * config.language.layers):
                for row, values in rows.get(name, {}).items():
                    if first <= row < first + len(block):
                        block[row - first] = values
                file.write(block.to(dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy().data)
            progress(file.tell(), offset)


def reduced(config: AGVASConfig) -> AGVASConfig:
    """A model of the same widths with two layers of each kind."""
    return dataclasses.replace(
        config,
        name=f"{config.name}_reduced",
        pixel=dataclasses.replace(config.pixel, layers=2, global_layers=(1,)),
        semantic=dataclasses.replace(config.semantic, layers=2),
        language=dataclasses.replace(config.language, layers=2),
    )


def tokenizer_of(config: AGVASConfig) -> Tokenizer:
    """A small one over the prompts' own words, which leaves the rest of the vocabulary unused."""
    tokenizer = train_tokenizer([*all_instructions(), config.prompts.answer], min(config.language.vocabulary, 4096) - len(VICUNA))
    if config.language.kind == "llama":
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VICUNA])
    return tokenizer


def spoken_rows(model: AGVAS) -> dict[str, dict[int, Tensor]]:
    """Rows of the token table and of the head, by token, that make the language model say the fixed answer."""
    prompt = model.prompt_encoder.encode()
    assert prompt.draft is not None
    spoken = [prompt.suffix[-1], *prompt.draft]
    if len(set(spoken[:-1])) != len(spoken) - 1:
        raise ValueError(f"{model.config.name}: expected an answer in which no token comes twice, got {spoken}; change the answer")
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(len(spoken) - 1, model.config.language.width, generator=generator)
    return {
        TABLE: dict(zip(spoken, embeddings * SPOKEN)),
        HEAD: dict(zip(spoken[1:], embeddings / embeddings.norm(dim=1, keepdim=True))),
    }


def scale_of(name: str, shape: Sequence[int], residuals: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values, as trained ones have them.

    Args:
        residuals: how often something is added to the residual stream.
    """
    mean, scale = 0.0, 0.02
    if len(shape) >= 2 and name != TABLE and "pos" not in name and "queries" not in name:
        scale = math.prod(shape[1:]) ** -0.5
    if "norm" in name and name.endswith("weight") and len(shape) == 1:
        mean, scale = 1.0, 0.1
    if name == "mask_decoder.frequencies":
        scale = 1.0
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight", "lin2.weight", "attn.proj.weight")):
        scale *= residuals**-0.5  # what is added to a residual stream, as trained models have it
    return mean, scale


def _blocks(name: str, tensor: Tensor, residuals: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, values of some rows) of a tensor, in order."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = tensor.shape
    mean, scale = scale_of(name, shape, residuals)
    rows = max(1, WRITTEN_AT_ONCE // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        yield first, torch.randn(count, *shape[1:], generator=generator).mul_(scale).add_(mean)
