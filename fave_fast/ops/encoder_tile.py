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
    """Weight [N, 32] as the panel [N / 2, 64] whose row r has row r and, behind it, row N / 2 + r."""
    return torch.cat(weight.chunk(2), 1)


def pack(model: FAVE) -> Tensor:
    """All blocks' weights as the kernel reads them: [blocks, 12, 16384] in the model's dtype.

    Four portions of a head's queries, keys and values and its part of the output projection, folded; then eight of 64
    of the feed-forward's hidden channels, both matrices.
    """
    result = []
    both = hopper.halves(model)
    for halves in zip(both, both, strict=True):
        for half in halves:
            for out, *projections in zip(half.out.chunk(2, 1), half.queries, half.keys, half.values, strict=True):
                result += [hopper.in_panels(torch.cat(projections)), hopper.in_panels(folded(out))]
        for half in halves:
            for first, second in zip(half.first.chunk(4), half.second.chunk(4, 1), strict=True):
                result += [hopper.in_panels(first), hopper.in_panels(second)]
    return torch.cat([part.flatten() for part in result]).view(-1, 12, PORTION)


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
