"""Everything that changes over training, as pure functions of the step: a resumed run is then the same run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Progress from the end of warm-up (0) to the last step (1), and what follows from it.

    Args:
        steps: optimizer steps in all. warmup: the first of them, which train on the source alone.
        refresh_every: steps between two evaluations of the target.
        decay: of the learning rates, see `OptimizerSettings`.
    """

    steps: int
    warmup: int
    refresh_every: int
    decay: Literal["inverse", "constant", "cosine"] = "inverse"

    def progress(self, step: int) -> float:
        """Return 0 during warm-up, then (step - warmup) / (steps - warmup)."""
        return max(0, step - self.warmup) / max(1, self.steps - self.warmup)

    def warming_up(self, step: int) -> bool:
        return step < self.warmup

    def learning_rate_factor(self, step: int) -> float:
        """Return the factor on all rates; (1 + 10 p)^-0.75 is the decay of DANN and CDAN."""
        progress = self.progress(step)
        if self.decay == "inverse":
            return float((1 + 10 * progress) ** -0.75)
        return 1.0 if self.decay == "constant" else (1 + math.cos(math.pi * progress)) / 2

    def adversarial_ramp(self, step: int) -> float:
        """lambda = 2 / (1 + exp(-10 p)) - 1, from 0 to 1."""
        return 2 / (1 + math.exp(-10 * self.progress(step))) - 1

    def is_evaluated_after(self, step: int) -> bool:
        """Say whether an evaluation follows `step` steps: at the end of warm-up, regularly, and at the end."""
        if step == self.steps:
            return True
        return step > 0 and step >= self.warmup and (step - self.warmup) % self.refresh_every == 0

    def next_evaluation(self, step: int) -> int:
        """Return the number of steps done at the next evaluation after `step` steps."""
        return next(each for each in range(step + 1, self.steps + 1) if self.is_evaluated_after(each))
