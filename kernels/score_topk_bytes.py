"""The exact top K by a scan of one byte an element: the tournament of `score_topk`, played by upper bounds of scores.

`fave_fast/ops/byte_table.py` has the form of the table and the proof that no score exceeds its bound. Three steps, of
which the last costs nothing where it is not needed:

1. `scan` reads the bytes once and keeps of every group, and of every span, the largest upper bound.
2. `finish`, or the three launches in its place, as in `score_topk`, chooses the groups with the largest bounds, more
   than K, computes the exact scores of their items, and chooses K of these. No item of another group exceeds its
   group's bound, so where the K-th score exceeds every bound that was not chosen, this is the list; otherwise the row
   gets a flag.
3. The launches of `score_topk`, for flagged rows: programs without any return at once.

A query's 16 bits are two bytes, of which each has its product with a tile: two products of matrix units that are busy
for a third of the time that a tile takes to arrive, against a conversion of every element of the table.

Items stand in the rows of a product, queries in its columns: of 16 columns one query wastes 15, of 64 rows, the least
that the fastest matrix instruction takes, it would waste 63.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fave_fast.kernels import score_topk as exact
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_NEVER = tl.constexpr(0x7FC00000)  # the word of an item that is no candidate: its scale is NaN
_WIDEST = tl.constexpr(1099511627776.0)  # 2^40
_MOST = tl.constexpr(32512.0)  # 127 * 256, of a query's whole numbers


@triton.jit
def _in_two_bytes(q):
    """Queries [M, DP] as 256 high + low, int8, in steps [M]; |q| / step, rounded up; and whether they have a bound.

    Those without (NaN, infinities, steps beyond 2^+-40) and zeros are zeros here, in steps of 1.
    """
    nan = tl.max((q != q).to(tl.int32), axis=1) > 0
    q = tl.where(q == q, q, 0.0)
    most = tl.max(tl.abs(q), axis=1)
    step = most / _MOST
    bounded = ((step >= 1 / _WIDEST) & (step <= _WIDEST) | (most == 0)) & (nan == 0)
    some = bounded & (most > 0)
    step = tl.where(some, step, 1.0)
    q = tl.where(some[:, None], q, 0.0)
    whole = tl.minimum(tl.maximum(tl.floor(q / step[:, None] + 0.5), -_MOST), _MOST).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - high * 256
    length = tl.sqrt(tl.sum(q * q, axis=1)) * 1.0001 / step  # sums of 256 squares lose 2e-5 at most
    return high.to(tl.int8), low.to(tl.int8), step, length, bounded


@triton.jit(do_not_specialize=["rows", "items", "tiles", "spans", "tiles_of_chunk", "tiles_of_span"])
def scan(
    queries,
    table,
    table_tiles,
    words,
    deny,
    group_max,
    span_max,
    rows,
    items,
    tiles,
    spans,
    tiles_of_chunk,
    tiles_of_span,
    D: tl.constexpr,
    BYTES: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    G: tl.constexpr,
    STAGES: tl.constexpr,
    SPANS: tl.constexpr,
    DENY: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    OVERLAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The largest bounds of groups [rows, tiles * BN / G], and where SPANS those of spans [rows, spans].

    Programs share rows and tiles out among each other as those of `score_topk.scan`.
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
    q = tl.load(queries + row[:, None] * D + column, mask=present[:, None] & (column < D), other=0.0)
    high, low, step, length, bounded = _in_two_bytes(q.to(tl.float32))
    first = chunk * tiles_of_chunk
    stop = tl.minimum(first + tiles_of_chunk, tiles)
    group_row = group_max + (row * tiles * GROUPS)[None, :] + tl.arange(0, GROUPS)[:, None]
    span_row = span_max + row * spans
    item = tl.arange(0, BN)
    best = tl.full([M], -float("inf"), tl.float32)
    # One tile ahead: only loads that a product needs are fetched early by themselves.
    word = tl.load(words + 1 + first * BN + item, mask=item < items - first * BN, other=_NEVER)
    for tile in tl.range(first, stop, num_stages=STAGES):
        after = (tile + 1) * BN
        word_after = tl.load(words + 1 + after + item, mask=item < items - after, other=_NEVER)
        if TMA:
            x = table_tiles.load([tile * BN, 0])
        else:
            at = table + tl.minimum(1 + tile * BN + item, items).to(tl.int64)[:, None] * BYTES + column
            x = tl.load(at) if BYTES == DP else tl.load(at, mask=(column < BYTES)[None, :], other=0)
        product = tl.dot(x, low.T, tl.dot(x, high.T, out_dtype=tl.int32) * 256, out_dtype=tl.int32)
        scale = (word & -65536).to(tl.float32, bitcast=True)
        error = (word << 16).to(tl.float32, bitcast=True)
        if DENY:
            denied = tl.load(deny + 1 + tile * BN + item, mask=item < items - tile * BN, other=1)
            scale = tl.where(denied != 0, float("nan"), scale)
        upper = product.to(tl.float32) * scale[:, None] + error[:, None] * length[None, :]
        if INTERPRETED:  # the GPU's maximum passes over a NaN, NumPy's does not
            upper = tl.where(upper == upper, upper, -float("inf"))
        maxima = tl.max(tl.reshape(upper, [GROUPS, G, M]), axis=1) * step[None, :]
        maxima = tl.where(bounded[None, :], maxima, float("inf"))
        tl.store(group_row + tile * GROUPS, maxima, mask=present[None, :])
        if SPANS:
            span = tile // tiles_of_span
            starts = tile == span * tiles_of_span
            best = tl.maximum(tl.where(starts, -float("inf"), best), tl.max(maxima, axis=0))
            tl.store(span_row + span, best, mask=present)
        word = word_after


def score_topk(
    queries: Tensor,
    table: Tensor,
    table_bytes: tuple[Tensor, Tensor],
    deny: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    buffers: dict[str, Tensor],
    scores: Tensor,
    ids: Tensor,
    *,
    cut: exact.Cut,
    scan_shapes: dict[str, int],
    list_shapes: dict[str, dict[str, int]],
    certified: exact.Certified,
    overlap: bool,
) -> None:
    """Write lists to scores and ids, and which of them are not certain to `certified.flags`.

    Args:
        queries: as in `score_topk.score_topk`, and so are `table`, `deny`, `excluded`, `buffers`, `scores`, `ids`,
            `cut` and `list_shapes`.
        table: of D up to 256: sums of products stay within 32 bits.
        table_bytes: int8 [N + 1, D up to whole 16] and words int32 [N + 1] of the table, as `KernelByteTable` has them.
        deny: as above.
        excluded: as above.
        buffers: as above.
        scores: as above.
        ids: as above.
        cut: as above, for the bytes.
        scan_shapes: M, BN, num_warps, num_stages, TMA.
        list_shapes: as above.
        certified: what is written.
        overlap: as above.
    """
    rows, d = queries.shape
    x, words = table_bytes
    items = len(table) - 1
    width = x.shape[1]
    padded = max(32, triton.next_power_of_2(width))
    m, bn = scan_shapes["M"], scan_shapes["BN"]
    tma = bool(scan_shapes["TMA"]) and width == padded
    scan[(triton.cdiv(rows, m) * triton.cdiv(cut.tiles, cut.tiles_of_chunk),)](
        queries,
        x,
        TensorDescriptor.from_tensor(x[1:], [bn, padded]) if tma else x,
        words,
        words if deny is None else deny.view(torch.int8),
        buffers["group_max"],
        buffers["span_max"],
        rows,
        items,
        cut.tiles,
        cut.spans,
        cut.tiles_of_chunk,
        cut.tiles_of_span,
        D=d,
        BYTES=width,
        DP=padded,
        M=m,
        BN=bn,
        G=cut.group,
        STAGES=scan_shapes["num_stages"],
        SPANS=cut.spans > 0,
        DENY=deny is not None,
        TMA=tma,
        PDL=exact.releases(list_shapes),
        OVERLAP=overlap,
        INTERPRETED=not queries.is_cuda,
        num_warps=scan_shapes["num_warps"],
        **({"launch_pdl": True} if overlap else {}),
    )
    exact.launch_lists(
        queries, table, deny, excluded, buffers, scores, ids,
        cut=cut, of_tile=bn // cut.group, shapes=list_shapes, certified=certified,
    )  # fmt: skip
