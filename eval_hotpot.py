"""HotpotQA: how much does a model lose when the two paragraphs that matter stand among eight others,
and how much of that does retrieval by regular expression give back? (Paper, section 6.)

  python eval_hotpot.py                          the small world of data.py, no download: evaluates what
                                                 `python train.py --tasks=hotpot` has trained
  pip install transformers
  python eval_hotpot.py --models=state-spaces/mamba-130m-hf,HuggingFaceTB/SmolLM2-135M --download
  python eval_hotpot.py --help                   every constant

Each question is asked under three conditions: gold (the model sees the two supporting paragraphs), full
(all ten) and retrieval (all ten, then the model searches them). The model writes what stands after >:

  Magic Flute: The Magic Flute is an opera by ...            the paragraphs, `title: text`
  Question: In which city was the composer of The Magic Flute born?
  Search:> Magic Flute                                       retrieval only: Python's `re` looks for it in
  Found: Magic Flute: The Magic Flute is an opera by ...     each paragraph, the first matches are shown
  > Search: Mozart.*born                                     ... and again, a few rounds, until it thinks
  Thought:> The composer was Mozart, born in Salzburg.
  Answer:> Salzburg

Pretrained models get four worked examples first, read once: their state is copied for every question.
Questions that every model answers right under gold are reported apart, as in the paper. Everything is
kept in out/hotpot/*.jsonl, a line per question and condition: run the same command again to continue.
"""
import copy
import json
import math
import re
import string
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from dataclasses import dataclass
from inspect import getsource, signature
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

try:
    import resource
except ImportError:                         # Windows
    resource = None

import data
import models
from train import Refused, cli, parse, pick_device, read_checkpoint

URL = 'http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json'
RECORDS = 7405                              # questions in that file, 45 MB
CONDITIONS = data.HOTPOT_CONDITIONS


@dataclass
class Constants:
    # what is evaluated
    models: str = ''                        # hub names or folders, separated by commas; none: those of train.py
    data: str = 'hotpot_dev_distractor_v1.json'     # the questions for pretrained models
    download: bool = False                  # fetch the official file (45 MB) to --data if it is not there
    questions: int = 500                    # how many, from the beginning of the file; 0: all
    subset: int = 350                       # at most so many of those that all models answer right under gold
    trust_remote_code: bool = False         # run code that comes with a checkpoint
    # the conversation
    rounds: int = 3                         # most queries per question
    line_tokens: int = 64                   # most tokens of a line that the model writes
    query_seconds: float = 1.0              # most time for a query
    # running
    show: int = 0                           # questions whose transcripts are printed
    out: str = 'out'                        # folder of train.py's results; ours go to hotpot/ in it
    device: str = 'auto'                    # auto, cpu, cuda or mps
    dtype: str = 'float32'                  # of pretrained weights: float32 or bfloat16


# --- questions ---------------------------------------------------------------------------------------

def load_hotpot(path):
    """HotpotQA questions as a list of records in the official layout:

        {_id, question, answer, type, supporting_facts: [[title, sentence_id], ...],
         context: [[title, [sentence, ...]], ...]}

    The file may be in that layout or in the hubs' dictionary-of-lists layout ({title: [...], sentences:
    [[...], ...]}, a JSON list or a record per line). Raises ValueError naming the first malformed record."""
    try:
        text = Path(path).read_text(encoding='utf-8')
        lines = text.startswith('{') and '\n{' in text
        raw = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except ValueError as error:
        raise ValueError(f'{path}: not JSON ({error})')
    if not isinstance(raw, list) or not raw:
        raise ValueError(f'{path}: expected a list of records')
    records, seen = [], set()
    for i, given in enumerate(raw):
        given = given if isinstance(given, dict) else {}
        record = dict(_id=given.get('_id', given.get('id', f'record-{i}')), type=given.get('type', ''))

        def need(good, name, what):
            if not good:
                raise ValueError(f'{path}: record {i} (id {record["_id"]}): {name}: expected {what}')

        strings = lambda values: isinstance(values, list) and all(isinstance(v, str) for v in values)
        need(isinstance(record['_id'], str) and record['_id'] not in seen, '_id', 'a string that no other record has')
        seen.add(record['_id'])
        for name in ('question', 'answer'):
            record[name] = given.get(name)
            need(isinstance(record[name], str) and record[name].strip(), name, 'text')
        for name, second in (('context', 'sentences'), ('supporting_facts', 'sent_id')):
            pairs = given.get(name)
            if isinstance(pairs, dict):
                titles, others = pairs.get('title'), pairs.get(second)
                need(isinstance(titles, list) and isinstance(others, list) and len(titles) == len(others),
                     name, f'lists title and {second} of one length')
                pairs = list(zip(titles, others))
            need(isinstance(pairs, list) and pairs and all(isinstance(p, (list, tuple)) and len(p) == 2 and
                 isinstance(p[0], str) and (strings(p[1]) if name == 'context' else type(p[1]) is int) for p in pairs),
                 name, f'pairs of a title and {"a list of sentences" if name == "context" else "a sentence number"}')
            record[name] = [list(pair) for pair in pairs]
        titles = [title for title, _ in record['context']]
        need(any(title in titles for title, _ in record['supporting_facts']), 'supporting_facts', 'a title of the context')
        records.append(record)
    return records


def download(path):
    """Fetch the official file, with a progress bar, and check that it holds the questions it should."""
    part = Path(f'{path}.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(URL, timeout=60) as response, open(part, 'wb') as file:
        with tqdm(total=int(response.headers.get('Content-Length', 0)) or None, unit='B', unit_scale=True,
                  desc=Path(path).name) as progress:
            while block := response.read(1 << 16):
                file.write(block)
                progress.update(len(block))
    if (n := len(load_hotpot(part))) != RECORDS:
        raise Refused(f'{part}: {n:,} questions came instead of {RECORDS:,}, not kept as {path}')
    part.replace(path)


def paragraphs_of(record):
    """[(title, text), ...] of the context."""
    return [(title, ' '.join(sentence.strip() for sentence in sentences)) for title, sentences in record['context']]


def supporting(record):
    return {title for title, _ in record['supporting_facts']}


# --- metrics: the official normalisation and definitions ------------------------------------------------

def normalize_answer(text):
    """Lower case, no punctuation, no articles, single blanks."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return ' '.join(re.sub(r'\b(?:a|an|the)\b', ' ', text).split())


def exact_match(prediction, answer):
    """1.0 if the two are equal after normalisation, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1_score(prediction, answer):
    """Harmonic mean of the precision and the recall of words; yes, no and noanswer are right or wrong as a whole."""
    prediction, answer = normalize_answer(prediction), normalize_answer(answer)
    if prediction != answer and {prediction, answer} & {'yes', 'no', 'noanswer'}:
        return 0.0
    prediction, answer = prediction.split(), answer.split()
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


# --- retrieval: an untrusted regular expression ---------------------------------------------------------

MAX_PATTERN, MAX_FOUND, MAX_TEXT = 200, data.HOTPOT_FOUND, 1000      # characters, paragraphs, characters of each


class Found(list):
    """The paragraphs that a query found, (title, text) pairs, and its outcome: 'found', 'no match',
    'malformed' or 'timed out'."""

    def __init__(self, paragraphs, outcome):
        super().__init__(paragraphs)
        self.outcome = outcome


def answer_queries():
    """The other end of search(), run as a program of its own, because nothing can interrupt `re` within a
    process: reads queries, a JSON line each, and answers with the numbers of the matching paragraphs.
    When a query takes too long, a watchdog (a C thread, so also while `re` runs) ends the process."""
    import faulthandler
    import itertools
    import json
    import re
    import sys
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))      # bytes; not on Windows
    except (ImportError, ValueError, OSError):
        pass
    for line in sys.stdin:
        pattern, paragraphs, seconds, most = json.loads(line)
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            expression = re.compile(pattern)
            matches = (i for i, text in enumerate(paragraphs) if expression.search(text))
            answer = list(itertools.islice(matches, most))
        except Exception:                                               # re.error, nesting too deep, numbers too large
            answer = None
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), flush=True)


worker = None                               # the process, started by the first query and after a timeout


def search(pattern, paragraphs, seconds=1.0):
    """Find the first paragraphs, (title, text) pairs, in whose line `title: text` the regular expression
    matches (Python's re.search). Returns them as a Found list: MAX_FOUND at most, texts cut to MAX_TEXT.
    The pattern may be anything: what takes longer than `seconds` is ended, outcome 'timed out'."""
    global worker
    if not pattern.strip() or len(pattern) > MAX_PATTERN:
        return Found([], 'malformed')
    if worker is None or worker.poll() is not None:
        worker = subprocess.Popen([sys.executable, '-I', '-c', getsource(answer_queries) + 'answer_queries()'],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = [f'{title}: {text}' for title, text in paragraphs]
    try:
        worker.stdin.write(json.dumps([pattern, lines, seconds, MAX_FOUND]) + '\n')
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BaseException:                   # Ctrl-C: its answer must not be taken for that of the next query
        worker.kill()
        raise
    if not answer:
        worker.communicate()
        return Found([], 'timed out')
    if (numbers := json.loads(answer)) is None:
        return Found([], 'malformed')
    found = [(paragraphs[i][0], paragraphs[i][1][:MAX_TEXT]) for i in numbers]
    return Found(found, 'found' if found else 'no match')


# --- prompts -----------------------------------------------------------------------------------------

# question, answer, thought, queries, paragraphs (two support the answer, the third is a distractor)
EXAMPLES = [
    ('In which city was the composer of The Magic Flute born?', 'Salzburg',
     'The Magic Flute was composed by Wolfgang Amadeus Mozart, who was born in Salzburg.',
     ['Magic Flute', 'Mozart was'],
     [('Vienna', 'Vienna is the capital of Austria. Many composers lived and worked in the city.'),
      ('The Magic Flute', 'The Magic Flute is an opera in two acts, composed by Wolfgang Amadeus Mozart and first '
       'performed in 1791.'),
      ('Wolfgang Amadeus Mozart', 'Wolfgang Amadeus Mozart was a composer of the Classical period. He was born in Salzburg '
       'in 1756.')]),
    ('Do the Nile and the Danube flow on the same continent?', 'no',
     'The Nile flows in Africa and the Danube flows in Europe, so they are on different continents.',
     ['^(Nile|Danube):'],
     [('Nile', 'The Nile is a long river in Africa. It flows north into the Mediterranean Sea.'),
      ('Amazon River', 'The Amazon River carries more water than any other river. It flows through South America.'),
      ('Danube', 'The Danube is a river in Europe. It rises in the Black Forest and ends in the Black Sea.')]),
    ('In what year was the university founded at which Isaac Newton studied?', '1209',
     'Isaac Newton studied at the University of Cambridge, which was founded in 1209.',
     ['Newton.*(studied|university)', 'University of Cambridge.*founded'],
     [('Isaac Newton', 'Isaac Newton described gravity and the laws of motion. He studied at the University of Cambridge.'),
      ('University of Cambridge', 'The University of Cambridge is a university in England. It was founded in 1209.'),
      ('University of Bologna', 'The University of Bologna in Italy was founded in 1088.')]),
    ('Who was born first, Charles Darwin or Albert Einstein?', 'Charles Darwin',
     'Charles Darwin was born in 1809 and Albert Einstein was born in 1879, so Charles Darwin was born first.',
     ['(Darwin|Einstein).*born'],
     [('Albert Einstein', 'Albert Einstein was a physicist, born in 1879 in Ulm. He is known for the theory of relativity.'),
      ('Galapagos Islands', 'The Galapagos Islands lie in the Pacific Ocean and belong to Ecuador.'),
      ('Charles Darwin', 'Charles Darwin was a naturalist, born in 1809 in Shrewsbury. He is known for the theory of '
       'evolution.')])]


def prompt(question, paragraphs, condition):
    """The text that a model reads before it writes; ends with the label of the first line that it writes."""
    context = ''.join(f'{title}: {text}\n' for title, text in paragraphs)
    return f'{context}Question: {question}\n' + ('Search:' if condition == 'retrieval' else 'Thought:')


def found_text(found):
    return 'Found: ' + ('\n'.join(f'{title}: {text}' for title, text in found) or 'nothing') + '\n'


def few_shot(condition):
    """The four examples, worked out for a condition."""
    text = 'Read the paragraphs and answer the question in a few words.'
    if condition == 'retrieval':
        text += ' First search the paragraphs with regular expressions.'
    for question, answer, thought, queries, paragraphs in EXAMPLES:
        text += '\n\n' + prompt(question, paragraphs, condition)
        if condition == 'retrieval':
            text += 'Search:'.join(f' {query}\n{found_text(search(query, paragraphs))}' for query in queries) + 'Thought:'
        text += f' {thought}\nAnswer: {answer}'
    return text + '\n\n'


# --- language models: read(text, after=None) -> state, write(state) -> (line, state) --------------------

class LanguageModel:
    """A model of models.py and a tokenizer from the hub. A state is (cache, logits of the next token);
    read() leaves the state it is given as it was, so that a prefix is read once and reused."""

    def __init__(self, name, model, tokenizer, line_tokens=64):
        self.name, self.model, self.tokenizer, self.line_tokens = name, model, tokenizer, line_tokens
        self.device = next(model.parameters()).device
        self.version = f'{sum(p.detach().cpu().double().abs().sum().item() for p in model.parameters()):.10g}'
        self.newline = tokenizer.encode('\n', add_special_tokens=False) if tokenizer else None

    def encode(self, text, first):
        """Token ids; `first`: of the beginning of a text, with the special tokens that belong there."""
        tokens = self.tokenizer.encode(text, add_special_tokens=first)
        return tokens[:-1] if tokens[-1:] == [self.tokenizer.eos_token_id] else tokens

    def decode(self, tokens):
        return self.tokenizer.decode(tokens)

    def branch(self, cache, more):
        """A copy of a cache (None: an empty one) with room for `more` tokens."""
        if cache is None:
            return self.model.init_state(1, more)
        new = self.model.init_state(1, cache.seen + more)
        new.seen = cache.seen
        for layer, old_layer in zip(new.layers, cache.layers):
            for i, old in enumerate(old_layer):
                if old.dim() == 4:                                      # keys or values, of the tokens seen
                    layer[i][:, :, :cache.seen] = old[:, :, :cache.seen]
                else:
                    layer[i] = old.clone()
        return new

    def feed(self, tokens, cache):
        """Read more tokens, changing the cache. Returns the logits (V,) after the last, and the cache."""
        hidden = self.model.hidden(torch.tensor([tokens], device=self.device), cache)
        return self.model.head(hidden[0, -1]), cache

    @torch.inference_mode()
    def read(self, text, after=None):
        """The state after a text, or after the text that continues what the state `after` has read."""
        tokens = self.encode(text, first=after is None)
        logits, cache = self.feed(tokens, self.branch(after and after[0], len(tokens) + self.line_tokens + len(self.newline)))
        return cache, logits

    @torch.inference_mode()
    def write(self, state):
        """Greedily write the rest of the line. Returns its text, without the line's end, and the state after it.
        A line ends with a newline, a token that ends texts, or line_tokens."""
        cache, logits = state
        line, text = [], ''
        for _ in range(self.line_tokens):
            token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                break
            logits, cache = self.feed([token], cache)
            line.append(token)
            text = self.decode(line)
            if '\n' in text:
                return text.split('\n')[0], (cache, logits)
        logits, cache = self.feed(self.newline, cache)
        return text, (cache, logits)

    def memory(self, state):
        """Bytes of a state."""
        return sum((t[:, :, :state[0].seen] if t.dim() == 4 else t).numel() * t.element_size()
                   for layer in state[0].layers for t in layer)


class HubModel(LanguageModel):
    """Any other causal language model, run by `transformers`. Not every recurrent one reads several tokens
    after others in one pass correctly; which way is right is found out by trying: `stride` tokens at a time."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        wanted = signature(self.model.forward).parameters
        self.cache_name = 'cache_params' if 'cache_params' in wanted else 'past_key_values'
        dtype, sample = next(self.model.parameters()).dtype, list(range(10, 22))
        self.model.float()                                              # in bfloat16, noise would hide the difference
        with torch.inference_mode():
            expected = self.model(input_ids=torch.tensor([sample], device=self.device)).logits[0, -1]
            for self.stride in (1 << 20, 1, 0):                         # 0: no cache, everything again
                try:
                    _, cache = self.feed(sample[:6], None)
                    got, _ = self.feed(sample[6:], self.branch(cache, 0))
                except Exception:                                       # it cannot
                    continue
                if (got - expected).abs().max() < 1e-3 * expected.abs().max():
                    break
        self.model.to(dtype)

    def branch(self, cache, more):
        return copy.deepcopy(cache)

    def feed(self, tokens, cache):
        if not self.stride:
            cache = (cache or []) + tokens
            return self.model(input_ids=torch.tensor([cache], device=self.device)).logits[0, -1], cache
        size = self.stride if cache is not None else len(tokens)
        for i in range(0, len(tokens), size):
            out = self.model(input_ids=torch.tensor([tokens[i:i + size]], device=self.device), use_cache=True,
                             **({self.cache_name: cache} if cache is not None else {}))
            cache = out.get(self.cache_name)
        return out.logits[0, -1], cache

    def memory(self, state):
        def size(thing, depth=6):                                       # caches are lists in objects in dicts in ...
            if torch.is_tensor(thing) or not depth:
                return thing.numel() * thing.element_size() if depth else 0
            parts = thing if isinstance(thing, (list, tuple, dict)) else getattr(thing, '__dict__', {})
            return sum(size(part, depth - 1) for part in (parts.values() if isinstance(parts, dict) else parts))
        return size(state[0])


class SmallWorldModel(LanguageModel):
    """A model that train.py has trained on the task hotpot: a token per word, and a label ends a line."""

    LABELS = [data.HOTPOT_TOKENS[word] for word in ('Question:', 'Search:', 'Found:', 'Thought:', 'Answer:')]

    def __init__(self, name, model, n_paragraphs):
        super().__init__(name, model, None)
        self.prompt_length = data.hotpot_prompt_length(n_paragraphs)
        self.newline = []

    def encode(self, text, first):
        tokens = data.hotpot_encode(text)
        if first:                                                       # a short prompt is padded as in training
            tokens = [data.PAD] * (self.prompt_length - 1 - len(tokens)) + [data.BOS] + tokens
        return tokens

    def read(self, text, after=None):
        return *super().read(text, after), self.encode(text, False)[-1]

    @torch.inference_mode()
    def write(self, state):
        cache, logits, last = state
        line = []
        for _ in range(self.line_tokens):
            token = int(logits.argmax())
            if line and (token in self.LABELS or last == data.EOS):     # one word follows Answer:
                break
            logits, cache = self.feed([token], cache)
            line.append(token)
        text = data.hotpot_decode(line).replace('\n', ' ')
        return ' ' * (last in self.LABELS) + text, (cache, logits, line[-1])


def pretrained(name, c, device):
    """The model of a hub name or a folder: by models.py if it can, else by transformers. Raises Refused."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise Refused('pretrained models need one more package: pip install transformers')
    dtype, code = getattr(torch, c.dtype), dict(trust_remote_code=c.trust_remote_code)
    what = 'tokenizer'
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **code)
        what, kind = 'model', LanguageModel
        try:
            model = models.from_pretrained(name, dtype)
        except ValueError as reason:
            print(f'{name}: run by transformers, not by models.py ({reason})')
            kind, model = HubModel, AutoModelForCausalLM.from_pretrained(name, **code).to(dtype)
            if (limit := getattr(model.config, 'max_position_embeddings', None) or 4096) < 4096:
                print(f'{name}: made for {limit:,} tokens; what does not fit may end in an error or in nonsense')
    except Exception as error:                                          # transformers raises all sorts
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f'{name}: no {what} to be had ({reason[0]})')
    if not tokenizer.encode('\n', add_special_tokens=False):
        raise Refused(f'{name}: its tokenizer knows no newline, which ends every line here')
    return kind(name, model.to(device).eval(), tokenizer, c.line_tokens)


def trained(out, device):
    """The models that train.py has trained on the task hotpot, in the order of the archs. Raises Refused."""
    found = []
    for result in sorted(Path(out).glob('hotpot-*/result.json')):
        try:
            cell = json.loads((result.parent / 'config.json').read_text())
            weights = read_checkpoint(result.parent / 'checkpoint.pt', cell)['model']
        except (OSError, ValueError, TypeError):
            raise Refused(f'{result.parent} lacks its config.json or its checkpoint.pt: train it anew')
        if cell['n_nodes'] != data.HOTPOT_PARAGRAPHS:
            continue
        model = models.make_model(cell['arch'], cell['size'], len(data.HOTPOT_WORDS), cell['d_state'], cell['frozen_embedding'])
        model.load_state_dict(weights)
        name = '{arch}-{size}-s{seed}'.format(**cell)
        found.append((models.ARCHS.index(cell['arch']), name, model.to(device).eval()))
    if not found:
        raise Refused(f'no model trained on the small world under {out}/: run  python train.py --tasks=hotpot  first '
                      '(some 5 minutes a model), or name pretrained ones, see --help')
    return [SmallWorldModel(name, model, data.HOTPOT_PARAGRAPHS) for _, name, model in sorted(found, key=lambda f: f[:2])]


# --- the conversation ----------------------------------------------------------------------------------

def ask(model, record, condition, prefix=None, rounds=3, seconds=1.0):
    """Put one question to a model under a condition. prefix: the model's state after the examples, None
    without. Returns all there is to know about it, a dict: a line of the results."""
    started, everything = time.monotonic(), paragraphs_of(record)
    shown = [p for p in everything if condition != 'gold' or p[0] in supporting(record)]
    text = said = prompt(record['question'], shown, condition)
    label, prediction, queries, titles = said.rsplit('\n', 1)[1], None, [], []
    state = prefix
    while prediction is None:
        state = model.read(said, state)
        line, state = model.write(state)
        text += f'{line}\n'
        line = line.strip()
        if not label:                                                   # the model has chosen what to do
            label, _, line = line.partition(':') if line.startswith(('Search:', 'Answer:')) else ('Thought', '', line)
            label, line = label + ':', line.strip()
        if label == 'Search:':
            found = search(line, everything, seconds)
            queries.append([line[:MAX_PATTERN], found.outcome])
            titles += [title for title, _ in found]
            label = 'Thought:' if len(queries) >= rounds else ''        # enough searched
            said = found_text(found) + label
        elif label == 'Answer:':
            prediction = line
        else:
            label = said = 'Answer:'
        if prediction is None:
            text += said
    gold = supporting(record) & {title for title, _ in everything}
    return dict(id=record['_id'], condition=condition, question=record['question'], answer=record['answer'],
                prediction=prediction, em=exact_match(prediction, record['answer']), f1=f1_score(prediction, record['answer']),
                queries=queries, titles=titles, recall=len(gold & {*titles}) / len(gold) if condition == 'retrieval' else None,
                seconds=time.monotonic() - started, text=text)


def kept(path):
    """The results in a file, {(id, condition): dict}. A last line that a kill has torn is cut off."""
    if not path.exists():
        return {}
    lines = path.read_bytes().split(b'\n')
    if lines.pop():
        with open(path, 'rb+') as file:
            file.truncate(sum(len(line) + 1 for line in lines))
    try:
        results = [json.loads(line) for line in lines]
        return {(result['id'], result['condition']): result for result in results}
    except (ValueError, KeyError, TypeError):
        raise Refused(f'{path} is damaged: delete it')


def evaluate(model, records, folder, shots=True, rounds=3, seconds=1.0):
    """Ask a model all questions under all conditions, but for those whose results are in the folder already.
    model: anything with a name, read(text, after=None) -> state and write(state) -> (line, state).
    Returns the results, {(id, condition): dict}."""
    # a file per configuration: other questions, examples or weights never continue an old one
    of_model = [getattr(model, name, '') for name in ('version', 'line_tokens')]
    settings = json.dumps([records, shots and EXAMPLES, rounds, seconds, of_model])
    path = Path(folder) / f'{re.sub(r"[^0-9A-Za-z.-]+", "-", model.name)}-{zlib.crc32(settings.encode()):08x}.jsonl'
    path.parent.mkdir(parents=True, exist_ok=True)
    results, prefixes = kept(path), dict.fromkeys(CONDITIONS)
    if shots and len(results) < len(CONDITIONS) * len(records):
        for condition in CONDITIONS:
            text = few_shot(condition)
            prefixes[condition] = prefixes['gold'] if condition == 'full' else model.read(text)
        if hasattr(model, 'memory'):
            print(f'{model.name}: the four examples are {len(model.encode(few_shot("gold"), True)):,} tokens '
                  f'({len(model.encode(text, True)):,} with searches), read once; their state is '
                  f'{model.memory(prefixes["gold"]) / 1e6:.2f} MB ({model.memory(prefixes["retrieval"]) / 1e6:.2f} MB)')
    with open(path, 'a', encoding='utf-8') as file, \
            tqdm(total=len(CONDITIONS) * len(records), initial=len(results), desc=model.name, dynamic_ncols=True) as progress:
        for record in records:
            for condition in CONDITIONS:
                key = record['_id'], condition
                if key not in results:
                    results[key] = ask(model, record, condition, prefixes[condition], rounds, seconds)
                    file.write(json.dumps(results[key]) + '\n')
                    file.flush()
                    progress.update()
    print(f'{model.name}: {path}')
    return results


# --- the report ----------------------------------------------------------------------------------------

def mean(values):
    """'mean ± standard error' of numbers in [0, 1], in percent."""
    values = 100 * np.array(values, float)
    if not len(values):
        return '      -      '
    return f'{values.mean():5.1f} ± {values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan:4.1f}'


def right_under_gold(results, most):
    """ids of the questions that every model answers right under gold, at most `most` of them, in order."""
    right = [{id: None for (id, condition), r in of_model.items() if condition == 'gold' and r['em']}
             for of_model in results.values()]
    return [id for id in right[0] if all(id in others for others in right)][:most]


def table(results, subset):
    """results: {model name: {(id, condition): dict}}; subset: ids. A line per model and condition."""
    lines = [f'{"":39}  {f"{len(subset)} right under gold":^29}  {"all questions":^29}  {"supporting":>12}'
             f'  {"queries a question, % of them":^35}',
             f'{"model":28} {"condition":10}  {"EM":^13}   {"F1":^13}  {"EM":^13}   {"F1":^13}  {"found, %":>12}'
             f'  {"number":>7} {"malformed":>9} {"no match":>8} {"too slow":>8}  {"s/question":>10}']
    lines.append('-' * len(lines[1]))
    for name, of_model in results.items():
        for condition in CONDITIONS:
            rows = [r for (_, c), r in of_model.items() if c == condition]
            few = [of_model[id, condition] for id in subset]
            parts = [f'{mean([r[m] for r in chosen]):^13}' for chosen in (few, rows) for m in ('em', 'f1')]
            outcomes = Counter(outcome for r in rows for _, outcome in r['queries'])
            n = outcomes.total()
            searched = f'{mean([r["recall"] for r in rows]):>12}  {n / len(rows):7.2f} ' + ' '.join(
                f'{100 * outcomes[o] / max(n, 1):{w}.1f}' for o, w in (('malformed', 9), ('no match', 8), ('timed out', 8))) \
                if condition == 'retrieval' else ' ' * 49
            lines.append(f'{name[-28:]:28} {condition:10}  {parts[0]}   {parts[1]}  {parts[2]}   {parts[3]}  {searched}'
                         f'  {np.mean([r["seconds"] for r in rows]):10.3f}')
    return '\n'.join(lines)


def by_word_overlap(record):
    """The two paragraphs that share most words with the question, rare ones counting more: no model."""
    texts = [set(normalize_answer(' '.join(p)).split()) for p in paragraphs_of(record)]
    n = Counter(word for text in texts for word in text)
    asked = set(normalize_answer(record['question']).split())
    score = [sum(math.log(len(texts) / n[word]) for word in text & asked) for text in texts]
    return [paragraphs_of(record)[i] for i in sorted(range(len(texts)), key=lambda i: -score[i])[:2]]


def baselines(records):
    """Lines on what needs no model: supporting paragraphs by word overlap and, in the small world, where the
    possible answers to a question are known, a guess among those that stand in the paragraphs."""
    hits = [len({p[0] for p in by_word_overlap(r)} & supporting(r)) / len(supporting(r)) for r in records]
    lines = [f'word overlap with the question finds {mean(hits)} % of the supporting paragraphs']

    def guess(record, paragraphs):
        """Chance that a random answer of the right kind, out of these paragraphs, is right."""
        kind = 'town' if record['question'].startswith('Where') else 'instrument'
        known = {'yes', 'no'} if record['type'] == 'comparison' else set(data.HOTPOT_NAMES[kind])
        there = known if 'yes' in known else {w for _, text in paragraphs for w in re.findall(r'\w+', text)} & known
        return (record['answer'] in there) / len(there) if there else guess(record, paragraphs_of(record))

    if records[0]['_id'].startswith('small-world'):
        gold = [guess(r, [p for p in paragraphs_of(r) if p[0] in supporting(r)]) for r in records]
        lines += [f'a guess among the answers of the right kind: {mean(gold)} % right under gold, '
                  f'{mean([guess(r, paragraphs_of(r)) for r in records])} % under full, '
                  f'{mean([guess(r, by_word_overlap(r)) for r in records])} % on the paragraphs by word overlap']
    return '\n'.join(lines)


def main(argv):
    argv = [f'{a}=True' if a in ('--download', '--trust_remote_code') else a for a in argv]
    c = parse(argv, Constants, 'eval_hotpot.py', {'default': {}})
    device = pick_device(c.device)
    if c.models:
        path = Path(c.data)
        if not path.exists():
            if not c.download:
                raise Refused(f'{path} is not there: add --download to fetch it from {URL} (45 MB), or name a file, --data=...')
            download(path)
        records = load_hotpot(path)[:c.questions or None]
        loaded = (pretrained(name, c, device) for name in c.models.split(','))      # one at a time
    else:
        loaded = trained(c.out, device)
        records = data.hotpot_records(c.questions or 500)
    results = {}
    for model in loaded:
        results[model.name] = evaluate(model, records, Path(c.out) / 'hotpot', bool(c.models), c.rounds, c.query_seconds)
        del model
    for name, of_model in results.items():
        for record in records[:c.show]:
            for condition in CONDITIONS:
                r = of_model[record['_id'], condition]
                print(f'\n=== {name}, {condition}: expected {r["answer"]!r}, EM {r["em"]:.0f}, F1 {r["f1"]:.2f}\n{r["text"]}')
    print(f'\n{table(results, right_under_gold(results, c.subset))}\n\nEM and F1 in percent ± standard error. '
          f'{len(records):,} questions; {baselines(records)}')
    if resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
        print(f'peak memory {peak / 1e9:.2f} GB')


if __name__ == '__main__':
    sys.exit(cli(main, 'eval_hotpot.py', sys.argv[1:]))
