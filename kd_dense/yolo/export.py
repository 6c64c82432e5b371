"""Export a YOLO student by Ultralytics' exporter, and compare what was written with it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.augment import LetterBox
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import BaseModel, torch_safe_load, yaml_model_load
from ultralytics.utils import LOGGER
from ultralytics.utils.patches import imread
from ultralytics.utils.torch_utils import strip_optimizer

from kd_dense.distillation import preserve_random_state
from kd_dense.errors import ConfigError
from kd_dense.export.formats import Runnable, load, quiet
from kd_dense.export.images import other_size
from kd_dense.export.options import NOISE, ExportOptions, publish, staged
from kd_dense.export.report import Comparison, Detections, Report, Row, dimensions
from kd_dense.yolo.config import YoloConfig, read
from kd_dense.yolo.describe import channels, class_names
from kd_dense.yolo.trainer import STATE, require_dataset

#: Score from which detections are compared: far below the one at which they are used.
_CONFIDENCE = 0.01
#: Detections that are kept per image.
_LIMIT = 300


def export(config: str | Path | Config | Mapping, checkpoint: str | Path, options: ExportOptions) -> Report:
    """Write the plain student of a checkpoint, if its outputs equal the student's.

    Args:
        config: a YOLO config, or its path.
        checkpoint: ``best.pt`` or ``last.pt`` of a finished run, or any ``.pt`` file of an interrupted one, of which
            the moving average is taken, as Ultralytics does.

    Returns:
        The comparison. When ``report.equal`` is false, nothing was written.

    Raises:
        ConfigError: a checkpoint that is missing or is not that of this student, missing images, or an export that
            Ultralytics refuses.
    """
    settings = read(config)
    path = Path(checkpoint).expanduser()
    student = _read(path)
    if settings.student is not None and not settings.student.endswith('.pt'):
        _check_architecture(student, settings.student, path)
    target = options.target(path, yolo=True)
    if options.dynamic == 'batch':
        raise ConfigError(
            '--dynamic batch: Ultralytics leaves batch size, height and width open together; give --dynamic'
        )
    images, source = _images(settings, options, student)
    size = _size(settings, options, student)
    report = Report(str(target), options.tolerance, source)
    with staged(target) as stage:
        plain = stage if options.format == 'pth' else stage.with_suffix('.pt')
        _write_plain(path, plain)
        if options.format == 'pth':
            report.rows.append(_compare_weights(student, plain))
            run = _forward(_read(plain))
        else:
            _delegate(plain, stage, size, options)
            run = load(stage, options.format)
            report.notes = [f'input: {dimensions((1, channels(student), *size))}, float32, 0 to 1, RGB']
        report.rows += _compare(student, run, images, size, options)
        report.rows += _compare_predictions(plain if options.format == 'pth' else stage, path, images, size, options)
        if report.equal:
            publish(stage, target)
    return report


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide Ultralytics' messages, which name the folder that a file is written in before it is checked."""
    level = LOGGER.level
    LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def _read(path: Path) -> nn.Module:
    """The student in a file, in float32; nothing but data and Ultralytics' own classes is loaded."""
    if not path.is_file():
        raise ConfigError(f'CHECKPOINT: there is no file {path}; give the .pt file of a trained student')
    try:
        content, _ = torch_safe_load(str(path), safe_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f'CHECKPOINT: {path} can not be loaded ({reason}); give a .pt file of Ultralytics') from error
    model = content.get('ema') or content.get('model') if isinstance(content, Mapping) else None
    if not isinstance(model, BaseModel) or not isinstance(model.model[-1], Detect):
        raise ConfigError(
            f'CHECKPOINT: {path} holds no YOLO detection or segmentation model but {type(model).__name__}; give a .pt '
            'file of a student'
        )
    return model.float().eval()


def _check_architecture(model: nn.Module, student: str, path: Path) -> None:
    """A file brings its own architecture; is it the one that the config names?"""
    try:
        with _silent():
            yaml = yaml_model_load(student)
    except (FileNotFoundError, OSError) as error:
        raise ConfigError(f'student: {student} is no model YAML that Ultralytics knows ({error})') from None
    with preserve_random_state(), _silent():
        expected = type(model)(yaml, ch=channels(model), nc=len(class_names(model)), verbose=False)
    wanted = {name: tuple(value.shape) for name, value in expected.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # The width of the class branches follows the class count of the weights that training started from.
    free = tuple(f'model.{len(expected.model) - 1}.{branch}.' for branch in ('cv3', 'one2one_cv3'))
    names = sorted(wanted.keys() | found.keys())
    differ = [n for n in names if wanted.get(n) != found.get(n) and not n.startswith(free)]
    if differ:
        raise ConfigError(
            f'CHECKPOINT: {path} is not a checkpoint of the student {student} of this config: {len(differ)} of '
            f'{len(wanted)} tensors have another shape or are missing, {differ[0]} first'
        )


def _write_plain(checkpoint: Path, path: Path) -> None:
    """Ultralytics' stripped file, without our state; but the weights keep their precision.

    Ultralytics rounds to half precision here. ``best.pt`` and ``last.pt`` of a finished run are rounded already; those
    of an interrupted one are not, and an export is to predict what the checkpoint predicts.
    """
    with _silent():
        stripped = strip_optimizer(checkpoint, s=str(path), updates={STATE: None})
    content, _ = torch_safe_load(str(checkpoint), safe_only=True)
    model = content.get('ema') or content['model']
    model.criterion = None
    if isinstance(getattr(model, 'args', None), Mapping):
        model.args = dict(model.args)
    torch.save({**stripped, 'model': model.requires_grad_(False)}, path)


def _compare_weights(student: nn.Module, plain: Path) -> Row:
    content, _ = torch_safe_load(str(plain), safe_only=True)
    found, wanted = content['model'].float().state_dict(), student.state_dict()
    differ = sum(name not in found or not torch.equal(found[name], value) for name, value in wanted.items())
    differ += len(set(found) - set(wanted)) + sum(content.get(key) is not None for key in ('ema', 'optimizer', STATE))
    return Row('weights', f'{len(wanted)} tensors', f'{differ} differ', '-', differ == 0, '-')


def _delegate(plain: Path, stage: Path, size: tuple[int, int], options: ExportOptions) -> None:
    """Let Ultralytics write ``stage`` beside ``plain``; nothing is installed or fetched."""
    arguments: dict[str, Any] = {'format': options.format, 'imgsz': list(size), 'dynamic': options.dynamic is not None}
    if options.format == 'onnx':
        arguments.update(simplify=False, opset=options.opset)  # simplifying needs a package that is not installed
    try:
        with quiet(), _silent():
            written = YOLO(str(plain)).export(device='cpu', **arguments)
    except Exception as error:  # the exporter raises under many types, for many reasons
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ConfigError(f'--format {options.format}: Ultralytics could not export this student: {reason}') from error
    if Path(written) != stage:
        Path(written).replace(stage)


def _size(settings: YoloConfig, options: ExportOptions, student: nn.Module) -> tuple[int, int]:
    size = options.size or settings.train.get('imgsz', 640)
    height, width = (size, size) if isinstance(size, int) else size
    stride = int(max(student.stride))
    if height % stride or width % stride:
        key = '--size' if options.size else 'train.imgsz'
        raise ConfigError(f'{key}: height and width must be multiples of {stride}, not {height} x {width}')
    return int(height), int(width)


def _images(settings: YoloConfig, options: ExportOptions, student: nn.Module) -> tuple[list[np.ndarray], str]:
    """Images ``[H, W, 3]``, BGR, uint8; and what they are, in words."""
    if options.images == NOISE:
        size = _size(settings, options, student)
        return list(np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)), '2 images of noise'
    files, source = options.files(), f'{len(options.files())} images of {options.images}'
    if options.count is not None:
        try:
            data = require_dataset(settings.data)
        except ConfigError as error:
            raise ConfigError(f'{error}; or name a folder of images with --images FOLDER') from None
        arguments = get_cfg(overrides={'task': 'detect', 'imgsz': 640, 'data': settings.data})
        with _silent():
            dataset = build_yolo_dataset(arguments, data['val'], batch=1, data=data, mode='val', rect=False)
        count = min(options.count, len(dataset))
        files = [dataset.im_files[int(i)] for i in np.linspace(0, len(dataset) - 1, count)]
        source = f'{count} of {len(dataset)} validation images'
    images = [imread(str(file)) for file in files]
    for file, image in zip(files, images):
        if image is None:
            raise ConfigError(f'--images: {file} can not be read as an image')
    return images, source


def _batch(images: list[np.ndarray], size: tuple[int, int]) -> Tensor:
    """What the network sees: ``[N, 3, H, W]``, RGB, 0..1, letterboxed."""
    canvas = [LetterBox(size, auto=False)(image=image)[..., ::-1].transpose(2, 0, 1) for image in images]
    return torch.from_numpy(np.ascontiguousarray(np.stack(canvas))).float() / 255


def _forward(model: nn.Module) -> Runnable:
    """The raw outputs of a model in PyTorch, as its exported form has them."""
    model = copy.deepcopy(model).eval()
    if hasattr(model, 'end2end'):
        model.end2end = False  # as Ultralytics exports and predicts unless told otherwise: with NMS outside

    @torch.no_grad()
    def run(batch: Tensor) -> list[Tensor]:
        output = model(batch)[0]
        return list(output) if isinstance(output, (tuple, list)) else [output]

    return run


def _compare(
    student: nn.Module, run: Runnable, images: list[np.ndarray], size: tuple[int, int], options: ExportOptions
) -> list[Row]:
    """Compare the raw outputs, image by image; with ``dynamic`` also two at once, of another size."""
    comparison = Comparison(options.tolerance)
    reference, classes = _forward(student), len(class_names(student))

    def by_meaning(batch: Tensor) -> list[Tensor]:
        return list(_by_meaning(run(batch), classes).values())

    parts = list(_batch(images, size).split(1))
    if options.dynamic is not None:
        pair = [images[0], images[-1][:, ::-1]]
        parts += [_batch(pair, size), _batch(pair, other_size(size))]
    for part in parts:
        wanted = _by_meaning(reference(part), classes)
        comparison.outputs(
            dimensions(part.shape),
            list(wanted),
            [*wanted.values()],
            lambda x: [*_by_meaning(run(x), classes).values()],
            part,
        )
    return comparison.rows()


def _by_meaning(outputs: list[Tensor], classes: int) -> dict[str, Tensor]:
    """Boxes are in pixels, scores 0..1: each is compared on its own scale.

    Args:
        outputs: ``output0`` ``[N, 4 + C + M, A]``, and for segmentation the mask prototypes ``output1``.
    """
    boxes, scores, coefficients = outputs[0].tensor_split([4, 4 + classes], dim=1)
    parts = {'output0: boxes': boxes, 'output0: scores': scores}
    if coefficients.shape[1]:
        parts['output0: mask coefficients'] = coefficients
    return {**parts, **{f'output{i}': value for i, value in enumerate(outputs) if i}}


def _compare_predictions(
    written: Path, checkpoint: Path, images: list[np.ndarray], size: tuple[int, int], options: ExportOptions
) -> list[Row]:
    """Compare detections, by Ultralytics' own interface from images to boxes."""
    comparison = Comparison(options.tolerance)
    task = YOLO(str(checkpoint)).task
    models = [YOLO(str(checkpoint)), YOLO(str(written), task=task)]
    arguments = {
        'imgsz': list(size),
        'conf': _CONFIDENCE,
        'max_det': _LIMIT,
        'rect': False,
        'verbose': False,
        'device': 'cpu',
    }
    for image in images:
        with quiet(), _silent():
            pair = [model.predict(np.ascontiguousarray(image), **arguments)[0].boxes for model in models]
        shape = tuple(image.shape[:2])
        wanted, found = (Detections(boxes.xyxy, boxes.conf, boxes.cls, shape) for boxes in pair)
        comparison.detections('images', wanted, found, _CONFIDENCE, _LIMIT)
    return comparison.rows()
