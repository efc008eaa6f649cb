"""The exact top K of a catalogue by inner product, without a matrix of scores.

A tournament instead of a threshold. Cut the ids 1 to N into groups of neighbours and order the groups by (largest
score descending, index ascending): every one of the top K items, ordered by (score descending, id ascending), stands in
one of the first K groups. For if K groups come before an item's group, the best item of each comes before that item.
The same holds of groups within spans of neighbouring groups. So:

1. `scan` reads the table once and keeps of every group, and of every span, the largest score.
2. `finish`, one program a row, chooses K spans, of their groups K groups, computes the scores of these groups' items
   again and chooses K of them.

A list of hundreds is too much for one program: of K = 1,000 it reads 16,000 items' rows, and a multiprocessor takes 64
bytes a cycle. Three launches in place of `finish` do the same by the same functions:

2. `choose`, one program a row, chooses spans and groups;
3. `rescore`, some programs a row, lists those of the chosen groups' items that reach what the K-th item reaches;
4. `rank`, one program a row, chooses K of them and sorts them.

Nothing depends on how scores are spread: no threshold that data can defeat, no list that can overflow, and no order of
arrival: what `rescore` lists differs item by item and is sorted. A group's largest score is, bit for bit, the score of
one of its items, and a row's list is the same in any batch, because the matrix units of an H200 give the same bits in
every tile shape and with their operands exchanged (a test looks), and ordinary float32 products add up in the order of
the columns.

Excluded ids: the maximum of a group that holds one is only an upper bound. Such groups are taken out of the tournament,
and those whose bound reaches the last chosen maximum are added to the chosen ones.

Scores are compared as integers in the same order; the bits of a NaN count as those of -inf, those of -0 as those of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Cut:
    """How a catalogue and its lists are cut.

    Attributes:
        k: K, at most 1,024.
        wanted: groups that are chosen at least, if there are so many: K, or more of groups that have upper bounds only.
        capacity: groups and spans that are chosen at most, at least `wanted`.
        group: items of a group, a power of two, at most a tile's.
        tiles: tiles of the catalogue, the last one perhaps not full.
        spans: spans of the catalogue, 0 where groups are few enough to be chosen from at once.
        tiles_of_chunk: tiles that one program of `scan` takes, whole spans.
        tiles_of_span: tiles of a span.
        span_width: maxima that the choice of spans holds in registers, a power of two.
        group_width: likewise that of groups.
        parts: programs of `rescore` a row, or 0 where `finish` makes the lists.
    """

    k: int
    wanted: int
    capacity: int
    group: int
    tiles: int
    spans: int
    tiles_of_chunk: int
    tiles_of_span: int
    span_width: int
    group_width: int
    parts: int


@dataclass(frozen=True)
class Certified:
    """What becomes of lists by upper bounds.

    Attributes:
        flags: int32 [B]: 1 where a list is not certain, else 0.
        counts: int64 [2]: how many lists there were, and how many of them were not certain; added to.
    """

    flags: Tensor
    counts: Tensor


BUFFERS = ("group_max", "span_max", "bounds", "chosen_spans", "chosen_groups", "entries")

_HEAD = tl.constexpr(5)  # int32 a row: clean groups, groups, the least key, one above all, and how many entries
_LOWEST = tl.constexpr(-2139095041)  # the key of -inf: anything above it is a candidate
_EMPTY = tl.constexpr(-8388608)  # the bits of -inf
_LAST_ID = tl.constexpr(0x7FFFFFFF)
_NO_ENTRY = tl.constexpr(-(1 << 63))


@triton.jit
def _order(x):
    """float32 -> int32 in the same order, NaN as -inf and -0 as 0."""
    x = tl.where(x == x, x, -float("inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    """The float32 of a key of `_order`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _product_in_parts(
    queries,
    items,
    queries_present,
    D: tl.constexpr,
    DP: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of the rows at `queries` [M] and `items` [N], pointers, BK columns at a time.

    For float32, whose products are ordinary multiplications: they add up in the order of the columns in any tile, and
    whole rows do not fit into registers.
    """
    total = tl.zeros([M, N], tl.float32)
    for at in tl.range(0, DP, BK, num_stages=STAGES):
        column = at + tl.arange(0, BK)
        q = tl.load(queries[:, None] + column, mask=queries_present[:, None] & (column < D), other=0.0)
        x = tl.load(items[:, None] + column, mask=(column < D)[None, :], other=0.0)
        total = tl.dot(q, x.T, total, input_precision="ieee")
    return total


@triton.jit
def _group_maxima(scores, M: tl.constexpr, GROUPS: tl.constexpr, G: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the GPU's maximum passes over a NaN, NumPy's does not
        scores = tl.where(scores == scores, scores, -float("inf"))
    return tl.max(tl.reshape(scores, [M, GROUPS, G]), axis=2)


@triton.jit(do_not_specialize=["rows", "items", "tiles", "spans", "tiles_of_chunk", "tiles_of_span"])
def scan(
    queries,
    table,
    table_tiles,
    deny,
    flags,
    group_max,
    span_max,
    rows,
    items,
    tiles,
    spans,
    tiles_of_chunk,
    tiles_of_span,
    D: tl.constexpr,
    DP: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
    SPANS: tl.constexpr,
    DENY: tl.constexpr,
    FLAGGED: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    OVERLAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Group maxima [rows, tiles * BN / G], and where SPANS the maxima [rows, spans] of `tiles_of_span` tiles each.

    A program takes M rows and a chunk of tiles, whole spans. The programs of one chunk start side by side, so that all
    but the first read its tiles from L2. FLAGGED: it does nothing unless one of its rows has a flag.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    GROUPS: tl.constexpr = BN // G
    row_blocks = tl.cdiv(rows, M)
    chunk = tl.program_id(0) // row_blocks
    row = (tl.program_id(0) % row_blocks) * M + tl.arange(0, M)
    column = tl.arange(0, DP)
    present = row < rows
    row = row.to(tl.int64)
    if BK == DP:
        q = tl.load(queries + row[:, None] * D + column, mask=present[:, None] & (column < D), other=0.0)
    first = chunk * tiles_of_chunk
    stop = tl.minimum(first + tiles_of_chunk, tiles)
    if FLAGGED:
        stop = tl.where(tl.max(tl.load(flags + row, mask=present, other=0), axis=0) > 0, stop, first)
    full = tl.minimum(stop, items // BN)
    group_row = group_max + (row * tiles * GROUPS)[:, None] + tl.arange(0, GROUPS)
    span_row = span_max + row * spans
    item = tl.arange(0, BN)
    best = tl.full([M], -float("inf"), tl.float32)
    for tile in tl.range(first, full, num_stages=STAGES):
        at = table + (1 + tile * BN + item).to(tl.int64) * D
        if BK < DP:
            scores = _product_in_parts(queries + row * D, at, present, D, DP, BK, M, BN, STAGES)
        else:
            if TMA:
                x = table_tiles.load([tile * BN, 0])
            elif D == DP:
                x = tl.load(at[:, None] + column)
            else:
                x = tl.load(at[:, None] + column, mask=(column < D)[None, :], other=0.0)
            scores = tl.dot(q, x.T)
        if DENY:
            denied = tl.load(deny + 1 + tile * BN + item)
            scores = tl.where(denied[None, :] != 0, -float("inf"), scores)
        maxima = _group_maxima(scores, M, GROUPS, G, INTERPRETED)
        tl.store(group_row + tile * GROUPS, maxima, mask=present[:, None])
        if SPANS:
            span = tile // tiles_of_span
            starts = tile == span * tiles_of_span
            best = tl.maximum(tl.where(starts, -float("inf"), best), tl.max(maxima, axis=1))
            tl.store(span_row + span, best, mask=present)
    if full < stop:
        tile = full
        here = item < items - tile * BN
        at = table + tl.minimum(1 + tile * BN + item, items).to(tl.int64) * D
        if BK < DP:
            scores = _product_in_parts(queries + row * D, at, present, D, DP, BK, M, BN, STAGES)
        else:
            scores = tl.dot(q, tl.load(at[:, None] + column, mask=(column < D)[None, :], other=0.0).T)
        if DENY:
            here = here & (tl.load(deny + 1 + tile * BN + item, mask=here, other=1) == 0)
        maxima = _group_maxima(tl.where(here[None, :], scores, -float("inf")), M, GROUPS, G, INTERPRETED)
        tl.store(group_row + tile * GROUPS, maxima, mask=present[:, None])
        if SPANS:
            span = tile // tiles_of_span
            starts = tile == span * tiles_of_span
            best = tl.maximum(tl.where(starts, -float("inf"), best), tl.max(maxima, axis=1))
            tl.store(span_row + span, best, mask=present)


@triton.jit
def _maxima(at, count, values, spans, width, groups, SHIFT: tl.constexpr, NESTED: tl.constexpr):
    """Keys and indices of values[at], or, NESTED, of the groups of `spans`, `width` each, one span after the other.

    SHIFT is the power of two that the width is, or -1: division takes twenty instructions a key.
    """
    valid = at < count
    index = at
    if NESTED:
        slot = at >> SHIFT if SHIFT >= 0 else at // width
        index = tl.load(spans + slot, mask=valid, other=0) * width + (at - slot * width)
        valid = valid & (index < groups)
    return _order(tl.load(values + index, mask=valid, other=-float("inf"))), index


@triton.jit
def _cuts(low, high):
    """Two keys that cut an interval at about its thirds; both lie within it where it holds more than one key."""
    step = tl.maximum((high >> 2) - (low >> 2) + (high >> 4) - (low >> 4), 1)
    return tl.minimum(low + step, high - 1), tl.minimum(low + 2 * step, high - 1)


@triton.jit
def _cuts_of_both_signs(low, high):
    """As `_cuts`, but where the interval holds 0: its middle, and three octaves below its upper end.

    Keys follow exponents, and half of all numbers lie between -1 and 1: the search takes 4.7 steps instead of 8.3 where
    some of 12,504 maxima of normal numbers are negative.
    """
    cut_1, cut_2 = _cuts(low, high)
    both = (low < 0) & (high > 0)
    middle = (low >> 1) + (high >> 1)
    near = high - (3 << 23)
    cut_1 = tl.where(both, tl.maximum(tl.minimum(middle, near), low + 1), cut_1)
    cut_2 = tl.where(both, tl.minimum(tl.maximum(tl.maximum(middle, near), low + 1), high - 1), cut_2)
    return cut_1, cut_2


@triton.jit
def _two_counts(keys, cut_1, cut_2):
    """How many of at most 2^15 keys reach each cut: both counts in one sum."""
    both = tl.sum(tl.where(keys >= cut_1, 1, 0) + tl.where(keys >= cut_2, 0x10000, 0), axis=0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _narrow(low, high, reach_low, reach_high, cut_1, cut_2, reach_1, reach_2, k):
    """The part of the interval that holds the k-th largest key, and how many keys reach its ends."""
    upper = reach_2 >= k
    middle = reach_1 >= k
    reach_high = tl.where(upper, reach_high, tl.where(middle, reach_2, reach_1))
    reach_low = tl.where(upper, reach_2, tl.where(middle, reach_1, reach_low))
    high = tl.where(upper, high, tl.where(middle, cut_2, cut_1))
    low = tl.where(upper, cut_2, tl.where(middle, cut_1, low))
    return low, high, reach_low, reach_high


@triton.jit
def _choose_maxima(
    values,
    count,
    chosen,
    spans,
    width,
    groups,
    low,
    high,
    k,
    capacity,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    NESTED: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Write to `chosen`, ascending, the indices of the first k maxima by (value descending, index ascending).

    A few more, up to `capacity`, where that ends the search sooner. NESTED: the values are those of the groups of
    `spans`, at least k of them reach `low` if there are so many, and none reaches `high`. The first WIDTH keys stay in
    registers.

    Returns how many; a key that all of them reach and, unless there are fewer than k, that the k-th best item reaches
    too; and a key that none reaches.
    """
    lane = tl.arange(0, WIDTH)
    keys, index = _maxima(lane, count, values, spans, width, groups, SHIFT, NESTED)
    if NESTED:
        reach_low = tl.sum((keys >= low).to(tl.int32), axis=0)
        for at in range(WIDTH, count, WIDTH):
            more, _ = _maxima(at + lane, count, values, spans, width, groups, SHIFT, NESTED)
            reach_low += tl.sum((more >= low).to(tl.int32), axis=0)
    else:
        reach_low = tl.sum((keys > _LOWEST).to(tl.int32), axis=0)
        low = tl.min(tl.where(keys > _LOWEST, keys, 0x7FFFFFFF), axis=0)
        high = tl.max(keys, axis=0)
        for at in range(WIDTH, count, WIDTH):
            more, _ = _maxima(at + lane, count, values, spans, width, groups, SHIFT, NESTED)
            reach_low += tl.sum((more > _LOWEST).to(tl.int32), axis=0)
            low = tl.minimum(low, tl.min(tl.where(more > _LOWEST, more, 0x7FFFFFFF), axis=0))
            high = tl.maximum(high, tl.max(more, axis=0))
        high += 1
    above_all = high
    reach_high = reach_low * 0
    while (reach_low > capacity) & (low < high - 1):
        if SIGNS:
            cut_1, cut_2 = _cuts_of_both_signs(low, high)
        else:
            cut_1, cut_2 = _cuts(low, high)
        reach_1, reach_2 = _two_counts(keys, cut_1, cut_2)
        for at in range(WIDTH, count, WIDTH):
            more, _ = _maxima(at + lane, count, values, spans, width, groups, SHIFT, NESTED)
            more_1, more_2 = _two_counts(more, cut_1, cut_2)
            reach_1 += more_1
            reach_2 += more_2
        low, high, reach_low, reach_high = _narrow(low, high, reach_low, reach_high, cut_1, cut_2, reach_1, reach_2, k)
    # Either all that reach `low` fit, or `low` is the k-th key itself and the first of its equals fill the rest.
    fits = reach_low <= capacity
    cut = tl.where(fits, low - 1, low)
    equals = tl.where(fits, 0, k - reach_high)
    above_before = reach_low * 0
    equal_before = reach_low * 0
    for at in range(0, count, WIDTH):
        if at > 0:
            keys, index = _maxima(at + lane, count, values, spans, width, groups, SHIFT, NESTED)
        both = tl.where(keys > cut, 1, 0) + tl.where(keys == cut, 0x10000, 0)
        upto = tl.cumsum(both, axis=0)
        equal_upto = equal_before + (upto >> 16)
        place = above_before + (upto & 0xFFFF) + tl.minimum(equal_upto, equals) - 1
        taken = (keys > cut) | ((keys == cut) & (equal_upto <= equals))
        tl.store(chosen + place, index, mask=taken)
        if at + WIDTH < count:
            both_sum = tl.sum(both, axis=0)
            above_before += both_sum & 0xFFFF
            equal_before += both_sum >> 16
    tl.debug_barrier()
    number = tl.where(fits, reach_low, k)
    return number, tl.where(number >= k, low, _LOWEST + 1), above_all


@triton.jit
def _choose_entries(entries, fill, k, SIZE: tl.constexpr):
    """Keep the k largest of `fill` > k distinct entries, at the front; returns the least of them."""
    lane = tl.arange(0, SIZE)
    entry = tl.load(entries + lane, mask=lane < fill, other=_NO_ENTRY)
    low = tl.min(tl.where(lane < fill, entry, 0x7FFFFFFFFFFFFFFF), axis=0)
    high = tl.max(entry, axis=0) + 1
    reach_low = fill
    reach_high = fill * 0
    while (reach_low > k) & (low < high - 1):
        cut_1, cut_2 = _cuts(low, high)
        reach_1, reach_2 = _two_counts(entry, cut_1, cut_2)
        low, high, reach_low, reach_high = _narrow(low, high, reach_low, reach_high, cut_1, cut_2, reach_1, reach_2, k)
    kept = entry >= low
    place = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.debug_barrier()
    tl.store(entries + place, entry, mask=kept)
    tl.debug_barrier()
    return low


@triton.jit
def _take_out(
    excluded_ids,
    begin,
    end,
    group_max,
    span_max,
    bounds,
    items,
    groups,
    width,
    G: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Set the maxima of groups with an excluded id to -inf, and those of their spans to what is left.

    The exchange gives a group's bound to exactly one of its excluded ids: bounds[i] belongs to the group of id i.
    """
    lane = tl.arange(0, 64)
    group_bits = group_max.to(tl.pointer_type(tl.int32), bitcast=True)
    for at in range(begin, end, 64):
        item = tl.load(excluded_ids + at + lane, mask=at + lane < end, other=0)
        within = (item >= 1) & (item <= items)
        group = ((item - 1) // G).to(tl.int32)
        bits = tl.atomic_xchg(group_bits + group, tl.full([64], _EMPTY, tl.int32), mask=within, sem="relaxed")
        bound = bits.to(tl.float32, bitcast=True)
        tl.store(bounds + at + lane, tl.where(within, bound, -float("inf")), mask=at + lane < end)
    tl.debug_barrier()
    if SPANS:
        column = tl.arange(0, 16)
        for at in range(begin, end, 64):
            bound = tl.load(bounds + at + lane, mask=at + lane < end, other=-float("inf"))
            item = tl.load(excluded_ids + at + lane, mask=at + lane < end, other=1)
            group = tl.where(bound > -float("inf"), (item - 1) // G, 0).to(tl.int32)
            span = group // width
            # A span keeps its maximum unless a group that had it went. (Another lane may have written the new one.)
            changes = (bound > -float("inf")) & (bound >= tl.load(span_max + span))
            best = tl.full([64], -float("inf"), tl.float32)
            for offset in range(0, width, 16):
                other = (span * width)[:, None] + offset + column
                within = (offset + column < width) & (other < groups)
                value = tl.load(group_max + other, mask=changes[:, None] & within, other=-float("inf"))
                best = tl.maximum(best, tl.max(tl.where(value == value, value, -float("inf")), axis=1))
            tl.store(span_max + span, best, mask=changes)
        tl.debug_barrier()


@triton.jit
def _is_certain(last, all_chosen, least, above_all, group_max, G: tl.constexpr):
    """Whether no item of a group that was not chosen comes before the K-th entry, `last`.

    All chosen groups reach `least`, and no other exceeds it. Equals of it may be among those, but where it is the
    largest of all, the chosen ones are the first of their equals: then an item that reaches it in a chosen group comes
    before all items of groups that were not chosen. (So it is where the query is zero.)
    """
    key = (last >> 32).to(tl.int32)
    group = tl.maximum(((last & _LAST_ID) ^ _LAST_ID) - 1, 0) // G
    listed = key > _LOWEST
    bound = _order(tl.load(group_max + group, mask=listed, other=-float("inf")))
    equals = (key == least) & (above_all - 1 == least) & (bound == least)
    return all_chosen | (listed & ((key > least) | equals))


@triton.jit
def _choose_groups(
    excluded_ids,
    begin,
    end,
    group_max,
    span_max,
    bounds,
    chosen_spans,
    chosen_groups,
    wanted,
    capacity,
    items,
    groups_at_all,
    spans,
    width,
    G: tl.constexpr,
    SPAN_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    SPANS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """Write to `chosen_groups` those of a row: first groups without an excluded id, then groups with some.

    Returns how many of the first kind; of both; and a key that the first reach, and one that none reaches, as
    `_choose_maxima` does.
    """
    if EXCLUDE:
        _take_out(excluded_ids, begin, end, group_max, span_max, bounds, items, groups_at_all, width, G, SPANS)
    if SPANS:
        count, low, above_all = _choose_maxima(
            span_max, spans, chosen_spans, chosen_spans, 1, spans, 0, 0, wanted, capacity, SPAN_WIDTH, 0, False, SIGNS
        )
        clean, least, _ = _choose_maxima(
            group_max, count * width, chosen_groups, chosen_spans, width, groups_at_all, low, above_all, wanted,
            capacity, WIDTH, SHIFT, True, SIGNS,
        )  # fmt: skip
    else:
        clean, least, above_all = _choose_maxima(
            group_max, groups_at_all, chosen_groups, chosen_spans, 1, groups_at_all, 0, 0, wanted, capacity, WIDTH, 0,
            False, SIGNS,
        )  # fmt: skip
    groups = clean
    if EXCLUDE:
        lane = tl.arange(0, 128)
        for at in range(begin, end, 128):
            bound = _order(tl.load(bounds + at + lane, mask=at + lane < end, other=-float("inf")))
            item = tl.load(excluded_ids + at + lane, mask=at + lane < end, other=1)
            reaches = bound >= least
            place = tl.cumsum(reaches.to(tl.int32), axis=0)
            tl.store(chosen_groups + groups + place - 1, ((item - 1) // G).to(tl.int32), mask=reaches)
            groups += tl.sum(reaches.to(tl.int32), axis=0)
        tl.debug_barrier()
    return clean, groups, least, above_all


@triton.jit
def _keys(
    query,
    q,
    table,
    item,
    items,
    D: tl.constexpr,
    DP: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
):
    """Keys of the scores of R items, ids beyond the last one as the last, for the query whose M copies `q` holds."""
    rows = table + tl.minimum(item, items).to(tl.int64) * D
    if BK < DP:
        scores = _product_in_parts(query + tl.zeros([M], tl.int64), rows, tl.arange(0, M) >= 0, D, DP, BK, M, R, 2)
        key = _order(tl.max(scores, axis=0))
    else:
        column = tl.arange(0, DP)
        if D == DP:
            x = tl.load(rows[:, None] + column)
        else:
            x = tl.load(rows[:, None] + column, mask=(column < D)[None, :], other=0.0)
        key = _order(tl.max(tl.dot(x, q.T), axis=1))
    return key


@triton.jit
def _not_excluded(kept, item, excluded_ids, first, end):
    """Which of the kept items are not among the excluded ids from `first` on."""
    for other in range(first, end, 16):
        index = other + tl.arange(0, 16)
        excluded = tl.load(excluded_ids + index, mask=index < end, other=0)
        kept = kept & (tl.sum((item[:, None] == excluded[None, :]).to(tl.int32), axis=1) == 0)
    return kept


@triton.jit
def _entry(key, item):
    """A key over an id that counts down: entries differ, and the larger one comes first."""
    return (key.to(tl.int64) << 32) | (item ^ _LAST_ID).to(tl.int64)


@triton.jit
def _certify(last, all_chosen, least, above_all, group_max, flags, counts, counted, G: tl.constexpr):
    """Write the flag of a row whose K-th entry is `last`, and count the row, if it is `counted`."""
    certain = _is_certain(last, all_chosen, least, above_all, group_max, G)
    tl.store(flags, 1 - certain.to(tl.int32))
    if counted:
        tl.atomic_add(counts, 1, sem="relaxed")
        tl.atomic_add(counts + 1, 1 - certain.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["k", "wanted", "capacity", "items", "groups_at_all", "spans", "width"])
def finish(
    queries,
    table,
    deny,
    excluded_ids,
    excluded_offsets,
    flags,
    counts,
    group_max,
    span_max,
    bounds,
    chosen_spans,
    chosen_groups,
    entries,
    scores_out,
    ids_out,
    k,
    wanted,
    capacity,
    items,
    groups_at_all,
    spans,
    width,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    SPAN_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    BUFFER: tl.constexpr,
    RANKED: tl.constexpr,
    SPANS: tl.constexpr,
    DENY: tl.constexpr,
    EXCLUDE: tl.constexpr,
    CERTIFY: tl.constexpr,
    FLAGGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The list of one row from its maxima.

    CERTIFY: these are upper bounds, and the row's flag says whether the list is not certain. FLAGGED: a row without a
    flag has its list.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if FLAGGED and tl.load(flags + row) == 0:
        return
    column = tl.arange(0, DP)
    group_max += row * groups_at_all
    span_max += row * spans
    chosen_groups += row * capacity
    entries += row * BUFFER
    query = queries + row * D
    # All M rows are this one, the least that a matrix instruction takes; any column of the product is the result.
    q = tl.load(query + column, mask=column < D, other=0.0)
    q = tl.broadcast_to(q[None, :], [M, DP])
    begin = 0
    end = 0
    if EXCLUDE:
        begin = tl.load(excluded_offsets + row)
        end = tl.load(excluded_offsets + row + 1)
        chosen_groups += begin
    if SPANS:
        chosen_spans += row * capacity
    clean, groups, least, above_all = _choose_groups(
        excluded_ids, begin, end, group_max, span_max, bounds, chosen_spans, chosen_groups, wanted, capacity, items,
        groups_at_all, spans, width, G, SPAN_WIDTH, WIDTH, SHIFT, SPANS, EXCLUDE, False,
    )  # fmt: skip

    # The K-th score may be below bounds that K groups reach.
    floor = (clean * 0 + _LOWEST + 1 if CERTIFY else least).to(tl.int64) << 32
    fill = groups * 0
    total = groups * G
    lane = tl.arange(0, R)
    for at in range(0, total, R):
        place = at + lane
        group = tl.load(chosen_groups + place // G, mask=place < total, other=0)
        item = group * G + place % G + 1
        valid = (place < total) & (item <= items)
        key = _keys(query, q, table, item, items, D, DP, BK, M, R)
        if DENY:
            valid = valid & (tl.load(deny + item, mask=valid, other=1) == 0)
        entry = _entry(key, item)
        kept = valid & (key > _LOWEST) & (entry >= floor)
        if EXCLUDE:
            # Groups without an excluded id came first; from `clean` on each item is looked up.
            kept = _not_excluded(kept, item, excluded_ids, tl.where(at + R > clean * G, begin, end), end)
        tl.store(entries + fill + tl.cumsum(kept.to(tl.int32), axis=0) - 1, entry, mask=kept)
        fill += tl.sum(kept.to(tl.int32), axis=0)
        tl.debug_barrier()
        if fill > RANKED:
            floor = _choose_entries(entries, fill, k, BUFFER)
            fill = k

    lane = tl.arange(0, RANKED)
    entry = tl.load(entries + lane, mask=lane < fill, other=_NO_ENTRY)
    rank = tl.zeros([RANKED], tl.int32)
    for at in range(0, fill, 8):
        for ahead in tl.static_range(8):
            other = tl.load(entries + at + ahead, mask=at + ahead < fill, other=_NO_ENTRY)
            rank += (other > entry).to(tl.int32)
    listed = (lane < fill) & (rank < k)
    tl.store(scores_out + row * k + rank, _number((entry >> 32).to(tl.int32)), mask=listed)
    tl.store(ids_out + row * k + rank, (entry & _LAST_ID) ^ _LAST_ID, mask=listed)
    missing = (lane >= fill) & (lane < k)
    tl.store(scores_out + row * k + lane, tl.full([RANKED], -float("inf"), tl.float32), mask=missing)
    tl.store(ids_out + row * k + lane, tl.zeros([RANKED], tl.int64), mask=missing)
    if CERTIFY:
        last = tl.max(tl.where(listed & (rank == k - 1), entry, _NO_ENTRY), axis=0)
        counted = tl.max(tl.max((q != 0).to(tl.int32), axis=1), axis=0) > 0
        _certify(last, clean < wanted, least, above_all, group_max, flags + row, counts, counted, G)


@triton.jit(do_not_specialize=["wanted", "capacity", "items", "tiles", "spans", "tiles_of_span"])
def choose(
    excluded_ids,
    excluded_offsets,
    flags,
    group_max,
    span_max,
    bounds,
    chosen_spans,
    chosen_groups,
    heads,
    wanted,
    capacity,
    items,
    tiles,
    spans,
    tiles_of_span,
    OF_TILE: tl.constexpr,
    G: tl.constexpr,
    SPAN_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    SPANS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The chosen groups of one row from its maxima, and its head. FLAGGED: of a row with a flag."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    groups_at_all = tiles * OF_TILE  # so that the compiler knows where rows of maxima start: it reads four at once
    if FLAGGED and tl.load(flags + row) == 0:
        return
    chosen_groups += row * capacity
    begin = 0
    end = 0
    if EXCLUDE:
        begin = tl.load(excluded_offsets + row)
        end = tl.load(excluded_offsets + row + 1)
        chosen_groups += begin
    clean, groups, least, above_all = _choose_groups(
        excluded_ids, begin, end, group_max + row * groups_at_all, span_max + row * spans, bounds,
        chosen_spans + row * capacity, chosen_groups, wanted, capacity, items, groups_at_all, spans,
        tiles_of_span * OF_TILE, G, SPAN_WIDTH, WIDTH, SHIFT, SPANS, EXCLUDE, True,
    )  # fmt: skip
    heads += row * _HEAD
    tl.store(heads, clean)
    tl.store(heads + 1, groups)
    tl.store(heads + 2, least)
    tl.store(heads + 3, above_all)
    tl.store(heads + 4, 0)


@triton.jit
def _list(entries, fill, key, item, kept):
    """Append the kept items to the `fill` entries of a row, beside other programs that do."""
    upto = tl.cumsum(kept.to(tl.int32), axis=0)
    start = tl.atomic_add(fill, tl.max(upto, axis=0), sem="relaxed")
    tl.store(entries + start + upto - 1, _entry(key, item), mask=kept)


@triton.jit(do_not_specialize=["capacity", "items", "parts"])
def rescore(
    queries,
    table,
    deny,
    excluded_ids,
    excluded_offsets,
    flags,
    chosen_groups,
    heads,
    entries,
    capacity,
    items,
    parts,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
    DENY: tl.constexpr,
    EXCLUDE: tl.constexpr,
    CERTIFY: tl.constexpr,
    FLAGGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The entries of the items of the chosen groups that reach the row's least key. CERTIFY, FLAGGED: as in `finish`.

    The programs of a row take every `parts`-th R items. No barrier stands between one R and the next, so that the next
    ones' rows are fetched ahead.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    if FLAGGED and tl.load(flags + row) == 0:
        return
    heads += row * _HEAD
    clean = tl.load(heads) * G
    total = clean
    if EXCLUDE:
        total = tl.load(heads + 1) * G
    least = tl.load(heads + 2)
    if CERTIFY:  # the K-th score may be below bounds that K groups reach
        least = least * 0 + _LOWEST + 1
    first = row * capacity
    if EXCLUDE:
        first += tl.load(excluded_offsets + row)
    chosen_groups += first
    entries += first * G
    query = queries + row * D
    column = tl.arange(0, DP)
    q = tl.load(query + column, mask=column < D, other=0.0)
    q = tl.broadcast_to(q[None, :], [M, DP])
    lane = tl.arange(0, R)
    for at in tl.range(part * R, clean, parts * R, num_stages=STAGES):
        place = at + lane
        item = tl.load(chosen_groups + place // G, mask=place < clean, other=0) * G + place % G + 1
        key = _keys(query, q, table, item, items, D, DP, BK, M, R)
        valid = (place < clean) & (item <= items)
        if DENY:
            valid = valid & (tl.load(deny + item, mask=valid, other=1) == 0)
        _list(entries, heads + 4, key, item, valid & (key >= least))
    if EXCLUDE:
        begin = tl.load(excluded_offsets + row)
        end = tl.load(excluded_offsets + row + 1)
        for at in tl.range(clean + part * R, total, parts * R):
            place = at + lane
            item = tl.load(chosen_groups + place // G, mask=place < total, other=0) * G + place % G + 1
            key = _keys(query, q, table, item, items, D, DP, BK, M, R)
            valid = _not_excluded((place < total) & (item <= items), item, excluded_ids, begin, end)
            if DENY:
                valid = valid & (tl.load(deny + item, mask=valid, other=1) == 0)
            _list(entries, heads + 4, key, item, valid & (key >= least))


@triton.jit(do_not_specialize=["k", "wanted", "capacity", "tiles"])
def rank(
    queries,
    excluded_offsets,
    flags,
    counts,
    group_max,
    heads,
    entries,
    scores_out,
    ids_out,
    k,
    wanted,
    capacity,
    tiles,
    OF_TILE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    RANKED: tl.constexpr,
    EXCLUDE: tl.constexpr,
    CERTIFY: tl.constexpr,
    FLAGGED: tl.constexpr,
    PDL: tl.constexpr,
):
    """The list of one row from its entries. CERTIFY, FLAGGED: as in `finish`.

    There are hardly more than K, unless many scores are equal or neighbours are alike: twice RANKED fit into registers,
    the rest follows C at a time.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if FLAGGED and tl.load(flags + row) == 0:
        return
    SIZE: tl.constexpr = 2 * RANKED
    first = row * capacity
    if EXCLUDE:
        first += tl.load(excluded_offsets + row)
    entries += first * G
    heads += row * _HEAD
    total = tl.load(heads + 4)
    fill = tl.minimum(total, SIZE)
    at = fill
    lane = tl.arange(0, C)
    while fill > RANKED:
        floor = _choose_entries(entries, fill, k, SIZE)
        fill = total * 0 + k
        while (at < total) & (fill <= SIZE - C):
            entry = tl.load(entries + at + lane, mask=at + lane < total, other=_NO_ENTRY)
            kept = entry >= floor
            upto = tl.cumsum(kept.to(tl.int32), axis=0)
            tl.store(entries + fill + upto - 1, entry, mask=kept)  # what stood there is among the K or was left out
            fill += tl.max(upto, axis=0)
            at += C
        tl.debug_barrier()
    lane = tl.arange(0, RANKED)
    entry = tl.sort(tl.load(entries + lane, mask=lane < fill, other=_NO_ENTRY), descending=True)
    listed = lane < fill
    score = tl.where(listed, _number((entry >> 32).to(tl.int32)), -float("inf"))
    tl.store(scores_out + row * k + lane, score, mask=lane < k)
    tl.store(ids_out + row * k + lane, tl.where(listed, (entry & _LAST_ID) ^ _LAST_ID, 0), mask=lane < k)
    if CERTIFY:
        column = tl.arange(0, DP)
        q = tl.load(queries + row * D + column, mask=column < D, other=0.0)
        counted = tl.max((q != 0).to(tl.int32), axis=0) > 0
        last = tl.max(tl.where(listed & (lane == k - 1), entry, _NO_ENTRY), axis=0)
        clean, least, above_all = tl.load(heads), tl.load(heads + 2), tl.load(heads + 3)
        group_max += row * tiles * OF_TILE
        _certify(last, clean < wanted, least, above_all, group_max, flags + row, counts, counted, G)


def launch_lists(
    queries: Tensor,
    table: Tensor,
    deny: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    buffers: dict[str, Tensor],
    scores: Tensor,
    ids: Tensor,
    *,
    cut: Cut,
    of_tile: int,
    shapes: dict[str, dict[str, int]],
    certified: Certified | None = None,
    flags: Tensor | None = None,
) -> None:
    """The lists of maxima in `buffers`, by `finish` or by `choose`, `rescore` and `rank`.

    Args:
        queries: as in `score_topk`, and so is all that is not named here.
        table: as above.
        deny: as above.
        excluded: as above.
        buffers: as above.
        scores: as above.
        ids: as above.
        cut: as above.
        of_tile: groups of a tile.
        shapes: as `list_shapes`.
        certified: for maxima that are upper bounds: which lists are certain is written there.
        flags: as above.
    """
    rows, d = queries.shape
    items, groups = len(table) - 1, cut.tiles * of_tile
    padded = max(16, triton.next_power_of_2(d))
    width = cut.tiles_of_span * of_tile
    ranked = max(128, triton.next_power_of_2(cut.k))
    excluded_ids, excluded_offsets = (ids, ids) if excluded is None else excluded
    denied = table if deny is None else deny.view(torch.int8)
    marks = ids if flags is None else flags
    counts = ids
    if certified is not None:
        marks, counts = certified.flags, certified.counts
    every = {"G": cut.group, "EXCLUDE": excluded is not None, "FLAGGED": flags is not None and certified is None}
    scored = {"D": d, "DP": padded, "CERTIFY": certified is not None}
    choice = {
        "SPAN_WIDTH": cut.span_width,
        "WIDTH": cut.group_width,
        "SHIFT": width.bit_length() - 1 if width & (width - 1) == 0 else -1,
        "SPANS": cut.spans > 0,
    }
    if cut.parts == 0:
        finishing = shapes["finish"]
        r = min(finishing["R"], triton.next_power_of_2(cut.capacity * cut.group))
        finish[(rows,)](
            queries,
            table,
            denied,
            excluded_ids,
            excluded_offsets,
            marks,
            counts,
            *(buffers[name] for name in BUFFERS),
            scores,
            ids,
            cut.k,
            cut.wanted,
            cut.capacity,
            items,
            groups,
            cut.spans,
            width,
            BK=min(finishing["BK"] or padded, padded),
            M=finishing["M"],
            R=r,
            BUFFER=triton.next_power_of_2(ranked + r),
            RANKED=ranked,
            DENY=deny is not None,
            **every,
            **scored,
            **choice,
            **_launch(finishing),
        )
        return
    choosing, scoring, ranking = (shapes[name] for name in ("choose", "rescore", "rank"))
    choose[(rows,)](
        excluded_ids,
        excluded_offsets,
        marks,
        *(buffers[name] for name in ("group_max", "span_max", "bounds", "chosen_spans", "chosen_groups", "heads")),
        cut.wanted,
        cut.capacity,
        items,
        cut.tiles,
        cut.spans,
        cut.tiles_of_span,
        OF_TILE=of_tile,
        **every,
        **choice,
        **_launch(choosing),
    )
    rescore[(rows * cut.parts,)](
        queries,
        table,
        denied,
        excluded_ids,
        excluded_offsets,
        marks,
        *(buffers[name] for name in ("chosen_groups", "heads", "entries")),
        cut.capacity,
        items,
        cut.parts,
        BK=min(scoring["BK"] or padded, padded),
        M=scoring["M"],
        R=scoring["R"],
        STAGES=scoring["num_stages"],
        DENY=deny is not None,
        **every,
        **scored,
        **_launch(scoring),
    )
    rank[(rows,)](
        queries,
        excluded_offsets,
        marks,
        counts,
        *(buffers[name] for name in ("group_max", "heads", "entries")),
        scores,
        ids,
        cut.k,
        cut.wanted,
        cut.capacity,
        cut.tiles,
        OF_TILE=of_tile,
        C=ranked // 2,
        RANKED=ranked,
        **every,
        **scored,
        **_launch(ranking),
    )


def _launch(shapes: dict[str, int]) -> dict[str, int | bool]:
    """How a kernel that waits for the one before it is launched."""
    options: dict[str, int | bool] = {"num_warps": shapes["num_warps"], "PDL": bool(shapes["PDL"])}
    if shapes["PDL"]:
        options["launch_pdl"] = True
    if shapes.get("REGISTERS", 0):
        options["maxnreg"] = shapes["REGISTERS"]
    return options


def releases(list_shapes: dict[str, dict[str, int]]) -> bool:
    """Whether what follows a scan starts while it still runs."""
    return bool(next(iter(list_shapes.values()))["PDL"])


def score_topk(
    queries: Tensor,
    table: Tensor,
    deny: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    buffers: dict[str, Tensor],
    scores: Tensor,
    ids: Tensor,
    *,
    cut: Cut,
    scan_shapes: dict[str, int],
    list_shapes: dict[str, dict[str, int]],
    overlap: bool,
    flags: Tensor | None = None,
) -> None:
    """Write the lists of queries [B, D] over table [N + 1, D] to scores [B, k] float32 and ids [B, k] int64.

    Args:
        queries: contiguous, float32, bfloat16 or float16.
        table: contiguous, same dtype; row 0 is never read as an item.
        deny: [N + 1] bool, or None.
        excluded: ids [E] and offsets [B + 1], int64, or None. The offsets may start anywhere in the ids.
        buffers: `group_max` and `span_max` float32, `bounds` [E] float32, `chosen_spans` and
            `chosen_groups` int32, `entries` int64; with parts also `heads` int32: contents do not matter and change.
        scores: written.
        ids: written.
        cut: how the catalogue is cut.
        scan_shapes: M, BN, BK, num_warps, num_stages, TMA.
        list_shapes: of `finish` M, R, BK, num_warps, REGISTERS (a thread's at most, or 0), PDL; or of `choose`
            num_warps, REGISTERS, PDL, of `rescore` M, R, BK, num_warps, num_stages, PDL, of `rank` num_warps, PDL.
        overlap: `scan` too may start while what was launched before it ends, a kernel.
        flags: int32 [B]: only rows with a flag get a list; by default all do.
    """
    rows, d = queries.shape
    padded = max(16, triton.next_power_of_2(d))
    m, bn = scan_shapes["M"], scan_shapes["BN"]
    tma = bool(scan_shapes["TMA"])
    scan[(triton.cdiv(rows, m) * triton.cdiv(cut.tiles, cut.tiles_of_chunk),)](
        queries,
        table,
        TensorDescriptor.from_tensor(table[1:], [bn, padded]) if tma else table,
        table if deny is None else deny.view(torch.int8),
        ids if flags is None else flags,
        buffers["group_max"],
        buffers["span_max"],
        rows,
        len(table) - 1,
        cut.tiles,
        cut.spans,
        cut.tiles_of_chunk,
        cut.tiles_of_span,
        D=d,
        DP=padded,
        BK=min(scan_shapes["BK"] or padded, padded),
        M=m,
        BN=bn,
        G=cut.group,
        STAGES=scan_shapes["num_stages"],
        SPANS=cut.spans > 0,
        DENY=deny is not None,
        FLAGGED=flags is not None,
        TMA=tma,
        PDL=releases(list_shapes),
        OVERLAP=overlap,
        INTERPRETED=not queries.is_cuda,
        num_warps=scan_shapes["num_warps"],
        **({"launch_pdl": True} if overlap else {}),
    )
    launch_lists(
        queries, table, deny, excluded, buffers, scores, ids,
        cut=cut, of_tile=bn // cut.group, shapes=list_shapes, flags=flags,
    )  # fmt: skip
