"""The GPTQ checkpoint layout of auto-gptq, gptqmodel and transformers, written from integer weights and read back into them.

A folder of a Hugging Face language model whose linear layers stand as qweight int32 [K·bits/32, N], qzeros int32 [G, N·bits/32], scales
float16 [G, N] and g_idx int32 [K], little end first inside a word. Version 1 ("gptq") stores each zero point less one, version 2
("gptq_v2") as it is. Only what loses nothing on the way to every engine is read: symmetric, 4 or 8 bits, groups of neighbouring inputs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from agvas.interruption import held_back
from agvas.model import AGVAS
from agvas.weights import LazyTensor, LazyTensors, in_type, index_of, shard_of
from agvas.writing import disk_errors, write_tensors
from calibration.truth import linear_of
from calibration.weights import LazyQuantizedWeight, QuantizedWeight

FORMATS = {"gptq": 1, "gptq_v2": 0}  # what was taken from a zero point before it was stored
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZATION = "quantize_config.json"
# What is written, in the order in which it takes its names: a folder with the first is a GPTQ checkpoint's, whole or not.
WRITTEN = (QUANTIZATION, FILE, "tokenizer.json", "tokenizer_config.json", "config.json")
CONFIGS = ("config.json", QUANTIZATION, "quant_config.json")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
PREFIX = "language."
# A 4-bit weight is about a tenth off its float one; another model's weight is as far off as it is large, 1.4 in this measure.
BELONGS_BELOW = 0.6


class GPTQCheckpointError(ValueError):
    """A GPTQ checkpoint that is missing, damaged, or of a kind that would lose something here."""


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned values [R, C] → int32 [R·bits/32, C]: neighbours along the first axis in one word, the first in its lowest bits."""
    per_word = 32 // bits
    if len(values) % per_word:
        found = len(values)
        raise GPTQCheckpointError(f"axis: expected a multiple of {per_word} to pack {bits} bits, got {found}; keep the layer in float")
    words = values.astype(np.uint32).reshape(-1, per_word, values.shape[1])
    shifts = (np.arange(per_word, dtype=np.uint32) * bits)[None, :, None]
    return np.ascontiguousarray(np.bitwise_or.reduce(words << shifts, axis=1)).view(np.int32)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [R·bits/32, C] → unsigned values [R, C], uint8."""
    per_word = 32 // bits
    shifts = (np.arange(per_word, dtype=np.uint32) * bits)[None, :, None]
    values = (np.ascontiguousarray(words).view(np.uint32)[:, None, :] >> shifts) & ((1 << bits) - 1)
    return values.astype(np.uint8).reshape(-1, words.shape[1])


def layer_tensors(quantized: QuantizedWeight, version: str = "gptq") -> dict[str, np.ndarray]:
    """qweight, qzeros, scales and g_idx of one linear layer.

    Raises:
        GPTQCheckpointError: a number of inputs or outputs that does not fill whole words.
    """
    outputs, inputs = quantized.codes.shape
    zero = 1 << (quantized.bits - 1)
    codes = quantized.codes.T.astype(np.int16) + zero  # [K, N]
    zeros = np.full((outputs, inputs // quantized.group), zero - _less(version))
    return {
        "qweight": pack(codes, quantized.bits),
        "qzeros": np.ascontiguousarray(pack(zeros, quantized.bits).T),
        "scales": np.ascontiguousarray(quantized.scales.T),
        "g_idx": (np.arange(inputs) // quantized.group).astype(np.int32),
    }


def layer_weight(name: str, tensors: Mapping[str, np.ndarray], version: str = "gptq") -> QuantizedWeight:
    """One linear layer read back; bits and group are what the tensors' shapes say.

    Args:
        tensors: qweight, qzeros and scales, and g_idx unless groups follow one another.

    Raises:
        GPTQCheckpointError: names the layer, and what is missing, of an odd shape, asymmetric, or in an order that is not ours.
    """
    if missing := [part for part in PARTS[:3] if part not in tensors]:
        raise GPTQCheckpointError(f"{name}: expected {', '.join(PARTS[:3])}, got none of {', '.join(missing)}; copy the checkpoint again")
    qweight, qzeros, scales = (tensors[part] for part in PARTS[:3])
    if qweight.dtype != np.int32 or qzeros.dtype != np.int32:
        raise GPTQCheckpointError(f"{name}: expected int32 words, got {qweight.dtype} and {qzeros.dtype}; pack it with pack_dtype int32")
    groups, outputs = scales.shape
    if qweight.shape[1] != outputs:
        raise GPTQCheckpointError(f"{name}: expected qweight of {outputs} outputs as scales, got {list(qweight.shape)}; copy it again")
    found = qzeros.shape[1] * 32 / outputs
    if found not in (4.0, 8.0):
        raise GPTQCheckpointError(f"{name}: expected 4 or 8 bits, got {found:g}; quantise it with 4 or 8")
    bits = int(found)
    inputs = len(qweight) * 32 // bits
    if inputs % groups or len(qzeros) != groups:
        raise GPTQCheckpointError(f"{name}: expected {inputs} inputs in equal groups, got {groups} scales, {len(qzeros)} zeros")
    group = inputs // groups
    places = _group_places(name, tensors.get("g_idx"), inputs, group)
    _check_zeros(name, unpack(np.ascontiguousarray(qzeros.T), bits), bits, version)
    codes = unpack(qweight, bits).astype(np.int16) - (1 << (bits - 1))
    if not np.isfinite(scales).all() or (scales <= 0).any():
        raise GPTQCheckpointError(f"{name}: expected positive finite scales, got others; copy the checkpoint again or quantise it again")
    stored = scales[places].T.astype(np.float16)
    if scales.dtype != np.float16 and not np.array_equal(stored.astype(scales.dtype), scales[places].T):
        raise GPTQCheckpointError(f"{name}: expected scales that float16 holds, got {scales.dtype} ones it does not; save it in float16")
    return QuantizedWeight(np.ascontiguousarray(codes.T.astype(np.int8)), np.ascontiguousarray(stored), bits, group)


def check_writable(folder: Path, model: AGVAS, bits: int) -> None:
    """Refuse before the work what `write_gptq_checkpoint` could not write, or would write over.

    Raises:
        GPTQCheckpointError: the folder holds something else than a GPTQ checkpoint, or one whose weights would be read instead or beside;
            a layer's width does not fill whole words.
        OSError: the folder cannot be made or written to.
    """
    begun = {f"{name}.partial" for name in WRITTEN}  # what a run that was stopped left
    if folder.exists() and not (folder / QUANTIZATION).is_file():
        if not folder.is_dir() or {path.name for path in folder.iterdir()} - begun:
            raise GPTQCheckpointError(
                f"{folder}: expected a new folder or an older GPTQ checkpoint, got one with other files; choose another"
            )
    if others := sorted(path.name for path in (*folder.glob("*.safetensors"), *folder.glob(INDEX)) if path.name != FILE):
        raise GPTQCheckpointError(
            f"{folder}: expected a new folder or an older GPTQ checkpoint in {FILE} alone, got one with {', '.join(others[:5])}, which "
            "readers would take for the new one's weights; choose another, or remove the old checkpoint"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: expected to write a GPTQ checkpoint there, got no permission; choose another folder")
    per_word = 32 // bits
    for name, layer in model.language.model.layers.named_modules():
        if isinstance(layer, torch.nn.Linear) and (layer.in_features % per_word or layer.out_features % per_word):
            found = f"{layer.out_features} × {layer.in_features}"
            raise GPTQCheckpointError(f"{name}: expected multiples of {per_word} to pack {bits} bits, got {found}; leave it out")


def write_gptq_checkpoint(
    model: AGVAS, weights: Mapping[str, QuantizedWeight], folder: Path, version: str = "gptq", floats: LazyTensors | None = None
) -> None:
    """The language model as a GPTQ checkpoint that transformers, gptqmodel and serving engines load. Embeddings, norms and head stay float.

    Args:
        weights: by linear layer of the language model's decoder layers, all of one bits and group; asked for one after the other.
        floats: the checkpoint's tensors, from which come those that the model has on the meta device.

    Raises:
        GPTQCheckpointError: weights of several kinds, or of a layer that is no linear of the language model; a layer left out.
        OSError: the disk is full; an older checkpoint is as it was.
    """
    shapes = {name: (weight.shape, weight.bits, weight.group) for name, weight in weights.items()}
    kinds = {(bits, group) for _, bits, group in shapes.values()}
    linears = {f"{PREFIX}model.{name}" for name, layer in model.language.model.named_modules() if isinstance(layer, torch.nn.Linear)}
    if differing := sorted(linears ^ weights.keys()):
        raise GPTQCheckpointError(f"weights: expected all linears of the decoder layers alone, differing: {', '.join(differing[:5])}")
    if len(kinds) != 1:
        raise GPTQCheckpointError(f"weights: expected one (bits, group), got {sorted(kinds)}; quantise with one group for all")
    bits, group = kinds.pop()
    tensors: dict[str, LazyTensor] = {}
    for name, ((outputs, inputs), _, _) in shapes.items():
        for part, shape, kind in (
            ("qweight", (inputs * bits // 32, outputs), torch.int32),
            ("qzeros", (inputs // group, outputs * bits // 32), torch.int32),
            ("scales", (inputs // group, outputs), torch.float16),
            ("g_idx", (inputs,), torch.int32),
        ):
            tensors[f"{name.removeprefix(PREFIX)}.{part}"] = LazyTensor(shape, kind, partial(_part, weights, name, version, part))
    replaced = {f"{name.removeprefix(PREFIX)}.weight" for name in weights}
    config = model.language.config.to_dict()
    if config.get("tie_word_embeddings"):
        replaced.add("lm_head.weight")
    dtype = model.language.lm_head.weight.dtype
    for name, tensor in model.language.state_dict().items():
        if name not in replaced:
            if tensor.is_meta and floats is None:
                raise GPTQCheckpointError(f"{name} is on the meta device: expected the checkpoint's tensors, got none")
            read = floats[PREFIX + name].read if tensor.is_meta and floats is not None else partial(torch.Tensor.detach, tensor)
            tensors[name] = LazyTensor(tuple(tensor.shape), dtype, partial(_in_type, read, dtype, name))
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": True,
        "desc_act": False,  # act-order chose the codes, but groups stand in their natural order
        "static_groups": True,
        "lm_head": False,
        "format": version,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": "agvas"},
    }
    named = str(dtype).removeprefix("torch.")
    config |= {"architectures": [type(model.language).__name__], "dtype": named, "quantization_config": quantization}
    folder.mkdir(parents=True, exist_ok=True)
    end = model.config.prompts.end
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    texts = {
        QUANTIZATION: json.dumps(quantization, indent=2) + "\n",
        "tokenizer.json": model.tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(tokens, indent=2) + "\n",
        "config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, text in texts.items():
        file = folder / f"{name}.partial"
        with disk_errors(file):
            file.write_text(text, encoding="utf-8")
    write_tensors(folder / f"{FILE}.partial", tensors, {"format": "pt"})
    with held_back():  # half of these would pass for another program's files
        for name in WRITTEN:
            os.replace(folder / f"{name}.partial", folder / name)


def _part(weights: Mapping[str, QuantizedWeight], name: str, version: str, part: str) -> torch.Tensor:
    return torch.from_numpy(layer_tensors(weights[name], version)[part])


def _in_type(read: Callable[[], torch.Tensor], dtype: torch.dtype, name: str) -> torch.Tensor:
    return in_type(read(), dtype, name)


def read_gptq_checkpoint(folder: str | Path, model: AGVAS | None = None) -> dict[str, QuantizedWeight]:
    """The integer weights of a checkpoint made by auto-gptq, gptqmodel or `write_gptq_checkpoint`, by linear layer of AGVAS.

    Layers are told by what follows "layers.N.", so that checkpoints of the language model alone and of a LLaVA around it both fit. Its
    float tensors are not read: they are the AG-VAS checkpoint's own.

    Args:
        model: the checkpoint it shall be used with; None leaves that unchecked.

    Raises:
        GPTQCheckpointError: missing, damaged, of another method or kind (see `layer_weight`), or not a quantisation of the model.
    """
    weights = {name: make() for name, make in _readers(Path(folder)).items()}
    if model is not None:
        check_belongs(model, weights)
    return weights


def open_gptq_checkpoint(folder: str | Path, tensors: LazyTensors) -> dict[str, LazyQuantizedWeight]:
    """As `read_gptq_checkpoint`, each layer to be read when asked for; every one is read once to be checked, and let go.

    Args:
        tensors: of the opened checkpoint that it shall be used with.

    Raises:
        GPTQCheckpointError: as `read_gptq_checkpoint`.
    """
    weights = {}
    for name, make in _readers(Path(folder)).items():
        quantized = make()
        if f"{name}.weight" not in tensors:
            raise GPTQCheckpointError(f"{name}: expected a linear layer of the model, got none of that name; quantise this checkpoint")
        _check_layer(name, tensors[f"{name}.weight"].read(), quantized)
        weights[name] = LazyQuantizedWeight(quantized.shape, quantized.bits, quantized.group, make)
    return weights


def _readers(folder: Path) -> dict[str, Callable[[], QuantizedWeight]]:
    """What reads each layer of a GPTQ checkpoint."""
    version = _version(folder)
    readers: dict[str, Callable[[], QuantizedWeight]] = {}

    def reader(name: str, stem: str, files: Mapping[str, Path]) -> Callable[[], QuantizedWeight]:
        return lambda: layer_weight(name, {part: _tensor(path, f"{stem}.{part}") for part, path in files.items()}, version)

    for stem, files in sorted(_layers(folder).items()):
        name = _name(stem)
        if name is None:
            raise GPTQCheckpointError(
                f"{folder}: expected quantised linears of the language model's decoder layers alone, got {stem}; "
                "quantise those only (a head in integers is not supported)"
            )
        if name in readers:
            raise GPTQCheckpointError(f"{folder}: expected one layer {name}, got several, {stem} among them; give the language model's")
        readers[name] = reader(name, stem, files)
    if not readers:
        raise GPTQCheckpointError(f"{folder}: expected quantised linears (…qweight), got none; give a checkpoint made by GPTQ")
    return readers


def check_belongs(model: AGVAS, weights: Mapping[str, QuantizedWeight]) -> None:
    """Raises GPTQCheckpointError unless the weights are this model's, a little changed by rounding: its layers, shapes and values."""
    for name, quantized in weights.items():
        try:
            weight = linear_of(model, name).weight
        except ValueError as error:
            raise GPTQCheckpointError(str(error)) from error
        _check_layer(name, weight, quantized)


def _check_layer(name: str, tensor: torch.Tensor, quantized: QuantizedWeight) -> None:
    weight = tensor.detach().float().cpu().numpy()
    if weight.shape != quantized.codes.shape:
        found = list(quantized.codes.shape)
        raise GPTQCheckpointError(f"{name}: expected a weight {list(weight.shape)}, got {found}; it is another model's")
    distance = float(np.linalg.norm(quantized.dequantized() - weight) / max(float(np.linalg.norm(weight)), 1e-30))
    if distance > BELONGS_BELOW:
        raise GPTQCheckpointError(
            f"{name}: expected this checkpoint's weight after rounding, got one that is {distance:.2f} of its length away; "
            "quantise the checkpoint that is exported"
        )


def _less(version: str) -> int:
    if version not in FORMATS:
        raise GPTQCheckpointError(f"checkpoint format: expected one of {', '.join(FORMATS)}, got {version!r}; convert it to one of them")
    return FORMATS[version]


def _group_places(name: str, g_idx: np.ndarray | None, inputs: int, group: int) -> np.ndarray:
    """Which row of scales each run of `group` neighbouring inputs uses."""
    if g_idx is None:
        return np.arange(inputs // group)
    if g_idx.shape != (inputs,) or g_idx.min() < 0 or g_idx.max() >= inputs // group:
        raise GPTQCheckpointError(f"{name}.g_idx: expected {inputs} numbers below {inputs // group}, got others; copy the checkpoint again")
    runs = g_idx.reshape(-1, group)
    if (runs != runs[:, :1]).any():
        raise GPTQCheckpointError(
            f"{name}.g_idx: expected groups of {group} neighbouring inputs, got them mixed (act-order without static groups), which no "
            "engine here takes without a slow gather; quantise again with desc_act false or static_groups true, or with agvas-calibrate"
        )
    return runs[:, 0]


def _check_zeros(name: str, zeros: np.ndarray, bits: int, version: str) -> None:
    middle = 1 << (bits - 1)
    expected = middle - _less(version)
    if (zeros == expected).all():
        return
    for other, less in FORMATS.items():
        if (zeros == middle - less).all():
            raise GPTQCheckpointError(
                f"{name}.qzeros: expected {expected} as format {version} stores it, got {middle - less}, which is format {other}'s; "
                f'correct "checkpoint_format" in the checkpoint\'s config to "{other}"'
            )
    raise GPTQCheckpointError(
        f"{name}.qzeros: expected the zero point {middle} everywhere (symmetric), got stored values {zeros.min()}..{zeros.max()}; "
        "quantise again with sym true: TensorRT takes no other"
    )


def _version(folder: Path) -> str:
    """The checkpoint format its configuration declares; old checkpoints declare none and are version 1."""
    if not folder.is_dir():
        raise GPTQCheckpointError(f"{folder}: expected a checkpoint folder, got none; give the folder with config.json and {FILE}")
    settings: dict[str, Any] | None = None
    for name in CONFIGS:
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise GPTQCheckpointError(f"{folder / name}: expected JSON, got {error}; copy the checkpoint again") from error
            settings = content.get("quantization_config") if name == "config.json" else content
            if settings is not None:
                break
    if settings is None:
        raise GPTQCheckpointError(f'{folder}: expected "quantization_config" in config.json or quantize_config.json, got neither; not GPTQ')
    method = settings.get("quant_method", "gptq")
    if method != "gptq":
        raise GPTQCheckpointError(f"{folder}: expected quant_method gptq, got {method!r}; only GPTQ checkpoints are read")
    if settings.get("pack_dtype", "int32") not in ("int32", None):
        raise GPTQCheckpointError(f"{folder}: expected pack_dtype int32, got {settings['pack_dtype']!r}; save it packed in int32")
    # gptqmodel writes both names, the newer one "format"; auto-gptq's "checkpoint_format" or none.
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    _less(str(version))
    return str(version)


def _layers(folder: Path) -> dict[str, dict[str, Path]]:
    """Files by part of each quantised layer, by the layer's name in the checkpoint."""
    if (index := folder / INDEX).is_file():
        try:
            files = {name: shard_of(index, shard) for name, shard in index_of(index).items()}
        except ValueError as error:
            raise GPTQCheckpointError(str(error)) from error
    else:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise GPTQCheckpointError(
                f"{folder}: expected {FILE}, another single .safetensors file or {INDEX}, got {len(found)} files; "
                "convert a .bin or .pt checkpoint by loading and saving it with gptqmodel"
            )
        files = {name: found[0] for name in _names(found[0])}
    layers: dict[str, dict[str, Path]] = {}
    for name, path in files.items():
        stem, _, part = name.rpartition(".")
        if part in PARTS:
            layers.setdefault(stem, {})[part] = path
    return layers


def _name(stem: str) -> str | None:
    """A checkpoint's name of a decoder layer's linear, as AGVAS names it; None for any other."""
    matched = re.fullmatch(r"(?:(?!.*(?:vision|visual)).*\.)?layers\.(\d+)\.((?:self_attn|mlp)\.\w+_proj)", stem)
    return f"{PREFIX}model.layers.{matched[1]}.{matched[2]}" if matched else None


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except Exception as error:  # the library raises nothing narrower
        raise GPTQCheckpointError(f"{path} cannot be read: {error}; copy the checkpoint again") from error


def _tensor(path: Path, name: str) -> np.ndarray:
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except Exception as error:  # the library raises nothing narrower
        raise GPTQCheckpointError(f"{path}: {name} cannot be read: {error}; copy the checkpoint again") from error
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
