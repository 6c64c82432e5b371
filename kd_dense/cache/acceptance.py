"""What training sees of it, that a cache keeps only a part of the class logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_dense.cache.live import LiveOutputs
from kd_dense.cache.records import TopK, pack, unpack
from kd_dense.context import Context
from kd_dense.distillation import Distillers
from kd_dense.distillers.base import Distiller
from kd_dense.errors import ConfigError

#: Largest accepted change of a gradient: a tenth turns it by less than 6 degrees, and makes it longer or shorter by no
#: more than a ``loss_weight`` that is off by a tenth, to which it is rarely known.
TOLERANCE = 0.1
#: The same before a training, which looks at fewer and other views than the writer did: what was accepted has to stay
#: so, and what is too much for another temperature is further off.
TOLERANCE_IN_TRAINING = 0.15
#: Standard deviation of what the made-up student's logits differ from the teacher's by.
NOISE = 1.0


@dataclass(frozen=True)
class Change:
    """Of the gradient of one distiller at the student's tap, and of its loss, as shares of their sizes.

    Args:
        name: of the distiller in the config.
        gradient: Euclidean length of ``g' - g`` over all views, divided by that of ``g``.
        loss: sum over the views of ``|L' - L|``, divided by that of ``L``. A part of it is by how much the scores
            differed that became one: an entropy, the same for every student, from which none can learn. So it is told,
            and not judged.
    """

    name: str
    gradient: float
    loss: float


def check_readers(distillers: Distillers, names: Iterable[str], key: str) -> None:
    """Can all distillers do with a part of the class logits?

    Args:
        names: taps of which a part is kept.
        key: what the error is about.

    Raises:
        ConfigError: the first one that can not.
    """
    for owner, method in distillers.methods.items():
        taps = {tap for pair in method.taps.values() for tap in pair.teacher}
        if not method.probabilities_only and taps & set(names):
            raise ConfigError(
                f'{key}: distillers.{owner} ({type(method).__name__}) needs all of the class logits, and only a part '
                'is kept; write the cache without --top-k and --anchors'
            )


def accepted(
    distillers: Distillers,
    live: LiveOutputs,
    samples: Sequence[dict],
    top_k: TopK,
    key: str,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """A sentence about each distiller that reads class logits of which a part is kept; see :func:`changes`.

    Args:
        key: what the sentences begin with.
        tolerance: largest accepted change of a gradient.

    Raises:
        ConfigError: a gradient changes by more than ``tolerance``.
    """
    sentences = []
    for change in changes(distillers, live, samples, top_k):
        sentence = (
            f'{key} changes the gradient of distillers.{change.name} by {change.gradient:.2%} and its loss by '
            f'{change.loss:.2%}, for a student near its teacher'
        )
        if not change.gradient <= tolerance:
            raise ConfigError(
                f'{sentence}, and {tolerance:.0%} of the gradient are accepted; keep more of the class logits, or '
                'lower its temperature'
            )
        sentences.append(sentence)
    return sentences


@torch.enable_grad()
def changes(distillers: Distillers, live: LiveOutputs, samples: Sequence[dict], top_k: TopK) -> list[Change]:
    """For every distiller that reads class logits of which a part is kept: what changes with what a cache gives back.

    That depends on the student. With the Kullback-Leibler divergence at temperature 1 the error of the gradient,
    ``p' - p``, is the same for all students, while the gradient itself, ``q - p``, becomes smaller the more a student
    has learned; so one at its initialisation, which says the same about all places, would let too much pass. Here the
    student's logits are the teacher's plus noise of :data:`NOISE` from a fixed seed: a student that has found every
    object and whose odds are off by a factor of ``e`` (one standard deviation). Measured on BCCD, with two students
    that were trained there, its gradient lies between that of a student at its initialisation (GFL: 7.5, 4.9 here, 3.3
    trained; YOLO: 3.9, 2.5, 2.1) and that of the trained one. The choice is ours.

    Args:
        distillers: set up with the live teacher.
        samples: views; each is run alone, as they may have other canvases, and all count as one batch.
        top_k: what is kept, as for :func:`~kd_dense.cache.records.pack`; those of ``live`` count.
    """
    top_k = {name: kept for name, kept in top_k.items() if name in live.names}
    methods = distillers.methods.items()
    names = [n for n, m in methods if {tap for pair in m.taps.values() for tap in pair.teacher} & set(top_k)]
    generator = torch.Generator().manual_seed(0)
    totals = {name: torch.zeros(4, dtype=torch.float64) for name in names}
    for sample in samples if names else ():
        data = live.prepared(sample)
        context, outputs = live.context(data), live.run([data])
        whole = {name: [x.detach().float() for x in outputs[name]] for name in top_k}
        packed = pack({name: [x[0] for x in tensors] for name, tensors in whole.items()}, top_k)
        part = unpack([packed], {name: len(tensors) for name, tensors in whole.items()}, top_k)
        part = {name: [a.to(b) for a, b in zip(part[name], whole[name], strict=True)] for name in top_k}
        for name in names:
            method = distillers.methods[name]
            teacher, approximate = (distillers.by_role(name, 'teacher', values) for values in (whole, part))
            student = {
                role: [x + torch.randn(x.shape, generator=generator).to(x) * NOISE for x in tensors]
                for role, tensors in teacher.items()
            }
            loss, gradient = _loss(method, student, teacher, context)
            other, changed = _loss(method, student, approximate, context)
            parts = (other - loss).abs(), loss, (changed - gradient).square().sum(), gradient.square().sum()
            totals[name] += torch.stack(parts).double().cpu()
    found = {name: total.tolist() for name, total in totals.items()}
    return [
        Change(name, math.sqrt(_share(squared, square)), _share(off, loss))
        for name, (off, loss, squared, square) in found.items()
    ]


def _loss(
    method: Distiller, student: Mapping[str, list[Tensor]], teacher: dict[str, list[Tensor]], context: Context
) -> tuple[Tensor, Tensor]:
    """Sum of the losses of a distiller, and its gradient at all of the student's tensors, in a row."""
    student = {role: [x.detach().requires_grad_() for x in tensors] for role, tensors in student.items()}
    loss = sum(method(student, teacher, context).values())
    gradients = torch.autograd.grad(loss, [x for tensors in student.values() for x in tensors])
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.inf
