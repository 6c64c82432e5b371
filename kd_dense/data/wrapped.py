"""Data sets inside of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def innermost(dataset: Any) -> Iterator[Any]:
    """The data sets that a wrapper (repeated, concatenated, class-balanced, ...) is made of."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else None)
    if inner is None:
        yield dataset
    else:
        for one in inner:
            yield from innermost(one)
