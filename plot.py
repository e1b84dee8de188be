"""The figures, drawn from what train.py, models.py and eval_hotpot.py wrote. Knows results, no models.

  python plot.py                              out/**/result.json ... -> figures/*.png, *.pdf and walk.gif
  python plot.py --out=results --figures=figures

Each function takes all that was found (a dict of lists, see load) and yields a name and a figure for each
picture that there are results for. Colours are Okabe and Ito's, safe for the colour-blind. Points stand where
they belong: lines differ in width and markers in size, so that three lines at 100% can be told apart.
"""
import os
import signal

if __name__ == '__main__':      # before the imports that take seconds: Ctrl-C is one line at any moment
    line = b'\nplot.py: interrupted, run the same command again\n'
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, line), os._exit(130)))

import itertools
import math
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
matplotlib.use('Agg')                       # to files, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

import data
from train import PRESETS, RESULT, SAMPLE, UserError, cli, parse, rank, read_json


@dataclass
class Constants:
    out: str = 'out'                        # folder of the results, searched with all its subfolders
    figures: str = 'figures'                # folder of the pictures


LOOKS = {'transformer': dict(label='Transformer', color='#0072B2', marker='s', markersize=8, linewidth=3.5),
         'hybrid': dict(label='hybrid', color='#009E73', marker='^', markersize=6, linewidth=2),
         'mamba': dict(label='RNN (Mamba)', color='#D55E00', marker='o', markersize=3.5, linewidth=0.9)}
HATCHES = {'hybrid': '...', 'mamba': '///'}
RED, PINK, YELLOW, GREY = '#C00000', '#FFB0B0', '#F0E442', '#999999'
NAMES = {'istree': 'IsTree', 'index': 'index', 'recall': 'associative recall', 'cgram': 'c-gram retrieval',
         'counting': 'counting', 'hotpot': 'two-hop questions', 'direct': 'answer at once',
         'cot': 'chain of thought', 'retrieval': 'with a retriever'} | {a: LOOKS[a]['label'] for a in LOOKS}
CELL = ('task', 'arch', 'setup', 'size', 'n_nodes', 'seed')
CONSTANTS = ('distribution', 'd_state', 'frozen_embedding', 'samples', 'batch_size', 'curriculum',
             'grad_clip', 'dtype')

plt.rcParams |= {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'savefig.dpi': 200,
                 'savefig.bbox': 'tight', 'legend.frameon': False, 'pdf.fonttype': 42, 'hatch.linewidth': 0.6}


# --- what the figures share ------------------------------------------------------------------------------

def where(results, **wanted):
    """The results with these values."""
    return [r for r in results if all(r.get(name) == value for name, value in wanted.items())]


def groups(results, *names):
    """[(values of these names, the results with them)], in the order of NAMES, else sorted."""
    found, known = [((), results)], [*NAMES]
    order = lambda value: (known.index(value), 0) if value in known else (len(known), value)
    for name in names:
        found = [((*key, value), where(rows, **{name: value}))
                 for key, rows in found for value in sorted({r[name] for r in rows}, key=order)]
    return found


def alike(found, but=(), **wanted):
    """The results with these values that may be compared: no sweep's, none of other layers, and of those that
    differ in more than a figure shows, for each setup and size, the largest group with the same constants
    (except `but`)."""
    results = [r for r in where(found['results'], **wanted) if not r.get('tuning') and not r.get('layers')]
    shared = [name for name in CONSTANTS if name not in but]
    for within, names in (((), shared), (('arch',), ['lr', 'warmup'])):
        constants = lambda r: tuple(r.get(name) for name in names)
        best = [(rows, Counter(map(constants, rows)).most_common(1)[0][0])
                for _, rows in groups(results, 'task', 'setup', 'size', *within)]
        results = [r for rows, commonest in best for r in rows if constants(r) == commonest]
    return results


def look(arch):
    return LOOKS.get(arch, dict(label=arch, color='black', marker='D', markersize=5, linewidth=1.5))


def curve(axes, results, x, **style):
    """Accuracy in percent against the value x of the results, mean over seeds; error bars: standard error,
    between seeds if there are several, else binomial."""
    points = []
    for (value,), rows in groups(results, x):
        accuracy = [100 * r['accuracy'] for r in rows]
        error = np.std(accuracy, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else 100 * rows[0]['accuracy_se']
        points.append((value, np.mean(accuracy), error))
    axes.errorbar(*zip(*points), capsize=2, **style)


def panels(found, width=2.7, columns=4):
    """A figure with a panel of percents for each group, at most `columns` side by side, and (panel, key,
    rows)."""
    columns = min(columns, len(found))
    rows = -(-len(found) // columns)
    size = width * columns, 2.8 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    axes[0, 0].set_ylim(0, 105)
    for panel in axes[:, 0]:
        panel.set_ylabel('accuracy (%)')
    for panel in axes.flat[len(found):]:
        panel.set_axis_off()
    for panel, (key, _) in zip(axes.flat, found):
        words = [f'n={part}' if isinstance(part, int) else NAMES.get(part, part) for part in key]
        title = ', '.join(words)
        panel.set_title(title if len(title) < 32 else title.replace(', ', ',\n', 1), fontsize=9)
    return figure, [(panel, key, rows) for panel, (key, rows) in zip(axes.flat, found)]


def finish(figure, unfinished=(), note=''):
    """The legend of all panels that have none of their own, each label once, at the right; a note and the
    unfinished cells below."""
    labels = {text: handle for axes in figure.axes if not axes.get_legend()
              for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc='center left', bbox_to_anchor=(1, 0.5))
    names = ['{task} {arch} {setup} {size} n={n_nodes} seed {seed}'.format(**c) for c in unfinished]
    if names:
        note += f'not finished: {", ".join(names[:6])}'
        note += f' and {len(names) - 6} more' if len(names) > 6 else ''
    figure.text(0.01, -0.02, note, fontsize=7, color='grey', va='top')
    return figure


def log_axis(panel, rows, x, label):
    """A logarithmic x-axis, with ticks exactly where there are points."""
    ticks = [value for (value,), _ in groups(rows, x)]
    panel.set(xscale='log', xlabel=label)
    panel.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())


def chance(panel, rows, x=None):
    """The accuracy of a guess and, where that is another, of the best guess that looks nothing up."""
    for name, text, line in (('chance', 'chance', ':'), ('best_guess', 'best guess without look-up', '--')):
        points = [(value, 100 * r[name]) for (value,), (r, *_) in groups(rows, x) if name in r] if x else []
        if points:
            panel.plot(*zip(*points), line, color=GREY, label=text)
        elif name in rows[0]:
            panel.axhline(100 * rows[0][name], linestyle=line, color=GREY, label=text)


# --- accuracies ------------------------------------------------------------------------------------------

def accuracy(found):
    """The paper's main figure: accuracy on IsTree against n, a panel for each setup, a line for each
    architecture (and d_state, if run for about as many cells as the commonest), a picture for each size."""
    for (size,), results in groups(alike(found, ['d_state'], task='istree'), 'size'):
        figure, parts = panels(groups(results, 'setup'))
        for panel, _, rows in parts:
            chance(panel, rows)
            for (arch,), line in groups(rows, 'arch'):
                states = Counter(r['d_state'] for r in line)
                main, *others = [d for d, count in states.most_common() if 2 * count > max(states.values())]
                curve(panel, where(line, d_state=main), 'n_nodes', **look(arch))
                for d in others:
                    curve(panel, where(line, d_state=d), 'n_nodes', **look(arch) | dict(
                        label=f'{look(arch)["label"]}, d_state {d} instead of {main}', linestyle='--'))
            log_axis(panel, rows, 'n_nodes', 'n, nodes of the graph')
        yield f'accuracy-{size}', finish(figure, where(found['unfinished'], task='istree', size=size))


def sizes(found):
    """The paper's grid: accuracy on IsTree against n, a panel for each setup and architecture, a line for
    each size, dashed where the constants were swept. Runs that were given fewer samples than the paper's say
    how many."""
    results = [r | dict(constants=constants)                    # gradient clipping tells them apart
               for constants, clip in (("the paper's constants", 0), ('swept', 1))
               for r in alike(found, ['samples'], task='istree', frozen_embedding=True, grad_clip=clip)]
    if not results:
        return
    names = [size for (size,), _ in groups(results, 'size')]
    figure, parts = panels(groups(results, 'setup', 'arch'), columns=3)
    for panel, _, rows in parts:
        chance(panel, rows)
        for (size, constants), line in groups(rows, 'size', 'constants'):
            style = dict(linestyle='--', fillstyle='none') if constants == 'swept' else {}
            curve(panel, line, 'n_nodes', label=f'{size}, {constants}', **style,
                  **shade(names.index(size), len(names)))
            for r in line:
                if r['samples'] < PRESETS['paper']['samples'][r['setup']]:
                    panel.annotate(f'{r["samples"] / 1000:g}K', (r['n_nodes'], 100 * r['accuracy']), (2, 4),
                                   textcoords='offset points', fontsize=7, color='grey')
        log_axis(panel, results, 'n_nodes', 'n, nodes of the graph')
        ends = [n for (n,), _ in groups(results, 'n_nodes')]
        panel.set_xlim(0.9 * ends[0], 1.1 * ends[-1])
    yield 'sizes', finish(figure)


def primitives(found):
    """The bottleneck in its purest form (paper, section 4): accuracy of the retrieval primitives against the
    length of the context, a panel for each setup and task. One run has learned all lengths of a line."""
    several = [r for r in found['results'] if r['task'] in data.PRIMITIVES]
    for (size, n), results in groups(several, 'size', 'n_nodes'):
        results = lengths(alike(dict(results=results)))
        if not results:                                         # (sweeps, other layers)
            continue
        figure, parts = panels(groups(results, 'setup', 'task'), columns=len(groups(results, 'task')))
        for panel, _, rows in parts:
            for (arch,), line in groups(rows, 'arch'):
                curve(panel, line, 'n_nodes', **look(arch))
            chance(panel, rows, 'n_nodes')
            log_axis(panel, rows, 'n_nodes', 'n, pairs or tokens in the context')
        unfinished = [c for c in where(found['unfinished'], n_nodes=n) if c['task'] in data.PRIMITIVES]
        yield f'primitives-{size}-n{n}', finish(figure, unfinished)


def chosen(results):
    """The best result of a sweep, of those with most samples."""
    return min(results, key=lambda r: (-r['samples'], rank(r)))


def sweep(found):
    """How the constants were found, and who is picky: accuracy against the learning rate, a panel for each
    task and setup, a line for each architecture and warm-up, each point after its longest run."""
    swept = [r | dict(name='primitives-' * (r['task'] in data.PRIMITIVES) + r['size'])
             for r in where(found['results'], tuning=True, layers='')]
    for (name,), results in groups(swept, 'name'):
        figure, parts = panels(groups(results, 'task', 'setup', 'n_nodes'))
        for panel, _, rows in parts:
            chance(panel, rows)
            for (arch,), runs in groups(rows, 'arch'):
                best = chosen(runs)
                for i, ((warmup,), line) in enumerate(groups(runs, 'warmup')):
                    longest = [chosen(same) for _, same in groups(line, 'lr')]
                    style = dict(label=f'{look(arch)["label"]}, warm-up {warmup:.0%}', linewidth=1.3,
                                 markersize=4, linestyle=['-', (0, (2, 1)), ':'][min(i, 2)])
                    curve(panel, longest, 'lr', **look(arch) | style)
                    for r in [r for r in longest if r['samples'] < best['samples']]:
                        panel.plot(r['lr'], 100 * r['accuracy'], 'kx', zorder=9,
                                   label='given up after a shorter run')
                panel.plot(best['lr'], 100 * best['accuracy'], 'o', color=look(arch)['color'], clip_on=False,
                           fillstyle='none', markersize=13, markeredgewidth=1.8, label='best')
            log_axis(panel, rows, 'lr', 'learning rate')
            panel.tick_params(axis='x', labelrotation=60)
        yield f'sweep-{name}', finish(figure)


def learning(found):
    """Who learns how fast: accuracy on IsTree against training samples, a panel for each setup, a line for
    each seed. The last point is the result, on all held-out samples, the others are on 200 of them; there a
    model that always gives the same answer scores somewhere in the grey band."""
    all_results = [r for r in alike(found, task='istree') if r['log']]
    for (size, n), results in groups(all_results, 'size', 'n_nodes'):
        figure, parts = panels(groups(results, 'setup', 'n_nodes'))
        for panel, _, rows in parts:
            chance(panel, rows)
            panel.axhspan(43, 57, color='#E6E6E6', linewidth=0, label='a guess on 200 samples')        # 95%
            for r in rows:
                end = r.get('samples_trained', r['samples'])
                points = [(line['samples'], line['accuracy']) for line in r['log']
                          if line['samples'] < 0.99 * end]
                x, y = zip(*points, (end, r['accuracy']))
                style = look(r['arch']) | dict(linewidth=1, markersize=3)
                panel.plot(np.array(x) / 1000, 100 * np.array(y), **style)
            panel.set_xlabel('thousand samples')
        yield f'learning-{size}-n{n}', finish(figure)


# --- how much a memory holds -------------------------------------------------------------------------------

KINDS = {'M': 'RNN (Mamba)', 'D': 'RNN (DeltaNet)', 'G': 'RNN (GRU)'}


def recalls(found):
    """Associative recall: (name, [(floats carried, results of all seeds), ...]) for each kind of recurrent
    model that was run with several sizes of memory, and the others with an architecture's own layers."""
    results = [r for r in where(found['results'], task='recall') if not r.get('tuning')]
    results = where(results, n_nodes=max([r['n_nodes'] for r in results], default=0))
    for r in results:
        r['curriculum'] = r.get('curriculum', 0)
        letters = {*(r.get('layers') or {'mamba': 'M'}.get(r['arch'], r['arch']))}
        r['kind'] = KINDS.get(*letters) if len(letters) == 1 and r['setup'] == 'direct' else None
        r['floats'] = sum(r['memory'].values())
    kinds = [(kind, [(floats, rows) for (floats,), rows in groups(same, 'floats')])
             for (kind,), same in groups([r for r in results if r['kind']], 'kind')]
    several = [(kind, rows) for kind, rows in kinds if len(rows) > 1]
    return several, [r for r in results if r['kind'] not in dict(several) and not r.get('layers')]


def lengths(results):
    """A result for each length that the runs were evaluated on."""
    return [r | row | dict(n_nodes=row['n']) for r in results for row in r['by_length']]


def shade(i, of):
    """The look of the i-th of several sizes."""
    return dict(color=plt.get_cmap('viridis')(0.92 * i / max(1, of - 1)), marker='osD^v'[i % 5], markersize=4,
                linewidth=1.3)


def largest_n(result, accuracy=0.95):
    """Up to which n a run is that accurate, between two lengths by interpolation over log n; None if it is
    not even at the smallest, or still is at the largest."""
    points = [(row['n'], row['accuracy']) for row in result['by_length']]
    for (n, a), (m, b) in zip(points, points[1:]):
        if a >= accuracy > b:
            return n * (m / n) ** ((a - accuracy) / (a - b))


def capacity(found):
    """How much a memory holds: accuracy of associative recall against the number of pairs, a panel for each
    kind of recurrent model, a line for each size of its memory; and, against that size, the largest n of
    which 95% is recalled, with the slope of a line through all runs (over logarithms)."""
    kinds, others = recalls(found)
    if not kinds:
        return
    figure, parts = panels([((name,), rows) for name, rows in kinds]
                           + [(('attention, or a retriever',), others)] * bool(others))
    for panel, (name,), rows in parts:
        if name in dict(kinds):
            for i, (floats, same) in enumerate(rows):
                curve(panel, lengths(same), 'n_nodes', label=f'{floats:,} floats', **shade(i, len(rows)))
            rows = [r for _, same in rows for r in same]
            panel.legend(fontsize=6.5, ncol=3, columnspacing=0.8, handlelength=1.2, loc='upper center',
                         bbox_to_anchor=(0.5, -0.25))
        other = groups(rows, 'arch', 'setup', 'curriculum') if name not in dict(kinds) else ()
        for (arch, setup, curriculum), same in other:
            style = look(arch)
            label = style['label'] + f', {NAMES[setup]}' * (setup != 'direct')
            curve(panel, lengths(same), 'n_nodes', **style | dict(
                label=label + ', with a curriculum' * (curriculum > 0), linestyle='-:'[curriculum > 0]))
        chance(panel, lengths(rows), 'n_nodes')
        log_axis(panel, lengths(rows), 'n_nodes', 'n, pairs in the context')
    yield 'capacity', finish(figure)

    figure, axes = plt.subplots(figsize=(4, 3.2))
    for i, (name, rows) in enumerate(kinds):
        points = [(floats, n) for floats, same in rows for n in map(largest_n, same) if n]
        if points:
            floats, largest = np.array(points).T
            label, colour = name, ['#D55E00', '#0072B2', '#009E73'][i]
            if len({*floats}) > 1:
                slope, offset = np.polyfit(np.log(floats), np.log(largest), 1)
                label += f', slope {slope:.2f}'
                ends = np.array([floats.min(), floats.max()])
                axes.plot(ends, np.exp(offset) * ends ** slope, color=colour, linewidth=1)
            axes.plot(floats, largest, 'osD'[i], color=colour, markersize=5, fillstyle='none', label=label)
    axes.set(xscale='log', yscale='log', xlabel='floats carried', ylabel='largest n with 95% right')
    axes.set_xticks([floats for _, rows in kinds for floats, same in rows if any(map(largest_n, same))])
    axes.set_yticks([row['n'] for row in kinds[0][1][0][1][0]['by_length']])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter('{x:g}')
        axis.set_minor_locator(NullLocator())
    yield 'capacity-law', finish(figure)


def best_possible(bits, n, values):
    """The largest accuracy that anyone, however trained, can reach on average with a message of so many bits
    about n values, each one of `values` at random, by rate-distortion theory (Cover & Thomas 2006, chapter
    10): accuracy a takes n (log2(values) - h(a) - (1 - a) log2(values - 1)) bits, with
    h(a) = -a log2(a) - (1 - a) log2(1 - a)."""
    def needed(a):
        wrong = 1 - a
        h = -sum(p * math.log2(p) for p in (a, wrong) if p > 0)
        return n * (math.log2(values) - h - wrong * math.log2(values - 1))

    low, high = 1 / values, 1.0
    if needed(high) <= bits:
        return 1.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if needed((low + high) / 2) <= bits else (low, (low + high) / 2)
    return low


def bits(found):
    """The communication game (train.messages): accuracy of recall against the bits of the message that one
    player sends the other, a panel for each n, a line for each size of the memory; and the theorem's side of
    it, what is possible with so many bits. One picture for each kind of recurrent model."""
    for name, rows in recalls(found)[0]:
        rows = [(floats, [r for r in same if r.get('messages')]) for floats, same in rows]
        rows = [(floats, same) for floats, same in rows if same]
        played = sorted({m['n'] for _, same in rows for r in same for m in r['messages']} & {8, 16, 32, 64})
        if not played:
            continue
        figure, parts = panels([((n,), n) for n in played])
        for panel, _, n in parts:
            for i, (floats, same) in enumerate(rows):
                games = [m for r in same for m in r['messages'] if m['n'] == n]
                points = [(b, 100 * np.mean([m['accuracy'] for m in same]))
                          for (b,), same in groups(games, 'bits')]
                panel.plot(*zip(*points), label=f'{floats:,} floats', **shade(i, len(rows)))
            values = data.numbers_for('recall', rows[0][1][0]['n_nodes'])
            enough = n * math.log2(values)
            x = np.geomspace(enough / 30, enough, 100)
            panel.plot(x, [100 * best_possible(b, n, values) for b in x], color='black',
                       label='what is possible (theorem)')
            panel.axvline(enough, color='black', linestyle=':', label='all n values: $H = n\\,\\log_2 |V|$')
            panel.set(xscale='log', xlabel='bits of the message')
        yield f'bits-{re.sub("[^a-z]", "", name.lower().removeprefix("rnn"))}', finish(figure)


# --- what it costs, what goes wrong ------------------------------------------------------------------------

def memory(found):
    """The claim itself: accuracy on IsTree with chain of thought, and what a model carries from token to
    token at the end of the prompt, in floats."""
    all_results = [r for r in alike(found, ['d_state'], task='istree', setup='cot') if r.get('memory')]
    for (size, n), results in groups(all_results, 'size', 'n_nodes'):
        rows = groups(results, 'arch', 'd_state')
        if len(rows) < 4:
            continue
        figure, (right, bars) = plt.subplots(1, 2, figsize=(7.5, 0.9 + 0.3 * len(rows)), sharey=True)
        for y, ((arch, _), group) in enumerate(rows):
            percent, left = np.mean([100 * r['accuracy'] for r in group]), 0
            right.plot(percent, y, 'o', color=look(arch)['color'])
            right.text(percent - 3, y, f'{percent:.0f}', ha='right', va='center', fontsize=8)
            for part, name, colour, hatch in (('state', 'scan state', '#D55E00', ''),
                                              ('cache', 'KV cache', '#0072B2', '...'),
                                              ('window', 'convolution window', '#E69F00', '///')):
                floats = group[0]['memory'].get(part, 0)
                bars.barh(y, floats, 0.7, left, color=colour, hatch=hatch, edgecolor='white', label=name)
                left += floats
            bars.text(left, y, f' {left:,.0f}', va='center', fontsize=8)
        right.axvline(50, linestyle=':', color=GREY, label='chance')
        right.set_yticks(range(len(rows)), [NAMES.get(arch, arch) + f', d_state {d}' * (arch != 'transformer')
                                            for (arch, d), _ in rows])
        right.set(xlim=(0, 105), ylim=(len(rows) - 0.5, -0.5), xlabel='accuracy (%)')
        bars.set_xlabel('floats carried at the end of the prompt')
        figure.suptitle(f'IsTree, n={n}, chain of thought', fontsize=9)
        yield f'memory-{size}-n{n}', finish(figure)


def errors(found):
    """Where it goes wrong: share of wrong tokens of each kind, all tokens before them given: in-context
    retrieval (the next neighbour) against bookkeeping. A setup in which no model errs in 1% of a kind has a
    note, not a panel."""
    all_results = [r for r in alike(found, task='istree') if r.get('errors') and r['setup'] != 'direct']
    for (size, n), results in groups(all_results, 'size', 'n_nodes'):
        found_by_setup, note = [], ''
        for key, rows in groups(results, 'setup', 'n_nodes'):
            if (worst := max(max(r['errors'].values()) for r in rows)) < 0.01:
                rate = max(100 * worst, 0.1)
                note += f'{NAMES[key[0]]}: no model errs in more than {rate:.1f}% of any kind. '
            else:
                found_by_setup.append((key, rows))
        if not found_by_setup:
            continue
        figure, parts = panels(found_by_setup, 3.7)
        for panel, _, rows in parts:
            kinds = [kind for kind in data.KINDS if all(kind in r['errors'] for r in rows)]
            for i, ((arch,), group) in enumerate(groups(rows, 'arch')):
                rates = [np.mean([100 * r['errors'][kind] for r in group]) for kind in kinds]
                bars = panel.bar(np.arange(len(kinds)) + 0.27 * (i - 1), rates, 0.25, edgecolor='white',
                                 color=look(arch)['color'], label=look(arch)['label'],
                                 hatch=HATCHES.get(arch))
                panel.bar_label(bars, ['<0.1' if 0 < r < 0.1 else f'{r:.1f}' for r in rates], fontsize=6)
            panel.set_xticks(range(len(kinds)), [textwrap.fill(kind, 10) for kind in kinds], fontsize=8)
            panel.autoscale(axis='y')
        figure.axes[0].set_ylabel('wrong tokens (%)')
        yield f'errors-{size}-n{n}', finish(figure, note=note)


def generation(found):
    """What one more token costs against the tokens before it, in time and in memory, measured by
    models.py."""
    for rows in found['generation']:
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.9))
        for panel, name, unit, text in zip(axes, ('seconds', 'bytes'), (1e3, 1e-6),
                                           ('ms a token', 'memory (MB)')):
            for (arch,), line in groups(rows, 'arch'):
                panel.plot([r['length'] for r in line], [unit * r[name] for r in line], **look(arch))
            log_axis(panel, rows, 'length', 'tokens of context')
            panel.tick_params(axis='x', labelrotation=60)
            panel.set(yscale='log', ylabel=f'{text}, {rows[0]["size"]}')
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter('{x:g}')
            panel.yaxis.set_minor_locator(NullLocator())
        yield f'generation-{rows[0]["size"]}', finish(figure)


def hotpot(found):
    """HotpotQA: exact match of each model under the three conditions, on all questions; mean over seeds.
    Error bars: standard error, between seeds if there are several, else between questions."""
    models = {}
    for name, rows in found['hotpot']:
        arch, _, size = re.sub(r'-s\d+$', '', name).partition('-')
        label = f'{look(arch)["label"]}\n{size}' if arch in LOOKS else textwrap.fill(name, 18)
        questions = [r.get('id') for r in rows]                 # files on the same ones are seeds
        models.setdefault((label, *questions), []).append(rows)
    if not models:
        return
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(models), 2.9))
    conditions = {r['condition'] for _, rows in found['hotpot'] for r in rows}
    conditions = sorted(conditions, key='gold full retrieval'.find)
    looks = zip(conditions, (GREY, '#E69F00', '#56B4E9'), ('', '///', '...'))
    for i, (condition, colour, hatch) in enumerate(looks):
        scores = []
        for seeds in models.values():
            runs = [[100 * r['em'] for r in where(rows, condition=condition)] for rows in seeds]
            scores.append(np.array([np.mean(run) for run in runs] if len(runs) > 1 else runs[0]))
        spread = [s.std(ddof=1) / len(s) ** 0.5 if len(s) > 1 else 0 for s in scores]
        bars = axes.bar(np.arange(len(scores)) + 0.27 * (i - 1), [s.mean() for s in scores], 0.25,
                        yerr=spread, capsize=2, color=colour, hatch=hatch, edgecolor='white', label=condition)
        axes.bar_label(bars, [f'{s.mean():.0f}' for s in scores], fontsize=7, padding=2)
    for r in where(found['results'], task='hotpot')[:1]:
        axes.axhline(100 * r.get('chance', math.nan), linestyle=':', color='black',
                     label='a guess (mean of the three)')
    axes.set_xticks(range(len(models)), [label for label, *_ in models])
    axes.set(ylabel='exact match (%)', ylim=(0, 108))
    yield 'hotpot', finish(figure)


def attention(found):
    """What the mechanism looks like: where the top attention layer looks, a row for each token that was
    written, a column for each of the prompt; framed is the edge that leads from this token to the next."""
    for r in [r for r in alike(found, task='istree') if r['attention']]:
        prompt, wrote, share = [r['attention'][name] for name in ('prompt', 'trace', 'share')]
        figure, axes = plt.subplots(figsize=(8, 8 * (len(wrote) + 6) / (len(prompt) + 6)))
        weights = np.array(r['attention']['weights'])[:, :len(prompt)]
        figure.colorbar(axes.imshow(weights, cmap='Blues', vmin=0, vmax=1), label='attention', shrink=0.6)
        for i, move in enumerate(zip(wrote, wrote[1:])):
            for j, edge in enumerate(edges_of(' '.join(prompt))):
                if {*edge} == {*move}:
                    frame = Rectangle((3 * j + 0.5, i - 0.5), 3, 1, fill=False, color=RED, linewidth=1)
                    axes.add_patch(frame)
        axes.set_xticks(range(len(prompt)), prompt, fontsize=6, rotation=90)
        axes.set_yticks(range(len(wrote)), wrote, fontsize=6)
        axes.set(xlabel='the prompt', ylabel='the right trace, from top to bottom')
        title = f'Where the attention layer looks ({r["arch"]}); framed: the edge to the next node'
        if share is not None:
            title += f'\n(on average {share:.0%} of its attention is there if that node is a new neighbour)'
        axes.set_title(title, fontsize=9)
        yield f'attention-{r["arch"]}-{r["size"]}-n{r["n_nodes"]}-s{r["seed"]}', figure


# --- what happens: one sample, a film of it, the idea ------------------------------------------------------

def edges_of(prompt):
    """The edges of a prompt, read from its text: [(u, v), ...], nodes as words."""
    return re.findall(r'(\d+) - (\d+)', prompt)


def tour(words):
    """Where a search has been: {index: node} of the nodes that were written outside queries and records."""
    steps, query = {}, False
    for i, word in enumerate(words):
        query = word == '[STARTSEARCH]' or query and word != '[ENDSEARCH]'
        before = words[max(0, i - 1)]
        record = before == '~' or words[i + 1:i + 2] == ['~']
        if word.isdigit() and not query and not record and before != '[ENDSEARCH]':
            steps[i] = word
    return steps


def mistake(sample):
    """The first wrong word of a sample: its index, the wrong step (u, w), the right one (u, x), each None if
    it is no step, and a sentence. All None if nothing is wrong."""
    written, expected = sample['written'].split(), sample['expected'].split()
    if written == expected:
        return None, None, None, None
    end = min(len(written), len(expected))
    i = next((i for i in range(end) if written[i] != expected[i]), end)
    w, x = [*written, 'nothing'][i], [*expected, 'nothing'][i]
    here = ['nowhere', *[node for j, node in tour(expected).items() if j < i]][-1]
    edges = [{*edge} for edge in edges_of(sample['prompt'])]
    why = f'At {here} it wrote {w} instead of {x}'
    if {here, x} in edges:
        why += f': the prompt has {here} - {x}' + ('' if {here, w} in edges else f', but no {here} - {w}')
    return i, (here, w) if i in tour(written) else None, (here, x) if i in tour(expected) else None, why


def cases(found):
    """For each size and n of IsTree, of the held-out samples that were kept, the one that tells most: on
    which the RNN errs without a retriever and the others do not. Yields size, n and {(setup, arch): (result,
    sample)}."""
    results = [r for r in alike(found, task='istree', distribution='two_star')
               if r['setup'] != 'direct' and r['arch'] in LOOKS]
    for (size, n), rows in groups(results, 'size', 'n_nodes'):
        told = {}
        for r in reversed(rows):                                            # of several seeds, the first
            for kept in r['kept']:
                told.setdefault(kept['prompt'], {})[r['setup'], r['arch']] = r, kept
        fails = lambda case, key: key in case and case[key][1]['written'] != case[key][1]['expected']
        score = lambda case: (fails(case, ('cot', 'mamba')), -sum(fails(case, key) for key in case))
        if told:
            yield size, n, max(told.values(), key=score)


def tape(axes, items, marks, columns, lines):
    """Write texts in lines of `columns` characters, the last `lines` if there are more. marks: {index of a
    text: (colour, background)}."""
    axes.clear()
    axes.set(xlim=(0, columns), ylim=(-lines, 0))
    axes.set_axis_off()
    size = axes.get_window_extent().width / axes.figure.dpi * 72 / columns / 0.602      # monospaced
    places, x, y = [], 0, 0
    for item in items:
        x, y = (0, y + 1) if x + len(item) > columns else (x, y)
        places.append((x, y))
        x += len(item) + 1
    for i, (item, (x, line)) in enumerate(zip(items, places)):
        if line > y - lines:
            colour, background = marks.get(i, ('black', 'none'))
            axes.text(x, max(y + 1 - lines, 0) - line, item, family='monospace', fontsize=size, va='top',
                      color=colour, bbox=dict(facecolor=background, edgecolor='none', pad=1))


def stars(axes, prompt, read, steps, colour, wrong=None, right=None, match=None):
    """Draw the two stars of a prompt, its first `read` edges: a walk (nodes) in colour, its wrong last step
    in red, the step that would have been right dotted, the edge that the retriever has found in yellow."""
    edges = edges_of(prompt)
    nodes, pairs = [str(v) for v in range(len(edges) + 1)], [{*edge} for edge in edges]
    touches = lambda pair: sum(not {*edge}.isdisjoint(pair) for edge in edges)
    centres = max(itertools.combinations(nodes, 2), key=touches)
    joined = {v for edge in edges if {*edge}.isdisjoint(centres) for v in edge}         # two leaves
    place = {}
    for hub, x, first in zip(centres, (-1.45, 1.45), (0, np.pi)):
        near = lambda v: {hub, v} in pairs or hub == centres[0] and {centres[1], v} not in pairs
        leaves = [v for v in nodes if v not in centres and near(v)]
        leaves.sort(key=lambda v: v not in joined)
        for v, angle in zip(leaves, first + 2 * np.pi * np.arange(len(leaves)) / max(1, len(leaves))):
            place[v] = x + np.cos(angle), np.sin(angle)
        place[hub] = x, 0
    axes.clear()
    axes.set(xlim=(-2.7, 2.7), ylim=(-1.25, 1.25), aspect='equal')
    axes.set_axis_off()
    lines = [*[(edge, '#CCCCCC', 1, '-') for edge in edges[:read]], (match, YELLOW, 9, '-'),
             *[(step, colour, 3, '-') for step in zip(steps, steps[1:])], (right, 'black', 3, (0, (1, 0.8)))]
    for pair, line_colour, width, dashes in lines:
        if pair and {*pair} <= {*place}:
            axes.plot(*zip(*[place[v] for v in pair]), color=line_colour, linewidth=width, linestyle=dashes,
                      zorder=1)
    if wrong and {*wrong} <= {*place}:
        axes.add_patch(FancyArrowPatch(*[place[v] for v in wrong], arrowstyle='-|>', mutation_scale=14,
                                       color=RED, linewidth=2, connectionstyle='arc3,rad=0.25', shrinkA=7,
                                       shrinkB=8, zorder=3))
    for v, (x, y) in place.items():
        here = [v] == steps[-1:]
        circle = dict(boxstyle='circle,pad=0.3', facecolor=colour if here else 'white',
                      edgecolor=colour if v in steps else '#BBBBBB')
        axes.text(x, y, v, ha='center', va='center', fontsize=7, color='white' if here else 'black',
                  bbox=circle)


def sample(found):
    """One held-out graph, the right search and the one that each architecture wrote, with its first wrong
    step."""
    for size, n, told in cases(found):
        shown = [key for key in (*[('cot', arch) for arch in LOOKS], ('retrieval', 'mamba')) if key in told]
        rows = (len(shown) + 2) // 2
        figure, axes = plt.subplots(2 * rows, 2, figsize=(8, 2.7 * rows), height_ratios=[4, 1] * rows)
        for panel in axes.flat:
            panel.set_axis_off()
        for i, key in enumerate([None, *shown]):
            kept = told.get(key, next(iter(told.values())))[1]
            words = kept['written' if key else 'expected'].split()
            steps, colour = tour(words), look(key[1])['color'] if key else '#444444'
            at, wrong, right, why = mistake(kept) if key else (None,) * 4
            graph, text = axes[i // 2 * 2:, i % 2][:2]
            walked = [v for j, v in steps.items() if at is None or j < at]
            stars(graph, kept['prompt'], len(edges_of(kept['prompt'])), walked, colour, wrong, right)
            who = f'{NAMES[key[1]]}, {NAMES[key[0]]}' if key else 'Is it a tree? The right search'
            graph.set_title(f'{who}: {["nothing", *words][-1]}', fontsize=9, color=colour, weight='bold')
            graph.text(0.5, 0, why or '', fontsize=7, color=RED, ha='center', va='top',
                       transform=graph.transAxes)
            places = [j for j in range(len(words)) if j in steps or j == at or j == len(words) - 1]
            bad = {k: j for k, j in enumerate(places) if at is not None and j >= at}
            marks = {k: ('white', RED) if j == at else (GREY, 'none') for k, j in bad.items()}
            tape(text, [words[j] for j in places], marks, 56, 2)
        edges = [f'{u}-{v}' for u, v in edges_of(kept['prompt'])]
        text = textwrap.fill('the prompt:  ' + '  '.join(edges), 100, break_on_hyphens=False)
        figure.suptitle(text, fontsize=8, y=0.95)
        yield f'sample-{size}-n{n}', figure


def scenes(told):
    """The film, frame by frame: who (setup, arch), how many edges have been read and words written, which
    edge the retriever has found, what is said, and seconds. All of it stands in the samples that were
    kept."""
    edges = edges_of(next(iter(told.values()))[1]['prompt'])
    for read in range(len(edges) + 1):
        yield None, read, 0, None, f'Is this graph a tree?\nThe models read its {len(edges)} edges.', 0.2
    acts = ('cot', 'transformer'), ('cot', 'mamba'), ('retrieval', 'mamba')
    for key in [key for key in acts if key in told]:
        kept, who = told[key][1], f'{NAMES[key[1]]}, {NAMES[key[0]]}'
        words, (at, *_, why) = kept['written'].split(), mistake(kept)
        steps, start = tour(words), 0
        slow = [*steps, len(words), len(words), len(words)][2]      # the first two steps of a retriever's
        scene = lambda t, say, seconds, match=None: (key, len(edges), t, match, f'{who}\n{say}', seconds)
        yield scene(0, 'It writes its search.', 1)
        match = None
        for t, word in enumerate(words[:at], 1):
            query = ' '.join(words[start:t]).partition(' [ENDSEARCH]')[0]
            if word == '[STARTSEARCH]':
                start, match = t, None
            elif word == '[ENDSEARCH]':
                ends = {*query.split()[:1], *words[t:t + 1]}
                match = next((edge for edge in edges if {*edge} == ends and '-' in query), None)
                if t < slow:
                    yield scene(t, f'It asks:  {query}', 0.6)
                    yield scene(t, f'It asks:  {query}   The retriever searches the text.', 0.5, match)
            elif t - 1 in kept['retrieved'] and t < slow:
                yield scene(t, f'It asks:  {query}   The answer, {word}, is pasted.', 0.6, match)
            elif t - 1 in steps and (t > slow or key[0] == 'cot'):
                more = ' And so on.' if key[0] == 'retrieval' else ''
                yield scene(t, f'The search is at {word}.{more}', 0.2)
        if at is not None:
            yield scene(at + 1, why, 2.5)
        right = 'right' if words[-1:] == kept['expected'].split()[-1:] else 'wrong'
        yield scene(len(words), f'Its answer is {["nothing", *words][-1]}: {right}.', 2)


def draw_scene(figure, told, scene):
    """Draw a frame of the film."""
    key, read, t, match, say, _ = scene
    kept = told.get(key, next(iter(told.values())))[1]
    edges, words = edges_of(kept['prompt']), kept['written'].split() if key else []
    at, wrong, right, _ = mistake(kept)
    if not key or at is None or at >= t:
        at, wrong, right = t, None, None
    colour = look(key[1])['color'] if key else '#444444'
    said, prompt, graph, carried, wrote = figure.axes
    for axes in (said, carried):
        axes.clear()
        axes.set_axis_off()
    said.text(0, 0, say, fontsize=11, color=RED if at < t else colour)
    paint = lambda edge: YELLOW if edge == match else PINK if right and {*edge} == {*right} else '#EEEEEE'
    marks = {i: ('black', paint(edge)) for i, edge in enumerate(edges)}
    tape(prompt, [' - '.join(edge) for edge in edges[:read]], marks, 90, 3)
    steps = [node for i, node in tour(words).items() if i < at]
    stars(graph, kept['prompt'], read, steps, colour, wrong, right, match)
    marks = {i: ('black', YELLOW if i == t - 1 else '#EEEEEE') for i in kept['retrieved'] if i < at}
    marks |= {i: ('white', RED) if i == at else (GREY, 'none') for i in range(at, t)}
    tape(wrote, words[:t], marks, 90, 4)

    carried.set(xlim=(0, 27), ylim=(-16, 2), aspect='equal')
    prompt_tokens, tokens = 3 * len(edges) + 2, 1 + 3 * read + (read == len(edges)) + t
    unit = max(r['memory'].get('cache', 0) for r, _ in told.values()) / prompt_tokens or 256    # of a square
    who = [key] if key else [k for k in (('cot', 'mamba'), ('cot', 'transformer')) if k in told]
    for x, k in zip((0, 14), who):
        floats, style = told[k][0]['memory'], dict(color=look(k[1])['color'], linewidth=0)
        fixed = floats.get('state', 0) + floats.get('window', 0)
        squares = int(tokens * floats.get('cache', 0) / prompt_tokens / unit)
        side = (fixed / unit) ** 0.5
        carried.add_patch(Rectangle((x, -side), side, side, **style))
        for i in range(squares):
            carried.add_patch(Rectangle((x + i % 12, -1 - i // 12), 0.85, 0.85, **style))
        text = f'{squares * unit:,.0f} numbers' if squares else f'{fixed:,.0f} numbers, always'
        carried.text(x, 0.5, f'{look(k[1])["label"]}\n{text}', fontsize=9, color=style['color'])


def walk(found):
    """A film of one sample, of the largest n that has some: what is read, what is carried from token to
    token, to scale, and where the search goes. Yields its frames and their seconds."""
    for told in [case for *_, case in cases(found) if all(r.get('memory') for r, _ in case.values())][-1:]:
        figure, frames = plt.figure(figsize=(8, 5.2), dpi=100), []
        for place in ((.02, .92, .96, .07), (.02, .74, .96, .12), (0, .22, .6, .53), (.6, .22, .39, .47),
                      (.02, .01, .96, .17)):
            figure.add_axes(place)
        for x, y, text in ((.02, .87, 'the prompt'), (.02, .19, 'what is written'),
                           (.6, .72, 'what is carried, to scale')):
            figure.text(x, y, text, fontsize=8, color='grey')
        for scene in scenes(told):
            draw_scene(figure, told, scene)
            figure.canvas.draw()
            frames.append(np.array(figure.canvas.buffer_rgba())[..., :3])
        paints = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in (RED, YELLOW, PINK)], np.uint8)
        swatches = paints.repeat(80, 0)[:, None].repeat(800, 1)
        palette = Image.fromarray(np.concatenate((*frames[::10], swatches))).quantize(48)   # one for all
        frames = [Image.fromarray(frame).quantize(palette=palette, dither=0) for frame in frames]
        seconds = [scene[-1] for scene in scenes(told)]
        yield 'walk', [*zip(frames, np.array(seconds) * min(1, 38 / sum(seconds)))]


def idea(found):
    """The paper in a drawing: what each kind of model carries from token to token. Needs no results."""
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.6))
    text = ['2-1', '4-0', '4-3', '...', '4-?']
    boxes = (('mamba', text, 'RNN: a box of fixed size',
              'The longer the text, the more\nof it is forgotten.'),
             ('transformer', text, 'Transformer: a growing cache',
              'Nothing is forgotten; the memory\ngrows with the text.'),
             ('mamba', [*text, '3'], 'RNN with a retriever',
              'What was forgotten is looked up\nin the text and pasted at its end.'))
    for panel, (arch, words, title, below) in zip(axes, boxes):
        colour, retrieves, height = look(arch)['color'], len(words) > 5, 0.6 if arch == 'mamba' else 0.27
        panel.set(xlim=(-0.7, 5.7), ylim=(-2.75, 2.4), aspect='equal', xticks=[], yticks=[])
        panel.spines[:].set(visible=True, color='#CCCCCC')
        panel.set_title(title, fontsize=10, weight='bold', color=colour)
        panel.text(2.5, -1.65, below, ha='center', va='top', fontsize=8.5)
        for x, word in zip(np.arange(len(words)) + (0 if retrieves else 0.5), words):
            lit = retrieves and x in (2, 5)
            panel.text(x, 1, f'{word:^3}', ha='center', va='center', fontsize=8.5, family='monospace',
                       bbox=dict(boxstyle='square,pad=0.25', facecolor=YELLOW if lit else 'white',
                                 edgecolor=GREY))
            for i in range(int(x) + 1 if arch == 'transformer' else 1):
                panel.add_patch(Rectangle((x - 0.3, 0.35 - height - 0.35 * i), 0.6, height, color=colour,
                                          linewidth=0))
            if x >= 1 and arch == 'mamba':
                panel.annotate('', (x - 0.25, 0.05), (x - 0.75, 0.05), arrowprops=dict(arrowstyle='->'))
        if retrieves:
            panel.add_patch(FancyArrowPatch((2, 1.4), (5, 1.4), connectionstyle='arc3,rad=-0.3',
                                            arrowstyle='-|>', mutation_scale=12, color='black'))
            panel.text(3.5, 1.9, 'the retriever', ha='center', va='bottom', fontsize=8.5)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.text(0.5, 0.02, "Hybrid: an RNN with one Transformer layer on top carries the box and its cache.",
                ha='center', fontsize=9, color=LOOKS['hybrid']['color'])
    yield 'idea', figure


FIGURES = [idea, accuracy, sizes, primitives, sweep, learning, capacity, bits, memory, errors, generation,
           hotpot, attention, sample, walk]


# --- reading the results -----------------------------------------------------------------------------------

# What a file must hold, see train.fits.
LENGTH = {'n': int, 'accuracy': float, 'accuracy_se': float, 'best_guess?': float, 'chance': float}
MESSAGE = {'n': int, 'bits': int, 'accuracy': float}
CELL_RESULT = RESULT | {'distribution': str, 'errors?': {str: float}, 'by_length': [LENGTH],
                        'messages?': [MESSAGE]}
LOG = {'samples': int, 'accuracy': float}
ATTENTION = {'prompt': [str], 'trace': [str], 'weights': [[float]]}
HOTPOT = {'condition': str, 'em': float}
GENERATION = {'arch': str, 'size': str, 'length': int, 'seconds': float, 'bytes': int}


def read(path, shape):
    """The list of values in a JSON or JSON-lines file; for a damaged one, [] and a line that says so."""
    try:
        value = read_json(path, shape)
        return value if isinstance(value, list) else [value]
    except UserError as error:
        print(f'left out: {error}')
        return []


def load(out):
    """What there is to draw below a folder: results of train.py (dicts, with their log, kept samples and
    attention) and its unfinished cells, lists of rows of models.py, (model name, rows) of eval_hotpot.py."""
    def beside(path, name, shape):
        return read(path.with_name(name), shape) if path.with_name(name).exists() else []

    unfinished = [c for path in sorted(out.glob('**/config.json'))
                  if not path.with_name('result.json').exists()
                  for c in read(path, {name: RESULT[name] for name in CELL})]
    results, hotpot = {}, []
    for path in sorted(out.glob('**/result.json')):
        for r in read(path, CELL_RESULT):
            cell = tuple(str(r.get(name)) for name in (*CELL, *CONSTANTS, 'lr', 'warmup', 'tuning', 'layers'))
            if not {r['task'], r['setup']} <= {*NAMES} or r['n_nodes'] < 1:
                print(f'{path} is left out: no task or setup of ours')
            elif cell in results:
                print(f'{path} is left out: {results[cell]["path"]} is of the same cell')
            else:
                shown = [a for a in beside(path, 'attention.json', ATTENTION)
                         if {len(a['prompt'] + a['trace'])} == {len(row) for row in a['weights']}
                         and len(a['weights']) == len(a['trace'])]
                kept = [s for s in beside(path, 'samples.json', [SAMPLE]) if edges_of(s['prompt'])]
                results[cell] = r | dict(path=path, log=beside(path, 'log.jsonl', LOG), kept=kept,
                                         attention=dict(share=None) | shown[0] if shown else None)
    for path in sorted(out.glob('**/hotpot/*.jsonl')):
        rows = read(path, HOTPOT)
        counts = Counter(r['condition'] for r in rows)
        if len(counts) == 3 and len({*counts.values()}) == 1:
            hotpot.append((path.stem.rpartition('-')[0], rows))
        elif rows:
            print(f'{path} is left out: not finished')
    order = lambda name: next((i for i, arch in enumerate(LOOKS) if name.startswith(arch)), len(LOOKS))
    generation = [read(path, [GENERATION]) for path in sorted(out.glob('**/generation.json'))]
    in_order = sorted(results.values(), key=lambda r: (r['n_nodes'], r['seed']))
    return dict(results=in_order, unfinished=unfinished,
                hotpot=sorted(hotpot, key=lambda found: order(found[0])),
                generation=[rows for rows in generation if rows])


def main(argv):
    c = parse(argv, Constants, 'plot.py', {'default': {}})
    folder, found = Path(c.figures), load(Path(c.out))
    if folder.exists() and not folder.is_dir():
        raise UserError(f'--figures={folder} is a file: name a folder')
    if not any(found[kind] for kind in ('results', 'hotpot', 'generation')):
        raise UserError(f'{c.out}: no results to draw, run train.py first')
    folder.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        for name, figure in draw(found):
            path = folder / f'{name}.{"gif" if draw is walk else "png"}'
            if draw is walk:
                (first, *others), seconds = zip(*figure)
                times = [round(1000 * s) for s in seconds]
                first.save(path, save_all=True, append_images=others, duration=times, loop=0)
            else:
                figure.savefig(path)
                figure.savefig(path.with_suffix('.pdf'))
            plt.close('all')
            print(path)
    if n := len(found['unfinished']):
        print(f'{n} cells have been begun and not finished: run their train.py command again')


if __name__ == '__main__':
    sys.exit(cli(main, 'plot.py', sys.argv[1:]))
