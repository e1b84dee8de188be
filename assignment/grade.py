"""The class assignment: hand it out, grade it.

  python test_all.py handout DIR [--exercises=1,2,5] [--seed=0]            a folder for students
  python test_all.py grade DIR [--exercises=1,2,5] [--seed=...] [--json]   what one handed in

A handout is made from the code: the chosen functions lose their bodies, and whatever else contains
a solution is left out. Of a submission, only these functions count, with the helpers and imports
that the student has added to the same file. They are put into a temporary copy of our project,
without the implementations that they might call instead. A process runs them there; it may not
write files, and not read any outside of the copy (tests.guard). What they return is compared here.
This stops accidents and ordinary cheating. Against malice, run the grader in a container, as
Gradescope does, and write the output of `--json` to /autograder/results/results.json.
"""
import argparse
import ast
import inspect
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from assignment.tests import LAYER_CLAIMS, answer, difference, show

PROJECT = Path(__file__).resolve().parent.parent
FILES = ('data.py', 'models.py', 'train.py', 'eval_hotpot.py', 'plot.py', 'scan_cuda/*.*',
         'requirements.txt', 'LICENSE', '.gitignore')
KERNELS = ('scan_cuda/*.cpp', 'scan_cuda/*.cu', 'scan_cuda/*.h')    # the scan in other languages
SCAN = 'scan_cuda/__init__.py'
SECONDS = 120                   # for an exercise, and for an experiment's checkpoint


class Exercise(NamedTuple):
    title: str
    points: int
    minutes: int                # an estimate; a language model took less than 1 for each of 1 to 8
    what: str
    file: str = ''
    target: str = ''            # to be written in it: function, Class.method or Class.attribute
    stub: str = ''              # what the handout has in its place
    siblings: tuple = ()        # functions that do the same: may not be called
    close: tuple = ()           # functions in it that hold the solution: not in the handout
    left_out: tuple = ()        # files that hold it
    extends: str = ''           # the dictionary to which a class of the student's is to be added
    needs: str = 'nothing'
    command: str = ''


EXERCISES = {
    1: Exercise('Depth-first search', 10, 20, '''
        Algorithm 1 of the paper: the chain of thought by which a model decides whether a graph is a
        tree. For the edges 2-0 1-0 2-1 the tour is 0 2 1. It ends there because the next neighbour,
        node 0, has been visited and is not the parent of 1. Nodes are strings: '0', not 0. Graphs
        may have 4,096 nodes, but Python allows only about 1,000 nested calls.''',
                file='data.py', target='cot_trace', close=('retrieval_trace',)),
    2: Exercise('The trace with queries', 15, 45, '''
        Algorithm 2 of the paper: the same search by a model that remembers nothing and asks for
        everything. Let v be the node that has been reached and prev the one before it in the tour.
        Write v and ask `v ~`, its parent. For the next neighbour w, ask `v -` if prev is the parent
        (or at the start), otherwise `v - prev`. If w is the parent, ask `v - parent` for the one
        after it. If the answer is [FAILED], no neighbour is left: return to the parent. Otherwise
        ask `w ~`. If w is node 0 or has a parent, there is a cycle: stop. If not, w is new: write
        the record `w ~ v` and go to w.''',
                file='data.py', target='retrieval_trace', needs='exercise 1, read or solved'),
    3: Exercise("The retriever's regular expressions", 10, 40, '''
        The whole retriever is three patterns. Each stands beside the form of the queries that it
        answers; V and W stand for the numbers in the query. The patterns of the other tasks, below
        the line, are examples. `search` applies a pattern to the text before the query. The answer
        is the group that matched; of several matches, the last one outside of queries counts. A
        pattern for an edge must therefore begin at the start of the text, and it must not leave the
        prompt, since the model may write another [BOS]. The neighbour may stand on either side of
        the dash. Beware of 1 inside 11.''',
                file='data.py', target='IsTree.patterns', stub=r'''patterns = (
        (r'(\d+) ~', 'exercise 3'),
        (r'(\d+) -', 'exercise 3'),
        (r'(\d+) - (\d+)', 'exercise 3'))'''),
    4: Exercise('The scan as a loop', 10, 20, '''
        The recurrence at the heart of Mamba, one token at a time.''',
                file=SCAN, target='selective_scan_reference',
                siblings=('pairwise_scan', 'selective_scan_fallback'), left_out=KERNELS),
    5: Exercise('The scan in pairs', 10, 40, '''
        Two steps h -> a h + b in a row are again such a step. This makes the scan parallel:
        about 2 log2(L) operations on long tensors instead of L on short ones. Do not
        divide: products of decays underflow.''',
                file=SCAN, target='pairwise_scan', siblings=('selective_scan_reference',),
                left_out=KERNELS, needs='exercise 4'),
    6: Exercise("The scan's backward pass", 15, 90, '''
        Compute the gradients of all inputs of `Fallback.forward` by hand. The gradient of the state
        obeys a recurrence that runs backwards in time. `forward` shows what has been saved. You may
        use `states_of_chunk`, which computes the states of a chunk. dstates holds the gradients
        that reach the saved states from outside. Usually only the last of them is not zero, but add
        them all. Autograd cannot be used.''',
                file=SCAN, target='Fallback.backward', left_out=KERNELS,
                needs='exercises 4 and 5'),
    7: Exercise("Attention's KV cache", 15, 45, '''
        One forward pass for training, for reading a prompt and for a single token: stepping through
        a text with the cache must give the same as one parallel pass. `rotate` gives queries and
        keys their positions; `LlamaLayer` shows where the cache comes from. You may use
        torch's scaled_dot_product_attention, but its is_causal aligns the mask to the top left:
        with a cache, the first of the L tokens would see only the first token in the cache.''',
                file='models.py', target='Attention.forward', left_out=('plot.py',)),
    8: Exercise('Generation with the live retriever', 15, 45, '''
        The model writes queries, the retriever writes the answers, and the samples of a batch end
        at different times. `task.retrieve(text)` answers the query at the end of a text,
        `model.prefill` and `model.step` return the logits of the next token and the state,
        `task.tokens` and `task.words` translate. No completion has more than `task.longest(n)`
        words. A query at the very end counts, though there is no room for the answer. The model of
        the tests writes nonsense once it has been fed a wrong token: look at the first difference
        only.''',
                file='train.py', target='generate', left_out=('eval_hotpot.py', 'plot.py'),
                needs='reading `Task` in data.py'),
    9: Exercise('Experiment: how much memory does n=14 need?', 15, 60, '''
        Train an RNN (up to four layers, none of them attention) that solves IsTree with chain of
        thought, with at most 5,000 floats of memory. Hand in the folders of three seeds as
        out/9/...; each must reach an accuracy of 75% on graphs that the grader draws. This one does
        not (three minutes a seed on one core):''',
                needs='exercises 1, 5, 6 and 8',
                command='python train.py --arch=mamba --d_state=1 --setup=cot --seed=0,1,2'),
    10: Exercise('Experiment: where should the attention layer stand?', 15, 60, '''
        One Mamba layer with d_state=1 and one attention layer: which should be on top? Try both,
        and hand in the folders of three seeds of the better one as out/10/...; each must reach an
        accuracy of 90% on graphs that the grader draws. This is one of the two (five minutes a seed
        on one core):''', needs='exercises 1, 5, 6, 7 and 8',
                 command='python train.py --arch=hybrid --layers=AM --setup=cot --seed=0,1,2'),
    11: Exercise('A question', 10, 30, '''
        With chain of thought, the RNN falls behind as n grows; with a retriever, it does not,
        although its memory is the same. Why? And why does one attention layer suffice, and why in
        only one of the two places? Write half a page in answers.md, with numbers of your own.''',
                 needs='exercises 9 and 10'),
    12: Exercise('A layer of your own', 15, 60, '''
        Write a recurrent layer that the project does not have, for example linear attention: its
        memory is a matrix to which k^T v is added for every token. Add a class to models.py and
        enter it in `LAYERS` under a new letter. The header of models.py says what a layer must
        have, `short_convolution` joins a key with the value that follows it, and `GRULayer` is the
        shortest example; two dozen lines suffice. Then train two such layers on associative recall.
        For linear attention under the letter L (a minute on one core; result.json has the accuracy
        at every n):''', file='models.py', extends='LAYERS', needs='reading models.py',
                 command='python train.py --task=recall --setup=direct --arch=mamba --layers=LL '
                         '--d_state=32 --samples=64000 --order=together --join=0'),
    13: Exercise('A Turing machine', 15, 45, '''
        A machine that adds 1. The tape holds a binary number, o for 0 and i for 1. The highest
        digit stands in cell 1 and is o. Add a class `Increment(Turing)` to data.py, with
        `letters = 'oi'` and a `table` like that of `Turing`, of four rows or more, which ends in
        [TRUE]. Also write the pattern by which the retriever answers a machine: the symbol that was
        last recorded for cell V or, if there is no record, the one in the prompt.''',
                 file='data.py', target='Turing.patterns',
                 stub="patterns = ((r'(\\d+)', 'exercise 13'),)",
                 needs='reading `Turing` in data.py, exercise 3'),
}
ACCURACY = {9: 0.75, 10: 0.90}      # that a model of an experiment must reach
MODEL_ANSWER = '''
The RNN must fill its fixed number of floats before it knows what will be asked. The search asks for
the next neighbour of any node, so at the end of the prompt the memory must hold all edges and their
order: about 57 bits at n=14, growing as n log n, in a form that training finds. When the RNN errs,
it errs on the next neighbour, not on the return to a parent, which stands a few tokens back. With a
retriever it need not remember the prompt: the node, where it came from and the last answer suffice
for every n. An attention layer keeps all tokens and looks them up. On top, it reads what the Mamba
layer has prepared, tokens mixed with their neighbours: an edge, three tokens, becomes one key.
Below, it sees bare tokens, and to find "the token two places after this one" would take a second
attention layer. Full marks: fixed against growing memory; what has to be looked up; a retriever
makes the task local; how edges become keys; numbers from three seeds.'''
LINEAR_ATTENTION = '''
class LinearAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, width = c, 3 * c.d_state
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.qkv_proj = nn.Linear(c.d_model, width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(width, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(width))
        self.out_proj = nn.Linear(c.d_state, c.d_model, bias=False)

    def init_weights(self):
        init_convolution(self)

    def init_state(self, batch_size):
        c, zeros = self.config, self.conv_bias.new_zeros
        return {'window': zeros(batch_size, c.d_conv - 1, 3 * c.d_state),
                'state': zeros(batch_size, c.d_state, c.d_state)}

    def forward(self, x, carried):
        qkv, window = short_convolution(self, self.qkv_proj(self.norm(x)), carried['window'])
        q, k, v = qkv.chunk(3, -1)                                          # (B, L, d_state) each
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        S = carried['state']                                                # (B, d_state, d_state)
        y = q @ S + (q @ k.mT).tril() @ v
        return x + self.out_proj(y), {'window': window, 'state': S + k.mT @ v}
'''
README = '''# Assignment: RNNs are not Transformers (yet)

The paper: [*RNNs are not Transformers (Yet)*](https://arxiv.org/abs/2402.18510) (Wen, Dang, Lyu,
ICLR 2025). {points} points, about {hours} hours; all times for students are estimates. Replace each
`raise NotImplementedError(...)` with code that does what the docstring says. You need neither a GPU
nor a C++ compiler: without its kernels, `scan_cuda` prints a line and uses PyTorch. Read the header
of `data.py` first.

    pip install -r requirements.txt
    python train.py --setup=direct --arch=mamba --layers=GG --n=8 --samples=2000
    pytest test_assignment.py
    pytest test_assignment.py -x -k exercise_{first}_

The first two commands show that everything is installed; the second takes less than a minute. The
other two test your work: all of it, or one exercise up to the first failure. A failed test draws
the smallest example that fails and marks the first difference >like this<. `B (2, 5, 4)` means
that B has this shape.

Hand in the whole folder. We grade these functions, with helpers and imports that you add to the
same files (outside of classes), on other examples; all tests of an exercise count the same.
While it is graded, your code has {seconds} seconds, can neither write files nor start programs, and
cannot call other implementations of the same thing. A prerequisite that is not part of the
assignment is solved already.
'''


# --- examples: what the functions are tried on ----------------------------------------------------

def graph(rng, n, ring=0):
    """The edges of a tree of n nodes; or, as many, of a graph with a ring of `ring` nodes."""
    edges = [(i, rng.randrange(i)) for i in range(max(1, ring), n - (ring > 0))]
    edges += [(i, (i + 1) % ring) for i in range(ring)]
    name = rng.sample(range(n), n)
    return rng.sample([(name[u], name[v]) for u, v in edges], n - 1)


def edges(rng, n, ring=0):
    return dict(edges=[f'{u}-{v}' for u, v in graph(rng, n, ring)])


QUERIES = {'the parent': r'~ \[ENDSEARCH\]$', 'the first neighbour': r'- \[ENDSEARCH\]$',
           'the next neighbour': r'- \d+ \[ENDSEARCH\]$'}
ELEVEN = ('[BOS] {b}{a} - {a} [EOS] {a} ~ 0 {b}{a} ~ {a} [STARTSEARCH] {a} ~ [ENDSEARCH]',
          '[BOS] {b}{a} - {b} 200 - {a}{b} 300 - {a} [EOS] 0 [STARTSEARCH] {a} - [ENDSEARCH]',
          '[BOS] 9{a} - {b}{a} {b}{b} - 9{a} 200 - 9{a} 99{a} - {b} 9{a} - {b} 59{a} - 0 '
          '300 - 9{a}1 400 - 9{a} [EOS] 0 [STARTSEARCH] 9{a} - {b} [ENDSEARCH]')
UNANSWERED = '[BOS] 3 - 1 [EOS] 3 [STARTSEARCH] {} [ENDSEARCH]'
NO_QUERIES = ('~', '-', '3', '3 ~ 1', '3 - 1 2', '- 1', '1 3', '3 - -', '3 - [EOS]', '24 -', '24 ~')


def asked(sample):
    """The texts of a sample that end in a query."""
    prompt, completion = sample
    text = ' '.join(prompt + completion).replace('*', '')
    return [text[:query.end()] for query in re.finditer(r'\[ENDSEARCH\]', text)]


def texts(rng):
    found = asked(data.IsTree(12, 'retrieval').write(graph(rng, 12), True))
    groups = {}
    for kind, pattern in QUERIES.items():
        groups[kind] = [text for text in found if re.search(pattern, text)]
    a, b = rng.sample(range(1, 10), 2)
    groups['1 inside 11'] = [text.format(a=a, b=b) for text in ELEVEN]
    groups['queries without an answer'] = [UNANSWERED.format(query) for query in NO_QUERIES]
    tests = {}
    for kind, group in groups.items():
        tests[kind] = [dict(text=text.split()) for text in group]
    return tests


def numbers(rng, *shape, low=-1, scale=1):
    """Nested lists of random numbers."""
    drawn = np.random.default_rng(rng.getrandbits(32)).uniform(low, 1, shape)
    return (np.round(drawn, 2) * scale + 0.0).tolist()          # (no -0.0)


def scan(rng, batch, L, d_inner, d_state, D=1, state=1):
    return dict(u=numbers(rng, batch, L, d_inner), delta=numbers(rng, batch, L, d_inner, low=0.1),
                A=numbers(rng, d_inner, d_state, low=0.1, scale=-2),
                B=numbers(rng, batch, L, d_state), C=numbers(rng, batch, L, d_state),
                D=numbers(rng, d_inner, scale=D),
                initial_state=numbers(rng, batch, d_inner, d_state, scale=state))


def steps(rng, L, d_state=1, decay=1):
    return dict(a=numbers(rng, 1, L, 1, d_state, low=0.1, scale=decay),
                b=numbers(rng, 1, L, 1, d_state))


def backward(rng, batch, L, d_inner, d_state, inside=0):
    """inside: scale of the gradients that reach the saved states; a chunk has 4 tokens."""
    inputs = scan(rng, batch, L, d_inner, d_state)
    del inputs['D']                     # (is not the fallback's)
    states = batch, 1 + (L + 3) // 4, d_inner, d_state
    return inputs | dict(dy=numbers(rng, batch, L, d_inner),
                         dstates=numbers(rng, *states, scale=inside))


def blocks(rng, n_heads, *lengths):
    return dict(n_heads=n_heads, blocks=lengths)


def dialogue(rng, n, samples, setup, change=list, other_memory=False):
    """Samples for a tests.Script. change: what is to be written instead of a completion."""
    task, prompts, script = data.IsTree(n, setup), [], []
    for i in range(samples):
        prompt, completion = task.write(graph(rng, n, 3 * (i % 2)), rng.random() < 0.5)
        prompts.append(prompt)
        script.append(change(completion))
    return dict(setup=setup, n=n, prompts=prompts, script=script, other_memory=other_memory)


def malformed(completion):
    """The first query begins with a dash and fails; then comes the end."""
    return [*completion[:2], *'- ~ [ENDSEARCH] *[FAILED] [EOS] [TRUE]'.split()]


def endless(completion):
    return ['1', '[ENDSEARCH]', '*[FAILED]'] * 200


def claim(rng, claim, length):
    return dict(claim=claim, length=length)


def machine(rng, n, letters='oi', query=None):
    """A binary number; or the text of a palindrome's trace up to a query."""
    half = rng.choices(letters, k=n)
    if query is None:
        return dict(tape=['o', *half])
    sample = data.Turing(2 * n, 'retrieval').write(half + half[::-1])
    return dict(text=asked(sample)[query].split())


# What makes the examples of an exercise, and for each of its tests the arguments, small to large.
TRACES = {'a small tree': [(3,), (4,), (5,)], 'a small cycle': [(4, 3), (5, 4)],
          'larger trees': [(9,), (33,)], 'larger cycles': [(9, 5), (33, 20)]}
TESTS = {
    1: (edges, TRACES | {'a cycle of 3,000 nodes': [(3001, 3000)]}),
    2: (edges, TRACES),
    4: (scan, {'one channel, three tokens': [(1, 3, 1, 1, 0, 0)],
               'channels and states': [(2, 5, 3, 4, 0, 0)],
               'with D': [(1, 1, 1, 1, 1, 0), (2, 5, 3, 4, 1, 0)],
               'with an initial state': [(1, 1, 1, 1, 0, 1), (2, 5, 3, 4)]}),
    5: (steps, {'four tokens': [(4,)],
                'any number of tokens': [(1, 2), (2,), (3, 2), (6,), (7,), (21, 2)],
                'decays that underflow': [(4, 1, 1e-180)],
                'in parallel': [(1000,)]}),
    6: (backward, {'one channel, three tokens': [(1, 3, 1, 1)],
                   'channels and states': [(1, 2, 2, 2), (2, 4, 3, 2)],
                   'several chunks': [(1, 5, 1, 1), (2, 11, 3, 2)],
                   'gradients of states': [(1, 1, 1, 1, 1), (2, 9, 3, 2, 1)]}),
    7: (blocks, {'one parallel pass': [(1, 2), (2, 7)],
                 'one token at a time': [(1, 1, 1), (2, 5, 1, 1, 1)],
                 'several tokens at a time': [(1, 1, 2), (2, 2, 70, 8)]}),
    8: (dialogue, {'chain of thought': [(4, 1, 'cot'), (5, 3, 'cot')],
                   'queries': [(4, 1, 'retrieval'), (5, 1, 'retrieval')],
                   'several samples': [(4, 2, 'retrieval'), (5, 4, 'retrieval')],
                   'malformed queries': [(4, 2, 'retrieval', malformed)],
                   'no end': [(4, 2, 'retrieval', endless), (4, 2, 'cot', endless)],
                   'another memory': [(4, 2, 'cot', list, True)]}),
    12: (claim, {claim: [(claim, 2), (claim, 9), (claim, 80)] for claim in LAYER_CLAIMS}),
    13: (machine, {'adding 1': [(1,), (3,), (16,)],
                   'a carry into the first cell': [(1, 'i'), (5, 'i')],
                   # never written, erased; cell 2 after a record of cell 12, erased
                   'what a cell holds': [(2, 'gh', 0), (2, 'gh', 8), (6, 'bcde', 25),
                                         (6, 'bcde', 35)]}),
}


def examples(number, seed):
    """The tests of an exercise: {name: examples}."""
    rng = random.Random(f'{number} {seed}')
    if number == 3:
        return texts(rng)
    make, arguments = TESTS.get(number, (None, {}))
    tests = {}
    for name in arguments:
        tests[name] = [make(rng, *values) for values in arguments[name]]
    return tests


def right_answer(number, example):
    """What our code answers, where we have some. Each claim about a new layer must hold."""
    if number == 12:
        return {example['claim']: True}
    if 'tape' in example:               # the last o becomes i, and what follows becomes o
        start, _, carried = ''.join(example['tape']).rpartition('o')
        return {'result': [*start, 'i', *carried.replace('i', 'o'), '_']}
    return answer(number, example)


# --- source code ----------------------------------------------------------------------------------

def defined(node):
    """The names that a statement defines."""
    if hasattr(node, 'name'):                                           # a function, a class
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.alias):                                 # of an import
            names.add(part.asname or part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
    return names


def find(tree, name):
    """The statement that defines a function, a Class.method or a Class.attribute, or None."""
    for part in name.split('.'):
        inside = reversed(getattr(tree, 'body', ()))
        tree = next((node for node in inside if part in defined(node)), None)
    return tree


def body(lines, node):
    """The solution that a statement holds: a function's code below the docstring, or an assignment
    with the comment above it. Returns its first and last line, counted from 1, and its column."""
    if isinstance(node, ast.FunctionDef):
        docstring = node.body[0]
        return docstring.end_lineno + 1, node.end_lineno, docstring.col_offset
    first = node.lineno
    while lines[first - 2].strip().startswith('#'):
        first -= 1
    return first, node.end_lineno, node.col_offset


def blank(source, solutions):
    """Source code with other solutions: {name: code}."""
    lines = source.split('\n')
    for name, code in solutions.items():
        first, last, column = body(lines, find(ast.parse('\n'.join(lines)), name))
        lines[first - 1:last] = [' ' * column + code]
    return '\n'.join(lines)


def transplant(ours, theirs, target, extends):
    """Our source code. Below it: the target as their file defines it, whatever their file adds, and
    what it does to the dictionary `extends`. Their file is a syntax tree. Raises Failed."""
    tree = ast.parse(ours)
    known = {'annotations'}.union(*map(defined, tree.body))     # (of __future__: belongs on top)
    for node in theirs.body:
        names = defined(node)
        registers = extends and extends in ast.unparse(node) and not hasattr(node, 'name')
        if target in names or names - known or registers:
            tree.body.append(node)
    solution = find(theirs, target)
    if target and solution is None:
        raise Failed(f'{target} is missing')
    if '.' in target:                   # of a class of ours
        tree.body += [solution, *ast.parse(f'{target} = {target.split(".")[1]}').body]
    return ast.unparse(tree)


def copy_project(folder, without=()):
    """Copy our files, except those that match a pattern."""
    (folder / 'scan_cuda').mkdir()
    for pattern in FILES:
        for path in PROJECT.glob(pattern):
            name = path.relative_to(PROJECT)
            if not any(map(name.match, without)):
                shutil.copyfile(path, folder / name)
    shutil.copyfile(PROJECT / 'assignment/tests.py', folder / 'test_assignment.py')


# --- the handout ----------------------------------------------------------------------------------

def take_out(folder, number):
    """Leave the solution of an exercise out of a copy of the project. Returns what README.md says
    about it."""
    e = EXERCISES[number]
    ours = (PROJECT / e.file).read_text(encoding='utf-8')
    first, last, _ = body(ours.split('\n'), find(ast.parse(ours), e.target))
    lines = f'about {5 * (1 + (last - first) // 5)} lines'
    instead = {e.target: e.stub or f"raise NotImplementedError('exercise {number}: {lines}')"}
    for name in e.close:
        instead[name] = f"raise NotImplementedError('left out: too close to exercise {number}')"
    path = folder / e.file
    path.write_text(blank(path.read_text(encoding='utf-8'), instead), encoding='utf-8')
    return f'`{e.target}` in `{e.file}`: {lines}. '


def describe(number, where, tests):
    """The section of an exercise in README.md, with the smallest example of its first test."""
    e = EXERCISES[number]
    text = (f'\n## Exercise {number}: {e.title} ({e.points} points)\n\n{where}'
            f'About {e.minutes} minutes. Prerequisites: {e.needs}.\n\n{inspect.cleandoc(e.what)}\n')
    if e.command:
        text += f'\n    {e.command}\n'
    if e.target:
        _, answered = next(iter(tests.values()))
        example, expected = answered[0]
        drawn = '\n'.join(show(example | expected))
        drawn = drawn.replace(' [STARTSEARCH]', f'\n{"":22}[STARTSEARCH]')
        text += f'\n```\n{drawn}\n```\n'
    return text


def handout(folder, chosen, seed):
    """Write the students' folder. Raises ValueError if there is something in it already."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f'{folder} is not an empty folder: choose another one')
    copy_project(folder, [pattern for k in chosen for pattern in EXERCISES[k].left_out])
    written, sections, points, minutes = {}, '', 0, 0
    for k in chosen:
        e, tests = EXERCISES[k], {}
        points += e.points
        minutes += e.minutes
        where = take_out(folder, k) if e.target else ''
        for name, group in examples(k, f'handout {seed}').items():
            tests[f'exercise_{k}_{name}'] = k, [(example, right_answer(k, example))
                                                for example in group]
        sections += describe(k, where, tests)
        written |= tests
    (folder / 'expected.json').write_text(json.dumps(written))
    text = README.format(points=points, hours=round(minutes / 60), first=chosen[0], seconds=SECONDS)
    (folder / 'README.md').write_text(text + sections, encoding='utf-8')


# --- grading --------------------------------------------------------------------------------------

class Failed(Exception):
    """Why an exercise gets 0 points, in one line."""


def read(folder, file):
    """A file of a submission as a syntax tree, whatever its encoding. Raises Failed, and what
    ast.parse raises."""
    path = folder / file
    if not path.is_file():
        raise Failed(f'{file} is missing')
    if path.resolve() != folder.resolve() / file or path.stat().st_size > 1_000_000:
        raise Failed(f'{file} is a link, or larger than 1 MB')
    return ast.parse(path.read_bytes(), file)


def run(folder, number, tried):
    """What a process in the folder answers to the examples. It finds the packages that we find.
    Raises Failed unless it answers all in time."""
    packages = [path for path in sys.path if Path(path).resolve() != PROJECT]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(packages), SCAN_CUDA_BUILD='0',
                       OMP_NUM_THREADS='1')
    try:
        process = subprocess.run(
            [sys.executable, '-B', 'test_assignment.py', str(number)], cwd=folder, text=True,
            input='\n'.join(map(json.dumps, tried)), timeout=SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    except subprocess.TimeoutExpired:
        raise Failed(f'not done after {SECONDS} seconds')
    found = [dict(json.loads(line)) for line in process.stdout.splitlines()]
    if len(found) != len(tried):
        raise Failed(f'ended (code {process.returncode}) after {len(found)} of {len(tried)} '
                     'examples')
    if 'error' in found[0] and found.count(found[0]) == len(tried):
        raise Failed(found[0]['error'])
    return found


def grade_exercise(folder, number, seed):
    """The share of the tests that pass, and what to tell the student."""
    e, tests = EXERCISES[number], examples(number, seed)
    refused = {name: f'raise RuntimeError("{name} may not be called in exercise {number}")'
               for name in e.siblings + e.close}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as copy:
        copy_project(Path(copy), KERNELS)
        path = Path(copy, e.file)
        source = blank(path.read_text(encoding='utf-8'), refused)
        source = transplant(source, read(folder, e.file), e.target, e.extends)
        path.write_text(source, encoding='utf-8')
        found = iter(run(copy, number, sum(tests.values(), [])))
    passed, told, drawn = 0, [], []
    for name, group in tests.items():
        drawings = [difference(example, next(found), right_answer(number, example))
                    for example in group]
        passed += not any(drawings)
        told.append(f'{"failed" if any(drawings) else "passed"}  {name}')
        drawn += filter(None, drawings)
    return passed / len(tests), '\n'.join([*told, '', *drawn[:1]]).strip()


def grade_experiment(folder, number, seed):
    """The same for an experiment: each of three checkpoints is a test."""
    paths = sorted(folder.glob(f'out/{number}/*/checkpoint.pt'))
    if not paths:
        raise Failed(f'out/{number}/*/checkpoint.pt is missing')
    passed, told, seen = 0, [], set()
    for path in paths[:3]:
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as copy:
                copy_project(Path(copy))
                shutil.copyfile(path, Path(copy, 'checkpoint.pt'))
                [found] = run(copy, number, [dict(seed=f'{number} {seed}')])
            line = '{accuracy:.1%}, layers {layers}, {memory:,} floats of memory'.format(**found)
            good = (found['accuracy'] >= ACCURACY[number] and allowed(number, found)
                    and found['weights'] not in seen)                       # not one seed twice
            seen.add(found['weights'])
        except Failed as reason:
            good, line = False, str(reason)
        passed += good
        told.append(f'{"passed" if good else "failed"}  {path.parent.name}: {line}')
    return passed / 3, '\n'.join(told)


def allowed(number, found):
    """Is this the kind of model that the experiment asks for?"""
    layers = found['layers']
    if number == 9:
        return len(layers) <= 4 and 'A' not in layers and found['memory'] <= 5000
    return layers in ('AM', 'MA') and found['d_state'] == 1


def grade_question(folder, number, seed):
    """What helps to grade it by hand."""
    text = (folder / 'answers.md').read_text(encoding='utf-8', errors='replace')[:5000]
    return 0, f'{EXERCISES[number].points} points by hand.\n\n{text}\n\nModel answer:{MODEL_ANSWER}'


GRADERS = {9: grade_experiment, 10: grade_experiment, 11: grade_question}


def grade(folder, chosen, seed):
    """The tests of Gradescope's results.json, one per exercise. Raises nothing, whatever the
    submission holds."""
    results = []
    for k in chosen:
        try:
            share, told = GRADERS.get(k, grade_exercise)(folder, k, seed)
        except Failed as reason:
            share, told = 0, str(reason)
        except Exception as error:      # whatever a student did, the others are still to be graded
            share, told = 0, f'cannot be graded: {type(error).__name__}: {error}'
        points = 0 if k == 11 else EXERCISES[k].points          # 11: by hand
        results.append(dict(name=f'Exercise {k}: {EXERCISES[k].title}', output=told,
                            score=round(share * points, 2), max_score=points,
                            visibility='hidden' if k == 11 else 'visible'))
    return results


def main(argv):
    parser = argparse.ArgumentParser('test_all.py', epilog='To run the tests: pytest test_all.py')
    parser.add_argument('command', choices=('handout', 'grade'),
                        help='make a folder for the students, or grade what came back')
    parser.add_argument('folder', type=Path)
    parser.add_argument('--exercises', default=','.join(map(str, EXERCISES)), help='such as 1,2,5')
    parser.add_argument('--seed', help='of the examples (default: 0; secret in grading)')
    parser.add_argument('--json', action='store_true', help="print Gradescope's results.json")
    c = parser.parse_args(argv)
    asked = c.exercises.split(',')
    chosen = [k for k in EXERCISES if str(k) in asked]
    if len(chosen) < len(asked):
        raise ValueError(f'--exercises={c.exercises}: choose from 1 to {max(EXERCISES)}, each once')
    if c.command == 'handout':
        handout(c.folder, chosen, c.seed or 0)
        return print(f'{c.folder} is ready for the students; it begins with README.md. To grade:\n'
                     f'  python test_all.py grade DIR --exercises={c.exercises}')
    results = grade(c.folder, chosen, c.seed or secrets.token_hex(8))
    if c.json:
        return print(json.dumps(dict(tests=results)))
    score = points = 0
    for result in results:
        print('{name}: {score:g} of {max_score} points\n\n{output}\n'.format(**result))
        score += result['score']
        points += result['max_score']
    print(f'Total: {score:g} of {points} points')
