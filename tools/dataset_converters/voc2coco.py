#!/usr/bin/env python
"""Write a COCO file of data sets in the layout of Pascal VOC: VOC 2007, VOC 2012, Clipart1k.

python tools/dataset_converters/voc2coco.py --root data/VOCdevkit --sets VOC2007/trainval VOC2012/trainval \\
    --out data/VOCdevkit/annotations/voc0712_trainval.json
python tools/dataset_converters/voc2coco.py --root data/VOCdevkit --sets clipart/train \\
    --out data/VOCdevkit/annotations/clipart_train.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_dense.data.voc_to_coco import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', required=True, help='folder of the data sets; file names will be relative to it')
    parser.add_argument(
        '--sets', required=True, nargs='+', metavar='FOLDER/SET', help='data set and list of its images'
    )
    parser.add_argument('--out', required=True, help='COCO file to write')
    args = parser.parse_args()
    try:
        count, objects = convert(args.root, args.sets, args.out)
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{args.out}: {count} images, {sum(objects.values())} objects that are not difficult')


if __name__ == '__main__':
    main()
