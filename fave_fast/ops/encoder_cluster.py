"""The encoder for small batches on Hopper GPUs: one launch of csrc/cluster_encoder, a cluster of blocks a history.

Histories of up to 16, 32 or 64 items (the grid's length where ids are padded, else the model's longest) take a cluster
of 2, 4 or 8 blocks; a history's bits do not depend on which. Of 8 blocks, an H200 runs 15 clusters at once.

Its weights are stored as the operands of the tensor cores' products hold them (mma.m16n8k16): 32 lanes of 16 bytes make
a unit, which a warp loads at once. A transformer block has 384 units for each of two halves; half t has the heads 2 t
and 2 t + 1 and the feed-forward's channels from 256 t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fave_fast.ops import encoder_hopper as hopper

if TYPE_CHECKING:  # what is below imports nothing of what is above it
    from fave_fast.model import FAVE
    from fave_fast.ops.encoder import _Call

UNITS = 384  # of a half and a transformer block
TILE = 16  # rows


def right_operand(weight: Tensor) -> Tensor:
    """Weight [N, K] as the right operands of x weight^T, two steps of K a unit: [N / 8, K / 32, 32, 8]."""
    n, k = weight.shape
    parts = weight.reshape(n // 8, 8, k // 32, 2, 2, 4, 2)  # n, group, units, step, half, quad, pair
    return parts.permute(0, 2, 1, 5, 3, 4, 6).reshape(n // 8, k // 32, 32, 8)


def left_operand(weight: Tensor) -> Tensor:
    """Weight [M, K] as the left operands of weight x^T: [M / 16, K / 16, 32, 8]."""
    m, k = weight.shape
    parts = weight.reshape(m // 16, 2, 8, k // 16, 2, 4, 2)  # m, rows' half, group, steps, columns' half, quad, pair
    return parts.permute(0, 3, 2, 5, 4, 1, 6).reshape(m // 16, k // 16, 32, 8)


def pack(model: FAVE) -> Tensor:
    """All blocks' weights as the kernel reads them: [blocks, 2, 384, 32, 8] in the model's dtype.

    The units are those of warp after warp: of four, 8 for 16 channels of the keys and 8 for the same of the queries; of
    the other four, 8 for 16 channels of the values (left operands). Then, of each warp, 4 of the output projection, 16
    of the feed-forward's first matrix and 16 of its second.
    """
    result = []
    for half in hopper.halves(model):
        keys, queries = (
            right_operand(part.reshape(-1, hopper.D)).view(4, 8, 32, 8) for part in (half.keys, half.queries)
        )
        units = [
            torch.stack((keys, queries), 1),
            left_operand(half.values.reshape(-1, hopper.D)),
            *(right_operand(part) for part in (half.out, half.first, half.second)),
        ]
        result.append(torch.cat([part.reshape(-1, 32, 8) for part in units]))
    return torch.stack(result).view(-1, 2, UNITS, 32, 8).contiguous()


def run(call: _Call) -> None:
    """One launch on the current stream; nothing is allocated."""
    longest = call.weights.model.config.max_length if call.padded_length is None else call.padded_length
    tiles = 1 if longest <= TILE else 2 if longest <= 2 * TILE else 4
    hopper.launch("encode_cluster", hopper.arguments(call, call.weights.packed["cpp"]), call, tiles=tiles)
