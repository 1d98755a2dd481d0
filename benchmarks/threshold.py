"""Where a checkpoint's masks should begin, judged on drawn defects alone: held-out procedural samples, and photographs with drawn defects.

    python -m benchmarks.threshold --checkpoint nano --output benchmarks/results/threshold_nano.json

On each of the two it tells, for every threshold, the mean IoU on anomalous pictures and the share of normal pictures left empty. A higher
threshold leaves more normals empty and costs defects; proposed is the highest one that keeps `--keep` of the best IoU on both. Nothing real
that the package is measured on takes part. The seeds are no training's, no parity picture's and no demo picture's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from agvas import load
from agvas.training.procedural import make_sample
from benchmarks.demo import DEFECTS, all_photographs, with_defect
from benchmarks.environment import environment

THRESHOLDS = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
PROCEDURAL_SEED, PHOTOGRAPH_SEED = 7_000_000_000, 9_500_000_000
SIZE = (360, 480)

Picture = tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]


def procedural(count: int) -> Iterator[Picture]:
    """Held-out samples with their truth, two in five of them normal."""
    for number in range(count):
        sample = make_sample(PROCEDURAL_SEED + number, *SIZE)
        yield sample.image, sample.mask


def photographs(count: int) -> Iterator[Picture]:
    """`count` photographs with one drawn defect each, and the quarters of every photograph as they are."""
    every = [image for _, image in all_photographs()]
    for number in range(count):
        turn, which = divmod(number, len(every))
        image, truth, _ = with_defect(every[which], DEFECTS[turn % len(DEFECTS)], PHOTOGRAPH_SEED + 100 * number)
        yield image, truth
    for image in every:
        height, width = (side // 2 for side in image.shape[:2])
        for top in (0, height):
            for left in (0, width):
                yield np.ascontiguousarray(image[top : top + height, left : left + width]), np.zeros((height, width), bool)


def proposed(splits: dict[str, dict[str, list[float]]], keep: float) -> float:
    """The highest threshold whose IoU is at least `keep` of the best one in every split."""
    fine = [all(split["iou"][index] >= keep * max(split["iou"]) for split in splits.values()) for index in range(len(THRESHOLDS))]
    if not any(fine):
        raise ValueError(f"--keep: no threshold keeps {keep} of the best IoU everywhere; give less")
    return max(threshold for threshold, good in zip(THRESHOLDS, fine) if good)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threshold", description=__doc__)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--procedural", type=int, default=150, help="held-out samples (default 150)")
    parser.add_argument("--photographs", type=int, default=48, help="photographs with a drawn defect (default 48)")
    parser.add_argument("--keep", type=float, default=0.75, help="of the best IoU (default 0.75)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(argv)
    model = load(options.checkpoint)
    splits = {}
    for name, pictures in {"procedural": procedural(options.procedural), "photographs": photographs(options.photographs)}.items():
        ious, empties = [], []
        for image, truth in tqdm(pictures, desc=name, unit="image"):
            anomaly_map = model.segment(image).anomaly_map
            masks = [anomaly_map > threshold for threshold in THRESHOLDS]
            if truth.any():
                ious.append([float((mask & truth).sum() / (mask | truth).sum()) for mask in masks])
            else:
                empties.append([not mask.any() for mask in masks])
        splits[name] = {
            "iou": [round(float(value), 4) for value in np.mean(ious, axis=0)],
            "empty_normal": [round(float(value), 4) for value in np.mean(empties, axis=0)],
        }
    result: dict[str, Any] = {"checkpoint": options.checkpoint, "keep": options.keep, "thresholds": THRESHOLDS, "splits": splits}
    result |= {"proposed": proposed(splits, options.keep), "environment": environment()}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"proposed threshold {result['proposed']}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
