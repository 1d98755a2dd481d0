"""agvas-bench --compare: what got slower or worse from one result to another, and what keeps two from being compared."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_results import result_of, run_of, samples, whole_result, whole_run

from benchmarks import bench
from benchmarks.bench_statistics import compare, comparison_table, slower


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


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


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda result: result["runs"]["ours"].update(changes)


def renamed(result: dict[str, Any]) -> None:
    stages = result["runs"]["ours"]["samples"]["stages_ms"]
    stages["pixels"] = stages.pop("pixel_encoder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(mask_iou_mean=0.1), "mask_iou_mean fell from 0.9990 to 0.1000"),
        (changed(mask_iou_min=0.9), "mask_iou_min fell"),
        (changed(mask_iou_mean=None, mask_iou_min=None, flips=None), "masks are not judged any more"),
        (changed(flips=1), "flips rose from 0 to 1"),
        (changed(peak_rss_bytes=3_000_000_000), "peak_rss_bytes rose from 300 to 3000 MB"),
        (lambda result: result["runs"].pop("torch"), "torch: not measured any more"),
        (renamed, "stage pixel_encoder is not told any more"),
    ],
)
def test_what_got_worse_though_no_slower_fails_too(
    change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = whole_result(ours=whole_run(1, 30.0), torch=whole_run(2, 80.0))
    b = copy.deepcopy(a)
    change(b)
    for name, result in (("a", a), ("b", b)):
        (tmp_path / name).write_text(json.dumps(result))
    assert bench.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    printed = capsys.readouterr().out
    assert words in printed and json.loads(printed.splitlines()[-1])["slower"] == []
    assert bench.main(["--compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0


def test_masks_and_memory_that_move_as_they_do_from_run_to_run_fail_nothing() -> None:
    a = whole_result(ours=whole_run(1, 30.0))
    b = whole_result(ours=whole_run(1, 30.0, mask_iou_mean=0.998, mask_iou_min=0.98, peak_rss_bytes=320_000_000))
    assert compare(a, b, 1.05)["worse"] == []


def test_more_device_memory_fails() -> None:
    a, b = (whole_result(ours=whole_run(1, 30.0, device_memory_bytes=held)) for held in (10**9, 2 * 10**9))
    assert compare(a, b, 1.05)["worse"] == ["ours: device_memory_bytes rose from 1000 to 2000 MB (a ratio of 1.1 is let pass)"]


def test_other_conditions_are_told_with_both_values() -> None:
    a = whole_result(ours=whole_run(1, 30.0))
    b = whole_result(ours=whole_run(1, 30.0, engine="openvino", precision="bf16"), new=whole_run(2, 30.0))
    b["pictures"] = a["pictures"] | {"sizes": [[1000, 1000]]}
    b["effort"] = a["effort"] | {"queries": 40}
    comparison = compare(a, b, 1.05)
    told = comparison["other_conditions"]
    assert told.keys() == {"ours engine", "ours precision", "pictures", "effort", "new only in B"}
    assert told["ours engine"] == ["onnxruntime", "openvino"]
    assert "- ours precision: fp32 and bf16" in comparison_table(comparison).splitlines()
    assert comparison["slower"] == comparison["worse"] == []


def test_a_fact_that_an_earlier_version_did_not_tell_is_no_other_condition() -> None:
    a, b = (whole_result(ours=whole_run(1, 30.0)) for _ in range(2))
    del a["runs"]["ours"]["lmm"]
    b["environment"] |= {"commit": "0" * 40, "dirty": False}
    comparison = compare(a, b, 1.05)
    assert comparison["other_conditions"] == {} and comparison["other_machine"] == []


def test_a_processor_whose_label_is_put_otherwise_is_the_same_one() -> None:
    """As in results of earlier versions."""
    a, b = (whole_result(ours=whole_run(1, 30.0)) for _ in range(2))
    a["environment"]["processor"] = "26 2 AMD EPYC avx2 avx512_bf16"
    b["environment"]["processor"] = "AMD EPYC family 26 model 2 avx2 avx512_bf16"
    assert compare(a, b, 1.05)["other_machine"] == []
    b["environment"]["processor"] = "AMD EPYC family 25 model 17 avx2 avx512_bf16"
    assert compare(a, b, 1.05)["other_machine"] == ["processor"]


@pytest.mark.parametrize("threshold", ["nan", "inf", "-1", "0", "0.99", "1000"])
def test_a_threshold_that_compares_nothing_is_refused(threshold: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text(json.dumps(result_of(ours=run_of(samples(1, 100.0)))))
    assert bench.main(["--compare", str(tmp_path / "a"), str(tmp_path / "a"), f"--threshold={threshold}"]) == 2
    assert "--threshold: expected a ratio from 1 to 10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (run_of([]), "expected raw samples in the file"),
        ({"samples": {"ms": [1.0]}}, "by stage"),
        ({"samples": [1.0]}, "expected raw samples in the file"),
        (run_of([1.0, 2.0], {"spam": [1.0]}), "expected 2 samples of spam, got 1"),
        (run_of([1.0, math.nan]), "expected milliseconds of ms, got nan"),
        (run_of([1.0, None]), "expected milliseconds of ms, got None"),  # type: ignore[list-item]
        (run_of([0.0, 0.0]), "expected milliseconds of ms, got 0"),
    ],
)
def test_samples_that_are_none_are_refused(run: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text(json.dumps(result_of(ours=run)))
    assert bench.main(["--compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[", "[]", *(f'{{"runs": {runs}, "environment": {{}}}}' for runs in ("{}", "[]", '{"ours": 1}'))])
def test_other_files_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text(text)
    for arguments in (["--compare", str(tmp_path / "a"), str(tmp_path / "a")], ["--roofline", "--json", str(tmp_path / "a")]):
        assert bench.main(arguments) == 2
        assert "a: expected" in capsys.readouterr().err
