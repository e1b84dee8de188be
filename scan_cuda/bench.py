"""How fast are the scan and the models?

    python -m scan_cuda.bench               every scan at the lengths of the paper's grid
    python -m scan_cuda.bench generation    what one more token costs; writes out/generation.json,
                                            which plot.py draws

Medians, in fp32, on the GPU if there is one.
"""
import json
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import models       # which imports the scan: no other file imports one that comes later
import scan_cuda

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BATCH, LENGTHS, D_INNER, D_STATE = 64, (80, 320, 620, 2500), 128, 16
SCANS = (scan_cuda.selective_scan, scan_cuda.selective_scan_fallback,
         scan_cuda.selective_scan_reference)


def milliseconds(function, *arguments):
    """The time of one call."""
    names = {'function': function, 'arguments': arguments}
    timer = Timer('function(*arguments)', globals=names, num_threads=torch.get_num_threads())
    return 1e3 * timer.blocked_autorange().median


def scan_inputs(L):
    u, delta = torch.rand(2, BATCH, L, D_INNER)
    A = -torch.arange(1.0, D_STATE + 1).repeat(D_INNER, 1)
    B, C = torch.randn(2, BATCH, L, D_STATE)
    D, initial_state = torch.randn(D_INNER), torch.zeros(BATCH, D_INNER, D_STATE)
    return [t.to(DEVICE).requires_grad_() for t in (u, delta, A, B, C, D, initial_state)]


def forward_and_backward(scan, *inputs):
    y, _ = scan(*inputs)
    torch.autograd.grad(y.sum(), inputs)


def time_scans():
    print(f'torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads')
    print('    L  scan                          forward  + backward  (ms)')
    for L in LENGTHS:
        inputs = scan_inputs(L)
        for scan in SCANS:
            with torch.no_grad():
                forward = milliseconds(scan, *inputs)
            both = milliseconds(forward_and_backward, scan, *inputs)
            print(f'{L:5}  {scan.__name__:26} {forward:10.2f} {both:11.2f}')


def generation_cost(size='0.5M', lengths=tuple(2 ** k for k in range(6, 18))):
    """Time (seconds) and memory (bytes) of one more token after `lengths` tokens, batch 1, of
    freshly initialised models: neither depends on what the tokens are. Returns a list of dicts."""
    rows, token = [], torch.ones(1, dtype=torch.int64, device=DEVICE)
    for arch in models.ARCHS:
        model = models.make_model(arch, size, 128).to(DEVICE)
        for length in lengths:
            state = state_after(model, length)
            memory = sum(t.nbytes for carried in state for t in carried.values())
            with torch.inference_mode():
                time = milliseconds(model.step, token, state)
            rows.append(dict(arch=arch, size=size, length=length, seconds=time / 1e3,
                             bytes=memory, device=DEVICE, threads=torch.get_num_threads()))
            print(f'{arch:12} {size}  {length:>8,} tokens of context   {time:8.2f} ms a token   '
                  f'{memory / 1e6:10.3f} MB')
    return rows


def state_after(model, length):
    """A state as large as after so many tokens."""
    state = model.init_state(1)
    for carried in state:
        if 'cache' in carried:
            shape = list(carried['cache'].shape)        # (1, 2, heads, 0, d_head)
            shape[3] = length
            carried['cache'] = torch.zeros(shape, device=DEVICE)
    return state


if __name__ == '__main__':
    if 'generation' in sys.argv:
        path = Path('out', 'generation.json')
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(generation_cost(), indent=1))
        print(path)
    else:
        time_scans()
