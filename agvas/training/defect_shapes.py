"""Shapes of defects as soft coverage fields, float32 [H, W] in 0..1.

Irregularity comes from fractal noise added to simple distance functions; strokes are drawn segment by segment so that their width can vary.
Shapes say where, never how it looks (see defects.py).
"""

import cv2
import numpy as np

from agvas.training.noise import cells, chance, distort, fbm, log_uniform, pixels, smoothstep


def blob(rng: np.random.Generator, height: int, width: int, centre, area: float, rough: float, soft: float = 0.08) -> np.ndarray:
    """A patch of about `area` pixels around centre (x, y); rough 0 is an ellipse, 1 a fractal coast; soft is the edge's share of radius."""
    radius, aspect, turn = np.sqrt(area / np.pi), log_uniform(rng, 0.45, 2.2), rng.uniform(0, np.pi)
    y, x = pixels(height, width)
    x, y = (x - float(centre[0])) / float(radius), (y - float(centre[1])) / float(radius)
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    far = cv2.magnitude((cos * x + sin * y) / aspect**0.5, (cos * y - sin * x) * aspect**0.5)
    coast = fbm(rng, height, width, max(3.0, radius * rng.uniform(0.4, 1.4)), 5, rng.uniform(0.4, 0.65))
    return smoothstep(-soft, soft, 1 - far + 0.45 * rough * coast)


def archipelago(rng: np.random.Generator, height: int, width: int, centre, area: float) -> np.ndarray:
    """Fractal islands, together about `area` pixels, denser towards the centre."""
    reach = np.sqrt(area / np.pi) * rng.uniform(1.2, 2)
    y, x = pixels(height, width)
    far = cv2.magnitude((x - float(centre[0])) / float(reach), (y - float(centre[1])) / float(reach))
    field = fbm(rng, height, width, max(4.0, log_uniform(rng, 0.1, 1) * reach), 5, 0.55) - 1.2 * far
    level = np.quantile(field[::4, ::4], 1 - min(0.6, area / (height * width)))
    return smoothstep(-0.12, 0.12, field - float(level))


def polygon(rng: np.random.Generator, height: int, width: int, centre, area: float) -> np.ndarray:
    """A patch with straight edges: a turned rectangle or an irregular polygon."""
    radius = np.sqrt(area / 2.2)
    if chance(rng, 0.5):
        angle = np.array([0.25, 0.75, 1.25, 1.75]) * np.pi + (0 if chance(rng, 0.5) else rng.uniform(0, 1))
        stretch = log_uniform(rng, 0.35, 2.8) ** 0.5
        points = np.stack([np.cos(angle) * stretch, np.sin(angle) / stretch], 1) * radius * 1.2
    else:
        angle = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(4, 9))))
        points = np.stack([np.cos(angle), np.sin(angle)], 1) * radius * rng.uniform(0.6, 1.2, (angle.size, 1))
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.round((points + centre) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255


def patch(rng: np.random.Generator, height: int, width: int, centre, area: float) -> np.ndarray:
    """Any of the filled shapes: mostly coasts, sometimes islands or straight edges."""
    style = rng.random()
    if style < 0.7:
        return blob(rng, height, width, centre, area, rng.uniform(0, 1), log_uniform(rng, 0.02, 0.3))
    return archipelago(rng, height, width, centre, area) if style < 0.85 else polygon(rng, height, width, centre, area)


def walk(rng: np.random.Generator, start, heading: float, length: float, step: float, restless: float) -> np.ndarray:
    """Points of a path that wanders about its heading: float [N, 2]; restless is radians of turn per step."""
    count = max(2, int(length / step))
    turns = heading + rng.normal(0, restless, count) + 0.35 * restless * np.cumsum(rng.normal(0, 1, count))
    return np.asarray(start) + np.cumsum(step * np.stack([np.cos(turns), np.sin(turns)], 1), 0)


def stroke(height: int, width: int, points: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """A path drawn with a width for each segment (pixels; below one it is drawn fainter)."""
    mask = np.zeros((height, width), np.uint8)
    fixed = np.round(points * 16).astype(np.int32)
    for a, b, w in zip(fixed[:-1], fixed[1:], widths):
        cv2.line(mask, a.tolist(), b.tolist(), int(255 * min(1.0, max(w, 0.5))), max(1, round(w)), cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255


def varying(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """Widths along a path: smooth between low and high, float [count]."""
    knots = np.exp(rng.uniform(np.log(low), np.log(high), max(3, count // 8)))
    return np.interp(np.linspace(0, 1, count), np.linspace(0, 1, knots.size), knots)


def crack_tree(rng: np.random.Generator, height: int, width: int, centre, length: float, broad: float) -> np.ndarray:
    """A crack with branches: jagged paths, widest at the trunk, thinning to their tips."""
    total = np.zeros((height, width), np.float32)
    heading, restless = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.7)
    step = max(2.0, log_uniform(rng, 0.008, 0.04) * min(height, width))
    start = np.asarray(centre) - 0.5 * length * np.array([np.cos(heading), np.sin(heading)])
    pending = [(start, heading, length, broad)]
    for _ in range(int(rng.integers(1, 8))):
        if not pending:
            break
        start, heading, reach, wide = pending.pop(0)
        points = walk(rng, start, heading, reach, step, restless)
        widths = varying(rng, len(points), 0.4 * wide, wide) * np.linspace(1, rng.uniform(0.3, 1), len(points))
        total = np.maximum(total, stroke(height, width, points, widths))
        for _ in range(rng.integers(0, 4)):
            at = points[rng.integers(len(points))]
            turn = rng.uniform(0.4, 1.4) * rng.choice([-1, 1])
            pending.append((at, heading + turn, reach * rng.uniform(0.2, 0.7), wide * rng.uniform(0.4, 0.8)))
    return total


def crack_cells(rng: np.random.Generator, height: int, width: int, centre, area: float, broad: float) -> np.ndarray:
    """A net of cracks around blocks, as dried mud or tired asphalt shows."""
    cell = max(6.0, np.sqrt(area) * rng.uniform(0.12, 0.5))
    _, border, _ = cells(rng, height, width, cell, aspect=rng.uniform(0.6, 1.6))
    border = distort(rng, border, 0.12 * cell, 0.5 * cell)
    breadth = np.clip(broad * (1 + 0.5 * fbm(rng, height, width, 2 * cell, 2)), 0.5, None)
    return smoothstep(-0.6, 0.6, 0.5 * breadth + 0.2 - border) * (blob(rng, height, width, centre, area, 0.8, 0.1) > 0.5)


def specks(rng: np.random.Generator, height: int, width: int, centre, reach: float, count: int, low: float, high: float) -> np.ndarray:
    """Scattered grains of low..high pixels radius, normally spread around the centre."""
    mask = np.zeros((height, width), np.uint8)
    places = np.asarray(centre) + rng.normal(0, reach, (count, 2))
    for (x, y), radius in zip(places, np.exp(rng.uniform(np.log(low), np.log(high), count))):
        axes = (max(1, int(radius)), max(1, int(radius * rng.uniform(0.5, 1))))
        cv2.ellipse(mask, (int(x), int(y)), axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA)
    return mask.astype(np.float32) / 255
