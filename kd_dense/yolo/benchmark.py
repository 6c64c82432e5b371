"""What the benchmark needs to know about Ultralytics."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from ultralytics.nn.distill_model import DistillationModel as UltralyticsDistillationModel
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, guess_model_task, yaml_model_load
from ultralytics.utils import YAML
from ultralytics.utils.checks import check_file
from ultralytics.utils.torch_utils import ModelEMA, unset_deterministic

from kd_dense.analysis.benchmark import made_up
from kd_dense.analysis.benchmark.bench import Bench, Facts, Options, Work
from kd_dense.analysis.doctor.toolbox import LoadedTeacher
from kd_dense.analysis.doctor.watch import at_full_strength
from kd_dense.analysis.doctor.weights import about_weights
from kd_dense.cache.of_batch import read_batch, write_batch
from kd_dense.cache.store import StoredCache
from kd_dense.cache.teacher import FIELD, CachedTeacher
from kd_dense.errors import ConfigError
from kd_dense.models.build import build_model
from kd_dense.teacher import freeze
from kd_dense.yolo import mmdet_teacher
from kd_dense.yolo.config import load, read
from kd_dense.yolo.doctor import YoloToolbox
from kd_dense.yolo.model import DistillationModel

#: Training arguments that would change the batch from step to step, or ask for more than a step.
FIXED = {
    'multi_scale': 0.0,
    'fraction': 1.0,
    'cache': False,
    'time': None,
    'classes': None,
}
#: What Ultralytics chooses for ``optimizer='auto'`` in a run of more than 10,000 steps.
LONG_RUN = 'MuSGD'


class YoloBench(Bench):
    """A YOLO config: Ultralytics' own trainer on images that are made up, in a temporary folder.

    Args:
        config: a YOLO config, or its path; left as it is.
        options: see :class:`~kd_dense.analysis.benchmark.bench.Options`.
    """

    rivals = ('student', 'native', 'cached')

    def __init__(self, config: str | Path | Config | Mapping, options: Options) -> None:
        source = load(config)
        self.source, self.options = Config(source.to_dict(), filename=source.filename), options
        self.name = Path(source.filename or 'yolo').stem
        self.folder = tempfile.TemporaryDirectory(prefix='kd_dense-benchmark-')
        self.toolbox = _RandomTeacher(self.source, options)

    @property
    def device(self) -> torch.device:  # known when the trainer is made
        """Where the trainer puts the models."""
        return self.toolbox.device

    def distillers(self) -> Mapping[str, Mapping]:
        """Those of the config."""
        return self.settings.distillers

    def prepare(self) -> Facts:
        """Write images, and let Ultralytics' trainer make student, optimizer settings and one batch of them."""
        toolbox, options = self.toolbox, self.options
        self.settings = read(self.source)
        train = dict(self.settings.train)
        size = _square(options.image_size) or train.get('imgsz', 640)
        batch = options.batch or train.get('batch', 16)
        if not isinstance(batch, int) or batch < 1:
            raise ConfigError(f'train.batch: {batch} lets Ultralytics choose; give --batch N')
        optimizer = train.get('optimizer', 'auto')
        train.update(FIXED, imgsz=size, batch=batch, nbs=batch, seed=options.seed)
        train.update(optimizer=LONG_RUN if optimizer == 'auto' else optimizer)
        toolbox.names = class_names_of(self.settings.data, self.settings.student)
        threads = torch.get_num_threads()
        data = write_images(
            Path(self.folder.name), batch, size, toolbox.names, options, _image_channels(self.settings.student)
        )
        toolbox.source = Config({**self.source.to_dict(), 'train': train, 'data': str(data)})
        toolbox.check_config()
        teacher = toolbox.load_teacher().model
        toolbox.open_data()
        student = toolbox.build_student()
        (self.batch,) = toolbox.batches(1)
        torch.set_num_threads(threads)  # its trainer has chosen another number on a CPU
        trainer = toolbox.trainer
        return Facts(
            toolbox=toolbox.name,
            device=self.device.type,
            image_size=tuple(self.batch['img'].shape[2:]),
            batch=self.batch['img'].shape[0],
            optimizer=type(trainer.optimizer).__name__,
            precision='mixed precision' if trainer.amp else 'fp32',
            random_teacher=options.random_teacher,
            student_parameters=sum(p.numel() for p in student.parameters()),
            teacher_parameters=sum(p.numel() for p in teacher.parameters()),
        )

    @contextmanager
    def variant(self, distillers: Mapping[str, Mapping], against: Sequence[str]) -> Iterator[dict[str, Work]]:
        """Training steps as Ultralytics' trainer makes them, moving average included."""
        toolbox = self.toolbox
        # before anything taps the student: the built-in model of Ultralytics puts hooks on it for good
        native = self._native() if 'native' in against else None
        student_alone = self._training(toolbox.student.train())
        toolbox.settings.distillers = dict(distillers)
        toolbox.check_distillers()
        joined = toolbox.join()
        nothing, _ = about_weights(joined)
        if nothing is not None:
            raise ConfigError(nothing)

        def teacher() -> None:
            with toolbox.precision():
                toolbox.teacher_step(self.batch)

        works = {
            'student': student_alone,
            'teacher': Work(teacher),
            'step': self._distilling(toolbox.model),
        }
        if native is not None:
            works['native'] = self._training(native)
        with ExitStack() as stack:
            stack.enter_context(at_full_strength(joined))
            if 'cached' in against:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='kd_dense-benchmark-')))
                cached = self._cached(folder)
                stack.enter_context(at_full_strength(cached.distillers))
                works['cached'] = self._reading(self._distilling(cached), StoredCache.load(folder))
            yield works

    def _cached(self, folder: Path) -> DistillationModel:
        """The same student, with a cache of what the teacher gives for the batch in its place."""
        model, images = self.toolbox.model, self.batch['img']
        values = model.teacher_outputs(images, model.distillers.methods)
        write_batch(folder, model.distillers, values, len(images))
        distillers = self.toolbox.settings.build_distillers()
        return DistillationModel(self.toolbox.student, CachedTeacher(StoredCache.load(folder)), distillers).train()

    def _reading(self, work: Work, cache: StoredCache) -> Work:
        """Before the forward, what belongs to the images is read."""

        def forward() -> Tensor:
            self.batch[FIELD] = read_batch(cache, self.device)
            return work.forward()

        return replace(work, forward=forward)

    def _native(self) -> nn.Module:
        """Ultralytics' own distillation of the same student by the same teacher, on copies."""
        self.toolbox.student.criterion = None  # made anew when it is needed
        student, teacher = deepcopy(self.toolbox.student), deepcopy(self.toolbox.teacher)
        # its trainer converts the student to channels-last before there is a teacher
        teacher = teacher.to(memory_format=torch.contiguous_format)
        return UltralyticsDistillationModel(teacher, student).train()

    def _distilling(self, model: DistillationModel) -> Work:
        """:meth:`_training`, and what our trainer does after a step."""

        def after() -> None:
            model.distillers.verify_gradients()  # in the first step; ends the watch over the connectors
            model.distillers.after_step(0.0)

        return self._training(model, after)

    def _training(self, model: nn.Module, after: Callable[[], None] = lambda: None) -> Work:
        """Forward, backward, clipping, optimizer and moving average, by the trainer's own methods."""
        trainer = self.toolbox.trainer
        arguments = trainer.args
        optimizer = trainer.build_optimizer(model, arguments.optimizer, 0.0, arguments.momentum, arguments.weight_decay)
        average = ModelEMA(model)

        def forward() -> Tensor:
            with self.toolbox.precision():
                loss, _ = model(self.batch)
            return loss.sum()

        def update(loss: Tensor) -> None:
            trainer.model, trainer.optimizer, trainer.ema = model, optimizer, average
            trainer.scaler.scale(loss).backward()
            trainer.optimizer_step()
            after()

        return Work(forward, update, [model])

    def close(self) -> None:
        """Remove images and what Ultralytics has written, and put its global switches back."""
        self.toolbox.close()
        self.folder.cleanup()
        unset_deterministic()


class _RandomTeacher(YoloToolbox):
    """The doctor's view of a config, if wanted with a teacher at its initialisation."""

    names: Sequence[str] = ()

    def __init__(self, config: Config, options: Options) -> None:
        super().__init__(config)
        self.options = options

    def load_teacher(self) -> LoadedTeacher:
        """The teacher of the file, or what ``teacher.config`` describes."""
        if not self.options.random_teacher:
            try:
                return super().load_teacher()
            except ConfigError as error:
                if not str(error).startswith('teacher.checkpoint: there is no file'):
                    raise
                raise ConfigError(
                    f'{error}; or measure with --random-teacher: weights do not change the time'
                ) from None
        config = self.settings.teacher['config']
        if config is None:
            raise ConfigError(
                'teacher.config: is missing, so what the teacher is can not be known without its file; name its model '
                "YAML, such as 'yolo11m.yaml'"
            )
        torch.manual_seed(self.options.seed)
        if mmdet_teacher.is_config(config):
            model = build_model(config, 'teacher.config', pretrained=False)
            model.dataset_meta = {}
        else:
            try:
                yaml = yaml_model_load(config)
            except (FileNotFoundError, OSError):
                raise ConfigError(f'teacher.config: {config} is no model YAML that Ultralytics knows') from None
            kind = SegmentationModel if guess_model_task(yaml) == 'segment' else DetectionModel
            model = kind(yaml, ch=_image_channels(self.settings.student), nc=len(self.names), verbose=False)
            model.names = dict(enumerate(self.names))
        self.teacher = freeze(model)
        return LoadedTeacher(model, None, None)


# -- the images --------------------------------------------------------------------------------------------------------


def class_names_of(data: str | None, student: str | None) -> list[str]:
    """The class names of a data YAML; where that is not at hand, as many as the model YAML of the student has."""
    path = check_file(data, hard=False) if data else ''
    content = YAML.load(path) if path and Path(path).is_file() else {}
    names = content.get('names')
    if names is not None:
        return [str(n) for n in (names.values() if isinstance(names, Mapping) else names)]
    count = content.get('nc') or _model_yaml(student).get('nc', 80)
    return [f'class_{i}' for i in range(count)]


def _model_yaml(student: str | None) -> dict[str, Any]:
    """The YAML of a student that is given as one; nothing for weights, or for what there is not."""
    if not student or str(student).endswith('.pt'):
        return {}
    try:
        return yaml_model_load(student)
    except (FileNotFoundError, OSError):
        return {}


def _image_channels(student: str | None) -> int:
    yaml = _model_yaml(student)
    return yaml.get('channels', yaml.get('ch', 3))


def _square(size: tuple[int, int] | None) -> int | None:
    if size is not None and size[0] != size[1]:
        raise ConfigError(f'--image-size: Ultralytics trains on squares, not on {size[0]} x {size[1]}; give one number')
    return size and size[0]


def write_images(
    folder: Path, count: int, size: int, names: Sequence[str], options: Options, image_channels: int = 3
) -> Path:
    """A data set of ``count`` images of noise with boxes and polygons, and its YAML, whose path is returned."""
    generator = torch.Generator().manual_seed(options.seed)
    for part in ('images', 'labels'):
        (folder / part).mkdir()
    noise = np.random.default_rng(options.seed).integers(0, 256, (size // 8 + 1, size // 8 + 1, 3), dtype=np.uint8)
    first = folder / 'images' / '0.png'
    cv2.imwrite(str(first), cv2.resize(noise, (size, size)))
    for i in range(count):
        if i:
            shutil.copy(first, first.with_name(f'{i}.png'))
        boxes = made_up.boxes(options.boxes, (size, size), generator) / size
        classes = torch.randint(0, len(names), (options.boxes,), generator=generator)
        rows = [_polygon(int(c), *box) for c, box in zip(classes, boxes.tolist(), strict=True)]
        (folder / 'labels' / f'{i}.txt').write_text('\n'.join(rows))
    data = folder / 'data.yaml'
    content = {'path': str(folder), 'train': 'images', 'val': 'images', 'names': dict(enumerate(names))}
    YAML.save(data, content | ({'channels': image_channels} if image_channels != 3 else {}))
    return data


def _polygon(label: int, x1: float, y1: float, x2: float, y2: float) -> str:
    """One line of a label file: an octagon with the box ``x1, y1, x2, y2`` (0..1), whose box is read for detection."""
    angles = np.arange(8) * np.pi / 4
    x = (x1 + x2) / 2 + (x2 - x1) / 2 * np.cos(angles)
    y = (y1 + y2) / 2 + (y2 - y1) / 2 * np.sin(angles)
    return ' '.join([str(label), *(f'{v:.6f}' for point in zip(x, y, strict=True) for v in point)])
