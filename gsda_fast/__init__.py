"""Unsupervised domain adaptation with hierarchical gradient synchronization (GSDA, CVPR 2020)."""

from gsda_fast import losses
from gsda_fast.methods.discriminators import Discriminators
from gsda_fast.methods.groups import ClassGroups
from gsda_fast.methods.objective import discriminator_objective, encoder_objective, synchronization_loss

__all__ = [
    "ClassGroups",
    "Discriminators",
    "discriminator_objective",
    "encoder_objective",
    "losses",
    "synchronization_loss",
]
__version__ = "0.1.0"
