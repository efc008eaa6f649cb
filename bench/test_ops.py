"""Each op and a peer that does the same work in PyTorch's own operations, forward and backward where it is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.block import weights_of
from bench.conftest import Sizes
from fave_fast.config import FlowConfig, ModelConfig
from fave_fast.flow import InferenceNoise, one_step
from fave_fast.model import FAVE, Block, rotate
from fave_fast.ops import (
    ClippedAdam,
    Exclusions,
    attention,
    attention_dual,
    block,
    block_dual,
    cross_entropy,
    input_modulation,
    rank_count,
    score_topk,
)  # fmt: skip
from fave_fast.ops.attention import rotary_by_age, rotary_tables, softmax_attention
from fave_fast.ops.encoder import EncoderWeights, InputPath, encode_ids
from fave_fast.ops.input_modulation import Draws, Times

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5)

D, HEADS, K = 128, 4, 20
Call = Callable[[], tuple[Tensor, ...]]
Pair = tuple[Call, Call]  # ours, the peer


class Inputs:
    """The same numbers for ours, the peer and the peer in float64."""

    def __init__(self, sizes: Sizes, wide: bool) -> None:
        self.sizes, self.wide = sizes, wide
        self.source = torch.Generator().manual_seed(0)
        self.config = ModelConfig(max_length=sizes.length, dropout=0.0, embedding_dropout=0.0)

    def cast(self, tensor: Tensor) -> Tensor:
        narrow = tensor.to(self.sizes.device, self.sizes.dtype)
        return narrow.double() if self.wide else narrow

    def random(self, *shape: int, leaf: bool = False) -> Tensor:
        return self.cast(torch.randn(shape, generator=self.source)).requires_grad_(leaf)

    def whole(self, high: int, *shape: int) -> Tensor:
        return torch.randint(1, high + 1, shape, generator=self.source).to(self.sizes.device)

    @property
    def offsets(self) -> Tensor:
        return torch.arange(self.sizes.batch + 1, device=self.sizes.device) * self.sizes.length

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        narrow = module.to(self.sizes.device, self.sizes.dtype)
        return narrow.double() if self.wide else narrow


def with_gradients(forward: Call, leaves: list[Tensor]) -> Call:
    upstream = [torch.ones_like(one) for one in forward()]

    def call() -> tuple[Tensor, ...]:
        values = forward()
        return *(one.detach() for one in values), *torch.autograd.grad(values, leaves, upstream)

    return call


def of_score_topk(given: Inputs) -> Pair:
    queries, table = given.random(given.sizes.batch, D), given.random(given.sizes.items + 1, D)
    return (
        lambda: score_topk(queries, table, K)[:1],
        lambda: ((queries @ table[1:].T).topk(K).values,),
    )


def of_rank_count(given: Inputs) -> Pair:
    batch, items = given.sizes.batch, given.sizes.items
    queries, table, targets = given.random(batch, D), given.random(items + 1, D), given.whole(items, batch)
    seen = given.whole(items, batch * 8)
    exclude = Exclusions(seen, torch.arange(batch + 1, device=seen.device) * 8)

    def plain() -> tuple[Tensor, ...]:
        scores = queries @ table.T
        wanted = scores.gather(1, targets[:, None])
        scores = scores.scatter(1, F.pad(seen.view(batch, 8), (1, 0)), -torch.inf)
        return (1 + (scores > wanted).sum(1),)

    return lambda: (rank_count(queries, table, targets, exclude),), plain


def of_encode_ids(given: Inputs) -> Pair:
    torch.manual_seed(0)
    model = given.module(FAVE(given.config, given.sizes.items)).eval()
    assert isinstance(model, FAVE)
    flow = FlowConfig()
    noise = InferenceNoise.draw(model, flow)
    weights, path = EncoderWeights.pack(model), InputPath.pack(model, flow, noise)
    history = given.whole(given.sizes.items, given.sizes.batch, given.sizes.length)

    @torch.no_grad()
    def plain() -> tuple[Tensor, ...]:
        return (one_step(model, history, noise.prior(model, flow, history), noise.lambdas(history)),)

    return lambda: (encode_ids(weights, path, history.view(-1), given.offsets),), plain


def of_cross_entropy(given: Inputs) -> Pair:
    batch, items = given.sizes.batch, given.sizes.items
    endpoint, targets = given.random(batch, D, leaf=True), given.whole(items, batch)
    table = (given.random(items + 1, D) * 0.25).detach().requires_grad_()  # a power of two: the same in any dtype
    leaves = [endpoint, table]
    plain = lambda: (F.cross_entropy((endpoint @ table[1:].T).to(_wider(endpoint)), targets - 1),)  # noqa: E731
    return (
        with_gradients(lambda: (cross_entropy(endpoint, table, targets),), leaves),
        with_gradients(plain, leaves),
    )


def _wider(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _heads(given: Inputs, qkv: Tensor) -> list[Tensor]:
    length = given.sizes.length
    tables = rotary_tables(torch.arange(length - 1, -1, -1, device=qkv.device), D // HEADS)
    q, k, v = (part.view(-1, length, HEADS, D // HEADS).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return [rotate(q, tables), rotate(k, tables), v]


def of_attention(given: Inputs) -> Pair:
    qkv = given.random(given.sizes.batch * given.sizes.length, 3 * D, leaf=True)
    tables = rotary_by_age(given.sizes.length, D // HEADS, given.sizes.device)

    def plain() -> tuple[Tensor, ...]:
        o = F.scaled_dot_product_attention(*_heads(given, qkv))
        return (o.transpose(1, 2).reshape(-1, D),)

    return with_gradients(lambda: (attention(qkv, given.offsets, HEADS, tables),), [qkv]), with_gradients(plain, [qkv])


def of_attention_dual(given: Inputs) -> Pair:
    rows = given.sizes.batch * given.sizes.length
    qkv, dqkv = given.random(rows, 3 * D, leaf=True), given.random(rows, 3 * D, leaf=True)
    tables = rotary_by_age(given.sizes.length, D // HEADS, given.sizes.device)
    allowed = torch.ones(given.sizes.batch, 1, 1, given.sizes.length, dtype=torch.bool, device=given.sizes.device)

    def plain() -> tuple[Tensor, ...]:
        parts = softmax_attention([_heads(given, qkv), _heads(given, dqkv)], allowed)  # type: ignore[list-item]
        return tuple(one.transpose(1, 2).reshape(-1, D) for one in parts)

    return (
        with_gradients(lambda: attention_dual(qkv, dqkv, given.offsets, HEADS, tables), [qkv, dqkv]),
        with_gradients(plain, [qkv, dqkv]),
    )


def _block(given: Inputs) -> tuple[Block, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    module = given.module(Block(given.config))
    assert isinstance(module, Block)
    shape = given.sizes.batch, 1, 1, given.sizes.length
    allowed = torch.ones(shape, dtype=torch.bool, device=given.sizes.device)
    ages = torch.arange(given.sizes.length - 1, -1, -1, device=given.sizes.device)
    return module, allowed, rotary_tables(ages, D // HEADS)


def of_block(given: Inputs) -> Pair:
    module, allowed, tables = _block(given)
    x = given.random(given.sizes.batch * given.sizes.length, D, leaf=True)
    by_age = rotary_by_age(given.sizes.length, D // HEADS, given.sizes.device)
    leaves = [x, *module.parameters()]
    grid = lambda: x.view(given.sizes.batch, given.sizes.length, D)  # noqa: E731
    return (
        with_gradients(lambda: (block(x, weights_of(module), given.offsets, HEADS, by_age),), leaves),
        with_gradients(lambda: (module(grid(), allowed, tables, False).view(-1, D),), leaves),
    )


def of_block_dual(given: Inputs) -> Pair:
    module, allowed, tables = _block(given)
    rows = given.sizes.batch * given.sizes.length
    x, dx = given.random(rows, D, leaf=True), given.random(rows, D, leaf=True)
    by_age = rotary_by_age(given.sizes.length, D // HEADS, given.sizes.device)
    leaves = [x, dx, *module.parameters()]

    def forward_mode() -> tuple[Tensor, ...]:
        def plain(rows: Tensor) -> Tensor:
            grid = rows.view(given.sizes.batch, given.sizes.length, D)
            result: Tensor = module(grid, allowed, tables, False, forward_mode=True).reshape(-1, D)
            return result

        with sdpa_kernel(SDPBackend.MATH):
            result: tuple[Tensor, ...] = torch.func.jvp(plain, (x,), (dx,))
        return result

    return (
        with_gradients(lambda: block_dual(x, dx, weights_of(module), given.offsets, HEADS, by_age), leaves),
        with_gradients(forward_mode, leaves),
    )


def of_input_modulation(given: Inputs) -> Pair:
    torch.manual_seed(0)
    model = given.module(FAVE(given.config, given.sizes.items))
    assert isinstance(model, FAVE)
    batch, length = given.sizes.batch, given.sizes.length
    history, x_t = given.whole(given.sizes.items, batch, length), given.random(batch, D, leaf=True)
    lam = given.random(batch, length, D)
    t = torch.rand(batch, generator=given.source).to(given.sizes.device)
    t = t.double() if given.wide else t
    r = (1 + t) / 2
    embedding, norm, time = model.item_embedding.weight, model.embedding_norm, model.time_embedding
    leaves = [x_t, norm.weight, norm.bias, time.out.weight]
    times = Times(t, r, time.hidden.weight, time.hidden.bias, time.out.weight, time.out.bias, time.scale)
    draws = Draws(torch.tensor([1], device=t.device), torch.arange(batch, device=t.device))

    def ours() -> tuple[Tensor, ...]:
        found = input_modulation(
            history, embedding, norm.weight, norm.bias, x_t, times, lam, draws=draws, eps=norm.eps
        )  # fmt: skip
        return (found.view(batch, length, D),)

    plain = lambda: (model.modulate(model.embed_history(history), x_t, t, r, lam),)  # noqa: E731
    return with_gradients(ours, leaves), with_gradients(plain, leaves)


def of_adam(given: Inputs) -> Pair:
    def make() -> tuple[torch.optim.Adam, list[Tensor]]:
        kind = torch.float64 if given.wide else torch.float32
        source = torch.Generator().manual_seed(1)
        shapes = [(given.sizes.items + 1, D), *[(4 * D, D), (D, 4 * D), (3 * D, D)] * 4]
        parameters = []
        for shape in shapes:
            one = torch.randn(shape, generator=source).to(given.sizes.device, kind).requires_grad_()
            one.grad = torch.randn(shape, generator=source).to(given.sizes.device, kind)
            parameters.append(one)
        rate = torch.tensor(1e-3, device=given.sizes.device) if given.sizes.device.type == "cuda" else 1e-3
        fused = given.sizes.device.type == "cuda"
        return torch.optim.Adam(parameters, rate, fused=True, capturable=fused), parameters

    (mine, own), (theirs, other) = make(), make()
    adam = ClippedAdam(mine, 1.0)

    def ours() -> tuple[Tensor, ...]:
        adam.take()
        return (own[1].detach(),)

    def plain() -> tuple[Tensor, ...]:
        torch.nn.utils.clip_grad_norm_(other, 1.0)
        theirs.step()
        return (other[1].detach(),)

    return ours, plain


MAKE: dict[str, Callable[[Inputs], Pair]] = {
    "score_topk": of_score_topk,
    "rank_count": of_rank_count,
    "encode_ids": of_encode_ids,
    "cross_entropy": of_cross_entropy,
    "attention": of_attention,
    "attention_dual": of_attention_dual,
    "block": of_block,
    "block_dual": of_block_dual,
    "input_modulation": of_input_modulation,
    "adam": of_adam,
}


def check(op: str, given: Inputs, pair: Pair) -> None:
    """Ours at most twice as wrong as the peer in its dtype, against the peer in float64, or wrong by its last bits."""
    exact = MAKE[op](Inputs(given.sizes, wide=True))[1]()
    found, usual = (call() for call in pair)
    for at, (want, one, other) in enumerate(zip(exact, found, usual, strict=True)):
        error, allowed = ((part.double() - want.double()).norm() for part in (one, other))
        least = 1e-5 if given.sizes.dtype == torch.float32 else 2.0**-7
        assert error <= 2 * allowed + least * want.double().norm(), f"{op}: result {at} is off by {error:.2e}"


@pytest.mark.parametrize("who", ["fave_fast", "PyTorch"])
@pytest.mark.parametrize("op", MAKE)
def test_op(op: str, who: str, sizes: Sizes, timed: Callable[..., object]) -> None:
    given = Inputs(sizes, wide=False)
    pair = MAKE[op](given)
    check(op, given, pair)
    call = pair[0] if who == "fave_fast" else pair[1]
    timed(op, f"B {sizes.batch}, L {sizes.length}, N {sizes.items}", who, call)
