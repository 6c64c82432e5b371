"""Train, evaluate and look at runs from a config: what the tools call."""

from __future__ import annotations

import copy
import logging
import os.path as osp
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import DATASETS, RUNNERS, VISUALIZERS, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint

from kd_dense import checkpoint as checkpoints
from kd_dense.adaptation.paired import train_on_source
from kd_dense.analysis.doctor.environment import operators_problem
from kd_dense.analysis.record import RunRecord
from kd_dense.cache import use_cache
from kd_dense.engine.amp import set_precision
from kd_dense.engine.cpu_processes import start_cpu_processes
from kd_dense.engine.data_checks import check_loader, named_if_empty
from kd_dense.engine.deferred_log import defer_log
from kd_dense.engine.loops import use_resumable_loop
from kd_dense.engine.score import use_complete_metrics
from kd_dense.errors import ConfigError
from kd_dense.failures import as_sentences
from kd_dense.models.build import build_model, build_teacher, model_config, read_checkpoint, read_config
from kd_dense.run_lock import is_first_process, locked
from kd_dense.stopping import stop_signals

#: Metric that counts in a comparison, by what the evaluator computes -> key in the validation metrics, factor to
#: percent.
_METRICS = {
    'IoUMetric': ('mIoU', 1.0),
    'CityscapesMetric': ('averageScoreCategories', 100.0),
    'CocoMetric': ('coco/bbox_mAP', 100.0),
    'VOCMetric': ('pascal_voc/mAP', 100.0),
}


#: The hook that each model of ours is trained with.
_HOOKS = {
    'Distillation': 'DistillationHook',
    'MeanTeacherAdaptation': 'AdaptationHook',
    'BackbonePretraining': 'PretrainingHook',
}
#: Who is trained in such a model, in the record of the run.
_RECORD_NAMES = {'Distillation': 'distilled', 'MeanTeacherAdaptation': 'adapted'}


def load_config(path: str, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config of any of the three toolboxes and apply ``--cfg-options``.

    Raises:
        ConfigError: no such file, or it can not be parsed, or the options do not fit it.
    """
    cfg = read_config(path, 'CONFIG')
    if options:
        try:
            cfg.merge_from_dict(dict(options))
        except (TypeError, KeyError, IndexError, ValueError) as error:  # a key inside of what is no dict, say
            reason = ' '.join(str(error).split())
            raise ConfigError(f'--cfg-options: do not fit {path}: {reason}; name keys that the config has') from error
    return cfg


def is_yolo(cfg: Config) -> bool:
    """Does the config name an Ultralytics student instead of an MMEngine model?"""
    return 'student' in cfg and 'model' not in cfg


def _model_type(cfg: Config) -> str:
    return str(cfg.get('model', {}).get('type', '')).rpartition('.')[2]


def is_distillation(cfg: Config) -> bool:
    """Is the MMEngine model of this config a :class:`~kd_dense.Distillation`?"""
    return _model_type(cfg) == 'Distillation'


def is_adaptation(cfg: Config) -> bool:
    """Is the MMEngine model of this config a :class:`~kd_dense.MeanTeacherAdaptation`?"""
    return _model_type(cfg) == 'MeanTeacherAdaptation'


def adapts(cfg: Config) -> bool:
    """Is this a config of mean-teacher adaptation, of any toolbox?"""
    return 'adaptation' in cfg if is_yolo(cfg) else is_adaptation(cfg)


def is_pretraining(cfg: Config) -> bool:
    """Is the MMEngine model of this config a :class:`~kd_dense.BackbonePretraining`?"""
    return _model_type(cfg) == 'BackbonePretraining'


def has_teacher(cfg: Config) -> bool:
    """Does the config name a trained teacher? One that adapts or trains a student alone does not."""
    return 'teacher' in (cfg if is_yolo(cfg) else cfg.get('model', {}))


def student_alone(cfg: Config) -> Config:
    """The same config without distillation: the stock model of the student, and no hook of ours that needs more.

    Of an adaptation the training on the source domain alone is left.
    """
    cfg = copy.deepcopy(cfg)
    if is_yolo(cfg):
        for key in ('teacher', 'distillers'):
            cfg.pop(key, None)
        if isinstance(cfg.get('adaptation'), Mapping):  # steps and validation are by the target
            cfg.adaptation = {k: v for k, v in cfg.adaptation.items() if k == 'target'}
        return cfg
    if is_adaptation(cfg):
        train_on_source(cfg)
    if is_distillation(cfg) or is_adaptation(cfg):
        cfg.model = model_config(cfg.model['student'], 'student')
        scope = cfg.model.pop('_scope_', None)
        if scope and 'default_scope' not in cfg:
            cfg.default_scope = scope
    ours = ('DistillationHook', 'AdaptationHook')
    cfg.custom_hooks = [h for h in cfg.get('custom_hooks') or [] if not any(_is_type(h, name) for name in ours)]
    return cfg


def _is_type(hook: Any, name: str) -> bool:
    return isinstance(hook, Mapping) and str(hook.get('type', '')).rpartition('.')[2] == name


def train_any(cfg: Config, work_dir: str, **arguments: Any) -> RunRecord | None:
    """:func:`train`, or its counterpart for Ultralytics, whichever the config is for."""
    if is_yolo(cfg):
        from kd_dense import yolo

        return yolo.train(cfg, work_dir, **arguments)
    return train(cfg, work_dir, **arguments)


def evaluate_any(cfg: Config, checkpoint: str, work_dir: str, **arguments: Any) -> dict[str, float]:
    """:func:`evaluate`, or its counterpart for Ultralytics, whichever the config is for."""
    if is_yolo(cfg):
        from kd_dense import yolo

        return yolo.evaluate(cfg, checkpoint, work_dir, **arguments)
    return evaluate(cfg, checkpoint, work_dir, **arguments)


def train(
    cfg: Config,
    work_dir: str,
    distill: bool = True,
    seed: int | None = None,
    resume: bool | str = False,
    amp: bool = False,
    auto_scale_lr: bool = False,
    launcher: str = 'none',
) -> RunRecord | None:
    """Train with MMEngine's runner.

    Args:
        cfg: the config; left as it is.
        work_dir: where everything is written.
        distill: ``False``: the student alone, with the same data, schedule and seed.
        seed: of everything random; ``None``: the config's own.
        resume: ``True`` or ``'auto'``: go on from the last checkpoint in ``work_dir`` if there is one; a path: from
            that one.
        amp: mixed precision, as ``--amp`` of the toolboxes; on a CPU too, in bfloat16.
        auto_scale_lr: as ``--auto-scale-lr`` of the toolboxes.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Returns:
        What was written to ``work_dir/record.json``; ``None`` on other processes than the first, or without validation.

    Raises:
        ConfigError: a config that can not work, a data set or teacher file that is missing, or a work dir that another
            run is writing to.
        DistillationError: training can not go on; the checkpoints that were written are good.
        Interrupted: by SIGINT or SIGTERM, after the state was saved.
    """
    name = cfg.filename or ''
    if cfg.get('model') is None:
        raise ConfigError(f'model: {name or "the config"} has none, so there is nothing to train')
    if is_pretraining(cfg) and not distill:
        raise ConfigError('--student-alone: pre-training has no labels but those of its teacher; leave it out')
    cfg = use_cache(cfg, outputs=distill)
    cfg = copy.deepcopy(cfg) if distill else student_alone(cfg)
    cfg.work_dir, cfg.launcher = work_dir, launcher
    hooks = list(cfg.get('custom_hooks') or [])
    own = _HOOKS.get(_model_type(cfg))
    if own and not any(_is_type(h, own) for h in hooks):
        hooks.append(dict(type=f'kd_dense.{own}'))
    if seed is not None:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    for safety in ('RandomStateHook', 'GradientHook', 'FiniteHook', 'StopHook'):
        if not any(_is_type(h, safety) for h in hooks):
            hooks.append(dict(type=f'kd_dense.{safety}'))
    use_resumable_loop(cfg)
    use_complete_metrics(cfg)
    metric = _metric(cfg)
    if metric is not None and not any(_is_type(h, 'RecordHook') for h in hooks):
        hooks.append(
            dict(
                type='kd_dense.RecordHook',
                name=_RECORD_NAMES.get(_model_type(cfg), 'student'),
                seed=(cfg.get('randomness') or {}).get('seed') or 0,
                toolbox=_toolbox(cfg),
                metric=metric[0],
                percent=metric[1],
                config=name,
            )
        )
    cfg.custom_hooks = hooks
    set_precision(cfg, amp)
    if auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ConfigError('auto_scale_lr.base_batch_size: --auto-scale-lr needs it in the config')
        cfg.auto_scale_lr.enable = True
    if resume:
        if resume not in (True, 'auto') and not osp.isfile(resume):
            raise ConfigError(f'--resume: there is no checkpoint file {resume}')
        if resume not in (True, 'auto'):
            cfg.resume, cfg.load_from = True, str(resume)
        elif not cfg.get('load_from') or find_latest_checkpoint(work_dir) is not None:
            cfg.resume, cfg.load_from = True, None
    start = str(cfg.get('load_from') or '')
    if start and '://' not in start and not osp.isfile(start):
        raise ConfigError(f'load_from: there is no checkpoint file {start}; train it first, or name another one')
    check_data(cfg)
    if _toolbox(cfg) in ('mmseg', 'mmdet') and (problem := operators_problem()):
        raise ConfigError(problem)
    with locked(work_dir, launcher), stop_signals(), as_sentences(work_dir):
        if is_first_process(launcher):
            checkpoints.remove_leftovers(work_dir)
        start_cpu_processes(cfg)
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        defer_log(runner)
        for part in ('train', 'val'):
            _build_loader(runner, part)
        runner.train()
    record = Path(work_dir) / 'record.json'
    return RunRecord.load(record) if is_main_process() and record.is_file() else None


def _build_loader(runner: Runner, part: str) -> None:
    """Build a data loader before the loop does, which would wait for a first batch for ever where there are no images.

    Args:
        part: ``'train'``, ``'val'`` or ``'test'``.
    """
    name = f'_{part}_dataloader'
    loader = getattr(runner, name, None)
    if isinstance(runner, Runner) and isinstance(loader, Mapping):  # as MMEngine's loops build it
        different = runner._randomness_cfg.get('diff_rank_seed', False)
        with named_if_empty(loader, name[1:]):
            loader = runner.build_dataloader(loader, seed=runner.seed, diff_rank_seed=different)
        setattr(runner, name, check_loader(loader, name[1:]))


def _metric(cfg: Config) -> tuple[str, float] | None:
    evaluators = cfg.get('val_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        name = str(evaluator.get('type', '')).rpartition('.')[2]
        found = _METRICS.get(name)
        if name == 'CocoMetric':  # of several kinds the first one counts
            kinds = evaluator.get('metric', 'bbox')
            kind = kinds if isinstance(kinds, str) else kinds[0]
            found = (f'coco/{kind}_mAP', 100.0) if kind in ('bbox', 'segm') else found
        if found is not None:
            return found
    return None


def _toolbox(cfg: Config) -> str:
    scope = cfg.get('default_scope', '')
    return scope if scope in ('mmseg', 'mmdet') else str(cfg.model.get('_scope_', scope))


# -- data --------------------------------------------------------------------------------------------------------------


def check_data(cfg: Config, parts: tuple[str, ...] = ('train_dataloader', 'val_dataloader')) -> None:
    """Are the folders and annotation files of the data sets there?

    Raises:
        ConfigError: one is missing; the sentence names the config key and the path.
    """
    for part in parts:
        dataset = (cfg.get(part) or {}).get('dataset')
        if dataset is not None:
            _check_dataset(dataset, f'{part}.dataset')


def _check_dataset(dataset: Mapping, key: str) -> None:
    inner = [name for name in ('dataset', 'datasets', 'source', 'target') if dataset.get(name) is not None]
    for name in inner:
        wrapped = dataset[name]
        for i, one in enumerate(wrapped if isinstance(wrapped, (list, tuple)) else [wrapped]):
            _check_dataset(one, f'{key}.{name}' + (f'[{i}]' if isinstance(wrapped, (list, tuple)) else ''))
    if inner:
        return
    root = dataset.get('data_root') or ''
    hint = f'; put the data there, or say where it is with --cfg-options {key}.data_root=FOLDER'
    if root and not osp.isdir(root):
        raise ConfigError(f'{key}.data_root: there is no folder {root}{hint}')
    annotations = dataset.get('ann_file')
    if annotations and not osp.isfile(osp.join(root, annotations)):
        raise ConfigError(f'{key}.ann_file: there is no file {osp.join(root, annotations)}{hint}')
    for name, prefix in (dataset.get('data_prefix') or {}).items():
        if prefix and not osp.isdir(osp.join(root, prefix)):
            raise ConfigError(f'{key}.data_prefix.{name}: there is no folder {osp.join(root, prefix)}{hint}')


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluate(
    cfg: Config, checkpoint: str, work_dir: str, official_cityscapes: bool = False, launcher: str = 'none'
) -> dict[str, float]:
    """Test a plain student checkpoint with the evaluator of its config.

    Args:
        cfg: a distillation config, or the stock config of the student.
        official_cityscapes: also run the evaluation of cityscapesscripts on the same predictions.

    Returns:
        Metric name -> value, as the toolbox reports them.

    Raises:
        ConfigError: a checkpoint that is missing or is not that of this student, or missing data.
    """
    if cfg.get('model') is None:
        raise ConfigError('model: the config has none, so there is nothing to evaluate')
    cfg = student_alone(cfg)
    cfg.work_dir, cfg.launcher = work_dir, launcher
    cfg.load_from, cfg.resume = None, False
    # the average of an EMA hook is what the checkpoint holds
    cfg.custom_hooks = [h for h in cfg.custom_hooks if not _is_type(h, 'EMAHook')]
    if cfg.get('test_dataloader') is None:
        raise ConfigError('test_dataloader: the config has none, so there is nothing to evaluate on')
    use_complete_metrics(cfg)
    check_data(cfg, ('test_dataloader',))
    if official_cityscapes:
        if _toolbox(cfg) != 'mmseg':
            raise ConfigError('--official-cityscapes: scores label maps, and this is no segmentation config')
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        folder = osp.join(work_dir, 'cityscapes_predictions')
        official = dict(type='kd_dense.OfficialCityscapesMetric', output_dir=folder, prefix='cityscapesscripts')
        cfg.test_evaluator = [*evaluators, official]
    with as_sentences(work_dir):
        start_cpu_processes(cfg)
        runner = Runner.from_cfg(cfg)
        load_student(runner.model, checkpoint)
        _build_loader(runner, 'test')
        metrics = runner.test()
    return {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float, np.number))}


def load_student(model: torch.nn.Module, checkpoint: str) -> torch.nn.Module:
    """Load a plain student checkpoint strictly.

    Raises:
        ConfigError: it does not fit; the first tensors that differ are named.
    """
    state = checkpoints.state_dict_of(read_checkpoint(checkpoint, 'CHECKPOINT'))
    try:
        (model.module if hasattr(model, 'module') else model).load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f'CHECKPOINT: {checkpoint} is not a checkpoint of the student of this config: {_short(error)}'
        ) from None
    return model


def _short(error: Exception, lines: int = 3) -> str:
    return ' '.join(line.strip() for line in str(error).splitlines()[:lines])[:400]


# -- looking at predictions --------------------------------------------------------------------------------------------


def examples(cfg: Config, checkpoint: Mapping[str, str | None], count: int = 4) -> list[dict[str, np.ndarray]]:
    """Draw ground truth and predictions on images of the validation set.

    Args:
        checkpoint: ``'student'``, ``'distilled'`` (or any name of a student) and ``'teacher'`` -> checkpoint; ``None``
            for the teacher: the one in the config.

    Returns:
        Per image: ``input``, ``truth`` and one entry per key of ``checkpoint``, each ``[H, W, 3]`` RGB, uint8.
    """
    if is_yolo(cfg):
        from kd_dense import yolo

        return yolo.examples(cfg, checkpoint, count)
    scope = _toolbox(cfg)
    init_default_scope(scope)
    dataset = DATASETS.build(dict(cfg.val_dataloader.dataset, _scope_=scope))
    painter = _painter(scope, dataset.metainfo)
    indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)
    batches = [_as_batch(dataset[int(i)]) for i in indices]
    rows = [
        {'input': image, 'truth': painter(image, sample, True)} for image, sample in map(_image_and_sample, batches)
    ]
    for name, path in checkpoint.items():
        model = _teacher_of(cfg) if name == 'teacher' and path is None else _student_of(cfg, path)
        for row, batch in zip(rows, batches, strict=True):
            with torch.no_grad():
                prediction = model.eval().test_step(copy.deepcopy(batch))[0]
            row[name] = painter(row['input'], prediction, False)
    return rows


def _student_of(cfg: Config, checkpoint: str) -> torch.nn.Module:
    return load_student(build_model(dict(student_alone(cfg).model, _scope_=_toolbox(cfg)), 'student'), checkpoint)


def _teacher_of(cfg: Config) -> torch.nn.Module:
    teacher = cfg.model['teacher']
    config = teacher['config']
    if isinstance(config, Mapping):
        config = dict({'_scope_': _toolbox(cfg)}, **config)
    return build_teacher(
        config, teacher.get('checkpoint'), tuple(teacher.get('allow', ())), teacher.get('trusted', False)
    )[0]


def _as_batch(item: dict) -> dict:
    return {'inputs': [item['inputs']], 'data_samples': [item['data_samples']]}


def _image_and_sample(batch: dict) -> tuple[np.ndarray, Any]:
    from mmcv import imread

    sample = batch['data_samples'][0]
    return imread(sample.img_path, channel_order='rgb'), sample


def _painter(scope: str, metainfo: Mapping) -> Callable[[np.ndarray, Any, bool], np.ndarray]:
    logging.getLogger('mmengine').setLevel(logging.WARNING)
    if scope == 'mmseg':
        return lambda image, sample, truth: _paint_labels(sample, truth, metainfo)
    visualizer = VISUALIZERS.build(dict(type='mmdet.DetLocalVisualizer', name='kd_dense_examples', line_width=2))
    visualizer.dataset_meta = dict(metainfo)

    def paint(image: np.ndarray, sample: Any, truth: bool) -> np.ndarray:
        sample = sample.detach().cpu() if hasattr(sample, 'detach') else sample
        if truth:  # ground truth is in the coordinates of the resized image; predictions are in those of the original
            sample = _rescaled_truth(sample)
        image, sample = _enlarged(image, sample)
        visualizer.add_datasample('', image, sample, draw_gt=truth, draw_pred=not truth, pred_score_thr=0.3)
        return visualizer.get_image()

    return paint


def _enlarged(image: np.ndarray, sample: Any, side: int = 480) -> tuple[np.ndarray, Any]:
    """A small image and its boxes, enlarged so that the labels of the boxes do not cover it."""
    factor = max(1, round(side / max(image.shape[:2])))
    if factor > 1:
        image = np.ascontiguousarray(image.repeat(factor, 0).repeat(factor, 1))
        sample = copy.deepcopy(sample)
        for instances in (sample.get('gt_instances'), sample.get('pred_instances')):
            if instances is not None:
                boxes = instances.bboxes
                instances.bboxes = getattr(boxes, 'tensor', boxes) * factor
                if 'masks' in instances:
                    del instances.masks
    return image, sample


def _paint_labels(sample: Any, truth: bool, metainfo: Mapping) -> np.ndarray:
    labels = (sample.gt_sem_seg if truth else sample.pred_sem_seg).data.squeeze(0).cpu().numpy()
    palette = np.zeros((256, 3), np.uint8)  # ignored pixels are black
    palette[: len(metainfo['palette'])] = metainfo['palette']
    return palette[labels]


def _rescaled_truth(sample: Any) -> Any:
    sample = copy.deepcopy(sample)
    if 'gt_instances' in sample and 'scale_factor' in sample.metainfo:
        boxes = sample.gt_instances.bboxes
        boxes = getattr(boxes, 'tensor', boxes)
        sample.gt_instances.bboxes = boxes / boxes.new_tensor(sample.scale_factor).repeat(2)
        if 'masks' in sample.gt_instances:
            del sample.gt_instances.masks
    return sample
