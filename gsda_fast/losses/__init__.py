"""Losses of unsupervised domain adaptation, as pure functions of tensors: for these methods and for anyone's own loop.

Each is a mean over samples, computes in float32 or wider whatever autocast does, makes no host wait for a device, and
compiles in one graph. Over several processes, gather the rows first: most are not linear in the batch.
"""

from gsda_fast.losses.classifiers import (
    classifier_discrepancy,
    margin_disparity,
    symmetric_classifier_loss,
    symmetric_feature_loss,
    uniform_class_prior,
)
from gsda_fast.losses.conditioning import domain_loss, entropy_weights, multilinear_map, randomised_map
from gsda_fast.losses.consistency import class_balance, confident_cross_entropy, confident_rows, consistency
from gsda_fast.losses.discrepancy import fused_mmd, joint_mmd, mk_mmd
from gsda_fast.losses.norms import hard_feature_norm, spectral_penalty, stepwise_feature_norm
from gsda_fast.losses.predictions import entropy, minimum_class_confusion, nuclear_norm
from gsda_fast.losses.prototypes import PrototypeLosses, class_means, prototype_losses, prototype_pseudo_labels

__all__ = [
    "PrototypeLosses",
    "class_balance",
    "class_means",
    "classifier_discrepancy",
    "confident_cross_entropy",
    "confident_rows",
    "consistency",
    "domain_loss",
    "entropy",
    "entropy_weights",
    "fused_mmd",
    "hard_feature_norm",
    "joint_mmd",
    "margin_disparity",
    "minimum_class_confusion",
    "mk_mmd",
    "multilinear_map",
    "nuclear_norm",
    "prototype_losses",
    "prototype_pseudo_labels",
    "randomised_map",
    "spectral_penalty",
    "stepwise_feature_norm",
    "symmetric_classifier_loss",
    "symmetric_feature_loss",
    "uniform_class_prior",
]
