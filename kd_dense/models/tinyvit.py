"""TinyViT, a small hybrid transformer, as a backbone for MMSegmentation and MMDetection."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from kd_dense.errors import ConfigError, closest
from kd_dense.registry import MODELS

#: Name -> widths of the four stages, windows of the last three. Depths, head width and expansions are the same in all.
ARCHITECTURES = {
    '5m': ((64, 128, 160, 320), (7, 14, 7)),
    '11m': ((64, 128, 256, 448), (7, 14, 7)),
    '21m': ((96, 192, 384, 576), (7, 14, 7)),
    '21m-384': ((96, 192, 384, 576), (12, 24, 12)),
    '21m-512': ((96, 192, 384, 576), (16, 32, 16)),
}
DEPTHS = (2, 2, 6, 2)
HEAD_WIDTH = 32
EXPANSION = 4


@MODELS.register_module()
class TinyViT(BaseModule):
    """The backbone of Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", ECCV 2022.

    A stem of two convolutions (stride 4), a stage of inverted bottlenecks, and three stages of window attention, each
    with a depthwise convolution between attention and MLP. Between two stages the map is halved and widened.

    Images ``[B, 3, H, W]`` -> a tuple of maps ``[B, D, H/s, W/s]`` (rounded up), ``s`` = 4, 8, 16, 32, one for each of
    ``out_indices``. Any image size will do: in the attention, a map is padded with zeros at the right and at the bottom
    to whole windows, and cut again. Padded positions are attended to, as in the paper's code; only the sizes for which
    a variant was made (224, 384, 512) need none.

    The LayerNorm behind the last stage is part of the backbone: 5 071 764, 10 547 972 and 20 621 568 parameters. Whole
    classifiers take the mean of the positions first. A dense model has no mean, so here the norm is applied to each
    position, as in Swin; ``pool_before_norm=True`` does as the classifiers do.

    Args:
        arch: ``'5m'``, ``'11m'``, ``'21m'``, and ``'21m-384'``, ``'21m-512'`` with larger windows.
        out_indices: stages whose maps are returned, 0 to 3, rising.
        drop_path_rate: of the last block; it rises linearly from 0. The paper's: 0 for distilled pre-training (21m:
            0.1); trained from scratch 0, 0.1 and 0.2.
        pool_before_norm: return the normalised mean of the positions, ``[B, D, 1, 1]``, in place of the last map.
        norm_cfg: of the BatchNorms; ``dict(type='SyncBN')`` on several GPUs with few images each.
        init_cfg: MMEngine's, such as ``dict(type='Pretrained', checkpoint='FILE', prefix='backbone.')``.

    Raises:
        ConfigError: an unknown ``arch`` or stage, or a rate outside of 0..1.
    """

    def __init__(
        self,
        arch: str = '5m',
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        pool_before_norm: bool = False,
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if arch not in ARCHITECTURES:
            raise ConfigError(f'backbone.arch: unknown {arch!r}; {closest(str(arch), ARCHITECTURES)}')
        stages = list(out_indices)
        if not stages or stages != sorted(set(stages)) or not set(stages) <= {0, 1, 2, 3}:
            raise ConfigError(f'backbone.out_indices: must be rising stages of 0 to 3, not {out_indices!r}')
        if not 0 <= drop_path_rate < 1:
            raise ConfigError(f'backbone.drop_path_rate: must be at least 0 and below 1, not {drop_path_rate!r}')
        widths, windows = ARCHITECTURES[arch]
        norm_cfg = dict(norm_cfg or {'type': 'BN'})
        self.out_indices, self.pool_before_norm = tuple(stages), pool_before_norm
        last = sum(DEPTHS) - 1
        rates = iter([drop_path_rate * i / last for i in range(last + 1)])

        self.stem = nn.Sequential(
            _ConvNorm(3, widths[0] // 2, 3, norm_cfg, stride=2),
            nn.GELU(),
            _ConvNorm(widths[0] // 2, widths[0], 3, norm_cfg, stride=2),
        )
        self.stages, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            if i:
                self.downsamples.append(_Downsample(widths[i - 1], width, norm_cfg))
            blocks = [
                _ConvBlock(width, next(rates), norm_cfg)
                if i == 0
                else _AttentionBlock(width, windows[i - 1], next(rates), norm_cfg)
                for _ in range(DEPTHS[i])
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(widths[-1])
        self._initialise()

    def _initialise(self) -> None:
        """As the paper's code: convolutions as PyTorch, BatchNorm and LayerNorm 1 and 0, the rest here."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, _ConvBlock):  # begins as the identity
                nn.init.zeros_(module.project.norm.weight)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``[B, 3, H, W]`` -> the maps of ``out_indices``."""
        x, outputs = self.stem(images), []
        for i in range(self.out_indices[-1] + 1):
            x = self.stages[i](self.downsamples[i - 1](x) if i else x)
            if i in self.out_indices:
                outputs.append(self._normalised(x) if i == len(DEPTHS) - 1 else x)
        return tuple(outputs)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.pool_before_norm:
            x = x.mean((2, 3), keepdim=True)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class _ConvNorm(nn.Sequential):
    """Convolution without bias, and BatchNorm."""

    def __init__(
        self, in_width: int, width: int, kernel: int, norm_cfg: dict, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, width, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = build_norm_layer(norm_cfg, width)[1]


class _ConvBlock(nn.Module):
    """Inverted bottleneck: 1x1 to four times the width, depthwise 3x3, 1x1 back; GELU also behind the sum."""

    def __init__(self, width: int, drop_path: float, norm_cfg: dict) -> None:
        super().__init__()
        hidden = EXPANSION * width
        self.expand = _ConvNorm(width, hidden, 1, norm_cfg)
        self.depthwise = _ConvNorm(hidden, hidden, 3, norm_cfg, groups=hidden)
        self.project = _ConvNorm(hidden, width, 1, norm_cfg)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.depthwise(F.gelu(self.expand(x))))
        return F.gelu(x + self.drop_path(self.project(inner)))


class _Downsample(nn.Module):
    """Half the size, another width: 1x1, depthwise 3x3 of stride 2, 1x1."""

    def __init__(self, in_width: int, width: int, norm_cfg: dict) -> None:
        super().__init__()
        self.widen = _ConvNorm(in_width, width, 1, norm_cfg)
        self.depthwise = _ConvNorm(width, width, 3, norm_cfg, stride=2, groups=width)
        self.project = _ConvNorm(width, width, 1, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.depthwise(F.gelu(self.widen(x)))))


class _AttentionBlock(nn.Module):
    """Window attention; depthwise 3x3 with BatchNorm on the map, without residual; MLP."""

    def __init__(self, width: int, window: int, drop_path: float, norm_cfg: dict) -> None:
        super().__init__()
        self.attention = _WindowAttention(width, window)
        self.local = _ConvNorm(width, width, 3, norm_cfg, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, EXPANSION * width),
            nn.GELU(),
            nn.Linear(EXPANSION * width, width),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(x + self.drop_path(self.attention(x)))
        inner = self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.drop_path(inner)


class _WindowAttention(nn.Module):
    """LayerNorm and self-attention in windows, with a learned bias per head and offset.

    Both directions of an offset have the same bias: it is indexed by ``(|dy|, |dx|)``, ``window ** 2`` of them.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window, self.heads = window, width // HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(self.heads, window**2))
        steps = torch.arange(window)
        distance = (steps[:, None] - steps).abs()
        offsets = distance[:, None, :, None] * window + distance[None, :, None, :]  # [y, x, y', x']
        # in no checkpoint: it follows from the window
        self.register_buffer('offsets', offsets.reshape(window**2, window**2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D, h, w]`` -> the same shape."""
        batch, width, height, breadth = x.shape
        n = self.window
        rows, columns = math.ceil(height / n), math.ceil(breadth / n)
        x = F.pad(x, (0, columns * n - breadth, 0, rows * n - height))
        x = x.reshape(batch, width, rows, n, columns, n).permute(0, 2, 4, 3, 5, 1).reshape(-1, n * n, width)
        qkv = self.qkv(self.norm(x)).reshape(-1, n * n, 3, self.heads, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        bias = self.attention_biases[:, self.offsets].to(qkv.dtype)
        x = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias)  # [windows, heads, n*n, 32]
        x = self.proj(x.transpose(1, 2).reshape(-1, n * n, width))
        x = x.reshape(batch, rows, columns, n, n, width).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, width, rows * n, columns * n)[:, :, :height, :breadth]
