"""The evaluation of one data set: predictions in, metrics out, a picture at a time.

Pixels are pooled over a category at every picture's own size; the paper does not state its evaluation size, so numbers compare best with
numbers made here. CONVENTIONS says so in every result. Who predicts and who writes tables is not known here: observers are told of every
picture as soon as it is judged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.datasets import Judged
from benchmarks.metrics import AUPRO_LIMIT, PixelScores, image_auroc, intersection_over_union, is_empty

__all__ = ["CONVENTIONS", "METRICS", "Observation", "Observer", "Predict", "Prediction", "Progress", "evaluate", "mean_metrics"]

METRICS = ("ap", "f1_max", "aupro", "iou_anomalous", "found_anomalous", "empty_normal", "image_auroc")
CONVENTIONS: dict[str, Any] = {
    "pixels": "pooled over a category's pictures, each at its own size; only the model's map is resized, to its picture",
    "threshold": "the model's own, 0.5 for a baseline, unless --threshold says otherwise: a "
    "picture is anomalous where its map exceeds it; its mask holds "
    "the pixels above the relative threshold times the map's maximum, or above the threshold where that is lower",
    "mean": "macro mean over categories; what is undefined for a category is left out",
    "image_score": "the anomaly map's maximum",
    "regions": "8-connected, for AUPRO",
    "aupro_limit": AUPRO_LIMIT,
}


class Prediction(NamedTuple):
    """What a model says of one picture, at the picture's size."""

    anomaly_map: npt.NDArray[np.float32]  # [H, W] in [0, 1]
    mask: npt.NDArray[np.bool_]  # [H, W]
    score: float  # of the whole picture
    text: str = ""


@dataclass(frozen=True, eq=False)
class Observation:
    """One judged picture.

    Attributes:
        is_anomalous: the item's, or whether a region holds a part of its defect; None where nothing is known.
        truth: bool [H, W]; None where nothing is known.
        iou: None unless the picture is anomalous.
        ap: of this picture's pixels alone, None unless the picture is anomalous. A category's AP is not the mean of these.
        seconds: the prediction took, reading the file included.
    """

    item: Judged
    prediction: Prediction
    is_anomalous: bool | None
    truth: npt.NDArray[np.bool_] | None
    iou: float | None
    ap: float | None
    seconds: float


Predict = Callable[[Judged], Prediction]
Progress = Callable[[Sequence[Judged]], Iterable[Judged]]
Observer = Callable[[Observation], None]


def evaluate(
    items: Iterable[Judged],
    predict: Predict,
    progress: Progress = iter,
    observers: Sequence[Observer] = (),
    region: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """{"categories": {name: metrics}, "mean": metrics} of what predict says about each picture.

    Metrics are fractions, or None where they are undefined: ap, f1_max, aupro, iou_anomalous and found_anomalous (the share with a mask
    that is not empty, wherever it lies) without anomalous pictures, empty_normal without normal ones, image_auroc without both, aupro also
    without normal pixels. Beside them stand the counts images and normal_images, and ap_error, f1_max_error and aupro_error, the most by
    which binning can have moved the three (F1-max downwards alone, see PixelScores). The mean is over categories, ignoring None; its counts
    are sums, its errors the largest. Pictures of which nothing is known count as images only.

    `progress` wraps the sequence of items, as tqdm does; they are taken category by category, so that one category's pixels are held at a
    time. With a region (bool [H, W], of every picture's size), pixels outside it are not judged, and a picture whose defect lies outside
    it is a normal one; what predict says there must be 0. Raises DatasetError for a bad mask and ValueError, naming the picture, for a bad
    prediction.
    """
    by_category: dict[str, list[Judged]] = {}
    for item in items:
        by_category.setdefault(item.category, []).append(item)
    if not by_category:
        raise ValueError("items: expected at least one, got none; check the manifest and --split")
    ordered = [item for group in by_category.values() for item in group]
    categories = {
        name: _evaluate_category(group, predict, observers, region)
        for name, group in groupby(progress(ordered), key=lambda item: item.category)
    }
    return {"categories": categories, "mean": mean_metrics(list(categories.values()))}


def _evaluate_category(
    items: Iterable[Judged], predict: Predict, observers: Sequence[Observer], region: npt.NDArray[np.bool_] | None
) -> dict[str, Any]:
    pixels = PixelScores(regions=True)
    overlaps: list[float] = []  # of the anomalous pictures
    found: list[bool] = []
    empty: list[bool] = []  # of the normal pictures
    scores: list[float] = []
    anomalous: list[bool] = []
    images = 0
    for item in items:
        started = time.perf_counter()
        prediction = Prediction(*predict(item))
        seconds = time.perf_counter() - started
        _check_prediction(item, prediction)
        images += 1
        is_anomalous, truth, iou, ap = item.is_anomalous, None, None, None
        if is_anomalous is not None:
            truth = item.read_mask(*prediction.anomaly_map.shape)
            if region is not None:
                truth &= region
                is_anomalous = bool(truth.any())
            ap = _add(pixels, item, prediction, truth, region)
            if is_anomalous:
                iou = intersection_over_union(prediction.mask, truth)
                overlaps.append(iou)
                found.append(not is_empty(prediction.mask))
            else:
                empty.append(is_empty(prediction.mask))
            scores.append(prediction.score)
            anomalous.append(is_anomalous)
        for observe in observers:
            observe(Observation(item, prediction, is_anomalous, truth, iou, ap, seconds))
    ap, f1_max, aupro = pixels.average_precision(), pixels.f1_max(), pixels.aupro()
    f1_bound = pixels.f1_max_bound()
    return {
        "ap": ap,
        "f1_max": f1_max,
        "aupro": aupro,
        "iou_anomalous": _mean(overlaps),
        "found_anomalous": _mean(found),
        "empty_normal": _mean(empty),
        "image_auroc": image_auroc(scores, anomalous),
        "images": images,
        "normal_images": len(empty),
        "ap_error": _error(ap, pixels.average_precision_bounds()),
        "f1_max_error": None if f1_max is None or f1_bound is None else f1_bound - f1_max,
        "aupro_error": _error(aupro, pixels.aupro_bounds()),
    }


def _add(
    pixels: PixelScores, item: Judged, prediction: Prediction, truth: npt.NDArray[np.bool_], region: npt.NDArray[np.bool_] | None
) -> float | None:
    """Pools one picture and returns its own AP: binned once, for both."""
    alone = PixelScores(regions=True)
    try:
        alone.add(prediction.anomaly_map, truth, region)
    except ValueError as error:
        raise ValueError(f"{item.image}: anomaly map: {error}") from error
    pixels.merge(alone)
    return alone.average_precision()


def _error(value: float | None, bounds: tuple[float, float] | None) -> float | None:
    return None if value is None or bounds is None else max(bounds[1] - value, value - bounds[0])


def _check_prediction(item: Judged, prediction: Prediction) -> None:
    anomaly_map, mask, score = prediction.anomaly_map, prediction.mask, prediction.score
    if anomaly_map.ndim != 2:
        raise ValueError(f"{item.image}: anomaly map: expected [H, W], got {list(anomaly_map.shape)}; predict one image at a time")
    if anomaly_map.shape not in item.shapes():
        raise ValueError(
            f"{item.image}: anomaly map: expected {list(item.shapes()[0])} as the image, "
            f"got {list(anomaly_map.shape)}; bring the map back to the image's size"
        )
    if mask.shape != anomaly_map.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"{item.image}: mask: expected bool {list(anomaly_map.shape)} as the anomaly map, "
            f"got {mask.dtype} {list(mask.shape)}; give both at the image's size"
        )
    if not math.isfinite(score):
        raise ValueError(f"{item.image}: score: expected a finite number, got {score}; look for an overflow in the model (fp16?)")


def mean_metrics(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The macro mean of categories, or of data sets' means: None is left out, counts are summed, of errors the largest is taken."""
    mean: dict[str, Any] = {name: _mean([part[name] for part in parts if part[name] is not None]) for name in METRICS}
    mean |= {name: sum(part[name] for part in parts) for name in ("images", "normal_images")}
    errors = ("ap_error", "f1_max_error", "aupro_error")
    return mean | {name: max((part[name] for part in parts if part[name] is not None), default=None) for name in errors}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
