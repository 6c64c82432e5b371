"""What a head gives, decoded by kd_dense and by the head's own code."""

import re

import pytest
import torch

from kd_dense.description import Boxes
from kd_dense.geometry.dense_boxes import anchors_of, corners, expected, grid_anchors
from kd_dense.models.boxes import describe_boxes
from kd_dense.models.build import build_model
from tests.generality import shrink
from tests.helpers import tiny

SIZE = (5, 7)
CONFIGS = {
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'DyHead': 'dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py',  # anchors at the centres of the cells
    'SSD': 'ssd/ssd300_coco.py',  # 4 or 6 anchors
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'RTMDet': 'rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco.py',
    'YOLOX': 'yolox/yolox_s_8xb8-300e_coco.py',
    'TOOD': 'tood/tood_r50_fpn_1x_coco.py',
    'FSAF': 'fsaf/fsaf_r50_fpn_1x_coco.py',
    'YOLOF': 'yolof/yolof_r50-c5_8xb8-1x_coco.py',
}


def decoded(boxes, level, values):
    """Corners on the canvas in pixels, ``[B, h*w*A, 4]`` as MMDetection orders them, of what the head gives."""
    stride, anchors = boxes.strides[level], anchors_of(boxes, level, 1.0).double()
    numbers = 4 * boxes.bins if boxes.kind == 'distribution' else 4
    x = values.flatten(2).unflatten(1, (len(anchors), numbers))
    if boxes.kind == 'distribution':
        x = x.unflatten(2, (4, boxes.bins))
    seen = corners(x, boxes, level, anchors, SIZE)  # [B, A, 4, P] from the cells
    origin = grid_anchors(torch.zeros(1, 4, dtype=torch.float64), stride, SIZE)[:, 0]
    return (seen.permute(0, 3, 1, 2) * stride + origin[None, :, None]).flatten(1, 2)


def stock(kind, factor=8):
    """The stock config of a detector at a fraction of its width."""
    return shrink.narrow(shrink.read('mmdet', CONFIGS[kind]), factor)


def values(channels):
    return torch.randn(2, channels, *SIZE, dtype=torch.float64)


@pytest.mark.parametrize('kind', ['RetinaNet', 'ATSS', 'DyHead', 'SSD', 'FCOS', 'RTMDet', 'GFL'])
@pytest.mark.parametrize('level', [0, 2])
def test_boxes_are_those_of_the_heads_coder(kind, level):
    model = build_model(stock(kind), 'model').eval()
    head = model.bbox_head
    boxes, aliases, absent = describe_boxes(model, training=False)
    assert aliases == {'boxes': ['bbox_head:1']} and absent == {}
    priors = head.prior_generator.single_level_grid_priors(SIZE, level, dtype=torch.float64, device='cpu')
    x = values(4 * boxes.bins * (len(boxes.anchors[level]) if boxes.anchors else 1))
    predictions = x.permute(0, 2, 3, 1).reshape(-1, 4 * boxes.bins)
    if kind == 'GFL':  # the integral, in strides from the centre of the anchor
        predictions = head.integral(predictions) * boxes.strides[level]
        priors = head.anchor_center(priors)
    theirs = head.bbox_coder.decode(priors.repeat(2, 1), predictions).unflatten(0, (2, -1))
    torch.testing.assert_close(decoded(boxes, level, x), theirs, rtol=1e-5, atol=1e-5)


def test_boxes_are_those_of_yolox():
    model = build_model(stock('YOLOX'), 'model')
    boxes, _, _ = describe_boxes(model, training=False)
    x = values(4)
    priors = model.bbox_head.prior_generator.grid_priors(
        [SIZE] * 3, dtype=torch.float64, device='cpu', with_stride=True
    )[1]
    theirs = model.bbox_head._bbox_decode(priors, x.permute(0, 2, 3, 1).flatten(1, 2))
    torch.testing.assert_close(decoded(boxes, 1, x), theirs)


def test_boxes_are_those_of_tood():
    model = build_model(stock('TOOD'), 'model')
    boxes, _, _ = describe_boxes(model, training=False)
    x = values(4)
    torch.testing.assert_close(decoded(boxes, 1, x), x.permute(0, 2, 3, 1).flatten(1, 2) * boxes.strides[1])


@pytest.mark.parametrize('normalised', [False, True])
def test_fcos_changes_its_unit_between_training_and_evaluation(normalised):
    config = stock('FCOS')
    config['bbox_head']['norm_on_bbox'] = normalised
    model = build_model(config, 'model')
    features = [torch.randn(1, 32, 4, 4) for _ in range(5)]  # 256 / 8 channels
    found = []
    for training in (True, False):
        model.train(training)
        for module in model.modules():  # norms that do not depend on the batch, so that both passes agree
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        boxes, _, _ = describe_boxes(model, training)
        with torch.no_grad():
            output = model.bbox_head(features)[1][2]
        anchors = anchors_of(boxes, 2, 1.0)
        found.append(corners(output.flatten(2)[:, None], boxes, 2, anchors, (4, 4)))
        assert boxes.unit == ('stride' if training and normalised else 'pixel')
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    'boxes', [Boxes('distance', (8.0,)), Boxes('delta', (8.0,)), Boxes('delta', (8.0,), anchors=(((-9, -9, 9, 9),),))]
)
def test_what_an_untrained_head_may_give_stays_finite(boxes):
    values = torch.full((1, 1, 4, 1), 5000.0, dtype=torch.float32).requires_grad_()
    found = corners(values, boxes, 0, anchors_of(boxes, 0, 1.0), (1, 1))
    found.sum().backward()
    assert found.isfinite().all() and values.grad.isfinite().all()
    if boxes.kind == 'distance':
        found = corners(values.detach() * float('inf'), boxes, 0, anchors_of(boxes, 0, 1.0), (1, 1))
        assert found.flatten().tolist() == [-1e5, -1e5, 1e5, 1e5]


def test_expected_distance_is_the_mean_bin():
    logits = torch.full((1, 4, 9, 2), -50.0, dtype=torch.float64)
    logits[:, :, 3], logits[:, :, 4] = 0.0, 0.0
    torch.testing.assert_close(expected(logits), torch.full((1, 4, 2), 3.5, dtype=torch.float64))


def test_anchors_of_heads_without_are_squares_around_the_point():
    boxes = Boxes('distance', (8.0, 16.0), offset=0.5)
    assert anchors_of(boxes, 1, 8.0).tolist() == [[-3.5, -3.5, 4.5, 4.5]]
    anchors = grid_anchors(anchors_of(boxes, 1, 2.0), 16.0, (2, 3))
    assert anchors.shape == (6, 1, 4)
    assert anchors[5, 0].tolist() == [24.0, 8.0, 56.0, 40.0]  # row 1, column 2: centre (40, 24), 32 wide


REFUSED = {
    'segmentor': (lambda: tiny.segmentor(), 'a segmentor predicts no boxes'),
    'FasterRCNN': (lambda: tiny.detector('FasterRCNN'), 'belong to its proposals.*RoIKD'),
    'DETR': (lambda: tiny.deformable_detr(), 'belong to its queries.*QueryKD'),
    'FSAF': (lambda: stock('FSAF'), r'FSAFHead are encoded .*TBLRBBoxCoder'),
    'YOLOF': (lambda: stock('YOLOF'), r'YOLOFHead are encoded'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_models_without_boxes_of_cells_say_so(kind):
    config, sentence = REFUSED[kind]
    found, aliases, absent = describe_boxes(build_model(config(), 'model'), training=False)
    assert isinstance(found, str) and aliases == {} and absent == {'boxes': found}
    assert re.search(sentence, found)
