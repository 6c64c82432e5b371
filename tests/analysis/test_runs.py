import json

import pytest
from mmengine.config import Config

from kd_dense.analysis.compare import ADAPTATION
from kd_dense.analysis.runs import (
    config_of,
    find_runs,
    named_folders,
    run_folder,
    teacher_argument,
    teacher_score,
    train_runs,
    train_variants,
    variant_names,
)
from kd_dense.errors import ConfigError


@pytest.fixture
def cfg(tmp_path) -> Config:
    teacher = tmp_path / 'teacher.pth'
    teacher.write_bytes(b'weights')
    return Config(
        dict(
            model=dict(
                type='kd_dense.Distillation',
                teacher=dict(checkpoint=str(teacher)),
                distillers=dict(logits=dict(type='LogitKD', temperature=4.0)),
            ),
            work_dir='anywhere',
        )
    )


@pytest.fixture
def trainer(record):
    """Leaves a record as training does, and notes its calls."""

    class Trainer:
        calls: list = []
        fail_at: int | None = None

        def __call__(self, cfg, work_dir, distill, seed, resume):
            if len(self.calls) == self.fail_at:
                raise KeyboardInterrupt
            self.calls.append((distill, seed, resume))
            record('distilled' if distill else 'student', seed, 60.0 + distill + seed).save(work_dir)

    Trainer.calls = []
    return Trainer()


def test_runs_of_an_adaptation_have_its_names(cfg, trainer, tmp_path):
    said = []
    folders = train_runs(cfg, tmp_path / 'out', [3], trainer, said.append, words=ADAPTATION)
    assert folders == {name: [tmp_path / 'out' / name / 'seed_3'] for name in ('student', 'adapted')}
    assert said[0].startswith('run 1 of 2: source only, seed 3: training in')
    assert said[-1] == 'run 2 of 2: adapted, seed 3: mIoU 64.00'


def test_every_seed_is_trained_both_ways(cfg, trainer, tmp_path):
    said = []
    folders = train_runs(cfg, tmp_path / 'out', [3, 1], trainer, said.append)
    assert trainer.calls == [(False, 3, True), (True, 3, True), (False, 1, True), (True, 1, True)]
    assert folders == {
        name: [tmp_path / 'out' / name / f'seed_{s}' for s in (3, 1)] for name in ('student', 'distilled')
    }
    assert said[0].startswith('run 1 of 4: student alone, seed 3: training in')
    assert said[-1] == 'run 4 of 4: distilled, seed 1: mIoU 62.00'


def test_after_an_interruption_only_the_rest_is_trained(cfg, trainer, tmp_path):
    trainer.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        train_runs(cfg, tmp_path, [0, 1], trainer, str)
    trainer.fail_at = None
    train_runs(cfg, tmp_path, [0, 1], trainer, str)
    assert trainer.calls == [(False, 0, True), (True, 0, True), (False, 1, True), (True, 1, True)]


def test_a_record_of_an_unfinished_run_is_no_reason_to_skip_it(cfg, trainer, record, tmp_path):
    train_runs(cfg, tmp_path, [0], trainer, str)
    record(finished=False).save(run_folder(tmp_path, 'student', 0))
    trainer.calls.clear()
    train_runs(cfg, tmp_path, [0], trainer, str)
    assert trainer.calls == [(False, 0, True)]


def test_runs_of_other_settings_do_not_pass_for_new_ones(cfg, trainer, tmp_path):
    train_runs(cfg, tmp_path / 'out', [0], trainer, str)
    cfg.work_dir = 'elsewhere'  # does not change what is trained
    train_runs(cfg, tmp_path / 'out', [0], trainer, str)
    cfg.model.distillers.logits.temperature = 2.0
    with pytest.raises(ConfigError, match=r'other settings \(model.distillers.logits.temperature was 4.0 and is 2.0\)'):
        train_runs(cfg, tmp_path / 'out', [0], trainer, str)
    cfg.model.distillers.logits.temperature = 4.0
    (tmp_path / 'teacher.pth').write_bytes(b'other weights')
    with pytest.raises(ConfigError, match='content of the teacher checkpoint was'):
        train_runs(cfg, tmp_path / 'out', [0], trainer, str)


def test_runs_that_came_from_elsewhere_are_not_taken_over(cfg, trainer, record, tmp_path):
    record().save(run_folder(tmp_path, 'student', 0))
    with pytest.raises(ConfigError, match='has runs but no settings.json'):
        train_runs(cfg, tmp_path, [0], trainer, str)
    assert trainer.calls == []


def test_training_without_a_record_is_an_error(cfg, tmp_path):
    with pytest.raises(ConfigError, match='val_evaluator: .* has no record.json after training'):
        train_runs(cfg, tmp_path, [0], lambda *_, **__: None, str)


@pytest.mark.parametrize('seeds', [[], [0, 0]])
def test_seeds_are_checked(cfg, trainer, tmp_path, seeds):
    with pytest.raises(ConfigError, match='--seeds'):
        train_runs(cfg, tmp_path, seeds, trainer, str)


def alone(cfg):
    return Config({**cfg, 'model': dict(type='Student')})


def variants(cfg) -> dict[str, Config]:
    configs = {}
    for name, temperature in (('hot', 8.0), ('cold', 1.0)):
        configs[name] = Config(cfg.to_dict())
        configs[name].model.distillers.logits.temperature = temperature
    return configs


def test_several_configs_share_the_student_alone(cfg, trainer, tmp_path):
    folders = train_variants(variants(cfg), tmp_path, [0, 1], trainer, alone, str)
    assert [distill for distill, _, _ in trainer.calls] == [False, True, True] * 2
    assert folders == {name: [tmp_path / name / f'seed_{s}' for s in (0, 1)] for name in ('student', 'hot', 'cold')}
    more = {**variants(cfg), 'third': cfg}  # another one later: only it is trained
    trainer.calls.clear()
    train_variants(more, tmp_path, [0, 1], trainer, alone, str)
    assert trainer.calls == [(True, 0, True), (True, 1, True)]


def test_several_configs_must_be_of_one_student(cfg, trainer, tmp_path):
    configs = variants(cfg)
    configs['cold'].train_cfg = dict(max_iters=7)
    with pytest.raises(ConfigError, match=r'CONFIG cold: the student alone .*train_cfg.max_iters was None'):
        train_variants(configs, tmp_path, [0], trainer, alone, str)
    assert trainer.calls == []


def test_several_configs_keep_their_settings(cfg, trainer, tmp_path):
    configs = variants(cfg)
    train_variants(configs, tmp_path, [0], trainer, alone, str)
    configs['hot'].model.distillers.logits.temperature = 9.0
    with pytest.raises(ConfigError, match=r'other settings \(model.distillers.logits.temperature was 8.0 and is 9.0\)'):
        train_variants(configs, tmp_path, [0], trainer, alone, str)


def test_names_of_several_configs():
    assert variant_names(['a/nfd_big_small_1x_coco.py', 'cwd_big_small_1x_coco.py']) == ['nfd', 'cwd']
    assert variant_names(['nfd_r50_r18.py', 'nfd_r101_r18.py']) == ['nfd_r50_r18', 'nfd_r101_r18']
    with pytest.raises(ConfigError, match="'nfd_r50' can not name one of several configs"):
        variant_names(['a/nfd_r50.py', 'b/nfd_r50.py'])
    with pytest.raises(ConfigError, match="'student'"):
        variant_names(['student_x.py', 'nfd_x.py'])


def test_runs_are_found_in_their_folder_or_the_one_above(record, tmp_path):
    for seed in range(3):
        record(seed=seed).save(tmp_path / f'seed_{seed}')
    assert find_runs([tmp_path]) == [tmp_path / f'seed_{s}' for s in range(3)]
    assert find_runs([tmp_path / 'seed_2', str(tmp_path / 'seed_0')]) == [tmp_path / 'seed_2', tmp_path / 'seed_0']
    with pytest.raises(ConfigError, match='nowhere: no finished run'):
        find_runs([tmp_path / 'nowhere'])


def test_variants_are_named_on_the_command_line(tmp_path):
    assert named_folders(['a', 'b']) == {'distilled': ['a', 'b']}
    assert named_folders(['LogitKD=a', 'b', 'CWD=c/d=e']) == {'LogitKD': ['a', 'b'], 'CWD': ['c/d=e']}
    (tmp_path / 'lr=1').mkdir()
    assert named_folders([f'{tmp_path}/lr=1']) == {'distilled': [f'{tmp_path}/lr=1']}
    with pytest.raises(ConfigError, match="'student' is taken"):
        named_folders(['student=a'])


def test_the_config_in_the_folder_of_a_run_comes_first(record, tmp_path):
    run = record(config='configs/a.py')
    assert str(config_of(tmp_path, run)) == 'configs/a.py'
    (tmp_path / 'a.py').write_text('x = 1')
    assert config_of(tmp_path, run) == tmp_path / 'a.py'


@pytest.mark.parametrize(
    ('toolbox', 'metric', 'scores', 'expected'),
    [
        ('mmseg', 'mIoU', {'aAcc': 90.0, 'mIoU': 71.2}, 71.2),
        ('mmseg', 'averageScoreCategories', {'averageScoreCategories': 0.712}, 71.2),
        ('mmdet', 'bbox_mAP', {'coco/bbox_mAP_50': 0.5, 'coco/bbox_mAP': 0.312}, 31.2),
        ('ultralytics', 'mAP50-95', {'metrics/mAP50(B)': 0.5, 'metrics/mAP50-95(B)': 0.312}, 31.2),
        ('ultralytics', 'mAP50-95(M)', {'metrics/mAP50-95(B)': 0.5, 'metrics/mAP50-95(M)': 0.312}, 31.2),
        ('mmseg', 'mIoU', {'aAcc': 90.0}, None),
        ('mmseg', 'mIoU', {'mIoU': None}, None),
    ],
)
def test_teacher_score_of_each_toolbox_in_percent(record, tmp_path, toolbox, metric, scores, expected):
    (tmp_path / 'teacher_score.json').write_text(json.dumps({'score': scores, 'key': 'x'}))
    found = teacher_score([tmp_path / 'no_run', tmp_path], record(toolbox=toolbox, metric=metric))
    assert found == (None if expected is None else pytest.approx(expected))


def test_two_teachers_are_an_error(record, tmp_path):
    for name, value in (('a', 70.0), ('b', 71.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'teacher_score.json').write_text(json.dumps({'score': {'mIoU': value}}))
    with pytest.raises(ConfigError, match='had different teachers'):
        teacher_score([tmp_path / 'a', tmp_path / 'b'], record())
    (tmp_path / 'a' / 'teacher_score.json').write_text('{')
    with pytest.raises(ConfigError, match='teacher_score.json can not be read'):
        teacher_score([tmp_path / 'a'], record())


def test_teacher_argument_is_a_score_or_a_folder(record, tmp_path):
    assert teacher_argument('71.5', record()) == 71.5
    record('teacher', value=72.0).save(tmp_path / 'run')
    assert teacher_argument(str(tmp_path / 'run'), record()) == 72.0
    (tmp_path / 'teacher_score.json').write_text(json.dumps({'score': {'mIoU': 73.0}}))
    assert teacher_argument(str(tmp_path), record()) == 73.0
    for text, message in (('710', 'in percent'), (str(tmp_path / 'none'), 'neither a number nor a folder')):
        with pytest.raises(ConfigError, match=message):
            teacher_argument(text, record())
    record('teacher', metric='mAcc').save(tmp_path / 'run')
    with pytest.raises(ConfigError, match='its score is mAcc'):
        teacher_argument(str(tmp_path / 'run'), record())
