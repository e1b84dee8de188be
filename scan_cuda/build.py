"""Builds the kernels when they are first needed, calls them, and defines the operators that autograd and
torch.compile see.

A kernel is a library of plain C functions (scan.h), made by one call of c++ for the CPU or of nvcc for CUDA,
without torch's headers and without a GPU. It is cached in TORCH_EXTENSIONS_DIR (default: in ~/.cache).
"""
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import torch

HERE = Path(__file__).parent
SOURCES = {'cpu': 'scan_cpu.cpp', 'cuda': 'scan_kernels.cu'}
loaded = {}     # device type -> is its kernel loaded? False: it cannot be built, and a line has said so
_lock = threading.Lock()


@torch.compiler.assume_constant_result     # torch.compile calls it once, and does not look inside
def load(device_type):
    """Build (once) and load the kernel of 'cpu' or 'cuda', and register it for that device. Returns whether
    there is one; a failure prints one line on stderr and is not tried again."""
    with _lock:
        if device_type not in loaded:
            loaded[device_type] = False
            if device_type in SOURCES and os.environ.get('SCAN_CUDA_BUILD') != '0' and not torch.version.hip:
                try:
                    _register(device_type, ctypes.CDLL(str(_build(device_type))))
                    loaded[device_type] = True
                except Exception as error:      # of any kind: a failed build must not stop the program
                    print(f'scan_cuda: no {device_type} kernel, so the slower PyTorch fallback is used: '
                          f'{error}', file=sys.stderr)
        return loaded[device_type]


def _build(device_type):
    """The kernel's library, from the cache or freshly built. Raises RuntimeError: a reason and a remedy."""
    source = HERE / SOURCES[device_type]
    target = _processor() if device_type == 'cpu' else _architectures()
    key = '\n'.join([*target, (HERE / 'scan.h').read_text(), source.read_text()])   # machines may share it
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folder = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or Path(cache, 'torch_extensions'))
    library = folder / f'scan_{device_type}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.so'
    if library.exists():
        return library
    command = _cpu_compiler() if device_type == 'cpu' else _cuda_compiler(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(library.with_suffix('.lock')):   # others wait; a killed process lets go
            if not library.exists():
                half = library.with_suffix('.half')             # renamed when it is whole
                run = subprocess.run([*command, '-o', half, source], capture_output=True, text=True)
                if run.returncode:
                    lines = (run.stderr + run.stdout).strip().splitlines() or ['the compiler failed']
                    line = min(lines, key=lambda line: 'error' not in line.lower())     # first with an error
                    other = 'compiler in CXX' if device_type == 'cpu' else 'toolkit in CUDA_HOME'
                    raise RuntimeError(f'{line.strip()[:300]}; remedy: another {other}, or SCAN_CUDA_BUILD=0')
                half.replace(library)
    except OSError as error:
        raise RuntimeError(f'cannot write to {folder} ({error.strerror}); remedy: set TORCH_EXTENSIONS_DIR')
    return library


def _processor():
    if not Path('/proc/cpuinfo').exists():
        return [platform.platform(), platform.processor()]
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    return sorted({line for line in lines if line.startswith(('model name', 'flags', 'Features'))})


def _architectures():
    """Those of the GPUs here, or without one those in TORCH_CUDA_ARCH_LIST: '8.0;9.0' -> ['80', '90']."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    else:
        found = re.findall(r'(\d+)\.(\d)', os.environ.get('TORCH_CUDA_ARCH_LIST', ''))
    if not found:
        raise RuntimeError('no GPU to build for; remedy: name one, as in TORCH_CUDA_ARCH_LIST=8.0')
    return sorted({f'{major}{minor}' for major, minor in found})


def _cpu_compiler():
    cxx = (os.environ.get('CXX') or 'c++').split()
    if not shutil.which(cxx[0]):
        raise RuntimeError(f'no C++ compiler ({cxx[0]}); remedy: install one (Debian, Ubuntu, Colab: '
                           'apt install g++; Mac: xcode-select --install) or name it in CXX')
    run = lambda *flags: subprocess.run([*cxx, *flags], capture_output=True, text=True)
    command = [*cxx, '-std=c++17', '-O3', '-shared', '-fPIC']
    if run('-march=native', '-x', 'c++', '-fsyntax-only', os.devnull).returncode == 0:
        command += ['-march=native']
    if sys.platform == 'linux' and 'clang' not in run('--version').stdout:
        command += ['-fopenmp']     # gcc's runtime comes with torch; clang's does not: one thread there
    return command


def _cuda_compiler(architectures):
    home = os.environ.get('CUDA_HOME')
    nvcc = shutil.which('nvcc', path=f'{home}/bin' if home else os.environ['PATH'] + ':/usr/local/cuda/bin')
    if not nvcc:
        raise RuntimeError(f'no nvcc; remedy: set CUDA_HOME to the CUDA toolkit {torch.version.cuda}')
    return [nvcc, '-std=c++17', '-O3', '-shared', '-Xcompiler=-fPIC',
            *(f'-gencode=arch=compute_{a},code=sm_{a}' for a in architectures)]


# ---------------------------------------------------------------------------------------------
# Calling a kernel

class Scan(ctypes.Structure):   # scan.h's
    _numbers = 'batch L d_inner N B_stride C_stride bf16 threads'.split()
    _pointers = ('u delta B C A D initial y final_state starts dy dfinal '
                 'du ddelta dA dB dC dD dinitial').split()
    _fields_ = [(name, ctypes.c_int64) for name in _numbers] + [(name, ctypes.c_void_p) for name in _pointers]


def scan_functions(library, prefix='scan_'):
    """The operators scan_forward and scan_backward, as functions, by the kernels of scan.h in `library`."""
    parts, channels, takes_bf16 = (ctypes.c_int.in_dll(library, name).value
                                   for name in ('scan_parts', 'scan_channels', 'scan_takes_bf16'))

    def values(*tensors):
        return [t if takes_bf16 else t.float() for t in tensors]

    def call(function, u, delta, A, B, C, D, initial_state, **others):
        B, C = (t if _in_rows(t) else t.contiguous() for t in (B, C))
        tensors = dict(u=u.contiguous(), delta=delta.contiguous(), B=B, C=C, A=A.t().contiguous(),
                       D=None if D is None else D.contiguous(), initial=_turn(initial_state), **others)
        scan = Scan(*u.shape, A.shape[1], B.stride(1), C.stride(1), u.dtype == torch.bfloat16,
                    _threads(u.numel() * A.shape[1]),
                    **{name: None if t is None else t.data_ptr() for name, t in tensors.items()})
        with torch.cuda.device_of(u):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if u.is_cuda else 0)
            if u.numel() and (error := getattr(library, prefix + function)(ctypes.byref(scan), stream)):
                raise RuntimeError(f'CUDA error {error}; remedy: another CUDA_HOME, or SCAN_CUDA_BUILD=0')

    def forward(u, delta, A, B, C, D, initial_state, chunk):
        dtype, (u, delta, B, C) = u.dtype, values(u, delta, B, C)
        y, final_state, starts = _new_outputs(u, delta, A, B, C, D, initial_state, chunk)
        call('forward', u, delta, A, B, C, D, initial_state, y=y, final_state=final_state, starts=starts)
        return y.to(dtype), final_state, starts

    def backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, chunk):
        dtype, (dy, u, delta, B, C) = u.dtype, values(dy, u, delta, B, C)
        (batch, L, d_inner), N, blocks = u.shape, A.shape[1], -(-u.shape[2] // channels)
        du, ddelta, dinitial = u.new_empty(u.shape), u.new_empty(u.shape), _new_state(u, A)
        dA, dD = A.new_zeros(batch, parts, N, d_inner), A.new_zeros(batch, parts, d_inner)
        dB, dC = A.new_zeros(2, blocks, batch, L, N)
        call('backward', u, delta, A, B, C, D, initial_state, starts=starts, dy=dy.contiguous(),
             dfinal=_turn(dfinal), du=du, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dinitial=dinitial)
        return (du.to(dtype), ddelta.to(dtype), dA.sum((0, 1)).t().contiguous(), dB.sum(0).to(dtype),
                dC.sum(0).to(dtype), dD.sum((0, 1)), dinitial)

    return forward, backward


def _in_rows(t):    # tokens lie one stride apart, as in a slice of wider rows
    return t.stride(2) == 1 and t.stride(0) == t.shape[1] * t.stride(1)


def _turn(state):
    """(batch, d_inner, d_state) as kernels have it, (batch, d_state, d_inner); their own are not copied."""
    return None if state is None else state.transpose(1, 2).contiguous()


def _threads(work):     # little work is done before threads are awake
    return 1 if work < 200_000 else torch.get_num_threads()


def _conv_functions(library):
    def call(function, y, x, weight, bias, initial_state, *gradients):
        x = x if _in_rows(x) else x.contiguous()
        initial = x.new_zeros(len(x), 3, x.shape[2]) if initial_state is None else initial_state.contiguous()
        tensors = y.contiguous(), x, weight.t().contiguous(), bias.contiguous(), initial, *gradients
        sizes = *y.shape, x.stride(1), _threads(16 * y.numel())
        function(*map(ctypes.c_int64, sizes), *(ctypes.c_void_p(t.data_ptr()) for t in tensors))

    def forward(x, weight, bias, initial_state):
        y = x.new_empty(x.shape)
        call(library.conv_forward, y, x, weight, bias, initial_state)
        return y

    def backward(dy, x, weight, bias, initial_state):
        batch, _, d = x.shape
        dx, dweight, dbias, dinitial = map(x.new_empty, (x.shape, (batch, 4, d), (batch, d), (batch, 3, d)))
        call(library.conv_backward, dy, x, weight, bias, initial_state, dx, dweight, dbias, dinitial)
        return dx, dweight.sum(0).t().contiguous(), dbias.sum(0), dinitial

    return forward, backward


def _register(device_type, library):
    functions = scan_functions(library)
    if device_type == 'cuda' and torch.cuda.is_available():     # nvcc may be too new for the driver
        ones = torch.ones(1, 1, 1, device='cuda')
        functions[0](ones, ones, ones[0], ones, ones, None, None, 64)
    functions += _conv_functions(library) if device_type == 'cpu' else ()
    for name, function in zip(OPERATORS, functions):
        _library.impl(name, function, device_type.upper())


# ---------------------------------------------------------------------------------------------
# The operators: what autograd and torch.compile see. A loaded kernel is what they do on its device.

def _new_outputs(u, delta, A, B, C, D, initial_state, chunk):
    starts = A.new_empty(u.shape[0], (u.shape[1] + chunk - 1) // chunk - 1, A.shape[1], A.shape[0])
    return u.new_empty(u.shape), _new_state(u, A), starts


def _new_state(u, A):
    return A.new_empty(u.shape[0], A.shape[1], A.shape[0]).transpose(1, 2)


def save(ctx, inputs, output):
    """What the backward pass of the scan needs: the inputs, and a state per chunk."""
    ctx.save_for_backward(*inputs[:-1], output[2])
    ctx.chunk = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def gradients(backward, ctx, dy, dfinal, _):
    """Gradients of scan_forward's inputs by `backward`, from those of y and the final state."""
    *inputs, starts = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    return *_only_for(inputs, backward(dy, dfinal, *inputs, starts, ctx.chunk)), None


def _only_for(inputs, gradients):
    return tuple(None if t is None else gradient for t, gradient in zip(inputs, gradients))


_TENSORS = 'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state'
_CONV = 'Tensor x, Tensor weight, Tensor bias, Tensor? initial_state'
OPERATORS = {   # name -> signature, and what the results look like
    'scan_forward': (f'({_TENSORS}, int chunk) -> (Tensor, Tensor, Tensor)', _new_outputs),
    'scan_backward': (f'(Tensor dy, Tensor? dfinal, {_TENSORS}, Tensor starts, int chunk) -> '
                      f'({", ".join(["Tensor"] * 7)})', lambda dy, dfinal, u, delta, A, B, C, *_: (
        *(t.new_empty(t.shape) for t in (u, delta, A, B, C)), A.new_empty(A.shape[0]), _new_state(u, A))),
    'conv_forward': (f'({_CONV}) -> Tensor', lambda x, *_: x.new_empty(x.shape)),
    'conv_backward': (f'(Tensor dy, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor)', lambda dy, x, w, bias, _: (
        *(t.new_empty(t.shape) for t in (x, w, bias)), x.new_empty(x.shape[0], 3, x.shape[2]))),
}
_library = torch.library.Library('scan_cuda', 'DEF')
for _name, (_signature, _results) in OPERATORS.items():
    _library.define(_name + _signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f'scan_cuda::{_name}', _results, lib=_library)
torch.library.register_autograd(
    'scan_cuda::scan_forward', lambda ctx, *grads: gradients(torch.ops.scan_cuda.scan_backward, ctx, *grads),
    setup_context=save, lib=_library)
torch.library.register_autograd(
    'scan_cuda::conv_forward',
    lambda ctx, dy: _only_for(ctx.saved_tensors, torch.ops.scan_cuda.conv_backward(dy, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs), lib=_library)
