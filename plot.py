"""The figures, drawn from the records of runs. Knows results, no models.

  python plot.py                             all of results/ -> figures/*.png and walk.gif
  python plot.py --out=out --figures=mine    what is below another folder, to another folder
  python plot.py --out=results/paper.jsonl   one experiment

A *record* is what train.py writes of a run, a dict: its constants, what was measured, its log and
some examples. It is a line of results/EXPERIMENT.jsonl, or a file of its own, out/NAME/result.json.

Each figure is one function. It takes all that was found (see load) and yields a name and a figure
if there is something to draw. A picture compares runs that differ in nothing but what it shows; a
line names the others. A point is a mean over seeds, and its bar goes from the smallest to the
largest. The colours are Okabe and Ito's, safe for the colour-blind. Lines differ in width and
markers, so that three lines at 100% can be told apart. """
import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'        # before the import: draw to files, in a notebook, too

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

import data

LOOKS = {
    'transformer': dict(label='Transformer', color='#0072B2', marker='s', markersize=8,
                        linewidth=3.5),
    'hybrid': dict(label='hybrid', color='#009E73', marker='^', markersize=6, linewidth=2),
    'mamba': dict(label='RNN (Mamba)', color='#D55E00', marker='o', markersize=3.5, linewidth=0.9),
    'deltanet': dict(label='RNN (DeltaNet)', color='#CC79A7', marker='D', markersize=4,
                     linewidth=1.2),
    'gru': dict(label='RNN (GRU)', color='#E69F00', marker='v', markersize=4, linewidth=1.2),
}
RED, YELLOW, GREY = '#C00000', '#F0E442', '#999999'
SETUPS = {'direct': 'answer at once', 'cot': 'chain of thought', 'retrieval': 'with a retriever'}
PRIMITIVES = {'index': 'index', 'recall': 'associative recall', 'cgram': 'c-gram retrieval',
              'counting': 'counting'}
ORDER = [*LOOKS, *SETUPS, *PRIMITIVES]                          # of lines and panels

# Constants of a run: what makes a kind of model, what all kinds in a picture must share, and what
# each kind may choose.
MODEL = ('arch', 'd_state')
SHARED = ('layers', 'distribution', 'frozen_embedding', 'samples', 'batch_size', 'order', 'join',
          'mix', 'mix_largest', 'grad_clip', 'dtype')
OWN = ('lr', 'warmup')

STYLE = {
    'font.size': 9,
    'axes.titlesize': 9,
    'figure.titlesize': 10,
    'errorbar.capsize': 2,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'savefig.dpi': 200,
    'savefig.bbox': 'tight',
    'legend.frameon': False,
    'hatch.linewidth': 0.6,
}


# --- which records go into a picture --------------------------------------------------------------

def where(records, **wanted):
    """The records with these values."""
    found = records
    for name, value in wanted.items():
        found = [r for r in found if r.get(name) == value]
    return found


def rank(item):
    """For sorting groups: what ORDER names comes first, in that order."""
    key, _ = item
    return [(ORDER.index(value), 0) if value in ORDER else (len(ORDER), value) for value in key]


def groups(records, *names):
    """[(values of these names, the records with these values)], sorted by the values."""
    found = {}
    for r in records:
        key = tuple(r[name] for name in names)
        found.setdefault(key, []).append(r)
    return sorted(found.items(), key=rank)


def largest_group(records, names):
    """The records with the commonest values of these names; what several tasks share comes
    first."""
    found = [same for _, same in groups(records, *names)]
    return max(found, key=lambda same: (len({r['task'] for r in same}), len(same)), default=[])


def comparable(records, figure, *one):
    """The records that may stand in one picture: of those with the same values of the names `one`,
    the most; of these, for each task and setup, the largest group that shares its constants. A line
    names the others."""
    records = where(records, tuning=False)
    drawn = []
    for _, same in groups(largest_group(records, one), 'task', 'setup', 'size'):
        for _, kind in groups(largest_group(same, SHARED), *MODEL):
            drawn += largest_group(kind, OWN)
    others = [r for r in records if not any(r is other for other in drawn)]
    differ = [name for name in (*one, *SHARED, *OWN)
              if {r[name] for r in others} - {r[name] for r in drawn}]
    if others:
        sources = ', '.join(sorted({r['source'] for r in others}))
        print(f'{figure}: runs with another {", ".join(differ)} are not drawn ({sources})')
    return drawn


def istree(found):
    """The runs of IsTree, but for those that mix n of one's choice (see frontier)."""
    return where(found['records'], task='istree', mix='')


def lengths(records):
    """A record for each n on which the runs were evaluated."""
    return [r | row for r in records for row in r['by_length']]


# --- what the figures share -----------------------------------------------------------------------

def look(arch):
    return dict(LOOKS.get(arch, dict(label=arch, color='black', marker='D')))


def kinds(records):
    """[(look, records)] for each kind of model. Of an architecture with several d_state, the
    commonest has a full line and the others have dashed ones."""
    found = []
    for (arch,), same in groups(records, 'arch'):
        usual = largest_group(same, MODEL)
        for (d_state,), rows in groups(same, 'd_state'):
            style = look(arch)
            if d_state != usual[0]['d_state']:
                style['label'] += f', d_state {d_state}'
                style |= dict(linestyle='--', fillstyle='none')
            found.append((style, rows))
    return found


def spread(percents):
    """Mean, and how far the smallest and the largest are from it."""
    mean = np.mean(percents)
    return mean, mean - min(percents), max(percents) - mean


def curve(panel, records, x, y, **style):
    """The percents y of records against x."""
    at, points = [], []
    for (value,), rows in groups(records, x):
        at.append(value)
        points.append(spread([100 * r[y] for r in rows]))
    means, below, above = zip(*points)
    panel.errorbar(at, means, (below, above), **style)


def bars(panel, series, x, y):
    """Bars side by side. series: [(look, records)]; the percents y of the records against their
    x."""
    labels = list(dict.fromkeys(r[x] for r in series[0][1]))
    width = 0.8 / len(series)
    for i, (style, rows) in enumerate(series):
        at = np.arange(len(labels)) + width * (i - (len(series) - 1) / 2)
        points = [spread([100 * r[y] for r in where(rows, **{x: label})]) for label in labels]
        means, below, above = zip(*points)
        hatch = '////' if 'fillstyle' in style else None
        drawn = panel.bar(at, means, 0.9 * width, yerr=(below, above), edgecolor='white',
                          color=style['color'], label=style['label'], hatch=hatch)
        panel.bar_label(drawn, [f'{mean:.1f}' for mean in means], fontsize=6)
    panel.set_xticks(range(len(labels)), labels, fontsize=8)


def panels(titles, ylabel, width=2.7):
    """A figure with a panel of percents for each title, side by side, and the panels."""
    figure, axes = plt.subplots(1, len(titles), figsize=(width * len(titles), 2.8), squeeze=False)
    for panel, title in zip(axes[0], titles):
        panel.set_title(title)
        panel.set(ylim=(0, 105))
    axes[0, 0].set(ylabel=ylabel)
    return figure, axes[0]


def by_setup(records, ylabel):
    """A figure with a panel for each setup, and [(panel, records)]."""
    found = groups(records, 'setup')
    figure, axes = panels([SETUPS[setup] for (setup,), _ in found], ylabel)
    for panel, ((setup,), _) in zip(axes, found):
        if setup == 'direct':
            panel.axhline(50, linestyle=':', color=GREY, label='a guess of the answer')
    return figure, [(panel, rows) for panel, (_, rows) in zip(axes, found)]


def name_of(figure, r):
    """The name of a picture."""
    return f'{figure}-{r["size"]}-n{r["n"]}'


def who(setup, arch):
    """A model in words."""
    return f'{look(arch)["label"]}, {SETUPS[setup]}'


def finish(figure, title, note=''):
    """A sentence above, a note below and, at the right, the legend of all panels, each label
    once."""
    labels = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            labels[label] = handle
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc='center left', bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, y=1.07)
    figure.text(0.01, -0.02, note, fontsize=7, color='grey', va='top')
    return figure


def log_axis(panel, rows, x, label):
    """A logarithmic x-axis, with ticks exactly where there are points."""
    ticks = sorted({r[x] for r in rows})
    panel.set(xscale='log', xlabel=label)
    panel.set_xticks(ticks, ticks)
    panel.xaxis.set_minor_locator(NullLocator())


def best_guess(panel, rows):
    """A dashed line: what the best guess that looks nothing up gets right."""
    points = [(n, 100 * same[0]['chance']) for (n,), same in groups(rows, 'n')]
    panel.plot(*zip(*points), '--', color=GREY, label='best guess without look-up')


def shade(i, count):
    """The look of the i-th of so many sizes."""
    colour = plt.get_cmap('viridis')(0.92 * i / max(1, count - 1))
    return dict(color=colour, marker='osD^v'[i % 5], markersize=4, linewidth=1.3)


# --- IsTree: who writes the right trace -----------------------------------------------------------

def exact(found):
    """The main figure: exact traces against n, a panel for each setup, a line for each kind of
    model."""
    records = comparable(istree(found), 'exact', 'size')
    if not records:
        return
    figure, parts = by_setup(records, 'exact traces (%)')
    for panel, rows in parts:
        for style, line in kinds(rows):
            curve(panel, line, 'n', 'exact', **style)
        log_axis(panel, rows, 'n', 'n, nodes of the graph')
    title = 'Is it a tree? An exact trace has every token right, the answer included.'
    yield f'exact-{records[0]["size"]}', finish(figure, title)


def learning(found):
    """Who learns how fast: exact traces against training samples, a panel for each setup, a line
    for each run. Its last point is the result, on all held-out samples."""
    logged = [r for r in istree(found) if r.get('log')]
    records = comparable(logged, 'learning', 'size', 'n')
    if not records:
        return
    figure, parts = by_setup(records, 'exact traces (%)')
    for panel, rows in parts:
        for style, line in kinds(rows):
            style |= dict(linewidth=1, markersize=3)
            for r in line:
                points = [*r['log'], dict(samples=r['samples_trained'], exact=r['exact'])]
                thousands = [p['samples'] / 1000 for p in points]
                panel.plot(thousands, [100 * p['exact'] for p in points], **style)
        panel.set_xlabel('thousand samples')
    r = records[0]
    title = f'IsTree, n={r["n"]}: each line is a run, watched on 200 held-out samples.'
    yield name_of('learning', r), finish(figure, title)


def errors(found):
    """Where it goes wrong: the share of wrong tokens of each kind, all tokens before them given.
    In-context retrieval (the next neighbour) against bookkeeping."""
    traced = [r for r in istree(found) if r.get('errors') and r['setup'] != 'direct']
    records = comparable(traced, 'errors', 'size', 'n')
    if not records:
        return
    figure, parts = by_setup(records, 'wrong tokens (%)')
    figure.set_size_inches(4.5 * len(parts), 2.8)
    worst = max(max(r['errors'].values()) for r in records)
    for panel, runs in parts:
        rows = []
        for r in runs:
            for kind, wrong in r['errors'].items():
                rows.append(r | dict(kind=kind.replace(' ', '\n', 1), wrong=wrong))
        bars(panel, kinds(rows), 'kind', 'wrong')
        panel.set(ylim=(0, 115 * worst))
    title = f'IsTree, n={r["n"]}: how often a token is wrong if all tokens before it are right.'
    yield name_of('errors', r), finish(figure, title)


def attention(found):
    """What the mechanism looks like: where the top attention layer of the hybrid looks, a row for
    each token that was written, a column for each of the prompt. Framed: the edge that leads to the
    next."""
    for r in where(found['attention'], arch='hybrid')[:1]:
        prompt, wrote = r['prompt'], r['trace']
        figure, axes = plt.subplots(figsize=(8, 6))
        weights = np.array(r['weights'])[:, :len(prompt)]
        image = axes.imshow(weights, cmap='Blues', vmin=0, aspect='auto')
        figure.colorbar(image, label='attention, mean over heads')
        edges = edges_of(' '.join(prompt))
        for i, step in enumerate(zip(wrote, wrote[1:])):
            for j, edge in enumerate(edges):
                if set(edge) == set(step):
                    axes.add_patch(Rectangle((3 * j + 0.5, i - 0.5), 3, 1, fill=False, color=RED))
        axes.set_xticks(range(len(prompt)), prompt, fontsize=6, rotation=90)
        axes.set_yticks(range(len(wrote)), wrote, fontsize=6)
        axes.set(xlabel='the prompt', ylabel='the right trace, from top to bottom')
        axes.set_title('Where the hybrid looks. Framed: the edge that leads to the next node.')
        yield name_of('attention', r), figure


# --- IsTree: what is needed from memory -----------------------------------------------------------

def transplant(found):
    """Memory transplant and rounding. Left: exact traces before and after a model's memory of the
    prompt is replaced by its memory of another graph, the donor's. Right: exact traces on trees if
    each float of the memory is rounded to k bits."""
    records = comparable(found['probes'], 'transplant', 'size', 'n')
    if not records:
        return
    figure, (left, right) = panels(["what is written with another graph's memory",
                                    'how finely must the memory be kept'], 'exact traces (%)', 5)
    series = []
    cases = (('own graph, before', 'nothing', 'own', '#444444'),
             ('own graph, after', 'everything', 'own', '#56B4E9'),
             ("donor's graph, after", 'everything', 'donor', '#E69F00'))
    for label, replaced, whose, colour in cases:
        rows = []
        for (setup, arch, _), runs in groups(records, 'setup', *MODEL):
            for r in runs:
                model = f'{look(arch)["label"]}\n{SETUPS[setup]}'
                rows.append(dict(model=model, share=r['transplant'][replaced][whose]))
        series.append((dict(label=label, color=colour), rows))
    bars(left, series, 'model', 'share')
    left.tick_params(axis='x', labelsize=6, labelrotation=20)
    rows = []
    for r in records:
        for k, measured in r['rounding'].items():
            rows.append(r | dict(k=int(k), exact_trees=measured['exact_trees']))
    for style, line in with_setup(rows):
        curve(right, line, 'k', 'exact_trees', **style)
    right.set(xlabel='bits of a float', ylabel='exact traces on trees (%)')
    title = f'IsTree, n={r["n"]}: what is carried from the prompt to the trace is changed.'
    note = 'The models were not trained with rounding: the bits are an upper bound on those in use.'
    yield name_of('transplant', r), finish(figure, title, note)


def with_setup(records):
    """[(look, records)] for each kind of model in each setup, which the label names."""
    found = []
    for (setup,), runs in groups(records, 'setup'):
        for style, line in kinds(runs):
            style['label'] += f', {SETUPS[setup]}'
            if setup == 'retrieval':
                style['linestyle'] = ':'
            found.append((style, line))
    return found


def frontier(found):
    """What is learned on IsTree with a recurrent memory of so many floats. Each run mixes all n."""
    mixed = [r for r in where(found['records'], task='istree') if r['mix']]
    records = comparable(mixed, 'frontier', 'size', 'n')
    if records:
        figure = against_memory(records, 'exact', 'exact traces (%)')
        title = f'IsTree: what is learned from {records[0]["samples"]:,} samples of all n.'
        yield f'frontier-{records[0]["size"]}', finish(figure, title)


def looks_back(r):
    """Whether a model can look at its whole context: has it attention, or a retriever?"""
    return r['setup'] == 'retrieval' or r['memory'].get('cache', 0) > 0


def against_memory(records, y, ylabel):
    """A figure of three panels: y against n, a line for each size of a recurrent memory (its state,
    without windows); the same of what looks back; and, of each recurrent run, the largest n of
    which 95% is right, with the slope of a line through them over logarithms."""
    figure, (left, middle, right) = panels(
        ['recurrent memory', 'attention, or a retriever', 'largest n with 95%'], ylabel, 3.2)
    recurrent = with_floats([r for r in records if not looks_back(r)])
    sizes, inside = groups(recurrent, 'floats', 'arch'), []
    for i, ((floats, arch), runs) in enumerate(sizes):
        style = shade(i, len(sizes)) | dict(marker=look(arch)['marker'])
        label = f'{look(arch)["label"]}, {floats:,} floats of state'
        curve(left, lengths(runs), 'n', y, label=label, **style)
        for r in runs:
            n, sign = largest_n(r, y)
            right.plot(floats, n, fillstyle='none', **style)
            right.annotate(sign, (floats, n), (-12, -3), textcoords='offset points')
            if not sign:
                inside.append((floats, n))
    for style, line in with_setup([r for r in records if looks_back(r)]):
        curve(middle, lengths(line), 'n', y, **style)
    for panel in (left, middle):
        log_axis(panel, lengths(records), 'n', 'n')
    if len({floats for floats, _ in inside}) > 1:
        floats, n = np.array(inside).T
        slope, offset = np.polyfit(np.log(floats), np.log(n), 1)
        right.plot(floats, np.exp(offset) * floats ** slope, '--', color='black',
                   label=f'slope {slope:.2f}')
    ticks = [row['n'] for row in records[0]['by_length']]
    right.set(yscale='log', ylim=(ticks[0] / 1.3, ticks[-1] * 1.3), ylabel='n')
    right.set_yticks(ticks, ticks)
    right.yaxis.set_minor_locator(NullLocator())
    log_axis(right, recurrent, 'floats', 'floats of recurrent state')
    right.tick_params(axis='x', labelrotation=60)
    return figure


def largest_n(r, name, share=0.95):
    """Up to which n is a run that good, between two n by interpolation over log n? Returns n and
    ''; if not even the smallest n is, the smallest and '<'; if all are, the largest and '≥'."""
    points = [(row['n'], row[name]) for row in r['by_length']]
    if points[0][1] < share:
        return points[0][0], '<'
    for (n, a), (m, b) in zip(points, points[1:]):
        if a >= share > b:
            return n * (m / n) ** ((a - share) / (a - b)), ''
    return points[-1][0], '≥'


def with_floats(records):
    """Records with the number of floats of their recurrent memory: the state, not the windows."""
    return [r | dict(floats=r['memory'].get('state', 0)) for r in records]


# --- the primitives, and how much a memory holds --------------------------------------------------

def primitives(found):
    """The bottleneck in its purest form (paper, section 4): accuracy against the length of the
    context. One run has learned all lengths of a line."""
    asked = [r for r in where(found['records'], setup='direct') if r['task'] in PRIMITIVES]
    records = comparable(asked, 'primitives', 'size', 'n')
    if not records:
        return
    tasks = groups(records, 'task')
    figure, axes = panels([PRIMITIVES[task] for (task,), _ in tasks], 'accuracy (%)')
    for panel, (_, runs) in zip(axes, tasks):
        rows = lengths(runs)
        for style, line in kinds(rows):
            curve(panel, line, 'n', 'accuracy', **style)
        best_guess(panel, rows)
        log_axis(panel, rows, 'n', 'n, pairs or tokens')
    title = 'Questions about a sequence of n parts, answered at once. Each run is trained on all n.'
    yield name_of('primitives', runs[0]), finish(figure, title)


def recall(found, figure):
    """The runs of associative recall with the largest n, but of recurrent models that answer at
    once only DeltaNets. (Mamba and the GRU stay near the best guess, see results/README.md.)"""
    runs = where(found['records'], task='recall')
    runs = where(runs, n=max([r['n'] for r in runs], default=0))
    records = comparable(runs, figure, 'size', 'n')
    return [r for r in records if looks_back(r) or r['arch'] == 'deltanet']


def capacity(found):
    """How many pairs a DeltaNet recalls whose memory has so many floats. Each run mixes all n."""
    records = recall(found, 'capacity')
    if where(records, arch='deltanet', setup='direct'):
        figure = against_memory(records, 'accuracy', 'accuracy (%)')
        for panel in figure.axes[:2]:
            best_guess(panel, lengths(records))
        title = 'Associative recall of n pairs: what is learned with a memory of so many floats.'
        yield 'capacity', finish(figure, title, 'Other recurrent models are not drawn.')


def bits(found):
    """The communication game (train.messages): accuracy of recall against the bits of the message
    that one player sends the other, a line for each size of a DeltaNet's memory; and what is
    possible with so many bits."""
    played = [r for r in recall(found, 'bits-deltanet') if r.get('messages')]
    sizes = groups(with_floats(played), 'floats')
    if not sizes:
        return
    figure, axes = panels(['n=16', 'n=64'], 'accuracy (%)', 3.6)
    for panel, n in zip(axes, (16, 64)):
        for i, ((floats,), runs) in enumerate(sizes):
            games = [game for r in runs for game in where(r['messages'], n=n)]
            label = f'{floats:,} floats of state'
            draw_game(panel, games, shade(i, len(sizes)) | dict(label=label))
        task = data.Recall(runs[0]['n'], 'direct')
        values = task.how_many_numbers(task.n)
        enough = n * math.log2(values)
        sent = np.geomspace(enough / 30, enough, 100)
        possible = [100 * best_possible(some, n, values) for some in sent]
        panel.plot(sent, possible, color='black', label='what is possible')
        panel.axvline(enough, color='black', linestyle=':', label='the bits of n values')
        panel.set(xscale='log', xlabel='bits of the message')
    title = "One player reads n pairs and sends a DeltaNet's memory; the other answers from it."
    note = 'At the points: k, the bits of a float. All floats count, those of the windows, too.'
    yield 'bits-deltanet', finish(figure, title, note)


def draw_game(panel, games, style):
    """Accuracy against the bits of the message, with the bits of a float beside some points."""
    sent, right = [], []
    for (some, k), same in groups(games, 'bits', 'bits_per_float'):
        sent.append(some)
        right.append(100 * np.mean([game['accuracy'] for game in same]))
        if k in (1, 2, 4) and right[-1] > 20:
            panel.annotate(k, (sent[-1], right[-1]), (-2, -9), textcoords='offset points',
                           fontsize=6)
    panel.plot(sent, right, **style)


def best_possible(message_bits, n, values):
    """The largest accuracy that anyone, however trained, can reach on average with a message of so
    many bits about n values, each one of `values` at random, by rate-distortion theory (Cover &
    Thomas 2006, chapter 10): accuracy a takes n (log2(values) - h(a) - (1 - a) log2(values - 1))
    bits, with h(a) = -a log2(a) - (1 - a) log2(1 - a)."""
    if message_bits >= n * math.log2(values):
        return 1.0
    low, high = 1 / values, 1.0
    for _ in range(60):
        a = (low + high) / 2
        h = -a * math.log2(a) - (1 - a) * math.log2(1 - a)
        needed = n * (math.log2(values) - h - (1 - a) * math.log2(values - 1))
        if needed <= message_bits:
            low = a
        else:
            high = a
    return low


# --- what it costs, and HotpotQA ------------------------------------------------------------------

def generation(found):
    """What one more token costs against the tokens before it, in time and in memory."""
    for (size,), rows in groups(found['generation'], 'size'):
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.9))
        for (arch,), line in groups(rows, 'arch'):
            tokens = [r['length'] for r in line]
            axes[0].plot(tokens, [1e3 * r['seconds'] for r in line], **look(arch))
            axes[1].plot(tokens, [1e-6 * r['bytes'] for r in line], **look(arch))
        for panel, label in zip(axes, ('ms a token', 'memory (MB)')):
            log_axis(panel, rows, 'length', 'tokens of context')
            panel.tick_params(axis='x', labelrotation=60)
            panel.set(yscale='log', ylabel=label)
        yield f'generation-{size}', finish(figure, f'What one more token costs a model of {size}.')


def asks_for_a_name(answer):
    """Not for yes or no, which can be guessed: what HotpotQA calls a bridge question, mostly."""
    return answer.get('type') == 'bridge' or answer.get('answer', 'no') not in ('yes', 'no')


def hotpot(found):
    """HotpotQA: exact match of each model under the three conditions, without the questions that
    are answered by yes or no. In the small world a guess is one of the towns shown."""
    rows = []
    for name, answers in found['hotpot']:
        asked = [r for r in answers if asks_for_a_name(r)]
        if not asked:
            print(f'hotpot: {name} is not drawn, the type of its questions is not known')
        arch, _, rest = re.sub(r'-s\d+$', '', name).partition('-')
        model = f'{look(arch)["label"]}\n{rest}'
        for (condition,), same in groups(asked, 'condition'):
            em = np.mean([r['em'] for r in same])
            rows.append(dict(model=model, condition=condition, em=em))
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(7, 2.9))
    series = []
    for condition, colour in (('gold', GREY), ('full', '#E69F00'), ('retrieval', '#56B4E9')):
        look_of_condition = dict(label=condition, color=colour)
        series.append((look_of_condition, where(rows, condition=condition)))
    bars(axes, series, 'model', 'em')
    axes.axhline(100 / 3, linestyle='--', color='black', label='a guess: one of 3 towns (gold)')
    axes.axhline(100 / 15, linestyle=':', color='black', label='one of 15 (full, retrieval)')
    axes.set(ylabel='exact match (%)', ylim=(0, 112))
    title = 'HotpotQA: questions that ask for a name (in the small world: for a town).'
    yield 'hotpot', finish(figure, title)


# --- what happens: one sample, a film of it, the idea ---------------------------------------------

def edges_of(prompt):
    """The edges of a prompt, read from its text: [(u, v), ...], nodes as words."""
    return re.findall(r'(\d+) - (\d+)', prompt)


def tour(words):
    """Where a search has been: {index: node} of the nodes that it has entered or returned to."""
    steps = {}
    for i, kind in enumerate(data.kinds(words)):
        if kind in ('next neighbour', 'return to the parent'):
            steps[i] = words[i]
    return steps


def first_wrong(written, expected):
    """The index of the first wrong word of a list; None if all are right."""
    for i in range(max(len(written), len(expected))):
        if written[i:i + 1] != expected[i:i + 1]:
            return i
    return None


def chosen_example(found):
    """Of the held-out graphs of which examples were kept, the one that tells most: the first on
    which the RNN errs without a retriever. Returns {(setup, arch): (record, example)} and a
    sentence that says how it was chosen; ({}, '') if there is none."""
    runs = [r for r in istree(found) if r.get('examples')]
    asked = {}                                                  # prompt -> who wrote what
    for _, same in groups(comparable(runs, 'sample and walk', 'size', 'n'), 'arch'):
        for r in largest_group(same, MODEL):
            for example in r['examples']:
                of_all = asked.setdefault(example['prompt'], {})
                of_all.setdefault((r['setup'], r['arch']), (r, example))    # of seeds, the first
    best = next(iter(asked.values()), {})
    why = f'One of {len(asked)} held-out graphs whose traces were kept.'
    for of_all in asked.values():
        told = of_all.get(('cot', 'mamba'))
        if told and told[1]['written'] != told[1]['expected']:
            best = of_all
            why = (f'Of {len(asked)} held-out graphs whose traces were kept, the first on which '
                   'the RNN without a retriever errs.')
            break
    return best, why


def places_of(edges):
    """Where to draw the nodes of a two-star graph: {node: (x, y)}. The nodes with most edges are
    the centres; then come the two leaves that are joined."""
    degree = Counter(v for edge in edges for v in edge)
    nodes = [v for v, _ in degree.most_common()]
    place = {nodes[0]: (-1.45, 0), nodes[1]: (1.45, 0)}
    beside = {v for edge in edges if nodes[0] in edge for v in edge}
    left = [v for v in nodes[2:] if v in beside]
    right = [v for v in nodes[2:] if v not in beside]
    for leaves, x, first in ((left, -1.45, 0), (right, 1.45, math.pi)):
        for i, v in enumerate(leaves):
            angle = first + 2 * math.pi * i / len(leaves)
            place[v] = (x + math.cos(angle), math.sin(angle))
    return place


def tell(graph, text, example, t, title, colour):
    """Draw the first t words that were written (None: all): in the graph, the walk in colour, a
    wrong step as a red arrow, the right one dotted; the last lines of the text, its first wrong
    word in > <."""
    words, expected = example['written'].split()[:t], example['expected'].split()[:t]
    edges, at = edges_of(example['prompt']), first_wrong(words, expected)
    place = places_of(edges)
    walked = list(tour(words[:at]).values())
    for axes in (graph, text):
        axes.clear()
        axes.set_axis_off()
    graph.set(xlim=(-2.7, 2.7), ylim=(-1.25, 1.25), aspect='equal')
    graph.set_title(title, color=colour, weight='bold')
    for edge in edges:
        draw_step(graph, place, edge, color='#CCCCCC', linewidth=1)
    for step in zip(walked, walked[1:]):
        draw_step(graph, place, step, color=colour, linewidth=3)
    if at is not None:
        here, wrong, right = [''.join(part) or 'nothing' for part in (
            walked[-1:], words[at:at + 1], expected[at:at + 1])]
        draw_step(graph, place, (here, right), color='black', linewidth=3, linestyle=':')
        draw_step(graph, place, (here, wrong), color=RED, linewidth=2, linestyle='--')
        graph.text(0, -1.4, f'At {here} it wrote {wrong} instead of {right}.', color=RED,
                   fontsize=7, ha='center')
        words[at:at + 1] = [f'>{wrong}<']
    for v, (x, y) in place.items():
        circle = dict(boxstyle='circle', edgecolor=colour if v in walked else '#BBBBBB',
                      facecolor=YELLOW if v in walked[-1:] else 'white')
        graph.text(x, y, v, ha='center', va='center', fontsize=7, bbox=circle)
    lines = textwrap.wrap(' '.join(words), 60, break_on_hyphens=False, break_long_words=False)
    text.text(0, 1, '\n'.join(lines[-3:]), family='monospace', fontsize=6.5, va='top')


def draw_step(graph, place, nodes, **style):
    """A line between two nodes; what is no node is left out."""
    x, y = zip(*[place[v] for v in nodes if v in place] or [(0, 0)])
    graph.plot(x, y, zorder=1, **style)


SHOWN = [('cot', 'transformer'), ('cot', 'hybrid'), ('cot', 'mamba'), ('retrieval', 'mamba')]


def sample(found):
    """One held-out graph and the search that each model wrote, with its first wrong step."""
    asked, why = chosen_example(found)
    shown = [model for model in SHOWN if model in asked]
    if not shown:
        return
    figure, axes = plt.subplots(4, 2, figsize=(8, 6.4), height_ratios=[4, 1, 4, 1])
    for panel in axes.flat:
        panel.set_axis_off()
    for i, (setup, arch) in enumerate(shown):
        graph, text = axes[2 * (i // 2):, i % 2][:2]
        record, example = asked[setup, arch]
        title = f'{who(setup, arch)}: {example["written"].split(" ")[-1]}'
        tell(graph, text, example, None, title, look(arch)['color'])
    edges = '  '.join(f'{u}-{v}' for u, v in edges_of(example['prompt']))
    yield name_of('sample', record), finish(figure, f'Is it a tree?  {edges}', why)


def frames(example):
    """After how many words a frame of the film is drawn (None: all). It stops at the first wrong
    word and at the end."""
    words, expected = example['written'].split(), example['expected'].split()
    at = first_wrong(words, expected)
    every = 1 if len(words) < 60 else 5
    stop = [] if at is None else 8 * [at + 1]
    return sorted([*range(0, len(words), every), *stop]) + 8 * [None]


def draw_frame(parts, setup, arch, record, example, t, most):
    """A frame of the film, after t words: the graph, the text, and the floats that are carried, of
    at most `most`. The cache grows with every word, the rest does not."""
    graph, text, axes = parts
    tell(graph, text, example, t, who(setup, arch), look(arch)['color'])
    words, prompt = example['written'].split()[:t], example['prompt'].split()
    cache = record['memory'].get('cache', 0)                    # after the prompt
    floats = sum(record['memory'].values()) + cache * len(words) / len(prompt)
    axes.clear()
    axes.barh(0, floats, color=look(arch)['color'])
    axes.set(xlim=(0, most), yticks=[], xlabel=f'{floats:,.0f} floats are carried')


def film(found, path):
    """Write the film of one sample: what each model writes, where its search goes, and what it
    carries. Returns whether there is something to tell."""
    asked, _ = chosen_example(found)
    shown = [model for model in SHOWN if model in asked]
    if shown:
        figure, parts = plt.subplots(3, 1, figsize=(6, 5), height_ratios=(8, 1.5, 0.5))
        most = 2 * max(sum(asked[model][0]['memory'].values()) for model in shown)
        writer = PillowWriter(fps=6)
        with writer.saving(figure, path, dpi=100):
            for model in shown:
                for t in frames(asked[model][1]):
                    draw_frame(parts, *model, *asked[model], t, most)
                    writer.grab_frame()
    return bool(shown)


def idea(found):
    """The paper in a drawing: what each kind of model carries from token to token. Needs no
    results."""
    figure, axes = plt.subplots(1, 4, figsize=(10.6, 2.6))
    text = ['2-1', '4-0', '4-3', '...', '4-?']
    drawings = (('mamba', text, 'RNN: a box of fixed size',
                 'The longer the text, the more\nof it is forgotten.'),
                ('transformer', text, 'Transformer: a growing cache',
                 'Nothing is forgotten; the memory\ngrows with the text.'),
                ('hybrid', text, 'Hybrid: a box and a cache',
                 'One layer of attention on top:\nwhat the box forgets is in its cache.'),
                ('mamba', [*text, '3'], 'RNN with a retriever',
                 'What was forgotten is looked up\nin the text and pasted at its end.'))
    for panel, (arch, words, title, below) in zip(axes, drawings):
        panel.set(xlim=(-0.7, 5.7), ylim=(-2.75, 2.4), aspect='equal', xticks=[], yticks=[])
        panel.spines[:].set(visible=True, color='#CCCCCC')
        panel.set_title(title, fontsize=10, weight='bold', color=look(arch)['color'])
        panel.text(2.5, -1.75, below, ha='center', va='top', fontsize=8)
        for i, word in enumerate(words):
            lit = words != text and word in ('4-3', '3')
            box = dict(facecolor=YELLOW if lit else 'white', edgecolor=GREY, pad=2)
            panel.text(i, 1, f'{word:^3}', ha='center', va='center', fontsize=7.5,
                       family='monospace', bbox=box)
            draw_carried(panel, arch, i)
    arrow = dict(arrowstyle='-|>', color='black', connectionstyle='arc3,rad=-0.3')
    axes[3].annotate('', (5, 1.4), (2, 1.4), arrowprops=arrow)
    axes[3].text(3.5, 1.9, 'the retriever', ha='center')
    figure.tight_layout()
    yield 'idea', figure


def draw_carried(panel, arch, i):
    """What is carried after the i-th word: a box, a slice of a cache for each word, or both."""
    heights = {'mamba': [0.6], 'hybrid': [0.4], 'transformer': []}[arch]
    if arch != 'mamba':
        heights = heights + (i + 1) * [0.2]
    top, colour = 0.4, look(arch)['color']
    for height in heights:
        panel.add_patch(Rectangle((i - 0.3, top - height), 0.6, height, color=colour, linewidth=0))
        top -= height + 0.07
    if i and arch != 'transformer':
        panel.annotate('', (i - 0.25, 0.15), (i - 0.75, 0.15), arrowprops=dict(arrowstyle='->'))


FIGURES = (idea, exact, learning, errors, attention, transplant, frontier, primitives, capacity,
           bits, generation, hotpot, sample)


# --- reading the results --------------------------------------------------------------------------

CONSTANTS = ('task', 'setup', 'size', 'n', 'seed', 'tuning', *MODEL, *SHARED, *OWN)
MEASURED = ('accuracy', 'exact', 'chance', 'samples_trained', 'memory', 'by_length')


def read(path, names):
    """The dicts in a JSON file, or in the lines of a JSON-lines file. [] and a line that says so if
    the file is damaged or a dict lacks one of the names."""
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.jsonl':
            values = [json.loads(line) for line in text.split('\n') if line]
        else:
            values = json.loads(text)
        if not isinstance(values, list):
            values = [values]
        for value in values:
            missing = [name for name in names if name not in value]
            if missing:
                raise ValueError(f'without {missing[0]}')
        return values
    except (OSError, ValueError, TypeError, RecursionError) as error:
        print(f'left out: {path} is damaged, or not a file of ours ({error})')
        return []


def load(out):
    """What there is to draw in a folder, or in one file of records: a dict of lists. records: of
    finished runs, with `source`, the file or folder that they come from; probes: of trained models
    (`train.py --probe`); unfinished: names of runs; attention: maps, with the constants of their
    runs; hotpot: (name of a model, its answers); generation: costs."""
    found = dict(records=[], probes=[], unfinished=[], attention=[], hotpot=[], generation=[])
    paths = [*sorted(out.glob('*.jsonl')), *sorted(out.glob('**/result.json'))]
    for path in [out] if out.is_file() else paths:
        source = path.parent.name if path.name == 'result.json' else path.stem
        for r in read(path, CONSTANTS):
            r |= dict(source=source)
            if 'transplant' in r and 'rounding' in r:
                found['probes'].append(r)
            elif set(MEASURED) <= set(r):
                found['records'].append(r)
            elif not r['tuning']:
                name = '{arch} {setup} n={n} seed {seed}'.format(**r)
                found['unfinished'].append(f'{source}, {name}')
    for path in sorted(out.glob('**/checkpoint.pt')):
        if not path.with_name('result.json').exists():
            found['unfinished'].append(path.parent.name)
    found['records'].sort(key=lambda r: (r['n'], r['seed']))
    for path in sorted(out.glob('**/attention.json')):
        beside = path.with_name('result.json')
        run = read(beside, CONSTANTS) if beside.exists() else []
        for shown in read(path, ('prompt', 'trace', 'weights', 'share')):
            found['attention'].append(dict(*run) | shown)
    for path in sorted(out.glob('**/generation.json')):
        found['generation'] += read(path, ('arch', 'size', 'length', 'seconds', 'bytes'))
    for path in sorted(out.glob('**/hotpot/*.jsonl')):
        answers = read(path, ('condition', 'em'))
        counts = Counter(r['condition'] for r in answers)
        if len(counts) == 3 and len(set(counts.values())) == 1:
            found['hotpot'].append((re.sub(r'-[0-9a-f]{8}$', '', path.stem), answers))
        else:
            print(f'left out: {path} is not finished')
    return found


def main(argv):
    parser = argparse.ArgumentParser('plot.py', allow_abbrev=False)
    parser.add_argument('--out', default='results', help='a folder, or a file of records')
    parser.add_argument('--figures', default='figures', help='the folder of the pictures')
    arguments = parser.parse_args(argv)
    folder, found = Path(arguments.figures), load(Path(arguments.out))
    if folder.exists() and not folder.is_dir():
        parser.exit(2, f'plot.py: --figures={folder} is a file: name a folder\n')
    if not any(found.values()):
        parser.exit(2, f'plot.py: {arguments.out}: no results to draw, run train.py first\n')
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcdefaults()                 # whatever the user's matplotlibrc says
    plt.rcParams.update(STYLE)
    for draw in FIGURES:
        for name, figure in draw(found):
            figure.savefig(folder / f'{name}.png')
            plt.close(figure)
            print(folder / f'{name}.png')
    if film(found, folder / 'walk.gif'):
        print(folder / 'walk.gif')
    for name in found['unfinished']:
        print(f'not finished: {name}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (OSError, KeyboardInterrupt) as error:       # a full disk, a closed pipe; Ctrl-C
        print(f'plot.py: {str(error) or "interrupted"}', file=sys.stderr)
        os._exit(2)
