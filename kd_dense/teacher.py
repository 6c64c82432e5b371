"""A frozen teacher: load it strictly, feed it what it was trained on, run it no further than needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dense.context import inside
from kd_dense.errors import ConfigError, closest
from kd_dense.execution import Execution, Executor
from kd_dense.taps import Taps

logger = logging.getLogger('kd_dense')


class Teacher:
    """Holds a teacher out of reach of the module tree that is trained.

    It is no ``nn.Module`` and registers nothing: the teacher is in no optimizer, state dict, checkpoint, EMA copy or
    DDP bucket, and no ``.train()`` reaches it. Copies of its owner, deep or pickled (an EMA copy, say), have ``None``
    in its place.

    Args:
        model: the loaded teacher. Frozen here for good.
        remap: from the student's input to the teacher's; ``None``: the same.
        execution: how it is run; ``None``: as it is.
        tapped: paths of all modules that will ever be tapped; for ``execution``.
        log: takes sentences about the execution.
    """

    def __init__(
        self,
        model: nn.Module,
        remap: Remap | None = None,
        execution: Execution | None = None,
        tapped: Iterable[str] = (),
        log: Callable[[str], object] = logger.info,
    ) -> None:
        self.model = freeze(model)
        self.remap = remap
        is_plain = execution is None or execution.is_plain
        self._executor = None if is_plain else Executor(self.model, execution, tapped, log)

    @torch.compiler.disable(recursive=False)
    def __call__(
        self, taps: Taps, images: Tensor, forward: Callable[[Tensor], object], image_sizes: Tensor | None = None
    ) -> dict[str, list[Tensor]]:
        """Tap name -> tensors. The forward ends at the deepest tap.

        Args:
            images: ``[B, C, H, W]``, normalised as the student wants them.
            forward: runs the teacher on the images given to it.
            image_sizes: ``[B, 2]`` true sizes in pixels, where the batch is padded.
        """
        self.model.eval()  # whoever called .train() on it
        with torch.no_grad():
            if self.remap is not None:
                images = self.remap(images, image_sizes)
            if self._executor is not None:
                return self._executor(taps, images, forward)
            taps.run_until_deepest(lambda: forward(images), key=images.shape[0])
            return taps.take()

    def follow(self, function: Callable[[Tensor], Tensor]) -> None:
        """Do to the teacher what the host did to its owner (``nn.Module._apply``): device, dtype, memory format."""
        self.model._apply(function)

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return _absent, ()


def _absent() -> None:
    """What a pickled teacher comes back as."""
    return None


def freeze(model: nn.Module) -> nn.Module:
    """Evaluation mode, and no parameter wants a gradient."""
    return model.eval().requires_grad_(False)


def is_frozen(model: nn.Module) -> bool:
    """Is ``model`` as :func:`freeze` leaves it?"""
    return not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())


@dataclass(frozen=True)
class Normalization:
    """How a model wants its images: ``(x - mean) / std`` per channel of ``order``, 0..255 before.

    Args:
        mean, std: one number per channel, in the order in which the model sees the channels.
        order: ``'rgb'`` or ``'bgr'``, for three channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: str = 'rgb'

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ConfigError(
                f'{len(self.mean)} means and {len(self.std)} standard deviations were given; as many are needed'
            )
        if self.order not in ('rgb', 'bgr'):
            raise ConfigError(f"order must be 'rgb' or 'bgr', not {self.order!r}")


def _fp32(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


class Remap:
    """Turns images normalised for the student into images normalised for the teacher, of the teacher's size.

    One affine map per channel: ``x * std_S / std_T + (mean_S - mean_T) / std_T``, after the channels are put in the
    teacher's order. Padding, which is 0 after normalisation on either side, is set to 0 again.

    Args:
        student, teacher: their normalisation; ``None`` for both: leave the values alone.
        scale: size of the teacher's input relative to the student's.
    """

    def __init__(self, student: Normalization | None, teacher: Normalization | None, scale: float = 1.0) -> None:
        self.scale = scale
        self.flip = False
        self.gain = self.shift = None
        if student is not None and teacher is not None and student != teacher:
            if len(student.mean) != len(teacher.mean):
                raise ConfigError(
                    f'teacher: sees {len(teacher.mean)} channels but the student {len(student.mean)}; they must be '
                    'fed the same image'
                )
            self.flip = student.order != teacher.order and len(student.mean) == 3
            s_mean, s_std = (_fp32(v[::-1] if self.flip else v) for v in (student.mean, student.std))
            t_mean, t_std = _fp32(teacher.mean), _fp32(teacher.std)
            if not torch.equal(s_mean, t_mean) or not torch.equal(s_std, t_std):
                self.gain = (s_std / t_std)[None, :, None, None]
                self.shift = ((s_mean - t_mean) / t_std)[None, :, None, None]

    @property
    def is_identity(self) -> bool:
        """Would the images stay as they are?"""
        return self.scale == 1 and not self.flip and self.gain is None

    def __call__(self, images: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, C, H * scale, W * scale]``."""
        if self.flip:
            images = images.flip(1)
        if self.gain is not None:
            if self.gain.device != images.device:
                self.gain, self.shift = self.gain.to(images.device), self.shift.to(images.device)
            images = images * self.gain.to(images.dtype) + self.shift.to(images.dtype)
            if image_sizes is not None:
                size = tuple(images.shape[2:])
                images = images * inside(image_sizes, size, size)
        if self.scale != 1:
            images = F.interpolate(images, scale_factor=self.scale, mode='bilinear', align_corners=False)
        return images

    def __repr__(self) -> str:
        if self.is_identity:
            return 'the same images as the student'
        parts = ['channels reversed'] if self.flip else []
        if self.gain is not None:
            parts.append(f'x * {self.gain.flatten().tolist()} + {self.shift.flatten().tolist()}')
        if self.scale != 1:
            parts.append(f'resized by {self.scale:g}')
        return '; '.join(parts)


class LoadReport(str):
    """What was loaded, as a sentence that also has the numbers in it.

    Attributes:
        tensors: number loaded.
        all_tensors: number that the model has.
        parameters: trainable numbers loaded.
        all_parameters: those that the model has.
    """

    tensors: int
    all_tensors: int
    parameters: int
    all_parameters: int

    @classmethod
    def of(cls, tensors: int, all_tensors: int, parameters: int, all_parameters: int, source: str) -> LoadReport:
        """``teacher: 391/391 tensors, 24.7 M of 24.7 M parameters from FILE``."""
        millions = f'{parameters / 1e6:.1f} M of {all_parameters / 1e6:.1f} M parameters'
        report = cls(f'teacher: {tensors}/{all_tensors} tensors, {millions} from {source}')
        report.tensors, report.all_tensors = tensors, all_tensors
        report.parameters, report.all_parameters = parameters, all_parameters
        return report


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str, allow: Iterable[str] = ()) -> LoadReport:
    """Load a teacher's weights strictly and report what was loaded.

    Args:
        model: the teacher.
        state: its state dict.
        source: file named in errors.
        allow: prefixes of tensors that may be missing from the file, or left over in it.

    Returns:
        For example ``teacher: 391/391 tensors, 24.7 M of 24.7 M parameters``; also logged.

    Raises:
        ConfigError: tensors missing, left over or of another shape, other than under the prefixes in ``allow``.
    """
    allow = (allow,) if isinstance(allow, str) else tuple(allow)
    own = model.state_dict()
    permitted = {k for k in {*own, *state} if allow and k.startswith(allow)}
    # A counter that old checkpoints lack and that evaluation never reads.
    counters = {k for k in own if k.endswith('num_batches_tracked')}
    missing = [k for k in own if k not in state and k not in permitted and k not in counters]
    unexpected = [k for k in state if k not in own and k not in permitted]
    reshaped = [k for k in own if k in state and own[k].shape != state[k].shape and k not in permitted]
    if missing or unexpected or reshaped:
        parts = []
        if missing:
            parts.append(f'{len(missing)} tensors of the model are missing from it ({_first(missing)})')
        if unexpected:
            parts.append(f'{len(unexpected)} of its tensors are not in the model ({_first(unexpected)})')
        if reshaped:
            first = reshaped[0]
            theirs, ours = list(state[first].shape), list(own[first].shape)
            parts.append(f'{len(reshaped)} have another shape ({first}: {theirs} in the file, {ours} in the model)')
        raise ConfigError(
            f'teacher.checkpoint: {source} does not fit the teacher config: {"; ".join(parts)}. Give the config that '
            "it was trained with, or name prefixes that may differ in teacher=dict(allow=['prefix.'])"
        )
    loadable = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if own and not loadable:
        raise ConfigError(
            f'teacher.allow: permits every tensor to differ, so nothing of {source} was loaded; name fewer prefixes'
        )
    model.load_state_dict(loadable, strict=False)
    parameters = dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    loaded = sum(p.numel() for n, p in parameters.items() if n in loadable)
    report = LoadReport.of(len(loadable), len(own), loaded, total, source)
    logger.info(report)
    return report


def _first(names: list[str], count: int = 3) -> str:
    return ', '.join(names[:count]) + (', ...' if len(names) > count else '')


def match_classes(
    student: Iterable[str] | None, teacher: Iterable[str] | None, mapping: Mapping[str, str] | None = None
) -> None:
    """Compare class lists by name.

    Args:
        student, teacher: class names in the order of their indices; ``None``: not known, not compared.
        mapping: student class -> teacher class, for classes that are named differently.

    Raises:
        ConfigError: different names, or the same in another order.
    """
    if student is None or teacher is None:
        return
    student, teacher, mapping = list(student), list(teacher), dict(mapping or {})
    for side, names, known in (('student', mapping.keys(), student), ('teacher', mapping.values(), teacher)):
        for name in names:
            if name not in known:
                raise ConfigError(f'teacher.classes: the {side} has no class {name!r}; {closest(name, known)}')
    renamed = [mapping.get(name, name) for name in student]
    if renamed == teacher:
        return
    if sorted(renamed) == sorted(teacher):
        first = next(i for i, (a, b) in enumerate(zip(renamed, teacher)) if a != b)
        raise ConfigError(
            f'teacher: has the same classes as the student but in another order (class {first} is {teacher[first]!r} '
            f'for the teacher and {student[first]!r} for the student); train both on the same class list'
        )
    lacking = [n for n in renamed if n not in teacher]
    extra = [n for n in teacher if n not in renamed]
    hint = f' ({closest(lacking[0], teacher)})' if lacking and teacher else ''
    raise ConfigError(
        f"teacher: its classes differ from the student's: {len(teacher)} against {len(student)}; the teacher lacks "
        f'{_first(lacking) or "none"}{hint} and adds {_first(extra) or "none"}. Use a teacher of the same classes, or '
        "map names with teacher=dict(classes={'student name': 'teacher name'})"
    )
