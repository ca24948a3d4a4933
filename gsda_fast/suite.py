"""`python -m gsda_fast.suite TASK`: transfer tasks x methods x seeds, a run folder each, and a table at the end."""

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from gsda_fast.commands import parse_command_line, program, run_command
from gsda_fast.config import TASKS, Config, method_options, parse_config
from gsda_fast.console import plain_console
from gsda_fast.data.benchmarks import Benchmark, find_benchmark
from gsda_fast.data.torch_loader import usable_cores
from gsda_fast.embed import with_features
from gsda_fast.errors import Stopped, TrainingError, UsageError
from gsda_fast.methods import ALIASES, METHODS
from gsda_fast.report import report_on_suite, suite_layout
from gsda_fast.results.page import sweep_section
from gsda_fast.results.records import RunResult
from gsda_fast.results.run_folder import RunFolder, file_name
from gsda_fast.results.suite_folder import (
    Layout,
    SuiteFolder,
    TableName,
    paired_sweep_tables,
    paired_tables,
    score_tables,
    suite_tables,
)
from gsda_fast.results.tables import Table, sweep_tables, to_terminal
from gsda_fast.train import train

ABLATION = ("source-only", "entropy", "glb", "glb-cls", "glb-cls-grp", "gsda")
"""The four rows of the paper's Table 1, and before them what they start from: each adds one part to the one before."""

BASELINES = tuple(name for name in METHODS if name not in ABLATION or name == "source-only")
"""Source-only and every method that others published."""

_OF_ONE_RUN = {"--method": "--methods", "--seed": "--seeds", "--source": "--tasks", "--target": "--tasks"}
"""Options of a single run, and the suite's in their place."""


@dataclass(frozen=True)
class SuiteSettings:
    """Which runs make up the suite.

    Every option of `python -m gsda_fast.train TASK` (--help there) applies as well, to all runs. The same command again
    keeps the runs that have finished and goes on with those that were interrupted.
    """

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="|".join(TASKS))]
    """Benchmark."""
    methods: tuple[str, ...] = ()
    """Methods to run; all: every one; baselines: source-only and those that others published. If none is given: those
    of --ablation and dann; with --sweep gsda alone; with --paired those of
    --ablation."""
    ablation: bool = False
    """Run the rows of the paper's Table 1, glb, glb-cls, glb-cls-grp and gsda, after source-only and entropy."""
    paired: bool = False
    """Also report the paired differences between the methods, of the accuracy and of the gradients' mismatch. Runs of
    one transfer task and seed share initial weights, groups, samples and so the whole warm-up. With --sweep also those
    between the settings."""
    sweep: tuple[str, ...] = ()
    """Options with several values each, such as alpha=0.02,0.1 beta=0,1: all runs with each combination."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run each method with."""
    tasks: tuple[str, ...] = ()
    """Transfer tasks such as A->W; all of the benchmark's if none is given."""
    jobs: int = 0
    """Runs at a time; 0: one on each GPU, or one on each CPU core, 16 at most."""
    output: Path | None = None
    """Folder of the suite; runs/suite-TASK if not given."""
    report: bool = False
    """Draw the page of plots, as gsda_fast.report does for the suite's folder."""

    def __post_init__(self) -> None:
        if self.ablation and self.methods:
            raise UsageError("--ablation", found="--methods beside it", expected="one of the two")
        if len(self.methods) > 1 and {"all", "baselines"} & set(self.methods):
            raise UsageError("--methods", found=" ".join(self.methods), expected="names, or all or baselines alone")
        if not self.seeds:
            raise UsageError("--seeds", found="none", expected="one or more")
        if self.paired and len(self.chosen_methods) < 2 and not self.sweep:
            raise UsageError("--paired", found="one method", expected="two or more of --methods")
        if self.jobs < 0:
            raise UsageError("--jobs", found=str(self.jobs), expected="a whole number >= 0")

    @property
    def chosen_methods(self) -> tuple[str, ...]:
        if self.methods in (("all",), ("baselines",)):
            return tuple(METHODS) if self.methods == ("all",) else BASELINES
        if self.methods:
            return tuple(ALIASES.get(name, name) for name in self.methods)
        if self.sweep and not self.ablation:
            return ("gsda",)
        return ABLATION if self.ablation or self.paired else (*ABLATION, "dann")


def run_suite(settings: SuiteSettings, variants: Mapping[str, Mapping[str, Config]], console: Console) -> Path:
    """Run what has not finished yet, write the tables and return the suite's folder.

    Args:
        settings: which runs.
        variants: what applies to all runs of a setting, by the setting's name, which is that of its folder, and by
            method; without a sweep the only name is empty, and stands for the suite's own folder.
        console: where progress and tables are shown.

    Raises:
        UsageError: a transfer task that the benchmark lacks, or what `gsda_fast.train.train` raises.
        TrainingError: after all other runs and without the failed ones in the tables: some runs cannot go on.
        KeyboardInterrupt: the runs were stopped; everything is kept and the same call goes on.
    """
    benchmark = find_benchmark(settings.task)
    pairs = tuple(_transfer_task(benchmark, text) for text in settings.tasks) or benchmark.transfer_tasks
    if not pairs:
        raise UsageError("--tasks", found="none", expected=f"one or more SOURCE->TARGET for the task {settings.task}")
    folder = settings.output or Path("runs") / f"suite-{settings.task}"
    configs = {
        name: [
            _config_of_run(base[method], pair, seed, folder / name)
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

    made_of = f"{len(variants)} settings x " if len(variants) > 1 else ""
    made_of += f"{len(pairs)} transfer tasks x {len(settings.chosen_methods)} methods x {len(settings.seeds)} seeds"
    console.print(f"{len(everything)} runs: {made_of}")
    started = time.perf_counter()
    in_order = iter(_run_all(everything, settings.jobs, console))
    outcomes = {name: list(itertools.islice(in_order, len(of_variant))) for name, of_variant in configs.items()}
    layout = replace(suite_layout(benchmark), methods=settings.chosen_methods, transfer_tasks=pairs)
    failures = [
        result for of_variant in outcomes.values() for result in of_variant if isinstance(result, TrainingError)
    ]
    finished = {
        name: results
        for name, of_variant in outcomes.items()
        if (results := [result for result in of_variant if isinstance(result, RunResult)])
    }
    for name, results in finished.items():
        runs = [RunFolder(config.run.output or "") for config in configs[name]]
        # The tables of a sweep's settings are for looking up.
        shown = Console(quiet=True) if settings.sweep else console
        _write_tables(SuiteFolder(folder / name), results, runs, layout, settings.paired, shown)
    if settings.sweep and finished:
        _write_sweep(SuiteFolder(folder), finished, layout, settings.paired, console)
    if settings.report and finished:
        for name in dict.fromkeys(["", *finished]):
            with console.status("drawing the page"):
                page = report_on_suite(SuiteFolder(folder / name))
            console.print(f"page of plots: {page.resolve()}", soft_wrap=True)
    console.print(f"{len(everything) - len(failures)} runs in {time.perf_counter() - started:.0f} s")
    if failures:
        message = f"{len(failures)} of {len(everything)} runs failed and are in no table; the first: {failures[0]}"
        raise TrainingError(message)
    return folder


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
        sweep: NAME=VALUE,VALUE for each swept option; none: one combination with an empty name.
        arguments: the command line of the runs, the task first. An option of some method's own goes to those that
            have it.
        methods: to be run.

    Raises:
        UsageError: not of that form, or a value that does not fit the option.
    """
    axes = _sweep_axes(sweep)
    variants: dict[str, dict[str, Config]] = {}
    for combination in itertools.product(*([(name, value) for value in values] for name, values in axes.items())):
        options = [word for name, value in combination for word in (f"--{name}", value)]
        # It names a folder, and a value may be a path.
        label = ",".join(f"{name}={file_name(value)}" for name, value in combination)
        configs = {method: _config_of_method(method, [*arguments, *options], methods) for method in methods}
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
                if f"--{name}" in (*_OF_ONE_RUN, "--output", "--resume"):
                    instead = _OF_ONE_RUN.get(f"--{name}", "an option that changes the runs' figures")
                    raise UsageError("--sweep", found=name, expected=instead)
            if not (name and value):
                raise UsageError("--sweep", found=f"'{text}'", expected="NAME=VALUE,VALUE such as alpha=0.02,0.1")
            axes.setdefault(name, []).append(value)
    return axes


def _run_all(configs: list[Config], jobs: int, console: Console) -> list[RunResult | TrainingError]:
    """Return the result of each run, or why it failed; a failed run leaves the others alone."""
    gpus = visible_gpus()
    workers = min(jobs or len(gpus) or usable_cores(), len(configs))
    # A fork would copy the threads' locks but not the threads.
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for worker in range(workers):
        places.put(gpus[worker % len(gpus)] if gpus else None)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    outcomes: dict[int, RunResult | TrainingError] = {}
    with (
        ProcessPoolExecutor(
            workers, mp_context=context, initializer=_prepare_worker, initargs=(places, sys.orig_argv)
        ) as pool,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("runs", total=len(configs))
        try:
            with _interrupts_held_back():
                futures: dict[Future[RunResult], int] = {
                    pool.submit(_run_one, config): index for index, config in enumerate(configs)
                }
            for future in as_completed(futures):
                index = futures[future]
                try:
                    outcomes[index] = result = future.result()
                    message = _line(result)
                except TrainingError as error:
                    outcomes[index] = TrainingError(f"{configs[index].run.output}: {error}")
                    message = f"error: {outcomes[index]}"
                progress.advance(bar)
                console.print(message, highlight=False, soft_wrap=True)
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
    return [outcomes[index] for index in range(len(configs))]


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
    _write(suite, "table", suite_tables(results, layout), console)
    if paired:
        _write(suite, "paired", paired_tables(runs, layout), console)
    _write(suite, "scores", score_tables(runs, layout), console)


def _write_sweep(
    suite: SuiteFolder, results: Mapping[str, Sequence[RunResult]], layout: Layout, paired: bool, console: Console
) -> None:
    made = sweep_tables(results, **layout.table)
    # The choices beside the last step are for looking up.
    _write(suite, "sweep", made, console, [table for table in made if table.choice == "last"])
    if paired:
        _write(suite, "paired", paired_sweep_tables(results, layout), console)
    sweep_section(suite, made)


def _write(
    suite: SuiteFolder, name: TableName, made: Sequence[Table], console: Console, shown: Sequence[Table] | None = None
) -> None:
    if made:
        suite.write_tables(name, made)
        for table in made if shown is None else shown:
            console.print(to_terminal(table))
        console.print(f"{name}: {suite.table_path(name, 'md')}, and as .csv and .json", soft_wrap=True)


def parse_suite(arguments: list[str]) -> tuple[SuiteSettings, dict[str, dict[str, Config]]]:
    """Return what a command line asks for: which runs, and what applies to all of them, as `run_suite` takes it.

    Raises:
        UsageError, SystemExit: a mistake in the options.
    """
    settings, rest = parse_command_line(
        lambda: tyro.cli(SuiteSettings, args=arguments, prog=program("suite"), return_unknown_args=True)
    )
    if "--methods" in arguments and not settings.methods:
        raise UsageError("--methods", found="none", expected=f"one or more of {', '.join(METHODS)}")
    for option, instead in _OF_ONE_RUN.items():
        if option in (argument.partition("=")[0] for argument in rest):
            raise UsageError(option, found="an option of a single run", expected=instead)
    return settings, sweep_variants(settings.sweep, [settings.task, *rest], settings.chosen_methods)


def main() -> None:
    # A scheduler's wish to stop is Ctrl-C's: the runs save a checkpoint before they end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings, variants = parse_suite(with_features(sys.argv[1:], plain_console()))
    run_suite(settings, variants, plain_console())


if __name__ == "__main__":
    run_command(main)
