"""tools/cache_teacher.py and tools/train.py on a pre-training, as commands."""

from tests.pretraining.conftest import config  # noqa: F401  (a fixture)
from tests.tools.conftest import scalars


def test_cache_and_train(config, call, capsys, error, tmp_path):  # noqa: F811
    config.dump(str(tmp_path / 'pretraining.py'))
    folder, arguments = tmp_path / 'cache', (tmp_path / 'pretraining.py', '--cfg-options')
    option = f'model.teacher.cache={folder}'
    assert 'teacher.cache: there is no cache in' in error('train', *arguments, option)
    call('cache_teacher', *arguments, option, '--views', '3', '--top-k', '10')
    assert capsys.readouterr().out.splitlines()[-1].startswith('24 views, ')
    call('train', tmp_path / 'pretraining.py', '--work-dir', tmp_path / 'run', '--cfg-options', option)
    lines = scalars(tmp_path / 'run')
    assert len(lines) == 6 and all(line['kl'] > 0 for line in lines)
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert f"checkpoint='{tmp_path / 'run' / 'iter_6.pth'}', prefix='backbone.'" in log
    assert 'cached and live probabilities of the teacher differ by at most' in log
    assert '--student-alone: pre-training has no labels' in error(
        'train', tmp_path / 'pretraining.py', '--student-alone'
    )
    assert 'the doctor looks' in error('doctor', tmp_path / 'pretraining.py')
