#!/usr/bin/env python
"""The main job on generated scenes: a teacher, a student alone, a distilled student, a table and a picture.

python tools/demo.py --task segmentation        or detection, or yolo; `make demo TASK=...` sets everything up first
python tools/demo.py --task segmentation --seeds 0 1 2 3 4        the table in the README
"""

from __future__ import annotations

import argparse
import os.path as osp
import sys
from pathlib import Path

sys.path.insert(0, osp.dirname(osp.abspath(__file__)))  # tools.compare
sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

import compare

from kd_dense.data.scenes import generate
from kd_dense.engine.run import load_config, train_any
from kd_dense.errors import exit_with_sentence

ROOT = Path(__file__).resolve().parent.parent
TASKS = ('segmentation', 'detection', 'yolo')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=TASKS, default='segmentation')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='one pair of runs each (default: 0)')
    return parser.parse_args()


@exit_with_sentence
def main() -> None:
    args = parse_args()
    scenes, work_dir = Path('work_dirs/scenes'), Path(f'work_dirs/demo_{args.task}')
    step(f'1/3 generating scenes in {scenes}')
    generate(scenes, train=800, val=100, size=(128, 128), seed=0, difficulty=0.0)
    teacher = work_dir / 'teacher'
    if (teacher / 'record.json').is_file():
        step(f'2/3 the teacher is trained already: {teacher}')
    else:
        step(f'2/3 training the teacher in {teacher}')
        cfg = load_config(f'configs/demo/{args.task}_teacher.py')
        train_any(cfg, str(teacher), distill=False, seed=0, resume='auto')
    step('3/3 training the student alone and distilled, with equal seeds')
    compare.main([f'configs/demo/{args.task}.py', '--work-dir', str(work_dir), '--seeds', *map(str, args.seeds)])
    print(f'picture: {work_dir / "comparison.png"}')


def step(text: str) -> None:
    """Say what comes next."""
    print(f'\n== {text}', flush=True)


if __name__ == '__main__':
    import os

    os.chdir(ROOT)  # the configs name files relative to the repository
    main()
