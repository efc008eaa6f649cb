"""The encoder for small batches on Hopper GPUs: one launch of csrc/cluster_encoder, a cluster of blocks a history.

Histories of up to 16, 32 or 64 items (the grid's length where ids are padded, else the model's longest) take a cluster
of 2, 4 or 8 blocks; a history's bits do not depend on which. Of 8 blocks, an H200 runs 15 clusters at once.

Its weights are stored as the operands of the tensor cores' products hold them (mma.m16n8k16): 32 lanes of 16 bytes make
a unit, which a warp loads at once. A transformer block has 384 units for each of two halves; half t has the heads 2 t
and 2 t + 1 and the feed-forward's channels from 256 t.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fave_fast.ops.registry import why_no_extension

if TYPE_CHECKING:  # what is below imports nothing of what is above it
    from fave_fast.model import FAVE
    from fave_fast.ops.encoder import _Call

D = 128
HEADS = 4
HIDDEN = 512
MAX_ITEMS = 64
UNITS = 384  # of a half and a transformer block
TILE = 16  # rows


def beyond(model: FAVE) -> str | None:
    """Why a model of these sizes is not for the kernel, or None."""
    config = model.config
    if config.d != D or config.heads != HEADS:
        return f"its kernel takes D = {D} with {HEADS} heads, and the model has {config.d} with {config.heads}"
    if config.ffn_mult * config.d != HIDDEN:
        return f"its kernel takes a feed-forward of {HIDDEN} channels, and the model's has {config.ffn_mult * config.d}"
    if config.max_length > MAX_ITEMS:
        return f"its kernel holds histories of up to {MAX_ITEMS} items, and the model's may have {config.max_length}"
    return None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run on tensors of `dtype` on `device`, or None."""
    reason = why_no_extension()
    if reason is not None:
        return reason
    if not importlib.import_module("fave_fast._C").has_cuda:
        return "the C++ extension was built without nvcc"
    if not torch.cuda.is_available():
        return "its kernel runs on CUDA devices, and there is none"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"its kernel is for compute capability 9.0, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None if dtype == torch.bfloat16 else f"its kernel takes bfloat16, not {dtype}"


def why_not_auto(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `auto` does not choose the kernel although it could run."""
    return "it is for small batches, and its bits are not those of the kernel for larger ones"


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


def rotary_pairs(channels: int, device: torch.device) -> Tensor:
    """The order of a head's channels that has those of a rotary pair, i and i + channels / 2, side by side."""
    half = torch.arange(channels // 2, device=device)
    return torch.stack((half, half + channels // 2), 1).flatten()


class Half(NamedTuple):
    """Weights of a transformer block that half t of a history's blocks multiplies by: two heads, half a feed-forward.

    Attributes:
        queries: [2, 32, 128] of heads 2 t and 2 t + 1, rotary pairs side by side; keys likewise.
        values: [2, 32, 128].
        out: [128, 64], the output projection's columns for these heads.
        first: [256, 128], the feed-forward's channels from 256 t.
        second: [128, 256], doubled as in `EncoderWeights`.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    first: Tensor
    second: Tensor


def halves(model: FAVE) -> Iterator[Half]:
    """Both halves of each block, block after block."""
    c = D // HEADS
    paired = rotary_pairs(c, model.item_embedding.weight.device)
    blocks: Any = model.blocks
    for block in blocks:
        q, k, v = (part.view(HEADS, c, D) for part in block.qkv.weight.detach().chunk(3))
        out, first = block.attention_out.weight.detach(), block.ffn_in.weight.detach()
        second = 2 * block.ffn_out.weight.detach()
        for t in (0, 1):
            heads, hidden = slice(2 * t, 2 * t + 2), slice(t * HIDDEN // 2, (t + 1) * HIDDEN // 2)
            columns = slice(2 * c * t, 2 * c * (t + 1))
            yield Half(
                q[heads][:, paired], k[heads][:, paired], v[heads], out[:, columns], first[hidden], second[:, hidden]
            )


def pack(model: FAVE) -> Tensor:
    """All blocks' weights as the kernel reads them: [blocks, 2, 384, 32, 8] in the model's dtype.

    The units are those of warp after warp: of four, 8 for 16 channels of the keys and 8 for the same of the queries; of
    the other four, 8 for 16 channels of the values (left operands). Then, of each warp, 4 of the output projection, 16
    of the feed-forward's first matrix and 16 of its second.
    """
    result = []
    for half in halves(model):
        keys, queries = (right_operand(part.reshape(-1, D)).view(4, 8, 32, 8) for part in (half.keys, half.queries))
        units = [
            torch.stack((keys, queries), 1),
            left_operand(half.values.reshape(-1, D)),
            *(right_operand(part) for part in (half.out, half.first, half.second)),
        ]
        result.append(torch.cat([part.reshape(-1, 32, 8) for part in units]))
    return torch.stack(result).view(-1, 2, UNITS, 32, 8).contiguous()


def run(call: _Call) -> None:
    """One launch on the current stream; nothing is allocated."""
    longest = call.weights.model.config.max_length if call.padded_length is None else call.padded_length
    tiles = 1 if longest <= TILE else 2 if longest <= 2 * TILE else 4
    launch(arguments(call, call.weights.packed["cpp"]), tiles, call.out.device, call.overlap)


def arguments(call: _Call, packed: Tensor) -> dict[str, int | float | bool]:
    """The fields of EncoderCall (csrc/gpu_encoders.hpp), in their order; `packed` has the blocks' weights."""
    weights, path = call.weights, call.path
    model, config = weights.model, weights.model.config
    final_norm: Any = model.final_norm
    return {
        "rows": call.rows.data_ptr(),
        "bounds": 0 if call.bounds is None else call.bounds.data_ptr(),
        "table": 0 if path is None else model.item_embedding.weight.data_ptr(),
        "input_norm": 0 if path is None else path.norm.data_ptr(),
        "shift": 0 if path is None else path.shift.data_ptr(),
        "scale": 0 if path is None or path.scale is None else path.scale.data_ptr(),
        "weights": packed.data_ptr(),
        "norms": weights.norms.data_ptr(),
        "cos": weights.cos.data_ptr(),
        "sin": weights.sin.data_ptr(),
        "out": call.out.data_ptr(),
        "order": 0,
        "programs": 0,
        "users": len(call.out),
        "padded_length": call.padded_length or 0,
        "longest": config.max_length,
        "blocks": config.blocks,
        "program_count": 0,
        "anchor": 0.0 if path is None else path.anchor,
        "eps": final_norm.eps,
        "input_eps": model.embedding_norm.eps,
        "wide_rows": call.rows.dtype in (torch.int64, torch.float32),
        "wide_bounds": call.bounds is not None and call.bounds.dtype == torch.int64,
        "layer_norm": config.norm == "layer",
        "rotary": config.position == "rotary",
        "causal": config.attention == "causal",
    }


def launch(arguments: dict[str, int | float | bool], tiles: int, device: torch.device, overlap: bool) -> None:
    """Launch on the current stream of `device` clusters that hold 16 * `tiles` rows; `overlap` as in `encode_ids`."""
    stream = torch.cuda.current_stream(device).cuda_stream
    extension = importlib.import_module("fave_fast._C")
    call = extension.EncoderCall(**arguments)
    extension.encode_cluster(call, tiles=tiles, overlap=overlap, device=device.index, stream=stream)
