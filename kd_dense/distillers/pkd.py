"""Feature imitation by Pearson correlation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kd_dense.context import Context
from kd_dense.distillers.base import TapConfig
from kd_dense.distillers.cwd import positive
from kd_dense.distillers.feature_mimic import FeatureDistiller, mask_for
from kd_dense.losses import normalized_mse
from kd_dense.registry import DISTILLERS


@DISTILLERS.register_module()
class PKD(FeatureDistiller):
    """Correlate each channel of the student's FPN maps with the teacher's, over all positions of the batch.

    ``L = 1/2 mean over B, C, h, w of (Fbar_T - Fbar_S)^2`` summed over the levels, with
    ``Fbar = (F - mu) / sqrt(var + eps)``, mean and variance of each channel over the batch and its positions. Without
    ``eps`` it equals ``1 - mean over channels of r``, Pearson's correlation: 0 for equal patterns, about 1 for
    unrelated ones, 2 for opposite ones, whatever the magnitude of the features of a level, a channel or a detector
    family.

    It is :class:`~kd_dense.distillers.nfd.NFD` with the statistics of the batch in place of those of each image, so
    that differences between images count too, and a factor of 1/2; for one image it is half of NFD.

    Source: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022, and its code in MMRazor, ``PKDLoss``. Where this differs from the code:

    * the code takes the unbiased deviation, which multiplies the loss of a level by ``(n - 1) / n``, ``n = B h w``, and
      adds 1e-6 to the deviation; here the variance is biased and ``eps`` is added to it, which bounds the gradient of a
      nearly constant channel;
    * padding does not count, neither in the statistics nor in the mean;
    * levels of different size: the teacher's is resized to the student's, in the code (by default) the student's to the
      teacher's;
    * a student of another width gets a connector; the pairs of the paper are all of one width.

    MMRazor's configs weigh each of the four finest FPN levels by 6 (Faster R-CNN R101 -> R50, Mask R-CNN Swin-S ->
    RetinaNet R50) or by 10 (RetinaNet X101 and FCOS X101 -> RetinaNet R50); ``taps=['neck:0', ..., 'neck:3']``
    reproduces their choice of levels. In distributed training the statistics are those of each process.

    Args:
        taps: the FPN levels.
        eps: inside the square root, > 0; a channel of a deviation well below its root, 1e-4, gives no gradient.
        connector: default a 1x1 convolution without bias where the widths differ: the mean is taken away, so a bias can
            not matter.
        use_mask: leave padding and ignored pixels out of the statistics and of the mean.
    """

    default_loss_weight = 6.0

    def __init__(
        self,
        taps: TapConfig = 'neck',
        eps: float = 1e-8,
        connector: Mapping | str | None = None,
        use_mask: bool = True,
    ) -> None:
        super().__init__(taps, connector, bias=False)
        self.eps, self.use_mask = positive(eps, 'eps'), use_mask

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = [
            normalized_mse(s, t, 'bhw', self.eps, mask_for(s, context, self.use_mask))
            for s, t in self.levels(student, teacher)
        ]
        return {'loss': sum(losses) / 2}
