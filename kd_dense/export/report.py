"""How far the outputs of two models are apart, and whether that is within the tolerance."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass
class Row:
    """One compared output.

    Args:
        output: its name.
        shape: of the output, in words where it has no fixed one.
        difference: largest absolute difference, in words.
        relative: the same relative to the largest absolute value, in words.
        equal: is it within the tolerance?
        input: shape of the input.
    """

    output: str
    shape: str
    difference: str
    relative: str
    equal: bool
    input: str = ''


@dataclass
class Report:
    """What was written and how it compares.

    Args:
        path: the file.
        tolerance: that the rows were judged by.
        source: what the inputs were, in words.
        rows: the comparison.
        notes: what a user of the file should know.
    """

    path: str
    tolerance: float
    source: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Are there outputs, and are all of them within the tolerance?"""
        return bool(self.rows) and all(row.equal for row in self.rows)

    def __str__(self) -> str:
        table = Table(title=f'{self.path} and the student on {self.source}', expand=False)
        for column in ('input', 'output', 'shape', 'max abs difference', 'relative difference', 'verdict'):
            table.add_column(column, overflow='fold')
        for row in self.rows:
            verdict = 'equal' if row.equal else 'DIFFERENT'
            table.add_row(row.input, row.output, row.shape, row.difference, row.relative, verdict)
        with io.StringIO() as text:
            Console(width=160, file=text).print(table)
            lines = [text.getvalue().rstrip(), f'tolerance: {self.tolerance:g} of the largest value of an output']
        return '\n'.join([*lines, *self.notes])


def dimensions(shape: Iterable[int]) -> str:
    """``2x3x64x64``."""
    return 'x'.join(str(int(n)) for n in shape)


class Comparison:
    """Collects pairs of outputs over several images.

    Args:
        tolerance: as in :class:`~kd_dense.export.ExportOptions`.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._tensors: dict[tuple[str, str], list] = {}
        self._detections: dict[tuple[str, str], list] = {}
        self._labels: dict[tuple[str, str], list] = {}
        self._failures: list[Row] = []

    def outputs(
        self, source: str, names: Sequence[str], wanted: Sequence[Tensor], run: Callable, batch: Tensor
    ) -> list[Tensor] | None:
        """Run the file and compare its raw outputs with the student's.

        Args:
            source: shape of the input, in words.
            names: of the outputs.
            wanted: the student's outputs. Those that are not of floating point are left to :meth:`labels`.
            run: the file.
            batch: its input.

        Returns:
            The file's outputs, ``None`` when they have other shapes or it does not run.
        """
        try:
            found = run(batch)
        except Exception as error:  # runtimes raise under types of their own
            reason = (str(error).strip().splitlines() or [''])[-1][:120]
            self._failures.append(Row('does not run', f'{type(error).__name__}: {reason}', '-', '-', False, source))
            return None
        if [a.shape for a in wanted] != [b.shape for b in found]:
            shapes = ', '.join(dimensions(b.shape) for b in found)
            self._failures.append(Row('other shapes', shapes, '-', '-', False, source))
            return None
        continuous = [i for i, value in enumerate(wanted) if value.is_floating_point()]
        self.tensors(source, *([values[i] for i in continuous] for values in (names, wanted, found)))
        return found

    def tensors(self, source: str, names: Sequence[str], wanted: Sequence[Tensor], found: Sequence[Tensor]) -> None:
        """Add outputs of the student and of the file for the same input.

        Args:
            source: shape of the input, in words.
            names: of the outputs.
            wanted, found: of the student and of the file, of equal shapes. What is not a number counts as different.
        """
        for name, a, b in zip(names, wanted, found, strict=True):
            entry = self._tensors.setdefault((source, name), [dimensions(a.shape), 0.0, 0.0])
            difference = (a.double() - b.double()).abs().max().item()
            entry[1] = max(entry[1], float('inf') if math.isnan(difference) else difference)
            entry[2] = max(entry[2], a.double().abs().max().item())

    def labels(self, source: str, logits: Tensor, wanted: Tensor, found: Tensor) -> None:
        """Add label maps ``[N, H, W]``.

        They may differ where the student's two best logits (``logits``: ``[N, C, H, W]``) are closer than the tolerance
        can tell apart; nowhere, when there is one channel.
        """
        entry = self._labels.setdefault((source, 'labels'), [dimensions(wanted.shape), 0, 0, 0])
        differ = wanted.long() != found.long()
        if logits.shape[1] > 1:
            best = logits.topk(2, dim=1).values
            margin = best[:, 0] - best[:, 1]
            clear = differ & (margin > 2 * self.tolerance * logits.abs().max())
        else:
            clear = differ
        entry[1] += int(differ.sum())
        entry[2] += int(clear.sum())
        entry[3] += wanted.numel()

    def detections(
        self,
        source: str,
        wanted: Detections,
        found: Detections,
        threshold: float = 0.0,
        limit: int | None = None,
    ) -> None:
        """Add the detections of one image; see :func:`unmatched_detections`."""
        entry = self._detections.setdefault((source, 'detections'), [0, 0, 0.0, 0.0])
        unmatched, box, score = unmatched_detections(wanted, found, self.tolerance, threshold, limit)
        entry[0] += len(wanted.scores)
        entry[1] += unmatched
        entry[2], entry[3] = max(entry[2], box), max(entry[3], score)

    def rows(self) -> list[Row]:
        """The comparison so far, one row per output and input shape."""
        rows = list(self._failures)
        for (source, name), (shape, difference, scale) in self._tensors.items():
            relative = difference / scale if scale else difference
            rows.append(Row(name, shape, f'{difference:.2e}', f'{relative:.2e}', relative <= self.tolerance, source))
        for (source, name), (shape, differ, clear, pixels) in self._labels.items():
            share = f'{differ / pixels:.2e}'
            rows.append(Row(name, shape, f'{differ} of {pixels} pixels', share, clear == 0, source))
        for (source, name), (count, unmatched, box, score) in self._detections.items():
            moved = f'{box:.2e} pixels, {score:.2e} score'
            rows.append(Row(name, f'{count} boxes', moved, f'{unmatched} unmatched', unmatched == 0, source))
        order = list(dict.fromkeys(row.input for row in rows))
        return sorted(rows, key=lambda row: order.index(row.input))


@dataclass
class Detections:
    """Detections of one image.

    Args:
        boxes: ``[K, 4]`` corners in pixels.
        scores: ``[K]``, 0..1.
        labels: ``[K]`` class indices.
        size: ``(H, W)`` of the image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    size: tuple[int, int]


def unmatched_detections(
    wanted: Detections, found: Detections, tolerance: float, threshold: float = 0.0, limit: int | None = None
) -> tuple[int, float, float]:
    """Match detections of the same class whose box and score are the same up to rounding.

    A detection has a partner when there is one of its class whose corners differ by at most ``tolerance`` of the larger
    image side and whose score by at most ``tolerance``. It may be without where rounding decides whether it is kept.

    Args:
        threshold: lowest score of a detection that is kept; within ``tolerance`` of it, one may be without partner.
        limit: largest number of detections that is kept. Where a side has as many, one whose score is within
            ``tolerance`` of the lowest may be without partner.

    Returns:
        Detections of either side without a partner; the largest difference of a corner (pixels) and of a score between
        partners.
    """
    score = (wanted.scores[:, None].double() - found.scores[None].double()).abs()
    corner = (wanted.boxes[:, None].double() - found.boxes[None].double()).abs().amax(2)
    same_class = wanted.labels[:, None].long() == found.labels[None].long()
    fits = same_class & (score <= tolerance) & (corner <= tolerance * max(wanted.size))
    lonely = 0
    for side, matched in ((wanted, fits.any(1)), (found, fits.any(0))):
        decided = side.scores > threshold + tolerance
        if limit is not None and len(side.scores) >= limit:
            decided &= side.scores > side.scores.min() + tolerance
        lonely += int((~matched & decided).sum())
    if not fits.any():
        return lonely, 0.0, 0.0
    rows = fits.any(1).nonzero()[:, 0]
    nearest = torch.where(fits, corner, float('inf')).argmin(1)[rows]
    return lonely, corner[rows, nearest].max().item(), score[rows, nearest].max().item()
