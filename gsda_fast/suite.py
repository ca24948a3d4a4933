"""`python -m gsda_fast.suite TASK`: transfer tasks x methods x seeds, a run folder each, and a table at the end."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from gsda_fast.commands import parse_command_line, run_command
from gsda_fast.config import PRESETS, Config, parse_config
from gsda_fast.data.benchmarks import Benchmark, find_benchmark
from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS
from gsda_fast.results import tables
from gsda_fast.results.page import write_page
from gsda_fast.results.run_folder import RunFolder, RunResult, atomic_file
from gsda_fast.train import train

PROGRAM = "python -m gsda_fast.suite"

_OF_ONE_RUN = {"--method": "--methods", "--seed": "--seeds", "--source": "--tasks", "--target": "--tasks"}


@dataclass(frozen=True)
class SuiteSettings:
    """Which runs make up the suite. Every option of gsda_fast.train beside these applies to all of them."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="|".join(PRESETS))]
    """Benchmark."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run each of them with."""
    tasks: tuple[str, ...] = ()
    """Transfer tasks such as A->W; all of the benchmark's if none is given."""
    jobs: int = 0
    """Runs at a time; 0: one on each GPU, or one on each CPU core."""
    output: Path | None = None
    """Folder of the suite; runs/suite-TASK if not given."""
    report: bool = False
    """Draw a page of plots that compares the runs of the first transfer task and seed."""


def run_suite(settings: SuiteSettings, base: Config, console: Console) -> Path:
    """Runs what has not finished yet, writes the tables and returns the suite's folder.

    Raises:
        UsageError: a transfer task that the benchmark lacks, or what `gsda_fast.train.train` raises.
    """
    _check(settings)
    benchmark = find_benchmark(settings.task)
    pairs = [_transfer_task(benchmark, text) for text in settings.tasks] or list(benchmark.transfer_tasks)
    if not pairs:
        raise UsageError("--tasks", found="none", expected=f"one or more SOURCE->TARGET for the task {settings.task}")
    folder = settings.output or Path("runs") / f"suite-{settings.task}"
    configs = [
        replace(
            base,
            run=replace(
                base.run,
                method=method,
                seed=seed,
                output=folder / RunFolder.default_name(settings.task, source, target, method, seed),
            ),
            data=replace(base.data, source=source, target=target),
        )
        for seed in settings.seeds
        for source, target in pairs
        for method in settings.methods
    ]
    for config in configs:
        config.validate()
    # A transfer task under its name and its alias is one folder, and two processes must not write into it.
    repeated = [output for output, count in Counter(config.run.output for config in configs).items() if count > 1]
    if repeated:
        raise UsageError("--methods, --seeds, --tasks", found=f"{repeated[0]} twice", expected="each run once")
    started = time.perf_counter()
    results = _run_all(configs, settings.jobs, console)
    _write_tables(folder, results, settings.methods, pairs, console)
    if settings.report:
        compared = [RunFolder(config.run.output or "") for config in configs[: len(settings.methods)]]
        with console.status("drawing the page"):
            page = write_page(compared, folder / "report")
        console.print(f"page of plots: {page.resolve()}", soft_wrap=True)
    console.print(f"{len(results)} runs in {time.perf_counter() - started:.0f} s")
    return folder


def _check(settings: SuiteSettings) -> None:
    for option, values in {"--methods": settings.methods, "--seeds": settings.seeds}.items():
        if not values:
            raise UsageError(option, found="none", expected="one or more")
    if settings.jobs < 0:
        raise UsageError("--jobs", found=str(settings.jobs), expected="a whole number >= 0")


def _transfer_task(benchmark: Benchmark, text: str) -> tuple[str, str]:
    source, arrow, target = text.partition("->")
    if not arrow:
        raise UsageError("--tasks", found=f"'{text}'", expected="SOURCE->TARGET, such as A->W (in quotes)")
    source, target = source.strip(), target.strip()
    if not benchmark.domains:
        return source, target
    return benchmark.domain(source).name, benchmark.domain(target).name


def _run_all(configs: list[Config], jobs: int, console: Console) -> list[RunResult]:
    gpus = torch.cuda.device_count()
    workers = min(jobs or gpus or os.cpu_count() or 1, len(configs))
    # A fork would copy the threads' locks but not the threads.
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for worker in range(workers):
        places.put(worker % gpus if gpus else None)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_take_place, initargs=(places,)) as pool,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("runs", total=len(configs))
        futures: list[Future[RunResult]] = [pool.submit(_run_one, config) for config in configs]
        try:
            for future in as_completed(futures):
                result = future.result()
                progress.advance(bar)
                accuracy = "-" if result.accuracy.last is None else f"{result.accuracy.last:5.1f} %"
                console.print(
                    f"{result.source} -> {result.target}  {result.method}  seed {result.seed}  {accuracy}",
                    highlight=False,
                    soft_wrap=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _take_place(places: multiprocessing.Queue[int | None]) -> None:
    """Gives a worker its own GPU, before CUDA is initialized in it."""
    gpu = places.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)


def _run_one(config: Config) -> RunResult:
    return train(config, Console(quiet=True))


def _write_tables(
    folder: Path,
    results: Iterable[RunResult],
    methods: tuple[str, ...],
    pairs: list[tuple[str, str]],
    console: Console,
) -> None:
    finished = list(results)
    choices: tuple[tables.Choice, ...] = ("last", "label_free", "best")
    made = [tables.transfer_table(finished, choice=choice, methods=methods, transfer_tasks=pairs) for choice in choices]
    for table in made:
        console.print(tables.to_terminal(table))
    for suffix, text in {
        "md": tables.to_markdown(made),
        "csv": tables.to_csv(made),
        "json": tables.to_json(made),
    }.items():
        with atomic_file(folder / f"table.{suffix}") as file:
            file.write(text.encode())
    console.print(f"tables: {folder}/table.md, table.csv, table.json", soft_wrap=True)


def main() -> None:
    settings, rest = parse_command_line(
        lambda: tyro.cli(SuiteSettings, args=sys.argv[1:], prog=PROGRAM, return_unknown_args=True)
    )
    for option, instead in _OF_ONE_RUN.items():
        if option in (argument.partition("=")[0] for argument in rest):
            raise UsageError(option, found="an option of a single run", expected=instead)
    run_suite(settings, parse_config([settings.task, *rest], PROGRAM), Console())


if __name__ == "__main__":
    run_command(main)
