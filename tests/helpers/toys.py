"""Small models with stages, a neck of two levels and a head shared by them, described as an adapter would."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kd_dense.context import Context
from kd_dense.description import Description, Logits, Probe
from kd_dense.distillers import Distiller


class Neck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(width, width, 1), nn.Conv2d(2 * width, width, 1)])

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(conv(x) for conv, x in zip(self.lateral, maps, strict=True))


class Toy(nn.Module):
    """Strides 2 and 4; ``width`` channels in the neck; ``anchors * classes`` logits per cell."""

    def __init__(self, width: int, classes: int = 3, anchors: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stage2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.neck = Neck(width)
        self.head = nn.Conv2d(width, anchors * classes, 1)
        self.classes = classes

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.stage1(images)
        return [self.head(x) for x in self.neck([first, self.stage2(first)])]

    def loss(self, images: Tensor) -> Tensor:
        """Stands for the loss of the task."""
        return sum((x - 1).square().mean() for x in self(images))


def describe(
    model: Toy, activation: str = 'softmax', size: tuple[int, int] = (16, 24), **logits: object
) -> Description:
    def run() -> tuple[int, int]:
        model(torch.zeros(1, 3, *size, dtype=next(model.parameters()).dtype))
        return size

    aliases = {'logits': ['head'], 'branch_logits': ['head'], 'backbone': ['stage1', 'stage2']}
    return Description(model, run, aliases, Logits(model.classes, activation, **logits))


def probe(role: str, *shapes: tuple[int, ...], canvas: tuple[int, int] = (16, 24), logits: Logits | str = '') -> Probe:
    return Probe({role: [torch.Size(s) for s in shapes]}, {role: (role,)}, canvas, logits)


def ready(
    method: Distiller, role: str, student: list[Tensor], teacher: list[Tensor], logits: Logits | str = ''
) -> Distiller:
    """``method`` after its setup for tensors like these."""
    method.setup(*(probe(role, *(tuple(x.shape) for x in side), logits=logits) for side in (student, teacher)))
    return method.double()


def nothing_masked(canvas: tuple[int, int] = (16, 24)) -> Context:
    return Context(canvas=canvas)


def convolved(x: Tensor, conv: nn.Conv2d) -> np.ndarray:
    """A 1x1 convolution by a sum over channels, in float64."""
    weight = conv.weight.detach().double().numpy()[:, :, 0, 0]
    out = np.einsum('oc,bchw->bohw', weight, x.detach().double().numpy())
    return out if conv.bias is None else out + conv.bias.detach().double().numpy()[:, None, None]


def resized(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, corners not aligned, by the textbook: sample at ``(i + 0.5) * scale - 0.5``, edges repeated."""
    out = x
    for axis, wanted in zip((2, 3), size, strict=True):
        have = out.shape[axis]
        at = np.clip((np.arange(wanted) + 0.5) * have / wanted - 0.5, 0, None)
        low = np.minimum(np.floor(at).astype(int), have - 1)
        high = np.minimum(low + 1, have - 1)
        part = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
        out = out.take(low, axis) * (1 - part) + out.take(high, axis) * part
    return out
