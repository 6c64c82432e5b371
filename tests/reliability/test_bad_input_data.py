"""Data sets and images that are not as they should be, in runs of MMSegmentation and MMDetection."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import TRANSFORMS, init_default_scope
from mmengine.runner import Runner

from kd_dense.engine.data_checks import NamesBadFiles
from kd_dense.engine.run import evaluate, train
from kd_dense.errors import ConfigError, sentence
from kd_dense.registry import HOOKS
from tests.helpers import tiny


@pytest.fixture
def copied(scenes, tmp_path) -> Path:
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(scenes, tmp_path / 'data'))


def images_of(data: Path) -> list[Path]:
    return sorted((data / 'leftImg8bit' / 'train').rglob('*.png'))


def labels_of(data: Path) -> list[Path]:
    return sorted((data / 'gtFine' / 'train').rglob('*_labelTrainIds.png'))


def finite(folder: Path, name: str) -> bool:
    state = torch.load(folder / name, weights_only=False)['state_dict']
    return all(torch.isfinite(v).all() for v in state.values())


# -- nothing there -----------------------------------------------------------------------------------------------------


def test_empty_segmentation_set(segmentation, copied, tmp_path):
    """MMEngine's sampler would look for a first image for ever."""
    for path in images_of(copied):
        path.unlink()
    with pytest.raises(
        ConfigError, match=r'^train_dataloader\.dataset: kd_dense.SceneDataset has no images; check .*train'
    ) as e:
        train(segmentation(data=copied), str(tmp_path / 'run'))
    assert '\n' not in sentence(e.value)


def test_empty_detection_set(detection, copied, tmp_path):
    """MMEngine would train for no iteration and be content."""
    file = copied / 'annotations' / 'instances_train.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'images': [], 'annotations': []}))
    with pytest.raises(ConfigError, match=r'^train_dataloader\.dataset: CocoDataset has no images; check .*train'):
        train(detection(data=copied), str(tmp_path / 'run'))


def test_empty_set_to_evaluate_on(segmentation, copied, tmp_path):
    for path in (copied / 'leftImg8bit' / 'val').rglob('*.png'):
        path.unlink()
    student = tiny.saved(tiny.segmentor(4), tmp_path / 'student.pth')
    with pytest.raises(ConfigError, match=r'^test_dataloader\.dataset: kd_dense.SceneDataset has no images'):
        evaluate(segmentation(data=copied), student, str(tmp_path / 'run'))


def test_fewer_images_than_a_batch(detection, tmp_path):
    cfg = detection()
    cfg.train_dataloader.update(batch_size=16, drop_last=True)
    cfg.train_dataloader.batch_sampler = None
    with pytest.raises(ConfigError, match=r'^train_dataloader: 8 images do not fill one batch of 16, and drop_last'):
        train(cfg, str(tmp_path / 'run'))


# -- files that can not be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('files', 'content', 'reason', 'workers'),
    [
        (images_of, b'no image', 'is no image that can be decoded', 1),
        (labels_of, b'', 'is no image that can be decoded', 0),
        (images_of, None, 'is missing', 0),
    ],
)
def test_a_file_that_breaks_while_training(segmentation, copied, tmp_path, files, content, reason, workers):
    """It is named with one sentence, also when a worker process met it."""
    cfg = segmentation(data=copied, iterations=8)
    cfg.train_dataloader.num_workers = workers
    bad = files(copied)[3]
    cfg.custom_hooks = [
        dict(type='kd_dense.BreakForTest', file=str(bad), content=None if content is None else content.decode())
    ]
    with pytest.raises(ConfigError) as end:
        train(cfg, str(tmp_path / 'run'))
    said = f'dataset: {bad} {reason}; restore the file, or take it out of the data set'
    assert sentence(end.value) == said


def test_an_image_of_detection(detection, copied, tmp_path):
    bad = sorted((copied / 'images' / 'train').iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:20])
    with pytest.raises(ConfigError, match=f'^dataset: {bad} is no image that can be decoded'):
        train(detection(data=copied), str(tmp_path / 'run'))


def test_other_errors_of_a_pipeline_stay_what_they_are(tmp_path):
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), np.zeros((4, 4, 3), np.uint8))

    def pipeline(sample):
        raise KeyError('mine')

    with pytest.raises(KeyError, match='mine'):
        NamesBadFiles(pipeline)({'img_path': str(image)})


def test_a_pipeline_that_filters_everything(segmentation, tmp_path):
    cfg = segmentation()
    cfg.train_dataloader.dataset.pipeline = [dict(type='NothingForTest')]
    cfg.train_dataloader.dataset.max_refetch = 5
    with pytest.raises(ConfigError, match=r'^train_dataloader\.dataset\.pipeline: it returned None for 5 images in a'):
        train(cfg, str(tmp_path / 'run'))


def test_a_worker_that_is_killed(segmentation, tmp_path):
    cfg = segmentation()
    cfg.train_dataloader.num_workers = 1
    cfg.train_dataloader.dataset.pipeline = [dict(type='KilledForTest')]
    with pytest.raises(ConfigError, match=r'^train_dataloader\.num_workers .*a worker process was killed \(.*\), most'):
        train(cfg, str(tmp_path / 'run'))


@HOOKS.register_module(force=True)
class BreakForTest(Hook):
    """Removes or overwrites a file when training begins."""

    def __init__(self, file: str, content: str | None) -> None:
        self.file, self.content = Path(file), content

    def before_train(self, runner) -> None:
        if self.content is None:
            self.file.unlink()
        else:
            self.file.write_text(self.content)


@TRANSFORMS.register_module(force=True)
class NothingForTest:
    def __call__(self, sample):
        return None


@TRANSFORMS.register_module(force=True)
class KilledForTest:
    def __call__(self, sample):
        os.kill(os.getpid(), signal.SIGKILL)


# -- what has to work --------------------------------------------------------------------------------------------------


def test_images_without_a_label(segmentation, copied, tmp_path):
    """The first batch is ignored as a whole: weights are calibrated, and connectors proved, on the second."""
    for path in labels_of(copied)[:4]:
        cv2.imwrite(str(path), np.full((64, 64), 255, np.uint8))
    weight = dict(type='auto', share=0.1)
    distillers = dict(
        logits=dict(type='LogitKD', loss_weight=weight),
        cwd=dict(type='CWD', taps='backbone:3', loss_weight=weight),
        nfd=dict(type='NFD', loss_weight=weight),
        mimic=dict(type='FeatureMimic', taps='backbone:2'),
    )
    cfg = segmentation(distillers, data=copied)
    cfg.train_dataloader.update(sampler=dict(type='DefaultSampler', shuffle=False), batch_size=4)
    train(cfg, str(tmp_path / 'run'))
    lines = [json.loads(x) for x in next((tmp_path / 'run').glob('*/vis_data/scalars.json')).read_text().splitlines()]
    steps = [[line[f'kd.{name}.loss'] for name in distillers] for line in lines if 'loss' in line]
    assert steps[0] == [0, 0, 0, 0] and all(value > 0 for value in steps[1])
    assert finite(tmp_path / 'run', 'iter_4.pth')


def test_images_without_a_box(detection, copied, tmp_path):
    file = copied / 'annotations' / 'instances_train.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'annotations': []}))
    methods = dict(
        logits=dict(type='LogitKD', loss_weight='auto'),
        native=dict(type='Native'),
        cwd=dict(type='CWD', taps='neck:0', loss_weight='auto'),
    )
    train(detection(methods, data=copied), str(tmp_path / 'run'))
    assert finite(tmp_path / 'run', 'epoch_1.pth')


def test_batches_of_one(segmentation, detection, tmp_path):
    distillers = dict(logits=dict(type='LogitKD'), nfd=dict(type='NFD'), cwd=dict(type='CWD', taps='backbone:3'))
    boxes = detection()
    for model in (boxes.model.student, boxes.model.teacher.config):
        model.bbox_head.norm_cfg = dict(type='GN', num_groups=2)
    boxes.model.teacher.allow = ['bbox_head.']  # which was saved with batch norm
    for cfg, name in ((segmentation(distillers), 'iter_4.pth'), (boxes, 'epoch_1.pth')):
        cfg.train_dataloader.batch_size = 1
        train(cfg, str(tmp_path / name))
        assert finite(tmp_path / name, name)


def test_batches_of_one_where_a_norm_needs_two(segmentation, tmp_path):
    cfg = segmentation()
    head = dict(type='PSPHead', in_channels=32, in_index=3, channels=8, pool_scales=(1, 2))
    for key in ('num_classes', 'norm_cfg', 'align_corners', 'loss_decode'):
        head[key] = cfg.model.student.decode_head[key]
    cfg.model.student.decode_head = head
    cfg.train_dataloader.batch_size = 1
    with pytest.raises(ConfigError, match=r'^train_dataloader\.batch_size .*\(torch\.Size\(\[1, 8, 1, 1\]\)\)'):
        train(cfg, str(tmp_path / 'run'))
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_images_smaller_than_the_crop(segmentation, tmp_path):
    """They are padded, and the padding takes no part in any loss."""
    cfg = segmentation(dict(cwd=dict(type='CWD', taps='backbone:3'), nfd=dict(type='NFD')))
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline.insert(2, dict(type='RandomCrop', crop_size=(96, 96), cat_max_ratio=0.75))
    for model in (cfg.model.student, cfg.model.teacher.config):
        model.data_preprocessor.size = (96, 96)
    train(cfg, str(tmp_path / 'run'))
    assert finite(tmp_path / 'run', 'iter_4.pth')
    # the mask that the losses were given
    init_default_scope('mmseg')
    cfg.work_dir = str(tmp_path / 'again')
    runner = Runner.from_cfg(cfg)
    loader = runner.build_dataloader(cfg.train_dataloader, seed=0)
    batch = runner.model.data_preprocessor(next(iter(loader)), training=True)
    mask = runner.model.context(batch['inputs'], batch['data_samples']).mask((96, 96))
    assert mask.shape == (2, 1, 96, 96)
    assert not mask[:, :, 64:].any() and not mask[:, :, :, 64:].any()
    known = torch.stack([sample.gt_sem_seg.data for sample in batch['data_samples']]) != 255
    assert torch.equal(mask[:, :, :64, :64], known[:, :, :64, :64]) and known[:, :, :64, :64].float().mean() > 0.5
