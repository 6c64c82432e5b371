import json
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from kd_dense.data.scene_drawing import CLASSES, draw_scene
from kd_dense.data.scenes import generate

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = (64, 80)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return generate(tmp_path_factory.mktemp('data') / 'scenes', train=6, val=3, size=SIZE, seed=7, progress=False)


def fill_even_odd(polygon: np.ndarray) -> np.ndarray:
    """(H, W) bool of the pixel centres inside a polygon (P, 2) in pixels, by counting crossings of a ray."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]] + 0.5
    inside = np.zeros(SIZE, bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, 0)):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
    return inside


def read_gray(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None
    assert image.ndim == 2
    return image


def names(split: str) -> list[str]:
    return [f'scene_{int(split == "val"):06d}_{i:06d}' for i in range({'train': 6, 'val': 3}[split])]


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob('*') if p.is_file() and p.suffix in ('.png', '.txt', '.json'))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_images_are_those_drawn_and_stored_once(root):
    for split in ('train', 'val'):
        for index, name in enumerate(names(split)):
            path = root / 'images' / split / f'{name}.png'
            expected = draw_scene(SIZE, 7, split, index).image
            assert np.array_equal(cv2.imread(str(path))[..., ::-1], expected)
            assert path.samefile(root / 'leftImg8bit' / split / 'scene' / f'{name}_leftImg8bit.png')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_label_map_coco_and_yolo_agree(root, split):
    coco = COCO(str(root / 'annotations' / f'instances_{split}.json'))
    assert [(c['id'], c['name']) for c in coco.loadCats(coco.getCatIds())] == list(enumerate(CLASSES))[1:]
    assert sorted(i['file_name'] for i in coco.imgs.values()) == [f'{name}.png' for name in names(split)]
    assert min(coco.anns) == 1
    for image in coco.imgs.values():
        assert (image['height'], image['width']) == SIZE
        name = Path(image['file_name']).stem
        labels = read_gray(root / 'gtFine' / split / 'scene' / f'{name}_gtFine_labelTrainIds.png')
        rows = (root / 'labels' / split / f'{name}.txt').read_text().splitlines()
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert len(rows) == len(annotations)
        covered_by = np.zeros(SIZE, int)
        class_map = np.zeros(SIZE, int)
        for annotation, row in zip(annotations, rows):
            mask = coco_mask.decode(annotation['segmentation']).astype(bool)
            y, x = np.nonzero(mask)
            assert annotation['bbox'] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert annotation['area'] == len(x) >= 12
            assert annotation['iscrowd'] == 0
            covered_by += mask
            class_map[mask] = annotation['category_id']

            category, *numbers = row.split()
            polygon = np.array(numbers, float).reshape(-1, 2) * SIZE[::-1]
            assert int(category) == annotation['category_id'] - 1
            assert len(polygon) >= 4
            assert np.array_equal(fill_even_odd(np.round(polygon, 3)), mask)
        assert covered_by.max() == 1
        known = labels != 255
        assert np.array_equal(labels[known], class_map[known])
        assert 0.9 < known.mean() <= 1.0


def test_label_ids_are_the_official_ids_of_the_train_ids(root):
    labels = pytest.importorskip('cityscapesscripts.helpers.labels')
    seen = set()
    for name in names('train'):
        prefix = root / 'gtFine' / 'train' / 'scene' / f'{name}_gtFine_'
        train_ids = read_gray(Path(f'{prefix}labelTrainIds.png'))
        label_ids = read_gray(Path(f'{prefix}labelIds.png'))
        for label_id in np.unique(label_ids):
            of_label = set(np.unique(train_ids[label_ids == label_id]))
            assert of_label == {labels.id2label[label_id].trainId}
            seen |= of_label
        assert np.array_equal(read_gray(Path(f'{prefix}instanceIds.png')), label_ids)
    assert seen == {0, 1, 2, 3, 4, 5, 6, 255}


def test_cityscapesscripts_evaluation(root, tmp_path):
    """Perfect predictions have IoU 1 whatever they say on void; "all background" has the IoU counted by hand."""
    evaluation = pytest.importorskip('cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling')
    truths = sorted((root / 'gtFine' / 'val').rglob('*_labelIds.png'))
    perfect, road = [], []
    background = known = 0
    for path in truths:
        labels = read_gray(path)
        background, known = background + (labels == 7).sum(), known + (labels != 0).sum()
        for folder, image in ((perfect, np.where(labels == 0, 7, labels)), (road, np.full_like(labels, 7))):
            folder.append(str(tmp_path / f'{len(folder)}_{folder is road}.png'))
            cv2.imwrite(folder[-1], image.astype(np.uint8))

    args = evaluation.args
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    args.evalPixelAccuracy = False
    scores = evaluation.evaluateImgLists(perfect, [str(p) for p in truths], args)['classScores']
    present = {'road', 'sidewalk', 'building', 'wall', 'fence', 'pole', 'traffic light'}
    assert {name for name, score in scores.items() if not np.isnan(score)} == present
    assert all(scores[name] == 1.0 for name in present)
    scores = evaluation.evaluateImgLists(road, [str(p) for p in truths], args)['classScores']
    assert scores['road'] == pytest.approx(background / known)
    assert scores['sidewalk'] == 0.0


@pytest.mark.parametrize('task', ['detect', 'segment'])
def test_ultralytics_reads_the_folder(root, task, monkeypatch):
    monkeypatch.setenv('YOLO_OFFLINE', 'true')
    pytest.importorskip('ultralytics', reason='Ultralytics is an optional extra')
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    data = check_det_dataset(str(root / 'scenes.yaml'), autodownload=False)
    assert list(data['names'].values()) == list(CLASSES[1:])
    dataset = YOLODataset(img_path=data['val'], data=data, task=task, augment=False, imgsz=80)
    coco = COCO(str(root / 'annotations' / 'instances_val.json'))
    by_name = {i['file_name']: coco.loadAnns(coco.getAnnIds(i['id'])) for i in coco.imgs.values()}
    assert len(dataset) == 3
    for label in dataset.labels:
        annotations = by_name[Path(label['im_file']).name]
        truth = sorted([a['category_id'] - 1, *a['bbox']] for a in annotations)
        centre, extent = label['bboxes'][:, :2] * SIZE[::-1], label['bboxes'][:, 2:] * SIZE[::-1]
        found = np.concatenate([label['cls'], centre - extent / 2, extent], 1)
        assert sorted(np.round(found, 3).tolist()) == truth
        assert len(label['segments']) == len(annotations)
    assert ('masks' in dataset[0]) == (task == 'segment')


def test_scene_does_not_depend_on_the_number_of_scenes_or_on_the_process(root, tmp_path):
    options = {'size': SIZE, 'seed': 7, 'progress': False}
    smaller = files_of(generate(tmp_path / 'smaller', train=2, val=1, **options))
    full = files_of(root)
    compared = [name for name in smaller if not name.endswith('.json')]
    assert len(compared) == 3 * 6
    assert all(smaller[name] == full[name] for name in compared)

    generate(tmp_path / 'parallel', train=6, val=3, workers=1, **options)
    assert files_of(tmp_path / 'parallel') == full


def test_second_call_returns_at_once_and_other_options_replace(tmp_path, monkeypatch):
    options = {'val': 1, 'size': (64, 64), 'progress': False}
    root = generate(tmp_path / 'a', train=2, layouts=('coco', 'yolo'), **options)
    assert not (root / 'leftImg8bit').exists()
    (root / 'notes.txt').write_text('mine')
    before = files_of(root)
    with monkeypatch.context() as patch:
        patch.setattr('kd_dense.data.scenes._write_dataset', lambda *_: pytest.fail('drew the scenes again'))
        generate(tmp_path / 'a', train=2, layouts=('yolo', 'coco'), **options)
    assert files_of(root) == before

    generate(tmp_path / 'a', train=3, layouts='cityscapes', **options)
    assert not (root / 'labels').exists()
    assert not (root / 'scenes.yaml').exists()
    assert len(list((root / 'leftImg8bit' / 'train').rglob('*.png'))) == 3
    assert (root / 'notes.txt').read_text() == 'mine'


def test_interrupted_run_is_not_taken_for_complete(tmp_path, monkeypatch):
    options = {'train': 2, 'val': 1, 'size': (64, 64), 'layouts': ('yolo',), 'progress': False}
    with monkeypatch.context() as patch:
        patch.setattr('kd_dense.data.scenes.yolo_row', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path / 'a', **options)
    assert json.loads((tmp_path / 'a' / 'scenes.json').read_text())['complete'] is False
    generate(tmp_path / 'a', **options)
    assert files_of(tmp_path / 'a') == files_of(generate(tmp_path / 'b', **options))


def test_moved_folder_gets_a_new_path_in_the_data_file(tmp_path):
    options = {'train': 1, 'val': 1, 'size': (64, 64), 'layouts': ('yolo',), 'progress': False}
    generate(tmp_path / 'a', **options).rename(tmp_path / 'b')
    generate(tmp_path / 'b', **options)
    assert (tmp_path / 'b' / 'scenes.yaml').read_text().splitlines()[0] == f'path: "{tmp_path / "b"}"'


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'holiday.png').write_text('mine')
    with pytest.raises(FileExistsError, match='holds no generated scenes'):
        generate(tmp_path, train=1, val=1, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ['holiday.png']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'layouts': ('voc',)}, 'layouts'),
        ({'train': -1}, 'negative'),
        ({'size': (64, 16)}, 'size'),
        ({'difficulty': 1.5}, 'difficulty'),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'a', progress=False, **options)
    assert not (tmp_path / 'a').exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(train: str) -> None:
        arguments = ['--out', str(tmp_path / 'a'), '--train', train, '--val', '1', '--size', '64', '96']
        monkeypatch.setattr(sys, 'argv', ['make_scenes.py', *arguments, '--layouts', 'coco'])
        runpy.run_path(str(REPOSITORY / 'tools' / 'make_scenes.py'), run_name='__main__')

    run('2')
    assert cv2.imread(str(tmp_path / 'a' / 'images' / 'val' / 'scene_000001_000000.png')).shape == (64, 96, 3)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run('-2')
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith('error: train, val and seed must not be negative')
