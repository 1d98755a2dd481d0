"""agvas-segment through main(): lines, notes and exit codes on a real, tiny bundle."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, save_picture
from PIL import Image

import runtime
from engines import EngineFailed
from runtime import Inspection, Segmenter
from runtime.bundle import Bundle
from runtime.cli import segment
from runtime.masking import MaskRule
from runtime.prompts import Prompt
from runtime.segmentation import Segmentation

MADE_KEYS = {"manifest_sha256", "model", "version", "time"}
SEGMENT_KEYS = {
    *MADE_KEYS,
    *("image", "score", "is_anomalous", "mask", "area", "text", "answer_verified", "anchors_found", "threshold", "relative_threshold"),
    *("instruction", "mode", "anchor_groups", "truncated"),
    *("timings_ms", "engine", "inference_precision", "device", "warnings", "tiles", "region_share", "boxes", "width", "height"),
}

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
    assert re.search(r"^agvas-segment: answers: \d (NG|OK)$", errors, re.MULTILINE), "two answers of one picture are no two pictures"
    _, lines, errors = run_segment(photos / "one.png", "--instruction", "Find dents.")
    assert lines[0].endswith("one.png") and "answers" not in errors


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
        (("--engine", "onnxruntime", "--inference-precision", "bf16"), "or engine openvino"),
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
        (np.full((90, 130), 77, np.uint8), "got the level 77;"),
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
