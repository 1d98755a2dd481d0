"""agvas-bench says what was timed, against what, and with which masks; its statistics, and what of the machine it can tell."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench_results import samples
from conftest import picture
from PIL import Image

from agvas import AGVAS, load, save
from agvas.config import nano
from benchmarks import bench, bench_measure
from benchmarks.bench_candidates import Candidate, ModuleClock, encoders_compute_in, open_candidate
from benchmarks.bench_child import _stream
from benchmarks.bench_measure import FULL, QUICK, Request, is_full, reference_in_words, torch_device
from benchmarks.bench_power import PowerSampler, read_tegrastats_line
from benchmarks.bench_statistics import deadline, paired_ratio, percentiles
from benchmarks.midsize import random_checkpoint
from benchmarks.work import stage_work
from engines import EngineFailed, EngineOptions
from runtime.bundle import GOLDEN, SEAL, Bundle, seal_of, sha256_of
from runtime.contract import STAGES
from runtime.errors import RequestError
from runtime.stream import Streamed


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


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
    assert {run["lmm"] for run in told["runs"].values()} == {"float"}


def test_a_run_on_the_cpu_has_its_machines_ceilings_and_what_others_took_of_it(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that each stage can be set against them by a later command, wherever that runs."""
    told = json.loads(measured.read_text())
    assert told["ceilings"]["flops"]["fp32"] > 1e8 and told["ceilings"]["bandwidth"] > 1e8 and "1 threads" in told["ceilings"]["source"]
    if "others" in told["other_work"]:
        assert 0 <= told["other_work"]["others"] <= 1 and told["other_work"]["seconds"] > 0
    told["environment"]["processor"] = "a processor of another machine"
    measured.with_name("elsewhere.json").write_text(json.dumps(told))
    assert bench.main(["--roofline", "--json", str(measured.with_name("elsewhere.json"))]) == 0
    planned = last_line(capsys)
    assert planned["measured"]["device"] == "the run's machine" and planned["measured"]["stages"].keys() == set(STAGES)
    flops = planned["stages"]["pixel_encoder"]["flops"]
    share = flops / told["runs"]["ours"]["stages_ms"]["pixel_encoder"] * 1e3 / told["ceilings"]["flops"]["fp32"]
    assert planned["measured"]["stages"]["pixel_encoder"]["share"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("stated", "asked", "computed"),
    [
        ("fp32", "graph", "fp32"),
        ("fp32", "int8", "fp32"),
        ("fp16", "graph", "fp16"),
        ("bf16", "int8", "bf16"),
        ("fp16", "bf16", "bf16"),
        ("fp32", "bf16+int8", "bf16"),
        ("int8", "bf16+int8", "int8"),
        ("int8", "graph", "int8"),
    ],
)
def test_what_encoders_multiply_in_is_told(stated: str, asked: str, computed: str) -> None:
    """A run is set against the rate of products that its encoders made, whatever the language model's were."""
    assert encoders_compute_in(stated, EngineOptions(inference_precision=asked)) == computed


def test_ceilings_that_cannot_be_measured_lose_no_result(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    def fails(*_: Any) -> dict[str, Any]:
        raise EngineFailed("no memory")

    monkeypatch.setattr(bench_measure, "ceilings", fails)
    assert bench_measure._ceilings(Request(tiny_bundle, "auto", "cpu", None, 1, (), None, None, None, QUICK)) == {"reason": "no memory"}


@pytest.mark.parametrize("name", ["torch", "reference", "plain-onnx", "ours"])
def test_a_bundle_with_a_candidates_name_is_not_taken_for_that(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    copied = tmp_path / "line" / name
    shutil.copytree(tiny_bundle, copied)
    request = Request(tiny_bundle, "openvino", "cpu", None, 1, ("torch", str(copied), "torch", f"{copied}/."), None, None, None, QUICK)
    names = [candidate.name for candidate in bench_measure._candidates(request, tmp_path, lambda *_: None)]
    assert names[:2] == ["ours", "torch"] and len(names) == len(set(names)) == 4
    assert not {"reference", "plain-onnx"} & set(names)


def test_a_stage_that_the_first_picture_did_not_need_is_told_all_the_same() -> None:
    zeros = dict.fromkeys(("checksum", "peak_rss_bytes", "disk_ms", "decode_ms"), 0)
    sample = {"ms": 5.0, "stages": {"spam": 1.0}, "device_stages": {}, **zeros}
    told = dict.fromkeys(("bytes", "load_ms", "precision", "lmm"), 1)
    child: Any = SimpleNamespace(candidate=Candidate("ours", "bundle", ""), pid=1, first_result_ms=1.0, told=told)
    taken = [sample, sample | {"stages": {"spam": 1.0, "mask_decoder": 2.0}}]
    entry = bench_measure._run(child, taken, 2, None, {}, PowerSampler("cpu"), None)
    assert entry["samples"]["stages_ms"] == {"spam": [1.0, 1.0], "mask_decoder": [0.0, 2.0]}


def test_a_frame_that_fails_is_no_throughput(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    failed = Streamed(0, None, EngineFailed("out of memory"))
    opened: Any = SimpleNamespace(stream=lambda frames: (failed for _ in frames))
    with pytest.raises(EngineFailed, match="out of memory"):
        _stream(opened, {"stream": [str(tmp_path / "a.png")], "count": 3})


def test_the_full_setting_may_be_exceeded_and_wants_pictures_that_differ() -> None:
    assert is_full(FULL, 64) and is_full(replace(FULL, queries=2048, seconds=120.0), 100)
    assert not is_full(FULL, 12) and not is_full(QUICK, 64)
    for less in ({"queries": 1023}, {"seconds": 59.0}, {"warmups": 49}):
        assert not is_full(replace(FULL, **less), 64), less  # type: ignore[arg-type]


def test_a_picture_that_is_there_twice_counts_once(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")
    arguments = ["--bundle", str(tiny_bundle), "--engine", "onnxruntime", "--threads", "1", "--images", str(tmp_path)]
    assert bench.main([*arguments, "--quick", "--queries", "2"]) == 0
    assert last_line(capsys)["pictures"]["count"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a PyTorch without CUDA")
def test_beside_a_pytorch_without_cuda_the_reference_is_the_cpus_and_torch_is_refused(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    request = Request(tiny_bundle, "onnxruntime", "cuda:0", None, 1, (), str(tiny_checkpoint), None, None, QUICK)
    assert torch_device(request) == "cpu"
    assert "on the cpu: the PyTorch here does not compute on cuda:0" in reference_in_words("nano", Bundle(tiny_bundle), "cpu", "cuda:0")
    with pytest.raises(RequestError, match="--against torch-bf16: expected a PyTorch that computes on cuda:0"):
        torch_device(replace(request, against=("torch-bf16",)))
    with pytest.raises(RequestError, match="torch: expected a PyTorch that computes on cuda:0"):
        open_candidate(Candidate("torch", "torch", str(tiny_checkpoint), device="cuda:0"))


def test_on_a_gpu_the_parts_are_timed_by_its_events_and_nothing_waits_within_a_picture(
    tiny_model: AGVAS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting at each part would slow the whole, which is timed as well: ours waits for nothing in between."""
    waits = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            self.at = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waits.append(device))
    model = copy.deepcopy(tiny_model)
    clock = ModuleClock(model, "cuda:0")
    for _ in range(2):
        clock.clear()
        started = time.perf_counter()
        model.segment(picture())
        whole = (time.perf_counter() - started) * 1e3
        assert waits == [] and set(clock.spent()) == set(STAGES) and waits.pop() == ("cuda:0",)
        assert 0 < sum(clock.spent().values()) < whole
        waits.clear()


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
    golden = Bundle(tiny_bundle).golden()
    assert {tuple(size) for size in told["pictures"]["sizes"]} == {golden[f"{index}.image"].shape[:2] for index in range(2)}
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
        (["--bundle", "BUNDLE", "--seconds", "nan"], "--seconds"),
        (["--bundle", "BUNDLE", "--seconds", "inf"], "--seconds"),
        (["--bundle", "BUNDLE", "--fps", "inf"], "--fps"),
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


# Statistics


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


@pytest.mark.parametrize(
    ("visible", "device", "asked"),
    [
        (None, "cuda:1", ("index", 1)),
        ("3,1", "cuda:0", ("index", 3)),
        ("3,GPU-12ab", "cuda:1", ("uuid", "GPU-12ab")),
        ("3", "cuda:1", None),
        ("MIG-4", "cuda:0", None),
    ],
)
def test_the_gpu_that_is_sampled_is_the_one_that_cuda_shows(
    visible: str | None, device: str, asked: tuple[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any]] = []

    class NVMLError(Exception):
        pass

    def refused(handle: Any) -> None:
        raise NVMLError("not here")

    names = ("nvmlInit", "nvmlShutdown", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo", "nvmlDeviceGetComputeRunningProcesses")
    double = SimpleNamespace(NVMLError=NVMLError, NVML_CLOCK_SM=1, **dict.fromkeys(names, lambda *_: 5000))
    double.nvmlDeviceGetComputeRunningProcesses = refused
    double.nvmlDeviceGetHandleByIndex = lambda index: seen.append(("index", index))
    double.nvmlDeviceGetHandleByUUID = lambda uuid: seen.append(("uuid", uuid))
    monkeypatch.setitem(sys.modules, "pynvml", double)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with PowerSampler(device) as sampler:
        time.sleep(0.01)
    assert seen == ([asked] if asked else [])
    told = sampler.summary()
    assert told["power_watts"] == (5.0 if asked else None)
    assert asked or "which GPU" in told["reason"]


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
