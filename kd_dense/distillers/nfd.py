"""Normalised feature distillation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kd_dense.context import Context
from kd_dense.distillers.base import TapConfig
from kd_dense.distillers.feature_mimic import FeatureDistiller, mask_for
from kd_dense.errors import ConfigError
from kd_dense.losses import normalized_mse
from kd_dense.losses.feature import AXES
from kd_dense.registry import DISTILLERS


@DISTILLERS.register_module()
class NFD(FeatureDistiller):
    """Match feature maps after standardising every channel of every image over its positions.

    ``L = mean over B, C, h, w of (Fbar_T - Fbar_S)^2`` summed over the layers, ``Fbar = (F - mu) / sqrt(var + eps)``
    with mean and biased variance over ``axes``. Zero for equal patterns, about 2 for unrelated ones, 4 for opposite
    ones; without ``eps`` it equals ``2 (1 - mean Pearson correlation)``. The scale and the offset of the teacher's
    activations do not matter.

    Source: Liu et al., "Normalized Feature Distillation for Semantic Segmentation", arXiv 2207.05256. The
    standardisation over (H, W) and the L2 distance are confirmed second-hand; the reduction (a mean), ``eps``, the
    absence of a bias, norm and activation in the connector, the layer (the last backbone stage) and the loss weight are
    UNCONFIRMED and our reading.

    Args:
        taps: ``'backbone:3'`` (default), ``'decode_head.bottleneck'``, ``'neck'``, or ``'logits'`` for the
            parameter-free form.
        axes: ``'hw'`` (the paper), ``'c'``, ``'chw'`` or ``'bhw'``.
        eps: inside the square root; a constant channel is standardised to 0 and gives no gradient.
        connector: default a 1x1 convolution without bias where the widths differ: the mean is taken away, so a bias can
            not matter and its gradient is exactly 0.
        use_mask: leave padding and ignored pixels out of the statistics and of the mean.
    """

    default_loss_weight = 3.0

    def __init__(
        self,
        taps: TapConfig = 'backbone:3',
        axes: str = 'hw',
        eps: float = 1e-5,
        connector: Mapping | str | None = None,
        use_mask: bool = True,
    ) -> None:
        super().__init__(taps, connector, bias=False)
        if axes not in AXES:
            raise ConfigError(f'axes must be one of {list(AXES)}, not {axes!r}')
        self.axes, self.eps, self.use_mask = axes, eps, use_mask

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = [
            normalized_mse(s, t, self.axes, self.eps, mask_for(s, context, self.use_mask))
            for s, t in self.levels(student, teacher)
        ]
        return {'loss': sum(losses)}
