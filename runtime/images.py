"""From whatever holds a picture (path, bytes, PIL image, array) to the one thing the pipeline takes: uint8 RGB [H, W, 3].

Every rule below depends on the file's header or the array's dtype and shape, never on pixel values, so two parts of one
production run are never scaled differently. A picture whose grey levels would have to be guessed is refused.

- EXIF orientation: applied, so [H, W] is the picture as a viewer shows it. A block that does not parse
  is refused; of one that is only cut short, Pillow warns and gives what it could read.
- 1-bit and grey: 0..255, repeated in three channels; 1-bit with a warning, for it is a mask or drawing and no camera's frame.
- 16-bit grey (I;16, and I, which Pillow uses for 16-bit PGM): `sample >> 8`, the full 16-bit range to 8 bits. 12-bit
  camera data in a 16-bit container comes out dark, with a warning: scale it before. 16-bit colour: the same, to a level, by Pillow;
  the warning, too, as long as Pillow has not decoded it yet. A TIFF of 32-bit integers is refused.
- Alpha (RGBA, LA, PA, transparency of a palette or PNG): dropped. The stored colours are what the camera saw;
  compositing would paint over them with a colour of our choosing, and inspection pictures carry an opaque alpha anyway.
- Palette: its colours. CMYK, YCbCr, HSV: Pillow's conversion; ICC profiles are not applied.
- Several frames: the first of a file, with a warning; of a PIL image, the frame it stands at, with a warning where that is the first.
- 32-bit float (F), LAB, premultiplied alpha: refused.
- uint8 array [H, W, 3]: taken as RGB, never as BGR; from OpenCV pass `array[..., ::-1]`. [H, W] and [H, W, 1]: grey,
  repeated in three channels.

Files, and pictures encoded in memory, are told apart by their first bytes, not by suffix: PNG, JPEG, BMP, TIFF and PNM (PBM, PGM,
PPM). Pillow knows more formats, but some of its decoders start other programs (EPS) or allocate the canvas before its size is checked
(WebP).
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin

from runtime.errors import ImageError
from runtime.picture_files import FORMATS, check_is_file

# What holds a picture; bytes hold a file's content.
Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray

# Pillow's own warning threshold, 256 MiB of RGB: a bomb is refused, a 60-megapixel camera is not.
PIXEL_LIMIT = 89_478_485

# Decoders by signature, called directly: Image.open would compare the size with its own process-wide limit (a warning
# or an error, by how far) before ours is asked.
_DECODERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    *((magic, TiffImagePlugin.TiffImageFile) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((magic, PpmImagePlugin.PpmImageFile) for magic in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf")),
)

DIM_BELOW = 1 << 14  # 16-bit samples that all lie below it are likely a 12-bit camera's
# The same words for every picture, so that Python shows them once and no line's log fills.
DIM = (
    f"the samples of a 16-bit picture all lie below {DIM_BELOW}: such pictures are judged as dark ones; if the camera has 12 bits or so, "
    "scale its samples to 0..65535 before"
)
ONE_BIT = (
    "a picture of 1 bit is black and white alone, as masks, regions and drawings are and no frame of a camera: it is judged as it is; give "
    "the frame in 8-bit grey or colour"
)
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_COLOUR_FROM_SIXTEEN_BIT = ("RGB", "RGBA", "LA")  # modes in which Pillow has shifted 16-bit samples itself
_PALETTE_MODES = ("P", "PA")
_EIGHT_BIT_MODES = ("1", "L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")

# Of arrays that are not uint8, by kind of dtype.
_INTEGERS = (
    "of a camera's 12 bits (Mono12) pass (array >> 4).astype(np.uint8), of 10 bits >> 2, of full-range 16 bits >> 8; of values that are "
    "0..255 already, array.astype(np.uint8)"
)
_SIGNED = "a picture has no negative levels: pass values that are 0..255 as array.astype(np.uint8)"
_REMEDIES = {"u": _INTEGERS, "i": _INTEGERS, "b": "pass array.astype(np.uint8) * 255"}

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262

_guard_lock = threading.Lock()


class PictureWarning(UserWarning):
    """What may have spoiled one picture's verdict; Segmentation.warnings keeps the words."""


def tell(words: Iterable[str]) -> None:
    """Warn of a picture, by Python's own rule once for each text."""
    for text in words:
        warnings.warn(text, PictureWarning, stacklevel=2)


def as_rgb(source: Picture, *, pixel_limit: int = PIXEL_LIMIT) -> np.ndarray:
    """Take a picture in any of the accepted forms.

    Args:
        source: path, a file's content as bytes, PIL image, or uint8 array [H, W, 3] (RGB), [H, W] or [H, W, 1] (grey).
        pixel_limit: largest accepted H × W.

    Returns:
        uint8 RGB [H, W, 3], contiguous. A contiguous array [H, W, 3] is returned itself, not copied: do not overwrite
        it (a camera's ring buffer) while the result is in use.

    Raises:
        ImageError: not one of these forms, or a picture that `read_image` would refuse.
    """
    rgb, words = rgb_and_words(source, pixel_limit=pixel_limit)
    tell(words)
    return rgb


def read_image(path: str | os.PathLike[str], *, pixel_limit: int = PIXEL_LIMIT) -> np.ndarray:
    """Read a picture file; the rules stand at the top of this file.

    A truncated file is refused, unless the process has switched on Pillow's LOAD_TRUNCATED_IMAGES itself. One whose bytes were changed on
    the way is told only where its kind has checksums, which is PNG: JPEG's decoder goes on over damage, which Pillow does not tell, and
    uncompressed kinds (BMP, PNM, TIFF) have nothing to tell it by; a compressed TIFF may or may not decode.

    Args:
        pixel_limit: largest accepted H × W, compared with the header before anything is decoded. It is the only limit:
            Pillow's own (MAX_IMAGE_PIXELS) is lifted, process-wide, while a TIFF that exceeds it is decoded.

    Returns:
        uint8 RGB [H, W, 3], contiguous.

    Raises:
        ImageError: no such file, not a file, empty, not a picture, damaged, too large, or of a kind the rules refuse.
    """
    rgb, words = _read_file(path, pixel_limit)
    tell(words)
    return rgb


def rgb_and_words(source: Picture, *, pixel_limit: int = PIXEL_LIMIT) -> tuple[np.ndarray, tuple[str, ...]]:
    """`as_rgb`, and in words what may have spoiled the picture, for the caller to keep and to `tell`."""
    if isinstance(source, np.ndarray):
        return _rgb_of_array(source, pixel_limit), ()
    if isinstance(source, Image.Image):
        rgb, words = _rgb_of_pil(source, "PIL image", pixel_limit)
        if _is_first_of_several(source):
            words += ("a PIL image of several frames stands at its first, which alone is judged; seek to each, and give its copy()",)
        return rgb, words
    if isinstance(source, (str, os.PathLike)):
        return _read_file(source, pixel_limit)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name, content = f"encoded picture ({type(source).__name__})", bytes(source)
        if not content:
            raise ImageError(f"{name}: expected a file's content, got 0 bytes; check what sent it")
        return _rgb_of_stream(io.BytesIO(content), name, pixel_limit, "encode it as PNG, or pass its pixels as a uint8 array [H, W, 3]")
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    if source is None:
        remedy = "check where it comes from: OpenCV's imread and imdecode give None for what they cannot read"
    elif hasattr(source, "getvalue"):
        remedy = "pass its content, .getvalue()"
    elif hasattr(source, "read"):
        remedy = "pass its path, or its content, .read() of a file opened as binary"
    else:
        remedy = "convert it, say with np.asarray"
    raise ImageError(f"image: expected a path, a file's content as bytes, a PIL image or a uint8 array [H, W, 3], got {kind}; {remedy}")


def _read_file(path: str | os.PathLike[str], pixel_limit: int) -> tuple[np.ndarray, tuple[str, ...]]:
    name = os.fspath(path)
    check_is_file(name)
    try:
        with open(name, "rb") as file:
            return _rgb_of_stream(file, name, pixel_limit, "save the picture as PNG")
    except OSError as error:
        raise ImageError(f"{name}: expected a readable file, got {error}; check permissions and the disk") from error


def _rgb_of_stream(file: IO[bytes], name: str, pixel_limit: int, remedy: str) -> tuple[np.ndarray, tuple[str, ...]]:
    signature = file.read(16)
    file.seek(0)
    decoder = next((decoder for magic, decoder in _DECODERS if signature.startswith(magic)), None)
    if decoder is None:
        raise ImageError(f"{name}: expected a {FORMATS} file, got one that begins with {signature!r}; {remedy}")
    try:
        image = decoder(file)
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, ValueError and more
        raise ImageError(
            f"{name}: expected a {decoder.format} header, got one that does not read or has no pixels "
            f"({error}); the file is damaged: copy or save it again"
        ) from error
    rgb, words = _rgb_of_pil(image, name, pixel_limit)
    if _has_more_frames(image):
        words += ("a file of several pictures (pages, frames): the first alone is judged; save each as its own",)
    return rgb, words


def _rgb_of_array(array: np.ndarray, pixel_limit: int) -> np.ndarray:
    given = f"{array.dtype} {list(array.shape)}"
    expected = "image array: expected uint8 RGB [H, W, 3]"
    if isinstance(array, np.ma.MaskedArray):
        raise ImageError(f"{expected}, got a masked array, whose mask would be lost; pass .filled(0), and what to judge as `region`")
    if array.dtype != np.uint8:
        if array.dtype.kind == "f":
            nans = int(np.isnan(array).sum())
            held = f" with {nans} NaN" if nans else ""
            remedy = "scale it to 0..255 by a rule of yours and pass .astype(np.uint8)"
        else:
            held = ""
            remedy = _REMEDIES.get(array.dtype.kind, "convert it to 0..255 by a rule of yours and pass .astype(np.uint8)")
            if array.dtype == np.int8:
                remedy = _SIGNED
        raise ImageError(f"{expected}, got {given}{held}; values are never guessed: {remedy}")
    if array.ndim not in (2, 3):
        remedy = "one picture at a time, array[0] of a batch" if array.ndim > 3 else "a file's content as bytes: array.tobytes()"
        raise ImageError(f"{expected}, got {given}; pass {remedy}")
    if array.size == 0:
        raise ImageError(f"{expected} with at least one pixel, got {given}; check the crop or the camera's frame")
    # The last axis decides, so a strip of three rows, [3, W, 3], is a picture and not channels-first.
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        if array.shape[2] == 4:
            remedy = "drop the fourth channel, array[..., :3]; BGRA from OpenCV: array[..., 2::-1]"
        elif array.shape[0] in (1, 3, 4):
            remedy = "this looks channels-first: pass np.moveaxis(array, 0, -1)"
        else:
            remedy = "pick the three channels that are red, green and blue"
        raise ImageError(f"{expected}, got {given}; {remedy}")
    _check_pixels("image array", array.shape[1], array.shape[0], pixel_limit)
    if array.ndim == 2 or array.shape[2] == 1:
        return _repeat_grey(array.reshape(array.shape[:2]))
    return np.ascontiguousarray(array)


def _rgb_of_pil(image: Image.Image, name: str, pixel_limit: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if 0 in image.size:
        raise ImageError(f"{name}: expected at least one pixel, got {image.width} × {image.height}; check its source")
    _check_pixels(name, image.width, image.height, pixel_limit)
    if image.mode not in _SIXTEEN_BIT_MODES + _PALETTE_MODES + _EIGHT_BIT_MODES:
        raise ImageError(
            f"{name}: expected an 8-bit or 16-bit grey or colour picture, got Pillow mode {image.mode!r}, for which no "
            "fixed rule leads to 0..255; convert it by a rule of yours and save it as 8-bit RGB or grey"
        )
    words: tuple[str, ...] = (ONE_BIT,) if image.mode == "1" else ()
    dim, shifted = False, _shifted_by_pillow(image)  # known before it is loaded alone
    try:
        with _pillow_guard_lifted(image.width * image.height):
            image.load()
        # After loading: Pillow turns a TIFF while it decodes it, and then clears the tag.
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except MemoryError as error:
        raise ImageError(
            f"{name}: expected memory for {image.width} × {image.height} pixels, got none left; crop or shrink it, or lower pixel_limit"
        ) from error
    except Exception as error:  # as above: decoders raise nearly anything on damaged data
        raise ImageError(
            f"{name}: expected a whole {image.format or 'PIL'} picture, got one that does not decode ({error}); "
            "it is truncated, damaged or closed: copy or save it again"
        ) from error
    if image.mode in _SIXTEEN_BIT_MODES:
        samples = _sixteen_bits(image, name)
        dim = 0 < int(samples.max()) < DIM_BELOW
        rgb = _repeat_grey((samples >> 8).astype(np.uint8))
    elif image.mode in _PALETTE_MODES:
        # By way of RGBA: straight to RGB, Pillow warns about the transparency that is dropped here on purpose.
        rgb = np.asarray(image.convert("RGBA"))[..., :3]
    else:
        rgb = np.array(image.convert("RGB"))
        # Black, too: of samples below 256, as of 8 bits in 16, nothing is left.
        dim = shifted and int(rgb.max()) < DIM_BELOW >> 8
    return np.ascontiguousarray(_turn(rgb, orientation)), (*words, DIM) if dim else words


def _shifted_by_pillow(image: Image.Image) -> bool:
    """Whether Pillow makes 8 bits of this picture's 16 (colour, grey with alpha) when it decodes it: its own raw mode says so, or a PNM's
    largest value. Of one that is decoded already nothing tells it."""
    if image.mode not in _COLOUR_FROM_SIXTEEN_BIT:
        return False
    for tile in getattr(image, "tile", None) or ():
        settings = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(setting, str) and ";16" in setting for setting in settings):
            return True
        if isinstance(image, PpmImagePlugin.PpmImageFile) and isinstance(settings[-1], int) and settings[-1] > 255:
            return True
    return False


def _is_first_of_several(image: Image.Image) -> bool:
    """Whether a caller's PIL image has more frames and stands at the first. The others of a JPEG (MPO) are previews and depths."""
    if image.format == "MPO":
        return False
    try:
        return bool(image.tell() == 0 and getattr(image, "n_frames", 1) > 1)
    except Exception:  # a closed file, or one that is damaged further on; this frame is whole
        return False


def _has_more_frames(image: Image.Image) -> bool:
    """Whether a second one follows that can be reached; the first is whole whatever the rest is."""
    try:
        image.seek(1)
    except Exception:  # EOFError where there is none; where it is damaged, nearly anything
        return False
    return True


def _check_pixels(name: str, width: int, height: int, pixel_limit: int) -> None:
    if width * height > pixel_limit:
        raise ImageError(
            f"{name}: expected at most {pixel_limit} pixels, got {width} × {height} = {width * height}; "
            "crop or shrink it, or raise pixel_limit (--pixel-limit) if it is really that large"
        )


def _sixteen_bits(image: Image.Image, name: str) -> np.ndarray:
    """16-bit grey → samples 0..65535, [H, W]."""
    if image.mode == "I" and isinstance(image, TiffImagePlugin.TiffImageFile):
        raise ImageError(
            f"{name}: expected 8 or 16 bits per sample, got integers of 32, for which no fixed rule leads to 0..255; "
            "scale them by a rule of yours and save the picture as 8-bit"
        )
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow hands packed 12-bit and white-is-zero TIFFs over as if they were ordinary 16-bit grey.
        bits = image.tag_v2.get(_TIFF_BITS_PER_SAMPLE)
        photometric = image.tag_v2.get(_TIFF_PHOTOMETRIC)
        if bits != (16,) or photometric != 1:
            raise ImageError(
                f"{name}: expected 16 bits per sample and 0 for black (BitsPerSample 16, PhotometricInterpretation 1), "
                f"got {bits} and {photometric}; save it as 8-bit or full-range 16-bit"
            )
    samples = np.asarray(image)
    if image.mode == "I" and not (samples.min() >= 0 and samples.max() <= 65535):
        raise ImageError(
            f"{name}: expected 16-bit samples 0..65535, got {samples.min()}..{samples.max()} in 32-bit integers; "
            "scale them to 0..255 by a rule of yours and save the picture as 8-bit"
        )
    return samples


def _repeat_grey(grey: np.ndarray) -> np.ndarray:
    """[H, W] → [H, W, 3]."""
    return np.repeat(grey[:, :, None], 3, axis=2)


def _turn(rgb: np.ndarray, orientation: object) -> np.ndarray:
    """Undo an EXIF orientation (2..8; anything else means upright) on [H, W, 3].

    Not ImageOps.exif_transpose: it also rewrites the EXIF block, and fails on pictures whose other tags are malformed.
    """
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return rgb


@contextmanager
def _pillow_guard_lifted(pixels: int) -> Iterator[None]:
    """Let Pillow decode a picture that `pixel_limit` has admitted: its TIFF decoder checks MAX_IMAGE_PIXELS once more.

    The setting belongs to the process, so it is touched only for pictures above it, one at a time.
    """
    with _guard_lock:  # also waits out another thread's lift, whose None is not the process's setting
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:
            Image.MAX_IMAGE_PIXELS = None
            try:
                yield
            finally:
                Image.MAX_IMAGE_PIXELS = limit
            return
    yield
