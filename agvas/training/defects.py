"""Defects drawn on any image, real or made: where it is changed, the mask says so.

Each kind is a caricature of a physical cause (material gone, added, moved, stained or bent), shaded under one light and scaled to the
texture around it, so that it is neither flat paint nor lost in the grain. A defect that can hardly be seen is drawn again, stronger. Shapes
come from defect_shapes.py. Sizes and contrasts are guesses from general knowledge of inspection images, fitted to no data set.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from agvas.training import defect_shapes as shapes
from agvas.training.noise import (
    blur,
    chance,
    colour,
    distort,
    fbm,
    glyphs,
    grain,
    log_uniform,
    over,
    pick,
    pixels,
    relief,
    rgb,
    smoothstep,
    standardise,
    streaks,
)
from agvas.training.parts import filled, outline, placed
from agvas.training.surfaces import any_surface

ATTEMPTS = 4
LARGEST = 0.7  # share of the image; beyond it the defect is the surface
# The eye follows a line along its whole length, and sees it at a contrast at which it would miss a spot.
LINES = ("scratch", "crack", "cut", "wrinkle", "fibre")


@dataclass(frozen=True)
class Site:
    """Where a defect goes: the image float32 [H, W, 3] in 0..255, the object's region bool [H, W], a centre (x, y) in it, and how it
    looks there: mean colour [3], standard deviation of the texture (grey levels). strength grows with each attempt."""

    image: np.ndarray
    region: np.ndarray
    centre: np.ndarray
    tone: np.ndarray
    texture: float
    light: float
    strength: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.shape[:2]

    @property
    def size(self) -> int:
        return min(self.shape)

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1]


def _contrast(site: Site, rng) -> float:
    """Grey levels by which a defect stands out: faint to stark, above the texture around it."""
    return site.strength * min(110.0, log_uniform(rng, 0.8, 4) * (11 + 0.8 * site.texture))


def _sign(site: Site, rng, dark: float = 0.65) -> float:
    """-1 for darker, +1 for lighter, where there is room for it."""
    level = float(site.tone.mean())
    if level < 45:
        return 1.0
    return -1.0 if level > 210 or chance(rng, dark) else 1.0


def _tinge(rng, amount: float = 0.25) -> np.ndarray:
    """A factor per channel, so that a change of tone is a slight change of colour too."""
    return (1 + rng.normal(0, amount, 3)).astype(np.float32) if chance(rng, 0.5) else np.ones(3, np.float32)


def _toned(site: Site, alpha: np.ndarray, change: np.ndarray | float) -> np.ndarray:
    return site.image + rgb(alpha.astype(np.float32)) * np.float32(change)


def _lit(site: Site, depth: np.ndarray, amount: float) -> np.ndarray:
    """Shading of a depth map (pixels), float32 [H, W, 1] grey levels."""
    return np.clip(amount * relief(depth, site.light), -120, 120)[..., None]


def _area(site: Site, rng, low: float, high: float) -> float:
    return log_uniform(rng, low, high) * site.pixels


def _lines(site: Site, rng, count: int, length: float, broad: float, bend: float, spread: float) -> np.ndarray:
    """`count` nearly parallel strokes around the centre."""
    height, width = site.shape
    heading, total = rng.uniform(0, np.pi), np.zeros(site.shape, np.float32)
    for _ in range(count):
        reach = length * rng.uniform(0.5, 1)
        own = heading + rng.normal(0, 0.08)
        start = site.centre + rng.normal(0, spread, 2) - 0.5 * reach * np.array([np.cos(own), np.sin(own)])
        points = shapes.walk(rng, start, own, reach, max(3.0, reach / 24), bend)
        total = np.maximum(total, shapes.stroke(height, width, points, shapes.varying(rng, len(points), 0.5 * broad, broad)))
    return total


# The kinds. Each takes (site, rng) and returns the changed image, float [H, W, 3] of about 0..255, and the mask, bool [H, W].


def scratch(site, rng):
    """Lines cut into the skin, bright or dark, with a burr along one side."""
    count = 1 if chance(rng, 0.5) else int(rng.integers(2, 9))
    broad = log_uniform(rng, 0.8, 0.012 * site.size + 1.6)
    length, spread = log_uniform(rng, 0.12, 1.3) * site.size, rng.uniform(0.01, 0.15) * site.size
    line = _lines(site, rng, count, length, broad, rng.uniform(0, 0.06), spread)
    fade = np.clip(0.8 + 0.3 * fbm(rng, *site.shape, 0.15 * site.size, 2), 0.35, 1.2)
    sign = _sign(site, rng, 0.4)
    image = _toned(site, line * fade, sign * 1.5 * _contrast(site, rng) * _tinge(rng))
    return image + _lit(site, blur(line, 0.8), rng.uniform(0, 120)), line > 0.3


def crack(site, rng):
    """A branching, jagged crack, dark inside, edges slightly raised or worn."""
    broad = log_uniform(rng, 0.9, 0.02 * site.size + 2)
    line = shapes.crack_tree(rng, *site.shape, site.centre, log_uniform(rng, 0.25, 2.2) * site.size, broad)
    sign = _sign(site, rng, 0.92)
    line = blur(line, rng.uniform(0, 0.8))
    image = _toned(site, np.minimum(line * 1.3, 1), sign * 1.5 * _contrast(site, rng) * _tinge(rng, 0.1))
    return image + _lit(site, blur(line, 1.2), rng.uniform(0, 80)), line > 0.33


def crack_net(site, rng):
    """Hairline net or blocky alligator cracking."""
    broad = log_uniform(rng, 0.7, 0.012 * site.size + 1.5)
    line = shapes.crack_cells(rng, *site.shape, site.centre, _area(site, rng, 0.02, 0.7), broad)
    line = line * smoothstep(-1.8, -0.6, fbm(rng, *site.shape, 0.1 * site.size, 2))
    image = _toned(site, line, _sign(site, rng, 0.9) * 1.5 * _contrast(site, rng))
    return image + _lit(site, blur(line, 1), rng.uniform(0, 60)), line > 0.4


def cut(site, rng):
    """A slit: lens-shaped, dark inside, lips that catch the light."""
    length, broad = log_uniform(rng, 0.05, 0.6) * site.size, log_uniform(rng, 1.5, 0.05 * site.size + 2)
    points = shapes.walk(rng, site.centre, rng.uniform(0, 6.28), length, max(1.5, length / 40), rng.uniform(0, 0.08))
    widths = broad * np.sin(np.linspace(0.15, np.pi - 0.1, len(points))) ** rng.uniform(0.5, 1.5)
    line = shapes.stroke(*site.shape, points - (points.mean(0) - site.centre), widths)
    image = over(site.image, line, site.tone * rng.uniform(0, 0.5)) if chance(rng, 0.7) else _toned(site, line, 1.5 * _contrast(site, rng))
    lips = blur(line, 0.3 * broad + 0.8)
    return image + _lit(site, lips, rng.uniform(60, 260)) + (rng.uniform(0, 40) * (lips - line).clip(0))[..., None], line > 0.35


def hole(site, rng):
    """Blowholes, pits, punctures: dark or see-through spots, alone or in a cluster, with a lit rim."""
    count = 1 if chance(rng, 0.5) else int(rng.integers(2, 14))
    alpha = np.zeros(site.shape, np.float32)
    area, spread = _area(site, rng, 0.0004, 0.03) / count**0.5, rng.uniform(0.03, 0.2) * site.size
    for index in range(min(count, 6)):
        at = site.centre + (rng.normal(0, spread, 2) if index else 0)
        alpha = np.maximum(alpha, shapes.blob(rng, *site.shape, at, max(6.0, area * rng.uniform(0.3, 1)), rng.uniform(0, 0.6), 0.15))
    if count > 6:
        radius = np.sqrt(max(6.0, area) / np.pi)
        alpha = np.maximum(alpha, shapes.specks(rng, *site.shape, site.centre, spread, count, 0.4 * radius, radius))
    depth = blur(alpha, log_uniform(rng, 0.6, 3))
    inside = site.tone * rng.uniform(0, 0.6) if chance(rng, 0.75) else np.full(3, rng.uniform(0, 255))
    return over(site.image, alpha * rng.uniform(0.6, 1), np.float32(inside)) + _lit(site, depth, rng.uniform(-200, 250)), alpha > 0.45


def dent(site, rng):
    """A dent or bump: shading alone, the skin unbroken."""
    area = _area(site, rng, 0.001, 0.12)
    alpha = shapes.blob(rng, *site.shape, site.centre, area, rng.uniform(0, 0.4), rng.uniform(0.3, 0.9))
    slope = standardise(relief(alpha, site.light)) * smoothstep(0.02, 0.2, alpha)
    shading = np.clip(slope * rng.uniform(0.5, 1) * _contrast(site, rng), -110, 110)
    gloss = rng.uniform(0, 60) * smoothstep(0.6, 1, standardise(slope) / 3)
    return site.image + (shading + gloss)[..., None], alpha > 0.25


def stain(site, rng):
    """Liquid, oil, discolouration: soft, often darker at the rim, sometimes running down."""
    area = _area(site, rng, 0.005, 0.5)
    alpha = shapes.blob(rng, *site.shape, site.centre, area, rng.uniform(0.1, 1), rng.uniform(0.05, 0.7))
    if chance(rng, 0.25):
        runs = streaks(rng, *site.shape, rng.uniform(0.01, 0.05) * site.size + 1, 0.6 * site.size, np.pi / 2)
        alpha = alpha * smoothstep(-0.6, 0.6, runs)
    change = _sign(site, rng) * _contrast(site, rng) * _tinge(rng, 0.7)
    uneven = np.clip(1 + 0.35 * fbm(rng, *site.shape, 0.1 * site.size, 3), 0.3, 1.7)
    rim = rng.uniform(0, 1.5) * (4 * alpha * (1 - alpha)) if chance(rng, 0.4) else 0
    return _toned(site, alpha * uneven + rim, change), alpha > 0.3


def large_patch(site, rng):
    """A big dark or bright area with a fractal coast, filled with a changed tone and grain."""
    alpha = shapes.patch(rng, *site.shape, site.centre, _area(site, rng, 0.05, 0.6))
    inner = 1 + rng.uniform(0, 0.5) * fbm(rng, *site.shape, log_uniform(rng, 0.01, 0.3) * site.size, 4)
    return _toned(site, alpha * inner, _sign(site, rng) * _contrast(site, rng) * _tinge(rng)), alpha > 0.45


def clouding(site, rng):
    """Scale, soot, damp or oil in clouds over much of the view: several at once, borders soft, the surface's own grain kept."""
    field = fbm(rng, *site.shape, log_uniform(rng, 0.08, 0.4) * site.size, int(rng.integers(2, 6)))
    level = float(np.quantile(field, 1 - log_uniform(rng, 0.03, 0.4)))
    soft = rng.uniform(0.1, 0.5)
    alpha = smoothstep(level - soft, level + soft, field)
    depth = rng.uniform(0.25, 0.8) if chance(rng, 0.75) else -rng.uniform(0.3, 0.9)  # darkened by a share of itself, or brightened
    return site.image * (1 - depth * alpha[..., None] * _tinge(rng, 0.3)), alpha > 0.5


def corrosion(site, rng):
    """Rust and pitting: rough, red-brown to black or pale, with blurred outposts."""
    area = _area(site, rng, 0.006, 0.6)
    if chance(rng, 0.5):
        alpha = shapes.archipelago(rng, *site.shape, site.centre, area)
    else:
        alpha = shapes.blob(rng, *site.shape, site.centre, area, 1, 0.2)
    rough = fbm(rng, *site.shape, log_uniform(rng, 0.02, 0.2) * site.size, 6, 0.7) + 0.4 * grain(rng, *site.shape, 0.6)
    rust = np.float32([rng.uniform(90, 190), rng.uniform(45, 110), rng.uniform(15, 60)]) if chance(rng, 0.7) else 255 * colour(rng)
    body = (0.6 * rust + 0.4 * site.tone * rng.uniform(0.3, 1)) * (1 + rng.uniform(0.1, 0.35) * rough)[..., None]
    return over(site.image, alpha * np.clip(rng.uniform(0.5, 0.95) + 0.15 * rough, 0, 1), body), alpha > 0.4


def spalling(site, rng):
    """A skin broken off: coarser ground below, one edge in shadow and one in light; now and then with bars laid bare."""
    alpha = shapes.blob(rng, *site.shape, site.centre, _area(site, rng, 0.005, 0.65), rng.uniform(0.3, 1), rng.uniform(0.02, 0.06))
    coarse = fbm(rng, *site.shape, log_uniform(rng, 0.03, 0.25) * site.size, 6, rng.uniform(0.5, 0.75))
    ground = site.tone * rng.uniform(0.55, 1.35) * _tinge(rng, 0.12)
    lit = standardise(relief(coarse, site.light)) * 0.6 + 0.5 * coarse + 0.3 * grain(rng, *site.shape, 0.6)
    body = ground + (rng.uniform(0.6, 1.6) * (8 + site.texture) * lit)[..., None]
    image = over(site.image, alpha, body)
    if chance(rng, 0.2):
        image = _bars(site, rng, image, alpha)[0]
    return image + _lit(site, blur(alpha, rng.uniform(0.8, 0.012 * site.size + 1)), rng.uniform(-320, -60)), alpha > 0.5


def _bars(site, rng, image, within):
    """Round bars across the site where `within` is 1: rust-coloured, lit as cylinders."""
    y, x = pixels(*site.shape)
    heading, broad = pick(rng, 0, np.pi / 2, rng.uniform(0, np.pi)), log_uniform(rng, 0.015, 0.07) * site.size
    offset = float(np.cos(heading)) * (y - float(site.centre[1])) - float(np.sin(heading)) * (x - float(site.centre[0]))
    offset += 0.2 * broad * fbm(rng, *site.shape, 0.3 * site.size, 2)
    if chance(rng, 0.4):
        pitch = broad * rng.uniform(2.5, 8)
        offset = np.mod(offset + pitch / 2, pitch) - pitch / 2
    alpha = smoothstep(-1, 1, broad / 2 - np.abs(offset)) * within
    round_lit = np.clip(1 - (2 * offset / broad - rng.uniform(-0.5, 0.5)) ** 2, 0, 1)
    rough = fbm(rng, *site.shape, 0.05 * site.size, 5, 0.7)
    rust = np.float32([rng.uniform(80, 160), rng.uniform(50, 100), rng.uniform(30, 70)]) * rng.uniform(0.5, 1.2)
    return over(image, alpha, rust * (0.35 + 0.8 * round_lit + 0.2 * rough)[..., None]), alpha


def exposed_bar(site, rng):
    """Long rusty bars where the cover is gone, often in a spalled trough."""
    within = shapes.blob(rng, *site.shape, site.centre, _area(site, rng, 0.05, 0.8), 0.7, 0.05)
    image, alpha = _bars(site, rng, site.image, within)
    return image + _lit(site, blur(alpha, 1.5), rng.uniform(-150, 0)), alpha > 0.45


def missing(site, rng):
    """A part's edge or piece gone: what lies around or below shows instead."""
    outside = (~site.region).astype(np.float32)
    edge = np.argwhere(cv2.morphologyEx(site.region.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0)
    area = _area(site, rng, 0.001, 0.15)
    if len(edge) and outside.mean() > 0.02:
        at = edge[rng.integers(len(edge))][::-1]
        ground = cv2.GaussianBlur(site.image * outside[..., None], (0, 0), 0.15 * site.size)
        ground /= np.maximum(cv2.GaussianBlur(outside, (0, 0), 0.15 * site.size), 1e-3)[..., None]
    else:
        at, ground = site.centre, np.full((*site.shape, 3), rng.choice([rng.uniform(0, 40), rng.uniform(0, 255)]), np.float32)
    alpha = shapes.blob(rng, *site.shape, at, area, rng.uniform(0, 0.9), 0.04)
    if chance(rng, 0.3):
        alpha = shapes.polygon(rng, *site.shape, at, area)
    alpha = alpha * site.region.astype(np.float32)
    body = ground + (0.3 * site.texture * grain(rng, *site.shape, 0.7))[..., None]
    return over(site.image, alpha, body) + _lit(site, blur(alpha, 1.2), rng.uniform(-200, 60)), alpha > 0.5


def extra_part(site, rng):
    """Something that does not belong: a chip, bead, clip or scrap with its own shading and shadow."""
    scale, angle = log_uniform(rng, 0.02, 0.35) * site.size, rng.uniform(0, 6.28)
    alpha = filled(*site.shape, placed(outline(rng) * [1, rng.uniform(0.3, 1)], site.centre, scale, angle))
    if chance(rng, 0.4):
        alpha = shapes.blob(rng, *site.shape, site.centre, scale**2, rng.uniform(0.2, 0.9), 0.05)
    body = 255 * (colour(rng) + 0.08 * fbm(rng, *site.shape, log_uniform(rng, 0.01, 0.2) * site.size, 4)[..., None])
    shadow = np.roll(blur(alpha, 0.08 * scale + 0.6), (int(0.1 * scale) + 1, int(0.1 * scale) + 1), (0, 1))
    image = site.image * (1 - rng.uniform(0, 0.6) * shadow)[..., None]
    return over(image, alpha, body) + _lit(site, blur(alpha, 0.05 * scale + 0.7), rng.uniform(0, 300)) * alpha[..., None], alpha > 0.5


def fibre(site, rng):
    """Hair, thread or lint lying on the surface: thin, curled, with a faint shadow."""
    line, broad = np.zeros(site.shape, np.float32), log_uniform(rng, 0.8, 0.012 * site.size + 1.2)
    for _ in range(1 if chance(rng, 0.7) else int(rng.integers(2, 6))):
        length = log_uniform(rng, 0.1, 1.0) * site.size
        start = site.centre + rng.normal(0, 0.05, 2) * site.size
        points = shapes.walk(rng, start, rng.uniform(0, 6.28), length, max(2.0, length / 50), rng.uniform(0.1, 0.45))
        line = np.maximum(line, shapes.stroke(*site.shape, points, np.full(len(points), broad)))
    thread = site.tone + _sign(site, rng, 0.5) * 2 * _contrast(site, rng) * _tinge(rng, 0.4)
    image = site.image - (rng.uniform(0, 40) * np.roll(blur(line, 1.5), (2, 2), (0, 1)))[..., None]
    return over(image, line, np.clip(thread, 0, 255)), line > 0.3


def fray(site, rng):
    """Torn threads or splinters standing off one line, over a rubbed ground."""
    height, width = site.shape
    heading, length = rng.uniform(0, 6.28), log_uniform(rng, 0.1, 0.6) * site.size
    along = np.array([np.cos(heading), np.sin(heading)])
    line = np.zeros(site.shape, np.float32)
    for offset in rng.uniform(-0.5, 0.5, int(rng.integers(12, 45))):
        start, away = site.centre + along * offset * length, heading + np.pi / 2 + rng.normal(0, 0.5)
        points = shapes.walk(rng, start, away, length * rng.uniform(0.05, 0.4), 2.5, 0.15)
        line = np.maximum(line, shapes.stroke(height, width, points, np.full(len(points), log_uniform(rng, 0.7, 2))))
    rubbed = smoothstep(0.05, 0.3, blur(line, 0.012 * site.size + 1))
    change = _sign(site, rng, 0.4) * _contrast(site, rng)
    return _toned(site, 0.5 * rubbed + line * (0.6 + 0.4 * grain(rng, *site.shape, 1)), change * _tinge(rng)), rubbed > 0.4


def inclusion(site, rng):
    """Slag rolled out along the grain: dark or pale streaks with ragged ends, several side by side."""
    area, heading = _area(site, rng, 0.001, 0.12), pick(rng, 0, np.pi / 2, rng.uniform(0, np.pi))
    long = log_uniform(rng, 3, 14)
    broad = float(np.sqrt(area / long))
    y, x = pixels(*site.shape)
    x, y = x - float(site.centre[0]), y - float(site.centre[1])
    along, across = float(np.cos(heading)) * x + float(np.sin(heading)) * y, float(np.cos(heading)) * y - float(np.sin(heading)) * x
    far = cv2.magnitude(along / (broad * long), across / broad)
    ragged = streaks(rng, *site.shape, max(1.0, 0.5 * broad), max(2.0, 3 * broad), heading)
    alpha = smoothstep(-0.15, 0.15, 0.9 - far + rng.uniform(0.2, 0.6) * ragged) * (far < 2.2)
    uneven = np.clip(1 + 0.3 * fbm(rng, *site.shape, 0.05 * site.size, 3), 0.4, 1.6)
    return _toned(site, alpha * uneven, _sign(site, rng, 0.8) * _contrast(site, rng) * _tinge(rng)), alpha > 0.4


def wrinkle(site, rng):
    """Folds and creases: soft ridges, lit on one side and dark on the other."""
    broad = log_uniform(rng, 1.5, 0.03 * site.size + 2)
    length, spread = log_uniform(rng, 0.2, 1.2) * site.size, rng.uniform(0.03, 0.12) * site.size
    line = _lines(site, rng, int(rng.integers(1, 6)), length, broad, rng.uniform(0.02, 0.15), spread)
    ridge = blur(line, 0.6 * broad + 0.7)
    slope = relief(ridge, site.light)
    shading = slope / max(float(np.abs(slope).max()), 1e-3) * 1.6 * _contrast(site, rng)
    return site.image + shading[..., None] - (rng.uniform(0, 30) * ridge)[..., None], ridge > 0.3


def contamination(site, rng):
    """Powder, droplets or splashes: many small grains or beads; a dense cloud counts as one filled area."""
    reach, count = log_uniform(rng, 0.02, 0.2) * site.size, int(log_uniform(rng, 8, 250))
    grains = shapes.specks(rng, *site.shape, site.centre, reach, count, 0.7, log_uniform(rng, 1.2, 0.025 * site.size + 1.5))
    image = over(site.image, grains * rng.uniform(0.5, 1), 255 * colour(rng))
    image = image + _lit(site, blur(grains, 0.8), rng.uniform(0, 150))
    cloud = blur(grains, max(1.5, 0.012 * site.size))
    return image, cloud > max(0.12, 0.25 * float(cloud.max()))


def bubble(site, rng):
    """Drops, beads of glue, blisters, bubbles: clear or tinted lenses with a dark side, a bright side and a sharp highlight."""
    alpha, area = np.zeros(site.shape, np.float32), _area(site, rng, 0.0006, 0.05)
    if chance(rng, 0.3):
        broad = log_uniform(rng, 2, 0.06 * site.size + 2)
        alpha = _lines(site, rng, 1, log_uniform(rng, 0.1, 0.8) * site.size, broad, rng.uniform(0.02, 0.2), 0)
    for _ in range(int(rng.integers(1, 6))):
        at = site.centre + rng.normal(0, 0.08, 2) * site.size * (alpha.max() > 0)
        alpha = np.maximum(alpha, shapes.blob(rng, *site.shape, at, area * rng.uniform(0.2, 1), rng.uniform(0, 0.3), 0.12))
    depth = cv2.distanceTransform((alpha > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    dome = blur(np.sqrt(depth), 1.0)
    slope = standardise(relief(dome, site.light)) * alpha
    image = _toned(site, alpha, rng.uniform(0, 1) * _sign(site, rng) * _contrast(site, rng) * _tinge(rng, 0.6))
    shine = rng.uniform(0, 160) * smoothstep(0.7, 1, slope / max(float(slope.max()), 1e-3))
    return image + rgb(0.5 * _contrast(site, rng) * np.clip(slope, -2, 2) + shine), alpha > 0.4


def burr(site, rng):
    """Flash, splash or a bent lip: the part's own material standing out over its edge; a weld-like bead where no edge is known."""
    edge = np.argwhere(cv2.morphologyEx(site.region.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0)
    at = edge[rng.integers(len(edge))][::-1] if len(edge) else site.centre
    alpha = shapes.blob(rng, *site.shape, at, _area(site, rng, 0.0008, 0.04), rng.uniform(0.3, 1), 0.05)
    if not site.region.all():
        alpha = alpha * (1 - site.region * np.float32(rng.uniform(0.5, 1)))
    near = cv2.erode(site.region.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    tone = site.image[near].mean(axis=0) if near.any() else site.tone
    body = tone + _sign(site, rng, 0.4) * 0.7 * _contrast(site, rng)
    body = body + rgb((4 + site.texture) * 0.6 * fbm(rng, *site.shape, 0.05 * site.size, 5))
    return over(site.image, alpha, body) + _lit(site, blur(alpha, 1.5), rng.uniform(0, 260)), alpha > 0.45


def texture_break(site, rng):
    """The pattern turned, shifted, stretched, warped or blurred within a patch: misweave, misprint, melt."""
    height, width = site.shape
    alpha = shapes.patch(rng, height, width, site.centre, _area(site, rng, 0.006, 0.45))
    style = rng.integers(4)
    if style == 0:
        matrix = cv2.getRotationMatrix2D(tuple(float(c) for c in site.centre), rng.uniform(20, 160), rng.uniform(0.7, 1.5))
        other = cv2.warpAffine(site.image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)
    elif style == 1:
        other = distort(rng, site.image, rng.uniform(0.01, 0.05) * site.size + 1, rng.uniform(0.03, 0.15) * site.size)
    elif style == 2:
        other = blur(site.image, rng.uniform(0.01, 0.04) * site.size + 1)
    else:
        other = np.roll(site.image, rng.integers(4, max(5, site.size // 3), 2), (0, 1))
    image = over(site.image, alpha, other)
    image = image + alpha[..., None] * np.float32(_sign(site, rng) * rng.uniform(0, 0.4) * site.strength * _contrast(site, rng))
    return image + _lit(site, blur(alpha, 1), rng.uniform(-60, 60)), alpha > 0.45


def misplaced_thread(site, rng):
    """Yarns or lines missing, doubled or coloured: straight narrow bands along one direction."""
    y, x = pixels(*site.shape)
    heading, broad = pick(rng, 0, np.pi / 2, rng.uniform(0, np.pi)), log_uniform(rng, 1.5, 0.03 * site.size + 2)
    cos, sin = float(np.cos(heading)), float(np.sin(heading))
    across = cos * (y - float(site.centre[1])) - sin * (x - float(site.centre[0])) + 0.3 * broad * fbm(rng, *site.shape, 0.2 * site.size, 2)
    along = cos * (x - float(site.centre[0])) + sin * (y - float(site.centre[1]))
    reach = log_uniform(rng, 0.08, 1.2) * site.size
    alpha = smoothstep(-0.8, 0.8, broad / 2 - np.abs(across)) * smoothstep(-2, 2, reach - np.abs(along))
    grainy = np.clip(1 + 0.3 * grain(rng, *site.shape, 1), 0.3, 1.7)
    return _toned(site, alpha * grainy, _sign(site, rng, 0.5) * 1.3 * _contrast(site, rng) * _tinge(rng, 0.5)), alpha > 0.4


def smear(site, rng):
    """Ink or grease dragged in one direction, or letters struck where none belong."""
    height, width = site.shape
    alpha = shapes.blob(rng, height, width, site.centre, _area(site, rng, 0.001, 0.08), 0.9, 0.1)
    if chance(rng, 0.25):
        scale = log_uniform(rng, 0.002, 0.008) * site.size
        alpha = np.maximum(0.2 * alpha, glyphs(rng, height, width, site.centre[0], site.centre[1], scale, 4))
    length = int(max(3, log_uniform(rng, 0.02, 0.3) * site.size))
    kernel, angle = np.zeros((2 * length + 1, 2 * length + 1), np.float32), rng.uniform(0, 6.28)
    tip = (int(length + length * np.cos(angle)), int(length + length * np.sin(angle)))
    cv2.line(kernel, (length, length), tip, 1.0, max(1, length // 8))
    dragged = np.maximum(alpha * rng.uniform(0, 1), cv2.filter2D(alpha, -1, kernel / kernel.sum()))
    dragged = dragged * np.clip(1 + 0.4 * streaks(rng, height, width, 2, 0.2 * site.size, angle), 0.2, 1.5)
    return _toned(site, dragged, _sign(site, rng, 0.75) * 2 * _contrast(site, rng) * _tinge(rng, 0.5)), dragged > 0.25


def burn(site, rng):
    """Scorched: brown halo, black or ashen core."""
    area = _area(site, rng, 0.004, 0.3)
    halo = shapes.blob(rng, *site.shape, site.centre, area, rng.uniform(0.2, 0.7), rng.uniform(0.4, 0.9))
    brown = np.float32([rng.uniform(0.5, 0.9), rng.uniform(0.35, 0.7), rng.uniform(0.2, 0.5)])
    image = site.image * (1 - halo[..., None] * (1 - brown) * rng.uniform(0.7, 1))
    core = smoothstep(0.5, 1, halo + 0.2 * fbm(rng, *site.shape, 0.05 * site.size, 4))
    ash = np.full(3, rng.uniform(0, 60) if site.tone.mean() > 70 else rng.uniform(120, 220), np.float32)
    return over(image, core * rng.uniform(0.2, 1), ash), halo > 0.25


def colour_shift(site, rng):
    """One element of another colour or tone: the piece around the centre bounded by its own edges, else a plain patch."""
    height, width = site.shape
    smooth = np.clip(blur(site.image, 1.5), 0, 255).astype(np.uint8)
    flooded = np.zeros((height + 2, width + 2), np.uint8)
    tolerance = (float(rng.uniform(6, 25)),) * 3
    seed = (int(site.centre[0]), int(site.centre[1]))
    cv2.floodFill(smooth, flooded, seed, 0, tolerance, tolerance, 4 | (255 << 8) | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE)
    piece = cv2.morphologyEx(flooded[1:-1, 1:-1], cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)).astype(np.float32) / 255
    if not 0.002 < piece.mean() < 0.4:
        piece = shapes.patch(rng, height, width, site.centre, _area(site, rng, 0.003, 0.2))
    alpha = blur(piece, 0.8)
    other = site.image * (1 + 0.6 * (colour(rng) - 0.5)) + _sign(site, rng, 0.5) * _contrast(site, rng) * _tinge(rng, 0.8)
    return over(site.image, alpha, other.astype(np.float32)), alpha > 0.5


def unevenness(site, rng):
    """A patch or band whose tone and roughness differ: rubbed, unground, over- or under-filled; the border may be faint."""
    alpha = shapes.patch(rng, *site.shape, site.centre, _area(site, rng, 0.015, 0.6))
    if chance(rng, 0.5):
        alpha = blur(alpha, log_uniform(rng, 1, 0.05 * site.size + 1.5))
    base = blur(site.image, 3)
    gain = rng.choice([rng.uniform(0, 0.5), rng.uniform(1.6, 3)])
    rough = rng.uniform(0, 0.8) * (3 + site.texture) * grain(rng, *site.shape, log_uniform(rng, 0.5, 4))
    other = base + np.float32(gain) * (site.image - base) + rough[..., None]
    return over(site.image, alpha, other + np.float32(_sign(site, rng, 0.5) * 0.8 * _contrast(site, rng))), alpha > 0.4


def band(site, rng):
    """Stripes through the whole picture: roll marks, drag lines, skipped coating; straight, ragged, uneven along their length."""
    height, width = site.shape
    angle = pick(rng, 0.0, np.pi / 2) + rng.normal(0, 0.02) if chance(rng, 0.8) else rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x - site.centre[0], y - site.centre[1]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    knots = np.linspace(-2 * site.size, 2 * site.size, int(rng.integers(12, 120)))
    alpha = np.zeros(site.shape, np.float32)
    for index in range(int(rng.choice([1, 1, 2, 3, 5]))):
        offset = rng.normal(0, 0.15) * site.size if index else 0.0
        half = log_uniform(rng, 0.003, 0.06) * site.size + 0.6
        ragged = half * (1 + rng.uniform(0, 0.3) * np.interp(along, knots, rng.normal(0, 1, len(knots))))
        soft = 0.5 + rng.uniform(0, 0.5) * half
        stripe = 1 - smoothstep(ragged - soft, ragged + soft, np.abs(across - offset))
        uneven = np.clip(1 + rng.uniform(0, 0.5) * np.interp(along, knots, rng.normal(0, 1, len(knots))), 0.3, 1.5)
        alpha = np.maximum(alpha, (stripe * uneven).astype(np.float32))
    return _toned(site, alpha, _sign(site, rng, 0.4) * _contrast(site, rng) * _tinge(rng)), alpha > 0.3


def foreign_texture(site, rng):
    """Another material within a patch, its mean tone partly matched."""
    alpha = shapes.patch(rng, *site.shape, site.centre, _area(site, rng, 0.006, 0.5))
    other = any_surface(rng, *site.shape) * 255
    match = rng.uniform(0, 0.9)
    other = other + match * (site.tone - other.mean((0, 1)))
    return over(site.image, alpha * rng.uniform(0.6, 1), other) + _lit(site, blur(alpha, 1), rng.uniform(-120, 120)), alpha > 0.45


def peel(site, rng):
    """A coat flaked off: a flat second colour with a curled, shadowed edge."""
    alpha = shapes.blob(rng, *site.shape, site.centre, _area(site, rng, 0.005, 0.45), rng.uniform(0.4, 1), 0.03)
    below = site.tone + _sign(site, rng, 0.5) * 1.5 * _contrast(site, rng) * _tinge(rng, 0.5)
    body = np.clip(below, 0, 255) + (0.5 * (3 + site.texture) * fbm(rng, *site.shape, 0.1 * site.size, 5, 0.6))[..., None]
    return over(site.image, alpha, body) + _lit(site, blur(alpha, 1.3), rng.uniform(-260, -40)), alpha > 0.5


# How each kind is drawn, how often against the others, and whether it keeps to the object it is on.
_RECIPES = {f.__name__: (f, weight, kept) for f, weight, kept in (
    (scratch, 1.5, True), (crack, 2.4, True), (crack_net, 1.0, True), (cut, 0.9, True), (hole, 1.6, True), (dent, 0.8, True),
    (stain, 1.6, True), (large_patch, 3.0, True), (clouding, 1.5, True), (corrosion, 1.2, True), (spalling, 2.0, True),
    (exposed_bar, 0.5, True), (missing, 1.0, False), (extra_part, 1.0, False), (fibre, 0.8, False), (fray, 0.7, False),
    (inclusion, 1.4, True), (wrinkle, 0.8, True), (contamination, 0.8, False), (texture_break, 1.3, True),
    (misplaced_thread, 0.6, True), (smear, 0.8, True), (burn, 0.5, True), (colour_shift, 0.8, True), (unevenness, 2.0, True),
    (foreign_texture, 1.0, True), (bubble, 0.8, True), (burr, 0.6, False), (peel, 0.8, True), (band, 1.0, True),
)}
KINDS = tuple(_RECIPES)
_WEIGHTS = np.array([weight for _, weight, _ in _RECIPES.values()])


def _survey(image: np.ndarray, region: np.ndarray, rng, strength: float) -> Site:
    """A random place on the object, rather near the middle as defects are photographed, and what the image looks like around it."""
    height, width = region.shape
    inside = np.flatnonzero(region)
    y, x = np.divmod(inside[rng.integers(inside.size, size=2)], width)
    nearer = int(np.argmin(np.hypot(x / width - 0.5, y / height - 0.5)))
    y, x = int(y[nearer]), int(x[nearer])
    reach = max(6, int(0.12 * min(height, width)))
    window = image[max(0, y - reach):y + reach, max(0, x - reach):x + reach]
    grey = window.mean(axis=2)
    return Site(image, region, np.array([x, y], float), window.mean((0, 1)), float(min(grey.std(), 45)), rng.uniform(0, 6.28), strength)


def visibility(before: np.ndarray, after: np.ndarray, mask: np.ndarray, texture: float) -> float:
    """How far a defect stands out: mean change in the mask over what the texture (grey levels) hides; below 1 it is hard to see."""
    if not mask.any():
        return 0.0
    change = np.abs(after[mask] - before[mask]).max(axis=1)
    grey = before[..., 1]
    busy = float(np.minimum(np.abs(grey - blur(grey, 5.0))[mask].mean(), 40))
    return float(change.mean()) / (8 + 0.5 * max(texture, busy))


def add_defect(image: np.ndarray, rng: np.random.Generator, kind: str | None = None,
               region: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, str]:
    """One defect drawn on a uint8 RGB image [H, W, 3] of any origin.

    region, bool [H, W], says where the object is, if that is known (all over if hardly any of it shows). Returns the new image uint8
    [H, W, 3], the mask bool [H, W] of what is defective, and the kind (one of KINDS, by chance if none is asked for). Grey images stay
    grey. Where every attempt falls outside the image, it comes back unchanged with an empty mask; that is rare.
    """
    if kind is None:
        kind = KINDS[rng.choice(len(KINDS), p=_WEIGHTS / _WEIGHTS.sum())]
    draw, _, kept = _RECIPES[kind]
    if region is None or region.mean() < 0.005:
        region = np.ones(image.shape[:2], bool)
    grey = bool((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all())
    before, best = image.astype(np.float32), (0.0, image, np.zeros(image.shape[:2], bool))
    on_object = blur(region.astype(np.float32), 0.7)[..., None] if kept and not region.all() else None
    wanted = rng.uniform(0.4, 1) if kind in LINES and chance(rng, 0.5) else 1.0
    for attempt in range(ATTEMPTS):
        site = _survey(before, region, rng, wanted * (1 + 0.5 * attempt))
        after, mask = draw(site, rng)
        if on_object is not None:
            after, mask = before + on_object * (after - before), mask & region
        if grey:
            after = np.repeat(after.mean(axis=2, keepdims=True), 3, axis=2)
        after = np.clip(after, 0, 255)
        seen = visibility(before, after, mask, site.texture) * (1.0 if mask.mean() < LARGEST else 0.1)
        if seen > best[0]:
            best = (seen, np.round(after).astype(np.uint8), mask)
        if seen >= wanted and mask.sum() >= max(4, 2e-4 * mask.size):
            break
    return best[1], best[2], kind
