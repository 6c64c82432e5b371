"""tools/dist_train.sh: two processes do what one does with the same images."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kd_dense.data.scene_drawing import CLASSES
from kd_dense.engine.run import evaluate, train
from kd_dense.models.build import build_model
from tests.helpers import tiny
from tests.tools.conftest import ROOT, forget_runs, scalars

STEPS = 4
#: A hook that writes down what stands in the training loop; imported by the config, as a user's own code would be.
WITNESS = """
import json
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Witness(Hook):
    def after_train(self, runner):
        model = runner.model
        own = model.module
        wrapped = {id(p) for p in model.parameters()}
        facts = dict(
            wrapper=type(model).__name__,
            find_unused_parameters=model.find_unused_parameters,
            world_size=runner.world_size,
            parameters=sum(p.numel() for p in model.parameters()),
            teacher_outside=not any(id(p) in wrapped for p in own.teacher.model.parameters()),
            teacher_training=any(m.training for m in own.teacher.model.modules()),
            auto=own.distillers.weights['logits'].full_strength,
        )
        with open(f'{runner.work_dir}/witness_{runner.rank}.json', 'w') as file:
            json.dump(facts, file)
"""


def without_batch_statistics(model: dict) -> dict:
    """The tiny segmentor with group norm and no dropout: an image's gradient does not depend on its neighbours."""
    norm = dict(type='GN', num_groups=2)
    model['backbone']['norm_cfg'] = model['decode_head']['norm_cfg'] = norm
    model['decode_head']['dropout_ratio'] = 0.0
    return model


def config(scenes: Path, folder: Path, batch_size: int) -> Config:
    """Four steps of plain SGD; one distiller with an automatic weight from the start, one asleep for two steps."""
    teacher = without_batch_statistics(tiny.segmentor(8))
    checkpoint = folder / 'teacher.pth'
    if not checkpoint.is_file():
        tiny.saved(teacher, checkpoint, CLASSES)
    model = dict(
        type='kd_dense.Distillation',
        student=without_batch_statistics(tiny.segmentor(4)),
        teacher=dict(config=teacher, checkpoint=str(checkpoint)),
        distillers=dict(
            # its mean is over valid pixels, of which the two processes have different numbers: all pixels, here
            logits=dict(type='LogitKD', use_mask=False, loss_weight=dict(type='auto', share=0.5)),
            mimic=dict(type='FeatureMimic', taps='backbone:3', loss_weight=dict(value=1.0, start=0.5)),
        ),
    )
    cfg = tiny.segmentation_run(model, scenes, iterations=STEPS, interval=STEPS // 2)
    cfg.train_dataloader.batch_size = batch_size
    cfg.train_dataloader.dataset.pipeline = [
        step for step in cfg.train_dataloader.dataset.pipeline if step['type'] != 'RandomFlip'
    ]
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    cfg.param_scheduler = []
    cfg.env_cfg.dist_cfg.backend = 'gloo'
    return cfg


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    environment = dict(
        os.environ, PYTHON=sys.executable, PORT=str(free_port()), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''
    )
    environment['PYTHONPATH'] = f'{ROOT}{os.pathsep}{cwd}'
    command = list(map(str, command))
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def dist_train(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return run('bash', ROOT / 'tools' / 'dist_train.sh', *arguments, cwd=cwd)


def torchrun(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    options = ['--nproc_per_node', 2, '--master_port', free_port()]
    return run(sys.executable, '-m', 'torch.distributed.run', *options, *arguments, cwd=cwd)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='compares with a process on the CPU')
def test_two_processes__train_like_one(scenes, tmp_path):
    forget_runs()
    train(config(scenes, tmp_path, batch_size=4), str(tmp_path / 'one'))

    (tmp_path / 'witness.py').write_text(WITNESS)
    cfg = config(scenes, tmp_path, batch_size=2)
    cfg.custom_imports = dict(imports=['kd_dense', 'witness'])
    cfg.custom_hooks = [dict(type='Witness')]
    cfg.dump(str(tmp_path / 'two.py'))
    done = dist_train(tmp_path / 'two.py', 2, '--work-dir', tmp_path / 'two', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('plain checkpoint') == 1

    facts = [json.loads((tmp_path / f'two/witness_{rank}.json').read_text()) for rank in (0, 1)]
    one = torch.load(tmp_path / f'one/iter_{STEPS}.pth', weights_only=False)
    two = torch.load(tmp_path / f'two/iter_{STEPS}.pth', weights_only=False)
    plain = build_model(without_batch_statistics(tiny.segmentor(4)), 'student')
    plain.load_state_dict(two['state_dict'], strict=True)

    connectors = [v for k, v in two['kd_dense']['distillers'].items() if 'connectors' in k]
    trained = sum(p.numel() for p in plain.parameters()) + sum(v.numel() for v in connectors)
    for fact in facts:
        assert fact['wrapper'] == 'MMDistributedDataParallel' and fact['world_size'] == 2
        assert fact['find_unused_parameters'] is False
        assert fact['parameters'] == trained and fact['teacher_outside'] and not fact['teacher_training']
    # calibrated on the images of both processes, to the weight that one process finds on all of them
    assert facts[0]['auto'] == facts[1]['auto']
    assert facts[0]['auto'] == pytest.approx(float(one['kd_dense']['distillers']['weights.logits.value']), rel=1e-4)

    # the gradients of every step, summed up by SGD
    half = torch.load(tmp_path / f'one/iter_{STEPS // 2}.pth', weights_only=False)
    for part in (lambda c: c['state_dict'], lambda c: c['kd_dense']['distillers']):
        for name, value in part(one).items():
            torch.testing.assert_close(part(two)[name], value, rtol=1e-5, atol=5e-7, msg=name)
    moved = sorted(float((value - half['state_dict'][k]).abs().max()) for k, value in one['state_dict'].items())
    assert moved[len(moved) // 2] > 1e-5  # far more than the tolerance
    # and the second distiller did sleep for two steps
    assert ['kd.mimic.loss' in line for line in scalars(tmp_path / 'one')] == [False, False, True, True]
    assert ['kd.mimic.loss' in line for line in scalars(tmp_path / 'two')] == [False, False, True, True]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='compares with a process on the CPU')
def test_two_processes__score_like_one(scenes, tmp_path):
    cfg = config(scenes, tmp_path, batch_size=2)
    cfg.dump(str(tmp_path / 'c.py'))
    checkpoint = tiny.saved(without_batch_statistics(tiny.segmentor(4)), tmp_path / 'student.pth')
    forget_runs()
    alone = evaluate(cfg, checkpoint, str(tmp_path / 'one'))
    tool = [ROOT / 'tools' / 'test.py', tmp_path / 'c.py', checkpoint, '--launcher', 'pytorch']
    done = torchrun(*tool, '--work-dir', tmp_path / 'two', '--out', tmp_path / 'two.json', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / 'two.json').read_text()) == pytest.approx(alone, abs=1e-4)
    assert done.stdout.count('\nmIoU: ') == 1


def test_usage__is_said_when_arguments_are_missing(tmp_path):
    done = dist_train('config.py', cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ') and 'CONFIG GPUS' in done.stderr
