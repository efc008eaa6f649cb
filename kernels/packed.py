"""What a training step does around the network: histories out of the log, and L_src's decoder but for its product.

Each launch takes the place of a dozen or two of PyTorch's, which cost a step more than the work in them.
"""

import triton
import triton.language as tl
from fave_fast.kernels.products import dot_by, float32_precision


@triton.jit(do_not_specialize=["count", "fillers", "rows", "longest"])
def _window_offsets(starts_ptr, ends_ptr, offsets_ptr, count, fillers, rows, longest, BLOCK: tl.constexpr):
    """Where each history begins, by one program."""
    place = tl.arange(0, BLOCK)
    real = place < count
    length = tl.load(ends_ptr + place, real, 0) - tl.load(starts_ptr + place, real, 0)
    length = tl.minimum(length, longest)
    left = rows - tl.sum(length, 0)
    share = (left + tl.maximum(place - count, 0)) // tl.maximum(fillers, 1)
    length = tl.where(real, length, tl.where(place < count + fillers, share, 0))
    tl.store(offsets_ptr + 1 + place, tl.cumsum(length, 0), place < count + fillers)
    tl.store(offsets_ptr + place, tl.zeros([BLOCK], tl.int64), place == 0)


@triton.jit(do_not_specialize=["count"])
def _window_rows(
    items_ptr, ends_ptr, offsets_ptr, ids_ptr, owners_ptr, users_ptr, newest_ptr, of_newest_ptr, count,
    LONGEST: tl.constexpr,
):  # fmt: skip
    """One history's items, whose they are, and where the newest one is."""
    history = tl.program_id(0)
    begin, end = tl.load(offsets_ptr + history), tl.load(offsets_ptr + history + 1)
    row = begin + tl.arange(0, LONGEST)
    last = tl.load(ends_ptr + tl.minimum(history, count - 1))
    item = tl.load(items_ptr + (last - end) + row, row < tl.where(history < count, end, begin), 0)
    tl.store(ids_ptr + row, item.to(tl.int64), row < end)
    tl.store(owners_ptr + row, tl.zeros([LONGEST], tl.int64) + history, row < end)
    tl.store(users_ptr + history, history)
    tl.store(newest_ptr + history, tl.maximum(end - 1, 0))
    tl.store(of_newest_ptr + row, tl.where(row == end - 1, history, -1), row < end)


@triton.jit(do_not_specialize=["count", "rows"])
def _pick(
    outputs_ptr, ids_ptr, offsets_ptr, drawn_ptr, places_ptr, errors_ptr, sums_ptr, count, rows, width,
    LONGEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One history's outputs at its items and at what was drawn beside them."""
    history = tl.program_id(0)
    begin, end = tl.load(offsets_ptr + history), tl.load(offsets_ptr + history + 1)
    row = begin + tl.arange(0, LONGEST)
    here, live = row < end, row < tl.where(history < count, end, begin)
    other = tl.load(drawn_ptr + row, here, 0)
    met = tl.zeros([LONGEST], tl.int32)
    for start in range(0, LONGEST, CHUNK):
        some = begin + start + tl.arange(0, CHUNK)
        item = tl.load(ids_ptr + some, some < end, 0)
        met = tl.maximum(met, tl.max((other[:, None] == item[None, :]).to(tl.int32), 1))
    lone = live & (met == 0)
    first = history.to(tl.int64) * width
    place = tl.where(live, first + tl.load(ids_ptr + row, here, 0), 0)
    beside = tl.where(live, first + other, 0)
    wanted = tl.where(live, tl.load(outputs_ptr + place, live, 0.0).to(tl.float32) - 1.0, 0.0)
    unwanted = tl.load(outputs_ptr + beside, lone, 0.0).to(tl.float32)
    tl.store(places_ptr + row, place, here)
    tl.store(places_ptr + rows + row, beside, here)
    tl.store(errors_ptr + row, wanted, here)
    tl.store(errors_ptr + rows + row, unwanted, here)
    # Each kind of sum in a row: PyTorch adds up numbers that lie next to each other in half the time.
    tl.store(sums_ptr + history, tl.sum(wanted * wanted + unwanted * unwanted, 0))
    counted = tl.sum(live.to(tl.float32) + lone.to(tl.float32), 0)
    tl.store(sums_ptr + tl.num_programs(0) + history, counted)


@triton.jit
def _tanh(x):
    """To 3e-7 of the result, near 0 too: there by the series."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    power = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - power) / (1.0 + power)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -far, far))


@triton.jit
def _decoder(
    source_ptr, first_ptr, first_bias_ptr, second_ptr, second_bias_ptr, one_ptr, two_ptr, out_ptr, count,
    D: tl.constexpr, PAD: tl.constexpr, USERS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both hidden layers of USERS users, PART units of the first at a time."""
    user = tl.program_id(0).to(tl.int64) * USERS + tl.arange(0, USERS)
    live, channel = (user < count)[:, None], tl.arange(0, D)
    line = user[:, None] * D + channel[None, :]
    source = tl.load(source_ptr + line, live, 0.0).to(tl.float32)
    a = tl.zeros([USERS, D], tl.float32) + tl.load(second_bias_ptr + channel)[None, :]
    for start in range(0, D, PART):
        unit = start + tl.arange(0, PART)
        first = tl.load(first_ptr + unit[None, :] * D + channel[:, None])
        second = tl.load(second_ptr + channel[None, :] * D + unit[:, None])
        one = _tanh(dot_by(source, first, PRECISION) + tl.load(first_bias_ptr + unit)[None, :])
        tl.store(one_ptr + user[:, None] * D + unit[None, :], one, live)
        a += dot_by(one, second, PRECISION)
    two = _tanh(a)
    tl.store(two_ptr + line, two, live)
    wide = user[:, None] * (D + PAD)
    tl.store(out_ptr + wide + channel[None, :], two.to(out_ptr.dtype.element_ty), live)
    rest = tl.arange(0, PAD)[None, :]
    ones = tl.where(rest == 0, 1.0, 0.0) + tl.zeros([USERS, PAD], tl.float32)
    tl.store(out_ptr + wide + D + rest, ones.to(out_ptr.dtype.element_ty), live)


@triton.jit
def _decoder_backward(
    source_ptr, first_ptr, second_ptr, one_ptr, two_ptr, grad_ptr, source_grad_ptr, part_ptr, count,
    D: tl.constexpr, PAD: tl.constexpr, USERS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The source's gradients, and a row of partial sums: first [D, D], second [D, D], first's bias [D], second's."""
    user = tl.program_id(0).to(tl.int64) * USERS + tl.arange(0, USERS)
    live, channel = (user < count)[:, None], tl.arange(0, D)
    line = user[:, None] * D + channel[None, :]
    source = tl.load(source_ptr + line, live, 0.0).to(tl.float32)
    two = tl.load(two_ptr + line, live, 0.0)
    grad = tl.load(grad_ptr + user[:, None] * (D + PAD) + channel[None, :], live, 0.0).to(tl.float32)
    grad *= 1.0 - two * two
    part_ptr += tl.program_id(0).to(tl.int64) * (2 * D * D + 2 * D)
    tl.store(part_ptr + 2 * D * D + D + channel, tl.sum(grad, 0))
    source_grad = tl.zeros([USERS, D], tl.float32)
    for start in range(0, D, PART):
        unit = start + tl.arange(0, PART)
        one = tl.load(one_ptr + user[:, None] * D + unit[None, :], live, 0.0)
        second = tl.load(second_ptr + channel[:, None] * D + unit[None, :])
        first = tl.load(first_ptr + unit[:, None] * D + channel[None, :])
        inner = dot_by(grad, second, PRECISION) * (1.0 - one * one)
        source_grad += dot_by(inner, first, PRECISION)
        tl.store(part_ptr + unit[:, None] * D + channel[None, :], dot_by(tl.trans(inner), source, PRECISION))
        tl.store(part_ptr + D * D + channel[:, None] * D + unit[None, :], dot_by(tl.trans(grad), one, PRECISION))
        tl.store(part_ptr + 2 * D * D + unit, tl.sum(inner, 0))
    tl.store(source_grad_ptr + line, source_grad.to(source_grad_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["count"])
def _add_rows(ids_ptr, grad_ptr, sum_ptr, count, D: tl.constexpr, CHUNK: tl.constexpr):
    """All rows of one id, added up in their order, to its row of the result, by the program of the first of them."""
    own, channel = tl.program_id(0), tl.arange(0, D)
    item = tl.load(ids_ptr + own)
    before = 0
    for start in range(0, own, CHUNK):
        place = start + tl.arange(0, CHUNK)
        before += tl.sum((tl.load(ids_ptr + place, place < own, -1) == item).to(tl.int32), 0)
    if (before == 0) & (item != 0):
        total = tl.zeros([CHUNK, D], tl.float32)
        for start in range(own, count, CHUNK):
            place = start + tl.arange(0, CHUNK)
            same = tl.load(ids_ptr + place, place < count, -1) == item
            total += tl.load(grad_ptr + place[:, None] * D + channel[None, :], same[:, None], 0.0)
        result = sum_ptr + item * D + channel
        tl.store(result, tl.load(result) + tl.sum(total, 0))


@triton.jit
def _pad(
    weight_ptr, bias_ptr, padded_ptr, rows, D: tl.constexpr, D_BLOCK: tl.constexpr, PAD: tl.constexpr,
    BACK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rows of weights, a bias and zeros; BACK from gradients of such rows those of weights and biases."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channel, rest = tl.arange(0, D_BLOCK), tl.arange(0, PAD)
    real = (row < rows)[:, None] & (channel < D)[None, :]
    narrow = row[:, None] * D + channel[None, :]
    wide = row[:, None] * (D + PAD) + channel[None, :]
    if BACK:
        tl.store(weight_ptr + narrow, tl.load(padded_ptr + wide, real, 0.0).to(weight_ptr.dtype.element_ty), real)
        bias = tl.load(padded_ptr + row * (D + PAD) + D, row < rows, 0.0)
        tl.store(bias_ptr + row, bias.to(bias_ptr.dtype.element_ty), row < rows)
    else:
        there = (row < (rows + 7) // 8 * 8)[:, None]
        weight = tl.load(weight_ptr + narrow, real, 0.0).to(padded_ptr.dtype.element_ty)
        tl.store(padded_ptr + wide, weight, there & (channel < D)[None, :])
        bias = tl.load(bias_ptr + row, row < rows, 0.0).to(padded_ptr.dtype.element_ty)
        bias = tl.where((rest == 0)[None, :], bias[:, None], 0.0).to(padded_ptr.dtype.element_ty)
        tl.store(padded_ptr + row[:, None] * (D + PAD) + D + rest[None, :], bias, there)


def add_rows(ids, grad, total):
    """Add the rows of grad float32 [B, D] by ids int64 [B] to those of total float32 [N + 1, D]; not of id 0."""
    count, d = grad.shape
    _add_rows[(count,)](ids, grad, total, count, D=d, CHUNK=32, num_warps=4)


def pad(weight, bias, padded, *, back):
    """Weights [N, D] and biases [N] into padded [N up to whole 8, D + P], zeros beside them; `back` out of it."""
    rows, d = weight.shape
    _pad[(triton.cdiv(len(padded), 32),)](
        weight, bias, padded, rows, D=d, D_BLOCK=triton.next_power_of_2(d), PAD=padded.shape[1] - d, BACK=back, BM=32,
        num_warps=4,
    )  # fmt: skip


def _precision(result, d):
    """What beside a result of 16 bits is lost by tf32, its rounding hides."""
    return "tf32" if result.element_size() == 2 else float32_precision(d)


def _users(d, shapes):
    return {
        "USERS": shapes["users"], "PART": min(d, shapes["part"]), "num_warps": shapes["num_warps"], "num_stages": 1,
    }  # fmt: skip


def decoder(source, first, first_bias, second, second_bias, one, two, out, *, shapes):
    """Write one = tanh(source first^T + first_bias), two = tanh(one second^T + second_bias) and out.

    out [B, D + P] is two, a column of ones and zeros up to P; source is [B, D], the weights are float32 [D, D], the
    biases [D], one and two float32 [B, D]. `shapes`: users, part, num_warps.
    """
    count, d = source.shape
    _decoder[(triton.cdiv(count, shapes["users"]),)](
        source, first, first_bias, second, second_bias, one, two, out, count, D=d, PAD=out.shape[1] - d,
        PRECISION=_precision(out, d), **_users(d, shapes),
    )  # fmt: skip


def decoder_backward(source, first, second, one, two, grad, source_grad, part, *, shapes):
    """From the gradients of `decoder`'s out write the source's [B, D], and partial sums of the parameters'.

    part is float32 [cdiv(B, users), 2 D D + 2 D]: first, second and their biases.
    """
    count, d = source.shape
    _decoder_backward[(len(part),)](
        source, first, second, one, two, grad, source_grad, part, count, D=d, PAD=grad.shape[1] - d,
        PRECISION=_precision(grad, d), **_users(d, shapes),
    )  # fmt: skip


def pack_windows(items, starts, ends, offsets, ids, owners, users, newest, of_newest, *, longest):
    """Write offsets [B + F + 1], ids and owners [rows], users and newest [B + F], and of_newest int32 [rows].

    All but the last are int64. Of histories of up to `longest` items; items integers [M]; starts and ends int64 [B].
    """
    count, users_count = len(starts), len(users)
    _window_offsets[(1,)](
        starts, ends, offsets, count, users_count - count, len(ids), longest,
        BLOCK=triton.next_power_of_2(users_count), num_warps=4,
    )  # fmt: skip
    _window_rows[(users_count,)](
        items, ends, offsets, ids, owners, users, newest, of_newest, count, LONGEST=triton.next_power_of_2(longest),
        num_warps=1,
    )  # fmt: skip


def pick(outputs, ids, offsets, drawn, places, errors, sums, *, count, longest):
    """Write places int64 [2 rows], errors float32 [2 rows] and sums float32 [2, B + F] of outputs [B, width].

    ids and drawn int64 [rows], offsets int64 [B + F + 1].
    """
    block = triton.next_power_of_2(longest)
    _pick[(sums.shape[1],)](
        outputs, ids, offsets, drawn, places, errors, sums, count, len(ids), outputs.shape[1],
        LONGEST=block, CHUNK=min(block, 32), num_warps=2,
    )  # fmt: skip
