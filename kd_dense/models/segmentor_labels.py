"""What mean-teacher adaptation asks of a segmentor: pseudo label maps of target images, and the loss under them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_dense.adaptation.mean_teacher import MeanTeacher
from kd_dense.adaptation.pseudo_maps import pseudo_label_map
from kd_dense.adaptation.statistics import MapStatistics
from kd_dense.context import inside
from kd_dense.errors import ConfigError, closest
from kd_dense.models.views import difference

WEIGHTINGS = ('hard', 'share')


class SegmentorLabels(nn.Module):
    """The classes of pixels that the mean teacher is sure of, as labels of target images.

    Args:
        student: an ``EncoderDecoder`` with a softmax over the classes of each pixel.
        options: ``threshold`` and ``weighting``, see :class:`~kd_dense.models.mean_teacher.MeanTeacherAdaptation`.
        behaviour: makes no difference here.

    Attributes:
        statistics: what became of the pixels.

    Raises:
        ConfigError: another student, or an option that is unknown or out of its range.
    """

    #: Of the loss under pseudo labels, as in DAFormer.
    pseudo_weight = 1.0

    def __init__(self, student: nn.Module, options: Mapping | None, behaviour: str) -> None:
        super().__init__()
        head = student.decode_head
        if not hasattr(head, 'loss_decode') or head.out_channels != head.num_classes:
            raise ConfigError(
                f'student: {type(student).__name__} with {type(head).__name__} gives no softmax over the classes of '
                'each pixel, which pseudo label maps are made from; use an EncoderDecoder with a per-pixel decode head'
            )
        threshold, self.weighting = _check_options(options, head.num_classes)
        self.register_buffer('threshold', threshold, persistent=False)  # on the device, so that no step copies it there
        self.ignore_index = getattr(head, 'ignore_index', 255)
        self.statistics = MapStatistics(head.num_classes, self.ignore_index)

    def loss(
        self, student: nn.Module, mean_teacher: MeanTeacher, inputs: dict[str, Tensor], data_samples: dict[str, list]
    ) -> Tensor:
        """The student's loss on the target view, labelled by the teacher; scalar."""
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        images, samples = inputs['target'], data_samples['target']
        seen = inputs.get('teacher', images)
        if seen.shape != images.shape:
            raise ConfigError(
                f'train_dataloader.dataset.target.pipeline: the views target and teacher have the sizes '
                f'{tuple(images.shape[2:])} and {tuple(seen.shape[2:])}; geometric transforms belong under Views.shared'
            )
        for pair in zip(samples, data_samples.get('teacher', samples), strict=True):
            if found := difference(*pair):
                raise ConfigError(
                    f'train_dataloader.dataset.target.pipeline: the views target and teacher of an image have the '
                    f'{found}; geometric transforms belong under Views.shared'
                )
        canvas = images.shape[2:]
        metas = [dict(img_shape=canvas, pad_shape=canvas, ori_shape=canvas) for _ in samples]
        logits = mean_teacher.run(lambda model: model.encode_decode(seen, metas))
        mask = self._inside(samples, canvas, images.device)
        found = pseudo_label_map(logits, self.threshold, self.ignore_index, self.weighting, mask)
        self._count(logits, found, samples, mask)
        labelled = [
            SegDataSample(metainfo=sample.metainfo, gt_sem_seg=PixelData(data=label[None]))
            for sample, label in zip(samples, found.labels, strict=True)
        ]
        loss = student.parse_losses(student(images, labelled, mode='loss'))[0]
        if self.weighting == 'share':
            loss = loss * _mean_weight(found.weights, mask)
        return loss

    @staticmethod
    def _inside(samples: list, canvas: torch.Size, device: torch.device) -> Tensor | None:
        """``[B, 1, H, W]``: what is no padding; ``None`` when nothing is padded."""
        sizes = [tuple(sample.metainfo.get('img_shape', canvas)[:2]) for sample in samples]
        if all(size == tuple(canvas) for size in sizes):
            return None
        return inside(torch.tensor(sizes, device=device), tuple(canvas), tuple(canvas))

    def _count(self, logits: Tensor, found: Any, samples: list, mask: Tensor | None) -> None:
        """For the log: what is above the threshold, whether or not the rest is a label too."""
        labels = found.labels
        if self.weighting == 'share':
            labels = pseudo_label_map(logits, self.threshold, self.ignore_index, mask=mask).labels
        truth = None
        if all('gt_sem_seg' in sample for sample in samples):
            truth = torch.stack([sample.gt_sem_seg.data.squeeze(0) for sample in samples])
        self.statistics.update(labels, truth)


def _mean_weight(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the pixels that count."""
    return weights.mean() if mask is None else weights.sum() / mask.sum().clamp(min=1)


def _check_options(options: Mapping | None, num_classes: int) -> tuple[Tensor, str]:
    """The threshold of each class, and the weighting."""
    defaults = {'threshold': 0.9, 'weighting': 'hard'}
    for name in options or {}:
        if name not in defaults:
            raise ConfigError(f'model.pseudo_labels: has no option {name!r}; {closest(name, defaults)}')
    options = defaults | dict(options or {})
    if options['weighting'] not in WEIGHTINGS:
        raise ConfigError(
            f'model.pseudo_labels.weighting: unknown weighting {options["weighting"]!r}; '
            f'{closest(str(options["weighting"]), WEIGHTINGS)}'
        )
    threshold = options['threshold']
    each = [threshold] * num_classes if isinstance(threshold, (int, float)) else list(threshold)
    if len(each) != num_classes or not all(0 <= value <= 1 for value in each):
        raise ConfigError(
            f'model.pseudo_labels.threshold: must be a number between 0 and 1, or one for each of the {num_classes} '
            f'classes, not {threshold!r}'
        )
    return torch.tensor(each), options['weighting']
