#!/usr/bin/env python
"""Generate a dataset of synthetic scenes in Cityscapes, COCO and YOLO layout.

Example: python tools/make_scenes.py --out data/scenes --train 400 --val 100 --size 128 128
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kd_dense.data.scenes import LAYOUTS, generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='folder of the dataset')
    parser.add_argument('--train', type=int, default=400, help='training scenes (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='validation scenes (default: %(default)s)')
    parser.add_argument('--size', type=int, nargs=2, default=(128, 128), metavar=('H', 'W'), help='default: 128 128')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument('--layouts', nargs='+', default=LAYOUTS, choices=LAYOUTS, help='default: all three')
    parser.add_argument('--difficulty', type=float, default=0.5, help='0..1 (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=0, help='processes; 0 draws in this one (default: %(default)s)')
    args = parser.parse_args()
    try:
        root = generate(
            args.out, args.train, args.val, args.size, args.seed, args.layouts, args.difficulty, args.workers
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{args.train} training and {args.val} validation scenes in {root}')


if __name__ == '__main__':
    main()
