"""Thresholds for a wanted share of false alarms, read off the scores of good pictures: what a line is set by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.evaluation import Observation

__all__ = ["RATES", "OperatingPoints", "in_words"]

RATES = (0.0, 0.01, 0.05, 0.1)  # of the good pictures that may be called NG
_DIGITS = 10_000  # a threshold is told to four places


class OperatingPoints:
    """Collects the scores of one data set's pictures: an observer of `evaluate`."""

    def __init__(self) -> None:
        self._good: list[float] = []
        self._bad: list[float] = []

    def __call__(self, seen: Observation) -> None:
        if seen.is_anomalous is not None:
            (self._bad if seen.is_anomalous else self._good).append(seen.prediction.score)

    def to_json(self, rates: Sequence[float] = RATES) -> dict[str, Any]:
        """How many good and anomalous pictures there were, and for each share the lowest threshold (a score above it is NG) at which no
        more of the good ones are false alarms.

        A point's "false_alarms" is the share that its threshold makes, "found" the share of the anomalous pictures that are NG then, None
        without any. A share that these good pictures are too few to tell from the one before is left out; without any there are no points.
        """
        descending = sorted(self._good, reverse=True)
        points: list[dict[str, Any]] = []
        for allowed in sorted({math.floor(rate * len(descending)) for rate in rates}) if descending else ():
            threshold = min(1.0, math.ceil(round(descending[allowed] * _DIGITS, 6)) / _DIGITS)
            point = {"threshold": threshold, "false_alarms": _share_above(self._good, threshold)}
            points.append(point | {"found": _share_above(self._bad, threshold) if self._bad else None})
        return {"good_pictures": len(self._good), "anomalous_pictures": len(self._bad), "points": points}


def in_words(name: str, told: Mapping[str, Any]) -> list[str]:
    """What `OperatingPoints.to_json` tells of a data set: a line for each point, and one where there are too few good pictures for all."""
    lines = [
        f"{name}: threshold {point['threshold']:.4f} calls {point['false_alarms']:.1%} of {told['good_pictures']} good pictures NG"
        + ("" if point["found"] is None else f" and finds {point['found']:.1%} of {told['anomalous_pictures']} anomalous ones")
        for point in told["points"]
    ]
    if lines and all(point["found"] == 0 for point in told["points"]):
        lines.append(f"{name}: none of these finds any: the anomalous pictures' scores do not stand out from the good ones'")
    if lines and (lacking := [rate for rate in RATES if 0 < rate * told["good_pictures"] < 1]):
        rates = ", ".join(f"{rate:.0%} ({math.ceil(1 / rate)})" for rate in lacking)
        lines.append(f"{name}: too few good pictures for thresholds that call {rates} of them NG (in brackets: how many it takes)")
    return lines


def _share_above(scores: Sequence[float], threshold: float) -> float:
    return sum(score > threshold for score in scores) / len(scores)
