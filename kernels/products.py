"""The matrix product that the kernels share, and what float32 needs to be rounded once."""

import os

import triton
import triton.language as tl

# The interpreter has neither inline assembly, nor the GPU's approximations, nor a product of bfloat16 operands.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def halves(a, b, R: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """The even and the odd places of the sum in the product of a [R, K] and b [K, N]."""
    a_even, a_odd = tl.split(tl.reshape(a, [R, K // 2, 2]))
    b_even, b_odd = tl.split(tl.permute(tl.reshape(b, [K // 2, 2, N]), [0, 2, 1]))
    return a_even, a_odd, b_even, b_odd


@triton.jit
def dot(a, b):
    """Product in float32; of float32 operands as sums of 16 terms, added up: one long chain rounds worse.

    By an fma, as the compiler makes of a sum of products one chain, the first being what the second begins with.
    """
    if a.dtype == tl.float32:
        R: tl.constexpr = a.shape[0]
        K: tl.constexpr = a.shape[1]
        N: tl.constexpr = b.shape[1]
        if K >= 32:
            a0, a1, b0, b1 = halves(a, b, R, K, N)
            product = tl.fma(dot(a0, b0), tl.full([R, N], 1.0, tl.float32), dot(a1, b1))
        else:
            product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b)
    return product


@triton.jit
def dot_by(a, b, PRECISION: tl.constexpr):
    """Product with float32 sums: `dot` where PRECISION is "chains", else the matrix units' of that precision."""
    return dot(a, b) if PRECISION == "chains" else tl.dot(a, b, input_precision=PRECISION)


def float32_precision(terms):
    """The PRECISION of float32 products that sum so many terms.

    Three products of tensor cores are as exact as a float32 one here (tf32 alone is not), up to 128 terms: what a sum
    cannot hold they cut off, over 256 terms twice as much as PyTorch's float32 loses.
    """
    return "tf32x3" if terms <= 128 else "chains"


@triton.jit
def reciprocal_root(x, EXACT: tl.constexpr):
    """1 / sqrt(x); where EXACT rounded twice: the instruction errs by up to 2^-22.9, the same in all of a row."""
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(x)) if EXACT else tl.rsqrt(x)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    """1 / x, correctly rounded where EXACT."""
    return tl.math.div_rn(1.0, x) if EXACT else 1.0 / x


@triton.jit
def flushed_exp2(x):
    """2^x, and 0 below 2^-126: one instruction, where `tl.exp2` takes three more to be right there."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def flushed_reciprocal(x):
    """1 / x to 1 ulp, and 0 beyond 2^126: one instruction, where a division takes six to be right there."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def add_up(total, lost, term, EXACT: tl.constexpr):
    """Total + term, and what rounding lost so far, which the next term makes good (Kahan), where EXACT."""
    if EXACT:
        owed = term - lost
        grown = total + owed
        lost = (grown - total) - owed
        total = grown
    else:
        total += term
    return total, lost
