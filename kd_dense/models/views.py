"""Whether two views of an image show everything in the same place."""

from __future__ import annotations

from typing import Any

import numpy as np

#: What the toolboxes' transforms write down of their geometry, and their packing keeps by default.
GEOMETRY = ('img_shape', 'flip', 'flip_direction', 'scale_factor')


def difference(first: Any, second: Any) -> str | None:
    """What the data samples of two views of an image say differently about their geometry, as ``NAME A and B``.

    Where they agree, a crop or a rotation of one view alone may still have moved things: transforms write down nothing
    of the one and no packing keeps the other.

    Returns:
        ``None`` where they agree.
    """
    for name in GEOMETRY:
        values = [view.metainfo.get(name) for view in (first, second)]
        if not any(value is None for value in values) and not np.array_equal(*values):
            return f'{name} {values[0]} and {values[1]}'
    return None
