"""Optimizers of the players, and their learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gsda_fast.model import AdaptationModel


@dataclass(frozen=True)
class OptimizerSettings:
    """SGD with Nesterov momentum, decayed as (1 + 10 p)^-0.75 over training progress p."""

    learning_rate: float = 1e-2
    """Initial learning rate of new layers and discriminators."""
    backbone_learning_rate: float = 1e-3
    """Initial learning rate of the backbone."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 1e-3
    """Weight decay."""


def build_optimizers(players: dict[str, nn.Module], settings: OptimizerSettings) -> dict[str, torch.optim.Optimizer]:
    """An optimizer for each player; a backbone within it learns at its own rate."""
    return {name: _sgd(_parameter_groups(module, settings), settings) for name, module in players.items()}


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], factor: float) -> None:
    """Sets every learning rate to `factor` times its initial value."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def _parameter_groups(module: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    if not isinstance(module, AdaptationModel):
        return [{"params": list(module.parameters()), "lr": settings.learning_rate}]
    new_layers = [*module.bottleneck.parameters(), *module.classifier.parameters()]
    return [
        {"params": list(module.backbone.parameters()), "lr": settings.backbone_learning_rate},
        {"params": new_layers, "lr": settings.learning_rate},
    ]


def _sgd(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.SGD:
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.SGD(
        groups,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
        fused=True,
    )
