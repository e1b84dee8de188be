"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2 and section 3.3).

A state space model dh/dt = A h + B u, y = C h + D u, in steps of length delta: over one step the
state decays by a factor of exp(delta A) and takes in delta B u (in equation 4 of the paper, the
factor of B u is less simple; the paper's code uses delta, too). It is *selective* because delta, B
and C are computed from each token:

    h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t
    y_t = C_t . h_t + D u_t

    u, delta, y  (batch, L, d_inner)      A  (d_inner, d_state)
    B, C         (batch, L, d_state)      D  (d_inner,)
    states h     (batch, d_inner, d_state)

From plain to fast:
  1. `selective_scan_reference`: the recurrence as written above, in a loop. Everything is tested
     against it, and it is all you need to understand.
  2. `pairwise_scan`, below the line: the recurrence in about 2 log2(L) parallel rounds.
  3. `selective_scan_fallback`: the pairs in chunks, with its own backward pass: little memory, any
     device.
  4. scan_cpu.cpp: the CPU kernel.       5. scan_kernels.cu: the CUDA kernels.
`selective_scan` uses 4 or 5; the first call builds them (some 20 seconds, then cached: build.py).
If that fails, one line says why and what to do, and 3 is used. SCAN_CUDA_BUILD=0 in the environment
asks for 3 at once.
"""
import torch
import torch.nn.functional as F

from scan_cuda import build


def selective_scan_reference(u, delta, A, B, C, D, initial_state):
    """The recurrence as written above, one token after the other: slow, clear, any device, float64
    too. Returns (y, final_state). Its gradients are autograd's, of any order."""
    dtype = u.dtype
    u, delta, B, C = (t.to(A.dtype) for t in (u, delta, B, C))      # bf16 in and out, fp32 inside
    h = initial_state                                               # (batch, d_inner, d_state)
    ys = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)                 # (batch, d_inner, d_state)
        taken_in = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None]
        h = decay * h + taken_in
        ys.append((h * C[:, t, None]).sum(-1) + D * u[:, t])        # (batch, d_inner)
    return torch.stack(ys, 1).to(dtype), h


@torch.compiler.allow_in_graph      # torch.compile does not look inside
def selective_scan(u, delta, A, B, C, D, initial_state):
    """h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t,  y_t = C_t . h_t + D u_t  (Algorithm 2).

    u, delta (batch, L, d_inner), B, C (batch, L, d_state): all fp32 or all bf16; L >= 1,
    d_state <= 64. A (d_inner, d_state), D (d_inner,), initial_state (batch, d_inner, d_state):
    fp32.
    If all of them are float64 (for tests), the reference computes the result.
    Returns y, shaped like u, and final_state, shaped like initial_state, fp32. Gradients flow to
    every input through both. Raises ValueError for a wrong shape, dtype or device.
    """
    inputs = u, delta, A, B, C, D, initial_state
    # check (of shapes and dtypes), ScanKernel and the fallback are below the line
    check('selective_scan', SCAN, inputs, {})
    if u.dtype == torch.float64:
        return selective_scan_reference(*inputs)
    if build.load(u.device.type):
        return ScanKernel.apply(*inputs)
    return selective_scan_fallback(*inputs)


@torch.compiler.allow_in_graph
def causal_conv1d(x, weight, bias, initial_state):
    """y_t = silu(bias + sum over k of weight[:, k] * x_{t - width + 1 + k}), channel by channel.

    x, y (batch, L, d): fp32 or bf16; weight (d, width), bias (d,): fp32; initial_state the
    width - 1 inputs before the first, (batch, width - 1, d); float64 everywhere for checks.
    Gradients flow to every input. On a CPU, width 4 (Mamba's)
    is one fused kernel, ten times as fast as F.conv1d; everything else is F.conv1d. Raises
    ValueError, one line, for a wrong shape, dtype or device.
    """
    initial_state = initial_state.to(weight.dtype)
    inputs = x, weight, bias, initial_state
    check('causal_conv1d', CONV, inputs, {'width - 1': weight.shape[-1] - 1})
    fused = x.device.type == 'cpu' and weight.shape[1] == 4 and weight.dtype == torch.float32
    if fused and build.load('cpu'):
        return ConvKernel.apply(x.float(), weight, bias, initial_state).to(x.dtype)
    return causal_conv1d_reference(*inputs)


def causal_conv1d_reference(x, weight, bias, initial_state):
    """`causal_conv1d` by F.conv1d, a group per channel: any device (on a GPU it is cuDNN's)."""
    padded = torch.cat([initial_state, x], 1).to(weight.dtype)      # (batch, width - 1 + L, d)
    padded = padded.transpose(1, 2)
    z = F.conv1d(padded, weight[:, None], bias, groups=len(weight))     # (batch, d, L)
    return F.silu(z).transpose(1, 2).to(x.dtype)


# ==================================================================================================
# The recurrence in parallel.

def pairwise_scan(a, b):
    """All h_t = a_t h_{t-1} + b_t with h_{-1} = 0; a, b, h (batch, L, ...). Blelloch's (1990)
    parallel scan. In Mamba, a_t = exp(delta_t A) and b_t = delta_t u_t B_t. (An initial state is
    added as b_0 + a_0 h_{-1}.)

    Two steps in a row are again one such step: a2 (a1 h + b1) + b2 = (a1 a2) h + (a2 b1 + b2). So
    join the pairs (0, 1), (2, 3), ...; scan the result, half as long: this gives h_1, h_3, ...; and
    take one step from each of those to h_2, h_4, ... With L = 5:

        a, b          0     1     2     3     4
        join             01          23             (4 has no partner)
        scan             h_1         h_3
        step         h_0      h_2         h_4       h_0 = b_0

    About 2 log2(L) parallel rounds and 3 L multiplications. Only sums and products of the inputs,
    never a quotient: decay so strong that it underflows does no harm.
    """
    L = a.shape[1]
    if L == 1:
        return b
    a1, a2 = a[:, 0:L - 1:2], a[:, 1::2]                            # of each pair
    b1, b2 = b[:, 0:L - 1:2], b[:, 1::2]
    odd = pairwise_scan(a1 * a2, torch.addcmul(b2, a2, b1))
    h = torch.empty_like(b)
    h[:, 0] = b[:, 0]
    h[:, 1::2] = odd
    h[:, 2::2] = torch.addcmul(b[:, 2::2], a[:, 2::2], odd[:, :(L - 1) // 2])
    return h


# --------------------------------------------------------------------------------------------------
# The fallback: chunk after chunk, the tokens of a chunk in parallel. Its backward pass, and the
# kernels', walk through the sequence from the last token to the first. (Sums and products, no
# einsum: autocast would compute matrix products in bf16.)

CHUNK = 64      # tokens whose states are held at once


@torch.compiler.allow_in_graph
def selective_scan_fallback(u, delta, A, B, C, D, initial_state):
    """`selective_scan` in PyTorch alone: any device, float64 too, second derivatives too."""
    exact = (t.to(A.dtype) for t in (u, delta, A, B, C, initial_state))
    y, states = Fallback.apply(*exact)
    return (y + D * u).to(u.dtype), states[:, -1]


class Fallback(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, initial_state):
        """Returns y without D u, and the states before, between and after the chunks, (batch,
        chunks + 1, d_inner, d_state): all that the backward pass needs besides the inputs."""
        y, states = torch.empty_like(u), [initial_state]
        for first in range(0, u.shape[1], CHUNK):
            now = slice(first, first + CHUNK)
            _, h = states_of_chunk(u[:, now], delta[:, now], A, B[:, now], states[-1])
            y[:, now] = (h * C[:, now, None]).sum(-1)
            states.append(h[:, -1].clone())
        states = torch.stack(states, 1)
        ctx.save_for_backward(u, delta, A, B, C, states)
        return y, states

    @staticmethod
    def backward(ctx, dy, dstates):
        """With g_t = dLoss/dh_t the recurrence runs backwards: g_t = C_t dy_t + a_{t+1} g_{t+1},
        a_t being exp(delta_t A). This is the same scan on the reversed chunk."""
        u, delta, A, B, C, states = ctx.saved_tensors
        du, ddelta, dA, dB, dC = (torch.zeros_like(t) for t in (u, delta, A, B, C))
        g = dstates[:, -1]                                      # what arrives from behind
        for first in reversed(range(0, u.shape[1], CHUNK)):
            k, now = first // CHUNK, slice(first, first + CHUNK)
            x, d, b, c, e = (t[:, now] for t in (u, delta, B, C, dy))
            a, h = states_of_chunk(x, d, A, b, states[:, k])    # (batch, T, d_inner, d_state)
            before = torch.cat([states[:, k, None], h[:, :-1]], 1)
            from_y = e[..., None] * c[:, :, None]
            from_y[:, -1] += g
            a_next = a.roll(-1, 1)                              # the last is never used
            gs = pairwise_scan(a_next.flip(1), from_y.flip(1)).flip(1)
            decay = gs * a * before                             # gradient of delta_t A
            taken_in = (gs * b[:, :, None]).sum(-1)             # gradient of delta_t u_t
            du[:, now] = taken_in * d
            ddelta[:, now] = taken_in * x + (decay * A).sum(-1)
            dA += (decay * d[..., None]).sum((0, 1))
            dB[:, now] = (gs * (d * x)[..., None]).sum(2)
            dC[:, now] = (h * e[..., None]).sum(2)
            g = a[:, 0] * gs[:, 0] + dstates[:, k]
        return du, ddelta, dA, dB, dC, g


def states_of_chunk(u, delta, A, B, h):
    """Decays a_t and states h_t that follow the state h, both (batch, T, d_inner, d_state)."""
    a = torch.exp(delta[..., None] * A)
    b = (delta * u)[..., None] * B[:, :, None]
    b[:, 0] += a[:, 0] * h
    return a, pairwise_scan(a, b)


# --------------------------------------------------------------------------------------------------
# The kernels: the operators of scan_cpu.cpp and scan_cuda.cpp, and their gradients. Values and
# gradients are the reference's, up to rounding, where delta >= 0 and A <= 0, as in Mamba, and
# nothing overflows fp32. With a negative delta or a positive A the state grows exponentially, and
# they agree only while it stays finite. NaN, infinite or overflowing values raise no error; results
# and gradients may then differ from the reference's. Second derivatives are an error.

class ScanKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        y, final_state, starts = torch.ops.scan_cuda.scan_forward(*inputs)
        ctx.save_for_backward(*inputs, starts)
        return y, final_state

    @staticmethod
    def backward(ctx, dy, dfinal):
        return torch.ops.scan_cuda.scan_backward(dy, dfinal, *ctx.saved_tensors)


class ConvKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return torch.ops.scan_cuda.conv_forward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        return torch.ops.scan_cuda.conv_backward(dy, *ctx.saved_tensors)


# --------------------------------------------------------------------------------------------------
# Checks: a kernel would read elsewhere, and PyTorch would broadcast.

SCAN = {'u': 'batch, L, d_inner', 'delta': 'batch, L, d_inner', 'A': 'd_inner, d_state',
        'B': 'batch, L, d_state', 'C': 'batch, L, d_state', 'D': 'd_inner',
        'initial_state': 'batch, d_inner, d_state'}
CONV = {'x': 'batch, L, d', 'weight': 'd, width', 'bias': 'd',
        'initial_state': 'batch, width - 1, d'}
LIKE_THE_FIRST = 'u', 'delta', 'B', 'C', 'x'        # in dtype; the others are fp32


def check(function, shapes, inputs, sizes):
    """Raises ValueError if an input does not fit those before it. sizes: name -> size, as known."""
    first = inputs[0]
    if first.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f'{function}: float32 or bfloat16 (float64 for checks), not {first.dtype}')
    exact = torch.promote_types(first.dtype, torch.float32)
    for (name, shape), t in zip(shapes.items(), inputs):
        names = shape.split(', ')
        for size_name, size in zip(names, t.shape):
            sizes.setdefault(size_name, size)
        wanted = [sizes.get(size_name) for size_name in names]
        dtype = first.dtype if name in LIKE_THE_FIRST else exact
        if list(t.shape) != wanted or t.dtype != dtype or t.device != first.device:
            raise ValueError(f'{function}: {name} must be ({shape}) = {wanted}, {dtype} on '
                             f'{first.device}, got {list(t.shape)}, {t.dtype} on {t.device}')
