"""The network of training over packed histories, through the ops: no position is padding, products are in one dtype.

What `FAVE` computes on left-padded histories, with lambda and all dropout from the ops' counter-based generators, whose
seed lies on the device: a captured step draws anew once the seed is written. Weights stay as the model holds them and
are narrowed once a pass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fave_fast import dual
from fave_fast.conditioning import Token
from fave_fast.config import ModelConfig
from fave_fast.losses import Share
from fave_fast.model import FAVE, Block, Prediction, RMSNorm
from fave_fast.ops.attention import Tables, rotary_by_age
from fave_fast.ops.beside import Beside
from fave_fast.ops.block import BlockDropout, BlockWeights, block, block_dual, last_block, normed, together
from fave_fast.ops.cross_entropy import Pairs, cross_entropy
from fave_fast.ops.input_modulation import Drawn, Draws, Times, input_modulation, input_modulation_dual
from fave_fast.ops.packed import DecoderWeights, Packed, decoder_hidden, own_items, padded_weights, pick, rows_of
from fave_fast.ops.table_gradient import TableGradient, shared
from fave_fast.profiling import ranged

_EIGHT = 8  # elements of 16 bits that a matrix product wants rows to be multiples of


@dataclass(frozen=True)
class Network:
    """A model over one batch of packed histories.

    Attributes:
        model: whose weights.
        packed: the histories.
        seed: int64 [1] on the device: of lambda and dropout.
        dtype: of E, the residual stream and the products.
        backend: of the ops.
        lam: lambda [rows, D]; drawn by default.
        tables: of `rotary_of`, which is where they come from by default: a step would compute them again.
        share: where the batch is a rank's part of one.
        beside: for what the chain of the blocks can do without for a while.
    """

    model: FAVE
    packed: Packed
    seed: Tensor
    dtype: torch.dtype
    backend: str = "auto"
    lam: Tensor | None = None
    tables: Tables | None = None
    share: Share | None = None
    beside: Beside = field(default_factory=Beside)

    @functools.cached_property
    def _table(self) -> tuple[Tensor, TableGradient]:
        """The item embeddings, and where the ops leave their gradient."""
        return shared(self.model.item_embedding.weight, self.beside)

    def embed(self, items: Tensor) -> Tensor:
        """The table's rows of items int64 [B], [B, D]."""
        table, gradient = self._table
        return rows_of(table, items, gradient=gradient, backend=self.backend)

    def predict(self, x_t: Tensor, t: Tensor, r: Tensor) -> Prediction:
        """f(x_t, t, r) for x_t [B, D], t and r [B]."""
        packed, model = self.packed, self.model
        if model.config.conditioning != "add":
            return self._conditioned((x_t + model.time_features(t, r),), x_t.dtype)[0]
        x, time = self._filled(x_t), self._times(t, r)
        norm, (table, gradient) = model.embedding_norm, self._table
        e = input_modulation(
            packed.ids, table, norm.weight, norm.bias, x, time, self._lambda(),
            offsets=packed.offsets, draws=self._draws(), dropout=self._p(model.config.embedding_dropout),
            eps=norm.eps, dtype=self.dtype, beside=self.beside, gradient=gradient, backend=self.backend,
        )  # fmt: skip
        return self._encode((e,), packed.offsets, x_t.dtype)[0]

    @ranged("fave/jvp")
    def predict_with_tangent(self, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor) -> tuple[Prediction, Tensor]:
        """`predict`, and the endpoint's derivative [B, D] along [v, 1, 0]."""
        packed, model = self.packed, self.model
        if model.config.conditioning != "add":
            z, dz = dual.time_features(model.time_embedding, t, r)
            prediction, tangent = self._conditioned((x_t + z, v + dz), x_t.dtype)
            return prediction, cast(Tensor, tangent)
        x, dx, time = self._filled(x_t), self._filled(v), self._times(t, r)
        norm, (table, gradient) = model.embedding_norm, self._table
        e = input_modulation_dual(
            packed.ids, table, norm.weight, norm.bias, x, dx, time, self._lambda(),
            offsets=packed.offsets, draws=self._draws(), dropout=self._p(model.config.embedding_dropout),
            eps=norm.eps, dtype=self.dtype, beside=self.beside, gradient=gradient, backend=self.backend,
        )  # fmt: skip
        prediction, tangent = self._encode(e, packed.offsets, x_t.dtype)
        return prediction, cast(Tensor, tangent)

    def _conditioned(self, c: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Prediction, Tensor | None]:
        """`_encode` of (c,) or (c, dc) [B, D] by the model's `conditioning`; all draws are PyTorch's."""
        packed, module, offsets = self.packed, self.model.conditioning, self.packed.offsets
        embedded = self.model.embed_history(packed.ids)
        lam = embedded if self.lam is None else self.lam  # as good as any where none is read
        if self.lam is None and module.reads_lambda:
            lam = self.model.draw_lambda(tuple(embedded.shape), embedded.device, None)
        with torch.autocast(embedded.device.type, enabled=False):
            spread = lambda one: one.index_select(0, packed.owners)  # noqa: E731
            c = tuple(self._filled(one.to(embedded.dtype)) for one in c)
            if isinstance(module, Token):
                offsets, place = with_tokens(packed)
                tokens = [module.features(one) for one in c]
                tokens[0] = module.query + tokens[0]
                rows = [embedded, *(torch.zeros_like(embedded) for _ in c[1:])]
                e = [torch.cat(pair).index_select(0, place) for pair in zip(rows, tokens, strict=True)]
            else:
                e = [module(embedded, c[0], lam, spread)]
                e += [module.tangent(embedded, dc, lam, spread) for dc in c[1:]]
        return self._encode(tuple(one.to(self.dtype) for one in e), offsets, dtype)

    def _encode(self, e: tuple[Tensor, ...], offsets: Tensor, dtype: torch.dtype) -> tuple[Prediction, Tensor | None]:
        """Prediction, and the tangent of (E, dE), in `dtype`; `offsets` [B + F + 1] says where the histories lie."""
        h, source = self._blocks(e, offsets)
        final = cast("RMSNorm | nn.LayerNorm", self.model.final_norm)
        bias = final.bias if isinstance(final, nn.LayerNorm) else None
        endpoint, *tangent = normed(h, final.weight, bias, final.eps, self.packed.count, dtype, backend=self.backend)
        return Prediction(endpoint, source), tangent[0] if tangent else None

    def draw_anchor(self, rho: float, generator: torch.Generator | None) -> Tensor:
        """x_0 of eq. (14), [B, D]: `flow.draw_anchor` on packed histories."""
        packed, table = self.packed, self.model.item_embedding.weight
        uniform = torch.rand(packed.count, device=table.device, generator=generator)
        keep = torch.rand(packed.count, table.shape[1], device=table.device, generator=generator) < rho
        lengths = packed.offsets.diff()[: packed.count]
        oldest_first = (uniform * lengths).long().minimum(lengths - 1)
        return table[packed.ids[packed.offsets[: packed.count] + oldest_first]] * keep.to(table.dtype)

    def source_loss(
        self, source: Tensor, kind: Literal["sampled", "dense"], generator: torch.Generator | None
    ) -> Tensor:
        """L_src of eq. (13) for E_u [B, D], as `losses.source_loss` has it.

        One product gives the outputs of all N items, of which those that count are read; their gradients go back
        through one product too, where gathering the items' rows would need a sort. It is computed beside the current
        stream, and so is its backward pass, which autograd runs where the forward pass ran.
        """
        packed, decoder, items = self.packed, self.model.history_decoder, self.model.num_items
        first, second, out = decoder.first, decoder.second, decoder.out
        drawn = None
        with torch.autocast(source.device.type, enabled=False):
            with self.beside.ahead():
                weight = padded_weights(out.weight, out.bias, _EIGHT, self.dtype, backend=self.backend)
                if kind == "sampled":
                    drawn = torch.randint(1, items + 1, packed.ids.shape, device=source.device, generator=generator)
            with self.beside.work(source):
                weights = DecoderWeights(first.weight, first.bias, second.weight, second.bias)
                hidden = decoder_hidden(source, weights, _EIGHT, self.dtype, backend=self.backend)
                outputs = F.linear(hidden, weight)
                if drawn is None:
                    wanted = own_items(packed, outputs.shape[1])
                    return _wide(outputs - wanted.to(outputs.dtype))[:, 1 : items + 1].square().mean()
                loss: Tensor = cast(Any, _Picked).apply(outputs, packed, drawn, self.share, self.backend)
                return loss

    def target_loss(self, endpoint: Tensor, targets: Tensor, kind: Literal["all", "unseen"]) -> Tensor:
        """As `losses.Network`; fillers have seen nothing."""
        table, gradient = self._table
        seen = Pairs(self.packed.owners, self.packed.ids) if kind == "unseen" else None
        return cross_entropy(endpoint, table, targets, seen, gradient=gradient)

    def settle(self) -> None:
        """As `losses.Network`."""
        self.beside.join()

    def _lambda(self) -> Tensor | Drawn:
        return Drawn(self.model.config.delta) if self.lam is None else self.lam

    def _p(self, p: float) -> float:
        return p if self.model.training else 0.0

    def _draws(self) -> Draws:
        return Draws(self.seed, self.packed.users)

    def _filled(self, x: Tensor) -> Tensor:
        """X [B, ...] with zeros for the fillers."""
        fillers = len(self.packed.users) - self.packed.count
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, fillers)) if fillers else x

    def _times(self, t: Tensor, r: Tensor) -> Times:
        time = self.model.time_embedding
        return Times(
            self._filled(t), self._filled(r), time.hidden.weight, time.hidden.bias, time.out.weight, time.out.bias,
            time.scale,
        )  # fmt: skip

    def _blocks(self, h: tuple[Tensor, ...], offsets: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """(E,) or (E, dE) [rows, D] through all blocks: the newest rows [B + F, D] of each, and E_u [B, D]."""
        config = self.model.config
        tables = self.tables or rotary_of(config, offsets.device)
        source_index = config.source_block % config.blocks
        p = self._p(config.dropout)
        source = h[0]
        for index, (weights, place) in enumerate(together(block_weights(self.model), self.dtype, self.beside)):
            dropout = BlockDropout(p, self.seed, index) if p > 0 else None
            options: Any = {
                "causal": config.attention == "causal", "dropout": dropout, "place": place, "backend": self.backend,
            }  # fmt: skip
            if index == config.blocks - 1:
                h, newest = last_block(h, weights, offsets, config.heads, tables, **options)
                source = newest if source_index == index - 1 else source
                source = h[0] if source_index == index else source
                break
            if len(h) == 1:
                h = (block(h[0], weights, offsets, config.heads, tables, **options),)
            else:
                h = block_dual(h[0], h[1], weights, offsets, config.heads, tables, **options)
            if index == source_index < config.blocks - 2:
                source = h[0].index_select(0, offsets[1:] - 1)
        return h, source[: self.packed.count].to(self.model.item_embedding.weight.dtype)


def rotary_of(config: ModelConfig, device: torch.device) -> Tables | None:
    """The rotary tables of all ages, or None where the configuration names none."""
    longest = config.max_length + (config.conditioning == "token")
    return None if config.position == "none" else rotary_by_age(longest, config.d // config.heads, device)


def with_tokens(packed: Packed) -> tuple[Tensor, Tensor]:
    """`packed` with one row more behind each history's newest, fillers' included.

    Returns:
        Where the histories begin then, int64 [B + F + 1], and for each row which one it is of the old rows followed by
        the tokens, int64 [rows + B + F].
    """
    rows, count = len(packed.ids), len(packed.users)
    every = torch.arange(rows + count, device=packed.ids.device)
    offsets = packed.offsets + every[: count + 1]
    places = torch.cat((every[:rows] + packed.owners, offsets[1:] - 1))
    return offsets, torch.empty_like(every).scatter_(0, places, every)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Picked(torch.autograd.Function):
    """The mean square of the errors that `ops.packed.pick` reads; of a rank's share, over the whole batch's count.

    Equal places have equal gradients, so that atomics add them to the same bits in any order.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, packed: Packed, drawn: Tensor, share: Share | None, backend: str) -> Tensor:
        picked = pick(outputs, packed, drawn, backend=backend)
        divisor = picked.counted.clamp_min(1) if share is None else share.divisor(picked.counted)
        weight = divisor.to(picked.errors.dtype).reciprocal()
        ctx.save_for_backward(picked.places, picked.errors, weight)
        ctx.outputs = outputs.shape, outputs.dtype
        return picked.squares * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        places, errors, weight = ctx.saved_tensors
        shape, dtype = ctx.outputs
        gradient = torch.zeros(shape.numel(), dtype=dtype, device=errors.device)
        gradient.index_add_(0, places, (errors * (2 * grads[0] * weight)).to(dtype))
        return gradient.view(shape), None, None, None, None


def block_weights(model: FAVE) -> list[BlockWeights]:
    """The parameters of every block."""
    blocks = []
    for one in model.blocks:
        module = cast(Block, one)
        given: list[Tensor | None] = []
        for norm, first, second in (
            (module.attention_norm, module.qkv, module.attention_out),
            (module.ffn_norm, module.ffn_in, module.ffn_out),
        ):
            bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
            given += [cast(Tensor, norm.weight), bias, first.weight, second.weight]
        blocks.append(BlockWeights(*given))  # type: ignore[arg-type]
    return blocks
