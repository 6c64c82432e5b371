"""The config of a YOLO run: ``teacher`` and ``distillers`` as everywhere, around Ultralytics' own arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from ultralytics.utils import DEFAULT_CFG_DICT

from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError, closest
from kd_dense.yolo.adaptation_config import Adaptation
from kd_dense.yolo.adaptation_config import parse as parse_adaptation
from kd_dense.yolo.teacher import check_options

#: Keys of a config. ``name -> what it holds``, for the error about an unknown one.
KEYS = (
    'student',
    'teacher',
    'distillers',
    'adaptation',
    'data',
    'train',
    'val',
    'coco_json',
    'work_dir',
    'custom_imports',
)
#: Keys that MMEngine's own tools add or read, and that change nothing here.
TOLERATED = ('default_scope', 'launcher', 'log_level', 'env_cfg', 'experiment_name')
#: Ultralytics arguments that another key of the config already decides -> that key.
DECIDED = {
    'model': 'student',
    'pretrained': 'student=dict(model=..., pretrained=...)',
    'data': 'data',
    'distill_model': 'teacher',
    'dis': 'distillers=dict(NAME=dict(loss_weight=...))',
    'project': 'work_dir',
    'name': 'work_dir',
    'exist_ok': 'work_dir',
    'save_dir': 'work_dir',
    'resume': 'the --resume flag',
    'mode': 'nothing: it is fixed',
}


@dataclass
class YoloConfig:
    """A checked config.

    Args:
        teacher: see :func:`kd_dense.yolo.teacher.load_teacher`; ``None``: the config describes a student alone.
        distillers: name -> ``dict(type=..., ...)``.
        adaptation: to a target domain; ``None``: there is none. With it, ``data`` is the source.
        student: model YAML or ``.pt`` file.
        pretrained: weights to start the student from, ``True`` for those of a ``.pt`` student, ``False`` for none.
        data: data YAML.
        train: any argument of Ultralytics' training.
        val: arguments of Ultralytics' validation that differ from ``train``, for :func:`kd_dense.yolo.evaluate`.
        coco_json: annotation file of the validation images, for the official COCO numbers.
        work_dir: where results go unless the command says otherwise.
    """

    teacher: dict | None = None
    distillers: dict = field(default_factory=dict)
    adaptation: Adaptation | None = None
    student: str | None = None
    pretrained: bool | str = True
    data: str | None = None
    train: dict = field(default_factory=dict)
    val: dict = field(default_factory=dict)
    coco_json: str | None = None
    work_dir: str | None = None

    @property
    def evaluated(self) -> str | None:
        """The data YAML whose validation images count: that of the target domain, where there is one."""
        return (self.adaptation and self.adaptation.target_yaml) or self.data

    def build_distillers(self) -> Distillers:
        """The distillers, not set up.

        Raises:
            ConfigError: unknown types, options or names.
        """
        for name in self.distillers:
            # Ultralytics freezes every parameter with '.dfl' in its name (the fixed convolution of its box decoder).
            if str(name).startswith('dfl'):
                raise ConfigError(
                    f'distillers.{name}: choose a name that does not begin with dfl, which Ultralytics freezes'
                )
        return Distillers(self.distillers)


def read(source: str | Path | Config | Mapping) -> YoloConfig:
    """Read and check a config, from a file or from what MMEngine read.

    Raises:
        ConfigError: no such file, unknown keys (with the closest name), values of the wrong kind.
    """
    source = load(source).to_dict()
    for key in source:
        if key not in KEYS and key not in TOLERATED and not key.startswith('_'):
            raise ConfigError(f'{key}: no key of a YOLO config; {closest(key, KEYS)} (helper variables begin with _)')
    student, pretrained = _student(source.get('student'))
    distilled = 'teacher' in source or 'distillers' in source
    if distilled and 'adaptation' in source:
        raise ConfigError(
            'adaptation: goes together with neither teacher nor distillers, its teacher is the average of the student; '
            'remove one of both, or adapt first and distil with the result as the teacher'
        )
    return YoloConfig(
        teacher=check_options(_mapping(source, 'teacher')) if distilled else None,
        distillers=_mapping(source, 'distillers'),
        adaptation=parse_adaptation(source['adaptation']) if 'adaptation' in source else None,
        student=student,
        pretrained=pretrained,
        data=source.get('data'),
        train=_arguments(source, 'train'),
        val=_arguments(source, 'val'),
        coco_json=source.get('coco_json'),
        work_dir=source.get('work_dir'),
    )


def load(source: str | Path | Config | Mapping) -> Config:
    """A config file, or what has been read from one, as MMEngine's ``Config``.

    Raises:
        ConfigError: no such file.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return Config(dict(source))
    if not Path(source).is_file():
        raise ConfigError(f'there is no config file {source}; give the path of a kd_dense config')
    return Config.fromfile(str(source))


def from_argument(argument: str | None, gain: float) -> YoloConfig:
    """What Ultralytics' training argument ``distill_model`` stands for.

    A config file of ours; or a ``.pt`` file, which is a teacher for Ultralytics' own loss with ``loss_weight=gain``
    (the argument ``dis``), as without kd_dense.

    Raises:
        ConfigError: neither.
    """
    if not argument:
        raise ConfigError('distill_model: give the path of a kd_dense config (.py), or of a teacher (.pt)')
    if str(argument).endswith('.pt'):
        teacher = check_options({'checkpoint': str(argument), 'classes': 'ignore'})
        return YoloConfig(teacher=teacher, distillers={'native': {'type': 'Native', 'loss_weight': gain}})
    config = read(argument)
    if config.teacher is None:
        raise ConfigError(
            f"{argument}: has no teacher and no distillers; add teacher=dict(checkpoint='...') and distillers"
        )
    return config


def adaptation_from_argument(argument: str | None) -> YoloConfig:
    """What Ultralytics' training argument ``distill_model`` stands for in a run that adapts: a config file of ours.

    Raises:
        ConfigError: no such file, or a config without ``adaptation``.
    """
    if not argument:
        raise ConfigError('distill_model: give the path of a kd_dense config (.py) with adaptation')
    config = read(argument)
    if config.adaptation is None:
        raise ConfigError(f"{argument}: has no adaptation; add adaptation=dict(target='path/of/images')")
    return config


def _student(value: Any) -> tuple[str | None, bool | str]:
    if value is None or isinstance(value, str):
        return value, True
    if isinstance(value, Mapping) and set(value) <= {'model', 'pretrained'} and isinstance(value.get('model'), str):
        return value['model'], value.get('pretrained', True)
    raise ConfigError(
        f"student: give a model YAML or .pt file ('yolo11n.yaml'), or dict(model=..., pretrained=...), not {value!r}"
    )


def _mapping(source: Mapping, key: str) -> dict:
    value = source.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f'{key}: must be a dict, not {value!r}')
    return dict(value)


def _arguments(source: Mapping, key: str) -> dict:
    arguments = _mapping(source, key)
    for name in arguments:
        if name in DECIDED:
            raise ConfigError(f'{key}.{name}: is decided by {DECIDED[name]}')
        if name not in DEFAULT_CFG_DICT:
            raise ConfigError(f'{key}.{name}: Ultralytics has no such argument; {closest(name, DEFAULT_CFG_DICT)}')
    return arguments
