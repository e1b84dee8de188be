"""How fast is the scan, and how fast could it be?   python -m scan_cuda.bench [cpu|cuda]

Times every implementation at hand (mamba-ssm and mamba.py when they are installed) on the shapes of the paper's grid, in
fp32, beside the floor: the time that the unavoidable would take if nothing else did. Unavoidable are each input read
once and each output written once, at the best measured bandwidth of a copy, and one exponential per token, channel and state
(two in forward + backward: keeping them all would cost more to write and read), at their rate; the larger of the two.
"""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import scan_cuda

D_INNER, D_STATE, LENGTHS = (128, 256), 16, (80, 320, 620, 2500)
TOKENS = {"cpu": 5120, "cuda": 64 * 2500}  # batch = TOKENS / L, at most MAX_BATCH: enough to fill the machine
MAX_BATCH = 256
SECONDS, MIN_RUNS, MAX_RUNS = 0.6, 3, 50  # per measurement, after one run to warm up; MIN_RUNS only where a run is short


def times(run, device):
    """Seconds of single runs, sorted; only the first run where that alone takes long."""
    def once():
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    taken = [once()]
    if taken[0] < 2 * SECONDS:
        taken = []
        while len(taken) < MIN_RUNS or (sum(taken) < SECONDS and len(taken) < MAX_RUNS):
            taken.append(once())
    return sorted(taken)


def median_time(run, device):
    return statistics.median(times(run, device))


def copy_bandwidth(device):
    """Bytes per second, read and written together, of a copy far larger than the caches."""
    x = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return 2 * 4 * x.numel() / times(lambda: y.copy_(x), device)[0]


def exponential_rate(device):
    """fp32 exponentials per second. CPU: those of the kernel, on what stays in the L1 cache, times the threads. GPU: the
    special function units' 16 per clock and multiprocessor (CUDA C++ programming guide, arithmetic instructions)."""
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        return 16 * card.multi_processor_count * 1e3 * getattr(card, "clock_rate", 1_500_000)  # the top clock, in kHz
    x = torch.zeros(4096)
    if scan_cuda._load(device):
        return torch.get_num_threads() * 500 * x.numel() / times(lambda: torch.ops.scan_cuda.exponentials(x, 500), device)[0]
    return x.numel() / times(lambda: torch.exp2(x), device)[0]


def implementations(device):
    """name -> (prepare, run): run(*prepare(u, delta, A, B, C, D)) is y."""
    as_is = lambda *inputs: inputs
    first = lambda f: lambda *inputs: f(*inputs)[0]
    found = {}
    if scan_cuda._load(device):
        found[f"{device} kernel"] = as_is, first(scan_cuda.selective_scan)
    found["fallback"] = as_is, first(scan_cuda.selective_scan_fallback)
    found["reference"] = as_is, first(scan_cuda.selective_scan_reference)
    try:
        from mambapy.pscan import pscan

        def mamba_py(u, delta, A, B, C, D):
            h = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None])
            return (h @ C[..., None]).squeeze(3) + D * u
        found["mamba.py"] = as_is, mamba_py
    except ImportError:
        pass
    if device == "cuda":
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
            turn = lambda t: t.detach().transpose(1, 2).contiguous().requires_grad_()  # its own layout, not timed
            found["mamba-ssm"] = (lambda u, delta, A, B, C, D: (turn(u), turn(delta), A, turn(B), turn(C), D),
                                  lambda *inputs: selective_scan_fn(*inputs).transpose(1, 2))
        except ImportError:
            pass
    return found


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def main(device):
    bandwidth, exponentials = copy_bandwidth(device), exponential_rate(device)
    print(f"{machine(device)}; torch {torch.__version__}; copy {bandwidth / 1e9:,.0f} GB/s, "
          f"{exponentials / 1e9:,.1f} G exponentials/s")
    print(f"{'batch':>5} {'L':>5} {'d_inner':>7}  {'implementation':<14} {'forward':>10} {'of floor':>8} "
          f"{'+backward':>10} {'of floor':>8}  (ms, medians)")
    found = implementations(device)
    for d_inner in D_INNER:
        for L in LENGTHS:
            batch = min(MAX_BATCH, max(1, TOKENS[device] // L))
            tokens = batch * L
            torch.manual_seed(0)
            make = lambda *shape: torch.randn(*shape, device=device)
            inputs = [make(batch, L, d_inner), torch.nn.functional.softplus(make(batch, L, d_inner) - 3),
                      -torch.arange(1.0, D_STATE + 1, device=device).repeat(d_inner, 1), make(batch, L, D_STATE),
                      make(batch, L, D_STATE), make(d_inner)]
            dy = make(batch, L, d_inner)
            floors = [max(4 * tokens * (rows * d_inner + small * D_STATE) / bandwidth,
                          passes * tokens * d_inner * D_STATE / exponentials)
                      for passes, rows, small in ((1, 3, 2), (2, 3 + 5, 2 + 4))]  # u, delta, y; + u, delta, dy, du, ddelta
            shape = f"{batch:>5} {L:>5} {d_inner:>7}"
            print(f"{shape}  {'floor':<14} {1e3 * floors[0]:>10.2f} {'':>8} {1e3 * floors[1]:>10.2f}")
            expected = None
            for name, (prepare, run) in found.items():
                print(f"{shape}  {name} ...", end="\r", file=sys.stderr, flush=True)
                own = prepare(*(t.requires_grad_() for t in inputs))
                with torch.no_grad():
                    y = run(*own)
                    expected = y if expected is None else expected
                    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
                    forward = median_time(lambda: run(*own), device)
                own_dy = dy if y.is_contiguous() else dy.transpose(1, 2).contiguous().transpose(1, 2)
                both = median_time(lambda: torch.autograd.grad(run(*own), own, own_dy), device)
                print(f"{shape}  {name:<14} {1e3 * forward:>10.2f} {floors[0] / forward:>8.1%} "
                      f"{1e3 * both:>10.2f} {floors[1] / both:>8.1%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
