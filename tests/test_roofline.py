"""agvas-bench --roofline: floors of stages by device, and how far a run is from those of the device that it ran on, no other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_results import whole_result, whole_run

from agvas.config import nano, ov_7b
from benchmarks import bench, full_size_gpu, roofline
from benchmarks.ceilings import ceilings
from benchmarks.devices import DEVICES, Device, device_of
from benchmarks.environment import processor
from benchmarks.roofline import against_floor, floor_ms, machine_of, measured_table, table
from benchmarks.work import StageWork, stage_work
from runtime.errors import RequestError

CEILINGS = {"flops": {"fp32": 1e11, "bf16": 2e11}, "bandwidth": 1e10, "source": "made up"}
HERE = Device("this machine", {"fp32": 1e11, "bf16": 2e11}, 1e10, "made up")
H100 = device_of("NVIDIA H100 80GB HBM3")
RESULTS = Path(bench.__file__).parent / "results"


def run_of(**changes: Any) -> dict[str, Any]:
    stages = {"pixel_encoder": 1e6, "semantic_encoder": 1e6, "spam": 1e6, "language": 1e6, "mask_decoder": 1e6, "preprocess": 5.0}
    return {"stages_ms": stages, "p50_ms": 6e6, "precision": "fp32", "lmm": "float"} | changes


def test_a_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    device = Device("a", {"bf16": 1e12, "int4": 1e12}, 1e9, "made up")
    assert floor_ms(StageWork(flops=10**12, parameters=1000, passed=0), device, "bf16") == pytest.approx(1000)
    assert floor_ms(StageWork(flops=1000, parameters=500_000, passed=0), device, "bf16") == pytest.approx(1)
    assert floor_ms(StageWork(flops=1000, parameters=500_000, passed=250_000), device, "bf16") == pytest.approx(2)
    assert floor_ms(StageWork(flops=1000, parameters=500_000, passed=0), device, "int4") < 0.3  # type: ignore[operator]
    assert floor_ms(StageWork(1, 1, 1), device, "fp8") is None


def test_the_devices_floors_for_the_papers_model_are_those_known() -> None:
    """About 27 TFLOP: derived by hand for H100, RTX 4000 Ada, AGX Orin and Orin NX in 16 bit (34, 255, 643, 1821 ms with all of 32.6)."""
    told = roofline.roofline(ov_7b(), HERE)
    floors = {name: device["floors"].get("bf16", {}).get("total_ms") for name, device in told["devices"].items()}
    assert floors["H100 SXM"] == pytest.approx(27, rel=0.05)
    assert floors["RTX 4000 Ada"] == pytest.approx(252, rel=0.05)
    assert floors["Jetson AGX Orin 64GB"] == pytest.approx(632, rel=0.05)
    assert floors["Jetson Orin NX 16GB"] == pytest.approx(1790, rel=0.05)
    assert {device.name for device in DEVICES} < told["devices"].keys() and all(device.source for device in DEVICES)
    text = roofline.table(told)
    assert "RTX A2000" in text and "datasheet" in text and "| total |" in text


# A run against its own machine


def test_each_stage_has_its_share_of_the_ceiling_and_its_distance_to_the_floor() -> None:
    told = against_floor(ov_7b(), HERE, run_of())
    row = told["stages"]["pixel_encoder"]
    assert row["gflops"] == pytest.approx(5666 / 1e3, rel=0.02) and row["share"] == pytest.approx(5.666e12 / 1e3 / 1e11, rel=0.02)
    assert row["times"] == pytest.approx(1e6 / (5.666e12 / 1e11 * 1e3), rel=0.02)
    assert "preprocess" not in told["stages"] and told["total"]["times"] == pytest.approx(6e6 / told["total"]["floor_ms"])
    assert f"| pixel_encoder | 1,000,000 | 6 | {row['share']:.0%} |" in measured_table(told)
    halved = against_floor(ov_7b(), HERE, run_of(precision="bf16"))
    assert halved["stages"]["pixel_encoder"]["share"] == pytest.approx(row["share"] / 2)


def test_what_has_no_known_peak_has_no_floor_and_is_not_set_against_another() -> None:
    told = against_floor(ov_7b(), HERE, run_of(precision="int8"))
    assert {row["floor_ms"] for row in told["stages"].values()} == {None} == {told["total"]["times"]}
    assert "No peak of this machine is known for pixel_encoder" in told["notes"][0] and "(int8)" in told["notes"][0]
    integers = against_floor(ov_7b(), HERE, run_of(lmm="gptq4"))
    assert [name for name, row in integers["stages"].items() if row["share"] is None] == ["language"]
    assert integers["total"]["floor_ms"] is None and "known for language" in integers["notes"][0]
    assert {row["floor_ms"] for row in against_floor(ov_7b(), H100, run_of())["stages"].values()} == {None}, "fp32 is not the tensor cores'"


def test_fp16_is_16_bit_on_a_gpu_and_fp32_on_a_processor_which_is_told() -> None:
    gpu = against_floor(ov_7b(), H100, run_of(precision="fp16"))
    assert gpu["stages"] == against_floor(ov_7b(), H100, run_of(precision="bf16"))["stages"] and gpu["notes"] == []
    cpu = against_floor(ov_7b(), HERE, run_of(precision="fp16"))
    assert cpu["stages"]["pixel_encoder"]["share"] == against_floor(ov_7b(), HERE, run_of())["stages"]["pixel_encoder"]["share"]
    assert cpu["notes"] == ["Graphs in fp16 are computed in fp32 on a processor, and are set against that."]


def test_4_bit_weights_are_read_in_4_bit_and_multiplied_in_16_on_a_gpu() -> None:
    slow = Device("a", {"bf16": 1e18}, 1e9, "made up: nothing but the weights' way counts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "DEVICES", (slow,))
        told = [against_floor(ov_7b(), slow, run_of(precision="fp16", lmm=lmm))["stages"]["language"] for lmm in ("float", "gptq4")]
    assert 3 < told[0]["floor_ms"] / told[1]["floor_ms"] < 4


def test_faster_than_the_floor_is_called_what_it_is() -> None:
    floors = against_floor(nano(), HERE, run_of())
    fast = dict.fromkeys(floors["stages"], 1e6) | {"spam": floors["stages"]["spam"]["floor_ms"] / 2}
    (note,) = against_floor(nano(), HERE, run_of(stages_ms=fast))["notes"]
    assert note.startswith("Below 1, which cannot be: spam.") and "busy" in note


def test_a_run_is_set_against_its_own_ceilings_else_the_same_processor_measured_now(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(roofline, "ceilings", lambda threads: asked.append(threads) or CEILINGS | {"source": "now"})
    result = whole_result(ours=whole_run(1, 30.0)) | {"ceilings": CEILINGS}
    assert machine_of(result).name == "the run's machine" and asked == [], "though its processor is another"
    result["ceilings"] = {"reason": "they could not be measured"}
    with pytest.raises(RequestError, match="expected one of this machine .* got one of one without them"):
        machine_of(result)
    result["environment"]["processor"] = processor()
    assert "not in the run" in machine_of(result).source and asked == [2], "with the run's threads"
    del result["ceilings"]  # of an earlier version
    assert "not in the run" in machine_of(result).source


def test_what_others_took_while_the_ceilings_were_measured_is_told() -> None:
    busy = CEILINGS | {"other_work": {"others": 0.5, "steal": 0.1, "seconds": 4.0}}
    result = whole_result(ours=whole_run(1, 30.0)) | {"ceilings": busy}
    assert "other processes took 60% of the processors' time" in machine_of(result).source


def test_a_run_on_a_gpu_is_set_against_that_gpu_or_refused() -> None:
    result = whole_result(ours=whole_run(1, 30.0, device="cuda:1")) | {"ceilings": None}
    result["environment"]["gpu"] = [{"name": "NVIDIA RTX A2000"}, {"name": "NVIDIA H100 80GB HBM3"}]
    assert machine_of(result) is H100
    result["environment"]["gpu"][1]["name"] = "NVIDIA H100 PCIe"
    with pytest.raises(RequestError, match="expected one whose peaks are known .* got NVIDIA H100 PCIe"):
        machine_of(result)
    result["environment"]["gpu"] = []
    with pytest.raises(RequestError, match="got none named in the file"):
        machine_of(result)


def test_the_command_sets_a_gpus_run_against_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = whole_result(ours=whole_run(1, 30.0, device="cuda:0", precision="fp16")) | {"ceilings": None, "text_tokens": 40}
    result["environment"]["gpu"] = [{"name": "NVIDIA H100 80GB HBM3"}]
    (tmp_path / "run.json").write_text(json.dumps(result))
    assert bench.main(["--roofline", "--json", str(tmp_path / "run.json")]) == 0
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert "The measured run (fp16) against H100 SXM" in printed and "this machine" not in told["devices"]
    assert told["stages"]["language"]["flops"] == stage_work(nano(), 40)["language"].flops, "the run's own prompt"


@pytest.mark.parametrize(
    ("run", "words"),
    [({}, "got none among torch"), ({"p50_ms": 1.0, "precision": "fp32"}, "got p50_ms, precision"), ({"p50_ms": "1"}, "got p50_ms")],
)
def test_a_run_without_its_times_is_refused(run: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"ours": run} if run else {"torch": {"p50_ms": 1.0}}
    (tmp_path / "run.json").write_text(json.dumps({"runs": runs, "environment": {}, "model": "nano"}))
    assert bench.main(["--roofline", "--json", str(tmp_path / "run.json")]) == 2
    assert "run ours: expected p50_ms, stages_ms and precision" in (told := capsys.readouterr().err) and words in told


# The ceilings


def test_ceilings_are_measured_with_the_threads_of_the_run() -> None:
    told = ceilings(1, 0)
    assert told["flops"]["fp32"] > 1e8 and told["bandwidth"] > 1e8
    assert told["source"].endswith("1 threads") and "other_work" in told


# The full size on a GPU


def test_the_full_sizes_stages_are_told_against_their_gpus_floors(capsys: pytest.CaptureFixture[str]) -> None:
    assert full_size_gpu.main(["floors", "--json", str(RESULTS / "full_size_gpu.json")]) == 0
    first = capsys.readouterr().out.split("\n\n")[0]
    assert "torch-bf16-one-pass | float | gptq4" in first and "torch-bf16 |" not in first, "nine passes have another floor"
    rows = {row.split("|")[1].strip(): row for row in first.splitlines()}
    assert "59.7 (10.4)" in rows["pixel_encoder"] and "6.1 (9.0)" in rows["semantic_encoder"] and "44.0 (2.1)" in rows["language"]
    assert "| 26.9 |" in rows["total"] and "144.6 (5.4)" in rows["total"]
    assert full_size_gpu.main(["floors", "--json", str(RESULTS / "levers.json")]) == 2
    assert "expected what full_size_gpu measure wrote" in capsys.readouterr().err


def test_figures_of_the_table_have_no_powers_of_ten() -> None:
    lines = table(roofline.roofline(ov_7b(), None)).splitlines()
    cells = [cell.strip() for line in lines if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if "e+" in cell or "e-" in cell]
    (total,) = (line for line in lines if line.startswith("| total |"))
    assert all(float(cell.replace(",", "")) > 1000 and "," in cell for cell in total.split(" | ")[1:3])
