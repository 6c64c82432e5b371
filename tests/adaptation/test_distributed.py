"""Two processes (gloo, CPU) against one with the same images: student, mean teacher, and its running statistics."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper

from kd_dense.models import MeanTeacherAdaptation
from tests.helpers import tiny
from tests.helpers.processes import assert_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='compares processes on the CPU'),
]
VIEWS = ('source', 'styled', 'target', 'teacher')


def build(task: str, norm: dict) -> MeanTeacherAdaptation:
    torch.manual_seed(0)
    if task == 'segmentation':
        student, labels = tiny.segmentor(4), dict(threshold=0.5)
        student['decode_head'].update(norm_cfg=norm, dropout_ratio=0.0)
    else:
        # a head whose losses are divided by the number of objects in all processes
        student, labels = tiny.detector('GFL'), dict(score_threshold=0.13)
        student['bbox_head']['norm_cfg'] = norm
    student['backbone']['norm_cfg'] = norm
    # the consistency is no sum over images: the square of a mean is not the mean of squares
    model = MeanTeacherAdaptation(
        student, dict(decay=0.5), labels, consistency_weight=0.0, pseudo_weight=dict(value=1.0, start=0.4)
    )
    model.init_weights()
    with torch.no_grad():  # some pixels, or boxes, are surer than others
        if task == 'segmentation':
            model.student.decode_head.conv_seg.weight *= 100
        else:
            model.student.bbox_head.gfl_cls.weight *= 100
            model.student.bbox_head.gfl_cls.bias.fill_(-2)
    model.mean_teacher.reset(model.student)
    return model.train()


def batch(task: str, rank: int, world: int) -> dict:
    """Four images in each view; those of one process."""
    torch.manual_seed(3)
    if task == 'segmentation':
        views = {view: tiny.segmentation_batch(4) for view in VIEWS}
    else:
        views = {view: tiny.detection_batch((tiny.SIZE,) * 4) for view in VIEWS}
    count = 4 // world
    own = slice(rank * count, (rank + 1) * count)
    return {key: {view: one[key][own] for view, one in views.items()} for key in ('inputs', 'data_samples')}


def work(rank: int, world: int, task: str, norm: dict) -> dict:
    """Two steps, the second one with pseudo labels: the states of student and mean teacher."""
    model = build(task, norm)
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01))
    for progress in (0.0, 0.5):
        model.progress = progress
        losses = wrapped.train_step(batch(task, rank, world), optimizer)
        model.mean_teacher.update(model.student)
        assert (losses['adapt.pseudo_loss'] > 0) == (progress > 0)
    return {'student': dict(model.student.state_dict()), 'teacher': model.mean_teacher.state_dict()}


def process(rank: int, port: int, folder: str, task: str, norm: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    try:
        torch.save(work(rank, 2, task, norm), Path(folder) / f'{rank}.pth')
    finally:
        dist.destroy_process_group()


def together(folder: Path, task: str, norm: dict) -> list[dict]:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        port = found.getsockname()[1]
    mp.start_processes(process, (port, str(folder), task, norm), nprocs=2, start_method='fork')
    return [torch.load(folder / f'{rank}.pth') for rank in range(2)]


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_two_processes_equal_one(task, tmp_path):
    norm = dict(type='GN', num_groups=2)  # an image's gradient does not depend on its neighbours in the batch
    first, second = together(tmp_path, task, norm)
    assert_equal(first, second)
    alone = work(0, 1, task, norm)
    for side in ('student', 'teacher'):
        for name, value in alone[side].items():
            torch.testing.assert_close(
                first[side][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f'{n}: {text}'
            )


@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_running_statistics_of_the_teacher_are_equal(task, tmp_path):
    """Those of the students are not: each has seen its own images."""
    first, second = together(tmp_path, task, dict(type='BN', requires_grad=True))
    assert_equal(first['teacher'], second['teacher'])
    names = [name for name in first['student'] if name.endswith('running_mean')]
    assert names and not any(torch.equal(first['student'][n], second['student'][n]) for n in names)
