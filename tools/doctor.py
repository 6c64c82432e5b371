#!/usr/bin/env python
"""Look at a distillation before it is trained: is the teacher the right one, and does every distiller do something?

    python tools/doctor.py CONFIG
    python tools/doctor.py CONFIG --whole-val           score all validation images
    python tools/doctor.py CONFIG --json doctor.json    the same facts for a program; without a path: to stdout

Exit code 0: nothing is wrong, though there may be warnings. 1: a check failed. 2: the config can not be read.
Nothing is written but the JSON file.
"""

from __future__ import annotations

import argparse
import os.path as osp
import sys

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))  # also runs from a checkout that is not installed

from mmengine.config import DictAction
from rich.console import Console

from kd_dense.analysis.doctor import examine
from kd_dense.analysis.doctor.examination import HIGH, LOW
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.checkpoint import atomic_write
from kd_dense.engine.run import is_yolo, load_config
from kd_dense.errors import exit_with_sentence


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', help='distillation config')
    add('--cfg-options', nargs='+', action=DictAction, help='override config entries: key.inner=value ...')
    add('--iterations', type=int, default=5, metavar='N', help='training steps for gradients and times (default: 5)')
    add('--images', type=int, default=32, metavar='N', help='validation images that are scored (default: 32)')
    add('--whole-val', action='store_true', help='score all validation images')
    add('--low', type=float, default=LOW, help=f'warn about a smaller share of the task gradient (default: {LOW:g})')
    add('--high', type=float, default=HIGH, help=f'warn about a larger share of the task gradient (default: {HIGH:g})')
    add(
        '--json', nargs='?', const='-', metavar='PATH', help='write the findings as JSON; without PATH: print only them'
    )
    add('--verbose', action='store_true', help='show what the toolbox logs')
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    if is_yolo(cfg):
        from kd_dense.yolo.doctor import YoloToolbox as Toolbox
    else:
        from kd_dense.engine.doctor import MMToolbox as Toolbox
    report = examine(
        Toolbox(cfg),
        args.iterations,
        None if args.whole_val else args.images,
        args.low,
        args.high,
        # a table that is piped into a file should be as wide as it needs
        console=None if args.json == '-' else Console(width=None if sys.stdout.isatty() else 150),
        quiet=quiet(not args.verbose),
    )
    if args.json == '-':
        print(report.to_json())
    elif args.json:
        with atomic_write(args.json) as file:
            file.write(report.to_json().encode() + b'\n')
    sys.exit(report.exit_code)


if __name__ == '__main__':
    main()
