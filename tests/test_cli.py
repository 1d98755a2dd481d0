"""agvas-segment, agvas-verify and the demo through main(): lines, files and exit codes on a real, tiny bundle."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

import runtime
from benchmarks import demo
from engines import EngineFailed, EngineUnavailable
from engines.onnxruntime import OnnxRuntimeEngine
from runtime import Inspection, Segmenter, segmentation
from runtime.bundle import Bundle
from runtime.cli import segment, verify
from runtime.cli.common import Progress
from runtime.cli.records import output_stems
from runtime.errors import OutputError
from runtime.masking import MaskRule
from runtime.parity import GATES, Gates
from runtime.picture_files import KINDS
from runtime.prompts import Prompt
from runtime.segmentation import Segmentation

MADE_KEYS = {"manifest_sha256", "model", "version", "time"}
SEGMENT_KEYS = {
    *MADE_KEYS,
    *("image", "score", "is_anomalous", "mask", "area", "text", "answer_verified", "anchors_found", "threshold", "relative_threshold"),
    *("instruction", "mode", "anchor_groups", "truncated"),
    *("timings_ms", "engine", "inference_precision", "device", "warnings", "tiles", "region_share", "boxes", "width", "height"),
}
PARITY_KEYS = {"images", "mask_iou_mean", "mask_iou_min", "flips", "map_max_abs", "anchor_cosine_min"}


def save_picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed)).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three pictures."""
    for index, name in enumerate(("one", "two", "three")):
        save_picture(tmp_path / "photos" / f"{name}.png", index)
    return tmp_path / "photos"


@pytest.fixture
def run_segment(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], str]]:
    """Exit code, lines of stdout and stderr of agvas-segment on onnxruntime."""

    def run(
        *arguments: str | Path, engine: str = "onnxruntime", bundle: Path = tiny_bundle
    ) -> tuple[int, list[str], str]:
        code = segment.main([*map(str, arguments), "--bundle", str(bundle), "--engine", engine])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def run_verify(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], str]]:
    def run(
        *arguments: str | Path, engine: str = "onnxruntime", bundle: Path = tiny_bundle
    ) -> tuple[int, list[str], str]:
        code = verify.main(["--bundle", str(bundle), "--engine", engine, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


# agvas-segment: what it says


def test_json_is_one_object_a_picture_with_the_promised_keys(run_segment: Any, photos: Path) -> None:
    code, lines, _ = run_segment(photos, "--json")
    records = [json.loads(line) for line in lines]
    assert code == 0
    assert [record["image"] for record in records] == [str(photos / f"{name}.png") for name in ("one", "three", "two")]
    for record in records:
        assert record.keys() == SEGMENT_KEYS
        assert record["mask"] is None
        assert record["answer_verified"] is True
        assert record["engine"] == "onnxruntime"
        assert {"pixel_encoder", "language", "mask_decoder", "total"} <= record["timings_ms"].keys()


def test_the_record_is_what_the_segmenter_says(
    run_segment: Any, photos: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    expected = Segmenter(tiny_bundle, "onnxruntime")(photos / "one.png")
    _, lines, _ = run_segment(photos / "one.png", "--json", "--polygons", "--output", tmp_path / "out")
    record = json.loads(lines[0])
    written = np.asarray(Image.open(record["mask"]))
    np.testing.assert_array_equal(written, np.where(expected.mask, 255, 0))
    assert record["score"] == pytest.approx(expected.score, abs=1e-6)
    assert record["area"] == expected.area == np.count_nonzero(written)
    assert record["text"] == expected.text
    assert record["polygons"] == json.loads(json.dumps(expected.polygons()))


def test_in_words_a_line_has_verdict_score_area_time_and_path(run_segment: Any, photos: Path) -> None:
    _, (line,), _ = run_segment(photos / "one.png", "--threshold", "0")
    verdict, score, area, unit, spent, milliseconds, path = line.split()
    assert (verdict, unit, milliseconds, path) == ("NG", "px", "ms", str(photos / "one.png"))
    assert 0 < float(score) <= 1
    assert int(area) == picture().shape[0] * picture().shape[1]
    assert float(spent) > 0
    assert run_segment(photos / "one.png", "--threshold", "1")[1][0].startswith("OK ")


def test_a_dim_16_bit_picture_is_judged_with_a_warning(run_segment: Any, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(np.linspace(0, 4095, 2000).astype(np.uint16).reshape(40, 50)).save(tmp_path / name)
    for quiet in ([], ["--quiet"]):
        code, lines, errors = run_segment(tmp_path / "a.png", tmp_path / "b.png", "--json", *quiet)
        assert code == 0 and len(lines) == 2
        said = f"agvas-segment: warning: {tmp_path / 'a.png'}: the samples of a 16-bit picture all lie below 16384"
        assert errors.count("warning") == errors.count(said) == 1 and "12 bits" in errors  # told once, with the first picture's name
        for line in lines:  # and of every picture
            (warning,) = json.loads(line)["warnings"]
            assert "16-bit" in warning


def test_a_record_says_which_model_made_it_and_when(run_segment: Any, photos: Path, tiny_bundle: Path) -> None:
    (photos / "cut.png").write_bytes(b"cut off")
    began = datetime.now(timezone.utc)
    _, lines, _ = run_segment(photos, photos / "nowhere.png", "--json")
    missing, *records = map(json.loads, lines)
    assert missing.keys() == {"image", "error", "version", "time"}, "no bundle is opened yet"
    manifest = hashlib.sha256((tiny_bundle / "manifest.json").read_bytes()).hexdigest()
    expected = (manifest, Bundle(tiny_bundle).manifest.model, runtime.__version__)
    assert [(record["manifest_sha256"], record["model"], record["version"]) for record in records] == [expected] * 4
    times = [datetime.fromisoformat(record["time"]) for record in (missing, *records)]
    assert times == sorted(times) and times[-1].utcoffset() == timedelta(0)
    assert began - timedelta(seconds=1) <= times[0] and times[-1] <= datetime.now(timezone.utc)


@pytest.mark.parametrize("command", ["segment", "verify", "build"])
def test_every_command_tells_the_packages_version(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"runtime.cli.{command}").main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"agvas-{command} {runtime.__version__}\n")


def test_reading_is_told_beside_the_total_which_leaves_it_out(run_segment: Any, photos: Path) -> None:
    _, lines, _ = run_segment(photos / "one.png", "--json", "--instruction", "Find dents.", "--instruction", "Find rust.")
    first, second = (json.loads(line)["timings_ms"] for line in lines)
    assert first["read"] > 0 and "read" not in second
    assert sum(spent for stage, spent in first.items() if stage not in ("read", "total")) <= first["total"]


def test_a_sliver_is_judged_with_a_warning(run_segment: Any, tmp_path: Path) -> None:
    for name, height, width in (("long", 20, 2000), ("dot", 1, 1), ("fine", 41, 67)):
        Image.fromarray(picture(0, height, width)).save(tmp_path / f"{name}.png")
    code, lines, errors = run_segment(tmp_path / "long.png", tmp_path / "dot.png", tmp_path / "fine.png", "--json")
    counts = {Path(record["image"]).name: len(record["warnings"]) for record in map(json.loads, lines)}
    assert code == 0 and counts == {"long.png": 1, "dot.png": 1, "fine.png": 0}
    assert "long.png: a picture of 2000 × 20 pixels is seen at 56 × 1" in errors and "dot.png: a picture of 1 × 1" in errors


def test_a_picture_without_a_map_is_neither_ok_nor_ng(
    run_segment: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wordy(self: Inspection, prompt: Prompt) -> Segmentation:
        nothing, text = np.zeros((2, 3), np.float32), "I see\n\x1b[2Jnothing"
        return Segmentation(
            nothing > 1, nothing, 0.0, False, text, prompt.instruction, prompt.mode, False, 0, True, MaskRule(0.5), {"total": 1.0}
        )

    monkeypatch.setattr(Inspection, "answer", wordy)
    code, lines, errors = run_segment(photos / "one.png")
    assert code == 1 and lines[0].startswith("??")  # a line that reads exit codes must not let the part pass
    assert lines[1].strip() == "I see \ufffd[2Jnothing … (cut at the length limit)"  # a terminal obeys no model
    assert "1 ??" in errors
    assert run_segment(photos / "one.png", "--output", tmp_path / "results", "--json")[0] == 1
    assert not list((tmp_path / "results").iterdir()), "an empty mask would say OK"


def test_a_mask_of_an_earlier_run_does_not_pass_for_this_ones(run_segment: Any, photos: Path, tmp_path: Path) -> None:
    part, output = tmp_path / "part.png", tmp_path / "out"
    part.write_bytes((photos / "one.png").read_bytes())
    assert run_segment(part, "--output", output, "--overlay")[0] == 0
    (output / "other_mask.png").write_bytes(b"of another part")
    assert {path.name for path in output.iterdir()} == {"part_mask.png", "part_overlay.png", "other_mask.png"}
    assert run_segment(part, "--output", output)[0] == 0
    assert {path.name for path in output.iterdir()} == {"part_mask.png", "other_mask.png"}, "the overlay shows another mask"
    assert run_segment(part, "--output", output, "--overlay")[0] == 0
    part.write_bytes(b"cut off")
    assert run_segment(part, "--output", output)[0] == 1
    assert {path.name for path in output.iterdir()} == {"other_mask.png"}


def test_auto_says_on_stderr_which_engine_it_chose_and_quiet_keeps_it_silent(run_segment: Any, photos: Path) -> None:
    code, (line,), errors = run_segment(photos / "one.png", "--json", engine="auto")
    assert code == 0
    assert f"engine {json.loads(line)['engine']}, precision {json.loads(line)['inference_precision']}" in errors
    assert "chosen by auto" in errors and "  not " in errors
    errors = run_segment(photos / "one.png", engine="auto")[2]
    assert "when it was measured" in errors and "  not " not in errors, "why not the others is told once"
    code, lines, errors = run_segment(photos, "--quiet", engine="auto")
    assert (code, len(lines), errors) == (0, 3, "")


# agvas-segment: several instructions


def test_each_instruction_gives_a_line_a_mask_of_its_own_and_the_picture_is_seen_once(
    run_segment: Any, photos: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    asked = ["Find dents.", "Where is rust?", "Find dents."]
    options = [part for text in asked for part in ("--instruction", text)]
    code, lines, _ = run_segment(photos, "--json", "--output", tmp_path / "out", *options)
    records = [json.loads(line) for line in lines]
    assert code == 0
    assert [record["instruction"] for record in records] == asked * 3
    assert [Path(record["image"]).stem for record in records] == [name for name in ("one", "three", "two") for _ in asked]
    assert [Path(record["mask"]).name for record in records[:3]] == [f"one__{number}_mask.png" for number in (1, 2, 3)]
    assert all(record.keys() == SEGMENT_KEYS and record["mode"] == "direct" for record in records)
    assert ["pixel_encoder" in record["timings_ms"] for record in records] == [True, False, False] * 3
    fresh = Segmenter(tiny_bundle, "onnxruntime")
    for record in records[:3]:
        expected = fresh(record["image"], record["instruction"])
        np.testing.assert_array_equal(np.asarray(Image.open(record["mask"])) > 0, expected.mask)
        assert (record["text"], record["area"]) == (expected.text, expected.area)


def test_in_words_the_instruction_stands_below_its_verdict_when_there_are_several(run_segment: Any, photos: Path) -> None:
    _, lines, errors = run_segment(photos / "one.png", "--instruction", "Find dents.", "--instruction", "Find\n\trust.")
    told = [line for line in lines if line.startswith("    Find")]
    assert told == ["    Find dents.", "    Find rust."]
    assert run_segment(photos / "one.png", "--instruction", "Find dents.")[1][0].endswith("one.png")


def test_a_picture_that_cannot_be_read_is_told_once_and_an_instruction_that_fails_by_its_words(
    run_segment: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "cut.png").write_bytes(b"nothing")
    original = Inspection.answer

    def failing(self: Inspection, prompt: Prompt) -> Segmentation:
        if prompt.instruction == "Find rust.":
            raise EngineFailed("out of memory")
        return original(self, prompt)

    monkeypatch.setattr(Inspection, "answer", failing)
    code, lines, _ = run_segment(photos, "--json", "--instruction", "Find rust.", "--instruction", "Find dents.")
    records = [json.loads(line) for line in lines]
    assert code == 1
    (unread,) = [record for record in records if Path(record["image"]).name == "cut.png"]
    assert unread.keys() == {"image", "error", *MADE_KEYS}
    failed = [record for record in records if "instruction" in record and "error" in record]
    assert [record["instruction"] for record in failed] == ["Find rust."] * 3
    assert [record["instruction"] for record in records if "score" in record] == ["Find dents."] * 3


# agvas-segment: pictures that fail


def test_a_bad_picture_in_a_folder_does_not_stop_the_rest(run_segment: Any, photos: Path) -> None:
    whole = (photos / "one.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    code, lines, errors = run_segment(photos, "--json")
    assert code == 1
    records = {Path(record["image"]).name: record for record in map(json.loads, lines)}
    assert records["cut.png"].keys() == {"image", "error", *MADE_KEYS}
    assert sum("score" in record for record in records.values()) == 3
    assert errors.count("cut.png") == 1


def test_a_picture_that_cannot_be_read_has_a_line_in_words_too(run_segment: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cut.png").write_bytes(b"cut off")
    code, lines, errors = run_segment(photos, photos / "nowhere.png")
    assert code == 1 and len(lines) == 5
    unread = [line.split("  (")[0].split() for line in lines if line.startswith("??")]
    assert unread == [["??", "-", "-", "px", "-", "ms", str(photos / f"{name}.png")] for name in ("nowhere", "cut")]
    assert "stderr says why" in lines[0] and "cut.png: expected a PNG" in errors

    def failing(self: Inspection, prompt: Prompt) -> Segmentation:
        raise EngineFailed("out of memory")

    monkeypatch.setattr(Inspection, "answer", failing)
    _, lines, _ = run_segment(photos / "one.png", "--instruction", "Find rust.", "--instruction", "Find dents.")
    assert [line.split()[0] for line in lines] == ["??", "Find", "??", "Find"]


def test_a_name_too_long_for_its_results_is_that_pictures_error(run_segment: Any, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = 255 - len(".png")
    for name in ("a" * limit, "b" * (255 - len("_mask.png"))):
        save_picture(photos / f"{name}.png")
    assert run_segment(photos, "--json")[0] == 0, "nothing is written, no name is needed"
    code, lines, errors = run_segment(photos, "--json", "--output", out)
    failed, *whole = map(json.loads, lines)
    assert code == 1 and "expected a name that the file system takes, got one of 260 bytes; rename the picture" in failed["error"]
    assert Path(failed["image"]).stem == "a" * limit and errors.count("expected a name") == 1
    assert len(whole) == 4 and all(Path(record["mask"]).exists() for record in whole), "an overlay's longer name is not needed"
    assert run_segment(photos, "--json", "--output", out, "--overlay")[0] == 1
    assert not list(out.glob("b*")), "half of the results would pass for all"
    (photos / f"{'a' * limit}.png").write_bytes(b"cut off")
    assert run_segment(photos, "--output", out)[0] == 1


def test_an_old_result_that_cannot_be_removed_stops_the_run(run_segment: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "one_overlay.png").mkdir(parents=True)
    code, _, errors = run_segment(photos / "one.png", "--output", tmp_path / "out")
    assert code == 2 and "one_overlay.png: expected to remove an earlier run's result, got" in errors


def test_a_folder_that_cannot_be_opened_does_not_stop_the_rest(run_segment: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no permission stops."""
    listed = os.listdir

    def closed(folder: Any) -> list[str]:
        if Path(folder).name == "shut":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    (photos / "shut").mkdir()
    monkeypatch.setattr(os, "listdir", closed)
    code, lines, errors = run_segment(photos / "shut", photos, "--json")
    assert (code, len(lines)) == (1, 4) and json.loads(lines[0])["image"] == str(photos / "shut")
    assert "shut: expected a folder that can be read" in errors


def test_an_input_that_does_not_exist_does_not_stop_the_rest(run_segment: Any, photos: Path) -> None:
    code, lines, errors = run_segment(photos / "nowhere.png", photos / "one.png", "--json")
    assert code == 1
    assert [sorted(json.loads(line))[0:2] for line in lines][0] == ["error", "image"]
    assert json.loads(lines[1])["image"].endswith("one.png")
    assert "nowhere.png" in errors


def test_nothing_to_segment_is_exit_code_2(run_segment: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run_segment(tmp_path / "nowhere.png")[0] == 2
    assert run_segment(tmp_path / "empty")[0] == 2


def test_an_engine_that_fails_on_one_picture_goes_on_with_the_next(
    run_segment: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Segmenter.inspect

    def failing(self: Segmenter, image: Any) -> Inspection:
        if Path(image).name == "three.png":
            raise EngineFailed("out of memory")
        return original(self, image)

    monkeypatch.setattr(Segmenter, "inspect", failing)
    code, lines, errors = run_segment(photos, "--json")
    assert (code, len(lines)) == (1, 3)
    assert f"{photos / 'three.png'}: out of memory" in errors


# agvas-segment: requests that are refused


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--engine", "onnxrutime"), "did you mean 'onnxruntime'?"),
        (("--mode", "segment-and-explain"), "did you mean 'segment-then-explain'?"),
        (("--device", "cuda"), "cuda:0 is the first GPU"),
        (("--device", "gpu"), "cuda:0 is the first GPU"),
        (("--inference-precision", "BF16"), "did you mean 'bf16'?"),
        (("--engine", "onnxruntime", "--inference-precision", "bf16"), "use engine openvino"),
        (("--engine", "tensorrt"), "ask for device cuda:0, or use engine onnxruntime"),
        (("--engine", "openvino", "--device", "cuda:0"), "openvino runs on device cpu"),
        (("--mode", "segment-then-explain"), "it has direct"),
        (("--instruction", "  "), "the instruction is empty"),
        (("--instruction", "Find rust.", "--instruction", "Find [NOR]."), "control token"),
        (("--normal-state", "It is round."), "only mode describe-then-segment-plus takes it, got mode direct"),
        (("--max-new-tokens", "0"), "expected 1 to 64"),
        (("--max-new-tokens", "65"), "expected 1 to 64"),
        (("--instruction", "say [SEG]"), "control token"),
        (("--threshold", "1.5"), "0..1"),
        (("--threshold", "nan"), "0..1"),
        (("--relative-threshold", "2"), "--relative-threshold: expected a number in 0..1, got 2.0"),
        (("--threads", "-1"), "--threads"),
        (("--pixel-limit", "0"), "--pixel-limit"),
        (("--tile", "20"), "--tile: expected a side of 64 pixels at least, got 20"),
        (("--tile", "100", "--tile-overlap", "80"), "--tile-overlap: expected 0 to 50 pixels"),
        (("--tile-overlap", "10"), "--tile-overlap: expected --tile beside it"),
        (("--region", "nowhere.png"), "nowhere.png"),
        (("--overlay",), "--output"),
        (("--map",), "--output"),
        (("--polygons",), "--json"),
    ],
)
def test_a_request_that_cannot_be_met_is_exit_code_2_with_a_remedy(
    arguments: tuple[str, ...],
    remedy: str,
    tiny_bundle: Path,
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = () if "--engine" in arguments or "--inference-precision" in arguments else ("--engine", "onnxruntime")
    code = segment.main([str(photos), "--bundle", str(tiny_bundle), *engine, *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert remedy in captured.err
    assert "Traceback" not in captured.err


def test_tiles_and_a_region_are_what_the_segmenter_gives(run_segment: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    part, small = tmp_path / "part.png", save_picture(tmp_path / "small.png")
    Image.fromarray(picture(3, 90, 130)).save(part)
    region = np.zeros((90, 130), np.uint8)
    region[20:50, 30:] = 255
    Image.fromarray(region).save(tmp_path / "region.png")
    code, lines, errors = run_segment(part, small, "--json", "--tile", "64", "--region", tmp_path / "region.png", "--threshold", "0.3")
    record, other = (json.loads(line) for line in lines)
    expected = Segmenter(tiny_bundle, "onnxruntime", tile=64, threshold=0.3)(part).within(region)
    assert record["score"] == pytest.approx(expected.score, abs=1e-6)
    assert (record["tiles"], record["region_share"], record["area"]) == (6, expected.region_share, expected.area)
    assert code == 1 and "the region is 130 × 90 pixels, this picture 67 × 41" in other["error"]
    assert str(small) in errors


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (np.zeros((90, 130), np.uint8), "got none: white is looked at"),
        (np.full((90, 130), 77, np.uint8), "got the level 77 too"),
        (np.broadcast_to(np.array([255, 0, 0], np.uint8), (90, 130, 3)), "expected black and white, got colours"),
    ],
)
def test_a_region_whose_meaning_would_be_guessed_is_refused(
    region: np.ndarray, message: str, run_segment: Any, photos: Path, tmp_path: Path
) -> None:
    Image.fromarray(region).save(tmp_path / "region.png")
    code, lines, errors = run_segment(photos, "--region", tmp_path / "region.png")
    assert (code, lines) == (2, []) and message in errors and "region.png" in errors


def test_a_region_that_leaves_nothing_out_is_warned_of_even_quietly(run_segment: Any, photos: Path, tmp_path: Path) -> None:
    Image.fromarray(np.ones((41, 67), np.uint8)).save(tmp_path / "region.png")
    code, _, errors = run_segment(photos, "--quiet", "--region", tmp_path / "region.png")
    assert code == 0 and "white throughout" in errors


def test_a_frame_that_shows_nothing_is_warned_of_and_strict_makes_that_a_failure(run_segment: Any, tmp_path: Path) -> None:
    Image.fromarray(np.full((80, 90, 3), 3, np.uint8)).save(tmp_path / "black.png")
    for tile in ((), ("--tile", "64")):
        code, (line,), errors = run_segment(tmp_path / "black.png", "--json", *tile)
        assert code == 0 and "of one tone, levels 3 to 3" in json.loads(line)["warnings"][0]
        assert "look at lamp, lens and camera" in errors
    Image.fromarray(np.random.default_rng(0).normal(2, 3, (80, 90, 3)).clip(0, 255).astype(np.uint8)).save(tmp_path / "noise.png")
    assert "below level 20 of 255" in json.loads(run_segment(tmp_path / "noise.png", "--json")[1][0])["warnings"][0]
    assert run_segment(tmp_path / "noise.png", "--strict")[0] == 1
    assert run_segment(tmp_path / "black.png", "--strict")[0] == 1
    assert run_segment(save_picture(tmp_path / "part.png"), "--strict")[0] == 0


def test_ng_is_an_exit_code_where_that_is_asked_for(run_segment: Any, photos: Path, tmp_path: Path) -> None:
    assert run_segment(photos, "--threshold", "0")[0] == 0
    assert run_segment(photos, "--threshold", "0", "--fail-on-ng")[0] == 3
    assert run_segment(photos, "--threshold", "1", "--fail-on-ng")[0] == 0
    assert run_segment(photos, tmp_path / "none.png", "--threshold", "0", "--fail-on-ng")[0] == 1


def test_a_map_is_written_in_16_bits_and_removed_where_none_is_asked_for(
    run_segment: Any, photos: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, (line,), _ = run_segment(photos / "one.png", "--json", "--output", out, "--map")
    written = np.asarray(Image.open(json.loads(line)["map"])).astype(np.float64) / 65535
    np.testing.assert_allclose(written, Segmenter(tiny_bundle, "onnxruntime")(photos / "one.png").anomaly_map, atol=1e-5)
    run_segment(photos / "one.png", "--output", out)
    assert sorted(path.name for path in out.iterdir()) == ["one_mask.png"]


def test_a_pattern_whose_folder_is_the_output_is_refused(run_segment: Any, photos: Path) -> None:
    code, lines, errors = run_segment(photos / "*.png", "--output", photos)
    assert (code, lines) == (2, []) and "expected a folder outside the pictures' own" in errors


@pytest.mark.parametrize(
    ("pattern", "output", "refused"),
    [
        ("**/*.png", "results", True),
        ("**/*.png", "camera/deep/results", True),
        ("**", "results", True),
        ("*/*.png", "results", True),
        ("*/*.png", "camera/results", False),
        ("cam*/*.png", "results", False),
        ("cam*/**/*.png", "camera/results", True),
        ("cam*/**/*.png", "results", False),
        ("**/*.png", "../results", False),
        ("*.png", "results", False),
    ],
)
def test_a_pattern_that_would_find_its_own_results_is_refused(
    run_segment: Any, photos: Path, pattern: str, output: str, refused: bool
) -> None:
    save_picture(photos / "camera" / "part.png")
    code, lines, errors = run_segment(photos / pattern, "--output", photos / output)
    assert (code, "where the next run would take masks for pictures" in errors) == ((2, True) if refused else (0, False)), errors
    assert (photos / output).exists() is not refused


def test_files_that_a_shell_named_of_the_output_folder_are_refused_and_a_single_one_is_not(run_segment: Any, photos: Path) -> None:
    code, lines, errors = run_segment(photos / "one.png", photos / "two.png", "--output", photos)
    assert (code, lines) == (2, []) and "the one of" in errors and "and 1 more that were named" in errors
    assert run_segment(photos / "one.png", "--output", photos)[0] == 0


def test_pictures_that_are_left_out_are_told_even_quietly_and_strict_makes_that_a_failure(run_segment: Any, photos: Path) -> None:
    (photos / "more.webp").write_bytes(b"RIFF")
    code, lines, errors = run_segment(photos, "--quiet")
    assert (code, len(lines)) == (0, 3) and "left out 1 .webp" in errors
    code, lines, _ = run_segment(photos, "--strict")
    assert (code, len(lines)) == (1, 4) and lines[0].startswith("??") and str(photos / "more.webp") in lines[0]
    code, lines, _ = run_segment(photos, photos / "*.png", "--strict", "--json")
    assert (code, len(lines)) == (1, 4)
    told = json.loads(lines[0])
    assert told["image"] == str(photos / "more.webp") and "got a .webp, which is not read; save it as PNG" in told["error"]


def test_a_folder_that_is_no_bundle_is_exit_code_2(
    run_segment: Any, photos: Path, tmp_path: Path, copy_of_bundle: Callable[[], Path]
) -> None:
    code, lines, errors = run_segment(photos, bundle=tmp_path / "nothing")
    assert (code, lines) == (2, [])
    assert "agvas-export" in errors
    altered = copy_of_bundle()
    table = altered / "embeddings.npy"
    table.write_bytes(table.read_bytes()[:-1] + b"\1")
    code, _, errors = run_segment(photos, bundle=altered)
    assert code == 2
    assert "embeddings.npy" in errors


# agvas-segment: files


def test_masks_and_overlays_are_written_under_the_pictures_stem(run_segment: Any, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    code, lines, _ = run_segment(photos, "--json", "--output", out, "--overlay")
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{stem}_{kind}.png" for stem in ("one", "two", "three") for kind in ("mask", "overlay")
    )
    record = json.loads(lines[0])
    assert (record["mask"], record["overlay"]) == (str(out / "one_mask.png"), str(out / "one_overlay.png"))


def test_pictures_of_the_same_stem_do_not_overwrite_each_other(run_segment: Any, tmp_path: Path) -> None:
    places = ("good/000.png", "crack/000.png", "crack/001.png", "crack/deep/002.png", "good/deep/002.png")
    for index, place in enumerate(places):
        save_picture(tmp_path / "test" / place, index)
    code, lines, _ = run_segment(tmp_path / "test", "--recursive", "--json", "--output", tmp_path / "out")
    assert code == 0
    written = {
        str(Path(json.loads(line)["image"]).relative_to(tmp_path / "test")): json.loads(line)["mask"] for line in lines
    }
    assert {image: Path(mask).name for image, mask in written.items()} == {
        "good/000.png": "good__000_mask.png",
        "crack/000.png": "crack__000_mask.png",
        "crack/001.png": "001_mask.png",
        "crack/deep/002.png": "crack__deep__002_mask.png",
        "good/deep/002.png": "good__deep__002_mask.png",
    }


@pytest.mark.parametrize(
    ("pictures", "stems"),
    [
        (["/a/x.png"], ["x"]),
        (["/a/x.png", "/a/x.jpg"], ["x.png", "x.jpg"]),
        (["/a/x.png", "/a/x.jpg", "/b/x.png"], ["a__x.png", "a__x.jpg", "b__x.png"]),
        (["/a/x.png", "/a/x.PNG", "/a/x.jpg"], ["x.png", "x.PNG-2", "x.jpg"]),
        (["/a/X.png", "/b/x.png"], ["a__X", "b__x"]),
        (["/x.png", "/a/x.png"], ["x", "a__x"]),
        (["/A/x.png", "/a/x.png"], ["A__x", "a__x-2"]),
        (["/a/x.png", "/b/x.png", "/c/a__x.png"], ["a__x-2", "b__x", "a__x"]),
        (["/a/b/x.png", "/a__b/x.png"], ["b__x", "a__b__x"]),
        (["/a/b__c/x.png", "/a__b/c/x.png"], ["b__c__x", "c__x"]),
    ],
)
def test_stems_are_told_apart_by_folder_suffix_or_number(pictures: list[str], stems: list[str]) -> None:
    assert output_stems([Path(path) for path in pictures]) == stems


def test_stems_stay_apart_whatever_the_names_are() -> None:
    names = [
        f"/{a}/{b}/{stem}.png" for a in ("a", "A", "a__b") for b in ("b", "B", "b__c") for stem in ("c", "C", "b__c")
    ]
    stems = output_stems([Path(name) for name in (*names, "/c.png", "/b__b__c.png", "/c-2.png")])
    assert len({stem.casefold() for stem in stems}) == len(stems)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_never_overwrites_or_removes_a_picture(run_segment: Any, photos: Path, kind: str) -> None:
    truth = save_picture(photos / f"one_{kind}.png", 9)
    before = truth.read_bytes()
    code, _, errors = run_segment(photos / "one.png", truth, "--output", photos)
    assert code == 2
    assert f"one_{kind}.png" in errors
    assert truth.read_bytes() == before


@pytest.mark.parametrize(("below", "options", "refused"), [(".", (), True), ("out", ("--recursive",), True), ("out", (), False)])
def test_masks_are_not_written_where_the_next_run_would_take_them_for_pictures(
    run_segment: Any, photos: Path, below: str, options: tuple[str, ...], refused: bool
) -> None:
    pictures = {path.name for path in photos.iterdir()}
    code, _, errors = run_segment(photos, *options, "--output", photos / below)
    assert ("outside the pictures' own" in errors) is refused
    assert (code == 2) is refused
    if refused:
        assert {path.name for path in photos.iterdir()} == pictures


def test_an_unwritable_output_stops_before_the_model_is_opened(
    run_segment: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, lines, errors = run_segment(photos, "--output", tmp_path / "file", bundle=tmp_path / "never opened")
    assert (code, lines) == (2, [])
    assert "choose another" in errors
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not bind root, who runs CI
    code, _, errors = run_segment(photos, "--output", tmp_path / "out", bundle=tmp_path / "never opened")
    assert code == 2
    assert "expected a writable folder" in errors


def test_a_picture_whose_results_could_not_all_be_written_has_none(
    run_segment: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = segmentation.write_whole

    def full(path: Path, data: memoryview) -> None:
        if path.name.endswith("_overlay.png"):
            raise OutputError("disk full; free some space")
        whole(path, data)

    monkeypatch.setattr(segmentation, "write_whole", full)
    code, lines, errors = run_segment(photos, "--output", tmp_path / "out", "--overlay")
    assert (code, lines) == (2, []) and "disk full" in errors
    assert not list((tmp_path / "out").iterdir())


def test_an_answer_that_the_limit_cut_is_not_verified_and_says_so(run_segment: Any, photos: Path) -> None:
    code, lines, _ = run_segment(photos / "one.png", "--json", "--max-new-tokens", "2")
    record = json.loads(lines[0])
    assert code == 1 and (record["answer_verified"], record["truncated"], record["anchors_found"]) == (False, True, False)
    _, lines, _ = run_segment(photos / "one.png", "--max-new-tokens", "2")
    assert "no verdict: the answer was cut at the length limit before its anchors" in lines[0]


def test_verdicts_that_would_go_nowhere_are_refused(tiny_bundle: Path, photos: Path) -> None:
    command = f"{sys.executable} -m runtime.cli.segment {photos} --bundle {tiny_bundle} --engine onnxruntime --quiet >&-"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 2 and "stdout: expected somewhere for the verdicts to go" in run.stderr


def test_a_full_disk_stops_the_run_and_keeps_what_was_written(
    run_segment: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Segmentation.save

    def full(self: Segmentation, folder: Any, stem: str, **asked: bool) -> dict[str, Path]:
        if stem == "three":
            raise OutputError("disk full; free some space")
        return original(self, folder, stem, **asked)

    monkeypatch.setattr(Segmentation, "save", full)
    code, lines, errors = run_segment(photos, "--json", "--output", tmp_path / "out")
    assert code == 2
    assert [Path(json.loads(line)["image"]).stem for line in lines] == ["one"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one_mask.png"]
    assert "free some space" in errors


def test_ctrl_c_is_exit_code_130_without_a_traceback(
    run_segment: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Segmenter, image: Any) -> Inspection:
        raise KeyboardInterrupt

    monkeypatch.setattr(Segmenter, "inspect", interrupted)
    code, _, errors = run_segment(photos)
    assert code == 130
    assert "interrupted" in errors


def test_a_full_disk_behind_stdout_is_exit_code_2(
    tiny_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert segment.main([str(photos), "--bundle", str(tiny_bundle), "--engine", "onnxruntime"]) == 2
    assert "No space left" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_the_run_quietly(tiny_bundle: Path, photos: Path) -> None:
    command = [sys.executable, "-m", "runtime.cli.segment", str(photos), "--bundle", str(tiny_bundle), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        errors = running.stderr.read()
    assert (running.returncode, errors) == (2, b"")


def test_json_has_no_nan() -> None:
    assert (
        segment.json_line({"a": [float("nan"), 1.5], "b": {"c": float("inf")}})
        == '{"a": [null, 1.5], "b": {"c": null}}'
    )


# agvas-verify


def test_a_bundle_passes_its_own_golden_traces(run_verify: Any, tiny_bundle: Path) -> None:
    code, lines, _ = run_verify("--json")
    report = json.loads(lines[-1])
    assert (code, len(lines), report["passed"], report["failures"]) == (0, 1, True, [])
    assert {"bundle", "passed", "parity", "bytes", "peak_rss_bytes", "seconds", "engine"} <= report.keys()
    assert PARITY_KEYS <= report["parity"].keys()
    assert report["engine"] == "onnxruntime"
    manifest = Bundle(tiny_bundle).manifest
    assert (report["threshold"], report["relative_threshold"]) == (manifest.threshold, manifest.relative_threshold)
    assert max(report["stage_relative_errors"].values()) < 1e-4
    assert report["bundle"] == str(tiny_bundle)


def test_verify_in_words_has_the_numbers_and_the_verdict(run_verify: Any, tiny_bundle: Path) -> None:
    code, lines, _ = run_verify()
    text = "\n".join(lines)
    assert code == 0
    rule = Bundle(tiny_bundle).manifest.mask_rule
    assert f"masks     by the bundle's threshold {rule.threshold:g}, relative threshold {rule.relative_threshold:g}" in lines
    assert lines[-1].startswith("passed")
    for word in ("mask IoU", "flips", "anchor states", "pixel_embeddings", "anomaly_map", "onnxruntime"):
        assert word in text


def test_a_system_that_does_not_tell_its_memory_has_a_table_without_it(run_verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MB of memory" in run_verify()[1][-1]
    monkeypatch.setattr("runtime.verify.peak_rss_bytes", lambda: None)
    code, lines, _ = run_verify()
    assert code == 0 and lines[-1].startswith("passed") and lines[-1].endswith(" s")


@pytest.mark.parametrize("stage", ["spam", "mask_decoder"])
def test_an_engine_that_computes_nan_has_a_table_that_says_so(stage: str, run_verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OnnxRuntimeEngine.run

    def spoilt(self: OnnxRuntimeEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = original(self, feeds)
        return {name: output * np.nan for name, output in outputs.items()} if self.spec.name == stage else outputs

    monkeypatch.setattr(OnnxRuntimeEngine, "run", spoilt)
    code, lines, _ = run_verify()
    assert code == 1 and lines[-1].startswith("FAILED")
    assert any(line.split() == ["maps", "up", "to", "NaN", "apart,", "NaN", "on", "average"] for line in lines)
    assert any("maps hold NaN or infinity" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bisect", "--tolerance", "-1"], "--tolerance: expected a number above 0, got -1.0"),
        (["--bisect", "--tolerance", "nan"], "--tolerance: expected a number above 0, got nan"),
        (["--bisect", "--images", "parts"], "--images: not with --bisect"),
        (["--low-memory"], "--low-memory: expected a named engine, got auto"),
    ],
)
def test_verify_refuses_what_would_say_nothing(run_verify: Any, arguments: list[str], message: str) -> None:
    code, lines, errors = run_verify(*arguments, engine="auto" if "--low-memory" in arguments else "onnxruntime")
    assert (code, lines) == (2, []) and errors.startswith(f"agvas-verify: {message}")


def test_a_picture_that_cannot_be_read_is_told_before_the_replay(
    run_verify: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "good.png").write_bytes((photos / "one.png").read_bytes())
    (tmp_path / "mine" / "later.png").write_bytes(b"cut off")
    monkeypatch.setattr(verify, "verify", lambda *_, **__: pytest.fail("must not start"))
    code, _, errors = run_verify("--images", tmp_path / "mine")
    assert code == 2 and "later.png" in errors


def test_auto_verifies_the_engine_that_the_segmenter_would_choose(run_verify: Any, tiny_bundle: Path) -> None:
    code, lines, _ = run_verify("--json", engine="auto")
    report = json.loads(lines[-1])
    chosen = Segmenter(tiny_bundle)  # the choice is remembered
    assert code == 0
    assert (report["engine"], report["inference_precision"]) == (chosen.engine, chosen.inference_precision)


def test_ones_own_pictures_are_compared_with_another_engine(run_verify: Any, photos: Path) -> None:
    code, lines, _ = run_verify("--json", "--images", photos)
    report = json.loads(lines[-1])
    assert code == 0
    assert report["images_parity"]["images"] == 3
    assert report["images_parity"]["passed"] is True
    assert report["images_parity"]["against"].startswith("engine openvino, precision graph")
    code, lines, _ = run_verify("--images", photos, engine="openvino")
    assert code == 0
    assert any("against engine onnxruntime" in line for line in lines)
    _, lines, _ = run_verify("--images", photos / "one.png", "--low-memory")
    assert any("against engine openvino" in line for line in lines), "one stage at a time is the same engine still"


def test_pictures_on_which_the_engines_differ_fail_the_verification(
    run_verify: Any, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = verify.compare_on_images

    def differing(*arguments: Any) -> Any:
        from dataclasses import replace

        return replace(original(*arguments), flips=2)

    monkeypatch.setattr(verify, "compare_on_images", differing)
    code, lines, _ = run_verify("--json", "--images", photos)
    report = json.loads(lines[-1])
    assert (code, report["passed"], report["images_parity"]["passed"]) == (1, False, False)
    assert report["failures"] == ["pictures: 2 masks flipped between empty and not empty, 0 allowed"]


def test_pictures_need_another_engine(run_verify: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = verify.open_pipeline

    def only_onnxruntime(bundle: Any, engine: str, options: Any) -> Any:
        if engine != "onnxruntime":
            raise EngineUnavailable(f"engine {engine} is not installed")
        return original(bundle, engine, options)

    monkeypatch.setattr(verify, "open_pipeline", only_onnxruntime)
    code, lines, errors = run_verify("--json", "--images", photos)
    assert code == 2
    assert json.loads(lines[-1])["passed"] is False
    assert "expected another engine" in errors and "openvino is not installed" in errors


@pytest.mark.parametrize("engine", ["onnxruntime", "auto"])
def test_a_broken_gate_is_exit_code_1_with_the_numbers(
    engine: str, run_verify: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = Gates(mask_iou_mean=0.9, mask_iou_min=0.9, flips=0, map_max_abs=-1.0, answers_changed=None)
    monkeypatch.setitem(GATES, "fp32", impossible)
    monkeypatch.setitem(GATES, "bf16", impossible)
    code, lines, _ = run_verify("--json", engine=engine)
    report = json.loads(lines[-1])
    assert (code, report["passed"]) == (1, False)
    assert len(report["failures"]) == 1 and report["failures"][0].endswith("-1e+00 allowed")
    assert report["inference_precision"] == "graph"
    assert ("auto_failed" in report) is (engine == "auto")


def test_a_remembered_choice_that_fails_now_is_forgotten(
    run_verify: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.selection.CPU_CANDIDATES", (("onnxruntime", "graph"),))
    assert run_verify("--json", engine="auto")[0] == 0
    (remembered,) = (tmp_path / "cache").rglob("*.json")
    original = OnnxRuntimeEngine.run

    def updated(self: OnnxRuntimeEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = original(self, feeds)
        return {name: 1 - output for name, output in outputs.items()} if self.spec.name == "mask_decoder" else outputs

    with monkeypatch.context() as patched:
        patched.setattr(OnnxRuntimeEngine, "run", updated)
        assert run_verify("--json")[0] == 1 and remembered.exists(), "an engine by name is no choice of auto's"
        code, lines, _ = run_verify("--json", engine="auto")
        assert code == 1 and "auto_failed" not in json.loads(lines[-1])
        assert not remembered.exists()
        with pytest.raises(EngineUnavailable, match="no engine on device cpu can run this bundle"):
            Segmenter(tiny_bundle)
    chosen = Segmenter(tiny_bundle).choice
    assert chosen is not None and not chosen.remembered


def test_what_cannot_be_verified_is_exit_code_2(run_verify: Any, tmp_path: Path, photos: Path) -> None:
    for arguments in ({"bundle": tmp_path / "nothing"}, {"engine": "opnvino"}, {"engine": "tensorrt"}):
        code, lines, errors = run_verify("--json", **arguments)
        assert code == 2
        assert json.loads(lines[-1])["error"] in errors
    assert run_verify("--images", tmp_path / "nowhere")[0] == 2


# The demo


def test_the_demo_leaves_bundle_masks_overlays_and_summary(
    tiny_bundle: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "_export", lambda bundle: shutil.copytree(tiny_bundle, bundle, dirs_exist_ok=True) and 0)
    output = tmp_path / "demo"
    assert demo.main([str(photos), "--output", str(output), "--count", "4"]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["verify"]["passed"] is True
    assert ["true_iou" in record for record in summary["images"]] == [True] * 2 + [False] * 5
    assert summary["latency_ms"]["calls"] >= 20
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p90"]
    assert 0 <= summary["mean_true_iou"] <= 1
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 256 and sheet.height > 4 * 256  # two pictures of four cells a row
    for record in summary["images"]:
        assert Path(record["mask"]).parent == output / "masks" and Path(record["mask"]).is_file()
        assert Path(record["overlay"]).parent == output / "overlays" and Path(record["overlay"]).is_file()
    told = capsys.readouterr().out
    assert "contact_sheet.png" in told and f"NG: a score above {summary['threshold']:g}" in told
    # Again, smaller: nothing of the first is left beside the new summary.
    assert demo.main(["--output", str(output), "--count", "1"]) == 0
    assert len(list((output / "masks").iterdir())) == len(list((output / "overlays").iterdir())) == 1


def test_the_demo_ends_with_an_error_when_export_or_verification_fails(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_export", lambda bundle: 2)
    assert demo.main(["--output", str(tmp_path / "demo")]) == 2
    monkeypatch.setattr(demo, "_export", lambda bundle: shutil.copytree(tiny_bundle, bundle) and 0)
    monkeypatch.setattr(demo, "verify_bundle", lambda *_, **__: {"passed": False, "failures": ["flips"]})
    assert demo.main(["--output", str(tmp_path / "demo")]) == 1
    assert "verification failed: flips" in capsys.readouterr().err


def test_the_demo_leaves_a_folder_of_other_files_alone(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_export", lambda bundle: pytest.fail("must not start"))
    assert demo.main(["--output", str(photos)]) == 2
    assert "expected an earlier demo or an empty folder" in capsys.readouterr().err
    assert len(list(photos.iterdir())) == 3


# Both command lines


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stream_changes_nothing_that_a_command_does(closed: str, tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m runtime.cli.segment {photos} --bundle {tiny_bundle} --engine onnxruntime"
    line = f"{command} --output {tmp_path / 'out'} {closed}"
    done = subprocess.run(["bash", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert list((tmp_path / "out").glob("*_mask.png"))


@pytest.mark.parametrize("module", ["runtime.cli.segment", "runtime.cli.verify"])
def test_help_loads_neither_torch_nor_an_engine(module: str) -> None:
    code = (
        f"import sys; sys.argv = ['x', '--help']\nfrom {module} import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino', 'cv2', 'skimage'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--bundle" in done.stdout and "Exit codes" in done.stdout


@pytest.mark.parametrize("main", [segment.main, verify.main])
def test_a_long_run_shows_a_bar_on_stderr_even_in_a_log(
    main: Callable[[list[str]], int],
    tiny_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for index in range(9):
        save_picture(tmp_path / "many" / f"{index}.png", index)
    inputs = [str(tmp_path / "many")] if main is segment.main else ["--images", str(tmp_path / "many")]
    assert main([*inputs, "--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--json"]) == 0
    captured = capsys.readouterr()
    assert "pictures:" in captured.err and "9/9" in captured.err
    for line in captured.out.splitlines():
        json.loads(line)


# What an installation for the line alone lacks


@pytest.mark.parametrize(
    ("command", "module", "extra", "arguments"),
    [
        ("agvas-train", "agvas.training.cli", "train", []),
        ("agvas-export", "export.cli", "export", []),
        ("agvas-eval", "benchmarks.accuracy", "train", [".", "--checkpoint", "nano"]),
    ],
)
def test_a_command_that_needs_torch_says_which_extra_has_it(
    command: str, module: str, extra: str, arguments: list[str], tmp_path: Path
) -> None:
    save_picture(tmp_path / "one.png")
    (tmp_path / "manifest.csv").write_text("image,mask,label\none.png,,0\n")
    code = f"import sys; sys.modules['torch'] = None; from {module} import main; sys.exit(main({arguments}))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f'{command}: torch is not installed; pip install "agvas[{extra}]"\n')


def test_a_named_engine_is_not_measured_again(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--remeasure"]) == 2
    assert "--remeasure: expected --engine auto, got onnxruntime" in capsys.readouterr().err


def test_in_a_log_each_drawing_of_a_bar_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for done in range(1, 13):
            progress("pictures", done, 12)
        progress.step_aside()
        print("note", file=sys.stderr)
    lines = capfd.readouterr().err.splitlines()
    assert "note" in lines and "\r" not in "".join(lines)
    assert [line for line in lines if line != "note"] and all(line.startswith("pictures:") for line in lines if line != "note")
