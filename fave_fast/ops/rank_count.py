"""The target's rank among the whole catalogue, by counting what comes before it.

The order is: higher inner product first, and of equal ones the lower id first. With the target's score s,

    rank = 1 + |{i : s_i > s}| + |{i : s_i = s, i < target}|,

i over the items 1 to N that are not excluded. A NaN counts as minus infinity. Scores are computed in the dtype given
(16-bit ones accumulate and stay in float32) and compared in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fave_fast.ops.exclusions import Exclusions
from fave_fast.ops.registry import Implementation, Op, cpu_extension, interpreting, not_interpreted, triton_kernels
from fave_fast.ops.tiles import Tile, Tiles, whole_rows
from fave_fast.ops.tuning import multiprocessors, tile_shapes
from fave_fast.profiling import ranged

# (scores [B, T], NaN where there is no candidate; first id; target scores [B]; targets [B]; counts [B], added to)
_Count = Callable[[Tensor, int, Tensor, Tensor, Tensor], None]
# (tiles; targets [B]; where the ranks [B] go; workspace [2, B] or None)
_Run = Callable[[Tiles, Tensor, Tensor, Tensor | None], None]

# Up to here small tiles win, in microseconds on one H200, D = 128, bf16: 14.0 instead of 15.7 at B = 512, N = 12,101.
_FEW_ROWS, _FEW_SCORES = 64, 1 << 23


@ranged("fave/rank")
@torch.no_grad()
def rank_count(
    queries: Tensor,
    table: Tensor,
    targets: Tensor,
    exclude: Exclusions | None = None,
    *,
    tile: int | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rank each row's target among the items 1 to N.

    With the triton backend, `out` and `workspace` given, and rows of whole 16 bytes, nothing is allocated, the host
    never waits, and the call can be captured in a CUDA graph. Its ranks do not depend on the rest of the batch.

    Args:
        queries: [B, D] floating point.
        table: [N + 1, D], same dtype and device; row 0 is the padding and never a candidate.
        targets: [B] int64, from 1 to N. A target is a candidate even where it is excluded.
        exclude: ids that are no candidates, row by row.
        tile: columns computed at a time by reference and cpp; by default as many as keep B * tile within 2^24 scores.
            More than one tile means that each product is computed twice.
        out: [B] int64, contiguous: where the ranks go, and what is returned.
        workspace: [2, B] float32, contiguous: overwritten by triton.
        backend: auto, reference, cpp (counts in C++; CPU) or triton (one pass over the table, no scores in memory).

    Returns:
        [B] int64, from 1.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; or, on the CPU, a target that is no item. Elsewhere the
            targets are not looked at, which would make the host wait, and such a target's rank means nothing.
        BackendError: the backend cannot run here.
    """
    tiles = Tiles(queries, table, exclude, tile)
    if targets.shape != queries.shape[:1] or targets.dtype != torch.int64 or targets.device != queries.device:
        raise ValueError(
            f"targets are {targets.dtype} {list(targets.shape)} on {targets.device}; expected int64 "
            f"{list(queries.shape[:1])} on {queries.device}"
        )
    if targets.device.type == "cpu" and bool(((targets < 1) | (targets >= len(table))).any()):
        raise ValueError(f"a target is outside the catalogue; expected ids from 1 to {len(table) - 1}")
    for name, buffer, shape, dtype in (
        ("out", out, targets.shape, torch.int64),
        ("workspace", workspace, (2, *targets.shape), torch.float32),
    ):
        if buffer is not None and not (
            buffer.shape == shape
            and buffer.dtype == dtype
            and buffer.device == targets.device
            and buffer.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {buffer.dtype} {list(buffer.shape)} on {buffer.device}; expected contiguous {dtype} "
                f"{list(shape)} on {targets.device}"
            )
    run = OP.resolve(backend, queries.device, queries.dtype)
    ranks = torch.empty_like(targets, memory_format=torch.contiguous_format) if out is None else out
    if len(targets) > 0 and len(table) > 1:
        run(tiles, targets.contiguous(), ranks, workspace)
    return ranks


def _run(tiles: Tiles, targets: Tensor, ranks: Tensor, workspace: Tensor | None, count: _Count) -> None:
    # The target's score is read out of the very tiles that are counted: computed any other way it could differ in the
    # last bit, and equal embeddings would no longer tie.
    passes: Iterable[Tile] = list(tiles) if len(tiles.bounds()) == 2 else tiles
    target_scores = torch.full(targets.shape, -torch.inf, device=targets.device)
    for tile in passes:
        column = targets - tile.first_id
        width = tile.scores.shape[1]
        score = tile.scores.gather(1, column.clamp(0, width - 1)[:, None])[:, 0]
        target_scores = torch.where((column >= 0) & (column < width), score, target_scores)
    ranks.fill_(1)
    for tile in passes:
        count(tile.leave_out(torch.nan), tile.first_id, target_scores, targets, ranks)


def _run_triton(tiles: Tiles, targets: Tensor, ranks: Tensor, workspace: Tensor | None) -> None:
    from fave_fast.kernels import rank_count as kernels

    queries, table = whole_rows(tiles.queries), whole_rows(tiles.table)
    if workspace is None:
        workspace = torch.empty(2, len(targets), device=targets.device)
    shapes = tile_shapes("rank_count", _variant(queries, len(table) - 1), queries.device)
    exclude = tiles.exclude
    kernels.rank_count(
        queries,
        table,
        targets,
        None if exclude is None else exclude.ids.contiguous(),
        None if exclude is None else exclude.offsets.contiguous(),
        workspace[0],
        workspace[1],
        ranks,
        M=shapes["M"],
        T=shapes["T"],
        BK=min(shapes["BK"], max(16, 1 << (queries.shape[1] - 1).bit_length())),
        num_warps=shapes["num_warps"],
        num_stages=shapes["num_stages"],
        PDL=shapes["PDL"],
        resident=shapes["per_multiprocessor"] * multiprocessors(queries.device),
        interpreted=interpreting(),
    )


def _variant(queries: Tensor, n: int) -> str:
    few = len(queries) <= _FEW_ROWS
    if queries.dtype == torch.float32:
        return "fp32_few" if few else "fp32"
    few = few or len(queries) * n <= _FEW_SCORES
    return f"16bit_{'wide' if queries.shape[1] > 128 else 'narrow'}{'_few' if few else ''}"


def _count_torch(scores: Tensor, first_id: int, target_scores: Tensor, targets: Tensor, counts: Tensor) -> None:
    ids = torch.arange(first_id, first_id + scores.shape[1], device=scores.device)
    level = target_scores[:, None]
    before = (scores > level) | ((scores == level) & (ids < targets[:, None]))
    counts += before.sum(1)


def _count_cpp(scores: Tensor, first_id: int, target_scores: Tensor, targets: Tensor, counts: Tensor) -> None:
    from fave_fast import _C

    threads = torch.get_num_threads()
    _C.rank_count(scores.numpy(), first_id, target_scores.numpy(), targets.numpy(), counts.numpy(), threads)


OP: Op[_Run] = Op(
    "rank_count",
    (
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("cpp", functools.partial(_run, count=_count_cpp), cpu_extension),
        Implementation("reference", functools.partial(_run, count=_count_torch)),
    ),
)
