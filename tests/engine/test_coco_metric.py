"""COCO's scores of a detector that finds nothing, through every way in which a detector of ours is scored."""

import json
import math

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import DefaultScope

from kd_dense.analysis.record import RunRecord
from kd_dense.data.scene_drawing import CLASSES
from kd_dense.engine.run import evaluate, train
from kd_dense.engine.score import use_complete_metrics
from tests.helpers import tiny

NAMES = ('car', 'cat', 'cup')


def metric(folder, kind='kd_dense.CocoMetric', **options):
    """Two images: on the first a large cat (class 1) and a cup (class 2); no car anywhere."""
    square = [[0, 0, 100, 0, 100, 100, 0, 100]]
    truth = dict(
        images=[dict(id=7, width=120, height=110, file_name='a'), dict(id=9, width=120, height=110, file_name='b')],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(NAMES)],
        annotations=[
            dict(id=1, image_id=7, category_id=2, bbox=[0, 0, 100, 100], area=1e4, iscrowd=0, segmentation=square),
            dict(id=2, image_id=7, category_id=3, bbox=[5, 5, 100, 100], area=1e4, iscrowd=0, segmentation=square),
        ],
    )
    (folder / 'truth.json').write_text(json.dumps(truth))
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = MMENGINE_METRICS.build(dict(type=kind, ann_file=str(folder / 'truth.json'), **options))
    built.dataset_meta = dict(classes=NAMES)
    return built


def scores(built, boxes=(), masks=False):
    """Of predictions ``(image, x1, y1, x2, y2, score, class)``."""
    for image in (7, 9):
        own = torch.tensor([b[1:] for b in boxes if b[0] == image]).view(-1, 6)
        prediction = dict(bboxes=own[:, :4], scores=own[:, 4], labels=own[:, 5].long())
        if masks:
            prediction['masks'] = torch.zeros(len(own), 110, 120, dtype=torch.bool)
        built.process({}, [dict(pred_instances=prediction, img_id=image, ori_shape=(110, 120))])
    return built.evaluate(2)


@pytest.mark.parametrize('kinds', [['bbox'], ['bbox', 'segm'], ['proposal']])
def test_nothing_is_0(kinds, tmp_path):
    masks = 'segm' in kinds
    assert scores(metric(tmp_path, 'mmdet.CocoMetric', metric=kinds), masks=masks) == {}  # what is mended
    found = scores(metric(tmp_path, metric=kinds), masks=masks)
    elsewhere = [(9, 30.0, 30.0, 60.0, 60.0, 0.5, 0.0)]  # of a class that is on no image
    missed = scores(metric(tmp_path, 'mmdet.CocoMetric', metric=kinds), elsewhere, masks)
    assert found == missed and len(found) >= 6
    names = {'bbox': 'coco/bbox_mAP', 'segm': 'coco/segm_mAP', 'proposal': 'coco/AR@100'}
    assert [found[names[kind]] for kind in kinds] == [0.0] * len(kinds)
    if 'bbox' in kinds:
        assert (found['coco/bbox_mAP_l'], found['coco/bbox_mAP_s']) == (0, -1)  # there are no small objects


def test_classes_without_objects_have_no_score(tmp_path):
    found = scores(metric(tmp_path, classwise=True))
    assert math.isnan(found['coco/car_precision']) and found['coco/cat_precision'] == found['coco/cup_precision'] == 0


def test_predictions_are_scored_as_by_mmdetection(tmp_path):
    boxes = [(7, 0.0, 0.0, 100.0, 100.0, 0.9, 1.0), (9, 0.0, 0.0, 10.0, 10.0, 0.8, 2.0)]
    found = scores(metric(tmp_path), boxes)
    assert found == scores(metric(tmp_path, 'mmdet.CocoMetric'), boxes) and found['coco/bbox_mAP'] == 0.5


def test_files_of_predictions_stay_empty(tmp_path):
    """The box that makes the scores is in no file that was asked for."""
    for options in (dict(format_only=True), {}):
        built = metric(tmp_path, outfile_prefix=str(tmp_path / 'found'), **options)
        assert bool(scores(built)) != bool(options) and built.outfile_prefix == str(tmp_path / 'found')
        assert json.loads((tmp_path / 'found.bbox.json').read_text()) == []


def test_only_metrics_of_mmdetection_are_replaced():
    evaluators = [dict(type='mmdet.CocoMetric', metric='bbox'), dict(type='DumpResults'), dict(type='LVISMetric')]
    cfg = Config(dict(val_evaluator=dict(type='CocoMetric', metric='segm'), test_evaluator=evaluators))
    use_complete_metrics(cfg)
    assert cfg.val_evaluator == dict(type='kd_dense.CocoMetric', metric='segm')
    assert [e.type for e in cfg.test_evaluator] == ['kd_dense.CocoMetric', 'DumpResults', 'LVISMetric']
    assert cfg.test_evaluator[0].metric == 'bbox'
    use_complete_metrics(Config(dict(val_evaluator=None)))


def blind(width=4):
    """A detector that is sure of nothing."""
    model = tiny.detector('GFL', width)
    model['test_cfg'].update(score_thr=1.0)
    return model


def test_student_and_teacher_that_find_nothing(tmp_path):
    """Through a whole run: the student's curve and record, the teacher's score, and the test of a checkpoint."""
    data = tiny.scenes(tmp_path / 'scenes')
    teacher = dict(config=blind(8), checkpoint=tiny.saved(blind(8), tmp_path / 'teacher.pth', CLASSES[1:]))
    distillers = dict(cwd=dict(type='CWD', taps='neck:0'))
    model = dict(type='kd_dense.Distillation', student=blind(), teacher=teacher, distillers=distillers)
    cfg = tiny.detection_run(model, data, epochs=1)
    record = train(cfg, str(tmp_path / 'run'), seed=0)
    assert (record.metric, record.value, record.curve) == ('bbox_mAP', 0.0, [(4, 0.0)])
    assert RunRecord.load(tmp_path / 'run') == record
    score = json.loads((tmp_path / 'run' / 'teacher_score.json').read_text())['score']
    assert score['coco/bbox_mAP'] == 0
    found = evaluate(cfg, str(tmp_path / 'run' / 'epoch_1.pth'), str(tmp_path / 'test'))
    assert found['coco/bbox_mAP'] == 0 and np.isfinite(list(found.values())).all()
