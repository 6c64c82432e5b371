"""Two processes (gloo, CPU) against one with the same images: gradients, weights, and where the teacher is."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn

from kd_dense import Distillation
from kd_dense.models.build import build_model
from kd_dense.models.sharded import ShardedDistillation
from tests.helpers import tiny

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='compares processes on the CPU; on a machine with a GPU, models are built there'
)

GROUP_NORM = dict(type='GN', num_groups=2)
SEGMENTATION = {
    # by default its mean is over valid pixels, which are as many in both processes here
    'logits': dict(type='LogitKD', temperature=2.0, loss_weight=dict(type='auto', share=0.5)),
    'cwd': dict(type='CWD'),
    'mimic': dict(type='FeatureMimic', taps=['backbone:2', 'backbone:3']),
    'nfd': dict(type='NFD', taps='backbone:2'),
}
DETECTION = {
    'cwd': dict(type='CWD', taps=['neck:0', 'neck:1']),
    'mimic': dict(type='FeatureMimic', taps='neck'),
    'nfd': dict(type='NFD', taps=['neck:0', 'neck:1'], loss_weight='auto'),
}


def segmentor(width: int) -> dict:
    """With group norm and no dropout, an image's gradient does not depend on its neighbours in the batch."""
    model = tiny.segmentor(width)
    model['backbone']['norm_cfg'] = model['decode_head']['norm_cfg'] = GROUP_NORM
    model['decode_head']['dropout_ratio'] = 0.0
    return model


def detector(width: int, kind: str = 'GFL') -> dict:
    """GFL divides its loss by the mean number of objects over the processes, so that they add up."""
    model = tiny.detector(kind, width)
    model['backbone']['norm_cfg'] = GROUP_NORM
    if kind == 'GFL':
        model['bbox_head']['norm_cfg'] = GROUP_NORM
    return model


@pytest.fixture(scope='module')
def teachers(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp('teachers')
    configs = {'segmentor': segmentor(8), 'GFL': detector(8), 'RetinaNet': detector(8, 'RetinaNet')}
    return {
        name: dict(config=model, checkpoint=tiny.saved(model, folder / f'{name}.pth'))
        for name, model in configs.items()
    }


def build(kind: str, distillers: dict, teacher: dict) -> Distillation:
    torch.manual_seed(0)
    student = segmentor(4) if kind == 'segmentor' else detector(4, kind)
    model = Distillation(student=student, teacher=teacher, distillers=distillers)
    model.progress = 0.0
    return model.train()


def batch(kind: str) -> dict:
    torch.manual_seed(3)
    return tiny.segmentation_batch(4) if kind == 'segmentor' else tiny.detection_batch(((64, 64),) * 4)


def part(data: dict, rank: int, world: int) -> dict:
    """The images of one process."""
    count = len(data['inputs']) // world
    return {key: value[rank * count : (rank + 1) * count] for key, value in data.items()}


def step(model: nn.Module, data: dict) -> dict[str, torch.Tensor]:
    """One training step; the gradients that the optimizer was given."""
    gradients = {}

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(note)
    model.train_step(data, OptimWrapper(optimizer))
    own = getattr(model, 'module', model)
    own.distillers.verify_gradients()
    return {name.removeprefix('module.'): value for name, value in gradients.items()}


def wrap(model: Distillation) -> MMDistributedDataParallel:
    return MMDistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=False)


def _enter(rank: int, world: int, port: int, folder: str, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world)
    try:
        torch.save(work(rank, world, *arguments), f'{folder}/{rank}.pt')
    finally:
        dist.destroy_process_group()


def two_processes(work: Callable, folder: Path, *arguments: Any) -> list:
    """``work(rank, 2, *arguments)`` in two processes that are forked from this one; what each returned."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    mp.start_processes(_enter, (2, port, str(folder), work, arguments), nprocs=2, start_method='fork')
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in (0, 1)]


# -- gradients ---------------------------------------------------------------------------------------------------------


def _first_step(rank: int, world: int, kind: str, distillers: dict, teacher: dict) -> dict:
    model = build(kind, distillers, teacher)
    wrapped = wrap(model) if world > 1 else model
    gradients = step(wrapped, part(batch(kind), rank, world))
    weights = {name: weight.full_strength for name, weight in model.distillers.weights.items()}
    return dict(gradients=gradients, weights=weights)


@pytest.mark.parametrize(('kind', 'distillers'), [('segmentor', SEGMENTATION), ('GFL', DETECTION)])
def test_first_gradients__equal_those_of_one_process(kind, distillers, teachers, tmp_path):
    one = _first_step(0, 1, kind, distillers, teachers[kind])
    two = two_processes(_first_step, tmp_path, kind, distillers, teachers[kind])
    connectors = [name for name in one['gradients'] if name.startswith('distillers.')]
    assert len(connectors) >= 4
    for found in two:
        assert list(found['gradients']) == list(one['gradients'])
        for name, expected in one['gradients'].items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(
                found['gradients'][name], expected, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name
            )
        assert found['weights'] == pytest.approx(one['weights'], rel=1e-4)
    assert two[0]['weights'] == two[1]['weights']
    # and they would not be equal without the other process's images
    alone = _first_step(0, 1, kind, {k: dict(v, loss_weight=1.0) for k, v in distillers.items()}, teachers[kind])
    model = build(kind, {k: dict(v, loss_weight=1.0) for k, v in distillers.items()}, teachers[kind])
    half = step(model, part(batch(kind), 0, 2))
    name = connectors[0]
    assert not torch.allclose(half[name], alone['gradients'][name], rtol=1e-2)


# -- the teacher -------------------------------------------------------------------------------------------------------


def _perturbed_on_rank_1(rank: int, world: int, teacher: dict) -> dict:
    model = build('segmentor', SEGMENTATION, teacher)
    if rank == 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.teacher.model.parameters()):
                tensor.add_(1)
    before = [p.clone() for p in model.teacher.model.parameters()]
    wrapped = wrap(model)
    step(wrapped, part(batch('segmentor'), rank, world))
    teachers = {id(p) for p in model.teacher.model.parameters()}
    return dict(
        untouched=all(torch.equal(a, b) for a, b in zip(before, model.teacher.model.parameters(), strict=True)),
        outside=not teachers & {id(p) for p in wrapped.parameters()},
        count=sum(p.numel() for p in wrapped.parameters()),
        weights=[p.detach() for p in wrapped.parameters()],
        teacher=before[0],
    )


def test_teacher__is_outside_ddp(teachers, tmp_path):
    """The student and the connectors of the first process are handed to the second; its teacher is left alone."""
    first, second = two_processes(_perturbed_on_rank_1, tmp_path, teachers['segmentor'])
    model = build('segmentor', SEGMENTATION, teachers['segmentor'])
    for found in (first, second):
        assert found['untouched'] and found['outside']
        assert found['count'] == sum(p.numel() for m in (model.student, model.distillers) for p in m.parameters())
    torch.testing.assert_close(first['teacher'] + 1, second['teacher'])
    for a, b in zip(first['weights'], second['weights'], strict=True):
        assert torch.equal(a, b)


# -- batches and schedules that leave something out --------------------------------------------------------------------


def _nothing_to_see(rank: int, world: int, kind: str, distillers: dict, teacher: dict) -> dict:
    model = build(kind, distillers, teacher)
    wrapped = wrap(model)
    data = part(batch(kind), rank, world)
    if rank == 1:
        for sample in data['data_samples']:
            if kind == 'segmentor':
                sample.gt_sem_seg.data.fill_(255)
            else:
                sample.gt_instances = sample.gt_instances[:0]
    gradients = [step(wrapped, data), step(wrapped, part(batch(kind), rank, world))]
    return dict(gradients=gradients, weights={n: w.full_strength for n, w in model.distillers.weights.items()})


@pytest.mark.parametrize(
    ('kind', 'distillers'),
    [
        ('segmentor', SEGMENTATION),
        ('GFL', {**DETECTION, 'logits': dict(type='LogitKD'), 'native': dict(type='Native')}),
        ('RetinaNet', {**DETECTION, 'logits': dict(type='LogitKD')}),
    ],
)
def test_one_process_without_annotations(kind, distillers, teachers, tmp_path):
    first, second = two_processes(_nothing_to_see, tmp_path, kind, distillers, teachers[kind])
    assert first['weights'] == second['weights']
    for a, b in zip(first['gradients'], second['gradients'], strict=True):
        assert set(a) == set(b) == set(dict(build(kind, distillers, teachers[kind]).named_parameters()))
        assert all(torch.equal(a[name], b[name]) and a[name].isfinite().all() for name in a)
    connectors = [name for name in second['gradients'][1] if name.startswith('distillers.')]
    assert connectors and all(second['gradients'][1][name].abs().sum() > 0 for name in connectors)


def _asleep(rank: int, world: int, teacher: dict) -> list[dict]:
    distillers = dict(SEGMENTATION, mimic=dict(SEGMENTATION['mimic'], loss_weight=dict(value=1.0, start=0.5, stop=0.8)))
    model = build('segmentor', distillers, teacher)
    wrapped = wrap(model)
    found = []
    for model.progress in (0.0, 0.6, 0.9):
        gradients = step(wrapped, part(batch('segmentor'), rank, world))
        found.append({name: float(value.abs().sum()) for name, value in gradients.items() if 'methods.mimic' in name})
    return found


def test_sleeping_distiller__needs_no_search_for_unused_parameters(teachers, tmp_path):
    first, second = two_processes(_asleep, tmp_path, teachers['segmentor'])
    assert first == second
    before, awake, after = first
    assert len(before) == 4 and set(before.values()) == set(after.values()) == {0.0}
    assert all(value > 0 for value in awake.values())
    assert list(awake) == list(before)


# -- FSDP --------------------------------------------------------------------------------------------------------------


def _sharded_step(rank: int, world: int, teacher: dict) -> dict:
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType

    model = build('segmentor', SEGMENTATION, teacher)
    before = [p.clone() for p in model.teacher.model.parameters()]
    wrapped = ShardedDistillation(model, device_id='cpu')
    held = sum(p.numel() for p in wrapped.parameters())
    step(wrapped, part(batch('segmentor'), rank, world))
    with ShardedDistillation.state_dict_type(
        wrapped, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
    ):
        state = wrapped.state_dict()
    return dict(
        state=dict(state),
        distillation=dict(model.distillation_state()),
        held=held,
        teacher=all(torch.equal(a, b) for a, b in zip(before, model.teacher.model.parameters(), strict=True)),
    )


def test_fsdp__shards_the_student_and_gathers_a_plain_one(teachers, tmp_path):
    first, second = two_processes(_sharded_step, tmp_path, teachers['segmentor'])
    one = build('segmentor', SEGMENTATION, teachers['segmentor'])
    total = sum(p.numel() for m in (one.student, one.distillers) for p in m.parameters())
    assert first['held'] < 0.6 * total and first['held'] + second['held'] >= total
    assert first['teacher'] and second['teacher']  # replicated, and whole
    step(one, batch('segmentor'))
    assert list(first['state']) == list(one.state_dict()) and not second['state']
    for name, expected in one.state_dict().items():
        torch.testing.assert_close(first['state'][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    connectors = {k: v for k, v in one.distillation_state().items() if 'connectors' in k}
    for name, expected in connectors.items():
        torch.testing.assert_close(first['distillation'][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    build_model(segmentor(4), 'student').load_state_dict(first['state'], strict=True)
