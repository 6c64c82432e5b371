"""Encoder and decoder of dynamic prior knowledge: from a student's map with parts of the teacher's to the teacher's.

Names of parameters avoid ``norm`` and ``head``; see :mod:`kd_dense.connectors.transkd`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dense.errors import ConfigError

#: Where tokens of the teacher may take the place of tokens of the student.
STITCHES = ('before_encoder', 'after_encoder')


class PriorReconstruction(nn.Module):
    """Replace some of the student's tokens by the teacher's, and reconstruct the teacher's whole map from the mixture.

    ::

        z_S = Embed_S(LN(F_S)) + PE,  z_T = Embed_T(LN(F_T)) + PE    one token for each patch of cells
        z_n = z_T,n where replaced, else z_S,n
        F   = Unpatch(Linear(LN(Dec(Enc(z)))))

    ``Embed`` is a convolution without bias whose kernel and stride are the patch, ``PE`` a fixed sine-cosine code of
    row and column, ``Enc`` and ``Dec`` are pre-norm transformer blocks. Maps whose size the patch does not divide are
    filled up with 0 at the right and the bottom, and cut off again.

    Args:
        in_channels, out_channels: ``C_S`` and ``C_T``.
        patch: cells per side of a token.
        width: ``D`` of a token, a multiple of 4 and of ``heads``.
        depth: blocks of the encoder and of the decoder.
        heads: of the attention.
        stitch: ``'before_encoder'``; ``'after_encoder'``: each side has an encoder of its own, and encoded tokens are
            replaced.

    Raises:
        ConfigError: a width that does not divide, or another ``stitch``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch: int = 1,
        width: int = 128,
        depth: Sequence[int] = (2, 2),
        heads: int = 4,
        stitch: str = 'before_encoder',
    ) -> None:
        super().__init__()
        if width % heads or width % 4:
            raise ConfigError(f'width: {width} must be a multiple of 4 and of the {heads} heads')
        if stitch not in STITCHES:
            raise ConfigError(f'stitch must be one of {list(STITCHES)}, not {stitch!r}')
        self.patch, self.stitch = patch, stitch
        self.ln_student, self.ln_teacher = ChannelNorm(in_channels), ChannelNorm(out_channels)
        self.embed_student = nn.Conv2d(in_channels, width, patch, patch, bias=False)
        self.embed_teacher = nn.Conv2d(out_channels, width, patch, patch, bias=False)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(width, heads) for _ in range(count))

        self.encoder, self.decoder = blocks(depth[0]), blocks(depth[1])
        self.encoder_teacher = blocks(depth[0]) if stitch == 'after_encoder' else None
        self.ln_out, self.output = nn.LayerNorm(width), nn.Linear(width, patch * patch * out_channels)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, student: Tensor, teacher: Tensor, replaced: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, C_S, h, w]`` and ``[B, C_T, h, w] -> [B, C_T, h, w]``.

        Args:
            replaced: boolean ``[B, N]``, tokens that come from the teacher; ``N`` as :meth:`grid` says.
            mask: boolean ``[B, N]``, tokens that others may look at; all of them when ``None``.
        """
        height, width = student.shape[2:]
        keys = None if mask is None else (mask | ~mask.any(1, keepdim=True))[:, None, None]  # softmax of nothing is NaN
        x = self.hybrid(*self.tokens(student, teacher), replaced, keys)
        x = self.output(self.ln_out(_through(self.decoder, x, keys)))
        x = x.transpose(1, 2).unflatten(2, self.grid((height, width)))
        return F.pixel_shuffle(x, self.patch)[..., :height, :width]

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of tokens of a map of ``size`` cells."""
        return -(-int(size[0]) // self.patch), -(-int(size[1]) // self.patch)

    def tokens(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded tokens of both sides, ``[B, N, D]``."""
        sides = ((student, self.ln_student, self.embed_student), (teacher, self.ln_teacher, self.embed_teacher))
        return tuple(self._embedded(x, ln, embed) for x, ln, embed in sides)

    def _embedded(self, x: Tensor, ln: nn.Module, embed: nn.Module) -> Tensor:
        height, width = x.shape[2:]
        x = ln(x)
        if height % self.patch or width % self.patch:
            x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        x = embed(x)
        return x.flatten(2).transpose(1, 2) + self.position(x)

    @staticmethod
    def position(x: Tensor) -> Tensor:
        """The code of each token of ``x`` ``[B, D, h, w]``: ``[h * w, D]``."""
        return position_code(x.shape[2], x.shape[3], x.shape[1], x.device).to(x.dtype)

    def hybrid(self, student: Tensor, teacher: Tensor, replaced: Tensor, keys: Tensor | None = None) -> Tensor:
        """The encoded mixture of the tokens of both sides: ``[B, N, D]``."""
        if self.encoder_teacher is None:
            return _through(self.encoder, mixed(student, teacher, replaced), keys)
        student, teacher = _through(self.encoder, student, keys), _through(self.encoder_teacher, teacher, keys)
        return mixed(student, teacher, replaced)

    def side(self, name: str) -> list[nn.Parameter]:
        """Parameters that only tokens of the ``'student'`` or of the ``'teacher'`` pass through."""
        modules = [getattr(self, f'ln_{name}'), getattr(self, f'embed_{name}')]
        if self.encoder_teacher is not None:
            modules.append(self.encoder if name == 'student' else self.encoder_teacher)
        return [p for module in modules for p in module.parameters()]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map ``[B, C, h, w]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A pre-norm transformer block: attention and a hidden layer of four times the width, ``12 D^2 + 13 D`` parameters.

    Args:
        width: ``D``, a multiple of ``heads``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """``[B, N, D] -> [B, N, D]``; ``keys``: boolean ``[B, 1, 1, N]``, tokens to be looked at."""
        q, k, v = self.qkv(self.ln1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + self.projection(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln2(x))


def mixed(student: Tensor, teacher: Tensor, replaced: Tensor) -> Tensor:
    """Tokens ``[B, N, D]`` of the teacher where ``replaced`` ``[B, N]`` is true, else of the student."""
    return torch.where(replaced[..., None], teacher, student)


def position_code(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed code ``[rows * columns, width]`` of places: sines and cosines of the row, then of the column.

    ``width / 4`` frequencies from 1 down to almost ``1 / 10000``, as in vision transformers.
    """
    frequencies = 10000 ** (-torch.arange(width // 4, device=device) / (width // 4))
    angles = [torch.arange(n, device=device)[:, None] * frequencies for n in (rows, columns)]
    row, column = (torch.cat([a.sin(), a.cos()], 1) for a in angles)
    size = rows, columns, width // 2
    return torch.cat([row[:, None].expand(size), column[None].expand(size)], 2).flatten(0, 1)


def _through(blocks: nn.ModuleList, x: Tensor, keys: Tensor | None) -> Tensor:
    for block in blocks:
        x = block(x, keys)
    return x
