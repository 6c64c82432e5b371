"""Boxes of things from semantic label maps, which do not say where one object ends and the next begins.

An object is a connected part (8 neighbours) of the pixels of one class. Objects of one class that touch in the image
therefore become one box, and an object that something in front of it divides, such as a pole, becomes several: no
converter can tell from a label map.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from kd_dense.data.coco_file import annotation_of, write_coco
from kd_dense.data.files import IMAGE_SUFFIXES

INFO = {'description': 'boxes of connected parts of label maps'}


def objects_of(labels: np.ndarray, value: int, min_side: int = 1, min_area: int = 1) -> Iterator[np.ndarray]:
    """The masks ``[H, W]`` (bool) of the objects of one class, in the order of their first pixels.

    Args:
        labels: ``[H, W]`` class of every pixel.
        value: the class.
        min_side: objects whose box has a shorter side are left out.
        min_area: objects of fewer pixels are left out.
    """
    count, parts, stats, _ = cv2.connectedComponentsWithStats((labels == value).astype(np.uint8), connectivity=8)
    sides = stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].min(1)
    for part in range(1, count):
        if sides[part] >= min_side and stats[part, cv2.CC_STAT_AREA] >= min_area:
            yield parts == part


def convert(
    images: str | Path,
    labels: str | Path,
    classes: dict[str, int],
    out: str | Path,
    min_side: int = 1,
    min_area: int = 1,
    with_masks: bool = False,
    progress: bool = True,
) -> tuple[int, dict[str, int]]:
    """Write a COCO file with the boxes of the objects in label maps; categories are 1, 2, ... in the order given.

    Args:
        images: folder of images, searched with its subfolders; file names in the COCO file are relative to it.
        labels: folder with a label map (``.png``, one channel) of the same name at the same place for every image.
        classes: value in the label maps by name.
        out: COCO file to write.
        min_side, min_area: see :func:`objects_of`.
        with_masks: add run-length masks.
        progress: show a progress bar.

    Returns:
        The number of images, and of the boxes of each class.

    Raises:
        ValueError: no images, two classes with one value, no object at all, or a label map of another size than its
            image.
        OSError: a file is missing or can not be decoded.
    """
    images, labels = Path(images), Path(labels)
    if len(set(classes.values())) < len(classes):
        raise ValueError(f'two classes have the same value in the label maps: {classes}')
    files = sorted(f for f in images.rglob('*') if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f'there are no images in {images}')

    def entries() -> Iterator[tuple[dict, list[dict]]]:
        for file in tqdm(files, desc='boxes', unit='image', disable=not progress):
            name = file.relative_to(images)
            label_map = _read(labels / name.with_suffix('.png'))
            image = cv2.imread(str(file), cv2.IMREAD_COLOR)
            if image is None:
                raise OSError(f'{file} is no image that can be decoded')
            if image.shape[:2] != label_map.shape:
                raise ValueError(f'{file} has (height, width) {image.shape[:2]}, its label map {label_map.shape}')
            found = [
                annotation_of(mask, category, with_mask=with_masks)
                for category, value in enumerate(classes.values(), start=1)
                for mask in objects_of(label_map, value, min_side, min_area)
            ]
            yield {'file_name': name.as_posix(), 'height': image.shape[0], 'width': image.shape[1]}, found

    content = list(entries())
    if not any(found for _, found in content):
        raise ValueError(f'{labels} has no object of {", ".join(classes)}: check their values and the smallest size')
    return write_coco(out, content, dict(enumerate(classes, start=1)), INFO)


def _read(path: Path) -> np.ndarray:
    """A label map ``[H, W]``; palette files keep their indices."""
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f'{path} not found: --labels must have a .png of the same name for every image')
    with Image.open(path) as image:
        label_map = np.array(image)
    if label_map.ndim != 2:
        raise ValueError(f'{path} has {label_map.shape[-1]} channels; a label map has one')
    return label_map
