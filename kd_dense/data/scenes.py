"""Generate a dataset of synthetic scenes and write it in Cityscapes, COCO and YOLO layout.

::

    root/scenes.json                                   options; written last, marks the dataset as complete
    root/leftImg8bit/{train,val}/scene/scene_SSSSSS_NNNNNN_leftImg8bit.png               cityscapes
    root/gtFine/{train,val}/scene/scene_SSSSSS_NNNNNN_gtFine_labelTrainIds.png           cityscapes
    root/gtFine/{train,val}/scene/scene_SSSSSS_NNNNNN_gtFine_{labelIds,instanceIds}.png  cityscapes
    root/images/{train,val}/scene_SSSSSS_NNNNNN.png                                      coco, yolo
    root/annotations/instances_{train,val}.json                                          coco
    root/labels/{train,val}/scene_SSSSSS_NNNNNN.txt and root/scenes.yaml                 yolo

``SSSSSS`` is 0 for train and 1 for val, ``NNNNNN`` the number of the scene. Images are stored once and linked.

In the Cityscapes layout background, disc, ring, triangle, frame, star and bar take the places of the first seven
Cityscapes classes (train ids 0..6: road, sidewalk, building, wall, fence, pole, traffic light), so that
MMSegmentation's ``CityscapesDataset`` and the cityscapesscripts evaluation read the files as they are.
None of the seven has instances in Cityscapes, hence the instance id image equals the label id image.
COCO category ids are 1..6, YOLO class indices 0..5.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from kd_dense.data.coco_file import annotation_of, write_coco
from kd_dense.data.files import link_or_copy, write_atomically
from kd_dense.data.scene_drawing import CLASSES, SPLITS, draw_scene
from kd_dense.data.scene_labels import VOID, label_scene, outline_of, yolo_row

LAYOUTS = ('cityscapes', 'coco', 'yolo')
MANIFEST = 'scenes.json'
DATA_YAML = 'scenes.yaml'
# Raise this whenever the same options draw or label other scenes, so that old folders are made anew.
VERSION = 1

# Official Cityscapes label ids of train ids 0..6; everything else is 0, "unlabeled".
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19)
_TRAIN_ID_TO_ID = np.zeros(256, np.uint8)
_TRAIN_ID_TO_ID[: len(CITYSCAPES_IDS)] = CITYSCAPES_IDS
assert _TRAIN_ID_TO_ID[VOID] == 0

# Noise does not compress: a higher level costs time and saves nothing.
_IMAGE_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)
_LABEL_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 3)


def generate(
    root: str | Path,
    train: int = 400,
    val: int = 100,
    size: Sequence[int] = (128, 128),
    seed: int = 0,
    layouts: Iterable[str] = LAYOUTS,
    difficulty: float = 0.5,
    workers: int = 0,
    progress: bool = True,
) -> Path:
    """Write a dataset of scenes, unless a complete one with the same options is there already.

    Files of an earlier dataset in the same folder are replaced; other files in it are left alone.

    Args:
        root: folder of the dataset; new, empty, or one that this function made.
        train: number of training scenes.
        val: number of validation scenes.
        size: (H, W) in pixels, each at least 32.
        seed: at least 0; scene ``i`` of a split does not depend on ``train`` and ``val``.
        layouts: some of 'cityscapes', 'coco', 'yolo'.
        difficulty: 0..1, see :func:`kd_dense.data.scene_drawing.draw_scene`.
        workers: processes to draw with; 0 draws in this one. With workers, the calling script needs the usual
            ``if __name__ == '__main__'`` guard.
        progress: show a progress bar.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: an option is out of range or a layout unknown.
        FileExistsError: the folder holds something else.
    """
    root = Path(root).resolve()
    options = _check_options(train, val, size, seed, layouts, difficulty)
    _check_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        _check_folder(root)
        if _read_manifest(root) != {**options, 'complete': True}:
            # An interrupted run leaves this behind, so that the folder is known as ours.
            _write_manifest(root, {**options, 'complete': False})
            partial_root = root / '.partial'
            shutil.rmtree(partial_root, ignore_errors=True)
            _write_dataset(partial_root, options, workers, progress)
            _replace_entries(root, partial_root)
            _write_manifest(root, {**options, 'complete': True})
        if 'yolo' in options['layouts']:
            _write_data_yaml(root)  # every time: the folder may have been moved
    return root


def _check_options(
    train: int, val: int, size: Sequence[int], seed: int, layouts: Iterable[str], difficulty: float
) -> dict:
    layouts = {layouts} if isinstance(layouts, str) else set(layouts)
    if not layouts or not layouts <= set(LAYOUTS):
        raise ValueError(f'layouts must be some of {", ".join(LAYOUTS)}; got {sorted(layouts)}')
    if train < 0 or val < 0 or seed < 0:
        raise ValueError(f'train, val and seed must not be negative; got {train}, {val} and {seed}')
    if len(size) != 2 or min(size) < 32:
        raise ValueError(f'size must be a height and a width of at least 32 pixels each; got {tuple(size)}')
    if not 0 <= difficulty <= 1:
        raise ValueError(f'difficulty must be between 0 and 1; got {difficulty}')
    return {
        'version': VERSION,
        'train': int(train),
        'val': int(val),
        'size': [int(size[0]), int(size[1])],
        'seed': int(seed),
        'difficulty': float(difficulty),
        'layouts': [name for name in LAYOUTS if name in layouts],
        'classes': list(CLASSES),
    }


def _check_folder(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is a file: choose another folder for the scenes')
    if root.is_dir() and _read_manifest(root) is None and any(p.name != '.lock' for p in root.iterdir()):
        raise FileExistsError(f'{root} is not empty and holds no generated scenes: choose another folder or empty it')


def _read_manifest(root: Path) -> dict | None:
    """The manifest, or None when the folder has none of ours."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and 'complete' in manifest and 'layouts' in manifest else None


def _write_manifest(root: Path, manifest: dict) -> None:
    write_atomically(root / MANIFEST, json.dumps(manifest, indent=2) + '\n')


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time write; the operating system drops the lock when the process ends."""
    with open(root / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace_entries(root: Path, partial_root: Path) -> None:
    for name in ('leftImg8bit', 'gtFine', 'images', 'annotations', 'labels'):
        if (root / name).exists():
            shutil.rmtree(root / name)
        if (partial_root / name).exists():
            (partial_root / name).rename(root / name)
    (root / DATA_YAML).unlink(missing_ok=True)
    partial_root.rmdir()


def _write_dataset(root: Path, options: dict, workers: int, progress: bool) -> None:
    layouts = options['layouts']
    for split in SPLITS:
        folders = []
        if 'cityscapes' in layouts:
            folders += [f'leftImg8bit/{split}/scene', f'gtFine/{split}/scene']
        if 'coco' in layouts or 'yolo' in layouts:
            folders += [f'images/{split}']
        if 'coco' in layouts:
            folders += ['annotations']
        if 'yolo' in layouts:
            folders += [f'labels/{split}']
        for folder in folders:
            (root / folder).mkdir(parents=True, exist_ok=True)

    jobs = [(split, index) for split in SPLITS for index in range(options[split])]
    draw = partial(_write_scene, root, tuple(options['size']), options['seed'], options['difficulty'], tuple(layouts))
    bar = tqdm(total=len(jobs), desc='drawing scenes', unit='image', disable=not progress)
    records: dict[str, list[tuple[dict, list[dict]]]] = {split: [] for split in SPLITS}
    with bar, _mapper(workers) as run:
        for (split, _), record in zip(jobs, run(draw, jobs), strict=True):
            records[split].append(record)
            bar.update()
    if 'coco' in layouts:
        for split in SPLITS:
            categories = {number: name for number, name in enumerate(CLASSES) if number > 0}
            info = {'description': 'synthetic scenes', 'version': str(VERSION)}
            write_coco(root / 'annotations' / f'instances_{split}.json', records[split], categories, info)


@contextmanager
def _mapper(workers: int) -> Iterator:
    """An ordered ``map``, over processes when there are workers."""
    if workers <= 0:
        yield map
        return
    # A fresh interpreter, because a fork of a process with running threads (PyTorch, OpenCV) can hang.
    with ProcessPoolExecutor(workers, get_context('spawn'), cv2.setNumThreads, (1,)) as pool:
        yield partial(pool.map, chunksize=16)


def _write_scene(
    root: Path, size: tuple[int, int], seed: int, difficulty: float, layouts: tuple[str, ...], job: tuple[str, int]
) -> tuple[dict, list[dict]]:
    """Draw one scene and write its files; return its COCO image record and annotations (without ids)."""
    split, index = job
    name = f'scene_{SPLITS.index(split):06d}_{index:06d}'
    scene = draw_scene(size, seed, split, index, difficulty)
    label_map, objects = label_scene(scene)

    image_paths = []
    if 'coco' in layouts or 'yolo' in layouts:
        image_paths.append(root / 'images' / split / f'{name}.png')
    if 'cityscapes' in layouts:
        image_paths.append(root / 'leftImg8bit' / split / 'scene' / f'{name}_leftImg8bit.png')
    _write_png(image_paths[0], scene.image[..., ::-1], _IMAGE_PNG)
    for path in image_paths[1:]:
        link_or_copy(image_paths[0], path)

    if 'cityscapes' in layouts:
        prefix = root / 'gtFine' / split / 'scene' / f'{name}_gtFine_'
        _write_png(Path(f'{prefix}labelTrainIds.png'), label_map, _LABEL_PNG)
        _write_png(Path(f'{prefix}labelIds.png'), _TRAIN_ID_TO_ID[label_map], _LABEL_PNG)
        link_or_copy(Path(f'{prefix}labelIds.png'), Path(f'{prefix}instanceIds.png'))
    if 'yolo' in layouts:
        rows = [yolo_row(item.class_id - 1, outline_of(item.mask), size) for item in objects]
        (root / 'labels' / split / f'{name}.txt').write_text(''.join(row + '\n' for row in rows), encoding='utf-8')
    image = {'file_name': f'{name}.png', 'height': size[0], 'width': size[1]}
    return image, [annotation_of(item.mask, item.class_id) for item in objects] if 'coco' in layouts else []


def _write_png(path: Path, image: np.ndarray, options: tuple[int, int]) -> None:
    if not cv2.imwrite(str(path), image, options):
        raise OSError(f'could not write {path}: check the free space and the permissions')


def _write_data_yaml(root: Path) -> None:
    write_atomically(root / DATA_YAML, data_yaml(root, CLASSES[1:]))


def data_yaml(root: Path, names: Sequence[str]) -> str:
    """Text of an Ultralytics data file for ``images/{train,val}`` under ``root``, whose path is written absolute."""
    lines = [f'path: {json.dumps(str(Path(root).resolve()))}', 'train: images/train', 'val: images/val', 'names:']
    lines += [f'  {index}: {json.dumps(name)}' for index, name in enumerate(names)]
    return '\n'.join(lines) + '\n'
