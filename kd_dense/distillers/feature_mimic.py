"""Feature imitation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kd_dense.connectors import as_map, build_connector, joins_levels, match_size
from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, describe, paired_shapes
from kd_dense.errors import ConfigError
from kd_dense.registry import DISTILLERS, LOSSES, lookup


class FeatureDistiller(Distiller):
    """Common part of the methods that compare feature maps level by level after a connector on the student.

    Args:
        taps: feature maps, tokens or vectors; see :class:`~kd_dense.taps.Taps`.
        connector: a registered connector, one per level, or one that joins all levels (``'CSF'``); ``None``: a 1x1
            convolution where the widths differ.
        bias: of that 1x1 convolution.
    """

    def __init__(self, taps: TapConfig, connector: Mapping | str | None = None, bias: bool = True) -> None:
        super().__init__()
        self.taps = {'features': TapPair.parse(taps)}
        self._connector, self._bias, self._joint = connector, bias, False
        self.connectors = nn.ModuleList()

    def setup(self, student: Probe, teacher: Probe) -> None:
        widths = []
        for s, t in paired_shapes(student, teacher, 'features'):
            if len(s) != len(t) or (len(s) == 3 and s[1] != t[1]):
                raise ConfigError(
                    f'taps: {describe(student, "features")} (student) and {describe(teacher, "features")} (teacher) do '
                    'not go together: maps go with maps, and tokens with as many tokens, as their places in the image '
                    'are not known'
                )
            widths.append((_width(s), _width(t)))
        self._joint = joins_levels(self._connector, 'connector')
        if self._joint:
            widths = [tuple(zip(*widths, strict=True))]
        for s, t in widths:
            self.connectors.append(build_connector(self._connector, s, t, 'connector', self._bias))

    def levels(self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Per level: the connected student map and the teacher map resized to it, both ``[B, C_T, h, w]``."""
        maps = [as_map(s) for s in student['features']]
        if self._joint:
            maps = self.connectors[0](maps)
        else:
            maps = [connector(s) for s, connector in zip(maps, self.connectors, strict=True)]
        return [(s, match_size(as_map(t), s)) for s, t in zip(maps, teacher['features'], strict=True)]


@DISTILLERS.register_module()
class FeatureMimic(FeatureDistiller):
    """Make the student's feature maps equal to the teacher's: ``mean over levels of loss(connector(F_S), F_T)``.

    The hint loss of FitNets (Romero et al., ICLR 2015, equation 3) on any number of levels, with a mask: padding, and
    in segmentation ignored pixels, do not count.

    Args:
        taps: for example ``'neck'`` (all FPN levels) or ``['backbone:2', 'backbone:3']``.
        connector: see :class:`FeatureDistiller`.
        loss: ``'mse'``, ``'l1'``, ``'cosine'`` or ``'hcl'``.
        use_mask: leave padding and ignored pixels out.
    """

    def __init__(
        self, taps: TapConfig, connector: Mapping | str | None = None, loss: str = 'mse', use_mask: bool = True
    ) -> None:
        super().__init__(taps, connector)
        self.loss = lookup(LOSSES, loss, 'loss')
        self.use_mask = use_mask

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = [self.loss(s, t, mask_for(s, context, self.use_mask)) for s, t in self.levels(student, teacher)]
        return {'loss': sum(losses) / len(losses)}


def mask_for(x: Tensor, context: Context, use_mask: bool = True) -> Tensor | None:
    """The mask of ``x`` ``[B, C, h, w]``; none for tokens and vectors, whose place in the image is not known."""
    return context.mask(x.shape[2:]) if use_mask and x.shape[3] > 1 else None


def _width(shape: tuple[int, ...]) -> int:
    """Channels of a map ``[B, C, h, w]``, of tokens ``[B, N, C]`` or of a vector ``[B, C]``."""
    return shape[1] if len(shape) == 4 else shape[-1]
