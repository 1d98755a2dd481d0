"""The full-size command: which models it makes and what it calls a success. The measuring itself takes hours and is a person's to start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from agvas import AGVAS, save
from agvas.config import NAMED, tiny
from benchmarks.full_size import MODELS, SIZES, TARGETS, Work, do, verdicts
from benchmarks.random_checkpoint import reduced, spoken_rows, tokenizer_of


@pytest.mark.parametrize(("size", "billions"), [("7b", 8.7), ("13b", 14.0)])
def test_both_bases_are_the_published_sizes_and_can_say_the_answer(size: str, billions: float) -> None:
    config = NAMED[MODELS[size]]()
    for each in (config, reduced(config)):
        with torch.device("meta"):
            model = AGVAS(each, tokenizer_of(each))
        assert len(spoken_rows(model)) == 2
        assert (each.language.width, each.pixel.width) == (config.language.width, 1280)
        if each is config:
            assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.05)


def test_the_sizes_targets_are_the_7bs_alone() -> None:
    export = {"peak_rss_bytes": 1, "disk_bytes": TARGETS["gptq4_disk_bytes"] + 1, "weight_bytes": TARGETS["gptq4_weight_bytes"]}
    parts: dict[str, Any] = {"export-gptq4": export, "stages-16": {"worst_relative_error": 0.1}}
    assert verdicts(parts, "7b") == {
        "export_peak_rss_bytes": True,
        "gptq4_disk_bytes": False,
        "gptq4_weight_bytes": True,
        "stages-16": False,
    }
    assert verdicts(parts, "13b-reduced") == {"export_peak_rss_bytes": True, "stages-16": False}
    assert set(SIZES) == {"7b", "7b-reduced", "13b", "13b-reduced"}


def test_a_plan_is_made_exported_and_compared_with_what_it_says(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = tiny()
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, width=64, mlp_width=96, heads=4, layers=2))
    save(AGVAS(config, tokenizer_of(config)).eval(), tmp_path / "checkpoint")
    work = Work(tmp_path, tmp_path / "checkpoint", "7b", "fp16", "float", pictures=2)
    told = do("calibrate", work)
    assert told["pictures"] == 2 and told["linears"] == 14 and told["mean_error"] < told["mean_rounding_error"]
    exported = do("export-plan", work)
    assert exported["lmm"] == "gptq4" and exported["precision"] == "fp16"
    compared = do("stages-plan", work)
    assert verdicts({"export-plan": exported, "stages-plan": compared}, "7b") == {"export_peak_rss_bytes": True, "stages-plan": True}
    assert not verdicts({"stages-plan": compared | {"worst_relative_error": 0.1}}, "7b")["stages-plan"]
