"""Train and evaluate the grid: tasks x architectures x setups x sizes x n x seeds, one cell at a time.

  python train.py                                             the main job, for a 2-core laptop
  python train.py --archs=mamba --setups=cot,retrieval --n_nodes=16 --out=out/mine
  python train.py --show=1                                    ... and print a sample of every cell
  python train.py --sweep                                     how the learning rates below were chosen
  python train.py --preset=paper                              the paper's grid: needs a GPU
  python train.py --help                                      every constant

A cell trains one model on samples made on the fly, then generates on held-out prompts with the retriever
running live, and writes its folder under out/: config.json, log.jsonl (a line per evaluation), checkpoint.pt,
samples.json (what it wrote for three held-out prompts) and result.json. Run the same command again after an
interruption: finished cells are skipped, the others continue from their checkpoints. Run it several times at
once, or under torchrun, and the processes share the cells.

In this file: constants, training, generation, evaluation, the table; then the plumbing. It imports data.py
(the tasks) and models.py.
"""
import os
import signal
import sys

if __name__ == '__main__':      # before the imports that take seconds: Ctrl-C is one line at any moment
    def interrupted(*_):        # files are always whole, see write; the other processes end too
        if os.environ.get('RANK', '0') == '0':
            os.write(2, b'\ntrain.py: interrupted, run the same command again to continue\n')
        os._exit(130)
    signal.signal(signal.SIGINT, interrupted)
    sys.stdout.reconfigure(line_buffering=True)                 # nothing that was printed is lost

import argparse
import inspect
import itertools
import json
import math
import re
import subprocess
import textwrap
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import models

# LR and WARMUP come from `python train.py --sweep`, see results/README.md. Every architecture gets the same
# number of samples, in batches of the same size. Samples of `retrieval` are eight times as long as those of
# `cot`, hence the smaller batches.
SAMPLES = {'direct': 10_000, 'cot': 200_000, 'retrieval': 24_000}
BATCH_SIZE = {'direct': 32, 'cot': 16, 'retrieval': 8}
LR = {'direct.transformer': 1e-3, 'direct.mamba': 1e-3, 'direct.hybrid': 1e-3,
      'cot.transformer': 4e-3, 'cot.mamba': 4e-3, 'cot.hybrid': 8e-3,
      'retrieval.transformer': 4e-3, 'retrieval.mamba': 1.6e-2, 'retrieval.hybrid': 8e-3}
WARMUP = {'direct.transformer': 0.25, 'direct.mamba': 0.05, 'direct.hybrid': 0.05,
          'cot.transformer': 0.25, 'cot.mamba': 0.25, 'cot.hybrid': 0.25,
          'retrieval.transformer': 0.25, 'retrieval.mamba': 0.05, 'retrieval.hybrid': 0.05}

# These runs mix several n: from the start on (0), or the smallest at first, and larger ones join over this
# share of the run; if it is negative, the largest at first, and smaller ones join. The order decides whether
# the Transformer learns a primitive: recall from the smallest, c-grams from the largest. On IsTree with a
# retriever it learns short cuts that fit a single n, so half the nodes come first.
CURRICULUM = {'istree.retrieval': 0.5, 'index': 0.0, 'recall': 0.5, 'cgram': -0.75, 'counting': -0.75}


@dataclass
class Constants:
    # the grid, each one value or several separated by commas
    tasks: tuple = ('istree',)              # what is learned: istree, index, recall, cgram, counting, hotpot
    archs: tuple = ('transformer', 'mamba', 'hybrid')   # the architectures
    setups: tuple = ('direct', 'cot', 'retrieval')      # answer at once, after thinking, or with a retriever
    sizes: tuple = ('tiny',)                # of the models: tiny, 0.5M, 1M, 2M
    layers: tuple = ('',)                   # instead of the architecture's own: AMM, say (models.LAYERS)
    d_state: tuple = (1,)                   # memory of recurrent layers: Mamba's state per channel (paper 16)
    n_nodes: tuple = (14,)                  # size of the task: nodes of the graph, length of the sequence
    seeds: tuple = (0,)                     # for the initial weights and the training data
    # the task
    distribution: str = 'two_star'          # how istree draws its graphs: two_star or random
    n_val: int = 1000                       # held-out samples for the result
    # the model
    frozen_embedding: bool = False          # fixed sinusoids (the paper) instead of a learned embedding
    # training; where tasks, setups or architectures differ: one value for all, or name:value,...
    samples: dict = field(default_factory=SAMPLES.copy)         # training samples
    batch_size: dict = field(default_factory=BATCH_SIZE.copy)   # samples per step
    lr: dict = field(default_factory=LR.copy)                   # peak learning rate
    warmup: dict = field(default_factory=WARMUP.copy)           # share of the run during which it rises
    curriculum: dict = field(default_factory=CURRICULUM.copy)   # share of the run over which other n join
    mix: str = ''                           # the n of a run that mixes several, such as 6+8+11+16
    mix_largest: float = 0.0                # share of batches of the largest n once all have joined
    grad_clip: float = 1.0                  # largest norm of the gradient; 0 means no limit (the paper)
    dtype: str = 'float32'                  # float32, or bfloat16 through autocast
    evaluations: int = 8                    # evaluations during a run, each on 200 held-out samples
    solved: float = 0.995                   # stop after two evaluations in a row as exact as this; 0: never
    # choosing constants
    sweep: bool = False                     # try all learning rates and warm-ups, on other seeds and prompts
    # running
    out: str = 'out'                        # folder for the results
    show: int = 0                           # samples printed per cell, at most 3
    device: str = 'auto'                    # auto, cpu, cuda or mps
    eval_batch: int = 500                   # samples generated at a time
    checkpoint_seconds: int = 30            # time between two checkpoints
    workers: int = 0                        # processes that make batches; 0: this one does (right for a CPU)
    compile: bool = False                   # train and generate through torch.compile, for a GPU
    processes: int = 0                      # cells that run at once; 0: one per CPU core; GPUs: use torchrun


PAPER = dict(sizes=('0.5M', '1M', '2M'), n_nodes=(16, 32, 64), n_val=5000, d_state=(16,),
             frozen_embedding=True,
             samples=dict.fromkeys(SAMPLES, 1_000_000), batch_size=dict.fromkeys(SAMPLES, 64),
             lr={name: 1e-3 if name.endswith('transformer') else 3e-4 for name in LR},
             warmup=dict.fromkeys(LR, 0.01), grad_clip=0.0, evaluations=10, solved=0.0,
             curriculum={name: share for name, share in CURRICULUM.items() if name != 'istree.retrieval'})
# (from a sweep, too)
HOTPOT = dict(tasks=('hotpot',), setups=('retrieval',), n_nodes=(data.HOTPOT_PARAGRAPHS,), n_val=1500,
              distribution='mixed', d_state=(16,), samples=dict.fromkeys(SAMPLES, 160_000),
              batch_size=dict.fromkeys(SAMPLES, 16), warmup=dict.fromkeys(LR, 0.25), evaluations=4,
              lr=LR | {'retrieval.transformer': 2e-3, 'retrieval.mamba': 4e-3, 'retrieval.hybrid': 4e-3})
# (from a sweep of all four tasks; with a retriever, one learning rate serves them all)
PRIMITIVES = dict(tasks=('index', 'recall', 'cgram', 'counting'), setups=('direct', 'retrieval'),
                  n_nodes=(16,), samples=SAMPLES | {'direct': 256_000, 'retrieval': 8_000},
                  batch_size=dict.fromkeys(SAMPLES, 16), warmup=dict.fromkeys(LR, 0.25), evaluations=16,
                  lr=LR | {'retrieval.transformer': 8e-3, 'retrieval.hybrid': 8e-3,
                           'index.direct.transformer': 4e-3, 'index.direct.mamba': 8e-3,
                           'index.direct.hybrid': 8e-3, 'recall.direct.transformer': 4e-3,
                           'recall.direct.mamba': 8e-3, 'recall.direct.hybrid': 4e-3,
                           'cgram.direct.transformer': 2e-3, 'cgram.direct.mamba': 4e-3,
                           'cgram.direct.hybrid': 4e-3, 'counting.direct.transformer': 2e-3,
                           'counting.direct.mamba': 4e-3, 'counting.direct.hybrid': 4e-3})
PRESETS = {'default': {}, 'paper': PAPER, 'hotpot': HOTPOT, 'primitives': PRIMITIVES}

# The grid of a sweep: the same for every task, setup and architecture. All of it is run with an eighth of the
# samples, the best two then with half of them (successive halving, Jamieson & Talwalkar 2016).
SWEEP_LR = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SWEEP_WARMUP = (0.05, 0.25)
SWEEP_SHARES, SWEEP_KEEPS, SWEEP_SEED = (1 / 8, 1 / 2), 2, 1000


# Below, a *cell* is one run of the grid: a dict of all the constants that its result depends on (see cells),
# such as task, arch, setup, n_nodes, seed, samples and lr. Its folder is named after it.

RANK = int(os.environ.get('RANK', 0))       # of this process among those that share the cells


class UserError(Exception):
    """Something the user can fix: printed as one line, exit code 2."""


# --- training ------------------------------------------------------------------------------------------

def learning_rate(cell, samples):
    """Linear warm-up, then a cosine down to 0."""
    warmup = cell['warmup'] * cell['samples']
    if samples < warmup:
        return cell['lr'] * samples / warmup
    done = (samples - warmup) / max(1, cell['samples'] - warmup)
    return cell['lr'] * 0.5 * (1 + math.cos(math.pi * min(1, done)))


def solved(cell, log):
    """Were the last two evaluations good enough to stop?"""
    return cell['solved'] > 0 and [line['exact_trace'] >= cell['solved'] for line in log[-2:]] == [True, True]


def train(c, cell, held_out, device, path):
    """Train the model of a cell, from its checkpoint if there is one. held_out: the samples that will be
    reported. They are not trained on, and neither are those on which the run is watched and stopped.
    Returns the model, the number of samples that it was trained on, and the seconds that this took."""
    batch_size = cell['batch_size']
    torch.manual_seed(cell['seed'])
    vocab_size = data.TASKS[cell['task']].vocab_size(cell['n_nodes'])
    model = models.make_model(cell['arch'], cell['size'], vocab_size, cell['d_state'],
                              cell['frozen_embedding'], cell['layers']).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=cell['lr'], fused=device.type != 'mps')
    forward = model.hidden
    if c.compile:                                       # the step of training, and that of generation
        forward = torch.compile(model.hidden, mode='reduce-overhead')
        model.step = torch.compile(model.step)          # (a CUDA graph would overwrite the last state)

    step, seconds, log = 0, 0.0, []
    if checkpoint := read_checkpoint(path / 'checkpoint.pt', cell, model, optimizer):
        step, seconds, log = checkpoint['step'], checkpoint['seconds'], checkpoint['log']

    def save():
        write_text(path / 'log.jsonl', ''.join(json.dumps(line) + '\n' for line in log))
        write(path / 'checkpoint.pt', lambda file: torch.save(dict(
            cell=cell, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
            seconds=seconds + time.monotonic() - started, log=log), file))

    tuning = held_out_samples(cell | dict(tuning=True))
    steps = -(-cell['samples'] // batch_size)
    eval_steps = max(1, steps // cell['evaluations'])
    batches = data.Batches(cell['task'], batch_size, cell['n_nodes'], cell['setup'], cell['seed'],
                           cell['distribution'], [tokens for _, tokens, _ in held_out + tuning],
                           int(cell['curriculum'] * steps) if 'curriculum' in cell else None,
                           mixed(cell), cell.get('mix_largest', 0.0))
    loader = DataLoader(batches, batch_size=None, sampler=range(step, steps), num_workers=c.workers,
                        pin_memory=device.type == 'cuda')
    started = saved = time.monotonic()
    with tqdm(total=steps * batch_size, initial=step * batch_size, unit='sample', unit_scale=True,
              desc=path.name, dynamic_ncols=True, leave=False, position=RANK) as progress:
        for tokens, loss_mask in loader if not solved(cell, log) else ():
            # one step: predict every token that the model has to write from those before it
            wanted = loss_mask[:, 1:].flatten().nonzero()[:, 0]             # (T,), before the GPU gets busy
            tokens, wanted = (t.to(device, non_blocking=True) for t in (tokens, wanted))    # tokens (B, L)
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(cell, (step + 1) * batch_size)
            with torch.autocast(device.type, torch.bfloat16, enabled=cell['dtype'] == 'bfloat16'):
                hidden = forward(tokens[:, :-1]).flatten(0, 1)[wanted]      # (T, d_model)
                logits = model.head(hidden)                                 # (T, vocab_size)
            loss = F.cross_entropy(logits.float(), tokens[:, 1:].flatten()[wanted])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if cell['grad_clip']:
                torch.nn.utils.clip_grad_norm_(parameters, cell['grad_clip'])
            optimizer.step()
            step += 1
            progress.update(batch_size)

            # now and then: look at the loss, evaluate, save
            evaluating, last = step % eval_steps == 0, step == steps
            saving = last or time.monotonic() - saved > c.checkpoint_seconds
            if step % 20 == 0 or evaluating or saving:      # rarely, because loss.item() waits for the GPU
                if not math.isfinite(loss.item()):
                    raise UserError(f'{path.name}: the loss is {loss.item()} after {step * batch_size:,} '
                                    f'samples, try a learning rate below {cell["lr"]}')
                progress.set_postfix_str(f'loss {loss.item():.3f}')
            if evaluating and not last:
                each = (evaluate(model, cell, n, tokens[:200], loss_mask[:200], c.eval_batch, device)[0]
                        for n, tokens, loss_mask in tuning)
                measured = min(each, key=lambda m: m['exact_trace'])        # of the n that it does worst
                log.append(dict(samples=step * batch_size, loss=loss.item(),
                                seconds=seconds + time.monotonic() - started,
                                accuracy=measured['accuracy'], exact_trace=measured['exact_trace']))
                tqdm.write(f'{path.name:42} {step * batch_size:>9,} samples   loss {loss.item():7.4f}   '
                           'accuracy {accuracy:6.1%}   exact {exact_trace:6.1%}'.format(**log[-1]))
            if saving or solved(cell, log):
                save()
                saved = time.monotonic()
            if solved(cell, log):
                break
    return model, step * batch_size, seconds + time.monotonic() - started


# --- generation with the live retriever -----------------------------------------------------------------

@torch.no_grad()
def generate(model, task, n, setup, prompts, device):
    """Greedy generation after prompts (B, P): argmax, except in the setup retrieval for the tokens after
    [ENDSEARCH], which come from the retriever. A sample ends with the answer, the token after an [EOS] that
    the model has written (not the prompt's). task: a name in data.TASKS. prompts: a numpy array.

    Returns arrays tokens (B, the task's max_length), padded, and retrieved (of the same shape, True where the
    retriever wrote), and the numbers of queries and of well-formed queries."""
    task, start = data.TASKS[task], prompts.shape[1]
    longest = task.max_length(n, setup)
    tokens = np.full((len(prompts), longest), data.PAD)
    tokens[:, :start] = prompts
    retrieved = np.zeros(tokens.shape, bool)
    texts = [data.decode(prompt, task.words) for prompt in prompts]     # what the retriever searches
    answers = [[] for _ in prompts]                                     # tokens that it has still to write
    alive = batch = range(len(prompts))                                 # batch: those that the model reads
    queries = well_formed = 0
    logits, state = model.prefill(torch.from_numpy(prompts).to(device))
    for t in range(start, longest):
        predicted = dict(zip(batch, logits.argmax(-1).tolist()))
        for b in alive:
            token = predicted[b]
            if setup == 'retrieval':
                if tokens[b, t - 1] == data.END:
                    answers[b], fine = task.retrieve(texts[b])
                    queries, well_formed = queries + 1, well_formed + fine
                if answers[b]:
                    token, retrieved[b, t] = answers[b].pop(0), True
                texts[b] += ' ' + task.words[token]
            tokens[b, t] = token
        alive = [b for b in alive if t == start or tokens[b, t - 1] != data.EOS]    # an answer follows [EOS]
        if t + 1 == longest or not alive:
            break
        if len(alive) < 0.8 * len(batch):                               # leave out those that have ended
            state, batch = models.select(state, np.flatnonzero(np.isin(batch, alive))), alive
        logits = model.step(torch.from_numpy(tokens[batch, t]).to(device), state)
    return tokens, retrieved, queries, well_formed


# --- evaluation ------------------------------------------------------------------------------------------

def held_out_samples(cell):
    """The held-out samples of a cell, those to report or, if tuning, those to choose constants on: a list of
    (n, tokens (N, L), loss_mask (N, L)), one for each n that its training mixes, the largest last."""
    draw = lambda n: data.validation_set(cell['task'], cell['n_val'], cell['n_nodes'], cell['setup'],
                                         cell['distribution'], n, cell['tuning'])
    return [(n, *draw(n)[:2]) for n in mixed(cell)]


def mixed(cell):
    """The n that the training of a cell mixes, ascending."""
    if 'mix' in cell:
        return tuple(map(int, cell['mix'].split('+')))
    return data.TASKS[cell['task']].lengths(cell['n_nodes']) if 'curriculum' in cell else (cell['n_nodes'],)


@torch.no_grad()
def evaluate(model, cell, n, reference, loss_mask, batch_size, device):
    """Accuracy on reference samples (N, L) of size n. In the setup direct every answer is one token,
    predicted from those before it (a primitive has several per sample). In the others the model generates,
    with the retriever running live, and the answer is the token after [EOS]; a missing one is wrong.

    Returns (a dict for the log and for result.json, the first three samples as texts)."""
    task, setup = data.TASKS[cell['task']], cell['setup']
    start = task.prompt_length(n)
    right, exact, samples, queries, well_formed = [], [], [], 0, 0
    model.eval()
    starts = range(0, len(reference), batch_size)
    for i in tqdm(starts, 'evaluating', leave=False, disable=len(starts) == 1):
        expected, mask = reference[i:i + batch_size], loss_mask[i:i + batch_size]
        if setup == 'direct':
            guesses = model(torch.from_numpy(expected[:, :-1]).to(device)).argmax(-1).cpu().numpy()
            written, retrieved = expected.copy(), np.zeros(expected.shape, bool)
            written[mask] = guesses[mask[:, 1:]]
            answered = (written == expected) & mask                 # every row has the same number of answers
            right += list(answered.sum(1) / mask.sum(1))
        else:
            written, retrieved, *counts = generate(model, cell['task'], n, setup, expected[:, :start], device)
            queries, well_formed = queries + counts[0], well_formed + counts[1]
            for row, wanted in zip(written, expected):
                end, wanted_end = (np.flatnonzero(t != data.PAD)[-1] for t in (row, wanted))
                right.append(float(row[end] == wanted[wanted_end] and row[end - 1] == data.EOS))
        for row, wanted, by_retriever in zip(written, expected, retrieved):
            words, right_words, prompt = (data.decode(part, task.words).split(' ')
                                          for part in (row, wanted, wanted[:start]))
            exact.append(words == right_words)
            if len(samples) < 3:
                after = len(prompt)
                samples.append(dict(prompt=' '.join(prompt), expected=' '.join(right_words[after:]),
                                    written=' '.join(words[after:]),
                                    retrieved=np.flatnonzero(by_retriever[start:]).tolist()))
    model.train()
    accuracy = float(np.mean(right))
    return dict(accuracy=accuracy, accuracy_se=float(np.std(right)) / math.sqrt(len(right)),
                exact_trace=float(np.mean(exact)),
                well_formed_queries=well_formed / queries if queries else None), samples


@torch.no_grad()
def teacher_forced(model, tokens, loss_mask, batch_size, device):
    """Predict each token of samples (N, L) from the right tokens before it, so that one error does not cause
    the next. Returns wrong (N, L), True where the predicted token is not the right one, and the mean loss."""
    wrong, losses = np.zeros(tokens.shape, bool), []
    for i in range(0, len(tokens), batch_size):
        batch = torch.from_numpy(tokens[i:i + batch_size]).to(device)
        logits = model(batch[:, :-1])
        wrong[i:i + batch_size, 1:] = (logits.argmax(-1) != batch[:, 1:]).cpu().numpy()
        loss = F.cross_entropy(logits.float().transpose(1, 2), batch[:, 1:], reduction='none').cpu().numpy()
        losses.append(loss[loss_mask[i:i + batch_size, 1:]])
    return wrong, float(np.concatenate(losses).mean())


@torch.no_grad()
def messages(model, cell, n, sequences, device, bits_per_float=(1, 2, 3, 4, 6, 8, 12, 32)):
    """The communication game behind the paper's lower bound, played with a recurrent model on associative
    recall. One player reads a sequence [BOS] key value ... ~ and sends the model's state: each of its floats,
    those of the convolutions' windows too, as one of 2^k numbers, evenly spaced over the range that it has on
    training samples. The other goes on from what arrives and is asked for the value of each of the n keys,
    every one as the first question. sequences (N, 2n+2): token ids of the held-out ones.

    Returns a list of dicts: n, bits_per_float k, the bits of the message, accuracy over all questions, and
    all_right, the share of sequences of which every value was right. With 32 bits nothing is rounded."""
    batches = data.Batches(cell['task'], 200, cell['n_nodes'], cell['setup'], cell['seed'])
    training = batches.samples(n, (0, 0))[0][:, :2 * n + 2]
    _, state = model.prefill(torch.from_numpy(training).to(device))
    ranges = [{name: (t.amin(0), t.amax(0)) for name, t in carried.items()} for carried in state]
    right = {k: [] for k in bits_per_float}
    for some in torch.from_numpy(sequences).to(device).split(max(1, 2000 // n)):
        keys, values = some[:, 1:-1:2], some[:, 2:-1:2]                     # (B, n) each
        _, state = model.prefill(some)
        for k in bits_per_float:
            arrived = [{name: round_to(t, *low_high[name], k).repeat_interleave(n, 0)
                        for name, t in carried.items()} for carried, low_high in zip(state, ranges)]
            guesses = model.step(keys.flatten(), arrived).argmax(-1).view_as(values)
            right[k].append(guesses == values)
    floats = sum(model.memory(0).values())
    return [dict(n=n, bits_per_float=k, bits=k * floats, accuracy=torch.cat(r).float().mean().item(),
                 all_right=torch.cat(r).all(1).float().mean().item()) for k, r in right.items()]


def round_to(x, low, high, bits):
    """The floats of x as one of 2^bits numbers each, the middles of as many equal parts of low to high."""
    if bits == 32:
        return x
    part = (high - low).clamp(min=1e-9) / 2 ** bits
    return low + part * (((x - low) / part).floor().clamp(0, 2 ** bits - 1) + 0.5)


def errors_by_kind(wrong, tokens, loss_mask):
    """Share of wrong tokens of each of data.KINDS, on IsTree samples: where does a model go wrong?"""
    kinds = data.token_kinds(tokens, loss_mask)
    return {name: float(wrong[kinds == k].mean()) for k, name in enumerate(data.KINDS) if (kinds == k).any()}


@torch.no_grad()
def attention_to_edges(model, tokens, loss_mask, device):
    """Where the topmost attention layer looks while the model reads the right chains of thought of IsTree
    samples (N, L). Returns a dict: prompt and trace, the words of the first sample; weights, of each token of
    the trace over all tokens, mean over heads; share, the mean weight on the edge of the prompt that holds
    the next token, over all samples and next neighbours. None for a model without attention."""
    layers = [layer for layer in model.modules() if isinstance(layer, models.Attention)]
    if not layers:
        return None
    inputs = []
    with layers[-1].register_forward_pre_hook(lambda layer, arguments: inputs.append(arguments[0])):
        model(torch.from_numpy(tokens).to(device))
    weights = layers[-1].weights(inputs[0]).mean(1).cpu().numpy()                       # (N, L, L)
    next_neighbour = data.token_kinds(tokens, loss_mask) == data.KINDS.index('next neighbour')
    shares = []
    for row, at, seen in zip(tokens, next_neighbour, weights):
        start = row.tolist().index(data.EOS) + 1
        edges = {frozenset(row[i:i + 3:2].tolist()): i for i in range(1, start - 1, 3)}
        for t in np.flatnonzero(at):
            if t > start:                                   # the edge from token t - 1 to token t
                i = edges[frozenset(row[t - 1:t + 1].tolist())]
                shares.append(seen[t - 1, i:i + 3].sum())
    words = data.decode(tokens[0]).split(' ')
    start = words.index('[EOS]') + 1
    return dict(prompt=words[:start], trace=words[start:], share=float(np.mean(shares)),
                weights=weights[0, start:len(words), :len(words)].round(4).tolist())


def run_cell(c, cell, device):
    """Train, evaluate, write samples.json and result.json. Raises UserError."""
    path, task, held_out = folder(c, cell), data.TASKS[cell['task']], held_out_samples(cell)
    for left_by_a_kill in path.glob('checkpoint.pt.*.tmp'):     # (a config's may be another process's)
        left_by_a_kill.unlink()
    model, samples_trained, seconds = train(c, cell, held_out, device, path)
    started, by_length, losses, game = time.monotonic(), [], [], []
    plays = (cell['task'], cell['setup']) == ('recall', 'direct') and not cell['tuning'] \
        and 'cache' not in model.memory(0)
    for n, tokens, loss_mask in held_out:
        measured, samples = evaluate(model, cell, n, tokens, loss_mask, c.eval_batch, device)
        by_length.append(dict(n=n, chance=task.chance(n), **measured))
        if cell['task'] in data.PRIMITIVES:
            by_length[-1]['best_guess'] = data.best_guess(cell['task'], cell['n_nodes'], n, cell['setup'])
        if plays:
            game += messages(model, cell, n, tokens[:200, :2 * n + 2], device)
        wrong, loss = teacher_forced(model, tokens, loss_mask, c.eval_batch, device)
        losses.append(loss)
    # (accuracy, exact_trace and errors: those of the last, largest n)
    if cell['task'] == 'istree':
        measured['errors'] = errors_by_kind(wrong, tokens, loss_mask)
        looks = cell['setup'] == 'cot' and attention_to_edges(model, tokens[:200], loss_mask[:200], device)
        if looks:
            write_json(path / 'attention.json', looks)
            measured['attention_on_edge'] = looks['share']
    write_json(path / 'samples.json', samples)
    if game:
        measured['messages'] = game
    write_json(path / 'result.json', cell | measured | dict(
        by_length=by_length, chance=by_length[-1].get('best_guess', by_length[-1]['chance']),
        loss=float(np.mean(losses)),
        samples_trained=samples_trained,
        memory=model.memory(task.prompt_length(cell['n_nodes'])), params=model.n_params(),
        seconds=seconds, samples_per_second=samples_trained / max(seconds, 1e-9),
        evaluation_seconds=time.monotonic() - started,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        threads=torch.get_num_threads(), torch=torch.__version__))


# --- what is printed -------------------------------------------------------------------------------------

def table(results):
    """A line per cell: what was learned, by how large a model, with how much memory."""
    width = max([len('cell'), *(len(cell_name(r)) for r in results)])
    lines = [f'{"cell":{width}} {"params":>9} {"memory":>7} {"samples":>9} {"minutes":>7}   {"accuracy":14} '
             f'{"chance":>6} {"exact":>6}', '']
    lines[1] = '-' * len(lines[0])
    for r in results:
        lines.append(f'{cell_name(r):{width}} {r["params"]:>9,} {sum(r["memory"].values()):>7,} '
                     f'{r["samples_trained"]:>9,} {r["seconds"] / 60:>7.1f}   {r["accuracy"]:6.1%} ± '
                     f'{r["accuracy_se"]:5.1%} {r["chance"]:>6.1%} {r["exact_trace"]:>6.1%}')
    return '\n'.join([*lines, '', 'memory: floats carried from token to token at the end of the prompt; '
                      'accuracy: of the answer;',
                      'chance: of the best guess without look-up; exact: all tokens right'])


def show(sample, width=100, colour=False):
    """A sample of samples.json as text: the prompt and what the model wrote. A retrieved token is shown as
    *token, the first wrong one as >token<, with the right ones below. Of a long trace: beginning, error
    and end."""
    written, expected = sample['written'].split(), sample['expected'].split()
    wrong = next((i for i, (a, b) in enumerate(itertools.zip_longest(written, expected)) if a != b), None)
    words = [f'*{word}' if i in sample['retrieved'] else word for i, word in enumerate(written)]
    if wrong is not None:
        words[wrong:wrong + 1] = [f'>{"".join(words[wrong:wrong + 1]) or "(end)"}<']
    rows = textwrap.wrap(' '.join(words), width - 10, break_long_words=False, break_on_hyphens=False)
    lines = textwrap.wrap('prompt    ' + sample['prompt'], width, subsequent_indent=' ' * 10, max_lines=3,
                          placeholder=' ...', break_on_hyphens=False)
    for k, row in enumerate(rows):
        column = row.find('>')
        if column >= 0 or k < 2 or k == len(rows) - 1:
            lines.append(f'{"" if k else "written":10}{row}')
        elif lines[-1].strip() != '...':
            lines.append(f'{"":10}...')
        if column >= 0:
            right = ' '.join(expected[wrong:])[:width - 11 - column] or '(end)'
            lines.append(f'{"right":10}{"":{column + 1}}{right}')
    text = '\n'.join(lines)
    return re.sub(r'>(\S+)<', '\033[31m>\\1<\033[0m', text) if colour else text


# --- cells: what is run and where it is kept --------------------------------------------------------------

def cells(c):
    """The grid as a list of dicts, each with all that a cell's result depends on. Refuses (ValueError,
    UserError) what no task or model can do before anything runs."""
    grid = []
    for task, setup, size, n, arch, layers, d_state, seed in itertools.product(
            c.tasks, c.setups, c.sizes, c.n_nodes, c.archs, c.layers, c.d_state, c.seeds):
        known = data.TASKS[task]
        if setup not in known.setups:
            raise UserError(f'--setups={setup}: {task} has {", ".join(known.setups)}')
        distribution = c.distribution if c.distribution in known.distributions else known.distributions[0]
        known.generate(1, n, setup, 0, distribution)                    # raises if it cannot
        with torch.device('meta'):
            models.make_model(arch, size, known.vocab_size(n), d_state, c.frozen_embedding, layers)
        constants = f'{setup}.{arch}'
        grid.append(dict(
            task=task, arch=arch, setup=setup, size=size, layers=layers, d_state=d_state, n_nodes=n,
            seed=seed + SWEEP_SEED * c.sweep, distribution=distribution, n_val=c.n_val, tuning=c.sweep,
            frozen_embedding=c.frozen_embedding, samples=c.samples[setup], batch_size=c.batch_size[setup],
            lr=c.lr.get(f'{task}.{constants}', c.lr[constants]), warmup=c.warmup[constants],
            grad_clip=c.grad_clip, dtype=c.dtype, evaluations=c.evaluations, solved=c.solved))
        for name in {task, f'{task}.{setup}'} & {*c.curriculum}:
            grid[-1]['curriculum'] = c.curriculum[name]
        if c.mix:
            grid[-1] |= dict(mix=c.mix, mix_largest=c.mix_largest)
            grid[-1].setdefault('curriculum', 0.5)
    return grid


def cell_name(cell):
    name = '{task}-{arch}-{setup}-{size}-d{d_state}-n{n_nodes}-s{seed}'.format(
        **cell | dict(arch=f'{cell["arch"]}-{cell["layers"]}' if cell['layers'] else cell['arch']))
    return name + ('-{samples}-lr{lr:g}-w{warmup:g}'.format(**cell) if cell['tuning'] else '')


def folder(c, cell):
    return Path(c.out) / cell_name(cell)


def rungs(c, grid):
    """What is to be run: lists of cells, each to be finished before the next is asked for. Without a sweep
    this is the grid; with one, all learning rates and warm-ups with few samples, then the best with more."""
    if not c.sweep:
        yield grid
        return
    few, more = SWEEP_SHARES
    groups = [[cell | dict(lr=lr, warmup=warmup, samples=int(cell['samples'] * few))
               for lr in SWEEP_LR for warmup in SWEEP_WARMUP] for cell in grid]
    yield sum(groups, [])
    yield [tried | dict(samples=int(cell['samples'] * more)) for cell, group in zip(grid, groups)
           for tried in best(c, group)[:SWEEP_KEEPS]]


def best(c, group):
    """Cells that differ in their constants, the best first. One without a result (its loss was not finite)
    comes last."""
    def key(cell):
        path = folder(c, cell) / 'result.json'
        return rank(read_json(path, RESULT)) if path.exists() else (2,)
    return sorted(group, key=key)


def rank(result):
    """The lower, the better: first results that solved the task, the soonest first, then by held-out loss."""
    solved = result['samples_trained'] < result['samples']
    return (0, result['samples_trained'], result['loss']) if solved else (1, result['loss'])


# --- files -------------------------------------------------------------------------------------------------

# What a file must hold: a type, [a list of], {str: a dict of}, or a dict with these names (name?: if any, as
# in plot.py).
LOG = dict(samples=int, loss=float, seconds=float, accuracy=float, exact_trace=float)
SAMPLE = dict(prompt=str, expected=str, written=str, retrieved=[int])
RESULT = dict(task=str, arch=str, setup=str, size=str, layers=str, d_state=int, n_nodes=int, seed=int,
              samples=int, samples_trained=int, lr=float, warmup=float, tuning=bool, accuracy=float,
              accuracy_se=float, exact_trace=float, chance=float, loss=float, memory={str: float},
              by_length=[dict(n=int, accuracy=float)], params=int, seconds=float)


def fits(value, shape):
    """Whether a value read from a file has a shape, as above. Numbers are finite, whole ones not negative."""
    if shape in (int, float):
        return type(value) in (int, shape) and (0 if shape is int else -1e15) <= value < 1e15
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if not isinstance(shape, dict):
        return type(value) is shape
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(fits(v, shape[str]) for v in value.values())
    return all(fits(value[name.rstrip('?')], part) if name.rstrip('?') in value else name.endswith('?')
               for name, part in shape.items())


def read_json(path, shape):
    """Read a JSON file of ours, or the list of values in one of JSON lines, each of that shape. Raises
    UserError, naming the file, if it is damaged."""
    try:
        text, lines = Path(path).read_text(encoding='utf-8'), Path(path).suffix == '.jsonl'
        value = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()              # fails on half a surrogate pair
        if fits(value, [shape] if lines else shape):
            return value
        reason = 'not a file of ours, or an older one'
    except (OSError, ValueError, RecursionError) as error:
        reason = f'damaged, {str(error)[:60]}'
    raise UserError(f'{path} cannot be read ({reason}): delete it to start over')


def write(path, save):
    """Write a file so that a kill at any moment leaves the old one or the new one, whole: save(file) fills a
    temporary file, which is flushed to the disk and renamed. Raises UserError if the disk is full."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')      # two processes may write a config
    try:
        with open(temporary, 'wb') as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # torch.save makes an OSError a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f'{path} cannot be written ({str(error).splitlines()[0]}): the last one stays; '
                        'when there is room, run the same command again to continue')


def write_text(path, text):
    write(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + '\n')


def read_checkpoint(path, cell, model, optimizer=None):
    """Load a cell's checkpoint into its model and optimizer and return it, None if there is none yet. The
    file is a zip archive whose checksums reveal any flipped byte. Raises UserError on a damaged one and on
    another cell's."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError('wrong checksum')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if not fits(checkpoint, dict(cell=dict, step=int, seconds=float, log=[LOG])):
            raise ValueError('other contents')
        if checkpoint['cell'] == cell:
            model.load_state_dict(checkpoint['model'])
            if optimizer:
                optimizer.load_state_dict(checkpoint['optimizer'])      # (which looks at no shapes)
                for p in optimizer.param_groups[0]['params']:
                    expected = dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)
                    if {name: t.shape for name, t in optimizer.state[p].items()} != expected:
                        raise ValueError('other shapes')
    except Exception as error:          # zipfile and torch.load raise many kinds on a damaged file
        raise UserError(f'{path} cannot be read ({type(error).__name__}): delete it to start this cell over')
    if checkpoint['cell'] != cell:
        raise UserError(f'{path} belongs to another configuration ({difference(checkpoint["cell"], cell)}): '
                        'choose another --out or delete it')
    return checkpoint


def difference(old, new):
    return ', '.join(f'{k}={old.get(k)} there, {new.get(k)} here'
                     for k in sorted({*map(str, old), *new}) if old.get(k) != new.get(k)) or 'other names'


def claim(path, cell):
    """Make a cell's folder, or check that the one there has the same configuration. Raises UserError."""
    path.mkdir(parents=True, exist_ok=True)
    config = path / 'config.json'
    if not config.exists():
        write_json(config, cell)
    if (old := read_json(config, dict)) != cell:
        raise UserError(f'{path} holds another configuration ({difference(old, cell)}): choose another --out')


# --- the command line ------------------------------------------------------------------------------------

CHOICES = dict(tasks=data.TASKS, archs=models.ARCHS, setups=data.SETUPS, sizes=models.SIZES,
               distribution=[*data.DISTRIBUTIONS, *data.HOTPOT_DISTRIBUTIONS],
               dtype=('float32', 'bfloat16'), device=('auto', 'cpu', 'cuda', 'mps'))
LIMITS = dict(batch_size=(1, 65_536), eval_batch=(1, 65_536), n_val=(1, 1_000_000), d_state=(1, 1024),
              samples=(0, 10 ** 12), evaluations=(1, 10_000), warmup=(0, 1), curriculum=(-1, 1),
              solved=(0, 1), show=(0, 1000), processes=(0, 1024), workers=(0, 1024), lr=(0, 1e38),
              grad_clip=(0, 1e30))


def read_value(name, text, default):
    """The text of an override -> a value of the default's type. Raises UserError."""
    if isinstance(default, tuple):
        return tuple(read_value(name, part, default[0]) for part in text.split(','))
    if isinstance(default, dict):           # cot.mamba:0.001, or mamba:0.001 for all that it is part of
        value, example = dict(default), next(iter(default.values()))
        for part in text.split(','):
            key, _, number = part.rpartition(':')
            named = [known for known in default if not key or {*key.split('.')} <= {*known.split('.')}]
            if not named:
                raise UserError(f'--{name}={text}: give one value for all, or name:value with names out of '
                                + ', '.join(default))
            value |= dict.fromkeys(named, read_value(name, number, example))
        return value
    kind = type(default)
    try:
        value = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(f'--{name}={text}: expected {"True or False" if kind is bool else kind.__name__}')
    if kind in (int, float):
        low, high = LIMITS.get(name, (0, 2 ** 31))
        if not low <= value <= high:
            raise UserError(f'--{name}={text}: must be from {low} to {high}')
    elif name in CHOICES and value not in CHOICES[name]:
        raise UserError(f'--{name}={text}: choose from {", ".join(CHOICES[name])}')
    return value


def parse(argv, constants=Constants, program='train.py', presets=PRESETS):
    """Command line -> constants: the defaults, then the preset, then the overrides. --help shows the comments
    that stand beside the constants in the source. Raises UserError."""
    def refuse(message):
        raise UserError(f'{message}: see --help')

    defaults = constants()
    parser = argparse.ArgumentParser(program, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     usage=f'python {program} [--name=value ...]')
    parser.error = refuse
    group = parser
    if len(presets) > 1:
        parser.add_argument('--preset', choices=presets, metavar='NAME', help=f'one of {", ".join(presets)}')
    for line in inspect.getsource(constants).splitlines():
        if m := re.match(r'    (\w+): \w+ = .*?  +# (.*)$', line):
            default = getattr(defaults, m[1])
            switch = dict(nargs='?', const='True') if isinstance(default, bool) else {}
            group.add_argument(f'--{m[1]}', metavar='VALUE', **switch,
                               help=f'{m[2]} (default: {shown(default)})'.replace('%', '%%'))
        elif m := re.match(r'    # (.*)', line):
            group = parser.add_argument_group(m[1])
    overrides = vars(parser.parse_args(argv))
    tasks = set(overrides.get('tasks', '').split(','))
    # without --preset: the one whose tasks are asked for, such as hotpot
    own = [name for name, preset in presets.items() if tasks <= set(preset.get('tasks', ()))]
    c = replace(defaults, **presets[overrides.pop('preset', [*own, 'default'][0])])
    return replace(c, **{name: read_value(name, text or '', getattr(c, name))
                         for name, text in overrides.items()})


def shown(default):
    """A default as it would be typed."""
    if isinstance(default, dict):
        return ','.join(f'{name}:{value}' for name, value in default.items())
    return ','.join(map(str, default)) if isinstance(default, tuple) else default


# --- running ---------------------------------------------------------------------------------------------

def pick_device(name):
    """The device of a name; auto: CUDA, then Apple's MPS, then CPU. Raises UserError if there is none."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == 'auto':
        name = next(device for device in there if there[device])
    if not there[name]:
        raise UserError(f'--device={name}: torch finds no such device here, leave it out to use another')
    return torch.device(name, int(os.environ.get('LOCAL_RANK', 0)) if name == 'cuda' else None)


def work(c, grid, device, wait):
    """Run every cell that has no result and that no other process runs (with wait: wait for that process, and
    take the cell over if it died). Returns the cells that stopped without a result."""
    stopped = []
    for cell in grid:
        path = folder(c, cell)
        lock = filelock.FileLock(path / 'lock')         # released when its process ends, however it ends
        try:
            if (path / 'result.json').exists():
                continue
            with lock.acquire(timeout=-1 if wait else 0):
                if not (path / 'result.json').exists():     # (another process may just have finished it)
                    run_cell(c, cell, device)
        except filelock.Timeout:
            continue
        except UserError as complaint:
            tqdm.write(f'train.py: {complaint}', file=sys.stderr)
            stopped.append(cell)
    return stopped


def end_with_parent():
    """In a helper: its standard input is a pipe from the first process, which closes when that one ends, by
    whatever means. (Ctrl-C reaches the first one alone: each helper is started in a session of its own.)"""
    sys.stdin.read()
    os._exit(1)


def main(argv):
    c = parse(argv)
    device = pick_device(c.device)
    grid = cells(c)
    length = lambda cell: data.TASKS[cell['task']].max_length(cell['n_nodes'], cell['setup'])
    cost = lambda cell: (cell['samples'] * length(cell), cell['arch'] != 'mamba')   # attention takes longer
    # (of a sweep, more follow)
    left = sum(not (folder(c, cell) / 'result.json').exists() for cell in grid) if not c.sweep else 1024
    processes = min(c.processes or (os.cpu_count() if device.type == 'cpu' else 1), left)
    helpers = []
    if 'HELPER' in os.environ:
        threading.Thread(target=end_with_parent, daemon=True).start()
    elif processes > 1 and 'RANK' not in os.environ:        # helpers: this program again, with another rank
        again = [sys.executable, __file__, *argv, f'--processes={processes}']
        for i in range(1, processes):
            helpers.append(subprocess.Popen(again, stdin=subprocess.PIPE, start_new_session=True,
                                            env=os.environ | dict(RANK=str(i), HELPER='1')))
    if device.type == 'cpu':
        torch.set_num_threads(max(1, torch.get_num_threads() // max(1, processes)))
    for rung in rungs(c, grid):
        for cell in rung:
            claim(folder(c, cell), cell)
        longest_first = sorted(rung, key=cost, reverse=True)
        stopped = work(c, longest_first, device, wait=False)
        # then wait for cells that other processes run, and take over those whose process died
        stopped += work(c, [cell for cell in longest_first if cell not in stopped], device, wait=True)
    for helper in helpers:
        helper.wait()
    if RANK == 0:
        folders = [folder(c, cell) for cell in rung]
        results = {path: read_json(path / 'result.json', RESULT) for path in folders
                   if (path / 'result.json').exists()}
        print('\n' + table(results.values()))
        of = lambda r: (r['task'], r['setup'], r['arch'], r['n_nodes'])
        for _, group in itertools.groupby(results.values(), of) if c.sweep else ():
            print('chosen for {task}: --lr={setup}.{arch}:{lr:g} --warmup={setup}.{arch}:{warmup:g}'.format(
                **min(group, key=rank)))
        for path in results if c.show else ():
            samples = read_json(path / 'samples.json', [SAMPLE])
            for sample in samples[:c.show]:
                print(f'\n{path.name}\n{show(sample, colour=sys.stdout.isatty())}')
    if stopped and not c.sweep:             # in a sweep, a loss that is not finite is a result, too
        raise UserError(f'{len(stopped)} of {len(rung)} cells stopped without a result')


def cli(main, program, argv):
    """Run main(argv) -> exit code; what the user can fix is one line on stderr."""
    try:
        main(argv)
        return 0
    except (UserError, ValueError, OSError, OverflowError, MemoryError, RuntimeError) as error:
        line = [*str(error).splitlines(), type(error).__name__][0]
        if isinstance(error, MemoryError) or 'allocate' in line:        # torch says so in a RuntimeError
            line = f'out of memory, try smaller batches ({line})'
        elif isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
            raise
        print(f'{program}: {line}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(cli(main, 'train.py', sys.argv[1:]))
