"""A detector of MMDetection as the teacher of an Ultralytics student: what its backbone and its neck see.

Its functions are those of :mod:`kd_dense.yolo.describe` for the other toolbox; see
:class:`kd_dense.yolo.teacher.Adapter`. Only features are compared: class and box predictions of the two toolboxes are
laid out differently, and some of MMDetection's heads can not run without its data samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from kd_dense.description import Description
from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError
from kd_dense.models.build import load_teacher
from kd_dense.models.describe import describe as describe_model
from kd_dense.models.describe import dry_run, image_normalization, input_channels
from kd_dense.random_state import preserve_random_state
from kd_dense.taps import Taps
from kd_dense.teacher import LoadReport

#: Where the features of such a teacher are: its modules, and the alias for places inside its backbone.
FEATURES = ('backbone', 'neck', 'patch_embeddings')
FEATURES_ONLY = (
    'a teacher of MMDetection gives a YOLO student its features only; tap its neck or its backbone, or take a teacher '
    'of Ultralytics'
)
#: Ultralytics' validator runs Ultralytics' models only.
UNSCORED = (
    'teacher.config: the teacher is a model of MMDetection, which Ultralytics can not validate, so it is not scored '
    'on these images; score it with its own config and tools/test.py'
)


def is_config(config: Any) -> bool:
    """Does the value of ``teacher.config`` mean a model of MMDetection, not a model YAML of Ultralytics?"""
    return isinstance(config, Mapping) or (isinstance(config, str) and (config.endswith('.py') or '::' in config))


def read(options: Mapping) -> tuple[nn.Module, LoadReport]:
    """Build the model of ``config`` and load ``checkpoint`` into it, strictly.

    Args:
        options: see :func:`kd_dense.yolo.teacher.check_options`.

    Raises:
        ConfigError: see :func:`kd_dense.models.build.load_teacher`.
    """
    with preserve_random_state():
        model, meta, report = load_teacher(
            options['config'], str(options['checkpoint']), options['allow'], options['trusted']
        )
    model.dataset_meta = meta.get('dataset_meta') or {}  # where MMDetection's own tools keep it
    return model, report


def check_taps(distillers: Distillers) -> None:
    """May this teacher be tapped where the distillers want it?

    Raises:
        ConfigError: a distiller that taps its head.
    """
    for name, method in distillers.methods.items():
        for tap in (tap for pair in method.taps.values() for tap in pair.teacher):
            if tap.partition(':')[0].partition('@')[0].partition('.')[0] not in FEATURES:
                raise ConfigError(f'distillers.{name}: taps {tap!r} of the teacher, but {FEATURES_ONLY}')


def describe(model: nn.Module) -> Description:
    """Describe a detector of MMDetection as a teacher that runs as far as its neck.

    Its taps are ``backbone`` and ``neck``, each all levels from the finest to the coarsest, and the modules below them.
    """
    description = describe_model(model)
    own = {alias: taps for alias, taps in description.aliases.items() if alias in FEATURES}
    heads = set(description.aliases) - set(own)
    return Description(
        model,
        dry_run(model, features=True),
        own,
        logits=FEATURES_ONLY,
        absent=description.absent | dict.fromkeys(heads, FEATURES_ONLY),
        normalization=image_normalization(model),
        rois=FEATURES_ONLY,
        queries=FEATURES_ONLY,
        boxes=FEATURES_ONLY,
    )


def channels(model: nn.Module) -> int:
    """Channels of the images that ``model`` takes."""
    return input_channels(model)


def class_names(model: nn.Module) -> list[str] | None:
    """Class names in the order of their indices; ``None`` where the teacher's file does not have them."""
    classes = getattr(model, 'dataset_meta', {}).get('classes')
    return None if classes is None else list(classes)


def forward_for(model: nn.Module, taps: Taps) -> Callable[[Tensor], object]:
    """The forward of the backbone and the neck, a function of the images ``[B, C, H, W]``; whatever the taps are."""
    return model.extract_feat
