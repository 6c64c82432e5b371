"""Is the teacher worth listening to?"""

from __future__ import annotations

import math

#: A teacher has to be this many percent points above the untrained student to be clearly better.
CLEAR = 1.0


def compare_scores(teacher: float, student: float, name: str) -> tuple[str | None, str | None]:
    """Judge a teacher by the student before training.

    Args:
        teacher, student: scores in percent; NaN counts as 0.
        name: of the metric.

    Returns:
        A failure and a warning, either may be ``None``.
    """
    teacher, student = (0.0 if math.isnan(x) else x for x in (teacher, student))
    numbers = f'{name} {teacher:.2f} against {student:.2f}'
    if teacher <= student:
        return (
            f'teacher.checkpoint: the teacher is not better than the student before training ({numbers}); give the '
            'weights of a trained teacher, and check that it was trained on these classes and images',
            None,
        )
    if teacher < student + CLEAR:
        return None, (
            f'teacher.checkpoint: the teacher is hardly better than the student before training ({numbers}); check '
            'that it is the right file, or score more images with --whole-val'
        )
    return None, None


def weak_teacher(score: float | None, name: str, classes: int | None = None) -> str | None:
    """A sentence about a teacher that knows nothing, by its score alone; ``None`` when it may know something.

    Args:
        score: in percent; ``None`` or NaN: it could not be scored at all.
        name: of the metric; for ``'mIoU'`` the share of one class is what a constant prediction can reach.
        classes: number of classes.
    """
    limit = 100.0 / classes if classes and name == 'mIoU' else CLEAR
    value = 0.0 if score is None or math.isnan(score) else score
    if value >= limit:
        return None
    return (
        f'teacher.checkpoint: the teacher scores {name} {value:.2f} on the validation set, no better than a model that '
        'knows nothing; check that the file holds trained weights for these classes and images'
    )
