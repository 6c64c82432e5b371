"""tools/test.py: what a checkpoint scores, and what it refuses."""

import json

import pytest

from kd_dense.analysis.record import RunRecord
from kd_dense.engine.run import load_config, student_alone, train
from tests.helpers import tiny
from tests.tools.conftest import ROOT, edited


@pytest.fixture(scope='module')
def record(config, tmp_path_factory) -> RunRecord:
    return train(load_config(str(config)), str(tmp_path_factory.mktemp('tested')))


def test_command__prints_and_writes_the_scores(config, record, run_process, tmp_path):
    out = tmp_path / 'new' / 'metrics.json'
    tool = ROOT / 'tools' / 'test.py'
    done = run_process(tool, config, record.checkpoint, '--out', out, '--official-cityscapes')
    assert done.returncode == 0, done.stderr
    metrics = json.loads(out.read_text())
    assert metrics['mIoU'] == pytest.approx(record.value, abs=1e-6)
    assert metrics['cityscapesscripts/IoU_classes'] == pytest.approx(record.value, abs=0.02)
    for name, value in metrics.items():
        assert f'{name}: {value:.4f}' in done.stdout.splitlines()
    assert (tmp_path / 'work_dirs' / 'tiny' / 'test').is_dir()


def test_stock_config__gives_the_same_scores(config, record, call, tmp_path):
    stock = tmp_path / 'stock.py'
    student_alone(load_config(str(config))).dump(str(stock))
    assert 'Distillation' not in stock.read_text()
    call('test', stock, record.checkpoint, '--work-dir', tmp_path, '--out', tmp_path / 'a.json')
    assert json.loads((tmp_path / 'a.json').read_text())['mIoU'] == pytest.approx(record.value, abs=1e-6)


def test_cfg_options__reach_the_evaluation(config, record, call, tmp_path):
    option = 'test_evaluator.iou_metrics=[mDice]'
    call(
        'test', config, record.checkpoint, '--work-dir', tmp_path, '--out', tmp_path / 'a.json', '--cfg-options', option
    )
    metrics = json.loads((tmp_path / 'a.json').read_text())
    assert 'mDice' in metrics and 'mIoU' not in metrics


def test_error__checkpoint_of_another_model(config, teacher, error, tmp_path):
    said = error('test', config, teacher['checkpoint'], '--work-dir', tmp_path)
    assert said.startswith(f'error: CHECKPOINT: {teacher["checkpoint"]} is not a checkpoint of the student')


def test_error__checkpoint_missing_or_something_else(config, error, tmp_path):
    other = tmp_path / 'notes.pth'
    other.write_text('no weights')
    for path in (other, tmp_path / 'nowhere.pth'):
        said = error('test', config, path, '--work-dir', tmp_path)
        assert said.startswith('error: CHECKPOINT: ') and path.name in said


def test_error__config_missing(error, record, tmp_path):
    said = error('test', tmp_path / 'nowhere.py', record.checkpoint)
    assert said.startswith('error: CONFIG: there is no config file ')


def test_error__data_missing(config, error, record, tmp_path):
    option = 'test_dataloader.dataset.data_root=nowhere'
    said = error('test', config, record.checkpoint, '--work-dir', tmp_path, '--cfg-options', option)
    assert said.startswith('error: test_dataloader.dataset.data_root: there is no folder nowhere')


def test_error__nothing_to_evaluate_on(config, error, record, tmp_path):
    without = edited(config, tmp_path / 'c.py', test_dataloader=None, test_cfg=None, test_evaluator=None)
    assert 'test_dataloader: the config has none' in error('test', without, record.checkpoint, '--work-dir', tmp_path)


def test_error__official_cityscapes_of_a_detector(error, scenes, tmp_path):
    path = tmp_path / 'detector.py'
    tiny.detection_run(tiny.detector('GFL'), scenes).dump(str(path))
    checkpoint = tiny.saved(tiny.detector('GFL'), tmp_path / 'a.pth')
    said = error('test', path, checkpoint, '--work-dir', tmp_path, '--official-cityscapes')
    assert said.startswith('error: --official-cityscapes: ') and 'segmentation' in said
