"""The report: one self-contained HTML page about groups of runs, and its plots as PNG files.

A group is a method's runs in a suite, over transfer tasks and seeds; on a page about single runs each is its own group.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from matplotlib.figure import Figure

from gsda_fast.console import counted, duration
from gsda_fast.errors import UsageError
from gsda_fast.files import atomic_file
from gsda_fast.results import alignment, plots, tables
from gsda_fast.results.metrics import confusion_matrix
from gsda_fast.results.records import LABEL_FREE_CRITERION, NORM, RunResult, Selection, loss_terms
from gsda_fast.results.run_folder import FREE_TO_CHANGE, RunFolder, flat_settings
from gsda_fast.results.suite_folder import (
    Layout,
    SuiteFolder,
    over_transfer_tasks,
    paired_sweep_tables,
    paired_tables,
    read_settings,
    score_tables,
    setting_score_tables,
    suite_tables,
)
from gsda_fast.results.tables import AVERAGE, CHOICE_NAMES, MEAN_PER_CLASS, METRIC_NAMES, OVERALL, ResultTable, Table

MOMENTS = {"warmup": "before adaptation", "final": "after the last step"}
# What tells the runs of a suite apart.
_OF_A_RUN = {"run.method", "run.seed", "run.resume", "data.source", "data.target"}
# What may differ from one transfer task to the next: it is chosen by the size of the target.
_OF_A_TRANSFER_TASK = {"pseudo_labels.refresh_every"}
_MOST_DETAILED = 4
"""Single runs with plots of their own on one page: each takes seconds. Of more, the first and the last two."""
_MOST_RECORDS = 2000
"""Records of a run that are drawn, beside its evaluations."""
_MOST_MEASURED = 24
"""Runs whose domains' distance is measured; of more, those of one seed, and then of one transfer task."""


@dataclass(frozen=True, eq=False)
class _Run:
    """What the page says about one run, read when it is first asked for."""

    folder: RunFolder
    samples: int
    result: RunResult | None
    label: str = ""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Task, source, target, method and seed; None where the run has not stored one."""
        names = ("task", "source", "target", "method", "seed")
        return {name: getattr(self.result, name) if self.result else self.folder.setting(name) for name in names}

    @property
    def transfer_task(self) -> tuple[Any, Any]:
        return self.identity["source"], self.identity["target"]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        records = self.folder.read_metrics()
        stride = -(-len(records) // _MOST_RECORDS) or 1
        return [each for number, each in enumerate(records[::-1]) if number % stride == 0 or "accuracy" in each][::-1]

    def series(self, name: str) -> plots.Curve:
        return alignment.series(self.records, name)

    def distance(self, moment: str) -> float | None:
        features = self.folder.read_features()
        at = None if features is None else features.at(moment)
        return None if at is None else alignment.proxy_a_distance(*at, self.samples)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; their numbers while the run has not finished."""
        if self.result is not None:
            return self.result.classes
        features = self.folder.read_features()
        return () if features is None else tuple(map(str, range(1 + int(features.source_labels.max(initial=0)))))

    @property
    def last_step(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    @property
    def of_steps(self) -> str:
        """` of N` steps that were asked for, if that is known."""
        steps = self.folder.setting("steps")
        return f" of {steps}" if steps else ""

    def selection(self, metric: str) -> Selection:
        """Return the result's metric; of an unfinished run the last and the highest so far."""
        if self.result is not None:
            return getattr(self.result, metric)
        values = self.series(metric)[1]
        values = values[np.isfinite(values)]
        return Selection(last=float(values[-1]), best=float(values.max())) if len(values) else Selection()


@dataclass(frozen=True)
class _Panel:
    """One plot of a page: a data URL, so that the page needs no other file, and what it shows in words."""

    source: str
    alternative: str
    starts_row: bool = False


@dataclass
class _Section:
    """A heading, a sentence on how to read the tables or plots, and these."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    in_pairs: bool = False
    panels: list[_Panel] = field(default_factory=list)

    def add(self, figure: Figure | None, path: Path, alternative: str, starts_row: bool = False) -> bool:
        """Add the plot, if there is one, and keep it as a PNG file; return whether there is one."""
        if figure is None:
            return False
        image = plots.png(figure)
        with atomic_file(path) as file:
            file.write(image)
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        self.panels.append(_Panel(source, tables.printable(alternative), starts_row))
        return True


def write_page(folders: Sequence[RunFolder], folder: Path, *, points: int = 400) -> Path:
    """Draw the plots and write the page about one run or several.

    The plots of one run alone are kept as PNG files in its folder, those that compare the runs beside the page.

    Args:
        folders: at least one; a run that has not finished is shown as far as it came.
        folder: where to write the page; for a single run its own folder.
        points: samples of each domain in a t-SNE plot, at most.

    Returns:
        The page's path.

    Raises:
        UsageError: a run's file is broken, or a folder cannot be written.
    """
    page = SuiteFolder(folder)
    with _writing(folder):
        read = [_Run(each, 500, each.read_result()) for each in folders]
        runs = [_Run(run.folder, run.samples, run.result, label) for run, label in zip(read, _labels(read))]
        groups = _Groups(page, {run.label: [run] for run in runs})
        results = [run.result for run in runs if run.result is not None]
        detailed = runs if len(runs) <= _MOST_DETAILED else [*runs[:2], *runs[-2:]]
        _render(
            page,
            kicker=f"{len(runs)} run{'s' if len(runs) > 1 else ''}",
            title=_title(runs),
            notices=[
                (
                    f"{run.label} has not finished.",
                    f"Its records end at step {run.last_step}{run.of_steps}; its figures are those "
                    "of the evaluations so far and no result. The training command that made it, given again, resumes "
                    "it.",
                )
                for run in runs
                if run.result is None
            ],
            runs=runs,
            tested=_tested(runs),
            sections=[
                _Section("Means over seeds and transfer tasks", tables=_means(results)),
                _accuracy_section(groups, {"": runs}, ("accuracy", "mean_per_class", "mutual_information")),
                _classes_section(groups),
                _detail_section(detailed, "Predictions and features", tuple(MOMENTS), points),
                _loss_section(groups),
                _alignment_section(groups),
            ],
            columns=[run.label for run in runs] if len(runs) > 1 else [],
            how={
                name: [(key, list(values), values.nunique() > 1) for key, values in stored.items()]
                for name, stored in _stored(folders).items()
            },
        )
    return page.report_path


def write_suite_page(suite: SuiteFolder, layout: Layout, *, points: int = 400, samples: int = 500) -> Path:
    """Draw the plots and write the page about the runs that have finished, beside the suite's tables.

    Args:
        suite: its plots are kept as PNG files in its folder. layout: order of methods and transfer tasks, names.
        points: samples of each domain in a t-SNE plot, at most. samples: likewise for the proxy A-distance.

    Returns:
        The page's path.

    Raises:
        UsageError: no run has finished, a run's file is broken, or the folder cannot be written.
    """
    with _writing(suite.path):
        begun = [*suite.runs, *(run for variant in suite.variants.values() for run in variant.runs)]
        finished = [run for run in begun if run.finished]
        if not finished:
            raise UsageError(str(suite.path), found=f"{len(begun)} runs, none finished", expected="finished runs")
        parts = [part for part in (_runs_part(suite, layout, points, samples), _sweep_part(suite, layout)) if part]
        stored = _stored(finished)
        mixed = _mixed(stored["Settings"], suite)
        notices = []
        if len(finished) < len(begun):
            left = f"{len(begun) - len(finished)} of {len(begun)} runs have not finished"
            remark = "and take no part in the figures below. The suite's command, given again, goes on with them."
            notices.append((left, remark))
        if mixed:
            shared = f"so that their figures are not of one protocol: {'; '.join(mixed)}."
            notices.append(("These runs do not share their settings,", shared))
        _render(
            suite,
            kicker=f"a suite of {counted(len(finished), 'run')}",
            title="; ".join(title for title, _ in parts),
            notices=notices,
            sections=[section for _, sections in parts for section in sections],
            how={
                name: [(key, ["; ".join(values.unique())], values.nunique() > 1) for key, values in of.items()]
                for name, of in stored.items()
            },
        )
    return suite.report_path


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(
            "report", found=f"{error.filename or folder} ({error.strerror})", expected="a folder that can be written"
        ) from error


def _render(page: SuiteFolder, *, sections: Sequence[_Section], **content: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Names come from files, and may hold control characters.
        finalize=lambda shown: tables.printable(shown) if type(shown) is str else shown,
    )
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:.1f}"
    environment.filters["duration"] = duration
    environment.filters["lines"] = _lines
    shown = [section for section in sections if section.panels or section.tables]
    defaults: dict[str, Any] = {"runs": [], "tested": [], "columns": []}
    html = environment.get_template("page.html.jinja").render(sections=shown, **(defaults | content))
    with atomic_file(page.report_path) as file:
        file.write(html.encode())


def _lines(table: Table) -> list[tuple[str, str, list[Markup]]]:
    """Return, for each row of a table, its CSS classes, its heading and its cells, the highest of a column in bold."""
    texts = table.texts.to_numpy().tolist()
    ours = [
        cells["mean"].to_numpy() for _, cells in table.rows if isinstance(table, ResultTable) and _kind(cells) == "ours"
    ]
    highest = pd.DataFrame(ours).max().tolist() if len(ours) > 2 else [math.nan] * len(table.columns)
    lines, before = [], ""
    for ((*_, last), cells), (heading, *shown) in zip(table.rows, texts):
        classes = ["beside"] * (_kind(cells) != "ours") + ["bound"] * (getattr(table, "choice", "") == "best")
        if "minus" in cells:
            classes += ["rule"] * (before not in ("", last))
            before = last
        best = [_kind(cells) == "ours" and value == top for value, top in zip(cells.get("mean", ()), highest)]
        best += [False] * (len(shown) - len(best))
        lines.append((" ".join(classes), heading, list(map(_cell, shown, best))))
    return lines


def _kind(cells: pd.DataFrame) -> str:
    return str(cells["kind"].iloc[0]) if "kind" in cells else "ours"


def _cell(text: str, best: bool) -> Markup:
    mean, plus_minus, spread = text.partition(" ± ")
    shown = Markup("<b>{}</b>" if best else "{}").format(mean)
    return shown + Markup(" <small>± {}</small>").format(spread) if plus_minus else shown


# ------------------------------------------------------------------------------------------------ settings and names


def _labels(runs: Sequence[_Run]) -> list[str]:
    """Return the shortest names that tell the runs apart: the method, and the transfer task and the seed where they
    differ.
    """
    pairs = [" → ".join(map(str, run.transfer_task)) for run in runs]
    seeds = [f"seed {run.identity['seed']}" for run in runs]
    labels = [
        ", ".join([pair] * (len(set(pairs)) > 1) + [str(run.identity["method"])] + [seed] * (len(set(seeds)) > 1))
        for run, pair, seed in zip(runs, pairs, seeds)
    ]
    if len(set(labels)) < len(labels) or any(run.identity["method"] is None for run in runs):
        names = [run.folder.path.resolve().name for run in runs]
        return names if len(set(names)) == len(names) else [str(run.folder.path) for run in runs]
    return labels


def _title(runs: Sequence[_Run]) -> str:
    described = {(run.identity["task"], *run.transfer_task) for run in runs}
    if len(described) == 1:
        task, source, target = described.pop()
        return f"{task}: {source} → {target}" if task else runs[0].label
    tasks = {str(task) for task, _, _ in described}
    return f"{', '.join(sorted(tasks))}: {len(described)} transfer tasks"


def _means(results: Sequence[RunResult]) -> list[ResultTable]:
    """Return means over seeds and transfer tasks, where there are several of either."""
    cells = {(result.task, *result.transfer_task, result.method) for result in results}
    pairs = {result.transfer_task for result in results}
    distinct = {(result.method, *result.transfer_task, result.seed) for result in results}
    one_task = len({result.task for result in results}) == 1
    if not one_task or len(distinct) < len(results) or (len(pairs) == 1 and len(cells) == len(results)):
        return []
    return [tables.transfer_table(results, choice=choice) for choice in CHOICE_NAMES]


def _tested(runs: Sequence[_Run]) -> list[str]:
    """Return how the target's images were tested; for each run, if not all alike."""
    notes = [(run.label, note) for run in runs if run.result is not None for note in tables.test_notes([run.result])]
    different = list(dict.fromkeys(note for _, note in notes))
    return different if len(different) < 2 else [f"{label}: {note}" for label, note in notes]


def _stored(folders: Sequence[RunFolder]) -> dict[str, pd.DataFrame]:
    """Return settings and environment, a row a run, as texts; `-` where a run has no such entry."""
    stored = {
        "Settings": [flat_settings(folder.read_config()) for folder in folders],
        "Environment": [flat_settings(folder.read_environment()) for folder in folders],
    }
    return {name: pd.DataFrame(of, dtype=object).fillna("-").map(str) for name, of in stored.items()}


def _mixed(settings: pd.DataFrame, suite: SuiteFolder) -> list[str]:
    """Return the settings that have several values in runs that should share them, and these values."""
    swept = {option.replace("-", "_") for name in suite.variants for option in read_settings(name)}
    mixed = []
    for name, values in settings.items():
        if str(name) in _OF_A_RUN | FREE_TO_CHANGE or str(name).rpartition(".")[2] in swept:
            continue
        if name in _OF_A_TRANSFER_TASK:
            different = values.groupby([settings["data.source"], settings["data.target"]]).nunique().max()
        elif str(name).startswith("adaptation.add."):  # some methods are such a term
            different = values.groupby(settings["run.method"]).nunique().max()
        elif str(name).startswith("method."):  # a method's own: others have no such entry
            values = values[values != "-"]
            different = values.groupby(settings["run.method"]).nunique().max()
        else:
            different = values.nunique()
        if different > 1:
            mixed.append(f"{name} is {' or '.join(values.unique())}")
    return mixed


# ----------------------------------------------------------------------------------------------------------- sections


@dataclass(frozen=True, eq=False)
class _Groups:
    """The runs of each group, and where the plots that compare groups go."""

    page: SuiteFolder
    groups: Mapping[str, Sequence[_Run]]

    @property
    def runs(self) -> list[_Run]:
        return [run for runs in self.groups.values() for run in runs]

    @property
    def single(self) -> bool:
        """Whether each group is one run, with a folder for its plots."""
        return all(run.label for run in self.runs)

    @cached_property
    def styles(self) -> dict[str, plots.Style]:
        return plots.styles(list(self.groups))

    @cached_property
    def warmup(self) -> int:
        """The warm-up to shade: runs with different ones have no common one."""
        warmups = {run.folder.setting("warmup") or 0 for run in self.runs}
        return warmups.pop() if len(warmups) == 1 else 0

    def curves(
        self, measure: Callable[[_Run], plots.Curve], title: str, unit: str, among: Sequence[_Run] | None = None
    ) -> Figure | None:
        chosen = {
            label: [measure(run) for run in runs if among is None or run in among]
            for label, runs in self.groups.items()
        }
        return plots.curves(chosen, title, unit, self.styles, self.warmup)


def _accuracy_section(groups: _Groups, facets: Mapping[str, Sequence[_Run]], names: Sequence[str]) -> _Section:
    section = _Section(
        "Evaluations during training",
        "Measured on all target samples. "
        + (
            "The mutual information needs no label; where it is largest, the label-free choice is made."
            if groups.single
            else "The line is the mean over seeds, the band one standard deviation."
        ),
    )
    titles = {str(name): words for name, words in METRIC_NAMES.items()}
    titles["mutual_information"] = "mutual information of the predictions"
    for facet, runs in facets.items():
        for name in names:
            unit = "nats" if name == "mutual_information" else "percent"
            title = f"{facet}: {titles[name]}" if facet else titles[name].capitalize()
            figure = groups.curves(lambda run, name=name: run.series(name), f"{title} on the target", unit, runs)  # type: ignore[misc]
            path = groups.page.plot_path(f"curves_{facet}" if facet else name)
            section.add(figure, path, f"{title} over the steps")
    return section


def _classes_section(groups: _Groups) -> _Section:
    section = _Section("Classes", "Accuracy of each class after the last step.")
    spaces: dict[tuple[str, ...], dict[str, tuple[float | None, ...]]] = {}
    for run in groups.runs:
        if run.result is not None and any(value is not None for value in run.result.per_class):
            spaces.setdefault(run.result.classes, {})[run.label] = run.result.per_class
    for number, (classes, of_runs) in enumerate(spaces.items()):
        means = pd.DataFrame(list(of_runs.values()), index=list(of_runs), columns=list(classes), dtype=float)
        figure = plots.bars(means, "Accuracy per class", "percent", groups.styles, missing="absent")
        path = groups.page.plot_path(f"per_class_{number}" if number else "per_class")
        section.add(figure, path, "Accuracy of each class")
    return section


def _detail_section(runs: Sequence[_Run], title: str, moments: Sequence[str], points: int) -> _Section:
    section = _Section(
        title,
        "A row of a confusion matrix adds up to 100 percent of that class's samples. In a t-SNE plot each point is an "
        "image, placed so that neighbours have similar features; colour is the true class. Adaptation should lay the "
        "target (crosses) onto the source (dots) of the same colour. Distances between clusters and between plots mean "
        "nothing. The proxy A-distance is 2 where a linear classifier, cross-validated on the features, tells the "
        "domains apart, and 0 where it does no better than chance.",
        in_pairs=True,
    )
    for run in runs:
        name = run.label or str(run.identity["method"])
        starts_row = True
        predictions, features = run.folder.read_predictions(), run.folder.read_features()
        if predictions is not None and (predictions.labels >= 0).any() and run.classes:
            counts = confusion_matrix(*map(torch.from_numpy, (predictions.labels, predictions.probabilities))).numpy()
            figure = plots.confusion_matrix(counts, run.classes, f"Confusion matrix: {name}")
            section.add(figure, run.folder.plot_path("confusion"), f"Confusion matrix of {name}", True)
            starts_row = len(moments) > 1
        for moment in moments:
            at = None if features is None else features.at(moment)
            if features is None or at is None:
                continue
            distance = run.distance(moment)
            remark = "" if distance is None else f", proxy A-distance {distance:.2f}"
            drawn = plots.tsne(
                at,
                (features.source_labels, features.target_labels),
                classes=run.classes,
                title=f"{name}, {MOMENTS[moment]}{remark}",
                points=points,
            )
            path = run.folder.plot_path(f"tsne_{moment}")
            added = section.add(drawn, path, f"Features of {name}, {MOMENTS[moment]}", starts_row)
            starts_row = starts_row and not added
    return section


def _loss_section(groups: _Groups) -> _Section:
    section = _Section(
        "Losses",
        "Without their weights, each as the step that minimizes it saw it. A discriminator that cannot tell the "
        "domains apart has an adversarial loss of 0.69.",
    )
    for name in loss_terms(record for run in groups.runs for record in run.records):
        title = f"Loss: {name.replace('_', ' ')}"
        figure = groups.curves(lambda run, name=name: run.series(name), title, "unweighted")  # type: ignore[misc]
        section.add(figure, groups.page.plot_path(f"loss_{name}"), f"{title} over the steps")
    return section


def _alignment_section(groups: _Groups) -> _Section:
    section = _Section(
        "Alignment",
        "Synchronized levels have equal gradient magnitudes: their lines lie together, and the mismatch is near 0. The "
        "proxy A-distance is 2 where a linear classifier, cross-validated on the features, tells the domains apart, "
        "and 0 where it does no better than chance; the marks are of the features before adaptation, at the end of "
        "warm-up. A discriminator's domain accuracy is 0.5 by chance: where it stays near 1 the encoder loses, near "
        "0.5 the domains are mixed, or the discriminator has stopped learning, which the proxy A-distance tells apart.",
    )
    names = dict.fromkeys(name for run in groups.runs for each in run.records for name in each if name.startswith(NORM))
    levels = {name: plots.LEVEL_STYLES.get(name.removeprefix(NORM)) for name in names}
    labels = {name: known[0] if known else name.removeprefix(NORM) for name, known in levels.items()}
    spare = plots.styles(list(names))
    styles = {labels[name]: known[1] if known else spare[name] for name, known in levels.items()}
    for label, runs in groups.groups.items():
        by_level = {labels[name]: [run.series(name) for run in runs] for name in names}
        path = groups.page.plot_path(f"gradient_norms_{label}")
        if groups.single:
            path = runs[0].folder.plot_path("gradient_norms")
        figure = plots.curves(by_level, f"Gradient magnitudes: {label}", "sum of ‖∂L/∂f‖", styles, groups.warmup)
        section.add(figure, path, f"Gradient magnitudes of {label}")
    title = "Relative mismatch of the gradient magnitudes"
    figure = groups.curves(lambda run: alignment.relative_mismatch(run.records), title, alignment.MISMATCH_FORMULA)
    section.add(figure, groups.page.plot_path("relative_mismatch"), f"{title} over the steps")
    title = "Domain accuracy of the discriminators"
    figure = groups.curves(lambda run: run.series("domain_accuracy"), title, "share of a batch, 0.5 by chance")
    section.add(figure, groups.page.plot_path("domain_accuracy"), f"{title} over the steps")
    if len(groups.runs) > 1 or not groups.single:
        _add_distances(section, groups)
    return section


def _add_distances(section: _Section, groups: _Groups) -> None:
    """Add the proxy A-distance of each group after the last step, marked with what it was before adaptation."""
    runs = groups.runs
    if len(runs) > _MOST_MEASURED:
        first = min(run.identity["seed"] for run in runs)
        runs = [run for run in runs if run.identity["seed"] == first]
        if len(runs) > _MOST_MEASURED:
            runs = [run for run in runs if run.transfer_task == runs[0].transfer_task]
    lines = [
        (label, " → ".join(map(str, run.transfer_task)), run.distance("final"), run.distance("warmup"))
        for label, of_group in groups.groups.items()
        for run in of_group
        if run in runs
    ]
    frame = pd.DataFrame(lines, columns=["label", "column", "mean", "mark"]).astype({"mean": float, "mark": float})
    frame = frame.dropna(subset="mean")
    if frame.empty:
        return
    title, unit, marked = "Proxy A-distance", "2 (1 - 2 · error)", "before adaptation"
    by_group = frame.groupby("label")[["mean", "mark"]].mean().assign(spread=frame.groupby("label")["mean"].std())
    several = frame["column"].nunique() > 1 and not groups.single
    all_measured = len({run.transfer_task for run in groups.runs}) == len({run.transfer_task for run in runs})
    where = ", all transfer tasks" if several else "" if all_measured else f", {frame['column'].iloc[0]}"
    figure = plots.ranking(
        by_group.reindex(groups.groups), f"{title} after the last step{where}", unit, groups.styles,
        marked=marked, limit=2.0, decimals=2,
    )  # fmt: skip
    each = "run" if groups.single else "method"
    section.add(figure, groups.page.plot_path("proxy_a_distance"), f"{title} of each {each}{'' if several else where}")
    if several:
        columns = frame["column"].unique()
        by_task = frame.pivot_table(index="label", columns="column", values=["mean", "mark"], aggfunc="mean")
        by_task = by_task.reindex(groups.groups)
        marks = by_task["mark"].reindex(columns=columns) if "mark" in by_task else None
        figure = plots.bars(
            by_task["mean"].reindex(columns=columns), f"{title} of each transfer task", unit, groups.styles,
            marks=marks, marked=marked,
        )  # fmt: skip
        path = groups.page.plot_path("proxy_a_distance_tasks")
        section.add(figure, path, f"{title} of each method and transfer task")


# -------------------------------------------------------------------------------------------------------------- suite

_PAIRED = (
    "Paired differences",
    "Two runs of one transfer task and seed have much of their noise in common, so that their difference has less of "
    "it than either of them.",
)
_Part = tuple[str, list[_Section]]
"""The title and the sections about the runs of a folder, or about its sweep."""


def _runs_part(suite: SuiteFolder, layout: Layout, points: int, samples: int) -> _Part | None:
    runs = [_Run(run, samples, result) for run in suite.runs if (result := run.read_result())]
    results = [run.result for run in runs if run.result is not None]
    if not results:
        return None
    layout = layout.only(results)
    labelled = layout.labelled(results)
    made = suite_tables(results, layout) if labelled else []
    groups = _Groups(suite, {name: [run for run in runs if run.identity["method"] == name] for name in layout.methods})
    facets = {
        tables.transfer_task_name(*pair, layout.short_names): [run for run in runs if run.transfer_task == pair]
        for pair in layout.transfer_tasks
    }
    # Of the methods, the first (what the others are compared with) and the last: each plot takes seconds.
    seed, pair = min(result.seed for result in results), layout.transfer_tasks[0]
    ends = [groups.groups[name] for name in dict.fromkeys((layout.methods[0], layout.methods[-1]))]
    detailed = [run for of in ends for run in of if (run.transfer_task, run.identity["seed"]) == (pair, seed)]
    where = next(iter(facets)).replace("->", " → ")
    title = (
        f"{layout.task}: {counted(len(layout.methods), 'method')}, "
        f"{where if len(facets) == 1 else counted(len(facets), 'transfer task')}, "
        f"{counted(len({r.seed for r in results}), 'seed')}"
    )
    return title, [
        _Section("Accuracy on the target domain", tables=made),
        _Section(*_PAIRED, paired_tables(suite.runs, layout) if len(layout.methods) > 1 else []),
        _Section(
            "Choices without labels",
            "Each score looks at the unlabelled predictions alone.",
            score_tables(suite.runs, layout),
        ),
        _bar_section(groups, [table for table in over_transfer_tasks(made) if table.metric == layout.metric] or made),
        _accuracy_section(groups, facets, (layout.metric if labelled else LABEL_FREE_CRITERION,)),
        _loss_section(groups),
        _alignment_section(groups),
        _detail_section(detailed, f"In detail: {where}, seed {seed}", ("final",), points),
    ]


def _bar_section(groups: _Groups, made: Sequence[ResultTable]) -> _Section:
    section = _Section(
        "Methods compared",
        "Accuracy after the last step, nothing chosen; the thin line on a bar is the standard deviation over seeds.",
    )
    for table in made:
        if table.choice != "last":
            continue
        means, spreads, marks = (
            pd.DataFrame({label: cells[name].array for (label, kind, _), cells in table.rows if kind == of}).T
            for of, name in (("ours", "mean"), ("ours", "spread"), ("paper", "mean"))
        )
        marks = marks.reindex(index=means.index, columns=means.columns).astype(float)
        about = f"{table.subject} ".lstrip()
        averages = [place for place, name in enumerate(table.columns) if name in (MEAN_PER_CLASS, OVERALL)][-2:]
        for place, column in enumerate(table.columns):
            # Of a table by classes the averages alone: each class has a group of bars below.
            if (table.subject and place not in averages) or means[place].isna().all():
                continue
            cells = pd.DataFrame({"mean": means[place], "spread": spreads[place], "mark": marks[place]})
            title = f"{about}{'average over the transfer tasks' if column == AVERAGE else column}"
            unit = "percent" if table.subject else f"{METRIC_NAMES[table.metric]}, percent"
            figure = plots.ranking(cells, title, unit, groups.styles, marked="paper")
            path = groups.page.plot_path(f"accuracy_{about}{column}")
            section.add(figure, path, f"Accuracy of each method: {title}")
        if table.subject and len(table.columns) > 2:
            means, spreads, marks = (frame.iloc[:, :-2] for frame in (means, spreads, marks))
            means.columns, title = list(table.columns[:-2]), f"{about}accuracy of each class"
            figure = plots.bars(
                means, title, "percent", groups.styles, spreads=spreads, marks=marks, marked="paper"
            )  # fmt: skip
            section.add(figure, groups.page.plot_path(f"accuracy_{about}classes"), f"Accuracy of each method: {title}")
    return section


def sweep_plots(made: Sequence[ResultTable]) -> dict[str, Figure]:
    """Draw the average over transfer tasks after the last step, over the settings; by the names of the plots' files.

    The first setting is the horizontal axis, each value of the second a line, and each combination of the others a
    plot. A method's plots have one scale.

    Args:
        made: from `tables.sweep_tables`.
    """
    figures: dict[str, Figure] = {}
    for table in made:
        if table.choice != "last":
            continue
        settings = [read_settings(label) for (label, *_), _ in table.rows]
        parameter, *others = settings[0]
        # The last column: the average, or the only transfer task.
        frame = pd.DataFrame([cells.iloc[-1][["mean", "spread"]] for _, cells in table.rows], dtype=float)
        frame.index = pd.Index([each[parameter] for each in settings])
        frame["line"], frame["plot"] = (
            [", ".join(f"{name} {each[name]}" for name in names) for each in settings]
            for names in (others[:1], others[1:])
        )
        over = table.columns[-1] if table.columns[-1] != AVERAGE else "average"
        drawn = {}
        for of_plot, content in frame.groupby("plot", sort=False):
            lines = {str(line): of_line for line, of_line in content.groupby("line", sort=False)}
            title = ", ".join(part for part in (table.task, table.subject, over, str(of_plot)) if part)
            unit = f"{METRIC_NAMES[table.metric]}, percent"
            drawn[f"{table.subject} {of_plot}".strip()] = plots.sweep(lines, parameter, unit, title)
        ends = [figure.axes[0].get_ylim() for figure in drawn.values()]
        for figure in drawn.values():
            figure.axes[0].set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        figures |= drawn
    return figures


def sweep_section(suite: SuiteFolder, made: Sequence[ResultTable]) -> _Section:
    """Draw the plots of a sweep, and keep them in the suite's folder."""
    section = _Section("Sensitivity", "After the last step; bars: standard deviation over seeds.")
    for name, figure in sweep_plots(made).items():
        section.add(figure, suite.plot_path(f"sweep_{name}"), f"Accuracy of {name} over the settings")
    return section


def _sweep_part(suite: SuiteFolder, layout: Layout) -> _Part | None:
    variants = {name: found for name, variant in suite.variants.items() if (found := variant.results())}
    results = [result for of_variant in variants.values() for result in of_variant]
    if not results:
        return None
    layout = layout.only(results)
    made = tables.sweep_tables(variants, **layout.table) if layout.labelled(results) else []
    options = list(read_settings(next(iter(variants))))
    return f"{layout.task}: sweep over {', '.join(options)}", [
        _Section("Accuracy on the target domain", tables=made),
        # Of several options, neighbours in the list differ now in one and now in another.
        _Section(*_PAIRED, paired_sweep_tables(variants, layout) if len(options) == 1 else []),
        _Section(
            "Settings chosen without labels",
            "Each score looks at the unlabelled predictions alone.",
            setting_score_tables({name: suite.variants[name].runs for name in variants}, layout),
        ),
        sweep_section(suite, made),
    ]
