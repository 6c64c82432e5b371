"""The Cityscapes -> Foggy Cityscapes config trains as it is, in a tiny folder of the same layout."""

import json
from pathlib import Path

import cv2
import numpy as np

from kd_dense.engine.run import load_config, student_alone, train

NAME = 'configs/adaptation/segmentation/meanteacher_segformer_mit-b0_cityscapes-to-foggy.py'


def write_cityscapes(root: Path) -> Path:
    """Two images for training and one for validation, clear (value 200), in thin fog (50) and in thick fog (100)."""
    rng = np.random.default_rng(0)
    values = {
        'leftImg8bit/{}/aachen/{}_leftImg8bit.png': 200,
        'leftImg8bit_foggy/{}/aachen/{}_leftImg8bit_foggy_beta_0.01.png': 50,
        'leftImg8bit_foggy/{}/aachen/{}_leftImg8bit_foggy_beta_0.02.png': 100,
    }
    for split, count in (('train', 2), ('val', 1)):
        for number in range(count):
            name = f'aachen_{number:06d}_000019'
            for file, value in values.items():
                path = root / file.format(split, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), rng.integers(value - 9, value + 9, (64, 128, 3), dtype=np.uint8))
            labels = root / 'gtFine' / split / 'aachen' / f'{name}_gtFine_labelTrainIds.png'
            labels.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(labels), np.repeat(rng.integers(0, 19, (64, 8), dtype=np.uint8), 16, axis=1))
    return root


def test_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.config.config.FormatCode', lambda text, **_: (text, True))  # takes most of the time
    root = write_cityscapes(tmp_path / 'cityscapes')
    text = Path(NAME).read_text().replace('../../', f'{Path("configs").resolve()}/')
    assert f'python tools/train.py {NAME}' in text and "data_root = 'data/cityscapes/'" in text
    for old, new in (("'data/cityscapes/'", repr(f'{root}/')), ('(1024, 1024)', '(64, 64)'), ('(2048, ', '(128, ')):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / 'config.py').write_text(text.replace('scale=(128, 1024)', 'scale=(128, 64)'))
    small = (64, 64)
    options = {
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'model.student.backbone.init_cfg': None,  # nothing to download
        'model.student.data_preprocessor.size': small,
        'model.student.test_cfg.crop_size': small,
        'model.student.test_cfg.stride': small,
        'model.pseudo_weight': 1.0,
        'default_hooks.logger.interval': 1,
    }
    cfg = load_config(str(tmp_path / 'config.py'), options)
    (resize,) = (t for t in cfg.val_dataloader.dataset.pipeline if t.type == 'Resize')
    resize.scale = (128, 64)
    record = train(cfg, str(tmp_path / 'run'), seed=0)
    assert record.metric == 'mIoU' and record.iterations == 2
    lines = [json.loads(line) for file in tmp_path.rglob('scalars.json') for line in file.read_text().splitlines()]
    assert [line for line in lines if 'teacher.mIoU' in line]
    assert all(line['adapt.styled_loss'] > 0 for line in lines if 'loss' in line)

    from mmseg.registry import DATASETS, TRANSFORMS

    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    means = {name: image.float().mean().item() for name, image in dataset[0]['inputs'].items()}
    assert 190 < means['teacher'] < 210 and 90 < means['styled'] < 110  # thick fog, and not the thin one beside it
    style = TRANSFORMS.build(cfg.to_target)
    assert {file.name[-8:] for file in style.files} == {'0.02.png'}
    foggy = DATASETS.build(cfg.val_dataloader.dataset)
    assert cv2.imread(foggy[0]['data_samples'].img_path).mean() > 90
    assert student_alone(cfg).train_dataloader.dataset.data_prefix.img_path == 'leftImg8bit/train'
