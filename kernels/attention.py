"""Softmax attention over histories and its tangent: one program computes one head of one history.

A history of up to 64 items is one tile of 16 or 64 rows: queries, keys, scores and gradients stay on the chip, the
probabilities are computed again in the backward pass, and what is read or written crosses device memory once. Longer
histories loop over tiles of 64 keys and take the row statistics in a pass of their own.

The tile depends on the history's own length alone, and no sum crosses programs: a history's result has the same bits in
any batch. The rows of `q` are all rows of the histories, or (LAST) one row a history, its newest.

The formulas are those of `fave_fast.ops.attention`.
"""

import triton
import triton.language as tl
from fave_fast.kernels.products import dot as _dot
from fave_fast.kernels.products import reciprocal

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_REST = tl.constexpr(1.925962990625e-08)  # of it in float32


@triton.jit
def _add_dot(total, a, b):
    if a.dtype == tl.float32:
        total += _dot(a, b)
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _history(bounds_ptr, user, padded_length, PADDED: tl.constexpr):
    """First row and number of rows of a history, from its length (padded on the left) or from offsets."""
    if PADDED:
        n = tl.load(bounds_ptr + user).to(tl.int32)
        start = user.to(tl.int64) * padded_length + (padded_length - n)
    else:
        start = tl.load(bounds_ptr + user).to(tl.int64)
        n = (tl.load(bounds_ptr + user + 1).to(tl.int64) - start).to(tl.int32)
    return start, n


@triton.jit
def _load(ptr, rows, keep, stride, channel, CHANNELS: tl.constexpr):
    mask = keep[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(ptr + rows[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, value, rows, keep, stride, channel, CHANNELS: tl.constexpr):
    mask = keep[:, None] & (channel < CHANNELS)[None, :]
    tl.store(ptr + rows[:, None] * stride + channel[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _zero_rows(ptr, count, stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    for row in range(0, count, 16):
        at = row + tl.arange(0, 16)
        _store(ptr, tl.zeros([16, BLOCK], tl.float32), at, at < count, stride, channel, CHANNELS)


@triton.jit
def _angles(cos_ptr, sin_ptr, age, keep, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROTARY: tl.constexpr):
    """Cosines and sines [rows, HALF_BLOCK] of the rows' ages."""
    if ROTARY:
        channel = tl.arange(0, HALF_BLOCK)
        cos = _load(cos_ptr, age, keep, HALF, channel, HALF)
        sin = _load(sin_ptr, age, keep, HALF, channel, HALF)
    else:
        cos = tl.full([1, 1], 1.0, tl.float32)
        sin = tl.full([1, 1], 0.0, tl.float32)
    return cos, sin


@triton.jit
def _load_turned(ptr, rows, keep, stride, cos, sin, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROTARY: tl.constexpr):
    """Both halves [rows, HALF_BLOCK] of one head's channels, rotated."""
    channel = tl.arange(0, HALF_BLOCK)
    a = _load(ptr, rows, keep, stride, channel, HALF)
    b = _load(ptr + HALF, rows, keep, stride, channel, HALF)
    if ROTARY:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = (wide_a * cos - wide_b * sin).to(ptr.dtype.element_ty)
        b = (wide_a * sin + wide_b * cos).to(ptr.dtype.element_ty)
    return a, b


@triton.jit
def _store_turned_back(
    ptr, a, b, rows, keep, stride, cos_ptr, sin_ptr, count,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Write the gradient with respect to a head's channels, given that with respect to the rotated ones."""
    channel = tl.arange(0, HALF_BLOCK)
    if ROTARY:
        # Read again: kept since the rows were loaded, they would cost 16 to 32 registers.
        cos, sin = _angles(cos_ptr, sin_ptr, count - 1 - rows, keep, HALF, HALF_BLOCK, ROTARY)
        turned = a * cos + b * sin
        b = b * cos - a * sin
        a = turned
    _store(ptr, a, rows, keep, stride, channel, HALF)
    _store(ptr + HALF, b, rows, keep, stride, channel, HALF)


@triton.jit
def _scores(qa, qb, dqa, dqb, ka, kb, dka, dkb, allowed, scale, DUAL: tl.constexpr):
    """Scores for `_power`, and their tangents."""
    s = _dot(qa, tl.trans(ka)) + _dot(qb, tl.trans(kb))
    t = s
    if DUAL:
        t = _dot(dqa, tl.trans(ka)) + _dot(dqb, tl.trans(kb)) + _dot(qa, tl.trans(dka)) + _dot(qb, tl.trans(dkb))
        t = t * scale
    if qa.dtype != tl.float32:
        s = s * (scale * LOG2_E)
    return tl.where(allowed, s, float("-inf")), t


@triton.jit
def _power(s, top, scale, v):
    """Exp of the scores' distance to `top`: by exp2, of scores in units of log2(e) unless `v` is of float32.

    Then the distance is taken first: near the top, where the weight is, it is small, and so is what rounding adds. And
    what the exponent's rounding loses, of the product and of its factor, is made good: it may be 2^-21 and more.
    """
    if v.dtype == tl.float32:
        below = s - top
        below = tl.where(below < -1e30, -1e30, below)  # finite: its parts are added
        factor = scale * LOG2_E
        lost_factor = tl.fma(scale, tl.full([], LOG2_E, tl.float32), -factor) + scale * LOG2_E_REST
        exponent = below * factor
        lost = tl.fma(below, tl.zeros_like(below) + factor, -exponent) + below * lost_factor
        power = tl.exp2(exponent)
        power = tl.fma(power, lost * 0.6931471805599453, power)
    else:
        power = tl.exp2(s - top)
    return power


@triton.jit
def _allowed(query, key, n, CAUSAL: tl.constexpr):
    before = key[None, :] <= query[:, None] if CAUSAL else query[:, None] >= 0
    return (key < n)[None, :] & before


@triton.jit
def _gradients(p, t, x, w, mu, nu, c, DUAL: tl.constexpr):
    """Gradients with respect to the scores and to their tangents, before the factor `scale`, and dP."""
    if DUAL:
        r = p * (t - mu)
        gt = p * (w - nu)
        gs = p * (x + w * (t - mu) - nu * t - c)
    else:
        r = p
        gs = p * (x - c)
        gt = gs
    return gs, gt, r


@triton.jit
def _load_keys(
    k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, key, n,
    STRIDE: tl.constexpr, C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = C // 2
    present, channel = key < n, tl.arange(0, C_BLOCK)
    cos, sin = _angles(cos_ptr, sin_ptr, n - 1 - key, present, HALF, HALF_BLOCK, ROTARY)
    ka, kb = _load_turned(k_ptr, key, present, STRIDE, cos, sin, HALF, HALF_BLOCK, ROTARY)
    v = _load(v_ptr, key, present, STRIDE, channel, C)
    dka, dkb, dv = ka, kb, v
    if DUAL:
        dka, dkb = _load_turned(dk_ptr, key, present, STRIDE, cos, sin, HALF, HALF_BLOCK, ROTARY)
        dv = _load(dv_ptr, key, present, STRIDE, channel, C)
    return ka, kb, dka, dkb, v, dv


@triton.jit
def _load_queries(
    q_ptr, dq_ptr, cos_ptr, sin_ptr, local, count,
    STRIDE: tl.constexpr, C: tl.constexpr, HALF_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, DUAL: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = C // 2
    TURN: tl.constexpr = ROTARY and not LAST
    asked = local < count
    cos, sin = _angles(cos_ptr, sin_ptr, count - 1 - local, asked, HALF, HALF_BLOCK, TURN)
    qa, qb = _load_turned(q_ptr, local, asked, STRIDE, cos, sin, HALF, HALF_BLOCK, TURN)
    dqa, dqb = qa, qb
    if DUAL:
        dqa, dqb = _load_turned(dq_ptr, local, asked, STRIDE, cos, sin, HALF, HALF_BLOCK, TURN)
    return qa, qb, dqa, dqb


@triton.jit
def _forward_tile(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, cos_ptr, sin_ptr, n, count, scale,
    STRIDE_Q: tl.constexpr, STRIDE_KV: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr, LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A history whose queries and keys are one tile each."""
    key, local, channel = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, C_BLOCK)
    asked = local < count
    ka, kb, dka, dkb, v, dv = _load_keys(
        k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, key, n, STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, DUAL
    )
    qa, qb, dqa, dqb = _load_queries(
        q_ptr, dq_ptr, cos_ptr, sin_ptr, local, count, STRIDE_Q, C, HALF_BLOCK, ROTARY, DUAL, LAST
    )
    s, t = _scores(qa, qb, dqa, dqb, ka, kb, dka, dkb, _allowed(n - count + local, key, n, CAUSAL), scale, DUAL)
    p = _power(s, tl.max(s, 1)[:, None], scale, v)
    p = p * reciprocal(tl.sum(p, 1), v.dtype == tl.float32)[:, None]
    narrow = p.to(v.dtype)
    _store(o_ptr, _dot(narrow, v), local, asked, D, channel, C)
    if DUAL:
        r = p * (t - tl.sum(p * t, 1)[:, None])
        _store(do_ptr, _dot(r.to(v.dtype), v) + _dot(narrow, dv), local, asked, D, channel, C)


@triton.jit
def _statistics(
    qa, qb, dqa, dqb, g, e, k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, n, query, last_key, scale,
    STRIDE_KV: tl.constexpr, C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr, BACKWARD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For a tile of queries over all keys: the highest score, 1 / the softmax's sum, and the formulas' mu, nu and c.

    The first two apart: their rounded sum of logarithms would shift all of a row's probabilities together.
    """
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    mu = tl.zeros([BM], tl.float32)
    nu = tl.zeros([BM], tl.float32)
    c = tl.zeros([BM], tl.float32)
    for first in range(0, last_key, BN):
        key = first + tl.arange(0, BN)
        ka, kb, dka, dkb, v, dv = _load_keys(
            k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, key, n,
            STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, DUAL,
        )  # fmt: skip
        s, t = _scores(qa, qb, dqa, dqb, ka, kb, dka, dkb, _allowed(query, key, n, CAUSAL), scale, DUAL)
        raised = tl.maximum(m, tl.max(s, 1))
        shrink = _power(m, raised, scale, v)
        p = _power(s, raised[:, None], scale, v)
        total = total * shrink + tl.sum(p, 1)
        if DUAL:
            mu = mu * shrink + tl.sum(p * t, 1)
        if BACKWARD:
            x = _dot(g, tl.trans(v))
            if DUAL:
                w = _dot(e, tl.trans(v))
                nu = nu * shrink + tl.sum(p * w, 1)
                x = x + _dot(e, tl.trans(dv)) + w * t
            c = c * shrink + tl.sum(p * x, 1)
        m = raised
    mu, nu = mu / total, nu / total
    return m, reciprocal(total, v_ptr.dtype.element_ty == tl.float32), mu, nu, c / total - 2 * mu * nu


@triton.jit
def _forward_long(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, cos_ptr, sin_ptr,
    n, count, scale,
    STRIDE_Q: tl.constexpr, STRIDE_KV: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr, LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, C_BLOCK)
    for first_query in range(0, count, BM):
        local = first_query + tl.arange(0, BM)
        query = n - count + local
        last_key = n
        if CAUSAL:
            last_key = tl.minimum(n, n - count + first_query + BM)
        qa, qb, dqa, dqb = _load_queries(
            q_ptr, dq_ptr, cos_ptr, sin_ptr, local, count, STRIDE_Q, C, HALF_BLOCK, ROTARY, DUAL, LAST
        )
        top, share, mu, _nu, _c = _statistics(
            qa, qb, dqa, dqb, qa, qa, k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, n, query, last_key,
            scale, STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, False, BM, BN,
        )  # fmt: skip
        o = tl.zeros([BM, C_BLOCK], tl.float32)
        do = tl.zeros([BM, C_BLOCK], tl.float32)
        for first in range(0, last_key, BN):
            key = first + tl.arange(0, BN)
            ka, kb, dka, dkb, v, dv = _load_keys(
                k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, key, n,
                STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, DUAL,
            )  # fmt: skip
            s, t = _scores(qa, qb, dqa, dqb, ka, kb, dka, dkb, _allowed(query, key, n, CAUSAL), scale, DUAL)
            p = _power(s, top[:, None], scale, v) * share[:, None]
            narrow = p.to(v.dtype)
            o += _dot(narrow, v)
            if DUAL:
                do += _dot((p * (t - mu[:, None])).to(v.dtype), v) + _dot(narrow, dv)
        _store(o_ptr, o, local, local < count, D, channel, C)
        if DUAL:
            _store(do_ptr, do, local, local < count, D, channel, C)


@triton.jit(do_not_specialize=["padded_length"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, bounds_ptr, cos_ptr, sin_ptr, padded_length, scale,
    STRIDE_Q: tl.constexpr, STRIDE_KV: tl.constexpr, HEADS: tl.constexpr,
    C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr, PADDED: tl.constexpr, LAST: tl.constexpr,
    LONGEST: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = HEADS * C
    user, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    start, n = _history(bounds_ptr, user, padded_length, PADDED)
    count = n
    to_q, to_kv, to_o = start * STRIDE_Q + head * C, start * STRIDE_KV + head * C, start * D + head * C
    if LAST:
        count = tl.minimum(n, 1)
        to_q = user.to(tl.int64) * STRIDE_Q + head * C
        to_o = user.to(tl.int64) * D + head * C
    q_ptr += to_q
    k_ptr += to_kv
    v_ptr += to_kv
    dq_ptr += to_q
    dk_ptr += to_kv
    dv_ptr += to_kv
    o_ptr += to_o
    do_ptr += to_o
    if LAST:
        _zero_rows(o_ptr, 1 - count, D, C, C_BLOCK)
        if DUAL:
            _zero_rows(do_ptr, 1 - count, D, C, C_BLOCK)
    elif PADDED:
        before = padded_length - n
        _zero_rows(o_ptr - before * D, before, D, C, C_BLOCK)
        if DUAL:
            _zero_rows(do_ptr - before * D, before, D, C, C_BLOCK)
    if LONGEST > 64 and n > 64:
        _forward_long(
            q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, cos_ptr, sin_ptr, n, count, scale,
            STRIDE_Q, STRIDE_KV, D, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, LAST, 16 if LAST else 64, 64,
        )  # fmt: skip
    elif LONGEST > 16 and n > 16:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, cos_ptr, sin_ptr, n, count, scale,
            STRIDE_Q, STRIDE_KV, D, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, LAST, 16 if LAST else 64, 64,
        )  # fmt: skip
    elif n > 0:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, o_ptr, do_ptr, cos_ptr, sin_ptr, n, count, scale,
            STRIDE_Q, STRIDE_KV, D, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, LAST, 16, 16,
        )  # fmt: skip


@triton.jit
def _backward_tile(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, g_ptr, e_ptr,
    gq_ptr, gk_ptr, gv_ptr, gdq_ptr, gdk_ptr, gdv_ptr, cos_ptr, sin_ptr, n, count, scale,
    STRIDE_Q: tl.constexpr, STRIDE_KV: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr, LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A history whose queries and keys are one tile each; each gradient is written as soon as it is there."""
    HALF: tl.constexpr = C // 2
    TURN_Q: tl.constexpr = ROTARY and not LAST
    key, local, channel = tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, C_BLOCK)
    present, asked = key < n, local < count
    ka, kb, dka, dkb, v, dv = _load_keys(
        k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, key, n, STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, DUAL
    )
    qa, qb, dqa, dqb = _load_queries(
        q_ptr, dq_ptr, cos_ptr, sin_ptr, local, count, STRIDE_Q, C, HALF_BLOCK, ROTARY, DUAL, LAST
    )
    g = _load(g_ptr, local, asked, D, channel, C)
    e = g
    if DUAL:
        e = _load(e_ptr, local, asked, D, channel, C)
    s, t = _scores(qa, qb, dqa, dqb, ka, kb, dka, dkb, _allowed(n - count + local, key, n, CAUSAL), scale, DUAL)
    p = _power(s, tl.max(s, 1)[:, None], scale, v)
    p = p * reciprocal(tl.sum(p, 1), v.dtype == tl.float32)[:, None]
    narrow = tl.trans(p.to(v.dtype))
    gv = _dot(narrow, g)
    if DUAL:
        _store(gdv_ptr, _dot(narrow, e), key, present, STRIDE_KV, channel, C)
        w = _dot(e, tl.trans(v))
        mu, nu = tl.sum(p * t, 1)[:, None], tl.sum(p * w, 1)[:, None]
        gt = (p * (w - nu) * scale).to(v.dtype)
        gv = _add_dot(gv, tl.trans((p * (t - mu)).to(v.dtype)), e)
        # X last: three float32 tiles live at a time instead of four.
        x = _add_dot(_add_dot(w * (t - mu) - nu * t, e, tl.trans(dv)), g, tl.trans(v))
    else:
        x = _dot(g, tl.trans(v))
    _store(gv_ptr, gv, key, present, STRIDE_KV, channel, C)
    gs = (p * (x - tl.sum(p * x, 1)[:, None]) * scale).to(v.dtype)
    ga, gb = _dot(gs, ka), _dot(gs, kb)
    if DUAL:
        ga += _dot(gt, dka)
        gb += _dot(gt, dkb)
    _store_turned_back(gq_ptr, ga, gb, local, asked, STRIDE_Q, cos_ptr, sin_ptr, count, HALF, HALF_BLOCK, TURN_Q)
    gs = tl.trans(gs)
    ga, gb = _dot(gs, qa), _dot(gs, qb)
    if DUAL:
        back = tl.trans(gt)
        ga += _dot(back, dqa)
        gb += _dot(back, dqb)
    _store_turned_back(gk_ptr, ga, gb, key, present, STRIDE_KV, cos_ptr, sin_ptr, n, HALF, HALF_BLOCK, ROTARY)
    if DUAL:
        ga, gb = _dot(gt, ka), _dot(gt, kb)
        _store_turned_back(gdq_ptr, ga, gb, local, asked, STRIDE_Q, cos_ptr, sin_ptr, count, HALF, HALF_BLOCK, TURN_Q)
        ga, gb = _dot(back, qa), _dot(back, qb)
        _store_turned_back(gdk_ptr, ga, gb, key, present, STRIDE_KV, cos_ptr, sin_ptr, n, HALF, HALF_BLOCK, ROTARY)


@triton.jit
def _backward_long(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, g_ptr, e_ptr,
    gq_ptr, gk_ptr, gv_ptr, gdq_ptr, gdk_ptr, gdv_ptr, cos_ptr, sin_ptr, stats_ptr,
    n, count, scale,
    STRIDE_Q: tl.constexpr, STRIDE_KV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr, LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Statistics of all queries into `stats`, with the queries' gradients; then the keys' gradients."""
    HALF: tl.constexpr = C // 2
    TURN_Q: tl.constexpr = ROTARY and not LAST
    channel = tl.arange(0, C_BLOCK)
    for first_query in range(0, count, BM):
        local = first_query + tl.arange(0, BM)
        query, asked = n - count + local, local < count
        last_key = n
        if CAUSAL:
            last_key = tl.minimum(n, n - count + first_query + BM)
        qa, qb, dqa, dqb = _load_queries(
            q_ptr, dq_ptr, cos_ptr, sin_ptr, local, count, STRIDE_Q, C, HALF_BLOCK, ROTARY, DUAL, LAST
        )
        g = _load(g_ptr, local, asked, D, channel, C)
        e = g
        if DUAL:
            e = _load(e_ptr, local, asked, D, channel, C)
        top, share, mu, nu, c = _statistics(
            qa, qb, dqa, dqb, g, e, k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, n, query, last_key,
            scale, STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, True, BM, BN,
        )  # fmt: skip
        at = stats_ptr + local * (HEADS * 5)
        tl.store(at, top, mask=asked)
        tl.store(at + 1, share, mask=asked)
        tl.store(at + 2, mu, mask=asked)
        tl.store(at + 3, nu, mask=asked)
        tl.store(at + 4, c, mask=asked)
        ga = tl.zeros([BM, HALF_BLOCK], tl.float32)
        gb = tl.zeros([BM, HALF_BLOCK], tl.float32)
        gda = tl.zeros([BM, HALF_BLOCK], tl.float32)
        gdb = tl.zeros([BM, HALF_BLOCK], tl.float32)
        for first in range(0, last_key, BN):
            key = first + tl.arange(0, BN)
            ka, kb, dka, dkb, v, dv = _load_keys(
                k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, key, n,
                STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, DUAL,
            )  # fmt: skip
            s, t = _scores(qa, qb, dqa, dqb, ka, kb, dka, dkb, _allowed(query, key, n, CAUSAL), scale, DUAL)
            x = _dot(g, tl.trans(v))
            w = x
            if DUAL:
                x += _dot(e, tl.trans(dv))
                w = _dot(e, tl.trans(v))
            p = _power(s, top[:, None], scale, v) * share[:, None]
            gs, gt, _r = _gradients(p, t, x, w, mu[:, None], nu[:, None], c[:, None], DUAL)
            gs = (gs * scale).to(v.dtype)
            ga += _dot(gs, ka)
            gb += _dot(gs, kb)
            if DUAL:
                gt = (gt * scale).to(v.dtype)
                ga += _dot(gt, dka)
                gb += _dot(gt, dkb)
                gda += _dot(gt, ka)
                gdb += _dot(gt, kb)
        _store_turned_back(gq_ptr, ga, gb, local, asked, STRIDE_Q, cos_ptr, sin_ptr, count, HALF, HALF_BLOCK, TURN_Q)
        if DUAL:
            _store_turned_back(
                gdq_ptr, gda, gdb, local, asked, STRIDE_Q, cos_ptr, sin_ptr, count, HALF, HALF_BLOCK, TURN_Q
            )
    tl.debug_barrier()  # the statistics were written by other threads of this program
    for first in range(0, n, BN):
        key = first + tl.arange(0, BN)
        present = key < n
        ka, kb, dka, dkb, v, dv = _load_keys(
            k_ptr, v_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, key, n,
            STRIDE_KV, C, HALF_BLOCK, C_BLOCK, ROTARY, DUAL,
        )  # fmt: skip
        ga = tl.zeros([BN, HALF_BLOCK], tl.float32)
        gb = tl.zeros([BN, HALF_BLOCK], tl.float32)
        gda = tl.zeros([BN, HALF_BLOCK], tl.float32)
        gdb = tl.zeros([BN, HALF_BLOCK], tl.float32)
        gv = tl.zeros([BN, C_BLOCK], tl.float32)
        gdv = tl.zeros([BN, C_BLOCK], tl.float32)
        first_tile = 0
        if CAUSAL:
            first_tile = tl.maximum(0, first - (n - count)) // BM * BM
        for first_query in range(first_tile, count, BM):
            local = first_query + tl.arange(0, BM)
            query, asked = n - count + local, local < count
            qa, qb, dqa, dqb = _load_queries(
                q_ptr, dq_ptr, cos_ptr, sin_ptr, local, count, STRIDE_Q, C, HALF_BLOCK, ROTARY, DUAL, LAST
            )
            g = _load(g_ptr, local, asked, D, channel, C)
            e = g
            if DUAL:
                e = _load(e_ptr, local, asked, D, channel, C)
            at = stats_ptr + local * (HEADS * 5)
            top = tl.load(at, mask=asked, other=0.0)
            share = tl.load(at + 1, mask=asked, other=0.0)
            mu = tl.load(at + 2, mask=asked, other=0.0)
            nu = tl.load(at + 3, mask=asked, other=0.0)
            c = tl.load(at + 4, mask=asked, other=0.0)
            s, t = _scores(qa, qb, dqa, dqb, ka, kb, dka, dkb, _allowed(query, key, n, CAUSAL), scale, DUAL)
            x = _dot(g, tl.trans(v))
            w = x
            if DUAL:
                x += _dot(e, tl.trans(dv))
                w = _dot(e, tl.trans(v))
            p = _power(s, top[:, None], scale, v) * share[:, None]
            gs, gt, r = _gradients(p, t, x, w, mu[:, None], nu[:, None], c[:, None], DUAL)
            p = tl.trans(p.to(v.dtype))
            gv += _dot(p, g)
            gs = tl.trans((gs * scale).to(v.dtype))
            ga += _dot(gs, qa)
            gb += _dot(gs, qb)
            if DUAL:
                gdv += _dot(p, e)
                gv += _dot(tl.trans(r.to(v.dtype)), e)
                gt = tl.trans((gt * scale).to(v.dtype))
                ga += _dot(gt, dqa)
                gb += _dot(gt, dqb)
                gda += _dot(gt, qa)
                gdb += _dot(gt, qb)
        _store(gv_ptr, gv, key, present, STRIDE_KV, channel, C)
        _store_turned_back(gk_ptr, ga, gb, key, present, STRIDE_KV, cos_ptr, sin_ptr, n, HALF, HALF_BLOCK, ROTARY)
        if DUAL:
            _store(gdv_ptr, gdv, key, present, STRIDE_KV, channel, C)
            _store_turned_back(
                gdk_ptr, gda, gdb, key, present, STRIDE_KV, cos_ptr, sin_ptr, n, HALF, HALF_BLOCK, ROTARY
            )


@triton.jit(do_not_specialize=["padded_length"])
def _backward_kernel(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, g_ptr, e_ptr,
    gq_ptr, gk_ptr, gv_ptr, gdq_ptr, gdk_ptr, gdv_ptr, bounds_ptr, cos_ptr, sin_ptr, stats_ptr, padded_length, scale,
    STRIDE_Q: tl.constexpr, STRIDE_KV: tl.constexpr, HEADS: tl.constexpr,
    C: tl.constexpr, HALF_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, CAUSAL: tl.constexpr, DUAL: tl.constexpr, PADDED: tl.constexpr, LAST: tl.constexpr,
    LONGEST: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = HEADS * C
    user, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    start, n = _history(bounds_ptr, user, padded_length, PADDED)
    count = n
    first_query = start
    if LAST:
        count = tl.minimum(n, 1)
        first_query = user.to(tl.int64)
    to_q, to_kv, to_o = first_query * STRIDE_Q + head * C, start * STRIDE_KV + head * C, first_query * D + head * C
    q_ptr += to_q
    k_ptr += to_kv
    v_ptr += to_kv
    dq_ptr += to_q
    dk_ptr += to_kv
    dv_ptr += to_kv
    g_ptr += to_o
    e_ptr += to_o
    gq_ptr += to_q
    gk_ptr += to_kv
    gv_ptr += to_kv
    gdq_ptr += to_q
    gdk_ptr += to_kv
    gdv_ptr += to_kv
    stats_ptr += (first_query * HEADS + head) * 5
    if LAST:
        _zero_rows(gq_ptr, 1 - count, STRIDE_Q, C, C_BLOCK)
        if DUAL:
            _zero_rows(gdq_ptr, 1 - count, STRIDE_Q, C, C_BLOCK)
    if PADDED:
        before = padded_length - n
        _zero_rows(gk_ptr - before * STRIDE_KV, before, STRIDE_KV, C, C_BLOCK)
        _zero_rows(gv_ptr - before * STRIDE_KV, before, STRIDE_KV, C, C_BLOCK)
        if DUAL:
            _zero_rows(gdk_ptr - before * STRIDE_KV, before, STRIDE_KV, C, C_BLOCK)
            _zero_rows(gdv_ptr - before * STRIDE_KV, before, STRIDE_KV, C, C_BLOCK)
        if not LAST:
            _zero_rows(gq_ptr - before * STRIDE_Q, before, STRIDE_Q, C, C_BLOCK)
            if DUAL:
                _zero_rows(gdq_ptr - before * STRIDE_Q, before, STRIDE_Q, C, C_BLOCK)
    # No tile of 32 for the lengths between: its products (mma.sync, not wgmma) hold their operands in registers, 180 a
    # thread where 16 and 64 need 118, and every length would pay with 2 programs an SM instead of 4.
    if LONGEST > 64 and n > 64:
        _backward_long(
            q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, g_ptr, e_ptr,
            gq_ptr, gk_ptr, gv_ptr, gdq_ptr, gdk_ptr, gdv_ptr, cos_ptr, sin_ptr, stats_ptr, n, count, scale,
            STRIDE_Q, STRIDE_KV, D, HEADS, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, LAST, 16 if LAST else 32, 32,
        )  # fmt: skip
    elif LONGEST > 16 and n > 16:
        _backward_tile(
            q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, g_ptr, e_ptr,
            gq_ptr, gk_ptr, gv_ptr, gdq_ptr, gdk_ptr, gdv_ptr, cos_ptr, sin_ptr, n, count, scale,
            STRIDE_Q, STRIDE_KV, D, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, LAST, 16 if LAST else 64, 64,
        )  # fmt: skip
    elif n > 0:
        _backward_tile(
            q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, g_ptr, e_ptr,
            gq_ptr, gk_ptr, gv_ptr, gdq_ptr, gdk_ptr, gdv_ptr, cos_ptr, sin_ptr, n, count, scale,
            STRIDE_Q, STRIDE_KV, D, C, HALF_BLOCK, C_BLOCK, ROTARY, CAUSAL, DUAL, LAST, 16, 16,
        )  # fmt: skip


def _widths(channels):
    half_block = max(16, triton.next_power_of_2(channels // 2))
    return {"HALF_BLOCK": half_block, "C_BLOCK": 2 * half_block}


def tier(longest):
    """16 or 64 where no history has more items: which tiles there are decides what registers every program has."""
    return 128 if longest is None or longest > 64 else 64 if longest > 16 else 16


def attention_forward(inputs, outputs, bounds, tables, padded_length, longest, heads, causal, last, shapes):
    """Launch the forward pass.

    Args:
        inputs: (q, k, v), followed by their tangents for the dual form; [rows, D] views with channels contiguous, k and
            v of equal row stride, tangents strided as what they belong to.
        outputs: (o,) or (o, do), [rows of q, D].
        bounds: offsets [B + 1], or lengths [B] where `padded_length` is given.
        tables: None, or cosines and sines float32 [longest, D / heads / 2] by age; no history may have more items.
        padded_length: L of padded histories, or None for packed ones.
        longest: no history has more items; None where that is not known.
        heads: H; D / H is even.
        causal: whether an item sees only those before it.
        last: whether q has one row a history, the newest.
        shapes: num_warps, maxnreg.
    """
    q, k, v, dq, dk, dv = (*inputs, *inputs)[:6]
    o, do = (*outputs, *outputs)[:2]
    cos, sin = tables or (q, q)
    users = len(bounds) if padded_length is not None else len(bounds) - 1
    channels = q.shape[1] // heads
    _forward_kernel[(users * heads,)](
        q, k, v, dq, dk, dv, o, do, bounds, cos, sin, padded_length or 0, channels**-0.5, STRIDE_Q=q.stride(0),
        STRIDE_KV=k.stride(0), HEADS=heads, C=channels, **_widths(channels), ROTARY=tables is not None, CAUSAL=causal,
        DUAL=len(inputs) == 6, PADDED=padded_length is not None, LAST=last, LONGEST=tier(longest),
        num_stages=1, **shapes,
    )  # fmt: skip


def attention_backward(
    inputs, upstream, gradients, stats, bounds, tables, padded_length, longest, heads, causal, last, shapes
):
    """Launch the backward pass; what is not named here is as for `attention_forward`.

    From `upstream`, (g,) or (g, e) [rows of q, D], it writes `gradients`: for each of `inputs` one, q's and dq's of
    equal strides, the others' likewise. `stats` is workspace, float32 [rows of q, H, 5]: histories of more than 64
    items use it.
    """
    q, k, v, dq, dk, dv = (*inputs, *inputs)[:6]
    g, e = (*upstream, *upstream)[:2]
    gq, gk, gv, gdq, gdk, gdv = (*gradients, *gradients)[:6]
    cos, sin = tables or (q, q)
    users = len(bounds) if padded_length is not None else len(bounds) - 1
    channels = q.shape[1] // heads
    _backward_kernel[(users * heads,)](
        q, k, v, dq, dk, dv, g, e, gq, gk, gv, gdq, gdk, gdv, bounds, cos, sin, stats, padded_length or 0,
        channels**-0.5, STRIDE_Q=q.stride(0), STRIDE_KV=k.stride(0), HEADS=heads, C=channels, **_widths(channels),
        ROTARY=tables is not None, CAUSAL=causal, DUAL=len(inputs) == 6, PADDED=padded_length is not None, LAST=last,
        LONGEST=tier(longest), num_stages=1, **shapes,
    )  # fmt: skip
