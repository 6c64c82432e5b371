"""The doctor on configs of MMSegmentation and MMDetection."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData

from kd_dense import DISTILLERS, ConfigError, Distiller
from kd_dense.analysis.doctor import Report, examine
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.analysis.doctor.watch import watch
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.distillers.base import TapPair
from kd_dense.engine.doctor import MMToolbox
from kd_dense.engine.run import train
from kd_dense.models.build import build_model
from tests.helpers import tiny

FAST = dict(iterations=1, images=2, quiet=quiet())


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('data') / 'scenes')


@pytest.fixture(scope='module')
def teacher(tmp_path_factory) -> dict:
    """It says 'background' everywhere, which is more than a random student knows."""
    config = tiny.segmentor(8)
    path = tiny.saved(config, tmp_path_factory.mktemp('teacher') / 'teacher.pth', CLASSES)
    content = torch.load(path, weights_only=False)
    content['state_dict']['decode_head.conv_seg.bias'][0] = 10.0
    torch.save(content, path)
    return dict(config=config, checkpoint=path)


@pytest.fixture
def config(teacher, data) -> Config:
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.segmentor(4),
        teacher=copy.deepcopy(teacher),
        distillers=dict(
            logits=dict(type='LogitKD', loss_weight=dict(type='auto', share=0.1)),
            mimic=dict(type='FeatureMimic', taps='backbone:3', loss_weight=dict(type='auto', share=0.3)),
        ),
    )
    return tiny.segmentation_run(model, data)


def look(config: Config, **arguments) -> Report:
    return examine(MMToolbox(config), **{**FAST, **arguments})


# -- good configs ------------------------------------------------------------------------------------------------------


def test_segmentation__facts_agree_with_the_models(config, tmp_path, monkeypatch):
    data_root = config.val_dataloader.dataset.data_root
    monkeypatch.chdir(tmp_path)
    report = look(config, iterations=2, images=None)
    assert report.failures == [] and report.exit_code == 0
    assert list(tmp_path.iterdir()) == []  # nothing is written
    facts = {check.name: check.facts for check in report.checks}
    student, teacher = (build_model(tiny.segmentor(width), 'model') for width in (4, 8))
    parameters = sum(p.numel() for p in teacher.parameters())
    assert (facts['teacher']['tensors'], facts['teacher']['all_tensors']) == (len(teacher.state_dict()),) * 2
    assert (facts['teacher']['parameters'], facts['teacher']['all_parameters']) == (parameters,) * 2
    assert facts['teacher']['strict'] and facts['teacher']['frozen_and_eval']
    assert facts['student']['parameters'] == sum(p.numel() for p in student.parameters())
    assert facts['data'] == {'train_images': 8, 'val_images': 4, 'batch_size': 2}
    assert facts['classes']['result'] == 'the same' and facts['classes']['teacher'] == list(CLASSES)
    assert facts['preprocessing']['identity'] and facts['preprocessing']['student']['mean'] == pytest.approx(tiny.MEAN)
    logits, mimic = facts['taps']['rows']
    assert (mimic['method'], mimic['connector']) == ('FeatureMimic', 'Conv1x1')
    assert mimic['student_tensors'] == ({'shape': (32, 2, 2), 'stride': 32.0},)
    assert mimic['teacher_tensors'] == ({'shape': (64, 2, 2), 'stride': 32.0},)
    assert mimic['connector_parameters'] == 32 * 64 + 64 == facts['taps']['connector_parameters']
    assert logits['student_tensors'] == ({'shape': (7, 16, 16), 'stride': 4.0},)
    terms = facts['gradients']['terms']
    assert terms['logits']['share_at_taps'][0] == pytest.approx(0.1, rel=1e-3)  # what 'auto' was asked for
    assert terms['mimic']['share_at_taps'][0] == pytest.approx(0.3, rel=1e-3)
    assert terms['mimic']['reaches'] == ['backbone'] and terms['logits']['reaches'] == ['backbone', 'decode_head']
    assert set(terms['mimic']['connectors']) == {'connectors.0.weight', 'connectors.0.bias'}
    assert facts['cost']['teacher']['memory'] == sum(
        x.numel() * x.element_size() for x in (*teacher.parameters(), *teacher.buffers())
    )
    assert {'student', 'teacher', 'terms', 'step', 'ratio', 'memory_kind'} == set(facts['cost'])
    assert facts['scores']['teacher_percent'] == pytest.approx(background_score(Path(data_root)), abs=0.01)
    assert facts['scores']['teacher_percent'] > facts['scores']['student_percent']
    # it is right about the background only, and said to be so
    assert [w for w in report.warnings if 'no better than a model that knows nothing' in w]


def background_score(root: Path) -> float:
    """mIoU in percent of the prediction 0 everywhere, from the label files."""
    import cv2

    labels = [cv2.imread(str(f), cv2.IMREAD_UNCHANGED) for f in sorted(root.glob('gtFine/val/**/*TrainIds.png'))]
    assert len(labels) == 4
    known = sum((x != 255).sum() for x in labels)
    present = {int(v) for x in labels for v in set(x.flatten().tolist())} - {255}
    return 100 * sum((x == 0).sum() for x in labels) / known / len(present)


def test_steps_are_those_of_the_training(config):
    """Task loss and weighted terms, taken apart, sum to what the runner would minimise."""
    config.model.distillers.mimic.loss_weight = 0.5
    toolbox = MMToolbox(config)
    for prepare in ('check_config', 'load_teacher', 'open_data', 'build_student'):
        getattr(toolbox, prepare)()
    distillers = toolbox.join()
    (batch,) = toolbox.batches(1)
    torch.manual_seed(0)  # of dropout
    with watch(distillers) as seen:
        task = toolbox.step(batch)
    torch.manual_seed(0)
    total, log = toolbox.model.parse_losses(toolbox.model._run_forward(batch, mode='loss'))
    terms = {name: distillers.weights[name].full_strength * one.loss for name, one in seen.items()}
    assert float(task + sum(terms.values())) == pytest.approx(float(total), rel=1e-5)
    assert float(task) == pytest.approx(float(log['decode.loss_ce']), rel=1e-5)
    torch.manual_seed(0)
    assert float(toolbox.student_step(batch)) == pytest.approx(float(task), rel=1e-5)


def test_preprocessing_that_differs_is_shown(config, tmp_path):
    config.model.teacher.config.data_preprocessor.update(mean=[0.0, 0.0, 0.0], std=[255.0] * 3, bgr_to_rgb=False)
    facts = look(config)['preprocessing'].facts
    assert facts['channels_reversed'] and not facts['identity']
    # student rgb (x - m) / s -> teacher bgr x / 255
    assert facts['gain'] == pytest.approx([s / 255 for s in reversed(tiny.STD)])
    assert facts['shift'] == pytest.approx([m / 255 for m in reversed(tiny.MEAN)])


class Oracle(MMToolbox):
    """The teacher finds exactly the objects of the annotations."""

    def load_teacher(self):
        loaded = super().load_teacher()

        def val_step(batch):
            samples = copy.deepcopy(batch['data_samples'])
            for sample in samples:
                truth = sample.gt_instances
                boxes = truth.bboxes.tensor / truth.bboxes.tensor.new_tensor(sample.scale_factor).repeat(2)
                sample.pred_instances = InstanceData(bboxes=boxes, labels=truth.labels, scores=torch.ones(len(boxes)))
            return samples

        loaded.model.val_step = val_step
        return loaded


@pytest.fixture(scope='module')
def detection(data, tmp_path_factory) -> Config:
    config = tiny.detector('GFL', 8)
    path = tiny.saved(config, tmp_path_factory.mktemp('detector') / 'teacher.pth', CLASSES[1:])
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.detector('GFL', 4),
        teacher=dict(config=config, checkpoint=path),
        distillers=dict(neck=dict(type='FeatureMimic', taps=['neck:0', 'neck:1'], loss_weight='auto')),
    )
    return tiny.detection_run(model, data)


def test_detection__a_sample_is_scored_by_itself(detection):
    report = examine(Oracle(detection), **FAST)
    assert report.failures == []
    scores = report['scores'].facts
    assert scores['images'] == 2 and scores['all_images'] == 4
    assert scores['teacher']['coco/bbox_mAP'] == pytest.approx(1.0, abs=1e-3)  # images that were not shown do not count
    assert scores['student_percent'] < 5
    rows = report['taps'].facts['rows']
    assert [t['stride'] for t in rows[0]['student_tensors']] == [8.0, 16.0] and rows[0]['connector'] == '2 x Conv1x1'
    term = report['gradients'].facts['terms']['neck']
    assert term['reaches'] == ['backbone', 'neck'] and term['layers']['bbox_head'] == 0
    assert term['share_at_taps'][0] == pytest.approx(0.1, rel=1e-3)


def test_detection__untrained_teacher_is_not_above_the_student(detection):
    report = look(detection)
    assert report['scores'].status == 'failed' and report['cost'].status in ('passed', 'warning')
    assert (
        'teacher.checkpoint: the teacher is not better than the student before training (bbox_mAP' in report.failures[0]
    )


# -- broken ones -------------------------------------------------------------------------------------------------------


class Malice:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def truncated(path: Path, source: str) -> None:
    path.write_bytes(Path(source).read_bytes()[:5000])


def malicious(path: Path, source: str) -> None:
    torch.save({'state_dict': {}, 'meta': Malice()}, path)


def pickled(path: Path, source: str) -> None:
    path.write_bytes(pickle.dumps(Malice()))


@pytest.mark.parametrize(
    ('write', 'sentence'),
    [
        (None, 'teacher.checkpoint: There is no checkpoint file'),
        (truncated, 'is truncated; copy or write the checkpoint again'),
        (malicious, 'posix.mkdir, which is not plain data and could run code, so it was not loaded'),
        (pickled, 'teacher.checkpoint: '),
    ],
)
def test_teacher_files(config, teacher, tmp_path, monkeypatch, write, sentence):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'bad.pth'
    if write is not None:
        write(path, teacher['checkpoint'])
    config.model.teacher.checkpoint = str(path)
    report = look(config)
    assert report.exit_code == 1 and len(report.failures) == 1 and sentence in report.failures[0]
    assert report['teacher'].status == 'failed' and report['data'].status == report['student'].status == 'passed'
    assert not (tmp_path / 'executed').exists()


def test_trusted_says_what_it_means(config, caplog):
    config.model.teacher.trusted = True
    report = look(config)
    assert report.failures == [] and any('may have called any function with your rights' in w for w in report.warnings)


BOTH = {'_delete_': True, 'student': ['backbone:2', 'backbone:3'], 'teacher': 'backbone:3'}


@pytest.mark.parametrize(
    ('options', 'check', 'sentence'),
    [
        ({'model.teacher.config.backbone.base_channels': 4}, 'teacher', 'have another shape (backbone.'),
        ({'model.teacher.config.decode_head.type': 'FCNHead'}, 'teacher', 'the model can not be built'),
        ({'model.teacher.config': 'nowhere.py'}, 'teacher', 'teacher.config: there is no config file nowhere.py'),
        ({'model.teacher.checkpont': 'a'}, 'config', "no option 'checkpont'; did you mean 'checkpoint'"),
        ({'model.distilers': {}}, 'config', "no option 'distilers'; did you mean 'distillers'"),
        ({'model.teacher.classes': {'disk': 'disc'}}, 'classes', "the student has no class 'disk'"),
        ({'model.distillers.mimic.taps': 'backbone.layer9'}, 'taps', "the model has no module 'backbone.layer9'"),
        ({'model.distillers.mimic.taps': 'backbone:7'}, 'taps', "the output has no '7'"),
        ({'model.distillers.mimic.temprature': 1}, 'distillers', "FeatureMimic has no option 'temprature'"),
        (
            {'model.distillers.mimic.loss_weight': -1},
            'distillers',
            'distillers.mimic.loss_weight: must be a finite number',
        ),
        (
            {'model.distillers.mimic.loss_weight': float('nan')},
            'distillers',
            'distillers.mimic.loss_weight: must be a finite',
        ),
        ({'model.distillers.mimic.connector': 'Conv3x3'}, 'taps', "unknown connector 'Conv3x3'"),
        (
            {'model.distillers.mimic.taps': BOTH},
            'taps',
            'the student gives 2 tensors',
        ),
        ({'model.student.decode_head.num_classes': 5}, 'taps', 'LogitKD needs equal class predictions'),
        (
            {'train_dataloader.dataset.data_root': 'nowhere'},
            'data',
            'train_dataloader.dataset.data_root: there is no fol',
        ),
        ({'val_dataloader.dataset.img_suffix': '.tif'}, 'data', 'SceneDataset has no images; check '),
        ({'model.student.backbone.frozen_stages': 4}, 'gradients', 'no gradient would flow'),
    ],
)
def test_broken_configs(config, options, check, sentence):
    config.merge_from_dict(options)
    report = look(config)
    assert report.exit_code == 1
    assert report[check].status == 'failed' and sentence in report[check].failures[0], report.failures


def test_class_lists_that_differ(config, teacher, tmp_path):
    content = torch.load(teacher['checkpoint'], weights_only=False)
    content['meta']['dataset_meta']['classes'] = ('background', 'road', *CLASSES[2:])
    torch.save(content, tmp_path / 'other.pth')
    config.model.teacher.checkpoint = str(tmp_path / 'other.pth')
    report = look(config)
    assert report['classes'].status == 'failed' and f'the teacher lacks {CLASSES[1]}' in report.failures[0]
    assert report['gradients'].usable  # what does not depend on it is looked at
    config.model.teacher.classes = {CLASSES[1]: 'road'}
    assert look(config)['classes'].facts['result'] == 'mapped by name'


def test_weight_that_drowns_the_task(config):
    config.model.distillers.mimic.loss_weight = 1e6
    report = look(config)
    assert report.exit_code == 0
    (sentence,) = report['gradients'].warnings
    assert 'distillers.mimic.loss_weight: its gradient is ' in sentence and 'which it may drown' in sentence


def test_connector_without_gradient(config, monkeypatch):
    class Deaf(Distiller):
        def __init__(self):
            super().__init__()
            self.taps = {'x': TapPair.parse('backbone:0')}
            self.connector = torch.nn.Linear(2, 2)

        def forward(self, student, teacher, context):
            return {'loss': student['x'][0].square().mean()}

    monkeypatch.setitem(DISTILLERS._module_dict, 'Deaf', Deaf)
    config.model.distillers = dict(deaf=dict(type='Deaf'))
    report = look(config)
    assert report.failures == [
        'distillers.deaf: no gradient reached connector; it would stay random for the whole training'
    ]


def test_corrupt_image(config, data, tmp_path):
    import shutil

    shutil.copytree(data, tmp_path / 'scenes')
    for image in (tmp_path / 'scenes/leftImg8bit/train').rglob('*.png'):
        image.write_bytes(b'no image')
    config.train_dataloader.dataset.data_root = str(tmp_path / 'scenes')
    report = look(config)
    assert report['gradients'].status == 'failed' and 'is no image that can be decoded' in report.failures[0]


def test_only_distillation_configs(config):
    config.model = config.model.student
    with pytest.raises(ConfigError, match='the doctor looks at distillation configs'):
        MMToolbox(config)


# -- the cheap checks of the training ----------------------------------------------------------------------------------


def test_training_warns_about_weights_of_0_and_a_teacher_that_knows_nothing(config, tmp_path):
    config.model.distillers.mimic.loss_weight = 0
    config.train_cfg.update(max_iters=1, val_interval=1)
    train(config, str(tmp_path), seed=0)
    (log,) = tmp_path.glob('*/*.log')
    text = log.read_text()
    assert 'WARNING - distillers.mimic.loss_weight: is 0, so this distiller does nothing' in text
    assert 'WARNING - teacher.checkpoint: the teacher scores mIoU' in text


def test_training_needs_the_operators_of_mmcv(config, tmp_path, monkeypatch):
    monkeypatch.setattr('kd_dense.engine.run.operators_problem', lambda: 'mmcv: its compiled operators do not load')
    with pytest.raises(ConfigError, match='mmcv: its compiled operators'):
        train(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()
