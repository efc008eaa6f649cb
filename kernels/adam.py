"""Triton kernels of clipped Adam over any number of tensors: one pass for the gradients' norm, one for the update.

Tensors are named by their addresses, and shared out in blocks of equal size: PyTorch's multi-tensor kernels take 64 k
elements a program, 62 programs for a model of 4 M parameters on 132 multiprocessors.
"""

import triton
import triton.language as tl


@triton.jit
def _at(addresses_ptr, tensor, like):
    return tl.load(addresses_ptr + tensor).to(like.dtype)


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
def _squares(gradients_ptr, sizes_ptr, blocks_ptr, parts_ptr, BLOCK: tl.constexpr):
    """The sum of squares of each block."""
    block = tl.program_id(0)
    tensor = tl.load(blocks_ptr + 2 * block)
    at = tl.load(blocks_ptr + 2 * block + 1) + tl.arange(0, BLOCK)
    gradient = _at(gradients_ptr, tensor, parts_ptr)
    live = at < _size(gradients_ptr, sizes_ptr, tensor)
    g = tl.load(gradient + at, live, 0.0)
    tl.store(parts_ptr + block, tl.sum(g * g, 0))


@triton.jit
def _update(
    gradients_ptr, state_ptr, sizes_ptr, blocks_ptr, parts_ptr, step_ptr, rate_ptr, tensors, count,
    clip, beta1, beta2, log_beta1, log_beta2, eps, decay, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    total = tl.zeros([PARTS], tl.float32)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(parts_ptr + part, part < count, 0.0)
    # A norm that is no number has to reach the weights, as it does in PyTorch's clipping.
    factor = clip / (tl.sqrt(tl.sum(total, 0)) + 1e-6)
    factor = tl.where(factor > 1.0, 1.0, factor)
    tensor = tl.load(blocks_ptr + 2 * block)
    at = tl.load(blocks_ptr + 2 * block + 1) + tl.arange(0, BLOCK)
    live = at < _size(gradients_ptr, sizes_ptr, tensor)
    gradient = _at(gradients_ptr, tensor, parts_ptr)
    parameter = _at(state_ptr, tensor, parts_ptr)
    first = _at(state_ptr, tensors + tensor, parts_ptr)
    second = _at(state_ptr, 2 * tensors + tensor, parts_ptr)
    p = tl.load(parameter + at, live, 0.0)
    g = tl.load(gradient + at, live, 0.0) * factor + decay * p
    m = tl.load(first + at, live, 0.0)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * tl.load(second + at, live, 0.0) + (1.0 - beta2) * g * g
    step = tl.load(step_ptr)
    p -= tl.load(rate_ptr) / _below_one(step * log_beta1) * m / (tl.sqrt(v / _below_one(step * log_beta2)) + eps)
    tl.store(parameter + at, p, live)
    tl.store(first + at, m, live)
    tl.store(second + at, v, live)


def clipped_adam(
    gradients, state, sizes, blocks, parts, step, rate, *, clip, betas, log_betas, eps, decay, shapes
):  # fmt: skip
    """One step on T float32 tensors.

    gradients [T] and state [3, T] (parameters, first and second moments) hold addresses, int64; sizes [T]; blocks
    [P, 2]: tensor and first element of each; parts float32 [P] is overwritten; step and rate float32 [1].
    """
    grid, warps = (len(blocks),), shapes["num_warps"]
    _squares[grid](gradients, sizes, blocks, parts, BLOCK=shapes["BLOCK"], num_warps=warps)
    _update[grid](
        gradients, state, sizes, blocks, parts, step, rate, len(sizes), len(blocks), clip, *betas, *log_betas, eps,
        decay, BLOCK=shapes["BLOCK"], PARTS=shapes["PARTS"], num_warps=warps,
    )  # fmt: skip
