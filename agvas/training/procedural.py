"""Procedural training samples: a normal view, in three of five cases with defects, seen through a camera.

A sample is a pure function of (seed, height, width), so a data set is a range of integers and needs no storage. Normal and anomalous
samples share backgrounds and camera, hence only the defect tells them apart. It writes no files and resizes nothing for the model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import cv2
import numpy as np

from agvas.training import surfaces
from agvas.training.backgrounds import background_and_region
from agvas.training.defects import add_defect
from agvas.training.noise import blur, chance, grain, log_uniform, pick, rgb

# One simple material, even light and a defect that shows: what a model from scratch learns first. On the full variety alone it stays at
# the constant answer for hundreds of steps.
PLAIN_MATERIALS = (surfaces.mottled, surfaces.smooth, surfaces.smooth, surfaces.granular, surfaces.brushed, surfaces.orange_peel,
                   surfaces.ground_ceramic, surfaces.leather, surfaces.road, surfaces.woven)
# What stands twice is drawn twice as often: large patches, stains, and the thin lines that are hardest to see.
PLAIN_KINDS = ("scratch", "scratch", "crack", "crack", "wrinkle", "crack_net", "hole", "large_patch", "stain", "spalling", "corrosion",
               "inclusion", "cut", "dent", "burn", "contamination", "extra_part", "fibre", "band", "large_patch", "stain", "clouding")
NORMAL_SHARE = 0.4
THEMED_SHARE = 0.3
# Materials and the defects they are known for. Most samples mix anything with anything; these keep the likely pairs from being rare.
THEMES = (
    ((surfaces.road, surfaces.granular, surfaces.pebbles, surfaces.formwork, surfaces.mottled, surfaces.strewn),
     ("crack", "crack", "crack", "crack_net", "spalling", "spalling", "corrosion", "large_patch", "exposed_bar", "stain", "peel")),
    ((surfaces.ground_ceramic, surfaces.brushed, surfaces.smooth),
     ("hole", "hole", "crack", "fray", "unevenness", "unevenness", "spalling", "scratch", "missing", "large_patch")),
    ((surfaces.brushed, surfaces.mottled, surfaces.smooth, surfaces.granular),
     ("inclusion", "inclusion", "large_patch", "clouding", "scratch", "band", "hole", "dent", "corrosion", "crack_net")),
    ((surfaces.leather, surfaces.orange_peel, surfaces.ridged, surfaces.mottled),
     ("cut", "cut", "hole", "scratch", "wrinkle", "wrinkle", "stain", "dent", "misplaced_thread")),
    ((surfaces.woven, surfaces.knitted, surfaces.striped, surfaces.fibrous, surfaces.meshed),
     ("misplaced_thread", "hole", "cut", "fray", "stain", "texture_break", "fibre", "colour_shift", "contamination")),
)


@dataclass(frozen=True)
class Sample:
    """image uint8 RGB [H, W, 3]; mask bool [H, W], True where defective; kind of the first defect, "" when normal; label: defective."""

    image: np.ndarray
    mask: np.ndarray
    kind: str
    label: bool
    seed: int


def _photographed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image through a camera: exposure, gamma, poor focus, low resolution, sensor noise, JPEG; uint8 in and out."""
    height, width = image.shape[:2]
    grey = bool((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all())
    field = image.astype(np.float32) / 255
    if chance(rng, 0.6):
        gain = min(rng.uniform(0.75, 1.25), 0.75 / max(float(field.mean()), 0.1))
        field = np.clip(field * gain + rng.uniform(-0.06, 0.08), 0, 1) ** log_uniform(rng, 0.7, 1.4)
    if chance(rng, 0.3):
        field = blur(field, rng.uniform(0.3, 1.3))
    if chance(rng, 0.2):
        factor = rng.uniform(0.4, 0.9)
        small = cv2.resize(field, (max(8, int(width * factor)), max(8, int(height * factor))), interpolation=cv2.INTER_AREA)
        field = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    if chance(rng, 0.6):
        level = log_uniform(rng, 0.003, 0.03) if chance(rng, 0.8) else log_uniform(rng, 0.03, 0.15)  # a worn or starved camera
        sigma = pick(rng, 0, 0, 0.6)
        noise = rgb(grain(rng, height, width, sigma))
        if not grey and chance(rng, 0.5):
            noise = np.dstack([0.7 * noise[..., 0] + 0.7 * grain(rng, height, width, sigma) for _ in range(3)])
        field = field + np.float32(level) * noise
    out = np.clip(field * 255, 0, 255).astype(np.uint8)
    if chance(rng, 0.4):
        _, data = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 97))])
        out = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return np.repeat(out[..., 1:2], 3, axis=2) if grey else out


def make_sample(seed: int, height: int, width: int, plain: bool = False) -> Sample:
    """The sample of that seed: two in five normal; else one to three defects, mostly of one kind. Sizes are in pixels.

    plain: a simple material and kinds of defect that show, see PLAIN_MATERIALS.
    """
    rng = np.random.default_rng([seed, height, width])
    materials: Sequence[Callable[..., np.ndarray]] = ()
    kinds: Sequence[str | None] = (None,)
    if plain:
        materials, kinds = PLAIN_MATERIALS, PLAIN_KINDS
    elif chance(rng, THEMED_SHARE):
        materials, kinds = THEMES[rng.integers(len(THEMES))]
    image, region = background_and_region(rng, height, width, materials, plain)
    mask, first = np.zeros((height, width), bool), ""
    if not chance(rng, NORMAL_SHARE):
        for _ in range(int(rng.choice([1, 2, 3], p=[0.65, 0.2, 0.15]))):
            wanted = first if first and chance(rng, 0.8) else kinds[int(rng.integers(len(kinds)))]
            image, added, kind = add_defect(image, rng, wanted, region)
            mask, first = mask | added, first or kind
    label = bool(mask.any())
    return Sample(_photographed(image, rng), mask, first if label else "", label, seed)


def _one_thread() -> None:
    cv2.setNumThreads(0)


def make_samples(seeds: Iterable[int], height: int, width: int, workers: int, plain: bool = False) -> Iterator[Sample]:
    """Samples in the order of the seeds (which may be endless), made by `workers` processes; 0 makes them in this one."""
    if workers == 0:
        yield from (make_sample(seed, height, width, plain) for seed in seeds)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        waiting: deque[Future[Sample]] = deque()
        for seed in seeds:
            waiting.append(pool.submit(make_sample, seed, height, width, plain))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
