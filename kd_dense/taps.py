"""Name and capture tensors inside any ``nn.Module``; stop the forward after the deepest one.

A *tap* is written ``module.path``, or ``module.path:key`` with one or more integer or string keys into what the module
returns: ``neck``, ``backbone:3``, ``bbox_head:0:2``, ``model.23:one2many:scores``. An adapter may add *aliases* for
places that have no module of their own (``logits``; ``neck`` of a YOLO model), each a list of such names.

``module.path@view`` takes another view of a call of the module than what it returns: ``qkv`` gives query, key and value
of an attention module (:func:`kd_dense.attention.qkv`), ``rois`` the regions that a RoI extractor is called with
(:func:`kd_dense.rois.rois`).

Taps shadow ``forward`` on the tapped module instances while recording, and are gone outside of it: nothing stays on the
model that a pickle, a deep copy or an export could meet. Shadowing, unlike a forward hook, also sees heads whose
``forward`` the toolbox calls directly (every decode head of MMSegmentation, the dense heads of MMDetection in tensor
mode).

Under ``torch.compile`` a graph ends before and begins after each tapped module, and the module itself is compiled on
its own; what happens here runs in Python, so that a tap means the same as without compilation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from kd_dense.attention import is_attention, qkv
from kd_dense.errors import ConfigError, DistillationError, closest
from kd_dense.rois import is_roi_extractor, rois

#: View -> (does a module have it?, the view of a call: module, args, kwargs -> tensors).
VIEWS: dict[str, tuple[Callable[[nn.Module], bool], Callable[[nn.Module, tuple, dict], Any]]] = {
    'qkv': (is_attention, qkv),
    'rois': (is_roi_extractor, rois),
}


class _Stop(BaseException):
    """Raised inside a model when every tap has fired; never leaves :meth:`Taps.run_until_deepest`.

    Not an ``Exception``, so that no ``except Exception`` inside the model swallows it.
    """


class Taps:
    """The taps of one model.

    Args:
        model: the model to look into.
        names: tap names; see the module docstring.
        aliases: alias -> tap names that it stands for. ``alias:i`` is the i-th of them.
        key: config key or owner named in errors.

    Raises:
        ConfigError: a path that the model does not have; the closest paths are listed.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], aliases: Mapping[str, list[str]] | None = None, key: str = 'taps'
    ) -> None:
        self.aliases = dict(aliases or {})
        self.key = key
        self._modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
        self.expanded = {name: self._expand(name) for name in dict.fromkeys(names)}
        paths = dict.fromkeys(path for parts in self.expanded.values() for path, _ in parts)
        self._tapped = {path: self._modules[path.partition('@')[0]] for path in paths}
        # Is the captured tensor overwritten by a later in-place operation? Found out in the first recording, which
        # clones all.
        self._overwritten: dict[str, bool] = {}
        # How often each tapped module runs in one forward, per key of the caller; needed to know when the deepest has
        # fired.
        self._calls: dict[Hashable, Counter] = {}
        self._records: dict[str, list] = {}
        self._recording = False
        # Path -> the forward of its module and what shadows it. Kept, because torch.compile compiles anew for every new
        # function that it meets.
        self._shadows: dict[str, tuple[Callable, Callable]] = {}
        self._fired: Callable[[str], None] = lambda path: None

    def _expand(self, name: str) -> list[tuple[str, tuple[str, ...]]]:
        """Tap name -> ``(module path, keys)`` pairs."""
        head, *keys = name.split(':')
        if head in self.aliases:
            members = self.aliases[head]
            if keys:
                index = keys.pop(0)
                if not index.removeprefix('-').isdigit() or not -len(members) <= int(index) < len(members):
                    raise ConfigError(
                        f'{self.key}: tap {name!r}: {head!r} has the members 0..{len(members) - 1}, not {index!r}'
                    )
                members = [members[int(index)]]
            found = [(path, (*inner, *keys)) for path, inner in map(self._split, members)]
        else:
            found = [(head, tuple(keys))]
        for whole, _ in found:
            path, at, view = whole.partition('@')
            if path not in self._modules:
                near = closest(path, [*self._modules, *self.aliases])
                raise ConfigError(f'{self.key}: the model has no module {path!r}; {near}')
            if at:
                self._check_view(name, path, view)
        return found

    def _check_view(self, name: str, path: str, view: str) -> None:
        if view not in VIEWS:
            raise ConfigError(f'{self.key}: tap {name!r}: there is no view {view!r}; {closest(view, VIEWS)}')
        has_view, _ = VIEWS[view]
        if not has_view(self._modules[path]):
            kind, able = type(self._modules[path]).__name__, [p for p, m in self._modules.items() if has_view(m)]
            raise ConfigError(f'{self.key}: tap {name!r}: {path} is a {kind} without {view}; {closest(path, able)}')

    @property
    def paths(self) -> list[str]:
        """Paths of the tapped modules."""
        return list(self._tapped)

    @staticmethod
    def _split(name: str) -> tuple[str, tuple[str, ...]]:
        path, *keys = name.split(':')
        return path, tuple(keys)

    # -- recording -----------------------------------------------------------------------------------------------------

    @contextmanager
    def record(self) -> Iterator[Taps]:
        """Capture what runs inside the ``with`` block; read it with :meth:`take`, once, in the block or after it."""
        with self._recorder(lambda path: None):
            yield self

    @torch.compiler.disable(recursive=False)
    def run_until_deepest(self, forward: Callable[[], Any], key: Hashable = None) -> None:
        """Call ``forward`` and abandon it as soon as every tap has fired as often as it does in a whole forward.

        The first call for each ``key`` (the batch size, say: whatever the number of calls of a module may depend on)
        runs to the end and counts.
        """
        expected = self._calls.get(key)
        seen: Counter = Counter()
        left = sum(expected.values()) if expected else -1

        def fired(path: str) -> None:
            nonlocal left
            seen[path] += 1
            left -= 1
            if left == 0:
                raise _Stop

        with self._recorder(fired), suppress(_Stop):
            forward()
        if expected is not None and seen != expected:
            self._records = {}
            raise DistillationError(
                f'{self.key}: the tapped modules ran {dict(seen)} times in this forward but {dict(expected)} times '
                'before; tap a module that runs equally often in every forward'
            )
        self._calls[key] = seen

    @contextmanager
    def _recorder(self, fired: Callable[[str], None]) -> Iterator[None]:
        if self._recording:
            raise RuntimeError('taps can not be recorded twice at the same time')
        self._records = {path: [] for path in self._tapped}
        shadowed = {}
        self._recording, self._fired = True, fired
        try:
            for path, module in self._tapped.items():
                shadowed[path] = module.__dict__.get('forward')
                module.__dict__['forward'] = self._shadow(path, module.forward)
            yield
        except BaseException:
            self._records = {}  # let the tensors go
            raise
        finally:
            self._recording, self._fired = False, lambda path: None
            for path, before in reversed(shadowed.items()):  # one module may have two paths and be shadowed twice
                if before is None:
                    del self._tapped[path].__dict__['forward']
                else:  # an instance attribute of the host, such as the forward of a fused layer
                    self._tapped[path].__dict__['forward'] = before

    @torch.compiler.disable
    def _shadow(self, path: str, forward: Callable) -> Callable:
        """``forward``, which also captures what it returns."""
        known, shadow = self._shadows.get(path, (None, None))
        if known != forward:
            module = self._tapped[path]
            _, view = VIEWS.get(path.partition('@')[2], (None, None))

            def run(*args: Any, **kwargs: Any) -> Any:
                return forward(*args, **kwargs)

            # torch.compile limits the number of graphs of one code object, so each tapped module gets its own.
            run.__code__ = run.__code__.replace(co_name=f'tapped_{path}')

            @torch.compiler.disable(recursive=False)
            def shadow(*args: Any, **kwargs: Any) -> Any:
                output = run(*args, **kwargs)
                self._capture(path, output if view is None else self._view(path, view, module, args, kwargs))
                return output

            self._shadows[path] = forward, shadow
        return shadow

    def _view(self, path: str, view: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        try:
            return view(module, args, kwargs)
        except ConfigError as error:
            raise ConfigError(f'{self.key}: tap {path!r}: {error}') from None

    @torch.compiler.disable
    def _capture(self, path: str, output: Any) -> None:
        self._records[path].append(_Capture(output, clone=self._overwritten.get(path, True)))
        self._fired(path)

    @torch.compiler.disable
    def take(self) -> dict[str, list[Tensor]]:
        """Tap name -> its tensors in the order in which they were produced; the recording is emptied.

        A module that returns several tensors, or runs several times, gives all of them.

        Raises:
            DistillationError: a tap that did not fire, a key that its output does not have, or an output without
                tensors.
        """
        records, self._records = self._records, {}
        for path, captures in records.items():
            if not captures:
                raise DistillationError(
                    f'{self.key}: the module {path!r} did not run in this forward; tap one that takes part in training '
                    'and in the plain forward of the model'
                )
        values = {
            name: [
                tensor
                for path, keys in parts
                for capture in records[path]
                for tensor in _tensors(_select(capture.read(), keys, name, self.key), name, self.key)
            ]
            for name, parts in self.expanded.items()
        }
        for path, captures in records.items():
            changed = any(c.overwritten() for c in captures)
            if path not in self._overwritten:
                self._overwritten[path] = changed
            elif changed and not self._overwritten[path]:
                self._overwritten[path] = True
                raise DistillationError(
                    f'{self.key}: the output of {path!r} was overwritten in place in this forward but not in the first '
                    'one; tap the module before it'
                )
        return values


class _Capture:
    """One output of a tapped module, with the means to tell whether a later operation wrote into it."""

    def __init__(self, output: Any, clone: bool) -> None:
        # A list that the model goes on to change (Ultralytics reuses one) must not change what was captured.
        self._output = _copy_containers(output)
        self._versions = [(t, t._version) for t in _walk(self._output) if not t.is_inference()]
        self._clone = _map(self._output, Tensor.clone) if clone else None

    def overwritten(self) -> bool:
        return any(tensor._version != version for tensor, version in self._versions)

    def read(self) -> Any:
        # Even where it was cloned: an untouched original is read, so that the clone costs nothing after the first step.
        return self._clone if self._clone is not None and self.overwritten() else self._output


def _select(output: Any, keys: tuple[str, ...], name: str, owner: str) -> Any:
    for key in keys:
        try:
            output = output[int(key)] if isinstance(output, (list, tuple, Tensor)) else output[key]
        except (KeyError, IndexError, ValueError, TypeError):
            kind = type(output).__name__
            if isinstance(output, Mapping):
                kind += f' of {list(output)}'
            elif hasattr(output, '__len__'):
                kind += f' of {len(output)} items'
            raise ConfigError(f'{owner}: tap {name!r}: the output has no {key!r}; it is a {kind}') from None
    return output


def _tensors(output: Any, name: str, owner: str) -> list[Tensor]:
    if isinstance(output, Mapping):
        raise ConfigError(
            f'{owner}: tap {name!r} is a dict; choose one of its keys with {name}:KEY, KEY of {list(output)}'
        )
    found = list(_walk(output))
    if not found:
        raise ConfigError(f'{owner}: tap {name!r} gives no tensor but {type(output).__name__}')
    return found


def _walk(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _walk(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _walk(value)


def _map(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, Mapping):
        return {k: _map(v, function) for k, v in output.items()}
    if isinstance(output, (list, tuple)):
        return [_map(v, function) for v in output]
    return output


def _copy_containers(output: Any) -> Any:
    return _map(output, lambda tensor: tensor)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, ``module`` runs ``forward`` in place of its own."""
    before = module.__dict__.get('forward')
    module.__dict__['forward'] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__['forward']
        else:
            module.__dict__['forward'] = before
