"""The MMEngine model of mean-teacher domain adaptation, for segmentors and detectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from kd_dense.adaptation.mean_teacher import MeanTeacher
from kd_dense.adaptation.statistics import BoxStatistics, MapStatistics
from kd_dense.errors import ConfigError, closest
from kd_dense.loss_weight import LossWeight
from kd_dense.losses.adaptation import BEHAVIOURS, CONSISTENCY_WEIGHTS, ssda_terms
from kd_dense.models.build import build_model
from kd_dense.models.describe import is_detector, is_segmentor
from kd_dense.models.detector_labels import DetectorLabels
from kd_dense.models.segmentor_labels import SegmentorLabels
from kd_dense.models.student_inside import StudentInside
from kd_dense.random_state import preserve_random_state
from kd_dense.registry import MODELS, check_arguments

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
    """A student that adapts to a target domain without labels, taught by the moving average of itself.

    A batch has views, named by who looks at them (:class:`~kd_dense.adaptation.Views`): ``source``, under its labels;
    ``styled``, the same source images in the target's style, under the same labels; ``target``, and ``teacher``, the
    same target images as the mean teacher sees them, weakly augmented or in the source's style. ``styled`` may be left
    out, and ``teacher`` too: the teacher then sees ``target``. The loss is that of
    :func:`~kd_dense.losses.adaptation.ssda_terms`, with what the teacher is sure of as labels of ``target``: boxes of a
    detector, the classes of pixels of a segmentor. SSDA-YOLO is a method for detectors; its form for segmentation is
    our choice.

    To its surroundings it is the student: ``state_dict`` gives and takes the student's plain weights, prediction is the
    student's. It needs :class:`~kd_dense.engine.AdaptationHook`, which moves the teacher, stores it in checkpoints,
    and logs what became of the pseudo labels.

    Args:
        student: a config path (local, ``mmseg::...`` or ``mmdet::...``), a model dict, or a built module.
        mean_teacher: arguments of :class:`~kd_dense.adaptation.MeanTeacher`: ``decay``, ``buffers``, ``warmup``.
        pseudo_labels: of a segmentor: ``threshold`` (one, or one for each class; 0.9) and ``weighting``. ``'hard'``:
            pixels above the threshold are labels. ``'share'``: all pixels are, and their loss counts as much as the
            share of the pixels of the batch that are above, as in DAFormer (Hoyer et al., CVPR 2022), whose threshold
            is 0.968.

            Of a detector: :class:`~kd_dense.adaptation.box_options.BoxOptions`, ``score_threshold``, ``iou_threshold``,
            ``max_count``, ``weighting`` and ``empty``.
        pseudo_weight: of the loss under pseudo labels; a number or a schedule, as the ``loss_weight`` of a distiller
            (but not ``'auto'``): ``dict(value=1.0, start=0.1)`` trains on the source alone at first. ``None``: 1 for
            segmentors, as in DAFormer, and 0.005 for detectors, as in SSDA-YOLO.
        styled_weight: of the loss of styled images, likewise.
        consistency_weight: of the consistency of both styles, likewise; ``None``: that of the behaviour.
        behaviour: ``'fixed'`` or ``'official'``: see :func:`~kd_dense.losses.adaptation.ssda_terms`. ``'official'``
            also makes ``buffers='keep'`` the default of the mean teacher, and ``empty='artificial_box'`` that of the
            pseudo labels of a detector.
        data_preprocessor: MMEngine's runner hands a config's top-level one down to here; used when the student has
            none.

    Raises:
        ConfigError: unknown keys, or a student that is neither a segmentor with a softmax over its classes nor a
            detector of boxes alone.
    """

    def __init__(
        self,
        student: str | Mapping | nn.Module,
        mean_teacher: Mapping | None = None,
        pseudo_labels: Mapping | None = None,
        pseudo_weight: float | Mapping | None = None,
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
        labels = _labels_for(student)(student, pseudo_labels, behaviour)
        super().__init__(student, ViewsPreprocessor(student.data_preprocessor))
        options = {'buffers': 'keep' if behaviour == 'official' else 'average', **(mean_teacher or {})}
        check_arguments(MeanTeacher, options, 'model.mean_teacher', exclude={'student': None})
        with preserve_random_state():
            self.mean_teacher = MeanTeacher(student, **options)
        self.labels = labels
        pseudo_weight = labels.pseudo_weight if pseudo_weight is None else pseudo_weight
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
        self.progress: float | None = None

    @property
    def statistics(self) -> MapStatistics | BoxStatistics:
        """What became of the pseudo labels."""
        return self.labels.statistics

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
            pseudo = self.labels.loss(self.student, self.mean_teacher, inputs, data_samples)
        terms = ssda_terms(source, styled, pseudo, weights['pseudo'], weights['consistency'], self.behaviour)
        if styled is not None:
            terms['styled_loss'] = weights['styled'] * terms['styled_loss']
        logged = {k: v for k, v in losses.items() if 'loss' not in k}  # such as the accuracy on the source
        return logged | {f'adapt.{name}': value for name, value in terms.items()}

    def _sum(self, losses: dict) -> Tensor:
        return self.parse_losses(losses)[0]


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


def _weight(value: float | Mapping, key: str) -> LossWeight:
    weight = LossWeight.parse(value, key)
    if weight.auto:
        raise ConfigError(f"{key}: 'auto' is for distillers; give a number or a schedule of one")
    return weight


def _labels_for(student: nn.Module) -> type[SegmentorLabels | DetectorLabels]:
    if is_segmentor(student):
        return SegmentorLabels
    if is_detector(student):
        return DetectorLabels
    raise ConfigError(
        f'student: {type(student).__name__} predicts neither boxes (bbox_head, roi_head) nor the classes of pixels '
        "(decode_head); use one of MMDetection's or MMSegmentation's models that does"
    )
