#!/usr/bin/env python
"""Write the COCO file of a split of Cityscapes, or of Foggy Cityscapes: boxes of the eight classes with instances.

python tools/dataset_converters/cityscapes2coco.py --root data/cityscapes --split train
python tools/dataset_converters/cityscapes2coco.py --root data/cityscapes --split train --beta 0.02      in fog
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_dense.data.cityscapes_to_coco import BETAS, convert, default_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', required=True, help='folder with gtFine, and leftImg8bit or leftImg8bit_foggy')
    parser.add_argument('--split', required=True, choices=('train', 'val'))
    parser.add_argument('--beta', choices=BETAS, help='density of the fog (default: the clear images)')
    parser.add_argument(
        '--out',
        help='COCO file to write (default: annotations/instancesonly_filtered_gtFine_SPLIT.json in the root, in fog '
        'annotations/foggy_SPLIT.json)',
    )
    parser.add_argument('--masks', action='store_true', help='add run-length masks, for instance segmentation')
    args = parser.parse_args()
    out = args.out or default_file(args.root, args.split, args.beta)
    try:
        count, objects = convert(args.root, args.split, args.beta, out, args.masks)
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{out}: {count} images, ' + ', '.join(f'{number} {name}' for name, number in objects.items()))


if __name__ == '__main__':
    main()
