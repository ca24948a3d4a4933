"""The grouped matrix products: every tile of pairs with its discriminator's weights, and the pointwise work at hand.

One main loop serves all products over pairs; kernels differ in what surrounds it. A tile covers pairs of one
discriminator only (routing.py), and tiles that no pairs need return at once. Row offsets are 64-bit, accumulators are
float32, and weights of another dtype are cast as they are loaded.

Grids over tiles of pairs have one dimension, columns first: a GPU bounds all others by 65535.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_times_matrix(
    rows: tl.tensor,
    row_mask: tl.tensor,
    matrix: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    stride_inner: tl.tensor,
    stride_column: tl.tensor,
    num_inner: int,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """sum_i rows[r][i] * matrix[i, c], (BLOCK_ROWS, BLOCK_COLUMNS) float32; rows: pointers to the rows."""
    inner = tl.arange(0, BLOCK_INNER)
    left = rows[:, None] + inner[None, :]
    # Inside one matrix 32 bits reach.
    right = matrix + (inner[:, None] * stride_inner + columns[None, :] * stride_column)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, num_inner, BLOCK_INNER):
        inside = first + inner < num_inner
        a = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(a, b.to(a.dtype), total, input_precision=PRECISION)
        left += BLOCK_INNER
        right += BLOCK_INNER * stride_inner
    return total


@triton.jit
def _rectified(x: tl.tensor) -> tl.tensor:
    """max(x, 0), but where `tl.maximum` makes a NaN 0 on a GPU, it stays one: a diverged network has to show."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def first_layer_kernel(
    features: tl.tensor,
    w1: tl.tensor,
    b1: tl.tensor,
    offsets: tl.tensor,
    sample: tl.tensor,
    tiles: tl.tensor,
    h1: tl.tensor,
    dim: int,
    hidden: int,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """h1[p] = relu(W1[k] f[sample[p]] + b1[k]), the samples' rows gathered as they are loaded.

    Grid (T * H / BLOCK_COLUMNS,). features: (N, D). w1: (K, H, D). b1: (K, H). h1: (max_pairs, H), dtype of features.
    offsets, sample, tiles: see Routing.
    """
    column_blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    tile = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    k = tl.load(tiles + 2 * tile)
    if k < 0:
        return
    pairs = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    row_mask = pairs < tl.load(offsets + k + 1)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < hidden
    samples = tl.load(sample + pairs, mask=row_mask, other=0).to(tl.int64)
    before = _rows_times_matrix(
        features + samples * dim, row_mask, w1 + k.to(tl.int64) * hidden * dim, columns, column_mask, 1, dim, dim,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION,
    )  # fmt: skip
    before += tl.load(b1 + k * hidden + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out = h1 + pairs[:, None].to(tl.int64) * hidden + columns[None, :]
    tl.store(out, _rectified(before).to(h1.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def second_layer_kernel(
    h1: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    w3: tl.tensor,
    offsets: tl.tensor,
    tiles: tl.tensor,
    u2: tl.tensor,
    active2: tl.tensor,
    logit_part: tl.tensor,
    hidden: int,
    STORE_ACTIVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """With a = W2[k] h1[p] + b2[k]: the mask m2 = (a > 0), u2 = m2 w3[k], and this tile's part of w3[k] . relu(a).

    h2 = relu(a) itself is needed nowhere else: the chain of the input gradient starts from u2, the gradients of layer
    2 from m2.

    Grid (T * H / BLOCK_COLUMNS,). h1, u2, active2 (m2 as 0 or 1, stored if STORE_ACTIVE): (max_pairs, H), one dtype.
    w2: (K, H, H). b2, w3: (K, H). logit_part: (max_pairs, H / BLOCK_COLUMNS) float32.
    """
    column_blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    tile = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    k = tl.load(tiles + 2 * tile)
    if k < 0:
        return
    pairs = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    row_mask = pairs < tl.load(offsets + k + 1)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < hidden
    before = _rows_times_matrix(
        h1 + pairs.to(tl.int64) * hidden, row_mask, w2 + k.to(tl.int64) * hidden * hidden, columns, column_mask,
        1, hidden, hidden, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION,
    )  # fmt: skip
    before += tl.load(b2 + k * hidden + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    last = tl.load(w3 + k * hidden + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    cell = pairs[:, None].to(tl.int64) * hidden + columns[None, :]
    tl.store(u2 + cell, tl.where(before > 0, last, 0.0).to(u2.dtype.element_ty), mask=mask)
    if STORE_ACTIVE:
        tl.store(active2 + cell, tl.where(before > 0, 1.0, 0.0).to(active2.dtype.element_ty), mask=mask)
    part = logit_part + pairs.to(tl.int64) * column_blocks + column_block
    tl.store(part, tl.sum(_rectified(before) * last, 1), mask=row_mask)


@triton.jit
def hidden_gradient_kernel(
    u2: tl.tensor,
    w2: tl.tensor,
    h1: tl.tensor,
    offsets: tl.tensor,
    tiles: tl.tensor,
    u1: tl.tensor,
    hidden: int,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """u1[p] = (h1[p] > 0) * W2[k]^T u2[p], the logit's gradient to the first layer's output before its ReLU.

    Grid (T * H / BLOCK_COLUMNS,). u2, h1, u1: (max_pairs, H), one dtype. w2: (K, H, H).
    """
    column_blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    tile = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    k = tl.load(tiles + 2 * tile)
    if k < 0:
        return
    pairs = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    row_mask = pairs < tl.load(offsets + k + 1)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < hidden
    value = _rows_times_matrix(
        u2 + pairs.to(tl.int64) * hidden, row_mask, w2 + k.to(tl.int64) * hidden * hidden, columns, column_mask,
        hidden, 1, hidden, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION,
    )  # fmt: skip
    mask = row_mask[:, None] & column_mask[None, :]
    cell = pairs[:, None].to(tl.int64) * hidden + columns[None, :]
    on = tl.load(h1 + cell, mask=mask, other=0.0) > 0
    tl.store(u1 + cell, tl.where(on, value, 0.0).to(u1.dtype.element_ty), mask=mask)


@triton.jit
def jacobian_kernel(
    u1: tl.tensor,
    w1: tl.tensor,
    offsets: tl.tensor,
    tiles: tl.tensor,
    jacobian: tl.tensor,
    square_part: tl.tensor,
    dim: int,
    hidden: int,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """J[p] = W1[k]^T u1[p] = dz/df, and this tile's part of ||J[p]||^2, taken before J is rounded.

    Grid (T * D / BLOCK_COLUMNS,). u1: (max_pairs, H), jacobian: (max_pairs, D), one dtype. w1: (K, H, D).
    square_part: (max_pairs, D / BLOCK_COLUMNS) float32.
    """
    column_blocks = tl.cdiv(dim, BLOCK_COLUMNS)
    tile = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    k = tl.load(tiles + 2 * tile)
    if k < 0:
        return
    pairs = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    row_mask = pairs < tl.load(offsets + k + 1)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < dim
    value = _rows_times_matrix(
        u1 + pairs.to(tl.int64) * hidden, row_mask, w1 + k.to(tl.int64) * hidden * dim, columns, column_mask,
        dim, 1, hidden, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION,
    )  # fmt: skip
    cell = pairs[:, None].to(tl.int64) * dim + columns[None, :]
    tl.store(jacobian + cell, value.to(jacobian.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
    part = square_part + pairs.to(tl.int64) * column_blocks + column_block
    tl.store(part, tl.sum(value * value, 1), mask=row_mask)


@triton.jit
def hidden_backward_kernel(
    jacobian: tl.tensor,
    w1: tl.tensor,
    h1: tl.tensor,
    grad_logit: tl.tensor,
    direction: tl.tensor,
    offsets: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    dim: int,
    hidden: int,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """out[p] = dz h1[p] + g1 with g1 = (h1[p] > 0) * W1[k] q and q = direction[p] * J[p]: the right operand of dW2.

    The scale of a row commutes with the product, so that J is read as it lies.

    Grid (T * H / BLOCK_COLUMNS,). jacobian: (max_pairs, D); h1, out: (max_pairs, H), one dtype. w1: (K, H, D).
    grad_logit (dz), direction: (max_pairs,) float32.
    """
    column_blocks = tl.cdiv(hidden, BLOCK_COLUMNS)
    tile = tl.program_id(0) // column_blocks
    column_block = tl.program_id(0) % column_blocks
    k = tl.load(tiles + 2 * tile)
    if k < 0:
        return
    pairs = tl.load(tiles + 2 * tile + 1) + tl.arange(0, BLOCK_ROWS)
    row_mask = pairs < tl.load(offsets + k + 1)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = columns < hidden
    value = _rows_times_matrix(
        jacobian + pairs.to(tl.int64) * dim, row_mask, w1 + k.to(tl.int64) * hidden * dim, columns, column_mask,
        1, dim, dim, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION,
    )  # fmt: skip
    value *= tl.load(direction + pairs, mask=row_mask, other=0.0)[:, None]
    dz = tl.load(grad_logit + pairs, mask=row_mask, other=0.0)[:, None]
    mask = row_mask[:, None] & column_mask[None, :]
    cell = pairs[:, None].to(tl.int64) * hidden + columns[None, :]
    first = tl.load(h1 + cell, mask=mask, other=0.0).to(tl.float32)
    # Not dz h1 inside the mask, which would take a NaN in h1 for a unit that is off.
    tl.store(out + cell, (tl.where(first > 0, value, 0.0) + dz * first).to(out.dtype.element_ty), mask=mask)


@triton.jit
def moved(
    gradient: tl.tensor,
    parameter: tl.tensor,
    momentum: tl.tensor,
    learning_rate: tl.tensor,
    decay: float,
    weight_decay: float,
    NESTEROV: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Parameter and momentum after a step of gsda_kernels.sgd.Sgd, all float32."""
    gradient += weight_decay * parameter
    momentum = decay * momentum + gradient
    step = momentum
    if NESTEROV:
        step = gradient + decay * momentum
    return parameter - learning_rate * step, momentum


@triton.jit
def weight_gradient_kernel(
    left: tl.tensor,
    right: tl.tensor,
    grad_logit: tl.tensor,
    offsets: tl.tensor,
    weight: tl.tensor,
    b2: tl.tensor,
    w3: tl.tensor,
    target: tl.tensor,
    grad_bias: tl.tensor,
    w3_part: tl.tensor,
    momentum: tl.tensor,
    half_weight: tl.tensor,
    learning_rate: tl.tensor,
    found_inf: tl.tensor,
    decay: float,
    weight_decay: float,
    hidden: int,
    num_columns: int,
    SECOND_LAYER: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    WANT_W3: tl.constexpr,
    UPDATE: tl.constexpr,
    NESTEROV: tl.constexpr,
    STORE_HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Compute the gradients of a layer of a discriminator: sums over its pairs p, each stored by one program.

    With A = sum_p left[p]^T right[p] and a = sum_p left[p] dz[p]:
        layer 1 (left u1, right dz f + q):         dW1 = A          db1 = a
        layer 2 (left m2, right dz h1 + g1):       dW2 = w3 A       db2 = w3 a       dw3 = rowsum(W2 * A) + b2 a
    The last one is sum_p m2 (W2 g1) + dz h2 with the product with W2 taken after the sum over pairs, where it costs a
    row sum instead of a product for every pair: a fifth less work in a step of everything.

    Grid (C / BLOCK_COLUMNS, H / BLOCK_ROWS, K); the programs of the first column store what has no columns.
    left: (max_pairs, H), right: (max_pairs, C = num_columns), one dtype. grad_logit (dz): (max_pairs,) float32.
    weight: (K, H, C), the layer's own, read if WANT_W3 or UPDATE. b2, w3: (K, H), read if SECOND_LAYER. target: (K, H,
    C), where dW is stored if WANT_WEIGHT.
    grad_bias: (K, H). w3_part: (K, H, C / BLOCK_COLUMNS) float32, stored if WANT_W3, to be summed.

    If UPDATE, dW is not stored: target is the weight itself, and it and its momentum (K, H, C) move, where found_inf
    (0-d float32) is 0. learning_rate: 0-d float32; see `moved`. A cell of the weight is read before it moves, by the
    one program that reads it. half_weight: (K, H, C), the weight in the dtype of left, stored if STORE_HALF.
    """
    if UPDATE:  # noqa: SIM102  the compiler decides the outer one, the device the inner
        if tl.load(found_inf) != 0:
            return
    k = tl.program_id(2)
    begin = tl.load(offsets + k)
    end = tl.load(offsets + k + 1)
    units = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    unit_mask = units < hidden
    inner = tl.arange(0, BLOCK_INNER)
    row = k * hidden + units
    scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if SECOND_LAYER:
        scale = tl.load(w3 + row, mask=unit_mask, other=0.0).to(tl.float32)
    first_part = tl.zeros([BLOCK_ROWS], tl.float32)
    if tl.program_id(0) == 0:
        bias = tl.zeros([BLOCK_ROWS], tl.float32)
        for first in range(begin, end, BLOCK_INNER):
            pairs = (first + inner)[:, None].to(tl.int64)
            a = tl.load(left + pairs * hidden + units[None, :], mask=(pairs < end) & unit_mask[None, :], other=0.0)
            dz = tl.load(grad_logit + pairs, mask=pairs < end, other=0.0)
            bias += tl.sum(a.to(tl.float32) * dz, 0)
        tl.store(grad_bias + row, (scale * bias).to(grad_bias.dtype.element_ty), mask=unit_mask)
        if WANT_W3:
            first_part = bias * tl.load(b2 + row, mask=unit_mask, other=0.0).to(tl.float32)
    if WANT_WEIGHT or WANT_W3:
        columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_mask = columns < num_columns
        cell = row[:, None].to(tl.int64) * num_columns + columns[None, :]
        mask = unit_mask[:, None] & column_mask[None, :]
        if WANT_W3 or UPDATE:
            # Before the product: on its way while that is made.
            before = tl.load(weight + cell, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for first in range(begin, end, BLOCK_INNER):
            pairs = (first + inner)[:, None].to(tl.int64)
            a = tl.load(left + pairs * hidden + units[None, :], mask=(pairs < end) & unit_mask[None, :], other=0.0)
            b = tl.load(
                right + pairs * num_columns + columns[None, :], mask=(pairs < end) & column_mask[None, :], other=0.0
            )
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        if WANT_W3:
            last = tl.sum(total * before, 1)
            tl.store(w3_part + row * tl.num_programs(0) + tl.program_id(0), last + first_part, mask=unit_mask)
        if UPDATE:
            velocity = tl.load(momentum + cell, mask=mask, other=0.0).to(tl.float32)
            after, velocity = moved(
                total * scale[:, None], before, velocity, tl.load(learning_rate), decay, weight_decay, NESTEROV
            )
            tl.store(momentum + cell, velocity.to(momentum.dtype.element_ty), mask=mask)
            tl.store(target + cell, after.to(target.dtype.element_ty), mask=mask)
            if STORE_HALF:
                tl.store(half_weight + cell, after.to(half_weight.dtype.element_ty), mask=mask)
        elif WANT_WEIGHT:
            tl.store(target + cell, (total * scale[:, None]).to(target.dtype.element_ty), mask=mask)
