"""What a cache depends on, and one sentence for each part that is no longer what it was."""

from __future__ import annotations

import hashlib
import importlib
import json
import os.path as osp
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_dense.data.wrapped import innermost
from kd_dense.errors import ConfigError
from kd_dense.models.build import forget_pretrained, model_config

#: Packages by which the pixels of a view, or the outputs of a teacher, can change, in all toolboxes.
PACKAGES = ('kd_dense', 'torch', 'numpy', 'cv2')
#: Settings of a data set that say where it lies and how it is read, not what is in it.
_PLACES = ('data_root', 'backend_args', 'file_client_args', 'lazy_init', 'serialize_data')
_AGAIN = 'write the cache again, into another folder'

#: Part -> why a cache that was written with another one can not be used; ``{data}`` is the key of the data set.
_SENTENCES = {
    'teacher': 'teacher.config: the teacher, or its scale, is not the one that wrote the cache',
    'checkpoint': 'teacher.checkpoint: the file has other contents than the one that wrote the cache',
    'data': '{data}: its settings are not those with which the cache was written',
    'pipeline': '{data}: its pipeline is not the one with which the cache was written',
    'images': '{data}: it has other images, or in another order, than when the cache was written',
    'preprocessing': "student.data_preprocessor: the student's images are not prepared as when the cache was written",
}


def fingerprint(cfg: Mapping) -> dict[str, Any]:
    """Of everything that a config says about a cache; :func:`images` adds the data set itself.

    Args:
        cfg: a distillation config, as it is or as :func:`kd_dense.cache.use_cache` returns it.

    Returns:
        Part -> hash, and ``versions``: package -> version. ``checkpoint`` is ``None`` when the file is not there.
    """
    options = cfg['model']['teacher']
    student = cfg['model']['student']
    preprocessor = cfg['model'].get('data_preprocessor') or cfg.get('data_preprocessor')
    if not isinstance(student, nn.Module):
        preprocessor = model_config(student, 'student').get('data_preprocessor') or preprocessor
    scope = str(cfg.get('default_scope', ''))
    return {
        'teacher': hash_of([model_of(options['config']), options.get('scale', 1.0), list(options.get('allow', ()))]),
        'checkpoint': file_hash(options.get('checkpoint')),
        **of_dataset(cfg),
        'preprocessing': hash_of(preprocessor),
        'versions': versions(*PACKAGES, 'mmengine', 'mmcv', *(s for s in (scope,) if s in ('mmseg', 'mmdet'))),
    }


def of_dataset(cfg: Mapping) -> dict[str, str]:
    """``data`` and ``pipeline``: of the settings of the training data set, and of its pipelines."""
    pipelines: list = []
    rest = _without_pipelines(plain_dataset(cfg), pipelines)
    return {'data': hash_of(rest), 'pipeline': hash_of(pipelines)}


def plain_dataset(cfg: Mapping) -> Mapping:
    """The config of the training data set, without what :func:`kd_dense.cache.use_cache` puts around it."""
    dataset = cfg['train_dataloader']['dataset']
    while str(dataset.get('type', '')).rpartition('.')[2] in ('CachedTeacherDataset', 'ViewBank'):
        dataset = dataset['dataset']
    return dataset


def images(dataset: Any) -> str:
    """A hash of the names of the images of a data set, in their order, and of how many objects each is said to have."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    for one in innermost(dataset):
        root = str(getattr(one, 'data_root', '') or '')
        for i in range(len(one)):
            info = one.get_data_info(i)
            name = str(info.get('img_path', info.get('img_id', i)))
            name = osp.relpath(name, root) if root and osp.isabs(name) == osp.isabs(root) else name
            digest.update(f'{name} {len(info.get("instances", ()))}\n'.encode())
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Package -> version, without what a build adds to it (``+cpu``)."""
    return {n: str(importlib.import_module(n).__version__).partition('+')[0] for n in packages}


def check(written: Mapping[str, Any], now: Mapping[str, Any], folder: Path, data: str) -> None:
    """Is everything in ``now`` as it was when the cache in ``folder`` was written?

    Args:
        data: config key of the data set, named in errors.

    Raises:
        ConfigError: one sentence about the first part that is not.
    """
    for part, sentence in _SENTENCES.items():
        # without the teacher's file nothing can be said about it
        if part in now and now[part] != written.get(part) and not (part == 'checkpoint' and now[part] is None):
            raise ConfigError(f'{sentence.format(data=data)} in {folder}; put it back, or {_AGAIN}')
    for name, version in now.get('versions', {}).items():
        if written['versions'].get(name) != version:
            raise ConfigError(
                f'teacher.cache: {folder} was written with {name} {written["versions"].get(name)} and {version} is '
                f'installed, so its views may not come out alike; install that version, or {_AGAIN}'
            )


def local_file(checkpoint: Any) -> str | None:
    """Where the teacher's file is on this machine; ``None`` when it is not there."""
    if not checkpoint:
        return None
    path = str(checkpoint)
    if path.startswith(('http://', 'https://')):  # where kd_dense.models.build.fetch puts it
        path = osp.join(torch.hub.get_dir(), 'checkpoints', osp.basename(path))
    path = osp.expanduser(path)
    return path if osp.isfile(path) else None


def file_hash(checkpoint: Any) -> str | None:
    """SHA-256 of the teacher's file; ``None`` when it is not there."""
    path = local_file(checkpoint)
    if path is None:
        return None
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_of(source: Any) -> Any:
    """The model of a config of MMEngine, without where its first weights came from."""
    cfg = model_config(source, 'teacher.config')
    forget_pretrained(cfg)
    return cfg


def hash_of(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Dicts, lists and what is in them, whatever classes the config has them in."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _without_pipelines(value: Any, found: list) -> Any:
    """``value`` without its pipelines, which go to ``found``, and without the settings in :data:`_PLACES`."""
    if isinstance(value, Mapping):
        found += [value[key] for key in ('pipeline', 'transforms') if key in value]
        left = (k for k in value if k not in ('pipeline', 'transforms', *_PLACES))
        return {k: _without_pipelines(value[k], found) for k in left}
    return [_without_pipelines(v, found) for v in value] if isinstance(value, (list, tuple)) else value
