"""agvas-export: refuses before the work what cannot work, and leaves a whole, verified bundle or nothing at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import picture
from PIL import Image
from safetensors.numpy import load_file, save_file
from torch import nn

import export.bundle as writer
from agvas import AGVAS
from agvas.config import tiny
from export.bundle import export_bundle
from export.cli import main
from export.parity import GOLDEN_PICTURES, NEAR, TRACED_PICTURES, hardest, measure, pipeline_over, torch_stages
from export.pictures import parity_pictures
from export.progress import Progress
from export.settings import ExportSettings
from runtime import Segmenter
from runtime.bundle import Bundle
from runtime.contract import STAGES
from runtime.errors import BundleError, ImageError, OutputError, ParityFailed
from runtime.masking import MaskRule
from runtime.parity import GATES, Gates, Outcome
from runtime.verify import NOT_TRACED

IMPOSSIBLE = Gates(mask_iou_mean=1.1, mask_iou_min=0.9, flips=0, map_max_abs=None, answers_changed=None)

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """agvas-export in this process, in float unless said otherwise: exit code, lines of stdout, stderr."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        code = main(["--lmm", "float", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return call


@pytest.fixture
def ready_graphs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages come from the bundle that the session has exported already, in place of torch's exporter; lists those asked for."""
    asked: list[str] = []

    def ready(module: nn.Module, stage: str, sizes: dict[str, int], weights: object) -> ir.Model:
        asked.append(stage)
        return ir.load(tiny_bundle / stage / f"{stage}.onnx")

    monkeypatch.setattr(writer, "export_stage", ready)
    return asked


@pytest.fixture
def nothing_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal has to come before the minutes of work."""

    def never(*_: object) -> None:
        raise AssertionError("a stage was exported")

    monkeypatch.setattr(writer, "export_stage", never)


@pytest.fixture
def older_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle at the output already, told apart by a file that the new one lacks."""
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "out" / "bundle"))
    (folder / "older").touch()
    return folder


def assert_older_intact(folder: Path) -> None:
    assert (folder / "older").exists()
    Bundle(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something was left beside it"


# Refused before the work


@pytest.mark.usefixtures("nothing_exported")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "FP16"], "--precision: expected one of fp32, fp16, bf16, int8; got 'FP16'; did you mean 'fp16'?"),
        (["--precision", "bf61"], "did you mean 'bf16'?"),
        (["--lmm", "gptq"], "--lmm: expected one of float, int8, gptq4; got 'gptq'; did you mean 'gptq4'?"),
        (["--pictures", "0"], "--pictures: expected at least 1, got 0"),
        (["--checkpoint", "/nowhere/at/all"], "/nowhere/at/all is not a folder; give nano or a folder with config.json"),
        (["--images", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_met_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    code, lines, errors = run("--checkpoint", tiny_checkpoint, "--output", tmp_path / "bundle", *arguments)
    assert (code, lines) == (2, [])
    assert message in errors and errors.startswith("agvas-export: ")
    assert not list(tmp_path.glob("*bundle*"))


@pytest.mark.usefixtures("nothing_exported")
def test_a_checkpoint_without_one_of_its_files_names_it(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / name))
        (folder / name).unlink()
        code, _, errors = run("--checkpoint", folder, "--output", tmp_path / "bundle")
        assert code == 2 and f"lacks {name}" in errors and str(folder) in errors


@pytest.mark.usefixtures("nothing_exported")
def test_a_checkpoint_whose_tensors_do_not_fit_names_them(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["language.model.norm.weight"]
    tensors["language.model.embed_tokens.weight"] = np.zeros((5, 24), np.float32)
    tensors["surplus"] = np.zeros(1, np.float32)
    save_file(tensors, folder / "model.safetensors")
    code, _, errors = run("--checkpoint", folder, "--output", tmp_path / "bundle")
    assert code == 2
    assert "missing language.model.norm.weight [24]" in errors
    assert "language.model.embed_tokens.weight is [5, 24], expected [512, 24]" in errors
    assert "unexpected surplus [1]" in errors


@pytest.mark.usefixtures("nothing_exported")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_file_is_named(name: str, run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    code, _, errors = run("--checkpoint", folder, "--output", tmp_path / "bundle")
    assert code == 2 and str(folder / name) in errors


@pytest.mark.usefixtures("nothing_exported")
def test_an_output_that_is_something_else_is_left_alone(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "thesis", tmp_path / "notes.txt"
    folder.mkdir()
    (folder / "chapter.tex").write_text("words")
    file.write_text("words")
    for output in (folder, file):
        code, _, errors = run("--checkpoint", tiny_checkpoint, "--output", output)
        assert code == 2 and f"{output} exists and is not a bundle; choose another --output" in errors
    assert (folder / "chapter.tex").read_text() == file.read_text() == "words"


@pytest.mark.usefixtures("nothing_exported")
def test_an_output_that_cannot_be_made_is_told(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "bundle"
    code, _, errors = run("--checkpoint", tiny_checkpoint, "--output", output)
    assert code == 2 and str(output) in errors and "choose another --output" in errors
    assert "Traceback" not in errors


@pytest.mark.usefixtures("nothing_exported")
def test_a_disk_without_room_is_told_before_the_work(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 5 << 20))
    code, _, errors = run("--checkpoint", tiny_checkpoint, "--output", tmp_path / "bundle")
    assert code == 2 and "5 MiB free" in errors and "choose another --output" in errors


# Whole or nothing


def fails_at(monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException) -> None:
    """Writing that stage begins and is cut off."""
    original = writer.write

    def failing(model: ir.Model, folder: Path, name: str) -> None:
        original(model, folder, name)
        if name == stage:
            (folder / f"{stage}.onnx").write_bytes(b"half")
            raise error

    monkeypatch.setattr(writer, "write", failing)


@pytest.mark.usefixtures("ready_graphs")
def test_an_interrupted_export_leaves_nothing(
    run: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(monkeypatch, "language", KeyboardInterrupt())
    code, _, errors = run("--checkpoint", tiny_checkpoint, "--output", tmp_path / "out" / "bundle")
    assert code == 130 and "interrupted" in errors
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(BundleError):
        Bundle(tmp_path / "out" / "bundle")


def test_an_export_that_is_terminated_leaves_nothing_either(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own: where a library has set up its own stack for signals, one in here could end all the tests."""
    code = """
import os, signal, sys, time
import export.bundle
from export.cli import main

def terminated(model, folder, stage):
    folder.mkdir(exist_ok=True)
    (folder / f"{stage}.onnx").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

export.bundle.write = terminated
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["--lmm", "float", "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "out" / "bundle")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "interrupted" in done.stderr, done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("ready_graphs")
def test_an_interrupted_export_keeps_the_older_bundle(
    run: Run, tiny_checkpoint: Path, older_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(monkeypatch, "mask_decoder", KeyboardInterrupt())
    assert run("--checkpoint", tiny_checkpoint, "--output", older_bundle)[0] == 130
    assert_older_intact(older_bundle)


@pytest.mark.usefixtures("ready_graphs")
def test_what_an_export_writes_cannot_be_opened_before_its_end(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = writer.write

    def looking(model: ir.Model, folder: Path, stage: str) -> None:
        original(model, folder, stage)
        for path in (tmp_path / "out").iterdir():
            seen.append(path.name)
            with pytest.raises(BundleError):
                Bundle(path)
        if stage == "mask_decoder":
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write", looking)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle"), Progress(quiet=True))
    assert len(seen) == len(STAGES) and "bundle" not in seen


@pytest.mark.usefixtures("ready_graphs")
def test_a_disk_that_fills_up_is_told_and_keeps_the_older_bundle(
    run: Run, tiny_checkpoint: Path, older_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(monkeypatch, "spam", OSError(errno.ENOSPC, "No space left on device"))
    code, _, errors = run("--checkpoint", tiny_checkpoint, "--output", older_bundle)
    assert code == 2 and f"the disk of {older_bundle} is full; free some space" in errors
    assert_older_intact(older_bundle)


@pytest.mark.usefixtures("ready_graphs")
def test_any_other_fault_of_the_disk_is_an_output_error_too(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_at(monkeypatch, "spam", OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OutputError, match="Input/output error.*choose another --output"):
        export_bundle(ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "b"), Progress(quiet=True))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("ready_graphs")
def test_a_new_bundle_that_cannot_take_its_name_leaves_the_older_its_own(
    tiny_checkpoint: Path, older_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.rename

    def failing(source: Any, target: Any) -> None:
        if ".partial-" in Path(source).name:
            raise OSError(errno.EACCES, "Permission denied")
        original(source, target)

    monkeypatch.setattr(writer.os, "rename", failing)
    with pytest.raises(OutputError, match="Permission denied"):
        export_bundle(ExportSettings(str(tiny_checkpoint), "fp32", older_bundle, pictures=1), Progress(quiet=True))
    assert_older_intact(older_bundle)


# Parity decides


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(picture(seed)).save(folder / f"{seed}.png")
    return folder


@pytest.mark.usefixtures("ready_graphs")
def test_masks_that_leave_the_reference_make_no_bundle_and_exit_code_1(
    run: Run, tiny_checkpoint: Path, older_bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GATES, "fp32", IMPOSSIBLE)
    code, lines, errors = run("--checkpoint", tiny_checkpoint, "--output", older_bundle, "--images", pictures)
    assert (code, lines) == (1, [])
    assert "chain: mean mask IoU 1.0000 is below 1.1" in errors and "No bundle was written" in errors
    assert_older_intact(older_bundle)


def wrong_mask_decoder(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    """An exporter that gets one stage wrong: its weights all but twice what they are."""

    def ready(module: nn.Module, stage: str, sizes: dict[str, int], weights: object) -> ir.Model:
        model = ir.load(tiny_bundle / stage / f"{stage}.onnx")
        if stage == "mask_decoder":
            for value in model.graph.initializers.values():
                if value.dtype == ir.DataType.FLOAT and len(value.shape) == 2:
                    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.9), name=value.name)
        return model

    monkeypatch.setattr(writer, "export_stage", ready)


def test_a_wrong_stage_is_found_and_no_bundle_is_written(
    tiny_checkpoint: Path, tiny_bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_mask_decoder(monkeypatch, tiny_bundle)
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures)
    with pytest.raises(ParityFailed, match="chain: .*No bundle was written; try --precision fp32, or --parity report"):
        export_bundle(settings, Progress(quiet=True))
    assert not list((tmp_path / "out").iterdir())


def test_where_the_reference_finds_nothing_it_is_told_before_anything_is_exported(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "export_stage", lambda *_: pytest.fail("a stage was exported"))
    settings = ExportSettings(str(tiny_checkpoint), "fp32", tmp_path / "out" / "bundle", images=pictures, threshold=1.0)
    with pytest.raises(ParityFailed, match=r"mask is empty on all \d+ pictures.*a lower --threshold.*No bundle was written"):
        export_bundle(settings, Progress(quiet=True))


def test_parity_report_writes_the_bundle_with_the_failure_on_record(
    run: Run,
    tiny_checkpoint: Path,
    tiny_bundle: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong_mask_decoder(monkeypatch, tiny_bundle)
    output = tmp_path / "bundle"
    arguments = ("--checkpoint", tiny_checkpoint, "--output", output, "--images", pictures, "--parity", "report", "--json")
    code, lines, _ = run(*arguments)
    told, bundle = json.loads(lines[-1]), Bundle(output)
    assert code == 1 and told["passed"] is False and "FAILED: chain: " in lines[0]
    assert bundle.manifest.parity["passed"] is False
    recorded = json.loads((output / "parity.json").read_text())
    assert recorded["passed"] is False and recorded["failures"] == told["failures"]
    assert recorded["stages"]["mask_decoder"]["anomaly_map"] > 1e-3 > recorded["stages"]["spam"]["aligned_embeddings"]
    assert recorded["glue"]["map_max_abs"] < 1e-5, "the glue is not to blame"


@pytest.mark.parametrize(("threshold", "failures"), [(1.0, 1), (0.0, 0)])
def test_masks_that_are_all_empty_prove_nothing(tiny_model: AGVAS, threshold: float, failures: int) -> None:
    config = replace(tiny_model.config, mask_decoder=replace(tiny_model.config.mask_decoder, threshold=threshold))
    model = AGVAS(config, tiny_model.tokenizer).eval()
    model.load_state_dict(tiny_model.state_dict())
    gates = GATES["fp32"]
    report, _ = measure(model, pipeline_over(model, torch_stages(model)), "torch", [picture()], gates, gates, lambda: None)
    assert ["no mask can be compared" in failure for failure in report.failures] == [True] * failures


def outcome_with(inside: int, near: int, elsewhere: float = 0.1) -> Outcome:
    """A map of 100 pixels: `inside` of them surely defective, `near` a hair above the threshold 0.5, the rest at `elsewhere`."""
    anomaly_map = np.full(100, elsewhere, np.float32)
    anomaly_map[:inside] = 0.9
    anomaly_map[inside : inside + near] = 0.5 + NEAR / 2
    return Outcome(anomaly_map > 0.5, anomaly_map, None, ())


def test_parity_takes_a_folders_pictures_evenly_and_reads_them_before_the_work(tmp_path: Path) -> None:
    for number in range(10):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    assert [int(image[0, 0, 0]) for image in parity_pictures(tmp_path, 4)] == [0, 2, 5, 7]
    assert [int(image[0, 0, 0]) for image in parity_pictures(tmp_path, 64)] == list(range(10))
    (tmp_path / "5.png").write_bytes(b"cut off")
    with pytest.raises(ImageError, match="5.png"):
        parity_pictures(tmp_path, 4)


def test_the_pictures_hardest_to_keep_come_first() -> None:
    outcomes = [
        outcome_with(50, 5),  # 0: 9 % of the mask may go
        outcome_with(0, 0, 0.2),  # 1: empty and far from a mask
        outcome_with(1, 2),  # 2: two thirds
        outcome_with(0, 0, 0.49),  # 3: empty, all but a mask
        outcome_with(30, 0),  # 4: safe
        outcome_with(4, 4),  # 5: half
    ]
    assert hardest(outcomes, MaskRule(0.5)) == [2, 5, 3, 0, 4, 1]
    assert hardest(outcomes[:1], MaskRule(0.5)) == [0] and hardest(outcomes[1:2], MaskRule(0.5)) == [0]


# What a bundle holds


def test_thresholds_of_ones_own_stand_in_the_bundle_and_judge_parity(
    run: Run, ready_graphs: list[str], tiny_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    given = ("--checkpoint", tiny_checkpoint, "--output", tmp_path / "own", "--images", pictures)
    assert run(*given, "--threshold", "1.5")[0] == 2
    code, _, _ = run(*given, "--threshold", "0", "--relative-threshold", "0.25")
    bundle = Bundle(tmp_path / "own")
    assert code == 0 and bundle.manifest.mask_rule == MaskRule(0, 0.25)
    assert bundle.manifest.parity["non_empty"] == 2  # the reference was judged by them: every map exceeds 0


def test_a_second_export_replaces_the_first_and_tells_its_numbers(
    run: Run, ready_graphs: list[str], tiny_checkpoint: Path, older_bundle: Path, pictures: Path
) -> None:
    arguments = ("--checkpoint", tiny_checkpoint, "--output", older_bundle, "--images", pictures, "--json")
    code, lines, said = run(*arguments)
    assert f"{older_bundle} holds a bundle, which the new one will replace" in said
    assert code == 0 and ready_graphs == list(STAGES)
    told, bundle = json.loads(lines[-1]), Bundle(older_bundle)
    assert {"bundle", "passed", "parity", "bytes", "peak_rss_bytes", "seconds"} <= told.keys()
    assert (told["bundle"], told["passed"], told["bytes"]) == (str(older_bundle), True, bundle.bytes)
    assert told["parity"]["images"] == 2 and told["parity"]["mask_iou_min"] > 0.99 and told["parity"]["flips"] == 0
    assert not (older_bundle / "older").exists()
    assert [path.name for path in older_bundle.parent.iterdir()] == [older_bundle.name]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.usefixtures("ready_graphs")
def test_a_bundle_in_16_bit_is_about_half_as_large_and_segments(
    precision: str, tiny_checkpoint: Path, tiny_bundle: Path, tiny_model: AGVAS, pictures: Path, tmp_path: Path
) -> None:
    settings = ExportSettings(str(tiny_checkpoint), precision, tmp_path / "bundle", strict=False, images=pictures)
    bundle, report = export_bundle(settings, Progress(quiet=True))
    # In bf16 what draws the map stays fp32.
    drawn = {"mask_decoder": "fp32"} if precision == "bf16" else {}
    assert bundle.manifest.precision == dict.fromkeys(STAGES, precision) | drawn
    weights = [value.dtype for value in ir.load(bundle.graph("mask_decoder")).graph.initializers.values()]
    assert (ir.DataType.BFLOAT16 in weights) is False and (ir.DataType.FLOAT16 in weights) is (precision == "fp16")
    assert bundle.embeddings().dtype == np.float16
    lowered = [stage for stage in STAGES if stage not in drawn]
    small, large = (sum((folder / stage / f"{stage}.data").stat().st_size for stage in lowered) for folder in (bundle.folder, tiny_bundle))
    assert small < 0.75 * large  # convolutions stay fp32 in bf16, and so do the norms' weights
    assert report.engine == {"fp16": "onnxruntime", "bf16": "openvino"}[precision]
    image = picture(5)
    ours = Segmenter(bundle.folder, engine=report.engine)(image)
    np.testing.assert_allclose(ours.anomaly_map, tiny_model.segment(image).anomaly_map, atol=0.05)


def test_the_manifest_tells_what_was_exported_and_by_what(tiny_bundle: Path) -> None:
    manifest, config = Bundle(tiny_bundle).manifest, tiny()
    assert (manifest.model, manifest.lmm, manifest.precision) == ("tiny", "float", dict.fromkeys(STAGES, "fp32"))
    assert manifest.prompts == config.prompts and manifest.preprocessing == config.preprocessing
    assert (manifest.mask_rule, manifest.fusion_weight) == (config.mask_decoder.mask_rule, config.mask_decoder.fusion_weight)
    assert manifest.sizes == {
        "S": 56, "s": 45, "P": 32, "G": 7, "T": 9, "Ds": 14, "D": 24, "L": 3, "H": 2, "C": 4, "V": 512, "M": 28
    }  # fmt: skip
    assert {"torch", "transformers", "onnx", "onnxruntime", "openvino"} <= manifest.tools.keys()
    assert all(version(tool) == told for tool, told in manifest.tools.items())
    assert manifest.parity["passed"] is True and manifest.parity["engine"] == "onnxruntime"


def test_every_letter_of_the_contract_is_a_size_or_an_open_axis(tiny_bundle: Path) -> None:
    sizes = Bundle(tiny_bundle).manifest.sizes
    letters = {axis for stage in STAGES.values() for tensor in (*stage.inputs, *stage.outputs) for axis in tensor.shape}
    assert {axis for axis in letters if isinstance(axis, str)} - {"K+N"} == sizes.keys() | {"B", "N", "K", "R"}


def test_the_graphs_have_the_contracts_names_types_and_shapes(tiny_bundle: Path) -> None:
    sizes = Bundle(tiny_bundle).manifest.sizes
    open_axes = {"B": "batch", "N": "tokens", "K": "past", "R": "row_count"}
    for stage, spec in STAGES.items():
        graph = ir.load(tiny_bundle / stage / f"{stage}.onnx").graph
        for tensors, values in ((spec.inputs, graph.inputs), (spec.outputs, graph.outputs)):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
            for tensor, value in zip(tensors, values, strict=True):
                assert value.dtype == {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64}[tensor.dtype]
                for axis, size in zip(tensor.shape, value.shape, strict=True):
                    if axis in open_axes:
                        assert str(size) == open_axes[axis], f"{tensor}: {size}"
                    elif axis != "K+N":
                        assert size == sizes.get(axis, axis), f"{tensor}: {size}"  # type: ignore[arg-type]


def test_parity_json_tells_glue_stages_and_chain_apart(tiny_bundle: Path) -> None:
    parity = json.loads((tiny_bundle / "parity.json").read_text())
    assert parity["passed"] is True and parity["failures"] == [] and parity["engine"] == "onnxruntime"
    for part in ("glue", "chain"):
        assert parity[part]["images"] == 6 and parity[part]["mask_iou_min"] == 1 and parity[part]["answers_changed"] == 0
    assert {stage: set(errors) for stage, errors in parity["stages"].items()} == {
        name: {tensor.name for tensor in spec.outputs} for name, spec in STAGES.items()
    }
    # Two libraries' sums in another order give some error and not much: zero would mean that nothing was compared.
    for errors in parity["stages"].values():
        assert all(0 < error < 1e-4 for error in errors.values())


def test_the_golden_traces_hold_picture_answer_and_every_stages_outputs(tiny_bundle: Path, tiny_model: AGVAS) -> None:
    golden = Bundle(tiny_bundle).golden()
    tensors = {tensor.name for spec in STAGES.values() for tensor in spec.outputs} - set(NOT_TRACED)
    wanted = {f"{index}.{name}" for index in range(6) for name in ("image", "answer", "map", "anchor_states")}
    wanted |= {f"{index}.tensor.{name}" for index in range(TRACED_PICTURES) for name in tensors}
    assert GOLDEN_PICTURES >= 6 and golden.keys() == wanted
    reference = tiny_model.segment(golden["1.image"])
    assert tuple(golden["1.answer"]) == reference.answer_ids
    np.testing.assert_allclose(golden["1.map"], reference.anomaly_map, atol=1e-5)
    assert reference.anchor_states is not None
    np.testing.assert_allclose(golden["1.anchor_states"], reference.anchor_states, atol=1e-4)


def test_an_output_that_cannot_be_written_is_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.bundle.os.access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr("export.bundle.open_checkpoint", lambda name: pytest.fail("it began"))
    with pytest.raises(OutputError, match="bundle: expected to write in .*, got no permission to"):
        export_bundle(ExportSettings("nano", "fp32", tmp_path / "below" / "bundle"), Progress(quiet=True))


def test_work_that_counts_by_itself_has_a_bar_for_each_of_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.begin("calibrate", 1)
    for what, done, total in (("see the pictures", 2, 2), ("layer by layer", 3, 3)):
        progress.show(what, done, total)
    progress.end()
    told = capsys.readouterr().err
    assert "see the pictures: 100%" in told and "layer by layer: 100%" in told
