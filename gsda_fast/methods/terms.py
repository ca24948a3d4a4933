"""Terms: what any method can add to the encoder's objective, by name (`--add entropy=0.1`).

A term needs no player of its own. It is a function of both domains' outputs, the source's labels and the step.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gsda_fast import losses
from gsda_fast.methods.step import Outputs, Step

# Of the penalty's authors: a weight is theirs at their batch, and means the same at any other.
BSP_BATCH = 36
# Of the norms' authors. The step's length is a factor on the gradient, and lies in the weight.
HAFN_RADIUS, SAFN_STEP = 25.0, 1.0


def _entropy(outputs: Outputs, source_labels: Tensor, step: Step) -> Tensor:
    """Return the target's entropy."""
    return losses.entropy(outputs.target_logits)


def _mcc(outputs: Outputs, source_labels: Tensor, step: Step) -> Tensor:
    """Confusion between the target's classes, at temperature 2.5."""
    return losses.minimum_class_confusion(step.gather(outputs.target_logits))


def _bnm(outputs: Outputs, source_labels: Tensor, step: Step) -> Tensor:
    """Return minus the nuclear norm of the target's predictions."""
    return losses.nuclear_norm(step.gather(outputs.target_logits))


def _bsp(outputs: Outputs, source_labels: Tensor, step: Step) -> Tensor:
    """Return the largest squared singular value of each domain's features, as it would be in a batch of 36."""
    domains = step.gather(outputs.source_features), step.gather(outputs.target_features)
    return sum(
        (BSP_BATCH / len(rows) * losses.spectral_penalty(rows) for rows in domains), start=domains[0].new_zeros(())
    )


def _hafn(outputs: Outputs, source_labels: Tensor, step: Step) -> Tensor:
    """Return how far each domain's mean feature norm is from 25."""
    domains = step.gather(outputs.source_features), step.gather(outputs.target_features)
    return losses.hard_feature_norm(*domains, radius=HAFN_RADIUS)


def _safn(outputs: Outputs, source_labels: Tensor, step: Step) -> Tensor:
    """Return a constant outward pull on the features of both domains; the value is always 2."""
    domains = outputs.source_features, outputs.target_features
    source, target = (losses.stepwise_feature_norm(rows, SAFN_STEP) for rows in domains)
    return source + target


TERMS: dict[str, Callable[[Outputs, Tensor, Step], Tensor]] = {
    "entropy": _entropy,
    "mcc": _mcc,
    "bnm": _bnm,
    "bsp": _bsp,
    "hafn": _hafn,
    "safn": _safn,
}
"""Terms by name. All are minimized."""
