"""The runs of a suite, in processes of their own; and its tables, once all of them have finished."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from gsda_fast.commands import program, show_warnings_as_lines
from gsda_fast.config import Config, method_options, parse_config, with_terms
from gsda_fast.console import counted, duration
from gsda_fast.data.benchmarks import Benchmark, find_benchmark
from gsda_fast.data.torch_loader import usable_cores
from gsda_fast.errors import FolderInUse, Stopped, TrainingError, UsageError
from gsda_fast.methods import METHODS, TERMS
from gsda_fast.report import report_on_suite, suite_layout
from gsda_fast.results.page import sweep_section
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder, file_name
from gsda_fast.results.suite_folder import (
    Layout,
    SuiteFolder,
    TableName,
    over_transfer_tasks,
    paired_sweep_tables,
    paired_tables,
    score_tables,
    setting_score_tables,
    suite_tables,
)
from gsda_fast.results.tables import Table, choices_side_by_side, sweep_tables, to_terminal
from gsda_fast.suite_options import OF_ONE_RUN, SuiteSettings, parse_settings
from gsda_fast.train import train


class Expectation:
    """How long the runs that are left will take, by those that have finished.

    Args:
        methods: of each run. workers: runs at a time.
    """

    def __init__(self, methods: Sequence[str], workers: int) -> None:
        self._methods, self._workers = methods, workers
        self._seconds: dict[int, float] = {}

    @property
    def _known(self) -> int:
        """Methods of which a run has finished."""
        return len({self._methods[run] for run in self._seconds})

    def add(self, run: int, seconds: float) -> bool:
        """Note how long a run took; return whether that says more: the first one, and once all methods have one."""
        if run in self._seconds:
            return False
        before, self._seconds[run] = self._known, seconds
        return before == 0 or before < self._known == len(set(self._methods))

    def line(self) -> str:
        """Return what to expect; empty where nothing has finished, or nothing is left."""
        left = [method for run, method in enumerate(self._methods) if run not in self._seconds]
        if not left or not self._seconds:
            return ""
        mean = fmean(self._seconds.values())
        known: dict[str, list[float]] = {}
        for run, seconds in self._seconds.items():
            known.setdefault(self._methods[run], []).append(seconds)
        total = sum(fmean(known.get(method, [mean])) for method in left) / min(self._workers, len(left))
        return f"about {duration(total)} left for {len(left)} of {counted(len(self._methods), 'run')}"


def run_suite(settings: SuiteSettings, variants: Mapping[str, Mapping[str, Config]], console: Console) -> Path:
    """Run what has not finished yet, write the tables and return the suite's folder.

    A run that another process holds is that one's; the tables are written by whoever finds all runs finished.

    Args:
        settings: which runs.
        variants: what applies to all runs of a setting, by the setting's name, which is that of its folder, and by
            method; without a sweep the only name is empty, and stands for the suite's own folder.
        console: where progress and tables are shown.

    Raises:
        UsageError: see `runs_of`, or what `gsda_fast.train.train` raises.
        TrainingError: after all other runs and without the failed ones in the tables: some runs cannot go on.
        KeyboardInterrupt: the runs were stopped; everything is kept and the same call goes on.
    """
    benchmark, folder = find_benchmark(settings.task), settings.folder
    pairs, configs = runs_of(settings, variants)
    everything = [config for of_variant in configs.values() for config in of_variant]
    factors = {"transfer task": pairs, "method": settings.chosen_methods, "seed": settings.seeds}
    made_of = [counted(len(values), name) for name, values in factors.items()]
    if len(variants) > 1:
        made_of.insert(0, counted(len(variants), "setting"))
    console.print(f"{counted(len(everything), 'run')}: {' x '.join(made_of)}")
    started = time.perf_counter()
    all_outcomes = _run_all(everything, settings.jobs, console)
    elsewhere = all_outcomes.count(None)
    if elsewhere:
        console.print(f"{elsewhere} runs are at work in other processes; the last one to end writes the tables")
    in_order = iter(all_outcomes)
    outcomes = {name: list(itertools.islice(in_order, len(of_variant))) for name, of_variant in configs.items()}
    layout = replace(suite_layout(benchmark), methods=settings.chosen_methods, transfer_tasks=pairs)
    failures = [
        result for of_variant in outcomes.values() for result in of_variant if isinstance(result, TrainingError)
    ]
    finished = {
        name: results
        for name, of_variant in outcomes.items()
        if (results := [result for result in of_variant if isinstance(result, RunResult)]) and not elsewhere
    }
    runs = {name: [RunFolder(config.run.output or "") for config in configs[name]] for name in finished}
    for name, results in finished.items():
        # The tables of a sweep's settings are for looking up.
        shown = Console(quiet=True) if settings.sweep else console
        _write_tables(SuiteFolder(folder / name), results, runs[name], layout, settings.paired, shown)
    if settings.sweep and finished:
        _write_sweep(SuiteFolder(folder), finished, runs, layout, settings.paired, console)
    if settings.report and finished:
        for name in dict.fromkeys(["", *finished]):
            with console.status("drawing the page"):
                page = report_on_suite(SuiteFolder(folder / name))
            console.print(f"page of plots: {page.resolve()}", soft_wrap=True)
    done = counted(len(everything) - len(failures) - elsewhere, "run")
    console.print(f"{done} in {time.perf_counter() - started:.0f} s")
    if failures:
        message = f"{len(failures)} of {len(everything)} runs failed and are in no table; the first: {failures[0]}"
        raise TrainingError(message)
    return folder


def runs_of(
    settings: SuiteSettings, variants: Mapping[str, Mapping[str, Config]]
) -> tuple[tuple[tuple[str, str], ...], dict[str, list[Config]]]:
    """Return the transfer tasks, and the runs of each variant, by its name. Arguments: `run_suite`.

    Raises:
        UsageError: a transfer task that the benchmark lacks, settings that do not fit, or a run that is there twice.
    """
    benchmark = find_benchmark(settings.task)
    pairs = tuple(_transfer_task(benchmark, text) for text in settings.tasks) or benchmark.transfer_tasks
    if not pairs:
        raise UsageError("--tasks", found="none", expected=f"one or more SOURCE->TARGET for the task {settings.task}")
    configs = {
        name: [
            _config_of_run(base[method], pair, seed, settings.folder / name)
            for seed in settings.seeds
            for pair in pairs
            for method in settings.chosen_methods
        ]
        for name, base in variants.items()
    }
    everything = [config for of_variant in configs.values() for config in of_variant]
    for config in everything:
        config.validate()
    # A transfer task under its name and its alias is one folder, and two processes must not write into it.
    repeated = [output for output, count in Counter(config.run.output for config in everything).items() if count > 1]
    if repeated:
        raise UsageError("--methods, --seeds, --tasks, --sweep", found=f"{repeated[0]} twice", expected="each run once")
    return pairs, configs


def _config_of_run(base: Config, transfer_task: tuple[str, str], seed: int, folder: Path) -> Config:
    source, target = transfer_task
    output = folder / RunFolder.default_name(base.task, source, target, base.run.method, seed)
    return replace(
        base,
        run=replace(base.run, seed=seed, output=output),
        data=replace(base.data, source=source, target=target),
    )


def _transfer_task(benchmark: Benchmark, text: str) -> tuple[str, str]:
    source, arrow, target = (part.strip() for part in text.partition("->"))
    if not (source and arrow and target):
        raise UsageError("--tasks", found=f"'{text}'", expected="SOURCE->TARGET, such as A->W (in quotes)")
    if not benchmark.domains:
        return source, target
    return benchmark.domain(source).name, benchmark.domain(target).name


def sweep_variants(sweep: Sequence[str], arguments: list[str], methods: Sequence[str]) -> dict[str, dict[str, Config]]:
    """Return each method's configuration for each combination of the swept values, by its name: `alpha=0.02,beta=1`.

    Args:
        sweep: NAME=VALUE,VALUE for each swept option, or term whose weight is swept; none: one combination with an
            empty name.
        arguments: the command line of the runs, the task first. An option of some method's own goes to those that
            have it.
        methods: to be run.

    Raises:
        UsageError: not of that form, or a value that does not fit the option.
    """
    axes = _sweep_axes(sweep)
    variants: dict[str, dict[str, Config]] = {}
    for combination in itertools.product(*([(name, value) for value in values] for name, values in axes.items())):
        terms = {name: _weight(name, value) for name, value in combination if name in TERMS}
        options = [word for name, value in combination if name not in TERMS for word in (f"--{name}", value)]
        # It names a folder, and a value may be a path.
        label = ",".join(f"{name}={file_name(value)}" for name, value in combination)
        parsed = {method: _config_of_method(method, [*arguments, *options], methods) for method in methods}
        configs = {method: with_terms(config, {**config.adaptation.add, **terms}) for method, config in parsed.items()}
        if label in variants or configs in variants.values():
            raise UsageError("--sweep", found=f"{label} twice", expected="each value once")
        variants[label] = configs
    return variants


def _config_of_method(method: str, arguments: Sequence[str], methods: Sequence[str]) -> Config:
    """Parse the arguments without the options that other methods of the suite have and this one lacks."""
    if method not in METHODS:
        raise UsageError("--methods", found=f"'{method}'", expected=", ".join(METHODS))
    known = method_options(method)
    strange = {option for other in methods if other in METHODS for option in method_options(other)} - known
    kept: list[str] = []
    keep = True
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0]
            keep = name not in strange and name.replace("--no-", "--", 1) not in strange
        if keep:
            kept.append(argument)
    return parse_config([*kept, "--method", method], program("suite"))


def _weight(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UsageError("--sweep", found=f"{name}={value}", expected="a weight of the term") from None


def _sweep_axes(sweep: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each swept option: `alpha=0.02,0.1,beta=1` in one word or in several."""
    axes: dict[str, list[str]] = {}
    for text in sweep:
        name = ""
        for part in text.split(","):
            before, equals, value = part.rpartition("=")
            if equals:
                name = before.replace("_", "-")
                if name in axes:
                    raise UsageError("--sweep", found=f"{name} twice", expected="each option once")
                if f"--{name}" in (*OF_ONE_RUN, "--output", "--resume"):
                    instead = OF_ONE_RUN.get(f"--{name}", "an option that changes the runs' figures")
                    raise UsageError("--sweep", found=name, expected=instead)
            if not (name and value):
                raise UsageError("--sweep", found=f"'{text}'", expected="NAME=VALUE,VALUE such as alpha=0.02,0.1")
            axes.setdefault(name, []).append(value)
    return axes


def _run_all(configs: list[Config], jobs: int, console: Console) -> list[RunResult | TrainingError | None]:
    """Return the result of each run, or why it failed, or None where another process is at it.

    A failed run leaves the others alone.
    """
    gpus = visible_gpus()
    workers = min(jobs or len(gpus) or usable_cores(), len(configs))
    # A fork would copy the threads' locks but not the threads.
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for worker in range(workers):
        places.put(gpus[worker % len(gpus)] if gpus else None)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    outcomes: dict[int, RunResult | TrainingError] = {}
    expected = Expectation([config.run.method for config in configs], workers)
    for index, config in enumerate(configs):
        earlier = RunFolder(config.run.output or "").read_result()
        if earlier is not None:
            expected.add(index, earlier.seconds)
    console.print(expected.line() or "how long they take will be known after the first run", soft_wrap=True)
    with (
        ProcessPoolExecutor(
            workers, mp_context=context, initializer=_prepare_worker, initargs=(places, sys.orig_argv)
        ) as pool,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("runs", total=len(configs))
        try:
            left = list(range(len(configs)))
            while left:
                with _interrupts_held_back():
                    futures: dict[Future[RunResult], int] = {
                        pool.submit(_run_one, configs[index]): index for index in left
                    }
                for future in as_completed(futures):
                    index = futures[future]
                    try:
                        outcomes[index] = result = future.result()
                        message = _line(result)
                    except FolderInUse:
                        continue
                    except TrainingError as error:
                        outcomes[index] = TrainingError(f"{configs[index].run.output}: {error}")
                        message = f"error: {outcomes[index]}"
                    progress.advance(bar)
                    console.print(message, highlight=False, soft_wrap=True)
                    finished = outcomes[index]
                    if isinstance(finished, RunResult) and expected.add(index, finished.seconds) and expected.line():
                        console.print(expected.line(), soft_wrap=True)
                # What others held and have finished, or given up, since.
                left = [index for index in left if index not in outcomes and not _is_elsewhere(configs[index])]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            # A run that is asked to stop saves a checkpoint first.
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, KeyboardInterrupt):
                message = (
                    f"{len(outcomes)} of {len(configs)} runs have finished; the same command goes on with the others"
                )
                raise KeyboardInterrupt(message) from None
            if isinstance(error, BrokenProcessPool):
                raise TrainingError(
                    f"the process of a run was killed (out of memory?) after {len(outcomes)} of {len(configs)} runs; "
                    "the same command goes on with the others, --jobs 1 one at a time"
                ) from None
            raise
    return [outcomes.get(index) for index in range(len(configs))]


def _is_elsewhere(config: Config) -> bool:
    folder = RunFolder(config.run.output or "")
    return not folder.finished and folder.in_use


def _line(result: RunResult) -> str:
    metrics = {"overall": result.accuracy.last, "mean per class": result.mean_per_class.last}
    scores = "  ".join(f"{name} {value:5.1f} %" for name, value in metrics.items() if value is not None)
    return (
        f"{result.source} -> {result.target}  {result.method}  seed {result.seed}  {scores or 'target without labels'}"
    )


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the block ends. Processes started inside never see it: it reaches all of a terminal's
    processes, and each worker would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, each as CUDA_VISIBLE_DEVICES would name it alone.

    None without CUDA.
    """
    count = torch.cuda.device_count()
    # Where a scheduler has given this process some of the machine's GPUs, the others are somebody else's.
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if allowed is None else allowed.split(",")
    return [name.strip() for name in names[:count]]


def _prepare_worker(places: multiprocessing.Queue[str | None], command: list[str]) -> None:
    """Give a worker its own GPU, before CUDA is initialized in it, and end it when the suite is killed."""
    gpu = places.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    # What environment.json is to name, and not how this worker was started.
    sys.orig_argv = command
    show_warnings_as_lines()
    threading.Thread(target=_end_with_the_suite, daemon=True).start()


def _end_with_the_suite() -> None:
    suite = multiprocessing.parent_process()
    assert suite is not None
    suite.join()
    # Left alone, this worker would write into a run's folder that the suite's next start gives to another one.
    os._exit(1)


def _run_one(config: Config) -> RunResult:
    try:
        return train(config, Console(quiet=True))
    except Stopped:
        # The pool would hand this worker the next run.
        os._exit(0)
    finally:
        # PyTorch compiles one function for a few shapes only, and then runs it uncompiled: those of one run.
        torch.compiler.reset()


def _write_tables(
    suite: SuiteFolder,
    results: Sequence[RunResult],
    runs: Sequence[RunFolder],
    layout: Layout,
    paired: bool,
    console: Console,
) -> None:
    made, labelled = suite_tables(results, layout), layout.labelled(results)
    # By class they are for looking up, where several transfer tasks have averages.
    accuracies = over_transfer_tasks(made) or made
    if len(layout.transfer_tasks) == 1 and not layout.by_class:
        accuracies = [choices_side_by_side(made)]
    _write(suite, "table", made, console, accuracies if labelled else ())
    if paired:
        _write(suite, "paired", paired_tables(runs, layout), console)
    # Without labels the scores are all there is to see; else they are for looking up.
    _write(suite, "scores", score_tables(runs, layout), console, () if labelled else None)


def _write_sweep(
    suite: SuiteFolder,
    results: Mapping[str, Sequence[RunResult]],
    runs: Mapping[str, Sequence[RunFolder]],
    layout: Layout,
    paired: bool,
    console: Console,
) -> None:
    made = sweep_tables(results, **layout.table)
    labelled = layout.labelled(itertools.chain(*results.values()))
    # The choices beside the last step are for looking up.
    _write(suite, "sweep", made, console, [table for table in made if table.choice == "last"] if labelled else ())
    if paired:
        _write(suite, "paired", paired_sweep_tables(results, layout), console)
    _write(suite, "scores", setting_score_tables(runs, layout), console)
    sweep_section(suite, made if labelled else [])


def _write(
    suite: SuiteFolder, name: TableName, made: Sequence[Table], console: Console, shown: Sequence[Table] | None = None
) -> None:
    if made:
        suite.write_tables(name, made)
        for table in made if shown is None else shown:
            console.print(to_terminal(table, console))
        console.print(f"{name}: {suite.table_path(name, 'md')}, and as .csv and .json", soft_wrap=True)


def parse_suite(arguments: list[str]) -> tuple[SuiteSettings, dict[str, dict[str, Config]]]:
    """Return what a command line asks for: which runs, and what applies to all of them, as `run_suite` takes it.

    Raises:
        UsageError, SystemExit: a mistake in the options.
    """
    settings, rest = parse_settings(arguments)
    return settings, sweep_variants(settings.sweep, [settings.task, *rest], settings.chosen_methods)
