"""agvas-eval: the paper's metrics of a bundle, a checkpoint or a trivial baseline on manifest data sets.

Pixels are pooled over a category at every image's own size; the paper does not state its evaluation size, so numbers
compare best with numbers of this command. The whole set is read and checked before a model is loaded. Nothing is
trained or tuned here, and thresholds are the model's own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agvas.training.sources.errors import DatasetError
from agvas.training.sources.manifest import Item, read_manifest
from benchmarks.metrics import PixelScores, image_auroc, intersection_over_union, is_empty

__all__ = ["evaluate", "evaluate_datasets", "main", "mean_metrics", "open_predictor"]

Prediction = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], float]
"""(anomaly map float32 [H, W] in [0, 1], mask bool [H, W], image score), all at the image's size."""
Predict = Callable[[Path], Prediction]
Progress = Callable[[Sequence[Item]], Iterable[Item]]

_MAP_SLACK = 1e-4  # as runtime.segmentation allows
METRICS = ("ap", "f1_max", "iou_anomalous", "empty_normal", "image_auroc")
BASELINES = ("constant", "median", "gradient")  # as in baselines.py, which loads OpenCV; a test compares the two


def evaluate(items: Iterable[Item], predict: Predict, progress: Progress = iter) -> dict[str, Any]:
    """{"categories": {name: metrics}, "mean": metrics} of what predict says about each item's image.

    Metrics are fractions, or None where they are undefined: ap, f1_max and iou_anomalous without anomalous images,
    empty_normal without normal ones, image_auroc without both. Beside them stand the counts images and normal_images,
    and ap_error, the most by which binning can have moved ap (see PixelScores). The mean is over categories, ignoring
    None; its counts are sums, its ap_error the largest. `progress` wraps the sequence of items, as tqdm does; they are
    taken category by category, so that one category's pixels are held at a time. Raises DatasetError for a bad mask and
    ValueError, naming the image, for a bad prediction.
    """
    by_category: dict[str, list[Item]] = {}
    for item in items:
        by_category.setdefault(item.category, []).append(item)
    if not by_category:
        raise ValueError("items: expected at least one, got none; check the manifest and --split")
    ordered = [item for group in by_category.values() for item in group]
    categories = {name: _evaluate_category(group, predict) for name, group in groupby(progress(ordered), key=lambda item: item.category)}
    return {"categories": categories, "mean": mean_metrics(list(categories.values()))}


def _evaluate_category(items: Iterable[Item], predict: Predict) -> dict[str, Any]:
    pixels = PixelScores()
    overlaps: list[float] = []  # of the anomalous images
    empty: list[bool] = []  # of the normal images
    scores: list[float] = []
    anomalous: list[bool] = []
    for item in items:
        anomaly_map, mask, score = predict(item.image)
        _check_prediction(item, anomaly_map, mask, score)
        truth = item.read_mask(*anomaly_map.shape)
        try:
            pixels.add(anomaly_map, truth)
        except ValueError as error:
            raise ValueError(f"{item.image}: anomaly map: {error}") from error
        if item.is_anomalous:
            overlaps.append(intersection_over_union(mask, truth))
        else:
            empty.append(is_empty(mask))
        scores.append(score)
        anomalous.append(item.is_anomalous)
    ap, bounds = pixels.average_precision(), pixels.average_precision_bounds()
    return {
        "ap": ap,
        "f1_max": pixels.f1_max(),
        "iou_anomalous": _mean(overlaps),
        "empty_normal": _mean(empty),
        "image_auroc": image_auroc(scores, anomalous),
        "images": len(scores),
        "normal_images": len(empty),
        "ap_error": None if ap is None or bounds is None else max(bounds[1] - ap, ap - bounds[0]),
    }


def _check_prediction(item: Item, anomaly_map: npt.NDArray[Any], mask: npt.NDArray[Any], score: float) -> None:
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
    """The macro mean of categories, or of data sets' means: None is left out, counts are summed."""
    mean: dict[str, Any] = {name: _mean([part[name] for part in parts if part[name] is not None]) for name in METRICS}
    mean |= {name: sum(part[name] for part in parts) for name in ("images", "normal_images")}
    mean["ap_error"] = max((part["ap_error"] for part in parts if part["ap_error"] is not None), default=None)
    return mean


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def evaluate_datasets(
    folders: Sequence[Path],
    open_predict: Callable[[], Predict],
    limit: int | None = None,
    split: str | None = None,
    progress: Callable[[str], Progress] = lambda name: iter,
) -> list[dict[str, Any]]:
    """`evaluate` of each folder, with its name as "dataset". Every manifest is read before open_predict is called,
    once.

    With `limit`, that many images of each set, evenly spaced over its manifest (so that sorted kinds and labels all
    take part); with `split`, only the lines that say so. `progress` gives, for a data set's name, what wraps its items.
    """
    chosen = [(folder.resolve().name, _choose(folder, limit, split)) for folder in folders]
    predict = open_predict()
    return [{"dataset": name, **evaluate(items, predict, progress(name))} for name, items in chosen]


def _choose(folder: Path, limit: int | None, split: str | None) -> list[Item]:
    items = read_manifest(folder)
    if split is not None:
        splits = sorted({item.split or "(empty)" for item in items})
        items = [item for item in items if item.split == split]
        if not items:
            raise DatasetError(folder / "manifest.csv", None, f"images of split {split}", ", ".join(splits), "give another --split")
    if limit is None or limit >= len(items):
        return items
    return [items[position * len(items) // limit] for position in range(limit)]


def open_predictor(
    bundle: Path | None = None,
    checkpoint: str | None = None,
    baseline: str | None = None,
    engine: str | None = None,
    device: str | None = None,
    inference_precision: str | None = None,
) -> Predict:
    """What predicts, from exactly one of a bundle, a checkpoint ("nano" or a folder) and a baseline's name.

    `engine` and `inference_precision` are for bundles (None: auto, and what Segmenter makes of None), `device` for bundles and
    checkpoints (None: cpu).
    """
    if sum(given is not None for given in (bundle, checkpoint, baseline)) != 1:
        raise ValueError("expected exactly one of bundle, checkpoint and baseline; give one")
    if engine is not None and bundle is None:
        raise ValueError(f"engine: only a bundle has engines, got {engine}; leave --engine out or give --bundle")
    if inference_precision is not None and bundle is None:
        raise ValueError(f"inference precision: only a bundle has one, got {inference_precision}; leave --inference-precision out")
    if device is not None and baseline is not None:
        raise ValueError(f"device: a baseline runs on the CPU, got {device}; leave --device out")
    if bundle is not None:
        return _bundle_predictor(bundle, engine, device, inference_precision)
    if checkpoint is not None:
        return _checkpoint_predictor(checkpoint, device)
    assert baseline is not None
    return _baseline_predictor(baseline)


def _bundle_predictor(bundle: Path, engine: str | None, device: str | None, inference_precision: str | None) -> Predict:
    from runtime import Segmenter

    segmenter = Segmenter(bundle, engine=engine or "auto", device=device or "cpu", inference_precision=inference_precision)

    def predict(path: Path) -> Prediction:
        return _prediction(segmenter(path))

    return predict


def _checkpoint_predictor(checkpoint: str, device: str | None) -> Predict:
    import agvas
    from runtime.images import read_image

    model = agvas.load(checkpoint)
    if device is not None:
        model = model.to(device)

    def predict(path: Path) -> Prediction:
        return _prediction(model.segment(read_image(path)))

    return predict


def _prediction(result: Any) -> Prediction:
    """Of a model's result. Resampling leaves [0, 1] by rounding, which is undone here; more is left, to be refused."""
    anomaly_map = np.asarray(result.anomaly_map)
    if anomaly_map.size and anomaly_map.min() >= -_MAP_SLACK and anomaly_map.max() <= 1 + _MAP_SLACK:
        anomaly_map = anomaly_map.clip(0, 1)
    return anomaly_map, np.asarray(result.mask), float(result.score)


def _baseline_predictor(baseline: str) -> Predict:
    from benchmarks import baselines
    from runtime.images import read_image

    name = next((known for known in baselines.BASELINES if known == baseline), None)
    if name is None:
        raise ValueError(f"baseline: expected one of {', '.join(baselines.BASELINES)}, got {baseline}")

    def predict(path: Path) -> Prediction:
        anomaly_map = baselines.anomaly_map(name, read_image(path))
        return anomaly_map, anomaly_map > baselines.THRESHOLD, float(anomaly_map.max())

    return predict


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row for each category, and the mean of each data set and, where there are several, of all."""
    heads: tuple[str, ...] = (
        "data set",
        "category",
        "images",
        "AP",
        "F1-max",
        "IoU anomalous",
        "empty normal",
        "image AUROC",
    )
    rows = [heads]
    for result in results:
        rows += [_row(result["dataset"], name, metrics) for name, metrics in result["categories"].items()]
        if len(result["categories"]) > 1:
            rows.append(_row(result["dataset"], "mean", result["mean"]))
    if len(results) > 1:
        rows.append(_row("mean", "", mean_metrics([result["mean"] for result in results])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _row(dataset: str, category: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    numbers = ("-" if metrics[name] is None else f"{metrics[name]:.4f}" for name in METRICS)
    return (dataset.replace("|", "\\|"), category.replace("|", "\\|"), str(metrics["images"]), *numbers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agvas-eval",
        description="Pixel AP, F1-max, IoU on anomalous images, empty masks on normal images, and image AUROC.",
    )
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DATASET", help="folder with a manifest.csv")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, metavar="DIR", help="an exported bundle")
    source.add_argument("--checkpoint", metavar="nano|DIR", help="the PyTorch reference")
    source.add_argument("--baseline", choices=BASELINES, help="a trivial map, for comparison")
    parser.add_argument("--engine", help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx; with --bundle")
    parser.add_argument("--device", help="cpu or cuda:N; with --bundle or --checkpoint")
    parser.add_argument("--inference-precision", help="graph or bf16, as agvas-segment has it; with --bundle")
    parser.add_argument("--limit", type=_positive, metavar="N", help="N images of each data set, evenly spaced over its manifest")
    parser.add_argument("--split", help="only the lines whose column split says so")
    parser.add_argument("--json", action="store_true", help="print JSON as the last lines")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the JSON to this file")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _tqdm(name: str) -> Progress:
    from tqdm import tqdm

    return functools.partial(tqdm, desc=name, unit="image", file=sys.stderr, disable=None)  # None: only on a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """The command agvas-eval; 0, or 2 with one line on stderr for bad arguments, data, bundle or engine."""
    arguments = _parser().parse_args(argv)
    from engines.errors import EngineError
    from runtime.errors import AgvasError

    try:
        if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
            raise ValueError(f"--output: expected a file in an existing folder, got {arguments.output}; make the folder first")
        results = evaluate_datasets(
            arguments.datasets,
            lambda: open_predictor(
                arguments.bundle,
                arguments.checkpoint,
                arguments.baseline,
                arguments.engine,
                arguments.device,
                arguments.inference_precision,
            ),
            arguments.limit,
            arguments.split,
            _tqdm,
        )
        mean = mean_metrics([result["mean"] for result in results])
        summary = results[0] if len(results) == 1 else {"datasets": results, "mean": mean}
        print(table(results))
        if arguments.json:
            for line in results if len(results) == 1 else [*results, summary]:
                print(json.dumps(line, allow_nan=False))
        if arguments.output is not None:  # last, so that a full disk does not cost the numbers
            arguments.output.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except ModuleNotFoundError as error:
        print(f'agvas-eval: {error.name} is not installed; pip install "agvas[train]"', file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, EngineError, AgvasError) as error:
        print(f"agvas-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
