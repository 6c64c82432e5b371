"""Small file helpers shared by the generator and the converter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

#: Endings of image files, in small letters.
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` show the file ``source``: a hard link, else a relative symbolic link, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    for make in (os.link, lambda s, t: os.symlink(os.path.relpath(s, t.parent.resolve()), t), shutil.copyfile):
        try:
            make(source, target)
            return
        except FileExistsError:
            target.unlink()
            return link_or_copy(source, target)
        except OSError:
            if make is shutil.copyfile:
                raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old file or the whole new one."""
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    partial.write_text(text, encoding='utf-8')
    os.replace(partial, path)
