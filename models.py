"""The three architectures: Transformer, RNN (Mamba) and hybrid, as one stack of two kinds of layer.

  transformer   n LLaMA layers        (RMSNorm, rotary positions, SwiGLU, no biases)
  mamba         n Mamba layers        (selective state space)
  hybrid        n Mamba layers, then one LLaMA layer on top: the paper's second cure (section 6)

Symbols, as in the Mamba paper (Gu & Dao 2023, arXiv 2312.00752) and its code:
  B         batch                                   L         sequence length
  d_model   width of the residual stream            d_inner   width inside a Mamba layer, 2 d_model
  d_state   size of the state per inner channel     dt_rank   rank of the map to delta, ceil(d_model/16)
  delta     step size (Δ)                           A, B, C, D  the state space model (here: A, Bs, Cs, D)

The memory of a model is what it carries from one token to the next. In a Mamba layer that is a
fixed number of floats, d_inner * (d_state + 3), in a LLaMA layer 2 d_model floats per token seen:
this difference is what the paper is about. The scan comes from scan_cuda/.
"""
import json
import math
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from scan_cuda import causal_conv1d, selective_scan

ARCHS = ('transformer', 'mamba', 'hybrid')
#          transformer                       mamba            hybrid
#          (d_model, d_mlp, layers, heads)   (d_model,        (d_model, Mamba layers, d_mlp,
#                                             layers)          heads of the one LLaMA layer)
SIZES = {
    'tiny': {'transformer': (64, 128, 2, 2), 'mamba': (64, 2), 'hybrid': (64, 1, 128, 4)},
    '0.5M': {'transformer': (64, 256, 8, 4), 'mamba': (64, 16), 'hybrid': (64, 12, 256, 4)},
    '1M': {'transformer': (64, 256, 16, 4), 'mamba': (128, 10), 'hybrid': (128, 7, 256, 4)},
    '2M': {'transformer': (128, 256, 12, 4), 'mamba': (128, 18), 'hybrid': (128, 14, 256, 4)},
}


@dataclass
class Config:
    vocab_size: int
    d_model: int
    n_mamba: int = 0                # Mamba layers, below
    n_llama: int = 0                # LLaMA layers, above
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


# --- both kinds of layer -----------------------------------------------------------------------------

class OneDNNLinear(torch.autograd.Function):
    """x (..., d_in) @ weight (d_out, d_in).T + bias in fp32 by oneDNN. torch leaves such products to MKL,
    which on AMD processors runs at a third of the speed (measured: 74 against 200 GFLOP/s a core)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, 'none', [], '')
        grad = grad.flatten(0, -2)
        return dx, grad.t() @ x.flatten(0, -2), grad.sum(0) if ctx.has_bias else None


class Linear(nn.Linear):
    """torch's, through oneDNN where it trains on a CPU."""

    def forward(self, x):
        if x.device.type == 'cpu' and x.dtype == torch.float32 and x.requires_grad and not torch.is_autocast_enabled('cpu') \
                and hasattr(torch.ops.mkldnn, '_linear_pointwise'):
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


# --- the LLaMA layer -------------------------------------------------------------------------------

def rotary(positions, d_head, theta):
    """Rotary position embeddings (Su et al. 2021): unit complex numbers (L, 1, d_head/2) for positions (L,)."""
    frequencies = theta ** (-torch.arange(0, d_head, 2, device=positions.device) / d_head)
    angles = positions[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x, rope):
    """Rotate the pairs (2i, 2i+1) of x (B, L, heads, d_head), read as complex numbers: one pass over
    memory where the usual sines, cosines, halves and concatenations take seven."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, if n_kv_heads < n_heads, grouped queries."""

    def __init__(self, c):
        super().__init__()
        self.n_heads, self.n_kv_heads = c.n_heads, c.n_kv_heads or c.n_heads
        self.d_head = c.d_model // c.n_heads
        self.qkv_proj = Linear(c.d_model, (self.n_heads + 2 * self.n_kv_heads) * self.d_head, bias=False)
        self.o_proj = Linear(c.d_model, c.d_model, bias=False)

    def forward(self, x, rope, cache=None, seen=0):
        """x (B, L, d_model), rope: rotary() of the L positions. cache: keys and values
        (B, n_kv_heads, max_length, d_head) of the `seen` tokens before, written to in place."""
        B, L, _ = x.shape
        qkv = self.qkv_proj(x).view(B, L, -1, self.d_head)
        qk, v = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), 2)
        q, k = rotate(qk, rope).split((self.n_heads, self.n_kv_heads), 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # (B, heads, L, d_head)
        mask = None
        if cache is not None:
            for kept, new in zip(cache, (k, v)):
                kept[:, :, seen:seen + L] = new
            k, v = (kept[:, :, :seen + L] for kept in cache)
            if seen and L > 1:
                mask = torch.ones(L, seen + L, dtype=torch.bool, device=x.device).tril(seen)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=L > 1 and mask is None,
                                           enable_gqa=self.n_kv_heads < self.n_heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, -1))


class LlamaLayer(nn.Module):
    """Attention, then SwiGLU, each behind an RMSNorm and a residual (Touvron et al. 2023)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.norm1, self.norm2 = nn.RMSNorm(c.d_model, c.norm_eps), nn.RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.gate_proj = Linear(c.d_model, c.d_mlp, bias=False)
        self.up_proj = Linear(c.d_model, c.d_mlp, bias=False)
        self.down_proj = Linear(c.d_mlp, c.d_model, bias=False)

    def init_state(self, batch_size, max_length, device, dtype):
        c = self.config
        shape = (batch_size, c.n_kv_heads or c.n_heads, max_length, c.d_model // c.n_heads)
        return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)]

    def forward(self, x, rope, state=None, seen=0):
        x = x + self.attention(self.norm1(x), rope, state, seen)
        inside = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(inside)) * self.up_proj(inside))


# --- the Mamba layer -------------------------------------------------------------------------------

class MambaLayer(nn.Module):
    """Mamba's block (arXiv 2312.00752, figure 3 and algorithm 2) behind an RMSNorm and a residual."""

    def __init__(self, c):
        super().__init__()
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

    def init_state(self, batch_size, max_length, device, dtype):
        """The last d_conv - 1 inputs of the convolution, and the state of the scan (always fp32)."""
        c = self.config
        return [torch.zeros(batch_size, c.d_conv - 1, c.d_inner, device=device, dtype=dtype),
                torch.zeros(batch_size, c.d_inner, c.d_state, device=device)]

    def forward(self, x, rope=None, state=None, seen=0):
        c = self.config
        u, z = self.in_proj(self.norm(x)).chunk(2, -1)                          # (B, L, d_inner) each
        conv_state, scan_state = state or (None, None)
        if state is not None:
            state[0] = torch.cat((conv_state, u), 1)[:, 1 - c.d_conv:]
        u = causal_conv1d(u, self.conv_weight, self.conv_bias, conv_state)      # SiLU included
        delta, Bs, Cs = self.x_proj(u).split((c.dt_rank, c.d_state, c.d_state), -1)
        delta = F.softplus(self.dt_proj(delta)).to(u.dtype)     # (autocast on CUDA makes it fp32)
        y, scan_state = selective_scan(u, delta, -self.A_log.exp(), Bs, Cs, self.D, scan_state)
        if state is not None:
            state[1] = scan_state
        return x + self.out_proj(y * F.silu(z))


# --- the model -------------------------------------------------------------------------------------

def sinusoids(n, d):
    """(n, d) with E[j,2i] = sin(j / 10000^(2i/d)), E[j,2i+1] = cos(j / 10000^(2i/d))."""
    angles = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    return torch.stack((angles.sin(), angles.cos()), -1).view(n, -1)[:, :d].contiguous()


class State:
    """What a model carries from token to token while it generates: a list of tensors per layer
    (changed in place), and how many tokens it has seen."""

    def __init__(self, layers):
        self.layers, self.seen = layers, 0

    def floats(self):
        """Floats that one sample occupies now: of a KV cache, what has been written."""
        cached = lambda t: t[0, :, :self.seen].numel() if t.dim() == 4 else t[0].numel()
        return sum(cached(t) for layer in self.layers for t in layer)


class Model(nn.Module):
    """A language model: embedding, Mamba layers, LLaMA layers, norm, head."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList([MambaLayer(c) for _ in range(c.n_mamba)] +
                                    [LlamaLayer(c) for _ in range(c.n_llama)])
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        if not c.tied_head:
            self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self):
        c = self.config
        if c.frozen_embedding:
            self.embedding.weight = nn.Parameter(sinusoids(c.vocab_size, c.d_model), requires_grad=False)
        else:
            nn.init.normal_(self.embedding.weight, std=c.d_model ** -0.5)
        # torch's default for the matrices, as in the authors' hybrid: LLaMA's N(0, 0.02) is meant for widths in
        # the thousands, at d_model=64 a hybrid stayed on a plateau with it (IsTree, cot, n=12, seed 1, 150,000
        # samples: 68.4%, with this 99.0%)
        for layer in self.layers[:c.n_mamba]:                   # Mamba: the same, except for these
            bound = c.d_conv ** -0.5
            nn.init.uniform_(layer.conv_weight, -bound, bound)
            nn.init.uniform_(layer.conv_bias, -bound, bound)
            nn.init.uniform_(layer.dt_proj.weight, -c.dt_rank ** -0.5, c.dt_rank ** -0.5)
            with torch.no_grad():
                # softplus(bias) log-uniform in [0.001, 0.1]: channels remember for 10 to 1,000 tokens
                delta = torch.exp(torch.empty(c.d_inner).uniform_(math.log(0.001), math.log(0.1)))
                layer.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))
                layer.A_log.copy_(torch.arange(1, c.d_state + 1).float().log().expand(c.d_inner, -1))
                layer.out_proj.weight /= math.sqrt(c.n_mamba)   # residual branches add up over layers

    def n_params(self):
        """Trained parameters: a frozen embedding does not count."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def init_state(self, batch_size, max_length):
        """The State before the first token. max_length bounds the tokens of a KV cache."""
        weight = self.embedding.weight
        return State([layer.init_state(batch_size, max_length, weight.device, weight.dtype) for layer in self.layers])

    def hidden(self, tokens, state=None):
        """tokens (B, L) -> (B, L, d_model), what the head reads."""
        seen = state.seen if state else 0
        c, rope = self.config, None
        if c.n_llama:
            positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)
            rope = rotary(positions, c.d_model // c.n_heads, c.rope_theta)
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, state.layers[i] if state else None, seen)
        if state:
            state.seen += tokens.shape[1]
        return self.norm(x)

    def head(self, hidden):
        """(..., d_model) -> logits (..., vocab_size)."""
        return F.linear(hidden, self.embedding.weight if self.config.tied_head else self.lm_head.weight)

    def forward(self, tokens, state=None):
        """tokens (B, L) int64 -> logits (B, L, vocab_size). With a state, the tokens continue those it
        has seen, in one parallel pass, and it is updated in place."""
        return self.head(self.hidden(tokens, state))

    def prefill(self, tokens, max_length):
        """Read prompts (B, L) in one parallel pass. Returns logits (B, vocab_size) of the next token and
        the State, which has room for max_length tokens in all."""
        state = self.init_state(len(tokens), max_length)
        return self.head(self.hidden(tokens, state)[:, -1]), state

    def step(self, token, state):
        """Read one more token (B,). Returns logits (B, vocab_size) of the next one; updates the state.
        The work does not depend on the tokens seen, except for a LLaMA layer's attention."""
        return self.head(self.hidden(token[:, None], state)[:, 0])


def make_model(arch, size, vocab_size, d_state=16, frozen_embedding=True):
    """A freshly initialised Model; seed torch first to make it reproducible. Raises ValueError on an
    unknown arch or size. The sizes are the paper's, plus `tiny` for CPUs, two layers each."""
    for name, value, known in (('arch', arch, ARCHS), ('size', size, SIZES)):
        if value not in known:
            raise ValueError(f'unknown {name} {value!r}: choose one of {", ".join(known)}')
    dims = SIZES[size][arch]
    if arch == 'transformer':
        d_model, d_mlp, n_llama, n_heads = dims
        layers = dict(n_llama=n_llama, d_mlp=d_mlp, n_heads=n_heads)
    elif arch == 'mamba':
        d_model, n_mamba = dims
        layers = dict(n_mamba=n_mamba)
    else:
        d_model, n_mamba, d_mlp, n_heads = dims
        layers = dict(n_mamba=n_mamba, n_llama=1, d_mlp=d_mlp, n_heads=n_heads)
    return Model(Config(vocab_size, d_model, d_state=d_state, frozen_embedding=frozen_embedding, **layers))


# --- pretrained checkpoints --------------------------------------------------------------------------

# hub's names -> ours; several names on the left are stacked in this order
LLAMA_NAMES = {
    'embedding.weight': ['model.embed_tokens.weight'], 'norm.weight': ['model.norm.weight'],
    'layers.#.norm1.weight': ['model.layers.#.input_layernorm.weight'],
    'layers.#.norm2.weight': ['model.layers.#.post_attention_layernorm.weight'],
    'layers.#.attention.qkv_proj.weight': [f'model.layers.#.self_attn.{x}_proj.weight' for x in 'qkv'],
    'layers.#.attention.o_proj.weight': ['model.layers.#.self_attn.o_proj.weight'],
    **{f'layers.#.{x}_proj.weight': [f'model.layers.#.mlp.{x}_proj.weight'] for x in ('gate', 'up', 'down')},
    'lm_head.weight': ['lm_head.weight']}
MAMBA_NAMES = {
    'embedding.weight': ['backbone.embeddings.weight'], 'norm.weight': ['backbone.norm_f.weight'],
    'layers.#.norm.weight': ['backbone.layers.#.norm.weight'], 'lm_head.weight': ['lm_head.weight'],
    'layers.#.conv_weight': ['backbone.layers.#.mixer.conv1d.weight'],
    'layers.#.conv_bias': ['backbone.layers.#.mixer.conv1d.bias'],
    **{f'layers.#.{x}': [f'backbone.layers.#.mixer.{x}'] for x in (
        'in_proj.weight', 'x_proj.weight', 'dt_proj.weight', 'dt_proj.bias', 'A_log', 'D', 'out_proj.weight')}}


def pretrained_config(hub):
    """The hub's config.json (a dict) -> Config. Raises ValueError, naming what we don't support."""
    kind, get = hub.get('model_type'), hub.get
    if kind == 'llama':
        rope = get('rope_parameters') or get('rope_scaling') or {}
        d_head = hub['hidden_size'] // hub['num_attention_heads']
        fixed = dict(hidden_act='silu', attention_bias=False, mlp_bias=False, head_dim=d_head, pretraining_tp=1)
        if (scaling := rope.get('rope_type', rope.get('type', 'default'))) != 'default':
            raise ValueError(f'rope type {scaling!r} is not supported: only default')
        config = Config(hub['vocab_size'], hub['hidden_size'], n_llama=hub['num_hidden_layers'],
                        d_mlp=hub['intermediate_size'], n_heads=hub['num_attention_heads'],
                        n_kv_heads=get('num_key_value_heads') or 0, norm_eps=get('rms_norm_eps', 1e-6),
                        rope_theta=float(rope.get('rope_theta', get('rope_theta', 10000.0))),
                        frozen_embedding=False, tied_head=get('tie_word_embeddings', False))
    elif kind == 'mamba':
        config = Config(hub['vocab_size'], hub['hidden_size'], n_mamba=hub['num_hidden_layers'],
                        d_state=get('state_size', 16), d_conv=get('conv_kernel', 4), expand=get('expand', 2),
                        norm_eps=get('layer_norm_epsilon', 1e-5), frozen_embedding=False,
                        tied_head=get('tie_word_embeddings', True))
        fixed = dict(hidden_act='silu', use_bias=False, use_conv_bias=True, time_step_rank=config.dt_rank,
                     intermediate_size=config.d_inner)
    else:
        raise ValueError(f'model_type {kind!r} is not supported: only llama and mamba')
    for name, value in fixed.items():
        if get(name) not in (None, 'auto', value):
            raise ValueError(f'{name}={get(name)!r} is not supported: only {value!r}')
    return config


def from_pretrained(name_or_dir, dtype=torch.float32):
    """A LLaMA- or Mamba-family checkpoint in the hub's layout (config.json and *.safetensors), from a
    local folder or a hub name, as a Model: forward(tokens (B, L)) gives logits (B, L, vocab_size).
    Needs the packages that come with `transformers`. Raises ValueError if there is no such checkpoint, a
    file is damaged, or it asks for what is not supported."""
    try:
        from huggingface_hub import snapshot_download
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError('pretrained checkpoints need one more package: pip install transformers')
    where = Path(name_or_dir)
    if not where.is_dir():
        try:
            where = Path(snapshot_download(str(name_or_dir), allow_patterns=['config.json', '*.safetensors']))
        except Exception as error:          # offline, unknown, gated, ...
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f'{name_or_dir}: neither a folder nor to be had from the hub ({reason[0]})')
    try:
        config = pretrained_config(json.loads((where / 'config.json').read_text()))
        theirs = {name: tensor for file in sorted(where.glob('*.safetensors')) for name, tensor in load_file(file).items()}
    except KeyError as error:
        raise ValueError(f'{name_or_dir}: config.json lacks {error}')
    except Exception as error:              # no or damaged files
        raise ValueError(f'{name_or_dir}: {error}')
    with torch.device('meta'):
        model = Model(config)
    weights = {}
    for ours in model.state_dict():
        number = ''.join(re.findall(r'^layers\.(\d+)', ours))
        names = (LLAMA_NAMES if config.n_llama else MAMBA_NAMES)[re.sub(r'^layers\.\d+', 'layers.#', ours)]
        names = [name.replace('#', number) for name in names]
        if missing := [name for name in names if name not in theirs]:
            raise ValueError(f'{name_or_dir}: the checkpoint lacks {missing[0]}')
        weights[ours] = torch.cat([theirs[name] for name in names]).to(dtype)
        if ours.endswith('conv_weight'):
            weights[ours] = weights[ours].squeeze(1)
        if ours.endswith('qkv_proj.weight'):    # the hub rotates the pairs (i, i + d_head/2), we (2i, 2i+1)
            rotated = config.d_model + (config.n_kv_heads or config.n_heads) * config.d_model // config.n_heads
            pairs = weights[ours][:rotated].view(-1, 2, config.d_model // config.n_heads // 2, config.d_model)
            weights[ours][:rotated] = pairs.transpose(1, 2).reshape(rotated, config.d_model)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f'{name_or_dir}: {str(error).splitlines()[-1].strip()}')
    return model


# --- what a token costs -------------------------------------------------------------------------------

def generation_cost(size='0.5M', lengths=tuple(2 ** k for k in range(6, 18)), repeats=20):
    """Time (median, seconds) and memory (bytes) of one more token after `lengths` tokens, batch 1, fp32, of freshly
    initialised models: neither depends on what the tokens are. Returns a list of dicts."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rows = []
    for arch in ARCHS:
        model = make_model(arch, size, 128).to(device)
        for length in lengths:
            state, seconds = model.init_state(1, length + repeats), []
            state.seen = length                             # as if read: zeros cost as much as anything
            memory = 4 * state.floats()
            with torch.inference_mode():
                for _ in range(repeats):
                    started = time.perf_counter()
                    model.step(torch.ones(1, dtype=torch.int64, device=device), state).argmax().item()
                    seconds.append(time.perf_counter() - started)
            rows.append(dict(arch=arch, size=size, length=length, seconds=statistics.median(seconds), bytes=memory,
                             device=device.type, threads=torch.get_num_threads()))
            print(f'{arch:12} {size}  {length:>8,} tokens of context   {1e3 * rows[-1]["seconds"]:8.2f} ms a token   '
                  f'{memory / 1e6:10.3f} MB')
    return rows


if __name__ == '__main__':
    out = Path('out', 'generation.json')
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(generation_cost(), indent=1))
    print(f'{out}: drawn by plot.py')
