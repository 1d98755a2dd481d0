"""A pool of procedural samples on disk, and the augmented samples with their questions that training draws from it.

Making a sample costs more than a training step spends on one, so samples are made once and each is seen several times, cropped,
turned, recoloured and rescaled differently. Pool and samples depend on seeds and step numbers alone: a resumed run draws what
an uninterrupted one would have drawn.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from agvas.config import ANCHORS
from agvas.training.defects import KINDS
from agvas.training.descriptions import describe
from agvas.training.instructions import dialogue, with_anchors
from agvas.training.kept import read_kept, write_kept
from agvas.training.procedural import Sample, make_samples
from agvas.training.sample import TrainingSample
from runtime.progress import pace
from runtime.prompts import DIRECT

OVERLAID_SHARE = 0.4


@dataclass(frozen=True)
class PoolSettings:
    """How many samples, how many of them plain (they come first), their side in pixels, and the first seed (sample i: `seed + i`)."""

    samples: int = 15_000
    plain: int = 6_000
    side: int = 448
    seed: int = 1_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.plain <= self.samples:
            raise ValueError(f"pool: expected 0 to {self.samples} plain samples, got {self.plain}")


class SamplePool:
    """Images uint8 [n, side, side, 3] and masks bool [n, side, side], memory-mapped from `folder`."""

    def __init__(self, folder: Path, settings: PoolSettings) -> None:
        shape = (settings.samples, settings.side, settings.side)
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.masks = np.load(folder / "masks.npy", mmap_mode="r")
        self.kinds = np.load(folder / "kinds.npy", mmap_mode="r")
        self.normals = np.flatnonzero(self.kinds == 0)
        self.plain = settings.plain
        if self.masks.shape != shape:
            raise ValueError(f"pool in {folder} is {self.masks.shape}, expected {shape}; remove the folder and make it again")

    def kind(self, index: int) -> str:
        """Kind of the sample's (first) defect, "" when it is normal."""
        return ("", *KINDS)[self.kinds[index]]

    @classmethod
    def make(cls, folder: Path, settings: PoolSettings, workers: int) -> SamplePool:
        """Open the pool, making it or finishing it first; an interrupted making continues where it stopped."""
        folder.mkdir(parents=True, exist_ok=True)
        progress_file = folder / "pool.json"
        state = {"settings": asdict(settings), "made": 0}
        if progress_file.exists():
            remedy = f"remove the folder {folder}: its samples are made again"
            state = read_kept(progress_file, remedy)
            if not isinstance(state, dict) or not {"settings", "made"} <= state.keys():
                raise ValueError(f"{progress_file}: expected settings and the number made, got {state!r:.60}; {remedy}")
            if state["settings"] != asdict(settings):
                raise ValueError(f"{folder} holds another pool ({state['settings']}); choose another folder or remove it")
        made = int(state["made"])  # type: ignore[call-overload]
        if made < settings.samples:
            shape = (settings.samples, settings.side, settings.side)
            mode: Literal["r+", "w+"] = "r+" if made else "w+"
            images = _reserved(folder / "images.npy", mode, np.uint8, (*shape, 3))
            masks = _reserved(folder / "masks.npy", mode, np.bool_, shape)
            kinds = _reserved(folder / "kinds.npy", mode, np.uint8, shape[:1])
            number = {kind: place for place, kind in enumerate(("", *KINDS))}
            tqdm.write(f"{settings.samples - made} samples to make; all take {images.nbytes / 1e9 * 4 / 3:.1f} GB in {folder}", sys.stderr)
            bar = tqdm(total=settings.samples, initial=made, desc="procedural samples", unit="image", **pace())
            for sample in _samples(settings, made, workers):
                images[made], masks[made], kinds[made] = sample.image, sample.mask, number[sample.kind]
                made += 1
                bar.update()
                if made % 100 == 0 or made == settings.samples:
                    images.flush()
                    masks.flush()
                    kinds.flush()
                    write_kept(progress_file, {"settings": asdict(settings), "made": made})
            bar.close()
        return cls(folder, settings)


def _reserved(path: Path, mode: Literal["r+", "w+"], kind: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A mapped array whose room on the disk is taken now: a page that found none later would end the process without a word.

    Raises:
        OSError: the disk has not so much; says how much is needed.
    """
    array = np.lib.format.open_memmap(path, mode, kind, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                size, reason = path.stat().st_size, os.strerror(error.errno or 0)
                if mode == "w+":
                    path.unlink()
                raise OSError(f"{path}: expected room for {size / 1e9:.2f} GB of samples, got: {reason}; free some space") from error
    return array


def _samples(settings: PoolSettings, made: int, workers: int) -> Iterator[Sample]:
    """Samples from number `made` on, the plain ones first."""
    side, first = settings.side, settings.seed
    yield from make_samples(range(first + made, first + settings.plain), side, side, workers, plain=True)
    yield from make_samples(range(first + max(made, settings.plain), first + settings.samples), side, side, workers)


class ProceduralSource:
    """Samples for the training loop: a pool's pictures, augmented, with a question and an answer in one of the modes.

    Args:
        shown: the network's side, pixels: what a picture's longer side becomes.
        plain_share: probability that a sample is drawn from the plain ones; the rest comes from all the others.
        plain_until: until this step plain samples come alone.
        modes: share of each mode.
        anchors: those the answers hold: fewer than three in an ablation.
        pieces: draw pieces of pictures, at the scale whole ones would have, for a network that is shown half of its own side.
    """

    def __init__(
        self,
        pool: SamplePool,
        shown: int,
        plain_share: float,
        plain_until: int = 0,
        modes: Mapping[str, float] | None = None,
        anchors: Sequence[str] = ANCHORS,
        pieces: bool = False,
    ) -> None:
        self.pool, self.shown, self.plain_share, self.plain_until = pool, shown, plain_share, plain_until
        self.anchors, self.pieces = anchors, pieces
        shares = modes or {DIRECT: 1.0}
        self.modes, self.shares = list(shares), np.array(list(shares.values())) / sum(shares.values())

    def sample(self, seed: int, step: int, index: int) -> TrainingSample:
        rng = np.random.default_rng([seed, step, index])
        plain_share = 1.0 if step < self.plain_until else self.plain_share
        image, mask, kind = self._picture(rng, plain_share)
        mode = self.modes[int(rng.choice(len(self.modes), p=self.shares))]
        if mode != DIRECT and not mask.any():
            # Words are asked of defects mostly. All normal pictures are described alike, so that a model that hesitates takes that
            # answer, and from there an empty mask, for every picture: nano did when two in five descriptions were of normal ones.
            image, mask, kind = self._picture(rng, plain_share)
        instruction, answer = dialogue(mode, describe(kind, mask, rng), rng)
        return TrainingSample(image, instruction, with_anchors(answer, self.anchors), mask, relative=True)

    def _picture(self, rng: np.random.Generator, plain_share: float) -> tuple[np.ndarray, np.ndarray, str]:
        number = _index(self.pool, rng, plain_share)
        image, mask = self.pool.images[number], self.pool.masks[number]
        if not self.pieces:
            image, mask = _mirror(image, mask, rng)
        image, mask = _turn(*_crop_with_defect(image, mask, rng, self.pieces), rng)
        if rng.random() < OVERLAID_SHARE and self.pool.normals.size:
            other = int(self.pool.normals[rng.integers(self.pool.normals.size)])
            image = _overlaid(image, self.pool.images[other], rng)
        mask = _drawn_wide(mask, rng, self.shown)
        return _recolour(_shade_sides(image, rng), rng), mask, self.pool.kind(number)


def _index(pool: SamplePool, rng: np.random.Generator, plain_share: float) -> int:
    total = len(pool.images)
    from_plain = rng.random() < plain_share
    if pool.plain in (0, total):
        return int(rng.integers(total))
    return int(rng.integers(pool.plain) if from_plain else rng.integers(pool.plain, total))


def _mirror(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Half of the time, continue the picture by its mirror image to up to twice its side.

    Pictures of a line are larger than the network's input and sharp in it; the pool's are about as large and, cropped, blurred.
    """
    if rng.random() < 0.5:
        return image, mask
    extra = int(image.shape[0] * rng.uniform(0.2, 1.0))
    return np.pad(image, ((0, extra), (0, extra), (0, 0)), mode="symmetric"), np.pad(mask, ((0, extra), (0, extra)), mode="symmetric")


def _crop_with_defect(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, pieces: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A crop that keeps a third of the defects if one of five tries does: otherwise most pictures would be normal."""
    wanted = mask.sum() / 3
    for _ in range(5):
        cropped = _crop(image, mask, rng, pieces)
        if cropped[1].sum() >= wanted:
            break
    return cropped


def _crop(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, pieces: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A crop of 35-100 % of the side (a piece: mostly 20-60 %) and, half of the time, of another aspect ratio."""
    side = image.shape[0]
    if pieces:
        zoom = rng.uniform(0.2, 0.6) if rng.random() < 0.7 else rng.uniform(0.6, 1.0)
    else:
        zoom = rng.uniform(0.35, 1.0) if rng.random() < 0.6 else 1.0
    aspect = np.exp(rng.uniform(-0.8, 0.8)) if rng.random() < 0.5 else 1.0
    height = int(np.clip(side * zoom * min(1.0, aspect), 24, side))
    width = int(np.clip(side * zoom * min(1.0, 1 / aspect), 24, side))
    top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
    return image[top : top + height, left : left + width], mask[top : top + height, left : left + width]


def _drawn_wide(mask: np.ndarray, rng: np.random.Generator, shown: int) -> np.ndarray:
    """Half of the time, a mask as a person draws it: up to three pixels over the border, once the picture's longer side is `shown` pixels.

    On a hairline that is most of its width.
    """
    radius = round(rng.uniform(0, 3) * max(mask.shape) / shown)
    if rng.random() < 0.5 or radius == 0 or not mask.any():
        return mask
    side = 2 * radius + 1
    return cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))) > 0


def _overlaid(image: np.ndarray, normal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture with a normal picture's texture over it, as much as a defect can stand out from: surfaces that no recipe makes."""
    height, width = image.shape[:2]
    side = normal.shape[0]
    size = int(side * rng.uniform(0.3, 1.0))
    top, left = rng.integers(side - size + 1), rng.integers(side - size + 1)
    piece = cv2.resize(normal[top : top + size, left : left + size], (width, height), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(piece, cv2.COLOR_RGB2GRAY).astype(np.float32)
    texture = grey - cv2.blur(grey, (2 * (max(height, width) // 8) + 1,) * 2)
    strength = rng.uniform(0.15, 0.7) * min(1.0, 25 / (float(texture.std()) + 1))
    return cv2.add(image, cv2.merge([strength * texture] * 3), dtype=cv2.CV_8U)


def _turn(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    turns = (None, cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_COUNTERCLOCKWISE)
    turn, mirrored = turns[int(rng.integers(4))], rng.random() < 0.5

    def turned(array: np.ndarray) -> np.ndarray:
        array = np.ascontiguousarray(array)
        if turn is not None:
            array = cv2.rotate(array, turn)
        return cv2.flip(array, 1) if mirrored else array

    return turned(image), turned(mask.view(np.uint8)).view(bool)


def _shade_sides(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """In a quarter of the pictures light falls off or gathers towards one to four sides, as on an object that fills the view."""
    if rng.random() >= 0.25:
        return image
    shade = np.zeros(image.shape[:2], np.float32)
    for axis, side in enumerate(image.shape[:2]):
        for step in (1, -1):
            if rng.random() < 0.5:
                reach = np.exp(rng.uniform(np.log(0.01), np.log(0.15))) * side
                profile = rng.uniform(-1, 0.4) * np.exp(-(((np.arange(side, dtype=np.float32) + 0.5) / reach) ** rng.uniform(1, 2)))
                shade += np.expand_dims(profile[::step], 1 - axis).astype(np.float32)
    return np.clip(image * (1 + shade[..., None]), 0, 255).astype(np.uint8)


def _recolour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grey, channel order, contrast, brightness and gamma; one look-up table per channel."""
    if rng.random() < 0.25:
        image = cv2.merge([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)] * 3)
    elif rng.random() < 0.3:
        image = image[..., rng.permutation(3)]
    levels = np.linspace(0, 1, 256)
    gamma = np.exp(rng.uniform(-0.5, 0.5))
    contrast, brightness = rng.uniform(0.6, 1.35), rng.uniform(-0.15, 0.15)
    tables = []
    for _ in range(3):
        tint = rng.uniform(-0.03, 0.03)
        tables.append(np.clip(((levels**gamma - 0.5) * contrast + 0.5 + brightness + tint) * 255, 0, 255).astype(np.uint8))
    return cv2.LUT(image, np.stack(tables, axis=-1)[None])
