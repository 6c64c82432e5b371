"""``adaptation`` of a YOLO config: mean-teacher adaptation to a target domain, in the words of the other toolboxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kd_dense.adaptation.box_options import BoxOptions
from kd_dense.adaptation.mean_teacher import MeanTeacher
from kd_dense.adaptation.style import METHODS
from kd_dense.engine.adaptation_hook import SAVES
from kd_dense.errors import ConfigError, closest
from kd_dense.loss_weight import LossWeight
from kd_dense.losses.adaptation import BEHAVIOURS, CONSISTENCY_WEIGHTS
from kd_dense.registry import check_arguments

WEIGHTS = ('pseudo', 'styled', 'consistency')


@dataclass(frozen=True)
class Style:
    """How an image is made to look like one of the other domain; see :func:`kd_dense.adaptation.style.translate`."""

    method: str = 'fourier'
    beta: float = 0.01


@dataclass(frozen=True)
class Adaptation:
    """A checked ``adaptation``.

    Args:
        target: images of the target domain: a folder, or a data YAML, of which ``train`` are the images to adapt to,
            and whose validation images then take the place of those of ``data``. Labels are not needed. Label files
            that lie there are used to log the precision of the pseudo labels and for nothing else.
        translated_source, translated_target: folder with a translation into the style of the other domain for every
            image of this one, made by any translator; each is named as its image, but for the ending.
        style: how images that have no such folder are translated, each in the style of a random image of the other
            domain; ``None``: not at all. A source image without translation has no styled view, and the mean teacher
            sees a target image without translation as it is.
        mean_teacher: arguments of :class:`~kd_dense.adaptation.MeanTeacher`: ``decay``, ``buffers``, ``warmup``.
        pseudo_labels: see :class:`~kd_dense.adaptation.box_options.BoxOptions`.
        pseudo_weight, styled_weight, consistency_weight: of the terms of
            :func:`~kd_dense.losses.adaptation.ssda_terms`; numbers or schedules.
        behaviour: ``'fixed'`` or ``'official'``, see there. ``'official'`` also makes ``buffers='keep'`` and
            ``empty='artificial_box'`` the defaults, and leaves pseudo boxes as they reach over the edge of the image.
        save: ``'student'`` (Ultralytics' moving average of it) or ``'mean_teacher'``: whose plain weights a checkpoint
            holds, and whose scores are those of the run.
        evaluate_teacher: score the other of the two after each epoch as well. Takes as long as the validation.
    """

    target: str
    translated_source: str | None = None
    translated_target: str | None = None
    style: Style | None = Style()
    mean_teacher: dict[str, Any] = field(default_factory=dict)
    pseudo_labels: BoxOptions = BoxOptions()
    pseudo_weight: float | Mapping = 0.005
    styled_weight: float | Mapping = 1.0
    consistency_weight: float | Mapping = CONSISTENCY_WEIGHTS['fixed']
    behaviour: str = 'fixed'
    save: str = 'student'
    evaluate_teacher: bool = True

    @property
    def target_yaml(self) -> str | None:
        """``target`` where it is a data YAML."""
        return self.target if self.target.endswith(('.yaml', '.yml')) else None

    def weights(self) -> dict[str, LossWeight]:
        """``pseudo``, ``styled`` and ``consistency`` -> weight as a function of the progress."""
        found = {}
        for name in WEIGHTS:
            key = f'adaptation.{name}_weight'
            found[name] = LossWeight.parse(getattr(self, f'{name}_weight'), key)
            if found[name].auto:
                raise ConfigError(f"{key}: 'auto' is for distillers; give a number or a schedule of one")
        return found


def parse(options: Any) -> Adaptation:
    """Check the entry ``adaptation`` of a config.

    Raises:
        ConfigError: an option that is unknown, missing or out of its range.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(f"adaptation: must be a dict(target='path/of/images', ...), not {options!r}")
    names = [entry.name for entry in fields(Adaptation)]
    for name in options:
        if name not in names:
            raise ConfigError(f'adaptation: has no option {name!r}; {closest(name, names)}')
    values = dict(options)
    if not isinstance(values.get('target'), str):
        raise ConfigError('adaptation.target: give the folder of the images of the target domain, or a data YAML')
    for name in ('translated_source', 'translated_target'):
        if not isinstance(values.get(name), (str, type(None))):
            raise ConfigError(f'adaptation.{name}: give a folder of images or None, not {values[name]!r}')
    behaviour = values.get('behaviour', 'fixed')
    for name, choices in (('behaviour', BEHAVIOURS), ('save', SAVES)):
        if values.get(name, choices[0]) not in choices:
            raise ConfigError(
                f'adaptation.{name}: unknown {name} {values[name]!r}; {closest(str(values[name]), choices)}'
            )
    if not isinstance(values.get('evaluate_teacher', True), bool):
        raise ConfigError(f'adaptation.evaluate_teacher: must be True or False, not {values["evaluate_teacher"]!r}')
    if 'style' in values:
        values['style'] = _style(values['style'])
    teacher = {'buffers': 'keep' if behaviour == 'official' else 'average', **_mapping(values, 'mean_teacher')}
    check_arguments(MeanTeacher, teacher, 'adaptation.mean_teacher', exclude={'student': None})
    values['mean_teacher'] = teacher
    boxes = _mapping(values, 'pseudo_labels')
    values['pseudo_labels'] = BoxOptions.parse(boxes, behaviour, 'adaptation.pseudo_labels')
    if values.get('consistency_weight') is None:
        values['consistency_weight'] = CONSISTENCY_WEIGHTS[behaviour]
    found = Adaptation(**values)
    found.weights()
    return found


def _mapping(values: Mapping, name: str) -> dict:
    value = {} if values.get(name) is None else values[name]
    if not isinstance(value, Mapping):
        raise ConfigError(f'adaptation.{name}: must be a dict, not {value!r}')
    return dict(value)


def _style(options: Any) -> Style | None:
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise ConfigError(f"adaptation.style: must be dict(method='fourier') or None, not {options!r}")
    check_arguments(Style, options, 'adaptation.style')
    style = Style(**options)
    if style.method not in METHODS:
        raise ConfigError(
            f'adaptation.style.method: unknown method {style.method!r}; {closest(str(style.method), METHODS)}'
        )
    if not (isinstance(style.beta, (int, float)) and 0 <= style.beta <= 0.5):
        raise ConfigError(f'adaptation.style.beta: must lie between 0 and 0.5, not {style.beta!r}')
    return style
