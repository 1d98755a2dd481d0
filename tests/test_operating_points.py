"""Thresholds for a wanted share of false alarms: as few good pictures as asked for exceed them, and no lower one would do."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.operating_points import OperatingPoints, in_words


def collected(good: list[float], bad: Sequence[float] = (), unknown: int = 0) -> OperatingPoints:
    points = OperatingPoints()
    for is_anomalous, scores in ((False, good), (True, bad), (None, [0.5] * unknown)):
        for score in scores:
            seen: Any = SimpleNamespace(is_anomalous=is_anomalous, prediction=SimpleNamespace(score=score))
            points(seen)
    return points


@pytest.mark.parametrize("count", [1, 7, 20, 51, 1000])
def test_no_more_good_pictures_than_allowed_exceed_the_lowest_such_threshold(count: int) -> None:
    rng = np.random.default_rng(count)
    good, bad = rng.random(count).round(3).tolist(), rng.random(30).tolist()
    rates = (0.0, 0.03, 0.1, 0.5)
    told = collected(good, bad, unknown=3).to_json(rates)
    assert (told["good_pictures"], told["anomalous_pictures"]) == (count, 30)
    assert len(told["points"]) == len({int(rate * count) for rate in rates})
    levels = np.arange(10001) / 10000
    for allowed, point in zip(sorted({int(rate * count) for rate in rates}), told["points"], strict=True):
        enough = [level for level in levels if sum(score > level for score in good) <= allowed]  # a slow search
        assert point["threshold"] == pytest.approx(min(enough), abs=1e-9)
        assert point["false_alarms"] == sum(score > point["threshold"] for score in good) / count <= allowed / count
        assert point["found"] == sum(score > point["threshold"] for score in bad) / 30


def test_without_good_pictures_there_are_no_points_and_without_anomalous_ones_nothing_is_found() -> None:
    assert collected([], [0.5]).to_json()["points"] == []
    told = collected([0.25, 0.75]).to_json()
    assert told["points"] == [{"threshold": 0.75, "false_alarms": 0.0, "found": None}]
    assert in_words("line", told) == [
        "line: threshold 0.7500 calls 0.0% of 2 good pictures NG",
        "line: too few good pictures for thresholds that call 1% (100), 5% (20), 10% (10) of them NG (in brackets: how many it takes)",
    ]
    assert len(in_words("line", collected([index / 100 for index in range(100)]).to_json())) == 4


def test_thresholds_that_find_nothing_are_said_to_be_of_no_use() -> None:
    told = collected([0.9, 0.95], [0.1, 0.2]).to_json()
    assert in_words("line", told)[1] == "line: none of these finds any: the anomalous pictures' scores do not stand out from the good ones'"
    assert not any("none of these" in line for line in in_words("line", collected([0.1], [0.2]).to_json()))


def test_a_score_of_one_leaves_a_threshold_of_one() -> None:
    assert collected([1.0, 1.0000001], [0.9]).to_json()["points"][0] == {"threshold": 1.0, "false_alarms": 0.5, "found": 0.0}
