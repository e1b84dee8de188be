"""The data: tasks, the paper's two algorithms, the retriever, batches. This file does not depend on
the models.

The main task is IsTree (paper, sections 5 and 6): a graph with n nodes and n-1 edges is given as a
list of its edges. Is it a tree? Here is a sample with n=7, as the code prints it. In the prompt, an
edge is `u - v`; each node, even 12, is a single word. Each of the three setups has its own
completion:

      0
      |
  3 - 5 - 2 - 1 - 4 - 6

  prompt     [BOS] 2 - 1 6 - 4 5 - 0 4 - 1 5 - 2 5 - 3 [EOS]

  direct     [TRUE]

  cot        0 5 2 1 4 6 4 1 2 5 3 5 0 [EOS] [TRUE]      the tour of a depth-first search

  retrieval  0 [STARTSEARCH] 0 ~ [ENDSEARCH] *[FAILED]   the same search. 0 has no parent,
             [STARTSEARCH] 0 - [ENDSEARCH] *5            its first neighbour is 5,
             [STARTSEARCH] 5 ~ [ENDSEARCH] *[FAILED]     which has no parent, so 5 is new:
             5 ~ 0                                       record that its parent is 0.
             5 [STARTSEARCH] 5 ~ [ENDSEARCH] *0          Enter 5. Its parent is 0,
             [STARTSEARCH] 5 - [ENDSEARCH] *0            which is also its first neighbour.
             [STARTSEARCH] 5 - 0 [ENDSEARCH] *2          The neighbour after 0 is 2.
             [STARTSEARCH] 2 ~ [ENDSEARCH] *[FAILED] 2 ~ 5 2 ... [EOS] [TRUE]

A graph is a tree if the search finds no cycle and reaches every node. So at the end of a search
that finds no cycle, the model has to find out on its own whether nodes are missing from the tour;
counting those in the tour is enough.

In `retrieval`, whatever must be looked up is requested by a query between [STARTSEARCH] and
[ENDSEARCH]. The word after [ENDSEARCH] is not written by the model but by the *retriever*, a
regular expression that runs over the text so far. Such words are marked with a star, here and in
the code:

  v ~        Which node is the parent of v? Answer: the x in the last record `v ~ x`, or [FAILED].
  v -        What is the first neighbour of v? The other end of the first edge that contains v.
  v - w      Which neighbour of v comes after w? The other end of the next edge that contains v,
             or [FAILED].

Below the line that begins with `# ===` are another distribution of graphs, the four retrieval
primitives, a Turing machine, and an export of samples.

  python data.py                            prints a sample of every task
  python data.py --task=istree --setup=cot --n=16 --count=1000 --seed=3 > samples.jsonl
"""
import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from functools import lru_cache
from itertools import cycle, islice, product

import numpy as np

SPECIALS = ('-', '~', '[PAD]', '[BOS]', '[EOS]', '[TRUE]', '[FALSE]',
            '[STARTSEARCH]', '[ENDSEARCH]', '[FAILED]')
EDGE, RECORD, PAD, BOS, EOS, TRUE, FALSE, START, END, FAILED = range(len(SPECIALS))     # token ids
SETUPS = ('direct', 'cot', 'retrieval')
IGNORE = -100                   # the target of a token that is not to be predicted (see collate)

# random.Random(repr(seed)) draws the samples. The seeds of training are (seed, batch, attempt).
VALIDATION_SEED = (2402, 18510)
TUNING_SEED = ('tuning',)


# --- the graphs -----------------------------------------------------------------------------------

def two_star(rng, n):
    r"""The paper's distribution (appendix; `binary` in the authors' code). Two random nodes are
    centres. Every other node is a leaf of one of them, by a fair coin. Then two leaves are joined:

            0                                   0
            |                                  / \
        3 - 5 - 2 - 1 - 4 - 6             3 - 5 - 2     1 - 4 - 6

    The centres are 5 and 4. On the left, the leaves 2 and 1 are joined, leaves of different
    centres: a tree. On the right, 0 and 2 of the same centre: a triangle, and a separate piece.
    So "is it a tree?" means here "do the two joined leaves belong to different stars?". Both graphs
    have n-1 edges, so counting edges does not help. P(tree) = 1/2.

    rng: random.Random. Returns edges [(u, v), ...] and whether they form a tree."""
    first, second, *leaves = rng.sample(range(n), n)
    centres = rng.choices([first, second], k=n - 2)         # of each leaf
    i = rng.randrange(n - 3)                                # (the leaves are in random order)
    edges = [*zip(centres, leaves), (leaves[i], leaves[i + 1])]
    return edges, centres[i] != centres[i + 1]


GRAPHS = {'two_star': two_star}         # `random` is added below the line


# --- what a task is -------------------------------------------------------------------------------

class Task:
    """What a model is to learn. A sample is two lists of words: a prompt, and the completion that
    the model has to write. A word with a star in front, as in `*4`, is not the model's: the
    retriever writes it. A subclass must define

      words_of(n)           its words besides SPECIALS, for samples of size n and below
      sample(rng, n)        draws a sample of size n; all prompts of one n must be equally long,
                            and except in the setup `direct`, [EOS] and the answer end a completion
      patterns              the regular expressions that answer queries, a tuple (see search)
      longest(n)            the number of words of the longest completion
      chance(n)             the accuracy of the best guess that looks nothing up

    rng: random.Random. Register it in TASKS, and its constants in train.py's TABLE. A small example
    is the class Chase in test_all.py."""
    setups = SETUPS
    distributions = ('',)       # names of ways to draw a sample, the first is the usual one
    possible_n = range(2, 4097)
    patterns = ()

    def __init__(self, n, setup, distribution=''):
        """Raises ValueError, in one line, for impossible arguments."""
        if setup not in self.setups:
            raise ValueError(f'setup {setup}: this task has {", ".join(self.setups)}')
        if n not in self.possible_n:
            smallest, second, *_, largest = self.possible_n
            raise ValueError(f'n={n}: this task has {smallest}, {second}, ..., {largest}')
        distribution = distribution or self.distributions[0]
        if distribution not in self.distributions:
            possible = ', '.join(self.distributions)
            raise ValueError(f'distribution {distribution}: this task has {possible}')
        self.n, self.setup, self.distribution = n, setup, distribution
        self.words = [*SPECIALS, *self.words_of(n)]                         # token id -> word
        self.tokens = {word: token for token, word in enumerate(self.words)}

    def samples(self, rng, n, count):
        """A list of samples of size n."""
        return [self.sample(rng, n) for _ in range(count)]

    def retrieve(self, text):
        """The retriever. Takes a text that ends in a query, [ENDSEARCH] included. Returns the list
        of words that it writes, and whether the query was well-formed."""
        return search(text, self.patterns)

    def mixed(self):
        """Training may start with smaller samples (`order` in train.py): the n that it uses,
        ascending."""
        return [self.n]


def half_and_whole(n, smallest):
    """Two sizes that a run mixes: half of n, but not below `smallest`, and n."""
    return sorted({max(n // 2, min(smallest, n)), n})


def numbers(n):
    """The words 0, 1, ..., n-1."""
    return [str(i) for i in range(n)]


class IsTree(Task):
    """Is the graph a tree? See the top of this file."""
    distributions = ('two_star', 'random')
    possible_n = range(4, 4097)
    words_of = staticmethod(numbers)
    # Queries, and the regular expressions that answer them. V and W stand for the query's numbers:
    # for the query `5 - 0`, the last pattern becomes
    #     ^\[BOS\][^[]*? (?:5 - 0|0 - 5)\b[^[]*? (?:5 - (\d+)|(\d+) - 5\b)
    # which skips to the edge 5 - 0 (or 0 - 5), then to the next one with 5, and captures its other
    # end; it has two groups because 5 may stand on either side. [^[]*? does not leave the prompt,
    # because [EOS] begins with a bracket. The space in front of a number and the \b behind keep 1
    # from matching in 11. In the first pattern, (?= ...) lets matches overlap: in nonsense such as
    # `4 ~ 4 ~ 0`, the record `4 ~ 0` is found, too.
    patterns = (
        (r'(\d+) ~', r' V ~(?= (\d+))'),
        (r'(\d+) -', r'^\[BOS\][^[]*? (?:V - (\d+)|(\d+) - V\b)'),
        (r'(\d+) - (\d+)', r'^\[BOS\][^[]*? (?:V - W|W - V)\b[^[]*? (?:V - (\d+)|(\d+) - V\b)'))

    def sample(self, rng, n):
        edges, is_tree = GRAPHS[self.distribution](rng, n)
        rng.shuffle(edges)
        return self.write(edges, is_tree)

    def write(self, edges, is_tree):
        """The sample of a graph. edges: [(u, v), ...] in the order of the prompt."""
        prompt = ['[BOS]']
        for u, v in edges:
            prompt += [str(max(u, v)), '-', str(min(u, v))]     # (the larger node first)
        prompt += ['[EOS]']
        answer = '[TRUE]' if is_tree else '[FALSE]'
        if self.setup == 'direct':
            return prompt, [answer]
        algorithm = cot_trace if self.setup == 'cot' else retrieval_trace
        trace = algorithm(neighbours_of(edges, len(edges) + 1))
        return prompt, trace + ['[EOS]', answer]

    def longest(self, n):
        """The length for a tree, whose whole search is written down (counted in a test)."""
        return {'direct': 1, 'cot': 2 * n - 1 + 2, 'retrieval': 37 * n - 26 + 2}[self.setup]

    def chance(self, n):
        return 1 / 2

    def mixed(self):
        return half_and_whole(self.n, smallest=6)       # (there are too few smaller graphs)


TASKS = {'istree': IsTree}


# --- the paper's two algorithms, on one graph -----------------------------------------------------

def neighbours_of(edges, n):
    """Edges [(u, v), ...] -> {node: its neighbours in the order of the edges}, nodes as words."""
    neighbours = {v: [] for v in numbers(n)}        # (a node may have none)
    for u, v in edges:
        neighbours[str(u)].append(str(v))
        neighbours[str(v)].append(str(u))
    return neighbours


def cot_trace(neighbours):
    """Algorithm 1: the Euler tour of a depth-first search from node 0. A node is written when the
    search enters it and each time the search returns to it. The tour ends when the search meets a
    visited node other than the parent (which is not written again), or when everything that can be
    reached has been searched.

    neighbours: see neighbours_of; the graph is simple. Returns a list of at most 2n-1 words."""
    untried = {v: list(others) for v, others in neighbours.items()}
    parent = {'0': None}            # of every visited node
    tour, v = [], '0'
    while v is not None:
        tour.append(v)
        if not untried[v]:          # nothing left to try: return to the parent
            v = parent[v]
            continue
        w = untried[v].pop(0)
        if w in parent:             # visited before: a cycle
            break
        parent[w] = v               # unvisited: enter w,
        untried[w].remove(v)        # and do not go straight back
        v = w
    return tour


def retrieval_trace(neighbours):
    """Algorithm 2: the same search, except that whatever has to be looked up is asked for.

    neighbours: see neighbours_of. Returns a list of at most 37n-26 words (a test counts them), with
    a star on those that the retriever writes."""
    # after[v, w]: the neighbour of v after w; after[v, None]: the first. If 5 has the neighbours 0,
    # 2 and 3, then after[5, None] is 0, after[5, 0] is 2, after[5, 2] is 3, and after[5, 3] is
    # [FAILED].
    after = {}
    for v, others in neighbours.items():
        previous = None
        for w in others + ['[FAILED]']:
            after[v, previous] = w
            previous = w
    parent = {}                     # the records written so far
    visited = set()
    trace, stack, prev = [], ['0'], None

    def ask(query, answer):
        trace.extend(['[STARTSEARCH]', *query.split(), '[ENDSEARCH]', f'*{answer}'])

    while stack:
        v = stack[-1]
        trace.append(v)
        ask(f'{v} ~', parent.get(v, '[FAILED]'))    # on each visit: no need to remember it
        if v not in visited:
            visited.add(v)
            w = after[v, None]
            ask(f'{v} -', w)
        else:                                       # prev: the child from which it returns
            w = after[v, prev]
            ask(f'{v} - {prev}', w)
        if w == parent.get(v):                      # not straight back up: take the next
            w = after[v, w]
            ask(f'{v} - {parent[v]}', w)
        prev = v
        if w == '[FAILED]':                         # no neighbour remains: return
            stack.pop()
            continue
        ask(f'{w} ~', parent.get(w, '[FAILED]'))
        if w in visited:                            # a cycle
            break
        parent[w] = v                               # unvisited: record its parent and enter it
        trace.extend([w, '~', v])
        stack.append(w)
    return trace


# --- the retriever --------------------------------------------------------------------------------

@lru_cache(maxsize=2**16)
def regular_expression(query, patterns):
    """The compiled regular expression of a query such as `5 - 0`, or None if malformed."""
    for form, pattern in patterns:
        if match := re.fullmatch(form, query):
            for letter, number in zip('VW', match.groups()):
                pattern = pattern.replace(letter, number)
            return re.compile(pattern)
    return None


def search(text, patterns):
    """Answer the query at the end of a text by a regular expression, run over the text before it.

    patterns: pairs (form of a query, pattern of the answer), as in IsTree. The answer is the group
    that matched in the last match outside queries, or [FAILED] if there is none or the query is
    malformed. Returns the answer as a list of one word, and whether the query was well-formed."""
    before, _, query = text.removesuffix('[ENDSEARCH]').rpartition('[STARTSEARCH]')
    expression = regular_expression(query.strip(), patterns)
    if expression is None:
        return ['[FAILED]'], False
    # The text with a bar in place of each query, which keeps the words on both sides apart. The
    # patterns for the prompt begin with ^ and match once; of several records, the last one counts.
    outside = re.sub(r'\[STARTSEARCH\].*?(\[ENDSEARCH\]|$)', '|', before)
    answer = '[FAILED]'
    for match in expression.finditer(outside):
        for word in match.groups():                 # the alternatives of a pattern; one matched
            answer = word or answer
    return [answer], True


# --- samples become batches -----------------------------------------------------------------------

def draw(task, n, count, seed):
    """A list of samples. Deterministic in its arguments."""
    return task.samples(random.Random(repr(seed)), n, count)


def collate(task, samples):
    """Samples -> tokens and targets, both (B, L) int64, padded on the right with [PAD]. The target
    of a token is the token itself where the model has to predict it (from those before: train.py
    shifts by one), and IGNORE elsewhere: in the prompt, in padding, and in words with a star
    (paper, section 6)."""
    longest = max(len(prompt) + len(completion) for prompt, completion in samples)
    tokens = np.full((len(samples), longest), PAD)
    targets = np.full((len(samples), longest), IGNORE)
    for b, (prompt, completion) in enumerate(samples):
        ids = [task.tokens[word.removeprefix('*')] for word in prompt + completion]
        tokens[b, :len(ids)] = ids
        for t, word in enumerate(completion, len(prompt)):
            if not word.startswith('*'):
                targets[b, t] = ids[t]
    return tokens, targets


def fresh_samples(task, n, count, seed, held_out):
    """Like draw, but without samples whose prompt is held out: others of the same draw are repeated
    instead. held_out: a set of prompts as tuples. Raises ValueError if everything that is drawn is
    held out."""
    for attempt in range(10):
        drawn = draw(task, n, count, (*seed, attempt))
        fresh = [sample for sample in drawn if tuple(sample[0]) not in held_out]
        if fresh:
            return list(islice(cycle(fresh), count))
    raise ValueError(f'n={n} has so few prompts that all of them are held out: take a larger n or '
                     'hold out fewer')


def held_out_samples(task, n, count, tuning=False):
    """Samples that are not trained on, the same for every model. Results are reported on them; with
    tuning=True, they are others, on which constants are chosen and training is watched."""
    reported = draw(task, n, count, VALIDATION_SEED)
    if not tuning:
        return reported
    return fresh_samples(task, n, count, TUNING_SEED, {tuple(prompt) for prompt, _ in reported})


class Batches:
    """The training stream, for torch's DataLoader: batches[i] is batch number i, (tokens, targets)
    of collate, always the same, whichever process makes it. sizes: the n of each batch. held_out: a
    set of prompts as tuples, none of which is ever in a batch."""

    def __init__(self, task, sizes, batch_size, seed, held_out):
        self.task, self.sizes, self.batch_size = task, sizes, batch_size
        self.seed, self.held_out = seed, held_out

    def __getitem__(self, i):
        seed = (self.seed, i)
        samples = fresh_samples(self.task, self.sizes[i], self.batch_size, seed, self.held_out)
        return collate(self.task, samples)


# ==================================================================================================
# This is all that training needs. Below: another distribution of graphs, what each word of a
# trace is for, the four retrieval primitives, a Turing machine, and the command line.

def random_graph(rng, n):
    r"""A random recursive tree: each node is joined to a uniform earlier one. Half the time, one
    edge is then replaced so that a cycle closes. The edge above a node `cut` is removed, and two
    nodes u and v on the same side of the cut, not yet joined, are joined. Finally, the nodes are
    renamed at random.

          0                0
         / \              /          cut = 2 removes 0 - 2, which leaves 2, 4, 5 below the cut, and
        1   2            1   2       u = 4, v = 5 fits; so would 0 and 3, above it. All choices
       /   / \          /   / \      that fit are equally likely.
      3   4   5        3   4---5

    rng: random.Random. Returns edges and whether they form a tree. P(tree) = 1/2."""
    parent = [None] + [rng.randrange(i) for i in range(1, n)]
    edges = [(parent[i], i) for i in range(1, n)]
    is_tree = rng.random() < 0.5
    if not is_tree:
        cut, u, v = random_rewiring(rng, parent, edges)
        edges[cut - 1] = u, v
    name = rng.sample(range(n), n)
    return [(name[u], name[v]) for u, v in edges], is_tree


def random_rewiring(rng, parent, edges):
    """A node whose edge to its parent is to go, and the two nodes to be joined instead."""
    n = len(parent)
    while True:
        cut, u, v = rng.randrange(1, n), rng.randrange(n), rng.randrange(n)
        below = {cut}
        for i in range(cut + 1, n):                 # parents come before their children
            if parent[i] in below:
                below.add(i)
        same_side = (u in below) == (v in below)
        joined = (u, v) in edges or (v, u) in edges
        if u != v and same_side and not joined:
            return cut, u, v


GRAPHS['random'] = random_graph

KINDS = ('next neighbour', 'return to the parent', 'query', 'record', 'answer')


def kinds(completion):
    """What each word of an IsTree completion is for: a list of KINDS, None for the retriever's
    words. A node that the tour has visited before is a return; [EOS] belongs to the answer."""
    found, tour, in_query = [], set(), False
    for t, word in enumerate(completion):
        if word == '[STARTSEARCH]':
            in_query = True
        if word.startswith('*'):
            kind = None
        elif in_query:
            kind = 'query'
        elif '~' in completion[max(0, t - 1):t + 2]:                # `w ~ v`
            kind = 'record'
        elif not word.isdigit():
            kind = 'answer'
        elif word in tour:
            kind = 'return to the parent'
        else:
            kind = 'next neighbour'
            tour.add(word)
        if word == '[ENDSEARCH]':
            in_query = False
        found.append(kind)
    return found


# --- the four retrieval primitives (paper, section 4) ---------------------------------------------

class Primitive(Task):
    """A look-up in a sequence of numbers. A subclass draws a sequence and all n questions that can
    be asked about it, pairs (words of the query, answer). In the drawings of the subclasses, a word
    with a star is not predicted.

    As in multi-query associative recall (Zoology, Arora et al. 2023), a sample of the setup
    `direct` asks several questions, each once and in random order, with every answer right behind
    its query: all answers are terms of the loss, and none can be copied from an earlier one. Values
    are drawn with replacement, and only half of the questions are asked, so that crossing out the
    answers already given helps little (see chance). The setup `retrieval` asks a single question. A
    number is the same word whether it stands for a position, a count or itself; its place tells
    which."""
    setups = ('direct', 'retrieval')
    possible_n = range(2, 513)
    query_length = 1
    trace_length = 4                # words of the longest look-up
    smallest_n = 2                          # in a run that mixes several n

    def how_many_numbers(self, n):
        """So many that values rarely repeat, and that small n have enough prompts."""
        return max(64, 4 * n)

    def words_of(self, n):
        return numbers(self.how_many_numbers(n))

    def look_up(self, query, answer):
        """The completion's look-up in the setup `retrieval`, as text."""
        return f'[STARTSEARCH] {query} [ENDSEARCH] *{answer}'

    def sample(self, rng, n):
        sequence, questions = self.sequence(rng, n, self.how_many_numbers(self.n))
        asked = rng.sample(questions, self.how_many_questions(n))
        query, answer = asked[0]
        prompt = f'[BOS] {" ".join(map(str, sequence))} ~ {query}'.split()
        if self.setup == 'retrieval':
            return prompt, f'{self.look_up(query, answer)} [EOS] {answer}'.split()
        completion = [str(answer)]
        for query, answer in asked[1:]:
            completion += [f'*{word}' for word in query.split()]
            completion += [str(answer)]
        return prompt, completion

    def how_many_questions(self, n):
        return (n + 1) // 2 if self.setup == 'direct' else 1

    def longest(self, n):
        if self.setup == 'retrieval':
            return self.trace_length + 2
        return 1 + (self.query_length + 1) * (self.how_many_questions(n) - 1)

    def mixed(self):
        """Powers of 2, and n."""
        doubling = [2 ** i for i in range(1, 10)]
        return [n for n in doubling if self.smallest_n <= n < self.n] + [self.n]

    def chance(self, n):
        """The accuracy of the best player who never looks anything up, by simulation: who knows the
        n answers, but not to which question each belongs, crosses out those already given, and
        names the most frequent one that is left."""
        rng, accuracies = random.Random(0), []
        for _ in range(1000):
            _, questions = self.sequence(rng, n, self.how_many_numbers(self.n))
            answers = [answer for _, answer in rng.sample(questions, n)]
            for i in range(self.how_many_questions(n)):
                [(_, count)] = Counter(answers[i:]).most_common(1)
                accuracies.append(count / (n - i))
        return float(np.mean(accuracies))


class Index(Primitive):
    """Number i, counted from 0, of a sequence of n numbers. n=4:

        prompt      [BOS] 3 0 9 0 ~ 2
        direct      9 *1 0
        retrieval   [STARTSEARCH] - 2 [ENDSEARCH] *9 [EOS] 9
    """
    trace_length = 5
    patterns = ((r'- (\d+)', r'^\[BOS\](?: \d+){V} (\d+)'),)        # skip V numbers

    def sequence(self, rng, n, limit):
        sequence = rng.choices(range(limit), k=n)
        return sequence, [(str(i), number) for i, number in enumerate(sequence)]

    def look_up(self, query, answer):
        return super().look_up(f'- {query}', answer)


class Recall(Primitive):
    """Associative recall: the number after the query in a sequence of n different keys, each with a
    value behind it, drawn from a second range of numbers. n=3:

        prompt      [BOS] 1 79 5 76 2 81 ~ 2
        direct      81 *5 76
        retrieval   [STARTSEARCH] 2 [ENDSEARCH] *81 [EOS] 81
    """
    patterns = ((r'(\d+)', r'^\[BOS\][^~]*? V (\d+)'),)             # the number after the first V

    def words_of(self, n):
        return numbers(2 * self.how_many_numbers(n))

    def sequence(self, rng, n, limit):
        keys = rng.sample(range(limit), n)
        values = rng.choices(range(limit, 2 * limit), k=n)
        sequence = []
        for key, value in zip(keys, values):
            sequence += [key, value]
        return sequence, [(str(key), value) for key, value in zip(keys, values)]


class Cgram(Primitive):
    """c-gram retrieval (here c=2): the number after the two query numbers, in that order, in a
    sequence of n+2. Each number occurs twice (for odd n, one of them once), shuffled until the n
    pairs of neighbours that can be asked for differ. Looking up only the second number of a query
    leaves two answers. n=4:

        prompt      [BOS] 7 1 7 5 1 5 ~ 7 5
        direct      1 *1 *7 5
        retrieval   [STARTSEARCH] 7 5 [ENDSEARCH] *1 [EOS] 1
    """
    possible_n = range(4, 513)
    smallest_n = 4
    query_length = 2
    trace_length = 5
    patterns = ((r'(\d+) (\d+)', r'^\[BOS\][^~]*? V W (\d+)'),)     # the number after the first V W

    def how_many_numbers(self, n):
        """(Of 64, the Transformer did not learn to look them up. They repeat anyway.)"""
        return n + 4

    def sequence(self, rng, n, limit):
        sequence = (2 * rng.sample(range(limit), (n + 3) // 2))[:n + 2]
        while len({*zip(sequence[:n], sequence[1:])}) < n:
            rng.shuffle(sequence)
        triples = zip(sequence, sequence[1:], sequence[2:])
        return sequence, [(f'{a} {b}', c) for a, b, c in triples]


class Counting(Primitive):
    """How often the query occurs in a sequence. n numbers, n even, form secret pairs: one occurs c
    times and the other 3-c, for a uniform c from 0 to 3, so that all counts are equally likely and
    the sequence has 3n/2 numbers. In `retrieval` the model asks for a first, second, ... occurrence
    until there is none. n begins at 4: with n=2, the answer 3 has only 64 prompts, and all of them
    would be held out. n=4; the pairs are 4 (twice) and 2 (once), 5 (three times) and 9 (never):

        prompt      [BOS] 4 5 2 5 4 5 ~ 2
        direct      1 *4 2
        retrieval   [STARTSEARCH] 2 ~ 1 [ENDSEARCH] *2
                    [STARTSEARCH] 2 ~ 2 [ENDSEARCH] *[FAILED] [EOS] 1
    """
    possible_n = range(4, 513, 2)
    smallest_n = 4
    largest_count = 3
    trace_length = 6 * (largest_count + 1)
    # V itself, if it occurs at least W times
    patterns = ((r'(\d+) ~ (\d+)', r'^\[BOS\](?:(?: (?!V )\d+)* (V)\b){W}'),)

    def sequence(self, rng, n, limit):
        names, counts = rng.sample(range(limit), n), []
        for c in rng.choices(range(self.largest_count + 1), k=n // 2):
            counts += [c, self.largest_count - c]
        sequence = []
        for name, count in zip(names, counts):
            sequence += [name] * count
        rng.shuffle(sequence)
        return sequence, [(str(name), count) for name, count in zip(names, counts)]

    def look_up(self, query, answer):
        found = [query] * answer + ['[FAILED]']
        asked = [super(Counting, self).look_up(f'{query} ~ {k}', x) for k, x in enumerate(found, 1)]
        return ' '.join(asked)


TASKS |= {'index': Index, 'recall': Recall, 'cgram': Cgram, 'counting': Counting}


# --- a Turing machine (paper, section 5: with a retriever, an RNN can work any) ------------------

# Is the tape a palindrome? The machine takes the first letter (it erases and carries it), runs
# right to the end, compares the last letter and erases it, runs left, and takes the next one. A
# machine begins in the state of its first row, on cell 1. X and Y are any letters. If several rows
# fit, the first one counts.
#   state       reads  writes  moves  next state
PALINDROME = '''
    take        X      _       +1     right-X
    take        _      _        0     [TRUE]
    right-X     Y      Y       +1     right-X
    right-X     _      _       -1     compare-X
    compare-X   X      _       -1     left
    compare-X   Y      Y        0     [FALSE]
    compare-X   _      _        0     [TRUE]
    left        X      X       -1     left
    left        _      _       +1     take
'''


def transitions(machine, letters):
    """The table of a machine as a dict {(state, symbol): [what it writes, move, next state]}, with
    all letters in place of X and Y."""
    table = {}
    for row in machine.strip().splitlines():
        for x, y in product(letters, repeat=2):
            state, symbol, *then = row.replace('X', x).replace('Y', y).split()
            table.setdefault((state, symbol), then)
    return table


class Turing(Task):
    """What does the machine answer? The tape has n letters and a blank, `_`, in numbered cells.
    Each step is written down: the state, the cell, the symbol there, and, if the machine changes
    that symbol, a record. In `retrieval`, the symbol is looked up: the last one recorded for the
    cell, or else the prompt's. So a model with a retriever need remember only its last step. n=3:

        prompt      [BOS] 1 h 2 c 3 h 4 _ [EOS]

        cot         take 1 h 1 ~ _ right-h 2 c right-h 3 h right-h 4 _ compare-h 3 h 3 ~ _
                    left 2 c left 1 _ take 2 c 2 ~ _ right-c 3 _ compare-c 2 _ [EOS] [TRUE]

        retrieval   take [STARTSEARCH] 1 [ENDSEARCH] *h 1 ~ _
                    right-h [STARTSEARCH] 2 [ENDSEARCH] *c
                    right-h [STARTSEARCH] 3 [ENDSEARCH] *h ... [EOS] [TRUE]

    Half of the tapes are palindromes. Each of the others is one but for a single letter, so that
    the length tells nothing, and only the parities of all letters' counts do. A subclass may have
    other letters, or the table of another machine and tapes for it."""
    setups = ('cot', 'retrieval')
    letters = 'abcdefgh'
    table = transitions(PALINDROME, letters)
    patterns = ((r'(\d+)', r'^\[BOS\][^[]*? V ([a-z_])| V ~ ([a-z_])\b'),)

    def words_of(self, n):
        states = {state for state, symbol in self.table}
        return [*numbers(n + 2), *self.letters, '_', *sorted(states)]

    def sample(self, rng, n):
        tape = rng.choices(self.letters, k=n)
        for i in range(n // 2):
            tape[-1 - i] = tape[i]
        if rng.random() < 0.5:
            i = rng.randrange(n // 2)
            tape[i] = rng.choice(self.letters.replace(tape[i], ''))
        return self.write(tape)

    def write(self, tape):
        """The sample of a tape, a sequence of letters."""
        cells = dict(enumerate([*tape, '_'], 1))
        prompt = ['[BOS]']
        for cell, symbol in cells.items():
            prompt += [str(cell), symbol]
        step = '{} {} {}' if self.setup == 'cot' else '{} [STARTSEARCH] {} [ENDSEARCH] *{}'
        (state, _), *_ = self.table
        trace, cell = [], 1
        while state not in ('[TRUE]', '[FALSE]'):
            symbol = cells[cell]
            trace += step.format(state, cell, symbol).split()
            written, move, state = self.table[state, symbol]
            if written != symbol:
                trace += [str(cell), '~', written]
                cells[cell] = written
            cell += int(move)
        return prompt + ['[EOS]'], trace + ['[EOS]', state]

    def chance(self, n):
        return 1 / 2

    def mixed(self):
        return half_and_whole(self.n, smallest=7)       # (there are too few shorter palindromes)

    def longest(self, n):
        """That of any palindrome: (n+1)(n+2)/2 steps and n records."""
        return len(self.write(self.letters[0] * n)[1])


class Turing26(Turing):
    """The same machine with 26 letters."""
    letters = 'abcdefghijklmnopqrstuvwxyz'
    table = transitions(PALINDROME, letters)


TASKS |= {'turing': Turing, 'turing26': Turing26}


# --- the command line -----------------------------------------------------------------------------

N_HELD_OUT = 5000               # samples of an export's validation split: as many as in the paper


def print_samples():
    """A sample of every task in each of its setups."""
    for name, kind in TASKS.items():
        for setup in kind.setups:
            n = 7 if name == 'istree' else 4
            [(prompt, completion)] = draw(kind(n, setup), n, 1, seed=2)
            print(f'{name}, setup {setup}')
            print('  prompt     ', *prompt)
            print('  completion ', *completion, end='\n\n')


def export(task, count, seed, split):
    """Print `count` samples as JSON, one a line, for use elsewhere. `retrieved`: the indices of the
    words of the completion that the model does not write. Raises ValueError if there are not as
    many validation samples, or if the training samples run out."""
    if split == 'validation':
        if count > N_HELD_OUT:
            raise ValueError(f'the validation split has {N_HELD_OUT} samples')
        samples = held_out_samples(task, task.n, count)
    else:
        held_out = set()
        for tuning in (False, True):
            held_out |= {tuple(p) for p, _ in held_out_samples(task, task.n, N_HELD_OUT, tuning)}
        samples = []
        while len(samples) < count:
            samples += fresh_samples(task, task.n, 100, (seed, len(samples) // 100), held_out)
    for prompt, completion in samples[:count]:
        words = [word.removeprefix('*') for word in completion]
        retrieved = [i for i, word in enumerate(completion) if word.startswith('*')]
        print(json.dumps(dict(prompt=' '.join(prompt), completion=' '.join(words),
                              retrieved=retrieved)))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description='Prints a sample of every task, or exports samples of one.')
    parser.add_argument('--task', choices=TASKS, help='export samples of this task')
    parser.add_argument('--setup', choices=SETUPS, default='retrieval')
    parser.add_argument('--n', type=int, default=14, help='size of the samples')
    parser.add_argument('--count', type=int, default=1000, help='how many samples')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--split', choices=('train', 'validation'), default='train')
    arguments = parser.parse_args()
    if not arguments.task:
        print_samples()
        sys.exit()
    try:
        task = TASKS[arguments.task](arguments.n, arguments.setup)
        export(task, arguments.count, arguments.seed, arguments.split)
    except ValueError as problem:
        parser.error(str(problem))
    except BrokenPipeError:         # `| head` has seen enough; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
