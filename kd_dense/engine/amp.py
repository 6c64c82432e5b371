"""Mixed precision, also without a GPU, where MMEngine's optimizer wrapper refuses to work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import nn

from kd_dense.errors import ConfigError
from kd_dense.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on a CPU: forward passes under autocast to bfloat16, everything else in fp32.

    Stands in for MMEngine's ``AmpOptimWrapper``, which asserts that there is a GPU. bfloat16 has the range of fp32, so
    no loss is scaled.

    Args:
        **kwargs: as for MMEngine's ``OptimWrapper``: ``optimizer``, ``accumulative_counts``, ``clip_grad``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and no gradient synchronisation while gradients are accumulated."""
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


def set_precision(cfg: Config, amp: bool) -> None:
    """Write the optimizer wrapper into ``cfg`` that trains with mixed precision on this machine.

    Args:
        amp: ``True``: asked for by ``--amp``; ``False``: only where the config names MMEngine's ``AmpOptimWrapper``.

    Raises:
        ConfigError: a device that can not do it, or an optimizer wrapper that is neither plain nor MMEngine's.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kind = str(wrapper.get('type', 'OptimWrapper')).rpartition('.')[2]
    if not amp and kind != 'AmpOptimWrapper':
        return
    device = get_device()
    if device == 'mps':
        raise ConfigError('optim_wrapper: MMEngine has no mixed precision for mps; train without it')
    if kind not in ('OptimWrapper', 'AmpOptimWrapper', 'CPUAmpOptimWrapper'):
        raise ConfigError(f'--amp: optim_wrapper.type is {kind}, which can not be replaced; choose the precision there')
    if device == 'cpu':
        ignored = [f'{k}={wrapper.pop(k)!r}' for k in ('loss_scale', 'dtype', 'use_fsdp') if k in wrapper]
        wrapper.type = 'kd_dense.CPUAmpOptimWrapper'
        note = f'; ignored: {", ".join(ignored)}' if ignored else ''
        print_log(f'mixed precision on a CPU: autocast to bfloat16{note}', 'current')
    else:
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
