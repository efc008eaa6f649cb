"""The reference network in plain PyTorch: what every faster path must equal.

Equation numbers are those of the FAVE paper (arXiv 2604.04427). Shapes: B histories, L positions, D channels, N items;
item ids run from 1 to N and 0 is padding. Histories are padded on the left, so the newest item is always at position
L - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fave_fast.conditioning import make_conditioning
from fave_fast.config import ModelConfig
from fave_fast.ops.attention import rotary_tables
from fave_fast.precision import widened
from fave_fast.profiling import ranged

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Prediction:
    """What one pass of the network gives."""

    endpoint: Tensor  # [B, D]: f(x_t, t, r), the predicted x_1 of eq. (10)
    source: Tensor  # [B, D]: E_u, what the history decoder of eq. (13) reads


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension, computed in fp32."""

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """X [..., D] -> [..., D], same dtype."""
        # Written out: the fused op has no forward-mode derivative, and L_cons needs one.
        wide = widened(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Dropout(nn.Module):
    """Sets each element to 0 with probability `p` while training and scales the rest by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the mask comes from PyTorch's global generator."""
        if not self.training or self.p == 0:
            return x
        # F.dropout draws its mask one number at a time on the CPU: 33 ms for 512 x 50 x 128, against 10 ms by uniforms.
        return F.dropout(x, self.p) if x.device.type != "cpu" else x * self.factors(x)

    def factors(self, x: Tensor) -> Tensor:
        """What x is multiplied with while training: 0 or 1 / (1 - p), of its shape and dtype."""
        return (torch.rand(x.shape, device=x.device) >= self.p).to(x.dtype).div_(1 - self.p)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, forward_mode: bool) -> Tensor:
    """Softmax attention of q on k, v [B, heads, L, channels] where `mask` is True.

    `forward_mode`: a tangent goes through.
    """
    # The CPU's bf16 backward takes 127 ms a block at B = 512, L = 50, its fp32 backward 17. On a GPU (torch 2.11) the
    # backward of a tangent under autocast raises: softmax's input is bf16 and its gradient float32.
    if q.dtype == torch.bfloat16 and (forward_mode or q.device.type == "cpu"):
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class TimeEmbedding(nn.Module):
    """TimeEmb of eq. (8): a sinusoidal embedding, then two linear layers with SiLU between them."""

    def __init__(self, d: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.hidden = nn.Linear(d, d)
        self.out = nn.Linear(d, d)

    def forward(self, t: Tensor) -> Tensor:
        """T [B] in [0, 1] -> [B, D]. Angles reach `scale` radians, where bf16 has steps of 4: never below fp32."""
        wide = widened(t)
        half = self.hidden.in_features // 2
        # Made anew each time: a buffer would be rounded to bf16 with the weights.
        exponents = torch.arange(half, device=t.device, dtype=wide.dtype) / half
        angles = wide[:, None] * (self.scale * 10_000.0**-exponents)  # [B, D / 2]; such products are never autocast
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.hidden.weight.dtype)
        result: Tensor = self.out(F.silu(self.hidden(waves)))
        return result


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the channel pairs (i, i + half) of x [B, heads, L, channels] by the angles of `rotary_tables`."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward with GELU, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d
        self.heads = config.heads
        self.attention_norm = make_norm(config)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attention_out = nn.Linear(d, d, bias=False)
        self.ffn_norm = make_norm(config)
        self.ffn_in = nn.Linear(d, config.ffn_mult * d, bias=False)
        self.ffn_out = nn.Linear(config.ffn_mult * d, d, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        h: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        last_only: bool,
        forward_mode: bool = False,
    ) -> Tensor:
        """H [B, L, D] -> [B, L, D], or [B, 1, D] for the newest position alone with `last_only`.

        mask [B, 1, queries, L] (or broadcastable to it) is True where a query may look. `forward_mode` as in `attend`.
        """
        batch, _, d = h.shape
        x = self.attention_norm(h)
        if last_only:
            h = h[:, -1:]
        # The newest position is the only one that the last block must answer for: a sixth of a block's products.
        q = F.linear(x[:, -1:] if last_only else x, self.qkv.weight[:d])
        k, v = F.linear(x, self.qkv.weight[d:]).chunk(2, dim=-1)
        q, k, v = (part.view(batch, -1, self.heads, d // self.heads).transpose(1, 2) for part in (q, k, v))
        if rotary is not None:
            k = rotate(k, rotary)
            q = q if last_only else rotate(q, rotary)  # the newest item has age 0: its rotation is the identity
        attended = attend(q, k, v, mask, forward_mode).transpose(1, 2).reshape(batch, -1, d)
        h = h + self.dropout(self.attention_out(attended))
        hidden = F.gelu(self.ffn_in(self.ffn_norm(h)))
        result: Tensor = h + self.dropout(self.ffn_out(hidden))
        return result


class HistoryDecoder(nn.Module):
    """D of eq. (13): a 3-layer MLP with tanh from E_u to one output an item."""

    def __init__(self, d: int, num_items: int) -> None:
        super().__init__()
        self.first = nn.Linear(d, d)
        self.second = nn.Linear(d, d)
        self.out = nn.Linear(d, num_items + 1)  # column 0 (padding) is never read

    def hidden(self, source: Tensor) -> Tensor:
        """E_u [B, D] -> the last hidden layer [B, D]."""
        return torch.tanh(self.second(torch.tanh(self.first(source))))

    def forward(self, source: Tensor) -> Tensor:
        """E_u [B, D] -> outputs [B, N] of items 1 to N."""
        return F.linear(self.hidden(source), self.out.weight[1:], self.out.bias[1:])

    def at(self, source: Tensor, items: Tensor) -> Tensor:
        """E_u [B, D], items [B, S] -> outputs [B, S] of those items alone; memory B x S x D, whatever N is."""
        weights, biases = F.embedding(items, self.out.weight), self.out.bias[items]
        return torch.einsum("bd,bsd->bs", self.hidden(source), weights.to(source.dtype)) + biases


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that the configuration names, over D channels."""
    return RMSNorm(config.d) if config.norm == "rms" else nn.LayerNorm(config.d)


class FAVE(nn.Module):
    """f(x_t, t, r) given a history: the endpoint-predicting flow network of eqs. (7) to (10)."""

    def __init__(self, config: ModelConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.num_items = num_items
        self.item_embedding = nn.Embedding(num_items + 1, config.d, padding_idx=0)
        self.embedding_dropout = Dropout(config.embedding_dropout)
        self.embedding_norm = nn.LayerNorm(config.d)
        self.time_embedding = TimeEmbedding(config.d, config.time_scale)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.final_norm = make_norm(config)
        self.history_decoder = HistoryDecoder(config.d, num_items)
        nn.init.normal_(self.item_embedding.weight, std=config.embedding_std)
        with torch.no_grad():
            self.item_embedding.weight[0].zero_()
        self.conditioning = make_conditioning(config)  # last: what is drawn above is the same for each

    @ranged("fave/input")
    def embed_history(self, history: Tensor) -> Tensor:
        """e_s of eq. (9): history ids [B, L] -> [B, L, D], by embedding, dropout and LayerNorm."""
        embedded: Tensor = self.embedding_norm(self.embedding_dropout(self.item_embedding(history)))
        return embedded

    def time_features(self, t: Tensor, r: Tensor) -> Tensor:
        """Z of eq. (8): t, r [B] -> [B, D]."""
        z: Tensor = self.time_embedding(t) + self.time_embedding(r - t)
        return z

    def draw_lambda(self, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Lambda of eq. (9): N(delta, delta) for every position and channel."""
        noise = torch.randn(shape, device=device, generator=generator)
        return noise.mul_(self.config.delta).add_(self.config.delta)

    @ranged("fave/input")
    def modulate(self, embedded: Tensor, x_t: Tensor, t: Tensor, r: Tensor, lam: Tensor) -> Tensor:
        """E of eq. (9): e_s [B, L, D] + lambda [B, L, D] * (x_t [B, D] + z), z from t and r [B].

        With another `conditioning` than `add` what that says; a token makes it [B, L + 1, D].
        """
        e: Tensor = self.conditioning(embedded, x_t + self.time_features(t, r), lam)
        return e

    def present(self, history: Tensor) -> Tensor:
        """Which rows of E the network may look at: bool [B, L] of int64 [B, L], or [B, L + 1] with a token."""
        present = history != 0
        return F.pad(present, (0, 1), value=True) if self.config.conditioning == "token" else present

    def masks(self, present: Tensor) -> tuple[Tensor, Tensor]:
        """What the newest position may look at, and what each one may: bool, broadcastable to [B, 1, L, L]."""
        mask = present[:, None, None, :] | ~present.any(1)[:, None, None, None]
        if self.config.attention == "bidirectional":
            return mask, mask
        # Every query keeps itself, or a padded query would have nothing to attend to.
        length = present.shape[1]
        itself = torch.eye(length, dtype=torch.bool, device=present.device)
        past = torch.ones(length, length, dtype=torch.bool, device=present.device).tril()
        return mask, (mask & past) | itself

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Rotary tables of the positions, the newest last, or None where the configuration names none."""
        if self.config.position == "none":
            return None
        ages = torch.arange(length - 1, -1, -1, device=device)
        return rotary_tables(ages, self.config.d // self.config.heads)

    @ranged("fave/encoder")
    def encode(self, modulated: Tensor, present: Tensor, forward_mode: bool = False) -> Prediction:
        """E [B, L, D] and `present` bool [B, L] (False at padding) through all blocks.

        A row without any item attends to padding alone; its result is finite and means nothing. `forward_mode` as in
        `attend`.
        """
        mask, full_mask = self.masks(present)
        rotary = self.rotary(modulated.shape[1], modulated.device)
        h = modulated
        source_index = self.config.source_block % self.config.blocks
        for index, block in enumerate(self.blocks):
            last_only = index == self.config.blocks - 1
            h = block(h, mask if last_only else full_mask, rotary, last_only, forward_mode)
            if index == source_index:
                source = h[:, -1]
        return Prediction(self.final_norm(h[:, -1]), source)

    def forward(self, history: Tensor, x_t: Tensor, t: Tensor, r: Tensor, lam: Tensor) -> Prediction:
        """One pass: history int64 [B, L] (left-padded with 0), x_t [B, D], t and r [B], lambda [B, L, D]."""
        return self.encode(self.modulate(self.embed_history(history), x_t, t, r, lam), self.present(history))
