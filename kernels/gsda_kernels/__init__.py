"""Kernels for hierarchical gradient synchronization: weighted discriminator losses and gradient magnitudes in one pass.

`adversarial_terms` computes them, differentiably; `adversarial_update_` takes the discriminators' whole step with them.
`available_backends` lists what can compute here.
"""

from gsda_kernels.backends import available_backends, resolve_backend
from gsda_kernels.functional import AdversarialTerms, DiscriminatorWeights, adversarial_terms
from gsda_kernels.fused_update import AdversarialUpdate, adversarial_update_

__all__ = [
    "AdversarialTerms",
    "AdversarialUpdate",
    "DiscriminatorWeights",
    "adversarial_terms",
    "adversarial_update_",
    "available_backends",
    "resolve_backend",
]
