"""What a run goes on from: which checkpoint, whether it belongs to this run, and how it gets into the trainer."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gsda_fast.config import Config
from gsda_fast.data.domains import ImageDomain
from gsda_fast.errors import UsageError
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.training.checkpoint import (
    CheckpointFolder,
    DamagedCheckpoint,
    network_problem,
    read_checkpoint,
    training_problem,
)
from gsda_fast.training.trainer import Trainer


@dataclass(frozen=True)
class Start:
    """Where a run starts: at a checkpoint, at another run's weights, or (without a state) afresh.

    Attributes:
        state: what was stored. origin: the checkpoint's file. weights_alone: nothing but the weights are taken from it.
        own_step: that of the checkpoint, where it is of the run's own folder. seed: of this run.
        warnings: a line for each damaged checkpoint that was passed over.
    """

    state: dict[str, Any] | None = None
    origin: str = ""
    own_step: int | None = None
    weights_alone: bool = False
    seed: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def unreadable(self) -> dict[str, str]:
        """Files that failed in the part of the run that is gone on with, and what is wrong with each."""
        return {} if self.state is None or self.weights_alone else self.state.get("unreadable_files", {})

    def load_into(self, trainer: Trainer) -> list[str]:
        """Bring the trainer there. Returns lines for the user, none for a run that starts afresh.

        Raises:
            UsageError: parameters of other shapes, or more steps done than are asked for.
        """
        if self.state is None:
            return []
        if self.weights_alone:
            return [self._load_weights(trainer)]
        trainer_tensors = trainer.method_state()
        _require_shapes(self.state["method"], trainer_tensors, self.origin)
        strangers = set(self.state["method"]) ^ set(trainer_tensors)
        if strangers:
            there = "in the checkpoint alone" if min(strangers) in self.state["method"] else "in this run alone"
            raise _other_network(self.origin, f"the tensor {min(strangers)} {there}", "the same network")
        if self.state["step"] > trainer.schedule.steps:
            raise UsageError(
                "--steps",
                found=str(trainer.schedule.steps),
                expected=f"at least {self.state['step']}, the steps done in {self.origin}",
            )
        try:
            trainer.load_state_dict(self.state)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UsageError(
                "--resume",
                found=f"{self.origin}, which cannot be gone on with ({reason})",
                expected="a sound checkpoint",
            ) from error
        whence = "" if self.own_step is not None else f" of {self.origin}"
        notices = [_another_seed(self.state["identity"], self.seed), _changed_versions(self.state["versions"])]
        return [f"resuming after step {trainer.step}{whence}", *filter(None, notices)]

    def _load_weights(self, trainer: Trainer) -> str:
        assert self.state is not None
        stored, own = self.state["method"], trainer.method_state()
        _require_shapes(stored, own, self.origin)
        missing = [name for name in own if name not in stored]
        in_the_model = [name for name in missing if name.startswith("model.")]
        if in_the_model:
            raise _other_network(self.origin, f"no tensor {in_the_model[0]}", "weights of the same network")
        trainer.load_method_state({**own, **{name: stored[name] for name in own if name in stored}})
        message = f"starting with the weights of {self.origin}, after its step {self.state['step']}"
        return f"{message}; {len(missing)} tensors that it lacks start afresh" if missing else message


def find_start(config: Config, folder: RunFolder, identity: Mapping[str, Any]) -> Start:
    """Return the newest sound checkpoint of the run's own folder, else what ``--resume PATH`` names, else nothing.

    Args:
        config: resolved. folder: the run's. identity: of this run, see `run_identity`.

    Raises:
        UsageError: a path without a sound checkpoint, or a checkpoint of a run on other data or processes.
    """
    if config.run.resume == "never":
        return Start()
    own = CheckpointFolder(folder.checkpoints)
    state, damage = own.load_newest(check=training_problem)
    if state is not None:
        origin = str(own.file(state["step"]))
        require_own(state["identity"], config, origin)
        _require_same(state["identity"], identity, origin)
        return Start(state, origin, own_step=state["step"], seed=config.run.seed, warnings=damage)
    if config.run.resume == "auto":
        return Start(warnings=damage)
    state, origin, of_path = _from_path(Path(config.run.resume), config.run.weights_alone)
    if not config.run.weights_alone:
        _require_same(state["identity"], identity, origin)
    return Start(state, origin, None, config.run.weights_alone, config.run.seed, damage + of_path)


def run_identity(config: Config, source: ImageDomain, target: ImageDomain, processes: int) -> dict[str, Any]:
    """Return what a run cannot change on its way, each by the name under which the user knows it; plain values."""
    return {
        **_own(config),
        "--nproc_per_node": f"{processes} process{'es' if processes > 1 else ''}",
        "--batch-size": str(config.run.batch_size),
        "--source": source.identity,
        "--target": target.identity,
        "--loader": config.data.loader,
        "--orientation": source.orientation,
        "classes": list(source.classes),
    }


def _own(config: Config) -> dict[str, str]:
    """Return what tells the run of a folder from others with the same data."""
    return {"--method": config.run.method, "--seed": str(config.run.seed)}


def require_own(stored: Mapping[str, Any], config: Config, origin: str) -> None:
    """Refuse a checkpoint of another run in a run's folder: its metrics would be reported under the wrong name.

    Args:
        stored: the identity in the checkpoint, which says nothing of this where an earlier version wrote it.
        config: of the folder's run. origin: the checkpoint's file.

    Raises:
        UsageError: it is of another method or seed.
    """
    for name, value in _own(config).items():
        if stored.get(name, value) != value:
            raise UsageError(
                origin,
                found=f"a checkpoint of a run with {name} {str(stored[name])[:60]}",
                expected=f"{name} {value}, as the folder's config.toml says",
                remedy="remove it from the folder",
            )


def versions() -> dict[str, str]:
    """Return the packages that the numbers of a run depend on most."""
    return {package: importlib.metadata.version(package) for package in ("torch", "gsda-fast")}


def _changed_versions(stored: Mapping[str, str]) -> str:
    """Return a line on packages which are others than those of a checkpoint; empty if none is."""
    now = versions()
    changed = [f"{name} {stored[name]}, now {now[name]}" for name in now if stored.get(name, now[name]) != now[name]]
    return f"the checkpoint was written with {'; '.join(changed)}: metrics may differ" if changed else ""


def _another_seed(stored: Mapping[str, Any], seed: int) -> str:
    """A line that tells of a beginning with another seed, which the result will not; empty for the same."""
    if "--seed" not in stored:
        return "the checkpoint does not say with which seed and method its steps were trained" if stored else ""
    there = str(stored["--seed"])[:60]
    if there == str(seed):
        return ""
    return f"these steps were trained with --seed {there}, the others will be with --seed {seed}: no run of either seed"


def _from_path(path: Path, weights_alone: bool) -> tuple[dict[str, Any], str, list[str]]:
    remedy = "or auto, to go on in --output"
    if path.is_dir():
        checkpoints = CheckpointFolder(RunFolder.existing(path).checkpoints)
        state, damage = checkpoints.load_newest(check=network_problem if weights_alone else training_problem)
        if state is None:
            found = (
                f"{path} with {len(damage) or 'no'} checkpoints, none of them sound"
                if damage
                else f"{path} without a checkpoint"
            )
            raise UsageError("--resume", found=found, expected="the folder of a run with a checkpoint", remedy=remedy)
        return state, str(checkpoints.file(state["step"])), damage
    try:
        return read_checkpoint(path, check=network_problem if weights_alone else training_problem), str(path), []
    except DamagedCheckpoint as error:
        raise UsageError(
            "--resume", found=str(error), expected="a checkpoint or a run's folder", remedy=remedy
        ) from error


def _require_same(stored: Mapping[str, Any], now: Mapping[str, Any], origin: str) -> None:
    for name, value in now.items():
        # A run may begin with another seed's checkpoint; of its own folder `require_own` has asked.
        if name == "--seed" or (name == "--method" and name not in stored):
            continue
        # Checkpoints that do not say are older than the choice.
        there = stored.get(name, "stored" if name == "--orientation" else None)
        if there == value:
            continue
        found, expected = str(value), str(there)
        if isinstance(value, list) and isinstance(there, list):
            found, expected = first_difference(value, there)
        raise UsageError(
            name,
            found=found,
            expected=f"{expected}, as in {origin}",
            remedy="start as before; another folder with --resume PATH --weights-alone takes its weights and no more",
        )


def first_difference(found: list[str], expected: list[str]) -> tuple[str, str]:
    """Return what two different lists of classes have where they first differ, each in words."""
    longer = max(len(found), len(expected))
    place = next(i for i in range(longer) if found[i : i + 1] != expected[i : i + 1])
    return _class_at(found, place), _class_at(expected, place)


def _class_at(classes: list[str], place: int) -> str:
    name = f"'{classes[place]}'" if place < len(classes) else "none"
    return f"{len(classes)} with {name} as number {place + 1}"


def _require_shapes(stored: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    for name, tensor in own.items():
        # What is empty before it is fitted has as many rows as the data then say.
        if name in stored and tensor.numel() and stored[name].shape != tensor.shape:
            there, here = (" x ".join(map(str, each.shape)) for each in (stored[name], tensor))
            raise _other_network(origin, f"the tensor {name} of shape {there}", here)


def _other_network(origin: str, found: str, expected: str) -> UsageError:
    return UsageError("--resume", found=f"{origin} with {found}", expected=expected)
