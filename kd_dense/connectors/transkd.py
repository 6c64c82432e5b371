"""The connectors of TransKD.

Names of parameters avoid ``norm`` and ``head``: MMEngine's ``paramwise_cfg.custom_keys`` match parts of names, and the
SegFormer configs give those two other learning rates and weight decays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dense.errors import ConfigError
from kd_dense.registry import CONNECTORS

# -- feature maps ------------------------------------------------------------------------------------------------------


@CONNECTORS.register_module()
class CSF(nn.Module):
    """Cross selective fusion: a top-down chain that blends every stage with the deeper ones by channel attention.

    From the deepest stage to the shallowest: ``u_m = BN(Conv1x1(F_m))`` with ``mid_channels``; the deepest gives
    ``r = u``, every other ``r_m = w1 u_m + w2 upsample(r_{m+1})`` (nearest) with the weights of
    :class:`ChannelSelection`; ``O_m = BN(Conv3x3(r_m))`` in the teacher's width. No activation. What goes up is
    ``r_m``, not ``O_m``.

    It joins all levels of a student, so its widths are lists.

    Args:
        in_channels: ``C_m`` of the student's maps, shallow to deep.
        out_channels: ``C_m`` of the teacher's maps.
        mid_channels: width in which the stages are blended.
        reduction, min_channels: the selection squeezes to ``max(mid_channels / reduction, min_channels)`` channels.
        single_sample_branch: see :class:`ChannelSelection`.

    Raises:
        ConfigError: lists of different length.
    """

    #: One connector for all levels of a distiller, not one for each.
    joint = True

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        mid_channels: int = 64,
        reduction: int = 16,
        min_channels: int = 32,
        single_sample_branch: str = 'fc1',
    ) -> None:
        super().__init__()
        if len(in_channels) != len(out_channels):
            raise ConfigError(
                f'CSF: the width lists differ in length: {len(in_channels)} stages of the student '
                f'({list(in_channels)}), {len(out_channels)} of the teacher ({list(out_channels)})'
            )
        squeezed = max(mid_channels // reduction, min_channels)
        self.squeeze = nn.ModuleList(_conv_bn(c, mid_channels, 1) for c in in_channels)
        self.select = nn.ModuleList(
            ChannelSelection(mid_channels, squeezed, single_sample_branch) for _ in in_channels[:-1]
        )
        self.expand = nn.ModuleList(_conv_bn(mid_channels, c, 3) for c in out_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """``[B, C_m, h_m, w_m]`` of the student, shallow to deep -> the same places in the teacher's widths."""
        stages = list(zip(maps, self.squeeze, self.expand, [*self.select, None], strict=True))
        outputs: list[Tensor] = []
        carried = None
        for x, squeeze, expand, select in reversed(stages):
            x = squeeze(x)
            carried = x if carried is None else select(x, F.interpolate(carried, size=x.shape[2:], mode='nearest'))
            outputs.append(expand(carried))
        return outputs[::-1]


def _conv_bn(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ChannelSelection(nn.Module):
    """Blend two maps with weights that sum to 1 for every sample and channel.

    ``s = mean over positions of (u + y)``; ``z = ReLU(BN(fc(s)))``; the weights are the softmax of the pair
    ``(fcs[0](z), fcs[1](z))``.

    Args:
        channels: of both maps.
        squeezed: channels of ``z``.
        single_sample_branch: a batch norm over one sample and one position has nothing to normalise by.
            ``'fc1'`` (the authors' code): a batch of one goes through a convolution of its own without norm, which
            other batches leave idle, as it leaves ``fc`` idle. ``'shared'``: one branch for every batch, whose
            normalisation (over the channels of each sample) does not depend on the batch.

    Raises:
        ConfigError: another branch.
    """

    def __init__(self, channels: int, squeezed: int, single_sample_branch: str = 'fc1') -> None:
        super().__init__()
        if single_sample_branch not in ('fc1', 'shared'):
            raise ConfigError(f"single_sample_branch must be 'fc1' or 'shared', not {single_sample_branch!r}")
        shared = single_sample_branch == 'shared'
        statistics = nn.GroupNorm(1, squeezed) if shared else nn.BatchNorm2d(squeezed)
        self.fc = nn.Sequential(nn.Conv2d(channels, squeezed, 1, bias=False), statistics)
        self.fc1 = None if shared else nn.Conv2d(channels, squeezed, 1, bias=False)
        self.fcs = nn.ModuleList(nn.Conv2d(squeezed, channels, 1) for _ in range(2))
        self._single = False

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both ``[B, C, h, w]`` -> ``w1 first + w2 second``."""
        # With w2 = 1 - w1, and exact where the two agree.
        return torch.lerp(second, first, self.weights(first, second)[0].to(first.dtype))

    def weights(self, first: Tensor, second: Tensor) -> Tensor:
        """``[2, B, C, 1, 1]``: the weights of both maps."""
        self._single = first.shape[0] == 1
        pooled = first.mean((2, 3), keepdim=True) + second.mean((2, 3), keepdim=True)
        branch = self.fc1 if self._single and self.fc1 is not None else self.fc
        hidden = branch(pooled).relu()
        return torch.stack([fc(hidden) for fc in self.fcs]).softmax(0)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Those of the branch that the last batch did not take."""
        if self.fc1 is None:
            return []
        return list((self.fc if self._single else self.fc1).parameters())


# -- tokens ------------------------------------------------------------------------------------------------------------


@CONNECTORS.register_module()
class PEA(nn.Linear):
    """Patch embedding alignment: one linear map of every token to the teacher's width, no norm, no activation.

    Takes tokens ``[B, N, C_in]`` or maps ``[B, C_in, h, w]``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return super().forward(x)


@CONNECTORS.register_module()
class GLMixer(nn.Module):
    """Global-local mixer: ``g_att * MHSA(E) + g_conv * GLU(E)``, in the width of ``E``.

    ``MHSA`` is self-attention over all tokens (no positional term, norm, dropout or residual; ``qkv`` without bias);
    ``GLU(E) = Conv1d(E) * sigmoid(Conv1d'(E))`` with kernel 3 over the tokens in row-major order, so that the last
    token of a row and the first of the next are neighbours, as in the authors' code.

    Takes tokens ``[B, N, C]`` or maps ``[B, C, h, w]``. As a connector of its own, where the widths differ, a
    :class:`PEA` follows.

    Args:
        in_channels: ``C``, a multiple of ``heads``.
        out_channels: width of the result; ``None``: ``C``.
        heads: of the attention.
        gates: initial ``(g_att, g_conv)``, both learned. The authors' code leaves them uninitialised; 1 and 1 is our
            choice. 0 is refused: the branch behind it would get no gradient in the first step.
        residual: add ``E`` (the authors' option ``add``, off by default).

    Raises:
        ConfigError: ``heads`` does not divide ``C``, or a gate is 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        heads: int = 8,
        gates: Sequence[float] = (1.0, 1.0),
        residual: bool = False,
    ) -> None:
        super().__init__()
        if in_channels % heads:
            raise ConfigError(f'heads: {heads} attention heads do not divide the {in_channels} channels of the student')
        if len(gates) != 2 or not all(gates):
            raise ConfigError(f'gates: needs two numbers other than 0, one for each branch, not {gates!r}')
        self.heads, self.residual = heads, residual
        self.qkv = nn.Linear(in_channels, 3 * in_channels, bias=False)
        self.output = nn.Linear(in_channels, in_channels)
        self.conv = nn.Conv1d(in_channels, in_channels, 3, padding=1)
        self.gate = nn.Conv1d(in_channels, in_channels, 3, padding=1)
        self.attention_weight = nn.Parameter(torch.tensor(float(gates[0])))
        self.conv_weight = nn.Parameter(torch.tensor(float(gates[1])))
        widen = out_channels is not None and out_channels != in_channels
        self.projection = PEA(in_channels, out_channels) if widen else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return as_grid(self(as_tokens(x)), x.shape[2:])
        mixed = self.attention_weight * self.attention(x) + self.conv_weight * self.convolution(x)
        return self.projection(mixed + x if self.residual else mixed)

    def attention(self, x: Tensor) -> Tensor:
        """The branch that sees all tokens: ``[B, N, C] -> [B, N, C]``."""
        # [B, N, 3C] -> three of [B, heads, N, C / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def convolution(self, x: Tensor) -> Tensor:
        """The branch that sees neighbours: ``[B, N, C] -> [B, N, C]``."""
        x = x.transpose(1, 2)
        return (self.conv(x) * self.gate(x).sigmoid()).transpose(1, 2)


@CONNECTORS.register_module()
class EA(nn.Module):
    """Embedding assistant: an overlapping patch embedding of the teacher's width, fed by the student.

    Convolution with bias (kernel ``2 stride - 1``, padding ``stride - 1``: 7/4/3 and 3/2/1 in TransKD) and layer norm
    over the channels: ``[B, C_in, h, w] -> [B, C_out, ceil(h / stride), ceil(w / stride)]``. As a connector of its own
    it compares a student's map with the teacher's of the next stage.

    Args:
        stride: of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 2) -> None:
        super().__init__()
        kernel = 2 * stride - 1
        self.projection = nn.Conv2d(in_channels, out_channels, kernel, stride, stride - 1)
        self.ln = nn.LayerNorm(out_channels)
        nn.init.normal_(self.projection.weight, 0, math.sqrt(2 / (kernel * kernel * out_channels)))
        nn.init.zeros_(self.projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.projection(x).movedim(1, -1)).movedim(-1, 1)


def as_tokens(x: Tensor) -> Tensor:
    """``[B, C, h, w] -> [B, h * w, C]``, row by row; tokens stay as they are."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def as_grid(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """``[B, h * w, C] -> [B, C, h, w]``, the inverse of :func:`as_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))
