"""Builds the kernels as PyTorch extensions when they are first needed, and loads them.

A built library is kept in TORCH_EXTENSIONS_DIR (default: ~/.cache/torch_extensions). As long as
the sources and torch stay the same, it is loaded from there, without a compiler.
"""
import contextlib
import functools
import hashlib
import io
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

import filelock
import torch

HERE = Path(__file__).parent
SOURCES = {'cpu': ['scan_cpu.cpp'], 'cuda': ['scan_cuda.cpp', 'scan_kernels.cu']}
HEADERS = ['scan.h', 'operators.h']
REMEDY = ('pip install -r requirements.txt, a C++ compiler (Debian, Ubuntu: apt install g++, '
          'Mac: xcode-select --install, CXX names another), for a GPU the CUDA toolkit '
          f'{torch.version.cuda} in CUDA_HOME, another cache in TORCH_EXTENSIONS_DIR, '
          'or SCAN_CUDA_BUILD=0')


@functools.cache
def load(device_type):
    """Build (once) and load the kernel of 'cpu' or 'cuda'. Returns whether there is one. A failure
    prints one line on stderr, and no second try follows. SCAN_CUDA_BUILD=0 in the environment means
    that no kernel is built or loaded."""
    asked = os.environ.get('SCAN_CUDA_BUILD') != '0' and not torch.version.hip
    if not asked or device_type not in SOURCES:
        return False
    try:
        load_or_build('cpu')                # which defines the operators
        load_or_build(device_type)
        return True
    except Exception as error:              # of any kind: the program goes on without
        print(f'scan_cuda: no {device_type.upper()} kernel, so the slower PyTorch fallback is '
              f'used: {reason(error)}; remedy: {REMEDY}', file=sys.stderr)
        return False


def load_or_build(device_type):
    folder = cache_folder(device_type)
    if load_from(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix('.lock')):    # others wait; a killed process lets go
        if load_from(folder):
            return
        half = folder.with_suffix('.half')                  # renamed when it is whole
        for leftover in (half, folder):                     # of a build that was killed, or damaged
            shutil.rmtree(leftover, ignore_errors=True)
        half.mkdir()
        print(f'scan_cuda: building the {device_type.upper()} kernel, once', file=sys.stderr)
        build(device_type, half)
        half.rename(folder)


def load_from(folder):
    """Load the library in this folder, if there is one that can be loaded. Returns whether."""
    for library in folder.glob('*.so'):
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)
            return True
    return False


def cache_folder(device_type):
    """A folder for each kind of library, since machines may share a home directory."""
    key = [torch.__version__, torch.backends.cpu.get_cpu_capability()]
    if device_type == 'cuda':
        cards = os.environ.get('TORCH_CUDA_ARCH_LIST') or torch.cuda.get_device_capability()
        key.append(str(cards))
    key += [(HERE / file).read_text() for file in HEADERS + SOURCES[device_type]]
    code = hashlib.sha256(''.join(key).encode()).hexdigest()[:12]
    cache = os.environ.get('TORCH_EXTENSIONS_DIR', '~/.cache/torch_extensions')
    return Path(cache).expanduser() / f'scan_{device_type}_{code}'


def cpu_flags():
    flags = ['-O3']
    vectors = torch.backends.cpu.get_cpu_capability()
    if vectors.startswith('AVX'):
        flags += ['-mavx2', '-mfma']        # three times as fast
    if vectors == 'AVX512':
        flags += ['-mavx512f']
    if sys.platform == 'linux':
        flags += ['-fopenmp']               # torch brings gcc's runtime, for threads of its own
    return flags


def build(device_type, folder):
    """Compile the extension and load it, without torch's remarks on compilers."""
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.CRITICAL)
    scripts = str(Path(sys.executable).parent)                  # where pip puts ninja
    os.environ['PATH'] = os.environ.get('PATH', os.defpath) + os.pathsep + scripts
    sources = [str(HERE / file) for file in SOURCES[device_type]]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter('ignore')
        from torch.utils.cpp_extension import load as load_extension
        load_extension(f'scan_{device_type}', sources, extra_cflags=cpu_flags(),
                       extra_cuda_cflags=['-O3'], build_directory=str(folder),
                       is_python_module=False)


def reason(error):
    """The line of a compiler's output that names an error; of another message, the last line."""
    lines = str(error).splitlines()
    named = [line for line in lines if 'error:' in line or 'not found' in line]
    return (named + lines[-1:])[0][:300]
