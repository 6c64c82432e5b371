"""Training detectors from a part of their teacher's class logits, and what is refused."""

import copy
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from kd_dense import ConfigError, Distillation
from kd_dense.cache import acceptance, use_cache
from kd_dense.cache.live import LiveOutputs
from kd_dense.cache.store import StoredCache
from kd_dense.cache.verify import verify
from kd_dense.cache.write import write_cache
from kd_dense.description import Logits
from kd_dense.distillers import LogitKD
from tests.cache.conftest import OPTIONS, changed, with_cache
from tests.cache.test_sparse import detector_like, kept
from tests.cache.test_training import losses, on_the_same_views
from tests.helpers import tiny

SPARSE = replace(OPTIONS, anchors=30, top_k=3, shard_bytes=2_000)


@pytest.fixture(scope='module')
def build(scenes, tmp_path_factory):
    """Kind -> a detection config, crops of many sizes; the teacher's class scores differ from place to place."""
    folder = tmp_path_factory.mktemp('sparse')

    def config(kind='GFL', layer='gfl_cls', divisor=64, distillers=None):
        student, teacher = tiny.detector(kind), tiny.detector(kind, width=8)
        student['data_preprocessor']['pad_size_divisor'] = teacher['data_preprocessor']['pad_size_divisor'] = divisor
        path = tiny.saved(teacher, folder / f'{kind}.pth')
        saved = torch.load(path, weights_only=False)
        # [A * C, ...]: two classes that it sees in some places, and four that it sees nowhere
        saved['state_dict'][f'bbox_head.{layer}.weight'].unflatten(0, (-1, 6))[:, :2] *= 150
        torch.save(saved, path)
        model = dict(
            type='kd_dense.Distillation',
            student=student,
            teacher=dict(config=teacher, checkpoint=path),
            distillers=distillers or dict(logits=dict(type='LogitKD')),
        )
        cfg = tiny.detection_run(model, scenes, epochs=1)
        crop = dict(type='RandomCrop', crop_type='absolute_range', crop_size=(30, 64), allow_negative_crop=True)
        cfg.train_dataloader.dataset.pipeline.insert(2, crop)
        cfg.train_dataloader.dataset.serialize_data = False
        cfg.custom_hooks = [dict(type='kd_dense.DistillationHook', score_teacher=False)]
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        return cfg

    return config


def start(cfg):
    """What a run does before its first iteration."""
    cfg = use_cache(cfg)
    model = Distillation(**{key: cfg.model[key] for key in ('student', 'teacher', 'distillers')})
    return verify(cfg, model, Runner.build_dataloader(cfg.train_dataloader, seed=0))


def check_near(again, live, folder, rtol=0.02):
    """The loss is lower by the entropy of the scores that became one; the student's gradient is nearly the same."""
    assert np.allclose(again['kd.logits.loss'], live['kd.logits.loss'], rtol=0.2)
    lines = {name: (folder / name).glob('*/vis_data/scalars.json') for name in ('live', 'cached')}
    norms = {name: [json.loads(s)['grad_norm'] for s in next(f).read_text().splitlines()] for name, f in lines.items()}
    assert len(norms['live']) == 4 and np.allclose(norms['cached'], norms['live'], rtol=rtol)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind, layer', [('GFL', 'gfl_cls'), ('RetinaNet', 'retina_cls')])
def test_losses__are_near_those_of_the_live_teacher(build, tmp_path, kind, layer):
    """RetinaNet has three anchors per cell. The boxes of GFL are kept whole."""
    distillers = dict(logits=dict(type='LogitKD'), boxes=dict(type='LocalizationKD'))
    cfg = build(kind, layer, distillers=distillers)
    manifest = write_cache(cfg, str(tmp_path / 'cache'), SPARSE)
    assert manifest.top_k == {'logits': [3, 6, 30]}
    anchors = {'GFL': 1, 'RetinaNet': 3}[kind]
    record = StoredCache.load(tmp_path / 'cache').read(3, 1).tensors
    assert record['t0_0'].shape == (anchors, 0, 8, 8) and record['t0_v'].shape == (3, 30)
    assert record['t1_0'].shape[1:] == (8, 8) and record['t1_0'].numel() == record['t1_0'].shape[0] * 64
    live = losses(on_the_same_views(cfg), tmp_path / 'live')
    again = losses(with_cache(cfg, tmp_path / 'cache'), tmp_path / 'cached')
    assert len(live['kd.logits.loss']) == 4 and set(again) == set(live)
    for name, values in live.items():
        assert name in ('loss', 'kd.logits.loss') or np.allclose(again[name], values, rtol=5e-3), name
    check_near(again, live, tmp_path)
    assert (again['kd.logits.loss'] < live['kd.logits.loss']).all()


def test_several_canvases__are_padded_to_one(build, tmp_path):
    cfg = build(divisor=16)
    cfg.train_dataloader.update(num_workers=1, persistent_workers=True)
    write_cache(cfg, str(tmp_path / 'cache'), SPARSE)
    sizes = {StoredCache.load(tmp_path / 'cache').read(i, v).tensors['t0_0'].shape for i in range(8) for v in range(2)}
    assert len(sizes) > 1
    live = losses(on_the_same_views(cfg), tmp_path / 'live')
    again = losses(with_cache(cfg, tmp_path / 'cache'), tmp_path / 'cached')
    check_near(again, live, tmp_path, rtol=0.05)  # a live teacher also sees padding beyond smaller images


# -- acceptance --------------------------------------------------------------------------------------------------------


class Fixed(LiveOutputs):
    """Gives the same logits for every sample."""

    def __init__(self, levels):
        super().__init__(['logits'])
        self.levels = levels

    def prepared(self, sample):
        return {'inputs': torch.zeros(1, 3, 64, 64)}

    def run(self, group):
        return {'logits': [x[None] for x in self.levels]}


def test_changes__of_a_student_near_its_teacher__by_the_formula():
    """``g = (sigmoid(s) - p) / sum max p``, ``L`` of two Bernoulli distributions; in fp64."""
    levels = detector_like(((1, 8, 8), (1, 4, 4)), 6)
    method = LogitKD()
    method.logits = Logits(6, 'sigmoid')
    distillers = SimpleNamespace(methods={'kd': method}, by_role=lambda name, side, values: values)
    top_k = {'logits': (2, 6, 12), 'another': (1, 2)}
    (found,) = acceptance.changes(distillers, Fixed(levels), [{}], top_k)
    noise = torch.Generator().manual_seed(0)
    s = torch.cat([(x + torch.randn((1, *x.shape), generator=noise)[0]).flatten(1) for x in levels], 1).double()
    values = []
    for teacher in (levels, kept(levels, 2, 6, 12)):
        p, q = torch.cat([x.double().sigmoid().flatten(1) for x in teacher], 1), s.sigmoid()
        divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        divisor = max(1.0, p.amax(0).sum().item())
        values.append((divergence.sum() / divisor, (q - p) / divisor))
    (loss, gradient), (other, changed) = values
    assert found.name == 'kd'
    assert found.loss == pytest.approx(abs(float(other / loss) - 1), rel=1e-3)
    assert found.gradient == pytest.approx(float((changed - gradient).norm() / gradient.norm()), rel=1e-4)
    assert 0.01 < found.gradient < 0.5


def test_changes__do_not_touch_the_random_state():
    method = LogitKD()
    method.logits = Logits(6, 'sigmoid')
    distillers = SimpleNamespace(methods={'kd': method}, by_role=lambda name, side, values: values)
    before = torch.get_rng_state()
    one, two = (
        acceptance.changes(distillers, Fixed(detector_like(((1, 8, 8),), 6)), [{}], {'logits': (2, 6, 12)})
        for _ in range(2)
    )
    assert one == two and torch.equal(torch.get_rng_state(), before)


def test_too_much_change__one_sentence(build, tmp_path):
    cfg = build(distillers=dict(kd=dict(type='LogitKD', temperature=8.0)))
    with pytest.raises(
        ConfigError,
        match=r'^--anchors 5 --top-k 1 changes the gradient of distillers\.kd by [\d.]+% and its loss by [\d.]+%, for '
        'a student near its teacher, and 10% of the gradient are accepted; keep more .*, or lower its temperature',
    ):
        write_cache(cfg, str(tmp_path), replace(SPARSE, anchors=5, top_k=1))
    assert not (tmp_path / 'cache.json').exists()


def test_softmax__is_judged_alike():
    """One class of seven says too little of them; six leave out the least one, which a low temperature does not see."""
    method = LogitKD()
    method.logits = Logits(7, 'softmax')
    distillers = SimpleNamespace(methods={'kd': method}, by_role=lambda name, side, values: values)
    live = Fixed([torch.randn(7, 8, 8, generator=torch.Generator().manual_seed(0)) * 2])
    with pytest.raises(
        ConfigError, match=r'^few changes the gradient of distillers\.kd by .*10% of the gradient are acc'
    ):
        acceptance.accepted(distillers, live, [{}], {'logits': (1, 7)}, 'few')
    (sentence,) = acceptance.accepted(distillers, live, [{}], {'logits': (6, 7)}, 'most')
    assert re.fullmatch(r'most changes the gradient of distillers\.kd by 0\.\d+% and its loss by .*', sentence)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_nothing_saved__one_sentence(build, tmp_path):
    with pytest.raises(ConfigError, match=r'--anchors 80: takes \d+ bytes for 8 views, and all class logits take \d+'):
        write_cache(build(), str(tmp_path), replace(OPTIONS, anchors=80))


@pytest.mark.parametrize(
    'distillers, options, sentence',
    [
        (None, dict(top_k=2), r'--top-k: the classes of this sigmoid head .*; add --anchors, such as --anchors 300'),
        (None, dict(anchors=0), r'--anchors: must be at least 1, not 0'),
        (None, dict(anchors=9, top_k=7), r'--top-k: must be from 1 to the 6 classes of the teacher, not 7'),
        (dict(nfd=dict(type='NFD', taps='neck')), dict(anchors=9), r"--anchors: needs a distiller that taps 'logits'"),
        (
            dict(kd=dict(type='LogitKD'), native=dict(type='Native', scores='logits')),
            dict(anchors=9),
            r'--anchors: distillers\.native \(Native\) needs all of the class logits, and only a part is kept; write',
        ),
        (
            dict(boxes=dict(type='LocalizationKD', scores='teacher')),
            dict(anchors=9),
            r'--anchors: distillers\.boxes \(LocalizationKD\) needs all of the class logits',
        ),
    ],
)
def test_anchors__where_they_can_not_work__one_sentence(build, tmp_path, distillers, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        write_cache(build(distillers=distillers), str(tmp_path), replace(OPTIONS, **options))


def test_softmax_head__one_sentence(config, tmp_path):
    cfg = copy.deepcopy(config)
    del cfg.model.distillers.mimic
    with pytest.raises(ConfigError, match=r'--anchors: is for sigmoid heads, and that of this teacher has a softmax'):
        write_cache(cfg, str(tmp_path), replace(OPTIONS, anchors=9))


def test_softmax_head_with_several_anchors__one_sentence(build, tmp_path):
    """Its channels are no probabilities of one place."""
    cfg = build('RetinaNet', 'retina_cls')
    for model in (cfg.model.student, cfg.model.teacher.config):
        model.bbox_head.loss_cls = dict(type='CrossEntropyLoss', use_sigmoid=False)
    cfg.model.teacher.checkpoint = tiny.saved(cfg.model.teacher.config.to_dict(), tmp_path / 'teacher.pth')
    with pytest.raises(ConfigError, match=r'--top-k: the softmax head of this teacher has several anchors per cell'):
        write_cache(cfg, str(tmp_path), replace(OPTIONS, top_k=2))


def test_another_training_from_the_same_cache__is_judged_anew(build, tmp_path):
    cfg = build()
    write_cache(cfg, str(tmp_path / 'cache'), SPARSE)
    cfg = with_cache(cfg, tmp_path / 'cache')
    start(cfg)
    hot = changed(cfg, **{'model.distillers.logits.temperature': 20.0})
    with pytest.raises(ConfigError, match=r'teacher\.cache: what .* keeps of the class logits changes the gradient of'):
        start(hot)
    cfg.model.distillers.other = dict(type='CWD', taps='logits')
    with pytest.raises(ConfigError, match=r'teacher\.cache: distillers\.other \(CWD\) needs all of the class logits'):
        start(cfg)


def test_damaged_teacher__is_found_by_its_probabilities(build, tmp_path, monkeypatch):
    cfg = build()
    write_cache(cfg, str(tmp_path / 'cache'), SPARSE)
    saved = torch.load(cfg.model.teacher.checkpoint, weights_only=False)
    saved['state_dict']['bbox_head.gfl_cls.weight'] *= 1.2
    torch.save(saved, tmp_path / 'other.pth')
    monkeypatch.setattr('kd_dense.cache.fingerprint.file_hash', lambda checkpoint: None)
    with pytest.raises(ConfigError, match=r"at the tap 'logits' cached and live outputs differ by .*%"):
        start(with_cache(changed(cfg, **{'model.teacher.checkpoint': str(tmp_path / 'other.pth')}), tmp_path / 'cache'))
