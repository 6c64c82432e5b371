"""Every test starts from the same random state, on one thread."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session', autouse=True)
def _configs_are_not_laid_out() -> Iterator[None]:
    """MMEngine lays out its config as text for every log and checkpoint; that takes longer than a tiny training."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):  # the original, and the fork
            patch.setattr(f'{place}.FormatCode', lambda text, **_: (text, False), raising=False)
        yield
