import json
import os
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from kd_dense.data.coco_to_yolo import convert

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get('KD_DENSE_DATA', REPOSITORY.parent / 'shared' / 'data'))


def make_coco(folder: Path, annotations: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    cv2.imwrite(str(folder / 'one.png'), np.zeros((40, 80, 3), np.uint8))
    content = {
        'images': [{'id': 9, 'file_name': 'one.png', 'height': 40, 'width': 80}],
        'annotations': [{'id': i, 'image_id': 9, 'iscrowd': 0} | a for i, a in enumerate(annotations, 1)],
        'categories': [{'id': 7, 'name': 'late'}, {'id': 2, 'name': 'early: 1st'}],
    }
    (folder / 'coco.json').write_text(json.dumps(content))
    return folder / 'coco.json'


def test_boxes_are_normalised_clipped_and_without_crowds_or_duplicates(tmp_path):
    json_file = make_coco(
        tmp_path / 'source',
        [
            {'category_id': 7, 'bbox': [8, 10, 16, 20]},
            {'category_id': 2, 'bbox': [70, 30, 20, 20]},
            {'category_id': 2, 'bbox': [70, 30, 20, 20]},
            {'category_id': 2, 'bbox': [0, 0, 5, 5], 'iscrowd': 1},
            {'category_id': 2, 'bbox': [5, 5, 0, 5]},
        ],
    )
    data_file = convert(tmp_path / 'source', json_file, tmp_path / 'out', 'train', progress=False)
    rows = (tmp_path / 'out' / 'labels' / 'train' / 'one.txt').read_text().splitlines()
    assert rows == ['1 0.2 0.5 0.2 0.5', '0 0.9375 0.875 0.125 0.25']
    assert (tmp_path / 'out' / 'images' / 'train' / 'one.png').samefile(tmp_path / 'source' / 'one.png')
    lines = data_file.read_text().splitlines()
    assert lines[0] == f'path: "{tmp_path / "out"}"'
    assert lines[-2:] == ['  0: "early: 1st"', '  1: "late"']


def test_masks_become_polygons(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[10:20, 20:40] = 1
    run_length = coco_mask.encode(np.asfortranarray(mask))
    run_length['counts'] = run_length['counts'].decode()
    json_file = make_coco(
        tmp_path / 'source',
        [
            {'category_id': 2, 'bbox': [20, 10, 20, 10], 'segmentation': run_length},
            {'category_id': 2, 'bbox': [0, 0, 8, 4], 'segmentation': [[0, 0, 8, 0, 8, 4]]},
            {'category_id': 7, 'bbox': [40, 20, 40, 20]},
        ],
    )
    convert(tmp_path / 'source', json_file, tmp_path / 'out', 'val', progress=False)
    rows = (tmp_path / 'out' / 'labels' / 'val' / 'one.txt').read_text().splitlines()
    corners = {tuple(p) for p in np.array(rows[0].split()[1:], float).reshape(-1, 2).tolist()}
    assert corners == {(0.25, 0.25), (0.5, 0.25), (0.5, 0.5), (0.25, 0.5)}
    assert rows[1] == '0 0 0 0.1 0 0.1 0.1'
    assert rows[2] == '1 0.5 0.5 1 0.5 1 1 0.5 1'


def test_errors_name_what_to_do(tmp_path):
    json_file = make_coco(tmp_path / 'source', [])
    with pytest.raises(FileNotFoundError, match='--images must be the folder'):
        convert(tmp_path, json_file, tmp_path / 'out', 'train', progress=False)
    with pytest.raises(FileNotFoundError, match='give the path of a COCO annotation file'):
        convert(tmp_path, tmp_path / 'no.json', tmp_path / 'out', 'train', progress=False)
    with pytest.raises(ValueError, match='split'):
        convert(tmp_path / 'source', json_file, tmp_path / 'out', 'test', progress=False)
    convert(tmp_path / 'source', json_file, tmp_path / 'out', 'train', progress=False)
    json_file.write_text(json_file.read_text().replace('late', 'other'))
    with pytest.raises(ValueError, match='other classes'):
        convert(tmp_path / 'source', json_file, tmp_path / 'out', 'val', progress=False)


@pytest.mark.skipif(not (DATA / 'bccd').is_dir(), reason=f'no BCCD in {DATA}; set KD_DENSE_DATA to its parent folder')
def test_bccd_from_the_command_line(tmp_path, monkeypatch):
    source = DATA / 'bccd'
    truth = json.loads((source / 'annotations' / 'val.json').read_text())
    arguments = ['--images', str(source / 'val'), '--json', str(source / 'annotations' / 'val.json')]
    monkeypatch.setattr(sys, 'argv', ['coco2yolo.py', *arguments, '--out', str(tmp_path), '--split', 'val'])
    runpy.run_path(str(REPOSITORY / 'tools' / 'dataset_converters' / 'coco2yolo.py'), run_name='__main__')
    image = truth['images'][0]
    boxes = {tuple(a['bbox']) for a in truth['annotations'] if a['image_id'] == image['id']}
    labels = np.loadtxt(tmp_path / 'labels' / 'val' / f'{Path(image["file_name"]).stem}.txt', ndmin=2)
    size = np.array([image['width'], image['height']])
    found = np.concatenate([(labels[:, 1:3] - labels[:, 3:] / 2) * size, labels[:, 3:] * size], 1)
    assert {tuple(np.round(box)) for box in found.tolist()} == boxes
    assert len(list((tmp_path / 'images' / 'val').iterdir())) == len(truth['images'])
