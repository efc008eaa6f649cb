"""The exact top K of the whole catalogue by inner product.

The order is: higher score first, and of equal ones the lower id first. `torch.topk` leaves the order of equal scores
open, so rows where a tie crosses the K-th place are settled by a stable sort; the others never pay for one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fave_fast.ops.exclusions import Exclusions
from fave_fast.ops.registry import Implementation, Op
from fave_fast.ops.tiles import Tiles

_Run = Callable[[Tiles, int, Tensor | None], tuple[Tensor, Tensor]]


@torch.no_grad()
def score_topk(
    queries: Tensor,
    table: Tensor,
    k: int,
    exclude: Exclusions | None = None,
    deny: Tensor | None = None,
    *,
    tile: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The K best items of each row, out of the items 1 to N.

    An item that is excluded or denied, or whose score is -inf or NaN, never appears.

    Args:
        queries: [B, D] floating point.
        table: [N + 1, D], same dtype and device; row 0 is the padding and never a candidate.
        k: K, at least 1; may exceed N.
        exclude: ids that are no candidates, row by row.
        deny: [N + 1] bool, True for items that are no candidates in any row.
        tile: columns computed at a time; by default as many as keep B * tile within 2^24 scores.
        backend: auto or reference.

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
    return OP.resolve(backend, queries.device, queries.dtype)(tiles, k, deny)


def _run(tiles: Tiles, k: int, deny: Tensor | None) -> tuple[Tensor, Tensor]:
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


OP: Op[_Run] = Op("score_topk", (Implementation("reference", _run),))
