"""Regions of interest: which pixels a verdict is about. One rule for files and arrays, so that a shell and a service judge alike."""

from __future__ import annotations

import os

import numpy as np

from runtime.errors import RequestError
from runtime.images import ONE_BIT, rgb_and_words, tell


def as_region(region: object) -> np.ndarray:
    """A region as bool [H, W], True where to look.

    Args:
        region: bool [H, W], or uint8 [H, W] of 0 (not) and 1 or 255 (look).

    Raises:
        RequestError: anything else: which grey would mean "look" has to be guessed; or a region without a pixel to look at.
    """
    if isinstance(region, (str, os.PathLike)):
        raise RequestError(f"region: expected an array bool or uint8 [H, W], got the path {os.fspath(region)}; read it with read_region")
    array = np.asarray(region)
    if array.ndim != 2 or array.dtype not in (np.bool_, np.uint8):
        raise RequestError(
            f"region: expected bool or uint8 [H, W], got {array.dtype} {list(array.shape)}; convert it, as with (region > 0), "
            "and of a colour picture take one channel"
        )
    levels = [] if array.dtype == np.bool_ else np.unique(array).tolist()
    if not {*levels} <= {0, 1} and not {*levels} <= {0, 255}:
        odd = [level for level in levels if level not in (0, 1, 255)]
        more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        got = f"the level {odd[0]}{more}" if odd else "both"
        raise RequestError(
            f"region: expected 0 where not to look and either 1 or 255 where to look, got {got}; "
            "draw it without grey or smoothed edges, and keep it as PNG (JPEG blurs), or, in Python, say which levels count, as with "
            "(region > 127)"
        )
    looked_at = array != 0
    if not looked_at.any():
        raise RequestError("region: expected at least one pixel to look at, got none: white is looked at, black is not")
    return looked_at


def read_region(path: str | os.PathLike[str]) -> np.ndarray:
    """`as_region` of a picture in black and white, grey or as equal colours; alpha is dropped.

    Raises:
        ImageError: a file that is no picture.
        RequestError: as as_region, or colours; names the file.
    """
    rgb, words = rgb_and_words(path)
    tell(text for text in words if text != ONE_BIT)  # which is no camera's frame, and need not be one
    if not ((rgb[..., 0] == rgb[..., 1]) & (rgb[..., 0] == rgb[..., 2])).all():
        raise RequestError(f"{os.fspath(path)}: region: expected black and white, got colours; draw it white where to look")
    try:
        return as_region(rgb[..., 0])
    except RequestError as error:
        raise RequestError(f"{os.fspath(path)}: {error}") from error
