"""The pixel metrics against scikit-learn, a loop written from the definition, and hand-counted cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from benchmarks import metrics, metrics_at_scale
from benchmarks.metrics import PixelScores, image_auroc, intersection_over_union, is_empty
from benchmarks.regions import region_weights

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


def held_bytes(pixels: PixelScores) -> int:
    return sum(getattr(value, "nbytes", 0) for value in vars(pixels).values())


def test_adding_image_by_image_equals_adding_everything_at_once_in_the_same_memory() -> None:
    scores, truth = sigmoid_scores(13, 50_021, 2.0)
    once, often = pooled(scores, truth), pooled(scores, truth, parts=37)
    assert once.average_precision() == often.average_precision()
    assert once.average_precision_bounds() == often.average_precision_bounds()
    assert held_bytes(often) == held_bytes(once) < 12e6
    assert held_bytes(regions_pooled(*smooth_case(0, None))) < 16e6
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


# Regions and AUPRO.


def flooded(mask: np.ndarray) -> np.ndarray:
    """Region numbers from 1, by flooding from one pixel after another to its eight neighbours."""
    numbers, count = np.zeros(mask.shape, int), 0
    for seed in zip(*np.nonzero(mask), strict=True):
        if numbers[seed]:
            continue
        count += 1
        waiting = [seed]
        while waiting:
            y, x = waiting.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not numbers[y, x]:
                numbers[y, x] = count
                waiting += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return numbers


def slow_aupro(maps: list[np.ndarray], truths: list[np.ndarray], limit: float) -> float:
    """From the definition: a point of the curve for each distinct score, every region and normal pixel counted anew for it."""
    numbered = [(scores, flooded(truth)) for scores, truth in zip(maps, truths, strict=True)]
    regions = [(scores, numbers == k) for scores, numbers in numbered for k in range(1, numbers.max() + 1)]
    normal = np.concatenate([scores[~truth] for scores, truth in zip(maps, truths)])
    points = [(0.0, 0.0)]
    for threshold in sorted({float(score) for scores in maps for score in scores.ravel()}, reverse=True):
        overlap = np.mean([np.mean(scores[region] >= threshold) for scores, region in regions])
        points.append((float(np.mean(normal >= threshold)), float(overlap)))
    area = 0.0
    for (left, low), (right, high) in zip(points, points[1:]):
        if left < limit and right > left:
            end = min(right, limit)
            area += (end - left) * (low + (low + (high - low) * (end - left) / (right - left))) / 2
    return area / limit


def regions_pooled(maps: list[np.ndarray], truths: list[np.ndarray]) -> PixelScores:
    pixels = PixelScores(regions=True)
    for scores, truth in zip(maps, truths, strict=True):
        pixels.add(scores, truth)
    return pixels


def smooth_case(seed: int, levels: int | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three images of unlike sizes, one of them normal, with blobs that touch borders and a map that half knows them."""
    random = np.random.default_rng(seed)
    maps, truths = [], []
    for shape, share in (((13, 17), 0.2), ((9, 11), 0.4), ((11, 7), 0.0)):
        field = gaussian_filter(random.standard_normal(shape), 1.2)
        truth = field > np.quantile(field, 1 - share) if share else np.zeros(shape, bool)
        logits = gaussian_filter(random.standard_normal(shape), 1.0) * 4 + 1.5 * truth
        scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        maps.append(scores if levels is None else (np.rint(scores * levels) / levels).astype(np.float32))
        truths.append(truth)
    return maps, truths


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_aupro_of_tied_scores_is_the_slow_oracles(seed: int, limit: float) -> None:
    maps, truths = smooth_case(seed, levels=20)
    pixels = regions_pooled(maps, truths)
    expected = slow_aupro(maps, truths, limit)
    assert pixels.aupro(limit) == pytest.approx(expected, abs=ROUNDING)
    assert pixels.aupro_bounds(limit) == pytest.approx((expected, expected), abs=ROUNDING)


@pytest.mark.parametrize("seed", range(5))
def test_aupro_of_continuous_scores_stays_within_its_bounds(seed: int) -> None:
    maps, truths = smooth_case(seed, levels=None)
    pixels = regions_pooled(maps, truths)
    expected, bounds, aupro = slow_aupro(maps, truths, 0.3), pixels.aupro_bounds(), pixels.aupro()
    assert bounds is not None and aupro is not None
    assert bounds[0] - ROUNDING <= expected <= bounds[1] + ROUNDING
    assert bounds[0] <= aupro <= bounds[1] and bounds[1] - bounds[0] < 0.02


@pytest.mark.parametrize("seed", range(20))
def test_the_bounds_of_aupro_hold_and_bind_when_scores_crowd_into_one_bin(seed: int) -> None:
    random = np.random.default_rng(seed)
    one_bin = np.float32(0.3) + np.float32(2**-24) * random.integers(0, 40, (9, 11)).astype(np.float32)
    scores = np.where(random.random((9, 11)) < 0.8, one_bin, random.random((9, 11)).astype(np.float32)).astype(np.float32)
    truth = random.random((9, 11)) < 0.15
    bounds = regions_pooled([scores], [truth]).aupro_bounds()
    assert bounds is not None
    assert bounds[0] - ROUNDING <= slow_aupro([scores], [truth], 0.3) <= bounds[1] + ROUNDING
    assert bounds[1] - bounds[0] > 0.1, "four fifths of the scores share a bin: bounds that narrow cannot hold for every order"


def test_aupro_weighs_a_region_of_one_pixel_like_one_of_forty() -> None:
    truth = np.zeros((11, 17), bool)
    truth[2:6, 3:13] = True
    truth[10, 16] = True  # in the corner
    scores = np.where(truth, np.float32(0.9), np.float32(0.1))
    assert regions_pooled([scores], [truth]).aupro() == pytest.approx(1.0, abs=ROUNDING)
    scores[10, 16] = 0.0  # the small one is missed until everything is found
    assert regions_pooled([scores], [truth]).aupro() == pytest.approx(0.5, abs=ROUNDING)
    inverted = np.where(truth, np.float32(0.1), np.float32(0.9))
    assert regions_pooled([inverted], [truth]).aupro() == 0.0


def test_aupro_of_a_constant_map_is_the_diagonal() -> None:
    truth = np.eye(7, dtype=bool)
    pixels = regions_pooled([np.full((7, 7), 0.5, np.float32)], [truth])
    assert pixels.aupro(0.3) == pytest.approx(0.15, abs=ROUNDING)
    assert pixels.aupro(1.0) == pytest.approx(0.5, abs=ROUNDING)


def test_aupro_is_none_without_regions_or_without_normal_pixels() -> None:
    scores = np.full((3, 4), 0.5, np.float32)
    for truth in (np.zeros((3, 4), bool), np.ones((3, 4), bool)):
        pixels = regions_pooled([scores], [truth])
        assert pixels.aupro() is pixels.aupro_bounds() is None


def test_aupro_refuses_what_it_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="regions=True"):
        PixelScores().aupro()
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0"):
        PixelScores(regions=True).aupro(0)
    with pytest.raises(ValueError, match=r"expected bool \[H, W\], got bool \[6\]"):
        PixelScores(regions=True).add(np.zeros(6, np.float32), np.zeros(6, bool))
    with pytest.raises(ValueError, match="one of each"):
        PixelScores(regions=True).merge(PixelScores())


def test_merging_gives_what_adding_everything_to_one_gives() -> None:
    for levels in (None, 20):
        maps, truths = smooth_case(11, levels)
        whole, merged = regions_pooled(maps, truths), PixelScores(regions=True)
        for scores, truth in zip(maps, truths, strict=True):
            merged.merge(regions_pooled([scores], [truth]))
        assert merged.average_precision_bounds() == whole.average_precision_bounds()
        assert merged.average_precision() == whole.average_precision() and merged.f1_max() == whole.f1_max()
        assert merged.aupro_bounds() == pytest.approx(whole.aupro_bounds(), abs=ROUNDING)


def test_merging_sees_two_scores_of_one_bin_that_come_from_two_images() -> None:
    first, second = np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))
    merged = pooled(np.array([first]), np.array([True]))
    merged.merge(pooled(np.array([second]), np.array([False])))
    assert merged.average_precision_bounds() == (0.5, 1.0)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.45, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (61, 47)])
def test_regions_are_those_of_scipy_with_corners_joined(shape: tuple[int, int], share: float) -> None:
    mask = np.random.default_rng(23).random(shape) < share
    numbers, count = label(mask, np.ones((3, 3)))
    weights, regions = region_weights(mask)
    assert regions == count
    assert np.array_equal(weights, 1 / np.bincount(numbers.ravel())[numbers[mask]])


def test_long_winding_regions_and_opposite_borders_are_told_apart() -> None:
    spiral = np.zeros((41, 41), bool)
    for ring in range(0, 20, 2):
        spiral[ring, ring : 41 - ring] = spiral[40 - ring, ring : 41 - ring] = True
        spiral[ring : 41 - ring, ring] = spiral[ring : 41 - ring, 40 - ring] = True
    comb = np.zeros((40, 41), bool)
    comb[:, ::2] = True
    comb[-1] = True  # the teeth meet only in the last row
    borders = np.zeros((5, 7), bool)
    borders[:, 0] = borders[:, -1] = True  # neighbours in memory, not in the image
    for mask, expected in ((spiral, 10), (comb, 1), (borders, 2)):
        weights, regions = region_weights(mask)
        assert regions == expected == flooded(mask).max()
        assert weights.sum() == pytest.approx(expected)


def test_the_simulation_at_scale_is_right_about_itself_and_finds_the_metrics_within_their_bounds() -> None:
    pictures = list(metrics_at_scale.simulated(4, 512))
    exact = metrics_at_scale.ExactCounts()
    for picture in pictures:
        exact.add(picture)
        weights, regions = region_weights(picture.truth)
        assert regions == picture.areas.size and np.array_equal(weights, 1 / picture.areas[picture.region])
    scores = np.concatenate([picture.scores.ravel() for picture in pictures])
    truth = np.concatenate([picture.truth.ravel() for picture in pictures])
    expected = exact.metrics()
    assert expected["ap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-9)
    assert expected["f1_max"] == pytest.approx(sklearn_f1_max(scores, truth), abs=1e-9)
    result = metrics_at_scale.measure(4, 512)
    assert result["pixels"] == 4 * 512 * 512
    for name, metric in result["metrics"].items():
        assert metric["exact"] == expected[name] and metric["within_bounds"] and metric["error"] < 1e-4
    with pytest.raises(ValueError, match="at least 500"):
        next(metrics_at_scale.simulated(1, 300))


def test_the_simulations_aupro_is_the_slow_oracles() -> None:
    random = np.random.default_rng(31)
    truth = np.zeros((13, 17), bool)
    truth[1:3, 2:5] = truth[8, 9] = True
    scores = ((random.integers(0, 9, truth.shape) + 4 * truth) / 16).astype(np.float32)
    region = np.where(flooded(truth)[truth] == 1, 0, 1)
    exact = metrics_at_scale.ExactCounts()
    exact.add(metrics_at_scale.Simulated(scores, truth, region, np.bincount(region)))
    assert exact.metrics()["aupro"] == pytest.approx(slow_aupro([scores], [truth], 0.3), abs=ROUNDING)
