"""A discriminator between teacher and student that a distiller trains beside the student."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_dense.errors import ConfigError
from kd_dense.losses.cakd import deception_loss, discriminator_loss
from kd_dense.losses.reduction import at_least_fp32
from kd_dense.side_trained import SideTrained


class TokenDiscriminator(nn.Sequential):
    """Three fully connected layers on each token: ``[..., C] -> [..., 1]``, a logit.

    Widths, activation and the input (single tokens) are not in the paper: ``C``, ``C / 2``, ``C / 4``, leaky ReLU 0.2.
    """

    def __init__(self, channels: int) -> None:
        half, quarter = max(channels // 2, 1), max(channels // 4, 1)
        super().__init__(
            nn.Linear(channels, half),
            nn.LeakyReLU(0.2),
            nn.Linear(half, quarter),
            nn.LeakyReLU(0.2),
            nn.Linear(quarter, 1),
        )


class PatchDiscriminator(nn.Sequential):
    """Five convolutions on a matrix of scores: ``[B, 1, N, M] -> [B, 1, 1, 1]``, a logit.

    Source: the public code of the paper; 44,393 parameters. ``N`` and ``M`` have to be at least 24.
    """

    smallest = 24

    def __init__(self) -> None:
        def block(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]

        super().__init__(
            nn.Conv2d(1, 8, 4, 2, 1),
            nn.LeakyReLU(0.2),
            *block(8, 16, 2),
            *block(16, 32, 2),
            *block(32, 64, 1),
            nn.Conv2d(64, 1, 4, 1, 1),
            nn.AdaptiveAvgPool2d(1),
        )


class Adversary(nn.Module):
    """Gives the student the loss of deceiving a discriminator, and trains the discriminator after the student's step.

    Args:
        discriminator: features -> logits.
        optimizer: of the discriminator, see :class:`~kd_dense.side_trained.SideTrained`; default SGD with momentum 0.9.
        lr_mult: its learning rate as a multiple of the student's.
        interval: iterations from one step of the discriminator to the next.
        form: ``'non_saturating'`` or ``'saturating'``, see :func:`~kd_dense.losses.cakd.deception_loss`.
        factor: of the discriminator's loss.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        optimizer: Mapping | None = None,
        lr_mult: float = 0.01,
        interval: int = 5,
        form: str = 'non_saturating',
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        if form not in ('non_saturating', 'saturating'):
            raise ConfigError(f"form must be 'non_saturating' or 'saturating', not {form!r}")
        if not isinstance(interval, int) or interval < 1:
            raise ConfigError(f'interval must be a whole number of iterations, not {interval!r}')
        if not isinstance(lr_mult, (int, float)) or not lr_mult > 0:
            raise ConfigError(f'lr_mult must be a number > 0, not {lr_mult!r}')
        self.discriminator = SideTrained(discriminator, optimizer or dict(type='SGD', momentum=0.9))
        self.lr_mult, self.interval, self.form, self.factor = lr_mult, interval, form, factor
        # What the discriminator's next step will look at; held from the forward to the end of the student's step.
        self._due: tuple[Tensor, Tensor, Tensor | None] | None = None

    def forward(self, real: Tensor, fake: Tensor, mask: Tensor | None, iteration: int) -> Tensor:
        """The student's loss.

        Args:
            real, fake: features of the teacher and of the student.
            mask: boolean, broadcast to the logits; logits that count.
        """
        with torch.autocast(fake.device.type, enabled=False):
            real, fake = at_least_fp32(real.detach()), at_least_fp32(fake)
            loss = deception_loss(self.discriminator(fake), self.form, mask)
        if self.training and torch.is_grad_enabled() and iteration % self.interval == 0:
            self._due = real, fake.detach(), mask
        return loss

    def after_step(self, lr: float) -> None:
        """Train the discriminator, if it is its turn."""
        if self._due is None:
            return
        (real, fake, mask), self._due = self._due, None
        self.discriminator.step(
            lambda d: self.factor * discriminator_loss(d(real), d(fake), mask), lr=lr * self.lr_mult
        )
