"""agvas-inspect tells what is there, what does not fit, and what exporting will take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
from safetensors.torch import load_file, save_file

from agvas.checkpoint import CheckpointError, open_checkpoint
from agvas.contents import contents
from agvas.importing import ImportSettings, import_parts
from agvas.model import AGVAS
from export.estimate import estimate
from export.inspect_cli import main
from export.work import Key, kept_folder, whole_or_nothing
from runtime.bundle import Bundle


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, dict]:  # type: ignore[type-arg]
    code = main([*map(str, arguments), "--json"])
    lines = capsys.readouterr().out.splitlines()
    return code, "\n".join(lines[:-1]), json.loads(lines[-1])


def test_a_checkpoint_is_told_stage_by_stage(tiny_checkpoint: Path, tiny_model: AGVAS, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, found = inspect(capsys, tiny_checkpoint)
    assert (code, found["layout"], found["model"], found["problems"]) == (0, "AG-VAS checkpoint", "tiny", [])
    for stage, held in found["stages"].items():
        parameters = sum(tensor.numel() for name, tensor in tiny_model.state_dict().items() if name.startswith(f"{stage}."))
        assert (held["parameters"], held["bytes"], held["types"]) == (parameters, 4 * parameters, {"float32": parameters})
        assert f"{parameters:,} parameters" in text
    assert list(found["stages"]) == ["pixel_encoder", "semantic_encoder", "spam", "language", "mask_decoder"]
    tokenizer = tiny_model.tokenizer
    assert found["vocabulary"]["anchors"] == {anchor: tokenizer.token_to_id(anchor) for anchor in ("[NOR]", "[ANO]", "[SEG]")}
    assert found["vocabulary"]["rows"] == 512


def test_a_checkpoint_that_does_not_fit_is_told_all_the_same(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    state = load_file(folder / "model.safetensors")
    del state["mask_decoder.queries"]
    save_file(state | {"spam.extra": torch.zeros(5)}, folder / "model.safetensors")
    code, text, found = inspect(capsys, folder)
    assert code == 1 and len(found["problems"]) == 2
    assert "missing mask_decoder.queries [3, 32]" in text and "unexpected spam.extra [5]" in text
    assert not found["needs"] and "exporting takes" not in text


def test_parts_are_told_by_themselves_and_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published.onevision(tmp_path / "base", dtype=torch.bfloat16)
    model = published.sam()
    published.write_sam_pth(model, tmp_path / "sam.pth")
    import_parts(ImportSettings(tmp_path / "base", tmp_path / "start", tmp_path / "sam.pth", untrained=0))
    code, text, found = inspect(capsys, tmp_path / "start")
    assert code == 0
    assert [(part["role"], part["layout"]) for part in found["parts"]] == [
        ("base", "Hugging Face llava_onevision"),
        ("pixel encoder", "torch"),
        ("trained", "safetensors"),
    ]
    assert found["parts"][1]["tensors"] == len(model.vision_encoder.state_dict())
    assert set(found["stages"]["language"]["types"]) == {"bfloat16"} and set(found["stages"]["pixel_encoder"]["types"]) == {"float32"}
    assert "image_newline" in found["unused"]
    for part, stages in (("base", {"semantic_encoder", "language"}), ("sam.pth", {"pixel_encoder"}), ("start/untrained.safetensors", None)):
        code, text, found = inspect(capsys, tmp_path / part)
        assert code == 0 and set(found["stages"]) == (stages or {"spam", "mask_decoder"}), text
        assert "agvas-import --base" in text


def test_a_bundle_is_told_by_its_manifest(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, found = inspect(capsys, tiny_bundle)
    assert (code, found["layout"], found["model"]) == (0, "bundle", "tiny")
    sizes = {name: record.bytes for name, record in Bundle(tiny_bundle).manifest.files.items()}
    assert found["stages"]["language"]["bytes"] == sum(size for name, size in sizes.items() if name.startswith("language/"))
    rule = Bundle(tiny_bundle).manifest.mask_rule
    assert "parity passed on 6 pictures" in text
    assert f"masks: threshold {rule.threshold:g}, relative threshold {rule.relative_threshold:g}" in text


def test_a_bundle_is_told_where_there_is_no_torch(tiny_bundle: Path) -> None:
    code = (
        "import sys; from export.inspect_cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'onnx', 'safetensors'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "masks: threshold" in done.stdout, done.stderr


def test_a_bundle_that_was_not_compared_says_so(copy_of_bundle: Callable[[], Path], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = copy_of_bundle()
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"parity": {"passed": False, "compared": False}}))
    assert "not compared with the reference" in inspect(capsys, bundle)[1]


def test_a_bundles_files_that_are_cut_short_or_missing_are_told(
    copy_of_bundle: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = copy_of_bundle()
    os.truncate(bundle / "spam" / "spam.onnx", 100)
    (bundle / "tokenizer.json").unlink()
    code, text, found = inspect(capsys, bundle)
    assert code == 1 and len(found["problems"]) == 2
    assert "spam/spam.onnx: expected" in text and "got 100; copy or export the bundle again" in text and "got no file" in text


def test_an_export_that_was_not_finished_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), whole_or_nothing(tmp_path / "bundle", Key("a", "b")):
        raise RuntimeError("stopped")
    assert main([str(kept_folder(tmp_path / "bundle"))]) == 2
    error = capsys.readouterr().err
    assert ".bundle.partial is an export that was not finished; run the same agvas-export command again (with --resume" in error
    with pytest.raises(CheckpointError, match="was not finished"):
        contents(kept_folder(tmp_path / "bundle"))


@pytest.mark.parametrize("what", ["nowhere", "empty", "photo.png"])
def test_what_is_nothing_known_is_one_line_and_exit_code_2(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    assert main([str(tmp_path / what)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("agvas-inspect: ") and len(captured.err.splitlines()) == 1 and captured.out == ""
    assert what in captured.err
    assert ("is a picture; agvas-segment takes those" in captured.err) is (what == "photo.png")
    assert ("a bundle has manifest.json" in captured.err) is (what == "empty")


def test_a_bundle_that_may_not_be_read_says_so(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("agvas.bundle_contents.bundle_contents", refused)
    assert main([str(tiny_bundle)]) == 2
    assert f"{tiny_bundle}: expected a readable file, got Permission denied; change its permissions" in capsys.readouterr().err


def test_what_exporting_takes_is_what_the_export_itself_foresees(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text, found = inspect(capsys, tiny_checkpoint)
    expected = estimate(open_checkpoint(tiny_checkpoint).tensors, "fp16", "gptq4")
    assert found["needs"]["fp16 gptq4"]["disk"] == expected.disk
    assert found["needs"]["fp16 gptq4"]["whole_memory"] == expected.whole_memory
    assert found["needs"].keys() >= {"fp32 float", "fp16 float", "bf16 float", "int8 float", "fp16 int8"}
    assert "exporting takes about" in text


def test_nano_takes_a_minute_or_two_by_the_estimate() -> None:
    """Measured: 67 s on two idle cores. Its trunk's many small parts are no decoder layers."""
    tensors = open_checkpoint("nano").tensors
    assert 30 < estimate(tensors, "fp16", "gptq4").export_seconds < 150
