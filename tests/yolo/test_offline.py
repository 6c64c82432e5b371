"""Nothing needs the network."""

import subprocess
import sys

import pytest
import torch

from kd_dense.yolo.offline import amp_works, find_font
from tests.yolo.helpers import build

RUN = """
import os, socket, sys
os.environ.pop('YOLO_OFFLINE', None)

def refuse(*args, **kwargs):
    print('NETWORK', args)
    raise OSError('there is no network')

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import kd_dense.yolo
from kd_dense.yolo import train
print('DONE', train(sys.argv[1], sys.argv[2]).checkpoint)
"""


def test_a_run_with_plots_does_not_ask_the_network(write_config, tmp_path):
    from tests.yolo.helpers import FAST

    config = write_config(train={**FAST, 'plots': True})
    done = subprocess.run(
        [sys.executable, '-c', RUN, str(config), str(tmp_path / 'run')], capture_output=True, text=True
    )
    assert 'DONE' in done.stdout, done.stderr[-2000:]
    assert 'NETWORK' not in done.stdout
    assert (tmp_path / 'run' / 'results.png').exists()
    assert (tmp_path / 'run' / 'train_batch0.jpg').exists()


def test_a_font_is_found():
    for name in ('Arial.ttf', 'Arial.Unicode.ttf'):
        assert find_font(name).endswith('.ttf')


def test_mixed_precision_is_not_tried_on_a_cpu():
    assert amp_works(build('yolo11')) is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('task', ['', '-seg'])
def test_mixed_precision_is_tried_on_the_model_itself(task):
    model = build('yolo26', task=task).cuda()
    assert amp_works(model) is True
    assert model.training
    next(model.parameters()).data.fill_(float('nan'))
    assert amp_works(model) is False
