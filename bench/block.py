"""A transformer block's training form and its attention, beside PyTorch; `python -m bench.block`.

Ours works on packed histories; the peers get the same histories where these are all of 50 items, and else pad to 50.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure import Row, shown, time_us
from fave_fast.config import ModelConfig
from fave_fast.model import Block, rotate
from fave_fast.ops.attention import attention, attention_dual, rotary_by_age, rotary_tables, softmax_attention
from fave_fast.ops.block import BlockDropout, BlockWeights, block, block_dual, gelu_dual, norm_dual

B, L, D, HEADS = 512, 50, 128, 4
P = 0.3
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
Pair = tuple[Tensor, ...]
NONE = (0, 0, 0)  # no floor


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
    yield both_ways(op, case, who, call, leaves, floors)


def both_ways(
    op: str, case: str, who: str, call: Callable[[], Pair], leaves: list[Tensor], floors: tuple[int, int, int] = NONE
) -> Row:
    """Forward and backward from random gradients."""
    upstream = [torch.randn_like(one) for one in call()]
    run = lambda: torch.autograd.grad(call(), leaves, upstream)  # noqa: E731
    return Row(op, f"{case}, forward + backward", who, time_us(run, 20), floors[1], 3 * floors[2])


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
    for who, backend in PEERS.items():
        with sdpa_kernel(backend):
            call = lambda: (F.scaled_dot_product_attention(*values),)  # noqa: E731
            yield from times("attention", case, f"SDPA {who}", call, values, NONE)
    allowed = torch.ones(B, 1, 1, L, dtype=torch.bool, device="cuda")
    explicit = torch.compile(lambda *x: softmax_attention([x[:3], x[3:]], allowed))
    both = lambda: explicit(*values, *tangents)  # noqa: E731
    yield both_ways("attention_dual", case, "compiled explicit dual", both, [*values, *tangents])

    def forward_mode() -> Pair:
        with sdpa_kernel(SDPBackend.MATH):
            result: Pair = torch.func.jvp(F.scaled_dot_product_attention, tuple(values), tuple(tangents))
        return result

    yield both_ways("attention_dual", case, "torch.func.jvp, SDPA math", forward_mode, [*values, *tangents])


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
    # Rows of D that these kernels read and write. Forward: x; q, k, v twice; o twice; x, h, y. Backward, with the
    # weight gradients: 56, of which 20 are the hidden layer and its gradient.
    floors = (12 * unit, 68 * unit, operations)
    for last in (False, True):
        name = f"{case}, newest only" if last else case
        some = NONE if last else floors
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
    one = lambda network: (network(x, allowed, tables, False),)  # noqa: E731
    yield from times("block", case, "eager", lambda: one(module), [x, *leaves], NONE)
    compiled = torch.compile(module)
    yield both_ways("block", case, "torch.compile", lambda: one(compiled), [x, *leaves])
    explicit = torch.compile(lambda x, dx: dense_dual((x, dx), module, allowed, tables))
    yield both_ways("block_dual", case, "compiled explicit dual", lambda: explicit(x, dx), [x, dx, *leaves])

    def forward_mode() -> Pair:
        with sdpa_kernel(SDPBackend.MATH):
            result: Pair = torch.func.jvp(lambda z: module(z, allowed, tables, False), (x,), (dx,))
        return result

    yield both_ways("block_dual", case, "torch.func.jvp", forward_mode, [x, dx, *leaves])


def breakdown(module: Block) -> Iterator[str]:
    """The kernels of forward + backward of the block and of its dual, and what each takes, the L2 cache warm."""
    offsets, tables = torch.arange(B + 1, device="cuda") * L, rotary_by_age(L, D // HEADS, "cuda")
    x, dx = random(B * L, D, leaf=True), random(B * L, D, leaf=True)
    options = {"dropout": BlockDropout(P, torch.tensor([1], device="cuda"))}
    for op, inputs in ((block, (x,)), (block_dual, (x, dx))):
        leaves, times = [*inputs, *module.parameters()], 5

        def run(op: Callable[..., Any] = op, inputs: Pair = inputs, leaves: list[Tensor] = leaves) -> None:
            result = op(*inputs, weights_of(module), offsets, HEADS, tables, **options)
            torch.autograd.grad(result, leaves, inputs if op is block_dual else inputs[0])

        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(times):
                run()
            torch.cuda.synchronize()
        spent = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
        parts = [f"{one.key[:32]} x{one.count // times} {one.self_device_time_total / times:.1f}" for one in spent[:14]]
        yield f"{op.__name__}, kernels in us: " + " | ".join(parts)


def check() -> None:
    """No time of ours counts unless the block and its gradients equal the reference network's."""
    module = Block(ModelConfig(dropout=0.0)).to("cuda", torch.bfloat16)
    x, upstream = random(B * L, D, leaf=True), random(B * L, D)
    offsets, rotary = torch.arange(B + 1, device="cuda") * L, rotary_by_age(L, D // HEADS, "cuda")
    y = block(x, weights_of(module), offsets, HEADS, rotary)
    got = [y, *torch.autograd.grad(y, [x, *module.parameters()], upstream)]
    dual = block_dual(x, upstream, weights_of(module), offsets, HEADS, rotary)
    got += [*dual, *torch.autograd.grad(dual, [x, *module.parameters()], (upstream, upstream))]

    module.double()
    allowed = torch.ones(B, 1, 1, L, dtype=torch.bool, device="cuda")
    tables = rotary_tables(torch.arange(L - 1, -1, -1, device="cuda"), D // HEADS)
    wide, along = x.detach().double().requires_grad_(), upstream.double()
    call = lambda z: module(z.view(B, L, D), allowed, tables, False).view(B * L, D)  # noqa: E731
    y = call(wide)
    want = [y, *torch.autograd.grad(y, [wide, *module.parameters()], along)]
    with sdpa_kernel(SDPBackend.MATH):
        dual = torch.func.jvp(call, (wide,), (along,))
    want += [*dual, *torch.autograd.grad(dual, [wide, *module.parameters()], (along, along))]
    errors = [float((one - two).detach().norm() / two.detach().norm()) for one, two in zip(got, want, strict=True)]
    if not max(errors) < 1.5e-2:
        raise AssertionError(f"the block differs from the reference network's by {errors}")
    print(f"relative errors against fp64: {', '.join(f'{one:.1e}' for one in errors)}")


def main() -> None:
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    check()
    module = Block(ModelConfig(dropout=P)).to("cuda", torch.bfloat16)
    print("\n".join(breakdown(module)), flush=True)
    rows: list[Row] = []
    groups = [attention_peers(), block_peers(module)]
    for lengths, case in ((beauty_lengths(), f"B {B}, as Beauty"), (torch.full((B,), L), f"B {B}, L {L}")):
        groups = [attention_rows(lengths, case), block_rows(module, lengths, case), *groups]
    for group in groups:
        some = shown(group, gpu)
        rows += some
    print(json.dumps({"gpu": gpu, "rows": [row.as_dict(gpu) for row in rows]}))


if __name__ == "__main__":
    main()
