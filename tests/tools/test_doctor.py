"""tools/doctor.py, from the command line to exit code and JSON."""

import json

import pytest

from tests.tools.conftest import ROOT, edited

FAST = ('--iterations', '1', '--images', '2')
#: Of the tiny run of these tests, whose teacher is random: not a failure of the doctor, but a finding.
UNTRAINED = 'the teacher is not better than the student before training'


@pytest.fixture
def doctor(call, capsys):
    """``doctor(*arguments)``: exit code and output of the tool."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            call('doctor', *arguments, *FAST)
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return run


def background(monkeypatch):
    """A teacher that is better than the student, by a fixed amount."""
    monkeypatch.setattr(
        'kd_dense.engine.doctor.MMToolbox.score', lambda self, side, count: {'mIoU': 60.0 if side == 'teacher' else 2.0}
    )


def test_good_config_ends_with_0_and_a_verdict(config, doctor, monkeypatch, tmp_path):
    background(monkeypatch)
    monkeypatch.chdir(tmp_path)
    code, out, _ = doctor(config, '--json', 'doctor.json', '--high', 1e6, '--low', 0)
    assert code == 0 and out.splitlines()[-1].strip() == 'doctor: all checks passed'
    assert [path.name for path in tmp_path.iterdir()] == ['doctor.json']
    content = json.loads((tmp_path / 'doctor.json').read_text())
    assert content['exit_code'] == 0 and content['config'] == str(config) and content['toolbox'] == 'mmseg'
    assert content['checks']['scores']['facts']['student_percent'] == 2


def test_warnings_do_not_change_the_exit_code(config, doctor, monkeypatch):
    background(monkeypatch)
    code, out, _ = doctor(config, '--cfg-options', 'model.distillers.mimic.loss_weight=1e5')
    assert code == 0 and 'doctor: all checks passed, 1 warning' in out.splitlines()[-1]


def test_failures_end_with_1_and_the_sentences(config, doctor):
    code, out, _ = doctor(config, '--cfg-options', 'model.distillers.mimic.taps=backbone.layer9')
    assert code == 1
    assert out.splitlines()[-1].strip() == 'doctor: 2 checks failed: scores, taps'
    assert UNTRAINED in out and "the model has no module 'backbone.layer9'" in out


def test_whole_val_scores_all(config, doctor, tmp_path):
    path = tmp_path / 'all.json'
    assert doctor(config, '--whole-val', '--json', path)[0] == 1
    facts = json.loads(path.read_text())['checks']['scores']['facts']
    assert facts['images'] == facts['all_images'] == 4


@pytest.mark.parametrize('text', ['model = dict(', "_base_ = ['./nowhere.py']", 'a = 1'])
def test_config_that_can_not_be_read_ends_with_2(error, tmp_path, text):
    path = tmp_path / 'broken.py'
    path.write_text(text + '\n')
    assert error('doctor', path)


def test_options_that_do_not_fit_end_with_2(config, error):
    said = error('doctor', config, '--cfg-options', 'model.distillers.mimic.taps.student=neck')
    assert '--cfg-options: do not fit ' in said and 'taps' in said


def test_process__prints_nothing_but_json(config, run_process, tmp_path):
    broken = edited(config, tmp_path / 'broken.py', **{'model.teacher.checkpoint': 'nowhere.pth'})
    done = run_process(ROOT / 'tools' / 'doctor.py', broken, '--json', *FAST)
    assert done.returncode == 1, done.stderr
    content = json.loads(done.stdout)
    assert content['failures'] == ['teacher.checkpoint: There is no checkpoint file nowhere.pth; check the path.']
    assert content['checks']['cost']['status'] == 'skipped' and content['checks']['student']['status'] == 'passed'
