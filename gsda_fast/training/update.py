"""The optimizer steps of one training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from gsda_fast.methods import Descent, Player, Update
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.guard import Guard, not_finite
from gsda_fast.training.optim import descent_of, forget_momentum, load_momentum, momentum_of, takes_skip_flag


class StepOutcome(NamedTuple):
    """What a step came to on this rank: loss terms by name, on the device; images that went through the network; other
    numbers for the log.
    """

    terms: dict[str, Tensor]
    images: int
    metrics: dict[str, Tensor]


class Updater:
    """Carry out the updates of a step: backward pass, mean over ranks, check, optimizer.

    From the first number that is not finite on, no player moves. In fp16 gradients that overflow skip the rest of the
    step, and the scale is lowered.

    Args:
        players: by name. optimizers: one for each. ranks: the processes of the run.
        device: where the players are. scale_losses: for fp16; one scale serves all players.
    """

    def __init__(
        self,
        players: Mapping[str, Player],
        optimizers: dict[str, torch.optim.Optimizer],
        ranks: Ranks,
        device: torch.device,
        scale_losses: bool = False,
    ) -> None:
        self.optimizers = optimizers
        self._parameters = {
            name: [parameter for module in player.modules for parameter in module.parameters()]
            for name, player in players.items()
        }
        self._divided = {name: player.division for name, player in players.items() if player.division is not None}
        self._ranks = ranks
        self._guard = Guard(device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=scale_losses)

    def step(self, step: int, updates: Iterator[Update]) -> StepOutcome:
        """Carry out all updates of the step with that number, counted from 0.

        Raises:
            TrainingError: a loss term or a gradient was not finite, on any rank, at most ten steps ago.
        """
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        images = 0
        self._guard.begin()
        for update in updates:
            if update.found_inf is None:
                skip = self._gradients(update)
                for player in update.players:
                    self._move(player, skip)
            else:
                skip = self._moved(update, update.found_inf)
            terms.update(update.terms)
            metrics.update(update.metrics)
            images += update.images
            if self._scaler.is_enabled() and bool(skip):
                break  # what follows in the method's step, a teacher's average for one, belongs to a step that is made
        if terms:
            self._scaler.update()
            self._guard.end(step)
        return StepOutcome(terms, images, metrics)

    def descent(self, player: str) -> Descent | None:
        """Return how a method may move a player itself now; None where it takes gradients and the optimizer."""
        if self._scaler.is_enabled() or (self._ranks.several and player not in self._divided):
            return None
        found = descent_of(self.optimizers[player], self._guard.skip)
        return found and replace(found, writes_are_counted=True)

    def forget(self, player: str) -> None:
        """Let a player's optimizer start afresh."""
        forget_momentum(self.optimizers[player])

    @property
    def stop(self) -> bool:
        """Whether a rank wants to stop; it changes after the same step on all of them."""
        return self._guard.stop

    def ask_to_stop(self) -> None:
        """Let all ranks know, within ten steps, that this one wants to stop."""
        self._guard.ask_to_stop()

    def require_finite(self) -> None:
        """Wait for the device and check all steps so far; before a checkpoint.

        Raises:
            TrainingError: see `step`; or no scale of the losses gives finite fp16 gradients.
        """
        self._guard.require_finite()
        if self._scaler.is_enabled():
            self._guard.require_scale(self._scaler.get_scale())

    def _gradients(self, update: Update) -> Tensor:
        """Average the gradients of the players that move; 1 if something in this step is not finite, on any rank."""
        for player in update.players:
            self.optimizers[player].zero_grad(set_to_none=True)
        self._scaler.scale(update.loss).backward()
        for player in update.players:
            if all(parameter.grad is None for parameter in self._parameters[player]):
                raise RuntimeError(
                    f"player {player}: found no gradient for any parameter; expected its loss to move it"
                )
        shared = [each for name in update.players if name not in self._divided for each in self._parameters[name]]
        own = [each for name in update.players if name in self._divided for each in self._parameters[name]]
        # A rank's own gradients are whole as they are; of whether they are finite it tells the others.
        indicators, bad_gradient = self._averaged(update, not_finite(own) if own else None, shared)
        if self._scaler.is_enabled():
            for player in update.players:
                self._scaler.unscale_(self.optimizers[player])
        if shared:
            bad_gradient = torch.maximum(bad_gradient, not_finite(shared))
        return self._check(update, indicators, bad_gradient)

    def _moved(self, update: Update, found_inf: Tensor) -> Tensor:
        """Look at what the method has done itself; 1 if something in this step is not finite, on any rank."""
        return self._check(update, *self._averaged(update, found_inf))

    def _averaged(
        self, update: Update, found_inf: Tensor | None, parameters: Sequence[nn.Parameter] = ()
    ) -> tuple[Tensor, Tensor]:
        """Average gradients over the ranks, and on the same way the guard's indicators and a flag that a rank has."""
        indicators = self._guard.indicators(update.loss, update.terms)
        flag = indicators.new_zeros(1) if found_inf is None else found_inf.reshape(1)
        averaged = self._ranks.mean_gradients(parameters, torch.cat([indicators, flag]))
        assert averaged is not None
        return averaged[:-1], averaged[-1]

    def _check(self, update: Update, indicators: Tensor, bad_gradient: Tensor) -> Tensor:
        players, scaled = " and ".join(update.players), self._scaler.is_enabled()
        return self._guard.check(players, update.terms, indicators, bad_gradient, scaled=scaled)

    def _move(self, player: str, skip: Tensor) -> None:
        optimizer = self.optimizers[player]
        if takes_skip_flag(optimizer, skip) or not bool(skip):
            optimizer.step()
            # PyTorch's fused optimizers leave this out, and copies of parameters are kept by it.
            increment_version(self._parameters[player])

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks have together; all of them call it."""
        return {
            "optimizers": {
                name: momentum_of(optimizer, self._divided.get(name)) for name, optimizer in self.optimizers.items()
            },
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            load_momentum(optimizer, state["optimizers"][name], self._divided.get(name))
        # Empty where the checkpoint's run scaled no losses: the scale then starts afresh.
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
