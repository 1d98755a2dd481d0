"""Normal images: a material or a view of parts, with the marks, shadows and glare that belong to defect-free work.

Whatever can be mistaken for a defect is added here, on purpose and before any defect, so that it occurs in normal and anomalous samples
alike. Camera effects (noise, blur, JPEG) are not added here: the whole sample shares them (see procedural.py).
"""

import cv2
import numpy as np

from agvas.training.noise import (
    blur,
    chance,
    colour,
    fbm,
    glyphs,
    grid_noise,
    log_uniform,
    over,
    pick,
    pixels,
    plane,
    rgb,
    smoothstep,
    streaks,
)
from agvas.training.parts import any_part, filled, outline, placed
from agvas.training.surfaces import any_surface

PART_SHARE = 0.4
GREY_SHARE = 0.38


def _soft_shadow(rng, image):
    """Shadow of something outside the frame: a straight or bent edge, sharp or blurred."""
    height, width = image.shape[:2]
    u, _ = plane(rng, height, width, rng.uniform(0, 6.28), rng.uniform(0, 0.05) * min(height, width))
    u = (u - u.min()) / (u.max() - u.min())
    shade = smoothstep(0, log_uniform(rng, 0.01, 0.4), u - rng.uniform(0.2, 0.9))
    return image * rgb(1 - rng.uniform(0.1, 0.6) * shade)


def _glare(rng, image):
    """Reflection of a lamp: a soft bright disc, bar or window."""
    height, width = image.shape[:2]
    size = min(height, width)
    spot = rng.uniform(0, 1, 2) * [width, height]
    lamp = filled(height, width, placed(outline(rng) * [1, rng.uniform(0.1, 1)], spot, rng.uniform(0.03, 0.4) * size, rng.uniform(0, 6.28)))
    return image + rgb(rng.uniform(0.1, 0.8) * blur(lamp, log_uniform(rng, 0.01, 0.15) * size))


def _seams(rng, image):
    """Straight joints, weld-free seams, cable lines: what runs from edge to edge and is meant."""
    height, width = image.shape[:2]
    size = min(height, width)
    angle = pick(rng, 0.0, np.pi / 2, rng.uniform(0, np.pi))
    for _ in range(rng.integers(1, 4)):
        u, _ = plane(rng, height, width, angle, 0)
        thick = max(0.8, log_uniform(rng, 0.003, 0.03) * size)
        line = np.exp(-((u - rng.uniform(u.min(), u.max())) / thick) ** 2)
        image = image + rgb(rng.uniform(-0.4, 0.25) * line)
    return image


def _fixtures(rng, image):
    """Bolts, rivets, drilled holes or stitches in a straight row."""
    height, width = image.shape[:2]
    size = min(height, width)
    shape, radius = outline(rng), max(1.5, log_uniform(rng, 0.008, 0.04) * size)
    start, bearing = rng.uniform(0, 1, 2) * [width, height], pick(rng, 0.0, np.pi / 2, rng.uniform(0, np.pi))
    step = radius * rng.uniform(3, 12) * np.array([np.cos(bearing), np.sin(bearing)])
    mask = filled(height, width, *(placed(shape, start + k * step, radius, bearing) for k in range(-12, 13)))
    rim = blur(mask, 1) - mask
    return over(image, mask * rng.uniform(0.4, 1), colour(rng)) + rgb(rng.uniform(-1, 1) * rim)


def _writing(rng, image):
    """Printed letters and figures."""
    height, width = image.shape[:2]
    scale = log_uniform(rng, 0.002, 0.012) * min(height, width)
    x, y = rng.uniform(-0.1, 0.8) * width, rng.uniform(0.1, 1) * height
    ink = glyphs(rng, height, width, x, y, scale, int(rng.integers(1, 9)))
    return over(image, ink, colour(rng))


def _paint_line(rng, image):
    """A painted or taped stripe across the view."""
    height, width = image.shape[:2]
    u, _ = plane(rng, height, width, rng.uniform(0, np.pi), 0)
    centre, half = rng.uniform(u.min(), u.max()), log_uniform(rng, 0.02, 0.2) * min(height, width)
    stripe = smoothstep(-1, 1, half - np.abs(u - centre)) * rng.uniform(0.3, 1)
    return over(image, stripe, colour(rng))


def _patchwork(rng, image):
    """Half of the view taken by another surface, with a sharp or soft border."""
    height, width = image.shape[:2]
    u, _ = plane(rng, height, width, pick(rng, 0.0, np.pi / 2, rng.uniform(0, np.pi)), 0)
    u = (u - u.min()) / (u.max() - u.min())
    covered = smoothstep(0, log_uniform(rng, 0.004, 0.05), u - rng.uniform(0.15, 0.85))
    return over(image, covered, any_surface(rng, height, width))


def _vignette(rng, image):
    """Lamp and lens fall-off, centred anywhere."""
    height, width = image.shape[:2]
    y, x = pixels(height, width)
    cy, cx = rng.uniform(-0.1, 1.1) * height, rng.uniform(-0.1, 1.1) * width
    far = ((x - cx) / width) ** 2 + ((y - cy) / height) ** 2
    return image * rgb(rng.uniform(0.8, 1.3) * np.exp(-rng.uniform(0.2, 2.5) * far))


def _light_columns(rng, image):
    """Broad soft bars of brightness side by side, fading along their length: a round or rolled surface under long lamps."""
    height, width = image.shape[:2]
    angle, size = pick(rng, 0.0, np.pi / 2) + rng.normal(0, 0.02), min(height, width)
    bars = streaks(rng, height, width, log_uniform(rng, 0.03, 0.4) * size, rng.uniform(0.7, 3) * max(height, width), angle)
    fading = np.clip(1 + rng.uniform(0, 0.8) * fbm(rng, height, width, rng.uniform(0.3, 1) * size, 2), 0, 2)
    return image * rgb(np.exp(np.clip(rng.uniform(0.05, 0.35) * bars * fading, -1, 1)))


def _slow_tone(rng, image):
    """Change of tone without borders, as of drying, wear, uneven coating or light: slow, or in clouds."""
    height, width = image.shape[:2]
    drift = fbm(rng, height, width, log_uniform(rng, 0.1, 1) * max(height, width), int(rng.integers(2, 4)))
    return image * rgb(1 + rng.uniform(0.02, 0.14) * drift)


def _tilted(rng, image):
    """The surface seen at a slant."""
    height, width = image.shape[:2]
    corners = np.float32([(0, 0), (width, 0), (width, height), (0, height)])
    moved = corners + np.float32(rng.uniform(-0.3, 0.3, (4, 2)) * [width, height])
    matrix = cv2.getPerspectiveTransform(corners, np.float32(moved))
    return cv2.warpPerspective(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)


def _bevelled(rng, image):
    """The object ends near one to four sides of the view: a bevel or a ground edge, dark or bright, streaked along itself, with or without
    what lies beyond."""
    height, width = image.shape[:2]
    y, x = pixels(height, width)
    for far, along, reach in ((y, x, height), (height - 1 - y, x, height), (x, y, width), (width - 1 - x, y, width)):
        if not chance(rng, 0.45):
            continue
        broad = log_uniform(rng, 0.006, 0.09) * reach
        slant = rng.normal(0, 0.02) * (along - 0.5 * float(along.max()))
        inward = far + slant - broad + rng.uniform(0, 0.12) * broad * fbm(rng, height, width, rng.uniform(0.05, 0.5) * reach, 2)
        bevel = smoothstep(-log_uniform(rng, 0.5, 0.3 * broad + 1), 0.5, -inward)
        cells = (2, reach) if along is x else (reach, 2)
        tone = rng.uniform(0.25, 1.7) * (1 + rng.uniform(0, 0.3) * grid_noise(rng, height, width, *cells))
        image = image * rgb(1 + bevel * (tone - 1).astype(np.float32))
        if chance(rng, 0.4):
            beyond = smoothstep(-1, 1, -(inward + rng.uniform(0.3, 0.9) * broad))
            image = over(image, beyond, colour(rng) * rng.uniform(0, 0.6))
    return image


def _exposed(rng, image):
    """Brought to a brightness that someone at the camera would leave: not all black, not all white, though cast to either side."""
    level, wanted = float(np.clip(image, 0, 1).mean()), rng.uniform(0.2, 0.75)
    if 0.2 < level < 0.85 and chance(rng, 0.7) or chance(rng, 0.1):
        return image
    return image * min(wanted / max(level, 0.02), 6.0)


PLAIN_EXTRAS = ((_vignette, 0.25), (_light_columns, 0.25), (_slow_tone, 0.4), (_bevelled, 0.15))
EXTRAS = ((_soft_shadow, 0.15), (_glare, 0.12), (_seams, 0.10), (_fixtures, 0.07), (_writing, 0.12), (_paint_line, 0.06),
          (_patchwork, 0.07), (_vignette, 0.25), (_light_columns, 0.25), (_slow_tone, 0.35), (_bevelled, 0.22))


def background_and_region(
    rng: np.random.Generator, height: int, width: int, materials=(), plain: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A normal image, uint8 RGB [H, W, 3], and where its object is, bool [H, W] (everywhere for a surface).

    materials: functions of surfaces.py to draw a surface from; none given, it may be any surface or any view of parts.
    plain: leave out what imitates defects (seams, glare, writing, ...); uneven light stays.
    """
    if not materials and chance(rng, PART_SHARE):
        image, region = any_part(rng, height, width)
    else:
        draw = materials[rng.integers(len(materials))] if materials else any_surface
        image, region = draw(rng, height, width), np.ones((height, width), bool)
        if chance(rng, 0.12):
            image = _tilted(rng, image)
    for extra, probability in PLAIN_EXTRAS if plain else EXTRAS:
        if chance(rng, probability):
            image = extra(rng, image)
    image = _exposed(rng, image)
    if chance(rng, GREY_SHARE):
        image = rgb(cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY))
    return np.clip(image * 255, 0, 255).astype(np.uint8), region


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A normal image: uint8 RGB [H, W, 3]; about two in five are grey (equal channels)."""
    return background_and_region(rng, height, width)[0]
