"""The student as one module from raw image to raw outputs, which can be traced."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kd_dense.errors import ConfigError
from kd_dense.export.report import Comparison, Detections
from kd_dense.models.describe import normalization

#: What two-stage detectors and others have that run more than one head after another.
_MORE_HEADS = ('roi_head', 'rpn_head', 'mask_head', 'panoptic_head', 'panoptic_fusion_head', 'semantic_head')


def deployed(student: nn.Module) -> Deployed:
    """The module to export for this student.

    Raises:
        ConfigError: a student that can not be exported as one network.
    """
    if hasattr(student, 'encode_decode'):
        return DeployedSegmentor(student)
    more = [name for name in _MORE_HEADS if getattr(student, name, None) is not None]
    kind = type(student).__name__
    if more:
        raise ConfigError(
            f'--format: {kind} has {" and ".join(more)}, and only what one dense head computes for the whole image can '
            'be exported; export it with --format pth, and from that with MMDeploy'
        )
    if not hasattr(getattr(student, 'bbox_head', None), 'predict_by_feat'):
        raise ConfigError(
            f'--format: {kind} has no decode head and no dense head with predict_by_feat, so what its raw outputs are '
            'is not known; export it with --format pth'
        )
    return DeployedDetector(student)


class Deployed(nn.Module):
    """Normalisation, padding and the student's network, without decoding.

    ``forward(image)``: ``[N, 3, H, W]``, 0..255, float32 (TorchScript: uint8 too), channels as OpenMMLab reads them
    (BGR) -> tuple of outputs, called ``names``. Padding to the student's multiple is done inside.

    Args:
        student: built and loaded; put into evaluation mode.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student.requires_grad_(False)
        self.eval()  # all of it: the ONNX exporter restores the mode of the outermost module, everywhere
        self.names: list[str] = []
        self.normalization = normalization(student)
        preprocessor = student.data_preprocessor
        self.reverses = bool(
            getattr(preprocessor, '_channel_conversion', False) or getattr(preprocessor, 'channel_conversion', False)
        )
        if self.normalization is not None:
            for name in ('mean', 'std'):
                self.register_buffer(name, torch.tensor(getattr(self.normalization, name)).view(1, -1, 1, 1), False)

    def normalised(self, image: Tensor) -> Tensor:
        """What the student's data preprocessor makes of the pixels."""
        image = image.float()
        if self.reverses:
            image = image[:, [2, 1, 0]]
        return (image - self.mean) / self.std if self.normalization is not None else image

    def contract(self) -> dict[str, Any]:
        """What a user of the file must know about its input and outputs, as plain data."""
        raise NotImplementedError

    def stock(self, batch: Tensor) -> dict:
        """The batch through the student's own data preprocessor."""
        return self.student.data_preprocessor(as_data(self.student, batch), False)

    def reference(self, batch: Tensor) -> list[Tensor]:
        """The raw outputs by the student's own data preprocessor and methods."""
        raise NotImplementedError

    def compare_predictions(
        self, comparison: Comparison, source: str, batch: Tensor, found: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> None:
        """Compare what the student predicts with what its decoding makes of the outputs ``found``."""
        raise NotImplementedError

    def _input_contract(self) -> dict[str, Any]:
        contract = {
            'name': 'image',
            'layout': 'NCHW',
            'dtype': 'float32',
            'range': [0, 255],
            'channels': 'BGR',
            'normalisation': 'inside',
            'padding': 'inside',
        }
        if self.normalization is not None:
            contract.update(mean=list(self.normalization.mean), std=list(self.normalization.std))
            contract['mean_and_std_in'] = self.normalization.order.upper()
        return contract


class DeployedSegmentor(Deployed):
    """Outputs ``logits`` ``[N, C, H, W]`` at the size of the input, and ``labels`` ``[N, H, W]`` int64."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.names = ['logits', 'labels']
        test = getattr(student.data_preprocessor, 'test_cfg', None) or {}
        self.pad_size, self.pad_divisor = test.get('size'), test.get('size_divisor')
        self.pad_value = float(student.data_preprocessor.pad_val)
        self.threshold = getattr(_last_head(student), 'threshold', None)

    @property
    def window(self) -> tuple[int, int] | None:
        """``(H, W)`` of the window that the student slides over an image, if it does."""
        test = self.student.test_cfg
        return tuple(test['crop_size']) if test.get('mode') == 'slide' else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.normalised(image)
        height, width = image.shape[2:]
        if self.pad_size is not None:
            bottom, right = (max(int(n) - int(m), 0) for n, m in zip(self.pad_size, (height, width)))
            inputs = pad(inputs, (0, right, 0, bottom), value=self.pad_value)
        elif (self.pad_divisor or 1) > 1:
            inputs = pad(inputs, (0, -width % self.pad_divisor, 0, -height % self.pad_divisor), value=self.pad_value)
        shape = inputs.shape[2:]
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, padding_size=[0, 0, 0, 0])
        logits = self.student.encode_decode(inputs, [meta] * len(image))
        logits = logits[:, :, :height, :width]
        return logits, self.labels(logits)

    def labels(self, logits: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, H, W]``, as MMSegmentation decides."""
        if logits.shape[1] > 1:
            return logits.argmax(1)
        return (logits[:, 0].sigmoid() > self.threshold).long()

    @torch.no_grad()
    def reference(self, batch: Tensor) -> list[Tensor]:
        data = self.stock(batch)
        shape = tuple(data['inputs'].shape[2:])
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, padding_size=[0, 0, 0, 0])
        logits = self.student.encode_decode(data['inputs'], [meta] * len(batch))
        logits = logits[:, :, : batch.shape[2], : batch.shape[3]]
        return [logits, self.labels(logits)]

    @torch.no_grad()
    def compare_predictions(
        self, comparison: Comparison, source: str, batch: Tensor, found: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> None:
        predicted = self.student.test_step(as_data(self.student, batch))
        labels = torch.stack([sample.pred_sem_seg.data[0] for sample in predicted])
        logits = wanted[0]
        if logits.shape[1] == 1:  # against the other choice, which scores what the threshold stands for
            logits = torch.cat([logits, torch.full_like(logits, math.log(self.threshold / (1 - self.threshold)))], 1)
        comparison.labels(source, logits, labels, found[1])

    def contract(self) -> dict[str, Any]:
        return {
            'task': 'segmentation',
            'input': self._input_contract(),
            'outputs': {
                'logits': 'float32 [N, C, H, W] at the size of the input, before softmax (C = 1: before sigmoid)',
                'labels': 'int64 [N, H, W], index of the class',
            },
            'window': list(self.window) if self.window else None,
        }


def _last_head(student: nn.Module) -> nn.Module:
    head = student.decode_head
    return head[-1] if isinstance(head, nn.ModuleList) else head


@dataclass
class _Argument:
    """One positional argument of ``predict_by_feat``.

    Args:
        name: of the outputs it becomes, ``cls_score`` say.
        kind: ``'levels'``: a list of tensors, one output each; ``'layers'``: a tensor whose first dimension is the
            decoder layer, of which the last is exported; ``'tensor'``; ``'none'``.
        count: outputs.
    """

    name: str
    kind: str
    count: int


class _Reached(Exception):
    """Ends a forward at ``predict_by_feat``."""


class DeployedDetector(Deployed):
    """Outputs what the dense head gives to its ``predict_by_feat``: ``cls_score_0``, ``bbox_pred_0`` ... per level.

    For heads with queries it is what the last decoder layer gives: ``cls_score`` ``[N, Q, C]`` and ``bbox_pred``
    ``[N, Q, 4]`` (centre and size, relative to the image).
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.divisor = getattr(student.data_preprocessor, 'pad_size_divisor', 1) or 1
        self.pad_value = float(getattr(student.data_preprocessor, 'pad_value', 0))
        self.arguments: list[_Argument] = []

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        height, width = image.shape[2:]
        inputs = self.normalised(image)
        if self.divisor > 1:
            inputs = pad(inputs, (0, -width % self.divisor, 0, -height % self.divisor), value=self.pad_value)
        canvas = tuple(inputs.shape[2:])
        meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=canvas, batch_input_shape=canvas)
        return tuple(self._raw(inputs, _detection_samples(len(image), meta)))

    def _raw(self, inputs: Tensor, samples: list) -> list[Tensor]:
        """Run the student's own prediction up to its decoding, and take what arrives there."""
        head = self.student.bbox_head
        arrived: list[Any] = []

        def stop(*arguments: Any, **_: Any) -> None:
            arrived.extend(arguments)
            raise _Reached

        head.predict_by_feat = stop  # hides the method of the class
        try:
            self.student.predict(inputs, samples)
        except _Reached:
            pass
        finally:
            del head.predict_by_feat
        parameters = list(inspect.signature(head.predict_by_feat).parameters)
        self.arguments = [_argument(name, value, head) for name, value in zip(parameters, arrived)]
        outputs = []
        self.names = []
        for argument, value in zip(self.arguments, arrived, strict=True):
            self.names += _output_names(argument)
            if argument.kind == 'levels':
                outputs += list(value)
            elif argument.kind == 'layers':
                outputs.append(value[-1])
            elif argument.kind == 'tensor':
                outputs.append(value)
        return outputs

    @torch.no_grad()
    def reference(self, batch: Tensor) -> list[Tensor]:
        data = self.stock(batch)
        return self._raw(data['inputs'], data['data_samples'])

    @torch.no_grad()
    def decode(self, outputs: Sequence[Tensor], metas: list[dict]) -> list:
        """The head's own ``predict_by_feat`` on exported outputs."""
        remaining = list(outputs)
        arguments = []
        for argument in self.arguments:
            taken, remaining = remaining[: argument.count], remaining[argument.count :]
            if argument.kind == 'levels':
                arguments.append(list(taken))
            elif argument.kind == 'layers':
                arguments.append(taken[0][None])
            else:
                arguments.append(taken[0] if taken else None)
        return self.student.bbox_head.predict_by_feat(*arguments, batch_img_metas=metas, rescale=True)

    @torch.no_grad()
    def compare_predictions(
        self, comparison: Comparison, source: str, batch: Tensor, found: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> None:
        predicted = self.student.test_step(as_data(self.student, batch))
        decoded = self.decode(found, [sample.metainfo for sample in self.stock(batch)['data_samples']])
        for a, b in zip(predicted, decoded, strict=True):
            pair = _detections(a.pred_instances, batch), _detections(b, batch)
            comparison.detections(source, *pair, **_cuts(self.student.bbox_head))

    def contract(self) -> dict[str, Any]:
        head = type(self.student.bbox_head).__name__
        return {
            'task': 'detection',
            'input': self._input_contract(),
            'outputs': dict.fromkeys(self.names, f'float32, as {head}.predict_by_feat takes it'),
            'head': head,
            'padded_to_a_multiple_of': self.divisor,
        }


def as_data(student: nn.Module, batch: Tensor) -> dict:
    """Images as a data loader gives them to the student, each filling its canvas.

    Args:
        batch: ``[N, 3, H, W]``, 0..255.
    """
    shape = tuple(batch.shape[2:])
    meta = dict(img_shape=shape, ori_shape=shape)
    if hasattr(student, 'encode_decode'):
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(metainfo=dict(meta)) for _ in batch]
    else:
        samples = _detection_samples(len(batch), meta)
    return {'inputs': list(batch), 'data_samples': samples}


def _detection_samples(count: int, meta: dict) -> list:
    from mmdet.structures import DetDataSample

    # border: the margin that the pipelines of CenterNet and CornerNet add, which their decoding takes off again
    meta = dict(meta, scale_factor=(1.0, 1.0), border=np.zeros(4, np.float32))
    return [DetDataSample(metainfo=dict(meta, img_id=i)) for i in range(count)]


@torch.no_grad()
def compare_students(comparison: Comparison, source: str, batch: Tensor, wanted: nn.Module, found: nn.Module) -> None:
    """Compare the predictions of two students of the same config, by their own methods from pixels to results."""
    for a, b in zip(*(student.test_step(as_data(student, batch)) for student in (wanted, found)), strict=True):
        if 'seg_logits' in a:
            comparison.tensors(source, ['logits'], [a.seg_logits.data[None]], [b.seg_logits.data[None]])
            pair = (sample.pred_sem_seg.data for sample in (a, b))
            comparison.labels(source, a.seg_logits.data[None], *pair)
        elif 'pred_instances' in a:
            pair = (_detections(sample.pred_instances, batch) for sample in (a, b))
            comparison.detections(source, *pair)


def _cuts(head: nn.Module) -> dict[str, Any]:
    """Where the head's decoding stops keeping detections."""
    test = getattr(head, 'test_cfg', None) or {}
    return {'threshold': test.get('score_thr') or 0.0, 'limit': test.get('max_per_img')}


def _detections(instances: Any, batch: Tensor) -> Detections:
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    return Detections(boxes, instances.scores, instances.labels, tuple(batch.shape[2:]))


def _argument(parameter: str, value: Any, head: nn.Module) -> _Argument:
    name = parameter
    for prefix in ('all_layers_', 'layer_'):
        name = name.removeprefix(prefix)
    plural = 2 if name.endswith('nesses') else int(name.endswith('s'))
    name = name[: len(name) - plural]
    if value is None:
        return _Argument(name, 'none', 0)
    if isinstance(value, Tensor):
        return _Argument(name, 'layers' if 'layer' in parameter else 'tensor', 1)
    if isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value):
        return _Argument(name, 'levels', len(value))
    raise ConfigError(
        f'--format: {type(head).__name__} gives {parameter} to its decoding as nested lists, which a network can not '
        'output; export it with --format pth, and from that with MMDeploy'
    )


def _output_names(argument: _Argument) -> list[str]:
    if argument.kind == 'levels':
        return [f'{argument.name}_{level}' for level in range(argument.count)]
    return [argument.name] * argument.count
