"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2 and section 3.3):

    h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t          (eq. 2a with eq. 4, B discretised to delta B)
    y_t = C_t . h_t + D u_t                                      (eq. 2b)

    u, delta, y (batch, L, d_inner)    A (d_inner, d_state)    states (batch, d_inner, d_state)
    B, C        (batch, L, d_state)    D (d_inner,)

Four implementations of the same function, to be read in this order:
  1. `selective_scan_reference`, below: the recurrence as written above. Everything is tested against it.
  2. `selective_scan_fallback`, below: pure PyTorch, parallel over the sequence, for every device.
  3. scan_cpu.cpp: the CPU kernel.       4. scan_kernels.cu: the CUDA kernels (scan_binding.cpp binds them).
`selective_scan` takes the best one at hand: 3 and 4 are built by the first call that needs them (some 20 seconds,
then cached); when that fails, one line says why and what to do, and 2 does the work. SCAN_CUDA_BUILD=0
in the environment asks for 2 without trying. `python -m scan_cuda.bench` compares their speed.
"""

import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import torch

# Tokens between two saved states. The backward pass recomputes the states of one chunk from the saved state before
# it: a short chunk costs memory (d_state / CHUNK of u's), a long one cache. scan_kernels.cu is written for this one.
CHUNK = 64


# ---------------------------------------------------------------------------------------------
# 1. The reference

def selective_scan_reference(u, delta, A, B, C, D=None, initial_state=None):
    """The recurrence as written in the header, one token after the other: slow, clear, any device, float64 too.

    Shapes as in the header. Returns (y, final_state); differentiable through plain autograd.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)  # bf16 in and out, fp32 inside
    x, d, B, C = (t.to(dtype) for t in (u, delta, B, C))
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    ys = []
    for t in range(x.shape[1]):
        h = torch.exp(d[:, t, :, None] * A) * h + (d[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    y = torch.stack(ys, 1) + (0 if D is None else D * x)
    return y.to(u.dtype), h


# ---------------------------------------------------------------------------------------------
# 2. The fallback (products and sums, no einsum: autocast would make matrix products bf16)

def _scan(a, b):
    """All h_t = a_t h_{t-1} + b_t (h_{-1} = 0) along dim 1, in log2(L) parallel steps and 2 L multiply-adds.

    Two steps of the recurrence are again one: (a1, b1) then (a2, b2) is (a1 a2, a2 b1 + b2). So join the pairs,
    scan the half as long sequence (that is h at 1, 3, 5, ...), and take one step from there to 2, 4, 6, ...
    Only products and sums of the inputs, never a quotient: decay strong enough to underflow does no harm.
    """
    L = a.shape[1]
    if L == 1:
        return b
    even_a, odd_a = a[:, 0 : L - 1 : 2], a[:, 1::2]
    odd = _scan(even_a * odd_a, torch.addcmul(b[:, 1::2], odd_a, b[:, 0 : L - 1 : 2]))
    h = torch.empty_like(b)
    h[:, 1::2] = odd
    h[:, :1] = b[:, :1]
    h[:, 2::2] = torch.addcmul(b[:, 2::2], a[:, 2::2], odd[:, : (L - 1) // 2])
    return h


def _chunk_states(x, d, A, B, h):
    """The decays a_t and the states h_t of one chunk that starts from state h; both (batch, T, d_inner, d_state)."""
    a = torch.exp(d[..., None] * A)
    b = (d * x)[..., None] * B[:, :, None]
    b[:, 0] += a[:, 0] * h
    return a, _scan(a, b)


def _split_batch(u, A, chunk, tensors):
    """The tensors in parts of so many batch elements that the states of a chunk fit the cache (on a GPU: its memory)."""
    step = max(1, (2**20 if u.device.type == "cpu" else 2**26) // (chunk * A.numel()))
    return list(zip(*(itertools.repeat(None) if t is None else t.split(step) for t in tensors)))


def _fallback_forward(u, delta, A, B, C, D, initial_state, chunk):
    """Returns (y, final_state, starts): starts (batch, chunks - 1, d_state, d_inner) are the states before
    each chunk but the first, all that the backward pass keeps."""
    parts = _split_batch(u, A, chunk, (u, delta, B, C, initial_state))
    if len(parts) > 1:
        done = [_fallback_forward(x, d, A, b, c, D, h, chunk) for x, d, b, c, h in parts]
        return tuple(torch.cat(part) for part in zip(*done))
    h = A.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    y, starts = [], []
    for x, d, b, c in zip(*(t.split(chunk, 1) for t in (u, delta, B, C))):
        x, d, b, c = (t.to(A.dtype) for t in (x, d, b, c))
        if y:
            starts.append(h.transpose(1, 2))
        _, hs = _chunk_states(x, d, A, b, h)
        y.append(((hs * c[:, :, None]).sum(-1) + (0 if D is None else D * x)).to(u.dtype))
        h = hs[:, -1].clone(memory_format=torch.contiguous_format)
    starts = torch.stack(starts, 1) if starts else A.new_empty(u.shape[0], 0, *A.T.shape)
    return torch.cat(y, 1), h, starts.contiguous()


def _fallback_backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, chunk):
    """Gradients of u, delta, A, B, C, D, initial_state. With g_t = dLoss/dh_t the recurrence runs backwards:
    g_t = C_t dy_t + a_{t+1} g_{t+1}, the same scan on the reversed chunk."""
    parts = _split_batch(u, A, chunk, (dy, dfinal, u, delta, B, C, initial_state, starts))
    if len(parts) > 1:
        du, ddelta, dA, dB, dC, dD, dinitial = zip(*(_fallback_backward(e, g, x, d, A, b, c, D, h, s, chunk)
                                                     for e, g, x, d, b, c, h, s in parts))
        return (*map(torch.cat, (du, ddelta)), sum(dA), *map(torch.cat, (dB, dC)), sum(dD), torch.cat(dinitial))
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape)
    g = torch.zeros_like(initial_state) if dfinal is None else dfinal  # a_{t+1} g_{t+1} from the chunk behind
    dA, dD = torch.zeros_like(A), A.new_zeros(A.shape[0])
    du, ddelta, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, B, C))
    for k in reversed(range(0, u.shape[1], chunk)):
        now = slice(k, k + chunk)
        x, d, b, c, e = (t[:, now].to(A.dtype) for t in (u, delta, B, C, dy))
        start = starts[:, k // chunk - 1].transpose(1, 2) if k else initial_state
        a, h = _chunk_states(x, d, A, b, start)
        from_y = e[..., None] * c[:, :, None]
        from_y[:, -1] += g
        a_next = torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], 1)
        gs = _scan(a_next.flip(1), from_y.flip(1)).flip(1)
        g = a[:, 0] * gs[:, 0]
        decay = gs * a * torch.cat([start[:, None], h[:, :-1]], 1)  # gradient of delta_t A
        dx = (gs * b[:, :, None]).sum(-1)  # gradient of delta_t u_t
        du[:, now] = dx * d + (0 if D is None else D * e)
        ddelta[:, now] = dx * x + (decay * A).sum(-1)
        dB[:, now] = (gs * (d * x)[..., None]).sum(2)
        dC[:, now] = (h * e[..., None]).sum(2)
        dA += (decay * d[..., None]).sum((0, 1))
        dD += (e * x).sum((0, 1))
    return du, ddelta, dA, dB, dC, dD, g


# ---------------------------------------------------------------------------------------------
# The convolution before the scan

def causal_conv1d_reference(x, weight, bias, initial_state=None):
    """`causal_conv1d` in PyTorch: width shifted multiply-adds, any device, float64 too."""
    _, z = _convolve(x, weight, bias, initial_state)
    return torch.nn.functional.silu(z).to(x.dtype)


def _convolve(x, weight, bias, initial_state):
    width, L = weight.shape[1], x.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if initial_state is None else initial_state
    x = torch.cat([before, x], 1).to(weight.dtype)
    return x, sum((weight[:, k] * x[:, k : k + L] for k in range(width)), bias)


def _conv_forward(x, weight, bias, initial_state):
    return causal_conv1d_reference(x, weight, bias, initial_state)


def _conv_backward(dy, x, weight, bias, initial_state):
    L, before = x.shape[1], weight.shape[1] - 1
    padded, z = _convolve(x, weight, bias, initial_state)
    s = torch.sigmoid(z)
    dz = dy * s * (1 + z * (1 - s))
    dpadded, dweight = torch.zeros_like(padded), torch.empty_like(weight)
    for k in range(before + 1):
        dpadded[:, k : k + L] += weight[:, k] * dz
        dweight[:, k] = (dz * padded[:, k : k + L]).sum((0, 1))
    dinitial, dx = dpadded.to(x.dtype).split([before, L], 1)
    return dx.contiguous(), dweight, dz.sum((0, 1)), dinitial.contiguous()


# ---------------------------------------------------------------------------------------------
# 3. and 4. Building the kernels

_HERE = Path(__file__).parent
_SOURCES = {"cpu": ["scan_cpu.cpp"], "cuda": ["scan_binding.cpp", "scan_kernels.cu"]}
_loaded = {}  # device type -> bool: its kernel is there; False: it cannot be built, and a line said so
_lock = threading.Lock()


def _load(device_type):
    """Build (once) and load the kernel of "cpu" or "cuda", which registers itself for that device.
    Returns whether there is one; a failure prints one line on stderr and is not tried again."""
    with _lock:
        if device_type not in _loaded:
            _loaded[device_type] = False
            if device_type in _SOURCES and os.environ.get("SCAN_CUDA_BUILD") != "0" and not torch.version.hip:
                try:
                    _build(device_type)
                    _loaded[device_type] = True
                except Exception as error:  # whatever it is, it must not be in the way
                    print(f"scan_cuda: no {device_type} kernel, the PyTorch fallback works instead (slower): "
                          f"{_explain(error)}", file=sys.stderr)
        return _loaded[device_type]


def _build(device_type):
    """Load the kernel from the cache; if it is not there, build it first."""
    # The cache may be shared between machines: a kernel is for one source, torch and processor.
    sources = [_HERE / name for name in _SOURCES[device_type]]
    target = _cpu_model() if device_type == "cpu" else "sm_%d%d" % torch.cuda.get_device_capability()
    key = hashlib.sha256("\n".join([torch.__version__, target, *(s.read_text() for s in sources)]).encode())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"))
    folder /= f"scan_{device_type}_{key.hexdigest()[:12]}"
    ready = folder / "library"  # its name, written last: a killed build does not leave half a library to be loaded
    if ready.exists():
        return torch.ops.load_library(folder / ready.read_text())
    if device_type == "cpu" and sys.platform == "win32":
        raise _Unbuildable("Visual C++ lacks the vector types of gcc and clang; remedy: Linux, for instance in WSL")
    cxx = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    if not shutil.which(cxx.split()[0]):
        raise _Unbuildable(f"no C++ compiler ({cxx}); remedy: install one (Debian, Ubuntu, Colab: apt install g++; "
                           "Mac: xcode-select --install) or name it in CXX")
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # ninja of a venv that is not activated
    if not shutil.which("ninja"):
        raise _Unbuildable("no ninja; remedy: pip install ninja")
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise _Unbuildable(f"{error}; remedy: pip install setuptools")
    if device_type == "cuda":
        _check_nvcc(cpp_extension.CUDA_HOME)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "building", "w")
    except OSError as error:
        raise _Unbuildable(f"cannot write to {folder} ({error.strerror}); remedy: set TORCH_EXTENSIONS_DIR "
                           "to a folder you may write to")
    with lock:
        if sys.platform != "win32":
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process builds, the others wait; a killed one lets go
            (folder / "lock").unlink(missing_ok=True)  # torch's own lock, which a killed build leaves behind
        name = f"scan_{device_type}"  # load() finds in an instant that there is nothing to do, if another has built
        cpp_extension.load(name, [str(s) for s in sources], build_directory=str(folder), is_python_module=False,
                           extra_cflags=_cpu_flags(cxx) if device_type == "cpu" else [],
                           extra_cuda_cflags=["-O3", f"-arch={target}"])
        ready.write_text(name + cpp_extension.LIB_EXT)


class _Unbuildable(Exception):
    """A reason with its remedy, to be shown as it is."""


def _check_nvcc(home):
    wanted = torch.version.cuda
    remedy = f"remedy: install the CUDA toolkit {wanted} and set CUDA_HOME to it"
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else None
    if not nvcc:
        raise _Unbuildable(f"no nvcc; {remedy}")
    found = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if found and found[1] != wanted.split(".")[0]:
        raise _Unbuildable(f"nvcc is of CUDA {found[1]}.{found[2]}, torch of CUDA {wanted}; {remedy}")


def _explain(error):
    if isinstance(error, _Unbuildable):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    line = next((line for line in lines[1:] if re.search(r"\b(fatal )?error\b", line, re.IGNORECASE)), lines[0])
    return f"{line[:300]}; remedy: a C++ compiler that torch {torch.__version__} accepts, named in CXX, or SCAN_CUDA_BUILD=0"


def _cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.platform() + platform.processor()


def _cpu_flags(cxx):
    run = lambda *flags: subprocess.run([*cxx.split(), *flags], capture_output=True, text=True)
    flags = ["-O3"]
    if run("-march=native", "-x", "c++", "-fsyntax-only", os.devnull).returncode == 0:
        flags += ["-march=native"]
    if sys.platform == "linux" and "clang" not in run("--version").stdout:
        flags += ["-fopenmp"]  # gcc's: torch brings its runtime. clang's would need libomp: one thread there
    return flags


# ---------------------------------------------------------------------------------------------
# The operators: what torch.compile and autograd see. Their default kernel tries to build the fast one, which
# registers itself for its device, and calls again; from then on the dispatcher goes there directly.

_lib = torch.library.Library("scan_cuda", "DEF")


def _define(signature, default, fake):
    name = signature[: signature.index("(")]

    def build_or_default(*args):
        if _load(args[0].device.type):
            return getattr(torch.ops.scan_cuda, name)(*args)
        return default(*args)

    _lib.define(signature, tags=torch.Tag.pt2_compliant_tag)
    _lib.impl(name, build_or_default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"scan_cuda::{name}", fake, lib=_lib)


def _fake_forward(u, delta, A, B, C, D, initial_state, chunk):
    batch, L, d_inner = u.shape
    return (u.new_empty(u.shape), A.new_empty(batch, *A.shape),
            A.new_empty(batch, (L + chunk - 1) // chunk - 1, A.shape[1], d_inner))


def _fake_backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, chunk):
    return (*(t.new_empty(t.shape) for t in (u, delta, A, B, C)), A.new_empty(A.shape[0]), A.new_empty(u.shape[0], *A.shape))


_define("scan_forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, "
        "int chunk) -> (Tensor, Tensor, Tensor)", _fallback_forward, _fake_forward)
_define("scan_backward(Tensor dy, Tensor? dfinal, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
        "Tensor? initial_state, Tensor starts, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fallback_backward, _fake_backward)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[2])
    ctx.chunk = inputs[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, dy, dfinal, _, backward=torch.ops.scan_cuda.scan_backward):
    u, delta, A, B, C, D, initial_state, starts = ctx.saved_tensors
    dy = torch.zeros_like(u) if dy is None else dy
    *grads, dD, dinitial = backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, ctx.chunk)
    return *grads, None if D is None else dD, None if initial_state is None else dinitial, None


torch.library.register_autograd("scan_cuda::scan_forward", _differentiate, setup_context=_save, lib=_lib)


class _Fallback(torch.autograd.Function):
    forward, setup_context = staticmethod(_fallback_forward), staticmethod(_save)
    backward = staticmethod(lambda ctx, *grads: _differentiate(ctx, *grads, backward=_fallback_backward))


def _fake_conv_backward(dy, x, weight, bias, initial_state):
    return (x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape),
            x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2]))


_define("conv_forward(Tensor x, Tensor weight, Tensor bias, Tensor? initial_state) -> Tensor",
        _conv_forward, lambda x, *_: x.new_empty(x.shape))
_define("conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? initial_state) "
        "-> (Tensor, Tensor, Tensor, Tensor)", _conv_backward, _fake_conv_backward)


def _conv_differentiate(ctx, dy):
    dx, dweight, dbias, dinitial = torch.ops.scan_cuda.conv_backward(dy, *ctx.saved_tensors)
    return dx, dweight, dbias, None if ctx.saved_tensors[3] is None else dinitial


torch.library.register_autograd("scan_cuda::conv_forward", _conv_differentiate, lib=_lib,
                                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


# ---------------------------------------------------------------------------------------------
# What the model calls

def selective_scan_fallback(u, delta, A, B, C, D=None, initial_state=None):
    """`selective_scan` in pure PyTorch on any device, float64 too: chunks one after the other, the tokens of a
    chunk in parallel. Needs memory for the states of one chunk and for one state per chunk."""
    _check(u, delta, A, B, C, D, initial_state)
    return _Fallback.apply(u, delta, A, B, C, D, initial_state, CHUNK)[:2]


def selective_scan(u, delta, A, B, C, D=None, initial_state=None):
    """h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t,  y_t = C_t . h_t + D u_t  (Algorithm 2 of the Mamba paper).

    u, delta (batch, L, d_inner), B, C (batch, L, d_state): fp32 or bf16, all four the same; L >= 1, d_state 1 to 64.
    A (d_inner, d_state), D (d_inner,) or None (no skip), initial_state (batch, d_inner, d_state) or None (zeros): fp32.
    float64 everywhere is for checks; the reference does it. delta is the step size, positive after its softplus.
    Returns y, like u, and final_state, fp32, like initial_state. Gradients for every input, through both outputs.
    Raises ValueError, one line, for a wrong shape, dtype or device.
    """
    _check(u, delta, A, B, C, D, initial_state)
    if u.dtype == torch.float64:
        return selective_scan_reference(u, delta, A, B, C, D, initial_state)
    return torch.ops.scan_cuda.scan_forward(u, delta, A, B, C, D, initial_state, CHUNK)[:2]


def _check(u, delta, A, B, C, D, initial_state):
    if u.dim() != 3 or A.dim() != 2 or u.shape[1] < 1 or not 1 <= A.shape[1] <= 64:
        raise ValueError("selective_scan: u must be (batch, L >= 1, d_inner) and A (d_inner, d_state from 1 to 64), "
                         f"got {tuple(u.shape)} and {tuple(A.shape)}")
    if u.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"selective_scan: u must be float32 or bfloat16 (float64 for checks), got {u.dtype}")
    batch, L, d_inner = u.shape
    d_state = A.shape[1]
    exact = torch.float64 if u.dtype == torch.float64 else torch.float32
    for name, t, shape, dtype in (("delta", delta, (batch, L, d_inner), u.dtype), ("A", A, (d_inner, d_state), exact),
                                  ("B", B, (batch, L, d_state), u.dtype), ("C", C, (batch, L, d_state), u.dtype),
                                  ("D", D, (d_inner,), exact),
                                  ("initial_state", initial_state, (batch, d_inner, d_state), exact)):
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != u.device):
            raise ValueError(f"selective_scan: {name} must be {dtype} of shape {tuple(shape)} on {u.device} to go with "
                             f"u {tuple(u.shape)} and A {tuple(A.shape)}, got {t.dtype} {tuple(t.shape)} on {t.device}")


def causal_conv1d(x, weight, bias, initial_state=None):
    """y_t = silu(bias + sum over k of weight[:, k] * x_{t - width + 1 + k}): each channel by itself, never ahead.

    x, y (batch, L, d), initial_state the width - 1 inputs before the first, (batch, width - 1, d), or None (zeros): fp32
    or bf16; weight (d, width), bias (d,): fp32; float64 everywhere for checks. Gradients for every input.
    On the CPU width 4 (Mamba's) is one fused kernel; the rest is PyTorch. Raises ValueError, one line, for wrong inputs.
    """
    batch, L, d = x.shape if x.dim() == 3 else (0, 0, 0)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    before = (batch, weight.shape[-1] - 1, d)
    for name, t, shape, dtype in (("x", x, (batch, L, d), x.dtype), ("weight", weight, (d, weight.shape[-1]), exact),
                                  ("bias", bias, (d,), exact), ("initial_state", initial_state, before, x.dtype)):
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != x.device):
            raise ValueError(f"causal_conv1d: {name} must be {dtype} of shape {tuple(shape)} on {x.device} to go with "
                             f"x {tuple(x.shape)}, got {t.dtype} {tuple(t.shape)} on {t.device}")
    if x.device.type == "cpu" and weight.shape[1] == 4 and x.dtype != torch.float64:
        return torch.ops.scan_cuda.conv_forward(x, weight, bias, initial_state)
    return causal_conv1d_reference(x, weight, bias, initial_state)
