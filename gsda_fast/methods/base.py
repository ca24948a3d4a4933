"""What an adaptation method is: its players, the objectives of a batch, and what it wants to know of the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from gsda_fast.methods.objective import Objective
from gsda_fast.model import AdaptationModel

TargetSamples = Literal["none", "all", "confident"]


@dataclass(frozen=True)
class StepInputs:
    """One batch and where in training it stands.

    Attributes:
        source_images: (B, C, H, W). source_labels: (B,) int64. target_images: (B, C, H, W).
        warming_up: whether this step trains on the source alone.
        adversarial_ramp: 0-d, lambda of eq. 16; a tensor, since a Python number that changes would recompile each step.
        mean_over_ranks: averages a tensor over the processes, without gradient; None for one process.
    """

    source_images: Tensor
    source_labels: Tensor
    target_images: Tensor
    warming_up: bool
    adversarial_ramp: Tensor
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Move:
    """One optimizer step: the players that move, and what they minimize.

    Attributes:
        players: names of `Method.players`. objective: its gradient moves them.
        provisional: another move of the same step follows, and this one counts only if that one is finite too.
    """

    players: tuple[str, ...]
    objective: Objective
    provisional: bool = False


class Method(nn.Module):
    """Base of all methods. A new one is a new file beside this one and a line in `gsda_fast.methods.METHODS`.

    A method holds its modules and says what to minimize; it knows no loop over steps, no device, no rank, no file.

    Attributes:
        target_samples: which target samples train: none, all, or those with a confident pseudo-label.
    """

    target_samples: TargetSamples

    def __init__(self, model: AdaptationModel) -> None:
        super().__init__()
        self.model = model

    def players(self) -> dict[str, nn.Module]:
        """Modules that move together, by name; each gets an optimizer. "encoder" is encoder and classifier."""
        return {"encoder": self.model}

    def compile_parts(self, mode: str | None = None) -> None:
        """Compiles what runs in every training step; a method with more modules compiles those as well.

        Args:
            mode: of `torch.compile`.
        """
        # Every step has the same shapes, and a graph for any shape is a slower one.
        self.model.compile(dynamic=False, mode=mode)

    def refresh(self, target_probabilities: Tensor) -> None:
        """Told of every scoring of the target. What a method keeps of it is a buffer, so that checkpoints hold it.

        Args:
            target_probabilities: (n_t, r) float32 on the CPU, all samples of the target, the same on every rank.
        """

    def moves(self, inputs: StepInputs) -> Iterator[Move]:
        """The moves of a step, in order. The caller takes each optimizer step before it asks for the next move."""
        raise NotImplementedError
