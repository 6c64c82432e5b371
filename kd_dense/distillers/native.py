"""The loss that Ultralytics ships."""

from __future__ import annotations

from torch import Tensor, nn

from kd_dense.connectors import build_connector, match_size
from kd_dense.context import Context
from kd_dense.description import Probe
from kd_dense.distillers.base import Distiller, TapConfig, TapPair, paired_shapes, score_branches
from kd_dense.losses import score_weighted_mse
from kd_dense.registry import DISTILLERS


@DISTILLERS.register_module()
class Native(Distiller):
    """Feature distance weighted by the teacher's class scores: Ultralytics' ``distill_model`` loss (version 8.4).

    ``L = sum over levels of sum_{b,c,x} (proj(F_S) - F_T)^2 s / (C_T sum_{b,x} s)`` with ``s = max over classes of
    sigmoid(z_T)``, the teacher's logits averaged over the one-to-many and the one-to-one branch where it has both, and
    ``proj`` two 1x1 convolutions with a ReLU between them. In Ultralytics the result is multiplied by ``dis`` (6 by
    default), here by ``loss_weight``; the trainer multiplies by the batch size, as for every loss of that toolbox.

    Works wherever there are levels with class logits of their own: Ultralytics and MMDetection's dense heads.

    Args:
        taps: the levels that feed the head.
        scores: the teacher's class logits, one set of levels for each branch that it has.
    """

    default_loss_weight = 6.0

    def __init__(self, taps: TapConfig = 'neck', scores: str = 'branch_logits') -> None:
        super().__init__()
        self.taps = {'features': TapPair.parse(taps), 'scores': TapPair(teacher=(scores,))}
        self.connectors = nn.ModuleList()

    def setup(self, student: Probe, teacher: Probe) -> None:
        pairs = paired_shapes(student, teacher, 'features')
        self._branches = score_branches(teacher, 'Native', 'FeatureMimic')
        for s, t in pairs:
            self.connectors.append(build_connector('ConvReLUConv', s[1], t[1], 'connector'))

    def forward(
        self, student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
    ) -> dict[str, Tensor]:
        losses = []
        for s, t, connector, branches in zip(
            student['features'], teacher['features'], self.connectors, self._branches, strict=True
        ):
            logits = sum(teacher['scores'][i] for i in branches) / len(branches)
            # anchors share a cell: the best of all of them counts
            score = logits.float().sigmoid().amax(1, keepdim=True)
            s = connector(s)
            losses.append(score_weighted_mse(s, match_size(t, s), match_size(score, s)))
        return {'loss': sum(losses)}
