"""`evaluate` on generated data: metrics that were counted by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged_parts import HEIGHT, WIDTH, perfect, says, truth, write_dataset

from agvas.training.sources.manifest import Item, read_manifest
from benchmarks import evaluation
from benchmarks.datasets import Judged
from benchmarks.evaluation import Prediction, evaluate
from benchmarks.metrics import PixelScores


def test_a_perfect_prediction_scores_one_in_everything(parts: Path) -> None:
    result = evaluate(read_manifest(parts), perfect)
    bolt = result["categories"]["bolt"]
    for name in evaluation.METRICS:
        assert bolt[name] == 1.0
    assert (bolt["images"], bolt["normal_images"], bolt["ap_error"], bolt["f1_max_error"]) == (4, 2, 0.0, 0.0)


def test_errors_of_binning_stand_beside_what_it_moved(parts: Path) -> None:
    """Scores that share a bin: the exact F1-max is 1, and the error says that it may be."""
    almost = np.where(truth(), np.float32(0.3) + np.float32(2**-20), np.float32(0.3))
    assert len(np.unique(almost)) == 2
    result = evaluate(read_manifest(parts)[:1], says(almost, truth()))
    bolt = result["categories"]["bolt"]
    assert bolt["f1_max"] < 0.9 and bolt["f1_max"] + bolt["f1_max_error"] == pytest.approx(1)
    assert bolt["ap"] < 0.9 and bolt["ap_error"] > 0.1 and bolt["aupro_error"] > 0.1
    assert result["mean"]["f1_max_error"] == bolt["f1_max_error"]


def test_predicting_nothing_scores_the_share_of_pixels_and_empties_every_normal(parts: Path) -> None:
    nothing = says(np.zeros((HEIGHT, WIDTH), np.float32), np.zeros((HEIGHT, WIDTH), bool))
    bolt = evaluate(read_manifest(parts), nothing)["categories"]["bolt"]
    share = 80 / (4 * 187)  # pooled over the category, normal images included
    assert bolt["ap"] == pytest.approx(share)
    assert bolt["f1_max"] == pytest.approx(2 * share / (1 + share))
    assert (bolt["iou_anomalous"], bolt["found_anomalous"], bolt["empty_normal"], bolt["image_auroc"]) == (0.0, 0.0, 1.0, 0.5)


def test_a_region_leaves_out_what_lies_outside_it_as_if_the_pictures_ended_there(tmp_path: Path) -> None:
    """Judged in a rectangle, metrics are those of the rectangle cut out, and a defect beside it is none."""
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", ""), ("c", 0, "", "")))
    rows, columns = np.flatnonzero(truth().any(1)), np.flatnonzero(truth().any(0))
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[: rows[1] + 1, : columns[2] + 1] = True  # holds a corner of the defect
    maps = {name: np.random.default_rng(seed).random((HEIGHT, WIDTH), np.float32) for seed, name in enumerate("abc")}

    def predict(item: Judged) -> Prediction:
        anomaly_map = np.where(region, maps[item.image.stem], np.float32(0))
        return Prediction(anomaly_map, anomaly_map > 0.5, float(anomaly_map.max()))

    seen: list[evaluation.Observation] = []
    metrics = evaluate(items, predict, observers=[seen.append], region=region)["categories"]["set"]
    pixels = PixelScores(regions=True)
    for name in "abc":
        cut = np.ix_(region.any(1), region.any(0))
        pixels.add(maps[name][cut], (truth() if name != "c" else np.zeros_like(truth()))[cut])
    assert (metrics["ap"], metrics["aupro"], metrics["f1_max"]) == (pixels.average_precision(), pixels.aupro(), pixels.f1_max())
    assert [one.is_anomalous for one in seen] == [True, True, False]

    beside = ~truth()
    metrics = evaluate(items, says(np.zeros((HEIGHT, WIDTH), np.float32), np.zeros((HEIGHT, WIDTH), bool)), region=beside)["mean"]
    assert (metrics["normal_images"], metrics["empty_normal"], metrics["ap"]) == (3, 1.0, None)


def test_pixels_are_pooled_over_images_before_they_are_ranked(tmp_path: Path) -> None:
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", "")))

    def faint_then_strong(item: Judged) -> Prediction:
        """Each image ranks its own pixels perfectly, but a's anomaly is fainter than b's background."""
        faint = item.image.name == "a.png"
        values = np.where(truth(), 0.2 if faint else 0.9, 0.1 if faint else 0.5).astype(np.float32)
        return Prediction(values, truth(), 1.0)

    metrics = evaluate(items, faint_then_strong)["categories"]["set"]
    assert metrics["ap"] == pytest.approx(0.5 * 1.0 + 0.5 * 80 / (80 + 147))
    assert metrics["iou_anomalous"] == 1.0


def test_iou_is_a_mean_over_anomalous_images_and_not_over_pixels(tmp_path: Path) -> None:
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", ""), ("c", 0, "", "")))

    def predict(item: Judged) -> Prediction:
        mask = np.ones((HEIGHT, WIDTH), bool) if item.image.name in ("b.png", "c.png") else truth()
        return Prediction(truth().astype(np.float32), mask, 0.0)

    metrics = evaluate(items, predict)["categories"]["set"]
    assert metrics["iou_anomalous"] == pytest.approx((1 + 40 / 187) / 2)
    assert (metrics["found_anomalous"], metrics["empty_normal"]) == (1.0, 0.0)


def test_found_is_a_share_of_the_anomalous_pictures_wherever_the_mask_lies(tmp_path: Path) -> None:
    items = read_manifest(write_dataset(tmp_path / "set", ("a", 1, "", ""), ("b", 1, "", ""), ("c", 1, "", ""), ("d", 0, "", "")))

    def predict(item: Judged) -> Prediction:
        mask = np.zeros((HEIGHT, WIDTH), bool) if item.image.name == "b.png" else ~truth()
        return Prediction(truth().astype(np.float32), mask, 0.0)

    metrics = evaluate(items, predict)["categories"]["set"]
    assert (metrics["iou_anomalous"], metrics["found_anomalous"]) == (0.0, pytest.approx(2 / 3))


def test_undefined_metrics_are_none_and_left_out_of_the_mean(parts: Path) -> None:
    result = evaluate(read_manifest(parts), perfect)
    nut = result["categories"]["nut"]
    assert nut["empty_normal"] is nut["image_auroc"] is None and nut["ap"] == 1.0
    assert result["mean"]["empty_normal"] == 1.0
    assert result["mean"]["images"] == 5
    normals = [item for item in read_manifest(parts) if not item.is_anomalous]
    bolt = evaluate(normals, perfect)["categories"]["bolt"]
    assert bolt["ap"] is bolt["f1_max"] is bolt["iou_anomalous"] is bolt["found_anomalous"] is None
    assert bolt["ap_error"] is bolt["f1_max_error"] is bolt["aupro_error"] is None
    assert bolt["empty_normal"] == 1.0


def test_the_mean_weighs_categories_alike_whatever_their_number_of_images(parts: Path) -> None:
    def only_bolts(item: Judged) -> Prediction:
        said = perfect(item)
        return said._replace(mask=said.mask & (item.image.name != "b.png"))

    mean = evaluate(read_manifest(parts), only_bolts)["mean"]
    assert mean["iou_anomalous"] == 0.5  # bolt 1 (two images), nut 0 (one image)


def test_progress_sees_every_item_once_and_category_by_category(parts: Path) -> None:
    seen: list[str] = []

    def watch(items: Sequence[Item]) -> Iterable[Item]:
        assert len(items) == 5
        for item in items:
            seen.append(item.category)
            yield item

    evaluate(read_manifest(parts), perfect, progress=watch)
    assert seen == ["bolt"] * 4 + ["nut"]


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (says(np.zeros((7, 5), np.float32), np.zeros((7, 5), bool)), r"expected \[11, 17\] as the image, got \[7, 5\]"),
        (says(np.zeros((1, 11, 17), np.float32), np.zeros((11, 17), bool)), r"expected \[H, W\]"),
        (says(np.zeros((11, 17), np.float32), np.zeros((17, 11), bool)), r"mask: expected bool \[11, 17\]"),
        (says(np.zeros((11, 17), np.float32), np.zeros((11, 17), np.uint8)), "got uint8"),
        (says(np.full((11, 17), 7, np.float32), np.zeros((11, 17), bool)), "values from 7 to 7"),
        (says(np.full((11, 17), np.nan, np.float32), np.zeros((11, 17), bool)), "187 NaN of 187"),
        (says(np.zeros((11, 17), np.float32), np.zeros((11, 17), bool), math.nan), "score: expected a finite"),
    ],
)
def test_a_bad_prediction_is_refused_naming_its_image(parts: Path, prediction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        evaluate(read_manifest(parts), prediction)
    assert str(parts / "images/a.png") in str(raised.value)


def test_no_items_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        evaluate([], perfect)
