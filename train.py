"""Train and evaluate the grid: tasks x archs x setups x sizes x n_nodes x seeds, one cell at a time.

  python train.py                                             the main job, for a 2-core laptop
  python train.py --archs=mamba --setups=cot,retrieval --n_nodes=16 --out=out/mine
  python train.py --preset=paper                              the paper's grid: a GPU, please
  python train.py --help                                      every constant

Each cell trains a model on samples made on the fly, then generates on held-out prompts with the
retriever running live, and writes out/{task}-{arch}-{setup}-{size}-n{n}-s{seed}/: config.json,
log.jsonl (a line per evaluation), checkpoint.pt, result.json. Run the same command again after an
interruption: finished cells are skipped, the unfinished ones continue where their checkpoints stand.
Run it several times at once, or under torchrun, and the processes share the cells among them.
"""
import inspect
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

try:
    import fcntl
except ImportError:
    fcntl = None

import data
import models


@dataclass
class Constants:
    # the grid: each a value or several, separated by commas
    tasks: tuple = ('istree',)              # what is learned (data.TASKS)
    archs: tuple = ('transformer', 'mamba', 'hybrid')   # the architectures (models.ARCHS)
    setups: tuple = ('direct', 'cot', 'retrieval')      # answer at once, after a chain of thought, with a retriever
    sizes: tuple = ('tiny',)                # of the models (models.SIZES): tiny, 0.5M, 1M, 2M
    n_nodes: tuple = (12,)                  # size of the task: nodes of the graph, length of the sequence
    seeds: tuple = (0,)                     # of the initial weights and the training data
    # the task
    distribution: str = 'two_star'          # of istree's graphs: two_star or random
    n_val: int = 1000                       # held-out samples for the result
    # the model
    d_state: int = 1                        # size of Mamba's state per inner channel: its memory (the paper: 16)
    frozen_embedding: bool = False          # sinusoids that are not trained (the paper), or learned
    # training: where there are names, give one value for all or name:value,...
    samples: dict = field(default_factory=lambda: dict(direct=40_000, cot=160_000, retrieval=10_000))   # to train on
    batch_size: dict = field(default_factory=lambda: dict(direct=32, cot=32, retrieval=8))  # samples per step
    lr: dict = field(default_factory=lambda: {'transformer': 3e-3, 'mamba': 6e-3, 'hybrid': 4e-3})  # highest learning rate
    eval_every: dict = field(default_factory=lambda: dict(direct=10_000, cot=25_000, retrieval=2_500))  # samples a log line
    warmup_samples: int = 2000              # learning rate rises linearly, then falls as a cosine to 0
    grad_clip: float = 1.0                  # largest norm of the gradient, 0: no limit
    dtype: str = 'float32'                  # float32, or bfloat16 by autocast
    # running
    out: str = 'out'                        # folder of the results
    device: str = 'auto'                    # auto, cpu, cuda or mps
    eval_batch: int = 500                   # samples generated at a time
    checkpoint_seconds: int = 30            # between two checkpoints
    processes: int = 0                      # cells run at once, 0: one per CPU core; one per GPU by torchrun


PAPER = dict(sizes=('0.5M', '1M', '2M'), n_nodes=(16, 32, 64), n_val=5000, d_state=16, frozen_embedding=True,
             samples=dict.fromkeys(data.SETUPS, 1_000_000),
             batch_size=dict.fromkeys(data.SETUPS, 64),
             lr={'transformer': 1e-3, 'mamba': 3e-4, 'hybrid': 3e-4},
             eval_every=dict.fromkeys(data.SETUPS, 100_000),
             warmup_samples=10_000, grad_clip=0.0)
HOTPOT = dict(tasks=('hotpot',), setups=('retrieval',), n_nodes=(data.HOTPOT_PARAGRAPHS,), distribution='mixed', n_val=1500,
              d_state=16, samples=dict.fromkeys(data.SETUPS, 80_000), batch_size=dict.fromkeys(data.SETUPS, 16),
              lr={'transformer': 1e-3, 'mamba': 4e-3, 'hybrid': 3e-3}, eval_every=dict.fromkeys(data.SETUPS, 20_000))
PRIMITIVES = dict(tasks=('recall', 'index'), setups=('direct', 'retrieval'), n_nodes=(4, 6, 8, 12),
                  samples={'direct': 32_000, 'cot': 0, 'retrieval': 8_000}, batch_size=dict.fromkeys(data.SETUPS, 16),
                  eval_every=dict.fromkeys(data.SETUPS, 8_000))
PRESETS = {'default': {}, 'paper': PAPER, 'hotpot': HOTPOT, 'primitives': PRIMITIVES}
CHOICES = dict(tasks=data.TASKS, archs=models.ARCHS, setups=data.SETUPS, sizes=models.SIZES,
               distribution=[*data.DISTRIBUTIONS, *data.HOTPOT_DISTRIBUTIONS],
               dtype=('float32', 'bfloat16'), device=('auto', 'cpu', 'cuda', 'mps'))


RANK = int(os.environ.get('RANK', 0))       # of this process among those that share the grid


class Refused(Exception):
    """Something the user can mend: printed as one line, exit code 2."""


# --- the command line --------------------------------------------------------------------------------

def help_text(program, constants, presets):
    """The constants with their comments, read from this file."""
    preset = f'[--preset={"|".join(presets)}] ' if len(presets) > 1 else ''
    lines = [f'usage: python {program} {preset}[--name=value ...]\n']
    for line in inspect.getsource(constants).splitlines():
        if m := re.match(r'    (\w+): \w+ = .*?(?:  +# (.*))?$', line):
            lines.append(f'  --{m[1]:<20} {m[2]}\n{"":25}default {getattr(constants(), m[1])}')
        elif m := re.match(r'    # (.*)', line):
            lines.append(f'\n{m[1]}:')
    return '\n'.join(lines)


def parse_value(name, text, default):
    """The text of an override -> a value of the default's type. Raises Refused."""
    def one(part, kind):
        try:
            value = {'true': True, 'false': False}[part.lower()] if kind is bool else kind(part)
        except (ValueError, KeyError):
            raise Refused(f'--{name}={text}: expected {"True or False" if kind is bool else kind.__name__}')
        low = 1 if name in ('batch_size', 'n_val', 'eval_batch', 'd_state') else 0
        if kind in (int, float) and not low <= value < (2 ** 63 if kind is int else math.inf):
            raise Refused(f'--{name}={text}: must be at least {low} and not infinite')
        return value

    if isinstance(default, tuple):
        value = tuple(one(part, type(default[0])) for part in text.split(','))
    elif isinstance(default, dict):
        kind = type(next(iter(default.values())))
        pairs = [part.split(':') for part in text.split(',')]
        if len(pairs) == 1 and len(pairs[0]) == 1:
            value = dict.fromkeys(default, one(text, kind))
        elif all(len(pair) == 2 and pair[0] in default for pair in pairs):
            value = default | {key: one(part, kind) for key, part in pairs}
        else:
            raise Refused(f'--{name}={text}: give one value for all, or name:value with names out of {", ".join(default)}')
    else:
        value = one(text, type(default))
    for part in value if isinstance(value, tuple) else (value,):
        if name in CHOICES and part not in CHOICES[name]:
            raise Refused(f'--{name}={part}: choose from {", ".join(CHOICES[name])}')
    return value


def parse(argv, constants=Constants, program='train.py', presets=PRESETS):
    """Command line -> Constants: the defaults, then the preset, then the overrides. Raises Refused."""
    c = constants()
    overrides = {}
    for arg in argv:
        if arg in ('-h', '--help'):
            print(help_text(program, constants, presets))
            sys.exit(0)
        if not (m := re.fullmatch(r'--(\w+)=(.+)', arg)):
            raise Refused(f'{arg}: overrides are written --name=value, see --help')
        if m[1] != 'preset' and not hasattr(c, m[1]):
            raise Refused(f'--{m[1]}: no such constant, see --help')
        overrides[m[1]] = m[2]
    named = overrides.get('tasks') if overrides.get('tasks') in presets else 'default'
    preset = overrides.pop('preset', named)         # a task may have a preset of its own
    if preset not in presets:
        raise Refused(f'--preset={preset}: choose from {", ".join(presets)}')
    c = replace(c, **presets[preset])
    return replace(c, **{name: parse_value(name, text, getattr(c, name)) for name, text in overrides.items()})


# --- cells: what is run, where it is kept ----------------------------------------------------------

def cells(c):
    """The grid as a list of dicts, each all that a cell's result depends on."""
    grid = []
    for task, setup, size, n, arch, seed in itertools.product(c.tasks, c.setups, c.sizes, c.n_nodes, c.archs, c.seeds):
        made = data.TASKS[task]
        if setup not in made.setups:
            raise Refused(f'--setups={setup}: {task} has {", ".join(made.setups)}')
        distribution = c.distribution if c.distribution in made.distributions else made.distributions[0]
        made.generate(1, n, setup, 0, distribution)             # an impossible n is refused before anything runs
        grid.append(dict(task=task, arch=arch, setup=setup, size=size, n_nodes=n, seed=seed,
                         distribution=distribution, d_state=c.d_state, frozen_embedding=c.frozen_embedding,
                         samples=c.samples[setup], batch_size=c.batch_size[setup], lr=c.lr[arch],
                         warmup_samples=c.warmup_samples, grad_clip=c.grad_clip, dtype=c.dtype, n_val=c.n_val))
    return grid


def folder(c, cell):
    return Path(c.out) / '{task}-{arch}-{setup}-{size}-n{n_nodes}-s{seed}'.format(**cell)


def write(path, save):
    """Write a file so that a kill at any moment leaves the old one or the new one, whole: save(file) fills a
    temporary file, which is flushed to the disk and renamed. Raises Refused if the disk is full."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')      # two processes may write a config
    try:
        with open(temporary, 'wb') as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                          # torch.save makes an OSError a RuntimeError
        temporary.unlink(missing_ok=True)
        raise Refused(f'{path} cannot be written ({str(error).splitlines()[0]}): the last one stays; when there is room, '
                      'run the same command again to continue')


def write_json(path, value):
    write(path, lambda file: file.write((json.dumps(value, indent=1) + '\n').encode()))


def read_checkpoint(path, cell):
    """The checkpoint of a cell, None if there is none yet. Raises Refused on a damaged or foreign one."""
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        config = checkpoint['cell']
    except Exception as error:          # torch.load raises all sorts on a damaged file
        raise Refused(f'{path} cannot be read ({type(error).__name__}): delete it to start this cell anew')
    if config != cell:
        raise Refused(f'{path} belongs to another configuration ({difference(config, cell)}): '
                      'choose another --out or delete it')
    return checkpoint


def difference(old, new):
    return ', '.join(f'{k}={old.get(k)} there, {new.get(k)} here'
                     for k in sorted({*old, *new}) if old.get(k) != new.get(k)) or 'not a config of ours'


def lock(path, wait=False):
    """Take a cell's lock: an open file, None if another process has it. The system lets go of it when the
    process ends, however it ends. (Windows has no such locks: run one process there.)"""
    file = open(path / 'lock', 'w')
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
    return file


def claim(path, cell):
    """Make a cell's folder, or check that the one there has the same configuration. Raises Refused."""
    path.mkdir(parents=True, exist_ok=True)
    config = path / 'config.json'
    if not config.exists():
        write_json(config, cell)
    try:
        old = json.loads(config.read_text())
    except ValueError:
        raise Refused(f'{config} is not JSON: delete it to start this cell anew')
    if old != cell:
        raise Refused(f'{path} holds another configuration ({difference(old, cell)}): choose another --out')


# --- evaluation ----------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, task, n_nodes, setup, prompts, device):
    """Greedy generation after prompts (B, P): argmax, except the token after [ENDSEARCH], which comes
    from the retriever. A sample ends with the token after [EOS] (direct: with the first one).
    Returns tokens (B, up to the task's max_length), padded, queries (written, well-formed) and the
    floats of state per sample at the end of the prompt."""
    made, start = data.TASKS[task], prompts.shape[1]
    longest = made.max_length(n_nodes, setup)
    tokens = np.full((len(prompts), longest), data.PAD)
    tokens[:, :start] = prompts
    alive = np.ones(len(prompts), bool)
    queries = well_formed = 0
    retrieved = [[] for _ in prompts]                           # what the retriever has still to write
    logits, state = model.prefill(torch.from_numpy(prompts).to(device), longest)
    floats = state.floats()
    for t in range(start, longest):
        token = logits.argmax(-1).cpu().numpy()
        if setup == 'retrieval':
            for b in np.flatnonzero(alive & (tokens[:, t - 1] == data.END)):
                context = tokens[b, :t]
                retrieved[b] = list(np.atleast_1d(made.retrieve(context)))
                queries += 1
                well_formed += made.query_pattern(data.split_query(context, made.words)[1]) is not None
            for b in np.flatnonzero(alive):
                if retrieved[b]:
                    token[b] = retrieved[b].pop(0)
        tokens[alive, t] = token[alive]
        if t > start:
            alive &= tokens[:, t - 1] != data.EOS
        if t + 1 == longest or not alive.any():
            break
        logits = model.step(torch.from_numpy(tokens[:, t]).to(device), state)
    return tokens, (queries, well_formed), floats


def evaluate(model, cell, reference, batch_size, device, progress=None):
    """Accuracy by generation on reference samples (N, L). The answer is the token after [EOS], in the setup
    direct the only one; a missing one is wrong. Returns a dict for the log and for result.json."""
    start = data.TASKS[cell['task']].prompt_length(cell['n_nodes'])
    right = exact = written = well_formed = floats = 0
    model.eval()
    for i in range(0, len(reference), batch_size):
        expected = reference[i:i + batch_size]
        tokens, queries, floats = generate(model, cell['task'], cell['n_nodes'], cell['setup'], expected[:, :start], device)
        for row, other in zip(tokens, expected):
            end, other_end = (np.flatnonzero(t != data.PAD)[-1] for t in (row, other))
            right += bool(row[end] == other[other_end] and (row[end - 1] == data.EOS or cell['setup'] == 'direct'))
            exact += np.array_equal(row[:end + 1], other[:other_end + 1])
        written, well_formed = written + queries[0], well_formed + queries[1]
        if progress:
            progress.set_postfix_str(f'evaluating {i}/{len(reference)}')
    model.train()
    n, accuracy = len(reference), right / len(reference)
    return dict(accuracy=accuracy, accuracy_se=math.sqrt(accuracy * (1 - accuracy) / n), exact_trace=exact / n,
                well_formed_queries=well_formed / written if written else None, state_floats=floats)


@torch.no_grad()
def errors_by_kind(model, tokens, loss_mask, batch_size, device):
    """Share of wrong tokens of each of data.KINDS on IsTree samples (N, L), every token predicted from the right ones
    before it (teacher forcing): where a model errs, whatever it would have written after its first error."""
    wrong = np.zeros(tokens.shape, bool)
    for i in range(0, len(tokens), batch_size):
        batch = torch.from_numpy(tokens[i:i + batch_size]).to(device)
        wrong[i:i + batch_size, 1:] = (model(batch[:, :-1]).argmax(-1) != batch[:, 1:]).cpu()
    kinds = data.token_kinds(tokens, loss_mask)
    return {name: float(wrong[kinds == k].mean()) for k, name in enumerate(data.KINDS) if (kinds == k).any()}


# --- training a cell ---------------------------------------------------------------------------------

def learning_rate(cell, samples):
    """Linear warm-up, then a cosine down to 0."""
    if samples < cell['warmup_samples']:
        return cell['lr'] * samples / cell['warmup_samples']
    done = (samples - cell['warmup_samples']) / max(1, cell['samples'] - cell['warmup_samples'])
    return cell['lr'] * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def run_cell(c, cell, device):
    """Train, evaluate and write result.json; continues from the cell's checkpoint. Raises Refused."""
    path = folder(c, cell)
    for left_by_a_kill in path.glob('checkpoint.pt.*.tmp'):     # (a config's may be another process's)
        left_by_a_kill.unlink()
    made = data.TASKS[cell['task']]
    n, setup, batch_size = cell['n_nodes'], cell['setup'], cell['batch_size']
    held_out, held_out_mask, _ = data.validation_set(cell['task'], cell['n_val'], n, setup, cell['distribution'])
    torch.manual_seed(cell['seed'])
    model = models.make_model(cell['arch'], cell['size'], made.vocab_size(n), cell['d_state'], cell['frozen_embedding'])
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=cell['lr'], fused=device.type != 'mps')

    step, seconds, log = 0, 0.0, []
    if checkpoint := read_checkpoint(path / 'checkpoint.pt', cell):
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        step, seconds, log = checkpoint['step'], checkpoint['seconds'], checkpoint['log']

    def save():
        checkpoint = dict(cell=cell, model=model.state_dict(), optimizer=optimizer.state_dict(),
                          step=step, seconds=seconds, log=log)
        write(path / 'log.jsonl', lambda file: file.write(''.join(json.dumps(line) + '\n' for line in log).encode()))
        write(path / 'checkpoint.pt', lambda file: torch.save(checkpoint, file))

    steps = -(-cell['samples'] // batch_size)
    eval_steps = max(1, c.eval_every[setup] // batch_size)
    batches = data.training_batches(cell['task'], batch_size, n, setup, cell['seed'], cell['distribution'], held_out, step)
    started = saved = time.monotonic()
    with tqdm(total=steps * batch_size, initial=step * batch_size, unit='sample', unit_scale=True,
              desc=path.name, dynamic_ncols=True, leave=False, position=RANK) as progress:
        while step < steps:
            tokens, loss_mask = next(batches)
            targets = torch.from_numpy(np.where(loss_mask, tokens, -100)[:, 1:]).to(device)
            tokens = torch.from_numpy(tokens).to(device)
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(cell, (step + 1) * batch_size)
            with torch.autocast(device.type, torch.bfloat16, enabled=cell['dtype'] == 'bfloat16'):
                logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if cell['grad_clip']:
                torch.nn.utils.clip_grad_norm_(parameters, cell['grad_clip'])
            optimizer.step()
            step += 1
            progress.update(batch_size)
            now = time.monotonic()
            saving, evaluating = now - saved > c.checkpoint_seconds or step == steps, step % eval_steps == 0 and step < steps
            if step % 20 == 0 or saving or evaluating:              # seldom: on a GPU, loss.item() waits for it
                if not math.isfinite(loss.item()):
                    raise Refused(f'{path.name}: the loss is {loss.item()} after {step * batch_size:,} samples, stopped: '
                                  f'try a learning rate below {cell["lr"]} (--lr={cell["arch"]}:...)')
                progress.set_postfix_str(f'loss {loss.item():.3f}')
            if evaluating:
                line = evaluate(model, cell, held_out[:200], c.eval_batch, device, progress)
                log.append(dict(samples=step * batch_size, loss=loss.item(), seconds=seconds + now - started,
                                accuracy=line['accuracy'], exact_trace=line['exact_trace']))
                tqdm.write(f'{path.name:42} {step * batch_size:>9,} samples   loss {loss.item():7.4f}   '
                           f'accuracy {line["accuracy"]:6.1%}   exact {line["exact_trace"]:6.1%}')
            if saving:
                seconds, started = seconds + now - started, now
                save()
                saved = time.monotonic()
        measured = evaluate(model, cell, held_out, c.eval_batch, device, progress)
        if cell['task'] == 'istree':
            measured['errors'] = errors_by_kind(model, held_out, held_out_mask, c.eval_batch, device)
    write_json(path / 'result.json', cell | measured | dict(
        params=model.n_params(), seconds=seconds, samples_per_second=steps * batch_size / max(seconds, 1e-9),
        evaluation_seconds=time.monotonic() - started,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        threads=torch.get_num_threads(), torch=torch.__version__))


# --- the table ---------------------------------------------------------------------------------------

def table(results):
    """One line per cell: what was learned, by how large a model, with how much memory."""
    lines = [f'{"task":10} {"setup":10} {"arch":12} {"size":5} {"n":>4} {"seed":>4} {"params":>10} {"memory":>9} '
             f'{"samples":>10} {"minutes":>8}   {"accuracy":15} {"chance":>6} {"exact trace":>11}', '']
    lines[1] = '-' * len(lines[0])
    for r in results:
        chance = data.TASKS[r['task']].chance(r['n_nodes'])
        lines.append(f'{r["task"]:10} {r["setup"]:10} {r["arch"]:12} {r["size"]:5} {r["n_nodes"]:>4} {r["seed"]:>4} '
                     f'{r["params"]:>10,} {r["state_floats"]:>9,} {r["samples"]:>10,} {r["seconds"] / 60:>8.1f}   '
                     f'{r["accuracy"]:6.1%} ± {r["accuracy_se"]:5.1%} {chance:>6.1%} {r["exact_trace"]:>12.1%}')
    return '\n'.join(lines + ['', 'memory: floats carried from token to token at the end of the prompt. '
                              'accuracy: of the final answer, by generation; chance: of a guess.'])


def pick_device(name):
    """The device of a name; auto: CUDA, then Apple's MPS, then CPU. Raises Refused if there is none."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == 'auto':
        name = next(device for device in there if there[device])
    if not there[name]:
        raise Refused(f'--device={name}: torch finds no such device here, leave it out to use another')
    return torch.device(name, int(os.environ.get('LOCAL_RANK', 0)) if name == 'cuda' else None)    # torchrun: a GPU each


def work(c, grid, device, wait):
    """Run every cell that has no result and that no other process is at (or, with wait, is waited for).
    Returns the cells that had to be stopped."""
    stopped = []
    for cell in grid:
        path = folder(c, cell)
        if (path / 'result.json').exists() or not (locked := lock(path, wait)):
            continue
        with locked:
            if not (path / 'result.json').exists():             # (another process may just have finished it)
                try:
                    run_cell(c, cell, device)
                except Refused as complaint:
                    tqdm.write(f'train.py: {complaint}', file=sys.stderr)
                    stopped.append(cell)
    return stopped


def main(argv):
    c = parse(argv)
    device = pick_device(c.device)
    grid = cells(c)
    for cell in grid:
        claim(folder(c, cell), cell)
    cost = lambda cell: cell['samples'] * data.TASKS[cell['task']].max_length(cell['n_nodes'], cell['setup'])
    longest_first = sorted(grid, key=cost, reverse=True)

    processes = c.processes or (os.cpu_count() if device.type == 'cpu' and fcntl else 1)
    processes = min(processes, sum(not (folder(c, cell) / 'result.json').exists() for cell in grid))
    helpers = []
    if processes > 1 and 'RANK' not in os.environ:              # helpers: this program again, with another rank
        helpers = [subprocess.Popen([sys.executable, __file__, *argv, '--processes=' + str(processes)],
                                    env=os.environ | dict(RANK=str(i))) for i in range(1, processes)]
    if device.type == 'cpu':
        torch.set_num_threads(max(1, torch.get_num_threads() // max(1, processes)))
    try:
        stopped = work(c, longest_first, device, wait=False)
        if RANK == 0:                                           # then what others are at, or died over
            stopped += work(c, [cell for cell in longest_first if cell not in stopped], device, wait=True)
        for helper in helpers:
            helper.wait()
    finally:
        for helper in helpers:
            helper.terminate()
            helper.wait()
    if RANK == 0:
        results = [folder(c, cell) / 'result.json' for cell in grid]
        print('\n' + table([json.loads(result.read_text()) for result in results if result.exists()]))
    if stopped:
        raise Refused(f'{len(stopped)} of {len(grid)} cells stopped without a result')


def cli(main, program, argv):
    """Run main(argv) -> exit code; what the user can mend, or has asked for, is one line on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # like Ctrl-C: the last checkpoint stays
    try:
        main(argv)
    except KeyboardInterrupt:
        if RANK == 0:
            print(f'{program}: interrupted, run the same command again to continue', file=sys.stderr)
        return 130
    except (Refused, ValueError, OSError) as error:
        print(f'{program}: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(cli(main, 'train.py', sys.argv[1:]))
