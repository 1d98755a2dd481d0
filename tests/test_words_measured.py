"""benchmarks.explicit_modes: what a bundle says beside its checkpoint, and whether that is a failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import explicit_modes


def row(gates: str, changed: int) -> dict[str, Any]:
    return {"engine": "onnxruntime", "mode": "direct", "gates": gates, "answers": 8, "answers_changed": changed}


@pytest.mark.parametrize(
    ("rows", "said", "failed"),
    [
        ([row("fp32", 0), row("bf16", 3)], "every answer in fp32 is the reference's", False),
        ([row("fp32", 2), row("fp32", 0)], "onnxruntime, direct: 2 of 8 answers differ", True),
        ([row("gptq4", 3), {"engine": "openvino", "error": "not installed"}], "no row computes in fp32", False),
    ],
)
def test_only_rows_in_fp32_have_to_be_the_references(rows: list[dict[str, Any]], said: str, failed: bool) -> None:
    words, wrong = explicit_modes.verdict({"rows": rows})
    assert words.startswith(said) and wrong is failed


def test_a_bundle_is_asked_in_every_mode_of_its_checkpoint(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "words.json"
    asked = ["--checkpoint", str(tiny_checkpoint), "--bundle", str(tiny_bundle), "--images", "2", "--engines", "onnxruntime"]
    assert explicit_modes.main([*asked, "--output", str(told)]) == 0
    rows = json.loads(told.read_text())["rows"]
    assert {row["mode"] for row in rows} == {"free", "direct"} and all(row["answers_changed"] == 0 for row in rows)
    assert "every answer in fp32 is the reference's" in capsys.readouterr().err
