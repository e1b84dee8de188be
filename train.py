"""Trains models and generates text with them, with the retriever running live.

  python train.py                                        the main job, sized for a 2-core laptop
  python train.py --demo                                 trained models on a fresh graph
  python train.py --arch=mamba,hybrid --setup=cot --n=16 --lr=4e-3,8e-3 --seed=3,4 --out=out/mine
  python train.py --sweep                                the sweep behind the learning rates below
  python train.py --preset=primitives                    the four retrieval primitives
  python train.py --task=turing                          a Turing machine, three models
  torchrun --nproc_per_node=8 -- train.py --preset=paper the paper's grid, on GPUs
  python train.py --help                                 every constant

Every field of a run takes one value or several, separated by commas, and all combinations are run;
if --setup or --arch is left out, all three setups or the paper's three architectures are run. A run
trains one model on samples made on the fly, then completes held-out prompts. It writes a folder
under out/ with checkpoint.pt and result.json. Run the same command again after an interruption:
finished runs are skipped, and the others continue from their checkpoints. Start the command in
several terminals, and the processes share the runs.

This file contains the constants and the code that trains one model, generates, evaluates and saves.
Below the line that begins with `# ===` is the code that carries out many runs, loads a model and
looks inside it, shows the demo and reads the command line. To use a trained model in other code:

  from train import load
  model, run = load('results/weights/istree-hybrid-cot-tiny-d1-n14-s3.pt')
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import operator
import os
import random
import signal
import sys
import textwrap
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import models

# Recipes: what a run needs, unless the command line says otherwise. Each row is a recipe.
#   batch_size   samples per step
#   lr           peak learning rate
#   warmup       share of the run during which the learning rate rises
#   evaluations  into how many parts a run is divided. After each but the last, the model is
#                evaluated on 200 held-out samples. (After training, run_one evaluates it on 1,000
#                samples of another held-out set: that is the result.)
#   order        alone: all samples have size n. together: several n are mixed. small-first: the
#                smallest n at first, larger ones join one by one over the share `join` of the run.
#                large-first: the other way round.
# Learning rates and warm-ups come from --sweep, the same grid for every architecture. Models that
# answer directly learn nothing from so few samples at n=14, so their rates were chosen at n=6.
TABLE = '''
task   setup     arch        n  d_state samples batch_size lr    warmup evaluations order       join
istree direct    transformer 14 1       10_000  32         1e-3  0.25   8           alone       0
istree direct    mamba       14 1       10_000  32         1e-3  0.05   8           alone       0
istree direct    hybrid      14 1       10_000  32         1e-3  0.05   8           alone       0
istree cot       transformer 14 1       200_000 16         4e-3  0.25   8           alone       0
istree cot       mamba       14 1       200_000 16         4e-3  0.25   8           alone       0
istree cot       hybrid      14 1       200_000 16         8e-3  0.25   8           alone       0
istree retrieval transformer 14 1       24_000  8          4e-3  0.25   8           small-first 0.5
istree retrieval mamba       14 1       24_000  8          16e-3 0.05   8           small-first 0.5
istree retrieval hybrid      14 1       24_000  8          8e-3  0.05   8           small-first 0.5
'''


def read_recipes(table):
    """A table like TABLE as {(task, setup, arch): {field of a Run: its value as text}}."""
    header, *rows = table.strip().splitlines()
    recipes = {}
    for row in rows:
        task, setup, arch, *values = row.split()
        recipes[task, setup, arch] = dict(zip(header.split()[3:], values))
    return recipes


RECIPES = read_recipes(TABLE)


def constant(default, meaning, low=0, high=10 ** 9, choices=None):
    """A field of Run or Options: its default, its help text and its limits."""
    about = dict(meaning=meaning, low=low, high=high, choices=choices)
    return field(default=default, metadata=about)


IN_NAME = ('task', 'arch', 'layers', 'setup', 'size', 'd_state', 'n', 'seed')


@dataclass
class Run:
    """Everything that the result of a run depends on: a flat record of plain values. A field that
    is None is filled from the recipe, so Run(arch='mamba', setup='cot') is complete. Add a field
    here, and the command line has it, the run's folder is named after it, and result.json holds it.

    Raises ValueError if a value is missing and there is no recipe."""
    task: str = constant('istree', 'what is learned', choices=data.TASKS)
    setup: str = constant('cot', 'answer directly, after a chain of thought, or with a retriever',
                          choices=data.SETUPS)
    arch: str = constant('transformer', 'the architecture', choices=models.SIZES['tiny'])
    size: str = constant('tiny', 'of the model', choices=models.SIZES)
    layers: str = constant('', 'in place of those of the architecture, from bottom to top, such as '
                           'AMM; its dimensions and its recipe stay')
    n: int = constant(None, 'size of the task: nodes of the graph, length of the sequence', low=1)
    d_state: int = constant(None, 'memory of recurrent layers, see models.py (paper: 16)', low=1)
    seed: int = constant(3, 'of the initial weights and the training samples')
    distribution: str = constant('', 'how samples are drawn, if the task has several ways')
    n_val: int = constant(1000, 'held-out samples for the result', low=1)
    tuning: bool = constant(False, 'measure on the held-out samples for choosing constants')
    frozen_embedding: bool = constant(False, 'fixed sinusoids (the paper), not a learned embedding')
    samples: int = constant(None, 'training samples')
    batch_size: int = constant(None, 'samples per step', low=1)
    lr: float = constant(None, 'peak learning rate')
    warmup: float = constant(None, 'share of the run during which it rises', high=1)
    order: str = constant(None, 'in which order several n join, see the recipes',
                          choices=('alone', 'together', 'small-first', 'large-first'))
    join: float = constant(None, 'share of the run over which they join', high=1)
    mix: str = constant('', 'the n that are mixed, such as 6+8+11+16, if not the task\'s own')
    mix_largest: float = constant(0.0, 'share of batches for the largest n once all have joined',
                                  high=1)
    grad_clip: float = constant(1.0, 'largest norm of the gradient (the paper: 0, no limit)')
    dtype: str = constant('float32', 'bfloat16: through autocast', choices=('float32', 'bfloat16'))
    evaluations: int = constant(None, 'how often a run is evaluated', low=1)
    solved: float = constant(0.995, 'share of exact traces that ends a run, if twice in a row (0: '
                             'none)', high=1)

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, self.usual(f))
                if self.usual(f) is None:
                    which = f'--task={self.task} --setup={self.setup} --arch={self.arch}'
                    raise ValueError(f'no recipe for {which}: give --{f.name} and the others, too')

    def usual(self, f):
        """The recipe's value of a field, or else its default."""
        recipe = RECIPES.get((self.task, self.setup, self.arch), {})
        return f.type(recipe[f.name]) if f.name in recipe else f.default

    def name(self):
        """The name of the run's folder: what it is, and each value that is neither the recipe's nor
        the default, so that two different runs never share a folder."""
        arch = f'{self.arch}-{self.layers}' if self.layers else self.arch
        name = f'{self.task}-{arch}-{self.setup}-{self.size}-d{self.d_state}-n{self.n}-s{self.seed}'
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in IN_NAME and value != self.usual(f):
                name += f'-{f.name}{value}'
        return name


@dataclass
class Options:
    """How runs are carried out. Results do not depend on these, except that rounding differs
    between devices."""
    out: str = constant('out', 'folder for the results')
    device: str = constant('auto', 'where to compute', choices=('auto', 'cpu', 'cuda', 'mps'))
    processes: int = constant(0, 'runs at once on a CPU; 0: one per core; on GPUs use torchrun')
    eval_batch: int = constant(500, 'samples generated at a time', low=1)
    checkpoint_seconds: int = constant(30, 'time between two checkpoints')
    workers: int = constant(0, 'processes that make batches; 0: this one (right for a CPU)')
    compile: bool = constant(False, 'train through torch.compile, for a GPU')
    show: int = constant(0, 'print this many samples of every run, at most 3', high=3)


class UserError(Exception):
    """Something the user can fix: printed as one line, exit code 2."""


def make_task(run):
    """The data.Task of a run. Raises ValueError for impossible arguments."""
    return data.TASKS[run.task](run.n, run.setup, run.distribution)


def make_model(run):
    """A fresh models.Model. Raises ValueError for impossible layers or d_state."""
    return models.make_model(run.arch, run.size, len(make_task(run).words), run.d_state,
                             run.frozen_embedding, run.layers)


# --- training one model ---------------------------------------------------------------------------

def learning_rate(run, samples):
    """Linear warm-up, then a cosine down to 0."""
    warmup = run.warmup * run.samples
    if samples < warmup:
        return run.lr * samples / warmup
    done = (samples - warmup) / max(1, run.samples - warmup)
    return run.lr * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def mixed_sizes(run, task):
    """The n that a run mixes, ascending."""
    if run.order == 'alone':
        return [run.n]
    return sorted(map(int, run.mix.split('+'))) if run.mix else task.mixed()


def sizes_of_batches(run, task, steps):
    """The n of every batch. The first part of the run, the share `join` of it, is split into one
    stage for each n; each stage adds one. Batches cycle through those added so far. With a
    retriever and n=14 (7 and 14 are mixed, small first, join=0.5), a run of 16 batches has

        7 7 7 7   7 14 7 14   7 14 7 14 7 14 7 14

    so that 14 joins after a quarter of the run."""
    mix = mixed_sizes(run, task)
    if run.order == 'large-first':
        mix.reverse()
    joining = 0 if run.order == 'together' else int(run.join * steps)
    sizes = []
    for i in range(steps):
        count = len(mix) if i >= joining else 1 + i * len(mix) // joining       # have joined
        sizes.append(mix[:count][i % count])
    if run.mix_largest and len(mix) > 1:    # (below the line)
        sizes[joining:] = favour_largest(run.mix_largest, sorted(mix), joining, steps)
    return sizes


def is_solved(run, log):
    """Were the last two evaluations good enough to stop?"""
    exact = [line['exact'] for line in log[-2:]]
    return len(exact) == 2 and min(exact) >= run.solved > 0


def train(run, path, options, device):
    """Train the model of a run, from the checkpoint in the folder `path` if there is one. Returns
    the model, the number of samples that it was trained on, the seconds that this took, and the
    log. Then run_one, below the line, evaluates the model for the result. Raises UserError if the
    loss is not finite."""
    task = make_task(run)
    torch.manual_seed(run.seed)
    model = make_model(run).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=run.lr, fused=device.type != 'mps')
    step, seconds, log = resume(path / 'checkpoint.pt', run, model, optimizer)
    forward = torch.compile(model) if options.compile else model

    # No prompt of the two held-out sets ever occurs in training. The first 200 samples of `watched`
    # decide when to stop; the result is measured on the other set (in a sweep, on `watched`).
    held_out, watched = set(), {}
    for n in mixed_sizes(run, task):
        watched[n] = data.held_out_samples(task, n, run.n_val, tuning=True)
        for prompt, _ in data.held_out_samples(task, n, run.n_val) + watched[n]:
            held_out.add(tuple(prompt))
    steps = math.ceil(run.samples / run.batch_size)
    eval_steps = max(1, steps // run.evaluations)
    sizes = sizes_of_batches(run, task, steps)
    batches = data.Batches(task, sizes, run.batch_size, run.seed, held_out)
    # an item is a batch already; the loader turns its arrays into tensors
    loader = DataLoader(batches, batch_size=None, sampler=range(step, steps),
                        num_workers=options.workers, pin_memory=device.type == 'cuda')
    progress = tqdm(loader, run.name(), steps, initial=step, unit='step', leave=False,
                    dynamic_ncols=True, position=process_number())
    saved = time.monotonic()
    started = saved - seconds           # as if it had not been interrupted
    for tokens, targets in progress:
        if is_solved(run, log):
            break
        tokens = tokens.to(device, non_blocking=True)                       # (B, L)
        targets = targets.to(device, non_blocking=True)                     # (B, L)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(run, (step + 1) * run.batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=run.dtype == 'bfloat16'):
            logits = forward(tokens[:, :-1])                                # (B, L-1, vocab_size)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets[:, 1:].flatten(),
                               ignore_index=data.IGNORE)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if run.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, run.grad_clip)
        optimizer.step()
        step += 1

        # now and then: look at the loss, evaluate, save
        evaluating = step % eval_steps == 0 and step < steps
        saving = step == steps or time.monotonic() - saved > options.checkpoint_seconds
        if step % 20 == 0 or evaluating or saving:          # rarely: loss.item() waits for the GPU
            if not math.isfinite(loss.item()):
                raise UserError(f'{run.name()}: the loss is {loss.item()} after {step} steps, '
                                f'try a learning rate below {run.lr}')
            progress.set_postfix_str(f'loss {loss.item():.3f}')
        if evaluating:
            by_n = []                                       # of the n that are mixed
            for n, samples in watched.items():
                measured, _ = evaluate(model, task, n, samples[:200], options.eval_batch, device)
                by_n.append(measured)
            worst = min(by_n, key=operator.itemgetter('exact'))
            log.append(dict(samples=step * run.batch_size, loss=loss.item(),
                            seconds=time.monotonic() - started,
                            accuracy=worst['accuracy'], exact=worst['exact']))
            tqdm.write('{:42} {samples:>9,} samples   loss {loss:7.4f}   exact {exact:6.1%}   '
                       'accuracy {accuracy:6.1%}'.format(run.name(), **log[-1]))
        if saving or evaluating:
            saved = time.monotonic()
            save(path / 'checkpoint.pt', run, model, optimizer, step, saved - started, log)
    return model, step * run.batch_size, time.monotonic() - started, log


# --- generation with the live retriever -----------------------------------------------------------

def as_tokens(task, texts, device):
    """Lists of words, all equally long -> token ids (B, L)."""
    return torch.tensor([[task.tokens[word] for word in words] for words in texts], device=device)


@torch.no_grad()
def generate(model, task, n, prompts, device, state=None):
    """Greedy generation after prompts of size n, lists of words of one length. The model writes the
    most likely word, except that in the setup `retrieval` the retriever writes what follows a
    query. A completion ends with the answer, the word after an [EOS] that the model has written.

    state: a memory to use in place of the model's own, for the memory transplant. (The first
    word still comes from the model's own; in IsTree it is always 0.) Returns the completions, lists
    of words with a star on the retriever's, and the numbers of queries and of well-formed
    queries."""
    texts = [' '.join(prompt) for prompt in prompts]    # what the retriever searches
    completions = [[] for _ in prompts]
    pending = [[] for _ in prompts]         # words that the retriever still has to write
    done = [False for _ in prompts]
    queries = well_formed = 0
    logits, own_state = model.prefill(as_tokens(task, prompts, device))         # (B, vocab_size)
    if state is None:
        state = own_state
    for _ in range(task.longest(n)):
        tokens = logits.argmax(-1).tolist()                 # a word for each sample
        for b in range(len(prompts)):
            if done[b]:
                continue
            if pending[b]:
                word = pending[b].pop(0)                    # overrules the model's own choice
                tokens[b] = task.tokens[word]
                completions[b].append('*' + word)
            else:
                word = task.words[tokens[b]]
                if completions[b][-1:] == [task.words[data.EOS]]:       # so this is the answer
                    done[b] = True
                completions[b].append(word)
            texts[b] += ' ' + word
            if task.setup == 'retrieval' and completions[b][-1] == task.words[data.END]:
                pending[b], is_well_formed = task.retrieve(texts[b])
                queries += 1
                well_formed += is_well_formed
        if all(done):
            break
        logits, state = model.step(torch.tensor(tokens, device=device), state)
    return completions, queries, well_formed


# --- evaluation -----------------------------------------------------------------------------------

def evaluate(model, task, n, samples, batch_size, device):
    """Accuracy on samples of size n. In the setup `direct`, each word of the completion (in IsTree
    one, the answer) is predicted from the right words before it. In the others the model generates,
    and the answer is the word after [EOS]; a missing one is wrong.

    Returns a dict for the log and result.json, and the completions that the model wrote."""
    written, queries, well_formed = [], 0, 0
    model.eval()
    for i in tqdm(range(0, len(samples), batch_size), 'evaluating', leave=False):
        batch = samples[i:i + batch_size]
        if task.setup == 'direct':
            completions, _ = teacher_forced(model, task, batch, device)
        else:
            prompts = [prompt for prompt, _ in batch]
            completions, asked, well_asked = generate(model, task, n, prompts, device)
            queries += asked
            well_formed += well_asked
        written += completions
    model.train()
    right, exact = [], []
    for (_, wanted), completion in zip(samples, written):
        if wanted[-1] == '[PAD]':               # (in HotpotQA, the end of a completion)
            wanted = wanted[:-1]
        exact.append(completion == wanted)
        if task.setup == 'direct':
            right.append(np.mean([a == b for a, b in zip(completion, wanted) if b[0] != '*']))
        else:
            right.append(completion[-2:] == wanted[-2:])            # [EOS] and the answer
    return dict(accuracy=float(np.mean(right)), exact=float(np.mean(exact)),
                accuracy_se=float(np.std(right)) / math.sqrt(len(right)),
                well_formed_queries=well_formed / queries if queries else None), written


@torch.no_grad()
def teacher_forced(model, task, samples, device):
    """The completions of samples, each word predicted from the right words before it, so that one
    error does not cause the next; and the loss of each of those words, a tensor."""
    tokens, targets = [torch.from_numpy(part).to(device) for part in data.collate(task, samples)]
    logits = model(tokens[:, :-1]).float()
    losses = F.cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction='none')
    completions = []
    for (prompt, completion), row in zip(samples, logits.argmax(-1).tolist()):
        words = []
        for right_word, token in zip(completion, row[len(prompt) - 1:]):
            words.append(right_word if right_word.startswith('*') else task.words[token])
        completions.append(words)
    return completions, losses[targets[:, 1:] != data.IGNORE]


# --- files ----------------------------------------------------------------------------------------

def save(path, run, model, optimizer, step, seconds, log):
    """Write a checkpoint, from which `resume` continues bit for bit."""
    checkpoint = dict(run=asdict(run), optimizer_name=type(optimizer).__name__, step=step,
                      seconds=seconds, log=log, model=model.state_dict(),
                      optimizer=optimizer.state_dict())
    file = io.BytesIO()
    torch.save(checkpoint, file)
    write(path, file.getvalue())


def resume(path, run, model, optimizer):
    """Load a checkpoint, if there is one, into the model and the optimizer. Returns the number of
    steps done, the seconds they took, and the log. Raises UserError if it is damaged or another
    run's."""
    if not path.exists():
        return 0, 0.0, []
    with readable(path, START_OVER):        # (below the line: what cannot be read is a UserError)
        checkpoint = read_checkpoint(path)
        there = checkpoint['run'] | dict(optimizer=checkpoint['optimizer_name'])
        here = asdict(run) | dict(optimizer=type(optimizer).__name__)
        refuse_another(path, there, here)
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        return checkpoint['step'], checkpoint['seconds'], checkpoint['log']


# ==================================================================================================
# This is how one model is trained. Below: many runs and what is printed about them, looking inside
# a trained model, the demo, the command line.

# DeltaNet and the GRU are architectures of their own (models.py); the GRU was not swept on IsTree.
# The primitives were swept without a retriever; with one, a single learning rate serves all four.
# Their order decides whether the Transformer learns them. The Turing machine was swept with a tape
# of 12 letters.
RECIPES |= read_recipes('''
task     setup     arch        n d_state samples batch_size lr warmup evaluations order    join
istree   direct    deltanet    14  16  10_000   32   1e-3   0.05  8   alone       0
istree   cot       deltanet    14  16  200_000  16   16e-3  0.25  8   alone       0
istree   retrieval deltanet    14  16  24_000   8    16e-3  0.25  8   small-first 0.5
istree   cot       gru         14  64  200_000  16   4e-3   0.25  8   alone       0
index    direct    transformer 16  1   256_000  16   4e-3   0.25  16  together    0
index    direct    mamba       16  1   256_000  16   8e-3   0.25  16  together    0
index    direct    hybrid      16  1   256_000  16   8e-3   0.25  16  together    0
index    retrieval transformer 16  1   8_000    16   8e-3   0.25  16  together    0
index    retrieval mamba       16  1   8_000    16   16e-3  0.25  16  together    0
index    retrieval hybrid      16  1   8_000    16   8e-3   0.25  16  together    0
recall   direct    transformer 16  1   256_000  16   4e-3   0.25  16  small-first 0.5
recall   direct    mamba       16  1   256_000  16   8e-3   0.25  16  small-first 0.5
recall   direct    hybrid      16  1   256_000  16   4e-3   0.25  16  small-first 0.5
recall   direct    deltanet    16  16  256_000  16   16e-3  0.25  16  small-first 0.5
recall   direct    gru         16  64  256_000  16   8e-3   0.05  16  small-first 0.5
recall   retrieval transformer 16  1   8_000    16   8e-3   0.25  16  small-first 0.5
recall   retrieval mamba       16  1   8_000    16   16e-3  0.25  16  small-first 0.5
recall   retrieval hybrid      16  1   8_000    16   8e-3   0.25  16  small-first 0.5
cgram    direct    transformer 16  1   256_000  16   2e-3   0.25  16  large-first 0.75
cgram    direct    mamba       16  1   256_000  16   4e-3   0.25  16  large-first 0.75
cgram    direct    hybrid      16  1   256_000  16   4e-3   0.25  16  large-first 0.75
cgram    retrieval transformer 16  1   8_000    16   8e-3   0.25  16  large-first 0.75
cgram    retrieval mamba       16  1   8_000    16   16e-3  0.25  16  large-first 0.75
cgram    retrieval hybrid      16  1   8_000    16   8e-3   0.25  16  large-first 0.75
counting direct    transformer 16  1   256_000  16   2e-3   0.25  16  large-first 0.75
counting direct    mamba       16  1   256_000  16   4e-3   0.25  16  large-first 0.75
counting direct    hybrid      16  1   256_000  16   4e-3   0.25  16  large-first 0.75
counting retrieval transformer 16  1   8_000    16   8e-3   0.25  16  large-first 0.75
counting retrieval mamba       16  1   8_000    16   16e-3  0.25  16  large-first 0.75
counting retrieval hybrid      16  1   8_000    16   8e-3   0.25  16  large-first 0.75
turing   cot       transformer 10  1   12_000   8    4e-3   0.25  8   small-first 0.5
turing   cot       mamba       10  1   12_000   8    16e-3  0.05  8   small-first 0.5
turing   cot       hybrid      10  1   12_000   8    8e-3   0.25  8   small-first 0.5
turing   retrieval mamba       10  1   12_000   8    8e-3   0.05  8   small-first 0.5
turing   retrieval hybrid      10  1   12_000   8    8e-3   0.25  8   small-first 0.5
turing26 cot       mamba       12  1   12_000   8    16e-3  0.05  8   small-first 0.5
turing26 retrieval mamba       12  1   12_000   8    8e-3   0.05  8   small-first 0.5
''')

# Each preset is a list of command lines, whose runs are carried out together. A preset that has the
# name of a task is what --task alone trains.
PAPER = ('--size=0.5M,1M,2M --n=16,32,64 --n_val=5000 --d_state=16 --frozen_embedding '
         '--samples=1000000 --batch_size=64 --warmup=0.01 --grad_clip=0 --evaluations=10 '
         '--solved=0 --order=alone --join=0')
PRESETS = {'default': [''],
           'primitives': ['--task=index,recall,cgram,counting'],
           'turing': ['--task=turing --arch=mamba', '--task=turing --arch=hybrid --setup=cot'],
           'paper': [f'{PAPER} --arch=transformer --lr=1e-3',
                     f'{PAPER} --arch=mamba,hybrid --lr=3e-4']}

# The grid of a sweep: the same for every task, setup and architecture. Each round takes the best of
# the round before, with more samples (successive halving, Jamieson & Talwalkar 2016).
SWEEP_LR = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SWEEP_WARMUP = (0.05, 0.25)
SWEEP_ROUNDS = ((1 / 8, 12), (1 / 2, 2), (1, 2))    # (share of the samples, number of candidates)
SWEEP_SEED = 1000


def favour_largest(share, mix, start, steps):
    """The n of the batches from `start` on when the largest n gets a share of them, evenly spread,
    and the others take turns. mix: ascending."""
    *others, largest = mix
    sizes = []
    for i in range(start, steps):
        largest_so_far = math.ceil(i * share)
        if math.ceil((i + 1) * share) > largest_so_far:
            sizes.append(largest)
        else:
            sizes.append(others[(i - largest_so_far) % len(others)])
    return sizes


# --- many runs ------------------------------------------------------------------------------------

def process_number():
    """Of this process among those that torchrun or run_all started."""
    return int(os.environ.get('RANK') or 0)


def pick_device(name):
    """The device of a name; auto: CUDA, then Apple's MPS, then CPU. Raises UserError if there is
    none."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == 'auto':
        name = next(device for device in there if there[device])
    if not there[name]:
        raise UserError(f'--device={name}: torch finds no such device here')
    return torch.device(name, int(os.environ.get('LOCAL_RANK') or 0) if name == 'cuda' else None)


def folder(run, options):
    return Path(options.out).expanduser() / run.name()


def write(path, contents):
    """Write bytes into a file of a run. A kill at any moment leaves the old file or the new one,
    whole. Raises UserError if the disk is full."""
    temporary = path.with_name(f'{path.name}.tmp')
    try:
        temporary.write_bytes(contents)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f'{path} cannot be written ({error}): the previous file stays; when there '
                        'is room, run the same command again to continue')


def read_checkpoint(path):
    """The dict in a checkpoint. The file is a zip archive whose checksums reveal any flipped
    byte."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError('wrong checksum')
    return torch.load(path, map_location='cpu', weights_only=True)


START_OVER = '; delete it to start over, or choose another --out'


@contextlib.contextmanager
def readable(path, advice=''):
    """Whatever goes wrong inside becomes a UserError that names the file: zipfile, json and torch
    raise many kinds of errors on damaged files."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{path} cannot be read ({type(error).__name__}): damaged, or of another '
                        f'version{advice}')


def refuse_another(path, there, here):
    """Raises UserError if a constant in the dict `here` differs from that in the dict `there`."""
    for name, value in here.items():
        if there.get(name) != value:
            raise UserError(f'{path} belongs to another run ({name}={there.get(name)} there, '
                            f'{value} here): delete it, or choose another --out')


def write_json(path, value):
    text = json.dumps(value, indent=1) + '\n'
    write(path, text.encode())


def read_result(path):
    """The dict in a result.json. Raises UserError, naming the file, if it is damaged or of an older
    version."""
    with readable(path, START_OVER):
        result = json.loads(path.read_text(encoding='utf-8'))
        table({path.parent.name: result}), rank(result)     # (fail if something is missing)
        for example in result['examples'][:3]:
            ' '.join([example[name] for name in ('prompt', 'expected', 'written')])
        return result


def run_one(run, path, options, device):
    """Train and evaluate, write result.json. Raises UserError."""
    task = make_task(run)
    model, samples_trained, seconds, log = train(run, path, options, device)
    by_length, losses, more = [], [], {}
    for n in mixed_sizes(run, task):
        samples = data.held_out_samples(task, n, run.n_val, run.tuning)
        measured, written = evaluate(model, task, n, samples, options.eval_batch, device)
        by_length.append(dict(n=n, chance=task.chance(n), **measured))
        predicted, losses_of_n = [], []
        for i in range(0, len(samples), options.eval_batch):
            batch = samples[i:i + options.eval_batch]
            words, loss = teacher_forced(model, task, batch, device)
            predicted += words
            losses_of_n.append(loss)
        losses.append(torch.cat(losses_of_n).mean().item())
        if run.task == 'recall' and run.setup == 'direct' and 'cache' not in model.memory(1):
            played = messages(model, run, task, n, samples, device)
            more['messages'] = more.get('messages', []) + played
    # what follows is about the last, largest n
    if run.task == 'istree':
        more['errors'] = errors_by_kind(predicted, samples)
    if run.task == 'istree' and run.setup == 'cot' and 'cache' in model.memory(1):
        attention = attention_to_edges(model, task, samples[:200], device)
        write_json(path / 'attention.json', attention)
        more['attention_on_edge'] = attention['share']
    examples = []
    for (prompt, completion), words in zip(samples[:3], written):
        examples.append(dict(prompt=' '.join(prompt), expected=' '.join(completion),
                             written=' '.join(words)))
    result = asdict(run) | by_length[-1] | more | dict(
        by_length=by_length,
        loss=float(np.mean(losses)),
        samples_trained=samples_trained,
        memory=model.memory(len(samples[0][0])),
        params=model.n_params(),
        seconds=seconds,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        torch=torch.__version__,
        date=time.strftime('%Y-%m-%d'),
        log=log,
        examples=examples)
    write_json(path / 'result.json', result)


def work(runs, options, device):
    """Carry out every run that has no result and that no other process is working on."""
    for run in runs:
        path = folder(run, options)
        path.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(path / 'lock', timeout=0):   # released when its process ends
                if not (path / 'result.json').exists():
                    run_one(run, path, options, device)
        except filelock.Timeout:
            continue
        except (UserError, ValueError) as problem:
            tqdm.write(f'train.py: {problem}', file=sys.stderr)


def work_as_helper(number, threads, runs, options, device):
    """`work` in a process of its own. number: from 0 on."""
    os.environ['RANK'] = str(number + 1)
    torch.set_num_threads(threads)
    work(runs, options, device)


def run_all(runs, options):
    """Carry out the runs, on a CPU several at once. Runs that have a result are skipped, which is
    said. Returns the results, {name: dict}."""
    device = pick_device(options.device)
    left = [run for run in runs if not already_done(run, folder(run, options) / 'result.json')]
    left.sort(key=expected_work, reverse=True)
    at_once = options.processes or (available_cores() if device.type == 'cpu' else 1)
    if os.environ.get('RANK'):                          # torchrun has started the others
        at_once = 1
    at_once = max(1, min(at_once, len(left)))
    threads = max(1, torch.get_num_threads() // at_once)
    torch.set_num_threads(threads)
    arguments = threads, left, options, device          # (helpers end with this process)
    helpers = torch.multiprocessing.spawn(work_as_helper, arguments, at_once - 1, join=False)
    work(left, options, device)
    while not helpers.join():                           # True when all have ended
        pass
    results = {}
    for run in runs:
        path = folder(run, options) / 'result.json'
        if path.exists():
            results[run.name()] = read_result(path)
    return results


def already_done(run, path):
    """Has the run a result? Says so. Raises UserError if the result is another run's."""
    if not path.exists():
        return False
    result = read_result(path)
    refuse_another(path, result, asdict(run))
    if process_number() == 0:
        print(f'{run.name()} has a result of {result.get("date")} and is skipped. To train again, '
              f'delete {path.parent}')
    return True


def expected_work(run):
    """Tokens; and attention takes longer than an RNN."""
    return run.samples * (3 * run.n + make_task(run).longest(run.n)), run.arch != 'mamba'


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def is_busy(run, options):
    """Is another process working on the run?"""
    try:
        with filelock.FileLock(folder(run, options) / 'lock', timeout=0):
            return False
    except filelock.Timeout:
        return True


def report_missing(runs, options):
    """Name the runs that other processes are working on. Raises UserError if others have no
    result."""
    failed = 0
    for run in runs:
        if is_busy(run, options):
            print(f'{run.name()}: another process is working on this run')
        elif not (folder(run, options) / 'result.json').exists():
            failed += 1
    if failed:
        raise UserError(f'{failed} of {len(runs)} runs stopped without a result')


def sweep(runs, options):
    """Try all learning rates and warm-ups for each of the runs, on other seeds and prompts. Returns
    the results of the last round and prints the best constants."""
    candidates = {}
    for run in runs:
        grid = itertools.product(SWEEP_LR, SWEEP_WARMUP)
        candidates[run.name()] = [replace(run, lr=lr, warmup=warmup, tuning=True, seed=SWEEP_SEED)
                                  for lr, warmup in grid]
    for share, how_many in SWEEP_ROUNDS:
        this_round = []
        for run in runs:
            best = candidates[run.name()][:how_many]
            candidates[run.name()] = [replace(c, samples=int(run.samples * share)) for c in best]
            this_round += candidates[run.name()]
        results = run_all(this_round, options)
        if any(is_busy(run, options) for run in this_round):
            raise UserError('another process is working on this round: run the same command '
                            'again when it is done')
        for tried in candidates.values():
            tried.sort(key=lambda candidate: rank(results.get(candidate.name())))
    for name, tried in candidates.items():
        print(f'best for {name}: --lr={tried[0].lr} --warmup={tried[0].warmup}')
    return results


def rank(result):
    """The lower, the better: first results that solved the task, the soonest first, then by
    held-out loss. A run without a result (its loss was not finite) comes last."""
    if result is None:
        return 2, 0
    if result['samples_trained'] < result['samples']:
        return 0, result['samples_trained']
    return 1, result['loss']


ROW = ('{name:{width}} {params:>9,} {memory:>7,} {samples_trained:>9,} {minutes:>7.1f} '
       '{exact:>7.1%} {accuracy:>8.1%} ± {accuracy_se:>6.1%} {chance:>7.1%}')
FOOT = '''

memory: floats carried from token to token at the end of the prompt
exact: every word right; accuracy: of the answer; chance: of the best guess without look-up'''


def table(results):
    """A line per result, {name: dict}: what was learned, by how large a model, with how much
    memory."""
    width = max(map(len, results), default=3)
    head = f'{"run":{width}}    params  memory   samples minutes   exact          accuracy  chance'
    lines = [head, '-' * len(head)]
    for name, result in results.items():
        memory = sum(result['memory'].values())
        minutes = result['seconds'] / 60
        row = result | dict(name=name, width=width, memory=memory, minutes=minutes)
        lines.append(ROW.format(**row))
    return '\n'.join(lines) + FOOT


LAYOUT = dict(width=100, max_lines=3, placeholder=' ...', subsequent_indent=' ' * 10,
              break_long_words=False, break_on_hyphens=False)


def show(expected, written):
    """What a model wrote, as text: long texts are cut, and the first wrong word is pointed out.
    Both arguments are lists of words."""
    lines = textwrap.wrap('written   ' + ' '.join(written), **LAYOUT)
    agreed = len(os.path.commonprefix([written, expected]))
    if written == expected:
        lines.append(f'          all {agreed} words are right')
    else:
        lines.append(f'wrong     word {agreed + 1}: {" ".join(written[agreed:agreed + 12])} ...')
        lines.append(f'right     would be: {" ".join(expected[agreed:agreed + 12])} ...')
    return '\n'.join(lines)


# --- a trained model, and what looks inside it ----------------------------------------------------

def load(path):
    """A trained model and its Run, from the folder of a run or from a file such as those in
    results/weights/. Raises UserError if there is none, or it is damaged or an older version's."""
    path = Path(path)
    path = path / 'checkpoint.pt' if path.is_dir() else path
    if not path.exists():
        raise UserError(f'{path}: there is no trained model')
    with readable(path):
        checkpoint = read_checkpoint(path)
        run = Run(**checkpoint['run'])
        model = make_model(run)
        model.load_state_dict(checkpoint['model'])
        return model, run


def errors_by_kind(predicted, samples):
    """The share of wrong words of each of data.KINDS, on IsTree samples, predicted by
    teacher_forced: where does a model go wrong?"""
    by_kind = {}
    for words, (_, completion) in zip(predicted, samples):
        for kind, word, right in zip(data.kinds(completion), words, completion):
            by_kind.setdefault(kind, []).append(word != right)
    return {kind: float(np.mean(by_kind[kind])) for kind in data.KINDS if kind in by_kind}


@torch.no_grad()
def attention_to_edges(model, task, samples, device):
    """Where the topmost attention layer looks while the model reads the right chains of thought of
    IsTree samples. Returns a dict: prompt and trace, the words of the first sample; weights, of
    each word of the trace over all words, mean over heads; share, the mean weight on the edge of
    the prompt that holds the next word, over all samples and next neighbours."""
    *_, layer = [module for module in model.modules() if isinstance(module, models.Attention)]
    inputs = []
    tokens, _ = data.collate(task, samples)
    with layer.register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0])):
        model(torch.from_numpy(tokens).to(device))
    weights = models.attention_weights(layer, inputs[0])                    # (N, heads, L, L)
    weights = weights.mean(1).cpu().numpy()                                 # (N, L, L)
    shares = []
    for (prompt, trace), seen in zip(samples, weights):
        edges = {}                                          # where each edge stands in the prompt
        for i in range(1, len(prompt) - 1, 3):
            edges[frozenset((prompt[i], prompt[i + 2]))] = i
        for t, kind in enumerate(data.kinds(trace)):
            if kind == 'next neighbour' and t > 0:
                i = edges[frozenset((trace[t - 1], trace[t]))]
                before = len(prompt) + t - 1                # the word after which it is predicted
                shares.append(seen[before, i:i + 3].sum())
    prompt, trace = samples[0]
    end = len(prompt) + len(trace)
    weights_of_trace = weights[0, len(prompt):end, :end]
    return dict(prompt=prompt, trace=trace, share=float(np.mean(shares)),
                weights=weights_of_trace.round(4).tolist())


@torch.no_grad()
def messages(model, run, task, n, samples, device, bits_per_float=(1, 2, 3, 4, 6, 8, 12, 32)):
    """The communication game behind the paper's lower bound, played with a recurrent model on
    associative recall. One player reads a sequence [BOS] key value ... ~ and sends the model's
    memory, each of its floats as one of 2^k numbers. The other goes on from what arrives and is
    asked for the value of each of the n keys, every one as the first question.

    Returns a list of dicts: n, bits_per_float k, the bits of the message, and accuracy over all
    questions."""
    prompts = [prompt[:2 * n + 2] for prompt, _ in samples[:200]]
    _, state = model.prefill(as_tokens(task, prompts, device))
    keys = as_tokens(task, [prompt[1:-1:2] for prompt in prompts], device)      # (B, n)
    values = as_tokens(task, [prompt[2:-1:2] for prompt in prompts], device)    # (B, n)
    ranges = ranges_of_memory(model, run, task, n, device, 2 * n + 2)
    bits, rows = sum(model.memory(1).values()), []
    for k in bits_per_float:
        arrived = round_memory(state, ranges, k)
        guesses = []
        for i in range(n):
            logits, _ = model.step(keys[:, i], arrived)
            guesses.append(logits.argmax(-1))
        right = torch.stack(guesses, 1) == values                               # (B, n)
        accuracy = right.float().mean().item()
        rows.append(dict(n=n, bits_per_float=k, bits=k * bits, accuracy=accuracy))
    return rows


@torch.no_grad()
def ranges_of_memory(model, run, task, n, device, length=None):
    """The smallest and the largest value of every carried float after 200 prompts, drawn like those
    of the training, or after their first `length` words: for each layer a dict
    {name: (low, high)}."""
    samples = data.draw(task, n, 200, (run.seed, 0, 0))
    prompts = [prompt[:length] for prompt, _ in samples]
    _, state = model.prefill(as_tokens(task, prompts, device))
    ranges = []
    for carried in state:
        ranges.append({name: (t.amin(0), t.amax(0)) for name, t in carried.items()})
    return ranges


def round_memory(state, ranges, bits):
    """Every carried float as one of 2^bits numbers: the middles of as many equal parts of its
    range. 32 bits: as it is."""
    if bits == 32:
        return state
    rounded = []
    for carried, ranges_of_layer in zip(state, ranges):
        layer = {}
        for name, t in carried.items():
            low, high = ranges_of_layer[name]
            part = (high - low).clamp(min=1e-9) / 2 ** bits
            which = ((t - low) / part).floor().clamp(0, 2 ** bits - 1)
            layer[name] = low + part * (which + 0.5)
        rounded.append(layer)
    return rounded


# --- probes: the memory transplant, and rounding --------------------------------------------------

CARRIED = ('state', 'window', 'cache')      # what layers carry, see models.py


def swapped(own, donor, name):
    """A memory: what is called `name` comes from the donor, the rest is the model's own."""
    memory = []
    for own_layer, donor_layer in zip(own, donor):
        memory.append(dict(own_layer))
        if name in donor_layer:
            memory[-1][name] = donor_layer[name]
    return memory


@torch.no_grad()
def transplant(model, task, samples, device):
    """After the prompt is read, what the model carries is replaced by what it carries after another
    prompt. Then it goes on writing; the retriever searches the model's own text. The donor of each
    sample is the next one, and in the last row, `one donor`, the last sample for all.

    Returns {what is replaced: {own, donor, next_neighbour}}: the share of traces that are exactly
    the sample's own and exactly the donor's; on IsTree, also the share of right next neighbours
    with the sample's own right words before."""
    *samples, fixed = samples
    donors = samples[1:] + samples[:1]
    prompts = [prompt for prompt, _ in samples]
    _, own = model.prefill(as_tokens(task, prompts, device))
    _, donor = model.prefill(as_tokens(task, prompts[1:] + prompts[:1], device))
    _, one = model.prefill(as_tokens(task, [fixed[0]] * len(samples), device))
    carried = [name for name in CARRIED if any(name in layer for layer in own)]
    rows = {'nothing': (own, donors), 'everything': (donor, donors)}
    if len(carried) > 1:
        for name in carried:
            rows[name] = swapped(own, donor, name), donors
    rows['one donor'] = one, [fixed] * len(samples)
    result = {}
    for replaced, (state, givers) in rows.items():
        written, _, _ = generate(model, task, task.n, prompts, device, state)
        result[replaced] = dict(own=share_of_exact(written, samples),
                                donor=share_of_exact(written, givers))
        if isinstance(task, data.IsTree):
            right = next_neighbours(model, task, samples, device, state)
            result[replaced]['next_neighbour'] = right
    return result


def share_of_exact(written, samples):
    return float(np.mean([words == completion for words, (_, completion) in zip(written, samples)]))


def next_neighbours(model, task, samples, device, state):
    """The share of right next neighbours of IsTree completions, with the right words before, when
    the model goes on from `state`."""
    tokens, _ = data.collate(task, samples)
    start = len(samples[0][0])
    hidden, _ = model.hidden(torch.from_numpy(tokens[:, start:]).to(device), state)
    predicted = model.head(hidden).argmax(-1).tolist()
    right = []
    for row, (_, completion) in zip(predicted, samples):
        for t, kind in enumerate(data.kinds(completion)):
            if kind == 'next neighbour' and t > 0:
                right.append(task.words[row[t - 1]] == completion[t])
    return float(np.mean(right))


@torch.no_grad()
def rounding(model, run, task, samples, device, bits=(1, 2, 3, 4, 6, 8, 32)):
    """The carried floats are rounded to k bits at the same moment. Returns {k: {exact_trees}}, the
    share of exact traces on those samples that are trees."""
    trees = [sample for sample in samples if sample[1][-1] == '[TRUE]']
    prompts = [prompt for prompt, _ in trees]
    _, own = model.prefill(as_tokens(task, prompts, device))
    ranges = ranges_of_memory(model, run, task, run.n, device)
    result = {}
    for k in bits:
        written, _, _ = generate(model, task, task.n, prompts, device, round_memory(own, ranges, k))
        result[k] = dict(exact_trees=share_of_exact(written, trees))
    return result


def probe(paths, device):
    """Print a JSON line for each trained model of a task with chain of thought: its run, and
    `transplant` on 200 held-out prompts; on IsTree, also `rounding`."""
    for path in paths:
        model, run = load(path)
        model.to(device)
        task = make_task(run)
        samples = data.held_out_samples(task, run.n, run.n_val)[:201]
        record = asdict(run) | dict(transplant=transplant(model, task, samples, device))
        if run.task == 'istree':
            record['rounding'] = rounding(model, run, task, samples[:200], device)
        print(json.dumps(record), flush=True)


# --- the demo -------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).parent / 'results' / 'weights'
DEMO = (('Transformer with chain of thought', 'transformer', 'cot'),
        ('RNN with chain of thought', 'mamba', 'cot'),
        ('hybrid with chain of thought', 'hybrid', 'cot'),
        ('RNN with a retriever', 'mamba', 'retrieval'))


def demo(text):
    """What trained models write on one graph, and a memory transplant. text: a seed, or edges such
    as `2-1 4-0 ...`."""
    n = Run().n
    if '-' in text:
        edges = read_edges(text, n)
    else:
        edges, _ = data.two_star(random.Random(text), n)
    prompt, _ = write_graph(make_task(Run()), edges)
    print(*textwrap.wrap('prompt    ' + ' '.join(prompt), **LAYOUT), sep='\n')
    other, _ = data.two_star(random.Random(f'another graph than {text}'), n)
    for title, arch, setup in DEMO:
        model, run = load(WEIGHTS / f'{Run(arch=arch, setup=setup).name()}.pt')
        task = make_task(run)
        _, completion = write_graph(task, edges)
        [written], _, _ = generate(model, task, n, [prompt], 'cpu')
        print(f'\n--- {title}\n{show(completion, written)}')
        donor_prompt, donor_completion = write_graph(task, other)
        _, state = model.prefill(as_tokens(task, [donor_prompt], 'cpu'))
        [written], _, _ = generate(model, task, n, [prompt], 'cpu', state)
        whose = 'neither trace'
        if written == completion:
            whose = 'the trace of the graph above: the new memory changes nothing'
        if written == donor_completion:
            whose = 'the trace of that other graph'
        print(f'With the memory of another graph after the prompt, the model writes {whose}.')


def write_graph(task, edges):
    """The sample of any graph with n-1 edges: it is a tree if the search reaches every node."""
    tour = data.cot_trace(data.neighbours_of(edges, task.n))
    return task.write(edges, is_tree=len(set(tour)) == task.n)


def read_edges(text, n):
    """`2-1 4-0 ...` -> [(2, 1), (4, 0), ...]. Raises UserError."""
    try:
        edges = [tuple(map(int, edge.split('-'))) for edge in text.split()]
        possible = {*itertools.combinations(range(n), 2)}
        different = {tuple(sorted(edge)) for edge in edges}
        if len(different) == len(edges) == n - 1 and different <= possible:
            return edges
    except ValueError:
        pass
    raise UserError(f'--demo: these models know graphs with {n} nodes, 0 to {n - 1}, and {n - 1} '
                    'different edges, such as "2-1 4-0 ..."')


# --- the command line -----------------------------------------------------------------------------

IF_NOT_GIVEN = {'setup': 'all of them', 'arch': 'the first three'}


def parse(argv, program='train.py', kind=Options):
    """The command line -> the texts of the fields of Run that were given, options of a kind, and
    the rest as a dict. Raises UserError."""
    parser = argparse.ArgumentParser(program, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = refuse
    group = parser.add_argument_group('a run: one value, or several separated by commas')
    for f in fields(Run):
        default = 'the recipe' if f.default is None else f.default
        add_flag(group, f, IF_NOT_GIVEN.get(f.name, default))
    group = parser.add_argument_group('how runs are carried out')
    for f in fields(kind):
        add_flag(group, f, f.default)
    group = parser.add_argument_group('what to do')
    group.add_argument('--preset', choices=PRESETS, default='default', help='a list of runs')
    group.add_argument('--sweep', action='store_true', help='try all learning rates and warm-ups')
    group.add_argument('--demo', nargs='?', const='2', metavar='GRAPH',
                       help='what trained models write: a seed, or edges such as "2-1 4-0 ..."')
    group.add_argument('--probe', nargs='+', metavar='PATH',
                       help='memory transplant and rounding of trained models')
    given = vars(parser.parse_args(argv))
    if [] in given.values():                                # (argparse makes this of `--lr=--`)
        refuse('a value is missing')
    texts = {f.name: given.pop(f.name) for f in fields(Run) if f.name in given}
    chosen = {f.name: read_value(f, given.pop(f.name)) for f in fields(kind) if f.name in given}
    return texts, kind(**chosen), given


def refuse(message):
    raise UserError(f'{message}: see --help')


def add_flag(group, f, default):
    switch = dict(nargs='?', const='True') if f.type is bool else {}
    words = f.metadata['meaning']
    if f.metadata['choices']:
        words += f': {", ".join(f.metadata["choices"])}'
    group.add_argument(f'--{f.name}', metavar='VALUE', help=f'{words} ({default})', **switch)


def read_value(f, text):
    """The text of a field's value -> the value. Raises UserError."""
    limits = f.metadata
    choices = ('True', 'False') if f.type is bool else limits['choices']
    if choices and text not in choices:
        raise UserError(f'--{f.name}={text}: choose from {", ".join(choices)}')
    if f.type is bool:
        return text == 'True'
    try:
        value = f.type(text)
    except ValueError:
        raise UserError(f'--{f.name}={text}: expected {f.type.__name__}')
    if f.type is not str and not limits['low'] <= value <= limits['high']:
        raise UserError(f'--{f.name}={text}: must be from {limits["low"]} to {limits["high"]}')
    return value


def all_runs(texts):
    """The product of all values that were given. Without --setup: all that the task has; without
    --arch: the paper's three. Raises UserError and ValueError on what is impossible."""
    values = {}
    for f in fields(Run):
        if f.name in texts:
            values[f.name] = [read_value(f, part) for part in texts[f.name].split(',')]
    runs = []
    for task in values.pop('task', ['istree']):
        values_here = dict(setup=data.TASKS[task].setups, arch=models.ARCHS) | values
        for chosen in itertools.product(*values_here.values()):
            runs.append(Run(task=task, **dict(zip(values_here, chosen))))
    for run in runs:
        task = make_task(run)
        for n in mixed_sizes(run, task):
            if n not in task.possible_n or n > run.n:
                raise UserError(f'--mix={run.mix}: give possible sizes, up to --n={run.n}')
        with torch.device('meta'):
            make_model(run)
    return runs


def runs_of_preset(preset, texts={}):
    """The runs of a preset, where `texts` may say otherwise."""
    runs = []
    for line in PRESETS[preset]:
        of_line, _, _ = parse(line.split())
        if 'arch' in of_line and 'arch' in texts:           # (each line has its own learning rate)
            archs = of_line['arch'].split(',')
            both = [arch for arch in texts['arch'].split(',') if arch in archs]
            if both:
                runs += all_runs(of_line | texts | dict(arch=','.join(both)))
        else:
            runs += all_runs(of_line | texts)
    return runs


def main(argv):
    texts, options, given = parse(argv)
    if 'demo' in given:
        return demo(given['demo'])
    if 'probe' in given:
        return probe(given['probe'], pick_device(options.device))
    preset = given['preset']
    if preset == 'default' and texts.get('task') in PRESETS and not {'arch', 'setup'} & {*texts}:
        preset = texts['task']                              # (the Turing machine has a preset)
    runs = runs_of_preset(preset, texts)
    results = (sweep if 'sweep' in given else run_all)(runs, options)
    if process_number() == 0:
        print('\n' + table(results))
        for name, result in results.items():
            for example in result['examples'][:options.show]:
                prompt = textwrap.wrap('prompt    ' + example['prompt'], **LAYOUT)
                print('', name, *prompt, sep='\n')
                print(show(example['expected'].split(), example['written'].split()))
        if 'sweep' not in given:            # in a sweep, a loss that is not finite is a result, too
            report_missing(runs, options)


def interrupted(*_):
    """After Ctrl-C: end at once, since files are always whole. Helpers end with this process."""
    program = os.path.basename(sys.argv[0])
    os.write(2, f'\n{program}: interrupted, run the same command again to continue\n'.encode())
    os._exit(130)


def cli(main, program, argv):
    """Run main(argv) -> exit code. What the user can fix is one line on stderr."""
    try:
        main(argv)
        print(end='', flush=True)
        return 0
    except BrokenPipeError:             # such as `| head`; what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (UserError, ValueError, OSError, OverflowError) as error:
        line = [*str(error).splitlines(), type(error).__name__][0]
    except (MemoryError, torch.OutOfMemoryError):
        line = 'out of memory, try smaller batches'
    print(f'{program}: {line}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(cli(main, 'train.py', sys.argv[1:]))
