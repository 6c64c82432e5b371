"""Load a checkpoint as a teacher, or say in one sentence why it can not be one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import BaseModel, torch_safe_load
from ultralytics.utils import LOGGER

from kd_dense.checkpoint import CheckpointError, check_readable
from kd_dense.description import CLASS_TAPS, Description
from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError, closest
from kd_dense.execution import Execution
from kd_dense.random_state import preserve_random_state
from kd_dense.taps import Taps
from kd_dense.teacher import LoadReport, load_weights, match_classes
from kd_dense.yolo import mmdet_teacher
from kd_dense.yolo.describe import channels, class_names, describe, forward_for

#: Keys of ``teacher`` in a config, with their defaults.
OPTIONS = {
    'checkpoint': None,
    'config': None,
    'classes': None,
    'allow': (),
    'trusted': False,
    'cache': None,
    **asdict(Execution()),
}


@dataclass(frozen=True)
class Adapter:
    """What is known about the teachers of one toolbox; each a function of the model.

    Args:
        describe: its :class:`~kd_dense.description.Description`.
        forward_for: also of the taps that are wanted; a forward of the images that does no more than it has to.
        channels: of the images that it takes.
        class_names: in the order of their indices, or ``None``.
    """

    describe: Callable[[nn.Module], Description]
    forward_for: Callable[[nn.Module, Taps], Callable[[Tensor], object]]
    channels: Callable[[nn.Module], int]
    class_names: Callable[[nn.Module], list[str] | None]


_ULTRALYTICS = Adapter(describe, forward_for, channels, class_names)
_MMDETECTION = Adapter(
    mmdet_teacher.describe, mmdet_teacher.forward_for, mmdet_teacher.channels, mmdet_teacher.class_names
)


def adapter(model: nn.Module) -> Adapter:
    """The adapter for a teacher; every detector of MMDetection has ``extract_feat``, no model of Ultralytics has."""
    return _MMDETECTION if hasattr(model, 'extract_feat') else _ULTRALYTICS


def check_options(teacher: Mapping) -> dict:
    """The ``teacher`` entry of a config with all its keys.

    Raises:
        ConfigError: an unknown key, no checkpoint, or a value that an option can not have.
    """
    for key in teacher:
        if key not in OPTIONS:
            raise ConfigError(f'teacher: unknown key {key!r}; {closest(key, OPTIONS)}')
    options = {**OPTIONS, **teacher}
    if not options['checkpoint']:
        raise ConfigError(
            'teacher.checkpoint: give the .pt file of a trained teacher; kd_dense never uses a random one'
        )
    classes = options['classes']
    if not (classes is None or classes == 'ignore' or isinstance(classes, Mapping)):
        raise ConfigError(
            f"teacher.classes: give {{'student name': 'teacher name'}}, or 'ignore' for features only, not {classes!r}"
        )
    Execution.of(options)
    return options


def load_teacher(teacher: Mapping, student: nn.Module) -> nn.Module:
    """The teacher of a config, in float32, on the device and in the memory format of ``student``.

    Args:
        teacher: ``checkpoint``, a ``.pt`` file; ``config``, the model YAML that the file must have been built from, or
            a config of MMDetection (``mmdet::...``, a ``.py`` file or a model dict), for whose model the file is;
            ``allow``, prefixes of tensors that may differ from it; ``classes``, student name -> teacher name, or
            ``'ignore'``; ``trusted``, load a file that holds more than data and Ultralytics' own classes.
        student: the model to be trained.

    Raises:
        ConfigError: no such file; not a detection or segmentation model; built from another ``config``; other channels
            or classes than the student; weights that are not finite.
    """
    options = check_options(teacher)
    model, report = read_teacher(options)
    check_channels(model, student)
    names = adapter(model).class_names(model)
    if options['classes'] != 'ignore':
        match_classes(class_names(student), names, options['classes'])
    LOGGER.info(f'{report} ({"unknown" if names is None else len(names)} classes)')
    return place(model, student)


def read_teacher(options: Mapping) -> tuple[nn.Module, LoadReport]:
    """The model in the file of a teacher, by itself, and what was loaded.

    Args:
        options: see :func:`check_options`.

    Raises:
        ConfigError: see :func:`load_teacher`.
    """
    model, report = mmdet_teacher.read(options) if mmdet_teacher.is_config(options['config']) else _read(options)
    if not all(torch.isfinite(v).all() for v in model.state_dict().values()):
        raise ConfigError(
            f'teacher.checkpoint: {options["checkpoint"]} has weights that are not finite; train the teacher again'
        )
    return model, report


def _read(options: Mapping) -> tuple[nn.Module, LoadReport]:
    """The model of Ultralytics in a file."""
    path = Path(options['checkpoint']).expanduser()
    model = _model_in(read_checkpoint(path, 'teacher.checkpoint', options['trusted']), path)
    if options['config'] is not None:
        return model, _compare(model, options['config'], path, options['allow'])
    # The file brings its own architecture; there is nothing that could be missing.
    count, parameters = len(model.state_dict()), sum(p.numel() for p in model.parameters())
    return model, LoadReport.of(count, count, parameters, parameters, str(path))


def check_channels(teacher: nn.Module, student: nn.Module) -> None:
    """Do both take images of as many channels?

    Raises:
        ConfigError: they do not.
    """
    count = adapter(teacher).channels(teacher)
    if count != channels(student):
        raise ConfigError(
            f'teacher.checkpoint: its model takes images of {count} channels, the student '
            f'{channels(student)}; both must see the same images'
        )


def place(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """Put the teacher on the device and into the memory format of the student."""
    teacher.to(next(student.parameters()).device)
    if _is_channels_last(student):
        teacher.to(memory_format=torch.channels_last)
    return teacher


def check_class_taps(distillers: Distillers, teacher: Mapping) -> None:
    """With ``classes='ignore'``, or a teacher of MMDetection, only features may be compared.

    Raises:
        ConfigError: a distiller that compares class predictions.
    """
    if mmdet_teacher.is_config(teacher.get('config')):
        mmdet_teacher.check_taps(distillers)
    if teacher.get('classes') != 'ignore':
        return
    for name, method in distillers.methods.items():
        for pair in method.taps.values():
            if pair.teacher and any(tap.split(':')[0] in CLASS_TAPS for tap in pair.student):
                raise ConfigError(
                    f"teacher.classes: 'ignore' is for features, but distillers.{name} compares class predictions; map "
                    "the names with classes={'student name': 'teacher name'}"
                )


def read_checkpoint(path: str | Path, key: str, trusted: bool = False) -> dict:
    """What a ``.pt`` file of Ultralytics holds, loaded without executing code.

    Only tensors, plain data and the classes of PyTorch and Ultralytics are admitted. A file that passes can be loaded
    by Ultralytics' own functions too, which by themselves call whatever it names.

    Args:
        key: config key named in errors.
        trusted: load it without restrictions.

    Raises:
        ConfigError: no such file, a truncated one, or one that names something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f'{key}: there is no file {path}; train or download the model and give its path')
    if trusted:
        LOGGER.warning(f'{path} is loaded as trusted: its pickle may call any function with your rights.')
    elif not hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):
        # Ultralytics would fall back to loading without restrictions.
        raise ConfigError(
            f'{key}: PyTorch {torch.__version__} can not load {path} without executing what it names; use PyTorch 2.6 '
            'or later, or trusted=True if you know where the file comes from'
        )
    try:
        check_readable(path)
    except CheckpointError as error:
        raise ConfigError(f'{key}: {error}') from error
    try:
        return torch_safe_load(str(path), safe_only=not trusted)[0]
    except Exception as error:
        refused = re.search(r'GLOBAL ([\w.]+)', str(error.__cause__))
        if refused is not None:
            raise ConfigError(
                f'{key}: {path} names {refused[1]}, which is neither plain data nor a class of Ultralytics and could '
                'run code, so it was not loaded; if you know where the file comes from, set trusted=True'
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f'{key}: {path} can not be loaded ({reason}); give a .pt file of Ultralytics, and '
            'trusted=True if it holds classes of your own and you know where it comes from'
        ) from error


def _model_in(checkpoint: Mapping, path: Path) -> nn.Module:
    model = checkpoint.get('ema') or checkpoint.get('model')
    model = getattr(model, 'student_model', model)  # an unfinished run of Ultralytics' own distillation
    if not isinstance(model, BaseModel):
        raise ConfigError(f'teacher.checkpoint: {path} holds no Ultralytics model but {type(model).__name__}')
    if not isinstance(getattr(model.model[-1], 'f', None), (list, tuple)):
        raise ConfigError(
            f'teacher.checkpoint: {path} holds a {type(model).__name__}; a detection or segmentation model is needed'
        )
    return model.float()


def _compare(model: nn.Module, config: str, path: Path, allow: tuple[str, ...]) -> LoadReport:
    """Is ``model`` what ``config`` describes? The report of :func:`kd_dense.teacher.load_weights`."""
    from ultralytics.nn.tasks import yaml_model_load

    try:
        yaml = yaml_model_load(config)
    except (FileNotFoundError, OSError) as error:
        raise ConfigError(f'teacher.config: {config} is no model YAML that Ultralytics knows ({error})') from None
    with preserve_random_state():
        expected = type(model)(yaml, ch=channels(model), nc=len(class_names(model)), verbose=False)
    head = f'model.{len(expected.model) - 1}'
    # The width of the class branches follows the class count of the weights that training started from.
    free = [f'{head}.cv3.', f'{head}.one2one_cv3.', *allow]
    return load_weights(expected, model.state_dict(), str(path), free)


def _is_channels_last(model: nn.Module) -> bool:
    convolutions = (p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in convolutions)
