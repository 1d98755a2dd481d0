"""Checkpoints with seeded random weights in the layouts that models are published in: what importing is tried on where no download is.

    python -m benchmarks.make_checkpoint --size mini --output parts
    python -m benchmarks.make_checkpoint --size 7b --output parts      # 19 GB; one tensor in memory at a time

Four parts: base/ (LLaVA-OneVision in Hugging Face's layout, sharded), sam.pth (segment-anything's own), trained/ (agvas-train's: a peft
adapter and trained.safetensors) and, from them, checkpoint/ (agvas-import's). Names and shapes are the published ones; values mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import pickle
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agvas.checkpoint import EMBEDDINGS, HEAD, CheckpointError
from agvas.config import (
    AGVASConfig,
    LanguageConfig,
    MaskDecoderConfig,
    PixelEncoderConfig,
    SemanticEncoderConfig,
    SPAMConfig,
    ov_7b,
    tiny,
)
from agvas.importing import ImportSettings, import_parts
from agvas.model import AGVAS
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions

SHARD = 5_000_000_000  # bytes, Hugging Face's usual
RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "v_proj")
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Size:
    """A model, and what its language model's and tower's weights are stored in."""

    config: AGVASConfig
    dtype: torch.dtype
    shard: int = SHARD


def sizes() -> dict[str, Size]:
    """By the name that --size takes: 7b and 0.5b are LLaVA-OneVision's with SAM ViT-H, mini is for tests."""
    whole, small = ov_7b(), tiny()
    half = dataclasses.replace(whole, name="ov_0.5b", language=LanguageConfig(152000, 896, 24, 14, 2, 4864, tied_head=True))
    mini = dataclasses.replace(
        small,
        name="mini",
        pixel=PixelEncoderConfig(56, 8, 12, 2, 2, 48, 3, (1,), output_width=32),
        semantic=SemanticEncoderConfig(45, 15, 14, 2, 2, 29),
        spam=SPAMConfig(256, 8),
        mask_decoder=MaskDecoderConfig(2, 8, 64),
        prompts=whole.prompts,
    )
    whole = dataclasses.replace(whole, language=dataclasses.replace(whole.language, vocabulary=152128))
    return {"mini": Size(mini, torch.float32, 40_000), "0.5b": Size(half, torch.float16), "7b": Size(whole, torch.float16)}


def make_parts(size: Size, folder: Path, seed: int = 0, progress: Callable[[int], object] = lambda _: None) -> None:
    """Write base/, sam.pth and trained/ into `folder`.

    Args:
        progress: told the bytes written since it was last told.
    """
    config = size.config
    tokenizer = train_tokenizer([*all_instructions(), config.prompts.answer], min(config.language.vocabulary, 4096))
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in AGVAS(config, tokenizer).state_dict().items()}
    draw = Draw(seed, progress)
    base, trained = folder / "base", folder / "trained"
    for place in (base, trained):
        place.mkdir(parents=True)
    named = {base_name(name): shape for name, shape in shapes.items() if name.startswith(("semantic_encoder.", "language."))}
    if config.language.tied_head:
        del named[base_name(HEAD)]
    width = config.semantic.width
    named |= {"image_newline": (config.language.width,)}
    named |= {f"vision_tower.vision_model.post_layernorm.{kind}": (width,) for kind in ("weight", "bias")}
    write_shards(base, named, size.dtype, size.shard, draw)
    (base / "config.json").write_text(json.dumps(base_config(config), indent=2) + "\n")
    (base / "preprocessor_config.json").write_text(json.dumps(processor(config), indent=2) + "\n")
    tokenizer.save(str(base / "tokenizer.json"))

    pixel = {sam_name(name): shape for name, shape in shapes.items() if name.startswith("pixel_encoder.")}
    unused = {"prompt_encoder.no_mask_embed.weight": (1, 256), "mask_decoder.iou_token.weight": (1, 256)}
    write_torch(folder / "sam.pth", pixel | unused, draw)

    rest = {name: shape for name, shape in shapes.items() if name.startswith(("spam.", "mask_decoder.")) or name in (EMBEDDINGS, HEAD)}
    if config.language.tied_head:
        del rest[HEAD]
    write_safetensors(trained / "trained.safetensors", rest, torch.float32, draw)
    write_safetensors(trained / "adapter_model.safetensors", dict(adapters(shapes)), torch.float32, draw)
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "bias": "none"}
    (trained / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")
    record = {"parts": sorted({name.split(".")[0] for name in rest}), "adapter": True, "tensors": sorted(rest)}
    (trained / "trained.json").write_text(json.dumps(record, indent=2) + "\n")
    (trained / "config.json").write_text(config.to_json())
    tokenizer.save(str(trained / "tokenizer.json"))


class Draw:
    """Values by name: the same for the same seed, whatever was drawn before."""

    def __init__(self, seed: int, progress: Callable[[int], object]) -> None:
        self.seed, self.progress = seed, progress

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        """The tensor's bytes, at the scale of trained weights: norms about one, the rest so that outputs stay of the inputs' size."""
        number = int.from_bytes(name.encode(), "little") % (2**61 - 1)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        values = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = values.mul_(0.1).add_(1.0)
        else:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 2500
            values = values.mul_(0.02 if "embed" in name else fan**-0.5)
        stored: Tensor = values.to(dtype)
        self.progress(stored.nbytes)
        return stored.contiguous().view(torch.uint8).numpy() if stored.ndim else stored.reshape(1).view(torch.uint8).numpy()


def adapters(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """peft's names of the two factors of each layer that is adapted."""
    for name, shape in shapes.items():
        if name.startswith("language.") and any(name.endswith(f".{target}.weight") for target in TARGETS):
            layer = f"base_model.model.{name.removeprefix('language.').removesuffix('.weight')}"
            yield f"{layer}.lora_A.weight", (RANK, shape[1])
            yield f"{layer}.lora_B.weight", (shape[0], RANK)


def base_name(name: str) -> str:
    """A tensor's name in LLaVA-OneVision as published."""
    name = name.replace("semantic_encoder.projector.", "multi_modal_projector.").replace("language.", "language_model.", 1)
    return name.replace("semantic_encoder.", "vision_tower.vision_model.")


def sam_name(name: str) -> str:
    """A tensor's name in segment-anything's files."""
    name = name.replace("pixel_encoder.", "image_encoder.").replace(".layers.", ".blocks.").replace("embed.projection.", "embed.proj.")
    for theirs, ours in (("0", "conv1"), ("1", "layer_norm1"), ("2", "conv2"), ("3", "layer_norm2")):
        name = name.replace(f"neck.{ours}.", f"neck.{theirs}.")
    return name.replace("layer_norm", "norm")


def base_config(config: AGVASConfig) -> dict[str, Any]:
    """config.json as it was published with LLaVA-OneVision (transformers 4.45)."""
    language, semantic = config.language, config.semantic
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": language.tied_head,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": language.vocabulary,
            "hidden_size": language.width,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.key_value_heads,
            "intermediate_size": language.mlp_width,
            "max_position_embeddings": language.max_positions,
            "rms_norm_eps": language.norm_epsilon,
            "rope_theta": language.rope_theta,
            "tie_word_embeddings": language.tied_head,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": semantic.width,
            "num_hidden_layers": semantic.layers,
            "num_attention_heads": semantic.heads,
            "intermediate_size": semantic.mlp_width,
            "image_size": semantic.image_size,
            "patch_size": semantic.patch_size,
            "vision_use_head": False,
        },
    }


def processor(config: AGVASConfig) -> dict[str, Any]:
    """preprocessor_config.json as published."""
    side = config.semantic.image_size
    scale = 1 / 255
    mean, std = ([value * scale for value in values] for values in (config.preprocessing.semantic_mean, config.preprocessing.semantic_std))
    return {"image_mean": mean, "image_std": std, "rescale_factor": scale, "resample": 3, "size": {"height": side, "width": side}}


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, limit: int, draw: Draw) -> None:
    """model-0000x-of-0000y.safetensors and their index, a new shard where the next tensor would go beyond `limit` bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, dtype, draw)
        places |= dict.fromkeys(shard, file)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, draw: Draw) -> None:
    """The library's own writer wants every tensor at once; the format is a header and the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.write(draw(name, shape, dtype).tobytes())


class _Storage:
    """What torch.save's pickle says of a storage: where it lies in the archive."""

    def __init__(self, key: str, count: int) -> None:
        self.key, self.count = key, count


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", torch.FloatStorage, value.key, "cpu", value.count) if isinstance(value, _Storage) else None


class _Rebuilt:
    """A tensor over such a storage, pickled as torch pickles one."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


def write_torch(path: Path, shapes: dict[str, tuple[int, ...]], draw: Draw) -> None:
    """A file of torch.save with a float32 state dictionary, a tensor at a time: a zip, not compressed, of a pickle and bytes."""
    storages = [_Storage(str(index), math.prod(shape)) for index, shape in enumerate(shapes.values())]
    state = OrderedDict((name, _Rebuilt(storage, shape)) for storage, (name, shape) in zip(storages, shapes.items()))
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(state)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def put(name: str, content: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # without the hour, so that the same seed makes the same file

        put("data.pkl", pickled.getvalue())
        put("byteorder", b"little")
        for index, (name, shape) in enumerate(shapes.items()):
            put(f"data/{index}", draw(name, shape, torch.float32).tobytes())
        put("version", b"3\n")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all parts and the checkpoint were written, 2 when they could not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sizes(), default="mini")
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    output, size = options.output, sizes()[options.size]
    if output.exists():
        print(f"make_checkpoint: {output} exists; choose another --output, or remove it", file=sys.stderr)
        return 2
    try:
        with tqdm(unit="B", unit_scale=True, desc=f"random {options.size}") as bar:
            make_parts(size, output, options.seed, bar.update)
        relative = ImportSettings(output / "base", output / "checkpoint", output / "sam.pth", (output / "trained",))
        import_parts(relative)
    except (CheckpointError, OSError, KeyboardInterrupt) as error:
        shutil.rmtree(output, ignore_errors=True)  # half a checkpoint is no use to anyone
        print(f"make_checkpoint: {error or 'interrupted'}; nothing was left in {output}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    print(f"{output / 'checkpoint'}: agvas-inspect tells what is in it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
