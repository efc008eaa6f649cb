from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast.metrics import coverage, intra_list_diversity, rank_metrics

few = settings(max_examples=50, deadline=None)
ITEMS = 9
# Lists of distinct or repeated items that may end early.
LISTS = st.lists(
    st.lists(st.integers(1, ITEMS), max_size=5).map(lambda items: items + [0] * (5 - len(items))),
    min_size=1,
    max_size=6,
)


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.lists(st.integers(1, 30), unique=True, max_size=4))
def test_rank_metrics_equal_the_definitions(ranks: list[int], cutoffs: list[int]) -> None:
    got = rank_metrics(torch.tensor(ranks), cutoffs)
    assert set(got) == {f"{name}@{k}" for name in ("HR", "NDCG", "MRR") for k in cutoffs}
    for k in cutoffs:
        gains = {
            # One relevant item: the ideal DCG is 1 / log2(2) = 1.
            "HR": [1.0 if rank <= k else 0.0 for rank in ranks],
            "NDCG": [1 / math.log2(1 + rank) if rank <= k else 0.0 for rank in ranks],
            "MRR": [1 / rank if rank <= k else 0.0 for rank in ranks],
        }
        for name, values in gains.items():
            # 40 sums of fp64 values at most 1, times 100.
            assert got[f"{name}@{k}"] == pytest.approx(100 * sum(values) / len(values), rel=1e-13, abs=1e-13)


def test_rank_metrics_by_hand() -> None:
    got = rank_metrics(torch.tensor([1, 3, 21, 10]), (10, 20))
    assert got["HR@10"] == got["HR@20"] == 75
    assert got["MRR@10"] == pytest.approx(100 * (1 + 1 / 3 + 1 / 10) / 4, rel=1e-15)
    assert got["NDCG@20"] == pytest.approx(100 * (1 + 1 / 2 + 1 / math.log2(11)) / 4, rel=1e-15)
    assert set(rank_metrics(torch.tensor([1]))) == {f"{m}@{k}" for m in ("HR", "NDCG", "MRR") for k in (5, 10, 20)}


def test_rank_metrics_of_nobody() -> None:
    with pytest.raises(ValueError, match="ranks is empty"):
        rank_metrics(torch.tensor([], dtype=torch.int64))


@few
@given(LISTS)
def test_coverage_counts_distinct_items(lists: list[list[int]]) -> None:
    shown = {item for row in lists for item in row if item}
    assert coverage(torch.tensor(lists), ITEMS) == pytest.approx(100 * len(shown) / ITEMS, rel=1e-15)


@few
@given(LISTS, st.integers(0, 2**32))
def test_diversity_equals_loops_over_pairs(lists: list[list[int]], seed: int) -> None:
    embedding = torch.randn(ITEMS + 1, 4, generator=torch.Generator().manual_seed(seed))
    rows = embedding.double().tolist()
    means = []
    for row in lists:
        items = [rows[item] for item in row if item]
        distances = [
            1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            for i, a in enumerate(items)
            for b in items[:i]
        ]
        if distances:
            means.append(sum(distances) / len(distances))
    want = sum(means) / len(means) if means else 0.0
    # fp64 throughout; |sum|^2 - sum of squares cancels values of at most 25: 25 * 1e-16 * some ten roundings.
    assert intra_list_diversity(torch.tensor(lists), embedding) == pytest.approx(want, rel=0, abs=1e-13)


def test_diversity_by_hand() -> None:
    embedding = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert intra_list_diversity(torch.tensor([[1, 2]]), embedding) == pytest.approx(1, abs=1e-15)
    assert intra_list_diversity(torch.tensor([[1, 3]]), embedding) == pytest.approx(2, abs=1e-15)
    assert intra_list_diversity(torch.tensor([[1, 2, 3], [2, 0, 0]]), embedding) == pytest.approx(4 / 3, abs=1e-15)
    assert intra_list_diversity(torch.tensor([[0, 0], [2, 0]]), embedding) == 0


def test_diversity_of_more_users_than_one_part() -> None:
    embedding = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    lists = torch.tensor([[1, 2]] * 2000 + [[1, 3]] * 1000 + [[1, 0]] * 500)
    assert intra_list_diversity(lists, embedding) == pytest.approx((2000 + 2 * 1000) / 3000, rel=1e-12)  # 3000 sums
