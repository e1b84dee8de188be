"""The data: tasks, samples, the retriever, the training stream. Knows nothing about models.

IsTree (paper, sections 5 and 6): is a graph with n nodes and n-1 edges, given as a list of edges,
a tree? A node is one token, so `14` is one token. For n=5 and the edges 2-1 4-0 4-3 4-1, each setup
writes after the prompt:

  prompt     [BOS] 2 - 1 4 - 0 4 - 3 4 - 1 [EOS]

  direct     [TRUE]

  cot        0 4 3 4 1 2 1 4 0 [EOS] [TRUE]                  the Euler tour of a depth-first search

  retrieval  0 [STARTSEARCH] 0 ~ [ENDSEARCH] *[FAILED]       the same search: 0 has no parent,
             [STARTSEARCH] 0 - [ENDSEARCH] *4                its first neighbour is 4,
             [STARTSEARCH] 4 ~ [ENDSEARCH] *[FAILED]         which has no parent, so it is new:
             4 ~ 0                                           record that its parent is 0
             4 [STARTSEARCH] 4 ~ [ENDSEARCH] *0              enter 4: its parent is 0,
             [STARTSEARCH] 4 - [ENDSEARCH] *0                which is also its first neighbour;
             [STARTSEARCH] 4 - 0 [ENDSEARCH] *3              the neighbour after 0 is 3,
             [STARTSEARCH] 3 ~ [ENDSEARCH] *[FAILED] 3 ~ 4 3 ... [EOS] [TRUE]

In `retrieval`, everything that must be looked up is a query between [STARTSEARCH] and [ENDSEARCH]. The
retriever, a regular expression run over the text so far, writes the token marked * after it, or [FAILED]:

  v ~        who is the parent of v? (x of the last record `v ~ x` outside queries)
  v -        which is the first neighbour of v? (the other end of the first edge with v in the prompt)
  v - w      which neighbour of v comes after w?

The other tasks: the four retrieval primitives (section 4), which are pure look-ups in the context, each with
an example in its docstring, and two-hop questions in the manner of HotpotQA (section 6) about a small
invented world.

Try it:  python data.py          prints a sample of each task in each of its setups
"""
import math
import random
import re
from collections import Counter
from functools import lru_cache, partial
from typing import Callable, NamedTuple

import numpy as np

SPECIALS = ('-', '~', '[PAD]', '[BOS]', '[EOS]', '[TRUE]', '[FALSE]',
            '[STARTSEARCH]', '[ENDSEARCH]', '[FAILED]')
EDGE, RECORD, PAD, BOS, EOS, TRUE, FALSE, START, END, FAILED = range(len(SPECIALS))
NODE = len(SPECIALS)                    # number k, or node k of a graph, is token NODE + k
ROOT = NODE                             # node 0, where every search begins
MAX_NODES = 4096
WORDS = SPECIALS + tuple(map(str, range(MAX_NODES)))
TOKENS = {word: token for token, word in enumerate(WORDS)}
SETUPS = ('direct', 'cot', 'retrieval')
MAX_COUNT = 3                           # the largest answer of the task counting
# random.Random(repr(seed)) draws the samples; the seeds of training are (seed, number of the batch, attempt)
VALIDATION_SEED, TUNING_SEED = (2402, 18510), 'tuning'


def decode(tokens, words=WORDS):
    """Token ids (L,) -> text, words separated by spaces, padding left out."""
    return ' '.join([words[t] for t in tokens if t != PAD])


# --- graphs: edges [(u, v), ...], and whether they form a tree --------------------------------------

def two_star(rng, n_nodes):
    """The paper's distribution (appendix; 'binary' in the authors' code). p: the nodes in random order. p[0]
    and p[1] are centres, each other node is a leaf of one of them by a fair coin, and one more edge joins two
    successive leaves of p:

        2   3   4          2   3   4
         \\ /    |           \\ /    |       left: the leaves have different centres: a tree;
          0     1            0     1       right: they have the same centre: a triangle, and an
          |     |            |     |       unconnected rest. Both have n-1 edges.
          5 --- 6            5--2  6

    (Node 2 is drawn twice on the right.) rng: random.Random. P(tree) = 1/2."""
    p = rng.sample(range(n_nodes), n_nodes)
    leaves, centres = p[2:], rng.choices(p[:2], k=n_nodes - 2)
    i = rng.randrange(n_nodes - 3)
    return [*zip(centres, leaves), (leaves[i], leaves[i + 1])], centres[i] != centres[i + 1]


def random_graph(rng, n_nodes):
    """A random recursive tree, in which each node is joined to a uniform earlier one. Half the time, one edge
    is then replaced so that a cycle closes: the edge above a node `cut` is removed, and two nodes u and v on
    the same side of the cut, not yet joined, are joined. Finally the nodes are renamed at random.

          0                0
         / \\              /          cut = 2 removes 0 - 2, which leaves 2, 4 and 5 below the cut, and
        1   2            1   2       u = 4, v = 5 fits; so would 0 and 3, above it. All choices that fit
       /   / \\          /   / \\      are equally likely.
      3   4   5        3   4---5

    rng: random.Random. P(tree) = 1/2."""
    parent = [None] + [rng.randrange(i) for i in range(1, n_nodes)]
    edges = [(parent[i], i) for i in range(1, n_nodes)]
    is_tree = fits = rng.random() < 0.5
    while not fits:
        cut, u, v = rng.randrange(1, n_nodes), rng.randrange(n_nodes), rng.randrange(n_nodes)
        below = {cut}
        for i in range(cut + 1, n_nodes):               # parents come before their children
            if parent[i] in below:
                below.add(i)
        fits = u != v and (u in below) == (v in below) and (u, v) not in edges and (v, u) not in edges
    if not is_tree:
        edges[cut - 1] = u, v
    name = rng.sample(range(n_nodes), n_nodes)
    return [(name[u], name[v]) for u, v in edges], is_tree


DISTRIBUTIONS = {'two_star': two_star, 'random': random_graph}


# --- the paper's two algorithms, on one graph -------------------------------------------------------

def adjacency(edges, n_nodes):
    """Edges [(u, v), ...] -> {node: its neighbours in the order of the edges}, all nodes as tokens."""
    neighbours = {NODE + v: [] for v in range(n_nodes)}
    for u, v in edges:
        neighbours[NODE + u].append(NODE + v)
        neighbours[NODE + v].append(NODE + u)
    return neighbours


def cot_trace(neighbours):
    """Algorithm 1: the Euler tour of a depth-first search from node 0. It ends before the first node that has
    been visited and is not the parent, or with the last node that can be reached (then the graph is a tree if
    these are all). neighbours: from adjacency. Returns a list of at most 2n-1 tokens."""
    tour, parent, v = [], {ROOT: None}, ROOT
    remaining = {v: iter(others) for v, others in neighbours.items()}
    while v is not None:
        tour.append(v)
        w = next((w for w in remaining[v] if w != parent[v]), None)
        if w is None:                                   # no neighbour remains: return
            v = parent[v]
        elif w in parent:                               # visited before: a cycle
            break
        else:
            parent[w], v = v, w                         # enter w
    return tour


def retrieval_trace(neighbours):
    """Algorithm 2: the same search, but whatever has to be looked up is asked for. neighbours: from
    adjacency. Returns a list of at most 37n-26 tokens (a test counts them), including those that the
    retriever writes."""
    answers = {}                                        # query -> what the retriever will find
    for v, others in neighbours.items():
        queries = [(v, EDGE)] + [(v, EDGE, w) for w in others]
        answers.update(zip(queries, others))            # (zip drops the last query, which finds nothing)
    trace, stack, prev = [], [ROOT], None

    def ask(*query):
        answer = answers.get(query, FAILED)
        trace.extend((START, *query, END, answer))
        return answer

    while stack:
        v = stack[-1]
        trace.append(v)
        parent = ask(v, RECORD)
        w = ask(v, EDGE) if prev in (None, parent) else ask(v, EDGE, prev)
        if w == parent != FAILED:                       # not straight back up
            w = ask(v, EDGE, parent)
        prev = v
        if w == FAILED:                                 # no neighbour remains: return
            stack.pop()
        elif ask(w, RECORD) == FAILED and w != ROOT:    # (the root has no record either)
            trace.extend((w, RECORD, v))                # unvisited: record its parent and enter it
            answers[w, RECORD] = v
            stack.append(w)
        else:                                           # visited before: a cycle
            break
    return trace


# --- samples ----------------------------------------------------------------------------------------

def istree_lengths(n_nodes):
    """The n of a run that mixes several: half as many nodes (but 6, smaller graphs are too few), and all."""
    return tuple(sorted({max(n_nodes // 2, min(6, n_nodes)), n_nodes}))


def istree_prompt_length(n_nodes):
    """Tokens of the prompt, [BOS] and [EOS] included."""
    return 3 * (n_nodes - 1) + 2


def istree_max_length(n_nodes, setup):
    """Tokens of the longest sample, which is always a tree's (its whole search is written down)."""
    trace = {'direct': 1, 'cot': 2 * n_nodes - 1 + 2, 'retrieval': 37 * n_nodes - 26 + 2}
    return istree_prompt_length(n_nodes) + trace[setup]


def assemble(samples, start):
    """Samples, lists of token ids with prompts of `start` tokens -> tokens and loss_mask, as of
    generate_istree."""
    tokens = np.full((len(samples), max(map(len, samples))), PAD)
    for row, sample in zip(tokens, samples):
        row[:len(sample)] = sample
    loss_mask = tokens != PAD
    loss_mask[:, :start] = False
    loss_mask[:, 1:] &= tokens[:, :-1] != END           # the retriever writes what follows [ENDSEARCH]
    return tokens, loss_mask


def sample(edges, is_tree, setup):
    """Edges in the order of the prompt, [(u, v), ...], and their label -> the sample, a list of token ids."""
    prompt = [BOS]
    for u, v in edges:
        prompt += NODE + max(u, v), EDGE, NODE + min(u, v)
    answer = TRUE if is_tree else FALSE
    if setup == 'direct':
        return [*prompt, EOS, answer]
    trace = cot_trace if setup == 'cot' else retrieval_trace
    return [*prompt, EOS, *trace(adjacency(edges, len(edges) + 1)), EOS, answer]


def generate_istree(batch_size, n_nodes, setup, seed, distribution='two_star', n=None):
    """A batch of IsTree samples, drawn as in the header of this file. Deterministic in its arguments.

    seed: an int, or a tuple or string. n: nodes of these graphs, by default n_nodes (see Task).
    Returns tokens (B, L) int64, right-padded with [PAD] to the longest sample of the batch; loss_mask (B, L)
    bool, True where a token is to be predicted: after the prompt, except padding and what the retriever
    writes (paper, section 6); is_tree (B,) bool. Raises ValueError if arguments are unknown or impossible."""
    batch_size, n_nodes, n = check('istree', batch_size, n_nodes, n, setup, distribution)
    rng, samples, labels = generator(seed), [], []
    for _ in range(batch_size):
        edges, is_tree = DISTRIBUTIONS[distribution](rng, n)
        rng.shuffle(edges)
        samples.append(sample(edges, is_tree, setup))
        labels.append(is_tree)
    return *assemble(samples, istree_prompt_length(n)), np.array(labels)


KINDS = ('next neighbour', 'return to the parent', 'query', 'record', 'answer')


def token_kinds(tokens, loss_mask):
    """What each token that an IsTree model has to predict is for. tokens, loss_mask (B, L) -> (B, L) indices
    of KINDS, -1 where loss_mask is False. A node that the tour has visited before is a return; [EOS] belongs
    to the answer."""
    kinds = np.full(tokens.shape, -1)
    for b, row in enumerate(tokens.tolist()):
        tour, in_query = set(), False
        for t in np.flatnonzero(loss_mask[b]):
            in_query |= row[t] == START
            if in_query:
                kind = 'query'
                in_query = row[t] != END
            elif RECORD in row[t - 1:t + 2]:            # w ~ v
                kind = 'record'
            elif row[t] < NODE:
                kind = 'answer'
            else:
                kind = 'return to the parent' if row[t] in tour else 'next neighbour'
                tour.add(row[t])
            kinds[b, t] = KINDS.index(kind)
    return kinds


# --- the retriever ----------------------------------------------------------------------------------

# The regular expressions (Python's re) that answer queries; V and W stand for the query's numbers. Paste one
# into a regex tester together with a sample; the answer is the group that matched.
QUERIES = {
    'istree': {                                         # paper, section 5.1
        # x in the latest record `V ~ x`; the space before V keeps 1 from matching in 11, the lookahead lets
        # matches overlap, as in `4 ~ 4 ~ 0`
        r'(\d+) ~': r' V ~(?= (\d+))',
        # the other end of the prompt's first edge at V, or of its first after edge {V, W}; [^[]*? does not
        # leave the prompt, since [EOS] begins with a bracket
        r'(\d+) -': r'^\[BOS\][^[]*? (?:V - (\d+)|(\d+) - V\b)',
        r'(\d+) - (\d+)': r'^\[BOS\][^[]*? (?:V - W|W - V)\b[^[]*? (?:V - (\d+)|(\d+) - V\b)'},
    'primitive': {                                      # only the sequence is searched, all before the ~
        r'- (\d+)': r'^\[BOS\](?: \d+){V} (\d+)',       # index: skip V numbers
        r'(\d+)': r'^\[BOS\][^~]*? V (\d+)',            # recall: the number after the first V
        r'(\d+) (\d+)': r'^\[BOS\][^~]*? V W (\d+)',    # cgram: the number after the first V W
        # counting: V itself, if it occurs at least W times
        r'(\d+) ~ (\d+)': r'^\[BOS\](?:(?: (?!V )\d+)* (V)\b){W}'},
}


@lru_cache(maxsize=2**16)
def query_pattern(query, kind):
    """The compiled regular expression for a query, e.g. `3 - 7`, or None if the query is malformed."""
    for form, pattern in QUERIES[kind].items():
        if numbers := re.fullmatch(form, query):
            for letter, number in zip('VW', numbers.groups()):
                pattern = pattern.replace(letter, number)
            return re.compile(pattern)
    return None


def retrieve(text, kind='istree'):
    """Answer the query at the end of a text with a regular expression, run over all that stands before it.

    text: the words of the context joined by spaces, ending in `[STARTSEARCH] query [ENDSEARCH]`. kind: one of
    QUERIES. Returns the answer, a list of one token id, and whether the query is well-formed. The answer is
    the last match outside queries, [FAILED] if there is none or the query is malformed."""
    before, _, query = text.removesuffix('[ENDSEARCH]').rpartition('[STARTSEARCH]')
    if (pattern := query_pattern(query.strip(), kind)) is None:
        return [FAILED], False
    answer = '[FAILED]'
    for m in pattern.finditer(before):
        start, end = (before.rfind(word, 0, m.start()) for word in ('[STARTSEARCH]', '[ENDSEARCH]'))
        # not inside a query: the last one before it has ended (and a group matched: counting's {0} has none)
        if start <= end and m.lastindex:
            answer = m[m.lastindex]
    return [TOKENS[answer]], True


# --- the retrieval primitives ------------------------------------------------------------------------

# Each function draws a sequence of numbers below `numbers` and all n questions that can be asked about it, as
# (query, answer). rng: random.Random. In the drawings, targets stand under the input from which they are
# predicted, and the retriever writes the tokens marked *.
#
# As in multi-query associative recall (Zoology, Arora et al. 2023), a sample of the setup direct asks several
# questions, each once and in random order, with every answer right behind its query: all answers are terms of
# the loss, and none can be copied from an earlier one. Values are drawn with replacement, and only half of
# the questions are asked, so that crossing out the answers already given helps little (see best_guess). The
# setup retrieval asks a single question. A number is the same token whether it stands for a position, a count
# or itself; its place tells which.

def index(rng, n, numbers):
    """Index (paper, section 4): number i, counted from 0, of a sequence of n numbers. n=4:

        direct     inputs   [BOS] 3 0 9 0 ~ 2 9 1
                   targets                  9   0
        retrieval           [BOS] 3 0 9 0 ~ 2 [STARTSEARCH] - 2 [ENDSEARCH] *9 [EOS] 9
    """
    sequence = rng.choices(range(numbers), k=n)
    return sequence, [*enumerate(sequence)]


def recall(rng, n, numbers):
    """Associative recall (paper, section 4): the number after the query in a sequence of n different keys,
    each with a value behind it, drawn from a second range of numbers. n=3:

        direct     inputs   [BOS] 1 79 5 76 2 81 ~ 2  81 5
                   targets                         81    76
        retrieval           [BOS] 1 79 5 76 2 81 ~ 5 [STARTSEARCH] 5 [ENDSEARCH] *76 [EOS] 76
    """
    keys, values = rng.sample(range(numbers), n), rng.choices(range(numbers, 2 * numbers), k=n)
    pairs = [*zip(keys, values)]
    return [number for pair in pairs for number in pair], pairs


def cgram(rng, n, numbers):
    """c-gram retrieval (paper, section 4; here c=2): the number after the two query numbers, in that order,
    in a sequence of n+2. Each number occurs twice (for odd n, one of them once), shuffled until the n pairs
    of neighbours that can be asked for differ. Looking up only the second number of a query leaves two
    answers. n=4:

        direct     inputs   [BOS] 7 1 7 5 1 5 ~ 7 5 1 1 7
                   targets                        1     5
        retrieval           [BOS] 7 1 7 5 1 5 ~ 7 5 [STARTSEARCH] 7 5 [ENDSEARCH] *1 [EOS] 1
    """
    sequence = (2 * rng.sample(range(numbers), (n + 3) // 2))[:n + 2]
    while len({*zip(sequence[:n], sequence[1:])}) < n:
        rng.shuffle(sequence)
    return sequence, [(f'{a} {b}', c) for a, b, c in zip(sequence, sequence[1:], sequence[2:])]


def counting(rng, n, numbers):
    """Counting (paper, section 4): how often the query occurs in a sequence. n numbers, n even, form secret
    pairs: one occurs c times and the other 3-c, for a uniform c from 0 to MAX_COUNT=3, so that all counts are
    equally likely and the sequence has 3n/2 numbers. In retrieval the model asks for a first, second, ...
    occurrence until there is none. n begins at 4: with n=2, the answer 3 has only 64 prompts, and all of them
    would be held out. n=4; the pairs are 4 (twice) and 2 (once), 5 (three times) and 9 (never):

        direct     inputs   [BOS] 4 5 2 5 4 5 ~ 9 0 4
                   targets                      0   2
        retrieval           [BOS] 4 5 2 5 4 5 ~ 4 [STARTSEARCH] 4 ~ 1 [ENDSEARCH] *4 [STARTSEARCH] 4 ~ 2
                            [ENDSEARCH] *4 [STARTSEARCH] 4 ~ 3 [ENDSEARCH] *[FAILED] [EOS] 2
    """
    names, counts = rng.sample(range(numbers), n), []
    for c in rng.choices(range(MAX_COUNT + 1), k=n // 2):
        counts += c, MAX_COUNT - c
    sequence = [name for name, count in zip(names, counts) for _ in range(count)]
    rng.shuffle(sequence)
    return sequence, [*zip(names, counts)]


PRIMITIVES = {'index': index, 'recall': recall, 'cgram': cgram, 'counting': counting}


def numbers_for(task, n_nodes):
    """How many numbers there are: so many that values rarely repeat, and that small n have enough prompts. In
    c-grams they repeat anyway; with 64, the Transformer did not learn to look them up."""
    return n_nodes + 4 if task == 'cgram' else max(64, 4 * n_nodes)


def n_questions(n, setup):
    """How many of the n questions a sample asks."""
    return (n + 1) // 2 if setup == 'direct' else 1


def look_up(task, query, answer):
    """The trace of the setup retrieval, as text: what the model asks, and what the retriever writes."""
    if task == 'counting':
        found = [query] * answer + ['[FAILED]']
        return ' '.join([f'[STARTSEARCH] {query} ~ {k} [ENDSEARCH] {x}' for k, x in enumerate(found, 1)])
    return f'[STARTSEARCH] {"- " * (task == "index")}{query} [ENDSEARCH] {answer}'


def generate_primitive(task, batch_size, n_nodes, setup, seed, distribution='uniform', n=None):
    """A batch of samples of a primitive with n questions, by default n_nodes, over the vocabulary of n_nodes.
    The prompt ends with the first query. Arguments, tokens, loss_mask and errors as in generate_istree, but
    in the setup direct loss_mask is True on the answers only. The third result is the answers (B, asked)."""
    batch_size, n_nodes, n = check(task, batch_size, n_nodes, n, setup, distribution)
    rng, samples, answers = generator(seed), [], []
    for _ in range(batch_size):
        sequence, questions = PRIMITIVES[task](rng, n, numbers_for(task, n_nodes))
        text = f'[BOS] {" ".join(map(str, sequence))} ~'
        asked = rng.sample(questions, n_questions(n, setup))
        for query, answer in asked:
            trace = '' if setup == 'direct' else look_up(task, query, answer) + ' [EOS] '
            text += f' {query} {trace}{answer}'
        samples.append([TOKENS[word] for word in text.split()])
        answers.append([NODE + answer for _, answer in asked])
    start = TASKS[task].prompt_length(n)
    tokens, loss_mask = assemble(samples, start)
    if setup == 'direct':
        loss_mask[:] = False
        loss_mask[:, start::len(str(query).split()) + 1] = True         # (all queries are equally long)
    return tokens, loss_mask, np.array(answers)


def best_guess(task, n_nodes, n, setup='direct', samples=1000):
    """Accuracy of the best player who never looks anything up: who knows the n answers, but not to which
    question each belongs, crosses out those given, and names the most frequent one left. By simulation."""
    if task not in PRIMITIVES:
        return TASKS[task].chance(n)
    rng, accuracies = random.Random(0), []
    for _ in range(samples):
        _, questions = PRIMITIVES[task](rng, n, numbers_for(task, n_nodes))
        answers = [answer for _, answer in rng.sample(questions, n)]
        for i in range(n_questions(n, setup)):
            (_, count), = Counter(answers[i:]).most_common(1)
            accuracies.append(count / (n - i))
    return float(np.mean(accuracies))


# --- the training stream and the held-out samples ----------------------------------------------------

class Batches:
    """The training stream, for torch's DataLoader: batches[i] is batch number i, tokens (batch_size, L) and
    loss_mask (batch_size, L), made when asked for and always the same, whichever process makes it. The n of
    its samples is n_nodes or, if `joining` is a number of batches, one of the task's lengths, each in turn:
    the smallest at first, and the larger ones join one by one until then; if negative, the other way round.
    mix: a tuple of n in place of the task's lengths. largest: once all have joined, the share of the batches
    that the largest n gets (0: each n in turn), spread evenly; the others share the rest in turn.

    held_out: a list of validation tokens (N, L). A training sample with one of their prompts is replaced by
    another one of its batch. Raises ValueError if everything is held out."""

    def __init__(self, task, batch_size, n_nodes, setup, seed, distribution=None, held_out=(), joining=None,
                 mix=(), largest=0.0):
        self.task, self.batch_size, self.n_nodes = task, batch_size, n_nodes
        self.setup, self.seed, self.joining = setup, seed, joining or 0
        self.distribution = distribution or TASKS[task].distributions[0]
        self.lengths = (n_nodes,) if joining is None else tuple(mix) or TASKS[task].lengths(n_nodes)
        self.largest = largest
        # (cut to the prompt of every n: a row is then in it with its own, and the others do no harm)
        self.held_out = {row[:TASKS[task].prompt_length(n)].tobytes()
                         for tokens in held_out for row in tokens
                         for n in {*TASKS[task].lengths(n_nodes), *self.lengths}}

    def __getitem__(self, i):
        lengths = sorted(self.lengths, reverse=self.joining < 0)
        if i < abs(self.joining):
            lengths = lengths[:1 + i * len(lengths) // abs(self.joining)]
        elif self.largest and len(lengths) > 1:
            *others, largest = sorted(lengths)
            done = math.ceil(i * self.largest)          # batches of the largest before this one
            n = largest if i * self.largest % 1 < self.largest else others[(i - done) % len(others)]
            lengths = [n]
        tokens, loss_mask, _ = self.samples(lengths[i % len(lengths)], (self.seed, i))
        length = np.flatnonzero(loss_mask.any(0))[-1] + 1
        return tokens[:, :length], loss_mask[:, :length]

    def samples(self, n, seed):
        """A batch of samples of size n, none of them held out. Returns what generate_istree returns."""
        start = TASKS[self.task].prompt_length(n)
        for attempt in range(10):
            batch = TASKS[self.task].generate(self.batch_size, self.n_nodes, self.setup, (*seed, attempt),
                                              self.distribution, n)
            others = [i for i, row in enumerate(batch[0]) if row[:start].tobytes() not in self.held_out]
            if others:
                return tuple(part[np.resize(others, self.batch_size)] for part in batch)
        raise ValueError(f'n={n} has so few prompts that all are in the validation set: '
                         'take a larger n or a smaller validation set')


def validation_set(task, size, n_nodes, setup, distribution=None, n=None, tuning=False):
    """The held-out samples, the same for every seed and model. tuning: others, for choosing constants, none
    of which has a prompt of the set that is reported for the same arguments. distribution: by default the
    task's first. Returns what generate_istree returns."""
    distribution = distribution or TASKS[task].distributions[0]
    reported = TASKS[task].generate(size, n_nodes, setup, VALIDATION_SEED, distribution, n)
    if not tuning:
        return reported
    others = Batches(task, size, n_nodes, setup, None, distribution, held_out=[reported[0]])
    return others.samples(n or n_nodes, (TUNING_SEED,))


# --- two-hop questions: HotpotQA's task in a small world ----------------------------------------------
#
#   Ada Tarn: Velm once, Orsel now.                     ten paragraphs, `title: text`, half about people
#   Amber Tower: Odo Dahl wrote it in Lomar. ...        and half about their novels, one each
#   Question: Where did the author of Amber Tower live once?
#
#   gold, full   Thought: Amber Tower: Odo Dahl wrote it in Lomar. Odo Dahl: Ravik once, Elsto now.
#                Answer: Ravik
#
#   retrieval    Search: ^Amber Tower
#                Found: *Amber Tower: Odo Dahl wrote it in Lomar.*
#                Search: ^Odo Dahl
#                Found: *Odo Dahl: Ravik once, Elsto now.*
#                Answer: Ravik
#
# The conditions of eval_hotpot.py: gold shows only the two paragraphs that matter, full shows all of them.
# Retrieval shows all too, but they need not be recalled: the model writes regular expressions, and the
# retriever writes what they find (between *). One model learns all three; the first label after the question
# is given and says which it is. For train.py, n_nodes is the number of paragraphs, the setup is always
# `retrieval`, since the retriever runs live, and the distribution is a condition, or `mixed`: every question
# under all three, in turn. A word with its colon is one token; so is each punctuation mark, and a line
# break with the mark before it.

HOTPOT_CONDITIONS = ('gold', 'full', 'retrieval')
HOTPOT_DISTRIBUTIONS = ('mixed', *HOTPOT_CONDITIONS)
HOTPOT_PARAGRAPHS, HOTPOT_FOUND = 10, 2                 # of a question; most that a query finds
HOTPOT_TRACE = 30                                       # tokens of the longest conversation after the prompt
FIRST, LAST, ADJECTIVE, NOUN, TOWN = map(str.split, (
    'Ada Bram Cleo Dario Edda Finn Gala Hugo Ines Jory Kaya Odo',
    'Arden Bell Corvin Dahl Esker Falk Hale Jarl Lund Moor Rusk Tarn',
    'Amber Bitter Copper Distant Early Frozen Golden Hollow Iron Jade Open Silver',
    'Anchor Bridge Compass Door Engine Forest Garden Harbour Island Jewel Lantern Tower',
    'Aldmoor Brenick Caldry Dunwell Elsto Farrowby Grimsend Hestrel Ilvane Jorvale Kelsund Lomar '
    'Mirrick Nethby Orsel Pellora Quarne Ravik Stennis Torvik Ulmere Velm Wexby Zelle'))
# The same ids as SPECIALS, spelled differently: [EOS] is 'Answer:', [TRUE] 'yes', [FALSE] 'no', [STARTSEARCH]
# 'Search:', [ENDSEARCH] 'Found:' and [FAILED] 'nothing'. So generation needs no special case.
HOTPOT_WORDS = ('-', '~', '[PAD]', '[BOS]', 'Answer:', 'yes', 'no', 'Search:', 'Found:', 'nothing',
                'Question:', 'Thought:', '\n', '.\n', '?\n', *'. , ^ | wrote it in once now'.split(),
                *'Where did does the author of live Did Do and one town'.split(),
                *FIRST, *LAST, *ADJECTIVE, *NOUN, *TOWN, *[f'{word}:' for word in (*LAST, *NOUN)])
HOTPOT_TOKENS = {word: token for token, word in enumerate(HOTPOT_WORDS)}


def hotpot_layout(text):
    """Words joined by spaces -> text as it would be written, without [BOS]."""
    return re.sub(r' (?=[.,?|\n])|(?<=[\n^|]) ', '', text.removeprefix('[BOS] '))


def hotpot_decode(tokens):
    """Token ids -> text, without padding and [BOS]."""
    return hotpot_layout(' '.join([HOTPOT_WORDS[t] for t in tokens if t not in (PAD, BOS)]))


def hotpot_encode(text):
    """The inverse: text -> list of token ids. Raises ValueError on an unknown word."""
    try:
        return [HOTPOT_TOKENS[word] for word in re.findall(r'\w+:?|[.?]?\n|\S', text)]
    except KeyError as unknown:
        raise ValueError(f'unknown word {unknown}: this small world has {len(HOTPOT_WORDS)} words')


def hotpot_record(rng, n_paragraphs=HOTPOT_PARAGRAPHS):
    """Draw a question (rng: random.Random) as a record in the layout of HotpotQA's official file, see
    eval_hotpot.load_hotpot; supporting_facts are in the order in which they are needed. Three in four
    questions go from a novel to its author (bridge), the others compare two people. There are only two last
    names, and two nouns in titles, so that names are alike. All towns differ, unless two people share one."""
    half = n_paragraphs // 2

    def names(firsts, seconds):
        return rng.sample([f'{first} {second}' for second in rng.sample(seconds, 2)
                           for first in rng.sample(firsts, half // 2 + 1)], half)

    people, novels = names(FIRST, LAST), names(ADJECTIVE, NOUN)
    towns = rng.sample(TOWN, 3 * half)
    written_in, lived = towns[:half], dict(once=towns[half:2 * half], now=towns[2 * half:])
    i, j = rng.sample(range(half), 2)                   # about novel i and its author, or people i and j
    when = 'once' if rng.random() < 0.5 else 'now'
    if rng.random() < 0.75:
        kind, supporting, answer = 'bridge', (novels[i], people[i]), lived[when][i]
        question = f'Where {"did" if when == "once" else "does"} the author of {novels[i]} live {when}?'
    else:
        kind, supporting, answer = 'comparison', (people[i], people[j]), rng.choice(('yes', 'no'))
        question = f'{"Did" if when == "once" else "Do"} {people[i]} and {people[j]} live in one town {when}?'
        if answer == 'yes':
            lived[when][j] = lived[when][i]
    context = [[novel, [f'{person} wrote it in {town}.']]
               for novel, person, town in zip(novels, people, written_in)]
    context += [[person, [f'{once} once, {now} now.']]
                for person, once, now in zip(people, lived['once'], lived['now'])]
    rng.shuffle(context)
    return dict(_id=f'small-world-{rng.getrandbits(48):012x}', question=question, answer=answer, type=kind,
                context=context, supporting_facts=[[title, 0] for title in supporting])


def hotpot_records(size, n_paragraphs=HOTPOT_PARAGRAPHS, seed=VALIDATION_SEED):
    """A list of records: those from which the samples of the same seed are made."""
    rng = generator(seed)
    return [hotpot_record(rng, n_paragraphs) for _ in range(size)]


def hotpot_paragraphs(record, gold=False):
    """[(title, text), ...] of the context; gold: of the supporting ones only."""
    supporting = dict(record['supporting_facts'])
    return [(title, ' '.join([sentence.strip() for sentence in sentences]))
            for title, sentences in record['context'] if not gold or title in supporting]


def hotpot_lines(paragraphs):
    """Paragraphs, (title, text) pairs, as a model reads them."""
    return ''.join([f'{title}: {text}\n' for title, text in paragraphs]) or 'nothing\n'


def hotpot_prompt(question, paragraphs):
    """What a model reads before it is asked to search or to think."""
    return f'{hotpot_lines(paragraphs)}Question: {question}\n'


def hotpot_label(condition):
    """The label that begins the first line a model writes."""
    return 'Search:' if condition == 'retrieval' else 'Thought:'


def hotpot_conversation(record, condition):
    """A question of the small world, see the example above: [(text, whether the model writes it), ...]"""
    gold = hotpot_paragraphs(record, gold=True)
    titles = [title for title, _ in record['supporting_facts']]
    shown = gold if condition == 'gold' else hotpot_paragraphs(record)
    pieces = [(hotpot_prompt(record['question'], shown) + hotpot_label(condition), False)]
    if condition != 'retrieval':
        recalled = ' '.join([f'{title}: {dict(gold)[title]}' for title in titles])
        return [*pieces, (f' {recalled}\nAnswer: {record["answer"]}', True)]
    hops = [titles] if record['type'] == 'comparison' else [[title] for title in titles]
    label = ''                                          # the first one stands in the prompt
    for hop in hops:
        query = '|'.join([f'^{title}' for title in hop])
        found = hotpot_lines([(title, text) for title, text in gold if title in hop])
        pieces += [(f'{label} {query}\nFound:', True), (f' {found}', False)]
        label = 'Search:'
    return [*pieces, (f'Answer: {record["answer"]}', True)]


def hotpot_prompt_length(n_paragraphs):
    """Tokens of the prompt: [BOS], paragraphs (9 about a novel, 8 about a person), the longest question (12)
    and two labels."""
    return 1 + n_paragraphs // 2 * (9 + 8) + 12 + 2


def generate_hotpot(batch_size, n_paragraphs, setup, seed, distribution='mixed', n=None):
    """A batch of questions, see the example above. Returns tokens (B, L), shorter prompts padded on the left;
    loss_mask (B, L), True on what the model writes and on one [PAD] after it, so that it learns to stop;
    answers (B,), token ids. Raises ValueError as generate_istree does."""
    batch_size, n_paragraphs, _ = check('hotpot', batch_size, n_paragraphs, n, setup, distribution)
    conditions = HOTPOT_CONDITIONS if distribution == 'mixed' else (distribution,)
    records = hotpot_records(-(-batch_size // len(conditions)), n_paragraphs, seed)
    asked = [(record, condition) for record in records for condition in conditions][:batch_size]
    start = hotpot_prompt_length(n_paragraphs)
    tokens = np.full((batch_size, start + HOTPOT_TRACE + 1), PAD)
    loss_mask = np.zeros(tokens.shape, bool)
    for i, (record, condition) in enumerate(asked):
        (prompt, _), *pieces = hotpot_conversation(record, condition)
        prompt = [BOS, *hotpot_encode(prompt)]
        tokens[i, start - len(prompt):start] = prompt
        end = start
        for text, by_model in pieces:
            begin, written = end, hotpot_encode(text)
            end += len(written)
            tokens[i, begin:end], loss_mask[i, begin:end] = written, by_model
        loss_mask[i, end] = True
    return tokens, loss_mask, np.array([HOTPOT_TOKENS[record['answer']] for record, _ in asked])


def search_paragraphs(text):
    """Answer the query at the end of a text, words joined by spaces that end with `Search: query Found:`: the
    first HOTPOT_FOUND paragraphs of the prompt in which the query, a regular expression, is found, or
    `nothing`. Returns their token ids, and whether the query is well-formed. (What would make `re` slow
    cannot be written with the words of this small world.)"""
    paragraphs, _, conversation = hotpot_layout(text).partition('Question:')
    # what stands on the line of the last Search:, if any
    query = ['', *conversation.split('Search:')[1:]][-1].removesuffix('Found:').partition('\n')[0].strip()
    try:
        pattern = re.compile(query)
    except re.error:
        query = ''
    found = [line for line in paragraphs.splitlines(True) if query and pattern.search(line)][:HOTPOT_FOUND]
    return hotpot_encode(''.join(found) or 'nothing\n'), query != ''


# --- all tasks, and what their arguments may be ------------------------------------------------------

class Task(NamedTuple):
    """What a task provides. n_nodes fixes the vocabulary; n, at most n_nodes, is the size of a sample. The
    answer is the last token of a sample."""
    generate: Callable      # (batch_size, n_nodes, setup, seed, distribution, n) -> tokens, loss_mask, labels
    vocab_size: Callable    # n_nodes -> number of tokens
    prompt_length: Callable  # n -> tokens of the prompt, the same for all samples of that n
    max_length: Callable    # (n, setup) -> tokens of the longest sample
    chance: Callable        # n -> accuracy of a random one of the possible answers
    sizes: range            # the possible n_nodes
    retrieve: Callable = retrieve                       # text that ends in a query -> token ids, well-formed?
    lengths: Callable = lambda n_nodes: (n_nodes,)      # n_nodes -> the n of a run that mixes several
    distributions: tuple = tuple(DISTRIBUTIONS)
    setups: tuple = SETUPS
    words: tuple = WORDS    # token id -> word


def primitive(task, sequence, query, trace, chance, vocabularies=1, smallest=2, step=1):
    """The Task of a retrieval primitive. sequence: n -> its length; query: the length of a query;
    trace: that of the longest trace. vocabularies: ranges of numbers used. smallest: the smallest n; step: 2
    if n must be even."""
    def prompt_length(n):
        return 1 + sequence(n) + 1 + query

    def max_length(n, setup):
        after_prompt = trace + 2 if setup == 'retrieval' else 1 + (query + 1) * (n_questions(n, setup) - 1)
        return prompt_length(n) + after_prompt

    def lengths(n_nodes):
        return *[2 ** i for i in range(1, 10) if smallest <= 2 ** i < n_nodes], n_nodes

    return Task(partial(generate_primitive, task),
                lambda n_nodes: NODE + vocabularies * numbers_for(task, n_nodes), prompt_length, max_length,
                chance, range(smallest, MAX_NODES // 8 + 1, step), partial(retrieve, kind='primitive'),
                lengths, ('uniform',), ('direct', 'retrieval'))


TASKS = {
    'istree': Task(generate_istree, lambda n: NODE + n, istree_prompt_length, istree_max_length,
                   lambda n: 1 / 2, range(4, MAX_NODES + 1), lengths=istree_lengths),
    'index': primitive('index', lambda n: n, query=1, trace=5, chance=lambda n: 1 / n),
    'recall': primitive('recall', lambda n: 2 * n, query=1, trace=4, chance=lambda n: 1 / n, vocabularies=2),
    'cgram': primitive('cgram', lambda n: n + 2, query=2, trace=5, chance=lambda n: 2 / (n + 2), smallest=4),
    'counting': primitive('counting', lambda n: MAX_COUNT * n // 2, query=1, trace=6 * (MAX_COUNT + 1),
                          chance=lambda n: 1 / (MAX_COUNT + 1), smallest=4, step=2),
    # hotpot's chance: guess yes or no, or one of the towns of the paragraphs shown (3 under gold,
    # else 3 n / 2), mixed
    'hotpot': Task(generate_hotpot, lambda n: len(HOTPOT_WORDS), hotpot_prompt_length,
                   lambda n, setup: hotpot_prompt_length(n) + HOTPOT_TRACE,
                   lambda n: 1 / 4 * 1 / 2 + 3 / 4 * (1 / 3 * 1 / 3 + 2 / 3 * 2 / (3 * n)),
                   range(4, 2 * (len(TOWN) // 3) + 1, 2), search_paragraphs,
                   distributions=HOTPOT_DISTRIBUTIONS, setups=('retrieval',), words=HOTPOT_WORDS),
}


def check(task, batch_size, n_nodes, n, setup, distribution):
    """Return batch_size, n_nodes and n, by default n_nodes, as ints. Raise ValueError, naming the argument,
    on what a task cannot generate."""
    def whole(name, value, known):
        if not isinstance(value, (int, np.integer)) or int(value) not in known:
            raise ValueError(f'{name}={value!r:.40} is impossible: give a whole number from {known[0]} to '
                             f'{known[-1]}' + ', an even one' * (known.step == 2))
        return int(value)

    made = TASKS[task]
    for name, value, known in (('setup', setup, made.setups),
                               ('distribution', distribution, made.distributions)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f'unknown {name} {value!r:.40}: choose one of {", ".join(known)}')
    batch_size = whole('batch_size', batch_size, range(1, 10**9))
    n_nodes = whole('n_nodes', n_nodes, made.sizes)
    sizes = range(made.sizes[0], n_nodes + 1, made.sizes.step)
    return batch_size, n_nodes, n_nodes if n is None else whole('n', n, sizes)


def generator(seed):
    """The random.Random of a seed: a whole number, a text or a tuple of those. Raises ValueError if not."""
    def plain(part):                                    # repr(np.int64(1)) is not that of 1
        if isinstance(part, tuple):
            return tuple(map(plain, part))
        if not isinstance(part, (int, str, np.integer)):
            raise ValueError(f'seed={seed!r:.40} is impossible: give a whole number, a text or a tuple')
        return int(part) if isinstance(part, np.integer) else part
    return random.Random(repr(plain(seed)))


if __name__ == '__main__':
    for name, task in TASKS.items():
        for setup in task.setups:
            for distribution in HOTPOT_CONDITIONS if name == 'hotpot' else task.distributions[:1]:
                print(f'{name}, setup {setup}, distribution {distribution}, n_nodes 6:')
                print(decode(task.generate(1, 6, setup, 1, distribution)[0][0], task.words), end='\n\n')
