"""The benchmark on YOLO configs: are the steps those of Ultralytics' trainer?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ultralytics.nn.distill_model import DistillationModel as UltralyticsDistillationModel
from ultralytics.utils import YAML

from kd_dense import ConfigError
from kd_dense.analysis.benchmark import Options, Variant, benchmark
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.yolo.benchmark import YoloBench, class_names_of, write_images
from tests.yolo.helpers import CLASSES, FAST, small_yaml

RANDOM = Options(random_teacher=True)


@pytest.fixture
def wider_yaml(tmp_path):
    """Family (and task) -> the model YAML of a teacher."""

    def path(family: str = 'yolo11', task: str = '') -> str:
        file = tmp_path / f'{family}n{task}.yaml'
        YAML.save(file, small_yaml(family, 0.1875, task))
        return str(file)

    return path


@pytest.fixture
def bench(write_config, wider_yaml):
    """``bench(options, ...)``: of a config without data and without the file of its teacher; closed at the end."""
    opened = []

    def make(options: Options = RANDOM, teacher: dict | None = None, **other) -> YoloBench:
        teacher = {'checkpoint': 'nowhere.pt', 'config': wider_yaml(), **(teacher or {})}
        made = YoloBench(write_config(teacher=teacher, **{'data': 'nowhere.yaml', **other}), options)
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close()


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_facts_and_batch(bench, student_yaml):
    made = bench()
    facts = made.prepare()
    assert (facts.toolbox, facts.device, facts.image_size, facts.batch) == ('ultralytics', 'cpu', (64, 64), 4)
    assert (facts.optimizer, facts.precision, facts.random_teacher) == ('SGD', 'fp32', True)
    assert facts.student_parameters == sum(p.numel() for p in made.toolbox.student.parameters())
    assert (
        facts.teacher_parameters == sum(p.numel() for p in made.toolbox.teacher.parameters()) > facts.student_parameters
    )
    assert made.batch['img'].shape == (4, 3, 64, 64) and 0 <= made.batch['img'].min() <= made.batch['img'].max() <= 1
    assert len(made.batch['bboxes']) == len(made.batch['cls']) > 4
    assert len(made.toolbox.student.names) == 80  # of the model YAML, as there is no data YAML


def test_threads_are_those_that_were_asked_for(bench, monkeypatch):
    monkeypatch.setattr('ultralytics.utils.torch_utils.NUM_THREADS', 2)
    bench().prepare()
    assert torch.get_num_threads() == 1


def test_forwards_are_those_of_the_trainer(bench):
    made = bench(distillers={'native': {'type': 'Native', 'loss_weight': {'value': 6.0, 'start': 0.5}}})
    made.prepare()
    with made.variant(made.distillers(), ['native']) as works:
        assert list(works) == ['student', 'teacher', 'step', 'native']
        model = made.toolbox.model
        parts, items = model.loss(made.batch)
        assert float(works['step'].forward().detach()) == pytest.approx(float(parts.sum()), rel=1e-5)
        assert float(works['student'].forward().detach()) == pytest.approx(float(parts[:-1].sum()), rel=1e-5)
        assert (parts > 0).all() and float(items['native']) > 0  # at its full weight, whatever its schedule
        (native,) = works['native'].modules
        assert type(native) is UltralyticsDistillationModel
        theirs, their_items = native.loss(made.batch)
        assert float(works['native'].forward().detach()) == pytest.approx(float(theirs.sum()), rel=1e-5)
        assert their_items['dis_loss'] > 0
        assert float(theirs[:-1].sum()) == pytest.approx(
            float(parts[:-1].sum()), rel=1e-4
        )  # a copy of the same student
        assert works['teacher'].forward() is None


def test_cached_step_has_the_same_loss_without_a_teacher(bench):
    made = bench()
    made.prepare()
    with made.variant(made.distillers(), ['cached']) as works:
        (model,) = works['cached'].modules
        assert model.teacher_model is None and model.student_model is made.toolbox.student
        ours, cached = (float(works[name].forward().detach()) for name in ('step', 'cached'))
        assert cached == pytest.approx(ours, rel=1e-3) and ours > float(works['student'].forward().detach())
        works['cached']()
        assert not model.distillers._pending


def test_updates_leave_the_weights_as_they_were(bench):
    made = bench(train=FAST | {'optimizer': 'auto'})
    assert made.prepare().optimizer == 'MuSGD'  # of a long run, not of one on four images
    with made.variant(made.distillers(), ['native']) as works:
        for work in works.values():
            work.forward()  # the criterion is made
        for name in ('student', 'step', 'native'):
            (model,) = works[name].modules
            before = weights(model)
            works[name]()
            works[name]()
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), name
            assert all(p.grad is None for p in model.parameters())
            trainer = made.toolbox.trainer
            assert trainer.model is model and trainer.ema.updates == 2 and type(trainer.optimizer).__name__ == 'MuSGD'
        assert not made.toolbox.model.distillers._pending  # the first step proved that the connectors learn


def test_hooks_of_the_native_model_are_on_copies(bench):
    made = bench()
    made.prepare()
    with made.variant(made.distillers(), ['native']) as works:
        works['native']()
        for model in (made.toolbox.student, made.toolbox.teacher):
            assert not any(m._forward_hooks for m in model.modules())
        (native,) = works['native'].modules
        assert any(m._forward_hooks for m in native.modules())


def test_segmentation_of_two_branches(bench, student_yaml, wider_yaml):
    made = bench(student=student_yaml('yolo26', '-seg'), teacher={'config': wider_yaml('yolo26', '-seg')})
    (row,) = benchmark(made, [Variant('')], ['native'], 1, quiet())
    parts = row.parts
    assert row.variant == 'Native' and set(parts) == {'student', 'teacher', 'step', 'native'}
    assert parts['step'].kept > parts['student'].kept > 0 and parts['teacher'].kept == 0
    assert parts['step'].waits == parts['student'].waits  # distillation makes the host wait nowhere
    assert parts['step'].peak > parts['student'].peak
    assert not Path(made.folder.name).exists() and not Path(made.toolbox.folder.name).exists()


def test_teacher_of_a_file(bench, write_config, teacher_file, data):
    made = bench(Options(boxes=2), teacher={'checkpoint': teacher_file(), 'config': None}, data=str(data))
    assert not made.prepare().random_teacher
    state = torch.load(teacher_file(), weights_only=False)['model'].state_dict()
    assert all(torch.equal(v, state[k]) for k, v in made.toolbox.teacher.state_dict().items())
    assert made.toolbox.student.names == dict(enumerate(CLASSES))  # of the data YAML


def test_class_names(tmp_path, data, student_yaml):
    assert class_names_of(str(data), None) == list(CLASSES)
    assert len(class_names_of('coco.yaml', None)) == 80 and class_names_of('coco.yaml', None)[0] == 'person'
    (tmp_path / 'few.yaml').write_text('nc: 2')
    assert class_names_of(str(tmp_path / 'few.yaml'), None) == ['class_0', 'class_1']
    assert len(class_names_of('nowhere.yaml', student_yaml())) == 80


def test_images_have_the_boxes_that_are_made_up(tmp_path):
    from kd_dense.analysis.benchmark import made_up

    write_images(tmp_path, 2, 64, ['a', 'b'], Options(boxes=4))
    generator = torch.Generator().manual_seed(0)
    expected = made_up.boxes(4, (64, 64), generator) / 64
    rows = [list(map(float, line.split())) for line in (tmp_path / 'labels/0.txt').read_text().splitlines()]
    for row, box in zip(rows, expected.tolist(), strict=True):
        x, y = row[1::2], row[2::2]
        assert row[0] in (0, 1) and len(row) == 17
        assert [min(x), min(y), max(x), max(y)] == pytest.approx(box, abs=1e-5)


@pytest.mark.parametrize(
    ('options', 'changes', 'sentence'),
    [
        (Options(), {}, 'there is no file nowhere.pt.*; or measure with --random-teacher'),
        (RANDOM, {'teacher': {'config': None}}, 'teacher.config: is missing, so what the teacher is can not be known'),
        (RANDOM, {'teacher': {'config': 'yolo99x.yaml'}}, 'teacher.config: yolo99x.yaml is no model YAML'),
        (Options((64, 96), random_teacher=True), {}, '--image-size: Ultralytics trains on squares, not on 64 x 96'),
        (RANDOM, {'train': FAST | {'batch': -1}}, 'train.batch: -1 lets Ultralytics choose; give --batch N'),
    ],
)
def test_sentences(bench, options, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        bench(options, **changes).prepare()


def test_weights_of_0(bench):
    made = bench()
    made.prepare()
    asleep = {'native': {'type': 'Native', 'loss_weight': 0}}
    with pytest.raises(ConfigError, match='every loss_weight is 0'), made.variant(asleep, []):
        pass
