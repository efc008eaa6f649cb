"""What the encoders of csrc for Hopper GPUs have in common: models they take, halves, panels, a launch."""

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
PANEL = 64  # channels

Arguments = dict[str, int | float | bool]  # of EncoderCall


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
    return "it is for batches of some sizes, and its bits are not those of the kernels for others"


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


def stacked_halves(model: FAVE) -> Half:
    """`halves`, each of a half's weights over all of them: [2 * blocks, ...]."""
    return Half(*map(torch.stack, zip(*halves(model), strict=True)))


def in_panels(weight: Tensor) -> Tensor:
    """Weights [..., N, K] as wgmma reads operands: [..., K / 64, N, 8, 8], eight channels c of row n at c ^ n % 8."""
    *before, n, k = weight.shape
    row, chunk = torch.arange(n, device=weight.device), torch.arange(8, device=weight.device)
    lies_at = chunk ^ (row % 8)[:, None]
    parts = weight.reshape(*before, n, k // PANEL, 8, 8).transpose(-4, -3)
    return torch.gather(parts, -2, lies_at[..., None].expand(parts.shape))


def arguments(call: _Call, packed: Tensor) -> Arguments:
    """The fields of EncoderCall (csrc/gpu_encoders.hpp), in their order; `packed` has the blocks' weights.

    A plan is left to who takes one.
    """
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


def launch(kernel: str, arguments: Arguments, call: _Call, **sizes: int) -> None:
    """Launch `fave_fast._C.<kernel>` on the current stream of the call's device; nothing is allocated."""
    device = call.out.device
    stream = torch.cuda.current_stream(device).cuda_stream
    extension = importlib.import_module("fave_fast._C")
    run = getattr(extension, kernel)
    run(extension.EncoderCall(**arguments), **sizes, overlap=call.overlap, device=device.index, stream=stream)
