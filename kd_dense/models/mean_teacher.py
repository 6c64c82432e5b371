"""The MMEngine model of mean-teacher domain adaptation, for MMSegmentation's segmentors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from kd_dense.adaptation.mean_teacher import MeanTeacher
from kd_dense.adaptation.pseudo_maps import pseudo_label_map
from kd_dense.adaptation.statistics import MapStatistics
from kd_dense.context import inside
from kd_dense.errors import ConfigError, closest
from kd_dense.loss_weight import LossWeight
from kd_dense.losses.adaptation import BEHAVIOURS, CONSISTENCY_WEIGHTS, ssda_terms
from kd_dense.models.build import build_model
from kd_dense.models.describe import is_segmentor
from kd_dense.models.student_inside import StudentInside
from kd_dense.random_state import preserve_random_state
from kd_dense.registry import MODELS, check_arguments

WEIGHTINGS = ('hard', 'share')
MODEL_KEYS = (
    'student',
    'mean_teacher',
    'pseudo_labels',
    'pseudo_weight',
    'styled_weight',
    'consistency_weight',
    'behaviour',
)


@MODELS.register_module()
class MeanTeacherAdaptation(StudentInside):
    """A segmentor that adapts to a target domain without labels, taught by the moving average of itself.

    A batch has views, named by who looks at them (:class:`~kd_dense.adaptation.Views`): ``source``, under its labels;
    ``styled``, the same source images in the target's style, under the same labels; ``target``, and ``teacher``, the
    same target images as the mean teacher sees them, weakly augmented or in the source's style. ``styled`` may be left
    out, and ``teacher`` too: the teacher then sees ``target``. The loss is that of
    :func:`~kd_dense.losses.adaptation.ssda_terms`, with the teacher's sure pixels as labels of ``target``. SSDA-YOLO is
    a method for detectors; its form for segmentation is our choice.

    To its surroundings it is the student: ``state_dict`` gives and takes the student's plain weights, prediction is the
    student's. It needs :class:`~kd_dense.engine.AdaptationHook`, which moves the teacher, stores it in checkpoints,
    and logs what became of the pseudo labels.

    Args:
        student: a config path (local or ``mmseg::...``), a model dict, or a built module.
        mean_teacher: arguments of :class:`~kd_dense.adaptation.MeanTeacher`: ``decay``, ``buffers``, ``warmup``.
        pseudo_labels: ``threshold`` (one, or one for each class; 0.9) and ``weighting``. ``'hard'``: pixels above the
            threshold are labels. ``'share'``: all pixels are, and their loss counts as much as the share of the pixels
            of the batch that are above, as in DAFormer (Hoyer et al., CVPR 2022), whose threshold is 0.968.
        pseudo_weight: of the loss under pseudo labels; a number or a schedule, as the ``loss_weight`` of a distiller
            (but not ``'auto'``): ``dict(value=1.0, start=0.1)`` trains on the source alone at first. 1 is that of
            DAFormer; SSDA-YOLO has 0.005.
        styled_weight: of the loss of styled images, likewise.
        consistency_weight: of the consistency of both styles, likewise; ``None``: that of the behaviour.
        behaviour: ``'fixed'`` or ``'official'``: see :func:`~kd_dense.losses.adaptation.ssda_terms`. ``'official'``
            also makes ``buffers='keep'`` the default of the mean teacher.
        data_preprocessor: MMEngine's runner hands a config's top-level one down to here; used when the student has
            none.

    Raises:
        ConfigError: unknown keys, or a student that is no segmentor with a softmax over its classes.
    """

    def __init__(
        self,
        student: str | Mapping | nn.Module,
        mean_teacher: Mapping | None = None,
        pseudo_labels: Mapping | None = None,
        pseudo_weight: float | Mapping = 1.0,
        styled_weight: float | Mapping = 1.0,
        consistency_weight: float | Mapping | None = None,
        behaviour: str = 'fixed',
        data_preprocessor: Mapping | nn.Module | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            raise ConfigError(f'model: MeanTeacherAdaptation has no option {name!r}; {closest(name, MODEL_KEYS)}')
        if behaviour not in BEHAVIOURS:
            raise ConfigError(
                f'model.behaviour: unknown behaviour {behaviour!r}; {closest(str(behaviour), BEHAVIOURS)}'
            )
        if isinstance(student, Mapping) and data_preprocessor is not None:
            student = {'data_preprocessor': data_preprocessor, **student}
        student = build_model(student, 'student')
        _check_student(student)
        super().__init__(student, ViewsPreprocessor(student.data_preprocessor))
        options = {'buffers': 'keep' if behaviour == 'official' else 'average', **(mean_teacher or {})}
        check_arguments(MeanTeacher, options, 'model.mean_teacher', exclude={'student': None})
        with preserve_random_state():
            self.mean_teacher = MeanTeacher(student, **options)
        threshold, self.weighting = _check_pseudo_labels(pseudo_labels, student.decode_head.num_classes)
        self.register_buffer('threshold', threshold, persistent=False)  # on the device, so that no step copies it there
        consistency_weight = CONSISTENCY_WEIGHTS[behaviour] if consistency_weight is None else consistency_weight
        self.weights = {  # in no module: they are part of the config, not of a state
            name: _weight(value, f'model.{name}_weight')
            for name, value in (
                ('pseudo', pseudo_weight),
                ('styled', styled_weight),
                ('consistency', consistency_weight),
            )
        }
        self.behaviour = behaviour
        self.ignore_index = getattr(student.decode_head, 'ignore_index', 255)
        self.statistics = MapStatistics(student.decode_head.num_classes, self.ignore_index)
        self.progress: float | None = None

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> MeanTeacherAdaptation:
        super()._apply(fn, *args, **kwargs)
        if self.__dict__.get('mean_teacher') is not None:  # a copy of an EMA hook has none
            self.mean_teacher.follow(fn)
        return self

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, inputs: Tensor | dict, data_samples: list | dict | None = None, mode: str = 'tensor') -> Any:
        """As the student's own; with ``mode='loss'`` and a batch of views the terms of the adaptation."""
        if mode != 'loss':
            return self.student(inputs, data_samples, mode=mode)
        if not isinstance(inputs, Mapping) or not {'source', 'target'} <= set(inputs):
            raise ConfigError(
                "train_dataloader.dataset: MeanTeacherAdaptation needs the views 'source' and 'target' in a batch; use "
                "a dict(type='kd_dense.PairedDataset', source=..., target=...)"
            )
        if self.progress is None:
            raise ConfigError(
                "custom_hooks: MeanTeacherAdaptation needs dict(type='kd_dense.AdaptationHook') there to move its "
                'teacher'
            )
        weights = {name: weight(self.progress) for name, weight in self.weights.items()}
        losses = self.student(inputs['source'], data_samples['source'], mode='loss')
        source, styled, pseudo = self._sum(losses), None, None
        if 'styled' in inputs and (weights['styled'] or weights['consistency']):
            styled = self._sum(self.student(inputs['styled'], data_samples['styled'], mode='loss'))
        if weights['pseudo']:
            pseudo = self._under_pseudo_labels(inputs, data_samples)
        terms = ssda_terms(source, styled, pseudo, weights['pseudo'], weights['consistency'], self.behaviour)
        if styled is not None:
            terms['styled_loss'] = weights['styled'] * terms['styled_loss']
        logged = {k: v for k, v in losses.items() if 'loss' not in k}  # such as the accuracy on the source
        return logged | {f'adapt.{name}': value for name, value in terms.items()}

    def _sum(self, losses: dict) -> Tensor:
        return self.parse_losses(losses)[0]

    def _under_pseudo_labels(self, inputs: dict[str, Tensor], data_samples: dict[str, list]) -> Tensor:
        """The student's loss on the target view, labelled by the teacher."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        images, samples = inputs['target'], data_samples['target']
        seen = inputs.get('teacher', images)
        if seen.shape != images.shape:
            raise ConfigError(
                f'train_dataloader.dataset.target.pipeline: the views target and teacher have the sizes '
                f'{tuple(images.shape[2:])} and {tuple(seen.shape[2:])}; geometric transforms belong under Views.shared'
            )
        canvas = images.shape[2:]
        metas = [dict(img_shape=canvas, pad_shape=canvas, ori_shape=canvas) for _ in samples]
        logits = self.mean_teacher.run(lambda model: model.encode_decode(seen, metas))
        mask = self._inside(samples, canvas, images.device)
        found = pseudo_label_map(logits, self.threshold, self.ignore_index, self.weighting, mask)
        self._count(logits, found, samples, mask)
        labelled = [
            SegDataSample(metainfo=sample.metainfo, gt_sem_seg=PixelData(data=label[None]))
            for sample, label in zip(samples, found.labels, strict=True)
        ]
        loss = self._sum(self.student(images, labelled, mode='loss'))
        if self.weighting == 'share':
            loss = loss * _mean_weight(found.weights, mask)
        return loss

    @staticmethod
    def _inside(samples: list, canvas: torch.Size, device: torch.device) -> Tensor | None:
        """``[B, 1, H, W]``: what is no padding; ``None`` when nothing is padded."""
        sizes = [tuple(sample.metainfo.get('img_shape', canvas)[:2]) for sample in samples]
        if all(size == tuple(canvas) for size in sizes):
            return None
        return inside(torch.tensor(sizes, device=device), tuple(canvas), tuple(canvas))

    def _count(self, logits: Tensor, found: Any, samples: list, mask: Tensor | None) -> None:
        """For the log: what is above the threshold, whether or not the rest is a label too."""
        labels = found.labels
        if self.weighting == 'share':
            labels = pseudo_label_map(logits, self.threshold, self.ignore_index, mask=mask).labels
        truth = None
        if all('gt_sem_seg' in sample for sample in samples):
            truth = torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in samples])
        self.statistics.update(labels, truth)


class ViewsPreprocessor(BaseDataPreprocessor):
    """The student's own preprocessing, of each view for itself.

    Args:
        own: that of the student.
    """

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, data: dict, training: bool = False) -> dict:
        """A batch of views, or one as the student knows it."""
        if not isinstance(data['inputs'], Mapping):
            return self.own(data, training)
        samples = data['data_samples']
        views = {
            name: self.own({'inputs': images, 'data_samples': samples[name]}, training)
            for name, images in data['inputs'].items()
        }
        return {key: {name: view[key] for name, view in views.items()} for key in ('inputs', 'data_samples')}


def _mean_weight(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the pixels that count."""
    return weights.mean() if mask is None else weights.sum() / mask.sum().clamp(min=1)


def _weight(value: float | Mapping, key: str) -> LossWeight:
    weight = LossWeight.parse(value, key)
    if weight.auto:
        raise ConfigError(f"{key}: 'auto' is for distillers; give a number or a schedule of one")
    return weight


def _check_pseudo_labels(options: Mapping | None, num_classes: int) -> tuple[Tensor, str]:
    """The threshold of each class, and the weighting."""
    defaults = {'threshold': 0.9, 'weighting': 'hard'}
    for name in options or {}:
        if name not in defaults:
            raise ConfigError(f'model.pseudo_labels: has no option {name!r}; {closest(name, defaults)}')
    options = defaults | dict(options or {})
    if options['weighting'] not in WEIGHTINGS:
        raise ConfigError(
            f'model.pseudo_labels.weighting: unknown weighting {options["weighting"]!r}; '
            f'{closest(str(options["weighting"]), WEIGHTINGS)}'
        )
    threshold = options['threshold']
    each = [threshold] * num_classes if isinstance(threshold, (int, float)) else list(threshold)
    if len(each) != num_classes or not all(0 <= value <= 1 for value in each):
        raise ConfigError(
            f'model.pseudo_labels.threshold: must be a number between 0 and 1, or one for each of the {num_classes} '
            f'classes, not {threshold!r}'
        )
    return torch.tensor(each), options['weighting']


def _check_student(student: nn.Module) -> None:
    head = getattr(student, 'decode_head', None)
    if not is_segmentor(student) or not hasattr(head, 'loss_decode') or head.out_channels != head.num_classes:
        raise ConfigError(
            f'student: {type(student).__name__} with {type(head).__name__} gives no softmax over the classes of each '
            'pixel, which pseudo label maps are made from; use an EncoderDecoder with a per-pixel decode head'
        )
