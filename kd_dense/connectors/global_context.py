"""The relation of a map to itself as a whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GlobalContext(nn.Module):
    """What a global context block adds to every cell of a map: ``[B, C, h, w] -> [B, C, 1, 1]``.

    ``W_2 ReLU(LN(W_1 sum_x softmax_x(w . F_x) F_x))``: one weighted mean over the cells, through two linear layers with
    a layer norm over ``C / 2`` channels between them. The block itself is ``F`` plus this.

    Source: Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCV workshops 2019,
    with the bottleneck of ``C / 2`` of FGD's public code. That code lets ``W_2`` begin at 0, which leaves everything
    before it without a gradient in the first step; here it begins with a standard deviation of 0.001. ``w`` has no
    bias: the softmax takes it away.

    Args:
        channels: ``C``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.where = nn.Conv2d(channels, 1, 1, bias=False)
        self.squeeze = nn.Linear(channels, hidden)
        self.ln = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.kaiming_normal_(self.where.weight)
        nn.init.normal_(self.expand.weight, std=1e-3)
        nn.init.zeros_(self.expand.bias)
        self._single = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask``: boolean ``[B, 1, h, w]``, cells of which the mean is taken; all of them when ``None``."""
        self._single = x.shape[2] * x.shape[3] == 1
        # As a product of matrices: backends of convolutions are slow where there is one output channel.
        where = self.where.weight.flatten(1).expand(len(x), 1, -1)
        scores = where @ x.flatten(2)
        if mask is not None:
            x = torch.where(mask, x, x.new_zeros(()))
            # the lowest finite number, not -inf: an image without any cell that counts must not become NaN
            scores = scores.masked_fill(~mask.flatten(2), torch.finfo(scores.dtype).min)
        shares = scores.softmax(2).to(x.dtype)
        mean = (x.flatten(2) @ shares.transpose(1, 2)).squeeze(2)
        return self.expand(self.ln(self.squeeze(mean)).relu())[..., None, None]

    def idle_parameters(self) -> list[nn.Parameter]:
        """On a map of one cell there is no choice of where to look."""
        return list(self.where.parameters()) if self._single else []
