"""The exact top K of the whole catalogue by inner product.

The order is: higher score first, and of equal ones the lower id first. `torch.topk` leaves the order of equal scores
open, so rows where a tie crosses the K-th place are settled by a stable sort; the others never pay for one.

The Triton kernels (`kernels/score_topk.py`) hold no [B, N] matrix: of every group of neighbouring items they keep the
largest score, choose groups, and compute the scores of these groups' items once more. With a table in bytes
(`kernels/score_topk_bytes.py`) they keep the largest upper bound, and prove the list or compute it by the table. Up to
eight queries of a catalogue of some ten thousand items are for two launches in C++ (`csrc/gpu_score_topk.cuh`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fave_fast.ops import native, score_topk_cpu, score_topk_gpu
from fave_fast.ops.byte_table import ByteTable, KernelByteTable, NativeByteTable
from fave_fast.ops.exclusions import Exclusions
from fave_fast.ops.registry import Implementation, Op, not_interpreted, triton_kernels
from fave_fast.ops.tiles import Sizes, Tiles, whole_rows
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
HEAD = 5  # int32 a row, of the kernels

# Where the kernels scan bytes. Smaller tables are read in less time than what the bytes' two further launches take; and
# more rows than a tile's 16 are more arithmetic than reading the table in 16 bits takes: of 10 M items 64 rows took
# 1,256 us by bytes and 752 without, 16 rows 403 and 641 (H200).
BYTES_LEAST_ITEMS = 1 << 18
BYTES_MOST_ROWS = 16

# K up to which one program a row, `finish`, makes the lists; for more than 64 rows, of which each multiprocessor has
# some anyway, twice as many. With the scan of 100,000 items it and the three launches in its place take, in us (H200,
# 3096ed9): one row, K = 20: 18 and 20, 50: 27 and 21, 200: 60 and 21, 1,000: 246 and 33; 64 rows 20 and 24, 29 and 25,
# 64 and 33, 326 and 91; 512 rows 59 and 63, 91 and 76, 245 and 127, 1,313 and 452. Of 12,101 items 512 rows take 32 and
# 42 for K = 50, 51 and 56 for 100.
ONE_PROGRAM_MOST_K = 32


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

    On a GPU triton and cpp never make the host wait, and with contiguous tensors, `out` and `workspace` they allocate
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
        workspace: at least `workspace_bytes` of uint8 on a GPU; its contents do not matter and change.
        table_bytes: of this table, made or refreshed after its last change: the same lists, to the bit, by a scan of
            one byte an element, where the backend is the one that it was made for, cpp or triton. The triton backend
            scans it for `BYTES_LEAST_ITEMS` and more and up to `BYTES_MOST_ROWS` queries. Others do without.
        backend: auto, reference, triton (K up to 1,024, D up to 256, N up to 2^31 - 2^12), or cpp: on a CPU float32
            and bfloat16, K up to 65,536, D up to 65,536, N up to 2^31 - 2; on a Hopper GPU bfloat16, B up to 8, K up
            to 32, D of 64, 128 or 256, N up to 256 for each multiprocessor.
        overlap: what precedes this on the stream is a kernel, beside whose end triton and cpp may start on a GPU. None
            that may still run then writes the table or `deny`.

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
    sizes = Sizes(len(queries), queries.shape[1], k, len(table) - 1)
    run = OP.resolve(backend, queries.device, queries.dtype, beyond_kernels(sizes, queries.device))
    return run(tiles, k, deny, out, workspace, table_bytes, overlap)


def workspace_bytes(
    queries: Tensor, table: Tensor, k: int, excluded: int = 0, table_bytes: ByteTable | None = None
) -> int:
    """Bytes of workspace that `score_topk` needs on a GPU for these tensors, with any backend.

    Args:
        queries: [B, D]; only shape, dtype and device matter.
        table: [N + 1, D].
        k: K.
        excluded: length of `exclude.ids`.
        table_bytes: as in `score_topk`.
    """
    batch, items = len(queries), len(table) - 1
    if batch == 0 or items == 0:
        return 0
    size = 0
    sizes = Sizes(batch, queries.shape[1], k, items)
    if score_topk_gpu.beyond(sizes, queries.device) is None:
        size = score_topk_gpu.workspace_bytes(sizes, queries.device)
    if k > MAX_K:
        return size
    size = max(size, _Plan.make(batch, items, queries, k, excluded).bytes)
    if _scanned(batch, items, table_bytes) is None:
        return size
    return _aligned(torch.int32, batch) + max(size, _Plan.make(batch, items, queries, k, excluded, in_bytes=True).bytes)


def _scanned(batch: int, items: int, table_bytes: ByteTable | None) -> KernelByteTable | None:
    """The bytes, where the kernels scan them."""
    fits = 0 < batch <= BYTES_MOST_ROWS and items >= BYTES_LEAST_ITEMS
    return table_bytes if fits and isinstance(table_bytes, KernelByteTable) else None


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
        cut: of the catalogue and the lists, the fields of the kernels' `Cut`.
        scan: shapes of the scan.
        lists: shapes of the rest, `finish` or `choose`, `rescore` and `rank`.
        sizes: workspace, each buffer's name, dtype and number of elements.
    """

    rows: int
    cut: dict[str, int]
    scan: Shapes
    lists: dict[str, Shapes]
    sizes: tuple[tuple[str, torch.dtype, int], ...]

    @classmethod
    def make(cls, batch: int, items: int, queries: Tensor, k: int, excluded: int, *, in_bytes: bool = False) -> _Plan:
        device, d = queries.device, queries.shape[1]
        kind = "32bit" if queries.dtype == torch.float32 else "16bit"
        few = "few" if batch <= 64 else "many"
        one = k <= ONE_PROGRAM_MOST_K * (1 if batch <= 64 else 2)
        if one:
            names = {"finish": f"certify_{kind}" if in_bytes else f"finish_{kind}_{few}"}
        else:
            names = {"choose": f"choose_{few}", "rescore": f"rescore_{kind}_{few}", "rank": f"rank_{few}"}
        lists = {name: dict(tile_shapes("score_topk", variant, device)) for name, variant in names.items()}
        scan = dict(tile_shapes("score_topk", "scan_8bit" if in_bytes else f"scan_{kind}_{few}", device))
        choosing, scoring = (lists["finish"],) * 2 if one else (lists["choose"], lists["rescore"])
        for shapes, name in ((scan, "BN"), (scoring, "R")):  # tiles of wider rows keep their bytes
            shapes[name] = max(16, shapes[name] * 128 // max(128, _power_of_two(d)))
        if not launches_overlap(device):  # the copy engine came with the same GPUs
            scan["TMA"] = 0
            for shapes in lists.values():
                shapes["PDL"] = 0
        wanted = 2 * k + 24 if in_bytes else k
        group = min(scan["BN"], _group_size(batch, items, in_bytes, not one))
        tiles = _parts(items, scan["BN"])
        rows = MAX_WORKSPACE * group // (4 * items) // ROWS_AT_LEAST * ROWS_AT_LEAST
        rows = min(batch, max(ROWS_AT_LEAST, rows))
        chunks = max(1, scan["PER_SM"] * multiprocessors(device) // _parts(rows, scan["M"]))
        tiles_of_chunk = _parts(tiles, chunks)
        of_tile = scan["BN"] // group
        groups = tiles * of_tile
        capacity = wanted + max(4, wanted * choosing["SLACK"] // 100)
        spans, tiles_of_span, compared = 0, 1, groups
        most = choosing["WIDTH"]
        # Of a long list spans of a tile may leave hardly a group out.
        if groups > (max(min(256, most), 2 * capacity) if one else max(most, 2 * capacity * of_tile)):
            # As many spans as there are groups in the chosen ones: their sum is least so.
            tiles_of_span = max(1, math.isqrt(groups // capacity) // of_tile)
            tiles_of_chunk, tiles_of_span = _even_spans(tiles_of_chunk, tiles_of_span, chunks, most)
            spans = _parts(tiles, tiles_of_span)
            compared = capacity * tiles_of_span * of_tile
        span_width, group_width = (min(max(128, _power_of_two(n)), most) for n in (spans, compared))
        parts = 0
        entries = rows * _power_of_two(max(128, _power_of_two(k)) + scoring["R"])
        if not one:
            # All programs at once: a few more than there is room for would take the time of as many again.
            room = max(1, scoring["PER_SM"] * multiprocessors(device) // rows)
            parts = min(room, _parts(capacity * group, scoring["R"]))
            entries = (rows * capacity + excluded) * group
        sizes = (
            ("entries", torch.int64, entries),
            ("group_max", torch.float32, rows * groups),
            ("span_max", torch.float32, rows * spans),
            ("bounds", torch.float32, excluded),
            ("chosen_spans", torch.int32, rows * capacity),
            ("chosen_groups", torch.int32, rows * capacity + excluded),
            ("heads", torch.int32, 0 if one else rows * HEAD),
        )
        cut = {
            "k": k, "wanted": wanted, "capacity": capacity, "group": group, "tiles": tiles, "spans": spans,
            "tiles_of_chunk": tiles_of_chunk, "tiles_of_span": tiles_of_span,
            "span_width": span_width, "group_width": group_width, "parts": parts,
        }  # fmt: skip
        return cls(rows, cut, scan, lists, sizes)

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


def _group_size(batch: int, items: int, in_bytes: bool = False, long: bool = False) -> int:
    """Small groups cost memory for their maxima, large ones work when their items are scored again.

    Of groups that have bounds only more are scored again, and they are smaller. Of long lists the work weighs more: for
    512 rows, 1 M items and K = 1,000, groups of 32 are 5 GB of items' rows and 64 MB of maxima, groups of 8 are 1.2 GB
    and 256 MB. But one program chooses a row's groups, and few rows leave multiprocessors idle for the items.
    """
    if in_bytes:
        return 16 if items <= 1 << 22 else 32 if items <= 1 << 25 else 64
    if long and 1 << 16 < items <= 1 << 24:
        return 32 if batch <= 2 else 16 if batch <= 16 or items > 1 << 22 else 8
    if items <= 1 << 22:
        return 8 if items <= 1 << 16 else 16 if batch <= 64 else 32
    return 64 if items <= 1 << 25 else 128


@functools.lru_cache(maxsize=64)
def beyond_kernels(sizes: Sizes, device: torch.device) -> dict[str, str]:
    """Why a call of these sizes on `device` is not for the kernels, by backend."""
    limits = {"triton": (MAX_K, MAX_WIDTH, MAX_ITEMS)}
    reasons = {}
    if device.type == "cpu":
        limits["cpp"] = score_topk_cpu.MAX_K, score_topk_cpu.MAX_WIDTH, score_topk_cpu.MAX_ITEMS
    elif (reason := score_topk_gpu.beyond(sizes, device)) is not None:
        reasons["cpp"] = reason
    for backend, most in limits.items():
        for name, value, limit in zip("KDN", (sizes.k, sizes.d, sizes.items), most, strict=True):
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
    call = _KernelCall.of(tiles, k, deny, out, overlap)
    if call.empty:
        return call.nothing()
    call = call.within(workspace, workspace_bytes(call.queries, call.table, k, call.excluded_ids, table_bytes))
    scanned = _scanned(len(call.queries), len(call.table) - 1, table_bytes)
    if scanned is not None:
        _certified_lists(call, scanned)
    else:
        _plain_lists(call)
    return call.out


@dataclass(frozen=True)
class _KernelCall:
    """One call of a GPU's kernels, its arguments contiguous."""

    queries: Tensor
    table: Tensor
    deny: Tensor | None
    excluded: tuple[Tensor, Tensor] | None
    k: int
    out: _Out
    workspace: Tensor
    overlap: bool

    @classmethod
    def of(
        cls,
        tiles: Tiles,
        k: int,
        deny: Tensor | None,
        out: _Out | None,
        overlap: bool,
    ) -> _KernelCall:
        """The arguments, with memory for lists where the caller gave none; without workspace."""
        queries, table = tiles.queries.contiguous(), tiles.table.contiguous()
        batch, device = len(queries), queries.device
        if out is None:
            out = (
                torch.empty(batch, k, device=device),
                torch.empty(batch, k, dtype=torch.int64, device=device),
            )
        exclude = tiles.exclude if tiles.exclude is not None and len(tiles.exclude.ids) > 0 else None
        return cls(
            queries,
            table,
            None if deny is None else deny.contiguous(),
            None if exclude is None else (exclude.ids.contiguous(), exclude.offsets.contiguous()),
            k,
            out,
            queries.new_empty(0, dtype=torch.uint8),
            overlap and launches_overlap(device),
        )

    def within(self, workspace: Tensor | None, needed: int) -> _KernelCall:
        """The call with a workspace of `needed` bytes at least, the caller's or its own."""
        device = self.queries.device
        if workspace is None:
            workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        if workspace.dtype != torch.uint8 or workspace.numel() < needed or workspace.device != device:
            raise ValueError(
                f"workspace is {workspace.dtype} {list(workspace.shape)} on {workspace.device}; "
                f"expected uint8 [{needed}] on {device}"
            )
        return replace(self, workspace=workspace)

    @property
    def excluded_ids(self) -> int:
        """How many, over all rows."""
        return 0 if self.excluded is None else len(self.excluded[0])

    @property
    def empty(self) -> bool:
        """Whether there are no lists, or nothing for them."""
        return len(self.queries) == 0 or len(self.table) == 1

    def nothing(self) -> _Out:
        """Lists without items."""
        self.out[0].fill_(-math.inf)
        self.out[1].zero_()
        return self.out

    def plan(self, *, in_bytes: bool = False) -> _Plan:
        batch, items = len(self.queries), len(self.table) - 1
        return _Plan.make(batch, items, self.queries, self.k, self.excluded_ids, in_bytes=in_bytes)


def _plain_lists(call: _KernelCall, flags: Tensor | None = None) -> None:
    """Lists by the table itself; with `flags` [B] of the rows that have one."""
    from fave_fast.kernels import score_topk as kernels

    plan = call.plan()
    queries, table, (scores, ids) = call.queries, call.table, call.out
    # The copy engine takes rows that start at multiples of 16 bytes.
    aligned = table.data_ptr() % 16 == 0 and table.shape[1] * table.element_size() % 16 == 0
    buffers = plan.buffers(call.workspace)
    for start in range(0, len(queries), plan.rows):
        part = slice(start, min(start + plan.rows, len(queries)))
        kernels.score_topk(
            queries[part],
            table,
            call.deny,
            None if call.excluded is None else (call.excluded[0], call.excluded[1][start:]),
            buffers,
            scores[part],
            ids[part],
            cut=kernels.Cut(**plan.cut),
            scan_shapes=plan.scan if aligned else {**plan.scan, "TMA": 0},
            list_shapes=plan.lists,
            overlap=call.overlap,
            flags=None if flags is None else flags[part],
        )


def _certified_lists(call: _KernelCall, table_bytes: KernelByteTable) -> None:
    """Lists by the bytes, and by the table itself where their bounds prove none."""
    from fave_fast.kernels import score_topk as kernels
    from fave_fast.kernels import score_topk_bytes

    plan, room = call.plan(in_bytes=True), _aligned(torch.int32, len(call.queries))
    flags = call.workspace[: 4 * len(call.queries)].view(torch.int32)
    rest = call.workspace[room:]
    score_topk_bytes.score_topk(
        call.queries,
        call.table,
        (table_bytes.rows, table_bytes.words),
        call.deny,
        call.excluded,
        plan.buffers(rest),
        *call.out,
        cut=kernels.Cut(**plan.cut),
        scan_shapes=plan.scan,
        list_shapes=plan.lists,
        certified=kernels.Certified(flags, table_bytes.counts),
        overlap=call.overlap,
    )
    early = launches_overlap(call.queries.device)  # behind a kernel, wherever the call stands
    _plain_lists(replace(call, workspace=rest, overlap=early), flags)


def _run_cpp(
    tiles: Tiles,
    k: int,
    deny: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
    workspace: Tensor | None,
    table_bytes: ByteTable | None,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    if tiles.queries.device.type == "cuda":
        call = _KernelCall.of(tiles, k, deny, out, overlap)
        if call.empty:
            return call.nothing()
        sizes = Sizes(len(call.queries), call.queries.shape[1], k, len(call.table) - 1)
        call = call.within(workspace, score_topk_gpu.workspace_bytes(sizes, call.queries.device))
        rows = whole_rows(call.queries), whole_rows(call.table)
        score_topk_gpu.run(*rows, call.deny, call.excluded, call.out, call.workspace, overlap=call.overlap)
        return call.out
    if out is None:
        count = tiles.queries.shape[0]
        out = torch.empty(count, k), torch.empty(count, k, dtype=torch.int64)
    score_topk_cpu.run(tiles, k, deny, out, table_bytes if isinstance(table_bytes, NativeByteTable) else None)
    return out


def _why_no_cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    return score_topk_gpu.why_not(device, dtype) if device.type == "cuda" else native.why_not(device, dtype)


OP: Op[_Run] = Op(
    "score_topk",
    (
        Implementation("cpp", _run_cpp, _why_no_cpp),
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("reference", _run),
    ),
)
