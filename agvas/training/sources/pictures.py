"""Pictures and masks of data sets, decoded one at a time by fixed rules of their headers, never of their pixel values.

The rules are those of runtime/images.py, so that training and the line see the same picture: the EXIF orientation is applied (here with
Pillow's exif_transpose), 16-bit grey is shifted to 8 bits, alpha is dropped, 32-bit float is refused, and PNG, JPEG, BMP, TIFF and PNM
are read, told apart by content. agvas may not import that file (the runtime is deployed without it), so they are written again here.
A picture to learn from may also be a GIF, of which the first frame is read: refCLEF has a few by the name of .jpg. The line reads none,
and evaluation, which asks for sizes first, refuses them as it does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from agvas.training.sources.errors import DatasetError

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "PPM")
_LEARNED_FROM = (*_FORMATS, "GIF")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_EXIF_ORIENTATION, _EXIF_SIDES_SWAPPED = 0x0112, (5, 6, 7, 8)
_TIFF_SIDES = (256, 257)  # tags of width and height


def read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 RGB [H, W, 3]. Raises DatasetError naming the file where it does not decode: training never skips a picture."""
    opened = decoded(path, _LEARNED_FROM)
    if opened.mode in _SIXTEEN_BIT:
        samples = np.asarray(opened)
        if samples.size and not (samples.min() >= 0 and samples.max() <= 65535):
            found = f"{samples.min()}..{samples.max()} in 32-bit integers"
            raise DatasetError(path, None, "16-bit samples 0..65535", found, "save the picture as 8-bit")
        return np.repeat((samples >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if opened.mode in ("P", "PA", "RGBA", "LA"):  # by way of RGBA: its colours stay as stored, the alpha beside them is dropped
        return np.ascontiguousarray(np.asarray(opened.convert("RGBA"))[..., :3])
    return np.array(opened.convert("RGB"))


def read_indices(path: Path) -> npt.NDArray[np.int32]:
    """Class indices [H, W] of a one-channel or palette picture, the stored numbers and not the palette's colours."""
    opened = decoded(path)
    if opened.mode not in ("L", "P", *_SIXTEEN_BIT):
        raise DatasetError(path, None, "one channel of class indices", f"mode {opened.mode}", "restore the mask from the release")
    return np.asarray(opened).astype(np.int32)


def read_nonzero(path: Path) -> npt.NDArray[np.bool_]:
    """bool [H, W], True where any colour channel is not 0 (alpha is not looked at).

    JPEG is refused: its rounding leaves values near 0 where the mask was 0.
    """
    opened = decoded(path)
    if opened.format == "JPEG":
        raise DatasetError(path, None, "a mask in a lossless format", "JPEG", "restore the PNG of the data set's release")
    if opened.mode in ("P", "PA", "RGBA", "LA"):
        opened = opened.convert("RGBA").convert("RGB")
    values = np.asarray(opened)
    return np.asarray(values.any(axis=2) if values.ndim == 3 else values != 0)


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) as the header says, EXIF orientation applied; pixels are not decoded."""
    return picture_shapes(path)[-1]


def picture_shapes(path: Path) -> list[tuple[int, int]]:
    """(height, width) as it is stored and, where its EXIF tag swaps the sides, as it is shown; pixels are not decoded."""
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            width, height = opened.size
            if isinstance(opened, TiffImagePlugin.TiffImageFile):  # whose size Pillow, by its version, gives as it is stored or shown
                width, height = (int(opened.tag_v2[tag]) for tag in _TIFF_SIDES)
            # In a PNG without a tag in front of its pixels Pillow would look behind them, and decode them all.
            tagged = opened.format != "PNG" or not {"exif", "Raw profile type exif"}.isdisjoint(opened.info)
            turned = tagged and opened.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDES_SWAPPED
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error and more on damaged files
        raise _unreadable(path, error) from error
    return [(height, width), (width, height)] if turned else [(height, width)]


def check_size(mask: npt.NDArray[np.bool_] | npt.NDArray[np.int32], height: int, width: int, file: Path, image: Path) -> None:
    """DatasetError unless a mask [H, W] has the size of the decoded image."""
    if mask.shape != (height, width):
        raise DatasetError(
            file,
            None,
            f"a mask of {height} x {width} (height x width, as {image})",
            f"{mask.shape[0]} x {mask.shape[1]}",
            "take image and mask from the same release",
        )


def decoded(path: Path, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """The first frame, decoded and turned upright, in 8 or 16 bits; `format` is kept. Raises DatasetError naming the file."""
    try:
        with Image.open(path, formats=formats) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            upright.format = opened.format
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    if upright.mode not in (*_SIXTEEN_BIT, *_EIGHT_BIT):
        raise DatasetError(path, None, "8-bit or 16-bit grey or colour", f"Pillow mode {upright.mode}", "save it as 8-bit PNG")
    return upright


def _unreadable(path: Path, error: Exception) -> DatasetError:
    found = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    remedy = "restore it from its source" + (", or save it as PNG" if isinstance(error, UnidentifiedImageError) else "")
    return DatasetError(path, None, "a picture that decodes (PNG, JPEG, BMP, TIFF or PNM)", found, remedy)
