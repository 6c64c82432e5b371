"""Tiny models and images for the YOLO tests."""

from pathlib import Path

import cv2
import numpy as np
import torch
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, yaml_model_load

#: Layouts of the three families at a fraction of their width and depth: a few ten thousand parameters each.
FAMILIES = ('yolov8', 'yolo11', 'yolo26')
CLASSES = ('disc', 'square')
#: Ultralytics arguments of a run that lasts a second or two.
FAST = {
    'epochs': 1,
    'imgsz': 64,
    'batch': 4,
    'nbs': 4,
    'workers': 0,
    'device': 'cpu',
    'plots': False,
    'optimizer': 'SGD',
    'lr0': 0.01,
    'warmup_epochs': 0,
    'verbose': False,
    'deterministic': True,
}


def draw(folder: Path, split: str, count: int, seed: int, polygons: bool = False) -> None:
    """``count`` images of 64x64 with discs and squares, one of them without objects, and their YOLO labels."""
    rng = np.random.default_rng(seed)
    (folder / 'images' / split).mkdir(parents=True)
    (folder / 'labels' / split).mkdir(parents=True)
    for i in range(count):
        image = rng.integers(60, 120, (64, 64, 3), dtype=np.uint8)
        rows = []
        for _ in range(0 if i == 1 else rng.integers(1, 4)):
            label, radius = int(rng.integers(2)), int(rng.integers(6, 12))
            x, y = (int(v) for v in rng.integers(radius, 64 - radius, 2))
            colour = tuple(int(v) for v in rng.integers(150, 255, 3))
            if label == 0:
                cv2.circle(image, (x, y), radius, colour, -1)
            else:
                cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), colour, -1)
            if polygons:
                corners = [
                    (x - radius, y - radius),
                    (x + radius, y - radius),
                    (x + radius, y + radius),
                    (x - radius, y + radius),
                ]
                rows.append(' '.join([str(label), *(f'{v / 64:.5f}' for corner in corners for v in corner)]))
            else:
                rows.append(f'{label} {x / 64:.5f} {y / 64:.5f} {2 * radius / 64:.5f} {2 * radius / 64:.5f}')
        cv2.imwrite(str(folder / 'images' / split / f'{split}{i}.png'), image)
        (folder / 'labels' / split / f'{split}{i}.txt').write_text('\n'.join(rows))


def write_data(folder: Path, polygons: bool = False, names: tuple[str, ...] = CLASSES, **extra) -> Path:
    draw(folder, 'train', 8, 0, polygons)
    draw(folder, 'val', 4, 1, polygons)
    lines = [f'path: {folder}', 'train: images/train', 'val: images/val', 'names:']
    lines += [f'  {i}: {n}' for i, n in enumerate(names)] + [f'{k}: {v}' for k, v in extra.items()]
    (folder / 'data.yaml').write_text('\n'.join(lines))
    return folder / 'data.yaml'


def small_yaml(family: str, width: float = 0.125, task: str = '') -> dict:
    """The YAML of ``family`` with all widths scaled; depth 0.33 as in its smallest model."""
    yaml = yaml_model_load(f'{family}n{task}.yaml')
    yaml['scales'] = {'n': [0.33, width, 256]}
    yaml['scale'] = 'n'
    return yaml


def build(family: str, width: float = 0.125, task: str = '', names=CLASSES, seed: int = 0, channels: int = 3):
    """An untrained model of the family, with class names."""
    torch.manual_seed(seed)
    cls = SegmentationModel if task == '-seg' else DetectionModel
    model = cls(small_yaml(family, width, task), ch=channels, nc=len(names), verbose=False)
    model.names = dict(enumerate(names))
    return model


def save_model(model, path: Path) -> Path:
    """As a checkpoint of Ultralytics."""
    torch.save({'model': model, 'train_args': {'task': 'segment' if 'Seg' in type(model).__name__ else 'detect'}}, path)
    return path
