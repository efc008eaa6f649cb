"""The matrix product that the kernels share."""

import triton
import triton.language as tl


@triton.jit
def _halves(a, b, R: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """The even and the odd places of the sum in the product of a [R, K] and b [K, N]."""
    a_even, a_odd = tl.split(tl.reshape(a, [R, K // 2, 2]))
    b_even, b_odd = tl.split(tl.permute(tl.reshape(b, [K // 2, 2, N]), [0, 2, 1]))
    return a_even, a_odd, b_even, b_odd


@triton.jit
def dot(a, b):
    """Product in float32; of float32 operands as sums of 32 terms, added up: one long chain rounds twice as badly."""
    if a.dtype == tl.float32:
        R: tl.constexpr = a.shape[0]
        K: tl.constexpr = a.shape[1]
        N: tl.constexpr = b.shape[1]
        if K >= 64:
            a0, a1, b0, b1 = _halves(a, b, R, K, N)
            product = dot(a0, b0) + dot(a1, b1)
        else:
            product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product
