"""What is timed against what: the reference loop, the best that autograd can do, and every closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import gsda_kernels as gk
from benchmarks.shapes import HeadInputs

Terms = tuple[Tensor, Tensor]
Contender = Callable[[HeadInputs], Terms]

REFERENCE = "reference loop"
INDEXING = "indexing loop"
BASELINE = "strong autograd baseline"


def reference_loop(inputs: HeadInputs) -> Terms:
    """Return a loop over discriminators with autograd's double backward: the paper read literally.

    It takes the stacked parameters apart once, so that each gradient is written where it belongs.
    """
    return gk.adversarial_terms(
        inputs.features, inputs.disc, inputs.sample_weight, inputs.domain, backend="reference", validate=False
    )


def indexing_loop(inputs: HeadInputs) -> Terms:
    """Return the loop as it is first written, which indexes the stacked parameters: `w1[k]`, `b1[k]` and so on.

    The backward of every such slice makes a gradient as large as the whole stack, zero but for the slice, and adds it.
    """
    losses, gradient_norms = [], []
    for k in range(len(inputs.disc.b3)):
        out = gk.adversarial_terms(
            inputs.features,
            gk.DiscriminatorWeights(*(tensor[k : k + 1] for tensor in inputs.disc)),
            inputs.sample_weight[:, k : k + 1],
            inputs.domain,
            backend="reference",
            validate=False,
        )
        losses.append(out.loss)
        gradient_norms.append(out.gradient_norm)
    return torch.cat(losses), torch.cat(gradient_norms)


def strong_autograd_baseline(inputs: HeadInputs) -> Terms:
    """Return the best use of autograd: all discriminators as one batched product, and one `autograd.grad` for all
    norms.

    The features are expanded to (K, N, D), so that the gradient of the summed losses holds every dL_k/df_i apart.
    """
    w1, b1, w2, b2, w3, b3 = inputs.disc
    features = inputs.features if inputs.features.requires_grad else inputs.features.detach().requires_grad_()
    expanded = features.expand(len(b3), *features.shape)
    weight = inputs.sample_weight.t()
    hidden = torch.baddbmm(b1.unsqueeze(1), expanded, w1.mT).relu()
    hidden = torch.baddbmm(b2.unsqueeze(1), hidden, w2.mT).relu()
    logit = torch.baddbmm(b3.view(-1, 1, 1), hidden, w3.unsqueeze(2)).squeeze(2).to(weight.dtype)
    label = inputs.domain.to(weight.dtype).expand_as(logit)
    loss = (weight * F.binary_cross_entropy_with_logits(logit, label, reduction="none")).mean(1)
    (gradient,) = torch.autograd.grad(loss.sum(), expanded, create_graph=True)
    return loss, torch.linalg.vector_norm(gradient.to(weight.dtype), dim=2).sum(1)


def closed_form(backend: str) -> Contender:
    """Return `adversarial_terms` with one of its backends, called as training calls it."""

    def terms(inputs: HeadInputs) -> Terms:
        return gk.adversarial_terms(
            inputs.features,
            inputs.disc,
            inputs.sample_weight,
            inputs.domain,
            backend=backend,
            max_pairs=inputs.max_pairs,
            validate=False,
        )

    return terms


def contenders(device: torch.device | str) -> dict[str, Contender]:
    """Every contender that can run on `device`, by the name that results are stored under."""
    usable = [name for name, why in gk.available_backends(device).items() if why is None and name != "reference"]
    return {
        REFERENCE: reference_loop,
        INDEXING: indexing_loop,
        BASELINE: strong_autograd_baseline,
        **{name: closed_form(name) for name in usable},
    }


def step(contender: Contender, inputs: HeadInputs) -> list[Tensor]:
    """Forward and backward: the gradients to whatever requires one."""
    wanted = [tensor for tensor in (inputs.features, *inputs.disc) if tensor.requires_grad]
    return list(torch.autograd.grad(contender(inputs), wanted, (inputs.grad_loss, inputs.grad_gradient_norm)))
