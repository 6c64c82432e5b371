"""Names and colours of the classes in segmentation pictures, for a legend."""

from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

MOST_CLASSES = 40  # a longer legend is not read


def class_colours(cfg: Config) -> dict[str, tuple[int, int, int]]:
    """Class name -> RGB of the config's validation data set; empty where pictures carry the names (boxes)."""
    dataset: Any = (cfg.get('val_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:  # a wrapper, such as a repeated data set
        dataset = dataset['dataset']
    if cfg.get('default_scope') != 'mmseg' or 'type' not in dataset:
        return {}
    with DATASETS.switch_scope_and_registry('mmseg') as registry:
        kind = registry.get(dataset['type']) if isinstance(dataset['type'], str) else dataset['type']
    meta = {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    classes, palette = meta.get('classes') or (), meta.get('palette') or ()
    if len(classes) != len(palette) or len(classes) > MOST_CLASSES:
        return {}
    return {name: tuple(colour) for name, colour in zip(classes, palette)}
