#!/usr/bin/env python
"""Measure what distillation or adaptation gained over the student alone, with the same seeds and schedule.

    python tools/compare.py CONFIG --seeds 0 1 2         train both with every seed, then compare; run again to go on
    python tools/compare.py CONFIG CONFIG ...            several ways to distil into one student, trained alone once
    python tools/compare.py ADAPTATION_CONFIG            the baseline is the student on the source only
    python tools/compare.py --student DIR ... --distilled DIR ... [--teacher VALUE|DIR]       compare finished runs

--student and --distilled name the runs of adaptations too. A DIR is the work dir of a run, or a folder with seed_0,
seed_1, ... in it. Several variants: --distilled A=DIR B=DIR.
Writes comparison.md, comparison.csv and comparison.png into the work dir.
"""

from __future__ import annotations

import argparse
import os.path as osp
import sys
from pathlib import Path

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))  # also runs from a checkout that is not installed

from mmengine.config import Config, DictAction

from kd_dense.analysis.compare import ADAPTATION, BASELINE, DISTILLATION, Comparison, compare
from kd_dense.analysis.figure import save_figure
from kd_dense.analysis.palette import class_colours
from kd_dense.analysis.record import RunRecord
from kd_dense.analysis.report import print_report, write_report
from kd_dense.analysis.runs import (
    config_of,
    find_runs,
    named_folders,
    teacher_argument,
    teacher_score,
    train_runs,
    train_variants,
    variant_names,
)
from kd_dense.engine import run as engine
from kd_dense.errors import ConfigError, DistillationError, exit_with_sentence

PICTURE = 'comparison.png'


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', nargs='*', help='distillation or adaptation config: train what is missing, then compare')
    add('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2; more seeds, a narrower interval')
    add('--work-dir', help='default: work_dirs/NAME_OF_CONFIG/compare; for several or none work_dirs/compare')
    add('--cfg-options', nargs='+', action=DictAction, help='override config entries: key.inner=value ...')
    add('--student', nargs='+', metavar='DIR', help='runs of the student alone, or on the source only')
    add('--distilled', nargs='+', metavar='DIR', help='distilled or adapted runs; NAME=DIR ... for several variants')
    add('--teacher', metavar='VALUE|DIR', help='score in percent, or folder of a run (default: what runs measured); '
        'of adaptations that of an oracle, trained with labels of the target')  # fmt: skip
    add('--examples', type=int, default=4, metavar='N', help='images in the picture (default: 4; 0: none)')
    args = parser.parse_args(argv)
    if args.config and (args.student or args.distilled):
        parser.error('give either CONFIG, or --student and --distilled')
    if not args.config and not (args.student and args.distilled):
        parser.error('give CONFIG, or both --student and --distilled')
    return args


@exit_with_sentence
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.config:
        cfg, *others = (engine.load_config(path, args.cfg_options) for path in args.config)
        words = ADAPTATION if engine.adapts(cfg) else DISTILLATION
        if others:
            out = Path(args.work_dir or osp.join('work_dirs', 'compare'))
            configs = dict(zip(variant_names(args.config), [cfg, *others], strict=True))
            folders = train_variants(configs, out, args.seeds, engine.train_any, engine.student_alone, words=words)
        else:
            out = Path(args.work_dir or osp.join('work_dirs', Path(args.config[0]).stem, 'compare'))
            folders = train_runs(cfg, out, args.seeds, engine.train_any, words=words)
    else:
        cfg, out = None, Path(args.work_dir or osp.join('work_dirs', 'compare'))
        folders = {BASELINE: find_runs(args.student)}
        folders.update({name: find_runs(dirs) for name, dirs in named_folders(args.distilled).items()})
    runs = {name: [RunRecord.load(folder) for folder in found] for name, found in folders.items()}
    if runs.get(DISTILLATION.variant, runs[BASELINE])[0].name == ADAPTATION.variant:  # runs that were given no name
        for by_name in (folders, runs):
            by_name[ADAPTATION.variant] = by_name.pop(DISTILLATION.variant)
    reference = runs[BASELINE][0]
    if args.teacher:
        teacher = teacher_argument(args.teacher, reference)
    else:
        teacher = teacher_score([f for name, found in folders.items() if name != BASELINE for f in found], reference)

    comparison = compare(runs, teacher)
    print_report(comparison)
    files = [*write_report(comparison, out, PICTURE), save_figure(comparison, out / PICTURE)]
    if args.examples > 0:
        try:
            variant = comparison.variants[0]
            if cfg is None:
                folder = next(f for f in folders[variant.name] if RunRecord.load(f).seed == comparison.seeds[0])
                cfg = engine.load_config(str(config_of(folder, variant.records[0])))
            draw_examples(cfg, comparison, out, args.examples)
        except (ConfigError, DistillationError) as error:
            print(f'the picture has no example images: {error}')
    print('written: ' + ', '.join(map(str, files)))


def draw_examples(cfg: Config, comparison: Comparison, out: Path, count: int) -> None:
    """Draw the picture again, with predictions of the first seed's students and of the teacher, if there is one."""
    checkpoints = {row.name: row.records[0].checkpoint for row in comparison.rows}
    if engine.has_teacher(cfg):
        checkpoints['teacher'] = None
    images = engine.examples(cfg, checkpoints, count)
    title = f'Examples from the validation set (seed {comparison.seeds[0]})'
    save_figure(comparison, out / PICTURE, images, class_colours(cfg), title)


if __name__ == '__main__':
    main()
