"""Another package's detector, an OpenVINO model as anomalib 2 exports it: read, timed by agvas-bench, judged by agvas-eval.

The model is a small one of the same form, made here: how dark each of 8 x 8 places is. make_detectors.py needs anomalib: a person runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import accuracy, bench, make_detectors
from benchmarks.detectors import Detector
from runtime.errors import RequestError

openvino = pytest.importorskip("openvino")

SIDE = 8
SHAPE = (-1, 3, -1, -1)


def save(path: Path, shape: tuple[int, ...] = SHAPE, names: tuple[str, ...] = ("anomaly_map", "pred_mask", "pred_score")) -> Path:
    from openvino import opset15 as ops

    image = ops.parameter(shape, np.float32, name="input")
    grey = ops.reduce_mean(image, np.array([1]), keep_dims=True)
    dark = ops.subtract(np.float32(1), ops.adaptive_avg_pool(grey, np.array([SIDE, SIDE])))
    mask = ops.convert(ops.greater(dark, np.float32(0.5)), "boolean")
    results = [dark, mask, ops.reduce_max(dark, np.array([1, 2, 3]), keep_dims=False)]
    for result, name in zip(results, names, strict=True):
        result.output(0).get_tensor().set_names({name})
    openvino.save_model(openvino.Model(results, [image], "dark"), str(path), compress_to_fp16=False)
    return path


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    return save(tmp_path / "dark.xml")


def bright_with_a_dark_quarter(height: int = 32, width: int = 48) -> np.ndarray:
    image = np.full((height, width, 3), 255, np.uint8)
    image[: height // 2, : width // 2] = 0
    return image


def test_map_mask_and_score_come_at_the_pictures_size(detector: Path) -> None:
    image = bright_with_a_dark_quarter()
    found = Detector(detector, threads=1)(image)
    truth = image[..., 0] == 0
    assert found.score == pytest.approx(1.0) and found.mask().dtype == bool
    np.testing.assert_array_equal(found.mask(), truth)
    anomaly_map = found.anomaly_map()
    assert anomaly_map.dtype == np.float32 and anomaly_map.shape == image.shape[:2]
    assert anomaly_map[truth].mean() > 0.9 and anomaly_map[~truth].mean() < 0.1, "resized between places, nothing more"


def test_the_channels_are_red_green_blue_in_0_to_1(tmp_path: Path) -> None:
    from openvino import opset15 as ops

    image = ops.parameter(SHAPE, np.float32, name="input")
    red = ops.gather(image, np.array([0]), np.array(1))
    small = ops.adaptive_avg_pool(red, np.array([2, 2]))
    results = [small, ops.greater(small, np.float32(0.5)), ops.reduce_max(small, np.array([1, 2, 3]), keep_dims=False)]
    for result, name in zip(results, ("anomaly_map", "pred_mask", "pred_score"), strict=True):
        result.output(0).get_tensor().set_names({name})
    openvino.save_model(openvino.Model(results, [image], "red"), str(tmp_path / "red.xml"), compress_to_fp16=False)
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:2, :, 0], picture[2:, :, 2] = 102, 255
    np.testing.assert_allclose(Detector(tmp_path / "red.xml")(picture).small_map, [[0.4, 0.4], [0, 0]], atol=2e-3)


def test_a_model_of_a_fixed_size_gets_the_picture_resized(tmp_path: Path) -> None:
    fixed = Detector(save(tmp_path / "fixed.xml", (1, 3, 16, 16)))
    image = bright_with_a_dark_quarter()
    np.testing.assert_array_equal(fixed(image).mask(), image[..., 0] == 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.xml", "none.xml: expected a detector's OpenVINO model"),
        (lambda folder: Path(__file__), "expected a detector's OpenVINO model, model.xml"),
        (lambda folder: save(folder / "old.xml", names=("output", "pred_mask", "pred_score")), "none called anomaly_map; export it"),
        (lambda folder: save(folder / "grey.xml", (-1, 1, -1, -1)), r"\[batch, 3, height, width\], got \[\?,1,\?,\?\]"),
        (lambda folder: _damaged(folder), "OpenVINO cannot read it"),
    ],
)  # fmt: skip
def test_what_is_no_detector_is_told_in_words(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Detector(make(tmp_path))


def _damaged(folder: Path) -> Path:
    path = save(folder / "damaged.xml")
    path.write_text(path.read_text()[:200])
    return path


def test_agvas_bench_times_it_and_judges_no_masks(
    tiny_bundle: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "1", "--quick", "--queries", "2"]
    assert bench.main([*arguments, "--against", str(detector), "--json", str(tmp_path / "run.json")]) == 0
    shown = capsys.readouterr().out
    assert "not judged" in next(line for line in shown.splitlines() if line.startswith("| dark |"))
    told: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
    run = told["runs"]["dark"]
    assert run["p50_ms"] > 0 and run["bytes"] > 0 and run["engine"] == "openvino" and set(run["stages_ms"]) == {"graph", "postprocess"}
    assert run["mask_iou_mean"] is None and run["flips"] is None and run["judged"] == 0
    assert told["mask_iou_mean"] > 0.99 and told["ratios"].keys() == {"dark/ours"}
    pytest.importorskip("matplotlib")
    from benchmarks.report import write_report

    assert "not judged" in write_report(told, tmp_path / "report").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "none.xml"], "none.xml: expected a detector's OpenVINO model"),
        (["--against", "DETECTOR", "--device", "cuda:0", "--engine", "onnxruntime"], "cuda"),
    ],
)
def test_agvas_bench_refuses_what_it_cannot_time(
    tiny_bundle: Path, detector: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    asked = [str(detector) if argument == "DETECTOR" else argument for argument in arguments]
    assert bench.main(["--bundle", str(tiny_bundle), "--engine", "onnxruntime", *asked, "--quick"]) == 2
    assert words in capsys.readouterr().err


def test_agvas_eval_judges_its_maps_and_masks(detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    image = bright_with_a_dark_quarter()
    Image.fromarray(image).save(data / "bad.png")
    Image.fromarray(image[..., 0] == 0).convert("L").save(data / "mask.png")
    Image.fromarray(np.full_like(image, 250)).save(data / "good.png")
    (data / "manifest.csv").write_text("image,mask,label\nbad.png,mask.png,1\ngood.png,,0\n")
    assert accuracy.main([str(data), "--detector", str(detector), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["mean"]["iou_anomalous"] == 1 and told["mean"]["empty_normal"] == 1 and told["mean"]["ap"] > 0.95
    assert told["judged"]["kind"] == "detector" and told["judged"]["name"] == "dark" and len(told["judged"]["weights_sha256"]) == 64
    assert told["settings"]["mode"] is None and told["judged"]["threshold"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--detector", "none.xml"], "none.xml: expected a detector's OpenVINO model"),
        (["--detector", "DETECTOR", "--threshold", "0.4"], "a detector's is fixed"),
        (["--detector", "DETECTOR", "--device", "cuda:0"], "a detector runs on the CPU"),
        (["--detector", "DETECTOR", "--engine", "openvino"], "only a bundle has engines"),
        (["--detector", "DETECTOR", "--mode", "describe-then-segment"], "a detector reads no words"),
    ],
)
def test_agvas_eval_refuses_what_a_detector_does_not_have(
    detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Image.fromarray(bright_with_a_dark_quarter()).save(tmp_path / "one.png")
    (tmp_path / "manifest.csv").write_text("image,mask,label\none.png,,0\n")
    asked = [str(detector) if argument == "DETECTOR" else argument for argument in arguments]
    assert accuracy.main([str(tmp_path), *asked]) == 2
    assert words in capsys.readouterr().err


def test_making_detectors_says_that_anomalib_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "anomalib", None)
    assert make_detectors.main(["--output", str(tmp_path / "made"), "--random"]) == 2
    assert "anomalib is not installed" in capsys.readouterr().err and not (tmp_path / "made").exists()
