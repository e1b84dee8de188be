"""The figures, drawn from the results that train.py wrote: one function each, at the end a list of them.

  python plot.py                              out/**/result.json -> figures/*.png and *.pdf
  python plot.py --out=out/mine --figures=out/mine

A function takes all results (a list of dicts) and yields a name and a figure for each picture it has
results for. Colours are Okabe and Ito's, safe for the colour-blind; in black and white, markers tell the
architectures apart and line styles the setups.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
matplotlib.use('Agg')                       # to files, also where there is no screen
import matplotlib.pyplot as plt

import data
import models
from train import Refused, cli, parse


@dataclass
class Constants:
    out: str = 'out'                        # folder of the results, searched with all its subfolders
    figures: str = 'figures'                # folder of the pictures


NAMES = {'transformer': 'Transformer', 'mamba': 'RNN (Mamba)', 'hybrid': 'hybrid'}
COLOURS = {'transformer': '#0072B2', 'mamba': '#D55E00', 'hybrid': '#009E73'}
MARKERS = {'transformer': 's', 'mamba': 'o', 'hybrid': '^'}
LINES = {'direct': '-', 'cot': '-.', 'retrieval': '--'}
TITLES = {'index': 'Index', 'recall': 'Associative recall', 'cgram': 'c-gram retrieval', 'counting': 'Counting'}

plt.rcParams |= {'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
                 'savefig.dpi': 200, 'savefig.bbox': 'tight', 'pdf.fonttype': 42}


def accuracy_against_n(axes, results, dodge=0.0, **style):
    """One line: mean accuracy over seeds at each n, with binomial standard errors. dodge moves the points
    sideways, as a fraction of a doubling of n, so that lines on top of each other can be told apart."""
    ns = sorted({r['n_nodes'] for r in results})
    means, errors = [], []
    for n in ns:
        here = [r for r in results if r['n_nodes'] == n]
        p = sum(r['accuracy'] for r in here) / len(here)
        means.append(100 * p)
        errors.append(100 * math.sqrt(p * (1 - p) / sum(r['n_val'] for r in here)))
    axes.errorbar([n * 2 ** dodge for n in ns], means, errors, capsize=2, markersize=5, **style)


def primitives(results):
    """The bottleneck in its purest form (paper, section 4): accuracy of the retrieval primitives against
    the length of the context, a panel for each task, a picture for each size of the models."""
    results = [r for r in results if r['task'] in TITLES]
    for size in sorted({r['size'] for r in results}):
        these = [r for r in results if r['size'] == size]
        tasks = [task for task in TITLES if any(r['task'] == task for r in these)]
        lines = [(arch, setup) for setup in LINES for arch in models.ARCHS
                 if any((r['arch'], r['setup']) == (arch, setup) for r in these)]
        figure, panels = plt.subplots(1, len(tasks), figsize=(1.2 + 2.9 * len(tasks), 2.9), sharey=True, squeeze=False)
        for axes, task in zip(panels[0], tasks):
            ns = sorted({r['n_nodes'] for r in these if r['task'] == task})
            axes.plot(ns, [100 * data.TASKS[task].chance(n) for n in ns], ':', color='grey', label='chance')
            for i, (arch, setup) in enumerate(lines):
                line = [r for r in these if (r['task'], r['arch'], r['setup']) == (task, arch, setup)]
                accuracy_against_n(axes, line, 0.08 * (i - (len(lines) - 1) / 2), label=f'{NAMES[arch]}, {setup}',
                                   color=COLOURS[arch], marker=MARKERS[arch], linestyle=LINES[setup],
                                   markerfacecolor=COLOURS[arch] if setup == 'direct' else 'white')
            axes.set_xscale('log', base=2)
            axes.set_xticks(ns, ns)
            axes.minorticks_off()
            axes.set(title=TITLES[task], ylim=(0, 104),
                     xlabel='n, pairs in the context' if task == 'recall' else 'n, tokens in the context')
        panels[0, 0].set_ylabel('accuracy (%)')
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='center left', bbox_to_anchor=(1, 0.55))
        figure.tight_layout()
        yield f'primitives-{size}', figure


def learning(results):
    """Who learns how fast: accuracy on IsTree against training samples, a panel for each setup. The last
    point is the result, on all held-out samples, the ones before are on 200 of them."""
    results = [r for r in results if r['task'] == 'istree' and r['log']]
    for n in sorted({r['n_nodes'] for r in results}):
        setups = [setup for setup in LINES if any((r['n_nodes'], r['setup']) == (n, setup) for r in results)]
        figure, panels = plt.subplots(1, len(setups), figsize=(2.9 * len(setups), 2.7), sharey=True, squeeze=False)
        for axes, setup in zip(panels[0], setups):
            axes.axhline(50, linestyle=':', color='grey')
            for r in results:
                if (r['n_nodes'], r['setup']) == (n, setup):
                    points = [(line['samples'], line['accuracy']) for line in r['log']
                              if line['samples'] < 0.99 * r['samples']] + [(r['samples'], r['accuracy'])]
                    axes.plot([x / 1000 for x, _ in points], [100 * y for _, y in points], color=COLOURS[r['arch']],
                              marker=MARKERS[r['arch']], markersize=4, label=NAMES[r['arch']])
            axes.set(title=setup, xlabel='thousand samples', ylim=(0, 104))
        panels[0, 0].set_ylabel(f'accuracy (%), n={n}')
        handles = dict(zip(*reversed(panels[0, -1].get_legend_handles_labels())))
        panels[0, -1].legend(handles.values(), handles.keys(), loc='lower right')
        figure.tight_layout()
        yield f'learning-n{n}', figure


def memory(results):
    """The claim itself: accuracy on IsTree with chain of thought against the floats that a model carries
    from token to token at the end of the prompt."""
    results = [r for r in results if (r['task'], r['setup']) == ('istree', 'cot')]
    for n in sorted({r['n_nodes'] for r in results}):
        figure, axes = plt.subplots(figsize=(4.2, 2.9))
        axes.axhline(50, linestyle=':', color='grey', label='chance')
        for arch in models.ARCHS:
            line = sorted((r['state_floats'], r['accuracy'], r['accuracy_se']) for r in results
                          if (r['n_nodes'], r['arch']) == (n, arch))
            if line:
                floats, accuracy, error = zip(*line)
                axes.errorbar(floats, [100 * a for a in accuracy], [100 * e for e in error], capsize=2, markersize=5,
                              color=COLOURS[arch], marker=MARKERS[arch], label=f'{NAMES[arch]}, cot')
        axes.set_xscale('log', base=2)
        axes.set(xlabel='memory at the end of the prompt (floats)', ylabel=f'accuracy (%), n={n}', ylim=(40, 104))
        axes.legend(loc='center right')
        yield f'memory-n{n}', figure


FIGURES = [learning, memory, primitives]


def main(argv):
    c = parse(argv, Constants, 'plot.py', {'default': {}})
    results = []
    for path in sorted(Path(c.out).glob('**/result.json')):
        log = path.with_name('log.jsonl')
        lines = log.read_text().splitlines() if log.exists() else []
        results.append(json.loads(path.read_text()) | dict(log=[json.loads(line) for line in lines]))
    Path(c.figures).mkdir(parents=True, exist_ok=True)
    names = []
    for draw in FIGURES:
        for name, figure in draw(results):
            names.append(Path(c.figures) / f'{name}.png')
            for path in (names[-1], names[-1].with_suffix('.pdf')):
                figure.savefig(path)
            plt.close(figure)
    if not names:
        raise Refused(f'{c.out}: no results to draw, run train.py first')
    print(*names, sep='\n')


if __name__ == '__main__':
    sys.exit(cli(main, 'plot.py', sys.argv[1:]))
