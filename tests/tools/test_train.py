"""tools/train.py, from the command line to the files it leaves."""

import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from kd_dense.analysis.record import RunRecord
from kd_dense.models.build import build_model
from tests.helpers import tiny
from tests.tools.conftest import ROOT, edited, forget_runs, scalars


def weights(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def same_weights(a: Path, b: Path) -> bool:
    a, b = weights(a)['state_dict'], weights(b)['state_dict']
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory) -> Path:
    """The work dir of a run that the tests below change one thing of."""
    from kd_dense.engine.run import load_config, train

    work_dir = tmp_path_factory.mktemp('trained')
    train(load_config(str(config)), str(work_dir))
    return work_dir


# -- what works --------------------------------------------------------------------------------------------------------


def test_command__trains_and_says_where_the_student_is(config, trained, run_process, tmp_path):
    done = run_process(ROOT / 'tools' / 'train.py', config)
    assert done.returncode == 0, done.stderr
    work_dir = tmp_path / 'work_dirs' / 'tiny'
    record = RunRecord.load(work_dir)
    said = f'mIoU {record.value:.2f}; plain checkpoint: {record.checkpoint}'
    assert done.stdout.splitlines()[-1] == said
    build_model(tiny.segmentor(4), 'student').load_state_dict(weights(tmp_path / record.checkpoint)['state_dict'])
    assert same_weights(tmp_path / record.checkpoint, trained / 'iter_4.pth')
    log = done.stdout + done.stderr
    assert 'teacher on the validation set: aAcc' in log
    assert 'teacher: ' in log and ' tensors, ' in log


def test_runner__trains_without_any_tool_of_ours(config, trained, tmp_path):
    cfg = Config.fromfile(str(config))
    cfg.custom_hooks = [dict(type='kd_dense.DistillationHook')]
    cfg.work_dir = str(tmp_path)
    forget_runs()
    Runner.from_cfg(cfg).train()
    assert same_weights(tmp_path / 'iter_2.pth', trained / 'iter_2.pth')
    assert weights(tmp_path / 'iter_2.pth')['kd_dense']['distillers']


def test_cfg_options__reach_the_distillers(config, trained, call, tmp_path):
    options = ['model.distillers.logits.loss_weight=0.5', 'train_cfg.max_iters=2']
    call('train', config, '--work-dir', tmp_path, '--cfg-options', *options)
    whole, half = scalars(trained), scalars(tmp_path)
    assert len(half) == 2
    assert half[0]['kd.logits.loss'] == pytest.approx(0.5 * whole[0]['kd.logits.loss'], rel=1e-5)
    assert half[0]['kd.mimic.loss'] == pytest.approx(whole[0]['kd.mimic.loss'], rel=1e-6)


def test_seed__decides_the_run_and_is_recorded(config, trained, call, tmp_path):
    call('train', config, '--work-dir', tmp_path, '--seed', 5, '--cfg-options', 'train_cfg.max_iters=2')
    assert not same_weights(tmp_path / 'iter_2.pth', trained / 'iter_2.pth')
    assert (RunRecord.load(tmp_path).seed, RunRecord.load(trained).seed) == (5, 0)  # 0: the seed of the config


def test_student_alone__needs_no_teacher(config, call, tmp_path, capsys):
    options = ['model.teacher.checkpoint=nowhere.pth', 'train_cfg.max_iters=2']
    call('train', config, '--work-dir', tmp_path, '--student-alone', '--cfg-options', *options)
    assert 'mIoU ' in capsys.readouterr().out.splitlines()[-1]
    assert RunRecord.load(tmp_path).name == 'student'
    assert 'kd_dense' not in weights(tmp_path / 'iter_2.pth')
    assert not [key for line in scalars(tmp_path) for key in line if key.startswith('kd.')]


@pytest.mark.parametrize('from_path', [False, True])
def test_resume__goes_on_where_the_checkpoint_was_written(config, trained, call, tmp_path, from_path):
    source = tmp_path / 'elsewhere' if from_path else tmp_path / 'run'
    source.mkdir()
    shutil.copy(trained / 'iter_2.pth', source)
    (source / 'last_checkpoint').write_text(str(source / 'iter_2.pth'))
    call('train', config, '--work-dir', tmp_path / 'run', '--resume', *([source / 'iter_2.pth'] if from_path else []))
    assert [line['step'] for line in scalars(tmp_path / 'run')] == [3, 4]
    assert same_weights(tmp_path / 'run/iter_4.pth', trained / 'iter_4.pth')


def test_resume__without_a_checkpoint_begins(config, trained, call, tmp_path):
    call('train', config, '--work-dir', tmp_path, '--resume', '--seed', 0)
    assert same_weights(tmp_path / 'iter_4.pth', trained / 'iter_4.pth')


@pytest.mark.skipif(torch.cuda.is_available(), reason='with a GPU, MMEngine does it itself')
def test_amp__trains_on_a_cpu_too(config, trained, call, tmp_path):
    call('train', config, '--work-dir', tmp_path, '--amp', '--cfg-options', 'train_cfg.max_iters=2')
    mixed, plain = scalars(tmp_path)[0], scalars(trained)[0]
    assert mixed['kd.mimic.loss'] == pytest.approx(plain['kd.mimic.loss'], rel=0.05)
    assert mixed['kd.mimic.loss'] != plain['kd.mimic.loss']


def test_auto_scale_lr__scales_to_the_batch(config, trained, call, tmp_path):
    call('train', config, '--work-dir', tmp_path, '--auto-scale-lr', '--cfg-options', 'train_cfg.max_iters=2')
    # the config is made for batches of 4 and has batches of 2
    assert scalars(tmp_path)[0]['lr'] == pytest.approx(0.5 * scalars(trained)[0]['lr'])


# -- what does not: one sentence, exit code 2 --------------------------------------------------------------------------


def test_error__ends_the_command_without_traceback(run_process):
    done = run_process(ROOT / 'tools' / 'train.py', 'nowhere.py')
    assert done.returncode == 2
    assert done.stderr.splitlines() == ['error: CONFIG: there is no config file nowhere.py']


def test_auto_scale_lr__without_the_base_batch_size(config, error, tmp_path):
    bare = edited(config, tmp_path / 'bare.py', auto_scale_lr=None)
    assert 'auto_scale_lr.base_batch_size' in error('train', bare, '--work-dir', tmp_path, '--auto-scale-lr')


@pytest.mark.parametrize(
    ('option', 'sentence'),
    [
        (
            'model.distilers.logits.loss_weight=1',
            "model: Distillation has no option 'distilers'; did you mean 'distillers'",
        ),
        (
            'model.distillers.logits.type=LogitsKD',
            "distillers.logits: unknown distiller 'LogitsKD'; did you mean 'Logit",
        ),
        (
            'model.distillers.logits.temprature=2',
            "distillers.logits: LogitKD has no option 'temprature'; did you mean 'temperature'",
        ),
        ('model.distillers.mimic.taps=backbone.layer9', "'backbone.layer9'; did you mean 'backbone.layer"),
        ('model.distillers.mimic.loss_weight=-1', 'distillers.mimic.loss_weight: '),
        ('model.teacher.checkpoint=nowhere.pth', 'teacher.checkpoint: '),
        ('model.teacher.checkpont=nowhere.pth', "teacher: has no option 'checkpont'; did you mean 'checkpoint'"),
        (
            'train_dataloader.dataset.data_root=nowhere',
            'train_dataloader.dataset.data_root: there is no folder nowhere',
        ),
        ('val_dataloader.dataset.data_prefix.img_path=no', 'val_dataloader.dataset.data_prefix.img_path: there is no '),
    ],
)
def test_error__names_the_key(config, error, tmp_path, option, sentence):
    assert sentence in error('train', config, '--work-dir', tmp_path, '--cfg-options', option)


def test_error__teacher_of_another_width(config, error, tmp_path):
    options = ['model.teacher.config.backbone.base_channels=4', 'model.teacher.config.backbone.stem_channels=4']
    said = error('train', config, '--work-dir', tmp_path, '--cfg-options', *options)
    assert 'teacher.checkpoint: ' in said and 'have another shape (backbone.' in said


def test_error__resume_from_a_file_that_is_not_there(config, error, tmp_path):
    said = error('train', config, '--work-dir', tmp_path, '--resume', tmp_path / 'nowhere.pth')
    assert '--resume: ' in said and 'nowhere.pth' in said


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [('model = dict(', 'can not be read as a config'), ("_base_ = ['./nowhere.py']", 'nowhere.py'), ('a = 1', 'model')],
)
def test_error__config_that_is_none(error, tmp_path, text, sentence):
    path = tmp_path / 'broken.py'
    path.write_text(text + '\n')
    assert sentence in error('train', path, '--work-dir', tmp_path)
