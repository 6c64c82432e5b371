"""A run of Ultralytics' trainer in several processes without a GPU, which Ultralytics itself has for GPUs only.

Started by torchrun, with a config and a folder: trains, and leaves what each process had in ``FOLDER/end_RANK.pth``.
Ultralytics' own distribution is what runs, but for the places that name a CUDA device: the process group is gloo's, the
number of processes is that of the launcher, the wrapper of the model gets no device, and the last evaluation is on the
CPU.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.engine import validator
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import RANK, WORLD_SIZE

import kd_dense.yolo
from kd_dense.yolo import AdaptationTrainer


def without_gpu() -> None:
    """Replace what names a CUDA device."""
    begin = BaseTrainer.__init__

    @functools.wraps(begin)
    def init(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        assert self.device.type == 'cpu' and self.world_size == 0  # Ultralytics' number of GPUs
        self.world_size = WORLD_SIZE

    class Parallel(nn.parallel.DistributedDataParallel):
        def __init__(self, module, device_ids=None, **options):
            super().__init__(module, **options)

    BaseTrainer.__init__ = init
    BaseTrainer._setup_ddp = lambda self: dist.init_process_group('gloo')
    nn.parallel.DistributedDataParallel = Parallel
    backend = validator.AutoBackend
    validator.AutoBackend = lambda device, **options: backend(device=torch.device('cpu'), **options)
    validator.get_torch_device_backend = lambda *_: SimpleNamespace(current_device=lambda: 0)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def main(config: str, folder: str) -> None:
    torch.set_num_threads(1)
    without_gpu()
    found: dict = {'students': [], 'teachers': [], 'images': []}
    after_step, preprocess = AdaptationTrainer.after_step, AdaptationTrainer.preprocess_batch
    callbacks = AdaptationTrainer.run_callbacks

    def step(self):
        after_step(self)
        found['students'].append(copied(self.joined.student_model))
        found['teachers'].append(copied(self.joined.mean_teacher.model))

    def note(self, batch):
        found['images'].append((self.epoch, list(batch['im_file']), list(batch['target']['im_file'])))
        return preprocess(self, batch)

    def event(self, name):
        callbacks(self, name)
        if name == 'on_train_start':
            found.update(begin=copied(self.joined.mean_teacher.model), wrapper=type(self.model).__bases__[0].__name__)
            found['parameters'] = sum(p.numel() for p in self.model.parameters())
            found['config'] = Path(self.args.distill_model)
        if name == 'on_fit_epoch_end' and hasattr(self, 'ema'):
            found['average'] = copied(self.ema.ema.student_model)

    with (
        mock.patch.object(AdaptationTrainer, 'after_step', step),
        mock.patch.object(AdaptationTrainer, 'preprocess_batch', note),
        mock.patch.object(AdaptationTrainer, 'run_callbacks', event),
    ):
        record = kd_dense.yolo.train(config, folder, launcher='pytorch')
    found['record'] = record is not None
    found['config'] = str(found['config'].parent), found['config'].exists()
    torch.save(found, Path(folder) / f'end_{RANK}.pth')
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
