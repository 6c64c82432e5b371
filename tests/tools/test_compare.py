import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from kd_dense.analysis.record import RunRecord
from kd_dense.errors import ConfigError, DistillationError, exit_with_sentence

TOOL = Path(__file__).parents[2] / 'tools' / 'compare.py'
RED = (250, 10, 60)


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('compare_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_run(folder: Path, name: str, seed: int, value: float, **changes) -> Path:
    fields = dict(toolbox='mmseg', metric='mIoU', iterations=10, seconds=5.0, parameters=100, curve=[(10, value)])
    fields.update(checkpoint=str(folder / 'last.pth'), config='config.py')
    RunRecord(name=name, seed=seed, value=value, **{**fields, **changes}).save(folder)
    if name == 'distilled':
        (folder / 'teacher_score.json').write_text(json.dumps({'score': {'mIoU': 70.0}}))
        (folder / 'config.py').write_text('default_scope = "mmseg"\nmodel = dict(teacher=dict(config="teacher.py"))\n')
    return folder


@pytest.fixture
def finished(tmp_path) -> tuple[Path, Path]:
    for seed, (student, distilled) in enumerate([(60.0, 62.0), (61.0, 62.5), (59.0, 61.5)]):
        save_run(tmp_path / 's' / f'seed_{seed}', 'student', seed, student)
        save_run(tmp_path / 'd' / f'seed_{seed}', 'distilled', seed, distilled)
    return tmp_path / 's', tmp_path / 'd'


@pytest.fixture
def engine(tool, monkeypatch):
    """Training and prediction replaced by something that takes no time; notes the calls."""
    calls = {'train': [], 'examples': [], 'variant': 'distilled'}

    def train_any(cfg, work_dir, distill=True, seed=0, resume=False):
        calls['train'].append((distill, seed))
        name = calls['variant'] if distill else 'student'
        save_run(Path(work_dir), name, seed, 60.0 + seed + (2 + 0.1 * seed if distill else 0))

    def examples(cfg, checkpoints, count):
        calls['examples'].append((dict(checkpoints), count))
        return [
            {k: np.full((20, 40, 3), RED, np.uint8) for k in ('input', 'truth', *checkpoints)} for _ in range(count)
        ]

    monkeypatch.setattr(tool.engine, 'train_any', train_any)
    monkeypatch.setattr(tool.engine, 'examples', examples)
    return calls


def red_share(path: Path) -> float:
    image = imread(path)[..., :3]
    return float((np.abs(image - np.divide(RED, 255)).max(-1) < 0.02).mean())


def test_finished_runs_are_compared(tool, engine, finished, tmp_path, capsys):
    tool.main(['--student', str(finished[0]), '--distilled', str(finished[1]), '--work-dir', str(tmp_path / 'out')])
    # Differences 2, 1.5, 2.5: 2 +- 4.302653 * 0.5 / sqrt(3); the gap is 70 - 60.
    text = ' '.join(capsys.readouterr().out.split())
    assert 'distilled is better by 2.00 mIoU, 95 % interval [0.76, 3.24] over 3 paired seeds; closes 20 %' in text
    assert engine['train'] == []
    ((checkpoints, count),) = engine['examples']
    assert checkpoints == {
        'student': str(finished[0] / 'seed_0' / 'last.pth'),
        'distilled': str(finished[1] / 'seed_0' / 'last.pth'),
        'teacher': None,
    }
    assert count == 4
    assert red_share(tmp_path / 'out' / 'comparison.png') > 0.1
    assert '| teacher | 70.00 |' in (tmp_path / 'out' / 'comparison.md').read_text(encoding='utf-8')
    assert (tmp_path / 'out' / 'comparison.csv').read_text().count('\nrun,') == 6


def test_variants_teacher_and_no_examples(tool, engine, finished, tmp_path, capsys):
    for seed, value in enumerate([60.5, 60.5, 59.5]):
        save_run(tmp_path / 'c' / f'seed_{seed}', 'distilled', seed, value)
    sources = ['--student', str(finished[0]), '--distilled', f'LogitKD={finished[1]}', f'CWD={tmp_path / "c"}']
    tool.main([*sources, '--teacher', '80', '--examples', '0', '--work-dir', str(tmp_path)])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'LogitKD is better by 2.00 mIoU' in text
    assert 'closes 10 %' in text
    assert 'CWD: no difference can be claimed' in text
    assert engine['examples'] == []
    assert red_share(tmp_path / 'comparison.png') == 0


def test_config_trains_what_is_missing(tool, engine, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text('default_scope = "mmseg"\n')
    arguments = [str(config), '--work-dir', str(tmp_path / 'out'), '--examples', '2', '--seeds', '0', '1']
    tool.main(arguments)
    assert engine['train'] == [(False, 0), (True, 0), (False, 1), (True, 1)]
    tool.main([*arguments, '2'])
    assert engine['train'][4:] == [(False, 2), (True, 2)]
    assert [count for _, count in engine['examples']] == [2, 2]
    assert not any('teacher' in checkpoints for checkpoints, _ in engine['examples'])  # this config names none
    assert 'over 3 paired seeds' in ' '.join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as exit_:
        tool.main([*arguments, '--cfg-options', 'model.depth=3'])
    assert exit_.value.code == 2
    assert 'runs of other settings (model.depth was None and is 3)' in capsys.readouterr().err


@pytest.mark.parametrize(
    'text',
    [
        'default_scope = "mmseg"\nmodel = dict(type="kd_dense.MeanTeacherAdaptation", student=dict(type="x"))\n',
        'student = "yolo11n.yaml"\nadaptation = dict(target="images")\n',
    ],
    ids=['openmmlab', 'yolo'],
)
def test_an_adaptation_is_compared_with_source_only(tool, engine, text, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text(text)
    engine['variant'] = 'adapted'
    tool.main([str(config), '--work-dir', str(tmp_path / 'out'), '--examples', '1', '--seeds', '0', '1'])
    assert engine['train'] == [(False, 0), (True, 0), (False, 1), (True, 1)]
    ((checkpoints, _),) = engine['examples']
    assert list(checkpoints) == ['student', 'adapted']
    said = ' '.join(capsys.readouterr().out.split())
    assert 'run 1 of 4: source only, seed 0' in said and 'adapted is better by 2.05 mIoU' in said
    assert '| source only | 60.50' in (tmp_path / 'out' / 'comparison.md').read_text(encoding='utf-8')
    # and from runs that are finished, which need no name
    folders = ['--student', str(tmp_path / 'out/student'), '--distilled', str(tmp_path / 'out/adapted')]
    tool.main([*folders, '--teacher', '90', '--work-dir', str(tmp_path / 'again'), '--examples', '0'])
    text = (tmp_path / 'again' / 'comparison.md').read_text(encoding='utf-8')
    assert '| adapted | 62.55' in text and '| target oracle | 90.00 |' in text
    for report in (said, text):
        assert 'student alone' not in report and 'distilled' not in report


def test_several_configs_make_one_table(tool, engine, tmp_path, capsys):
    for name in ('nfd', 'cwd'):
        (tmp_path / f'{name}_big_small.py').write_text(f'default_scope = "mmseg"\nmethod = "{name}"\n')
    out = tmp_path / 'out'
    configs = [str(tmp_path / 'nfd_big_small.py'), str(tmp_path / 'cwd_big_small.py')]
    with pytest.raises(SystemExit):  # the students differ, by the key `method`
        tool.main([*configs, '--work-dir', str(out), '--seeds', '0', '1'])
    assert 'CONFIG cwd: the student alone is not what was trained' in capsys.readouterr().err
    for config in configs:
        Path(config).write_text('default_scope = "mmseg"\n')
    tool.main([*configs, '--work-dir', str(tmp_path / 'again'), '--seeds', '0', '1'])
    assert engine['train'] == [(False, 0), (True, 0), (True, 0), (False, 1), (True, 1), (True, 1)]
    text = (tmp_path / 'again' / 'comparison.md').read_text(encoding='utf-8')
    assert '\n| nfd | ' in text and '\n| cwd | ' in text


def test_the_measurements_do_not_depend_on_the_examples(tool, engine, finished, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise ConfigError('val_dataloader.dataset.data_root: there is no folder x')

    monkeypatch.setattr(tool.engine, 'examples', broken)
    tool.main(['--student', str(finished[0]), '--distilled', str(finished[1]), '--work-dir', str(tmp_path / 'out')])
    assert 'the picture has no example images: val_dataloader.dataset.data_root' in capsys.readouterr().out
    assert imread(tmp_path / 'out' / 'comparison.png')[..., :3].std() > 0.05


def test_errors_are_one_sentence(tool, finished, capsys):
    save_run(finished[1] / 'seed_2', 'distilled', 2, 61.5, iterations=20)
    with pytest.raises(SystemExit) as exit_:
        tool.main(['--student', str(finished[0]), '--distilled', str(finished[1])])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: compare: 'distilled' with seed 2 has iterations 20, but 'student'")
    assert error.count('\n') == 1


@pytest.mark.parametrize('arguments', [[], ['--student', 'a'], ['config.py', '--student', 'a', '--distilled', 'b']])
def test_usage_is_checked(tool, arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool.main(arguments)
    assert exit_.value.code == 2
    assert 'CONFIG' in capsys.readouterr().err


@pytest.mark.parametrize('kind', [ConfigError, DistillationError])
def test_exit_with_sentence(kind, capsys):
    @exit_with_sentence
    def main(fail: bool) -> int:
        if fail:
            raise kind('model.teacher: no such\n  file')
        return 5

    assert main(False) == 5
    with pytest.raises(SystemExit) as exit_:
        main(True)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == 'error: model.teacher: no such file\n'


def test_a_bug_keeps_its_traceback():
    @exit_with_sentence
    def main() -> None:
        raise ValueError('bug')

    with pytest.raises(ValueError, match='bug'):
        main()


@pytest.mark.slow
def test_command_line(finished, tmp_path):
    command = [sys.executable, TOOL, '--student', finished[0], '--distilled', finished[1], '--examples', '0']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'work_dirs' / 'compare' / 'comparison.png').is_file()
    command = [sys.executable, TOOL, '--student', 'nowhere', '--distilled', finished[1]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('error: nowhere: no finished run')
    assert 'Traceback' not in done.stderr
