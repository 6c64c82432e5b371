"""Validation whose numbers do not depend on how busy the machine is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ultralytics.utils import nms


@contextmanager
def no_time_limit() -> Iterator[None]:
    """Let Ultralytics' non-maximum suppression finish.

    It stops after 2 seconds plus 0.05 per image of a batch, and leaves the other images of the batch without
    predictions. On a busy CPU that has halved the score of a small student, and of one run of a pair more than of the
    other.
    """
    original = nms.non_max_suppression
    nms.non_max_suppression = partial(original, max_time_img=math.inf)
    try:
        yield
    finally:
        nms.non_max_suppression = original


class Untimed:
    """Validation without the time limit; mixed into a trainer of Ultralytics."""

    def validate(self) -> Any:
        with no_time_limit():
            return super().validate()

    def final_eval(self) -> Any:
        with no_time_limit():
            return super().final_eval()
