"""The encoder for batches of up to some sixty histories on Hopper GPUs: one launch of csrc/pair_encoder.

Of clusters of eight blocks (`encoder_cluster`) a GPU runs fifteen at once, of two blocks, as these are, sixty-six. They
take a history of any length in the same time, by wgmma's products of 64 rows. A history's bits do not depend on the
batch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fave_fast.ops import encoder_cluster

if TYPE_CHECKING:  # what is below imports nothing of what is above it
    from fave_fast.model import FAVE
    from fave_fast.ops.encoder import _Call

PANEL = 64  # channels
PORTION = 32_768  # weights


def in_panels(weight: Tensor) -> Tensor:
    """Weight [N, K] as wgmma reads operands: [K / 64, N, 8, 8], the eight channels c of row n at c ^ n % 8."""
    n, k = weight.shape
    row, chunk = torch.arange(n, device=weight.device), torch.arange(8, device=weight.device)
    lies_at = chunk ^ (row % 8)[:, None]
    parts = weight.reshape(n, k // PANEL, 8, 8).transpose(0, 1)
    return torch.gather(parts, 2, lies_at[None, :, :, None].expand(k // PANEL, n, 8, 8))


def pack(model: FAVE) -> Tensor:
    """All blocks' weights as the kernel reads them: [blocks, 2, 3, 32768] in the model's dtype.

    A half's portions are the panels of each head's queries, keys and values and of the output projection for these
    heads; of the feed-forward's first matrix; and of its second.
    """
    result = []
    for half in encoder_cluster.halves(model):
        heads = torch.cat((half.queries, half.keys, half.values), 1)
        weights = (*heads, half.out, half.first, half.second)
        result.append(torch.cat([in_panels(weight).flatten() for weight in weights]))
    return torch.stack(result).view(-1, 2, 3, PORTION).contiguous()


def run(call: _Call) -> None:
    """One launch on the current stream; nothing is allocated."""
    launch(encoder_cluster.arguments(call, call.weights.packed["pair"]), call.out.device, call.overlap)


def launch(arguments: dict[str, int | float | bool], device: torch.device, overlap: bool) -> None:
    """Launch on the current stream of `device`; `overlap` as in `encode_ids`."""
    stream = torch.cuda.current_stream(device).cuda_stream
    extension = importlib.import_module("fave_fast._C")
    call = extension.EncoderCall(**arguments)
    extension.encode_pair(call, overlap=overlap, device=device.index, stream=stream)
