"""From a picture to the two encoders' inputs, and from the decoder's map back to the picture.

Training, calibration, verification and the line all call these functions, so preprocessing cannot drift between them. Input is
always uint8 RGB; nothing is guessed from pixel values. Pillow does the resampling (with its antialiasing filter) everywhere;
no resize stands inside an exported graph, where engines disagree about it.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

ONE_TONE = 8  # levels of 255; a part under light and a sensor's noise spread further
# Levels of 255: nearly all pixels lie below, or above, in a frame that shows no part, whatever its noise, its vignette or a time stamp.
DARK, BRIGHT = 20, 243
NEARLY_ALL = 0.99
LEAST_SAMPLES = 256  # pixels of a region; one that a grid hits less often is taken whole
REDUCED = 4  # times; a frame that is shown so much smaller loses what is that many pixels wide
SLIVER = 16  # pixels; a shorter side below it, of a picture or as the model sees it, is no more than a patch of the network
# Pixels from which a map is enlarged by our own rows: below, Pillow's single call is faster (480 × 640: 0.8 ms against 1.1).
LARGE = 500_000


@dataclass(frozen=True)
class Preprocessing:
    """Sizes in pixels; means and standard deviations in units of 0..255, per RGB channel."""

    pixel_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    semantic_size: int
    semantic_mean: tuple[float, float, float]
    semantic_std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("pixel_mean", "pixel_std", "semantic_mean", "semantic_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
                raise ValueError(f"preprocessing.{name}: expected three numbers, red, green and blue, got {list(values)}")
            if name.endswith("std") and min(values) < 1:
                raise ValueError(f"preprocessing.{name}: expected grey levels of 0..255, 1 at least, got {list(values)}")


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


def lost_detail(frame: Frame) -> tuple[str, ...]:
    """In words where a picture is so narrow, or is shown so small, that defects may not be seen at all: it would be judged OK."""
    if min(frame.height, frame.width, frame.resized_height, frame.resized_width) < SLIVER:
        return (
            f"a picture of {frame.width} × {frame.height} pixels is seen at {frame.resized_width} × {frame.resized_height}, where hardly "
            "any defect shows, and likely judged OK; cut it into parts whose sides are alike",
        )
    if (times := max(frame.height, frame.width) / frame.padded_size) > REDUCED:
        return (
            f"a picture of {frame.width} × {frame.height} pixels is seen at {frame.resized_width} × {frame.resized_height}, where defects "
            f"of less than {math.ceil(2 * times)} of its pixels hardly show; see it in tiles (tile=, --tile) where such ones matter",
        )
    return ()


def one_tone(image: np.ndarray, region: np.ndarray | None = None) -> tuple[str, ...]:
    """In words where a frame shows nothing: black, blown out, a lamp or a camera that failed; it would be judged OK.

    Between black and white only a frame without any structure counts: good parts may be smooth.

    Args:
        image: uint8 RGB [H, W, 3]; some 20,000 of its pixels are looked at.
        region: bool [H, W], the pixels that the verdict is about; None for all.
    """
    if min(image.shape[:2]) < SLIVER:
        return ()
    step = max(1, min(image.shape[:2]) // 128)
    # [3, N]: of rows of three, maxima take ten times as long.
    seen = np.ascontiguousarray(np.moveaxis(image[::step, ::step], 2, 0)).reshape(3, -1)
    lowest, highest = seen.min(axis=1), seen.max(axis=1)
    advice = "it shows no part and is likely judged OK; look at lamp, lens and camera"
    if (highest - lowest).max() < ONE_TONE:
        return (f"a picture of one tone, levels {lowest.min()} to {highest.max()} of 255: {advice}",)
    inside, whose = np.ones(seen.shape[1], bool), "its"
    if region is not None:
        inside, whose = region[::step, ::step].reshape(-1), "the region's"
        if np.count_nonzero(inside) < LEAST_SAMPLES:
            seen = image[region].T
            inside = np.ones(seen.shape[1], bool)
    enough = NEARLY_ALL * np.count_nonzero(inside)
    # The same words whatever the noise, so that no line's log fills.
    if np.count_nonzero(inside & (seen.max(axis=0) < DARK)) >= enough:
        return (f"a picture of one tone, 99 in 100 of {whose} pixels below level {DARK} of 255: {advice}",)
    if np.count_nonzero(inside & (seen.min(axis=0) > BRIGHT)) >= enough:
        return (f"a picture of one tone, 99 in 100 of {whose} pixels above level {BRIGHT} of 255: {advice}",)
    return ()


def encoder_images(image: np.ndarray, settings: Preprocessing) -> tuple[np.ndarray, np.ndarray, Frame]:
    """Both encoders' inputs, side by side: Pillow resizes outside Python's lock, and its own copy of the picture is made once for the two.

    Args:
        image: uint8 RGB [H, W, 3].

    Returns:
        float32 [3, S, S], float32 [3, s, s] and the frame that `restore` needs.
    """
    picture = Image.fromarray(image)
    with ThreadPoolExecutor(1) as beside:  # its start and end cost less than one resize after the other
        try:
            semantic = beside.submit(semantic_image, picture, settings)
        except RuntimeError:  # no thread to be had, as once the main thread has ended: one after the other gives the same
            pixel, frame = pixel_image(picture, settings)
            return pixel, semantic_image(picture, settings), frame
        pixel, frame = pixel_image(picture, settings)
        return pixel, semantic.result(), frame


def pixel_image(picture: Image.Image, settings: Preprocessing) -> tuple[np.ndarray, Frame]:
    """Resize the longest side, normalise, pad right and below with zeros (SAM): float32 [3, S, S], and the frame that `restore` needs."""
    frame = frame_of(picture.height, picture.width, settings.pixel_size)
    resized = picture.resize((frame.resized_width, frame.resized_height), Image.Resampling.BILINEAR)
    padded = np.zeros((3, frame.padded_size, frame.padded_size), np.float32)
    _normalise(resized, settings.pixel_mean, settings.pixel_std, padded[:, : frame.resized_height, : frame.resized_width])
    return padded, frame


def semantic_image(picture: Image.Image, settings: Preprocessing) -> np.ndarray:
    """Resize to a square without keeping the aspect ratio, bicubic, and normalise (SigLIP): float32 [3, s, s]."""
    size = settings.semantic_size
    image = np.empty((3, size, size), np.float32)
    _normalise(picture.resize((size, size), Image.Resampling.BICUBIC), settings.semantic_mean, settings.semantic_std, image)
    return image


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
    if height > frame.height or frame.height * frame.width < LARGE:
        return np.array(inside.resize((frame.width, frame.height), Image.Resampling.BILINEAR, box=(0.0, 0.0, width, height)))
    rows = inside.height
    wide = inside.resize((frame.width, rows), Image.Resampling.BILINEAR, box=(0.0, 0.0, width, rows))
    return _stretch_rows(np.asarray(wide), height, frame.height)


def _stretch_rows(image: np.ndarray, span: float, size: int) -> np.ndarray:
    """Rows 0..`span` of an image float32 [R, W] enlarged to `size` rows: Pillow's bilinear filter to the bit, several times as fast.

    Most of a large picture's way back is here. Pillow goes pixel by pixel; neighbouring rows of the result read the same rows of the
    image, so they are made together, in float64 as Pillow does, one weight after the other.
    """
    first, weights = _bilinear_weights(span, size, image.shape[0])
    taps = weights.shape[1]
    source = image.astype(np.float64)
    result = np.empty((size, image.shape[1]), np.float32)
    starts = np.flatnonzero(np.diff(first, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), size]):
        row = int(first[start])
        rows = weights[start:end, 0, None] * source[row]
        for tap in range(1, min(taps, image.shape[0] - row)):
            rows += weights[start:end, tap, None] * source[row + tap]
        result[start:end] = rows
    return result


def _bilinear_weights(span: float, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """First source row int [size] and weights float64 [size, taps] of each row of an enlarged image, as Pillow computes them.

    Pillow's rule: a triangle of one row to each side of the centre, cut at the image's ends and made to sum to one.
    """
    scale = float(np.float32(span)) / size  # Pillow keeps a box in single precision
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - 0.5).astype(np.int64), 0)
    last = np.minimum((centre + 1.5).astype(np.int64), length)
    offset = np.arange(int((last - first).max()))
    distance = offset + first[:, None] - centre[:, None] + 0.5
    weights = np.maximum(1.0 - np.abs(distance), 0.0) * (offset < (last - first)[:, None])
    total = np.zeros(size)
    for tap in range(weights.shape[1]):  # in Pillow's order
        total += weights[:, tap]
    return first, weights / total[:, None]


def _normalise(picture: Image.Image, mean: tuple[float, float, float], std: tuple[float, float, float], image: np.ndarray) -> None:
    """Write (picture - mean) / std into `image`, float32 [3, H, W], channel by channel: contiguous reads and no copies between."""
    for plane, channel, centre, deviation in zip(image, picture.split(), mean, std, strict=True):
        scale = np.float32(1.0) / np.float32(deviation)
        np.multiply(np.asarray(channel), scale, out=plane, dtype=np.float32)
        plane -= np.float32(centre) * scale
