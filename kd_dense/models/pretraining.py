"""The MMEngine model of pre-training a backbone on what a classifier said about images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.model.weight_init import trunc_normal_
from torch import Tensor, nn

from kd_dense.errors import ConfigError, closest
from kd_dense.losses.sparse import sparse_cross_entropy, sparse_entropy
from kd_dense.models.build import build_model, forget_pretrained, model_config
from kd_dense.random_state import preserve_random_state
from kd_dense.registry import MODELS

OPTIONS = ('student', 'teacher', 'data_preprocessor')
#: Of a ResNet of ImageNet: RGB.
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
#: Names under which :func:`kd_dense.cache.records.pack` keeps the probabilities of the only tap, and their classes.
_PROBABILITIES, _CLASSES = 't0_0_p', 't0_0_c'


@MODELS.register_module()
class BackbonePretraining(BaseModel):
    """A backbone with a linear head on its pooled last map, trained on a cache of soft labels.

    ``loss = mean_b CE(y_b, softmax(head(mean(backbone(x_b)))))``, with ``y`` of
    :func:`~kd_dense.losses.sparse.sparse_cross_entropy`: no label, no temperature (Wu et al., "TinyViT", ECCV 2022).
    The teacher is not in memory; ``tools/cache_teacher.py`` has run it.

    The weights in a checkpoint are ``backbone.*`` and ``head.*``: a segmentor or detector begins with them by
    ``backbone=dict(..., init_cfg=dict(type='Pretrained', checkpoint='FILE', prefix='backbone.'))``.

    It needs :class:`~kd_dense.engine.PretrainingHook`, which checks that cache, images and teacher belong together.

    Args:
        student: whose backbone is trained: a config path (local, ``mmseg::...`` or ``mmdet::...``), a model dict with a
            ``backbone``, the dict of a backbone, or a built module. Its weights begin at random, whatever file its
            config names, and all of them are trained: ``frozen_stages`` and ``norm_eval`` of the config are undone.
        teacher: see :class:`~kd_dense.pretraining.Classifier`, and ``cache``, the folder of the soft labels.
        data_preprocessor: config of an ``ImgDataPreprocessor``. Without one: mean, standard deviation and channel order
            of the student's model, which the backbone will see later; else those of ImageNet.

    Raises:
        ConfigError: unknown keys, a student without a backbone or with frozen weights, or no complete cache.
    """

    def __init__(
        self,
        student: str | Mapping | nn.Module,
        teacher: Mapping,
        data_preprocessor: Mapping | nn.Module | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            raise ConfigError(f'model: BackbonePretraining has no option {name!r}; {closest(name, OPTIONS)}')
        num_classes = _classes_of(teacher)
        source, normalization = _backbone_of(student)
        if data_preprocessor is None:
            data_preprocessor = normalization
        if not isinstance(data_preprocessor, nn.Module):
            data_preprocessor = {'type': 'ImgDataPreprocessor', '_scope_': 'mmengine', **data_preprocessor}
        super().__init__(data_preprocessor=data_preprocessor)
        self.backbone = build_model(source, 'student.backbone')
        self.backbone.requires_grad_(True)
        self.backbone.train()  # where the toolboxes freeze stages
        frozen = [name for name, p in self.backbone.named_parameters() if not p.requires_grad]
        if frozen:
            raise ConfigError(
                f'student.backbone: keeps {len(frozen)} tensors from being trained ({frozen[0]}, ...), and they would '
                'stay random; build it without frozen stages'
            )
        self.head = nn.Linear(self._width(), num_classes)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def _width(self) -> int:
        """Channels of the last map, by one forward of a small image."""
        with torch.no_grad(), preserve_random_state():
            self.backbone.eval()
            width = self._pooled(torch.zeros(1, 3, 64, 64)).shape[1]
            self.backbone.train()
        return width

    def forward(
        self,
        inputs: Tensor,
        data_samples: list | None = None,
        teacher_outputs: Mapping | Sequence[Mapping] | None = None,
        mode: str = 'tensor',
    ) -> Any:
        """``mode='loss'``: a dict with ``loss``, and for the log ``kl``, which is the loss less its least value, and
        ``agreement``, the share of images of which student and teacher name the same class. Else logits ``[B, C]``.

        Args:
            inputs: ``[B, 3, H, W]``, normalised.
            data_samples: not looked at.
            teacher_outputs: what the cache keeps of each image.
        """
        logits = self.head(self._pooled(inputs))
        if mode != 'loss':
            return logits
        if teacher_outputs is None:
            raise ConfigError(
                'train_dataloader: its samples bring nothing of teacher.cache along; train with tools/train.py, or '
                'give the config to kd_dense.cache.use_cache before the runner gets it'
            )
        probabilities, classes = (_batch(teacher_outputs, name) for name in (_PROBABILITIES, _CLASSES))
        loss = sparse_cross_entropy(logits, probabilities, classes)
        least = sparse_entropy(probabilities, logits.shape[1])
        agreement = (logits.argmax(1) == classes[:, 0]).float().mean()
        return {'loss': loss, 'kl': (loss - least).detach(), 'agreement': agreement}

    def _pooled(self, images: Tensor) -> Tensor:
        """``[B, D]``: the mean of the last map ``[B, D, h, w]``, or of the last tokens ``[B, N, D]``."""
        last = self.backbone(images)
        while isinstance(last, (tuple, list)):
            last = last[-1]
        if last.ndim == 3:
            return last.mean(1)
        if last.ndim != 4:
            raise ConfigError(
                f'student.backbone: its last output has the shape {list(last.shape)}; a map [B, D, h, w] or tokens '
                '[B, N, D] are needed'
            )
        return last.mean((2, 3))


def _batch(outputs: Mapping | Sequence[Mapping], name: str) -> Tensor:
    """``[B, K]``, of whichever collate function."""
    value = outputs[name] if isinstance(outputs, Mapping) else [one[name] for one in outputs]
    return torch.stack(list(value)) if isinstance(value, (list, tuple)) else value


def _classes_of(teacher: Mapping) -> int:
    """Number of classes of the teacher that wrote the cache."""
    from kd_dense.cache.store import StoredCache  # these need kd_dense.models
    from kd_dense.pretraining.classifier import check_options
    from kd_dense.pretraining.write import labels_of

    folder = check_options(teacher)['cache']
    if not folder:
        raise ConfigError(
            'teacher.cache: BackbonePretraining is trained from one; write it with tools/cache_teacher.py CONFIG and '
            'name its folder'
        )
    found = labels_of(StoredCache.load(folder).manifest)
    if found is None:
        raise ConfigError(f'teacher.cache: {folder} holds no soft labels of a classifier; choose another folder')
    return found[1]


def _backbone_of(student: str | Mapping | nn.Module) -> tuple[Any, dict]:
    """Backbone, as :func:`~kd_dense.models.build.build_model` takes it, and how its images are to be normalised."""
    if isinstance(student, nn.Module):
        return getattr(student, 'backbone', student), _normalization(getattr(student, 'data_preprocessor', None))
    cfg = model_config(student, 'student')
    if 'backbone' not in cfg and isinstance(student, str):
        raise ConfigError(f'student: the model of {student} has no backbone')
    backbone = cfg.get('backbone', cfg)
    if '_scope_' in cfg:
        backbone.setdefault('_scope_', cfg['_scope_'])
    forget_pretrained(backbone)
    for name, off in (('frozen_stages', -1), ('norm_eval', False)):
        if name in backbone:
            backbone[name] = off
    return backbone, _normalization(cfg.get('data_preprocessor') if backbone is not cfg else None)


def _normalization(preprocessor: Mapping | nn.Module | None) -> dict:
    if isinstance(preprocessor, nn.Module):
        if not hasattr(preprocessor, 'mean'):
            return dict(IMAGENET)
        mean, std = (getattr(preprocessor, name).flatten().tolist() for name in ('mean', 'std'))
        return dict(mean=mean, std=std, bgr_to_rgb=bool(getattr(preprocessor, 'channel_conversion', False)))
    if preprocessor is None or preprocessor.get('mean') is None:
        return dict(IMAGENET)
    return dict(
        mean=list(preprocessor['mean']),
        std=list(preprocessor['std']),
        bgr_to_rgb=bool(preprocessor.get('bgr_to_rgb') or preprocessor.get('rgb_to_bgr')),
    )
