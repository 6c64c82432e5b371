"""Exported students of MMSegmentation and MMDetection against the stock models, by numbers computed here."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from kd_dense.engine.run import train
from kd_dense.errors import ConfigError
from kd_dense.export import ExportOptions, export, formats
from kd_dense.export import run as module
from kd_dense.export.network import DeployedDetector, DeployedSegmentor
from kd_dense.models.build import build_model
from tests.export.conftest import lively
from tests.helpers import tiny


def image_of(scenes, kind='leftImg8bit/val'):
    """A validation image as a file has it: ``[1, 3, 64, 64]``, BGR, 0..255."""
    path = sorted((scenes / kind).rglob('*.png'))[0]
    return torch.from_numpy(cv2.imread(str(path)).transpose(2, 0, 1).copy()).float()[None]


@torch.no_grad()
def stock_logits(student, image):
    """``[N, C, H, W]`` by MMSegmentation's own prediction."""
    from mmseg.structures import SegDataSample

    shape = tuple(image.shape[2:])
    samples = [SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape)) for _ in image]
    predictions = student.test_step({'inputs': list(image), 'data_samples': samples})
    return torch.stack([p.seg_logits.data for p in predictions]), torch.stack(
        [p.pred_sem_seg.data for p in predictions]
    )


@torch.no_grad()
def stock_outputs(student, image):
    """What the dense head returns, flat, by MMDetection's own preprocessing and ``mode='tensor'``."""
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[2:])
    samples = [DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))) for _ in image]
    data = student.data_preprocessor({'inputs': list(image), 'data_samples': samples}, False)
    outputs = student(**data, mode='tensor')
    if isinstance(outputs[0], torch.Tensor):  # decoder layers
        return [value[-1] for value in outputs]
    return [level for levels in outputs for level in levels]


def onnx_outputs(path, image):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {'image': image.numpy()}), strict=True))


def close(found, wanted):
    scale = wanted.abs().max().item()
    assert scale > 0 and wanted.std() > 1e-3 * scale  # says something
    np.testing.assert_allclose(np.asarray(found), wanted.numpy(), rtol=0, atol=1e-5 * scale)


# -- segmentors --------------------------------------------------------------------------------------------------------


def test_segmentor_onnx(saved, scenes, tmp_path):
    cfg, checkpoint, student = saved(tiny.segmentor(4))
    report = export(cfg, checkpoint, ExportOptions('onnx', dynamic='all'))
    assert report.equal, str(report)
    assert report.path == str(tmp_path / 'iter_7.onnx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['iter_7.onnx', 'iter_7.pth']
    assert {row.input for row in report.rows} == {'1x3x64x64', '2x3x64x64', '2x3x64x96'}
    image = image_of(scenes)
    for batch in (image, torch.cat([image, image.flip(2)])[:, :, :40, :56]):
        outputs = onnx_outputs(report.path, batch)
        logits, labels = stock_logits(student, batch)
        assert list(outputs) == ['logits', 'labels']
        close(outputs['logits'], logits)
        assert np.array_equal(outputs['labels'], labels[:, 0].numpy())
    described = json.loads(next(p.value for p in onnx.load(report.path).metadata_props if p.key == 'kd_dense'))
    assert described['classes'] == ['a', 'b'] and described['model'] == 'EncoderDecoder'
    assert described['input']['mean'] == pytest.approx(tiny.MEAN) and described['input']['mean_and_std_in'] == 'RGB'
    assert described['input']['channels'] == 'BGR' and described['input']['shape'] == ['batch', 3, 'height', 'width']


def test_segmentor_torchscript(saved, scenes):
    cfg, checkpoint, student = saved(tiny.segmentor(4))
    report = export(cfg, checkpoint, ExportOptions('torchscript', images='2'))
    assert report.equal, str(report)
    image = image_of(scenes)
    extra = {'kd_dense': ''}
    network = torch.jit.load(report.path, _extra_files=extra)
    assert json.loads(extra['kd_dense'])['input']['shape'] == [1, 3, 64, 64]
    logits, labels = stock_logits(student, image)
    for batch in (image, image.byte()):
        found = network(batch)
        close(found[0], logits)
        assert torch.equal(found[1], labels[:, 0])


def test_segmentor__that_decides_by_a_threshold_and_pads_its_images(saved, scenes):
    model = tiny.segmentor(4, classes=2, out_channels=1, threshold=0.4)
    model['decode_head']['loss_decode']['use_sigmoid'] = True
    model['data_preprocessor'].update(bgr_to_rgb=False, test_cfg=dict(size_divisor=48))
    image = image_of(scenes)[..., :60]
    model['decode_head']['threshold'] = stock_logits(lively(model), image)[0].median().item()
    cfg, checkpoint, student = saved(model)
    report = export(cfg, checkpoint, ExportOptions('onnx', size=(64, 60), images='1'))
    assert report.equal, str(report)
    outputs = onnx_outputs(report.path, image)
    probability, labels = stock_logits(student, image)
    close(torch.from_numpy(outputs['logits']).sigmoid(), probability)
    assert 0.4 < labels.float().mean() < 0.6
    assert (outputs['labels'] != labels[:, 0].numpy()).sum() <= 1  # the median itself is at the threshold


def test_segmentor__that_slides_a_window(saved, scenes):
    model = dict(tiny.segmentor(4), test_cfg=dict(mode='slide', crop_size=(48, 40), stride=(32, 32)))
    cfg, checkpoint, student = saved(model)
    report = export(cfg, checkpoint, ExportOptions('onnx', images='2'))
    assert report.equal and '1x3x48x40' in str(report) and 'one window' in str(report)
    window = image_of(scenes)[:, :, 8:56, 12:52]
    close(onnx_outputs(report.path, window)['logits'], stock_logits(student, window)[0])


# -- detectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, per_level', [('RetinaNet', 2), ('FCOS', 3)])
def test_detector_onnx(kind, per_level, saved, scenes):
    cfg, checkpoint, student = saved(tiny.detector(kind))
    report = export(cfg, checkpoint, ExportOptions('onnx', dynamic='all', images='2'))
    assert report.equal, str(report)
    batch = image_of(scenes, 'images/val')
    batch = torch.cat([batch, batch.flip(3)])[:, :, :50]  # 50 rows: padded to 64 inside
    outputs = onnx_outputs(report.path, batch)
    names = ('cls_score', 'bbox_pred', 'score_factor')[:per_level]
    assert list(outputs) == [f'{name}_{level}' for name in names for level in range(5)]
    for found, wanted in zip(outputs.values(), stock_outputs(student, batch), strict=True):
        close(found, wanted)
    (row,) = (r for r in report.rows if r.output == 'detections' and r.input == '1x3x64x64')
    assert int(row.shape.split()[0]) > 10


def test_detector_torchscript(saved, scenes):
    cfg, checkpoint, student = saved(tiny.detector('GFL'))
    report = export(cfg, checkpoint, ExportOptions('torchscript', images='2'))
    assert report.equal, str(report)
    image = image_of(scenes, 'images/val')
    with torch.no_grad():
        outputs = torch.jit.load(report.path)(image)
    for found, wanted in zip(outputs, stock_outputs(student, image), strict=True):
        close(found, wanted)


def test_queries_onnx(saved, scenes):
    cfg, checkpoint, student = saved(tiny.deformable_detr())
    report = export(cfg, checkpoint, ExportOptions('onnx', images='2'))
    assert report.equal, str(report)
    image = image_of(scenes, 'images/val')
    outputs = onnx_outputs(report.path, image)
    assert {name: value.shape for name, value in outputs.items()} == {'cls_score': (1, 10, 6), 'bbox_pred': (1, 10, 4)}
    for found, wanted in zip(outputs.values(), stock_outputs(student, image), strict=True):
        close(found, wanted)


def test_decoding_of_exported_outputs_is_compared_too(saved, monkeypatch):
    cfg, checkpoint, _ = saved(tiny.detector('RetinaNet'))
    decode = DeployedDetector.decode
    monkeypatch.setattr(DeployedDetector, 'decode', lambda self, o, m: decode(self, [1.1 * value for value in o], m))
    report = export(cfg, checkpoint, ExportOptions('onnx', images='1'))
    assert [row.output for row in report.rows if not row.equal] == ['detections']


def test_two_stages__only_weights(saved, tmp_path):
    cfg, checkpoint, student = saved(tiny.detector('FasterRCNN'))
    for format in ('onnx', 'torchscript'):
        with pytest.raises(ConfigError, match='FasterRCNN has roi_head and rpn_head, .*--format pth.*MMDeploy'):
            export(cfg, checkpoint, ExportOptions(format))
    report = export(cfg, checkpoint, ExportOptions('pth', images='1'))
    assert report.equal, str(report)
    assert [row.output for row in report.rows] == ['weights', 'detections']
    again = build_model(tiny.detector('FasterRCNN'), 'again')
    again.load_state_dict(torch.load(report.path, weights_only=True)['state_dict'], strict=True)
    for name, value in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def interrupted(scenes, tmp_path_factory):
    """A distilled run with an average of the weights, and its checkpoint at half of the iterations."""
    teacher = tiny.segmentor(8)
    path = tiny.saved(teacher, tmp_path_factory.mktemp('teacher') / 'teacher.pth')
    model = dict(
        type='kd_dense.Distillation',
        student=tiny.segmentor(4),
        teacher=dict(config=teacher, checkpoint=path, classes='ignore'),
        distillers=dict(mimic=dict(type='FeatureMimic', taps='backbone:3')),
    )
    cfg = tiny.segmentation_run(model, scenes)
    cfg.custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=False), dict(type='EMAHook', momentum=0.3)]
    work_dir = tmp_path_factory.mktemp('run')
    train(cfg, str(work_dir), seed=0)
    return cfg, work_dir / 'iter_2.pth'


def test_pth__of_an_interrupted_run_is_the_plain_average(interrupted, scenes, tmp_path):
    cfg, checkpoint = interrupted
    content = torch.load(checkpoint, weights_only=False)
    assert content['optimizer'] and content['kd_dense'] and content['ema_state_dict']
    report = export(cfg, str(checkpoint), ExportOptions('pth', out=str(tmp_path / 'new' / 'student.pth')))
    assert report.equal, str(report)
    plain = torch.load(report.path, weights_only=True)  # nothing but tensors and plain containers
    assert sorted(plain) == ['meta', 'state_dict'] and list(plain['meta']) == ['dataset_meta']
    assert plain['meta']['dataset_meta']['classes'] == tuple(content['meta']['dataset_meta']['classes'])
    differs = False
    for name, value in content['state_dict'].items():  # the hook keeps the average here
        assert torch.equal(plain['state_dict'][name], value), name
        differs |= not torch.equal(value, content['ema_state_dict'][f'module.{name}'])  # and what was trained there
    assert differs
    assert Path(report.path).stat().st_size < checkpoint.stat().st_size / 2


def test_pth__gives_the_stock_toolbox_the_same_predictions(interrupted, scenes, tmp_path):
    from mmseg.apis import inference_model, init_model

    cfg, checkpoint = interrupted
    out = export(cfg, str(checkpoint), ExportOptions('pth', out=str(tmp_path / 'student.pth'), images='1')).path
    stock = tmp_path / 'stock.py'
    module.student_alone(cfg).dump(str(stock))
    models = [init_model(str(stock), str(path), device='cpu') for path in (checkpoint, out)]
    assert models[1].dataset_meta['classes'] == tuple(models[0].dataset_meta['classes'])
    path = str(sorted((scenes / 'leftImg8bit/val').rglob('*.png'))[0])
    wanted, found = (inference_model(model, path).seg_logits.data for model in models)
    assert torch.equal(wanted, found) and wanted.std() > 0


def test_what_differs_is_not_left_behind(saved, tmp_path, monkeypatch):
    cfg, checkpoint, _ = saved(tiny.segmentor(4))
    write, save = formats.write, torch.save

    def corrupted(network, *arguments):
        network = copy.deepcopy(network)
        next(network.student.parameters()).mul_(1.01)
        write(network, *arguments)

    monkeypatch.setattr(formats, 'write', corrupted)
    for format in ('onnx', 'torchscript'):
        report = export(cfg, checkpoint, ExportOptions(format, images='1'))
        assert not report.equal and report.rows[0].output == 'logits' and not report.rows[0].equal

    def rounded(content, path):
        save({**content, 'state_dict': {k: v.bfloat16().to(v.dtype) for k, v in content['state_dict'].items()}}, path)

    monkeypatch.setattr(torch, 'save', rounded)
    report = export(cfg, checkpoint, ExportOptions('pth', images='1'))
    assert not report.equal and 'DIFFERENT' in str(report)
    assert [p.name for p in tmp_path.iterdir()] == ['iter_7.pth']


def test_dynamic__that_only_holds_for_one_size_is_found(saved, tmp_path, monkeypatch):
    cfg, checkpoint, _ = saved(tiny.segmentor(4))
    write = formats.write

    def fixed(network, example, names, path, format, metadata, dynamic, opset):
        write(network, example, names, path, format, metadata, None, opset)

    monkeypatch.setattr(formats, 'write', fixed)
    report = export(cfg, checkpoint, ExportOptions('onnx', images='1', dynamic='all'))
    assert [row.input for row in report.rows if row.output == 'does not run'] == ['2x3x64x64', '2x3x64x96']
    assert not list(tmp_path.glob('*.onnx'))


def test_dynamic_batch__keeps_the_size(saved):
    cfg, checkpoint, _ = saved(tiny.segmentor(4))
    report = export(cfg, checkpoint, ExportOptions('onnx', images='1', dynamic='batch'))
    assert report.equal and [row.input for row in report.rows if row.output == 'logits'] == ['1x3x64x64', '2x3x64x64']
    assert onnxruntime.InferenceSession(report.path).get_inputs()[0].shape == ['batch', 3, 64, 64]


def test_a_student_that_draws_random_numbers_is_refused(saved, monkeypatch):
    cfg, checkpoint, _ = saved(tiny.segmentor(4))
    monkeypatch.setattr(DeployedSegmentor, 'labels', lambda self, logits: torch.rand(logits.shape))
    with pytest.raises(ConfigError, match='gives other outputs for the same image each time'):
        export(cfg, checkpoint, ExportOptions('onnx', images='1'))


def test_what_the_format_can_not_hold_is_a_sentence(saved, capfd):
    cfg, checkpoint, _ = saved(tiny.segmentor(4, type='PSPHead', in_channels=32, in_index=3, pool_scales=(1, 6)))
    with pytest.raises(ConfigError, match=r'--format onnx: .*adaptive_avg_pool2d.*--format torchscript'):
        export(cfg, checkpoint, ExportOptions('onnx', images='1'))
    assert 'graph' not in capfd.readouterr().out
    assert export(cfg, checkpoint, ExportOptions('torchscript', images='1')).equal


def test_an_operator_set_that_lacks_something_is_a_sentence(saved):
    cfg, checkpoint, _ = saved(tiny.segmentor(4))
    with pytest.raises(ConfigError, match=r'--format onnx: this student can not be exported .*--format pth'):
        export(cfg, checkpoint, ExportOptions('onnx', images='1', opset=5))


# -- images ------------------------------------------------------------------------------------------------------------


def test_images__of_a_folder_or_noise_where_there_is_no_data(saved, scenes):
    cfg, checkpoint, _ = saved(tiny.segmentor(4))
    cfg.val_dataloader.dataset.data_root = 'nowhere'
    with pytest.raises(ConfigError, match='data_root: there is no folder nowhere.*--images FOLDER'):
        export(cfg, checkpoint, ExportOptions('pth'))
    folder = sorted((scenes / 'leftImg8bit/val').rglob('*.png'))[0].parent
    report = export(cfg, checkpoint, ExportOptions('pth', images=str(folder)))
    assert report.equal and report.source == f'{len(list(folder.iterdir()))} images of {folder}'
    assert export(cfg, checkpoint, ExportOptions('pth', images='noise')).source == '2 images of noise'


def test_images__of_a_folder_for_a_detector(saved, scenes, tmp_path):
    cfg, checkpoint, _ = saved(tiny.detector('GFL'))
    assert export(cfg, checkpoint, ExportOptions('pth', images=str(scenes / 'images/val'))).equal
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.jpg').write_bytes(b'no image')
    with pytest.raises(ConfigError, match=r'--images: .*a\.jpg can not be read as an image'):
        export(cfg, checkpoint, ExportOptions('pth', images=str(tmp_path / 'broken')))
