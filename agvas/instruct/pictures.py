"""The pictures that a model is shown: read as RGB, with the anomaly boxed or tinted, and encoded for a request.

Functions on arrays, drawn at the picture's own size and scaled down afterwards, so that a thin scratch is boxed where it is.
The references they stand beside are chosen in references.py.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

__all__ = ["BOX_COLOUR", "MAX_BOXES", "TINT_COLOUR", "boxed", "encode_jpeg", "find_boxes", "line_width", "read_rgb", "read_shape", "tinted"]

MAX_BOXES = 8
"""More regions than this are merged with their neighbours: a model does not read forty boxes."""
BOX_COLOUR = (0, 255, 0)
TINT_COLOUR = (255, 0, 0)
_JPEG_QUALITY = 92
_LINES_PER_SIDE = 200
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDES_SWAPPED = (5, 6, 7, 8)
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)  # Pillow raises SyntaxError for some damaged PNGs


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 RGB [H, W, 3], turned as the EXIF tag says; 16-bit grey by `sample >> 8`, alpha dropped, as on the line.

    Raises:
        ValueError: a file that Pillow does not read, or one of floats, whose grey levels would have to be guessed.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in _SIXTEEN_BIT_MODES:
                grey = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            if picture.mode in ("F", "LAB"):
                raise ValueError(f"{path}: expected a picture of 8 or 16 bits, found mode {picture.mode}; save it as PNG")
            return np.asarray(picture.convert("RGB"))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_shape(path: Path) -> tuple[int, int]:
    """(height, width) of what read_rgb gives, from the header alone. Raises ValueError as read_rgb."""
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDES_SWAPPED
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def boxed(image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """The picture with a green box around each region of the mask, uint8 RGB [H, W, 3]; lines lie outside it where there is room."""
    height, width = mask.shape
    line = line_width(height, width)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for top, left, bottom, right in find_boxes(mask):
        outer = (max(0, left - line), max(0, top - line), min(width - 1, right + line - 1), min(height - 1, bottom + line - 1))
        draw.rectangle(outer, outline=BOX_COLOUR, width=line)
    return np.asarray(picture)


def line_width(height: int, width: int) -> int:
    """Pixels of a box's line: 1/200 of the longer side, at least 1."""
    return max(1, round(max(height, width) / _LINES_PER_SIDE))


def find_boxes(mask: npt.NDArray[np.bool_], most: int = MAX_BOXES) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right), the last two exclusive, of each connected region (8 neighbours), from top to bottom.

    With more than `most` regions, the mask is looked at in coarser and coarser cells (2, 4, 8 ... pixels) until so few remain: regions
    that lie near each other grow together, and their pixels share a tight box.
    """
    from scipy.ndimage import find_objects, label

    neighbours = np.ones((3, 3), int)
    cell = 1
    regions, count = label(mask, neighbours)
    while count > most:
        cell *= 2
        height, width = (math.ceil(side / cell) for side in mask.shape)
        padded = np.zeros((height * cell, width * cell), bool)
        padded[: mask.shape[0], : mask.shape[1]] = mask
        coarse, count = label(padded.reshape(height, cell, width, cell).any(axis=(1, 3)), neighbours)
        regions = np.where(mask, coarse.repeat(cell, 0).repeat(cell, 1)[: mask.shape[0], : mask.shape[1]], 0)
    boxes = [(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in find_objects(regions)]
    return sorted(boxes)


def tinted(image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """The picture with the mask laid over it: anomalous pixels halfway to red, all others as they are; uint8 RGB [H, W, 3]."""
    result = image.copy()
    result[mask] = (image[mask].astype(np.uint16) + np.array(TINT_COLOUR, np.uint16) + 1) // 2
    return result


def encode_jpeg(image: npt.NDArray[np.uint8], max_side: int) -> bytes:
    """The picture as JPEG, its longer side at most `max_side` pixels."""
    picture = Image.fromarray(image)
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return stream.getvalue()


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: expected a picture, found {error}; restore it from its source")
