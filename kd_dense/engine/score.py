"""Score a model with the evaluator of a config, outside of MMEngine's loops."""

from __future__ import annotations

import numpy as np
import torch
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
