"""The kernels' scan of one byte an element against the scan of the table: the same lists, to the bit.

Numbers are multiples of 1/64 below 4, times a power of two for each row, unless a test says otherwise: their inner
products are exact in every order of summation, in the interpreter too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_score_topk import DEVICE, DTYPES, NARROW, denied, exclusions
from torch import Tensor

from fave_fast.errors import BackendError
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.byte_table import ByteTable, KernelByteTable, loss_of_queries_and_sums
from fave_fast.ops.registry import why_no_triton
from fave_fast.ops.score_topk import workspace_bytes

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))

OP_MODULE = import_module("fave_fast.ops.score_topk")  # the package's attribute of this name is the function


@pytest.fixture(params=["whole", "parts"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catalogues of any size are scanned in bytes, by shapes so narrow that some hundred items have spans.

    Lists of any length are made by one program each, or in parts.
    """
    narrow(monkeypatch, 4)
    monkeypatch.setattr(OP_MODULE, "ONE_PROGRAM_MOST_K", 1024 if request.param == "whole" else 0)


def narrow(patch: pytest.MonkeyPatch, group: int) -> None:
    shapes = {**NARROW, "certify": NARROW["finish"] | {"WIDTH": 64}}
    patch.setattr(OP_MODULE, "tile_shapes", lambda op, variant, device: shapes[variant.split("_")[0]])
    patch.setattr(OP_MODULE, "BYTES_LEAST_ITEMS", 1)
    patch.setattr(OP_MODULE, "_group_size", lambda *_: group)


def numbers(rows: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-255, 256, (rows, d), generator=generator) / 64).to(DEVICE, dtype)


def assert_the_same_lists(
    queries: Tensor,
    table: Tensor,
    k: int,
    exclude: Exclusions | None = None,
    deny: Tensor | None = None,
    table_bytes: ByteTable | None = None,
) -> float:
    """By poisoned memory; returns the share of rows that fell back."""
    table_bytes = KernelByteTable.pack(table) if table_bytes is None else table_bytes
    out = (
        torch.full((len(queries), k), torch.nan, device=DEVICE),
        torch.full((len(queries), k), -7, dtype=torch.int64, device=DEVICE),
    )
    size = workspace_bytes(queries, table, k, 0 if exclude is None else len(exclude.ids), table_bytes)
    workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE)
    score_topk(
        queries, table, k, exclude, deny, out=out, workspace=workspace, table_bytes=table_bytes, backend="triton"
    )
    scores, ids = score_topk(queries, table, k, exclude, deny, backend="triton")
    assert torch.equal(out[1], ids)
    assert torch.equal(out[0].view(torch.int32), scores.view(torch.int32))
    return table_bytes.fallback_share


@pytest.mark.parametrize(
    ("batch", "items", "d", "k"), [(1, 1, 4, 3), (2, 97, 5, 97), (1, 400, 16, 1), (2, 200, 33, 20), (16, 20, 4, 3)]
)
def test_lists_are_those_of_the_table(small: None, batch: int, items: int, d: int, k: int) -> None:
    queries, table = numbers(batch, d, 1), numbers(items + 1, d)
    table[0] = 100  # the padding would win nearly everywhere if it were a candidate
    assert_the_same_lists(queries, table, k)


def test_random_lists_are_proven(small: None) -> None:
    assert assert_the_same_lists(numbers(2, 16, 1), numbers(401, 16), 5) == 0


@pytest.mark.parametrize(("lengths", "share"), [((0, 3, 150), None), ((150,), 0.3), ((0,), 1.0)])
def test_exclusions_and_a_deny_list(small: None, lengths: tuple[int, ...], share: float | None) -> None:
    deny = None if share is None else denied(200, share)
    assert_the_same_lists(numbers(2, 8, 1), numbers(201, 8), 10, exclusions(2, 200, lengths), deny)


def test_the_best_items_of_every_group_are_excluded(small: None) -> None:
    queries, table = numbers(1, 8, 1), numbers(201, 8)
    _, order = score_topk(queries, table, 200, backend="reference")
    exclude = Exclusions(order[0, :100].contiguous(), torch.tensor([0, 100], device=DEVICE))
    assert_the_same_lists(queries, table, 10, exclude)


def test_near_duplicates_around_the_last_place(small: None) -> None:
    """More items within what 8 bits can tell apart than are looked at: no list is proven, all are right."""
    table, queries = numbers(401, 8), numbers(2, 8, 1)
    table[1:301] = table[1]
    table[1:301, 0] += torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(2)).to(DEVICE) / 64
    queries[0] = table[1]
    table_bytes = KernelByteTable.pack(table)
    assert_the_same_lists(queries[:1], table, 5, table_bytes=table_bytes)
    assert table_bytes.counts.tolist() == [1, 1]
    assert_the_same_lists(queries, table, 5, table_bytes=table_bytes)
    assert table_bytes.counts[0] == 3
    assert 1 / 3 < table_bytes.fallback_share < 1


def test_equal_rows_take_the_whole_scan_and_keep_their_order(small: None) -> None:
    table = numbers(1, 8).expand(401, 8).contiguous()
    assert assert_the_same_lists(numbers(2, 8, 1), table, 3) == 1


def test_a_query_of_zeros_is_proven_and_not_counted(small: None) -> None:
    """As graphs have them in place of absent users; all items score 0 and the first ones are the list."""
    table = numbers(301, 8)
    table[[2, 77]] = torch.nan
    table_bytes = KernelByteTable.pack(table)
    exclude = Exclusions.from_lists([[], [5, 6]]).to(DEVICE)
    queries = torch.stack((torch.zeros(8, device=DEVICE), numbers(1, 8, 1)[0]))
    assert_the_same_lists(queries, table, 5, exclude, table_bytes=table_bytes)
    assert table_bytes.counts.tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(2))
def test_rows_of_any_length_and_without_a_bound(small: None, seed: int) -> None:
    """Huge, tiny, subnormal, zero, infinite and NaN rows, and such queries."""
    table, queries = numbers(201, 8, seed), numbers(6, 8, seed + 2)
    rng = np.random.default_rng(seed)
    table *= torch.from_numpy(2.0 ** rng.integers(-12, 13, (201, 1))).to(table)
    special = (2.0**60, 2.0**-60, 2.0**-145, 0.0, -0.0, torch.inf, -torch.inf, torch.nan)
    for row, factor in zip(rng.choice(200, 40, replace=False) + 1, special * 5, strict=True):
        if np.isfinite(factor):
            table[row] *= factor
        else:
            table[row, rng.integers(8)] = factor
    for row, factor in enumerate((2.0**-60, 2.0**50, torch.inf, torch.nan)):
        queries[row, :1] *= factor
    assert_the_same_lists(queries, table, 10, exclusions(6, 200, (0, 20), seed))
    table[:] = torch.nan
    assert_the_same_lists(queries[:2], table, 3)


def test_half_precision(small: None) -> None:
    table = numbers(301, 24, dtype=torch.float16)
    assert_the_same_lists(numbers(2, 24, 1, torch.float16), table, 20, exclusions(2, 300, (40,)), denied(300, 0.1))


def test_the_shipped_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP_MODULE, "BYTES_LEAST_ITEMS", 1)
    assert_the_same_lists(numbers(2, 16, 1), numbers(301, 16), 5, exclusions(2, 300, (20,)))


def test_rows_that_change_are_quantised_in_place(small: None) -> None:
    queries, table = numbers(2, 16, 1), numbers(121, 16)
    table_bytes = KernelByteTable.pack(table)
    memory = (table_bytes.rows.data_ptr(), table_bytes.words.data_ptr())
    changed = torch.tensor([7, 120, 12], device=DEVICE)
    table[changed] = 4 * queries[0]
    assert table_bytes.refreshed(table, changed) is table_bytes
    assert (table_bytes.rows.data_ptr(), table_bytes.words.data_ptr()) == memory
    assert_the_same_lists(queries, table, 5, table_bytes=table_bytes)
    assert score_topk(queries, table, 3, table_bytes=table_bytes, backend="triton")[1][0].tolist() == [7, 12, 120]
    table[changed[1:]] = torch.nan
    table_bytes.refreshed(table, changed[1:])
    assert_the_same_lists(queries, table, 5, table_bytes=table_bytes)


def test_another_table_is_refused() -> None:
    table = numbers(31, 16)
    table_bytes = KernelByteTable.pack(table)
    for call in (
        lambda: score_topk(table[:1], table.clone(), 3, table_bytes=table_bytes),
        lambda: table_bytes.refreshed(table[:30]),
    ):
        with pytest.raises(ValueError, match="table_bytes were made of another table"):
            call()
    with pytest.raises(ValueError, match=r"expected floating point \[N \+ 1, D\]"):
        KernelByteTable.pack(table.int())


def test_a_small_table_or_a_large_batch_is_scanned_as_it_is() -> None:
    queries, table = numbers(2, 8, 1), numbers(101, 8)
    table_bytes = KernelByteTable.pack(table)
    assert_the_same_lists(queries, table, 3, table_bytes=table_bytes)
    assert table_bytes.counts.tolist() == [0, 0]
    assert workspace_bytes(queries, table, 3, 0, table_bytes) == workspace_bytes(queries, table, 3)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="where there is no extension for the table")
def test_what_pack_cannot_do_is_named() -> None:
    with pytest.raises(BackendError, match="no table in bytes: "):
        ByteTable.pack(numbers(3, 4, dtype=torch.float16))


def bounds_of(queries: Tensor, table: Tensor) -> Tensor:
    """The scan's upper bounds [B, N], of groups of one item each."""
    table_bytes = KernelByteTable.pack(table)
    size = workspace_bytes(queries, table, 1, 0, table_bytes)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    score_topk(queries, table, 1, workspace=workspace, table_bytes=table_bytes, backend="triton")
    # The scan of the whole table, for rows that fell back, takes the same memory: none must have.
    assert table_bytes.fallback_share == 0
    plan = OP_MODULE._Plan.make(len(queries), len(table) - 1, queries, 1, 0, in_bytes=True)
    maxima = plan.buffers(workspace[OP_MODULE._aligned(torch.int32, len(queries)) :])["group_max"]
    return maxima.view(len(queries), -1)[:, : len(table) - 1]


floats = st.floats(-8, 8, width=32, allow_subnormal=False)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_score_exceeds_its_bound(data: st.DataObject) -> None:
    """Of floats as they come, in float64; the bound is no looser than it says, and the largest losses are there.

    Half of the queries point along what an item lost: the worst that 8 bits can do.
    """
    d = data.draw(st.sampled_from((1, 4, 16)))
    rows = data.draw(st.lists(st.lists(floats, min_size=d, max_size=d), min_size=2, max_size=20))
    table = torch.tensor([[0.0] * d, *rows], device=DEVICE) * 2.0 ** data.draw(st.integers(-20, 20))
    factor = torch.exp2(torch.tensor(data.draw(st.lists(st.integers(-8, 8), min_size=len(rows), max_size=len(rows)))))
    table[1:] *= factor[:, None].to(table)
    packed = KernelByteTable.pack(table)
    scale, error = ((packed.words & mask) << shift for mask, shift in ((-65536, 0), (0xFFFF, 16)))
    scale, error = (bits.view(torch.float32).double() for bits in (scale, error))
    lost = table.double() - packed.rows[:, :d].double() * scale[:, None]
    assert (lost.norm(dim=1) <= error).all()
    bounded = error < 1e38
    least = lost.norm(dim=1) + loss_of_queries_and_sums(d) * table.double().norm(dim=1)
    assert (error <= 1.02 * least + 1e-3 * scale)[bounded].all()
    drawn = torch.tensor(data.draw(st.lists(floats, min_size=d, max_size=d)), device=DEVICE)
    worst = lost[data.draw(st.integers(1, len(rows)))].float()
    queries = torch.stack((drawn, worst * 2.0 ** data.draw(st.integers(0, 20))))
    exact = queries.double() @ table.double().T
    # What the scan computes, in float64, and what float32 adds to that
    length = queries.double().norm(dim=1)[:, None]
    step = queries.double().abs().amax(1, keepdim=True) / 32512
    whole = torch.where(step > 0, (queries.double() / step).round(), 0)
    bound = (whole * step) @ (packed.rows[:, :d].double() * scale[:, None]).T + length * error
    assert ((exact + 8 * d * 2.0**-24 * length * table.double().norm(dim=1) <= bound) | ~bounded).all()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1 << 30), spread=st.sampled_from((0.0, 1.0, 4.0)), along=st.booleans())
def test_the_scan_keeps_the_bounds(seed: int, spread: float, along: bool) -> None:
    """The kernel's own arithmetic: bounds are not below scores in float64, and within twice what may be lost."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(65, 16, generator=generator) * torch.exp(spread * torch.randn(65, 1, generator=generator))
    queries = torch.randn(2, 16, generator=generator)
    table[1:9] += 1e4 * queries[0]  # these lead both lists, so that the scan of bytes answers
    queries[1] = queries[0]
    table = table.to(DEVICE)
    packed = KernelByteTable.pack(table)
    error = (packed.words << 16).view(torch.float32).double()
    if along:
        scale = (packed.words & -65536).view(torch.float32)
        queries[1] += (table[20] - packed.rows[20].float() * scale[20]).cpu()
    queries = queries.to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch, 1)
        bounds = bounds_of(queries, table).double()
    exact = queries.double() @ table[1:].double().T
    loss = queries.double().norm(dim=1)[:, None] * error[1:]
    assert (bounds >= exact).all()
    assert (bounds <= exact + 2.001 * loss).all()


def random_table(items: int, dtype: torch.dtype, kind: str, d: int = 128) -> Tensor:
    """Of normal numbers; "tails": of very different lengths; "clusters": items that 8 bits hardly tell apart."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    table = normal(items + 1, d)
    if kind == "tails":
        table *= torch.exp(2 * normal(items + 1, 1))
        table[normal(items + 1) > 3] = torch.nan
    if kind == "clusters":
        centres = normal(items // 40 + 1, d)  # more than forty items in a cluster, and no list would be proven
        places = torch.randint(0, len(centres), (items + 1,), generator=generator, device=DEVICE)
        table = centres[places] + 0.01 * table
    return table.to(dtype)


def hard_queries(table: Tensor, packed: KernelByteTable, batch: int, seed: int) -> Tensor:
    """A third each: normal numbers; items and a little more; what items lost in 8 bits, and a little of the item."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    d = table.shape[1]
    queries = torch.randn(batch, d, generator=generator, device=DEVICE)
    rows = torch.randint(1, len(table), (batch,), generator=generator, device=DEVICE)
    items = torch.nan_to_num(table[rows].float())
    scale = torch.nan_to_num((packed.words[rows] & -65536).view(torch.float32))[:, None]
    lost = items - packed.rows[rows, :d].float() * scale
    kind = torch.arange(batch, device=DEVICE)[:, None] % 3
    queries = torch.where(kind == 1, items + 0.3 * queries, queries)
    queries = torch.where(kind == 2, lost / scale.clamp_min(1e-6) + 0.1 * items, queries)
    return queries.to(table.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "tails", "clusters"])
def test_floats_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    items = 300_007
    table = random_table(items, dtype, kind)
    packed = KernelByteTable.pack(table)
    for batch in (1, 2, 9, 16):
        queries = hard_queries(table, packed, batch, batch)
        assert_the_same_lists(queries, table, 20, table_bytes=packed)
        exclude = exclusions(batch, items, (0, 50, 700), batch)
        assert_the_same_lists(queries, table, 20, exclude, denied(items, 0.2), packed)
        assert_the_same_lists(queries[:1], table, 1, exclude.rows(0, 1), table_bytes=packed)
    if kind == "normal":
        # Of a normal table a list is proven unless more items come close than are looked at: hardly ever.
        fresh = KernelByteTable.pack(table)
        queries = torch.randn(16, 128, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).to(dtype)
        assert assert_the_same_lists(queries, table, 20, table_bytes=fresh) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("d", [4, 50, 64, 256])
@pytest.mark.parametrize("k", [1, 100, 1024])
def test_widths_and_lengths_on_a_gpu(k: int, d: int) -> None:
    table = random_table(300_007, torch.bfloat16, "normal", d)
    assert_the_same_lists(torch.randn(9, d, device=DEVICE).to(table.dtype), table, k)


@pytest.mark.gpu
def test_equal_rows_and_special_queries_on_a_gpu() -> None:
    table = random_table(300_007, torch.bfloat16, "normal")
    table[1000:] = table[1000].clone()
    table[5], table[6] = torch.inf, torch.nan
    queries = torch.randn(6, 128, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).to(table.dtype)
    for row, value in enumerate((0.0, torch.nan, torch.inf, 1e-30, 1e30)):
        queries[row, : 128 if value == 0 else 1] = value
    packed = KernelByteTable.pack(table)
    assert_the_same_lists(queries, table, 20, table_bytes=packed)
    assert_the_same_lists(queries[:1], table, 20, table_bytes=packed)
    asked, fallen = packed.counts.tolist()
    assert asked == 5  # zeros are not counted
    assert fallen >= 2  # NaN and 1e30 have no bound; infinity reaches its own, the first of equals


@pytest.mark.gpu
def test_a_graph_follows_queries_and_catalogue() -> None:
    """And it takes both ways: the bytes' lists where they are proven, the table's where not."""
    table = random_table(300_007, torch.bfloat16, "normal")
    packed = KernelByteTable.pack(table)
    queries = torch.randn(8, 128, device=DEVICE).to(table.dtype)
    exclude = exclusions(8, 300_007, (0, 50))
    out = torch.empty(8, 20, device=DEVICE), torch.empty(8, 20, dtype=torch.int64, device=DEVICE)
    size = workspace_bytes(queries, table, 20, len(exclude.ids), packed)
    workspace = torch.empty(size, dtype=torch.uint8, device=DEVICE)

    def call() -> None:
        score_topk(queries, table, 20, exclude, out=out, workspace=workspace, table_bytes=packed, backend="triton")

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    near = torch.arange(2000, 8000, device=DEVICE)
    for seed in range(3):
        queries.copy_(torch.randn(8, 128, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE))
        changed = near if seed == 2 else torch.tensor([77, 300_007], device=DEVICE)
        table[changed] = 2 * queries[seed]
        packed.refreshed(table, changed)
        packed.counts.zero_()
        out[0].fill_(torch.nan)
        workspace.random_(0, 256)
        graph.replay()
        scores, ids = score_topk(queries, table, 20, exclude, backend="triton")
        assert torch.equal(out[1], ids)
        assert torch.equal(out[0].view(torch.int32), scores.view(torch.int32))
        assert (packed.counts[1] > 0) == (seed == 2)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_million_queries_and_no_wrong_list(
    dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """Three catalogues, a third of a million queries each, of which most are made to be hard."""
    wrong = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    asked = 0
    for kind in ("normal", "tails", "clusters"):
        table = random_table(1 << 18, dtype, kind)
        packed = KernelByteTable.pack(table)
        for seed in range(20834):
            queries = hard_queries(table, packed, 16, seed)
            scores, ids = score_topk(queries, table, 20, table_bytes=packed, backend="triton")
            expected_scores, expected_ids = score_topk(queries, table, 20, backend="triton")
            differ = (ids != expected_ids) | (scores.view(torch.int32) != expected_scores.view(torch.int32))
            wrong += differ.any(1).sum()
            asked += len(queries)
        record_property(f"fallback_share_{kind}", packed.fallback_share)
        assert packed.fallback_share < 1, f"{kind}: no list was proven, so that nothing was tested"
    assert asked >= 1_000_000
    assert wrong.item() == 0
