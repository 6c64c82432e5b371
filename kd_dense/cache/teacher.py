"""A teacher that is not there: what it gave is read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from kd_dense.cache.records import unpack
from kd_dense.cache.store import StoredCache
from kd_dense.description import Boxes, Description, Logits, Queries
from kd_dense.errors import ConfigError
from kd_dense.teacher import Normalization

#: Field of a data sample that holds what the cache has of it.
FIELD = 'teacher_outputs'
_NO_ROIS = (
    'a cached teacher has no RoI head that could look at the regions of a student; remove teacher.cache, or distil '
    'features with PKD'
)


class CachedTeacher:
    """Stands in the place of a :class:`~kd_dense.teacher.Teacher`.

    Args:
        cache: of its outputs.
    """

    model = None
    remap = None

    def __init__(self, cache: StoredCache) -> None:
        self.cache = cache

    def description(self) -> Description:
        """The teacher as the distillers' setup is to know it."""
        return read_description(self.cache)

    @property
    def meta(self) -> dict:
        """The ``meta`` of its checkpoint, as far as it is needed."""
        return {'dataset_meta': {'classes': self.cache.manifest.teacher['classes']}}

    @torch.compiler.disable
    def __call__(self, data_samples: Iterable[Any], names: Iterable[str]) -> dict[str, list[Tensor]]:
        """Tap name -> tensors of a batch.

        Args:
            data_samples: of :class:`~kd_dense.cache.dataset.CachedTeacherDataset`, on the model's device.
            names: of the taps.

        Raises:
            ConfigError: they come from another data set.
        """
        found = [sample.get(FIELD) for sample in data_samples]
        if any(element is None for element in found):
            raise ConfigError(
                'train_dataloader: its samples bring nothing of teacher.cache along; train with tools/train.py, or '
                'give the config to kd_dense.cache.use_cache before the runner gets it'
            )
        return self.outputs([dict(element.items()) for element in found], names)

    @torch.compiler.disable
    def outputs(self, records: Sequence[Mapping[str, Tensor]], names: Iterable[str]) -> dict[str, list[Tensor]]:
        """Tap name -> tensors of a batch.

        Args:
            records: what the cache keeps of each image, on the model's device.
            names: of the taps.
        """
        manifest, wanted = self.cache.manifest, set(names)
        outputs = unpack(records, manifest.taps, manifest.top_k)
        return {name: tensors for name, tensors in outputs.items() if name in wanted}

    def follow(self, function: Callable[[Tensor], Tensor]) -> None:
        """There is nothing to move."""

    def __repr__(self) -> str:
        return f'teacher outputs from {self.cache.folder}'


def as_field(tensors: Mapping[str, Tensor]) -> BaseDataElement:
    """Tensors of a record, so that a data sample takes them along to the model's device."""
    return BaseDataElement(**tensors)


def write_description(
    description: Description, classes: Iterable[str] | None, shapes: Mapping[str, list], canvas: tuple[int, int]
) -> dict[str, Any]:
    """What :func:`read_description` needs, as plain data.

    Args:
        classes: of the teacher, where its file names them.
        shapes: tap name -> shapes of the tensors of the dry forward.
        canvas: of the dry forward.
    """
    facts = {name: getattr(description, name) for name in _CLASSES}
    return {
        'classes': list(classes) if classes is not None else None,
        'shapes': {name: [list(shape) for shape in tensors] for name, tensors in shapes.items()},
        'canvas': list(canvas),
        'absent': dict(description.absent),
        **{name: fact if fact is None or isinstance(fact, str) else asdict(fact) for name, fact in facts.items()},
    }


def read_description(cache: StoredCache) -> Description:
    """A teacher without a model, of which a dry forward gives the shapes that are stored."""
    facts = cache.manifest.teacher
    canvas = (int(facts['canvas'][0]), int(facts['canvas'][1]))

    def recorded(names: list[str]) -> tuple[dict[str, list[Tensor]], tuple[int, int]]:
        for name in names:
            if name not in facts['shapes']:
                raise ConfigError(
                    f'teacher.cache: {cache.folder} has nothing of the tap {name!r}, only of '
                    f'{", ".join(facts["shapes"])}; write it again with the distillers of this config'
                )
        # of the meta device: only the shapes are looked at
        return {n: [torch.empty(shape, device='meta') for shape in facts['shapes'][n]] for n in names}, canvas

    return Description(
        nn.Identity(),
        lambda: canvas,
        absent=facts['absent'],
        rois=_NO_ROIS,
        recorded=recorded,
        **{name: _rebuilt(kind, facts[name]) for name, kind in _CLASSES.items()},
    )


#: Field of a description -> class of its value, where it is no sentence.
_CLASSES = {'logits': Logits, 'normalization': Normalization, 'queries': Queries, 'boxes': Boxes}


def _rebuilt(kind: type, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    return kind(**{key: _tuples(inner) for key, inner in value.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
