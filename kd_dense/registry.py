"""Registries of kd_dense (scope ``kd_dense``) and the one function that builds from them."""

import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from kd_dense.errors import ConfigError, closest

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='kd_dense', locations=['kd_dense.models'])
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='kd_dense',
    locations=[
        'kd_dense.data.datasets',
        'kd_dense.cache',
        'kd_dense.adaptation.paired',
        'kd_dense.adaptation.image_folder',
    ],
)
DATA_SAMPLERS = Registry(
    'data sampler',
    parent=MMENGINE_DATA_SAMPLERS,
    scope='kd_dense',
    locations=['kd_dense.cache', 'kd_dense.adaptation.rare_class_sampler'],
)
METRICS = Registry(
    'metric',
    parent=MMENGINE_METRICS,
    scope='kd_dense',
    locations=['kd_dense.engine.cityscapes', 'kd_dense.engine.coco_metric'],
)
TRANSFORMS = Registry(
    'transform',
    parent=MMENGINE_TRANSFORMS,
    scope='kd_dense',
    locations=['kd_dense.adaptation.transforms', 'kd_dense.pretraining.images'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='kd_dense', locations=['kd_dense.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='kd_dense', locations=['kd_dense.engine.loops'])
MODEL_WRAPPERS = Registry(
    'model_wrapper', parent=MMENGINE_MODEL_WRAPPERS, scope='kd_dense', locations=['kd_dense.models.sharded']
)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='kd_dense', locations=['kd_dense.engine.amp']
)

# Roots of their own: MMEngine admits one child registry per scope and parent, and these are never built by a host
# toolbox.
DISTILLERS = Registry('distiller', scope='kd_dense', locations=['kd_dense.distillers'])
CONNECTORS = Registry('connector', scope='kd_dense', locations=['kd_dense.connectors'])
LOSSES = Registry('loss', scope='kd_dense', locations=['kd_dense.losses'])


def lookup(registry: Registry, name: str, key: str) -> Any:
    """The class or function registered as ``name``; ``key`` is the config key named in the error.

    Raises:
        ConfigError: no such name; the closest registered names are listed.
    """
    registry.import_from_location()
    if not isinstance(name, str):
        raise ConfigError(f'{key}: must be a name, one of {", ".join(sorted(registry.module_dict))}, not {name!r}')
    name = name.removeprefix('kd_dense.')
    found = registry.module_dict.get(name)
    if found is None:
        raise ConfigError(f'{key}: unknown {registry.name} {name!r}; {closest(name, registry.module_dict)}')
    return found


def build(registry: Registry, cfg: Mapping | str, key: str, **extra: Any) -> Any:
    """Build ``dict(type=..., **arguments)`` (or just a type name) from ``registry``.

    Unlike MMEngine's own builder, a wrong type or argument name ends in one sentence that names the config key ``key``.

    Raises:
        ConfigError: ``type`` missing or unknown, or an argument that the class does not take.
    """
    arguments = {'type': cfg} if isinstance(cfg, str) else dict(cfg)
    if 'type' not in arguments:
        registry.import_from_location()
        raise ConfigError(f"{key}: needs type='...', one of {', '.join(sorted(registry.module_dict))}")
    cls = lookup(registry, arguments.pop('type'), key)
    check_arguments(cls, arguments, key, exclude=extra)
    return cls(**arguments, **extra)


def check_arguments(cls: Any, arguments: Mapping, key: str, exclude: Mapping = {}) -> None:
    """Raise :class:`ConfigError` when ``arguments`` has a name that ``cls`` does not take, or lacks a required one."""
    known = parameters_of(cls)
    for name in arguments:
        if name not in known or name in exclude:
            names = [n for n in known if n not in exclude]
            raise ConfigError(f'{key}: {cls.__name__} has no option {name!r}; {closest(name, names)}')
    for name, required in known.items():
        if required and name not in arguments and name not in exclude:
            raise ConfigError(f'{key}: {cls.__name__} needs the option {name!r}')


def parameters_of(cls: Any) -> dict[str, bool]:
    """Names of the arguments that ``cls`` (a class or a function) takes -> whether each is required.

    ``**kwargs`` of a constructor are followed up its bases, so that a subclass need not repeat what it hands on.
    """
    found: dict[str, bool] = {}
    for scope in inspect.getmro(cls) if inspect.isclass(cls) else [cls]:
        function = scope.__dict__.get('__init__') if inspect.isclass(scope) else scope
        if function is None:
            continue
        signature = inspect.signature(function).parameters.values()
        for p in signature:
            if p.name != 'self' and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, p.default is p.empty)
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            break
    return found
