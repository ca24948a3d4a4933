"""What a method and the training loop say to each other in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gsda_fast.methods.division import Division


class Player(NamedTuple):
    """What one optimizer moves.

    Attributes:
        modules: whose parameters it has. The backbone's parameters learn at the backbone's rate, in whichever player.
        lr_scale: factor on the run's learning rates.
        momentum: None: the run's.
        division: where each rank has a share of the modules' parameters, along their first dimension, and gradients to
            it that are those of the whole batch. None: all ranks have all of them.
    """

    modules: tuple[nn.Module, ...]
    lr_scale: float = 1.0
    momentum: float | None = None
    division: Division | None = None


@dataclass(frozen=True)
class Descent:
    """How a method moves a player itself, by what its optimizer would do: a step of `torch.optim.SGD`.

    Attributes:
        learning_rate, momentum, weight_decay, nesterov: of `torch.optim.SGD`, without dampening.
        momentum_buffers: the optimizer's state for each of some parameters, to be moved in place with them.
        skip: 0-d float32 on the device: 1 if nothing may move.
        writes_are_counted: whether whatever else writes to the parameters is counted by PyTorch (`Tensor._version`), as
            its own fused optimizers are not: copies of the parameters can then be kept from step to step.
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    nesterov: bool
    momentum_buffers: Callable[[Iterable[Tensor]], list[Tensor]]
    skip: Tensor
    writes_are_counted: bool = False


@dataclass(frozen=True)
class Step:
    """Where in training a step is, and what the other ranks know.

    Attributes:
        ramp: 0-d, from 0 to 1 over adaptation: 2 / (1 + exp(-10 q)) - 1. A tensor, since a Python number that changes
            would recompile each step.
        progress: 0-d, q itself: a method shapes a ramp of its own from it.
        mean: averages a tensor over ranks, without gradient; the identity for one process.
        gather: the rows of all ranks, (n, ...) -> (ranks * n, ...), in rank order. A function of them has the value of
            the whole batch, and the mean over ranks of its gradients is the whole batch's gradient.
        descent: how a player moves, by its name, for an update that needs no gradients in memory; None where its
            gradients are wanted: for another optimizer than SGD, for scaled losses, for a mean over ranks.
        logged: whether the numbers of this step are written, so that what is for the log alone is worth computing.
    """

    ramp: Tensor
    progress: Tensor
    mean: Callable[[Tensor], Tensor] = Tensor.detach
    gather: Callable[[Tensor], Tensor] = lambda rows: rows
    descent: Callable[[str], Descent | None] = lambda player: None
    logged: bool = True


class Update(NamedTuple):
    """One optimizer step.

    Attributes:
        players: names of those that minimize `loss`. terms: loss terms by name, unweighted and detached, for the log.
        images: how many went through the network for this update, on this rank.
        found_inf: of an update that the method has made itself, by `Step.descent`: 0-d float32 on the device, 1
            where something was not finite, so that nothing moved. None: the optimizers move along the loss's gradient.
        metrics: other numbers for the log, by name, 0-d and detached; of a step that is logged alone.
    """

    players: tuple[str, ...]
    loss: Tensor
    terms: Mapping[str, Tensor]
    images: int = 0
    found_inf: Tensor | None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Outputs:
    """What the network makes of a batch, source rows first.

    Attributes:
        features: (N, D), in the network's dtype, for kernels that take it. logits: (N, r), float32 or wider.
        num_source: rows of the source.
    """

    features: Tensor
    logits: Tensor
    num_source: int

    @property
    def source_features(self) -> Tensor:
        """(B, D), float32 or wider."""
        return _at_least_float32(self.features[: self.num_source])

    @property
    def target_features(self) -> Tensor:
        """(B', D), float32 or wider."""
        return _at_least_float32(self.features[self.num_source :])

    @property
    def source_logits(self) -> Tensor:
        """(B, r)"""
        return self.logits[: self.num_source]

    @property
    def target_logits(self) -> Tensor:
        """(B', r)"""
        return self.logits[self.num_source :]

    @property
    def domain(self) -> Tensor:
        """(N,) float32: 1 for source rows, 0 for target rows."""
        rows = torch.arange(len(self.features), device=self.features.device)
        return (rows < self.num_source).to(torch.float32)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
