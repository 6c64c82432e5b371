"""What the sweep checks of one model of MMSegmentation or MMDetection."""

from __future__ import annotations

import math
from typing import Any

import pytest
from mmengine.config import ConfigDict

from kd_dense import ConfigError
from tests.generality.catalog import Model
from tests.generality.shrink import detection_batch, narrow, one_step, read, segmentation_batch


def parameters(models: tuple[Model, ...]) -> list:
    """For pytest: the sample always, the others with the slow tests."""
    return [pytest.param(m, id=m.name, marks=[] if m.sample else [pytest.mark.slow]) for m in models]


def sweep(toolbox: str, entry: Model) -> None:
    """One step with ``FeatureMimic``, and one with ``LogitKD`` or the sentence with which it refuses."""
    if entry.package:
        pytest.importorskip(entry.package, reason=f'{toolbox} needs {entry.package} to train {entry.name}')
    config = read(toolbox, entry.config, entry.size)
    student, teacher = (_narrowed(config, factor, entry) for factor in entry.factors)
    batch = _batch(toolbox, config, entry)
    taps = entry.taps or ('neck' if toolbox == 'mmdet' and config.get('neck') else 'backbone')
    options = dict(size=entry.size, init=entry.init)

    found = one_step(student, teacher, {'mimic': dict(type='FeatureMimic', taps=taps)}, batch, **options)
    assert entry.name in found['modules'] | {str(config.type).rpartition('.')[2]} | _types(config)
    _learned(found)
    differ = entry.factors[0] != entry.factors[1]
    assert bool(found['connectors']) == differ and all(found['connectors'].values())

    logits = {'logits': dict(type='LogitKD')}
    batch = _batch(toolbox, config, entry)
    if entry.no_logits:
        with pytest.raises(ConfigError, match=entry.no_logits.replace('.', r'\.')):
            one_step(student, teacher, logits, batch, **options)
    else:
        _learned(one_step(student, teacher, logits, batch, **options), copies=not differ)


def _learned(found: dict, copies: bool = False) -> None:
    losses = found['losses']
    assert all(math.isfinite(value) for value in losses.values()), losses
    assert all(value > 0 for name, value in losses.items() if name.startswith('kd.')), losses
    gradients = [value for value in found['student'].values() if value is not None]
    assert all(math.isfinite(value) for value in gradients)
    # some layers are frozen, start at 0 or take part only now and then
    assert sum(value > 0 for value in gradients) > 0.4 * len(found['student'])


def _narrowed(config: ConfigDict, factor: int, entry: Model) -> ConfigDict:
    model = narrow(config, factor)
    for key, value in entry.options.items():
        node, (*path, last) = model, key.split('.')
        for part in path:
            node = node[part]
        node[last] = value
    return model


def _batch(toolbox: str, config: ConfigDict, entry: Model) -> dict:
    if toolbox == 'mmseg':
        heads = config.decode_head if isinstance(config.decode_head, (list, tuple)) else [config.decode_head]
        return segmentation_batch(min(heads[-1].get('num_classes') or 2, 19), entry.size)
    classes = _find(config, 'num_things_classes') or _find({**config, 'rpn_head': None}, 'num_classes') or 80
    return detection_batch(classes, _find(config, 'num_stuff_classes') or 0, entry.size, entry.masks)


def _find(node: Any, key: str) -> Any:
    """The first value under ``key``, at any depth."""
    if isinstance(node, dict):
        if node.get(key) is not None:
            return node[key]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        return next((found for found in (_find(value, key) for value in node) if found is not None), None)
    return None


def _types(node: Any) -> set[str]:
    """Every ``type`` in a config, such as that of a fusion head that is no module of the student."""
    if isinstance(node, dict):
        own = {str(node['type']).rpartition('.')[2]} if 'type' in node else set()
        return own.union(*(_types(value) for value in node.values()))
    if isinstance(node, (list, tuple)):
        return set().union(*(_types(value) for value in node))
    return set()


def uncovered(names: list[str], models: tuple[Model, ...], reasons: dict[str, str]) -> set[str]:
    """Classes of a toolbox that neither the sweep nor a reason mentions."""
    return set(names) - {m.name for m in models} - set(reasons)
