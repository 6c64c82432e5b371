"""kd_dense.compat: what is broken between the installed packages works after `import kd_dense`."""

import os
import subprocess
import sys
from pathlib import Path

import mmengine
import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import DefaultSampler
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from kd_dense import compat
from kd_dense.checkpoint import CheckpointError

FAMILIES = [
    ('mmseg', 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py', 'EncoderDecoder'),
    ('mmdet', 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 'RetinaNet'),
]


COLLATE = dict(type='default_collate')


class Regression(BaseModel):
    """The smallest model that a Runner trains, with a BatchNorm so that there are buffers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))

    def forward(self, x, y, mode='tensor'):
        predicted = self.layers(x)
        return {'loss': (predicted - y).square().mean()} if mode == 'loss' else predicted


class DiesBeforeEpoch(Hook):
    def __init__(self, epoch):
        self.epoch = epoch

    def before_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            raise RuntimeError('killed')


class Points(torch.utils.data.Dataset):
    """16 seeded points of a linear function."""

    def __init__(self):
        self.x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {'x': self.x[index], 'y': self.x[index].sum(0, keepdim=True)}


def make_runner(work_dir, epochs=4, dies=None, **options):
    data = Points()
    torch.manual_seed(0)
    return Runner(
        model=Regression(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=data, sampler=DefaultSampler(data, seed=3), batch_size=4, num_workers=0, collate_fn=COLLATE
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=4),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1), logger=dict(type='LoggerHook', interval=2)
        ),
        custom_hooks=[dict(type='EMAHook', momentum=0.1), DiesBeforeEpoch(dies)],
        randomness=dict(seed=0),
        log_level='ERROR',
        default_scope='mmengine',
        experiment_name=f'{work_dir.name}-{dies}',
        **options,
    )


def parameters(runner):
    return {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}


def test_resumed_run_ends_like_an_uninterrupted_one(tmp_path):
    whole = make_runner(tmp_path / 'whole')
    whole.train()

    with pytest.raises(RuntimeError, match='killed'):
        make_runner(tmp_path / 'parts', dies=2).train()
    resumed = make_runner(tmp_path / 'parts', resume=True)
    resumed.train()

    assert resumed.epoch == 4 and resumed.iter == whole.iter == 16
    expected, found = parameters(whole), parameters(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    # The log history continues too: it lies in the checkpoint as HistoryBuffer objects.
    assert len(resumed.message_hub.get_scalar('train/loss').data[0]) == 16


def test_load_from_own_checkpoint(tmp_path):
    make_runner(tmp_path / 'first', epochs=1).train()
    file = tmp_path / 'first' / 'epoch_1.pth'
    saved = torch.load(file, weights_only=False)

    second = make_runner(tmp_path / 'second', epochs=1, load_from=str(file))
    second.call_hook('before_run')  # EMAHook makes its copy here
    second.load_or_resume()
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, saved['state_dict'][name])

    model = Regression()
    load_checkpoint(model, str(file), strict=True)
    assert torch.equal(model.layers[0].weight, saved['state_dict']['layers.0.weight'])


def test_mmengine_loads_files_as_data_only(tmp_path):
    torch.save({'model': torch.nn.Linear(1, 1)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='Linear'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), map_location='cpu')


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / 'a.pth'
    LocalBackend().put(b'old', file)
    with pytest.raises(TypeError):  # fails after the file is opened
        LocalBackend().put('text, not bytes', file)
    assert file.read_bytes() == b'old' and os.listdir(tmp_path) == ['a.pth']


@pytest.mark.parametrize('module, path, model', FAMILIES)
def test_base_and_get_config_find_the_toolbox(module, path, model, tmp_path):
    pytest.importorskip(module)
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = ['{path}']\nmodel = dict(test_cfg=dict(added=1))\n")
    assert Config.fromfile(config).model.type == model

    from mmengine.hub import get_config

    loaded = get_config(path)
    assert loaded.model.type == model
    # The text that MMEngine logs and keeps in checkpoints can be read back.
    (tmp_path / 'dumped.py').write_text(loaded.pretty_text)
    assert Config.fromfile(tmp_path / 'dumped.py').model == loaded.model


def test_forks_are_found_under_their_own_distribution_names(monkeypatch):
    """As with onedl-mmsegmentation installed: the module mmseg, but no distribution mmsegmentation."""
    real = compat.importlib.metadata.distribution

    def distribution(name):
        if name in ('mmsegmentation', 'mmdet'):
            raise compat.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(compat.importlib.metadata, 'distribution', distribution)
    owners = {'mmseg': ['onedl-mmsegmentation'], 'mmdet': ['onedl-mmdetection']}
    monkeypatch.setattr(compat.importlib.metadata, 'packages_distributions', lambda: owners)
    monkeypatch.setattr(compat.importlib.util, 'find_spec', lambda name: name in owners or None)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    monkeypatch.setitem(MODULE2PACKAGE, 'mmdet', 'mmdet')
    before = dict(MODULE2PACKAGE)
    compat._find_forked_packages()
    changed = {module: package for module, package in MODULE2PACKAGE.items() if package != before[module]}
    assert changed == {'mmseg': 'onedl-mmsegmentation', 'mmdet': 'onedl-mmdetection'}


def test_nothing_runs_pip(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError(f'a command was run: {args}')

    monkeypatch.setattr(subprocess, 'check_call', forbidden)
    monkeypatch.setattr(subprocess, 'Popen', forbidden)
    from mmengine.hub import get_config

    with pytest.raises(ModuleNotFoundError, match='mmpose is not installed'):
        get_config('mmpose::some/config.py')
    with pytest.raises(ModuleNotFoundError, match='not_there is not installed'):
        mmengine.utils.install_package('not_there')
    mmengine.utils.install_package('torch')  # installed: nothing to do
    assert os.environ['YOLO_AUTOINSTALL'] == 'false'


def test_apply_is_idempotent():
    schemes, put = dict(CheckpointLoader._schemes), LocalBackend.put
    compat.apply()
    assert CheckpointLoader._schemes == schemes and LocalBackend.put is put


def test_mmengine_alone_is_enough():
    """With the toolboxes hidden, apply() still works."""
    code = (
        'import sys\n'
        'for name in ("mmcv", "mmdet", "mmseg", "ultralytics"): sys.modules[name] = None\n'
        'from importlib.util import module_from_spec, spec_from_file_location\n'
        'import types\n'
        'package = types.ModuleType("kd_dense"); package.__path__ = [sys.argv[1]]; sys.modules["kd_dense"] = package\n'
        'from kd_dense import compat\n'
        'compat.apply()\n'
        'from mmengine.runner.checkpoint import CheckpointLoader\n'
        'print(CheckpointLoader._schemes[""].__module__)\n'
    )
    folder = str(Path(compat.__file__).parent)
    done = subprocess.run([sys.executable, '-c', code, folder], capture_output=True, text=True)
    assert done.stdout.strip() == 'kd_dense.compat', done.stderr
