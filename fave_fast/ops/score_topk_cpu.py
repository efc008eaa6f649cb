"""The exact top K in C++ (`csrc/score_topk.cpp`), by a scan of the table or of its 8-bit form.

The 8-bit scan bounds each score: `csrc/score_topk.hpp` has the proof. Every item that may be among the K best by its
bound is scored in full precision as the plain scan does, so the lists are the same to the bit. Where too many items
remain (embeddings that nearly coincide) the row takes the plain scan.
"""

from __future__ import annotations

from torch import Tensor

from fave_fast.ops import native
from fave_fast.ops.byte_table import NativeByteTable
from fave_fast.ops.tiles import Tiles

MAX_K = 1 << 16
MAX_WIDTH = 1 << 16  # D: sums of 8-bit products stay within 32 bits
MAX_ITEMS = (1 << 31) - 2


def run(
    tiles: Tiles, k: int, deny: Tensor | None, out: tuple[Tensor, Tensor], table_bytes: NativeByteTable | None
) -> None:
    """The lists of a call on the CPU into `out`."""
    from fave_fast import _C

    exclude = tiles.exclude if tiles.exclude is not None and tiles.exclude.ids.shape[0] > 0 else None
    args = (
        native.rows(tiles.queries.detach()),
        native.rows(tiles.table.detach()),
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
