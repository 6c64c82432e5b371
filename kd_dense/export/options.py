"""What can be asked of an export."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kd_dense.errors import ConfigError, closest

#: Format -> what the default file name ends with, for MMEngine and for Ultralytics.
FORMATS = {
    'pth': ('_student.pth', '_student.pt'),
    'torchscript': ('.torchscript', '.torchscript'),
    'onnx': ('.onnx', '.onnx'),
}
NOISE = 'noise'
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


@dataclass
class ExportOptions:
    """Options of an export.

    Args:
        format: ``'pth'``, ``'torchscript'`` or ``'onnx'``.
        out: file to write; default: beside the checkpoint, with the ending of the format.
        images: what the outputs are compared on: a number of images of the validation set, a folder of images, or
            ``'noise'`` for random images.
        tolerance: largest difference between an output of the file and the student's, relative to the largest absolute
            value of that output.
        size: ``(H, W)`` of the exported input, in pixels; default: that of the first image, as the config's pipeline
            gives it (of the window, where the config tests by sliding one; ``imgsz`` for YOLO).
        dynamic: leave the ``'batch'`` size open, or ``'all'``: height and width too.
        opset: of ONNX; default: 17 (the newest that torch's exporter knows, for YOLO).

    Raises:
        ConfigError: an option that can not be.
    """

    format: str
    out: str | None = None
    images: str = '4'
    tolerance: float = 1e-4
    size: tuple[int, int] | None = None
    dynamic: str | None = None
    opset: int | None = None

    def __post_init__(self) -> None:
        self.images = str(self.images)
        if self.format not in FORMATS:
            raise ConfigError(f'--format: there is no format {self.format!r}; {closest(self.format, FORMATS)}')
        if self.dynamic not in (None, 'batch', 'all'):
            raise ConfigError(f"--dynamic: takes 'all' or 'batch', not {self.dynamic!r}")
        if not self.tolerance >= 0:
            raise ConfigError(f'--tolerance: must be 0 or more, not {self.tolerance}')
        if self.size is not None and min(self.size) < 1:
            raise ConfigError(f'--size: height and width must be positive, not {self.size}')
        if self.count == 0:
            raise ConfigError('--images: at least one image is needed to compare outputs on')
        if self.count is None and self.images != NOISE and not self.files():
            raise ConfigError(
                f'--images: {self.images} is neither a number of validation images, nor a folder of images '
                f'({", ".join(IMAGE_SUFFIXES)}), nor {NOISE!r}'
            )
        if self.format == 'pth' and (self.dynamic, self.opset) != (None, None):
            raise ConfigError('--dynamic, --opset: are for torchscript and onnx; a checkpoint takes any input')
        if self.format == 'torchscript' and self.opset is not None:
            raise ConfigError('--opset: is for onnx; leave it out for torchscript')

    @property
    def count(self) -> int | None:
        """How many images of the validation set to compare on; ``None``: a folder, or noise."""
        return int(self.images) if self.images.isdigit() else None

    def files(self) -> list[Path]:
        """The images in the folder ``images``, sorted; empty when it is none."""
        folder = Path(self.images).expanduser()
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)

    def target(self, checkpoint: str | Path, yolo: bool = False) -> Path:
        """The file to write.

        Raises:
            ConfigError: it is the checkpoint itself, or a folder.
        """
        checkpoint = Path(checkpoint).expanduser()
        ending = FORMATS[self.format][yolo]
        target = Path(self.out).expanduser() if self.out else checkpoint.with_name(checkpoint.stem + ending)
        if target.resolve() == checkpoint.resolve():
            raise ConfigError(f'--out: {target} is the checkpoint itself; name another file')
        if target.is_dir():
            raise ConfigError(f'--out: {target} is a folder; name the file to write')
        expected = Path(ending).suffix or ending
        if yolo and target.suffix != expected:
            raise ConfigError(f'--out: Ultralytics knows the format by the ending {expected!r}; {target} has another')
        return target


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path in a new folder beside ``target``, for :func:`publish`; the folder is gone after the block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent) as folder:
        yield Path(folder) / target.name


def publish(path: Path, target: Path) -> None:
    """Put the complete file ``path`` in the place of ``target``, which is at every moment the old or the new one."""
    with path.open('rb') as file:
        os.fsync(file.fileno())
    os.replace(path, target)
