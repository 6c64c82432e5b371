import json
import math

import pytest

from kd_dense.analysis.record import RunRecord
from kd_dense.errors import ConfigError


def test_a_saved_record_loads_as_it_was(record, tmp_path):
    saved = record('distilled', 3, 62.5, extra_parameters=7, checkpoint='a/last.pth', config='configs/a.py')
    file = saved.save(tmp_path / 'run')
    assert file == tmp_path / 'run' / 'record.json'
    assert RunRecord.load(tmp_path / 'run') == saved == RunRecord.load(file)
    assert [f.name for f in file.parent.iterdir()] == ['record.json']  # no temporary file is left


def test_a_class_without_a_value_is_null_in_the_file(record, tmp_path):
    file = record(per_class={'road': 50.0, 'train': math.nan}).save(tmp_path)
    assert json.loads(file.read_text())['per_class'] == {'road': 50.0, 'train': None}
    loaded = RunRecord.load(file).per_class
    assert loaded['road'] == 50.0
    assert math.isnan(loaded['train'])


def test_a_write_that_fails_leaves_the_old_record(record, tmp_path, monkeypatch):
    file = record(value=60.0).save(tmp_path)

    def no_space(*_, **__):
        raise OSError('no space left')

    monkeypatch.setattr('kd_dense.analysis.record.json.dump', no_space)
    with pytest.raises(OSError, match='no space'):
        record(value=70.0).save(tmp_path)
    assert RunRecord.load(file).value == 60.0
    assert [f.name for f in tmp_path.iterdir()] == ['record.json']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"name": "student", ', 'can not be read as a record'),
        ('[1, 2]', 'is not a record'),
        ('{"name": "student", "seed": 0}', 'lacks toolbox, metric, value'),
    ],
)
def test_a_broken_file_is_an_error_with_its_name(tmp_path, text, message):
    (tmp_path / 'record.json').write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        RunRecord.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_fields_are_checked(record, tmp_path):
    file = record().save(tmp_path)
    content = json.loads(file.read_text())
    for change, message in (
        ({'secnds': 1}, "unknown field 'secnds', did you mean 'seconds'"),
        ({'toolbox': 'mmsegg'}, "toolbox='mmsegg' is not known, did you mean 'mmseg'"),
        ({'value': 'high'}, 'a field does not have the type'),
        ({'curve': [1, 2]}, 'a field does not have the type'),
    ):
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(ConfigError, match=message):
            RunRecord.load(file)
    with pytest.raises(ConfigError, match='mIoU=nan is not a number'):
        record(value=math.nan)


def test_a_missing_file_says_that_the_run_has_not_finished(tmp_path):
    with pytest.raises(ConfigError, match='does not exist: the run has not finished'):
        RunRecord.load(tmp_path)
