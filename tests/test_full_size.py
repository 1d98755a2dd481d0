"""The full-size command: which models it makes and what it calls a success. The measuring itself takes hours and is a person's to start."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from agvas import AGVAS, save
from agvas.checkpoint import CheckpointError
from agvas.config import NAMED, tiny
from benchmarks import full_size
from benchmarks.full_size import MODELS, SIZES, TARGETS, Work, do, main, verdicts
from benchmarks.random_checkpoint import reduced, spoken_rows, tokenizer_of
from calibration.calibrate import _Run


@pytest.mark.parametrize(("size", "billions"), [("7b", 8.7), ("13b", 14.0)])
def test_both_bases_are_the_published_sizes_and_can_say_the_answer(size: str, billions: float) -> None:
    config = NAMED[MODELS[size]]()
    for each in (config, reduced(config)):
        with torch.device("meta"):
            model = AGVAS(each, tokenizer_of(each))
        assert len(spoken_rows(model)) == 2
        assert (each.language.width, each.pixel.width) == (config.language.width, 1280)
        if each is config:
            assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)


def test_the_sizes_targets_are_the_7bs_alone() -> None:
    export = {"peak_rss_bytes": 1, "disk_bytes": TARGETS["gptq4_disk_bytes"] + 1, "weight_bytes": TARGETS["gptq4_weight_bytes"]}
    parts: dict[str, Any] = {"export-gptq4": export, "stages-16": {"worst_relative_error": 0.1}}
    assert verdicts(parts, "7b") == {
        "export_peak_rss_bytes": True,
        "gptq4_disk_bytes": False,
        "gptq4_weight_bytes": True,
        "stages-16": False,
    }
    assert verdicts(parts, "13b-reduced") == {"export_peak_rss_bytes": True, "stages-16": False}
    assert set(SIZES) == {"7b", "7b-reduced", "13b", "13b-reduced"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    config = tiny()
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, width=64, mlp_width=96, heads=4, layers=2))
    save(AGVAS(config, tokenizer_of(config)).eval(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_plan_is_made_exported_and_compared_with_what_it_says(checkpoint: Path, tmp_path: Path) -> None:
    work = Work(tmp_path, checkpoint, "7b", "fp16", "float", pictures=2)
    told = do("calibrate", work)
    assert told["pictures"] == 2 and not told["resumed"] and told["linears"] == 14 and told["mean_error"] < told["mean_rounding_error"]
    exported = do("export-plan", work)
    assert exported["lmm"] == "gptq4" and exported["precision"] == "fp16" and not exported["resumed"]
    compared = do("stages-plan", work)
    assert verdicts({"export-plan": exported, "stages-plan": compared}, "7b") == {"export_peak_rss_bytes": True, "stages-plan": True}
    assert not verdicts({"stages-plan": compared | {"worst_relative_error": 0.1}}, "7b")["stages-plan"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a process of its own runs here: without its start a plan of the smallest model is a matter of a second."""

    def run(command: list[str], stdout: int, text: bool, check: bool = False) -> subprocess.CompletedProcess[str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = importlib.import_module(command[2]).main(command[3:])
        done = subprocess.CompletedProcess(command, code, said.getvalue())
        if check:
            done.check_returncode()
        return done

    # In this module alone: others ask git.
    monkeypatch.setattr(full_size, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))


@pytest.mark.usefixtures("in_this_process")
def test_a_calibration_that_went_on_says_so_and_again_makes_the_plan_anew(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    arguments = ["--work", str(tmp_path), "--checkpoint", str(checkpoint.rename(tmp_path / "tiny")), "--output", str(output)]
    arguments += ["--size", "13b", "--parts", "calibrate"]
    made = _Run._quantize

    def stopped(self: _Run, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        made(self, index, *rest)

    def resumed(*more: str) -> bool:
        assert main([*arguments, *more]) == 0
        return bool(json.loads(output.read_text())["parts"]["calibrate"]["resumed"])

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_quantize", stopped)
        with pytest.raises(subprocess.CalledProcessError):
            main(arguments)
    assert resumed(), "half a plan"
    assert not resumed("--again")
    result = json.loads(output.read_text())
    assert [result[name] for name in ("size", "precision", "head", "pictures")] == ["13b", "fp16", "float", 2]
    output.write_text(json.dumps(result | {"parts": {}}))
    assert resumed(), "a whole one"
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_quantize", stopped)
        with pytest.raises(subprocess.CalledProcessError):
            main([*arguments, "--again"])
    assert json.loads(output.read_text())["parts"] == {}, "of a plan that is there no longer"
    assert not resumed("--again")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--size", "13b"], "expected --size 7b, which it was measured with, got --size 13b; give those, or choose another output"),
        (["--head", "int8", "--pictures", "8"], "expected --head float, --pictures 2, which it was measured with, got --head int8"),
        (["--precision", "bf16"], "expected --precision fp16, which"),
    ],
)
def test_an_output_of_other_settings_is_refused(
    settings: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    output.write_text(json.dumps({"size": "7b", "precision": "fp16", "head": "float", "pictures": 2, "parts": {"checkpoint": {}}}))
    before = output.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["--size", "7b", *settings, "--work", str(tmp_path), "--parts", "checkpoint", "--output", str(output)])
    assert ended.value.code == 2 and words in capsys.readouterr().err and output.read_bytes() == before


def test_an_older_output_is_of_the_settings_that_are_given(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    output.write_text(json.dumps({"size": "7b", "parts": {"checkpoint": {"bytes": 1}}}))
    arguments = ["--size", "7b", "--head", "int8", "--work", str(tmp_path), "--parts", "checkpoint", "--output", str(output)]
    assert main(arguments) == 0
    result = json.loads(output.read_text())
    assert result["head"] == "int8" and result["parts"] == {"checkpoint": {"bytes": 1}}


def test_a_checkpoint_of_another_size_in_the_work_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = reduced(NAMED[MODELS["7b"]]())
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(config.to_json())
    arguments = ["--work", str(tmp_path), "--parts", "checkpoint", "--output", str(tmp_path / "result.json")]
    for size in set(SIZES) - {"7b-reduced"}:
        with pytest.raises(SystemExit):
            main([*arguments, "--size", size])
        told = capsys.readouterr().err
        assert f"the model of --size {size}, in {tmp_path / 'checkpoint'}, got ov_7b_reduced; take another or remove it" in told
    assert full_size.refusal(Work(tmp_path, tmp_path / "checkpoint", "7b-reduced", "fp16", "float", 2), {}) is None
    assert full_size.refusal(Work(tmp_path, tmp_path / "given", "7b", "fp16", "float", 2), {}) is None


def test_a_checkpoint_of_yours_is_read_and_never_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = full_size.checkpoint(Work(tmp_path, tiny_checkpoint, "7b", "fp16", "float", 1))
    with safe_open(tiny_checkpoint / "model.safetensors", "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())
    assert found == {"bytes": (tiny_checkpoint / "model.safetensors").stat().st_size, "parameters": parameters, "seconds": None}
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        full_size.checkpoint(Work(tmp_path, tmp_path / "nowhere", "7b", "fp16", "float", 1))
    assert not list(tmp_path.iterdir())
