"""Random fields and colours: the raw material of procedural surfaces and defects.

Fields are made by enlarging small random grids, since that is many times faster than evaluating noise per pixel. Every field is
float32 [H, W]; nothing here knows what a surface or a defect is.
"""

import cv2
import numpy as np


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between low and high whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def standardise(field: np.ndarray) -> np.ndarray:
    """The field with mean 0 and standard deviation 1."""
    mean, deviation = cv2.meanStdDev(field)
    return (field - np.float32(mean[0, 0])) * np.float32(1 / max(deviation[0, 0], 1e-6))


def smoothstep(low: float, high: float, field: np.ndarray) -> np.ndarray:
    t = np.clip((field - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


def blur(field: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; wide ones run on a reduced copy."""
    if sigma < 0.3:
        return field
    if sigma > 6 and min(field.shape[:2]) > 64:
        factor = min(sigma / 3, 8)
        size = (max(8, int(field.shape[1] / factor)), max(8, int(field.shape[0] / factor)))
        small = cv2.GaussianBlur(cv2.resize(field, size, interpolation=cv2.INTER_AREA), (0, 0), sigma / factor)
        return cv2.resize(small, field.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return cv2.GaussianBlur(field, (0, 0), sigma)


def grain(rng: np.random.Generator, height: int, width: int, sigma: float = 0.0) -> np.ndarray:
    """White noise blurred with sigma pixels; mean 0, deviation 1. Sums of three uniform bytes stand in for normal values, for speed."""
    thrown = np.frombuffer(rng.bytes(3 * height * width), np.uint8).reshape(3, height, width)
    white = cv2.add(cv2.add(thrown[0], thrown[1], dtype=cv2.CV_32F), thrown[2], dtype=cv2.CV_32F)
    return standardise(blur(white, sigma))


def grid_noise(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> np.ndarray:
    """One octave: normal values about every (cell_y, cell_x) pixels, cubically interpolated."""
    rows, columns = int(np.ceil(height / max(cell_y, 1.0))) + 1, int(np.ceil(width / max(cell_x, 1.0))) + 1
    grid = rng.standard_normal((min(rows, height), min(columns, width)), dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def fbm(rng: np.random.Generator, height: int, width: int, cell: float, octaves: int = 4, gain: float = 0.5) -> np.ndarray:
    """Fractal noise: octaves of halving cell and amplitude; mean 0, deviation 1."""
    total, amplitude = np.zeros((height, width), np.float32), 1.0
    for _ in range(octaves):
        total += np.float32(amplitude) * grid_noise(rng, height, width, cell, cell)
        cell, amplitude = cell / 2, amplitude * gain
        if cell < 1:
            break
    return standardise(total)


def streaks(rng: np.random.Generator, height: int, width: int, across: float, along: float, angle: float) -> np.ndarray:
    """Elongated noise: cells `across` by `along` pixels, long side turned by `angle` radians; mean 0, deviation 1."""
    side = int(np.ceil(np.hypot(height, width)))
    field = grid_noise(rng, side, side, across, along)
    return standardise(turned(field, angle, height, width))


def turned(field: np.ndarray, angle: float, height: int, width: int) -> np.ndarray:
    """The [height, width] middle of a larger square field turned by `angle` radians."""
    side = field.shape[0]
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), np.degrees(-angle), 1.0)
    matrix[:, 2] += (width - side) / 2, (height - side) / 2
    return cv2.warpAffine(field, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def rgb(field: np.ndarray) -> np.ndarray:
    """The field in three equal channels, [H, W, 3]: several times faster to compute with than a broadcast [H, W, 1]."""
    return cv2.merge((field, field, field))


def over(image: np.ndarray, alpha: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The image [H, W, 3] covered by `other` ([H, W, 3] or a colour [3]) where alpha [H, W] is 1."""
    covered = np.subtract(other, image, dtype=np.float32)
    covered *= rgb(alpha.astype(np.float32))
    covered += image
    return covered


def pixels(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column numbers of every pixel, float32 [H, W] each."""
    y, x = np.empty((height, width), np.float32), np.empty((height, width), np.float32)
    y[:], x[:] = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    return y, x


def plane(rng: np.random.Generator, height: int, width: int, angle: float, wobble: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (u, v) turned by `angle`, displaced by smooth noise of `wobble` pixels, from a random origin."""
    y, x = pixels(height, width)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    u = cos * x + sin * y + rng.uniform(0, 1000)
    v = cos * y - sin * x + rng.uniform(0, 1000)
    if wobble > 0:
        cell = min(height, width) * rng.uniform(0.15, 0.6)
        u += np.float32(wobble) * fbm(rng, height, width, cell, 2)
        v += np.float32(wobble) * fbm(rng, height, width, cell, 2)
    return u, v


def distort(rng: np.random.Generator, field: np.ndarray, amount: float, cell: float, exact: bool = False) -> np.ndarray:
    """The field displaced by noise of `amount` pixels and `cell` pixels grain; `exact` keeps its values (labels)."""
    height, width = field.shape[:2]
    y, x = pixels(height, width)
    x += np.float32(amount) * fbm(rng, height, width, cell, 3)
    y += np.float32(amount) * fbm(rng, height, width, cell, 3)
    how = cv2.INTER_NEAREST if exact else cv2.INTER_LINEAR
    return cv2.remap(field, x, y, how, borderMode=cv2.BORDER_REFLECT)


def cells(rng: np.random.Generator, height: int, width: int, cell: float, jitter: float = 0.9, aspect: float = 1.0):
    """Voronoi cells: labels int32, distance to the nearest border, distance to the own seed (pixels), each [H, W]."""
    rows, columns = max(2, int(height / cell * aspect)), max(2, int(width / cell))
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) + 0.5
    y = (y + rng.uniform(-jitter / 2, jitter / 2, y.shape)) * (height / rows)
    x = (x + rng.uniform(-jitter / 2, jitter / 2, x.shape)) * (width / columns)
    seeds = np.ones((height, width), np.uint8)
    seeds[np.clip(y.astype(int), 0, height - 1), np.clip(x.astype(int), 0, width - 1)] = 0
    to_seed, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    inner = np.ones((height, width), np.uint8)
    inner[:, 1:][labels[:, 1:] != labels[:, :-1]] = 0
    inner[1:][labels[1:] != labels[:-1]] = 0
    return labels, cv2.distanceTransform(inner, cv2.DIST_L2, 3), to_seed


def per_label(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """One normal value for each label, spread over its pixels."""
    return rng.standard_normal(int(labels.max()) + 1, dtype=np.float32)[labels]


def pick(rng: np.random.Generator, *options: float) -> float:
    """One of the numbers, as a Python float (a NumPy scalar would widen float32 arrays)."""
    return float(options[int(rng.integers(len(options)))])


def glyphs(rng: np.random.Generator, height: int, width: int, x: float, y: float, scale: float, length: int) -> np.ndarray:
    """A line of random letters and figures from (x, y) on, as ink in 0..1, float32 [H, W]."""
    mask = np.zeros((height, width), np.uint8)
    text = "".join(chr(c) for c in rng.choice([*range(48, 58), *range(65, 91), *range(97, 123), 45, 47, 32], length))
    weight = max(1, int(scale * rng.uniform(1, 3)))
    cv2.putText(mask, text, (int(x), int(y)), int(rng.integers(0, 5)), max(scale, 0.25), 255, weight, cv2.LINE_AA)
    return mask.astype(np.float32) / 255


def relief(height_map: np.ndarray, light: float) -> np.ndarray:
    """Slope of a height map towards a light at angle `light` (radians): positive where lit, negative in shade."""
    height_map = np.asarray(height_map, np.float32)
    gradient_x = cv2.Sobel(height_map, cv2.CV_32F, 1, 0, ksize=3, scale=0.125)
    gradient_y = cv2.Sobel(height_map, cv2.CV_32F, 0, 1, ksize=3, scale=0.125)
    return float(np.cos(light)) * gradient_x + float(np.sin(light)) * gradient_y


def colour(rng: np.random.Generator, saturation: float | None = None) -> np.ndarray:
    """A random RGB colour in 0..1, float32 [3]; mostly dull, as materials are, unless a saturation is asked for."""
    if saturation is None:
        saturation = rng.uniform(0, 0.15) if chance(rng, 0.5) else rng.uniform(0.1, 0.9) * rng.uniform(0.4, 1)
    hue = pick(rng, rng.uniform(0, 360), rng.uniform(10, 50), rng.uniform(190, 250))
    pixel = np.array([[[hue, saturation, rng.uniform(0.08, 0.95)]]], np.float32)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0]


def tinted(rng: np.random.Generator, field: np.ndarray, contrast: float | None = None) -> np.ndarray:
    """A standardised field in one material's colour: dark where low, light where high; float32 [H, W, 3] in 0..1."""
    base = colour(rng)
    swing = (log_uniform(rng, 0.03, 0.6) if contrast is None else contrast) * (0.3 + 0.7 * float(base.max()))
    drift = (colour(rng) - base) * rng.uniform(0, 0.4)
    slope = 0.5 * swing * (0.6 * base / max(float(base.max()), 0.1) + 0.4 + drift)
    field = np.clip(field, -3, 3).astype(np.float32)
    return cv2.merge([field * float(k) + float(b) for k, b in zip(slope, base)])
