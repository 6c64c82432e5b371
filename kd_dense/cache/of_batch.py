"""A cache of one batch, to measure what it costs to train from a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kd_dense.cache.records import pack
from kd_dense.cache.store import Manifest, Record, StoredCache, shard_path, write_shard
from kd_dense.cache.teacher import write_description
from kd_dense.description import ROI_TAPS
from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError


def write_batch(folder: Path, distillers: Distillers, values: Mapping[str, Sequence[Tensor]], count: int) -> None:
    """Write a complete cache with one view of each image, which can be read but not trained from.

    Args:
        distillers: set up with the live teacher.
        values: tap name -> tensors of the teacher for the batch.
        count: images of the batch.

    Raises:
        ConfigError: tensors that do not belong to one image each.
    """
    for name, tensors in values.items():
        if name.split(':')[0] in ROI_TAPS or any(t.dim() == 0 or t.shape[0] != count for t in tensors):
            raise ConfigError(
                f'--against cached: the tap {name!r} of the teacher can not be cached, because its tensors do not '
                'belong to one image each; leave it out'
            )
    dry, canvas = distillers.dry_forward('teacher')
    shapes = {name: [t.shape for t in tensors] for name, tensors in dry.items()}
    teacher = write_description(distillers.description('teacher'), None, shapes, canvas)
    taps = {name: len(tensors) for name, tensors in values.items()}
    manifest = Manifest(count, 1, 0, count, taps, {}, {}, teacher)
    outputs = [{name: [t[i] for t in tensors] for name, tensors in values.items()} for i in range(count)]
    write_shard(folder, manifest, 0, {i: Record(0, 0, pack(one, {})) for i, one in enumerate(outputs)})
    replace(manifest, complete=True, shard_bytes=(shard_path(folder, 0).stat().st_size,)).save(folder)


def read_batch(cache: StoredCache, device: torch.device) -> list[dict[str, Tensor]]:
    """What is kept of each image of the batch, on ``device``; checked as in training."""
    records = (cache.read(index, 0).tensors for index in range(cache.manifest.samples))
    return [{key: tensor.to(device, non_blocking=True) for key, tensor in record.items()} for record in records]
