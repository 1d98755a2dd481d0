"""A sheet of a data set's best, worst and randomly drawn pictures: picture, truth, anomaly map and mask side by side.

What is kept while an evaluation runs is thumbnails only, so a sheet of 10,000 pictures costs no more than one of ten. The same pictures
and predictions give the same sheet, the random rows included. Best and worst are by IoU, among equals by the picture's own AP, hence of
anomalous pictures only; no picture is shown twice.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from benchmarks.evaluation import Observation

__all__ = ["ContactSheet"]

SIDE = 192  # of a thumbnail's box, pixels
GAP = 6
LINE = 18  # the height of a line of text
PANELS = ("picture", "truth", "anomaly map", "mask")
WIDTH = len(PANELS) * (SIDE + GAP) + GAP
_BACKGROUND, _BOX, _INK, _FAINT = (24, 24, 24), (48, 48, 48), (235, 235, 235), (150, 150, 150)


@dataclass(frozen=True, eq=False)
class _Row:
    order: int  # of the picture in the data set
    rank: tuple[float, float] | None  # IoU, then AP; None unless anomalous
    caption: str
    panels: list[Image.Image | None]  # as PANELS; None where there is no truth


class ContactSheet:
    """Collects a data set's rows; `rows` is how many of each sort are shown."""

    def __init__(self, title: str, root: Path, rows: int = 6) -> None:
        self._title, self._root, self._count = title, root, rows
        self._best: list[_Row] = []
        self._worst: list[_Row] = []
        self._drawn: list[_Row] = []
        self._seen = 0
        self._random = random.Random(0)

    def add(self, seen: Observation) -> None:
        """Takes a picture in if it is among the best, the worst or the drawn ones so far."""
        order, self._seen = self._seen, self._seen + 1
        place = order if order < self._count else self._random.randrange(order + 1)  # each picture is drawn with the same chance
        rank = None if seen.iou is None else (seen.iou, seen.ap or 0.0)
        best = rank is not None and (len(self._best) < self._count or rank > _rank(self._best[-1]))
        worst = rank is not None and (len(self._worst) < self._count or rank < _rank(self._worst[-1]))
        if not (best or worst or place < self._count):
            return
        row = _Row(order, rank, self._caption(seen), _panels(seen))
        if place < self._count:
            self._drawn[place : place + 1] = [row]
        if best:
            self._best = sorted([*self._best, row], key=lambda kept: (*(-value for value in _rank(kept)), kept.order))[: self._count]
        if worst:
            self._worst = sorted([*self._worst, row], key=lambda kept: (_rank(kept), kept.order))[: self._count]

    def save(self, path: Path) -> None:
        """Writes the sheet as PNG, whole or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        self.image().save(partial, format="PNG")
        os.replace(partial, path)

    def image(self) -> Image.Image:
        """The sheet, RGB."""
        parts = self._parts()
        height = 2 * LINE + sum(LINE + GAP + len(rows) * (LINE + SIDE + GAP) for _, rows in parts)
        sheet = Image.new("RGB", (WIDTH, height), _BACKGROUND)
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        draw.text((GAP, 2), f"{_printable(self._title)}, {self._seen} pictures", fill=_INK, font=font)
        for column, name in enumerate(PANELS):
            draw.text((GAP + column * (SIDE + GAP), LINE + 2), name, fill=_FAINT, font=font)
        top = 2 * LINE
        for name, rows in parts:
            draw.text((GAP, top + 4), name, fill=_INK, font=font)
            top += LINE + GAP
            for row in rows:
                draw.text((GAP, top + 2), row.caption, fill=_FAINT, font=font)
                for column, panel in enumerate(row.panels):
                    corner = (GAP + column * (SIDE + GAP), top + LINE)
                    draw.rectangle((*corner, corner[0] + SIDE - 1, corner[1] + SIDE - 1), fill=_BOX)
                    if panel is None:
                        draw.text((corner[0] + GAP, corner[1] + GAP), "unknown", fill=_FAINT, font=font)
                    else:
                        sheet.paste(panel, (corner[0] + (SIDE - panel.width) // 2, corner[1] + (SIDE - panel.height) // 2))
                top += LINE + SIDE + GAP
        return sheet

    def _parts(self) -> list[tuple[str, list[_Row]]]:
        """What is shown, each picture once: a set too small for best and worst is halved, and a drawn picture shown already is left out."""
        ranked = {row.order for row in (*self._best, *self._worst)}
        best = self._best[: (len(ranked) + 1) // 2]
        shown = {row.order for row in best}
        worst = [row for row in self._worst if row.order not in shown]
        shown |= {row.order for row in worst}
        drawn = sorted((row for row in self._drawn if row.order not in shown), key=lambda row: row.order)
        return [(name, rows) for name, rows in (("best IoU", best), ("worst IoU", worst), ("drawn at random", drawn)) if rows]

    def _caption(self, seen: Observation) -> str:
        numbers = [("IoU", seen.iou), ("AP", seen.ap), ("score", seen.prediction.score)]
        words = [f"{name} {value:.3f}" for name, value in numbers if value is not None]
        kind = "normal" if seen.is_anomalous is False else (seen.item.kind or "")
        name = Path(os.path.relpath(seen.item.image, self._root)).as_posix()
        return _printable("  ".join(word for word in (name, seen.item.category, kind, *words) if word))


def _rank(row: _Row) -> tuple[float, float]:
    assert row.rank is not None
    return row.rank


def _panels(seen: Observation) -> list[Image.Image | None]:
    from runtime.images import read_image

    picture = _thumbnail(read_image(seen.item.image))
    truth = None if seen.truth is None else _thumbnail(_black_and_white(seen.truth))
    return [picture, truth, _thumbnail(_heat(seen.prediction.anomaly_map)), _thumbnail(_black_and_white(seen.prediction.mask))]


def _thumbnail(rgb: npt.NDArray[np.uint8]) -> Image.Image:
    """Fitted into the box, small pictures enlarged in whole pixels; areas are averaged, so that a thin defect turns grey and stays."""
    height, width = rgb.shape[:2]
    scale = min(SIDE / width, SIDE / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return Image.fromarray(rgb).resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)


def _black_and_white(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """[H, W] → [H, W, 3]"""
    return np.repeat(mask[:, :, None].astype(np.uint8) * 255, 3, axis=2)


def _heat(anomaly_map: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """0 black, 1/3 red, 2/3 yellow, 1 white, the same for every picture: [H, W] → [H, W, 3]."""
    ramp = 3 * anomaly_map[:, :, None] - np.arange(3, dtype=np.float32)
    return np.asarray(np.rint(ramp.clip(0, 1) * 255), np.uint8)


def _printable(text: str) -> str:
    """Pillow's own font has Latin letters only."""
    return text.encode("latin-1", "replace").decode("latin-1")
