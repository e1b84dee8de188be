"""The figures, drawn from what train.py, models.py and eval_hotpot.py wrote. Knows results, no models.

  python plot.py                              out/**/result.json ... -> figures/*.png, *.pdf and walk.gif
  python plot.py --out=results --figures=figures

Each function takes all that was found (a dict of lists, see load) and yields a name and a figure for each picture
that there are results for. Colours are Okabe and Ito's, safe for the colour-blind. Lines are never moved aside
to keep them apart: they differ in width, so that three lines at 100% are seen on top of one another.
"""
import json
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
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

import data
from train import Refused, cli, parse


@dataclass
class Constants:
    out: str = 'out'                        # folder of the results, searched with all its subfolders
    figures: str = 'figures'                # folder of the pictures


NAMES = {'transformer': 'Transformer', 'hybrid': 'hybrid', 'mamba': 'RNN (Mamba)'}      # in the order of drawing
COLOURS = {'transformer': '#0072B2', 'hybrid': '#009E73', 'mamba': '#D55E00'}
MARKERS = {'transformer': dict(marker='s', markersize=9, linewidth=4.5, hatch=''),
           'hybrid': dict(marker='^', markersize=6.5, linewidth=2.5, hatch='...'),
           'mamba': dict(marker='o', markersize=3.5, linewidth=1, hatch='///')}
RED, GREY, YELLOW = '#C00000', '#999999', '#F0E442'
SETUPS = {'direct': 'answer at once', 'cot': 'chain of thought', 'retrieval': 'with a retriever'}
TASKS = {'istree': 'IsTree', 'index': 'index', 'recall': 'associative recall', 'cgram': 'c-gram retrieval',
         'counting': 'counting', 'hotpot': 'two-hop questions'}
PRIMITIVES = ('index', 'recall', 'cgram', 'counting')
CELL = ('task', 'arch', 'setup', 'size', 'n_nodes', 'seed')
CONSTANTS = ('distribution', 'd_state', 'frozen_embedding', 'samples', 'batch_size', 'warmup', 'grad_clip', 'dtype')

plt.rcParams |= {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
                 'savefig.dpi': 200, 'savefig.bbox': 'tight', 'pdf.fonttype': 42, 'hatch.linewidth': 0.6}


# --- what the figures share ------------------------------------------------------------------------------

def where(results, **wanted):
    """The results with these values."""
    return [r for r in results if all(r.get(name) == value for name, value in wanted.items())]


def values(results, name):
    """Which values there are, in order; those that have a title above in the order of the titles."""
    known = {'setup': list(SETUPS), 'arch': list(NAMES), 'task': list(TASKS)}.get(name, [])
    return sorted({r[name] for r in results}, key=lambda v: (known.index(v), '') if v in known else (len(known), v))


def commonest(results, within, names):
    """Of the results with the same values of `within`, the largest group with the same values of `names`."""
    key = lambda r, names: tuple(r.get(name) for name in names)
    counts = Counter((key(r, within), key(r, names)) for r in results)
    best = {group: names for (group, names), _ in reversed(counts.most_common())}
    return [r for r in results if best[key(r, within)] == key(r, names)]


def alike(found, but=(), **wanted):
    """The results with these values that may be compared: no tuning, no layers of one's own, and of those that differ
    in more than a figure shows, for each setup and size the largest group with the same constants (except `but`)."""
    results = [r for r in where(found['results'], **wanted) if not r.get('tuning') and not r.get('layers')]
    results = commonest(results, ('task', 'setup', 'size'), [name for name in CONSTANTS if name not in but])
    return commonest(results, ('task', 'setup', 'size', 'arch'), ['lr'])


def style(arch, **more):
    other = dict(marker='D', markersize=5, linewidth=1.5)
    look = {k: v for k, v in MARKERS.get(arch, other).items() if k != 'hatch'}
    return dict(color=COLOURS.get(arch, 'black'), label=NAMES.get(arch, arch), capsize=2) | look | more


def curve(axes, results, x, **look):
    """Accuracy in percent against the value x of the results, mean over seeds; error bars: standard error, between
    seeds if there are several, else binomial."""
    points = []
    for value in values(results, x):
        group = where(results, **{x: value})
        accuracy = [100 * r['accuracy'] for r in group]
        error = np.std(accuracy, ddof=1) / len(group) ** 0.5 if len(group) > 1 else 100 * group[0]['accuracy_se']
        points.append((value, np.mean(accuracy), error))
    axes.errorbar(*zip(*points), **look)


def chance(axes, label='chance'):
    axes.axhline(50, linestyle=':', color=GREY, label=label)


def panels(titles, width=2.7, height=2.8, columns=4):
    """A figure with a panel of percents for each title, at most `columns` side by side, and the panels."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), sharey=True, squeeze=False)
    for panel, title in zip(axes.flat, titles):
        panel.set_title(title, fontsize=9)
        panel.set_ylim(0, 104)
    for panel in axes.flat[len(titles):]:
        panel.set_axis_off()
    for panel in axes[:, 0]:
        panel.set_ylabel('accuracy (%)')
    return figure, list(axes.flat[:len(titles)])


def finish(figure, unfinished=(), note=''):
    """The legend of all panels, each label once, at the right; a note and the unfinished cells below."""
    labels = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc='center left', bbox_to_anchor=(1, 0.5))
    names = [f'{c["task"]} {c["arch"]} {c["setup"]} {c["size"]} n={c["n_nodes"]} seed {c["seed"]}' for c in unfinished]
    if names:
        more = f' and {len(names) - 6} more' if len(names) > 6 else ''
        note += f'not finished: {", ".join(names[:6])}{more}'
    if note:
        figure.text(0.01, -0.02, note, fontsize=7, color='grey', va='top')
    return figure


def log_axis(axis, ticks):
    """Logarithmic, with ticks exactly where there are points."""
    axis.axes.set(**{f'{axis.axis_name}scale': 'log'})
    axis.set_ticks(ticks, [f'{tick:g}' for tick in ticks])
    axis.set_minor_locator(NullLocator())


# --- accuracies ------------------------------------------------------------------------------------------

def accuracy(found):
    """The paper's main figure: accuracy on IsTree against n, a panel for each setup, a picture for each size."""
    all_results = alike(found, ['d_state'], task='istree')
    for size in values(all_results, 'size'):
        results = where(all_results, size=size)
        setups = values(results, 'setup')
        figure, axes = panels([SETUPS[setup] for setup in setups])
        for panel, setup in zip(axes, setups):
            chance(panel)
            for arch in values(where(results, setup=setup), 'arch'):
                line = where(results, setup=setup, arch=arch)
                states = Counter(r['d_state'] for r in line).most_common()
                for i, d_state in enumerate(sorted(d for d, count in states if count > states[0][1] / 2)):
                    label = NAMES.get(arch, arch) + (f', d_state {d_state}' if i else '')
                    curve(panel, where(line, d_state=d_state), 'n_nodes',
                          **style(arch, label=label, linestyle=['-', '--', ':'][min(i, 2)]))
            log_axis(panel.xaxis, values(where(results, setup=setup), 'n_nodes'))
            panel.set_xlabel('n, nodes of the graph')
        yield f'accuracy-{size}', finish(figure, where(found['unfinished'], task='istree', size=size))


def sizes(found):
    """The paper's grid: accuracy on IsTree against n, a panel for each setup and architecture, a line for each size."""
    results = alike(found, task='istree')
    if len(names := values(results, 'size')) < 2:
        return
    pairs = [(s, a) for s in values(results, 'setup') for a in values(where(results, setup=s), 'arch')]
    figure, axes = panels([f'{NAMES.get(arch, arch)}, {SETUPS[setup]}' for setup, arch in pairs], columns=3)
    for panel, (setup, arch) in zip(axes, pairs):
        chance(panel)
        for i, size in enumerate(names):
            if line := where(results, setup=setup, arch=arch, size=size):
                curve(panel, line, 'n_nodes', label=size, color=str(0.7 * i / len(names)), capsize=2,
                      marker='osD^v'[i % 5], markersize=9 - 2 * min(i, 3), linewidth=4 - min(i, 3))
        log_axis(panel.xaxis, values(where(results, setup=setup, arch=arch), 'n_nodes'))
        panel.set_xlabel('n, nodes of the graph')
    yield 'sizes', finish(figure)


def primitives(found):
    """The bottleneck in its purest form (paper, section 4): accuracy of the retrieval primitives against the length of
    the context, a panel for each task and setup. One run has learned all lengths of a line."""
    runs = [r for task in PRIMITIVES for r in alike(found, task=task) if r.get('by_length')]
    all_results = [r | row | dict(n_nodes=row['n']) for r in runs for row in r['by_length']]
    for size in values(all_results, 'size'):
        results = where(all_results, size=size)
        tasks = values(results, 'task')
        pairs = [(setup, task) for setup in values(results, 'setup') for task in tasks]
        figure, axes = panels([f'{TASKS[task]}, {SETUPS[setup]}' for setup, task in pairs], columns=len(tasks))
        for panel, (setup, task) in zip(axes, pairs):
            rows = where(results, task=task, setup=setup)
            for arch in values(rows, 'arch'):
                curve(panel, where(rows, arch=arch), 'n_nodes', **style(arch))
            guesses = {r['n_nodes']: (r['chance'], r['best_guess']) for r in rows}
            for i, (label, line) in enumerate((('chance', ':'), ('best guess without look-up', '--'))):
                panel.plot(sorted(guesses), [100 * guesses[n][i] for n in sorted(guesses)], line, color=GREY, label=label)
            log_axis(panel.xaxis, sorted(guesses))
            panel.set_xlabel('n, pairs in the context' if task == 'recall' else 'n, tokens in the context')
        yield f'primitives-{size}', finish(figure, [c for c in found['unfinished'] if c['task'] in PRIMITIVES])


def sweep(found):
    """How the constants were found, and who is picky: accuracy against the learning rate after the longest run that was
    given to it, a panel for each task and setup, a line for each architecture and warm-up, the best value circled. What
    was given up after a shorter run is drawn as a cross."""
    for size in values(where(found['results'], tuning=True), 'size'):
        results = where(found['results'], tuning=True, size=size)
        keys = sorted({(list(TASKS).index(r['task']), list(SETUPS).index(r['setup']), r['n_nodes']) for r in results})
        keys = [(list(TASKS)[task], list(SETUPS)[setup], n) for task, setup, n in keys]
        figure, axes = panels([f'{TASKS[task]}, {SETUPS[setup]}, n={n}' for task, setup, n in keys])
        for panel, (task, setup, n) in zip(axes, keys):
            rows = where(results, task=task, setup=setup, n_nodes=n)
            warmups = values(rows, 'warmup')
            for arch in values(rows, 'arch'):
                tried = [r for r in where(rows, arch=arch) if r['samples'] == max(
                    o['samples'] for o in where(rows, arch=arch, lr=r['lr'], warmup=r['warmup']))]
                longest = where(tried, samples=max(r['samples'] for r in tried))
                for warmup in values(tried, 'warmup'):
                    dashes = ['-', (0, (2, 1.5)), ':'][min(warmups.index(warmup), 2)]
                    curve(panel, where(tried, warmup=warmup), 'lr', **style(arch, linestyle=dashes, linewidth=1.3,
                          markersize=4, label=f'{NAMES.get(arch, arch)}, warm-up {warmup:.0%} of the run'))
                short = [(r['lr'], 100 * r['accuracy']) for r in tried if r not in longest]
                panel.plot(*zip(*short or [(math.nan, math.nan)]), 'x', color='black', markersize=6, zorder=9,
                           label='given up after a shorter run')
                best = chosen(longest)
                panel.plot(best['lr'], 100 * best['accuracy'], 'o', color=COLOURS.get(arch, 'black'), zorder=9,
                           markersize=13, fillstyle='none', markeredgewidth=1.8, label=f'{NAMES.get(arch, arch)}, chosen')
            if task == 'istree':
                chance(panel)
            log_axis(panel.xaxis, values(rows, 'lr'))
            panel.tick_params(axis='x', labelrotation=60)
            panel.set_xlabel('learning rate')
        yield f'sweep-{size}', finish(figure)


def chosen(results):
    """The best of the results of a sweep that had the same number of samples: accuracy first, then exact traces, then
    the fewest samples until it was solved."""
    return max(results, key=lambda r: (r['accuracy'], r['exact_trace'], -r.get('samples_trained', r['samples'])))


def learning(found):
    """Who learns how fast: accuracy on IsTree against training samples, a panel for each setup, a line for each seed.
    The last point is the result, on all held-out samples; those before are on 200 of them, on which somebody who always
    gives the same answer is as far from 50% as the grey band is wide."""
    all_results = [r for r in alike(found, task='istree') if r['log']]
    for size, n in sorted({(r['size'], r['n_nodes']) for r in all_results}):
        results = where(all_results, size=size, n_nodes=n)
        setups = values(results, 'setup')
        figure, axes = panels([f'{SETUPS[setup]}, n={n}' for setup in setups])
        for panel, setup in zip(axes, setups):
            chance(panel)
            panel.axhspan(50 - 7, 50 + 7, color='#E6E6E6', linewidth=0, label='a guess on 200 samples (95%)')
            for r in where(results, setup=setup):
                end = r.get('samples_trained', r['samples'])
                points = [(line['samples'], line['accuracy']) for line in r['log'] if line['samples'] < 0.99 * end]
                x, y = zip(*points, (end, r['accuracy']))
                look = style(r['arch'], linewidth=1, markersize=3, alpha=0.8)
                panel.plot(np.array(x) / 1000, 100 * np.array(y), **{k: v for k, v in look.items() if k != 'capsize'})
            panel.set_xlabel('thousand samples')
        yield f'learning-{size}-n{n}', finish(figure)


# --- what it costs, what goes wrong ------------------------------------------------------------------------

PARTS = {'state': ('scan state', '#D55E00', ''), 'window': ('convolution window', '#E69F00', '///'),
         'cache': ('KV cache', '#0072B2', '...')}


def memory(found):
    """The claim itself: accuracy on IsTree with chain of thought, and what a model carries from token to token at the
    end of the prompt, in floats."""
    all_results = [r for r in alike(found, ['d_state'], task='istree', setup='cot') if r.get('memory')]
    for size, n in sorted({(r['size'], r['n_nodes']) for r in all_results}):
        results = where(all_results, size=size, n_nodes=n)
        rows = [(arch, d) for arch in values(results, 'arch') for d in values(where(results, arch=arch), 'd_state')]
        rows = [row for row in rows if row[0] != 'transformer' or row == rows[0]]       # it has no d_state
        if len(rows) < 4:
            continue
        figure, (right, bars) = plt.subplots(1, 2, figsize=(7, 0.8 + 0.3 * len(rows)), sharey=True)
        for y, (arch, d_state) in enumerate(rows):
            group = where(results, arch=arch, d_state=d_state)
            percent, left = np.mean([100 * r['accuracy'] for r in group]), 0
            right.plot(percent, y, 'o', color=COLOURS.get(arch, 'black'))
            right.text(percent - 3, y, f'{percent:.0f}', ha='right', va='center', fontsize=8)
            for part, (name, colour, hatch) in PARTS.items():
                floats = group[0]['memory'].get(part, 0)
                bars.barh(y, floats, 0.7, left, color=colour, hatch=hatch, edgecolor='white', label=name)
                left += floats
            bars.text(left, y, f' {left:,.0f}', va='center', fontsize=8)
        right.set_yticks(range(len(rows)), [NAMES.get(arch, arch) + (f', d_state {d}' if arch != 'transformer' else '')
                                            for arch, d in rows])
        right.axvline(50, linestyle=':', color=GREY, label='chance')
        right.set(xlim=(0, 104), ylim=(len(rows) - 0.5, -0.5), xlabel=f'accuracy (%), IsTree, n={n}, chain of thought')
        bars.set(xlabel='floats carried at the end of the prompt')
        yield f'memory-{size}-n{n}', finish(figure)


def errors(found):
    """Where it goes wrong: share of wrong tokens of each kind, all tokens before them given: in-context retrieval (the
    next neighbour) against bookkeeping. A setup in which nobody errs has no panel, only a note."""
    all_results = [r for r in alike(found, task='istree') if r.get('errors') and r['setup'] != 'direct']
    for size, n in sorted({(r['size'], r['n_nodes']) for r in all_results}):
        results = where(all_results, size=size, n_nodes=n)
        worst = {s: max(max(r['errors'].values()) for r in where(results, setup=s)) for s in values(results, 'setup')}
        note = ''.join(f'{SETUPS[s]}: no kind above {max(100 * worst[s], 0.1):.1f}% for anybody. ' for s in worst
                       if worst[s] < 0.01)
        if not (setups := [s for s in worst if worst[s] >= 0.01]):
            continue
        figure, axes = panels([f'{SETUPS[setup]}, n={n}' for setup in setups], width=3.7)
        for panel, setup in zip(axes, setups):
            kinds = [kind for kind in data.KINDS if all(kind in r['errors'] for r in where(results, setup=setup))]
            for i, arch in enumerate(values(where(results, setup=setup), 'arch')):
                group = where(results, setup=setup, arch=arch)
                rates = [np.mean([100 * r['errors'][kind] for r in group]) for kind in kinds]
                bars = panel.bar(np.arange(len(kinds)) + 0.27 * (i - 1), rates, 0.25, label=NAMES.get(arch, arch), edgecolor='white',
                                 color=COLOURS.get(arch, 'black'), hatch=MARKERS.get(arch, {}).get('hatch'))
                panel.bar_label(bars, ['<0.1' if 0 < rate < 0.1 else f'{rate:.1f}' for rate in rates], fontsize=6)
            panel.set_xticks(range(len(kinds)), [textwrap.fill(kind, 10) for kind in kinds], fontsize=8)
            panel.set_ylim(0, None)
        axes[0].set_ylabel('wrong tokens (%)')
        yield f'errors-{size}-n{n}', finish(figure, note=note)


def generation(found):
    """What one more token costs against the tokens before it, in time and in memory, measured by models.py."""
    for rows in found['generation']:
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.9))
        for panel, name, unit, text in zip(axes, ('seconds', 'bytes'), (1e3, 1e-6), ('ms a token', 'memory (MB)')):
            for arch in values(rows, 'arch'):
                line = where(rows, arch=arch)
                look = style(arch) | dict(capsize=None)
                look.pop('capsize')
                panel.plot([r['length'] for r in line], [unit * r[name] for r in line], **look)
            log_axis(panel.xaxis, values(rows, 'length')[::2])
            panel.set_yscale('log')
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(ScalarFormatter())
            panel.yaxis.set_minor_locator(NullLocator())
            panel.set(xlabel='tokens of context', ylabel=f'{text}, {rows[0]["size"]}')
        yield f'generation-{rows[0]["size"]}', finish(figure)


def hotpot(found):
    """HotpotQA: exact match of each model under the three conditions, on all questions; mean over seeds. Error bars:
    standard error, between seeds if there are several, else between questions."""
    groups = {}
    for name, rows in found['hotpot']:
        arch, _, size = re.sub(r'-s\d+$', '', name).partition('-')
        label = f'{NAMES[arch]}\n{size}' if arch in NAMES else textwrap.fill(name, 18)
        groups.setdefault((label, tuple(r.get('id') for r in rows)), []).append(rows)
    if not groups:
        return
    conditions = list(dict.fromkeys(r['condition'] for r in next(iter(groups.values()))[0]))
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(groups), 2.9))
    for i, (condition, colour, hatch) in enumerate(zip(conditions, ('#999999', '#E69F00', '#56B4E9'), ('', '///', '...'))):
        right = [[[100 * r['em'] for r in where(rows, condition=condition)] for rows in seeds] for seeds in groups.values()]
        samples = [[np.mean(r) for r in seeds] if len(seeds) > 1 else seeds[0] for seeds in right]
        means = [np.mean(s) for s in samples]
        bars = axes.bar(np.arange(len(means)) + 0.27 * (i - 1), means, 0.25, color=colour, hatch=hatch, capsize=2,
                        yerr=[np.std(s, ddof=1) / len(s) ** 0.5 if len(s) > 1 else 0 for s in samples],
                        edgecolor='white', label=condition)
        axes.bar_label(bars, [f'{mean:.0f}' for mean in means], fontsize=7, padding=2)
    for r in where(found['results'], task='hotpot')[:1]:
        axes.axhline(100 * r.get('chance', math.nan), linestyle=':', color='black', label='a guess (mean of the three)')
    axes.set_xticks(range(len(groups)), [label for label, _ in groups])
    axes.set(ylabel='exact match (%)', ylim=(0, 108))
    yield 'hotpot', finish(figure)


# --- what happens: a drawing, one sample, a film ---------------------------------------------------------------


def attention(found):
    """What the mechanism looks like: the attention layer of a hybrid on one sample, a row for each token it wrote; framed:
    the edge of the prompt that leads from that token to the next one."""
    for r in [r for r in alike(found, task='istree') if r.get('attention')]:
        prompt, wrote = r['attention']['prompt'], r['attention']['generated']
        figure, axes = plt.subplots(figsize=(8, 8 * (len(wrote) + 6) / (len(prompt) + 6)))
        image = axes.imshow(np.array(r['attention']['weights'])[:, :len(prompt)], cmap='Greys', vmin=0, vmax=1)
        edges = edges_of(' '.join(prompt))
        for i, move in enumerate(zip(wrote, wrote[1:])):
            for j in [j for j, edge in enumerate(edges) if {*edge} == {*move}]:
                axes.add_patch(Rectangle((3 * j + 0.5, i - 0.5), 3, 1, fill=False, color=COLOURS['mamba'], linewidth=1.2))
        axes.set_xticks(range(len(prompt)), prompt, fontsize=6, rotation=90)
        axes.set_yticks(range(len(wrote)), wrote, fontsize=6)
        axes.set(xlabel='the prompt', ylabel='what it wrote, from top to bottom')
        figure.colorbar(image, label='attention', shrink=0.6)
        share = r['attention']['share']
        axes.set_title(f'{NAMES.get(r["arch"], r["arch"])}, n={r["n_nodes"]}: where its attention layer looks (framed: the edge to '
                       'the next node' + (f';\non average {share:.0%} of the attention is there)' if share is not None else ')'),
                       fontsize=9)
        yield f'attention-{r["arch"]}-{r["size"]}-n{r["n_nodes"]}-s{r["seed"]}', figure


def edges_of(prompt):
    """The edges of a prompt, read from its text: [(u, v), ...], nodes as words."""
    return re.findall(r'(\d+) - (\d+)', prompt)


def tour(words):
    """Where a search has been: (index, node) of the nodes that were written outside queries and records."""
    steps, query = [], False
    for i, word in enumerate(words):
        query = word == '[STARTSEARCH]' or query and word != '[ENDSEARCH]'
        aside = query or '~' in words[max(0, i - 1):i + 2] or words[i - 1:i] == ['[ENDSEARCH]']
        if word.isdigit() and not aside:
            steps.append((i, word))
    return steps


def mistake(sample):
    """The first wrong word of a sample: its index, the wrong step (u, w) and the right one (u, x), None where the word
    is no step, and a sentence. All None if everything is right."""
    written, expected = sample['written'].split(), sample['expected'].split()
    if written == expected:
        return None, None, None, None
    i = next((i for i, (w, x) in enumerate(zip(written, expected)) if w != x), min(len(written), len(expected)))
    w, x = [*written, 'nothing'][i], [*expected, 'nothing'][i]
    here = ['nowhere', *[node for j, node in tour(expected) if j < i]][-1]
    there_is = [{here, v} in map(set, edges_of(sample['prompt'])) for v in (w, x)]
    text = f'At {here} it wrote {w} instead of {x}'
    if there_is[1]:
        text += f': the prompt has {here} - {x}' + ('' if there_is[0] else f' and no {here} - {w}')
    return i, *[(here, v) if i in dict(tour(words)) else None for v, words in ((w, written), (x, expected))], text


def cases(found):
    """For each size and n of IsTree, of the held-out samples that were kept, one that tells: on which the RNN errs
    without a retriever (if it does) and the others do not. Yields size, n, {(setup, arch): (result, sample)}."""
    results = [r for r in alike(found, task='istree') if r['kept'] and r['distribution'] == 'two_star']
    for size, n in sorted({(r['size'], r['n_nodes']) for r in results}):
        by_prompt = {}
        for r in reversed(where(results, size=size, n_nodes=n)):            # of several seeds, the first
            for sample in r['kept']:
                by_prompt.setdefault(sample['prompt'], {})[r['setup'], r['arch']] = r, sample
        tells = lambda key, sample: (sample['written'] == sample['expected']) != (key == ('cot', 'mamba'))
        yield size, n, max(by_prompt.values(), key=lambda told: sum(
            tells(key, sample) * (9 if key == ('cot', 'mamba') else 1) for key, (_, sample) in told.items()))


def tape(axes, items, marks, columns=72, lines=3):
    """Write items (texts) in lines of `columns` characters, the last lines if there are more. marks: {index of an item:
    (colour, background)}."""
    axes.clear()
    axes.set(xlim=(0, columns), ylim=(-lines, 0))
    axes.set_axis_off()
    x, y, places = 0, 0, []
    for item in items:
        x, y = (0, y + 1) if x + len(item) > columns else (x, y)
        places.append((x, y))
        x += len(item) + 1
    size = axes.get_window_extent().width / axes.figure.dpi * 72 / columns / 0.602        # of a monospaced letter
    for i, (item, (x, row)) in enumerate(zip(items, places)):
        if row > y - lines:
            colour, background = marks.get(i, ('black', 'none'))
            axes.text(x, min(lines - 1 - y, 0) - row, item, family='monospace', fontsize=size, va='top', color=colour,
                      bbox=dict(facecolor=background, edgecolor='none', pad=1), gid='word')


def draw_graph(axes, sample, steps, colour, wrong=None, right=None, lit=()):
    """The two stars, the edges of a walk (nodes) in colour, the wrong step in red and the edge that it should have
    taken in black; an edge that is lit in yellow."""
    edges = edges_of(sample['prompt'])
    degree = Counter(v for edge in edges for v in edge)
    nodes = sorted(map(str, range(len(edges) + 1)), key=lambda v: (-degree[v], int(v)))
    hubs, place = nodes[:2], {}
    odd = {v for edge in edges if not {*edge} & {*hubs} for v in edge}      # the two leaves that are joined
    for hub, x, first in zip(hubs, (-1.45, 1.45), (0, np.pi)):
        leaves = [v for v in nodes[2:] if any({v, hub} == {*edge} for edge in edges)]
        leaves.sort(key=lambda v: v not in odd)
        angles = first + 2 * np.pi * np.arange(len(leaves)) / max(1, len(leaves))
        place |= {hub: (x, 0)} | {v: (x + np.cos(a), np.sin(a)) for v, a in zip(leaves, angles)}
    axes.clear()
    axes.set(xlim=(-2.7, 2.7), ylim=(-1.25, 1.25), aspect='equal')
    axes.set_axis_off()
    line = lambda u, v, **look: axes.plot(*zip(place[u], place[v]), **look) if {u, v} <= {*place} else None
    for u, v in edges:
        line(u, v, color='#CCCCCC', linewidth=1, zorder=1)
    for u, v in zip(steps, steps[1:]):
        line(u, v, color=colour, linewidth=3, zorder=2, gid='step')
    if lit:
        line(*lit, color=YELLOW, linewidth=8, zorder=1.5, gid='lit')
    if right:
        line(*right, color='black', linewidth=3, linestyle=(0, (1, 0.8)), zorder=4, gid='right')
    if wrong and {*wrong} <= {*place}:
        axes.add_patch(FancyArrowPatch(*[place[v] for v in wrong], arrowstyle='-|>', mutation_scale=14, color=RED,
                                       linewidth=2, connectionstyle='arc3,rad=0.25', shrinkA=6, shrinkB=7, zorder=5, gid='wrong'))
    for v, (x, y) in place.items():
        now = v == [*steps, ''][-1]
        face = colour if now else 'white'
        axes.text(x, y, v, ha='center', va='center', fontsize=7, color='white' if now else 'black', zorder=6, gid='node',
                  bbox=dict(boxstyle='circle,pad=0.25', facecolor=face, edgecolor=colour if v in steps else '#BBBBBB'))


def sample(found):
    """One held-out graph, the right tour and the one that each architecture wrote, with its first wrong step."""
    for size, n, told in cases(found):
        keys = [key for key in [*[('cot', arch) for arch in NAMES], ('retrieval', 'mamba')] if key in told]
        rows = -(-(len(keys) + 1) // 2)
        figure, axes = plt.subplots(2 * rows, 2, figsize=(8, 2.9 * rows), height_ratios=[3, 1] * rows)
        for axis in axes.flat:
            axis.set_axis_off()
        for i, key in enumerate([None, *keys]):
            picture, text = axes[2 * (i // 2):2 * (i // 2) + 2, i % 2]
            told_sample = told[key or keys[0]][1]
            words = told_sample['written' if key else 'expected'].split()
            steps = tour(words)
            at, wrong, right, why = mistake(told_sample) if key else (None,) * 4
            good = [node for j, node in steps if at is None or j < at]
            colour = COLOURS[key[1]] if key else '#444444'
            draw_graph(picture, told_sample, good, colour, wrong, right)
            who = f'{NAMES[key[1]]}, {SETUPS[key[0]]}' if key else 'Is it a tree? The right search'
            picture.set_title(f'{who}: {words[-1] if words else "nothing"}', fontsize=9, color=colour, weight='bold')
            shown = [(j, node) for j, node in steps] + [(j, w) for j, w in enumerate(words) if w[-5:] in ('TRUE]', 'ALSE]')]
            tape(text, [w for _, w in shown], {k: ('white', RED) if j == at else (GREY, 'none')
                                              for k, (j, _) in enumerate(shown) if at is not None and j >= at}, 48, 3)
            if why:
                picture.text(0.5, -0.02, why, fontsize=7.5, color=RED, ha='center', transform=picture.transAxes)
        yield f'sample-{size}-n{n}', figure


def scenes(told):
    """The frames of the film, in order: who (setup, arch), edges of the prompt that have been read, words that have been
    written, whether the match of the last query is shown, what is said. Everything stands in the kept samples."""
    prompt = next(iter(told.values()))[1]['prompt']
    n_edges = len(edges_of(prompt))
    for read in range(n_edges + 1):
        yield dict(key=None, read=read, written=0, lit=False, red=False,
                   say=f'Is this graph a tree? The models read its {n_edges} edges, one after another.')
    for key in [key for key in (('cot', 'transformer'), ('cot', 'mamba'), ('retrieval', 'mamba')) if key in told]:
        kept = told[key][1]
        words, (wrong, _, _, why) = kept['written'].split(), mistake(kept)
        steps = [i for i, _ in tour(words)]
        frame = lambda written, say, lit=False, red=False: dict(key=key, read=n_edges, written=written, lit=lit, red=red, say=say)
        yield from [frame(0, f'{NAMES[key[1]]}, {SETUPS[key[0]]}.')] * 5
        for t in range(1, len(words) + 1):
            query, start = ' '.join(words[:t]).rpartition('[STARTSEARCH] ')[2].split(' [ENDSEARCH]')[0], len(steps)
            slow = t <= [*steps, len(words), len(words), len(words)][2]
            if wrong == t - 1:
                yield from [frame(t, why + '.', red=True)] * 6
            elif wrong is not None and t > wrong and t < len(words):
                continue
            elif key[0] == 'cot':
                yield frame(t, f'The search stands at {words[t - 1]}.' if t - 1 in steps else 'The search is over.')
            elif words[t - 1] == '[ENDSEARCH]' and slow:
                yield from [frame(t, f'It asks: {query}')] * 2
                if '-' in query.split():
                    yield from [frame(t, f'It asks: {query}   The retriever searches the text.', lit=True)] * 2
            elif t - 1 in kept['retrieved'] and slow:
                yield from [frame(t, f'It asks: {query}   The retriever pastes the answer, {words[t - 1]}.', lit=True)] * 2
            elif t in steps or slow and t - 1 in steps:
                yield frame(t, 'And so on: it asks, and goes where the answer leads.', lit=True)
        answer, truth = (words or ['nothing'])[-1], kept['expected'].split()[-1]
        yield from [frame(len(words), f'{NAMES[key[1]]}, {SETUPS[key[0]]}: it answers {answer}, the truth is {truth}; '
                          + ('every step was right.' if wrong is None else 'a step was wrong.'))] * 8


def draw_scene(figure, told, scene):
    """Draw a frame of the film."""
    key, t, colour = scene['key'], scene['written'], COLOURS[scene['key'][1]] if scene['key'] else '#444444'
    result, kept = told[key or next(iter(told))]
    words = kept['written'].split() if key else []
    edges = edges_of(kept['prompt'])[:scene['read']]
    at, wrong, right, _ = mistake(kept) if key else (None,) * 4
    erred = at is not None and t > at
    marks = {i: ('black', '#DDDDDD') for i in kept['retrieved'] if i < t} if key else {}
    match = None
    if scene['lit']:
        asked = [i for i in range(t) if words[i] == '[ENDSEARCH]']
        for end in asked[-4:]:                                  # the last edge that was asked for and found
            query = words[max(i for i in range(end) if words[i] == '[STARTSEARCH]') + 1:end]
            if '-' in query and words[end + 1:end + 2] != ['[FAILED]']:
                match = {query[0], words[end + 1]}
        if t - 1 in marks:
            marks[t - 1] = ('black', YELLOW)
            match = match if words[asked[-1] - 1] != '~' else None
    if erred:
        marks |= {i: (GREY, 'none') for i in range(at, t)} | {at: ('white', RED)}
    said, prompt, graph, carried, wrote = figure.axes
    said.clear()
    said.set_axis_off()
    said.text(0, 0.5, scene['say'], fontsize=12, va='center', weight='bold', color=RED if scene['red'] else colour)
    light = {i: ('black', YELLOW) for i, edge in enumerate(edges) if match == {*edge}} | (
        {i: ('white', 'black') for i, edge in enumerate(edges) if erred and right and {*edge} == {*right}})
    tape(prompt, [f'{u} - {v}' for u, v in edges], light, 112, 3)
    steps = [node for i, node in tour(words) if i < (min(t, at) if erred else t)]
    seen = dict(kept, prompt=' '.join(f'{u} - {v}' for u, v in edges))
    if edges:
        draw_graph(graph, seen, steps, colour, wrong if erred else None, right if erred else None, match or ())
    tape(wrote, words[:t], marks, 88, 4)

    carried.clear()
    carried.set(xlim=(0, 24), ylim=(-13.5, 1.5), aspect='equal')
    carried.set_axis_off()
    tokens = 1 + 3 * scene['read'] + (scene['read'] == len(told_edges := edges_of(kept['prompt']))) + t
    unit = max(told[k][0]['memory'].get('cache', 0) for k in told) / (3 * len(told_edges) + 2) or 256
    who = [key] if key else [k for k in (('cot', 'mamba'), ('cot', 'transformer')) if k in told]
    for x, k in zip((0, 11), who):
        parts = told[k][0]['memory']
        fixed = parts.get('state', 0) + parts.get('window', 0)
        side, cells = (fixed / unit) ** 0.5, round(tokens * parts.get('cache', 0) / unit / (3 * len(told_edges) + 2))
        carried.add_patch(Rectangle((x, -side), side, side, color=COLOURS[k[1]], gid='box'))
        wide = max(10, math.ceil((3 * len(told_edges) + 60) ** 0.5))
        for i in range(cells):
            carried.add_patch(Rectangle((x + i % wide, -1 - i // wide), 0.85, 0.85, color=COLOURS[k[1]], gid='cell'))
        text = f'{fixed:,.0f} numbers, always' if fixed else f'{cells * unit:,.0f} numbers, growing'
        carried.text(x, 0.5, f'{NAMES[k[1]]}\n{text}', fontsize=8.5, color=COLOURS[k[1]], va='bottom')


def walk(found):
    """A film of one sample: what is read, what is carried from token to token, drawn to scale, and where the search goes,
    of the largest n of which samples were kept."""
    told = [case for case in cases(found) if all(r.get('memory') for r, _ in case[2].values())]
    for size, n, told in told[-1:]:
        figure = plt.figure(figsize=(8, 5.2), dpi=100)
        for place in ((.02, .92, .96, .07), (.02, .77, .96, .12), (0, .2, .6, .57), (.6, .2, .39, .5), (.02, .01, .96, .16)):
            figure.add_axes(place).set_axis_off()
        for y, text in ((.89, 'the prompt'), (.18, 'what it writes')):
            figure.text(.02, y, text, fontsize=8, color=GREY)
        figure.text(.6, .74, 'what is carried from token to token, to scale', fontsize=8, color=GREY)
        yield 'walk', FuncAnimation(figure, lambda scene: draw_scene(figure, told, scene), list(scenes(told)), lambda: None)


def idea(found):
    """The paper in a drawing: what each kind of model carries from token to token. Needs no results."""
    figure, axes = plt.subplots(1, 3, figsize=(8, 3))
    titles = ('RNN: a box of fixed size', 'Transformer: a growing cache', 'RNN + retriever: ask for it again')
    below = ('The longer the text, the more\nof it is forgotten.', 'Nothing is forgotten; memory\ngrows with the text.',
             'The box stays; what it forgot is found\nin the text and pasted at its end.')
    words = ('2-1', '4-0', '4-3', '...', '4 ?')
    for panel, arch, title, caption in zip(axes, ('mamba', 'transformer', 'mamba'), titles, below):
        panel.set(xlim=(-0.6, 5.6), ylim=(-3.2, 2.2), aspect='equal')
        panel.set_axis_off()
        panel.set_title(title, fontsize=10, weight='bold', color=COLOURS[arch])
        panel.text(2.5, -2.3, caption, ha='center', va='top', fontsize=9)
        retrieves = panel is axes[2]
        for x, word in enumerate(words + ('3',) if retrieves else words):
            pasted = retrieves and x in (2, 5)
            panel.text(x, 1, word, ha='center', va='center', fontsize=10, family='monospace',
                       bbox=dict(boxstyle='square,pad=0.25', facecolor=YELLOW if pasted else 'white', edgecolor=GREY))
            panel.annotate('', (x, -0.05), (x, 0.6), arrowprops=dict(arrowstyle='->', color=GREY))
            if arch == 'mamba':
                panel.add_patch(Rectangle((x - 0.3, -0.75), 0.6, 0.6, color=COLOURS[arch]))
                if x:
                    panel.annotate('', (x - 0.3, -0.45), (x - 0.7, -0.45), arrowprops=dict(arrowstyle='->', color='black'))
            else:
                for i in range(x + 1):
                    panel.add_patch(Rectangle((x - 0.3, -0.4 - 0.35 * i), 0.6, 0.27, color=COLOURS[arch]))
        if retrieves:
            panel.add_patch(FancyArrowPatch((2, 1.4), (5, 1.4), connectionstyle='arc3,rad=-0.35', arrowstyle='-|>',
                                            mutation_scale=12, color='black'))
            panel.text(3.5, 2.1, 'retriever', ha='center', fontsize=9)
    figure.text(0.5, -0.02, 'Hybrid: an RNN with one Transformer layer on top carries both, a box and one growing cache.',
                ha='center', fontsize=9, color=COLOURS['hybrid'])
    figure.tight_layout(w_pad=2)
    yield 'idea', figure


FIGURES = [idea, accuracy, sizes, primitives, sweep, learning, memory, errors, generation, hotpot, attention, sample, walk]


# --- reading the results -----------------------------------------------------------------------------------

# What must be in a file: a type, [a list of], {str: a dict of}, or a dict with these names, where name? may be missing.
RESULT = {'task': str, 'arch': str, 'setup': str, 'size': str, 'n_nodes': int, 'seed': int, 'd_state': int, 'samples': int,
          'distribution': str, 'accuracy': float, 'accuracy_se': float, 'exact_trace': float, 'lr': float, 'warmup?': float,
          'samples_trained?': int, 'tuning?': bool, 'layers?': str, 'errors?': {str: float}, 'memory?': {str: float},
          'by_length?': [{'n': int, 'accuracy': float, 'accuracy_se': float, 'best_guess': float, 'chance': float}]}
LOG = {'samples': int, 'accuracy': float}
SAMPLE = {'prompt': str, 'expected': str, 'written': str, 'retrieved': [int]}
ATTENTION = {'prompt': [str], 'generated': [str], 'weights': [[float]]}
HOTPOT = {'condition': str, 'em': float}
GENERATION = {'arch': str, 'size': str, 'length': int, 'seconds': float, 'bytes': int}


def fits(value, shape):
    """Whether a value read from JSON has a shape, as above. A float may be any finite number."""
    if shape is float:
        return type(value) is int and abs(value) < 1e15 or type(value) is float and math.isfinite(value)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if not isinstance(shape, dict):
        return type(value) is shape and (shape is not int or 0 <= value < 1e15)
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(fits(v, shape[str]) for v in value.values())
    return all(fits(value[name.rstrip('?')], kind) if name.rstrip('?') in value else name[-1] == '?'
               for name, kind in shape.items())


def read(path, shape):
    """The values in a JSON or JSON-lines file of ours; none, and a line that says so, if it is damaged or not ours."""
    try:
        text = path.read_text(encoding='utf-8')
        rows = [json.loads(part) for part in (text.splitlines() if path.suffix == '.jsonl' else [text])]
        rows = rows[0] if path.suffix == '.json' and isinstance(rows[0], list) else rows
        if rows and fits(rows, [shape]):
            return rows
        why = 'it lacks something, or is not ours'
    except (ValueError, OSError, RecursionError) as error:
        why = str(error).splitlines()[0][:80]
    print(f'{path} is left out ({why}): delete it or write it again')
    return []


def load(out):
    """What there is to draw below a folder: results of train.py (dicts, with their log, kept samples and attention) and its
    unfinished cells, lists of rows of models.py, (model name, rows) of eval_hotpot.py."""
    beside = lambda path, name, shape: read(path.with_name(name), shape) if path.with_name(name).exists() else []
    cell = {name: RESULT[name] for name in CELL}
    unfinished = [c for path in sorted(out.glob('**/config.json')) if not path.with_name('result.json').exists()
                  for c in read(path, cell)]
    results, hotpot = {}, []
    for path in sorted(out.glob('**/result.json')):
        for result in read(path, RESULT):
            known = result['task'] in TASKS and result['setup'] in SETUPS and result['n_nodes'] > 0
            key = json.dumps([result.get(name) for name in (*CELL, *CONSTANTS, 'lr', 'tuning', 'layers')])
            if not known or key in results:
                same = f'{results[key]["path"]} is of the same cell' if known else 'no task or setup of ours'
                print(f'{path} is left out: {same}')
                continue
            shown = [a for a in beside(path, 'attention.json', ATTENTION) if len(a['weights']) == len(a['generated']) > 0
                     and all(len(row) == len(a['prompt'] + a['generated']) for row in a['weights'])]
            kept = [s for s in beside(path, 'samples.json', SAMPLE) if s['expected'].strip()]
            results[key] = result | dict(path=path, log=beside(path, 'log.jsonl', LOG), kept=kept,
                                         attention=dict(share=None) | shown[0] if shown else None)
    for path in sorted(out.glob('**/hotpot/*.jsonl')):
        rows = read(path, HOTPOT)
        if len({*Counter(r['condition'] for r in rows).values()}) == 1 and len({r['condition'] for r in rows}) == 3:
            hotpot.append((path.stem.rpartition('-')[0], rows))
        elif rows:
            print(f'{path} is left out: not finished')
    order = lambda name: next((i for i, arch in enumerate(NAMES) if name.startswith(arch)), len(NAMES))
    generation = [read(path, GENERATION) for path in sorted(out.glob('**/generation.json'))]
    return dict(results=sorted(results.values(), key=lambda r: (order(r['arch']), r['n_nodes'], r['seed'])),
                unfinished=unfinished, hotpot=sorted(hotpot, key=lambda found: order(found[0])),
                generation=[rows for rows in generation if rows])


def main(argv):
    c = parse(argv, Constants, 'plot.py', {'default': {}})
    figures, found = Path(c.figures), load(Path(c.out))
    if figures.exists() and not figures.is_dir():
        raise Refused(f'--figures={c.figures}: this is a file, name a folder')
    if not any(found[kind] for kind in ('results', 'hotpot', 'generation')):
        raise Refused(f'{c.out}: no results to draw, run train.py first')
    figures.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        for name, figure in draw(found):
            if isinstance(figure, FuncAnimation):
                figure.save(figures / f'{name}.gif', PillowWriter(fps=4), dpi=100)
            else:
                figure.savefig(figures / f'{name}.pdf')
                figure.savefig(figures / f'{name}.png')
            print(figures / f'{name}.{"gif" if isinstance(figure, FuncAnimation) else "png"}')
            plt.close('all')
    if n := len(found['unfinished']):
        print(f'{n} cells have been begun and not finished: run their train.py command again')


if __name__ == '__main__':
    sys.exit(cli(main, 'plot.py', sys.argv[1:]))
