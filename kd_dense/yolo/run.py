"""Train from a config: what ``tools/train.py`` calls for YOLO."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from mmengine.config import Config
from ultralytics.nn.tasks import guess_model_task, load_checkpoint, yaml_model_load
from ultralytics.utils import LOGGER, RANK

from kd_dense.analysis.doctor.scores import weak_teacher
from kd_dense.analysis.record import RunRecord
from kd_dense.checkpoint import atomic_write, remove_leftovers
from kd_dense.errors import ConfigError, Interrupted
from kd_dense.failures import as_sentences
from kd_dense.run_lock import is_first_process, locked
from kd_dense.stopping import name_of, requested, stop_signals
from kd_dense.yolo import mmdet_teacher
from kd_dense.yolo.adaptation_trainer import AdaptationTrainer, SourceTrainer
from kd_dense.yolo.config import YoloConfig, load, read
from kd_dense.yolo.evaluate import evaluate
from kd_dense.yolo.teacher import read_checkpoint
from kd_dense.yolo.trainer import (
    DistillationTrainer,
    SegmentationDistillationTrainer,
    SegmentationStudentTrainer,
    StudentTrainer,
    require_dataset,
)

#: Task -> (trainer of the student alone, trainer with a teacher).
TRAINERS = {
    'detect': (StudentTrainer, DistillationTrainer),
    'segment': (SegmentationStudentTrainer, SegmentationDistillationTrainer),
}
#: Task -> the number that counts in a comparison, as Ultralytics calls it.
METRICS = {'detect': 'metrics/mAP50-95(B)', 'segment': 'metrics/mAP50-95(M)'}


def train(
    config: str | Path | Config | Mapping,
    work_dir: str | Path | None = None,
    distill: bool = True,
    seed: int | None = None,
    resume: bool | str | Path = False,
    amp: bool = False,
    auto_scale_lr: bool = False,
    launcher: str = 'none',
) -> RunRecord | None:
    """Train the student of a config. A config without teacher and distillers trains its student alone.

    Args:
        config: a YOLO config, or its path.
        work_dir: folder for results, used as it is; default: ``work_dir`` of the config, or ``work_dirs/NAME``. The
            plain student lies in ``weights/last.pt`` and ``weights/best.pt``, the curves in ``results.csv``.
        distill: ``False``: the student alone, by Ultralytics' own training with the same arguments.
        seed: over the config. Equal seeds mean equal data order with and without distillation.
        resume: ``True`` or ``'auto'``: go on from ``work_dir/weights/last.pt`` where there is one; or a checkpoint.
        amp: mixed precision, over the config; ``False`` leaves it as it is there.
        auto_scale_lr: not available; Ultralytics accumulates gradients up to its nominal batch size instead.
        launcher: ``'none'``, or ``'pytorch'`` when torchrun started this process. Without a launcher, ``device='0,1'``
            among the training arguments uses several GPUs.

    Returns:
        What is in ``work_dir/record.json``: the last validation, of ``weights/last.pt``. ``None`` on other processes
        than the first.

    Raises:
        ConfigError: whatever is wrong with the config, the teacher, the data or the checkpoint, or another run that is
            writing to the folder.
        DistillationError: training can not go on; the checkpoints that were written are good.
        Interrupted: by SIGINT or SIGTERM; ``weights/last.pt`` holds the epochs that were finished.
    """
    source = load(config)
    settings = read(source)
    name = Path(source.filename or 'yolo.py').stem
    if distill and settings.teacher is None and settings.adaptation is None:
        LOGGER.info('the config has no teacher: its student is trained alone')
        distill = False
    if auto_scale_lr:
        raise ConfigError(
            'auto_scale_lr: Ultralytics accumulates gradients up to train.nbs images instead; leave --auto-scale-lr out'
        )
    folder = Path(work_dir or settings.work_dir or Path('work_dirs') / name).expanduser().resolve()
    arguments = _arguments(settings, folder)
    require_dataset(settings.data, arguments.get('split', 'val'))
    if settings.adaptation is not None and settings.adaptation.target_yaml is not None:
        require_dataset(settings.adaptation.target_yaml, arguments.get('split', 'val'), 'adaptation.target')
    if seed is not None:
        arguments['seed'] = seed
    if amp:
        arguments['amp'] = True
    if launcher == 'pytorch':
        arguments.setdefault('device', ','.join(map(str, range(int(os.environ.get('WORLD_SIZE', 1))))))
    elif launcher != 'none':
        raise ConfigError(f"launcher: Ultralytics is started by 'pytorch' or 'none', not {launcher!r}")
    trainer_type = TRAINERS[arguments['task']][distill]
    if settings.adaptation is not None:
        if arguments['task'] != 'detect':
            raise ConfigError(
                f'student: {settings.student} is for the task {arguments["task"]!r}; adaptation trains detection models'
            )
        trainer_type = AdaptationTrainer if distill else SourceTrainer
    if not distill and settings.teacher and settings.teacher['cache']:
        trainer_type = _on_views_of(trainer_type, settings.teacher['cache'])
    observer = _Observer()
    first = is_first_process(launcher)
    with (
        locked(folder, launcher),
        as_sentences(folder),
        nullcontext(folder) if first else TemporaryDirectory() as place,
    ):
        if first:
            remove_leftovers(folder)
            remove_leftovers(folder / 'weights')
        if distill or settings.adaptation is not None:
            # The config as it is used, overrides included: read again on resume, and by every process of several GPUs.
            # Of those of a launcher each has its own: the first one tidies up the folder while the others begin.
            arguments['distill_model'] = str(Path(place) / f'{name}.py')
            with atomic_write(arguments['distill_model']) as file:
                file.write(source.dump().encode())
        last = _checkpoint_to_resume(resume, folder)
        if last is not None:
            arguments.update(resume=str(last), save_dir=str(folder))
        if distill and settings.adaptation is None and RANK in (-1, 0):
            _score_teacher(source, settings, folder)  # before the trainer is made: it sets the seeds
        trainer = trainer_type(overrides=arguments)
        for event in ('on_train_batch_start', 'on_train_batch_end', 'on_model_save'):
            trainer.add_callback(event, getattr(observer, event))
        trainer.add_callback('on_train_batch_end', _stop_in_epoch)
        trainer.add_callback('on_model_save', _stop_after_epoch)
        # With several GPUs the training is in processes of its own, which a signal has to reach.
        with nullcontext() if trainer.ddp else stop_signals(), as_sentences(folder):
            trainer.train()
    if RANK not in (-1, 0):
        return None
    record = _record(trainer, observer, distill, arguments['task'], str(source.filename or ''))
    record.save(folder)
    return record


def _on_views_of(trainer_type: type, cache: str) -> type:
    """A trainer of the student alone that sees the views of a cache, so that a comparison with them is fair.

    A class, and no attribute of the trainer: Ultralytics hands it to the processes of several GPUs.
    """
    return type(trainer_type.__name__, (trainer_type,), {'teacher_cache': cache, 'with_outputs': False})


def _stop_in_epoch(trainer: Any) -> None:
    """After a batch: end the run if a signal asked for it. Ultralytics can only go on from the end of an epoch."""
    if requested() is not None:
        _stop(trainer, trainer.epoch)


def _stop_after_epoch(trainer: Any) -> None:
    if requested() is not None and not trainer.stop:  # the last epoch is done: the rest takes no time
        _stop(trainer, trainer.epoch + 1)


def _stop(trainer: Any, saved: int) -> NoReturn:
    number = requested()
    if saved:
        left = f'{trainer.last} holds {saved} of {trainer.epochs} epochs: go on from there with --resume'
    else:
        left = 'no epoch was finished, so start it again'
    raise Interrupted(f'{name_of(number)} in epoch {trainer.epoch + 1}; {left}', number)


def _score_teacher(source: Config, settings: YoloConfig, folder: Path) -> None:
    """Score the teacher on the validation images; the score is kept while its weights and the data stay the same."""
    path = folder / 'teacher_score.json'
    if mmdet_teacher.is_config(settings.teacher['config']):
        LOGGER.info(mmdet_teacher.UNSCORED)
        path.unlink(missing_ok=True)  # of another teacher
        return
    checkpoint = Path(str(settings.teacher.get('checkpoint'))).expanduser()
    if not checkpoint.is_file():
        return  # the trainer says what is wrong with it
    digest = hashlib.sha256(checkpoint.read_bytes())
    digest.update(json.dumps([require_dataset(settings.data)['val'], settings.train.get('imgsz')]).encode())
    try:
        if json.loads(path.read_text())['key'] == digest.hexdigest():
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or a broken one
    read_checkpoint(checkpoint, 'teacher.checkpoint', settings.teacher['trusted'])
    score = evaluate(source, checkpoint, folder / 'teacher', trusted=True)  # it was looked at in the line above
    LOGGER.info('teacher on the validation set: ' + ', '.join(f'{k} {v:.4g}' for k, v in score.items()))
    key = next((k for k in reversed(METRICS.values()) if k in score), None)  # of masks, where there are masks
    if key is not None and (sentence := weak_teacher(100 * score[key], key.removeprefix('metrics/'))):
        LOGGER.warning(sentence)
    with atomic_write(path) as file:
        file.write(json.dumps({'key': digest.hexdigest(), 'score': score}, indent=1).encode())


def _arguments(settings: YoloConfig, folder: Path) -> dict[str, Any]:
    """Arguments for a trainer of Ultralytics."""
    if settings.student is None:
        raise ConfigError("student: give a model YAML or .pt file, such as student='yolo11n.yaml'")
    task = settings.train.get('task') or _task(settings.student)
    if task not in TRAINERS:
        kind = f'the task {task!r}' if task else 'an unknown task'
        raise ConfigError(f'student: {settings.student} is for {kind}; kd_dense trains {list(TRAINERS)}')
    return {
        **settings.train,
        'task': task,
        'mode': 'train',
        'model': settings.student,
        'pretrained': settings.pretrained,
        'data': settings.data,
        # With an absolute project and exist_ok, Ultralytics writes into exactly this folder.
        'project': str(folder.parent),
        'name': folder.name,
        'exist_ok': True,
    }


def _task(student: str) -> str:
    if student.endswith('.pt'):
        if not Path(student).is_file():
            raise ConfigError(
                f'student: there is no file {student}; train from a model YAML, or give the path of the weights'
            )
        read_checkpoint(student, 'student')  # Ultralytics itself would execute what the file names
        return load_checkpoint(student)[0].task
    try:
        return guess_model_task(yaml_model_load(student))
    except (FileNotFoundError, OSError):
        raise ConfigError(f'student: {student} is neither a .pt file nor a model YAML that Ultralytics knows') from None


def _checkpoint_to_resume(resume: bool | str | Path, folder: Path) -> Path | None:
    if not resume:
        return None
    automatic = resume is True or resume == 'auto'
    path = folder / 'weights' / 'last.pt' if automatic else Path(resume).expanduser().resolve()
    if path.is_file():
        return path
    if automatic:
        LOGGER.info(f'nothing to resume in {folder}; starting anew')
        return None
    raise ConfigError(f'resume: there is no checkpoint {path}')


class _Observer:
    """Times the training steps and keeps the scores of each class at the last validation."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self.per_class: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.steps += 1

    def on_model_save(self, trainer: Any) -> None:
        metrics = trainer.validator.metrics
        part = metrics.seg if trainer.args.task == 'segment' else metrics.box
        maps = part.maps  # a class without objects has the mean there
        self.per_class = {metrics.names[int(i)]: 100 * float(maps[int(i)]) for i in part.ap_class_index}


def _record(trainer: Any, observer: _Observer, distilled: bool, task: str, config: str) -> RunRecord:
    with open(trainer.csv, newline='', encoding='utf-8') as file:
        rows = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
    key = METRICS[task]
    model = load_checkpoint(trainer.last)[0]
    batches = (
        len(trainer.train_loader) if observer.steps else 0
    )  # 0: trained by processes of their own, on several GPUs
    iterations = batches * len(rows)
    curve = [(batches * int(row['epoch']), 100 * float(row[key])) for row in rows]
    # A resumed run has timed some of its steps only.
    seconds = observer.seconds / observer.steps * iterations if observer.steps else float(rows[-1]['time'])
    return RunRecord(
        name=('adapted' if isinstance(trainer, AdaptationTrainer) else 'distilled') if distilled else 'student',
        seed=trainer.args.seed,
        toolbox='ultralytics',
        metric=key.removeprefix('metrics/').removesuffix('(B)'),
        value=curve[-1][1],
        iterations=iterations,
        seconds=seconds,
        parameters=sum(p.numel() for p in model.parameters()),
        extra_parameters=_connector_parameters(trainer) if distilled else 0,
        checkpoint=str(trainer.last),
        config=config,
        curve=curve,
        per_class=observer.per_class,
    )


def _connector_parameters(trainer: Any) -> int:
    distillers = getattr(getattr(trainer, 'joined', None), 'distillers', None)
    return sum(p.numel() for p in distillers.parameters()) if distillers is not None else 0
