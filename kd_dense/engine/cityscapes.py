"""The official Cityscapes evaluation, as a metric of MMEngine."""

from __future__ import annotations

import os.path as osp
from types import SimpleNamespace
from typing import Any

import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as official
import numpy as np
from mmseg.evaluation import CityscapesMetric

from kd_dense.registry import METRICS

if not hasattr(np, 'in1d'):
    # cityscapesscripts 2.3 calls numpy.in1d, which NumPy 2.4 no longer has. Only that module gets it back.
    official.np = SimpleNamespace(
        **{name: getattr(np, name) for name in np.__all__},
        in1d=lambda a, b, **kwargs: np.isin(np.ravel(a), b, **kwargs),
    )


@METRICS.register_module()
class OfficialCityscapesMetric(CityscapesMetric):
    """Runs cityscapesscripts' pixel-level evaluation on the predictions.

    MMSegmentation's metric reports the category averages only, and needs instance maps; this one adds the class
    average, which is the mIoU of the benchmark, and leaves the instance-weighted scores out where there are no
    ``*_instanceIds.png`` files.

    Returns:
        ``IoU_classes``, ``IoU_categories``, with instance maps ``iIoU_classes`` and ``iIoU_categories``: all in
        percent.
    """

    def compute_metrics(self, results: list) -> dict[str, float]:
        predictions, truths = zip(*results, strict=True)
        args = official.args
        args.predictionPath = osp.abspath(self.output_dir)
        args.evalPixelAccuracy = False
        args.JSONOutput = False
        args.quiet = True
        args.evalInstLevelScore = all(osp.isfile(path.replace('labelIds', 'instanceIds')) for path in truths)
        scores: dict[str, Any] = official.evaluateImgLists(list(predictions), list(truths), args)
        metrics = {
            'IoU_classes': scores['averageScoreClasses'],
            'IoU_categories': scores['averageScoreCategories'],
        }
        if args.evalInstLevelScore:
            metrics['iIoU_classes'] = scores['averageScoreInstClasses']
            metrics['iIoU_categories'] = scores['averageScoreInstCategories']
        # NaN: no instances
        return {name: round(100 * float(value), 2) for name, value in metrics.items() if value == value}
