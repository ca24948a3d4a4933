"""One tree of settings, a preset for each task, and their ways in and out: command line, file, run folder."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from gsda_fast.commands import parse_command_line
from gsda_fast.data.benchmarks import BENCHMARKS, find_benchmark
from gsda_fast.data.loaders import DataSettings
from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS
from gsda_fast.methods.gsda import AdversarialSettings
from gsda_fast.model import ModelSettings
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.distributed import DistributedSettings
from gsda_fast.training.optim import OptimizerSettings
from gsda_fast.training.precision import PrecisionSettings
from gsda_fast.training.pseudo_labels import PseudoLabelSettings

_LARGEST_SEED = 2**63 - 1  # what TOML's integers hold


@dataclass(frozen=True)
class RunSettings:
    """The run."""

    method: Annotated[str, tyro.conf.arg(metavar="|".join(METHODS))] = "gsda"
    """Adaptation method."""
    steps: int = 20_000
    """Optimizer steps in all, warm-up included, whatever the number of processes."""
    warmup: int = 0
    """The first of the steps, which train on the source alone."""
    batch_size: int = 36
    """Images of each domain in a batch, for each process."""
    seed: int = 0
    """Seed of the initial weights, the groups of classes, the order of the samples and their augmentation."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: the GPU if there is one."""
    threads: int = 0
    """CPU threads of PyTorch; 0: PyTorch's choice."""
    profile: int = 0
    """Write a trace of that many steps, of the first process, into the run's folder, to be opened with Perfetto."""
    checkpoint_seconds: int = 60
    """Least time from one checkpoint to the next; they are written after scorings of the target. 0: after each."""
    output: Path | None = None
    """The run's folder; runs/TASK-SOURCE-TARGET-METHOD-seedN if not given."""
    resume: Annotated[str, tyro.conf.arg(metavar="auto|never|PATH")] = "auto"
    """Go on from the newest checkpoint of the output folder, or start it afresh; PATH: begin with a checkpoint, or the
    newest one of another run's folder, and go on in the output folder once that has a checkpoint of its own."""
    weights_alone: bool = False
    """Take no more than the weights from --resume PATH, and start at step 0: data, processes and method may differ."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    task: Annotated[str, tyro.conf.Suppress] = "digits"
    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)
    pseudo_labels: PseudoLabelSettings = field(default_factory=PseudoLabelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)

    def validate(self) -> None:
        """Checks what a type cannot say.

        Raises:
            UsageError: a number outside its range; the message names the option.
        """
        if self.run.method not in METHODS:
            raise UsageError("--method", found=f"'{self.run.method}'", expected=", ".join(METHODS))
        at_least = {
            "--steps": (self.run.steps, 1),
            "--warmup": (self.run.warmup, 0),
            "--batch-size": (self.run.batch_size, 1),
            "--log-every": (self.run.log_every, 1),
            "--seed": (self.run.seed, 0),
            "--threads": (self.run.threads, 0),
            "--workers": (self.data.workers, 0),
            "--profile": (self.run.profile, 0),
            "--checkpoint-seconds": (self.run.checkpoint_seconds, 0),
            "--timeout": (self.distributed.timeout, 1),
            "--groups": (self.adversarial.groups, 0),
            "--hidden-dim": (self.adversarial.hidden_dim, 1),
            "--bottleneck-dim": (self.model.bottleneck_dim, 1),
            "--refresh-every": (self.pseudo_labels.refresh_every, 0),
        }
        for option, (value, least) in at_least.items():
            if value < least:
                raise UsageError(option, found=str(value), expected=f"a whole number >= {least}")
        if self.run.seed > _LARGEST_SEED:
            raise UsageError("--seed", found=str(self.run.seed), expected="a whole number below 2^63")
        numbers = {
            "--alpha": self.adversarial.alpha,
            "--beta": self.adversarial.beta,
            "--adversarial-weight": self.adversarial.adversarial_weight,
            "--min-weight": self.adversarial.min_weight,
            "--learning-rate": self.optimizer.learning_rate,
            "--backbone-learning-rate": self.optimizer.backbone_learning_rate,
            "--weight-decay": self.optimizer.weight_decay,
        }
        for option, number in numbers.items():
            if not 0 <= number < float("inf"):
                raise UsageError(option, found=str(number), expected="a finite number >= 0")
        for option, share in {
            "--confidence-threshold": self.pseudo_labels.confidence_threshold,
            "--momentum": self.optimizer.momentum,
        }.items():
            if not 0 <= share <= 1:
                raise UsageError(option, found=str(share), expected="a number from 0 to 1")
        if self.run.weights_alone and self.run.resume in ("auto", "never"):
            raise UsageError("--weights-alone", found=f"--resume {self.run.resume}", expected="--resume PATH")
        if self.run.profile >= self.run.steps:
            expected = f"less than --steps, {self.run.steps}: the profiler needs a step before those"
            raise UsageError("--profile", found=str(self.run.profile), expected=expected)
        if self.run.warmup > self.run.steps:
            raise UsageError("--warmup", found=str(self.run.warmup), expected=f"at most --steps, {self.run.steps}")

    def to_dict(self) -> dict[str, Any]:
        """Nested tables of plain values, as stored in config.toml."""
        return dataclasses.asdict(self)

    def with_defaults(self, names: Iterable[str]) -> Config:
        """The same with some settings, by names such as ``data.workers``, as the task's preset has them."""
        preset, changed = PRESETS[self.task], self
        for name in names:
            table, _, setting = name.partition(".")
            default = getattr(getattr(preset, table), setting)
            changed = replace(changed, **{table: replace(getattr(changed, table), **{setting: default})})
        return changed


def _preset(task: str, steps: int, refresh_every: int = 0, **changes: Any) -> Config:
    benchmark = find_benchmark(task)
    paper = benchmark.paper
    adversarial = AdversarialSettings(groups=0)
    if paper is not None:
        adversarial = AdversarialSettings(alpha=paper.alpha, beta=paper.beta, groups=paper.groups)
    config = Config(
        task=task,
        run=RunSettings(steps=steps),
        adversarial=adversarial,
        # Balancing over pseudo-classes would revive the classes that a partial task's target lacks.
        pseudo_labels=PseudoLabelSettings(refresh_every=refresh_every, balance_target=benchmark.target_classes is None),
    )
    return replace(config, **changes)


# The settings under which the figures of the README were obtained.
_DIGITS: dict[str, Any] = {
    "run": RunSettings(steps=800, warmup=300, batch_size=64, threads=1, checkpoint_seconds=0),
    "data": DataSettings(cache_on_device=True),
    "model": ModelSettings(backbone="lenet", weights="none", bottleneck_dim=128, bottleneck_activation="relu"),
    "adversarial": AdversarialSettings(alpha=0.1, beta=1.0, groups=3, hidden_dim=32),
    "optimizer": OptimizerSettings(learning_rate=0.05, backbone_learning_rate=0.05, weight_decay=5e-4),
}

PRESETS: dict[str, Config] = {
    "digits": _preset("digits", steps=800, refresh_every=50, **_DIGITS),
    "digits-partial": _preset("digits-partial", steps=800, refresh_every=50, **_DIGITS),
    "pictures": _preset("pictures", steps=2_000, refresh_every=100, model=ModelSettings(backbone="efficientnet-lite0")),
    "visda": _preset("visda", steps=30_000),
    "office31": _preset("office31", steps=20_000),
    "office31-partial": _preset("office31-partial", steps=20_000),
    "office-home": _preset("office-home", steps=30_000),
    "office-home-partial": _preset("office-home-partial", steps=30_000),
    "folder": _preset("folder", steps=20_000),
}


def parse_config(arguments: list[str], program: str) -> Config:
    """The configuration that a command line asks for: ``TASK [options]`` or ``--config FILE [options]``.

    Raises:
        UsageError: a task, an option or a value that does not exist or does not fit.
    """
    default, rest = _default_config(_with_values(arguments), program)
    config: Config = parse_command_line(
        lambda: tyro.cli(
            Config,
            default=default,
            args=rest,
            prog=f"{program} {default.task}",
            description=f"Options of the task {default.task}, with the defaults of its preset.",
            config=(tyro.conf.OmitArgPrefixes,),
        )
    )
    config.validate()
    return config


def _with_values(arguments: list[str]) -> list[str]:
    """--compile and --no-compile as values of one option, whose third value is the default."""
    written: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument == "--no-compile":
            written += ["--compile", "off"]
        elif argument == "--compile" and following not in ("auto", "on", "off"):
            written += ["--compile", "on"]
        else:
            written.append(argument)
    return written


def config_from_dict(tables: dict[str, Any], origin: str) -> Config:
    """The inverse of `Config.to_dict`; settings left out keep the defaults of the task's preset.

    Args:
        tables: as read from config.toml. origin: the file's name, for messages.

    Raises:
        UsageError: no task, an unknown setting, or a value of the wrong type.
    """
    task = tables.get("task")
    if not isinstance(task, str) or task not in PRESETS:
        raise UsageError(origin, found=f"task = {task!r}", expected=f"one of {', '.join(PRESETS)}")
    sections: dict[str, Any] = {}
    for name, table in tables.items():
        if name == "task":
            continue
        preset = getattr(PRESETS[task], name, None)
        if preset is None or not isinstance(table, dict):
            known = ", ".join(f.name for f in dataclasses.fields(Config))
            raise UsageError(origin, found=f"the entry {name!r}", expected=f"task or a table among {known}")
        known_settings = [f.name for f in dataclasses.fields(preset)]
        unknown = set(table).difference(known_settings)
        if unknown:
            raise UsageError(
                origin, found=f"unknown setting {sorted(unknown)[0]!r} in [{name}]", expected=", ".join(known_settings)
            )
        settings = type(preset)
        sections[name] = replace(preset, **{key: _as_type_of(settings, key, table[key], origin) for key in table})
    return replace(PRESETS[task], **sections)


def _as_type_of(settings: type, key: str, value: Any, origin: str) -> Any:
    """A value read from TOML as the setting's own type: paths are strings there, and 1 will do for 1.0."""
    annotation = get_type_hints(settings)[key]
    kinds = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        if (type(value), value) in [(type(kind), kind) for kind in kinds]:
            return value
        expected = ", ".join(map(str, kinds))
    else:
        if type(value) in kinds:
            return value
        if Path in kinds and isinstance(value, str):
            return Path(value)
        if float in kinds and type(value) is int:
            return float(value)
        expected = _TOML_KINDS[next(kind for kind in kinds if kind in _TOML_KINDS)]
    raise UsageError(origin, found=f"{key} = {value!r}", expected=expected)


_TOML_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Path: "a path in quotes",
}


def _without_default_output(config: Config) -> Config:
    """The same without a folder that was chosen by the settings: with another seed or method it is another one."""
    run, data = config.run, config.data
    if data.source is None or data.target is None:
        return config
    if run.output != RunFolder.default_path(config.task, data.source, data.target, run.method, run.seed):
        return config
    return replace(config, run=replace(run, output=None))


def _default_config(arguments: list[str], program: str) -> tuple[Config, list[str]]:
    """The configuration that options change, and those options."""
    tasks = ", ".join(PRESETS)
    if arguments[:1] == ["--config"]:
        if len(arguments) < 2:
            raise UsageError("--config", found="no file name", expected="the config.toml of a run")
        path = Path(arguments[1])
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError("--config", found=f"{path} ({error})", expected="the config.toml of a run") from error
        return _without_default_output(config_from_dict(tables, str(path))), arguments[2:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: {program} TASK [options]\n       {program} --config FILE [options]\n\nTASK: {tasks}")
        print(f"\n{program} TASK --help lists the options and the defaults of that task.")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        found = f"the option {arguments[0]} first" if arguments else "nothing"
        raise UsageError("TASK", found=found, expected=f"one of {tasks}, before the options")
    if arguments[0] not in PRESETS:
        raise UsageError("TASK", found=f"'{arguments[0]}'", expected=f"one of {tasks}")
    return PRESETS[arguments[0]], arguments[1:]


assert set(PRESETS) == set(BENCHMARKS), "every benchmark has a preset"
