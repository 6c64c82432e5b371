"""The TransKD configs read their data sets and build what they say, with teachers of random weights."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from PIL import Image

from kd_dense import Distillation
from kd_dense.models.build import build_model, forget_pretrained
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'configs/segmentation/transkd'
#: Those with a teacher that the user trains; test_configs.py builds the others.
TRAINED = sorted(p.name for p in FOLDER.glob('*.py') if '1024x1024' not in p.name or 'pvtv2' in p.name)


def image(path: Path, size: tuple[int, int], label: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if label is None else size
    Image.fromarray(np.full(shape, 90 if label is None else label, np.uint8)).save(path)


def loaded(cfg: Config, part: str, root: Path) -> list[dict]:
    from mmseg.registry import DATASETS

    init_default_scope('mmseg')
    settings = cfg[part].dataset.to_dict()
    dataset = DATASETS.build(dict(settings, data_root=str(root)))
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize(
    'name, size',
    [
        ('transkd_segformer-b2_segformer-b0_80k_acdc-512x1024.py', (512, 1024)),
        ('transkd_segformer-b2_segformer-b0_1000e_acdc-512x910.py', (512, 910)),
    ],
)
def test_acdc__is_read_by_lists_of_all_conditions(name, size, tmp_path):
    for split in ('train', 'val'):
        lines = [f'{condition}/{split}/GOPR1/GOPR1_frame_000{i}' for i, condition in enumerate(('fog', 'night'))]
        (tmp_path / f'{split}.txt').write_text('\n'.join(lines) + '\n')
        for i, line in enumerate(lines):
            image(tmp_path / f'rgb_anon/{line}_rgb_anon.png', (108, 192))
            image(tmp_path / f'gt/{line}_gt_labelTrainIds.png', (108, 192), 18 - i)
    cfg = Config.fromfile(str(FOLDER / name))
    items = loaded(cfg, 'train_dataloader', tmp_path)
    # a small draw of RandomResize is padded to the whole size later
    assert len(items) == 2 and all(n <= m for x in items for n, m in zip(x['inputs'].shape[1:], size, strict=True))
    assert tuple(cfg.model.student.data_preprocessor.size) == size
    items = loaded(cfg, 'val_dataloader', tmp_path)
    assert [x['data_samples'].gt_sem_seg.data.unique().tolist() for x in items] == [[18], [17]]
    assert items[0]['data_samples'].gt_sem_seg.shape == (108, 192)  # scores are of the full resolution


def test_nyuv2__is_read_with_forty_classes(tmp_path):
    for split in ('train', 'test'):
        for i, label in enumerate((0, 40)):
            image(tmp_path / f'images/{split}/{i}.png', (48, 64))
            image(tmp_path / f'labels/{split}/{i}.png', (48, 64), label)
    for name in ('segformer-b2_segformer-b0', 'pvtv2-b2_pvtv2-b0'):
        cfg = Config.fromfile(str(FOLDER / f'transkd_{name}_40k_nyuv2-480x640.py'))
        classes = cfg.train_dataloader.dataset.metainfo.classes
        assert len(set(classes)) == len(classes) == cfg.model.student.decode_head.num_classes == 40
        items = loaded(cfg, 'train_dataloader', tmp_path)
        assert len(items) == 2 and all(max(x['inputs'].shape) <= 640 for x in items)
        items = loaded(cfg, 'val_dataloader', tmp_path)
        assert [x['data_samples'].gt_sem_seg.data.unique().tolist() for x in items] == [[255], [39]]


def step(name: str, tmp_path: Path, size: tuple[int, int] = tiny.SIZE, **change: object) -> Distillation:
    cfg = Config.fromfile(str(FOLDER / name))
    init_default_scope(cfg.default_scope)
    arguments = cfg.model.to_dict()
    arguments.pop('type')
    for part in (arguments['student'], teacher := Config.fromfile(arguments['teacher']['config']).model.to_dict()):
        forget_pretrained(part)
        part['data_preprocessor']['size'] = size
    arguments['distillers']['transkd'].update(change)
    arguments['teacher'] = dict(config=dict(teacher, _scope_='mmseg'), checkpoint=str(tmp_path / 'teacher.pth'))
    built = build_model(arguments['teacher']['config'], 'teacher', pretrained=False)
    torch.save(built.state_dict(), tmp_path / 'teacher.pth')
    try:
        model = revert_sync_batchnorm(Distillation(**arguments)).train()
    finally:
        (tmp_path / 'teacher.pth').unlink()
    model.progress = 0.0
    classes = arguments['student']['decode_head']['num_classes']
    logs = model.train_step(
        tiny.segmentation_batch(size=size, classes=classes), OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    )
    model.distillers.verify_gradients()
    assert logs['kd.transkd.feature_loss'] > 0 and logs['kd.transkd.embedding_loss'] > 0
    return model


@pytest.mark.parametrize('name', [n for n in TRAINED if 'camvid' in n])
def test_camvid__student_teacher_and_distiller_take_a_step(name, tmp_path):
    model = step(name, tmp_path, (96, 128))
    variant = model.distillers.methods['transkd'].variant
    # behind the method's name stands its variant, or what else is special
    said = re.match(r'transkd-(gl|ea)_', name)
    assert variant == (said[1] if said else 'base')


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in TRAINED if 'camvid' not in n])
def test_other_data_sets__student_teacher_and_distiller_take_a_step(name, tmp_path):
    variants = ('base', 'gl', 'ea') if name.startswith('transkd_') else (None,)
    for variant in variants:
        model = step(name, tmp_path, **({'variant': variant} if variant else {}))
        own = sum(p.numel() for p in model.distillers.parameters())
        # the published sizes: both pairs have the same widths
        assert own == {'base': 843_840, 'gl': 1_499_970, 'ea': 1_814_792}[model.distillers.methods['transkd'].variant]
