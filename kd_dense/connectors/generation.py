"""Makes a teacher's map out of what is left of a student's."""

from __future__ import annotations

from torch import nn


class Generation(nn.Sequential):
    """3x3 convolution, ReLU, 3x3 convolution in the teacher's width: ``[B, C, h, w] -> [B, C, h, w]``.

    The generation layer of MGD's public code: both convolutions with bias, PyTorch's default initialisation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
