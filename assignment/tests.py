"""The tests of the assignment. README.md says what each exercise is about.

  pytest test_assignment.py                     all exercises
  pytest test_assignment.py -x -k exercise_3_   one of them, up to the first test that fails

A failed test draws the smallest of its examples that fails. The examples stand in expected.json with what is
expected of them; your work is graded on others.
"""
import json
import os
import sys
from itertools import zip_longest
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np

# --- while your work is graded ----------------------------------------------------------------------------

ALLOWED = ('os.listdir', 'os.scandir', 'os.walk', 'os.fwalk', 'os.putenv', 'os.unsetenv')
HERE = Path(__file__).parent
READABLE = tuple(os.path.realpath(path) + os.sep for path in (HERE, sys.prefix, sys.base_prefix))
PROCESSES = ('os', 'shutil', 'subprocess', 'socket', 'ctypes', 'pty')


def guard(event, arguments):
    """Refuse what no exercise needs: writing, reading elsewhere, other processes, the network. Mistakes then
    do no harm, and the solution is out of reach; but this is no sandbox."""
    if event == 'open' and not isinstance(arguments[0], int):
        path, mode, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[1] or '', arguments[2] or 0
        writing = set(mode) & set('wax+') or flags & (os.O_WRONLY | os.O_RDWR)
        refused = path != os.devnull and (writing or not path.startswith(READABLE))
    else:
        refused = event.split('.')[0] in PROCESSES and event not in ALLOWED
    if refused:
        raise PermissionError(f'{event} {arguments[:1]} is not allowed while your work is graded')


if __name__ == '__main__':              # the grader's run, before any line of yours
    if int(sys.argv[1]) > 3:
        import torch.utils.data         # while it may still load libraries
        torch.compile(print)            # has older versions of torch load all of theirs, which makes a folder
    sys.addaudithook(guard)

import data

# The rest is imported where it is needed: exercises 1 to 3 do without torch, which takes seconds, and a
# mistake in one file leaves the tests of the others alone.

# --- what is asked of your code: an example (JSON) -> answers by name -----------------------------------


def retrieve(text):
    if any(pattern.startswith('exercise 3') for pattern in data.QUERIES['istree'].values()):
        raise NotImplementedError
    answer, well_formed = data.TASKS['istree'].retrieve(text)
    return {'answer': answer, 'well-formed': well_formed}


def scan_loop(**inputs):
    import scan_cuda
    y, state = scan_cuda.selective_scan_reference(**tensors(inputs))
    return {'y': y.tolist(), 'final_state': state.tolist()}


def scan_pairs(a, b):
    import scan_cuda
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **kwargs or {})

    with Counter() as counter:
        h = scan_cuda.pairwise_scan(*tensors([a, b]))
    parallel = {'fewer than 2,000 operations': counter.calls < 2000} if len(a[0]) >= 1000 else {}
    return {'h': h.tolist(), **parallel}


def scan_gradients(dy, dfinal, **inputs):
    import scan_cuda
    import torch
    inputs = tensors(inputs)
    _, _, starts = scan_cuda._fallback_forward(*inputs.values(), 4)
    refuse = Mock(side_effect=RuntimeError('autograd cannot be used in this exercise'))
    with patch.multiple(torch.autograd, grad=refuse, backward=refuse), \
            patch.object(torch.Tensor, 'backward', refuse):
        found = scan_cuda._fallback_backward(tensors(dy), tensors(dfinal), *inputs.values(), starts, 4)
    found = dict(zip(inputs, found, strict=True))
    return {f'gradient of {name}': found[name].tolist() for name in inputs if inputs[name] is not None}


def attend(n_heads, n_kv_heads, weights, x, blocks):
    import models
    import torch
    x, (qkv, o) = tensors(x), map(tensors, weights)
    config = models.Config(1, 'A', x.shape[2], n_heads=n_heads, n_kv_heads=n_kv_heads)
    attention = models.Attention(config).double()
    attention.load_state_dict({'qkv_proj.weight': qkv, 'o_proj.weight': o})
    with torch.no_grad():
        if not blocks:
            return {'y': attention(x, None).tolist()}
        cache = models.KVCache(torch.zeros(2, len(x), n_kv_heads, 0, attention.d_head, dtype=torch.float64))
        y = torch.cat([attention(block, cache) for block in x.split(blocks, 1)], 1)
    return {'y': y.tolist(), 'tokens in the cache': cache.seen}


class Tape:
    """A model with its tokens on a tape, shifted by what it reads: after a wrong token it writes nonsense."""

    def __init__(self, tapes):
        self.tapes, self.vocab = tapes, data.NODE + 100

    def logits(self, state):
        import torch
        rows = [(tape[state['t']:] or [0])[0] + read for tape, read in zip(self.tapes, state['read'])]
        return torch.nn.functional.one_hot(torch.tensor(rows) % self.vocab, self.vocab).float()

    def prefill(self, tokens):
        state = dict(t=0, read=[0] * len(tokens))
        return self.logits(state), state

    def step(self, token, state):
        state['t'] += 1
        state['read'] = [read + state['t'] * t for read, t in zip(state['read'], token.tolist())]
        return self.logits(state)


def generate(setup, n, prompts, tapes):
    import torch
    import train
    written, retrieved, queries, well_formed = train.generate(
        Tape(tapes), 'istree', n, setup, np.array(prompts), torch.device('cpu'))
    return {'tokens': np.asarray(written).tolist(), 'retrieved': np.asarray(retrieved).tolist(),
            'queries': int(queries), 'well-formed queries': int(well_formed)}


def trained(task, n, setup, seed, samples):
    """The model in checkpoint.pt, on samples that it has not seen."""
    import models
    import torch
    import train
    cell, weights = map(torch.load('checkpoint.pt', weights_only=True).get, ('cell', 'model'))
    if len(cell['layers']) > 4 or not 1 <= cell['d_state'] <= 64:
        raise ValueError('more than four layers, or a d_state above 64')
    known, device = data.TASKS[task], torch.device('cpu')
    vocab_size = known.vocab_size(n)
    model = models.make_model(cell['arch'], 'tiny', vocab_size, cell['d_state'], False, cell['layers'])
    model.load_state_dict(weights)
    tokens, loss_mask, _ = known.generate(samples, n, setup, seed)
    measured, _ = train.evaluate(model, dict(task=task, setup=setup), n, tokens, loss_mask, 250, device)
    return {'accuracy': measured['accuracy'], 'layers': model.config.layers, 'd_state': cell['d_state'],
            'memory': sum(model.memory(known.prompt_length(n)).values()),
            'weights': float(model.embedding.weight.double().sum())}


LAYER_CLAIMS = ('one pass gives what single steps give', 'so do two passes', 'no token sees the future',
                'gradients reach every parameter', 'the memory does not grow')


def new_layer(claim, ids):
    """Whether a claim holds for the layer whose letter is new."""
    import models
    import torch
    letters = [letter for letter in models.LAYERS if letter not in 'MADG']
    if not letters:
        raise NotImplementedError
    torch.manual_seed(0)
    model, tokens = models.make_model('mamba', 'tiny', 30, 16, layers=letters[0]), torch.tensor(ids)
    one_pass, last = model(tokens), tokens.shape[1] - 1
    close = lambda logits, others: bool((logits - others).abs().max() < 1e-4)
    if claim == LAYER_CLAIMS[0]:
        state = model.init_state(len(tokens))
        holds = close(torch.stack([model.step(token, state) for token in tokens.T], 1), one_pass)
    elif claim == LAYER_CLAIMS[1]:
        state = model.init_state(len(tokens))
        holds = close(torch.cat([model(part, state) for part in tokens.split((last, 1), 1)], 1), one_pass)
    elif claim == LAYER_CLAIMS[2]:
        changed = torch.cat((tokens[:, :-1], (tokens[:, -1:] + 1) % 30), 1)
        holds = close(model(changed)[:, :last], one_pass[:, :last])
    elif claim == LAYER_CLAIMS[3]:
        one_pass.logsumexp(-1).sum().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        holds = all(grad is not None and bool(grad.abs().max() > 0) for grad in trained)
    else:
        holds = model.memory(last) == model.memory(last + 1000)
    return {claim: holds}


ANSWER = {1: lambda edges: {'tour': data.cot_trace(data.adjacency(edges, len(edges) + 1))},
          2: lambda edges: {'trace': data.retrieval_trace(data.adjacency(edges, len(edges) + 1))},
          3: retrieve, 4: scan_loop, 5: scan_pairs, 6: scan_gradients, 7: attend, 8: generate, 9: trained,
          10: trained, 12: new_layer}


def tensors(value):
    """Nested lists of numbers -> float64 tensors."""
    import torch
    if isinstance(value, dict):
        return {name: tensors(one) for name, one in value.items()}
    return None if value is None else torch.tensor(value, dtype=torch.float64)


def answer(number, example):
    """What your code makes of an example, or {'error': ...}."""
    try:
        plain = lambda x: x.item() if isinstance(x, np.generic) else repr(x)
        return json.loads(json.dumps(ANSWER[number](**example), default=plain))
    except NotImplementedError:
        return {'error': 'not written yet'}
    except Exception as error:          # whatever it is, the other examples are still to be tried
        return {'error': f'{type(error).__name__}: {error}'[:300]}


# --- drawing ----------------------------------------------------------------------------------------------

def leaves(value, place=()):
    """Nested lists -> {indices: what stands there}."""
    if not isinstance(value, list):
        return {place: value}
    return {key: leaf for i, one in enumerate(value) for key, leaf in leaves(one, (*place, i)).items()}


def same(yours, expected):
    """Equal; floats up to rounding."""
    if isinstance(expected, float):
        return isinstance(yours, (int, float)) and abs(yours - expected) <= 1e-6 + 1e-5 * abs(expected)
    return type(yours) is type(expected) and yours == expected


def word(name, value):
    if name in ('tour', 'trace', 'answer', 'tokens', 'prompts') and type(value) is int \
            and 0 <= value < len(data.WORDS):
        return data.WORDS[value]
    return f'{value:.4g}' if isinstance(value, float) else ascii(value)[:60]


def row(name, value, drawn=None):
    """A row of a drawing: a name, the shape of nested lists, and what is in them."""
    value = ' '.join([f'{u}-{v}' for u, v in value]) if name == 'edges' else value
    words = value.split() if isinstance(value, str) else [word(name, one) for one in leaves(value).values()]
    shape = tuple([max(indices) + 1 for indices in zip(*leaves(value))])
    words = words if len(words) < 50 or name == 'trace' else [*words[:30], '...', *words[-12:]]
    return f'{name} {shape}' if len(shape) > 1 else name, drawn or ' '.join(words)


def table(values, *rows):
    """A drawing of the values by name, with more rows below."""
    rows = [row(*item) for item in values.items() if item[0] not in ('tapes', 'weights')] + [*rows]
    width = max(len(name) for name, _ in rows) + 2
    return '\n'.join([f'{name:{width}}{shown}'.rstrip() for name, shown in rows])


def difference(example, yours, expected):
    """None if the answers are the same, else a drawing of the first that differs."""
    sides = {name: (leaves(yours.get(name)), leaves(right)) for name, right in expected.items()}
    wrong = {name: places for name, (left, right) in sides.items() if (places := [
        place for place in left | right if not same(left.get(place, ...), right.get(place, ...))])}
    if not wrong:
        return None
    if 'error' in yours:
        return table(example, ('Yours', ascii(yours['error'])[1:-1]))
    name, *others = wrong
    (left, right), place = sides[name], min(wrong[name])
    places = sorted(left | right)
    if 'prompts' in example and place:                      # one sample will do
        places = [other for other in places if other[:1] == place[:1]]
        example = example | {'prompts': dict(enumerate(example['prompts'])).get(place[0])}
    at = places.index(place)
    start = at - 8 if at > 12 else 0
    shown = places[start:start + 18]
    pairs = [[word(name, side[p]) if p in side else '' for side in (left, right)] for p in shown]
    widths = [max(map(len, pair)) for pair in pairs]
    before, after = '... ' if start else '', ' ...' if start + 18 < len(places) else ''
    drawn = [before + ' '.join(map(str.ljust, words, widths)) + after for words in zip(*pairs)]
    mark = ' ' * (sum(widths[:at - start]) + at - start + len(before)) + f'^ {name}{[*place] or ""}'
    mark += f'; also wrong: {", ".join(others)}' if others else ''
    return table(example, row('Yours', yours.get(name), drawn[0]), row('Expected', expected[name], drawn[1]),
                 ('', mark))


# --- how it is run: by pytest, or by the grader -----------------------------------------------------------

def pytest_generate_tests(metafunc):
    tests = json.loads((HERE / 'expected.json').read_text())
    metafunc.parametrize('number, examples', [(number, examples) for number, _, examples in tests],
                         ids=[f'exercise_{number}_{name}' for number, name, _ in tests])


def test(number, examples):
    import pytest
    for example, expected in examples:
        if complaint := difference(example, answer(number, example), expected):
            pytest.fail('\n' + complaint, pytrace=False)


if __name__ == '__main__':              # examples as lines of JSON on stdin, answers on stdout
    results = os.fdopen(os.dup(1), 'w')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        results.write(json.dumps(answer(int(sys.argv[1]), json.loads(line))) + '\n')
        results.flush()
