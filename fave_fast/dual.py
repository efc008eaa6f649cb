"""Forward mode through the reference network: each layer takes and gives a value with its tangent, in plain torch code.

What `torch.func.jvp` of the network computes, and what it cannot: `torch.compile` takes these layers with their
backward pass, dropout included, and value and tangent go through a linear layer as rows of one product. A pair (x, dx)
holds tensors of one shape; the layers' formulas are in `fave_fast.ops.block` and `fave_fast.ops.attention`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fave_fast.model import FAVE, Block, Dropout, Prediction, RMSNorm, TimeEmbedding, rotate
from fave_fast.ops.attention import softmax_attention
from fave_fast.ops.block import gelu_dual, linear_dual, norm_dual
from fave_fast.precision import widened
from fave_fast.profiling import ranged

Pair = tuple[Tensor, Tensor]


@ranged("fave/jvp")
def predict(
    model: FAVE, history: Tensor, x_t: Tensor, t: Tensor, r: Tensor, lam: Tensor, v: Tensor
) -> tuple[Prediction, Tensor]:
    """f(x_t, t, r) and its derivative along [v, 1, 0], both differentiable in reverse mode.

    Args:
        model: the network; in training mode its dropout is drawn once for value and tangent.
        history: int64 [B, L], left-padded with 0.
        x_t: [B, D].
        t: [B].
        r: [B].
        lam: [B, L, D].
        v: [B, D], the direction of x_t.

    Returns:
        The prediction, and the endpoint's tangent [B, D].
    """
    embedded = model.embed_history(history)  # depends on none of x_t, t, r
    z, dz = time_features(model.time_embedding, t, r)
    conditioning = model.conditioning
    e = conditioning(embedded, x_t + z, lam), conditioning.tangent(embedded, v + dz, lam)
    return encode(model, e, model.present(history))


def time_features(embedding: TimeEmbedding, t: Tensor, r: Tensor) -> Pair:
    """Z of eq. (8) and dz / dt at fixed r: t, r [B] -> [B, D]."""
    times = torch.stack((t, r - t))  # along which the second runs backwards
    wide = widened(times)
    half = embedding.hidden.in_features // 2
    exponents = torch.arange(half, device=t.device, dtype=wide.dtype) / half
    frequencies = embedding.scale * 10_000.0**-exponents
    angles = wide[..., None] * frequencies  # [2, B, D / 2]
    cos, sin = angles.cos(), angles.sin()
    direction = torch.stack((frequencies, -frequencies))[:, None, :]  # numbers of the host could not be captured
    waves = torch.cat((cos, sin), dim=-1), torch.cat((-sin * direction, cos * direction), dim=-1)
    narrow = cast(Pair, tuple(wave.to(embedding.hidden.weight.dtype) for wave in waves))
    a, da = linear(narrow, embedding.hidden.weight)
    a = a + embedding.hidden.bias
    gate = torch.sigmoid(a)
    z, dz = linear((a * gate, gate * (1 + a * (1 - gate)) * da), embedding.out.weight)
    return z.sum(0) + 2 * embedding.out.bias, dz.sum(0)


def encode(model: FAVE, modulated: Pair, present: Tensor) -> tuple[Prediction, Tensor]:
    """`FAVE.encode` of E [B, L, D] with a tangent, `present` bool [B, L]: prediction and endpoint's tangent."""
    config = model.config
    mask, full_mask = model.masks(present)
    rotary = model.rotary(present.shape[1], present.device)
    source_index = config.source_block % config.blocks
    h = modulated
    source = h[0][:, -1]
    for index, module in enumerate(model.blocks):
        last_only = index == config.blocks - 1
        h = block(cast(Block, module), h, mask if last_only else full_mask, rotary, last_only)
        if index == source_index:
            source = h[0][:, -1]
    endpoint, tangent = norm(model.final_norm, newest(h))
    return Prediction(endpoint[:, 0], source), tangent[:, 0]


def block(module: Block, h: Pair, mask: Tensor, rotary: Pair | None, last_only: bool) -> Pair:
    """`Block.forward` of [B, L, D] with a tangent."""
    x = norm(module.attention_norm, h)
    o = attention(module, x, mask, rotary, last_only)
    h = add(newest(h) if last_only else h, dropout(module.dropout, linear(o, module.attention_out.weight)))
    hidden = gelu_dual(linear(norm(module.ffn_norm, h), module.ffn_in.weight))
    return add(h, dropout(module.dropout, linear(cast(Pair, hidden), module.ffn_out.weight)))


def attention(module: Block, x: Pair, mask: Tensor, rotary: Pair | None, last_only: bool) -> Pair:
    """The attention of a block on its norm's output [B, L, D]; [B, L or 1, D]."""
    d = x[0].shape[-1]
    weight = module.qkv.weight
    queries = linear(newest(x) if last_only else x, weight[:d])
    keys_values = linear(x, weight[d:])
    parts = []
    for q, kv in zip(queries, keys_values, strict=True):
        split = [
            part.view(len(q), -1, module.heads, d // module.heads).transpose(1, 2) for part in (q, *kv.chunk(2, -1))
        ]
        if rotary is not None:
            split[1] = rotate(split[1], rotary)
            split[0] = split[0] if last_only else rotate(split[0], rotary)
        parts.append(split)
    narrow = queries[0].dtype
    if narrow == torch.bfloat16 and x[0].device.type == "cpu":  # as in `model.attend`
        with torch.autocast("cpu", enabled=False):
            wide = [cast(tuple[Tensor, Tensor, Tensor], tuple(one.float() for one in part)) for part in parts]
            results = softmax_attention(wide, mask)
    else:
        results = softmax_attention([(q, k, v) for q, k, v in parts], mask)
    o, do = (one.to(narrow).transpose(1, 2).flatten(2) for one in results)
    return o, do


def linear(x: Pair, weight: Tensor) -> Pair:
    """X weight^T without a bias, value and tangent in one product."""
    y, dy = linear_dual(x, weight)
    return y, dy


def norm(module: nn.Module, x: Pair) -> Pair:
    """RMSNorm or LayerNorm of [..., D]."""
    if isinstance(module, RMSNorm):
        y, dy = norm_dual(x, module.weight, None, module.eps)
    else:
        assert isinstance(module, nn.LayerNorm)
        y, dy = norm_dual(x, module.weight, module.bias, module.eps)
    return y, dy


def dropout(module: Dropout, x: Pair) -> Pair:
    """One mask for both."""
    if not module.training or module.p == 0:
        return x
    factors = module.factors(x[0])
    return x[0] * factors, x[1] * factors


def newest(x: Pair) -> Pair:
    """The last position, [B, L, D] -> [B, 1, D]."""
    return x[0][:, -1:], x[1][:, -1:]


def add(x: Pair, y: Pair) -> Pair:
    """The sum."""
    return x[0] + y[0], x[1] + y[1]
