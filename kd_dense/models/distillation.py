"""One MMEngine model for MMSegmentation's segmentors and MMDetection's detectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_dense.cache.store import StoredCache
from kd_dense.cache.teacher import CachedTeacher
from kd_dense.context import Context
from kd_dense.distillation import Distillers, uncompiled
from kd_dense.distillers.base import Distiller
from kd_dense.errors import ConfigError, closest
from kd_dense.execution import EXECUTION_KEYS, Execution
from kd_dense.models.branches import only_tapped_branch
from kd_dense.models.build import build_model, build_teacher
from kd_dense.models.describe import describe, image_normalization, is_segmentor, probe_canvas
from kd_dense.models.rois import TeacherRoIs
from kd_dense.models.student_inside import StudentInside
from kd_dense.random_state import preserve_random_state
from kd_dense.registry import MODELS
from kd_dense.taps import Taps
from kd_dense.teacher import Remap, Teacher

MODEL_KEYS = ('student', 'teacher', 'distillers', 'probe_size', 'seed')
TEACHER_KEYS = ('config', 'checkpoint', 'allow', 'classes', 'scale', 'trusted', 'cache', *EXECUTION_KEYS)


@MODELS.register_module()
class Distillation(StudentInside):
    """A student that trains with its own loss and those of distillers, next to a frozen teacher.

    To its surroundings it is the student: ``state_dict`` gives and takes the student's plain weights, prediction is the
    student's, and attributes that it does not have are looked up on the student (hooks that set
    ``model.bbox_head.use_l1``, say). Only the training forward differs: teacher first, to its deepest tap and only if a
    distiller is active, then the student's own loss, then the distillers.

    It needs :class:`~kd_dense.engine.DistillationHook` among the ``custom_hooks``: the hook tells it the training
    progress, stores the distillation state in checkpoints, and checks class lists and gradients.

    Args:
        student: a config path (local or ``mmseg::...`` / ``mmdet::...``), a model dict, or a built module.
        teacher: a dict with
            ``config``: as for ``student``;
            ``checkpoint``: file (or URL) of its trained weights;
            ``allow``: prefixes of tensors that may be missing from or left over in the file;
            ``classes``: student class name -> teacher class name where they differ, or ``'ignore'`` not to compare the
                lists;
            ``scale``: size of the teacher's input relative to the student's;
            ``trusted``: read the file without restrictions on what it may execute;
            ``cache``: folder of a teacher cache, which takes the teacher's place, see :mod:`kd_dense.cache`;
            ``fuse``, ``precision``, ``channels_last``, ``compile``, ``tolerance``: how it is run, see
                :class:`~kd_dense.execution.Execution`.
            A built module, with its weights loaded, may stand in place of the dict.
        distillers: name -> ``dict(type=..., loss_weight=..., ...)``.
        probe_size: ``(H, W)`` of the dry forward that finds the shapes; see :func:`~kd_dense.models.describe.describe`.
        seed: of the initialisation of the connectors.
        data_preprocessor: MMEngine's runner hands a config's top-level one down to here; used when the student has
            none.

    Raises:
        ConfigError: unknown keys, types or taps, a teacher that is missing or does not fit, shapes that do not go
            together.
    """

    def __init__(
        self,
        student: str | Mapping | nn.Module,
        teacher: Mapping | nn.Module,
        distillers: Mapping[str, Mapping],
        probe_size: tuple[int, int] | None = None,
        seed: int = 0,
        data_preprocessor: Mapping | nn.Module | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            raise ConfigError(f'model: Distillation has no option {name!r}; {closest(name, MODEL_KEYS)}')
        teacher = check_teacher(teacher)
        if isinstance(student, Mapping) and data_preprocessor is not None:
            student = {'data_preprocessor': data_preprocessor, **student}
        student = build_model(student, 'student')
        super().__init__(student, getattr(student, 'data_preprocessor', None))
        with preserve_random_state():
            size = probe_canvas(student, probe_size)
            if teacher.get('cache'):
                self.teacher = CachedTeacher(StoredCache.load(teacher['cache']))
                described, meta = self.teacher.description(), self.teacher.meta
            else:
                allow, trusted = teacher.get('allow', ()), teacher.get('trusted', False)
                model, meta = build_teacher(teacher['config'], teacher.get('checkpoint'), allow, trusted)
                # the teacher's dry forward is of what it will see, whatever size it was trained on
                described = describe(model, tuple(int(n * teacher.get('scale', 1.0)) for n in size))
            self.distillers = Distillers(distillers)
            self.distillers.setup(describe(student, size, training=True), described, seed)
        if not teacher.get('cache'):
            remap = Remap(image_normalization(student), image_normalization(model), teacher.get('scale', 1.0))
            self.teacher = Teacher(
                model,
                None if remap.is_identity else remap,
                Execution.of(teacher),
                self.distillers.taps('teacher', self.distillers.methods).paths,
                lambda text: print_log(text, 'current'),
            )
        self.teacher_meta = meta
        self.teacher_classes = teacher.get('classes')
        self.progress: float | None = None
        self.gathered_distillation_state: dict[str, Tensor] | None = None  # under FSDP, by its wrapper
        self.iteration = self.epoch = 0
        if isinstance(self.teacher, CachedTeacher):
            print_log(str(self.teacher), 'current')
        else:
            print_log(f'teacher sees {self.teacher.remap or "the same images as the student"}', 'current')

    # -- what is beside the student ------------------------------------------------------------------------------------

    def distillation_state(self) -> dict[str, Tensor]:
        """What a checkpoint has beside the weights: connectors, calibrated loss weights, buffers of the distillers."""
        if self.gathered_distillation_state is not None:
            return self.gathered_distillation_state
        return self.distillers.state_dict()

    def load_distillation_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`distillation_state`.

        Raises:
            ConfigError: it belongs to other distillers.
        """
        try:
            self.distillers.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                f'distillers: the checkpoint was written with other distillers than this config has: {error}'
            ) from error

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> Distillation:
        super()._apply(fn, *args, **kwargs)
        if self.__dict__.get('teacher') is not None:
            self.teacher.follow(fn)
        return self

    # -- forward -------------------------------------------------------------------------------------------------------

    @torch.compiler.disable(recursive=False)  # Python around two models; those are compiled
    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor') -> Any:
        """As the student's own; with ``mode='loss'`` the distillers' losses are added under ``kd.name.loss``."""
        if mode != 'loss':
            return self.student(inputs, data_samples, mode=mode)
        if self.progress is None:
            raise ConfigError(
                "custom_hooks: Distillation needs dict(type='kd_dense.DistillationHook') there to know the "
                'training progress'
            )
        active = self.distillers.active(self.progress)
        if not active:
            return self._with_idle(self.student(inputs, data_samples, mode='loss'))
        context = self.context(inputs, data_samples)
        student_taps = self.distillers.taps('student', active)
        teacher_values = self._teacher_values(inputs, data_samples, active, context)
        context.image = inputs = self.distillers.view(inputs, context)
        with student_taps.record():
            if self.distillers.calibrates(active):
                losses = uncompiled(self.student, inputs, data_samples, mode='loss')
            else:
                losses = self.student(inputs, data_samples, mode='loss')
            student_values = student_taps.take()
        distilled = self.distillers(student_values, teacher_values, context, lambda: self.parse_losses(losses)[0])
        return self._with_idle(losses | {f'kd.{name}': value for name, value in distilled.items()})

    def _with_idle(self, losses: dict) -> dict:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            idle = self.distillers.idle(self.progress)
            if idle is not None:
                losses['kd.idle_loss'] = idle
        return losses

    def _teacher_values(
        self, inputs: Tensor, data_samples: list, active: Mapping[str, Distiller], context: Context
    ) -> dict[str, list[Tensor]]:
        if isinstance(self.teacher, CachedTeacher):
            return self.teacher(data_samples, self.distillers.tap_names('teacher', active))
        taps = self.distillers.taps('teacher', active)
        return self.teacher(
            taps, inputs, lambda images: self._run_teacher(images, data_samples, taps), context.image_sizes
        )

    @torch.compiler.disable(recursive=False)
    def _run_teacher(self, images: Tensor, data_samples: list, taps: Taps) -> None:
        model = self.teacher.model
        if all(path.split('.')[0] in ('backbone', 'neck') for path in taps.paths):
            model.extract_feat(images)  # no need of a head even in the first forward, which runs to the end
        else:
            with only_tapped_branch(model, taps):
                model(images, data_samples, mode='tensor')

    @torch.compiler.disable
    def context(self, inputs: Tensor, data_samples: list) -> Context:
        """What the distillers may know about this batch."""
        canvas = (int(inputs.shape[2]), int(inputs.shape[3]))
        sizes = [tuple(sample.metainfo.get('img_shape', canvas)[:2]) for sample in data_samples]
        padded = any(size != canvas for size in sizes)
        context = Context(
            canvas,
            torch.tensor(sizes, device=inputs.device) if padded else None,
            image=inputs,
            iteration=self.iteration,
            epoch=self.epoch,
            progress=self.progress,
        )
        if is_segmentor(self.student):
            context.label_map = torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in data_samples])
            context.ignore_index = getattr(self.student.decode_head, 'ignore_index', 255)
        else:
            instances = [sample.gt_instances for sample in data_samples]
            context.boxes = [getattr(i.bboxes, 'tensor', i.bboxes) for i in instances]
            context.labels = [i.labels for i in instances]
            if all('masks' in i for i in instances):
                context.masks = [i.masks for i in instances]
        if getattr(self.teacher.model, 'roi_head', None) is not None:
            remap = self.teacher.remap
            context.teacher_rois = TeacherRoIs(self.teacher.model, 1.0 if remap is None else remap.scale)
        return context


def check_teacher(teacher: Mapping | nn.Module) -> Mapping:
    """The value of ``teacher`` as a dict.

    Raises:
        ConfigError: no dict and no module, an unknown key, no ``config``, or a value that an option can not have.
    """
    teacher = {'config': teacher} if isinstance(teacher, nn.Module) else teacher
    if not isinstance(teacher, Mapping):
        raise ConfigError('teacher: must be a dict with the keys config and checkpoint')
    for name in teacher:
        if name not in TEACHER_KEYS:
            raise ConfigError(f'teacher: has no option {name!r}; {closest(name, TEACHER_KEYS)}')
    if 'config' not in teacher:
        raise ConfigError('teacher.config: is missing; give the config that the teacher was trained with')
    Execution.of(teacher)
    return teacher
