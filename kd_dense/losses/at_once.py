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
    """Decorator of ``loss(student, *constants) -> scalar``: the gradient is computed with the value, by autograd.

    Kept is one tensor of the student's shape and type (fp32 for fp16, whose range the gradient may leave before it is
    scaled). Where no gradient is asked for, ``loss`` runs as it is. It can be differentiated once.
    """

    def both(student: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Hooks of the surroundings are for what is kept; the tensors in here are gone in a moment.
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            value = loss(student.requires_grad_(), *args, **kwargs)
            (gradient,) = torch.autograd.grad(value, student)
        return value.detach(), gradient

    return _decorated(loss, loss, both)


def with_gradient(loss: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Like :func:`at_once` for a ``loss(student, *constants) -> scalar, gradient`` that knows its gradient.

    By formula it costs a few passes over the maps, in place; autograd makes a new map for each operation and its
    derivative. ``loss`` runs without a graph and may not write to its arguments.
    """

    @torch.no_grad()
    def value(*args: Any, **kwargs: Any) -> Tensor:
        return loss(*args, **kwargs)[0]

    return _decorated(loss, value, loss)


def _decorated(
    loss: Callable, value: Callable[..., Tensor], both: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[..., Tensor]:
    @functools.wraps(loss)
    def wrapper(student: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (torch.is_grad_enabled() and student.requires_grad):
            return value(student, *args, **kwargs)
        return _AtOnce.apply(student, lambda x: both(x, *args, **kwargs))

    return wrapper


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        x = student.detach()
        value, gradient = both(x.float() if x.dtype == torch.float16 else x)
        ctx.save_for_backward(gradient.to(x.dtype) if x.dtype == torch.bfloat16 else gradient)
        ctx.dtype = student.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer).to(ctx.dtype), None


def _as_it_is(x: Tensor) -> Tensor:
    return x
