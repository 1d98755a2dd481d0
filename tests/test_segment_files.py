"""agvas-segment's files: under whose name results lie, and what of a run that fails stays."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import save_picture

from runtime import Inspection, Segmenter, segmentation
from runtime.cli import segment
from runtime.cli.records import output_stems
from runtime.errors import OutputError
from runtime.picture_files import KINDS
from runtime.segmentation import Segmentation
from runtime.writing import write_whole


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


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError])
def test_no_overlay_of_another_picture_stands_beside_a_mask(
    end: type[BaseException], run_segment: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (photos / "one.png", "--output", tmp_path / "out", "--overlay", "--threshold", "0.01")
    run_segment(*asked)
    shutil.copy(photos / "two.png", photos / "one.png")
    real = segmentation.write_whole

    def ends(path: Path, data: Any) -> None:
        if "overlay" in path.name:
            raise end
        real(path, data)

    monkeypatch.setattr(segmentation, "write_whole", ends)
    code, lines, _ = run_segment(*asked)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    if end is KeyboardInterrupt:
        assert (code, lines, left) == (130, [], ["one_mask.png"])
    else:
        assert code == 1 and lines[0].startswith("??") and left == []


def test_a_name_as_long_as_the_file_system_takes_is_written_and_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    longest = tmp_path / f"{'m' * (os.pathconf(tmp_path, 'PC_NAME_MAX') - 4)}.png"
    write_whole(longest, b"mask")
    assert longest.read_bytes() == b"mask" and list(tmp_path.iterdir()) == [longest]
    with pytest.raises(OutputError, match="mask.png: expected a writable file"):
        write_whole(tmp_path / "mistyped" / "mask.png", b"mask")
    assert not (tmp_path / "mistyped").exists()


def test_a_file_that_ctrl_c_cut_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "mask.png", b"mask")
    assert list(tmp_path.iterdir()) == []


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


def test_a_full_disk_behind_stdout_is_exit_code_2_at_the_very_end_too(tiny_bundle: Path, photos: Path) -> None:
    """Python's own flush would fail once more, and end with 120."""
    command = f"{sys.executable} -m runtime.cli.segment {photos} --bundle {tiny_bundle} --engine onnxruntime --quiet > /dev/full"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    assert run.returncode == 2 and "No space left" in run.stderr and "Exception ignored" not in run.stderr


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
