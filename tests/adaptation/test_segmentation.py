"""Mean-teacher adaptation of a small segmentor: the terms, the teacher's moves, checkpoints, resume, bad input."""

import contextlib
import copy
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import PixelData

from kd_dense import checkpoint
from kd_dense.adaptation.paired import PairedDataset
from kd_dense.adaptation.pseudo_maps import pseudo_label_map
from kd_dense.adaptation.style import match_statistics
from kd_dense.data.weather import write_weather
from kd_dense.engine import AdaptationHook
from kd_dense.engine.run import evaluate, load_config, student_alone, train
from kd_dense.errors import ConfigError, sentence
from kd_dense.losses.adaptation import style_consistency
from kd_dense.models import MeanTeacherAdaptation
from kd_dense.models.build import build_model, model_config
from tests.helpers import tiny
from tests.helpers.processes import assert_equal, in_a_fork, kill_myself

FOLDERS = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')


@pytest.fixture(scope='module')
def domains(tmp_path_factory):
    """Scenes, and others that are pale and bright."""
    root = tmp_path_factory.mktemp('domains')
    source, target = tiny.scenes(root / 'source'), tiny.scenes(root / 'target')
    for file in target.rglob('*_leftImg8bit.png'):
        image = cv2.imread(str(file)).astype(np.float32) * 0.5 + 110
        file.unlink()  # it may be linked
        cv2.imwrite(str(file), image.astype(np.uint8))
    return source, target


def adaptation_config(domains, iterations=4, labelled_target=True, **model):
    source, target = map(str, domains)
    model = dict(dict(type='kd_dense.MeanTeacherAdaptation', student=tiny.segmentor(4)), **model)
    cfg = tiny.segmentation_run(model, source, iterations, interval=2)
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    geometry = [dict(type='RandomCrop', crop_size=(48, 48)), dict(type='RandomFlip', prob=0.5)]
    pack = [dict(type='PackSegInputs')]
    styled = dict(type='kd_dense.StyleTransfer', folder=f'{target}/leftImg8bit/train', method='color')
    back = dict(type='kd_dense.StyleTransfer', folder=f'{source}/leftImg8bit/train', method='color')
    data = dict(type='kd_dense.SceneDataset')
    shared = [load[0], *geometry] if not labelled_target else [*load, *geometry]
    cfg.train_dataloader.dataset = dict(
        type='kd_dense.PairedDataset',
        source=dict(
            data,
            data_root=source,
            data_prefix=FOLDERS,
            pipeline=[
                dict(type='kd_dense.Views', shared=[*load, *geometry], views=dict(source=pack, styled=[styled, *pack]))
            ],
        ),
        target=dict(
            data,
            data_root=target,
            data_prefix=FOLDERS if labelled_target else dict(img_path=FOLDERS['img_path']),
            pipeline=[
                dict(
                    type='kd_dense.Views',
                    shared=shared,
                    views=dict(target=[dict(type='PhotoMetricDistortion'), *pack], teacher=[back, *pack]),
                )
            ],
        ),
    )
    for part in ('val_dataloader', 'test_dataloader'):
        cfg[part].dataset.data_root = target
    cfg.custom_hooks = [dict(type='kd_dense.AdaptationHook', interval=2)]
    return cfg


def batch(count=2, views=('source', 'styled', 'target', 'teacher'), alike=False):
    torch.manual_seed(0)
    found = {'inputs': {}, 'data_samples': {}}
    for view in views:
        one = tiny.segmentation_batch(count)
        if alike and view in ('styled', 'teacher'):
            first = {'styled': 'source', 'teacher': 'target'}[view]
            one = {key: copy.deepcopy(found[key][first]) for key in found}
        for key in found:
            found[key][view] = one[key]
    return found


def model_for(**options):
    torch.manual_seed(0)
    options = dict(pseudo_labels=dict(threshold=0.87)) | options
    model = MeanTeacherAdaptation(tiny.segmentor(4), **options)
    model.init_weights()
    with torch.no_grad():
        model.student.decode_head.conv_seg.weight *= 100  # some pixels are surer than others
    model.student.decode_head.dropout = None  # what is drawn would differ from forward to forward
    model.mean_teacher.reset(model.student)
    model.progress = 0.5
    return model


def losses(model, data):
    data = model.data_preprocessor(copy.deepcopy(data), True)
    return model(**data, mode='loss'), data


@pytest.mark.parametrize('behaviour', ['fixed', 'official'])
def test_terms_are_those_of_the_student_alone(behaviour):
    model, data = model_for(behaviour=behaviour, pseudo_weight=0.3, styled_weight=0.7, consistency_weight=2.0), batch()
    found, seen = losses(model, data)
    stock = copy.deepcopy(model.student)

    def alone(view, samples=None):
        samples = samples or seen['data_samples'][view]
        return stock.parse_losses(stock(seen['inputs'][view], samples, mode='loss'))[0]

    source, styled = alone('source'), alone('styled')
    torch.testing.assert_close(found['adapt.source_loss'], source)
    torch.testing.assert_close(found['adapt.styled_loss'], 0.7 * styled)
    expected = 2.0 * style_consistency(source, styled, relative=behaviour == 'fixed')
    torch.testing.assert_close(found['adapt.consistency_loss'], expected)
    # the teacher, in evaluation mode, labels what it sees; the student is trained on its own view of it
    teacher = model.mean_teacher.model
    logits = torch.nn.functional.interpolate(
        teacher(seen['inputs']['teacher'], None, mode='tensor'), (64, 64), mode='bilinear'
    )
    labels = pseudo_label_map(logits, 0.87).labels
    assert 0.05 < (labels != 255).float().mean() < 0.95
    samples = copy.deepcopy(seen['data_samples']['target'])
    for sample, label in zip(samples, labels, strict=True):
        sample.gt_sem_seg.data = label[None]
    torch.testing.assert_close(found['adapt.pseudo_loss'], 0.3 * alone('target', samples))
    assert 'decode.acc_seg' in found and 'decode.loss_ce' not in found


def test_identical_pairs_have_no_consistency_term():
    model, data = model_for(), batch(alike=True)
    found, _ = losses(model, data)
    assert found['adapt.consistency_loss'] == 0
    torch.testing.assert_close(found['adapt.styled_loss'], found['adapt.source_loss'])


def test_gradient_reaches_the_student_only():
    model, data = model_for(), batch()
    found, _ = losses(model, data)
    before = {k: v.clone() for k, v in model.mean_teacher.model.state_dict().items()}
    found['adapt.pseudo_loss'].backward()
    assert all(p.grad is not None for p in model.student.parameters())
    assert all(p.grad is None for p in model.mean_teacher.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.mean_teacher.model.state_dict().items())


def test_nothing_passes():
    model = model_for(pseudo_labels=dict(threshold=1.0))
    found, _ = losses(model, batch())
    assert found['adapt.pseudo_loss'] == 0
    sum(v for k, v in found.items() if 'loss' in k).backward()
    assert all(p.grad.isfinite().all() for p in model.student.parameters())
    assert model.statistics.report()['kept'] == 0


def test_share_of_the_batch():
    model, data = model_for(pseudo_labels=dict(threshold=0.87, weighting='share')), batch()
    found, _ = losses(model, data)
    kept = model.statistics.report()['kept']
    everything = model_for(pseudo_labels=dict(threshold=0.0))
    labelled, _ = losses(everything, data)
    assert 0.05 < kept < 0.95
    assert found['adapt.pseudo_loss'].item() == pytest.approx(kept * labelled['adapt.pseudo_loss'].item(), rel=1e-5)


def test_a_threshold_for_each_class():
    data = batch()
    model = model_for(pseudo_labels=dict(threshold=[0.0, 1.0] * 3 + [0.0]))
    losses(model, data)
    everything = model_for(pseudo_labels=dict(threshold=0))
    losses(everything, data)
    some, all_ = (m.statistics.counts.tolist() for m in (model, everything))
    assert some == [n if c % 2 == 0 else 0 for c, n in enumerate(all_)] and sum(all_[::2]) and sum(all_[1::2])


def test_padding_gets_no_pseudo_label():
    model = model_for(pseudo_labels=dict(threshold=0.0))
    data = batch(views=('source', 'target'))
    for view in ('source', 'target'):
        for i, (image, sample) in enumerate(zip(data['inputs'][view], data['data_samples'][view], strict=True)):
            data['inputs'][view][i] = image[:, : 64 - 16 * i, :48]
            label = sample.gt_sem_seg.data[:, : 64 - 16 * i, :48]
            del sample.gt_sem_seg
            sample.gt_sem_seg = PixelData(data=label)
    losses(model, data)
    assert model.statistics.report()['kept'] == pytest.approx((64 * 48 + 48 * 48) / (2 * 64 * 64))


def test_what_has_no_weight_is_not_run():
    model = model_for(pseudo_weight=dict(value=1.0, start=0.6), styled_weight=0, consistency_weight=0)
    calls = []
    model.student.backbone.register_forward_hook(lambda *_: calls.append(1))
    found, _ = losses(model, batch())
    assert len(calls) == 1 and found['adapt.pseudo_loss'] == 0 and 'adapt.styled_loss' not in found
    assert model.statistics.report() == {}
    model.progress = 0.7
    found, _ = losses(model, batch())
    assert len(calls) == 3 and found['adapt.pseudo_loss'] > 0


def test_it_is_the_student_to_its_surroundings():
    model = model_for()
    stock = build_model(tiny.segmentor(4), 'student')
    assert model.state_dict().keys() == stock.state_dict().keys()
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.student.parameters()}
    assert model.backbone is model.student.backbone and model.double().progress == 0.5
    assert next(model.mean_teacher.model.parameters()).dtype == torch.float64
    assert copy.deepcopy(model).mean_teacher is None


def test_accumulation_gives_the_teacher_of_a_large_batch():
    """Four images at once, or two and two: without batch norm and consistency each term is a mean over images."""
    student = tiny.segmentor(4)
    student['backbone']['norm_cfg'] = student['decode_head']['norm_cfg'] = dict(type='GN', num_groups=2)
    whole = batch(4)
    halves = [
        {k: {view: v[part] for view, v in whole[k].items()} for k in whole} for part in (slice(0, 2), slice(2, 4))
    ]
    states = []
    for parts in (halves, [whole]):
        torch.manual_seed(0)
        model = MeanTeacherAdaptation(student, dict(decay=0.5), dict(threshold=0.0), consistency_weight=0.0)
        model.init_weights()
        model.student.decode_head.dropout = None
        model.mean_teacher.reset(model.student)
        count, begin = len(parts), copy.deepcopy(dict(model.state_dict()))
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=count)
        runner = SimpleNamespace(model=model.train(), optim_wrapper=wrapper, iter=0, max_iters=2 * count)
        wrapper.initialize_count_status(model, 0, 2 * count)
        hook = AdaptationHook(interval=1000)
        for runner.iter in range(2 * count):
            hook.before_train_iter(runner, runner.iter)
            losses = model.train_step(copy.deepcopy(parts[runner.iter % count]), wrapper)
            hook.after_train_iter(runner, runner.iter)
            assert losses['adapt.pseudo_loss'] > 0
        states.append(model.mean_teacher.state_dict())
    assert int(states[0]['updates']) == 2
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6, msg=name)
    moved = max(float((states[0][f'model.{name}'] - value).abs().max()) for name, value in begin.items())
    assert moved > 1e-2


def content(path):
    whole = torch.load(path, weights_only=False, map_location='cpu')
    return {k: whole[k] for k in ('state_dict', 'optimizer', 'kd_dense', 'kd_dense_random_state')}


@pytest.fixture(scope='module')
def whole(domains, tmp_path_factory):
    """Four iterations, gradients of two accumulated."""
    work = tmp_path_factory.mktemp('whole') / 'run'
    cfg = adaptation_config(domains, pseudo_labels=dict(threshold=0.15), mean_teacher=dict(decay=0.9))
    cfg.optim_wrapper.accumulative_counts = 2
    record = train(cfg, str(work), seed=3)
    return cfg, work, record


def scalars(work):
    (file,) = work.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_logs_everything_and_ends_with_a_plain_student(whole, tmp_path):
    cfg, work, record = whole
    lines = scalars(work)
    steps = [line for line in lines if 'adapt.source_loss' in line]
    assert len(steps) == 4
    for line in steps:
        terms = [line[f'adapt.{name}_loss'] for name in ('source', 'styled', 'pseudo', 'consistency')]
        assert all(map(math.isfinite, terms)) and line['loss'] == pytest.approx(sum(terms), rel=1e-4)
        assert line['adapt.pseudo_loss'] > 0
    assert 0 < steps[1]['adapt.kept'] <= 1 and 0 <= steps[1]['adapt.precision'] <= 1
    scores = [(line['mIoU'], line['teacher.mIoU']) for line in lines if 'teacher.mIoU' in line]
    assert len(scores) == 2
    (log,) = work.glob('*/*.log')
    (said, _) = re.findall('pseudo labels since the last validation: (kept .*)', log.read_text())
    counts = {name: int(n) for name, n in re.findall(r'count\.(\w+) (\d+)', said)}
    assert list(counts) == ['background', 'disc', 'ring', 'triangle', 'frame', 'star', 'bar']
    # of every class that has labels, and of no other
    assert re.findall(r'precision\.(\w+) ', said) == [name for name, n in counts.items() if n] != []
    stock = build_model(tiny.segmentor(4), 'student')
    stock.load_state_dict(torch.load(work / 'iter_4.pth', weights_only=False)['state_dict'], strict=True)
    assert evaluate(cfg, str(work / 'iter_4.pth'), str(tmp_path))['mIoU'] == pytest.approx(scores[-1][0], abs=0.01)
    assert record.value == pytest.approx(scores[-1][0], abs=0.01)


def test_the_teacher_moves_when_the_optimizer_steps(whole):
    _, work, _ = whole
    half, end = content(work / 'iter_2.pth'), content(work / 'iter_4.pth')
    states = [c['kd_dense']['mean_teacher'] for c in (half, end)]
    assert [int(s['updates']) for s in states] == [1, 2]
    for name, value in end['state_dict'].items():
        before, now = (s[f'model.{name}'] for s in states)
        if value.is_floating_point():  # one step from the second iteration to the fourth
            torch.testing.assert_close(now, 0.9 * before + 0.1 * value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(now, value)
    assert not torch.equal(*(s['model.backbone.layer1.0.conv1.weight'] for s in states))


def test_a_resumed_run_ends_like_one_that_did_not_stop(whole, tmp_path):
    cfg, work, _ = whole
    train(cfg, str(tmp_path / 'part'), seed=3, resume=str(work / 'iter_2.pth'))
    assert_equal(content(work / 'iter_4.pth'), content(tmp_path / 'part' / 'iter_4.pth'))


def start(cfg: Config, work: Path, kill_at: int = 0) -> int:
    """Train in a process of its own, killed after iteration ``kill_at``; the exit status of the process."""
    original = AdaptationHook.after_train_iter

    def after_train_iter(self, runner, *args, **kwargs):
        original(self, runner, *args, **kwargs)
        if runner.iter + 1 == kill_at:
            kill_myself()

    def action():
        with (
            mock.patch('mmengine.config.config.FormatCode', lambda text, **_: (text, False)),  # as in tests/conftest.py
            mock.patch.object(AdaptationHook, 'after_train_iter', after_train_iter),
        ):
            train(cfg, str(work), seed=3, resume=True)

    return in_a_fork(action, work.with_suffix('.log'))


def test_killed_and_resumed(domains, tmp_path):
    """Student and teacher, from a checkpoint with the gradients of half a step in it; rare classes are drawn more."""
    cfg = adaptation_config(domains, 6, pseudo_labels=dict(threshold=0.15), mean_teacher=dict(decay=0.9, warmup=2))
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval = 3
    cfg.train_dataloader.sampler = dict(type='kd_dense.RareClassSampler', temperature=0.1, min_pixels=10)
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert start(cfg, whole) == 0, whole.with_suffix('.log').read_text()[-2000:]
    assert start(cfg, part, kill_at=5) == -9
    assert sorted(path.name for path in part.glob('*.pth')) == ['iter_3.pth']
    assert start(cfg, part) == 0, part.with_suffix('.log').read_text()[-2000:]
    first, second = content(whole / 'iter_6.pth'), content(part / 'iter_6.pth')
    assert_equal(first, second)
    assert int(first['kd_dense']['mean_teacher']['updates']) == 3
    assert (whole / 'curve.json').read_text() == (part / 'curve.json').read_text()


def test_checkpoints_of_the_mean_teacher():
    model, hook = model_for(), AdaptationHook(save='mean_teacher')
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1)
    runner = SimpleNamespace(model=model, _resume=True)
    student, teacher = (copy.deepcopy(dict(m.state_dict())) for m in (model.student, model.mean_teacher.model))
    checkpoint = dict(state_dict=model.state_dict())
    hook.before_save_checkpoint(runner, checkpoint)
    assert_equal(dict(checkpoint['state_dict']), teacher)
    resumed = model_for()
    AdaptationHook().after_load_checkpoint(SimpleNamespace(model=resumed, _resume=True), checkpoint)
    assert_equal(dict(checkpoint['state_dict']), student)  # what the runner loads next
    assert_equal(dict(resumed.mean_teacher.model.state_dict()), teacher)
    with pytest.raises(ConfigError, match='resume: the checkpoint has no mean teacher'):
        hook.after_load_checkpoint(runner, dict(state_dict=student))


@pytest.mark.slow
def test_a_run_with_checkpoints_of_the_mean_teacher_resumes_with_the_student(whole, tmp_path):
    """Both go on: the optimizer with the student, not with its average."""
    cfg = Config(whole[0].to_dict())
    cfg.custom_hooks[0].save = 'mean_teacher'
    train(cfg, str(tmp_path / 'run'), seed=3, resume=str(whole[1] / 'iter_2.pth'))
    score = evaluate(cfg, str(tmp_path / 'run' / 'iter_4.pth'), str(tmp_path / 'test'))['mIoU']
    assert score == pytest.approx([s['teacher.mIoU'] for s in scalars(whole[1]) if 'teacher.mIoU' in s][-1], abs=0.01)
    cfg.train_cfg.max_iters = 6
    train(cfg, str(tmp_path / 'more'), seed=3, resume=str(tmp_path / 'run' / 'iter_4.pth'))
    plain = Config(whole[0].to_dict())
    plain.train_cfg.max_iters = 6
    train(plain, str(tmp_path / 'plain'), seed=3, resume=str(whole[1] / 'iter_4.pth'))
    first, second = (content(tmp_path / name / 'iter_6.pth')['kd_dense'] for name in ('more', 'plain'))
    assert_equal(first['mean_teacher'], second['mean_teacher'])
    assert int(first['mean_teacher']['updates']) == 3


def test_source_alone(domains):
    """The baseline from the same config: the stock student, trained on the view of the source."""
    adaptation = adaptation_config(domains)
    cfg = student_alone(adaptation)
    assert cfg.model.type == 'EncoderDecoder' and cfg.custom_hooks == []
    dataset, source = cfg.train_dataloader.dataset, adaptation.train_dataloader.dataset.source
    assert dataset.type == 'kd_dense.SceneDataset' and dataset.data_root == str(domains[0])
    kinds = ['LoadImageFromFile', 'LoadAnnotations', 'RandomCrop', 'RandomFlip', 'PackSegInputs']
    assert [t.type for t in dataset.pipeline] == kinds and source.pipeline[0].type == 'kd_dense.Views'
    with DefaultScope.overwrite_default_scope('mmseg'):
        sample = DATASETS.build(dataset)[0]
    assert sample['inputs'].shape == (3, 48, 48) and sample['data_samples'].gt_sem_seg.shape == (48, 48)


def test_target_without_labels():
    model, data = model_for(), batch()
    for sample in data['data_samples']['target']:
        del sample.gt_sem_seg
    found, _ = losses(model, data)
    report = model.statistics.report()
    assert found['adapt.pseudo_loss'] > 0 and report['kept'] > 0 and 'precision' not in report


# -- data --------------------------------------------------------------------------------------------------------------


def test_pairs_are_all_pairs():
    class Numbers:
        metainfo = dict(classes=('a',))

        def __init__(self, view, count):
            self.view, self.count = view, count

        def __len__(self):
            return self.count

        def __getitem__(self, i):
            return dict(inputs={self.view: i}, data_samples={self.view: -i})

    pairs = PairedDataset.__new__(PairedDataset)
    pairs.datasets = [Numbers('source', 3), Numbers('target', 4)]
    found = [pairs[i] for i in range(len(pairs))]
    assert len(pairs) == 12 and pairs.metainfo == dict(classes=('a',))
    assert sorted((p['inputs']['source'], p['inputs']['target']) for p in found) == [
        (i, j) for i in range(3) for j in range(4)
    ]
    pairs.datasets[1].view = 'styled'
    with pytest.raises(ConfigError, match="target.pipeline: the view 'styled' is none of the target domain"):
        pairs[0]
    pairs.datasets[1].__class__.__getitem__ = lambda self, i: dict(inputs=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"source.pipeline: must be one dict\(type='kd_dense.Views'"):
        pairs[0]


def test_translations_of_a_folder(domains, tmp_path):
    """Made by somebody else: here the negatives of the source images. They go through the same crops and flips."""
    for file in (domains[0] / 'leftImg8bit/train').rglob('*.png'):
        cv2.imwrite(str(tmp_path / file.name), 255 - cv2.imread(str(file)))
    cfg = adaptation_config(domains, 2)
    (views,) = cfg.train_dataloader.dataset.source.pipeline
    views.shared.insert(1, dict(type='kd_dense.StackTranslation', folder=str(tmp_path)))
    views['views'] = {
        name: [dict(type='kd_dense.TakeImage', translated=name == 'styled'), dict(type='PackSegInputs')]
        for name in ('source', 'styled')
    }
    with DefaultScope.overwrite_default_scope('mmseg'):
        sample = DATASETS.build(cfg.train_dataloader.dataset)[5]
    images, labels = sample['inputs'], sample['data_samples']
    assert torch.equal(images['styled'], 255 - images['source']) and images['source'].float().std() > 5
    assert torch.equal(*(labels[view].gt_sem_seg.data for view in ('source', 'styled')))
    train(cfg, str(tmp_path / 'run'), seed=3)
    steps = [line for line in scalars(tmp_path / 'run') if 'adapt.styled_loss' in line]
    assert len(steps) == 2 and all(line['adapt.styled_loss'] != line['adapt.source_loss'] for line in steps)


def test_a_target_without_images_or_folder(domains, tmp_path):
    cfg = adaptation_config(domains, labelled_target=False)
    target = cfg.train_dataloader.dataset.target
    target.data_root = str(tmp_path)
    with pytest.raises(
        ConfigError, match='dataset.target.data_prefix.img_path: there is no folder .*leftImg8bit/train'
    ):
        train(cfg, str(tmp_path / 'run'), seed=3)
    other = adaptation_config(domains)
    other.train_dataloader.dataset.source.data_root = str(tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match='dataset.source.data_root: there is no folder .*nowhere'):
        train(other, str(tmp_path / 'run'), seed=3)
    (tmp_path / 'leftImg8bit/train').mkdir(parents=True)
    message = 'train_dataloader.dataset.target: kd_dense.SceneDataset has no images; check .*leftImg8bit/train'
    with pytest.raises(ConfigError, match=message):
        train(cfg, str(tmp_path / 'run'), seed=3)


#: Domain -> what its images become while a run goes on; ``None``: they are gone.
DAMAGES = [('target', None), ('source', None), ('target', b'no image')]


@contextlib.contextmanager
def said_when_broken(domains, folder, images, domain, content):
    """Copies of both domains, of which one breaks when training begins; the run has to name a file of it."""
    copies = [Path(shutil.copytree(root, folder / name)) for root, name in zip(domains, ('source', 'target'))]
    broken = folder / domain / images

    def before_train(self, runner):
        original(self, runner)
        for file in broken.rglob('*.*'):
            if file.is_file():
                file.unlink()
                if content is not None:
                    file.write_bytes(content)

    original = AdaptationHook.before_train
    with mock.patch.object(AdaptationHook, 'before_train', before_train), pytest.raises(ConfigError) as end:
        yield copies
    assert re.search(f'{broken}/.* is (missing|no image).*; restore the file, or take it out', sentence(end.value))
    assert '\n' not in sentence(end.value)


@pytest.mark.parametrize('damage', DAMAGES)
def test_images_that_go_while_training(domains, tmp_path, damage):
    with said_when_broken(domains, tmp_path, 'leftImg8bit/train', *damage) as copies:
        train(adaptation_config(copies, labelled_target=False), str(tmp_path / 'run'), seed=3)


def test_images_of_different_sizes(domains, tmp_path):
    """Within a domain, and in one domain than in the other: what is not 48 x 48 is padded and gets no label there."""
    copies = [Path(shutil.copytree(root, tmp_path / name)) for root, name in zip(domains, ('source', 'target'))]
    for number, file in enumerate(sorted((copies[1] / 'leftImg8bit/train').rglob('*.png'))):
        cv2.imwrite(str(file), cv2.resize(cv2.imread(str(file)), ((40, 100), (120, 36))[number % 2]))
    cfg = adaptation_config(copies, 2, labelled_target=False, pseudo_labels=dict(threshold=0.0))
    cfg.model.student.data_preprocessor.size = (48, 48)
    cfg.train_dataloader.batch_size = 4
    train(cfg, str(tmp_path / 'run'), seed=3)
    steps = [line for line in scalars(tmp_path / 'run') if 'adapt.source_loss' in line]
    assert len(steps) == 2 and all(math.isfinite(line['loss']) and line['adapt.pseudo_loss'] > 0 for line in steps)
    # of 48 x 48 pixels a target has 48 x 40 or 36 x 48
    assert 0.74 < steps[1]['adapt.kept'] < 0.84 and 'adapt.precision' not in steps[1]


def test_target_classes_differ(domains):
    dataset = adaptation_config(domains).train_dataloader.dataset
    dataset.target.metainfo = dict(classes=('background', 'disc'))
    message = 'target: has the classes background, disc and the source background, disc, ring, triangle, ...'
    with pytest.raises(ConfigError, match=message), DefaultScope.overwrite_default_scope('mmseg'):
        PairedDataset(dataset.source, dataset.target)


def test_batches_that_do_not_fit():
    model = model_for()
    for data in (tiny.segmentation_batch(), batch(views=('source', 'styled'))):
        with pytest.raises(ConfigError, match="needs the views 'source' and 'target' in a batch"):
            losses(model, data)
    model.data_preprocessor.own.size, model.data_preprocessor.own.size_divisor = None, 32
    data = batch()
    for view, flip in (('target', True), ('teacher', False)):
        for sample in data['data_samples'][view]:
            sample.set_metainfo(dict(flip=flip, flip_direction='horizontal' if flip else None))
    with pytest.raises(ConfigError, match=r'target and teacher of an image have the flip True and False; geometric'):
        losses(model, data)
    data = batch()
    data['inputs']['teacher'] = [image[:, :32, :32] for image in data['inputs']['teacher']]
    del data['data_samples']['teacher'][0].gt_sem_seg, data['data_samples']['teacher'][1].gt_sem_seg
    with pytest.raises(ConfigError, match=r'views target and teacher have the sizes \(64, 64\) and \(32, 32\)'):
        losses(model, data)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(behavior='fixed'), "no option 'behavior'; did you mean 'behaviour'"),
        (dict(behaviour='oficial'), "unknown behaviour 'oficial'"),
        (dict(mean_teacher=dict(decoy=0.9)), "mean_teacher: MeanTeacher has no option 'decoy'; did you mean 'decay'"),
        (dict(mean_teacher=dict(decay=2)), 'mean_teacher.decay'),
        (dict(pseudo_labels=dict(treshold=0.9)), "pseudo_labels: has no option 'treshold'; did you mean 'threshold'"),
        (dict(pseudo_labels=dict(weighting='soft')), "pseudo_labels.weighting: unknown weighting 'soft'"),
        (dict(pseudo_labels=dict(threshold=[0.9] * 3)), 'pseudo_labels.threshold: .* one for each of the 7 classes'),
        (dict(pseudo_labels=dict(threshold=90)), 'pseudo_labels.threshold: must be a number between 0 and 1'),
        (dict(pseudo_weight='auto'), "pseudo_weight: 'auto' is for distillers"),
        (dict(styled_weight=-1), 'styled_weight: must be a finite number >= 0'),
        (
            dict(
                student=tiny.segmentor(
                    4, 2, out_channels=1, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)
                )
            ),
            'student: EncoderDecoder with SegformerHead gives no softmax over the classes',
        ),
        (dict(student=torch.nn.Linear(1, 1)), 'student: Linear predicts neither boxes .* nor the classes of pixels'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        MeanTeacherAdaptation(**(dict(student=tiny.segmentor(4)) | options))


def test_official_behaviour_keeps_the_statistics_of_the_first_day():
    assert model_for().mean_teacher.buffers == 'average'
    assert model_for(behaviour='official').mean_teacher.buffers == 'keep'
    assert model_for(behaviour='official', mean_teacher=dict(buffers='copy')).mean_teacher.buffers == 'copy'


def test_needs_its_hook():
    model = model_for()
    model.progress = None
    with pytest.raises(ConfigError, match='needs .*kd_dense.AdaptationHook'):
        losses(model, batch())
    with pytest.raises(ConfigError, match="unknown save 'teacher'"):
        AdaptationHook(save='teacher')


def test_domains_differ(domains):
    """What the tests adapt to is another domain indeed."""
    means = [np.mean([cv2.imread(str(f)).mean() for f in d.rglob('*_leftImg8bit.png')]) for d in domains]
    assert means[1] > means[0] + 20
    image, reference = (cv2.imread(str(next(d.rglob('*_leftImg8bit.png')))) for d in domains)
    assert match_statistics(image, reference).mean() == pytest.approx(reference.mean())


def test_the_config_on_generated_scenes(tmp_path):
    """It trains as it is, on a few scenes in fog; and so does its baseline."""
    name = 'configs/adaptation/segmentation/meanteacher_resnet18-w32_200_scenes-to-fog.py'
    roots = [tiny.scenes(tmp_path / 'source'), tiny.scenes(tmp_path / 'target')]
    write_weather(roots[1] / 'leftImg8bit', roots[1] / 'fog', 'fog', progress=False)
    text = Path(name).read_text().replace('../../', f'{Path("configs").resolve()}/')
    assert f'python tools/train.py {name}' in text and 'work_dirs/scenes_fog/fog' in text
    text = text.replace("'work_dirs/scenes', 'work_dirs/scenes_fog'", f'{str(roots[0])!r}, {str(roots[1])!r}')
    (tmp_path / 'config.py').write_text(text)
    options = {'train_cfg.max_iters': 1, 'train_cfg.val_interval': 1, 'model.student.data_preprocessor.size': (64, 64)}
    cfg = load_config(str(tmp_path / 'config.py'), options)
    cfg.train_dataloader.batch_size = 2
    assert cfg.load_from == 'work_dirs/demo_segmentation/teacher/iter_800.pth' and cfg.load_from in text
    cfg.load_from = str(tmp_path / 'by_day.pth')
    with pytest.raises(ConfigError, match=r'load_from: there is no checkpoint file .*by_day\.pth; train it first'):
        train(cfg, str(tmp_path / 'run'), seed=0)
    tiny.saved(dict(cfg.model.student.to_dict(), _scope_='mmseg'), Path(cfg.load_from), seed=3)
    cfg.optim_wrapper.optimizer.lr = 0.0
    assert train(cfg, str(tmp_path / 'run'), seed=0, resume='auto').name == 'adapted'
    (last,) = (tmp_path / 'run').glob('iter_1.pth')
    weights = [checkpoint.load(path)['state_dict']['backbone.stem.0.weight'] for path in (cfg.load_from, last)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)  # it begins with what was trained by day
    assert [line for line in scalars(tmp_path / 'run') if 'teacher.mIoU' in line]
    assert student_alone(cfg).train_dataloader.dataset.data_root == str(roots[0])
    assert model_config(str(tmp_path / 'config.py'), 'teacher.config').type == 'EncoderDecoder'  # of another student
