"""agvas-calibrate: what it writes, what it says, and what the same command does after an interruption."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import of_four_modes

from agvas import AGVAS, save
from agvas.config import ov_7b, tiny
from agvas.tokenizer import train_tokenizer
from agvas.training.instructions import all_instructions
from agvas.weights import LazyTensor
from calibration.calibrate import (
    HEAD,
    disk_needed,
)
from calibration.cli import main
from calibration.plan import read_plan, read_ranges


@pytest.fixture(scope="module")
def model() -> AGVAS:
    return of_four_modes()


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def half_written(path: Path, *_: Any) -> None:
    """As Ctrl-C leaves a large file."""
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def test_the_command_writes_a_plan_that_belongs_to_the_checkpoint_and_a_gptq_checkpoint(
    model: AGVAS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from calibration.gptq_checkpoint import read_gptq_checkpoint

    save(model, tmp_path / "checkpoint")
    plan_folder, gptq_folder = tmp_path / "plan", tmp_path / "gptq"
    arguments = ["--checkpoint", tmp_path / "checkpoint", "--output", plan_folder, "--samples", "3", "--json"]
    assert run(*arguments, "--gptq-checkpoint", gptq_folder) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    plan, weights = read_plan(plan_folder, model)
    assert plan.settings.group == 32, "the largest that divides 64 and 96"
    assert printed["plan"] == str(plan_folder) and printed["pictures"] == 3 == len(plan.images)
    assert printed["linears"] == len(weights) == 14 and printed["mean_error"] < printed["mean_rounding_error"]
    assert HEAD in read_ranges(plan_folder)
    same = read_gptq_checkpoint(gptq_folder, model)
    assert all(np.array_equal(same[name].codes, weight.codes) for name, weight in weights.items())
    assert not (tmp_path / "plan.partial").exists()


def test_a_finished_plan_is_not_made_again_and_its_gptq_checkpoint_can_be_written_later(
    model: AGVAS, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration import calibrate as calibration
    from calibration.gptq_checkpoint import read_gptq_checkpoint

    save(model, tmp_path / "checkpoint")
    made = list[int]()
    real = calibration.quantize_layer
    monkeypatch.setattr(calibration, "quantize_layer", lambda *arguments: (made.append(1), real(*arguments))[1])
    arguments = ["--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "2"]
    assert run(*arguments) == 0 and len(made) == 2
    written = {path.name: path.read_bytes() for path in (tmp_path / "plan").iterdir()}
    capsys.readouterr()
    assert run(*arguments, "--gptq-checkpoint", tmp_path / "gptq") == 0
    told = capsys.readouterr()
    assert len(made) == 2 and f"{tmp_path / 'plan'} holds this plan already" in told.err and "14 linears in 4 bits" in told.out
    assert {path.name: path.read_bytes() for path in (tmp_path / "plan").iterdir()} == written
    plan, weights = read_plan(tmp_path / "plan", model)
    same = read_gptq_checkpoint(tmp_path / "gptq", model)
    assert all(np.array_equal(same[name].codes, weight.codes) for name, weight in weights.items())
    (tmp_path / "plan.partial").mkdir()  # another one's beginnings
    assert run(*arguments) == 0 and (tmp_path / "plan.partial").exists()
    (tmp_path / "plan.partial").rmdir()
    for number, changed in enumerate((["--samples", "3"], ["--bits", "8"], ["--dtype", "bf16"], ["--answer-share", "0.4"]), 2):
        assert run(*arguments, *changed) == 0
        assert "holds another plan, which the new one will replace" in capsys.readouterr().err and len(made) == 2 * number, changed
    assert read_plan(tmp_path / "plan", model)[0].answer_share == 0.4
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "plan", "gptq"}


def test_a_plan_of_other_prompts_or_preprocessing_or_from_before_they_were_recorded_is_made_again(
    model: AGVAS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(model, tmp_path / "checkpoint")
    arguments = ["--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "1"]
    assert run(*arguments) == 0
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config["prompts"]["instructions"]["direct"] = "Something else entirely."
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    assert run(*arguments) == 0 and "once it is whole (conversations differ)" in capsys.readouterr().err
    config["preprocessing"]["pixel_mean"] = [1, 2, 3]
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    assert run(*arguments) == 0 and "once it is whole (config differ)" in capsys.readouterr().err
    assert run(*arguments) == 0 and "holds this plan already" in capsys.readouterr().err
    old = json.loads((tmp_path / "plan" / "plan.json").read_text())
    del old["conversations"], old["config"]
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(old))
    read_plan(tmp_path / "plan", model)
    assert run(*arguments) == 0 and "once it is whole (conversations, config differ)" in capsys.readouterr().err


def test_a_plan_that_was_interrupted_while_it_was_written_is_written_by_the_same_command(
    model: AGVAS, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path / "checkpoint")
    arguments = ["--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "1"]
    with monkeypatch.context() as patched:
        patched.setattr("calibration.plan.write_tensors", half_written)
        assert run(*arguments) == 130
    assert "no plan was written, the same command goes on where it was" in capsys.readouterr().err
    assert run(*arguments) == 0
    read_plan(tmp_path / "plan", model)
    assert {path.name for path in tmp_path.rglob("plan*")} == {"plan", "plan.json"}


@pytest.mark.parametrize("following", [[], ["--bits", "8"]])
def test_an_interruption_after_the_plan_says_that_it_is_there_and_the_next_command_removes_the_work_folder(
    model: AGVAS, following: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, real = tmp_path / "plan.partial", shutil.rmtree

    def interrupted(path: Path, *arguments: Any, **named: Any) -> None:
        real(path, *arguments, **named)
        if path == work / "layers":
            raise KeyboardInterrupt

    save(model, tmp_path / "checkpoint")
    arguments = ["--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        assert run(*arguments) == 130
    told = capsys.readouterr().err
    assert f"interrupted; {tmp_path / 'plan'} was written" in told and "no plan was written" not in told
    read_plan(tmp_path / "plan", model)
    assert work.exists()
    assert run(*arguments, *following) == 0 and not work.exists()
    assert ("this plan already" if not following else "settings differ") in capsys.readouterr().err


def test_a_gptq_checkpoint_that_was_interrupted_is_written_by_the_same_command(
    model: AGVAS, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.gptq_checkpoint import read_gptq_checkpoint

    save(model, tmp_path / "checkpoint")
    arguments = ["--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "1"]
    with monkeypatch.context() as patched:
        patched.setattr("calibration.gptq_checkpoint.write_tensors", half_written)
        assert run(*arguments, "--gptq-checkpoint", tmp_path / "gptq") == 130
    assert f"{tmp_path / 'plan'} was written, not {tmp_path / 'gptq'}; the same command writes that" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "plan", "gptq"}
    assert run(*arguments, "--gptq-checkpoint", tmp_path / "gptq") == 0
    assert "holds this plan already" in capsys.readouterr().err
    read_gptq_checkpoint(tmp_path / "gptq", model)
    assert not list((tmp_path / "gptq").glob("*.partial"))


def test_a_disk_that_will_not_do_is_told_before_the_work(
    model: AGVAS, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration import cli

    save(model, tmp_path / "checkpoint")
    arguments = ["--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "1"]
    monkeypatch.setattr(cli, "_room", lambda work: 0)
    assert run(*arguments) == 0
    assert "MiB more disk than" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*arguments, "--group", "16") == 0
    assert "more disk" not in capsys.readouterr().err


def test_what_is_written_is_what_was_estimated(model: AGVAS, tmp_path: Path) -> None:
    """Of the models that it is for, whose layers are large beside names and headers."""
    config = ov_7b()
    with torch.device("meta"):
        linear = sum(p.numel() for n, p in AGVAS(config, model.tokenizer).language.model.layers.named_parameters() if p.dim() == 2)
        tensors = {
            name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.clone)
            for name, tensor in AGVAS(config, model.tokenizer).state_dict().items()
        }
    hidden = 2 * 128 * (2 * 729 + 100) * 3584 * 4
    assert disk_needed(tensors, config, 128) == pytest.approx(2 * linear * (1 + 2 / 128) + hidden, rel=1e-6)
    assert disk_needed(tensors, config, 128) == pytest.approx(19e9, rel=0.03)


def test_a_termination_is_told_as_an_interruption(model: AGVAS, tmp_path: Path) -> None:
    save(model, tmp_path / "checkpoint")
    command = [sys.executable, "-m", "calibration.cli", "--checkpoint", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "plan")]
    process = subprocess.Popen([*command, "--samples", "2000"], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    until = time.monotonic() + 120
    while not (tmp_path / "plan.partial" / "encoders.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; no plan was written, the same command goes on where it was" in told


def test_a_plan_made_in_16_bit_belongs_to_the_checkpoint_as_it_is_stored(model: AGVAS, tmp_path: Path) -> None:
    save(model, tmp_path / "checkpoint")  # in fp32, which bf16 does not hold
    assert run("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "1", "--dtype", "bf16") == 0
    read_plan(tmp_path / "plan", model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "0"], "--samples"),
        (["--group", "0", "--samples", "1", "--gptq-checkpoint", "gptq"], "--group: expected more than 0 with --gptq-checkpoint"),
        (["--dtype", "bf61"], "did you mean 'bf16'"),
        (["--device", "cuda:77"], "--device"),
        (["--bits", "5"], "4 or 8"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--images", "nowhere"], "nowhere: expected a folder of pictures, got no such folder"),
        (["--answer-share", "1.5"], "--answer-share: expected between 0 and 1, got 1.5"),
    ],
)
def test_the_command_refuses_bad_arguments_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output", tmp_path / "plan", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("agvas-calibrate: ") and words in error and len(error.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_gptq_checkpoint_is_not_written_over_the_checkpoint_or_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "checkpoint"
    save(AGVAS(tiny(), train_tokenizer([*all_instructions()], tiny().language.vocabulary)), checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    arguments = ("--checkpoint", checkpoint, "--output", tmp_path / "plan", "--samples", "1", "--group", "32")
    assert run(*arguments, "--gptq-checkpoint", checkpoint) == 2
    assert "expected a new folder or an older GPTQ checkpoint, got one with other files" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before and not (tmp_path / "plan").exists()


def test_the_command_does_not_write_over_a_folder_of_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run("--output", tmp_path) == 2
    assert "other files" in capsys.readouterr().err


def test_too_little_memory_is_told_before_the_work(
    model: AGVAS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(model, tmp_path / "checkpoint")
    monkeypatch.setattr("engines.memory.available_memory", lambda: 500 << 20)
    assert run("--checkpoint", tmp_path / "checkpoint", "--output", tmp_path / "plan", "--samples", "1") == 0
    assert "MiB of memory and 500 MiB are available: it may be killed" in capsys.readouterr().err
