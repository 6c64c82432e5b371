#!/usr/bin/env python
"""Write a COCO file with the boxes of objects in semantic label maps: connected parts of each class.

Objects of one class that touch become one box. Run once per split.

Example: python tools/dataset_converters/labels2coco.py --images data/camvid/images/train \\
    --labels data/camvid/labels/train --classes car=8 pedestrian=9 bicyclist=10 --min-side 8 \\
    --out data/camvid_adaptation/annotations/train.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_dense.data.labels_to_coco import convert


def named_value(text: str) -> tuple[str, int]:
    """``car=8``."""
    name, _, value = text.rpartition('=')
    if not name or not value.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form NAME=VALUE, such as car=8')
    return name, int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True, help='folder of images, searched with its subfolders')
    parser.add_argument('--labels', required=True, help='folder of label maps (.png) named like the images')
    parser.add_argument(
        '--classes', required=True, nargs='+', type=named_value, metavar='NAME=VALUE', help='value in the label maps'
    )
    parser.add_argument('--out', required=True, help='COCO file to write')
    parser.add_argument('--min-side', type=int, default=8, help='shortest side of a box, pixels (default: %(default)s)')
    parser.add_argument('--min-area', type=int, default=1, help='fewest pixels of an object (default: %(default)s)')
    parser.add_argument('--masks', action='store_true', help='add run-length masks')
    args = parser.parse_args()
    options = (args.min_side, args.min_area, args.masks)
    try:
        count, boxes = convert(args.images, args.labels, dict(args.classes), args.out, *options)
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{args.out}: {count} images, ' + ', '.join(f'{number} {name}' for name, number in boxes.items()))


if __name__ == '__main__':
    main()
