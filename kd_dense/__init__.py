"""Knowledge distillation for dense prediction: MMDetection 3.x, MMSegmentation 1.x and Ultralytics YOLO."""

from kd_dense import compat
from kd_dense.errors import ConfigError, DistillationError

compat.apply()

from kd_dense import distillers  # noqa: E402  (registers the methods)
from kd_dense.distillers import Distiller  # noqa: E402
from kd_dense.engine import AdaptationHook, DistillationHook, PretrainingHook  # noqa: E402
from kd_dense.models import BackbonePretraining, Distillation, MeanTeacherAdaptation, TinyViT  # noqa: E402
from kd_dense.registry import CONNECTORS, DISTILLERS, LOSSES  # noqa: E402

__version__ = '0.1.0'

__all__ = [
    'CONNECTORS',
    'DISTILLERS',
    'LOSSES',
    'AdaptationHook',
    'BackbonePretraining',
    'ConfigError',
    'Distillation',
    'DistillationError',
    'DistillationHook',
    'Distiller',
    'MeanTeacherAdaptation',
    'PretrainingHook',
    'TinyViT',
    'distillers',
]
