"""Settings from JSON: defaults where it says nothing, a named error where it says nonsense."""

from __future__ import annotations

import json
import re
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
        ({"loop": {"steps": "3"}}, 'loop.steps: expected int, got "3"; write 3 without quotes'),
        ({"loop": {"learning_rate": "1e-4"}}, 'expected float, got "1e-4"; write 1e-4 without quotes'),
        ({"loop": {"steps": True}}, "loop.steps: expected int, got true"),
        ({"loop": {"betas": [0.9]}}, "loop.betas: expected 2 values, got 1"),
        ({"loop": 3}, "loop: expected an object, got 3"),
        ({"parts": {"slow": [1]}}, r"parts.slow\[0\]: expected str, got 1"),
        ({"loop": {"precision": "fp8"}}, "precision: expected one of auto, no, bf16"),
        ({"loop": {"save_every": 0}}, "save_every: expected at least 1, got 0"),
        ({"loop": {"average_decay": 1.0}}, "average_decay: expected a number between 0 and 1, got 1"),
        ([], r"expected an object, got \[\]"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, values)
    assert str(tmp_path / "settings.json") in str(error.value)


@pytest.mark.parametrize("value", ["3.5", "true", "NaN", "three", "", [3], None])
def test_what_is_no_whole_number_without_its_quotes_either_gets_no_such_advice(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="loop.steps: expected int") as error:
        read(tmp_path, {"loop": {"steps": value}})
    assert "without quotes" not in str(error.value)


def test_a_file_that_is_no_json_is_named_with_its_line_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"loop": {\n  "steps": 3,\n}}')
    with pytest.raises(ValueError, match=r"settings\.json, line [23]: expected JSON with settings, .*; correct it there"):
        read_settings(tmp_path / "settings.json", TuningSettings())
    (tmp_path / "settings.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"settings\.json: .*save the file as UTF-8"):
        read_settings(tmp_path / "settings.json", TuningSettings())
    with pytest.raises(ValueError, match=r"nowhere\.json: expected a JSON file with settings, found no such file; correct the path"):
        read_settings(tmp_path / "nowhere.json", TuningSettings())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loop": {"clip_norm": 0}}, "clip_norm: expected a finite number above 0, got 0"),
        ({"loop": {"learning_rate": 0}}, "learning_rate: expected a finite number above 0, got 0"),
        ({"loop": {"warmup_steps": -5}}, "warmup_steps: expected 0 or more, got -5"),
        ({"objective": {"mask": {"bce": -5}}}, "mask.bce: expected a finite weight of 0 or more, got -5"),
        ({"objective": {"early_mask": {"dice": float("inf")}}}, "mask.dice: expected a finite weight of 0 or more, got inf"),
        ({"objective": {"text": -1}}, "objective.text: expected a finite weight of 0 or more, got -1"),
        ({"objective": {"image": float("nan")}}, "objective.image: expected a finite weight of 0 or more, got nan"),
        ({"objective": {"text": 0, "mask": {"bce": 0, "dice": 0}}}, "objective: expected a term with a weight above 0, got none"),
        ({"parts": {"slow_share": 0}}, "slow_share: expected a finite share above 0, got 0"),
    ],
)
def test_what_would_train_nothing_or_the_wrong_way_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, values)


def test_a_term_may_be_left_out(tmp_path: Path) -> None:
    objective = read(tmp_path, {"objective": {"text": 0, "mask": {"bce": 0}}}).objective
    assert (objective.text, objective.mask) == (0, MaskLossWeights(bce=0, dice=2.0))
