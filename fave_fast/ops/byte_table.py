"""A table in one byte an element, by which `score_topk` finds the same lists to the bit from a part of the memory.

`csrc/score_topk.hpp` has the form and the proof of the CPU's. That of the kernels: with x an item's embedding, s its
scale (a bfloat16), X = round(x / s) in whole numbers up to 127, and likewise t and Q for the query q, but Q up to
127 * 256, the scan computes a = s t Q.X, the sum exactly, and

    q.x - a = q.(x - sX) + (q - tQ).sX <= |q| |x - sX| + |q - tQ| |sX|.

No element of q - tQ is larger than 0.52 t (half of t, and what the division loses), and t <= |q| / 32,512, so that
|q - tQ| <= 0.52 sqrt(D) |q| / 32,512. The score that is asked for, c, is q.x computed in float32. A matrix unit adds n
products and its sum so far at a time, each cut off at 23 bits of the largest, and cuts off the sum: with |q| |x| a
bound of all partial sums that loses at most (n + 2) 2^-23 |q| |x|, D / n times, so at most 6 D 2^-24 |q| |x| whatever n
is; float32 products added in their order lose less. A few roundings fall on a and on the bound. So

    c <= a + |q| e,  e = |x - sX| + (0.52 sqrt(D) / 32,512 + (8 D + 64) 2^-24) max(|x|, |sX|),

where one number e for each item, rounded up to a bfloat16, holds all that 8 bits may lose.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fave_fast.errors import BackendError
from fave_fast.ops import native

if TYPE_CHECKING:
    from fave_fast import _C

_AT_ONCE = 1 << 18  # rows that are quantised at a time, in float64
_WIDEST = 2.0**40  # scales beyond 2^+-40 have no bound: products would be rounded as subnormal numbers, or overflow
_NO_BOUND = 0x7F7F  # the largest bfloat16, as e: with the scale 0 it says that the item is always looked at
_NEVER = 0x7FC00000  # NaN as the scale says that it is never looked at


@dataclass(frozen=True)
class ByteTable(abc.ABC):
    """A table [N + 1, D] in one byte an element, for `score_topk`; the table itself is still read for the best items.

    Attributes:
        address: of the table in memory.
        shape: of the table.
    """

    address: int
    shape: tuple[int, ...]

    @staticmethod
    def pack(table: Tensor) -> ByteTable:
        """Quantise a table, for the backend that is at home where it lies; `refreshed` after every change of it.

        Args:
            table: [N + 1, D]: on a CPU float32 or bfloat16, on a GPU float16 too.

        Raises:
            BackendError: there is nothing here that scans bytes, or FAVE_FAST_ISA names an instruction set that cannot
                run here.
            ValueError: the table is no matrix.
        """
        return KernelByteTable.pack(table) if table.device.type == "cuda" else NativeByteTable.pack(table)

    @abc.abstractmethod
    def refreshed(self, table: Tensor, numbers: Tensor | None = None) -> ByteTable:
        """The same of the same memory after rows `numbers` [n], or all, have changed.

        On a GPU this very one, in place, so that captured graphs see it; on a CPU another one, made as a whole.

        Raises:
            ValueError: this was made of another table.
        """

    @property
    @abc.abstractmethod
    def fallback_share(self) -> float:
        """Of all rows asked for so far, how many took the whole table's scan; 0 before the first. Waits for a GPU."""

    def require(self, table: Tensor) -> None:
        """Raise unless this was made of `table`.

        Raises:
            ValueError: it was made of another one.
        """
        if (table.data_ptr(), tuple(table.shape)) != (self.address, self.shape):
            raise ValueError(
                f"table_bytes were made of another table, {list(self.shape)}; this one is {list(table.shape)}"
            )


@dataclass(frozen=True)
class NativeByteTable(ByteTable):
    """That of the cpp backend.

    Attributes:
        native: the bytes, each item's scale, and bounds of the error that they make.
        isa: the instruction set it is laid out for.
    """

    native: _C.ByteTable
    isa: str

    @classmethod
    def pack(cls, table: Tensor, isa: str | None = None) -> NativeByteTable:
        """As `ByteTable.pack` on a CPU.

        Args:
            table: [N + 1, D] float32 or bfloat16.
            isa: as in `NativeWeights.pack`.

        Raises:
            BackendError: there is no extension, or the table is not on the CPU or has another dtype, or FAVE_FAST_ISA
                names an instruction set that cannot run here.
            ValueError: `isa` does, or the table is no matrix.
        """
        reason = native.why_not(table.device, table.dtype)
        if reason is not None:
            raise BackendError(f"score_topk: no table in bytes: {reason}")
        from fave_fast import _C

        isa = native.isa() if isa is None else isa
        made = _C.ByteTable(native.rows(table.detach()), isa, native.threads())
        return cls(table.data_ptr(), tuple(table.shape), made, isa)

    def refreshed(self, table: Tensor, numbers: Tensor | None = None) -> NativeByteTable:
        """As in `ByteTable`."""
        self.require(table)
        return NativeByteTable.pack(table, self.isa)

    @property
    def fallback_share(self) -> float:
        """As in `ByteTable`."""
        return self.native.fallen_back / max(1, self.native.asked)


@dataclass(frozen=True)
class KernelByteTable(ByteTable):
    """That of the triton backend.

    Attributes:
        rows: int8 [N + 1, D up to whole 16]: X.
        words: int32 [N + 1]: the bits of s as a bfloat16, then those of e.
        counts: int64 [2]: rows that were asked for, and those of them that fell back; the kernels count.
    """

    rows: Tensor
    words: Tensor
    counts: Tensor

    @classmethod
    @torch.no_grad()
    def pack(cls, table: Tensor) -> KernelByteTable:
        """As `ByteTable.pack` on a GPU; on a CPU for the kernels' interpreter.

        Raises:
            ValueError: the table is no matrix, or none of floating point.
        """
        if table.dim() != 2 or not table.is_floating_point():
            raise ValueError(f"the table is {table.dtype} {list(table.shape)}; expected floating point [N + 1, D]")
        rows = torch.empty(len(table), -(-table.shape[1] // 16) * 16, dtype=torch.int8, device=table.device)
        words = torch.empty(len(table), dtype=torch.int32, device=table.device)
        counts = torch.zeros(2, dtype=torch.int64, device=table.device)
        made = cls(table.data_ptr(), tuple(table.shape), rows, words, counts)
        return made.refreshed(table)

    @torch.no_grad()
    def refreshed(self, table: Tensor, numbers: Tensor | None = None) -> KernelByteTable:
        """As in `ByteTable`."""
        self.require(table)
        count = len(table) if numbers is None else len(numbers)
        for start in range(0, count, _AT_ONCE):
            at = slice(start, min(start + _AT_ONCE, count))
            place = at if numbers is None else numbers[at]
            self.rows[place], self.words[place] = _quantised(table[place], self.rows.shape[1])
        return self

    @property
    def fallback_share(self) -> float:
        """As in `ByteTable`. Queries of zeros, as graphs have in place of absent users, are not counted."""
        asked, fallen = self.counts.tolist()
        return float(fallen / max(1, asked))


def loss_of_queries_and_sums(d: int) -> float:
    """What e has of max(|x|, |sX|): the query's rounding, and that of sums of D products."""
    return 0.52 * math.sqrt(d) / (127 * 256) + (8 * d + 64) * 2.0**-24


def _quantised(table: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """X int8 [n, width] and the words int32 [n] of rows [n, D]."""
    x = table.double()
    most = x.abs().amax(1)  # NaN where an element is
    scale = _up_to_bfloat16(most / 127)
    bounded = (scale >= 1 / _WIDEST) & (scale <= _WIDEST)
    scale = torch.where(bounded, scale, 0)
    whole = torch.where(bounded[:, None], (x / scale[:, None]).round().clamp(-127, 127), 0)
    back = whole * scale[:, None]
    lost = torch.linalg.vector_norm(back - x, dim=1)
    length = torch.maximum(torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(back, dim=1))
    # float64's own roundings of these sums lie far within the factor
    error = _up_to_bfloat16((lost + loss_of_queries_and_sums(x.shape[1]) * length) * (1 + 1e-9))
    words = _high_bits(scale) << 16 | _high_bits(torch.where(bounded, error, 0))
    words = torch.where(bounded | (most == 0), words, _NO_BOUND)
    words = torch.where(most.isnan(), _NEVER, words)
    rows = torch.nn.functional.pad(whole.to(torch.int8), (0, width - x.shape[1]))
    return rows, words


def _up_to_bfloat16(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x >= 0, as float64."""
    near = x.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.double() < x, above, near).double()


def _high_bits(x: Tensor) -> Tensor:
    """int32: the bits of numbers that are bfloat16s."""
    return x.to(torch.bfloat16).view(torch.int16).int()
