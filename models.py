"""The models. Each is a stack of layers, written as a string: 'MMA' is two Mamba layers, then attention.

  M  Mamba      a selective state space model; the paper's RNN is a stack of them
  A  attention  a LLaMA layer; the paper's Transformer is a stack of them, its hybrid is Mamba with one on top
  D  DeltaNet   linear attention with the delta rule: its memory is a matrix
  G  GRU        the classic recurrent network, from torch

A layer is one class: its initial weights (`init_weights`), what it carries from token to token
(`init_state`), and one `forward` for training, for reading a prompt and for single tokens. What it carries is
the memory that the paper is about: in a recurrent layer its size is fixed, d_inner * (d_state + 3) floats in
Mamba, while attention adds 2 d_model floats with every token. `Model.memory` counts them. In the code it is
`carried`, a dict that forward updates in place; in training it is empty at first, which means zeros.

Symbols (in brackets: the letters of the Mamba paper, Gu & Dao 2023, arXiv 2312.00752):
  B, L (B, L)                batch, sequence length
  d_model                    width of the residual stream
  d_inner (D)                channels of a Mamba layer, 2 d_model
  d_state (N)                size of the memory: floats per channel in Mamba, per head a d_state x d_state
                             matrix in DeltaNet, hidden units in a GRU
  delta (Δ), dt_rank (R)     step size, and the rank of the map to it, ceil(d_model/16)
  A, Bs, Cs, D (A, B, C, D)  the other parameters of the state space model

`linear` and `Linear` are a faster F.linear and nn.Linear (end of this file). The scan comes from scan_cuda/.
"""
import functools
import json
import math
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from scan_cuda import causal_conv1d, selective_scan

ARCHS = ('transformer', 'mamba', 'hybrid')
# (layers, d_model, d_mlp, heads): d_mlp is for the A layers, heads for A and D
SIZES = {
    'tiny': {'transformer': ('AA', 64, 128, 2), 'mamba': ('MM', 64, 128, 4), 'hybrid': ('MA', 64, 128, 4)},
    '0.5M': {'transformer': (8 * 'A', 64, 256, 4), 'mamba': (16 * 'M', 64, 256, 4),
             'hybrid': (12 * 'M' + 'A', 64, 256, 4)},
    '1M': {'transformer': (16 * 'A', 64, 256, 4), 'mamba': (10 * 'M', 128, 256, 4),
           'hybrid': (7 * 'M' + 'A', 128, 256, 4)},
    '2M': {'transformer': (12 * 'A', 128, 256, 4), 'mamba': (18 * 'M', 128, 256, 4),
           'hybrid': (14 * 'M' + 'A', 128, 256, 4)},
}


@dataclass
class Config:
    vocab_size: int
    layers: str                     # letters of LAYERS, from bottom to top
    d_model: int
    d_mlp: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0             # fewer than n_heads: grouped-query attention; 0: as many
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    frozen_embedding: bool = True   # sinusoids (the paper) or learned
    tied_head: bool = True          # the head is the embedding

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def dt_rank(self):
        return math.ceil(self.d_model / 16)


# --- M: the Mamba layer ----------------------------------------------------------------------------

class MambaLayer(nn.Module):
    """A selective state space model (arXiv 2312.00752, figure 3 and Algorithm 2). Each of the d_inner
    channels has a memory h of d_state numbers, which decays, takes up the input u and is read at every token:

        h = exp(delta A) * h + delta u Bs          y = Cs . h + D u

    exp(delta A) lies between 0 and 1: near 1 a channel keeps what it has, near 0 it forgets. "Selective"
    means that delta, Bs and Cs are computed from the token itself: the model chooses what to remember.
      delta   one per channel. Near 0, h stays as it is and the token is ignored; if it is large, h is wiped
              and the token takes its place. delta is computed through dt_rank numbers, to save weights.
      Bs, Cs  where among the d_state numbers to write, and where to read: much like a key and a query.
      A       = -exp(A_log), negative whatever is learned, so that h always decays. It starts at -1, ...,
              -d_state: numbers that forget at different speeds.
      conv    mixes each token with the three before it, so that an edge `u - v` is one thing to remember.
      z       gates the output, y * silu(z): is what was read of use here? silu(z) = z sigmoid(z) is nearly 0
              for negative z (closed) and nearly z for positive z (open, and able to amplify)."""

    def __init__(self, c):
        super().__init__()
        if c.d_state > 64:
            raise ValueError(f'd_state={c.d_state}: a Mamba layer takes at most 64')
        self.config = c
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.in_proj = Linear(c.d_model, 2 * c.d_inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(c.d_inner, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(c.d_inner))
        self.x_proj = Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.dt_proj = Linear(c.dt_rank, c.d_inner)
        self.A_log = nn.Parameter(torch.empty(c.d_inner, c.d_state))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = Linear(c.d_inner, c.d_model, bias=False)

    @torch.no_grad()
    def init_weights(self):
        """torch's defaults, and those of the Mamba paper's code where it has its own."""
        c = self.config
        init_convolution(self)
        nn.init.uniform_(self.dt_proj.weight, -c.dt_rank ** -0.5, c.dt_rank ** -0.5)
        # softplus(bias) log-uniform in [0.001, 0.1]: channels remember for 10 to 1,000 tokens
        delta = torch.exp(torch.empty(c.d_inner).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))    # the inverse of softplus
        self.A_log.copy_(torch.arange(1, c.d_state + 1).float().log().expand(c.d_inner, -1))
        self.out_proj.weight /= math.sqrt(c.layers.count('M'))      # residual branches add up over layers

    def init_state(self, batch_size, seen=0):
        c, zeros = self.config, self.norm.weight.new_zeros
        return {'window': zeros(batch_size, c.d_conv - 1, c.d_inner),
                'state': zeros(batch_size, c.d_inner, c.d_state, dtype=torch.float32)}

    def forward(self, x, carried):
        c = self.config                                                     # x (B, L, d_model)
        u, z = self.in_proj(self.norm(x)).chunk(2, -1)                      # (B, L, d_inner) each
        u = short_convolution(self, u, carried)                             # (B, L, d_inner)
        delta_Bs_Cs = self.x_proj(u)                                        # (B, L, dt_rank + 2 d_state)
        delta, Bs, Cs = delta_Bs_Cs.split((c.dt_rank, c.d_state, c.d_state), -1)
        delta = F.softplus(self.dt_proj(delta)).to(u.dtype)                 # (B, L, d_inner), above 0
        A = -self.A_log.exp()                                               # (d_inner, d_state), below 0
        y, carried['state'] = selective_scan(u, delta, A, Bs, Cs, self.D, carried.get('state'))
        return x + self.out_proj(y * F.silu(z))                             # y (B, L, d_inner)


def short_convolution(layer, x, carried):
    """Causal convolution of each channel of x (B, L, d) over d_conv tokens, then SiLU. The window
    (B, d_conv - 1, d) holds the inputs before x; without one they are zeros."""
    window = carried.get('window')
    if window is not None:
        kept = window.shape[1]
        carried['window'] = torch.cat((window, x[:, -kept:]), 1)[:, -kept:]
    return causal_conv1d(x, layer.conv_weight, layer.conv_bias, window)


def init_convolution(layer):
    bound = layer.config.d_conv ** -0.5                                     # torch's default for a Conv1d
    nn.init.uniform_(layer.conv_weight, -bound, bound)
    nn.init.uniform_(layer.conv_bias, -bound, bound)


# --- A: the LLaMA layer ----------------------------------------------------------------------------

class LlamaLayer(nn.Module):
    """Attention, then SwiGLU, each behind an RMSNorm and a residual (Touvron et al. 2023)."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(c.d_model, c.norm_eps), nn.RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.gate_proj = Linear(c.d_model, c.d_mlp, bias=False)
        self.up_proj = Linear(c.d_model, c.d_mlp, bias=False)
        self.down_proj = Linear(c.d_mlp, c.d_model, bias=False)

    def init_weights(self):
        """torch's defaults, as in the authors' hybrid. LLaMA's N(0, 0.02) is for widths in the thousands:
        with it, a 64 wide hybrid stayed on a plateau (IsTree, cot, n=12, 150,000 samples: 68%, not 99%)."""

    def init_state(self, batch_size, seen=0):
        a = self.attention
        return {'cache': KVCache(self.norm1.weight.new_zeros(2, batch_size, a.n_kv_heads, seen, a.d_head))}

    def forward(self, x, carried):
        x = x + self.attention(self.norm1(x), carried.get('cache'))         # (B, L, d_model)
        inside = self.norm2(x)                                              # (B, L, d_model)
        inside = F.silu(self.gate_proj(inside)) * self.up_proj(inside)      # (B, L, d_mlp)
        return x + self.down_proj(inside)                                   # (B, L, d_model)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, if n_kv_heads < n_heads, grouped queries."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.n_kv_heads = c.n_heads, c.n_kv_heads or c.n_heads
        self.d_head, self.rope_theta = c.d_model // c.n_heads, c.rope_theta
        self.qkv_proj = Linear(c.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.d_head, bias=False)
        self.o_proj = Linear(c.d_model, c.d_model, bias=False)

    def forward(self, x, cache):
        """x (B, L, d_model). cache: None, or a KVCache of the tokens before, to which these are added, or a
        list with one for each row of x, if the rows have seen different numbers of tokens."""
        if isinstance(cache, list):
            q, k, v = self.heads(x, torch.tensor([[c.seen] for c in cache], device=x.device))
            y = torch.cat([self.attend(*row) for row in zip(q.split(1), k.split(1), v.split(1), cache)])
        else:
            y = self.attend(*self.heads(x, cache.seen if cache else 0), cache)
        return self.o_proj(y.transpose(1, 2).flatten(2))                    # y (B, heads, L, d_head)

    def attend(self, q, k, v, cache):
        """Queries, keys and values of L tokens, (B, heads, L, d_head) each -> what they have looked up."""
        L, seen, mask = q.shape[2], cache.seen if cache else 0, None
        if cache:
            k, v = cache.append(k, v)                                       # (B, heads, seen + L, d_head)
            if seen and L > 1:
                mask = causal_mask(L, seen, q.dtype, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=L > 1 and mask is None,
                                              enable_gqa=self.n_kv_heads < self.n_heads)

    def heads(self, x, seen=0):
        """Queries, keys and values of x (B, L, d_model). seen: the position of its first tokens, a number or
        one per row (B, 1)."""
        B, L, _ = x.shape
        qkv = self.qkv_proj(x).view(B, L, -1, self.d_head)                  # (B, L, all heads, d_head)
        qk, v = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), 2)
        qk = rotate(qk, seen + torch.arange(L, device=x.device), self.rope_theta)
        q, k = qk.split((self.n_heads, self.n_kv_heads), 2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)      # (B, heads, L, d_head)

    def weights(self, x):
        """How much each token of x (B, L, d_model) attends to each: (B, n_heads, L, L), rows add up to 1. Not
        needed to run the model, only to look at it."""
        q, k, _ = self.heads(x)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, 1)         # (B, n_heads, L, d_head)
        scores = q @ k.mT / math.sqrt(self.d_head)                          # (B, n_heads, L, L)
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)    # (L, L)
        return scores.masked_fill(future, -math.inf).softmax(-1)


@functools.lru_cache(maxsize=1)                         # made once for all layers
@torch.inference_mode(False)                            # so that it may be used with gradients, too
def causal_mask(L, seen, dtype, device):
    """For L tokens after those seen: (L, seen + L), 0 where a token may look and -inf where not."""
    return torch.full((L, seen + L), -math.inf, dtype=dtype, device=device).triu(seen + 1)


def rotate(x, positions, theta):
    """Rotary positions (Su et al. 2021): pair (2i, 2i+1) of each head of x (B, L, heads, d_head), read as a
    complex number, is turned by the angle position * theta^(-2i/d_head). positions: (L,) or (B, L). Complex
    numbers take one pass over memory where the usual sines, cosines, halves and concatenations take seven."""
    frequencies = theta ** (-torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
    angles = positions[..., None] * frequencies                             # (..., L, d_head/2)
    turns = torch.polar(torch.ones_like(angles), angles)[..., None, :]      # (..., L, 1, d_head/2), complex
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))         # (B, L, heads, d_head/2)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)        # (B, L, heads, d_head)


class KVCache:
    """Keys and values of the tokens seen, in a buffer (2, B, n_kv_heads, room, d_head) that grows."""

    def __init__(self, buffer):
        self.buffer, self.seen = buffer, buffer.shape[3]

    def append(self, k, v):
        """Add keys and values (B, n_kv_heads, L, d_head). Returns those of all tokens seen."""
        start, self.seen = self.seen, self.seen + k.shape[2]
        if self.seen > self.buffer.shape[3]:
            self.buffer = F.pad(self.buffer, (0, 0, 0, k.shape[2] + 128))   # 128 more: not every time
        self.buffer[:, :, :, start:self.seen] = torch.stack((k, v))
        return self.buffer[:, :, :, :self.seen]

    def numel(self):
        return self.buffer[:, :, :, :self.seen].numel()

    @property
    def nbytes(self):
        return self.numel() * self.buffer.element_size()


# --- D: the DeltaNet layer -------------------------------------------------------------------------

class DeltaNetLayer(nn.Module):
    """Linear attention with the delta rule (Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv
    2406.06484). The memory of a head is a matrix S (d_state, d_state) of values v stored under keys k:

        S = S + k^T beta (v - k S)          y = q S          (q, k, v: rows)

    k S is what has been stored under k; v overwrites it if beta is 1, or replaces a part of it, where linear
    attention would add v to it. Keys have length 1: what is stored under orthogonal keys stays untouched."""

    def __init__(self, c):
        super().__init__()
        self.config, width = c, c.n_heads * c.d_state
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.qkv_proj = Linear(c.d_model, 3 * width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * width, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(3 * width))
        self.beta_proj = Linear(c.d_model, c.n_heads)
        self.out_norm = nn.RMSNorm(c.d_state, c.norm_eps)
        self.out_proj = Linear(width, c.d_model, bias=False)

    def init_weights(self):
        init_convolution(self)

    def init_state(self, batch_size, seen=0):
        c, zeros = self.config, self.norm.weight.new_zeros
        return {'window': zeros(batch_size, c.d_conv - 1, 3 * c.n_heads * c.d_state),
                'state': zeros(batch_size, c.n_heads, c.d_state, c.d_state, dtype=torch.float32)}

    def forward(self, x, carried):
        c, inside = self.config, self.norm(x)                               # (B, L, d_model)
        qkv = short_convolution(self, self.qkv_proj(inside), carried)       # (B, L, 3 heads d_state)
        qkv = qkv.float().unflatten(-1, (3, c.n_heads, c.d_state))          # (B, L, 3, heads, d_state)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, heads, L, d_state) each
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = self.beta_proj(inside).float().sigmoid().mT[..., None]       # (B, heads, L, 1)
        S = carried['state'] if carried else self.init_state(len(x))['state']
        y, carried['state'] = delta_rule(q, k, v, beta, S)                  # (B, heads, L, d_state)
        y = self.out_norm(y.to(x.dtype)).transpose(1, 2).flatten(2)         # (B, L, heads d_state)
        return x + self.out_proj(y)                                         # (B, L, d_model)


def delta_rule(q, k, v, beta, S, chunk=64):
    """DeltaNetLayer's recurrence, a chunk of T tokens at a time. Token t adds k_t^T u_t to S, where

        u_t = beta_t (v_t - k_t S - sum over i < t of (k_t . k_i) u_i)          (S: before the chunk)

    These are triangular equations for the rows of U (T, d_state); for one token, they are the recurrence."""
    ys = []
    for q, k, v, beta in zip(*(t.split(chunk, 2) for t in (q, k, v, beta))):
        system = torch.eye(k.shape[2], device=k.device) + (beta * (k @ k.mT)).tril(-1)
        U = torch.linalg.solve_triangular(system, beta * (v - k @ S), upper=False)
        ys.append(q @ S + (q @ k.mT).tril() @ U)
        S = S + k.mT @ U                                                    # (B, heads, d_state, d_state)
    return torch.cat(ys, 2), S


# --- G: the GRU layer ------------------------------------------------------------------------------

class GRULayer(nn.Module):
    """torch's GRU (Cho et al. 2014) with d_state hidden units, behind an RMSNorm and a residual."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.gru = nn.GRU(c.d_model, c.d_state, batch_first=True)
        self.out_proj = Linear(c.d_state, c.d_model, bias=False)

    def init_weights(self):
        """torch's defaults."""

    def init_state(self, batch_size, seen=0):
        return {'state': self.norm.weight.new_zeros(batch_size, self.gru.hidden_size)}

    def forward(self, x, carried):
        state = carried['state'][None] if carried else None                 # (1, B, d_state)
        y, state = self.gru(self.norm(x), state)                            # (B, L, d_state)
        carried['state'] = state[0]
        return x + self.out_proj(y)                                         # (B, L, d_model)


# --- the model -------------------------------------------------------------------------------------

LAYERS = {'M': MambaLayer, 'A': LlamaLayer, 'D': DeltaNetLayer, 'G': GRULayer}


class Model(nn.Module):
    """A language model: embedding, layers, norm, head. What it carries while it generates is its state: a
    list with a dict for each layer, changed in place (copy.deepcopy makes an independent one)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList([LAYERS[letter](c) for letter in c.layers])
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        if not c.tied_head:
            self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.frozen_embedding:
            self.embedding.weight = nn.Parameter(sinusoids(c.vocab_size, c.d_model), requires_grad=False)
        else:
            nn.init.normal_(self.embedding.weight, std=c.d_model ** -0.5)
        for layer in self.layers:
            layer.init_weights()

    def n_params(self):
        """Trained parameters: a frozen embedding does not count."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def init_state(self, batch_size, seen=0):
        """The state before the first token: zeros. seen: as large as after so many tokens, to measure it."""
        return [layer.init_state(batch_size, seen) for layer in self.layers]

    def memory(self, seen):
        """Floats that one sample carries after `seen` tokens, by kind: 'window' (the last inputs of the short
        convolutions), 'state' (of the recurrences), 'cache' (keys and values), a dict of those it has."""
        floats = Counter()
        for carried in self.init_state(1, seen):
            floats.update({name: t.numel() for name, t in carried.items()})
        return dict(floats)

    def hidden(self, tokens, state=None):
        """tokens (B, L) -> (B, L, d_model), what the head reads."""
        x = self.embedding(tokens)
        for layer, carried in zip(self.layers, state or [{} for _ in self.layers]):
            x = layer(x, carried)
        return self.norm(x)

    def head(self, hidden):
        """(..., d_model) -> logits (..., vocab_size)."""
        return linear(hidden, self.embedding.weight if self.config.tied_head else self.lm_head.weight)

    def forward(self, tokens, state=None):
        """tokens (B, L) int64 -> logits (B, L, vocab_size). With a state, the tokens continue those it
        has seen, in one parallel pass, and it is updated in place."""
        return self.head(self.hidden(tokens, state))

    def prefill(self, tokens):
        """Read prompts (B, L) in one pass. Returns logits (B, vocab_size) of the next token and the state."""
        state = self.init_state(len(tokens))
        return self.head(self.hidden(tokens, state)[:, -1]), state

    def step(self, token, state):
        """Read one more token (B,). Returns logits (B, vocab_size) of the next one; updates the state.
        The work does not depend on the tokens seen, except for attention."""
        return self.head(self.hidden(token[:, None], state)[:, 0])


def stack(states):
    """The states of several sequences -> the state of a batch, for `step`. They may have seen different
    numbers of tokens, so each keeps its own KVCache."""
    join = lambda values: values if isinstance(values[0], KVCache) else torch.cat(values)
    return [{name: join([carried[name] for carried in layer]) for name in layer[0]} for layer in zip(*states)]


def unstack(state, i):
    """The state of one sequence of such a batch."""
    return [{name: value[i] if isinstance(value, list) else value[i:i + 1] for name, value in carried.items()}
            for carried in state]


def select(state, rows):
    """The state of some sequences of a batch. rows: their numbers (N,)."""
    of = lambda kept: kept[rows] if torch.is_tensor(kept) else KVCache(kept.buffer[:, rows, :, :kept.seen])
    return [{name: of(kept) for name, kept in carried.items()} for carried in state]


def sinusoids(n, d):
    """(n, d) with E[j,2i] = sin(j / 10000^(2i/d)), E[j,2i+1] = cos(j / 10000^(2i/d))."""
    angles = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    return torch.stack((angles.sin(), angles.cos()), -1).view(n, -1)[:, :d].contiguous()


def make_model(arch, size, vocab_size, d_state=16, frozen_embedding=True, layers=''):
    """A freshly initialised Model; seed torch first to make it reproducible. The sizes are the paper's, plus
    `tiny` for CPUs. layers: a pattern in place of the architecture's own, for example 'AM'. Raises ValueError
    on an unknown arch, size or layer, and on an impossible d_state."""
    letters = [('layer', letter, LAYERS) for letter in layers]
    for name, value, known in [('arch', arch, ARCHS), ('size', size, SIZES), *letters]:
        if value not in known:
            raise ValueError(f'unknown {name} {value!r}: choose from {", ".join(known)}')
    if d_state < 1:
        raise ValueError(f'd_state={d_state}: must be at least 1')
    pattern, *dims = SIZES[size][arch]
    return Model(Config(vocab_size, layers or pattern, *dims, d_state=d_state,
                        frozen_embedding=frozen_embedding))


# --- pretrained checkpoints ------------------------------------------------------------------------

# our names become the hub's by these substitutions, one after the other
NAMES = {
    'llama': {'^embedding': 'model.embed_tokens', '^(norm|layers)': r'model.\1', r'attention\.': 'self_attn.',
              '(gate|up|down)_': r'mlp.\1_', 'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm'},
    'mamba': {'^embedding': 'backbone.embeddings', '^norm': 'backbone.norm_f', 'conv_': 'conv1d.',
              r'^(layers\.\d+\.)norm': r'backbone.\1norm', r'^(layers\.\d+\.)': r'backbone.\1mixer.'}}


def pretrained_config(hub):
    """The hub's config.json (a dict) -> Config. Raises ValueError: what is out of range or not supported."""
    def number(name, low, high, default=None, kind=int):
        value = default if hub.get(name) is None else hub[name]
        if type(value) not in (int, kind) or not low <= value <= high:
            raise ValueError(f'config.json: {name}={value!r:.40} must be {kind.__name__}, {low} to {high}')
        return kind(value)

    family = hub.get('model_type') if isinstance(hub, dict) else None
    if family not in (*NAMES,):                 # (a tuple, because family may be anything)
        raise ValueError(f'model_type {family!r:.40} is not supported: only {" and ".join(NAMES)}')
    vocab_size, d_model = number('vocab_size', 1, 10_000_000), number('hidden_size', 2, 100_000)
    n_layers = number('num_hidden_layers', 1, 1000)
    if family == 'llama':
        rope = hub.get('rope_parameters') or hub.get('rope_scaling') or {}
        hub = hub | (rope if isinstance(rope, dict) else dict(rope_type=rope))
        n_heads = number('num_attention_heads', 1, d_model // 2)
        n_kv_heads = number('num_key_value_heads', 1, n_heads, n_heads)
        if d_model % (2 * n_heads) or n_heads % n_kv_heads:
            raise ValueError(f'hidden_size={d_model} cannot have {n_heads} heads with {n_kv_heads} key heads')
        d_mlp = number('intermediate_size', 1, 1_000_000)
        config = Config(vocab_size, 'A' * n_layers, d_model, d_mlp, n_heads, n_kv_heads,
                        rope_theta=number('rope_theta', 1, 1e12, 10000.0, float),
                        norm_eps=number('rms_norm_eps', 0, 1, 1e-6, float), frozen_embedding=False,
                        tied_head=number('tie_word_embeddings', 0, 1, False, bool))
        fixed = dict(hidden_act='silu', attention_bias=False, mlp_bias=False, head_dim=d_model // n_heads,
                     pretraining_tp=1, rope_type='default', type='default')
    else:
        config = Config(vocab_size, 'M' * n_layers, d_model, d_state=number('state_size', 1, 64, 16),
                        d_conv=number('conv_kernel', 2, 64, 4), expand=number('expand', 1, 64, 2),
                        norm_eps=number('layer_norm_epsilon', 0, 1, 1e-5, float), frozen_embedding=False,
                        tied_head=number('tie_word_embeddings', 0, 1, True, bool))
        fixed = dict(hidden_act='silu', use_bias=False, use_conv_bias=True, time_step_rank=config.dt_rank,
                     intermediate_size=config.d_inner)
    for name, value in fixed.items():
        if hub.get(name) not in (None, 'auto', value):
            raise ValueError(f'{name}={hub[name]!r:.40} is not supported: only {value!r}')
    return config


def from_pretrained(name_or_dir, dtype=torch.float32):
    """A LLaMA or Mamba checkpoint in the hub's layout (config.json and *.safetensors), from a local folder or
    by its name on the hub, as a Model. Needs the packages that come with `transformers`. Raises ValueError if
    there is no such checkpoint, a file is damaged, or it asks for what is not supported."""
    problem = 'not found locally and could not be downloaded: '
    try:
        from huggingface_hub import snapshot_download
        from safetensors.torch import load_file
        where = Path(name_or_dir)
        if not where.is_dir():
            where = Path(snapshot_download(str(name_or_dir), allow_patterns=['config.json', '*.safetensors']))
        problem, theirs = '', {}
        hub = json.loads((where / 'config.json').read_text(encoding='utf-8'))
        with torch.device('meta'):
            model = Model(pretrained_config(hub))
        for file in sorted(where.glob('*.safetensors')):
            theirs |= load_file(file)
        load_weights(model, NAMES[hub['model_type']], theirs, dtype)
    except ImportError:
        raise ValueError('pretrained checkpoints need one more package: pip install transformers')
    except Exception as error:          # offline, unknown, gated; missing or damaged files: all sorts
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise ValueError(f'{name_or_dir}: {problem}{reason}')
    return model


def load_weights(model, names, theirs, dtype):
    """Give the model the hub's weights {name: tensor}. Raises ValueError if one is missing or misshapen."""
    c, weights = model.config, {}
    for ours, expected in model.state_dict().items():
        name = ours
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        parts = [name.replace('qkv', x) for x in 'qkv'] if 'qkv' in name else [name]    # stacked
        if missing := [name for name in parts if name not in theirs]:
            raise ValueError(f'the checkpoint lacks {missing[0]}')
        weight = torch.cat([theirs[name] for name in parts])
        if ours.endswith('conv_weight'):
            weight = weight.squeeze(1)
        if weight.shape != expected.shape:
            raise ValueError(f'{parts[0]} is {tuple(weight.shape)}, expected {tuple(expected.shape)}')
        if ours.endswith('qkv_proj.weight'):    # the hub rotates the pairs (i, i + d_head/2), we (2i, 2i+1)
            rotated = c.d_model + c.n_kv_heads * c.d_model // c.n_heads
            pairs = weight[:rotated].view(-1, 2, c.d_model // c.n_heads // 2, c.d_model)
            weight[:rotated] = pairs.transpose(1, 2).reshape(rotated, c.d_model)
        always_fp32 = ours.endswith(('conv_weight', 'conv_bias', 'A_log', 'D'))     # scan_cuda asks for it
        weights[ours] = weight.to(torch.float32 if always_fp32 else dtype)
    model.load_state_dict(weights, assign=True)


# --- what a token costs ----------------------------------------------------------------------------

def generation_cost(size='0.5M', lengths=tuple(2 ** k for k in range(6, 18)), repeats=20):
    """Time (median, seconds) and memory (bytes) of one more token after `lengths` tokens, batch 1, fp32, of
    freshly initialised models: neither depends on what the tokens are. Returns a list of dicts."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    token, rows = torch.ones(1, dtype=torch.int64, device=device), []
    for arch in ARCHS:
        model = make_model(arch, size, 128).to(device)
        for length in lengths:
            state, seconds = model.init_state(1, length), []
            memory = sum(t.nbytes for carried in state for t in carried.values())
            with torch.inference_mode():
                for _ in range(repeats):
                    started = time.perf_counter()
                    model.step(token, state).argmax().item()
                    seconds.append(time.perf_counter() - started)
            rows.append(dict(arch=arch, size=size, length=length, seconds=statistics.median(seconds),
                             bytes=memory, device=device.type, threads=torch.get_num_threads()))
            print(f'{arch:12} {size}  {length:>8,} tokens of context   '
                  f'{1e3 * rows[-1]["seconds"]:8.2f} ms a token   {memory / 1e6:10.3f} MB')
    return rows


# --- linear: F.linear, faster on a CPU -------------------------------------------------------------

def by_onednn(x):
    """Whether to leave a product to oneDNN: on a CPU in fp32, torch calls MKL, which is slow on AMD
    processors (training: 74 against 200 GFLOP/s a core). Under torch.compile, torch decides."""
    return (x.dtype == torch.float32 and x.device.type == 'cpu' and not torch.is_autocast_enabled('cpu')
            and not torch.compiler.is_compiling() and hasattr(torch.ops.mkldnn, '_linear_pointwise'))


def onednn(x, weight, bias):
    """x (..., d_in) @ weight (d_out, d_in).T + bias"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


def linear(x, weight, bias=None):
    """F.linear, faster where no gradients are wanted."""
    return (onednn if by_onednn(x) and not torch.is_grad_enabled() else F.linear)(x, weight, bias)


class OneDNN(torch.autograd.Function):
    """onednn and its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = onednn(grad, weight.t(), None)
        grad = grad.flatten(0, -2)
        return dx, grad.t() @ x.flatten(0, -2), grad.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """nn.Linear, faster in training too."""

    def forward(self, x):
        return (OneDNN.apply if x.requires_grad and by_onednn(x) else linear)(x, self.weight, self.bias)


if __name__ == '__main__':
    out = Path('out', 'generation.json')
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(generation_cost(), indent=1))
    print(f'{out}: drawn by plot.py')
