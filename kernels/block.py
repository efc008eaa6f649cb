"""What a transformer block does around its attention, row by row, on values and (DUAL) on their tangents.

Forward: norm and projection; everything after the attention, with the feed-forward's hidden layer kept on the chip.
Backward: through GELU, writing what the weight gradients need; a plain product; the norm. A program takes BM rows
whatever else is in the batch and sums in a fixed order, so a row's results have the same bits in any batch. Value and
tangent of a row are in one program, or are rows of one product: a tile of weights is read once for both.

The formulas are those of `fave_fast.ops.block`.
"""

import triton
import triton.language as tl
from fave_fast.kernels.products import add_up, flushed_exp2, flushed_reciprocal, reciprocal_root
from fave_fast.kernels.products import dot as _dot


@triton.jit
def _mix(x):
    """A bijection of uint32 whose output bits each depend on all input bits (a multiply-xorshift hash)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout_scale(seed_ptr, stream, first, row, channel, threshold, scale, D: tl.constexpr):
    """0 or `scale` for each element, from (seed, stream, position)."""
    seed = tl.load(seed_ptr)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = _mix(_mix(low ^ stream.to(tl.uint32)) ^ high)
    # position * step + key; the step differs from stream to stream, or one's numbers would be the other's, shifted.
    step = _mix(key ^ 0x9E3779B9) | 1
    of_row = (first * D).to(tl.uint32) * step + key + row.to(tl.uint32) * (step * D)
    bits = _mix(of_row[:, None] + (channel.to(tl.uint32) * step)[None, :])
    return tl.where(bits >= threshold.to(tl.uint32), scale, 0.0)


@triton.jit
def _load_rows(ptr, first, row, keep, channel, WIDTH: tl.constexpr):
    """Rows `first` + `row` of a contiguous [., WIDTH]; only the scalar `first` needs 64 bits."""
    mask = keep[:, None] & (channel < WIDTH)[None, :]
    return tl.load(ptr + first * WIDTH + (row[:, None] * WIDTH + channel[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, value, first, row, keep, channel, WIDTH: tl.constexpr):
    mask = keep[:, None] & (channel < WIDTH)[None, :]
    at = ptr + first * WIDTH + (row[:, None] * WIDTH + channel[None, :])
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_matrix(ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a weight matrix [ROWS, COLUMNS]."""
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(ptr + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0)


@triton.jit
def _load_vector(ptr, channel, D: tl.constexpr):
    return tl.load(ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _centred(x, channel, D: tl.constexpr, LAYER: tl.constexpr):
    x = x.to(tl.float32)
    if LAYER:
        x = tl.where((channel < D)[None, :], x - tl.sum(x, 1)[:, None] / D, 0.0)
    return x


@triton.jit
def _normed(x, dx, gain_ptr, bias_ptr, channel, eps, D: tl.constexpr, LAYER: tl.constexpr, DUAL: tl.constexpr):
    """Norm of rows and its tangent, float32."""
    gain = _load_vector(gain_ptr, channel, D)
    c = _centred(x, channel, D, LAYER)
    r = reciprocal_root(tl.sum(c * c, 1) / D + eps, x.dtype == tl.float32)[:, None]
    n = c * r * gain
    dn = n
    if DUAL:
        dc = _centred(dx, channel, D, LAYER)
        m = tl.sum(c * dc, 1)[:, None] / D
        dn = (dc - c * (r * r * m)) * r * gain
    if LAYER:
        n += _load_vector(bias_ptr, channel, D)
    return n, dn


@triton.jit
def _normed_rows(
    x_ptr, dx_ptr, gain_ptr, bias_ptr, first, row, keep, channel, eps,
    D: tl.constexpr, LAYER: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """`_normed` of rows in memory."""
    x = _load_rows(x_ptr, first, row, keep, channel, D)
    dx = x
    if DUAL:
        dx = _load_rows(dx_ptr, first, row, keep, channel, D)
    return _normed(x, dx, gain_ptr, bias_ptr, channel, eps, D, LAYER, DUAL)


@triton.jit
def _gelu_parts(x, EXACT: tl.constexpr):
    """Phi(x), phi(x): the normal distribution and its density."""
    if EXACT:
        bell = tl.exp2(x * x * -0.7213475204444817)
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        # Abramowitz and Stegun 7.1.26, right to 1e-7: a third of erf's instructions, of which there are most here.
        bell = flushed_exp2(x * x * -0.7213475204444817)
        t = flushed_reciprocal(1.0 + 0.2316418882663604 * tl.abs(x))
        poly = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        above = poly * bell
        below = tl.where(x >= 0, 1.0 - above, above)
    return below, 0.3989422804014327 * bell


@triton.jit(do_not_specialize=["count"])
def _norm_linear_kernel(
    x_ptr, dx_ptr, gain_ptr, bias_ptr, w_ptr, y_ptr, dy_ptr, count, eps,
    D: tl.constexpr, D_BLOCK: tl.constexpr, WIDTH: tl.constexpr, LAYER: tl.constexpr, DUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM)
    keep, channel = row < count - first, tl.arange(0, D_BLOCK)
    n, dn = _normed_rows(x_ptr, dx_ptr, gain_ptr, bias_ptr, first, row, keep, channel, eps, D, LAYER, DUAL)
    n = n.to(w_ptr.dtype.element_ty)
    dn = dn.to(w_ptr.dtype.element_ty)
    for start in range(0, WIDTH, BN):
        column = start + tl.arange(0, BN)
        w = tl.trans(_load_matrix(w_ptr, column, channel, WIDTH, D))
        _store_rows(y_ptr, _dot(n, w), first, row, keep, column, WIDTH)
        if DUAL:
            _store_rows(dy_ptr, _dot(dn, w), first, row, keep, column, WIDTH)


@triton.jit(do_not_specialize=["count"])
def _norm_kernel(
    x_ptr, dx_ptr, gain_ptr, bias_ptr, y_ptr, dy_ptr, count, eps,
    D: tl.constexpr, D_BLOCK: tl.constexpr, LAYER: tl.constexpr, DUAL: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM)
    keep, channel = row < count - first, tl.arange(0, D_BLOCK)
    n, dn = _normed_rows(x_ptr, dx_ptr, gain_ptr, bias_ptr, first, row, keep, channel, eps, D, LAYER, DUAL)
    _store_rows(y_ptr, n, first, row, keep, channel, D)
    if DUAL:
        _store_rows(dy_ptr, dn, first, row, keep, channel, D)


@triton.jit(do_not_specialize=["count", "stream", "threshold"])
def _tail_kernel(
    o_ptr, do_ptr, x_ptr, dx_ptr, wo_ptr, gain_ptr, bias_ptr, w1_ptr, w2_ptr, seed_ptr,
    h_ptr, dh_ptr, y_ptr, dy_ptr, count, stream, threshold, scale, eps,
    D: tl.constexpr, D_BLOCK: tl.constexpr, HIDDEN: tl.constexpr, LAYER: tl.constexpr, DUAL: tl.constexpr,
    DROP: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM)
    keep, channel = row < count - first, tl.arange(0, D_BLOCK)
    wo = tl.trans(_load_matrix(wo_ptr, channel, channel, D, D))
    h = _dot(_load_rows(o_ptr, first, row, keep, channel, D), wo)
    dh = h
    if DUAL:
        dh = _dot(_load_rows(do_ptr, first, row, keep, channel, D), wo)
    if DROP:
        factor = _dropout_scale(seed_ptr, stream, first, row, channel, threshold, scale, D)
        h *= factor
        if DUAL:
            dh *= factor
    h = (h + _load_rows(x_ptr, first, row, keep, channel, D).to(tl.float32)).to(h_ptr.dtype.element_ty)
    _store_rows(h_ptr, h, first, row, keep, channel, D)
    if DUAL:
        dh = (dh + _load_rows(dx_ptr, first, row, keep, channel, D).to(tl.float32)).to(h_ptr.dtype.element_ty)
        _store_rows(dh_ptr, dh, first, row, keep, channel, D)
    n, dn = _normed(h, dh, gain_ptr, bias_ptr, channel, eps, D, LAYER, DUAL)
    n = n.to(w1_ptr.dtype.element_ty)
    dn = dn.to(w1_ptr.dtype.element_ty)
    EXACT: tl.constexpr = w1_ptr.dtype.element_ty == tl.float32
    y = tl.zeros([BM, D_BLOCK], tl.float32)
    dy, lost, dlost = y, y, y
    for start in range(0, HIDDEN, BH):
        hidden = start + tl.arange(0, BH)
        w1 = tl.trans(_load_matrix(w1_ptr, hidden, channel, HIDDEN, D))
        w2 = tl.trans(_load_matrix(w2_ptr, channel, hidden, D, HIDDEN))
        a = _dot(n, w1)
        below, density = _gelu_parts(a, EXACT)
        y, lost = add_up(y, lost, _dot((a * below).to(w2.dtype), w2), EXACT)
        if DUAL:
            slope = below + a * density
            dy, dlost = add_up(dy, dlost, _dot((slope * _dot(dn, w1)).to(w2.dtype), w2), EXACT)
    if DROP:
        factor = _dropout_scale(seed_ptr, stream + 1, first, row, channel, threshold, scale, D)
        y *= factor
        if DUAL:
            dy *= factor
    # h again instead of keeping 2 x 32 registers through the loop; other threads may have written it.
    tl.debug_barrier()
    h = _load_rows(h_ptr, first, row, keep, channel, D)
    _store_rows(y_ptr, y + h.to(tl.float32), first, row, keep, channel, D)
    if DUAL:
        dh = _load_rows(dh_ptr, first, row, keep, channel, D)
        _store_rows(dy_ptr, dy + dh.to(tl.float32), first, row, keep, channel, D)


@triton.jit(do_not_specialize=["count", "stream", "threshold"])
def _gelu_backward_kernel(
    h_ptr, dh_ptr, gain_ptr, bias_ptr, g_ptr, e_ptr, w1_ptr, w2_ptr, seed_ptr,
    u_ptr, du_ptr, ga_ptr, gda_ptr, gz_ptr, gdz_ptr, count, stream, threshold, scale, eps,
    D: tl.constexpr, D_BLOCK: tl.constexpr, HIDDEN: tl.constexpr, LAYER: tl.constexpr, DUAL: tl.constexpr,
    DROP: tl.constexpr, STORE_GZ: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS programs share the hidden units of BM rows: one takes 36 us for all 512, however few rows there are."""
    first, row = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM)
    keep, channel = row < count - first, tl.arange(0, D_BLOCK)
    h = _load_rows(h_ptr, first, row, keep, channel, D)
    g = _load_rows(g_ptr, first, row, keep, channel, D)
    dh, e = h, g
    if DUAL:
        dh = _load_rows(dh_ptr, first, row, keep, channel, D)
        e = _load_rows(e_ptr, first, row, keep, channel, D)
    n, dn = _normed(h, dh, gain_ptr, bias_ptr, channel, eps, D, LAYER, DUAL)
    n = n.to(w1_ptr.dtype.element_ty)
    dn = dn.to(w1_ptr.dtype.element_ty)
    if DROP:
        factor = _dropout_scale(seed_ptr, stream + 1, first, row, channel, threshold, scale, D)
        g = (g.to(tl.float32) * factor).to(g_ptr.dtype.element_ty)
        if DUAL:
            e = (e.to(tl.float32) * factor).to(g_ptr.dtype.element_ty)
    SPAN: tl.constexpr = (HIDDEN + BH * PARTS - 1) // (BH * PARTS) * BH
    begin = tl.program_id(1) * SPAN
    if STORE_GZ and begin == 0:
        _store_rows(gz_ptr, g, first, row, keep, channel, D)
        if DUAL:
            _store_rows(gdz_ptr, e, first, row, keep, channel, D)
    for start in range(0, SPAN, BH):
        hidden = begin + start + tl.arange(0, BH)
        w1 = tl.trans(_load_matrix(w1_ptr, hidden, channel, HIDDEN, D))
        w2 = _load_matrix(w2_ptr, channel, hidden, D, HIDDEN)
        a = _dot(n, w1)
        below, density = _gelu_parts(a, w1_ptr.dtype.element_ty == tl.float32)
        slope = below + a * density
        gu = _dot(g, w2)
        _store_rows(u_ptr, a * below, first, row, keep, hidden, HIDDEN)
        ga = gu * slope
        if DUAL:
            da = _dot(dn, w1)
            gdu = _dot(e, w2)
            _store_rows(du_ptr, slope * da, first, row, keep, hidden, HIDDEN)
            _store_rows(gda_ptr, gdu * slope, first, row, keep, hidden, HIDDEN)
            ga += gdu * (density * (2.0 - a * a) * da)
        _store_rows(ga_ptr, ga, first, row, keep, hidden, HIDDEN)


@triton.jit(do_not_specialize=["count"])
def _linear_kernel(
    x_ptr, w_ptr, y_ptr, count, K: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM)
    keep, channel = row < count - first, tl.arange(0, D_BLOCK)
    y = tl.zeros([BM, D_BLOCK], tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        y += _dot(_load_rows(x_ptr, first, row, keep, inner, K), _load_matrix(w_ptr, inner, channel, K, D))
    _store_rows(y_ptr, y, first, row, keep, channel, D)


@triton.jit(do_not_specialize=["count", "programs", "stream", "threshold"])
def _norm_backward_kernel(
    gn_ptr, gdn_ptr, x_ptr, dx_ptr, gain_ptr, bias_ptr, residual_ptr, dresidual_ptr, owner_ptr, gq_ptr, gdq_ptr,
    seed_ptr, gx_ptr, gdx_ptr, n_ptr, dn_ptr, gz_ptr, gdz_ptr, sums_ptr, count, programs, stream, threshold, scale, eps,
    D: tl.constexpr, D_BLOCK: tl.constexpr, LAYER: tl.constexpr, DUAL: tl.constexpr, DROP: tl.constexpr,
    SPARSE: tl.constexpr, INNER: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """INNER: within a block, with a residual stream and products that want norm(x) again."""
    first, row = tl.program_id(0).to(tl.int64) * BM, tl.arange(0, BM)
    keep, channel = row < count - first, tl.arange(0, D_BLOCK)
    gn = _load_rows(gn_ptr, first, row, keep, channel, D).to(tl.float32)
    gdn = gn
    if DUAL:
        gdn = _load_rows(gdn_ptr, first, row, keep, channel, D).to(tl.float32)
    if SPARSE:
        # The newest items alone had a query and a residual stream.
        owner = tl.load(owner_ptr + first + row, mask=keep, other=-1).to(tl.int64)
        owners, stored, owned = first * 0, tl.maximum(owner, 0), owner >= 0
        gn += _load_rows(gq_ptr, owners, stored, owned, channel, D).to(tl.float32)
        if DUAL:
            gdn += _load_rows(gdq_ptr, owners, stored, owned, channel, D).to(tl.float32)
    else:
        owners, stored, owned = first, row, keep
    # What is written goes out as soon as it is there, which keeps few tiles alive at a time.
    gain = _load_vector(gain_ptr, channel, D)
    c = _centred(_load_rows(x_ptr, first, row, keep, channel, D), channel, D, LAYER)
    r = reciprocal_root(tl.sum(c * c, 1) / D + eps, x_ptr.dtype.element_ty == tl.float32)[:, None]
    sums_ptr += tl.program_id(0)
    n = c * (r * gain)
    if LAYER:
        n += _load_vector(bias_ptr, channel, D)
        tl.store(sums_ptr + (D + channel) * programs, tl.sum(gn, 0), mask=channel < D)
    if INNER:
        _store_rows(n_ptr, n, first, row, keep, channel, D)
    to_gain = tl.sum(gn * (c * r), 0)
    a = gn * gain
    if DUAL:
        dc = _centred(_load_rows(dx_ptr, first, row, keep, channel, D), channel, D, LAYER)
        m = tl.sum(c * dc, 1)[:, None] / D
        dn = (dc - c * (r * r * m)) * r
        if INNER:
            _store_rows(dn_ptr, dn * gain, first, row, keep, channel, D)
        to_gain += tl.sum(gdn * dn, 0)
        e = gdn * gain
        along = tl.sum(e * c, 1)[:, None] / D
        through_r = tl.sum(a * c + e * dc, 1)[:, None] / D - 3.0 * r * r * m * along
        cube = r * r * r
        gx = r * a - cube * (m * e + along * dc + through_r * c)
        gdx = r * e - cube * along * c
        if LAYER:
            gdx = tl.where((channel < D)[None, :], gdx - tl.sum(gdx, 1)[:, None] / D, 0.0)
        if INNER:
            gdx += _load_rows(dresidual_ptr, owners, stored, owned, channel, D).to(tl.float32)
        _store_rows(gdx_ptr, gdx, first, row, keep, channel, D)
    else:
        gx = r * a - c * (r * r * r * tl.sum(a * c, 1)[:, None] / D)
    tl.store(sums_ptr + channel * programs, to_gain, mask=channel < D)
    if LAYER:
        gx = tl.where((channel < D)[None, :], gx - tl.sum(gx, 1)[:, None] / D, 0.0)
    if INNER:
        gx += _load_rows(residual_ptr, owners, stored, owned, channel, D).to(tl.float32)
    _store_rows(gx_ptr, gx, first, row, keep, channel, D)
    if DROP:
        factor = _dropout_scale(seed_ptr, stream, first, row, channel, threshold, scale, D)
        _store_rows(gz_ptr, gx * factor, first, row, keep, channel, D)
        if DUAL:
            _store_rows(gdz_ptr, gdx * factor, first, row, keep, channel, D)


def _pair(tensors):
    """Value and tangent; the value twice where there is no tangent."""
    return (*tensors, *tensors)[:2]


def _block_of(d):
    return max(16, triton.next_power_of_2(d))


def norm_linear(x, norm, weight, y, shapes):
    """Write y = norm(x) weight^T.

    x [rows, D] and y [rows, WIDTH] are tuples of the value, or of value and tangent; `norm` is (gain [D], bias [D] or
    None, eps), LayerNorm with a bias and RMSNorm without; weight is [WIDTH, D]. `shapes`: BM, BN and the
    launch's num_warps, num_stages, maxnreg. All tensors of this file are contiguous.
    """
    count, d = x[0].shape
    gain, bias, eps = norm
    _norm_linear_kernel[(triton.cdiv(count, shapes["BM"]),)](
        *_pair(x), gain, gain if bias is None else bias, weight, *_pair(y), count, eps, D=d,
        D_BLOCK=_block_of(d), WIDTH=len(weight), LAYER=bias is not None, DUAL=len(x) == 2, **shapes,
    )  # fmt: skip


def norm(x, weights, y, shapes):
    """Write norms of x into y, tuples [rows, D] of the value, or of value and tangent; `weights` is `norm` elsewhere.

    `shapes`: BM, num_warps.
    """
    count, d = y[0].shape
    gain, bias, eps = weights
    _norm_kernel[(triton.cdiv(count, shapes["BM"]),)](
        *_pair(x), gain, gain if bias is None else bias, *_pair(y), count, eps, D=d, D_BLOCK=_block_of(d),
        LAYER=bias is not None, DUAL=len(x) == 2, **shapes,
    )  # fmt: skip


def tail(o, x, weights, norm, dropout, h, y, shapes):
    """Write h = x + dropout(o Wo^T) and y = h + dropout(gelu(norm(h) W1^T) W2^T).

    o, x, h and y [rows, D] are tuples of the value, or of value and tangent; `weights` is (Wo [D, D], W1 [hidden, D],
    W2 [D, hidden]); `norm` as for `norm_linear`; `dropout` is None, or (seed int64 [1], stream, threshold, scale), and
    its second use takes stream + 1. `shapes`: BM, BH, num_warps, num_stages.
    """
    count, d = x[0].shape
    gain, bias, eps = norm
    wo, w1, w2 = weights
    seed, stream, threshold, scale = dropout or (gain, 0, 0, 1.0)
    _tail_kernel[(triton.cdiv(count, shapes["BM"]),)](
        *_pair(o), *_pair(x), wo, gain, gain if bias is None else bias, w1, w2, seed, *_pair(h), *_pair(y), count,
        stream, threshold, scale, eps, D=d, D_BLOCK=_block_of(d), HIDDEN=len(w1), LAYER=bias is not None,
        DUAL=len(x) == 2, DROP=dropout is not None, **shapes,
    )  # fmt: skip


def gelu_backward(h, norm, upstream, weights, dropout, u, ga, gz, shapes):
    """From `upstream`, gradients of the y of `tail`, write those of a = norm(h) W1^T, and u = gelu(a) again.

    h and `upstream` [rows, D], u and ga [rows, hidden] are tuples of the value, or of value and tangent; `norm` and
    `dropout` as for `tail`; `weights` is (W1, W2). gz is None, or written [rows, D]: the gradients of what the second
    dropout was applied to. `shapes`: BM, BH, PARTS, num_warps, num_stages.
    """
    count, d = h[0].shape
    gain, bias, eps = norm
    w1, w2 = weights
    seed, stream, threshold, scale = dropout or (gain, 0, 0, 1.0)
    _gelu_backward_kernel[(triton.cdiv(count, shapes["BM"]), shapes["PARTS"])](
        *_pair(h), gain, gain if bias is None else bias, *_pair(upstream), w1, w2, seed, *_pair(u), *_pair(ga),
        *_pair(gz or u), count, stream, threshold, scale, eps, D=d, D_BLOCK=_block_of(d), HIDDEN=len(w1),
        LAYER=bias is not None, DUAL=len(h) == 2, DROP=dropout is not None, STORE_GZ=gz is not None, **shapes,
    )  # fmt: skip


def linear(x, weight, y, shapes):
    """Write y [rows, D] = x [rows, K] weight, `weight` [K, D]. `shapes`: BM, BK, num_warps, num_stages.

    Not torch.mm: its order of summation over K depends on the number of rows.
    """
    count, d = y.shape
    _linear_kernel[(triton.cdiv(count, shapes["BM"]),)](
        x, weight, y, count, K=len(weight), D=d, D_BLOCK=_block_of(d), **shapes
    )


def norm_backward(gn, x, norm, residual, newest, dropout, gx, n, gz, sums, shapes):
    """Gradients of x, given those of norm(x) and of x by the residual stream, if there is one.

    Args:
        gn: tuple of the value's, or of the value's and the tangent's, [rows, D]; so are all below without a type.
        x: [rows, D].
        norm: as for `norm_linear`.
        residual: None, or gradients [rows, D], or with `newest` [B, D].
        newest: None, or (owner int32 [rows], more [B, D]): row by row the history whose newest item it is, or -1; the
            gradient of norm(x) has `more` added at those rows.
        dropout: None, or that of `tail`, whose first use gx is multiplied with to give gz.
        gx: written, gradients of x.
        n: None without a residual stream; else written, norm(x).
        gz: written where `dropout` is not None.
        sums: float32 [1 or 2, D, programs], written: each program's share of the gain's and (LayerNorm) the bias's
            gradient.
        shapes: BM, num_warps.
    """
    count, d = gn[0].shape
    gain, bias, eps = norm
    owner, more = newest or (gain, gx)
    seed, stream, threshold, scale = dropout or (gain, 0, 0, 1.0)
    programs = triton.cdiv(count, shapes["BM"])
    _norm_backward_kernel[(programs,)](
        *_pair(gn), *_pair(x), gain, gain if bias is None else bias, *_pair(residual or gx), owner, *_pair(more), seed,
        *_pair(gx), *_pair(n or gx), *_pair(gz or gx), sums, count, programs, stream, threshold, scale, eps, D=d,
        D_BLOCK=_block_of(d), LAYER=bias is not None, DUAL=len(gn) == 2, DROP=dropout is not None,
        SPARSE=newest is not None, INNER=residual is not None, **shapes,
    )  # fmt: skip
