"""Exported YOLO students: plain files, the same numbers, and nothing when the numbers differ."""

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import load_checkpoint, torch_safe_load

from kd_dense.errors import ConfigError
from kd_dense.export import ExportOptions
from kd_dense.yolo import export as module
from kd_dense.yolo.export import export
from tests.yolo.helpers import build, save_model
from tests.yolo.test_checkpoints import run


def trained(family, path, task=''):
    """A model that answers to its image, as after training: statistics of real activations, scores spread out."""
    model = build(family, task=task).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(4, 3, 64, 64))
        for name, parameter in model.model[-1].named_parameters():
            if 'cv3' in name and name.endswith('.2.weight'):
                torch.nn.init.normal_(parameter, std=0.5)
            elif 'cv3' in name and name.endswith('.2.bias'):
                parameter.fill_(-2.0)
    for norm in norms:
        norm.momentum = 0.03
    return save_model(model.eval(), path)


def canvas(data, size=64):
    """The first validation image, read and scaled here: ``[1, 3, 64, 64]``, RGB, 0..1."""
    image = cv2.imread(str(data.parent / 'images' / 'val' / 'val0.png'))
    assert image.shape == (size, size, 3)
    return torch.from_numpy(image[..., ::-1].transpose(2, 0, 1).copy()).float()[None] / 255


def one_to_many(checkpoint):
    model = load_checkpoint(checkpoint)[0].float().eval()
    if hasattr(model, 'end2end'):
        model.end2end = False
    return model


@pytest.mark.parametrize(
    'family, task',
    [('yolo11', ''), ('yolo11', '-seg'), ('yolo26', ''), pytest.param('yolov8', '', marks=pytest.mark.slow)],
)
def test_onnx(family, task, write_config, student_yaml, data, mask_data, tmp_path):
    data = mask_data if task else data
    checkpoint = trained(family, tmp_path / 'best.pt', task)
    config = write_config(student=student_yaml(family, task), data=str(data))
    report = export(config, checkpoint, ExportOptions('onnx', dynamic='all', images='2'))
    assert report.equal, str(report)
    assert report.path == str(tmp_path / 'best.onnx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['best.onnx', 'best.pt', 'config.py']
    session = onnxruntime.InferenceSession(report.path, providers=['CPUExecutionProvider'])
    assert [o.name for o in session.get_outputs()] == (['output0', 'output1'] if task else ['output0'])
    image = canvas(data)
    with torch.no_grad():
        wanted = one_to_many(checkpoint)(image)[0]
    wanted = wanted if task else (wanted,)
    for a, b in zip(wanted, session.run(None, {'images': image.numpy()}), strict=True):
        np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-4)
    assert wanted[0][:, 4:6].std() > 1e-3  # the scores say something
    assert {row.input for row in report.rows} == {'1x3x64x64', '2x3x64x64', '2x3x64x96', 'images'}
    assert next(int(r.shape.split()[0]) for r in report.rows if r.output == 'detections') > 0


def test_torchscript(write_config, student_yaml, data, tmp_path):
    checkpoint = trained('yolo11', tmp_path / 'best.pt')
    report = export(write_config(), checkpoint, ExportOptions('torchscript', images='1'))
    assert report.equal, str(report)
    image = canvas(data)
    with torch.no_grad():
        wanted, found = one_to_many(checkpoint)(image)[0], torch.jit.load(report.path)(image)
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


def test_pth__of_an_interrupted_run_is_stripped_but_not_rounded(write_config, student_yaml, data, tmp_path):
    config = write_config()
    last = run(config, tmp_path / 'run', student_yaml(), data, stop_before=1, epochs=2).last
    before = torch_safe_load(str(last), safe_only=True)[0]
    assert before['optimizer'] is not None and before['kd_dense'] and before['ema'] is not None
    content = last.read_bytes()
    report = export(config, last, ExportOptions('pth'))
    assert report.equal, str(report)
    assert last.read_bytes() == content  # the run can still be resumed
    assert report.path == str(last.with_name('last_student.pt'))
    after = torch_safe_load(report.path, safe_only=True)[0]
    for key in ('ema', 'optimizer', 'scaler', 'kd_dense', 'updates'):
        assert after[key] is None, key
    for name, value in before['ema'].state_dict().items():
        assert torch.equal(after['model'].state_dict()[name], value), name
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    boxes = [
        YOLO(str(p)).predict(image, imgsz=64, conf=0.0, max_det=20, verbose=False, device='cpu')[0].boxes.data
        for p in (last, report.path)
    ]
    assert len(boxes[0]) and torch.equal(*boxes)
    # the other formats of the same file
    script = export(config, last, ExportOptions('torchscript', out=str(tmp_path / 'new' / 'a.torchscript'), images='1'))
    assert script.equal and (tmp_path / 'new' / 'a.torchscript').is_file()


@pytest.mark.parametrize('format', ['pth', 'torchscript'])
def test_what_differs_is_not_left_behind(format, write_config, data, tmp_path, monkeypatch):
    checkpoint = trained('yolo11', tmp_path / 'best.pt')
    config = write_config()
    original = module._write_plain

    def corrupted(checkpoint, path):
        original(checkpoint, path)
        content = torch.load(path, weights_only=False)
        next(content['model'].parameters()).mul_(1.01)
        torch.save(content, path)

    monkeypatch.setattr(module, '_write_plain', corrupted)
    report = export(config, checkpoint, ExportOptions(format, images='1'))
    assert not report.equal and 'DIFFERENT' in str(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['best.pt', 'config.py']


def test_images_of_a_folder_and_noise(write_config, data, tmp_path):
    checkpoint = trained('yolo11', tmp_path / 'best.pt')
    config = write_config(data=str(tmp_path / 'nowhere.yaml'))
    with pytest.raises(ConfigError, match='nowhere.*--images FOLDER'):
        export(config, checkpoint, ExportOptions('pth'))
    report = export(config, checkpoint, ExportOptions('pth', images=str(data.parent / 'images' / 'val')))
    assert report.equal and report.source.startswith('4 images of')
    assert export(config, checkpoint, ExportOptions('pth', images='noise')).source == '2 images of noise'


def test_errors(write_config, student_yaml, teacher_file, data, tmp_path):
    config = write_config()
    with pytest.raises(ConfigError, match=r'teachers.*yolo11\.pt is not a checkpoint of the student .*yolo11n\.yaml'):
        export(config, teacher_file(), ExportOptions('onnx'))
    with pytest.raises(ConfigError, match='CHECKPOINT: there is no file'):
        export(config, tmp_path / 'none.pt', ExportOptions('onnx'))
    (tmp_path / 'text.pt').write_text('no weights')
    with pytest.raises(ConfigError, match=r'CHECKPOINT: .*text\.pt can not be loaded'):
        export(config, tmp_path / 'text.pt', ExportOptions('onnx'))
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'mm.pt')
    with pytest.raises(ConfigError, match=r'mm\.pt holds no YOLO detection or segmentation model'):
        export(config, tmp_path / 'mm.pt', ExportOptions('onnx'))
    checkpoint = trained('yolo11', tmp_path / 'best.pt')
    with pytest.raises(ConfigError, match='--size: height and width must be multiples of 32, not 64 x 70'):
        export(config, checkpoint, ExportOptions('onnx', size=(64, 70)))
    with pytest.raises(ConfigError, match=r"--out: .*'\.onnx'"):
        export(config, checkpoint, ExportOptions('onnx', out=str(tmp_path / 'a.bin')))
    with pytest.raises(ConfigError, match='Ultralytics could not export this student'):
        export(config, checkpoint, ExportOptions('onnx', opset=1, images='1'))
    assert not list(tmp_path.glob('.*')) and not list(tmp_path.glob('*.onnx'))
