"""``torch.compile`` for a training that goes on where compiling fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kd_dense.errors import ConfigError, cause, closest


def or_uncompiled(options: Mapping[str, Any], say: Callable[[str], object]) -> dict[str, Any]:
    """Arguments for ``torch.compile``: ``options``, with a backend that hands a graph back as it is where it fails.

    What fails is most often not the model: there is no C++ compiler, or one that is too old. After the first failure no
    graph is tried any more; those that were compiled before stay.

    Args:
        options: of ``torch.compile``: ``backend``, ``mode``, ``dynamic``, ...
        say: takes the one sentence about a failure.

    Raises:
        ConfigError: torch knows no such backend.
    """
    options = dict(options)
    name, mode, inner = (options.pop(key, None) for key in ('backend', 'mode', 'options'))
    name = name or 'inductor'
    try:
        backend = torch._dynamo.lookup_backend(name)
    except Exception as error:  # of a class that torch does not promise to keep
        known = closest(str(name), torch._dynamo.list_backends())
        raise ConfigError(f'compile.backend: torch has no backend {name!r}; {known}') from error
    mode = None if mode == 'default' else mode
    arguments: dict[str, Any] = {}
    if name == 'inductor':  # as torch.compile hands them to it
        patches = torch._inductor.list_mode_options(mode, options.get('dynamic')) if mode else {}
        patches = patches | {key.replace('-', '_'): value for key, value in (inner or {}).items()}
        arguments = {'config_patches': patches} if patches else {}
    else:
        arguments = {key: value for key, value in (('mode', mode), ('options', inner)) if value}
    failed = False

    def compiled(graph: Any, inputs: list) -> Callable:
        nonlocal failed
        if not failed:
            try:
                return backend(graph, inputs, **arguments)
            except Exception as error:  # of many types: code generation, a C++ compiler that is not there
                failed = True
                say(
                    f'compile: torch.compile fails ({cause(error)}), so nothing more is compiled, and the training '
                    'goes on'
                )
        return graph.forward

    return {**options, 'backend': compiled}
