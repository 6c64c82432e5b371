"""kd_dense.checkpoint: files load as data only, and are written all or nothing."""

import collections
import datetime
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from kd_dense import checkpoint
from kd_dense.checkpoint import CheckpointError


class CreatesFile:
    """Pickles as a call that makes a file, which is the trace that code was executed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def history():
    buffer = HistoryBuffer()
    for value in (4.0, 2.0, 6.0):
        buffer.update(value, 1)
    return buffer


def rich_checkpoint():
    """One of everything that training checkpoints hold."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator)
    return {
        'state_dict': collections.OrderedDict(weight=weight, view=weight[1:, ::2], bias=torch.nn.Parameter(weight[0])),
        'half': weight.to(torch.bfloat16),
        'sparse': weight.to_sparse(),
        'optimizer': {'state': {0: {'step': torch.tensor(3.0)}}, 'param_groups': [{'lr': 0.1, 'betas': (0.9, 0.999)}]},
        'message_hub': {'log_scalars': {'train/loss': history()}, 'resumed_keys': {'iter': True}},
        'meta': {
            'time': datetime.datetime(2026, 1, 2, 3, 4),
            'cfg': ConfigDict(model=dict(type='A', widths=[1, 2])),
            'best': np.float64(0.25),
            'palette': np.arange(6, dtype=np.uint8).reshape(2, 3),
            'names': np.array(['road', None], dtype=object),
            'size': torch.Size([2, 3]),
            'dtype': torch.float16,
            'device': torch.device('cpu'),
            'set': {1, 2},
            'bytes': b'\x00\xff',
            'complex': 1 + 2j,
            'path': pathlib.PurePosixPath('a/b'),
            'counts': collections.defaultdict(list, a=[1]),
        },
    }


def assert_same(loaded):
    expected = rich_checkpoint()
    for name, tensor in expected['state_dict'].items():
        assert torch.equal(loaded['state_dict'][name], tensor)
    assert loaded['half'].dtype == torch.bfloat16 and torch.equal(loaded['half'], expected['half'])
    assert torch.equal(loaded['sparse'].to_dense(), expected['sparse'].to_dense())
    assert loaded['optimizer'] == expected['optimizer']
    buffer = loaded['message_hub']['log_scalars']['train/loss']
    assert type(buffer) is HistoryBuffer
    assert buffer.statistics('mean', 2) == 4.0 and buffer.current() == 6.0
    meta, expected_meta = loaded['meta'], expected['meta']
    for key in ('palette', 'names'):
        np.testing.assert_array_equal(meta.pop(key), expected_meta.pop(key))
    assert meta == expected_meta
    assert type(meta['cfg']) is ConfigDict and meta['cfg'].model.type == 'A'


@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('protocol', [2, 4, 5])
@pytest.mark.filterwarnings('ignore:Sparse invariant checks')
def test_everything_a_training_checkpoint_holds_round_trips(tmp_path, new_format, protocol):
    path = tmp_path / 'a.pth'
    torch.save(rich_checkpoint(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
    assert_same(checkpoint.load(path))


def test_weights_only_mode_would_not_do(tmp_path):
    """The reason why this module exists; if this fails, torch's own mode may be enough."""
    torch.save({'log': history()}, tmp_path / 'a.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pth', weights_only=True)
    assert checkpoint.load(tmp_path / 'a.pth')['log'].max() == 6.0


@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_a_malicious_file_executes_nothing_and_is_named(tmp_path, new_format):
    path, trace = tmp_path / 'a.pth', tmp_path / 'executed'
    torch.save({'x': CreatesFile(trace)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r'a\.pth names posix\.mkdir.*trusted=True'):
        checkpoint.load(path)
    assert not trace.exists()
    checkpoint.load(path, trusted=True)
    assert trace.exists()  # the file was indeed malicious


@pytest.mark.parametrize(
    'body, named',
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", 'builtins.eval'),
        (b"c__builtin__\neval\n(S'1'\ntR.", 'builtins.eval'),
        (b"cbuiltins\ngetattr\n(cbuiltins\nlist\nS'append'\ntR.", 'builtins.getattr'),
        (b"ccollections\nOrderedDict\n0cbuiltins\ngetattr\n(ccollections\nOrderedDict\nS'x'\ntR.", 'builtins.getattr'),
        (b'\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.', 'torch.hub.load'),
        (b'\x80\x04\x8c\x05torch\x8c\x04load\x93.', 'torch.load'),
        (b'\x80\x04\x8c\x05numpy\x8c\x04load\x93.', 'numpy.load'),
        (b'\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93.', 'torch.storage._load_from_bytes'),
        (
            b'\x80\x04\x8c\x1fmmengine.logging.history_buffer\x8c\x22HistoryBuffer.__init__.__globals__\x93.',
            'builtins.getattr',
        ),
        (b"c_codecs\nencode\n(S'aa'\nS'hex'\ntR.", '_codecs.encode'),
    ],
)
def test_names_that_lead_to_code_are_refused(tmp_path, body, named):
    path = tmp_path / 'a.pth'
    torch.save({'x': 1}, path)
    crafted = tmp_path / 'b.pth'
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(crafted, 'w') as target:
        for item in source.infolist():
            target.writestr(item, body if item.filename.endswith('data.pkl') else source.read(item))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(crafted)
    assert named in str(caught.value) and 'b.pth' in str(caught.value)


def test_a_pickled_model_is_refused_and_loads_when_trusted(tmp_path, caplog):
    torch.save({'model': torch.nn.Linear(2, 1)}, tmp_path / 'a.pt')
    with pytest.raises(CheckpointError, match=r'torch\.nn\.modules\.linear\.Linear'):
        checkpoint.load(tmp_path / 'a.pt')
    loaded = checkpoint.load(tmp_path / 'a.pt', trusted=True)
    assert set(checkpoint.state_dict_of(loaded)) == {'weight', 'bias'}


def test_trusted_says_what_it_means(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoint, 'print_log', lambda text, **_: said.append(text))
    torch.save({'x': 1}, tmp_path / 'a.pth')
    checkpoint.load(tmp_path / 'a.pth')
    assert said == []
    checkpoint.load(tmp_path / 'a.pth', trusted=True)
    assert len(said) == 1 and 'any function' in said[0]


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / 'a.pt'))
    with pytest.raises(CheckpointError, match='TorchScript'):
        checkpoint.load(tmp_path / 'a.pt')


def test_missing_folder_empty_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no checkpoint file .*a\.pth'):
        checkpoint.load(tmp_path / 'a.pth')
    with pytest.raises(IsADirectoryError, match='is a folder'):
        checkpoint.load(tmp_path)
    (tmp_path / 'b.pth').touch()
    with pytest.raises(CheckpointError, match='is empty'):
        checkpoint.load(tmp_path / 'b.pth')
    (tmp_path / 'c.pth').write_text('<html>404: not found</html>')
    with pytest.raises(CheckpointError, match=r'c\.pth could not be loaded as a checkpoint'):
        checkpoint.load(tmp_path / 'c.pth')


@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('kept', [0.02, 0.5, 0.98])
def test_truncated_file(tmp_path, new_format, kept):
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.arange(5000)}, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r'a\.pth (is truncated|could not be loaded)'):
        checkpoint.load(path)


def test_map_location_moves_storages(tmp_path):
    torch.save({'w': torch.zeros(2)}, tmp_path / 'a.pth')
    assert checkpoint.load(tmp_path / 'a.pth', map_location='meta')['w'].device.type == 'meta'


def test_save_round_trips_creates_folders_and_follows_links(tmp_path):
    target = tmp_path / 'new' / 'a.pth'
    checkpoint.save({'w': torch.ones(2)}, target)
    link = tmp_path / 'last.pth'
    link.symlink_to(target)
    checkpoint.save({'w': torch.zeros(2)}, link)
    assert link.is_symlink()
    assert torch.equal(checkpoint.load(target)['w'], torch.zeros(2))
    assert os.listdir(target.parent) == ['a.pth']


def test_a_failure_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    checkpoint.save({'w': torch.ones(2)}, path)

    def write_half_and_die(obj, file):
        file.write(b'PK half a checkpoint')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', write_half_and_die)
    with pytest.raises(OSError, match='disk full'):
        checkpoint.save({'w': torch.zeros(2)}, path)
    assert torch.equal(checkpoint.load(path)['w'], torch.ones(2))
    assert os.listdir(tmp_path) == ['a.pth']


def test_a_kill_while_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / 'a.pth'
    checkpoint.save({'w': torch.ones(2)}, path)
    child = os.fork()
    if child == 0:  # os._exit runs no cleanup, like a kill
        with checkpoint.atomic_write(path) as file:
            file.write(b'PK half a checkpoint')
            os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(checkpoint.load(path)['w'], torch.ones(2))


def test_state_dict_of_the_usual_layouts():
    weights = {'a.weight': torch.ones(1), 'b.bias': torch.zeros(1)}
    wrapped = {'module.' + name: tensor for name, tensor in weights.items()}
    for layout in (weights, wrapped, {'state_dict': wrapped, 'meta': {}}, {'model': weights, 'epoch': 3}):
        assert checkpoint.state_dict_of(layout) == weights
    # A child that is really called "module" keeps its name, and so does a weight called "model".
    assert set(checkpoint.state_dict_of({'module.w': torch.ones(1), 'w': torch.ones(1)})) == {'module.w', 'w'}
    assert set(checkpoint.state_dict_of({'model': torch.ones(1)})) == {'model'}


def test_state_dict_of_something_else_says_what_it_found():
    with pytest.raises(CheckpointError, match=r"'state_dict', 'model'.*found: weights, epoch"):
        checkpoint.state_dict_of({'weights': {'w': torch.ones(1)}, 'epoch': 3})
    with pytest.raises(CheckpointError, match='found: list'):
        checkpoint.state_dict_of([1])
