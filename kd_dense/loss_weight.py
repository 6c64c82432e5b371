"""How much a distiller counts: a number, a schedule, or a share of the task gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from kd_dense.errors import ConfigError
from kd_dense.registry import check_arguments


class LossWeight(nn.Module):
    """Weight of one distiller as a function of the training progress.

    Written in a config as a number, as ``'auto'``, or as a dict of the arguments below;
    ``dict(type='auto', share=0.1)`` and ``dict(value='auto', share=0.1)`` are the same.

    Args:
        value: the weight at full strength, or ``'auto'``: calibrated once, in the first iteration in which the
            distiller is active, so that the norm of its gradient at its student taps is ``share`` times that of the
            task loss; then fixed.
        share: the share of the task loss's gradient norm for ``'auto'``.
        start: share of the training (0..1) before which the weight is 0.
        stop: share of the training (0..1) from which on the weight is 0.
        warmup: length of the linear rise from 0 after ``start``, as a share of the training.
        decay: ``'linear'`` or ``'cosine'``: fall from the end of the warm-up to ``end`` at ``stop``; ``None``:
            constant.
        end: share of ``value`` that is left at ``stop`` when ``decay`` is set.
    """

    def __init__(
        self,
        value: float | str = 1.0,
        share: float = 0.1,
        start: float = 0.0,
        stop: float = 1.0,
        warmup: float = 0.0,
        decay: str | None = None,
        end: float = 0.0,
    ) -> None:
        super().__init__()
        if value != 'auto' and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ConfigError(f"must be a finite number >= 0 or 'auto', not {value!r}")
        if not (isinstance(share, (int, float)) and math.isfinite(share) and share > 0):
            raise ConfigError(f'share must be a finite number > 0, not {share!r}')
        for name, number in (('start', start), ('stop', stop), ('warmup', warmup), ('end', end)):
            if not isinstance(number, (int, float)):
                raise ConfigError(f'{name} must be a number, not {number!r}')
        if not 0 <= start < stop <= 1:
            raise ConfigError(f'start and stop are shares of the training, 0 <= start < stop <= 1, not {start}, {stop}')
        if not 0 <= warmup <= stop - start:
            raise ConfigError(f'warmup must lie between 0 and stop - start = {stop - start:g}, not {warmup!r}')
        if decay not in (None, 'linear', 'cosine'):
            raise ConfigError(f"decay must be 'linear', 'cosine' or None, not {decay!r}")
        if not 0 <= end <= 1:
            raise ConfigError(f'end is a share of the weight, 0..1, not {end!r}')
        self.auto = value == 'auto'
        self.share, self.start, self.stop, self.warmup, self.decay, self.end = share, start, stop, warmup, decay, end
        # A buffer, so that a calibrated weight is saved and resumed; NaN: not calibrated yet.
        self.register_buffer('value', torch.tensor(math.nan if self.auto else float(value), dtype=torch.float64))
        self._cached: float | None = None if self.auto else float(value)

    @classmethod
    def parse(cls, config: float | str | Mapping, key: str) -> LossWeight:
        """Build from the config value under ``key``.

        Raises:
            ConfigError: not a number, ``'auto'`` or a dict of this class's arguments.
        """
        arguments = dict(config) if isinstance(config, Mapping) else {'value': config}
        kind = arguments.pop('type', None)
        if kind == 'auto':
            arguments['value'] = 'auto'
        elif kind is not None:
            raise ConfigError(f"{key}: type must be 'auto' (or left out), not {kind!r}")
        check_arguments(cls, arguments, key)
        try:
            return cls(**arguments)
        except ConfigError as error:
            raise ConfigError(f'{key}: {error}') from None

    @property
    def needs_calibration(self) -> bool:
        """Is this an ``'auto'`` weight that has not been calibrated?"""
        return self.full_strength is None

    @property
    def full_strength(self) -> float | None:
        """The weight before the schedule is applied; ``None`` while an ``'auto'`` weight is not calibrated."""
        return self._cached

    def calibrate(self, value: float) -> None:
        """Fix an ``'auto'`` weight."""
        self.value.fill_(value)
        self._cached = float(value)

    def schedule(self, progress: float) -> float:
        """Factor 0..1 on the full strength at ``progress`` (0..1). The end of training itself counts as inside."""
        if progress < self.start or (progress >= self.stop and self.stop < 1):
            return 0.0
        risen = self.start + self.warmup
        if progress < risen:
            return (progress - self.start) / self.warmup
        if self.decay is None:
            return 1.0
        done = min((progress - risen) / max(self.stop - risen, 1e-12), 1.0)
        left = 1 - done if self.decay == 'linear' else 0.5 * (1 + math.cos(math.pi * done))
        return self.end + (1 - self.end) * left

    def is_active(self, progress: float) -> bool:
        """Does the distiller take part at ``progress``? A Python answer: no device is asked."""
        return self.full_strength != 0 and self.schedule(progress) != 0

    def forward(self, progress: float) -> float:
        """The weight at ``progress`` (0..1) as a Python number."""
        if self.needs_calibration:
            raise RuntimeError("an 'auto' loss weight was read before it was calibrated")
        return self.full_strength * self.schedule(progress)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.auto:
            value = float(self.value)
            self._cached = None if math.isnan(value) else value
        else:  # the config decides, not the checkpoint
            self.value.fill_(self._cached)

    def extra_repr(self) -> str:
        text = f'auto, share={self.share:g}' if self.auto else f'{self.full_strength:g}'
        return text + (f' (= {self.full_strength:.4g})' if self.auto and not self.needs_calibration else '')
