"""GPTQ checkpoints: words packed as a loop packs them, read back without loss, refused where something would be lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from agvas import AGVAS
from agvas.config import tiny
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from calibration.gptq import GPTQSettings, round_to_nearest
from calibration.gptq_checkpoint import (
    GPTQCheckpointError,
    check_writable,
    layer_tensors,
    layer_weight,
    pack,
    read_gptq_checkpoint,
    unpack,
    write_gptq_checkpoint,
)
from calibration.truth import fake_quantize, linear_of
from calibration.weights import QuantizedWeight

OUTPUTS, INPUTS, GROUP = 24, 96, 32


def some_weight(bits: int = 4, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return round_to_nearest(torch.randn(OUTPUTS, INPUTS, generator=generator), GPTQSettings(bits=bits, group=GROUP))


def same(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    arrays = np.array_equal(first.codes, second.codes) and np.array_equal(first.scales, second.scales)
    return arrays and (first.bits, first.group) == (second.bits, second.group)


@pytest.fixture(scope="module")
def model() -> AGVAS:
    torch.manual_seed(5)
    config = tiny()
    language = dataclasses.replace(config.language, width=64, mlp_width=96, heads=4, key_value_heads=2, layers=2)
    config = dataclasses.replace(config, language=language)
    return AGVAS(config, train_tokenizer([*all_instructions(), config.prompts.answer], language.vocabulary)).eval()


@pytest.fixture(scope="module")
def weights(model: AGVAS) -> dict[str, QuantizedWeight]:
    names = [name for name, layer in model.named_modules() if name.startswith("language.model.") and isinstance(layer, torch.nn.Linear)]
    return {name: round_to_nearest(linear_of(model, name).weight.detach(), GPTQSettings(group=GROUP)) for name in names}


@pytest.fixture
def folder(model: AGVAS, weights: dict[str, QuantizedWeight], tmp_path: Path) -> Path:
    write_gptq_checkpoint(model, weights, tmp_path / "gptq")
    return tmp_path / "gptq"


def change(folder: Path, alter: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    alter(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **fields: object) -> None:
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        inner = content["quantization_config"] if name == "config.json" else content
        inner.update(fields)
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_packed_as_a_loop_over_shifts_packs_them(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (32, 3))
    per_word = 32 // bits
    words = values.reshape(-1, per_word, 3)
    wanted = [[sum(int(word[i, c]) << (bits * i) for i in range(per_word)) for c in range(3)] for word in words]
    packed = pack(values, bits)
    assert packed.dtype == np.int32
    assert packed.view(np.uint32).tolist() == wanted
    np.testing.assert_array_equal(unpack(packed, bits), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_layer_in_the_layout_stands_for_the_same_weight_by_the_layouts_own_formula(bits: int, version: str) -> None:
    """w[k, n] = scales[g, n] · (q[k, n] - zero[g, n]), with the stored zero one less in version 1; read from words one by one."""
    weight = some_weight(bits)
    tensors = layer_tensors(weight, version)
    assert tensors["qweight"].shape == (INPUTS * bits // 32, OUTPUTS) and tensors["qzeros"].shape == (INPUTS // GROUP, OUTPUTS * bits // 32)
    words, zero_words, per_word = tensors["qweight"].view(np.uint32), tensors["qzeros"].view(np.uint32), 32 // bits
    for k, n in ((0, 0), (1, 0), (37, 5), (95, 23)):
        g = int(tensors["g_idx"][k])
        code = int(words[k // per_word, n]) >> (bits * (k % per_word)) & ((1 << bits) - 1)
        zero = int(zero_words[g, n // per_word]) >> (bits * (n % per_word)) & ((1 << bits) - 1)
        zero += 1 if version == "gptq" else 0
        assert float(tensors["scales"][g, n]) * (code - zero) == weight.dequantized()[n, k]
    assert same(layer_weight("layer", tensors, version), weight)


def test_a_checkpoint_reads_back_as_it_was_written(folder: Path, model: AGVAS, weights: dict[str, QuantizedWeight]) -> None:
    got = read_gptq_checkpoint(folder, model)
    assert got.keys() == weights.keys() and all(same(got[name], weight) for name, weight in weights.items())


def test_what_stays_float_is_there_and_the_config_says_the_rest(folder: Path, model: AGVAS, weights: dict[str, QuantizedWeight]) -> None:
    from transformers import AutoConfig, GPTQConfig

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in model.language.state_dict().items():
        if f"language.{name.removesuffix('.weight')}" not in weights:
            np.testing.assert_array_equal(tensors[name], tensor.numpy())
    assert not {f"{name.removeprefix('language.')}.weight" for name in weights} & tensors.keys()
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("qwen2", 64, model.config.language.vocabulary)
    parsed = GPTQConfig.from_dict(config.quantization_config)
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act, parsed.format) == (4, GROUP, True, False, "gptq")
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_names_of_a_llava_around_the_language_model_are_understood(folder: Path, weights: dict[str, QuantizedWeight], prefix: str) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)

    change(folder, rename)
    assert read_gptq_checkpoint(folder).keys() == weights.keys()


def test_shards_with_an_index_are_read(folder: Path, weights: dict[str, QuantizedWeight]) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)  # a layer's parts may fall into two files
    parts = {"a.safetensors": names[: len(names) // 2 + 1], "b.safetensors": names[len(names) // 2 + 1 :]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    got = read_gptq_checkpoint(folder)
    assert all(same(got[name], weight) for name, weight in weights.items())
    (folder / "b.safetensors").unlink()
    with pytest.raises(GPTQCheckpointError, match=r"lacks b\.safetensors, which model.safetensors.index.json names; copy every shard"):
        read_gptq_checkpoint(folder)


def test_a_config_in_its_own_file_and_one_without_a_format_are_version_1(folder: Path, weights: dict[str, QuantizedWeight]) -> None:
    """As auto-gptq wrote them."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    old = {"bits": 4, "group_size": GROUP, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    assert same(read_gptq_checkpoint(folder)["language.model.layers.0.mlp.up_proj"], weights["language.model.layers.0.mlp.up_proj"])


def test_version_2_is_read_and_a_version_that_its_zeros_contradict_is_refused(
    model: AGVAS, weights: dict[str, QuantizedWeight], tmp_path: Path
) -> None:
    write_gptq_checkpoint(model, weights, tmp_path / "two", version="gptq_v2")
    got = read_gptq_checkpoint(tmp_path / "two", model)
    assert all(same(got[name], weight) for name, weight in weights.items())
    configure(tmp_path / "two", format="gptq", checkpoint_format="gptq")
    with pytest.raises(GPTQCheckpointError, match=r"expected 7 as format gptq stores it, got 8, which is format gptq_v2's"):
        read_gptq_checkpoint(tmp_path / "two")


def test_groups_in_another_order_are_put_right_and_missing_g_idx_means_neighbours() -> None:
    weight = some_weight()
    tensors = layer_tensors(weight)
    del tensors["g_idx"]
    assert same(layer_weight("layer", tensors), weight)
    order = np.array([2, 0, 1])
    g_idx = np.repeat(order, GROUP).astype(np.int32)
    swapped = tensors | {"scales": np.ascontiguousarray(tensors["scales"][np.argsort(order)]), "g_idx": g_idx}
    assert same(layer_weight("layer", swapped), weight)


def test_act_order_without_static_groups_is_refused_with_the_reason_and_the_remedy(folder: Path) -> None:
    name = "model.layers.1.self_attn.o_proj"

    def shuffle(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{name}.g_idx"] = np.random.default_rng(0).permutation(tensors[f"{name}.g_idx"])

    change(folder, shuffle)
    with pytest.raises(GPTQCheckpointError, match=r"layers\.1\.self_attn\.o_proj\.g_idx.*act-order without static groups.*desc_act false"):
        read_gptq_checkpoint(folder)


def test_asymmetric_weights_are_refused() -> None:
    tensors = layer_tensors(some_weight())
    zeros = unpack(np.ascontiguousarray(tensors["qzeros"].T), 4).astype(np.int64)
    zeros[3, 1] = 5
    tensors["qzeros"] = np.ascontiguousarray(pack(zeros, 4).T)
    with pytest.raises(GPTQCheckpointError, match=r"layer\.qzeros.*symmetric.*sym true"):
        layer_weight("layer", tensors)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("qweight", None, "none of qweight"),
        ("scales", None, "none of scales"),
        ("qweight", np.zeros((12, 23), np.int32), "24 outputs"),
        ("qweight", np.zeros((12, 24), np.int64), "pack_dtype int32"),
        ("qzeros", np.zeros((3, 2), np.int32), "4 or 8 bits"),
        ("scales", np.full((3, 24), np.nan, np.float16), "positive finite"),
        ("scales", np.full((3, 24), 0.1, np.float32), "float16"),
        ("scales", np.ones((5, 24), np.float16), "equal groups"),
        ("g_idx", np.full(96, 3, np.int32), "below 3"),
        ("g_idx", np.zeros(95, np.int32), "96 numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(part: str, value: np.ndarray | None, words: str) -> None:
    tensors = layer_tensors(some_weight())
    if value is None:
        del tensors[part]
    else:
        tensors[part] = value
    with pytest.raises(GPTQCheckpointError, match=f"layer.*{words}"):
        layer_weight("layer", tensors)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "awq"}, "expected quant_method gptq, got 'awq'"),
        ({"checkpoint_format": "marlin"}, "got 'marlin'"),
        ({"pack_dtype": "int16"}, "pack_dtype int32"),
    ],
)
def test_other_methods_and_formats_are_refused(folder: Path, fields: dict[str, str], words: str) -> None:
    configure(folder, **fields)
    with pytest.raises(GPTQCheckpointError, match=words):
        read_gptq_checkpoint(folder)


def test_folders_that_are_no_gptq_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GPTQCheckpointError, match="checkpoint folder"):
        read_gptq_checkpoint(tmp_path / "nowhere")
    with pytest.raises(GPTQCheckpointError, match="quantization_config"):
        read_gptq_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(GPTQCheckpointError, match="loading and saving it with gptqmodel"):
        read_gptq_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(GPTQCheckpointError, match="cannot be read"):
        read_gptq_checkpoint(folder)


def test_a_head_in_integers_is_refused(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({"lm_head.qweight": np.zeros((8, 512), np.int32)}))
    with pytest.raises(GPTQCheckpointError, match="lm_head.*not supported"):
        read_gptq_checkpoint(folder)


def test_a_checkpoint_of_another_model_is_refused(folder: Path, model: AGVAS, weights: dict[str, QuantizedWeight]) -> None:
    other = fake_quantize(model, {})
    torch.manual_seed(77)
    with torch.no_grad():
        linear_of(other, "language.model.layers.1.mlp.up_proj").weight.normal_(std=0.1)
    with pytest.raises(GPTQCheckpointError, match=r"layers\.1\.mlp\.up_proj: expected this checkpoint's weight"):
        read_gptq_checkpoint(folder, other)
    assert read_gptq_checkpoint(folder, fake_quantize(model, weights)).keys() == weights.keys()


def test_weights_that_this_layout_cannot_hold_are_not_written(model: AGVAS, weights: dict[str, QuantizedWeight], tmp_path: Path) -> None:
    name = "language.model.layers.0.mlp.up_proj"
    with pytest.raises(GPTQCheckpointError, match=f"differing: {name}"):
        write_gptq_checkpoint(model, {key: weight for key, weight in weights.items() if key != name}, tmp_path / "gptq")
    eight = round_to_nearest(linear_of(model, name).weight.detach(), GPTQSettings(bits=8, group=GROUP))
    with pytest.raises(GPTQCheckpointError, match=r"one \(bits, group\)"):
        write_gptq_checkpoint(model, weights | {name: eight}, tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize("full_at", ["quantize_config.json.partial", "config.json.partial", "model.safetensors.partial"])
def test_a_full_disk_leaves_an_older_checkpoint_as_it_was_and_a_new_folder_that_takes_the_same_command(
    model: AGVAS, weights: dict[str, QuantizedWeight], folder: Path, full_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = open

    def full(file: Path, *arguments: Any, **named: Any) -> Any:
        opened = real(file, *arguments, **named)
        if Path(file).name == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, tmp_path / "new"):
        with monkeypatch.context() as patched, pytest.raises(OSError, match=f"{full_at}: expected to be written whole.*free some space"):
            patched.setattr("builtins.open", full)
            patched.setattr("io.open", full)
            write_gptq_checkpoint(model, weights, target)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}
    check_writable(tmp_path / "new", model, 4)
    write_gptq_checkpoint(model, weights, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == before.keys()


@pytest.mark.parametrize("renamed", range(5))
def test_a_kill_while_the_files_take_their_names_leaves_a_folder_that_takes_the_same_command(
    model: AGVAS, weights: dict[str, QuantizedWeight], renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, done = os.replace, list[Path]()

    def replace(source: Path, target: Path) -> None:
        if len(done) == renamed:
            raise SystemExit
        done.append(target)
        real(source, target)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(os, "replace", replace)
        write_gptq_checkpoint(model, weights, tmp_path)
    check_writable(tmp_path, model, 4)
    write_gptq_checkpoint(model, weights, tmp_path)
    assert read_gptq_checkpoint(tmp_path, model).keys() == weights.keys() and not list(tmp_path.glob("*.partial"))


def test_an_older_checkpoint_whose_weights_would_be_read_in_place_of_the_new_ones_is_not_written_over(folder: Path, model: AGVAS) -> None:
    """Sharded ones, and those of auto-gptq, whose one file has a name of its own."""
    check_writable(folder, model, 4)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    with pytest.raises(GPTQCheckpointError, match=r"in model.safetensors alone, got one with gptq_model-4bit-128g.safetensors, which"):
        check_writable(folder, model, 4)
    (folder / "gptq_model-4bit-128g.safetensors").rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(GPTQCheckpointError, match=r"got one with model.safetensors.index.json, .*choose another, or remove the old"):
        check_writable(folder, model, 4)


def test_the_truth_holds_the_integers_values_in_a_copy(model: AGVAS, weights: dict[str, QuantizedWeight]) -> None:
    before = linear_of(model, "language.model.layers.0.mlp.up_proj").weight.clone()
    truth = fake_quantize(model, weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(linear_of(truth, name).weight.detach().numpy(), weight.dequantized())
    assert torch.equal(linear_of(model, "language.model.layers.0.mlp.up_proj").weight, before)
    with pytest.raises(ValueError, match="nothing of that name"):
        fake_quantize(model, {"language.model.layers.9.mlp.up_proj": some_weight()})
    with pytest.raises(ValueError, match=r"expected a weight \[96, 64\], got \[24, 96\]"):
        fake_quantize(model, {"language.model.layers.0.mlp.up_proj": some_weight()})
