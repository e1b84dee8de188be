"""The class assignment: hand it out, grade it.

  python test_all.py handout DIR [--exercises=1,2,5] [--seed=0]          a folder for the students
  python test_all.py grade DIR [--exercises=1,2,5] [--seed=...] [--json]   a student's folder

Handouts are made from the code: the chosen functions lose their bodies, and what else holds a solution is left out.
Of a submission only these functions count, with the helper functions and imports that the same file adds to ours.
They are put into our copy of the project, in a temporary folder and without the implementations that they might
call instead, and run there in a process of their own; what it returns is compared here. The process may neither
write nor read elsewhere (test_assignment.guard). That stops mistakes and ordinary cheating; whoever expects malice
lets the grader run in a container, as Gradescope does, where `--json` goes to /autograder/results/results.json.
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
from pathlib import Path
from typing import NamedTuple

import data
from assignment.test_assignment import answer, difference

HERE = Path(__file__).parent
PROJECT = HERE.parent
FILES = ('*.py', 'scan_cuda/*', 'requirements.txt', 'LICENSE', '.gitignore')
SCAN = 'scan_cuda/__init__.py'
FALLBACK = tuple((SCAN, name) for name in ('_scan', '_fallback_forward', '_fallback_backward', 'selective_scan_fallback'))
KERNELS = ('scan_cuda/*.cpp', 'scan_cuda/*.cu', 'scan_cuda/*.h')        # the same functions in another language


class Exercise(NamedTuple):
    title: str
    points: int
    minutes: int
    what: str
    targets: tuple = ()         # (file, function) to be written
    siblings: tuple = ()        # (file, function) that does the same: not there while the exercise is graded
    left_out: tuple = ()        # files and (file, function) that hold the solution: not in the handout
    needs: str = 'nothing'
    command: str = ''


EXERCISES = {
    1: Exercise('Depth-first search', 10, 20,
                'Algorithm 1 of the paper: the chain of thought by which a model decides whether a graph is a tree. '
                'Graphs may have 4,096 nodes, whereas Python allows about 1,000 nested calls.',
                (('data.py', 'cot_trace'),), left_out=(('data.py', 'retrieval_trace'),)),
    2: Exercise('The trace with queries', 15, 45,
                'Algorithm 2: the same search by a model that remembers nothing and asks for everything. For the node v '
                'on top of the stack, reached from prev: write v and ask `v ~`, its parent. Ask `v -` when coming from '
                'the parent (or at the start), otherwise `v - prev`: the next neighbour w. If w is the parent, ask '
                '`v - parent` instead. [FAILED] means that none is left: go back. Otherwise ask `w ~`: if that fails, w '
                'is new, so record `w ~ v` and enter w, unless w is node 0, which has no parent but has been visited. '
                'A visited w closes a cycle: stop. The header of data.py draws an example.',
                (('data.py', 'retrieval_trace'),), needs='reading exercise 1'),
    3: Exercise("The retriever's regular expressions", 10, 40,
                'Three patterns are the whole retriever. The text is the context before the query; the answer is the '
                'group that matched. Of several matches the last one outside queries counts, so a pattern that must '
                'find the first edge has to begin at [BOS]. Beware of 1 inside 11, and of edges whose parts belong to '
                'two different edges: in `3 - 7 4 - 1` there is no edge `7 4`.',
                (('data.py', 'query_pattern'),)),
    4: Exercise('The scan as a loop', 10, 20,
                'The recurrence at the heart of Mamba, one token after the other. Compute in float32 at least.',
                ((SCAN, 'selective_scan_reference'),), FALLBACK, KERNELS),
    5: Exercise('The scan in pairs', 10, 40,
                'Two steps h -> a h + b of the recurrence are again one such step. That makes the scan parallel: '
                'about 2 log2(L) operations on long tensors instead of L on short ones. Never divide: products of '
                'decays underflow.',
                ((SCAN, '_scan'),), ((SCAN, 'selective_scan_reference'),), KERNELS, 'exercise 4'),
    6: Exercise("The scan's backward pass", 15, 90,
                'The gradients of all inputs by hand: the gradient of the state obeys a recurrence that runs backwards '
                'in time. torch.autograd is not available here.',
                ((SCAN, '_fallback_backward'),), (), KERNELS, 'exercises 4 and 5'),
    7: Exercise("Attention's KV cache", 15, 45,
                'One forward pass for training, for reading a prompt and for a single token: stepping through a text '
                'with the cache must give what one parallel pass gives. Use `rotate` and '
                'torch.nn.functional.scaled_dot_product_attention; its is_causal is of no use once there is a cache.',
                (('models.py', 'Attention.forward'), ('models.py', 'KVCache.append')), (), ('plot.py',)),
    8: Exercise('Generation with the live retriever', 15, 45,
                'The model writes queries, the retriever writes the answers. Samples of a batch end at different '
                'times. `task.retrieve(text)` answers the query at the end of a text; `model.prefill` and `model.step` '
                'give the logits of the next token.',
                (('train.py', 'generate'),), (), ('eval_hotpot.py', 'plot.py'), 'reading data.retrieve'),
    9: Exercise('Experiment: how much memory does n=16 need?', 15, 60,
                'An RNN (layers M, D or G, at most four, none of them A) that solves IsTree with chain of thought. Hand '
                'in three seeds, accuracy at least 75% on graphs that the grader draws, at most 5,000 floats of '
                'memory.', needs='exercises 1, 5 and 8, where they are part of the assignment',
                command='python train.py --archs=mamba --layers=MM --d_state=1 --setups=cot --seeds=0,1,2 --out=out/ex9'),
    10: Exercise('Experiment: where should the attention layer stand?', 15, 60,
                 'One Mamba and one attention layer, d_state 1: below or on top? Try both, hand in three seeds of the '
                 'better one, accuracy at least 90%.',
                 needs='exercises 1, 5, 7 and 8, where they are part of the assignment',
                 command='python train.py --archs=hybrid --layers=MA --setups=cot --seeds=0,1,2 --out=out/ex10'),
    11: Exercise('A question', 10, 30,
                 'Write answers.md, half a page: with chain of thought the RNN falls behind as n grows, with a '
                 'retriever it does not, although its memory is the same. Why? And why is one attention layer enough, '
                 'and better in one of the two places? Support your answer with numbers from your experiments.'),
}
MODEL_ANSWER = '''The RNN's memory is a fixed number of floats, written before it knows what it will be asked. A search asks
for the next neighbour of any node in any order, so by the end of the prompt all edges and their order (about 70 bits
at n=16, growing as n log n) must be in there, in a form that training finds; where it errs, it errs on the next neighbour
and not on returns to the parent, which stand a few tokens back. With a retriever the prompt need not be remembered:
a few tokens of state (which node, from where, which answer) suffice at every n, and those the trace repeats. One attention
layer keeps all tokens and is the look-up. On top it works on what the Mamba layer has prepared: each token mixed with
its neighbours, so that an edge, three tokens, becomes one key. Below, it sees bare tokens: 'the node two tokens
after this one' takes two steps of attention, and one layer has only one. Full marks: fixed against growing memory; what must
be looked up; the retriever turns recall into a local step; composition of edges; numbers over three seeds.'''
EXPERIMENTS = {9: (0.75, lambda m: set(m['layers']) <= set('MDG') and m['memory'] <= 5000),
               10: (0.90, lambda m: sorted(m['layers']) == ['A', 'M'] and m['d_state'] == 1)}
SECONDS = 60                    # an exercise may take, an experiment's evaluation three times as long


# --- examples: name -> list, from small to large ----------------------------------------------------------

def graph(rng, n, cyclic=False):
    """Edges of a tree, or of a graph with as many that has a cycle."""
    ring = rng.randrange(3, n) if cyclic else 0
    edges = [(i, (i + 1) % ring) for i in range(ring)]
    edges += [(i, rng.randrange(i)) for i in range(max(1, ring), n - bool(ring))]
    name = rng.sample(range(n), n)
    edges = [(max(name[u], name[v]), min(name[u], name[v])) for u, v in edges]
    return rng.sample(edges, len(edges))


def prompt_of(edges):
    return data.sample(edges, True, 'direct')[:-1]


def query_texts(rng, n, malformed=False):
    """Kind of query -> texts that end in one."""
    edges = graph(rng, n)
    tokens = prompt_of(edges) + data.retrieval_trace(data.adjacency(edges, n))
    texts = {'parent': [], 'first neighbour': [], 'next neighbour': []}
    for end in [i + 1 for i, token in enumerate(tokens) if token == data.END]:
        text = data.decode(tokens[:end])
        query = text[text.rindex('[STARTSEARCH]'):].split()[1:-1]
        texts['parent' if '~' in query else f'{("first", "next")[len(query) - 2]} neighbour'].append(dict(text=text))
    start = text[:text.rindex('[STARTSEARCH]')]
    for query in ('~', '-', f'{n - 1}', '3 ~ 1', '3 - 1 2', '- 1', '1 3', '3 - -', '3 - [EOS]', f'{n + 7} -', f'{n + 7} ~'):
        texts.setdefault('malformed', []).append(dict(text=f'{start}[STARTSEARCH] {query} [ENDSEARCH]'))
    return {kind: rng.sample(found, min(6, len(found))) for kind, found in texts.items()}


def random_list(rng, *shape, low=-1.0, high=1.0):
    if not shape:
        return round(rng.uniform(low, high), 2)
    return [random_list(rng, *shape[1:], low=low, high=high) for _ in range(shape[0])]


def scan_inputs(rng, batch, L, d_inner, d_state, skip=True, state=True, strong=1):
    draw = lambda *shape, **limits: random_list(rng, *shape, **limits)
    return dict(u=draw(batch, L, d_inner), delta=draw(batch, L, d_inner, low=0.1, high=strong),
                A=draw(d_inner, d_state, low=-2 * strong, high=-0.1), B=draw(batch, L, d_state), C=draw(batch, L, d_state),
                D=draw(d_inner) if skip else None, initial_state=draw(batch, d_inner, d_state) if state else None)


def dialogue(rng, n, samples, setup='retrieval', edit=lambda tokens: tokens):
    """Samples for a model to write that reads from a tape (test_assignment.Tape). Where the retriever is to write, the
    tape holds nonsense."""
    trace, prompts, tapes = data.cot_trace if setup == 'cot' else data.retrieval_trace, [], []
    for i in range(samples):
        edges = graph(rng, n, cyclic=i % 2 == 1)
        prompts.append(prompt_of(edges))
        tokens, tape, read = prompt_of(edges), [], 0
        written = edit([*trace(data.adjacency(edges, n)), data.EOS, rng.choice((data.TRUE, data.FALSE))])
        for t, token in enumerate(written, 1):
            retrieved = setup == 'retrieval' and tokens[-1] == data.END
            tape.append((rng.randrange(data.NODE) if retrieved else token) - read)
            tokens.append(data.retrieve(data.decode(tokens))[0][0] if retrieved else token)
            read += t * tokens[-1]
        tapes.append(tape)
    return dict(setup=setup, n=n, prompts=prompts, tapes=tapes)


def examples(number, seed):
    """(name, examples from small to large) of each test of an exercise."""
    rng = random.Random(f'{number} {seed}')
    graphs = lambda sizes, **options: [dict(edges=graph(rng, n, **options)) for n in sizes]
    if number == 1:
        path = [(v + 1, v) for v in range(3000)]
        return [('a tree of four or five nodes', graphs((4, 4, 5, 5))), ('a cycle', graphs((4, 5, 5, 6), cyclic=True)),
                ('larger trees', graphs((9, 16, 33))), ('larger graphs with a cycle', graphs((9, 16, 33), cyclic=True)),
                ('a path of 3,001 nodes', [dict(edges=rng.sample(path, 3000))])]
    if number == 2:
        return [('a tree of four or five nodes', graphs((4, 4, 5, 5))), ('a cycle', graphs((4, 5, 5, 6), cyclic=True)),
                ('larger trees', graphs((9, 16, 33))), ('larger graphs with a cycle', graphs((9, 16, 33), cyclic=True))]
    if number == 3:
        small, large = query_texts(rng, 5), query_texts(rng, 24)
        return [(kind, small[kind] + large[kind]) for kind in small]
    if number == 4:
        return [('one channel, three tokens', [scan_inputs(rng, 1, 3, 1, 1, skip=False, state=False)]),
                ('channels and states', [scan_inputs(rng, 2, 5, 3, 4, skip=False, state=False)]),
                ('with D', [scan_inputs(rng, 2, 5, 3, 4, state=False)]),
                ('with an initial state', [scan_inputs(rng, 1, 1, 1, 2), scan_inputs(rng, 2, 5, 3, 4)])]
    if number == 5:
        pair = lambda L, *shape, **limits: dict(a=random_list(rng, 1, L, *shape, low=0.1), b=random_list(rng, 1, L, *shape))
        vanishing = pair(64, 1, 1)
        vanishing['a'] = [[[[10.0 ** -rng.randrange(8, 30)]] for _ in range(64)]]
        return [('four tokens', [pair(4, 1, 1)]), ('any number of tokens', [pair(L, 1, 2) for L in (1, 2, 3, 5, 6, 7, 21)]),
                ('decays that underflow', [vanishing]), ('parallel', [pair(1000, 1, 1)])]
    if number == 6:
        def gradients(*shape, **options):
            inputs = scan_inputs(rng, *shape, **options)
            dy, dstate = inputs['u'], random_list(rng, shape[0], *shape[2:])
            return inputs | dict(u=random_list(rng, *shape[:3]), gradient=[dy, dstate])
        return [('one channel, three tokens', [gradients(1, 3, 1, 1)]), ('channels and states', [gradients(2, 4, 3, 2)]),
                ('several chunks', [gradients(1, 9, 1, 1), gradients(2, 11, 3, 2)])]
    if number == 7:
        def case(heads, kv_heads, tokens, blocks, batch=1):
            weights = random_list(rng, 4 * (heads + 2 * kv_heads), 4 * heads), random_list(rng, 4 * heads, 4 * heads)
            x = random_list(rng, batch, tokens, 4 * heads)
            return dict(n_heads=heads, n_kv_heads=kv_heads, weights=weights, x=x, blocks=blocks)
        return [('one parallel pass', [case(1, 1, 3, None), case(2, 2, 7, None, 2)]),
                ('a token at a time', [case(1, 1, 3, [1, 1, 1]), case(2, 2, 9, [5, 1, 1, 1, 1], 2)]),
                ('several tokens at a time', [case(1, 1, 5, [2, 3]), case(2, 2, 80, [2, 70, 8], 2)]),
                ('grouped queries', [case(4, 2, 7, None), case(4, 2, 7, [3, 1, 3], 2)])]
    if number == 8:
        malformed = lambda tokens: [data.EDGE if a == data.START else b for a, b in zip([None, *tokens], tokens)]
        endless = lambda tokens: [data.NODE + 1] * 500
        return [('chain of thought', [dialogue(rng, 4, 1, 'cot'), dialogue(rng, 5, 3, 'cot')]),
                ('queries', [dialogue(rng, 4, 1), dialogue(rng, 5, 1)]), ('several samples', [dialogue(rng, 5, 4)]),
                ('malformed queries', [dialogue(rng, 4, 2, edit=malformed)]),
                ('no end', [dialogue(rng, 4, 2, edit=endless), dialogue(rng, 4, 2, 'cot', endless)])]
    setting = dict(task='istree', n=16, setup='cot', seed=rng.randrange(2**30), samples=500)
    return [(f'run {i}', [setting]) for i in range(1, 4)] if number in EXPERIMENTS else []


# --- source code ------------------------------------------------------------------------------------------

def find(tree, name):
    """The definition of a function; of a method by Class.method."""
    for part in name.split('.'):
        tree = next((node for node in tree.body if getattr(node, 'name', None) == part), None)
        if tree is None:
            return None
    return tree


def body(node):
    """First and last line of a function's code, below its docstring (lines count from 1)."""
    documented = ast.get_docstring(node) is not None
    first = node.body[0].end_lineno + 1 if documented else node.body[0].lineno
    return first, node.end_lineno


def blank(source, messages):
    """Source code with other bodies, {function: line}. Docstrings stay, without the patterns that they quote."""
    lines, tree = source.splitlines(), ast.parse(source)
    for name, line in sorted(messages.items(), key=lambda item: -find(tree, item[0]).lineno):
        node = find(tree, name)
        first, last = body(node)
        lines[first - 1:last] = [' ' * (node.col_offset + 4) + line]
        for i in range(node.lineno - 1, first - 1):
            lines[i] = re.sub(r'(?<=  )\S+(?: \S+)*\\\S+(?: \S+)*', '...', lines[i])
    return '\n'.join(lines) + '\n'


def transplant(ours, theirs, names):
    """Our source code with their versions of the functions, and above these what their file imports or defines at the
    top in addition. Raises Failed."""
    tree, other, lines = ast.parse(ours), ast.parse(theirs), ours.splitlines()
    start = lambda node: min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))]) - 1
    text = lambda node: theirs.splitlines()[start(node):node.end_lineno]
    known = {name for node in tree.body for name in bound(node)}
    added = [line for node in other.body if bound(node) - known for line in text(node)]
    for name in sorted(names, key=lambda name: -find(tree, name).lineno):
        if not isinstance(find(other, name), ast.FunctionDef):
            raise Failed(f'the function {name} is missing')
        lines[start(find(tree, name)):find(tree, name).end_lineno] = text(find(other, name))
    first = min(start(find(tree, name.split('.')[0])) for name in names)
    return '\n'.join([*lines[:first], *added, *lines[first:]]) + '\n'


def bound(node):
    """What a statement at the top of a file defines: names, or the import itself."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and node.module != '__future__':
        return {ast.unparse(node)}
    targets = node.targets if isinstance(node, ast.Assign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}



def rewrite(functions, folder):
    """{(file, function): line} -> in the files of a folder, the line instead of the function's body."""
    for file in {file for file, _ in functions}:
        messages = {name: line for (one, name), line in functions.items() if one == file}
        path = folder / file
        path.write_text(blank(path.read_text(encoding='utf-8'), messages), encoding='utf-8')


def copy_project(folder, without=()):
    """Our files into a folder, except those that match a pattern."""
    left_out = {path for pattern in without for path in PROJECT.glob(pattern)}
    for path in {path for pattern in FILES for path in PROJECT.glob(pattern)} - left_out:
        if path.is_file() and path.name != 'test_all.py':
            copy = folder / path.relative_to(PROJECT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    shutil.copyfile(HERE / 'test_assignment.py', folder / 'test_assignment.py')


# --- the handout ------------------------------------------------------------------------------------------

def length(number):
    """About how many lines a solution takes: as many as ours, comments not counted, rounded to fives."""
    count = 0
    for file, name in EXERCISES[number].targets:
        source = (PROJECT / file).read_text(encoding='utf-8')
        first, last = body(find(ast.parse(source), name))
        count += sum(line.strip()[:1] not in ('', '#') for line in source.splitlines()[first - 1:last])
    return max(5, 5 * round(count / 5))


def handout(folder, numbers, seed):
    """Write the students' folder. Raises ValueError if there is something in it already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f'{folder} is not an empty folder: choose another one')
    copy_project(folder, [path for k in numbers for path in EXERCISES[k].left_out if isinstance(path, str)])
    rewrite({function: f"raise NotImplementedError('left out, because it is too close to exercise {k}')"
             for k in numbers for function in EXERCISES[k].left_out if isinstance(function, tuple)}
            | {function: f"raise NotImplementedError('exercise {k}: about {length(k)} lines')"
               for k in numbers for function in EXERCISES[k].targets}, folder)
    tests = [(k, name, [(example, answer(k, example)) for example in found])
             for k in numbers if k not in EXPERIMENTS for name, found in examples(k, f'handout {seed}')]
    (folder / 'expected.json').write_text(json.dumps(tests))
    (folder / 'README.md').write_text(readme(numbers, tests), encoding='utf-8')


def readme(numbers, tests):
    points, minutes = (sum(getattr(EXERCISES[k], name) for k in numbers) for name in ('points', 'minutes'))
    text = [README.format(points=points, hours=round(minutes / 60), seconds=SECONDS, k=numbers[0])]
    for k in numbers:
        e = EXERCISES[k]
        where = ', '.join(f'`{name}` in `{file}`' for file, name in e.targets)
        about = f'{where}: about {length(k)} lines. ' if where else ''
        text.append(f'## Exercise {k}: {e.title} ({e.points} points)\n\n{about}About {e.minutes} minutes. '
                    f'Prerequisites: {e.needs}.\n\n{textwrap.fill(e.what, 110)}\n')
        if e.command:
            text.append(f'    {e.command}\n')
        if (drawn := next((found[0] for number, _, found in tests if number == k), None)):
            lines = difference(drawn[0], {}, drawn[1]).splitlines()[:-1]
            text.append('```\n' + '\n'.join([line for line in lines if not line.startswith('Yours')]) + '\n```\n')
    return '\n'.join(text)


README = '''# Assignment: RNNs are not Transformers (yet)

{points} points, about {hours} hours. Write the functions below anew, from their docstrings. They replace
`raise NotImplementedError(...)`; the rest of the project stays as it is. No GPU and no C++ compiler is needed.

    pip install -r requirements.txt
    python train.py --tasks=recall --setups=direct --archs=mamba --layers=GG --n_nodes=8 --samples=2000 --out=out/smoke
    pytest test_assignment.py
    pytest test_assignment.py -k exercise_{k}_

The first two commands show that everything is installed (the second takes less than a minute); the others test your
work, and draw the smallest example that fails. Read the header of `data.py` first: it draws the task.

Graded are the functions named below, on other examples than those of the tests, together with the helper functions
and imports that you add at the top level of the same file. While an exercise is graded, other implementations of the
same thing are not there to be called, files cannot be written, and no other program can be started. It may take
{seconds} seconds. Each test of an exercise gives the same part of its points. Hand in the whole folder.
'''


# --- grading ----------------------------------------------------------------------------------------------

class Failed(Exception):
    """Why an exercise gets 0 points, in one line."""


def read(folder, file):
    """A file of a submission, as source code. Raises Failed."""
    path = folder / file
    try:
        if not path.is_file():
            raise Failed(f'{file} is missing')
        if path.resolve() != folder.resolve() / file or path.stat().st_size > 10**6:
            raise Failed(f'{file} is a link, or larger than 1 MB')
        source = path.read_text(encoding='utf-8')
        ast.parse(source)
    except SyntaxError as error:
        raise Failed(f'{file} is not Python: {error.msg} in line {error.lineno}')
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise Failed(f'{file} cannot be read ({type(error).__name__})')
    return source


def run(folder, number, examples, seconds):
    """The answers to examples of a process in a folder. Raises Failed if it does not answer all in time."""
    with tempfile.TemporaryFile('w+') as questions, tempfile.TemporaryFile() as answers:
        questions.writelines(json.dumps(example) + '\n' for example in examples)
        questions.seek(0)
        environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
        process = subprocess.Popen([sys.executable, '-B', 'test_assignment.py', f'{number}'], cwd=folder, stdin=questions,
                                   stdout=answers, stderr=subprocess.DEVNULL, start_new_session=True,
                                   env=environment | dict(SCAN_CUDA_BUILD='0', OMP_NUM_THREADS='1'))
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f'not done after {seconds} seconds')
        finally:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError, AttributeError):      # whatever it started; Windows has no groups
                os.killpg(process.pid, signal.SIGKILL)
        answers.seek(0)
        lines = answers.read(10**8).splitlines()
    if len(lines) != len(examples):
        raise Failed(f'the process ended (code {process.returncode}) after {len(lines)} of {len(examples)} examples')
    try:
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError, RecursionError):
        raise Failed('the process wrote something that is not an answer')


def submission(folder, number, copy):
    """Put what a student wrote for an exercise into our copy of the project. Raises Failed."""
    e = EXERCISES[number]
    copy_project(copy, KERNELS)
    for file in {file for file, _ in e.targets}:
        names = [name for one, name in e.targets if one == file]
        (copy / file).write_text(transplant((copy / file).read_text(encoding='utf-8'), read(folder, file), names))
    rewrite({function: f"raise RuntimeError('{function[1]} cannot be called while exercise {number} is graded')"
             for function in (*e.siblings, *e.left_out) if isinstance(function, tuple)}, copy)


def grade_exercise(folder, number, seed):
    """Returns the share of the tests that pass, and what to tell the student."""
    tests, passed, told, drawn = examples(number, seed), 0, [], None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as copy:
        submission(folder, number, Path(copy))
        found = iter(run(copy, number, [example for _, group in tests for example in group], SECONDS))
    for name, group in tests:
        complaints = [difference(example, next(found), answer(number, example)) for example in group]
        complaint = next(filter(None, complaints), None)
        passed, drawn = passed + (complaint is None), drawn or complaint
        told.append(f'{"failed" if complaint else "passed"}  {name}')
    return passed / len(tests), '\n'.join([*told, '', drawn or '']).strip()


def grade_experiment(folder, number, seed):
    """The same for an experiment: each checkpoint is a test."""
    accuracy, allowed = EXPERIMENTS[number]
    passed, told, seen = 0, [], set()
    paths = sorted(folder.glob(f'out/ex{number}/*/checkpoint.pt'))[:3]
    if not paths:
        raise Failed(f'out/ex{number}/*/checkpoint.pt is missing')
    for path, (_, setting) in zip(paths, examples(number, seed)):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as copy:
            copy_project(Path(copy))
            if path.stat().st_size > 10**8 or not path.is_file():
                raise Failed(f'{path.parent.name}/checkpoint.pt is larger than 100 MB')
            shutil.copyfile(path, Path(copy, 'checkpoint.pt'))
            measured, = run(copy, number, setting, 3 * SECONDS)
        ok = ('error' not in measured and measured['accuracy'] >= accuracy and allowed(measured)
              and measured['sum'] not in seen)
        seen.add(measured.get('sum'))
        passed += ok
        told.append(f'{"passed" if ok else "failed"}  {path.parent.name}: {measured}')
    return passed / 3, '\n'.join(told)


def grade_question(folder):
    path = folder / 'answers.md'
    text = path.read_text(encoding='utf-8', errors='replace')[:5000] if path.is_file() else 'answers.md is missing'
    return f'{EXERCISES[11].points} points, to be given by hand.\n\n{text}\n\nModel answer: {MODEL_ANSWER}'


def grade(folder, numbers, seed):
    """A list of results, one per exercise, in Gradescope's layout. Raises nothing, whatever the submission does."""
    results = []
    for number in numbers:
        e, marker = EXERCISES[number], grade_experiment if number in EXPERIMENTS else grade_exercise
        try:
            share, told = (0, grade_question(folder)) if number == 11 else marker(folder, number, seed)
        except Failed as reason:
            share, told = 0, str(reason)
        except Exception as error:      # nothing that a student does may stop the grader
            share, told = 0, f'cannot be graded: {type(error).__name__}'
        by_hand = number == 11
        results.append(dict(number=f'{number}', name=f'Exercise {number}: {e.title}', score=round(share * e.points, 2),
                            max_score=0 if by_hand else e.points, output=told, visibility='hidden' if by_hand else 'visible'))
    return results


def main(argv):
    parser = argparse.ArgumentParser('test_all.py', description='The tests run with pytest test_all.py. For a class:')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, about in (('handout', "write the students' folder"), ('grade', "grade a student's folder")):
        command = commands.add_parser(name, help=about)
        command.add_argument('folder', type=Path)
        command.add_argument('--exercises', default=','.join(map(str, EXERCISES)), help='numbers, separated by commas')
        command.add_argument('--seed', help='of the examples (default: 0 for a handout, a secret one for grading)')
    command.add_argument('--json', action='store_true', help="print Gradescope's results.json")
    c = parser.parse_args(argv)
    if set(c.exercises.split(',')) - {*map(str, EXERCISES)}:
        raise ValueError(f'--exercises={c.exercises}: choose from {", ".join(map(str, EXERCISES))}')
    numbers = sorted({*map(int, c.exercises.split(','))})
    if c.command == 'handout':
        handout(c.folder, numbers, c.seed or 0)
        print(f'{c.folder}: for the students, with a README.md. To grade what comes back:\n'
              f'  python test_all.py grade DIR --exercises={c.exercises}')
        return
    results = grade(c.folder, numbers, c.seed or secrets.token_hex(8))
    score, best = (round(sum(result[name] for result in results), 2) for name in ('score', 'max_score'))
    if c.json:
        print(json.dumps(dict(score=score, tests=results), indent=1))
        return
    for result in results:
        print('{name}: {score:g} of {max_score} points\n\n{output}\n'.format(**result))
    print(f'Total: {score:g} of {best} points')
