"""Predictions of several checkpoints on the same validation images, drawn for comparison figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.engine.results import Results
from ultralytics.utils import LOGGER
from ultralytics.utils.ops import xywh2xyxy
from ultralytics.utils.patches import imread

from kd_dense.yolo import mmdet_teacher
from kd_dense.yolo.config import read
from kd_dense.yolo.teacher import read_checkpoint
from kd_dense.yolo.trainer import require_dataset


def examples(
    config: str | Path | Config | Mapping, checkpoints: Mapping[str, str | None], count: int = 4
) -> list[dict[str, np.ndarray]]:
    """Draw ground truth and predictions on images of the validation set.

    Args:
        config: a YOLO config, or its path.
        checkpoints: ``'student'``, ``'distilled'`` and ``'teacher'`` -> checkpoint; ``None`` for the teacher: the one
            in the config, which is left out where there is none, or where it is a model of MMDetection.
        count: images, spread evenly over the validation set.

    Returns:
        Per image: ``input``, ``truth`` and one entry per key of ``checkpoints``, each ``[H, W, 3]`` RGB, uint8; what is
        drawn on is enlarged where the image is small.
    """
    config = read(config)
    if checkpoints.get('teacher', '') is None and config.teacher is None:  # that of an adaptation is in no file
        checkpoints = {name: path for name, path in checkpoints.items() if name != 'teacher'}
    elif checkpoints.get('teacher', '') is None and mmdet_teacher.is_config(config.teacher['config']):
        LOGGER.info('the teacher is a model of MMDetection, which Ultralytics can not run: there are no examples of it')
        checkpoints = {name: path for name, path in checkpoints.items() if name != 'teacher'}
    data = require_dataset(config.evaluated)
    arguments = get_cfg(overrides={'task': 'detect', 'imgsz': config.train.get('imgsz', 640), 'data': config.evaluated})
    dataset = build_yolo_dataset(arguments, data['val'], batch=1, data=data, mode='val', rect=False)
    for name, path in checkpoints.items():  # YOLO() itself would execute what a file names
        if path is None:
            read_checkpoint(config.teacher['checkpoint'], 'teacher.checkpoint', config.teacher['trusted'])
        else:
            read_checkpoint(path, name)
    models = {name: YOLO(str(path or config.teacher['checkpoint'])) for name, path in checkpoints.items()}
    rows = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
        image = imread(dataset.im_files[index])
        row = {'input': image, 'truth': _truth(image, dataset.labels[index], data['names'])}
        for name, model in models.items():
            (result,) = model.predict(image, imgsz=arguments.imgsz, verbose=False)
            row[name] = _plot(result)
        rows.append({name: np.ascontiguousarray(drawn[..., ::-1]) for name, drawn in row.items()})
    return rows


def _truth(image: np.ndarray, label: Mapping, names: Mapping[int, str]) -> np.ndarray:
    height, width = image.shape[:2]
    boxes = xywh2xyxy(np.asarray(label['bboxes'], dtype=np.float32)) * np.float32([width, height, width, height])
    ones = np.ones((len(boxes), 1), np.float32)
    rows = torch.from_numpy(np.concatenate([boxes, ones, label['cls'].reshape(-1, 1)], 1))
    return _plot(Results(image, path='', names=dict(names), boxes=rows))


def _plot(result: Results, side: int = 480) -> np.ndarray:
    """The drawing by Ultralytics; of a small image enlarged, so that the labels of the boxes do not cover it."""
    factor = max(1, round(side / max(result.orig_shape)))
    image = np.ascontiguousarray(result.orig_img.repeat(factor, 0).repeat(factor, 1))
    boxes = result.boxes.data.clone()
    boxes[:, :4] *= factor
    masks = None if result.masks is None else result.masks.data
    return Results(image, path='', names=result.names, boxes=boxes, masks=masks).plot(conf=False)
