"""What a training step does to whole numbers: histories out of the log, and the outputs that L_src reads.

Each launch takes the place of a dozen or two of PyTorch's, which cost a step more than the work in them.
"""

import triton
import triton.language as tl


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
def _window_rows(items_ptr, ends_ptr, offsets_ptr, ids_ptr, owners_ptr, users_ptr, count, LONGEST: tl.constexpr):
    """One history's items, and whose they are."""
    history = tl.program_id(0)
    begin, end = tl.load(offsets_ptr + history), tl.load(offsets_ptr + history + 1)
    row = begin + tl.arange(0, LONGEST)
    last = tl.load(ends_ptr + tl.minimum(history, count - 1))
    item = tl.load(items_ptr + (last - end) + row, row < tl.where(history < count, end, begin), 0)
    tl.store(ids_ptr + row, item.to(tl.int64), row < end)
    tl.store(owners_ptr + row, tl.zeros([LONGEST], tl.int64) + history, row < end)
    tl.store(users_ptr + history, history)


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
    tl.store(sums_ptr + 2 * history, tl.sum(wanted * wanted + unwanted * unwanted, 0))
    tl.store(sums_ptr + 2 * history + 1, tl.sum(live.to(tl.float32) + lone.to(tl.float32), 0))


def pack_windows(items, starts, ends, offsets, ids, owners, users, *, longest):
    """Write offsets [B + F + 1], ids and owners [rows] and users [B + F], all int64, for histories of up to `longest`.

    items integers [M]; starts and ends int64 [B].
    """
    count, users_count = len(starts), len(users)
    _window_offsets[(1,)](
        starts, ends, offsets, count, users_count - count, len(ids), longest,
        BLOCK=triton.next_power_of_2(users_count), num_warps=4,
    )  # fmt: skip
    _window_rows[(users_count,)](
        items, ends, offsets, ids, owners, users, count, LONGEST=triton.next_power_of_2(longest), num_warps=1
    )


def pick(outputs, ids, offsets, drawn, places, errors, sums, *, count, longest):
    """Write places int64 [2 rows], errors float32 [2 rows] and sums float32 [B + F, 2] of outputs [B, width].

    ids and drawn int64 [rows], offsets int64 [B + F + 1].
    """
    block = triton.next_power_of_2(longest)
    _pick[(len(sums),)](
        outputs, ids, offsets, drawn, places, errors, sums, count, len(ids), outputs.shape[1],
        LONGEST=block, CHUNK=min(block, 32), num_warps=2,
    )  # fmt: skip
