#!/usr/bin/env python
"""The main job on generated scenes: a teacher, a student alone, a distilled student, a table and a picture.

python tools/demo.py --task segmentation        or detection, or yolo; `make demo TASK=...` sets everything up first
python tools/demo.py --task segmentation --seeds 0 1 2 3 4        the table in the README
python tools/demo.py --task adaptation        a student of scenes by day: trained further by day, and adapted to fog
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
from kd_dense.data.weather import write_weather
from kd_dense.engine.run import load_config, train_any
from kd_dense.errors import exit_with_sentence

ROOT = Path(__file__).resolve().parent.parent
TASKS = ('segmentation', 'detection', 'yolo', 'adaptation')
ADAPTATION = 'configs/adaptation/segmentation/meanteacher_resnet18-w32_200_scenes-to-fog.py'
SCENES = dict(train=800, val=100, size=(128, 128), difficulty=0.0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=TASKS, default='segmentation')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='one pair of runs each (default: 0)')
    return parser.parse_args()


@exit_with_sentence
def main() -> None:
    args = parse_args()
    work_dir = Path(f'work_dirs/demo_{args.task}')
    if args.task == 'adaptation':
        adapt(work_dir, args.seeds)
    else:
        distill(args.task, work_dir, args.seeds)
    print(f'picture: {work_dir / "comparison.png"}')


def distill(task: str, work_dir: Path, seeds: list[int]) -> None:
    """A teacher, its student alone and its student distilled."""
    scenes = Path('work_dirs/scenes')
    step(f'1/3 generating scenes in {scenes}')
    generate(scenes, seed=0, **SCENES)
    train_teacher(task, '2/3')
    step('3/3 training the student alone and distilled, with equal seeds')
    compare.main([f'configs/demo/{task}.py', '--work-dir', str(work_dir), '--seeds', *map(str, seeds)])


def adapt(work_dir: Path, seeds: list[int]) -> None:
    """A student that goes on with scenes by day alone, and one that also learns from scenes in fog without labels.

    Both begin as the teacher of the segmentation demo, which was trained by day, and are scored in fog.
    """
    day, foggy = Path('work_dirs/scenes'), Path('work_dirs/scenes_fog')
    step(f'1/3 generating scenes by day in {day}, and others in fog in {foggy / "fog"}')
    generate(day, seed=0, **SCENES)
    generate(foggy, seed=1, **SCENES)
    write_weather(foggy / 'leftImg8bit', foggy / 'fog', 'fog')
    train_teacher('segmentation', '2/3')
    step('3/3 training it further by day alone, and adapting it to fog, with equal seeds; both are scored in fog')
    compare.main([ADAPTATION, '--work-dir', str(work_dir), '--seeds', *map(str, seeds)])


def train_teacher(task: str, number: str) -> None:
    """The teacher of a task, where it is not trained yet."""
    teacher = Path(f'work_dirs/demo_{task}/teacher')
    if (teacher / 'record.json').is_file():
        step(f'{number} the teacher is trained already: {teacher}')
        return
    step(f'{number} training the teacher in {teacher}')
    train_any(load_config(f'configs/demo/{task}_teacher.py'), str(teacher), distill=False, seed=0, resume='auto')


def step(text: str) -> None:
    """Say what comes next."""
    print(f'\n== {text}', flush=True)


if __name__ == '__main__':
    import os

    os.chdir(ROOT)  # the configs name files relative to the repository
    main()
