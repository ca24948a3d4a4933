"""One tree of settings, a preset for each task, and their ways in and out: command line, file, run folder."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import tyro
from msgspec import Meta

from gsda_fast.commands import UNSAID, parse_command_line, program
from gsda_fast.data.benchmarks import BENCHMARKS, find_benchmark
from gsda_fast.data.loaders import DataSettings
from gsda_fast.errors import UsageError
from gsda_fast.methods import ALIASES, METHODS, TERMS, AdaptationSettings, MethodSettings
from gsda_fast.model import FEATURES, ModelSettings
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.distributed import DistributedSettings
from gsda_fast.training.optim import OptimizerSettings
from gsda_fast.training.precision import PrecisionSettings
from gsda_fast.training.pseudo_labels import PseudoLabelSettings

COMMON_OPTIONS = (
    *("--source", "--target", "--data-root", "--method", "--add"),
    *("--steps", "--batch-size", "--seed", "--device", "--output"),
)
"""What most command lines need: `--help` names these before the groups of all options."""

_LARGEST_SEED = 2**63 - 1  # what TOML's integers hold

Recipe = Literal["common", "paper"]


@dataclass(frozen=True)
class RunSettings:
    """The run."""

    method: Annotated[str, tyro.conf.arg(metavar="NAME")] = "gsda"
    """Adaptation method. Each has options of its own: `--method NAME --help`. A name that does not exist lists them."""
    recipe: Recipe = "common"
    """Settings to start from: those that all methods share, or those of the method's authors."""
    steps: Annotated[int, Meta(ge=1)] = 20_000
    """Optimizer steps in all, warm-up included, whatever the number of processes."""
    warmup: Annotated[int, Meta(ge=0)] = 0
    """The first of the steps, which train on the source alone."""
    batch_size: Annotated[int, Meta(ge=1)] = 36
    """Images of each domain in a batch, for each process."""
    seed: Annotated[int, Meta(ge=0, le=_LARGEST_SEED)] = 0
    """Seed of the initial weights, the groups of classes, the order of the samples and their augmentation."""
    log_every: Annotated[int, Meta(ge=1)] = 50
    """Steps between two lines of metrics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: the GPU if there is one."""
    threads: Annotated[int, Meta(ge=0)] = 0
    """CPU threads of PyTorch; 0: PyTorch's choice."""
    profile: Annotated[int, Meta(ge=0)] = 0
    """Write a trace of that many steps, of the first process, into the run's folder, to be opened with Perfetto."""
    checkpoint_seconds: Annotated[int, Meta(ge=0)] = 60
    """Least time from one checkpoint to the next; they are written after evaluations of the target. 0: after each."""
    output: Annotated[Path | None, UNSAID] = None
    """The run's folder; runs/TASK-SOURCE-TARGET-METHOD-seedN if not given."""
    resume: Annotated[str, tyro.conf.arg(metavar="auto|never|PATH")] = "auto"
    """Resume from the newest checkpoint of the output folder, or start it afresh; PATH: begin with a checkpoint, or the
    newest one of another run's folder, and resume in the output folder once that has a checkpoint of its own."""
    weights_alone: bool = False
    """Take no more than the weights from --resume PATH, and start at step 0: data, processes and method may differ."""


def _read_terms(words: list[str]) -> dict[str, float]:
    terms: dict[str, float] = {}
    for word in words:
        name, _, weight = word.partition("=")
        try:
            terms[name] = float(weight)
        except ValueError:
            raise UsageError("--add", found=f"'{word}'", expected="NAME=WEIGHT, such as entropy=0.1") from None
    return terms


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _terms(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Let `--add mcc=1.0 bsp=1e-4` stand for a table of weights; tyro's own form is `--add mcc 1.0 bsp 1e-4`."""
    if get_origin(info.type) is not Mapping:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=WEIGHT ...]",
        instance_from_str=_read_terms,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda terms: [f"{name}={weight:g}" for name, weight in terms.items()] or ["none"],
    )


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    task: Annotated[str, tyro.conf.Suppress] = "digits"
    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    method: MethodSettings = field(default_factory=MethodSettings)
    adaptation: AdaptationSettings = field(default_factory=AdaptationSettings)
    pseudo_labels: PseudoLabelSettings = field(default_factory=PseudoLabelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)

    def validate(self) -> None:
        """Check what a type cannot say: bounds, and what settings of different tables allow each other.

        Raises:
            UsageError: a value that is not allowed; the message names the option.
        """
        for table in _tables(self).values():
            _require_bounds(table)
        run, adaptation, entry = self.run, self.adaptation, METHODS[self.run.method]
        if run.weights_alone and run.resume in ("auto", "never"):
            raise UsageError("--weights-alone", found=f"--resume {run.resume}", expected="--resume PATH")
        if run.profile >= run.steps:
            expected = f"less than --steps, {run.steps}: the profiler needs a step before those"
            raise UsageError("--profile", found=str(run.profile), expected=expected)
        if run.warmup > run.steps:
            raise UsageError("--warmup", found=str(run.warmup), expected=f"at most --steps, {run.steps}")
        if entry.method.needs_warmup and run.warmup == 0:
            raise UsageError("--warmup", found=f"0 with --method {run.method}", expected="steps on the source first")
        for name, weight in adaptation.add.items():
            if name not in TERMS:
                raise UsageError("--add", found=f"'{name}'", expected=", ".join(TERMS))
            if not 0 <= weight < math.inf:
                raise UsageError("--add", found=f"{name}={weight}", expected="a finite weight >= 0")
        for option, given in {"add": adaptation.add, "class_weights": adaptation.class_weights != "none"}.items():
            if given and option in entry.method.refuses:
                found = f"with --method {run.method}"
                raise UsageError(_option(option), found=found, expected="a method that is trained by steps")

    def to_dict(self) -> dict[str, Any]:
        """Return nested tables of plain values, as stored in config.toml."""
        return dataclasses.asdict(self)

    def with_defaults(self, names: Iterable[str]) -> Config:
        """Return the same with some settings, by names such as ``data.workers``, as in a run that knew none of them."""
        default, changed = _as_before(preset(self.task, self.run.method, self.run.recipe)), self
        for name in names:
            table, _, setting = name.partition(".")
            value = getattr(getattr(default, table), setting)
            changed = replace(changed, **{table: replace(getattr(changed, table), **{setting: value})})
        return changed


def _tables(config: Config) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in dataclasses.fields(config) if each.name != "task"}


def _option(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _require_bounds(settings: Any) -> None:
    """Check each value against the bounds that stand on its field, and that it is finite."""
    hints = get_type_hints(type(settings), include_extras=True)
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        meta = next((extra for extra in get_args(hints[each.name]) if isinstance(extra, Meta)), None)
        if meta is None or not isinstance(value, int | float):
            continue
        least, most = (-math.inf if meta.ge is None else meta.ge), (math.inf if meta.le is None else meta.le)
        if not (least <= value <= most and math.isfinite(value)):
            kind = "a whole number" if isinstance(value, int) else "a finite number"
            bounds = f"from {least} to {most}" if math.isfinite(most) else f">= {least}"
            raise UsageError(_option(each.name), found=str(value), expected=f"{kind} {bounds}")


def _task(task: str, steps: int, refresh_every: int = 0, **changes: Any) -> Config:
    # Balancing over pseudo-classes would revive the classes that a partial task's target lacks.
    balance = find_benchmark(task).target_classes is None
    pseudo_labels = PseudoLabelSettings(refresh_every=refresh_every, balance_target=balance)
    return replace(Config(task=task, run=RunSettings(steps=steps), pseudo_labels=pseudo_labels), **changes)


# The settings under which the README's results were obtained.
_DIGITS: dict[str, Any] = {
    "run": RunSettings(steps=800, warmup=300, batch_size=64, threads=1, checkpoint_seconds=0),
    "data": DataSettings(cache_on_device=True),
    "model": ModelSettings(backbone="lenet", weights="none", bottleneck_dim=128, bottleneck_activation="relu"),
    "optimizer": OptimizerSettings(learning_rate=0.05, backbone_learning_rate=0.05, weight_decay=5e-4),
}

# Chosen on the pictures by source-only training and by what needs no labels of the target: see docs/embeddings.md.
_FEATURES: dict[str, Any] = {
    "run": RunSettings(steps=700, warmup=200, batch_size=48, threads=1, checkpoint_seconds=10),
    "data": DataSettings(cache_on_device=True, verify=False),
    "model": ModelSettings(FEATURES, weights="none", feature_norm="rms", bottleneck_activation="relu"),
    "optimizer": OptimizerSettings(learning_rate=0.02, backbone_learning_rate=0.02),
}

TASKS: dict[str, Config] = {
    "digits": _task("digits", steps=800, refresh_every=50, **_DIGITS),
    "digits-partial": _task("digits-partial", steps=800, refresh_every=50, **_DIGITS),
    "pictures": _task("pictures", steps=2_000, refresh_every=100, model=ModelSettings(backbone="efficientnet-lite0")),
    "pictures-features": _task("pictures-features", steps=700, refresh_every=50, **_FEATURES),
    "features": _task("features", steps=700, refresh_every=50, **_FEATURES),
    "visda": _task("visda", steps=30_000),
    "office31": _task("office31", steps=20_000),
    "office31-partial": _task("office31-partial", steps=20_000),
    "office-home": _task("office-home", steps=30_000),
    "office-home-partial": _task("office-home-partial", steps=30_000),
    "folder": _task("folder", steps=20_000),
}
"""What all methods share on a task, the common recipe."""


def preset(task: str, method: str = "gsda", recipe: str = "common") -> Config:
    """Return the settings that options change: the task's, with the method's own presets for it.

    Args:
        task: of `TASKS`. method: a name or alias. recipe: "paper" adds what the method's authors changed elsewhere.

    Raises:
        UsageError: an unknown task, method or recipe.
    """
    if task not in TASKS:
        raise UsageError("TASK", found=f"'{task}'", expected=f"one of {', '.join(TASKS)}")
    name = ALIASES.get(method, method)
    if name not in METHODS:
        raise UsageError("--method", found=f"'{method}'", expected=", ".join(METHODS))
    if recipe not in get_args(Recipe):
        raise UsageError("--recipe", found=f"'{recipe}'", expected=" or ".join(get_args(Recipe)))
    entry, config = METHODS[name], TASKS[task]
    run: Any = {"method": name, "recipe": recipe}
    config = replace(config, run=replace(config.run, **run), method=entry.settings)
    for overrides in (entry.presets, entry.recipe if recipe == "paper" else {}):
        for tables in (overrides.get("*", {}), overrides.get(task, {})):
            for table, values in tables.items():
                config = replace(config, **{table: replace(getattr(config, table), **values)})
    return config


def _as_before(config: Config) -> Config:
    """Return a preset with what was done before there were settings for it, where that is another than the default.

    All pixels were used as they are stored. Of images that are never turned `orientation` says nothing.
    """
    if find_benchmark(config.task).orientation("exif") == "stored":
        return config
    return replace(config, data=replace(config.data, orientation="stored"))


def configure(task: str, method: str = "gsda", *, recipe: str = "common", **options: Any) -> Config:
    """Return the configuration that the command line `TASK --method NAME --option value` stands for.

    Args:
        task, method, recipe: see `preset`. options: those of the command line in snake_case: `steps=60,
            sync_ramp=False, add={"mcc": 1.0}`.

    Raises:
        UsageError: an option that does not exist or belongs to another method, or a value that does not fit.
    """
    config = preset(task, method, recipe)
    tables = {each: table for table, settings in _tables(config).items() for each in _names(settings)}
    changes: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        if name not in tables:
            raise _no_option(name, config, tables)
        changes.setdefault(tables[name], {})[name] = _given(getattr(config, tables[name]), name, value)
    for table, values in changes.items():
        config = replace(config, **{table: replace(getattr(config, table), **values)})
    if "add" in options:
        config = with_terms(config, {**preset(task, method, recipe).adaptation.add, **config.adaptation.add})
    if "warmup" not in options:
        config = _with_warmup_for(config, preset(task, method, recipe).run)
    config.validate()
    return config


def _names(settings: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(settings)]


def _no_option(name: str, config: Config, known: Iterable[str]) -> UsageError:
    method, own = config.run.method, _names(config.method)
    others = [other for other, entry in METHODS.items() if name in _names(entry.settings)]
    if others:
        expected = ", ".join(map(_option, own)) or "none: it has no options of its own"
        found = f"an option of {', '.join(others)}"
        return UsageError(_option(name), found=found, expected=f"one of --method {method}: {expected}")
    near = get_close_matches(name, known, 3) or own
    return UsageError(
        _option(name),
        found=f"no option of the task {config.task} and the method {method}",
        expected=f"one such as {', '.join(map(_option, near or ['steps']))}",
        remedy=f"`{program('train')} {config.task} --method {method} --help` lists them",
    )


def _given(settings: Any, name: str, value: Any) -> Any:
    """Return a value that was given in Python with its setting's type; its bounds are a matter of `validate`."""
    plain = value.item() if isinstance(value, np.generic) else value
    plain = os.fspath(plain) if isinstance(plain, os.PathLike) else plain
    try:
        return msgspec.convert(plain, get_type_hints(type(settings))[name], dec_hook=_from_toml)
    except msgspec.ValidationError as error:
        expected = str(error).replace("Expected ", "").replace("`", "")
        raise UsageError(_option(name), found=repr(value), expected=expected) from error


def parse_config(arguments: list[str], program: str) -> Config:
    """Return the configuration that a command line asks for: ``TASK [options]`` or ``--config FILE [options]``.

    Raises:
        UsageError: a task, a method or a value that does not exist or does not fit.
        SystemExit: an option that does not exist or belongs to another method.
    """
    default, rest = _default_config(_with_values(arguments), program)
    what = f"Options of the task {default.task} and the method {default.run.method}, with the defaults of their preset."
    what += f" Most often used: {' '.join(COMMON_OPTIONS)}."
    config: Config = parse_command_line(
        lambda: tyro.cli(
            Annotated[Config, tyro.conf.OmitArgPrefixes],
            default=default,
            args=rest,
            prog=f"{program} {default.task}",
            description=what,
            registry=_REGISTRY,
        )
    )
    config = replace(config, run=replace(config.run, method=default.run.method))
    if _value("--add", rest) is not None:
        config = with_terms(config, {**default.adaptation.add, **config.adaptation.add})
    if _value("--warmup", rest) is None:
        config = _with_warmup_for(config, default.run)
    config.validate()
    return config


def with_terms(config: Config, terms: Mapping[str, float]) -> Config:
    """Return the same with these terms, by weight, in place of those that it has; a weight of 0 drops one."""
    kept = {name: weight for name, weight in terms.items() if weight != 0}
    return replace(config, adaptation=replace(config.adaptation, add=kept))


def _with_warmup_for(config: Config, default: RunSettings) -> Config:
    """Return the same with a warm-up that nobody asked for as large a part of the steps as before, where these are few.

    Args:
        default: before the options, with a warm-up for its own number of steps.
    """
    if config.run.warmup <= config.run.steps:
        return config
    warmup = max(1, default.warmup * config.run.steps // default.steps)
    return replace(config, run=replace(config.run, warmup=warmup))


def method_options(method: str) -> set[str]:
    """Return the method's own options, as on the command line."""
    return {_option(name) for name in _names(METHODS[ALIASES.get(method, method)].settings)}


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
    """Return the inverse of `Config.to_dict`; settings left out keep the defaults of the preset.

    A file of a run has every setting: what it lacks was none when it was written, see `_as_before`.

    Args:
        tables: as read from config.toml. origin: the file's name, for messages.

    Raises:
        UsageError: no task, an unknown setting, or a value of the wrong type.
    """
    task, run = tables.get("task"), tables.get("run")
    if not isinstance(task, str) or task not in TASKS:
        raise UsageError(origin, found=f"task = {task!r}", expected=f"one of {', '.join(TASKS)}")
    if "adversarial" in tables:
        raise UsageError(
            origin,
            found="the table [adversarial], of version 0.1",
            expected="[method], as this version writes it",
            remedy="train the run again, or read it with version 0.1",
        )
    named = run if isinstance(run, dict) else {}
    method, recipe = (str(named.get(name, default)) for name, default in (("method", "gsda"), ("recipe", "common")))
    try:
        default = preset(task, method, recipe)
    except UsageError as error:
        raise UsageError(origin, found=f"{error.what[2:]} = {error.found}", expected=error.expected) from error
    data = tables.get("data")
    if isinstance(data, dict) and "loader" in data:  # a run's, not one that somebody has written by hand
        default = _as_before(default)
    known, read = _tables(default), {}
    for name, table in tables.items():
        if name == "task":
            continue
        if name not in known or not isinstance(table, dict):
            expected = f"task or a table among {', '.join(known)}"
            raise UsageError(origin, found=f"the entry {name!r}", expected=expected)
        settings = known[name]
        names = _names(settings)
        unknown = set(table).difference(names)
        if unknown:
            found = f"unknown setting {min(unknown)!r} in [{name}]"
            raise UsageError(origin, found=found, expected=", ".join(names) or "none: the method has no settings")
        read[name] = replace(settings, **_typed(type(settings), table, f"{origin} [{name}]"))
    config = replace(default, **read)
    return replace(config, run=replace(config.run, method=default.run.method))


def _typed(settings: type, table: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the values of a table with their settings' types: paths are strings in TOML, and 1 will do for 1.0."""
    hints = get_type_hints(settings, include_extras=True)
    values = {}
    for name, value in table.items():
        try:
            values[name] = msgspec.convert(value, hints[name], dec_hook=_from_toml)
        except msgspec.ValidationError as error:
            expected = str(error).replace("Expected ", "").replace("`", "")
            raise UsageError(origin, found=f"{name} = {value!r}", expected=expected) from error
    return values


def _from_toml(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"Expected `{kind.__name__}`")


def _without_default_output(config: Config) -> Config:
    """Return the same without a folder that was chosen by the settings.

    With another seed or method it is another one.
    """
    run, data = config.run, config.data
    if data.source is None or data.target is None:
        return config
    if run.output != RunFolder.default_path(config.task, data.source, data.target, run.method, run.seed):
        return config
    return replace(config, run=replace(run, output=None))


def _with_method(config: Config, method: str | None, recipe: str | None) -> Config:
    """Return the same for another method or recipe: with the settings that the method then has by default."""
    run = config.run
    other = preset(config.task, method or run.method, recipe or run.recipe)
    if (other.run.method, other.run.recipe) == (run.method, run.recipe):
        return config
    run = replace(run, method=other.run.method, recipe=other.run.recipe)
    return replace(config, run=run, method=other.method, adaptation=other.adaptation)


def _default_config(arguments: list[str], program: str) -> tuple[Config, list[str]]:
    """Return the configuration that options change, and those options."""
    tasks = ", ".join(TASKS)
    if arguments[:1] == ["--config"]:
        if len(arguments) < 2:
            raise UsageError("--config", found="no file name", expected="the config.toml of a run")
        path = Path(arguments[1])
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError("--config", found=f"{path} ({error})", expected="the config.toml of a run") from error
        options = arguments[2:]
        config = _without_default_output(config_from_dict(tables, str(path)))
        return _with_method(config, _value("--method", options), _value("--recipe", options)), options
    if not arguments or arguments[0].startswith("-"):
        found = f"the option {arguments[0]} first" if arguments else "nothing"
        raise UsageError("TASK", found=found, expected=f"one of {tasks}, before the options")
    if arguments[0] not in TASKS:
        raise UsageError("TASK", found=f"'{arguments[0]}'", expected=f"one of {tasks}")
    options = arguments[1:]
    return preset(arguments[0], _value("--method", options) or "gsda", _value("--recipe", options) or "common"), options


def _value(option: str, arguments: Sequence[str]) -> str | None:
    """Return the last value that the arguments give to an option, before its other ones are known."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else following
    return found


def _require_distinct_options() -> None:
    shared = [each.name for name, table in _tables(Config()).items() for each in dataclasses.fields(table)]
    for name, entry in METHODS.items():
        count = Counter([*shared, *(each.name for each in dataclasses.fields(entry.settings))])
        repeated = [setting for setting, times in count.items() if times > 1]
        assert not repeated, f"--method {name}: the option {repeated} stands in two tables"


assert set(TASKS) == set(BENCHMARKS), "every benchmark has a preset"
_require_distinct_options()
