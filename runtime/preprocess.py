"""From a picture to the two encoders' inputs, and from the decoder's map back to the picture.

Training, calibration, verification and the line all call these functions, so preprocessing cannot drift between them. Input is
always uint8 RGB; nothing is guessed from pixel values. Pillow does the resampling (with its antialiasing filter) everywhere;
no resize stands inside an exported graph, where engines disagree about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """Sizes in pixels; means and standard deviations in units of 0..255, per RGB channel."""

    pixel_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    semantic_size: int
    semantic_mean: tuple[float, float, float]
    semantic_std: tuple[float, float, float]


@dataclass(frozen=True)
class Frame:
    """Where a picture lies in the padded square: its own size and the size it was resized to, in pixels."""

    height: int
    width: int
    resized_height: int
    resized_width: int
    padded_size: int


def frame_of(height: int, width: int, padded_size: int) -> Frame:
    """SAM's longest-side rule: the longer side becomes `padded_size`, the other keeps the aspect ratio, at least one pixel."""
    scale = padded_size / max(height, width)
    return Frame(
        height,
        width,
        max(1, int(height * scale + 0.5)),
        max(1, int(width * scale + 0.5)),
        padded_size,
    )


def pixel_image(image: np.ndarray, settings: Preprocessing) -> tuple[np.ndarray, Frame]:
    """Resize the longest side, normalise, pad right and below with zeros (SAM).

    Args:
        image: uint8 RGB [H, W, 3].

    Returns:
        float32 [3, S, S] and the frame that `restore` needs.
    """
    frame = frame_of(image.shape[0], image.shape[1], settings.pixel_size)
    resized = _resize(image, frame.resized_height, frame.resized_width, Image.Resampling.BILINEAR)
    padded = np.zeros((3, frame.padded_size, frame.padded_size), np.float32)
    padded[:, : frame.resized_height, : frame.resized_width] = _normalise(resized, settings.pixel_mean, settings.pixel_std)
    return padded, frame


def semantic_image(image: np.ndarray, settings: Preprocessing) -> np.ndarray:
    """Resize to a square without keeping the aspect ratio, bicubic, and normalise (SigLIP).

    Args:
        image: uint8 RGB [H, W, 3].

    Returns:
        float32 [3, s, s].
    """
    size = settings.semantic_size
    return _normalise(_resize(image, size, size, Image.Resampling.BICUBIC), settings.semantic_mean, settings.semantic_std)


def restore(anomaly_map: np.ndarray, frame: Frame) -> np.ndarray:
    """Bring a map of the padded square back to the picture: cut the padding away, resize bilinearly.

    Args:
        anomaly_map: float32 [M, M], covering the padded square.

    Returns:
        float32 [H, W].
    """
    side = anomaly_map.shape[0]
    height, width = (pixels * side / frame.padded_size for pixels in (frame.resized_height, frame.resized_width))
    # Pillow's filter reads beyond its box: what lies wholly in the padding goes first.
    inside = Image.fromarray(anomaly_map[: math.ceil(height), : math.ceil(width)])
    # A fractional box: where the picture ends inside a map cell, rounding would shift the map by up to half a cell.
    resized = inside.resize((frame.width, frame.height), Image.Resampling.BILINEAR, box=(0.0, 0.0, width, height))
    return np.array(resized)


def _resize(image: np.ndarray, height: int, width: int, filter: Image.Resampling) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), filter))


def _normalise(image: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]) -> np.ndarray:
    """uint8 [H, W, 3] → float32 [3, H, W]."""
    scale = 1.0 / np.asarray(std, np.float32)[:, None, None]
    offset = np.asarray(mean, np.float32)[:, None, None] * scale
    return np.multiply(image.transpose(2, 0, 1), scale, dtype=np.float32) - offset
