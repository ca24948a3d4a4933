"""The registered operations, forward, backward and update, behind which every backend stands.

Registered with `torch.library.custom_op`, so that `torch.compile(fullgraph=True)`, autocast and `torch.export` see one
opaque call each. Outside them the closed form could not be compiled: `torch.compile` refuses double backward.

In the first two, `tensors` are what can be differentiated: features, w1, b1, w2, b2, w3, b3. `half_weights`: see
`adversarial_terms`; an empty list where there are none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gsda_kernels import backends
from gsda_kernels.sgd import Sgd


def fingerprint(package: Path) -> str:
    """Eight hexadecimal digits that change with the Python code of a package.

    The operations bear those of this one in their names. `torch.compile` keeps what it compiled on disk and knows an
    operation by its name alone: after an upgrade it would go on with the former backward formula and the former shapes
    of what is saved for it.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


_VERSION = fingerprint(Path(__file__).parent)


@torch.library.custom_op(f"gsda_kernels::adversarial_forward_{_VERSION}", mutates_args=())
def adversarial_forward(
    tensors: Sequence[Tensor],
    half_weights: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    max_pairs: int,
    needs_grad: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    with torch.autocast(weight.device.type, enabled=False):
        return backends.get(backend).forward(tensors, half_weights, weight, label, max_pairs, needs_grad)


@adversarial_forward.register_fake
def _(
    tensors: Sequence[Tensor],
    half_weights: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    max_pairs: int,
    needs_grad: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    saved = backends.get(backend).saved_like(tensors, max_pairs, needs_grad)
    return weight.new_empty(weight.shape[1]), weight.new_empty(weight.shape[1]), saved


@torch.library.custom_op(f"gsda_kernels::adversarial_backward_{_VERSION}", mutates_args=())
def adversarial_backward(
    tensors: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    saved: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    needs_grad: list[bool],
    backend: str,
) -> list[Tensor]:
    with torch.autocast(weight.device.type, enabled=False):
        gradients = backends.get(backend).backward(
            tensors, weight, label, saved, grad_loss, grad_gradient_norm, loss_feature_scale, needs_grad
        )
    return [gradient for gradient in gradients if gradient is not None]


@adversarial_backward.register_fake
def _(
    tensors: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    loss_feature_scale: Tensor | None,
    saved: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    needs_grad: list[bool],
    backend: str,
) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t, needed in zip(tensors, needs_grad) if needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors, half_weights, weight, label, loss_feature_scale, _max_pairs, ctx.needs_grad, ctx.backend = inputs
    _, _, saved = output
    # Otherwise every saved tensor, being an output, gets a gradient of as many zeros.
    ctx.set_materialize_grads(False)
    ctx.num_tensors, ctx.num_half = len(tensors), len(half_weights)
    ctx.save_for_backward(*tensors, weight, label, loss_feature_scale, *saved)


def _backward(ctx: Any, grad_loss: Tensor | None, grad_gradient_norm: Tensor | None, _: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors[: ctx.num_tensors]
    weight, label, scale, *saved = ctx.saved_tensors[ctx.num_tensors :]
    upstream = [
        weight.new_zeros(weight.shape[1]) if gradient is None else gradient
        for gradient in (grad_loss, grad_gradient_norm)
    ]
    found = iter(adversarial_backward(tensors, weight, label, scale, saved, *upstream, ctx.needs_grad, ctx.backend))
    gradients = [next(found) if needed else None for needed in ctx.needs_grad]
    return gradients, [None] * ctx.num_half, *[None] * 6


@torch.library.custom_op(
    f"gsda_kernels::adversarial_update_{_VERSION}", mutates_args=("parameters", "half_weights", "momentum", "saved")
)
def adversarial_update(
    features: Tensor,
    parameters: Sequence[Tensor],
    half_weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    saved: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    learning_rate: Tensor,
    skip: Tensor,
    decay: float,
    weight_decay: float,
    nesterov: bool,
    backend: str,
) -> Tensor:
    rule = Sgd(learning_rate, decay, weight_decay, nesterov)
    with torch.autocast(weight.device.type, enabled=False):
        return backends.get(backend).update(
            [features, *parameters], half_weights, weight, label, saved, grad_loss, grad_gradient_norm, momentum, rule,
            skip,
        )  # fmt: skip


@adversarial_update.register_fake
def _(
    features: Tensor,
    parameters: Sequence[Tensor],
    half_weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    saved: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    learning_rate: Tensor,
    skip: Tensor,
    decay: float,
    weight_decay: float,
    nesterov: bool,
    backend: str,
) -> Tensor:
    return torch.empty_like(skip)


adversarial_forward.register_autograd(_backward, setup_context=_setup_context)
