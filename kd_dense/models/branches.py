"""The dense heads of MMDetection: leave out the branch of which nothing is tapped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from kd_dense.taps import Taps, replaced_forward

#: Output that is wanted alone -> the convolutions that it does not need.
_IDLE = {('0',): 'reg_convs', ('1',): 'cls_convs'}


@contextmanager
def only_tapped_branch(model: nn.Module, taps: Taps) -> Iterator[None]:
    """Inside, a detector hands its features past the branch of its head that none of ``taps`` looks at.

    That is for ``bbox_head:0`` (class logits) or ``bbox_head:1`` (boxes) alone, and for heads with two rows of
    convolutions that do not read each other. What such a head returns for the other is of no use.
    """
    with ExitStack() as stack:
        for layer in _idle(model, taps):
            stack.enter_context(replaced_forward(layer, _hand_on))
        yield


def _idle(model: nn.Module, taps: Taps) -> list[nn.Module]:
    head = getattr(model, 'bbox_head', None)
    if head is None or any(path.startswith('bbox_head.') for path in taps.paths):
        return []
    parts = [keys for expanded in taps.expanded.values() for path, keys in expanded if path == 'bbox_head']
    wanted = tuple({keys[0] if keys else '' for keys in parts})
    if wanted not in _IDLE or not _has_independent_branches(head) or head.in_channels != head.feat_channels:
        return []
    return list(getattr(head, _IDLE[wanted]))


def _has_independent_branches(head: nn.Module) -> bool:
    from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead

    return any(
        type(head).forward_single is known.forward_single and type(head).forward is known.forward
        for known in (ATSSHead, FCOSHead, GFLHead, RetinaHead)
        if hasattr(type(head), 'forward_single')
    )


def _hand_on(x: Any) -> Any:
    return x
