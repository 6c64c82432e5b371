"""Losses that hold nothing between forward and backward but their gradient.

Between the two lies the rest of the step: other distillers, the losses of the task, often the peak of the memory. What
autograd would keep of a loss for so long, several maps of the student's size and the teacher's map itself, can go as
soon as the number is known, if the gradient is computed along with it. This costs one more product with the loss
weight, so it is for losses of which more than one map would be kept; those of a difference keep only that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks


def at_once(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator of ``loss(student, *constants) -> scalar``: the gradient is computed with the value.

    Kept is one tensor of the student's shape and type (fp32 for fp16, whose range the gradient may leave before it is
    scaled). Where no gradient is asked for, ``loss`` runs as it is. It can be differentiated once.
    """

    @functools.wraps(loss)
    def wrapper(student: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (torch.is_grad_enabled() and student.requires_grad):
            return loss(student, *args, **kwargs)
        return _AtOnce.apply(student, lambda x: loss(x, *args, **kwargs))

    return wrapper


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        x = student.detach()
        if x.dtype == torch.float16:
            x = x.float()
        # Hooks of the surroundings are for what is kept; the tensors in here are gone in a moment.
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            value = loss(x.requires_grad_())
            (gradient,) = torch.autograd.grad(value, x)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(ctx.dtype), None


def _as_it_is(x: Tensor) -> Tensor:
    return x
