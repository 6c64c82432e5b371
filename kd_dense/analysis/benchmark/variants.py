"""Distillers given on a command line, in place of those of a config."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_dense.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """Distillers under the name that the table gives them.

    Args:
        distillers: name -> ``dict(type=..., ...)``; ``None``: those of the config.
    """

    name: str
    distillers: Mapping[str, Mapping] | None = None


def read_variant(words: Sequence[str]) -> Variant:
    """``NAME`` and one ``distiller=dict(type=..., ...)`` or more, as after ``--variant``.

    Raises:
        ConfigError: no distiller, or one that can not be read.
    """
    name, *assignments = words
    if not assignments or '=dict(' in name.replace(' ', ''):
        raise ConfigError(
            f"--variant: needs a name and distillers, such as --variant CWD \"neck=dict(type='CWD', taps='neck')\", "
            f'not {" ".join(words)!r}'
        )
    distillers: dict[str, Mapping] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition('=')
        try:
            value = _value(ast.parse(text.strip(), mode='eval').body)
        except (SyntaxError, ValueError):
            value = None
        if not equals or not isinstance(value, dict):
            raise ConfigError(
                f"--variant {name}: {assignment!r} is no distiller; write it as in a config, NAME=dict(type='...', ...)"
            )
        distillers[key.strip()] = value
    return Variant(name, distillers)


def title_of(distillers: Mapping[str, Mapping]) -> str:
    """``'CWD + LogitKD'``: the types of the distillers of a config."""
    return ' + '.join(str(d.get('type', name)).removeprefix('kd_dense.') for name, d in distillers.items())


def _value(node: ast.expr) -> Any:
    """A literal, in which ``dict(a=1)`` stands for ``{'a': 1}``."""
    if isinstance(node, ast.Call):
        named = [word for word in node.keywords if word.arg is not None]
        if (
            not isinstance(node.func, ast.Name)
            or node.func.id != 'dict'
            or node.args
            or len(named) < len(node.keywords)
        ):
            raise ValueError('only dict(name=value, ...) is called')
        return {word.arg: _value(word.value) for word in named}
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True)}
    return ast.literal_eval(node)
