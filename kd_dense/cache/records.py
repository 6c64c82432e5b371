"""How the outputs of a teacher for one sample are kept, and how those of a batch are made of what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.errors import DistillationError

#: Largest finite number of fp16.
LARGEST = 65504.0
#: Least probability of a class: the tail may be 0 in fp16, and the logarithm is taken.
_FLOOR = 1e-8


def to_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` most probable classes of every position.

    ``p = softmax(logits)`` at temperature 1, as in Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision
    Transformers", ECCV 2022, here at each position of a map.

    Args:
        logits: ``[C, h, w]``; ``[C]`` of a classifier.

    Returns:
        Probabilities ``[k, ...]`` in fp16, falling, and their classes ``[k, ...]``, uint8 (int16 above 256 classes).
    """
    probabilities, classes = logits.float().softmax(0).topk(k, 0)
    return probabilities.half(), classes.to(torch.uint8 if logits.shape[0] <= 256 else torch.int16)


def from_top_k(probabilities: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Log-probabilities ``[B, C, ...]``, fp32, of what :func:`to_top_k` kept, ``[B, k, ...]`` each.

    The probability that is missing is spread evenly over the classes that were not kept:
    ``m = (1 - sum_k p_k) / (C - k)``. fp16 can round the sum above 1; so ``m`` has a floor of 1e-8, and the whole is
    divided by its sum (the authors' code does neither).
    """
    kept = probabilities.float()
    k = kept.shape[1]
    tail = ((1 - kept.sum(1, keepdim=True)) / max(num_classes - k, 1)).clamp(min=_FLOOR)
    full = tail.expand(-1, num_classes, *tail.shape[2:]).scatter(1, classes.long(), kept.clamp(min=_FLOOR))
    return (full / full.sum(1, keepdim=True)).log()


def to_int8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """256 levels for each channel, evenly from its smallest to its largest number.

    ``q = round((x - low) / step)`` with ``step = (high - low) / 255``. Not symmetric around zero: behind a ReLU, and in
    class logits of rare objects, half of the levels would stay empty. Nothing is cut off; where single numbers are far
    from all others, the others get few levels. The choice is ours.

    Args:
        tensor: a map ``[C, h, w]``, or tokens ``[..., C]``.

    Returns:
        ``q`` in uint8, in the shape of ``tensor``; ``low`` and ``step``, fp32, ``[2, C, 1, 1]`` or ``[2, 1, ..., C]``.
    """
    x = tensor.float()
    positions = (1, 2) if x.dim() == 3 else tuple(range(x.dim() - 1))
    low, high = x.amin(positions, keepdim=True), x.amax(positions, keepdim=True)
    step = (high - low) / 255
    levels = ((x - low) / step.clamp(min=torch.finfo(step.dtype).tiny)).round_()
    return levels.to(torch.uint8), torch.stack([low, step])


def from_int8(levels: Tensor, scale: Tensor) -> Tensor:
    """``low + q * step``, fp32, of what :func:`to_int8` returned."""
    return torch.addcmul(scale[0], levels, scale[1])


def pack(outputs: Mapping[str, Sequence[Tensor]], top_k: Mapping[str, int], store: str = 'fp16') -> dict[str, Tensor]:
    """Tensors to keep of one sample, on the CPU.

    Args:
        outputs: tap name -> tensors without the batch dimension.
        top_k: taps of class logits of which only so many classes are kept.
        store: ``'fp16'`` or ``'int8'``: how the others are kept. What has one number for each channel stays in fp16.

    Raises:
        DistillationError: a number that is not finite, or that fp16 can not hold.
    """
    packed = {}
    for t, (name, tensors) in enumerate(outputs.items()):
        for i, tensor in enumerate(tensors):
            key = f't{t}_{i}'
            if not tensor.is_floating_point():
                packed[key] = tensor.cpu().contiguous()
                continue
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not largest <= LARGEST:
                raise DistillationError(
                    f'teacher: its output at {name!r} reaches {largest:g} for a training image, which fp16 can not '
                    'hold; check its checkpoint, or tap another place'
                )
            if name in top_k:
                parts = to_top_k(tensor, top_k[name])
                packed[f'{key}_p'], packed[f'{key}_c'] = (part.cpu().contiguous() for part in parts)
            elif store == 'int8' and tensor.dim() > 1:
                packed[key], packed[f'{key}_s'] = (part.cpu().contiguous() for part in to_int8(tensor))
            else:
                packed[key] = tensor.half().cpu().contiguous()
    return packed


def unpack(
    samples: Sequence[Mapping[str, Tensor]], taps: Mapping[str, int], top_k: Mapping[str, tuple[int, int]]
) -> dict[str, list[Tensor]]:
    """Tap name -> tensors ``[B, ...]`` as the teacher would give them for the batch, fp32.

    Maps of images on different canvases get zeros at the right and at the bottom, where the padding of the batch is.

    Args:
        samples: what :func:`pack` returned, of each image.
        taps: tap name -> number of its tensors, in the order in which they were packed.
        top_k: tap name -> classes that were kept, and all classes.
    """
    outputs = {}
    for t, (name, count) in enumerate(taps.items()):
        outputs[name] = []
        for i in range(count):
            key = f't{t}_{i}'
            if name in top_k:
                kept, classes = (_batch([s[f'{key}_{part}'] for s in samples], name) for part in 'pc')
                outputs[name].append(from_top_k(kept, classes, top_k[name][1]))
            elif f'{key}_s' in samples[0]:
                outputs[name].append(_batch([from_int8(s[key], s[f'{key}_s']) for s in samples], name))
            else:
                batch = _batch([s[key] for s in samples], name)
                outputs[name].append(batch.float() if batch.is_floating_point() else batch)
    return outputs


def _batch(tensors: list[Tensor], name: str) -> Tensor:
    shapes = {t.shape for t in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    if any(len(shape) != 3 for shape in shapes):
        raise DistillationError(
            f'teacher.cache: what was kept of {name!r} has other shapes for other images ({sorted(map(list, shapes))}) '
            'and is no map that could be padded; crop all images to one size'
        )
    h, w = (max(shape[axis] for shape in shapes) for axis in (1, 2))
    return torch.stack([F.pad(t, (0, w - t.shape[2], 0, h - t.shape[1])) for t in tensors])
