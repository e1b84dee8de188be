"""The figures, drawn from what train.py, models.py and eval_hotpot.py wrote: one function each, then a list of them.

  python plot.py                              out/**/result.json ... -> figures/*.png and *.pdf
  python plot.py --out=results --figures=figures

A function takes all that was found (a dict of lists) and yields a name and a figure for each picture that it
has results for; cells that have been begun and not ended are named below it. Colours are Okabe and Ito's, safe
for the colour-blind; in black and white, markers tell the architectures apart, line styles the rest.
"""
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
matplotlib.use('Agg')                       # to files, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np

import data
import models
from train import UserError, cli, parse


@dataclass
class Constants:
    out: str = 'out'                        # folder of the results, searched with all its subfolders
    figures: str = 'figures'                # folder of the pictures


NAMES = {'transformer': 'Transformer', 'mamba': 'RNN (Mamba)', 'hybrid': 'hybrid'}
COLOURS = {'transformer': '#0072B2', 'mamba': '#D55E00', 'hybrid': '#009E73'}
MARKERS = {'transformer': 's', 'mamba': 'o', 'hybrid': '^'}
HATCHES = {'transformer': '', 'mamba': '///', 'hybrid': '...'}
LINES = {'direct': '-', 'cot': '-.', 'retrieval': '--'}
CELL = ('task', 'arch', 'setup', 'size', 'n_nodes', 'seed')
CONSTANTS = ('distribution', 'd_state', 'frozen_embedding', 'samples', 'batch_size', 'warmup_samples', 'grad_clip', 'dtype')
TITLES = {'index': 'Index', 'recall': 'Associative recall', 'cgram': 'c-gram retrieval', 'counting': 'Counting'}

plt.rcParams |= {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
                 'savefig.dpi': 200, 'savefig.bbox': 'tight', 'pdf.fonttype': 42, 'hatch.linewidth': 0.6}


# --- what the figures share ---------------------------------------------------------------------------

def values(results, name):
    return sorted({r[name] for r in results})


def where(results, **wanted):
    """The results with these values."""
    return [r for r in results if all(r[name] == value for name, value in wanted.items())]


def alike(results, but=()):
    """Of results that differ in more than a figure shows (those of a sweep over d_state, say), for each setup the
    largest group with the same constants, apart from those named in `but`."""
    key = lambda r: tuple(r.get(name) for name in CONSTANTS if name not in but)
    commonest = {setup: Counter(map(key, where(results, setup=setup))).most_common(1)[0][0]
                 for setup in values(results, 'setup')}
    return [r for r in results if key(r) == commonest[r['setup']]]


def curve(axes, results, x, dodge=0.0, **style):
    """Accuracy in percent against the value x of the results, mean over seeds; error bars: standard error, between seeds
    if there are several, else binomial. dodge moves points sideways, by a fraction of a doubling of x."""
    points = []
    for value in values(results, x):
        accuracy = [100 * r['accuracy'] for r in where(results, **{x: value})]
        error = np.std(accuracy, ddof=1) / len(accuracy) ** 0.5 if len(accuracy) > 1 else \
            100 * where(results, **{x: value})[0]['accuracy_se']
        points.append((value * 2 ** dodge, np.mean(accuracy), error))
    axes.errorbar(*zip(*points), capsize=2, markersize=5, **style)


def label(arch, size, sizes):
    return f'{NAMES[arch]}, {size}' if len(sizes) > 1 else NAMES[arch]


def panels(titles, width=2.9, height=2.9):
    """A figure with a panel for each title, side by side, and the panels by title."""
    figure, axes = plt.subplots(1, len(titles), figsize=(1 + width * len(titles), height), sharey=True, squeeze=False)
    for panel, title in zip(axes[0], titles):
        panel.set_title(title)
    return figure, dict(zip(titles, axes[0]))


def finish(figure, unfinished=()):
    """The legend of all panels, each label once, at the right; the unfinished cells below."""
    labels = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels())}
    figure.tight_layout()
    figure.legend(labels.values(), labels.keys(), loc='center left', bbox_to_anchor=(1, 0.5))
    if unfinished:
        names = [f'{c["task"]} {c["arch"]} {c["setup"]} {c["size"]} n={c["n_nodes"]} seed {c["seed"]}' for c in unfinished]
        more = f' and {len(names) - 6} more' if len(names) > 6 else ''
        figure.text(0.01, -0.02, f'not finished: {", ".join(names[:6])}{more}', fontsize=6, color='grey', va='top')
    return figure


def axis_of_n(axes, ns, name):
    axes.set_xscale('log', base=2)
    axes.set_xticks(ns, ns)
    axes.minorticks_off()
    axes.set(xlabel=name, xlim=(ns[0] / 1.15, ns[-1] * 1.15), ylim=(0, 104))


# --- the figures ----------------------------------------------------------------------------------------

def accuracy(found):
    """The paper's main figure: accuracy on IsTree against n, a panel for each setup, a line style for each size."""
    results = alike(where(found['results'], task='istree'))
    setups, sizes = [s for s in LINES if where(results, setup=s)], [s for s in models.SIZES if where(results, size=s)]
    if not results:
        return
    figure, axes = panels(setups)
    for setup in setups:
        axes[setup].axhline(50, linestyle=':', color='grey', label='chance')
        for i, (arch, size) in enumerate((arch, size) for size in sizes for arch in models.ARCHS):
            if line := where(results, setup=setup, arch=arch, size=size):
                curve(axes[setup], line, 'n_nodes', 0.03 * (i - (3 * len(sizes) - 1) / 2), label=label(arch, size, sizes),
                      color=COLOURS[arch], marker=MARKERS[arch], linestyle=['-', '--', ':', '-.'][sizes.index(size)])
        axis_of_n(axes[setup], values(results, 'n_nodes'), 'n, nodes of the graph')
    axes[setups[0]].set_ylabel('accuracy (%)')
    yield 'accuracy', finish(figure, where(found['unfinished'], task='istree'))


def learning(found):
    """Who learns how fast: accuracy on IsTree against training samples, a panel for each setup, a line for each
    seed. The last point is the result, on all held-out samples, the ones before are on 200 of them."""
    all_results = alike([r for r in where(found['results'], task='istree') if r['log']])
    for n in values(all_results, 'n_nodes'):
        results = where(all_results, n_nodes=n)
        setups = [s for s in LINES if where(results, setup=s)]
        figure, axes = panels(setups)
        for setup in setups:
            axes[setup].axhline(50, linestyle=':', color='grey', label='chance')
            for r in where(results, setup=setup):
                points = [(line['samples'], line['accuracy']) for line in r['log'] if line['samples'] < 0.99 * r['samples']]
                x, y = zip(*points, (r['samples'], r['accuracy']))
                axes[setup].plot(np.array(x) / 1000, 100 * np.array(y), color=COLOURS[r['arch']], marker=MARKERS[r['arch']],
                                 markersize=4, alpha=0.8, label=label(r['arch'], r['size'], values(results, 'size')))
            axes[setup].set(xlabel='thousand samples', ylim=(0, 104))
        axes[setups[0]].set_ylabel(f'accuracy (%), n={n}')
        yield f'learning-n{n}', finish(figure)


def memory(found):
    """The claim itself: accuracy on IsTree with chain of thought against the floats that a model carries from token
    to token at the end of the prompt."""
    all_results = alike(where(found['results'], task='istree', setup='cot'), but=['d_state'])
    for n in values(all_results, 'n_nodes'):
        results = where(all_results, n_nodes=n)
        figure, axes = panels([f'IsTree, chain of thought, n={n}'], width=3.4)
        for panel in axes.values():
            panel.axhline(50, linestyle=':', color='grey', label='chance')
            for arch in models.ARCHS:
                if line := where(results, arch=arch):
                    curve(panel, line, 'state_floats', color=COLOURS[arch], marker=MARKERS[arch], label=NAMES[arch])
            panel.set_xscale('log', base=2)
            panel.set(xlabel='memory at the end of the prompt (floats)', ylabel='accuracy (%)', ylim=(0, 104))
        if len(values(results, 'state_floats')) > 3:
            yield f'memory-n{n}', finish(figure)


def errors(found):
    """Where it goes wrong: share of wrong tokens of each kind, all tokens before them given: in-context retrieval (the next
    neighbour, is it visited?) against bookkeeping (return to the parent, query, record)."""
    all_results = alike([r for r in where(found['results'], task='istree') if 'errors' in r and r['setup'] != 'direct'])
    for size, n in sorted({(r['size'], r['n_nodes']) for r in all_results}):
        results = where(all_results, size=size, n_nodes=n)
        setups = [s for s in LINES if where(results, setup=s)]
        figure, axes = panels(setups, width=3.7)
        for setup in setups:
            kinds = [kind for kind in data.KINDS if kind in where(results, setup=setup)[0]['errors']]
            for i, arch in enumerate(models.ARCHS):
                if group := where(results, setup=setup, arch=arch):
                    rates = np.mean([[100 * r['errors'][kind] for kind in kinds] for r in group], 0)
                    bars = axes[setup].bar(np.arange(len(kinds)) + 0.27 * (i - 1), rates, 0.25, color=COLOURS[arch],
                                           hatch=HATCHES[arch], edgecolor='white', label=NAMES[arch])
                    axes[setup].bar_label(bars, ['<0.1' if 0 < rate < 0.1 else f'{rate:.1f}' for rate in rates], fontsize=6)
            names = [kind.replace(' to ', ' to\n').replace('next ', 'next\n') for kind in kinds]
            axes[setup].set_xticks(range(len(kinds)), names, fontsize=8)
        axes[setups[0]].set_ylabel(f'wrong tokens (%), n={n}')
        yield f'errors-{size}-n{n}', finish(figure)


def generation(found):
    """What one more token costs against the tokens before it, in time and in memory, measured by models.py."""
    for rows in found['generation']:
        figure, (time, space) = plt.subplots(1, 2, figsize=(7, 2.9))
        for arch in models.ARCHS:
            line = where(rows, arch=arch)
            for axes, name, unit in ((time, 'seconds', 1e3), (space, 'bytes', 1e-6)):
                axes.plot([r['length'] for r in line], [unit * r[name] for r in line], label=NAMES[arch],
                          color=COLOURS[arch], marker=MARKERS[arch], markersize=4)
                axes.set_xscale('log', base=2)
                axes.set_yscale('log')
                axes.set_xlabel('tokens of context')
        time.set_ylabel(f'ms a token, {rows[0]["size"]}')
        space.set_ylabel(f'memory (MB), {rows[0]["size"]}')
        yield f'generation-{rows[0]["size"]}', finish(figure)


def hotpot(found):
    """HotpotQA: exact match of each model under the three conditions, on all questions."""
    if not found['hotpot']:
        return
    conditions = data.HOTPOT_CONDITIONS
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(found['hotpot']), 2.9))
    for i, (condition, colour, hatch) in enumerate(zip(conditions, ('#999999', '#E69F00', '#56B4E9'), ('', '///', '...'))):
        right = [[100 * r['em'] for r in where(rows, condition=condition)] for _, rows in found['hotpot']]
        bars = axes.bar(np.arange(len(right)) + 0.27 * (i - 1), [np.mean(r) for r in right], 0.25, color=colour,
                        hatch=hatch, yerr=[np.std(r, ddof=1) / len(r) ** 0.5 for r in right], capsize=2,
                        edgecolor='white', label=condition)
        axes.bar_label(bars, [f'{np.mean(r):.0f}' for r in right], fontsize=7, padding=2)
    axes.set_xticks(range(len(found['hotpot'])), [name for name, _ in found['hotpot']])
    axes.set(ylabel='exact match (%)', ylim=(0, 108))
    yield 'hotpot', finish(figure)


def primitives(found):
    """The bottleneck in its purest form (paper, section 4): accuracy of the retrieval primitives against the length of
    the context, a panel for each task, a picture for each size of the models."""
    all_results = alike([r for r in found['results'] if r['task'] in TITLES])
    for size in values(all_results, 'size'):
        results = where(all_results, size=size)
        tasks = [task for task in TITLES if where(results, task=task)]
        lines = [(arch, setup) for setup in LINES for arch in models.ARCHS if where(results, arch=arch, setup=setup)]
        figure, axes = panels([TITLES[task] for task in tasks])
        for task in tasks:
            panel, ns = axes[TITLES[task]], values(where(results, task=task), 'n_nodes')
            panel.plot(ns, [100 * data.TASKS[task].chance(n) for n in ns], ':', color='grey', label='chance')
            for i, (arch, setup) in enumerate(lines):
                if line := where(results, task=task, arch=arch, setup=setup):
                    curve(panel, line, 'n_nodes', 0.035 * (i - (len(lines) - 1) / 2), label=f'{NAMES[arch]}, {setup}',
                          color=COLOURS[arch], marker=MARKERS[arch], linestyle=LINES[setup],
                          markerfacecolor=COLOURS[arch] if setup == 'direct' else 'white')
            axis_of_n(panel, ns, 'n, pairs in the context' if task == 'recall' else 'n, tokens in the context')
        axes[TITLES[tasks[0]]].set_ylabel('accuracy (%)')
        yield f'primitives-{size}', finish(figure, [c for c in found['unfinished'] if c['task'] in TITLES])


FIGURES = [accuracy, learning, memory, errors, generation, hotpot, primitives]


def load(out):
    """What there is to draw below a folder: results and unfinished cells of train.py (dicts, with their log), lists of rows
    of models.py, (model name, rows) of eval_hotpot.py. Raises UserError on a damaged file."""
    def read(path):
        try:
            text = path.read_text()
            return [json.loads(part) for part in (text.splitlines() if path.suffix == '.jsonl' else [text])]
        except ValueError as error:
            raise UserError(f'{path} is damaged ({error}): delete it')

    results, unfinished, hotpot = {}, [], []
    for path in sorted(out.glob('**/config.json')):
        if not path.with_name('result.json').exists():
            unfinished += read(path)
    for path in sorted(out.glob('**/result.json')):
        result, = read(path)
        if not {*CELL, 'accuracy'} <= {*result}:
            raise UserError(f'{path} is not a result of train.py: delete it')
        log = path.with_name('log.jsonl')
        cell = tuple(result.get(name) for name in CELL + CONSTANTS)
        if cell in results:
            print(f'{path} is left out: {results[cell]["path"]} is of the same cell')
        results.setdefault(cell, result | dict(path=path, log=read(log) if log.exists() else []))
    for path in sorted(out.glob('**/hotpot/*.jsonl')):
        rows = read(path)
        if len({len(where(rows, condition=c)) for c in data.HOTPOT_CONDITIONS}) == 1:
            hotpot.append((path.stem.rpartition('-')[0], rows))
        else:
            print(f'{path} is left out: not finished')
    order = lambda name: [i for i, arch in enumerate(models.ARCHS) if name.startswith(arch)] or [len(models.ARCHS)]
    return dict(results=sorted(results.values(), key=lambda r: (order(r['arch']), r['n_nodes'], r['seed'])),
                unfinished=unfinished, hotpot=sorted(hotpot, key=lambda found: order(found[0])),
                generation=[rows for path in sorted(out.glob('**/generation.json')) for rows in read(path)])


def main(argv):
    c = parse(argv, Constants, 'plot.py', {'default': {}})
    found = load(Path(c.out))
    names = []
    for draw in FIGURES:
        for name, figure in draw(found):
            Path(c.figures).mkdir(parents=True, exist_ok=True)
            names.append(Path(c.figures) / f'{name}.png')
            for path in (names[-1], names[-1].with_suffix('.pdf')):
                figure.savefig(path)
            plt.close(figure)
    if not names:
        raise UserError(f'{c.out}: no results to draw, run train.py first')
    if n := len(found['unfinished']):
        print(f'{n} cells have been begun and not finished: run their train.py command again')
    print(*names, sep='\n')


if __name__ == '__main__':
    sys.exit(cli(main, 'plot.py', sys.argv[1:]))
