"""Views of Ultralytics' data sets: augmented images that are made again from a seed, and the training on them."""

from __future__ import annotations

import hashlib
import os.path as osp
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.data.augment import Albumentations, Compose, Mosaic
from ultralytics.utils import LOGGER, RANK

from kd_dense.cache import fingerprint
from kd_dense.cache.acceptance import check_readers
from kd_dense.cache.dataset import WithOutputs
from kd_dense.cache.live import LiveOutputs
from kd_dense.cache.store import StoredCache
from kd_dense.cache.teacher import FIELD, CachedTeacher
from kd_dense.cache.verify import NOT_COMPARED, compared, replayed_alike
from kd_dense.cache.views import ViewBank, ViewSampler
from kd_dense.errors import ConfigError
from kd_dense.execution import Execution
from kd_dense.random_state import preserve_random_state
from kd_dense.teacher import match_classes
from kd_dense.yolo import mmdet_teacher
from kd_dense.yolo.config import YoloConfig
from kd_dense.yolo.describe import class_names
from kd_dense.yolo.model import DistillationModel
from kd_dense.yolo.teacher import check_class_taps, load_teacher

#: Augmentations that ``close_mosaic`` ends.
_CLOSED = ('mosaic', 'mixup', 'cutmix', 'copy_paste')
#: Training arguments that change the pixels or the labels of a view.
_PIPELINE = (
    *_CLOSED,
    *('copy_paste_mode', 'hsv_h', 'hsv_s', 'hsv_v', 'degrees', 'translate', 'scale', 'shear', 'perspective'),
    *('flipud', 'fliplr', 'bgr', 'mask_ratio', 'overlap_mask'),
)
#: Training arguments that choose images and objects, and their size.
_DATA = ('task', 'imgsz', 'rect', 'single_cls', 'classes', 'fraction')


class YoloViews(ViewBank):
    """The views of a training set of Ultralytics; see :class:`~kd_dense.cache.ViewBank`.

    Ultralytics' mosaics take their other three images from those that were loaded last. Here they take them from the
    whole data set, as Ultralytics does with ``cache='ram'``, so that a view depends on its seed alone. Every image is
    copied when it is loaded, because some augmentations write into it.

    Args:
        dataset: of Ultralytics' trainer; changed.
        views, seed: of the bank.

    Raises:
        ConfigError: augmentations that draw from generators of their own.
    """

    key = 'data'

    def __init__(self, dataset: Any, views: int, seed: int = 0) -> None:
        super().__init__(dataset, views, seed)
        for transform in _all_transforms(dataset.transforms):
            if isinstance(transform, Mosaic):
                transform.buffer_enabled = False
            if isinstance(transform, Albumentations) and transform.transform is not None:
                raise ConfigError(
                    'data: Ultralytics augments with the package albumentations where it is installed, and that draws '
                    'from generators of its own, so the views can not be replayed; uninstall it, or train without '
                    'teacher.cache'
                )
        dataset.load_image = partial(_copied, dataset.load_image)
        dataset.max_buffer_length = 0  # nothing is taken from there

    def image(self, sample: dict) -> Tensor:
        """``[C, H, W]``, 0..255."""
        return sample['img']

    def images(self) -> str:
        """A hash of the names of the images, in their order, and of how many objects each has."""
        dataset, root = self.dataset, str(self.dataset.data.get('path') or '')
        digest = hashlib.sha256(str(len(dataset)).encode())
        for path, label in zip(dataset.im_files, dataset.labels, strict=True):
            name = osp.relpath(path, root) if root and osp.isabs(path) == osp.isabs(root) else path
            digest.update(f'{name} {len(label["cls"])}\n'.encode())
        return digest.hexdigest()

    def attach(self, sample: dict, tensors: Mapping[str, Tensor]) -> None:
        """As an entry of the sample, of which Ultralytics' loader makes a tuple."""
        sample[FIELD] = dict(tensors)


class CachedYoloDataset(WithOutputs, YoloViews):
    """The views of a cache and, with each, the teacher's outputs."""


class OnViews:
    """Trains on the views of a teacher cache, where there is one; mixed into a trainer, before all others."""

    #: Folder of the cache.
    teacher_cache: str | None = None
    #: Do batches bring the teacher's outputs along?
    with_outputs = True

    def build_dataset(self, img_path: str, mode: str = 'train', batch: int | None = None) -> Any:
        """Ultralytics' data set, or that of its views."""
        dataset = super().build_dataset(img_path, mode, batch)
        if mode != 'train' or not self.teacher_cache:
            return dataset
        check_arguments(self.args)
        return CachedYoloDataset(dataset, self.teacher_cache, self.with_outputs)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = 'train') -> Any:
        """Ultralytics' loader, which goes through the views as long as images are drawn in its order."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        if isinstance(loader.dataset, ViewBank):
            batches = loader.batch_sampler.sampler  # Ultralytics repeats it for ever
            batches.sampler = ViewSampler(batches.sampler, loader.dataset)
        return loader

    def preprocess_batch(self, batch: dict) -> dict:
        """Ultralytics' preprocessing, which moves only tensors to the device."""
        records = batch.get(FIELD)
        batch = super().preprocess_batch(batch)
        if records is not None:
            move = partial(Tensor.to, device=self.device, non_blocking=self.device.type == 'cuda')
            batch[FIELD] = [{name: move(tensor) for name, tensor in record.items()} for record in records]
        return batch

    def resume_training(self, ckpt: dict | None) -> None:
        """Go on with the views of the next epoch."""
        super().resume_training(ckpt)
        if self.teacher_cache and self.resume:
            self.train_loader.batch_sampler.sampler.sampler.begin(self.start_epoch)


class TeacherOutputs(LiveOutputs):
    """Of the teacher of a :class:`~kd_dense.yolo.DistillationModel`.

    Args:
        model: with its teacher at hand.
    """

    def __init__(self, model: DistillationModel) -> None:
        super().__init__(model.distillers.tap_names('teacher'))
        self.model = model
        self.device = next(model.student_model.parameters()).device

    def prepared(self, sample: dict) -> dict:
        """As Ultralytics' trainer prepares images: 0..1."""
        return {'inputs': sample['img'][None].to(self.device).float() / 255}

    def run(self, group: Sequence[dict]) -> dict[str, list[Tensor]]:
        """As the training step does."""
        images = torch.cat([data['inputs'] for data in group])
        return self.model.teacher_outputs(images, self.model.distillers.methods)


def check_arguments(args: Any) -> None:
    """Are the views the same in every epoch?

    Args:
        args: of Ultralytics' trainer.

    Raises:
        ConfigError: one sentence about the first argument that changes them.
    """
    if args.multi_scale:
        raise ConfigError(
            'train.multi_scale: changes the size of whole batches at random, which a cache can not replay; set '
            'multi_scale=0.0, or train without teacher.cache'
        )
    mixing = [name for name in _CLOSED if getattr(args, name)]
    if args.close_mosaic and mixing:
        raise ConfigError(
            f'train.close_mosaic: ends {", ".join(mixing)} in the last {args.close_mosaic} epochs, which a cache can '
            'not follow; set close_mosaic=0, or train without teacher.cache'
        )


def fingerprint_of(teacher: Mapping, args: Any, data: Mapping) -> dict[str, Any]:
    """What a cache depends on, but the images; see :mod:`kd_dense.cache.fingerprint`.

    Args:
        teacher: options of the config.
        args: of Ultralytics' trainer, once it is set up.
        data: what it read from the data YAML.
    """
    config = teacher['config']
    model = fingerprint.model_of(config) if mmdet_teacher.is_config(config) else config
    chosen = {name: getattr(args, name) for name in _DATA}
    chosen['batch'] = args.batch if args.rect else None  # it decides which images share a shape
    packages = ['ultralytics', *(['mmengine', 'mmcv', 'mmdet'] if mmdet_teacher.is_config(config) else [])]
    return {
        'teacher': fingerprint.hash_of([model, list(teacher['allow'])]),
        'checkpoint': fingerprint.file_hash(teacher['checkpoint']),
        'data': fingerprint.hash_of([chosen, data['names'], data.get('channels', 3)]),
        'pipeline': fingerprint.hash_of({name: getattr(args, name) for name in _PIPELINE}),
        'versions': fingerprint.versions(*fingerprint.PACKAGES, *packages),
    }


def verify(trainer: Any, count: int = 4) -> None:
    """Compare config, images and, where the teacher's file is at hand, its outputs with those of the cache.

    Args:
        trainer: one that distils from a cache, with its loaders.
        count: views of which images and outputs are compared.

    Raises:
        ConfigError: one sentence about the first thing that is not as it was.
    """
    bank, options = trainer.train_loader.dataset, trainer.config.teacher
    cache = bank.cache
    check_readers(trainer.distillation.distillers, cache.manifest.top_k, 'teacher.cache')
    found = fingerprint_of(options, trainer.args, trainer.data)
    fingerprint.check(cache.manifest.fingerprint, found, cache.folder, bank.key)
    samples = replayed_alike(bank, count)
    say = LOGGER.info if RANK in (-1, 0) else LOGGER.debug
    if not Path(str(options['checkpoint'])).expanduser().is_file():
        say(NOT_COMPARED)
        return
    with preserve_random_state():
        live = with_live_teacher(trainer.config, trainer.distillation.student_model)
        for sentence in compared(TeacherOutputs(live), live.distillers, samples, cache):
            say(sentence)


def with_live_teacher(config: YoloConfig, student: nn.Module) -> DistillationModel:
    """The model to be trained, with the teacher of the file, whether or not there is a cache."""
    distillers = config.build_distillers()
    check_class_taps(distillers, config.teacher)
    teacher = load_teacher(config.teacher, student)
    return DistillationModel(student, teacher, distillers, Execution.of(config.teacher))


def with_cached_teacher(config: YoloConfig, student: nn.Module) -> DistillationModel:
    """The model to be trained, with a cache in the teacher's place.

    Raises:
        ConfigError: the cache is not complete, or its teacher has other classes.
    """
    distillers = config.build_distillers()
    check_class_taps(distillers, config.teacher)
    teacher = CachedTeacher(StoredCache.load(config.teacher['cache']))
    if config.teacher['classes'] != 'ignore':
        match_classes(class_names(student), teacher.meta['dataset_meta']['classes'], config.teacher['classes'])
    return DistillationModel(student, teacher, distillers)


def _all_transforms(transform: Any) -> Iterator[Any]:
    """A transform, those that it consists of, and those that it makes its other images with."""
    yield transform
    inner: Iterable = transform.transforms if isinstance(transform, Compose) else ()
    for one in (*inner, getattr(transform, 'pre_transform', None)):
        if one is not None:
            yield from _all_transforms(one)


def _copied(load_image: Any, *args: Any, **kwargs: Any) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
    image, original, resized = load_image(*args, **kwargs)
    return image.copy(), original, resized
