"""Checkpoints: what is saved is what is loaded, bit for bit, and a damaged folder says what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import new_tiny, picture
from safetensors.torch import load_file, save_file
from torch import Tensor

from agvas import AGVAS, AGVASConfig, CheckpointError, load, save
from agvas.checkpoint import FILES, NANO
from agvas.config import NAMED, nano, tiny


@pytest.fixture(scope="module")
def model() -> AGVAS:
    return new_tiny()


@pytest.fixture(scope="module")
def saved(model: AGVAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it: `copy` it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    save(model, folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


def test_a_round_trip_keeps_every_bit(model: AGVAS, saved: Path) -> None:
    loaded = load(saved)
    assert loaded.config == model.config
    assert loaded.tokenizer.to_str() == model.tokenizer.to_str()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    assert not loaded.training


def test_a_loaded_model_computes_what_the_saved_one_did(tiny_model: AGVAS, tiny_checkpoint: Path) -> None:
    """Tensors that no file holds (rotary frequencies, position ids) included."""
    loaded = load(tiny_checkpoint)
    for name, buffer in loaded.named_buffers():
        assert not buffer.is_meta, name
        assert torch.equal(buffer, dict(tiny_model.named_buffers())[name]), name
    expected, got = tiny_model.segment(picture()), loaded.segment(picture())
    assert expected.anchor_states is not None
    assert got.answer_ids == expected.answer_ids
    # Not bit for bit: loaded weights lie at other memory alignments, and the matrix products round by it.
    np.testing.assert_allclose(got.anomaly_map, expected.anomaly_map, atol=1e-6)


def test_half_precision_rounds_once_and_is_computed_with_in_single(model: AGVAS, tmp_path: Path) -> None:
    save(model, tmp_path / "half", torch.float16)
    on_disk = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in on_disk.values()} == {torch.float16}
    loaded = load(tmp_path / "half").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.half().float()), name
    halves = load(tmp_path / "half", torch.float16).state_dict()
    assert all(torch.equal(halves[name], on_disk[name]) for name in halves)


def test_what_half_precision_does_not_hold_stays_as_it_is(tmp_path: Path) -> None:
    """Infinite in the file, a batch norm's variance silences its channel; whole numbers stay whole."""
    model = AGVAS(replace(tiny(), pixel=replace(tiny().pixel, stem="convolutional")), new_tiny().tokenizer)
    norm = model.pixel_encoder.patch_embed.mix[1]
    norm.running_var.fill_(2e5)
    save(model, tmp_path / "half", torch.float16)
    on_disk = load_file(tmp_path / "half" / "model.safetensors")
    single = {name for name, tensor in on_disk.items() if tensor.dtype == torch.float32}
    assert single == {"pixel_encoder.patch_embed.mix.1.running_var"}
    assert {on_disk[name].dtype for name in on_disk if name.endswith("num_batches_tracked")} == {torch.int64}
    loaded = load(tmp_path / "half").pixel_encoder.patch_embed.mix[1]
    assert torch.equal(loaded.running_var, norm.running_var)
    with pytest.raises(CheckpointError, match="mix.1.running_var has values up to 2e[+]05, which float16 does not hold"):
        load(tmp_path / "half", torch.float16)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_value_that_is_no_number_is_refused_where_it_is_saved_and_where_it_is_loaded(copy: Path, value: float) -> None:
    name = next(iter(dict(new_tiny().named_parameters())))
    change_weights(copy, lambda state: state[name].view(-1)[3].fill_(value))
    with pytest.raises(CheckpointError, match=f"{name} holds 1 NaN or infinite values of"):
        load(copy)
    broken = new_tiny()
    with torch.no_grad():
        dict(broken.named_parameters())[name].view(-1)[3] = value
    before = (copy / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=f"{name} holds 1 NaN or infinite values of"):
        save(broken, copy)
    assert (copy / "model.safetensors").read_bytes() == before


def test_loading_needs_no_memory_that_the_saved_model_shares(model: AGVAS, saved: Path) -> None:
    loaded = load(saved)
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    assert torch.equal(load(saved).state_dict()[name := next(iter(model.state_dict()))], model.state_dict()[name])


def test_a_checkpoint_is_three_files_and_no_pickle(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"] == sorted(FILES)
    for path in saved.iterdir():
        head = path.read_bytes()[:16]
        assert not head.startswith((b"PK", b"\x80\x02", b"\x80\x04"))  # zip and pickle, as torch.save writes
    header_size = int.from_bytes((saved / "model.safetensors").read_bytes()[:8], "little")
    json.loads((saved / "model.safetensors").read_bytes()[8 : 8 + header_size])


def test_saving_over_a_checkpoint_replaces_it_whole(model: AGVAS, copy: Path) -> None:
    other = new_tiny(seed=4)
    save(other, copy)
    assert len(list(copy.iterdir())) == 3
    name = next(iter(other.state_dict()))
    assert torch.equal(load(copy).state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("named", NAMED)
def test_a_config_survives_json(named: str) -> None:
    config = NAMED[named]()
    assert AGVASConfig.from_json(config.to_json()) == config


def test_no_folder_is_named_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder; give nano or a folder with config.json"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="not a folder"):
        load(tmp_path / "file")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"name": "tiny"}'])
def test_a_config_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        load(copy)


def _set(key: str, value: object) -> Callable[[dict], None]:  # type: ignore[type-arg]
    part, _, field = key.partition(".")
    return lambda fields: fields[part].update({field: value}) if field else fields.update({part: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set("colour", "red"), "colour"),
        (_set("pixel.colour", "red"), "colour"),
        (_set("semanticx", {}), "config.json: expected no field 'semanticx'; did you mean 'semantic'"),
        (_set("pixel.patch_syze", 3), "config.json: pixel: expected no field 'patch_syze'; did you mean 'patch_size'"),
        (_set("spam", 3), "config.json"),
        (lambda fields: fields["language"].pop("width"), "width"),
        (lambda fields: fields.pop("prompts"), "prompts"),
        (_set("prompts.anchor_position", "nearby"), "anchor_position"),
        (_set("prompts.suffix", "no place for an instruction"), "suffix"),
    ],
)
def test_a_wrong_field_of_the_config_is_named(copy: Path, change: Callable[[dict], object], named: str) -> None:  # type: ignore[type-arg]
    change_config(copy, change)
    with pytest.raises(CheckpointError, match=named):
        load(copy)


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_broken_tokenizer_is_refused(copy: Path, text: str) -> None:
    (copy / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load(copy)


def test_a_missing_tensor_is_named_with_its_shape(copy: Path) -> None:
    change_weights(copy, lambda state: state.pop("mask_decoder.queries"))
    with pytest.raises(CheckpointError, match=r"missing mask_decoder.queries \[3, 32\]"):
        load(copy)


def test_an_unexpected_tensor_is_named(copy: Path) -> None:
    change_weights(copy, lambda state: state.update({"mask_decoder.extra": torch.zeros(5)}))
    with pytest.raises(CheckpointError, match=r"unexpected mask_decoder.extra \[5\]"):
        load(copy)


def test_a_tensor_of_another_shape_is_named_with_both(copy: Path) -> None:
    change_weights(copy, lambda state: state.update({"mask_decoder.queries": torch.zeros(3, 31)}))
    with pytest.raises(CheckpointError, match=r"mask_decoder.queries is \[3, 31\], expected \[3, 32\]"):
        load(copy)


def test_a_config_of_other_sizes_does_not_take_the_weights_and_the_list_stays_readable(copy: Path) -> None:
    change_config(copy, _set("language.width", 30))
    with pytest.raises(CheckpointError, match="and [0-9]+ more") as refusal:
        load(copy)
    assert str(refusal.value).count(";") < 15


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(copy: Path, kept: float) -> None:
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        load(copy)


@pytest.mark.parametrize("surplus", [1, 16])
def test_a_file_with_more_than_its_tensors_is_refused(surplus: int, copy: Path) -> None:
    with open(copy / "model.safetensors", "ab") as file:
        file.write(bytes(surplus))
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read: its tensors end at byte .*; copy the file again"):
        load(copy)


def test_nano_ships_with_the_package() -> None:
    assert NANO.is_dir(), "agvas/nano is not there: train it with agvas-train and copy its checkpoint folder"
    assert sum((NANO / name).stat().st_size for name in FILES) <= 25e6
    assert sorted(path.name for path in NANO.iterdir()) == sorted([*FILES, "NOTICE"])  # of the trunk's weights
    model = load("nano")
    assert model.config == nano()
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    result = model.segment(noise)
    assert result.text == model.config.prompts.answer
    assert result.answer_ids == model.prompt_encoder.encode().draft
    assert np.isfinite(result.anomaly_map).all()
