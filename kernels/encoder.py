"""All transformer blocks of a batch of histories in one launch: the newest item's final state, f of eq. (10).

One program holds M rows: M / T histories in slots of T rows, T a power of two from 8 to M. A history fills its slot
from the end (its newest item is the slot's last row), and rows before its oldest item are masked. The residual stream
stays in float32 registers from the first block to the last; what a block reads is its weights.

A history's bits do not depend on M (64 or 128; smaller tiles use another instruction and split their sums otherwise),
on T, its slot or its neighbours: a product's row sees that row alone, and attention sums over all M keys with exact
zeros at the keys of others, in an order that is fixed relative to a multiple of eight keys. (Only a NaN or an infinity
spreads: zero times it is NaN.)

On an H200 (bf16, D = 128, 4 blocks, L = 50), M = 64 takes 54 us at B = 1, 135 at 512 and 980 at 4,096. Each of a
block's 12 steps is a chain of products and of arithmetic that waits for them; two programs share a multiprocessor and
fill about 40 % of its tensor cores' time and a third of its issue slots. M = 128 reads half the weights and is slower,
162 us and 1,195: its two groups of warps meet at every barrier and so wait together.

The last block answers for the newest rows alone: its feed-forward runs on 16 rows, row j standing for whatever newest
row there is among the tile's rows j M / 16 to (j + 1) M / 16 - 1. (Its attention does not: a loop that mixes products
of 16 and of 64 rows is not pipelined, and waits for every weight.)

Weights are one matrix of rows of D channels, block after block: for each head its C query, C key and C value rows and
its C rows of the transposed output projection; then the F rows of the feed-forward's first matrix and the F of its
transposed second, doubled (`_half_gelu`). Queries and keys interleave the channels (i, i + C / 2) of a rotary pair, so
that a pair is two neighbours, which one thread holds.
"""

import triton
import triton.language as tl
from fave_fast.kernels.products import dot as _dot
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)
NEWEST = tl.constexpr(16)  # rows of the last block: the tensor cores' smallest product
MASKED = tl.constexpr(-1e30)


@triton.jit
def _half_gelu(y, EXACT: tl.constexpr):
    """gelu(x) / 2 = x Phi(x) / 2 of x = 4 y.

    Unless EXACT, Phi(x) = (1 + tanh(x p(x^2))) / 2 with p a least-maximum fit: |error of gelu| < 2.9e-5, and one
    instruction of the special-function unit, whose own error (2^-11 of tanh) stays under bf16's rounding of the result.
    p would turn back beyond x = 8, so x^2 stops at 16: in these units at 1, where saturation is free.
    """
    if EXACT:
        return y * (1.0 + tl.erf(y * 2.8284271247461903))
    square = tl.inline_asm_elementwise("mul.sat.f32 $0, $1, $1;", "=f,f", [y], tl.float32, is_pure=True, pack=1)
    inner = y * (3.189956496 + square * (2.3675455104 + square * -0.356818897))
    tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [inner], tl.float32, is_pure=True, pack=1)
    return y + y * tanh


@triton.jit
def _norm(h, gain_ptr, D: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm or LayerNorm of rows [*, D]; gain [D], then bias [D]."""
    channel = tl.arange(0, D)
    gain = tl.load(gain_ptr + channel)[None, :]
    if LAYER:
        centred = h - (tl.sum(h, 1) * (1.0 / D))[:, None]
        scale = tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / D) + EPS)
        return centred * scale[:, None] * gain + tl.load(gain_ptr + D + channel)[None, :]
    return h * tl.rsqrt(tl.sum(h * h, 1) * (1.0 / D) + EPS)[:, None] * gain


@triton.jit
def _turn(x, cos, sin, M: tl.constexpr, C: tl.constexpr):
    """Rotate the pairs of neighbours of x [M, C] by the angles of cos and sin [M, C / 2]."""
    first, second = tl.split(tl.reshape(x, [M, C // 2, 2]))
    return tl.reshape(tl.join(first * cos - second * sin, first * sin + second * cos), [M, C])


@triton.jit
def _tile(weights, row, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """ROWS rows of the weights from `row` on: by the copy engine, or by the threads."""
    if TMA:
        tile = weights.load([row, 0])
    else:
        tile = tl.load(weights + (row * D + tl.arange(0, ROWS)[:, None] * D + tl.arange(0, D)[None, :]))
    return tile


@triton.jit
def _project(
    x, pairs, parts, at, cos, sin,
    M: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROTARY: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values [M, C] of one head, whose weights begin at row `at`."""
    # One product for two results: the wait after each costs as much as a product of 32 columns.
    qk = _dot(x, tl.trans(_tile(pairs, at, 2 * C, D, TMA)))
    v = _dot(x, tl.trans(_tile(parts, at + 2 * C, C, D, TMA)))
    q, k = tl.split(tl.permute(tl.reshape(qk, [M, 2, C]), [0, 2, 1]))
    if ROTARY:
        q = _turn(q, cos, sin, M, C)
        k = _turn(k, cos, sin, M, C)
    return q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)


@triton.jit
def _newest(x, age, M: tl.constexpr, W: tl.constexpr):
    """The newest rows of x [M, W] as NEWEST rows, each where its part of the tile is; zeros where a part has none."""
    return tl.sum(tl.reshape(tl.where((age == 0)[:, None], x, 0.0), [NEWEST, M // NEWEST, W]), 1)


@triton.jit
def _add_dot(h, a, b, EXACT: tl.constexpr):
    """H + a b."""
    if EXACT:
        h += _dot(a, b)  # float32: rounded once at the size of h, not at every step of the product
    else:
        h = tl.dot(a, b, h)
    return h


@triton.jit
def _attend(q, k, v, query_slot, key_slot, age, SCALE: tl.constexpr, CAUSAL: tl.constexpr):
    """Attention of q [M, C] on k, v [M, C] of the same slot; float32 [M, C]."""
    scores = _dot(q, tl.trans(k))
    allowed = query_slot[:, None] == key_slot[None, :]
    if CAUSAL:
        allowed &= age[:, None] <= age[None, :]
    scores = tl.where(allowed, scores, MASKED)
    # A row without any key would have infinite minus infinite; this way it has zeros, and spoils no other by NaN.
    top = tl.maximum(tl.max(scores, 1), MASKED / 2)
    if q.dtype == tl.float32:
        p = tl.exp2((scores - top[:, None]) * (SCALE * LOG2_E))  # no rounding at the size of the scores
    else:
        p = tl.exp2(scores * (SCALE * LOG2_E) - (top * (SCALE * LOG2_E))[:, None])
    return _dot(p.to(v.dtype), v) * (1.0 / tl.maximum(tl.sum(p, 1), 0.5))[:, None]


@triton.jit
def _feed_forward(
    h, x, weights, at,
    D: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """H + gelu(4 x W1) (W2 / 2) for rows [R, D]; W1 and W2 begin at row `at` of the weights."""
    for chunk in tl.range(0, F // CHUNK, num_stages=STAGES):
        first = _tile(weights, at + chunk * CHUNK, CHUNK, D, TMA)
        second = _tile(weights, at + F + chunk * CHUNK, CHUNK, D, TMA)
        hidden = _half_gelu(_dot(x, tl.trans(first)), EXACT).to(x.dtype)
        h = _add_dot(h, hidden, second, EXACT)
    return h


@triton.jit
def _slot(row, shift, EXACT: tl.constexpr):
    """Row >> shift.

    Unless EXACT, by assembly, which LLVM leaves alone: of many such shifts it made vectors, in which it shifted the
    thread's number 31 bits up, into the neighbour. With eight warps, loads were then at odd addresses.
    """
    if EXACT:
        slot = row >> shift
    else:
        slot = tl.inline_asm_elementwise("shr.s32 $0, $1, $2;", "=r,r,r", [row, shift], tl.int32, is_pure=True, pack=1)
    return slot


@triton.jit
def _places(
    bounds_ptr, ids_ptr, order_ptr, first, count, shift, L, B, longest,
    M: tl.constexpr, EXACT: tl.constexpr, PADDED: tl.constexpr, IDS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """For each of a program's rows: its row in the input (int64), its age, and whether an item is there."""
    row = tl.arange(0, M)
    slot = _slot(row, shift, EXACT)
    age = ((1 << shift) - 1) & ~row
    index = first + slot
    live = (slot < count) & (index < B)
    user = tl.where(live, index, 0)
    if ORDERED:
        user = tl.load(order_ptr + user, live, 0)
    if PADDED:
        end = (user + 1).to(tl.int64) * L
        n = tl.zeros([M], tl.int32) + L
        if not IDS:
            n = tl.load(bounds_ptr + user, live, 0).to(tl.int32)
    else:
        end = tl.load(bounds_ptr + user + 1, live, 0).to(tl.int64)
        n = (end - tl.load(bounds_ptr + user, live, 0).to(tl.int64)).to(tl.int32)
    source = end - 1 - age
    present = live & (age < tl.minimum(n, longest))
    if PADDED and IDS:
        present &= tl.load(ids_ptr + source, present, 0) != 0
    return source, age, present


@triton.jit
def _embed(
    ids_ptr, table_ptr, norm_ptr, shift_ptr, scale_ptr, source, age, present, slot, anchor, longest,
    M: tl.constexpr, D: tl.constexpr, ANCHOR: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """E [M, D] of eq. (9) from ids: LayerNorm(e) + a[age] (+ b[age] * the anchor's embedding), zeros where no item is.

    a = lambda (x_0 + z) without the anchor's part, b = lambda m, both float32 by age.
    """
    channel = tl.arange(0, D)[None, :]
    item = tl.load(ids_ptr + source, present, 0).to(tl.int64)
    embedded = tl.load(table_ptr + item[:, None] * D + channel).to(tl.float32)
    e = _norm(embedded, norm_ptr, D, True, EPS)
    known = tl.minimum(age, longest - 1)[:, None] * D + channel
    e += tl.load(shift_ptr + known)
    if ANCHOR:
        # How many items the row's history has, counted in its slot.
        n = tl.sum((slot[:, None] == tl.where(present, slot, -1)[None, :]).to(tl.int32), 1)
        oldest_first = tl.minimum((anchor * n.to(tl.float32)).to(tl.int32), n - 1)
        which = source + age - (n - 1 - oldest_first)
        anchor_item = tl.load(ids_ptr + which, present, 0).to(tl.int64)
        e += tl.load(scale_ptr + known) * tl.load(table_ptr + anchor_item[:, None] * D + channel).to(tl.float32)
    return tl.where(present[:, None], e, 0.0)


@triton.jit(do_not_specialize=["anchor", "longest", "L", "B", "blocks", "uniform_shift"])
def _encode(
    input_ptr, bounds_ptr, order_ptr, programs_ptr, pairs, parts, chunks, norms_ptr, cos_ptr, sin_ptr, out_ptr,
    table_ptr, input_norm_ptr, shift_ptr, scale_ptr, anchor, longest, L, B, blocks, uniform_shift,
    M: tl.constexpr, D: tl.constexpr, H: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    LAYER: tl.constexpr, EPS: tl.constexpr, ROTARY: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr,
    INPUT_EPS: tl.constexpr, TMA: tl.constexpr, IDS: tl.constexpr, ANCHOR: tl.constexpr, PADDED: tl.constexpr,
    ORDERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    C: tl.constexpr = D // H
    SCALE: tl.constexpr = C**-0.5
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    pid = tl.program_id(0)
    if ORDERED:
        first = tl.load(programs_ptr + 3 * pid)
        count = tl.load(programs_ptr + 3 * pid + 1)
        shift = tl.load(programs_ptr + 3 * pid + 2)
        if count == 0:
            return
    else:
        shift = uniform_shift
        count = M >> shift
        first = pid * count
    source, age, present = _places(
        bounds_ptr, input_ptr, order_ptr, first, count, shift, L, B, longest, M, EXACT, PADDED, IDS, ORDERED
    )
    slot = _slot(tl.arange(0, M), shift, EXACT)
    key_slot = tl.where(present, slot, -1)
    channel = tl.arange(0, D)
    if IDS:
        h = _embed(
            input_ptr, table_ptr, input_norm_ptr, shift_ptr, scale_ptr, source, age, present, slot, anchor, longest,
            M, D, ANCHOR, INPUT_EPS,
        )  # fmt: skip
    else:
        h = tl.load(input_ptr + source[:, None] * D + channel[None, :], present[:, None], 0.0).to(tl.float32)
    cos, sin = 0.0, 0.0
    if ROTARY:
        turn = tl.minimum(age, longest - 1)[:, None] * (C // 2) + tl.arange(0, C // 2)[None, :]
        cos = tl.load(cos_ptr + turn)
        sin = tl.load(sin_ptr + turn)

    at = 0
    gain_ptr = norms_ptr
    for block in tl.range(0, blocks, num_stages=1):
        x = _norm(h, gain_ptr, D, LAYER, EPS).to(dtype)
        for head in tl.range(0, H, num_stages=STAGES):
            q, k, v = _project(x, pairs, parts, at + head * (4 * C), cos, sin, M, D, C, ROTARY, TMA)
            o = _attend(q, k, v, slot, key_slot, age, SCALE, CAUSAL)
            out_weights = _tile(parts, at + head * (4 * C) + 3 * C, C, D, TMA)
            h = _add_dot(h, o.to(dtype), out_weights, EXACT)
        if block < blocks - 1:
            x = _norm(h, gain_ptr + 2 * D, D, LAYER, EPS).to(dtype)
            h = _feed_forward(h, x, chunks, at + 4 * D, D, F, CHUNK, STAGES, EXACT, TMA)
            at += 4 * D + 2 * F
            gain_ptr += 4 * D

    h = _newest(h, age, M, D)
    x = _norm(h, gain_ptr + 2 * D, D, LAYER, EPS).to(dtype)
    h = _feed_forward(h, x, chunks, at + 4 * D, D, F, CHUNK, STAGES, EXACT, TMA)
    f = _norm(h, gain_ptr + 4 * D, D, LAYER, EPS)
    # A history without items has zeros: its rows saw whatever else was in the tile.
    items = tl.sum(tl.reshape(((age == 0) & present).to(tl.int32), [NEWEST, M // NEWEST]), 1)
    f = tl.where((items > 0)[:, None], f, 0.0)

    # Row j holds a user's newest row if its last tile row ends a slot.
    query = tl.arange(0, NEWEST)
    query_slot = (query * (M // NEWEST)) >> shift
    after = (query + 1) * (M // NEWEST)
    done = first + query_slot
    keep = ((after & ((1 << shift) - 1)) == 0) & (query_slot < count) & (done < B)
    done = tl.where(keep, done, 0)
    if ORDERED:
        done = tl.load(order_ptr + done, keep, 0)
    where = done.to(tl.int64)[:, None] * D + channel[None, :]
    tl.store(out_ptr + where, f.to(out_ptr.dtype.element_ty), keep[:, None])


@triton.jit
def _plan(
    offsets_ptr, order_ptr, programs_ptr, B, P,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A counting sort of the users by the slot that their history fills, and how many of them a program takes."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    user = tl.arange(0, BLOCK)
    live = user < B
    n = tl.load(offsets_ptr + user + 1, live, 0) - tl.load(offsets_ptr + user, live, 0)
    shift = tl.full([BLOCK], SMALLEST, tl.int32)
    for step in tl.static_range(SMALLEST, LARGEST):
        shift += (n > (1 << step)).to(tl.int32)
    program = tl.arange(0, PROGRAMS)
    first = tl.zeros([PROGRAMS], tl.int32)
    count = tl.zeros([PROGRAMS], tl.int32)
    shifts = tl.full([PROGRAMS], SMALLEST, tl.int32)
    users_done, programs_done = 0, 0
    for step in tl.static_range(LARGEST - SMALLEST + 1):
        size = LARGEST - step
        mine = (live & (shift == size)).to(tl.int32)
        tl.store(order_ptr + users_done + tl.cumsum(mine, 0) - 1, user, mine != 0)
        users = tl.sum(mine, 0)
        taken = (program - programs_done) << (LARGEST - size)  # of these users, by the programs before
        here = (program >= programs_done) & (taken < users)
        first = tl.where(here, users_done + taken, first)
        count = tl.where(here, tl.minimum(users - taken, 1 << (LARGEST - size)), count)
        shifts = tl.where(here, size, shifts)
        users_done += users
        programs_done += (users + (1 << (LARGEST - size)) - 1) >> (LARGEST - size)
    keep = program < P
    tl.store(programs_ptr + 3 * program, first, keep)
    tl.store(programs_ptr + 3 * program + 1, count, keep)
    tl.store(programs_ptr + 3 * program + 2, shifts, keep)


def plan(offsets, order, programs, *, rows, smallest, pdl):
    """Fill `order` int32 [B] and `programs` int32 [P, 3] for the histories between `offsets` [B + 1]."""
    _plan[(1,)](
        offsets, order, programs, len(order), len(programs),
        BLOCK=triton.next_power_of_2(max(1, len(order))), PROGRAMS=triton.next_power_of_2(len(programs)),
        SMALLEST=smallest.bit_length() - 1, LARGEST=rows.bit_length() - 1, PDL=pdl, num_warps=8,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def encode(
    rows, bounds, order, programs, matrices, norms, cos, sin, out, table, input_norm, shift, scale, anchor,
    *, padded_length, longest, heads, hidden, blocks, slot_rows, layer_norm, eps, input_eps, rotary, causal, exact,
    tma, pdl, M, CHUNK, num_warps, num_stages,
):  # fmt: skip
    """One launch, from `rows` to `out` [B, D].

    `rows` is E, or with `table` the ids, of packed histories or of ones padded to `padded_length`. `bounds` are offsets
    or lengths, None for padded ids, whose zeros say where no item is. `order` int32 [B] and `programs` int32 [P, 3]
    give a program's first user in `order`, how many it has, and log2 of its slots' rows; without them the users' own
    order is kept, in slots of `slot_rows`.
    """
    users, d = out.shape
    ids = table is not None
    uniform_shift = slot_rows.bit_length() - 1
    grid = (triton.cdiv(users, M >> uniform_shift) if programs is None else len(programs),)
    parts = (2 * d // heads, d // heads, CHUNK)
    weights = [TensorDescriptor.from_tensor(matrices, [rows_of, d]) if tma else matrices for rows_of in parts]
    _encode[grid](
        rows, rows if bounds is None else bounds,
        out if order is None else order, out if programs is None else programs,
        *weights, norms, cos, sin, out, table if ids else out, input_norm if ids else norms,
        shift if ids else norms, scale if scale is not None else norms,
        anchor, longest, padded_length or 0, users, blocks, uniform_shift,
        M=M, D=d, H=heads, F=hidden, CHUNK=CHUNK, STAGES=num_stages,
        LAYER=layer_norm, EPS=eps, ROTARY=rotary, CAUSAL=causal, EXACT=exact,
        INPUT_EPS=input_eps, TMA=tma, IDS=ids, ANCHOR=scale is not None, PADDED=padded_length is not None,
        ORDERED=programs is not None, PDL=pdl, num_warps=num_warps, num_stages=num_stages,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
