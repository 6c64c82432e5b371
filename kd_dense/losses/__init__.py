"""Losses: tensors in, scalar out. They know nothing of models; reductions are in fp32."""

from kd_dense.losses.divergence import bernoulli_kl, channel_kl, class_kl
from kd_dense.losses.feature import cosine, l1, mse, normalized_mse, score_weighted_mse
from kd_dense.losses.hcl import hcl

__all__ = [
    'bernoulli_kl',
    'channel_kl',
    'class_kl',
    'cosine',
    'hcl',
    'l1',
    'mse',
    'normalized_mse',
    'score_weighted_mse',
]
