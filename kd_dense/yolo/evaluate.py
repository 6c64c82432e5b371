"""Scores of a plain checkpoint: Ultralytics' own, and the official COCO numbers on the same predictions."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.models.yolo.segment import SegmentationValidator
from ultralytics.utils import LOGGER

from kd_dense.errors import ConfigError
from kd_dense.yolo.config import read
from kd_dense.yolo.teacher import read_checkpoint
from kd_dense.yolo.trainer import require_dataset
from kd_dense.yolo.validation import no_time_limit

#: Names of ``COCOeval.stats``, as MMDetection writes them.
COCO_NAMES = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


class _Collecting:
    """Keeps the predictions in COCO's form, in pixels of the original images; mixed into a validator of Ultralytics."""

    def init_metrics(self, model: Any) -> None:
        self.args.save_json = True  # known to the segmentation validator, it then predicts masks at full resolution
        super().init_metrics(model)
        # Ultralytics' own COCO evaluation stays out of it: it needs a package that is not installed.
        self.is_custom_json = self.build_gdict = False
        self.gdict = self.eval_ids = None
        self.class_map = list(range(len(model.names)))

    def eval_json(self, stats: dict) -> dict:
        return stats


class _DetectionCollector(_Collecting, DetectionValidator):
    pass


class _SegmentationCollector(_Collecting, SegmentationValidator):
    pass


COLLECTORS = {'detect': _DetectionCollector, 'segment': _SegmentationCollector}


def evaluate(
    config: str | Path | Config | Mapping,
    checkpoint: str | Path,
    work_dir: str | Path | None = None,
    coco_json: str | Path | None = None,
    official_cityscapes: bool = False,
    launcher: str = 'none',
    trusted: bool = False,
    **arguments: Any,
) -> dict[str, float]:
    """Evaluate a plain checkpoint, of a student or a teacher, on the validation images of a config.

    Args:
        config: a YOLO config, or its path.
        checkpoint: a ``.pt`` file.
        work_dir: where Ultralytics writes its files; default: beside the checkpoint.
        coco_json: annotations of the validation images; default: ``coco_json`` of the config, or COCO's own file
            ``annotations/instances_val2017.json`` where the data set has it.
        official_cityscapes, launcher: there is neither for YOLO; anything but the default is an error.
        trusted: load the checkpoint without restrictions on what it may execute.
        arguments: arguments of Ultralytics' validation, over those in ``val`` and ``train`` of the config.

    Returns:
        Ultralytics' numbers (``metrics/mAP50-95(B)`` ...) and, where there are COCO annotations, ``coco/bbox_mAP`` ...
        and for segmentation ``coco/segm_mAP`` ..., all 0..1 (-1 where COCO has no object of that size).

    Raises:
        ConfigError: a missing file or data set, or annotations that do not fit the images or the classes.
    """
    if official_cityscapes or launcher != 'none':
        raise ConfigError(
            'YOLO checkpoints are evaluated by one process, with the COCO evaluation; leave the other flags out'
        )
    config = read(config)
    checkpoint = Path(checkpoint).expanduser()
    if not checkpoint.is_file():
        raise ConfigError(f'there is no checkpoint {checkpoint}; give the .pt file of a trained model')
    data = require_dataset(config.evaluated)
    if not trusted:
        read_checkpoint(checkpoint, 'CHECKPOINT')  # YOLO() itself would execute what the file names
    model = YOLO(str(checkpoint))
    if model.task not in COLLECTORS:
        raise ConfigError(f'{checkpoint}: its task is {model.task!r}; kd_dense evaluates {list(COLLECTORS)}')
    folder = Path(work_dir or checkpoint.parent / 'eval').expanduser().resolve()
    # What the validation during training used too.
    names = ('imgsz', 'batch', 'device', 'workers', 'single_cls', 'conf', 'iou', 'max_det', 'agnostic_nms')
    shared = {k: config.train[k] for k in names if k in config.train}
    settings = {'plots': False, **shared, **config.val, **arguments}
    validator: list[Any] = []

    def collector(**kwargs: Any) -> Any:
        validator.append(COLLECTORS[model.task](**kwargs))
        return validator[0]

    place = dict(project=str(folder.parent), name=folder.name, exist_ok=True)
    with no_time_limit():
        metrics = model.val(validator=collector, data=config.evaluated, **place, **settings)
    scores = {k: float(v) for k, v in metrics.results_dict.items()}
    annotations = coco_json or config.coco_json or _standard_annotations(data)
    if annotations is not None:
        kinds = ['bbox', 'segm'] if model.task == 'segment' else ['bbox']
        images = validator[0].dataloader.dataset.im_files
        scores.update(coco_scores(annotations, validator[0].jdict, images, model.names, kinds))
    return scores


def coco_scores(
    annotations: str | Path, predictions: list[dict], images: list[str], names: Mapping[int, str], kinds: list[str]
) -> dict[str, float]:
    """The official COCO evaluation.

    Args:
        annotations: COCO json.
        predictions: Ultralytics' predictions, with ``file_name`` and the class index as ``category_id``.
        images: files that were evaluated.
        names: class index -> name.
        kinds: ``'bbox'``, ``'segm'``.

    Raises:
        ConfigError: no such file, or images or classes that it does not have.
    """
    if not Path(annotations).is_file():
        raise ConfigError(f'coco_json: there is no file {annotations}')
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO(str(annotations))
    image_ids = {Path(image['file_name']).name: image['id'] for image in truth.loadImgs(truth.getImgIds())}
    category_ids = {category['name']: category['id'] for category in truth.loadCats(truth.getCatIds())}
    for what, wanted, known in (
        ('image', [Path(i).name for i in images], image_ids),
        ('class', list(names.values()), category_ids),
    ):
        lacking = [n for n in wanted if n not in known]
        if lacking:
            raise ConfigError(
                f'coco_json: {annotations} has no {what} {lacking[0]!r} ({len(lacking)} of {len(wanted)} are missing)'
            )
    found = [
        {**p, 'image_id': image_ids[p['file_name']], 'category_id': category_ids[names[p['category_id']]]}
        for p in predictions
    ]
    scores = {}
    for kind in kinds:
        report = io.StringIO()
        with contextlib.redirect_stdout(report):
            evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), kind)
            evaluation.params.imgIds = [image_ids[Path(i).name] for i in images]
            if found:
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
        LOGGER.info(report.getvalue())
        values = evaluation.stats[:6] if found else [0.0] * 6
        scores.update({f'coco/{kind}_{name}': float(value) for name, value in zip(COCO_NAMES, values, strict=True)})
    return scores


def _standard_annotations(data: Mapping) -> Path | None:
    path = Path(data['path']) / 'annotations' / 'instances_val2017.json'
    return path if path.is_file() else None
