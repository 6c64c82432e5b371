"""The generated scenes and the real data sets, read by MMSegmentation and MMDetection."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope

from kd_dense.data.scene_drawing import CLASSES
from kd_dense.data.scenes import generate

DATA = Path(os.environ.get('KD_DENSE_DATA', Path(__file__).resolve().parents[3] / 'shared' / 'data'))
SEG_PIPELINE = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}, {'type': 'PackSegInputs'}]


def needs(name: str) -> pytest.MarkDecorator:
    reason = f'no {name} in {DATA}; set KD_DENSE_DATA to its parent folder'
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=reason)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('data') / 'scenes', train=3, val=2, size=(64, 96), progress=False)


@pytest.fixture
def build():
    """Builds a dataset config as a runner of the given toolbox does."""

    def build_in(toolbox: str, config: dict):
        pytest.importorskip(toolbox)
        if toolbox == 'mmseg':
            import kd_dense.data.datasets  # noqa: F401  (what custom_imports does)
        __import__(f'{toolbox}.utils').utils.register_all_modules(init_default_scope=False)
        with DefaultScope.overwrite_default_scope(toolbox):
            return DATASETS.build(config)

    return build_in


def segmentation(kind: str, root: Path, images: str, labels: str, **options) -> dict:
    prefix = {'img_path': images, 'seg_map_path': labels}
    return {'type': kind, 'data_root': str(root), 'data_prefix': prefix, 'pipeline': SEG_PIPELINE, **options}


@pytest.mark.parametrize(('kind', 'classes'), [('kd_dense.SceneDataset', 7), ('CityscapesDataset', 19)])
def test_segmentation_datasets_read_the_scenes(scenes, build, kind, classes):
    dataset = build('mmseg', segmentation(kind, scenes, 'leftImg8bit/train', 'gtFine/train'))
    assert len(dataset) == 3
    assert len(dataset.metainfo['classes']) == len(dataset.metainfo['palette']) == classes
    for item in dataset:
        path = item['data_samples'].seg_map_path
        assert path.endswith('_gtFine_labelTrainIds.png')
        loaded = item['data_samples'].gt_sem_seg.data[0].numpy()
        assert np.array_equal(loaded, cv2.imread(path, cv2.IMREAD_UNCHANGED))
        assert item['inputs'].shape == (3, 64, 96)


def test_subset_of_the_scene_classes(scenes, build):
    """MMSegmentation's own way to leave classes out still works: their pixels become void."""
    classes = ('background', 'bar')
    config = segmentation('kd_dense.SceneDataset', scenes, 'leftImg8bit/train', 'gtFine/train')
    dataset = build('mmseg', config | {'metainfo': {'classes': classes}})
    sample = dataset[0]['data_samples']
    original = cv2.imread(sample.seg_map_path, cv2.IMREAD_UNCHANGED)
    expected = np.select([original == 0, original == 6], [0, 1], 255)
    assert np.array_equal(sample.gt_sem_seg.data[0].numpy(), expected)


def test_detection_dataset_reads_the_scenes(scenes, build):
    dataset = build(
        'mmdet',
        {
            'type': 'CocoDataset',
            'data_root': str(scenes),
            'ann_file': 'annotations/instances_train.json',
            'data_prefix': {'img': 'images/train/'},
            'metainfo': {'classes': CLASSES[1:]},
            'pipeline': [
                {'type': 'LoadImageFromFile'},
                {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
                {'type': 'PackDetInputs'},
            ],
        },
    )
    truth = json.loads((scenes / 'annotations' / 'instances_train.json').read_text())
    assert len(dataset) == 3
    for item in dataset:
        instances = item['data_samples'].gt_instances
        annotations = [a for a in truth['annotations'] if a['image_id'] == item['data_samples'].img_id]
        assert instances.labels.tolist() == [a['category_id'] - 1 for a in annotations]
        assert instances.masks.masks.sum((1, 2)).tolist() == [a['area'] for a in annotations]
        assert [
            [x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in annotations)
        ] == instances.bboxes.tensor.tolist()


@pytest.mark.parametrize('subset', [None, ('sky', 'car')])
def test_camvid_void_label_becomes_the_ignore_index(tmp_path, build, subset):
    for folder, suffix, image in (
        ('images', 'jpg', np.zeros((12, 12, 3), np.uint8)),
        ('labels', 'png', np.tile(np.arange(12, dtype=np.uint8), (12, 1))),
    ):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / f'a.{suffix}'), image)
    config = segmentation('kd_dense.CamVidDataset', tmp_path, 'images', 'labels')
    dataset = build('mmseg', config if subset is None else config | {'metainfo': {'classes': subset}})
    row = dataset[0]['data_samples'].gt_sem_seg.data[0, 0].tolist()
    assert row == ([*range(11), 255] if subset is None else [0, *[255] * 7, 1, 255, 255, 255])
    assert len(dataset.metainfo['palette']) == len(subset or range(11))


@needs('camvid')
def test_camvid_files(build):
    dataset = build('mmseg', segmentation('kd_dense.CamVidDataset', DATA / 'camvid', 'images/val', 'labels/val'))
    assert len(dataset) == 101
    item = dataset[0]
    assert item['inputs'].shape == (3, 360, 480)
    labels = item['data_samples'].gt_sem_seg.data
    original = cv2.imread(item['data_samples'].seg_map_path, cv2.IMREAD_UNCHANGED)
    assert (original == 11).sum() == (labels == 255).sum() > 0
    assert labels[labels != 255].max() <= 10


@needs('bccd')
def test_bccd_files(build):
    dataset = build(
        'mmdet',
        {
            'type': 'CocoDataset',
            'data_root': str(DATA / 'bccd'),
            'ann_file': 'annotations/val.json',
            'data_prefix': {'img': 'val/'},
            'metainfo': {'classes': ('RBC', 'WBC', 'Platelets')},
            'pipeline': [],
        },
    )
    assert len(dataset) == 87
    labels = [i['bbox_label'] for n in range(87) for i in dataset.get_data_info(n)['instances']]
    assert len(labels) == 1137
    assert set(labels) == {0, 1, 2}
