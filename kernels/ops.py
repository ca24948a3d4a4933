"""The two registered operations, forward and backward, behind which every backend stands.

Registered with `torch.library.custom_op`, so that `torch.compile(fullgraph=True)`, autocast and `torch.export` see one
opaque call each. Outside them the closed form could not be compiled: `torch.compile` refuses double backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gsda_kernels import backends

_NUM_DIFFERENTIABLE = 7  # features, w1, b1, w2, b2, w3, b3


@torch.library.custom_op("gsda_kernels::adversarial_forward", mutates_args=())
def adversarial_forward(
    features: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    max_pairs: int,
    needs_grad: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    with torch.autocast(features.device.type, enabled=False):
        return backends.get(backend).forward((features, w1, b1, w2, b2, w3, b3), weight, label, max_pairs, needs_grad)


@adversarial_forward.register_fake
def _(
    features: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    max_pairs: int,
    needs_grad: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    saved = backends.get(backend).saved_like((features, w1, b1, w2, b2, w3, b3), max_pairs, needs_grad)
    return weight.new_empty(w1.shape[0]), weight.new_empty(w1.shape[0]), saved


@torch.library.custom_op("gsda_kernels::adversarial_backward", mutates_args=())
def adversarial_backward(
    features: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    saved: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    needs_grad: list[bool],
    backend: str,
) -> list[Tensor]:
    tensors = (features, w1, b1, w2, b2, w3, b3)
    with torch.autocast(features.device.type, enabled=False):
        gradients = backends.get(backend).backward(
            tensors, weight, label, saved, grad_loss, grad_gradient_norm, loss_feature_scale, needs_grad
        )
    return [gradient for gradient in gradients if gradient is not None]


@adversarial_backward.register_fake
def _(
    features: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    saved: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    needs_grad: list[bool],
    backend: str,
) -> list[Tensor]:
    tensors = (features, w1, b1, w2, b2, w3, b3)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t, needed in zip(tensors, needs_grad) if needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, loss_feature_scale, _max_pairs, needs_grad, backend = inputs
    _, _, saved = output
    ctx.num_inputs = len(inputs)
    ctx.num_tensors = len(tensors)
    ctx.needs_grad, ctx.backend = needs_grad, backend
    ctx.has_scale = loss_feature_scale is not None
    # Otherwise every saved tensor, being an output, gets a gradient of as many zeros.
    ctx.set_materialize_grads(False)
    scale = [loss_feature_scale] if ctx.has_scale else []
    ctx.save_for_backward(*tensors, *scale, *saved)


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_gradient_norm: Tensor | None, _: Any
) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors[: ctx.num_tensors]
    rest = list(ctx.saved_tensors[ctx.num_tensors :])
    scale = rest.pop(0) if ctx.has_scale else None
    weight = tensors[_NUM_DIFFERENTIABLE]
    upstream = [
        weight.new_zeros(weight.shape[1]) if gradient is None else gradient
        for gradient in (grad_loss, grad_gradient_norm)
    ]
    found = iter(adversarial_backward(*tensors, scale, rest, *upstream, ctx.needs_grad, ctx.backend))
    gradients = [next(found) if needed else None for needed in ctx.needs_grad]
    return (*gradients, *[None] * (ctx.num_inputs - _NUM_DIFFERENTIABLE))


adversarial_forward.register_autograd(_backward, setup_context=_setup_context)
