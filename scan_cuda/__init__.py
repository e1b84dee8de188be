"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2 and section 3.3).

A state space model h' = A h + B u, y = C h + D u, in steps of length delta: over one step the state decays by
exp(delta A) and takes in delta B u. It is *selective* because delta, B and C are computed from each token:

    h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t
    y_t = C_t . h_t + D u_t

    u, delta, y (batch, L, d_inner)    A (d_inner, d_state)    states h (batch, d_inner, d_state)
    B, C        (batch, L, d_state)    D (d_inner,)

From the plain to the fast, to be read in this order:
  1. `selective_scan_reference`: the recurrence as written above, in a loop. Everything is tested against it.
  2. `pairwise_scan`: what is parallel about it, the recurrence in about 2 log2(L) rounds.
  3. `selective_scan_fallback`: the pairs in chunks, with its own backward pass: little memory, any device.
  4. scan_cpu.cpp: the CPU kernel.       5. scan_kernels.cu: the CUDA kernels.
`selective_scan` uses 4 or 5; the first call builds them (some seconds, then cached: build.py). If that fails,
one line says why and what to do, and 3 is used. SCAN_CUDA_BUILD=0 in the environment asks for 3 at once.
"""
import torch
import torch.nn.functional as F

from scan_cuda import build

# Tokens between two saved states, as in scan.h; backward recomputes those in between. Saved states take
# d_state / CHUNK times the memory of u; the states of a longer chunk would not fit the cache.
CHUNK = 64


# ---------------------------------------------------------------------------------------------
# 1. The reference

def selective_scan_reference(u, delta, A, B, C, D=None, initial_state=None):
    """The recurrence as written above, one token after the other: slow, clear, any device, float64 too.

    Shapes as above; None stands for zeros. Returns (y, final_state). Its gradients are autograd's.
    """
    dtype, exact = u.dtype, torch.promote_types(u.dtype, torch.float32)     # bf16 in and out, fp32 inside
    u, delta, B, C = (t.to(exact) for t in (u, delta, B, C))
    h = u.new_zeros(len(u), *A.shape) if initial_state is None else initial_state  # (batch, d_inner, d_state)
    ys = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))                                      # (batch, d_inner)
    y = torch.stack(ys, 1) + (0 if D is None else D * u)
    return y.to(dtype), h


# ---------------------------------------------------------------------------------------------
# 2. The recurrence in parallel

def pairwise_scan(a, b):
    """All h_t = a_t h_{t-1} + b_t with h_{-1} = 0; a, b, h (batch, L, ...). Blelloch's (1990) parallel scan.

    Two steps in a row are again one such step: a2 (a1 h + b1) + b2 = (a1 a2) h + (a2 b1 + b2). So join the
    pairs (0, 1), (2, 3), ...; scan the result, half as long: this gives h_1, h_3, ...; and take one step from
    each of those to h_2, h_4, ... With L = 5:

        a, b          0     1     2     3     4
        join             01          23             (4 has no partner)
        scan             h_1         h_3
        step         h_0      h_2         h_4       h_0 = b_0

    About 2 log2(L) parallel rounds and 3 L multiplications. Only sums and products of the inputs, never a
    quotient: decay so strong that it underflows does no harm.
    """
    L = a.shape[1]
    if L == 1:
        return b
    first, second = slice(0, L - 1, 2), slice(1, L, 2)      # of each pair
    odd = pairwise_scan(a[:, first] * a[:, second], torch.addcmul(b[:, second], a[:, second], b[:, first]))
    h = torch.empty_like(b)
    h[:, :1] = b[:, :1]
    h[:, 1::2] = odd
    h[:, 2::2] = torch.addcmul(b[:, 2::2], a[:, 2::2], odd[:, :(L - 1) // 2])
    return h


def _states(u, delta, A, B, h):
    """Decays a_t and states h_t that follow the state h, both (batch, L, d_inner, d_state)."""
    a = torch.exp(delta[..., None] * A)
    b = (delta * u)[..., None] * B[:, :, None]
    b[:, 0] += a[:, 0] * h
    return a, pairwise_scan(a, b)


# ---------------------------------------------------------------------------------------------
# 3. The fallback: chunk after chunk, the tokens of a chunk in parallel. (Sums and products, no einsum:
# autocast would compute matrix products in bf16.)

def _fallback_forward(u, delta, A, B, C, D, initial_state, chunk):
    """Returns (y, final_state, starts): starts (batch, chunks - 1, d_state, d_inner), laid out as by the
    kernels, holds the state before each chunk but the first, all that the backward pass needs."""
    h = A.new_zeros(len(u), *A.shape) if initial_state is None else initial_state
    y, starts = torch.empty_like(u), A.new_empty(len(u), (u.shape[1] - 1) // chunk, *A.T.shape)
    for k in range(0, u.shape[1], chunk):
        now = slice(k, k + chunk)
        x, d, b, c = (t[:, now].to(A.dtype) for t in (u, delta, B, C))
        if k:
            starts[:, k // chunk - 1] = h.transpose(1, 2)
        _, hs = _states(x, d, A, b, h)                              # (batch, T, d_inner, d_state)
        y[:, now] = (hs * c[:, :, None]).sum(-1) + (0 if D is None else D * x)
        h = hs[:, -1].clone()
    return y, h, starts


def _fallback_backward(dy, dfinal, u, delta, A, B, C, D, initial_state, starts, chunk):
    """Gradients of u, delta, A, B, C, D, initial_state. With g_t = dLoss/dh_t the recurrence runs backwards:
    g_t = C_t dy_t + a_{t+1} g_{t+1}, which is the same scan on the reversed chunk. dfinal, D and
    initial_state may be None, for zeros; a gradient is returned for each of the seven even so, like its input
    in shape and dtype."""
    h0 = A.new_zeros(len(u), *A.shape) if initial_state is None else initial_state
    g = torch.zeros_like(h0) if dfinal is None else dfinal          # a_{t+1} g_{t+1} of the next chunk
    du, ddelta, dA, dB, dC = (torch.zeros_like(t) for t in (u, delta, A, B, C))
    dD = A.new_zeros(len(A))
    for k in reversed(range(0, u.shape[1], chunk)):
        now = slice(k, k + chunk)
        x, d, b, c, e = (t[:, now].to(A.dtype) for t in (u, delta, B, C, dy))
        start = starts[:, k // chunk - 1].transpose(1, 2) if k else h0
        a, h = _states(x, d, A, b, start)                           # (batch, T, d_inner, d_state)
        from_y = e[..., None] * c[:, :, None]
        from_y[:, -1] += g
        a_next = torch.cat([a[:, 1:], torch.ones_like(a[:, :1])], 1)    # the last is never used
        gs = pairwise_scan(a_next.flip(1), from_y.flip(1)).flip(1)
        g = a[:, 0] * gs[:, 0]
        decay = gs * a * torch.cat([start[:, None], h[:, :-1]], 1)  # gradient of delta_t A
        dx = (gs * b[:, :, None]).sum(-1)                           # gradient of delta_t u_t
        du[:, now] = dx * d + (0 if D is None else D * e)
        ddelta[:, now] = dx * x + (decay * A).sum(-1)
        dB[:, now] = (gs * (d * x)[..., None]).sum(2)
        dC[:, now] = (h * e[..., None]).sum(2)
        dA += (decay * d[..., None]).sum((0, 1))
        dD += (e * x).sum((0, 1))
    return du, ddelta, dA, dB, dC, dD, g


# build.save keeps the inputs and starts; build.gradients hands them to the function, and adds None for chunk.
# The kernels' operators get their backward passes in the same way, in build.py.
class _Fallback(torch.autograd.Function):
    forward, setup_context = staticmethod(_fallback_forward), staticmethod(build.save)
    backward = staticmethod(lambda ctx, *grads: build.gradients(_fallback_backward, ctx, *grads))


def selective_scan_fallback(u, delta, A, B, C, D=None, initial_state=None):
    """`selective_scan` in PyTorch alone: any device, float64 too. Holds one chunk's states at once."""
    _check(u, delta, A, B, C, D, initial_state)
    return _Fallback.apply(u, delta, A, B, C, D, initial_state, CHUNK)[:2]


# ---------------------------------------------------------------------------------------------
# The convolution before the scan

def causal_conv1d_reference(x, weight, bias, initial_state=None):
    """`causal_conv1d` by F.conv1d, a group per channel: any device (on a GPU it is cuDNN's), float64 too."""
    before = x.new_zeros(len(x), weight.shape[1] - 1, x.shape[2]) if initial_state is None else initial_state
    padded = torch.cat([before, x], 1).to(weight.dtype).transpose(1, 2)     # (batch, d, before + L)
    z = F.conv1d(padded, weight[:, None], bias, groups=len(weight))
    return F.silu(z).transpose(1, 2).to(x.dtype)


# ---------------------------------------------------------------------------------------------
# What the model calls

def selective_scan(u, delta, A, B, C, D=None, initial_state=None):
    """h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t,  y_t = C_t . h_t + D u_t  (Mamba's Algorithm 2).

    u, delta (batch, L, d_inner), B, C (batch, L, d_state): all fp32 or all bf16; L >= 1, d_state <= 64.
    A (d_inner, d_state), D (d_inner,) or None, initial_state (batch, d_inner, d_state) or None (zeros): fp32.
    float64 everywhere is for checks; the reference does it.
    Returns y, like u, and final_state, fp32, like initial_state; gradients flow to every input through both.

    Values and gradients are the reference's, up to rounding, where delta >= 0 and A <= 0, as in Mamba, and
    nothing overflows fp32. With a negative delta or a positive A the state grows exponentially, and they
    agree only while it stays finite. NaN, infinite or overflowing values raise no error; which results and
    gradients are then NaN or infinite differs. Raises ValueError for a wrong shape, dtype or device.
    """
    _check(u, delta, A, B, C, D, initial_state)
    if u.dtype == torch.float64:
        return selective_scan_reference(u, delta, A, B, C, D, initial_state)
    if build.load(u.device.type):
        return torch.ops.scan_cuda.scan_forward(u, delta, A, B, C, D, initial_state, CHUNK)[:2]
    return selective_scan_fallback(u, delta, A, B, C, D, initial_state)


def causal_conv1d(x, weight, bias, initial_state=None):
    """y_t = silu(bias + sum over k of weight[:, k] * x_{t - width + 1 + k}), each channel by itself.

    x, y (batch, L, d): fp32 or bf16; weight (d, width), bias (d,): fp32; initial_state the width - 1 inputs
    before the first, (batch, width - 1, d), like x or fp32, or None (zeros); float64 everywhere for checks.
    Gradients for every input. On a CPU, width 4 (Mamba's) is one fused kernel, several times as fast as
    F.conv1d; everything else is F.conv1d. Raises ValueError, one line, for a wrong shape, dtype or device.
    """
    batch, L, d = x.shape if x.dim() == 3 else (0, 0, 0)
    width, exact = weight.shape[-1], torch.promote_types(x.dtype, torch.float32)
    kept = exact if initial_state is not None and initial_state.dtype == exact else x.dtype
    _compare('causal_conv1d', 'x', x, x=(x, (batch, L, d), x.dtype), weight=(weight, (d, width), exact),
             bias=(bias, (d,), exact), initial_state=(initial_state, (batch, width - 1, d), kept))
    if x.device.type == 'cpu' and width == 4 and exact == torch.float32 and build.load('cpu'):
        before = None if initial_state is None else initial_state.float()
        return torch.ops.scan_cuda.conv_forward(x.float(), weight, bias, before).to(x.dtype)
    return causal_conv1d_reference(x, weight, bias, initial_state)


def _check(u, delta, A, B, C, D, initial_state):
    if u.dim() != 3 or A.dim() != 2 or u.shape[1] < 1 or not 1 <= A.shape[1] <= 64:
        raise ValueError('selective_scan: u must be (batch, L >= 1, d_inner), A (d_inner, d_state from 1 to '
                         f'64), got {tuple(u.shape)} and {tuple(A.shape)}')
    if u.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f'selective_scan: u must be float32 or bfloat16 (float64 for checks), got {u.dtype}')
    (batch, L, d_inner), d_state = u.shape, A.shape[1]
    exact = torch.promote_types(u.dtype, torch.float32)
    of_tokens, of_states = (batch, L, d_inner), (batch, L, d_state)
    _compare('selective_scan', 'u', u, delta=(delta, of_tokens, u.dtype), A=(A, (d_inner, d_state), exact),
             B=(B, of_states, u.dtype), C=(C, of_states, u.dtype), D=(D, (d_inner,), exact),
             initial_state=(initial_state, (batch, d_inner, d_state), exact))


def _compare(function, name, like, **wanted):
    for other, (t, shape, dtype) in wanted.items():
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != like.device):
            raise ValueError(f'{function}: {other} must be {dtype} of shape {shape} on {like.device} to go '
                             f'with {name} {tuple(like.shape)}, got {t.dtype} {tuple(t.shape)} on {t.device}')
