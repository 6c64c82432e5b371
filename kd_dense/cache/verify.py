"""Before training from a cache: is it the right one, and does it say what the teacher would say?"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from mmengine.logging import print_log
from torch.utils.data import DataLoader

from kd_dense.cache import fingerprint
from kd_dense.cache.acceptance import TOLERANCE_IN_TRAINING, accepted, check_readers
from kd_dense.cache.dataset import CachedTeacherDataset, WithOutputs
from kd_dense.cache.live import DistillationOutputs, LiveOutputs, check_hooks, crc_of_image, difference
from kd_dense.cache.records import pack, probabilities, unpack
from kd_dense.cache.store import StoredCache
from kd_dense.cache.views import ViewSampler
from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.models.distillation import Distillation, check_teacher
from kd_dense.random_state import preserve_random_state

#: Largest accepted distance of cached and live outputs, as a share of their length: room for another device, or a
#: teacher in reduced precision. On the same device they are equal up to the last digit of fp16.
TOLERANCE = 0.02
NOT_COMPARED = 'teacher.checkpoint is not there, so its outputs are not compared with those of the cache'


def verify(cfg: Mapping, model: Distillation, loader: DataLoader, count: int = 4) -> Distillation | None:
    """Compare config, images and, where the teacher's file is at hand, its outputs with those of the cache.

    Args:
        cfg: of the run.
        model: the student with its cached teacher.
        loader: of the training data.
        count: views of which images and outputs are compared.

    Returns:
        The same distillation with the live teacher, for whoever wants to score it; let go of it soon. ``None`` where
        its file is not there.

    Raises:
        ConfigError: one sentence about the first thing that is not as it was.
    """
    dataset = loader.dataset
    if not isinstance(dataset, CachedTeacherDataset) or not dataset.outputs:
        raise ConfigError(
            'train_dataloader.dataset: does not bring the outputs of teacher.cache along; train with tools/train.py, '
            'or give the config to kd_dense.cache.use_cache before the runner gets it'
        )
    if not isinstance(getattr(loader.batch_sampler, 'sampler', loader.sampler), ViewSampler):
        raise ConfigError(
            "train_dataloader.sampler: must be dict(type='kd_dense.ViewSampler', sampler=...), or only the first view "
            'of each sample would be seen'
        )
    check_hooks(cfg)
    cache = model.teacher.cache
    check_readers(model.distillers, cache.manifest.top_k, 'teacher.cache')
    fingerprint.check(cache.manifest.fingerprint, fingerprint.fingerprint(cfg), cache.folder, dataset.key)
    samples = replayed_alike(dataset, count)
    options = check_teacher(cfg['model']['teacher'])
    if fingerprint.local_file(options.get('checkpoint')) is None:
        print_log(NOT_COMPARED, 'current')
        return None
    with preserve_random_state():
        live = Distillation(model.student, dict(options, cache=None), cfg['model']['distillers'])
    live.to(next(model.student.parameters()).device)
    for sentence in compared(DistillationOutputs(live), live.distillers, samples, cache):
        print_log(sentence, 'current')
    return live


def replayed_alike(bank: WithOutputs, count: int = 4) -> dict[tuple[int, int], dict]:
    """``(view, index)`` -> sample, for a few views of a cache.

    Args:
        bank: of the views, with its cache.

    Raises:
        ConfigError: the first image that does not come out as it did.
    """
    cache = bank.cache
    numbers = random.Random(0).sample(range(cache.manifest.records), min(count, cache.manifest.records))
    samples = {}
    for view, index in (divmod(number, cache.manifest.samples) for number in numbers):
        samples[view, index] = bank.replay(index, view)
        if crc_of_image(bank.image(samples[view, index])) != cache.read(index, view).image:
            raise ConfigError(
                f'{bank.key}: view {view} of image {index} does not come out as when {cache.folder} was '
                'written, because the image or a library changed; put it back, or write the cache again'
            )
    return samples


def compared(
    teacher: LiveOutputs, distillers: Distillers, samples: Mapping[tuple[int, int], dict], cache: StoredCache
) -> list[str]:
    """Sentences: how far the outputs of the live teacher are from those that were kept, and what it changes that only
    a part of them was.

    Args:
        distillers: set up with the live teacher.
        samples: see :func:`replayed_alike`.

    Raises:
        ConfigError: further than :data:`TOLERANCE`, or more than is accepted, see :mod:`kd_dense.cache.acceptance`.
    """
    manifest = cache.manifest
    worst = 0.0
    with torch.no_grad():
        for (view, index), sample in samples.items():
            outputs = teacher([sample])[0]
            # a config with fewer distillers may read a cache of more taps
            cached = unpack([cache.read(index, view).tensors], manifest.taps, manifest.top_k)
            taps = {name: len(tensors) for name, tensors in outputs.items()}
            top_k = {n: k for n, k in manifest.top_k.items() if n in taps}
            now = unpack([pack(outputs, manifest.top_k, manifest.store)], taps, top_k)
            for name, tensors in now.items():
                pairs = list(zip(cached[name], tensors, strict=True))
                if name in manifest.top_k:
                    pairs = [tuple(probabilities(x, name, manifest.top_k) for x in pair) for pair in pairs]
                found = max(difference(a, b) for a, b in pairs)
                if not found <= TOLERANCE:
                    raise ConfigError(
                        f'teacher.cache: at the tap {name!r} cached and live outputs differ by {found:.1%} for view '
                        f'{view} of image {index}, and {TOLERANCE:.0%} are accepted; write the cache again'
                    )
                worst = max(worst, found)
    key = f'teacher.cache: what {cache.folder} keeps of the class logits'
    return [
        f'cached and live outputs of the teacher differ by at most {worst:.2g} of their length',
        *accepted(distillers, teacher, list(samples.values()), manifest.top_k, key, TOLERANCE_IN_TRAINING),
    ]
