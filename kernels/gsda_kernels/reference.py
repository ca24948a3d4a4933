"""The paper's formulas read literally: the oracle that every other backend answers to.

A loop over discriminators, and autograd's own double backward for the gradient magnitudes. Slow on purpose: nothing
here is shared with the closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def loop_over_discriminators(
    features: Tensor,
    disc: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return losses and gradient magnitudes of eqs. 6-12, one discriminator at a time.

    Args:
        features: (N, D). disc: w1 (K, H, D), b1 (K, H), w2 (K, H, H), b2 (K, H), w3 (K, H), b3 (K,).
        weight: (N, K), float32 or float64. label: (N,), same dtype: 1 source, 0 target.
        loss_feature_scale: 0-d factor on the loss's gradient to `features`; None for 1.

    Returns:
        loss (K,) and gradient_norm (K,), in the dtype of `weight`, with a graph to whatever input requires a gradient.
    """
    tensors = (features, *disc)
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        # The gradient to the features is part of the value, so the features need a graph even where they are frozen.
        f = features if features.requires_grad else features.detach().requires_grad_()
        losses, gradient_norms = [], []
        for k, parameters in enumerate(zip(*disc)):
            own_loss = _weighted_loss(f, parameters, weight[:, k], label)
            (gradient,) = torch.autograd.grad(own_loss, f, create_graph=True)
            # The loss's gradient is tiny (1/N): in half precision its squares would vanish.
            gradient_norms.append(torch.linalg.vector_norm(gradient.to(weight.dtype), dim=1).sum())
            if loss_feature_scale is not None:
                own_loss = _weighted_loss(_ScaleGradient.apply(f, loss_feature_scale), parameters, weight[:, k], label)
            losses.append(own_loss)
        loss, gradient_norm = torch.stack(losses), torch.stack(gradient_norms)
    return (loss, gradient_norm) if wanted else (loss.detach(), gradient_norm.detach())


def _weighted_loss(features: Tensor, parameters: Sequence[Tensor], weight: Tensor, label: Tensor) -> Tensor:
    w1, b1, w2, b2, w3, b3 = (parameter.to(features.dtype) for parameter in parameters)
    hidden = F.relu(F.linear(features, w1, b1))
    hidden = F.relu(F.linear(hidden, w2, b2))
    logit = (hidden @ w3 + b3).to(weight.dtype)
    return (weight * F.binary_cross_entropy_with_logits(logit, label, reduction="none")).mean()


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a constant."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (scale,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None
