"""Writing a teacher cache for a YOLO config."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mmengine.config import Config
from ultralytics.cfg import DEFAULT_CFG_DICT
from ultralytics.utils.torch_utils import unset_deterministic

from kd_dense.cache.live import LiveOutputs
from kd_dense.cache.source import Source
from kd_dense.distillation import Distillers
from kd_dense.yolo.doctor import YoloToolbox
from kd_dense.yolo.teacher import adapter
from kd_dense.yolo.views import TeacherOutputs, YoloViews, check_arguments, fingerprint_of, with_live_teacher


class YoloSource(Source):
    """A YOLO config. Ultralytics' trainer makes student and data as in training, and writes to a temporary folder."""

    def __init__(self, cfg: Config, views: int, seed: int) -> None:
        self.toolbox = YoloToolbox(cfg)
        try:
            self.toolbox.check_config()
            self.toolbox.check_distillers()
            self.toolbox.open_data()
            trainer = self.toolbox.trainer
            check_arguments(trainer.args)
            self.bank = YoloViews(trainer.train_loader.dataset, views, seed)
        except BaseException:
            self.close()
            raise
        self.batch_size = trainer.batch_size
        workers = self.toolbox.settings.train.get('workers', DEFAULT_CFG_DICT['workers'])
        self.workers = min(workers, os.cpu_count() or 1)  # as Ultralytics does

    def fingerprint(self) -> dict[str, Any]:
        """Of the teacher, the training arguments, the data YAML and the images."""
        trainer = self.toolbox.trainer
        found = fingerprint_of(self.toolbox.settings.teacher, trainer.args, trainer.data)
        return {**found, 'images': self.bank.images()}

    def build(self) -> tuple[Distillers, LiveOutputs, Iterable[str] | None]:
        """The model that would be trained, with the live teacher."""
        model = with_live_teacher(self.toolbox.settings, self.toolbox.build_student())
        teacher = model.teacher_model
        return model.distillers, TeacherOutputs(model), adapter(teacher).class_names(teacher)

    def close(self) -> None:
        """Remove the folder, and put Ultralytics' global switches back."""
        self.toolbox.close()
        unset_deterministic()
