"""Fog and night on images: target domains that are made rather than found, with the labels of the originals.

Fog is that of imagecorruptions (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", ICLR 2019): bright patches laid over the image, at the cost of its contrast, without regard to
distance. Night is a photometric model of our own, :func:`add_night`: no lamps, no headlights. Both are stand-ins for
experiments and no forecast of a score in real fog or at real night.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from kd_dense.data.files import IMAGE_SUFFIXES

SEVERITIES = (1, 2, 3, 4, 5)
#: Night at severity 1 to 5: gamma, gain, standard deviation of the noise (in 0..255).
NIGHT = ((1.2, 0.7, 2.0), (1.4, 0.6, 3.0), (1.6, 0.5, 4.5), (1.8, 0.45, 6.0), (2.0, 0.4, 8.0))
#: What night leaves of blue, green and red.
TINT = np.array([1.0, 0.8, 0.65], np.float32)
MIN_SIDE = 32  # of imagecorruptions


def add_fog(image: np.ndarray, severity: int = 3, seed: int = 0) -> np.ndarray:
    """``[H, W, 3]`` uint8, of any order of channels, in fog; of the same ``seed`` the same fog.

    Args:
        severity: 1 to 5.
        seed: of the patches, 0 to ``2**32 - 1``.

    Raises:
        ValueError: imagecorruptions is not installed, or a side is shorter than 32 pixels.
    """
    try:
        from imagecorruptions import corrupt
    except ImportError:
        raise ValueError("fog needs the package imagecorruptions; pip install 'kd_dense[weather]'") from None
    if min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(f'fog needs images of {MIN_SIDE} x {MIN_SIDE} pixels or more')
    before = np.random.get_state()
    np.random.seed(seed)  # imagecorruptions knows no other generator
    try:
        return corrupt(image, severity=severity, corruption_name='fog')
    finally:
        np.random.set_state(before)


def add_night(image: np.ndarray, severity: int = 3, seed: int = 0) -> np.ndarray:
    """``[H, W, 3]`` uint8, BGR, as if taken at night; of the same ``seed`` the same noise.

    ``y = 255 gain tint (x / 255)^gamma + n``: dark parts lose more than bright ones, red more than blue, and what is
    left has noise ``n`` of its own in every channel, normal with mean 0. The formula and its numbers are our choice.

    Args:
        severity: 1 to 5, see :data:`NIGHT`.
        seed: of the noise.
    """
    gamma, gain, deviation = NIGHT[severity - 1]
    curve = 255 * gain * np.linspace(0, 1, 256, dtype=np.float32) ** gamma
    noise = np.random.default_rng(seed).normal(0, deviation, image.shape).astype(np.float32)
    return (curve[image] * TINT + noise).round().clip(0, 255).astype(np.uint8)


KINDS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {'fog': add_fog, 'night': add_night}


def write_weather(images: str | Path, out: str | Path, kind: str, severity: int = 3, progress: bool = True) -> int:
    """Write every image in ``images`` and below it, in fog or at night, to the same place in ``out``.

    What is random about an image follows from its name, so that it does not depend on what else is there.

    Args:
        images: folder, only read.
        out: folder to write to.
        kind: 'fog' or 'night'.
        severity: 1 to 5.
        progress: show a progress bar.

    Returns:
        The number of images.

    Raises:
        ValueError: unknown ``kind`` or ``severity``, ``out`` lies in ``images``, there are no images, or
            :func:`add_fog` refuses one.
        OSError: an image can not be read or written.
    """
    images, out = Path(images).resolve(), Path(out).resolve()
    if kind not in KINDS:
        raise ValueError(f'unknown kind {kind!r}; known: {", ".join(KINDS)}')
    if severity not in SEVERITIES:
        raise ValueError(f'severity must be one of {", ".join(map(str, SEVERITIES))}; got {severity}')
    if out == images or images in out.parents:
        raise ValueError(f'{out} lies in {images}, whose images would be mixed with their copies: choose another')
    files = sorted(f for f in images.rglob('*') if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f'there are no images in {images}')
    for file in tqdm(files, desc=kind, unit='image', disable=not progress):
        name = file.relative_to(images)
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None:
            raise OSError(f'{file} is no image that can be decoded')
        try:
            changed = KINDS[kind](image, severity, zlib.crc32(name.as_posix().encode()))
        except ValueError as error:
            raise ValueError(f'{file}: {error}') from None
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(target), changed):
            raise OSError(f'could not write {target}: check the free space and the permissions')
    return len(files)
