"""Pre-training of a backbone on unlabelled images, from a classifier that is not there.

The classifier (the teacher) is run once over a bank of views of an image folder; kept are the seed of each view and the
classifier's largest probabilities. A backbone (the student) with a pooled linear head is then trained on them, and its
plain weights begin a segmentor or a detector. This is the method of Wu et al., "TinyViT: Fast Pretraining Distillation
for Small Vision Transformers", ECCV 2022. ``docs/pretraining.md`` has steps, sizes and limits.
"""

from kd_dense.pretraining.classifier import Classifier
from kd_dense.pretraining.images import PackImage, TorchvisionTransforms

__all__ = ['Classifier', 'PackImage', 'TorchvisionTransforms']
