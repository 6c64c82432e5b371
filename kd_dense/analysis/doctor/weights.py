"""Distillers that do nothing."""

from __future__ import annotations

from kd_dense.distillation import Distillers


def sleeping(distillers: Distillers) -> list[str]:
    """Names of the distillers whose loss weight is 0 throughout."""
    return [name for name, weight in distillers.weights.items() if weight.full_strength == 0]


def about_weights(distillers: Distillers) -> tuple[str | None, list[str]]:
    """A sentence when nothing is distilled at all, and one for each distiller that does nothing."""
    asleep = sleeping(distillers)
    warnings = [
        f'distillers.{name}.loss_weight: is 0, so this distiller does nothing; remove it or raise the weight'
        for name in asleep
    ]
    if len(asleep) == len(distillers.methods):
        return 'distillers: every loss_weight is 0, so nothing is distilled; give at least one a weight', warnings
    return None, warnings
