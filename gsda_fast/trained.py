"""What training left behind: a checkpoint of a run, and the network in it, on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsda_fast.assemble import choose_device, preprocessing_of
from gsda_fast.config import Config, config_from_dict
from gsda_fast.data.benchmarks import Preprocessing
from gsda_fast.errors import UsageError
from gsda_fast.methods import METHODS
from gsda_fast.model import AdaptationModel, ModelSettings, build_model
from gsda_fast.options import Device
from gsda_fast.results.run_folder import RunFolder
from gsda_fast.resume import require_own
from gsda_fast.training.checkpoint import CheckpointFolder, DamagedCheckpoint, network_problem
from gsda_fast.training.distributed import DistributedSettings
from gsda_fast.training.precision import AUTOCAST_DTYPES, PrecisionSettings, set_arithmetic


@dataclass(frozen=True)
class TrainedModel:
    """Encoder and classifier of a run, in evaluation mode.

    Attributes:
        model: on `device`. classes: names in label order. config: of the run, as `for_evaluation` changes it.
        step: of the checkpoint. device: where the model is.
    """

    model: AdaptationModel
    classes: tuple[str, ...]
    config: Config
    step: int
    device: torch.device

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image file becomes what the model was evaluated on."""
        return preprocessing_of(self.config)


def load_trained(run: Path | str, checkpoint: int | None = None, device: Device = "cpu") -> TrainedModel:
    """Return the network of a finished or interrupted run; neither its data nor pretrained weights are needed.

    Args:
        run: the run's folder. checkpoint: a step; the newest checkpoint if None. device: where the network is put.

    Raises:
        UsageError: no run, no such checkpoint, a damaged one, or no such device.
    """
    folder = RunFolder.existing(run)
    step, state = read_checkpoint(folder, checkpoint)
    config = for_evaluation(read_settings(folder), device)
    head = partial(METHODS[config.run.method].method.classifier, config.method)
    model = build_model(config.model, len(state["classes"]), head)
    own = "model."
    parameters = {name.removeprefix(own): each for name, each in state["method"].items() if name.startswith(own)}
    load_parameters(model, parameters, f"{folder.path}, step {step}")
    model.autocast_dtype = AUTOCAST_DTYPES[config.precision.precision]
    place = torch.device(config.run.device)
    set_arithmetic(place, config.precision.precision)
    return TrainedModel(model.to(place).eval(), tuple(state["classes"]), config, step, place)


def require_row_size(what: str, size: int, model: ModelSettings) -> None:
    """Raise where rows of features are of another size than a network's input.

    Args:
        what: by which the user knows the rows.

    Raises:
        UsageError: they are.
    """
    if size != model.input_dim:
        expected = f"{model.input_dim}, as the run was trained with"
        raise UsageError(what, found=f"features of {size} numbers", expected=expected)


def load_parameters(module: nn.Module, parameters: dict[str, Tensor], origin: str) -> None:
    """Load parameters that were read from a checkpoint.

    Raises:
        UsageError: they are another network's.
    """
    try:
        module.load_state_dict(parameters)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            "--checkpoint",
            found=f"{origin}, whose parameters do not fit the run's settings ({reason})",
            expected="the network that its config.toml says",
        ) from error


def read_settings(folder: RunFolder) -> Config:
    """Return the settings that a run was trained with."""
    return config_from_dict(folder.read_config(), str(folder.config_path))


def read_checkpoint(folder: RunFolder, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Return the step and the state of a checkpoint, the newest one if none is named.

    Raises:
        UsageError: there is none, or not that one, or its file is damaged.
    """
    checkpoints = CheckpointFolder(folder.checkpoints)
    steps = checkpoints.steps()
    if not steps:
        raise UsageError(str(folder.path), found="no checkpoint", expected="a run that was evaluated at least once")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise UsageError("--checkpoint", found=str(chosen), expected=f"one of {', '.join(map(str, steps))}")
    try:
        state = checkpoints.load(chosen, check=network_problem)
    except DamagedCheckpoint as error:
        raise UsageError("--checkpoint", found=str(error), expected="an undamaged file") from error
    require_own(state.get("identity", {}), read_settings(folder), str(checkpoints.file(chosen)))
    return chosen, state


def for_evaluation(config: Config, device: Device) -> Config:
    """Return the settings of a run for evaluating its network, perhaps on another kind of machine.

    Nothing is fetched, compiled or optimised. The precision that was chosen for the run's device stays where this one
    is of the same kind, and is chosen anew where it is not. The torch loader serves everywhere and stays. DALI may be
    missing here or be given a pack, so in its place comes ``auto``: DALI on a GPU where it can serve, torch otherwise,
    whose test images are within a level of 255 of those of DALI on a CPU.

    Raises:
        UsageError: a GPU is asked for and not there.
    """
    here = choose_device(replace(config, run=replace(config.run, device=device)))
    alike = config.run.device == here
    loader: Literal["auto", "torch"] = "torch" if config.data.loader == "torch" else "auto"
    precision = PrecisionSettings(config.precision.precision if alike else "auto", "off")
    return replace(
        config,
        run=replace(config.run, device=here),
        data=replace(config.data, loader=loader, cache_on_device=False),
        model=replace(config.model, weights="none"),
        method=METHODS[config.run.method].method.portable(config.method),
        optimizer=replace(config.optimizer, optimizer="auto"),
        precision=precision.resolved(here),
        distributed=DistributedSettings(),
    )
