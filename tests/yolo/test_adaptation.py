"""Mean-teacher adaptation in Ultralytics' trainer: pairs, pseudo boxes, the teacher, and runs."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import RandomHSV
from ultralytics.data.build import build_dataloader
from ultralytics.utils.dist import generate_ddp_file
from ultralytics.utils.patches import torch_load

import kd_dense.yolo
from kd_dense.adaptation.style import translate
from kd_dense.engine.run import load_config, student_alone
from kd_dense.errors import ConfigError, sentence
from kd_dense.export import ExportOptions, export_any
from kd_dense.yolo import AdaptationTrainer
from kd_dense.yolo.adaptation_config import Adaptation, Style, parse
from kd_dense.yolo.adaptation_model import AdaptationModel, labels_of, one_to_many
from kd_dense.yolo.adaptation_trainer import SourceTrainer
from kd_dense.yolo.config import read
from kd_dense.yolo.doctor import YoloToolbox
from kd_dense.yolo.model import COUNTS
from kd_dense.yolo.paired_data import FormatPair, OnBoth, PairedLoader, TranslatedDataset
from tests.helpers.processes import assert_equal, in_a_fork, kill_myself
from tests.yolo.helpers import FAST, build, draw, write_data
from tests.yolo.test_checkpoints import PLAIN

#: Every geometric transform and the colours, so that a difference between the images of a pair would show.
ALL = dict(mosaic=0.7, mixup=0.5, cutmix=0.3, degrees=20, shear=5, perspective=1e-4, flipud=0.5, fliplr=0.5, hsv_h=0.3)
#: Untrained detectors are sure of nothing.
ANYTHING = dict(score_threshold=0.005, max_count=5)


@pytest.fixture(scope='session')
def target(tmp_path_factory) -> Path:
    """A data YAML of the target domain: 6 training images, darker and of another size, 4 validation images."""
    folder = tmp_path_factory.mktemp('target')
    yaml = write_data(folder)
    shutil.rmtree(folder / 'images' / 'train')
    shutil.rmtree(folder / 'labels' / 'train')
    draw(folder, 'train', 6, 5)
    for path in (folder / 'images' / 'train').iterdir():
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)) // 2, (80, 48)))
    return yaml


@pytest.fixture
def write_adaptation(tmp_path, data, student_yaml, target):
    """Write the config of an adaptation."""

    def write(name: str = 'config.py', family: str = 'yolo11', train: dict | None = None, **adaptation) -> Path:
        values = {
            'student': student_yaml(family),
            'data': str(data),
            'adaptation': {'target': str(target), 'pseudo_labels': ANYTHING, **adaptation},
            'train': {**FAST, 'batch': 2, **(train or {})},
        }
        path = tmp_path / name
        path.write_text('\n'.join(f'{k} = {v!r}' for k, v in values.items()))
        return path

    return write


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rows_of(folder: Path) -> list[dict[str, float]]:
    with open(folder / 'results.csv') as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def dataset(folder: Path, translated: Path | None = None, style: Style | None = None, imgsz: int = 96, **arguments):
    hyp = get_cfg(overrides={'task': 'detect', 'imgsz': imgsz, **ALL, **arguments})
    found = TranslatedDataset(
        str(folder),
        translated=str(translated) if translated else None,
        style=style,
        key='adaptation.translated_source',
        imgsz=imgsz,
        hyp=hyp,
        batch_size=2,
        data={'names': {0: 'disc', 1: 'square'}, 'nc': 2, 'channels': 3},
    )
    found.references = found.im_files
    return found


def translations(folder: Path, images: Path, change) -> Path:
    folder.mkdir()
    for path in images.iterdir():
        cv2.imwrite(str(folder / path.name), change(cv2.imread(str(path))))
    return folder


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_equal_images_stay_equal(data, tmp_path):
    """Through resizing, mosaic, mixing, warps, colours and flips."""
    images = data.parent / 'images' / 'train'
    pairs = dataset(images, translations(tmp_path / 'same', images, lambda image: image))
    random.seed(0)
    np.random.seed(0)
    for index in [*range(8), *range(8)]:
        image = pairs[index]['img']
        assert image.shape == (6, 96, 96) and image.float().std() > 10
        assert torch.equal(image[:3], image[3:])


def test_geometry_is_the_same_bit_for_bit(data, tmp_path):
    """A translation with other content: red and blue exchanged. It stays that of the image, without colour gains."""
    images = data.parent / 'images' / 'train'
    folder = translations(tmp_path / 'other', images, lambda image: image[..., ::-1])
    pairs = dataset(images, folder, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0)
    random.seed(1)
    for index in range(8):
        image = pairs[index]['img']
        assert not torch.equal(image[:3], image[3:])
        assert torch.equal(image[:3], image[3:].flip(0))


def test_colour_gains_are_drawn_once():
    rng = np.random.default_rng(0)
    pair = rng.integers(0, 256, (8, 10, 6), dtype=np.uint8)
    transform = RandomHSV(0.5, 0.5, 0.5)
    expected = []
    for part in (pair[..., :3], pair[..., 3:]):
        np.random.seed(3)
        expected.append(transform({'img': np.ascontiguousarray(part)})['img'])
    np.random.seed(3)
    found = OnBoth(transform)({'img': pair.copy()})['img']
    assert np.array_equal(found, np.concatenate(expected, axis=2))
    assert not np.array_equal(found, pair)


@pytest.mark.parametrize('bgr', [0.0, 1.0])
def test_both_images_are_formatted_alike(bgr):
    pair = np.arange(2 * 3 * 6, dtype=np.uint8).reshape(2, 3, 6)
    found = FormatPair(bgr=bgr)._format_img(pair).numpy()
    order = [0, 1, 2, 3, 4, 5] if bgr else [2, 1, 0, 5, 4, 3]
    assert np.array_equal(found, pair.transpose(2, 0, 1)[order])


def test_translations_are_made_of_whole_images(data):
    """Before there is grey around them, and kept as long as Ultralytics keeps the image for mosaics."""
    pairs = dataset(data.parent / 'images' / 'train', style=Style('color'), imgsz=32)
    random.seed(0)
    for index in range(8):
        image, _, size = pairs.load_image(index)
        reference = cv2.imread(pairs.chosen[index])
        assert size == (32, 32) and np.array_equal(image[..., 3:], translate(image[..., :3], reference, 'color'))
        assert pairs.load_image(index)[0] is image
    assert len(set(pairs.chosen.values())) > 2 and list(pairs.kept()) == pairs.buffer
    again = dataset(data.parent / 'images' / 'train', style=Style('color'), imgsz=32)
    again.recall(pairs.kept())
    for index in pairs.kept():
        assert np.array_equal(again.load_image(index)[0], pairs.load_image(index)[0])


@pytest.mark.parametrize('style', [Style('fourier', 0.05), Style('color'), Style('histogram')])
def test_made_translations_share_the_geometry(data, style):
    """An image in its own style is itself, up to rounding, wherever its pixels went."""
    pairs = dataset(data.parent / 'images' / 'train', style=style, imgsz=64)
    random.seed(0)
    for index in range(8):
        pairs.recall(dict(enumerate(pairs.im_files)))
        image = pairs[index]['img'].float()
        assert (image[:3] - image[3:]).abs().mean() < 0.5 < image[:3].std()


def test_without_style_the_data_set_is_that_of_ultralytics(data):
    from ultralytics.data.dataset import YOLODataset

    folder = str(data.parent / 'images' / 'train')
    hyp = get_cfg(overrides={'task': 'detect', 'imgsz': 96, **ALL})
    stock = YOLODataset(
        folder, data={'names': {0: 'disc', 1: 'square'}, 'channels': 3}, imgsz=96, hyp=hyp, batch_size=2
    )
    samples = []
    for found in (dataset(folder), stock):
        random.seed(0)
        np.random.seed(0)
        samples.append([found[i] for i in range(4)])
    for ours, theirs in zip(*samples, strict=True):
        assert torch.equal(ours['img'], theirs['img']) and torch.equal(ours['bboxes'], theirs['bboxes'])


def test_a_target_needs_no_labels(tmp_path):
    draw(tmp_path, 'train', 4, 0)
    shutil.rmtree(tmp_path / 'labels')
    images = tmp_path / 'images' / 'train'
    data = {'names': {0: 'disc'}}
    arguments = dict(translated=None, style=None, key='', imgsz=64, batch_size=2, hyp=get_cfg(), data=data)
    found = TranslatedDataset(str(images), labelled=False, **arguments)
    assert (len(found), found.has_labels) == (4, False)
    assert found[0]['img'].shape == (3, 64, 64) and len(found[0]['cls']) == 0
    with pytest.raises(ValueError, match='No labels found'):
        TranslatedDataset(str(images), labelled=True, **arguments)


class _Numbers(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {'img': torch.tensor(index)}


def test_batches_of_both_domains():
    loaders = [build_dataloader(_Numbers(n), batch=2, workers=0, device='cpu') for n in (5, 10)]
    paired = PairedLoader(*loaders)
    assert len(paired) == (3 + 5) // 2
    epochs = [[(b['img'].tolist(), b['target']['img'].tolist()) for b in paired] for _ in range(5)]
    assert [len(epoch) for epoch in epochs] == [4] * 5
    source, target = zip(*(pair for epoch in epochs for pair in epoch), strict=True)
    for batches, passes, count in ((source, 3, 5), (target, 5, 10)):  # each pass has every image once
        whole = [batches[i : i + passes] for i in range(0, len(batches) - passes + 1, passes)]
        assert all(sorted(sum(one, [])) == list(range(count)) for one in whole) and len(whole) >= 4
    alone = PairedLoader(*loaders, with_target=False)
    assert len(alone) == 4 and all('target' not in batch for batch in alone)


# -- the model ---------------------------------------------------------------------------------------------------------


def model_for(family: str = 'yolo11', known: bool = False, **options) -> AdaptationModel:
    student = build(family)
    student.args = get_cfg(overrides={'task': 'detect', 'imgsz': 64})
    student.nc = 2
    return AdaptationModel(student, parse({'target': 'x', 'pseudo_labels': ANYTHING, **options}), known).train()


def batch_of(seed: int = 0, size: int = 2) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def images() -> torch.Tensor:
        return torch.rand(size, 3, 64, 64, generator=generator)

    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.5]])
    labels = {'batch_idx': torch.tensor([0.0, 1.0]), 'cls': torch.tensor([[0.0], [1.0]]), 'bboxes': boxes}
    target = {'img': images(), 'translated': images(), COUNTS: [1, 1], **{k: v.clone() for k, v in labels.items()}}
    return {'img': images(), 'translated': images(), 'target': target, **labels}


def task_loss(model: AdaptationModel, images: torch.Tensor, labels: dict) -> torch.Tensor:
    """Of the student, by Ultralytics alone."""
    return model.student_model.loss({**labels, 'img': images})[0].sum()


@pytest.mark.parametrize('family', ['yolo11', 'yolo26'])
@pytest.mark.parametrize('behaviour', ['fixed', 'official'])
def test_the_loss_is_that_of_ssda(family, behaviour):
    model, batch = model_for(family, behaviour=behaviour, pseudo_weight=0.5, styled_weight=0.7), batch_of()
    parts, items = model.loss(batch)
    found = model.pseudo_boxes(batch['target']['translated'])
    assert all(map(len, found))
    source, styled = (task_loss(model, batch[name], batch) for name in ('img', 'translated'))
    pseudo = task_loss(model, batch['target']['img'], labels_of(found, (64, 64)))
    consistency = 2.0 * (source - styled) ** 2
    if behaviour == 'fixed':
        consistency = 1.1 * (source - styled) ** 2 / ((source + styled) / 2)
    torch.testing.assert_close(parts.sum(), source + 0.7 * styled + 0.5 * pseudo + consistency)
    expected = dict(source=source, styled=0.7 * styled, pseudo=0.5 * pseudo, consistency=consistency)
    assert list(items)[:2] == ['box_loss', 'cls_loss'] and list(items)[3:] == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(items[name], value / 2)  # two images


def test_equal_views_are_consistent():
    model, batch = model_for(consistency_weight=100.0, pseudo_weight=0), batch_of()
    batch['translated'] = batch['img'].clone()
    parts, items = model.loss(batch)
    assert float(items['consistency']) == 0
    parts.sum().backward()
    both = [p.grad.clone() for p in model.student_model.parameters() if p.grad is not None]
    model.zero_grad()
    task_loss(model, batch['img'], batch).backward()
    alone = [p.grad for p in model.student_model.parameters() if p.grad is not None]
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)


def test_only_the_student_learns():
    model = model_for(pseudo_weight=1.0, styled_weight=0, consistency_weight=0)
    before = {k: v.clone() for k, v in model.mean_teacher.state_dict().items()}
    for (name, own), (_, other) in zip(
        model.mean_teacher.model.state_dict().items(), model.student_model.state_dict().items(), strict=True
    ):
        assert torch.equal(own, other), name
    model.loss(batch_of())[0].sum().backward()
    assert_equal(before, model.mean_teacher.state_dict())
    assert not any(p.requires_grad or p.grad is not None for p in model.mean_teacher.model.parameters())
    assert not any('teacher' in name for name in model.state_dict())
    assert any(p.grad is not None for p in model.student_model.parameters())


@pytest.mark.parametrize('off', ['pseudo', 'styled'])
def test_parts_that_are_switched_off_are_not_run(off):
    zero = {'pseudo': dict(pseudo_weight=0), 'styled': dict(styled_weight=0, consistency_weight=0)}[off]
    model, batch = model_for(**zero), batch_of()
    runs = []
    model.student_model.register_forward_hook(lambda *_: runs.append(1))
    _, items = model.loss(batch)
    assert len(runs) == 2 and float(items[off]) == 0
    assert bool(model.statistics.report()) == (off != 'pseudo')


def test_a_schedule_of_the_pseudo_labels():
    model, batch = model_for(pseudo_weight=dict(value=1.0, start=0.5)), batch_of()
    found = []
    for progress in (0.0, 0.75):
        model.progress = progress
        found.append(float(model.loss(batch)[1]['pseudo']))
    assert found[0] == 0 and found[1] > 0


def predictions(rng: np.random.Generator, count: int = 60) -> torch.Tensor:
    """``[2, 6, N]`` as a head of two classes makes them: many boxes that overlap, some beyond the edge."""
    centres, sizes = rng.uniform(0, 64, (2, 2, count)), rng.uniform(10, 40, (2, 2, count))
    return torch.from_numpy(np.concatenate([centres, sizes, rng.uniform(0, 1, (2, 2, count))], 1)).float()


def select(prediction: np.ndarray, thresholds: list[float], iou: float, most: int, clip: bool) -> list[tuple]:
    """Greedy suppression, box by box."""
    candidates = []
    for cell in prediction.T:
        x, y, w, h = cell[:4].astype(np.float64)
        box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        box = box.clip(0, 64) if clip else box
        candidates += [(s, c, box) for c, s in enumerate(cell[4:]) if s > thresholds[c]]
    kept: list[tuple] = []
    for score, label, box in sorted(candidates, key=lambda one: -one[0]):
        for _, other_label, other in kept:
            low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
            inter = np.prod((high - low).clip(0))
            union = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - inter
            if label == other_label and inter / union > iou:
                break
        else:
            kept.append((score, label, box))
    return kept[:most]


@pytest.mark.parametrize('behaviour', ['fixed', 'official'])
def test_pseudo_boxes(behaviour, monkeypatch):
    options = dict(score_threshold=[0.3, 0.6], iou_threshold=0.4, max_count=12)
    model = model_for(behaviour=behaviour, pseudo_labels=options)
    raw = predictions(np.random.default_rng(0))
    monkeypatch.setattr('kd_dense.yolo.adaptation_model.one_to_many', lambda *_: raw.clone())
    for found, one in zip(model.pseudo_boxes(torch.zeros(2, 3, 64, 64)), raw.numpy(), strict=True):
        expected = select(one, [0.3, 0.6], 0.4, 12, clip=behaviour == 'fixed')
        assert len(found) == len(expected) > 5
        np.testing.assert_allclose(found.scores, [score for score, _, _ in expected])
        assert found.labels.tolist() == [label for _, label, _ in expected]
        np.testing.assert_allclose(found.boxes, [box for _, _, box in expected], atol=1e-4)


def test_labels_of_pseudo_boxes_are_those_of_ultralytics(monkeypatch):
    model = model_for()
    monkeypatch.setattr(
        'kd_dense.yolo.adaptation_model.one_to_many',
        lambda *_: torch.tensor([[[32.0], [16], [20], [8], [0], [0.9]], [[32], [16], [20], [8], [0], [0]]]),
    )
    labels = labels_of(model.pseudo_boxes(torch.zeros(2, 3, 32, 64)), (32, 64))
    assert labels['batch_idx'].tolist() == [0] and labels['cls'].tolist() == [[1]]
    torch.testing.assert_close(labels['bboxes'], torch.tensor([[0.5, 0.5, 20 / 64, 8 / 32]]))


@pytest.mark.parametrize('empty', ['skip', 'background', 'artificial_box'])
def test_no_box_passes(empty):
    model, batch = model_for(pseudo_labels=dict(score_threshold=1.0, empty=empty), pseudo_weight=1.0), batch_of()
    model.iteration = 7
    runs = []
    model.student_model.register_forward_hook(lambda *_: runs.append(1))
    found = float(model.loss(batch)[1]['pseudo'])
    assert len(runs) == (2 if empty == 'skip' else 3)
    nothing = {'batch_idx': torch.zeros(0), 'cls': torch.zeros(0, 1), 'bboxes': torch.zeros(0, 4)}
    background = float(task_loss(model, batch['target']['img'], nothing)) / 2
    assert {'skip': found == 0, 'background': found == pytest.approx(background)}.get(empty, found > background)
    assert float(model.loss(batch)[1]['pseudo']) == pytest.approx(found)  # what is drawn follows from the iteration
    assert model.statistics.report()['per_image'] == 0


def test_the_official_default_makes_a_box_up_and_the_fixed_one_does_not():
    assert parse({'target': 'x'}).pseudo_labels.empty == 'skip'
    assert parse({'target': 'x', 'behaviour': 'official'}).pseudo_labels.empty == 'artificial_box'


def test_weighting_by_scores():
    hard, soft = (model_for(pseudo_labels=dict(ANYTHING, weighting=w)) for w in ('hard', 'score'))
    batch = batch_of()
    scores = torch.cat([one.scores for one in hard.pseudo_boxes(batch['target']['translated'])])
    ratio = soft.loss(batch)[1]['pseudo'] / hard.loss(batch)[1]['pseudo']
    torch.testing.assert_close(ratio, scores.mean())


def test_labels_of_the_target_are_for_the_log_alone():
    batch, reports, losses = batch_of(), [], []
    for change in (False, True):
        model = model_for(known=True)
        if change:
            (found,) = model.pseudo_boxes(batch['target']['translated'][:1])
            batch['target'].update(labels_of([found, found], (64, 64)), objects_per_image=[len(found)] * 2)
        losses.append(model.loss(batch)[0])
        reports.append(model.statistics.report())
    assert torch.equal(*losses)
    assert reports[1]['precision'] >= 0.5 and reports[0]['precision'] < reports[1]['precision']
    assert 'precision' not in _report_of(model_for(), batch)


def _report_of(model: AdaptationModel, batch: dict) -> dict:
    model.loss(batch)
    return model.statistics.report()


def test_two_branches_give_the_one_to_many_predictions():
    """Also when the one-to-one branch is the one that is validated."""
    model = model_for('yolo26')
    teacher, images = model.mean_teacher.model, torch.rand(1, 3, 64, 64)
    teacher.end2end = True
    found = model.mean_teacher.run(lambda m: one_to_many(m, images))
    head = teacher.model[-1]
    assert found.shape == (1, 4 + 2, 8 * 8 + 4 * 4 + 2 * 2)
    inputs: list = []
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.mean_teacher.run(lambda m: m(images))
    hook.remove()
    with torch.no_grad():
        expected = torch.cat([cls(x).flatten(2) for cls, x in zip(head.cv3, inputs[0], strict=True)], 2).sigmoid()
    torch.testing.assert_close(found[:, 4:], expected)


@pytest.mark.parametrize(('behaviour', 'moved'), [('fixed', True), ('official', False)])
def test_running_statistics_of_the_teacher(behaviour, moved):
    model = model_for(behaviour=behaviour, pseudo_weight=0)
    before = model.mean_teacher.model.model[0].bn.running_mean.clone()
    model.loss(batch_of())
    model.mean_teacher.update(model.student_model)
    assert torch.equal(before, model.mean_teacher.model.model[0].bn.running_mean) != moved


# -- the config --------------------------------------------------------------------------------------------------------


def test_defaults():
    found = parse({'target': 'images'})
    assert (found.pseudo_weight, found.styled_weight, found.consistency_weight) == (0.005, 1.0, 1.1)
    assert found.mean_teacher == {'buffers': 'average'} and found.style == Style('fourier', 0.01)
    official = parse({'target': 'images', 'behaviour': 'official'})
    assert official.consistency_weight == 2.0 and official.mean_teacher == {'buffers': 'keep'}
    assert parse({'target': 'images', 'style': None}).style is None
    assert (found.target_yaml, parse({'target': 'a.yaml'}).target_yaml) == (None, 'a.yaml')


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'targets': 'x'}, r"adaptation: has no option 'targets'; .*'target'"),
        ({'target': None}, r'adaptation\.target: give the folder'),
        ({'style': {'method': 'fourer'}}, r"adaptation\.style\.method: unknown method 'fourer'; .*'fourier'"),
        ({'style': {'beta': 0.7}}, r'adaptation\.style\.beta: must lie between'),
        ({'style': {'strength': 1}}, r"adaptation\.style: .*'strength'"),
        ({'style': 'fourier'}, r"adaptation\.style: must be dict\(method='fourier'\) or None"),
        ({'mean_teacher': {'momentum': 0.9}}, r"adaptation\.mean_teacher: .*'momentum'"),
        ({'mean_teacher': 0.9}, r'adaptation\.mean_teacher: must be a dict'),
        (
            {'pseudo_labels': {'threshold': 0.9}},
            r"adaptation\.pseudo_labels: has no option 'threshold'; ",
        ),
        ({'pseudo_labels': {'score_threshold': 1.5}}, r'adaptation\.pseudo_labels\.score_threshold: must be'),
        ({'pseudo_labels': {'iou_threshold': 2}}, r'adaptation\.pseudo_labels\.iou_threshold: must lie'),
        ({'pseudo_labels': {'max_count': 0}}, r'adaptation\.pseudo_labels\.max_count: must be'),
        ({'pseudo_labels': {'weighting': 'soft'}}, r"weighting: unknown weighting 'soft'"),
        ({'pseudo_labels': {'empty': 'random_box'}}, r"empty: unknown empty 'random_box'"),
        ({'pseudo_weight': 'auto'}, r"adaptation\.pseudo_weight: 'auto' is for distillers"),
        ({'styled_weight': -1}, r'adaptation\.styled_weight: '),
        ({'behaviour': 'offical'}, r"adaptation\.behaviour: unknown behaviour 'offical'; .*'official'"),
        ({'save': 'teacher'}, r"adaptation\.save: unknown save 'teacher'"),
        ({'evaluate_teacher': 'no'}, r'adaptation\.evaluate_teacher: must be True or False'),
        ({'translated_source': 3}, r'adaptation\.translated_source: give a folder'),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse({'target': 'images', **options})


def test_adaptation_and_distillation_exclude_each_other(write_config):
    with pytest.raises(ConfigError, match='adaptation: goes together with neither teacher nor distillers'):
        read(write_config(adaptation={'target': 'images'}))


def test_a_config_without_adaptation(write_config, student_yaml, data):
    with pytest.raises(ConfigError, match=r'config\.py: has no adaptation; add'):
        AdaptationTrainer(overrides={**FAST, 'model': student_yaml(), 'distill_model': str(write_config())})
    with pytest.raises(ConfigError, match='distill_model: give the path of a kd_dense config'):
        AdaptationTrainer(overrides={**FAST, 'model': student_yaml(), 'data': str(data)})


#: Source -> classes in the data that the configs are for.
CLASSES = {'camvid': 3, 'cityscapes': 8, 'voc': 20}
CONFIGS = sorted((Path(__file__).parents[2] / 'configs' / 'adaptation' / 'yolo').glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path, tmp_path):
    config = read(path)
    assert config.adaptation.target_yaml == config.evaluated != config.data
    text = path.read_text()
    command = f'python tools/train.py configs/adaptation/yolo/{path.name}'
    measured = any(said in text.replace('\n# ', ' ') for said in ('No score of these settings is', 'docs/results.md'))
    assert text.startswith('# ') and command in text and measured
    missing = Config.fromfile(path)
    missing.data = str(tmp_path / 'absent.yaml')
    missing.train.device = 'cpu'
    with pytest.raises(ConfigError, match='data: '):
        kd_dense.yolo.train(missing, tmp_path / 'run')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_train(path, student_yaml, tmp_path):
    """Four steps on made data, with everything that the config says but sizes; a large student becomes a small one."""
    config = Config.fromfile(path)
    (classes,) = (count for source, count in CLASSES.items() if f'_{source}-to-' in path.stem)
    names = tuple(f'class {i}' for i in range(classes))
    config.data = str(write_data(tmp_path / 'source', names=names))
    config.adaptation.target = str(write_data(tmp_path / 'target', names=names))
    if config.student != 'configs/demo/yolo_student.yaml':
        config.student = student_yaml()
    config.adaptation.pseudo_labels = {**config.adaptation.get('pseudo_labels', {}), 'score_threshold': 1e-6}
    config.train.update(epochs=1, imgsz=64, batch=2, workers=0, device='cpu', plots=False)
    record = kd_dense.yolo.train(config, tmp_path / 'run')
    (row,) = rows_of(tmp_path / 'run')
    assert (record.name, record.iterations) == ('adapted', 4)
    assert row['train/source'] > 0 and row['train/styled'] > 0 and row['train/pseudo'] > 0
    assert row['train/consistency'] >= 0 and row['pseudo/per_image'] > 0 and 0 <= row['teacher/mAP50-95'] <= 1


# -- bad data ----------------------------------------------------------------------------------------------------------


def empty_folder(folder: Path, data: Path) -> dict:
    (folder / 'empty').mkdir()
    return dict(target=str(folder / 'empty'))


def other_classes(folder: Path, data: Path) -> dict:
    return dict(target=str(write_data(folder / 'other', names=('square', 'disc'))))


def one_translation_missing(folder: Path, data: Path) -> dict:
    images = data.parent / 'images' / 'train'
    translated = translations(folder / 'translated', images, lambda image: image)
    (translated / 'train3.png').unlink()
    return dict(translated_source=str(translated))


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (lambda *_: dict(target='nowhere'), r'adaptation\.target: there is no folder nowhere'),
        (lambda *_: dict(target='nowhere.yaml'), r'adaptation\.target: .*nowhere\.yaml'),
        (empty_folder, r'adaptation\.target: there are no images in .*empty'),
        (other_classes, r'adaptation\.target: has the classes square, disc and the source disc, square; give both'),
        (lambda *_: dict(translated_target='gone'), r'adaptation\.translated_target: there is no folder gone'),
        (one_translation_missing, r'adaptation\.translated_source: .*no translation of .*train3\.png \(1 of 8 images'),
        (
            lambda *_: dict(pseudo_labels=dict(score_threshold=[0.5, 0.5, 0.5])),
            r'adaptation\.pseudo_labels\.score_threshold: has 3 thresholds and the data set 2 classes',
        ),
    ],
)
def test_bad_data(damage, sentence, write_adaptation, data, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        kd_dense.yolo.train(write_adaptation(**damage(tmp_path, data)), tmp_path / 'run')


@pytest.mark.parametrize(('domain', 'content'), [('target', None), ('source', None), ('target', b'no image')])
def test_images_that_go_while_training(write_adaptation, tmp_path, domain, content):
    """One of both domains; a style may be read from it before an image is."""
    folders = {name: write_data(tmp_path / name) for name in ('source', 'target')}
    config = write_adaptation(target=str(folders['target']))
    config.write_text(re.sub('data = .*', f'data = {str(folders["source"])!r}', config.read_text(), count=1))
    broken = tmp_path / domain / 'images' / 'train'

    def damage(trainer):
        for file in broken.iterdir():
            file.unlink()
            if content is not None:
                file.write_bytes(content)

    with calling('on_train_start', damage), pytest.raises(ConfigError) as end:
        kd_dense.yolo.train(config, tmp_path / 'run')
    assert re.search(f'{broken}/train[0-9].png is missing or .*; restore', sentence(end.value))
    assert '\n' not in sentence(end.value)


def test_arguments_that_do_not_go_together(write_adaptation, tmp_path, student_yaml):
    with pytest.raises(ConfigError, match=r'train\.batch: give a number of images'):
        kd_dense.yolo.train(write_adaptation(train=dict(batch=-1)), tmp_path / 'run')
    config = write_adaptation()
    config.write_text(config.read_text().replace(student_yaml(), student_yaml('yolo11', '-seg')))
    with pytest.raises(ConfigError, match="for the task 'segment'; adaptation trains detection models"):
        kd_dense.yolo.train(config, tmp_path / 'run')


# -- runs --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def calling(event: str, action):
    """Inside, ``action(trainer)`` is called at every ``event`` of a trainer."""
    original = AdaptationTrainer.run_callbacks

    def run_callbacks(self, name):
        original(self, name)
        if name == event:
            action(self)

    with mock.patch.object(AdaptationTrainer, 'run_callbacks', run_callbacks):
        yield


def test_two_epochs(write_adaptation, data, target, tmp_path, caplog):
    """Images of other sizes, a YAML as the target, colours on the way, gradients of two batches in a step."""
    students, teachers, finals = [], [], {}
    original = AdaptationTrainer.after_step

    def after_step(self):
        original(self)
        students.append({k: v.clone() for k, v in self.joined.student_model.state_dict().items()})
        teachers.append({k: v.clone() for k, v in self.joined.mean_teacher.model.state_dict().items()})

    def begin(trainer):
        finals['begin'] = {k: v.clone() for k, v in trainer.joined.student_model.state_dict().items()}

    def end(trainer):
        finals['files'] = trainer.validator.dataloader.dataset.im_files
        finals['average'] = {k: v.clone() for k, v in trainer.ema.ema.student_model.state_dict().items()}
        finals['batches'] = len(trainer.train_loader)

    train = dict(epochs=2, nbs=4, warmup_epochs=0)
    config = write_adaptation(style=dict(method='color'), mean_teacher=dict(decay=0.8), train=train)
    with (
        mock.patch.object(AdaptationTrainer, 'after_step', after_step),
        calling('on_train_start', begin),
        calling('on_fit_epoch_end', end),
    ):
        record = kd_dense.yolo.train(config, tmp_path / 'run')
    # 8 and 6 images in batches of 2: floor((4 + 3) / 2) = 3 a epoch, a step every second one.
    assert finals['batches'] == 3 and record.iterations == 6 and len(students) == 3
    expected = finals['begin']
    for student, teacher in zip(students, teachers, strict=True):
        for name, value in student.items():
            if value.is_floating_point():
                expected[name] = 0.8 * expected[name] + 0.2 * value
                torch.testing.assert_close(teacher[name], expected[name], rtol=1e-5, atol=1e-7)
            else:
                assert torch.equal(teacher[name], value)
    assert all(str(target.parent) in path for path in finals['files'])
    rows = rows_of(tmp_path / 'run')
    for row in rows:
        assert row['train/source'] > 0 and row['train/styled'] > 0 and row['train/pseudo'] > 0
        assert row['train/consistency'] >= 0 and row['pseudo/per_image'] > 0 and 0 < row['pseudo/score'] < 1
        assert 0 <= row['pseudo/precision'] <= 1 and 0 <= row['teacher/mAP50-95'] <= 1
    assert (record.name, record.metric, len(record.curve), record.extra_parameters) == ('adapted', 'mAP50-95', 2, 0)
    said = re.findall(r'pseudo labels: (per_image .*)', caplog.text)
    assert len(said) == 2 and all(f', count.{name} ' in line for line in said for name in ('disc', 'square'))
    # A plain student, which loads and predicts where kd_dense can not be imported.
    text = subprocess.run(
        [sys.executable, '-c', PLAIN, record.checkpoint], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert len(json.loads(text.splitlines()[-1])[record.checkpoint]) > 0
    saved = torch_load(record.checkpoint, map_location='cpu')
    assert saved.get('kd_dense') is None
    for name, value in saved['model'].state_dict().items():
        assert torch.equal(value, finals['average'][name].half() if value.is_floating_point() else value), name
    assert kd_dense.yolo.evaluate(config, record.checkpoint)['metrics/mAP50-95(B)'] >= 0


def test_accumulation_gives_the_teacher_of_a_large_batch(student_yaml, tmp_path):
    """Two batches of two in a step, or one of four; of images that are all alike, so that their order is no matter.

    Ultralytics divides a loss by the scores of its targets, unless they sum to less than 1, and multiplies it by the
    number of images. The objects are as large as what an untrained model predicts, so that the scores are more.
    """
    folders = {}
    for number, domain in enumerate(('source', 'target')):
        folders[domain] = tmp_path / domain
        data = write_data(folders[domain])
        files = sorted((folders[domain] / 'images' / 'train').iterdir())
        content = files[2 + number].read_bytes()
        for file in files:
            file.write_bytes(content)
        for file in (folders[domain] / 'labels' / 'train').iterdir():
            file.write_text('0 0.5 0.5 0.94 0.94\n1 0.45 0.5 0.86 0.9')
    as_they_are = dict.fromkeys(('mosaic', 'hsv_h', 'hsv_s', 'hsv_v', 'fliplr', 'translate', 'scale'), 0.0)
    original = AdaptationTrainer.join
    found = []

    def join(self, student):
        for module in student.modules():  # statistics of two batches are other ones than of both
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        return original(self, student)

    def begin(trainer):
        found[-1]['begin'] = copied(trainer.joined.student_model)

    def finish(trainer):
        teacher = trainer.joined.mean_teacher
        found[-1].update(teacher=copied(teacher.model), updates=teacher.updates)
        found[-1].update(student=copied(trainer.joined.student_model), pseudo=float(trainer.tloss['pseudo']))

    for batch in (2, 4):
        found.append({})
        config = tmp_path / f'{batch}.py'
        adaptation = dict(target=str(data), pseudo_labels=ANYTHING, pseudo_weight=1.0, mean_teacher=dict(decay=0.7))
        train = {**FAST, **as_they_are, 'epochs': 2, 'imgsz': 128, 'nbs': 4, 'batch': batch, 'val': False}
        values = dict(student=student_yaml(), data=str(folders['source'] / 'data.yaml'), train=train)
        values['adaptation'] = dict(adaptation, evaluate_teacher=False)
        config.write_text('\n'.join(f'{k} = {v!r}' for k, v in values.items()))
        with (
            mock.patch.object(AdaptationTrainer, 'join', join),
            calling('on_train_start', begin),
            calling('on_train_epoch_end', finish),
            mock.patch.object(AdaptationTrainer, 'final_eval'),
        ):
            kd_dense.yolo.train(config, tmp_path / f'run{batch}')
    small, large = found
    assert small['updates'] == large['updates'] == 4 and small['pseudo'] > 0
    assert small['pseudo'] == pytest.approx(large['pseudo'], rel=1e-3)
    assert_equal(small['begin'], large['begin'])
    for side in ('student', 'teacher'):
        moved = 0.0
        for name, value in large[side].items():
            if name.endswith('num_batches_tracked'):
                continue
            torch.testing.assert_close(small[side][name], value, rtol=0, atol=3e-4, msg=f'{side} {name}')
            moved = max(moved, float((value - large['begin'][name]).abs().max()))
        assert moved > 1e-2, side


def test_the_mean_teacher_is_saved(write_adaptation, data, tmp_path):
    """Of a folder without labels: nothing is known about precision, and validation is that of the source.

    Validated once, at the end, and taught from the second epoch on: columns of what was not measured are nan.
    """
    images = tmp_path / 'images'
    shutil.copytree(data.parent / 'images' / 'train', images)
    finals = {}

    def end(trainer):
        finals['teacher'] = {k: v.clone() for k, v in trainer.joined.mean_teacher.model.state_dict().items()}
        finals['files'] = trainer.validator.dataloader.dataset.im_files

    late = dict(value=1.0, start=0.5)
    train = dict(epochs=2, val=False)
    config = write_adaptation(
        target=str(images), save='mean_teacher', style=None, behaviour='official', pseudo_weight=late, train=train
    )
    with calling('on_fit_epoch_end', end):
        record = kd_dense.yolo.train(config, tmp_path / 'run')
    saved = torch_load(record.checkpoint, map_location='cpu')['model']
    for name, value in saved.state_dict().items():
        assert torch.equal(value, finals['teacher'][name].half() if value.is_floating_point() else value), name
    assert not hasattr(saved, 'teacher_model') and all(str(data.parent) in path for path in finals['files'])
    first, last = rows_of(tmp_path / 'run')
    assert 'teacher/mAP50-95' not in first and 'pseudo/precision' not in first and first.keys() == last.keys()
    for name in ('student/mAP50-95', 'pseudo/per_image'):
        assert math.isnan(first[name]) and last[name] >= 0
    assert first['train/pseudo'] == 0 and last['train/pseudo'] > 0
    assert last['train/styled'] == last['train/consistency'] == 0


#: Three epochs, of which a step every three batches ends none; translations read and made; the first has mosaics.
THREE_EPOCHS = dict(epochs=3, batch=4, nbs=12, close_mosaic=2, warmup_epochs=1)


def start(config: Path, folder: Path, kill_in: int | None = None) -> int:
    """Train in a process of its own, which leaves its last state in ``end.pth``."""

    def finish(trainer):
        if trainer.epoch == 2:
            joined = trainer.joined
            state = {'model': joined.state_dict(), 'ema': trainer.ema.ema.state_dict()}
            state.update(teacher=joined.mean_teacher.state_dict(), optimizer=trainer.optimizer.state_dict())
            torch.save(state, folder / 'end.pth')

    def kill(trainer):
        if trainer.epoch == kill_in:
            kill_myself()

    def action():
        with calling('on_fit_epoch_end', finish), calling('on_train_batch_end', kill):
            kd_dense.yolo.train(config, folder, resume=True)

    return in_a_fork(action, folder.with_suffix('.log'))


@pytest.mark.parametrize('save', ['student', pytest.param('mean_teacher', marks=pytest.mark.slow)])
def test_killed_and_resumed(write_adaptation, data, tmp_path, save):
    images = data.parent / 'images' / 'train'
    folder = translations(tmp_path / 'translated', images, lambda image: 255 - image)
    config = write_adaptation(translated_source=str(folder), save=save, evaluate_teacher=False, train=THREE_EPOCHS)
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert start(config, whole) == 0, whole.with_suffix('.log').read_text()[-3000:]
    assert start(config, part, kill_in=2) == -9
    assert start(config, part) == 0, part.with_suffix('.log').read_text()[-3000:]
    assert_equal(torch.load(whole / 'end.pth'), torch.load(part / 'end.pth'))
    assert 'Resuming training' in part.with_suffix('.log').read_text()


def test_source_only_has_as_many_steps(write_adaptation, tmp_path, target):
    """The baseline sees the same source images in the same order, and is validated on the target."""
    seen: dict = {}

    def note(self, batch, original):
        seen.setdefault(type(self).__name__, []).append(batch['im_file'])
        return original(self, batch)

    config = write_adaptation(train=dict(mosaic=0.0))
    with contextlib.ExitStack() as stack:
        for kind in (AdaptationTrainer, SourceTrainer):
            original = kind.preprocess_batch
            stack.enter_context(
                mock.patch.object(kind, 'preprocess_batch', lambda s, b, original=original: note(s, b, original))
            )
        kd_dense.yolo.train(config, tmp_path / 'a')
        alone = kd_dense.yolo.train(config, tmp_path / 'b', distill=False)
    assert seen['AdaptationTrainer'] == seen['SourceTrainer'] and len(seen['SourceTrainer']) == 3
    assert (alone.name, alone.iterations) == ('student', 3)
    (row,) = rows_of(tmp_path / 'b')
    assert 'train/source' not in row and 'teacher/mAP50-95' not in row
    assert torch_load(alone.checkpoint)['train_args']['distill_model'] == str(tmp_path / 'b' / 'config.py')


@pytest.mark.slow
def test_the_tools(write_adaptation, tmp_path, capsys):
    """Source only and adapted are compared, and the checkpoint exported; there is no teacher to examine."""
    spec = importlib.util.spec_from_file_location('compare_tool', Path(__file__).parents[2] / 'tools' / 'compare.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    config, out = write_adaptation(), tmp_path / 'out'
    tool.main([str(config), '--work-dir', str(out), '--seeds', '0', '--examples', '1'])
    said = ' '.join(capsys.readouterr().out.split())
    assert 'run 1 of 2: source only, seed 0' in said and 'run 2 of 2: adapted, seed 0' in said
    assert 'source only with seed 0' in said and 'example images' not in said
    text = (out / 'comparison.md').read_text(encoding='utf-8')
    assert '| source only |' in text and '| adapted |' in text and (out / 'comparison.png').is_file()
    assert 'student alone' not in text and 'distill' not in text
    checkpoint = out / 'adapted' / 'seed_0' / 'weights' / 'last.pt'
    options = ExportOptions(format='pth', out=str(tmp_path / 'student.pt'), images='1')
    assert export_any(load_config(str(config)), str(checkpoint), options).equal
    with pytest.raises(ConfigError, match='adaptation: this is an adaptation, whose teacher is the moving average'):
        YoloToolbox(config).check_config()


def test_variants_are_compared_with_one_baseline(write_adaptation):
    """Other styles and weights leave the baseline as it is; another target does not."""
    options = dict(one=dict(pseudo_weight=1.0, style=None), two=dict(behaviour='official'), other=dict(target='images'))
    configs = [load_config(str(write_adaptation(f'{name}.py', **values))) for name, values in options.items()]
    alone = [student_alone(cfg) for cfg in configs]
    assert alone[0].to_dict() == alone[1].to_dict() != alone[2].to_dict()
    assert read(alone[0]).adaptation.pseudo_weight == 0.005 != read(configs[0]).adaptation.pseudo_weight


def trainer_of(config: Path, folder: Path, **arguments) -> AdaptationTrainer:
    """With its model and the loader of its training, as Ultralytics sets it up."""
    settings = read(config)
    place = dict(project=str(folder), name='run', model=settings.student, data=settings.data)
    trainer = AdaptationTrainer(overrides={**settings.train, **place, 'distill_model': str(config), **arguments})
    trainer.setup_model()
    trainer.stride = 32
    trainer.train_loader = trainer.get_dataloader(trainer.data['train'], trainer.batch_size, -1, 'train')
    return trainer


def test_domains_are_not_drawn_in_one_order(write_adaptation, data, tmp_path):
    """Both of one size, as when the target shows the scenes of the source in fog."""
    trainer = trainer_of(write_adaptation(target=str(data)), tmp_path)
    batches = list(trainer.train_loader)
    source, target = (sum((one['im_file'] for one in side), ()) for side in (batches, [b['target'] for b in batches]))
    assert len(source) == 8 and sorted(source) == sorted(target) and source != target


def test_one_size_for_both_domains(write_adaptation, tmp_path):
    trainer = trainer_of(write_adaptation(), tmp_path, multi_scale=0.5, imgsz=96)
    sizes = []
    for batch in trainer.train_loader:
        batch = trainer.preprocess_batch(batch)
        images = (batch['img'], batch['translated'], batch['target']['img'], batch['target']['translated'])
        assert len({image.shape for image in images}) == 1
        assert all(image.shape[1] == 3 and image.min() >= 0 and image.max() <= 1 for image in images)
        sizes.append(images[0].shape[-1])
    assert len(set(sizes)) > 1


def test_the_processes_of_several_gpus_build_the_same_trainer(write_adaptation, tmp_path):
    from ultralytics.utils import DEFAULT_CFG_DICT

    trainer = trainer_of(write_adaptation(), tmp_path)
    script = Path(generate_ddp_file(trainer))
    try:
        state = torch_load(script.with_suffix('.pt'), map_location='cpu')
    finally:
        script.unlink()
        script.with_suffix('.pt').unlink()
    again = state['trainer'](cfg={**DEFAULT_CFG_DICT, 'save_dir': ''}, overrides=state['args'], _callbacks={})
    assert type(again) is AdaptationTrainer and isinstance(again.options, Adaptation)
    assert again.options == trainer.options


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='two processes on the CPU; Ultralytics would choose GPUs')
@pytest.mark.parametrize('save', ['student', 'mean_teacher'])
def test_two_processes(write_adaptation, tmp_path, save):
    """A whole run in two processes: shares of both domains, one teacher, a plain checkpoint, and scores."""
    train = dict(epochs=2, batch=4, nbs=4)
    config = write_adaptation(mean_teacher=dict(decay=0.8), pseudo_weight=1.0, save=save, train=train)
    root, folder = Path(__file__).parents[2], tmp_path / 'run'
    environment = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(root))
    command = ['torch.distributed.run', '--nproc_per_node=2', '--rdzv-backend=c10d', '--rdzv-endpoint=localhost:0']
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', *command, '-m', 'tests.yolo.two_processes', str(config), str(folder)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f'end_{rank}.pth') for rank in (0, 1))
    assert (first['record'], second['record']) == (True, False)
    # what belongs to the run is written by the first process alone
    assert first['config'] == (str(folder), True) and second['config'] != first['config'] and not second['config'][1]
    for one in (first, second):
        assert one['wrapper'] == 'DistributedDataParallel' and one['parameters'] == sum(
            p.numel() for p in build('yolo11').parameters()
        )
    # 8 and 6 images: two batches of 2 and 2 of a process in an epoch, no image of the source twice
    for epoch in range(2):
        source = [sum((images for e, images, _ in one['images'] if e == epoch), []) for one in (first, second)]
        assert [len(set(images)) for images in source] == [4, 4] and not set(source[0]) & set(source[1])
    target = [set(sum((images for _, _, images in one['images']), [])) for one in (first, second)]
    assert target[0] != target[1] and len(target[0] | target[1]) == 6
    # one teacher, the moving average of the students: equal weights, and running statistics that differ
    assert len(first['teachers']) == 4
    assert_equal(first['begin'], second['begin'])
    assert_equal(first['teachers'], second['teachers'])
    expected, differ = dict(first['begin']), 0
    for teacher, *students in zip(first['teachers'], first['students'], second['students'], strict=True):
        for name, (own, other) in ((name, [student[name] for student in students]) for name in teacher):
            if not own.is_floating_point():
                assert torch.equal(teacher[name], own)
                continue
            differ += not torch.equal(own, other)
            assert 'running' in name or torch.equal(own, other), name
            expected[name] = 0.8 * expected[name] + 0.2 * (own + other) / 2
            torch.testing.assert_close(teacher[name], expected[name], rtol=1e-5, atol=1e-7)
    assert differ > 100 and not torch.equal(*(first['teachers'][i]['model.0.conv.weight'] for i in (0, 3)))
    # what is saved and scored
    checkpoint = folder / 'weights' / 'last.pt'
    saved = torch_load(checkpoint, map_location='cpu')
    weights = first['average'] if save == 'student' else first['teachers'][-1]
    assert saved.get('kd_dense') is None and type(saved['model']).__name__ == 'DetectionModel'
    for name, value in saved['model'].state_dict().items():
        assert torch.equal(value, weights[name].half() if value.is_floating_point() else weights[name]), name
    text = subprocess.run(
        [sys.executable, '-c', PLAIN, checkpoint], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert len(json.loads(text.splitlines()[-1])[str(checkpoint)]) > 0
    rows = rows_of(folder)
    other = 'teacher' if save == 'student' else 'student'
    assert len(rows) == 2 and all(0 <= row[f'{other}/mAP50-95'] <= 1 and row['pseudo/per_image'] > 0 for row in rows)
    assert len(json.loads((folder / 'record.json').read_text())['curve']) == 2
