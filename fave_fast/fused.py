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
from fave_fast.losses import Reduction, Share, averaged
from fave_fast.model import FAVE, Block, Prediction, RMSNorm
from fave_fast.ops.attention import Tables, newest_of, rotary_by_age
from fave_fast.ops.beside import Beside
from fave_fast.ops.block import (
    BlockDropout,
    BlockWeights,
    Place,
    block,
    block_dual,
    last_block,
    narrowed,
    normed,
    together,
)
from fave_fast.ops.cross_entropy import Pairs, cross_entropy
from fave_fast.ops.input_modulation import Drawn, Draws, Times, input_modulation, input_modulation_dual
from fave_fast.ops.packed import DecoderWeights, Packed, decoder_hidden, own_items, padded_weights, pick, rows_of
from fave_fast.ops.table_gradient import TableGradient, shared
from fave_fast.precision import widened
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
        beside: where what the chain of the blocks can do without for a while is computed: weights in `dtype`, L_src.
        behind: where what nothing but the update waits for is: the losses' values, most gradients of weights.
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
    behind: Beside = field(default_factory=Beside)

    @functools.cached_property
    def _table(self) -> tuple[Tensor, Tensor, TableGradient]:
        """The item embeddings, the same as products under autocast want them, and where the ops leave their gradient.

        The second is made beside: to be read after `_ready`.
        """
        table, gradient = shared(self.model.item_embedding.weight, self.behind)
        kind, narrow = table.device.type, table
        if torch.is_autocast_enabled(kind):
            with self.beside.ahead():
                narrow = table.to(torch.get_autocast_dtype(kind))
        return table, narrow, gradient

    def _ready(self) -> list[tuple[BlockWeights, Place]]:
        """The blocks' weights; what was made ahead may be read from here on."""
        # Before the other ops of a pass, as the sums of their gradients come after them.
        blocks = together(block_weights(self.model), self._narrow_weights, self.behind)
        self.beside.join()
        return blocks

    @functools.cached_property
    def _narrow_weights(self) -> list[BlockWeights]:
        """What the blocks' products take, for all passes: beside, whose memory one pass's would be the next one's."""
        with self.beside.ahead():
            return narrowed(block_weights(self.model), self.dtype)

    def embed(self, items: Tensor) -> Tensor:
        """The table's rows of items int64 [B], [B, D]."""
        table, _, gradient = self._table
        return rows_of(table, items, gradient=gradient, backend=self.backend)

    def predict(self, x_t: Tensor, t: Tensor, r: Tensor) -> Prediction:
        """f(x_t, t, r) for x_t [B, D], t and r [B]."""
        packed, model, blocks = self.packed, self.model, self._ready()
        if model.config.conditioning != "add":
            return self._conditioned(blocks, (x_t + model.time_features(t, r),), x_t.dtype)[0]
        x, time = self._filled(x_t), self._times(t, r)
        norm, (table, _, gradient) = model.embedding_norm, self._table
        e = input_modulation(
            packed.ids, table, norm.weight, norm.bias, x, time, self._lambda(),
            offsets=packed.offsets, draws=self._draws(), dropout=self._p(model.config.embedding_dropout),
            eps=norm.eps, dtype=self.dtype, beside=self.beside, gradient=gradient, backend=self.backend,
        )  # fmt: skip
        return self._encode(blocks, (e,), packed.offsets, x_t.dtype)[0]

    @ranged("fave/jvp")
    def predict_with_tangent(self, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor) -> tuple[Prediction, Tensor]:
        """`predict`, and the endpoint's derivative [B, D] along [v, 1, 0]."""
        packed, model, blocks = self.packed, self.model, self._ready()
        if model.config.conditioning != "add":
            z, dz = dual.time_features(model.time_embedding, t, r)
            prediction, tangent = self._conditioned(blocks, (x_t + z, v + dz), x_t.dtype)
            return prediction, cast(Tensor, tangent)
        x, dx, time = self._filled(x_t), self._filled(v), self._times(t, r)
        norm, (table, _, gradient) = model.embedding_norm, self._table
        e = input_modulation_dual(
            packed.ids, table, norm.weight, norm.bias, x, dx, time, self._lambda(),
            offsets=packed.offsets, draws=self._draws(), dropout=self._p(model.config.embedding_dropout),
            eps=norm.eps, dtype=self.dtype, beside=self.beside, gradient=gradient, backend=self.backend,
        )  # fmt: skip
        prediction, tangent = self._encode(blocks, e, packed.offsets, x_t.dtype)
        return prediction, cast(Tensor, tangent)

    def _conditioned(
        self, blocks: list[tuple[BlockWeights, Place]], c: tuple[Tensor, ...], dtype: torch.dtype
    ) -> tuple[Prediction, Tensor | None]:
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
        return self._encode(blocks, tuple(one.to(self.dtype) for one in e), offsets, dtype)

    def _encode(
        self, blocks: list[tuple[BlockWeights, Place]], e: tuple[Tensor, ...], offsets: Tensor, dtype: torch.dtype
    ) -> tuple[Prediction, Tensor | None]:
        """Prediction, and the tangent of (E, dE), in `dtype`; `offsets` [B + F + 1] says where the histories lie."""
        h, source = self._blocks(blocks, e, offsets)
        final = cast("RMSNorm | nn.LayerNorm", self.model.final_norm)
        bias = final.bias if isinstance(final, nn.LayerNorm) else None
        endpoint, *tangent = normed(
            h, final.weight, bias, final.eps, self.packed.count, dtype, behind=self.behind, backend=self.backend
        )
        return Prediction(endpoint, source), tangent[0] if tangent else None

    def draw_anchor(self, rho: float, generator: torch.Generator | None) -> Tensor:
        """x_0 of eq. (14), [B, D]: `flow.draw_anchor` on packed histories."""
        self.beside.join()  # who packs may do so there
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
        stream, and so is its backward pass, which autograd runs where the forward pass ran, but for the output
        weights' part, for which the blocks need not wait.
        """
        packed, decoder, items = self.packed, self.model.history_decoder, self.model.num_items
        first, second, out = decoder.first, decoder.second, decoder.out
        drawn = None
        with torch.autocast(source.device.type, enabled=False):
            with self.beside.ahead():
                weight = padded_weights(
                    out.weight, out.bias, _EIGHT, self.dtype, behind=self.behind, backend=self.backend
                )
                if kind == "sampled":
                    drawn = torch.randint(1, items + 1, packed.ids.shape, device=source.device, generator=generator)
            with self.beside.work(source):
                weights = DecoderWeights(first.weight, first.bias, second.weight, second.bias)
                hidden = decoder_hidden(
                    source.to(first.weight.dtype), weights, _EIGHT, self.dtype, behind=self.behind, backend=self.backend
                )
                if drawn is None:
                    outputs = F.linear(hidden, weight)
                    wanted = own_items(packed, outputs.shape[1])
                    return widened(outputs - wanted.to(outputs.dtype))[:, 1 : items + 1].square().mean()
                loss: Tensor = cast(Any, _SampledLoss).apply(
                    hidden, weight, packed, drawn, self.share, self.behind, self.backend
                )
                return loss

    def matching_loss(self, endpoint: Tensor, x_1: Tensor, reduction: Reduction) -> Tensor:
        """As `losses.matching_loss`, its value computed behind."""
        loss: Tensor = cast(Any, _Matched).apply(endpoint, x_1, reduction, self.behind)
        return loss

    def target_loss(self, endpoint: Tensor, targets: Tensor, kind: Literal["all", "unseen"]) -> Tensor:
        """As `losses.Network`; fillers have seen nothing."""
        _, table, gradient = self._table
        seen = Pairs(self.packed.owners, self.packed.ids) if kind == "unseen" else None
        return cross_entropy(endpoint, table, targets, seen, gradient=gradient)

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

    def _blocks(
        self, blocks: list[tuple[BlockWeights, Place]], h: tuple[Tensor, ...], offsets: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """(E,) or (E, dE) [rows, D] through all blocks: the newest rows [B + F, D] of each, and E_u [B, D]."""
        config = self.model.config
        tables = self.tables or rotary_of(config, offsets.device)
        source_index = config.source_block % config.blocks
        p = self._p(config.dropout)
        source = h[0]
        newest = self.packed.newest if offsets is self.packed.offsets else newest_of(offsets, len(source))
        for index, (weights, place) in enumerate(blocks):
            dropout = BlockDropout(p, self.seed, index) if p > 0 else None
            options: Any = {
                "causal": config.attention == "causal", "dropout": dropout, "place": place, "backend": self.backend,
            }  # fmt: skip
            if index == config.blocks - 1:
                h, rows = last_block(h, weights, offsets, config.heads, tables, newest=newest, **options)
                source = rows if source_index == index - 1 else source
                source = h[0] if source_index == index else source
                break
            if len(h) == 1:
                h = (block(h[0], weights, offsets, config.heads, tables, **options),)
            else:
                h = block_dual(h[0], h[1], weights, offsets, config.heads, tables, **options)
            if index == source_index < config.blocks - 2:
                source = h[0].index_select(0, offsets[1:] - 1)
        return h, source[: self.packed.count]


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


class _SampledLoss(torch.autograd.Function):
    """The mean square of the errors that `ops.packed.pick` reads of hidden weight^T; of a rank's share, over the whole
    batch's count.

    The outputs' gradient is the errors times one number, so that the hidden layers' is computed at once, but for that
    number, while the loss is added up behind. Equal places have equal errors: atomics add them to the same bits in any
    order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        packed: Packed,
        drawn: Tensor,
        share: Share | None,
        behind: Beside,
        backend: str,
    ) -> Tensor:
        outputs = F.linear(hidden, weight)
        picked = pick(outputs, packed, drawn, backend=backend)
        with behind.work(outputs, picked.squares, picked.counted):
            outputs.zero_()  # the errors, at their places, take the outputs' place
            zeroed = behind.so_far()
            divisor = picked.counted.clamp_min(1) if share is None else share.divisor(picked.counted)
            loss = picked.squares / divisor
            factor = 2 / divisor
        errors = picked.errors.to(outputs.dtype)
        zeroed()
        outputs.view(-1).index_add_(0, picked.places, errors)
        ctx.save_for_backward(hidden, outputs, outputs @ weight, factor)
        ctx.behind, ctx.added_up = behind, behind.so_far()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, errors, of_hidden, factor = ctx.saved_tensors
        ctx.added_up()
        factor = factor * grads[0]
        with ctx.behind.work(errors, hidden, factor):
            of_weight = errors.t() @ (hidden * factor).to(hidden.dtype)
        return (of_hidden * factor).to(hidden.dtype), of_weight, None, None, None, None, None


class _Matched(torch.autograd.Function):
    """`losses.matching_loss`: the gradients need no value, which is computed behind."""

    @staticmethod
    def forward(ctx: Any, endpoint: Tensor, x_1: Tensor, reduction: Reduction, behind: Beside) -> Tensor:
        error = endpoint - x_1
        scaled = torch.empty_like(error)  # this stream's memory, for it is read here
        with behind.work(error):
            torch.mul(error, 2 / (error.numel() if reduction == "mean" else len(error)), out=scaled)
            ctx.scaled = behind.so_far()
            ctx.save_for_backward(scaled)
            return averaged(error.square(), reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.scaled()
        gradient = ctx.saved_tensors[0] * grads[0]
        return gradient, -gradient, None, None


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
