"""The terms by which a student adapts to a target domain: SSDA-YOLO."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_dense.errors import ConfigError, closest
from kd_dense.losses.reduction import at_least_fp32

BEHAVIOURS = ('fixed', 'official')
#: Default weight of the consistency, by behaviour: their forms have different scales.
CONSISTENCY_WEIGHTS = {'fixed': 1.1, 'official': 2.0}


def ssda_terms(
    source: Tensor,
    styled: Tensor | None,
    pseudo: Tensor | None,
    pseudo_weight: float = 0.005,
    consistency_weight: float | None = None,
    behaviour: str = 'fixed',
) -> dict[str, Tensor]:
    """``L_s + L_sf + lambda L_t + L_con``, term by term, weighted.

    ``L_s`` and ``L_sf`` are the losses of the student's task on source images and on the same images in the target's
    style, under the same labels; ``L_t`` is that on target images under pseudo labels. The consistency of the two
    styles, ``D = L_s - L_sf``, gradients through both:

    - ``'official'``: ``alpha D^2``, ``alpha = 2``. Its size depends on that of the task loss (in the released code,
      that of YOLOv5 times the batch size), and where ``D`` is above ``1 / (2 alpha)`` it makes the student worse on
      styled images.
    - ``'fixed'``: ``alpha D^2 / m``, ``m`` the mean of the two losses as a constant, ``alpha = 1.1``: free of the scale
      of the task loss, and equal to the official term at the size that YOLOv5's losses have at the end of a published
      run. Our choice.

    Source: Zhou, Jiang, Lu, "SSDA-YOLO: Semi-supervised Domain Adaptive YOLO for Cross-Domain Object Detection", CVIU
    229, 2023; weights and formulas as in the authors' released code. Whether the paper's own symbols and values are the
    same is UNCONFIRMED.

    Args:
        source: scalar.
        styled: scalar; ``None`` where there are no styled images, and then no terms of theirs.
        pseudo: scalar; ``None`` while there are no pseudo labels, and then 0.
        pseudo_weight: ``lambda``.
        consistency_weight: ``alpha``; ``None``: that of the behaviour.
        behaviour: ``'fixed'`` or ``'official'``.

    Returns:
        ``source_loss``, ``styled_loss``, ``pseudo_loss`` and ``consistency_loss``, scalars in fp32 or better.

    Raises:
        ConfigError: an unknown behaviour.
    """
    if behaviour not in BEHAVIOURS:
        raise ConfigError(f'behaviour: unknown behaviour {behaviour!r}; {closest(str(behaviour), BEHAVIOURS)}')
    weight = CONSISTENCY_WEIGHTS[behaviour] if consistency_weight is None else consistency_weight
    terms = {'source_loss': at_least_fp32(source)}
    if styled is not None:
        terms['styled_loss'] = at_least_fp32(styled)
        terms['consistency_loss'] = weight * style_consistency(source, styled, relative=behaviour == 'fixed')
    nothing = torch.zeros_like(terms['source_loss'])
    terms['pseudo_loss'] = nothing if pseudo is None else pseudo_weight * at_least_fp32(pseudo)
    return terms


def style_consistency(source: Tensor, styled: Tensor, relative: bool = True) -> Tensor:
    """``(L_s - L_sf)^2``, divided by their mean (a constant) when ``relative``; see :func:`ssda_terms`.

    Args:
        source, styled: scalars >= 0.

    Returns:
        Scalar >= 0; 0 when they are equal, also when both are 0.
    """
    source, styled = at_least_fp32(source), at_least_fp32(styled)
    squared = (source - styled).square()
    if not relative:
        return squared
    return squared / ((source + styled).detach() / 2).clamp(min=torch.finfo(squared.dtype).tiny)
