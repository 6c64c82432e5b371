"""COCO's scores of a detector that finds nothing."""

from __future__ import annotations

import numpy as np
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from pycocotools import mask as rle

from kd_dense.registry import METRICS


@METRICS.register_module()
class CocoMetric(MMDetCocoMetric):
    """MMDetection's metric, which has scores for a model that predicts nothing on any image too: 0.

    MMDetection's says that the results are empty and returns no score, so that the curve of an early or bad model, and
    the record of its run, would lack it. Where nothing is predicted, one box without an area and with a score of 0 is
    evaluated, which is on no object: COCO's evaluation then gives what it gives for objects that are not found, 0, and
    -1 for sizes of which there are no objects. Put into configs by :func:`kd_dense.engine.score.use_complete_metrics`.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Scores by name, of ``(truth, prediction)`` of every image."""
        found = super().compute_metrics(results)
        if self.format_only or any(len(prediction['labels']) for _, prediction in results):
            return found
        prefix, self.outfile_prefix = self.outfile_prefix, None  # files that were asked for are as they should be
        try:
            return super().compute_metrics(_with_a_miss(results))
        finally:
            self.outfile_prefix = prefix


def _with_a_miss(results: list) -> list:
    """``results`` without predictions, but for a box without an area on the first image."""
    (truth, prediction), *others = results
    miss = dict(bboxes=np.zeros((1, 4)), scores=np.zeros(1), labels=np.zeros(1, dtype=int))
    if 'masks' in prediction:
        miss['masks'] = [rle.encode(np.zeros((truth['height'], truth['width']), np.uint8, order='F'))]
    if 'mask_scores' in prediction:
        miss['mask_scores'] = np.zeros(1)
    return [(truth, {**prediction, **miss}), *others]
