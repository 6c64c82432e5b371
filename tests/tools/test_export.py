"""tools/export.py: what it prints and writes, and what it refuses."""

import onnx
import pytest
import torch

from kd_dense.data.scene_drawing import CLASSES
from kd_dense.engine.run import load_config, student_alone
from kd_dense.export import formats
from tests.helpers import tiny


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return tiny.saved(tiny.segmentor(4), tmp_path_factory.mktemp('export') / 'iter_4.pth', CLASSES)


def test_command__writes_the_file_and_prints_the_comparison(config, checkpoint, call, capsys, tmp_path):
    out = tmp_path / 'new' / 'student.onnx'
    call('export', config, checkpoint, '--format', 'onnx', '--out', out, '--images', 2, '--size', 32, 64, '--opset', 16)
    printed = capsys.readouterr().out
    assert 'logits' in printed and 'verdict' in printed and '2 of 4 validation images' in printed
    assert printed.splitlines()[-1] == f'written: {out}'
    model = onnx.load(out)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 64]
    assert model.opset_import[0].version == 16


def test_stock_config_and_options__reach_the_export(config, checkpoint, call, tmp_path):
    stock = tmp_path / 'stock.py'
    student_alone(load_config(str(config))).dump(str(stock))
    out = tmp_path / 'student.pth'
    call('export', stock, checkpoint, '--format', 'pth', '--out', out, '--images', 1)
    assert torch.load(out, weights_only=True)['meta']['dataset_meta']['classes'] == tuple(CLASSES)


def test_error__outputs_that_differ(config, checkpoint, error, tmp_path, monkeypatch):
    original = formats.load
    monkeypatch.setattr(formats, 'load', lambda *a: lambda batch: [value * 1.01 for value in original(*a)(batch)])
    out = tmp_path / 'student.torchscript'
    said = error('export', config, checkpoint, '--format', 'torchscript', '--out', out)
    assert 'marked DIFFERENT' in said and f'{out} was not written' in said
    assert list(tmp_path.iterdir()) == []


def test_error__checkpoint_of_another_model_missing_or_something_else(config, teacher, error, tmp_path):
    other = tmp_path / 'notes.pth'
    other.write_text('no weights')
    for path, text in (
        (teacher['checkpoint'], 'is not a checkpoint of the student'),
        (other, 'notes.pth could not be loaded'),
        (tmp_path / 'nowhere.pth', 'There is no checkpoint file'),
    ):
        said = error('export', config, path, '--format', 'onnx', '--out', tmp_path / 'a.onnx')
        assert said.startswith('error: CHECKPOINT: ') and text in said
    assert not (tmp_path / 'a.onnx').exists()


def test_error__config_or_data_missing(config, checkpoint, error, tmp_path):
    said = error('export', tmp_path / 'nowhere.py', checkpoint, '--format', 'onnx')
    assert said.startswith('error: CONFIG: there is no config file ')
    option = 'val_dataloader.dataset.data_root=nowhere'
    said = error('export', config, checkpoint, '--format', 'onnx', '--cfg-options', option)
    assert 'there is no folder nowhere' in said and '--images FOLDER' in said
