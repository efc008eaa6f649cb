"""Triton kernels of rank_count: thresholds from the targets' scores, then one scan that counts what is above them.

Every score comes from the same instructions in the same order over D: 64 or more rows of queries times items, so that
a 16-bit product is always the tensor cores' m64nNk16 with float32 sums, and a float32 one a chain of fused
multiply-adds. A score's bits therefore do not depend on the kernel, the tile or the batch, and equal items tie.

A score s comes before the target's t, of equal ones the lower id, if s > threshold: `below` (the next float32 under t)
for ids under the target's, `level` (t itself) for the others. Most tiles lie on one side of a row's target, so a score
costs a comparison and an addition; tiles that hold a target choose between the two for each score. A target at minus
infinity (NaN counts as that) comes after every lower id, whatever its score: those are counted in advance, and its
`below` is plus infinity.

On one H200 in bfloat16 with D = 128 the scan of 512 rows and a million items takes 216 us, where the products alone are
178 at 740 TFLOP/s and torch.mm, which writes them, takes 402. Two programs a multiprocessor hide the counting of one
behind the product of the other; one program with deeper loads (265 us), 64 rows (227) or 256 items (272) are slower.
"""

import functools

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

PAIRS = 64  # rows of the tensor cores' smallest product for one warpgroup
SPAN_TILES = 64  # a span's tiles are the bits of an int64
# Tiles of a span up to which its first product is made before the thresholds are there. On one H200 64 rows among
# 12,101 items, a tile each, take 8.6 us so and 9.2 otherwise, 132, two each, 10.5 and 10.7; 512 among a million, in
# long loops, 262 and 212: what stands before a loop keeps its loads from running ahead (0282ea7).
AHEAD_TILES = 2


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _products(queries_ptr, table_ptr, rows, ids, P: tl.constexpr, D: tl.constexpr, BK: tl.constexpr):
    """Scores [P] of query rows and items, one to one: the diagonal of a product; 0 for the item 0."""
    k = tl.arange(0, BK)
    acc = tl.zeros([P, P], tl.float32)
    for start in tl.static_range(0, D, BK):
        inside = (start + k < D)[None, :]
        query = tl.load(queries_ptr + rows.to(tl.int64)[:, None] * D + (start + k)[None, :], inside, 0.0)
        # Row 0 is the padding, which may hold anything.
        real = inside & (ids > 0)[:, None]
        item = tl.load(table_ptr + ids.to(tl.int64)[:, None] * D + (start + k)[None, :], real, 0.0)
        acc = tl.dot(query, tl.trans(item), acc, input_precision="ieee")
    pair = tl.arange(0, P)
    return tl.sum(tl.where(pair[:, None] == pair[None, :], acc, 0.0), 1)


@triton.jit
def _thresholds(
    queries_ptr, table_ptr, targets_ptr, below_ptr, level_ptr, ranks_ptr, B, N,
    P: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start, and waits for this one where it must
    row = tl.program_id(0) * P + tl.arange(0, P)
    live = row < B
    target = tl.load(targets_ptr + row, live, 0)
    target = tl.where((target >= 1) & (target <= N), target, 0)
    t = _products(queries_ptr, table_ptr, tl.where(live, row, 0), target, P, D, BK)
    lowest = (t != t) | (t == -float("inf"))
    t = tl.where(lowest, -float("inf"), t + 0.0)  # -0 would have another neighbour than 0
    bits = t.to(tl.int32, bitcast=True)
    neighbour = tl.where(t > 0, bits - 1, tl.where(t < 0, bits + 1, -0x7FFFFFFF))
    below = tl.where(lowest, float("inf"), neighbour.to(tl.float32, bitcast=True))
    tl.store(below_ptr + row, below, live)
    tl.store(level_ptr + row, t, live)
    tl.store(ranks_ptr + row, tl.where(lowest, target, 1), live)


@triton.jit
def _rows_of(offsets_ptr, base, entry, B, rounds, W: tl.constexpr, NEAR: tl.constexpr):
    """The row that each entry [P] of the list belongs to, `base` being the first: the last that starts at or before it.

    The first entry's row is found W offsets at a time, and the others among the rows from there on, NEAR of them at a
    time: four dependent loads where halving takes fifteen.
    """
    low, high = 0, B
    for _ in range(rounds):
        step = (high - low + W - 1) // W
        at = low + (1 + tl.arange(0, W)) * step
        before = tl.load(offsets_ptr + at, at <= high, 0x7FFFFFFFFFFFFFFF) <= base
        low += tl.sum((before & (at <= high)).to(tl.int32), 0) * step
        high = tl.minimum(high, low + tl.maximum(step - 1, 0))
    row = tl.zeros_like(entry).to(tl.int32) + low
    last = tl.max(entry, 0)
    reached = base
    while reached <= last:
        at = low + 1 + tl.arange(0, NEAR)
        starts = tl.load(offsets_ptr + at, at <= B, 0x7FFFFFFFFFFFFFFF)
        row += tl.sum((starts[None, :] <= entry[:, None]).to(tl.int32), 1)
        reached = tl.max(starts, 0)
        low += NEAR
    return row


@triton.jit
def _leave_out(
    queries_ptr, table_ptr, targets_ptr, below_ptr, level_ptr, excluded_ptr, offsets_ptr, ranks_ptr, B, N, E, rounds,
    P: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, EARLIER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Take back what the scan counts of excluded ids, each once a row; it never counts the target itself."""
    base = tl.program_id(0).to(tl.int64) * P
    entry = base + tl.arange(0, P)
    row = _rows_of(offsets_ptr, base, entry, B, rounds, P, 16)
    live = (entry < E) & (row < B)
    row = tl.where(live, row, 0)
    item = tl.load(excluded_ptr + entry, live, 0)
    target = tl.load(targets_ptr + row)
    live &= (item >= 1) & (item <= N)
    item = tl.where(live, item, 0).to(tl.int32)
    score = _products(queries_ptr, table_ptr, row, item, P, D, BK)
    if PDL:
        tl.extra.cuda.gdc_wait()
    below = tl.load(below_ptr + row)
    level = tl.load(level_ptr + row)
    lower = item < target
    counted = live & ((score > tl.where(lower, below, level)) | (lower & (level == -float("inf"))))
    # A repeated id counts where it stands first. Comparing with all earlier entries of the row is quadratic in the
    # length of a history, and little beside the products up to some thousand ids a row.
    start = (tl.load(offsets_ptr + row) - base).to(tl.int32)
    place = tl.arange(0, P)
    repeated = tl.zeros([P], tl.int32)
    for at in range(tl.min(tl.where(counted, start, P), 0), P, EARLIER):
        other = at + tl.arange(0, EARLIER)
        other_item = tl.load(excluded_ptr + base + other, base + other < E, 0).to(tl.int32)
        earlier = (other[None, :] >= start[:, None]) & (other[None, :] < place[:, None])
        repeated |= tl.max((earlier & (other_item[None, :] == item[:, None])).to(tl.int32), 1)
    tl.atomic_add(ranks_ptr + row, tl.full([P], -1, tl.int64), counted & (repeated == 0), sem="relaxed")


@triton.jit
def _count_above(scores, threshold, INTERPRETED: tl.constexpr):
    """How many scores [M, T] of each row are above the threshold, [M, 1] or [M, T]; NaN is above nothing."""
    if INTERPRETED:
        return tl.sum((scores > threshold).to(tl.int32), 1)
    # The sign of the difference: an addition and 1.25 integer operations a score, where a comparison, its selection
    # and the sum take 2.6. Differences do not underflow, and a NaN of this arithmetic has no sign.
    sign = (threshold - scores).to(tl.uint32, bitcast=True) >> 31
    return tl.sum(sign.to(tl.int32), 1)


@triton.jit
def _scores(
    queries, table, query, first_row, first, M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Scores [M, T] of the rows and items from `first_row` and `first` on; `query` are the rows' first BK channels."""
    if BK >= D:
        scores = tl.dot(query, tl.trans(table.load([first, 0])), input_precision="ieee")
    else:
        scores = tl.zeros([M, T], tl.float32)
        for k in range(0, D, BK):
            part = queries.load([first_row, k])
            scores = tl.dot(part, tl.trans(table.load([first, k])), scores, input_precision="ieee")
    if not INTERPRETED:
        # The pipeliner of Triton 3.6 fails on a product whose first use is inside a branch.
        scores = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [scores], tl.float32, is_pure=True, pack=1)
    return scores


@triton.jit
def _counted(count, scores, first, target, below, level, N, is_mixed, INTERPRETED: tl.constexpr):
    """`count`, and how many scores [M, T] of the items from `first` on come before each row's target.

    `is_mixed`: some row's target is among them, or the catalogue's end.
    """
    if is_mixed:
        item = first + tl.arange(0, scores.shape[1])
        threshold = tl.where(item[None, :] < target[:, None], below[:, None], level[:, None])
        threshold = tl.where(item[None, :] <= N, threshold, float("inf"))
        count += _count_above(scores, threshold, INTERPRETED)
    else:
        count += _count_above(scores, tl.where(first < target, below, level)[:, None], INTERPRETED)
    return count


@triton.jit
def _scan(
    queries, table, targets_ptr, below_ptr, level_ptr, ranks_ptr, program, B, N, row_blocks, tiles, span_tiles,
    M: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Count over a span of tiles; where AHEAD, the first product is made while the thresholds are computed."""
    # Row blocks of one span run side by side and share its items in the L2 cache.
    block = program % row_blocks
    start = (program // row_blocks) * span_tiles
    stop = tl.minimum(start + span_tiles, tiles)
    row = block * M + tl.arange(0, M)
    live = row < B
    target = tl.load(targets_ptr + row, live, 0).to(tl.int32)

    # Bit i: tile i of this span holds some row's target, or ends the catalogue.
    place = (target - 1) // T - start
    bit = tl.where((place >= 0) & (place < 64), tl.full([M], 1, tl.int64) << (place & 63).to(tl.int64), 0)
    mixed = tl.reduce(bit, 0, _or)
    if (stop == tiles) & (N % T != 0):
        mixed |= tl.full([], 1, tl.int64) << (tiles - 1 - start).to(tl.int64)

    query = queries.load([block * M, 0])
    if AHEAD:
        scores = _scores(queries, table, query, block * M, 1 + start * T, M, T, D, BK, INTERPRETED)
    if PDL:
        tl.extra.cuda.gdc_wait()
    below = tl.load(below_ptr + row, live, 0.0)
    level = tl.load(level_ptr + row, live, 0.0)
    count = tl.zeros([M], tl.int32)
    if AHEAD:
        count = _counted(count, scores, 1 + start * T, target, below, level, N, (mixed & 1) != 0, INTERPRETED)
    for tile in range(start + AHEAD, stop):
        scores = _scores(queries, table, query, block * M, 1 + tile * T, M, T, D, BK, INTERPRETED)
        is_mixed = ((mixed >> (tile - start)) & 1) != 0
        count = _counted(count, scores, 1 + tile * T, target, below, level, N, is_mixed, INTERPRETED)
    # Whole numbers: the order in which the spans add does not matter.
    tl.atomic_add(ranks_ptr + row, count.to(tl.int64), live, sem="relaxed")


@triton.jit
def _count(
    queries, table, queries_ptr, table_ptr, targets_ptr, below_ptr, level_ptr, excluded_ptr, offsets_ptr, ranks_ptr,
    B, N, E, rounds, exclusions, row_blocks, tiles, span_tiles,
    M: tl.constexpr, T: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, EARLIER: tl.constexpr,
    EXCLUDES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The scan, and before it in the same launch `exclusions` programs that take back what is excluded."""
    if EXCLUDES:
        if tl.program_id(0) < exclusions:
            _leave_out(
                queries_ptr, table_ptr, targets_ptr, below_ptr, level_ptr, excluded_ptr, offsets_ptr, ranks_ptr,
                B, N, E, rounds, P, D, BK, EARLIER, PDL,
            )  # fmt: skip
        else:
            _scan(
                queries, table, targets_ptr, below_ptr, level_ptr, ranks_ptr, tl.program_id(0) - exclusions,
                B, N, row_blocks, tiles, span_tiles, M, T, D, BK, AHEAD, PDL, INTERPRETED,
            )  # fmt: skip
    else:
        _scan(
            queries, table, targets_ptr, below_ptr, level_ptr, ranks_ptr, tl.program_id(0),
            B, N, row_blocks, tiles, span_tiles, M, T, D, BK, AHEAD, PDL, INTERPRETED,
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def span_tiles(tiles: int, row_blocks: int, resident: int) -> int:
    """Tiles of one program, so that the last wave of programs on a GPU that holds `resident` is nearly full."""

    def cost(length: int) -> int:
        waves = -(-row_blocks * -(-tiles // length) // resident)
        return waves * (length + 2)  # a program's start costs about two tiles

    return min(range(1, SPAN_TILES + 1), key=cost)


def rank_count(
    queries, table, targets, excluded, offsets, below, level, ranks,
    *, M, T, BK, num_warps, num_stages, PDL, resident, interpreted,
):  # fmt: skip
    """Launch the kernels; nothing is allocated, and every buffer is whole when the stream gets there.

    queries [B, D] and table [N + 1, D]: contiguous, rows and base of whole 16 bytes. targets [B] int64. excluded [E]
    and offsets [B + 1] int64, or None. below and level [B] float32: overwritten. ranks [B] int64: the result.
    `resident`: how many programs of the scan the GPU holds at a time. PDL: the scan is launched while the thresholds
    are computed (compute capability 9.0).
    """
    (B, D), N = queries.shape, len(table) - 1
    row_blocks, tiles = triton.cdiv(B, M), triton.cdiv(N, T)
    E = 0 if excluded is None else len(excluded)
    exclusions = triton.cdiv(E, PAIRS)
    # So few that they all run beside the scan: one launch less to wait for.
    together = exclusions <= resident // 2
    PDL = bool(PDL) and (together or exclusions == 0)
    shape = {"P": PAIRS, "D": D, "BK": BK}
    _thresholds[(triton.cdiv(B, PAIRS),)](
        queries, table, targets, below, level, ranks, B, N, **shape, PDL=PDL, num_warps=4, num_stages=2
    )
    rounds = 1
    while PAIRS**rounds < B:
        rounds += 1
    if not together:
        _leave_out[(exclusions,)](
            queries, table, targets, below, level, excluded, offsets, ranks, B, N, E, rounds,
            **shape, EARLIER=32, PDL=False, num_warps=4, num_stages=2,
        )  # fmt: skip
        exclusions = 0
    length = span_tiles(tiles, row_blocks, resident)
    _count[(exclusions + row_blocks * triton.cdiv(tiles, length),)](
        TensorDescriptor(queries, [B, D], [D, 1], [M, BK]), TensorDescriptor(table, [N + 1, D], [D, 1], [T, BK]),
        queries, table, targets, below, level, targets if excluded is None else excluded,
        targets if offsets is None else offsets, ranks,
        B, N, E, rounds, exclusions, row_blocks, tiles, length,
        M=M, T=T, **shape, EARLIER=32, EXCLUDES=exclusions > 0,
        AHEAD=int(BK >= D and length <= AHEAD_TILES), PDL=PDL, INTERPRETED=interpreted,
        num_warps=num_warps, num_stages=num_stages, **({"launch_pdl": True} if PDL else {}),
    )  # fmt: skip
