"""The data transforms: what they read, what they draw, and that geometry is shared or left alone."""

import cv2
import mmcv.transforms  # noqa: F401  (registers LoadImageFromFile, RandomResize, ...)
import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, DefaultScope
from mmseg.utils import register_all_modules

from kd_dense.adaptation.style import translate
from kd_dense.errors import ConfigError

register_all_modules(init_default_scope=False)


def write(folder, *names, size=(20, 30), seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / name), rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return folder


def build(cfg):
    return TRANSFORMS.build(cfg)


@pytest.fixture
def target(tmp_path):
    return write(tmp_path / 'target', 'a.png', 'deep/b.png', size=(15, 40), seed=1)


@pytest.mark.parametrize('method', ['fourier', 'color', 'histogram'])
def test_style_of_a_file_of_the_folder(target, method):
    image = np.random.randint(0, 256, (20, 30, 3), np.uint8)
    boxes = np.array([[1, 2, 3, 4]])
    transform = build(dict(type='kd_dense.StyleTransfer', folder=str(target), method=method, beta=0.1))
    results = transform(dict(img=image, gt_bboxes=boxes))
    candidates = [
        translate(image, cv2.imread(str(target / name)), method, beta=0.1) for name in ('a.png', 'deep/b.png')
    ]
    assert any(np.array_equal(results['img'], c) for c in candidates)
    assert results['gt_bboxes'] is boxes


def test_style_of_the_files_with_a_suffix(target):
    transform = build(dict(type='kd_dense.StyleTransfer', folder=str(target), suffix='b.png'))
    assert [file.name for file in transform.files] == ['b.png']
    with pytest.raises(ConfigError, match=r'there are no images whose names end in _fog\.png in'):
        build(dict(type='kd_dense.StyleTransfer', folder=str(target), suffix='_fog.png'))


def test_style_is_seeded_and_drawn_anew(target):
    image = np.random.randint(0, 256, (20, 30, 3), np.uint8)
    transform = build(dict(type='kd_dense.StyleTransfer', folder=str(target), prob=0.5, beta=0.1))

    def draw(seed):
        np.random.seed(seed)
        return [transform(dict(img=image))['img'] for _ in range(20)]

    first = draw(3)
    assert all(np.array_equal(a, b) for a, b in zip(first, draw(3), strict=True))
    assert len({x.tobytes() for x in first}) == 3  # as it was, and like each of the two files
    never = build(dict(type='kd_dense.StyleTransfer', folder=str(target), prob=0))
    assert never(dict(img=image))['img'] is image


def geometry(**extra):
    return [
        dict(type='LoadImageFromFile'),
        *extra.get('after_loading', []),
        dict(type='RandomResize', scale=(60, 40), ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='mmseg.RandomCrop', crop_size=(16, 16)),
        dict(type='RandomFlip', prob=0.5),
    ]


def sample(folder, name='x.png'):
    label = np.arange(600, dtype=np.uint8).reshape(20, 30) % 7
    return dict(img_path=str(folder / name), gt_seg_map=label, seg_fields=['gt_seg_map'], reduce_zero_label=False)


def run(pipeline, results):
    with DefaultScope.overwrite_default_scope('mmseg'):
        return Compose([pipeline])(results)


def test_views_share_every_geometric_transform(tmp_path, target):
    source = write(tmp_path / 'source', 'x.png')
    pipeline = dict(
        type='kd_dense.Views',
        shared=geometry(),
        views=dict(
            real=[dict(type='PackSegInputs')],
            again=[dict(type='PackSegInputs')],
            styled=[dict(type='kd_dense.StyleTransfer', folder=str(target)), dict(type='PackSegInputs')],
        ),
    )
    crops = set()
    for _ in range(6):
        out = run(pipeline, sample(source))
        inputs, samples = out['inputs'], out['data_samples']
        assert torch.equal(inputs['real'], inputs['again']) and inputs['real'] is not inputs['again']
        assert inputs['styled'].shape == inputs['real'].shape and not torch.equal(inputs['styled'], inputs['real'])
        labels = {name: s.gt_sem_seg.data for name, s in samples.items()}
        assert torch.equal(labels['real'], labels['styled'])
        assert samples['real'].flip == samples['styled'].flip
        crops.add(inputs['real'].numpy().tobytes())
    assert len(crops) == 6


def test_a_stacked_translation_follows_the_image_bit_for_bit(tmp_path):
    source = write(tmp_path / 'source', 'x.png')
    stack = dict(type='kd_dense.StackTranslation', folder=str(source))  # the image itself stands for its translation
    pipeline = dict(
        type='kd_dense.Views',
        shared=geometry(after_loading=[stack]),
        views={
            name: [dict(type='kd_dense.TakeImage', translated=name == 'styled'), dict(type='PackSegInputs')]
            for name in ('real', 'styled')
        },
    )
    for _ in range(6):
        inputs = run(pipeline, sample(source))['inputs']
        assert inputs['real'].shape[0] == 3 and torch.equal(inputs['real'], inputs['styled'])


def test_a_translation_is_found_by_its_name_and_fitted(tmp_path):
    source = write(tmp_path / 'source', 'x.png', 'y.png')
    fake = write(tmp_path / 'fake', 'x.jpg', size=(10, 15), seed=2)
    stack = build(dict(type='kd_dense.StackTranslation', folder=str(fake)))
    image = cv2.imread(str(source / 'x.png'))
    stacked = stack(dict(img=image, img_path=str(source / 'x.png')))['img']
    np.testing.assert_array_equal(stacked[..., :3], image)
    expected = cv2.resize(cv2.imread(str(fake / 'x.jpg')), (30, 20), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(stacked[..., 3:], expected)
    for translated in (False, True):
        taken = build(dict(type='kd_dense.TakeImage', translated=translated))(dict(img=stacked))['img']
        np.testing.assert_array_equal(taken, expected if translated else image)
    with pytest.raises(ConfigError, match=r'fake has no translation of .*y\.png; make one called y\.png there'):
        stack(dict(img=image, img_path=str(source / 'y.png')))
    with pytest.raises(ConfigError, match='3 channels instead of 6; put a StackTranslation'):
        build(dict(type='kd_dense.TakeImage'))(dict(img=image))
    write(fake, 'deep/x.png')
    with pytest.raises(ConfigError, match='both translations of an image called x'):
        build(dict(type='kd_dense.StackTranslation', folder=str(fake)))


def test_a_view_without_a_sample_asks_for_another():
    pipeline = dict(type='kd_dense.Views', shared=[lambda results: None], views=dict(real=[lambda results: results]))
    assert run(pipeline, {}) is None


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(method='fourrier'), "unknown method 'fourrier'; did you mean 'fourier'"),
        (dict(beta=0.7), 'StyleTransfer.beta'),
        (dict(prob=2), 'StyleTransfer.prob'),
        (dict(folder='missing'), 'StyleTransfer.folder: there is no folder missing'),
    ],
)
def test_wrong_options(target, change, message):
    with pytest.raises(ConfigError, match=message):
        build(dict(dict(type='kd_dense.StyleTransfer', folder=str(target)), **change))


def test_an_empty_folder_and_a_broken_file(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'readme.txt').write_text('nothing here')
    with pytest.raises(ConfigError, match='StyleTransfer.folder: there are no images in .*empty'):
        build(dict(type='kd_dense.StyleTransfer', folder=str(tmp_path / 'empty')))
    (tmp_path / 'empty' / 'broken.png').write_text('no image')
    transform = build(dict(type='kd_dense.StyleTransfer', folder=str(tmp_path / 'empty')))
    with pytest.raises(ConfigError, match='broken.png is missing or is no image'):
        transform(dict(img=np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(ConfigError, match='Views.views'):
        build(dict(type='kd_dense.Views', shared=[], views={}))
