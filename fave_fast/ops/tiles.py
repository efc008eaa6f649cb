"""Scores of a batch against the catalogue, one tile of columns at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fave_fast.ops.exclusions import Exclusions

MAX_TILE_ELEMENTS = 1 << 24  # 64 MiB of float32 scores


class Sizes(NamedTuple):
    """What decides which kernels take a call: B, D, K and N."""

    rows: int
    d: int
    k: int
    items: int


@dataclass(frozen=True)
class Tile:
    """Scores of all rows for the catalogue ids from `first_id` on.

    Attributes:
        first_id: catalogue id of column 0.
        scores: [B, T] float32; no NaN (one that was computed is -inf here). May be written to.
        excluded: rows and columns, each [X] int64, of the scores that are to be left out.
    """

    first_id: int
    scores: Tensor
    excluded: tuple[Tensor, Tensor] | None

    def leave_out(self, value: float) -> Tensor:
        """`scores`, with `value` written over what is excluded."""
        if self.excluded is not None:
            self.scores[self.excluded] = value
        return self.scores


@dataclass(frozen=True)
class Tiles:
    """Items 1 to N of the catalogue in tiles; each iteration computes the same products again.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or a tile below 1.
    """

    queries: Tensor
    table: Tensor
    exclude: Exclusions | None
    tile: int | None

    def __post_init__(self) -> None:
        queries, table = self.queries, self.table
        if queries.dim() != 2 or table.dim() != 2 or queries.shape[1] != table.shape[1] or table.shape[0] == 0:
            raise ValueError(
                f"queries {list(queries.shape)} and table {list(table.shape)}; expected [B, D] and [N + 1, D]"
            )
        if queries.dtype != table.dtype or not queries.is_floating_point():
            raise ValueError(f"queries are {queries.dtype} and table {table.dtype}; expected one floating-point dtype")
        if queries.device != table.device:
            raise ValueError(f"queries are on {queries.device} and table on {table.device}; expected one device")
        if self.exclude is not None and len(self.exclude) != queries.shape[0]:
            raise ValueError(f"exclude has {len(self.exclude)} rows; expected one for each of {len(queries)} queries")
        if self.exclude is not None and self.exclude.ids.device != queries.device:
            raise ValueError(f"exclude is on {self.exclude.ids.device}; expected {queries.device}")
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tile is {self.tile}; expected at least 1")

    def bounds(self) -> list[int]:
        """First ids of the tiles, and N + 1."""
        tile = self.tile or max(1, MAX_TILE_ELEMENTS // max(1, len(self.queries)))
        return [*range(1, len(self.table), tile), len(self.table)]

    def __iter__(self) -> Iterator[Tile]:
        """Compute tile after tile; one is let go before the next is made, if the caller lets go of it."""
        bounds = self.bounds()
        excluded = self._excluded(bounds)
        for t, (first, stop) in enumerate(itertools.pairwise(bounds)):
            scores = _product(self.queries, self.table[first:stop])
            scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            yield Tile(first, scores, excluded[t])

    def _excluded(self, bounds: list[int]) -> list[tuple[Tensor, Tensor] | None]:
        """For each tile the rows and columns that are excluded: the pairs sorted by id once, then cut."""
        if self.exclude is None or len(self.exclude.ids) == 0:
            return [None] * len(bounds)
        device = self.queries.device
        ids, order = self.exclude.ids.long().sort()
        rows = self.exclude.owners()[order]
        cuts = torch.searchsorted(ids, torch.tensor(bounds, device=device)).tolist()
        return [
            (rows[cuts[t] : cuts[t + 1]], ids[cuts[t] : cuts[t + 1]] - bounds[t]) if cuts[t] < cuts[t + 1] else None
            for t in range(len(bounds) - 1)
        ]


def _product(queries: Tensor, items: Tensor) -> Tensor:
    """Inner products [B, T] in float32, never rounded to a 16-bit format on the way."""
    if queries.dtype in (torch.bfloat16, torch.float16):
        if queries.device.type == "cuda":
            return torch.mm(queries, items.T, out_dtype=torch.float32)
        return queries.float() @ items.float().T
    return (queries @ items.T).float()


def whole_rows(rows: Tensor) -> Tensor:
    """`rows` if it lies as the kernels need it (contiguous, base and rows of whole 16 bytes), else a copy that does."""
    unit = 16 // rows.element_size()
    missing = -rows.shape[1] % unit
    if missing:
        return functional.pad(rows, (0, missing))
    rows = rows.contiguous()
    return rows if rows.data_ptr() % 16 == 0 else rows.clone()
