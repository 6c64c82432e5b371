"""Load an Ultralytics checkpoint as a teacher, or say in one sentence why it can not be one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from ultralytics.nn.tasks import BaseModel, torch_safe_load
from ultralytics.utils import LOGGER

from kd_dense.distillation import Distillers, preserve_random_state
from kd_dense.errors import ConfigError, closest
from kd_dense.teacher import load_weights, match_classes
from kd_dense.yolo.describe import CLASS_ALIASES, channels, class_names

#: Keys of ``teacher`` in a config, with their defaults.
OPTIONS = {'checkpoint': None, 'config': None, 'classes': None, 'allow': (), 'trusted': False}


def check_options(teacher: Mapping) -> dict:
    """The ``teacher`` entry of a config with all its keys.

    Raises:
        ConfigError: an unknown key, or no checkpoint.
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
    return options


def load_teacher(teacher: Mapping, student: nn.Module) -> nn.Module:
    """The teacher of a config, in float32, on the device and in the memory format of ``student``.

    Args:
        teacher: ``checkpoint``, a ``.pt`` file; ``config``, the model YAML that the file must have been built from;
            ``allow``, prefixes of tensors that may differ from it; ``classes``, student name -> teacher name, or
            ``'ignore'``; ``trusted``, load a file that holds more than data and Ultralytics' own classes.
        student: the model to be trained.

    Raises:
        ConfigError: no such file; not a detection or segmentation model; built from another ``config``; other channels
            or classes than the student; weights that are not finite.
    """
    options = check_options(teacher)
    path = Path(options['checkpoint']).expanduser()
    model = _read(path, options['trusted'])
    if options['config'] is not None:
        report = _compare(model, options['config'], path, options['allow'])
    else:
        # The file brings its own architecture; there is nothing that could be missing.
        count, parameters = len(model.state_dict()), sum(p.numel() for p in model.parameters()) / 1e6
        report = f'teacher: {count}/{count} tensors, {parameters:.1f} M of {parameters:.1f} M parameters from {path}'
    if not all(torch.isfinite(v).all() for v in model.state_dict().values()):
        raise ConfigError(f'teacher.checkpoint: {path} has weights that are not finite; train the teacher again')
    if channels(model) != channels(student):
        raise ConfigError(
            f'teacher.checkpoint: {path} takes images of {channels(model)} channels, the student {channels(student)}; '
            'both must see the same images'
        )
    if options['classes'] != 'ignore':
        match_classes(class_names(student), class_names(model), options['classes'])
    LOGGER.info(f'{report} ({len(class_names(model))} classes)')
    parameter = next(student.parameters())
    model.to(parameter.device)
    if _is_channels_last(student):
        model.to(memory_format=torch.channels_last)
    return model


def check_class_taps(distillers: Distillers, teacher: Mapping) -> None:
    """With ``classes='ignore'`` only features may be compared.

    Raises:
        ConfigError: a distiller that compares class predictions.
    """
    if teacher.get('classes') != 'ignore':
        return
    for name, method in distillers.methods.items():
        for pair in method.taps.values():
            if any(tap.split(':')[0] in CLASS_ALIASES for tap in pair.student):
                raise ConfigError(
                    f"teacher.classes: 'ignore' is for features, but distillers.{name} compares class predictions; map "
                    "the names with classes={'student name': 'teacher name'}"
                )


def _read(path: Path, trusted: bool) -> nn.Module:
    if not path.is_file():
        raise ConfigError(
            f'teacher.checkpoint: there is no file {path}; train or download the teacher and give its path'
        )
    try:
        checkpoint, _ = torch_safe_load(str(path), safe_only=not trusted)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f'teacher.checkpoint: {path} can not be loaded ({reason}); give a .pt file of Ultralytics, and '
            'trusted=True if it holds classes of your own and you know where it comes from'
        ) from error
    model = checkpoint.get('ema') or checkpoint.get('model')
    model = getattr(model, 'student_model', model)  # an unfinished run of Ultralytics' own distillation
    if not isinstance(model, BaseModel):
        raise ConfigError(f'teacher.checkpoint: {path} holds no Ultralytics model but {type(model).__name__}')
    if not isinstance(getattr(model.model[-1], 'f', None), (list, tuple)):
        raise ConfigError(
            f'teacher.checkpoint: {path} holds a {type(model).__name__}; a detection or segmentation model is needed'
        )
    return model.float()


def _compare(model: nn.Module, config: str, path: Path, allow: tuple[str, ...]) -> str:
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
