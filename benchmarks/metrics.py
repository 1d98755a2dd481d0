"""The paper's metrics (appendix B.3): pixel AP, F1-max, IoU on anomalous images, empty masks on normal ones.

Beside them stand two that the paper leaves out: the image-level AUROC, which lines ask for, and AUPRO, which weighs a small defect like a
large one (Bergmann et al. 2021, The MVTec anomaly detection dataset, IJCV).

A category has 10^8 pixels and more, too many to sort at once, so the pixel metrics are read from a histogram whose bins
grow finer towards both ends of [0, 1], where a sigmoid piles up its values; what the bins can hide is counted and
returned as an error bound. Nothing here reads files, resizes maps or picks thresholds: the masks are judged as they
were predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.regions import region_weights

__all__ = ["AUPRO_LIMIT", "PixelScores", "image_auroc", "intersection_over_union", "is_empty"]

# A non-negative float32 orders like its own bits. Dropping the 12 lowest of 23 mantissa bits leaves bins 2^-11 wide,
# relative to the score's distance from the nearer end of [0, 1]: 1 - score is exact in float32 for scores of at least
# one half.
_DROPPED_BITS = 12
_HALF = int(np.float32(0.5).view(np.uint32)) >> _DROPPED_BITS  # the bin of 0.5, alone in the middle
_BINS = 2 * _HALF + 1

AUPRO_LIMIT = 0.3
"""The false positive rate up to which AUPRO is integrated, MVTec's choice."""


class PixelScores:
    """Scores and truths of all pixels of a category, pooled in about 15 MB, whatever the number of images.

    With `regions`, each image is a map [H, W], and AUPRO can be asked for; without, any shape will do.

    The bins hold scores whose distance to the nearer end of [0, 1] differs by less than 1 part in 2^11. For each bin it
    is remembered whether two different scores fell into it; if not, its pixels are truly tied and nothing is lost, so
    maps of 8 bits a pixel (values k / 255) give sklearn's values but for rounding.

    Error bound. Let a bin with different scores have p positives and n negatives, and T positives and F negatives above
    it. Whatever their order, the i-th of its positives has a precision of at least (T + i) / (T + i + F + n), a value
    concave in i, and at most (T + p) / (T + p + F). `average_precision_bounds` sums the mean of the former's two ends,
    and the latter; the exact AP lies between the two, and so does `average_precision`, which takes the positives in
    the middle of a random order. `f1_max` is reached by a threshold at a bin's edge, so it never exceeds the exact
    value, which never exceeds `f1_max_bound`.

    AUPRO is the area under the mean share found of each region, over the false positive rate. Both only grow as the threshold falls, so
    inside a bin with different scores the curve stays in the box between the bin's two ends: `aupro_bounds` sums the boxes' floors and
    ceilings, and `aupro` their diagonals. Where a bin holds one score, the diagonal is the exact curve. Beyond that, sums of 1 / area are
    rounded as float64, far below what the bins hide.
    """

    def __init__(self, regions: bool = False) -> None:
        self._weights = np.zeros(_BINS, np.float64) if regions else None  # of the positives, 1 / the area of their region
        self._regions = 0
        self._positives = np.zeros(_BINS, np.int64)
        self._negatives = np.zeros(_BINS, np.int64)
        self._sample = np.zeros(_BINS, np.uint32)  # the bits of one score seen in the bin
        self._mixed = np.zeros(_BINS, bool)  # whether another score was seen in it, too

    def add(
        self, scores: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_], where: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """Adds one image: scores float32 in [0, 1], truth bool, of one shape; else ValueError, and nothing is added.

        Of an image, pixels outside `where` (bool of that shape) are left out; none of them may be true.
        """
        scores, truth = np.asarray(scores), np.asarray(truth)
        if scores.dtype != np.float32:
            raise ValueError(f"scores: expected float32, got {scores.dtype}; convert to float32 in [0, 1] first")
        if truth.dtype != np.bool_:
            raise ValueError(f"truth: expected bool, got {truth.dtype}; compare the mask with a value first, e.g. mask == 255")
        if scores.shape != truth.shape:
            raise ValueError(f"truth: expected the scores' shape {scores.shape}, got {truth.shape}; resize the map, not the mask")
        if scores.size == 0:
            return
        lowest, highest = float(scores.min()), float(scores.max())
        if not (lowest >= 0.0 and highest <= 1.0):  # also true where either is NaN
            nans = int(np.isnan(scores).sum())
            if nans:
                found, remedy = f"{nans} NaN of {scores.size}", "look for an overflow in the model (fp16?)"
            else:
                found, remedy = f"values from {lowest:g} to {highest:g}", "apply the sigmoid or divide by a constant"
            raise ValueError(f"scores: expected values in [0, 1], got {found}; {remedy}")
        if self._weights is not None:
            weights, regions = region_weights(truth)
        if where is not None:
            scores, truth = scores[where], truth[where]
        flat, positive = scores.ravel() + np.float32(0.0), truth.ravel()  # + 0 turns -0.0 into 0.0, whose bits order
        bits = flat.view(np.uint32)
        index = _bin_of(flat)
        counts = np.bincount(index, minlength=_BINS)
        positives = np.bincount(index[positive], minlength=_BINS)
        seen = (self._positives + self._negatives) > 0
        new = ~seen[index]
        self._sample[index[new]] = bits[new]  # any of the bin's scores will do
        self._mixed[index[self._sample[index] != bits]] = True
        self._positives += positives
        self._negatives += counts - positives
        if self._weights is not None:
            self._weights += np.bincount(index[positive], weights=weights, minlength=_BINS)
            self._regions += regions

    def merge(self, other: PixelScores) -> None:
        """Adds what another has pooled, as if its images had been added here. ValueError where only one of the two keeps regions."""
        if (self._weights is None) != (other._weights is None):
            raise ValueError("other: expected regions to be kept by both or by neither, got one of each; make both alike")
        seen, new = (self._positives + self._negatives) > 0, (other._positives + other._negatives) > 0
        self._mixed |= other._mixed | (seen & new & (self._sample != other._sample))
        self._sample[~seen] = other._sample[~seen]
        self._positives += other._positives
        self._negatives += other._negatives
        if self._weights is not None and other._weights is not None:
            self._weights += other._weights
            self._regions += other._regions

    @property
    def positives(self) -> int:
        """Number of anomalous pixels so far."""
        return int(self._positives.sum())

    @property
    def negatives(self) -> int:
        """Number of normal pixels so far."""
        return int(self._negatives.sum())

    def average_precision(self) -> float | None:
        """Step-wise AP, sum of (R_k - R_k-1) P_k, as sklearn's average_precision_score; None without positives."""
        if self.positives == 0:
            return None
        p, n, t, f, mixed = self._descending()
        tied = (t + p) / (t + p + f + n)
        middle = (t + (p + 1) / 2) / (t + (p + 1) / 2 + f + n / 2)  # the mean positive of a random order
        return float(np.sum(p * np.where(mixed, middle, tied)) / self.positives)

    def average_precision_bounds(self) -> tuple[float, float] | None:
        """(lowest, highest) AP that the scores before binning can have; None without positive pixels. See the class."""
        if self.positives == 0:
            return None
        p, n, t, f, mixed = self._descending()
        tied = (t + p) / (t + p + f + n)
        worst_first = (t + 1) / (t + 1 + f + n)  # all negatives of the bin before its first positive
        lowest = np.where(mixed, (worst_first + tied) / 2, tied)
        highest = np.where(mixed, (t + p) / np.maximum(t + p + f, 1), tied)
        return float(np.sum(p * lowest) / self.positives), float(np.sum(p * highest) / self.positives)

    def f1_max(self) -> float | None:
        """The highest F1 over the thresholds at the bins' edges; None without positive pixels."""
        if self.positives == 0:
            return None
        p, n, t, f, _ = self._descending()
        return float(np.max(2 * (t + p) / (self.positives + t + p + f + n)))

    def f1_max_bound(self) -> float | None:
        """A value that the exact F1-max over all thresholds cannot exceed; None without positive pixels."""
        if self.positives == 0:
            return None
        p, n, t, f, mixed = self._descending()
        return float(np.max(2 * (t + p) / (self.positives + t + p + f + np.where(mixed, 0, n))))

    def aupro(self, limit: float = AUPRO_LIMIT) -> float | None:
        """Area under the per-region overlap over false positive rates 0..limit, divided by limit; None without regions or negatives.

        The overlap at a threshold is the mean, over the connected regions of all images' truths, of the share of the region's pixels
        that score at least the threshold; the rate is over the normal pixels of all images. Points are joined by straight lines.
        """
        return self._aupro(limit)[1]

    def aupro_bounds(self, limit: float = AUPRO_LIMIT) -> tuple[float, float] | None:
        """(lowest, highest) AUPRO that the scores before binning can have; None where `aupro` is. See the class."""
        lowest, _, highest = self._aupro(limit)
        return None if lowest is None or highest is None else (lowest, highest)

    def _aupro(self, limit: float) -> tuple[float, float, float] | tuple[None, None, None]:
        if self._weights is None:
            raise ValueError("regions: expected PixelScores(regions=True) to be asked for AUPRO, got False; make it with regions")
        if not 0 < limit <= 1:
            raise ValueError(f"limit: expected a false positive rate in (0, 1], got {limit}; MVTec takes {AUPRO_LIMIT}")
        negatives = self.negatives
        if self._regions == 0 or negatives == 0:
            return None, None, None
        _, n, _, f, mixed = self._descending()
        filled = np.flatnonzero(self._positives + self._negatives)[::-1]
        overlap = np.minimum(np.cumsum(self._weights[filled]) / self._regions, 1.0)  # rounding must not find more than everything
        before = np.concatenate([[0.0], overlap[:-1]])
        width = np.clip(limit - f / negatives, 0.0, n / negatives)  # of each bin, what lies below the limit
        reached = np.divide(width * negatives, n, out=np.zeros_like(n), where=n > 0)  # the share of the bin that this is
        middle = before + (overlap - before) * reached / 2
        heights = (np.where(mixed, before, middle), middle, np.where(mixed, overlap, middle))
        lowest, line, highest = (float(np.sum(width * height)) / limit for height in heights)
        return lowest, line, highest

    def _descending(self) -> tuple[npt.NDArray[Any], ...]:
        """Of each non-empty bin, highest first: positives, negatives, positives above, negatives above, mixed."""
        filled = np.flatnonzero(self._positives + self._negatives)[::-1]
        p, n = self._positives[filled].astype(np.float64), self._negatives[filled].astype(np.float64)
        return p, n, np.cumsum(p) - p, np.cumsum(n) - n, self._mixed[filled]


def _bin_of(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The bin of each score in [0, 1]; higher scores never fall into lower bins."""
    upper = scores > 0.5
    distance = np.where(upper, np.float32(1.0) - scores, scores)
    index = (distance.view(np.uint32) >> _DROPPED_BITS).astype(np.int64)
    return np.where(upper, _BINS - 1 - index, index)


def intersection_over_union(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """|predicted and truth| / |predicted or truth| of one anomalous image (equation 12 is its mean over images)."""
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted: expected the truth's shape {truth.shape}, got {predicted.shape}; resize the prediction")
    if not truth.any():
        raise ValueError("truth: expected anomalous pixels, got an empty mask; equation 12 is for anomalous images, see is_empty")
    return float(np.count_nonzero(predicted & truth) / np.count_nonzero(predicted | truth))


def is_empty(predicted: npt.NDArray[np.bool_]) -> bool:
    """Whether no pixel is predicted (equation 13 is the share of normal images where this holds)."""
    return not predicted.any()


def image_auroc(scores: Sequence[float], anomalous: Sequence[bool]) -> float | None:
    """Chance that an anomalous image scores above a normal one, ties counting half; None without both kinds."""
    values, labels = np.asarray(scores, np.float64), np.asarray(anomalous, bool)
    if values.shape != labels.shape:
        raise ValueError(f"scores: expected one for each of {labels.size} labels, got {values.size}")
    if np.isnan(values).any():
        raise ValueError(f"scores: expected numbers, got {int(np.isnan(values).sum())} NaN of {values.size}; look for an overflow")
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if positives == 0 or negatives == 0:
        return None
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # mean rank of tied scores, from 1
    return float((rank[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))
