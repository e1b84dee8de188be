"""The figures, drawn from what train.py, models.py and eval_hotpot.py wrote. Knows results, no models.

  python plot.py                              out/**/result.json ... -> figures/*.png, *.pdf and walk.gif
  python plot.py --out=results --figures=figures

Each function takes all that was found (a dict of lists, see load) and yields a name and a figure for each picture
that there are results for. Colours are Okabe and Ito's, safe for the colour-blind. Points stand exactly where they
belong: lines differ in width and markers in size, so that three lines at 100% are seen on top of one another.
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


LOOKS = {'transformer': dict(label='Transformer', color='#0072B2', marker='s', markersize=8, linewidth=3.5),
         'hybrid': dict(label='hybrid', color='#009E73', marker='^', markersize=6, linewidth=2),
         'mamba': dict(label='RNN (Mamba)', color='#D55E00', marker='o', markersize=3.5, linewidth=0.9)}
HATCHES = {'hybrid': '...', 'mamba': '///'}
RED, GREY, YELLOW = '#C00000', '#999999', '#F0E442'
TASKS = {'istree': 'IsTree', 'index': 'index', 'recall': 'associative recall', 'cgram': 'c-gram retrieval',
         'counting': 'counting', 'hotpot': 'two-hop questions'}
SETUPS = {'direct': 'answer at once', 'cot': 'chain of thought', 'retrieval': 'with a retriever'}
CELL = ('task', 'arch', 'setup', 'size', 'n_nodes', 'seed')
CONSTANTS = ('distribution', 'd_state', 'frozen_embedding', 'samples', 'batch_size', 'warmup', 'grad_clip', 'dtype')

plt.rcParams |= {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
                 'savefig.dpi': 200, 'savefig.bbox': 'tight', 'pdf.fonttype': 42, 'hatch.linewidth': 0.6}


# --- what the figures share ------------------------------------------------------------------------------

def where(results, **wanted):
    """The results with these values."""
    return [r for r in results if all(r.get(name) == value for name, value in wanted.items())]


def values(results, name):
    """Which values occur, in the order of the dicts above, else sorted."""
    known = [*TASKS, *SETUPS, *LOOKS]
    return sorted({r[name] for r in results}, key=lambda v: (known.index(v), 0) if v in known else (len(known), v))


def alike(found, but=(), **wanted):
    """The results with these values that may be compared: neither a sweep's nor of layers of one's own, and of those that
    differ in more than a figure shows the largest group with the same constants (except `but`), for each setup and size."""
    results = [r for r in where(found['results'], **wanted) if not r.get('tuning') and not r.get('layers')]
    for within, names in ((('task', 'setup', 'size'), {*CONSTANTS} - {*but}), (('task', 'setup', 'size', 'arch'), {'lr'})):
        cell, constants = [lambda r, names=sorted(names): tuple(r.get(name) for name in names) for names in (within, names)]
        counts = Counter((cell(r), constants(r)) for r in results).most_common()
        best = {group: these for (group, these), _ in reversed(counts)}
        results = [r for r in results if best[cell(r)] == constants(r)]
    return results


def look(arch):
    return LOOKS.get(arch, dict(label=arch, color='black', marker='D', markersize=5, linewidth=1.5))


def curve(axes, results, x, **style):
    """Accuracy in percent against the value x of the results, mean over seeds; error bars: standard error, between
    seeds if there are several, else binomial."""
    points = []
    for value in values(results, x):
        group = where(results, **{x: value})
        accuracy = [100 * r['accuracy'] for r in group]
        error = np.std(accuracy, ddof=1) / len(group) ** 0.5 if len(group) > 1 else 100 * group[0]['accuracy_se']
        points.append((value, np.mean(accuracy), error))
    axes.errorbar(*zip(*points), capsize=2, **style)


def panels(titles, width=2.7, columns=4, chance=True):
    """A figure with a panel of percents for each title, at most `columns` side by side, and the panels."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, 2.8 * rows), sharey=True, squeeze=False)
    for panel in axes.flat[len(titles):]:
        panel.set_axis_off()
    for panel, title in zip(axes.flat, titles):
        panel.set_title(title, fontsize=9)
        panel.set_ylim(0, 105)
        if chance:
            panel.axhline(50, linestyle=':', color=GREY, label='chance')
    for panel in axes[:, 0]:
        panel.set_ylabel('accuracy (%)')
    return figure, axes.flat[:len(titles)]


def finish(figure, unfinished=(), note=''):
    """The legend of all panels, each label once, at the right; a note and the unfinished cells below."""
    labels = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc='center left', bbox_to_anchor=(1, 0.5))
    names = ['{task} {arch} {setup} {size} n={n_nodes} seed {seed}'.format(**c) for c in unfinished]
    if names:
        note += f'not finished: {", ".join(names[:6])}' + (f' and {len(names) - 6} more' if len(names) > 6 else '')
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
    """The paper's main figure: accuracy on IsTree against n, a panel for each setup, a line for each architecture (and
    d_state, where about as many were run as of the commonest), a picture for each size."""
    all_results = alike(found, ['d_state'], task='istree')
    for size in values(all_results, 'size'):
        results = where(all_results, size=size)
        setups = values(results, 'setup')
        figure, axes = panels([SETUPS[setup] for setup in setups])
        for panel, setup in zip(axes, setups):
            for arch in values(where(results, setup=setup), 'arch'):
                line = where(results, setup=setup, arch=arch)
                states = Counter(r['d_state'] for r in line)
                for i, d_state in enumerate(sorted(d for d in states if 2 * states[d] > max(states.values()))):
                    style = dict(label=look(arch)['label'] + f', d_state {d_state}', linestyle='--') if i else {}
                    curve(panel, where(line, d_state=d_state), 'n_nodes', **look(arch) | style)
            log_axis(panel.xaxis, values(where(results, setup=setup), 'n_nodes'))
            panel.set_xlabel('n, nodes of the graph')
        yield f'accuracy-{size}', finish(figure, where(found['unfinished'], task='istree', size=size))


def sizes(found):
    """The paper's grid: accuracy on IsTree against n, a panel for each setup and architecture, a line for each size."""
    results = alike(found, task='istree')
    if len(names := values(results, 'size')) < 2:
        return
    pairs = [(s, a) for s in values(results, 'setup') for a in values(where(results, setup=s), 'arch')]
    figure, axes = panels([f'{look(arch)["label"]}, {SETUPS[setup]}' for setup, arch in pairs], columns=3)
    for panel, (setup, arch) in zip(axes, pairs):
        for i, size in enumerate(names):
            if line := where(results, setup=setup, arch=arch, size=size):
                curve(panel, line, 'n_nodes', label=size, color=plt.get_cmap('viridis')(0.9 * i / len(names)),
                      marker='sD^o'[i % 4], markersize=9 / (1 + i / 2), linewidth=3.5 / (1 + i / 2))
        log_axis(panel.xaxis, values(where(results, setup=setup, arch=arch), 'n_nodes'))
        panel.set_xlabel('n, nodes of the graph')
    yield 'sizes', finish(figure)


def primitives(found):
    """The bottleneck in its purest form (paper, section 4): accuracy of the retrieval primitives against the length of the
    context, a panel for each task and setup. One run has learned all lengths of a line."""
    all_results = [r | row | dict(n_nodes=row['n']) for r in alike(found) for row in r.get('by_length') or ()]
    for size in values(all_results, 'size'):
        results = where(all_results, size=size)
        tasks = values(results, 'task')
        pairs = [(setup, task) for setup in values(results, 'setup') for task in tasks]
        figure, axes = panels([f'{TASKS[task]}, {SETUPS[setup]}' for setup, task in pairs], 2.7, len(tasks), False)
        for panel, (setup, task) in zip(axes, pairs):
            rows = where(results, task=task, setup=setup)
            for arch in values(rows, 'arch'):
                curve(panel, where(rows, arch=arch), 'n_nodes', **look(arch))
            ns = values(rows, 'n_nodes')
            for name, label, line in (('chance', 'chance', ':'), ('best_guess', 'best guess without look-up', '--')):
                panel.plot(ns, [100 * where(rows, n_nodes=n)[0][name] for n in ns], line, color=GREY, label=label)
            log_axis(panel.xaxis, ns)
            panel.set_xlabel('n, pairs in the context' if task == 'recall' else 'n, tokens in the context')
        yield f'primitives-{size}', finish(figure, [c for c in found['unfinished'] if c['task'] in tasks])


def chosen(results):
    """The best result of a sweep, of those with most samples: in accuracy, then in exact traces, then solved soonest."""
    return max(results, key=lambda r: (r['samples'], r['accuracy'], r['exact_trace'], -r.get('samples_trained', 0)))


def sweep(found):
    """How the constants were found, and who is picky: accuracy against the learning rate, a panel for each task and setup,
    a line for each architecture and warm-up, each point after its longest run; crossed out where that was a shorter one."""
    for size in values(where(found['results'], tuning=True), 'size'):
        results = where(found['results'], tuning=True, size=size)
        keys = [(task, setup, n) for task in values(results, 'task') for setup in values(where(results, task=task), 'setup')
                for n in values(where(results, task=task, setup=setup), 'n_nodes')]
        figure, axes = panels([f'{TASKS[task]}, {SETUPS[setup]}, n={n}' for task, setup, n in keys], chance=False)
        for panel, (task, setup, n) in zip(axes, keys):
            rows = where(results, task=task, setup=setup, n_nodes=n)
            for arch in values(rows, 'arch'):
                tried = [r for r in where(rows, arch=arch) if r['samples'] == max(
                    o['samples'] for o in where(rows, arch=arch, lr=r['lr'], warmup=r['warmup']))]
                for i, warmup in enumerate(values(tried, 'warmup')):
                    style = dict(label=f'{look(arch)["label"]}, warm-up {warmup:.0%}', linewidth=1.3, markersize=4,
                                 linestyle=['-', (0, (2, 1)), ':'][min(i, 2)])
                    curve(panel, where(tried, warmup=warmup), 'lr', **look(arch) | style)
                best = chosen(tried)
                for r in [r for r in tried if r['samples'] < best['samples']]:
                    panel.plot(r['lr'], 100 * r['accuracy'], 'kx', markersize=6, zorder=9, label='given up after a shorter run')
                panel.plot(best['lr'], 100 * best['accuracy'], 'o', color=look(arch)['color'], fillstyle='none', markersize=13,
                           markeredgewidth=1.8, clip_on=False, label='chosen')
            panel.axhline(100 * rows[0].get('chance', math.nan), linestyle=':', color=GREY, label='chance')
            log_axis(panel.xaxis, values(rows, 'lr'))
            panel.tick_params(axis='x', labelrotation=60)
            panel.set_xlabel('learning rate')
        yield f'sweep-{size}', finish(figure)


def learning(found):
    """Who learns how fast: accuracy on IsTree against training samples, a panel for each setup, a line for each seed. The
    last point is the result, on all held-out samples, the others are on 200 of them; a model that always gives the same
    answer scores somewhere in the grey band there."""
    all_results = [r for r in alike(found, task='istree') if r['log']]
    for size, n in sorted({(r['size'], r['n_nodes']) for r in all_results}):
        results = where(all_results, size=size, n_nodes=n)
        setups = values(results, 'setup')
        figure, axes = panels([f'{SETUPS[setup]}, n={n}' for setup in setups])
        for panel, setup in zip(axes, setups):
            panel.axhspan(43, 57, color='#E6E6E6', linewidth=0, label='a guess on 200 samples')         # 95% of them
            for r in where(results, setup=setup):
                end = r.get('samples_trained', r['samples'])
                points = [(line['samples'], line['accuracy']) for line in r['log'] if line['samples'] < 0.99 * end]
                x, y = zip(*points, (end, r['accuracy']))
                panel.plot(np.array(x) / 1000, 100 * np.array(y), **look(r['arch']) | dict(linewidth=1, markersize=3))
            panel.set_xlabel('thousand samples')
        yield f'learning-{size}-n{n}', finish(figure)


# --- what it costs, what goes wrong ------------------------------------------------------------------------

def memory(found):
    """The claim itself: accuracy on IsTree with chain of thought, and what a model carries from token to token at the end
    of the prompt, in floats."""
    parts = dict(state=('scan state', '#D55E00', ''), window=('convolution window', '#E69F00', '///'),
                 cache=('KV cache', '#0072B2', '...'))
    all_results = [r for r in alike(found, ['d_state'], task='istree', setup='cot') if r.get('memory')]
    for size, n in sorted({(r['size'], r['n_nodes']) for r in all_results}):
        results = where(all_results, size=size, n_nodes=n)
        rows = {f'{look(a)["label"]}, d_state {d}' if a != 'transformer' else 'Transformer': where(results, arch=a, d_state=d)
                for a in values(results, 'arch') for d in values(where(results, arch=a), 'd_state')}
        if len(rows) < 4:
            continue
        figure, (right, bars) = plt.subplots(1, 2, figsize=(7.5, 0.9 + 0.3 * len(rows)), sharey=True)
        for y, group in enumerate(rows.values()):
            percent, left = np.mean([100 * r['accuracy'] for r in group]), 0
            right.plot(percent, y, 'o', color=look(group[0]['arch'])['color'])
            right.text(percent - 3, y, f'{percent:.0f}', ha='right', va='center', fontsize=8)
            for part, (name, colour, hatch) in parts.items():
                floats = group[0]['memory'].get(part, 0)
                bars.barh(y, floats, 0.7, left, color=colour, hatch=hatch, edgecolor='white', label=name)
                left += floats
            bars.text(left, y, f' {left:,.0f}', va='center', fontsize=8)
        right.axvline(50, linestyle=':', color=GREY, label='chance')
        right.set_yticks(range(len(rows)), rows)
        right.set(xlim=(0, 105), ylim=(len(rows) - 0.5, -0.5), xlabel='accuracy (%)')
        bars.set_xlabel('floats carried at the end of the prompt')
        figure.suptitle(f'IsTree, n={n}, chain of thought', fontsize=9)
        yield f'memory-{size}-n{n}', finish(figure)


def errors(found):
    """Where it goes wrong: share of wrong tokens of each kind, all tokens before them given: in-context retrieval (the
    next neighbour) against bookkeeping. A setup in which no model errs in 1% of any kind has a note instead of a panel."""
    all_results = [r for r in alike(found, task='istree') if r.get('errors') and r['setup'] != 'direct']
    for size, n in sorted({(r['size'], r['n_nodes']) for r in all_results}):
        results = where(all_results, size=size, n_nodes=n)
        worst = {s: max(max(r['errors'].values()) for r in where(results, setup=s)) for s in values(results, 'setup')}
        note = ''.join(f'{SETUPS[s]}: at most {math.ceil(1000 * worst[s]) / 10}% of any kind, for all models. ' for s in worst
                       if worst[s] < 0.01)
        if not (setups := [s for s in worst if worst[s] >= 0.01]):
            continue
        figure, axes = panels([f'{SETUPS[setup]}, n={n}' for setup in setups], 3.7, chance=False)
        for panel, setup in zip(axes, setups):
            kinds = [kind for kind in data.KINDS if all(kind in r['errors'] for r in where(results, setup=setup))]
            for i, arch in enumerate(values(where(results, setup=setup), 'arch')):
                rates = [np.mean([100 * r['errors'][kind] for r in where(results, setup=setup, arch=arch)]) for kind in kinds]
                bars = panel.bar(np.arange(len(kinds)) + 0.27 * (i - 1), rates, 0.25, label=look(arch)['label'],
                                 color=look(arch)['color'], hatch=HATCHES.get(arch), edgecolor='white')
                panel.bar_label(bars, ['<0.1' if 0 < rate < 0.1 else f'{rate:.1f}' for rate in rates], fontsize=6)
            panel.set_xticks(range(len(kinds)), [textwrap.fill(kind, 10) for kind in kinds], fontsize=8)
            panel.autoscale(axis='y')
        axes[0].set_ylabel('wrong tokens (%)')
        yield f'errors-{size}-n{n}', finish(figure, note=note)


def generation(found):
    """What one more token costs against the tokens before it, in time and in memory, measured by models.py."""
    for rows in found['generation']:
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.9))
        for panel, name, unit, text in zip(axes, ('seconds', 'bytes'), (1e3, 1e-6), ('ms a token', 'memory (MB)')):
            for arch in values(rows, 'arch'):
                line = where(rows, arch=arch)
                panel.plot([r['length'] for r in line], [unit * r[name] for r in line], **look(arch))
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
    models = {}
    for name, rows in found['hotpot']:
        arch, _, size = re.sub(r'-s\d+$', '', name).partition('-')
        label = f'{look(arch)["label"]}\n{size}' if arch in LOOKS else textwrap.fill(name, 18)
        models.setdefault((label, *(r.get('id') for r in rows)), []).append(rows)        # seeds: of the same questions
    if not models:
        return
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(models), 2.9))
    conditions = dict.fromkeys(r['condition'] for _, rows in found['hotpot'] for r in rows)
    for i, (condition, colour, hatch) in enumerate(zip(conditions, (GREY, '#E69F00', '#56B4E9'), ('', '///', '...'))):
        runs = [[[100 * r['em'] for r in where(rows, condition=condition)] for rows in seeds] for seeds in models.values()]
        scores = [np.mean(seeds, 1) if len(seeds) > 1 else seeds[0] for seeds in runs]
        bars = axes.bar(np.arange(len(runs)) + 0.27 * (i - 1), [np.mean(s) for s in scores], 0.25, color=colour, hatch=hatch,
                        yerr=[np.std(s, ddof=1) / len(s) ** 0.5 if len(s) > 1 else 0 for s in scores], capsize=2,
                        edgecolor='white', label=condition)
        axes.bar_label(bars, [f'{np.mean(s):.0f}' for s in scores], fontsize=7, padding=2)
    for r in where(found['results'], task='hotpot')[:1]:
        axes.axhline(100 * r.get('chance', math.nan), linestyle=':', color='black', label='a guess (mean of the three)')
    axes.set_xticks(range(len(models)), [label for label, *_ in models])
    axes.set(ylabel='exact match (%)', ylim=(0, 108))
    yield 'hotpot', finish(figure)


def attention(found):
    """What the mechanism looks like: where the top attention layer looks, a row for each token that was written, a column
    for each of the prompt; framed is the edge that leads from this token to the next."""
    for r in [r for r in alike(found, task='istree') if r['attention']]:
        prompt, wrote, share = [r['attention'][name] for name in ('prompt', 'generated', 'share')]
        figure, axes = plt.subplots(figsize=(8, 8 * (len(wrote) + 6) / (len(prompt) + 6)))
        image = axes.imshow(np.array(r['attention']['weights'])[:, :len(prompt)], cmap='Blues', vmin=0, vmax=1)
        for i, move in enumerate(zip(wrote, wrote[1:])):
            for j, edge in enumerate(edges_of(' '.join(prompt))):
                if {*edge} == {*move}:
                    axes.add_patch(Rectangle((3 * j + 0.5, i - 0.5), 3, 1, fill=False, color=RED, linewidth=1))
        axes.set_xticks(range(len(prompt)), prompt, fontsize=6, rotation=90)
        axes.set_yticks(range(len(wrote)), wrote, fontsize=6)
        axes.set(xlabel='the prompt', ylabel='what was written, from top to bottom')
        axes.set_title(f'Where the attention layer of the {look(r["arch"])["label"]} looks; framed: the edge to the next node'
                       + (f'\n(new neighbours: {share:.0%} of the attention is there, on average)' if share else ''), fontsize=9)
        figure.colorbar(image, label='attention', shrink=0.6)
        yield f'attention-{r["arch"]}-{r["size"]}-n{r["n_nodes"]}-s{r["seed"]}', figure


# --- what happens: one sample, a film of it, the idea ----------------------------------------------------------

def edges_of(prompt):
    """The edges of a prompt, read from its text: [(u, v), ...], nodes as words."""
    return re.findall(r'(\d+) - (\d+)', prompt)


def tour(words):
    """Where a search has been: {index: node} of the nodes that were written outside queries and records."""
    steps, query = {}, False
    for i, word in enumerate(words):
        query = word == '[STARTSEARCH]' or query and word != '[ENDSEARCH]'
        aside = query or '~' in words[max(0, i - 1):i + 2] or words[max(0, i - 1)] == '[ENDSEARCH]'
        if word.isdigit() and not aside:
            steps[i] = word
    return steps


def mistake(sample):
    """The first wrong word of a sample: its index, the wrong step (u, w), the right one (u, x), each None if it is no
    step, and a sentence. All None if nothing is wrong."""
    written, expected = sample['written'].split(), sample['expected'].split()
    if written == expected:
        return None, None, None, None
    i = next((i for i, pair in enumerate(zip(written, expected)) if len({*pair}) > 1), min(len(written), len(expected)))
    w, x = [*written, 'nothing'][i], [*expected, 'nothing'][i]
    here = ['nowhere', *[node for j, node in tour(expected).items() if j < i]][-1]
    edges = [{*edge} for edge in edges_of(sample['prompt'])]
    why = f'at {here} it wrote {w} instead of {x}'
    if {here, x} in edges:
        why += f': the prompt has {here} - {x}' + ('' if {here, w} in edges else f', but no {here} - {w}')
    return i, (here, w) if i in tour(written) else None, (here, x) if i in tour(expected) else None, why


def cases(found):
    """For each size and n of IsTree, of the held-out samples that were kept, the one that tells most: on which the RNN errs
    without a retriever, and the others do not. Yields size, n and {(setup, arch): (result, sample)}."""
    results = [r for r in alike(found, task='istree', distribution='two_star') if r['kept'] and r['arch'] in LOOKS]
    for size, n in sorted({(r['size'], r['n_nodes']) for r in results}):
        told = {}
        for r in reversed(where(results, size=size, n_nodes=n)):                        # of several seeds, the first
            for kept in r['kept'] if r['setup'] != 'direct' else ():
                told.setdefault(kept['prompt'], {})[r['setup'], r['arch']] = r, kept
        fails = lambda case, key: key in case and case[key][1]['written'] != case[key][1]['expected']
        score = lambda case: 9 * fails(case, ('cot', 'mamba')) + len(case) - sum(fails(case, key) for key in case)
        if told:
            yield size, n, max(told.values(), key=score)


def tape(axes, items, marks, columns, lines):
    """Write texts in lines of `columns` characters, the last `lines` if there are more. marks: {index of a text: (colour,
    background)}."""
    axes.clear()
    axes.set(xlim=(0, columns), ylim=(-lines, 0))
    axes.set_axis_off()
    size = axes.get_window_extent().width / axes.figure.dpi * 72 / columns / 0.602        # of a monospaced letter
    places, x, y = [], 0, 0
    for item in items:
        x, y = (0, y + 1) if x + len(item) > columns else (x, y)
        places.append((x, y))
        x += len(item) + 1
    for i, (item, (x, line)) in enumerate(zip(items, places)):
        if line > y - lines:
            colour, background = marks.get(i, ('black', 'none'))
            axes.text(x, max(y + 1 - lines, 0) - line, item, family='monospace', fontsize=size, va='top', color=colour,
                      bbox=dict(facecolor=background, edgecolor='none', pad=1), gid='word')


def stars(axes, prompt, read, steps, colour, wrong=None, right=None, match=None):
    """Draw the two stars of a prompt, the first `read` edges of it: a walk (nodes) in colour, its wrong last step in red, the
    edge that it should have taken dotted, one that was found by the retriever in yellow."""
    edges = edges_of(prompt)
    degree = Counter(v for edge in edges for v in edge)
    nodes = sorted(map(str, range(len(edges) + 1)), key=lambda v: (-degree[v], int(v)))
    joined = {v for edge in edges if not {*edge} & {*nodes[:2]} for v in edge}          # the two leaves with an edge
    place = {}
    for hub, x, first in zip(nodes, (-1.45, 1.45), (0, np.pi)):
        leaves = sorted((v for v in nodes[2:] if {(v, hub), (hub, v)} & {*edges}), key=lambda v: v not in joined)
        for v, angle in zip(leaves, first + 2 * np.pi * np.arange(len(leaves)) / max(1, len(leaves))):
            place[v] = x + np.cos(angle), np.sin(angle)
        place[hub] = x, 0
    axes.clear()
    axes.set(xlim=(-2.7, 2.7), ylim=(-1.25, 1.25), aspect='equal')
    axes.set_axis_off()
    for pairs, style in ((edges[:read], dict(color='#CCCCCC', linewidth=1)), ([match], dict(color=YELLOW, linewidth=9)),
                         (zip(steps, steps[1:]), dict(color=colour, linewidth=3)),
                         ([right], dict(color='black', linewidth=3, linestyle=(0, (1, 0.8))))):
        for pair in pairs:
            if pair and {*pair} <= {*place}:
                axes.plot(*zip(*[place[v] for v in pair]), zorder=1, **style)
    if wrong and {*wrong} <= {*place}:
        axes.add_patch(FancyArrowPatch(*[place[v] for v in wrong], arrowstyle='-|>', mutation_scale=14, color=RED, linewidth=2,
                                       connectionstyle='arc3,rad=0.25', shrinkA=7, shrinkB=8, zorder=3))
    for v, (x, y) in place.items():
        here = [v] == steps[-1:]
        axes.text(x, y, v, ha='center', va='center', fontsize=7, color='white' if here else 'black', zorder=4, bbox=dict(
            boxstyle='circle,pad=0.3', facecolor=colour if here else 'white', edgecolor=colour if v in steps else '#BBBBBB'))


def sample(found):
    """One held-out graph, the right search and the one that each architecture wrote, with its first wrong step."""
    for size, n, told in cases(found):
        shown = [None, *[key for key in (*[('cot', arch) for arch in LOOKS], ('retrieval', 'mamba')) if key in told]]
        rows = (len(shown) + 1) // 2
        figure, axes = plt.subplots(2 * rows, 2, figsize=(8, 2.7 * rows), height_ratios=[4, 1] * rows)
        for panel in axes.flat:
            panel.set_axis_off()
        for i, key in enumerate(shown):
            kept = told.get(key, next(iter(told.values())))[1]
            words = kept['written' if key else 'expected'].split()
            at, wrong, right, why = mistake(kept) if key else (None,) * 4
            steps = tour(words)
            colour = look(key[1])['color'] if key else '#444444'
            graph, text = axes[i // 2 * 2:, i % 2][:2]
            stars(graph, kept['prompt'], n - 1, [v for j, v in steps.items() if at is None or j < at], colour, wrong, right)
            who = f'{look(key[1])["label"]}, {SETUPS[key[0]]}' if key else 'Is it a tree? The right search'
            graph.set_title(f'{who}: {[*words, "nothing"][-1]}', fontsize=9, color=colour, weight='bold')
            graph.text(0.5, 0, why or '', fontsize=7.5, color=RED, ha='center', va='top', transform=graph.transAxes)
            places = [j for j in range(len(words)) if j in steps or j == at or j == len(words) - 1]
            marks = {k: ('white', RED) if j == at else (GREY, 'none') for k, j in enumerate(places) if at is not None and j >= at}
            tape(text, [words[j] for j in places], marks, 56, 2)
        yield f'sample-{size}-n{n}', figure


def scenes(told):
    """The frames of the film, in order: who (setup, arch), how many edges have been read and words written, which edge the
    retriever has found, and what is said. All of it stands in the samples that were kept."""
    edges = edges_of(next(iter(told.values()))[1]['prompt'])
    for read in range(len(edges) + 1):
        yield None, read, 0, None, f'Is this graph a tree? The models read its {len(edges)} edges.'
    for key in [key for key in (('cot', 'transformer'), ('cot', 'mamba'), ('retrieval', 'mamba')) if key in told]:
        kept, who = told[key][1], f'{look(key[1])["label"]}, {SETUPS[key[0]]}: '
        words, steps, (at, _, _, why) = kept['written'].split(), tour(kept['written'].split()), mistake(kept)
        slow = [*steps, len(words), len(words), len(words)][2]              # the first two steps of a retriever's
        scene = lambda t, say, match=None, frames=1: [(key, len(edges), t, match, who + say)] * frames
        yield from scene(0, 'it writes its search', frames=6)
        query, match = [], None
        for t, word in enumerate(words if at is None else words[:at], 1):
            if word == '[STARTSEARCH]':
                query, match = [], None
            elif word == '[ENDSEARCH]':
                query = words[t - 1 - words[t - 2::-1].index('[STARTSEARCH]'):t - 1] if '[STARTSEARCH]' in words[:t] else []
                found = {*query[:1], *words[t:t + 1]} if '-' in query else None
                match = next((edge for edge in edges if {*edge} == found), None)
                if t < slow:
                    yield from scene(t, f'it asks: {" ".join(query)}', frames=2)
                    if match:
                        yield from scene(t, f'it asks: {" ".join(query)}. The text has it', match, 2)
            elif t - 1 in kept['retrieved'] and t < slow:
                yield from scene(t, f'it asks: {" ".join(query)}. The answer, {word}, is pasted', match, 2)
            elif t - 1 in steps and (t > slow or key[0] == 'cot'):
                yield from scene(t, 'and so on' if key[0] == 'retrieval' else f'the search is at {word}')
        if at is not None:
            yield from scene(at + 1, why, frames=8)
        right = 'right' if words[-1:] == kept['expected'].split()[-1:] else 'wrong'
        yield from scene(len(words), f'its answer is {[*words, "nothing"][-1]}, which is {right}', frames=8)


def draw_scene(figure, told, scene):
    """Draw a frame of the film."""
    key, read, t, match, say = scene
    kept = told.get(key, next(iter(told.values())))[1]
    edges, words = edges_of(kept['prompt']), kept['written'].split()[:t] if key else []
    at, wrong, right, _ = mistake(kept) if key else (None,) * 4
    if at is None or at >= t:
        at, wrong, right = t, None, None
    colour = look(key[1])['color'] if key else '#444444'
    said, prompt, graph, carried, wrote = figure.axes
    for axes in (said, carried):
        axes.clear()
        axes.set_axis_off()
    said.text(0, 0, say, fontsize=11, weight='bold', color=RED if at < t else colour)
    paint = lambda edge: YELLOW if edge == match else '#FFB0B0' if right and {*edge} == {*right} else '#EEEEEE'
    tape(prompt, [' - '.join(edge) for edge in edges[:read]], {i: ('black', paint(e)) for i, e in enumerate(edges)}, 90, 3)
    stars(graph, kept['prompt'], read, [v for i, v in tour(kept['written'].split()).items() if i < at] if key else [],
          colour, wrong, right, match)
    marks = {i: (GREY, 'none') for i in range(at, t)} | {i: ('black', '#EEEEEE') for i in kept['retrieved'] if i < at}
    marks |= {t - 1: ('black', YELLOW)} if t - 1 in marks and at == t else {at: ('white', RED)} if at < t else {}
    tape(wrote, words, marks, 90, 4)

    prompt_tokens = 3 * len(edges) + 2
    tokens = 1 + 3 * read + (read == len(edges)) + t
    unit = max(r['memory'].get('cache', 0) for r, _ in told.values()) / prompt_tokens or 256      # floats of a small square
    carried.set(xlim=(0, 25), ylim=(-16, 2), aspect='equal')
    for x, who in zip((0, 12), [key] if key else [k for k in (('cot', 'mamba'), ('cot', 'transformer')) if k in told]):
        floats, style = told[who][0]['memory'], dict(color=look(who[1])['color'], linewidth=0)
        fixed = floats.get('state', 0) + floats.get('window', 0)
        cells = int(tokens * floats.get('cache', 0) / prompt_tokens / unit)
        carried.add_patch(Rectangle((x, -(fixed / unit) ** 0.5), (fixed / unit) ** 0.5, (fixed / unit) ** 0.5, **style))
        for i in range(cells):
            carried.add_patch(Rectangle((x + i % 12, -1 - i // 12), 0.85, 0.85, **style))
        text = f'{cells * unit:,.0f} numbers' if cells else f'{fixed:,.0f} numbers, always'
        carried.text(x, 0.5, f'{look(who[1])["label"]}\n{text}', fontsize=9, color=style['color'])


def walk(found):
    """A film of one sample, of the largest n that has some: what is read, what is carried from token to token, to scale, and
    where the search goes."""
    told = [case for *_, case in cases(found) if all(r.get('memory') for r, _ in case.values())][-1:]
    for case in told:
        figure = plt.figure(figsize=(8, 5.2), dpi=100)
        for place in ((.02, .94, .96, .05), (.02, .76, .96, .12), (0, .22, .6, .53), (.6, .22, .39, .47), (.02, .01, .96, .17)):
            figure.add_axes(place)
        for x, y, text in ((.02, .9, 'the prompt'), (.02, .19, 'what is written'), (.6, .72, 'what is carried, to scale')):
            figure.text(x, y, text, fontsize=8, color='grey')
        yield 'walk', FuncAnimation(figure, lambda scene: draw_scene(figure, case, scene), [*scenes(case)], lambda: None)


def idea(found):
    """The paper in a drawing: what each kind of model carries from token to token. Needs no results."""
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.6))
    text = ['2-1', '4-0', '4-3', '...', '4-?']
    for panel, arch, words, title, below in zip(axes, ('mamba', 'transformer', 'mamba'), (text, text, [*text, '3']), (
            'RNN: a box of fixed size', 'Transformer: a growing cache', 'RNN with a retriever'), (
            'The longer the text, the more\nof it is forgotten.', 'Nothing is forgotten; the memory\ngrows with the text.',
            'What was forgotten is looked up\nin the text and pasted at its end.')):
        colour, retrieves = look(arch)['color'], len(words) > 5
        panel.set(xlim=(-0.7, 5.7), ylim=(-2.6, 2.5), aspect='equal')
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set(visible=True, color='#CCCCCC')
        panel.set_title(title, fontsize=10, weight='bold', color=colour)
        panel.text(2.5, -1.45, below, ha='center', va='top', fontsize=8.5)
        for x, word in enumerate(words):
            lit = retrieves and x in (2, 5)
            panel.text(x, 1, f'{word:^3}', ha='center', va='center', fontsize=8.5, family='monospace',
                       bbox=dict(boxstyle='square,pad=0.25', facecolor=YELLOW if lit else 'white', edgecolor=GREY))
            for i in range(x + 1 if arch == 'transformer' else 1):
                height = 0.27 if arch == 'transformer' else 0.6
                panel.add_patch(Rectangle((x - 0.3, 0.35 - height - 0.35 * i), 0.6, height, color=colour, linewidth=0))
            if x and arch == 'mamba':
                panel.annotate('', (x - 0.25, 0.05), (x - 0.75, 0.05), arrowprops=dict(arrowstyle='->'))
        if retrieves:
            panel.add_patch(FancyArrowPatch((2, 1.4), (5, 1.4), connectionstyle='arc3,rad=-0.3', arrowstyle='-|>',
                                            mutation_scale=12, color='black'))
            panel.text(3.5, 1.95, 'the retriever', ha='center', va='bottom', fontsize=8.5)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.text(0.5, 0.02, 'Hybrid: an RNN with one Transformer layer on top; it carries the box and one layer\'s cache.',
                ha='center', fontsize=9, color=LOOKS['hybrid']['color'])
    yield 'idea', figure


FIGURES = [idea, accuracy, sizes, primitives, sweep, learning, memory, errors, generation, hotpot, attention, sample, walk]


# --- reading the results -----------------------------------------------------------------------------------

# What must be in a file: a type, [a list of], {str: a dict of}, or a dict with these names, where name? may be missing.
LENGTH = {'n': int, 'accuracy': float, 'accuracy_se': float, 'best_guess': float, 'chance': float}
RESULT = {'task': str, 'arch': str, 'setup': str, 'size': str, 'n_nodes': int, 'seed': int, 'd_state': int, 'samples': int,
          'distribution': str, 'accuracy': float, 'accuracy_se': float, 'exact_trace': float, 'lr': float, 'warmup': float,
          'samples_trained?': int, 'tuning?': bool, 'layers?': str, 'chance?': float, 'errors?': {str: float},
          'memory?': {str: float}, 'by_length?': [LENGTH]}
LOG = {'samples': int, 'accuracy': float}
SAMPLE = {'prompt': str, 'expected': str, 'written': str, 'retrieved': [int]}
ATTENTION = {'prompt': [str], 'generated': [str], 'weights': [[float]]}
HOTPOT = {'condition': str, 'em': float}
GENERATION = {'arch': str, 'size': str, 'length': int, 'seconds': float, 'bytes': int}


def fits(value, shape):
    """Whether a value read from JSON has a shape, as above. A float may be any finite number, an int is not negative."""
    if shape is float or shape is int:
        return type(value) in (int, shape) and (shape is float or value >= 0) and abs(value) < 1e15
    if shape in (str, bool):
        return type(value) is shape
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    names = {name.rstrip('?'): name for name in shape} if str not in shape else {}
    return isinstance(value, dict) and all(fits(v, shape[names.get(name, str)]) for name, v in value.items()
        if name in names or str in shape) and all(name in value or name != names[name] for name in names)


def read(path, shape):
    """The values in a JSON or JSON-lines file of ours; none, and a line that says so, if it is damaged or not ours."""
    try:
        text = path.read_text(encoding='utf-8')
        rows = [json.loads(part) for part in (text.splitlines() if path.suffix == '.jsonl' else [text])]
        rows = rows[0] if path.suffix == '.json' and isinstance(rows[0], list) else rows
        if fits(rows, [shape]):
            return rows
        reason = 'not a file of ours, or an older one'
    except (ValueError, OSError, RecursionError) as error:
        reason = f'damaged, {str(error)[:60]}'
    print(f'{path} is left out: {reason}')
    return []


def load(out):
    """What there is to draw below a folder: results of train.py (dicts, with their log, kept samples and attention) and its
    unfinished cells, lists of rows of models.py, (model name, rows) of eval_hotpot.py."""
    beside = lambda path, name, shape: read(path.with_name(name), shape) if path.with_name(name).exists() else []
    unfinished = [c for path in sorted(out.glob('**/config.json')) if not path.with_name('result.json').exists()
                  for c in read(path, {name: RESULT[name] for name in CELL})]
    results, hotpot = {}, []
    for path in sorted(out.glob('**/result.json')):
        for r in read(path, RESULT):
            cell = tuple(str(r.get(name)) for name in (*CELL, *CONSTANTS, 'lr', 'tuning', 'layers'))
            if r['task'] not in TASKS or r['setup'] not in SETUPS or r['n_nodes'] < 1:
                print(f'{path} is left out: no task or setup of ours')
            elif cell in results:
                print(f'{path} is left out: {results[cell]["path"]} is of the same cell')
            else:
                shown = [a for a in beside(path, 'attention.json', ATTENTION) if {len(a['prompt'] + a['generated'])} ==
                         {len(row) for row in a['weights']} and len(a['weights']) == len(a['generated'])]
                kept = [s for s in beside(path, 'samples.json', SAMPLE) if edges_of(s['prompt'])]
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
    return dict(results=sorted(results.values(), key=lambda r: (order(r['arch']), r['n_nodes'], r['seed'])),
                unfinished=unfinished, hotpot=sorted(hotpot, key=lambda found: order(found[0])),
                generation=[rows for path in sorted(out.glob('**/generation.json')) if (rows := read(path, GENERATION))])


def main(argv):
    c = parse(argv, Constants, 'plot.py', {'default': {}})
    folder, found = Path(c.figures), load(Path(c.out))
    if folder.exists() and not folder.is_dir():
        raise Refused(f'--figures={folder} is a file: name a folder')
    if not any(found[kind] for kind in ('results', 'hotpot', 'generation')):
        raise Refused(f'{c.out}: no results to draw, run train.py first')
    folder.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        for name, figure in draw(found):
            if isinstance(figure, FuncAnimation):
                path = folder / f'{name}.gif'
                figure.save(path, PillowWriter(fps=4), dpi=100)
            else:
                path = folder / f'{name}.png'
                figure.savefig(path)
                figure.savefig(path.with_suffix('.pdf'))
            plt.close('all')
            print(path)
    if n := len(found['unfinished']):
        print(f'{n} cells have been begun and not finished: run their train.py command again')


if __name__ == '__main__':
    sys.exit(cli(main, 'plot.py', sys.argv[1:]))
