"""tools/setup_env.py: the parts that need no installation. `make setup` itself is checked by making an environment."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / 'tools' / 'setup_env.py'
spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
setup_env = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_env)


def fake_python(folder, name, facts):
    """A command that answers like a Python with these facts: version, has venv, has C headers."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho {facts}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def only(tmp_path, monkeypatch):
    """Put only these fake Pythons on PATH: only(python3='3.13 1 1')."""

    def put(**pythons):
        for name, facts in pythons.items():
            fake_python(tmp_path, name.replace('_', '.'), facts)
        monkeypatch.setenv('PATH', str(tmp_path))
        monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python3'))

    return put


def test_the_first_suitable_python_is_taken(only, tmp_path):
    only(python3='3.13 1 1', python3_11='3.11 1 1', python3_10='3.10 1 1')
    assert setup_env.choose_python('') == 'python3.11'
    only(python3='3.10 1 1')
    assert setup_env.choose_python('') == str(tmp_path / 'python3')


def test_a_python_that_lacks_something_is_passed_over(only):
    only(python3='3.12 0 1', python3_12='3.12 1 0', python3_10='3.10 1 1')
    assert setup_env.choose_python('') == 'python3.10'


@pytest.mark.parametrize(
    'pythons, message',
    [
        (dict(python3='3.13 1 1'), r'3\.10, 3\.11 or 3\.12 is needed.*found: 3\.13.*PYTHON='),
        (dict(), r'is needed.*found: none'),
        (dict(python3='3.11 0 1'), r'cannot create environments.*python3\.11-venv'),
        (dict(python3='3.11 1 0'), r'C headers.*python3\.11-dev'),
    ],
)
def test_no_suitable_python_is_a_sentence(only, pythons, message):
    only(**pythons)
    with pytest.raises(setup_env.SetupError, match=message):
        setup_env.choose_python('')


def test_a_named_python_is_used_or_refused(tmp_path):
    good, old = fake_python(tmp_path, 'good', '3.12 1 1'), fake_python(tmp_path, 'old', '3.8 1 1')
    assert setup_env.choose_python(good) == good
    with pytest.raises(setup_env.SetupError, match=r'found: 3\.8'):
        setup_env.choose_python(old)
    with pytest.raises(setup_env.SetupError, match=r'PYTHON=.*missing does not run'):
        setup_env.choose_python(str(tmp_path / 'missing'))


def test_the_program_prints_one_sentence_and_fails(tmp_path):
    old = fake_python(tmp_path, 'old', '3.8 1 1')
    command = [sys.executable, str(SCRIPT), '--venv', str(tmp_path / 'venv'), '--python', old]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count('\n') == 1 and done.stderr.startswith('[setup] error: Python 3.10, 3.11 or 3.12 is needed')


def test_it_parses_under_very_old_pythons():
    """Otherwise they print a SyntaxError instead of the sentence. Checked by what such Pythons lack."""
    import ast

    tree = ast.parse(SCRIPT.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Nonlocal)), node.lineno
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None and not node.args.kwonlyargs, node.lineno
            assert all(argument.annotation is None for argument in node.args.args), node.lineno
        if isinstance(node, ast.Raise):
            assert node.cause is None, node.lineno


def test_requirements_are_exact_and_the_forks_replace_the_originals():
    originals, forks = setup_env.requirements('openmmlab'), setup_env.requirements('onedl')
    assert all('==' in line for line in originals)
    assert 'mmcv==2.1.0' in originals and not any('onedl' in line for line in originals)
    for name, fork in setup_env.FORKS.items():
        assert fork in forks and name not in [setup_env.name_of(line) for line in forks]
    assert len(originals) == len(forks)


def make_wheel(path, names):
    with zipfile.ZipFile(path, 'w') as wheel:
        for name in names:
            wheel.writestr(name, 'x' * 1000)
    return path


def test_only_a_complete_wheel_with_operators_is_good(tmp_path):
    good = make_wheel(tmp_path / 'a.whl', ['mmcv/__init__.py', 'mmcv/_ext.cpython-311-x86_64-linux-gnu.so'])
    assert setup_env.is_good_wheel(good)
    assert not setup_env.is_good_wheel(make_wheel(tmp_path / 'b.whl', ['mmcv/__init__.py']))  # built without torch
    content = good.read_bytes()
    (tmp_path / 'c.whl').write_bytes(content[: len(content) // 2])
    assert not setup_env.is_good_wheel(tmp_path / 'c.whl')
    (tmp_path / 'd.whl').write_bytes(content.replace(b'xxxx', b'xxxy', 1))
    assert not setup_env.is_good_wheel(tmp_path / 'd.whl')
    assert not setup_env.is_good_wheel(tmp_path / 'missing.whl')


def test_a_kept_wheel_takes_its_place_whole(tmp_path):
    wheel = make_wheel(tmp_path / 'a.whl', ['mmcv/_ext.so'])
    setup_env.keep_wheel(str(wheel), str(tmp_path / 'cache' / 'key'))
    assert os.listdir(tmp_path / 'cache' / 'key') == ['a.whl']
    (tmp_path / 'file').touch()
    setup_env.keep_wheel(str(wheel), str(tmp_path / 'file' / 'key'))  # cannot be kept: not an error


def test_stamps_follow_their_key(tmp_path):
    env = setup_env.Environment(str(tmp_path))
    assert not env.is_done('mmcv', 'a')
    env.mark_done('mmcv', 'a')
    assert env.is_done('mmcv', 'a') and not env.is_done('mmcv', 'b')
    env.forget('mmcv')
    assert not env.is_done('mmcv', 'a')


def test_a_second_set_up_waits_for_the_first(tmp_path):
    """Also for a command that the first one started and that outlives it."""
    code = (
        'import importlib.util, subprocess, sys\n'
        f'spec = importlib.util.spec_from_file_location("setup_env", {str(SCRIPT)!r})\n'
        'setup_env = importlib.util.module_from_spec(spec); spec.loader.exec_module(setup_env)\n'
        f'env = setup_env.Environment({str(tmp_path)!r}); env.lock()\n'
    )
    start_and_die = (
        f'command = ["sh", "-c", "sleep 1; touch {tmp_path}/command-ended"]\n'
        'subprocess.Popen(command, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n'
        'import os; os._exit(0)\n'
    )
    subprocess.run([sys.executable, '-c', code + start_and_die], check=True)
    assert not (tmp_path / 'command-ended').exists()
    second = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'waiting for it' in second.stdout and (tmp_path / 'command-ended').exists()


def test_a_compiler_that_cannot_do_it_is_a_sentence(tmp_path, monkeypatch):
    env = setup_env.Environment(str(tmp_path))
    env.python = sys.executable
    os.makedirs(env.build)
    monkeypatch.setenv('CXX', str(tmp_path / 'missing-g++'))
    with pytest.raises(setup_env.SetupError, match=r'no C\+\+ compiler.*apt-get install g\+\+'):
        setup_env.check_compiler(env)
    bad = tmp_path / 'old-g++'
    bad.write_text('#!/bin/sh\necho "error: unrecognized option -std=c++17"\nexit 1\n')
    bad.chmod(0o755)
    monkeypatch.setenv('CXX', str(bad))
    with pytest.raises(setup_env.SetupError, match=r'cannot compile C\+\+17.*unrecognized option'):
        setup_env.check_compiler(env)


def test_ci_calls_make_test():
    script = ROOT / '.ci' / 'run'
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == 'exec make test'
