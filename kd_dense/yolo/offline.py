"""Ultralytics without the network: nothing is fetched, looked up or installed while a program runs.

Imported before Ultralytics, which reads its environment variables once. :func:`apply` then replaces the two helpers
that fetch a file although everything needed is there:

* ``check_font`` downloads ``Arial.ttf`` whenever a data set is opened; matplotlib brings a font that does as well.
* ``check_amp`` downloads a whole model to try mixed precision on a GPU; the student itself is tried instead.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# A user who wants the downloads sets YOLO_OFFLINE=false.
os.environ.setdefault('YOLO_OFFLINE', 'true')
os.environ.setdefault('YOLO_AUTOINSTALL', 'false')
# MMEngine's launchers set LOCAL_RANK even for a single process, which Ultralytics would take for one of several.
if 'RANK' not in os.environ:
    os.environ.pop('LOCAL_RANK', None)


def apply() -> None:
    """Replace the two helpers; calling it again does nothing."""
    import ultralytics.data.utils
    import ultralytics.engine.trainer
    import ultralytics.utils.checks
    import ultralytics.utils.plotting

    for module in (ultralytics.utils.checks, ultralytics.data.utils, ultralytics.utils.plotting):
        module.check_font = find_font
    ultralytics.engine.trainer.check_amp = amp_works


def find_font(font: str = 'Arial.ttf') -> str:
    """A font file for plots: the one asked for where it is installed, else the font that comes with matplotlib."""
    from matplotlib import font_manager
    from ultralytics.utils import USER_CONFIG_DIR

    name = Path(font).name
    own = USER_CONFIG_DIR / name
    if own.exists():
        return str(own)
    installed = (f.fname for f in font_manager.fontManager.ttflist)
    return next((f for f in installed if Path(f).name == name), font_manager.findfont('DejaVu Sans'))


def amp_works(model: Any) -> bool:
    """Does ``model`` give finite numbers in mixed precision on the GPU it is on? ``False`` on a CPU."""
    import torch

    parameter = next(model.parameters())
    if parameter.device.type in ('cpu', 'mps'):
        return False
    size = 2 * max(int(model.stride.max()), 32)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, model.yaml.get('channels', 3), size, size, generator=generator).to(parameter.device)
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type):
            output = model(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    while isinstance(output, (tuple, list)):  # a segmentation model nests its predictions
        output = output[0]
    return bool(torch.isfinite(output).all())
