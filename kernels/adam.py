"""Triton kernels of clipped Adam over any number of tensors: one pass for the gradients' norm, one for the update.

Tensors are named by their addresses, and shared out in blocks of equal size: PyTorch's multi-tensor kernels take 64 k
elements a program, 62 programs for a model of 4 M parameters on 132 multiprocessors. Of an address that is read from
memory the compiler knows nothing, nor of a mask's edge: unless it is told that addresses are multiples of 16 bytes, and
whole blocks go without a mask, it reads and writes 4 bytes at a time.
"""

import triton
import triton.language as tl

# Sums of squares that every program of the update adds up for itself, which spares small models a launch. All programs
# reading all sums is a square: a million items have 62,000 of each, 16 GB from the L2 by count, and with that their
# training step took 14.4 ms (314a38f) where it had been 10.9 with half as many blocks (f59195a; H200).
FEW = 8192


@triton.jit
def _at(addresses_ptr, tensor, like, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses_ptr + tensor).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _size(gradients_ptr, sizes_ptr, tensor):
    """0 for a tensor without a gradient, whose address is 0."""
    return tl.where(tl.load(gradients_ptr + tensor) == 0, 0, tl.load(sizes_ptr + tensor))


@triton.jit
def _below_one(x):
    """1 - e^x for x < 0: e^x near 1 has lost the digits that are wanted, so there by the series, to 1e-9."""
    series = 1.0 + x / 8
    series = 1.0 + x / 7 * series
    series = 1.0 + x / 6 * series
    series = 1.0 + x / 5 * series
    series = 1.0 + x / 4 * series
    series = 1.0 + x / 3 * series
    series = -x * (1.0 + x / 2 * series)
    return tl.where(x > -0.25, series, 1.0 - tl.exp(x))


@triton.jit
def _squares(gradients_ptr, sizes_ptr, blocks_ptr, parts_ptr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The sum of squares of each block."""
    block = tl.program_id(0)
    tensor, start = tl.load(blocks_ptr + 2 * block), tl.multiple_of(tl.load(blocks_ptr + 2 * block + 1), BLOCK)
    gradient = _at(gradients_ptr, tensor, parts_ptr, ALIGNED) + start
    left, at = _size(gradients_ptr, sizes_ptr, tensor) - start, tl.arange(0, BLOCK)
    g = tl.load(gradient + at) if left >= BLOCK else tl.load(gradient + at, at < left, 0.0)
    tl.store(parts_ptr + block, tl.sum(g * g, 0))


@triton.jit
def _total(parts_ptr, count, PARTS: tl.constexpr):
    total = tl.zeros([PARTS], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(parts_ptr + part, part < count, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _add_up(parts_ptr, count, PARTS: tl.constexpr):
    """The sum of all parts, in the place of the first; one program."""
    tl.store(parts_ptr, _total(parts_ptr, count, PARTS))


@triton.jit
def _changed(p, g, m, v, factor, rate, scale, beta1, beta2, eps, decay):
    """Parameters and moments after the step, of values before it."""
    g = g * factor + decay * p
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    return p - rate * m / (tl.sqrt(v / scale) + eps), m, v


@triton.jit
def _update(
    gradients_ptr, state_ptr, sizes_ptr, blocks_ptr, parts_ptr, step_ptr, rate_ptr, tensors, count,
    clip, beta1, beta2, log_beta1, log_beta2, eps, decay,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    # A norm that is no number has to reach the weights, as it does in PyTorch's clipping.
    factor = clip / (tl.sqrt(_total(parts_ptr, count, PARTS)) + 1e-6)
    factor = tl.where(factor > 1.0, 1.0, factor)
    step = tl.load(step_ptr)
    rate, scale = tl.load(rate_ptr) / _below_one(step * log_beta1), _below_one(step * log_beta2)
    tensor, start = tl.load(blocks_ptr + 2 * block), tl.multiple_of(tl.load(blocks_ptr + 2 * block + 1), BLOCK)
    left, at = _size(gradients_ptr, sizes_ptr, tensor) - start, start + tl.arange(0, BLOCK)
    gradient = _at(gradients_ptr, tensor, parts_ptr, ALIGNED) + at
    parameter = _at(state_ptr, tensor, parts_ptr, ALIGNED) + at
    first = _at(state_ptr, tensors + tensor, parts_ptr, ALIGNED) + at
    second = _at(state_ptr, 2 * tensors + tensor, parts_ptr, ALIGNED) + at
    if left >= BLOCK:
        p, m, v = _changed(
            tl.load(parameter), tl.load(gradient), tl.load(first), tl.load(second),
            factor, rate, scale, beta1, beta2, eps, decay,
        )  # fmt: skip
        tl.store(parameter, p)
        tl.store(first, m)
        tl.store(second, v)
    else:
        live = at - start < left
        p, m, v = _changed(
            tl.load(parameter, live, 0.0), tl.load(gradient, live, 0.0), tl.load(first, live, 0.0),
            tl.load(second, live, 0.0), factor, rate, scale, beta1, beta2, eps, decay,
        )  # fmt: skip
        tl.store(parameter, p, live)
        tl.store(first, m, live)
        tl.store(second, v, live)


def clipped_adam(
    gradients, state, sizes, blocks, parts, step, rate, *, clip, betas, log_betas, eps, decay, aligned, shapes
):  # fmt: skip
    """One step on T float32 tensors.

    gradients [T] and state [3, T] (parameters, first and second moments) hold addresses, int64; sizes [T]; blocks
    [P, 2]: tensor and first element of each; parts float32 [P] is overwritten; step and rate float32 [1]. All addresses
    are multiples of 16 with `aligned`.
    """
    grid, warps, count = (len(blocks),), shapes["num_warps"], len(blocks)
    _squares[grid](gradients, sizes, blocks, parts, BLOCK=shapes["BLOCK"], ALIGNED=aligned, num_warps=warps)
    if count > FEW:
        _add_up[(1,)](parts, count, PARTS=4096, num_warps=8)
        count = 1
    _update[grid](
        gradients, state, sizes, blocks, parts, step, rate, len(sizes), count, clip, *betas, *log_betas, eps,
        decay, BLOCK=shapes["BLOCK"], PARTS=shapes["PARTS"], ALIGNED=aligned, num_warps=warps,
    )  # fmt: skip
