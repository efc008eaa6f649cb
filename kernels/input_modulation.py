"""Triton kernels of input_modulation: the time features of each user, then one pass over the rows of the histories.

A program of the row kernels reads one user's history, and x_t + z once; its backward sums over the history in one
order. Every row is normalised by the same lanes in the same order wherever it stands: its bits depend neither on the
batch nor on padding. Random numbers are Philox4x32-10 words whose counter is (eight channels, age, user) and whose key
is the seed, age 0 being the newest position; backward passes draw them again.

Weight gradients are sums over users: each program writes its own partial sum, and `_sums` adds those in order.
"""

import triton
import triton.language as tl
from fave_fast.kernels.products import INTERPRETED, add_up, dot_by, float32_precision, reciprocal_root
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

# How the lambda of a row is had.
CONSTANT = 0
GIVEN = 1  # one row of lambda for each row of the histories
SHARED = 2  # one row of lambda for each age, the newest last
DRAWN = 3

_CONSTANT = tl.constexpr(CONSTANT)
_GIVEN = tl.constexpr(GIVEN)
_SHARED = tl.constexpr(SHARED)
_DRAWN = tl.constexpr(DRAWN)

# Tiles of a program up to which its first need not wait for z. On one H200, by warps of 64 lanes and with drawn lambda,
# 512 histories of 50 items with dropout take 15.5 us for 17.4 (16.4 for 17.5 with the tangent); 4,096, with 13 tiles a
# program, 45.7 for 46.3, and 54.6 for 51.6 with the tangent: it takes registers.
LATE_TILES = 4

_TURN = tl.constexpr(6.283185307179586)


@triton.jit
def _wide_product(word, FACTOR: tl.constexpr):
    """The upper and the lower half of word * FACTOR."""
    if INTERPRETED:
        product = word.to(tl.uint64) * FACTOR
        upper, lower = (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        # One instruction. Triton's Philox takes two, and what the compiler makes of a product of 64 bits adds the
        # zeros of its upper halves: 18 of the 229 instructions of a tile.
        upper, lower = tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r",
            [word, FACTOR],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    return upper, lower


@triton.jit
def _philox_round(c0, c1, c2, c3, k0, k1):
    first, n3 = _wide_product(c0, 0xD2511F53)
    second, n1 = _wide_product(c2, 0xCD9E8D57)
    return second ^ c1 ^ k0, n1, first ^ c3 ^ k1, n3


@triton.jit
def _philox(seed, user, age, lane):
    """Four uint32 words of shape broadcast(age, lane)."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = lane.to(tl.uint32)
    c1 = age.to(tl.uint32)
    c2 = user.to(tl.uint32)
    c3 = (user >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _sine_cosine(x, quarters):
    """Sine and cosine of x + pi / 2 * quarters, x within pi / 4: to float32's last bit or two.

    The library's own have a path for large angles that costs registers although it never runs.
    """
    y = x * x
    sine = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880)))
    cosine = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 - y / 3628800))))
    even = quarters % 2 == 0
    first, second = tl.where(even, sine, cosine), tl.where(even, cosine, -sine)
    front = (quarters & 2) == 0
    return tl.where(front, first, -first), tl.where(front, second, -second)


@triton.jit
def _normal_pair(word, mean, spread, EXACT: tl.constexpr):
    """Two of N(mean, deviation^2) by Box and Muller, spread being -2 ln 2 deviation^2: 20 bits of the word make the
    radius, which ends at 5.4 deviations, and 12 the angle.
    """
    # Bits become the mantissa of a float in [1, 2): a conversion has a sixteenth of the rate. Both are mid-steps.
    chance = 2.0 - ((word >> 9) & 0x7FFFF8 | 0x3F800004).to(tl.float32, bitcast=True)
    turn = ((word << 11) & 0x7FF800 | 0x3F800400).to(tl.float32, bitcast=True)
    if INTERPRETED:
        bits, cosine, sine = tl.log2(chance), tl.cos((turn - 1.5) * _TURN), tl.sin((turn - 1.5) * _TURN)
    elif EXACT:
        quarters = tl.floor(4 * turn + 0.5)  # 4 to 8 of them, two more than are to be turned
        sine, cosine = _sine_cosine((turn - 0.25 * quarters) * _TURN, quarters.to(tl.int32) + 2)
        bits = libdevice.log2(chance)
    else:
        # Absolute errors of 2^-20 and less: nothing in 16 bits, and the exact ones would cost more than all the rest.
        angle = tl.fma(turn, _TURN, -1.5 * _TURN)
        bits, cosine, sine = libdevice.fast_log2f(chance), libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    radius = tl.sqrt(bits * spread)
    return radius * cosine + mean, radius * sine + mean


@triton.jit
def _of_four(part, a, b, c, d):
    """Four [T] as [T, V]: column i from the i-th of them, i modulo 4. The compiler knows i: nothing is chosen."""
    a, b, c, d = a[:, None], b[:, None], c[:, None], d[:, None]
    return tl.where(part % 4 == 0, a, tl.where(part % 4 == 1, b, tl.where(part % 4 == 2, c, d)))


@triton.jit
def _words(seed, person, age, lane, V: tl.constexpr, STREAM: tl.constexpr):
    """The words of a lane's V channels, two to a word, of stream 0 or 1; a counter has the words of eight channels."""
    w0, w1, w2, w3 = _philox(seed, person, age, lane // (8 // V) | STREAM * -0x80000000)
    if V == 4:
        w0, w1 = tl.where(lane % 2 == 0, w0, w2), tl.where(lane % 2 == 0, w1, w3)
    return w0, w1, w2, w3


@triton.jit
def _lambda(
    lam_ptr, lam_length, delta, seed, person, line, age, real, lane, channels,
    D: tl.constexpr, V: tl.constexpr, LAMBDA: tl.constexpr,
):  # fmt: skip
    """Lambda [T, V] of eq. (9) in float32, or its constant."""
    if LAMBDA == _GIVEN:
        lam = tl.load(lam_ptr + line, real, 0.0).to(tl.float32)
    elif LAMBDA == _SHARED:
        lam = tl.load(lam_ptr + (lam_length - 1 - age)[:, None] * D + channels, real, 0.0).to(tl.float32)
    elif LAMBDA == _DRAWN:
        EXACT: tl.constexpr = V == 4
        part = tl.arange(0, V)[None, :]
        spread = delta * delta * -1.3862943611198906
        w0, w1, w2, w3 = _words(seed, person, age, lane, V, 0)
        n0, n1 = _normal_pair(w0, delta, spread, EXACT)
        n2, n3 = _normal_pair(w1, delta, spread, EXACT)
        lam = _of_four(part, n0, n1, n2, n3)
        if V == 8:
            n0, n1 = _normal_pair(w2, delta, spread, EXACT)
            n2, n3 = _normal_pair(w3, delta, spread, EXACT)
            lam = tl.where(part < 4, lam, _of_four(part, n0, n1, n2, n3))
    else:
        lam = tl.full([1, 1], delta, tl.float32)
    return lam


@triton.jit
def _kept(seed, person, age, lane, drop_below, keep_scale, V: tl.constexpr):
    """The dropout's factor [T, V]: 0 where half a word is below `drop_below`, of 2^16, else `keep_scale`."""
    w0, w1, w2, w3 = _words(seed, person, age, lane, V, 1)
    part = tl.arange(0, V)[None, :]
    word = _of_four(part // 2, w0, w1, w2, w3)
    half = tl.where(part % 2 == 0, word & 0xFFFF, word >> 16)
    return tl.where(half >= drop_below.to(tl.uint32), keep_scale, 0.0)


@triton.jit
def _row_means(x, G: tl.constexpr):
    """Means over the channels of x [T, V], G lanes a row, as [T, 1]."""
    T: tl.constexpr = x.shape[0]
    total = tl.sum(tl.reshape(tl.sum(x, 1), (T // G, G)), 1, keep_dims=True) / (G * x.shape[1])
    return tl.reshape(tl.broadcast_to(total, (T // G, G)), (T,))[:, None]


@triton.jit
def _normalised(e, eps, G: tl.constexpr, EXACT: tl.constexpr):
    """(e - mean) / deviation by rows of e [T, V] float32, and 1 / deviation [T, 1]."""
    centred = e - _row_means(e, G)
    scale = reciprocal_root(_row_means(centred * centred, G) + eps, EXACT)
    return centred * scale, scale


@triton.jit
def _over_rows(x, G: tl.constexpr):
    """Sums over the rows of x [T, V], as [G, V]."""
    return tl.sum(tl.reshape(x, (x.shape[0] // G, G, x.shape[1])), 0)


@triton.jit
def _span(offsets_ptr, length, user):
    """Where a user's rows begin, and how many there are: packed, or `length` each."""
    if offsets_ptr is None:
        begin, count = user * length, length
    else:
        begin = tl.load(offsets_ptr + user).to(tl.int64)
        count = (tl.load(offsets_ptr + user + 1) - begin).to(tl.int32)
    return begin, count


@triton.jit
def _gathered(item, table_ptr, channels, D: tl.constexpr):
    """Which of a tile's rows hold an item [T, 1], and their embeddings [T, V]."""
    real = (item != 0)[:, None]
    return real, tl.load(table_ptr + item[:, None].to(tl.int64) * D + channels, real, 0.0)


@triton.jit
def _items(index, begin, count, ids_ptr):
    return tl.load(ids_ptr + begin + index, index < count, 0).to(tl.int32)


@triton.jit
def _put(out_ptr, dout_ptr, value, lam, line, real, there, shift, dshift):
    # A store of zeros for the padding alone: choosing between value and zero would cost an instruction a channel.
    tl.store(out_ptr + line, value + lam * shift, real)
    tl.store(out_ptr + line, tl.zeros_like(value), there & (real == 0))
    if dout_ptr is not None:
        tl.store(dout_ptr + line, lam * dshift + tl.zeros_like(value), real)
        tl.store(dout_ptr + line, tl.zeros_like(value), there & (real == 0))


@triton.jit
def _shifts(x, z_ptr, z_stride, dx_ptr, dz_ptr, user, channels, D: tl.constexpr):
    """What lambda multiplies: x_t + z, and its tangent, [T, V]."""
    shift = x + tl.load(z_ptr + user * z_stride + channels).to(tl.float32)
    dshift = shift
    if dx_ptr is not None:
        dshift = tl.load(dx_ptr + user * D + channels).to(tl.float32)
        dshift += tl.load(dz_ptr + user * D + channels).to(tl.float32)
    return shift, dshift


@triton.jit(do_not_specialize=["length", "lam_length"])
def _rows(
    ids_ptr, offsets_ptr, length, table_ptr, weight_ptr, bias_ptr, eps,
    x_ptr, keep_ptr, keep_stride, anchor_ptr, z_ptr, z_stride, dx_ptr, dz_ptr,
    lam_ptr, lam_length, delta, seed_ptr, users_ptr, drop_below, keep_scale, out_ptr, dout_ptr,
    D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, LAMBDA: tl.constexpr, DROP: tl.constexpr,
    AFTER: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """AFTER: z is still being computed; LATE: the first tile is not kept waiting for it, which costs registers."""
    user = tl.program_id(0).to(tl.int64)
    begin, count = _span(offsets_ptr, length, user)
    # A tile is [T, V]: G lanes of V channels make a row, V being what a lane loads and draws at once.
    G: tl.constexpr = D // V
    lane = tl.arange(0, ROWS * G) % G
    row = tl.arange(0, ROWS * G) // G
    channels = lane[:, None] * V + tl.arange(0, V)[None, :]
    weight = tl.load(weight_ptr + channels).to(tl.float32)
    bias = tl.load(bias_ptr + channels).to(tl.float32)
    seed, person = user, user
    if LAMBDA == _DRAWN or DROP:
        seed = tl.load(seed_ptr)
        person = tl.load(users_ptr + user)
    if x_ptr is not None:
        x = tl.load(x_ptr + user * D + channels).to(tl.float32)
    else:
        place = count - 1 - tl.load(anchor_ptr + user)
        item = tl.load(ids_ptr + begin + place, (place >= 0) & (place < count), 0).to(tl.int64)
        x = tl.load(table_ptr + item * D + channels).to(tl.float32)
        x *= tl.load(keep_ptr + user * keep_stride + channels).to(tl.float32)
    first = tl.program_id(1) * ROWS
    step = tl.num_programs(1) * ROWS
    # Rows are loaded one tile ahead, ids two: one after the other they take as long as a tile's arithmetic.
    real, e = _gathered(_items(first + row, begin, count, ids_ptr), table_ptr, channels, D)
    next_item = _items(first + step + row, begin, count, ids_ptr)
    if LATE:
        shift, dshift = x, x  # until z is there
    else:
        if AFTER:
            gdc_wait()  # z comes from the kernel before this one, which still runs
        shift, dshift = _shifts(x, z_ptr, z_stride, dx_ptr, dz_ptr, user, channels, D)
    EXACT: tl.constexpr = table_ptr.dtype.element_ty == tl.float32
    for at in range(first, count, step):
        index = at + row
        next_real, next_e = _gathered(next_item, table_ptr, channels, D)
        next_item = _items(index + 2 * step, begin, count, ids_ptr)
        age = count - 1 - index
        line = (begin + index)[:, None] * D + channels
        lam = _lambda(lam_ptr, lam_length, delta, seed, person, line, age, real, lane, channels, D, V, LAMBDA)
        e = e.to(tl.float32)
        if DROP:
            e *= _kept(seed, person, age, lane, drop_below, keep_scale, V)
        normal, _ = _normalised(e, eps, G, EXACT)
        value = normal * weight + bias
        if LATE and at == first:
            gdc_wait()
            shift, dshift = _shifts(x, z_ptr, z_stride, dx_ptr, dz_ptr, user, channels, D)
        there = (index < count)[:, None]
        _put(out_ptr, dout_ptr, value, lam, line, real, there, shift, dshift)
        real, e = next_real, next_e


@triton.jit(do_not_specialize=["length", "lam_length"])
def _rows_backward(
    ids_ptr, offsets_ptr, length, table_ptr, weight_ptr, eps,
    lam_ptr, lam_length, delta, seed_ptr, users_ptr, drop_below, keep_scale,
    grad_ptr, dgrad_ptr, shift_grad_ptr, dshift_grad_ptr, norm_part_ptr, row_grad_ptr,
    D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, LAMBDA: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    user = tl.program_id(0).to(tl.int64)
    begin, count = _span(offsets_ptr, length, user)
    G: tl.constexpr = D // V
    lane = tl.arange(0, ROWS * G) % G
    row = tl.arange(0, ROWS * G) // G
    channels = lane[:, None] * V + tl.arange(0, V)[None, :]
    weight = tl.load(weight_ptr + channels).to(tl.float32)
    seed, person = user, user
    if LAMBDA == _DRAWN or DROP:
        seed = tl.load(seed_ptr)
        person = tl.load(users_ptr + user)
    shift_grad = tl.zeros([ROWS * G, V], tl.float32)
    dshift_grad = tl.zeros([ROWS * G, V], tl.float32)
    # In float32 with what rounding lost: a wide row is a tile of its own, and 200 of them one chain.
    EXACT: tl.constexpr = table_ptr.dtype.element_ty == tl.float32
    weight_grad = tl.zeros([ROWS * G, V], tl.float32)
    bias_grad = tl.zeros([ROWS * G, V], tl.float32)
    weight_lost, bias_lost = weight_grad, bias_grad
    for first in range(0, count, ROWS):
        index = first + row
        there = index < count
        item = tl.load(ids_ptr + begin + index, there, 0).to(tl.int64)
        real = (item != 0)[:, None]
        line = (begin + index)[:, None] * D + channels
        grad = tl.load(grad_ptr + line, real, 0.0).to(tl.float32)
        age = count - 1 - index
        lam = _lambda(lam_ptr, lam_length, delta, seed, person, line, age, real, lane, channels, D, V, LAMBDA)
        shift_grad += lam * grad
        if dgrad_ptr is not None:
            dshift_grad += lam * tl.load(dgrad_ptr + line, real, 0.0).to(tl.float32)
        if norm_part_ptr is not None:
            e = tl.load(table_ptr + item[:, None] * D + channels, real, 0.0).to(tl.float32)
            if DROP:
                kept = _kept(seed, person, age, lane, drop_below, keep_scale, V)
                e *= kept
            normal, scale = _normalised(e, eps, G, EXACT)
            weight_grad, weight_lost = add_up(weight_grad, weight_lost, grad * normal, EXACT)
            bias_grad, bias_lost = add_up(bias_grad, bias_lost, grad, EXACT)
            if row_grad_ptr is not None:
                inner = grad * weight
                row_grad = scale * (inner - _row_means(inner, G) - normal * _row_means(inner * normal, G))
                if DROP:
                    row_grad *= kept
                tl.store(row_grad_ptr + line, row_grad, there[:, None])
    own = tl.arange(0, G)[:, None] * V + tl.arange(0, V)[None, :]
    tl.store(shift_grad_ptr + user * D + own, _over_rows(shift_grad, G))
    if dgrad_ptr is not None:
        tl.store(dshift_grad_ptr + user * D + own, _over_rows(dshift_grad, G))
    if norm_part_ptr is not None:
        tl.store(norm_part_ptr + user * 2 * D + own, _over_rows(weight_grad, G))
        tl.store(norm_part_ptr + user * 2 * D + D + own, _over_rows(bias_grad, G))


@triton.jit
def _dot(a, b, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """A product with float32 sums, its operands rounded to PRODUCT."""
    a, b = a.to(PRODUCT), b.to(PRODUCT)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return dot_by(a, b, PRECISION)


@triton.jit
def _waves(t, SCALE: tl.constexpr, D: tl.constexpr):
    """The sinusoids [U, D] of t [U], cosines first, and their derivatives; float32.

    Quarter turns are taken off in float64: angles reach SCALE radians, where float32 has steps of 6e-5.
    """
    channel = tl.arange(0, D)
    exponent = (channel % (D // 2)).to(tl.float64) * (-13.287712379549449 / (D // 2))  # log2 of 10,000
    frequency = tl.exp2(exponent) * SCALE
    ahead = tl.where(channel < D // 2, 1, 0)  # a cosine is a sine a quarter turn ahead
    quarters = t.to(tl.float64)[:, None] * (frequency * 0.6366197723675814)[None, :]
    whole = tl.floor(quarters + 0.5)
    x = ((quarters - whole) * 1.5707963267948966).to(tl.float32)
    wave, slope = _sine_cosine(x, whole.to(tl.int32) + ahead[None, :])
    return wave, slope * frequency.to(tl.float32)[None, :]


@triton.jit
def _spans(t_ptr, r_ptr, B, USERS: tl.constexpr):
    """The users of this program, which of them there are, t and r - t."""
    user = tl.program_id(0).to(tl.int64) * USERS + tl.arange(0, USERS)
    live = user < B
    t = tl.load(t_ptr + user, live, 0.0).to(tl.float32)
    return user, live, t, tl.load(r_ptr + user, live, 0.0).to(tl.float32) - t


@triton.jit
def _times(
    t_ptr, r_ptr, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr, z_ptr, dz_ptr, B,
    D: tl.constexpr, USERS: tl.constexpr, PART: tl.constexpr, SCALE: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Z of eq. (8) for USERS users, and its derivative along dt = 1, dr = 0: PART hidden units at a time."""
    if BEFORE:
        gdc_launch_dependents()
    user, live, t, gap = _spans(t_ptr, r_ptr, B, USERS)
    channel = tl.arange(0, D)
    waves, dwaves = _waves(t, SCALE, D)
    gap_waves, gap_dwaves = _waves(gap, SCALE, D)
    z = tl.zeros([USERS, D], tl.float32) + 2 * tl.load(out_bias_ptr + channel).to(tl.float32)[None, :]
    dz = tl.zeros([USERS, D], tl.float32)
    for first in range(0, D, PART):
        unit = first + tl.arange(0, PART)
        hidden = tl.load(hidden_ptr + unit[None, :] * D + channel[:, None])
        bias = tl.load(hidden_bias_ptr + unit).to(tl.float32)[None, :]
        out = tl.load(out_ptr + channel[None, :] * D + unit[:, None])
        h = _dot(waves, hidden, PRODUCT, PRECISION) + bias
        gap_h = _dot(gap_waves, hidden, PRODUCT, PRECISION) + bias
        s, gap_s = tl.sigmoid(h), tl.sigmoid(gap_h)
        z += _dot(h * s + gap_h * gap_s, out, PRODUCT, PRECISION)
        if dz_ptr is not None:
            dh = _dot(dwaves, hidden, PRODUCT, PRECISION)
            gap_dh = _dot(gap_dwaves, hidden, PRODUCT, PRECISION)
            da = s * (1 + h * (1 - s)) * dh - gap_s * (1 + gap_h * (1 - gap_s)) * gap_dh
            dz += _dot(da, out, PRODUCT, PRECISION)
    line = user[:, None] * D + channel[None, :]
    tl.store(z_ptr + line, z, live[:, None])
    if dz_ptr is not None:
        tl.store(dz_ptr + line, dz, live[:, None])


@triton.jit
def _times_backward(
    t_ptr, r_ptr, hidden_ptr, hidden_bias_ptr, out_ptr, grad_ptr, dgrad_ptr, part_ptr, B,
    D: tl.constexpr, USERS: tl.constexpr, PART: tl.constexpr, SCALE: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One row of partial sums for each USERS users: hidden [D, D], out [D, D], hidden's bias [D], out's bias [D].

    A program answers for PART hidden units: their rows of hidden, their columns of out.
    """
    user, live, t, gap = _spans(t_ptr, r_ptr, B, USERS)
    channel = tl.arange(0, D)
    unit = tl.program_id(1) * PART + tl.arange(0, PART)
    hidden = tl.load(hidden_ptr + unit[None, :] * D + channel[:, None])
    bias = tl.load(hidden_bias_ptr + unit).to(tl.float32)[None, :]
    out = tl.load(out_ptr + channel[:, None] * D + unit[None, :])
    line = user[:, None] * D + channel[None, :]
    grad = tl.load(grad_ptr + line, live[:, None], 0.0)
    waves, dwaves = _waves(t, SCALE, D)
    gap_waves, gap_dwaves = _waves(gap, SCALE, D)
    h = _dot(waves, hidden, PRODUCT, PRECISION) + bias
    gap_h = _dot(gap_waves, hidden, PRODUCT, PRECISION) + bias
    s, gap_s = tl.sigmoid(h), tl.sigmoid(gap_h)
    slope, gap_slope = s * (1 + h * (1 - s)), gap_s * (1 + gap_h * (1 - gap_s))
    a_grad = _dot(grad, out, PRODUCT, PRECISION)
    h_grad, gap_h_grad = a_grad * slope, a_grad * gap_slope
    out_part = _dot(tl.trans(grad), h * s + gap_h * gap_s, PRODUCT, PRECISION)
    if dgrad_ptr is not None:
        dgrad = tl.load(dgrad_ptr + line, live[:, None], 0.0)
        dh = _dot(dwaves, hidden, PRODUCT, PRECISION)
        gap_dh = _dot(gap_dwaves, hidden, PRODUCT, PRECISION)
        da_grad = _dot(dgrad, out, PRODUCT, PRECISION)
        h_grad += da_grad * s * (1 - s) * (2 + h * (1 - 2 * s)) * dh
        gap_h_grad -= da_grad * gap_s * (1 - gap_s) * (2 + gap_h * (1 - 2 * gap_s)) * gap_dh
        out_part += _dot(tl.trans(dgrad), slope * dh - gap_slope * gap_dh, PRODUCT, PRECISION)
    hidden_part = _dot(tl.trans(h_grad), waves, PRODUCT, PRECISION)
    hidden_part += _dot(tl.trans(gap_h_grad), gap_waves, PRODUCT, PRECISION)
    if dgrad_ptr is not None:
        hidden_part += _dot(tl.trans(da_grad * slope), dwaves, PRODUCT, PRECISION)
        hidden_part -= _dot(tl.trans(da_grad * gap_slope), gap_dwaves, PRODUCT, PRECISION)
    part_ptr += tl.program_id(0).to(tl.int64) * (2 * D * D + 2 * D)
    tl.store(part_ptr + unit[:, None] * D + channel[None, :], hidden_part)
    tl.store(part_ptr + D * D + channel[:, None] * D + unit[None, :], out_part)
    tl.store(part_ptr + 2 * D * D + unit, tl.sum(h_grad + gap_h_grad, 0))
    if tl.program_id(1) == 0:
        tl.store(part_ptr + 2 * D * D + D + channel, 2 * tl.sum(grad, 0))


@triton.jit
def _sums(part_ptr, sum_ptr, rows, columns, span, R: tl.constexpr, C: tl.constexpr):
    """Row i of the result [cdiv(rows, span), columns] is the sum of the i-th `span` rows of part [rows, columns].

    In float64, which these few sums do not feel: rounded once.
    """
    column = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, rows)
    total = tl.zeros([R, C], tl.float64)
    for start in range(first, last, R):
        row = start + tl.arange(0, R)
        where = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(part_ptr + where, (row < last)[:, None] & (column < columns)[None, :], 0.0)
    where = tl.program_id(1).to(tl.int64) * columns + column
    tl.store(sum_ptr + where, tl.sum(total, 0), column < columns)


@triton.jit
def _same_ids(ids_ptr, order_ptr, rows_ptr, sum_ptr, edge_ptr, count, D: tl.constexpr, CHUNK: tl.constexpr):
    """Sums the rows of equal ids within CHUNK places of the sorted order, as a product with a matrix of 0 and 1.

    A run of equal ids within the chunk is added to its id's row of the result; one that enters from the chunk before
    goes to edge[chunk, 0]; one that leaves into the next, to edge[chunk, 1].
    """
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    place = first + tl.arange(0, CHUNK)
    channel = tl.arange(0, D)
    item = tl.load(ids_ptr + place, place < count, 0).to(tl.int64)
    before = tl.load(ids_ptr + place - 1, (place > 0) & (place < count), -1).to(tl.int64)
    after = tl.load(ids_ptr + first + CHUNK, first + CHUNK < count, -1).to(tl.int64)
    row = tl.load(order_ptr + place, place < count, 0)
    values = tl.load(rows_ptr + row[:, None] * D + channel[None, :], (place < count)[:, None], 0.0)
    same = (item[:, None] == item[None, :]).to(values.dtype)
    sums = _dot(same, values, values.dtype, "tf32x3")
    begins = (item != before) & (item != 0)
    enters = (tl.arange(0, CHUNK) == 0) & (item == before) & (item != 0)
    leaves = begins & (item == after)
    result, whole = sum_ptr + item[:, None] * D + channel[None, :], (begins & (item != after))[:, None]
    tl.store(result, tl.load(result, whole, 0.0).to(tl.float32) + sums, whole)
    edge = edge_ptr + chunk * 2 * D + channel[None, :] + item[:, None] * 0
    tl.store(edge, sums, enters[:, None])
    tl.store(edge + D, sums, leaves[:, None])


@triton.jit
def _joined(ids_ptr, sum_ptr, edge_ptr, count, D: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Adds a run of equal ids that leaves its chunk: its own edge, and those of the chunks that it enters, in order."""
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    after = first + CHUNK
    item = tl.load(ids_ptr + after - 1, after < count, 0).to(tl.int64)
    channel = tl.arange(0, D)
    leaves = (item != 0) & (item == tl.load(ids_ptr + after, after < count, -1).to(tl.int64))
    begun = (first == 0) | (item != tl.load(ids_ptr + first - 1, first > 0, -1).to(tl.int64))
    if leaves & begun:
        total = tl.zeros([STEP, D], tl.float32)
        start = chunk + 1
        going = start * CHUNK < count
        while going:
            entered = start + tl.arange(0, STEP)
            inside = entered * CHUNK < count
            same = tl.load(ids_ptr + entered * CHUNK, inside, -1).to(tl.int64) == item
            total += tl.load(edge_ptr + entered[:, None] * 2 * D + channel[None, :], same[:, None], 0.0)
            going = tl.sum(same.to(tl.int32), 0) == STEP
            start += STEP
        own = tl.load(edge_ptr + chunk * 2 * D + D + channel)
        result = sum_ptr + item * D + channel
        tl.store(result, tl.load(result).to(tl.float32) + (own + tl.sum(total, 0)))


def _lanes(table, grad, shapes):
    """V, what a lane takes of a row: 16 bytes of the widest tensor that is streamed; and the rows of a tile."""
    v = 16 // max(table.element_size(), grad.element_size())
    return v, max(1, shapes["lanes"] * v // table.shape[1])


def launch_times(t, r, hidden, hidden_bias, out, out_bias, z, dz, *, scale, product, overlap, shapes):
    """z, and dz unless it is None: float32 [B, D], in products of the torch dtype `product`."""
    d = hidden.shape[0]
    _times[(triton.cdiv(len(t), shapes["users"]),)](
        t, r, hidden, hidden_bias, out, out_bias, z, dz, len(t), D=d, USERS=shapes["users"],
        PART=min(d, shapes["part"]), SCALE=scale, BEFORE=overlap, num_warps=shapes["num_warps"],
        num_stages=shapes["num_stages"], **_products(product, d),
    )  # fmt: skip


def launch_rows(
    ids, offsets, table, norm_weight, norm_bias, eps, x, keep, anchor, z, dx, dz, lam, mode, delta, seed, users,
    dropout, out, dout, *, count, overlap, shapes,
):  # fmt: skip
    """E into `out`, and its tangent into `dout` unless it is None; with `overlap` right behind `launch_times`."""
    d = table.shape[1]
    v, rows = _lanes(table, out, shapes)
    # A small batch is cut into more programs than users: the rows of a history do not know of each other.
    longest = len(ids) if ids.dim() == 1 else ids.shape[1]
    parts = max(1, min(triton.cdiv(longest, rows), triton.cdiv(shapes["programs"], count)))
    late = overlap and ids.numel() <= LATE_TILES * rows * parts * count
    _rows[(count, parts)](
        ids, offsets, 0 if ids.dim() == 1 else ids.shape[1], table, norm_weight, norm_bias, eps,
        x, keep, 0 if keep is None or keep.dim() == 1 else d, anchor, z, 0 if z.dim() == 1 else d, dx, dz,
        lam, lam.shape[0] if mode == SHARED else 0, delta, seed, users, *_dropped(dropout), out, dout,
        D=d, V=v, ROWS=rows, LAMBDA=mode, DROP=dropout > 0, AFTER=overlap, LATE=late, num_warps=shapes["num_warps"],
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip


def launch_rows_backward(
    ids, offsets, table, norm_weight, eps, lam, mode, delta, seed, users, dropout, grad, dgrad, shift_grad,
    dshift_grad, norm_part, row_grad, *, shapes,
):  # fmt: skip
    """The gradients of x_t + z and of its tangent [B, D], of the norm [B, 2 D] a user, and of the gathered rows."""
    d = table.shape[1]
    v, rows = _lanes(table, grad, shapes)
    _rows_backward[(len(shift_grad),)](
        ids, offsets, 0 if ids.dim() == 1 else ids.shape[1], table, norm_weight, eps,
        lam, lam.shape[0] if mode == SHARED else 0, delta, seed, users, *_dropped(dropout),
        grad, dgrad, shift_grad, dshift_grad, norm_part, row_grad,
        D=d, V=v, ROWS=rows, LAMBDA=mode, DROP=dropout > 0, num_warps=shapes["num_warps"],
    )  # fmt: skip


def launch_times_backward(t, r, hidden, hidden_bias, out, grad, dgrad, part, *, scale, product, shapes):
    """Partial sums [cdiv(B, users), 2 D D + 2 D] float32 of the gradients of hidden, out and their biases."""
    d = hidden.shape[0]
    width = min(d, shapes["part"])
    _times_backward[(len(part), d // width)](
        t, r, hidden, hidden_bias, out, grad, dgrad, part, len(t), D=d, USERS=shapes["users"], PART=width,
        SCALE=scale, num_warps=shapes["num_warps"], num_stages=1, **_products(product, d),
    )  # fmt: skip


def launch_sums(part, total, *, span, shapes):
    """The sum of every `span` rows of part [P, C] float32 into one row of total [cdiv(P, span), C]."""
    columns = part.shape[1]
    _sums[(triton.cdiv(columns, shapes["columns"]), triton.cdiv(len(part), span))](
        part, total, len(part), columns, span, R=shapes["rows"], C=shapes["columns"], num_warps=shapes["num_warps"]
    )


def launch_table_gradient(ids, order, row_grad, table_grad, edges, *, shapes):
    """Adds the rows of row_grad [total, D] to those of table_grad [N + 1, D] by id.

    ids are sorted, and `order` is what sorts them; edges is float32 [cdiv(total, chunk), 2, D], overwritten.
    """
    chunks, d = len(edges), table_grad.shape[1]
    _same_ids[(chunks,)](
        ids, order, row_grad, table_grad, edges, len(ids), D=d, CHUNK=shapes["chunk"], num_warps=shapes["num_warps"]
    )
    _joined[(chunks,)](ids, table_grad, edges, len(ids), D=d, CHUNK=shapes["chunk"], STEP=shapes["step"], num_warps=2)


def _dropped(dropout):
    below = min(round(dropout * 2**16), 2**16 - 1)
    return below, 2**16 / (2**16 - below)


def _products(dtype, d):
    name = str(dtype).removeprefix("torch.")
    return {"PRODUCT": getattr(tl, name), "PRECISION": float32_precision(d) if name == "float32" else "ieee"}
