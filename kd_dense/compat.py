"""Mends for the installed PyTorch and OpenMMLab packages; :func:`apply` runs once, when kd_dense is imported.

==========================================  ==========================================================================
what breaks                                 what is done
==========================================  ==========================================================================
``--resume`` and ``load_from`` of MMEngine  MMEngine calls ``torch.load`` without ``weights_only``, which torch >= 2.6
checkpoints                                 takes as True, and then refuses ``HistoryBuffer``. Local files are loaded
                                            by :func:`kd_dense.checkpoint.load` instead, registered through MMEngine's
                                            ``CheckpointLoader.register_scheme``.
half-written checkpoints after a crash      MMEngine's local file backend writes in place. Its ``put`` is made atomic.
no checkpoint at all after a crash          With ``max_keep_ckpts``, ``CheckpointHook`` removes the oldest checkpoint
                                            before it writes the new one; it is made to do so afterwards. And it
                                            truncates ``last_checkpoint`` before it fills it: where that file is empty,
                                            ``--resume`` takes the newest checkpoint.
``_base_ = 'mmseg::...'`` and               MMEngine looks for the distribution ``mmsegmentation``; the maintained
``get_config`` with the onedl forks         forks are called ``onedl-...`` and import under the same names. The map
                                            from module to distribution is corrected to what is installed.
pip runs in the middle of a program         ``mmengine.hub`` installs a package that it does not find, and Ultralytics
                                            does so too. Both are told not to.
==========================================  ==========================================================================

Nothing here changes results, and packages that are not installed are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from typing import Any

_applied = False


def apply() -> None:
    """Apply all mends. Calling it again does nothing."""
    global _applied
    if _applied:
        return
    _load_local_checkpoints_as_data()
    _write_local_files_atomically()
    _remove_the_oldest_checkpoint_last()
    _find_the_latest_checkpoint()
    _find_forked_packages()
    _never_pip_install()
    _applied = True


def _load_local_checkpoints_as_data() -> None:
    from mmengine.runner.checkpoint import CheckpointLoader

    from kd_dense import checkpoint

    # MMEngine prints this function's name without its first ten letters: "Loads checkpoint by local backend".
    def load_from_local(filename: str, map_location: Any = None) -> dict:
        return checkpoint.load(filename, map_location=map_location)

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


def _write_local_files_atomically() -> None:
    from mmengine.fileio import LocalBackend

    from kd_dense.checkpoint import atomic_write

    def put(self: LocalBackend, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write ``obj`` to ``filepath``, which is at every moment either the old file or the complete new one."""
        with atomic_write(filepath) as file:
            file.write(obj)

    LocalBackend.put = put


def _remove_the_oldest_checkpoint_last() -> None:
    from mmengine.dist import is_main_process
    from mmengine.hooks import CheckpointHook

    save = CheckpointHook._save_checkpoint_with_step

    def _save_checkpoint_with_step(self: CheckpointHook, runner: Any, step: int, meta: dict) -> None:
        kept = getattr(self, 'keep_ckpt_ids', ())
        # Taken off the list, so that MMEngine finds it short enough and removes nothing.
        is_full = self.max_keep_ckpts > 0 and len(kept) == self.max_keep_ckpts and kept[-1] != step
        oldest = kept.popleft() if is_full else None
        save(self, runner, step, meta)
        if oldest is not None and is_main_process():
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(oldest))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # DeepSpeed writes folders
                self.file_backend.rmtree(path)

    CheckpointHook._save_checkpoint_with_step = _save_checkpoint_with_step


def _find_the_latest_checkpoint() -> None:
    import mmengine.runner
    import mmengine.runner._flexible_runner
    import mmengine.runner.checkpoint
    import mmengine.runner.runner

    from kd_dense import checkpoint

    runner = mmengine.runner
    for module in (runner, runner.checkpoint, runner.runner, runner._flexible_runner):
        module.find_latest_checkpoint = checkpoint.latest


def _find_forked_packages() -> None:
    from mmengine.config.utils import MODULE2PACKAGE

    for module, package in list(MODULE2PACKAGE.items()):
        if not _is_distribution(package) and importlib.util.find_spec(module) is not None:
            owners = importlib.metadata.packages_distributions().get(module)
            # Without an owner the module lies on PYTHONPATH, where MMEngine finds it by its own name.
            MODULE2PACKAGE[module] = owners[0] if owners else module


def _is_distribution(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _never_pip_install() -> None:
    import mmengine.hub.hub
    import mmengine.utils.package_utils

    def install_package(package: str) -> None:
        """Stands in for MMEngine's function of this name, which would run pip."""
        if not mmengine.utils.is_installed(package):
            raise ModuleNotFoundError(f'{package} is not installed; install it, then run this again.')

    for module in (mmengine.hub.hub, mmengine.utils, mmengine.utils.package_utils):
        module.install_package = install_package
    os.environ.setdefault('YOLO_AUTOINSTALL', 'false')  # read when ultralytics is imported
