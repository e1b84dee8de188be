"""How fast is the scan, and the models that use it?   python -m scan_cuda.bench [cpu|cuda]

Times in fp32, with the paper's batch of 64: every implementation of the scan at hand (mamba-ssm if installed)
on the shapes of the paper's grid; then the training and generation step of each architecture of size 0.5M.
Medians on a CPU; on a GPU, CUDA events around queued calls: launching counts only where the GPU waits for it.
"""
import platform
import statistics
import sys
import timeit

import torch
import torch.nn.functional as F

import scan_cuda

D_INNER, D_STATE, LENGTHS, BATCH = (128, 256), 16, (80, 320, 620, 2500), 64
CALLS = 10      # of one measurement, after one to warm up


def milliseconds(call, device):
    """The time of one call."""
    call()
    if device == 'cpu':
        return 1e3 * statistics.median(timeit.repeat(call, number=1, repeat=CALLS))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / CALLS


def implementations(device, inputs):
    """name -> (scan, its inputs): scan(*inputs)[0] is y."""
    scans = {'fallback': scan_cuda.selective_scan_fallback, 'reference': scan_cuda.selective_scan_reference}
    if scan_cuda.build.load(device):
        scans = {f'{device} kernel': scan_cuda.selective_scan} | scans
    found = {name: (scan, inputs) for name, scan in scans.items()}
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        u, delta, A, B, C, D = inputs
        own = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (u, delta, B, C)]
        found['mamba-ssm'] = (lambda u, delta, B, C: (selective_scan_fn(u, delta, A, B, C, D),), own)
    except ImportError:
        pass
    return found


def time_scans(device):
    print('batch     L d_inner  scan by         forward  + backward  (ms)')
    for d_inner in D_INNER:
        for L in LENGTHS:
            make = lambda *shape: torch.randn(*shape, device=device)
            inputs = [make(BATCH, L, d_inner), F.softplus(make(BATCH, L, d_inner) - 3),
                      -torch.arange(1.0, D_STATE + 1, device=device).repeat(d_inner, 1),
                      make(BATCH, L, D_STATE), make(BATCH, L, D_STATE), make(d_inner)]
            for name, (scan, own) in implementations(device, [t.requires_grad_() for t in inputs]).items():
                with torch.no_grad():
                    forward = milliseconds(lambda: scan(*own), device)
                both = milliseconds(lambda: torch.autograd.grad(scan(*own)[0].sum(), own), device)
                print(f'{BATCH:5} {L:5} {d_inner:7}  {name:12} {forward:10.2f} {both:11.2f}', flush=True)


def time_models(device):
    import models       # which uses the scan: only this program looks ahead
    print('batch     L  model        training step  generation step  (ms)')
    for arch in models.ARCHS:
        for L in LENGTHS:
            model = models.make_model(arch, '0.5M', 80).to(device)
            optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
            tokens = torch.randint(80, (BATCH, L), device=device)

            def train():
                optimizer.zero_grad()
                F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
                optimizer.step()
            training = milliseconds(train, device)
            with torch.inference_mode():
                _, state = model.prefill(tokens)
                generation = milliseconds(lambda: model.step(tokens[:, 0], state), device)
            print(f'{BATCH:5} {L:5}  {arch:12} {training:13.2f} {generation:16.2f}', flush=True)


if __name__ == '__main__':
    device = sys.argv[1] if len(sys.argv) > 1 else 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else platform.machine()
    print(f'{name}, torch {torch.__version__}, {torch.get_num_threads()} threads')
    time_scans(device)
    time_models(device)
