"""The optimizer steps of one training step: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gsda_fast.methods import Move
from gsda_fast.training.distributed import Ranks
from gsda_fast.training.guard import Guard
from gsda_fast.training.optim import load_momentum, momentum_of, takes_skip_flag
from gsda_kernels.restore import restore_where


class Updater:
    """Takes the moves of a step: backward pass, mean over ranks, check, optimizer.

    The discriminators move before the encoder's gradients are known, since those go through the moved discriminators.
    If the encoder's are not finite, neither player may have moved: a move that is marked as provisional is undone from
    a copy of its parameters and momentum, so that a step counts for both players or for none.

    Args:
        players: modules by name. optimizers: one for each. ranks: the processes of the run.
        device: where the players are. scale_losses: for fp16; one scale serves both players.
    """

    def __init__(
        self,
        players: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        ranks: Ranks,
        device: torch.device,
        scale_losses: bool = False,
    ) -> None:
        self.optimizers = optimizers
        self._parameters = {name: list(module.parameters()) for name, module in players.items()}
        self._ranks = ranks
        self._guard = Guard(device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=scale_losses)
        self._copies: dict[str, list[Tensor]] = {}

    def step(self, step: int, moves: Iterable[Move]) -> dict[str, Tensor]:
        """Takes all moves of the step with that number, counted from 0.

        Returns:
            The moves' loss terms by name, of this rank, on the device.

        Raises:
            TrainingError: a loss term or a gradient was not finite, on any rank, at most ten steps ago.
        """
        terms: dict[str, Tensor] = {}
        provisional: list[str] = []
        skip = None
        self._guard.begin()
        for move in moves:
            skip = self._gradients(move)
            if move.provisional:
                self._copy(move.players)
                provisional += move.players
            for player in move.players:
                self._move(player, skip)
            terms.update(move.objective.terms)
        if skip is not None:
            for player in provisional:
                restore_where(skip, self._tensors(player), self._copies[player])
        self._scaler.update()
        self._guard.end(step)
        return terms

    @property
    def stop(self) -> bool:
        """Whether a rank wants to stop; it changes after the same step on all of them."""
        return self._guard.stop

    def ask_to_stop(self) -> None:
        """Tells all ranks, within ten steps, that this one wants to stop."""
        self._guard.ask_to_stop()

    def require_finite(self) -> None:
        """Waits for the device; before a checkpoint.

        Raises:
            TrainingError: see `step`; or no scale of the losses gives finite fp16 gradients.
        """
        self._guard.require_finite()
        if self._scaler.is_enabled():
            self._guard.require_scale(self._scaler.get_scale())

    def _gradients(self, move: Move) -> Tensor:
        """Averages the gradients of the players that move; 1 if something in this step is not finite, on any rank."""
        objective = move.objective
        for player in move.players:
            self.optimizers[player].zero_grad(set_to_none=True)
        self._scaler.scale(objective.total).backward()
        parameters = [parameter for player in move.players for parameter in self._parameters[player]]
        indicators = self._guard.indicators(objective.total, objective.terms)
        averaged = self._ranks.mean_gradients(parameters, indicators)
        assert averaged is not None
        if self._scaler.is_enabled():
            for player in move.players:
                self._scaler.unscale_(self.optimizers[player])
        return self._guard.check(
            " and ".join(move.players), objective.terms, averaged, parameters, scaled=self._scaler.is_enabled()
        )

    def _move(self, player: str, skip: Tensor) -> None:
        optimizer = self.optimizers[player]
        if takes_skip_flag(optimizer, skip) or not bool(skip):
            optimizer.step()

    def _tensors(self, player: str) -> list[Tensor]:
        optimizer = self.optimizers[player]
        momentum = [optimizer.state[parameter].get("momentum_buffer") for parameter in self._parameters[player]]
        parameters = [parameter.detach() for parameter in self._parameters[player]]
        return [*parameters, *(buffer for buffer in momentum if buffer is not None)]

    @torch.no_grad()
    def _copy(self, players: Sequence[str]) -> None:
        for player in players:
            tensors = self._tensors(player)
            if player not in self._copies:
                self._copies[player] = [torch.empty_like(tensor) for tensor in tensors]
            torch._foreach_copy_(self._copies[player], tensors)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizers": {name: momentum_of(optimizer) for name, optimizer in self.optimizers.items()},
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            load_momentum(optimizer, state["optimizers"][name])
        # Empty where the checkpoint's run scaled no losses: the scale then starts afresh.
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
