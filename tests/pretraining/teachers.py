"""Classifiers that a config can name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 150


def small(classes: int = CLASSES) -> nn.Module:
    """Sees colours and edges."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )


def saved(path: str, seed: int = 0) -> str:
    """Weights of :func:`small` with outputs that differ from image to image."""
    torch.manual_seed(seed)
    model = small()
    nn.init.normal_(model[4].weight, std=4.0)
    torch.save(model.state_dict(), path)
    return str(path)


def maps(classes: int = CLASSES) -> nn.Module:
    """No classifier: logits of every position."""
    model = small(classes)
    return nn.Sequential(model, _Twice())


class _Twice(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return torch.stack([logits, logits], 2)


def number() -> int:
    """No model at all."""
    return 1


def broken() -> nn.Module:
    """Can not be built."""
    raise RuntimeError('no such variant')
