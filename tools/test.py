#!/usr/bin/env python
"""Evaluate a plain student checkpoint: COCO AP of boxes and masks through pycocotools, mIoU through MMSegmentation.

    python tools/test.py CONFIG CHECKPOINT
    python tools/test.py CONFIG CHECKPOINT --official-cityscapes    also run cityscapesscripts on the same predictions

CONFIG is the distillation config, or the stock config of the student.
"""

from __future__ import annotations

import argparse
import json
import os
import os.path as osp
import sys

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from mmengine.config import DictAction
from mmengine.dist import is_main_process

from kd_dense.engine.run import evaluate_any, load_config
from kd_dense.errors import exit_with_sentence


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='distillation config, or the stock config of the student')
    parser.add_argument('checkpoint', help='checkpoint of the student')
    parser.add_argument('--work-dir', help='where logs go (default: work_dirs/NAME_OF_CONFIG/test)')
    parser.add_argument('--out', help='write the metrics to this JSON file')
    parser.add_argument('--official-cityscapes', action='store_true', help='also evaluate with cityscapesscripts')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override config entries: key.inner=value ...'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


@exit_with_sentence
def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    name = osp.splitext(osp.basename(args.config))[0]
    work_dir = args.work_dir or osp.join(cfg.get('work_dir') or osp.join('work_dirs', name), 'test')
    if args.out:
        os.makedirs(osp.dirname(osp.abspath(args.out)), exist_ok=True)
    metrics = evaluate_any(
        cfg, args.checkpoint, work_dir, official_cityscapes=args.official_cityscapes, launcher=args.launcher
    )
    if not is_main_process():
        return
    for key, value in metrics.items():
        print(f'{key}: {value:.4f}')
    if args.out:
        with open(args.out, 'w') as file:
            json.dump(metrics, file, indent=1)


if __name__ == '__main__':
    main()
