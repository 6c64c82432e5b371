"""The MMEngine models: a student with a teacher and distillers, and one with the moving average of itself."""

from kd_dense.models.distillation import Distillation
from kd_dense.models.mean_teacher import MeanTeacherAdaptation

__all__ = ['Distillation', 'MeanTeacherAdaptation']
