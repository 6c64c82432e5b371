"""The options of pseudo boxes, as a config names them in every toolbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kd_dense.adaptation.pseudo_boxes import WEIGHTINGS
from kd_dense.errors import ConfigError, closest

EMPTY = ('skip', 'background', 'artificial_box')


@dataclass(frozen=True)
class BoxOptions:
    """Which predictions of the mean teacher become labels, and how much they count.

    Args:
        score_threshold: above it a prediction becomes a label; one, or one for each class.
        iou_threshold: of two boxes of a class that overlap more, the better one stays.
        max_count: at most so many in an image.
        weighting: ``'hard'``, or ``'score'``: the loss under pseudo labels counts as much as the mean score of the
            boxes of the batch (our choice: the heads take no weight for each box).
        empty: what becomes of a batch in which no box passes. ``'skip'``: it has no pseudo-label term.
            ``'background'``: there is nothing in its images, as there is in an image without boxes beside one that has
            some. ``'artificial_box'``: see :func:`~kd_dense.adaptation.artificial_box`.
    """

    score_threshold: float | Sequence[float] = 0.5
    iou_threshold: float = 0.3
    max_count: int = 20
    weighting: str = 'hard'
    empty: str = 'skip'

    @classmethod
    def parse(cls, options: Mapping | None, behaviour: str, key: str) -> BoxOptions:
        """From the entry ``key`` of a config; ``behaviour='official'`` makes ``empty='artificial_box'`` the default.

        Raises:
            ConfigError: an option that is unknown or out of its range.
        """
        names = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in names:
                raise ConfigError(f'{key}: has no option {name!r}; {closest(name, names)}')
        found = cls(**{'empty': 'artificial_box' if behaviour == 'official' else 'skip', **(options or {})})
        for name, choices in (('weighting', WEIGHTINGS), ('empty', EMPTY)):
            value = getattr(found, name)
            if value not in choices:
                raise ConfigError(f'{key}.{name}: unknown {name} {value!r}; {closest(str(value), choices)}')
        if not (isinstance(found.iou_threshold, (int, float)) and 0 <= found.iou_threshold <= 1):
            raise ConfigError(f'{key}.iou_threshold: must lie between 0 and 1, not {found.iou_threshold!r}')
        if not (isinstance(found.max_count, int) and found.max_count >= 1):
            raise ConfigError(f'{key}.max_count: must be a number >= 1, not {found.max_count!r}')
        found.thresholds(None, key)
        return found

    def thresholds(self, num_classes: int | None, key: str) -> Tensor:
        """``[C]`` the threshold of each class; ``num_classes=None``: as many as there are in the config.

        Raises:
            ConfigError: one is not between 0 and 1, or there are more or less than classes.
        """
        value = self.score_threshold
        single = isinstance(value, (int, float))
        each = [value] * (num_classes or 1) if single else list(value) if isinstance(value, (list, tuple)) else []
        if not each or not all(isinstance(one, (int, float)) and 0 <= one <= 1 for one in each):
            raise ConfigError(
                f'{key}.score_threshold: must be a number between 0 and 1, or a list with one for each class, not '
                f'{value!r}'
            )
        if num_classes is not None and len(each) != num_classes:
            raise ConfigError(
                f'{key}.score_threshold: has {len(each)} thresholds and the data set {num_classes} classes; give one '
                'number, or one for each class'
            )
        return torch.tensor(each, dtype=torch.float32)
