"""What the machine and the installation are."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

import torch

#: Module -> names of the distributions that bring it: the original first, then the maintained fork.
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'ultralytics': ('ultralytics',),
}


def environment() -> dict[str, Any]:
    """Versions, the family of OpenMMLab's packages, mmcv's operators, devices, cores and memory in bytes."""
    found = {module: _installed(names) for module, names in DISTRIBUTIONS.items()}
    forks = {module for module, (name, _) in found.items() if name.startswith('onedl-')}
    openmmlab = {module for module, (name, _) in found.items() if name} - {'ultralytics'}
    family = None if not openmmlab else 'onedl fork' if forks == openmmlab else 'mixed' if forks else 'original'
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        'python': platform.python_version(),
        'torch': torch.__version__,
        'versions': {module: version for module, (_, version) in found.items()},
        'distributions': {module: name or None for module, (name, _) in found.items()},
        'openmmlab_family': family,
        'mmcv_operators': operators_problem() is None,
        'gpus': [{'name': gpu.name, 'memory_bytes': gpu.total_memory} for gpu in gpus],
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if hasattr(os, 'sysconf') else None,
    }


def operators_problem() -> str | None:
    """One sentence when mmcv's compiled operators do not load; ``None`` when they do."""
    try:
        importlib.import_module('mmcv._ext')
    except ImportError as error:
        return (
            f'mmcv: its compiled operators (mmcv._ext) do not load ({error}), and detectors and many decode heads need '
            'them; build mmcv again for this PyTorch, which `make setup` does'
        )
    return None


def problems(packages: Iterable[str], needs_operators: bool) -> list[str]:
    """What is missing for a config that needs ``packages``: one sentence each."""
    sentences = []
    for module in packages:
        name, _ = _installed(DISTRIBUTIONS[module])
        if not name and importlib.util.find_spec(module) is None:
            sentences.append(f'{module} is not installed, and this config needs it; `make setup` installs it')
    if needs_operators and not sentences:
        problem = operators_problem()
        sentences += [problem] if problem else []
    return sentences


def _installed(names: Iterable[str]) -> tuple[str, str | None]:
    """The first of the distributions that is installed and its version, or ``('', None)``."""
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return '', None
