"""The catalogue ops against a full sort in NumPy.

Embeddings are small whole numbers unless a test says otherwise: their inner products are exact in every dtype and tile,
so results are compared for equality, and ties abound.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast.errors import BackendError, InputError
from fave_fast.ops import OPS, Exclusions, rank_count, score_topk
from fave_fast.ops import registry as registry_module
from fave_fast.ops.registry import Implementation, Op, why_no_extension

needs_extension = pytest.mark.skipif(why_no_extension() is not None, reason=str(why_no_extension()))
each_count = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_extension)])
property_test = settings(max_examples=50, deadline=None)

SPECIAL = (float("nan"), float("inf"), float("-inf"))


@dataclass
class Case:
    queries: torch.Tensor
    table: torch.Tensor
    targets: torch.Tensor
    excluded: list[list[int]]
    deny: torch.Tensor
    tile: int | None
    k: int


@st.composite
def cases(draw: st.DrawFn, special: bool = False) -> Case:
    """Sizes, tiles and K are drawn; the numbers come from a drawn seed. `special` puts NaN and infinities in."""
    batch, n, d = draw(st.integers(1, 6)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.integers(0, 3))
    queries = rng.integers(-spread, spread + 1, (batch, d)).astype(np.float32)
    table = rng.integers(-spread, spread + 1, (n + 1, d)).astype(np.float32)
    table[0] = 100.0  # the padding would win nearly everywhere if it were a candidate
    if special:
        for row in rng.choice(n + 1, size=min(n, 5), replace=False):
            table[row] = rng.choice(SPECIAL)
    return Case(
        torch.from_numpy(queries),
        torch.from_numpy(table),
        torch.from_numpy(rng.integers(1, n + 1, batch)),
        # 0 and n + 1 are no items and must be passed over; ids repeat
        [rng.integers(0, n + 2, rng.integers(0, n + 1) * rng.integers(0, 2)).tolist() for _ in range(batch)],
        torch.from_numpy(rng.random(n + 1) < draw(st.sampled_from([0.0, 0.3, 1.0]))),
        draw(st.sampled_from([None, 1, 7, n, n + 3])),
        draw(st.integers(1, n + 5)),
    )


def ordered(case: Case) -> list[list[tuple[float, int]]]:
    """For each row all items as (score, id), best first: a full sort, NaN as -inf."""
    with np.errstate(invalid="ignore"):
        scores = (case.queries.numpy()[:, None, :] * case.table.numpy()[None]).sum(-1)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    return [sorted(((float(s), i) for i, s in enumerate(row) if i > 0), key=lambda e: (-e[0], e[1])) for row in scores]


def expected_ranks(case: Case) -> list[int]:
    ranks = []
    for entries, target, excluded in zip(ordered(case), case.targets.tolist(), case.excluded, strict=True):
        left = [i for _, i in entries if i == target or i not in excluded]
        ranks.append(left.index(target) + 1)
    return ranks


def expected_topk(case: Case) -> tuple[list[list[float]], list[list[int]]]:
    scores, ids = [], []
    for entries, excluded in zip(ordered(case), case.excluded, strict=True):
        left = [(s, i) for s, i in entries if i not in excluded and not case.deny[i] and s > -np.inf][: case.k]
        left += [(-np.inf, 0)] * (case.k - len(left))
        scores.append([s for s, _ in left])
        ids.append([i for _, i in left])
    return scores, ids


@each_count
@property_test
@given(case=cases())
def test_rank_count_equals_a_full_sort(backend: str, case: Case) -> None:
    exclude = Exclusions.from_lists(case.excluded)
    ranks = rank_count(case.queries, case.table, case.targets, exclude, tile=case.tile, backend=backend)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == expected_ranks(case)


@each_count
@property_test
@given(case=cases(special=True))
def test_rank_count_takes_nan_as_minus_infinity(backend: str, case: Case) -> None:
    exclude = Exclusions.from_lists(case.excluded)
    ranks = rank_count(case.queries, case.table, case.targets, exclude, tile=case.tile, backend=backend)
    assert ranks.tolist() == expected_ranks(case)


@property_test
@given(case=cases(), special=st.booleans(), data=st.data())
def test_score_topk_equals_a_full_sort(case: Case, special: bool, data: st.DataObject) -> None:
    case = data.draw(cases(special=True)) if special else case
    exclude = Exclusions.from_lists(case.excluded)
    scores, ids = score_topk(case.queries, case.table, case.k, exclude, case.deny, tile=case.tile)
    assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert (scores.tolist(), ids.tolist()) == expected_topk(case)


def test_a_diverged_model_still_gets_ranks_and_an_empty_list() -> None:
    queries, table = torch.full((2, 3), torch.nan), torch.ones(6, 3)
    assert rank_count(queries, table, torch.tensor([1, 4])).tolist() == [1, 4]
    scores, ids = score_topk(queries, table, 3)
    assert scores.eq(-torch.inf).all()
    assert ids.eq(0).all()


@each_count
def test_equal_embeddings_tie_on_the_numbers_computed(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(64, 128, generator=generator)
    table = torch.randn(1, 128, generator=generator).repeat(257, 1)
    targets = torch.arange(1, 65)
    # Three tiles of one width: a matrix product may round its last columns otherwise, so equal items tie for certain
    # only where they stand alike; column c of tile t is item 1 + c + 64 t.
    alike = torch.cat([queries.new_zeros(1, 128), torch.randn(64, 128, generator=generator).repeat(3, 1)])
    ranks = rank_count(queries, alike, targets, tile=64, backend=backend)
    twin = rank_count(queries, alike, targets + 64, tile=64, backend=backend)
    assert (twin - ranks).eq(1).all()
    assert rank_count(queries[:1], table, targets[:1], tile=1, backend=backend).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_rank_and_list_alike(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # 0..15 in 64 dimensions: sums up to 14400 need more bits than bf16 (8) or fp16 (11) have, and float32 holds them.
    queries = torch.randint(0, 16, (4, 64), generator=generator).float()
    table = torch.randint(0, 16, (301, 64), generator=generator).float()
    targets = torch.tensor([1, 50, 150, 300])
    expected = rank_count(queries, table, targets)
    assert torch.equal(rank_count(queries.to(dtype), table.to(dtype), targets), expected)
    scores, ids = score_topk(queries.to(dtype), table.to(dtype), 20)
    assert torch.equal(scores, score_topk(queries, table, 20)[0])
    assert torch.equal(ids, score_topk(queries, table, 20)[1])


def test_rank_and_list_agree() -> None:
    generator = torch.Generator().manual_seed(2)
    queries, table = torch.randn(8, 16, generator=generator), torch.randn(501, 16, generator=generator)
    _, ids = score_topk(queries, table, 10)
    for place in range(10):
        assert rank_count(queries, table, ids[:, place].contiguous()).tolist() == [place + 1] * 8


def test_inputs_are_left_as_they_are() -> None:
    queries, table = torch.randn(3, 4), torch.randn(20, 4)
    before = queries.clone(), table.clone()
    exclude = Exclusions.from_lists([[1, 2], [], [3]])
    rank_count(queries, table, torch.tensor([1, 2, 3]), exclude)
    score_topk(queries, table, 5, exclude, torch.zeros(20, dtype=torch.bool))
    assert torch.equal(queries, before[0])
    assert torch.equal(table, before[1])


def test_no_rows_and_no_items() -> None:
    assert rank_count(torch.ones(0, 2), torch.ones(4, 2), torch.ones(0, dtype=torch.int64)).shape == (0,)
    assert score_topk(torch.ones(0, 2), torch.ones(4, 2), 2)[1].shape == (0, 2)
    assert score_topk(torch.ones(2, 2), torch.ones(1, 2), 3)[1].tolist() == [[0, 0, 0]] * 2


@pytest.mark.gpu
@property_test
@given(case=cases())
def test_the_gpu_gives_the_same(case: Case) -> None:
    exclude = Exclusions.from_lists(case.excluded).to("cuda")
    queries, table = case.queries.cuda(), case.table.cuda()
    assert rank_count(queries, table, case.targets.cuda(), exclude, tile=case.tile).tolist() == expected_ranks(case)
    scores, ids = score_topk(queries, table, case.k, exclude, case.deny.cuda(), tile=case.tile)
    assert (scores.tolist(), ids.tolist()) == expected_topk(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_stay_in_float32_on_the_gpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randint(0, 16, (4, 64), generator=generator).float()
    table = torch.randint(0, 16, (301, 64), generator=generator).float()
    scores, ids = score_topk(queries.to("cuda", dtype), table.to("cuda", dtype), 20)
    expected = score_topk(queries, table, 20)
    assert torch.equal(scores.cpu(), expected[0])
    assert torch.equal(ids.cpu(), expected[1])


GOOD = {"queries": torch.ones(2, 3), "table": torch.ones(5, 3), "targets": torch.tensor([1, 4])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(2, 4)}, r"queries \[2, 4\] and table \[5, 3\]"),
        ({"table": torch.ones(0, 3)}, r"table \[0, 3\]"),
        ({"queries": torch.ones(2, 3, dtype=torch.float64)}, "expected one floating-point dtype"),
        ({"targets": torch.tensor([1])}, r"targets are torch.int64 \[1\]"),
        ({"targets": torch.tensor([1, 2], dtype=torch.int32)}, "targets are torch.int32"),
        ({"targets": torch.tensor([0, 1])}, "expected ids from 1 to 4"),
        ({"targets": torch.tensor([1, 5])}, "expected ids from 1 to 4"),
        ({"exclude": Exclusions.from_lists([[1]])}, "exclude has 1 rows"),
        ({"tile": 0}, "tile is 0"),
    ],
)
def test_rank_count_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_count(**{**GOOD, **change})  # type: ignore[arg-type]


def test_score_topk_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        score_topk(GOOD["queries"], GOOD["table"], 0)
    for deny in (torch.zeros(4, dtype=torch.bool), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"deny is .* expected bool \[5\]"):
            score_topk(GOOD["queries"], GOOD["table"], 1, deny=deny)


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        (torch.tensor([1.0]), torch.tensor([0, 1]), "ids is torch.float32"),
        (torch.tensor([1]), torch.tensor([[0, 1]]), "offsets is torch.int64"),
        (torch.tensor([1]), torch.empty(0, dtype=torch.int64), "offsets is empty"),
        (torch.tensor([1, 2]), torch.tensor([0, 1]), "do not rise"),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), "do not rise"),
        (torch.tensor([1, 2]), torch.tensor([0, 3, 2]), "do not rise"),
    ],
)
def test_exclusions_refuse_what_is_no_csr(ids: torch.Tensor, offsets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Exclusions(ids, offsets)


def test_rows_of_exclusions() -> None:
    lists = [[3, 1], [], [2], [5, 5]]
    part = Exclusions.from_lists(lists).rows(1, 4)
    assert (part.ids.tolist(), part.offsets.tolist(), len(part)) == ([2, 5, 5], [0, 0, 1, 3], 3)
    assert len(Exclusions.from_lists([])) == 0
    with pytest.raises(ValueError, match="rows 3 to 5"):
        Exclusions.from_lists(lists).rows(3, 5)


def test_a_backend_that_is_not_offered_is_an_input_error() -> None:
    with pytest.raises(BackendError, match=r"unknown backend: 'fast'; .* auto, .*cpp, reference") as caught:
        rank_count(**GOOD, backend="fast")
    assert isinstance(caught.value, InputError)
    with pytest.raises(BackendError, match=r"score_topk: .*expected one of auto, .*reference"):
        score_topk(GOOD["queries"], GOOD["table"], 1, backend="fast")


def test_only_auto_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return "out of order"

    op = Op("probe", (Implementation("triton", lambda: "triton", why_not), Implementation("reference", lambda: "ref")))
    where = (torch.device("cuda"), torch.float32)
    registry_module._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "fave_fast.ops.registry"):
        assert [op.resolve("auto", *where)() for _ in range(3)] == ["ref"] * 3
        op.resolve("auto", torch.device("cpu"), torch.float32)  # whose backend it is not: nothing to say
        with pytest.raises(BackendError, match="probe: backend 'triton' cannot run: out of order"):
            op.resolve("triton", *where)
    assert [record.getMessage() for record in caplog.records] == ["probe: backend triton passed over: out of order"]


def test_auto_leaves_out_what_is_meant_to_be_named_and_the_environment_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(device: torch.device, dtype: torch.dtype) -> str | None:
        return "for tests"

    named = Implementation("triton", lambda: "triton", why_not_auto=never)
    op = Op("probe", (named, Implementation("reference", lambda: "ref")))
    where = (torch.device("cpu"), torch.float32)
    monkeypatch.delenv("FAVE_FAST_BACKEND", raising=False)
    assert op.resolve("auto", *where)() == "ref"
    assert op.resolve("triton", *where)() == "triton"
    monkeypatch.setenv("FAVE_FAST_BACKEND", "triton")
    assert op.resolve("auto", *where)() == "triton"
    assert op.resolve("reference", *where)() == "ref"
    monkeypatch.setenv("FAVE_FAST_BACKEND", "cpp")
    with pytest.raises(BackendError, match=r"probe: no such backend for this op: 'cpp' \(from FAVE_FAST_BACKEND\)"):
        op.resolve("auto", *where)


@pytest.mark.parametrize(
    ("interpreted", "device", "dtype", "reason"),
    [
        ("1", "cpu", torch.float32, None),
        ("0", "cpu", torch.float32, "its kernels run on CUDA devices, and the tensors are on cpu"),
        ("1", "meta", torch.float32, "its kernels run on NVIDIA GPUs, and the tensors are on meta"),
    ],
)
def test_where_triton_kernels_run(
    monkeypatch: pytest.MonkeyPatch, interpreted: str, device: str, dtype: torch.dtype, reason: str | None
) -> None:
    monkeypatch.setattr(registry_module, "why_no_triton", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert registry_module.triton_kernels(torch.device(device), dtype) == reason


def test_without_triton_its_kernels_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "why_no_triton", lambda: "Triton cannot be imported (x)")
    assert registry_module.triton_kernels(torch.device("cuda"), torch.float32) == "Triton cannot be imported (x)"


def test_the_extension_is_refused_off_the_cpu() -> None:
    (op,) = (op for op in OPS if op.name == "rank_count")
    assert "tensors are on cuda" in str(op.refusals(torch.device("cuda"))["cpp"])
    assert op.refusals(torch.device("cuda"))["reference"] is None


@needs_extension
def test_the_extension_adds_to_counts_over_strided_rows_and_threads() -> None:
    from fave_fast import _C

    rng = np.random.default_rng(0)
    wide = rng.integers(0, 50, (9, 70_000)).astype(np.float32)
    scores, first_id = wide[:, 3:60_003], 11  # enough columns for several threads
    targets = rng.integers(0, 60_030, 9)
    level = rng.integers(0, 50, 9).astype(np.float32)
    ids = np.arange(first_id, first_id + scores.shape[1])
    before = (scores > level[:, None]) | ((scores == level[:, None]) & (ids < targets[:, None]))
    expected = 5 + (before & (ids != targets[:, None])).sum(1)
    for threads in (1, 4):
        counts = np.full(9, 5)
        _C.rank_count(scores, first_id, level, targets, counts, threads)
        np.testing.assert_array_equal(counts, expected)


@needs_extension
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": np.zeros((2, 5))}, TypeError, "scores"),
        ({"counts": np.zeros(2, np.int32)}, TypeError, "counts"),
        ({"scores": np.zeros(5, np.float32)}, ValueError, "two dimensions"),
        ({"scores": np.zeros((5, 2), np.float32).T}, ValueError, "a row of scores must be contiguous"),
        ({"target_ids": np.zeros(3, np.int64)}, ValueError, r"target_ids must have shape \[2\]"),
        ({"counts": np.zeros(4, np.int64)[::2]}, ValueError, "counts must be contiguous"),
    ],
)
def test_the_extension_refuses_arrays_it_cannot_read(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    from fave_fast import _C

    good = {
        "scores": np.zeros((2, 5), np.float32),
        "first_id": 1,
        "target_scores": np.zeros(2, np.float32),
        "target_ids": np.zeros(2, np.int64),
        "counts": np.zeros(2, np.int64),
    }
    with pytest.raises(error, match=message):
        _C.rank_count(**{**good, **change})  # type: ignore[arg-type]
