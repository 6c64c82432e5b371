"""Export a student of MMSegmentation or MMDetection, and compare what was written with it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn

from kd_dense import checkpoint as checkpoints
from kd_dense.engine.run import is_yolo, load_student, student_alone
from kd_dense.errors import ConfigError
from kd_dense.export import formats
from kd_dense.export.images import fit, other_size, sample_images
from kd_dense.export.network import Deployed, compare_students, deployed
from kd_dense.export.options import ExportOptions, publish, staged
from kd_dense.export.report import Comparison, Report, Row, dimensions
from kd_dense.models.build import build_model, read_checkpoint


def export_any(cfg: Config, checkpoint: str, options: ExportOptions) -> Report:
    """:func:`export`, or its counterpart for Ultralytics, whichever the config is for."""
    if is_yolo(cfg):
        from kd_dense.yolo.export import export as export_yolo

        return export_yolo(cfg, checkpoint, options)
    return export(cfg, checkpoint, options)


def export(cfg: Config, checkpoint: str, options: ExportOptions) -> Report:
    """Write the plain student of a checkpoint, if its outputs equal the student's.

    Args:
        cfg: a distillation config, or the stock config of the student.
        checkpoint: any checkpoint of a run, of a finished or interrupted one. Its ``state_dict`` is taken, which with
            MMEngine's ``EMAHook`` is the average.

    Returns:
        The comparison. When ``report.equal`` is false, nothing was written.

    Raises:
        ConfigError: a checkpoint that is missing or is not that of this student, missing images, or a student that the
            format can not hold.
    """
    if cfg.get('model') is None:
        raise ConfigError('model: the config has none, so there is nothing to export')
    target = options.target(checkpoint)
    stock = student_alone(cfg)
    student = load_student(_build(stock), checkpoint).eval()
    if options.format == 'pth':
        return _export_weights(stock, student, checkpoint, target, options)
    network = deployed(student)
    images, source = sample_images(stock, options)
    size = options.size or getattr(network, 'window', None) or tuple(images[0].shape[1:])
    batch = fit(_windows(images, size) if getattr(network, 'window', None) else images, size)
    _check_repeatable(network, batch[:1])
    metadata = _metadata(stock, checkpoint, network, size, options)
    notes = [f'input: {dimensions(batch[:1].shape)}, float32, 0 to 255, BGR'] + _notes(network, options)
    report = Report(str(target), options.tolerance, source, notes=notes)
    with staged(target) as path:
        formats.write(network, batch[:1], network.names, path, options.format, metadata, options.dynamic, options.opset)
        report.rows = compare(network, formats.load(path, options.format), batch, options)
        if report.equal:
            publish(path, target)
    return report


def _check_repeatable(network: Deployed, image: Tensor) -> None:
    """Does the student give the same outputs for the same image? The first run also finds the names of the outputs."""
    for a, b in zip(network.reference(image), network.reference(image), strict=True):
        if not torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5 * a.double().abs().max().item()):
            raise ConfigError(
                f'--format: this {type(network.student).__name__} gives other outputs for the same image each time, so '
                'there is nothing to compare with; export it with --format pth'
            )


def compare(network: Deployed, run: formats.Runnable, batch: Tensor, options: ExportOptions) -> list[Row]:
    """Compare what a file computes with the student's own outputs and predictions.

    Args:
        network: with the student.
        run: the file.
        batch: ``[N, 3, H, W]``, compared image by image; with ``options.dynamic`` two at once too, and of another size.
    """
    comparison = Comparison(options.tolerance)
    parts = list(batch.split(1))
    if options.dynamic is not None:
        parts.append(torch.cat([batch, batch.flip(3)])[:2])
    if options.dynamic == 'all':
        parts.append(fit(list(parts[-1]), other_size(tuple(batch.shape[2:]))))
    for part in parts:
        source = dimensions(part.shape)
        wanted = network.reference(part)
        found = comparison.outputs(source, network.names, wanted, run, part)
        if found is not None:
            network.compare_predictions(comparison, source, part, found, wanted)
    return comparison.rows()


def _export_weights(stock: Config, student: nn.Module, checkpoint: str, target: Path, options: ExportOptions) -> Report:
    """Weights and class names only. What is read back must be the same tensors, and predict the same."""
    images, source = sample_images(stock, options)
    size = options.size or tuple(images[0].shape[1:])
    report = Report(str(target), options.tolerance, source)
    wanted = checkpoints.state_dict_of(read_checkpoint(checkpoint, 'CHECKPOINT'))
    with staged(target) as path:
        content = {'meta': {'dataset_meta': _dataset_meta(stock, checkpoint)}, 'state_dict': student.state_dict()}
        torch.save(content, path)
        # Plain data: torch's strictest mode reads it, which is what the stock toolbox uses from torch 2.6 on.
        state = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
        again = _build(stock)
        again.load_state_dict(state, strict=True)
        differ = sum(name not in state or not torch.equal(state[name], value) for name, value in wanted.items())
        differ += len(set(state) - set(wanted))
        comparison = Comparison(options.tolerance)
        for part in fit(images, size).split(1):
            compare_students(comparison, dimensions(part.shape), part, student, again.eval())
        weights = Row('weights', f'{len(wanted)} tensors', f'{differ} differ', '-', differ == 0, '-')
        report.rows = [weights, *comparison.rows()]
        if report.equal:
            publish(path, target)
    return report


def _windows(images: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """The middle of each image, as large as the window that the student slides; smaller images as they are."""
    windows = []
    for image in images:
        top, left = (max(n - m, 0) // 2 for n, m in zip(image.shape[1:], size))
        windows.append(image[:, top : top + size[0], left : left + size[1]])
    return windows


def _build(stock: Config) -> nn.Module:
    model = dict(stock.model)
    if 'data_preprocessor' not in model and 'data_preprocessor' in stock:
        model['data_preprocessor'] = stock.data_preprocessor
    return build_model({'_scope_': stock.get('default_scope', 'mmengine'), **model}, 'model', pretrained=False)


def _notes(network: Deployed, options: ExportOptions) -> list[str]:
    notes = []
    if options.dynamic is None:
        notes.append('batch size and size of the input are fixed; --dynamic leaves them open')
    if getattr(network, 'window', None):
        notes.append('the student slides a window over larger images; the file computes one window')
    return notes


def _metadata(
    stock: Config, checkpoint: str, network: Deployed, size: tuple[int, int], options: ExportOptions
) -> dict[str, Any]:
    contract = network.contract()
    sides = ['height', 'width'] if options.dynamic == 'all' else [int(n) for n in size]
    contract['input']['shape'] = [1 if options.dynamic is None else 'batch', 3, *sides]
    return {
        **contract,
        'model': type(network.student).__name__,
        'checkpoint': Path(checkpoint).name,
        'versions': {'torch': torch.__version__, 'python': platform.python_version()},
        **_dataset_meta(stock, checkpoint),
    }


def _dataset_meta(stock: Config, checkpoint: str) -> dict[str, Any]:
    """Class names and colours: of the checkpoint, else of the data set in the config; as plain data."""
    meta = read_checkpoint(checkpoint, 'CHECKPOINT').get('meta') or {}
    found = meta.get('dataset_meta') if isinstance(meta, Mapping) else None
    if not found or not found.get('classes'):
        dataset = (stock.get('val_dataloader') or {}).get('dataset') or {}
        with DefaultScope.overwrite_default_scope(stock.get('default_scope', 'mmengine')):
            kind = DATASETS.get(str(dataset.get('type'))) if dataset.get('type') else None
        found = {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
    plain = {}
    if found.get('classes'):
        plain['classes'] = tuple(str(name) for name in found['classes'])
    if found.get('palette'):
        plain['palette'] = [[int(n) for n in colour] for colour in found['palette']]
    return plain
