"""Build a student or a teacher from what a config may give: a path, a ``package::config``, a dict or a built module."""

from __future__ import annotations

import copy
import os.path as osp
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from kd_dense import checkpoint as checkpoints
from kd_dense.errors import ConfigError
from kd_dense.teacher import LoadReport, load_weights

#: Scopes a model may come from -> module whose import fills the registry.
SCOPES = {'mmseg': 'mmseg.models', 'mmdet': 'mmdet.models'}


def read_config(source: str, key: str) -> Config:
    """The config at a local path or ``mmseg::...`` / ``mmdet::...``.

    Raises:
        ConfigError: no such file, a package that is not installed, or a config that can not be parsed.
    """
    try:
        if '::' in source:
            from mmengine.hub import get_config

            return get_config(source)
        if not osp.isfile(source):
            raise ConfigError(f'{key}: there is no config file {source}')
        return Config.fromfile(source)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(f'{key}: {source}: {error}') from error
    except (FileNotFoundError, KeyError, ValueError, SyntaxError, AssertionError) as error:
        raise ConfigError(f'{key}: {source} can not be read as a config: {error}') from error


def model_config(source: str | Mapping, key: str) -> ConfigDict:
    """The model section of ``source``, with the scope it belongs to written into it.

    Args:
        source: a config path, or the model section itself (a dict with ``type``).
    """
    if isinstance(source, str):
        cfg = read_config(source, key)
        if 'model' not in cfg:
            raise ConfigError(f'{key}: {source} has no model section')
        model = copy.deepcopy(cfg.model)
        if model.get('type', '').endswith(('Distillation', 'MeanTeacherAdaptation')) and 'student' in model:
            # our own config: whoever trained that student may use it as a teacher
            student = model_config(model['student'], key)
            student.setdefault('_scope_', cfg.get('default_scope', 'mmengine'))
            return student
        if 'data_preprocessor' not in model and 'data_preprocessor' in cfg:
            model.data_preprocessor = copy.deepcopy(cfg.data_preprocessor)
        model.setdefault('_scope_', cfg.get('default_scope', 'mmengine'))
        return model
    if isinstance(source, Mapping):
        if 'type' not in source:
            raise ConfigError(f"{key}: a dict must be the model section of a config, with a 'type'")
        return ConfigDict(copy.deepcopy(dict(source)))
    raise ConfigError(
        f'{key}: must be a config path, mmseg::... or mmdet::..., a model dict or a built module, not {source!r}'
    )


def build_model(source: str | Mapping | nn.Module, key: str, pretrained: bool = True) -> nn.Module:
    """Build the model that ``source`` describes; a built module is returned as it is.

    Args:
        pretrained: keep the config's own initialisation from files; ``False`` for a teacher, all of whose weights are
            loaded.
    """
    if isinstance(source, nn.Module):
        return source
    cfg = model_config(source, key)
    if not pretrained:
        forget_pretrained(cfg)
    scope = cfg.get('_scope_') or cfg['type'].rpartition('.')[0] or _current_scope()
    _fill_registry(scope)
    try:
        with DefaultScope.overwrite_default_scope(scope or None):
            return MODELS.build(cfg)
    except ConfigError:
        raise
    except Exception as error:  # MMEngine re-raises whatever a constructor raises, under many types
        raise ConfigError(f'{key}: the model can not be built: {error}') from error


def build_teacher(
    config: Any, checkpoint: str | None, allow: tuple[str, ...] = (), trusted: bool = False
) -> tuple[nn.Module, dict]:
    """Build and load a teacher; a built module, with its weights loaded, is returned as it is.

    Returns:
        The model, and the ``meta`` of its checkpoint (class names among other things).

    Raises:
        ConfigError: no checkpoint, a file that is missing, unreadable, or does not fit the config.
    """
    if isinstance(config, nn.Module) and checkpoint is None:
        return config, {}
    model, meta, report = load_teacher(config, checkpoint, allow, trusted)
    print_log(report, 'current')
    return model, meta


def load_teacher(
    config: Any, checkpoint: str | None, allow: tuple[str, ...] = (), trusted: bool = False
) -> tuple[nn.Module, dict, LoadReport]:
    """:func:`build_teacher`, with the report of what was loaded."""
    if checkpoint is None:
        raise ConfigError(
            'teacher.checkpoint: none is given, and a teacher with random weights teaches nothing; give the '
            'file of its trained weights'
        )
    loaded = read_checkpoint(fetch(checkpoint), 'teacher.checkpoint', trusted)
    model = build_model(config, 'teacher.config', pretrained=False)
    report = load_weights(model, checkpoints.state_dict_of(loaded), str(checkpoint), allow)
    meta = loaded.get('meta') if isinstance(loaded.get('meta'), Mapping) else {}
    return model, dict(meta), report


def read_checkpoint(path: str, key: str, trusted: bool = False) -> dict:
    """:func:`kd_dense.checkpoint.load`, with the config key in front of what can go wrong."""
    try:
        return checkpoints.load(path, trusted=trusted)
    except (OSError, checkpoints.CheckpointError) as error:
        raise ConfigError(f'{key}: {error}') from error


def fetch(checkpoint: str) -> str:
    """A local path for ``checkpoint``: a URL is downloaded once into torch's cache, as the toolboxes do."""
    if not str(checkpoint).startswith(('http://', 'https://')):
        return checkpoint
    import os

    import torch

    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    path = osp.join(folder, osp.basename(checkpoint))
    if not osp.isfile(path):
        os.makedirs(folder, exist_ok=True)
        try:
            torch.hub.download_url_to_file(checkpoint, path)
        except OSError as error:
            raise ConfigError(f'teacher.checkpoint: {checkpoint} can not be downloaded: {error}') from error
    return path


def forget_pretrained(cfg: Any) -> None:
    """Remove every ``pretrained`` and ``init_cfg`` from a model config, in place.

    Their weights would be overwritten anyway.
    """
    if isinstance(cfg, dict):
        for name in ('pretrained', 'init_cfg'):
            if name in cfg:
                cfg[name] = None
        for value in cfg.values():
            forget_pretrained(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            forget_pretrained(value)


def _current_scope() -> str:
    scope = DefaultScope.get_current_instance()
    return scope.scope_name if scope is not None else ''


def _fill_registry(scope: str) -> None:
    module = SCOPES.get(scope)
    if module is not None:
        import importlib

        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ConfigError(f'a model of {scope} is asked for, but {error.name} is not installed') from error
