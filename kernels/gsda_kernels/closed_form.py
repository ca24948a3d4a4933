"""The closed form of the terms and of their gradients in plain PyTorch: no autograd inside autograd.

A ReLU network is piecewise linear, so the logit's gradient to the features is a chain of masked products, part of the
forward; and since the masks are piecewise constant, the gradient of its norm is first-order too. Per pair of a sample
and a discriminator this takes 4 D*H + 3 H*H multiply-adds, 2 D*H + 2 H*H where the discriminators are frozen, and none
for pairs of weight zero. docs/method.md derives the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gsda_kernels import buffers, pairs
from gsda_kernels.sgd import Sgd, step_where_finite


class TorchBackend:
    """Plain PyTorch on any device, in any floating dtype."""

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def unsupported(self, dtype: torch.dtype) -> str | None:
        return None

    def saved_like(self, tensors: Sequence[Tensor], max_pairs: int, needs_grad: Sequence[bool]) -> list[Tensor]:
        features, w1 = tensors[:2]
        count, (_, hidden, dim) = pairs.num_buffer_rows(features, w1, max_pairs), w1.shape
        sums = torch.float64 if features.dtype == torch.float64 else torch.float32
        saved = [buffers.empty((count, dim), features), *(features.new_empty(count, dtype=sums) for _ in range(2))]
        if any(needs_grad[1:]):
            saved += [buffers.empty((count, hidden), features, dtype) for dtype in (None, None, torch.bool)]
        return saved

    def forward(
        self,
        tensors: Sequence[Tensor],
        half_weights: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        max_pairs: int,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        features, parameters = tensors[0], [parameter.to(tensors[0].dtype) for parameter in tensors[1:]]
        num_samples, num_discriminators = weight.shape
        saved = self.saved_like(tensors, max_pairs, needs_grad)
        jacobians, residuals, norms = saved[:3]
        loss, gradient_norm = weight.new_zeros(num_discriminators), weight.new_zeros(num_discriminators)
        hidden_size = parameters[1].shape[1]
        for block in pairs.blocks(features, parameters[0], weight, label, max_pairs):
            w1, b1, w2, b2, w3, b3 = (parameter[block.discriminator] for parameter in parameters)
            if len(saved) > 3:
                h1, u1, active2 = (block.view(buffer) for buffer in saved[3:])
            else:
                h1, u1 = (features.new_empty(*block.shape, hidden_size) for _ in range(2))
                active2 = None
            jacobian, residual, norm = block.view(jacobians), block.view(residuals), block.view(norms)
            _affine(block.gather(features), w1, b1, out=h1).relu_()
            h2 = _affine(h1, w2, b2).relu_()
            logit = _row_dot(h2.to(weight.dtype), w3.to(weight.dtype)) + b3.to(weight.dtype).unsqueeze(-1)
            on = torch.gt(h2, 0, out=active2)
            # u2 = dz/d(pre-activation 2) is w3 where the second ReLU is on.
            torch.matmul(torch.where(on, w3.unsqueeze(-2), 0.0), w2, out=u1)
            u1.mul_(h1 > 0)
            torch.matmul(u1, w1, out=jacobian)
            signed_logit = block.sign * logit
            torch.sigmoid(signed_logit, out=residual)
            torch.linalg.vector_norm(jacobian, dim=-1, dtype=weight.dtype, out=norm)
            loss[block.discriminator] = (block.weight * F.softplus(signed_logit)).sum(-1)
            gradient_norm[block.discriminator] = (block.weight * residual * norm).sum(-1)
        poison = pairs.nan_beyond(weight, max_pairs)
        # Through the saved norms the gradients become NaN as well.
        norms.mul_(poison)
        return loss / num_samples * poison, gradient_norm / num_samples * poison, saved

    def backward(
        self,
        tensors: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        saved: Sequence[Tensor],
        grad_loss: Tensor,
        grad_gradient_norm: Tensor,
        loss_feature_scale: Tensor | None,
        needs_grad: Sequence[bool],
    ) -> list[Tensor | None]:
        features, parameters = tensors[0], [parameter.to(tensors[0].dtype) for parameter in tensors[1:]]
        gradients = [buffers.empty(t.shape, t) if needed else None for t, needed in zip(tensors, needs_grad)]
        jacobians, residuals, norms = saved[:3]
        feature_gradient = torch.zeros_like(features, dtype=weight.dtype) if needs_grad[0] else None
        # Known without a wait on a CPU alone: then a fourth of the work falls away with the norm's own gradient.
        has_norm = features.device.type != "cpu" or bool(grad_gradient_norm.any())
        for block in pairs.blocks(features, parameters[0], weight, label, len(jacobians)):
            jacobian, residual, norm = block.view(jacobians), block.view(residuals), block.view(norms)
            share = block.weight / len(features)
            grad_l = share * grad_loss[block.discriminator].unsqueeze(-1)
            grad_s = share * grad_gradient_norm[block.discriminator].unsqueeze(-1)
            dz_loss = grad_l * block.sign * residual
            dz_norm = grad_s * block.sign * residual * (1 - residual) * norm
            if feature_gradient is not None:
                scaled = dz_loss if loss_feature_scale is None else loss_feature_scale * dz_loss
                block.scatter_add(feature_gradient, scaled + dz_norm, jacobian)
            if any(needs_grad[1:]):
                # d norm / d jacobian, with the subgradient 0 where the jacobian vanishes.
                direction = torch.where(norm > 0, grad_s * residual / norm, 0.0).to(features.dtype).unsqueeze(-1)
                q = buffers.empty(jacobian.shape, jacobian)
                _add_parameter_gradients(
                    [gradient if gradient is None else gradient[block.discriminator] for gradient in gradients[1:]],
                    [parameter[block.discriminator] for parameter in parameters],
                    block.gather(features),
                    [block.view(buffer) for buffer in saved[3:]],
                    (dz_loss + dz_norm).to(features.dtype).unsqueeze(-1),
                    torch.mul(direction, jacobian, out=q) if has_norm else None,
                )
        if feature_gradient is not None:
            gradients[0] = feature_gradient.to(features.dtype)
        return gradients

    def update(
        self,
        tensors: Sequence[Tensor],
        half_weights: Sequence[Tensor],
        weight: Tensor,
        label: Tensor,
        saved: Sequence[Tensor],
        grad_loss: Tensor,
        grad_gradient_norm: Tensor,
        momentum: Sequence[Tensor],
        rule: Sgd,
        skip: Tensor,
    ) -> Tensor:
        needs_grad = [False, *[True] * 6]
        gradients = self.backward(
            tensors, weight, label, saved, grad_loss, grad_gradient_norm, loss_feature_scale=None, needs_grad=needs_grad
        )
        found = [gradient for gradient in gradients if gradient is not None]
        return step_where_finite(tensors[1:], found, momentum, half_weights, rule, skip)


def _add_parameter_gradients(
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    features: Tensor,
    saved: Sequence[Tensor],
    dz: Tensor,
    q: Tensor | None,
) -> None:
    """Write one block's gradients into `gradients`, both chains (of the logit and of the norm) sharing their products.

    Args:
        gradients: to w1, b1, w2, b2, w3, b3 of the block; None where not wanted.
        features: the pairs' features, or (N, D) to be broadcast. saved: h1, u1 = dz/d(pre-activation 1), and the mask
            of the second ReLU.
        dz: shape + (1,), gradient to the logits. q: shape + (D,), gradient to the jacobians, overwritten; None for 0.
    """
    grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3 = gradients
    w1, _, w2, b2, w3, _ = parameters
    h1, u1, active2 = saved
    dz_row = dz.mT
    if grad_w2 is not None or grad_b2 is not None or grad_w3 is not None:
        # The sums over pairs of m2 dz and of m2^T (dz h1 + g1): only then do w3 and W2 come in, once for all pairs.
        mask = active2.to(dz.dtype)
        bias_sum = torch.matmul(dz_row, mask).squeeze(-2)
        if grad_b2 is not None:
            torch.mul(w3, bias_sum, out=grad_b2)
        if grad_w2 is not None or grad_w3 is not None:
            right = dz * h1 if q is None else torch.matmul(q, w1.mT).mul_(h1 > 0).addcmul_(dz, h1)
            in_place = grad_w2 is not None and grad_w2.dtype == dz.dtype
            weight_sum = torch.matmul(mask.mT, right, out=grad_w2 if in_place else None)
            if grad_w3 is not None:
                grad_w3.copy_((w2 * weight_sum).sum(-1, dtype=_sum_dtype(dz)) + b2 * bias_sum)
            if grad_w2 is not None:
                torch.mul(weight_sum, w3.unsqueeze(-1), out=grad_w2)
    if grad_b1 is not None:
        _product(dz_row, u1, out=grad_b1.unsqueeze(-2))
    if grad_w1 is not None:
        _product(u1.mT, dz * features if q is None else q.addcmul_(dz, features), out=grad_w1)
    if grad_b3 is not None:
        grad_b3.copy_(dz.sum((-1, -2), dtype=_sum_dtype(dz)))


def _affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.matmul(x, weight.mT, out=out).add_(bias.unsqueeze(-2))


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.matmul(a, b, out=out)
    else:
        out.copy_(torch.matmul(a, b))


def _row_dot(rows: Tensor, vector: Tensor) -> Tensor:
    return torch.matmul(rows, vector.unsqueeze(-1)).squeeze(-1)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
