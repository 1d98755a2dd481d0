"""Which normal picture stands beside an anomalous one: the most similar of its category, by structure and colour.

After MMAD, which the paper follows (A.2): SSIM of the grey pictures and the Bhattacharyya distance of colour histograms. How the two are
combined is said in neither paper; here the score is SSIM minus the distance, both on thumbnails of 64 x 64 (sides resized apart, so that
pictures of any shape compare), the histogram joint over 8 x 8 x 8 colours. The best score wins, the first path of equal ones.

A normal picture is decoded once: thumbnails and histograms are kept in a file per category. The search is exact without being complete:
no SSIM exceeds 1, so pictures come in the order of their distance and the search ends where 1 - distance cannot win any more (on
magnetic tiles, all grey alike, after 31 of 51 pictures on average).
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from agvas.training.sources.files import IMAGE_SUFFIXES
from agvas.training.sources.pictures import read_picture

__all__ = ["References", "bhattacharyya_distance", "colour_histogram", "find_normals", "structural_score", "thumbnail"]

SIDE = 64
_BINS = 8


@dataclass(frozen=True)
class _Category:
    paths: tuple[Path, ...]
    thumbnails: npt.NDArray[np.uint8]  # [N, 64, 64], grey
    histograms: npt.NDArray[np.float32]  # [N, 512], each sums to 1


class References:
    """The normal pictures of every category. Safe to ask from several threads."""

    def __init__(self, normals: Mapping[str, Sequence[Path]], cache: Path | None = None) -> None:
        """`cache` is a folder for the thumbnails' files, made when needed; without it they live in memory only."""
        self._normals = {category: tuple(sorted(set(paths))) for category, paths in normals.items()}
        self._cache = cache
        self._loaded: dict[str, _Category] = {}
        self._locks = {category: threading.Lock() for category in self._normals}

    def nearest(self, image: npt.NDArray[np.uint8], category: str, apart_from: Path | None = None) -> Path:
        """The normal picture of the category most like `image`, uint8 RGB [H, W, 3]; `apart_from` is never chosen.

        Raises:
            LookupError: the category has no (other) normal picture.
            ValueError: a normal picture that cannot be read.
        """
        known = self._category(category)
        grey, histogram = thumbnail(image), colour_histogram(image)
        distances = bhattacharyya_distance(known.histograms, histogram)
        best, chosen = -np.inf, None
        for index in np.argsort(distances, kind="stable"):
            if 1.0 - distances[index] < best:
                break
            if known.paths[index] == apart_from:
                continue
            score = structural_score(grey, known.thumbnails[index]) - float(distances[index])
            if score > best or (score == best and chosen is not None and index < chosen):
                best, chosen = score, int(index)
        if chosen is None:
            raise LookupError(f"category {category!r}: expected a normal picture, found none; name a folder with --normals")
        return known.paths[chosen]

    def _category(self, category: str) -> _Category:
        if category not in self._normals:
            raise LookupError(f"category {category!r}: expected a normal picture, found none; name a folder with --normals")
        with self._locks[category]:
            if category not in self._loaded:
                self._loaded[category] = self._load(category)
            return self._loaded[category]

    def _load(self, category: str) -> _Category:
        paths = self._normals[category]
        if self._cache is None:
            return _make(paths)
        stamps = [(str(path), status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()]]
        key = hashlib.sha256(repr((SIDE, _BINS, stamps)).encode()).hexdigest()[:32]
        file = self._cache / f"{key}.npz"
        if file.is_file():
            try:
                with np.load(file) as arrays:
                    return _Category(paths, arrays["thumbnails"], arrays["histograms"])
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                pass  # cut short by a crash: made again below, nothing depends on it
        made = _make(paths)
        self._cache.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        np.savez(stream, thumbnails=made.thumbnails, histograms=made.histograms)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(stream.getvalue())
        os.replace(temporary, file)
        return made


def find_normals(folder: Path) -> dict[str, list[Path]]:
    """The pictures of folder/CATEGORY/ by category, in the order of their names; {} where there are none."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            found.setdefault(path.parent.name, []).append(path)
    return found


def thumbnail(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Grey, [64, 64]."""
    return np.asarray(Image.fromarray(image).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def colour_histogram(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Shares of 8 x 8 x 8 colours, float32 [512], of the picture at 64 x 64."""
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX), np.int64) * _BINS // 256
    codes = (small[..., 0] * _BINS + small[..., 1]) * _BINS + small[..., 2]
    return (np.bincount(codes.ravel(), minlength=_BINS**3) / codes.size).astype(np.float32)


def bhattacharyya_distance(
    histograms: npt.NDArray[np.float32],
    histogram: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """sqrt(1 - sum sqrt(p q)) of each row of [N, K] with [K], in 0..1 (as OpenCV's HISTCMP_BHATTACHARYYA of shares)."""
    coefficients = np.sqrt(histograms.astype(np.float64) * histogram.astype(np.float64)).sum(axis=-1)
    distances: npt.NDArray[np.float64] = np.sqrt(np.clip(1.0 - coefficients, 0.0, 1.0))
    return distances


def structural_score(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """SSIM of two grey thumbnails (Wang et al. 2004), scikit-image's, at most 1."""
    return float(_ssim()(one, other, data_range=255))


def _ssim() -> Callable[..., float]:
    from skimage.metrics import structural_similarity

    function: Callable[..., float] = structural_similarity
    return function


def _make(paths: Sequence[Path]) -> _Category:
    thumbnails = np.empty((len(paths), SIDE, SIDE), np.uint8)
    histograms = np.empty((len(paths), _BINS**3), np.float32)
    for index, path in enumerate(paths):
        image = read_picture(path)
        thumbnails[index], histograms[index] = thumbnail(image), colour_histogram(image)
    return _Category(tuple(paths), thumbnails, histograms)
