"""Large pictures in overlapping tiles: each goes through the whole chain as a picture of its own, and the maps are put together.

The model sees a picture at one size, whatever its own; in tiles, what is small in a large frame stays large enough to be seen, at one
inference a tile. Neighbours overlap so that every pixel is judged with context around it, and each pixel of the map comes from one
tile, the one whose border is further away (the overlap-tile strategy of U-Net, Ronneberger et al. 2015): nothing is averaged, so a
defect that one tile shows whole is not halved by another that shows its end.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.errors import RequestError, check_whole
from runtime.pipeline import Pipeline, Prepared, Trace, Vision
from runtime.preprocess import Frame
from runtime.prompts import Prompt

KEPT = 32  # tiles of a picture whose encoders' outputs are kept for the next question: 1 GB of the full-size model's
MANY = 256  # tiles of a picture; more are told before they begin
LEAST_SIDE = 64  # pixels of the picture; smaller tiles show the model texture and nothing of the part


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in pixels of the picture: it sees `start` to `end`, and `kept_from` to `kept_to` are kept of it."""

    start: int
    end: int
    kept_from: int
    kept_to: int


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut.

    Args:
        side: of a square tile, pixels of the picture; a picture that is no larger stays whole.
        overlap: of neighbouring tiles at least, pixels; None for an eighth of `side`.

    Raises:
        RequestError: a side below LEAST_SIDE, or an overlap of more than half of it.
    """

    side: int
    overlap: int | None = None

    def __post_init__(self) -> None:
        check_whole("tile", self.side)
        if self.overlap is not None:
            check_whole("tile_overlap", self.overlap)
        if self.side < LEAST_SIDE:
            raise RequestError(f"tile: expected a side of {LEAST_SIDE} pixels at least, got {self.side}; leave it out for whole pictures")
        if self.overlap is not None and not 0 <= self.overlap <= self.side // 2:
            raise RequestError(f"tile_overlap: expected 0 to {self.side // 2} pixels, half of a tile's side, got {self.overlap}")

    def spans(self, length: int) -> list[Span]:
        """Tiles along an axis of `length` pixels, evenly spaced and all of the same size; what they keep covers it once."""
        if length <= self.side:
            return [Span(0, length, 0, length)]
        overlap = self.side // 8 if self.overlap is None else self.overlap
        count = math.ceil((length - overlap) / (self.side - overlap))
        starts = [index * (length - self.side) // (count - 1) for index in range(count)]
        seams = [0, *((left + self.side + right) // 2 for left, right in zip(starts, starts[1:])), length]
        return [Span(start, start + self.side, *kept) for start, *kept in zip(starts, seams, seams[1:])]

    def tiles(self, height: int, width: int) -> list[tuple[Span, Span]]:
        """(rows, columns) of each tile of a picture, row by row."""
        return [(rows, columns) for rows in self.spans(height) for columns in self.spans(width)]


def kept(array: np.ndarray, tile: tuple[Span, Span]) -> np.ndarray:
    """The part of an array of the picture's size [H, W] that a tile keeps: a view."""
    rows, columns = tile
    return array[rows.kept_from : rows.kept_to, columns.kept_from : columns.kept_to]


class TiledPipeline:
    """A pipeline that takes pictures in tiles; it offers what an Inspection and a stream ask of a Pipeline.

    One question is put to every tile. What is said of the picture is the answer of the tile whose map is highest; where a tile's answer
    lacks an anchor, it is that one, and the picture has no map and no verdict, as a whole picture then has none. So that memory does not
    grow with the picture, what is kept of it between questions are the encoders' outputs of its first KEPT tiles, and of no tile the
    language model's keys and values. With a region (bool [H, W], of the pictures' size), tiles that keep none of its pixels are not
    computed; the map is 0 there.
    """

    def __init__(self, pipeline: Pipeline, tiling: Tiling, region: np.ndarray | None = None) -> None:
        self.pipeline = pipeline
        self.tiling = tiling
        self.region = region
        self.prompts = pipeline.prompts

    def prepare(self, image: np.ndarray) -> TiledPrepared:
        """`Pipeline.prepare` of a picture's (uint8 RGB [H, W, 3]) first tiles."""
        tiles = [tile for tile in self.tiling.tiles(*image.shape[:2]) if self.region is None or kept(self.region, tile).any()]
        if len(tiles) > MANY:
            height, width = image.shape[:2]
            warnings.warn(
                f"tile: a picture of {width} × {height} pixels in tiles of {self.tiling.side} is {len(tiles)} inferences; if that takes "
                "too long, take larger tiles",
                stacklevel=2,
            )
        prepared = [self._prepare(image, tile) for tile in tiles[:KEPT]]
        return TiledPrepared(image, tiles, prepared)

    def look(self, prepared: TiledPrepared) -> TiledVision:
        """`Pipeline.look` at the tiles that were prepared; at the others each answer looks anew."""
        return TiledVision(prepared.image, prepared.tiles, [self.pipeline.look(tile) for tile in prepared.prepared])

    def answer(self, vision: TiledVision, prompt: Prompt, on_text: Callable[[str], object] | None = None) -> Trace:
        """The tiles' answers as one; its timings are their sums. A trace of tiles holds no tensors.

        Raises:
            RequestError: `on_text` for a picture of several tiles, whose texts would run into one another.
            EngineFailed: as Pipeline.answer.
        """
        height, width = vision.image.shape[:2]
        if vision.tiles == [(Span(0, height, 0, height), Span(0, width, 0, width))]:
            return self.pipeline.answer(vision.visions[0], prompt, on_text)
        if on_text is not None and len(vision.tiles) > 1:
            raise RequestError(f"on_text: expected a picture in one piece, got {len(vision.tiles)} tiles, each with a text of its own")
        anomaly_map = np.zeros((height, width), np.float32)
        timings, device_timings = Counter[str](), Counter[str]()
        said: tuple[int, ...] = ()
        without: tuple[int, ...] | None = None
        verified, highest, joining = True, -math.inf, 0.0
        for number, (rows, columns) in enumerate(vision.tiles):
            if number < len(vision.visions):
                seen = vision.visions[number]
            else:
                seen = self.pipeline.look(self._prepare(vision.image, (rows, columns)))
            trace = self.pipeline.answer(seen, prompt, on_text)
            seen.forget()
            started = time.perf_counter()
            timings.update(trace.timings)
            device_timings.update(trace.device_timings)
            verified = verified and trace.verified
            if trace.anchor_states is None:
                without = trace.answer if without is None else without
            top, left = rows.kept_from - rows.start, columns.kept_from - columns.start
            own = trace.anomaly_map[top : rows.kept_to - rows.start, left : columns.kept_to - columns.start]
            kept(anomaly_map, (rows, columns))[:] = own
            if self.region is not None:
                own = own * kept(self.region, (rows, columns))
            if not said or own.max() > highest:
                said, highest = trace.answer, float(own.max())
            joining += (time.perf_counter() - started) * 1e3
        if without is not None:
            said, anomaly_map = without, np.zeros_like(anomaly_map)
        timings.update({"postprocess": joining, "total": joining})
        return Trace(
            answer=said,
            verified=verified,
            anomaly_map=anomaly_map,
            timings=dict(timings),
            device_timings=dict(device_timings),
            tiles=len(vision.tiles),
        )

    def _prepare(self, image: np.ndarray, tile: tuple[Span, Span]) -> Prepared:
        rows, columns = tile
        return self.pipeline.prepare(np.ascontiguousarray(image[rows.start : rows.end, columns.start : columns.end]))


@dataclass(frozen=True, eq=False)
class TiledPrepared:
    """A picture (uint8 RGB [H, W, 3], by reference) and its tiles, the first of them as the encoders take them."""

    image: np.ndarray
    tiles: list[tuple[Span, Span]]
    prepared: list[Prepared]

    @property
    def frame(self) -> Frame:
        """Of every tile: all are of one size."""
        return self.prepared[0].frame


@dataclass(frozen=True, eq=False)
class TiledVision:
    """A picture (uint8 RGB [H, W, 3], by reference) and its tiles, and what the first of them contribute to every answer."""

    image: np.ndarray
    tiles: list[tuple[Span, Span]]
    visions: list[Vision]
