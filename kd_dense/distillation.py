"""Joins distillers, their taps and their loss weights for one student and one teacher; shared by every toolbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kd_dense.context import Context
from kd_dense.description import QUERY_TAPS, ROI_TAPS, Description, Probe
from kd_dense.distillers.base import Distiller, describe, matched_levels
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.loss_weight import LossWeight
from kd_dense.random_state import preserve_random_state
from kd_dense.registry import DISTILLERS, build
from kd_dense.taps import Taps


@dataclass(frozen=True)
class TapTensor:
    """A tapped tensor as the dry forward found it.

    Args:
        shape: without the batch: ``(C, h, w)`` of a map, ``(N, C)`` of tokens.
        stride: pixels per cell of a map; ``None`` for what is no map.
    """

    shape: tuple[int, ...]
    stride: float | None


@dataclass(frozen=True)
class TapRow:
    """One line of the tap table: what one distiller takes from both sides under one role.

    Args:
        distiller: its name in the config.
        role: what the distiller calls these tensors.
        student, teacher: tap names, shapes and strides as text; ``'-'`` for a side that gives nothing.
        connector_parameters: of the whole distiller; on its first row only.
        loss_weight: as text.
        method: the distiller's ``type``.
        connector: types of the connectors, as text; ``'-'`` where there are none.
        student_tensors, teacher_tensors: the tensors themselves.
    """

    distiller: str
    role: str
    student: str
    teacher: str
    connector_parameters: int
    loss_weight: str
    method: str = ''
    connector: str = '-'
    student_tensors: tuple[TapTensor, ...] = ()
    teacher_tensors: tuple[TapTensor, ...] = ()


class Distillers(nn.Module):
    """The distillers of one run.

    Its parameters are the connectors; its state dict is the distillation state of a checkpoint (connectors, calibrated
    loss weights, and whatever buffers a method keeps).

    Args:
        config: name -> ``dict(type=..., loss_weight=..., **arguments)``; the names appear in the log.

    Raises:
        ConfigError: unknown types or options; the closest names are listed.
    """

    def __init__(self, config: Mapping[str, Mapping]) -> None:
        super().__init__()
        if not isinstance(config, Mapping) or not config:
            raise ConfigError("distillers: needs at least one entry, such as dict(logits=dict(type='LogitKD'))")
        self.methods = nn.ModuleDict()
        self.weights = nn.ModuleDict()
        for name, cfg in config.items():
            key = f'distillers.{name}'
            if not isinstance(cfg, Mapping):
                raise ConfigError(f"{key}: must be a dict such as dict(type='LogitKD'), not {cfg!r}")
            if not name.isidentifier() or hasattr(self.methods, name):
                raise ConfigError(f'{key}: {name!r} can not be used as a name; use letters, digits and underscores')
            cfg = dict(cfg)
            weight = cfg.pop('loss_weight', None)
            with _owner(key):
                method = build(DISTILLERS, cfg, key)
            self.methods[name] = method
            weight = method.default_loss_weight if weight is None else weight
            self.weights[name] = LossWeight.parse(weight, f'{key}.loss_weight')
        self._descriptions: dict[str, Description] = {}
        self._taps: dict[tuple[str, ...], Taps] = {}
        # (distiller, role) -> indices of the teacher's levels that go with the student's, where their strides differ
        self._levels: dict[tuple[str, str], list[int]] = {}
        self.table: list[TapRow] = []
        self._proved: set[str] = set()
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._handles: list = []

    # -- building ------------------------------------------------------------------------------------------------------

    def setup(self, student: Description, teacher: Description, seed: int = 0) -> None:
        """Resolve the taps, run both models once on a made-up batch, and build the connectors.

        The random state is left as it was, so that a student trains on the same random numbers with and without
        distillation.

        Args:
            seed: of the connectors' initialisation.

        Raises:
            ConfigError: unknown taps, taps that do not fire, or shapes that a method can not bring together.
        """
        self._descriptions = {'student': student, 'teacher': teacher}
        with preserve_random_state():
            torch.manual_seed(seed)
            found = {side: self.dry_forward(side) for side in self._descriptions}
            for name, method in self.methods.items():
                probes = []
                for side, (values, canvas) in found.items():
                    names = {role: getattr(pair, side) for role, pair in method.taps.items()}
                    shapes = {role: [t.shape for n in ns for t in values[n]] for role, ns in names.items()}
                    description = self._descriptions[side]
                    probes.append(
                        Probe(
                            shapes,
                            names,
                            canvas,
                            description.logits,
                            description.normalization,
                            description.rois,
                            description.queries,
                            description.boxes,
                        )
                    )
                probes[1] = self._match(name, method, *probes)
                with _owner(f'distillers.{name}'):
                    method.setup(*probes)
                self.table += self._rows(name, method, *probes)

    def _match(self, name: str, method: Distiller, student: Probe, teacher: Probe) -> Probe:
        """The teacher's probe without the levels whose stride the student does not have, in the student's order."""
        shapes = dict(teacher.shapes)
        for role in method.taps if method.matches_levels else ():
            levels = matched_levels(student, teacher, role)
            if levels is not None:
                self._levels[name, role] = levels
                shapes[role] = [teacher.shapes[role][i] for i in levels]
        return replace(teacher, shapes=shapes)

    def tap_names(self, side: str, methods: Mapping[str, Distiller] | None = None) -> list[str]:
        """The taps of ``methods``, default all, on one side, ``'student'`` or ``'teacher'``; each once."""
        methods = self.methods if methods is None else methods
        names = (n for m in methods.values() for pair in m.taps.values() for n in getattr(pair, side))
        return list(dict.fromkeys(names))

    def taps(self, side: str, active: Mapping[str, Distiller]) -> Taps:
        """The taps of the active distillers on one side, ``'student'`` or ``'teacher'``."""
        key = (side, *active)
        if key not in self._taps:  # made when first needed: until then the host may have replaced modules (SyncBN, say)
            description = self._descriptions[side]
            self._taps[key] = Taps(description.model, self.tap_names(side, active), description.aliases, side)
        return self._taps[key]

    def description(self, side: str) -> Description:
        """What the adapter said about one side, ``'student'`` or ``'teacher'``."""
        return self._descriptions[side]

    def dry_forward(self, side: str) -> tuple[dict[str, list[Tensor]], tuple[int, int]]:
        """Tap name -> tensors of a made-up batch, and its canvas."""
        description = self._descriptions[side]
        model = description.model
        for name, method in self.methods.items():  # one by one, so that an error names the distiller that asks for it
            for pair in method.taps.values():
                self._check_aliases(name, getattr(pair, side), description, side)
                if description.recorded is not None:
                    continue
                Taps(model, getattr(pair, side), description.aliases, f'distillers.{name}.taps ({side})')
        if description.recorded is not None:
            return description.recorded(self.tap_names(side))
        modes = {m: m.training for m in model.modules()}
        model.eval()
        failures: list[Exception] = []
        try:
            for run in (description.run, *description.alternatives):
                try:
                    return self._recorded(side, run)
                except ConfigError:
                    raise
                except Exception as error:  # heads that ask for ground truth raise of all types
                    failures.append(error)
        finally:
            for module, mode in modes.items():
                module.training = mode
        silent = next((e for e in failures if isinstance(e, DistillationError)), None)
        broken = next((e for e in failures if e is not silent and not isinstance(e, DistillationError)), None)
        if silent is None:
            raise failures[0]
        reason = f' (its plain forward fails: {type(broken).__name__}: {broken})' if broken else ''
        raise ConfigError(f'{silent}{reason}') from broken

    def _recorded(
        self, side: str, run: Callable[[], tuple[int, int]]
    ) -> tuple[dict[str, list[Tensor]], tuple[int, int]]:
        """Tap name -> tensors that ``run`` leaves behind, and the canvas that it returns."""
        description = self._descriptions[side]
        key = f'distillers: taps ({side})'
        taps = Taps(description.model, self.tap_names(side), description.aliases, key)
        with torch.no_grad(), taps.record():
            canvas = run()
            return taps.take(), canvas

    @staticmethod
    def _check_aliases(name: str, taps: tuple[str, ...], description: Description, side: str) -> None:
        absent = dict(description.absent)
        if isinstance(description.logits, str):
            absent |= dict.fromkeys(('logits', 'branch_logits'), description.logits)
        if isinstance(description.rois, str):
            absent |= dict.fromkeys(ROI_TAPS, description.rois)
        if isinstance(description.queries, str):
            absent |= dict.fromkeys(QUERY_TAPS, description.queries)
        for tap in taps:
            reason = absent.get(tap.split(':')[0])
            if reason:
                raise ConfigError(f'distillers.{name}: the {side} has no tap {tap!r}: {reason}')

    def _rows(self, name: str, method: Distiller, student: Probe, teacher: Probe) -> list[TapRow]:
        parameters = sum(p.numel() for p in method.parameters())
        rows = []
        for role in method.taps:
            rows.append(
                TapRow(
                    name,
                    role,
                    describe(student, role) if student.names[role] else '-',
                    describe(teacher, role) if teacher.names[role] else '-',
                    0 if rows else parameters,
                    self.weights[name].extra_repr(),
                    type(method).__name__,
                    '-' if rows else _connectors(method),
                    _tensors(student, role),
                    _tensors(teacher, role),
                )
            )
        return rows

    # -- one training step ---------------------------------------------------------------------------------------------

    def active(self, progress: float) -> dict[str, Distiller]:
        """The distillers whose loss weight is not 0 at ``progress`` (0..1). If there are none, no teacher need run."""
        return {name: m for name, m in self.methods.items() if self.weights[name].is_active(progress)}

    def view(self, images: Tensor, context: Context) -> Tensor:
        """What the student is to see in this step: ``images``, as changed by the active distillers that do so."""
        for method in self.active(context.progress).values():
            images = method.view(images, context)
        return images

    def after_step(self, lr: float) -> None:
        """To be called when the host's optimizer has stepped: lets distillers train what they train on their own.

        Args:
            lr: the learning rate of that step.
        """
        for method in self.methods.values():
            method.after_step(lr)

    # Connectors and losses stay out of compiled graphs: inductor of torch 2.12 (CPU) gives NFD on backbone features the
    # right loss and wrong gradients. tests/matrix/test_options.py compares whole trainings.
    @torch.compiler.disable
    def forward(
        self,
        student: dict[str, list[Tensor]],
        teacher: dict[str, list[Tensor]],
        context: Context,
        task_loss: Callable[[], Tensor],
    ) -> dict[str, Tensor]:
        """Weighted losses of the active distillers, named ``distiller.loss``.

        Args:
            student: tap name -> tensors of the student's training forward. Emptied: a tensor is let go as soon as
                nothing needs it any more.
            teacher: the same of the teacher.
            context: the batch.
            task_loss: gives the scalar loss of the task; called only while an ``auto`` weight is being calibrated.

        Raises:
            DistillationError: in the first step of a distiller, a loss that is exactly 0 or not finite, or student taps
                through which no gradient can flow.
        """
        losses: dict[str, Tensor] = {}
        active = self.active(context.progress)
        for name in list(active):
            method = active.pop(name)
            s, t = self.by_role(name, 'student', student), self.by_role(name, 'teacher', teacher)
            for side, values in (('student', student), ('teacher', teacher)):
                for unused in set(values) - set(self.tap_names(side, active)):
                    del values[unused]
            weight = self.weights[name]
            unweighted = method(s, t, context)
            del t
            first = name not in self._proved or weight.needs_calibration
            if first and not _anything_counts(context, method):
                # nothing to compare: nothing can be proved or calibrated on this batch, the next one will do
                losses.update({f'{name}.{key}': value * 0 for key, value in unweighted.items()})
                continue
            if name not in self._proved:
                self._prove(name, s, unweighted)
            if weight.needs_calibration:
                weight.calibrate(self._calibrated(name, sum(unweighted.values()), s, task_loss()))
            factor = weight(context.progress)
            losses.update({f'{name}.{key}': value * factor for key, value in unweighted.items()})
        student.clear()
        teacher.clear()
        return losses

    def by_role(self, name: str, side: str, values: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Role -> tensors of one side, as the distiller ``name`` is given them.

        Args:
            side: ``'student'`` or ``'teacher'``.
            values: tap name -> tensors.
        """
        taps = self.methods[name].taps
        found = {role: [x for n in getattr(pair, side) for x in values[n]] for role, pair in taps.items()}
        for role in taps if side == 'teacher' else ():
            if (levels := self._levels.get((name, role))) is not None:
                found[role] = [found[role][i] for i in levels]
        return found

    def calibrates(self, active: Mapping[str, Distiller]) -> bool:
        """Will the next forward of the ``active`` distillers calibrate an ``auto`` weight?

        It backpropagates more than once, which what ``torch.compile`` made does not allow: such a step has to run the
        student by :func:`uncompiled`.
        """
        return any(self.weights[name].needs_calibration for name in active)

    def idle(self, progress: float) -> Tensor | None:
        """0, but connected to every parameter that took no part in this step; ``None`` when all took part.

        Distributed training waits for a gradient of every parameter; this gives those of sleeping distillers one, and
        those that a distiller calls idle (:meth:`~kd_dense.distillers.base.Distiller.idle_parameters`).
        """
        active = self.active(progress)
        parameters = [
            p
            for name, method in self.methods.items()
            for p in (method.idle_parameters() if name in active else method.parameters())
            if p.requires_grad
        ]
        return sum(p.sum() for p in parameters) * 0 if parameters else None

    @torch.compiler.disable
    def _calibrated(self, name: str, loss: Tensor, student: dict[str, list[Tensor]], task_loss: Tensor) -> float:
        key = f'distillers.{name}.loss_weight'
        at = [before_clone(x) for tensors in student.values() for x in tensors if x.requires_grad]
        squared = torch.stack([_squared_gradient_norm(value, at) for value in (task_loss, loss)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(squared)
        task, own = squared.sqrt().tolist()
        if not task > 0:
            raise DistillationError(
                f"{key}: 'auto' compares gradients at the student's taps, but the task loss has none there; give a "
                'number'
            )
        if not 0 < own < float('inf'):
            raise DistillationError(f"{key}: 'auto' found a gradient norm of {own} for this distiller; give a number")
        return self.weights[name].share * task / own

    # -- proof of life -------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _prove(self, name: str, student: dict[str, list[Tensor]], losses: dict[str, Tensor]) -> None:
        self._proved.add(name)
        tapped = [x for tensors in student.values() for x in tensors]
        if tapped and torch.is_grad_enabled() and not any(x.requires_grad for x in tapped):
            raise DistillationError(
                f"distillers.{name}: no gradient would flow through the student's taps; they lie in frozen layers or "
                'inside activation checkpointing (with_cp), so tap a later module'
            )
        for key, value in losses.items():
            if 'loss' not in key:  # MMEngine would leave it out of the sum
                raise DistillationError(f"distillers.{name}: calls a loss {key!r}; its name must contain 'loss'")
            number = float(value.detach())
            if number == 0 or number != number or number in (float('inf'), -float('inf')):
                raise DistillationError(
                    f'distillers.{name}: {key} is {number} in its first step; check the taps, the teacher and the mask'
                )
        gradients = self._pending.setdefault(name, {})
        idle = {id(p) for p in self.methods[name].idle_parameters()}
        for parameter_name, parameter in self.methods[name].named_parameters():
            if parameter.requires_grad and id(parameter) not in idle:

                def note(p: Tensor, key: str = parameter_name) -> None:
                    gradients[key] = p.grad.detach().abs().sum()

                gradients[parameter_name] = None
                if parameter.is_leaf:
                    self._handles.append(parameter.register_post_accumulate_grad_hook(note))
                else:  # under FSDP, a view of the parameters that were gathered
                    self._handles.append(parameter.register_hook(partial(_note, gradients, parameter_name)))

    def verify_gradients(self) -> None:
        """After the first backward of each distiller: did every connector get a gradient?

        Costs nothing in later steps.

        Raises:
            DistillationError: a connector none of whose parameters received a gradient that is not 0.
        """
        if not self._pending:
            return
        for name, gradients in self._pending.items():
            totals = {key: 0.0 if total is None else float(total) for key, total in gradients.items()}
            if dead := dead_connectors(totals):
                raise DistillationError(without_gradient(name, dead))
        self._pending.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getstate__(self) -> dict:
        # Copies, deep (of an EMA hook, say) or pickled, hold parameters and buffers only: descriptions and taps are
        # bound to the student and the teacher of the original.
        return self.__dict__ | {'_descriptions': {}, '_taps': {}, '_pending': {}, '_handles': []}


def _note(gradients: dict[str, Tensor | None], name: str, gradient: Tensor) -> None:
    gradients[name] = gradient.detach().abs().sum()


def _call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


#: Call a function with nothing in it compiled by ``torch.compile``.
uncompiled = torch.compiler.disable(_call)


@torch.compiler.disable
def _anything_counts(context: Context, method: Distiller) -> bool:
    """Has the batch a pixel that is not ignored, and whatever else the method compares, in every process?"""
    empty = []
    if context.label_map is not None:  # padding alone never covers all of an image
        empty.append((context.label_map == context.ignore_index).all())
    if method.needs_boxes and context.boxes is not None:
        empty.append(torch.tensor(not any(map(len, context.boxes)), device=context.boxes[0].device))
    if (compared_nothing := method.compared_nothing()) is not None:
        empty.append(compared_nothing)
    if not empty:
        return True
    nothing = torch.stack(empty).any().int()
    if dist.is_available() and dist.is_initialized():  # all processes calibrate together or not at all
        dist.all_reduce(nothing)
    return not nothing


def _connectors(method: Distiller) -> str:
    """``'2 x Conv1x1'``: the types of a distiller's connectors, in order."""
    several = (nn.ModuleList, nn.ModuleDict)
    lists = [m for child in method.children() for m in (child.children() if isinstance(child, several) else [child])]
    names = [type(m).__name__ for m in lists if next(m.parameters(), None) is not None]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return ', '.join(f'{n} x {name}' if n > 1 else name for name, n in counts.items()) or '-'


def _tensors(probe: Probe, role: str) -> tuple[TapTensor, ...]:
    pairs = zip(probe.shapes[role], probe.strides(role), strict=True)
    return tuple(TapTensor(tuple(shape[1:]), stride) for shape, stride in pairs)


def dead_connectors(gradients: Mapping[str, float]) -> list[str]:
    """Names of the connectors that got no gradient.

    Args:
        gradients: parameter name of one distiller -> norm of its gradient, or anything else that is 0 without one.
    """
    alive: dict[str, bool] = {}
    for parameter, total in gradients.items():
        owner = parameter.rpartition('.')[0] or parameter
        alive[owner] = alive.get(owner, False) or total != 0
    return [owner for owner, is_alive in alive.items() if not is_alive]


def without_gradient(name: str, connectors: list[str]) -> str:
    """The sentence about connectors of the distiller ``name`` that get no gradient."""
    return (
        f'distillers.{name}: no gradient reached {", ".join(connectors)}; it would stay random for the whole training'
    )


def squared_gradients(loss: Tensor, at: list[Tensor | GradientEdge]) -> list[Tensor | None]:
    """Sum of squares of the gradient of ``loss`` at each of ``at``, in fp64; ``None`` where it does not reach."""
    # Under AMP the gradients may be fp16 and underflow, so the loss is scaled up as a gradient scaler does.
    for scale in (2.0**16, 2.0**8, 1.0):
        grads = torch.autograd.grad(loss * scale, at, retain_graph=True, allow_unused=True)
        squares = [None if g is None else (g.detach().double() / scale).square().sum() for g in grads]
        found = [s for s in squares if s is not None]
        if not found or torch.stack(found).sum().isfinite():
            break
    return squares


def _squared_gradient_norm(loss: Tensor, at: list[Tensor | GradientEdge]) -> Tensor:
    """Sum of squares of the gradient of ``loss`` at all of ``at``, in fp64."""
    squares = [s for s in squared_gradients(loss, at) if s is not None]
    return torch.stack(squares).sum() if squares else loss.new_zeros((), dtype=torch.float64)


def before_clone(x: Tensor) -> Tensor | GradientEdge:
    """Where the gradient at a tap is measured.

    A value that the model overwrites in place is captured as a clone, which the task loss does not depend on.
    """
    if x.grad_fn is not None and x.grad_fn.name() == 'CloneBackward0':
        return GradientEdge(*x.grad_fn.next_functions[0])
    return x


@contextmanager
def _owner(key: str) -> Iterator[None]:
    """Put the config key in front of errors of the code that does not know it."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(key) else f'{key}: {text}') from None
