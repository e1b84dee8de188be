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
import io
import json
import math
import os
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
from inspect import getsource, signature
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
        by_line = text.startswith('{') and '\n{' in text
        raw = [json.loads(line) for line in text.splitlines() if line.strip()] if by_line else json.loads(text)
    except ValueError as error:
        raise ValueError(f'{path}: not JSON ({error})')
    if not isinstance(raw, list) or not raw:
        raise ValueError(f'{path}: expected a list of records')
    is_text = lambda value: isinstance(value, str) and value.strip()
    sentences = lambda value: isinstance(value, list) and all(isinstance(sentence, str) for sentence in value)
    records, ids = [], set()
    for i, given in enumerate(raw):
        given = given if isinstance(given, dict) else {}
        record = {name: given.get(name) for name in ('question', 'answer', 'context', 'supporting_facts')}
        record |= dict(_id=given.get('_id', given.get('id', f'record-{i}')), type=given.get('type', ''))

        def need(name, good, what):
            if not good:
                raise ValueError(f'{path}: record {i} (id {record["_id"]}): {name}: expected {what}')

        need('_id', is_text(record['_id']) and record['_id'] not in ids, 'a string that no other record has')
        need('question', is_text(record['question']), 'text')
        need('answer', is_text(record['answer']), 'text')
        for name, column, good, what in (('context', 'sentences', sentences, 'a list of sentences'), (
                'supporting_facts', 'sent_id', lambda value: type(value) is int, 'a sentence number')):
            if isinstance(record[name], dict):
                columns = record[name].get('title'), record[name].get(column)
                record[name] = all(isinstance(c, list) for c in columns) and [list(pair) for pair in zip_longest(*columns)]
            need(name, isinstance(record[name], list) and record[name] and all(
                isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and good(pair[1])
                for pair in record[name]), f'pairs of a title and {what}')
        need('supporting_facts', supporting(record) & dict(record['context']).keys(), 'a title of the context')
        ids.add(record['_id'])
        records.append(record)
    return records


def supporting(record):
    """Titles of the paragraphs that matter."""
    return {title for title, _ in record['supporting_facts']}


def download(path):
    """Fetch the official file, with a progress bar, and check that it holds the questions it should."""
    part = Path(f'{path}.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(URL, timeout=60) as body, open(part, 'wb') as file:
        size = int(body.headers.get('Content-Length', 0)) or None
        with tqdm.wrapattr(body, 'read', total=size, desc=path.name) as body:
            shutil.copyfileobj(body, file)
    if (n := len(load_hotpot(part))) != RECORDS:
        raise UserError(f'{part}: {n:,} questions came instead of {RECORDS:,}, not kept as {path}')
    part.replace(path)


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
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


# --- retrieval: an untrusted regular expression ---------------------------------------------------------

MAX_PATTERN, MAX_FOUND, MAX_TEXT = 200, data.HOTPOT_FOUND, 1000      # characters, paragraphs, characters of each


def answer_queries():
    """The other end of find(), run as a program of its own, because nothing can interrupt `re` within a
    process: reads queries, a JSON line each, and answers with the numbers of the matching paragraphs.
    When a query takes too long, a watchdog (a C thread, so also while `re` runs) ends the process."""
    import faulthandler, itertools, json, re, sys
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))      # bytes
    except ImportError:                                                 # Windows
        pass
    for line in sys.stdin:
        pattern, paragraphs, seconds, most = json.loads(line)
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            answer = list(itertools.islice((i for i, text in enumerate(paragraphs) if re.search(pattern, text)), most))
        except Exception:                                               # re.error, nesting too deep, numbers too large
            answer = None
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), flush=True)


worker = None                               # the process, started by the first query and after a timeout


def find(pattern, paragraphs, seconds=1.0):
    """Find the first paragraphs, (title, text) pairs, in whose line `title: text` the regular expression matches
    (Python's re.search). Returns them, MAX_FOUND at most, texts cut to MAX_TEXT, and the outcome: 'found',
    'no match', 'malformed' or 'timed out'. The pattern may be anything: after `seconds` it is given up."""
    global worker
    if not pattern.strip() or len(pattern) > MAX_PATTERN:
        return [], 'malformed'
    if worker is None or worker.poll() is not None:
        worker = subprocess.Popen([sys.executable, '-I', '-c', getsource(answer_queries) + 'answer_queries()'], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    query = [pattern, [f'{title}: {text}' for title, text in paragraphs], seconds, MAX_FOUND]
    print(json.dumps(query), file=worker.stdin, flush=True)
    if not (answer := worker.stdout.readline()):
        worker.communicate()
        return [], 'timed out'
    if (numbers := json.loads(answer)) is None:
        return [], 'malformed'
    return [(paragraphs[i][0], paragraphs[i][1][:MAX_TEXT]) for i in numbers], 'found' if numbers else 'no match'


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


def few_shot(condition):
    """The four examples, worked out for a condition."""
    text = 'Read the paragraphs and answer the question in a few words.'
    if condition == 'retrieval':
        text += ' First search the paragraphs with regular expressions.'
    for question, answer, thought, queries, paragraphs in EXAMPLES:
        text += '\n\n' + data.hotpot_prompt(question, paragraphs, condition)
        if condition == 'retrieval':
            answered = [f' {query}\nFound: {data.hotpot_lines(search(query, paragraphs))}' for query in queries]
            text += 'Search:'.join(answered) + 'Thought:'
        text += f' {thought}\nAnswer: {answer}'
    return text + '\n\n'


# --- language models: read(text, after=None) -> state, write(state) -> (line, state) --------------------

class LanguageModel:
    """A model of models.py and a tokenizer. A state is (cache, logits of the next token); read() leaves the
    state it is given as it was, so that a prefix is read once and reused."""

    def __init__(self, name, model, tokenizer, line_tokens=64):
        self.name, self.model, self.tokenizer, self.line_tokens = name, model, tokenizer, line_tokens
        self.device = next(model.parameters()).device
        self.version = f'{sum(p.detach().cpu().double().abs().sum().item() for p in model.parameters()):.10g}'
        self.newline = tokenizer.encode('\n', add_special_tokens=False)

    def encode(self, text, first):
        """Token ids; `first`: of the beginning of a text, with the special tokens that belong there."""
        return self.tokenizer.encode(text, add_special_tokens=first)

    def branch(self, cache, more):
        """A copy of a cache (None: an empty one) with room for `more` tokens."""
        new = copy.deepcopy(cache) if cache else self.model.init_state(1, 0)
        for layer in new.layers:                                        # 4 dimensions: keys or values
            layer[:] = [F.pad(t[:, :, :new.seen], (0, 0, 0, more)) if t.dim() == 4 else t for t in layer]
        return new

    def feed(self, tokens, cache):
        """Read more tokens, changing the cache. Returns the logits (V,) after the last, and the cache."""
        for part in torch.tensor([tokens], device=self.device).split(1024, 1):     # bounds the attention mask
            hidden = self.model.hidden(part, cache)
        return self.model.head(hidden[0, -1]), cache

    @torch.inference_mode()
    def read(self, text, after=None):
        """The state after a text, or after the text that continues what the state `after` has read."""
        tokens = self.encode(text, first=after is None)
        cache = self.branch(after and after[0], len(tokens) + self.line_tokens + len(self.newline))
        logits, cache = self.feed(tokens, cache)
        return cache, logits

    @torch.inference_mode()
    def write(self, state):
        """Greedily write the rest of the line. Returns its text, without the line's end, and the state after it.
        A line ends with a newline, a token that ends texts, or line_tokens."""
        (cache, logits), line, text = state, [], ''
        while '\n' not in text:
            token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id or len(line) == self.line_tokens:
                logits, cache = self.feed(self.newline, cache)
                break
            logits, cache = self.feed([token], cache)
            line.append(token)
            text = self.tokenizer.decode(line)
        return text.split('\n')[0], (cache, logits)

    def memory(self, state):
        """Bytes of a state."""
        return sum((t[:, :, :state[0].seen] if t.dim() == 4 else t).nbytes for layer in state[0].layers for t in layer)


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
                    got, _ = self.feed(sample[6:], self.branch(self.feed(sample[:6], None)[1], 0))
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
        for part in torch.tensor([tokens], device=self.device).split(self.stride if cache is not None else len(tokens), 1):
            given = {} if cache is None else {self.cache_name: cache}
            out = self.model(input_ids=part, use_cache=True, **given)
            cache = out.get(self.cache_name)
        return out.logits[0, -1], cache

    def memory(self, state):
        torch.save(state[0], file := io.BytesIO())                      # (caches come in all sorts of classes)
        return file.tell()


class Words:
    """The tokenizer of the small world. A first prompt is padded as in training, and [PAD] ends a text."""
    eos_token_id = data.PAD
    decode = staticmethod(data.hotpot_decode)

    def encode(self, text, add_special_tokens):
        tokens = data.hotpot_encode(text)
        padding = data.hotpot_prompt_length(data.HOTPOT_PARAGRAPHS) - 1 - len(tokens)
        return [data.PAD] * padding + [data.BOS] + tokens if add_special_tokens else tokens


def pretrained(name, c, device):
    """The model of a hub name or a folder: by models.py if it can, else by transformers. Raises UserError."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError('pretrained models need one more package: pip install transformers')
    dtype, code = getattr(torch, c.dtype), dict(trust_remote_code=c.trust_remote_code)
    try:
        tokenizer, kind = AutoTokenizer.from_pretrained(name, **code), LanguageModel
        try:
            model = models.from_pretrained(name, dtype)
        except ValueError as reason:
            print(f'{name}: run by transformers, not by models.py ({reason})')
            kind, model = HubModel, AutoModelForCausalLM.from_pretrained(name, **code).to(dtype)
            if (limit := getattr(model.config, 'max_position_embeddings', None) or 4096) < 4096:
                print(f'{name}: made for {limit:,} tokens; what does not fit may end in an error or in nonsense')
    except Exception as error:                                          # transformers raises all sorts
        raise UserError(f'{name}: no model or tokenizer to be had ({(str(error).strip() or repr(error)).splitlines()[0]})')
    return kind(name, model.to(device).eval(), tokenizer, c.line_tokens)


def trained(out, device):
    """The models that train.py has trained on the task hotpot, in the order of the archs. Raises UserError."""
    found = []
    for result in Path(out).glob('hotpot-*/result.json'):
        cell = json.loads(result.with_name('config.json').read_text())
        checkpoint = read_checkpoint(result.with_name('checkpoint.pt'), cell)
        if checkpoint and cell['n_nodes'] == data.HOTPOT_PARAGRAPHS:
            model = models.make_model(cell['arch'], cell['size'], len(data.HOTPOT_WORDS), cell['d_state'],
                                      cell['frozen_embedding'])
            model.load_state_dict(checkpoint['model'])
            found.append((models.ARCHS.index(cell['arch']), '{arch}-{size}-s{seed}'.format(**cell), model))
    if not found:
        raise UserError(f'no model trained on the small world under {out}/: run  python train.py --tasks=hotpot  first '
                      '(some 5 minutes a model), or name pretrained ones, see --help')
    return [LanguageModel(name, model.to(device).eval(), Words()) for _, name, model in sorted(found, key=lambda f: f[:2])]


# --- the conversation ----------------------------------------------------------------------------------

def ask(model, record, condition, prefix=None, rounds=3, seconds=1.0):
    """Put one question to a model under a condition. prefix: the model's state after the examples, None
    without. Returns all there is to know about it, a dict: a line of the results."""
    started, paragraphs = time.monotonic(), data.hotpot_paragraphs(record)
    said = data.hotpot_prompt(record['question'], data.hotpot_paragraphs(record, condition == 'gold'), condition)
    label, state, text, queries, titles = said.split()[-1], prefix, '', [], []
    while True:
        line, state = model.write(model.read(said, state))
        line = line.strip()
        text += f'{said} {line}\n' if label else f'{said}{line}\n'
        if not label:                                                   # the model has chosen what to do
            label, line = re.fullmatch('(Search:|Answer:|) *(.*)', line, re.DOTALL).groups()
        if label == 'Answer:':
            break
        if label == 'Search:':
            found, outcome = find(line, paragraphs, seconds)
            queries.append([line[:MAX_PATTERN], outcome])
            titles += [title for title, _ in found]
            label = 'Thought:' if len(queries) >= rounds else ''        # enough searched
            said = f'Found: {data.hotpot_lines(found)}{label}'
        else:
            label = said = 'Answer:'
    gold = supporting(record) & dict(paragraphs).keys()
    return dict(id=record['_id'], condition=condition, question=record['question'], answer=record['answer'], prediction=line,
                em=exact_match(line, record['answer']), f1=f1_score(line, record['answer']), queries=queries, titles=titles,
                recall=len(gold & {*titles}) / len(gold) if condition == 'retrieval' else None,
                seconds=time.monotonic() - started, text=text)


def kept(path):
    """The results in a file, {(id, condition): dict}. A last line that a kill has torn is cut off."""
    *lines, torn = path.read_bytes().split(b'\n') if path.exists() else [b'']
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    try:
        return {(result['id'], result['condition']): result for result in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is damaged: delete it to ask anew')


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
    todo = [(r, condition) for r in records for condition in CONDITIONS if (r['_id'], condition) not in results]
    if shots and todo:
        prefixes['gold'] = prefixes['full'] = model.read(few_shot('gold'))
        prefixes['retrieval'] = model.read(few_shot('retrieval'))
        if hasattr(model, 'memory'):
            tokens, size = len(model.encode(few_shot('retrieval'), True)), model.memory(prefixes['retrieval']) / 1e6
            print(f'{model.name}: four examples with searches, {tokens:,} tokens, read once; their state is {size:.2f} MB')
    with open(path, 'a', encoding='utf-8') as file:
        for r, condition in tqdm(todo, model.name, len(todo) + len(results), initial=len(results), dynamic_ncols=True):
            results[r['_id'], condition] = result = ask(model, r, condition, prefixes[condition], rounds, seconds)
            file.write(json.dumps(result) + '\n')
            file.flush()
    print(f'{model.name}: {path}')
    return results


# --- the report ----------------------------------------------------------------------------------------

def mean(values):
    """'mean ± standard error' of numbers in [0, 1], in percent."""
    values = 100 * np.array(values, float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f'{values.mean():5.1f} ± {error:4.1f}' if len(values) else '-'


def right_under_gold(results, most):
    """ids of the questions that every model answers right under gold, at most `most` of them, in order."""
    ids = [id for id, condition in next(iter(results.values())) if condition == 'gold']
    return [id for id in ids if all(of_model[id, 'gold']['em'] for of_model in results.values())][:most]


def table(results, subset):
    """results: {model name: {(id, condition): dict}}; subset: ids. A line per model and condition."""
    lines = [f'{"":39}  {f"{len(subset)} right under gold":^29}  {"all questions":^29}  {"supporting":>12}'
             f'  {"queries a question, % of them":^35}',
             f'{"model":28} {"condition":10}  {"EM":^13}   {"F1":^13}  {"EM":^13}   {"F1":^13}  {"found, %":>12}'
             f'  {"number":>7} {"malformed":>9} {"no match":>8} {"too slow":>8}  {"s/question":>10}']
    lines.append('-' * len(lines[1]))
    for name, of_model in results.items():
        for condition in CONDITIONS:
            rows, searched = [r for (_, c), r in of_model.items() if c == condition], ''
            scores = [f'{mean([r["em"] for r in some]):^13}   {mean([r["f1"] for r in some]):^13}'
                      for some in ([of_model[id, condition] for id in subset], rows)]
            if condition == 'retrieval':
                outcomes = [outcome for r in rows for _, outcome in r['queries']]
                share = [100 * outcomes.count(o) / len(outcomes) for o in ('malformed', 'no match', 'timed out')]
                searched = (f'{mean([r["recall"] for r in rows]):>12}  {len(outcomes) / len(rows):7.2f} '
                            '{:9.1f} {:8.1f} {:8.1f}'.format(*share))
            lines.append(f'{name[-28:]:28} {condition:10}  {scores[0]}  {scores[1]}  {searched:49}'
                         f'  {np.mean([r["seconds"] for r in rows]):10.3f}')
    return '\n'.join(lines)


def by_word_overlap(record):
    """The two paragraphs that share most words with the question, rare ones counting more: no model."""
    words = lambda text: set(normalize_answer(text).split())
    paragraphs = data.hotpot_paragraphs(record)
    n = Counter(word for paragraph in paragraphs for word in words(' '.join(paragraph)))
    shared = lambda paragraph: words(' '.join(paragraph)) & words(record['question'])
    score = lambda paragraph: math.fsum(math.log(len(paragraphs) / n[word]) for word in shared(paragraph))     # in any order
    return sorted(paragraphs, key=score, reverse=True)[:2]


def guess(record, paragraphs):
    """Small world: chance that yes or no, or a town out of these paragraphs, drawn blindly, is right."""
    towns = {word for _, text in paragraphs for word in re.findall(r'\w+', text)} & {*data.TOWN}
    return 1 / 2 if record['type'] == 'comparison' else (record['answer'] in towns) / len(towns)


def baselines(records):
    """What needs no model: word overlap and, in the small world, guessing."""
    overlap = [by_word_overlap(r) for r in records]
    hits = [len(dict(two).keys() & supporting(r)) / len(supporting(r)) for r, two in zip(records, overlap)]
    text = f'word overlap with the question finds {mean(hits)} % of the supporting paragraphs'
    if records[0]['_id'].startswith('small-world'):
        gold, full = ([data.hotpot_paragraphs(r, gold=only) for r in records] for only in (True, False))
        text += '\na guess among yes and no, or the towns: {} % right under gold, {} % under full, {} % on those two'.format(
            *(mean(list(map(guess, records, shown))) for shown in (gold, full, overlap)))
    return text


def main(argv):
    argv = [f'{a}=True' if a in ('--download', '--trust_remote_code') else a for a in argv]
    c = parse(argv, Constants, 'eval_hotpot.py', {'default': {}})
    device, results = pick_device(c.device), {}
    if c.models:
        path = Path(c.data)
        if not path.exists() and not c.download:
            raise UserError(f'{path} is not there: add --download to fetch it from {URL} (45 MB), or name a file, --data=...')
        if not path.exists():
            download(path)
        records = load_hotpot(path)[:c.questions or None]
        loaded = (pretrained(name, c, device) for name in c.models.split(','))      # one at a time
    else:
        loaded = trained(c.out, device)
        records = data.hotpot_records(c.questions or 500)
    for model in loaded:
        results[model.name] = evaluate(model, records, Path(c.out) / 'hotpot', bool(c.models), c.rounds, c.query_seconds)
        del model
    for record in records[:c.show]:
        for (name, of_model), condition in product(results.items(), CONDITIONS):
            r = of_model[record['_id'], condition]
            print(f'\n=== {name}, {condition}: expected {r["answer"]!r}, EM {r["em"]:.0f}, F1 {r["f1"]:.2f}\n{r["text"]}')
    print(f'\n{table(results, right_under_gold(results, c.subset))}\n\nEM and F1 in percent ± standard error. '
          f'{len(records):,} questions; {baselines(records)}')


if __name__ == '__main__':
    sys.exit(cli(main, 'eval_hotpot.py', sys.argv[1:]))
