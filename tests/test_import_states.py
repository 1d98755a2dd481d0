"""The state of a training that DeepSpeed saved, as agvas-import reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from imported_parts import TARGETS, Published, same_tensors
from safetensors.torch import save_file

from agvas import CheckpointError, load, save
from agvas.importing import ImportSettings, import_parts
from benchmarks.deepspeed_equivalence import difference_of_import


def deepspeed_state(the_parts: Published, folder: Path) -> Path:
    """As DeepSpeed 0.19 saves ZeRO 2 through accelerate: looked at on a run of its own."""
    step = folder / "state" / "pytorch_model"
    step.mkdir(parents=True)
    (folder / "state" / "latest").write_text("pytorch_model")
    shapes = [{name: tensor.shape for name, tensor in the_parts.state.items() if "lora_" in name}]
    states = {"module": the_parts.state, "buffer_names": [], "optimizer": None, "param_shapes": shapes, "ds_version": "0.19.8"}
    torch.save(states, step / "mp_rank_00_model_states.pt")
    settings = {"parts": {"lora": {"rank": 3, "alpha": 7, "targets": list(TARGETS)}}}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "state"


@pytest.mark.parametrize("within", ["", "pytorch_model"])
def test_a_run_that_deepspeed_saved_is_read_without_running_code(the_parts: Published, within: str, tmp_path: Path) -> None:
    state = deepspeed_state(the_parts, tmp_path)
    import_parts(ImportSettings(the_parts.start, tmp_path / "checkpoint", None, (state / within,)))
    same_tensors(load(tmp_path / "checkpoint"), the_parts.merged.state_dict())


def test_a_deepspeed_state_in_16_bit_says_where_the_finer_weights_are(the_parts: Published, tmp_path: Path) -> None:
    state = deepspeed_state(the_parts, tmp_path)
    done = import_parts(ImportSettings(the_parts.start, tmp_path / "whole", None, (state,)))
    assert not any("16-bit" in note for note in done.notes)
    halves = {name: tensor.bfloat16() for name, tensor in the_parts.state.items()}
    torch.save({"module": halves}, state / "pytorch_model" / "mp_rank_00_model_states.pt")
    done = import_parts(ImportSettings(the_parts.start, tmp_path / "half", None, (state,)))
    assert any("holds 16-bit weights" in note and "zero_to_fp32.py" in note for note in done.notes)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_what_zero_to_fp32_writes_is_read(the_parts: Published, form: str, tmp_path: Path) -> None:
    deepspeed_state(the_parts, tmp_path)
    merged = tmp_path / "merged"
    merged.mkdir()
    if form == "model.safetensors":
        save_file(the_parts.state, merged / form, metadata={"format": "pt"})
    elif form == "pytorch_model.bin":
        torch.save(the_parts.state, merged / form)
    else:
        places = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(the_parts.state)}
        for shard in set(places.values()):
            torch.save({name: tensor for name, tensor in the_parts.state.items() if places[name] == shard}, merged / shard)
        (merged / form).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = the_parts.trained / "config.json"
    import_parts(ImportSettings(the_parts.onevision, tmp_path / "checkpoint", the_parts.sam, (merged,), config=config))
    same_tensors(load(tmp_path / "checkpoint"), the_parts.merged.state_dict())


class Foreign:
    """Stands for an object of another library in a pickle."""


def test_a_state_with_objects_in_it_says_what_to_run(the_parts: Published, tmp_path: Path) -> None:
    state = deepspeed_state(the_parts, tmp_path)
    torch.save({"module": the_parts.state, "loss_scaler": Foreign()}, state / "pytorch_model" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(.*Foreign\).*zero_to_fp32.py . merged --safe_serialization"):
        import_parts(ImportSettings(the_parts.start, tmp_path / "checkpoint", None, (state,)))


def test_zero_stage_3_says_what_to_run(the_parts: Published, tmp_path: Path) -> None:
    state = deepspeed_state(the_parts, tmp_path)
    whole = state / "pytorch_model" / "mp_rank_00_model_states.pt"
    whole.rename(whole.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt"))
    with pytest.raises(CheckpointError, match="ZeRO stage 3, whose weights are in pieces; run `python zero_to_fp32.py"):
        import_parts(ImportSettings(the_parts.start, tmp_path / "checkpoint", None, (state,)))


@pytest.mark.parametrize(
    ("within", "lora", "message"),
    [
        ("layers.2.mlp.down_proj.lora_", {}, r"a layer that settings.json names \(model.language.model.layers.2.mlp.down_proj\): copy"),
        ("nothing", {"rank": 4}, "expected adapters of rank 4, as .*settings.json says, got rank 3; give the settings.json that was"),
    ],
)
def test_a_state_s_adapters_are_those_of_its_run(
    the_parts: Published, within: str, lora: dict[str, object], message: str, tmp_path: Path
) -> None:
    state = deepspeed_state(the_parts, tmp_path)
    torch.save(
        {"module": {name: tensor for name, tensor in the_parts.state.items() if within not in name}},
        state / "pytorch_model" / "mp_rank_00_model_states.pt",
    )
    settings = {"rank": 3, "alpha": 7, "targets": list(TARGETS)} | lora
    (tmp_path / "settings.json").write_text(json.dumps({"parts": {"lora": settings}}))
    with pytest.raises(CheckpointError, match=message):
        import_parts(ImportSettings(the_parts.start, tmp_path / "checkpoint", None, (state,)))


def test_the_state_of_a_run_is_the_checkpoint_it_left(the_parts: Published, tmp_path: Path) -> None:
    """By the measure of benchmarks/deepspeed_equivalence.py, which takes a state that DeepSpeed wrote."""
    deepspeed_state(the_parts, tmp_path)
    save(the_parts.merged, tmp_path / "checkpoint")
    assert difference_of_import(the_parts.start, tmp_path) == 0
    other = load(the_parts.checkpoint)
    with torch.no_grad():
        other.mask_decoder.queries += 0.25
    save(other, tmp_path / "checkpoint")
    assert difference_of_import(the_parts.start, tmp_path) == pytest.approx(0.25, abs=1e-5)


def test_adapters_whose_scale_nothing_says_are_refused(the_parts: Published, tmp_path: Path) -> None:
    save_file(the_parts.state, tmp_path / "state.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds adapters and nothing says their scale; put peft's adapter_config.json"):
        import_parts(ImportSettings(the_parts.start, tmp_path / "checkpoint", None, (tmp_path / "state.safetensors",)))
