"""The launches of the adversarial head: six forward; backward one for the features, and four and a sum for all
parameters; or six that move the parameters. Nothing here waits for the device or reads a value from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import triton
from torch import Tensor

from gsda_kernels.sgd import Sgd
from gsda_kernels.triton.configs import Configuration, Product, configure
from gsda_kernels.triton.device import on_device
from gsda_kernels.triton.pointwise import (
    bad_operands_kernel,
    feature_gradient_kernel,
    pair_gradient_kernel,
    small_update_kernel,
    terms_kernel,
)
from gsda_kernels.triton.products import (
    first_layer_kernel,
    hidden_backward_kernel,
    hidden_gradient_kernel,
    jacobian_kernel,
    second_layer_kernel,
    weight_gradient_kernel,
)
from gsda_kernels.triton.routing import Routing, most_tiles, route

_BLOCK_PAIRS = 64  # of the pointwise passes over one discriminator's pairs
_BLOCK_COLUMNS = 64  # of the search for bad operands
_BLOCK_UNITS = 128  # of the small parameters that move


@dataclass(frozen=True)
class Saved:
    """What the forward leaves to the backward.

    Attributes:
        jacobian: (max_pairs, D), dtype of the features. residual, norm: (max_pairs,) float32.
        h1, u1, active2: (max_pairs, H), dtype of the features, only where a parameter's gradient is wanted: the first
            layer, the logit's gradient to it before its ReLU, and the second layer's mask as 0 or 1.
    """

    routing: Routing
    jacobian: Tensor
    residual: Tensor
    norm: Tensor
    h1: Tensor | None = None
    u1: Tensor | None = None
    active2: Tensor | None = None

    @staticmethod
    def empty(tensors: Sequence[Tensor], max_pairs: int, needs_grad: Sequence[bool]) -> Saved:
        """Uninitialised."""
        features, w1 = tensors[:2]
        (num_samples, dim), (num_discriminators, hidden, _) = features.shape, w1.shape
        block_pairs = _configuration(features, w1).block_pairs
        layers = [features.new_empty(max_pairs, hidden) for _ in range(3)] if any(needs_grad[1:]) else []
        return Saved(
            Routing.empty(features, num_samples, num_discriminators, max_pairs, block_pairs),
            features.new_empty(max_pairs, dim),
            *(features.new_empty(max_pairs, dtype=torch.float32) for _ in range(2)),
            *layers,
        )

    def tensors(self) -> list[Tensor]:
        routing, rest = self.routing, (self.jacobian, self.residual, self.norm, self.h1, self.u1, self.active2)
        every = (routing.offsets, routing.sample, routing.position, routing.tiles, *rest)
        return [tensor for tensor in every if tensor is not None]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Saved:
        return Saved(Routing(*tensors[:4]), *tensors[4:])


def forward(
    tensors: Sequence[Tensor],
    half_weights: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    max_pairs: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See `Backend.forward`."""
    features, w1, b1, w2, b2, w3, b3 = (tensor.contiguous() for tensor in tensors)
    weight, label = weight.contiguous(), label.contiguous()
    (num_samples, dim), (num_discriminators, hidden, _) = features.shape, w1.shape
    config = _configuration(features, w1)
    saved = Saved.empty((features, w1), max_pairs, needs_grad)
    # The same numbers in half the bytes: the kernels round w1 and w2 as these have been.
    read_w1, read_w2 = half_weights or (w1, w2)
    routing = saved.routing
    h1 = features.new_empty(max_pairs, hidden) if saved.h1 is None else saved.h1
    u1 = features.new_empty(max_pairs, hidden) if saved.u1 is None else saved.u1
    u2 = torch.empty_like(h1)
    active2 = u2 if saved.active2 is None else saved.active2
    logit_parts = triton.cdiv(hidden, config.layer.block_columns)
    square_parts = triton.cdiv(dim, config.jacobian.block_columns)
    layer_grid, jacobian_grid = (logit_parts * routing.num_tiles,), (square_parts * routing.num_tiles,)
    logit_part = weight.new_empty(max_pairs, logit_parts)
    square_part = weight.new_empty(max_pairs, square_parts)
    loss, gradient_norm = weight.new_empty(num_discriminators), weight.new_empty(num_discriminators)
    layer, to_features = _options(config.layer, features), _options(config.jacobian, features)
    with on_device(features.device):
        route(weight, routing, config.block_pairs)
        first_layer_kernel[layer_grid](
            features, read_w1, b1, routing.offsets, routing.sample, routing.tiles, h1, dim, hidden, **layer
        )
        second_layer_kernel[layer_grid](
            h1, read_w2, b2, w3, routing.offsets, routing.tiles, u2, active2, logit_part, hidden,
            STORE_ACTIVE=saved.active2 is not None, **layer,
        )  # fmt: skip
        hidden_gradient_kernel[layer_grid](u2, read_w2, h1, routing.offsets, routing.tiles, u1, hidden, **layer)
        jacobian_kernel[jacobian_grid](
            u1, read_w1, routing.offsets, routing.tiles, saved.jacobian, square_part, dim, hidden, **to_features
        )
        terms_kernel[(num_discriminators,)](
            logit_part, square_part, b3, weight, label, routing.offsets, routing.sample, saved.residual, saved.norm,
            loss, gradient_norm, num_samples, num_discriminators, logit_parts, square_parts,
            BLOCK_PAIRS=_BLOCK_PAIRS,
            BLOCK_LOGIT_PARTS=triton.next_power_of_2(logit_parts),
            BLOCK_SQUARE_PARTS=triton.next_power_of_2(square_parts),
            num_warps=4,
        )  # fmt: skip
    return loss, gradient_norm, saved.tensors()


def backward(
    tensors: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    saved_tensors: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    loss_feature_scale: Tensor | None,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """See `Backend.backward`."""
    features, *parameters = (tensor.contiguous() for tensor in tensors)
    weight, label = weight.contiguous(), label.contiguous()
    saved = Saved.of(saved_tensors)
    gradients: list[Tensor | None] = [None] * len(tensors)
    upstream = (grad_loss, grad_gradient_norm)
    with on_device(features.device):
        if needs_grad[0]:
            gradients[0] = _feature_gradient(features, weight, label, saved, upstream, loss_feature_scale)
        if any(needs_grad[1:]):
            gradients[1:] = _parameter_gradients(
                features, parameters, weight, label, saved, upstream, wanted=needs_grad[1:]
            )
    return gradients


def _feature_gradient(
    features: Tensor,
    weight: Tensor,
    label: Tensor,
    saved: Saved,
    upstream: tuple[Tensor, Tensor],
    loss_feature_scale: Tensor | None,
) -> Tensor:
    (num_samples, dim), num_discriminators = features.shape, weight.shape[1]
    out = torch.empty_like(features)
    block_columns = min(128, triton.next_power_of_2(dim))
    feature_gradient_kernel[(num_samples, triton.cdiv(dim, block_columns))](
        saved.jacobian, saved.residual, saved.norm, weight, label, *upstream,
        weight if loss_feature_scale is None else loss_feature_scale,
        saved.routing.position, out, num_samples, num_discriminators, dim, *(grad.stride(0) for grad in upstream),
        HAS_SCALE=loss_feature_scale is not None,
        BLOCK_DISCRIMINATORS=min(32, triton.next_power_of_2(num_discriminators)),
        BLOCK_COLUMNS=block_columns,
        num_warps=4,
    )  # fmt: skip
    return out


def _parameter_gradients(
    features: Tensor,
    parameters: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    saved: Saved,
    upstream: tuple[Tensor, Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return gradients to w1, b1, w2, b2, w3, b3; the products that only unwanted ones need are skipped."""
    h1, u1, active2 = saved.h1, saved.u1, saved.active2
    assert h1 is not None
    assert u1 is not None
    assert active2 is not None
    w1, b1, w2, b2, w3, b3 = parameters
    want_w1, want_b1, want_w2, want_b2, want_w3, _ = wanted
    num_discriminators, hidden, dim = w1.shape
    config, routing, pairs = _configuration(features, w1), saved.routing, len(saved.jacobian)
    _check_tiles(features, w1, saved)
    grad_logit, direction = torch.empty_like(saved.residual), torch.empty_like(saved.norm)
    # A pointer that a kernel does not store through is any tensor: no memory is taken for what is not wanted.
    grad_w1, grad_w2 = (torch.empty_like(w) if want else w for w, want in ((w1, want_w1), (w2, want_w2)))
    grad_b1, grad_b2, grad_b3 = (torch.empty_like(parameter) for parameter in (b1, b2, b3))
    grad_w3 = None

    first_operand = torch.empty_like(saved.jacobian)
    _pair_gradients(features, weight, label, saved, upstream, grad_logit, direction, first_operand, grad_b3)
    sums = {**_options(config.weight, features), "UPDATE": False, "NESTEROV": False, "STORE_HALF": False}
    row_blocks = triton.cdiv(hidden, config.weight.block_rows)
    if want_w1 or want_b1:
        column_blocks = triton.cdiv(dim, config.weight.block_columns) if want_w1 else 1
        weight_gradient_kernel[(column_blocks, row_blocks, num_discriminators)](
            u1, first_operand, grad_logit, routing.offsets, w1, b2, w3, grad_w1, grad_b1, grad_logit,
            *_without_update(grad_logit), hidden, dim, SECOND_LAYER=False, WANT_WEIGHT=want_w1, WANT_W3=False, **sums,
        )  # fmt: skip
    if want_w2 or want_b2 or want_w3:
        product = want_w2 or want_w3
        column_blocks = triton.cdiv(hidden, config.weight.block_columns) if product else 1
        second_operand = features.new_empty(pairs, hidden) if product else h1
        w3_part = grad_logit.new_empty(num_discriminators, hidden, column_blocks)
        if product:
            _hidden_backward(features, w1, config.layer, saved, grad_logit, direction, second_operand)
        weight_gradient_kernel[(column_blocks, row_blocks, num_discriminators)](
            active2, second_operand, grad_logit, routing.offsets, w2, b2, w3, grad_w2, grad_b2, w3_part,
            *_without_update(grad_logit), hidden, hidden,
            SECOND_LAYER=True, WANT_WEIGHT=want_w2, WANT_W3=want_w3, **sums,
        )  # fmt: skip
        if want_w3:
            grad_w3 = w3_part.sum(-1).to(w3.dtype)
    every = (grad_w1, grad_b1, grad_w2, grad_b2, grad_w3, grad_b3)
    return [gradient if want else None for gradient, want in zip(every, wanted)]


def update(
    tensors: Sequence[Tensor],
    half_weights: Sequence[Tensor],
    weight: Tensor,
    label: Tensor,
    saved_tensors: Sequence[Tensor],
    grad_loss: Tensor,
    grad_gradient_norm: Tensor,
    momentum: Sequence[Tensor],
    rule: Sgd,
    skip: Tensor,
) -> Tensor:
    """See `Backend.update`."""
    features, (w1, b1, w2, b2, w3, b3) = tensors[0].contiguous(), tensors[1:]
    weight, label = weight.contiguous(), label.contiguous()
    saved = Saved.of(saved_tensors)
    h1, u1, active2 = saved.h1, saved.u1, saved.active2
    assert h1 is not None
    assert u1 is not None
    assert active2 is not None
    (num_samples, dim), (num_discriminators, hidden, _) = features.shape, w1.shape
    config, offsets = _configuration(features, w1), saved.routing.offsets
    cut = config.update
    half_w1, half_w2 = half_weights or (w1, w2)
    _check_tiles(features, w1, saved)
    grad_logit, direction = torch.empty_like(saved.residual), torch.empty_like(saved.norm)
    grad_b1, grad_b2 = (weight.new_empty(num_discriminators, hidden) for _ in range(2))
    grad_b3 = weight.new_empty(num_discriminators)
    first_operand, second_operand = torch.empty_like(saved.jacobian), torch.empty_like(h1)
    row_blocks = triton.cdiv(hidden, cut.block_rows)
    columns_1, columns_2 = (triton.cdiv(size, cut.block_columns) for size in (dim, hidden))
    w3_part = weight.new_empty(num_discriminators, hidden, columns_2)
    looked_at = triton.cdiv(max(dim, hidden), _BLOCK_COLUMNS)
    bad = weight.new_empty(num_discriminators, looked_at)
    small = triton.cdiv(hidden, _BLOCK_UNITS)
    bad_w3 = weight.new_empty(num_discriminators, small)
    largest = (torch.finfo(torch.float32).max / (4 * num_samples)) ** 0.5
    step = (rule.learning_rate, rule.momentum, rule.weight_decay)
    sums = {**_options(cut, features), "UPDATE": True, "NESTEROV": rule.nesterov, "WANT_WEIGHT": True}
    sums["STORE_HALF"] = bool(half_weights)
    with on_device(features.device):
        _pair_gradients(
            features, weight, label, saved, (grad_loss, grad_gradient_norm), grad_logit, direction, first_operand,
            grad_b3,
        )  # fmt: skip
        _hidden_backward(features, half_w1, config.layer, saved, grad_logit, direction, second_operand)
        bad_operands_kernel[(looked_at, num_discriminators)](
            u1, first_operand, second_operand, grad_logit, b2, w3, offsets, bad, largest, dim, hidden,
            BLOCK_PAIRS=_BLOCK_PAIRS, BLOCK_COLUMNS=_BLOCK_COLUMNS, num_warps=4,
        )  # fmt: skip
        found_inf = torch.maximum(skip, bad.amax())
        rate, decay, weight_decay = step
        # W2 before W1 and w3 moves on: its gradient's operands are made of them.
        weight_gradient_kernel[(columns_2, row_blocks, num_discriminators)](
            active2, second_operand, grad_logit, offsets, w2, b2, w3, w2, grad_b2, w3_part, momentum[2], half_w2,
            rate, found_inf, decay, weight_decay, hidden, hidden, SECOND_LAYER=True, WANT_W3=True, **sums,
        )  # fmt: skip
        weight_gradient_kernel[(columns_1, row_blocks, num_discriminators)](
            u1, first_operand, grad_logit, offsets, w1, b2, w3, w1, grad_b1, grad_logit, momentum[0], half_w1,
            rate, found_inf, decay, weight_decay, hidden, dim, SECOND_LAYER=False, WANT_W3=False, **sums,
        )  # fmt: skip
        small_update_kernel[(small, num_discriminators)](
            grad_b1, grad_b2, w3_part, grad_b3, b1, b2, w3, b3, momentum[1], momentum[3], momentum[4], momentum[5],
            rate, found_inf, bad_w3, decay, weight_decay, hidden, columns_2, NESTEROV=rule.nesterov,
            BLOCK_UNITS=_BLOCK_UNITS, BLOCK_PARTS=triton.next_power_of_2(columns_2), num_warps=4,
        )  # fmt: skip
        return torch.maximum(found_inf, bad_w3.amax())


def _check_tiles(features: Tensor, w1: Tensor, saved: Saved) -> None:
    """Tiles of another size than the pairs were sorted into would leave some of them out."""
    shape = (len(features), len(w1), len(saved.jacobian), _configuration(features, w1).block_pairs)
    if saved.routing.num_tiles != most_tiles(*shape):
        raise RuntimeError("torch.backends.cuda.matmul.fp32_precision: changed between the forward and backward pass")


def _pair_gradients(
    features: Tensor,
    weight: Tensor,
    label: Tensor,
    saved: Saved,
    upstream: tuple[Tensor, Tensor],
    grad_logit: Tensor,
    direction: Tensor,
    first_operand: Tensor,
    grad_b3: Tensor,
) -> None:
    (num_samples, dim), num_discriminators = features.shape, weight.shape[1]
    block_columns = min(32, triton.next_power_of_2(dim))
    pair_gradient_kernel[(triton.cdiv(dim, block_columns), num_discriminators)](
        features, saved.jacobian, saved.residual, saved.norm, weight, label, *upstream,
        saved.routing.offsets, saved.routing.sample, grad_logit, direction, first_operand, grad_b3,
        num_samples, num_discriminators, dim, *(grad.stride(0) for grad in upstream),
        BLOCK_PAIRS=_BLOCK_PAIRS, BLOCK_COLUMNS=block_columns, num_warps=4,
    )  # fmt: skip


def _hidden_backward(
    features: Tensor,
    w1: Tensor,
    layer: Product,
    saved: Saved,
    grad_logit: Tensor,
    direction: Tensor,
    second_operand: Tensor,
) -> None:
    (_, hidden, dim), routing = w1.shape, saved.routing
    hidden_backward_kernel[(triton.cdiv(hidden, layer.block_columns) * routing.num_tiles,)](
        saved.jacobian, w1, saved.h1, grad_logit, direction, routing.offsets, routing.tiles, second_operand,
        dim, hidden, **_options(layer, features),
    )  # fmt: skip


def _without_update(any_tensor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float]:
    """In the places of what an update reads and writes beside the parameters: a pointer not used is any tensor."""
    return any_tensor, any_tensor, any_tensor, any_tensor, 0.0, 0.0


def _configuration(features: Tensor, w1: Tensor) -> Configuration:
    num_samples, dim = features.shape
    precision, chip = _precision(features.dtype), _chip(features.device)
    return configure(num_samples, dim, w1.shape[1], features.dtype, w1.dtype, precision, chip)


def _chip(device: torch.device) -> str | None:
    """Return the device's name in the table of configurations; None for a device that is not there, as in tests."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _precision(dtype: torch.dtype) -> str:
    """Return how float32 operands are multiplied: as PyTorch's own products are on this device."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def _options(product: Product, features: Tensor) -> Mapping[str, int | str]:
    options = {name.upper() if name.startswith("block") else name: value for name, value in asdict(product).items()}
    return {**options, "PRECISION": _precision(features.dtype)}
