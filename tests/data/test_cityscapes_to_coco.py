"""Cityscapes and Foggy Cityscapes as COCO files, in tiny folders of the same layout."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO

from kd_dense.data.cityscapes_to_coco import convert, image_suffix
from kd_dense.data.coco_to_yolo import convert as to_yolo

REPOSITORY = Path(__file__).resolve().parents[2]
FOGGY = '_leftImg8bit_foggy_beta_0.02.png'


def instance_map():
    """Road (7), two cars, one of them in two parts, a rider, a group of persons, and a caravan, which is not scored."""
    instances = np.full((32, 64), 7, np.uint16)
    instances[4:10, 2:12] = 26000
    instances[20:24, 2:6] = 26001
    instances[20:24, 8:10] = 26001
    instances[4:16, 20:24] = 25000
    instances[6:12, 40:60] = 24
    instances[26:30, 40:50] = 29000
    return instances


@pytest.fixture
def root(tmp_path):
    """Two cities, three images, one of them without an object; each clear and in fog of two densities."""
    root = tmp_path / 'cityscapes'
    empty = np.full((32, 64), 7, np.uint16)
    for city, number, instances in (('aachen', 0, instance_map()), ('aachen', 1, empty), ('zurich', 0, instance_map())):
        name = f'{city}_{number:06d}_000019'
        files = [f'leftImg8bit/train/{city}/{name}_leftImg8bit.png']
        files += [f'leftImg8bit_foggy/train/{city}/{name}_leftImg8bit_foggy_beta_{beta}.png' for beta in (0.01, 0.02)]
        for value, file in enumerate(files, start=50):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / file), np.full((32, 64, 3), value, np.uint8))
        truth = root / 'gtFine' / 'train' / city
        truth.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(truth / f'{name}_gtFine_instanceIds.png'), instances)
        cv2.imwrite(str(truth / f'{name}_gtFine_labelTrainIds.png'), np.full((32, 64), number, np.uint8))
    return root


def test_objects_and_crowds(root):
    count, objects = convert(root, 'train', with_masks=True, progress=False)
    assert count == 3
    assert objects == dict(person=0, rider=2, car=4, truck=0, bus=0, train=0, motorcycle=0, bicycle=0)
    coco = COCO(str(root / 'annotations' / 'instancesonly_filtered_gtFine_train.json'))
    assert sorted(coco.cats) == [24, 25, 26, 27, 28, 31, 32, 33]
    names = {image['file_name']: image['id'] for image in coco.imgs.values()}
    assert sorted(names) == [
        f'{c}/{c}_{n:06d}_000019_leftImg8bit.png' for c, n in (('aachen', 0), ('aachen', 1), ('zurich', 0))
    ]
    annotations = coco.loadAnns(coco.getAnnIds(names['zurich/zurich_000000_000019_leftImg8bit.png']))
    assert {(a['category_id'], *a['bbox'], a['area'], a['iscrowd']) for a in annotations} == {
        (26, 2, 4, 10, 6, 60, 0),
        (26, 2, 20, 8, 4, 16 + 8, 0),
        (25, 20, 4, 4, 12, 48, 0),
        (24, 40, 6, 20, 6, 120, 1),
    }
    masks = sum(coco.annToMask(a) for a in annotations if a['category_id'] == 26)
    np.testing.assert_array_equal(masks, instance_map() // 1000 == 26)
    assert coco.getAnnIds(names['aachen/aachen_000001_000019_leftImg8bit.png']) == []


def test_fog_has_the_same_objects(root):
    assert convert(root, 'train', progress=False) == convert(root, 'train', '0.02', progress=False)
    clear, foggy = (
        COCO(str(root / 'annotations' / name))
        for name in ('instancesonly_filtered_gtFine_train.json', 'foggy_train.json')
    )
    assert foggy.dataset['annotations'] == clear.dataset['annotations']
    for one, other in zip(clear.dataset['images'], foggy.dataset['images'], strict=True):
        assert other['file_name'] == one['file_name'].replace('_leftImg8bit.png', FOGGY)
        assert (root / 'leftImg8bit_foggy' / 'train' / other['file_name']).is_file()
    assert 'segmentation' not in clear.dataset['annotations'][0]


def test_the_toolboxes_read_it(root, tmp_path):
    convert(root, 'train', '0.02', progress=False)
    from mmdet.registry import DATASETS as DETECTION
    from mmseg.registry import DATASETS as SEGMENTATION

    init_default_scope('mmdet')
    detection = DETECTION.build(
        dict(
            type='CityscapesDataset',
            data_root=str(root),
            ann_file='annotations/foggy_train.json',
            data_prefix=dict(img='leftImg8bit_foggy/train/'),
            filter_cfg=dict(filter_empty_gt=True),
            pipeline=[],
        )
    )
    assert len(detection) == 2  # the one without objects is left out
    sample = detection[0]
    assert cv2.imread(sample['img_path'])[0, 0, 0] == 52
    assert [i['bbox_label'] for i in sample['instances'] if not i['ignore_flag']] == [1, 2, 2]  # rider, car, car
    init_default_scope('mmseg')
    segmentation = SEGMENTATION.build(
        dict(
            type='CityscapesDataset',
            data_root=str(root),
            img_suffix=image_suffix('0.02'),
            data_prefix=dict(img_path='leftImg8bit_foggy/train', seg_map_path='gtFine/train'),
            pipeline=[],
        )
    )
    assert len(segmentation) == 3
    for sample in segmentation:
        assert cv2.imread(sample['img_path'])[0, 0, 0] == 52
        assert cv2.imread(sample['seg_map_path'], -1)[0, 0] == int(Path(sample['img_path']).name.split('_')[1])
    json_file = root / 'annotations' / 'foggy_train.json'
    to_yolo(root / 'leftImg8bit_foggy' / 'train', json_file, tmp_path / 'yolo', 'train', progress=False)
    label_file = tmp_path / 'yolo/labels/train/aachen_000000_000019_leftImg8bit_foggy_beta_0.02.txt'
    assert [row.split()[0] for row in label_file.read_text().splitlines()] == ['1', '2', '2']


def test_bad_input(root):
    with pytest.raises(ValueError, match=r'unknown beta 0\.5; Foggy Cityscapes has 0\.005, 0\.01, 0\.02'):
        convert(root, 'train', '0.5', progress=False)
    with pytest.raises(FileNotFoundError, match=r'there are no images .*leftImg8bit_foggy/train/CITY/\*.*beta_0\.005'):
        convert(root, 'train', '0.005', progress=False)
    file = root / 'gtFine/train/zurich/zurich_000000_000019_gtFine_instanceIds.png'
    cv2.imwrite(str(file), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(OSError, match=r'instanceIds\.png is no map of instances'):
        convert(root, 'train', progress=False)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'instanceIds\.png not found: it is part of'):
        convert(root, 'train', progress=False)
    assert not (root / 'annotations').exists()


def test_tool(root, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['cityscapes2coco.py', '--root', str(root), *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / 'tools/dataset_converters/cityscapes2coco.py'), run_name='__main__')

    run('--split', 'train', '--beta', '0.02')
    assert 'foggy_train.json: 3 images, 0 person, 2 rider, 4 car' in capsys.readouterr().out
    run('--split', 'train', '--out', tmp_path / 'elsewhere.json')
    assert (tmp_path / 'elsewhere.json').is_file()
    with pytest.raises(SystemExit) as exit_:
        run('--split', 'val')
    assert exit_.value.code == 1 and 'error: there are no images' in capsys.readouterr().err
