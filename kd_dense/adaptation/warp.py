"""From one view of an image to another: the maps of pixels that MMDetection's transforms keep as ``homography_matrix``.

A matrix ``[3, 3]`` takes ``(x, y, 1)`` in pixels of the original image to those of a view, with ``x = 0`` at the left
edge of the first pixel and ``x = W`` at the right edge of the last.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

#: One matrix ``[3, 3]`` or one for each image ``[B, 3, 3]``.
Matrices = np.ndarray | Tensor


def between_views(first: Matrices, second: Matrices) -> np.ndarray:
    """The matrix from pixels of the first view to pixels of the second, ``second @ first^-1``, in float64.

    Args:
        first, second: from the original image to each view, on the host, where data pipelines leave them.

    Raises:
        ValueError: the first view can not be undone.
    """
    first, second = (np.asarray(m, dtype=np.float64) for m in (first, second))
    try:
        return second @ np.linalg.inv(first)
    except np.linalg.LinAlgError:
        raise ValueError('a view whose homography_matrix is singular shows nothing that could be transferred') from None


def project(points: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``[..., 2]`` through ``matrix`` ``[..., 3, 3]``: ``x, y`` and whether they lie in front of the camera."""
    moved = points @ matrix[..., :2].transpose(-1, -2) + matrix[..., None, :, 2]
    depth = moved[..., 2:]
    return moved[..., :2] / depth, depth[..., 0] > 0
