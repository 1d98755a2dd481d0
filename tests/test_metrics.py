"""The pixel metrics against scikit-learn, a loop written from the definition, and hand-counted cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from benchmarks import metrics
from benchmarks.metrics import PixelScores, image_auroc, intersection_over_union, is_empty

ROUNDING = 1e-12  # sums of float64 in another order


def pooled(scores: np.ndarray, truth: np.ndarray, parts: int = 1) -> PixelScores:
    pixels = PixelScores()
    for some, true in zip(np.array_split(scores, parts), np.array_split(truth, parts), strict=True):
        pixels.add(some, true)
    return pixels


def slow_oracle(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(AP, F1-max) by their definitions: every distinct score is a threshold, and everything is counted anew for it."""
    ap, f1, recall_before = 0.0, 0.0, 0.0
    for threshold in sorted({float(score) for score in scores}, reverse=True):
        predicted = [float(score) >= threshold for score in scores]
        hits = sum(1 for said, true in zip(predicted, truth, strict=True) if said and true)
        precision, recall = hits / sum(predicted), hits / int(truth.sum())
        ap += (recall - recall_before) * precision
        f1 = max(f1, 2 * precision * recall / (precision + recall) if hits else 0.0)
        recall_before = recall
    return ap, f1


def sklearn_f1_max(scores: np.ndarray, truth: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(truth, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-30)))


def sigmoid_scores(seed: int, size: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping logits of both kinds, so far out that the scores crowd at 0 and at 1."""
    random = np.random.default_rng(seed)
    truth = random.random(size) < 0.07
    logits = random.normal(np.where(truth, 1.0, -1.0), 1.0) * spread
    return (1 / (1 + np.exp(-logits))).astype(np.float32), truth


def test_scores_of_eight_bits_give_the_oracles_values_exactly() -> None:
    random = np.random.default_rng(3)
    truth = random.random(211) < 0.3
    scores = (random.integers(0, 41, 211) + 5 * truth).astype(np.float32) / np.float32(255)  # many ties
    pixels = pooled(scores, truth, parts=5)
    ap, f1 = slow_oracle(scores, truth)
    assert pixels.average_precision() == pytest.approx(ap, abs=ROUNDING)
    assert pixels.average_precision_bounds() == pytest.approx((ap, ap), abs=ROUNDING)
    assert pixels.f1_max() == pytest.approx(f1, abs=ROUNDING)
    assert pixels.f1_max_bound() == pytest.approx(f1, abs=ROUNDING)


def test_the_oracle_agrees_with_scikit_learn() -> None:
    scores, truth = sigmoid_scores(5, 199, 2.0)
    ap, f1 = slow_oracle(scores, truth)
    assert ap == pytest.approx(average_precision_score(truth, scores), abs=ROUNDING)
    assert f1 == pytest.approx(sklearn_f1_max(scores, truth), abs=ROUNDING)


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])  # flat, usual and saturated
def test_continuous_scores_stay_within_the_stated_bound_of_scikit_learn(spread: float) -> None:
    scores, truth = sigmoid_scores(7, 300_007, spread)
    pixels = pooled(scores, truth, parts=11)
    exact = average_precision_score(truth, scores)
    bounds, f1_bound, f1_max = pixels.average_precision_bounds(), pixels.f1_max_bound(), pixels.f1_max()
    assert bounds is not None and f1_bound is not None and f1_max is not None
    lowest, highest = bounds
    assert lowest <= exact <= highest
    assert highest - lowest < 0.003, "a bound that wide says nothing"
    assert pixels.average_precision() == pytest.approx(exact, abs=2e-5)
    f1 = sklearn_f1_max(scores, truth)
    assert f1_max <= f1 + ROUNDING
    assert f1 <= f1_bound + ROUNDING
    assert f1_max == pytest.approx(f1, abs=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_when_few_scores_crowd_into_one_bin_in_any_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.random(29) < 0.4
    truth[0] = True
    one_bin = np.float32(0.3) + np.float32(2**-24) * random.integers(0, 40, 29).astype(np.float32)
    scores = np.where(random.random(29) < 0.8, one_bin, random.random(29).astype(np.float32)).astype(np.float32)
    exact_ap, exact_f1 = slow_oracle(scores, truth)
    pixels = pooled(scores, truth, parts=3)
    bounds, f1_bound, f1_max = pixels.average_precision_bounds(), pixels.f1_max_bound(), pixels.f1_max()
    assert bounds is not None and f1_bound is not None and f1_max is not None
    assert bounds[0] - ROUNDING <= exact_ap <= bounds[1] + ROUNDING
    ap = pixels.average_precision()
    assert ap is not None and bounds[0] - ROUNDING <= ap <= bounds[1] + ROUNDING
    assert f1_max - ROUNDING <= exact_f1 <= f1_bound + ROUNDING


def test_the_extreme_orders_inside_one_bin_are_inside_the_bound_and_not_far_from_it() -> None:
    one_bin = np.float32(0.3) + np.float32(2**-24) * np.arange(8, dtype=np.float32)
    assert len(np.unique(metrics._bin_of(one_bin))) == 1
    for truth, side in ((np.arange(8) >= 4, 1), (np.arange(8) < 4, 0)):  # best order, worst order
        bounds = pooled(one_bin, truth).average_precision_bounds()
        exact = average_precision_score(truth, one_bin)
        assert bounds is not None and bounds[0] - ROUNDING <= exact <= bounds[1] + ROUNDING
        assert abs(bounds[side] - exact) < 0.03


def test_scores_that_crowd_at_either_end_keep_their_order() -> None:
    tiny = np.array([0.0, 1e-30, 1e-12, 1e-7, 1e-3], np.float32)
    scores = np.concatenate(
        [tiny, np.array([0.5], np.float32), np.float32(1.0) - np.array([1e-3, 1e-5, 2.0**-23, 2.0**-24, 0], np.float32)]
    )
    bins = metrics._bin_of(scores)
    assert (np.diff(bins) > 0).all()
    assert bins[0] == 0 and bins[-1] == metrics._BINS - 1


def test_bins_never_reverse_two_scores() -> None:
    scores = np.sort(np.random.default_rng(11).random(100_003).astype(np.float32))
    scores = np.sort(
        np.concatenate([scores, np.nextafter(scores, np.float32(1)), np.array([0.0, 0.5, 1.0], np.float32)])
    )
    assert (np.diff(metrics._bin_of(scores)) >= 0).all()


def test_adding_image_by_image_equals_adding_everything_at_once_in_the_same_memory() -> None:
    scores, truth = sigmoid_scores(13, 50_021, 2.0)
    once, often = pooled(scores, truth), pooled(scores, truth, parts=37)
    assert once.average_precision() == often.average_precision()
    assert once.average_precision_bounds() == often.average_precision_bounds()
    assert sum(array.nbytes for array in vars(often).values()) == sum(array.nbytes for array in vars(once).values())
    assert sum(array.nbytes for array in vars(often).values()) < 12e6
    assert (often.positives, often.negatives) == (int(truth.sum()), int((~truth).sum()))


def test_a_constant_map_has_the_share_of_positives_as_its_precision() -> None:
    truth = np.arange(70).reshape(7, 10) < 7
    pixels = PixelScores()
    pixels.add(np.full((7, 10), 0.25, np.float32), truth)
    assert pixels.average_precision() == pytest.approx(0.1)
    assert pixels.average_precision_bounds() == pytest.approx((0.1, 0.1))
    assert pixels.f1_max() == pytest.approx(2 * 0.1 / 1.1)


def test_without_positive_pixels_ap_and_f1_are_none() -> None:
    pixels = PixelScores()
    assert pixels.average_precision() is None
    pixels.add(np.zeros((2, 3), np.float32), np.zeros((2, 3), bool))
    assert pixels.average_precision() is pixels.f1_max() is None
    assert pixels.average_precision_bounds() is pixels.f1_max_bound() is None


def test_minus_zero_counts_as_zero() -> None:
    pixels = pooled(np.array([-0.0, 0.0], np.float32), np.array([True, False]))
    assert pixels.average_precision_bounds() == (0.5, 0.5)


@pytest.mark.parametrize(
    ("scores", "found", "remedy"),
    [
        (np.array([0.1, np.nan, np.nan], np.float32), "2 NaN of 3", "overflow"),
        (np.array([0.1, 0.2, 1.5], np.float32), "values from 0.1 to 1.5", "sigmoid"),
        (np.array([-0.5, 0.2, 0.3], np.float32), "values from -0.5 to 0.3", "sigmoid"),
        (np.array([0.1, np.inf, 0.3], np.float32), "to inf", "sigmoid"),
        (np.array([0, 128, 255], np.uint8), "uint8", "convert"),
        (np.array([0.1, 0.2], np.float32), "(3,)", "resize"),
    ],
)
def test_bad_scores_are_refused_with_what_was_found_and_what_to_do(scores: np.ndarray, found: str, remedy: str) -> None:
    pixels = PixelScores()
    with pytest.raises(ValueError, match=remedy) as raised:
        pixels.add(scores, np.array([True, False, True]))
    assert found in str(raised.value)
    assert pixels.positives == pixels.negatives == 0, "a refused image must leave nothing behind"


def test_a_truth_that_is_not_bool_is_refused() -> None:
    with pytest.raises(ValueError, match="expected bool, got uint8"):
        PixelScores().add(np.zeros(2, np.float32), np.array([0, 255], np.uint8))  # type: ignore[arg-type]


def test_intersection_over_union_counts_pixels_by_hand() -> None:
    truth = np.zeros((5, 7), bool)
    truth[1:3, 1:4] = True  # 6 pixels
    predicted = np.zeros((5, 7), bool)
    predicted[2:4, 2:5] = True  # 6 pixels, 2 shared
    assert intersection_over_union(predicted, truth) == 2 / 10
    assert intersection_over_union(np.zeros((5, 7), bool), truth) == 0.0
    assert intersection_over_union(truth, truth) == 1.0


def test_intersection_over_union_refuses_empty_truth_and_other_shapes() -> None:
    with pytest.raises(ValueError, match="empty mask"):
        intersection_over_union(np.ones((2, 3), bool), np.zeros((2, 3), bool))
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(3, 2\)"):
        intersection_over_union(np.ones((3, 2), bool), np.ones((2, 3), bool))


def test_one_pixel_makes_a_mask_non_empty() -> None:
    mask = np.zeros((5, 7), bool)
    assert is_empty(mask)
    mask[4, 6] = True
    assert not is_empty(mask)


def test_image_auroc_agrees_with_scikit_learn_with_ties() -> None:
    random = np.random.default_rng(17)
    labels = random.random(101) < 0.4
    scores = (random.integers(0, 9, 101) + 3 * labels) / 10
    assert image_auroc(scores.tolist(), labels.tolist()) == pytest.approx(roc_auc_score(labels, scores), abs=ROUNDING)


def test_image_auroc_is_none_for_one_kind_of_image_and_refuses_nan() -> None:
    assert image_auroc([0.1, 0.2], [True, True]) is None
    assert image_auroc([0.1, 0.2], [False, False]) is None
    assert image_auroc([0.1, 0.1], [False, True]) == 0.5
    with pytest.raises(ValueError, match="1 NaN of 2"):
        image_auroc([0.1, float("nan")], [False, True])
