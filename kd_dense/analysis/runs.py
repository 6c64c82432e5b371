"""The runs of a comparison: train those that are missing, read those that are there."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kd_dense.analysis.compare import BASELINE, DISTILLATION, Words
from kd_dense.analysis.record import FILE_NAME, RunRecord
from kd_dense.errors import ConfigError

SETTINGS_FILE = 'settings.json'
TEACHER_SCORE_FILE = 'teacher_score.json'
#: Metrics that the toolboxes report in percent (all are MMSegmentation's); the others are fractions.
_IN_PERCENT = ('aAcc', 'mIoU', 'mAcc', 'mDice', 'mFscore', 'mPrecision', 'mRecall')
#: Entries of a config that say where and how to run, not what is trained.
_NOT_COMPARED = ('work_dir', 'launcher', 'resume', 'log_level', 'visualizer', 'vis_backends', 'custom_imports')


def train_runs(
    cfg: Config,
    folder: Path,
    seeds: Sequence[int],
    train: Callable[..., Any],
    log: Callable[[str], None] = print,
    words: Words = DISTILLATION,
) -> dict[str, list[Path]]:
    """Train baseline and variant of a config with every seed, where that has not been done.

    A run is in ``folder/student/seed_N`` or ``folder/distilled/seed_N`` (``adapted``, of an adaptation). Finished ones
    are left as they are, interrupted ones resumed.

    Args:
        cfg: config with distillation or adaptation.
        folder: of the comparison; refused when it has runs of other settings.
        seeds: at least one, no two equal.
        train: called as ``train(cfg, work_dir, distill=..., seed=..., resume=True)``; leaves a ``record.json`` there.
        log: told what is happening.
        words: of distillation or adaptation.

    Returns:
        Folders of the runs, by ``student`` and the name of the variant, in the order of the seeds.

    Raises:
        ConfigError: the folder belongs to other settings, or a run left no record.
    """
    _check_seeds(seeds)
    _claim_folder(folder, cfg)
    return _train_missing({BASELINE: (cfg, False), words.variant: (cfg, True)}, folder, seeds, train, log, words)


def train_variants(
    configs: Mapping[str, Config],
    folder: Path,
    seeds: Sequence[int],
    train: Callable[..., Any],
    alone: Callable[[Config], Config],
    log: Callable[[str], None] = print,
    words: Words = DISTILLATION,
) -> dict[str, list[Path]]:
    """As :func:`train_runs`, for several configs of one student, whose baseline is trained only once.

    A run is in ``folder/student/seed_N`` or ``folder/VARIANT/seed_N``.

    Args:
        configs: variant -> config with distillation or adaptation. Without it all must be the same.
        alone: a config -> the same without it.

    Raises:
        ConfigError: as :func:`train_runs`, or configs whose students, data or schedules differ.
    """
    _check_seeds(seeds)
    for name, cfg in configs.items():
        try:
            _claim_folder(run_folder(folder, BASELINE), alone(cfg))
        except ConfigError as error:
            raise ConfigError(f'CONFIG {name}: {words.in_sentences} is not what was trained: {error}') from None
        _claim_folder(run_folder(folder, name), cfg)
    first = next(iter(configs.values()))
    plan = {BASELINE: (first, False), **{name: (cfg, True) for name, cfg in configs.items()}}
    return _train_missing(plan, folder, seeds, train, log, words)


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError('--seeds: give at least one seed, and each only once')


def _train_missing(
    ways: Mapping[str, tuple[Config, bool]],
    folder: Path,
    seeds: Sequence[int],
    train: Callable[..., Any],
    log: Callable[[str], None],
    words: Words,
) -> dict[str, list[Path]]:
    """Train what is not finished of ``ways``: name -> config, and whether to distil (or adapt)."""
    # All runs of a seed before the next seed: whatever is there after an interruption can be compared.
    plan = [(seed, name) for seed in seeds for name in ways]
    missing = [step for step in plan if not _is_finished(run_folder(folder, step[1], step[0]))]
    folders: dict[str, list[Path]] = {name: [] for name in ways}
    spent: list[float] = []
    for number, (seed, name) in enumerate(plan, 1):
        where = run_folder(folder, name, seed)
        label = f'run {number} of {len(plan)}: {words.baseline if name == BASELINE else name}, seed {seed}'
        if (seed, name) in missing:
            left = ''
            if spent:
                minutes = sum(spent) / len(spent) * (len(missing) - len(spent)) / 60
                left = f', about {max(1, math.ceil(minutes))} min left for all runs'
            log(f'{label}: training in {where}{left}')
            started = time.monotonic()
            cfg, distill = ways[name]
            train(cfg, str(where), distill=distill, seed=seed, resume=True)
            spent.append(time.monotonic() - started)
            if not (where / FILE_NAME).is_file():
                raise ConfigError(
                    f'val_evaluator: {where} has no {FILE_NAME} after training; a comparison needs a config with '
                    'validation and an evaluator of its toolbox'
                )
        record = RunRecord.load(where)
        if record.seed != seed:
            raise ConfigError(f'{where / FILE_NAME} has seed {record.seed}, not {seed}: delete it and train again')
        log(f'{label}: {record.metric} {record.value:.2f}')
        folders[name].append(where)
    return folders


def run_folder(folder: Path, name: str, seed: int | None = None) -> Path:
    """Folder of one run of a comparison, or of all runs of that name."""
    return folder / name / f'seed_{seed}' if seed is not None else folder / name


def variant_names(paths: Sequence[str]) -> list[str]:
    """What to call the configs ``paths`` in one comparison: their method, which is their file name up to the first
    ``_``, or the whole file name where that does not tell them apart.

    Raises:
        ConfigError: two files of one name.
    """
    stems = [Path(path).stem for path in paths]
    methods = [stem.partition('_')[0] for stem in stems]
    names = methods if len(set(methods)) == len(methods) else stems
    taken = [name for name in names if names.count(name) > 1 or name in (BASELINE, 'teacher', 'input', 'truth')]
    if taken:
        raise ConfigError(f'CONFIG: {taken[0]!r} can not name one of several configs; rename the file')
    return names


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """The folders of runs among ``folders`` and, where one holds several runs, in it (``seed_0``, ``seed_1``, ...).

    Raises:
        ConfigError: a folder without a record.
    """
    found = []
    for folder in map(Path, folders):
        if (folder / FILE_NAME).is_file():
            found.append(folder)
            continue
        inner = sorted(file.parent for file in folder.glob(f'seed_*/{FILE_NAME}'))
        if not inner:
            raise ConfigError(f'{folder}: no finished run, there is no {FILE_NAME} in it or in a seed_* folder of it')
        found += inner
    return found


def named_folders(arguments: Sequence[str]) -> dict[str, list[str]]:
    """``DIR ...`` or ``NAME=DIR ...`` as folders by name; a DIR without a name has that of the one before it."""
    name, folders = DISTILLATION.variant, {}
    for argument in arguments:
        before, equals, after = argument.partition('=')
        if equals and after and not Path(argument).exists() and '/' not in before:
            name, argument = before, after
            if name in (BASELINE, 'teacher', 'input', 'truth', ''):
                raise ConfigError(f'--distilled {name}=...: the name {name!r} is taken, choose another one')
        folders.setdefault(name, []).append(argument)
    return folders


def config_of(folder: Path, record: RunRecord) -> Path:
    """The config that a run was made with: the copy that the toolbox left in its folder, with all overrides in it."""
    copy = folder / Path(record.config).name
    return copy if record.config and copy.is_file() else Path(record.config)


def teacher_score(folders: Sequence[str | Path], record: RunRecord) -> float | None:
    """The teacher's score that distilled runs measured before they began, in percent; ``None`` when none of them did.

    Args:
        folders: of distilled runs.
        record: any run of the comparison; says which metric is meant.

    Raises:
        ConfigError: a score file that can not be read, or runs that had different teachers.
    """
    scores: dict[float, Path] = {}
    for file in (Path(folder) / TEACHER_SCORE_FILE for folder in folders):
        value = _score_in(file, record) if file.is_file() else None
        if value is not None:
            scores.setdefault(round(value, 4), file)
    if len(scores) > 1:
        (a, first), (b, second) = list(scores.items())[:2]
        raise ConfigError(
            f'the distilled runs had different teachers ({record.metric} {a:.2f} in {first}, {b:.2f} in {second}): '
            'compare runs with one teacher, or give its score with --teacher'
        )
    return next(iter(scores), None)


def teacher_argument(text: str, record: RunRecord) -> float:
    """What ``--teacher`` says: a score in percent, or the folder of a run that has one.

    Raises:
        ConfigError: neither, or a score of another metric.
    """
    try:
        value = float(text)
    except ValueError:
        pass
    else:
        if not 0 <= value <= 100:
            raise ConfigError(f'--teacher={text}: the score is in percent, between 0 and 100')
        return value
    folder = Path(text)
    if (folder / FILE_NAME).is_file():
        teacher = RunRecord.load(folder)
        if (teacher.metric, teacher.toolbox) != (record.metric, record.toolbox):
            raise ConfigError(
                f'--teacher={text}: its score is {teacher.metric} ({teacher.toolbox}), that of the runs is '
                f'{record.metric} ({record.toolbox})'
            )
        return teacher.value
    value = teacher_score([folder], record)
    if value is None:
        raise ConfigError(
            f'--teacher={text}: neither a number nor a folder with {FILE_NAME} or {TEACHER_SCORE_FILE} that has '
            f'{record.metric}'
        )
    return value


def _score_in(file: Path, record: RunRecord) -> float | None:
    try:
        scores = json.loads(file.read_text(encoding='utf-8'))['score']
        # The toolboxes put a prefix before the name (coco/bbox_mAP), and Ultralytics a kind after it (B for boxes).
        for name, value in scores.items():
            if name.rpartition('/')[2].removesuffix('(B)') == record.metric and value is not None:
                value = float(value)
                break
        else:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{file} can not be read ({error!r}): delete it and give the score with --teacher') from error
    if not math.isfinite(value):
        return None
    return value if record.metric in _IN_PERCENT else 100 * value


def _is_finished(folder: Path) -> bool:
    return (folder / FILE_NAME).is_file() and RunRecord.load(folder).finished


def _claim_folder(folder: Path, cfg: Config) -> None:
    """Note the settings in the folder, or check those noted there: old runs must not pass for runs of this config."""
    settings = json.loads(json.dumps(_flat(_settings(cfg)), default=str))
    file = folder / SETTINGS_FILE
    if file.is_file():
        try:
            noted = json.loads(file.read_text(encoding='utf-8'))
        except ValueError as error:
            raise ConfigError(f'{file} can not be read ({error}): choose another --work-dir') from error
        for key in sorted({*noted, *settings}):
            if noted.get(key) != settings.get(key):
                raise ConfigError(
                    f'{folder} has runs of other settings ({key} was {noted.get(key)!r} and is {settings.get(key)!r}): '
                    'choose another --work-dir or delete this one'
                )
        return
    if any(folder.glob(f'*/seed_*/{FILE_NAME}')) or any(folder.glob(f'seed_*/{FILE_NAME}')):
        raise ConfigError(f'{folder} has runs but no {SETTINGS_FILE}: read them with --student and --distilled instead')
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix('.tmp')
    partial.write_text(json.dumps(settings, indent=1, sort_keys=True), encoding='utf-8')
    partial.replace(file)


def _settings(cfg: Config) -> dict[str, Any]:
    settings = {key: value for key, value in cfg.to_dict().items() if key not in _NOT_COMPARED}
    teacher = cfg.get('teacher') or (cfg.get('model') or {}).get('teacher') or {}
    checkpoint = teacher.get('checkpoint') if isinstance(teacher, Mapping) else None
    if checkpoint and Path(checkpoint).is_file():
        # A teacher that was trained anew has the same path, and is another teacher.
        digest = hashlib.sha256()
        with open(checkpoint, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
        settings['content of the teacher checkpoint'] = digest.hexdigest()
    return settings


def _flat(value: Any, prefix: str = '') -> dict[str, Any]:
    """Nested dicts and lists as one dict with dotted keys; types by name, since they are no JSON."""
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and value:
        items = enumerate(value)
    else:
        return {prefix: f'{value.__module__}.{value.__qualname__}' if isinstance(value, type) else value}
    return {k: v for name, inner in items for k, v in _flat(inner, f'{prefix}.{name}' if prefix else str(name)).items()}
