"""What kd_dense has to know about an Ultralytics model: where its stages, its neck and its class logits are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import OBB, Detect, RTDETRDecoder

from kd_dense.description import Boxes, Description, Logits
from kd_dense.errors import ConfigError
from kd_dense.taps import Taps, replaced_forward
from kd_dense.teacher import Normalization


def describe(model: nn.Module) -> Description:
    """Describe an Ultralytics model, student or teacher.

    Aliases, each a list from the finest level to the coarsest:

    * ``backbone``: the backbone layers that the neck reads (strides 8, 16, 32 in the standard models);
    * ``neck``: the layers that feed the head;
    * ``logits``: class logits ``[B, C, h, w]`` per level, of the one-to-many branch where the head has two;
    * ``logits_one2one``: those of the one-to-one branch, where the head has one (YOLO26, YOLOv10);
    * ``branch_logits``: those of every branch, one-to-many first;
    * ``boxes``, ``boxes_one2one``: of the same branches, distributions ``[B, 4 * reg_max, h, w]`` of the sides of the
      boxes, or distances ``[B, 4, h, w]`` where ``reg_max`` is 1 (YOLO26).

    Args:
        model: a model of Ultralytics, detection or instance segmentation (other tasks have no ``logits``).

    Raises:
        ConfigError: not a model built from an Ultralytics YAML.
    """
    layers = getattr(model, 'model', None)
    if not isinstance(layers, nn.Sequential) or not hasattr(model, 'yaml'):
        raise ConfigError(f'{type(model).__name__} is not an Ultralytics model built from a model YAML')
    aliases = {'backbone': _layers(_backbone(model)), 'neck': _layers(_sources(layers[-1]))}
    logits = _logits(model, aliases)
    pixels = Normalization((0.0,) * channels(model), (255.0,) * channels(model), 'rgb')  # the trainer gives 0..1
    description = Description(model, lambda: _run(model), aliases, logits, normalization=pixels)
    description.boxes = _boxes(model, aliases)
    if isinstance(description.boxes, str):
        description.absent['boxes'] = description.boxes
    if isinstance(layers[-1], RTDETRDecoder):
        description.queries = (
            'Ultralytics trains RT-DETR by a trainer of its own, which kd_dense does not extend; distil DETR models '
            'with MMDetection'
        )
    return description


def channels(model: nn.Module) -> int:
    """Channels of the images that ``model`` takes."""
    return model.yaml.get('channels', model.yaml.get('ch', 3))


def class_names(model: nn.Module) -> list[str]:
    """Class names in the order of their indices."""
    names = model.names
    return list(names.values() if isinstance(names, dict) else names)


def _layers(indices: list[int]) -> list[str]:
    return [f'model.{i}' for i in indices]


def _sources(layer: nn.Module) -> list[int]:
    """Indices of the layers whose outputs ``layer`` reads; Ultralytics writes them absolute or relative to it."""
    sources = layer.f if isinstance(layer.f, (list, tuple)) else [layer.f]
    return [layer.i + f if f < 0 else f for f in sources]


def _backbone(model: nn.Module) -> list[int]:
    length = len(model.yaml['backbone'])
    read = {source for layer in model.model[length:] for source in _sources(layer) if source < length}
    return sorted(read)


def _logits(model: nn.Module, aliases: dict[str, list[str]]) -> Logits | str:
    head = model.model[-1]
    if not isinstance(head, Detect):
        return f"its head {type(head).__name__} has no class logits per cell; tap 'neck' or 'backbone'"
    path = f'model.{len(model.model) - 1}'
    branches = {}
    for name in ('cv3', 'one2one_cv3'):  # a fused model has only one of them
        branch = getattr(head, name, None)
        if branch is None:
            continue
        if getattr(branch[0][-1], 'out_channels', None) != head.nc:
            return (
                f"its head {type(head).__name__} computes class scores from text embeddings; tap 'neck' or 'backbone'"
            )
        branches[name] = [f'{path}.{name}.{level}' for level in range(len(branch))]
    if 'one2one_cv3' in branches:
        aliases['logits_one2one'] = branches['one2one_cv3']
    aliases['logits'] = branches.get('cv3', branches.get('one2one_cv3'))
    aliases['branch_logits'] = [tap for taps in branches.values() for tap in taps]
    return Logits(head.nc, 'sigmoid', 'map', tuple(class_names(model)))


def _boxes(model: nn.Module, aliases: dict[str, list[str]]) -> Boxes | str:
    head = model.model[-1]
    if not isinstance(head, Detect) or isinstance(head, OBB):
        return f"its head {type(head).__name__} predicts no upright box per cell; tap 'neck' or 'backbone'"
    path = f'model.{len(model.model) - 1}'
    for alias, name in (('boxes_one2one', 'one2one_cv2'), ('boxes', 'cv2')):
        branch = getattr(head, name, None)
        if branch is not None:
            aliases[alias] = [f'{path}.{name}.{level}' for level in range(len(branch))]
    aliases.setdefault('boxes', aliases.get('boxes_one2one', []))  # of a fused model
    kind = 'distribution' if head.reg_max > 1 else 'distance'
    return Boxes(kind, tuple(map(float, head.stride.tolist())), bins=head.reg_max)


def _run(model: nn.Module) -> tuple[int, int]:
    parameter = next(model.parameters())
    size = 2 * max(int(model.stride.max()), 32)  # more than one cell on the coarsest level
    model(torch.zeros(1, channels(model), size, size, device=parameter.device, dtype=parameter.dtype))
    return size, size


def forward_for(model: nn.Module, taps: Taps) -> Callable[[Tensor], None]:
    """A forward of a teacher that does no work in the head beyond the branches that ``taps`` name.

    Box branches, masks, decoding and suppression run only when something of theirs is tapped.

    Returns:
        A function of the images ``[B, C, H, W]``.
    """
    head = model.model[-1]
    path = f'model.{len(model.model) - 1}'
    inside = [p[len(path) + 1 :] for p in taps.paths if p == path or p.startswith(path + '.')]
    branches = _branches(head, inside)
    if branches is None:
        return model

    def only_tapped_branches(features: list[Tensor]) -> None:
        for branch, level in branches:
            branch(features[level])

    def forward(images: Tensor) -> None:
        with replaced_forward(head, only_tapped_branches):
            model(images)

    return forward


def _branches(head: nn.Module, paths: list[str]) -> list[tuple[nn.Module, int]] | None:
    """The modules of ``head`` that hold ``paths``, each with its level; ``None`` when the whole head must run."""
    if not isinstance(head, Detect):
        return None if paths else []
    found: dict[str, tuple[nn.Module, int]] = {}
    for path in paths:
        name, _, rest = path.partition('.')
        level = rest.partition('.')[0]
        branch = getattr(head, name, None) if name else None
        # One module per level, each fed with that level: cv2 (boxes), cv3 (classes), cv4 (mask coefficients), one2one_*
        if not isinstance(branch, nn.ModuleList) or len(branch) != head.nl or not level.isdigit():
            return None
        found[f'{name}.{level}'] = branch[int(level)], int(level)
    return list(found.values())
