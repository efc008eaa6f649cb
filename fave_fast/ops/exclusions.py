"""Catalogue ids that a row's answer leaves out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exclusions:
    """For each of B rows the catalogue ids it leaves out, one row after the other.

    Ids may come in any order, repeat, or lie outside the catalogue (0, the padding, say): those change nothing.

    Attributes:
        ids: [E] int64 or int32.
        offsets: [B + 1] int64 or int32, from 0 to E; row b has `ids[offsets[b] : offsets[b + 1]]`. On the same device.

    Raises:
        ValueError: wrong shape, dtype or device; or, on the CPU, offsets that do not rise from 0 to E. Elsewhere the
            values are not looked at, which would make the host wait.
    """

    ids: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name, value in (("ids", self.ids), ("offsets", self.offsets)):
            if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"{name} is {value.dtype} {list(value.shape)}; expected int32 or int64 of one dimension"
                )
        if self.ids.device != self.offsets.device:
            raise ValueError(f"ids are on {self.ids.device} and offsets on {self.offsets.device}; expected one device")
        if self.offsets.shape[0] == 0:
            raise ValueError("offsets is empty; expected one entry more than there are rows")
        if self.offsets.device.type == "cpu":
            values = self.offsets.numpy()
            if values[0] != 0 or values[-1] != self.ids.shape[0] or (values[1:] < values[:-1]).any():
                raise ValueError(f"offsets do not rise from 0 to the number of ids, {len(self.ids)}")

    def __len__(self) -> int:
        """The number of rows, B."""
        return self.offsets.shape[0] - 1

    def owners(self) -> Tensor:
        """Which row each id is of: int64 [E]."""
        every = torch.arange(len(self), device=self.offsets.device)
        return every.repeat_interleave(self.offsets.diff(), output_size=len(self.ids))

    @classmethod
    def from_lists(cls, rows: Sequence[Iterable[int]]) -> Exclusions:
        """One list of catalogue ids for each row, on the CPU."""
        lists = [list(row) for row in rows]
        offsets = list(itertools.accumulate(map(len, lists), initial=0))
        ids = list(itertools.chain.from_iterable(lists))
        return cls(torch.tensor(ids, dtype=torch.int64), torch.tensor(offsets, dtype=torch.int64))

    def to(self, device: torch.device | str) -> Exclusions:
        """The same on `device`."""
        return Exclusions(self.ids.to(device), self.offsets.to(device))

    def rows(self, start: int, stop: int) -> Exclusions:
        """Rows `start` to `stop`, not included, as views where that is possible.

        Raises:
            ValueError: the range is not within the rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start} to {stop}; expected a range within the {len(self)} rows")
        offsets = self.offsets[start : stop + 1]
        return Exclusions(self.ids[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
