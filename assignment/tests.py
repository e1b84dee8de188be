"""The tests of the assignment. README.md says what each exercise is about.

  pytest test_assignment.py                     all exercises
  pytest test_assignment.py -x -k exercise_3_   one of them, up to the first test that fails

A failed test draws the smallest of its examples that fails. The examples stand in expected.json,
with what is expected of them; your work is graded on others.
"""
import json
import math
import os
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np

HERE = Path(__file__).parent

# --- while your work is graded --------------------------------------------------------------------

ALLOWED = ('os.listdir', 'os.scandir', 'os.walk', 'os.fwalk', 'os.putenv', 'os.unsetenv')
PROCESSES = ('os', 'shutil', 'subprocess', 'socket', 'ctypes', 'pty')
READABLE = tuple(os.path.realpath(folder) + os.sep
                 for folder in (HERE, sys.prefix, sys.base_prefix, *sys.path))


def guard(event, arguments):
    """Refuse what no exercise needs: writing, reading elsewhere, other processes, the network.
    Mistakes then do no harm, and the solution is out of reach; but this is no sandbox."""
    if event == 'open' and not isinstance(arguments[0], int):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        writing = arguments[2] & (os.O_WRONLY | os.O_RDWR)
        refused = path != os.devnull and (writing or not path.startswith(READABLE))
    else:
        refused = event.split('.')[0] in PROCESSES and event not in ALLOWED
    if refused:
        raise PermissionError(f'{event} {arguments[:1]} is not allowed while your work is graded')


if __name__ == '__main__':              # the grader's run, before any line of yours
    NUMBER = int(sys.argv[1])
    if 3 < NUMBER < 13:
        import torch.utils.data         # while it may still load libraries
        torch.compile(print)            # loads the rest of torch, which makes a folder
    sys.addaudithook(guard)

import data

# The rest is imported where it is needed: exercises 1 to 3 and 13 do without torch, which takes
# seconds, and a mistake in one file leaves the tests of the others alone.


# --- what is asked of your code: an example (JSON) -> answers by name -----------------------------

def neighbours(edges):
    return data.neighbours_of([edge.split('-') for edge in edges], len(edges) + 1)


def tour(edges):
    return {'tour': data.cot_trace(neighbours(edges))}


def trace(edges):
    return {'trace': data.retrieval_trace(neighbours(edges))}


def retrieve(text, kind=data.IsTree):
    if 'exercise' in str(kind.patterns):
        raise NotImplementedError
    answer, well_formed = data.search(' '.join(text), kind.patterns)
    return {'answer': answer, 'well-formed': well_formed}


def turing(tape=None, text=None):
    """What the machine Increment makes of a tape; or the answer to the query that ends a text."""
    if text:
        return retrieve(text, data.Turing)
    table = data.Increment.table
    (state, _), *_ = table
    tape, at = [*tape, '_'], 0
    for _ in range(1000):
        tape[at], move, state = table[state, tape[at]]
        at += int(move)
        if state == '[TRUE]':
            return {'result': tape}
    raise RuntimeError('no [TRUE] after 1,000 steps')


def tensors(*values):
    """Nested lists of numbers -> float64 tensors."""
    import torch
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def scan_loop(**inputs):
    import scan_cuda
    y, state = scan_cuda.selective_scan_reference(*tensors(*inputs.values()))
    return {'y': y.tolist(), 'final_state': state.tolist()}


def scan_pairs(a, b):
    import scan_cuda
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **kwargs or {})

    with Counter() as counter:
        h = scan_cuda.pairwise_scan(*tensors(a, b))
    return {'h': h.tolist(), 'fewer than 2,000 operations': counter.operations < 2000}


def scan_gradients(dy, dstates, **inputs):
    import scan_cuda
    import torch
    context = Mock()
    refuse = Mock(side_effect=RuntimeError('autograd cannot be used in this exercise'))
    with patch('scan_cuda.CHUNK', 4), patch('torch.Tensor.backward', refuse), \
            patch.multiple(torch.autograd, grad=refuse, backward=refuse):
        scan_cuda.Fallback.forward(context, *tensors(*inputs.values()))
        context.saved_tensors = context.save_for_backward.call_args.args
        found = scan_cuda.Fallback.backward(context, *tensors(dy, dstates))
    return {f'gradient of {name}': gradient.tolist()
            for name, gradient in zip(inputs, found, strict=True)}


def attend(n_heads, blocks):
    import models
    import torch
    torch.manual_seed(0)
    d_model = 4 * n_heads
    attention = models.Attention(models.Config(1, 'A', d_model, n_heads=n_heads))
    cache, ys = torch.zeros(2, 2, n_heads, 0, attention.d_head), []
    with torch.no_grad():
        for x in torch.randn(2, sum(blocks), d_model).split(blocks, 1):
            y, cache = attention(x, cache)
            ys.append(y)
    return {'y': torch.cat(ys, 1).tolist(), 'shape of the cache': [*cache.shape]}


class Script:
    """A model that knows texts by heart and writes nonsense when it has read anything else, or
    where the next word has a star. texts: lists of words."""

    def __init__(self, task, texts):
        self.vocab_size, self.next = len(task.words), {}
        for text in texts:
            tokens = [task.tokens[word.removeprefix('*')] for word in text]
            for t, word in enumerate(text):
                if not word.startswith('*'):
                    self.next[tuple(tokens[:t])] = tokens[t]

    def prefill(self, tokens):
        import torch
        written = [self.next.get(tuple(row), data.EDGE) for row in tokens.tolist()]
        return torch.eye(self.vocab_size)[written], [{'read': tokens}]

    def step(self, token, state):
        import torch
        return self.prefill(torch.cat((state[0]['read'], token[:, None]), 1))


def generate(setup, n, prompts, script, other_memory):
    import torch
    import train
    task, state = data.IsTree(n, setup), None
    model = Script(task, [prompt + completion for prompt, completion in zip(prompts, script)])
    if other_memory:
        _, state = model.prefill(train.as_tokens(task, prompts[::-1], 'cpu'))
    found = train.generate(model, task, n, prompts, torch.device('cpu'), state)
    return dict(zip(('completions', 'queries', 'well-formed queries'), found, strict=True))


def trained(seed, n=14, setup='cot', samples=500):
    """The model in checkpoint.pt, on samples that it has not seen."""
    import train
    model, run = train.load('checkpoint.pt')
    task = data.IsTree(n, setup)
    drawn = data.draw(task, n, samples, seed)
    measured, _ = train.evaluate(model, task, n, drawn, 250, 'cpu')
    return {'accuracy': measured['accuracy'], 'layers': model.config.layers, 'd_state': run.d_state,
            'memory': sum(model.memory(len(drawn[0][0])).values()),
            'weights': model.embedding.weight.double().sum().item()}


# --- what must hold for a layer of your own: a model of such layers, tokens (B, L) ----------------

def read(model, tokens, lengths):
    """What the head reads, (B, L, d_model), when the tokens come in parts of these lengths. Each
    part is read twice, which changes nothing unless a state is changed in place."""
    import torch
    state, found = model.init_state(len(tokens)), []
    for part in tokens.split(lengths, 1):
        model.hidden(part, state)
        hidden, state = model.hidden(part, state)
        found.append(hidden)
    return torch.cat(found, 1)


def close(a, b):
    return bool((a - b).abs().max() < 1e-4)


def parts_agree(model, tokens):
    L = tokens.shape[1]
    whole, steps, two = (read(model, tokens, lengths) for lengths in (L, 1, [1, L - 1]))
    return close(steps, whole) and close(two, whole)


def is_causal(model, tokens):
    L = tokens.shape[1]
    return close(read(model, tokens[:, :-1], L), read(model, tokens, L)[:, :-1])


def gradients_flow(model, tokens):
    model(tokens).logsumexp(-1).sum().backward()
    return all(p.grad is not None and bool(p.grad.any()) for p in model.layers.parameters())


def memory_is_fixed(model, tokens):
    return model.memory(1) == model.memory(1000)


LAYER_CLAIMS = {'parts of a text, each read twice, give what the whole gives': parts_agree,
                'no token sees the future': is_causal,
                'gradients reach every parameter': gradients_flow,
                'the memory does not grow': memory_is_fixed}


def new_layer(claim, length):
    """Does a claim hold for the layer whose letter is new?"""
    import models
    import torch
    letters = [letter for letter in models.LAYERS if letter not in 'MADG']
    if not letters:
        raise NotImplementedError
    torch.manual_seed(0)
    model = models.make_model('mamba', 'tiny', 30, 16, layers=letters[0])
    return {claim: LAYER_CLAIMS[claim](model, torch.randint(29, (2, length)))}


ANSWER = {1: tour, 2: trace, 3: retrieve, 4: scan_loop, 5: scan_pairs, 6: scan_gradients, 7: attend,
          8: generate, 9: trained, 10: trained, 12: new_layer, 13: turing}


def plain(value):
    """A JSON value in place of another one."""
    return value.item() if isinstance(value, np.generic) else repr(value)


def answer(number, example):
    """What your code makes of an example, or {'error': ...}."""
    try:
        return json.loads(json.dumps(ANSWER[number](**example), default=plain))
    except NotImplementedError:
        return {'error': 'not written yet'}
    except Exception as error:          # whatever it is, the other examples are still to be tried
        return {'error': ascii(f'{type(error).__name__}: {error}')[1:-1][:300]}


# --- drawing --------------------------------------------------------------------------------------

def leaves(value, place=()):
    """Nested lists -> {indices: what stands there}."""
    if not isinstance(value, list):
        return {place: value}
    found = {}
    for i, one in enumerate(value):
        found |= leaves(one, (*place, i))
    return found


def same(yours, expected):
    """Equal; floats up to rounding."""
    if isinstance(expected, float) and isinstance(yours, (int, float)):
        return math.isclose(yours, expected, rel_tol=1e-5, abs_tol=1e-6)
    return type(yours) is type(expected) and yours == expected


def word(value):
    return f'{value:.4g}' if isinstance(value, float) else ascii(value).strip("'")[:60]


def row(name, words):
    return f'{name:20}  {" ".join(words)}'.rstrip()


def show(example):
    """A row for each value: its name, the shape of nested lists, and what is in them."""
    rows = []
    for name, value in example.items():
        found = leaves(value)
        shape = tuple([max(indices) + 1 for indices in zip(*found)])
        words = [word(leaf) for leaf in found.values()]
        if len(words) > 90:
            words[60:-20] = ['...']
        if name != 'script':
            rows.append(row(f'{name} {shape}' if len(shape) > 1 else name, words))
    return rows


def around(found, places, at):
    """The words near a place, which is marked."""
    words = [word(found.get(place, '')) for place in places]
    words[at] = f'>{ascii(found.get(places[at], ""))}<'
    return words[max(0, at - 8):at + 10]


def difference(example, yours, expected):
    """None if the answers are the same, else a drawing of the first place where they differ."""
    if 'error' in yours:
        return '\n'.join([*show(example), row('Yours', [yours['error']])])
    for name in expected:
        left, right = leaves(yours.get(name)), leaves(expected[name])
        places = sorted(left | right)
        for at, place in enumerate(places):
            if not same(left.get(place, ...), right.get(place, ...)):
                return '\n'.join([*show(example), row('Yours', around(left, places, at)),
                                  row('Expected', around(right, places, at)),
                                  row('', [f'They differ at {name}{[*place]}.'])])


# --- how it is run: by pytest, or by the grader ---------------------------------------------------

def pytest_generate_tests(metafunc):
    tests = json.loads((HERE / 'expected.json').read_text())
    metafunc.parametrize('number, examples', tests.values(), ids=tests)


def test(number, examples):
    import pytest
    for example, expected in examples:
        if complaint := difference(example, answer(number, example), expected):
            pytest.fail('\n' + complaint, pytrace=False)


if __name__ == '__main__':              # examples as lines of JSON on stdin, answers on stdout
    results = os.fdopen(os.dup(1), 'w')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        print(json.dumps(answer(NUMBER, json.loads(line))), file=results, flush=True)
