"""How a frozen teacher is run: with folded norms, in reduced precision, channels last, compiled. All off by default.

None of it may change what the student learns, so the first batch also goes through the teacher as it was loaded, in
fp32, and every tap is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from kd_dense.compiled_parts import CompiledParts
from kd_dense.errors import ConfigError, DistillationError, cause, closest
from kd_dense.folding import Watch
from kd_dense.random_state import preserve_random_state
from kd_dense.taps import Taps

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
#: Largest relative error of a tap where neither the config nor reduced precision says otherwise, and with that.
TOLERANCES = 0.01, 0.05
COMPILE_OPTIONS = ('mode', 'backend', 'dynamic')
#: Modes of ``torch.compile`` that hand out tensors which the next call writes over.
_REUSING = ('reduce-overhead', 'max-autotune')


@dataclass(frozen=True)
class Execution:
    """Options of ``teacher`` in a config that are about how it is run.

    Args:
        fuse: fold batch norms into the convolutions before them, where exact: :mod:`kd_dense.folding`.
        precision: ``'fp32'``, ``'bf16'`` or ``'fp16'``, by autocast; weights stay as they are. ``None``: as the
            training runs.
        channels_last: images and weights in the memory format channels-last; what is tapped is laid out as the student
            lays out its own.
        compile: ``torch.compile`` the parts of the model between the taps; ``True``, or a dict with its arguments
            ``mode``, ``backend`` and ``dynamic``.
        tolerance: largest relative error ``|x - reference| / |reference|`` (Euclidean norms over a batch) of a tapped
            tensor against the teacher as it was loaded, in fp32. ``None``: 0.05 in reduced precision, else 0.01.
            ``float('inf')`` accepts anything.
    """

    fuse: bool = False
    precision: str | None = None
    channels_last: bool = False
    compile: bool | Mapping[str, Any] = False
    tolerance: float | None = None

    @classmethod
    def of(cls, teacher: Mapping[str, Any]) -> Execution:
        """The options among the keys of ``teacher``.

        Raises:
            ConfigError: a value that an option can not have.
        """
        given = {name: teacher[name] for name in EXECUTION_KEYS if name in teacher}
        for name in ('fuse', 'channels_last'):
            if not isinstance(given.get(name, False), bool):
                raise ConfigError(f'teacher.{name}: must be True or False, not {given[name]!r}')
        precision = given.get('precision')
        if precision is not None and precision not in PRECISIONS:
            raise ConfigError(
                f"teacher.precision: must be 'fp32', 'bf16' or 'fp16', not {precision!r}; leave it out to run the "
                'teacher as the training runs'
            )
        if 'compile' in given:
            given['compile'] = _compile_options(given['compile'])
        execution = cls(**given)
        tolerance = execution.tolerance
        if tolerance is not None:
            if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not tolerance > 0:
                raise ConfigError(
                    f'teacher.tolerance: must be a number above 0 (0.05 is 5 % of the norm of a tap), not {tolerance!r}'
                )
            if not execution.is_checked:
                raise ConfigError(
                    'teacher.tolerance: is the limit of what fuse, precision, channels_last and compile may change, '
                    "but none of them is on; leave it out, or add precision='bf16', say"
                )
        return execution

    @property
    def is_checked(self) -> bool:
        """Is anything on that could change what the taps give?"""
        reduced = self.precision not in (None, 'fp32')
        return self.fuse or reduced or self.channels_last or self.compile is not False

    @property
    def is_plain(self) -> bool:
        """Is everything off?"""
        return self == Execution()

    def __str__(self) -> str:
        """The options that are on, as in a config."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != 'tolerance'}
        return ', '.join(f'{name}={value!r}' for name, value in options.items() if value not in (None, False))

    # -- running -------------------------------------------------------------------------------------------------------

    def context(self, device: str) -> AbstractContextManager:
        """The precision in which the teacher runs on a ``device`` such as ``'cuda'``."""
        return nullcontext() if self.precision is None else in_precision(device, PRECISIONS[self.precision])

    def limit(self, device: str) -> float:
        """The tolerance, where none is given that for the precision in which it runs."""
        if self.tolerance is not None:
            return self.tolerance
        reduced = current_precision(device) if self.precision is None else PRECISIONS[self.precision]
        return TOLERANCES[reduced != torch.float32]

    def handed_on(self, values: dict[str, list[Tensor]], images: Tensor) -> dict[str, list[Tensor]]:
        """What was tapped, as connectors and losses expect it.

        Tensors in half of the bits become of the type of the ``images``, unless the training itself runs in that
        precision; and all are laid out as the images are, because operations of mmcv (RoIAlign, say) silently misread
        what is channels-last.
        """
        expected = None if self.precision is None else current_precision(images.device.type)
        lay_out = self.channels_last and images.is_contiguous()

        def as_expected(x: Tensor) -> Tensor:
            if expected is not None and x.dtype in (torch.bfloat16, torch.float16) and x.dtype != expected:
                x = x.to(images.dtype)
            return x.contiguous() if lay_out else x

        return {name: list(map(as_expected, tensors)) for name, tensors in values.items()}


EXECUTION_KEYS = tuple(f.name for f in fields(Execution))


def _compile_options(value: Any) -> bool | dict[str, Any]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"teacher.compile: must be True, False, or arguments of torch.compile such as dict(mode='default'), not "
            f'{value!r}'
        )
    for name in value:
        if name not in COMPILE_OPTIONS:
            raise ConfigError(f'teacher.compile: has no option {name!r}; {closest(name, COMPILE_OPTIONS)}')
    if value.get('mode') in _REUSING:
        raise ConfigError(
            f'teacher.compile.mode: {value["mode"]!r} replays CUDA graphs, which write over the tensors that they gave '
            "before; use 'default' or 'max-autotune-no-cudagraphs'"
        )
    return dict(value)


def current_precision(device: str) -> torch.dtype:
    """The type of autocast on a device such as ``'cuda'``; float32 where it is off."""
    # autocast itself, because the functions that tell have other names in older versions of torch
    state = torch.autocast(device)
    with state:
        enabled, dtype = state.prev, state.prev_fastdtype
    return dtype if enabled else torch.float32


def in_precision(device: str, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to ``dtype``, whatever is on outside; for float32 none."""
    if dtype == torch.float32:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype=dtype)


def relative_error(values: Iterable[Tensor], references: Iterable[Tensor]) -> float:
    """The largest over pairs of ``|value - reference| / |reference|``, infinite for other numbers or shapes of tensors.

    A tensor that is 0 everywhere must be met exactly. What is no number is as far away as can be.
    """
    values, references = list(values), list(references)
    if [x.shape for x in values] != [x.shape for x in references]:
        return math.inf
    errors = []
    for x, reference in zip(values, references, strict=True):
        size, distance = float(reference.norm()), float((x - reference).norm())
        errors.append(0.0 if distance == 0 else distance / size if size > 0 else math.inf)
    return max((math.inf if math.isnan(e) else e for e in errors), default=0.0)


class Executor:
    """Runs a teacher as an :class:`Execution` says, and proves on the first batch that its taps give the same.

    Args:
        model: the loaded teacher, frozen. Changed for good in the first call: norms are folded, weights laid out.
        execution: the options.
        tapped: paths of all modules that will ever be tapped, see :attr:`kd_dense.taps.Taps.paths`.
        log: takes the sentences about what was found.
    """

    def __init__(
        self, model: nn.Module, execution: Execution, tapped: Iterable[str], log: Callable[[str], object]
    ) -> None:
        self.model, self.execution, self.log = model, execution, log
        self._tapped = [model.get_submodule(path.partition('@')[0]) for path in tapped]
        self._compared: set[str] = set()
        self._is_prepared = False
        self._compiled: CompiledParts | None = None

    def __call__(self, taps: Taps, images: Tensor, forward: Callable[[Tensor], object]) -> dict[str, list[Tensor]]:
        """Tap name -> tensors, in type and memory format of the images.

        Args:
            taps: what is wanted; compared when met for the first time.
            images: ``[B, C, H, W]``, as the teacher wants them.
            forward: runs the teacher on the images given to it.

        Raises:
            ConfigError: a tap differs by more than the tolerance from that of the teacher in fp32 as it was loaded.
        """
        new = [name for name in taps.expanded if name not in self._compared]
        if not new or not self.execution.is_checked:
            values = self._run(taps, images, forward)
        else:
            with preserve_random_state():
                references = self._reference(taps, images, forward)
                values = self._run(taps, images, forward)
            self._compare({n: relative_error(values[n], references[n]) for n in new}, images.device.type)
        return self.execution.handed_on(values, images)

    def _reference(self, taps: Taps, images: Tensor, forward: Callable) -> dict[str, list[Tensor]]:
        """What the taps give in fp32; in the first call, of the teacher as it was loaded, which is then prepared."""
        images = images.to(next(self.model.parameters()).dtype)
        watch = Watch(self.model, self._tapped) if self.execution.fuse and not self._is_prepared else None
        with in_precision(images.device.type, torch.float32), nullcontext() if watch is None else watch():
            values = _through(taps, images, forward)
        if not self._is_prepared:
            self._prepare(watch)
        return values

    def _prepare(self, watch: Watch | None) -> None:
        self._is_prepared = True
        if watch is not None:
            folded, count = watch.fold()
            self.log(f'teacher: {folded} of {count} batch norms are folded into the convolutions before them')
        if self.execution.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.execution.compile is not False:
            options = {} if self.execution.compile is True else self.execution.compile
            self._compiled = CompiledParts(self.model, self._tapped, options)
            self.log(f'teacher: {len(self._compiled.parts)} parts are compiled; the first iterations will be slow')

    def _run(self, taps: Taps, images: Tensor, forward: Callable) -> dict[str, list[Tensor]]:
        if self.execution.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.execution.context(images.device.type):
            if self._compiled is not None:
                try:
                    with self._compiled.in_place():
                        return _through(taps, images, forward)
                except (ConfigError, DistillationError, torch.cuda.OutOfMemoryError):
                    raise
                except Exception as error:  # of many types: tracing, code generation, a C++ compiler that is not there
                    self._compiled = None
                    self.log(
                        f'teacher.compile: torch.compile fails ({cause(error)}), so the teacher runs without it from '
                        'here on'
                    )
            return _through(taps, images, forward)

    def _compare(self, errors: Mapping[str, float], device: str) -> None:
        self._compared.update(errors)
        limit = self.execution.limit(device)
        found = ', '.join(f'{name} {error:.1e}' for name, error in errors.items())
        self.log(f'teacher ({self.execution}): relative errors of its taps against fp32: {found}; allowed {limit:g}')
        worst = max(errors, key=errors.get)
        if errors[worst] > limit:
            raise ConfigError(
                f'teacher.tolerance: with {self.execution} the tap {worst!r} differs from that of the teacher in fp32 '
                f'by {errors[worst]:.1e} of its norm, and {limit:g} is allowed; leave the option out, or set tolerance '
                'if this does no harm'
            )


def _through(taps: Taps, images: Tensor, forward: Callable[[Tensor], object]) -> dict[str, list[Tensor]]:
    taps.run_until_deepest(lambda: forward(images), key=images.shape[0])
    return taps.take()
