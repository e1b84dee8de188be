"""Two layers, for the runs of convolution.jsonl: a Mamba layer without its recurrence, and one
without its convolution. Copy both into models.py, above LAYERS, and add their letters:

  LAYERS = {'M': MambaLayer, 'A': LlamaLayer, 'C': Convolution, 'R': Recurrence}
"""
import torch
import torch.nn.functional as F
from torch import nn

from models import MambaLayer, init_convolution, short_convolution


class Convolution(nn.Module):
    """Mixes each token with the three before it, behind a gate. Carries only these three."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(c.d_inner, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)

    def init_weights(self):
        init_convolution(self)

    def init_state(self, batch_size):
        c = self.config
        return {'window': self.in_proj.weight.new_zeros(batch_size, c.d_conv - 1, c.d_inner)}

    def forward(self, x, carried):
        u, z = self.in_proj(self.norm(x)).chunk(2, -1)              # (B, L, d_inner) each
        u, window = short_convolution(self, u, carried['window'])   # (B, L, d_inner)
        return x + self.out_proj(u * F.silu(z)), {'window': window}


class Recurrence(MambaLayer):
    """The convolution passes each token on as it is, and is not trained."""

    def init_weights(self):
        self.config.layers = self.config.layers.replace('R', 'M')   # the layers that it counts
        super().init_weights()
        with torch.no_grad():
            self.conv_weight.copy_(torch.tensor([0., 0., 0., 1.]).expand_as(self.conv_weight))
            self.conv_bias.zero_()
        self.conv_weight.requires_grad = self.conv_bias.requires_grad = False
