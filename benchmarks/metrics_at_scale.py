"""The pixel metrics over 10^9 simulated pixels: error against exact values, against the bound they state, seconds and peak memory.

    python -m benchmarks.metrics_at_scale --output benchmarks/results/metrics_at_scale.json

Scores lie on a grid of 2^20 levels, so that counts per level, which are kept beside the metrics, give the exact AP, F1-max and AUPRO of
what was drawn; the metrics do not know the grid, and their bins merge most levels. Maps are simulated because no public set is this
large: 1,000 pictures of 1,000 x 1,000, half of them with defects whose areas are known from how they were drawn, normals and
anomalies overlapping as sigmoids of two normal distributions do. Nothing is learned here about any model.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.environment import environment
from benchmarks.metrics import AUPRO_LIMIT, PixelScores

LEVELS = 1 << 20  # a multiple of 2^-20 is exact in float32
SEPARATION = 2.5  # between the means of the logits of normal and anomalous pixels, in standard deviations
SIDES = (3, 10, 40, 150)  # of the square defects, pixels; one of each in an anomalous picture
CELL = 250  # pixels, the side of a cell that holds at most one defect, which does not touch the cell's border


@dataclass(frozen=True)
class Simulated:
    """One picture: scores float32 [S, S], truth bool [S, S], and the areas of its regions in the order of `region`.

    region: for each True pixel of truth, row by row, the index of its region in areas.
    """

    scores: npt.NDArray[np.float32]
    truth: npt.NDArray[np.bool_]
    region: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]


def simulated(pictures: int, side: int, seed: int = 1) -> Iterator[Simulated]:
    """Pictures of side x side; every other one has defects. ValueError where a picture cannot hold a cell for each defect."""
    cells = (side // CELL) ** 2
    if cells < len(SIDES):
        raise ValueError(f"side: expected at least {2 * CELL} pixels, got {side}; a picture holds {len(SIDES)} defects in cells of {CELL}")
    random = np.random.default_rng(seed)
    for picture in range(pictures):
        numbers = np.zeros((side, side), np.int64)  # of the region, from 1
        if picture % 2:
            for number, (cell, defect) in enumerate(zip(random.choice(cells, len(SIDES), replace=False), SIDES), start=1):
                row, column = divmod(int(cell), side // CELL)
                top, left = (CELL * place + int(random.integers(1, CELL - defect - 1)) for place in (row, column))
                numbers[top : top + defect, left : left + defect] = number
        truth = numbers > 0
        logits = random.standard_normal((side, side), np.float32) - np.float32(3)
        logits[truth] += np.float32(SEPARATION)
        levels = np.rint(1 / (1 + np.exp(-logits)) * LEVELS)
        region = numbers[truth] - 1
        yield Simulated((levels / LEVELS).astype(np.float32), truth, region, np.bincount(region))


class ExactCounts:
    """Counts at each of the 2^20 + 1 levels: the metrics by their definitions, possible only because the levels are known."""

    def __init__(self) -> None:
        self.positives, self.negatives = np.zeros(LEVELS + 1, np.int64), np.zeros(LEVELS + 1, np.int64)
        self.weights, self.regions = np.zeros(LEVELS + 1, np.float64), 0

    def add(self, picture: Simulated) -> None:
        levels = (picture.scores * LEVELS).astype(np.int64)
        self.positives += np.bincount(levels[picture.truth], minlength=LEVELS + 1)
        self.negatives += np.bincount(levels[~picture.truth], minlength=LEVELS + 1)
        self.weights += np.bincount(levels[picture.truth], 1 / picture.areas[picture.region], minlength=LEVELS + 1)
        self.regions += picture.areas.size

    def metrics(self) -> dict[str, float]:
        """Each level is a threshold: AP as a sum over steps of recall, F1-max, AUPRO by trapezoids up to the limit."""
        hits, alarms = np.cumsum(self.positives[::-1]), np.cumsum(self.negatives[::-1])
        precision = hits / np.maximum(hits + alarms, 1)
        recall = hits / hits[-1]
        rate = np.concatenate([[0.0], alarms / alarms[-1]])
        overlap = np.concatenate([[0.0], np.cumsum(self.weights[::-1]) / self.regions])
        inside = rate < AUPRO_LIMIT
        x = np.append(rate[inside], AUPRO_LIMIT)
        y = np.append(overlap[inside], np.interp(AUPRO_LIMIT, rate, overlap))
        return {
            "ap": float(np.sum(np.diff(recall, prepend=0.0) * precision)),
            "f1_max": float(np.max(2 * hits / (hits + alarms + hits[-1]))),
            "aupro": float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / AUPRO_LIMIT),
        }


def measure(pictures: int, side: int) -> dict[str, Any]:
    """Values, bounds, exact values, errors, the processor's seconds spent in the metrics alone, and the process's peak memory."""
    from tqdm import tqdm

    pixels, exact, seconds = PixelScores(regions=True), ExactCounts(), 0.0
    before = _peak_bytes()
    for picture in tqdm(simulated(pictures, side), total=pictures, unit="picture", file=sys.stderr, disable=None):
        started = time.process_time()
        pixels.add(picture.scores, picture.truth)
        seconds += time.process_time() - started
        exact.add(picture)
    started = time.process_time()
    values = {"ap": pixels.average_precision(), "f1_max": pixels.f1_max(), "aupro": pixels.aupro()}
    bounds = {
        "ap": pixels.average_precision_bounds(),
        "f1_max": (values["f1_max"], pixels.f1_max_bound()),
        "aupro": pixels.aupro_bounds(),
    }
    seconds += time.process_time() - started
    expected = exact.metrics()
    return {
        "pictures": pictures,
        "pixels": pictures * side * side,
        "anomalous_pixels": pixels.positives,
        "metrics": {name: _compare(values[name], bounds[name], expected[name]) for name in expected},
        "cpu_seconds_in_metrics": round(seconds, 1),
        "cpu_seconds_a_megapixel": round(seconds / (pictures * side * side / 1e6), 4),
        "peak_rss_bytes": _peak_bytes(),
        "peak_rss_bytes_before": before,
    }


def _compare(value: Any, bounds: Any, exact: float) -> dict[str, Any]:
    lowest, highest = bounds
    rounding = 1e-12  # of sums in another order
    return {
        "value": value,
        "exact": exact,
        "error": abs(value - exact),
        "bounds": [lowest, highest],
        "within_bounds": bool(lowest - rounding <= exact <= highest + rounding),
    }


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 1 where an exact value lies outside its stated bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--side", type=int, default=1000, help="of a picture, pixels")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    result: dict[str, Any] = {"command": f"python -m benchmarks.metrics_at_scale --pictures {options.pictures} --side {options.side}"}
    result |= measure(options.pictures, options.side) | {"seconds": round(time.perf_counter() - started, 1), "environment": environment()}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(metric["within_bounds"] for metric in result["metrics"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
