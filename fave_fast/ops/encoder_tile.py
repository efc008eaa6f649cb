"""The encoder for batches of hundreds of histories on Hopper GPUs: one launch of csrc/tile_encoder.

A multiprocessor takes up to four tiles of 64 rows at once, by wgmma's products that read the same weights from its
shared memory. A tile is one history, or, by a plan, several short ones. A history's bits do not depend on the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fave_fast.ops import encoder_hopper as hopper
from fave_fast.ops.tuning import multiprocessors

if TYPE_CHECKING:  # what is below imports nothing of what is above it
    from fave_fast.model import FAVE
    from fave_fast.ops.encoder import _Call

PORTION = 16_384  # weights
ROWS = 64  # of a tile
MOST_TOGETHER = 4  # tiles of a block


def folded(weight: Tensor) -> Tensor:
    """Weights [..., N, 32] as panels [..., N / 2, 64] whose row r has row r and, behind it, row N / 2 + r."""
    return torch.cat(weight.chunk(2, -2), -1)


def pack(model: FAVE) -> Tensor:
    """All blocks' weights as the kernel reads them: [blocks, 12, 16384] in the model's dtype.

    Four portions of a head's queries, keys and values and its part of the output projection, folded; then eight of 64
    of the feed-forward's hidden channels, both matrices.
    """
    half = hopper.stacked_halves(model)
    projections = torch.cat((half.queries, half.keys, half.values), 2)  # [2 * blocks, 2, 96, D]
    out = folded(half.out.reshape(-1, hopper.D, 2, 32).transpose(1, 2))
    first = half.first.reshape(-1, 4, 64, hopper.D)
    second = half.second.reshape(-1, hopper.D, 4, 64).transpose(1, 2)
    heads, units = (
        torch.cat([hopper.in_panels(part).flatten(2) for part in parts], 2).view(len(half.out) // 2, -1, PORTION)
        for parts in ((projections, out), (first, second))
    )
    return torch.cat((heads, units), 1)


def run(call: _Call) -> None:
    """One launch on the current stream; nothing is allocated."""
    arguments = hopper.arguments(call, call.weights.packed["tile"])
    tiles = len(call.out)
    if call.plan is not None:
        if call.plan.rows > ROWS:
            raise ValueError(f"the plan is of {call.plan.rows} rows a program; expected {ROWS} for the tile backend")
        tiles = len(call.plan.programs)
        arguments["order"], arguments["programs"] = call.plan.order.data_ptr(), call.plan.programs.data_ptr()
        arguments["program_count"] = tiles
    at_once = multiprocessors(call.out.device)
    together = next((count for count in (1, 2) if tiles <= count * at_once), MOST_TOGETHER)
    hopper.launch("encode_tile", arguments, call, tiles=together)
