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
from fave_fast.ops.registry import Implementation, Op, cpu_extension
from fave_fast.ops.tiles import Tile, Tiles

# (scores [B, T], NaN where there is no candidate; first id; target scores [B]; targets [B]; counts [B], added to)
_Count = Callable[[Tensor, int, Tensor, Tensor, Tensor], None]
_Run = Callable[[Tiles, Tensor], Tensor]


@torch.no_grad()
def rank_count(
    queries: Tensor,
    table: Tensor,
    targets: Tensor,
    exclude: Exclusions | None = None,
    *,
    tile: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rank each row's target among the items 1 to N.

    Args:
        queries: [B, D] floating point.
        table: [N + 1, D], same dtype and device; row 0 is the padding and never a candidate.
        targets: [B] int64, from 1 to N. A target is a candidate even where it is excluded.
        exclude: ids that are no candidates, row by row.
        tile: columns computed at a time; by default as many as keep B * tile within 2^24 scores. More than one tile
            means that each product is computed twice.
        backend: auto, reference or cpp (counts in C++; CPU).

    Returns:
        [B] int64, from 1.

    Raises:
        ValueError: shapes, dtypes, devices or targets that do not fit.
        BackendError: the backend cannot run here.
    """
    tiles = Tiles(queries, table, exclude, tile)
    if targets.shape != queries.shape[:1] or targets.dtype != torch.int64 or targets.device != queries.device:
        raise ValueError(
            f"targets are {targets.dtype} {list(targets.shape)} on {targets.device}; expected int64 "
            f"{list(queries.shape[:1])} on {queries.device}"
        )
    if bool(((targets < 1) | (targets >= len(table))).any()):
        raise ValueError(f"a target is outside the catalogue; expected ids from 1 to {len(table) - 1}")
    return OP.resolve(backend, queries.device, queries.dtype)(tiles, targets.contiguous())


def _run(tiles: Tiles, targets: Tensor, count: _Count) -> Tensor:
    # The target's score is read out of the very tiles that are counted: computed any other way it could differ in the
    # last bit, and equal embeddings would no longer tie.
    passes: Iterable[Tile] = list(tiles) if len(tiles.bounds()) == 2 else tiles
    target_scores = torch.full(targets.shape, -torch.inf, device=targets.device)
    for tile in passes:
        column = targets - tile.first_id
        width = tile.scores.shape[1]
        score = tile.scores.gather(1, column.clamp(0, width - 1)[:, None])[:, 0]
        target_scores = torch.where((column >= 0) & (column < width), score, target_scores)
    counts = torch.zeros_like(targets)
    for tile in passes:
        count(tile.leave_out(torch.nan), tile.first_id, target_scores, targets, counts)
    return counts + 1


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
        Implementation("cpp", functools.partial(_run, count=_count_cpp), cpu_extension),
        Implementation("reference", functools.partial(_run, count=_count_torch)),
    ),
)
