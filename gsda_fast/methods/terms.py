"""Terms: what any method can add to the encoder's objective, by name (`--add entropy=0.1`).

A term needs no player of its own. It is a function of both domains' outputs, the source's labels and the step.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gsda_fast.methods.objective import entropy
from gsda_fast.methods.step import Outputs, Step


def _entropy(outputs: Outputs, source_labels: Tensor, step: Step) -> Tensor:
    return entropy(outputs.target_logits)


TERMS: dict[str, Callable[[Outputs, Tensor, Step], Tensor]] = {
    "entropy": _entropy,
}
"""Terms by name. All are minimized."""
