"""MMSegmentation datasets: ``type='kd_dense.SceneDataset'`` and ``type='kd_dense.CamVidDataset'``.

Detection needs none of its own: MMDetection's ``CocoDataset`` reads the generated scenes and other COCO files with
``metainfo=dict(classes=...)``; the names of the generated classes are ``kd_dense.data.scene_drawing.CLASSES[1:]``.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmseg.datasets import BaseSegDataset

from kd_dense.data.scene_drawing import CLASSES
from kd_dense.registry import DATASETS


@DATASETS.register_module()
class SceneDataset(BaseSegDataset):
    """Generated scenes: background and six classes, 255 = void, files named as in Cityscapes.

    ``data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')``.
    """

    METAINFO = {
        'classes': CLASSES,
        'palette': [
            [60, 60, 60],
            [230, 60, 60],
            [60, 200, 60],
            [70, 110, 250],
            [250, 210, 50],
            [220, 80, 230],
            [60, 220, 220],
        ],
    }

    def __init__(
        self, img_suffix: str = '_leftImg8bit.png', seg_map_suffix: str = '_gtFine_labelTrainIds.png', **kwargs
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid road scenes, 11 classes and void (Brostow et al., 2008; split and labels of the SegNet tutorial).

    The files mark void as 11. It becomes 255 when a label map is loaded, the index that MMSegmentation's losses and
    metrics ignore, so that nothing else needs a setting.

    ``data_prefix=dict(img_path='images/train', seg_map_path='labels/train')``; pass ``img_suffix='.png'`` for
    the original images.
    """

    VOID = 11
    METAINFO = {
        'classes': (
            'sky',
            'building',
            'pole',
            'road',
            'pavement',
            'tree',
            'sign-symbol',
            'fence',
            'car',
            'pedestrian',
            'bicyclist',
        ),
        'palette': [
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    }

    @classmethod
    def get_label_map(cls, new_classes: Sequence[str] | None = None) -> dict[int, int]:
        """Old label -> new label for labels that change; always includes void (11 -> 255)."""
        return {**(super().get_label_map(new_classes) or {}), cls.VOID: 255}
