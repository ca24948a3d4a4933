"""The report on a suite: its tables, and plots that compare the methods over transfer tasks and seeds, on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from gsda_fast.errors import UsageError
from gsda_fast.results import alignment, plots, suite_plots, tables
from gsda_fast.results.html import Panel, Section, drawn, panel, template
from gsda_fast.results.metrics import evaluation_figures
from gsda_fast.results.plots import Curves
from gsda_fast.results.run_folder import RunFolder, RunResult, atomic_file
from gsda_fast.results.suite_folder import (
    Layout,
    SuiteFolder,
    paired_tables,
    read_settings,
    suite_tables,
    sweep_tables,
)
from gsda_fast.results.tables import AVERAGE, FIGURE_NAMES, MEAN_PER_CLASS, OVERALL, Cell, ResultTable

PAIR_IN_DETAIL = ("source-only", "gsda")
"""Confusion matrices and t-SNE are drawn for these methods of one transfer task and seed: each takes seconds."""


@dataclass(frozen=True)
class _Run:
    folder: RunFolder
    result: RunResult
    records: list[dict[str, Any]]

    @property
    def transfer_task(self) -> tuple[str, str]:
        return self.result.source, self.result.target


def write_suite_page(suite: SuiteFolder, layout: Layout, *, points: int = 1000, samples: int = 500) -> Path:
    """Draws the plots and writes the page about the runs that have finished, beside the suite's tables.

    Args:
        suite: its plots are kept as PNG files in its folder. layout: order of methods and transfer tasks, names.
        points: samples of each domain in a t-SNE plot, at most. samples: likewise for the proxy A-distance.

    Returns:
        The page's path.

    Raises:
        UsageError: no run has finished, a run's file is broken, or the folder cannot be written.
    """
    try:
        if suite.variants and not suite.runs:
            return _write_sweep_page(suite, layout)
        runs = [_Run(run, result, run.read_metrics()) for run in suite.runs if (result := run.read_result())]
        if not runs:
            raise UsageError(str(suite.path), found=f"{len(suite.runs)} runs, none finished", expected="finished runs")
        results = [run.result for run in runs]
        layout = layout.only(results)
        made = suite_tables(results, layout)
        colours = suite_plots.method_colours(layout.methods)
        sections = [
            _bar_section(suite, made, colours),
            _accuracy_section(suite, runs, layout, colours),
            _alignment_section(suite, runs, layout, colours, samples),
            _detail_section(runs, layout, points),
        ]
        _write(
            suite,
            title=f"{layout.task}: {_counted(layout.methods, 'method')}, "
            f"{_counted(layout.transfer_tasks, 'transfer task')}, {_counted({r.seed for r in results}, 'seed')}",
            finished=len(runs),
            begun=len(suite.runs),
            tables=made,
            paired=paired_tables(suite.runs, layout) if len(layout.methods) > 1 else [],
            sections=[section for section in sections if section.panels],
        )
    except OSError as error:
        raise UsageError(
            "report",
            found=f"{error.filename or suite.path} ({error.strerror})",
            expected="a folder that can be written",
        ) from error
    return suite.report_path


def _write(suite: SuiteFolder, **content: Any) -> None:
    html = template("suite.html.jinja").render(**content)
    with atomic_file(suite.report_path) as file:
        file.write(html.encode())


def _counted(things: Iterable[object], name: str) -> str:
    count = len(list(things))
    return f"{count} {name}{'s' if count != 1 else ''}"


# -------------------------------------------------------------------------------------------------------------- plots


def _bar_section(suite: SuiteFolder, made: Sequence[ResultTable], colours: Mapping[str, str]) -> Section:
    panels = []
    shown = [table for table in made if table.choice == "last"]
    for index, table in enumerate(shown):
        published = {row.label: [cell.mean for cell in row.cells] for row in table.rows if row.kind == "paper"}
        rows = [
            suite_plots.Bars(row.label, row.cells, colours[row.label], published.get(row.label, ()))
            for row in table.rows
            if row.kind == "ours"
        ]
        # A group of bars for each column; averages make a figure of their own, which can be taken in at a glance.
        averages = [i for i, name in enumerate(table.columns) if name in (AVERAGE, MEAN_PER_CLASS, OVERALL)]
        others = [i for i in range(len(table.columns)) if i not in averages]
        title = f"{table.task} {table.subject}".strip()
        for name, chosen in (("accuracy_average", averages), ("accuracy_bars", others)):
            if chosen:
                figure = suite_plots.bars(
                    [
                        replace(
                            row,
                            cells=[row.cells[i] for i in chosen],
                            published=[row.published[i] for i in chosen] if row.published else (),
                        )
                        for row in rows
                    ],
                    [table.columns[i] for i in chosen],
                    f"{title}: accuracy after the last step",
                    "percent",
                )
                path = suite.plot_path(f"{name}_{index}" if len(shown) > 1 else name)
                panels.append(panel(figure, path, f"Accuracy of each method: {title}"))
    return Section(
        "Methods compared",
        "After the last step, nothing chosen; the thin line on a bar is the standard deviation over seeds.",
        drawn(panels),
    )


def _curves(
    runs: Sequence[_Run], layout: Layout, measure: Callable[[_Run], suite_plots.Curve]
) -> dict[str, list[suite_plots.Curve]]:
    return {method: [measure(run) for run in runs if run.result.method == method] for method in layout.methods}


def _series(name: str) -> Callable[[_Run], suite_plots.Curve]:
    return lambda run: Curves(run.result.method, run.records).series(name)


def _warmup(runs: Sequence[_Run]) -> int:
    warmups = {run.folder.setting("warmup") or 0 for run in runs}
    return warmups.pop() if len(warmups) == 1 else 0


def _accuracy_section(suite: SuiteFolder, runs: Sequence[_Run], layout: Layout, colours: Mapping[str, str]) -> Section:
    panels = []
    warmup = _warmup(runs)
    for pair in layout.transfer_tasks:
        of_pair = [run for run in runs if run.transfer_task == pair]
        name = tables.transfer_task_name(*pair, layout.short_names)
        figure = suite_plots.spread_curves(
            _curves(of_pair, layout, _series(layout.figure)),
            colours,
            f"{name.replace('->', ' → ')}: {FIGURE_NAMES[layout.figure]} on the target",
            "percent",
            warmup,
        )
        path = suite.plot_path(f"curves_{name.replace('->', '-')}")
        panels.append(panel(figure, path, f"Accuracy over the steps: {name}"))
    return Section(
        "Accuracy during training",
        "Measured on all target samples; the line is the mean over seeds, the band one standard deviation.",
        drawn(panels),
    )


def _alignment_section(
    suite: SuiteFolder, runs: Sequence[_Run], layout: Layout, colours: Mapping[str, str], samples: int
) -> Section:
    warmup = _warmup(runs)
    panels: list[Panel | None] = []
    for method in layout.methods:
        of_method = [run for run in runs if run.result.method == method]
        levels = {level: [_series(f"gradient_norm_{level}")(run) for run in of_method] for level in alignment.LEVELS}
        figure = suite_plots.level_curves(levels, f"Gradient magnitudes: {method}", warmup)
        panels.append(panel(figure, suite.plot_path(f"gradient_norms_{method}"), f"Gradient magnitudes of {method}"))
    measures: dict[str, tuple[Callable[[_Run], suite_plots.Curve], str, str]] = {
        "synchronization": (_series("synchronization"), "Synchronization loss", "L_syn, unweighted"),
        "relative_mismatch": (
            lambda run: alignment.relative_mismatch(run.records),
            "Relative mismatch of the gradient magnitudes",
            alignment.MISMATCH_FORMULA,
        ),
        "adversarial_domain": (_series("adversarial_domain"), "Adversarial loss: domain", "unweighted"),
    }
    for name, (measure, title, unit) in measures.items():
        figure = suite_plots.spread_curves(_curves(runs, layout, measure), colours, title, unit, warmup)
        panels.append(panel(figure, suite.plot_path(name), f"{title} over the steps"))
    distances = _distances(runs, samples)
    columns = [tables.transfer_task_name(*pair, layout.short_names) for pair in layout.transfer_tasks]
    rows = [
        suite_plots.Bars(
            method,
            [
                Cell.of([distance for run, distance in distances if (run.result.method, run.transfer_task) == at])
                for at in ((method, pair) for pair in layout.transfer_tasks)
            ],
            colours[method],
        )
        for method in layout.methods
    ]
    if distances:
        figure = suite_plots.bars(rows, columns, "Proxy A-distance after the last step", "2 (1 - 2 · error)")
        panels.append(panel(figure, suite.plot_path("proxy_a_distance"), "Proxy A-distance of each method"))
    return Section(
        "Alignment",
        "Lines are means over all transfer tasks and seeds, bands one standard deviation. Synchronized levels have "
        "equal magnitudes, so their lines lie together and the mismatch is near 0. A discriminator that cannot tell "
        "the domains apart has an adversarial loss of 0.69. The proxy A-distance is 2 where a linear classifier, "
        "cross-validated on the features, tells the domains apart, and 0 where it does no better than chance.",
        drawn(panels),
    )


def _distances(runs: Sequence[_Run], samples: int) -> list[tuple[_Run, float]]:
    found = []
    for run in runs:
        features = run.folder.read_features()
        if features is None or features.source_final is None or features.target_final is None:
            continue
        distance = alignment.proxy_a_distance(features.source_final, features.target_final, samples)
        if distance is not None:
            found.append((run, distance))
    return found


def _detail_section(runs: Sequence[_Run], layout: Layout, points: int) -> Section:
    pair = layout.transfer_tasks[0]
    seed = min(run.result.seed for run in runs)
    panels: list[Panel | None] = []
    for method in PAIR_IN_DETAIL:
        for run in runs:
            if (run.result.method, run.transfer_task, run.result.seed) != (method, pair, seed):
                continue
            predictions, features = run.folder.read_predictions(), run.folder.read_features()
            classes, starts_row = run.result.classes, True
            if predictions is not None and (predictions.labels >= 0).any():
                labels, probabilities = map(torch.from_numpy, (predictions.labels, predictions.probabilities))
                confusion = evaluation_figures(labels, probabilities).confusion.numpy()
                figure = plots.confusion_matrix(confusion, classes, f"Confusion matrix: {method}")
                path = run.folder.plot_path("confusion")
                panels.append(panel(figure, path, f"Confusion matrix of {method}", starts_row))
                starts_row = False
            if features is not None and features.source_final is not None and features.target_final is not None:
                embedded = plots.tsne(
                    features.source_final,
                    features.source_labels,
                    features.target_final,
                    features.target_labels,
                    classes=classes,
                    title=f"{method}, after the last step",
                    points=points,
                )
                path = run.folder.plot_path("tsne_final")
                panels.append(panel(embedded, path, f"Features of {method}", starts_row))
    name = tables.transfer_task_name(*pair, layout.short_names).replace("->", " → ")
    return Section(
        f"In detail: {name}, seed {seed}",
        "A row of a confusion matrix adds up to 100 percent of that class's samples. In the t-SNE plot each point is "
        "an image, colour its true class; adaptation should lay the target (crosses) onto the source (dots) of the "
        "same colour. `python -m gsda_fast.report RUN` draws this and more for any run.",
        drawn(panels),
        in_pairs=True,
    )


# -------------------------------------------------------------------------------------------------------------- sweep


def sweep_plots(made: Sequence[ResultTable]) -> dict[str, Figure]:
    """A plot for each method of a sweep: the average over transfer tasks after the last step, over the settings.

    The first setting is the horizontal axis, each combination of the others a line.

    Args:
        made: from `sweep_tables`.
    """
    figures = {}
    for table in made:
        if table.choice != "last":
            continue
        lines: dict[str, dict[str, Cell]] = {}
        parameter = ""
        for row in table.rows:
            (parameter, value), *others = read_settings(row.label).items()
            label = ", ".join(f"{name} {setting}" for name, setting in others)
            # The last column: the average, or the only transfer task.
            lines.setdefault(label, {})[value] = row.cells[-1]
        over = table.columns[-1].replace("->", " → ") if table.columns[-1] != AVERAGE else "average"
        title = f"{table.task}, {table.subject}, {over}"
        figures[table.subject] = suite_plots.sweep(lines, parameter, f"{FIGURE_NAMES[table.figure]}, percent", title)
    return figures


def _write_sweep_page(suite: SuiteFolder, layout: Layout) -> Path:
    variants = {name: variant.results() for name, variant in suite.variants.items()}
    results = [result for of_variant in variants.values() for result in of_variant]
    if not results:
        raise UsageError(str(suite.path), found="a sweep without a finished run", expected="finished runs")
    layout = layout.only(results)
    made = sweep_tables(variants, layout)
    panels = [
        panel(figure, suite.sweep_plot_path(method), f"Accuracy of {method} over the settings")
        for method, figure in sweep_plots(made).items()
    ]
    _write(
        suite,
        title=f"{layout.task}: sweep over {', '.join(read_settings(next(iter(variants))))}",
        finished=len(results),
        begun=sum(len(variant.runs) for variant in suite.variants.values()),
        tables=made,
        paired=[],
        sections=[Section("Sensitivity", "Bars: standard deviation over seeds.", drawn(panels))],
    )
    return suite.report_path
