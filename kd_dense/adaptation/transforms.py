"""Data transforms of domain adaptation, for the pipelines of MMDetection and MMSegmentation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from mmengine.dataset import Compose

from kd_dense.adaptation.style import METHODS, translate
from kd_dense.data.files import IMAGE_SUFFIXES
from kd_dense.errors import ConfigError, closest
from kd_dense.registry import TRANSFORMS


@TRANSFORMS.register_module()
class StyleTransfer:
    """Makes the image look like a random one of the other domain; boxes and label maps stay as they are.

    Put after geometric transforms it works on the crop that is trained on. What it draws comes from NumPy's random
    state, like what other transforms draw, which the toolboxes seed in every worker.

    Args:
        folder: of images of the other domain, searched with its subfolders.
        method: ``'fourier'``, ``'color'`` or ``'histogram'``, see :mod:`kd_dense.adaptation.style`.
        beta: of ``'fourier'``.
        prob: of translating an image at all.
        suffix: only files whose names end in this; Foggy Cityscapes has three densities of fog in one folder.

    Raises:
        ConfigError: an unknown method, or a folder without images.
    """

    def __init__(
        self, folder: str, method: str = 'fourier', beta: float = 0.01, prob: float = 1.0, suffix: str = ''
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f'StyleTransfer.method: unknown method {method!r}; {closest(str(method), METHODS)}')
        if not 0 <= beta <= 0.5:
            raise ConfigError(f'StyleTransfer.beta: must lie between 0 and 0.5, not {beta!r}')
        if not 0 <= prob <= 1:
            raise ConfigError(f'StyleTransfer.prob: must lie between 0 and 1, not {prob!r}')
        self.files = image_files(folder, 'StyleTransfer.folder', suffix)
        self.folder, self.method, self.beta, self.prob = folder, method, beta, prob

    def __call__(self, results: dict) -> dict:
        """Replace ``results['img']`` ``[H, W, 3]`` uint8, BGR."""
        if np.random.rand() >= self.prob:
            return results
        reference = read_image(self.files[np.random.randint(len(self.files))])
        results['img'] = translate(results['img'], reference, self.method, self.beta)
        return results

    def __repr__(self) -> str:
        return f'StyleTransfer({self.folder!r}, {self.method!r}, beta={self.beta:g}, prob={self.prob:g})'


@TRANSFORMS.register_module()
class StackTranslation:
    """Reads the translation of an image that an external translator made, and stacks it behind the image's channels.

    To follow the loading of the image. Geometric transforms then treat both alike, bit for bit; :class:`TakeImage`
    takes one of the two out again. A translation of another size is resized to that of the image.

    Args:
        folder: of the translations, searched with its subfolders; each is named as its image, but for the ending.

    Raises:
        ConfigError: a folder without images, or two of one name.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for file in image_files(folder, 'StackTranslation.folder'):
            if file.stem in self.files:
                raise ConfigError(
                    f'StackTranslation.folder: {self.files[file.stem]} and {file} are both translations of an image '
                    f'called {file.stem}; keep one of them'
                )
            self.files[file.stem] = file

    def __call__(self, results: dict) -> dict:
        """``results['img']`` ``[H, W, 3]`` -> ``[H, W, 6]``."""
        stem = Path(results['img_path']).stem
        if stem not in self.files:
            raise ConfigError(
                f'StackTranslation.folder: {self.folder} has no translation of {results["img_path"]}; make one called '
                f'{stem}.png there'
            )
        image, translated = results['img'], read_image(self.files[stem])
        if translated.shape[:2] != image.shape[:2]:
            translated = cv2.resize(translated, image.shape[1::-1], interpolation=cv2.INTER_AREA)
        results['img'] = np.concatenate([image, translated], axis=2)
        return results

    def __repr__(self) -> str:
        return f'StackTranslation({self.folder!r})'


@TRANSFORMS.register_module()
class TakeImage:
    """Of an image and its translation, stacked by :class:`StackTranslation`, keep one.

    Args:
        translated: the translation, instead of the image itself.
    """

    def __init__(self, translated: bool = False) -> None:
        self.translated = translated

    def __call__(self, results: dict) -> dict:
        """``results['img']`` ``[H, W, 6]`` -> ``[H, W, 3]``."""
        if results['img'].shape[2] != 6:
            raise ConfigError(
                f'TakeImage: the image has {results["img"].shape[2]} channels instead of 6; put a StackTranslation '
                'behind the transform that loads it'
            )
        results['img'] = np.ascontiguousarray(results['img'][..., 3:] if self.translated else results['img'][..., :3])
        return results

    def __repr__(self) -> str:
        return f'TakeImage(translated={self.translated})'


@TRANSFORMS.register_module()
class Views:
    """Several views of one image that share every geometric transform.

    The shared transforms run once: all random crops, flips and sizes are therefore the same in every view, bit for bit.
    Each view goes on from a copy, with transforms of colour and style of its own. (MMDetection's ``MultiBranch`` runs
    whole pipelines apart, so that each branch has a geometry of its own.)

    Args:
        shared: transforms of all views, from the loading on.
        views: name -> transforms of this view, ending with the packing.

    Raises:
        ConfigError: no views.
    """

    def __init__(self, shared: Sequence[dict | Callable], views: Mapping[str, Sequence[dict | Callable]]) -> None:
        if not views:
            raise ConfigError("Views.views: needs at least one, such as dict(real=[dict(type='PackSegInputs')])")
        self.shared = Compose(list(shared))
        self.views = {name: Compose(list(transforms)) for name, transforms in views.items()}

    def __call__(self, results: dict) -> dict | None:
        """A sample of a data set -> ``inputs`` and ``data_samples``, each a dict with the names of the views."""
        results = self.shared(results)
        packed = {name: view(copy.deepcopy(results)) if results else None for name, view in self.views.items()}
        if any(view is None for view in packed.values()):  # a transform asked for another sample
            return None
        return {key: {name: view[key] for name, view in packed.items()} for key in ('inputs', 'data_samples')}

    def __repr__(self) -> str:
        return f'Views(shared={self.shared}, views={self.views})'


def image_files(folder: str | Path, key: str, suffix: str = '') -> list[Path]:
    """The image files in ``folder`` and below, sorted; those whose names end in ``suffix``.

    Raises:
        ConfigError: there is no such folder, or no image in it; ``key`` is the config key that is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f'{key}: there is no folder {folder}')
    files = sorted(f for f in folder.rglob('*') if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith('.'))
    files = [file for file in files if file.name.endswith(suffix)]
    if not files:
        named = f' whose names end in {suffix}' if suffix else ''
        raise ConfigError(f'{key}: there are no images{named} in {folder}; put those of the other domain there')
    return files


def read_image(file: Path) -> np.ndarray:
    """``[H, W, 3]`` uint8, BGR.

    Raises:
        ConfigError: the file is missing, or no image.
    """
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if image is None:
        raise ConfigError(f'{file} is missing or is no image that can be decoded; restore the file, or take it out')
    return image
