"""Kernels for hierarchical gradient synchronization: weighted discriminator losses and gradient magnitudes in one pass.

`adversarial_terms` is the one operation; `available_backends` tells what can compute it here.
"""

from gsda_kernels.backends import available_backends, resolve_backend
from gsda_kernels.functional import AdversarialTerms, DiscriminatorWeights, adversarial_terms

__all__ = ["AdversarialTerms", "DiscriminatorWeights", "adversarial_terms", "available_backends", "resolve_backend"]
