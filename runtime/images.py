"""From whatever holds a picture (path, PIL image, array) to the one thing the pipeline takes: uint8 RGB [H, W, 3].

Every rule below depends on the file's header or the array's dtype and shape, never on pixel values, so two parts of one
production run are never scaled differently. A picture whose grey levels would have to be guessed is refused.

- EXIF orientation: applied, so [H, W] is the picture as a viewer shows it. A block that does not parse
  is refused; of one that is only cut short, Pillow warns and gives what it could read.
- 1-bit and grey: 0..255, repeated in three channels.
- 16-bit grey (I;16, and I, which Pillow uses for 16-bit PGM): `sample >> 8`, the full 16-bit range to 8 bits. 12-bit
  camera data in a 16-bit container comes out dark, with a warning: scale it before. 16-bit colour: the same, to a level, by Pillow.
  A TIFF of 32-bit integers is refused.
- Alpha (RGBA, LA, PA, transparency of a palette or PNG): dropped. The stored colours are what the camera saw;
  compositing would paint over them with a colour of our choosing, and inspection pictures carry an opaque alpha anyway.
- Palette: its colours. CMYK, YCbCr, HSV: Pillow's conversion; ICC profiles are not applied.
- Several frames: the first of a file, with a warning; of a PIL image, the frame it stands at.
- 32-bit float (F), LAB, premultiplied alpha: refused.
- uint8 array [H, W, 3]: taken as RGB, never as BGR; from OpenCV pass `array[..., ::-1]`. [H, W] and [H, W, 1]: grey,
  repeated in three channels.

Files are told apart by their first bytes, not by suffix: PNG, JPEG, BMP, TIFF and PNM (PBM, PGM, PPM). Pillow knows
more formats, but some of its decoders start other programs (EPS) or allocate the canvas before its size is checked
(WebP).
"""

from __future__ import annotations

import glob
import os
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin

from runtime.errors import ImageError

# Pillow's own warning threshold, 256 MiB of RGB: a bomb is refused, a 60-megapixel camera is not.
PIXEL_LIMIT = 89_478_485

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff")

KINDS = ("mask", "overlay", "map")  # behind a stem, as in x_mask.png: what Segmentation.save writes, and masks as people keep them
ENDINGS = tuple(f"_{kind}" for kind in KINDS)

# Pictures too, by suffix, that are not read: a folder's are left out, and a warning tells how many.
UNREAD_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".webp")

# Decoders by signature, called directly: Image.open would compare the size with its own process-wide limit (a warning
# or an error, by how far) before ours is asked.
_DECODERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    *((magic, TiffImagePlugin.TiffImageFile) for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((magic, PpmImagePlugin.PpmImageFile) for magic in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf")),
)
_FORMATS = "PNG, JPEG, BMP, TIFF or PNM"

DIM_BELOW = 1 << 14  # 16-bit samples that all lie below it are likely a 12-bit camera's
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PALETTE_MODES = ("P", "PA")
_EIGHT_BIT_MODES = ("1", "L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262

_guard_lock = threading.Lock()


def as_rgb(source: str | os.PathLike[str] | Image.Image | np.ndarray, *, pixel_limit: int = PIXEL_LIMIT) -> np.ndarray:
    """Take a picture in any of the accepted forms.

    Args:
        source: path, PIL image, or uint8 array [H, W, 3] (RGB), [H, W] or [H, W, 1] (grey).
        pixel_limit: largest accepted H × W.

    Returns:
        uint8 RGB [H, W, 3], contiguous. A contiguous array [H, W, 3] is returned itself, not copied: do not overwrite
        it (a camera's ring buffer) while the result is in use.

    Raises:
        ImageError: not one of these forms, or a picture that `read_image` would refuse.
    """
    if isinstance(source, np.ndarray):
        return _rgb_of_array(source, pixel_limit)
    if isinstance(source, Image.Image):
        return _rgb_of_pil(source, "PIL image", pixel_limit)
    if isinstance(source, (str, os.PathLike)):
        return read_image(source, pixel_limit=pixel_limit)
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    raise ImageError(f"image: expected a path, a PIL image or a uint8 array [H, W, 3], got {kind}; convert it, say with np.asarray")


def read_image(path: str | os.PathLike[str], *, pixel_limit: int = PIXEL_LIMIT) -> np.ndarray:
    """Read a picture file; the rules stand at the top of this file.

    A truncated file is refused, unless the process has switched on Pillow's LOAD_TRUNCATED_IMAGES itself.

    Args:
        pixel_limit: largest accepted H × W, compared with the header before anything is decoded. It is the only limit:
            Pillow's own (MAX_IMAGE_PIXELS) is lifted, process-wide, while a TIFF that exceeds it is decoded.

    Returns:
        uint8 RGB [H, W, 3], contiguous.

    Raises:
        ImageError: no such file, not a file, empty, not a picture, damaged, too large, or of a kind the rules refuse.
    """
    name = os.fspath(path)
    _check_is_file(name)
    try:
        with open(name, "rb") as file:
            signature = file.read(16)
            file.seek(0)
            decoder = next((decoder for magic, decoder in _DECODERS if signature.startswith(magic)), None)
            if decoder is None:
                raise ImageError(f"{name}: expected a {_FORMATS} file, got one that begins with {signature!r}; save the picture as PNG")
            try:
                image = decoder(file)
            except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, ValueError and more
                raise ImageError(
                    f"{name}: expected a {decoder.format} header, got one that does not read or has no pixels "
                    f"({error}); the file is damaged: copy or save it again"
                ) from error
            rgb = _rgb_of_pil(image, name, pixel_limit)
            if _has_more_frames(image):
                # The same words for every picture, as below.
                warnings.warn("a file of several pictures (pages, frames): the first alone is judged; save each as its own", stacklevel=2)
            return rgb
    except OSError as error:
        raise ImageError(f"{name}: expected a readable file, got {error}; check permissions and the disk") from error


def find_images(inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, recursive: bool = False) -> list[Path]:
    """List the pictures that files, folders and glob patterns stand for.

    A file is listed whatever its suffix. A folder or pattern gives its files with a suffix in `SUFFIXES` (any case),
    hidden ones left out, sorted by path; a warning tells of other pictures there (`UNREAD_SUFFIXES`), and of masks and results left out:
    `x_mask.png`, `x_overlay.png` and `x_map.png` beside an `x.png`. Inputs keep their order; what is named twice is listed where it came
    first.

    Args:
        inputs: paths or patterns (`*`, `?`, `[…]`; `**` crosses folders); a path that exists is never a pattern.
        recursive: also look into a folder's subfolders, hidden ones left out.

    Raises:
        ImageError: no inputs, a path that does not exist, a folder or pattern without pictures.
    """
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not given:
        raise ImageError("images: expected at least one file, folder or pattern, got none; name one")
    found: dict[tuple[str, str], Path] = {}
    for name in given:
        for path in _expand(os.fspath(name), recursive):
            # The folder is resolved, not the file: "./a.png" is "a.png", yet a link beside it is a picture of its own.
            found.setdefault((os.path.realpath(path.parent), path.name), path)
    return list(found.values())


def _expand(name: str, recursive: bool) -> list[Path]:
    if name and os.path.isdir(name):
        pictures = _pictures(name, _below(Path(name)) if recursive else Path(name).iterdir())
        if not pictures:
            below = "" if recursive else ", or ask for its subfolders too (agvas-segment --recursive)"
            raise ImageError(
                f"{name}: expected pictures in this folder, got none with a suffix in {', '.join(SUFFIXES)}; "
                f"name the files themselves{below}"
            )
        return pictures
    if glob.has_magic(name) and not os.path.exists(name):
        pictures = _pictures(name, map(Path, glob.iglob(name, recursive=True)))
        if not pictures:
            raise ImageError(
                f"{name}: expected pictures to match this pattern, got none with a suffix in {', '.join(SUFFIXES)}; "
                "check the pattern and the folder it starts from"
            )
        return pictures
    _check_is_file(name)
    return [Path(name)]


def _below(folder: Path) -> Iterator[Path]:
    """Everything under a folder but what lies in hidden folders, as caches do. The folder itself may be hidden: it was named."""
    return (path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1]))


def _pictures(name: str, paths: Iterator[Path]) -> list[Path]:
    """Links that lead nowhere among them: reading them tells so."""
    shown = [path for path in paths if not path.name.startswith(".")]
    unread = Counter(suffix for path in shown if (suffix := path.suffix.lower()) in UNREAD_SUFFIXES)
    if unread:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        warnings.warn(f"{name}: left out {counts}: {_FORMATS} is read; save them as PNG", stacklevel=4)
    named = [path for path in shown if path.suffix.lower() in SUFFIXES]
    stems = {path.parent / path.stem for path in named}
    of_others = {path for path in named if path.stem.endswith(ENDINGS) and path.parent / path.stem.rpartition("_")[0] in stems}
    if of_others:
        warnings.warn(
            f"{name}: left out {len(of_others)} that lie beside the pictures they are of, such as {min(of_others).name}: masks or results, "
            "no pictures; name one itself to have it taken for one",
            stacklevel=4,
        )
    found = (path for path in named if path not in of_others)
    return sorted(path for path in found if path.is_file() or (path.is_symlink() and not path.exists()))


def _check_is_file(name: str) -> None:
    if not name:
        raise ImageError("image path: expected a path, got an empty string; name a file")
    try:
        status = os.stat(name)
    except FileNotFoundError:
        raise ImageError(f"{name}: expected a picture file, got no such file; check the path (now in {os.getcwd()})") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageError(f"{name!r}: expected a readable path, got {error}; check the path and its permissions") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: expected a picture file, got a folder; name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: expected a picture file, got a device or pipe; save the picture to a file")
    if status.st_size == 0:
        raise ImageError(f"{name}: expected a picture file, got 0 bytes; copy or save it again")


def _rgb_of_array(array: np.ndarray, pixel_limit: int) -> np.ndarray:
    given = f"{array.dtype} {list(array.shape)}"
    expected = "image array: expected uint8 RGB [H, W, 3]"
    if array.dtype != np.uint8:
        if array.dtype.kind == "f":
            nans = int(np.isnan(array).sum())
            held = f" with {nans} NaN" if nans else " without NaN"
            remedy = "scale it to 0..255 by a rule of yours and pass .astype(np.uint8)"
        else:
            held = ""
            remedy = "full-range 16-bit: (array >> 8).astype(np.uint8); bool: array.astype(np.uint8) * 255"
        raise ImageError(f"{expected}, got {given}{held}; values are never guessed: {remedy}")
    if array.ndim not in (2, 3):
        raise ImageError(f"{expected}, got {given}; pass one picture at a time, array[0] of a batch")
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


def _rgb_of_pil(image: Image.Image, name: str, pixel_limit: int) -> np.ndarray:
    if 0 in image.size:
        raise ImageError(f"{name}: expected at least one pixel, got {image.width} × {image.height}; check its source")
    _check_pixels(name, image.width, image.height, pixel_limit)
    if image.mode not in _SIXTEEN_BIT_MODES + _PALETTE_MODES + _EIGHT_BIT_MODES:
        raise ImageError(
            f"{name}: expected an 8-bit or 16-bit grey or colour picture, got Pillow mode {image.mode!r}, for which no "
            "fixed rule leads to 0..255; convert it by a rule of yours and save it as 8-bit RGB or grey"
        )
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
        rgb = _repeat_grey(_eight_bits(image, name))
    elif image.mode in _PALETTE_MODES:
        # By way of RGBA: straight to RGB, Pillow warns about the transparency that is dropped here on purpose.
        rgb = np.asarray(image.convert("RGBA"))[..., :3]
    else:
        rgb = np.array(image.convert("RGB"))
    return np.ascontiguousarray(_turn(rgb, orientation))


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


def _eight_bits(image: Image.Image, name: str) -> np.ndarray:
    """16-bit grey → uint8 [H, W]."""
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
    if 0 < int(samples.max()) < DIM_BELOW:
        # The same words for every picture, so that Python shows them once and no line's log fills.
        warnings.warn(
            f"the samples of a 16-bit picture all lie below {DIM_BELOW}: such pictures are judged as dark ones; "
            "if the camera has 12 bits or so, scale its samples to 0..65535 before",
            stacklevel=2,
        )
    return (samples >> 8).astype(np.uint8)


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
