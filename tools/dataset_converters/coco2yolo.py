#!/usr/bin/env python
"""Convert a COCO file into the layout that Ultralytics reads; run once per split.

Example: python tools/dataset_converters/coco2yolo.py --images bccd/train --json bccd/annotations/train.json \\
    --out data/bccd_yolo --split train
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_dense.data.coco_to_yolo import convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', required=True, help='folder that the file names in the COCO file are relative to')
    parser.add_argument('--json', required=True, help='COCO annotation file')
    parser.add_argument('--out', required=True, help='folder to write images/, labels/ and data.yaml to')
    parser.add_argument('--split', required=True, choices=('train', 'val'))
    args = parser.parse_args()
    try:
        data_file = convert(args.images, args.json, args.out, args.split)
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{args.split} split written; data file: {data_file}')


if __name__ == '__main__':
    main()
