"""The data: tasks, vocabulary, traces, batches and the retriever. Knows nothing about models.

IsTree (paper, sections 5 and 6): is a graph with n nodes and n-1 edges, given as a list of edges,
a tree? One token per node, so `14` is one token. For n_nodes=5 and the edges 2-1 4-0 4-3 4-1,
each setup writes after the prompt:

  prompt     [BOS] 2 - 1 4 - 0 4 - 3 4 - 1 [EOS]

  direct     [TRUE]

  cot        0 4 3 4 1 2 1 4 0 [EOS] [TRUE]                  the Euler tour of a depth-first search

  retrieval  0 [STARTSEARCH] 0 ~ [ENDSEARCH] *[FAILED]       the same search; what must be looked up is
             [STARTSEARCH] 0 - [ENDSEARCH] *4                queried, and the retriever writes the token
             [STARTSEARCH] 4 ~ [ENDSEARCH] *[FAILED]         marked *: 0 has no parent, its first
             4 ~ 0                                           neighbour is 4, which has no parent yet: record
             4 [STARTSEARCH] 4 ~ [ENDSEARCH] *0              `4 ~ 0`, enter 4. Its first neighbour is
             [STARTSEARCH] 4 - [ENDSEARCH] *0                its parent 0, so ask for the one after
             [STARTSEARCH] 4 - 0 [ENDSEARCH] *3              edge {4,0}: 3, unvisited ...
             [STARTSEARCH] 3 ~ [ENDSEARCH] *[FAILED] 3 ~ 4 3 ... [EOS] [TRUE]

The four retrieval primitives (section 4) are nothing but a look-up in the context: index, recall, cgram
and counting, each drawn at its function below. They have the setups direct and retrieval.

Try it:  python data.py          prints one sample of each task and setup
"""
import random
import re
from functools import lru_cache, partial
from typing import Callable, NamedTuple

import numpy as np

SPECIALS = ('-', '~', '[PAD]', '[BOS]', '[EOS]', '[TRUE]', '[FALSE]',
            '[STARTSEARCH]', '[ENDSEARCH]', '[FAILED]')
EDGE, RECORD, PAD, BOS, EOS, TRUE, FALSE, START, END, FAILED = range(len(SPECIALS))
NODE = len(SPECIALS)                                # number k, or node k of a graph, is token NODE + k
MAX_NODES = 4096
WORDS = SPECIALS + tuple(map(str, range(MAX_NODES)))
TOKENS = {word: token for token, word in enumerate(WORDS)}
SETUPS = ('direct', 'cot', 'retrieval')
MAX_COUNT = 3                                       # of the task counting
QUERIES = 32                                        # per sample of a retrieval primitive
# how the seeds of random numbers begin, so that no training seed is ever one of the others
TRAINING, VALIDATION_SEED, TUNING_SEED = 0, (1, 2402, 18510), (2, 2402, 18510)


def vocab_size(n_nodes):
    """Number of tokens of a task with n_nodes nodes."""
    return NODE + n_nodes


def decode(tokens, words=WORDS):
    """Token ids (L,) -> text, tokens separated by blanks, padding left out."""
    return ' '.join([words[t] for t in tokens if t != PAD])


# --- graphs: (B, n-1, 2) edges, (B,) labels ------------------------------------------------------

def permutations(rng, batch_size, n):
    """(batch_size, n) int64, each row a random order of 0..n-1."""
    return rng.permuted(np.tile(np.arange(n), (batch_size, 1)), axis=1)


def two_star(rng, batch_size, n_nodes):
    """The paper's distribution (appendix; 'binary' in the authors' code). p[0] and p[1] are centres,
    each other node is joined to one of them by a fair coin, and one more edge joins two leaves:

        2   3   4          2   3   4
         \\ /    |           \\ /    |       left: leaves of different centres are joined, a tree;
          0     1            0     1       right: leaves of the same centre, a triangle and an
          |     |            |     |       unconnected rest. Both have n-1 edges.
          5 --- 6            5--2  6

    Returns edges (B, n-1, 2) int64 and is_tree (B,) bool, P(tree) = 1/2."""
    p = permutations(rng, batch_size, n_nodes)
    side = rng.integers(0, 2, (batch_size, n_nodes - 2))
    edges = np.empty((batch_size, n_nodes - 1, 2), np.int64)
    edges[:, :-1, 0] = np.where(side, p[:, 1:2], p[:, :1])
    edges[:, :-1, 1] = p[:, 2:]
    rows, i = np.arange(batch_size), rng.integers(0, n_nodes - 3, batch_size)
    edges[:, -1, 0], edges[:, -1, 1] = p[rows, i + 2], p[rows, i + 3]
    return edges, side[rows, i] != side[rows, i + 1]


def random_graph(rng, batch_size, n_nodes):
    """Half the time a random recursive tree: node i is joined to a uniform earlier one. Otherwise one of
    its edges is replaced, which closes a cycle: the edge above a node `cut` is taken away, and two nodes
    on the same side of the cut, u and v, are joined. In the end the nodes are renamed at random.

          0                 0              cut = 2 takes 0 - 2 away; below the cut are 2, 4 and 5. There, u = 4
         / \\               /               and v = 5 can be joined, above it no two nodes that are not joined
        1   2             1   2            already. cut, u and v are drawn again until they fit, so that every
       /   / \\           /   / \\           possible choice is as likely.
      3   4   5         3   4---5

    Returns edges (B, n-1, 2) int64 and is_tree (B,) bool, P(tree) = 1/2."""
    graphs, is_tree = np.empty((batch_size, n_nodes - 1, 2), np.int64), rng.integers(0, 2, batch_size) == 1
    for b in range(batch_size):
        parent = [None, *rng.integers(0, np.arange(1, n_nodes)).tolist()]
        edges = [(parent[i], i) for i in range(1, n_nodes)]
        fits = is_tree[b]
        while not fits:
            cut, u, v = rng.integers((1, 0, 0), n_nodes).tolist()
            below = {cut}
            for i in range(cut + 1, n_nodes):                   # parents come before their children
                if parent[i] in below:
                    below.add(i)
            fits = u != v and (u in below) == (v in below) and parent[u] != v and parent[v] != u
            edges[cut - 1] = (u, v) if fits else edges[cut - 1]
        graphs[b] = rng.permutation(n_nodes)[np.array(edges)]
    return graphs, is_tree


DISTRIBUTIONS = {'two_star': two_star, 'random': random_graph}


# --- the paper's two algorithms, on one graph ------------------------------------------------------

ROOT = NODE                                         # node 0, where every search begins


def adjacency(edges, n_nodes):
    """[(u, v), ...] -> {node: its neighbours, in the order of the edges}, every node given by its token."""
    neighbours = {NODE + v: [] for v in range(n_nodes)}
    for u, v in edges:
        neighbours[NODE + u].append(NODE + v)
        neighbours[NODE + v].append(NODE + u)
    return neighbours


def cot_trace(neighbours):
    """Algorithm 1: the Euler tour of a depth-first search from node 0, cut short at the first node that has been
    visited and is not the parent. neighbours: see adjacency. Returns a list of tokens, 2n-1 at most."""
    tour, parent, v = [], {ROOT: None}, ROOT
    remaining = {v: iter(others) for v, others in neighbours.items()}
    while v is not None:
        tour.append(v)
        w = next((w for w in remaining[v] if w != parent[v]), None)
        if w is None:                               # nothing remains: return
            v = parent[v]
        elif w in parent:                           # visited before: a cycle
            break
        else:
            parent[w], v = v, w                     # enter w
    return tour


def retrieval_trace(neighbours):
    """Algorithm 2: the same search, where all that must be looked up is asked for. neighbours: see adjacency.
    Returns a list of tokens, 37n-26 at most, those that the retriever writes included."""
    answers = {}                                    # what the retriever would find: query -> token
    for v, others in neighbours.items():
        queries = [(v, EDGE), *[(v, EDGE, w) for w in others]]
        answers.update(zip(queries, others))
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
        if w == parent != FAILED:                   # not straight back up
            w = ask(v, EDGE, parent)
        prev = v
        if w == FAILED:                             # no neighbour is left: return
            stack.pop()
        elif ask(w, RECORD) == FAILED and w != ROOT:
            trace.extend((w, RECORD, v))            # unvisited: record its parent and enter it
            answers[w, RECORD] = v
            stack.append(w)
        else:                                       # visited before: a cycle
            break
    return trace


# --- samples ---------------------------------------------------------------------------------------

def prompt_length(n_nodes):
    """Tokens of the prompt, [BOS] and [EOS] included."""
    return 3 * (n_nodes - 1) + 2


def max_length(n_nodes, setup):
    """Tokens of the longest sample, which is always a tree's (its whole search is written down)."""
    trace = {'direct': 1, 'cot': 2 * n_nodes - 1 + 2, 'retrieval': 37 * n_nodes - 26 + 2}
    return prompt_length(n_nodes) + trace[setup]


def check(batch_size, n_nodes, limits, setup, setups, distribution, distributions):
    """Raise ValueError, naming the argument, on what a task cannot generate."""
    for name, value, known in (('setup', setup, setups), ('distribution', distribution, distributions)):
        if value not in known:
            raise ValueError(f'unknown {name} {value!r}: choose one of {", ".join(known)}')
    for name, value, low, high in (('n_nodes', n_nodes, *limits), ('batch_size', batch_size, 1, None)):
        if not isinstance(value, (int, np.integer)) or value < low or (high and value > high):
            raise ValueError(f'{name}={value!r} is impossible: give a whole number '
                             + (f'from {low} to {high}' if high else f'of at least {low}'))


def assemble(samples, start):
    """A batch of samples, lists of token ids whose prompts take `start` tokens. Returns tokens and loss_mask, see
    generate."""
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


def generate(batch_size, n_nodes, setup, seed, distribution='two_star', n=None):
    """A batch of IsTree samples, drawn as in the header of this file. Deterministic in its arguments.

    seed: an int or a tuple of ints. n: None or n_nodes. Returns tokens (B, L) int64, right-padded with [PAD]
    to the longest sample of the batch; loss_mask (B, L) bool, True where the token is to be predicted: after
    the prompt, except padding and what the retriever writes (paper, section 6); is_tree (B,) bool.
    Raises ValueError on an unknown setup or distribution, or an impossible batch_size, n_nodes or n."""
    check(batch_size, n_nodes, (4, MAX_NODES), setup, SETUPS, distribution, DISTRIBUTIONS)
    if n not in (None, n_nodes):
        raise ValueError(f'n={n!r} is impossible: the graphs of this task have n_nodes={n_nodes} nodes')
    rng = np.random.default_rng(seed)
    graphs, is_tree = DISTRIBUTIONS[distribution](rng, batch_size, n_nodes)
    samples = []
    for edges, label in zip(graphs, is_tree):
        rng.shuffle(edges)                                  # the order of the prompt
        samples.append(sample(edges.tolist(), label, setup))
    return *assemble(samples, prompt_length(n_nodes)), is_tree


KINDS = ('next neighbour', 'return to the parent', 'query', 'record', 'answer')


def token_kinds(tokens, loss_mask):
    """What the tokens that an IsTree model has to predict are for: tokens and loss_mask (B, L) -> (B, L) indices of
    KINDS, -1 where loss_mask is False. A node of the tour that has been written before is a return; [EOS] is part of the
    answer."""
    in_query = np.cumsum(tokens == START, 1) > np.cumsum(tokens == END, 1) - (tokens == END)
    record = tokens == RECORD
    record[:, 1:] |= tokens[:, :-1] == RECORD
    record[:, :-1] |= tokens[:, 1:] == RECORD
    kinds = np.select([in_query, record, tokens < NODE], [2, 3, 4], 0)
    tour, rows = loss_mask & (kinds == 0), np.arange(len(tokens))
    written = np.zeros((len(tokens), tokens.max() + 1), bool)
    for t in range(tokens.shape[1]):
        kinds[:, t] += tour[:, t] & written[rows, tokens[:, t]]
        written[rows, tokens[:, t]] |= tour[:, t]
    return np.where(loss_mask, kinds, -1)


# --- the retrieval primitives ----------------------------------------------------------------------

# Each function draws (sequence (B, S), queries (B, QUERIES, Q), answers (B, QUERIES), trace (B, T)), all
# token ids; the trace is the retrieval setup's for the last query, the one that counts. Drawn with QUERIES=2.
#
# The queries before the last stand answered in the prompt, and in the setup direct they are learned from, too: with
# one answer per sample a hybrid was still at chance after 96,000 samples of recall at n=8. An answer stands right
# behind its query, where attention finds the pair soonest: with a token between them the Transformer stayed at chance.
# With small n the last query has mostly been asked before (n=12: in 94% of the samples; never in counting), so that
# its answer may be looked up there as well: retrieval from the context all the same, but for index not by position.
# Numbers come from twice as many as occur, so that which ones do is a first thing to learn. Within a context every
# answer is as likely as any other.

def index(rng, batch_size, n):
    """Index (paper, section 4): token number i, from 0, of a sequence of n different numbers below 2n. n=5:

        direct     inputs   [BOS] 3 0 9 7 2 ~ 4 2 2
                   targets                    2   9

        retrieval  inputs   [BOS] 3 0 9 7 2 ~ 4 2 2             [STARTSEARCH] - 2           [ENDSEARCH] 9     [EOS]
                   targets                        [STARTSEARCH] -             2 [ENDSEARCH]             [EOS] 9

    Prompt n+65 tokens with QUERIES=32, then the answer, in retrieval 6 tokens later; vocabulary 10+2n; chance 1/n."""
    sequence = permutations(rng, batch_size, 2 * n)[:, :n] + NODE
    i = rng.integers(0, n, (batch_size, QUERIES))
    answers = np.take_along_axis(sequence, i, 1)
    return sequence, i[:, :, None] + NODE, answers, columns(START, EDGE, i[:, -1] + NODE, END, answers[:, -1])


def recall(rng, batch_size, n):
    """Associative recall (paper, section 4): the token after the query in a sequence of n pairs of a key
    (below 2n) and its value (from 2n to 4n-1), all different. n=3:

        direct     inputs   [BOS] 1 9 5 6 2 11 ~ 2  11 5
                   targets                       11    6

        retrieval  inputs   [BOS] 1 9 5 6 2 11 ~ 2 11 5             [STARTSEARCH] 5           [ENDSEARCH] 6     [EOS]
                   targets                            [STARTSEARCH] 5             [ENDSEARCH]             [EOS] 6

    Prompt 2n+65 tokens with QUERIES=32, then the answer, in retrieval 5 tokens later; vocabulary 10+4n; chance 1/n."""
    keys, values = (permutations(rng, batch_size, 2 * n)[:, :n] + NODE + low for low in (0, 2 * n))
    i = rng.integers(0, n, (batch_size, QUERIES))
    queries, answers = np.take_along_axis(keys, i, 1), np.take_along_axis(values, i, 1)
    sequence = np.stack((keys, values), 2).reshape(batch_size, -1)
    return sequence, queries[:, :, None], answers, columns(START, queries[:, -1], END, answers[:, -1])


def cgram(rng, batch_size, n):
    """c-gram retrieval (paper, section 4; here c=2): the token after the first occurrence of the two query
    tokens, in that order, in a sequence of n numbers below n, each twice (if n is odd, one of them once),
    in random order. Knowing what follows the second token alone leaves two answers. n=8:

        direct     inputs   [BOS] 0 7 1 7 5 1 0 5 ~ 7 5 1 7 1
                   targets                            1     7

        retrieval  inputs   [BOS] 0 7 1 7 5 1 0 5 ~ 7 5 1 7 1             [STARTSEARCH] 7 1           [ENDSEARCH] 7     [EOS]
                   targets                                  [STARTSEARCH] 7             1 [ENDSEARCH]             [EOS] 7

    Prompt n+97 tokens with QUERIES=32, then the answer, in retrieval 6 tokens later; vocabulary 10+n; chance 2/n."""
    sequence = np.take_along_axis(permutations(rng, batch_size, n), permutations(rng, batch_size, n) // 2, 1) + NODE
    grams = sequence[:, :-2] * len(WORDS) + sequence[:, 1:-1]           # a pair of tokens as one number
    i = rng.integers(0, n - 2, (batch_size, QUERIES))
    first = (grams[:, None] == np.take_along_axis(grams, i, 1)[:, :, None]).argmax(2)
    a, b, answers = (np.take_along_axis(sequence, first + k, 1) for k in range(3))
    return sequence, np.stack((a, b), 2), answers, columns(START, a[:, -1], b[:, -1], END, answers[:, -1])


def counting(rng, batch_size, n):
    """Counting (paper, section 4): how often the query occurs in a sequence of n numbers below n. The numbers
    go in secret pairs that occur c and 3-c times, so that every count from 0 to MAX_COUNT=3 is as likely.
    In retrieval the model asks for a first, second, ... occurrence until there is none. n=6:

        direct     inputs   [BOS] 4 2 4 2 2 5 ~ 5 1 4
                   targets                      1   2

        retrieval  inputs   [BOS] 4 2 4 2 2 5 ~ 5 1 4             [STARTSEARCH] 4 ~ 1           [ENDSEARCH] 4
                   targets                          [STARTSEARCH] 4             ~ 1 [ENDSEARCH]             [STARTSEARCH]

                   inputs   [STARTSEARCH] 4 ~ 2           [ENDSEARCH] 4
                   targets  4             ~ 2 [ENDSEARCH]             [STARTSEARCH]

                   inputs   [STARTSEARCH] 4 ~ 3           [ENDSEARCH] [FAILED] [EOS]
                   targets  4             ~ 3 [ENDSEARCH]             [EOS]    2

    Prompt n+65 tokens with QUERIES=32, then the answer, in retrieval 7 tokens later for 0 and 6 more for each
    one more; vocabulary 10+n; chance 1/4."""
    names, places = permutations(rng, batch_size, n), permutations(rng, batch_size, n)
    c = rng.integers(0, MAX_COUNT + 1, (batch_size, n // MAX_COUNT + 1))        # the last pair is a filler
    pair = places // MAX_COUNT
    which = 2 * pair + (places % MAX_COUNT >= np.take_along_axis(c, pair, 1))
    last = rng.integers(0, n // MAX_COUNT, (batch_size, 1))                     # earlier queries ask other pairs
    before = (last + rng.integers(1, n // MAX_COUNT, (batch_size, QUERIES - 1))) % (n // MAX_COUNT)
    asked = 2 * np.hstack((before, last)) + rng.integers(0, 2, (batch_size, QUERIES))
    counts = np.take_along_axis(c, asked // 2, 1)
    counts = np.where(asked % 2, MAX_COUNT - counts, counts)
    sequence, queries = np.take_along_axis(names, which, 1) + NODE, np.take_along_axis(names, asked, 1) + NODE
    q, k, count = queries[:, -1:], np.arange(1, MAX_COUNT + 2), counts[:, -1:]
    trace = np.stack(np.broadcast_arrays(START, q, RECORD, k + NODE, END, np.where(k <= count, q, FAILED)), 2)
    trace = np.where((k <= count + 1)[:, :, None], trace, -1).reshape(batch_size, -1)
    return sequence, queries[:, :, None], counts + NODE, trace


def columns(*parts):
    """Tokens and columns of tokens (B,) -> (B, number of parts)."""
    return np.stack(np.broadcast_arrays(*parts), 1)


LOWEST = {index: 2, recall: 2, cgram: 4, counting: 2 * MAX_COUNT}     # smallest n


def generate_primitive(draw, batch_size, n_nodes, setup, seed, distribution='uniform', n=None):
    """A batch of index, recall, cgram or counting samples (draw) of size n, by default n_nodes. Arguments, tokens,
    loss_mask and errors as in generate, but that in the setup direct loss_mask is also True on the answers
    within the prompt; the third result is the last answers (B,), token ids."""
    check(batch_size, n_nodes, (4, MAX_NODES // 4), setup, ('direct', 'retrieval'), distribution, ('uniform',))
    n = n_nodes if n is None else n
    if not LOWEST[draw] <= n <= n_nodes:
        raise ValueError(f'n={n!r} is impossible: give a whole number from {LOWEST[draw]} to n_nodes={n_nodes}')
    sequence, queries, answers, trace = draw(np.random.default_rng(seed), batch_size, n)
    asked = np.concatenate((queries, answers[:, :, None]), 2)
    column = np.full((batch_size, 1), BOS)
    prompt = np.hstack((column, sequence, np.full_like(column, RECORD), asked.reshape(batch_size, -1)[:, :-1]))
    last = [answers[:, -1:]] if setup == 'direct' else [trace, np.full_like(column, EOS), answers[:, -1:]]
    samples = [row[row >= 0] for row in np.hstack((prompt, *last))]
    tokens, loss_mask = assemble(samples, prompt.shape[1])
    if setup == 'direct':
        loss_mask[:, ::-asked.shape[2]][:, :QUERIES] = True             # from the last answer backwards
    return tokens, loss_mask, answers[:, -1]


# --- the retriever -------------------------------------------------------------------------------

@lru_cache(maxsize=2**16)
def query_pattern(query):
    """The Python regular expression that answers a query, or None if the query is malformed. Paste it
    into a regex tester together with a context; the answer is the group that matched.

        3 ~      3 ~(?= (\\d+))                                              (it begins with a space)
        3 -     ^\\[BOS\\][^[]*? (?:3 - (\\d+)|(\\d+) - 3\\b)
        3 - 7   ^\\[BOS\\][^[]*? (?:3 - 7|7 - 3)\\b[^[]*? (?:3 - (\\d+)|(\\d+) - 3\\b)
    """
    if not (parts := re.fullmatch(r'(\d+) (?:(~)|-(?: (\d+))?)', query)):
        return None
    v, record, w = parts.groups()
    if record:
        return re.compile(rf' {v} ~(?= (\d+))')
    edge = rf' (?:{v} - (\d+)|(\d+) - {v}\b)'
    after = rf' (?:{v} - {w}|{w} - {v})\b[^[]*?' if w else ''
    return re.compile(rf'^\[BOS\][^[]*?{after}{edge}')


@lru_cache(maxsize=2**16)
def primitive_pattern(query):
    """The same for the retrieval primitives, where only the sequence, all before the prompt's ~, is searched:

        - 2     ^\\[BOS\\](?: \\d+){2} (\\d+)                  index: skips 2 tokens
        3       ^\\[BOS\\][^~]*? 3 (\\d+)                     recall: the token after the first 3,
        3 2     ^\\[BOS\\][^~]*? 3 2 (\\d+)                   cgram: or the first 3 2
        4 ~ 2   ^\\[BOS\\](?:(?: (?!4 )\\d+)* (4)\\b){2}        counting: 4 itself, if it occurs at least 2 times
    """
    if m := re.fullmatch(r'- (\d+)', query):
        return re.compile(rf'^\[BOS\](?: \d+){{{m[1]}}} (\d+)')
    if re.fullmatch(r'\d+(?: \d+)*', query):
        return re.compile(rf'^\[BOS\][^~]*? {query} (\d+)')
    if m := re.fullmatch(r'(\d+) ~ (\d+)', query):
        return re.compile(rf'^\[BOS\](?:(?: (?!{m[1]} )\d+)* ({m[1]})\b){{{m[2]}}}')
    return None


def retrieve(text, pattern_of=query_pattern):
    """Answer the query at the end of a text with a regular expression, run over all that comes before it.

    text: the words of the context joined by spaces, ending in `[STARTSEARCH] query [ENDSEARCH]`. pattern_of:
    the task's patterns. Returns the answer, a list of one token id, and whether the query is well-formed.
    The answer is the pattern's last match outside queries; for IsTree (paper, section 5.1 and Algorithm 2):
      v ~    x in the latest record `v ~ x` written so far
      v -    the other end of the first edge of the prompt that touches v
      v - w  the other end of the next edge of the prompt that touches v after edge {v, w}
    and [FAILED] if there is no such thing or the query is malformed."""
    before, _, query = text.removesuffix('[ENDSEARCH]').rpartition('[STARTSEARCH]')
    if (pattern := pattern_of(query.strip())) is None:
        return [FAILED], False
    answer = '[FAILED]'
    for m in pattern.finditer(before):
        start, end = (before.rfind(word, 0, m.start()) for word in ('[STARTSEARCH]', '[ENDSEARCH]'))
        if start <= end and m.lastindex:                    # the query before it, if any, has ended
            answer = m[m.lastindex]
    return [TOKENS[answer]], True


# --- two-hop questions: HotpotQA's task in a small world ---------------------------------------------
#
#   Ada Tarn: Velm once, Orsel now.                     ten paragraphs, `title: text`, half of them on people
#   Amber Tower: Odo Dahl wrote it in Lomar. ...        and half on novels, one by each
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
# The conditions of eval_hotpot.py: gold (only the two paragraphs that matter are shown), full, and retrieval, where
# the paragraphs need not be recalled: the model writes regular expressions and is shown, between *, what they find. One
# model learns all three; the first label after the question is given and tells it which. A word, with its colon,
# is a token, and so are signs and the end of a line with the sign before it.

HOTPOT_CONDITIONS = ('gold', 'full', 'retrieval')
HOTPOT_DISTRIBUTIONS = ('mixed', *HOTPOT_CONDITIONS)        # mixed: each question under all three, in turn
HOTPOT_PARAGRAPHS, HOTPOT_FOUND = 10, 2                     # of a question; at most shown after a query
HOTPOT_TRACE = 30                                           # tokens of the longest conversation after the prompt
FIRST, LAST, ADJECTIVE, NOUN, TOWN = map(str.split, (
    'Ada Bram Cleo Dario Edda Finn Gala Hugo Ines Jory Kaya Odo',
    'Arden Bell Corvin Dahl Esker Falk Hale Jarl Lund Moor Rusk Tarn',
    'Amber Bitter Copper Distant Early Frozen Golden Hollow Iron Jade Open Silver',
    'Anchor Bridge Compass Door Engine Forest Garden Harbour Island Jewel Lantern Tower',
    'Aldmoor Brenick Caldry Dunwell Elsto Farrowby Grimsend Hestrel Ilvane Jorvale Kelsund Lomar Mirrick Nethby Orsel '
    'Pellora Quarne Ravik Stennis Torvik Ulmere Velm Wexby Zelle'))
# the special tokens keep their ids and are written as labels and answers
HOTPOT_WORDS = ('-', '~', '[PAD]', '[BOS]', 'Answer:', 'yes', 'no', 'Search:', 'Found:', 'nothing', 'Question:', 'Thought:',
                '\n', '.\n', '?\n', *'. , ^ | wrote it in once now'.split(),
                *'Where did does the author of live Did Do and one town'.split(),
                *FIRST, *LAST, *ADJECTIVE, *NOUN, *TOWN, *[f'{word}:' for word in (*LAST, *NOUN)])
HOTPOT_TOKENS = {word: token for token, word in enumerate(HOTPOT_WORDS)}


def hotpot_layout(text):
    """Words joined by spaces -> text without [BOS] and the spaces that nobody would write."""
    return re.sub(r' (?=[.,?|\n])|(?<=[\n^|]) ', '', text.removeprefix('[BOS] '))


def hotpot_decode(tokens):
    """Token ids -> text, without padding and [BOS]."""
    return hotpot_layout(' '.join([HOTPOT_WORDS[t] for t in tokens if t not in (PAD, BOS)]))


def hotpot_encode(text):
    """The inverse: text -> list of token ids. Raises ValueError on an unknown word."""
    words = re.findall(r'\w+:?|[.?]?\n|\S', text)
    try:
        return [HOTPOT_TOKENS[word] for word in words]
    except KeyError as unknown:
        raise ValueError(f'unknown word {unknown}: this small world has {len(HOTPOT_WORDS)} words')


def hotpot_record(rng, n_paragraphs=HOTPOT_PARAGRAPHS):
    """Draw a question (rng: random.Random) as a record in the layout of HotpotQA's official file, see
    eval_hotpot.load_hotpot; supporting_facts in the order in which they are needed. Three in four go from a novel to
    its author (bridge), the others compare two people. There are only two last names, and two nouns in titles, so
    that each paragraph has others of nearly the same name; all towns differ, but for people with one in common."""
    half = n_paragraphs // 2
    people, novels = (rng.sample([f'{a} {b}' for b in rng.sample(twos, 2) for a in rng.sample(ones, half // 2 + 1)], half)
                      for ones, twos in ((FIRST, LAST), (ADJECTIVE, NOUN)))
    towns = rng.sample(TOWN, 3 * half)
    scene, once, now = towns[:half], towns[half:2 * half], towns[2 * half:]
    i, j = rng.sample(range(half), 2)               # about novel i and its author, or people i and j
    about, word, one, both = (once, 'once', 'did', 'Did') if rng.random() < 0.5 else (now, 'now', 'does', 'Do')
    if rng.random() < 0.75:
        kind, supporting, answer = 'bridge', (novels[i], people[i]), about[i]
        question = f'Where {one} the author of {novels[i]} live {word}?'
    else:
        kind, supporting, answer = 'comparison', (people[i], people[j]), rng.choice(('yes', 'no'))
        question = f'{both} {people[i]} and {people[j]} live in one town {word}?'
        if answer == 'yes':
            about[j] = about[i]
    context = [[novel, [f'{person} wrote it in {town}.']] for novel, person, town in zip(novels, people, scene)]
    context += [[person, [f'{one} once, {two} now.']] for person, one, two in zip(people, once, now)]
    rng.shuffle(context)
    return dict(_id=f'small-world-{rng.getrandbits(48):012x}', question=question, answer=answer, type=kind, context=context,
                supporting_facts=[[title, 0] for title in supporting])


def hotpot_records(size, n_paragraphs=HOTPOT_PARAGRAPHS, seed=VALIDATION_SEED):
    """A list of records, those from which the samples of the same seed are made."""
    rng = random.Random(repr(seed))
    return [hotpot_record(rng, n_paragraphs) for _ in range(size)]


def hotpot_paragraphs(record, gold=False):
    """[(title, text), ...] of the context; gold: of the supporting ones only."""
    supporting = dict(record['supporting_facts'])
    return [(title, ' '.join([sentence.strip() for sentence in sentences])) for title, sentences in record['context']
            if not gold or title in supporting]


def hotpot_lines(paragraphs):
    """Paragraphs, (title, text) pairs, as a model reads them."""
    return ''.join([f'{title}: {text}\n' for title, text in paragraphs]) or 'nothing\n'


def hotpot_prompt(question, paragraphs, condition):
    """What a model reads before it writes; ends with the label of the first line that it writes."""
    return f'{hotpot_lines(paragraphs)}Question: {question}\n' + ('Search:' if condition == 'retrieval' else 'Thought:')


def hotpot_conversation(record, condition):
    """A question of the small world as drawn above: [(text, whether the model is to write it), ...]."""
    gold = hotpot_paragraphs(record, gold=True)
    titles = [title for title, _ in record['supporting_facts']]
    prompt = hotpot_prompt(record['question'], gold if condition == 'gold' else hotpot_paragraphs(record), condition)
    if condition != 'retrieval':
        recalled = ' '.join([f'{title}: {dict(gold)[title]}' for title in titles])
        return [(prompt, False), (f' {recalled}\nAnswer: {record["answer"]}', True)]
    pieces, label = [(prompt, False)], ''
    for hop in [titles] if record['type'] == 'comparison' else [[title] for title in titles]:
        query = '|'.join([f'^{title}' for title in hop])
        found = hotpot_lines([(title, text) for title, text in gold if title in hop])
        pieces += [(f'{label} {query}\nFound:', True), (f' {found}', False)]
        label = 'Search:'
    return [*pieces, (f'Answer: {record["answer"]}', True)]


def hotpot_prompt_length(n_paragraphs):
    """Tokens of the prompt: [BOS], paragraphs (9 on a novel, 8 on a person), the longest question (12), two labels."""
    return 1 + n_paragraphs // 2 * (9 + 8) + 12 + 2


def generate_hotpot(batch_size, n_paragraphs, setup, seed, distribution='mixed', n=None):
    """A batch of questions as drawn above. distribution: a condition, or mixed. Returns tokens (B, L), shorter prompts
    padded on the left; loss_mask (B, L), True on what the model writes and on one [PAD] after it, so that it learns to
    stop; answers (B,), token ids. Raises ValueError as generate does."""
    check(batch_size, n_paragraphs, (4, 2 * (len(TOWN) // 3)), setup, ('retrieval',), distribution, HOTPOT_DISTRIBUTIONS)
    if n not in (None, n_paragraphs):
        raise ValueError(f'n={n!r} is impossible: the questions of this task have n_nodes={n_paragraphs} paragraphs')
    if n_paragraphs % 2:
        raise ValueError(f'n_nodes={n_paragraphs} is impossible: give an even number of paragraphs')
    conditions = HOTPOT_CONDITIONS if distribution == 'mixed' else (distribution,)
    records = hotpot_records(-(-batch_size // len(conditions)), n_paragraphs, seed)
    asked = [(record, condition) for record in records for condition in conditions][:batch_size]
    start = hotpot_prompt_length(n_paragraphs)
    tokens = np.full((batch_size, start + HOTPOT_TRACE + 1), PAD)
    loss_mask = np.zeros(tokens.shape, bool)
    for i, (record, condition) in enumerate(asked):
        (prompt, _), *pieces = hotpot_conversation(record, condition)
        prompt = [BOS, *hotpot_encode(prompt)]
        conversation = [(token, written) for text, written in pieces for token in hotpot_encode(text)] + [(PAD, True)]
        end = start + len(conversation)
        tokens[i, start - len(prompt):start] = prompt
        tokens[i, start:end], loss_mask[i, start:end] = zip(*conversation)
    return tokens, loss_mask, np.array([HOTPOT_TOKENS[record['answer']] for record, _ in asked])


def search_paragraphs(text):
    """Answer the query at the end of a text, words joined by spaces that end with `Search: query Found:`: the first
    HOTPOT_FOUND paragraphs of the prompt in which the query, a regular expression, is found, or `nothing`. Returns
    their token ids, and whether the query is a regular expression. (What would make `re` slow cannot be written
    with the words of this small world.)"""
    paragraphs, _, conversation = hotpot_layout(text).partition('Question:')
    query = ['', *conversation.split('Search:')[1:]][-1].removesuffix('Found:').partition('\n')[0].strip()
    try:
        pattern = re.compile(query)
    except re.error:
        query = ''
    found = [line for line in paragraphs.splitlines(True) if query and pattern.search(line)][:HOTPOT_FOUND]
    return hotpot_encode(''.join(found) or 'nothing\n'), query != ''


# --- tasks, training stream and validation sets --------------------------------------------------

class Task(NamedTuple):
    """What a task provides. n_nodes fixes the vocabulary; n, at most n_nodes, is the size of a sample. The answer is
    the last token of a sample, in every task."""
    generate: Callable          # (batch_size, n_nodes, setup, seed, distribution, n=None) -> tokens, loss_mask, labels
    vocab_size: Callable        # n_nodes -> number of tokens
    prompt_length: Callable     # n -> tokens of the prompt, the same for all samples of that n
    max_length: Callable        # (n, setup) -> tokens of the longest sample
    chance: Callable            # n -> accuracy of a guess
    retrieve: Callable = retrieve               # text that ends in a query -> token ids of the answer, well-formed?
    lengths: Callable = lambda n_nodes: (n_nodes,)      # n_nodes -> the n that a run mixes and that are evaluated
    distributions: tuple = tuple(DISTRIBUTIONS)
    setups: tuple = SETUPS
    words: tuple = WORDS        # token id -> word


def doubling(n_nodes, lowest):
    """2, 4, 8, ... and n_nodes itself, without those below lowest."""
    return tuple(n for n in [2 ** i for i in range(1, 12) if 2 ** i < n_nodes] + [n_nodes] if n >= lowest)


def primitive(draw, vocab_size, sequence_length, query_length, trace_length, chance):
    """The Task of a retrieval primitive, its lengths in tokens, that of the trace at most."""
    prompt_length = lambda n: 1 + sequence_length(n) + QUERIES * (query_length + 1)
    return Task(partial(generate_primitive, draw), lambda n: NODE + vocab_size(n), prompt_length,
                lambda n, setup: prompt_length(n) + (trace_length + 2 if setup == 'retrieval' else 1), chance,
                partial(retrieve, pattern_of=primitive_pattern), partial(doubling, lowest=LOWEST[draw]),
                ('uniform',), ('direct', 'retrieval'))


TASKS = {
    'istree': Task(generate, vocab_size, prompt_length, max_length, lambda n: 1 / 2),
    'index': primitive(index, lambda n: 2 * n, lambda n: n, 1, 5, lambda n: 1 / n),
    'recall': primitive(recall, lambda n: 4 * n, lambda n: 2 * n, 1, 4, lambda n: 1 / n),
    'cgram': primitive(cgram, lambda n: n, lambda n: n, 2, 5, lambda n: 2 / n),
    'counting': primitive(counting, lambda n: n, lambda n: n, 1, 6 * (MAX_COUNT + 1), lambda n: 1 / (MAX_COUNT + 1)),
    # hotpot's chance: of a guess at yes or no, or among the towns of the paragraphs shown (3 under gold), mixed
    'hotpot': Task(generate_hotpot, lambda n: len(HOTPOT_WORDS), hotpot_prompt_length,
                   lambda n, setup: hotpot_prompt_length(n) + HOTPOT_TRACE,
                   lambda n: 1 / 4 * 1 / 2 + 3 / 4 * (1 / 3 * 1 / 3 + 2 / 3 * 2 / (3 * n)),
                   search_paragraphs, distributions=HOTPOT_DISTRIBUTIONS, setups=('retrieval',), words=HOTPOT_WORDS),
}


def prompts_of(task, n_nodes, held_out):
    """The prompts of held-out samples, a list of token arrays (N, L), as a set of bytes."""
    starts = [TASKS[task].prompt_length(n) for n in TASKS[task].lengths(n_nodes)]
    return {row[:start].tobytes() for tokens in held_out for row in tokens for start in starts}


def generate_others(task, batch_size, n_nodes, setup, seed, distribution, n, forbidden):
    """What generate returns, for seed (*seed, 0), but that a sample whose prompt is in forbidden, a set of bytes, is
    replaced by another one of the batch. Raises ValueError if there seem to be no others."""
    start = TASKS[task].prompt_length(n)
    for attempt in range(10):
        batch = TASKS[task].generate(batch_size, n_nodes, setup, (*seed, attempt), distribution, n)
        others = [i for i, row in enumerate(batch[0]) if row[:start].tobytes() not in forbidden]
        if len(others) == batch_size:
            return batch
        if others:
            return tuple(part[np.resize(others, batch_size)] for part in batch)
    raise ValueError(f'n={n} has so few prompts that all are in the validation set: '
                     'take a larger n or a smaller validation set')


def validation_set(task, size, n_nodes, setup, distribution=None, n=None, tuning=False):
    """The held-out samples: the same for every seed and model. tuning: others, none of which has a prompt of the
    reported set of the same size, to choose constants with. distribution: by default the task's first. Returns
    what generate returns."""
    distribution = distribution or TASKS[task].distributions[0]
    reported = TASKS[task].generate(size, n_nodes, setup, VALIDATION_SEED, distribution, n)
    if not tuning:
        return reported
    return generate_others(task, size, n_nodes, setup, TUNING_SEED, distribution, n or n_nodes,
                           prompts_of(task, n_nodes, [reported[0]]))


class Batches:
    """The training stream: batches[i] is batch number i, tokens (batch_size, L) and loss_mask (batch_size, L), made
    when asked for, the same whenever and by whichever process it is made. Its n is the i-th of the task's lengths,
    around and around.

    held_out: list of validation tokens (N, L). A training sample with the same prompt is replaced by another one
    of its batch. Raises ValueError if the validation set holds all there is."""

    def __init__(self, task, batch_size, n_nodes, setup, seed, distribution=None, held_out=()):
        self.arguments = task, batch_size, n_nodes, setup
        self.seed, self.distribution = seed, distribution or TASKS[task].distributions[0]
        self.lengths = TASKS[task].lengths(n_nodes)
        self.forbidden = prompts_of(task, n_nodes, held_out)

    def __getitem__(self, i):
        n = self.lengths[i % len(self.lengths)]
        tokens, loss_mask, _ = generate_others(*self.arguments, (TRAINING, self.seed, i), self.distribution, n,
                                               self.forbidden)
        length = np.flatnonzero(loss_mask.any(0))[-1] + 1
        return tokens[:, :length], loss_mask[:, :length]


if __name__ == '__main__':
    for name, task in TASKS.items():
        for setup in task.setups:
            print(f'{name}, {setup}:\n{decode(task.generate(1, 6, setup, seed=0)[0][0], task.words)}\n')
