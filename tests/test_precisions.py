"""The table of precisions: with every time ratio stands how busy others kept the machine meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import precisions
from benchmarks.other_work import Counted
from benchmarks.precisions import measure, table
from engines import EngineFailed
from runtime.footprint import WHOLE


def fails(*_: Any) -> Any:
    raise EngineFailed("a stage ran out of memory")


def test_each_ratio_is_told_with_what_others_took_over_its_turns(
    tiny_checkpoint: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(Counted(float(total), 0.1 * total, 0.0, 0.0) for total in range(1000))
    monkeypatch.setattr(precisions, "counted", lambda processes: next(moments))
    monkeypatch.setattr(precisions, "footprints", lambda *_: {WHOLE: {"peak_rss_bytes": None}})
    monkeypatch.setattr(precisions, "candidates_for", lambda *_: [("onnxruntime", "graph"), ("nothing", "graph")])
    told: dict[str, Any] = measure(str(tiny_checkpoint), [tiny_bundle], count=2, threads=1, pairs=2)
    measured, refused = told["rows"]
    assert measured["time_ratio"] > 0 and measured["other_work"] == {"others": 0.1, "steal": 0.0, "seconds": 1.0}
    assert "error" in refused and told["environment"]["threads"] == 1
    monkeypatch.setattr(precisions, "footprints", fails)
    failed, _ = measure(str(tiny_checkpoint), [tiny_bundle], count=2, threads=1, pairs=2)["rows"]
    assert failed["error"] == "a stage ran out of memory" and failed["parity"]["images"] == 2
    head, rule, *rows = (line for line in table(told).splitlines() if line.startswith("|"))
    assert {line.count("|") for line in (head, rule, *rows)} == {15}
    assert head.endswith("| time | others |") and rows[0].endswith(" | 10.0% |")
