"""The kernels of the exact top K, in Triton and in C++, against the reference.

Whole numbers unless a test says otherwise: their inner products are exact in every dtype and order of summation, so
lists are compared for equality, ties included.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from fave_fast.errors import BackendError
from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.byte_table import ByteTable
from fave_fast.ops.registry import why_no_extension, why_no_triton
from fave_fast.ops.score_topk import workspace_bytes

needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
needs_extension = pytest.mark.skipif(why_no_extension() is not None, reason=str(why_no_extension()))
KINDS = [pytest.param(name, marks=needs_triton) for name in ("triton", "parts")]
if not torch.cuda.is_available():
    KINDS += [pytest.param(name, marks=needs_extension) for name in ("cpp", "bytes")]
each_kind = pytest.mark.parametrize("kind", KINDS)

OP_MODULE = import_module("fave_fast.ops.score_topk")  # the package's attribute of this name is the function
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0)

# So narrow that catalogues of a thousand items have spans, and choices go on in memory after the first keys.
NARROW = {
    "scan": {"M": 16, "BN": 32, "BK": 0, "num_warps": 4, "num_stages": 2, "TMA": 0, "PER_SM": 1},
    "finish": {
        "M": 16,
        "R": 32,
        "WIDTH": 32,
        "SLACK": 25,
        "num_warps": 4,
        "BK": 16,
        "REGISTERS": 0,
        "PDL": 0,
    },
    "choose": {"WIDTH": 64, "SLACK": 25, "num_warps": 4, "REGISTERS": 0, "PDL": 0},
    "rescore": {"M": 16, "R": 32, "BK": 16, "PER_SM": 1, "num_warps": 4, "num_stages": 2, "PDL": 0},
    "rank": {"num_warps": 4, "PDL": 0},
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(OP_MODULE, "tile_shapes", lambda op, variant, device: NARROW[variant.split("_")[0]])
    return


@pytest.fixture(autouse=True)
def _short_lists_in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of the kind "parts" take the launches of long ones, whatever their length."""
    if getattr(request.node, "callspec", None) is not None and request.node.callspec.params.get("kind") == "parts":
        monkeypatch.setattr(OP_MODULE, "ONE_PROGRAM_MOST_K", 0)


def whole_numbers(
    batch: int, items: int, d: int, seed: int = 0, spread: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-spread, spread + 1, (batch, d), generator=generator)
    table = torch.randint(-spread, spread + 1, (items + 1, d), generator=generator)
    table[0] = 100  # the padding would win nearly everywhere if it were a candidate
    return queries.to(DEVICE, dtype), table.to(DEVICE, dtype)


def exclusions(batch: int, items: int, lengths: tuple[int, ...], seed: int = 0) -> Exclusions:
    rng = np.random.default_rng(seed)
    # 0 and N + 1 are no items, and ids repeat
    lists = [rng.integers(0, items + 2, rng.choice(lengths)).tolist() for _ in range(batch)]
    return Exclusions.from_lists(lists).to(DEVICE)


def denied(items: int, share: float, seed: int = 0) -> Tensor:
    return (torch.rand(items + 1, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)


def poisoned(
    queries: Tensor, table: Tensor, k: int, exclude: Exclusions | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Outputs that no list holds, and a workspace that someone used."""
    out = (
        torch.full((len(queries), k), torch.nan, device=DEVICE),
        torch.full((len(queries), k), -7, dtype=torch.int64, device=DEVICE),
    )
    size = workspace_bytes(queries, table, k, 0 if exclude is None else len(exclude.ids))
    return out, torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE)


def fast(
    kind: str,
    queries: Tensor,
    table: Tensor,
    k: int,
    exclude: Exclusions | None = None,
    deny: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """By the kernels in Triton, all in parts or only long lists; those in C++; or the latter by the table in bytes."""
    table_bytes = ByteTable.pack(table) if kind == "bytes" else None
    backend = "triton" if kind in ("triton", "parts") else "cpp"
    return score_topk(
        queries, table, k, exclude, deny, out=out, workspace=workspace, table_bytes=table_bytes, backend=backend
    )


def assert_is_the_reference_s(
    lists: tuple[Tensor, Tensor],
    queries: Tensor,
    table: Tensor,
    k: int,
    exclude: Exclusions | None = None,
    deny: Tensor | None = None,
) -> None:
    expected_scores, expected_ids = score_topk(queries, table, k, exclude, deny, backend="reference")
    assert torch.equal(lists[1], expected_ids)
    assert torch.equal(lists[0], expected_scores)


def assert_equals_the_reference(
    queries: Tensor,
    table: Tensor,
    k: int,
    exclude: Exclusions | None = None,
    deny: Tensor | None = None,
    kind: str = "triton",
) -> None:
    out, workspace = poisoned(queries, table, k, exclude)
    scores, ids = fast(kind, queries, table, k, exclude, deny, out=out, workspace=workspace)
    assert (scores.data_ptr(), ids.data_ptr()) == (out[0].data_ptr(), out[1].data_ptr())
    assert_is_the_reference_s((scores, ids), queries, table, k, exclude, deny)


@pytest.mark.parametrize(
    ("batch", "items", "d", "k", "spread"),
    [
        (1, 1, 4, 3, 3),
        (3, 97, 8, 1, 3),
        (2, 97, 5, 20, 0),
        (2, 700, 16, 20, 3),
        (17, 200, 4, 7, 1),
        (1, 60, 33, 100, 3),
    ],
)
@each_kind
def test_lists_equal_the_reference(
    kind: str, narrow: None, batch: int, items: int, d: int, k: int, spread: int
) -> None:
    assert_equals_the_reference(*whole_numbers(batch, items, d, spread=spread), k, kind=kind)


@pytest.mark.parametrize(
    ("batch", "items", "d", "k", "spread"),
    [(2, 700, 16, 100, 3), (1, 300, 8, 400, 3), (3, 300, 5, 65, 1), (1, 1100, 4, 300, 0), (1, 900, 4, 65, 0)],
)
@needs_triton
def test_long_lists_equal_the_reference(narrow: None, batch: int, items: int, d: int, k: int, spread: int) -> None:
    """Of many equals (a spread of 1 or 0) more reach the last place than a buffer holds, the first ones not first."""
    queries, table = whole_numbers(batch, items, d, spread=spread)
    assert OP_MODULE._Plan.make(batch, items, queries, k, 0).cut["parts"] > 0
    assert_equals_the_reference(queries, table, k)
    assert_equals_the_reference(queries, table, k, exclusions(batch, items, (0, 90)), denied(items, 0.2))


@needs_triton
def test_a_long_list_behind_excluded_items(narrow: None) -> None:
    """Most groups are upper bounds only: several programs share groups with excluded ids out among each other."""
    queries, table = whole_numbers(1, 640, 8)
    _, order = score_topk(queries, table, 640, backend="reference")
    exclude = Exclusions(order[0, :250].contiguous(), torch.tensor([0, 250], device=DEVICE))
    assert_equals_the_reference(queries, table, 120, exclude)


@needs_triton
def test_spans_of_a_long_list(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP_MODULE, "ONE_PROGRAM_MOST_K", 9)
    queries, table = whole_numbers(1, 1500, 4)
    assert OP_MODULE._Plan.make(1, 1500, queries, 10, 0).cut["spans"] > 0 or DEVICE.type == "cuda"
    assert_equals_the_reference(queries, table, 10, exclusions(1, 1500, (90,)))


@needs_triton
def test_a_long_list_does_not_depend_on_the_number_of_programs(narrow: None) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, table = torch.randn(6, 32, generator=generator), torch.randn(301, 32, generator=generator)
    queries, table = queries.to(DEVICE), table.to(DEVICE)
    parts = {rows: OP_MODULE._Plan.make(rows, 300, queries, 70, 0).cut["parts"] for rows in (1, 6)}
    assert parts[1] > parts[6] or DEVICE.type == "cuda"
    check_batch_invariance("triton", queries, table, exclusions(6, 300, (0, 10)), (0, 5), k=70)


@needs_triton
def test_only_lists_beyond_the_threshold_take_further_launches() -> None:
    queries, _ = whole_numbers(1, 1, 4)
    short, long = (OP_MODULE._Plan.make(1, 5000, queries, OP_MODULE.ONE_PROGRAM_MOST_K + more, 0) for more in (0, 1))
    assert list(short.lists) == ["finish"]
    assert list(long.lists) == ["choose", "rescore", "rank"]


@pytest.mark.parametrize(("lengths", "share", "spread"), [((0, 3, 150), None, 3), ((400,), 0.3, 1), ((0,), 1.0, 3)])
@each_kind
def test_exclusions_and_a_deny_list(
    kind: str, narrow: None, lengths: tuple[int, ...], share: float | None, spread: int
) -> None:
    queries, table = whole_numbers(2, 700, 8, spread=spread)
    deny = None if share is None else denied(700, share)
    assert_equals_the_reference(queries, table, 20, exclusions(2, 700, lengths), deny, kind=kind)


@needs_triton
def test_spans_of_three_tiles(narrow: None) -> None:
    queries, table = whole_numbers(1, 2000, 4)
    assert OP_MODULE._Plan.make(1, 2000, queries, 20, 0).cut["tiles_of_span"] == 3 or DEVICE.type == "cuda"
    assert_equals_the_reference(queries, table, 20, exclusions(1, 2000, (90,)))


@each_kind
def test_excluding_the_best_items_of_every_group(kind: str, narrow: None) -> None:
    """All groups but one are upper bounds only, and the best of what is left stands behind excluded items."""
    queries, table = whole_numbers(1, 640, 8)
    _, order = score_topk(queries, table, 640, backend="reference")
    exclude = Exclusions(order[0, :300].contiguous(), torch.tensor([0, 300], device=DEVICE))
    assert_equals_the_reference(queries, table, 30, exclude, kind=kind)


@each_kind
def test_every_item_excluded(kind: str, narrow: None) -> None:
    queries, table = whole_numbers(2, 97, 8)
    exclude = Exclusions.from_lists([range(1, 98), [5]]).to(DEVICE)
    scores, ids = fast(kind, queries, table, 4, exclude)
    assert scores[0].eq(-torch.inf).all()
    assert ids[0].eq(0).all()
    assert ids[1].gt(0).all()


@each_kind
def test_all_scores_equal(kind: str, narrow: None) -> None:
    queries, table = whole_numbers(2, 700, 4, spread=0)
    _, ids = fast(kind, queries, table, 50)
    assert torch.equal(ids, torch.arange(1, 51, device=DEVICE).expand(2, 50))


@pytest.mark.parametrize("seed", range(3))
@each_kind
def test_nan_and_infinite_scores(kind: str, narrow: None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, table = whole_numbers(2, 300, 4, seed)
    queries[1] = 0  # half of its products are 0, half are -0
    for row in rng.choice(301, 200, replace=False):
        table[row, 0] = rng.choice(SPECIAL)
    assert_equals_the_reference(queries, table, 40, exclusions(2, 300, (0, 20), seed), kind=kind)
    assert_equals_the_reference(queries, table, 301, kind=kind)
    table[:] = torch.nan
    assert_equals_the_reference(queries, table, 3, kind=kind)


@each_kind
def test_minus_zero_ties_with_zero(kind: str, narrow: None) -> None:
    table = torch.tensor([[9.0], [-0.0], [0.0], [-0.0]], device=DEVICE).repeat_interleave(4, 1)
    assert fast(kind, torch.ones(1, 4, device=DEVICE), table, 3)[1].tolist() == [[1, 2, 3]]


@needs_triton
def test_half_precision_and_the_shipped_shapes() -> None:
    queries, table = whole_numbers(2, 300, 24, dtype=torch.float16)
    assert_equals_the_reference(queries, table, 20, exclusions(2, 300, (40,)), denied(300, 0.1))
    assert_equals_the_reference(queries[:1], table, 70, exclusions(1, 300, (40,)), denied(300, 0.1))


@each_kind
def test_scores_are_as_close_as_pytorchs_and_lists_complete(kind: str, narrow: None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, table = torch.randn(3, 32, generator=generator), torch.randn(701, 32, generator=generator)
    check_floats(kind, queries.to(DEVICE), table.to(DEVICE), 20)


def check_floats(kind: str, queries: Tensor, table: Tensor, k: int) -> None:
    scores, ids = fast(kind, queries, table, k)
    exact = queries.double() @ table[1:].double().T
    if queries.dtype != torch.float32 and queries.is_cuda:
        plain = torch.mm(queries, table[1:].T, out_dtype=torch.float32)
    else:
        plain = (queries.float() @ table[1:].float().T).float()
    bound = 2 * (plain - exact).abs().max()
    assert (scores - exact.gather(1, ids - 1)).abs().max() <= bound
    assert scores.diff(dim=1).le(0).all()
    left_out = exact.scatter(1, ids - 1, -torch.inf).max(dim=1).values
    assert (left_out <= scores[:, -1] + 2 * bound).all()
    assert all(len(set(row)) == k for row in ids.tolist())


@each_kind
def test_a_list_does_not_depend_on_the_batch(kind: str, narrow: None) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, table = torch.randn(6, 32, generator=generator), torch.randn(101, 32, generator=generator)
    check_batch_invariance(kind, queries.to(DEVICE), table.to(DEVICE), exclusions(6, 100, (0, 10)), (0, 5))


def check_batch_invariance(
    kind: str, queries: Tensor, table: Tensor, exclude: Exclusions, rows: tuple[int, ...], k: int = 10
) -> None:
    scores, ids = fast(kind, queries, table, k, exclude)
    again = fast(kind, queries, table, k, exclude)
    assert torch.equal(again[0], scores)
    assert torch.equal(again[1], ids)
    for row in rows:
        alone = fast(kind, queries[row : row + 1], table, k, exclude.rows(row, row + 1))
        assert torch.equal(alone[0], scores[row : row + 1])
        assert torch.equal(alone[1], ids[row : row + 1])


@needs_triton
def test_a_batch_that_needs_more_workspace_goes_in_parts(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP_MODULE, "MAX_WORKSPACE", 0)
    monkeypatch.setattr(OP_MODULE, "ROWS_AT_LEAST", 8)
    assert_equals_the_reference(*whole_numbers(19, 40, 4), 3, exclusions(19, 40, (0, 5)))
    monkeypatch.setattr(OP_MODULE, "ONE_PROGRAM_MOST_K", 2)
    assert_equals_the_reference(*whole_numbers(19, 40, 4), 3, exclusions(19, 40, (0, 5)))


@needs_triton
def test_tensors_that_are_not_contiguous_or_aligned() -> None:
    queries, table = whole_numbers(2, 200, 8, dtype=torch.float16)
    deny = denied(401, 0.3)[::2]
    wide = torch.randint(0, 202, (2, 10), device=DEVICE)
    exclude = Exclusions(wide.T.reshape(-1)[::2], torch.tensor([0, 0, 3, 3, 10], device=DEVICE)[::2])
    assert_equals_the_reference(queries[:, ::2], table[:, 1::2], 20, exclude, deny)
    shifted = torch.empty(table.numel() + 1, dtype=table.dtype, device=DEVICE)[1:].view_as(table).copy_(table)
    assert_equals_the_reference(queries, shifted, 20)


@each_kind
def test_no_rows_and_no_items(kind: str) -> None:
    queries, table = whole_numbers(2, 5, 4)
    assert fast(kind, queries[:0], table, 3)[1].shape == (0, 3)
    assert fast(kind, queries, table[:1], 3)[1].tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(("k", "d", "what"), [(1025, 4, "K up to 1024, not 1025"), (3, 300, "D up to 256, not 300")])
@needs_triton
def test_what_is_beyond_the_kernels_is_refused_by_name_only(k: int, d: int, what: str) -> None:
    queries, table = whole_numbers(1, 5, d)
    with pytest.raises(BackendError, match=what):
        score_topk(queries, table, k, backend="triton")
    assert score_topk(queries, table, k)[1].shape == (1, k)


@needs_triton
def test_buffers_that_do_not_fit_are_refused() -> None:
    queries, table = whole_numbers(2, 5, 4)
    scores, ids = torch.empty(2, 3, device=DEVICE), torch.empty(2, 3, dtype=torch.int64, device=DEVICE)
    for out in ((scores[:1], ids), (scores, ids.int()), (scores.double(), ids), (scores, ids.T.contiguous().T)):
        with pytest.raises(ValueError, match=r"out's (scores|ids) are"):
            score_topk(queries, table, 3, out=out)
    with pytest.raises(ValueError, match=r"workspace is torch.uint8 \[8\]"):
        score_topk(queries, table, 3, workspace=ids.new_empty(8, dtype=torch.uint8), backend="triton")


@needs_triton
def test_the_reference_writes_where_it_is_told() -> None:
    queries, table = whole_numbers(2, 50, 4)
    out, _ = poisoned(queries, table, 3)
    got = score_topk(queries, table, 3, out=out, backend="reference")
    assert got[0] is out[0]
    assert torch.equal(out[1], score_topk(queries, table, 3, backend="reference")[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "items"), [(3, 12_101), (132, 1_000_003)])
def test_random_floats(batch: int, items: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, table = torch.randn(batch, 128, generator=generator), torch.randn(items + 1, 128, generator=generator)
    queries, table = queries.to(DEVICE, dtype), table.to(DEVICE, dtype)
    for k in (20, 300):
        check_floats("triton", queries, table, k)
        check_batch_invariance("triton", queries, table, exclusions(batch, items, (0, 50)), (0, batch - 1), k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [3, 130])
def test_both_kernels_form_the_same_bits(batch: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(batch, 128, generator=generator).to(DEVICE, dtype)
    table = torch.randn(1009, 128, generator=generator).to(DEVICE, dtype)
    out, workspace = poisoned(queries, table, 1008)
    scores, ids = score_topk(queries, table, 1008, out=out, workspace=workspace, backend="triton")
    plan = OP_MODULE._Plan.make(batch, 1008, queries, 1008, 0)
    maxima = plan.buffers(workspace)["group_max"].view(batch, -1)[:, : 1008 // plan.cut["group"]]
    by_id = torch.empty_like(scores).scatter_(1, ids - 1, scores)
    assert torch.equal(by_id.view(batch, -1, plan.cut["group"]).amax(2), maxima)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [20, 200])
def test_graph_replay_follows_its_inputs_and_allocates_nothing(k: int) -> None:
    queries, table = whole_numbers(70, 100_003, 128, dtype=torch.bfloat16)
    exclude = exclusions(70, 100_003, (0, 50))
    out, workspace = poisoned(queries, table, k, exclude)

    def call() -> None:
        score_topk(queries, table, k, exclude, out=out, workspace=workspace, backend="triton")

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in (1, 2):
        fresh, _ = whole_numbers(70, 1, 128, seed=seed, dtype=torch.bfloat16)
        queries.copy_(fresh)
        out[0].fill_(torch.nan)
        workspace.random_(0, 256)
        graph.replay()
        expected = score_topk(queries, table, k, exclude, backend="reference")
        assert torch.equal(out[0], expected[0])
        assert torch.equal(out[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("items", [1, 97, 1682, 12_101, 1_000_003])
@pytest.mark.parametrize("batch", [1, 2, 3, 63, 132, 513])
def test_the_matrix_of_sizes(batch: int, items: int) -> None:
    assert_equals_the_reference(*whole_numbers(batch, items, 128, dtype=torch.bfloat16), 20)
    queries, table = whole_numbers(batch, items, 128, spread=1, dtype=torch.bfloat16)
    exclude, deny = exclusions(batch, items, (0, 50, 700)), denied(items, 0.2)
    assert_equals_the_reference(queries, table, 20, exclude, deny)
    assert_equals_the_reference(queries, table, 200, exclude, deny)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 100, 1024])
@pytest.mark.parametrize("items", [97, 12_101, 1_000_003])
@pytest.mark.parametrize("batch", [3, 132, 513])
def test_other_lengths_of_lists(batch: int, items: int, k: int) -> None:
    assert_equals_the_reference(*whole_numbers(batch, items, 128, dtype=torch.bfloat16), k)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [4, 50, 64, 256])
@pytest.mark.parametrize("k", [20, 200])
def test_dtypes_and_widths(dtype: torch.dtype, d: int, k: int) -> None:
    queries, table = whole_numbers(70, 12_101, d, dtype=dtype)
    assert_equals_the_reference(queries, table, k, exclusions(70, 12_101, (0, 50)))
    assert_equals_the_reference(queries[:3], table, k, deny=denied(12_101, 0.2))


@pytest.mark.gpu
@pytest.mark.slow
def test_a_table_of_more_than_2_to_the_31_elements() -> None:
    items = 17_000_000
    table = torch.randint(-3, 4, (items + 1, 128), dtype=torch.int8, device=DEVICE).to(torch.bfloat16)
    assert table.numel() > 1 << 31
    queries, _ = whole_numbers(3, 1, 128, dtype=torch.bfloat16)
    table[-1] = queries[0] * 2  # the very last item leads the first list
    for k in (20, 100):
        assert_equals_the_reference(queries, table, k, exclusions(3, items, (50,)))
    assert score_topk(queries, table, 1, backend="triton")[1][0].item() == items
