"""The record that a finished training run leaves beside its checkpoint (``record.json``), and that comparisons read."""

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from kd_dense.errors import ConfigError, closest

FILE_NAME = 'record.json'
TOOLBOXES = ('mmseg', 'mmdet', 'ultralytics')


@dataclass
class RunRecord:
    """What one training run reached and cost.

    Args:
        name: who was trained: ``student`` (alone; of an adaptation on the source only), ``distilled``, ``adapted`` or
            ``teacher``.
        seed: seed of the run; runs with equal seeds are compared in pairs.
        toolbox: ``mmseg``, ``mmdet`` or ``ultralytics``.
        metric: what ``value`` is, for example ``mIoU``, ``bbox_mAP`` or ``mAP50-95``.
        value: the metric of the last validation, in percent (0..100).
        iterations: training iterations (optimizer's view: batches seen).
        seconds: wall time of the training steps, without data loading and validation.
        parameters: parameters of the student.
        extra_parameters: parameters that only training has (connectors); 0 for a student alone.
        checkpoint: file of the final plain student checkpoint.
        config: file of the config.
        curve: ``(iteration, metric in percent)`` of every validation, in order.
        per_class: metric of each class in percent; NaN for a class that the validation set does not contain.
        finished: whether the run reached its last iteration.
    """

    name: str
    seed: int
    toolbox: str
    metric: str
    value: float
    iterations: int
    seconds: float
    parameters: int
    extra_parameters: int = 0
    checkpoint: str = ''
    config: str = ''
    curve: list[tuple[int, float]] = field(default_factory=list)
    per_class: dict[str, float] = field(default_factory=dict)
    finished: bool = True

    def __post_init__(self):
        if self.toolbox not in TOOLBOXES:
            raise ConfigError(f'record: toolbox={self.toolbox!r} is not known, {closest(str(self.toolbox), TOOLBOXES)}')
        try:
            self.seed, self.iterations = int(self.seed), int(self.iterations)
            self.parameters, self.extra_parameters = int(self.parameters), int(self.extra_parameters)
            self.value, self.seconds = float(self.value), float(self.seconds)
            self.curve = [(int(iteration), _from_json(value)) for iteration, value in self.curve]
            self.per_class = {str(name): _from_json(value) for name, value in dict(self.per_class).items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(f'record: a field does not have the type it should have ({error})') from error
        if not math.isfinite(self.value):
            raise ConfigError(f'record: {self.metric}={self.value} is not a number, look at the log of the run')

    def save(self, path: str | os.PathLike) -> Path:
        """Write the record as JSON to ``path`` (a file, or a folder that gets a ``record.json``), atomically."""
        path = _file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        content['curve'] = [[iteration, _to_json(value)] for iteration, value in self.curve]
        content['per_class'] = {name: _to_json(value) for name, value in self.per_class.items()}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
        try:
            with os.fdopen(handle, 'w', encoding='utf-8') as file:
                json.dump(content, file, indent=2, allow_nan=False)
                file.write('\n')
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from other users of a shared work dir
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> 'RunRecord':
        """Read a record from ``path`` (a file, or the folder of a run).

        Raises:
            ConfigError: the file is missing, is not JSON, or lacks or has too many fields.
        """
        path = _file(path)
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except FileNotFoundError:
            raise ConfigError(f'{path} does not exist: the run has not finished, resume it') from None
        except (OSError, ValueError) as error:
            raise ConfigError(f'{path} can not be read as a record ({error}): delete it and train again') from error
        if not isinstance(content, dict):
            raise ConfigError(f'{path} is not a record (a JSON object is expected): delete it and train again')
        known = {f.name for f in fields(cls)}
        required = ('name', 'seed', 'toolbox', 'metric', 'value', 'iterations', 'seconds', 'parameters')
        missing = [name for name in required if name not in content]
        if missing:
            raise ConfigError(f'{path} lacks {", ".join(missing)}: delete it and train again')
        unknown = sorted(set(content) - known)
        if unknown:
            raise ConfigError(f'{path}: unknown field {unknown[0]!r}, {closest(unknown[0], known)}')
        try:
            return cls(**content)
        except ConfigError as error:
            raise ConfigError(f'{path}: {error}') from error


def _to_json(value: float) -> float | None:
    """NaN is not JSON: a missing value is written as null."""
    return value if math.isfinite(value) else None


def _from_json(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _file(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path if path.suffix == '.json' else path / FILE_NAME
