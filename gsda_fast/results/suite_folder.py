"""A suite's folder: its runs, the tables that are made of them, and the names of its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from gsda_fast.files import atomic_file
from gsda_fast.results import alignment, tables
from gsda_fast.results.metrics import SCORES
from gsda_fast.results.paper import with_paper
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder, file_name
from gsda_fast.results.tables import CHOICE_NAMES, METRIC_NAMES

TableName = Literal["table", "paired", "scores", "sweep"]


@dataclass(frozen=True)
class Layout:
    """What the tables of a suite show, and in which order.

    Attributes:
        task: the benchmark. methods: rows. transfer_tasks: (source, target) of the columns.
        short_names: of the domains, as in the paper's columns.
        by_class: whether each transfer task has a table of its own, by classes, with both averages (VisDA).
    """

    task: str
    methods: tuple[str, ...]
    transfer_tasks: tuple[tuple[str, str], ...]
    short_names: Mapping[str, str]
    by_class: bool = False

    @property
    def metric(self) -> tables.Metric:
        """The metric that the benchmark's literature reports."""
        return "mean_per_class" if self.by_class else "accuracy"

    @property
    def quantity(self) -> str:
        """What `last` is, in words."""
        return f"{METRIC_NAMES[self.metric]} after the last step, in points"

    def last(self, result: RunResult) -> float | None:
        """Return the metric after the last step."""
        return getattr(result, self.metric).last

    def labelled(self, results: Iterable[RunResult]) -> bool:
        """Return whether the target of any of them has labels, so that there are accuracies to show."""
        return any(self.last(result) is not None for result in results)

    @property
    def table(self) -> dict[str, Any]:
        """The options of `tables.transfer_table`."""
        names = ("metric", "methods", "transfer_tasks", "short_names")
        return {name: getattr(self, name) for name in names}

    def only(self, results: Sequence[RunResult]) -> Layout:
        """Return the same, with those methods and transfer tasks alone that there are results of."""
        methods = {result.method for result in results}
        pairs = {result.transfer_task for result in results}
        return replace(
            self,
            methods=tuple(method for method in self.methods if method in methods),
            transfer_tasks=tuple(pair for pair in self.transfer_tasks if pair in pairs),
        )


class SuiteFolder:
    """Reads and writes the files of a suite: run folders, or (a sweep) folders of them, one for each setting.

    Args:
        path: the folder. runs: if they lie elsewhere.
    """

    def __init__(self, path: Path | str, runs: list[RunFolder] | None = None) -> None:
        self.path = Path(path)
        if runs is not None:
            self.runs, self.variants = runs, {}

    @classmethod
    def find(cls, path: Path | str) -> SuiteFolder | None:
        """Return the suite in the folder `path`; None if it holds no runs."""
        suite = cls(path)
        return suite if suite.runs or suite.variants else None

    @cached_property
    def runs(self) -> list[RunFolder]:
        """The runs that have at least begun, by name."""
        if not self.path.is_dir():
            return []
        return [run for entry in sorted(self.path.iterdir()) if entry.is_dir() and (run := RunFolder(entry)).begun]

    @cached_property
    def variants(self) -> dict[str, SuiteFolder]:
        """The suites of a sweep, by setting such as `alpha=0.1`, by name."""
        if not self.path.is_dir():
            return {}
        folders = [entry for entry in self.path.iterdir() if entry.is_dir() and "=" in entry.name]
        suites = {entry.name: SuiteFolder(entry) for entry in sorted(folders, key=lambda entry: _by_value(entry.name))}
        return {name: suite for name, suite in suites.items() if suite.runs}

    def results(self) -> list[RunResult]:
        """Return the outcomes of the runs that have finished."""
        return [result for run in self.runs if (result := run.read_result()) is not None]

    @property
    def report_path(self) -> Path:
        """The page of plots."""
        return self.path / "report.html"

    def plot_path(self, name: str) -> Path:
        """Return where the plot `name` is kept; what does not belong into a file's name becomes `_`."""
        return self.path / f"{file_name(name.replace('->', '-'))}.png"

    def table_path(self, name: TableName, suffix: str) -> Path:
        return self.path / f"{name}.{suffix}"

    def write_tables(self, name: TableName, made: Sequence[tables.Table]) -> None:
        """Write NAME.md, NAME.csv and NAME.json."""
        for suffix, write in (("md", tables.to_markdown), ("csv", tables.to_csv), ("json", tables.to_json)):
            with atomic_file(self.table_path(name, suffix)) as file:
                file.write(write(made).encode())


def read_settings(name: str) -> dict[str, str]:
    """Return `alpha=0.1,beta=1`, the name of a sweep's folder, as a mapping."""
    parts = [part.partition("=") for part in name.split(",")]
    return {key: value for key, _, value in parts}


def _by_value(name: str) -> list[tuple[str, float, str]]:
    """Sort settings as numbers where they are numbers."""
    order = []
    for key, value in read_settings(name).items():
        try:
            order.append((key, float(value), value))
        except ValueError:
            order.append((key, 0.0, value))
    return order


def suite_tables(results: Sequence[RunResult], layout: Layout) -> list[tables.ResultTable]:
    """Return the tables of a suite under each choice, the paper's rows among ours.

    Where classes are reported, several transfer tasks have tables of both averages before those by class.

    Args:
        results: of finished runs. layout: rows and columns.
    """
    measured = {result.transfer_task for result in results}
    metrics: tuple[tables.Metric, ...] = ("accuracy",)
    if layout.by_class:
        metrics = ("mean_per_class", "accuracy") if len(measured) > 1 else ()
    over_tasks = [
        with_paper(tables.transfer_table(results, choice=choice, **{**layout.table, "metric": metric}))
        for metric in metrics
        for choice in CHOICE_NAMES
    ]
    if not layout.by_class:
        return over_tasks
    options: Any = {"methods": layout.methods, "short_names": layout.short_names}
    return over_tasks + [
        with_paper(tables.class_table(results, pair, choice=choice, **options))
        for pair in layout.transfer_tasks
        if pair in measured
        for choice in CHOICE_NAMES
    ]


def over_transfer_tasks(made: Sequence[tables.ResultTable]) -> list[tables.ResultTable]:
    """Return those of a suite's tables that have transfer tasks, and not classes, as columns."""
    return [table for table in made if table.metric != "per_class"]


def paired_tables(runs: Sequence[RunFolder], layout: Layout) -> list[tables.PairedTable]:
    """Return paired differences of the accuracy after the last step and of the mismatch late in training.

    Args:
        runs: those that have not finished are left out. layout: the order of methods, and names.
    """
    order = {pair: index for index, pair in enumerate(layout.transfer_tasks)}
    finished = _finished(runs)
    finished.sort(key=lambda of: (order.get(of[1].transfer_task, len(order)), of[1].seed))
    results = [result for _, result in finished]
    folders = {id(result): run for run, result in finished}

    def mismatch(result: RunResult) -> float | None:
        run = folders[id(result)]
        return alignment.late_mismatch(run.read_metrics(), run.setting("warmup") or 0, result.steps)

    late = f"the relative mismatch {alignment.MISMATCH_FORMULA}, mean over the last half of the steps after warm-up"
    made = [
        tables.paired_table(
            layout.task, quantity, tables.run_values(results, value, layout.short_names), layout.methods, **options
        )
        for quantity, value, options in (
            (layout.quantity, layout.last, {}), (late, mismatch, {"decimals": 3})
        )
    ]  # fmt: skip
    return [table for table in made if len(table.cells)]


def paired_sweep_tables(variants: Mapping[str, Sequence[RunResult]], layout: Layout) -> list[tables.PairedTable]:
    """Return, for each method, paired differences between settings (rows) of the accuracy after the last step.

    Args:
        variants: results by setting, in order. layout: methods and columns.
    """
    made = []
    for method in layout.methods:
        results = [
            replace(run, method=name)
            for pair in layout.transfer_tasks
            for name, of in variants.items()
            for run in of
            if (run.method, run.transfer_task) == (method, pair)
        ]
        values = tables.run_values(results, layout.last, layout.short_names)
        # Which parts of a run a setting leaves as they are depends on the setting.
        task = f"{layout.task} {method}"
        made.append(tables.paired_table(task, layout.quantity, values, tuple(variants), shared=""))
    return [table for table in made if len(table.cells)]


def score_tables(runs: Sequence[RunFolder], layout: Layout) -> list[tables.ScoreTable | tables.FinalScoreTable]:
    """Return what each label-free score would have chosen, where there are labels, and the scores of the methods.

    Args:
        runs: those that have not finished are left out. layout: methods, and the metric that counts.
    """
    scored = _scored(runs)
    known = [(result, scores) for result, scores in scored if layout.labelled([result])]
    final_scores = pd.DataFrame([scores for _, scores in known], columns=list(SCORES), dtype=float)
    choices = [tables.score_table([result for result, _ in known], final_scores, layout.metric)] if known else []
    by_method = [(method, *of) for method in layout.methods for of in scored if of[0].method == method]
    return [*choices, *_final_score_tables(by_method, layout, "", "method")]


def setting_score_tables(variants: Mapping[str, Sequence[RunFolder]], layout: Layout) -> list[tables.FinalScoreTable]:
    """Return, for each method, the label-free scores of its settings after the last step.

    Args:
        variants: runs by setting, in order. layout: methods, and the metric that counts.
    """
    scored = [(name, *of) for name, runs in variants.items() for of in _scored(runs)]
    return [
        table
        for method in layout.methods
        for table in _final_score_tables([of for of in scored if of[1].method == method], layout, method, "setting")
    ]


def _final_score_tables(
    runs: Sequence[tuple[str, RunResult, Mapping[str, float]]], layout: Layout, subject: str, rows_are: str
) -> list[tables.FinalScoreTable]:
    """Compare labels (methods, settings), of which there are two or more, over the runs that all of them have."""
    pairs: dict[str, set[Any]] = {}
    for label, result, _ in runs:
        pairs.setdefault(label, set()).add((result.transfer_task, result.seed))
    common = set.intersection(*pairs.values()) if len(pairs) > 1 else set()
    lines = [
        {"label": label, "accuracy": layout.last(result), **scores}
        for label, result, scores in runs
        if (result.transfer_task, result.seed) in common
    ]
    if not lines:
        return []
    numbers = ["accuracy", *SCORES]
    values = pd.DataFrame(lines, columns=["label", *numbers]).astype(dict.fromkeys(numbers, float))
    return [tables.final_score_table(layout.task, values, layout.metric, subject=subject, rows_are=rows_are)]


def _scored(runs: Sequence[RunFolder]) -> list[tuple[RunResult, dict[str, float]]]:
    return [(result, _final_scores(run)) for run, result in _finished(runs)]


def _finished(runs: Sequence[RunFolder]) -> list[tuple[RunFolder, RunResult]]:
    return [(run, result) for run in runs if (result := run.read_result()) is not None]


def _final_scores(run: RunFolder) -> dict[str, float]:
    predictions = run.read_predictions()
    if predictions is None:
        return {}
    probabilities = torch.from_numpy(predictions.probabilities)
    return {name: float(score.function(probabilities)) for name, score in SCORES.items()}
