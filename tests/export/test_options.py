"""Options that can not be, and writing in one piece."""

import pytest

from kd_dense.errors import ConfigError
from kd_dense.export.options import ExportOptions, publish, staged


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(format='onx'), "--format: there is no format 'onx'; did you mean 'onnx'"),
        (dict(format='onnx', tolerance=-1), '--tolerance'),
        (dict(format='onnx', tolerance=float('nan')), '--tolerance'),
        (dict(format='onnx', size=(0, 64)), '--size'),
        (dict(format='onnx', images='0'), '--images: at least one'),
        (dict(format='onnx', images='nowhere'), '--images: nowhere is neither'),
        (dict(format='pth', dynamic='all'), '--dynamic, --opset'),
        (dict(format='torchscript', opset=17), '--opset'),
    ],
)
def test_errors(options, said):
    with pytest.raises(ConfigError, match=said):
        ExportOptions(**options)


def test_target(tmp_path):
    checkpoint = tmp_path / 'iter_4.pth'
    assert ExportOptions('onnx').target(checkpoint).name == 'iter_4.onnx'
    assert ExportOptions('pth').target(checkpoint).name == 'iter_4_student.pth'
    assert ExportOptions('pth').target(tmp_path / 'best.pt', yolo=True).name == 'best_student.pt'
    with pytest.raises(ConfigError, match='is the checkpoint itself'):
        ExportOptions('pth', out=str(checkpoint)).target(checkpoint)
    with pytest.raises(ConfigError, match='is a folder'):
        ExportOptions('pth', out=str(tmp_path)).target(checkpoint)


def test_staged__replaces_only_what_is_published(tmp_path):
    target = tmp_path / 'new' / 'a.onnx'
    with staged(target) as path:
        path.write_text('one')
        assert not target.exists()
        publish(path, target)
    with pytest.raises(RuntimeError), staged(target) as path:
        path.write_text('two')
        raise RuntimeError
    with staged(target) as path:
        path.write_text('three')
    assert target.read_text() == 'one'
    assert [p.name for p in target.parent.iterdir()] == ['a.onnx']
