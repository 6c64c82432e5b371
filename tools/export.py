#!/usr/bin/env python
"""Export the plain student of a run, and check that the file computes what the student computes.

    python tools/export.py CONFIG CHECKPOINT --format pth            weights and class names only
    python tools/export.py CONFIG CHECKPOINT --format torchscript
    python tools/export.py CONFIG CHECKPOINT --format onnx --dynamic

CONFIG is the distillation config, or the stock config of the student; CHECKPOINT any checkpoint of a run, also of an
interrupted one. Prints a table of differences. Where one is larger than the tolerance, nothing is written and the exit
code is 2. docs/export.md says what goes in and out of the files.
"""

from __future__ import annotations

import argparse
import os.path as osp
import sys

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from mmengine.config import DictAction

from kd_dense.engine.run import load_config
from kd_dense.errors import DistillationError, exit_with_sentence
from kd_dense.export import FORMATS, ExportOptions, export_any


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='distillation config, or the stock config of the student')
    parser.add_argument('checkpoint', help='checkpoint of the student')
    parser.add_argument('--format', required=True, choices=list(FORMATS), help='what to write')
    parser.add_argument('--out', help='file to write (default: beside the checkpoint, with the ending of the format)')
    parser.add_argument(
        '--images',
        default='4',
        metavar='N|FOLDER|noise',
        help='compare on N images of the validation set (default: 4), on those in a folder, or on noise',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-4,
        help='largest difference, relative to the largest value of an output (default: 1e-4)',
    )
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='size of the input (default: that of the first image)'
    )
    parser.add_argument(
        '--dynamic',
        nargs='?',
        const='all',
        choices=['all', 'batch'],
        help='leave batch size, height and width open, or the batch size alone',
    )
    parser.add_argument('--opset', type=int, help='ONNX operator set (default: 17; YOLO: the newest of the exporter)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override config entries: key.inner=value ...'
    )
    return parser.parse_args()


@exit_with_sentence
def main() -> None:
    args = parse_args()
    options = ExportOptions(
        format=args.format,
        out=args.out,
        images=args.images,
        tolerance=args.tolerance,
        size=tuple(args.size) if args.size else None,
        dynamic=args.dynamic,
        opset=args.opset,
    )
    report = export_any(load_config(args.config, args.cfg_options), args.checkpoint, options)
    print(report)
    if not report.equal:
        raise DistillationError(
            f'--format {args.format}: the rows marked DIFFERENT are further from the student than the tolerance, so '
            f'{report.path} was not written'
            + ('; leave --dynamic out where only other sizes differ, or give --dynamic batch' if args.dynamic else '')
        )
    print(f'written: {report.path}')


if __name__ == '__main__':
    main()
