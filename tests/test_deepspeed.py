"""The launch under DeepSpeed with the configuration that is shipped, by two CPU processes. Only where deepspeed is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import deepspeed_equivalence


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_processes_under_deepspeed_train_the_model_that_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")  # where ninja is, which compiles its operators
    result = deepspeed_equivalence.compare(steps=3)
    assert result["passed"], {name: result[name] for name in deepspeed_equivalence.SHOWN_RESULTS}


def test_without_deepspeed_the_comparison_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(deepspeed_equivalence, "find_spec", lambda name: None)
    assert deepspeed_equivalence.main([]) == 2
    assert "pip install deepspeed" in capsys.readouterr().err
