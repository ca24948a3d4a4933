"""What is left beside the products: the losses and norms of a discriminator, and the gradients of its pairs."""

from __future__ import annotations

import triton
import triton.language as tl

from gsda_kernels.triton.products import moved


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x >= 0, also where 1 + x rounds (Kahan)."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))


@triton.jit
def terms_kernel(
    logit_part: tl.tensor,
    square_part: tl.tensor,
    b3: tl.tensor,
    weight: tl.tensor,
    label: tl.tensor,
    offsets: tl.tensor,
    sample: tl.tensor,
    residual: tl.tensor,
    norm: tl.tensor,
    loss: tl.tensor,
    gradient_norm: tl.tensor,
    num_samples: int,
    num_discriminators: int,
    num_logit_parts: int,
    num_square_parts: int,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_LOGIT_PARTS: tl.constexpr,
    BLOCK_SQUARE_PARTS: tl.constexpr,
) -> None:
    """Both results of one discriminator, in one pass over its pairs.

    With z = b3[k] + sum of the logit's parts, s = (1 - 2 d) z, r = sigmoid(s) = |sigmoid(z) - d| and n = ||J||:
        loss[k] = 1/N sum_p w softplus(s)       gradient_norm[k] = 1/N sum_p w r n
    All NaN, the gradients too, where there are more pairs than max_pairs.

    Grid (K,). logit_part, square_part: (max_pairs, number of parts) float32. b3: (K,). weight: (N, K) float32.
    label: (N,) float32. residual (r), norm (n): (max_pairs,) float32. loss, gradient_norm: (K,) float32.
    """
    k = tl.program_id(0)
    begin = tl.load(offsets + k)
    end = tl.load(offsets + k + 1)
    too_many = tl.load(offsets + num_discriminators + 1) > tl.load(offsets + num_discriminators)
    poison = tl.where(too_many, float("nan"), 1.0)
    bias = tl.load(b3 + k).to(tl.float32)
    logit_parts = tl.arange(0, BLOCK_LOGIT_PARTS)
    square_parts = tl.arange(0, BLOCK_SQUARE_PARTS)
    loss_sum = tl.zeros([BLOCK_PAIRS], tl.float32)
    norm_sum = tl.zeros([BLOCK_PAIRS], tl.float32)
    for first in range(begin, end, BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)
        mask = pairs < end
        row = pairs[:, None].to(tl.int64)
        parts = tl.load(
            logit_part + row * num_logit_parts + logit_parts[None, :],
            mask=mask[:, None] & (logit_parts < num_logit_parts)[None, :],
            other=0.0,
        )
        squares = tl.load(
            square_part + row * num_square_parts + square_parts[None, :],
            mask=mask[:, None] & (square_parts < num_square_parts)[None, :],
            other=0.0,
        )
        samples = tl.load(sample + pairs, mask=mask, other=0).to(tl.int64)
        w = tl.load(weight + samples * num_discriminators + k, mask=mask, other=0.0)
        sign = 1.0 - 2.0 * tl.load(label + samples, mask=mask, other=0.0)
        signed_logit = sign * (tl.sum(parts, 1) + bias)
        r = tl.sigmoid(signed_logit) * poison
        n = tl.sqrt(tl.sum(squares, 1))
        loss_sum += w * (tl.maximum(signed_logit, 0.0) + _log1p(tl.exp(-tl.abs(signed_logit))))
        norm_sum += w * r * n
        tl.store(residual + pairs, r, mask=mask)
        tl.store(norm + pairs, n, mask=mask)
    tl.store(loss + k, tl.sum(loss_sum, 0) / num_samples * poison)
    tl.store(gradient_norm + k, tl.sum(norm_sum, 0) / num_samples * poison)


@triton.jit
def _pair_gradients(
    w: tl.tensor,
    sign: tl.tensor,
    r: tl.tensor,
    n: tl.tensor,
    grad_loss: tl.tensor,
    grad_norm: tl.tensor,
    num_samples: int,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the loss's and the norm's part of dz, and dn / n (0 where n is 0)."""
    share = w / num_samples
    dz_loss = share * grad_loss * sign * r
    dz_norm = share * grad_norm * sign * r * (1.0 - r) * n
    direction = tl.where(n == 0, 0.0, share * grad_norm * r / tl.where(n == 0, 1.0, n))
    return dz_loss, dz_norm, direction


@triton.jit(do_not_specialize=["stride_grad_loss", "stride_grad_norm"])
def pair_gradient_kernel(
    features: tl.tensor,
    jacobian: tl.tensor,
    residual: tl.tensor,
    norm: tl.tensor,
    weight: tl.tensor,
    label: tl.tensor,
    grad_loss: tl.tensor,
    grad_norm: tl.tensor,
    offsets: tl.tensor,
    sample: tl.tensor,
    grad_logit: tl.tensor,
    direction: tl.tensor,
    first_operand: tl.tensor,
    grad_b3: tl.tensor,
    num_samples: int,
    num_discriminators: int,
    dim: int,
    stride_grad_loss: int,
    stride_grad_norm: int,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """dz and dn / n of every pair, the right operand dz f + (dn / n) J of dW1, and db3[k] = sum_p dz.

        dz = w/N (grad_loss r + grad_norm r (1 - r) n) (1 - 2 d)        dn = w/N grad_norm r

    Grid (D / BLOCK_COLUMNS, K); the programs of the first column store what has no columns. features: (N, D).
    jacobian, first_operand: (max_pairs, D), dtype of features. residual, norm, grad_logit (dz), direction (dn / n):
    (max_pairs,) float32. weight: (N, K), label: (N,), grad_loss, grad_norm: (K,) float32. grad_b3: (K,).
    """
    k = tl.program_id(1)
    begin = tl.load(offsets + k)
    end = tl.load(offsets + k + 1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < dim
    upstream_loss = tl.load(grad_loss + k * stride_grad_loss)
    upstream_norm = tl.load(grad_norm + k * stride_grad_norm)
    bias = tl.zeros([BLOCK_PAIRS], tl.float32)
    for first in range(begin, end, BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)
        pair_mask = pairs < end
        samples = tl.load(sample + pairs, mask=pair_mask, other=0).to(tl.int64)
        w = tl.load(weight + samples * num_discriminators + k, mask=pair_mask, other=0.0)
        sign = 1.0 - 2.0 * tl.load(label + samples, mask=pair_mask, other=0.0)
        r = tl.load(residual + pairs, mask=pair_mask, other=0.0)
        n = tl.load(norm + pairs, mask=pair_mask, other=0.0)
        dz_loss, dz_norm, dn = _pair_gradients(w, sign, r, n, upstream_loss, upstream_norm, num_samples)
        dz = dz_loss + dz_norm
        bias += dz
        mask = pair_mask[:, None] & column_mask[None, :]
        f = tl.load(features + samples[:, None] * dim + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        cell = pairs[:, None].to(tl.int64) * dim + columns[None, :]
        j = tl.load(jacobian + cell, mask=mask, other=0.0).to(tl.float32)
        tl.store(first_operand + cell, (dz[:, None] * f + dn[:, None] * j).to(features.dtype.element_ty), mask=mask)
        if tl.program_id(0) == 0:
            tl.store(grad_logit + pairs, dz, mask=pair_mask)
            tl.store(direction + pairs, dn, mask=pair_mask)
    if tl.program_id(0) == 0:
        tl.store(grad_b3 + k, tl.sum(bias, 0).to(grad_b3.dtype.element_ty))


@triton.jit(do_not_specialize=["stride_grad_loss", "stride_grad_norm"])
def feature_gradient_kernel(
    jacobian: tl.tensor,
    residual: tl.tensor,
    norm: tl.tensor,
    weight: tl.tensor,
    label: tl.tensor,
    grad_loss: tl.tensor,
    grad_norm: tl.tensor,
    scale: tl.tensor,
    position: tl.tensor,
    out: tl.tensor,
    num_samples: int,
    num_discriminators: int,
    dim: int,
    stride_grad_loss: int,
    stride_grad_norm: int,
    HAS_SCALE: tl.constexpr,
    BLOCK_DISCRIMINATORS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """df[i] = sum_k dz J over the pairs of sample i, in the order of the discriminators; no product of matrices.

    dz is as in pair_gradient_kernel, with the loss's part times `scale` if HAS_SCALE.

    Grid (N, D / BLOCK_COLUMNS), in this order since a GPU bounds all but the first by 65535. jacobian: (max_pairs, D).
    residual, norm: (max_pairs,), weight: (N, K), label: (N,), grad_loss, grad_norm: (K,), scale: 0-d, all float32.
    position: (N, K) int32. out: (N, D).
    """
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < dim
    sign = 1.0 - 2.0 * tl.load(label + i)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for first in range(0, num_discriminators, BLOCK_DISCRIMINATORS):
        k = first + tl.arange(0, BLOCK_DISCRIMINATORS)
        pairs = tl.load(position + i * num_discriminators + k, mask=k < num_discriminators, other=-1)
        mask = pairs >= 0
        w = tl.load(weight + i * num_discriminators + k, mask=mask, other=0.0)
        r = tl.load(residual + pairs, mask=mask, other=0.0)
        n = tl.load(norm + pairs, mask=mask, other=0.0)
        upstream_loss = tl.load(grad_loss + k * stride_grad_loss, mask=mask, other=0.0)
        upstream_norm = tl.load(grad_norm + k * stride_grad_norm, mask=mask, other=0.0)
        dz, dz_norm, _ = _pair_gradients(w, sign, r, n, upstream_loss, upstream_norm, num_samples)
        if HAS_SCALE:
            dz *= tl.load(scale)
        j = tl.load(
            jacobian + pairs[:, None].to(tl.int64) * dim + columns[None, :],
            mask=mask[:, None] & column_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum((dz + dz_norm)[:, None] * j, 0)
    tl.store(out + i * dim + columns, total.to(out.dtype.element_ty), mask=column_mask)


@triton.jit
def _beyond(x: tl.tensor, largest: float) -> tl.tensor:
    """Return 1 where an entry is larger than `largest` in size, or no number; else 0."""
    return tl.where(tl.abs(x.to(tl.float32)) <= largest, 0.0, 1.0)


@triton.jit
def bad_operands_kernel(
    u1: tl.tensor,
    first_operand: tl.tensor,
    second_operand: tl.tensor,
    grad_logit: tl.tensor,
    b2: tl.tensor,
    w3: tl.tensor,
    offsets: tl.tensor,
    bad: tl.tensor,
    largest: float,
    dim: int,
    hidden: int,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Store whether an operand of the gradients is so large, or no number, that a sum of products may not be finite.

    Asked before anything moves, of all operands at once. W2 is an operand too, of the gradient of w3 alone; it is not
    read here, but see `small_update_kernel`.

    Grid (max(H, D) / BLOCK_COLUMNS, K). u1, second_operand: (max_pairs, H), first_operand: (max_pairs, D), one dtype.
    grad_logit: (max_pairs,) float32. b2, w3: (K, H). bad: (K, max(H, D) / BLOCK_COLUMNS) float32.
    """
    k = tl.program_id(1)
    begin = tl.load(offsets + k)
    end = tl.load(offsets + k + 1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_unit = columns < hidden
    found = _beyond(tl.load(b2 + k * hidden + columns, mask=is_unit, other=0.0), largest)
    found += _beyond(tl.load(w3 + k * hidden + columns, mask=is_unit, other=0.0), largest)
    for first in range(begin, end, BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)
        rows = pairs[:, None].to(tl.int64)
        is_pair = (pairs < end)[:, None]
        unit = rows * hidden + columns[None, :]
        feature = rows * dim + columns[None, :]
        beyond = _beyond(tl.load(u1 + unit, mask=is_pair & is_unit[None, :], other=0.0), largest)
        beyond += _beyond(tl.load(second_operand + unit, mask=is_pair & is_unit[None, :], other=0.0), largest)
        beyond += _beyond(tl.load(first_operand + feature, mask=is_pair & (columns < dim)[None, :], other=0.0), largest)
        beyond += _beyond(tl.load(grad_logit + pairs, mask=pairs < end, other=0.0), largest)[:, None]
        found += tl.sum(beyond, 0)
    tl.store(bad + k * tl.num_programs(0) + tl.program_id(0), tl.where(tl.sum(found, 0) > 0, 1.0, 0.0))


@triton.jit
def small_update_kernel(
    grad_b1: tl.tensor,
    grad_b2: tl.tensor,
    w3_part: tl.tensor,
    grad_b3: tl.tensor,
    b1: tl.tensor,
    b2: tl.tensor,
    w3: tl.tensor,
    b3: tl.tensor,
    momentum_b1: tl.tensor,
    momentum_b2: tl.tensor,
    momentum_w3: tl.tensor,
    momentum_b3: tl.tensor,
    learning_rate: tl.tensor,
    found_inf: tl.tensor,
    bad: tl.tensor,
    decay: float,
    weight_decay: float,
    hidden: int,
    num_parts: int,
    NESTEROV: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
) -> None:
    """Move b1, b2, w3 and b3, where found_inf (0-d float32) is 0; the gradient of w3 is the sum of its parts.

    A gradient of w3 that is not finite although no operand was large leaves its w3 where it is, and `bad` is 1.

    Grid (H / BLOCK_UNITS, K). grad_b1, grad_b2: (K, H), grad_b3: (K,), w3_part: (K, H, parts), bad: (K, H /
    BLOCK_UNITS), all float32. The others are like the parameters.
    """
    k = tl.program_id(1)
    block = k * tl.num_programs(0) + tl.program_id(0)
    if tl.load(found_inf) != 0:
        tl.store(bad + block, 1.0)
        return
    units = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    mask = units < hidden
    cells = k * hidden + units
    rate = tl.load(learning_rate)
    _move_cells(grad_b1, b1, momentum_b1, cells, mask, rate, decay, weight_decay, NESTEROV)
    _move_cells(grad_b2, b2, momentum_b2, cells, mask, rate, decay, weight_decay, NESTEROV)
    parts = tl.arange(0, BLOCK_PARTS)
    gradient = tl.sum(
        tl.load(
            w3_part + cells[:, None].to(tl.int64) * num_parts + parts[None, :],
            mask=mask[:, None] & (parts < num_parts)[None, :],
            other=0.0,
        ),
        1,
    )
    overflowed = _beyond(gradient, 3.4028234663852886e38)
    tl.store(bad + block, tl.max(overflowed, 0))
    w3_mask = mask & (overflowed == 0)
    before = tl.load(w3 + cells, mask=w3_mask, other=0.0).to(tl.float32)
    velocity = tl.load(momentum_w3 + cells, mask=w3_mask, other=0.0).to(tl.float32)
    after, velocity = moved(gradient, before, velocity, rate, decay, weight_decay, NESTEROV)
    tl.store(w3 + cells, after.to(w3.dtype.element_ty), mask=w3_mask)
    tl.store(momentum_w3 + cells, velocity.to(momentum_w3.dtype.element_ty), mask=w3_mask)
    if tl.program_id(0) == 0:
        one = k + tl.arange(0, 1)
        _move_cells(grad_b3, b3, momentum_b3, one, one == k, rate, decay, weight_decay, NESTEROV)


@triton.jit
def _move_cells(
    gradient: tl.tensor,
    parameter: tl.tensor,
    momentum: tl.tensor,
    cells: tl.tensor,
    mask: tl.tensor,
    rate: tl.tensor,
    decay: float,
    weight_decay: float,
    NESTEROV: tl.constexpr,
) -> None:
    before = tl.load(parameter + cells, mask=mask, other=0.0).to(tl.float32)
    velocity = tl.load(momentum + cells, mask=mask, other=0.0).to(tl.float32)
    after, velocity = moved(
        tl.load(gradient + cells, mask=mask, other=0.0), before, velocity, rate, decay, weight_decay, NESTEROV
    )
    tl.store(parameter + cells, after.to(parameter.dtype.element_ty), mask=mask)
    tl.store(momentum + cells, velocity.to(momentum.dtype.element_ty), mask=mask)
