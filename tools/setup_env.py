"""Set up the virtual environment of this project: `make setup` runs this.

Usage: python3 tools/setup_env.py [--venv .venv] [--family openmmlab|onedl] [--python PATH]
                                  [--mmcv-ops auto|cpu|cuda] [--verify]

Steps: the environment itself; the packages of requirements.txt except mmcv; mmcv, built from source against the PyTorch
that is now there; kd_dense itself (editable); a check that everything imports, mmcv's operators above all. Each
finished step leaves a stamp in the environment and is skipped from then on, until something that it depends on changes.
A set-up that was interrupted, even killed, continues where it stopped when it is started again, the mmcv build with the
object files that it has.

mmcv has no binary package, and its build takes about eight minutes on two cores. The built wheel is kept in the user's
cache folder under a name with the versions of mmcv, PyTorch and Python, so that another clone need not build it again.
(pip's own cache would hand out a wheel that was built against another version of PyTorch.)

This file runs before anything is installed and must be able to say which Python is needed when it is started with an
unsuitable one. It therefore uses the standard library only, and syntax that Python 2.7 can parse: no f-strings, no
annotations.
"""

from __future__ import print_function

import argparse
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REQUIREMENTS = os.path.join(ROOT, 'requirements.txt')
SUPPORTED = ('3.12', '3.11', '3.10')
DISK_GB = 10  # PyTorch with its CUDA libraries is most of it

# The maintained forks of the OpenMMLab packages: other names, same modules.
FORKS = {
    'mmcv': 'onedl-mmcv==2.3.6',
    'mmengine': 'onedl-mmengine==0.10.12',
    'mmdet': 'onedl-mmdetection==3.5.1',
    'mmsegmentation': 'onedl-mmsegmentation==1.4.2',
}

# Imported at the end, each with what to do when it fails.
CHECKS = (
    ('torch', "run 'make setup' again"),
    ('torchvision', "run 'make setup' again"),
    ('cv2', 'install the system library that it names (on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0)'),
    ('mmengine', "run 'make setup' again"),
    ('mmcv._ext', "mmcv's compiled operators do not load: delete {cache} and {venv}, then run 'make setup' again"),
    ('mmdet.models', "run 'make setup' again"),
    ('mmseg.models', "run 'make setup' again"),
    ('ultralytics', "run 'make setup' again"),
    ('pycocotools.mask', "run 'make setup' again"),
    ('cityscapesscripts', "run 'make setup' again"),
)


class SetupError(Exception):
    """What went wrong and what to do, in one sentence."""


def say(text):
    print('[setup] ' + text)
    sys.stdout.flush()


def minutes(seconds):
    return '{} min {:02d} s'.format(int(seconds) // 60, int(seconds) % 60)


# ---------------------------------------------------------------------------------------------------------------------
# Python


def python_facts(executable):
    """(version, has ensurepip, has C headers) of a Python, or None if it does not run."""
    code = (
        'import os, sys, sysconfig\n'
        'try:\n'
        '    import ensurepip, venv; pip = 1\n'
        'except ImportError:\n'
        '    pip = 0\n'
        "header = os.path.join(sysconfig.get_paths()['include'], 'Python.h')\n"
        "print('%d.%d %d %d' % (sys.version_info[0], sys.version_info[1], pip, os.path.exists(header)))"
    )
    try:
        with open(os.devnull, 'w') as null:
            out = subprocess.check_output([executable, '-c', code], stderr=null).decode().split()
        return out[0], out[1] == '1', out[2] == '1'
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def choose_python(wanted):
    """The Python to build the environment with: ``wanted`` (a path or command) if given, else the first suitable one.

    Suitable: version 3.10 to 3.12, able to create environments, and with its C headers, which mmcv's build includes.
    """
    version_needed = 'Python 3.10, 3.11 or 3.12 is needed'
    if wanted:
        facts = python_facts(wanted)
        if facts is None:
            raise SetupError('PYTHON={} does not run; {}.'.format(wanted, version_needed))
        candidates = [(wanted, facts)]
    else:
        names = [sys.executable, 'python3'] + ['python' + version for version in SUPPORTED]
        candidates = [(name, python_facts(name)) for name in names]
        candidates = [(name, facts) for name, facts in candidates if facts]
    for name, (version, has_pip, has_headers) in candidates:
        if version in SUPPORTED and has_pip and has_headers:
            return name
    for name, (version, has_pip, has_headers) in candidates:
        if version in SUPPORTED and not has_pip:
            raise SetupError(
                '{} (Python {}) cannot create environments; install its venv package (on Debian and Ubuntu: apt-get '
                'install python{}-venv).'.format(name, version, version)
            )
        if version in SUPPORTED and not has_headers:
            raise SetupError(
                '{} (Python {}) lacks its C headers, which the build of mmcv includes; install them (on Debian and '
                'Ubuntu: apt-get install python{}-dev).'.format(name, version, version)
            )
    found = ', '.join(sorted({facts[0] for _, facts in candidates})) or 'none'
    raise SetupError(
        '{} and was not found (found: {}); install one, or name it: make setup PYTHON=/path/to/python3.11.'.format(
            version_needed, found
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# The environment


class Environment(object):
    """A virtual environment, with a lock, stamps for finished steps, and pip."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        self.python = os.path.join(self.path, 'bin', 'python')
        self.build = os.path.join(self.path, 'build')
        self.stamps = os.path.join(self.path, 'setup-stamps')

    def lock(self):
        """Wait until no other set-up works on this environment, then keep others out.

        The lock belongs to an open file, which the commands started from here inherit. If this program is killed while
        such a command goes on, the next set-up waits for that command instead of working beside it.
        """
        import fcntl

        if not os.path.isdir(self.path):
            os.makedirs(self.path)
        self._lock = os.open(os.path.join(self.path, 'setup.lock'), os.O_RDWR | os.O_CREAT, 0o644)
        os.set_inheritable(self._lock, True)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say('another set-up is at work in {}; waiting for it'.format(self.path))
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def run(self, command, **options):
        """Run a command with the lock held open; returns its exit status."""
        return subprocess.call(command, close_fds=False, **options)

    def output(self, code):
        """What a piece of Python prints in the environment."""
        return subprocess.check_output([self.python, '-c', code]).decode().strip()

    def works(self):
        with open(os.devnull, 'w') as null:
            return os.path.exists(self.python) and not subprocess.call(
                [self.python, '-m', 'pip', '--version'], stdout=null, stderr=null
            )

    def pip_install(self, arguments, what):
        # Packages without these two files were being unpacked when an earlier set-up was killed; pip takes them for
        # installed. "~" marks packages that it was about to remove.
        site = self.output("import sysconfig; print(sysconfig.get_paths()['purelib'])")
        for info in glob.glob(os.path.join(site, '*.dist-info')):
            if not all(os.path.exists(os.path.join(info, name)) for name in ('RECORD', 'INSTALLER')):
                say('removing the remains of an interrupted installation: ' + os.path.basename(info))
                shutil.rmtree(info)
        for leftover in glob.glob(os.path.join(site, '~*')):
            shutil.rmtree(leftover) if os.path.isdir(leftover) else os.remove(leftover)
        command = [self.python, '-m', 'pip', 'install', '--disable-pip-version-check']
        if not sys.stdout.isatty():
            command += ['--progress-bar', 'off']
        for attempt in (1, 2, 3):  # a connection that drops in a download of this size is no rarity
            if self.run(command + arguments) == 0:
                return
            if attempt < 3:
                say('pip failed; trying again in 5 s')
                time.sleep(5)
        raise SetupError("pip could not install {}; see its message above, then run 'make setup' again.".format(what))

    def is_done(self, step, key):
        return read(os.path.join(self.stamps, step)) == key

    def mark_done(self, step, key):
        if not os.path.isdir(self.stamps):
            os.makedirs(self.stamps)
        write_atomically(os.path.join(self.stamps, step), key)

    def forget(self, step):
        path = os.path.join(self.stamps, step)
        if os.path.exists(path):
            os.remove(path)


def read(path):
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


def write_atomically(path, text):
    with open(path + '.tmp', 'w') as file:
        file.write(text)
    os.replace(path + '.tmp', path)


def digest(*parts):
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def requirements(family):
    """The lines of requirements.txt without comments, in their order, with the forks' packages for family 'onedl'."""
    with open(REQUIREMENTS) as file:
        lines = [line.split('#')[0].strip() for line in file]
    lines = [line for line in lines if line]
    if family == 'onedl':
        lines = [FORKS.get(name_of(line), line) for line in lines]
    return lines


def name_of(requirement):
    return re.split(r'[=<>!;\[ ]', requirement)[0].lower()


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def create_environment(env, python):
    if env.works():
        return
    free = shutil.disk_usage(env.path).free / 1e9
    if free < DISK_GB:
        raise SetupError(
            '{} has {:.1f} GB free, and the environment needs about {} GB; free some space, or put it elsewhere: make '
            'setup VENV=/path/to/folder.'.format(env.path, free, DISK_GB)
        )
    say('creating the environment {} with {}'.format(env.path, python))
    shutil.rmtree(os.path.join(env.path, 'lib'), ignore_errors=True)  # what an interrupted creation left
    shutil.rmtree(os.path.join(env.path, 'bin'), ignore_errors=True)
    if env.run([python, '-m', 'venv', env.path]) or not env.works():
        raise SetupError('{} could not create the environment {}; see its message above.'.format(python, env.path))


def install_packages(env, lines):
    env.pip_install(lines, 'the packages of requirements.txt')
    command = [env.python, '-c', 'import cv2']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=env.path)
    text = process.communicate()[0].decode(errors='replace')
    if process.returncode and 'cannot open shared object file' in text:
        # opencv-python needs the system's graphics libraries, for windows on a screen; its sister package does not.
        opencv = [line for line in lines if name_of(line) == 'opencv-python'][0]
        headless = opencv.replace('opencv-python', 'opencv-python-headless')
        say('this machine has no graphics libraries for OpenCV; installing {} instead'.format(headless))
        env.run([env.python, '-m', 'pip', 'uninstall', '--quiet', '--yes', 'opencv-python'])
        env.pip_install(['--no-deps', '--force-reinstall', headless], headless)


def cache_folder():
    base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.path.join(base, 'kd_dense', 'wheels')


def is_good_wheel(path):
    """Whether a wheel is complete and has mmcv's compiled operators."""
    try:
        with zipfile.ZipFile(path) as wheel:
            return any(name.startswith('mmcv/_ext') for name in wheel.namelist()) and wheel.testzip() is None
    except (zipfile.BadZipfile, IOError, OSError):
        return False


def loads_operators(env):
    with open(os.devnull, 'w') as null:
        return env.run([env.python, '-c', 'import mmcv._ext'], stdout=null, stderr=null, cwd=env.path) == 0


def installed_version(env, name):
    code = "import importlib.metadata as m\ntry: print(m.version({!r}))\nexcept m.PackageNotFoundError: print('')"
    return env.output(code.format(name))


def install_mmcv(env, requirement, ops):
    """Install mmcv: what is there if it fits, else the wheel from the user's cache, else build one."""
    name, version = requirement.split('==')
    torch, tag = (
        env.output("import torch, sys; print(torch.__version__, 'cp%d%d' % sys.version_info[:2], torch.version.cuda)")
        .rsplit(None, 1)[0]
        .rsplit(None, 1)
    )
    with_cuda = use_cuda(env, ops)
    key = '{}-{}_torch-{}_{}_{}_{}_{}'.format(
        name, version, torch, tag, platform.system().lower(), platform.machine(), 'cuda' if with_cuda else 'cpu'
    )
    kept = os.path.join(cache_folder(), key)
    stamp = os.path.join(env.stamps, 'mmcv-build')
    built_for = read(stamp) or key  # no stamp: installed by hand
    if installed_version(env, name) == version and built_for == key and loads_operators(env):
        say('{} {} is installed and its operators load'.format(name, version))
        for wheel in glob.glob(os.path.join(env.build, '{}-{}'.format(name, version), 'dist', '*.whl')):
            if is_good_wheel(wheel) and not os.path.exists(os.path.join(kept, os.path.basename(wheel))):
                keep_wheel(wheel, kept)
        env.mark_done('mmcv-build', key)
        return

    wheels = [path for path in glob.glob(os.path.join(kept, '*.whl')) if is_good_wheel(path)]
    if wheels:
        say('{} {}: using the wheel built earlier, {}'.format(name, version, wheels[0]))
        install_wheel(env, wheels[0])
        if loads_operators(env):
            env.mark_done('mmcv-build', key)
            return
        say('its operators do not load on this machine; building anew')

    wheel = build_mmcv(env, name, version, with_cuda)
    install_wheel(env, wheel)
    if not loads_operators(env):
        raise SetupError(
            "{} {} was built and installed, but its operators do not load ({} -c 'import mmcv._ext' says why).".format(
                name, version, env.python
            )
        )
    keep_wheel(wheel, kept)
    env.mark_done('mmcv-build', key)


def install_wheel(env, wheel):
    # --no-deps: its dependencies are pinned in requirements.txt and installed with that.
    env.pip_install(['--quiet', '--force-reinstall', '--no-deps', '--no-index', wheel], os.path.basename(wheel))


def keep_wheel(wheel, folder):
    """Copy a wheel to the cache; not being able to is no error, as it only costs time later."""
    target = os.path.join(folder, os.path.basename(wheel))
    temporary = '{}.{}.tmp'.format(target, os.getpid())
    try:
        if not os.path.isdir(folder):
            os.makedirs(folder)
        shutil.copyfile(wheel, temporary)
        os.replace(temporary, target)
        say('kept the wheel for other clones: ' + target)
    except (IOError, OSError) as error:
        say('could not keep the wheel for other clones ({})'.format(error))


def use_cuda(env, ops):
    """Whether to build the CUDA operators: only where a GPU and a compiler for PyTorch's version of CUDA are there."""
    if ops == 'cpu':
        return False
    cuda, gpu = env.output('import torch; print(torch.version.cuda, torch.cuda.is_available())').split()
    nvcc = shutil.which('nvcc') or os.path.join(os.environ.get('CUDA_HOME', '/usr/local/cuda'), 'bin', 'nvcc')
    try:
        text = subprocess.check_output([nvcc, '--version']).decode()
        release = re.search(r'release (\d+)\.', text).group(1)
    except (OSError, subprocess.CalledProcessError, AttributeError):
        release = ''
    fits = cuda != 'None' and release == cuda.split('.')[0]
    if ops == 'cuda' and not fits:
        raise SetupError(
            'MMCV_OPS=cuda needs nvcc of CUDA {}, as PyTorch has (found: {}); install it, or leave MMCV_OPS '
            'out.'.format(cuda, release or 'none')
        )
    return fits and (gpu == 'True' or ops == 'cuda')


def check_compiler(env):
    """A sentence now rather than a page of errors in the middle of the build."""
    compiler = os.environ.get('CXX') or 'c++'
    source = os.path.join(env.build, 'check.cpp')
    with open(source, 'w') as file:
        file.write('#include <optional>\n#include <Python.h>\nint main() { return std::optional<int>(0).value(); }\n')
    include = env.output("import sysconfig; print(sysconfig.get_paths()['include'])")
    command = compiler.split() + ['-std=c++17', '-fsyntax-only', '-I', include, source]
    if shutil.which(command[0]) is None:
        raise SetupError(
            'There is no C++ compiler ({}), and mmcv is built from source; install one (on Debian and Ubuntu: apt-get '
            'install g++) or name it: CXX=/path/to/g++.'.format(compiler)
        )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = process.communicate()[0].decode(errors='replace')
    if process.returncode:
        lines = [line for line in text.splitlines() if 'error' in line] or text.splitlines() or ['no message']
        raise SetupError(
            'The C++ compiler {} cannot compile C++17 for Python ({}); use another one, such as g++ 9 or later: '
            'CXX=/path/to/g++.'.format(compiler, lines[0])
        )


def unpack_source(env, name, version):
    """Download and unpack the source into the build folder, once; returns the folder."""
    folder = os.path.join(env.build, '{}-{}'.format(name, version))
    if os.path.exists(os.path.join(folder, 'setup.py')):
        return folder
    say('downloading the source of {} {}'.format(name, version))
    download = os.path.join(env.build, 'download')
    shutil.rmtree(download, ignore_errors=True)
    command = [env.python, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps']
    command += ['--no-build-isolation', '--no-binary', name, '-d', download, '{}=={}'.format(name, version)]
    if env.run(command):
        raise SetupError(
            "The source of {} {} could not be downloaded; see pip's message above, then run 'make setup' again.".format(
                name, version
            )
        )
    archive = glob.glob(os.path.join(download, '*.tar.gz'))[0]
    unpacked = os.path.join(download, 'unpacked')
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(os.path.join(unpacked, os.listdir(unpacked)[0]), folder)
    shutil.rmtree(download)
    return folder


def build_mmcv(env, name, version, with_cuda):
    """Build the wheel with ninja, which goes on from the object files of an interrupted build; returns its path."""
    if not os.path.isdir(env.build):
        os.makedirs(env.build)
    check_compiler(env)
    source = unpack_source(env, name, version)
    cores = len(os.sched_getaffinity(0))
    memory_gb = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2.0**30
    jobs = max(1, min(cores, int(memory_gb / 2)))  # one compiler takes up to 2 GB
    variables = dict(os.environ, MMCV_WITH_OPS='1', MAX_JOBS=str(jobs))
    variables['PATH'] = os.path.dirname(env.python) + os.pathsep + variables.get('PATH', '')
    if with_cuda:
        variables['FORCE_CUDA'] = '1'
    else:
        variables['CUDA_VISIBLE_DEVICES'] = ''  # otherwise mmcv wants nvcc as soon as it sees a GPU
    # Linking and packing are done again from the start: their output may be half written.
    for pattern in ('dist', 'build/lib*', 'build/bdist*'):
        for path in glob.glob(os.path.join(source, pattern)):
            shutil.rmtree(path)
    log = os.path.join(env.build, name + '-build.log')
    say(
        'building {} {} from source ({} operators) with {} jobs; this takes about 8 minutes on two cores, once'.format(
            name, version, 'CUDA and CPU' if with_cuda else 'CPU', jobs
        )
    )
    say("the compiler's output goes to " + log)
    started = time.time()
    with open(log, 'w') as out:
        process = subprocess.Popen(
            [env.python, 'setup.py', 'bdist_wheel'],
            cwd=source,
            env=variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            close_fds=False,
        )
        report_progress(process, log, name, started)
    wheels = [path for path in glob.glob(os.path.join(source, 'dist', '*.whl')) if is_good_wheel(path)]
    if process.returncode or not wheels:
        with open(log, errors='replace') as file:
            lines = file.read().splitlines()
        for line in [line for line in lines if 'error' in line.lower()][:5] + lines[-5:]:
            print('    ' + line[:300])
        raise SetupError(
            '{} {} could not be built ({}); the last lines of {} are above.'.format(
                name,
                version,
                'exit status {}'.format(process.returncode) if process.returncode else 'the wheel has no mmcv._ext',
                log,
            )
        )
    say('built {} {} in {}'.format(name, version, minutes(time.time() - started)))
    return wheels[0]


def report_progress(process, log, name, started, interval=20):
    """A line every 20 seconds until the process ends: files compiled, time passed, time left."""
    reported = started
    while process.poll() is None:
        time.sleep(0.5)
        if time.time() - reported < interval:
            continue
        reported = time.time()
        with open(log, errors='replace') as file:
            steps = re.findall(r'^\[(\d+)/(\d+)\] ', file.read(), re.MULTILINE)
        passed = reported - started
        if not steps:
            say('{}: preparing, {}'.format(name, minutes(passed)))
            continue
        done, total = int(steps[-1][0]), int(steps[-1][1])
        left = passed / done * (total - done)  # after an interruption, ninja counts only what is left
        say('{}: {} of {} files, {} passed, about {} left'.format(name, done, total, minutes(passed), minutes(left)))


def verify(env):
    """Import everything in a fresh interpreter, and print the versions."""
    say('checking that everything imports')
    variables = dict(os.environ, YOLO_OFFLINE='true', YOLO_CONFIG_DIR=env.path)
    for module, advice in CHECKS:
        process = subprocess.Popen(
            [env.python, '-W', 'ignore', '-c', 'import ' + module],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=env.path,
        )
        text = process.communicate()[0].decode(errors='replace').strip()
        if process.returncode:
            print(text)
            advice = advice.format(cache=cache_folder(), venv=env.path)
            raise SetupError(
                '{} cannot be imported ({}): {}.'.format(
                    module, text.splitlines()[-1] if text else 'no message', advice
                )
            )
    say(
        env.output(
            'import importlib.metadata as m, sys\n'
            "names = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'onedl-mmengine', 'onedl-mmcv',\n"
            "         'onedl-mmdetection', 'onedl-mmsegmentation', 'ultralytics')\n"
            "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
            "print('Python %d.%d' % sys.version_info[:2], *[n + ' ' + found[n] for n in names if n in found], sep=', ')"
        )
    )


# ---------------------------------------------------------------------------------------------------------------------


def set_up(options):
    env = Environment(options.venv)
    env.lock()
    started = time.time()
    python = None
    if env.works() and not options.python:
        version = python_facts(env.python)[0]
        if version not in SUPPORTED:
            raise SetupError("{} has Python {}; delete it, then run 'make setup' again.".format(env.path, version))
    else:
        python = choose_python(options.python)
        version = python_facts(python)[0]
        present = env.works() and python_facts(env.python)[0]
        if present and present != version:
            raise SetupError(
                '{} has Python {}, and PYTHON={} is {}; delete it, or use another folder: make setup '
                'VENV=.venv-{}.'.format(env.path, present, options.python, version, version)
            )
    family = read(os.path.join(env.stamps, 'family')) or options.family or 'openmmlab'
    if options.family and options.family != family:
        raise SetupError(
            '{} has the {} packages; use another folder: make setup MM={} VENV=.venv-{}.'.format(
                env.path, family, options.family, options.family
            )
        )
    env.mark_done('family', family)

    lines = requirements(family)
    mmcv = [line for line in lines if name_of(line) in ('mmcv', 'onedl-mmcv')][0]
    lines.remove(mmcv)
    with open(os.path.join(ROOT, 'pyproject.toml')) as file:
        project = file.read()

    # Each key contains the one before it: a step is done again when an earlier one was.
    keys = [digest(version, env.path)]
    for parts in (lines, [mmcv, options.mmcv_ops], [ROOT, project], [repr(CHECKS)]):
        keys.append(digest(keys[-1], *parts))
    steps = (
        ('environment', lambda: create_environment(env, python)),
        ('packages', lambda: install_packages(env, lines)),
        ('mmcv', lambda: install_mmcv(env, mmcv, options.mmcv_ops)),
        ('kd_dense', lambda: env.pip_install(['--no-deps', '--no-build-isolation', '--editable', ROOT], 'kd_dense')),
        ('verified', lambda: verify(env)),
    )
    titles = {
        'packages': 'installing PyTorch, the toolboxes and what they need (about 3 GB to download the first time)',
        'mmcv': 'installing mmcv',
        'kd_dense': 'installing kd_dense itself, editable',
    }
    if options.verify:
        env.forget('verified')
    changed = False
    for (step, action), key in zip(steps, keys):
        if env.is_done(step, key) and (step != 'environment' or env.works()):
            continue
        if step in titles:
            say(titles[step])
        action()
        env.mark_done(step, key)
        changed = True
    if changed:
        say('ready: {} ({})'.format(env.path, minutes(time.time() - started)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--venv', default=os.path.join(ROOT, '.venv'), help='folder of the environment')
    parser.add_argument('--family', choices=('openmmlab', 'onedl', ''), help='originals (default) or forks')
    parser.add_argument('--python', default='', help='Python to use (default: a suitable one on PATH)')
    parser.add_argument(
        '--mmcv-ops', default='auto', choices=('auto', 'cpu', 'cuda'), help='operators of mmcv to build'
    )
    parser.add_argument('--verify', action='store_true', help='check the imports even if they were checked before')
    options = parser.parse_args()
    try:
        if sys.version_info < (3, 6):
            # Too old even for the rest of this program: hand over to a suitable Python.
            python = choose_python(options.python)
            os.execvp(python, [python, os.path.abspath(__file__)] + sys.argv[1:])
        if platform.system() != 'Linux':
            raise SetupError(
                'This set-up is made for Linux; elsewhere, follow the comment at the top of requirements.txt.'
            )
        set_up(options)
    except SetupError as error:
        print('[setup] error: {}'.format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n[setup] interrupted; 'make setup' goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
