"""COCO files of data sets in the layout of Pascal VOC: VOC 2007 and 2012, and Clipart1k, which has the same 20 classes.

Clipart1k: Inoue et al., "Cross-Domain Weakly-Supervised Object Detection through Progressive Domain Adaptation", CVPR
2018. Objects marked difficult become crowds: evaluation ignores them, and nothing is trained on them.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from kd_dense.data.coco_file import write_coco

CLASSES = (
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
)


def convert(
    root: str | Path, sets: Sequence[str], out: str | Path, progress: bool = True
) -> tuple[int, dict[str, int]]:
    """Write one COCO file of the images that ``<folder>/ImageSets/Main/<set>.txt`` list; categories are 1 to 20.

    The files of VOC count pixels from 1, and a box includes the last one: ``x = xmin - 1``, ``w = xmax - xmin + 1``.
    Boxes are cut off at the borders of the image, and what has no area there is left out. UNCONFIRMED: that those of
    Clipart1k count from 1 too.

    Args:
        root: folder of the data sets; file names in the COCO file are relative to it.
        sets: data set and image list, such as ``['VOC2007/trainval', 'VOC2012/trainval']``.
        out: COCO file to write.
        progress: show a progress bar.

    Returns:
        The number of images, and of the objects of each class that are not difficult.

    Raises:
        ValueError: a set is not of the form ``FOLDER/SET`` or lists no image, a file is no annotation of VOC, or a
            class is none of the 20.
        OSError: a file is missing or can not be decoded.
    """
    root = Path(root)
    names = [(folder, name) for one in sets for folder, name in _listed(root, one)]

    def records() -> Iterator[tuple[dict, list[dict]]]:
        for folder, name in tqdm(names, desc='converting', unit='image', disable=not progress):
            file = Path(folder) / 'JPEGImages' / f'{name}.jpg'
            try:
                with Image.open(root / file) as image:  # reads no more than the header
                    size = image.size
            except (UnidentifiedImageError, ImportError):  # where Ultralytics is imported, it looks for a plugin first
                raise OSError(f'{root / file} is no image that can be decoded') from None
            objects = list(_objects(root / folder / 'Annotations' / f'{name}.xml', size))
            yield {'file_name': file.as_posix(), 'height': size[1], 'width': size[0]}, objects

    return write_coco(out, records(), dict(enumerate(CLASSES, start=1)), {'description': ', '.join(sets)})


def _listed(root: Path, one: str) -> list[tuple[str, str]]:
    folder, _, split = one.rpartition('/')
    if not folder:
        raise ValueError(f'{one!r} is not of the form FOLDER/SET, such as VOC2007/trainval')
    path = root / folder / 'ImageSets' / 'Main' / f'{split}.txt'
    names = [line.split()[0] for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    if not names:
        raise ValueError(f'{path} lists no image')
    return [(folder, name) for name in names]


def _objects(path: Path, size: tuple[int, int]) -> Iterator[dict]:
    """Annotations of one XML file, of an image of ``size = (width, height)``."""
    try:
        elements = ElementTree.parse(path).getroot().findall('object')
        objects = [
            (
                element.findtext('name', ''),
                int(element.findtext('difficult', '0')),
                [float(element.findtext(f'bndbox/{side}')) for side in ('xmin', 'ymin', 'xmax', 'ymax')],
            )
            for element in elements
        ]
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is no annotation of VOC ({error})') from None
    for name, difficult, (left, top, right, bottom) in objects:
        if name not in CLASSES:
            raise ValueError(f'{path}: class {name!r} is none of the 20 of Pascal VOC')
        left, top = max(left - 1, 0), max(top - 1, 0)
        width, height = min(right, size[0]) - left, min(bottom, size[1]) - top
        if width > 0 and height > 0:
            yield {
                'category_id': CLASSES.index(name) + 1,
                'bbox': [left, top, width, height],
                'area': width * height,
                'iscrowd': int(difficult),
            }
