"""Short runs of the trainers."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, SegmentationModel

import kd_dense.yolo
from kd_dense.analysis.record import RunRecord
from kd_dense.distillers import Distiller, TapPair
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.registry import DISTILLERS
from kd_dense.yolo import DistillationTrainer
from tests.yolo.helpers import FAST, build, save_model, write_data


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def trainer_for(config, tmp_path, student, data, **arguments):
    overrides = {
        **FAST,
        'model': student,
        'data': str(data),
        'distill_model': str(config),
        'project': str(tmp_path),
        'name': 'run',
    }
    return DistillationTrainer(overrides={**overrides, **arguments})


@pytest.mark.parametrize('distiller', [
    {'type': 'Native'},
    {'type': 'LogitKD'},
    {'type': 'CWD'},
    {'type': 'FeatureMimic', 'taps': 'neck'},
    {'type': 'NFD', 'taps': 'backbone'},
], ids=lambda d: d['type'])  # fmt: skip
def test_one_epoch(distiller, write_config, tmp_path):
    record = kd_dense.yolo.train(write_config(distillers={'kd': distiller}), tmp_path / 'run')
    (row,) = rows_of(tmp_path / 'run' / 'results.csv')
    assert float(row['train/kd']) > 0
    assert float(row['val/kd']) == 0
    assert float(row['train/box_loss']) > 0
    assert type(YOLO(record.checkpoint).model) is DetectionModel
    assert record.checkpoint == str(tmp_path / 'run' / 'weights' / 'last.pt')
    assert (record.name, record.metric, record.toolbox) == ('distilled', 'mAP50-95', 'ultralytics')
    assert record.value == record.curve[-1][1] == 100 * float(row['metrics/mAP50-95(B)'])
    assert (record.iterations, len(record.curve)) == (2, 1)
    assert record.seconds > 0
    assert record.parameters == sum(p.numel() for p in build('yolo11').parameters())
    # two 1x1 convolutions (with bias) on each of three levels, from 32 to 48 channels
    assert record.extra_parameters == {
        'Native': 3 * (33 * 48 + 49 * 48),
        'FeatureMimic': 3 * 33 * 48,
        'NFD': 3 * 32 * 48,
    }.get(distiller['type'], 0)
    assert RunRecord.load(tmp_path / 'run') == record
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.py', 'run']


@pytest.mark.parametrize('family', ['yolov8', 'yolo26'])
def test_other_families(family, write_config, student_yaml, teacher_file, tmp_path):
    config = write_config(student=student_yaml(family), teacher={'checkpoint': teacher_file(family)})
    kd_dense.yolo.train(config, tmp_path / 'run')
    assert float(rows_of(tmp_path / 'run' / 'results.csv')[0]['train/native']) > 0


def test_instance_segmentation(write_config, student_yaml, teacher_file, mask_data, tmp_path):
    config = write_config(
        student=student_yaml('yolo11', '-seg'),
        teacher={'checkpoint': teacher_file('yolo11', '-seg')},
        distillers={'native': {'type': 'Native'}, 'logits': {'type': 'LogitKD', 'loss_weight': 'auto'}},
        data=str(mask_data),
    )
    record = kd_dense.yolo.train(config, tmp_path / 'run')
    (row,) = rows_of(tmp_path / 'run' / 'results.csv')
    assert float(row['train/native']) > 0
    assert float(row['train/logits']) > 0
    assert float(row['train/seg_loss']) > 0
    assert record.value == 100 * float(row['metrics/mAP50-95(M)'])
    assert type(YOLO(record.checkpoint).model) is SegmentationModel


def test_through_ultralytics_own_interface(write_config, student_yaml, data, tmp_path):
    model = YOLO(student_yaml())
    model.train(
        trainer=DistillationTrainer,
        distill_model=str(write_config(student=None, data=None, train=None)),
        data=str(data),
        project=str(tmp_path),
        name='run',
        **FAST,
    )
    assert float(rows_of(tmp_path / 'run' / 'results.csv')[0]['train/native']) > 0
    assert type(model.model) is DetectionModel


def test_a_teacher_file_alone_means_native_with_the_gain_of_ultralytics(teacher_file, student_yaml, data, tmp_path):
    trainer = trainer_for(teacher_file(), tmp_path, student_yaml(), data, dis=2.5)
    trainer.train()
    assert float(rows_of(trainer.csv)[0]['train/native']) > 0
    weights = trainer.distillation.distillers.weights
    assert weights['native'](0.5) == 2.5


def test_a_config_may_start_from_weights(write_config, teacher_file, tmp_path):
    config = write_config(student=teacher_file())
    record = kd_dense.yolo.train(config, tmp_path / 'run')
    assert sum(p.numel() for p in YOLO(record.checkpoint).model.parameters()) == sum(
        p.numel() for p in build('yolo11', 0.1875).parameters()
    )


def test_multi_scale_single_class_and_gray_images(write_config, student_yaml, tmp_path):
    data = write_data(tmp_path / 'gray', names=('a', 'b'), channels=1)
    teacher = save_model(build('yolo11', 0.1875, names=('item',), seed=1, channels=1), tmp_path / 'teacher.pt')
    train = {**FAST, 'single_cls': True, 'multi_scale': 0.5, 'imgsz': 96}
    config = write_config(teacher={'checkpoint': str(teacher)}, data=str(data), train=train)
    record = kd_dense.yolo.train(config, tmp_path / 'run')
    assert float(rows_of(tmp_path / 'run' / 'results.csv')[0]['train/native']) > 0
    assert YOLO(record.checkpoint).model.yaml['channels'] == 1


def test_optimizer_holds_student_and_connectors_but_no_teacher(write_config, student_yaml, data, tmp_path):
    trainer = trainer_for(write_config(), tmp_path, student_yaml(), data)
    seen = {}

    def look(trainer):
        joined = trainer.distillation
        seen['optimizer'] = {id(p) for g in trainer.optimizer.param_groups for p in g['params']}
        seen['student'] = {id(p) for p in joined.student_model.parameters()}
        seen['connectors'] = {id(p) for p in joined.distillers.parameters()}
        seen['teacher'] = {id(p) for p in joined.teacher_model.parameters()}
        seen['before'] = [p.clone() for p in joined.distillers.parameters()]
        seen['weights'] = {k: v.clone() for k, v in joined.teacher_model.state_dict().items()}

    trainer.add_callback('on_train_start', look)
    trainer.train()
    assert seen['connectors']
    assert seen['optimizer'] == seen['student'] | seen['connectors']
    assert not seen['optimizer'] & seen['teacher']
    joined = trainer.distillation
    for before, after in zip(seen['before'], joined.distillers.parameters(), strict=True):
        assert not torch.equal(before, after)
    for name, value in joined.teacher_model.state_dict().items():
        assert torch.equal(value, seen['weights'][name]), name
    assert not joined.teacher_model.training


def test_progress_goes_from_0_to_1(write_config, student_yaml, data, tmp_path):
    trainer = trainer_for(write_config(), tmp_path, student_yaml(), data, epochs=2)
    seen = []
    trainer.add_callback(
        'on_train_batch_start', lambda t: seen.append((t.distillation.iteration, t.distillation.progress))
    )
    trainer.train()
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]


def test_the_teacher_sleeps_outside_of_its_schedule(write_config, student_yaml, data, tmp_path):
    distillers = {'native': {'type': 'Native', 'loss_weight': {'value': 6.0, 'stop': 0.5}}}
    trainer = trainer_for(write_config(distillers=distillers), tmp_path, student_yaml(), data, epochs=2)
    runs = []
    trainer.add_callback(
        'on_train_start',
        lambda t: t.distillation.teacher_model.model[0].register_forward_hook(
            lambda *_: runs.append(t.distillation.iteration)
        ),
    )
    trainer.train()
    assert runs == [0, 1]
    first, second = rows_of(trainer.csv)
    assert float(first['train/native']) > 0
    assert float(second['train/native']) == 0


def test_the_student_alone_sees_the_same_data(write_config, tmp_path, monkeypatch):
    """Same first batches and same initial weights with and without distillation."""
    seen = {}

    def note(trainer, key):
        model = getattr(trainer.model, 'student_model', trainer.model)
        seen.setdefault(key, [next(model.parameters()).detach().clone()])

    original = DetectionTrainer.preprocess_batch

    def preprocess(self, batch):
        key = type(self).__name__
        note(self, key)
        seen[key].append((tuple(batch['im_file']), batch['img'].clone()))
        return original(self, batch)

    monkeypatch.setattr(DetectionTrainer, 'preprocess_batch', preprocess)
    config = write_config()
    kd_dense.yolo.train(config, tmp_path / 'a', seed=3)
    alone = kd_dense.yolo.train(config, tmp_path / 'b', seed=3, distill=False)
    assert (alone.name, alone.seed, alone.extra_parameters) == ('student', 3, 0)
    ours, theirs = seen['DistillationTrainer'], seen['StudentTrainer']
    assert torch.equal(ours[0], theirs[0])
    for (files, images), (other_files, other_images) in zip(ours[1:], theirs[1:], strict=True):
        assert files == other_files
        assert torch.equal(images, other_images)
    assert 'train/native' not in rows_of(tmp_path / 'b' / 'results.csv')[0]


def test_a_config_without_teacher_trains_its_student_alone(write_config, tmp_path):
    config = write_config(teacher=None, distillers=None)
    config.write_text(
        '\n'.join(r for r in config.read_text().split('\n') if not r.startswith(('teacher', 'distillers')))
    )
    assert kd_dense.yolo.train(config, tmp_path / 'run').name == 'student'
    assert 'train/native' not in rows_of(tmp_path / 'run' / 'results.csv')[0]


def test_the_table_of_taps_and_the_teacher_are_logged(write_config, tmp_path, caplog):
    logging.getLogger('ultralytics').propagate = True
    with caplog.at_level(logging.INFO):
        kd_dense.yolo.train(write_config(), tmp_path / 'run')
    assert 'teacher: 499/499 tensors' in caplog.text
    assert 'native.features: student neck: [B, 32, 8, 8] stride 8' in caplog.text


@DISTILLERS.register_module()
class _DeadConnector(Distiller):
    """Multiplies its connector by 0."""

    def __init__(self):
        super().__init__()
        self.taps = {'x': TapPair(('neck:0',), ('neck:0',))}

    def setup(self, student, teacher):
        self.connector = torch.nn.Conv2d(student.shapes['x'][0][1], 1, 1)

    def forward(self, student, teacher, context):
        return {'loss': (self.connector(student['x'][0]) * 0).sum() + student['x'][0].square().mean()}


def test_a_connector_without_gradient_stops_the_run(write_config, tmp_path):
    with pytest.raises(DistillationError, match=r'distillers\.dead: no gradient reached connector'):
        kd_dense.yolo.train(write_config(distillers={'dead': {'type': '_DeadConnector'}}), tmp_path / 'run')


def test_freezing_layers_leaves_connectors_alone(write_config, student_yaml, data, tmp_path):
    trainer = trainer_for(write_config(), tmp_path, student_yaml(), data, freeze=3)
    trainer.train()
    joined = trainer.distillation
    frozen = [n for n, p in joined.student_model.named_parameters() if not p.requires_grad]
    assert {n.split('.')[1] for n in frozen if not n.endswith('dfl.conv.weight')} == {'0', '1', '2'}
    assert all(p.requires_grad for p in joined.distillers.parameters())


def test_unsupported_students_and_arguments(write_config, tmp_path, student_yaml):
    with pytest.raises(ConfigError, match="student: yolo11n-cls.yaml is for the task 'classify'"):
        kd_dense.yolo.train(write_config(student='yolo11n-cls.yaml'), tmp_path / 'run')
    with pytest.raises(ConfigError, match='student: yolo99n.yaml is neither'):
        kd_dense.yolo.train(write_config(student='yolo99n.yaml'), tmp_path / 'run')
    with pytest.raises(ConfigError, match='student: there is no file yolo99n.pt'):
        kd_dense.yolo.train(write_config(student='yolo99n.pt'), tmp_path / 'run')
    with pytest.raises(ConfigError, match='student: rtdetr-resnet50.yaml is for an unknown task'):
        kd_dense.yolo.train(write_config(student='rtdetr-resnet50.yaml'), tmp_path / 'run')
    with pytest.raises(ConfigError, match='student: its head is RTDETRDecoder'):
        kd_dense.yolo.train(
            write_config(student='rtdetr-resnet50.yaml', train={**FAST, 'task': 'detect'}), tmp_path / 'run'
        )
    with pytest.raises(ConfigError, match="DistillationTrainer is for the task 'detect', not 'segment'"):
        YOLO(student_yaml('yolo11', '-seg')).train(
            trainer=DistillationTrainer, distill_model=str(write_config()), **FAST
        )
    with pytest.raises(ConfigError, match='train.quantize'):
        kd_dense.yolo.train(write_config(train={**FAST, 'quantize': 8}), tmp_path / 'run')


def test_flags_that_ultralytics_has_no_use_for(write_config, tmp_path):
    with pytest.raises(ConfigError, match='auto_scale_lr: '):
        kd_dense.yolo.train(write_config(), tmp_path / 'run', auto_scale_lr=True)
    with pytest.raises(ConfigError, match="launcher: .*'slurm'"):
        kd_dense.yolo.train(write_config(), tmp_path / 'run', launcher='slurm')


def test_the_processes_of_several_gpus_build_the_same_trainer(write_config, tmp_path, student_yaml, data):
    """What Ultralytics' generated launch script does: rebuild the trainer from its class and its arguments."""
    from ultralytics.utils import DEFAULT_CFG_DICT
    from ultralytics.utils.dist import generate_ddp_file
    from ultralytics.utils.patches import torch_load

    trainer = trainer_for(write_config(), tmp_path, student_yaml(), data)
    script = Path(generate_ddp_file(trainer))
    try:
        state = torch_load(script.with_suffix('.pt'), map_location='cpu')
    finally:
        script.unlink()
        script.with_suffix('.pt').unlink()
    cfg = {**DEFAULT_CFG_DICT, 'save_dir': ''}
    again = state['trainer'](cfg=cfg, overrides=state['args'], _callbacks=state['callbacks'])
    assert type(again) is DistillationTrainer
    assert again.config == trainer.config
    assert again.save_dir == trainer.save_dir


def test_a_missing_data_set_is_not_downloaded(write_config, tmp_path, monkeypatch):
    from ultralytics.utils import YAML

    YAML.save(
        tmp_path / 'absent.yaml',
        {'path': str(tmp_path / 'x'), 'train': 'a', 'val': 'b', 'names': ['c'], 'download': 'x'},
    )
    with pytest.raises(ConfigError, match='data: .*images not found'):
        kd_dense.yolo.train(write_config(data=str(tmp_path / 'absent.yaml')), tmp_path / 'run')
    with pytest.raises(ConfigError, match='data: .*nowhere.yaml'):
        kd_dense.yolo.train(write_config(data='nowhere.yaml'), tmp_path / 'run')


def test_the_teacher_is_scored_once(write_config, tmp_path, monkeypatch):
    config = write_config()
    kd_dense.yolo.train(config, tmp_path / 'run')
    stored = json.loads((tmp_path / 'run' / 'teacher_score.json').read_text())['score']
    settings = kd_dense.yolo.config.read(config)
    score = YOLO(settings.teacher['checkpoint']).val(
        data=settings.data, imgsz=64, batch=4, workers=0, device='cpu', plots=False
    )
    assert stored['metrics/mAP50-95(B)'] == pytest.approx(score.box.map, abs=1e-6)
    monkeypatch.setattr('kd_dense.yolo.run.evaluate', lambda *_: pytest.fail('scored again'))
    kd_dense.yolo.train(config, tmp_path / 'run')
