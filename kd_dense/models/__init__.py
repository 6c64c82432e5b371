"""The MMEngine model that joins student, teacher and distillers, for MMDetection and MMSegmentation."""

from kd_dense.models.distillation import Distillation

__all__ = ['Distillation']
