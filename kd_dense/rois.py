"""The regions that a RoI extractor is called with.

A two-stage detector samples its regions inside its training forward and keeps them to itself; what its RoI head returns
does not say where it looked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_roi_extractor(module: nn.Module) -> bool:
    """Can :func:`rois` read this module? It is one of MMDetection's RoI extractors, or built like them."""
    return isinstance(getattr(module, 'roi_layers', None), nn.ModuleList) and hasattr(module, 'featmap_strides')


def rois(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """``[R, 5]`` index of the image in the batch, and ``x1, y1, x2, y2`` in canvas pixels, of a call of ``module``."""
    return _regions(*args, **kwargs)


def _regions(feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
    return rois
