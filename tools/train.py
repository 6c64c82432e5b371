#!/usr/bin/env python
"""Train a student with distillation, in MMSegmentation, MMDetection or Ultralytics.

    python tools/train.py CONFIG
    python tools/train.py CONFIG --student-alone      the same student, data, schedule and seed without a teacher

Logs, checkpoints and record.json go to work_dirs/NAME_OF_CONFIG, or to --work-dir.
"""

from __future__ import annotations

import argparse
import os
import os.path as osp
import sys

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))  # also runs from a checkout that is not installed

from mmengine.config import DictAction

from kd_dense.engine.run import load_config, train_any
from kd_dense.errors import exit_with_sentence


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='distillation config')
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/NAME_OF_CONFIG)')
    parser.add_argument(
        '--student-alone', action='store_true', help='train the student without distillation, for comparison'
    )
    parser.add_argument('--seed', type=int, help="seed of everything random (default: the config's)")
    parser.add_argument('--amp', action='store_true', help='train with mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the actual batch size')
    parser.add_argument(
        '--resume', nargs='?', const='auto', help='go on from PATH, or from the last checkpoint in the work dir'
    )
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
    work_dir = args.work_dir or cfg.get('work_dir') or osp.join('work_dirs', name)
    options = dict(distill=not args.student_alone, seed=args.seed, resume=args.resume or False, amp=args.amp)
    record = train_any(cfg, work_dir, auto_scale_lr=args.auto_scale_lr, launcher=args.launcher, **options)
    if record is not None:
        print(f'{record.metric} {record.value:.2f}; plain checkpoint: {record.checkpoint}')


if __name__ == '__main__':
    main()
