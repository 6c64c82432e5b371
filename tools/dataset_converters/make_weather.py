#!/usr/bin/env python
"""Write copies of images in fog or at night, target domains for adaptation; kd_dense/data/weather.py has the models.

Example: python tools/dataset_converters/make_weather.py --kind fog --images data/camvid/images \\
    --out data/camvid_adaptation/fog
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kd_dense.data.weather import KINDS, SEVERITIES, write_weather


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kind', required=True, choices=tuple(KINDS))
    parser.add_argument('--images', required=True, help='folder of images, searched with its subfolders')
    parser.add_argument('--out', required=True, help='folder of the copies')
    parser.add_argument('--severity', type=int, choices=SEVERITIES, default=3, help='(default: %(default)s)')
    args = parser.parse_args()
    try:
        count = write_weather(args.images, args.out, args.kind, args.severity)
    except (ValueError, OSError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{count} images in {args.out} ({args.kind}, severity {args.severity})')


if __name__ == '__main__':
    main()
