"""A user's own items pushed down inside the inner product, for indexes that can leave nothing out.

The engine leaves a user's own items out, exactly. They stay candidates in an index of somebody else's, which ranks by
inner products and knows no users, and in `raw` figures; and they rank high there, for what comes next is near them. A
sketch gives each item R channels more, a code c_j of length 1, and each query those of its history:

    [f, -sum_i w_i c_i] . [e_j, c_j] = f . e_j - sum_i w_i (c_i . c_j).

An own item loses its w. For any other, signs drawn at random leave noise of mean 0 and variance sum_i w_i^2 / R (Alon,
Matias and Szegedy 1996), so no w is more than it must be: it brings the item's score down to where the K-th of N normal
scores would be, by the mean and the variance that f's scores have over the catalogue,

    w_i = max(0, f . e_i - f . mean(e) - z sqrt(f^T cov(e) f)),    z = Phi^-1(1 - K / (N + 1)).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn import functional as F

from fave_fast.ops.exclusions import Exclusions
from fave_fast.precision import widened

CHANNELS = 128
_PAIRS = 1 << 18  # of a history's item and its query, whose rows are gathered at a time: 256 MiB at D = 128


@dataclass(frozen=True)
class HistorySketch:
    """A catalogue with codes, and the queries that go with it.

    Attributes:
        table: [N + 1, D + R], the embeddings and behind them the codes; row 0 is the padding.
        mean: [D], of the items' embeddings; float32 or, of a table in it, float64.
        covariance: [D, D], likewise.
        level: z.
    """

    table: Tensor
    mean: Tensor
    covariance: Tensor
    level: float

    @classmethod
    @torch.no_grad()
    def of(cls, embedding: Tensor, channels: int = CHANNELS, k: int = 20, seed: int = 0) -> HistorySketch:
        """The sketch of a table.

        Args:
            embedding: [N + 1, D] floating point; row 0 is the padding. Rows with NaN are of items that are gone.
            channels: R. Item j's code depends on R, j and the seed alone: a longer catalogue keeps the codes it had.
            k: K, where the lists that are to be without own items end.
            seed: of the codes.

        Raises:
            ValueError: no items, or channels or k below 1.
        """
        rows = widened(embedding[1:])
        rows = rows[rows.isfinite().all(1)]
        for name, value in (("the number of items", len(rows)), ("channels", channels), ("k", k)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        generator = torch.Generator().manual_seed(seed)
        signs = 2 * torch.randint(0, 2, (len(embedding) - 1, channels), generator=generator, dtype=torch.int8) - 1
        codes = F.pad(signs.to(embedding) * channels**-0.5, (0, 0, 1, 0))
        covariance = torch.cov(rows.T, correction=0).reshape(rows.shape[1], -1)
        level = NormalDist().inv_cdf(1 - min(k, len(rows)) / (len(rows) + 1))
        return cls(torch.cat((embedding, codes), dim=1), rows.mean(0), covariance, level)

    @torch.no_grad()
    def queries(self, endpoints: Tensor, history: Exclusions) -> Tensor:
        """What to ask an index of `table` with.

        Args:
            endpoints: [B, D], f, of the table's dtype and on its device.
            history: each row's own items; ids outside the catalogue change nothing, nor do repetitions.

        Returns:
            [B, D + R], like `endpoints`.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        d, ours = len(self.mean), (self.table.dtype, self.table.device)
        if endpoints.shape != (len(history), d) or (endpoints.dtype, endpoints.device) != ours:
            raise ValueError(
                f"endpoints are {endpoints.dtype} {list(endpoints.shape)} on {endpoints.device}; expected "
                f"{ours[0]} {[len(history), d]} on {ours[1]}"
            )
        if history.ids.device != ours[1]:
            raise ValueError(f"the histories are on {history.ids.device}; expected {ours[1]}")
        f = widened(endpoints)
        high = f @ self.mean + self.level * ((f @ self.covariance) * f).sum(1).clamp_min(0).sqrt()
        rows, items = self._pairs(history)
        above = [
            (f[row] * self.table[item, :d]).sum(1) - high[row]
            for row, item in zip(torch.split(rows, _PAIRS), torch.split(items, _PAIRS), strict=True)
        ]
        w = torch.cat(above)
        own = F.embedding_bag(
            items,
            self.table[:, d:],
            torch.searchsorted(rows, torch.arange(len(history) + 1, device=rows.device)),
            mode="sum",
            per_sample_weights=torch.where(w > 0, w, 0).to(ours[0]),  # 0, too, for an item that is gone
            include_last_offset=True,
        )
        return torch.cat((endpoints, -own), dim=1)

    def _pairs(self, history: Exclusions) -> tuple[Tensor, Tensor]:
        """Rows and items, int64 [S], each pair once, ascending."""
        ids, items = history.ids.long(), len(self.table)
        keys = torch.unique((history.owners() * items + ids)[(ids > 0) & (ids < items)])
        return keys // items, keys % items
