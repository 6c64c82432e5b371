"""Losses: tensors in, scalar out. They know nothing of models; reductions are in fp32."""

from kd_dense.losses.divergence import bernoulli_kl, channel_kl, class_kl
from kd_dense.losses.feature import cosine, l1, mse, normalized_mse, score_weighted_mse
from kd_dense.losses.hcl import hcl
from kd_dense.losses.localization import box_l1, distribution_kl, giou_distance

__all__ = [
    'bernoulli_kl',
    'box_l1',
    'channel_kl',
    'class_kl',
    'cosine',
    'distribution_kl',
    'giou_distance',
    'hcl',
    'l1',
    'mse',
    'normalized_mse',
    'score_weighted_mse',
]
