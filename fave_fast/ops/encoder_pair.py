"""The encoder for batches of up to some sixty histories on Hopper GPUs: one launch of csrc/pair_encoder.

Of clusters of eight blocks (`encoder_cluster`) a GPU runs fifteen at once, of two blocks, as these are, sixty-six. They
take a history of any length in the same time, by wgmma's products of 64 rows. A history's bits do not depend on the
batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fave_fast.ops import encoder_hopper as hopper

if TYPE_CHECKING:  # what is below imports nothing of what is above it
    from fave_fast.model import FAVE
    from fave_fast.ops.encoder import _Call

PORTION = 32_768  # weights


def pack(model: FAVE) -> Tensor:
    """All blocks' weights as the kernel reads them: [blocks, 2, 3, 32768] in the model's dtype.

    A half's portions are the panels of each head's queries, keys and values and of the output projection for these
    heads; of the feed-forward's first matrix; and of its second.
    """
    half = hopper.stacked_halves(model)
    heads = torch.cat((half.queries, half.keys, half.values), 2)
    weights = (*heads.unbind(1), half.out, half.first, half.second)
    return torch.cat([hopper.in_panels(weight).flatten(1) for weight in weights], 1).view(-1, 2, 3, PORTION)


def run(call: _Call) -> None:
    """One launch on the current stream; nothing is allocated."""
    hopper.launch("encode_pair", hopper.arguments(call, call.weights.packed["pair"]), call)
