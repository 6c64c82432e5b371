"""What README.md and docs/user_guide.md show is executed here, in the order in which a reader meets it.

All blocks run in one sandbox, a folder that stands for a clone with the reader's data and teachers in it. Commands and
programs run as they are written; what is replaced is small and listed here:

* :data:`SUBSTITUTES`: stock configs and long schedules in Python blocks become tiny ones;
* the configs of this repository that a command names are shortened to a few iterations (:meth:`Sandbox.shorten`);
* checkpoints and data sets that the documents name are tiny ones at the same paths (:func:`sandbox`);
* ``make`` and ``tools/demo.py`` are not run: :data:`HANDLERS` says how each is checked instead, and what runs it; the
  command for several GPUs runs in a slow test;
* the doctor may find that the tiny teachers know nothing, because they do not.

A command without a handler, an unknown flag, a path or a config that does not exist: each fails a test.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kd_dense import DISTILLERS, Distillation
from kd_dense.data.coco_to_yolo import convert
from kd_dense.data.scene_drawing import CLASSES
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent
DOCUMENTS = ('README.md', 'docs/user_guide.md')
TOOLS = (
    'train',
    'test',
    'doctor',
    'benchmark',
    'export',
    'compare',
    'demo',
    'make_scenes',
    'setup_env',
    'dataset_converters/coco2yolo',
)
TASKS = ('segmentation', 'detection', 'yolo')

SUBSTITUTES = {
    'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py': 'tiny/segmentation_student.py',
    'mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py': 'tiny/segmentation_teacher.py',
    'mmdet::gfl/gfl_r50_fpn_1x_coco.py': 'tiny/detection_student.py',
    'mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py': 'tiny/detection_teacher.py',
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py': 'tiny/detection_teacher.py',
    'epochs=100, imgsz=640, batch=64': (
        "epochs=1, imgsz=64, batch=4, nbs=4, workers=0, device='cpu', plots=False, optimizer='SGD', lr0=0.01, "
        'warmup_epochs=0'
    ),
}


# -- what the documents say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: ``language`` is 'bash', 'python' or 'text'."""

    document: str
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that a Python block stands for, when its first line names one (``# my_config.py``)."""
        found = re.match(r'# (\S+\.py)\n', self.text) if self.language == 'python' else None
        return found.group(1) if found else None

    def commands(self) -> list[list[str]]:
        """The words of every command of a bash block."""
        lines = self.text.replace('\\\n', ' ').splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]

    def __str__(self) -> str:
        return f'{Path(self.document).stem}:{self.line}'


def read_blocks() -> list[Block]:
    blocks = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding='utf-8')
        for found in re.finditer(r'^```(.*)\n([\s\S]*?)^```$', text, re.MULTILINE):
            blocks.append(Block(document, text[: found.start()].count('\n') + 1, found.group(1), found.group(2)))
    return blocks


def prose(document: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r'^```[\s\S]*?^```$', '', (ROOT / document).read_text(encoding='utf-8'), flags=re.MULTILINE)


BLOCKS = read_blocks()
EXECUTED = [block for block in BLOCKS if block.language != 'text']


# -- the sandbox -------------------------------------------------------------------------------------------------------


class Sandbox:
    """The reader's clone; every path in a block is relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mentioned = '\n'.join((ROOT / document).read_text(encoding='utf-8') for document in DOCUMENTS)

    def execute(self, block: Block) -> None:
        if block.language == 'bash':
            for words in block.commands():
                self.command(words)
            return
        text = block.text
        for original, substitute in SUBSTITUTES.items():
            text = text.replace(original, substitute)
        assert 'epochs=100' not in text, f'{block}: would train for 100 epochs; SUBSTITUTES no longer matches it'
        if block.file is None:
            exec(compile(text, str(block), 'exec'), {'__name__': '__main__'})
            return
        (self.root / block.file).write_text(text)
        # A config is read at once, and its model built; one that imports a module of the reader needs a tool for that.
        if re.search(r'^(_base_|student) = ', text, re.MULTILINE) and 'my_distiller' not in text:
            model = Config.fromfile(block.file).get('model', {})
            if model.get('type') == 'kd_dense.Distillation':
                Distillation(**{k: v for k, v in model.items() if k != 'type'})

    def command(self, words: list[str]) -> None:
        handler = next((run for pattern, run in HANDLERS.items() if re.match(pattern, ' '.join(words))), None)
        if handler is None:
            raise AssertionError(f'no handler in tests/test_readme.py covers the command: {" ".join(words)}')
        handler(self, words)

    def shorten(self, config: str) -> None:
        """Put a config of the repository at the same path in the sandbox, cut down to a few iterations."""
        if (self.root / config).exists():
            return
        cfg = Config.fromfile(ROOT / config)
        cfg.train_cfg.val_interval = 1
        for name in ('max_iters', 'max_epochs'):
            if name in cfg.train_cfg:
                cfg.train_cfg[name] = 1
        cfg.train_dataloader.batch_size = 2
        cfg.default_hooks.checkpoint.interval = 1
        (self.root / config).parent.mkdir(parents=True, exist_ok=True)
        cfg.dump(self.root / config)

    def keep_named_checkpoints(self, config: str) -> None:
        """Copy the last checkpoint to the names that the documents and configs give to that of a whole run."""
        work_dir = f'work_dirs/{Path(config).stem}'
        last = self.root / work_dir / 'last_checkpoint'
        configs = '\n'.join(path.read_text() for path in (ROOT / 'configs').rglob('*.py'))
        for name in set(re.findall(rf'{re.escape(work_dir)}/((?:iter|epoch)_\d+\.pth)', self.mentioned + configs)):
            if last.is_file() and not (self.root / work_dir / name).exists():
                shutil.copy(last.read_text(), self.root / work_dir / name)


def run_tool(sandbox: Sandbox, words: list[str]) -> None:
    """``python tools/...``: run in this process, as written."""
    tool, arguments = words[1], words[2:]
    for argument in arguments:
        if argument.startswith('configs/'):
            sandbox.shorten(argument)
    call_tool(tool, arguments)
    if tool == 'tools/train.py':
        sandbox.keep_named_checkpoints(arguments[0])


def call_tool(tool: str, arguments: list[str]) -> None:
    """Run a tool as a program; whatever it says on stderr becomes the message of a failure."""
    before, errors = (sys.argv, list(sys.path), Path.cwd()), io.StringIO()
    sys.argv = [tool, *arguments]
    try:
        with contextlib.redirect_stderr(errors):
            runpy.run_path(str(ROOT / tool), run_name='__main__')
    except SystemExit as end:
        assert not end.code, f'{" ".join(sys.argv)}: {errors.getvalue()[-2000:]}'
    finally:
        sys.argv, sys.path[:] = before[:2]
        os.chdir(before[2])


class Parsed(Exception):
    """Ends a tool after it has read its arguments."""


def parser_of(tool: str, arguments: list[str]) -> argparse.ArgumentParser:
    """Let a tool read its arguments, go no further, and return its parser; a wrong argument is a failure."""
    found = []
    original = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        found.append(self)
        original(self, *args, **kwargs)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse)
        call_tool(tool, arguments)
    return found[0]


def check_make(sandbox: Sandbox, words: list[str]) -> None:
    """Ask make what it would do, and let the tools in it read their arguments. CI runs ``make test``."""
    plan = subprocess.run(['make', '-n', '-C', str(ROOT), *words[1:]], capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    for variable in (word.partition('=')[0] for word in words[2:]):
        assert re.search(rf'^{variable} \?=', (ROOT / 'Makefile').read_text(), re.MULTILINE), variable
    tools = re.findall(r'(tools/\w+\.py)(.*)', plan.stdout.replace('\\\n', ' '))
    assert tools
    for tool, arguments in tools:
        parser_of(tool, shlex.split(arguments))


def check_demo(sandbox: Sandbox, words: list[str]) -> None:
    """``make demo`` runs it; here it reads its arguments."""
    parser_of(words[1], words[2:])


def run_doctor(sandbox: Sandbox, words: list[str]) -> None:
    """Run in this process, as written. The teachers of the sandbox are random, and that alone may it find wrong."""
    report = sandbox.root / 'doctor.json'
    try:
        call_tool(words[1], [*words[2:], '--json', str(report)])
    except AssertionError:
        checks = json.loads(report.read_text())['checks']
        failed = [name for name, check in checks.items() if check['status'] == 'failed']
        assert failed == ['scores']


def check_several_gpus(sandbox: Sandbox, words: list[str]) -> None:
    """Let the script print the torchrun command, and let torchrun and ``tools/train.py`` read theirs.

    :func:`test_several_processes` runs it.
    """
    from torch.distributed.run import get_args_parser

    script = [str(ROOT / words[0]), *words[1:]]
    environment = {**os.environ, 'PYTHON': 'echo'}
    printed = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.split()
    module, arguments = printed[:2], printed[2:]
    assert module == ['-m', 'torch.distributed.run']
    launch = get_args_parser().parse_args(arguments)
    assert launch.nproc_per_node == words[2]
    assert Path(launch.training_script).resolve() == ROOT / 'tools' / 'train.py'
    assert (sandbox.root / words[1]).is_file()
    parser_of('tools/train.py', launch.training_script_args)


def run_in_shell(sandbox: Sandbox, words: list[str]) -> None:
    """Run by bash, as written."""
    subprocess.run(['bash', '-ec', shlex.join(words)], cwd=sandbox.root, check=True)


def run_activate(sandbox: Sandbox, words: list[str]) -> None:
    """The environment in which these tests run stands for the one that set-up made."""
    if not (Path(sys.prefix) / 'bin' / 'activate').is_file():
        return  # the tests run in an environment that is no venv
    (sandbox.root / '.venv').symlink_to(sys.prefix)
    subprocess.run(['bash', '-ec', f'{shlex.join(words)} && python -c "import torch"'], cwd=sandbox.root, check=True)


def run_export(sandbox: Sandbox, words: list[str]) -> None:
    """Into this process; the fixture takes it out again."""
    name, _, value = words[1].partition('=')
    os.environ[name] = value


HANDLERS: dict[str, Callable[[Sandbox, list[str]], None]] = {
    r'make ': check_make,
    r'source \.venv/bin/activate$': run_activate,
    r'export KD_DENSE_\w+=': run_export,
    r'(mkdir|ln) ': run_in_shell,
    r'python tools/demo\.py ': check_demo,
    r'python tools/doctor\.py ': run_doctor,
    r'python tools/': run_tool,
    r'tools/dist_train\.sh ': check_several_gpus,
}


def write_tiny_configs(root: Path) -> None:
    """What :data:`SUBSTITUTES` names, and the teachers that the documents name."""
    (root / 'tiny').mkdir()
    (root / 'checkpoints').mkdir()
    models = {
        'segmentation_student': tiny.segmentor(4),
        'segmentation_teacher': tiny.segmentor(8),
        'detection_student': tiny.detector('GFL', 4),
        'detection_teacher': tiny.detector('GFL', 8),
    }
    for name, model in models.items():
        if name.startswith('segmentation'):
            cfg = tiny.segmentation_run(model, Path('data/cityscapes'), iterations=2, interval=1)
        else:
            cfg = tiny.detection_run(model, Path('data/coco'), epochs=1)
            for loader, split in (('train', 'train'), ('val', 'val'), ('test', 'val')):
                cfg[f'{loader}_dataloader'].dataset.ann_file = f'annotations/instances_{split}2017.json'
                cfg[f'{loader}_dataloader'].dataset.data_prefix = dict(img=f'{split}2017/')
            for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
                evaluator.ann_file = 'data/coco/annotations/instances_val2017.json'
        cfg.dump(root / 'tiny' / f'{name}.py')
    teachers = root / 'checkpoints'
    name = 'segformer_mit-b2_8x1_1024x1024_160k_cityscapes_20211207_134205-6096669a.pth'
    tiny.saved(models['segmentation_teacher'], teachers / name, CLASSES)
    for name in (
        'gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth',
        'dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth',
    ):
        tiny.saved(models['detection_teacher'], teachers / name, CLASSES[1:])


def write_tiny_yolo(root: Path) -> None:
    """Model YAMLs in the working directory come before those of Ultralytics."""
    from ultralytics.utils import YAML

    from tests.yolo.helpers import build, save_model, small_yaml

    for name in ('yolo26.yaml', 'yolo26n.yaml'):
        YAML.save(root / name, small_yaml('yolo26', 0.125))
    save_model(build('yolo26', 0.1875, names=CLASSES[1:], seed=1), root / 'checkpoints' / 'yolo26s.pt')


def write_tiny_data(root: Path) -> None:
    """Generated scenes under the names of the real data sets, beside the clone as in the documents."""
    datasets = root.parent / 'datasets'
    scenes = tiny.scenes(datasets / 'cityscapes')
    (root / 'data' / 'coco' / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        source = scenes / 'annotations' / f'instances_{split}.json'
        convert(scenes / 'images' / split, source, datasets / 'coco_yolo', split, progress=False)
        shutil.copy(source, root / 'data' / 'coco' / 'annotations' / f'instances_{split}2017.json')
        (root / 'data' / 'coco' / f'{split}2017').symlink_to(scenes / 'images' / split)
        (datasets / 'camvid' / 'images' / split).mkdir(parents=True)
        (datasets / 'camvid' / 'labels' / split).mkdir(parents=True)
        for image in (scenes / 'leftImg8bit' / split / 'scene').iterdir():
            name = image.name.removesuffix('_leftImg8bit.png')
            write_as_jpg(image, datasets / 'camvid' / 'images' / split / f'{name}.jpg')
            labels = scenes / 'gtFine' / split / 'scene' / f'{name}_gtFine_labelTrainIds.png'
            shutil.copy(labels, datasets / 'camvid' / 'labels' / split / f'{name}.png')
        (datasets / 'bccd' / split).mkdir(parents=True)
        for image in (scenes / 'images' / split).iterdir():
            shutil.copy(image, datasets / 'bccd' / split)
        (datasets / 'bccd' / 'annotations').mkdir(exist_ok=True)
        text = source.read_text()
        for old, new in zip(CLASSES[1:], ('RBC', 'WBC', 'Platelets'), strict=False):
            text = text.replace(f'"{old}"', f'"{new}"')
        (datasets / 'bccd' / 'annotations' / f'{split}.json').write_text(text)


def write_as_jpg(source: Path, target: Path) -> None:
    import cv2

    cv2.imwrite(str(target), cv2.imread(str(source)))


@pytest.fixture(scope='module')
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    # Read when Ultralytics is imported: its settings go to a folder of their own, not to the user's.
    os.environ.setdefault('YOLO_CONFIG_DIR', str(tmp_path_factory.mktemp('settings')))
    pytest.importorskip('ultralytics')
    import kd_dense.yolo  # noqa: F401  (nothing from the network)

    root = tmp_path_factory.mktemp('reader') / 'clone'
    root.mkdir()
    write_tiny_configs(root)
    write_tiny_data(root)
    with pytest.MonkeyPatch.context() as patch:
        for name in ('KD_DENSE_CAMVID', 'KD_DENSE_BCCD'):
            patch.setenv(name, '')  # noted for the end, whatever an export in a block does
            patch.delenv(name)
        patch.chdir(root)
        # MMEngine formats the config six times per run, in seconds each: most of the time of these runs.
        for place in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):  # the original, and the fork
            patch.setattr(f'{place}.FormatCode', lambda text, **_: (text, True), raising=False)
        patch.syspath_prepend(root)  # the tools put the root of the clone there
        write_tiny_yolo(root)
        yield Sandbox(root)


@pytest.fixture(scope='module')
def outcomes(sandbox: Sandbox) -> dict[Block, BaseException | None]:
    """Every block is executed once, in order; what it raised is kept for its own test."""
    from ultralytics.utils import SETTINGS

    found: dict[Block, BaseException | None] = {}
    before = SETTINGS['runs_dir']
    dict.__setitem__(SETTINGS, 'runs_dir', str(sandbox.root / 'runs'))  # in memory only
    try:
        for block in EXECUTED:
            try:
                sandbox.execute(block)
                found[block] = None
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                found[block] = error
    finally:
        dict.__setitem__(SETTINGS, 'runs_dir', before)
        DISTILLERS.module_dict.pop('AttentionMap', None)
        sys.modules.pop('my_distiller', None)
    return found


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('block', EXECUTED, ids=str)
def test_block_runs(block, outcomes):
    if outcomes[block] is not None:
        raise outcomes[block]


def test_every_block_says_what_it_is():
    assert [str(block) for block in BLOCKS if block.language not in ('bash', 'python', 'text')] == []


def test_the_example_distiller_trains(outcomes, sandbox):
    (log,) = (sandbox.root / 'work_dirs' / 'my_method').glob('*/vis_data/scalars.json')
    first = json.loads(log.read_text().splitlines()[0])
    assert 0 < first['kd.attention.loss'] <= 20  # 0..2, times the weight of 10


def test_the_example_distiller_computes_what_it_says(outcomes):
    """Attention (1, 0) against (0, 1) is sqrt(2) apart; equal up to a factor it is 0; a masked cell does not count."""
    from kd_dense.context import Context

    (block,) = (b for b in BLOCKS if b.file == 'my_distiller.py')
    namespace: dict = {}
    try:
        exec(block.text, namespace)
    finally:
        DISTILLERS.module_dict.pop('AttentionMap', None)
    method = namespace['AttentionMap'](taps='neck')
    one, two = torch.zeros(1, 2, 1, 2), torch.zeros(1, 3, 1, 2)
    one[0, 0, 0, 0], two[0, 1, 0, 1] = 3.0, 5.0

    def loss(s, t, **context):
        return method({'features': [s]}, {'features': [t]}, Context(canvas=(1, 2), **context))['loss'].item()

    assert loss(one, two) == pytest.approx(2.0)
    assert loss(one, -7 * one) == pytest.approx(0.0)
    labels = torch.tensor([[[0, 255]]])
    assert loss(one, one + 2 * one.flip(3), label_map=labels) == pytest.approx(0.0)


@pytest.mark.slow
def test_several_processes(outcomes, sandbox):
    """The command as written; without GPUs, on the CPU."""
    (words,) = (w for b in EXECUTED if b.language == 'bash' for w in b.commands() if w[0] == 'tools/dist_train.sh')
    command = [str(ROOT / words[0]), *words[1:], '--work-dir', 'work_dirs/several']
    port = str(29600 + os.getpid() % 300)
    environment = {**os.environ, 'PYTHON': sys.executable, 'PORT': port, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=sandbox.root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (sandbox.root / 'work_dirs/several/record.json').is_file()


def test_checkpoint_of_the_example_is_plain(outcomes, sandbox):
    from kd_dense import checkpoint
    from kd_dense.models.build import build_model

    state = checkpoint.load(sandbox.root / 'work_dirs/my_segmentation/iter_160000.pth')
    assert {'state_dict', 'kd_dense'} <= set(state)
    assert set(state['state_dict']) == set(build_model(tiny.segmentor(4), 'student').state_dict())


@pytest.mark.parametrize('original', [name for name in SUBSTITUTES if '::' in name])
def test_substituted_configs_exist(original):
    from kd_dense.models.build import read_config

    assert original in (ROOT / 'README.md').read_text()
    assert 'model' in read_config(original, 'README')


@pytest.mark.parametrize('document', DOCUMENTS)
def test_named_files_and_flags_exist(document):
    """Inline code: paths of the repository, and flags of its tools."""
    flags = {
        option
        for tool in TOOLS
        for option in re.findall(r"'(--[\w-]+)'", (ROOT / 'tools' / f'{tool}.py').read_text(encoding='utf-8'))
    }
    missing = []
    for code in re.findall(r'`([^`\n]+)`', prose(document)):
        for word in code.split():
            if re.match(r'(configs|tools|kd_dense|docs|tests)/', word) and not (ROOT / word).exists():
                missing.append(word)
            if word.startswith('--') and word.strip('[]') not in flags:
                missing.append(word)
    assert missing == []


@pytest.mark.parametrize('document', DOCUMENTS)
def test_commands_name_configs_of_the_repository(document):
    for block in EXECUTED:
        if block.document == document and block.language == 'bash':
            for word in (w for words in block.commands() for w in words):
                assert not word.startswith(('configs/', 'tools/')) or (ROOT / word).is_file(), word


@pytest.mark.parametrize('document', DOCUMENTS)
def test_links_and_pictures_exist(document):
    targets = re.findall(r'\]\(([^)\s]+)\)', prose(document))
    for target in targets:
        path, _, anchor = target.partition('#')
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), target
        if anchor:
            titles = re.findall(r'^#+ (.*)$', file.read_text(encoding='utf-8'), re.M)
            assert anchor in [re.sub(r'[^\w -]', '', t).lower().replace(' ', '-') for t in titles], target


def test_results_have_a_place_for_every_task():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert re.findall(r'<!-- results:(\w+) -->[\s\S]*?<!-- /results -->', text) == list(TASKS)


def rows_below(heading: str, document: str = 'README.md') -> list[list[str]]:
    """The cells of the table under a heading."""
    text = prose(document).partition(f'\n## {heading}\n')[2].partition('\n## ')[0]
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('|')]
    return rows[2:]


def test_the_table_of_methods_is_that_of_the_code(outcomes):
    DISTILLERS.import_from_location()
    own = {n: c for n, c in DISTILLERS.module_dict.items() if c.__module__.startswith('kd_dense.distillers')}
    rows = {row[0].strip('`'): row for row in rows_below('Methods')}
    assert set(rows) == set(own)
    for name, cls in own.items():
        taps = inspect.signature(cls).parameters.get('taps')
        if taps is None:  # the method knows what it compares
            expected = 'none to give'
        else:
            expected = 'none, give them' if taps.default is inspect.Parameter.empty else f'`{taps.default!r}`'
        assert rows[name][3] == expected, name
        assert float(rows[name][4]) == cls.default_loss_weight, name


@functools.cache
def sentences_in_the_code() -> list[str]:
    """Every string of the package and of the tools, with '…' for what is filled in."""
    found = []
    for path in [*(ROOT / 'kd_dense').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else '…' for part in node.values)
                found.append(''.join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize('row', rows_below('Troubleshooting'), ids=lambda row: row[0].strip('`')[:40])
def test_sentences_of_the_troubleshooting_table_are_those_of_the_code(row):
    said = row[0].strip('`')
    pattern = '.*'.join(re.escape(part) for part in said.split('…'))
    assert any(re.search(pattern, sentence, re.S) for sentence in sentences_in_the_code()), said
    assert len(row) == 2 and row[1]


def test_readme_is_that_of_the_package():
    assert re.search(r'^readme = "README\.md"$', (ROOT / 'pyproject.toml').read_text(), re.M)
