"""The exact top K of the whole catalogue by inner product.

The order is: higher score first, and of equal ones the lower id first. `torch.topk` leaves the order of equal scores
open, so rows where a tie crosses the K-th place are settled by a stable sort; the others never pay for one.

The Triton kernels (`kernels/score_topk.py`) hold no [B, N] matrix: of every group of neighbouring items they keep the
largest score, choose groups, and compute the scores of these groups' items once more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fave_fast.ops import native, score_topk_cpu
from fave_fast.ops.exclusions import Exclusions
from fave_fast.ops.registry import Implementation, Op, not_interpreted, triton_kernels
from fave_fast.ops.score_topk_cpu import ByteTable
from fave_fast.ops.tiles import Tiles
from fave_fast.ops.tuning import Shapes, launches_overlap, multiprocessors, tile_shapes
from fave_fast.profiling import ranged

_Out = tuple[Tensor, Tensor]
# (tiles; K; deny; where scores [B, K] and ids [B, K] go, or None; workspace or None; the table in 8 bits or None)
_Run = Callable[[Tiles, int, Tensor | None, _Out | None, Tensor | None, ByteTable | None, bool], _Out]

MAX_K = 1024  # of the kernels
MAX_WIDTH = 256  # D of the kernels
MAX_ITEMS = (1 << 31) - (1 << 12)  # N of the kernels: ids of a tile's last items stay below 2^31
MAX_WORKSPACE = 512 << 20  # bytes of group maxima at a time
ROWS_AT_LEAST = 128  # at a time, though they need more


@ranged("fave/topk")
def score_topk(
    queries: Tensor,
    table: Tensor,
    k: int,
    exclude: Exclusions | None = None,
    deny: Tensor | None = None,
    *,
    tile: int | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
    table_bytes: ByteTable | None = None,
    backend: str = "auto",
    overlap: bool = False,
) -> tuple[Tensor, Tensor]:
    """The K best items of each row, out of the items 1 to N.

    An item that is excluded or denied, or whose score is -inf or NaN, never appears.

    The triton backend never makes the host wait, and with contiguous tensors, `out` and `workspace` it allocates
    nothing: a CUDA graph can hold the call. With triton and cpp, a row's list is, bit for bit, the same in any batch.

    Args:
        queries: [B, D] floating point.
        table: [N + 1, D], same dtype and device; row 0 is the padding and never a candidate.
        k: K, at least 1; may exceed N.
        exclude: ids that are no candidates, row by row.
        deny: [N + 1] bool, True for items that are no candidates in any row.
        tile: columns computed at a time by the reference; by default as many as keep B * tile within 2^24 scores.
        out: scores [B, K] float32 and ids [B, K] int64, contiguous: written and returned. May lie in pinned memory of
            the host: the kernels write each list once, and the host sees it when they are done.
        workspace: at least `workspace_bytes` of uint8 for the triton backend; its contents do not matter and change.
        table_bytes: of this table, made after its last change, for the cpp backend: the same lists, to the bit, by a
            scan of a quarter of the bytes. Other backends do without.
        backend: auto, reference, triton (K up to 1,024, D up to 256, N up to 2^31 - 2^12), or cpp (CPU; float32 and
            bfloat16, K up to 65,536, D up to 65,536, N up to 2^31 - 2).
        overlap: what precedes this on the stream is a kernel, beside whose end the triton backend may start.

    Returns:
        Scores [B, K] float32, and ids [B, K] int64; where fewer than K candidates remain, -inf and 0.

    Raises:
        ValueError: shapes, dtypes, devices or k that do not fit.
        BackendError: the backend cannot run here.
    """
    tiles = Tiles(queries, table, exclude, tile)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    if deny is not None and (deny.shape != table.shape[:1] or deny.dtype != torch.bool or deny.device != table.device):
        raise ValueError(
            f"deny is {deny.dtype} {list(deny.shape)} on {deny.device}; expected bool {list(table.shape[:1])} "
            f"on {table.device}"
        )
    shape = (queries.shape[0], k)
    for name, given, dtype in zip(("scores", "ids"), out or (), (torch.float32, torch.int64), strict=False):
        reachable = given.device == queries.device or given.is_pinned()
        if not (given.shape == shape and given.dtype == dtype and reachable and given.is_contiguous()):
            raise ValueError(
                f"out's {name} are {given.dtype} {list(given.shape)} on {given.device}; expected contiguous {dtype} "
                f"{list(shape)} on {queries.device}, or pinned"
            )
    if table_bytes is not None:
        table_bytes.require(table)
    run = OP.resolve(backend, queries.device, queries.dtype, beyond_kernels(queries.shape[1], k, table.shape[0]))
    return run(tiles, k, deny, out, workspace, table_bytes, overlap)


def workspace_bytes(queries: Tensor, table: Tensor, k: int, excluded: int = 0) -> int:
    """Bytes of workspace that `score_topk` needs with the triton backend for these tensors.

    Args:
        queries: [B, D]; only shape, dtype and device matter.
        table: [N + 1, D].
        k: K.
        excluded: length of `exclude.ids`.
    """
    return _Plan.make(len(queries), len(table) - 1, queries, k, excluded).bytes


@torch.no_grad()
def _run(
    tiles: Tiles,
    k: int,
    deny: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
    workspace: Tensor | None,
    table_bytes: ByteTable | None,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    scores, ids = _lists(tiles, k, deny)
    return (scores, ids) if out is None else (out[0].copy_(scores), out[1].copy_(ids))


def _lists(tiles: Tiles, k: int, deny: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (len(tiles.queries), 0)
    best = torch.empty(shape, device=tiles.queries.device)
    best_ids = torch.empty(shape, dtype=torch.int64, device=tiles.queries.device)
    for tile in tiles:
        scores = tile.leave_out(-torch.inf)
        if deny is not None:
            scores.masked_fill_(deny[tile.first_id : tile.first_id + scores.shape[1]], -torch.inf)
        top, columns = _topk(scores, k)
        if best.shape[1] == 0:
            best, best_ids = top, columns + tile.first_id
            continue
        # Both parts are in order, and every id so far is below this tile's: a stable sort keeps ties by id.
        best, order = torch.cat((best, top), 1).sort(dim=1, descending=True, stable=True)
        best_ids = torch.cat((best_ids, columns + tile.first_id), 1).gather(1, order[:, :k])
        best = best[:, :k]
    missing = k - best.shape[1]
    if missing > 0:
        best = functional.pad(best, (0, missing), value=-torch.inf)
        best_ids = functional.pad(best_ids, (0, missing))
    return best, best_ids.masked_fill(best == -torch.inf, 0)


def _topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first min(k, T) of each row of scores [B, T] by (score descending, column ascending), and their columns."""
    if k >= scores.shape[1]:
        return _sorted(scores)
    values, columns = scores.topk(k + 1, dim=1)
    # An open end: the K-th place and the next one are equal, so which columns topk returned is chance.
    is_open = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
    columns = columns[:, :k].sort(dim=1).values
    values, order = _sorted(scores.gather(1, columns))
    columns = columns.gather(1, order)
    rows = is_open.nonzero()[:, 0]
    if len(rows) > 0:
        settled, settled_columns = _sorted(scores[rows])
        values[rows], columns[rows] = settled[:, :k], settled_columns[:, :k]
    return values, columns


def _sorted(scores: Tensor) -> tuple[Tensor, Tensor]:
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return values, order


@dataclass(frozen=True)
class _Plan:
    """How the kernels cut the catalogue and the batch, and what workspace that takes.

    Attributes:
        rows: rows at a time.
        group: items of a group.
        tiles: tiles of the catalogue.
        spans: spans of the catalogue; 0 where the groups are few enough to choose from them at once.
        tiles_of_chunk: tiles that a program of the scan takes, whole spans.
        tiles_of_span: tiles of a span.
        capacity: groups chosen at most.
        span_width: maxima that the choice of spans holds in registers.
        group_width: likewise that of groups.
        scan: shapes of the scan.
        finish: shapes of the rest.
        sizes: workspace, each buffer's name, dtype and number of elements.
    """

    rows: int
    group: int
    tiles: int
    spans: int
    tiles_of_chunk: int
    tiles_of_span: int
    capacity: int
    span_width: int
    group_width: int
    scan: Shapes
    finish: Shapes
    sizes: tuple[tuple[str, torch.dtype, int], ...]

    @classmethod
    def make(cls, batch: int, items: int, queries: Tensor, k: int, excluded: int) -> _Plan:
        device, d = queries.device, queries.shape[1]
        kind = "32bit" if queries.dtype == torch.float32 else "16bit"
        few = "few" if batch <= 64 else "many"
        finish = dict(tile_shapes("score_topk", f"finish_{kind}_{few}", device))
        scan = dict(tile_shapes("score_topk", f"scan_{kind}_{few}", device))
        for shapes, name in ((scan, "BN"), (finish, "R")):  # tiles of wider rows keep their bytes
            shapes[name] = max(16, shapes[name] * 128 // max(128, _power_of_two(d)))
        if not launches_overlap(device):  # the copy engine came with the same GPUs
            scan["TMA"] = finish["PDL"] = 0
        group = min(scan["BN"], _group_size(batch, items))
        tiles = _parts(items, scan["BN"])
        rows = MAX_WORKSPACE * group // (4 * items) // ROWS_AT_LEAST * ROWS_AT_LEAST
        rows = min(batch, max(ROWS_AT_LEAST, rows))
        chunks = max(1, scan["PER_SM"] * multiprocessors(device) // _parts(rows, scan["M"]))
        tiles_of_chunk = _parts(tiles, chunks)
        of_tile = scan["BN"] // group
        groups = tiles * of_tile
        capacity = k + max(4, k * finish["SLACK"] // 100)
        spans, tiles_of_span, compared = 0, 1, groups
        if groups > max(min(256, finish["WIDTH"]), 2 * capacity):
            # As many spans as there are groups in the chosen ones: their sum is least so.
            tiles_of_span = max(1, math.isqrt(groups // capacity) // of_tile)
            tiles_of_chunk, tiles_of_span = _even_spans(tiles_of_chunk, tiles_of_span, chunks, finish["WIDTH"])
            spans = _parts(tiles, tiles_of_span)
            compared = capacity * tiles_of_span * of_tile
        span_width, group_width = (min(max(128, _power_of_two(n)), finish["WIDTH"]) for n in (spans, compared))
        buffer = _power_of_two(max(128, _power_of_two(k)) + finish["R"])
        sizes = (
            ("entries", torch.int64, rows * buffer),
            ("group_max", torch.float32, rows * groups),
            ("span_max", torch.float32, rows * spans),
            ("bounds", torch.float32, excluded),
            ("chosen_spans", torch.int32, rows * capacity),
            ("chosen_groups", torch.int32, rows * capacity + excluded),
        )
        chosen = (capacity, span_width, group_width)
        return cls(rows, group, tiles, spans, tiles_of_chunk, tiles_of_span, *chosen, scan, finish, sizes)

    @property
    def bytes(self) -> int:
        """Bytes of the workspace."""
        return sum(_aligned(dtype, size) for _, dtype, size in self.sizes)

    def buffers(self, workspace: Tensor) -> dict[str, Tensor]:
        """The buffers within the workspace."""
        buffers, at = {}, 0
        for name, dtype, size in self.sizes:
            buffers[name] = workspace[at : at + size * dtype.itemsize].view(dtype)
            at += _aligned(dtype, size)
        return buffers


def _aligned(dtype: torch.dtype, size: int) -> int:
    return _parts(size * dtype.itemsize, 256) * 256


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def _even_spans(tiles: int, wanted: int, chunks: int, most: int) -> tuple[int, int]:
    """Tiles of a chunk, at least `tiles`, and of its spans, near `wanted`.

    Of the ways to cut a chunk one that adds at most 2 % tiles, if possible into powers of two. `most` limits the number
    of all spans, where there are not more chunks anyway.
    """
    near = max(1, round(tiles / wanted))
    most = max(1, min(most, _power_of_two(chunks * near)) // chunks)

    def badness(spans: int) -> tuple[float, bool, int]:
        size = _parts(tiles, spans)
        return max(1.02 * tiles, spans * size), size != _power_of_two(size), abs(spans - near)

    spans = min(range(min(max(1, near // 2), most), most + 1), key=badness)
    return _parts(tiles, spans) * spans, _parts(tiles, spans)


def _group_size(batch: int, items: int) -> int:
    """Small groups cost memory for their maxima, large ones work when their items are scored again."""
    if items <= 1 << 22:
        return 8 if items <= 1 << 16 else 16 if batch <= 64 else 32
    return 64 if items <= 1 << 25 else 128


@functools.lru_cache(maxsize=64)
def beyond_kernels(d: int, k: int, length: int) -> dict[str, str]:
    """Why a call is not for the kernels, by backend."""
    limits = {
        "triton": (MAX_K, MAX_WIDTH, MAX_ITEMS),
        "cpp": (score_topk_cpu.MAX_K, score_topk_cpu.MAX_WIDTH, score_topk_cpu.MAX_ITEMS),
    }
    reasons = {}
    for backend, most in limits.items():
        for name, value, limit in zip("KDN", (k, d, length - 1), most, strict=True):
            if value > limit:
                reasons[backend] = f"its kernels take {name} up to {limit}, not {value}"
    return reasons


@torch.no_grad()
def _run_triton(
    tiles: Tiles,
    k: int,
    deny: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
    workspace: Tensor | None,
    table_bytes: ByteTable | None,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    from fave_fast.kernels import score_topk as kernels

    queries, table = tiles.queries.contiguous(), tiles.table.contiguous()
    batch, items, device = len(queries), len(table) - 1, queries.device
    if out is None:
        out = (
            torch.empty(batch, k, device=device),
            torch.empty(batch, k, dtype=torch.int64, device=device),
        )
    scores, ids = out
    if batch == 0 or items == 0:
        scores.fill_(-math.inf)
        ids.zero_()
        return out
    exclude = tiles.exclude if tiles.exclude is not None and len(tiles.exclude.ids) > 0 else None
    plan = _Plan.make(batch, items, queries, k, 0 if exclude is None else len(exclude.ids))
    if workspace is None:
        workspace = torch.empty(plan.bytes, dtype=torch.uint8, device=device)
    if workspace.dtype != torch.uint8 or workspace.numel() < plan.bytes or workspace.device != device:
        raise ValueError(
            f"workspace is {workspace.dtype} {list(workspace.shape)} on {workspace.device}; "
            f"expected uint8 [{plan.bytes}] on {device}"
        )
    # The copy engine takes rows that start at multiples of 16 bytes.
    aligned = table.data_ptr() % 16 == 0 and table.shape[1] * table.element_size() % 16 == 0
    scan = plan.scan if aligned else {**plan.scan, "TMA": 0}
    buffers = plan.buffers(workspace)
    deny = None if deny is None else deny.contiguous()
    excluded = None if exclude is None else (exclude.ids.contiguous(), exclude.offsets.contiguous())
    overlap = overlap and launches_overlap(device)
    for start in range(0, batch, plan.rows):
        part = slice(start, min(start + plan.rows, batch))
        kernels.score_topk(
            queries[part],
            table,
            deny,
            None if excluded is None else (excluded[0], excluded[1][start:]),
            buffers,
            scores[part],
            ids[part],
            k=k,
            capacity=plan.capacity,
            group=plan.group,
            tiles=plan.tiles,
            spans=plan.spans,
            tiles_of_chunk=plan.tiles_of_chunk,
            tiles_of_span=plan.tiles_of_span,
            span_width=plan.span_width,
            group_width=plan.group_width,
            scan_shapes=scan,
            finish_shapes=plan.finish,
            overlap=overlap,
        )
    return out


def _run_cpp(
    tiles: Tiles,
    k: int,
    deny: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
    workspace: Tensor | None,
    table_bytes: ByteTable | None,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    if out is None:
        count = tiles.queries.shape[0]
        out = torch.empty(count, k), torch.empty(count, k, dtype=torch.int64)
    score_topk_cpu.run(tiles, k, deny, out, table_bytes)
    return out


OP: Op[_Run] = Op(
    "score_topk",
    (
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("cpp", _run_cpp, native.why_not),
        Implementation("reference", _run),
    ),
)
