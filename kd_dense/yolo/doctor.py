"""What the doctor needs to know about Ultralytics."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.models.yolo.segment import SegmentationValidator
from ultralytics.utils.torch_utils import autocast, unwrap_model

from kd_dense.analysis.doctor.toolbox import ADAPTS, Classes, Data, LoadedTeacher, Metric, Preprocessing, Toolbox
from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.execution import Execution
from kd_dense.teacher import freeze
from kd_dense.yolo import mmdet_teacher
from kd_dense.yolo.config import load, read
from kd_dense.yolo.describe import class_names, describe
from kd_dense.yolo.model import COUNTS, DistillationModel, count_objects
from kd_dense.yolo.run import METRICS, TRAINERS, _arguments
from kd_dense.yolo.teacher import adapter, check_channels, check_class_taps, place, read_teacher
from kd_dense.yolo.trainer import require_dataset

VALIDATORS = {'detect': DetectionValidator, 'segment': SegmentationValidator}


class YoloToolbox(Toolbox):
    """A YOLO config. Ultralytics' trainer of the student alone builds student and data, as the training does.

    Args:
        config: a YOLO config, or its path.
    """

    name = 'ultralytics'
    packages = ('ultralytics',)
    needs_operators = False

    def __init__(self, config: str | Path | Config | Mapping) -> None:
        self.source = load(config)
        self.config = str(self.source.filename or '')
        wanted = str((self.source.get('train') or {}).get('device', ''))
        self.device = torch.device('cpu' if wanted == 'cpu' or not torch.cuda.is_available() else 'cuda')
        # Ultralytics writes its arguments and labels caches as soon as it is told what to train.
        self.folder = tempfile.TemporaryDirectory(prefix='kd_dense-doctor-')

    def check_config(self) -> None:
        """Unknown keys, and what is missing."""
        self.settings = read(self.source)
        if self.settings.adaptation is not None:
            raise ConfigError(f'adaptation: {ADAPTS}')
        if self.settings.teacher is None:
            raise ConfigError(
                'teacher: the config has no teacher and no distillers; the doctor looks at distillation configs'
            )

    def check_distillers(self) -> list[str]:
        """Types, options and loss weights."""
        distillers = self.settings.build_distillers()
        check_class_taps(distillers, self.settings.teacher)
        return list(distillers.methods)

    def load_teacher(self) -> LoadedTeacher:
        """The teacher of the file."""
        options = self.settings.teacher
        model, report = read_teacher(options)
        self.teacher = freeze(model)
        return LoadedTeacher(model, report, str(options['checkpoint']), tuple(options['allow']), options['trusted'])

    def open_data(self) -> Data:
        """Trainer and data loaders, in this process."""
        folder = Path(self.folder.name) / 'train'
        arguments = _arguments(self.settings, folder)
        self.task = arguments['task']
        self.data = require_dataset(self.settings.data, arguments.get('split', 'val'))
        arguments.update(workers=0, plots=False, compile=False, verbose=False)
        if ',' in str(arguments.get('device', '')):
            arguments['device'] = str(arguments['device']).split(',')[0]
        self.trainer = TRAINERS[self.task][False](overrides=arguments)
        self.trainer._setup_train()
        self.device = self.trainer.device
        loaders = self.trainer.train_loader, self.trainer.test_loader
        return Data(*(len(loader.dataset) for loader in loaders), self.trainer.batch_size)

    def build_student(self) -> nn.Module:
        """The student of the trainer, with the weights and the frozen layers that it starts with."""
        self.student = unwrap_model(self.trainer.model)
        return self.student

    # -- looking -------------------------------------------------------------------------------------------------------

    def unscored(self) -> str | None:
        """A teacher of MMDetection can not be scored."""
        return mmdet_teacher.UNSCORED if mmdet_teacher.is_config(self.settings.teacher['config']) else None

    def score(self, side: str, count: int | None) -> dict[str, float]:
        """By Ultralytics' validator, on a copy, which it fuses. A sample is not sorted by the shape of its images."""
        model = deepcopy(self.teacher if side == 'teacher' else self.student)
        train = {k: v for k, v in self.settings.train.items() if k in ('imgsz', 'batch', 'single_cls')}
        arguments = {
            'task': self.task,
            'mode': 'val',
            'data': self.settings.data,
            'plots': False,
            'verbose': False,
            'rect': True,
            **train,
            **self.settings.val,
            'device': self.trainer.args.device,
            'workers': 0,
        }
        loader = None if count is None else self._sample(count, get_cfg(overrides=arguments), model)
        folder = Path(self.folder.name) / side
        validator = VALIDATORS[self.task](dataloader=loader, save_dir=folder, args=arguments)
        scores = validator(model=model)
        return {k: float(v) for k, v in scores.items() if k.startswith('metrics/')}

    def _sample(self, count: int, arguments: Any, model: nn.Module) -> DataLoader:
        images = self.data[self.trainer.args.split]
        stride = max(int(model.stride.max()), 32)
        dataset = build_yolo_dataset(
            arguments, images, arguments.batch, self.data, mode='val', rect=False, stride=stride
        )
        indices = np.linspace(0, len(dataset) - 1, count).astype(int).tolist()
        return DataLoader(dataset, arguments.batch, sampler=indices, collate_fn=dataset.collate_fn)

    def metric(self) -> Metric:
        """What a comparison of runs counts too."""
        key = METRICS[self.task]
        return Metric(key, key.removeprefix('metrics/').removesuffix('(B)'), 100.0)

    def classes(self) -> Classes:
        """Of the data set, and of the teacher's model."""
        teacher = adapter(self.teacher).class_names(self.teacher)
        return Classes(class_names(self.student), teacher, self.settings.teacher['classes'])

    def preprocessing(self) -> Preprocessing:
        """All models of Ultralytics see RGB in 0..1."""
        check_channels(self.teacher, self.student)
        teacher = adapter(self.teacher).describe(self.teacher)
        return Preprocessing(describe(self.student).normalization, teacher.normalization)

    # -- training steps ------------------------------------------------------------------------------------------------

    def join(self) -> Distillers:
        """:class:`~kd_dense.yolo.DistillationModel` around the models that were built before."""
        distillers = self.settings.build_distillers()
        teacher, execution = place(self.teacher, self.student), Execution.of(self.settings.teacher)
        self.model = DistillationModel(self.student, teacher, distillers, execution)
        self.trainer.model = self.model
        self.trainer._model_train()
        return distillers

    def batches(self, count: int) -> Iterator[dict]:
        """From the trainer's loader; it begins anew where it ends too soon."""
        done = 0
        while done < count:
            for batch in self.trainer.train_loader:
                counts = count_objects(batch)
                batch = self.trainer.preprocess_batch(batch)
                batch[COUNTS] = counts
                yield batch
                done += 1
                if done == count:
                    break

    def step(self, batch: dict) -> Tensor:
        """The student's own loss, per image, in a step with distillation."""
        parts, _ = self.model.loss(batch)
        return parts[:-1].sum() / batch['img'].shape[0]

    def student_step(self, batch: dict) -> Tensor:
        """Without taps, teacher or distillers."""
        parts, _ = self.student.loss(batch, self.student(batch['img']))
        return parts.sum() / batch['img'].shape[0]

    def teacher_step(self, batch: dict) -> None:
        """As :meth:`DistillationModel.loss` runs it."""
        distillers = self.model.distillers
        taps = distillers.taps('teacher', distillers.active(self.model.progress))
        self.model._teacher(taps, batch['img'], adapter(self.teacher).forward_for(self.teacher, taps))

    def precision(self) -> AbstractContextManager:
        """As Ultralytics' trainer decides."""
        kind = torch.bfloat16 if self.trainer.args.amp == 'bf16' else self.trainer.amp
        return autocast(kind, device=self.device.type)

    def close(self) -> None:
        """Remove what Ultralytics has written."""
        self.folder.cleanup()
