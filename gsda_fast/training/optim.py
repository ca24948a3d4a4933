"""Optimizers of the players, and their learning rates."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gsda_fast.errors import UsageError
from gsda_fast.model import AdaptationModel


@dataclass(frozen=True)
class OptimizerSettings:
    """SGD with Nesterov momentum, decayed as (1 + 10 p)^-0.75 over training progress p."""

    optimizer: Literal["auto", "sgd", "apex"] = "auto"
    """PyTorch's SGD (auto, sgd) or NVIDIA Apex's FusedSGD, which is the same update."""
    learning_rate: float = 1e-2
    """Initial learning rate of new layers and discriminators."""
    backbone_learning_rate: float = 1e-3
    """Initial learning rate of the backbone."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 1e-3
    """Weight decay."""


def build_optimizers(players: dict[str, nn.Module], settings: OptimizerSettings) -> dict[str, torch.optim.Optimizer]:
    """An optimizer for each player; a backbone within it learns at its own rate.

    Args:
        players: modules by name, on their device. settings: which optimizer, and its rates.

    Raises:
        UsageError: Apex is asked for and not there, or cannot update these parameters.
    """
    return {name: _build(_parameter_groups(module, settings), settings) for name, module in players.items()}


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """Sets every learning rate to `factor` times its initial value."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def momentum_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer has gathered; its settings (rates, decay, implementation) are the run's, and not here."""
    state = optimizer.state_dict()["state"]
    return {"state": {number: each for number, each in state.items() if each.get("momentum_buffer") is not None}}


def load_momentum(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """The inverse of `momentum_of`. The settings stay: a run that goes on with others means them."""
    own = optimizer.state_dict()
    optimizer.load_state_dict({"state": {**own["state"], **stored["state"]}, "param_groups": own["param_groups"]})


def takes_skip_flag(optimizer: torch.optim.Optimizer, flag: Tensor) -> bool:
    """Gives the optimizer a flag on the device, 0-d, that makes its next step do nothing where it is 1.

    Returns:
        Whether the optimizer can read such a flag; if not, the host has to.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = flag  # type: ignore[attr-defined]
        return True
    if hasattr(optimizer, "_dummy_overflow_buf"):  # Apex: its kernels return at once where this is not 0
        optimizer._dummy_overflow_buf.copy_(flag)
        return True
    return False


def require_apex() -> Any:
    """Apex's FusedSGD.

    Raises:
        UsageError: Apex is not installed, or the package of that name is another one.
    """
    if importlib.util.find_spec("amp_C") is None:
        found = "no Apex"
        if importlib.util.find_spec("apex") is not None:
            # The package index has had an unrelated project of that name since 2013; a build of Apex without
            # --cuda_ext looks the same from here, and has no FusedSGD either.
            found = "a package named apex without the extension amp_C: another project, or Apex without CUDA extensions"
        raise UsageError(
            "--optimizer",
            found=f"apex, but {found}",
            expected="NVIDIA Apex built with its CUDA extensions",
            remedy="build it from github.com/NVIDIA/apex, use one of NVIDIA's containers, or --optimizer sgd",
        )
    from apex.optimizers import FusedSGD

    return FusedSGD


def _parameter_groups(module: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    if not isinstance(module, AdaptationModel):
        return [{"params": list(module.parameters()), "lr": settings.learning_rate}]
    new_layers = [*module.bottleneck.parameters(), *module.classifier.parameters()]
    return [
        {"params": list(module.backbone.parameters()), "lr": settings.backbone_learning_rate},
        {"params": new_layers, "lr": settings.learning_rate},
    ]


def _build(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = _apex(groups, settings) if settings.optimizer == "apex" else _sgd(groups, settings)
    if settings.momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                # A first step that is skipped would leave a buffer made by the optimizer uninitialised; from 0 it
                # comes to the same momentum as from none.
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _sgd(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    parameters = [parameter for group in groups for parameter in group["params"]]
    return torch.optim.SGD(
        groups,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
        **_implementation(parameters),
    )


def _implementation(parameters: Sequence[nn.Parameter]) -> dict[str, bool]:
    """The fastest of PyTorch's implementations that takes these parameters: fused, foreach, or a plain loop."""
    for name in ("fused", "foreach"):
        try:
            torch.optim.SGD(parameters, **{name: True})
        except RuntimeError:
            continue
        return {name: True}
    return {}


def _apex(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    fused_sgd = require_apex()
    for group in groups:
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float16) or not parameter.is_cuda:
                raise UsageError(
                    "--optimizer",
                    found=f"apex with {parameter.dtype} parameters on {parameter.device.type}",
                    expected="float32 parameters on a GPU: FusedSGD leaves others as they are, without a word",
                    remedy="use --optimizer sgd",
                )
    optimizer: torch.optim.Optimizer = fused_sgd(
        groups, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.momentum > 0
    )
    return optimizer
