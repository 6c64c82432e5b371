#!/usr/bin/env python
"""Run the teacher of a config once, over a bank of augmented views of the training set, and keep what its taps give.

    python tools/cache_teacher.py CONFIG
    python tools/cache_teacher.py CONFIG --views 8 --top-k 5                  # few class logits of a segmenter
    python tools/cache_teacher.py CONFIG --views 8 --anchors 300 --top-k 5    # and of a detector with a sigmoid head

For a pre-training (docs/pretraining.md) the teacher is a classifier, of which the 100 largest probabilities are kept.

Then train without the teacher in memory: teacher=dict(..., cache='FOLDER') in the config. The command goes on where an
earlier one ended, and writes anew what was damaged. See docs/cache.md.
"""

from __future__ import annotations

import argparse
import os.path as osp
import sys

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))  # also runs from a checkout that is not installed

from mmengine.config import DictAction

from kd_dense.cache import cache_of
from kd_dense.cache.write import WriteOptions, write_cache
from kd_dense.engine.run import load_config
from kd_dense.errors import exit_with_sentence


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, WriteOptions()
    add('config', help='distillation config')
    add('--cache', metavar='FOLDER', help='where to (default: teacher.cache of the config, or work_dirs/NAME/cache)')
    add('--views', type=int, default=default.views, metavar='V', help='augmented versions of each image (default: 4)')
    add('--seed', type=int, default=default.seed, help='of the views (default: 0)')
    add('--top-k', type=int, metavar='K', help='keep K classes at each position (default: all; of a classifier 100)')
    add('--anchors', type=int, metavar='M', help='of a dense sigmoid head keep M anchors of an image (default: all)')
    add('--store', choices=('fp16', 'int8'), default=default.store, help='how all else is kept (default: fp16)')
    add('--max-gb', type=float, default=default.max_bytes / 1e9, metavar='GB', help='largest size (default: 100)')
    add('--shard-mb', type=float, default=256, metavar='MB', help='size of a file (default: 256)')
    add('--batch-size', type=int, help="images at once (default: the training's)")
    add('--workers', type=int, help="processes for the pipeline (default: the training's)")
    add('--cfg-options', nargs='+', action=DictAction, help='override config entries: key.inner=value ...')
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    name = osp.splitext(osp.basename(args.config))[0]
    folder = args.cache or cache_of(cfg) or osp.join('work_dirs', name, 'cache')
    options = WriteOptions(
        views=args.views,
        seed=args.seed,
        top_k=args.top_k,
        anchors=args.anchors,
        store=args.store,
        max_bytes=int(args.max_gb * 1e9),
        shard_bytes=int(args.shard_mb * 1e6),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    manifest = write_cache(cfg, folder, options)
    size = sum(manifest.shard_bytes) / 1e9
    print(f'{manifest.records} views, {size:.3g} GB in {manifest.shards} files; teacher=dict(..., cache={folder!r})')


if __name__ == '__main__':
    main()
