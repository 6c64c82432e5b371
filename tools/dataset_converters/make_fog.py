#!/usr/bin/env python
"""Write foggy copies of images, the target domain of the adaptation demos; see kd_dense/data/fog.py for the model.

Example: python tools/dataset_converters/make_fog.py --images work_dirs/scenes/leftImg8bit --out work_dirs/scenes/fog
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_dense.data.fog import write_foggy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True, help='folder of images, searched with its subfolders')
    parser.add_argument('--out', required=True, help='folder of the foggy copies')
    parser.add_argument('--density', type=float, default=1.5, help='0 is no fog (default: %(default)s)')
    args = parser.parse_args()
    try:
        count = write_foggy(args.images, args.out, args.density)
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{count} images in fog in {args.out}')


if __name__ == '__main__':
    main()
