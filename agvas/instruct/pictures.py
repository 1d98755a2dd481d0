"""The pictures that a model is shown: with the anomaly boxed or tinted, and encoded for a request.

Functions on arrays, drawn at the picture's own size and scaled down afterwards, so that a thin scratch is boxed where it is.
Files are read as training reads them (agvas/training/sources/pictures.py); the references they stand beside are chosen in references.py.
"""

from __future__ import annotations

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ["BOX_COLOUR", "MAX_BOXES", "TINT_COLOUR", "boxed", "encode_jpeg", "find_boxes", "line_width", "tinted"]

MAX_BOXES = 8
"""More regions than this are merged with their neighbours: a model does not read forty boxes."""
BOX_COLOUR = (0, 255, 0)
TINT_COLOUR = (255, 0, 0)
_JPEG_QUALITY = 92
_LINES_PER_SIDE = 200


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
