"""Pseudo-labels of the target: only samples that the classifier is confident about train (section 3.1 of the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from msgspec import Meta
from torch import Tensor


@dataclass(frozen=True)
class PseudoLabelSettings:
    """Which target samples train, and how often that is decided anew."""

    confidence_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.8
    """Target samples whose largest class probability reaches this train."""
    refresh_every: Annotated[int, Meta(ge=0)] = 0
    """Steps between two evaluations of the target; 0: once per pass over it."""
    balance_target: bool = True
    """Draw confident target samples equally often from every pseudo-class. Unwanted where classes may be absent."""


def confident_labels(probabilities: Tensor, threshold: float) -> np.ndarray:
    """Return the predicted class of each sample, -1 where the classifier is not confident.

    Args:
        probabilities: (n, r). threshold: least probability of the predicted class.

    Returns:
        (n,) int64 array.
    """
    confidence, label = probabilities.max(dim=1)
    # Not `confidence < threshold`, which is False for the NaN of a diverged model.
    return label.masked_fill(~(confidence >= threshold), -1).cpu().numpy()
