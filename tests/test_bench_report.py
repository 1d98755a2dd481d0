"""The report of a result: what its table shows, what it warns of, and what its plots do not hide."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from bench_results import whole_result, whole_run

from benchmarks import bench_measure
from benchmarks.report import main, markdown
from runtime.selection import Choice


def result(**changes: Any) -> dict[str, Any]:
    return whole_result(ours=whole_run(1, 30.0), torch=whole_run(2, 80.0)) | changes


def test_device_memory_is_shown_where_it_was_measured() -> None:
    assert "GPU memory" not in markdown(result())
    told = result()
    told["runs"]["ours"] |= {"device": "cuda:0", "device_memory_bytes": 12_345_000_000}
    told["runs"]["torch"] |= {"device": "cuda:0", "device_memory_reason": "NVML does not list this process"}
    head, _, ours, torch = (line.split(" | ") for line in markdown(told).splitlines()[:4])
    column = head.index("GPU memory, MB")
    assert len(head) == len(ours) == len(torch) and (ours[column], torch[column]) == ("12345", "")
    assert "GPU memory is not told: NVML does not list this process." in markdown(told)


def test_a_language_model_in_integers_stands_beside_the_encoders_precision() -> None:
    told = result()
    told["runs"]["ours"] |= {"precision": "fp16", "lmm": "gptq4"}
    assert "| ours | fp16, language model gptq4, onnxruntime |" in markdown(told) and "| torch | fp32, onnxruntime |" in markdown(told)
    told["runs"]["ours"]["inference_precision"] = "bf16+int8"
    assert "| ours | fp16, language model gptq4 with inputs in 8 bits, onnxruntime |" in markdown(told)
    del told["runs"]["ours"]["lmm"]  # of an earlier version
    assert "| ours | fp16, onnxruntime |" in markdown(told)


@pytest.mark.parametrize(
    ("busy", "load", "words", "trusted"),
    [
        ({"others": 0.012, "steal": 0.0, "seconds": 60.0}, 0.1, "Other processes took 1.2% of the processors' time", True),
        ({"others": 0.012, "steal": 0.0, "seconds": 60.0}, 2.0, "busy before this began (load average 2.0).", True),
        ({"others": 0.20, "steal": 0.0, "seconds": 60.0}, 0.1, "Other processes took 20.0%", False),
        ({"others": 0.02, "steal": 0.04, "seconds": 60.0}, 0.1, "the host's other guests 4.0%", False),
        ({"reason": "not counted"}, 0.1, "is not told: not counted", True),
        ({}, 2.0, "(load average 2.0), and nothing tells how busy others kept it", False),
        ({}, 0.1, "", True),
    ],
)
def test_how_busy_others_made_the_machine_is_told_and_judged(busy: dict[str, Any], load: float, words: str, trusted: bool) -> None:
    told = result(other_work=busy)
    told["environment"]["load_average"] = [load] * 3
    assert words in markdown(told) and ("not to be trusted" not in markdown(told)) == trusted


@pytest.mark.parametrize(
    ("chosen", "load", "others", "told"),
    [("now", 2.0, 0.0, True), ("now", 0.1, 0.2, True), ("now", 0.1, 0.0, False), ("before", 2.0, 0.2, False), ("", 2.0, 0.2, False)],
)
def test_an_engine_that_auto_chose_on_a_busy_machine_is_told_with_how_to_choose_again(
    chosen: str, load: float, others: float, told: bool
) -> None:
    busy = result(other_work={"others": others, "steal": 0.0, "seconds": 60.0})
    busy["environment"] |= {"load_average": [load] * 3, "threads": 3}
    busy["runs"]["ours"]["chosen"] = chosen
    words = "The engine of ours was chosen by auto in this run, on that busy machine, too, and is remembered."
    assert (words in markdown(busy)) == ("agvas-verify --bundle DIR --threads 3 --remeasure" in markdown(busy)) == told


@pytest.mark.parametrize(("engine", "remembered", "told"), [("auto", False, "now"), ("auto", True, "before"), ("openvino", False, "")])
def test_a_candidate_says_when_auto_chose_its_engine(
    engine: str, remembered: bool, told: str, monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    choice = Choice("onnxruntime", "graph", 1.0, {}, remembered)
    monkeypatch.setattr(bench_measure, "choose_engine", lambda *_: (None, choice))
    request = bench_measure.Request(tiny_bundle, engine, "cpu", None, 1, (), None, None, None, bench_measure.QUICK)
    steps: list[tuple[str, int, int]] = []
    assert bench_measure._bundle_candidate("ours", tiny_bundle, request, {}, lambda *step: steps.append(step)).chosen == told
    assert steps == ([("choosing the engine of ours", 0, 1)] if engine == "auto" else []), "measuring engines takes a while"


def test_short_of_the_full_setting_says_what_it_had() -> None:
    assert "Short of" not in markdown(result())
    told = result(full=False)
    told["pictures"] |= {"count": 12}
    assert "64 pictures), with 50, 1,024, 60 s and 12: no figures to publish." in markdown(told)


def test_bars_end_at_their_labels_and_the_legend_hides_no_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import report

    figures = {}
    monkeypatch.setattr(report, "_save", lambda figure, path: figures.update({path.name: figure}))
    told = result()
    told["runs"]["torch"]["gap_ms"] = 0.0  # medians of the parts that fall short of the whole's median
    report._waterfall(told, tmp_path / "stages.png")
    report._distribution(told, tmp_path / "latency.png")
    bars = figures["stages.png"].axes[0]
    for row, name in enumerate(("torch", "ours")):
        parts = [bar for bar in bars.patches if abs(bar.get_y() + bar.get_height() / 2 - row) < 0.1]
        assert max(bar.get_x() + bar.get_width() for bar in parts) == pytest.approx(told["runs"][name]["p50_ms"])
    assert "between stages" in [text.get_text() for text in bars.get_legend().get_texts()]
    for figure in figures.values():
        figure.canvas.draw()
        axes = figure.axes[0]
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())


def test_the_command_makes_a_report_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "run.json").write_text(json.dumps(result()))
    assert main([str(tmp_path / "run.json"), str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").read_text().count("data:image/png;base64,") == 3


def test_files_that_are_no_results_end_with_2_and_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    whole = result()
    shortened = [copy.deepcopy(whole) for _ in range(4)]
    del shortened[0]["runs"]["torch"]["samples"]
    del shortened[1]["runs"]["torch"]["p90_ms"]
    del shortened[2]["environment"]["gpu"]
    shortened[3] = {"runs": {}, "environment": {}}
    for told, words in zip(shortened, ("raw samples", "runs.torch.p90_ms", "environment.gpu", "expected runs by name"), strict=True):
        (tmp_path / "run.json").write_text(json.dumps(told))
        assert main([str(tmp_path / "run.json"), str(tmp_path / "report")]) == 2
        assert words in capsys.readouterr().err


def test_times_on_the_gpu_have_rows_where_an_engine_tells_them() -> None:
    told = whole_result(ours=whole_run(1, 10.0, device_stages_ms={"language": 1.25}), torch=whole_run(2, 20.0))
    assert "| language, on the GPU | 1.25 |  |" in markdown(told)
    assert "on the GPU" not in markdown(result())
