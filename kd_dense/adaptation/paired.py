"""A data set of pairs: one sample of the source domain, one of the target domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from kd_dense.errors import ConfigError
from kd_dense.registry import DATASETS

#: Views of each domain, named by who looks at them.
VIEWS = {'source': ('source', 'styled'), 'target': ('target', 'teacher')}


@DATASETS.register_module()
class PairedDataset:
    """Every sample of the source domain with every one of the target domain.

    It is as long as the product of both. A shuffled, endless sampler (``InfiniteSampler``) therefore draws either
    domain evenly, however different their sizes are, and which pair comes when follows from the sampler's seed alone.

    Args:
        source: config of the labelled data set. Its pipeline gives views, see :class:`~kd_dense.adaptation.Views`.
        target: config of the data set of the target domain, likewise; it needs no labels.

    Raises:
        ConfigError: a domain without images, a target that is filtered by its labels, classes that differ, or views of
            one name in both.
    """

    def __init__(self, source: Mapping, target: Mapping) -> None:
        if (target.get('filter_cfg') or {}).get('filter_empty_gt'):
            raise ConfigError(
                'train_dataloader.dataset.target.filter_cfg: filter_empty_gt=True leaves out images by labels that the '
                'target does not have; set it to False'
            )
        self.datasets = [_build(source, 'source'), _build(target, 'target')]
        classes, others = (getattr(d, 'metainfo', {}).get('classes') for d in self.datasets)
        if others is not None and list(classes or ()) != list(others):
            raise ConfigError(
                f'train_dataloader.dataset.target: has the classes {_list(others)} and the source {_list(classes)}; '
                'give both domains the same classes in the same order (metainfo), or the target none'
            )

    @property
    def metainfo(self) -> dict:
        """That of the source domain."""
        return self.datasets[0].metainfo

    def __len__(self) -> int:
        return len(self.datasets[0]) * len(self.datasets[1])

    def get_data_info(self, index: int) -> dict:
        """That of the source image, for samplers that group images by their shape."""
        return self.datasets[0].get_data_info(index // len(self.datasets[1]))

    def __getitem__(self, index: int) -> dict:
        """``inputs`` and ``data_samples``, each a dict with the names of the views of both domains."""
        both = [self._views(side, i) for side, i in enumerate(divmod(index, len(self.datasets[1])))]
        return {key: {**both[0][key], **both[1][key]} for key in ('inputs', 'data_samples')}

    def _views(self, side: int, index: int) -> dict[str, Any]:
        name = ('source', 'target')[side]
        sample = self.datasets[side][index]
        if not isinstance(sample.get('inputs'), Mapping):
            raise ConfigError(
                f"train_dataloader.dataset.{name}.pipeline: must be one dict(type='kd_dense.Views', shared=[...], "
                'views=dict(...)), so that each view has a name'
            )
        wrong = [view for view in sample['inputs'] if view not in VIEWS[name]]
        if wrong:
            raise ConfigError(
                f'train_dataloader.dataset.{name}.pipeline: the view {wrong[0]!r} is none of the {name} domain; it has '
                f'{" and ".join(map(repr, VIEWS[name]))}'
            )
        return sample


def train_on_source(cfg: Config) -> None:
    """Replace the :class:`PairedDataset` of a config by its source domain, with the view ``source`` as its pipeline."""
    dataset = cfg.train_dataloader.dataset
    if str(dataset.get('type', '')).rpartition('.')[2] != 'PairedDataset':
        return
    source = dataset.source
    views = [t for t in source.get('pipeline', ()) if str(t.get('type', '')).rpartition('.')[2] == 'Views']
    if len(views) == 1 and len(source.pipeline) == 1:
        source.pipeline = [*views[0].shared, *views[0].views['source']]
    cfg.train_dataloader.dataset = source


def _build(cfg: Mapping, name: str) -> Any:
    try:
        dataset = DATASETS.build(dict(cfg))
        empty = len(dataset) == 0
    except ValueError as error:  # MMEngine packs the entries into an array, and fails where there are none
        if str(error) != 'need at least one array to concatenate':
            raise
        empty = True
    if empty:
        places = [cfg.get('data_root'), *(cfg.get('data_prefix') or {}).values()]
        where = ', '.join(str(place) for place in places if place) or 'its folders'
        raise ConfigError(
            f'train_dataloader.dataset.{name}: {cfg.get("type")} has no images; check {where} and the file name endings'
        )
    return dataset


def _list(classes: Any) -> str:
    names = list(classes or ())
    return ', '.join(map(str, names[:4])) + (', ...' if len(names) > 4 else '') if names else 'none'
