"""What is particular in writing the soft labels of a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kd_dense.cache.records import pack
from kd_dense.cache.store import Manifest, Record
from kd_dense.cache.views import view_seed
from kd_dense.cache.write import Writer
from kd_dense.errors import ConfigError
from kd_dense.pretraining.source import LOGITS

#: Classes kept of each view, as in the paper's code.
TOP_K = 100
#: Records of a shard at most. They wait in memory until all of them are there, and weigh more than on the disk.
SHARD_RECORDS = 1 << 16


class LabelWriter(Writer):
    """Writes the ``K`` largest probabilities of each view: rows of ``K`` fp16 and ``K`` integers of one or two bytes.

    Without ``--top-k``, ``K`` is 100, or the number of classes where there are fewer.
    """

    shard_records = SHARD_RECORDS
    rows = True

    def _kept_classes(self) -> dict[str, tuple[int, int]]:
        sample = self.bank.replay(0, 0)
        self.live([sample])  # tells how many classes there are
        classes, k = self.live.classifier.num_classes, self.options.top_k
        if self.options.store != 'fp16':
            raise ConfigError('--store: the probabilities of a classifier are kept in fp16; leave it out')
        if self.options.anchors is not None:
            raise ConfigError('--anchors: is for detectors, and the teacher is a classifier; leave it out')
        k = min(TOP_K, classes) if k is None else k
        if not 1 <= k <= classes:
            raise ConfigError(f'--top-k: must be from 1 to the {classes} classes of the teacher, not {k}')
        return {LOGITS: (k, classes)}

    def _pack(self, batch: list[tuple[int, int, dict]]) -> dict[int, Record]:
        """As the base class, for the whole batch at once."""
        classifier = self.live.classifier
        logits = classifier(classifier.prepared(self.live.images([sample for _, _, sample in batch])))
        packed = pack({LOGITS: [logits.T]}, self.top_k)  # [K, B] each
        records = {}
        for i, (number, image, _) in enumerate(batch):
            view, index = divmod(number, len(self.bank))
            tensors = {name: tensor[:, i].contiguous() for name, tensor in packed.items()}
            records[number] = Record(view_seed(self.bank.seed, index, view), image, tensors)
        return records

    def _about_teacher(self, classes: Iterable[str] | None) -> tuple[dict[str, int], dict[str, Any]]:
        return {LOGITS: 1}, {'name': self.live.classifier.name}


def labels_of(manifest: Manifest) -> tuple[int, int] | None:
    """Classes kept, and all classes, of a cache that a :class:`LabelWriter` wrote; ``None`` for another one."""
    return tuple(manifest.top_k[LOGITS]) if manifest.rows and LOGITS in manifest.top_k else None
