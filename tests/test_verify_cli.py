"""agvas-verify through main(): what it compares and when it fails, on a real, tiny bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import EngineFailed, EngineUnavailable
from engines.onnxruntime import OnnxRuntimeEngine
from runtime import Segmenter
from runtime.bundle import Bundle
from runtime.cli import verify
from runtime.parity import GATES, Gates

PARITY_KEYS = {"images", "mask_iou_mean", "mask_iou_min", "flips", "map_max_abs", "anchor_cosine_min"}

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


def test_auto_says_beforehand_that_it_may_take_a_while(run_verify: Any, tiny_bundle: Path) -> None:
    told = f"agvas-verify: opening {tiny_bundle}; on a new machine, engine auto first measures the engines that are installed"
    assert told in run_verify(engine="auto")[2].splitlines()
    assert told not in run_verify("--quiet", engine="auto")[2] and told not in run_verify(engine="onnxruntime")[2]


def test_masks_and_subfolders_are_none_of_ones_own_pictures(run_verify: Any, photos: Path, tmp_path: Path) -> None:
    for name in ("parts/one.png", "parts/one_mask.png", "parts/masks/one.png", "parts/two.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes((photos / "one.png").read_bytes())
    code, lines, errors = run_verify("--json", "--images", tmp_path / "parts")
    assert code == 0 and json.loads(lines[-1])["images_parity"]["images"] == 2
    assert errors.startswith(f"agvas-verify: warning: {tmp_path / 'parts'}: left out 1 that lie beside the pictures they are of")


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


def test_a_remembered_choice_that_cannot_compute_now_is_forgotten(
    run_verify: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.selection.CPU_CANDIDATES", (("onnxruntime", "graph"),))
    assert run_verify("--json", engine="auto")[0] == 0
    (remembered,) = (tmp_path / "cache").rglob("*.json")

    def failing(self: OnnxRuntimeEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise EngineFailed("no memory")

    monkeypatch.setattr(OnnxRuntimeEngine, "run", failing)
    code, _, errors = run_verify("--json", engine="auto")
    assert code == 2 and "no memory" in errors
    assert not remembered.exists()


def test_what_cannot_be_verified_is_exit_code_2(run_verify: Any, tmp_path: Path, photos: Path) -> None:
    for arguments in ({"bundle": tmp_path / "nothing"}, {"engine": "opnvino"}, {"engine": "tensorrt"}):
        code, lines, errors = run_verify("--json", **arguments)
        assert code == 2
        assert json.loads(lines[-1])["error"] in errors
    assert run_verify("--images", tmp_path / "nowhere")[0] == 2
