"""Mistakes that are easily made on a command line are told by what was expected, and with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agvas.checkpoint import CheckpointError, checkpoint_folder
from agvas.importing import ImportSettings, import_parts
from agvas.lora import read_settings
from agvas.parts import trained
from agvas.torch_file import torch_file
from benchmarks import accuracy
from calibration.gptq_checkpoint import FILE, QUANTIZATION
from calibration.plan import PLAN, WEIGHTS
from export import inspect_cli
from runtime import writing
from runtime.bundle import MANIFEST, Bundle
from runtime.errors import BundleCorrupt, BundleMissing, OutputError, RequestError
from runtime.recipe import Recipe
from runtime.writing import make_folder, write_result


def test_a_base_is_looked_for_in_the_folder_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "parts" / "base").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="got one that has no config.json; copy it from where the base is published"):
        import_parts(ImportSettings(tmp_path / "parts", tmp_path / "out"))
    (tmp_path / "parts" / "base" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CheckpointError, match=r"expected a folder of Hugging Face's .*parts/base looks like one"):
        import_parts(ImportSettings(tmp_path / "parts", tmp_path / "out"))


def test_what_an_import_would_not_use_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "sam.pth").touch()
    with pytest.raises(CheckpointError, match="--pixel-encoder .*sam.pth: expected none with --base .*, a checkpoint that has one"):
        import_parts(ImportSettings(tiny_checkpoint, tmp_path / "out", tmp_path / "sam.pth"))
    for encoder, got in ((None, "no --pixel-encoder"), (tmp_path / "sam.pth", "sam.pth")):
        base = tmp_path / "llava"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text('{"model_type": "llava"}')
        with pytest.raises(CheckpointError, match=f"--pixel-size 100: expected it with a DINOv3 alone, got .*{got}"):
            import_parts(ImportSettings(base, tmp_path / "out", encoder, pixel_size=100))


def test_a_bundle_in_place_of_a_checkpoint_is_called_one(tiny_bundle: Path) -> None:
    with pytest.raises(CheckpointError, match="is a bundle, which agvas-export has made of one: give the checkpoint"):
        checkpoint_folder(tiny_bundle)


@pytest.mark.parametrize(
    ("files", "layout", "use"),
    [
        ((PLAN, WEIGHTS), "a plan of agvas-calibrate", "agvas-export --checkpoint CHECKPOINT --calibration {folder}"),
        (
            ("config.json", FILE, QUANTIZATION),
            "a language model in the GPTQ checkpoint layout",
            "agvas-export --checkpoint CHECKPOINT --calibration {folder}",
        ),
        (("settings.json", "checkpoint/config.json"), "the folder of a training that has ended", "give its model, {folder}/checkpoint"),
        (
            ("recipe.json", "pretraining/state.safetensors"),
            "the folder of a training that has not ended",
            "the same agvas-train goes on, and leaves its model in checkpoint/",
        ),
    ],
)
def test_what_other_commands_wrote_is_told_with_where_it_belongs(
    files: tuple[str, ...], layout: str, use: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    told = use.format(folder=tmp_path)
    with pytest.raises(CheckpointError) as raised:
        checkpoint_folder(tmp_path)
    assert str(raised.value) == f"checkpoint {tmp_path} is {layout}, no checkpoint: {told}"
    assert inspect_cli.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: {layout}\n  to use it: {told}\n"


def test_gptqs_method_in_the_config_alone_is_seen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(CheckpointError, match="a language model in the GPTQ checkpoint layout"):
        checkpoint_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "quantization_config": null}')
    with pytest.raises(CheckpointError, match="is a qwen2 of Hugging Face"):
        checkpoint_folder(tmp_path)


def test_a_folder_with_nothing_of_a_checkpoint_is_told_once_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        checkpoint_folder(tmp_path)
    wanted = "config.json, model.safetensors, tokenizer.json"
    assert str(raised.value) == f"checkpoint {tmp_path} lacks {wanted}; give nano, or a folder that has them"


def test_a_file_in_a_folders_place_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(OutputError, match="expected a folder to write to, got a file, or a path that leads through one; choose"):
            make_folder(path, str(path))


@pytest.mark.parametrize(("text", "got"), [("{bundle: 3}", "got what is no JSON: Expecting"), (None, "got No such file or directory")])
def test_a_recipe_that_cannot_be_read_is_told_without_pythons_numbers(text: str | None, got: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "station.json").write_text(text)
    with pytest.raises(RequestError, match=got):
        Recipe.read(tmp_path / "station.json")


def test_a_file_without_weights_is_not_to_be_rewritten_by_torch(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Words\n")
    with pytest.raises(ValueError, match=r"expected weights .*, got a file that begins with b'# Words\\n'; give the one that holds them"):
        torch_file(tmp_path / "README.md")


def test_a_moved_recipe_says_what_its_paths_are_told_from(tiny_bundle: Path, tmp_path: Path) -> None:
    Recipe(str(tiny_bundle)).write(tmp_path / "station.json")
    (tmp_path / "a" / "b").mkdir(parents=True)
    moved = shutil.move(tmp_path / "station.json", tmp_path / "a" / "b" / "station.json")
    with pytest.raises(BundleMissing, match="paths are told from its own folder: move both together, or save the recipe anew"):
        Recipe.read(moved).check()


def test_a_setting_out_of_range_is_told_with_its_recipe(tiny_bundle: Path, tmp_path: Path) -> None:
    Recipe(str(tiny_bundle), "onnxruntime", threshold=7).write(tmp_path / "station.json")
    with pytest.raises(RequestError, match="station.json: threshold: expected a number in 0..1, got 7"):
        Recipe.read(tmp_path / "station.json").open()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schema_version": None}, "expected 'schema_version' in it, got none"),
        ({"model": None, "files": None}, "expected 'model', 'files' in it, got none"),
    ],
)
def test_a_manifest_that_lacks_something_says_what(
    copy_of_bundle: Callable[[], Path], fields: dict[str, None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of_bundle() / MANIFEST
    held = {name: value for name, value in json.loads(path.read_text()).items() if name not in fields}
    path.write_text(json.dumps(held))
    with pytest.raises(BundleCorrupt) as refused:
        Bundle(path.parent)
    assert words in str(refused.value)


def test_inspecting_a_manifest_without_files_says_so(
    copy_of_bundle: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy_of_bundle() / MANIFEST
    path.write_text("{}")
    assert inspect_cli.main([str(path.parent)]) == 2
    assert "is no bundle's manifest: expected 'files' in it, got none; export" in capsys.readouterr().err


def test_a_trainings_files_of_another_kind_are_told_without_pythons_names(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter configuration: expected its fields with values of their kinds, got others; copy"):
        read_settings(tmp_path / "adapter_config.json")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "trained.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "trained.json").write_text("[]")
    with pytest.raises(ValueError, match="what agvas-train leaves: expected its fields with values of their kinds, got others; copy"):
        trained(tmp_path)


def test_inputs_may_stand_behind_the_options(photos: Path, run_segment: Callable[..., tuple[int, list[str], str]]) -> None:
    code, lines, _ = run_segment(photos / "one.png", "--quiet", "--threshold", "0.5", photos / "two.png")
    assert (code, len(lines)) == (0, 2)


@pytest.mark.parametrize(("option", "made"), [("--output", Path.mkdir), ("--overlays", Path.touch)])
def test_a_place_that_results_cannot_have_is_told_before_anything_is_judged(
    option: str, made: Callable[[Path], None], parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "place")
    assert accuracy.main([str(parts), "--baseline", "none there", option, str(tmp_path / "place")]) == 2
    assert f"agvas-eval: {option}: expected a f" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(tmp_path / "eval.json", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", fail)
    with pytest.raises(OutputError, match="got a full disk"):
        write_result(tmp_path / "eval.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
