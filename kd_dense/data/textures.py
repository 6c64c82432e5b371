"""Procedural patterns, as functions of local coordinates.

Every pattern takes two float32 coordinate arrays ``u, v`` of shape (H, W) and a random generator, and returns a
float32 array of shape (H, W) with values in 0..1 that mixes two colours. Edges are softened so that nothing aliases.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Pattern = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _soft_step(value: np.ndarray, sharpness: float = 3.0) -> np.ndarray:
    """Map about -1..1 to 0..1 with a soft edge at 0."""
    return np.clip(0.5 + 0.5 * sharpness * value, 0.0, 1.0)


def value_noise(shape: tuple[int, int], rng: np.random.Generator, cells: float = 4.0, octaves: int = 3) -> np.ndarray:
    """Smooth random field of shape (H, W) in about 0..1: random grids of growing resolution, added up.

    Args:
        shape: (H, W) of the result.
        rng: random generator.
        cells: cells of the coarsest grid along the shorter side.
        octaves: number of grids; each has twice the resolution and half the weight of the one before.
    """
    height, width = shape
    short = max(min(shape), 1)
    field, weight_sum = np.zeros(shape, np.float32), 0.0
    for octave in range(octaves):
        pitch = short / (cells * 2**octave)
        grid = rng.random((int(height / pitch) + 2, int(width / pitch) + 2), dtype=np.float32)
        field += 0.5**octave * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        weight_sum += 0.5**octave
    return np.clip(field / weight_sum, 0.0, 1.0)


def flat(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One colour."""
    return np.zeros_like(u)


def gradient(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A linear ramp in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.clip(0.5 + 0.4 * (np.cos(angle) * u + np.sin(angle) * v), 0.0, 1.0)


def stripes(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Parallel bands across the u axis."""
    return _soft_step(np.sin(rng.uniform(6, 11) * u + rng.uniform(0, 6)))


def checker(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A chequerboard."""
    frequency = rng.uniform(5, 8)
    return _soft_step(np.sin(frequency * u) * np.sin(frequency * v), 5.0)


def dots(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square grid of round dots."""
    frequency = rng.uniform(6, 10)
    return _soft_step(np.cos(frequency * u) + np.cos(frequency * v) - 0.7, 2.0)


def circles(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Concentric circles."""
    return _soft_step(np.cos(rng.uniform(6, 10) * np.sqrt(u * u + v * v) + rng.uniform(0, 3)))


def speckle(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Irregular blotches."""
    return _soft_step(value_noise(u.shape, rng, cells=4.0, octaves=2) - 0.5, 6.0)


def core(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A painted disc in the middle: on a filled shape it looks like a hole, but is not one."""
    return _soft_step(rng.uniform(0.35, 0.55) - np.sqrt(u * u + v * v), 6.0)


def waves(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bands bent by a second wave, like wood grain."""
    bend = rng.uniform(0.3, 0.9) * np.sin(rng.uniform(1.5, 3.0) * v + rng.uniform(0, 6))
    return 0.5 + 0.5 * np.sin(rng.uniform(4, 8) * (u + bend))


def clouds(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Soft multi-scale noise."""
    return value_noise(u.shape, rng, cells=rng.uniform(2, 6), octaves=4)


SURFACES: dict[str, Pattern] = {p.__name__: p for p in (flat, gradient, stripes, checker, dots, circles, speckle, core)}
BACKGROUNDS: tuple[Pattern, ...] = (clouds, clouds, gradient, waves, stripes, checker, dots, speckle)
