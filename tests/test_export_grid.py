"""The table of precisions: what is asked of the package's own commands, and what is told of their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import export_grid

REPORT: dict[str, Any] = {
    "passed": True,
    "parity": {"mask_iou_mean": 0.9987, "mask_iou_min": 0.983, "flips": 0, "anchor_cosine_min": 0.99931},
    "bytes": 19_200_000,
    "stages": {"language": {"bytes": 1_200_000}},
    "kept_float": [],
}


def test_every_pair_is_exported_with_the_plan_of_its_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(arguments: Sequence[str], log: Path) -> None:
        asked.append(list(arguments))
        Path(arguments[list(arguments).index("--output") + 1]).mkdir()
        failed = "bf16" in arguments and "int8" in arguments
        log.write_text("read the checkpoint\n" + json.dumps(REPORT | {"passed": not failed}) + "\n")

    monkeypatch.setattr(export_grid, "run", run)
    output = tmp_path / "grid.json"
    assert export_grid.main(["--work", str(tmp_path / "work"), "--output", str(output)]) == 1  # one failed its gates
    calibrations = [arguments for arguments in asked if arguments[0] == "calibration.cli"]
    assert [arguments[arguments.index("--bits") + 1] for arguments in calibrations] == ["8", "4"]
    assert ["--group" in arguments for arguments in calibrations] == [True, False]
    plans = {
        tuple(arguments[i + 1] for i, word in enumerate(arguments) if word in ("--precision", "--lmm")): Path(
            arguments[arguments.index("--calibration") + 1]
        ).name
        for arguments in asked
        if "--calibration" in arguments
    }
    assert plans == {
        **{(precision, "int8"): "plan-int8" for precision in export_grid.PRECISIONS},
        **{(precision, "gptq4"): "plan-gptq4" for precision in export_grid.PRECISIONS},
        ("int8", "float"): "plan-gptq4",  # the encoders' ranges stand in any plan
    }
    rows = json.loads(output.read_text())["exports"]
    assert len(rows) == 12 and [name for name, row in rows.items() if not row["passed"]] == ["bf16-int8"]


def test_a_row_tells_masks_and_sizes_and_a_failed_command_is_named(tmp_path: Path) -> None:
    row = export_grid.line(REPORT | {"bundle": "fp16-gptq4", "accuracy": {"ap": 0.41239}, "kept_float": ["layers.0.mlp.down_proj"]})
    assert row == "| fp16 | gptq4 | 19.2 | 1.2 | 0.9987 | 0.983 | 0 | 0.99931 | 0.4124 | layers.0.mlp.down_proj |"
    assert export_grid.line(REPORT | {"bundle": "fp16-gptq4"}).endswith("| 0 | 0.99931 | none |")
    with pytest.raises(SystemExit, match="export.cli --precision fp31 ended with exit code 2; see .*err"):
        export_grid.run(["export.cli", "--precision", "fp31"], tmp_path / "log")
