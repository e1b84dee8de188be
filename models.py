"""The models. Each is a stack of layers, written as a string: 'MMA' is two Mamba layers, then an
attention layer.

  M  Mamba      a selective state space model; the paper's RNN is a stack of them
  A  attention  a LLaMA layer; the paper's Transformer is a stack of them, and its hybrid is a
                stack of Mamba layers with one attention layer on top
  D  DeltaNet   linear attention with the delta rule: its memory is a matrix (below the line)
  G  GRU        the classic recurrent network, from torch (below the line)

What a layer carries from token to token is the memory that the paper is about. In a recurrent
layer its size is fixed (d_inner * (d_state + 3) floats in Mamba); attention adds 2 d_model floats
per token. `Model.memory` counts the floats.

Symbols (in parentheses, those of the Mamba paper, Gu & Dao 2023, arXiv 2312.00752):
  B, L (B, L)                batch, sequence length
  d_model                    width of the residual stream
  d_inner (D)                channels of a Mamba layer, 2 d_model
  d_state (N)                size of the memory: floats per channel in Mamba, a matrix of
                             d_state x d_state per head in DeltaNet, hidden units in a GRU
  delta (Δ), dt_rank (R)     step size; rank of the projection that produces it, ceil(d_model/16)
  A, Bs, Cs, D (A, B, C, D)  the other parameters of the state space model (B and C in scan_cuda/)

To bring your own layer, write a class with four methods (GRULayer is the shortest example):
  __init__(config)           its parameters; config is a Config
  init_weights()             their initial values, where torch's defaults are unsuitable
  init_state(batch_size)     what it carries before the first token: a dict of tensors, batch
                             first, named 'state', 'window' or 'cache' (see Model.memory)
  forward(x, carried)        reads the next tokens, x (B, L, d_model) with any L > 0, and returns
                             the new x and a new dict. No token may see a later one, and nothing
                             may be changed in place
Add it to LAYERS under an unused letter, say R. `pytest test_all.py -k every_layer` checks it,
and `python train.py --arch=mamba --layers=RR --d_state=16` trains it.
"""
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from scan_cuda import causal_conv1d, selective_scan


@dataclass
class Config:
    vocab_size: int
    layers: str                     # letters of LAYERS, from bottom to top
    d_model: int
    d_mlp: int = 0                  # attention layers only
    n_heads: int = 0                # attention and DeltaNet
    d_state: int = 16               # Mamba, DeltaNet, GRU
    d_conv: int = 4                 # Mamba, DeltaNet: tokens that the short convolution mixes
    norm_eps: float = 1e-5
    frozen_embedding: bool = True   # sinusoids (the paper) or learned

    @property
    def d_inner(self):
        return 2 * self.d_model

    @property
    def dt_rank(self):
        return math.ceil(self.d_model / 16)


# --- M: the Mamba layer ---------------------------------------------------------------------------

class MambaLayer(nn.Module):
    """A selective state space model (arXiv 2312.00752, figure 3 and Algorithm 2). Each of the
    d_inner channels has a memory h of d_state numbers, which decays, takes up the input u and is
    read at every token:

        h = exp(delta A) * h + delta u Bs          y = Cs . h + D u

    h and A have a number for each channel and each place in its memory; delta, u, D and y have one
    for each channel, Bs and Cs one for each place. exp(delta A) lies between 0 and 1: near 1 a
    channel keeps what it has, near 0 it forgets. "Selective" means that delta, Bs and Cs are
    computed from the input: the model chooses what to remember. A token's path:

        x -> norm -> in_proj -> u -> conv, SiLU -> memory h -> y -> y * silu(z) -> out_proj -> + x
                             -> z
      delta   one per channel. Near 0, h stays as it is and the token is ignored; if it is large, h
              is wiped and the token takes its place. delta is computed through dt_rank numbers, to
              save weights.
      Bs, Cs  where among the d_state numbers to write, and where to read: much like a key and a
              query. All channels share them. With d_state=1, the default run's, there is only one
              place: Bs is how much of the token to write, and with which sign; Cs how much to read.
      A       = -exp(A_log), negative whatever is learned, so that h always decays. It starts at
              -1, ..., -d_state: numbers that forget at different speeds.
      D       lets u bypass the memory.
      conv    mixes each token with the three before it, so that an edge `5 - 0`, three tokens, can
              be stored as one thing.
      z       gates the output, y * silu(z): is what was read useful here? silu(z) = z sigmoid(z) is
              nearly 0 for very negative z (closed), nearly z for positive z (open, able to
              amplify)."""

    def __init__(self, c):
        super().__init__()
        if not 1 <= c.d_state <= 64:
            raise ValueError(f'd_state={c.d_state}: a Mamba layer takes 1 to 64')
        self.config = c
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(c.d_inner, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(c.d_inner))
        self.x_proj = nn.Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(c.dt_rank, c.d_inner)
        self.A_log = nn.Parameter(torch.empty(c.d_inner, c.d_state))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)

    @torch.no_grad()
    def init_weights(self):
        """torch's defaults, and those of the Mamba paper's code where it has its own."""
        c = self.config
        init_convolution(self)
        bound = c.dt_rank ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        # softplus(bias) log-uniform in [0.001, 0.1]: with A = -1, channels remember for
        # 1/delta, that is 10 to 1,000 tokens
        delta = torch.exp(torch.empty(c.d_inner).uniform_(math.log(0.001), math.log(0.1)))
        # the inverse of softplus, log(exp(delta) - 1), in a form that does not round small delta
        self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))
        self.A_log.copy_(torch.arange(1, c.d_state + 1).log())
        self.out_proj.weight /= math.sqrt(c.layers.count('M'))      # residual branches add up

    def init_state(self, batch_size):
        c = self.config
        return {'window': self.in_proj.weight.new_zeros(batch_size, c.d_conv - 1, c.d_inner),
                'state': self.A_log.new_zeros(batch_size, c.d_inner, c.d_state)}

    def forward(self, x, carried):
        c = self.config                                             # x (B, L, d_model)
        u, z = self.in_proj(self.norm(x)).chunk(2, -1)              # (B, L, d_inner) each
        u, window = short_convolution(self, u, carried['window'])   # (B, L, d_inner)
        low, Bs, Cs = self.x_proj(u).split((c.dt_rank, c.d_state, c.d_state), -1)
        delta = F.softplus(self.dt_proj(low)).to(u.dtype)           # (B, L, d_inner), above 0
        A = -self.A_log.exp()                                       # (d_inner, d_state), below 0
        y, state = selective_scan(u, delta, A, Bs, Cs, self.D, carried['state'])
        y = y * F.silu(z)                                           # (B, L, d_inner)
        return x + self.out_proj(y), {'window': window, 'state': state}


def short_convolution(layer, x, window):
    """Causal convolution of each channel of x (B, L, d) over d_conv tokens, then SiLU. window
    (B, d_conv - 1, d): the inputs before x. Returns the output (B, L, d) and the next window."""
    y = causal_conv1d(x, layer.conv_weight, layer.conv_bias, window)
    kept = window.shape[1]
    return y, torch.cat((window, x[:, -kept:]), 1)[:, -kept:]


def init_convolution(layer):
    bound = layer.config.d_conv ** -0.5                             # torch's default for a Conv1d
    nn.init.uniform_(layer.conv_weight, -bound, bound)
    nn.init.uniform_(layer.conv_bias, -bound, bound)


# --- A: the LLaMA layer ---------------------------------------------------------------------------

class LlamaLayer(nn.Module):
    """Attention, then SwiGLU, each with an RMSNorm before it and a residual around it (Touvron et
    al. 2023)."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.d_model, c.norm_eps)
        self.norm2 = nn.RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.gate_proj = nn.Linear(c.d_model, c.d_mlp, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.d_mlp, bias=False)
        self.down_proj = nn.Linear(c.d_mlp, c.d_model, bias=False)

    def init_weights(self):
        """Nothing to do: torch's defaults, as in the authors' hybrid. LLaMA's N(0, 0.02) is for
        widths in the thousands: with it, a hybrid of width 64 got stuck (IsTree, cot, n=12, 150,000
        samples: 68%, not 99%)."""

    def init_state(self, batch_size):
        a = self.attention
        return {'cache': self.norm1.weight.new_zeros(batch_size, 2, a.n_heads, 0, a.d_head)}

    def forward(self, x, carried):
        looked_up, cache = self.attention(self.norm1(x), carried['cache'])
        x = x + looked_up                                           # (B, L, d_model)
        inside = self.norm2(x)                                      # (B, L, d_model)
        inside = F.silu(self.gate_proj(inside)) * self.up_proj(inside)      # (B, L, d_mlp)
        return x + self.down_proj(inside), {'cache': cache}         # (B, L, d_model)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.d_head = c.n_heads, c.d_model // c.n_heads
        self.qkv_proj = nn.Linear(c.d_model, 3 * c.d_model, bias=False)
        self.o_proj = nn.Linear(c.d_model, c.d_model, bias=False)

    def forward(self, x, cache):
        """x (B, L, d_model); cache: keys and values of the tokens before x,
        (B, 2, heads, seen, d_head). Returns what was looked up, (B, L, d_model), and the cache with
        the L tokens added."""
        L, seen = x.shape[1], cache.shape[3]
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.n_heads, self.d_head))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, heads, L, d_head) each
        q, k = rotate(q, seen), rotate(k, seen)
        cache = append(cache, torch.stack((k, v), 1))       # torch.cat, but faster (below the line)
        k, v = cache.unbind(1)                                      # (B, heads, seen + L, d_head)
        mask = None             # not needed if nothing was seen (is_causal), or for a single token
        if seen and L > 1:
            mask = torch.ones(L, seen + L, dtype=torch.bool, device=x.device).tril(seen)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not seen)
        return self.o_proj(y.transpose(1, 2).flatten(2)), cache


def rotate(x, seen):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, section 3.2): each pair of numbers
    (2i, 2i+1) of x (B, heads, L, d_head), a point of the plane, is turned by the angle
    position / 10000^(2i/d_head). How well a query fits a key then depends on their distance. x
    stands after `seen` other tokens."""
    L, d_head = x.shape[2:]
    positions = seen + torch.arange(L, device=x.device)
    frequencies = 10000 ** (-torch.arange(0, d_head, 2, device=x.device) / d_head)
    angles = torch.outer(positions, frequencies.repeat_interleave(2))       # (L, d_head)
    quarter_turn = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)   # (a, b) -> (-b, a)
    return (x * angles.cos() + quarter_turn * angles.sin()).to(x.dtype)


# --- the model ------------------------------------------------------------------------------------

LAYERS = {'M': MambaLayer, 'A': LlamaLayer}


class Model(nn.Module):
    """A language model: embedding, layers, norm, and a head tied to the embedding. What it
    carries while it generates is its state: a list with what each layer carries. A state that is
    kept stays valid, and can be continued again and again."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList([LAYERS[letter](c) for letter in c.layers])
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        if c.frozen_embedding:
            self.embedding.requires_grad_(False)
            self.embedding.weight.copy_(sinusoids(c.vocab_size, c.d_model))
        else:
            nn.init.normal_(self.embedding.weight, std=c.d_model ** -0.5)
        for layer in self.layers:
            layer.init_weights()

    def n_params(self):
        """Trained parameters: a frozen embedding does not count."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def init_state(self, batch_size):
        """The state before the first token."""
        return [layer.init_state(batch_size) for layer in self.layers]

    def hidden(self, tokens, state):
        """Read tokens (B, L), which follow those that the state has seen. Returns what the head
        reads, (B, L, d_model), and the new state."""
        x, new_state = self.embedding(tokens), []
        for layer, carried in zip(self.layers, state):
            x, carried = layer(x, carried)
            new_state.append(carried)
        return self.norm(x), new_state

    def head(self, hidden):
        """(..., d_model) -> logits (..., vocab_size)."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, tokens):
        """Whole sequences (B, L) int64, in training -> logits (B, L, vocab_size)."""
        hidden, _ = self.hidden(tokens, self.init_state(len(tokens)))
        return self.head(hidden)

    def prefill(self, tokens):
        """Read prompts (B, L) in one pass. Returns logits (B, vocab_size) of the next token and
        the state."""
        hidden, state = self.hidden(tokens, self.init_state(len(tokens)))
        return self.head(hidden[:, -1]), state

    def step(self, token, state):
        """Read one more token (B,). Returns logits (B, vocab_size) of the next one and the new
        state. A step costs the same after any number of tokens, except in attention."""
        hidden, state = self.hidden(token[:, None], state)
        return self.head(hidden[:, 0]), state

    @torch.no_grad()
    def memory(self, seen):
        """Floats that one sample carries after `seen` tokens (1 or more), by kind: a dict with
        'window' (the last inputs of the short convolutions), 'state' (of the recurrences) and
        'cache' (keys and values), as far as the layers have them."""
        tokens = self.embedding.weight.new_zeros(1, seen, dtype=torch.int64)
        _, state = self.prefill(tokens)
        floats = defaultdict(int)
        for carried in state:
            for name, tensor in carried.items():
                floats[name] += tensor.numel()
        return dict(floats)


def sinusoids(n, d):
    """The embedding of n token ids, (n, d), with E[j,2i] = sin(j / 10000^(2i/d)) and E[j,2i+1] =
    cos(j / 10000^(2i/d))."""
    angles = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


ARCHS = ('transformer', 'mamba', 'hybrid')
# (layers, d_model, d_mlp, heads). d_mlp is for A, heads are for A and D. An RNN has neither, but
# make_model can put other layers in place of its own.
SIZES = {
    'tiny': {'transformer': ('AA', 64, 128, 2),             # for CPUs; the others are the paper's
             'mamba': ('MM', 64, 128, 4),
             'hybrid': ('MA', 64, 128, 4)},
    '0.5M': {'transformer': (8 * 'A', 64, 256, 4),
             'mamba': (16 * 'M', 64, 256, 4),
             'hybrid': (12 * 'M' + 'A', 64, 256, 4)},
    '1M': {'transformer': (16 * 'A', 64, 256, 4),
           'mamba': (10 * 'M', 128, 256, 4),
           'hybrid': (7 * 'M' + 'A', 128, 256, 4)},
    '2M': {'transformer': (12 * 'A', 128, 256, 4),
           'mamba': (18 * 'M', 128, 256, 4),
           'hybrid': (14 * 'M' + 'A', 128, 256, 4)},
}


def make_model(arch, size, vocab_size, d_state=16, frozen_embedding=True, layers=''):
    """A freshly initialised Model; seed torch first to make it reproducible. layers: a pattern in
    place of the architecture's own, for example 'AM'. Raises ValueError on an unknown layer and on
    a d_state that a layer cannot have."""
    for letter in layers:
        if letter not in LAYERS:
            raise ValueError(f'unknown layer {letter!r}: choose from {", ".join(LAYERS)}')
    pattern, *dims = SIZES[size][arch]
    return Model(Config(vocab_size, layers or pattern, *dims, d_state,
                        frozen_embedding=frozen_embedding))


# ==================================================================================================
# What follows can be skipped: a fast torch.cat, DeltaNet, the GRU, a look at attention.

def append(cache, new):
    """Keys and values of more tokens behind those in the cache, (B, 2, heads, tokens, d_head) each.
    Without gradients, unless the cache is empty, the result lies in a buffer with room for 128 more
    tokens, so that not all is copied for every token; the cache is a view of it. buffer.filled is
    how many tokens have been written: if more than this cache has, another continuation of it was
    there first, and a new buffer is begun. So a cache that is kept stays valid."""
    seen, total = cache.shape[3], cache.shape[3] + new.shape[3]
    if not seen:
        return new
    if torch.is_grad_enabled():
        return torch.cat((cache, new), 3)
    buffer = getattr(cache, 'buffer', cache)
    if buffer.shape[3] < total or buffer.filled != seen:
        buffer = F.pad(cache, (0, 0, 0, new.shape[3] + 128))
    buffer[:, :, :, seen:total] = new
    buffer.filled = total
    cache = buffer[:, :, :, :total]
    cache.buffer = buffer
    return cache

# --- D: the DeltaNet layer ------------------------------------------------------------------------

def delta_rule(q, k, v, beta, S, T=64):
    """The delta rule (Schlag et al. 2021, arXiv 2102.11174, section 4.2). The memory of a head is a
    matrix S of values v that are stored under keys k. At every token (q, k, v: rows),

        S = S + k^T beta (v - k S)          y = q S

    k S is what has been stored under k; v overwrites it if beta is 1, or replaces a part of it,
    where linear attention would add v to it. Keys have length 1: what is stored under orthogonal
    keys stays untouched.

    This is done for T tokens at a time (Yang et al. 2024, arXiv 2406.06484). If S is the memory
    before them, token t adds k_t^T u_t to it, with

        u_t = beta_t (v_t - k_t S - sum over i < t of (k_t . k_i) u_i)

    These are triangular equations for the rows of U (T, d_state), which are solved at once.

    q, k, v (B, heads, L, d_state), beta (B, heads, L, 1), S (B, heads, d_state, d_state). Returns
    all y, like v, and the last S."""
    ys = []
    for q, k, v, beta in zip(q.split(T, 2), k.split(T, 2), v.split(T, 2), beta.split(T, 2)):
        system = torch.eye(k.shape[2], device=k.device) + (beta * (k @ k.mT)).tril(-1)
        U = torch.linalg.solve_triangular(system, beta * (v - k @ S), upper=False)
        ys.append(q @ S + (q @ k.mT).tril() @ U)                    # (B, heads, T, d_state)
        S = S + k.mT @ U                                            # (B, heads, d_state, d_state)
    return torch.cat(ys, 2), S


class DeltaNetLayer(nn.Module):
    """A recurrent layer whose memory is a matrix per head, changed by the delta rule."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        width = c.n_heads * c.d_state
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.qkv_proj = nn.Linear(c.d_model, 3 * width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * width, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(3 * width))
        self.beta_proj = nn.Linear(c.d_model, c.n_heads)
        self.out_norm = nn.RMSNorm(c.d_state, c.norm_eps)
        self.out_proj = nn.Linear(width, c.d_model, bias=False)

    def init_weights(self):
        init_convolution(self)

    def init_state(self, batch_size):
        c, zeros = self.config, self.conv_bias.new_zeros
        return {'window': zeros(batch_size, c.d_conv - 1, len(self.conv_bias)),
                'state': zeros(batch_size, c.n_heads, c.d_state, c.d_state)}

    def forward(self, x, carried):
        c, inside = self.config, self.norm(x)                       # (B, L, d_model)
        qkv, window = short_convolution(self, self.qkv_proj(inside), carried['window'])
        qkv = qkv.float().unflatten(-1, (3, c.n_heads, c.d_state))  # (B, L, 3, heads, d_state)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, heads, L, d_state) each
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = self.beta_proj(inside).float().sigmoid().mT[..., None]       # (B, heads, L, 1)
        y, state = delta_rule(q, k, v, beta, carried['state'])      # y (B, heads, L, d_state)
        y = self.out_norm(y.to(x.dtype)).transpose(1, 2).flatten(2)         # (B, L, heads d_state)
        return x + self.out_proj(y), {'window': window, 'state': state}


# --- G: the GRU layer -----------------------------------------------------------------------------

class GRULayer(nn.Module):
    """torch's GRU (Cho et al. 2014, arXiv 1406.1078), behind an RMSNorm and a residual. Its memory
    h has d_state numbers. At every token x, with weights W, V and biases b, c,

        r = sigmoid(W_r x + b_r + V_r h + c_r)          how much of h the candidate n may use
        z = sigmoid(W_z x + b_z + V_z h + c_z)          how much of h stays
        n = tanh(W_n x + b_n + r * (V_n h + c_n))
        h = z * h + (1 - z) * n                         y = h"""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.gru = nn.GRU(c.d_model, c.d_state, batch_first=True)
        self.out_proj = nn.Linear(c.d_state, c.d_model, bias=False)

    def init_weights(self):
        """torch's defaults."""

    def init_state(self, batch_size):
        return {'state': self.norm.weight.new_zeros(batch_size, self.gru.hidden_size)}

    def forward(self, x, carried):
        h = carried['state'][None]                                  # (1, B, d_state)
        y, h = self.gru(self.norm(x), h)                            # y (B, L, d_state)
        return x + self.out_proj(y), {'state': h[0]}


LAYERS |= {'D': DeltaNetLayer, 'G': GRULayer}
for archs in SIZES.values():                        # architectures of their own, as wide as the RNN
    archs['deltanet'] = ('DD', *archs['mamba'][1:])
    archs['gru'] = ('GG', *archs['mamba'][1:])


# --- a look at attention --------------------------------------------------------------------------

def attention_weights(attention, x):
    """How much each token of x (B, L, d_model), the input of an Attention, looks at each token:
    (B, heads, L, L), whose rows add up to 1. Only a drawing needs it."""
    qkv = attention.qkv_proj(x).unflatten(-1, (3, attention.n_heads, attention.d_head))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)                            # (B, heads, L, d_head) each
    scores = rotate(q, 0) @ rotate(k, 0).mT / math.sqrt(attention.d_head)   # (B, heads, L, L)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)
