#!/usr/bin/env python
"""Measure what a training step with distillation costs, on made-up images: no data set is needed.

    python tools/benchmark.py CONFIG...
    python tools/benchmark.py CONFIG --random-teacher                    without the teacher's file
    python tools/benchmark.py CONFIG --against native                    a YOLO config next to Ultralytics' own
    python tools/benchmark.py CONFIG --variant CWD "neck=dict(type='CWD', taps='neck')" \
        --variant NFD "neck=dict(type='NFD', taps='neck')"               several methods on one pair of models

Prints a table; with --out FOLDER it is written as benchmark.md and benchmark.json too. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import os.path as osp
import sys

# Before torch is imported: the profiler warns that it does not know of memory from before, which is not asked for.
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))  # also runs from a checkout that is not installed

import torch
from mmengine.config import Config, DictAction
from tqdm import tqdm

from kd_dense.analysis.benchmark import Bench, Options, Variant, benchmark, read_variant
from kd_dense.analysis.benchmark.bench import RIVALS
from kd_dense.analysis.benchmark.measure import WARMUP
from kd_dense.analysis.benchmark.memory import keep_freed_memory
from kd_dense.analysis.benchmark.report import markdown, write
from kd_dense.analysis.doctor.environment import environment
from kd_dense.analysis.doctor.quiet import quiet
from kd_dense.engine.run import is_yolo, load_config
from kd_dense.errors import ConfigError, exit_with_sentence


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', nargs='+', help='distillation config')
    add('--against', action='append', choices=RIVALS, default=[], help='measure this too; may be repeated')
    add('--variant', action='append', nargs='+', default=[], metavar=('NAME', 'DISTILLER=dict(...)'),
        help='distillers in place of those of the config; may be repeated')  # fmt: skip
    add('--cfg-options', nargs='+', action=DictAction, help='override config entries: key.inner=value ...')
    add('--random-teacher', action='store_true', help='do not read the weights of the teacher')
    add('--iters', type=_positive, default=10, metavar='N', help='repetitions (default: 10)')
    add(
        '--image-size',
        type=_positive,
        nargs='+',
        metavar='N',
        help='height and width, or one number (default: that of the training)',
    )
    add('--batch', type=_positive, metavar='N', help='images in a batch (default: as in the config)')
    add('--boxes', type=_positive, default=7, metavar='N', help='objects in each image (default: 7, as in COCO)')
    add('--threads', type=_positive, metavar='N', help='threads of torch on the CPU (default: what it chooses)')
    add('--out', metavar='FOLDER', help='also write benchmark.md and benchmark.json there')
    add('--verbose', action='store_true', help='show what the toolbox logs')
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{number} is not positive')
    return number


def bench_of(cfg: Config, options: Options) -> Bench:
    """The config, in the toolbox that it is for."""
    if is_yolo(cfg):
        from kd_dense.yolo.benchmark import YoloBench as ToolboxBench
    else:
        from kd_dense.engine.benchmark import MMBench as ToolboxBench
    return ToolboxBench(cfg, options)


def check_rivals(benches: list[Bench], against: list[str]) -> None:
    """Has every rival a config that it can train?"""
    for rival in against:
        if not any(rival in bench.rivals for bench in benches):
            known = dict.fromkeys(name for bench in benches for name in bench.rivals)
            raise ConfigError(f'--against {rival}: can train none of these configs; what can is {", ".join(known)}')


@exit_with_sentence
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.image_size and len(args.image_size) > 2:
        raise ConfigError('--image-size: give height and width, or one number for a square')
    size = tuple(args.image_size * 2)[:2] if args.image_size else None
    options = Options(size, args.batch, args.boxes, args.random_teacher)
    variants = [read_variant(words) for words in args.variant] or [Variant('')]
    benches = [bench_of(load_config(path, args.cfg_options), options) for path in args.config]
    check_rivals(benches, args.against)
    machine = environment() | {'load': os.getloadavg()[0]}  # before this program adds to it
    rows = []
    with tqdm(total=len(benches) * len(variants) * (WARMUP + args.iters), unit='round', file=sys.stderr) as bar:
        for bench in benches:
            bar.set_description(bench.name)
            rows += benchmark(bench, variants, args.against, args.iters, quiet(not args.verbose), bar.update)
    print(markdown(rows, machine, args.against))
    if args.out:
        print('written: ' + ', '.join(map(str, write(rows, machine, args.out, args.against))))


if __name__ == '__main__':
    main()
