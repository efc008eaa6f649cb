"""The exact top K of a few queries on Hopper GPUs: two launches of csrc/gpu_score_topk.

For requests of one history and a few, over a catalogue of which each multiprocessor holds a tile. What it takes is
bounded by how long two launches wait for what precedes them, and not by bytes or arithmetic: the table's rows are
there before the queries are.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fave_fast.ops import encoder_hopper as hopper
from fave_fast.ops.tiles import Sizes
from fave_fast.ops.tuning import multiprocessors

MAX_ROWS = 8  # columns of a product of the tensor cores
MAX_K = 32
WIDTHS = (64, 128, 256)  # D
STEP = 16  # items of a product
LEAST_TILE, MAX_TILE = 32, 256  # items: a tile holds K, and each counts the others


def beyond(sizes: Sizes, device: torch.device) -> str | None:
    """Why a call of these sizes is not for the kernels, or None."""
    if sizes.rows > MAX_ROWS:
        return f"its kernel takes up to {MAX_ROWS} queries, not {sizes.rows}"
    if sizes.d not in WIDTHS:
        return f"its kernel takes D = {', '.join(map(str, WIDTHS))}, not {sizes.d}"
    if sizes.k > MAX_K:
        return f"its kernel takes K up to {MAX_K}, not {sizes.k}"
    most = MAX_TILE * _tiles(device)
    return f"its kernel takes N up to {most}, not {sizes.items}" if sizes.items > most else None


why_not = hopper.why_not


def workspace_bytes(sizes: Sizes, device: torch.device) -> int:
    """Bytes of the tiles' lists."""
    return 8 * sizes.rows * -(-sizes.items // tile(sizes.items, device)) * sizes.k


def tile(items: int, device: torch.device) -> int:
    """Items of a block, so that each multiprocessor has one."""
    each = -(-items // _tiles(device))
    return max(LEAST_TILE, -(-each // STEP) * STEP)


def _tiles(device: torch.device) -> int:
    return min(256, multiprocessors(device))


def run(
    queries: Tensor,
    table: Tensor,
    deny: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    out: tuple[Tensor, Tensor],
    workspace: Tensor,
    *,
    overlap: bool,
) -> None:
    """Both launches on the current stream; nothing is allocated.

    All is contiguous, queries and table begin at multiples of 16 bytes; `excluded`: ids and offsets.
    """
    scores, ids = out
    items = len(table) - 1
    arguments = {
        "queries": queries.data_ptr(),
        "table": table.data_ptr(),
        "deny": 0 if deny is None else deny.data_ptr(),
        "excluded": 0 if excluded is None else excluded[0].data_ptr(),
        "excluded_offsets": 0 if excluded is None else excluded[1].data_ptr(),
        "entries": workspace.data_ptr(),
        "scores": scores.data_ptr(),
        "ids": ids.data_ptr(),
        "rows": len(queries),
        "d": queries.shape[1],
        "items": items,
        "k": scores.shape[1],
        "tile": tile(items, queries.device),
        "wide_excluded": excluded is not None and excluded[0].dtype == torch.int64,
        "wide_offsets": excluded is not None and excluded[1].dtype == torch.int64,
    }
    launch(arguments, queries.device, overlap)


def launch(arguments: dict[str, int], device: torch.device, overlap: bool) -> None:
    """`arguments` are the fields of ListsCall (csrc/gpu_score_topk.hpp), in their order."""
    extension = importlib.import_module("fave_fast._C")
    stream = torch.cuda.current_stream(device).cuda_stream
    extension.score_topk_on_gpu(extension.ListsCall(**arguments), overlap=overlap, device=device.index, stream=stream)
