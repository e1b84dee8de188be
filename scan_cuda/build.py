"""Builds the kernels when they are first needed, calls them, and registers the operators that autograd and
torch.compile see.

A kernel is a shared library of plain C functions (scan.h) made by one call of a compiler, without torch's headers: c++
for the CPU, nvcc for CUDA, no GPU needed. It is cached in TORCH_EXTENSIONS_DIR (default ~/.cache/torch_extensions).
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


def load(device_type):
    """Build (once) and load the kernel of 'cpu' or 'cuda', and register it for that device. Returns whether there
    is one; a failure prints one line on stderr and is not tried again."""
    with _lock:
        if device_type not in loaded:
            loaded[device_type] = False
            if device_type in SOURCES and os.environ.get('SCAN_CUDA_BUILD') != '0' and not torch.version.hip:
                try:
                    register_kernel(device_type, ctypes.CDLL(str(_build(device_type))))
                    loaded[device_type] = True
                except Exception as error:      # of any kind: a failed build must not stop the program
                    print(f'scan_cuda: no {device_type} kernel, so the slower PyTorch fallback is used: {error}',
                          file=sys.stderr)
        return loaded[device_type]


def _build(device_type):
    """The kernel's library, from the cache or freshly built. Raises RuntimeError with a reason and a remedy."""
    command = _cpu_command() if device_type == 'cpu' else _cuda_command()
    source = HERE / SOURCES[device_type]
    # The cache may be shared between machines: a library is for one source, command and processor.
    key = '\n'.join([_processor(), *command, (HERE / 'scan.h').read_text(), source.read_text()])
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folder = Path(os.environ.get('TORCH_EXTENSIONS_DIR') or Path(cache, 'torch_extensions'))
    library = folder / f'scan_{device_type}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.so'
    if library.exists():
        return library
    if not shutil.which(command[0]):
        raise RuntimeError(f'no C++ compiler ({command[0]}); remedy: install one (Debian, Ubuntu, Colab: '
                           'apt install g++; Mac: xcode-select --install) or name it in CXX')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(library.with_suffix('.lock'))  # one process builds, others wait; a killed one lets go
        with lock:
            if not library.exists():
                half = library.with_suffix('.half')     # renamed when it is whole: a killed build leaves no library
                run = subprocess.run([*command, '-o', half, source], capture_output=True, text=True)
                if run.returncode:
                    lines = (run.stderr + run.stdout).strip().splitlines() or ['the compiler failed']
                    line = next((line for line in lines if re.search(r'\berror\b', line, re.IGNORECASE)), lines[0])
                    raise RuntimeError(f'{line.strip()[:300]}; remedy: another compiler, named in CXX, or '
                                       'SCAN_CUDA_BUILD=0')
                half.replace(library)
    except OSError as error:
        raise RuntimeError(f'cannot write to {folder} ({error.strerror}); remedy: set TORCH_EXTENSIONS_DIR to a '
                           'folder you may write to')
    return library


def _processor():
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return '\n'.join(sorted({line for line in lines if line.startswith(('model name', 'flags', 'Features'))}))
    except OSError:
        return platform.platform() + platform.processor()


def _cpu_command():
    cxx = (os.environ.get('CXX') or 'c++').split()
    command = [*cxx, '-std=c++17', '-O3', '-shared', '-fPIC']
    if not shutil.which(cxx[0]):
        return command
    run = lambda *flags: subprocess.run([*cxx, *flags], capture_output=True, text=True)
    if run('-march=native', '-x', 'c++', '-fsyntax-only', os.devnull).returncode == 0:
        command += ['-march=native']
    if sys.platform == 'linux' and 'clang' not in run('--version').stdout:
        command += ['-fopenmp']     # gcc's runtime comes with torch; clang would need libomp: one thread there
    return command


def _cuda_command():
    """nvcc for the GPUs that are here, or without one for those of TORCH_CUDA_ARCH_LIST ('8.0;9.0')."""
    home, wanted = os.environ.get('CUDA_HOME'), torch.version.cuda or ''
    nvcc = shutil.which('nvcc', path=f'{home}/bin' if home else f'{os.environ["PATH"]}:/usr/local/cuda/bin')
    remedy = f'remedy: install the CUDA toolkit {wanted} and set CUDA_HOME to it'
    if not nvcc:
        raise RuntimeError(f'no nvcc; {remedy}')
    release = re.search(r'release (\d+)(\.\d+)', subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout)
    if release and int(release[1]) > int(wanted.split('.')[0] or 0):     # the driver might be too old for it
        raise RuntimeError(f'nvcc is of CUDA {release[1]}{release[2]}, torch of CUDA {wanted}; {remedy}')
    if torch.cuda.is_available():
        cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    else:
        cards = set(re.findall(r'(\d+)\.(\d)', os.environ.get('TORCH_CUDA_ARCH_LIST', '')))
    if not cards:
        raise RuntimeError('no GPU to build for; remedy: name its architecture, as in TORCH_CUDA_ARCH_LIST=8.0')
    architectures = sorted(f'{major}{minor}' for major, minor in cards)
    return [nvcc, '-std=c++17', '-O3', '-shared', '-Xcompiler=-fPIC',
            *(f'-gencode=arch=compute_{a},code=sm_{a}' for a in architectures)]


# ---------------------------------------------------------------------------------------------
# Calling a kernel

class Scan(ctypes.Structure):
    """scan.h's."""
    _fields_ = ([(name, ctypes.c_int64) for name in 'batch L d_inner N B_stride C_stride bf16 threads'.split()] +
                [(name, ctypes.c_void_p) for name in ('u delta B C A D initial y final_state starts dy dfinal '
                                                      'du ddelta dA dB dC dD dinitial').split()])


def scan_functions(library, prefix='scan_'):
    """The operators scan_forward and scan_backward, as functions, by the kernels of scan.h in `library`."""
    parts, channels, takes_bf16 = (ctypes.c_int.in_dll(library, name).value
                                   for name in ('scan_parts', 'scan_channels', 'scan_takes_bf16'))

    def values(*tensors):
        return [t if takes_bf16 else t.float() for t in tensors]

    def call(function, u, delta, A, B, C, D, initial_state, **others):
        B, C = (t if t.stride(2) == 1 and t.stride(0) == t.shape[1] * t.stride(1) else t.contiguous() for t in (B, C))
        tensors = dict(u=u.contiguous(), delta=delta.contiguous(), B=B, C=C, A=A.t().contiguous(),
                       D=None if D is None else D.contiguous(), initial=_turn(initial_state), **others)
        pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
        scan = Scan(*u.shape, A.shape[1], B.stride(1), C.stride(1), u.dtype == torch.bfloat16,
                    _threads(u.numel() * A.shape[1]), **pointers)
        with torch.cuda.device_of(u):
            stream = torch.cuda.current_stream().cuda_stream if u.is_cuda else 0
            if error := getattr(library, prefix + function)(ctypes.byref(scan), ctypes.c_void_p(stream)):
                raise RuntimeError(f'the kernel ended with CUDA error {error}')

    def forward(u, delta, A, B, C, D, initial_state, chunk):
        dtype, (u, delta, B, C) = u.dtype, values(u, delta, B, C)
        y, final_state, starts = _fake_forward(u, delta, A, B, C, D, initial_state, chunk)
        call('forward', u, delta, A, B, C, D, initial_state, y=y, final_state=final_state, starts=starts)
        return y.to(dtype), final_state, starts

    def backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, chunk):
        dtype, (dy, u, delta, B, C) = u.dtype, values(dy, u, delta, B, C)
        (batch, L, d_inner), N, blocks = u.shape, A.shape[1], -(-u.shape[2] // channels)
        du, ddelta, *_, dinitial = _fake_backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, chunk)
        dA, dD = A.new_zeros(batch, parts, N, d_inner), A.new_zeros(batch, parts, d_inner)
        dB, dC = A.new_zeros(2, blocks, batch, L, N)
        call('backward', u, delta, A, B, C, D, initial_state, starts=starts, dy=dy.contiguous(), dfinal=_turn(dfinal),
             du=du, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dinitial=dinitial)
        return (du.to(dtype), ddelta.to(dtype), dA.sum((0, 1)).t().contiguous(), dB.sum(0).to(dtype),
                dC.sum(0).to(dtype), dD.sum((0, 1)), dinitial)

    return forward, backward


def _turn(state):
    """(batch, d_inner, d_state) as it lies in memory for a kernel: (batch, d_state, d_inner). No copy for our own."""
    return None if state is None else state.transpose(1, 2).contiguous()


def _threads(work):
    return 1 if work < 200_000 else torch.get_num_threads()     # less is done before they are awake


def _conv_functions(library):
    def call(function, *tensors):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        batch, L, d = tensors[0].shape
        function(*map(ctypes.c_int64, (batch, L, d, _threads(16 * batch * L * d))), *pointers)

    def forward(x, weight, bias):       # x (batch, 3 + L, d)
        y = x.new_empty(len(x), x.shape[1] - 3, x.shape[2])
        call(library.conv_forward, y, x.contiguous(), weight.t().contiguous(), bias.contiguous())
        return y

    def backward(dy, x, weight, bias):
        dx, dw, dbias = torch.zeros_like(x), x.new_zeros(len(x), 4, x.shape[2]), x.new_zeros(len(x), x.shape[2])
        call(library.conv_backward, dy.contiguous(), x.contiguous(), weight.t().contiguous(), bias.contiguous(),
             dx, dw, dbias)
        return dx, dw.sum(0).t().contiguous(), dbias.sum(0)

    return forward, backward


def register_kernel(device_type, library):
    forward, backward = scan_functions(library)
    if device_type == 'cuda' and torch.cuda.is_available():     # does it run here? (too old a driver, another card)
        forward(*(torch.ones(shape, device='cuda') for shape in ((1, 1, 1),) * 2 + ((1, 1),) + ((1, 1, 1),) * 2),
                None, None, 64)
    _library.impl('scan_forward', forward, device_type.upper())
    _library.impl('scan_backward', backward, device_type.upper())
    if device_type == 'cpu':
        conv_forward, conv_backward = _conv_functions(library)
        _library.impl('conv_forward', conv_forward, 'CPU')
        _library.impl('conv_backward', conv_backward, 'CPU')


# ---------------------------------------------------------------------------------------------
# The operators. Their default implementation tries to build the kernel, which is then registered for its device, and
# calls the operator again; from then on the dispatcher goes to the kernel directly.

_library = torch.library.Library('scan_cuda', 'DEF')


def _define(signature, default, fake):
    name = signature[:signature.index('(')]

    def build_or_default(*args):
        if load(args[0].device.type):
            return getattr(torch.ops.scan_cuda, name)(*args)
        return default(*args)

    _library.define(signature, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, build_or_default, 'CompositeExplicitAutograd')
    torch.library.register_fake(f'scan_cuda::{name}', fake, lib=_library)


def define_operators(forward, backward, conv_forward, conv_backward):
    """Define the operators scan_cuda::*; these functions are what runs where there is no kernel."""
    inputs = 'Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state'
    _define(f'scan_forward({inputs}, int chunk) -> (Tensor, Tensor, Tensor)', forward, _fake_forward)
    _define(f'scan_backward(Tensor dy, Tensor? dfinal, {inputs}, Tensor starts, int chunk) -> '
            f'({", ".join(["Tensor"] * 7)})', backward, _fake_backward)
    _define('conv_forward(Tensor x, Tensor weight, Tensor bias) -> Tensor', conv_forward,
            lambda x, weight, bias: x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2]))
    _define('conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)',
            conv_backward, lambda dy, *inputs: tuple(t.new_empty(t.shape) for t in inputs))
    ops = torch.ops.scan_cuda
    torch.library.register_autograd(
        'scan_cuda::scan_forward', lambda ctx, *grads: gradients(ops.scan_backward, ctx, *grads),
        setup_context=save, lib=_library)
    torch.library.register_autograd(
        'scan_cuda::conv_forward', lambda ctx, dy: ops.conv_backward(dy, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs), lib=_library)


def save(ctx, inputs, output):
    """What the backward pass of the scan needs: the inputs, and a state per chunk."""
    ctx.save_for_backward(*inputs[:-1], output[2])
    ctx.chunk = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def gradients(backward, ctx, dy, dfinal, _):
    """Gradients of scan_forward's inputs by `backward`, from those of y and the final state."""
    u, delta, A, B, C, D, initial_state, starts = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    *grads, dD, dinitial = backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, ctx.chunk)
    return *grads, None if D is None else dD, None if initial_state is None else dinitial, None


def _fake_forward(u, delta, A, B, C, D, initial_state, chunk):
    chunks = (u.shape[1] + chunk - 1) // chunk
    return u.new_empty(u.shape), _new_state(u, A), A.new_empty(u.shape[0], chunks - 1, A.shape[1], A.shape[0])


def _fake_backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, chunk):
    return (*(t.new_empty(t.shape) for t in (u, delta, A, B, C)), A.new_empty(A.shape[0]), _new_state(u, A))


def _new_state(u, A):   # (batch, d_inner, d_state), in memory (batch, d_state, d_inner)
    return A.new_empty(u.shape[0], A.shape[1], A.shape[0]).transpose(1, 2)
