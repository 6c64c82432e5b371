"""Distillation in Ultralytics' trainer. The only part of kd_dense that imports Ultralytics, which is AGPL-3.0."""

from kd_dense.yolo import offline  # before Ultralytics is imported

try:
    import ultralytics  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'ultralytics':
        raise
    raise ModuleNotFoundError(
        "kd_dense.yolo needs Ultralytics (licensed under AGPL-3.0); install it with: pip install 'kd_dense[yolo]'",
        name='ultralytics',
    ) from None

offline.apply()

from kd_dense.yolo.adaptation_trainer import AdaptationTrainer  # noqa: E402
from kd_dense.yolo.describe import describe  # noqa: E402
from kd_dense.yolo.evaluate import evaluate  # noqa: E402
from kd_dense.yolo.examples import examples  # noqa: E402
from kd_dense.yolo.model import DistillationModel  # noqa: E402
from kd_dense.yolo.run import train  # noqa: E402
from kd_dense.yolo.trainer import DistillationTrainer, SegmentationDistillationTrainer  # noqa: E402

__all__ = [
    'AdaptationTrainer',
    'DistillationModel',
    'DistillationTrainer',
    'SegmentationDistillationTrainer',
    'describe',
    'evaluate',
    'examples',
    'train',
]
