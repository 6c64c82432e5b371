"""tools/benchmark.py, from the command line to the table and the files."""

import json

import pytest

from tests.tools.conftest import ROOT, edited

FAST = ('--iters', '1', '--random-teacher')


@pytest.fixture
def printed(call, capsys):
    """``printed(*arguments)``: the lines of the table that the tool prints, and everything."""

    def run(*arguments):
        call('benchmark', *arguments, *FAST)
        text = capsys.readouterr().out
        return [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('|')], text

    return run


def test_table_and_files(config, printed, tmp_path):
    out = tmp_path / 'out'
    table, text = printed(
        *(config, '--against', 'mmrazor-style', '--against', 'student', '--out', out, '--batch', '3'),
        *('--variant', 'CWD', "logits=dict(type='CWD')"),
        *('--variant', 'both', "a=dict(type='LogitKD')", "b=dict(type='NFD', taps='backbone:1')"),
    )
    header, _, first, second = table
    assert header[4:9] == [
        'step, ms',
        'step / bound',
        'step / student alone',
        'mmrazor-style, ms',
        'step / mmrazor-style',
    ]
    assert first[:2] == ['tiny', 'CWD'] and second[:2] == ['tiny', 'both']
    assert 'tiny (mmseg, cpu, fp32): batch of 3, 64 x 64 pixels, made up' in text and 'random weights' in text
    assert f'written: {out / "benchmark.md"}, {out / "benchmark.json"}' in text
    assert (out / 'benchmark.md').read_text() == text.partition('\n\nwritten: ')[0].rstrip() + '\n'
    content = json.loads((out / 'benchmark.json').read_text())
    assert [row['variant'] for row in content['rows']] == ['CWD', 'both'] and content['iterations'] == 1
    assert set(content['rows'][1]['distillers']) == {'a', 'b'}
    assert set(content['rows'][0]['parts']) == {'student', 'teacher', 'step', 'mmrazor-style'}


def test_distillers_and_options_of_the_config__and_of_several(config, printed, tmp_path):
    other = edited(config, tmp_path / 'other.py', **{'model.distillers.mimic.type': 'CWD'})
    table, text = printed(config, other, '--image-size', '96', '--cfg-options', 'train_dataloader.batch_size=1')
    assert [row[:2] for row in table[2:]] == [['tiny', 'LogitKD + FeatureMimic'], ['other', 'LogitKD + CWD']]
    assert text.count('batch of 1, 96 x 96 pixels') == 2


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (
            ['--against', 'native'],
            '--against native: can train none of these configs; what can is student, mmrazor-style',
        ),
        (['--variant', 'CWD', 'neck=CWD'], "--variant CWD: 'neck=CWD' is no distiller; write it as in a config"),
        (['--variant', 'CWD'], '--variant: needs a name and distillers, such as --variant CWD'),
        (['--variant', 'x', "a=dict(type='CVD')"], "distillers.a: unknown distiller 'CVD'; did you mean 'CWD'"),
        (['--image-size', '1', '2', '3'], '--image-size: give height and width, or one number for a square'),
        (['--cfg-options', 'model.student.type=Nothing'], 'student: the model can not be built'),
        (['--cfg-options', 'model.distillers.mimic.taps=backbone.layer9'], "the model has no module 'backbone.layer9'"),
    ],
)
def test_sentences(config, error, arguments, sentence):
    assert sentence in error('benchmark', config, *FAST, *arguments)


def test_teacher_that_is_not_there(config, error):
    said = error('benchmark', config, '--cfg-options', 'model.teacher.checkpoint=nowhere.pth')
    assert said.startswith('error: teacher.checkpoint: There is no checkpoint file nowhere.pth')
    assert said.endswith('; or measure with --random-teacher: weights do not change the time')


def test_config_that_can_not_be_read(error, tmp_path):
    assert 'there is no config file' in error('benchmark', tmp_path / 'nowhere.py')


@pytest.mark.parametrize('number', ['0', '-3', 'many'])
def test_numbers(config, call, number, capsys):
    with pytest.raises(SystemExit) as end:
        call('benchmark', config, '--iters', number)
    assert end.value.code == 2 and 'argument --iters' in capsys.readouterr().err


def test_process_prints_a_table_and_nothing_else(config, run_process):
    done = run_process(ROOT / 'tools' / 'benchmark.py', config, *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('# Cost of a training step\n') and 'profiler' not in done.stderr
