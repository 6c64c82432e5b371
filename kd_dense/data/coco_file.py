"""COCO detection files: what the converters have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from kd_dense.data.files import write_atomically
from kd_dense.data.scene_labels import box_of


def annotation_of(mask: np.ndarray, category: int, crowd: bool = False, with_mask: bool = True) -> dict:
    """Annotation of the pixels of a mask ``[H, W]`` (bool, non-empty): box ``(x, y, width, height)`` and area, and the
    mask itself, run-length encoded, ``with_mask``.
    """
    annotation = {
        'category_id': category,
        'bbox': list(box_of(mask)),
        'area': int(mask.sum()),
        'iscrowd': int(crowd),
    }
    if with_mask:
        encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        annotation['segmentation'] = {'size': list(encoded['size']), 'counts': encoded['counts'].decode()}
    return annotation


def write_coco(
    path: str | Path, records: Iterable[tuple[dict, list[dict]]], categories: dict[int, str], info: dict[str, str]
) -> tuple[int, dict[str, int]]:
    """Write a COCO file; ids start at 1, because pycocotools takes a match with annotation 0 for no match.

    Args:
        path: file to write, with its folder where that is missing.
        records: for each image its entry (``file_name``, ``height``, ``width``) and its annotations, both without ids.
        categories: names by id.
        info: what is in it: ``description``, ``version``.

    Returns:
        The number of images, and of the annotations of each class that are no crowds.
    """
    images, annotations = [], []
    counts = dict.fromkeys(categories.values(), 0)
    for image, items in records:
        images.append(dict(id=len(images) + 1, **image))
        for item in items:
            annotations.append(dict(id=len(annotations) + 1, image_id=len(images), **item))
            counts[categories[item['category_id']]] += not item['iscrowd']
    content = {
        'info': info,
        'images': images,
        'annotations': annotations,
        'categories': [{'id': number, 'name': name} for number, name in categories.items()],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content))
    return len(images), counts
