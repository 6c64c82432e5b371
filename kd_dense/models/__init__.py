"""The MMEngine models: a student with a teacher and distillers, one with the moving average of itself, and a backbone
that is pre-trained; and the backbone TinyViT."""

from kd_dense.models.distillation import Distillation
from kd_dense.models.mean_teacher import MeanTeacherAdaptation
from kd_dense.models.pretraining import BackbonePretraining
from kd_dense.models.tinyvit import TinyViT

__all__ = ['BackbonePretraining', 'Distillation', 'MeanTeacherAdaptation', 'TinyViT']
