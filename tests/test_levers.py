"""The page of what each optimisation pays is written from its JSON, and a lever that is called exact has to be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from branch_graph import NAMES, branches, convolutions

import engines.openvino
from benchmarks import levers
from benchmarks.levers import EXACT, Lever, inexact, main, table
from engines import EngineFailed
from runtime.bundle import Bundle

RESULTS = Path(levers.__file__).parent / "results"


def result(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((RESULTS / "levers.json").read_text())
    told["levers"][0] |= changes
    return told


def test_the_page_is_what_its_json_gives(tmp_path: Path) -> None:
    (tmp_path / "levers.json").write_text((RESULTS / "levers.json").read_text())
    assert main(["--render", str(tmp_path / "levers.json")]) == 0
    assert (tmp_path / "levers.md").read_text() == (RESULTS / "levers.md").read_text()
    assert "\nMeasured on a former nano.\n" in table(result() | {"notes": ["Measured on a former nano."]})
    busy = result() | {"other_work": {"others": 0.2, "steal": 0.0, "seconds": 60.0}}
    assert "Other processes took 20.0% of the processors' time" in table(busy)
    assert "Golden masks" not in table(result() | {"masks_in_bf16": {}})
    assert "Golden masks in bf16 were not compared: no bf16 here." in table(result() | {"masks_in_bf16": {"error": "no bf16 here"}})
    older = {name: told for name, told in result().items() if name != "other_work"}
    assert "Other processes" not in table(older)


@pytest.mark.parametrize(
    ("where", "exact"),
    [
        ("from the first matrix product", set(NAMES)),
        (levers.AS_IT_RUNS, {"first", "chain's first", "expand", "depthwise"}),
        ("behind the first convolution", {"first", "chain's first"}),
        ("throughout", set()),
    ],
)
def test_bf16_begins_where_the_lever_says(where: str, exact: set[str]) -> None:
    with levers.ROUNDING[where]():
        before, behind = engines.openvino.cut_before_rounding(branches())
    assert (convolutions(before), convolutions(behind)) == (exact, set(NAMES) - exact)


def test_a_lever_that_cannot_be_tried_loses_no_other_rows(tiny_bundle: Path) -> None:
    def fails(image: np.ndarray) -> np.ndarray:
        raise EngineFailed("other sizes than it was compiled for")

    def doubled(image: np.ndarray) -> np.ndarray:
        return 2 * image[..., 0]

    bundle = Bundle(tiny_bundle, check_hashes=False)
    works = Lever("works", "nothing", True, lambda *_: (doubled, doubled))
    told = levers.measure(works, bundle, 1, pairs=2, warmups=0)
    assert told["map_difference"] == 0 and told["gain"] > 0
    told = levers.measure(replace(works, make=lambda *_: (doubled, fails)), bundle, 1, pairs=2, warmups=0)
    assert told["error"] == "other sizes than it was compiled for" and "gain" not in told


def test_a_streams_maps_are_compared_with_those_of_single_calls(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(tiny_bundle, check_hashes=False)
    assert levers.measure_stream(bundle, 1, frames=2, rounds=1)["map_difference"] == 0
    original = levers.in_steps

    def swapped(*arguments: Any) -> Iterator[Any]:
        (one, _), (other, _) = original(*arguments)
        yield from ((other, None), (one, None))

    monkeypatch.setattr(levers, "in_steps", swapped)
    assert levers.measure_stream(bundle, 1, frames=2, rounds=1)["map_difference"] > 0


def test_an_exact_lever_whose_maps_differ_is_told() -> None:
    assert inexact(result()) == [] and "NOT EXACT" not in table(result())
    for differs in (2 * EXACT, float("nan")):
        told = result(map_difference=differs)
        assert inexact(told) == [told["levers"][0]["lever"]] and table(told).count("NOT EXACT") == 1
    assert inexact(result(exact=False, map_difference=0.5)) == []
    assert inexact({"levers": [{"lever": "not tried", "error": "no OpenVINO"}]}) == []
