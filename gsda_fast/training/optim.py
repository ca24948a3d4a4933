"""Optimizers of the players, and their learning rates."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from gsda_fast.errors import UsageError
from gsda_fast.methods import Descent, Division, Player


@dataclass(frozen=True)
class OptimizerSettings:
    """One optimizer for each player, its rates decayed over training progress p."""

    optimizer: Literal["auto", "sgd", "adam", "apex"] = "auto"
    """PyTorch's SGD (auto, sgd), its Adam, or NVIDIA Apex's FusedSGD, which is the same update as SGD."""
    learning_rate: Annotated[float, Meta(ge=0)] = 1e-2
    """Initial learning rate of new layers and discriminators."""
    backbone_learning_rate: Annotated[float, Meta(ge=0)] = 1e-3
    """Initial learning rate of the backbone."""
    decay: Literal["inverse", "constant", "cosine"] = "inverse"
    """Factor on the rates: (1 + 10 p)^-0.75, 1, or (1 + cos(pi p)) / 2."""
    momentum: Annotated[float, Meta(ge=0, le=1)] = 0.9
    """Nesterov momentum of SGD; Adam's first beta."""
    backbone_momentum: bool = True
    """Give the backbone that momentum too. The authors of MCD and AFN gave it none."""
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-3
    """Weight decay."""


def build_optimizers(
    players: Mapping[str, Player], settings: OptimizerSettings, backbone: nn.Module
) -> dict[str, torch.optim.Optimizer]:
    """Build an optimizer for each player.

    Args:
        players: by name, on their device. settings: which optimizer, and its rates.
        backbone: whose parameters learn at their own rate, whichever player they belong to.

    Raises:
        UsageError: Apex is asked for and not there, or cannot update these parameters.
    """
    slow = {id(parameter) for parameter in backbone.parameters()}
    return {name: _build(player, settings, slow) for name, player in players.items()}


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to `factor` times its initial value."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def momentum_of(optimizer: torch.optim.Optimizer, division: Division | None = None) -> dict[str, Any]:
    """Return what an optimizer has gathered. Its settings (rates, decay, implementation) are the run's.

    Args:
        division: of its parameters over the ranks, all of which then call this and get the whole.
    """
    state = optimizer.state_dict()["state"]
    kept = {number: each for number, each in state.items() if any(x is not None for x in each.values())}
    return {"state": kept if division is None else _each(kept, division.whole)}


def load_momentum(optimizer: torch.optim.Optimizer, stored: dict[str, Any], division: Division | None = None) -> None:
    """Load what `momentum_of` returned. The settings stay: a run that goes on with others means them."""
    own, state = optimizer.state_dict(), stored["state"]
    if division is not None:
        state = _each(state, lambda whole: whole[division.own])
    optimizer.load_state_dict({"state": {**own["state"], **state}, "param_groups": own["param_groups"]})


def _each(state: dict[Any, dict[str, Any]], change: Callable[[Tensor], Tensor]) -> dict[Any, dict[str, Any]]:
    """The same with every tensor changed that is like a parameter; a count of steps is not."""

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.dim() else value

    return {number: {name: changed(value) for name, value in each.items()} for number, each in state.items()}


@torch.no_grad()
def forget_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set everything that an optimizer has gathered back to what it begins with, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def takes_skip_flag(optimizer: torch.optim.Optimizer, flag: Tensor) -> bool:
    """Give the optimizer a flag on the device, 0-d, that makes its next step do nothing where it is 1.

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


def descent_of(optimizer: torch.optim.Optimizer, skip: Tensor) -> Descent | None:
    """Return what the optimizer's next step would do, for a method that does it; None for any but SGD with momentum.

    Args:
        skip: see `Descent`.
    """
    if not isinstance(optimizer, torch.optim.SGD) or len(optimizer.param_groups) > 1:
        return None
    (group,) = optimizer.param_groups
    if group["momentum"] == 0 or group["dampening"] != 0 or group["maximize"]:
        return None
    return Descent(
        group["lr"],
        group["momentum"],
        group["weight_decay"],
        group["nesterov"],
        lambda parameters: [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters],
        skip,
    )


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


def _build(player: Player, settings: OptimizerSettings, slow: Container[int]) -> torch.optim.Optimizer:
    parameters = [parameter for module in player.modules for parameter in module.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [each for each in parameters if (id(each) in slow) == is_slow], "lr": player.lr_scale * rate}
        for is_slow, rate in ((True, settings.backbone_learning_rate), (False, settings.learning_rate))
    ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["initial_lr"] = group["lr"]
    if not settings.backbone_momentum and settings.optimizer != "adam":
        for group in groups:
            if id(group["params"][0]) in slow:
                group.update(momentum=0.0, nesterov=False)
    if player.momentum is not None:
        settings = replace(settings, momentum=player.momentum)
    make = {"adam": _adam, "apex": _apex}.get(settings.optimizer, _sgd)
    optimizer = make(groups, settings)
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            # A first step that is skipped would leave a buffer made by the optimizer uninitialised; from 0 it
            # comes to the same momentum as from none.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adam(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    betas = (settings.momentum, 0.999)
    return torch.optim.Adam(groups, betas=betas, weight_decay=settings.weight_decay, fused=True)


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
    """Return the fastest of PyTorch's implementations that takes these parameters: fused, foreach, or a plain loop."""
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
