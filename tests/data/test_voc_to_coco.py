"""Pascal VOC and Clipart1k as COCO files, in tiny folders of the same layout."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from kd_dense.data.coco_to_yolo import convert as to_yolo
from kd_dense.data.voc_to_coco import CLASSES, convert

REPOSITORY = Path(__file__).resolve().parents[2]


def write(root: Path, folder: str, split: str, images: dict[str, list[tuple]]) -> None:
    """Images of 50 x 40 pixels with objects ``(class, difficult, (xmin, ymin, xmax, ymax))``."""
    for part in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (root / folder / part).mkdir(parents=True, exist_ok=True)
    (root / folder / f'ImageSets/Main/{split}.txt').write_text(''.join(f'{name}  1\n' for name in images) + '\n')
    for name, objects in images.items():
        cv2.imwrite(str(root / folder / f'JPEGImages/{name}.jpg'), np.zeros((40, 50, 3), np.uint8))
        rows = []
        for kind, difficult, box in objects:
            sides = ''.join(f'<{s}>{v}</{s}>' for s, v in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True))
            flag = '' if difficult is None else f'<difficult>{difficult}</difficult>'
            part = '<part><name>head</name><bndbox><xmin>3</xmin></bndbox></part>'  # VOC 2012 has parts of persons
            rows.append(f'<object><name>{kind}</name>{flag}<bndbox>{sides}</bndbox>{part}</object>')
        # The size that a file states is not read: in some it is 0.
        text = f'<annotation><size><width>0</width><height>0</height></size>{"".join(rows)}</annotation>'
        (root / folder / f'Annotations/{name}.xml').write_text(text)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / 'VOCdevkit'
    write(root, 'VOC2007', 'trainval', {'000005': [('chair', 0, (1, 1, 50, 40)), ('person', 1, (11, 6, 20, 15))]})
    write(
        root,
        'VOC2012',
        'trainval',
        {'2008_000002': [('tvmonitor', 0, ('10.5', 5, '20.5', 45))], '2008_000003': [('dog', 0, (51, 3, 60, 9))]},
    )
    write(root, 'clipart', 'train', {'16793': [('aeroplane', None, (3, 4, 3, 4))]})
    return root


def annotations(coco, name):
    (image_id,) = (i['id'] for i in coco.imgs.values() if i['file_name'] == name)
    found = coco.loadAnns(coco.getAnnIds(image_id))
    return [(CLASSES[a['category_id'] - 1], tuple(a['bbox']), a['area'], a['iscrowd']) for a in found]


def test_boxes_and_difficult_objects(root):
    out = root / 'annotations' / 'voc0712_trainval.json'
    count, objects = convert(root, ['VOC2007/trainval', 'VOC2012/trainval'], out, progress=False)
    assert count == 3 and {k: v for k, v in objects.items() if v} == {'chair': 1, 'tvmonitor': 1}
    coco = COCO(str(out))
    assert [coco.cats[i]['name'] for i in range(1, 21)] == list(CLASSES)
    assert all((i['width'], i['height']) == (50, 40) for i in coco.imgs.values())
    assert annotations(coco, 'VOC2007/JPEGImages/000005.jpg') == [
        ('chair', (0, 0, 50, 40), 2000, 0),
        ('person', (10, 5, 10, 10), 100, 1),
    ]
    assert annotations(coco, 'VOC2012/JPEGImages/2008_000002.jpg') == [('tvmonitor', (9.5, 4, 11, 36), 396, 0)]
    assert annotations(coco, 'VOC2012/JPEGImages/2008_000003.jpg') == []  # outside of the image


def test_yolo_has_no_difficult_objects(root, tmp_path):
    out = tmp_path / 'voc.json'
    convert(root, ['VOC2007/trainval', 'VOC2012/trainval'], out, progress=False)
    data_file = to_yolo(root, out, tmp_path / 'yolo', 'train', progress=False)
    labels = tmp_path / 'yolo' / 'labels' / 'train'
    assert (labels / '000005.txt').read_text() == '8 0.5 0.5 1 1\n'
    assert (labels / '2008_000003.txt').read_text() == ''
    assert data_file.read_text().splitlines()[-1] == '  19: "tvmonitor"'
    convert(root, ['clipart/train'], out, progress=False)
    to_yolo(root, out, tmp_path / 'clipart', 'train', progress=False)
    assert (tmp_path / 'clipart/labels/train/16793.txt').read_text() == '0 0.05 0.0875 0.02 0.025\n'
    assert (tmp_path / 'clipart/data.yaml').read_text().splitlines()[3:] == data_file.read_text().splitlines()[3:]


def test_bad_input(root, tmp_path):
    def run(*sets):
        convert(root, sets, tmp_path / 'out.json', progress=False)

    with pytest.raises(ValueError, match="'trainval' is not of the form FOLDER/SET"):
        run('trainval')
    with pytest.raises(FileNotFoundError, match=r'ImageSets/Main/test\.txt'):
        run('VOC2007/test')
    (root / 'VOC2007/ImageSets/Main/test.txt').write_text('\n')
    with pytest.raises(ValueError, match=r'test\.txt lists no image'):
        run('VOC2007/test')
    write(root, 'VOC2007', 'test', {'000007': [('zebra', 0, (1, 1, 5, 5))]})
    with pytest.raises(ValueError, match=r"000007\.xml: class 'zebra' is none of the 20"):
        run('VOC2007/test')
    for text in ('<annotation>', '<annotation><object><name>car</name></object></annotation>'):
        (root / 'VOC2007/Annotations/000007.xml').write_text(text)
        with pytest.raises(ValueError, match=r'000007\.xml is no annotation of VOC'):
            run('VOC2007/test')
    (root / 'VOC2007/JPEGImages/000007.jpg').write_text('no image')
    with pytest.raises(OSError, match=r'000007\.jpg is no image'):
        run('VOC2007/test')
    (root / 'VOC2007/JPEGImages/000007.jpg').unlink()
    with pytest.raises(FileNotFoundError, match=r'000007\.jpg'):
        run('VOC2007/test')
    assert not (tmp_path / 'out.json').exists()


def test_tool(root, tmp_path, monkeypatch, capsys):
    def run(*sets):
        arguments = ['--root', str(root), '--out', str(tmp_path / 'out.json'), '--sets', *sets]
        monkeypatch.setattr(sys, 'argv', ['voc2coco.py', *arguments])
        runpy.run_path(str(REPOSITORY / 'tools/dataset_converters/voc2coco.py'), run_name='__main__')

    run('VOC2007/trainval', 'clipart/train')
    assert '2 images, 2 objects that are not difficult' in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        run('VOC2007/test')
    assert exit_.value.code == 1 and 'error: ' in capsys.readouterr().err
