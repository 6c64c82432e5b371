"""Query, key and value of the attention modules of PyTorch, mmcv and Swin.

None of them returns its projections, and PyTorch's may run as one fused operation that never makes them visible. They
are computed again from what the module was called with: one linear layer, against a whole transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kd_dense.errors import ConfigError


def is_attention(module: nn.Module) -> bool:
    """Can :func:`qkv` read this module?"""
    return isinstance(module, nn.MultiheadAttention) or _is_window(module)


def _is_window(module: nn.Module) -> bool:
    """The window attention of a Swin transformer, in MMSegmentation and MMDetection (``w_msa``)."""
    wanted = ('qkv', 'num_heads', 'window_size', 'relative_position_bias_table', 'relative_position_index')
    return isinstance(getattr(module, 'qkv', None), nn.Linear) and all(hasattr(module, name) for name in wanted)


def qkv(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Query, key and value that ``module`` computes when called with ``args`` and ``kwargs``.

    Returns:
        ``q`` ``[B, h, N, d]``, ``k`` and ``v`` ``[B, h, M, d]`` of ``h`` heads, before the scores are scaled by
        ``d^-0.5``. Window attention has ``B * windows`` in place of ``B``, and as a fourth tensor its position bias
        ``[1, h, N, N]``, which is added to the scaled scores.

    Raises:
        ConfigError: a module that is no such attention, or a call with a mask or extra keys.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module, *args, **kwargs)
    if _is_window(module):
        return _window(module, *args, **kwargs)
    raise ConfigError(f'{type(module).__name__} has no query, key and value that kd_dense knows how to read')


def _multihead(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **_: Any,
) -> list[Tensor]:
    if attn_mask is not None or key_padding_mask is not None or module.bias_k is not None or module.add_zero_attn:
        raise ConfigError('this attention is masked or has extra keys; tap one in which every token attends to all')
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    tensors = query, key, value
    if not module.batch_first:
        tensors = tuple(x.transpose(0, 1) for x in tensors)
    projected = (F.linear(x, w, b) for x, w, b in zip(tensors, weights, biases, strict=True))
    return [heads_of(x, module.num_heads) for x in projected]


def _window(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    if mask is not None:
        raise ConfigError(
            'this block of the Swin transformer shifts its windows; tap one that does not (an even index)'
        )
    q, k, v = (heads_of(part, module.num_heads) for part in module.qkv(x).chunk(3, dim=-1))
    bias = module.relative_position_bias_table[module.relative_position_index]  # [N, N, h]
    return [q, k, v, bias.permute(2, 0, 1)[None]]


def heads_of(tokens: Tensor, heads: int) -> Tensor:
    """``[B, N, C] -> [B, h, N, C / h]``."""
    b, n, c = tokens.shape
    return tokens.reshape(b, n, heads, c // heads).transpose(1, 2)
