"""A transformer block's training form and its attention, beside PyTorch; `python -m bench.block`.

Ours works on packed histories; the peers get the same histories where these are all of 50 items, and else pad to 50.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure import Row, table, time_us
from fave_fast.config import ModelConfig
from fave_fast.model import Block, rotary_tables, rotate
from fave_fast.ops.attention import attention, attention_dual, rotary_by_age, softmax_attention
from fave_fast.ops.block import BlockDropout, BlockWeights, block, block_dual, gelu_dual, norm_dual

B, L, D, HEADS = 512, 50, 128, 4
P = 0.3
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
Pair = tuple[Tensor, ...]


def beauty_lengths() -> Tensor:
    """B lengths as Amazon Beauty's: geometric, mean about 8, at most L."""
    draws = torch.empty(B).geometric_(1 / 6, generator=torch.Generator().manual_seed(0))
    return (draws.long() + 2).clamp(max=L)


def random(*shape: int, leaf: bool = False) -> Tensor:
    """Random bf16 numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(leaf)


def times(
    op: str, case: str, who: str, call: Callable[[], Pair], leaves: list[Tensor], floors: tuple[int, int, int]
) -> Iterator[Row]:
    """Forward alone and with backward; `floors` are the bytes of each and the operations of the forward pass."""
    with torch.no_grad():
        yield Row(op, f"{case}, forward", who, time_us(call, 30), floors[0], floors[2])
    upstream = [torch.randn_like(one) for one in call()]
    both = lambda: torch.autograd.grad(call(), leaves, upstream)  # noqa: E731
    yield Row(op, f"{case}, forward + backward", who, time_us(both, 30), floors[1], 3 * floors[2])


def attention_rows(lengths: Tensor, case: str) -> Iterator[Row]:
    offsets = F.pad(lengths.cumsum(0), (1, 0)).cuda()
    rows, tables = int(lengths.sum()), rotary_by_age(L, D // HEADS, "cuda")
    qkv, dqkv = random(rows, 3 * D, leaf=True), random(rows, 3 * D, leaf=True)
    unit = 2 * rows * D  # bytes
    one = lambda: (attention(qkv, offsets, HEADS, tables),)  # noqa: E731
    yield from times("attention", case, "triton", one, [qkv], (4 * unit, 11 * unit, 0))
    both = lambda: attention_dual(qkv, dqkv, offsets, HEADS, tables)  # noqa: E731
    yield from times("attention_dual", case, "triton", both, [qkv, dqkv], (8 * unit, 22 * unit, 0))


def attention_peers() -> Iterator[Row]:
    """On padded [B, H, L, C], rotary not included: it is one more pass in theirs."""
    case = f"B {B}, L {L}"
    values, tangents = ([random(B, HEADS, L, D // HEADS, leaf=True) for _ in range(3)] for _ in range(2))
    zero = (0, 0, 0)
    for who, backend in PEERS.items():
        with sdpa_kernel(backend):
            call = lambda: (F.scaled_dot_product_attention(*values),)  # noqa: E731
            yield from times("attention", case, f"SDPA {who}", call, values, zero)
    allowed = torch.ones(B, 1, 1, L, dtype=torch.bool, device="cuda")
    explicit = torch.compile(lambda *x: softmax_attention([x[:3], x[3:]], allowed))
    both = lambda: explicit(*values, *tangents)  # noqa: E731
    yield from times("attention_dual", case, "compiled explicit dual", both, [*values, *tangents], zero)

    def forward_mode() -> Pair:
        with sdpa_kernel(SDPBackend.MATH):
            result: Pair = torch.func.jvp(F.scaled_dot_product_attention, tuple(values), tuple(tangents))
        return result

    yield from times("attention_dual", case, "torch.func.jvp, SDPA math", forward_mode, [*values, *tangents], zero)


def weights_of(module: Block) -> BlockWeights:
    """The parameters of the reference network's block."""
    return BlockWeights(
        module.attention_norm.weight, None, module.qkv.weight, module.attention_out.weight,
        module.ffn_norm.weight, None, module.ffn_in.weight, module.ffn_out.weight,
    )  # fmt: skip


def dense_dual(x: Pair, module: Block, allowed: Tensor, tables: tuple[Tensor, Tensor]) -> Pair:
    """The dual block on padded [B, L, D] in plain PyTorch, value and tangent stacked in each product."""

    def linear(pair: Pair, weight: Tensor) -> Pair:
        return tuple(F.linear(torch.stack(pair), weight).unbind(0))

    def dropped(pair: Pair) -> Pair:
        mask = (torch.rand_like(pair[0]) >= P).to(pair[0].dtype) / (1 - P)
        return tuple(one * mask for one in pair)

    parts = []
    for one in linear(norm_dual(x, module.attention_norm.weight, None, 1e-6), module.qkv.weight):
        q, k, v = (part.view(B, L, HEADS, -1).transpose(1, 2) for part in one.chunk(3, dim=-1))
        parts.append((rotate(q, tables), rotate(k, tables), v))
    o = tuple(one.transpose(1, 2).flatten(2) for one in softmax_attention(parts, allowed))
    h = tuple(one + two for one, two in zip(x, dropped(linear(o, module.attention_out.weight)), strict=True))
    hidden = gelu_dual(linear(norm_dual(h, module.ffn_norm.weight, None, 1e-6), module.ffn_in.weight))
    return tuple(one + two for one, two in zip(h, dropped(linear(hidden, module.ffn_out.weight)), strict=True))


def block_rows(module: Block, lengths: Tensor, case: str) -> Iterator[Row]:
    offsets = F.pad(lengths.cumsum(0), (1, 0)).cuda()
    rows, tables = int(lengths.sum()), rotary_by_age(L, D // HEADS, "cuda")
    x, dx = random(rows, D, leaf=True), random(rows, D, leaf=True)
    weights = weights_of(module)
    leaves = list(module.parameters())
    dropout = BlockDropout(P, torch.tensor([1], device="cuda"))
    unit, operations = 2 * rows * D, 2 * rows * 12 * D * D
    # x, qkv, o and h once each way, y; backward: 52 rows' widths of 128, the hidden layer and its gradient among them.
    floors = (13 * unit, 65 * unit, operations)
    for last in (False, True):
        name = f"{case}, newest only" if last else case
        some = (0, 0, 0) if last else floors
        options = {"last_only": last, "dropout": dropout}
        one = functools.partial(block, x, weights, offsets, HEADS, tables, **options)
        yield from times("block", name, "triton", lambda one=one: (one(),), [x, *leaves], some)
        two = functools.partial(block_dual, x, dx, weights, offsets, HEADS, tables, **options)
        yield from times("block_dual", name, "triton", two, [x, dx, *leaves], tuple(2 * floor for floor in some))


def block_peers(module: Block) -> Iterator[Row]:
    case = f"B {B}, L {L}"
    x, dx = random(B, L, D, leaf=True), random(B, L, D, leaf=True)
    leaves: list[Tensor] = list(module.parameters())
    allowed = torch.ones(B, 1, 1, L, dtype=torch.bool, device="cuda")
    tables = rotary_tables(torch.arange(L - 1, -1, -1, device="cuda"), D // HEADS)
    zero = (0, 0, 0)
    compiled: nn.Module = torch.compile(module)  # type: ignore[assignment]
    for who, network in (("eager", module), ("torch.compile", compiled)):
        one = functools.partial(network, x, allowed, tables, False)
        yield from times("block", case, who, lambda one=one: (one(),), [x, *leaves], zero)
    explicit = torch.compile(lambda x, dx: dense_dual((x, dx), module, allowed, tables))
    yield from times("block_dual", case, "compiled explicit dual", lambda: explicit(x, dx), [x, dx, *leaves], zero)

    def forward_mode() -> Pair:
        with sdpa_kernel(SDPBackend.MATH):
            result: Pair = torch.func.jvp(lambda z: module(z, allowed, tables, False), (x,), (dx,))
        return result

    yield from times("block_dual", case, "torch.func.jvp", forward_mode, [x, dx, *leaves], zero)


def check() -> None:
    """No time of ours counts unless the block equals the reference network's."""
    module = Block(ModelConfig(dropout=0.0)).to("cuda", torch.bfloat16)
    x = random(B, L, D)
    tables = rotary_tables(torch.arange(L - 1, -1, -1, device="cuda"), D // HEADS)
    offsets = torch.arange(B + 1, device="cuda") * L
    allowed = torch.ones(B, 1, 1, L, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        want = module.double()(x.double(), allowed, tables, False).view(B * L, D)
        module.to(torch.bfloat16)
        got = block(x.view(B * L, D), weights_of(module), offsets, HEADS, rotary_by_age(L, D // HEADS, "cuda"))
    error = float((got.double() - want).norm() / want.norm())
    if not error < 1e-2:
        raise AssertionError(f"the block differs from the reference network's by {error:.2e}")


def main() -> None:
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    module = Block(ModelConfig(dropout=P)).to("cuda", torch.bfloat16)
    check()
    rows: list[Row] = []
    for lengths, case in ((torch.full((B,), L), f"B {B}, L {L}"), (beauty_lengths(), f"B {B}, as Beauty")):
        rows += [*attention_rows(lengths, case), *block_rows(module, lengths, case)]
    rows += [*attention_peers(), *block_peers(module)]
    print(table(rows, gpu))
    print(json.dumps({"gpu": gpu, "rows": [row.as_dict(gpu) for row in rows]}))


if __name__ == "__main__":
    main()
