"""Normal objects: machined, cast, moulded and grown parts lying on a ground, whole or cropped, single or repeated.

Parts are silhouettes given a material, a bevelled or domed relief under one light, and features that belong (holes, rings, slots,
screws, threads, labels, glare, shadows), so that a model meets edges, holes and highlights without a defect. No exact geometry of any
real product is copied.
"""

import cv2
import numpy as np

from agvas.training.noise import (
    blur,
    cells,
    chance,
    colour,
    fbm,
    glyphs,
    grain,
    log_uniform,
    over,
    per_label,
    pick,
    pixels,
    relief,
    rgb,
    smoothstep,
)
from agvas.training.surfaces import any_simple, any_surface


def _circle(points: int = 64, power: float = 2.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.sign(c) * np.abs(c) ** (2 / power), np.sign(s) * np.abs(s) ** (2 / power)], 1)


def _polygon(rng) -> np.ndarray:
    sides = int(pick(rng, 3, 4, 5, 6, 6, 6, 8, 12))
    return _circle(sides)


def _gear(rng) -> np.ndarray:
    teeth, depth = int(rng.integers(4, 30)), rng.uniform(0.05, 0.35)
    angle = np.linspace(0, 2 * np.pi, teeth * 12, endpoint=False)
    radius = 1 - depth * (0.5 + 0.5 * np.tanh(rng.uniform(1, 6) * np.sin(teeth * angle)))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _rectangle(rng) -> np.ndarray:
    return _circle(96, pick(rng, 4.0, 8.0, 20.0, 60.0)) * [1, rng.uniform(0.15, 1)]


def _capsule(rng) -> np.ndarray:
    points, slim = _circle(64), rng.uniform(0.15, 0.7)
    points = points * slim
    points[:, 0] += np.sign(points[:, 0]) * (1 - slim)
    return points


def _bracket(rng) -> np.ndarray:
    a, b = rng.uniform(0.2, 0.7, 2)
    shapes = ([(-1, -1), (1, -1), (1, -1 + a), (-1 + b, -1 + a), (-1 + b, 1), (-1, 1)],
              [(-1, -1), (1, -1), (1, -1 + a), (b / 2, -1 + a), (b / 2, 1), (-b / 2, 1), (-b / 2, -1 + a), (-1, -1 + a)],
              [(-1, -1), (1, -1), (1, 1), (b, 1), (b, -1 + a), (-b, -1 + a), (-b, 1), (-1, 1)],
              [(-a, -1), (a, -1), (a, -b), (1, -b), (1, b), (a, b), (a, 1), (-a, 1), (-a, b), (-1, b), (-1, -b), (-a, -b)])
    return np.array(shapes[rng.integers(len(shapes))], float)


def _bottle(rng) -> np.ndarray:
    neck, shoulder = rng.uniform(0.12, 0.3), rng.uniform(-0.5, 0.1)
    half = [(-1, neck), (shoulder - 0.25, neck), (shoulder, 0.3 + neck / 2), (shoulder + 0.1, 0.42), (0.95, 0.42), (1, 0.36)]
    return np.array(half + [(x, -y) for x, y in half[::-1]])


def _screw(rng) -> np.ndarray:
    head, shank, length = rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.2), rng.uniform(0.15, 0.4)
    pitch = rng.uniform(0.04, 0.09)
    x = np.arange(-1 + length, 0.85, pitch / 2)
    teeth = shank * (1 + 0.35 * (np.arange(x.size) % 2))
    upper = [(-1, head), (-1 + length, head * rng.uniform(0.5, 1)), *zip(x, teeth), (1, 0.02)]
    return np.array(upper + [(a, -b) for a, b in upper[::-1]])


def _organic(rng) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = 0.85 + sum(rng.normal(0, 0.12 / k) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(1, 6))
    return np.stack([radius * np.cos(angle), rng.uniform(0.6, 1) * radius * np.sin(angle)], 1)


def outline(rng: np.random.Generator) -> np.ndarray:
    """A silhouette within about the unit circle, float [N, 2]."""
    makers = (lambda r: _circle(), lambda r: _circle() * [1, r.uniform(0.4, 0.95)], _polygon, _gear, _rectangle, _rectangle, _capsule,
              _bracket, _bottle, _screw, _organic)
    return makers[rng.integers(len(makers))](rng)


def placed(points: np.ndarray, centre, scale: float, angle: float) -> np.ndarray:
    """Points scaled, turned and moved, as cv2 fixed-point integers with 4 fractional bits [N, 1, 2]."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.round((points * scale @ turn + centre) * 16).astype(np.int32)[:, None]


def filled(height: int, width: int, *polygons: np.ndarray) -> np.ndarray:
    """Polygons from `placed` drawn with soft edges, float32 [H, W] in 0..1."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:
        cv2.fillPoly(mask, [polygon], 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / 255


def _body(rng, mask: np.ndarray, light: float) -> np.ndarray:
    """Material and relief of a part that fills `mask`, float32 [H, W, 3]; made only around the mask, for speed."""
    height, width = mask.shape
    x, y, w, h = cv2.boundingRect((mask > 0).astype(np.uint8))
    box = (slice(max(0, y - 8), min(height, y + h + 8)), slice(max(0, x - 8), min(width, x + w + 8)))
    body = np.zeros((height, width, 3), np.float32)
    body[box] = _solid(rng, mask[box], light)
    return body


def _solid(rng, mask: np.ndarray, light: float) -> np.ndarray:
    """Material and relief over the whole of a mask [H, W]: float32 [H, W, 3]."""
    height, width = mask.shape
    depth = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    deepest = min(max(float(depth.max()), 1.0), max(height, width))  # a part that fills the frame has no border to measure from
    depth = np.minimum(depth, deepest)
    if chance(rng, 0.5):
        bevel = min(deepest, log_uniform(rng, 1.5, 0.05 * min(height, width) + 2))
    else:
        bevel = deepest
    t = np.minimum(depth / bevel, 1)
    profile = blur(np.sqrt(np.maximum(1 - (1 - t) ** 2, 0)) * bevel * rng.uniform(0.2, 1), 1.0)
    slope = relief(profile, light)
    material = any_simple(rng, height, width) if chance(rng, 0.8) else any_surface(rng, height, width)
    body = material * rgb(1 + rng.uniform(0.2, 1.2) * slope)
    gloss = np.clip(1 - np.abs(slope - rng.uniform(0.1, 0.5)) * rng.uniform(3, 8), 0, 1) ** rng.uniform(1, 4)
    return body + rgb(rng.uniform(0, 0.5) * gloss * (profile > 0))


def _feature_masks(rng, height, width, centre, scale, angle):
    """Masks of one kind of feature, in an arrangement that looks meant: in a ring, a row, or at the centre."""
    shape = _circle(32) if chance(rng, 0.7) else outline(rng)
    size = scale * log_uniform(rng, 0.05, 0.5)
    style = rng.integers(3)
    if style == 0:
        spots = np.zeros((1, 2))
    elif style == 1:
        ring = np.linspace(0, 2 * np.pi, int(rng.integers(2, 13)), endpoint=False)
        spots = np.stack([np.cos(ring), np.sin(ring)], 1) * scale * rng.uniform(0.4, 0.8)
        size = min(size, 0.15 * scale)
    else:
        row = np.linspace(-1, 1, int(rng.integers(2, 7))) * scale * rng.uniform(0.3, 0.7)
        spots = np.stack([row, np.full_like(row, rng.uniform(-0.3, 0.3) * scale)], 1)
        size = min(size, 0.12 * scale)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return filled(height, width, *(placed(shape, centre + spot @ turn, size, angle) for spot in spots))


def _line_masks(rng, height, width, centre, scale, angle):
    """Rings, slots, ribs or threads."""
    mask = np.zeros((height, width), np.uint8)
    thick = max(1, int(log_uniform(rng, 0.008, 0.08) * scale))
    middle = tuple(int(c) for c in centre)
    direction = np.array([np.cos(angle), np.sin(angle)])
    normal = np.array([-direction[1], direction[0]])
    style = rng.integers(3)
    if style == 0:
        for radius in rng.uniform(0.15, 0.95, rng.integers(1, 5)) * scale:
            cv2.circle(mask, middle, int(radius), 255, thick, cv2.LINE_AA)
    elif style == 1:
        for offset in rng.uniform(-0.6, 0.6, rng.integers(1, 4)) * scale:
            a, b = centre + normal * offset - direction * scale * 0.7, centre + normal * offset + direction * scale * 0.7
            cv2.line(mask, tuple(a.astype(int).tolist()), tuple(b.astype(int).tolist()), 255, thick, cv2.LINE_AA)
    else:
        step = max(3.0, 2.5 * thick)
        reach = scale * rng.uniform(0.2, 0.8)
        for offset in np.arange(-reach, reach, step):
            a = centre + direction * offset - normal * scale * 0.5
            b = centre + direction * (offset + pick(rng, 0, 0.3) * step) + normal * scale * 0.5
            cv2.line(mask, tuple(a.astype(int).tolist()), tuple(b.astype(int).tolist()), 255, thick, cv2.LINE_AA)
    return mask.astype(np.float32) / 255


def _featured(rng, image, body, mask, centre, scale, angle, light):
    """The body with holes, grooves, raised rings, letters and glare inside `mask`."""
    height, width = mask.shape
    for _ in range(rng.integers(0, 5)):
        style = rng.integers(6)
        if style <= 1:
            feature = _feature_masks(rng, height, width, centre, scale, angle) * mask
            inside = image * rng.uniform(0.4, 1) if chance(rng, 0.4) else colour(rng) * rng.uniform(0, 0.5)
            body = over(body, feature, inside) + rgb(rng.uniform(-1, 1.5) * relief(blur(feature, rng.uniform(0.7, 2)), light))
        elif style == 2:
            feature = _feature_masks(rng, height, width, centre, scale, angle) * mask
            body = over(body, feature, _body(rng, feature, light))
        elif style == 3:
            feature = _line_masks(rng, height, width, centre, scale, angle) * mask
            body = body * rgb(1 - rng.uniform(-0.3, 0.7) * feature)
            body += rgb(rng.uniform(-1.2, 1.2) * relief(blur(feature, rng.uniform(0.6, 2)), light))
        elif style == 4:
            size, length = rng.uniform(0.006, 0.02) * scale, int(rng.integers(1, 7))
            x, y = centre + rng.uniform(-0.4, 0.4, 2) * scale + [-9 * size * length, 9 * size]
            feature = glyphs(rng, height, width, x, y, size, length) * mask
            if chance(rng, 0.5):
                body = over(body, feature, colour(rng))
            else:
                body = body + rgb(rng.uniform(-1.5, 1.5) * relief(blur(feature, 0.8), light))
        else:
            spot = centre + rng.uniform(-0.6, 0.6, 2) * scale
            lamp = placed(_circle() * [1, rng.uniform(0.1, 1)], spot, scale * rng.uniform(0.05, 0.4), rng.uniform(0, 6.28))
            glare = blur(filled(height, width, lamp), rng.uniform(0.5, 0.05 * scale + 1))
            body = body + rgb(rng.uniform(0.2, 0.9) * glare * mask)
    return body


def _shadowed(rng, image, mask, scale, light):
    """The ground darkened where the part keeps the light off."""
    reach = rng.uniform(0.01, 0.12) * scale
    matrix = np.float32([[1, 0, -np.cos(light) * reach], [0, 1, -np.sin(light) * reach]])
    shade = blur(cv2.warpAffine(mask, matrix, mask.shape[::-1]), rng.uniform(0.3, 1) * reach + 0.5)
    return image * rgb(1 - rng.uniform(0, 0.8) * shade)


def _one(rng, image, shape, centre, scale, angle, light):
    """The image with one part drawn on it, and the part's mask."""
    height, width = image.shape[:2]
    polygons = [placed(shape, centre, scale, angle)]
    mask = filled(height, width, *polygons)
    if chance(rng, 0.25):
        mask = mask * (1 - filled(height, width, placed(_circle(), centre, scale * rng.uniform(0.15, 0.7), angle)))
    image = _shadowed(rng, image, mask, scale, light)
    body = _featured(rng, image, _body(rng, mask, light), mask, centre, scale, angle, light)
    return over(image, mask, body), mask


def ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """What parts lie on: often plain black, white or grey, else a material; float32 [H, W, 3]."""
    if chance(rng, 0.5):
        level = pick(rng, rng.uniform(0, 0.12), rng.uniform(0.85, 1), rng.uniform(0.1, 0.9))
        hue = colour(rng) if chance(rng, 0.25) else np.ones(3, np.float32)
        return np.full((height, width, 3), level * hue, np.float32) + 0.01 * fbm(rng, height, width, 0.5 * min(height, width), 2)[..., None]
    return any_simple(rng, height, width) if chance(rng, 0.6) else any_surface(rng, height, width)


def single(rng, height, width):
    """One part, from small to larger than the frame."""
    size = min(height, width)
    image, light = ground(rng, height, width), rng.uniform(0, 6.28)
    scale = log_uniform(rng, 0.25, 1.3) * size
    spread = 0.1 if scale < 0.5 * size else 0.45
    centre = np.array([width, height]) * (0.5 + rng.uniform(-spread, spread, 2))
    angle = pick(rng, 0.0, np.pi / 2, rng.uniform(0, 6.28))
    return _one(rng, image, outline(rng), centre, scale, angle, light)


def assembly(rng, height, width):
    """Several different parts over and beside one another: a cropped view of a machine or casting."""
    size, light = min(height, width), rng.uniform(0, 6.28)
    image, region = ground(rng, height, width), np.zeros((height, width), np.float32)
    for _ in range(rng.integers(2, 5)):
        centre = np.array([width, height]) * rng.uniform(0, 1, 2)
        angle = pick(rng, 0.0, np.pi / 2, rng.uniform(0, 6.28))
        image, mask = _one(rng, image, outline(rng), centre, log_uniform(rng, 0.1, 0.8) * size, angle, light)
        region = np.maximum(region, mask)
    return image, region


def repeated(rng, height, width):
    """Many copies of one part: a tray, a blister, a heap."""
    size = min(height, width)
    image = ground(rng, height, width).astype(np.float32)
    cell = int(max(12, log_uniform(rng, 0.1, 0.5) * size))
    scale, light, angle = 0.42 * cell, rng.uniform(0, 6.28), rng.uniform(0, 6.28)
    tile, mask = _one(rng, np.zeros((cell, cell, 3), np.float32), outline(rng), np.array([cell, cell]) / 2, scale, angle, light)
    orderly, turning = chance(rng, 0.6), chance(rng, 0.4)
    region = np.zeros((height, width), np.float32)
    for y in range(int(rng.integers(-cell, 1)), height, cell):
        for x in range(int(rng.integers(-cell, 1)) if not orderly else -cell // 3, width, cell):
            turn = rng.uniform(0, 360) if turning else rng.normal(0, 2)
            matrix = cv2.getRotationMatrix2D((cell / 2, cell / 2), turn, 1.0)
            matrix[:, 2] += (0, 0) if orderly else rng.uniform(-0.08, 0.08, 2) * cell
            piece, piece_mask = cv2.warpAffine(tile, matrix, (cell, cell)), cv2.warpAffine(mask, matrix, (cell, cell))
            top, left, bottom, right = max(y, 0), max(x, 0), min(y + cell, height), min(x + cell, width)
            if bottom <= top or right <= left:
                continue
            inside = (slice(top - y, bottom - y), slice(left - x, right - x))
            outside = (slice(top, bottom), slice(left, right))
            alpha = piece_mask[inside][..., None]
            image[outside] += alpha * (piece[inside] * rng.normal(1, 0.04) - image[outside])
            region[outside] = np.maximum(region[outside], alpha[..., 0])
    return image, region


def closeup(rng, height, width):
    """A part seen so near that only an edge, a corner or a bore of it shows."""
    size = min(height, width)
    image, light = any_simple(rng, height, width) * rng.uniform(0.1, 1), rng.uniform(0, 6.28)
    scale = rng.uniform(1.0, 4) * size
    bearing = rng.uniform(0, 6.28)
    centre = np.array([width, height]) / 2 + scale * rng.uniform(0.6, 1.0) * np.array([np.cos(bearing), np.sin(bearing)])
    return _one(rng, image, outline(rng), centre, scale, rng.uniform(0, 6.28), light)


def shining_bore(rng, height, width):
    """Turned metal seen end on: concentric marks, a bore, radial glare that follows the rings."""
    y, x = pixels(height, width)
    size = min(height, width)
    cx, cy = width * rng.uniform(0.3, 0.7), height * rng.uniform(0.3, 0.7)
    radius, bearing = np.hypot(x - cx, y - cy), np.arctan2(y - cy, x - cx)
    table = blur(rng.standard_normal((1, 2048), dtype=np.float32), rng.uniform(0.4, 2))[0]
    turned_marks = table[np.minimum((radius * rng.uniform(0.5, 1.5)).astype(int), 2047)]
    glare = sum(rng.uniform(0.1, 0.5) * np.exp(2 * rng.uniform(1, 10) * (np.cos(bearing - a) - 1)) for a in rng.uniform(0, 6.28, 3))
    face = colour(rng, rng.uniform(0, 0.3)) * (0.5 + 0.1 * turned_marks + 0.02 * grain(rng, height, width) + glare)[..., None]
    outer, bore = rng.uniform(0.3, 0.8) * size, rng.uniform(0.05, 0.25) * size
    region = (1 - smoothstep(-1, 1, radius - outer)) * smoothstep(-1, 1, radius - bore)
    image = ground(rng, height, width)
    return over(image, region, face), region


def nested(rng, height, width):
    """Shape within shape, each with its own material: cables, caps, frames, housings, bottoms of bottles and cups."""
    size, light = min(height, width), rng.uniform(0, 6.28)
    image, region = ground(rng, height, width), np.zeros((height, width), np.float32)
    scale, angle = log_uniform(rng, 0.35, 1.0) * size, rng.uniform(0, 6.28) if chance(rng, 0.5) else 0.0
    centre, shape = np.array([width, height]) * (0.5 + rng.uniform(-0.15, 0.15, 2)), outline(rng)
    for _ in range(rng.integers(2, 6)):
        mask = filled(height, width, placed(shape, centre, scale, angle))
        image = over(_shadowed(rng, image, mask, 0.3 * scale, light), mask, _body(rng, mask, light))
        region = np.maximum(region, mask)
        scale *= rng.uniform(0.5, 0.93)
        if chance(rng, 0.3):
            shape = outline(rng)
    return image, region


def connector(rng, height, width):
    """A moulded body with a comb of pins, teeth or slots: plugs, sockets, heat sinks, zips."""
    size, light = min(height, width), rng.uniform(0, 6.28)
    angle, centre = pick(rng, 0, np.pi / 2, rng.uniform(0, 6.28)), np.array([width, height]) * rng.uniform(0.35, 0.65, 2)
    scale, count = rng.uniform(0.3, 0.8) * size, int(rng.integers(3, 22))
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    reach, pin = rng.uniform(0.2, 0.8) * scale, _rectangle(rng)[:, ::-1]
    thick = 0.9 * scale / count
    spots = [centre + along * scale * 0.9 * k + across * reach * pick(rng, 0.6, 0.6, -0.6) for k in np.linspace(-1, 1, count)]
    pins = filled(height, width, *(placed(pin * [0.6 * thick, 0.6 * reach], spot, 1.0, angle) for spot in spots))
    body = filled(height, width, placed(_circle(96, 20.0) * [scale, 0.45 * reach], centre, 1.0, angle))
    image = _shadowed(rng, ground(rng, height, width), np.maximum(pins, body), 0.4 * scale, light)
    for mask in (pins, body)[::-1 if chance(rng, 0.3) else 1]:
        image = over(image, mask, _body(rng, mask, light))
    return image, np.maximum(pins, body)


def bundle(rng, height, width):
    """Ends of rods, bristles, strands, berries or pellets packed side by side."""
    labels, border, to_seed = cells(rng, height, width, max(6.0, log_uniform(rng, 0.03, 0.25) * min(height, width)), rng.uniform(0.1, 0.7))
    present = (per_label(rng, labels) > pick(rng, -9, -9, -0.3)).astype(np.float32)  # packed, or with many gaps: never one gap
    radius = np.percentile(border, 97)
    dome = np.sqrt(np.clip(border / radius, 0, 1)) * present
    rings = np.cos(to_seed * (rng.uniform(1, 6) / radius))
    tone = present * (1 + rng.uniform(0, 0.3) * per_label(rng, labels)) + rng.uniform(-0.4, 0.4) * rings
    lit = rng.uniform(0, 2) * relief(blur(dome, 0.8), rng.uniform(0, 6.28)) * radius
    bodies = any_simple(rng, height, width) * rgb((0.6 + 0.4 * tone + 0.3 * lit).astype(np.float32))
    return over(ground(rng, height, width) * 0.4, smoothstep(0.0, 0.5, dome), bodies), np.ones((height, width), np.float32)


VIEWS = (single, single, single, nested, nested, connector, bundle, assembly, repeated, closeup, closeup, shining_bore)


def any_part(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A view of parts: float32 [H, W, 3] of about 0..1, and the parts' region bool [H, W]."""
    image, region = VIEWS[rng.integers(len(VIEWS))](rng, height, width)
    return image.astype(np.float32), region > 0.5
