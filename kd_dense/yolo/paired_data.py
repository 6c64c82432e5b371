"""Images with their translation into the style of the other domain, and batches of both domains."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor
from ultralytics.data.augment import Albumentations, Compose, Format, RandomHSV
from ultralytics.data.build import InfiniteDataLoader
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import IterableSimpleNamespace

from kd_dense.adaptation.style import translate
from kd_dense.adaptation.transforms import StackTranslation, read_image
from kd_dense.errors import ConfigError
from kd_dense.yolo.adaptation_config import Style

#: Batch entry with the images of the target domain.
TARGET = 'target'
#: Batch entry with the translations of the images in ``img``.
TRANSLATED = 'translated'


class FormatPair(Format):
    """Ultralytics' formatting, of an image and of the translation in the channels behind it."""

    def _format_img(self, img: np.ndarray) -> Tensor:
        """``[H, W, 6]`` BGR, BGR -> ``[6, H, W]`` RGB, RGB, or the order that the argument ``bgr`` makes of both."""
        if img.shape[-1] != 6:
            return super()._format_img(img)
        both = super()._format_img(_on_top(img))
        return both.reshape(3, 2, *img.shape[:2]).transpose(0, 1).reshape(6, *img.shape[:2])


class TranslatedDataset(YOLODataset):
    """Ultralytics' data set, of which an image has its translation in three more channels.

    A translation is read from a folder, or made when the image is loaded: of the whole image, before mosaics and warps
    surround it with grey, which is no part of its style. Mosaic, MixUp, CutMix, warps and flips treat all six channels
    alike, so both images of a pair keep the same geometry, bit for bit; the colour gains are drawn once for both.
    Albumentations know no six channels and are left out. Without folder and style it is Ultralytics' data set.

    Args:
        translated: folder of translations, each named as its image but for the ending; ``None``: they are made.
        style: how; ``None`` as well: there are none. An image has the style of a random one of ``references``, another
            one whenever it is loaded anew; while it is kept for mosaics it keeps its translation.
        key: entry of the config that ``translated`` comes from, for sentences.
        labelled: ``False``: images need no label files.
        arguments: of Ultralytics' data set.

    Raises:
        ConfigError: an image has no translation in the folder.
    """

    format_class = FormatPair

    def __init__(
        self,
        *args: Any,
        translated: str | None,
        style: Style | None,
        key: str,
        labelled: bool = True,
        **arguments: Any,
    ) -> None:
        self.translated, self.style, self.key, self.labelled = translated, style, key, labelled
        self.references: list[str] = []  # images of the other domain
        self.chosen: dict[int, str] = {}  # of the images that are kept for mosaics, the one whose style each has
        self._recalled: dict[int, str] = {}
        self.translations: dict[str, Path] | None = None
        super().__init__(*args, **arguments)

    @property
    def has_translations(self) -> bool:
        """Do its images have six channels?"""
        return self.translated is not None or self.style is not None

    @property
    def has_labels(self) -> bool:
        """Is there an object in the label files?"""
        return any(len(label['cls']) for label in self.labels)

    # -- labels --------------------------------------------------------------------------------------------------------

    def cache_labels(self, path: Path = Path('./labels.cache')) -> dict:
        """Ultralytics' scan, which raises where images to be trained on have no labels at all."""
        augment, self.augment = self.augment, self.augment and self.labelled
        try:
            return super().cache_labels(path)
        finally:
            self.augment = augment

    def verify_labels(self, labels: list[dict], cache_path: Path) -> None:
        """Ultralytics' check of labels, where there are any."""
        if self.labelled or any(len(label['cls']) for label in labels):
            super().verify_labels(labels, cache_path)

    def get_labels(self) -> list[dict]:
        """Ultralytics' labels; finds the translation of each image that is left."""
        labels = super().get_labels()
        if self.translated is not None:
            self.translations = _translations(self.translated, self.im_files, self.key)
        return labels

    # -- images --------------------------------------------------------------------------------------------------------

    def load_image(self, i: int, *args: Any, **kwargs: Any) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Ultralytics' image in its size for training, with its translation: ``[H, W, 6]``."""
        image, original, resized = super().load_image(i, *args, **kwargs)
        makes = self.style is not None and bool(self.references)  # none yet while Ultralytics fills its cache
        if image.shape[2] == 6 or (self.translations is None and not makes):
            return image, original, resized
        translation = self._made(i, image) if self.translations is None else self._read(i, original, resized)
        image = np.concatenate([image, translation], axis=2)
        if self.cache != 'ram' and self.ims[i] is not None:  # one of those that Ultralytics keeps for mosaics
            self.ims[i] = image
        return image, original, resized

    def _made(self, i: int, image: np.ndarray) -> np.ndarray:
        self.chosen[i] = self._recalled.pop(i, None) or random.choice(self.references)
        return translate(image, read_image(Path(self.chosen[i])), self.style.method, self.style.beta)

    def _read(self, i: int, original: tuple[int, int], resized: tuple[int, int]) -> np.ndarray:
        translation = read_image(self.translations[Path(self.im_files[i]).stem])
        if translation.shape[:2] != tuple(original):
            translation = cv2.resize(translation, original[::-1], interpolation=cv2.INTER_AREA)
        if tuple(original) != tuple(resized):  # as Ultralytics resizes the image, so that equal files stay equal
            translation = cv2.resize(translation, resized[::-1], interpolation=cv2.INTER_LINEAR)
        return translation

    def kept(self) -> dict[int, str]:
        """Of the images that are kept for mosaics, the one whose style each has, where translations are made."""
        return {i: self.chosen[i] for i in self.buffer if i in self.chosen}

    def recall(self, kept: dict[int, str]) -> None:
        """Have the images in ``kept`` translated as :meth:`kept` said when they are loaded the next time."""
        self._recalled = dict(kept)

    def build_transforms(self, hyp: IterableSimpleNamespace) -> Compose:
        """Ultralytics' transforms, with colours for pairs."""
        transforms = super().build_transforms(hyp)
        if not self.has_translations:
            return transforms
        suited = [one for one in transforms.transforms if not isinstance(one, Albumentations)]
        return Compose([OnBoth(one) if isinstance(one, RandomHSV) else one for one in suited])


class OnBoth:
    """Applies a transform of single pixels to an image and its translation, with what it draws drawn once.

    Args:
        transform: of ``labels['img']`` ``[H, W, 3]``.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, labels: dict) -> dict:
        """``labels['img']`` ``[H, W, 6]`` -> the same shape."""
        labels['img'] = _on_top(labels['img'])
        labels = self.transform(labels)
        labels['img'] = np.concatenate(np.split(labels['img'], 2), axis=2)
        return labels


class PairedLoader:
    """Batches of the source, each with one of the target in its entry ``target``.

    An epoch has ``floor((S + T) / 2)`` batches, with ``S`` and ``T`` those that each domain has, as in the released
    code of SSDA-YOLO. Either domain goes on where the last epoch left it, and begins anew, in another order, when all
    its images were seen.

    Args:
        source, target: loaders of Ultralytics, which never end.
        with_target: ``False``: the same number of batches, of the source alone.
    """

    def __init__(self, source: InfiniteDataLoader, target: InfiniteDataLoader, with_target: bool = True) -> None:
        self._length = max((len(source) + len(target)) // 2, 1)
        self.loaders = [source, target] if with_target else [source]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict]:
        for _ in range(len(self)):
            batch, *rest = (_next(loader) for loader in self.loaders)
            yield {**batch, TARGET: rest[0]} if rest else batch

    def reset(self) -> None:
        """After a change of the data sets."""
        for loader in self.loaders:
            loader.reset()

    def close(self) -> None:
        """End worker processes."""
        for loader in self.loaders:
            loader.close()

    # What Ultralytics' trainer asks its loader for.

    @property
    def dataset(self) -> TranslatedDataset:
        """That of the source, which has the labels."""
        return self.loaders[0].dataset

    @property
    def sampler(self) -> _Samplers:
        return _Samplers([loader.sampler for loader in self.loaders])

    @property
    def batch_size(self) -> int:
        return self.loaders[0].batch_size

    @property
    def drop_last(self) -> bool:
        return self.loaders[0].drop_last

    @property
    def num_workers(self) -> int:
        return sum(loader.num_workers for loader in self.loaders)


class _Samplers:
    """The samplers of both domains; as long as the first."""

    def __init__(self, samplers: list[Any]) -> None:
        self.samplers = samplers

    def __len__(self) -> int:
        return len(self.samplers[0])

    def set_epoch(self, epoch: int) -> None:
        for sampler in self.samplers:
            sampler.set_epoch(epoch)


def split(batch: dict) -> dict:
    """Of images with translations ``[B, 6, H, W]`` make two entries, ``img`` and ``translated``."""
    if batch['img'].shape[1] == 6:
        batch['img'], batch[TRANSLATED] = batch['img'].split(3, dim=1)
    return batch


def _next(loader: InfiniteDataLoader) -> dict:
    if loader.iterator is None:
        loader.iterator = loader._get_iterator()
    return next(loader.iterator)


def _on_top(image: np.ndarray) -> np.ndarray:
    """``[H, W, 6] -> [2 H, W, 3]``."""
    return np.concatenate([image[..., :3], image[..., 3:]])


def _translations(folder: str, images: list[str], key: str) -> dict[str, Path]:
    try:
        found = StackTranslation(folder).files
    except ConfigError as error:
        raise ConfigError(str(error).replace('StackTranslation.folder', key)) from None
    missing = [image for image in images if Path(image).stem not in found]
    if missing:
        raise ConfigError(
            f'{key}: {folder} has no translation of {missing[0]} ({len(missing)} of {len(images)} images have none); '
            f'make one called {Path(missing[0]).stem}.png there'
        )
    return found
