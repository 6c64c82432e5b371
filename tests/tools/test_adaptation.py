"""The tools on a config that adapts, and on the checkpoints of its runs, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from matplotlib.image import imread

from kd_dense.analysis.record import RunRecord
from kd_dense.checkpoint import load
from kd_dense.data.weather import write_weather
from kd_dense.engine.run import load_config, student_alone
from kd_dense.models.build import build_model
from tests.adaptation.test_detection import annotations
from tests.helpers.processes import assert_equal
from tests.tools.conftest import ROOT, scalars
from tests.tools.test_dist_train import dist_train

CONFIG = 'configs/adaptation/segmentation/meanteacher_r18-w32_400_camvid-to-fog.py'
DETECTION = 'configs/adaptation/detection/meanteacher_gfl_r18-w16_camvid-to-fog.py'
#: As the config is, but two iterations of two images of each domain, the second one with pseudo labels.
SHORT = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=1',
    'train_dataloader.batch_size=2',
    'default_hooks.checkpoint.interval=2',
    'default_hooks.logger.interval=1',
    'model.pseudo_labels.threshold=0.1',
]


@pytest.fixture(scope='module')
def camvid(scenes, tmp_path_factory) -> tuple[Path, Path]:
    """Scenes in the layout of CamVid, and the same in fog."""
    clear, made = (tmp_path_factory.mktemp(name) for name in ('camvid', 'camvid_adaptation'))
    for split in ('train', 'val'):
        for kind in ('images', 'labels'):
            (clear / kind / split).mkdir(parents=True)
        for image in (scenes / 'leftImg8bit' / split / 'scene').iterdir():
            name = image.name.removesuffix('_leftImg8bit.png')
            cv2.imwrite(str(clear / 'images' / split / f'{name}.jpg'), cv2.imread(str(image)))
            labels = scenes / 'gtFine' / split / 'scene' / f'{name}_gtFine_labelTrainIds.png'
            shutil.copy(labels, clear / 'labels' / split / f'{name}.png')
    write_weather(clear / 'images', made / 'fog', 'fog', progress=False)
    return clear, made


@pytest.fixture
def command(camvid, monkeypatch) -> list[str]:
    """What follows the name of a tool."""
    for variable, folder in zip(('KD_DENSE_CAMVID', 'KD_DENSE_CAMVID_ADAPTATION'), camvid, strict=True):
        monkeypatch.setenv(variable, str(folder))
    return [CONFIG, '--cfg-options', *SHORT]


def test_compared_tested_and_exported(call, command, tmp_path, capsys):
    """Source only and adapted, both trained by the tool; then the checkpoint, which is a plain student."""
    config, *options = command
    out = tmp_path / 'out'
    call('compare', config, '--work-dir', out, '--seeds', 0, '--examples', 1, *options)
    said = ' '.join(capsys.readouterr().out.split())
    assert 'run 1 of 2: source only, seed 0' in said and 'run 2 of 2: adapted, seed 0' in said
    assert 'than source only with seed 0' in said and 'example images' not in said
    text = (out / 'comparison.md').read_text(encoding='utf-8')
    assert '| source only |' in text and '| adapted |' in text
    assert 'student alone' not in text and 'distill' not in text
    assert imread(out / 'comparison.png').std() > 0.1
    records = {name: RunRecord.load(out / name / 'seed_0') for name in ('student', 'adapted')}
    assert [(record.name, record.iterations) for record in records.values()] == [('student', 2), ('adapted', 2)]
    steps = {name: scalars(out / name / 'seed_0') for name in records}
    assert [line['adapt.pseudo_loss'] > 0 for line in steps['adapted']] == [False, True]
    assert not any(key.startswith('adapt') for line in steps['student'] for key in line)

    checkpoint = records['adapted'].checkpoint
    call('test', config, checkpoint, '--work-dir', tmp_path / 'test', '--out', tmp_path / 'score.json', *options)
    score = json.loads((tmp_path / 'score.json').read_text())['mIoU']
    assert score == pytest.approx(records['adapted'].value, abs=0.01)
    plain = tmp_path / 'student.pth'
    call('export', config, checkpoint, '--format', 'pth', '--out', plain, '--images', 1, *options)
    weights, exported = load(checkpoint)['state_dict'], load(plain)['state_dict']
    assert weights.keys() == exported.keys() and all(torch.equal(exported[k], v) for k, v in weights.items())


@pytest.mark.parametrize('tool', ['doctor', 'benchmark'])
def test_what_there_is_no_teacher_for(error, command, tool):
    assert error(tool, command[0]) == (
        'error: model: this is an adaptation, whose teacher is the moving average of its student, so that there is no '
        'trained teacher to look at; train it, and read its log (docs/adaptation.md)'
    )


#: A hook that writes down the mean teacher of its process; imported by the config, as a user's own code would be.
WITNESS = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Witness(Hook):
    def after_train(self, runner):
        found = dict(teacher=runner.model.module.mean_teacher.state_dict(), world_size=runner.world_size)
        found['running'] = runner.model.module.student.backbone.layer1[0].bn1.running_mean
        torch.save(found, f'{runner.work_dir}/witness_{runner.rank}.pth')
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='two processes on the CPU')
@pytest.mark.parametrize(('config', 'metric'), [(CONFIG, 'mIoU'), (DETECTION, 'coco/bbox_mAP')])
def test_two_processes(command, camvid, scenes, config, metric, tmp_path):
    """A whole run: one teacher in both, which is stored, and validated on all images beside the student."""
    (tmp_path / 'witness.py').write_text(WITNESS)
    text = f"""_base_ = [{str(ROOT / config)!r}]
custom_imports = dict(imports=['kd_dense', 'witness'], allow_failed_imports=False)
custom_hooks = [dict(type='kd_dense.AdaptationHook'), dict(type='Witness')]
"""
    (tmp_path / 'two.py').write_text(text)
    options = [*SHORT[:-1], 'env_cfg.dist_cfg.backend=gloo', 'model.mean_teacher.decay=0.5']
    if config == CONFIG:
        options.append(SHORT[-1])
    else:
        options.append('model.pseudo_labels.score_threshold=0.0')
        for split in ('train', 'val'):
            names = sorted(path.name for path in (camvid[0] / 'images' / split).iterdir())
            classes = [(1, 'car'), (2, 'pedestrian'), (3, 'bicyclist')]
            annotations(scenes, split, camvid[1] / f'annotations/{split}.json', names, classes)
    work = tmp_path / 'two'
    done = dist_train(tmp_path / 'two.py', 2, '--work-dir', work, '--cfg-options', *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(work / f'witness_{rank}.pth') for rank in (0, 1))
    assert first['world_size'] == second['world_size'] == 2
    assert not torch.equal(first['running'], second['running'])  # each has seen its own images
    assert_equal(first['teacher'], second['teacher'])
    saved = torch.load(work / 'iter_2.pth', weights_only=False)
    assert_equal(saved['kd_dense']['mean_teacher'], first['teacher'])
    assert int(first['teacher']['updates']) == 2
    lines = [json.loads(line) for file in work.glob('*/vis_data/scalars.json') for line in file.open()]
    assert [line['adapt.pseudo_loss'] > 0 for line in lines if 'adapt.pseudo_loss' in line] == [False, True]
    scores = [line[f'teacher.{metric}'] for line in lines if f'teacher.{metric}' in line]
    assert len(scores) == 2 and all(0 <= score <= 100 for score in scores)
    assert len(RunRecord.load(work).curve) == 2
    adapted = load_config(config)
    student = build_model(dict(student_alone(adapted).model, _scope_=adapted.default_scope), 'student')
    student.load_state_dict(saved['state_dict'], strict=True)
