"""The class assignment: hand it out, grade it.

  python test_all.py handout DIR [--exercises=1,2,5] [--seed=0]             a folder for the students
  python test_all.py grade DIR [--exercises=1,2,5] [--seed=...] [--json]    what a student handed in

Handouts are made from the code: the chosen functions lose their bodies, and what else holds a solution is
left out. Of a submission, only these functions count, and helper functions and imports added to the same
file. They are put into our copy of the project, in a temporary folder, without the implementations that they
might call instead, and run there in a process that may neither write nor read elsewhere (tests.guard); what
they return is compared here. This stops mistakes and ordinary cheating. Against malice, let the grader run in
a container, as Gradescope does: `--json` goes to /autograder/results/results.json.
"""
import argparse
import ast
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import data
from assignment.tests import LAYER_CLAIMS, answer, difference, table

PROJECT = Path(__file__).parent.parent
FILES = ('*.py', 'scan_cuda/*', 'requirements.txt', 'LICENSE', '.gitignore')
KERNELS = ('scan_cuda/*.cpp', 'scan_cuda/*.cu', 'scan_cuda/*.h')        # the scan in other languages
SCAN = 'scan_cuda/__init__.py'
SECONDS = 120                       # for an exercise, and for an experiment's checkpoint


class Exercise(NamedTuple):
    title: str
    points: int
    minutes: int                    # a guess; a language model took less than one for each of 1 to 8
    what: str
    file: str = ''
    targets: tuple = ()             # functions in it that are to be written
    siblings: tuple = ()            # those that do the same: may not be called
    left_out: tuple = ()            # functions in it, or files, that hold the solution: not in the handout
    needs: str = 'nothing'
    command: str = ''
    adds: tuple = ()                # what in the file is to be extended by a class that is added to it


EXERCISES = {
    1: Exercise('Depth-first search', 10, 20, '''
        Algorithm 1 of the paper: the chain of thought by which a model decides whether a graph is a tree. For
        the edges 2-0 1-0 2-1, the tour is 0 2 1: it ends before node 0, visited and not the parent of 1.
        Graphs may have 4,096 nodes, but Python allows only about 1,000 nested calls.''',
                'data.py', ('cot_trace',), (), ('retrieval_trace',)),
    2: Exercise('The trace with queries', 15, 45, '''
        Algorithm 2 of the paper: the same search by a model that remembers nothing and asks for everything.
        Let v be the node that has been reached and prev the one before it in the tour. Write v and ask `v ~`,
        its parent. For the next neighbour w, ask `v -` if prev is the parent (or at the start), otherwise
        `v - prev`. If w is the parent, ask `v - parent` for the one after it. If the answer is [FAILED], no
        neighbour is left: return to the parent. Otherwise ask `w ~`. If w is node 0 or has a parent, there is
        a cycle: stop. If not, w is new: write the record `w ~ v` and go to w.''',
                'data.py', ('retrieval_trace',), needs='exercise 1, read or solved'),
    3: Exercise("The retriever's regular expressions", 10, 40, '''
        Three patterns are the whole retriever; V and W stand for the numbers of a query. Those of the other
        tasks, below them, are examples. `retrieve` uses them: the answer is the group that matched in the
        text before the query, and of several matches the last one outside queries counts. A pattern for the
        first edge must therefore begin at the start of the text, as the model may write another [BOS]. The
        other end may stand left or right. Beware of 1 inside 11.''', 'data.py', ('QUERIES.istree',)),
    4: Exercise('The scan as a loop', 10, 20, '''
        The recurrence at the heart of Mamba, one token after the other.''', SCAN,
                ('selective_scan_reference',),
                ('pairwise_scan', 'selective_scan_fallback', '_fallback_forward'), KERNELS),
    5: Exercise('The scan in pairs', 10, 40, '''
        Two steps h -> a h + b of the recurrence are again such a step. This makes the scan parallel: about
        2 log2(L) operations on long tensors instead of L on short ones. Do not divide: products of decays
        underflow.''', SCAN, ('pairwise_scan',), ('selective_scan_reference',), KERNELS, 'exercise 4'),
    6: Exercise("The scan's backward pass", 15, 90, '''
        The gradients of all inputs, by hand: the gradient of the state obeys a recurrence that runs backwards
        in time. `_fallback_forward` says what `starts` holds; `_states`, which you may use, computes the
        states of a chunk. In training, dfinal and initial_state are None. Autograd cannot be used.''',
                SCAN, ('_fallback_backward',), (), KERNELS, 'exercises 4 and 5'),
    7: Exercise("Attention's KV cache", 15, 45, '''
        One forward pass for training, for reading a prompt and for a single token: stepping through a text
        with the cache must give what one parallel pass gives. You may use scaled_dot_product_attention of
        torch, but its is_causal aligns the mask at the top left: with a cache, the first of the L tokens
        would see only the first one in the cache. How the buffer of KVCache grows is up to you.''',
                'models.py', ('Attention.attend', 'KVCache.append'), (), ('plot.py',)),
    8: Exercise('Generation with the live retriever', 15, 45, '''
        The model writes queries, the retriever writes the answers, and the samples of a batch end at
        different times. `data.TASKS[task].retrieve(text)` answers the query at the end of a text with a list
        of tokens (one in IsTree); `model.prefill` and `model.step` return the logits of the next token. An
        [ENDSEARCH] in the last column gets no answer. The tests' model writes nonsense once it has been fed
        a wrong token, so look at the first difference only.''',
                'train.py', ('generate',), (), ('eval_hotpot.py', 'plot.py'), 'reading `data.retrieve`'),
    9: Exercise('Experiment: how much memory does n=14 need?', 15, 60, '''
        Train an RNN (up to four layers, none of them attention) that solves IsTree with chain of thought,
        with at most 5,000 floats of memory. Hand in the folders of three seeds as out/9/...; each must
        reach 75% on graphs that the grader draws. This one does not (three minutes a seed on one core):''',
                needs='exercises 1, 5, 6 and 8',
                command='python train.py --archs=mamba --d_state=1 --setups=cot --seeds=0,1,2'),
    10: Exercise('Experiment: where should the attention layer stand?', 15, 60, '''
        One Mamba layer with d_state=1 and one attention layer: which should be on top? Try both, and hand
        in the folders of three seeds of the better one as out/10/...; each must reach 90% on graphs that
        the grader draws. This is one of the two (three to four minutes a seed on one core):''',
                needs='exercises 1, 5, 6, 7 and 8',
                command='python train.py --archs=hybrid --layers=AM --setups=cot --seeds=0,1,2'),
    11: Exercise('A question', 10, 30, '''
        With chain of thought, the RNN falls behind as n grows; with a retriever, it does not, although its
        memory is the same. Why? And why does one attention layer suffice, and why in only one of the two
        places? Write half a page, answers.md, with numbers of your own.''', needs='exercises 9 and 10'),
    12: Exercise('A layer of your own', 15, 60, '''
        Write a recurrent layer that is not there yet, for example linear attention: its memory is a matrix to
        which k^T v is added for every token. Add a class to models.py and its letter to `LAYERS`. The header
        of models.py says what a layer must have, `short_convolution` joins a key with the value behind it,
        and `GRULayer` is the shortest example; two dozen lines suffice. Then let two of them learn
        associative recall. With the letter L and linear attention (a minute on one core; result.json has the
        accuracy at every n):''',
                 'models.py', adds=('LAYERS',), needs='reading models.py', command=
                 'python train.py --preset=primitives --tasks=recall --setups=direct --archs=mamba '
                 '--layers=LL --d_state=32 --lr=8e-3 --warmup=0.25 --samples=64000 --curriculum=0'),
}
# what a checkpoint must reach, and what it may be
EXPERIMENTS = {9: (0.75, lambda found: 'A' not in found['layers'] and found['memory'] <= 5000),
               10: (0.90, lambda found: sorted(found['layers']) == ['A', 'M'] and found['d_state'] == 1)}
MODEL_ANSWER = '''
The RNN has to write its fixed number of floats before it knows what will be asked. The search asks for any
node's next neighbour, so by the end of the prompt all edges and their order must be in there: about 57 bits
at n=14, growing as n log n, in a form that training finds. Where the RNN errs, it errs on the next neighbour,
not on returns to the parent, which stand a few tokens back. With a retriever it need not remember the prompt:
which node, from where and what was answered suffice for every n. An attention layer keeps all tokens and is
the look-up. On top, it reads what the Mamba layer has prepared, tokens mixed with their neighbours: an edge,
three tokens, becomes one key. Below, it sees bare tokens, and "the token two places after this one" would
take a second attention layer. Full marks: fixed against growing memory; what has to be looked up; retrieval
makes it local; composition of edges; numbers of three seeds.'''
LINEAR_ATTENTION = '''
class LinearAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, width = c, 3 * c.d_state
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.qkv_proj = Linear(c.d_model, width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(width, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(width))
        self.out_proj = Linear(c.d_state, c.d_model, bias=False)

    def init_weights(self):
        init_convolution(self)

    def init_state(self, batch_size, seen=0):
        c, zeros = self.config, self.norm.weight.new_zeros
        return {'window': zeros(batch_size, c.d_conv - 1, 3 * c.d_state),
                'state': zeros(batch_size, c.d_state, c.d_state)}

    def forward(self, x, carried):
        q, k, v = short_convolution(self, self.qkv_proj(self.norm(x)), carried).chunk(3, -1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)               # (B, L, d_state)
        S = carried.get('state', 0 * k.mT @ v)                              # (B, d_state, d_state)
        carried['state'] = S + k.mT @ v
        return x + self.out_proj(q @ S + (q @ k.mT).tril() @ v)             # (B, L, d_model)
'''
README = '''# Assignment: RNNs are not Transformers (yet)

The paper: [*RNNs are not Transformers (Yet)*](https://arxiv.org/abs/2402.18510) (Wen, Dang, Lyu, ICLR 2025).
{points} points, about {hours} hours; all times for students are estimates. Replace each
`raise NotImplementedError(...)` with code that does what the docstring says. You need neither a GPU nor a C++
compiler: without its kernels, `scan_cuda` prints a line and uses PyTorch. Read the header of `data.py` first.

    pip install -r requirements.txt
    python train.py --setups=direct --archs=mamba --layers=GG --n_nodes=8 --samples=2000
    pytest test_assignment.py
    pytest test_assignment.py -x -k exercise_{first}_

The first two commands show that everything is installed; the second takes less than a minute. The others test
your work: all of it, or one exercise up to the first failure. A failed test draws the smallest of its
examples that fails, with a mark ^ at the first difference. `B (2, 5, 4)` means that B has this shape.

Hand in the whole folder. We grade these functions, with helper functions and imports that you add to the same
files (outside of classes), on other examples; all tests of an exercise count the same. While it is graded,
your code has {seconds} seconds, can neither write files nor start programs, and cannot call other
implementations of the same thing. A prerequisite that is not part of the assignment is solved already.
'''


# --- examples: what the functions are tried on ----------------------------------------------------------

def graph(rng, n, cyclic=False):
    """Edges of a tree of n nodes, or of a graph with as many edges and a cycle."""
    ring = rng.randrange(3, n) if cyclic else 0
    edges = [(i, (i + 1) % ring) for i in range(ring)]
    edges += [(i, rng.randrange(i)) for i in range(max(1, ring), n - cyclic)]
    name = rng.sample(range(n), n)
    return rng.sample([sorted((name[u], name[v]), reverse=True) for u, v in edges], n - 1)


def queries(rng, n):
    """Texts that end in a query: kind of query -> examples."""
    tokens = data.sample(graph(rng, n), True, 'retrieval')[:-2]
    texts = [data.decode(tokens[:i + 1]) for i, token in enumerate(tokens) if token == data.END]
    start = texts[-1].rpartition(' [STARTSEARCH]')[0]
    a, b = rng.sample(range(1, 10), 2)
    found = {'the parent': [text for text in texts if text.endswith('~ [ENDSEARCH]')],
             'the first neighbour': [text for text in texts if text.endswith('- [ENDSEARCH]')],
             'the next neighbour': [text for text in texts if re.search(r'- \d+ \[ENDSEARCH\]$', text)],
             '1 inside 11': [
                 f'[BOS] {b}{a} - {a} [EOS] {a} ~ 0 {b}{a} ~ {a} [STARTSEARCH] {a} ~ [ENDSEARCH]',
                 f'[BOS] {b}{a} - {b} 200 - {a}{b} 300 - {a} [EOS] 0 [STARTSEARCH] {a} - [ENDSEARCH]',
                 f'[BOS] 9{a} - {b}{a} {b}{b} - 9{a} 200 - 9{a} 99{a} - {b} 9{a} - {b} 59{a} - 0 300 - 9{a}1 '
                 f'400 - 9{a} [EOS] 0 [STARTSEARCH] 9{a} - {b} [ENDSEARCH]'],
             'queries without an answer': [f'{start} [STARTSEARCH] {query} [ENDSEARCH]' for query in (
                 '~', '-', '3', '3 ~ 1', '3 - 1 2', '- 1', '1 3', '3 - -', '3 - [EOS]', f'{n} -', f'{n} ~')]}
    return {kind: [dict(text=text) for text in group[:12]] for kind, group in found.items()}


def numbers(rng, *shape, low=-1.0):
    """Nested lists of random numbers below 1."""
    if not shape:
        return round(rng.uniform(low, 1), 2) + 0.0      # not -0.0
    return [numbers(rng, *shape[1:], low=low) for _ in range(shape[0])]


def scan(rng, batch, L, d_inner, d_state, skip=True, state=True):
    return dict(u=numbers(rng, batch, L, d_inner), delta=numbers(rng, batch, L, d_inner, low=0.1),
                A=numbers(rng, d_inner, d_state, low=-2), B=numbers(rng, batch, L, d_state),
                C=numbers(rng, batch, L, d_state), D=numbers(rng, d_inner) if skip else None,
                initial_state=numbers(rng, batch, d_inner, d_state) if state else None)


def scan_and_gradients(rng, batch, L, d_inner, d_state, state=True):
    return scan(rng, batch, L, d_inner, d_state, state, state) | dict(
        dy=numbers(rng, batch, L, d_inner), dfinal=numbers(rng, batch, d_inner, d_state) if state else None)


def steps(rng, *shape):
    return dict(a=numbers(rng, *shape, low=0.1), b=numbers(rng, *shape))


def attention(rng, batch, tokens, n_heads, n_kv_heads, blocks):
    d = 4 * n_heads
    return dict(x=numbers(rng, batch, tokens, d), n_heads=n_heads, n_kv_heads=n_kv_heads, blocks=blocks,
                weights=[numbers(rng, d + 8 * n_kv_heads, d), numbers(rng, d, d)])


def sequences(rng, claim, tokens):
    return dict(claim=claim, ids=[[rng.randrange(30) for _ in range(tokens)] for _ in range(2)])


def dialogue(rng, n, samples, setup='retrieval', edit=lambda tokens: tokens):
    """Samples for a model to read from tapes (tests.Tape), with nonsense where the retriever is to write."""
    trace, prompts, tapes = data.cot_trace if setup == 'cot' else data.retrieval_trace, [], []
    for i in range(samples):
        edges = graph(rng, n, cyclic=i % 2 == 1)
        tokens, tape, read = data.sample(edges, True, 'direct')[:-1], [], 0
        prompts.append(tokens[:])
        written = edit([*trace(data.adjacency(edges, n)), data.EOS, rng.choice((data.TRUE, data.FALSE))])
        for t, token in enumerate(written, 1):
            retrieved = setup == 'retrieval' and tokens[-1] == data.END
            tape.append((rng.randrange(data.NODE) if retrieved else token) - read)
            tokens.append(data.retrieve(data.decode(tokens))[0][0] if retrieved else token)
            read += t * tokens[-1]
        tapes.append(tape)
    return dict(setup=setup, n=n, prompts=prompts, tapes=tapes)


def examples(number, seed):
    """The tests of an exercise: (name, its examples from small to large)."""
    rng = random.Random(f'{number} {seed}')
    if number in (1, 2):
        graphs = lambda *sizes, cyclic=False: [dict(edges=graph(rng, n, cyclic)) for n in sizes]
        tests = [('a small tree', graphs(3, 4, 5)), ('a small cycle', graphs(4, 5, 6, cyclic=True)),
                 ('larger trees', graphs(9, 16, 33)), ('larger cycles', graphs(9, 16, 33, cyclic=True))]
        path = [dict(edges=rng.sample([(v + 1, v) for v in range(3000)], 3000))]
        return tests + ([('a path of 3,001 nodes', path)] if number == 1 else [])
    if number == 3:
        small, large = queries(rng, 5), queries(rng, 24)
        return [(kind, small[kind] + large[kind]) for kind in small]
    inputs, pairs, gradients, attend, talk = (
        partial(draw, rng) for draw in (scan, steps, scan_and_gradients, attention, dialogue))
    underflow = pairs(1, 4, 1, 1) | dict(a=[[[[1e-170]], [[1e-180]], [[1e-190]], [[0.5]]]])
    malformed = lambda tokens: [data.EDGE if a == data.START else b for a, b in zip([None, *tokens], tokens)]
    endless = lambda tokens: [data.NODE + 1, data.END] * 250
    return {
        4: [('one channel, three tokens', [inputs(1, 3, 1, 1, skip=False, state=False)]),
            ('channels and states', [inputs(2, 5, 3, 4, skip=False, state=False)]),
            ('with D', [inputs(1, 1, 1, 1, state=False), inputs(2, 5, 3, 4, state=False)]),
            ('with an initial state', [inputs(1, 1, 1, 1, skip=False), inputs(2, 5, 3, 4)])],
        5: [('four tokens', [pairs(1, 4, 1, 1)]),
            ('any number of tokens', [pairs(1, L, 1, 1 + L % 2) for L in (1, 2, 3, 5, 6, 7, 21)]),
            ('decays that underflow', [underflow]), ('in parallel', [pairs(1, 1000, 1, 1)])],
        6: [('one channel, three tokens', [gradients(1, 3, 1, 1)]),
            ('channels and states', [gradients(1, 2, 2, 2), gradients(2, 4, 3, 2)]),
            ('several chunks', [gradients(1, 5, 1, 1), gradients(2, 11, 3, 2)]),
            ('None', [gradients(1, 1, 1, 1, state=False), gradients(2, 9, 3, 2, state=False)])],
        7: [('one parallel pass', [attend(1, 2, 1, 1, None), attend(2, 7, 2, 2, None)]),
            ('one token at a time', [attend(1, 2, 1, 1, [1, 1]), attend(2, 8, 2, 2, [5, 1, 1, 1])]),
            ('several tokens at a time', [attend(1, 3, 1, 1, [1, 2]), attend(2, 80, 2, 2, [2, 70, 8])]),
            ('grouped queries', [attend(1, 2, 2, 1, None), attend(2, 7, 4, 2, [3, 1, 3])])],
        8: [('chain of thought', [talk(4, 1, 'cot'), talk(5, 3, 'cot')]),
            ('queries', [talk(4, 1), talk(5, 1)]), ('several samples', [talk(4, 2), talk(5, 4)]),
            ('malformed queries', [talk(4, 2, edit=malformed)]),
            ('no end', [talk(4, 2, edit=endless), talk(4, 2, 'cot', endless)])],
        12: [(claim, [sequences(rng, claim, tokens) for tokens in (2, 9, 80)]) for claim in LAYER_CLAIMS],
    }.get(number, [])


def right_answer(number, example):
    """What our code answers; of a new layer, which we do not have, each claim must hold."""
    return {example['claim']: True} if number == 12 else answer(number, example)


# --- source code ------------------------------------------------------------------------------------------

def find(tree, name):
    """The definition of a function, of Class.method or of DICTIONARY.key; None if there is none."""
    for part in name.split('.'):
        if isinstance(tree, ast.Assign):
            pairs = [(getattr(key, 'value', None), value) for key, value in zip(
                getattr(tree.value, 'keys', ()), getattr(tree.value, 'values', ()))]
        else:
            pairs = [(name, node) for node in getattr(tree, 'body', ()) for name in defined(node)]
        tree = dict(pairs).get(part)
    return tree


def body(node):
    """First and last line, counted from 1, of a function's code without its docstring, or of a dictionary."""
    if isinstance(node, ast.Dict):
        return node.lineno, node.end_lineno
    return node.body[0].end_lineno + 1 if ast.get_docstring(node) else node.body[0].lineno, node.end_lineno


def blank(source, bodies):
    """Source code with other bodies, {function: body}, or other values in a dictionary. Docstrings stay."""
    lines, tree = source.split('\n'), ast.parse(source)
    for name, code in sorted(bodies.items(), key=lambda item: -find(tree, item[0]).lineno):
        node = find(tree, name)
        first, last = body(node)
        if isinstance(node, ast.Dict):
            for value in node.values:                   # each on its own line
                line = lines[value.lineno - 1]
                lines[value.lineno - 1] = line[:value.col_offset] + repr(code) + line[value.end_col_offset:]
        else:
            lines[first - 1:last] = [' ' * (node.col_offset + 4) + code]
    return '\n'.join(lines)


def transplant(ours, theirs, names):
    """Our source code with their versions of functions, below all that their file adds. Raises Failed."""
    tree, other, lines = ast.parse(ours), ast.parse(theirs), ours.split('\n')
    start = lambda node: min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))]) - 1
    code = lambda node: theirs.split('\n')[start(node):node.end_lineno]
    known = {name for node in tree.body for name in defined(node)}
    added = [line for node in other.body if defined(node) - known for line in code(node)]
    for name in sorted(names, key=lambda name: -find(tree, name).lineno):
        old, new = find(tree, name), find(other, name)
        if type(new) is not type(old):
            raise Failed(f'{name} is missing')
        if isinstance(old, ast.Dict):
            before = lines[old.lineno - 1][:old.col_offset]
            after = lines[old.end_lineno - 1][old.end_col_offset:]
            lines[old.lineno - 1:old.end_lineno] = [f'{before}{ast.unparse(new)}{after}']
        else:
            lines[start(old):old.end_lineno] = code(new)
    first = min(start(find(tree, name.split('.')[0])) for name in names)
    return '\n'.join([*lines[:first], *added, *lines[first:]])


def defined(node):
    """What a statement at the top of a file defines: names, or an import."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, 'module', '') != '__future__':
        return {ast.unparse(node)}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def copy_project(folder, without=()):
    """Copy our files, except those that match a pattern."""
    left_out = {path for pattern in ('test_all.py', *without) for path in PROJECT.glob(pattern)}
    for path in {path for pattern in FILES for path in PROJECT.glob(pattern) if path.is_file()} - left_out:
        (folder / path.relative_to(PROJECT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(PROJECT))
    shutil.copyfile(PROJECT / 'assignment' / 'tests.py', folder / 'test_assignment.py')


# --- the handout ------------------------------------------------------------------------------------------

def length(number):
    """About how many lines a solution takes: some more than ours without comments, rounded to fives."""
    source = (PROJECT / EXERCISES[number].file).read_text(encoding='utf-8')
    bodies = [body(find(ast.parse(source), name)) for name in EXERCISES[number].targets]
    lines = [line.strip() for first, last in bodies for line in source.split('\n')[first - 1:last]]
    return f"about {max(5, 5 * round(sum(line[:1] not in ('', '#') for line in lines) / 4.5))} lines"


def handout(folder, chosen, seed):
    """Write the students' folder. Raises ValueError if there is something in it already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is not an empty folder: choose another one')
    copy_project(folder, [what for k in chosen for what in EXERCISES[k].left_out if '.' in what])
    written, text = [], ''
    for k in chosen:
        e, where = EXERCISES[k], ''
        if e.targets:
            where = f'`{"` and `".join(e.targets)}` in `{e.file}`: {length(k)}. '
            todo, close = f'exercise {k}: {length(k)}', f'left out: it is too close to exercise {k}'
            bodies = {name: f'raise NotImplementedError({close!r})' for name in e.left_out if '.' not in name}
            bodies |= {name: todo if k == 3 else f'raise NotImplementedError({todo!r})' for name in e.targets}
            source = blank((folder / e.file).read_text(encoding='utf-8'), bodies)
            (folder / e.file).write_text(source, encoding='utf-8')
        tests = [(k, name, [(example, right_answer(k, example)) for example in group])
                 for name, group in examples(k, f'handout {seed}')]
        text += f'\n## Exercise {k}: {e.title} ({e.points} points)\n\n{where}About {e.minutes} minutes. '
        text += f'Prerequisites: {e.needs}.\n\n'
        text += textwrap.fill(' '.join(e.what.split()), 110, break_on_hyphens=False) + '\n'
        text += f'\n    {e.command}\n' if e.command else ''
        for _, _, [(example, expected), *_] in tests[:1]:
            name, value = next(iter(expected.items()))
            line_end = rf' \1\n{"":{len(name) + 2}}'           # after each answer of the retriever
            drawn = re.sub(r'(?<=ENDSEARCH\]) (\S+) (?=.)', line_end, table(example | {name: value}))
            text += f'\n```\n{drawn}\n```\n'
        written += tests
    (folder / 'expected.json').write_text(json.dumps(written))
    points, minutes = (sum(getattr(EXERCISES[k], name) for k in chosen) for name in ('points', 'minutes'))
    text = README.format(points=points, hours=round(minutes / 60), seconds=SECONDS, first=chosen[0]) + text
    (folder / 'README.md').write_text(text, encoding='utf-8')


# --- grading ----------------------------------------------------------------------------------------------

class Failed(Exception):
    """Why an exercise gets 0 points, in one line."""


def read(folder, file):
    """A file of a submission as source code. Raises Failed."""
    path = folder / file
    try:
        if not path.is_file():
            raise Failed(f'{file} is missing')
        if path.resolve() != folder.resolve() / file or path.stat().st_size > 10**6:
            raise Failed(f'{file} is a link, or larger than 1 MB')
        source = path.read_text(encoding='utf-8')
        ast.parse(source)
        return source
    except SyntaxError as error:
        raise Failed(f'{file} is not Python: {error.msg}, line {error.lineno}')
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise Failed(f'{file} cannot be read: {type(error).__name__}')


def run(folder, number, tried):
    """What a process in the folder answers to the examples. Raises Failed unless it answers all in time."""
    with tempfile.TemporaryFile('w+') as questions, tempfile.TemporaryFile() as answers:
        questions.writelines(json.dumps(example) + '\n' for example in tried)
        questions.seek(0)
        environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
        environment |= dict(SCAN_CUDA_BUILD='0', OMP_NUM_THREADS='1')
        process = subprocess.Popen(
            [sys.executable, '-B', 'test_assignment.py', f'{number}'], cwd=folder, env=environment,
            stdin=questions, stdout=answers, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f'not done after {SECONDS} seconds')
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError, AttributeError):  # what it has started; not on Windows
                os.killpg(process.pid, signal.SIGKILL)
        answers.seek(0)
        lines = answers.read(10**8).splitlines()
    if len(lines) != len(tried):
        raise Failed(f'ended (code {process.returncode}) after {len(lines)} of {len(tried)} examples')
    found = [dict(json.loads(line)) for line in lines]
    if set(found[0]) == {'error'} and all(one == found[0] for one in found):
        raise Failed(found[0]['error'])
    return found


def grade_exercise(folder, number, seed):
    """Returns the share of the tests that pass, and what to tell the student."""
    e, tests, passed, told, drawn = EXERCISES[number], examples(number, seed), 0, [], ''
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as copy:
        copy_project(Path(copy), KERNELS)
        path = Path(copy, e.file)
        code = transplant(path.read_text(encoding='utf-8'), read(folder, e.file), e.targets + e.adds)
        path.write_text(blank(code, {
            name: f"raise RuntimeError('{name} may not be called in exercise {number}')"
            for name in (*e.siblings, *e.left_out) if '.' not in name}), encoding='utf-8')
        found = iter(run(copy, number, [example for _, group in tests for example in group]))
    for name, group in tests:
        drawings = [difference(example, next(found), right_answer(number, example)) for example in group]
        smallest = next(filter(None, drawings), '')
        passed, drawn = passed + (not smallest), drawn or smallest
        told.append(f'{"failed" if smallest else "passed"}  {name}')
    return passed / len(tests), '\n'.join([*told, '', drawn]).strip()


def grade_experiment(folder, number, seed):
    """The same for an experiment, whose tests are the checkpoints."""
    (accuracy, allowed), passed, told, seen = EXPERIMENTS[number], 0, [], {None}
    setting = dict(task='istree', n=14, setup='cot', seed=f'{number} {seed}', samples=500)
    paths = sorted(folder.glob(f'out/{number}/*/checkpoint.pt'))
    if not paths:
        raise Failed(f'out/{number}/*/checkpoint.pt is missing')
    for path in paths[:3]:
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as copy:
                if not path.is_file() or path.stat().st_size > 10**8:
                    raise Failed('checkpoint.pt is not a file of at most 100 MB')
                copy_project(Path(copy))
                shutil.copyfile(path, Path(copy, 'checkpoint.pt'))
                found, = run(copy, number, [setting])
            good = found['accuracy'] >= accuracy and allowed(found) and found['weights'] not in seen
            seen.add(found['weights'])
            line = '{accuracy:.1%}, layers {layers}, {memory:,} floats of memory'.format(**found)
        except Failed as reason:
            good, line = False, reason
        passed += good
        told.append(f'{"passed" if good else "failed"}  {path.parent.name}: {line}')
    return passed / 3, '\n'.join(told)


def grade_question(folder, number, seed):
    """For the one who grades it by hand."""
    path = folder / 'answers.md'
    text = path.read_text(encoding='utf-8', errors='replace') if path.is_file() else 'answers.md is missing'
    return 0, f'{EXERCISES[number].points} points by hand.\n\n{text[:5000]}\n\nModel answer:{MODEL_ANSWER}'


def grade(folder, chosen, seed):
    """The tests of Gradescope's results.json, one per exercise. Raises nothing, whatever was handed in."""
    results = []
    for k in chosen:
        automatic = k in EXPERIMENTS or EXERCISES[k].file
        grader = grade_experiment if k in EXPERIMENTS else grade_exercise if automatic else grade_question
        try:
            share, told = grader(folder, k, seed)
        except Failed as reason:
            share, told = 0, f'{reason}'
        except Exception as error:      # whatever a student did, the others are still to be graded
            share, told = 0, f'cannot be graded: {type(error).__name__}'
        points = EXERCISES[k].points if automatic else 0
        results.append(dict(number=f'{k}', name=f'Exercise {k}: {EXERCISES[k].title}', output=told,
                            score=round(share * points, 2), max_score=points,
                            visibility='visible' if automatic else 'hidden'))
    return results


def main(argv):
    parser = argparse.ArgumentParser('test_all.py', description='For a class. Tests: pytest test_all.py')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in (('handout', 'make a folder for the students'), ('grade', 'grade what came back')):
        command = commands.add_parser(name, help=text)
        command.add_argument('folder', type=Path)
        command.add_argument('--exercises', default=','.join(map(str, EXERCISES)), help='numbers: 1,2,5')
        command.add_argument('--seed', help='of the examples (default: 0 in a handout, secret in grading)')
    command.add_argument('--json', action='store_true', help="print Gradescope's results.json")
    c = parser.parse_args(argv)
    if unknown := set(c.exercises.split(',')) - {*map(str, EXERCISES)}:
        raise ValueError(f'--exercises: {unknown.pop()!r} is none, choose from 1 to {max(EXERCISES)}')
    chosen = sorted({*map(int, c.exercises.split(','))})
    if c.command == 'handout':
        handout(c.folder, chosen, c.seed or 0)
        return print(f'{c.folder} is ready for the students; it begins with README.md. To grade what comes '
                     f'back:\n  python test_all.py grade DIR --exercises={c.exercises}')
    results = grade(c.folder, chosen, c.seed or secrets.token_hex(8))
    score, best = (round(sum(result[name] for result in results), 2) for name in ('score', 'max_score'))
    if c.json:
        return print(json.dumps(dict(score=score, tests=results), indent=1))
    for result in results:
        print('{name}: {score:g} of {max_score} points\n\n{output}\n'.format(**result))
    print(f'Total: {score:g} of {best} points')
