"""Score a model with the evaluator of a config, outside of MMEngine's loops."""

from __future__ import annotations

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from torch.utils.data import DataLoader

from kd_dense.errors import Interrupted
from kd_dense.stopping import name_of, requested


@torch.no_grad()
def score(model: torch.nn.Module, loader: DataLoader, evaluator: Evaluator) -> dict[str, float]:
    """Score ``model`` by its own ``val_step`` on all batches of ``loader``; it is left in evaluation mode.

    Returns:
        Metric name -> value, as the toolbox reports them.
    """
    evaluator.dataset_meta = loader.dataset.metainfo
    model.eval()
    for batch in loader:
        if (number := requested()) is not None:
            raise Interrupted(f'{name_of(number)} before training began; start it again', number)
        evaluator.process(data_samples=model.val_step(batch), data_batch=batch)
    metrics = evaluator.evaluate(len(loader.dataset))
    return {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float, np.number))}


def use_complete_metrics(cfg: Config) -> None:
    """Put metrics that always have a score in the place of MMDetection's own, for validation and test.

    Of a detector that predicts nothing on any image ``CocoMetric`` returns none; see
    :class:`kd_dense.engine.coco_metric.CocoMetric`. Students, teachers and mean teachers are all scored by what the
    config names.
    """
    for part in ('val_evaluator', 'test_evaluator'):
        evaluators = cfg.get(part) or []
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            if evaluator.get('type') in ('CocoMetric', 'mmdet.CocoMetric'):
                evaluator.type = 'kd_dense.CocoMetric'
