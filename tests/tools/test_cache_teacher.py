"""tools/cache_teacher.py, and tools/train.py on what it writes."""

import pytest

from tests.tools.conftest import scalars


def test_cache_and_train(config, call, capsys, tmp_path):
    folder = tmp_path / 'cache'
    call('cache_teacher', config, '--cache', folder, '--views', 2, '--top-k', 3, '--shard-mb', 0.1)
    output = capsys.readouterr()
    assert output.out.splitlines()[-1].startswith('16 views, ') and f'cache={str(folder)!r})' in output.out
    assert '16/16' in output.err  # the bar
    options = ('--cfg-options', f'model.teacher.cache={folder}')
    call('train', config, '--work-dir', tmp_path / 'cached', *options)
    lines = scalars(tmp_path / 'cached')
    assert len(lines) == 4 and all(line['kd.logits.loss'] > 0 and line['kd.mimic.loss'] > 0 for line in lines)
    call('train', config, '--work-dir', tmp_path / 'alone', '--student-alone', *options)
    alone = scalars(tmp_path / 'alone')
    assert 'kd.mimic.loss' not in alone[0]
    assert alone[0]['decode.loss_ce'] == pytest.approx(lines[0]['decode.loss_ce'])  # the same views


def test_what_can_not_work__is_one_sentence(config, error, tmp_path):
    assert 'allow more with --max-gb' in error('cache_teacher', config, '--cache', tmp_path, '--max-gb', 1e-9)
    assert '--top-k: must be from 1 to 6' in error('cache_teacher', config, '--cache', tmp_path, '--top-k', 7)
    assert '--anchors: is for sigmoid heads' in error('cache_teacher', config, '--cache', tmp_path, '--anchors', 9)
    said = error('train', config, '--work-dir', tmp_path / 'w', '--cfg-options', f'model.teacher.cache={tmp_path}')
    assert said.startswith('error: teacher.cache: there is no cache in ')
