"""Scores of a plain checkpoint against worked numbers."""

import json

import cv2
import numpy as np
import pytest
import torch

import kd_dense.yolo
from kd_dense.errors import ConfigError
from kd_dense.yolo.evaluate import COLLECTORS, coco_scores
from tests.yolo.helpers import build, save_model


def write_coco(path, boxes, categories):
    """``boxes``: file name -> list of (class name, x, y, w, h). Ids start at 100, category ids are as given."""
    images, annotations = [], []
    for file, objects in boxes.items():
        images.append({'id': 100 + len(images), 'file_name': file, 'width': 96, 'height': 48})
        for name, *box in objects:
            annotations.append(
                {
                    'id': len(annotations) + 1, 'image_id': images[-1]['id'], 'category_id': categories[name],
                    'bbox': box, 'area': box[2] * box[3], 'iscrowd': 0,
                }
            )  # fmt: skip
    content = {
        'images': images,
        'annotations': annotations,
        'categories': [{'id': i, 'name': n} for n, i in categories.items()],
    }
    path.write_text(json.dumps(content))
    return path


CATEGORIES = {'square': 3, 'disc': 7}
NAMES = {0: 'disc', 1: 'square'}
BOXES = {'a.png': [('disc', 10, 10, 20, 20)], 'b.png': [('disc', 30, 5, 25, 30), ('square', 60, 10, 20, 20)]}


def prediction(file, label, box, score=0.9):
    return {'file_name': file, 'category_id': label, 'bbox': list(box), 'score': score}


def test_coco_scores_of_known_predictions(tmp_path):
    truth = write_coco(tmp_path / 'truth.json', BOXES, CATEGORIES)
    perfect = [prediction(f, list(NAMES.values()).index(n), box) for f, boxes in BOXES.items() for n, *box in boxes]
    assert coco_scores(truth, perfect, list(BOXES), NAMES, ['bbox'])['coco/bbox_mAP'] == pytest.approx(1)
    # One of two discs found: precision 1 up to recall 0.5, so 51 of the 101 recall points; the square is found.
    half = coco_scores(truth, perfect[1:], list(BOXES), NAMES, ['bbox'])
    assert half['coco/bbox_mAP'] == pytest.approx((51 / 101 + 1) / 2)
    # A box shifted by a quarter of its width has IoU 0.6: right at thresholds up to 0.6, wrong at the others.
    shifted = [prediction('a.png', 0, (15, 10, 20, 20)), *perfect[1:]]
    scores = coco_scores(truth, shifted, list(BOXES), NAMES, ['bbox'])
    assert scores['coco/bbox_mAP_50'] == pytest.approx(1)
    assert scores['coco/bbox_mAP'] < 1
    assert set(coco_scores(truth, [], list(BOXES), NAMES, ['bbox']).values()) == {0.0}


def test_annotations_must_fit(tmp_path):
    truth = write_coco(tmp_path / 'truth.json', BOXES, CATEGORIES)
    with pytest.raises(ConfigError, match=r"truth\.json has no image 'c\.png' \(1 of 1"):
        coco_scores(truth, [], ['c.png'], NAMES, ['bbox'])
    with pytest.raises(ConfigError, match=r"has no class 'dog'"):
        coco_scores(truth, [], list(BOXES), {0: 'dog'}, ['bbox'])
    with pytest.raises(ConfigError, match='there is no file'):
        coco_scores(tmp_path / 'none.json', [], list(BOXES), NAMES, ['bbox'])


@pytest.fixture
def wide_data(tmp_path):
    """Images of 96x48, so that boxes are scaled and shifted on the square canvas and must be taken back."""
    folder = tmp_path / 'wide'
    for split in ('train', 'val'):
        (folder / 'images' / split).mkdir(parents=True)
        (folder / 'labels' / split).mkdir(parents=True)
        for file, objects in BOXES.items():
            cv2.imwrite(str(folder / 'images' / split / file), np.full((48, 96, 3), 100, np.uint8))
            rows = [
                f'{list(NAMES.values()).index(n)} '
                f'{(x + w / 2) / 96:.6f} {(y + h / 2) / 48:.6f} {w / 96:.6f} {h / 48:.6f}'
                for n, x, y, w, h in objects
            ]
            (folder / 'labels' / split / file).with_suffix('.txt').write_text('\n'.join(rows))
    (folder / 'data.yaml').write_text(
        f'path: {folder}\ntrain: images/train\nval: images/val\nnames:\n  0: disc\n  1: square\n'
    )
    return folder / 'data.yaml'


class _Oracle(COLLECTORS['detect']):
    """Predicts the labels, in pixels of the network's canvas."""

    def update_metrics(self, preds, batch):
        perfect = []
        for index in range(len(preds)):
            truth = self._prepare_batch(index, batch)
            perfect.append({'bboxes': truth['bboxes'], 'cls': truth['cls'], 'conf': torch.ones(len(truth['cls']))})
        super().update_metrics(perfect, batch)


def test_perfect_predictions_score_1_in_the_pixels_of_the_images(tmp_path, wide_data, write_config, monkeypatch):
    monkeypatch.setitem(COLLECTORS, 'detect', _Oracle)
    truth = write_coco(tmp_path / 'truth.json', BOXES, CATEGORIES)
    config = write_config(data=str(wide_data), coco_json=str(truth))
    checkpoint = save_model(build('yolo11'), tmp_path / 'model.pt')
    scores = kd_dense.yolo.evaluate(config, checkpoint, tmp_path / 'eval')
    assert scores['metrics/mAP50-95(B)'] == pytest.approx(0.995, abs=1e-3)  # Ultralytics' interpolation never reaches 1
    assert scores['coco/bbox_mAP'] == pytest.approx(1)


class _MaskOracle(COLLECTORS['segment']):
    """Predicts the labels, in pixels of the network's canvas."""

    def update_metrics(self, preds, batch):
        perfect = []
        for index in range(len(preds)):
            truth = self._prepare_batch(index, batch)
            height, width = batch['img'].shape[2:]
            masks = [cv2.resize(m.float().numpy(), (width, height)) > 0.5 for m in truth['masks']]
            perfect.append(
                {
                    'bboxes': truth['bboxes'],
                    'cls': truth['cls'],
                    'conf': torch.ones(len(truth['cls'])),
                    'masks': torch.tensor(np.array(masks, dtype=np.uint8)).reshape(-1, height, width),
                }
            )
        super().update_metrics(perfect, batch)


def test_masks_are_scored_too(tmp_path, mask_data, write_config, teacher_file, monkeypatch):
    monkeypatch.setitem(COLLECTORS, 'segment', _MaskOracle)
    objects = {}
    for image in sorted((mask_data.parent / 'images' / 'val').iterdir()):
        rows = (mask_data.parent / 'labels' / 'val' / f'{image.stem}.txt').read_text().split('\n')
        corners = [(NAMES[int(row[0])], [float(v) * 64 for v in row.split()[1:]]) for row in rows if row]
        objects[image.name] = [(name, c[0], c[1], c[2] - c[0], c[5] - c[1]) for name, c in corners]
    truth = write_coco(tmp_path / 'truth.json', objects, CATEGORIES)
    content = json.loads(truth.read_text())
    for annotation in content['annotations']:
        x, y, w, h = annotation['bbox']
        annotation['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for image in content['images']:
        image.update(width=64, height=64)
    truth.write_text(json.dumps(content))
    scores = kd_dense.yolo.evaluate(
        write_config(data=str(mask_data)), teacher_file('yolo11', '-seg'), tmp_path / 'eval', coco_json=truth
    )
    assert scores['coco/bbox_mAP'] == pytest.approx(1, abs=0.05)  # boxes come from polygons, in whole pixels
    assert scores['coco/segm_mAP_50'] == pytest.approx(1)
    assert scores['coco/segm_mAP'] > 0.6  # the labels' masks are at a quarter of the resolution


def test_without_annotations_only_ultralytics_scores(tmp_path, write_config, teacher_file):
    scores = kd_dense.yolo.evaluate(write_config(), teacher_file(), tmp_path / 'eval')
    assert not [k for k in scores if k.startswith('coco/')]
    with pytest.raises(ConfigError, match='there is no checkpoint'):
        kd_dense.yolo.evaluate(write_config(), tmp_path / 'none.pt')
