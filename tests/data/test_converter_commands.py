"""The commands that docs/adaptation.md and the headers of configs/adaptation give: flags and tools that exist.

README.md and docs/user_guide.md are executed by tests/test_readme.py; these commands need Cityscapes, VOC and CamVid.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def commands(text: str) -> list[str]:
    """Converter commands, one a line."""
    text = re.sub(r'^#\s?', '', text, flags=re.MULTILINE).replace('\\\n', ' ')
    lines = (re.search(r'python tools/dataset_converters/[^;]*', line) for line in text.splitlines())
    return [' '.join(line.group().split()) for line in lines if line]


def found() -> list[str]:
    files = [ROOT / 'docs' / 'adaptation.md', *sorted((ROOT / 'configs' / 'adaptation').rglob('*.py'))]
    return sorted({command for file in files for command in commands(file.read_text(encoding='utf-8'))})


class Parsed(Exception):
    """Ends a tool after it has read its arguments."""


def test_every_converter_is_shown():
    tools = {path.name for path in (ROOT / 'tools' / 'dataset_converters').glob('*.py')}
    assert {Path(command.split()[1]).name for command in found()} == tools


@pytest.mark.parametrize('command', found())
def test_command_parses(command, monkeypatch):
    original = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        raise Parsed(original(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    filled = command.replace('$split', 'train').replace('$kind', 'fog').replace('$voc', 'data/VOCdevkit')
    assert '$' not in filled
    _, tool, *arguments = shlex.split(filled, comments=True)
    monkeypatch.setattr(sys, 'argv', [tool, *arguments])
    with pytest.raises((Parsed, SystemExit)) as end:
        runpy.run_path(str(ROOT / tool), run_name='__main__')
    assert end.type is Parsed or end.value.code == 0  # --help; a wrong argument has another code
