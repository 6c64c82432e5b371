"""Ultralytics' own model YAMLs, detection and instance segmentation, at an eighth of their width."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import tests.yolo.conftest  # noqa: F401  (sets up Ultralytics before it is imported)

import ultralytics  # isort: skip
from ultralytics.cfg import get_cfg  # isort: skip
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, yaml_model_load  # isort: skip

from kd_dense.distillation import Distillers  # isort: skip
from kd_dense.yolo import DistillationModel  # isort: skip
from tests.generality.catalog import YOLO_UNCOVERED  # isort: skip
from tests.yolo.helpers import CLASSES  # isort: skip

FOLDER = Path(ultralytics.__file__).parent / 'cfg' / 'models'
FILES = sorted(f'{path.parent.name}/{path.stem}' for path in FOLDER.glob('*/*.yaml'))
COVERED = [name for name in FILES if not any(part in name.rpartition('/')[2] for part in YOLO_UNCOVERED)]
SAMPLE = ('v3/yolov3-tiny', 'v8/yolov8', '26/yolo26', '11/yolo11-seg')


def build(name: str, width: float, seed: int) -> DetectionModel:
    yaml = yaml_model_load(str(FOLDER / f'{name}.yaml'))
    if 'scales' in yaml:
        yaml['scales'], yaml['scale'] = {'n': [0.33, width, 512]}, 'n'
    else:
        yaml['depth_multiple'], yaml['width_multiple'] = 0.33, width
    torch.manual_seed(seed)
    segments = name.endswith(('-seg', '-seg-p6'))
    cls = SegmentationModel if segments else DetectionModel
    model = cls(yaml, ch=3, nc=len(CLASSES), verbose=False)
    model.names = dict(enumerate(CLASSES))
    model.args = get_cfg(overrides={'imgsz': 64, 'epochs': 3, 'task': 'segment' if segments else 'detect'})
    return model


def batch(size: int = 128) -> dict:
    """Two images, the first with two objects, and their masks for models that segment."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, size // 4, size // 4)
    masks[0, 8:20, 8:20] = 1
    masks[0, 20:28, 4:12] = 2
    return {
        'img': torch.rand(2, 3, size, size, generator=generator),
        'bboxes': torch.tensor([[0.45, 0.45, 0.4, 0.4], [0.25, 0.75, 0.25, 0.25]]),
        'cls': torch.tensor([[0.0], [1.0]]),
        'batch_idx': torch.zeros(2),
        'masks': masks,
        'sem_masks': torch.zeros(2, size // 4, size // 4, dtype=torch.long),
    }


@pytest.mark.parametrize('name', [pytest.param(n, marks=[] if n in SAMPLE else [pytest.mark.slow]) for n in COVERED])
def test_one_step(name):
    distillers = Distillers({'mimic': {'type': 'FeatureMimic', 'taps': 'neck'}, 'logits': {'type': 'LogitKD'}})
    # YOLOv9e's fusion layers have widths of their own; the attention of YOLO12 wants multiples of 32
    widths = {'v9/yolov9e': (1.0, 1.0), '12/yolo12': (0.25, 0.5)}.get(name.removesuffix('-seg'), (0.125, 0.25))
    model = DistillationModel(*(build(name, width, seed) for seed, width in enumerate(widths)), distillers).train()
    parts, items = model.loss(batch())
    parts.sum().backward()
    model.distillers.verify_gradients()
    assert all(math.isfinite(float(value)) for value in items.values())
    assert float(items['mimic']) > 0 and float(items['logits']) > 0
    assert bool(list(model.distillers.parameters())) == (widths[0] != widths[1])
    gradients = [p.grad for p in model.student_model.parameters() if p.requires_grad]
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in gradients) > 0.7 * len(
        gradients
    )  # few cells have an object


def test_every_yaml_is_covered_or_named():
    assert set(SAMPLE) <= set(COVERED)
    families = {name.partition('/')[0] for name in COVERED}
    assert {'v3', 'v5', 'v6', 'v8', 'v9', 'v10', '11', '12', '26'} <= families
    for part in YOLO_UNCOVERED:
        assert any(part in name for name in FILES), f'{part}: nothing is called so'
