"""Errors of the toolboxes and of the machine, in the words of the person who started the run."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from kd_dense.errors import ConfigError, DistillationError, Interrupted
from kd_dense.stopping import name_of, requested

#: What no writer can do anything about -> what to tell.
_NO_ROOM = {
    errno.ENOSPC: 'the disk is full',
    errno.EDQUOT: 'the disk quota is used up',
    errno.EFBIG: 'the limit for the size of a file is reached',
}
_WORKER_ENDED = r'DataLoader worker .*(?:is killed by signal: (\w+ ?\w*)|exited unexpectedly)'
#: Message of a toolbox or of PyTorch, as a pattern -> our sentence. Groups of the pattern fill the braces.
_SENTENCES = {
    r'Expected more than 1 value per channel when training, got input size (.*)': (
        'train_dataloader.batch_size (YOLO: train.batch): a batch norm of the student sees one value per channel '
        '({}), of which it can not take a variance; use batches of two or more on each GPU and drop_last=True, larger '
        'images, or a norm_cfg without batch statistics'
    ),
    r'Cannot find valid image after (\d+)': (
        'train_dataloader.dataset.pipeline: it returned None for {} images in a row; check what its transforms filter '
        'out, and the images'
    ),
    r'Image Not Found (.+)': (
        'data: the image {} is missing or can not be decoded; restore it, or remove it and its label file'
    ),
    r'Error loading data from (.+)': 'data: there are no images in {}; put them there, or give another data YAML',
    r'No labels found in (\S+?)\.cache': (
        'data: no image has a label file in {}; put the labels there, or give another data YAML'
    ),
    r'No valid images found in .+\.\s+(.*)': 'data: none of the images can be used: {}',
    _WORKER_ENDED: (
        'train_dataloader.num_workers (YOLO: train.workers): a worker process was killed ({}), most often for want of '
        'memory; use fewer workers or smaller batches, then go on with --resume'
    ),
}


@contextmanager
def as_sentences(work_dir: str | os.PathLike) -> Iterator[None]:
    """Turn failures that are not ours, but that a user can do something about, into one sentence.

    Raises:
        ConfigError: images or settings that can not work.
        DistillationError: there was no room to write.
        Interrupted: a signal that asked to stop has ended the worker processes too, so that no batch comes any more.
    """
    try:
        yield
    except (ConfigError, DistillationError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            name = error.filename or work_dir
            raise DistillationError(
                f'work_dir: {name} can not be written, {_NO_ROOM[error.errno]}; the checkpoints that are there are '
                'complete, so make room and go on with --resume'
            ) from error
        number = requested()
        if number is not None and re.search(_WORKER_ENDED, str(error)):
            raise Interrupted(
                f'{name_of(number)} ended the worker processes of the data loader too, so nothing could be saved; go '
                'on from the last checkpoint with --resume',
                number,
            ) from error
        for pattern, sentence in _SENTENCES.items():
            if found := re.search(pattern, str(error)):
                details = (re.sub(r'\s+', ' ', group).strip(' .') for group in found.groups('no signal'))
                raise ConfigError(sentence.format(*details)) from error
        raise
