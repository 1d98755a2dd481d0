"""How a mask is cut from an anomaly map: one rule, for the runtime, the reference and everything that compares the two."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np

from runtime.errors import RequestError


@dataclass(frozen=True)
class MaskRule:
    """Where a picture's mask begins.

    A picture is anomalous where its map exceeds `threshold` anywhere. Its mask then holds the pixels above `relative_threshold` times
    the map's maximum, or above `threshold` where that is lower. 1 is the paper's mask, `map > threshold`. Less lets a defect that was found
    grow to its borders: what tells a normal picture from an anomalous one is a question of height, how far a defect reaches one of shape,
    and a single number answers both only for a model whose maps are nearly binary.

    Attributes:
        threshold: 0..1.
        relative_threshold: 0..1, share of the maximum.

    Raises:
        RequestError: a number outside 0..1, or none.
    """

    threshold: float
    relative_threshold: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("threshold", self.threshold), ("relative_threshold", self.relative_threshold)):
            if isinstance(value, bool) or not (isinstance(value, Real) and 0 <= value <= 1):  # NaN is refused too
                raise RequestError(f"{name}: expected a number in 0..1, got {value!r}; leave it out for the model's own")

    def level(self, score: float) -> np.float32:
        """What a pixel must exceed in a map with this maximum; float32 is the map's precision."""
        if not np.float32(score) > np.float32(self.threshold):
            return np.float32(self.threshold)  # that nothing exceeds
        return np.float32(min(self.threshold, self.relative_threshold * score))

    def mask(self, anomaly_map: np.ndarray) -> np.ndarray:
        """bool [H, W] of a map float32 [H, W]; NaN exceeds nothing."""
        return anomaly_map > self.level(float(anomaly_map.max()))

    def changed(self, threshold: float | None, relative_threshold: float | None) -> MaskRule:
        """With what is not None put in."""
        return MaskRule(
            self.threshold if threshold is None else threshold,
            self.relative_threshold if relative_threshold is None else relative_threshold,
        )
