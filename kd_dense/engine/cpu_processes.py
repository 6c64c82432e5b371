"""Several processes without a GPU: MMEngine's launchers take it for granted that there is one."""

from __future__ import annotations

import atexit

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device


def start_cpu_processes(cfg: Config) -> None:
    """Make ``cfg.launcher='pytorch'`` work on a machine without a GPU; do nothing on others.

    MMEngine sets the CUDA device of a process before it starts the process group, and hands it to the wrapped model.
    Here the group is started first, with the gloo backend, and MMEngine finds it; the wrapper gets no device.

    Args:
        cfg: with ``launcher`` set; ``model_wrapper_cfg`` is written into it.
    """
    if cfg.get('launcher') != 'pytorch' or get_device() != 'cpu':
        return
    if not dist.is_initialized():
        dist.init_process_group('gloo')
        # Its threads, if they are still there when the interpreter ends, can abort the process.
        atexit.register(_leave)
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = dict(wrapper, **(cfg.get('model_wrapper_cfg') or {}), device_ids=None)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
