"""A module that a distiller trains on its own, out of reach of the host's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_dense.errors import ConfigError, closest

#: Optimizers a config may name.
OPTIMIZERS = {cls.__name__: cls for cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}


class SideTrained(nn.Module):
    """A module with an optimizer of its own, such as the discriminator of an adversarial method.

    The module is no submodule: its parameters are in no parameter list, so the host's optimizer, gradient clipping and
    DDP never see them, and neither do the checks that every connector is optimised and gets a gradient. It moves with
    its owner all the same, and the state dict has its weights and the state of its optimizer, so that a resumed run
    goes on as if it had not stopped.

    Calling it runs the module with constant weights: a gradient flows to the inputs only. :meth:`step` trains it, after
    the backward of the host (the graph of a call needs the weights that it ran with). Over several processes
    gradients are averaged; equal initial weights are up to the caller (:meth:`Distiller.setup` is seeded).

    Args:
        module: what to train. It stays in training mode.
        optimizer: ``dict(type='SGD', ...)``, or ``Adam`` or ``AdamW``, with its arguments except ``lr``, which is given
            at every step.

    Raises:
        ConfigError: an optimizer or an argument that does not exist.
    """

    def __init__(self, module: nn.Module, optimizer: Mapping[str, Any]) -> None:
        super().__init__()
        arguments = dict(optimizer)
        kind = arguments.pop('type', None)
        if kind not in OPTIMIZERS:
            raise ConfigError(f'optimizer.type: unknown optimizer {kind!r}; {closest(str(kind), OPTIMIZERS)}')
        try:
            self.optimizer = OPTIMIZERS[kind](module.parameters(), lr=0.0, **arguments)
        except TypeError as error:
            raise ConfigError(f'optimizer: {kind}: {error}; lr is set by lr_mult') from None
        self.__dict__['module'] = module.requires_grad_(False)  # past nn.Module, which would register it

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)

    @torch.enable_grad()
    def step(self, loss: Callable[[nn.Module], Tensor], lr: float) -> Tensor:
        """One step of the optimizer on ``loss(module)`` with the learning rate ``lr``; gives the loss, detached.

        What ``loss`` uses besides the module has to be detached.
        """
        parameters = list(self.module.parameters())
        self.module.requires_grad_(True)
        try:
            value = loss(self.module)
            for p, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                if dist.is_available() and dist.is_initialized():
                    dist.all_reduce(gradient)
                    gradient /= dist.get_world_size()
                p.grad = gradient
            for group in self.optimizer.param_groups:
                group['lr'] = lr
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.module.requires_grad_(False)
        return value.detach()

    # -- as if it were a submodule -------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SideTrained:
        super()._apply(fn, recurse)
        self.module._apply(fn, recurse)
        for state in self.optimizer.state.values():
            state.update({k: fn(v) for k, v in state.items() if isinstance(v, Tensor) and k != 'step'})
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self.module.state_dict(destination=destination, prefix=f'{prefix}module.', keep_vars=keep_vars)
        for i, parameter in enumerate(self.module.parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    destination[f'{prefix}optimizer.{i}.{name}'] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        weights = {k.removeprefix('module.'): v for k, v in own.items() if k.startswith('module.')}
        try:
            result = self.module.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [f'{prefix}module.{k}' for k in result.missing_keys]
        unexpected_keys += [f'{prefix}module.{k}' for k in result.unexpected_keys]
        parameters = list(self.module.parameters())
        # Written anew: what a checkpoint does not have (that of a run before its first step) is not there.
        self.optimizer.state.clear()
        for key in own.keys() - {f'module.{k}' for k in weights}:
            head, _, rest = key.partition('.')
            index, _, name = rest.partition('.')
            if head != 'optimizer' or not index.isdigit() or int(index) >= len(parameters):
                unexpected_keys.append(prefix + key)
                continue
            parameter = parameters[int(index)]
            device = 'cpu' if name == 'step' else parameter.device  # where torch keeps its own
            self.optimizer.state[parameter][name] = own[key].detach().to(device, copy=True)
