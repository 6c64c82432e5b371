"""The hook that ties :class:`~kd_dense.BackbonePretraining` to MMEngine's runner."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from kd_dense.checkpoint import latest
from kd_dense.engine.companions import bring_companions
from kd_dense.errors import ConfigError
from kd_dense.registry import HOOKS


@HOOKS.register_module()
class PretrainingHook(Hook):
    """Checks, before training, that a cache of soft labels belongs to the config, its images and its teacher.

    After training it logs how the weights are used.

    It brings along the hooks of :func:`~kd_dense.engine.companions.bring_companions`.
    """

    def before_run(self, runner: Runner) -> None:
        bring_companions(runner)

    def before_train(self, runner: Runner) -> None:
        from kd_dense.models import BackbonePretraining  # these need this package
        from kd_dense.pretraining.verify import verify

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, BackbonePretraining):
            raise ConfigError(
                "model: PretrainingHook needs a model of type 'kd_dense.BackbonePretraining', and this config has "
                'another; remove the hook'
            )
        verify(runner.cfg, runner.train_dataloader)

    def after_train(self, runner: Runner) -> None:
        path = latest(runner.work_dir)
        if path is not None:
            print_log(
                f"a segmentor or detector begins with these weights by backbone=dict(init_cfg=dict(type='Pretrained', "
                f"checkpoint={path!r}, prefix='backbone.'))",
                'current',
            )
