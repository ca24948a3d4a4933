"""What users call: the terms of hierarchical gradient synchronization, checked and documented."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gsda_kernels import backends, ops, pairs, reference

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALF, torch.float32, torch.float64)


class DiscriminatorWeights(NamedTuple):
    """The stacked parameters of K discriminators, each a ReLU network D -> H -> H -> 1 without normalization.

    Discriminator k computes ``z = w3[k] . relu(w2[k] @ relu(w1[k] @ f + b1[k]) + b2[k]) + b3[k]``.

    Attributes:
        w1: (K, H, D). b1: (K, H). w2: (K, H, H). b2: (K, H). w3: (K, H). b3: (K,). One floating dtype, one device.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor


class AdversarialTerms(NamedTuple):
    """Per-discriminator results of `adversarial_terms`.

    Attributes:
        loss: (K,), mean over the samples of the weighted binary cross-entropy (eqs. 6-8).
        gradient_norm: (K,), sum over the samples of the norm of the loss's gradient to the features (S_k, eqs. 10-12).
    """

    loss: Tensor
    gradient_norm: Tensor


def adversarial_terms(
    features: Tensor,
    disc: DiscriminatorWeights,
    sample_weight: Tensor,
    domain: Tensor,
    *,
    backend: str = "auto",
    min_weight: float = 0.0,
    max_pairs: int | None = None,
    loss_feature_scale: float | Tensor = 1.0,
    half_weights: tuple[Tensor, Tensor] | None = None,
    validate: bool | None = None,
) -> AdversarialTerms:
    r"""Weighted discriminator losses and gradient magnitudes of K discriminators (Hu et al., CVPR 2020, eqs. 6-12).

    With z[i, k] the logit of discriminator k for sample i::

        loss[k]          = 1/N sum_i w[i, k] * BCE(z[i, k], d[i])
        gradient_norm[k] = sum_i || d loss[k] / d features[i] ||_2

    Both are differentiable, in one backward pass, with respect to `features` and every tensor of `disc`, any of which
    may be frozen (``requires_grad=False``): what a frozen tensor alone needs is not computed.

    Args:
        features: (N, D), fp16, bf16, fp32 or fp64.
        disc: stacked weights, all of the features' dtype, or float32 beside fp16/bf16 features; products then run
            in the features' dtype with float32 accumulation.
        sample_weight: (N, K), >= 0, a constant (no gradient flows through it), dtype of `features` or of `disc`.
        domain: (N,), 1 source, 0 target; bool, integer or float.
        backend: ``auto`` (the fastest usable one) or a name of `available_backends`.
        min_weight: target pairs whose weight is below it are dropped; 0 is exact.
        max_pairs: an upper bound, known to the caller, on the number of (sample, discriminator) pairs with a non-zero
            weight; None stands for N*K. Both results are NaN where more pairs than that are active.
        loss_feature_scale: factor on the loss part of the gradient to `features` alone: a number or a 0-d tensor.
            ``-lambda`` is gradient reversal in one pass.
        half_weights: beside half-precision features and float32 weights, (w1, w2) of `disc` converted to the features'
            dtype, contiguous constants. Results and gradients are the same; triton then reads half as many bytes.
        validate: whether the *values* of `sample_weight` and `domain` are checked. None: for CPU tensors outside
            `torch.compile`. True on a GPU is an error, since it would make the host wait.

    Returns:
        AdversarialTerms of two (K,) tensors, float32, or float64 if all inputs are.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a negative weight; a domain label other than 0 and 1; a
            backend that cannot run here.

    Examples:
        >>> disc = DiscriminatorWeights(*(torch.randn(s) for s in [(3, 8, 4), (3, 8), (3, 8, 8), (3, 8), (3, 8), (3,)]))
        >>> out = adversarial_terms(torch.randn(6, 4), disc, torch.rand(6, 3), torch.tensor([1, 1, 1, 0, 0, 0]))
        >>> out.loss.shape, out.gradient_norm.shape
        (torch.Size([3]), torch.Size([3]))
    """
    disc = DiscriminatorWeights(*disc)
    chosen, weight, label, bound = checked(
        features, disc, sample_weight, domain, backend, min_weight, max_pairs, validate
    )
    half = checked_half_weights(half_weights, features, disc)
    accumulation, num_pairs = weight.dtype, weight.numel()
    scale = None
    if isinstance(loss_feature_scale, Tensor):
        if loss_feature_scale.numel() != 1:
            raise ValueError(
                f"loss_feature_scale: found shape {tuple(loss_feature_scale.shape)}; expected a number or a 0-d tensor"
            )
        # Nor does the host wait where a schedule keeps its value on the CPU.
        scale = loss_feature_scale.detach().to(features.device, accumulation, non_blocking=features.is_cuda).reshape(())
    elif loss_feature_scale != 1.0:
        scale = torch.full((), float(loss_feature_scale), dtype=accumulation, device=features.device)

    if chosen == "reference":
        loss, gradient_norm = reference.loop_over_discriminators(features, disc, weight, label, scale)
        if bound < num_pairs:
            poison = pairs.nan_beyond(weight, bound)
            loss, gradient_norm = loss * poison, gradient_norm * poison
        return AdversarialTerms(loss, gradient_norm)
    differentiable = (features, *disc)
    needs_grad = [torch.is_grad_enabled() and tensor.requires_grad for tensor in differentiable]
    loss, gradient_norm, _ = ops.adversarial_forward(
        differentiable, half, weight, label, scale, bound, needs_grad, chosen
    )
    return AdversarialTerms(loss, gradient_norm)


def checked(
    features: Tensor,
    disc: DiscriminatorWeights,
    sample_weight: Tensor,
    domain: Tensor,
    backend: str,
    min_weight: float,
    max_pairs: int | None,
    validate: bool | None,
) -> tuple[str, Tensor, Tensor, int]:
    """Return the backend's name, the weights (N, K) and labels (N,) in the dtype of sums, and the bound on pairs.

    Raises:
        ValueError: see `adversarial_terms`.
    """
    _check_shapes(features, disc, sample_weight, domain)
    accumulation = _check_dtypes(features, disc, sample_weight)
    _check_devices(features, disc, sample_weight, domain)
    if max_pairs is not None and (isinstance(max_pairs, float) or max_pairs < 1):
        raise ValueError(f"max_pairs: found {max_pairs}; expected None or a whole number of pairs >= 1")
    if not (math.isfinite(min_weight) and min_weight >= 0):
        raise ValueError(f"min_weight: found {min_weight}; expected a finite number >= 0")
    if validate is None:
        validate = features.device.type == "cpu" and not torch.compiler.is_compiling()
    if validate:
        _check_values(sample_weight, domain)
    chosen = backends.resolve_backend(backend, features.device, features.dtype)
    weight = sample_weight.detach().to(accumulation)
    label = domain.detach().to(accumulation)
    if min_weight > 0:
        weight = torch.where((weight >= min_weight) | (label == 1).unsqueeze(1), weight, 0.0)
    num_pairs = weight.numel()
    return chosen, weight, label, num_pairs if max_pairs is None else min(max_pairs, num_pairs)


def _check_shapes(features: Tensor, disc: DiscriminatorWeights, sample_weight: Tensor, domain: Tensor) -> None:
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(f"features: found shape {tuple(features.shape)}; expected (N, D) with N, D >= 1")
    if disc.w1.dim() != 3 or 0 in disc.w1.shape:
        raise ValueError(f"disc.w1: found shape {tuple(disc.w1.shape)}; expected (K, H, D) with K, H >= 1")
    (n, d), (k, h, _) = features.shape, disc.w1.shape
    expected = {
        "disc.w1": (disc.w1, (k, h, d)),
        "disc.b1": (disc.b1, (k, h)),
        "disc.w2": (disc.w2, (k, h, h)),
        "disc.b2": (disc.b2, (k, h)),
        "disc.w3": (disc.w3, (k, h)),
        "disc.b3": (disc.b3, (k,)),
        "sample_weight": (sample_weight, (n, k)),
        "domain": (domain, (n,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: found shape {tuple(tensor.shape)}; expected {shape} "
                f"for features {tuple(features.shape)} and disc.w1 {tuple(disc.w1.shape)}"
            )


def _check_dtypes(features: Tensor, disc: DiscriminatorWeights, sample_weight: Tensor) -> torch.dtype:
    """Return the dtype of sums and results; raises where the inputs' dtypes do not mix."""
    if features.dtype not in _FLOATS:
        raise ValueError(f"features: found dtype {features.dtype}; expected one of {', '.join(map(str, _FLOATS))}")
    parameter_dtype = disc.w1.dtype
    for name, tensor in disc._asdict().items():
        if tensor.dtype != parameter_dtype:
            raise ValueError(
                f"disc.{name}: found dtype {tensor.dtype}; expected {parameter_dtype}, the dtype of disc.w1"
            )
    mixed = features.dtype in _HALF and parameter_dtype == torch.float32
    if features.dtype != parameter_dtype and not mixed:
        raise ValueError(
            f"disc: found dtype {parameter_dtype} beside {features.dtype} features; expected {features.dtype}, "
            "or float32 beside float16 or bfloat16 features"
        )
    allowed = {features.dtype, parameter_dtype} | ({torch.float32} if features.dtype in _HALF else set())
    if sample_weight.dtype not in allowed:
        raise ValueError(
            f"sample_weight: found dtype {sample_weight.dtype}; expected {' or '.join(sorted(map(str, allowed)))}"
        )
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def checked_half_weights(
    half_weights: tuple[Tensor, Tensor] | None, features: Tensor, disc: DiscriminatorWeights
) -> list[Tensor]:
    """Return both as constants, or an empty list for None.

    Raises:
        ValueError: they do not fit to `features` and `disc`, or these do not mix dtypes.
    """
    if half_weights is None:
        return []
    if features.dtype == disc.w1.dtype:
        raise ValueError(
            f"half_weights: found two tensors beside features and disc of {features.dtype}; expected None, "
            "or float32 weights beside half-precision features"
        )
    half = dict(zip(("w1", "w2"), half_weights, strict=True))
    for name, copy in half.items():
        weight = getattr(disc, name)
        found = (tuple(copy.shape), copy.dtype, copy.device)
        expected = (tuple(weight.shape), features.dtype, weight.device)
        if found != expected or not copy.is_contiguous():
            raise ValueError(
                f"half_weights: found {name} with shape, dtype and device {found}, strides {copy.stride()}; "
                f"expected {expected}, contiguous"
            )
    return [copy.detach() for copy in half.values()]


def _check_devices(features: Tensor, disc: DiscriminatorWeights, sample_weight: Tensor, domain: Tensor) -> None:
    parameters = {f"disc.{name}": tensor for name, tensor in disc._asdict().items()}
    for name, tensor in {**parameters, "sample_weight": sample_weight, "domain": domain}.items():
        if tensor.device != features.device:
            raise ValueError(
                f"{name}: found device {tensor.device}; expected {features.device}, the device of features"
            )


def _check_values(sample_weight: Tensor, domain: Tensor) -> None:
    if sample_weight.device.type != "cpu":
        raise ValueError(
            f"validate: found True for tensors on {sample_weight.device}; expected None or False there, "
            "since reading values would make the host wait for the device"
        )
    if not bool((sample_weight >= 0).all()):
        raise ValueError(f"sample_weight: found {sample_weight.min().item()}; expected weights >= 0")
    wrong = domain[(domain != 0) & (domain != 1)]
    if wrong.numel():
        raise ValueError(f"domain: found label {wrong[0].item()}; expected 1 (source) or 0 (target)")
