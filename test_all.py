"""Claims about this project, each checked against something this project did not write: brute force,
float64, networkx, the official metrics, the `transformers` library. Run:  pytest test_all.py

Tests of what needs a compiler, a GPU, networkx or transformers skip themselves where there is none.
Order: data.py, scan_cuda/, models.py, train.py, eval_hotpot.py, plot.py.
"""
import contextlib
import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

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
from scan_cuda import (causal_conv1d, causal_conv1d_reference, selective_scan, selective_scan_fallback,
                       selective_scan_reference)

HERE = Path(__file__).parent
N_NODES = (4, 5, 8, 16, 33, 256)
GRAPHS = [(n, distribution) for n in N_NODES for distribution in data.DISTRIBUTIONS]


# --- data.py ---------------------------------------------------------------------------------------

def encode(text):
    return [data.TOKENS[word] for word in text.split()]


def words_of(row):
    """One sample as a list of words, without padding."""
    return data.decode(row).split()


def edges_of(row):
    """The edges of a sample, read from its text: [(u, v), ...] in the order of the prompt."""
    prompt = data.decode(row).split(' [EOS]')[0].removeprefix('[BOS] ')
    return [tuple(map(int, edge)) for edge in re.findall(r'(\d+) - (\d+)', prompt)]


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

    search(0, None)
    return [str(v) for v in tour]


def answer_by_brute_force(context):
    """The retriever's definition word for word, by loops over words: context is a list of words."""
    start = max(i for i, word in enumerate(context) if word == '[STARTSEARCH]')
    query, context = context[start + 1:-1], context[:start]
    prompt = context[1:context.index('[EOS]')]
    edges = [(prompt[i], prompt[i + 2]) for i in range(0, len(prompt), 3)]
    if not query or not query[0].isdigit():
        return '[FAILED]'
    if len(query) == 2 and query[1] == '~':
        answer, inside = '[FAILED]', False
        for word, sign, parent in zip(context, context[1:], context[2:]):
            inside = word == '[STARTSEARCH]' or inside and word != '[ENDSEARCH]'
            if not inside and word == query[0] and sign == '~':
                answer = parent
        return answer
    others = neighbours_of(edges, query[0])
    if len(query) == 2 and query[1] == '-':
        return (others + ['[FAILED]'])[0]
    if len(query) == 3 and query[1] == '-' and query[2] in others:
        return (others + ['[FAILED]'])[others.index(query[2]) + 1]
    return '[FAILED]'


def recursive_retrieval_trace(edges):
    """Algorithm 2 as the specification words it, with a stack; look-ups answered by brute force."""
    prompt = ['[BOS]'] + [word for u, v in edges for word in (str(u), '-', str(v))] + ['[EOS]']
    context, stack, prev = list(prompt), ['0'], None

    def query(*words):
        context.extend(['[STARTSEARCH]', *words, '[ENDSEARCH]'])
        context.append(answer_by_brute_force(context))
        return context[-1]

    while stack:
        v = stack[-1]
        context.append(v)
        parent = query(v, '~')
        from_parent = prev is None or prev == parent
        w = query(v, '-') if from_parent else query(v, '-', prev)
        if w == parent and w != '[FAILED]':
            w = query(v, '-', parent)
        prev = v
        if w == '[FAILED]':
            stack.pop()
        elif query(w, '~') == '[FAILED]' and w != '0':
            context.extend([w, '~', v])
            stack.append(w)
        else:
            break
    return context[len(prompt):]


@pytest.mark.parametrize('n_nodes, distribution', GRAPHS)
def test_labels_say_whether_the_graph_is_a_tree(n_nodes, distribution):
    networkx = pytest.importorskip('networkx')
    tokens, _, is_tree = data.generate(300, n_nodes, 'direct', 1, distribution)
    for row, label in zip(tokens, is_tree):
        edges = edges_of(row)
        assert len(set(edges)) == n_nodes - 1 and all(u > v for u, v in edges)
        graph = networkx.Graph(edges)
        graph.add_nodes_from(range(n_nodes))
        assert networkx.is_tree(graph) == label == (words_of(row)[-1] == '[TRUE]')


@pytest.mark.parametrize('distribution', data.DISTRIBUTIONS)
def test_half_the_graphs_are_trees_and_every_cycle_is_possible(distribution):
    _, _, is_tree = data.generate(20_000, 16, 'direct', 2, distribution)
    assert abs(is_tree.mean() - 0.5) < 4 * 0.5 / 20_000 ** 0.5


def test_two_star_has_two_centres_and_a_triangle_or_a_bridge():
    networkx = pytest.importorskip('networkx')
    tokens, _, is_tree = data.generate(300, 12, 'direct', 3)
    for row, label in zip(tokens, is_tree):
        graph = networkx.Graph(edges_of(row))
        graph.add_nodes_from(range(12))
        assert sum(networkx.triangles(graph).values()) == (0 if label else 3)
        assert networkx.number_connected_components(graph) == (1 if label else 2)
        # without the one extra edge, every edge touches one of two centres
        assert any(all({u, v} & {a, b} for u, v in graph.edges if {u, v} != set(extra))
                   for extra in graph.edges for a in graph for b in graph)


@pytest.mark.parametrize('n_nodes, distribution', GRAPHS)
def test_cot_trace_is_the_euler_tour_of_a_recursive_search(n_nodes, distribution):
    tokens, loss_mask, _ = data.generate(200, n_nodes, 'cot', 4, distribution)
    start = data.prompt_length(n_nodes)
    for row, mask in zip(tokens, loss_mask):
        trace = words_of(row)[start:]
        assert trace[:-2] == recursive_tour(edges_of(row)) and trace[-2] == '[EOS]'
        assert (np.flatnonzero(mask) == np.arange(start, start + len(trace))).all()
    assert tokens.shape[1] <= data.max_length(n_nodes, 'cot')


@pytest.mark.parametrize('n_nodes, distribution', [g for g in GRAPHS if g[0] < 100])
def test_retrieval_trace_is_algorithm_2_with_a_stack(n_nodes, distribution):
    tokens, loss_mask, _ = data.generate(100, n_nodes, 'retrieval', 5, distribution)
    start = data.prompt_length(n_nodes)
    for row, mask in zip(tokens, loss_mask):
        words = words_of(row)
        assert words[start:-2] == recursive_retrieval_trace(edges_of(row)) and words[-2] == '[EOS]'
        predicted = [i >= start and words[i - 1] != '[ENDSEARCH]' for i in range(len(words))]
        assert (mask == predicted + [False] * (len(row) - len(words))).all()
    assert tokens.shape[1] <= data.max_length(n_nodes, 'retrieval')


@pytest.mark.parametrize('n_nodes, distribution', [g for g in GRAPHS if g[0] < 100])
def test_replaying_a_trace_through_the_retriever_gives_every_retrieved_token(n_nodes, distribution):
    for row in data.generate(20, n_nodes, 'retrieval', 6, distribution)[0]:
        for end in np.flatnonzero(row == data.END):
            assert data.retrieve(row[:end + 1]) == row[end + 1]


def test_retriever_equals_brute_force_on_thousands_of_random_contexts():
    rng = np.random.default_rng(7)
    outcomes = set()
    for row in data.generate(2_000, 7, 'retrieval', 7, 'random')[0]:
        cut = rng.integers(data.prompt_length(7), (row != data.PAD).sum())
        query = rng.integers(data.NODE, data.NODE + 7, 2)
        query = [[query[0], data.RECORD], [query[0], data.EDGE], [query[0], data.EDGE, query[1]],
                 rng.integers(0, data.NODE + 7, rng.integers(0, 5))][rng.integers(4)]    # also malformed
        query = [t for t in query if t not in (data.PAD, data.START, data.END)]
        context = [*row[:cut], data.START, *query, data.END]
        expected = answer_by_brute_force(data.decode(context).split())
        assert data.decode([data.retrieve(context)]) == expected, data.decode(context)
        outcomes.add(expected)
    assert len(outcomes) == 8


def test_kinds_of_the_tokens_in_the_header_are_the_hand_written_ones():
    samples = {
        '[BOS] 2 - 1 4 - 0 4 - 3 4 - 1 [EOS] | 0 4 3 4 1 2 1 4 0 [EOS] [TRUE]': 'nnnrnnrrraa',
        '[BOS] 2 - 1 4 - 0 4 - 3 4 - 1 [EOS] | 0 [STARTSEARCH] 0 ~ [ENDSEARCH] [FAILED] [STARTSEARCH] 0 - [ENDSEARCH] 4 '
        '[STARTSEARCH] 4 ~ [ENDSEARCH] [FAILED] 4 ~ 0 4 [STARTSEARCH] 4 ~ [ENDSEARCH] 0 0 [EOS] [TRUE]':
            'n' 'qqqq.' 'qqqq.' 'qqqq.' 'cccn' 'qqqq.' 'raa'}
    for text, kinds in samples.items():
        prompt, trace = (encode(part) for part in text.split('|'))
        tokens = np.array([prompt + trace + [data.PAD]])
        loss_mask = np.array([[False] * len(prompt) + [kind != '.' for kind in kinds] + [False]])
        found = data.token_kinds(tokens, loss_mask)[0, len(prompt):-1]
        assert ''.join('nrqca'[k] if k >= 0 else '.' for k in found) == kinds       # the KINDS, record as c
    for setup in ('cot', 'retrieval'):              # every return is to a node above, every next neighbour is new
        tokens, loss_mask, _ = data.generate(50, 14, setup, 5)
        for row, kinds in zip(tokens, data.token_kinds(tokens, loss_mask)):
            tour = [(node, data.KINDS[kind]) for node, kind in zip(row.tolist(), kinds) if kind in (0, 1)]
            stack = []
            for node, kind in tour:
                if kind == 'return to the parent':
                    stack.pop()
                    assert stack[-1] == node
                else:
                    assert node not in stack
                    stack.append(node)


def test_hand_worked_example_of_the_header():
    prompt = '[BOS] 2 - 1 4 - 0 4 - 3 4 - 1 [EOS]'
    edges = np.array([[[2, 1], [4, 0], [4, 3], [4, 1]]])
    drawn = data.__doc__.replace('*', '')
    assert prompt in drawn
    tour = data.decode([t for t in data.cot_trace(edges)[0] if t >= 0])
    assert tour == '0 4 3 4 1 2 1 4 0' and tour in drawn
    trace = data.decode([t for t in data.retrieval_trace(edges)[0] if t >= 0])
    assert trace.startswith('0 [STARTSEARCH] 0 ~ [ENDSEARCH] [FAILED] [STARTSEARCH] 0 - [ENDSEARCH] 4 [STARTSEARCH] '
                            '4 ~ [ENDSEARCH] [FAILED] 4 ~ 0 4 [STARTSEARCH] 4 ~ [ENDSEARCH] 0 [STARTSEARCH] 4 - '
                            '[ENDSEARCH] 0 [STARTSEARCH] 4 - 0 [ENDSEARCH] 3 [STARTSEARCH] 3 ~ [ENDSEARCH] [FAILED]')
    ask = lambda query: data.decode([data.retrieve(encode(f'{prompt} {trace} [STARTSEARCH] {query} [ENDSEARCH]'))])
    assert [ask(q) for q in ('2 ~', '0 ~', '4 -', '4 - 0', '4 - 1', '2 - 4', '~', '4 4')] == [
        '1', '[FAILED]', '0', '3', '[FAILED]', '[FAILED]', '[FAILED]', '[FAILED]']


def test_generate_is_deterministic_and_seeds_differ():
    one, two = (data.generate(64, 8, 'cot', (3, 1, 4)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, two))
    assert data.generate(64, 8, 'direct', 1)[0].tolist() != data.generate(64, 8, 'direct', 2)[0].tolist()


def test_validation_prompts_never_occur_in_training():
    held_out = data.validation_set('istree', 500, 5, 'cot')[0]
    prompts = {row[:data.prompt_length(5)].tobytes() for row in held_out}

    def hits(held_out):
        stream = data.training_batches('istree', 64, 5, 'cot', 0, held_out=held_out)
        return sum(row[:data.prompt_length(5)].tobytes() in prompts for _ in range(40) for row in next(stream)[0])

    assert hits(None) > 0 and hits(held_out) == 0       # at n=5 chance alone would mix them


def test_training_stream_resumes_in_the_middle():
    whole = data.training_batches('istree', 48, 6, 'retrieval', 9)
    batches = [next(whole)[0] for _ in range(50)]
    for first in (0, 1, 21, 22, 49):
        resumed = next(data.training_batches('istree', 48, 6, 'retrieval', 9, first=first))[0]
        assert (resumed == batches[first]).all()


@pytest.mark.parametrize('arguments, word', [
    ((8, 3, 'cot', 0), 'n_nodes'), ((8, 8, 'chain', 0), 'direct, cot, retrieval'), ((0, 8, 'cot', 0), 'batch_size'),
    ((8, 8, 'cot', 0, 'star'), 'two_star'), ((8, 8.5, 'cot', 0), 'n_nodes')])
def test_impossible_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        data.generate(*arguments)


# --- data.py: the retrieval primitives ---------------------------------------------------------------

PRIMITIVES = [(task, n) for task in ('index', 'recall', 'cgram', 'counting') for n in (6, 16, 33, 256)]


def primitive_by_brute_force(task, prompt):
    """The answer to a prompt (a list of words), by loops over words, straight from the task's definition."""
    sequence, query = prompt[1:prompt.index('~')], prompt[-2 if task == 'cgram' else -1:]
    if task == 'index':
        return sequence[int(query[0])]
    if task == 'counting':
        return str(sum(word == query[0] for word in sequence))
    for i in range(len(sequence) - len(query)):
        if sequence[i:i + len(query)] == query:
            return sequence[i + len(query)]


@pytest.mark.parametrize('task, n', PRIMITIVES)
def test_primitives_answer_what_brute_force_finds_in_the_prompt(task, n):
    made = data.TASKS[task]
    start = made.prompt_length(n)
    drawn = re.search(r'Prompt (2?)n\+(\d+) tokens', getattr(data, task).__doc__)
    assert start == int(drawn[1] or 1) * n + int(drawn[2])
    for setup in made.setups:
        tokens, loss_mask, answers = made.generate(300, n, setup, 8)
        for row, mask, answer in zip(tokens, loss_mask, answers):
            words = words_of(row)
            step = 2 + (task == 'cgram')
            asked = list(range(words.index('~') + step, start + 1, step))       # where the answers stand
            assert len(asked) == data.QUERIES and asked[-1] == start and row.max() < made.vocab_size(n)
            assert words[-2] == '[EOS]' if setup == 'retrieval' else len(words) == start + 1
            assert words[-1] == primitive_by_brute_force(task, words[:start]) == data.WORDS[answer]
            assert all(words[i] == primitive_by_brute_force(task, words[:i]) for i in asked[:-1])
            predicted = [i >= start and words[i - 1] != '[ENDSEARCH]' or setup == 'direct' and i in asked
                         for i in range(len(words))]
            assert (mask == predicted + [False] * (len(row) - len(words))).all()
        assert tokens.shape[1] == made.max_length(n, setup)


@pytest.mark.parametrize('task', ['index', 'recall', 'cgram', 'counting'])
def test_each_target_drawn_for_a_primitive_stands_under_the_input_it_is_predicted_from(task):
    drawings, row = [], 0
    for line in getattr(data, task).__doc__.split('\n'):
        if found := re.match(r' {8}(direct|retrieval|) +(inputs|targets) ', line):
            if found[1]:
                drawings.append(([], {}))
            row += found[2] == 'inputs'
            words = [((row, word.start()), word[0]) for word in re.finditer(r'\S+', line) if word.start() >= found.end()]
            drawings[-1][0].extend(words) if found[2] == 'inputs' else drawings[-1][1].update(words)
    assert len(drawings) == 2
    for inputs, targets in drawings:
        words = [word for _, word in inputs] + [*targets.values()][-1:]
        step = 2 + (task == 'cgram')
        ends = [words.index('~') + step, words.index('~') + 2 * step]          # where the two answers stand
        direct = '[STARTSEARCH]' not in words
        assert words[-1] == primitive_by_brute_force(task, words[:ends[1]])
        assert words[ends[0]] == primitive_by_brute_force(task, words[:ends[0]])
        assert targets == {place: words[i + 1] for i, (place, word) in enumerate(inputs)
                           if i + 1 >= ends[1] and word != '[ENDSEARCH]' or direct and i + 1 == ends[0]}


@pytest.mark.parametrize('task, n', PRIMITIVES)
def test_replaying_a_primitives_queries_through_the_retriever_gives_every_retrieved_token(task, n):
    made, outcomes = data.TASKS[task], set()
    for row in made.generate(200, n, 'retrieval', 9)[0]:
        ends = np.flatnonzero(row == data.END)
        for end in ends:
            assert data.WORDS[made.retrieve(row[:end + 1])] == data.WORDS[row[end + 1]]
        last = data.WORDS[row[ends[-1] + 1]]
        assert (last == '[FAILED]') if task == 'counting' else (last == words_of(row)[-1])
        outcomes.add(len(ends))
    assert outcomes == ({1, 2, 3, 4} if task == 'counting' else {1})


def test_what_a_sequence_does_not_hold_and_malformed_queries_get_failed():
    ask = lambda task, prompt, query: data.decode([data.TASKS[task].retrieve(
        encode(f'[BOS] {prompt} [STARTSEARCH] {query} [ENDSEARCH]'))])
    assert [ask('index', '13 0 4 1 12 ~ 2', q) for q in ('- 0', '- 1', '- 4', '- 5', '-', '- -', '- 1 1', '[FAILED]')] == [
        '13', '0', '12', *['[FAILED]'] * 5]
    assert [ask('recall', '1 15 0 13 12 14 ~ 0', q) for q in ('1', '12', '0', '2', '14', '~', '0 ~', '3', '5')] == [
        '15', '14', '13', *['[FAILED]'] * 6]
    assert [ask('cgram', '0 3 1 3 2 1 3 0 ~ 1 3', q) for q in ('1 3', '3 2', '3 0', '2 3', '1 3 2')] == [
        '2', '1', '[FAILED]', '[FAILED]', '1']
    assert ask('cgram', '0 1 1 0 ~ 2 3', '2') == '[FAILED]'             # the prompt's own query is not searched
    assert [ask('counting', '4 14 41 4 1 4 ~ 4', q) for q in ('4 ~ 1', '4 ~ 3', '4 ~ 4', '1 ~ 1', '1 ~ 2', '4 ~ 0', '4 ~')] == [
        '4', '4', '[FAILED]', '1', *['[FAILED]'] * 3]
    # no blow-up by backtracking, whatever a badly trained model asks
    started = time.monotonic()
    assert ask('counting', '4 1 ' * 500 + '~ 4', '4 ~ 501') == '[FAILED]' and time.monotonic() - started < 1


def shortcuts(tokens, start, sequence_length):
    """Guesses (B,) of the answer that don't look the query up: the token at any one place of the prompt,
    the most and the least frequent one, and whatever training samples with that query were answered most."""
    sequence = tokens[:, 1:1 + sequence_length]
    for place in range(start):
        yield f'place {place}', tokens[:, place]
    counts = (sequence[:, :, None] == sequence[:, None]).sum(2)
    for name, at in (('majority', counts.argmax(1)), ('rarest', counts.argmin(1)),
                     ('last of the majority', sequence_length - 1 - counts[:, ::-1].argmax(1))):
        yield name, sequence[np.arange(len(tokens)), at]
    answers = tokens[:, start]
    for name, seen in (('most frequent answer', 0 * answers), ('answer by query', tokens[:, start - 1]),
                       ('answer by first token', tokens[:, 1]), ('answer by most recent token', sequence[:, -1])):
        table = np.zeros((tokens.max() + 1,) * 2, int)
        half = len(tokens) // 2                             # learned on one half, used on the other
        np.add.at(table, (seen[:half], answers[:half]), 1)
        yield name, np.where(np.arange(len(tokens)) < half, -1, table[seen].argmax(1))


@pytest.mark.parametrize('task, n', [(task, n) for task, n in PRIMITIVES if 6 < n < 100])
def test_no_shortcut_beats_chance_by_more_than_two_points(task, n):
    made = data.TASKS[task]
    tokens = made.generate(40_000, n, 'direct', 10)[0]
    start = made.prompt_length(n)
    names = set()
    for name, guess in shortcuts(tokens, start, tokens[0].tolist().index(data.RECORD) - 1):
        used = guess >= 0
        accuracy = (guess == tokens[:, start])[used].mean()
        assert accuracy < made.chance(n) + 0.02, (name, accuracy)
        names.add(name)
    assert len(names) == start + 7


@pytest.mark.parametrize('task', ['index', 'recall', 'cgram', 'counting'])
def test_primitives_are_deterministic_and_refuse_what_they_do_not_have(task):
    generate = data.TASKS[task].generate
    one, two, other = (generate(64, 9, 'retrieval', (3, 1, seed)) for seed in (4, 4, 5))
    assert all((a == b).all() for a, b in zip(one, two)) and one[0].tolist() != other[0].tolist()
    for arguments, word in (((8, 9, 'cot', 0), 'direct, retrieval'), ((8, 3, 'direct', 0), 'n_nodes=3'),
                            ((8, 1025, 'direct', 0), '1024'), ((0, 9, 'direct', 0), 'batch_size'),
                            ((8, 9, 'direct', 0, 'two_star'), 'uniform')):
        with pytest.raises(ValueError, match=word):
            generate(*arguments)
    assert generate(2, 1024, 'retrieval', 0)[0].max() < data.NODE + data.MAX_NODES


# --- scan_cuda/ --------------------------------------------------------------------------------------
CUDA = pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))
SCANS = [(f, device) for f in (selective_scan, selective_scan_fallback) for device in ('cpu', 'cuda')]
SCANS = [pytest.param(f, device, id=f'{f.__name__}-{device}', marks=CUDA.marks if device == 'cuda' else ())
         for f, device in SCANS]


def scan_inputs(batch, L, d_inner, d_state, dtype=torch.float32, device='cpu', decay=1.0, seed=0):
    """Random u, delta, A, B, C, D, initial_state that want gradients; `decay` scales the step sizes."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [(draw(batch, L, d_inner), dtype), (F.softplus(draw(batch, L, d_inner)) * decay, dtype),
              (-draw(d_inner, d_state).exp(), exact), (draw(batch, L, d_state), dtype),
              (draw(batch, L, d_state), dtype), (draw(d_inner), exact),
              (draw(batch, d_inner, d_state), exact)]
    return [t.to(device, dtype).requires_grad_() for t, dtype in inputs]


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
    """Unrolled, y_t = sum over s <= t of C_t exp(A (S_t - S_s)) delta_s u_s B_s + D u_t, S the running sum of
    delta."""
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
    assert_close_to_float64(f, selective_scan_reference, inputs, 2e-6)


@pytest.mark.parametrize('f, device', SCANS)
def test_bf16_is_rounded_on_the_way_in_and_out_only(f, device):
    """2^-9 is half of the last bit of bf16; the final state, fp32, does not have even that error."""
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
def test_no_skip_and_no_initial_state_are_zeros(f, device):
    inputs = scan_inputs(2, 70, 9, 4, device=device)
    zeros = [torch.zeros_like(t) for t in inputs[5:]]
    for got, want in zip(with_gradients(f, inputs[:5]), with_gradients(lambda *a: f(*a, *zeros), inputs[:5])):
        assert torch.equal(got, want)


@pytest.mark.parametrize('f, device', SCANS)
def test_decay_that_underflows_leaves_no_trace(f, device):
    """delta A below -200 forgets everything (no 0/0): h_t = delta_t u_t B_t; all is finite, gradients too."""
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


@pytest.mark.parametrize('f, device', SCANS)
@pytest.mark.parametrize('cut', [1, 64, 100])
def test_two_halves_through_the_state_are_the_whole(f, device, cut):
    """Also for the gradients, which pass back through the state from the second half to the first."""
    def halves(u, delta, A, B, C, D, h):
        first, h = f(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, h)
        second, h = f(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, h)
        return torch.cat([first, second], 1), h
    assert_close_to_float64(halves, selective_scan_reference, scan_inputs(2, 150, 12, 5, device=device), 2e-6)


@pytest.mark.parametrize('f, device', SCANS)
def test_same_input_same_bits(f, device):
    """Run to run; the CPU kernel also with any number of threads (enough work that it uses them)."""
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
    """A claim about work, not speed: every product or multiply-add it asks for, counted by element."""
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
    inputs = scan_inputs(2, 70, 5, 3, device=device)
    torch.library.opcheck(torch.ops.scan_cuda.scan_forward.default, (*inputs, scan_cuda.CHUNK))
    without = *inputs[:5], None, None
    torch.library.opcheck(torch.ops.scan_cuda.scan_forward.default, (*without, scan_cuda.CHUNK))
    if device == 'cpu':
        torch.library.opcheck(torch.ops.scan_cuda.conv_forward.default, conv_inputs(2, 9, 5))


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
    (dict(u=torch.zeros(2, 5)), 'u must be'), (dict(A=torch.zeros(3, 65)), 'd_state from 1 to 64'),
    (dict(u=torch.zeros(2, 0, 3)), 'L >= 1'), (dict(u=torch.zeros(2, 5, 3, dtype=torch.float16)), 'float32'),
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


def conv_inputs(batch, L, d, width=4, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    shapes = (batch, L, d), (d, width), (d,), (batch, width - 1, d)
    dtypes = dtype, torch.float32, torch.float32, dtype
    return [draw(*shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes)]


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
    slices = causal_conv1d(torch.cat([x, x], 2)[..., :7], weight, bias, before)
    assert torch.equal(slices, whole)
    zeros = torch.zeros_like(before)
    assert torch.equal(causal_conv1d(x, weight, bias), causal_conv1d(x, weight, bias, zeros))


@pytest.mark.parametrize('change, complaint', [
    (dict(x=torch.zeros(5, 3)), 'x must be'), (dict(weight=torch.zeros(4, 4)), 'weight must'),
    (dict(weight=torch.zeros(4)), 'weight'), (dict(bias=torch.zeros(3, dtype=torch.float64)), 'bias must'),
    (dict(initial_state=torch.zeros(2, 4, 3)), 'initial_state must')])
def test_wrong_convolution_inputs_are_one_clear_line(change, complaint):
    right = dict(zip(('x', 'weight', 'bias', 'initial_state'), conv_inputs(2, 5, 3)))
    with pytest.raises(ValueError, match=complaint):
        causal_conv1d(**(right | change))


# What can go wrong with a build, how to make it so, and the reason and remedy that the one line must name.

def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text('#!/bin/sh\n' + text)
    path.chmod(0o755)
    return str(path)


def broken_compiler(patch, folder):
    fail = 'case "$*" in *scan_cpu.cpp*) echo a note; echo "a.cpp:1:1: error: no luck"; exit 1;; esac\n'
    patch.setenv('CXX', script(folder / 'c++', fail + 'exec c++ "$@"'))


def no_gpu_named(patch, folder):
    script(folder / 'bin' / 'nvcc', '')
    patch.setenv('CUDA_HOME', str(folder))
    patch.delenv('TORCH_CUDA_ARCH_LIST', raising=False)


def nvcc_without_headers(patch, folder):
    script(folder / 'bin' / 'nvcc', 'echo "fatal error: cuda_runtime.h: No such file"; exit 1')
    patch.setenv('CUDA_HOME', str(folder))


FAILURES = {
    'no compiler': ('cpu', lambda patch, folder: patch.setenv('CXX', 'no-such-compiler'), 'no C++ compiler',
                    'apt install g++'),
    'a compiler that fails': ('cpu', broken_compiler, 'error: no luck', 'CXX'),
    'read-only cache': ('cpu', lambda patch, _: patch.setenv('TORCH_EXTENSIONS_DIR', f'{__file__}/cache'),
                        'cannot write', 'TORCH_EXTENSIONS_DIR'),     # below a file
    'no nvcc': ('cuda', lambda patch, folder: patch.setenv('CUDA_HOME', str(folder)), 'no nvcc',
                'CUDA toolkit 12.6'),
    'no architecture': ('cuda', no_gpu_named, 'no GPU to build for', 'TORCH_CUDA_ARCH_LIST'),
    'no headers': ('cuda', nvcc_without_headers, 'cuda_runtime.h: No such file', 'CUDA_HOME'),
}


@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
@pytest.mark.parametrize('what', FAILURES)
def test_a_build_that_fails_is_one_line_with_reason_and_remedy(what, monkeypatch, tmp_path, capfd):
    device, break_it, reason, remedy = FAILURES[what]
    monkeypatch.setattr(scan_cuda.build, 'loaded', {})
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path))
    monkeypatch.setattr(torch.version, 'cuda', '12.6')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', '8.0')
    break_it(monkeypatch, tmp_path)
    assert not scan_cuda.build.load(device) and not scan_cuda.build.load(device)
    out, err = capfd.readouterr()
    assert out == '' and err.count('\n') == 1
    assert reason in err and 'remedy: ' in err and remedy in err.split('remedy: ')[1]


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
    y, h = scan_cuda.selective_scan(u, delta, -torch.ones(5, 3), B, C)
    y = scan_cuda.causal_conv1d(y, torch.ones(5, 4), torch.ones(5))
    print(f"{torch.autograd.grad(y.sum() + h.sum(), u)[0].sum():.3f}")
'''


def test_without_a_kernel_the_fallback_does_the_work(tmp_path):
    """A whole process without compiler and cache: one line, and results as with the kernel."""
    with_kernel, _ = run_python(TRAIN_A_STEP)
    without, complaint = run_python(TRAIN_A_STEP, CXX='no-such-compiler', TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert without == with_kernel and len(set(without.split())) == 1
    assert complaint.count('\n') == 0 and 'no C++ compiler' in complaint
    unasked = run_python(TRAIN_A_STEP, SCAN_CUDA_BUILD='0', TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert unasked == (with_kernel, '')


@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
def test_a_built_kernel_is_cached_and_needs_no_compiler_any_more():
    assert scan_cuda.build.load('cpu')
    assert run_python(TRAIN_A_STEP, CXX='no-such-compiler')[1] == ''


@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
def test_a_killed_build_leaves_nothing_behind_that_is_waited_for_or_loaded(monkeypatch, tmp_path):
    """Killed while the compiler runs, with the lock held; the next process builds."""
    slow = f'case "$*" in *scan_cpu.cpp*) touch {tmp_path}/begun; sleep 60;; esac; exec c++ "$@"'
    monkeypatch.setenv('CXX', script(tmp_path / 'compiler', slow))
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path / 'cache'))
    build = 'import scan_cuda; scan_cuda.build.load("cpu")'
    first = subprocess.Popen([sys.executable, '-c', build], cwd=HERE, start_new_session=True)
    while not (tmp_path / 'begun').exists():
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, 9)     # SIGKILL, for the compiler as well
    first.wait()
    script(tmp_path / 'compiler', 'exec c++ "$@"')
    assert ctypes.CDLL(str(scan_cuda.build._build('cpu'))).scan_forward


@pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
def test_builds_that_start_together_compile_once(monkeypatch, tmp_path):
    """The lock is on a file: two threads here are as good as two processes."""
    count = f'case "$*" in *scan_cpu.cpp*) echo >> {tmp_path}/builds;; esac; exec c++ "$@"'
    monkeypatch.setenv('CXX', script(tmp_path / 'compiler', count))
    monkeypatch.setenv('TORCH_EXTENSIONS_DIR', str(tmp_path / 'cache'))
    with ThreadPoolExecutor(3) as pool:
        libraries = set(pool.map(scan_cuda.build._build, ['cpu'] * 3))
    assert len(libraries) == 1 and (tmp_path / 'builds').read_text() == '\n'


# The CUDA kernels' own source on a CPU: scan_kernels.cu compiled as C++ against scan_cuda/emulate.h.

@pytest.fixture(scope='module')
def emulated(tmp_path_factory):
    if not shutil.which('c++'):
        pytest.skip('no C++ compiler to emulate the CUDA kernels with')
    library = tmp_path_factory.mktemp('emulated') / 'kernels.so'
    subprocess.run(['c++', '-x', 'c++', '-std=c++17', '-O1', '-shared', '-fPIC', '-Wno-unknown-pragmas',
                    HERE / 'scan_cuda' / 'scan_kernels.cu', '-o', library], check=True)
    return ctypes.CDLL(str(library))


def scan_by(library, prefix='scan_'):
    """selective_scan by the kernels of a library, gradients included."""
    forward, backward = scan_cuda.build.scan_functions(library, prefix)

    class Scan(torch.autograd.Function):
        setup_context = staticmethod(scan_cuda.build.save)

        @staticmethod
        def forward(*inputs):
            return forward(*inputs)

        @staticmethod
        def backward(ctx, *grads):
            return scan_cuda.build.gradients(backward, ctx, *grads)

    return lambda *inputs: Scan.apply(*inputs, *[None] * (7 - len(inputs)), scan_cuda.CHUNK)[:2]


def rows_of_wider_ones(inputs):
    """B and C, as in a model, are slices of one tensor."""
    wide = [torch.cat([t.detach()] * 3, -1)[..., 2 * t.shape[-1]:].requires_grad_() for t in inputs[3:5]]
    return *inputs[:3], *wide, *inputs[5:]


@pytest.mark.parametrize('prefix', ['scan_', 'plain_'])
@pytest.mark.parametrize('batch, L, d_inner, d_state, decay', [
    (1, 1, 1, 1, 1.), (2, 7, 33, 2, 1.), (1, 64, 32, 16, 1.), (2, 65, 40, 5, 1.), (3, 72, 31, 3, 30.),
    (2, 70, 40, 2, -1e-3), (1, 129, 5, 64, 1e-2), (1, 150, 70, 17, 1e-2)])
def test_emulated_kernel_and_its_gradients_equal_float64(emulated, prefix, batch, L, d_inner, d_state, decay):
    inputs = rows_of_wider_ones(scan_inputs(batch, L, d_inner, d_state, decay=decay, seed=L))
    assert_close_to_float64(scan_by(emulated, prefix), selective_scan_reference, inputs, 2e-6)


@pytest.mark.parametrize('prefix', ['scan_', 'plain_'])
def test_emulated_kernel_rounds_bf16_on_the_way_in_and_out_only(emulated, prefix):
    inputs = rows_of_wider_ones(scan_inputs(2, 70, 40, 5, torch.bfloat16))
    assert_close_to_float64(scan_by(emulated, prefix), selective_scan_reference, inputs, 2**-8)
    exact = selective_scan_reference(*(t.double() for t in inputs))[1]
    torch.testing.assert_close(scan_by(emulated, prefix)(*inputs)[1].double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('prefix', ['scan_', 'plain_'])
def test_emulated_kernel_takes_no_skip_and_no_initial_state_for_zeros(emulated, prefix):
    f, inputs = scan_by(emulated, prefix), scan_inputs(2, 70, 9, 4)
    zeros = [torch.zeros_like(t) for t in inputs[5:]]
    for got, want in zip(with_gradients(f, inputs[:5]), with_gradients(lambda *a: f(*a, *zeros), inputs[:5])):
        assert torch.equal(got, want)


def test_emulated_kernel_has_the_same_bits_in_any_order_of_threads(emulated):
    seed = ctypes.c_int.in_dll(emulated, 'emulate_seed')
    inputs = scan_inputs(2, 150, 40, 3)
    want = with_gradients(scan_by(emulated), inputs)
    for seed.value in (1, 2, 3):
        assert all(map(torch.equal, with_gradients(scan_by(emulated), inputs), want))


def test_each_barrier_of_the_kernel_is_needed_and_its_loss_noticed(emulated):
    skip = ctypes.c_int.in_dll(emulated, 'emulate_skip')
    source = (HERE / 'scan_cuda' / 'scan_kernels.cu').read_text().splitlines()
    barriers = [k + 1 for k, line in enumerate(source) if line.strip().startswith('__syncthreads();')]
    inputs = scan_inputs(1, 150, 5, 3)
    want = with_gradients(scan_by(emulated), inputs)
    assert len(barriers) == 6
    for skip.value in barriers:
        got = with_gradients(scan_by(emulated), inputs)
        assert not all(map(torch.equal, got, want)), f'line {skip.value}'
    skip.value = 0


@pytest.mark.parametrize('device, autocast', [('meta', False), ('cpu', True), ('cuda', False)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_a_model_keeps_to_its_device(arch, device, autocast, monkeypatch):
    """Training step, prefill and step on tensors without data, which refuse to meet those of another device:
    on the meta device by the fallback, as fake CUDA tensors by the operators. Those need a CUDA build of
    torch, and for the backward pass a GPU. (Autocast, too, is off for CUDA without a GPU.)"""
    if device == 'cuda':
        if not torch.version.cuda:
            pytest.skip('fake CUDA tensors need a CUDA build of torch')
        monkeypatch.setitem(scan_cuda.build.loaded, 'cuda', True)
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
                _, state = model.prefill(tokens, 80)
                logits = model.step(tokens[:, 0], state)
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
        assert not has('scan_forward') and not has('scan_backward')
        assert scan_cuda.build.load('cuda')
        assert has('scan_forward') and has('scan_backward')"""
    run_python(code, TORCH_CUDA_ARCH_LIST='8.0;9.0', TORCH_EXTENSIONS_DIR=str(tmp_path))
    library, = tmp_path.glob('*.so')
    assert all(f'sm_{a}'.encode() in library.read_bytes() for a in (80, 90))


def test_benchmark_prints_a_line_for_everything_at_hand(monkeypatch, capsys):
    from scan_cuda import bench
    for name, value in dict(D_INNER=(8,), LENGTHS=(5, 70), CALLS=1, BATCH=2).items():
        monkeypatch.setattr(bench, name, value)
    bench.time_scans('cpu')
    bench.time_models('cpu')
    out = capsys.readouterr().out
    assert all(out.count(name) == 2 for name in ('fallback', 'reference', *models.ARCHS))
    assert out.count('cpu kernel') == 2 * scan_cuda.build.load('cpu')


# --- models.py -------------------------------------------------------------------------------------

def small_model(arch, **options):
    torch.manual_seed(0)
    return models.make_model(arch, 'tiny', 30, **options)


@pytest.mark.parametrize('arch', models.ARCHS)
@pytest.mark.parametrize('prompt', [1, 2, 17])
def test_stepping_gives_the_logits_of_the_parallel_pass(arch, prompt):
    model = small_model(arch)
    tokens = torch.randint(0, 30, (3, 40))
    with torch.no_grad():
        parallel = model(tokens)
        logits, state = model.prefill(tokens[:, :prompt], 40)
        for t in range(prompt, 40):
            assert (logits - parallel[:, t - 1]).abs().max() < 1e-4
            logits = model.step(tokens[:, t], state)
        assert (logits - parallel[:, -1]).abs().max() < 1e-4
    # the memory of Mamba layers is fixed, that of LLaMA layers grows by two vectors a token
    c = model.config
    assert state.floats() == c.n_mamba * c.d_inner * (c.d_state + c.d_conv - 1) + c.n_llama * 2 * c.d_model * 40


@pytest.mark.parametrize('arch', models.ARCHS)
def test_a_prompt_may_be_read_in_several_parallel_passes(arch):
    model, tokens = small_model(arch), torch.randint(0, 30, (2, 50))
    with torch.no_grad():
        state = model.init_state(2, 50)
        parts = torch.cat([model(part, state) for part in tokens.split((20, 1, 29), 1)], 1)
        assert (parts - model(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize('arch', models.ARCHS)
def test_no_token_sees_the_future(arch):
    model, tokens = small_model(arch), torch.randint(0, 30, (1, 30))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 30
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert difference[:20].max() == 0 and difference[20:].min() > 0


def test_frozen_embedding_is_the_papers_sinusoids_and_stays_frozen():
    model = models.make_model('mamba', '1M', 74)
    E, d = model.embedding.weight, 128
    for j, i in ((0, 0), (3, 0), (11, 5), (73, 63)):
        angle = j / 10000 ** (2 * i / d)
        assert abs(E[j, 2 * i].item() - np.sin(angle)) < 1e-5 and abs(E[j, 2 * i + 1].item() - np.cos(angle)) < 1e-5
    assert not E.requires_grad and model.n_params() == sum(p.numel() for p in model.parameters()) - E.numel()


@pytest.mark.parametrize('size, about', [('0.5M', 0.5e6), ('1M', 1e6), ('2M', 2e6)])
@pytest.mark.parametrize('arch', models.ARCHS)
def test_sizes_have_about_the_parameters_of_their_name(arch, size, about):
    assert 0.75 < models.make_model(arch, size, 74).n_params() / about < 1.25


def test_mamba_starts_with_the_time_scales_of_its_paper():
    for layer in small_model('mamba').layers:
        delta = torch.nn.functional.softplus(layer.dt_proj.bias)
        assert 0.001 * 0.99 < delta.min() < 0.002 and 0.05 < delta.max() < 0.1 * 1.01
        assert torch.allclose(layer.A_log.exp(), torch.arange(1, 17.).expand(128, -1))


HUB_CONFIGS = {
    'llama': dict(vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                  max_position_embeddings=128, rope_theta=5000.0, bos_token_id=0, eos_token_id=1),
    'llama, grouped queries, tied': dict(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
                                         max_position_embeddings=128, bos_token_id=0, eos_token_id=1),
    'mamba': dict(vocab_size=50, hidden_size=48, state_size=8, num_hidden_layers=3),
    'mamba, untied': dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, tie_word_embeddings=False)}


@pytest.mark.parametrize('name', HUB_CONFIGS)
def test_same_weights_give_the_logits_and_the_text_of_transformers(name, tmp_path):
    transformers = pytest.importorskip('transformers')
    family = 'Llama' if name.startswith('llama') else 'Mamba'
    torch.manual_seed(1)
    config = getattr(transformers, family + 'Config')(**HUB_CONFIGS[name])
    theirs = getattr(transformers, family + 'ForCausalLM')(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():           # away from the initial values, which hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(tmp_path)
    ours = models.from_pretrained(tmp_path)
    tokens = torch.randint(0, 50, (2, 33))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        expected = theirs.generate(tokens, max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
        logits, state = ours.prefill(tokens, 60)
        for t in range(33, 53):
            logits[:, config.eos_token_id] = -torch.inf         # min_new_tokens forbids it
            assert (logits.argmax(-1) == expected[:, t]).all()
            logits = ours.step(expected[:, t], state)


def test_what_a_checkpoint_asks_for_and_we_lack_is_refused_by_name():
    llama = dict(HUB_CONFIGS['llama'], model_type='llama')
    for change, word in (({'model_type': 'gpt2'}, 'gpt2'), ({'attention_bias': True}, 'attention_bias'),
                         ({'rope_scaling': {'rope_type': 'yarn'}}, 'yarn'), ({'hidden_act': 'gelu'}, 'hidden_act')):
        with pytest.raises(ValueError, match=word):
            models.pretrained_config(llama | change)
    with pytest.raises(ValueError, match='arch'):
        models.make_model('lstm', 'tiny', 30)
    with pytest.raises(ValueError, match='size'):
        models.make_model('mamba', '3M', 30)


def test_linear_through_onednn_has_the_gradients_of_float64():
    torch.manual_seed(0)
    ours = models.Linear(24, 40)
    exact = torch.nn.Linear(24, 40).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 24, requires_grad=True)
    y, weights = ours(x), torch.randn(3, 7, 40)
    x64 = x.detach().double().requires_grad_()
    (y * weights).sum().backward()
    (exact(x64) * weights).sum().backward()
    for a, b in ((x, x64), (ours.weight, exact.weight), (ours.bias, exact.bias)):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-5)


# --- train.py --------------------------------------------------------------------------------------

SMALL = ['--archs=hybrid', '--setups=cot', '--n_nodes=5', '--samples=1280', '--n_val=40', '--device=cpu',
         '--eval_every=320', '--processes=1', '--checkpoint_seconds=0']


def run(*arguments, env=None, **options):
    """train.py as a user starts it -> CompletedProcess with text output."""
    return subprocess.run([sys.executable, 'train.py', *arguments], cwd=HERE, text=True, capture_output=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'} | (env or {}), **options)


def cell_folder(out):
    return out / 'istree-hybrid-cot-tiny-n5-s0'


def final_weights(out):
    return torch.load(cell_folder(out) / 'checkpoint.pt', weights_only=True)['model']


def log_without_times(out):
    return [{k: v for k, v in json.loads(line).items() if k != 'seconds'}
            for line in (cell_folder(out) / 'log.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A small cell, trained once for the tests below."""
    out = tmp_path_factory.mktemp('finished')
    assert run(*SMALL, f'--out={out}').returncode == 0
    return out


def test_a_cell_reports_what_was_promised(finished):
    result = json.loads((cell_folder(finished) / 'result.json').read_text())
    for name in ('arch setup size n_nodes seed distribution params state_floats samples accuracy accuracy_se exact_trace '
                 'well_formed_queries seconds samples_per_second device torch').split():
        assert name in result
    assert result['samples'] == 1280 and len(log_without_times(finished)) == 3
    assert abs(result['accuracy_se'] - (result['accuracy'] * (1 - result['accuracy']) / 40) ** 0.5) < 1e-12


def test_killed_at_random_moments_it_ends_with_the_same_weights_bit_for_bit(finished, tmp_path):
    rng, kills = np.random.default_rng(int.from_bytes(os.urandom(4), 'little')), 0
    while kills < 5:
        process = subprocess.Popen([sys.executable, 'train.py', *SMALL, f'--out={tmp_path}'], cwd=HERE,
                                   env=os.environ | {'OMP_NUM_THREADS': '1'}, stderr=subprocess.DEVNULL)
        try:            # counted from its first checkpoint, so that slow imports use up no kills
            while not (cell_folder(tmp_path) / 'checkpoint.pt').exists() and process.poll() is None:
                time.sleep(0.01)
            process.wait(timeout=rng.uniform(0, 3))
        except subprocess.TimeoutExpired:
            pass
        process.kill()
        process.wait()
        kills += 1
    assert run(*SMALL, f'--out={tmp_path}').returncode == 0
    one, two = final_weights(finished), final_weights(tmp_path)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert log_without_times(finished) == log_without_times(tmp_path)


@pytest.mark.skipif(os.name == 'nt', reason='no limit on the size of a file')
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    cell = cell_folder(tmp_path)
    (cell / 'result.json').unlink()
    checkpoint = torch.load(cell / 'checkpoint.pt', weights_only=True)
    torch.save(checkpoint | dict(step=checkpoint['step'] - 10), cell / 'checkpoint.pt')
    before, size = (cell / 'checkpoint.pt').read_bytes(), (cell / 'checkpoint.pt').stat().st_size // 2
    limit = 'import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); sys.argv = sys.argv[1:]; ' \
            'sys.path.insert(0, "."); runpy.run_path("train.py", run_name="__main__")'.format(size)     # as if no more fitted
    done = subprocess.run([sys.executable, '-c', limit, 'train.py', *SMALL, f'--out={tmp_path}', '--processes=1'], cwd=HERE,
                          text=True, capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 2 and 'checkpoint.pt cannot be written' in done.stderr and 'Traceback' not in done.stderr
    assert (cell / 'checkpoint.pt').read_bytes() == before and not [*cell.glob('*.tmp')]
    again = run(*SMALL, f'--out={tmp_path}')
    assert again.returncode == 0 and (cell / 'result.json').exists()


def test_a_finished_cell_is_not_run_again(finished):
    before = {file.name: file.stat().st_mtime_ns for file in cell_folder(finished).iterdir() if file.name != 'lock'}
    again = run(*SMALL, f'--out={finished}')
    assert again.returncode == 0 and 'hybrid' in again.stdout
    assert before == {file.name: file.stat().st_mtime_ns for file in cell_folder(finished).iterdir() if file.name != 'lock'}


def test_two_processes_share_a_grid_and_do_no_cell_twice(tmp_path):
    grid = [*SMALL, '--archs=mamba,hybrid', '--setups=direct,cot', '--samples=320', '--seeds=0,1', f'--out={tmp_path}']
    both = [subprocess.Popen([sys.executable, 'train.py', *grid], cwd=HERE, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=os.environ | {'OMP_NUM_THREADS': '1'}) for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    tables = [text[text.index('task  '):] for text in printed]
    assert tables[0] == tables[1] and tables[0].count('istree') == 8
    # every cell was trained by exactly one of the two: its progress is in one output
    for folder in tmp_path.iterdir():
        assert sum(f'{folder.name}: 100%' in text for text in printed) == 1, folder.name


@pytest.mark.parametrize('override, words', [
    ('--archs=lstm', 'transformer, mamba, hybrid'), ('--setups=chain', 'direct, cot, retrieval'),
    ('--sizes=3M', '0.5M'), ('--learning_rate=1', 'no such constant'), ('--n_nodes=3', 'n_nodes=3'),
    ('--n_nodes=abc', 'expected int'), ('--lr=rnn:1', 'transformer, mamba, hybrid'), ('--preset=big', 'paper'),
    ('--lr=-1', 'at least 0'), ('--lr=mamba:x', '--lr=mamba:x: expected float'), ('--batch_size=cot:0', 'at least 1'),
    ('--n_val=0', 'at least 1'), ('--d_state=0', 'at least 1'), ('--seeds=99999999999999999999', 'not infinite'), ('archs=mamba', '--name=value'), ('--frozen_embedding=maybe', 'True or False'),
    ('--distribution=star', 'two_star'), ('--tasks=index --setups=cot', 'index has direct, retrieval'),
    ('--n_nodes=4 --n_val=5000', 'validation set'),
    ('--device=cuda', 'no such device'), ('--out=test_all.py', 'test_all.py')])
def test_bad_constants_get_one_line_and_exit_code_2(override, words, tmp_path, capsys):
    if override == '--device=cuda' and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    assert train.cli(train.main, 'train.py', [*SMALL, f'--out={tmp_path}', *override.split()]) == 2
    line = capsys.readouterr().err.split('\r')[-1].strip()
    assert line.startswith('train.py: ') and words in line and '\n' not in line


def test_another_configuration_in_the_same_folder_is_refused_and_nothing_is_touched(finished, capsys):
    before = (cell_folder(finished) / 'result.json').read_bytes()
    assert train.cli(train.main, 'train.py', [*SMALL, '--d_state=8', f'--out={finished}']) == 2
    assert 'd_state=1 there, 8 here' in capsys.readouterr().err
    assert (cell_folder(finished) / 'result.json').read_bytes() == before


@pytest.mark.parametrize('damage, words', [('truncate', 'cannot be read'), ('foreign', 'another configuration')])
def test_a_damaged_or_foreign_checkpoint_is_refused(finished, tmp_path, damage, words, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = cell_folder(tmp_path)
    (path / 'result.json').unlink()
    if damage == 'truncate':
        (path / 'checkpoint.pt').write_bytes((path / 'checkpoint.pt').read_bytes()[:5000])
    else:
        checkpoint = torch.load(path / 'checkpoint.pt', weights_only=True)
        checkpoint['cell']['lr'] = 1.0
        torch.save(checkpoint, path / 'checkpoint.pt')
    assert train.cli(train.main, 'train.py', [*SMALL, f'--out={tmp_path}']) == 2
    assert words in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_cell_and_says_so(tmp_path):
    result = run(*SMALL, '--archs=hybrid,mamba', '--lr=hybrid:1e30', '--grad_clip=0', '--processes=2', f'--out={tmp_path}')
    assert result.returncode == 2 and 'the loss is nan' in result.stderr and 'Traceback' not in result.stderr
    assert not (cell_folder(tmp_path) / 'result.json').exists()
    assert (tmp_path / 'istree-mamba-cot-tiny-n5-s0' / 'result.json').exists()      # the others go on


def test_help_lists_every_constant_with_its_comment():
    text = run('--help').stdout
    for constant in dataclasses.fields(train.Constants):
        assert f'--{constant.name} ' in text
    assert "rises linearly, then falls as a cosine to 0" in text and "default ('istree',)" in text


def test_the_papers_preset_is_the_papers_grid():
    grid = train.cells(train.parse(['--preset=paper']))
    assert len(grid) == 81 and {cell['n_nodes'] for cell in grid} == {16, 32, 64}
    assert {(cell['arch'], cell['lr']) for cell in grid} == {('transformer', 1e-3), ('mamba', 3e-4), ('hybrid', 3e-4)}
    cell = grid[0]
    assert cell['batch_size'] == 64 and cell['d_state'] == 16 and cell['samples'] == 1_000_000 and cell['n_val'] == 5000 and cell['frozen_embedding']
    assert train.learning_rate(cell, 5_000) == cell['lr'] / 2 and train.learning_rate(cell, 1_000_000) < 1e-12


class Recites:
    """A model that knows the samples by heart and answers every position with the next token, except
    that it never writes what the retriever must write."""

    def __init__(self, tokens, spoil=None):
        self.tokens, self.spoil = tokens, spoil

    def logits(self, t):
        logits = torch.zeros(len(self.tokens), data.NODE + 16)
        wanted = self.tokens[:, min(t, self.tokens.shape[1] - 1)].copy()
        wanted[self.tokens[:, t - 1] == data.END] = data.PAD
        if self.spoil:
            wanted[wanted == self.spoil[0]] = self.spoil[1]
        logits[range(len(wanted)), wanted] = 1
        return logits

    def eval(self):
        pass

    train = eval

    def prefill(self, prompts, max_length):
        return self.logits(prompts.shape[1]), SimpleNamespace(t=prompts.shape[1], floats=lambda: 7)

    def step(self, token, state):
        state.t += 1
        return self.logits(state.t)


@pytest.mark.parametrize('setup', data.SETUPS)
def test_evaluation_gives_a_perfect_model_everything_and_a_spoiled_one_nothing(setup):
    tokens = data.validation_set('istree', 60, 16, setup)[0]
    cell = dict(task='istree', n_nodes=16, setup=setup)
    measured = train.evaluate(Recites(tokens), cell, tokens, 60, torch.device('cpu'))
    assert measured['accuracy'] == measured['exact_trace'] == 1 and measured['state_floats'] == 7
    assert measured['well_formed_queries'] == (1 if setup == 'retrieval' else None)
    # answers turned around: always wrong; no [EOS]: no answer, which is wrong too; broken queries: counted
    for spoil in ((data.TRUE, data.FALSE), (data.EOS, data.EDGE), (data.START, data.EDGE)):
        spoiled = train.evaluate(Recites(tokens, spoil), cell, tokens, 60, torch.device('cpu'))
        if spoil[0] == data.TRUE:
            assert abs(spoiled['accuracy'] - (tokens == data.FALSE).any(1).mean()) < 1e-12
        elif setup != 'direct' and spoil[0] == data.EOS:
            assert spoiled['accuracy'] == spoiled['exact_trace'] == 0
        elif setup == 'retrieval':
            assert spoiled['well_formed_queries'] == 0 and spoiled['exact_trace'] == 0


def test_errors_by_kind_are_those_of_a_model_that_errs_where_we_know():
    tokens, loss_mask, _ = data.generate(40, 9, 'retrieval', 6)
    spoiled, kinds = tokens.copy(), data.token_kinds(tokens, loss_mask)
    spoiled[kinds == data.KINDS.index('record')] += 1           # every record is wrong, and every second answer
    answers = (kinds == data.KINDS.index('answer')) & (np.arange(40) % 2 == 0)[:, None]
    spoiled[answers] += 1
    model = lambda batch: F.one_hot(torch.from_numpy(spoiled[:, 1:]), 64)[rows.pop(0)]
    rows = [slice(0, 25), slice(25, 40)]
    errors = train.errors_by_kind(model, tokens, loss_mask, 25, torch.device('cpu'))
    assert errors == {'next neighbour': 0, 'return to the parent': 0, 'query': 0, 'record': 1, 'answer': 0.5}


# --- eval_hotpot.py --------------------------------------------------------------------------------

SAMPLE = HERE.parent / 'shared' / 'hotpot'
real_records = pytest.mark.skipif(not SAMPLE.exists(), reason='the 60 real questions are not here')


def hotpot_questions():
    """Records to test with: of the small world and, where they are, real ones."""
    real = eval_hotpot.load_hotpot(SAMPLE / 'hotpot_dev_sample.json') if SAMPLE.exists() else []
    return data.hotpot_records(20) + real


def evaluate_hotpot(*arguments, **options):
    return subprocess.run([sys.executable, 'eval_hotpot.py', *arguments], cwd=HERE, text=True, capture_output=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'}, **options)


def hub_layout(record, id_name):
    """The same question in the dictionary-of-lists layout."""
    columns = lambda pairs, *names: dict(zip(names, map(list, zip(*pairs))))
    return {id_name: record['_id'], 'question': record['question'], 'answer': record['answer'], 'type': record['type'],
            'context': columns(record['context'], 'title', 'sentences'),
            'supporting_facts': columns(record['supporting_facts'], 'title', 'sent_id')}


@pytest.mark.parametrize('lines', [False, True])
def test_both_layouts_of_hotpotqa_are_the_same_questions(lines, tmp_path):
    records, file = data.hotpot_records(7), tmp_path / 'questions.json'
    file.write_text(json.dumps(records))
    assert eval_hotpot.load_hotpot(file) == records
    hub = [json.dumps(hub_layout(record, 'id')) for record in records]
    file.write_text('\n'.join(hub) if lines else f'[{",".join(hub)}]')
    assert eval_hotpot.load_hotpot(file) == records


@real_records
def test_real_questions_are_read_in_both_layouts():
    official = eval_hotpot.load_hotpot(SAMPLE / 'hotpot_dev_sample.json')
    hub = eval_hotpot.load_hotpot(SAMPLE / 'hotpot_dev_sample_hf_layout.json')
    assert len(official) == 60 and len(hub) == 3
    by_question = {record['question']: record for record in official}
    for record in hub:
        assert {**record, '_id': 0} == {**by_question[record['question']], '_id': 0}


@pytest.mark.parametrize('change, field', [
    ({'question': None}, 'question'), ({'answer': 5}, 'answer'), ({'context': []}, 'context'),
    ({'_id': data.hotpot_records(1)[0]['_id']}, '_id'),
    ({'context': [['title', 'no list']]}, 'context'), ({'context': {'title': ['a'], 'sentences': []}}, 'context'),
    ({'context': {'title': ['a', 'b'], 'sentences': [['x.']]}}, 'context'),
    ({'supporting_facts': [['title']]}, 'supporting_facts'), ({'supporting_facts': [['nowhere', 0]]}, 'supporting_facts')])
def test_a_malformed_question_is_named_by_index_id_and_field(change, field, tmp_path):
    records = data.hotpot_records(4)
    records[2] = records[2] | change
    (tmp_path / 'bad.json').write_text(json.dumps(records))
    with pytest.raises(ValueError, match=rf'record 2 \(id {records[2]["_id"]}\): {field}: ') as error:
        eval_hotpot.load_hotpot(tmp_path / 'bad.json')
    assert '\n' not in str(error.value)
    (tmp_path / 'bad.json').write_text(json.dumps(records)[:-100])
    with pytest.raises(ValueError, match='not JSON'):
        eval_hotpot.load_hotpot(tmp_path / 'bad.json')


@pytest.mark.parametrize('prediction, answer, em, f1', [        # numbers that hotpot_evaluate_v1.py gave
    ('The Eiffel Tower!', 'eiffel tower', 1, 1), ('in Salzburg, Austria', 'Salzburg', 0, 0.5), ('yes it is', 'yes', 0, 0),
    ('Yes.', 'yes', 1, 1), ('no', 'No way', 0, 0), ('', 'a', 1, 0), ('', 'x', 0, 0), ('noanswer', 'x', 0, 0),
    ('a b b c', 'b b d', 0, 2 / 3), ('3,677 seated', '3677', 0, 2 / 3), ("World's best", 'worlds best goalkeeper', 0, 0.8),
    ('an the a', 'the', 1, 0), ('noanswer here', 'noanswer', 0, 0)])
def test_metrics_are_the_official_ones(prediction, answer, em, f1):
    assert eval_hotpot.exact_match(prediction, answer) == em
    assert abs(eval_hotpot.f1_score(prediction, answer) - f1) < 1e-12


PARAGRAPHS = [('Nile', 'The Nile is a river in Africa.'), ('Danube', 'The Danube is a river in Europe.'),
              ('Paris', 'Paris is a city on the Seine.'), ('Long', 'a' * 5000 + '!')]


@pytest.mark.parametrize('pattern, titles, outcome', [
    ('river', ['Nile', 'Danube'], 'found'), ('^(Paris|Danube): ', ['Danube', 'Paris'], 'found'), ('Seine.*', ['Paris'], 'found'),
    ('', [], 'malformed'), ('(', [], 'malformed'), ('*', [], 'malformed'), ('a{9999999999}', [], 'malformed'),
    ('(' * 100 + ')' * 100, ['Nile', 'Danube'], 'found'), ('a' * 100_000, [], 'malformed'), ('London', [], 'no match'),
    ('.*', ['Nile', 'Danube'], 'found'), ('(a+)+$', [], 'timed out'), ('(.*)*(.*)*(.*)*\\d', [], 'timed out')])
def test_any_pattern_gets_its_outcome_in_bounded_time_and_size(pattern, titles, outcome):
    eval_hotpot.search('warm', PARAGRAPHS)
    started = time.monotonic()
    found, said = eval_hotpot.find(pattern, PARAGRAPHS, seconds=0.3)
    assert ([title for title, _ in found], said) == (titles, outcome)
    assert time.monotonic() - started < 3
    again = eval_hotpot.search('^Long: a', PARAGRAPHS)                 # whatever happened, the next query is answered
    assert [title for title, _ in again] == ['Long'] and len(again[0][1]) == 1000
    assert eval_hotpot.search(pattern, PARAGRAPHS, seconds=0.3) == found       # the same paragraphs, a plain list


def test_the_process_that_searches_stays_warm_and_dies_with_this_one(tmp_path):
    eval_hotpot.search('river', PARAGRAPHS)
    process = eval_hotpot.worker
    started = time.monotonic()
    for _ in range(200):
        eval_hotpot.search('Africa', PARAGRAPHS)
    assert eval_hotpot.worker is process and time.monotonic() - started < 5
    code = "import eval_hotpot; eval_hotpot.search('x', [('a', 'b')]); print(eval_hotpot.worker.pid)"
    pid = int(subprocess.run([sys.executable, '-c', code], cwd=HERE, text=True, capture_output=True).stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError('the process outlives the program')


def test_the_four_examples_are_short_and_strange_to_the_questions():
    assert sum(answer in ('yes', 'no') or ' or ' in question for question, answer, *_ in eval_hotpot.EXAMPLES) == 2
    for condition in eval_hotpot.CONDITIONS:
        text = eval_hotpot.few_shot(condition)
        # a tokenizer of a language model makes at most some 1.4 tokens of a word of English
        assert 1.4 * len(re.findall(r'\w+|[^\w\s]', text)) < 1500
        assert text.count('Answer: ') == 4 and text.count('Found: ') == (6 if condition == 'retrieval' else 0)
        assert 'nothing' not in text
    for record in hotpot_questions():
        for question, _, _, _, paragraphs in eval_hotpot.EXAMPLES:
            assert question != record['question']
            assert not {title for title, _ in paragraphs} & eval_hotpot.supporting(record)
    for question, answer, thought, queries, paragraphs in eval_hotpot.EXAMPLES:
        found = [hit for query in queries for hit in eval_hotpot.search(query, paragraphs)]
        assert len({title for title, _ in found}) == 2 and all(title in question + thought for title, _ in found)
        assert answer in ('yes', 'no') or answer in ' '.join(text for _, text in found) + question


class Scripted:
    """Reads text, writes what its script says for the question: no neural network in it."""

    def __init__(self, records, write_line, name='scripted'):
        self.name, self.write_line, self.reads, self.states = name, write_line, 0, []
        self.records = {record['question']: record for record in records}

    def read(self, text, after=None):
        self.reads += 1
        return (after or '') + text

    def write(self, state):
        self.states.append(state)
        record = self.records[re.findall('Question: (.*)', state)[-1]]
        turn = state[state.rindex('Question: '):]
        line = self.write_line(record, turn)
        return line, state + line + '\n'


def perfect(record, turn):
    titles, n = sorted(eval_hotpot.supporting(record)), turn.count('Search:')
    if turn.endswith('Answer:'):
        return record['answer']
    if turn.endswith('Search:') or 0 < n < len(titles):
        query = f'^{re.escape(titles[n - turn.endswith("Search:")])}:'
        return query if turn.endswith('Search:') else f'Search: {query}'
    return 'Thought: I know.'


def test_a_perfect_model_gets_everything_and_a_bad_one_nothing_under_all_conditions(tmp_path):
    records = hotpot_questions()
    model = Scripted(records, perfect)
    good = eval_hotpot.evaluate(model, records, tmp_path)
    assert all(state.count('Question: ') == 5 for state in model.states)        # the four examples and this one
    assert len(good) == 3 * len(records)
    for (id, condition), r in good.items():
        assert r['em'] == r['f1'] == 1 and r['recall'] == (1 if condition == 'retrieval' else None)
    bad = eval_hotpot.evaluate(Scripted(records, lambda record, turn: 'Search: (unclosed', 'bad'), records, tmp_path, rounds=3)
    for (id, condition), r in bad.items():
        assert r['em'] == r['f1'] == 0
        if condition == 'retrieval':
            assert r['recall'] == 0 and [outcome for _, outcome in r['queries']] == ['malformed'] * 3
    ids = [record['_id'] for record in records]
    assert eval_hotpot.right_under_gold({'good': good}, 10) == ids[:10]
    assert eval_hotpot.right_under_gold({'good': good, 'bad': bad}, 10) == []
    text = eval_hotpot.table({'good': good, 'bad': bad}, ids[:10])
    assert text.count('100.0 ±') == 13 and len({len(line) for line in text.splitlines()[1:]}) == 1


def test_what_a_model_is_shown_depends_on_the_condition(tmp_path):
    records = data.hotpot_records(5)
    for (id, condition), r in eval_hotpot.evaluate(Scripted(records, perfect), records, tmp_path, shots=False).items():
        record = next(record for record in records if record['_id'] == id)
        seen = r['text'][:r['text'].index('Question: ')].splitlines()
        expected = [f'{title}: {"".join(sentences)}' for title, sentences in record['context']
                    if condition != 'gold' or title in dict(record['supporting_facts'])]
        assert seen == expected and len(seen) == (2 if condition == 'gold' else 10)
        assert ('Search:' in r['text']) == (condition == 'retrieval')


def test_a_killed_evaluation_continues_and_a_torn_line_is_asked_again(tmp_path):
    records = data.hotpot_records(6)
    whole = eval_hotpot.evaluate(Scripted(records, perfect), records, tmp_path)
    file, = tmp_path.glob('*.jsonl')
    file.write_bytes(file.read_bytes()[:-1000])
    done = file.read_bytes().count(b'\n')
    again = Scripted(records, perfect)
    results = eval_hotpot.evaluate(again, records, tmp_path)
    strip = lambda results: {key: r | {'seconds': 0} for key, r in results.items()}
    assert strip(results) == strip(whole) and 0 < done < 18
    assert len(file.read_text().splitlines()) == 18 and json.loads(file.read_text().splitlines()[-1])
    damaged = tmp_path / 'damaged'
    damaged.mkdir()
    (damaged / file.name).write_bytes(file.read_bytes().replace(b'"condition"', b'"c"', 1))
    with pytest.raises(train.Refused, match='damaged: delete it'):
        eval_hotpot.evaluate(Scripted(records, perfect), records, damaged)
    lazy = Scripted(records, None)
    assert strip(eval_hotpot.evaluate(lazy, records, tmp_path)) == strip(whole) and lazy.reads == 0
    eval_hotpot.evaluate(Scripted(records, perfect), records, tmp_path, rounds=2)      # other constants: another file
    assert len(list(tmp_path.glob('*.jsonl'))) == 2


def tiny_checkpoint(family, folder):
    """A random checkpoint of a family with a byte-level tokenizer, both written by transformers."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, decoders, models as tokenizer_models, pre_tokenizers
    vocabulary = {word: i for i, word in enumerate(['<s>', '</s>', *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>').save_pretrained(folder)
    common = dict(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    attention = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096)
    config = {'llama': lambda: transformers.LlamaConfig(**common, **attention),
              'mamba': lambda: transformers.MambaConfig(**common, state_size=8),
              'mistral': lambda: transformers.MistralConfig(**common, **attention),
              'jamba': lambda: transformers.JambaConfig(**common, **attention, attn_layer_period=2, attn_layer_offset=1,
                                                        num_experts=1, num_experts_per_tok=1, mamba_d_state=8)}[family]()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize('family', ['llama', 'mamba', 'mistral', 'jamba'])
def test_a_prefix_read_once_gives_the_text_that_transformers_generates(family, tmp_path):
    theirs = tiny_checkpoint(family, tmp_path)
    c = eval_hotpot.Constants(line_tokens=12)
    ours = eval_hotpot.pretrained(str(tmp_path), c, torch.device('cpu'))
    assert type(ours) is (eval_hotpot.LanguageModel if family in ('llama', 'mamba') else eval_hotpot.HubModel)
    prefix = ours.read('Amber Bell: a novel. ')
    for question in ('Who wrote it? Thought:', 'Where? Search:', 'Who wrote it? Thought:'):       # the first one again
        with torch.no_grad():
            expected = theirs(torch.tensor([ours.encode('Amber Bell: a novel. ' + question, True)])).logits[0, -1]
        assert (ours.read(question, prefix)[1] - expected).abs().max() < 1e-4
        line, state = ours.write(ours.read(question, prefix))
        followed, _ = ours.write(ours.read('Found: nothing. Answer:', state))
        tokens = ours.encode('Amber Bell: a novel. ' + question, True)
        for written in (line, followed):
            out = theirs.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False, eos_token_id=[1, ours.newline[0]],
                                  pad_token_id=0)[0, len(tokens):].tolist()
            ended = [i for i, token in enumerate(out) if token in (1, ours.newline[0])]
            out = out[:ended[0]] if ended else out
            assert written == ours.tokenizer.decode(out)
            tokens = tokens + out + ours.newline + ours.encode('Found: nothing. Answer:', False)
    assert ours.memory(prefix) < ours.memory(state) if family != 'mamba' else ours.memory(prefix) == ours.memory(state)


class Forgetful(torch.nn.Module):
    """A transformers model which, given several tokens after others, silently forgets the others (as some
    recurrent ones do), or which returns no cache at all."""

    def __init__(self, model, caches):
        super().__init__()
        self.model, self.caches = model, caches

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        if not self.caches:
            out = self.model(input_ids=input_ids)
            out.past_key_values = None
            return out
        return self.model(input_ids=input_ids, past_key_values=past_key_values if input_ids.shape[1] == 1 else None, use_cache=True)


@pytest.mark.parametrize('caches, stride', [(True, 1), (False, 0)])
def test_models_that_cannot_continue_in_one_pass_are_read_another_way(caches, stride, tmp_path):
    theirs = tiny_checkpoint('llama', tmp_path)
    tokenizer = eval_hotpot.pretrained(str(tmp_path), eval_hotpot.Constants(), torch.device('cpu')).tokenizer
    model = eval_hotpot.HubModel('forgetful', Forgetful(theirs, caches), tokenizer)
    with torch.no_grad():
        expected = theirs(torch.tensor([model.encode('Amber Bell: a novel. Where?', True)])).logits[0, -1]
    assert model.stride == stride
    assert (model.read('a novel. Where?', model.read('Amber Bell: '))[1] - expected).abs().max() < 1e-4


def test_the_command_with_pretrained_models_from_beginning_to_end(tmp_path):
    for family in ('llama', 'mamba'):
        tiny_checkpoint(family, tmp_path / family)
    questions = tmp_path / 'questions.json'
    questions.write_text(json.dumps(data.hotpot_records(2)))
    arguments = [f'--models={tmp_path / "llama"},{tmp_path / "mamba"}', f'--data={questions}', f'--out={tmp_path}',
                 '--device=cpu', '--line_tokens=8', '--rounds=1']
    done = evaluate_hotpot(*arguments, '--show=1')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('\n=== ') == 6 and done.stdout.count('read once; their state is') == 2
    assert len(list((tmp_path / 'hotpot').glob('*.jsonl'))) == 2
    again = evaluate_hotpot(*arguments)
    assert again.stdout[again.stdout.index('model '):].split('peak')[0] == done.stdout[done.stdout.index('model '):].split('peak')[0]


@pytest.mark.parametrize('arguments, words', [
    (['--models=x'], ['hotpot_dev_distractor_v1.json', 'http://curtis.ml.cmu.edu/', '45 MB', '--download']),
    ([], ['python train.py --tasks=hotpot']), (['--rounds=x'], ['--rounds=x', 'int']), (['--preset=paper'], ['preset'])])
def test_what_is_missing_is_one_line_that_says_what_to_do(arguments, words, tmp_path, capsys):
    missing = [f'--out={tmp_path}', f'--data={tmp_path}/hotpot_dev_distractor_v1.json']
    assert train.cli(eval_hotpot.main, 'eval_hotpot.py', [*missing, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and all(word in err for word in words)


# the small world

def test_small_world_answers_follow_from_the_paragraphs():
    kinds = set()
    for record in data.hotpot_records(300):
        author, lived, towns = {}, {'once': {}, 'now': {}}, []
        for title, sentence in [(title, sentences[0]) for title, sentences in record['context']]:
            if m := re.fullmatch(r'(\w+ \w+) wrote it in (\w+)\.', sentence):
                author[title] = m[1]
                towns.append(m[2])
            else:
                m = re.fullmatch(r'(\w+) once, (\w+) now\.', sentence)
                lived['once'][title], lived['now'][title] = m.groups()
                towns += m.groups()
        assert len(author) == len(lived['now']) == 5 and sorted(author.values()) == sorted(lived['now'])
        if m := re.fullmatch(r'(?:Did|Do) (.*) and (.*) live in one town (once|now)\?', record['question']):
            town = lived[m[3]]
            answer, gold, kind, asked = 'yes' if town[m[1]] == town[m[2]] else 'no', {m[1], m[2]}, 'comparison', m[3]
        else:
            m = re.fullmatch(r'Where (?:did|does) the author of (.*) live (once|now)\?', record['question'])
            answer, gold, kind, asked = lived[m[2]][author[m[1]]], {m[1], author[m[1]]}, 'bridge', m[2]
        assert (answer, kind, gold) == (record['answer'], record['type'], eval_hotpot.supporting(record))
        assert len(towns) - len({*towns}) == (answer == 'yes')          # so no other fact gives the right answer
        names = [title.split() for title, _ in record['context']]
        assert len(names) == 10 and all(sum(name[1] == other[1] for other in names) > 1 for name in names)
        kinds.add((kind, asked, answer if kind == 'comparison' else ''))
    assert len(kinds) == 6


@pytest.mark.parametrize('condition', data.HOTPOT_CONDITIONS)
def test_a_small_world_sample_is_the_conversation_that_the_evaluation_holds(condition):
    records, start = data.hotpot_records(40), data.hotpot_prompt_length(10)
    tokens, loss_mask, answers = data.generate_hotpot(40, 10, 'retrieval', data.VALIDATION_SEED, condition)
    for row, mask, record in zip(tokens, loss_mask, records):
        conversation = data.hotpot_decode(row)

        class Knows:                                                   # writes the line as it stands in the sample
            def read(self, text, after=None):
                return (after or '') + text

            def write(self, state):
                line = conversation.removeprefix(state).partition('\n')[0]
                return line, f'{state}{line}\n'

        r = eval_hotpot.ask(Knows(), record, condition)
        assert r['text'] == conversation + '\n' and r['em'] == 1
        assert len(r['queries']) == (0 if condition != 'retrieval' else 1 if record['type'] == 'comparison' else 2)
        assert r['recall'] == (1 if condition == 'retrieval' else None)
        prompt = conversation[:conversation.index('?\n') + 2] + ('Search:' if condition == 'retrieval' else 'Thought:')
        assert eval_hotpot.Words().encode(prompt, True) == row[:start].tolist()
        written = [t for t in row if t not in (data.PAD, data.BOS)]
        assert data.hotpot_encode(conversation) == written and written[-1] == data.HOTPOT_TOKENS[record['answer']]
        # what was found is not to be predicted; all else after the prompt is, and that the text ends
        hidden = data.hotpot_decode(row[start:][~mask[start:] & (row[start:] != data.PAD)])
        assert sorted(hidden.splitlines()) == sorted(f'{title}: {text}' for title, text in
                                                     data.hotpot_paragraphs(record, gold=True) if condition == 'retrieval')
        end = start + (row[start:] != data.PAD).sum()
        assert not mask[:start].any() and mask[end - 2:].tolist()[:3] == [True] * 3 and not mask[end + 1:].any()


def test_mixed_asks_each_question_under_all_conditions_and_none_of_them_in_training():
    tokens, loss_mask, _ = data.validation_set('hotpot', 30, 10, 'retrieval', 'mixed')
    for i, condition in enumerate(data.HOTPOT_CONDITIONS):
        alone, alone_mask, _ = data.validation_set('hotpot', 10, 10, 'retrieval', condition)
        assert np.array_equal(tokens[i::3], alone) and np.array_equal(loss_mask[i::3], alone_mask)
    start = data.hotpot_prompt_length(10)
    held_out = data.generate_hotpot(data.CHUNK, 10, 'retrieval', (0, 0, 0), 'mixed')[0][:10]    # the first of the stream
    batches = data.training_batches('hotpot', 64, 10, 'retrieval', 0, 'mixed', held_out)
    forbidden = {row[:start].tobytes() for row in held_out}
    for _ in range(data.CHUNK // 64):
        batch, mask = next(batches)
        assert not any(row[:start].tobytes() in forbidden for row in batch)
        assert np.array_equal((mask & (batch == data.PAD)).sum(1), np.ones(64))       # every text's end is learned


def test_the_chance_of_hotpot_is_that_of_a_guess_among_the_paragraphs_shown():
    tokens, _, answers = data.generate_hotpot(30_000, 10, 'retrieval', 0, 'mixed')
    towns = np.isin(np.arange(len(data.HOTPOT_WORDS)), [data.HOTPOT_TOKENS[town] for town in data.TOWN])
    shown = [len(np.unique(prompt[towns[prompt]])) for prompt in tokens[:, :data.hotpot_prompt_length(10)]]
    comparison = np.isin(answers, (data.TRUE, data.FALSE))
    assert abs(comparison.mean() - 1 / 4) < 0.02
    assert abs(1 / 4 * 1 / 2 + 3 / 4 * (1 / np.array(shown))[~comparison].mean() - data.TASKS['hotpot'].chance(10)) < 1e-9
    for gold, towns in ((True, 3), (False, 15)):                        # and eval_hotpot.py prints the same
        for record in data.hotpot_records(50):
            kind = 2 if record['type'] == 'comparison' else towns
            assert eval_hotpot.guess(record, data.hotpot_paragraphs(record, gold)) == 1 / kind


@pytest.mark.parametrize('arguments, word', [
    ((1, 10, 'cot', 0), 'setup'), ((1, 10, 'retrieval', 0, 'two_star'), 'distribution'), ((1, 9, 'retrieval', 0), 'even'),
    ((1, 2, 'retrieval', 0), 'n_nodes'), ((1, 18, 'retrieval', 0), 'n_nodes'), ((0, 10, 'retrieval', 0), 'batch_size')])
def test_impossible_questions_are_refused_by_name(arguments, word):
    with pytest.raises(ValueError, match=word):
        data.generate_hotpot(*arguments)
    one, two = (data.generate_hotpot(7, 16, 'retrieval', (1, 2))[0] for _ in range(2))
    assert np.array_equal(one, two) and not np.array_equal(one, data.generate_hotpot(7, 16, 'retrieval', 12)[0])


@pytest.mark.parametrize('query, found', [
    ('Search: ^Amber Tower\nFound:', 'Amber Tower: Odo Dahl wrote it in Lomar.\n'),
    ('Search: ^Ada Tarn\nFound:', 'nothing\n'),
    ('Search: Odo Dahl\nFound:', 'everything'), ('Search: ^Odo Dahl|^Amber\nFound:', 'everything'), ('Found:', 'nothing\n'),
    ('Search: ^Ada\nFound: nothing\nSearch: Elsto\nFound:', 'Odo Dahl: Ravik once, Elsto now.\n'),
    ('Search:\nFound:', 'nothing\n'), ('Search: ?\nFound:', 'nothing\n'), ('Thought: Odo Dahl\nFound:', 'nothing\n')])
def test_the_small_worlds_retriever_takes_whatever_is_written(query, found):
    shown = 'Odo Dahl: Ravik once, Elsto now.\nAmber Tower: Odo Dahl wrote it in Lomar.\n'
    context = data.hotpot_encode(f'{shown}Question: Where did the author of Amber Tower live once?\n{query}')
    assert data.hotpot_decode(data.search_paragraphs(context)) == (shown if found == 'everything' else found)


def test_train_py_writes_what_a_search_finds_whole():
    tokens, loss_mask, _ = data.validation_set('hotpot', 60, 10, 'retrieval', 'mixed')

    class RecitesWords(Recites):                                       # ... but never what the retriever writes
        def logits(self, t):
            wanted = np.where(loss_mask, self.tokens, data.PAD)[:, min(t, self.tokens.shape[1] - 1)]
            return torch.nn.functional.one_hot(torch.from_numpy(wanted), len(data.HOTPOT_WORDS)).float()

    cell = dict(task='hotpot', n_nodes=10, setup='retrieval')
    measured = train.evaluate(RecitesWords(tokens), cell, tokens, 60, torch.device('cpu'))
    assert measured['accuracy'] == measured['exact_trace'] == measured['well_formed_queries'] == 1


def test_training_and_evaluation_of_the_small_world_from_beginning_to_end(tmp_path):
    done = run('--tasks=hotpot', '--archs=mamba', '--samples=640', '--n_val=20', '--device=cpu', '--eval_every=320', f'--out={tmp_path}')
    assert done.returncode == 0, done.stderr
    done = evaluate_hotpot(f'--out={tmp_path}', '--questions=5', '--device=cpu')
    assert done.returncode == 0 and 'mamba-tiny-s0' in done.stdout and 'a guess among' in done.stdout


# --- plot.py -------------------------------------------------------------------------------------------

def written_results(folder, **constants):
    """The folder of a cell as train.py leaves it, with made-up numbers; accuracy None: not finished."""
    cell = dict(task='istree', arch='mamba', setup='cot', size='tiny', n_nodes=8, seed=0, distribution='two_star', d_state=1,
                frozen_embedding=False, samples=1000, n_val=100) | constants
    path = folder / '-'.join(str(v) for v in cell.values())
    path.mkdir()
    (path / 'config.json').write_text(json.dumps({k: v for k, v in cell.items() if k != 'accuracy'}))
    if cell['accuracy'] is not None:
        errors = dict.fromkeys(data.KINDS, 0.1)
        result = cell | dict(accuracy_se=0.05, state_floats=1000 * cell['d_state'], params=5, errors=errors)
        (path / 'result.json').write_text(json.dumps(result))
        (path / 'log.jsonl').write_text(json.dumps(dict(samples=500, accuracy=0.5)) + '\n')


def lines_of(axes):
    """{label: [(x, y, half of the error bar), ...]} of the error-bar plots in a panel."""
    found = {}
    for container in axes.containers:
        x, y = container[0].get_data()
        half = [(segment[1, 1] - segment[0, 1]) / 2 for segment in container[2][0].get_segments()]
        found[container.get_label()] = [tuple(round(float(v), 3) for v in point) for point in zip(x, y, half)]
    return found


def test_figures_show_the_means_the_errors_between_seeds_and_what_is_missing(tmp_path, capsys):
    for seed, accuracy in enumerate((0.6, 0.8, 0.7)):
        written_results(tmp_path, seed=seed, accuracy=accuracy)
    written_results(tmp_path, n_nodes=16, accuracy=0.5)
    written_results(tmp_path, arch='hybrid', accuracy=0.9)
    written_results(tmp_path, arch='hybrid', n_nodes=16, accuracy=None)
    for d_state in (2, 4, 8):                               # a sweep: in the figure on memory, not in the main one
        written_results(tmp_path, d_state=d_state, accuracy=0.95)
    written_results(tmp_path, arch='transformer', samples=9999, accuracy=0.95)      # trained longer: not comparable
    (tmp_path / 'z').mkdir()
    written_results(tmp_path / 'z', arch='hybrid', accuracy=0.1)                 # of the same cell: left out, and said
    found = plot.load(tmp_path)
    assert re.match(f'{tmp_path}/z/.* is left out: {tmp_path}/istree', capsys.readouterr().out)
    (name, figure), = plot.accuracy(found)
    panel, = figure.axes
    lines = lines_of(panel)
    assert name == 'accuracy' and panel.get_title() == 'cot' and lines.keys() == {'RNN (Mamba)', 'hybrid'}
    assert [point[1:] for point in lines['RNN (Mamba)']] == [(70, round(10 / 3 ** 0.5, 3)), (50, 5)]
    assert [point[1:] for point in lines['hybrid']] == [(90, 5)]
    assert [text.get_text() for text in figure.texts] == ['not finished: istree hybrid cot tiny n=16 seed 0']
    pictures = dict(plot.memory(found))
    assert lines_of(pictures['memory-n8'].axes[0])['RNN (Mamba)'] == [(1000, 70, round(10 / 3 ** 0.5, 3)), *[
        (1000 * d, 95, 5) for d in (2, 4, 8)]]
    bars = dict(plot.errors(found))['errors-tiny-n8'].axes[0].containers
    assert [bar.get_height() for bar in bars[0]] == [10] * len(data.KINDS)


def test_plot_py_draws_whatever_there_is(tmp_path):
    draw = lambda: subprocess.run([sys.executable, 'plot.py', f'--out={tmp_path}/out', f'--figures={tmp_path}/figures'],
                                  cwd=HERE, text=True, capture_output=True)
    empty = draw()
    assert empty.returncode == 2 and 'run train.py first' in empty.stderr and len(empty.stderr.splitlines()) == 1
    (tmp_path / 'out').mkdir()
    for text, words in (('{"arch"', 'is damaged'), ('{}', 'is not a result')):
        (tmp_path / 'out' / 'result.json').write_text(text)
        bad = draw()
        assert bad.returncode == 2 and f'out/result.json {words}' in bad.stderr and len(bad.stderr.splitlines()) == 1
    (tmp_path / 'out' / 'result.json').unlink()
    (tmp_path / 'out' / 'hotpot').mkdir(parents=True)
    written_results(tmp_path / 'out', accuracy=0.6)
    written_results(tmp_path / 'out', task='recall', setup='direct', distribution='uniform', accuracy=0.6)
    (tmp_path / 'out' / 'hotpot' / 'model-0a.jsonl').write_text(''.join(
        json.dumps(dict(condition=c, em=1.0)) + '\n' for c in data.HOTPOT_CONDITIONS))
    (tmp_path / 'out' / 'generation.json').write_text(json.dumps(models.generation_cost('tiny', (4, 8), 3)))
    (tmp_path / 'out' / 'hotpot' / 'begun-0a.jsonl').write_text('{"condition": "gold", "em": 1.0}\n')
    done = draw()
    assert 'begun-0a.jsonl is left out: not finished' in done.stdout
    names = {'accuracy', 'learning-n8', 'errors-tiny-n8', 'hotpot', 'generation-tiny', 'primitives-tiny'}
    assert done.returncode == 0 and {path.name for path in (tmp_path / 'figures').iterdir()} == {
        f'{name}.{kind}' for name in names for kind in ('png', 'pdf')}


def test_a_token_costs_an_rnn_the_same_memory_after_any_context():
    rows = models.generation_cost('tiny', (16, 64), 2)
    bytes_of = lambda arch: [r['bytes'] for r in rows if r['arch'] == arch]
    assert bytes_of('mamba') == [4 * 2 * 128 * (16 + 3)] * 2
    assert bytes_of('transformer') == [4 * 2 * 2 * 64 * length for length in (16, 64)]
    assert bytes_of('hybrid')[1] - bytes_of('hybrid')[0] == 4 * 2 * 64 * 48
