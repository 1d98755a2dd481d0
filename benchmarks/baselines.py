"""Three trivial anomaly maps: what accuracy costs nothing, so that a model's numbers can be read against it.

Each is a pure function of one image, with constants fixed by reasoning and not fitted to any data set; maps are never
normalised per image, as that would show an anomaly in every normal part. They know no texture, no position and no
learned thing.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["BASELINES", "THRESHOLD", "Baseline", "anomaly_map", "constant_map", "gradient_map", "median_map"]

Baseline = Literal["constant", "median", "gradient"]
BASELINES: tuple[Baseline, ...] = ("constant", "median", "gradient")

THRESHOLD = 0.5
"""A pixel is in the mask where its map is above this."""

MEDIAN_SHORT_SIDE = 128  # pixels; the background is smooth, and a median costs by the window
MEDIAN_FULL_SCALE = 128.0  # grey levels from the background that make a 1; half the range, as the background is rarely at an end of it
GRADIENT_BLUR = 1.0  # pixels (sigma): sensor noise and JPEG blocks off, edges kept
GRADIENT_FULL_SCALE = 64.0  # grey levels per pixel that make a 1; a full step, 0 to 255, after that blur has about 80


def anomaly_map(baseline: Baseline, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The named baseline's map, float32 [H, W] in [0, 1], of a uint8 RGB image [H, W, 3]."""
    match baseline:
        case "constant":
            return constant_map(image)
        case "median":
            return median_map(image)
        case "gradient":
            return gradient_map(image)
    raise ValueError(f"baseline: expected one of {', '.join(BASELINES)}, got {baseline!r}")


def constant_map(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Nothing is anomalous: 0 everywhere. Its AP is the share of anomalous pixels, the floor of every AP."""
    _check(image)
    return np.zeros(image.shape[:2], np.float32)


def median_map(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """|grey - background| / 128, at most 1, where the background is a median over a quarter of the short side.

    The background is computed on an image reduced to a short side of 128 pixels (window 33; smaller images are not
    enlarged, the window is at least 3) and brought back linearly, in whole grey levels; the difference is taken at full
    size, so thin scratches survive.
    """
    grey = _grey(image)  # [H, W]
    height, width = grey.shape
    scale = min(1.0, MEDIAN_SHORT_SIDE / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    reduced = cv2.resize(grey, size, interpolation=cv2.INTER_AREA) if scale < 1.0 else grey
    window = max(3, min(size) // 4 | 1)  # medianBlur asks for an odd window
    background = cv2.medianBlur(reduced, window)
    if scale < 1.0:
        background = cv2.resize(background, (width, height), interpolation=cv2.INTER_LINEAR)
    difference = cv2.absdiff(grey, background).astype(np.float32)
    return np.minimum(difference / np.float32(MEDIAN_FULL_SCALE), np.float32(1.0))


def gradient_map(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Gradient in grey levels per pixel / 64, at most 1: magnitude of Sobel 3 x 3 after a Gaussian of sigma 1."""
    grey = cv2.GaussianBlur(_grey(image).astype(np.float32), (0, 0), GRADIENT_BLUR)
    # 1 / 8 is the sum of Sobel's weights times the distance: a ramp of one level per pixel gives 1.
    across = cv2.Sobel(grey, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    down = cv2.Sobel(grey, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    magnitude = np.hypot(across, down).astype(np.float32)
    return np.minimum(magnitude / np.float32(GRADIENT_FULL_SCALE), np.float32(1.0))


def _grey(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    _check(image)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)  # ITU-R BT.601 weights


def _check(image: npt.NDArray[np.uint8]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: expected uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}; read it with runtime.images")
