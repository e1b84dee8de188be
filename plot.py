"""Draws the figures from the records of runs. It knows results, not models.

  python plot.py                             all of results/ -> figures/*.png and walk.gif
  python plot.py --out=out --figures=mine    from the records below a folder, into a folder
  python plot.py --out=results/paper.jsonl   one experiment

A *record* is what train.py writes of a run, a dict: its constants, what was measured, its log and
some examples. It is a line of results/EXPERIMENT.jsonl, or a file of its own, out/NAME/result.json.

Each figure is one function. It takes all that was found (see load) and yields a name and a figure
if there is something to draw. A picture compares runs that differ in nothing but what it shows; a
printed line names the others. A point is a mean over seeds, and its bar reaches from the smallest
value to the largest. The colours are Okabe and Ito's, safe for the colour-blind. Lines differ in
width and markers, so that three lines at 100% can be told apart. """
import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'        # before the import: draw to files, in a notebook, too

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.patches import Rectangle

import data

LOOKS = {
    'transformer': dict(label='Transformer', color='#0072B2', marker='s', markersize=8,
                        linewidth=3.5),
    'hybrid': dict(label='hybrid', color='#009E73', marker='^', linewidth=2),
    'mamba': dict(label='RNN (Mamba)', color='#D55E00', marker='o', markersize=3.5, linewidth=1),
    'deltanet': dict(label='RNN (DeltaNet)', color='#CC79A7', marker='D', markersize=4),
    'gru': dict(label='RNN (GRU)', color='#E69F00', marker='v'),
}
RED, YELLOW, GREY = '#C00000', '#F0E442', '#999999'
SETUPS = {'direct': 'direct answer', 'cot': 'chain of thought', 'retrieval': 'with a retriever'}
PRIMITIVES = {'index': 'index', 'recall': 'associative recall', 'cgram': 'c-gram retrieval',
              'counting': 'counting'}
ORDER = [*LOOKS, *SETUPS, *PRIMITIVES]                  # of lines and panels

# Constants of a run: what makes a kind of model, what all kinds in a picture must share, and what
# each kind may choose.
MODEL = ('arch', 'd_state')
SHARED = ('layers', 'distribution', 'frozen_embedding', 'samples', 'batch_size', 'order', 'join',
          'mix', 'mix_largest', 'grad_clip', 'dtype')
OWN = ('lr', 'warmup')

STYLE = {
    'font.size': 9,
    'axes.titlesize': 9,
    'errorbar.capsize': 2,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'savefig.dpi': 200,
    'savefig.bbox': 'tight',
    'legend.frameon': False,
}


# --- which records go into a picture --------------------------------------------------------------

def where(records, **wanted):
    """The records with these values."""
    return [r for r in records if wanted.items() <= r.items()]


def rank(values):
    """For sorting: the values that ORDER names come first, in that order."""
    ranks = []
    for value in values:
        place = ORDER.index(value) if value in ORDER else len(ORDER)
        ranks.append((place, value))
    return ranks


def groups(records, *names):
    """[(values of these names, the records with these values)], sorted by the values."""
    found = {}
    for r in records:
        values = tuple(r[name] for name in names)
        found.setdefault(values, []).append(r)
    return [(values, found[values]) for values in sorted(found, key=rank)]


def largest_group(records, names):
    """The records with the most common values of these names: in most tasks, then in most runs."""
    by_size = {(0, 0): []}
    for _, same in groups(records, *names):
        tasks = {r['task'] for r in same}
        by_size.setdefault((len(tasks), len(same)), same)       # of equals, the first
    return by_size[max(by_size)]


def comparable(records, figure, *one):
    """The records that may stand in one picture: the largest group with the same values of the
    names `one`; of these, for each task and setup, the largest group that shares its constants. A
    printed line says where the others come from."""
    records = where(records, tuning=False)
    drawn = []
    for _, same in groups(largest_group(records, one), 'task', 'setup', 'size'):
        for _, kind in groups(largest_group(same, SHARED), *MODEL):
            drawn += largest_group(kind, OWN)
    others = {r['source'] for r in records if r not in drawn}
    if others:
        print(f'{figure}: not drawn, since a constant differs: {", ".join(sorted(others))}')
    return drawn


def istree(found):
    """The runs of IsTree, except those that mix several n of the user's choice (see frontier)."""
    return where(found['records'], task='istree', mix='')


def default_run(found):
    """The runs of results/default.jsonl or, if there are none, all of IsTree."""
    return where(istree(found), source='default') or istree(found)


def lengths(records):
    """A record for each n on which the runs were evaluated."""
    rows = []
    for r in records:
        for measured in r['by_length']:
            rows.append(r | measured)
    return rows


# --- what the figures share -----------------------------------------------------------------------

def look(arch):
    unknown = dict(label=arch, color='black', marker='D')
    return dict(LOOKS.get(arch, unknown))


def kinds(records):
    """[(look, records)] for each kind of model. If an architecture has several d_state, the
    smallest gets a solid line and the others get dashed ones."""
    found = []
    for (arch,), same in groups(records, 'arch'):
        for i, ((d_state,), rows) in enumerate(groups(same, 'd_state')):
            style = look(arch)
            if i > 0:
                style['label'] += f', d_state {d_state}'
                style |= dict(linestyle='--', fillstyle='none')
            found.append((style, rows))
    return found


def with_setup(records):
    """[(look, records)] for each kind of model in each setup, which the label names."""
    found = []
    for (setup,), runs in groups(records, 'setup'):
        for style, rows in kinds(runs):
            style['label'] += f', {SETUPS[setup]}'
            if setup == 'retrieval':
                style['linestyle'] = ':'
            found.append((style, rows))
    return found


def by_state(records):
    """[(look, records)] for each size of a recurrent memory, the smallest darkest. A
    new field of the records counts the floats of the state, without the windows of convolutions."""
    counted = [r | dict(floats=r['memory']['state']) for r in records]
    sizes = groups(counted, 'floats', 'arch')
    found = []
    for i, ((floats, arch), rows) in enumerate(sizes):
        style = look(arch)
        style['color'] = plt.get_cmap('viridis')(i / len(sizes))
        style['label'] += f', {floats:,} floats of state'
        found.append((style, rows))
    return found


def means(records, x, y):
    """[(value of x, mean of the percents y, how far below is the smallest, how far above the
    largest)], sorted by x."""
    points = []
    for (value,), rows in groups(records, x):
        percents = [100 * r[y] for r in rows]
        mean = np.mean(percents)
        points.append((value, mean, mean - min(percents), max(percents) - mean))
    return points


def curve(panel, records, x, y, **style):
    """The percents y of records against x."""
    at, mean, below, above = zip(*means(records, x, y))
    panel.errorbar(at, mean, (below, above), **style)


def bars(panel, series, x, y):
    """Bars side by side. series: [(look, records)]; the percents y of the records against their
    x, words, in the order of the first series."""
    _, first = series[0]
    labels = list(dict.fromkeys(r[x] for r in first))
    width = 0.8 / len(series)
    for i, (style, rows) in enumerate(series):
        words, mean, below, above = zip(*means(rows, x, y))
        shift = width * (i - (len(series) - 1) / 2)
        at = [labels.index(word) + shift for word in words]
        hatch = '////' if 'linestyle' in style else None
        drawn = panel.bar(at, mean, width, yerr=(below, above), edgecolor='white',
                          color=style['color'], label=style['label'], hatch=hatch)
        panel.bar_label(drawn, fmt='%.1f', fontsize=6)
    panel.set_xticks(range(len(labels)), labels, fontsize=7.5)


def panels(titles, ylabel, width=2.7):
    """A figure with a panel of percents for each title, side by side, and the panels."""
    figure, axes = plt.subplots(1, len(titles), figsize=(width * len(titles), 2.8), squeeze=False)
    for panel, title in zip(axes[0], titles):
        panel.set(title=title, ylim=(0, 105))
    axes[0, 0].set(ylabel=ylabel)
    return figure, axes[0]


def by_setup(records, ylabel, width=2.7):
    """A figure with a panel for each setup, and [(panel, records)]."""
    found = groups(records, 'setup')
    titles = [SETUPS[setup] for (setup,), _ in found]
    figure, axes = panels(titles, ylabel, width)
    parts = []
    for panel, ((setup,), rows) in zip(axes, found):
        if setup == 'direct':
            panel.axhline(50, linestyle=':', color=GREY, label='a guess of the answer')
        parts.append((panel, rows))
    return figure, parts


def log_axis(panel, rows, x, label):
    """A logarithmic x-axis, with ticks exactly where there are points."""
    ticks = sorted({r[x] for r in rows})
    panel.set(xscale='log', xlabel=label)
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()


def best_guess(panel, rows):
    """A dashed line: the accuracy of the best guess that looks nothing up."""
    n, chance, *_ = zip(*means(rows, 'n', 'chance'))
    panel.plot(n, chance, '--', color=GREY, label='best guess without look-up')


def name_of(figure, r):
    """The name of a picture."""
    return f'{figure}-{r["size"]}-n{r["n"]}'


def finish(figure, title, note=''):
    """A sentence above, a note below and, at the right, the legend of all panels, each label
    once."""
    labels = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc='center left', bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, y=1.07)
    figure.text(0.01, -0.02, note, fontsize=7, va='top')
    return figure


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
    logged = [r for r in default_run(found) if r.get('log')]
    records = comparable(logged, 'learning', 'size', 'n')
    if not records:
        return
    figure, parts = by_setup(records, 'exact traces (%)')
    for panel, rows in parts:
        for style, line in kinds(rows):
            draw_logs(panel, line, style)
    r = records[0]
    title = f'IsTree, n={r["n"]}: each line is a run, watched on 200 held-out samples.'
    yield name_of('learning', r), finish(figure, title)


def draw_logs(panel, runs, style):
    """Exact traces against training samples, a line for each run."""
    style |= dict(linewidth=1, markersize=3)
    for r in runs:
        result = dict(samples=r['samples_trained'], exact=r['exact'])
        points = r['log'] + [result]
        thousands = [p['samples'] / 1000 for p in points]
        percents = [100 * p['exact'] for p in points]
        panel.plot(thousands, percents, **style)
    panel.set_xlabel('thousand samples')


def errors(found):
    """Where models go wrong: the share of wrong tokens of each kind, given all tokens before them.
    In-context retrieval (the next neighbour) against bookkeeping."""
    records = default_run(found) + where(istree(found), source='memory')
    traced = [r for r in records if r.get('errors') and r['setup'] != 'direct']
    rows = []
    for r in comparable(traced, 'errors', 'size', 'n'):
        for kind, wrong in r['errors'].items():
            rows.append(r | dict(kind=kind.replace(' ', '\n', 1), wrong=wrong))
    if not rows:
        return
    worst = max(r['wrong'] for r in rows)
    figure, parts = by_setup(rows, 'wrong tokens (%)', 4.5)
    for panel, part in parts:
        bars(panel, kinds(part), 'kind', 'wrong')
        panel.set(ylim=(0, 1 + 115 * worst))
    r = rows[0]
    title = f'IsTree, n={r["n"]}: how often a token is wrong if all tokens before it are right.'
    yield name_of('errors', r), finish(figure, title)


def attention(found):
    """What the mechanism looks like: where the top attention layer of the hybrid looks, a row for
    each token that was written, a column for each token of the prompt. Framed: the edge that leads
    to the next node."""
    for r in where(found['attention'], arch='hybrid')[:1]:
        prompt = r['prompt']
        wrote = r['trace']
        weights = np.array(r['weights'])[:, :len(prompt)]
        figure, axes = plt.subplots(figsize=(8, 6))
        image = axes.imshow(weights, cmap='Blues', aspect='auto')
        figure.colorbar(image, label='attention, mean over heads')
        edges = [set(edge) for edge in edges_of(' '.join(prompt))]
        for i, step in enumerate(zip(wrote, wrote[1:])):
            if set(step) in edges:
                corner = (3 * edges.index(set(step)) + 0.5, i - 0.5)
                axes.add_patch(Rectangle(corner, 3, 1, fill=False, color=RED))
        axes.set_xticks(range(len(prompt)), prompt, fontsize=6, rotation=90)
        axes.set_yticks(range(len(wrote)), wrote)
        axes.set(xlabel='the prompt', ylabel='the right trace, from top to bottom',
                 title='Where the hybrid looks. Framed: the edge that leads to the next node.')
        yield name_of('attention', r), figure


# --- IsTree: what is needed from memory -----------------------------------------------------------

# Label, what was replaced in the memory of the prompt, whose trace is counted, colour.
TRANSPLANTS = (('own trace, before', 'nothing', 'own', '#CCCCCC'),
               ('own trace, after the transplant', 'everything', 'own', '#333333'),
               ("donor's trace, after the transplant", 'everything', 'donor', YELLOW))


def transplant(found):
    """Memory transplant and rounding. Left, a panel for each setup: exact traces before and after a
    model's memory of the prompt is replaced by its memory of another graph, the donor's. Right:
    exact traces on trees if each float of the memory is rounded to k bits."""
    records = comparable(found['probes'], 'transplant', 'size', 'n', 'd_state')
    if not records:
        return
    setups = groups(records, 'setup')
    titles = [f'transplant: {SETUPS[setup]}' for (setup,), _ in setups]
    titles.append('how precise must the memory be?')
    figure, axes = panels(titles, 'exact traces (%)', 3.4)

    for panel, (_, runs) in zip(axes, setups):
        series = []
        for label, replaced, whose, colour in TRANSPLANTS:
            rows = []
            for r in runs:
                share = r['transplant'][replaced][whose]
                rows.append(dict(model=look(r['arch'])['label'], exact=share))
            series.append((dict(label=label, color=colour), rows))
        bars(panel, series, 'model', 'exact')

    rows = []
    for r in records:
        for k, measured in r['rounding'].items():
            rows.append(r | measured | dict(k=int(k)))
    right = axes[-1]
    for style, line in with_setup(rows):
        curve(right, line, 'k', 'exact_trees', **style)
    log_axis(right, rows, 'k', 'bits to which each float is rounded (32: not rounded)')
    right.set(ylabel='exact traces on trees (%)')
    title = (f'IsTree, n={records[0]["n"]}: what a model remembers of the prompt is replaced by '
             "its memory of another graph, the donor's, or rounded (right).")
    note = ('The bits that suffice are an upper bound on those in use: no model was trained with '
            'rounding, so fewer might do.')
    yield 'transplant', finish(figure, title, note)


def frontier(found):
    """What is learned on IsTree, against the size of the recurrent memory. Each run mixes all n."""
    mixed = [r for r in where(found['records'], task='istree') if r['mix']]
    records = comparable(mixed, 'frontier', 'size', 'n')
    if records:
        figure = against_memory(records, 'exact', 'exact traces (%)')
        title = f'IsTree: what is learned from {records[0]["samples"]:,} samples of all n.'
        yield f'frontier-{records[0]["size"]}', finish(figure, title)


def looks_back(r):
    """Can a model look at its whole context, through attention or with a retriever?"""
    return r['setup'] == 'retrieval' or r['memory'].get('cache', 0) > 0


def against_memory(records, y, ylabel):
    """A figure of three panels: y against n, a line for each size of a recurrent memory; the same
    for models that look back; and the largest n against the size of a recurrent memory."""
    titles = ['recurrent memory', 'attention, or a retriever', 'largest n with 95%']
    figure, (left, middle, right) = panels(titles, ylabel, 3.2)
    sizes = by_state([r for r in records if not looks_back(r)])
    for style, runs in sizes:
        curve(left, lengths(runs), 'n', y, **style)
    for style, runs in with_setup([r for r in records if looks_back(r)]):
        curve(middle, lengths(runs), 'n', y, **style)
    for panel in (left, middle):
        log_axis(panel, lengths(records), 'n', 'n')
    draw_largest_n(right, sizes, y)
    return figure


def draw_largest_n(panel, sizes, y):
    """The largest n of each run against the floats of its state, both axes logarithmic, and a line
    with its slope through the points of DeltaNets that are not marked < or ≥."""
    drawn = []
    inside = []                                         # DeltaNets that are neither < nor ≥
    for style, runs in sizes:
        drawn += runs
        for r in runs:
            n, sign = largest_n(r, y)
            panel.plot(r['floats'], n, fillstyle='none', **style)
            panel.annotate(sign, (r['floats'], n), (-12, -3), textcoords='offset points')
            if r['arch'] == 'deltanet' and not sign:
                inside.append((r['floats'], n))

    ticks = sorted({r['n'] for r in lengths(drawn)})
    panel.set(yscale='log', ylabel='n')
    panel.set_yticks(ticks, ticks)
    panel.autoscale(axis='y')
    panel.set_xscale('log', base=2)
    panel.xaxis.set_major_formatter('{x:,.0f}')
    panel.set_xlabel('floats of recurrent state')
    panel.minorticks_off()
    panel.tick_params(axis='x', labelrotation=60)

    if len({floats for floats, _ in inside}) > 1:
        floats, n = np.array(inside).T
        slope, offset = np.polyfit(np.log(floats), np.log(n), 1)
        fitted = np.exp(offset) * floats ** slope
        panel.plot(floats, fitted, '--', color='black', label=f'slope {slope:.2f} (DeltaNet)')


def largest_n(r, y):
    """Up to which n does a run get 95% right, between two n by interpolation over log n? Returns n
    and ''; if it does not at any n, the smallest and '<'; if at all n, the largest and '≥'."""
    points = [(row['n'], row[y]) for row in r['by_length']]
    if points[0][1] < 0.95:
        return points[0][0], '<'
    for (n, a), (m, b) in zip(points, points[1:]):
        if a >= 0.95 > b:
            return n * (m / n) ** ((a - 0.95) / (a - b)), ''
    return points[-1][0], '≥'


# --- the Turing machine ---------------------------------------------------------------------------

def turing(found):
    """Who learns to simulate a Turing machine, and how fast: a panel for each length of the
    tape, a line for each run, as in `learning`."""
    logged = [r for r in where(found['records'], task='turing', tuning=False) if r.get('log')]
    sizes = groups(logged, 'n')
    if not sizes:
        return
    figure, axes = panels([f'{n} letters' for (n,), _ in sizes], 'exact traces (%)', 3.5)
    for panel, (_, same_n) in zip(axes, sizes):
        for style, runs in with_setup(comparable(same_n, 'turing', 'size')):
            draw_logs(panel, runs, style)
    title = 'A Turing machine: each line is a run, watched on 200 held-out tapes.'
    yield 'turing', finish(figure, title)


# --- the primitives, and how much a memory holds --------------------------------------------------

def primitives(found):
    """The bottleneck in its purest form (paper, section 4): accuracy against the length of the
    context. One run has learned all lengths of a line."""
    asked = [r for r in where(found['records'], setup='direct') if r['task'] in PRIMITIVES]
    tasks = groups(comparable(asked, 'primitives', 'size', 'n'), 'task')
    if not tasks:
        return
    titles = [PRIMITIVES[task] for (task,), _ in tasks]
    figure, axes = panels(titles, 'accuracy (%)')
    for panel, (_, runs) in zip(axes, tasks):
        rows = lengths(runs)
        for style, line in kinds(rows):
            curve(panel, line, 'n', 'accuracy', **style)
        best_guess(panel, rows)
        log_axis(panel, rows, 'n', 'n, pairs or tokens')
    title = 'Direct answers about a sequence of n parts. Each run is trained on all n.'
    yield name_of('primitives', runs[0]), finish(figure, title)


def recall(found, figure):
    """The runs of associative recall. Of the recurrent models that answer directly, only DeltaNets:
    Mamba and the GRU stay near the best guess (see results/README.md)."""
    records = comparable(where(found['records'], task='recall'), figure, 'size', 'n')
    return [r for r in records if looks_back(r) or r['arch'] == 'deltanet']


def capacity(found):
    """How many pairs a DeltaNet recalls, against the size of its memory. Each run mixes all n."""
    records = recall(found, 'capacity')
    if where(records, arch='deltanet', setup='direct'):
        figure = against_memory(records, 'accuracy', 'accuracy (%)')
        for panel in figure.axes[:2]:
            best_guess(panel, lengths(records))
        title = 'Associative recall of n pairs, learned with recurrent memories of several sizes.'
        yield 'capacity', finish(figure, title, 'Other recurrent models are not drawn.')


def bits(found):
    """The communication game (train.messages): accuracy of recall against the bits of the message
    that one player sends the other, a line for each size of a DeltaNet's memory; and the
    best that is possible with so many bits."""
    played = [r for r in recall(found, 'bits-deltanet') if r.get('messages')]
    if not played:
        return
    figure, axes = panels(['n=16', 'n=64'], 'accuracy (%)', 3.6)
    largest = played[0]['n']
    values = data.Recall(largest, 'direct').how_many_numbers(largest)
    accuracy = np.linspace(0.05, 1, 100)
    for panel, n in zip(axes, (16, 64)):
        for style, runs in by_state(played):
            games = []
            for r in runs:
                games += where(r['messages'], n=n)
            if games:
                draw_games(panel, games, style)
        needed = [bits_needed(a, n, values) for a in accuracy]
        panel.plot(needed, 100 * accuracy, color='black', label='what is possible')
        panel.set(xscale='log', xlabel='bits of the message')
    title = "One player reads n pairs and sends a DeltaNet's memory; the other answers from it."
    note = 'At the points: k, the bits of a float. All floats count, those of the windows, too.'
    yield 'bits-deltanet', finish(figure, title, note)


def draw_games(panel, games, style):
    """Accuracy against the bits of the message, with the bits of a float below some points."""
    curve(panel, games, 'bits', 'accuracy', **style)
    for k in (1, 2, 4):
        rounded = where(games, bits_per_float=k)
        for sent, mean, _, _ in means(rounded, 'bits', 'accuracy'):
            if mean > 20:
                panel.annotate(k, (sent, mean), (2, -9), textcoords='offset points', fontsize=6)


def bits_needed(accuracy, n, values):
    """The bits that anyone, however trained, must be told about n values, each drawn from `values`
    possible ones, to name them with this accuracy on average. By rate-distortion theory (Cover &
    Thomas 2006, chapter 10) accuracy a takes n (log2(values) - h(a) - (1 - a) log2(values - 1))
    bits, with h(a) = -a log2(a) - (1 - a) log2(1 - a)."""
    wrong = 1 - accuracy
    needed = math.log2(values) + accuracy * math.log2(accuracy)
    if wrong > 0:
        needed += wrong * math.log2(wrong / (values - 1))
    return n * needed


# --- what it costs, and HotpotQA ------------------------------------------------------------------

def generation(found):
    """The cost of one more token, in time and in memory, against the number of tokens before it."""
    for (size,), rows in groups(found['generation'], 'size'):
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.9))
        for panel, what in zip(axes, ('seconds', 'bytes')):
            for (arch,), line in groups(rows, 'arch'):
                tokens = [r['length'] for r in line]
                panel.plot(tokens, [r[what] for r in line], **look(arch))
            log_axis(panel, rows, 'length', 'tokens of context')
            panel.tick_params(axis='x', labelrotation=60)
            panel.set(yscale='log', ylabel=what)
        title = f'The time for one more token, and the memory in all; models of size {size}.'
        yield f'generation-{size}', finish(figure, title)


def hotpot(found):
    """HotpotQA: exact match of each model under the three conditions. In the small world a guess is
    one of the towns shown."""
    rows = []
    for name, answers in found['hotpot']:
        for (condition,), same in groups(answers, 'condition'):
            em = np.mean([r['em'] for r in same])
            rows.append(dict(model=name.replace('-', '\n', 1), condition=condition, em=em))
    if not rows:
        return
    figure, (panel,) = panels([''], 'exact match (%)', 7)
    series = []
    for condition, colour in (('gold', GREY), ('full', '#E69F00'), ('retrieval', '#56B4E9')):
        style = dict(label=condition, color=colour)
        series.append((style, where(rows, condition=condition)))
    bars(panel, series, 'model', 'em')
    panel.axhline(100 / 3, linestyle='--', color='black', label='a guess: one of 3 towns (gold)')
    panel.axhline(100 / 15, linestyle=':', color='black', label='one of 15 (full, retrieval)')
    title = 'HotpotQA: questions that ask for a name (in the small world: for a town).'
    yield 'hotpot', finish(figure, title)


# --- what happens: one sample, a film of it, the idea ---------------------------------------------

SHOWN = (('cot', 'transformer'), ('cot', 'hybrid'), ('cot', 'mamba'), ('retrieval', 'mamba'))


def edges_of(prompt):
    """The edges of a prompt, read from its text: [(u, v), ...], nodes as words."""
    return re.findall(r'(\d+) - (\d+)', prompt)


def tour(words):
    """The nodes that a search has entered or returned to, in order."""
    walked = []
    for word, kind in zip(words, data.kinds(words)):
        if kind in ('next neighbour', 'return to the parent'):
            walked.append(word)
    return walked


def rnn_errs(told):
    """Did the RNN make a mistake on a graph, without a retriever? told: see chosen_example."""
    if ('cot', 'mamba') not in told:
        return False
    _, example = told['cot', 'mamba']
    return example['written'] != example['expected']


def chosen_example(found, figure):
    """The most telling of the held-out graphs whose examples were kept. Returns [(record, example)]
    for the models of SHOWN that were trained, and how the graph was chosen."""
    runs = [r for r in default_run(found) if r.get('examples')]
    asked = {}                          # prompt -> {(setup, arch): (record, example)}
    for r in comparable(runs, figure, 'size', 'n'):
        for example in r['examples']:
            told = asked.setdefault(example['prompt'], {})
            told.setdefault((r['setup'], r['arch']), (r, example))      # of seeds, the first
    chosen = max(asked.values(), key=rnn_errs, default={})      # of equals, the first
    why = (f'Of {len(asked)} held-out graphs whose traces were kept, the first on which the RNN '
           'errs without a retriever, or, if there is none, the first.')
    shown = [chosen[model] for model in SHOWN if model in chosen]
    return shown, why


def places_of(prompt):
    """Where to draw the nodes of a two-star graph: {node: (x, y)}. The nodes with the most edges
    are the centres; then come the two leaves that are joined, which face each other."""
    edges = edges_of(prompt)
    degree = Counter(re.findall(r'\d+', prompt))
    a, b, *leaves = [v for v, _ in degree.most_common()]
    near_a = [v for v in leaves if (a, v) in edges or (v, a) in edges]
    others = [v for v in leaves if v not in near_a]
    place = {a: (-1.45, 0), b: (1.45, 0)}
    for star, side in ((near_a, -1), (others, 1)):
        for i, v in enumerate(star):
            angle = 2 * math.pi * i / len(star)
            place[v] = (side * (1.45 - math.cos(angle)), -side * math.sin(angle))
    return place


def draw_step(panel, place, u, v, **style):
    """A line between two nodes; nothing if one of them is no node."""
    if u in place and v in place:
        x, y = zip(place[u], place[v])
        panel.plot(x, y, zorder=1, **style)


def tell(panel, r, example, t):
    """Draw the first t words that a model wrote (None: all): the walk in the graph, its first wrong
    step in red, and the last lines of the text."""
    colour = look(r['arch'])['color']
    panel.clear()
    panel.set_axis_off()
    panel.set(xlim=(-2.7, 2.7), ylim=(-2, 1.2), aspect='equal')
    title = f'{look(r["arch"])["label"]}, {SETUPS[r["setup"]]}'
    panel.set_title(title, color=colour, weight='bold')
    place = places_of(example['prompt'])
    for u, v in edges_of(example['prompt']):
        draw_step(panel, place, u, v, color='#CCCCCC', linewidth=1)

    words = example['written'].split()[:t]
    expected = example['expected'].split()[:t]
    agreed = len(os.path.commonprefix([words, expected]))
    walked = tour(words[:agreed])
    for u, v in zip(walked, walked[1:]):
        draw_step(panel, place, u, v, color=colour, linewidth=3)
    here = walked[-1] if walked else 'the start'
    lines = textwrap.wrap(' '.join(words), 60)[-3:]
    if words != expected:
        word = [*words, 'nothing'][agreed]
        right = [*expected, 'nothing'][agreed]
        draw_step(panel, place, here, word, color=RED, linewidth=2, linestyle='--')
        lines.append(f'At {here} it wrote {word} instead of {right}.')
    panel.text(-2.7, -1.3, '\n'.join(lines), family='monospace', fontsize=6.5, va='top')

    for v, (x, y) in place.items():
        background = YELLOW if v == here else 'white'
        circle = dict(boxstyle='circle', facecolor=background, edgecolor=GREY)
        panel.text(x, y, v, ha='center', va='center', fontsize=7, bbox=circle)


def sample(found):
    """One held-out graph and the search that each model wrote, with its first wrong step."""
    shown, why = chosen_example(found, 'sample')
    if not shown:
        return
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.5))
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, (r, example) in zip(axes.flat, shown):
        tell(panel, r, example, None)
    title = f'Is it a tree? {example["prompt"]}'
    yield name_of('sample', r), finish(figure, title, why)


def frames(example):
    """The numbers of words after which a frame is drawn (None: all). The last frame stays."""
    words = example['written'].split()
    every = 1 if len(words) < 60 else 5
    return list(range(0, len(words), every)) + 8 * [None]


def draw_frame(panel, axes, r, example, t):
    """A frame of the film, after t words: the graph, the text, and the floats that are carried. The
    cache grows with every word, the rest does not."""
    tell(panel, r, example, t)
    words = example['written'].split()[:t]
    prompt = example['prompt'].split()
    a_word = r['memory'].get('cache', 0) / len(prompt)          # after the prompt
    floats = sum(r['memory'].values()) + a_word * len(words)
    axes.clear()
    axes.barh(0, floats, color=look(r['arch'])['color'])
    axes.set(yticks=[], xlabel=f'{floats:,.0f} floats are carried')


def film(found, path):
    """Write the film of one sample, if any was kept: what each model writes, where its search goes,
    and what the model carries along."""
    shown, _ = chosen_example(found, 'walk')
    if not shown:
        return
    figure, (panel, axes) = plt.subplots(2, 1, figsize=(6, 5), height_ratios=(12, 1))
    most = max(sum(r['memory'].values()) for r, _ in shown)
    writer = PillowWriter(fps=6)
    with writer.saving(figure, path, dpi=100):
        for r, example in shown:
            for t in frames(example):
                draw_frame(panel, axes, r, example, t)
                axes.set_xlim(0, 2 * most)
                writer.grab_frame()
    print(path)


IDEA = (('mamba', 'RNN: a box of fixed size', 'The longer the text, the more\nof it is forgotten.'),
        ('transformer', 'Transformer: a growing cache',
         'Nothing is forgotten; the memory\ngrows with the text.'),
        ('hybrid', 'Hybrid: a box and a cache',
         'One layer of attention on top:\nwhat the box forgets is in its cache.'),
        ('mamba', 'RNN with a retriever',
         'What was forgotten is looked up\nin the text and pasted at its end.'))


def idea(found):
    """The paper in a drawing: what each kind of model carries from token to token. Needs no
    results."""
    figure, axes = plt.subplots(1, 4, figsize=(10.6, 2.6))
    for panel, (arch, title, below) in zip(axes, IDEA):
        panel.set(xlim=(-0.7, 5.7), ylim=(-2.75, 2.4), aspect='equal')
        panel.set_axis_off()
        panel.set_title(title, weight='bold', color=look(arch)['color'])
        panel.text(2.5, -1.75, below, ha='center', va='top', fontsize=8)
        for i, word in enumerate(('2-1', '4-3', '5-0', '...', '4-?')):
            draw_word(panel, arch, i, word)
    draw_word(panel, arch, 1, '4-3', YELLOW)            # in the last panel
    draw_word(panel, arch, 5, ' 3 ', YELLOW)
    arrow = dict(arrowstyle='->', connectionstyle='arc3,rad=-0.3')
    panel.annotate('', (5, 1.4), (1, 1.4), arrowprops=arrow)
    figure.tight_layout()
    yield 'idea', figure


def draw_word(panel, arch, i, word, background='white'):
    """The i-th word, and below it what is carried after it: a box, a slice of a cache for each word
    so far, or both."""
    frame = dict(facecolor=background, edgecolor=GREY, pad=2)
    panel.text(i, 1, word, ha='center', va='center', fontsize=7.5, family='monospace', bbox=frame)
    style = dict(width=0.6, color=look(arch)['color'])
    if arch != 'transformer':
        panel.bar(i, 0.5, bottom=-0.1, **style)
        if i > 0:
            panel.text(i - 0.5, 0.15, '→', ha='center', va='center')
    if arch != 'mamba':
        for row in range(i + 1):
            panel.bar(i, 0.2, bottom=-0.37 - 0.27 * row, **style)


FIGURES = (idea, exact, learning, errors, attention, transplant, frontier, turing, primitives,
           capacity, bits, generation, hotpot, sample)


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
        if isinstance(values, dict):
            values = [values]
        for value in values:
            for name in names:
                value[name]                 # an error if there is none
        return values
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        print(f'left out: {path} is damaged, or not a file of ours ({error!r})')
        return []


def asks_for_a_name(r):
    """Is a question not answered by yes or no, which can be guessed? Of the small world only its
    type was written."""
    if 'answer' in r:
        return r['answer'] not in ('yes', 'no')
    return r.get('type') == 'bridge'


def load(out):
    """What there is to draw in a folder, or in one file of records: a dict of lists. records: of
    finished runs, with `source`, the file or folder that they come from; probes: of trained models
    (`train.py --probe`); unfinished: names of runs; attention: maps, with the constants of their
    runs; hotpot: (name of a model, its answers, see asks_for_a_name); generation: costs."""
    found = defaultdict(list)
    if out.is_file():
        paths = [out]
    else:
        paths = sorted(out.glob('*.jsonl')) + sorted(out.glob('**/result.json'))
    for path in paths:
        source = path.parent.name if path.name == 'result.json' else path.stem
        for r in read(path, CONSTANTS):
            r['source'] = source
            if 'transplant' in r:
                if r['task'] == 'istree':
                    found['probes'].append(r)
            elif all(name in r for name in MEASURED):
                found['records'].append(r)
            elif not r['tuning']:
                name = '{source}, {arch} {setup} n={n} seed {seed}'
                found['unfinished'].append(name.format(**r))

    for path in sorted(out.glob('**/checkpoint.pt')):
        if not path.with_name('result.json').exists():
            found['unfinished'].append(path.parent.name)

    for path in sorted(out.glob('**/attention.json')):
        for shown in read(path, ('prompt', 'trace', 'weights')):
            for run in where(found['records'], source=path.parent.name) or [{}]:
                found['attention'].append(run | shown)
    for path in sorted(out.glob('**/generation.json')):
        found['generation'] += read(path, ('arch', 'size', 'length', 'seconds', 'bytes'))
    for path in sorted(out.glob('**/hotpot/*.jsonl')):
        answers = [r for r in read(path, ('condition', 'em')) if asks_for_a_name(r)]
        counts = Counter(r['condition'] for r in answers)
        if 0 < counts['gold'] == counts['full'] == counts['retrieval']:
            model = re.sub(r'(-s\d+)?(-[0-9a-f]{8})?$', '', path.stem)
            found['hotpot'].append((model, answers))
        else:
            print(f'left out: {path} is not finished, or the kind of its questions is not known')
    return found


def main(argv):
    parser = argparse.ArgumentParser('plot.py', allow_abbrev=False)
    parser.add_argument('--out', default='results', help='a folder, or a file of records')
    parser.add_argument('--figures', default='figures', help='the folder of the pictures')
    arguments = parser.parse_args(argv)
    folder = Path(arguments.figures)
    found = load(Path(arguments.out))
    if not any(found.values()):
        parser.exit(2, f'plot.py: {arguments.out}: no results to draw, run train.py first\n')
    folder.mkdir(parents=True, exist_ok=True)
    plt.style.use(['default', STYLE])       # whatever the user's matplotlibrc says
    for draw in FIGURES:
        for name, figure in draw(found):
            path = folder / f'{name}.png'
            figure.savefig(path)
            plt.close(figure)
            print(path)
    film(found, folder / 'walk.gif')
    for name in found['unfinished']:
        print(f'not finished: {name}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except (OSError, KeyboardInterrupt) as error:       # a full disk, a closed pipe; Ctrl-C
        print(f'plot.py: {str(error) or "interrupted"}', file=sys.stderr)
        os._exit(2)
