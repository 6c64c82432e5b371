"""Fog on images, for a target domain that is made rather than found.

``y = x t + A (1 - t)``, ``t = exp(-density d)``: light fades with the distance ``d`` that it travels and is replaced by
that of the fog, ``A`` (Koschmieder's law, as in Foggy Cityscapes: Sakaridis et al., "Semantic Foggy Scene Understanding
with Synthetic Data", IJCV 2018, who have the distance from stereo images). Here nothing is known about it: ``d`` falls
from 1 at the top of the image, where road scenes are far, to 0.4 at the bottom, and drifts by up to 0.3 in patches. A
stand-in for tests and demos, no forecast of a score in real fog.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from kd_dense.data.files import IMAGE_SUFFIXES

#: The light of fog, in all channels.
LIGHT = 225.0


def add_fog(image: np.ndarray, density: float = 1.5, seed: int = 0) -> np.ndarray:
    """``[H, W, 3]`` uint8 in fog; of the same ``seed`` the same fog.

    Args:
        density: 0: none; 1: half of the light is left on average; 3: hardly any.
        seed: of the patches.
    """
    height, width = image.shape[:2]
    ramp = np.linspace(1.0, 0.4, height, dtype=np.float32)[:, None]
    patches = np.random.default_rng(seed).uniform(-0.3, 0.3, (4, 4)).astype(np.float32)
    patches = cv2.resize(patches, (width, height), interpolation=cv2.INTER_LINEAR)
    left = np.exp(-density * np.clip(ramp + patches, 0, None))[..., None]
    return (image * left + LIGHT * (1 - left)).round().clip(0, 255).astype(np.uint8)


def write_foggy(images: str | Path, out: str | Path, density: float = 1.5, progress: bool = True) -> int:
    """Write every image in ``images`` and below it, in fog, to the same place in ``out``.

    The fog on an image follows from its name, so that it does not depend on what else is there.

    Returns:
        The number of images.

    Raises:
        ValueError: ``density`` is negative, ``out`` lies in ``images``, or there are no images.
        OSError: an image can not be read or written.
    """
    images, out = Path(images).resolve(), Path(out).resolve()
    if density < 0:
        raise ValueError(f'density must not be negative; got {density}')
    if out == images or images in out.parents:
        raise ValueError(f'{out} lies in {images}, whose images would be mixed with their foggy copies: choose another')
    files = sorted(f for f in images.rglob('*') if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f'there are no images in {images}')
    for file in tqdm(files, desc='fog', unit='image', disable=not progress):
        name = file.relative_to(images)
        image = cv2.imread(str(file), cv2.IMREAD_COLOR)
        if image is None:
            raise OSError(f'{file} is no image that can be decoded')
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(target), add_fog(image, density, zlib.crc32(name.as_posix().encode()))):
            raise OSError(f'could not write {target}: check the free space and the permissions')
    return len(files)
