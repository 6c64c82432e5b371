"""Convolutional connectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from kd_dense.registry import CONNECTORS, build, lookup


@CONNECTORS.register_module()
class Conv1x1(nn.Conv2d):
    """One 1x1 convolution ``[B, C_in, h, w] -> [B, C_out, h, w]``, PyTorch's default initialisation."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)


@CONNECTORS.register_module()
class ConvReLUConv(nn.Sequential):
    """1x1 convolution, ReLU, 1x1 convolution in the teacher's width: ``[B, C_in, h, w] -> [B, C_out, h, w]``.

    The projector of Ultralytics' ``distill_model`` (version 8.4): both convolutions with bias, no norm.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 1),
        )


def build_connector(
    cfg: Mapping | str | None,
    in_channels: int | Sequence[int],
    out_channels: int | Sequence[int],
    key: str,
    bias: bool = True,
) -> nn.Module:
    """The connector of one pair of maps.

    Args:
        cfg: type name or dict of a registered connector, without its channels. ``None``: :class:`Conv1x1` where the
            widths differ, and nothing (identity) where they agree.
        in_channels, out_channels: of the maps; of the maps of all levels for one that :func:`joins_levels`.
        key: config key named in errors.
        bias: of that default convolution.
    """
    if cfg is None:
        return nn.Identity() if in_channels == out_channels else Conv1x1(in_channels, out_channels, bias)
    return build(CONNECTORS, cfg, key, in_channels=in_channels, out_channels=out_channels)


def joins_levels(cfg: Mapping | str | None, key: str) -> bool:
    """Does this connector take the maps of all levels at once, and so the widths of all levels?"""
    kind = cfg.get('type') if isinstance(cfg, Mapping) else cfg
    return kind is not None and getattr(lookup(CONNECTORS, kind, key), 'joint', False)
