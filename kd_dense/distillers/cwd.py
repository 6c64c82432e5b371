"""Channel-wise divergence."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kd_dense.context import Context
from kd_dense.distillers.base import TapConfig
from kd_dense.distillers.feature_mimic import FeatureDistiller, mask_for
from kd_dense.errors import ConfigError
from kd_dense.losses import channel_kl
from kd_dense.registry import DISTILLERS


@DISTILLERS.register_module()
class CWD(FeatureDistiller):
    """Match where each channel looks: KL between the softmax over positions of every channel, ``T^2 / C`` per image.

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, equations 3 and 4. The
    paper uses it on logits (temperature 4, weight 3) and on features (weight 50) in segmentation. The mean over several
    levels, and masks, are ours: the paper taps one map and does not speak of padding or ignored pixels.

    Args:
        taps: ``'logits'`` (default) or feature maps such as ``'neck'``.
        temperature: of the softmax, > 0; higher spreads the attention over more positions.
        connector: default a 1x1 convolution without bias where the widths differ: the softmax over positions takes a
            constant of a channel away, so a bias can not matter.
        use_mask: leave padding and ignored pixels out.
    """

    default_loss_weight = 3.0

    def __init__(
        self,
        taps: TapConfig = 'logits',
        temperature: float = 4.0,
        connector: Mapping | str | None = None,
        use_mask: bool = True,
    ) -> None:
        super().__init__(taps, connector, bias=False)
        self.temperature = positive(temperature, 'temperature')
        self.use_mask = use_mask

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = [
            channel_kl(s, t, self.temperature, mask_for(s, context, self.use_mask))
            for s, t in self.levels(student, teacher)
        ]
        return {'loss': sum(losses) / len(losses)}


def positive(value: float, name: str) -> float:
    """``value`` if it is a number > 0, else :class:`ConfigError`."""
    if not isinstance(value, (int, float)) or not 0 < value < float('inf'):
        raise ConfigError(f'{name} must be a finite number > 0, not {value!r}')
    return float(value)


def not_negative(value: float, name: str) -> float:
    """``value`` if it is a number >= 0, else :class:`ConfigError`."""
    if not isinstance(value, (int, float)) or not 0 <= value < float('inf'):
        raise ConfigError(f'{name} must be a finite number >= 0, not {value!r}')
    return float(value)
