"""What makes up a suite, as its command is asked for it. Nothing here needs PyTorch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gsda_fast.commands import UNSAID, parse_command_line, program
from gsda_fast.data.benchmarks import BENCHMARKS
from gsda_fast.errors import UsageError

ABLATION = ("source-only", "entropy", "glb", "glb-cls", "glb-cls-grp", "gsda")
"""The four rows of the paper's Table 1, and before them what they start from: each adds one part to the one before."""

OF_ONE_RUN = {"--method": "--methods", "--seed": "--seeds", "--source": "--tasks", "--target": "--tasks"}
"""Options of a single run, and the suite's in their place."""


@dataclass(frozen=True)
class SuiteSettings:
    """Run every transfer task of a benchmark with every method and seed, and put the results into one table.

    Every option of the command `train TASK` (--help there) applies as well, to all runs. The same command again keeps
    the runs that have finished and goes on with those that were interrupted.
    """

    task: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="TASK", help=f"The benchmark: {', '.join(BENCHMARKS)}."),
    ]
    methods: Annotated[tuple[str, ...], UNSAID] = ()
    """Methods to run; all: every one; baselines: source-only and those that others published. If none is given: those
    of --ablation and dann; with --sweep gsda alone; with --paired those of --ablation."""
    ablation: bool = False
    """Run the rows of the paper's Table 1, glb, glb-cls, glb-cls-grp and gsda, after source-only and entropy."""
    paired: bool = False
    """Also report the paired differences between the methods, of the accuracy and of the gradients' mismatch. Runs of
    one transfer task and seed share initial weights, groups, samples and so the whole warm-up. With --sweep also those
    between the settings."""
    sweep: Annotated[tuple[str, ...], UNSAID] = ()
    """Options with several values each, such as alpha=0.02,0.1 beta=0,1: all runs with each combination. The name of a
    term, such as mcc=0.3,1, is its weight."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run each method with."""
    tasks: Annotated[tuple[str, ...], UNSAID] = ()
    """Transfer tasks such as A->W; all of the benchmark's if none is given."""
    jobs: int = 0
    """Runs at a time; 0: one on each GPU, or one on each CPU core, 16 at most."""
    output: Annotated[Path | None, UNSAID] = None
    """Folder of the suite; runs/suite-TASK if not given."""
    report: bool = False
    """Draw the page of plots, as the command `report` does for the suite's folder."""
    slurm: Annotated[str | None, UNSAID] = None
    """Submit the suite to this partition of Slurm, with the extra `slurm`, as jobs that share its runs."""
    gpus: int = 1
    """With --slurm: how many jobs, each with one GPU."""
    cpus: int = 8
    """With --slurm: CPU cores of each job."""
    hours: int = 24
    """With --slurm: how long a job may take; one that is not done by then is queued again, and goes on."""

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
        for name in ("gpus", "cpus", "hours"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}", found=str(getattr(self, name)), expected="a whole number >= 1")

    @property
    def folder(self) -> Path:
        """Where the suite goes."""
        return self.output or Path("runs") / f"suite-{self.task}"

    @property
    def chosen_methods(self) -> tuple[str, ...]:
        """The methods to run, by their names in the table of methods."""
        # Here, so that --help need not wait for PyTorch.
        from gsda_fast.methods import ALIASES, METHODS

        if self.methods == ("all",):
            return tuple(METHODS)
        if self.methods == ("baselines",):
            return tuple(name for name in METHODS if name not in ABLATION or name == "source-only")
        if self.methods:
            return tuple(ALIASES.get(name, name) for name in self.methods)
        if self.sweep and not self.ablation:
            return ("gsda",)
        return ABLATION if self.ablation or self.paired else (*ABLATION, "dann")


def parse_settings(arguments: list[str]) -> tuple[SuiteSettings, list[str]]:
    """Return which runs a command line asks for, and the options of the runs in it.

    Raises:
        UsageError, SystemExit: a mistake in the suite's own options.
    """
    settings, rest = parse_command_line(
        lambda: tyro.cli(SuiteSettings, args=arguments, prog=program("suite"), return_unknown_args=True)
    )
    if "--methods" in arguments and not settings.methods:
        raise UsageError("--methods", found="none", expected="one or more methods, all, or baselines")
    for option, instead in OF_ONE_RUN.items():
        if option in (argument.partition("=")[0] for argument in rest):
            raise UsageError(option, found="an option of a single run", expected=instead)
    return settings, rest
