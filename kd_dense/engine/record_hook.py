"""Writes down what a run achieved, for the comparison of runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from kd_dense.analysis.record import RunRecord
from kd_dense.checkpoint import atomic_write
from kd_dense.registry import HOOKS

_KEY = 'kd_dense_record'


@HOOKS.register_module()
class RecordHook(Hook):
    """Collects the validation curve and writes ``work_dir/record.json`` when training ends.

    The curve so far lies in ``work_dir/curve.json``, the time in checkpoints, so that a resumed run has the whole of
    both.

    Args:
        name: ``'student'`` (alone), ``'distilled'``, ``'adapted'`` or ``'teacher'``.
        seed: of the run.
        toolbox: ``'mmseg'`` or ``'mmdet'``.
        metric: key of the validation metric that counts, ``mIoU`` say.
        percent: factor that turns the metric into percent.
        config: path of the config, for the reader.
    """

    priority = 'LOW'  # after the evaluation, before the checkpoint is written

    def __init__(self, name: str, seed: int, toolbox: str, metric: str, percent: float = 1.0, config: str = '') -> None:
        self.fields = dict(name=name, seed=seed, toolbox=toolbox, metric=metric.rpartition('/')[2], config=config)
        self.metric, self.percent = metric, percent
        self.curve: list[list[float]] = []
        self.per_class: dict[str, float] = {}
        self.seconds = 0.0
        self._started = 0.0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._started = time.perf_counter()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seconds += time.perf_counter() - self._started

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if metrics and self.metric in metrics:
            # A resumed run may validate again what an interrupted one had validated already.
            self.curve = [point for point in self.curve if point[0] < runner.iter]
            self.curve.append([runner.iter, float(metrics[self.metric]) * self.percent])
            if is_main_process():
                with atomic_write(Path(runner.work_dir) / 'curve.json') as file:
                    file.write(json.dumps(self.curve).encode())
            # CocoMetric(classwise=True) adds coco/CLASS_precision
            suffix = '_precision'
            self.per_class = {
                k.rpartition('/')[2].removesuffix(suffix): float(v) * self.percent
                for k, v in metrics.items()
                if k.endswith(suffix) and v == v
            }

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint[_KEY] = {'seconds': self.seconds}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and _KEY in checkpoint:
            self.seconds = checkpoint[_KEY]['seconds']

    def before_train(self, runner: Runner) -> None:
        path = Path(runner.work_dir) / 'curve.json'
        if runner.iter and path.is_file():
            self.curve = [point for point in json.loads(path.read_text()) if point[0] <= runner.iter]

    def after_train(self, runner: Runner) -> None:
        if not is_main_process() or not self.curve:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        student = getattr(model, 'student', model)
        extra = sum(p.numel() for p in model.distillers.parameters()) if hasattr(model, 'distillers') else 0
        RunRecord(
            value=self.curve[-1][1],
            curve=self.curve,
            per_class=self.per_class,
            iterations=runner.max_iters,
            seconds=self.seconds,
            parameters=sum(p.numel() for p in student.parameters()),
            extra_parameters=extra,
            checkpoint=_last_checkpoint(Path(runner.work_dir)),
            finished=True,
            **self.fields,
        ).save(Path(runner.work_dir) / 'record.json')


def _last_checkpoint(work_dir: Path) -> str:
    pointer = work_dir / 'last_checkpoint'
    return pointer.read_text().strip() if pointer.is_file() else ''
