"""Settings from JSON: defaults where it says nothing, a named error where it says nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agvas.training.losses import MaskLossWeights
from agvas.training.settings import read_settings
from agvas.training.trainer import TuningSettings


def read(tmp_path: Path, values: Any) -> TuningSettings:
    (tmp_path / "settings.json").write_text(json.dumps(values))
    return read_settings(tmp_path / "settings.json", TuningSettings())


def test_what_is_left_out_is_the_papers(tmp_path: Path) -> None:
    settings = read(tmp_path, {})
    assert settings == TuningSettings()
    assert (settings.loop.learning_rate, settings.loop.warmup_steps, settings.loop.global_batch) == (3e-4, 100, 80)
    assert settings.parts.lora is not None and settings.parts.lora.rank == 16 and not settings.parts.encoders


def test_what_is_said_is_taken_at_any_depth(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        {
            "loop": {"learning_rate": 1, "betas": [0.8, 0.9], "average_decay": 0.99},
            "parts": {"lora": None, "slow": ["spam"]},
            "objective": {"early_mask": {"bce": 4}},
        },
    )
    assert settings.loop.learning_rate == 1.0 and settings.loop.betas == (0.8, 0.9) and settings.loop.average_decay == 0.99
    assert settings.parts.lora is None and settings.parts.slow == ("spam",)
    assert settings.objective.early_mask == MaskLossWeights(bce=4.0, dice=2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loop": {"learning_rat": 1}}, "loop.learning_rat: not a setting; .* did you mean 'learning_rate'"),
        ({"loop": {"steps": "many"}}, 'loop.steps: expected int, got "many"'),
        ({"loop": {"steps": True}}, "loop.steps: expected int, got true"),
        ({"loop": {"betas": [0.9]}}, "loop.betas: expected 2 values, got 1"),
        ({"loop": 3}, "loop: expected an object, got 3"),
        ({"parts": {"slow": [1]}}, r"parts.slow\[0\]: expected str, got 1"),
        ({"loop": {"precision": "fp8"}}, "precision: expected one of no, bf16"),
        ([], r"expected an object, got \[\]"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, values)
    assert str(tmp_path / "settings.json") in str(error.value)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="expected a JSON file of settings"):
        read_settings(tmp_path / "settings.json", TuningSettings())
    with pytest.raises(ValueError, match="nowhere.json"):
        read_settings(tmp_path / "nowhere.json", TuningSettings())
