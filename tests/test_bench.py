"""agvas-bench says what was timed, against what, and with which masks; compares two runs by their samples; makes reports of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from agvas import AGVAS, load, save
from agvas.config import nano, ov_7b
from benchmarks import bench
from benchmarks.bench_power import PowerSampler, read_tegrastats_line
from benchmarks.bench_statistics import compare, deadline, paired_ratio, percentiles, slower
from benchmarks.midsize import random_checkpoint
from benchmarks.roofline import DEVICES, Device, floor_ms, roofline
from benchmarks.roofline import table as roofline_table
from benchmarks.work import StageWork, stage_work
from runtime.bundle import GOLDEN, SEAL, seal_of, sha256_of
from runtime.contract import STAGES


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def samples(seed: int, median: float, count: int = 400) -> list[float]:
    """Skewed, with drifts, as latencies are."""
    rng = np.random.default_rng(seed)
    drift = 1 + 0.05 * np.sin(np.arange(count) / 25)
    return list(median * drift * (1 + rng.gamma(1.0, 0.03, count)))


def run_of(ms: list[float], stages: dict[str, list[float]] | None = None) -> dict[str, Any]:
    return {"samples": {"ms": ms, "stages_ms": stages or {}}}


def result_of(**runs: dict[str, Any]) -> dict[str, Any]:
    return {"runs": runs, "environment": {"processor": "one", "threads": 2}}


# Measured


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of the command on pictures of our own, with every kind of candidate that needs no second bundle."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "parts").mkdir()
    for index in range(3):
        Image.fromarray(picture(index, 40 + index, 60)).save(folder / "parts" / f"{index}.png")
    arguments = ["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "1", "--checkpoint", str(tiny_checkpoint)]
    arguments += ["--against", "torch", "--against", "torch-single-pass", "--against", "torch-bf16-single-pass"]
    arguments += ["--against", str(tiny_bundle)]
    arguments += ["--images", str(folder / "parts"), "--quick", "--queries", "4", "--fps", "1000000", "--json", str(folder / "run.json")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert bench.main(arguments) == 0
    (folder / "stdout").write_text(printed.getvalue())
    return folder / "run.json"


def test_the_last_line_of_stdout_is_the_result_without_its_samples(measured: Path) -> None:
    lines = (measured.parent / "stdout").read_text().splitlines()
    told, written = json.loads(lines[-1]), json.loads(measured.read_text())
    assert lines[0].startswith("| candidate |") and told["ratios"] == written["ratios"]
    assert not any("samples" in run for run in told["runs"].values()) and all("samples" in run for run in written["runs"].values())


def test_every_candidate_has_times_memory_and_masks_of_the_same_run(measured: Path) -> None:
    told = json.loads(measured.read_text())
    assert list(told["runs"]) == ["ours", "torch", "torch-single-pass", "torch-bf16-single-pass", "tiny-fp32"]
    for name, run in told["runs"].items():
        assert 0 < run["p50_ms"] <= run["p90_ms"] <= run["p99_ms"] <= run["max_ms"], name
        assert len(run["samples"]["ms"]) == run["queries"] == 4
        assert run["peak_rss_bytes"] > 20e6 and run["bytes"] > 0 and run["load_ms"] > 0
        assert run["first_result_ms"] > run["load_ms"]
        assert run["judged"] == 3 and run["flips"] == 0 and run["unsteady"] == 0
        assert run["mask_iou_mean"] > (0.9 if "bf16" in name else 0.99)
        assert run["device_memory_bytes"] is None and "CPU" in run["device_memory_reason"]
        assert run["deadline"]["missed_alone"] == 1  # a microsecond for each frame
    assert set(STAGES) <= set(told["runs"]["ours"]["stages_ms"])
    assert set(STAGES) == set(told["runs"]["torch"]["stages_ms"]), "the reference's parts are told, too"
    assert told["runs"]["ours"]["stream_fps"] > 0 and told["runs"]["torch"]["stream_fps"] is None
    assert told["runs"]["torch"]["peak_rss_bytes"] > told["runs"]["ours"]["peak_rss_bytes"], "each process has its own memory"
    assert set(told["ratios"]) == {"torch/ours", "torch-single-pass/ours", "torch-bf16-single-pass/ours", "tiny-fp32/ours"}
    assert told["mask_iou_mean"] == told["runs"]["ours"]["mask_iou_mean"]
    assert told["pictures"] == {"source": "parts", "count": 3, "sizes": [[40, 60], [41, 60], [42, 60]]}
    assert not told["full"] and told["environment"]["threads"] == 1 and len(told["environment"]["bundle"]) == 64


def test_a_checkpoint_may_be_named_by_a_relative_path(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    arguments = ["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "1", "--checkpoint", tiny_checkpoint.name]
    assert bench.main([*arguments, "--against", "torch", "--quick", "--queries", "1"]) == 0
    assert last_line(capsys)["reference"] == f"torch fp32 with generate, {tiny_checkpoint.name}"


def test_pictures_may_be_named_by_a_relative_path(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "parts").mkdir()
    Image.fromarray(picture()).save(tmp_path / "parts" / "one.png")
    monkeypatch.chdir(tmp_path)
    arguments = ["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "1", "--images", "parts"]
    assert bench.main([*arguments, "--quick", "--queries", "1"]) == 0
    assert last_line(capsys)["pictures"]["source"] == "parts"


def test_another_checkpoint_than_the_bundles_is_refused_before_measuring(
    tiny_bundle: Path, tiny_model: AGVAS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = copy.deepcopy(tiny_model)
    with torch.no_grad():
        tuned.mask_decoder.queries.mul_(-3)
    save(tuned, tmp_path / "tuned")
    arguments = ["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "1", "--quick", "--queries", "1"]
    assert bench.main([*arguments, "--checkpoint", str(tmp_path / "tuned")]) == 2
    assert "--checkpoint tuned: expected the one that" in capsys.readouterr().err


def test_a_bundle_without_golden_pictures_is_measured_by_the_checkpoint_that_is_given(
    copy_of_bundle: Callable[[], Path], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As --parity none leaves it."""
    bundle = copy_of_bundle()
    np.savez_compressed(bundle / GOLDEN)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][GOLDEN] = {"bytes": (bundle / GOLDEN).stat().st_size, "sha256": sha256_of(bundle / GOLDEN)}
    manifest["parity"] = {"passed": False, "compared": False}
    (bundle / "manifest.json").write_text(json.dumps(manifest | {SEAL: seal_of(manifest)}))
    arguments = ["--bundle", str(bundle), "--engine", "onnxruntime", "--threads", "1", "--checkpoint", str(tiny_checkpoint)]
    assert bench.main([*arguments, "--quick", "--queries", "1", "--pictures", "1"]) == 0
    assert last_line(capsys)["mask_iou_mean"] > 0.99
    alone = [*arguments[:-2], "--quick", "--queries", "1", "--pictures", "1"]
    assert bench.main(alone) == 2 and "has no golden pictures (--parity none)" in capsys.readouterr().err
    Image.fromarray(picture()).save(bundle.parent / "one.png")
    assert bench.main([*alone, "--images", str(bundle.parent / "one.png")]) == 0
    told = last_line(capsys)
    assert told["mask_iou_mean"] is None and told["runs"]["ours"]["judged"] == 0 and "without a comparison" in told["reference"]


def test_the_stages_and_the_gap_make_the_whole(measured: Path) -> None:
    run = json.loads(measured.read_text())["runs"]["ours"]
    whole = np.array(run["samples"]["ms"])
    inside = np.sum(list(run["samples"]["stages_ms"].values()), axis=0)
    assert (inside <= whole).all()
    assert (inside / whole).max() > 0.5  # a busy machine may take the processor away between two stages, but not in every query
    assert run["gap_ms"] >= 0


def test_a_report_holds_its_pictures_and_labels_the_papers_figure(measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.report import write_report

    page = write_report(json.loads(measured.read_text()), tmp_path / "report").read_text()
    assert page.count("data:image/png;base64,") == 3 and not re.search(r'(src|href)="(?!data:)', page), "one page, nothing beside it"
    assert "paper, its model on its hardware: 1.0 s, 20.8 GB" in page
    assert "no figures to publish" in page
    table = (tmp_path / "report" / "report.md").read_text()
    assert "| torch-single-pass |" in table and "mask IoU" in table
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"stages.png", "latency.png", "precision.png"}
    assert json.loads((tmp_path / "report" / "result.json").read_text())["runs"].keys() == json.loads(measured.read_text())["runs"].keys()


def test_without_a_reference_the_golden_masks_judge(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "1", "--quick", "--queries", "2"]) == 0
    told = last_line(capsys)
    assert told["reference"] == "the bundle's golden traces" and told["pictures"]["source"] == "golden"
    assert told["pictures"]["count"] == told["runs"]["ours"]["queries"] == 2, "no more than were asked for"
    assert told["mask_iou_mean"] > 0.99 and told["ratios"] == {}
    assert "samples" not in told["runs"]["ours"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--bundle"),
        (["--bundle", "BUNDLE", "--engine", "onxruntime"], "onnxruntime"),
        (["--bundle", "BUNDLE", "--against", "torhc"], "did you mean"),
        (["--bundle", "BUNDLE", "--against", "torch"], "--checkpoint"),
        (["--bundle", "BUNDLE", "--queries", "0"], "--queries"),
        (["--bundle", "BUNDLE", "--json", "no/such/folder/run.json"], "existing folder"),
        (["--roofline", "--model", "ov_8b"], "ov_7b"),
        (["--compare", "no.json", "none.json"], "no.json"),
    ],
)
def test_a_wrong_request_ends_with_2_and_says_what_to_do(
    arguments: list[str], words: str, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]) == 2
    assert words in capsys.readouterr().err


# Compared


def test_compare_ends_with_1_only_where_a_run_or_stage_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {"pixel_encoder": samples(1, 80.0), "spam": samples(2, 20.0)}
    worse = {"pixel_encoder": samples(3, 80.0), "spam": samples(4, 26.0)}
    files = {}
    for name, stages, whole in (("a", before, 100.0), ("same", before, 100.0), ("stage", worse, 100.5), ("all", before, 115.0)):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(result_of(ours=run_of(samples(len(name), whole), stages))))
    assert bench.main(["--compare", str(files["a"]), str(files["same"])]) == 0
    capsys.readouterr()
    assert bench.main(["--compare", str(files["a"]), str(files["stage"])]) == 1
    assert last_line(capsys)["slower"] == ["ours/spam"]
    assert bench.main(["--compare", str(files["a"]), str(files["all"])]) == 1
    assert last_line(capsys)["slower"] == ["ours"]
    assert bench.main(["--compare", str(files["a"]), str(files["all"]), "--threshold", "1.3"]) == 0


def test_noise_alone_is_not_slower_and_a_few_spikes_are_not_either() -> None:
    found = [slower(samples(seed, 50.0, 200), samples(seed + 100, 50.0, 200), 1.0)["slower"] for seed in range(40)]
    assert sum(found) <= 3  # at 99 %, with the threshold at nothing
    spiked = samples(7, 50.0)
    spiked[::20] = [500.0] * len(spiked[::20])
    assert not slower(samples(8, 50.0), spiked, 1.05)["slower"]


def test_a_loss_beyond_the_threshold_is_found_in_noise() -> None:
    assert all(slower(samples(seed, 50.0), samples(seed + 100, 55.0), 1.05)["slower"] for seed in range(20))


def test_a_stage_that_hardly_counts_fails_nothing() -> None:
    a = result_of(ours=run_of(samples(1, 100.0), {"spam": samples(2, 0.1)}))
    b = result_of(ours=run_of(samples(3, 100.0), {"spam": samples(4, 0.2)}))
    comparison = compare(a, b, 1.05)
    assert comparison["runs"]["ours"]["stages"]["spam"]["ratio"] > 1.5
    assert comparison["slower"] == []


def test_runs_of_other_machines_are_told_apart_and_strangers_refused() -> None:
    a = result_of(ours=run_of(samples(1, 100.0)))
    b = result_of(ours=run_of(samples(2, 100.0))) | {"environment": {"processor": "another", "threads": 2}}
    assert compare(a, b, 1.05)["other_machine"] == ["processor"]
    with pytest.raises(ValueError, match="in common"):
        compare(a, result_of(torch=run_of(samples(1, 100.0))), 1.05)
    with pytest.raises(ValueError, match="raw samples"):
        compare(a, result_of(ours={}), 1.05)


def test_percentiles_and_ratios_of_pairs() -> None:
    assert percentiles(range(1, 102)) == {"p50_ms": 51.0, "p90_ms": 91.0, "p99_ms": 100.0, "max_ms": 101.0, "mean_ms": 51.0}
    ours = samples(1, 40.0)
    told = paired_ratio([2.5 * value for value in ours], ours)
    assert told["median"] == told["low"] == told["high"] == told["p10"] == told["p90"] == 2.5
    # A machine that becomes three times slower halfway leaves the ratio of pairs as it is.
    slow = [value * (1 if index < 200 else 3) for index, value in enumerate(ours)]
    assert paired_ratio([2 * value for value in slow], slow)["median"] == 2


def test_late_frames_queue_behind_a_slow_one() -> None:
    told = deadline([50.0, 250.0, 50.0, 50.0, 50.0, 50.0], fps=10)
    assert told["missed_alone"] == pytest.approx(1 / 6)  # 250 ms of 100
    # It ends at 350 ms; the next arrive at 200 and 300 and end at 400 and 450, the one of 400 in time at 500.
    assert told["missed_in_queue"] == pytest.approx(3 / 6)


# Power


def test_power_and_clock_are_read_from_a_jetsons_line() -> None:
    line = (
        "11-23-2026 12:00:00 RAM 2448/7620MB (lfb 4x4MB) SWAP 0/3810MB CPU [9%@1510,0%@1510] EMC_FREQ 0%@2133 GR3D_FREQ 61%@[612] "
        "VDD_IN 7112mW/7112mW VDD_CPU_GPU_CV 1532mW/1532mW VDD_SOC 2101mW/2101mW"
    )
    assert read_tegrastats_line(line) == {"power_watts": 7.112, "clock_mhz": 612.0}
    assert read_tegrastats_line("VDD_GPU_SOC 2000mW/2000mW VDD_CPU_CV 500mW/500mW") == {"power_watts": 2.5}
    assert read_tegrastats_line("RAM 1/2MB") == {}


def test_what_the_platform_does_not_tell_is_none_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with PowerSampler("cpu") as sampler:
        pass
    told = sampler.summary()
    assert told["power_watts"] is None and told["clock_mhz"] is None and told["reason"]


# Planned


def test_a_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    device = Device("a", {"bf16": 1e12, "int4": 1e12}, 1e9, "made up")
    assert floor_ms(StageWork(flops=10**12, parameters=1000, passed=0), device, "bf16") == pytest.approx(1000)
    assert floor_ms(StageWork(flops=1000, parameters=500_000, passed=0), device, "bf16") == pytest.approx(1)
    assert floor_ms(StageWork(flops=1000, parameters=500_000, passed=250_000), device, "bf16") == pytest.approx(2)
    assert floor_ms(StageWork(flops=1000, parameters=500_000, passed=0), device, "int4") < 0.3  # type: ignore[operator]
    assert floor_ms(StageWork(1, 1, 1), device, "fp8") is None


def test_the_devices_floors_for_the_papers_model_are_those_known() -> None:
    """About 27 TFLOP: derived by hand for H100, RTX 4000 Ada, AGX Orin and Orin NX in 16 bit (34, 255, 643, 1821 ms with all of 32.6)."""
    here = Device("this machine", {"fp32": 1e11}, 1e10, "made up")
    told = roofline(ov_7b(), here, {"stages_ms": {"pixel_encoder": 1e6}, "p50_ms": 2e6, "precision": "fp32"})
    floors = {name: device["floors"].get("bf16", {}).get("total_ms") for name, device in told["devices"].items()}
    assert floors["H100 SXM"] == pytest.approx(27, rel=0.05)
    assert floors["RTX 4000 Ada"] == pytest.approx(252, rel=0.05)
    assert floors["Jetson AGX Orin 64GB"] == pytest.approx(632, rel=0.05)
    assert floors["Jetson Orin NX 16GB"] == pytest.approx(1790, rel=0.05)
    assert {device.name for device in DEVICES} < told["devices"].keys() and all(device.source for device in DEVICES)
    assert told["measured"]["stages"]["pixel_encoder"]["times"] == pytest.approx(1e6 / (5.67e12 / 1e11 * 1e3), rel=0.02)
    text = roofline_table(told)
    assert "RTX A2000" in text and "datasheet" in text and "| total |" in text


# The random checkpoint


def test_a_random_checkpoint_says_the_fixed_answer_so_that_one_pass_is_verified() -> None:
    import dataclasses

    small = nano()
    config = dataclasses.replace(small, language=dataclasses.replace(small.language, width=320, layers=3))
    model = random_checkpoint(config, seed=5)
    result = model.segment(picture(0, 60, 80))
    assert result.text == config.prompts.answer and result.anchor_groups == 1 and not result.truncated


def test_midsize_is_about_ten_times_nano() -> None:
    from benchmarks.midsize import midsize

    def weights(config: Any) -> float:
        return sum(stage.parameters for stage in stage_work(config).values())

    assert 8 < weights(midsize()) / weights(load("nano").config) < 13
