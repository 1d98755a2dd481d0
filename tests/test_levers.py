"""The page of what each optimisation pays is written from its JSON, and a lever that is called exact has to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import levers
from benchmarks.levers import EXACT, inexact, main, table

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
    older = {name: told for name, told in result().items() if name != "other_work"}
    assert "Other processes" not in table(older)


def test_an_exact_lever_whose_maps_differ_is_told() -> None:
    assert inexact(result()) == [] and "NOT EXACT" not in table(result())
    for differs in (2 * EXACT, float("nan")):
        told = result(map_difference=differs)
        assert inexact(told) == [told["levers"][0]["lever"]] and table(told).count("NOT EXACT") == 1
    assert inexact(result(exact=False, map_difference=0.5)) == []
    assert inexact({"levers": [{"lever": "not tried", "error": "no OpenVINO"}]}) == []
