"""Boxes from label maps: which pixels are one object, what is left out, and the COCO file."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from kd_dense.data.labels_to_coco import convert, objects_of

REPOSITORY = Path(__file__).resolve().parents[2]


def label_map():
    """Two objects of class 5 that touch at a corner, one apart, one of class 7 between the parts of another."""
    labels = np.full((30, 40), 11, np.uint8)
    labels[2:6, 3:9] = 5
    labels[6:10, 9:12] = 5  # touches the one above at a corner
    labels[20:22, 30:40] = 5
    labels[12:28, 4:14] = 7
    labels[12:28, 8:9] = 5  # a post in front of it
    return labels


def write(folder: Path, labels: np.ndarray, name='one', size=None, suffix='.jpg') -> None:
    for part in ('images', 'labels'):
        (folder / part / Path(name).parent).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / 'images' / f'{name}{suffix}'), np.zeros((*(size or labels.shape[:2]), 3), np.uint8))
    cv2.imwrite(str(folder / 'labels' / f'{name}.png'), labels)


def boxes(masks):
    found = [np.argwhere(mask) for mask in masks]
    return sorted((*p.min(0)[::-1].tolist(), *(np.ptp(p, axis=0) + 1)[::-1].tolist()) for p in found)


def test_objects_are_connected_parts():
    masks = list(objects_of(label_map(), 5))
    assert boxes(masks) == [(3, 2, 9, 8), (8, 12, 1, 16), (30, 20, 10, 2)]
    assert [int(m.sum()) for m in masks] == [24 + 12, 16, 20]
    assert boxes(objects_of(label_map(), 7)) == [(4, 12, 4, 16), (9, 12, 5, 16)]  # the post divides it
    assert list(objects_of(label_map(), 6)) == []


def test_smallest_size():
    assert boxes(objects_of(label_map(), 5, min_side=2)) == [(3, 2, 9, 8), (30, 20, 10, 2)]
    assert boxes(objects_of(label_map(), 5, min_side=3)) == [(3, 2, 9, 8)]
    assert boxes(objects_of(label_map(), 5, min_area=17)) == [(3, 2, 9, 8), (30, 20, 10, 2)]


def test_coco_file(tmp_path):
    write(tmp_path, label_map(), 'b')
    write(tmp_path, np.zeros((30, 40), np.uint8), 'deep/a', suffix='.png')
    out = tmp_path / 'new' / 'boxes.json'
    classes = {'late': 7, 'early': 5}
    found = convert(tmp_path / 'images', tmp_path / 'labels', classes, out, 2, with_masks=True, progress=False)
    assert found == (2, {'late': 2, 'early': 2})
    coco = COCO(str(out))
    assert [c['name'] for c in coco.loadCats(sorted(coco.getCatIds()))] == ['late', 'early']
    assert {i['file_name']: (i['width'], i['height']) for i in coco.imgs.values()} == {
        'b.jpg': (40, 30),
        'deep/a.png': (40, 30),
    }
    (image_id,) = (i['id'] for i in coco.imgs.values() if i['file_name'] == 'b.jpg')
    annotations = coco.loadAnns(coco.getAnnIds(image_id))
    assert {(a['category_id'], *a['bbox'], a['area']) for a in annotations} == {
        (1, 4, 12, 4, 16, 64),
        (1, 9, 12, 5, 16, 80),
        (2, 3, 2, 9, 8, 36),
        (2, 30, 20, 10, 2, 20),
    }
    assert len(coco.anns) == 4 and 0 not in coco.anns  # the image without objects is listed too
    both = sum(coco.annToMask(a) for a in annotations if a['category_id'] == 1)
    np.testing.assert_array_equal(both, label_map() == 7)
    convert(tmp_path / 'images', tmp_path / 'labels', classes, out, progress=False)
    assert 'segmentation' not in json.loads(out.read_text())['annotations'][0]


def test_palette_files_keep_their_indices(tmp_path):
    write(tmp_path, label_map())
    image = Image.fromarray(label_map()).convert('P')
    image.putpalette([value for i in range(256) for value in (255 - i, i, 7)])
    image.save(tmp_path / 'labels' / 'one.png')
    found = convert(tmp_path / 'images', tmp_path / 'labels', {'five': 5}, tmp_path / 'out.json', 2, progress=False)
    assert found == (1, {'five': 2})


def test_bad_input(tmp_path):
    def run(classes):
        return convert(tmp_path / 'images', tmp_path / 'labels', classes, tmp_path / 'out.json', progress=False)

    with pytest.raises(ValueError, match='there are no images in'):
        run({'a': 5})
    write(tmp_path, label_map())
    with pytest.raises(ValueError, match='the same value'):
        run({'a': 5, 'b': 5})
    with pytest.raises(ValueError, match='has no object of a, b: check their values'):
        run({'a': 1, 'b': 2})
    write(tmp_path, label_map(), size=(10, 40))
    with pytest.raises(ValueError, match=r'one\.jpg has \(height, width\) \(10, 40\), its label map \(30, 40\)'):
        run({'a': 5})
    write(tmp_path, np.zeros((30, 40, 3), np.uint8))
    with pytest.raises(ValueError, match=r'one\.png has 3 channels; a label map has one'):
        run({'a': 5})
    (tmp_path / 'labels' / 'one.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'one\.png not found: --labels must have'):
        run({'a': 5})
    write(tmp_path, label_map())
    (tmp_path / 'images' / 'one.jpg').write_text('no image')
    with pytest.raises(OSError, match=r'one\.jpg is no image'):
        run({'a': 5})
    assert not (tmp_path / 'out.json').exists()


def test_tool(tmp_path, monkeypatch, capsys):
    write(tmp_path, label_map())
    tool = REPOSITORY / 'tools/dataset_converters/labels2coco.py'
    out = tmp_path / 'out.json'

    def run(*classes):
        folders = ['--images', str(tmp_path / 'images'), '--labels', str(tmp_path / 'labels'), '--out', str(out)]
        monkeypatch.setattr(sys, 'argv', ['labels2coco.py', *folders, '--classes', *classes, '--min-side', '2'])
        runpy.run_path(str(tool), run_name='__main__')

    run('sign=board=5', 'bus=7')
    assert '1 images, 2 sign=board, 2 bus' in capsys.readouterr().out
    assert [c['name'] for c in json.loads(out.read_text())['categories']] == ['sign=board', 'bus']
    with pytest.raises(SystemExit):
        run('car')
    assert "'car' is not of the form NAME=VALUE" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        run('car=3')
    assert exit_.value.code == 1 and 'error: ' in capsys.readouterr().err
