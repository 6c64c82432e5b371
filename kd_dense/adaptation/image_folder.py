"""A data set of the images in a folder, without labels."""

from __future__ import annotations

from typing import Any

from mmengine.dataset import BaseDataset

from kd_dense.adaptation.transforms import image_files
from kd_dense.registry import DATASETS


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """The images of a target domain of which no annotation file exists, for any toolbox.

    ``data_prefix=dict(img_path='leftImg8bit_foggy/train')``, a folder that is searched with its subfolders. A pipeline
    on it loads no annotations.

    Args:
        suffix: only files whose names end in this; Foggy Cityscapes has three densities of fog in one folder.
        arguments: those of MMEngine's ``BaseDataset``.

    Raises:
        ConfigError: there is no such folder, or no image in it.
    """

    def __init__(self, suffix: str = '', **arguments: Any) -> None:
        self.suffix = suffix
        super().__init__(**arguments)

    def load_data_list(self) -> list[dict]:
        """Path and number of each image."""
        files = image_files(self.data_prefix['img_path'], 'ImageFolder.data_prefix.img_path', self.suffix)
        return [dict(img_path=str(file), img_id=i) for i, file in enumerate(files)]
