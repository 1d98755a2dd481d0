"""Which files hold pictures: of folders and patterns, by suffix, without the masks and results that lie beside them."""

from __future__ import annotations

import glob
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.errors import ImageError

SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff")

KINDS = ("mask", "overlay", "map")  # behind a stem, as in x_mask.png: what Segmentation.save writes, and masks as people keep them
ENDINGS = tuple(f"_{kind}" for kind in KINDS)
_NUMBER = re.compile(r"__[0-9]+$")  # behind the stem of a result where there were several instructions

# Pictures too, by suffix, that are not read: a folder's are left out, and a warning tells how many.
UNREAD_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".webp")

FORMATS = "PNG, JPEG, BMP, TIFF or PNM"  # that are read, see runtime.images


@dataclass(frozen=True)
class Found:
    """What `search` found.

    Attributes:
        pictures: to be read.
        left_out: pictures of a kind that is not read (`UNREAD_SUFFIXES`) and subfolders that cannot be opened, with why: (path, reason).
        beside: masks and results that lie beside the pictures they are of.
    """

    pictures: list[Path]
    left_out: list[tuple[Path, str]]
    beside: list[Path]


def find_images(inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, recursive: bool = False) -> list[Path]:
    """List the pictures that files, folders and glob patterns stand for.

    A file is listed whatever its suffix. A folder or pattern gives its files with a suffix in `SUFFIXES` (any case),
    hidden ones left out, sorted by path; a warning tells of other pictures there (`UNREAD_SUFFIXES`), of subfolders that cannot be opened,
    and of masks and results left out: `x_mask.png`, `x_overlay.png` and `x_map.png` beside an `x.png`, under any of the names that
    agvas-segment gives them (`x__1_mask.png`, `x.png_mask.png`). Inputs keep their order; what is named twice is listed where it came
    first.

    Args:
        inputs: paths or patterns (`*`, `?`, `[…]`; `**` crosses folders); a path that exists is never a pattern.
        recursive: also look into a folder's subfolders, hidden ones left out.

    Raises:
        ImageError: no inputs, a path that does not exist, a folder that cannot be opened, a folder or pattern without pictures.
    """
    return search(inputs, recursive=recursive).pictures


def search(inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, recursive: bool = False) -> Found:
    """`find_images`, with what was left out by name."""
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not given:
        raise ImageError("images: expected at least one file, folder or pattern, got none; name one")
    pictures: dict[tuple[str, str], Path] = {}
    left_out: dict[Path, str] = {}
    beside: dict[Path, None] = {}
    for name in given:
        found = _expand(os.fspath(name), recursive)
        for path in found.pictures:
            # The folder is resolved, not the file: "./a.png" is "a.png", yet a link beside it is a picture of its own.
            pictures.setdefault((os.path.realpath(path.parent), path.name), path)
        left_out.update(found.left_out)
        beside.update(dict.fromkeys(found.beside))
    return Found(list(pictures.values()), list(left_out.items()), list(beside))


def _expand(name: str, recursive: bool) -> Found:
    if name and os.path.isdir(name):
        found = _told(name, by_name(*files_in(name, recursive=recursive)))
        if not found.pictures:
            below = "" if recursive else ", or its subfolders too, where the command has --recursive"
            raise ImageError(
                f"{name}: expected pictures in this folder, got none with a suffix in {', '.join(SUFFIXES)}; "
                f"name the files themselves, or the folder that they lie in{below}"
            )
        return found
    if glob.has_magic(name) and not os.path.exists(name):
        found = _told(name, by_name(glob.iglob(name, recursive=True)))
        if not found.pictures:
            raise ImageError(
                f"{name}: expected pictures to match this pattern, got none with a suffix in {', '.join(SUFFIXES)}; "
                "check the pattern and the folder it starts from"
            )
        return found
    check_is_file(name)
    return Found([Path(name)], [], [])


def _told(name: str, found: Found) -> Found:
    """Without folders that are called as pictures are; links that lead nowhere stay: reading them tells so. Warns of what is left out."""
    closed = {path: reason for path, reason in found.left_out if os.path.isdir(path)}
    if unread := Counter(path.suffix.lower() for path, _ in found.left_out if path not in closed):
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
        warnings.warn(f"{name}: left out {counts}: {FORMATS} is read; save them as PNG", stacklevel=5)
    for path, reason in closed.items():
        warnings.warn(f"{name}: left out what is in {path}: {reason}", stacklevel=5)
    if found.beside:
        warnings.warn(
            f"{name}: left out {len(found.beside)} that lie beside the pictures they are of, such as {min(found.beside).name}: masks or "
            "results, no pictures; name one itself to have it taken for one",
            stacklevel=5,
        )
    shown = [path for path in found.pictures if os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))]
    return replace(found, pictures=shown)


def files_in(folder: str, *, recursive: bool = False) -> tuple[list[str], list[OSError]]:
    """What lies in a folder or, where asked for, anywhere under it but in hidden folders, as caches are (itself it may be hidden: it was
    named); and the errors of subfolders that cannot be opened.

    Raises:
        ImageError: the folder itself cannot be.
    """
    errors: list[OSError] = []
    try:
        paths = [os.path.join(folder, name) for name in os.listdir(folder)]
    except OSError as error:
        raise ImageError(f"{folder}: expected a folder that can be read, got {error}; check its permissions") from error
    if recursive:
        paths = []
        for place, folders, files in os.walk(folder, onerror=errors.append):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths += [os.path.join(place, name) for name in files]
    return paths, errors


def by_name(paths: Iterable[str], errors: Sequence[OSError] = ()) -> Found:
    """Which files are pictures by their names alone, sorted; `errors` are of subfolders that cannot be opened."""
    unread, named = list[tuple[Path, str]](), list[tuple[str, str, str]]()
    for path in paths:
        folder, file = os.path.split(path)
        stem, suffix = os.path.splitext(file)
        if file.startswith("."):
            continue
        if (kind := suffix.lower()) in UNREAD_SUFFIXES:
            unread.append((Path(path), kind))
        elif kind in SUFFIXES:
            named.append((folder, stem, path))
    left_out = [(path, f"expected a {FORMATS} file, got a {kind}, which is not read; save it as PNG") for path, kind in sorted(unread)]
    left_out += [(Path(error.filename), f"expected a folder that can be read, got {error}; check its permissions") for error in errors]
    beside = set[str]()
    if any(stem.endswith(ENDINGS) for _, stem, _ in named):
        owners = {owner for folder, stem, path in named for owner in (os.path.join(folder, stem), path)}
        beside = {path for folder, stem, path in named if stem.endswith(ENDINGS) and not owners.isdisjoint(_owners_of(folder, stem))}
    pictures = (Path(path) for _, _, path in named if path not in beside)
    return Found(sorted(pictures, key=lambda path: path.parts), left_out, sorted(map(Path, beside)))


def _owners_of(folder: str, stem: str) -> list[str]:
    """What the picture of a mask or result may be called beside it, by stem or whole name: of `x__1_mask.png` it is `x__1` or `x`."""
    owner = stem.rpartition("_")[0]
    return [os.path.join(folder, name) for name in (owner, _NUMBER.sub("", owner)) if name]


def check_is_file(name: str) -> None:
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
