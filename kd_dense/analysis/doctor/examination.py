"""The order of the checks, what each builds on, and how its facts are judged."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from rich.console import Console

from kd_dense.analysis.doctor import cost, gradients, show
from kd_dense.analysis.doctor.environment import environment, problems
from kd_dense.analysis.doctor.gradients import HIGH, LOW
from kd_dense.analysis.doctor.report import Check, Report
from kd_dense.analysis.doctor.scores import compare_scores, weak_teacher
from kd_dense.analysis.doctor.toolbox import Toolbox
from kd_dense.analysis.doctor.weights import about_weights
from kd_dense.distillation import Distillers
from kd_dense.errors import ConfigError, DistillationError
from kd_dense.failures import as_sentences
from kd_dense.teacher import Remap, is_frozen, match_classes


def examine(
    toolbox: Toolbox,
    iterations: int = 5,
    images: int | None = 32,
    low: float = LOW,
    high: float = HIGH,
    console: Console | None = None,
    quiet: Callable[[], AbstractContextManager] = nullcontext,
) -> Report:
    """Look at a distillation before it is trained. Nothing is written, and no weight is kept.

    A check that needs the result of one that failed is skipped; all others are made.

    Args:
        toolbox: the config, in its toolbox.
        iterations: training steps for the gradients and the times.
        images: of the validation set, for the scores; ``None``: all.
        low, high: shares of the task gradient below and above which a distillation term is warned about.
        console: where results are printed as they come; ``None``: nowhere.
        quiet: a context in which the toolbox works; it may silence it.
    """
    if iterations < 1 or (images is not None and images < 1):
        raise ConfigError(f'--iterations and --images must be at least 1, not {iterations} and {images}')
    return _Examination(toolbox, iterations, images, (low, high), console, quiet).run()


class _Examination:
    def __init__(
        self,
        toolbox: Toolbox,
        iterations: int,
        images: int | None,
        shares: tuple[float, float],
        console: Console | None,
        quiet: Callable[[], AbstractContextManager],
    ) -> None:
        self.toolbox, self.iterations, self.images, self.shares = toolbox, iterations, images, shares
        self.console, self.quiet = console, quiet
        self.report = Report(toolbox.config, toolbox.name)
        self.distillers: Distillers | None = None

    def run(self) -> Report:
        """Make all checks, in this order; each names those that it builds on."""
        try:
            self.check('environment', self.environment)
            self.check('config', self.config)
            self.check('distillers', self.named_distillers, 'config')
            self.check('teacher', self.teacher, 'environment', 'config')
            self.check('data', self.data, 'environment', 'config')
            student_needs = ('data',) if self.toolbox.name == 'ultralytics' else ('environment', 'config')
            self.check('student', self.student, *student_needs)
            self.check('scores', self.scores, 'teacher', 'student', 'data')
            self.check('classes', self.classes, 'teacher', 'data')
            self.check('preprocessing', self.preprocessing, 'teacher', 'student')
            self.check('taps', self.taps, 'distillers', 'teacher', 'student', 'preprocessing')
            self.check('gradients', self.gradients, 'taps', 'data')
            self.check('cost', self.cost, 'gradients')
        finally:
            self.toolbox.close()
        if self.console is not None:
            show.verdict(self.report, self.console)
        return self.report

    def check(self, name: str, look: Callable[[Check], None], *needs: str) -> None:
        """Make one check, unless one that it needs can not be built on."""
        check = Check(name)
        broken = next((need for need in needs if not self.report[need].usable), None)
        if broken is not None:
            check.skipped = f'needs the check {broken!r}, which {self._fate(broken)}'
        else:
            try:
                with self.quiet(), as_sentences('the work dir'):
                    look(check)
            except (ConfigError, DistillationError) as error:
                check.fail(str(error))
            except Exception as error:  # of the toolbox, of the data: it would end the training too
                traceback.print_exc()
                text = (str(error).strip().splitlines() or ['no message'])[0]
                check.fail(f'{name}: {type(error).__name__}: {text}; the traceback is above')
        self.report.checks.append(check)
        if self.console is not None:
            show.check(check, self.console, self.distillers)

    def _fate(self, name: str) -> str:
        return 'was skipped' if self.report[name].skipped is not None else 'failed'

    # -- the checks ----------------------------------------------------------------------------------------------------

    def environment(self, check: Check) -> None:
        check.facts = environment() | {'device': str(self.toolbox.device)}
        for problem in problems(self.toolbox.packages, self.toolbox.needs_operators):
            check.fail(problem)
        if check.facts['openmmlab_family'] == 'mixed':
            check.warn('the OpenMMLab packages are originals and forks at once; install one family, with `make setup`')

    def config(self, check: Check) -> None:
        check.facts = {'path': self.toolbox.config, 'toolbox': self.toolbox.name}
        self.toolbox.check_config()

    def named_distillers(self, check: Check) -> None:
        check.facts = {'names': self.toolbox.check_distillers()}

    def teacher(self, check: Check) -> None:
        teacher = self.toolbox.load_teacher()
        self.teacher_model, report = teacher.model, teacher.report
        frozen = is_frozen(teacher.model)
        check.facts = {
            'report': report,
            'source': teacher.source,
            'type': type(teacher.model).__name__,
            'tensors': report and report.tensors,
            'all_tensors': report and report.all_tensors,
            'parameters': report and report.parameters,
            'all_parameters': report and report.all_parameters,
            'strict': not teacher.allow,
            'allow': list(teacher.allow),
            'trusted': teacher.trusted,
            'frozen_and_eval': frozen,
        }
        if not frozen:
            check.fail('teacher: is not frozen and in evaluation mode; a model given as teacher must allow both')
        if report and report.tensors < report.all_tensors and teacher.allow:
            check.warn(
                f'teacher.allow: {report.all_tensors - report.tensors} tensors of the teacher are not loaded and stay '
                'random; name fewer prefixes if a tap depends on them'
            )
        if teacher.trusted:
            check.warn(
                'teacher.trusted: the file was read without restrictions, and may have called any function with your '
                'rights; remove the option for files of plain tensors'
            )

    def data(self, check: Check) -> None:
        self.sizes = self.toolbox.open_data()
        check.facts = asdict(self.sizes)
        for part, count in (('training', self.sizes.train_images), ('validation', self.sizes.val_images)):
            if count == 0:
                check.fail(f'the {part} set has no images; check its paths and annotations in the config')

    def student(self, check: Check) -> None:
        self.student_model = self.toolbox.build_student()
        count = sum(p.numel() for p in self.student_model.parameters())
        trained = sum(p.numel() for p in self.student_model.parameters() if p.requires_grad)
        check.facts = {'type': type(self.student_model).__name__, 'parameters': count, 'trained_parameters': trained}
        if trained == 0:
            check.fail('student: none of its parameters is trained; remove what freezes them')

    def scores(self, check: Check) -> None:
        count = None if self.images is None or self.images >= self.sizes.val_images else self.images
        metric = self.toolbox.metric()
        check.facts = {
            'images': count or self.sizes.val_images,
            'all_images': self.sizes.val_images,
            'metric': metric and metric.name,
        }
        reason = self.toolbox.unscored()
        if reason is not None:
            check.warn(reason)
            return
        percent = {}
        for side in ('teacher', 'student'):
            scores = self.toolbox.score(side, count)
            percent[side] = None if metric is None else metric.percent * scores.get(metric.key, 0.0)
            check.facts |= {side: scores, f'{side}_percent': percent[side]}
        if metric is None:
            check.warn('val_evaluator: no metric of it is known here, so that teacher and student were not compared')
            return
        failure, warning = compare_scores(percent['teacher'], percent['student'], metric.name)
        if failure is not None:
            check.fail(failure)
        elif warning is None:
            classes = self.toolbox.classes().student
            warning = weak_teacher(percent['teacher'], metric.name, classes and len(classes))
        if warning is not None:
            check.warn(warning)

    def classes(self, check: Check) -> None:
        classes = self.toolbox.classes()
        check.facts = asdict(classes)
        if classes.mapping == 'ignore':
            check.facts['result'] = 'not compared'
            return
        if classes.student is None or classes.teacher is None:
            side = 'student' if classes.student is None else 'teacher'
            check.facts['result'] = 'not known'
            check.warn(
                f'teacher.classes: the {side} does not say what its classes are, so they were not compared; make sure '
                'that both have the same, in the same order'
            )
            return
        check.facts['result'] = 'mismatch'
        match_classes(classes.student, classes.teacher, classes.mapping)
        check.facts['result'] = 'mapped by name' if classes.mapping else 'the same'

    def preprocessing(self, check: Check) -> None:
        both = self.toolbox.preprocessing()
        sides = {'student': both.student, 'teacher': both.teacher}
        check.facts = {side: value and asdict(value) for side, value in sides.items()} | {'scale': both.scale}
        remap = Remap(both.student, both.teacher, both.scale)
        check.facts |= {
            'identity': remap.is_identity,
            'channels_reversed': remap.flip,
            'gain': None if remap.gain is None else remap.gain.flatten().tolist(),
            'shift': None if remap.shift is None else remap.shift.flatten().tolist(),
        }
        plain = [
            side for side, value in sides.items() if value and set(value.mean) == {0.0} and set(value.std) == {1.0}
        ]
        if len(plain) == 1:
            check.warn(
                f'data_preprocessor: the {plain[0]} has no mean and std but the other side has, so its images are '
                'taken for pixel values 0 to 255; if its pipeline normalises them, say how with mean and std here '
                'instead'
            )

    def taps(self, check: Check) -> None:
        self.distillers = self.toolbox.join()
        check.facts = {
            'connector_parameters': sum(p.numel() for p in self.distillers.parameters()),
            'rows': [asdict(row) for row in self.distillers.table],
        }

    def gradients(self, check: Check) -> None:
        nothing, check.warnings = about_weights(self.distillers)
        if nothing is not None:
            check.fail(nothing)
            return
        found = gradients.measure(self.toolbox, self.student_model, self.distillers, self.iterations)
        low, high = self.shares
        check.facts = found.facts() | {'low': low, 'high': high}
        failures, warnings = gradients.judge(found, low, high)
        check.failures += failures
        check.warnings += warnings
        if not is_frozen(self.teacher_model):
            check.fail('teacher: did not stay frozen and in evaluation mode while the student was trained')

    def cost(self, check: Check) -> None:
        found: Any = cost.measure(
            self.toolbox, self.student_model, self.teacher_model, self.distillers, self.iterations
        )
        check.facts = found.facts()
