"""Numbers beyond fp16 are found though onnxruntime's CPU provider hides them by computing in fp32."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from agvas import load, save
from engines import EngineOptions, StageSpec, TensorSpec, open_engine
from export.bundle import export_bundle
from export.half_range import LARGEST, HalfRange, peak_of
from export.progress import Progress
from export.settings import ExportSettings
from runtime.bundle import Bundle, Manifest

SPEC = StageSpec("spam", (TensorSpec("x", "float32", (4,)), TensorSpec("past", "float32", ("K",))), (TensorSpec("y", "float32", (4,)),))


def graph(path: Path, up: float) -> Path:
    """y = (x * up) / up by way of fp16, beside a past that may be empty and a weight that no input reaches."""
    numbers = {"up": up, "down": 1 / up}
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["past"], ["half_past"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["up", "up"], ["weight"]),
        helper.make_node("Mul", ["half", "up"], ["risen"]),
        helper.make_node("Mul", ["risen", "down"], ["fallen"]),
        helper.make_node("Concat", ["half_past", "fallen"], ["joined"], axis=0),
        helper.make_node("Slice", ["joined", "from", "to"], ["last"]),
        helper.make_node("Cast", ["last"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = [numpy_helper.from_array(np.array([number], np.float16), name) for name, number in numbers.items()]
    constants += [numpy_helper.from_array(np.array([number], np.int64), name) for name, number in (("from", -4), ("to", 2**31))]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]), helper.make_tensor_value_info("past", TensorProto.FLOAT, ["K"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


FEEDS = {"x": np.array([1, -200, 3, 0], np.float32), "past": np.zeros(0, np.float32)}


def test_the_cpu_hides_what_is_found(tmp_path: Path) -> None:
    path = graph(tmp_path / "spam.onnx", 1024)
    hidden = open_engine(path, SPEC, "onnxruntime", EngineOptions()).run(FEEDS)["y"]
    np.testing.assert_allclose(hidden, FEEDS["x"])  # as if there were no end
    peak = peak_of(path, SPEC, [FEEDS], "onnxruntime")
    assert peak is not None and peak.tensor == "risen" and not peak.fits
    assert peak.magnitude == 200 * 1024 or math.isinf(peak.magnitude)
    assert [file.name for file in tmp_path.iterdir()] == ["spam.onnx"]


@pytest.mark.parametrize("piece_bytes", [None, 1])
def test_the_largest_of_all_runs_is_told_whole_or_in_pieces(tmp_path: Path, piece_bytes: int | None) -> None:
    path = graph(tmp_path / "spam.onnx", 16)
    small = FEEDS | {"x": FEEDS["x"] / 100}
    peak = peak_of(path, SPEC, [small, FEEDS, small], "onnxruntime", piece_bytes)
    assert peak is not None and (peak.magnitude, peak.tensor) == (3200.0, "risen") and peak.fits
    assert [file.name for file in tmp_path.iterdir()] == ["spam.onnx"]


def test_a_number_that_is_none_is_the_largest(tmp_path: Path) -> None:
    peak = peak_of(graph(tmp_path / "spam.onnx", 16), SPEC, [FEEDS | {"x": np.array([1, math.inf, 2, 3], np.float32)}], "onnxruntime")
    assert peak is not None and not math.isfinite(peak.magnitude) and not peak.fits


def test_a_graph_in_fp32_has_no_peak(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    ranges = HalfRange(bundle, "onnxruntime")
    ranges.note({"spam": {}})
    ranges.measure()
    assert not ranges.watches and not ranges.peaks and not ranges.failures()


@pytest.mark.parametrize("streamed", [False, True])
def test_an_export_whose_numbers_leave_fp16_says_which_and_where(tiny_checkpoint: Path, tmp_path: Path, streamed: bool) -> None:
    model = load(str(tiny_checkpoint))
    mlp = model.mask_decoder.transformer.layers[0].mlp
    with torch.no_grad():  # the same function: ReLU stands between
        for parameter, scale in ((mlp.lin1.weight, 2.0**16), (mlp.lin1.bias, 2.0**16), (mlp.lin2.weight, 2.0**-16)):
            parameter.mul_(scale)
    save(model, tmp_path / "risen")
    reports = {}
    for name, checkpoint in (("risen", tmp_path / "risen"), ("sound", tiny_checkpoint)):
        settings = ExportSettings(str(checkpoint), "fp16", tmp_path / f"bundle-{name}", strict=False, pictures=1, streamed=streamed)
        bundle, report = export_bundle(settings, Progress(quiet=True))
        assert report is not None
        reports[name] = report
        told = json.loads((bundle.folder / "parity.json").read_text())
        assert told["fp16_range"].keys() == Manifest.from_json((bundle.folder / "manifest.json").read_text()).precision.keys()
        assert told["passed"] is not bool(told["failures"])
    (failure,) = [line for line in reports["risen"].failures if line.startswith("fp16: ")]
    assert "transformer.layers.0.mlp" in failure and "of mask_decoder" in failure and "--precision bf16 or fp32" in failure
    assert not [line for line in reports["sound"].failures if line.startswith("fp16: ")]
    assert 0 < reports["sound"].fp16_range["mask_decoder"]["magnitude"] < LARGEST / 100


def test_where_memory_is_short_it_is_said_that_nobody_looked(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.bundle.available_memory", lambda: 3 << 30)
    settings = ExportSettings(str(tiny_checkpoint), "fp16", tmp_path / "bundle", strict=False, pictures=1, streamed=True, force=True)
    _, report = export_bundle(settings, Progress())
    assert report is not None and not report.fp16_range
    assert "not looked for fp16's end: it takes 13 GiB of memory, and 3.0 are available" in capsys.readouterr().err
