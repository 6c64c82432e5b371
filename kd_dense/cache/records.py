"""How the outputs of a teacher for one sample are kept, and how those of a batch are made of what was kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dense.cache.int8 import from_int8, to_int8
from kd_dense.cache.sparse import NOTHING, from_sparse, to_sparse
from kd_dense.errors import DistillationError

#: Tap name -> classes kept of each position, and all classes; of sigmoid heads a third number, the anchors kept of an
#: image. In ``cache.json`` as lists.
TopK = Mapping[str, Sequence[int]]
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


def pack(outputs: Mapping[str, Sequence[Tensor]], top_k: TopK, store: str = 'fp16') -> dict[str, Tensor]:
    """Tensors to keep of one sample, on the CPU.

    Args:
        outputs: tap name -> tensors without the batch dimension.
        top_k: taps of class logits of which only a part is kept.
        store: ``'fp16'`` or ``'int8'``: how the others are kept. What has one number for each channel stays in fp16.

    Raises:
        DistillationError: a number that is not finite, or that fp16 can not hold.
    """
    packed = {}
    for t, (name, tensors) in enumerate(outputs.items()):
        for tensor in tensors:
            _check_range(name, tensor)
        if is_sparse(name, top_k):
            packed |= {f't{t}_{part}': tensor for part, tensor in _sparse(tensors, top_k[name]).items()}
            continue
        for i, tensor in enumerate(tensors):
            key = f't{t}_{i}'
            if not tensor.is_floating_point():
                packed[key] = tensor.cpu().contiguous()
            elif name in top_k:
                parts = to_top_k(tensor, top_k[name][0])
                packed[f'{key}_p'], packed[f'{key}_c'] = (part.cpu().contiguous() for part in parts)
            elif store == 'int8' and tensor.dim() > 1:
                packed[key], packed[f'{key}_s'] = (part.cpu().contiguous() for part in to_int8(tensor))
            else:
                packed[key] = tensor.half().cpu().contiguous()
    return packed


def unpack(samples: Sequence[Mapping[str, Tensor]], taps: Mapping[str, int], top_k: TopK) -> dict[str, list[Tensor]]:
    """Tap name -> tensors ``[B, ...]`` as the teacher would give them for the batch, fp32.

    Maps of images on different canvases get zeros at the right and at the bottom, where the padding of the batch is;
    class logits of sigmoid heads of which a part was kept, :data:`~kd_dense.cache.sparse.NOTHING`.

    Args:
        samples: what :func:`pack` returned, of each image.
        taps: tap name -> number of its tensors, in the order in which they were packed.
        top_k: as they were packed with.
    """
    outputs = {}
    for t, (name, count) in enumerate(taps.items()):
        if is_sparse(name, top_k):
            outputs[name] = _from_sparse(samples, t, count, name)
            continue
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


def size_of(packed: Mapping[str, Tensor]) -> int:
    """Bytes of what :func:`pack` returned."""
    return sum(t.numel() * t.element_size() for t in packed.values())


def is_sparse(name: str, top_k: TopK) -> bool:
    """Are only some anchors of this tap kept?"""
    return len(top_k.get(name, ())) == 3


def probabilities(logits: Tensor, name: str, top_k: TopK) -> Tensor:
    """Of the class logits of a tap of which a part is kept: how the kept and the live ones are to be compared.

    Where a probability is small, logits differ by much that makes no difference; and which of two equal ones is kept is
    chance.
    """
    return logits.sigmoid() if is_sparse(name, top_k) else logits.exp()


def _check_range(name: str, tensor: Tensor) -> None:
    largest = float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0
    if not largest <= LARGEST:
        raise DistillationError(
            f'teacher: its output at {name!r} reaches {largest:g} for a training image, which fp16 can not hold; check '
            'its checkpoint, or tap another place'
        )


def _sparse(levels: Sequence[Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """What :func:`to_sparse` keeps, and of each level an empty tensor ``[A, 0, h, w]``.

    That is a shape without a number, which is known without a copy from the device where the batch is made.
    """
    k, num_classes, anchors = kept
    parts = {name: part.cpu().contiguous() for name, part in to_sparse(levels, num_classes, anchors, k).items()}
    shapes = ((x.shape[0] // num_classes, 0, *x.shape[1:]) for x in levels)
    return parts | {str(i): torch.empty(shape, dtype=torch.float16) for i, shape in enumerate(shapes)}


def _from_sparse(samples: Sequence[Mapping[str, Tensor]], t: int, count: int, name: str) -> list[Tensor]:
    sizes = [[(s.shape[0], *s.shape[2:]) for s in (sample[f't{t}_{i}'] for i in range(count))] for sample in samples]
    parts = [part for part in 'ivcrqsmb' if f't{t}_{part}' in samples[0]]
    canvases = [samples] if all(size == sizes[0] for size in sizes) else [[sample] for sample in samples]
    levels = [
        from_sparse({part: torch.stack([s[f't{t}_{part}'] for s in alike]) for part in parts}, size)
        for alike, size in zip(canvases, sizes, strict=False)
    ]
    if len(levels) == 1:
        return levels[0]
    return [_batch([image[0] for image in level], name, NOTHING) for level in zip(*levels, strict=True)]


def _batch(tensors: list[Tensor], name: str, padding: float = 0.0) -> Tensor:
    shapes = {t.shape for t in tensors}
    if len(shapes) == 1:
        return torch.stack(tensors)
    if any(len(shape) != 3 for shape in shapes):
        raise DistillationError(
            f'teacher.cache: what was kept of {name!r} has other shapes for other images ({sorted(map(list, shapes))}) '
            'and is no map that could be padded; crop all images to one size'
        )
    h, w = (max(shape[axis] for shape in shapes) for axis in (1, 2))
    return torch.stack([F.pad(t, (0, w - t.shape[2], 0, h - t.shape[1]), value=padding) for t in tensors])
