"""Lets a training with ``compile`` in its config go on where compiling fails."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from kd_dense.compilation import or_uncompiled


class CompileHook(Hook):
    """Has MMEngine compile by :func:`~kd_dense.compilation.or_uncompiled`.

    MMEngine reads ``compile`` of the config once, between the begin of a run and that of its loop. In between stands
    what we made of it; then the config is again what it was, as checkpoints are to keep it.
    """

    def __init__(self) -> None:
        self._asked: Any = None

    def take_over(self, runner: Runner) -> None:
        """At the begin of a run."""
        self._give_back(runner)  # of a run that came to no loop
        self._asked = runner.cfg.get('compile')
        if self._asked:
            options = {} if self._asked is True else self._asked
            runner.cfg.compile = or_uncompiled(options, lambda text: print_log(text, 'current', logging.WARNING))

    def _give_back(self, runner: Runner) -> None:
        if self._asked:
            runner.cfg.compile, self._asked = self._asked, None

    before_train = before_val = before_test = _give_back
