"""QuantPlan on disk: read back as written, refused when anything is off."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from calibration.gptq import GPTQSettings, round_to_nearest
from calibration.plan import (
    LinearRecord,
    PlanError,
    QuantPlan,
    image_sha256,
    model_sha256,
    read_plan,
    read_ranges,
    takes_plan,
    write_plan,
)
from calibration.weights import QuantizedWeight
from runtime.bundle import sha256_of

SETTINGS = GPTQSettings(group=8)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 16))


def weights_of(model: nn.Module) -> dict[str, QuantizedWeight]:
    return {"0": round_to_nearest(model[0].weight.detach(), SETTINGS)}  # type: ignore[index]


def plan_of(model: nn.Module) -> QuantPlan:
    return QuantPlan(
        model="small",
        weights_sha256=model_sha256(model),
        settings=SETTINGS,
        answer_share=0.5,
        modes=("direct",),
        images=("ab" * 32, "cd" * 32),
        tokens=99,
        linears=(LinearRecord("0", 4, 8, 0.01, 0.1, 0.2),),
        versions={"torch": "1", "agvas": None},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = network()
    write_plan(tmp_path / "plan", plan_of(model), weights_of(model), {"1": np.arange(5, dtype=np.float32)})
    return tmp_path / "plan"


def change(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(content | fields))


def change_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """With the hash that belongs to them, so that what is seen is what the tensors are."""
    save_file(tensors, folder / "weights.safetensors")
    change(folder, tensors_sha256=sha256_of(folder / "weights.safetensors"))


def test_a_plan_reads_back_as_it_was_written(folder: Path) -> None:
    model = network()
    plan, weights = read_plan(folder, model)
    assert plan == plan_of(model)
    wanted = weights_of(model)["0"]
    assert np.array_equal(weights["0"].codes, wanted.codes) and np.array_equal(weights["0"].scales, wanted.scales)
    np.testing.assert_array_equal(read_ranges(folder)["1"], np.arange(5))


def test_a_plan_for_another_checkpoint_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match=r"expected the small checkpoint it was made for.*agvas-calibrate"):
        read_plan(folder, network(seed=1))


def test_a_models_hash_is_of_names_shapes_and_values_and_not_of_the_16_bits_they_were_kept_in() -> None:
    model = network().half().float()
    assert model_sha256(model) == model_sha256(network().half())
    assert len({model_sha256(model), model_sha256(network(1)), model_sha256(nn.ModuleDict({"a": model}))}) == 3


def test_a_pictures_hash_is_of_its_pixels_and_its_shape() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert image_sha256(image) == image_sha256(image[::-1][::-1])
    assert len({image_sha256(picture) for picture in (image, image.reshape(2, 8, 3), image + 1)}) == 3


@pytest.mark.parametrize("file", ["plan.json", "weights.safetensors"])
def test_half_a_plan_is_refused_with_the_command_that_makes_one(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(PlanError, match=r"half of one.*agvas-calibrate"):
        read_plan(folder)


def test_damage_is_told_from_age(folder: Path) -> None:
    change(folder, schema=77)
    with pytest.raises(PlanError, match="schema 1, got 77"):
        read_plan(folder)
    (folder / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="expected JSON"):
        read_plan(folder)
    (folder / "plan.json").write_text("[]")
    with pytest.raises(PlanError, match="schema 1, got 'list'"):
        read_plan(folder)


def test_a_tensors_file_that_was_altered_is_refused(folder: Path) -> None:
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PlanError, match="expected sha256"):
        read_plan(folder)
    with pytest.raises(PlanError, match="expected sha256"):
        read_ranges(folder)


@pytest.mark.parametrize("fields", [{"surprise": 1}, {"settings": {"bits": 3}}, {"linears": [{"name": "0"}]}, {"images": None}])
def test_fields_that_are_no_plans_are_refused(folder: Path, fields: dict[str, object]) -> None:
    change(folder, **fields)
    with pytest.raises(PlanError, match="plan.json: expected the fields of a plan"):
        read_plan(folder)


def test_tensors_that_are_missing_misshapen_or_unrecorded_are_named(folder: Path) -> None:
    tensors = load_file(folder / "weights.safetensors")
    change_tensors(folder, {name: value for name, value in tensors.items() if name != "0.scales"})
    with pytest.raises(PlanError, match=r"expected tensor 0\.scales"):
        read_plan(folder)
    change_tensors(folder, tensors | {"0.scales": tensors["0.scales"][:, :1].copy()})
    with pytest.raises(PlanError, match=r"0: scales: expected float16 \[5, 2\]"):
        read_plan(folder)
    change_tensors(folder, tensors | {"7.codes": tensors["0.codes"]})
    with pytest.raises(PlanError, match="none for 7"):
        read_plan(folder)


def test_weights_that_are_not_the_records_are_not_written(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(PlanError, match="others for 0"):
        write_plan(tmp_path / "plan", plan_of(model), {}, {})
    plan = dataclasses.replace(plan_of(model), linears=(LinearRecord("0", 8, 8, 0.01, 0.1, 0.2),))
    with pytest.raises(PlanError, match="others for 0"):
        write_plan(tmp_path / "plan", plan, weights_of(model), {})
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("stop", "told"),
    [(KeyboardInterrupt(), None), (OSError("No space left"), "plan.json.partial: expected to be written whole, got.*free some space")],
)
def test_an_interruption_or_a_full_disk_leaves_the_older_plan_as_it_was_until_all_is_written(
    stop: BaseException, told: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, *_: object, **__: object) -> int:
        raise stop

    before, other = read_plan(folder)[0], network(1)
    with monkeypatch.context() as patched, pytest.raises(type(stop), match=told):
        patched.setattr(Path, "write_text", fail)
        write_plan(folder, plan_of(other), weights_of(other), {})
    assert read_plan(folder)[0] == before


@pytest.mark.parametrize("renamed", [0, 1])
def test_an_interruption_while_a_plan_takes_the_place_of_another_leaves_a_folder_that_takes_it(
    folder: Path, renamed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no plan then: the old plan.json must not vouch for the new tensors."""
    real, done = os.replace, list[str]()

    def replace(source: Path, target: Path) -> None:
        if len(done) == renamed:
            raise KeyboardInterrupt
        done.append(target.name)
        real(source, target)

    other = network(1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", replace)
        write_plan(folder, plan_of(other), weights_of(other), {})
    with pytest.raises(PlanError, match="half of one"):
        read_plan(folder)
    assert takes_plan(folder)
    write_plan(folder, plan_of(other), weights_of(other), {})
    assert read_plan(folder, other)[0] == plan_of(other)
    assert {path.name for path in folder.iterdir()} == {"plan.json", "weights.safetensors"}


def test_a_folder_of_other_files_takes_no_plan_though_they_be_named_alike(tmp_path: Path) -> None:
    assert takes_plan(tmp_path / "new") and takes_plan(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"another program's")
    assert not takes_plan(tmp_path)
    (tmp_path / "plan.json.partial").write_text("{}")
    assert takes_plan(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    assert not takes_plan(tmp_path)
