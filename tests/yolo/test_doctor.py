"""The doctor on YOLO configs, and teacher files that would execute something."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER
from ultralytics.utils.ops import xywh2xyxy

from kd_dense import ConfigError
from kd_dense.analysis.doctor import Report, examine
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.analysis.doctor.watch import watch
from kd_dense.yolo import evaluate, train
from kd_dense.yolo.doctor import VALIDATORS, YoloToolbox
from kd_dense.yolo.examples import examples
from kd_dense.yolo.teacher import read_checkpoint
from tests.yolo.helpers import build, save_model, write_data

AUTO = {'type': 'auto', 'share': 0.2}


class Scored(YoloToolbox):
    """Its teacher knows something: training one would take too long here."""

    def score(self, side, count):
        scores = super().score(side, count)
        return dict.fromkeys(scores, 0.5) if side == 'teacher' else scores


def look(config, toolbox=Scored, **arguments) -> Report:
    return examine(toolbox(config), **{'iterations': 1, 'images': 2, 'quiet': quiet(), **arguments})


# -- good configs ------------------------------------------------------------------------------------------------------


def test_facts_agree_with_the_models(write_config, teacher_file, student_yaml, tmp_path, monkeypatch):
    path = write_config(
        distillers={
            'native': {'type': 'Native', 'loss_weight': AUTO},
            'mimic': {'type': 'FeatureMimic', 'taps': 'neck:0', 'loss_weight': AUTO},
        }
    )
    folder = tmp_path / 'here'
    folder.mkdir()
    monkeypatch.chdir(folder)
    toolbox = Scored(path)
    report = examine(toolbox, iterations=2, images=2, quiet=quiet())
    assert report.failures == [] and report.exit_code == 0
    assert list(folder.iterdir()) == [] and not Path(toolbox.folder.name).exists()  # nothing stays
    facts = {check.name: check.facts for check in report.checks}
    teacher = torch.load(teacher_file(), weights_only=False)['model']
    assert facts['teacher']['tensors'] == facts['teacher']['all_tensors'] == len(teacher.state_dict())
    assert facts['teacher']['parameters'] == sum(p.numel() for p in teacher.parameters())
    assert facts['student']['parameters'] == sum(p.numel() for p in toolbox.student.parameters())
    # the fixed convolution of the box decoder
    assert facts['student']['parameters'] - facts['student']['trained_parameters'] == 16
    assert facts['data'] == {'train_images': 8, 'val_images': 4, 'batch_size': 4}
    assert facts['classes']['result'] == 'the same' and facts['preprocessing']['identity']
    assert facts['scores']['student_percent'] == 0 and facts['scores']['metric'] == 'mAP50-95'
    rows = {(row['distiller'], row['role']): row for row in facts['taps']['rows']}
    assert [t['stride'] for t in rows['native', 'features']['student_tensors']] == [8.0, 16.0, 32.0]
    assert rows['native', 'features']['connector'] == '3 x ConvReLUConv'
    (tensor,) = rows['mimic', 'features']['teacher_tensors']
    assert tensor['shape'][0] == teacher.model[16].cv2.conv.out_channels
    terms = facts['gradients']['terms']
    assert terms['mimic']['share_at_taps'][0] == pytest.approx(0.2, rel=1e-3)
    assert terms['native']['share_at_taps'][0] == pytest.approx(0.2, rel=1e-3)
    assert terms['native']['reaches'][-1] == 'model.22' and terms['mimic']['reaches'][-1] == 'model.16'
    assert terms['native']['connectors_without_gradient'] == []
    assert set(facts['cost']['terms']) == {'native', 'mimic'} and facts['cost']['ratio'] > 0


def test_steps_are_those_of_the_training(write_config):
    """Task loss and weighted terms, taken apart, sum to what the trainer would minimise."""
    toolbox = YoloToolbox(write_config())
    for prepare in ('check_config', 'load_teacher', 'open_data', 'build_student'):
        getattr(toolbox, prepare)()
    distillers = toolbox.join()
    (batch,) = toolbox.batches(1)
    with watch(distillers) as seen:
        task = toolbox.step(batch)
    parts, items = toolbox.model.loss(batch)
    native = 6.0 * seen['native'].loss
    assert float(task + native) == pytest.approx(float(parts.sum()) / 4, rel=1e-5)  # a batch of four
    assert float(native) == pytest.approx(float(items['native']), rel=1e-5)
    assert float(toolbox.student_step(batch)) == pytest.approx(float(task), rel=1e-5)
    toolbox.close()


def test_segmentation(write_config, student_yaml, teacher_file, mask_data):
    path = write_config(
        student=student_yaml('yolo11', '-seg'),
        data=str(mask_data),
        teacher={'checkpoint': teacher_file('yolo11', '-seg')},
    )
    report = look(path, images=None)
    assert report.failures == [] and report['scores'].facts['metric'] == 'mAP50-95(M)'
    assert 'metrics/mAP50-95(M)' in report['scores'].facts['student']


class Oracle(DetectionValidator):
    """Predicts exactly the labels."""

    seen = 0

    def preprocess(self, batch):
        self.batch = super().preprocess(batch)
        Oracle.seen += len(self.batch['img'])
        return self.batch

    def postprocess(self, preds):
        height, width = self.batch['img'].shape[2:]
        found = []
        for i in range(len(self.batch['img'])):
            own = self.batch['batch_idx'] == i
            boxes = xywh2xyxy(self.batch['bboxes'][own]) * torch.tensor([width, height, width, height])
            classes = self.batch['cls'][own].flatten()
            found.append({'bboxes': boxes, 'conf': torch.ones(len(boxes)), 'cls': classes, 'extra': boxes[:, :0]})
        return found


@pytest.mark.parametrize(('images', 'count'), [(2, 2), (None, 4)])
def test_scores_are_of_the_images_that_were_asked_for(write_config, monkeypatch, images, count):
    monkeypatch.setitem(VALIDATORS, 'detect', Oracle)
    monkeypatch.setattr(Oracle, 'seen', 0)
    facts = look(write_config(), YoloToolbox, images=images)['scores'].facts
    assert Oracle.seen == 2 * count and facts['images'] == count  # teacher and student
    assert facts['teacher_percent'] == facts['student_percent'] == pytest.approx(99.5, abs=0.1)


# -- broken ones -------------------------------------------------------------------------------------------------------


class Malice:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.fixture
def malicious(tmp_path, monkeypatch) -> Path:
    """A checkpoint that makes the folder ``executed`` when it is loaded without care."""
    monkeypatch.chdir(tmp_path)
    torch.save({'model': build('yolo11'), 'train_args': {'task': 'detect'}, 'extra': Malice()}, 'bad.pt')
    return tmp_path / 'bad.pt'


def test_malicious_teacher_is_named_and_executes_nothing(malicious, write_config):
    report = look(write_config(teacher={'checkpoint': str(malicious)}))
    (sentence,) = report.failures
    assert f'teacher.checkpoint: {malicious} names posix.mkdir, which is neither plain data nor a class' in sentence
    assert report['student'].status == 'passed' and report['taps'].status == 'skipped'
    assert not Path('executed').exists()


def test_nothing_else_of_ours_executes_it_either(malicious, write_config, tmp_path):
    path = write_config(teacher={'checkpoint': str(malicious)})
    with pytest.raises(ConfigError, match='teacher.checkpoint: .* names posix.mkdir'):
        train(path, tmp_path / 'run')
    with pytest.raises(ConfigError, match='CHECKPOINT: .* names posix.mkdir'):
        evaluate(path, malicious, tmp_path / 'eval')
    with pytest.raises(ConfigError, match='teacher.checkpoint: .* names posix.mkdir'):
        examples(path, {'teacher': None}, 1)
    with pytest.raises(ConfigError, match='student: .* names posix.mkdir'):
        train(write_config(student=str(malicious)), tmp_path / 'run')
    assert not Path('executed').exists()


def test_trusted_loads_it_and_says_what_that_means(malicious, caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, 'propagate', True)
    with caplog.at_level(logging.WARNING):
        read_checkpoint(malicious, 'teacher.checkpoint', trusted=True)
    assert Path('executed').is_dir()  # that is what it means
    assert 'its pickle may call any function with your rights' in caplog.text


def test_old_torch_does_not_fall_back_to_executing(malicious, monkeypatch):
    monkeypatch.delattr(torch.serialization, 'get_unsafe_globals_in_checkpoint')
    with pytest.raises(ConfigError, match='use PyTorch 2.6 or later'):
        read_checkpoint(malicious, 'teacher.checkpoint')
    assert not Path('executed').exists()


def cut(path: Path, source: str) -> str:
    path.write_bytes(Path(source).read_bytes()[:20000])
    return str(path)


@pytest.mark.parametrize(
    ('teacher', 'check', 'sentence'),
    [
        (lambda folder, source: 'nowhere.pt', 'teacher', 'teacher.checkpoint: there is no file nowhere.pt'),
        (
            lambda folder, source: cut(folder / 'cut.pt', source),
            'teacher',
            'cut.pt is truncated; copy or write the checkpoint again',
        ),
        (
            lambda folder, source: str(save_model(build('yolo11', names=('disc', 'box')), folder / 'a.pt')),
            'classes',
            'the teacher lacks square',
        ),
        (
            lambda folder, source: str(save_model(build('yolo11', channels=1), folder / 'a.pt')),
            'preprocessing',
            'its model takes images of 1 channels, the student 3',
        ),
    ],
)
def test_teachers(write_config, teacher_file, tmp_path, teacher, check, sentence):
    report = look(write_config(teacher={'checkpoint': teacher(tmp_path, teacher_file())}))
    assert report.exit_code == 1 and report[check].status == 'failed' and sentence in report[check].failures[0]


def test_configs(write_config, tmp_path):
    for options, check, sentence in (
        ({'distilers': {}}, 'config', "distilers: no key of a YOLO config; did you mean 'distillers'"),
        ({'teacher': None, 'distillers': None}, 'config', 'the config has no teacher'),
        ({'data': 'nowhere.yaml'}, 'data', 'data: '),
        ({'student': 'yolo99n.yaml'}, 'data', 'student: yolo99n.yaml is neither a .pt file nor a model YAML'),
        ({'distillers': {'a': {'type': 'NFD', 'taps': 'model.99'}}}, 'taps', "the model has no module 'model.99'"),
        (
            {'distillers': {'a': {'type': 'Native', 'loss_weight': -2}}},
            'distillers',
            'distillers.a.loss_weight: must be',
        ),
    ):
        path = write_config(**options)
        if options.get('teacher', 1) is None:
            path.write_text(
                '\n'.join(x for x in path.read_text().splitlines() if not x.startswith(('teacher', 'distil')))
            )
        report = look(path)
        assert report.exit_code == 1 and report[check].status == 'failed', (options, report.failures)
        assert sentence in report[check].failures[0]


def test_images_that_are_missing(write_config, tmp_path):
    data = write_data(tmp_path / 'data')
    for image in (tmp_path / 'data/images/val').iterdir():
        image.unlink()
    report = look(write_config(data=str(data)))
    assert report['data'].status == 'failed' and report['student'].status == 'skipped'


def test_untrained_teacher_is_not_above_the_student(write_config):
    report = look(write_config(), YoloToolbox)
    assert (
        'the teacher is not better than the student before training (mAP50-95 0.00 against 0.00)' in report.failures[0]
    )
    assert report['cost'].usable


# -- the cheap checks of the training ----------------------------------------------------------------------------------


def test_training_warns(write_config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, 'propagate', True)
    path = write_config(
        distillers={'native': {'type': 'Native'}, 'off': {'type': 'NFD', 'taps': 'neck', 'loss_weight': 0}}
    )
    with caplog.at_level(logging.WARNING):
        train(path, tmp_path / 'run')
    assert 'distillers.off.loss_weight: is 0, so this distiller does nothing' in caplog.text
    assert 'teacher.checkpoint: the teacher scores mAP50-95(B) 0.00' in caplog.text
