"""Draw one synthetic scene: textured background, overlapping objects of six classes, clutter, light, blur and noise.

The classes differ in outline and part structure. Colours are drawn from one distribution for all classes, and each
surface pattern occurs on every class (a class only prefers some), so neither colour nor texture alone tells a class.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from kd_dense.data import textures

CLASSES = ('background', 'disc', 'ring', 'triangle', 'frame', 'star', 'bar')
SPLITS = ('train', 'val')

SUPERSAMPLING = 4
# Patterns that a class prefers: at difficulty 0.5 it wears one in seven of ten cases, and any pattern in the others.
PREFERRED_SURFACES = {
    'disc': ('core', 'circles'),
    'ring': ('checker', 'flat'),
    'triangle': ('dots', 'core'),
    'frame': ('speckle', 'flat'),
    'star': ('gradient', 'circles'),
    'bar': ('stripes', 'dots'),
}
# Shapes that belong to no class; they are background, in front of some objects and behind others.
CLUTTER = ('square', 'half_disc', 'angle')


@dataclass
class Scene:
    """One drawn scene.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        owner: (H, W) int16; 0 where no object is visible, ``k`` where object ``k`` (1-based, back to front) is.
        class_ids: class index (1..6) of object ``k`` at position ``k - 1``.
        drawn_pixels: pixels inside the image that object ``k`` would show were nothing in front of it.
    """

    image: np.ndarray
    owner: np.ndarray
    class_ids: list[int]
    drawn_pixels: list[int]


def draw_scene(size: tuple[int, int], seed: int, split: str, index: int, difficulty: float = 0.5) -> Scene:
    """Draw scene ``index`` of a split.

    The scene depends on these arguments only, not on how many scenes are drawn, in which order or by which process.

    Args:
        size: (H, W) in pixels.
        seed: seed of the whole dataset, at least 0.
        split: 'train' or 'val'.
        index: number of the scene in its split, from 0.
        difficulty: 0..1; more of it means busier backgrounds, more clutter, small objects, noise and changes of light,
            and surfaces that say less about the class. The number of objects stays the same.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    height, width = size
    short = min(size)
    canvas = _background(size, difficulty, rng)
    owner = np.zeros(size, np.int16)
    class_ids: list[int] = []
    drawn_pixels: list[int] = []

    light_angle = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(light_angle), np.sin(light_angle)], np.float32)
    shadow_strength = rng.uniform(0.2, 0.55) if rng.random() < 0.6 else 0.0

    _line_drawings(canvas, difficulty, rng)
    elongation = height * width / short**2
    object_count = round(rng.integers(6, 13) * elongation)
    clutter_count = round(rng.integers(0, 1 + round(2 * difficulty)) * elongation)
    kinds = [CLASSES[i] for i in rng.integers(1, len(CLASSES), object_count)]
    kinds += [CLUTTER[i] for i in rng.integers(0, len(CLUTTER), clutter_count)]
    radii = np.array([_random_radius(short, difficulty, rng) for _ in kinds])
    # Roughly large to small, so that small objects are occluded but not wiped out.
    order = np.argsort(-radii * rng.uniform(0.4, 2.5, len(radii)))
    for position in order:
        kind, radius = kinds[position], radii[position]
        centre = rng.uniform((0, 0), (width, height))
        alpha, corner = _paint(canvas, kind, centre, radius, light, shadow_strength, difficulty, rng)
        if alpha is None:
            continue
        inside = alpha >= 0.5
        x, y = corner
        region = owner[y : y + alpha.shape[0], x : x + alpha.shape[1]]
        if kind in CLASSES:
            class_ids.append(CLASSES.index(kind))
            drawn_pixels.append(int(inside.sum()))
            region[inside] = len(class_ids)
        else:
            region[inside] = 0

    return Scene(_camera(canvas, difficulty, rng), owner, class_ids, drawn_pixels)


def _random_radius(short: int, difficulty: float, rng: np.random.Generator) -> float:
    """Radius in pixels; at difficulty 0.5, four of ten objects are small and two are large."""
    small, large = 0.2 + 0.4 * difficulty, 0.3 - 0.2 * difficulty
    low, high = ((0.045, 0.08), (0.08, 0.15), (0.15, 0.26))[rng.choice(3, p=(small, 1 - small - large, large))]
    return max(3.0, short * np.exp(rng.uniform(np.log(low), np.log(high))))


def _random_colour(rng: np.random.Generator, saturation: float = 1.0) -> np.ndarray:
    """RGB in 0..255, any hue, not too close to black or white; saturation 0 is grey."""
    colour = rng.uniform(35, 220, 3)
    return (colour.mean() + saturation * (colour - colour.mean())).astype(np.float32)


def _colour_pair(
    rng: np.random.Generator, contrast: tuple[float, float], saturation: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours whose brightness differs by ``contrast`` (low, high)."""
    first = _random_colour(rng, saturation)
    step = rng.uniform(*contrast) * (1 if first.mean() < 128 else -1)
    return first, np.clip(first + step + rng.uniform(-15, 15, 3), 0, 255).astype(np.float32)


def _background(size: tuple[int, int], difficulty: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32 RGB: one to three textured regions with soft, irregular borders."""
    height, width = size
    short = min(size)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / short
    canvas = None
    for _ in range(rng.integers(1, 4)):
        pattern = textures.BACKGROUNDS[rng.integers(len(textures.BACKGROUNDS))]
        angle, scale = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 5.0)
        u = scale * (np.cos(angle) * x + np.sin(angle) * y)
        v = scale * (np.cos(angle) * y - np.sin(angle) * x)
        first, second = _colour_pair(rng, (5, 20 + 40 * difficulty), saturation=0.1 + 0.5 * difficulty)
        layer = first + pattern(u, v, rng)[..., None] * (second - first)
        if canvas is None:
            canvas = layer
        else:
            region = np.clip(6.0 * (textures.value_noise(size, rng, cells=1.5, octaves=3) - 0.5) + 0.5, 0, 1)
            canvas = canvas + region[..., None] * (layer - canvas)
    grain = textures.value_noise(size, rng, cells=short / 4, octaves=1) - 0.5
    return np.ascontiguousarray(canvas + rng.uniform(5, 10 + 30 * difficulty) * grain[..., None], np.float32)


def _line_drawings(canvas: np.ndarray, difficulty: float, rng: np.random.Generator) -> None:
    """Thin unlabelled lines, circles and triangles, drawn in place: outlines without a body belong to no class."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(0, 1 + round(6 * difficulty))):
        colour = tuple(float(c) for c in _random_colour(rng))
        radius = rng.uniform(0.05, 0.3) * min(height, width)
        points = rng.uniform((0, 0), (width, height)) + radius * rng.uniform(-1, 1, (3, 2))
        points = np.round(points * 16).astype(np.int32)
        kind = rng.integers(3)
        if kind == 0:
            cv2.circle(canvas, points[0].tolist(), round(radius * 16), colour, 1, cv2.LINE_8, 4)
        else:
            cv2.polylines(canvas, [points[: kind + 1]], kind == 2, colour, 1, cv2.LINE_8, 4)


def _circle(radius: float, start: float = 0.0, stop: float = 2 * np.pi) -> np.ndarray:
    t = np.linspace(start, stop, 48, endpoint=stop - start < 2 * np.pi)
    return radius * np.stack([np.cos(t), np.sin(t)], 1)


def _rectangle(half_width: float, half_height: float) -> np.ndarray:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (half_width, half_height)


def _outlines(kind: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Closed outlines of a shape in its own frame, within about -1..1; a second outline is a hole."""
    if kind == 'disc':
        return [_circle(1.0) * (1.0, rng.uniform(0.75, 1.0))]
    if kind == 'ring':
        squeeze = (1.0, rng.uniform(0.75, 1.0))
        return [_circle(1.0) * squeeze, _circle(rng.uniform(0.4, 0.65)) * squeeze]
    if kind == 'triangle':
        corners = np.array([-0.5, 1 / 6, 5 / 6]) * np.pi + rng.uniform(-0.2, 0.2, 3)
        return [1.1 * np.stack([np.cos(corners), np.sin(corners)], 1)]
    if kind == 'frame':
        half, hole = (0.85, rng.uniform(0.6, 0.9)), rng.uniform(0.45, 0.65)
        return [_rectangle(*half), _rectangle(*half) * hole]
    if kind == 'star':
        tips = int(rng.integers(4, 7))
        t = np.arange(2 * tips) * np.pi / tips
        reach = np.where(np.arange(2 * tips) % 2 == 0, 1.15, rng.uniform(0.42, 0.58))
        return [np.stack([reach * np.cos(t), reach * np.sin(t)], 1)]
    if kind == 'bar':
        return [_rectangle(1.25, rng.uniform(0.26, 0.42))]
    if kind == 'square':
        return [_rectangle(0.8, rng.uniform(0.6, 0.8))]
    if kind == 'half_disc':
        return [_circle(1.0, 0.0, rng.uniform(0.8, 1.1) * np.pi)]
    if kind == 'angle':
        thick = rng.uniform(0.35, 0.6)
        corners = [(0, 0), (1.6, 0), (1.6, thick), (thick, thick), (thick, 1.6), (0, 1.6)]
        return [np.array(corners) - 0.7]
    raise ValueError(f'unknown shape {kind!r}')


def _coverage(outlines: list[np.ndarray], corner: tuple[int, int], shape: tuple[int, int], fine: int) -> np.ndarray:
    """Share of each pixel (H, W), 0..1, that lies inside the outlines (even-odd rule).

    Outlines are in image coordinates where pixel ``i`` spans ``i .. i + 1``; ``corner`` is the (x, y) of the first
    pixel, and every pixel is divided into ``fine`` x ``fine`` parts.
    """
    mask = np.zeros((shape[0] * fine, shape[1] * fine), np.uint8)
    points = [np.round(((o - corner) * fine - 0.5) * 16).astype(np.int32) for o in outlines]
    cv2.fillPoly(mask, points, 255, cv2.LINE_8, 4)
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _window(points: np.ndarray, size: tuple[int, int], margin: int) -> tuple[int, int, int, int] | None:
    """Part of the image around the points as (x0, y0, x1, y1), or None when it lies outside."""
    low = np.maximum(np.floor(points.min(0)).astype(int) - margin, 0)
    high = np.minimum(np.ceil(points.max(0)).astype(int) + margin, size[::-1])
    return None if (high <= low).any() else (int(low[0]), int(low[1]), int(high[0]), int(high[1]))


def _paint(
    canvas: np.ndarray,
    kind: str,
    centre: np.ndarray,
    radius: float,
    light: np.ndarray,
    shadow_strength: float,
    difficulty: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray | None, tuple[int, int]]:
    """Paint one shape on the canvas in place; return its coverage and the (x, y) where that window starts."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outlines = [o @ rotation * radius + centre for o in _outlines(kind, rng)]
    window = _window(outlines[0], canvas.shape[:2], margin=0)
    if window is None:
        return None, (0, 0)
    x0, y0, x1, y1 = window

    if shadow_strength:
        _cast_shadow(canvas, outlines, radius, light, shadow_strength)

    alpha = _coverage(outlines, (x0, y0), (y1 - y0, x1 - x0), SUPERSAMPLING)
    target = canvas[y0:y1, x0:x1]
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32) + 0.5
    x, y = (x - np.float32(centre[0])) / np.float32(radius), (y - np.float32(centre[1])) / np.float32(radius)
    u = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    v = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x

    names = PREFERRED_SURFACES.get(kind)
    if names is None or rng.random() < 0.6 * difficulty:
        names = tuple(textures.SURFACES)
    pattern = textures.SURFACES[names[rng.integers(len(names))]]
    behind = target.reshape(-1, 3).mean(0)
    for _ in range(4):  # a shape in the colour of what is behind it could not be seen
        first, second = _colour_pair(rng, (35, 100))
        if np.abs(first - behind).max() > 90 - 60 * difficulty:
            break
    surface = first + pattern(u, v, rng)[..., None] * (second - first)
    surface *= (1.0 - rng.uniform(0.0, 0.3) * (x * light[0] + y * light[1]))[..., None]
    if rng.random() < 0.4 and radius > 5:
        rim = 1.0 - cv2.erode(alpha, np.ones((3, 3), np.uint8))
        surface *= (1.0 - 0.5 * rim)[..., None]
    target += alpha[..., None] * (surface - target)
    return alpha, (x0, y0)


def _cast_shadow(
    canvas: np.ndarray, outlines: list[np.ndarray], radius: float, light: np.ndarray, strength: float
) -> None:
    """Darken, in place, what lies behind a shape on the side away from the light."""
    offset = light * max(1.0, 0.25 * radius)
    blur = 2 * int(0.15 * radius) + 3
    shifted = [o + offset for o in outlines]
    window = _window(shifted[0], canvas.shape[:2], margin=blur)
    if window is None:
        return
    x0, y0, x1, y1 = window
    shade = cv2.blur(_coverage(shifted, (x0, y0), (y1 - y0, x1 - x0), 1), (blur, blur))
    canvas[y0:y1, x0:x1] *= (1.0 - strength * shade)[..., None]


def _camera(canvas: np.ndarray, difficulty: float, rng: np.random.Generator) -> np.ndarray:
    """Apply uneven light, white balance, blur and sensor noise; return uint8."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x / width - 0.5, y / height - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    gain = rng.uniform(0.95 - 0.6 * difficulty, 1.05 + 0.2 * difficulty)
    gain = gain * (1.0 + rng.uniform(0.0, 0.2 + 1.2 * difficulty) * along)
    if rng.random() < 0.7 * difficulty:  # the edge of a large soft shadow
        edge = np.clip(rng.uniform(3, 12) * (along * rng.choice((-1, 1)) + rng.uniform(-0.3, 0.3)) + 0.5, 0, 1)
        gain = gain * (1.0 - rng.uniform(0.2, 0.5) * edge)
    image = canvas * gain[..., None] * rng.uniform(0.88, 1.12, 3).astype(np.float32)
    sigma = rng.uniform(0.0, 1.6 * difficulty) * min(height, width) / 128
    if sigma > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(image + rng.uniform(1, 1 + 12 * difficulty) * noise + 0.5, 0, 255).astype(np.uint8)
