"""Where a checkpoint's masks should begin, judged on drawn defects alone: held-out procedural samples, and photographs with drawn defects.

    python -m benchmarks.threshold --checkpoint nano --output benchmarks/results/threshold_nano.json

Two numbers cut a mask from a map (runtime.masking). The threshold tells normal pictures from anomalous ones, judged by the share of
anomalous pictures found plus the share of normal ones left empty (Youden's index), the mean over both splits. A few hundred pictures do not
tell neighbouring thresholds apart: proposed is the lowest, nearest to the paper's, within one standard error of the best. The relative
threshold tells how far a defect reaches: proposed is the one with the highest IoU on anomalous pictures at that threshold, again the
mean over both. Nothing real that the package is measured on takes part. The seeds are no training's, no parity picture's and no demo
picture's.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from agvas import load
from agvas.training.procedural import make_sample
from benchmarks.demo import DEFECTS, SCENES, SURFACES, photographs_of, with_defect
from benchmarks.environment import environment
from runtime.masking import MaskRule

THRESHOLDS = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
RELATIVE = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 1.0)
PROCEDURAL_SEED, PHOTOGRAPH_SEED = 7_000_000_000, 9_500_000_000
SIZE = (360, 480)

Picture = tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]


def procedural(count: int) -> Iterator[Picture]:
    """Held-out samples with their truth, two in five of them normal."""
    for number in range(count):
        sample = make_sample(PROCEDURAL_SEED + number, *SIZE)
        yield sample.image, sample.mask


def photographs(count: int) -> Iterator[Picture]:
    """`count` photographs with one drawn defect each, and the quarters and ninths of every photograph as they are."""
    every = [image for _, image in photographs_of(SURFACES + SCENES)]
    for number in range(count):
        turn, which = divmod(number, len(every))
        image, truth, _ = with_defect(every[which], DEFECTS[turn % len(DEFECTS)], PHOTOGRAPH_SEED + 100 * number)
        yield image, truth
    for image in every:
        for parts in (2, 3):
            height, width = (side // parts for side in image.shape[:2])
            for top in range(0, parts * height, height):
                for left in range(0, parts * width, width):
                    yield np.ascontiguousarray(image[top : top + height, left : left + width]), np.zeros((height, width), bool)


@dataclass(frozen=True)
class Split:
    """What a split's pictures say of every rule.

    Attributes:
        anomalous, normal: pictures.
        found: share of anomalous pictures that are, by threshold.
        empty: share of normal pictures left empty, by threshold.
        iou: mean on anomalous pictures, by relative threshold and threshold.
    """

    anomalous: int
    normal: int
    found: list[float]
    empty: list[float]
    iou: list[list[float]]


def measured(pictures: Iterable[Picture], map_of: Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]) -> Split:
    found, empty, ious = [], [], []
    for image, truth in pictures:
        anomaly_map = map_of(image)
        above = [bool(anomaly_map.max() > np.float32(threshold)) for threshold in THRESHOLDS]
        if not truth.any():
            empty.append([not each for each in above])
            continue
        found.append(above)
        masks = [[MaskRule(threshold, relative).mask(anomaly_map) for threshold in THRESHOLDS] for relative in RELATIVE]
        ious.append([[float((mask & truth).sum() / (mask | truth).sum()) for mask in row] for row in masks])
    return Split(len(found), len(empty), *(np.mean(values, axis=0).round(4).tolist() for values in (found, empty, ious)))


def proposed(splits: Sequence[Split]) -> MaskRule:
    """See the module's docstring; of equal relative thresholds the higher, which changes less of the paper's rule."""
    youden = np.mean([np.add(split.found, split.empty) for split in splits], axis=0)
    best = int(youden.argmax())
    variance = sum(_variance(split.found[best], split.anomalous) + _variance(split.empty[best], split.normal) for split in splits)
    place = int(np.argmax(youden >= youden[best] - variance**0.5 / len(splits)))  # the first that is
    iou = np.mean([split.iou for split in splits], axis=0)[:, place]
    return MaskRule(THRESHOLDS[place], RELATIVE[len(RELATIVE) - 1 - int(iou[::-1].argmax())])


def _variance(share: float, count: int) -> float:
    """Of a share of `count` pictures."""
    return share * (1 - share) / count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threshold", description=__doc__)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--procedural", type=int, default=200, help="held-out samples (default 200)")
    parser.add_argument("--photographs", type=int, default=72, help="photographs with a drawn defect (default 72)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(argv)
    model = load(options.checkpoint)
    sources = {"procedural": procedural(options.procedural), "photographs": photographs(options.photographs)}
    splits = {
        name: measured(tqdm(pictures, desc=name, unit="image"), lambda image: model.segment(image).anomaly_map)
        for name, pictures in sources.items()
    }
    rule = proposed(list(splits.values()))
    result: dict[str, Any] = {"checkpoint": options.checkpoint, "thresholds": THRESHOLDS, "relative_thresholds": RELATIVE}
    result |= {"splits": {name: asdict(split) for name, split in splits.items()}, "proposed": asdict(rule), "environment": environment()}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"proposed threshold {rule.threshold}, relative threshold {rule.relative_threshold}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
