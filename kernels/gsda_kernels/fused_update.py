"""The discriminators' whole step in one operation: terms, gradients and stochastic gradient descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gsda_kernels import ops, pairs, reference
from gsda_kernels.functional import AdversarialTerms, DiscriminatorWeights, checked, checked_half_weights
from gsda_kernels.sgd import Sgd, step_where_finite

Upstream = tuple[Tensor, Tensor] | Callable[[AdversarialTerms], tuple[Tensor, Tensor]]


class AdversarialUpdate(NamedTuple):
    """What `adversarial_update_` returns about the step.

    Attributes:
        loss, gradient_norm: (K,), of `adversarial_terms`, before the step.
        found_inf: 0-d float32 on the device: 1 where nothing moved. What PyTorch's own optimizers take by this name.
    """

    loss: Tensor
    gradient_norm: Tensor
    found_inf: Tensor


@torch.no_grad()
def adversarial_update_(
    features: Tensor,
    disc: DiscriminatorWeights,
    momentum_buffers: DiscriminatorWeights,
    sample_weight: Tensor,
    domain: Tensor,
    upstream: Upstream,
    *,
    learning_rate: float | Tensor,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    skip: Tensor | None = None,
    half_weights: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
    min_weight: float = 0.0,
    max_pairs: int | None = None,
    validate: bool | None = None,
) -> AdversarialUpdate:
    r"""Move K discriminators by one step of SGD on an objective of their losses and gradient magnitudes, in place.

    The same as `adversarial_terms`, the backward pass of ``(gL * loss + gS * gradient_norm).sum()`` and a step of
    ``torch.optim.SGD`` without dampening; but the gradients of w1 and w2 are not stored: each tile of them moves its
    parameters as soon as it is known. For L_k + beta * L_syn, gL is 1 and gS is beta times a sign pattern, known only
    once every gradient magnitude is: `upstream` is asked for them between the forward pass and the step.

    Nothing moves, and `found_inf` is 1, where `skip` is 1, or where a loss, a gradient magnitude or a gradient is not
    finite, or more than `max_pairs` pairs are active. A GPU is not waited for. Fused backends (native, triton) look
    before they move: they refuse a step whose gradients' operands exceed the root of (largest number / 4N), 1e18 in
    float32. The one gradient whose size they cannot know beforehand is w3's: if it alone overflows, w3 stays, found_inf
    is 1, and the others have moved.

    Args:
        features: (N, D), see `adversarial_terms`; no gradient flows to them.
        disc: the parameters, contiguous, each requiring a gradient; their `grad` is neither read nor written.
        momentum_buffers: like `disc`: SGD's state, zeros before the first step; scratch where momentum is 0.
        sample_weight, domain, backend, min_weight, max_pairs, validate: see `adversarial_terms`.
        upstream: (gL, gS), each (K,), or a function that makes them of the terms, on the device.
        learning_rate: a number >= 0, or a 0-d tensor, which a schedule may change without a new compilation.
        momentum, weight_decay: numbers >= 0. nesterov: needs a momentum above 0.
        skip: 0-d float32 on the device of `features`: 1 if nothing may move. None for 0.
        half_weights: see `adversarial_terms`; they move along, so that afterwards they are again w1 and w2 converted.

    Returns:
        AdversarialUpdate, without a graph.

    Raises:
        ValueError: as `adversarial_terms`; a parameter that requires no gradient or is not contiguous; momentum of
            another shape, dtype, device or layout; two of these tensors, or one and another argument, that share
            memory; numbers out of their ranges. Nothing has moved then.

    Examples:
        >>> shapes = [(3, 8, 4), (3, 8), (3, 8, 8), (3, 8), (3, 8), (3,)]
        >>> disc = DiscriminatorWeights(*(torch.randn(shape, requires_grad=True) for shape in shapes))
        >>> buffers = DiscriminatorWeights(*map(torch.zeros_like, disc))
        >>> def objective(terms):
        ...     leaves = [term.detach().requires_grad_() for term in terms]
        ...     total = leaves[0].sum() + (leaves[1][0] - leaves[1][1:].sum()).abs()
        ...     return torch.autograd.grad(total, leaves)
        >>> step = adversarial_update_(
        ...     torch.randn(6, 4), disc, buffers, torch.rand(6, 3), torch.tensor([1, 1, 1, 0, 0, 0]), objective,
        ...     learning_rate=0.01, nesterov=True,
        ... )
        >>> step.loss.shape, float(step.found_inf)
        (torch.Size([3]), 0.0)
    """
    disc, buffers = DiscriminatorWeights(*disc), DiscriminatorWeights(*momentum_buffers)
    chosen, weight, label, bound = checked(
        features, disc, sample_weight, domain, backend, min_weight, max_pairs, validate
    )
    half = checked_half_weights(half_weights, features, disc)
    _check_moved(disc, buffers, half, {"features": features, "sample_weight": sample_weight, "domain": domain})
    _check_numbers(momentum, weight_decay, nesterov)
    skip = _scalar("skip", 0.0 if skip is None else skip, features.device, torch.float32)
    rate = _scalar("learning_rate", learning_rate, features.device, weight.dtype)

    parameters, velocity = [tensor.detach() for tensor in disc], [tensor.detach() for tensor in buffers]
    if chosen == "reference":
        leaves = DiscriminatorWeights(*(parameter.clone().requires_grad_() for parameter in parameters))
        with torch.enable_grad():
            graph = reference.loop_over_discriminators(features.detach(), leaves, weight, label)
            poison = pairs.nan_beyond(weight, bound)
            terms = AdversarialTerms(*(term * poison for term in graph))
    else:
        loss, gradient_norm, saved = ops.adversarial_forward(
            [features.detach(), *parameters], half, weight, label, None, bound, [False] + [True] * 6, chosen
        )
        terms = AdversarialTerms(loss, gradient_norm)
    results = AdversarialTerms(*(term.detach() for term in terms))
    if callable(upstream):
        with torch.enable_grad():
            upstream = upstream(results)
    grad_loss, grad_norm = _checked_upstream(upstream, weight)

    finite = torch.cat([*results, grad_loss, grad_norm]).isfinite().all()
    skip = torch.maximum(skip, (~finite).to(skip.dtype))
    if chosen == "reference":
        gradients = torch.autograd.grad(terms, list(leaves), (grad_loss, grad_norm))
        rule = Sgd(rate, momentum, weight_decay, nesterov)
        return AdversarialUpdate(*results, step_where_finite(parameters, gradients, velocity, half, rule, skip))
    found_inf = ops.adversarial_update(
        features.detach(), parameters, half, velocity, weight, label, saved, grad_loss, grad_norm, rate, skip,
        momentum, weight_decay, nesterov, chosen,
    )  # fmt: skip
    return AdversarialUpdate(*results, found_inf)


def _check_moved(
    disc: DiscriminatorWeights, buffers: DiscriminatorWeights, half: list[Tensor], others: dict[str, Tensor]
) -> None:
    moved = {f"disc.{name}": tensor for name, tensor in disc._asdict().items()}
    moved |= {f"momentum_buffers.{name}": tensor for name, tensor in buffers._asdict().items()}
    for name, parameter in disc._asdict().items():
        if not parameter.requires_grad:
            raise ValueError(f"disc.{name}: found requires_grad=False; expected True, for a parameter that is to move")
        buffer = getattr(buffers, name)
        for what in ("shape", "dtype", "device"):
            found, expected = getattr(buffer, what), getattr(parameter, what)
            if found != expected:
                as_text = (tuple(found), tuple(expected)) if what == "shape" else (found, expected)
                raise ValueError(
                    f"momentum_buffers.{name}: found {what} {as_text[0]}; expected {as_text[1]}, as of disc.{name}"
                )
    for name, tensor in moved.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: found strides {tensor.stride()}; expected a contiguous tensor, to write to")
    moved |= {f"half_weights.{name}": tensor for name, tensor in zip(("w1", "w2"), half)}
    if disc.w1.device.type == "meta" or torch.compiler.is_compiling():
        return
    furthest, owner = 0, ""
    for begin, end, name in sorted((*_extent(tensor), name) for name, tensor in {**moved, **others}.items()):
        if begin < furthest and (owner in moved or name in moved):
            raise ValueError(f"{name}: found memory that it shares with {owner}; expected memory of its own")
        if end > furthest:
            furthest, owner = end, name


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses from its first byte to behind its last one."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _check_numbers(momentum: float, weight_decay: float, nesterov: bool) -> None:
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: found {value}; expected a finite number >= 0")
    if nesterov and momentum == 0:
        raise ValueError("nesterov: found True beside momentum 0; expected a momentum above 0, or nesterov=False")


def _scalar(name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: found {value}; expected a finite number >= 0")
        return torch.full((), float(value), dtype=dtype, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name}: found shape {tuple(value.shape)}; expected a number or a 0-d tensor")
    # The host does not wait where a schedule keeps its value on the CPU.
    return value.detach().to(device, dtype, non_blocking=device.type == "cuda").reshape(())


def _checked_upstream(upstream: tuple[Tensor, Tensor], weight: Tensor) -> list[Tensor]:
    shape = (weight.shape[1],)
    for name, gradient in zip(("gL", "gS"), upstream, strict=True):
        if tuple(gradient.shape) != shape or gradient.device != weight.device:
            raise ValueError(
                f"upstream: found {name} of shape {tuple(gradient.shape)} on {gradient.device}; expected {shape} on "
                f"{weight.device}, one number for each discriminator"
            )
    return [gradient.detach().to(weight.dtype) for gradient in upstream]
