"""Training loops of MMEngine that can go on where they were."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop

from kd_dense.registry import LOOPS


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """MMEngine's loop, which begins an epoch anew, but able to leave out the batches that are done.

    Attributes:
        skip: batches to draw without training on them in the epoch that begins next.
        skipped: called after they were drawn.
    """

    skip = 0
    skipped: Callable[[], None] = staticmethod(lambda: None)

    def run_epoch(self) -> None:
        """Train for one epoch, or for the rest of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if self.skip:
            print_log(
                f'{self.skip} batches of epoch {self.epoch + 1} are done and are drawn without training', 'current'
            )
        for index, batch in enumerate(self.dataloader):
            if index >= self.skip:
                self.run_iter(index, batch)
            elif index + 1 == self.skip:
                self.skipped()
        self.skip = 0
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


def use_resumable_loop(cfg: Config) -> None:
    """Put :class:`ResumableEpochLoop` in the place of MMEngine's own epoch-based loop."""
    loop = cfg.get('train_cfg')
    if loop and (loop.get('type') == 'EpochBasedTrainLoop' or ('type' not in loop and loop.get('by_epoch'))):
        loop.pop('by_epoch', None)
        loop.type = 'kd_dense.ResumableEpochLoop'
