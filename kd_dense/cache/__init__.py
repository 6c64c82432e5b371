"""Teacher cache: run the teacher once over a bank of augmented views, then train students without it.

``tools/cache_teacher.py CONFIG`` writes a cache (:mod:`kd_dense.cache.write`), ``teacher=dict(..., cache='FOLDER')`` in
the config reads it. The distillers notice nothing: they are given the same tensors. What is particular to Ultralytics
is in :mod:`kd_dense.yolo.views`.

The idea is that of Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", ECCV 2022: keep
the seed of an augmentation beside the teacher's output, and make the same pixels of it again. The paper keeps the
output for every image and epoch; here a number of views of every image is kept, and epochs go through them, because a
dense output is thousands of times larger than that of a classifier. ``docs/cache.md`` has sizes, limits and faults.
"""

from kd_dense.cache.dataset import CachedTeacherDataset, cache_of, use_cache
from kd_dense.cache.views import ViewBank, ViewSampler

__all__ = ['CachedTeacherDataset', 'ViewBank', 'ViewSampler', 'cache_of', 'use_cache']
