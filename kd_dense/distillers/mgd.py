"""Masked generative distillation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_dense.connectors.generation import Generation
from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.distillers.base import TapConfig, paired_shapes
from kd_dense.distillers.box_guided_mimic import only_maps
from kd_dense.distillers.feature_mimic import FeatureDistiller, mask_for
from kd_dense.errors import ConfigError
from kd_dense.losses import mse
from kd_dense.losses.focal import squared_error
from kd_dense.random_state import step_seed
from kd_dense.registry import DISTILLERS

#: Reduction -> default loss weight.
REDUCTIONS = {'sum': 2e-5, 'mean': 1.0}


@DISTILLERS.register_module()
class MGD(FeatureDistiller):
    """Generate the teacher's map from a student's of which random positions are erased.

    ``L = sum_{b,c,x} (T - G(S M))^2 / B`` summed over the levels: ``S`` the connected student map, ``M`` 0 with
    probability ``mask_ratio`` at each position of each image and level but 1 at one of them at least, drawn anew in
    every step, the same for all channels; ``G`` a 3x3 convolution, ReLU and a 3x3 convolution
    (:class:`~kd_dense.connectors.generation.Generation`), trained with the student and then discarded.

    Source: Yang et al., "Masked Generative Distillation", ECCV 2022, and the authors' public code. Loss weight and
    ``mask_ratio`` in its configs: 2e-5 and 0.65 for RetinaNet and RepPoints (all FPN levels) and SOLO (the four
    finest); 5e-7 and 0.45 for Faster and Mask R-CNN (the four finest); 2e-5 and 0.75 for segmentation (the last
    backbone stage of PSPNet and DeepLabV3). The weights are for sums over channels and positions: they depend on the
    size of the images, and fine levels count for more. With ``reduction='mean'`` the loss of each level is a mean of
    squares, so that levels count alike and a loss weight holds for images of any size; this is ours, as is its default
    weight of 1. For a level of ``[256, 100, 168]`` the sum at 2e-5 is the mean at 86. That padding does not count, and
    that a map of a few cells is never erased altogether, is ours too.

    The random numbers are drawn on the device, by a generator of their own whose seed follows from the iteration: a run
    that is resumed draws what it would have drawn, and the student's own random numbers stay those of a run without
    this. The authors' code draws them on the host, and copies them.

    Args:
        taps: FPN levels, or a backbone stage such as ``'backbone:3'``.
        mask_ratio: share of the positions that are erased, 0..1, 1 excluded; 0 leaves a student map and a generator.
        reduction: ``'sum'`` or ``'mean'``, see above.
        connector: see :class:`FeatureDistiller`; default a 1x1 convolution where the widths differ, as in the code.
        use_mask: leave padding and ignored pixels out.
        seed: of the random positions.
    """

    default_loss_weight = REDUCTIONS['sum']

    def __init__(
        self,
        taps: TapConfig = 'neck',
        mask_ratio: float = 0.65,
        reduction: str = 'sum',
        connector: Mapping | str | None = None,
        use_mask: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(taps, connector)
        if not isinstance(mask_ratio, (int, float)) or not 0 <= mask_ratio < 1:
            raise ConfigError(f'mask_ratio must lie in 0..1, 1 excluded, not {mask_ratio!r}')
        if reduction not in REDUCTIONS:
            raise ConfigError(f'reduction must be one of {list(REDUCTIONS)}, not {reduction!r}')
        self.mask_ratio, self.reduction, self.use_mask, self.seed = mask_ratio, reduction, use_mask, seed
        self.default_loss_weight = REDUCTIONS[reduction]
        self.generators = nn.ModuleList()

    def setup(self, student: Probe, teacher: Probe) -> None:
        shapes = paired_shapes(student, teacher, 'features')
        only_maps(shapes, student, 'MGD')
        super().setup(student, teacher)
        self.generators.extend(Generation(t[1]) for _, t in shapes)

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = []
        levels = self.levels(student, teacher)
        random = torch.Generator(levels[0][0].device).manual_seed(step_seed(self.seed, context.iteration))
        for (s, t), generator in zip(levels, self.generators, strict=True):
            generated, mask = generator(s * self._kept(s, random)), mask_for(s, context, self.use_mask)
            if self.reduction == 'mean':
                losses.append(mse(generated, t, mask))
            else:
                losses.append(squared_error(generated, t, mask=mask))
        return {'loss': sum(losses)}

    def _kept(self, x: Tensor, random: torch.Generator) -> Tensor:
        """Boolean ``[B, 1, h, w]``."""
        drawn = torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device, generator=random)
        return (drawn >= self.mask_ratio) | (drawn == drawn.amax((2, 3), keepdim=True))
