"""The report on a suite: its tables, and plots that compare the methods over transfer tasks and seeds, on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from gsda_fast.errors import UsageError
from gsda_fast.files import atomic_file
from gsda_fast.results import alignment, plots, suite_plots, tables
from gsda_fast.results.html import Panel, Section, drawn, panel, template
from gsda_fast.results.metrics import evaluation_figures
from gsda_fast.results.paired import PairedTable
from gsda_fast.results.plots import Curves
from gsda_fast.results.run_folder import FREE_TO_CHANGE, RunFolder, RunResult, flat_settings
from gsda_fast.results.suite_folder import (
    Layout,
    SuiteFolder,
    paired_sweep_tables,
    paired_tables,
    read_settings,
    suite_tables,
    sweep_tables,
)
from gsda_fast.results.tables import AVERAGE, FIGURE_NAMES, MEAN_PER_CLASS, OVERALL, Cell, ResultTable

PAPER, BEFORE = "paper", "before adaptation"
_LARGEST_DISTANCE = 2.0
# What tells the runs of a suite apart.
_OF_A_RUN = {"run.method", "run.seed", "run.resume", "data.source", "data.target"}
# What may differ from one transfer task to the next: it is chosen by the size of the target.
_OF_A_TRANSFER_TASK = {"pseudo_labels.refresh_every"}


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
        parts = [_runs_part(suite, layout, points, samples), _sweep_part(suite, layout)]
        content = [part for part in parts if part is not None]
        if not content:
            begun = [*suite.runs, *(run for variant in suite.variants.values() for run in variant.runs)]
            raise UsageError(str(suite.path), found=f"{len(begun)} runs, none finished", expected="finished runs")
        finished = [run for of in (suite, *suite.variants.values()) for run in of.runs if run.finished]
        configs = [flat_settings(run.read_config()) for run in finished]
        settings = _distinct(configs)
        environment = _distinct([flat_settings(run.read_environment()) for run in finished])
        swept = {option.replace("-", "_") for name in suite.variants for option in read_settings(name)}
        html = template("suite.html.jinja").render(
            title="; ".join(part.title for part in content),
            finished=sum(part.finished for part in content),
            begun=sum(part.begun for part in content),
            tables=[table for part in content for table in part.tables],
            paired=[table for part in content for table in part.paired],
            sections=[section for part in content for section in part.sections if section.panels],
            mixed=[
                f"{name} is {' or '.join(values)}"
                for name, values in settings.items()
                if name not in _OF_A_RUN | FREE_TO_CHANGE
                and name.rpartition(".")[2] not in swept
                and _differ(name, configs)
            ],
            how={
                name: [(key, ["; ".join(values)], len(values) > 1) for key, values in found.items()]
                for name, found in (("Settings", settings), ("Environment", environment))
            },
        )
        with atomic_file(suite.report_path) as file:
            file.write(html.encode())
    except OSError as error:
        raise UsageError(
            "report",
            found=f"{error.filename or suite.path} ({error.strerror})",
            expected="a folder that can be written",
        ) from error
    return suite.report_path


def _distinct(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The values that each name has in the runs, every one once; `-` for none."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: list(dict.fromkeys(str(run.get(name, "-")) for run in runs)) for name in names}


def _differ(name: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a setting has several values in runs that it should be the same in."""
    found: dict[Any, set[str]] = {}
    for config in configs:
        transfer_task = (config.get("data.source"), config.get("data.target"))
        found.setdefault(transfer_task if name in _OF_A_TRANSFER_TASK else None, set()).add(str(config.get(name, "-")))
    return any(len(values) > 1 for values in found.values())


@dataclass(frozen=True)
class _Part:
    """What the page says about the runs of a folder, or about its sweep."""

    title: str
    finished: int
    begun: int
    tables: Sequence[ResultTable]
    paired: Sequence[PairedTable]
    sections: Sequence[Section]


def _runs_part(suite: SuiteFolder, layout: Layout, points: int, samples: int) -> _Part | None:
    runs = [_Run(run, result, run.read_metrics()) for run in suite.runs if (result := run.read_result())]
    if not runs:
        return None
    results = [run.result for run in runs]
    layout = layout.only(results)
    made = suite_tables(results, layout)
    colours = suite_plots.method_colours(layout.methods)
    return _Part(
        title=f"{layout.task}: {_counted(layout.methods, 'method')}, "
        f"{_counted(layout.transfer_tasks, 'transfer task')}, {_counted({r.seed for r in results}, 'seed')}",
        finished=len(runs),
        begun=len(suite.runs),
        tables=made,
        paired=paired_tables(suite.runs, layout) if len(layout.methods) > 1 else [],
        sections=[
            _bar_section(suite, made, colours),
            _accuracy_section(suite, runs, layout, colours),
            _alignment_section(suite, runs, layout, colours, samples),
            _detail_section(runs, layout, points),
        ],
    )


def _counted(things: Iterable[object], name: str) -> str:
    count = len(list(things))
    return f"{count} {name}{'s' if count != 1 else ''}"


# -------------------------------------------------------------------------------------------------------------- plots


def _bar_section(suite: SuiteFolder, made: Sequence[ResultTable], colours: Mapping[str, str]) -> Section:
    panels: list[Panel | None] = []
    for table in made:
        if table.choice != "last":
            continue
        published = {row.label: [cell.mean for cell in row.cells] for row in table.rows if row.kind == "paper"}
        rows = [
            suite_plots.Bars(row.label, row.cells, colours[row.label], published.get(row.label, ()))
            for row in table.rows
            if row.kind == "ours"
        ]
        about = f"{table.subject} ".lstrip()
        for index, column in enumerate(table.columns):
            chosen = _columns(rows, [index])
            # Of a table by classes the averages alone: each class has a group of bars below.
            if (table.subject and column not in (MEAN_PER_CLASS, OVERALL)) or not _measured(chosen):
                continue
            title = f"{about}{'average over the transfer tasks' if column == AVERAGE else column}"
            unit = "percent" if table.subject else f"{FIGURE_NAMES[table.figure]}, percent"
            figure = suite_plots.method_bars(chosen, title, unit, marked=PAPER)
            path = suite.plot_path(f"accuracy_{about}{column}")
            panels.append(panel(figure, path, f"Accuracy of each method: {title}"))
        classes = [i for i, name in enumerate(table.columns) if name not in (MEAN_PER_CLASS, OVERALL)]
        if table.subject and classes:
            chosen = _columns(rows, classes)
            title = f"{about}accuracy of each class"
            figure = suite_plots.bars(chosen, [table.columns[i] for i in classes], title, "percent", marked=PAPER)
            path = suite.plot_path(f"accuracy_{about}classes")
            panels.append(panel(figure, path, f"Accuracy of each method: {title}"))
    return Section(
        "Methods compared",
        "Accuracy after the last step, nothing chosen; the thin line on a bar is the standard deviation over seeds.",
        drawn(panels),
    )


def _columns(rows: Sequence[suite_plots.Bars], chosen: Sequence[int]) -> list[suite_plots.Bars]:
    return [
        replace(
            row,
            cells=[row.cells[i] for i in chosen],
            marks=[row.marks[i] for i in chosen] if row.marks else (),
        )
        for row in rows
    ]


def _measured(rows: Sequence[suite_plots.Bars]) -> bool:
    return any(cell.mean is not None for row in rows for cell in row.cells)


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
            f"{name}: {FIGURE_NAMES[layout.figure]} on the target",
            "percent",
            warmup,
        )
        path = suite.plot_path(f"curves_{name}")
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
    panels += _distance_panels(suite, runs, layout, colours, samples)
    return Section(
        "Alignment",
        "Lines are means over all transfer tasks and seeds, bands one standard deviation. Synchronized levels have "
        "equal magnitudes, so their lines lie together and the mismatch is near 0. A discriminator that cannot tell "
        "the domains apart has an adversarial loss of 0.69. The proxy A-distance is 2 where a linear classifier, "
        "cross-validated on the features, tells the domains apart, and 0 where it does no better than chance; the "
        "marks are of the features before adaptation, at the end of warm-up.",
        drawn(panels),
    )


def _distance_panels(
    suite: SuiteFolder, runs: Sequence[_Run], layout: Layout, colours: Mapping[str, str], samples: int
) -> list[Panel | None]:
    """The proxy A-distance of each method after the last step, marked with what it was before adaptation."""
    before, after = _distances(runs, "warmup", samples), _distances(runs, "final", samples)
    if not after:
        return []
    names = [tables.transfer_task_name(*pair, layout.short_names) for pair in layout.transfer_tasks]
    by_column = [*([(pair,) for pair in layout.transfer_tasks]), layout.transfer_tasks]
    rows = []
    for method in layout.methods:
        cells, marks = (
            [
                Cell.of(
                    [distance for run, distance in found if run.result.method == method and run.transfer_task in of]
                )
                for of in by_column
            ]
            for found in (after, before)
        )
        rows.append(suite_plots.Bars(method, cells, colours[method], [cell.mean for cell in marks]))
    title, unit = "Proxy A-distance", "2 (1 - 2 · error)"
    figure = suite_plots.method_bars(
        _columns(rows, [len(names)]),
        f"{title} after the last step" + (", all transfer tasks" if len(names) > 1 else ""),
        unit,
        marked=BEFORE,
        limit=_LARGEST_DISTANCE,
        decimals=2,
    )
    panels = [panel(figure, suite.plot_path("proxy_a_distance"), f"{title} of each method")]
    if len(names) > 1:
        by_task = _columns(rows, range(len(names)))
        figure = suite_plots.bars(by_task, names, f"{title} of each transfer task", unit, marked=BEFORE)
        path = suite.plot_path("proxy_a_distance_tasks")
        panels.append(panel(figure, path, f"{title} of each method and transfer task"))
    return panels


def _distances(runs: Sequence[_Run], moment: Literal["warmup", "final"], samples: int) -> list[tuple[_Run, float]]:
    found = []
    for run in runs:
        features = run.folder.read_features()
        source, target = (getattr(features, f"{domain}_{moment}", None) for domain in ("source", "target"))
        if source is None or target is None:
            continue
        distance = alignment.proxy_a_distance(source, target, samples)
        if distance is not None:
            found.append((run, distance))
    return found


def _detail_section(runs: Sequence[_Run], layout: Layout, points: int) -> Section:
    pair = layout.transfer_tasks[0]
    seed = min(run.result.seed for run in runs)
    panels: list[Panel | None] = []
    # Of the methods, the first (what the others are compared with) and the last: each plot takes seconds.
    for method in dict.fromkeys((layout.methods[0], layout.methods[-1])):
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
        "same colour. The report on a run's own folder shows this and more of any run.",
        drawn(panels),
        in_pairs=True,
    )


# -------------------------------------------------------------------------------------------------------------- sweep


def sweep_plots(made: Sequence[ResultTable]) -> dict[str, Figure]:
    """The average over transfer tasks after the last step, over the settings; plots by the names of their files.

    The first setting is the horizontal axis, each value of the second a line, and each combination of the others a
    plot. A method's plots have one scale.

    Args:
        made: from `sweep_tables`.
    """
    figures: dict[str, Figure] = {}
    for table in made:
        if table.choice != "last":
            continue
        lines: dict[str, dict[str, dict[str, Cell]]] = {}
        parameter = ""
        for row in table.rows:
            (parameter, value), *others = read_settings(row.label).items()
            line, of_plot = (
                ", ".join(f"{name} {setting}" for name, setting in chosen) for chosen in (others[:1], others[1:])
            )
            # The last column: the average, or the only transfer task.
            lines.setdefault(of_plot, {}).setdefault(line, {})[value] = row.cells[-1]
        over = table.columns[-1] if table.columns[-1] != AVERAGE else "average"
        drawn = {}
        for of_plot, content in lines.items():
            title = ", ".join(part for part in (table.task, table.subject, over, of_plot) if part)
            name = f"{table.subject} {of_plot}".strip()
            drawn[name] = suite_plots.sweep(content, parameter, f"{FIGURE_NAMES[table.figure]}, percent", title)
        ends = [figure.axes[0].get_ylim() for figure in drawn.values()]
        for figure in drawn.values():
            figure.axes[0].set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        figures |= drawn
    return figures


def _sweep_part(suite: SuiteFolder, layout: Layout) -> _Part | None:
    variants = {name: found for name, variant in suite.variants.items() if (found := variant.results())}
    results = [result for of_variant in variants.values() for result in of_variant]
    if not results:
        return None
    layout = layout.only(results)
    made = sweep_tables(variants, layout)
    panels = [
        panel(figure, suite.sweep_plot_path(name), f"Accuracy of {name} over the settings")
        for name, figure in sweep_plots(made).items()
    ]
    options = list(read_settings(next(iter(variants))))
    return _Part(
        title=f"{layout.task}: sweep over {', '.join(options)}",
        finished=len(results),
        begun=sum(len(variant.runs) for variant in suite.variants.values()),
        tables=made,
        # Of several options, neighbours in the list differ now in one and now in another.
        paired=paired_sweep_tables(variants, layout) if len(options) == 1 else [],
        sections=[Section("Sensitivity", "After the last step; bars: standard deviation over seeds.", drawn(panels))],
    )
