"""Triton kernels of cross_entropy over the catalogue: no score leaves the chip, forward or backward.

Forward: each program keeps a running maximum and sum of exponentials of its rows over a span of items; a second kernel
joins the spans. Backward: the products are computed again, once by rows for the endpoint's gradient and once by items
for the table's, so that every sum has one owner and one order: no float atomics, the same bits in every run. All
exponentials are powers of two.

LEFT_OUT: items that are no candidates of a row are bits of its words, bit (i - 1) % 32 of word (i - 1) / 32 for item i.
"""

import triton
import triton.language as tl
from fave_fast.kernels.rank_count import _products
from triton.tools.tensor_descriptor import TensorDescriptor

JOIN_ROWS = 64
JOIN_SPANS = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add(scores, highest, total):
    """Running maximum and sum of 2^(score - maximum) [M] with the scores [M, T], in units of log 2, added."""
    higher = tl.maximum(highest, tl.max(scores, 1) * LOG2_E)
    # A row without a finite score so far has the maximum -inf, and -inf - -inf is NaN.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    total = total * tl.exp2(highest - base) + tl.sum(tl.exp2(scores * LOG2_E - base[:, None]), 1)
    return higher, total


@triton.jit
def _mark(rows_ptr, items_ptr, targets_ptr, bits_ptr, P, B, N, words, BLOCK: tl.constexpr):
    """Set the bits of P pairs; a row from B on, an item that is none and a row's target mean nothing."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + at, at < P, B)
    item = tl.load(items_ptr + at, at < P, 0)
    there = (row < B) & (item > 0) & (item <= N)
    there = there & (tl.load(targets_ptr + row, there, 0) != item)
    bit = tl.full([BLOCK], 1, tl.int64) << ((item - 1) & 31)
    tl.atomic_or(bits_ptr + row * words + ((item - 1) >> 5), bit.to(tl.int32), there)


@triton.jit
def _is_left_out(bits_ptr, row, place, words, there):
    """Whether item `place` + 1 is no candidate of `row`; both broadcast to the shape of `there`."""
    word = tl.load(bits_ptr + row.to(tl.int64) * words + (place >> 5), there, 0)
    return ((word >> (place & 31)) & 1) != 0


@triton.jit
def _candidates(scores, bits_ptr, row, place, B, N, words, LEFT_OUT: tl.constexpr):
    """Scores [M, T] of rows and of items `place` + 1, -inf where an item is no candidate."""
    if LEFT_OUT:
        there = (row < B)[:, None] & (place < N)[None, :]
        out = _is_left_out(bits_ptr, row[:, None], place[None, :], words, there)
        scores = tl.where(out, -float("inf"), scores)
    return scores


@triton.jit
def _spans(
    queries, table, bits_ptr, highest_ptr, total_ptr, B, N, words, row_blocks, tiles, span_tiles,
    M: tl.constexpr, T: tl.constexpr, LEFT_OUT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % row_blocks
    span = tl.program_id(0) // row_blocks
    start = span * span_tiles
    full = N // T
    query = queries.load([block * M, 0])
    highest = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    row = block * M + tl.arange(0, M)
    for tile in range(start, tl.minimum(start + span_tiles, full)):
        scores = tl.dot(query, tl.trans(table.load([1 + tile * T, 0])), input_precision="ieee")
        scores = _candidates(scores, bits_ptr, row, tile * T + tl.arange(0, T), B, N, words, LEFT_OUT)
        highest, total = _add(scores, highest, total)
    if (start + span_tiles >= tiles) & (full < tiles):
        scores = tl.dot(query, tl.trans(table.load([1 + full * T, 0])), input_precision="ieee")
        place = full * T + tl.arange(0, T)
        scores = _candidates(scores, bits_ptr, row, place, B, N, words, LEFT_OUT)
        highest, total = _add(tl.where((place < N)[None, :], scores, -float("inf")), highest, total)
    place = span.to(tl.int64) * B + row
    tl.store(highest_ptr + place, highest, row < B)
    tl.store(total_ptr + place, total, row < B)


@triton.jit
def _join(
    queries_ptr, table_ptr, targets_ptr, highest_ptr, total_ptr, log_sum_ptr, losses_ptr, B, spans,
    P: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * P + tl.arange(0, P)
    live = row < B
    target = tl.load(targets_ptr + row, live, 0)
    score = _products(queries_ptr, table_ptr, tl.where(live, row, 0), target, P, D, BK)
    highest = tl.full([P], -float("inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    for start in range(0, spans, S):
        span = start + tl.arange(0, S)
        place = span.to(tl.int64)[None, :] * B + row[:, None]
        there = live[:, None] & (span < spans)[None, :]
        others = tl.load(highest_ptr + place, there, -float("inf"))
        parts = tl.load(total_ptr + place, there, 0.0)
        higher = tl.maximum(highest, tl.max(others, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(highest - base) + tl.sum(parts * tl.exp2(others - base[:, None]), 1)
        highest = higher
    log_sum = highest + tl.log2(total)
    tl.store(log_sum_ptr + row, log_sum, live)
    tl.store(losses_ptr + row, log_sum / LOG2_E - score, live)


@triton.jit
def _by_rows(
    queries, table, targets_ptr, bits_ptr, log_sum_ptr, parts_ptr, B, N, words, row_blocks, tiles, span_tiles,
    M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, LEFT_OUT: tl.constexpr,
):  # fmt: skip
    """Each span's part of (softmax - onehot) @ table, [B, D] float32."""
    block = tl.program_id(0) % row_blocks
    span = tl.program_id(0) // row_blocks
    start = span * span_tiles
    row = block * M + tl.arange(0, M)
    live = row < B
    target = tl.load(targets_ptr + row, live, 0).to(tl.int32)
    log_sum = tl.load(log_sum_ptr + row, live, float("inf"))
    query = queries.load([block * M, 0])
    acc = tl.zeros([M, D], tl.float32)
    for tile in range(start, tl.minimum(start + span_tiles, tiles)):
        items = table.load([1 + tile * T, 0])
        scores = tl.dot(query, tl.trans(items), input_precision="ieee")
        # No weight is above 1 but those of the zeros past the table's end, and infinity times their zeros would be NaN.
        exponent = tl.minimum(scores * LOG2_E - log_sum[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
        weights = tl.exp2(exponent)
        item = 1 + tile * T + tl.arange(0, T)
        if LEFT_OUT:
            there = live[:, None] & (item <= N)[None, :]
            weights = tl.where(_is_left_out(bits_ptr, row[:, None], item[None, :] - 1, words, there), 0.0, weights)
        weights = tl.where(item[None, :] == target[:, None], weights - 1.0, weights)
        acc = tl.dot(weights.to(items.dtype), items, acc, input_precision="ieee")
    d = tl.arange(0, D)
    place = (span.to(tl.int64) * B + row)[:, None] * D + d[None, :]
    tl.store(parts_ptr + place, acc, live[:, None])


@triton.jit
def _sum_spans(parts_ptr, grad_ptr, result_ptr, B, spans, elements, BLOCK: tl.constexpr):
    """The spans' parts added in order, times grad / B."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < elements
    acc = tl.zeros([BLOCK], tl.float32)
    for span in range(0, spans):
        acc += tl.load(parts_ptr + tl.cast(span, tl.int64) * elements + at, live, 0.0)
    scale = tl.load(grad_ptr) / B
    tl.store(result_ptr + at, (acc * scale).to(result_ptr.dtype.element_ty), live)


@triton.jit
def _by_items(
    queries, table, targets_ptr, bits_ptr, log_sum_ptr, grad_ptr, result_ptr, B, N, words, row_blocks,
    M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, LEFT_OUT: tl.constexpr,
):  # fmt: skip
    """(softmax - onehot)^T @ queries times grad / B for T items; the padding's row is zero."""
    first = 1 + tl.program_id(0) * T
    item = first + tl.arange(0, T)
    items = table.load([first, 0])
    acc = tl.zeros([T, D], tl.float32)
    for block in range(0, row_blocks):
        query = queries.load([block * M, 0])
        row = block * M + tl.arange(0, M)
        target = tl.load(targets_ptr + row, row < B, 0).to(tl.int32)
        # 2^-inf is 0: rows past the end weigh nothing.
        log_sum = tl.load(log_sum_ptr + row, row < B, float("inf"))
        scores = tl.dot(items, tl.trans(query), input_precision="ieee")
        weights = tl.exp2(scores * LOG2_E - log_sum[None, :])
        if LEFT_OUT:
            there = (item <= N)[:, None] & (row < B)[None, :]
            weights = tl.where(_is_left_out(bits_ptr, row[None, :], item[:, None] - 1, words, there), 0.0, weights)
        weights = tl.where(item[:, None] == target[None, :], weights - 1.0, weights)
        acc = tl.dot(weights.to(items.dtype), query, acc, input_precision="ieee")
    scale = tl.load(grad_ptr) / B
    d = tl.arange(0, D)
    place = item.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(result_ptr + place, (acc * scale).to(result_ptr.dtype.element_ty), (item <= N)[:, None])
    if first == 1:
        tl.store(result_ptr + d, tl.zeros([D], result_ptr.dtype.element_ty))


def _descriptors(queries, table, M, T):
    (B, D), rows = queries.shape, len(table)
    return TensorDescriptor(queries, [B, D], [D, 1], [M, D]), TensorDescriptor(table, [rows, D], [D, 1], [T, D])


def mark(rows, items, targets, bits, count):
    """Set the bits, int32 [B, words] of zeros, of the pairs rows and items [P], int64, of `count` items."""
    pairs, (batch, words) = len(rows), bits.shape
    _mark[(triton.cdiv(pairs, 256),)](
        rows, items, targets, bits, pairs, batch, count, words, BLOCK=256, num_warps=4
    )  # fmt: skip


def _left_out(bits, stand_in):
    """What kernels take of bits, or of none."""
    return (stand_in, 0, False) if bits is None else (bits, bits.shape[1], True)


def forward(
    queries, table, targets, bits, highest, total, log_sum, losses, *, M, T, span_tiles, num_warps, num_stages
):  # fmt: skip
    """Losses [B] and log2 of the sums of exponentials [B], float32.

    queries [B, D] and table [N + 1, D]: contiguous, 16-byte base, D a power of two of 16 to 256. targets [B] int64.
    bits: as `mark` leaves them, or None. highest and total: float32, [spans, B], overwritten; spans as `spans_of` says.
    """
    bits, words, left_out = _left_out(bits, targets)
    (B, D), N = queries.shape, len(table) - 1
    row_blocks, tiles = triton.cdiv(B, M), triton.cdiv(N, T)
    spans = triton.cdiv(tiles, span_tiles)
    _spans[(row_blocks * spans,)](
        *_descriptors(queries, table, M, T), bits, highest, total, B, N, words, row_blocks, tiles, span_tiles,
        M=M, T=T, LEFT_OUT=left_out, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    _join[(triton.cdiv(B, JOIN_ROWS),)](
        queries, table, targets, highest, total, log_sum, losses, B, spans,
        P=JOIN_ROWS, D=D, BK=D if queries.element_size() == 2 else 16, S=JOIN_SPANS, num_warps=4, num_stages=2,
    )  # fmt: skip


def backward_queries(
    queries, table, targets, bits, log_sum, grad, parts, result, *, M, T, span_tiles, num_warps, num_stages
):  # fmt: skip
    """The gradient of the mean loss by the queries, [B, D]; parts: float32 [spans, B, D], overwritten."""
    bits, words, left_out = _left_out(bits, targets)
    (B, D), N = queries.shape, len(table) - 1
    row_blocks, tiles = triton.cdiv(B, M), triton.cdiv(N, T)
    spans = triton.cdiv(tiles, span_tiles)
    _by_rows[(row_blocks * spans,)](
        *_descriptors(queries, table, M, T), targets, bits, log_sum, parts, B, N, words, row_blocks, tiles, span_tiles,
        M=M, T=T, D=D, LEFT_OUT=left_out, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    _sum_spans[(triton.cdiv(B * D, 256),)](parts, grad, result, B, spans, B * D, BLOCK=256, num_warps=4)


def backward_table(queries, table, targets, bits, log_sum, grad, result, *, M, T, num_warps, num_stages):
    """The gradient of the mean loss by the table, [N + 1, D]."""
    bits, words, left_out = _left_out(bits, targets)
    (B, D), N = queries.shape, len(table) - 1
    _by_items[(triton.cdiv(N, T),)](
        *_descriptors(queries, table, M, T), targets, bits, log_sum, grad, result, B, N, words, triton.cdiv(B, M),
        M=M, T=T, D=D, LEFT_OUT=left_out, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
