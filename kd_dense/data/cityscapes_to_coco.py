"""COCO files of Cityscapes and of Foggy Cityscapes, which has the images of the former in fog and shares its labels.

Foggy Cityscapes: Sakaridis et al., "Semantic Foggy Scene Understanding with Synthetic Data", IJCV 2018. The eight
classes with instances keep their ids (24 person, 25 rider, 26 car, 27 truck, 28 bus, 31 train, 32 motorcycle,
33 bicycle); in this order they are those of MMDetection's ``CityscapesDataset``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from kd_dense.data.coco_file import annotation_of, write_coco

#: Densities of the fog that are published, as the file names have them; 0.02 is the thickest and the usual target.
BETAS = ('0.005', '0.01', '0.02')


def image_suffix(beta: str | None = None) -> str:
    """What image files end in: ``img_suffix`` of MMSegmentation's ``CityscapesDataset``."""
    return '_leftImg8bit.png' if beta is None else f'_leftImg8bit_foggy_beta_{beta}.png'


def default_file(root: str | Path, split: str, beta: str | None = None) -> Path:
    """Where MMDetection's configs look for the clear images, and the place that we chose for those in fog."""
    name = f'instancesonly_filtered_gtFine_{split}.json' if beta is None else f'foggy_{split}.json'
    return Path(root) / 'annotations' / name


def convert(
    root: str | Path,
    split: str,
    beta: str | None = None,
    out: str | Path | None = None,
    with_masks: bool = False,
    progress: bool = True,
) -> tuple[int, dict[str, int]]:
    """Write the COCO file of one split, from ``gtFine/<split>/<city>/*_gtFine_instanceIds.png``.

    File names are ``<city>/<image>``, relative to ``leftImg8bit/<split>``, in fog to ``leftImg8bit_foggy/<split>``. All
    images are listed, also those without objects. Groups that Cityscapes does not divide are crowds.

    Args:
        root: the Cityscapes folder.
        split: 'train' or 'val'.
        beta: density of the fog, one of :data:`BETAS`; ``None``: the clear images.
        out: file to write; ``None``: :func:`default_file`.
        with_masks: add run-length masks.
        progress: show a progress bar.

    Returns:
        The number of images, and of the objects of each class that are no crowds.

    Raises:
        ValueError: unknown ``beta``.
        OSError: there are no images, or an instance map is missing, no instance map or can not be decoded.
    """
    from cityscapesscripts.helpers.labels import labels

    if beta is not None and beta not in BETAS:
        raise ValueError(f'unknown beta {beta}; Foggy Cityscapes has {", ".join(BETAS)}')
    root, suffix = Path(root), image_suffix(beta)
    images = root / ('leftImg8bit' if beta is None else 'leftImg8bit_foggy') / split
    files = sorted(images.glob(f'*/*{suffix}'))
    if not files:
        raise FileNotFoundError(f'there are no images {images}/CITY/*{suffix}')
    categories = {label.id: label.name for label in labels if label.hasInstances and not label.ignoreInEval}

    def records() -> Iterator[tuple[dict, list[dict]]]:
        for file in tqdm(files, desc=split, unit='image', disable=not progress):
            city, name = file.parent.name, file.name.removesuffix(suffix)
            instances = _read(root / 'gtFine' / split / city / f'{name}_gtFine_instanceIds.png')
            height, width = instances.shape
            image = {'file_name': f'{city}/{file.name}', 'height': height, 'width': width}
            yield image, list(_objects(instances, categories, with_masks))

    kind = 'Cityscapes' if beta is None else f'Foggy Cityscapes, beta {beta}'
    return write_coco(
        out or default_file(root, split, beta), records(), categories, {'description': f'{kind}, {split}'}
    )


def _objects(instances: np.ndarray, categories: dict[int, str], with_masks: bool) -> Iterator[dict]:
    """The value of an object is 1000 times its class and a number, that of a group the class alone."""
    for value in np.unique(instances[instances >= min(categories)]).tolist():
        crowd = value < 1000
        category = value if crowd else value // 1000
        if category in categories:
            yield annotation_of(instances == value, category, crowd, with_masks)


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f'{path} not found: it is part of the package gtFine_trainvaltest of Cityscapes')
    instances = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if instances is None or instances.ndim != 2:
        raise OSError(f'{path} is no map of instances: an image of one channel is expected')
    return instances
