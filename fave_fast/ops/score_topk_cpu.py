"""The exact top K in C++ (`csrc/score_topk.cpp`), by a scan of the table or of its 8-bit form.

The 8-bit scan bounds each score: `csrc/score_topk.hpp` has the proof. Every item that may be among the K best by its
bound is scored in full precision as the plain scan does, so the lists are the same to the bit. Where too many items
remain (embeddings that nearly coincide) the row takes the plain scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from torch import Tensor

from fave_fast.errors import BackendError
from fave_fast.ops import native
from fave_fast.ops.tiles import Tiles

if TYPE_CHECKING:
    from fave_fast import _C

MAX_K = 1 << 16
MAX_WIDTH = 1 << 16  # D: sums of 8-bit products stay within 32 bits
MAX_ITEMS = (1 << 31) - 2


@dataclass(frozen=True)
class ByteTable:
    """A table [N + 1, D] in one byte an element, for `score_topk`; the table itself is still read for the best items.

    Attributes:
        native: the bytes, each item's scale, and bounds of the error that they make.
        address: of the table in memory.
        shape: of the table.
    """

    native: _C.ByteTable
    address: int
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, table: Tensor, isa: str | None = None) -> ByteTable:
        """Quantise a table on the CPU; again after every change of it.

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

        made = _C.ByteTable(_rows(table.detach()), native.isa() if isa is None else isa, native.threads())
        return cls(made, table.data_ptr(), tuple(table.shape))

    def require(self, table: Tensor) -> None:
        """Raise unless this was made of `table`.

        Raises:
            ValueError: it was made of another one.
        """
        if (table.data_ptr(), tuple(table.shape)) != (self.address, self.shape):
            raise ValueError(
                f"table_bytes were made of another table, {list(self.shape)}; this one is {list(table.shape)}"
            )

    @property
    def fallback_share(self) -> float:
        """Of all rows asked for so far, how many took the plain scan; 0 before the first."""
        return self.native.fallen_back / max(1, self.native.asked)


def _rows(matrix: Tensor) -> npt.NDArray[Any]:
    return native.array(matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous())


def run(tiles: Tiles, k: int, deny: Tensor | None, out: tuple[Tensor, Tensor], table_bytes: ByteTable | None) -> None:
    """The lists of a call on the CPU into `out`."""
    from fave_fast import _C

    exclude = tiles.exclude if tiles.exclude is not None and tiles.exclude.ids.shape[0] > 0 else None
    args = (
        _rows(tiles.queries.detach()),
        _rows(tiles.table.detach()),
        k,
        None if exclude is None else exclude.ids.long().contiguous().numpy(),
        None if exclude is None else exclude.offsets.long().contiguous().numpy(),
        None if deny is None else deny.contiguous().numpy(),
        out[0].numpy(),
        out[1].numpy(),
        native.threads(),
    )
    if table_bytes is not None:
        table_bytes.native.score_topk(*args)
    else:
        _C.score_topk(*args, native.isa())
