"""Tables of runs: methods by transfer tasks, with mean and spread over seeds; paired differences; label-free scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from gsda_fast.data.benchmarks import find_benchmark
from gsda_fast.errors import UsageError
from gsda_fast.results.metrics import LABEL_FREE_CRITERION, SCORES
from gsda_fast.results.records import RunResult

Metric = Literal["accuracy", "mean_per_class", "per_class"]
Choice = Literal["last", "label_free", "best"]

AVERAGE, ALL = "avg", "all"
MEAN_PER_CLASS, OVERALL = "mean per class", "overall"
METRIC_NAMES: Mapping[Metric, str] = {
    "accuracy": "overall accuracy",
    "mean_per_class": "mean accuracy per class",
    "per_class": "accuracy of each class, their mean, and overall accuracy",
}
CHOICE_NAMES: Mapping[Choice, str] = {
    "last": "last step",
    "label_free": "label-free choice (mutual information)",
    "best": "best on target labels (upper bound)",
}
ABLATION = ("source-only", "entropy", "domain", "class", "group", "glb", "glb-cls", "glb-cls-grp", "gsda")
"""Methods each of which adds one part to the one before it, under either name."""
BASELINES = ("source-only", "dann")
"""What any other method is compared with."""


def printable(text: object) -> str:
    """Return the text with control characters escaped: a name comes from a file, and may hold any of them."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def _score_name(name: str) -> str:
    return name.replace("_", " ")


@dataclass(frozen=True, eq=False)
class Table:
    """Figures in long form, one line a cell, and what is said of all of them.

    Attributes:
        cells: the columns `ROW`, which tell the rows apart, `column`, and the metrics of a cell; row by row, and in
            each row the same columns in the same order.
    """

    ROW: ClassVar[tuple[str, ...]]
    cells: pd.DataFrame

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def caption(self) -> str:
        raise NotImplementedError

    @property
    def corner(self) -> str:
        """What stands above the headings of the rows."""
        raise NotImplementedError

    def heading(self, row: tuple[str, ...]) -> str:
        """Return what stands before the cells of a row, by the values of `ROW`."""
        raise NotImplementedError

    def text(self, cell: Any) -> str:
        """Return a line of `cells` for a reader."""
        raise NotImplementedError

    @property
    def rows(self) -> list[tuple[tuple[str, ...], pd.DataFrame]]:
        """The values of `ROW` and the cells of each row."""
        return list(self.cells.groupby(list(self.ROW), sort=False))

    @property
    def columns(self) -> tuple[str, ...]:
        # By place and not by name: a class may be called as another column is.
        return tuple(self.rows[0][1]["column"]) if len(self.cells) else ()

    @property
    def texts(self) -> pd.DataFrame:
        """What a reader sees, the headings of the rows first."""
        lines = [[self.heading(row), *map(self.text, cells.itertuples())] for row, cells in self.rows]
        return pd.DataFrame(lines, columns=[self.corner, *self.columns]).map(printable).rename(columns=printable)

    @property
    def narrower(self) -> list[pd.DataFrame]:
        """What narrow terminals show of `texts`, the widest first."""
        return []

    @property
    def about(self) -> dict[str, Any]:
        """The other fields, which hold for all cells."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "cells"}


@dataclass(frozen=True, eq=False)
class ResultTable(Table):
    """One metric under one choice, in percent, for methods (rows) and transfer tasks or classes (columns).

    `cells` has `label`, the method; `kind`: measured here (`ours`), published (`paper`) or the first minus the second
    (`difference`); `source`, where a published row stands; `mean` over the seeds, NaN where no run has finished;
    `spread`, the sample standard deviation, NaN with fewer than two; `seeds`, their number, 0 for `paper`.

    Attributes:
        subject: what the whole table is about, besides the task: a transfer task whose classes are the columns, or a
            method whose settings are the rows.
        choice: None where the columns are the choices.
        notes: added to the caption. rows_are: heading of the first column.
    """

    task: str
    metric: Metric
    choice: Choice | None
    subject: str = ""
    notes: tuple[str, ...] = ()
    rows_are: str = "method"
    ROW = ("label", "kind", "source")

    @property
    def title(self) -> str:
        where = f"{self.task} {self.subject}".strip()
        choice = "" if self.choice is None else f", {CHOICE_NAMES[self.choice]}"
        return f"{where}: {METRIC_NAMES[self.metric]}{choice}"

    @property
    def corner(self) -> str:
        return self.rows_are

    def heading(self, row: tuple[str, ...]) -> str:
        label, kind, source = row
        return {"ours": label, "paper": f"paper: {source}", "difference": "difference"}[kind]

    @property
    def seeds(self) -> int:
        """The largest number of seeds of a cell."""
        return int(self.cells["seeds"].max())

    @property
    def caption(self) -> str:
        if self.seeds < 2:
            return "; ".join(["percent; one seed, so no spread is known", *self.notes])
        parts = [f"percent, mean ± sample standard deviation over {self.seeds} seeds"]
        if AVERAGE in self.columns:
            parts.append(f"{AVERAGE}: of the averages of each seed over the transfer tasks")
        if self.cells["seeds"].between(1, self.seeds - 1).any():
            parts.append("(n): only n seeds have finished")
        return "; ".join([*parts, *self.notes])

    def text(self, cell: Any) -> str:
        if math.isnan(cell.mean):
            return "-"
        text = f"{cell.mean:+.1f}" if cell.kind == "difference" else f"{cell.mean:.1f}"
        if not math.isnan(cell.spread):
            text += f" ± {cell.spread:.1f}"
        return f"{text} ({cell.seeds})" if 0 < cell.seeds < self.seeds else text

    @property
    def narrower(self) -> list[pd.DataFrame]:
        """Of a table by class both averages; of another one the means without their spreads, then the average alone."""
        if self.metric == "per_class":
            return [self.texts.iloc[:, [0, -2, -1]]]
        means = self.texts.replace(r" ± [\d.]+", "", regex=True)
        return [means, self.texts.filter([self.corner, AVERAGE])] if AVERAGE in self.columns else [means]


@dataclass(frozen=True, eq=False)
class PairedTable(Table):
    """Differences of one metric between two runs of one transfer task and seed, then over the pairs of all of them.

    Such runs have much of their noise in common, so their difference has less of it than either of them. `cells` has
    `method` and `minus`; `mean`, NaN without a pair; `standard_error` of the mean, NaN with fewer than two pairs;
    `pairs`, their number; `higher`, in how many of them the first method's metric is the higher one.

    Attributes:
        quantity: what was subtracted, with its unit. decimals: to be shown.
        shared: what the two runs of a pair have in common besides transfer task and seed.
    """

    task: str
    quantity: str
    decimals: int = 1
    shared: str = "warm-up, samples and groups"
    ROW = ("method", "minus")
    HIGHER: ClassVar[str] = "higher in"

    @property
    def title(self) -> str:
        return f"{self.task}: paired differences of {self.quantity}"

    @property
    def caption(self) -> str:
        which = f", which share {self.shared}" if self.shared else ""
        return (
            f"mean ± standard error (pairs); a pair: two runs of one transfer task and seed{which}; "
            f"{ALL}: over the pairs of all transfer tasks"
        )

    @property
    def corner(self) -> str:
        return "difference"

    def heading(self, row: tuple[str, ...]) -> str:
        return " - ".join(row)

    def text(self, cell: Any) -> str:
        if math.isnan(cell.mean):
            return "-"
        error = "" if math.isnan(cell.standard_error) else f" ± {cell.standard_error:.{self.decimals}f}"
        return f"{cell.mean:+.{self.decimals}f}{error} ({cell.pairs})"

    @property
    def texts(self) -> pd.DataFrame:
        over_all = [cells.iloc[-1] for _, cells in self.rows]
        return super().texts.assign(**{self.HIGHER: [f"{cell['higher']} of {cell['pairs']}" for cell in over_all]})

    @property
    def narrower(self) -> list[pd.DataFrame]:
        """The differences over all pairs: without its error none says anything."""
        return [self.texts[[self.corner, ALL, self.HIGHER]]]


@dataclass(frozen=True, eq=False)
class ScoreTable(Table):
    """What each label-free score would have done for the runs. `cells` has `score`, and `value` by `column`."""

    task: str
    metric: Metric
    runs: int
    ROW = ("score",)
    FORMATS: ClassVar[Mapping[str, str]] = {
        "better": "{:.0f}", "equal": "{:.0f}", "worse": "{:.0f}", "mean gain": "{:+.2f}", "standard error": "{:.2f}",
        "behind the best": "{:.2f}", "rank correlation": "{:+.2f}",
    }  # fmt: skip

    @property
    def title(self) -> str:
        return f"{self.task}: evaluations chosen without labels, against the last step ({METRIC_NAMES[self.metric]})"

    @property
    def caption(self) -> str:
        return (
            f"over {self.runs} runs; better, equal, worse: in how many the evaluation that the score chooses is above, "
            "at or below the last step; mean gain over it and its standard error, and how far behind the best "
            "evaluation, in points; rank correlation (Spearman) of the final score with the final accuracy over the "
            "runs of a transfer task, mean over the transfer tasks with three runs or more"
        )

    @property
    def corner(self) -> str:
        return "score"

    def heading(self, row: tuple[str, ...]) -> str:
        return _score_name(row[0])

    def text(self, cell: Any) -> str:
        return "-" if math.isnan(cell.value) else self.FORMATS[cell.column].format(cell.value)


@dataclass(frozen=True, eq=False)
class FinalScoreTable(Table):
    """The label-free scores after the last step, of methods or settings: what there is to choose by without labels.

    `cells` has `label`; by `column`, a score or, where it is known, the accuracy, `mean` over the runs, NaN where one
    lacks it; `chosen`, whether the score prefers that row.

    Attributes:
        subject, rows_are: as of `ResultTable`. runs: of each row.
    """

    task: str
    metric: Metric
    subject: str
    runs: int
    rows_are: str
    ROW = ("label",)

    @property
    def title(self) -> str:
        return f"{self.task} {self.subject}".strip() + ": label-free scores after the last step"

    @property
    def caption(self) -> str:
        needs_labels = "; the accuracy needs the target's labels" if METRIC_NAMES[self.metric] in self.columns else ""
        return (
            f"means over {self.runs} pairs of transfer task and seed, which all rows have; *: what the score chooses; "
            f"it says little of a method that trains on that score{needs_labels}"
        )

    @property
    def corner(self) -> str:
        return self.rows_are

    def heading(self, row: tuple[str, ...]) -> str:
        return row[0]

    def text(self, cell: Any) -> str:
        if math.isnan(cell.mean):
            return "-"
        if cell.column == METRIC_NAMES[self.metric]:
            return f"{cell.mean:.1f}"
        return f"{cell.mean:.3f}{' *' if cell.chosen else ''}"

    @property
    def narrower(self) -> list[pd.DataFrame]:
        """The score that chooses evaluations, the one that chose settings best (docs/embeddings.md), the accuracy."""
        scores = (LABEL_FREE_CRITERION, "softmax_correlation")
        return [self.texts.filter([self.corner, *map(_score_name, scores), METRIC_NAMES[self.metric]])]


# ------------------------------------------------------------------------------------------------------------ results


def transfer_task_name(source: str, target: str, short_names: Mapping[str, str] | None = None) -> str:
    """Return `mnist->fonts`, or `M->F` with the short names of the domains: the column of a transfer task."""
    short = short_names or {}
    return f"{short.get(source, source)}->{short.get(target, target)}"


def run_values(
    results: Iterable[RunResult],
    value: Callable[[RunResult], float | None],
    short_names: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Return one line for each run: `method`, `column` (the transfer task's), `seed`, `value`, NaN for None.

    Raises:
        UsageError: two runs of one method, transfer task and seed.
    """
    lines = [(run.method, transfer_task_name(*run.transfer_task, short_names), run.seed, value(run)) for run in results]
    frame = pd.DataFrame(lines, columns=["method", "column", "seed", "value"]).astype({"value": float})
    for again in frame[frame.duplicated(["method", "column", "seed"])].itertuples():
        raise UsageError(
            "runs",
            found=f"two of {again.column}, method {again.method}, seed {again.seed}",
            expected="one of each transfer task, method and seed",
        )
    return frame


def transfer_table(
    results: Sequence[RunResult],
    *,
    metric: Metric = "accuracy",
    choice: Choice = "last",
    methods: Sequence[str] = (),
    transfer_tasks: Sequence[tuple[str, str]] = (),
    short_names: Mapping[str, str] | None = None,
) -> ResultTable:
    """Tabulate the results of one task.

    The average over the transfer tasks is taken for each seed first; its mean and spread are those of the seeds'
    averages. A seed that lacks one of the transfer tasks has no average. A single transfer task has no such column.

    Args:
        results: of finished runs, in any order.
        metric, choice: what to show; the metrics of a run, not of its classes.
        methods: the rows, in order; those of the results in order of appearance if empty.
        transfer_tasks: (source, target) of the columns, in order; those of the results if empty.
        short_names: of the domains, for the columns.

    Raises:
        UsageError: results of several tasks, or two of one transfer task, method and seed.
        ValueError: no result.
    """
    task = _only_task(results)
    pairs = transfer_tasks or list(dict.fromkeys(result.transfer_task for result in results))
    columns = [transfer_task_name(*pair, short_names) for pair in pairs]
    values = run_values(results, lambda result: getattr(getattr(result, metric), choice), short_names)
    by_seed = values.pivot(index=["method", "seed"], columns="column", values="value").reindex(columns=columns)
    by_seed = by_seed.droplevel("seed")
    if len(columns) > 1:
        by_seed[AVERAGE] = by_seed.apply(statistics.fmean, axis=1)
    cells = _mean_and_spread(by_seed, methods or list(values["method"].unique()))
    return ResultTable(cells, task, metric, choice, notes=test_notes(results))


def class_table(
    results: Sequence[RunResult],
    transfer_task: tuple[str, str],
    *,
    choice: Choice = "last",
    methods: Sequence[str] = (),
    short_names: Mapping[str, str] | None = None,
) -> ResultTable:
    """Tabulate one transfer task by classes, with both averages: mean per class and overall.

    The accuracy of each class is known after the last step alone; under another choice both averages stand alone.

    Args:
        results: of finished runs; those of other transfer tasks are left out.
        transfer_task: (source, target).
        choice, methods, short_names: as in `transfer_table`.

    Raises:
        UsageError: as in `transfer_table`, or results with different classes.
        ValueError: no result.
    """
    results = [result for result in results if result.transfer_task == transfer_task]
    task = _only_task(results)
    run_values(results, lambda _: None)  # each run once
    spaces = {result.classes for result in results}
    if len(spaces) > 1:
        raise UsageError("runs", found=f"{len(spaces)} different lists of classes", expected="runs with equal classes")
    by_seed = pd.DataFrame(
        [[*run.per_class, getattr(run.mean_per_class, choice), getattr(run.accuracy, choice)] for run in results],
        index=pd.Index([run.method for run in results], name="method"),
        columns=[*spaces.pop(), MEAN_PER_CLASS, OVERALL],
        dtype=float,
    )
    if choice != "last":
        by_seed = by_seed.iloc[:, -2:]
    cells = _mean_and_spread(by_seed, methods or list(by_seed.index.unique()))
    name = transfer_task_name(*transfer_task, short_names)
    return ResultTable(cells, task, "per_class", choice, subject=name, notes=test_notes(results))


def _mean_and_spread(by_seed: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Summarize a line for each seed, under the method's name, to the cells of a `ResultTable`."""
    names = dict(enumerate(by_seed.columns))
    places = by_seed.set_axis(range(len(names)), axis=1)
    long = places.melt(ignore_index=False, var_name="column").dropna().reset_index()
    cells = long.groupby(["method", "column"])["value"].agg(mean=statistics.fmean, spread=_spread, seeds="size")
    cells = cells.reindex(pd.MultiIndex.from_product([methods, names], names=["label", "column"])).reset_index()
    cells = cells.assign(column=cells["column"].map(names), kind="ours", source="")
    cells = cells.fillna({"seeds": 0}).astype({"mean": float, "spread": float, "seeds": int})
    return cells[["label", "kind", "source", "column", "mean", "spread", "seeds"]]


def _spread(values: pd.Series) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def choices_side_by_side(by_choice: Sequence[ResultTable]) -> ResultTable:
    """Join tables of one transfer task, each under one choice, to one whose columns are the choices.

    Args:
        by_choice: one or more; each has one column.
    """
    first = by_choice[0]
    cells = [table.cells.assign(column=CHOICE_NAMES[table.choice]) for table in by_choice if table.choice]
    joined = pd.concat(cells, ignore_index=True)
    return dataclasses.replace(first, cells=joined, choice=None, subject=first.columns[0])


def sweep_tables(
    variants: Mapping[str, Sequence[RunResult]], *, methods: Sequence[str], **options: Any
) -> list[ResultTable]:
    """Tabulate each method and choice: settings (rows) by transfer tasks (columns).

    Args:
        variants: results by setting, in order. methods, options: as of `transfer_table`.
    """
    made = []
    for method in methods:
        of_method = {name: [run for run in results if run.method == method] for name, results in variants.items()}
        for choice in CHOICE_NAMES:
            found = {name: transfer_table(of, choice=choice, **options) for name, of in of_method.items() if of}
            if found:
                first, *_ = found.values()
                # What holds for some settings alone stands in their names.
                notes = tuple(note for note in first.notes if all(note in table.notes for table in found.values()))
                cells = pd.concat([table.cells.assign(label=name) for name, table in found.items()], ignore_index=True)
                made.append(dataclasses.replace(first, cells=cells, subject=method, rows_are="setting", notes=notes))
    return made


def _only_task(results: Sequence[RunResult]) -> str:
    tasks = list(dict.fromkeys(result.task for result in results))
    if not tasks:
        raise ValueError("results: found none; expected at least one")
    if len(tasks) > 1:
        raise UsageError("runs", found=f"the tasks {', '.join(tasks)}", expected="runs of one task")
    return tasks[0]


def test_notes(results: Sequence[RunResult]) -> tuple[str, ...]:
    """Return how the images of the runs, all of one task, were tested: on which crops, if they are cropped at all."""
    preprocessing = find_benchmark(_only_task(results)).preprocessing
    if preprocessing.crop == preprocessing.resize:
        return ()
    crops = {result.test_crops for result in results}
    if len(crops) > 1:
        return ("ten-crop test for some of the runs, centre crop for the others",)
    return ("ten-crop test",) if crops == {10} else ("centre-crop test",)


# -------------------------------------------------------------------------------------------------------- differences


def contrasts(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Return which method to subtract from which.

    In an ablation, and among settings, each minus the one before it (what each part adds), and the last minus the
    first (what all of them add). Where other methods stand beside it, first each method minus each baseline.
    """
    baselines = [baseline for baseline in BASELINES if baseline in methods]
    parts = [method for method in ABLATION if method in methods]
    against = [(each, baseline) for baseline in baselines for each in methods if each not in (baseline, baselines[0])]
    if not baselines or len(parts) == len(methods):
        parts, against = list(methods), []
    chain = [(method, before) for before, method in itertools.pairwise(parts)][::-1]
    if len(parts) > 2:
        chain.append((parts[-1], parts[0]))
    return list(dict.fromkeys([*against, *chain]))


def paired_table(task: str, quantity: str, values: pd.DataFrame, methods: Sequence[str], **options: Any) -> PairedTable:
    """Tabulate the paired differences of one metric.

    Args:
        task, quantity, options: see `PairedTable`.
        values: as of `run_values`, NaN where the metric is not known; columns in order of appearance.
        methods: in the order of `contrasts`; methods without any value are left out.
    """
    columns = list(values["column"].unique())
    by_method = values.pivot(index=["column", "seed"], columns="method", values="value").dropna(axis=1, how="all")
    rows = []
    for method, minus in contrasts([method for method in methods if method in by_method]):
        pairs = (by_method[method] - by_method[minus]).dropna().rename("value").reset_index()
        everything = pd.concat([pairs, pairs.assign(column=ALL)]).groupby("column")["value"]
        cells = everything.agg(
            mean=statistics.fmean, standard_error=_standard_error, pairs="size", higher=lambda of: (of > 0).sum()
        ).reindex([*columns, ALL])
        rows.append(cells.reset_index(names="column").assign(method=method, minus=minus)[_PAIRED])
    if not rows:
        return PairedTable(pd.DataFrame(columns=_PAIRED), task, quantity, **options)
    cells = pd.concat(rows, ignore_index=True).fillna({"pairs": 0, "higher": 0})
    cells = cells.astype({"mean": float, "standard_error": float, "pairs": int, "higher": int})
    return PairedTable(cells, task, quantity, **options)


_PAIRED = ["method", "minus", "column", "mean", "standard_error", "pairs", "higher"]


def _standard_error(values: pd.Series) -> float:
    return _spread(values) / math.sqrt(len(values))


def score_table(results: Sequence[RunResult], final_scores: pd.DataFrame, metric: Metric) -> ScoreTable:
    """Tabulate what each label-free score chose in each run, against the run's last step.

    Args:
        results: of runs of one task. metric: the accuracy to judge by, `accuracy` or `mean_per_class`.
        final_scores: each score (columns) of the predictions after the last step of each run (rows), NaN where those
            are not known.
    """
    task = _only_task(results)
    selections = [getattr(result, metric) for result in results]
    last = pd.Series([each.last for each in selections], dtype=float)
    best = pd.Series([each.best for each in selections], dtype=float)
    tasks = [transfer_task_name(*result.transfer_task) for result in results]
    lines = []
    for name, score in SCORES.items():
        chosen = pd.Series([_chosen_by(name, result, metric) for result in results], dtype=float)
        gain = (chosen - last).dropna()
        counts = {"better": gain > 0, "equal": gain == 0, "worse": gain < 0}
        final = score.merit(1.0) * final_scores[name].to_numpy()
        by_task = pd.DataFrame({"score": final, "accuracy": last, "task": tasks}).dropna().groupby("task")
        ranked = [of[["score", "accuracy"]].rank().corr().iloc[0, 1] for _, of in by_task if len(of) > 2]
        lines.append(
            {
                "score": name,
                **{column: of.sum() if len(gain) else math.nan for column, of in counts.items()},
                "mean gain": gain.mean(),
                "standard error": _standard_error(gain) if len(gain) else math.nan,
                "behind the best": (best - chosen).mean(),
                "rank correlation": pd.Series(ranked, dtype=float).mean(),
            }
        )
    wide = pd.DataFrame(lines).set_index("score").astype(float)
    cells = wide.stack().rename_axis(["score", "column"]).rename("value").reset_index()
    return ScoreTable(cells, task, metric, int(last.notna().sum()))


def final_score_table(
    task: str, values: pd.DataFrame, metric: Metric, *, subject: str, rows_are: str
) -> FinalScoreTable:
    """Tabulate the label-free scores of methods or settings.

    Args:
        task, metric, subject, rows_are: see `FinalScoreTable`.
        values: a line for each run, as many for each label: `label`, `accuracy` and each of `SCORES`, NaN where it is
            not known.
    """
    of_row = values.groupby("label", sort=False)
    means = of_row[[*SCORES, "accuracy"]].agg(lambda of: of.mean(skipna=False))
    if means["accuracy"].isna().all():
        means = means.drop(columns="accuracy")
    merits = pd.DataFrame({name: score.merit(1.0) * means[name] for name, score in SCORES.items()})
    chosen = merits.eq(merits.max()).reindex(columns=means.columns, fill_value=False)
    wide = pd.concat({"mean": means, "chosen": chosen}, axis=1).rename_axis(columns=[None, "column"])
    cells = wide.stack("column").reset_index()
    names = {**{name: _score_name(name) for name in SCORES}, "accuracy": METRIC_NAMES[metric]}
    cells = cells.assign(column=cells["column"].map(names))
    return FinalScoreTable(cells, task, metric, subject, int(of_row.size().iloc[0]), rows_are)


def _chosen_by(score: str, result: RunResult, metric: Metric) -> float | None:
    if score in result.label_free_by:
        return result.label_free_by[score][metric]
    # Earlier runs kept the choice of one score alone.
    return getattr(result, metric).label_free if score == result.label_free_criterion else None


# ------------------------------------------------------------------------------------------------------------- output


def to_terminal(table: Table, console: Console) -> RichTable:
    """Return the table for rich's `print`, and less of it where the console is too narrow; its files have it whole."""
    without_limit = console.options.update(max_width=sys.maxsize)
    drawn = _drawn(table, table.texts, table.caption, box.HEAVY_HEAD)
    needed = console.measure(drawn, options=without_limit).maximum
    for texts in table.narrower:
        if needed <= console.width:
            break
        caption = table.caption if texts.equals(table.texts) else f"{table.caption}; the files have more"
        drawn = _drawn(table, texts, caption, box.SIMPLE)
        needed = console.measure(drawn, options=without_limit).minimum  # its headings may break between words
    return drawn


def _drawn(table: Table, texts: pd.DataFrame, caption: str, lines: box.Box) -> RichTable:
    title, caption = (escape(printable(text)) for text in (table.title, caption))
    drawn = RichTable(title=title, caption=caption, box=lines)
    # Where the terminal is too narrow still, texts break; rich would end them with an ellipsis.
    for number, column in enumerate(texts.columns):
        drawn.add_column(escape(column), justify="right" if number else "left", overflow="fold")
    for line in texts.to_numpy().tolist():
        drawn.add_row(*map(escape, line))
    return drawn


def to_markdown(tables: Sequence[Table]) -> str:
    """Return each table with its title above and its caption below."""
    parts = []
    for table in tables:
        texts = table.texts.map(_cell_text).rename(columns=_cell_text)
        align = ["left"] + ["right"] * (len(texts.columns) - 1)
        body = texts.to_markdown(index=False, disable_numparse=True, colalign=align)
        parts.append(f"**{printable(table.title)}**\n\n{body}\n\n{printable(table.caption)}\n")
    return "\n".join(parts)


def _cell_text(text: str) -> str:
    return text.replace("|", "\\|")


def to_csv(tables: Sequence[Table]) -> str:
    """Return one line a cell, at full precision, under the names of the first line."""
    frames = []
    for table in tables:
        about = {name: value for name, value in table.about.items() if name in _CSV_ABOUT}
        cells = table.cells.drop(columns="source", errors="ignore")
        frames.append(pd.DataFrame(about, index=cells.index).join(cells))
    frame = pd.concat(frames, ignore_index=True).rename(columns={"label": "method", "spread": "standard_deviation"})
    texts = frame.select_dtypes(["str", "object"]).columns
    return frame.assign(**{name: frame[name].map(_for_spreadsheets) for name in texts}).to_csv(index=False)


_CSV_ABOUT = ("task", "metric", "choice", "subject", "quantity", "runs")


def _for_spreadsheets(text: Hashable) -> str:
    """A spreadsheet takes a text that begins so for a formula, and runs it."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def to_json(tables: Sequence[Table]) -> str:
    """Return a list with the fields of each table, its cells by row."""
    stored = []
    for table in tables:
        rows = []
        for row, cells in table.rows:
            numbers = cells.drop(columns=[*table.ROW, "column"])
            known = numbers.astype(object).where(numbers.notna(), None)
            rows.append({**dict(zip(table.ROW, row)), "cells": known.to_dict("records")})
        stored.append({**table.about, "columns": table.columns, "rows": rows})
    return json.dumps(stored, indent=2, ensure_ascii=False) + "\n"
