"""A student sharded over processes by PyTorch's FSDP; the teacher stays whole in each."""

from __future__ import annotations

from typing import Any

from mmengine.model.wrappers import MMFullyShardedDataParallel
from torch import nn

from kd_dense.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class ShardedDistillation(MMFullyShardedDataParallel):
    """MMEngine's wrapper for FSDP around a :class:`~kd_dense.Distillation`, whose checkpoints hold the plain student.

    For ``FSDPStrategy(model_wrapper=dict(type='kd_dense.ShardedDistillation'), state_dict_cfg='full')``. FSDP gathers
    every parameter under its own name; here the student's names become plain, and the gathered connectors are handed to
    :meth:`~kd_dense.Distillation.distillation_state`, from where the checkpoint takes them.

    Args:
        module: the :class:`~kd_dense.Distillation`.
        **kwargs: as for MMEngine's wrapper; ``device_id='cpu'`` shards over processes without a GPU.
    """

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """The plain student, gathered as the state dict type says; empty on processes that are given nothing."""
        own = self.module
        if self.compute_device.type == 'cpu' and getattr(self._state_dict_config, 'offload_to_cpu', False):
            # What is on the CPU already is freed by offloading it; torch 2.12 then reads freed memory.
            self._state_dict_config.offload_to_cpu = False
        with own.all_under_own_names():
            gathered = super().state_dict(*args, **kwargs)
        plain, rest = {}, {}
        for name, value in gathered.items():
            if name.startswith('student.'):
                plain[name.removeprefix('student.')] = value
            elif name.startswith('distillers.'):
                rest[name.removeprefix('distillers.')] = value
        own.gathered_distillation_state = rest
        return plain
