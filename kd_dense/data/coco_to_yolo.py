"""Turn a COCO detection or instance file into the folder layout that Ultralytics reads."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

from kd_dense.data.files import link_or_copy, write_atomically
from kd_dense.data.scene_labels import outline_of, yolo_row
from kd_dense.data.scenes import data_yaml

DATA_YAML = 'data.yaml'


def convert(images: str | Path, json_file: str | Path, out: str | Path, split: str, progress: bool = True) -> Path:
    """Write ``out/images/<split>``, ``out/labels/<split>`` and ``out/data.yaml``; the source is only read.

    Images are hard links where possible, else symbolic links, else copies. Category ids, in ascending order, become
    class indices from 0. Crowd annotations and empty boxes are left out. When an annotation of the file has a mask,
    all rows are polygons (Ultralytics does not accept a mixture; its detection task takes boxes from polygons), and
    an annotation without a mask becomes the rectangle of its box.

    Args:
        images: folder that the file names in the COCO file are relative to.
        json_file: COCO file.
        out: folder to write to; call once per split.
        split: 'train' or 'val'.
        progress: show a progress bar.

    Returns:
        Path of the data file.

    Raises:
        FileNotFoundError: an image or the COCO file is missing.
        ValueError: unknown split, two images with the same name, or other classes than the split converted before.
    """
    if split not in ('train', 'val'):
        raise ValueError(f"split must be 'train' or 'val'; got {split!r}")
    images, out = Path(images), Path(out).resolve()
    if not Path(json_file).is_file():
        raise FileNotFoundError(f'{json_file} not found: give the path of a COCO annotation file')
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco = COCO(str(json_file))
    category_ids = sorted(coco.getCatIds())
    class_index = {category_id: index for index, category_id in enumerate(category_ids)}
    names = [category['name'] for category in coco.loadCats(category_ids)]
    text = data_yaml(out, names)
    if (out / DATA_YAML).exists() and (out / DATA_YAML).read_text(encoding='utf-8') != text:
        raise ValueError(f'{out / DATA_YAML} lists other classes or another folder: choose a new --out or delete it')

    use_polygons = any(a.get('segmentation') for a in coco.anns.values() if not a.get('iscrowd'))
    for folder in ('images', 'labels'):
        (out / folder / split).mkdir(parents=True, exist_ok=True)
    (out / 'labels' / f'{split}.cache').unlink(missing_ok=True)  # Ultralytics' summary of an earlier conversion
    seen: set[str] = set()
    for image in tqdm(coco.loadImgs(coco.getImgIds()), desc=f'converting {split}', disable=not progress):
        source = images / image['file_name']
        if not source.is_file():
            raise FileNotFoundError(f'{source} not found: --images must be the folder that {json_file} refers to')
        if source.stem in seen:
            raise ValueError(f'{json_file} has two images named {source.stem}: label files would overwrite each other')
        seen.add(source.stem)
        link_or_copy(source, out / 'images' / split / source.name)

        rows = []
        for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
            row = _row(coco, annotation, class_index[annotation['category_id']], image, use_polygons)
            if row is not None and row not in rows:
                rows.append(row)
        label_file = out / 'labels' / split / f'{source.stem}.txt'
        label_file.write_text(''.join(f'{row}\n' for row in rows), encoding='utf-8')
    write_atomically(out / DATA_YAML, text)
    return out / DATA_YAML


def _row(coco: COCO, annotation: dict, index: int, image: dict, use_polygons: bool) -> str | None:
    """The label row of one annotation, or None when it is a crowd or has no area inside the image."""
    width, height = image['width'], image['height']
    x, y, w, h = annotation['bbox']
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if annotation.get('iscrowd') or right <= left or bottom <= top:
        return None
    if not use_polygons:
        centre = np.array([[(left + right) / 2, (top + bottom) / 2], [right - left, bottom - top]])
        return yolo_row(index, centre, (height, width))
    segmentation = annotation.get('segmentation')
    if isinstance(segmentation, list) and len(segmentation) == 1 and len(segmentation[0]) >= 6:
        polygon = np.reshape(segmentation[0], (-1, 2))
    elif segmentation and (mask := coco.annToMask(annotation)).any():
        polygon = outline_of(mask)
    else:
        polygon = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return yolo_row(index, polygon, (height, width))
