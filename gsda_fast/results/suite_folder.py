"""A suite's folder: its runs, its tables, and the names of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gsda_fast.files import atomic_file
from gsda_fast.results import alignment, paired, tables
from gsda_fast.results.paper import with_paper
from gsda_fast.results.run_folder import RunFolder, RunResult, file_name
from gsda_fast.results.tables import CHOICE_NAMES, FIGURE_NAMES, ResultTable, Row


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
    def figure(self) -> tables.Figure:
        """The figure that the benchmark's literature reports."""
        return "mean_per_class" if self.by_class else "accuracy"

    def only(self, results: Sequence[RunResult]) -> Layout:
        """The same, with those methods and transfer tasks alone that there are results of."""
        methods = {result.method for result in results}
        pairs = {(result.source, result.target) for result in results}
        return replace(
            self,
            methods=tuple(method for method in self.methods if method in methods),
            transfer_tasks=tuple(pair for pair in self.transfer_tasks if pair in pairs),
        )


class SuiteFolder:
    """Reads and writes the files of a suite: run folders, or (a sweep) folders of them, one for each setting.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def find(cls, path: Path | str) -> SuiteFolder | None:
        """The suite in the folder `path`; None if it holds no runs."""
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
        """The outcomes of the runs that have finished."""
        return [result for run in self.runs if (result := run.read_result()) is not None]

    @property
    def report_path(self) -> Path:
        """The page of plots."""
        return self.path / "report.html"

    def plot_path(self, name: str) -> Path:
        """Where the plot `name` of the page is kept; what does not belong into a file's name becomes `_`."""
        return self.path / f"{file_name(name.replace('->', '-'))}.png"

    def table_path(self, suffix: str) -> Path:
        return self.path / f"table.{suffix}"

    def paired_path(self, suffix: str) -> Path:
        return self.path / f"paired.{suffix}"

    def sweep_path(self, suffix: str) -> Path:
        return self.path / f"sweep.{suffix}"

    def write_tables(self, made: Sequence[ResultTable]) -> None:
        """table.md, table.csv and table.json."""
        _write(self.table_path, _texts(made))

    def write_paired(self, made: Sequence[paired.PairedTable]) -> None:
        """paired.md, paired.csv and paired.json."""
        _write(
            self.paired_path, {"md": tables.to_markdown(made), "csv": paired.to_csv(made), "json": paired.to_json(made)}
        )

    def sweep_plot_path(self, name: str) -> Path:
        return self.plot_path(f"sweep_{name}")

    def write_sweep(self, made: Sequence[ResultTable], plots: Mapping[str, bytes]) -> None:
        """sweep.md, sweep.csv and sweep.json, and sweep_NAME.png for each plot."""
        _write(self.sweep_path, _texts(made))
        for name, plot in plots.items():
            with atomic_file(self.sweep_plot_path(name)) as file:
                file.write(plot)


def _texts(made: Sequence[ResultTable]) -> dict[str, str]:
    return {"md": tables.to_markdown(made), "csv": tables.to_csv(made), "json": tables.to_json(made)}


def _by_value(name: str) -> list[tuple[str, float, str]]:
    """Sorts settings as numbers where they are numbers."""
    order = []
    for key, value in read_settings(name).items():
        try:
            order.append((key, float(value), value))
        except ValueError:
            order.append((key, 0.0, value))
    return order


def _write(path_of: Callable[[str], Path], texts: Mapping[str, str]) -> None:
    for suffix, text in texts.items():
        with atomic_file(path_of(suffix)) as file:
            file.write(text.encode())


def suite_tables(results: Sequence[RunResult], layout: Layout) -> list[ResultTable]:
    """The tables of a suite under each choice, the paper's rows among ours.

    Args:
        results: of finished runs. layout: rows and columns.
    """
    if not layout.by_class:
        return [
            with_paper(
                tables.transfer_table(
                    results,
                    choice=choice,
                    methods=layout.methods,
                    transfer_tasks=layout.transfer_tasks,
                    short_names=layout.short_names,
                )
            )
            for choice in CHOICE_NAMES
        ]
    measured = {(result.source, result.target) for result in results}
    return [
        with_paper(
            tables.class_table(results, pair, choice=choice, methods=layout.methods, short_names=layout.short_names)
        )
        for pair in layout.transfer_tasks
        if pair in measured
        for choice in CHOICE_NAMES
    ]


def paired_tables(runs: Sequence[RunFolder], layout: Layout) -> list[paired.PairedTable]:
    """Paired differences of the accuracy after the last step and of the mismatch late in training.

    Args:
        runs: those that have not finished are left out. layout: the order of methods, and names.
    """
    finished = {key: run for run in runs for key in tables.results_by_run(_result(run))}
    results = tables.results_by_run(result for run in runs for result in _result(run))
    order = {pair: index for index, pair in enumerate(layout.transfer_tasks)}
    keys = sorted(results, key=lambda key: (order.get(key[1], len(order)), key[2]))
    accuracies = {key: getattr(results[key], layout.figure).last for key in keys}
    mismatches = {
        key: alignment.late_mismatch(
            finished[key].read_metrics(), finished[key].setting("warmup") or 0, results[key].steps
        )
        for key in keys
    }
    made = [
        paired.paired_table(
            layout.task,
            f"{FIGURE_NAMES[layout.figure]} after the last step, in points",
            accuracies,
            layout.methods,
            short_names=layout.short_names,
        ),
        paired.paired_table(
            layout.task,
            f"the relative mismatch {alignment.MISMATCH_FORMULA}, mean over the last half of the steps after warm-up",
            mismatches,
            layout.methods,
            short_names=layout.short_names,
            decimals=3,
        ),
    ]
    return [table for table in made if table.rows]


def paired_sweep_tables(variants: Mapping[str, Sequence[RunResult]], layout: Layout) -> list[paired.PairedTable]:
    """For each method, paired differences between settings (rows) of the accuracy after the last step.

    Args:
        variants: results by setting, in order. layout: methods and columns.
    """
    found = {(name, *key): result for name, of in variants.items() for key, result in tables.results_by_run(of).items()}
    made = []
    for method in layout.methods:
        accuracies = {
            (name, pair, seed): getattr(found[name, method, pair, seed], layout.figure).last
            for pair in layout.transfer_tasks
            for name, of, where, seed in found
            if (of, where) == (method, pair)
        }
        table = paired.paired_table(
            f"{layout.task} {method}",
            f"{FIGURE_NAMES[layout.figure]} after the last step, in points",
            accuracies,
            tuple(variants),
            short_names=layout.short_names,
        )
        # Which parts of a run a setting leaves as they are depends on the setting.
        made.append(replace(table, shared=""))
    return [table for table in made if table.rows]


def _result(run: RunFolder) -> list[RunResult]:
    result = run.read_result()
    return [] if result is None else [result]


def sweep_tables(variants: Mapping[str, Sequence[RunResult]], layout: Layout) -> list[ResultTable]:
    """One table for each method and choice: settings (rows) by transfer tasks (columns).

    Args:
        variants: results by setting, in order. layout: methods and columns.
    """
    made = []
    for method in layout.methods:
        for choice in CHOICE_NAMES:
            by_variant = {
                name: tables.transfer_table(
                    [result for result in results if result.method == method],
                    figure=layout.figure,
                    choice=choice,
                    transfer_tasks=layout.transfer_tasks,
                    short_names=layout.short_names,
                )
                for name, results in variants.items()
                if any(result.method == method for result in results)
            }
            if not by_variant:
                continue
            rows = [Row(name, table.rows[0].cells) for name, table in by_variant.items()]
            first = next(iter(by_variant.values()))
            # What holds for some settings alone is told by their names.
            notes = tuple(note for note in first.notes if all(note in table.notes for table in by_variant.values()))
            made.append(replace(first, rows=tuple(rows), subject=method, rows_are="setting", notes=notes))
    return made


def read_settings(name: str) -> dict[str, str]:
    """`alpha=0.1,beta=1`, the name of a sweep's folder, as a mapping."""
    parts = [part.partition("=") for part in name.split(",")]
    return {key: value for key, _, value in parts}
