"""What the benchmark needs to know about MMSegmentation and MMDetection."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_dense.analysis.benchmark import made_up
from kd_dense.analysis.benchmark.bench import Bench, Facts, Options, Work
from kd_dense.analysis.doctor.toolbox import LoadedTeacher
from kd_dense.analysis.doctor.watch import at_full_strength
from kd_dense.analysis.doctor.weights import about_weights
from kd_dense.cache.of_batch import read_batch, write_batch
from kd_dense.cache.teacher import FIELD, as_field
from kd_dense.context import Context, TeacherRoIs
from kd_dense.engine.amp import set_precision
from kd_dense.engine.doctor import MMToolbox
from kd_dense.errors import ConfigError
from kd_dense.models.build import build_model, model_config
from kd_dense.models.describe import is_segmentor
from kd_dense.models.distillation import Distillation, check_teacher
from kd_dense.teacher import freeze


class MMBench(Bench):
    """A distillation config of MMSegmentation or MMDetection, with its own optimizer and made-up images.

    Args:
        cfg: the config; left as it is.
        options: see :class:`~kd_dense.analysis.benchmark.bench.Options`.

    Raises:
        ConfigError: it is no distillation config.
    """

    rivals = ('student', 'mmrazor-style', 'cached')

    def __init__(self, cfg: Config, options: Options) -> None:
        self.options = options
        self.toolbox = _WithoutData(cfg, options)
        self.cfg = self.toolbox.cfg
        self.name = Path(self.toolbox.config or 'config').stem
        self.device = self.toolbox.device

    def distillers(self) -> Mapping[str, Mapping]:
        """Those of the config."""
        return self.cfg.model.distillers

    def prepare(self) -> Facts:
        """Student, teacher, and one batch through the student's data preprocessor."""
        toolbox = self.toolbox
        set_precision(self.cfg, False)
        self.optim_wrapper = _every_step(self.cfg.get('optim_wrapper'))
        toolbox.check_config()
        teacher = toolbox.load_teacher().model
        student = toolbox.build_student()
        size, padded = (self.options.image_size, False) if self.options.image_size else image_size(self.cfg, student)
        if hasattr(student.data_preprocessor, 'size'):
            student.data_preprocessor.size = size
        if hasattr(student.data_preprocessor, 'batch_augments'):
            student.data_preprocessor.batch_augments = None  # they would change the size from batch to batch
        count = self.options.batch or (self.cfg.get('train_dataloader') or {}).get('batch_size')
        if not count:
            raise ConfigError('train_dataloader.batch_size: the config has none; give --batch N')
        self.batch = student.data_preprocessor(
            made_up_batch(self.cfg, student, size, count, padded, self.options), True
        )
        wrapper = self._optimizer(student)
        return Facts(
            toolbox=toolbox.name,
            device=self.device.type,
            image_size=tuple(self.batch['inputs'].shape[2:]),
            batch=count,
            optimizer=type(wrapper.optimizer).__name__,
            precision='fp32' if type(wrapper) is OptimWrapper else 'mixed precision',
            random_teacher=self.options.random_teacher,
            student_parameters=sum(p.numel() for p in student.parameters()),
            teacher_parameters=sum(p.numel() for p in teacher.parameters()),
        )

    @contextmanager
    def variant(self, distillers: Mapping[str, Mapping], against: Sequence[str]) -> Iterator[dict[str, Work]]:
        """Training steps as MMEngine's loop and :class:`~kd_dense.engine.DistillationHook` make them."""
        toolbox = self.toolbox
        self.cfg.model.distillers = distillers
        student_alone = self._training(toolbox.student, self._optimizer(toolbox.student.train()))
        joined = toolbox.join()
        nothing, _ = about_weights(joined)
        if nothing is not None:
            raise ConfigError(nothing)
        model = toolbox.model
        wrapper = self._optimizer(model)
        with at_full_strength(joined):
            asked = self._asked(model, wrapper)

        def teacher() -> None:
            with wrapper.optim_context(model):
                toolbox.teacher_step(self.batch)
                for ask in asked:
                    ask()

        works = {
            'student': student_alone,
            'teacher': Work(teacher),
            'step': self._distilling(model, wrapper),
        }
        with ExitStack() as stack:
            stack.enter_context(at_full_strength(joined))
            if 'mmrazor-style' in against:
                rival = MMRazorStyle(toolbox.student, toolbox.teacher, distillers, self._teacher_options())
                stack.enter_context(at_full_strength(rival.to(self.device).train().distillers))
                works['mmrazor-style'] = self._training(rival, self._optimizer(rival))
            if 'cached' in against:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='kd_dense-benchmark-')))
                cached = self._cached(model, distillers, folder)
                stack.enter_context(at_full_strength(cached.distillers))
                works['cached'] = self._reading(self._distilling(cached, self._optimizer(cached)), cached)
            yield works

    def _asked(self, model: Distillation, wrapper: OptimWrapper) -> list[Callable[[], object]]:
        """What distillers ask of the teacher's RoI head about the student's regions, to be asked again.

        It is work of the teacher behind its deepest tap, which nothing can do without.
        """
        asked: list[Callable[[], object]] = []
        context = model.context

        def listening(*args: Any) -> Context:
            found = context(*args)
            if found.teacher_rois is not None:
                found.teacher_rois = _Listening(found.teacher_rois, asked)
            return found

        model.context = listening
        try:
            with wrapper.optim_context(model):  # the features that it looks at are in the precision of the training
                model._run_forward(self.batch, mode='loss')
        finally:
            del model.context
        return asked

    def _cached(self, model: Distillation, distillers: Mapping[str, Mapping], folder: Path) -> Distillation:
        """The same student, with a cache of what the teacher gives for the batch in its place."""
        inputs, samples = self.batch['inputs'], self.batch['data_samples']
        context = model.context(inputs, samples)
        values = model._teacher_values(inputs, samples, model.distillers.methods, context)
        write_batch(folder, model.distillers, values, len(samples))
        options = dict(self._teacher_options(), config=self.cfg.model.teacher['config'], cache=str(folder))
        rival = Distillation(self.toolbox.student, options, distillers).to(self.device).train()
        rival.progress = 0.0
        return rival

    def _reading(self, work: Work, model: Distillation) -> Work:
        """Before the forward, what belongs to the images is read."""

        def forward() -> Tensor:
            records = read_batch(model.teacher.cache, self.device)
            for sample, record in zip(self.batch['data_samples'], records, strict=True):
                sample.set_field(as_field(record), FIELD)
            return work.forward()

        return replace(work, forward=forward)

    def _teacher_options(self) -> dict:
        return {k: v for k, v in check_teacher(self.cfg.model.teacher).items() if k in ('classes', 'scale')}

    def _optimizer(self, model: nn.Module) -> OptimWrapper:
        """That of the config, with learning rate 0."""
        wrapper = build_optim_wrapper(model, copy.deepcopy(self.optim_wrapper))
        for group in wrapper.optimizer.param_groups:
            group['lr'] = 0.0
        return wrapper

    def _distilling(self, model: Distillation, wrapper: OptimWrapper) -> Work:
        """:meth:`_training`, and what the hook does after a step."""

        def update(loss: Tensor) -> None:
            wrapper.update_params(loss)
            model.distillers.verify_gradients()  # in the first step; ends the watch over the connectors
            model.distillers.after_step(0.0)

        return self._training(model, wrapper, update)

    def _training(
        self, model: nn.Module, wrapper: OptimWrapper, update: Callable[[Tensor], None] | None = None
    ) -> Work:
        """What ``model.train_step`` does with a batch that is preprocessed already."""

        def forward() -> Tensor:
            with wrapper.optim_context(model):
                losses = model._run_forward(self.batch, mode='loss')
            return model.parse_losses(losses)[0]

        return Work(forward, update or wrapper.update_params, [model])


class _Listening:
    """A :class:`~kd_dense.context.TeacherRoIs` that notes what it is asked."""

    def __init__(self, teacher_rois: TeacherRoIs, asked: list[Callable[[], object]]) -> None:
        self._teacher_rois, self._asked = teacher_rois, asked

    def boxes(self, features: list[Tensor], rois: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        self._asked.append(partial(self._teacher_rois.boxes, features, rois.detach(), stage))
        return self._teacher_rois.boxes(features, rois, stage)

    def masks(self, features: list[Tensor], rois: Tensor, stage: int) -> Tensor:
        self._asked.append(partial(self._teacher_rois.masks, features, rois.detach(), stage))
        return self._teacher_rois.masks(features, rois, stage)


class MMRazorStyle(Distillation):
    """The same student, taps, connectors and losses, with the teacher run as MMRazor's ``SingleTeacherDistill`` does.

    For comparison only. The teacher computes its whole training loss, without a graph: head, target assignment and
    losses run, and the result is thrown away. It is in training mode but for its batch norms, with no in-place
    operations; taps of both models stay alive until the next step.

    Source: open-mmlab/mmrazor, ``mmrazor/models/algorithms/distill/configurable/single_teacher_distill.py``.

    Args:
        student: shared with what it is compared to.
        teacher: a loaded teacher; copied, because its mode is another one.
        distillers: as for :class:`~kd_dense.Distillation`.
        options: of the config's ``teacher``: ``classes``, ``scale``.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, distillers: Mapping[str, Mapping], options: Mapping[str, Any]
    ) -> None:
        super().__init__(student, dict(options, config=copy.deepcopy(teacher)), distillers)
        self.progress = 0.0
        self.kept: tuple = ()

    def train(self, mode: bool = True) -> MMRazorStyle:
        """The teacher too, but for its batch norms."""
        super().train(mode)
        teacher = self.__dict__.get('teacher')
        for module in teacher.model.modules() if teacher is not None else ():
            module.training = mode and not isinstance(module, _BatchNorm)
            if getattr(module, 'inplace', False):
                module.inplace = False
        return self

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'loss') -> dict[str, Any]:
        """Losses of the student and of the distillers."""
        self.kept = ()  # its recorders are emptied here, not when the losses are formed
        active = self.distillers.active(self.progress)
        student_taps, teacher_taps = self.distillers.taps('student', active), self.distillers.taps('teacher', active)
        context = self.context(inputs, data_samples)
        images = inputs if self.teacher.remap is None else self.teacher.remap(inputs, context.image_sizes)
        with torch.no_grad(), teacher_taps.record():
            self.teacher.model(images, data_samples, mode='loss')
            theirs = teacher_taps.take()
        with student_taps.record():
            losses = self.student(inputs, data_samples, mode='loss')
            ours = student_taps.take()
        self.kept = dict(ours), dict(theirs)
        distilled = self.distillers(ours, theirs, context, lambda: self.parse_losses(losses)[0])
        return losses | {f'kd.{name}': value for name, value in distilled.items()}


class _WithoutData(MMToolbox):
    """The doctor's view of a config, without data set, pretrained weights and, if wanted, a trained teacher."""

    def __init__(self, cfg: Config, options: Options) -> None:
        super().__init__(cfg)
        self.random_teacher, self.seed = options.random_teacher, options.seed

    def load_teacher(self) -> LoadedTeacher:
        """The teacher of the file, or at its initialisation."""
        if not self.random_teacher:
            try:
                return super().load_teacher()
            except ConfigError as error:
                if not str(error).startswith('teacher.checkpoint'):
                    raise
                raise ConfigError(
                    f'{error}; or measure with --random-teacher: weights do not change the time'
                ) from None
        options = check_teacher(self.cfg.model.teacher)
        self.teacher = freeze(_initialised(options['config'], 'teacher.config', self.seed)).to(self.device)
        return LoadedTeacher(self.teacher, None, None)

    def build_student(self) -> nn.Module:
        """The student of the config at its initialisation."""
        source, preprocessor = self.cfg.model.student, self.cfg.model.get('data_preprocessor')
        preprocessor = self.cfg.get('data_preprocessor') if preprocessor is None else preprocessor
        if isinstance(source, Mapping):
            source = {'_scope_': self.name, **source}
            if preprocessor is not None:
                source = {'data_preprocessor': preprocessor, **source}
        self.student = _initialised(source, 'student', self.seed).to(self.device)
        return self.student


def _initialised(source: Any, key: str, seed: int) -> nn.Module:
    """The model of a config with the initialisation that it asks for, but for weights in files."""
    if not isinstance(source, nn.Module):
        source = _without_files(model_config(source, key))
        set_random_seed(seed)
        model = build_model(source, key)
        if hasattr(model, 'init_weights'):
            model.init_weights()
        return model
    return source


def _without_files(cfg: Any) -> Any:
    """``cfg`` without what would load pretrained weights, changed in place."""
    if isinstance(cfg, dict):
        if cfg.get('pretrained'):
            cfg['pretrained'] = None
        if isinstance(cfg.get('init_cfg'), Mapping) and cfg['init_cfg'].get('type') == 'Pretrained':
            cfg['init_cfg'] = None
        for value in cfg.values():
            _without_files(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            _without_files(value)
    return cfg


def _every_step(wrapper: Mapping | None) -> dict:
    """The config of an optimizer wrapper that steps after every batch."""
    if not wrapper or 'optimizer' not in wrapper:
        raise ConfigError(
            'optim_wrapper: the config has none with an optimizer, so there is no training step to measure'
        )
    return Config(dict(copy.deepcopy(dict(wrapper)), accumulative_counts=1))._cfg_dict


# -- the batch ---------------------------------------------------------------------------------------------------------


def image_size(cfg: Config, student: nn.Module) -> tuple[tuple[int, int], bool]:
    """``(H, W)`` of the images that the training of a config sees, and whether they are padded to it.

    That is the fixed size of the student's data preprocessor, else that of the last crop or padding of the pipeline,
    else the largest scale of the last resizing, on its side; such images keep their shapes, and a batch is padded.

    Raises:
        ConfigError: none of these.
    """
    size = getattr(student.data_preprocessor, 'size', None)
    if size is not None:
        return tuple(size), False
    transforms = list(_transforms(_pipeline(cfg.get('train_dataloader') or {})))
    for transform in reversed(transforms):
        kind = str(transform.get('type', '')).rpartition('.')[2]
        size = transform.get('size') if kind == 'Pad' else transform.get('crop_size') if kind == 'RandomCrop' else None
        if size is not None and transform.get('crop_type', 'absolute') == 'absolute':
            width, height = (size, size) if isinstance(size, int) else size
            return (height, width), False
    for transform in reversed(transforms):
        scales = transform.get('scales') or [transform.get('scale')]
        scales = [s for s in scales if isinstance(s, (list, tuple)) and all(isinstance(n, int) for n in s)]
        if 'Resize' in str(transform.get('type', '')) and scales:
            sides = max(scales, key=lambda s: s[0] * s[1])
            return (min(sides), max(sides)), True
    raise ConfigError('train_dataloader: its pipeline does not say how large images are; give --image-size H W')


def _pipeline(loader: Mapping) -> list:
    """The pipeline of the outermost data set that has one."""
    dataset = loader.get('dataset')
    while isinstance(dataset, Mapping):
        if dataset.get('pipeline'):
            return dataset['pipeline']
        inner = dataset.get('dataset') or dataset.get('datasets')
        dataset = inner[0] if isinstance(inner, (list, tuple)) and inner else inner
    return []


def _transforms(pipeline: Sequence) -> Iterator[Mapping]:
    """The transforms of a pipeline, with those inside of a choice."""
    for transform in pipeline:
        if isinstance(transform, (list, tuple)):
            yield from _transforms(transform)
        elif isinstance(transform, Mapping):
            yield transform
            yield from _transforms(transform.get('transforms') or ())


def made_up_batch(
    cfg: Config, student: nn.Module, size: tuple[int, int], count: int, padded: bool, options: Options
) -> dict:
    """What a data loader would give: ``count`` noisy images of ``size``, with label maps, or boxes and masks.

    Where images keep their shapes in training (``padded``), the last of several is a quarter narrower.
    """
    generator = torch.Generator().manual_seed(options.seed)
    mean = getattr(student.data_preprocessor, 'mean', None)
    channels = mean.numel() if isinstance(mean, Tensor) and mean.numel() > 1 else 3
    sizes = [size] * count
    if padded and count > 1:
        sizes[-1] = (size[0], 3 * size[1] // 4)
    images = [torch.randint(0, 256, (channels, *s), generator=generator, dtype=torch.uint8) for s in sizes]
    classes = max(
        (m.num_classes for m in student.modules() if isinstance(getattr(m, 'num_classes', None), int)), default=1
    )
    if is_segmentor(student):
        return dict(inputs=images, data_samples=[_label_sample(classes, s, generator, student) for s in sizes])
    masks = any(t.get('with_mask') for t in _transforms(_pipeline(cfg.get('train_dataloader') or {})))
    samples = [_box_sample(classes, s, i, masks, options.boxes, generator) for i, s in enumerate(sizes)]
    return dict(inputs=images, data_samples=samples)


def _label_sample(classes: int, size: tuple[int, int], generator: torch.Generator, student: nn.Module) -> Any:
    from mmseg.structures import SegDataSample

    head = student.decode_head[-1] if isinstance(student.decode_head, nn.ModuleList) else student.decode_head
    labels = made_up.label_map(classes, size, generator, getattr(head, 'ignore_index', 255))
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
    return SegDataSample(gt_sem_seg=PixelData(data=labels[None]), metainfo=meta)


def _box_sample(
    classes: int, size: tuple[int, int], index: int, masks: bool, count: int, generator: torch.Generator
) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = made_up.boxes(count, size, generator)
    instances = InstanceData(bboxes=boxes, labels=torch.randint(0, classes, (count,), generator=generator))
    if masks:
        instances.masks = BitmapMasks(made_up.ellipses(boxes, size).numpy().astype('uint8'), *size)
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0), img_id=index)
    return DetDataSample(gt_instances=instances, ignored_instances=InstanceData(bboxes=boxes[:0]), metainfo=meta)
