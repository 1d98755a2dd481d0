"""Normal materials: flat surfaces such as an inspection camera sees, each a function of a seed and a size.

They are rough caricatures in great number rather than faithful renderings of a few, for the model learns from the spread. Every
function takes (rng, height, width) and returns float32 [H, W, 3] of about 0..1; none of them holds a defect.
"""

import cv2
import numpy as np

from agvas.training.noise import (
    blur,
    cells,
    chance,
    colour,
    distort,
    fbm,
    glyphs,
    grain,
    grid_noise,
    log_uniform,
    over,
    per_label,
    pick,
    plane,
    relief,
    rgb,
    smoothstep,
    standardise,
    streaks,
    tinted,
)


def _angle(rng) -> float:
    """Mostly along an axis, as cameras are mounted; sometimes any."""
    axis = pick(rng, 0.0, np.pi / 2)
    return float(axis + (rng.normal(0, 0.03) if chance(rng, 0.65) else rng.uniform(0, np.pi)))


def _fraction(coordinate: np.ndarray) -> np.ndarray:
    return coordinate - np.floor(coordinate)


def mottled(rng, height, width):
    """Paint, plaster, cast or rolled skin: fractal noise of any scale and steepness."""
    cell = log_uniform(rng, 0.01, 0.8) * min(height, width)
    return tinted(rng, fbm(rng, height, width, cell, int(rng.integers(2, 7)), rng.uniform(0.35, 0.85)))


def smooth(rng, height, width):
    """Plastic, glass or paint: a gradient with hardly any texture."""
    field = fbm(rng, height, width, max(height, width) * rng.uniform(0.5, 1.5), 1)
    return tinted(rng, field, log_uniform(rng, 0.01, 0.4)) + log_uniform(rng, 0.001, 0.02) * grain(rng, height, width)[..., None]


def granular(rng, height, width):
    """Asphalt, concrete, sandpaper: grains of one or several sizes, over slow mottling."""
    field = rng.uniform(0.1, 1) * fbm(rng, height, width, min(height, width) * rng.uniform(0.2, 0.8), 3)
    for _ in range(rng.integers(1, 4)):
        field += rng.uniform(0.3, 1) * grain(rng, height, width, log_uniform(rng, 0.4, 4))
    if chance(rng, 0.5):
        field = np.sign(field) * np.abs(field) ** rng.uniform(1.2, 2)
    return tinted(rng, standardise(field), log_uniform(rng, 0.06, 0.5))


def pebbles(rng, height, width):
    """Aggregate in a binder: rounded stones, each of its own tone, lit from a side."""
    labels, border, _ = cells(rng, height, width, max(3.0, log_uniform(rng, 0.012, 0.12) * min(height, width)))
    dome = np.sqrt(np.minimum(border, rng.uniform(2, 12)))
    present = (per_label(rng, labels) > rng.uniform(-2, 1)).astype(np.float32)
    field = present * (rng.uniform(0.2, 1) * per_label(rng, labels) + rng.uniform(0.3, 1) * dome)
    field += rng.uniform(0, 2) * relief(dome * present, rng.uniform(0, 6.28)) + rng.uniform(0.1, 0.6) * grain(rng, height, width, 0.6)
    field = distort(rng, field, rng.uniform(0.5, 3), 12)
    return tinted(rng, standardise(field), log_uniform(rng, 0.08, 0.5))


def brushed(rng, height, width):
    """Rolled, brushed or ground metal: fine lines along one direction, bands across."""
    angle, size = _angle(rng), min(height, width)
    field = streaks(rng, height, width, 1, log_uniform(rng, 0.1, 2) * size, angle)
    field += rng.uniform(0, 1) * streaks(rng, height, width, rng.uniform(2, 6), log_uniform(rng, 0.2, 3) * size, angle)
    field += rng.uniform(0, 1.5) * streaks(rng, height, width, rng.uniform(0.05, 0.4) * size, 3 * size, angle)
    field += rng.uniform(0, 0.6) * grain(rng, height, width, 0.5)
    return tinted(rng, standardise(field), log_uniform(rng, 0.03, 0.4))


def ground_ceramic(rng, height, width):
    """Sintered tile under a lamp: dark, uneven light, periodic grinding marks, hazy blotches."""
    u, _ = plane(rng, height, width, _angle(rng), rng.uniform(0, 4))
    period = log_uniform(rng, 0.015, 0.25) * min(height, width)
    stripes = np.sin(u * (2 * np.pi / period)) * (0.6 + 0.4 * fbm(rng, height, width, 0.3 * min(height, width), 2))
    field = rng.uniform(0, 1.2) * stripes + rng.uniform(0.2, 1.2) * fbm(rng, height, width, 0.4 * min(height, width), 3)
    field += rng.uniform(0.1, 0.6) * grain(rng, height, width, rng.uniform(0.4, 1.5))
    level = rng.uniform(0.12, 0.6)
    return np.repeat((level + log_uniform(rng, 0.03, 0.16) * standardise(field))[..., None], 3, axis=2)


def woven(rng, height, width):
    """Cloth: plain, twill or basket weave with uneven yarns."""
    period = max(3.0, log_uniform(rng, 0.01, 0.12) * min(height, width))
    u, v = plane(rng, height, width, _angle(rng), rng.uniform(0, 0.6) * period)
    u, v = u / period, v / (period * rng.uniform(0.7, 1.4))
    row, column = np.floor(v), np.floor(u)
    repeat, step = int(rng.integers(2, 6)), int(rng.integers(1, 3))
    upper = np.mod(column + step * row, repeat) < max(1, repeat // 2)
    across_u, across_v = np.cos(np.pi * (_fraction(u) - 0.5)), np.cos(np.pi * (_fraction(v) - 0.5))
    height_map = np.where(upper, across_u * (0.6 + 0.4 * across_v), across_v * (0.6 + 0.4 * across_u)).astype(np.float32)
    yarn = np.where(upper, rng.normal(0, 1, 4096)[column.astype(int) % 4096], rng.normal(0, 1, 4096)[row.astype(int) % 4096])
    field = height_map * 2 + rng.uniform(0, 0.5) * yarn.astype(np.float32) + rng.uniform(0.1, 0.6) * grain(rng, height, width, 0.6)
    cloth = tinted(rng, standardise(field), log_uniform(rng, 0.06, 0.5))
    if chance(rng, 0.4):
        cloth = np.where(upper[..., None], cloth, cloth * (0.4 + colour(rng)))
    return cloth.astype(np.float32)


def striped(rng, height, width):
    """Stripes and plaids: bands of a few colours one way or both, over a fine weave or plain."""
    size, angle = min(height, width), _angle(rng)
    u, v = plane(rng, height, width, angle, rng.uniform(0, 0.01) * size)
    image = np.zeros((height, width, 3), np.float32)
    base = colour(rng)
    for coordinate in (u, v)[:int(rng.integers(1, 3))]:
        widths = np.exp(rng.uniform(np.log(0.01), np.log(0.2), int(rng.integers(2, 7)))) * size
        edges = np.cumsum(np.maximum(widths, 1.5))
        band = np.searchsorted(edges, np.mod(coordinate, edges[-1]).ravel()).clip(max=len(edges) - 1)
        palette = np.stack([base + rng.uniform(0.1, 0.9) * (colour(rng) - base) for _ in edges]).astype(np.float32)
        image += palette[band].reshape(height, width, 3)
    yarn = grain(rng, height, width, 0.5) + np.sin(u * rng.uniform(0.8, 2)) + np.sin(v * rng.uniform(0.8, 2))
    return image / (2 if image.max() > 1 else 1) * rgb(1 + rng.uniform(0.01, 0.12) * yarn)


def masonry(rng, height, width):
    """Crazy paving, cobbles, scales: irregular stones of their own tones with broad joints."""
    cell = max(8.0, log_uniform(rng, 0.06, 0.4) * min(height, width))
    labels, border, _ = cells(rng, height, width, cell, rng.uniform(0.3, 0.9), rng.uniform(0.5, 2))
    border = distort(rng, border, 0.04 * cell, 0.5 * cell)
    inside = smoothstep(0, rng.uniform(0.03, 0.3) * cell, border - rng.uniform(0.04, 0.12) * cell)
    face = rng.uniform(0, 1) * per_label(rng, labels) + rng.uniform(0.2, 1) * fbm(rng, height, width, rng.uniform(0.2, 1) * cell, 5)
    joint = tinted(rng, grain(rng, height, width, 0.8), 0.15)
    return over(joint, inside, tinted(rng, face)) + rgb(rng.uniform(0, 0.15) * standardise(relief(inside, rng.uniform(0, 6.28))))


def blurred_clutter(rng, height, width):
    """Something out of focus: soft patches of a few colours."""
    labels, _, _ = cells(rng, height, width, log_uniform(rng, 0.15, 0.6) * min(height, width))
    tones = np.stack([blur(per_label(rng, labels), log_uniform(rng, 0.01, 0.08) * min(height, width)) for _ in range(3)], 2)
    return (colour(rng) + rng.uniform(0.03, 0.15) * (tones + 1.5 * tones[..., :1])).astype(np.float32)


def knitted(rng, height, width):
    """Knit: columns of V-shaped loops."""
    period = max(4.0, log_uniform(rng, 0.02, 0.15) * min(height, width))
    u, v = plane(rng, height, width, _angle(rng), rng.uniform(0, 0.8) * period)
    bend = np.abs(_fraction(u / period) - 0.5)
    field = np.sin(2 * np.pi * (v / period * rng.uniform(0.8, 1.8) + bend * rng.uniform(0.7, 2)))
    field += rng.uniform(0.3, 1.5) * np.cos(2 * np.pi * 2 * bend) + rng.uniform(0.1, 0.8) * grain(rng, height, width, 0.7)
    return tinted(rng, standardise(field.astype(np.float32)), log_uniform(rng, 0.06, 0.5))


def leather(rng, height, width):
    """Leather or grained plastic: small pillowed cells with creases between, some folds longer than others."""
    size = min(height, width)
    field = np.zeros((height, width), np.float32)
    cell = max(4.0, log_uniform(rng, 0.012, 0.12) * size)
    for weight in (1.0, rng.uniform(0, 0.8)):
        _, border, _ = cells(rng, height, width, cell, aspect=rng.uniform(0.5, 1.6))
        field += weight * np.sqrt(np.minimum(border, 0.5 * cell))
        cell *= rng.uniform(1.6, 3)
    field = blur(distort(rng, field, rng.uniform(0.05, 0.3) * cell, 0.6 * cell), rng.uniform(0.4, 1.2))
    lit = standardise(field) * rng.uniform(0.2, 1) + standardise(relief(field, rng.uniform(0, 6.28)))
    lit += rng.uniform(0, 0.5) * fbm(rng, height, width, 0.4 * size, 2) + rng.uniform(0, 0.3) * grain(rng, height, width)
    return tinted(rng, standardise(lit), log_uniform(rng, 0.04, 0.4))


def wood(rng, height, width):
    """Wood: stretched growth rings, fibres, and now and then a knot or plank joints, which belong."""
    size, angle = min(height, width), _angle(rng)
    u, v = plane(rng, height, width, angle, rng.uniform(0.01, 0.08) * size)
    bend = v
    for _ in range(rng.choice([0, 0, 1, 2])):
        near_u, near_v = float(u.flat[rng.integers(u.size)]), float(v.flat[rng.integers(v.size)])
        distance = ((u - near_u) / 2.5) ** 2 + (v - near_v) ** 2
        bend = bend + np.sign(v - near_v) * 0.12 * size * np.exp(-distance / (0.06 * size) ** 2)
    period = log_uniform(rng, 0.02, 0.2) * size
    rings = _fraction((bend + 0.05 * size * fbm(rng, height, width, 0.5 * size, 2)) / period)
    field = rings ** rng.uniform(0.5, 3) * rng.uniform(0.5, 2) + rng.uniform(0.3, 0.8) * streaks(rng, height, width, 1, 0.3 * size, angle)
    field = standardise(field.astype(np.float32))
    if chance(rng, 0.3):
        plank = rng.uniform(0.15, 0.5) * size
        field += rng.normal(0, 0.8, 4096)[np.floor(v / plank).astype(int) % 4096] - 3 * (np.abs(_fraction(v / plank) - 0.5) > 0.49)
    return tinted(rng, field.astype(np.float32), log_uniform(rng, 0.05, 0.4))


def tiled(rng, height, width):
    """Bricks, tiles, blocks: faces of differing tone with joints between, sunk and lit."""
    size = min(height, width)
    pitch_v = log_uniform(rng, 0.06, 0.6) * size
    pitch_u = pitch_v * pick(rng, 1.0, 1.0, rng.uniform(0.5, 3))
    joint = rng.uniform(0.015, 0.09)
    u, v = plane(rng, height, width, _angle(rng), rng.uniform(0, 0.02) * size)
    row = np.floor(v / pitch_v)
    u = u / pitch_u + row * pick(rng, 0.0, 0.0, 0.5, 0.33)
    edge_u = (0.5 - np.abs(_fraction(u) - 0.5)) * pitch_u
    edge_v = (0.5 - np.abs(_fraction(v / pitch_v) - 0.5)) * pitch_v
    inside = smoothstep(0, max(1.5, 0.3 * joint * pitch_v), np.minimum(edge_u, edge_v) - joint * pitch_v)
    tone = rng.normal(0, 1, (64, 64))[row.astype(int) % 64, np.floor(u).astype(int) % 64].astype(np.float32)
    face = tinted(rng, rng.uniform(0, 1) * tone + rng.uniform(0.1, 1) * fbm(rng, height, width, rng.uniform(0.02, 0.3) * size, 4))
    grout = tinted(rng, fbm(rng, height, width, 4, 2), 0.1)
    lit = rng.uniform(0, 0.6) * relief(inside, rng.uniform(0, 6.28))
    return over(grout, inside, face) + rgb(lit)


def meshed(rng, height, width):
    """Wire grids, perforated sheets, sieves: holes that belong, in rows or staggered."""
    size = min(height, width)
    pitch = max(5.0, log_uniform(rng, 0.02, 0.25) * size)
    u, v = plane(rng, height, width, _angle(rng), rng.uniform(0, 0.05) * pitch)
    row = np.floor(v / pitch)
    du, dv = _fraction(u / pitch + 0.5 * int(rng.integers(0, 2)) * row) - 0.5, _fraction(v / pitch) - 0.5
    power = pick(rng, 2.0, 2.0, 8.0, 1.0)
    radius = (np.abs(du) ** power + np.abs(dv) ** power) ** (1 / power)
    hole = 1 - smoothstep(0, 1.5 / pitch + 0.02, radius - rng.uniform(0.15, 0.44))
    sheet = any_simple(rng, height, width)
    behind = tinted(rng, fbm(rng, height, width, 0.3 * size, 3), 0.1) * rng.uniform(0.1, 1)
    lit = rng.uniform(0, 1.2) * relief(blur(1 - hole, 1), rng.uniform(0, 6.28))
    return over(sheet, hole, behind) + rgb(lit)


def crumpled(rng, height, width):
    """Paper, foil, film or cloth with folds all over, which belong: facets lit from a side."""
    size = min(height, width)
    height_map = np.zeros((height, width), np.float32)
    for _ in range(rng.integers(2, 5)):
        height_map += np.abs(fbm(rng, height, width, log_uniform(rng, 0.08, 0.8) * size, int(rng.integers(1, 3)))) * rng.uniform(0.3, 1)
    lit = standardise(relief(height_map, rng.uniform(0, 6.28))) + rng.uniform(0, 0.3) * grain(rng, height, width)
    return tinted(rng, lit, log_uniform(rng, 0.03, 0.3))


def marbled(rng, height, width):
    """Marble and swirled resin: soft veins all over."""
    size = min(height, width)
    base = fbm(rng, height, width, rng.uniform(0.1, 0.7) * size, 4)
    veins = np.exp(-np.abs(fbm(rng, height, width, rng.uniform(0.05, 0.25) * size, 3)) * rng.uniform(1, 3))
    return tinted(rng, base * rng.uniform(0.3, 1) - veins * rng.uniform(0.5, 2.5), log_uniform(rng, 0.05, 0.4))


def fibrous(rng, height, width):
    """Carpet, felt, fur, fibreboard: short strokes whose direction changes from place to place."""
    length = int(max(3, log_uniform(rng, 0.01, 0.08) * min(height, width)))
    where = fbm(rng, height, width, log_uniform(rng, 0.02, 0.4) * min(height, width), 2)
    field, start = np.zeros((height, width), np.float32), rng.uniform(0, np.pi)
    spread = rng.uniform(0.2, 1.0)
    for index in range(4):
        kernel = np.zeros((2 * length + 1, 2 * length + 1), np.float32)
        angle = start + spread * index * np.pi / 4
        tip = (int(round(length + length * np.cos(angle))), int(round(length + length * np.sin(angle))))
        cv2.line(kernel, (2 * length - tip[0], 2 * length - tip[1]), tip, 1.0, 1)
        layer = standardise(cv2.filter2D(rng.standard_normal((height, width), dtype=np.float32), -1, kernel))
        field += layer * np.exp(-((where - (index - 1.5)) ** 2))
    return tinted(rng, standardise(field), log_uniform(rng, 0.08, 0.5))


def porous(rng, height, width):
    """Sponge, foam, bread, cast aggregate: pores of many sizes everywhere, which belong."""
    field = np.zeros((height, width), np.float32)
    for _ in range(rng.integers(1, 4)):
        sigma = log_uniform(rng, 0.8, 0.012 * min(height, width) + 1.2)
        bumps = grain(rng, height, width, sigma)
        level = rng.uniform(0.4, 1.3)
        field -= smoothstep(level, level + 0.6, bumps)
    lit = standardise(field) + rng.uniform(0, 0.8) * standardise(relief(field, rng.uniform(0, 6.28)))
    return tinted(rng, lit + 0.2 * grain(rng, height, width, 0.7), log_uniform(rng, 0.06, 0.5))


def orange_peel(rng, height, width):
    """Hammered or sprayed coats, skin: bumps known by their shading alone."""
    bumps = grain(rng, height, width, log_uniform(rng, 1, 0.02 * min(height, width) + 2))
    if chance(rng, 0.5):
        bumps = -np.abs(bumps)
    lit = standardise(relief(bumps, rng.uniform(0, 6.28))) + rng.uniform(0, 0.8) * fbm(rng, height, width, 0.5 * min(height, width), 2)
    return tinted(rng, standardise(lit), log_uniform(rng, 0.03, 0.4))


def ribbed(rng, height, width):
    """Corrugation, extrusion, cable, slats: parallel ribs, some families wider than others."""
    size = min(height, width)
    u, v = plane(rng, height, width, _angle(rng), rng.uniform(0, 0.01) * size)
    period = max(4.0, log_uniform(rng, 0.02, 0.5) * size)
    wave = np.abs(np.sin(np.pi * u / period)) ** rng.uniform(0.2, 3)
    if chance(rng, 0.3):
        wave = wave * np.abs(np.sin(np.pi * v / (period * rng.uniform(0.5, 4)))) ** rng.uniform(0.2, 1)
    field = standardise(wave.astype(np.float32)) + rng.uniform(0.05, 0.6) * fbm(rng, height, width, 0.3 * size, 5)
    return tinted(rng, standardise(field), log_uniform(rng, 0.06, 0.5))


def chequer_plate(rng, height, width):
    """Tread plate: raised lens shapes in alternating directions."""
    pitch = max(8.0, log_uniform(rng, 0.06, 0.25) * min(height, width))
    u, v = plane(rng, height, width, _angle(rng))
    du, dv = _fraction(u / pitch) - 0.5, _fraction(v / pitch) - 0.5
    flip = np.mod(np.floor(u / pitch) + np.floor(v / pitch), 2) > 0
    along, across = np.where(flip, du, dv), np.where(flip, dv, du)
    bump = np.maximum(0, 1 - (along / 0.45) ** 2 - (across / rng.uniform(0.1, 0.2)) ** 2).astype(np.float32)
    lit = rng.uniform(1, 4) * relief(np.sqrt(bump), rng.uniform(0, 6.28)) + 0.3 * bump
    return any_simple(rng, height, width) + rgb(rng.uniform(0.2, 0.6) * lit)


def speckled(rng, height, width):
    """Terrazzo, granite, flecked floor: chips of a few colours."""
    labels, _, _ = cells(rng, height, width, max(2.5, log_uniform(rng, 0.008, 0.1) * min(height, width)))
    labels = distort(rng, labels.astype(np.float32), rng.uniform(0.5, 3), 8, exact=True).astype(np.int32)
    base = colour(rng)
    palette = base + rng.uniform(0.1, 1) * (np.stack([colour(rng) for _ in range(6)]) - base)
    share = rng.dirichlet(np.full(6, 0.7))
    chosen = rng.choice(6, size=int(labels.max()) + 1, p=share)
    return palette[chosen[labels]].astype(np.float32) + 0.03 * grain(rng, height, width, 0.7)[..., None]


def dotted(rng, height, width):
    """Printed repeats: dots, rings, bars or checks in regular rows over any material."""
    pitch = max(6.0, log_uniform(rng, 0.03, 0.3) * min(height, width))
    u, v = plane(rng, height, width, _angle(rng), rng.uniform(0, 0.1) * pitch)
    du, dv = _fraction(u / pitch + 0.5 * np.floor(v / pitch) * int(rng.integers(0, 2))) - 0.5, _fraction(v / pitch) - 0.5
    motifs = (np.hypot(du, dv) - 0.25, np.abs(np.hypot(du, dv) - 0.28) - 0.07, np.abs(du) - 0.2, np.maximum(np.abs(du), np.abs(dv)) - 0.3,
              np.minimum(np.abs(du), np.abs(dv)) - 0.08, -du * dv * 4)
    ink = 1 - smoothstep(0, 1.5 / pitch, motifs[rng.integers(len(motifs))].astype(np.float32))
    ground = any_simple(rng, height, width)
    return over(ground, rng.uniform(0.2, 1) * ink, colour(rng))


def lettered(rng, height, width):
    """Labels, stamps, scales: rows of glyphs and rules printed on any material."""
    size = min(height, width)
    scale, ink = log_uniform(rng, 0.04, 0.3) * size / 22, np.zeros((height, width), np.float32)
    step = max(10, int(scale * rng.uniform(28, 60)))
    for y in range(int(rng.integers(0, step)), height + step, step):
        ink = np.maximum(ink, glyphs(rng, height, width, rng.uniform(-10, width / 2), y, scale, 14))
        if chance(rng, 0.15):
            ink[y + step // 4:][:max(1, int(scale))] = 1
    image = any_simple(rng, height, width)
    return over(image, ink, colour(rng))


def circuit(rng, height, width):
    """Circuit boards: copper runs, pads, vias, dark packages with bright pins."""
    size = min(height, width)
    mask = np.zeros((height, width), np.uint8)
    pitch = int(max(5, log_uniform(rng, 0.02, 0.1) * size))
    directions = np.array([(1, 0), (0, 1), (1, 1), (1, -1), (-1, 0), (0, -1)])
    for _ in range(int(rng.integers(10, 50))):
        point = rng.integers(0, [width // pitch + 1, height // pitch + 1]) * pitch
        for _ in range(rng.integers(1, 5)):
            following = point + directions[rng.integers(6)] * pitch * int(rng.integers(1, 8))
            cv2.line(mask, point.tolist(), following.tolist(), 255, max(1, pitch // 3), cv2.LINE_AA)
            point = following
        cv2.circle(mask, point.tolist(), max(2, pitch // 2), 255, -1, cv2.LINE_AA)
        cv2.circle(mask, point.tolist(), max(1, pitch // 5), 0, -1, cv2.LINE_AA)
    run = mask.astype(np.float32)[..., None] / 255
    board = colour(rng, rng.uniform(0.2, 0.9)) * 0.6
    image = board + run * rng.uniform(0.3, 1) * (colour(rng) - board) + 0.02 * grain(rng, height, width, 0.8)[..., None]
    image = np.ascontiguousarray(image.astype(np.float32))
    for _ in range(int(rng.integers(0, 6))):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = (int(s) for s in rng.uniform(0.05, 0.35, 2) * size)
        for pin in range(x, x + w, pitch):
            cv2.rectangle(image, (pin, y - pitch // 2), (pin + pitch // 3, y + h + pitch // 2), (0.75, 0.75, 0.7), -1)
        cv2.rectangle(image, (x, y), (x + w, y + h), (colour(rng) * rng.uniform(0.1, 0.8)).tolist(), -1)
        image += 0.6 * glyphs(rng, height, width, x + 2, y + h / 2, 0.006 * w, 4)[..., None]
    return image


def road(rng, height, width):
    """Asphalt or concrete with what belongs on it: lane paint, straight joints, tyre darkening."""
    image = granular(rng, height, width)
    size = min(height, width)
    u, v = plane(rng, height, width, _angle(rng))  # straight: a wandering joint would pass for a crack
    u, v = u - u.mean(), v - v.mean()
    if chance(rng, 0.6):
        edge = rng.uniform(0.03, 0.2) * size - np.abs(u - rng.uniform(-0.5, 0.5) * size)
        worn = smoothstep(-1, 1.5, edge + 0) * smoothstep(-2.2, -0.8, fbm(rng, height, width, rng.uniform(2, 20), 3))
        if chance(rng, 0.4):
            worn = worn * (_fraction(v / (rng.uniform(0.3, 1.2) * size)) < 0.6)
        image = over(image, rng.uniform(0.4, 1) * worn, np.float32([0.9, 0.88, pick(rng, 0.85, 0.4)]))
    if chance(rng, 0.4):
        joint = np.exp(-((v - rng.uniform(-0.4, 0.4) * size) / max(1.0, rng.uniform(0.003, 0.02) * size)) ** 2)
        image = image * (1 - rng.uniform(0.3, 0.8) * joint)[..., None]
    if chance(rng, 0.4):
        image = image * (1 - 0.3 * np.exp(-((u - rng.uniform(-0.5, 0.5) * size) / (0.2 * size)) ** 2))[..., None]
    return image.astype(np.float32)


def banded(rng, height, width):
    """Rails, belts, profiles: long parallel bands of differing material, one of them often shining."""
    size = min(height, width)
    u, _ = plane(rng, height, width, _angle(rng), rng.uniform(0, 0.004) * size)
    u = (u - u.min()) / (u.max() - u.min())
    image = any_simple(rng, height, width)
    for edge in sorted(rng.uniform(0, 1, rng.integers(1, 6)).tolist()):
        following = any_simple(rng, height, width)
        covered = smoothstep(0, pick(rng, 0.005, 0.01, 0.05), u - edge)
        image = over(image, covered, following)
        image *= rgb(1 - rng.uniform(0, 0.7) * np.exp(-((u - edge) / rng.uniform(0.003, 0.03)) ** 2))
    if chance(rng, 0.5):
        shine = np.exp(-((u - rng.uniform(0.2, 0.8)) / rng.uniform(0.03, 0.15)) ** 2)
        image = image + (rng.uniform(0.1, 0.7) * shine * (1 + 0.1 * grid_noise(rng, height, width, 2, 2)))[..., None]
    return image.astype(np.float32)


def formwork(rng, height, width):
    """Cast walls: mottled concrete with small air holes, board marks and round tie holes, which belong."""
    size = min(height, width)
    image = tinted(rng, fbm(rng, height, width, rng.uniform(0.2, 0.7) * size, 6, 0.6), log_uniform(rng, 0.05, 0.25))
    pores = grain(rng, height, width, rng.uniform(0.7, 1.6))
    image = image * (1 - rng.uniform(0, 0.6) * smoothstep(2.6, 3.2, pores))[..., None]
    if chance(rng, 0.4):
        u, _ = plane(rng, height, width, _angle(rng), 0.3)
        board = rng.uniform(0.1, 0.6) * size
        image = image * (1 - rng.uniform(0.1, 0.5) * (np.abs(_fraction(u / board) - 0.5) > 0.5 - 1.2 / board))[..., None]
    if chance(rng, 0.3):
        image = np.ascontiguousarray(image.astype(np.float32))
        for x in range(int(rng.integers(0, size // 2 + 1)), width, max(8, int(rng.uniform(0.3, 0.8) * size))):
            cv2.circle(image, (x, int(height * 0.5)), max(2, int(0.02 * size)), (colour(rng) * 0.3).tolist(), -1, cv2.LINE_AA)
    return image.astype(np.float32)


def ridged(rng, height, width):
    """Trowelled plaster, bark, peeled stone: sharp ridges of fractal noise."""
    field = 1 - np.abs(fbm(rng, height, width, log_uniform(rng, 0.05, 0.5) * min(height, width), 5, rng.uniform(0.4, 0.7)))
    lit = standardise(field) * rng.uniform(0, 1) + standardise(relief(field, rng.uniform(0, 6.28)))
    return tinted(rng, standardise(lit), log_uniform(rng, 0.04, 0.4))


def strewn(rng, height, width):
    """A heap of opaque things of one family and many sizes, each over the last: gravel, grass, chips, shells, foliage.

    The dead-leaves model, whose statistics are those of natural pictures (Lee, Mumford & Huang 2001).
    """
    size = min(height, width)
    least = log_uniform(rng, 0.006, 0.04) * size
    most = least * log_uniform(rng, 1.3, 8)
    slim = pick(rng, 1.0, 0.8, 0.5, 0.15, 0.06)  # of a disc, a stone, a leaf, a blade, a fibre
    corners, wild = int(rng.integers(5, 14)), rng.uniform(0, 0.35)
    palette = [colour(rng) for _ in range(int(rng.integers(1, 4)))]
    spread, rim = log_uniform(rng, 0.03, 0.35), rng.uniform(0.2, 1) if chance(rng, 0.7) else 1.0
    light = rng.uniform(0, 2 * np.pi)
    shift = np.array([np.cos(light), np.sin(light)]) * max(1.0, 0.15 * least)
    laid = np.full((height, width, 3), np.round(palette[0] * 120), np.uint8)
    radii = 1 / np.sqrt(rng.uniform(most**-2, least**-2, 1500))  # density r ** -3: heaps look alike at any scale
    enough = int(np.searchsorted(np.cumsum(np.pi * slim * radii**2), rng.uniform(2, 5) * height * width)) + 1
    along = rng.uniform(0, np.pi) if chance(rng, 0.2) else None
    for radius in radii[:enough]:
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners)) if wild > 0.1 else np.linspace(0, 2 * np.pi, 20, endpoint=False)
        reach = radius * (1 + wild * rng.uniform(-1, 1, angle.size))
        points = np.stack([reach * np.cos(angle), slim * reach * np.sin(angle)], 1)
        turn = rng.uniform(0, 2 * np.pi) if along is None else along + rng.normal(0, 0.15)
        points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        points += rng.uniform(-0.05, 1.05, 2) * (width, height)
        tone = palette[rng.integers(len(palette))] * np.exp(rng.normal(0, spread)) * 200
        for moved, level in ((points + shift, tone * rim), (points, tone)):
            cv2.fillPoly(laid, [np.round(moved * 16).astype(np.int32)[:, None]], np.clip(level, 0, 255).tolist(), cv2.LINE_AA, 4)
    texture = fbm(rng, height, width, log_uniform(rng, 0.3, 3) * least, 3)
    field = laid.astype(np.float32) / 255 * rgb(1 + log_uniform(rng, 0.02, 0.25) * texture)
    return blur(field, rng.uniform(0.4, 1.5)) if chance(rng, 0.4) else field


SIMPLE = (mottled, smooth, smooth, granular, brushed, orange_peel, ground_ceramic)
SURFACES = (mottled, smooth, granular, granular, pebbles, brushed, brushed, ground_ceramic, ground_ceramic, woven, woven, knitted, leather,
            leather, wood, tiled, meshed, crumpled, marbled, fibrous, porous, orange_peel, ribbed, chequer_plate, speckled, dotted,
            lettered, circuit, road, road, banded, banded, formwork, formwork, ridged, striped, masonry, blurred_clutter, strewn)


def any_simple(rng, height, width):
    """A material plain enough to make or carry something else."""
    return SIMPLE[rng.integers(len(SIMPLE))](rng, height, width).astype(np.float32)


def any_surface(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One of the families above, by chance: float32 [H, W, 3] of about 0..1."""
    return SURFACES[rng.integers(len(SURFACES))](rng, height, width).astype(np.float32)
