"""What the model found in one picture: mask, map, verdict, and the forms a line needs them in (JSON, polygons, files).

The outline is traced here along pixel edges, so that the runtime needs neither OpenCV nor SciPy and the polygons give
back the mask exactly. How a map is brought back to the picture's size stands in preprocess.py (`restore`); nothing here runs a model.
"""

from __future__ import annotations

import io
import os
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.errors import RequestError
from runtime.images import DIM
from runtime.masking import MaskRule
from runtime.preprocess import one_tone
from runtime.region import as_region
from runtime.writing import make_folder, write_whole

# How far outside [0, 1] a map may lie: resampling a float32 map adds a few units in its last place.
MAP_SLACK = 1e-4


# Compared by identity: arrays have no truth value to compare fields by.
@dataclass(frozen=True, eq=False)
class Segmentation:
    """One picture's result; H and W are the picture's own size.

    Attributes:
        mask: bool [H, W], True where anomalous.
        anomaly_map: float32 [H, W], probability of an anomaly in [0, 1].
        score: of the whole picture, in [0, 1]: the map's maximum.
        is_anomalous: the verdict, OK (False) or NG (True): one pixel in the mask is enough.
        text: what the model said.
        instruction: what it was asked, whole: a sentence on the normal state stands in front.
        mode: how it was asked.
        answer_verified: True where the single pass confirmed the fixed answer; False where the model wrote its own.
        anchor_groups: how often the answer holds [NOR], [ANO] and [SEG], all three. The first group makes the map; without one there
            is no map, it is all zeros.
        truncated: the answer stopped at the length limit, not at its end.
        rule: how the mask was cut from the map.
        timings: milliseconds by stage, and "total"; with several answers about one picture, the first one's include seeing it. Reading
            the picture (decoding it) and saving results are not among them. Of stages that a GPU computes at the same time, each has
            what it was waited for.
        device_timings: milliseconds that each stage took on a GPU, its copies included, where the engine can tell (TensorRT); else empty.
        image: uint8 RGB [H, W, 3] for `overlay`, by reference; None where it was not kept.
        tiles: how many pieces the picture was seen in.
        region: bool [H, W], the pixels that the verdict is about, see `within`; None for all.
        warnings: in words, what may have spoiled the verdict: a frame of one tone, dim samples, a size at which defects are lost, more
            pictures in a file than the one that was judged. An OK with a warning is none to be trusted unseen.

    Raises:
        ValueError: an array of another dtype or shape, or a map with NaN or values outside [0, 1]; a NaN would pass
            every threshold as normal.
    """

    mask: np.ndarray = field(repr=False)
    anomaly_map: np.ndarray = field(repr=False)
    score: float
    is_anomalous: bool
    text: str
    instruction: str
    mode: str
    answer_verified: bool
    anchor_groups: int
    truncated: bool
    rule: MaskRule
    timings: dict[str, float]
    image: np.ndarray | None = field(default=None, repr=False)
    tiles: int = 1
    region: np.ndarray | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    device_timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_array("mask", self.mask, "bool", "[H, W]", self.mask.ndim == 2 and self.mask.size > 0)
        size = list(self.mask.shape)
        _check_array("anomaly_map", self.anomaly_map, "float32", size, self.anomaly_map.shape == self.mask.shape)
        lowest, highest = self.anomaly_map.min(), self.anomaly_map.max()
        if not (lowest >= -MAP_SLACK and highest <= 1 + MAP_SLACK):
            raise ValueError(
                f"anomaly_map: expected probabilities in [0, 1], got {lowest}..{highest}; compare the stages' outputs "
                "with agvas-verify (an fp16 encoder that overflows shows up like this)"
            )
        if self.image is not None:
            _check_array("image", self.image, "uint8", [*size, 3], self.image.shape == (*self.mask.shape, 3))

    @property
    def anchors_found(self) -> bool:
        """False where the answer lacks [NOR], [ANO] or [SEG]: no verdict then, though the mask is empty."""
        return self.anchor_groups > 0

    @property
    def area(self) -> int:
        """Number of anomalous pixels."""
        return int(np.count_nonzero(self.mask))

    def polygons(self) -> list[list[list[tuple[int, int]]]]:
        """Outline of the mask along pixel edges.

        Returns:
            One entry for each 4-connected component, from the top; each holds its outer ring, then its holes. A ring is
            a list of corners (x, y) in pixels from the picture's top left corner: pixel (x, y) covers x..x+1, y..y+1.
            The last corner joins the first, and no three corners in a row lie on one line. On screen, outer rings run
            clockwise and holes against the clock. Filling the rings by the even-odd rule gives the mask exactly; a ring
            may touch itself at a corner, where two pixels meet diagonally.
        """
        return _trace(self.mask)

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(x, y, width, height) in pixels around each 4-connected component of the mask, in the order of `polygons`."""
        return _boxes(self.polygons())

    def overlay(self, alpha: float = 0.45, color: tuple[int, int, int] = (255, 0, 64), outline: bool = True) -> Image.Image:
        """The picture with the mask tinted, and darkened outside a region of interest.

        Args:
            alpha: share of `color` in the tint, 0 (the picture alone) to 1.
            color: RGB, 0..255.
            outline: draw the mask's outermost pixels in full `color`.

        Raises:
            RequestError: alpha or color out of range, or the picture was not kept.
        """
        if self.image is None:
            raise RequestError("overlay: expected image uint8 [H, W, 3], got None; keep the image in the Segmentation")
        if not 0 <= alpha <= 1:
            raise RequestError(f"overlay: expected alpha in 0..1, got {alpha!r}; 0.45 is the default")
        if len(color) != 3 or not all(isinstance(level, int) and 0 <= level <= 255 for level in color):
            raise RequestError(f"overlay: expected color as three integers 0..255 (RGB), got {color!r}")
        painted = self.image.copy()
        if self.region is not None:
            painted[~self.region] //= 3
        tint = np.asarray(color, np.float32) * alpha
        levels = np.arange(256, dtype=np.uint8)[:, None]
        tinted = np.rint(levels * np.float32(1 - alpha) + tint).astype(np.uint8)  # [256, 3]
        for channel in range(3):  # by table: of a mask that fills a 12-megapixel picture several times as fast
            np.copyto(painted[..., channel], tinted[self.image[..., channel], channel], where=self.mask)
        if outline:
            around = np.pad(self.mask, 1)
            inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
            painted[self.mask & ~inner] = color
        return Image.fromarray(painted)

    @property
    def threshold(self) -> float:
        """The picture is anomalous where its score exceeds it."""
        return self.rule.threshold

    @property
    def relative_threshold(self) -> float:
        """Share of the score that a pixel of the mask exceeded, 0..1."""
        return self.rule.relative_threshold

    @property
    def region_share(self) -> float:
        """Share of the picture's pixels that the verdict is about, 0..1."""
        return 1.0 if self.region is None else float(self.region.mean())

    def with_threshold(self, threshold: float | None = None, *, relative_threshold: float | None = None) -> Segmentation:
        """The same map judged by another threshold; score, text and timings stay.

        Without anchors the map is all zeros, so the mask stays empty at any threshold.

        Args:
            threshold, relative_threshold: 0..1, see runtime.masking.MaskRule; None keeps the present one.

        Raises:
            RequestError: not a number in 0..1.
        """
        rule = self.rule.changed(threshold, relative_threshold)
        mask = rule.mask(self.anomaly_map)
        return replace(self, mask=mask, is_anomalous=bool(mask.any()), rule=rule)

    def within(self, region: np.ndarray) -> Segmentation:
        """The same map judged in a region of interest alone: outside it the map is 0, so score, verdict and mask are the region's.

        The model saw the whole picture and no second inference is made. Without anchors there is no verdict here either. Of a result
        that has a region already, what lies in both is judged; several regions of one picture are several calls on its first result.
        Warnings stay, and one is added where the region itself is of one tone and the picture was kept.

        Args:
            region: bool [H, W], or uint8 of 0 and 1 or 255, of the picture's own size.

        Raises:
            RequestError: a region of another size, with other values, or with nothing to look at.
        """
        looked_at = as_region(region)
        if looked_at.shape != self.mask.shape:
            own, given = (f"{width} × {height}" for height, width in (self.mask.shape, looked_at.shape))
            raise RequestError(f"region: expected the picture's size, {own}, got {given}; draw it on a picture of this size")
        if self.region is not None:
            looked_at = looked_at & self.region
            if not looked_at.any():
                raise RequestError(
                    "region: expected one that meets the region judged before, got one that lies outside it; "
                    "judge each region on the first result"
                )
        anomaly_map = np.where(looked_at, self.anomaly_map, np.float32(0))
        mask = self.rule.mask(anomaly_map)
        words = self.warnings
        if self.image is not None and DIM not in words:  # which has another cause and remedy
            words = tuple(dict.fromkeys((*words, *one_tone(self.image, looked_at))))
        return replace(
            self,
            mask=mask,
            anomaly_map=anomaly_map,
            score=float(anomaly_map.max()),
            is_anomalous=bool(mask.any()),
            region=looked_at,
            warnings=words,
        )

    def to_json(self, *, polygons: bool = False) -> dict[str, Any]:
        """What JSON can hold of this result, in the words of agvas-segment's line.

        "mask" is None: agvas-segment puts the path there, and beside it the picture's name, the bundle and the engine. With `polygons`,
        the outline too.
        """
        height, width = self.mask.shape
        outlines = self.polygons()
        record: dict[str, Any] = {
            "score": float(self.score),
            "is_anomalous": bool(self.is_anomalous),
            "mask": None,
            "area": self.area,
            "boxes": [list(box) for box in _boxes(outlines)],
            "width": width,
            "height": height,
            "text": self.text,
            "instruction": self.instruction,
            "mode": self.mode,
            "answer_verified": bool(self.answer_verified),
            "anchors_found": self.anchors_found,
            "anchor_groups": int(self.anchor_groups),
            "truncated": bool(self.truncated),
            "threshold": float(self.rule.threshold),
            "relative_threshold": float(self.rule.relative_threshold),
            "tiles": int(self.tiles),
            "region_share": self.region_share,
            "warnings": list(self.warnings),
            "timings_ms": {stage: float(spent) for stage, spent in self.timings.items()},
        }
        if polygons:
            record["polygons"] = outlines
        return record

    def save(self, folder: str | os.PathLike[str], stem: str, *, overlay: bool = False, anomaly_map: bool = False) -> dict[str, Path]:
        """Write `<stem>_mask.png` (one channel, 0 and 255) and, if asked, `<stem>_overlay.png` and `<stem>_map.png` into `folder`.

        The map's file has one channel of 16 bits, 65535 for a probability of 1.

        The folder is made if need be. Each file appears whole or not at all: a reader that polls the folder never sees
        half a mask, and a failure leaves an older file as it was.

        Returns:
            Paths by "mask", "overlay" and "map".

        Raises:
            RequestError: `stem` is not a plain file name or too long for one, or the overlay is asked for and the picture was not kept.
            OutputError: the folder or a file cannot be written, or the disk is full.
        """
        if not isinstance(stem, str) or not stem or stem != os.path.basename(stem) or stem in (".", "..") or "\0" in stem:
            raise RequestError(f"stem: expected a file name without folders, got {stem!r}; give the folder as `folder`")
        pictures = {"mask": Image.fromarray(self.mask.astype(np.uint8) * 255)}
        if overlay:
            pictures["overlay"] = self.overlay()
        if anomaly_map:
            pictures["map"] = Image.fromarray(np.rint(np.clip(self.anomaly_map, 0, 1) * 65535).astype(np.uint16))
        make_folder(folder, os.fspath(folder))
        paths = {}
        for name, picture in pictures.items():
            paths[name] = Path(folder) / f"{stem}_{name}.png"
            encoded = io.BytesIO()
            # Runs alone: of 12 megapixels an overlay takes 0.7 s and 18.2 MB (level 1: 0.9 s, 20.9 MB; Pillow's 6: 3.7 s, 18.3 MB; none:
            # 0.5 s, 36 MB), a map 0.4 s and 17.8 MB (0.7 s, 16.8 MB; 1.6 s, 16.9 MB), a mask no more than any.
            picture.save(encoded, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
            write_whole(paths[name], encoded.getbuffer())
        return paths


def _boxes(polygons: list[list[list[tuple[int, int]]]]) -> list[tuple[int, int, int, int]]:
    corners = [np.array(rings[0]) for rings in polygons]
    lows, highs = [ring.min(axis=0) for ring in corners], [ring.max(axis=0) for ring in corners]
    return [(int(x), int(y), int(right - x), int(below - y)) for (x, y), (right, below) in zip(lows, highs, strict=True)]


def _check_array(name: str, array: np.ndarray, dtype: str, shape: object, fits: bool) -> None:
    if array.dtype != dtype or not fits:
        raise ValueError(f"{name}: expected {dtype} {shape}, got {array.dtype} {list(array.shape)}; convert it before")


def _trace(mask: np.ndarray) -> list[list[list[tuple[int, int]]]]:
    """Rings along the pixel edges of a bool mask [H, W]; see `Segmentation.polygons`.

    Only corners are visited. Along a row of grid points, corners come in pairs that are the ends of one horizontal
    edge, and along a column in pairs that end a vertical one, so a ring is a walk that takes the two kinds of edge in
    turn. A grid point where two pixels meet diagonally is two corners, each joining the two edges of one of the pixels:
    that keeps the pixels apart, which makes components 4-connected.
    """
    height, width = mask.shape
    padded = np.pad(mask, 1)
    # The four pixels around each grid point, [H+1, W+1]: above and below, left and right.
    above_left, above_right = padded[:-1, :-1], padded[:-1, 1:]
    below_left, below_right = padded[1:, :-1], padded[1:, 1:]
    diagonal = (above_left == below_right) & (above_right == below_left) & (above_left != above_right)
    corners = (above_left ^ above_right ^ below_left ^ below_right).astype(np.uint8) + 2 * diagonal.astype(np.uint8)

    # By rows: corner 2k and 2k + 1 end one horizontal edge. Of a diagonal's two, the first ends the edge to its left.
    points = np.flatnonzero(corners)
    points = np.repeat(points, corners.ravel()[points])  # each = y · (W+1) + x
    y, x = np.divmod(points, width + 1)
    second = np.zeros(len(points), bool)
    second[1:] = points[1:] == points[:-1]

    # By columns, the same. A diagonal's upward edge borders its upper pixel: where that is the left one, the corner
    # that ends the left edge comes first; where it is the right one (rising), the other corner does.
    rising = diagonal[y, x] & ~above_left[y, x]
    by_column = np.lexsort((second ^ rising, y, x))
    across = np.empty(len(points), np.int64)
    across[by_column[0::2]] = by_column[1::2]
    across[by_column[1::2]] = by_column[0::2]

    vertical = across.tolist()
    coordinates = list(zip(x.tolist(), y.tolist(), strict=True))
    ring_of = [-1] * len(points)
    rings: list[list[tuple[int, int]]] = []
    starts = []
    for start in range(0, len(points), 2):
        if ring_of[start] >= 0:
            continue
        ring: list[tuple[int, int]] = []
        corner = start
        while ring_of[corner] < 0:
            end = corner ^ 1
            ring_of[corner] = ring_of[end] = len(rings)
            ring.append(coordinates[corner])
            ring.append(coordinates[end])
            corner = vertical[end]
        rings.append(ring)
        starts.append(start)

    # Each walk began at its ring's uppermost edge, to the right: below it lies the component, or a hole.
    start_x, start_y = x[starts], y[starts]
    is_hole = ~padded[start_y + 1, start_x + 1]
    # Just above a hole's uppermost edge lies a run of pixels of its component. The run's left edge is part of another
    # ring of that component, and of one that begins higher, so that ring has been placed before.
    run_starts = np.flatnonzero(mask & ~padded[1:-1, :-2])
    above = (start_y[is_hole] - 1) * width + start_x[is_hole]
    run_x = run_starts[np.searchsorted(run_starts, above, "right") - 1] % width
    tops = by_column[0::2]
    edges = np.searchsorted(x[tops] * (height + 1) + y[tops], run_x * (height + 1) + start_y[is_hole] - 1, "right") - 1
    neighbours = iter(tops[edges].tolist())

    polygons: list[list[list[tuple[int, int]]]] = []
    polygon_of: list[int] = []
    for ring, hole in zip(rings, is_hole.tolist(), strict=True):
        if hole:
            polygon_of.append(polygon_of[ring_of[next(neighbours)]])
            polygons[polygon_of[-1]].append(ring[::-1])
        else:
            polygon_of.append(len(polygons))
            polygons.append([ring])
    return polygons
