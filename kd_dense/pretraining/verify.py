"""Before training from soft labels: are they those of these images and of this teacher?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from torch import Tensor
from torch.utils.data import DataLoader

from kd_dense.cache import fingerprint
from kd_dense.cache.dataset import WithOutputs
from kd_dense.cache.live import check_hooks
from kd_dense.cache.records import pack, unpack
from kd_dense.cache.store import StoredCache
from kd_dense.cache.verify import NOT_COMPARED, replayed_alike
from kd_dense.cache.views import ViewSampler
from kd_dense.errors import ConfigError
from kd_dense.pretraining.classifier import Classifier
from kd_dense.pretraining.source import LOGITS, ClassifierOutputs, fingerprint_of
from kd_dense.random_state import preserve_random_state

#: Largest accepted total variation distance: the share of the probability that may lie elsewhere. Room for another
#: device; on the same one it is what fp16 loses.
TOLERANCE = 0.02


def verify(cfg: Config, loader: DataLoader, count: int = 4) -> float | None:
    """Compare config, images and, where the teacher's file is at hand, what it says with the cache.

    Args:
        cfg: of the run.
        loader: of the training data.
        count: views of which images and probabilities are compared.

    Returns:
        The largest distance that was found, 0..1; ``None`` where the teacher's file is not there.

    Raises:
        ConfigError: one sentence about the first thing that is not as it was.
    """
    bank = loader.dataset
    if not isinstance(bank, WithOutputs) or not isinstance(
        getattr(loader.batch_sampler, 'sampler', loader.sampler), ViewSampler
    ):
        raise ConfigError(
            'train_dataloader: does not go through the views of teacher.cache; train with tools/train.py, or give the '
            'config to kd_dense.cache.use_cache before the runner gets it'
        )
    check_hooks(cfg)
    cache, options = bank.cache, cfg.model.teacher
    fingerprint.check(cache.manifest.fingerprint, fingerprint_of(cfg), cache.folder, bank.key)
    samples = replayed_alike(bank, count)
    if fingerprint.local_file(options.get('checkpoint')) is None:
        print_log(NOT_COMPARED, 'current')
        return None
    with preserve_random_state():  # a model draws its first weights
        teacher = ClassifierOutputs(Classifier(**options).to(get_device()))
    worst = max(_distance(teacher, sample, cache, where) for where, sample in samples.items())
    print_log(f'cached and live probabilities of the teacher differ by at most {worst:.2g} of the whole', 'current')
    return worst


def _distance(teacher: ClassifierOutputs, sample: Mapping, cache: StoredCache, where: tuple[int, int]) -> float:
    view, index = where
    top_k = cache.manifest.top_k
    live = pack(teacher([sample])[0], top_k)
    kept = cache.read(index, view).tensors
    p, q = (_probabilities(tensors, top_k) for tensors in (kept, live))
    found = float((p - q).abs().sum() / 2) if p.shape == q.shape else 1.0
    if not found <= TOLERANCE:
        raise ConfigError(
            f'teacher.cache: cached and live probabilities differ by {found:.1%} of the whole for view {view} of image '
            f'{index}, and {TOLERANCE:.0%} are accepted; write the cache again'
        )
    return found


def _probabilities(tensors: Mapping[str, Tensor], top_k: Mapping) -> Tensor:
    return torch.exp(unpack([tensors], {LOGITS: 1}, top_k)[LOGITS][0])
