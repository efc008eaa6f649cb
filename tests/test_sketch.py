"""A history's sketch against its definition, term by term in float64, and what its noise is."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fave_fast.ops import Exclusions
from fave_fast.sketch import HistorySketch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HISTORIES = [[3, 1, 3], [], [9], [40, 7, 2, 41, 0, -1, 12], [5, 5]]  # repeated, empty, outside the catalogue


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(embedding: Tensor, endpoint: Tensor, own: set[int], k: int) -> dict[int, float]:
    """w_i of a history's items, as the module's docstring says it."""
    scores = [float(row @ endpoint) for row in embedding[1:]]
    mean = math.fsum(scores) / len(scores)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))
    high = mean + NormalDist().inv_cdf(1 - k / (len(scores) + 1)) * deviation
    return {item: max(0.0, scores[item - 1] - high) for item in own}


@settings(deadline=None)  # the first example pays for PyTorch's first sums
@given(
    st.lists(st.lists(st.integers(-1, 32), max_size=9), min_size=1, max_size=5),
    st.integers(1, 31),
    st.sampled_from([1, 5, 16]),
    st.integers(0, 5),
)
def test_queries_are_the_definition(histories: list[list[int]], k: int, channels: int, seed: int) -> None:
    """Up to rounding: sums of some tens of terms of order 1 to 10 lose far less than 1e-11."""
    embedding, endpoints = drawn(32, 6, seed=seed), drawn(len(histories), 6, seed=seed + 1)
    sketch = HistorySketch.of(embedding, channels, k, seed)
    codes = sketch.table[:, 6:]
    found = sketch.queries(endpoints, Exclusions.from_lists(histories))
    assert torch.equal(sketch.table[:, :6], embedding)
    assert torch.equal(found[:, :6], endpoints)
    for row, history in enumerate(histories):
        own = {item for item in history if 1 <= item <= 31}
        expected = torch.zeros(channels, dtype=torch.float64)
        for item, weight in weights(embedding, endpoints[row], own, k).items():
            expected -= weight * codes[item]
        torch.testing.assert_close(found[row, 6:], expected, rtol=0, atol=1e-11)


def test_one_own_item_comes_down_to_the_level_and_no_further() -> None:
    """A code's product with itself is 1: what is above loses all that it is above by."""
    embedding, endpoint = drawn(2000, 8), drawn(1, 8, seed=1)
    sketch = HistorySketch.of(embedding, 64, k=20)
    scores = embedding[1:] @ endpoint[0]
    high = scores.mean() + sketch.level * scores.std(correction=0)
    best, worst = int(scores.argmax()) + 1, int(scores.argmin()) + 1
    for item, expected in ((best, high), (worst, scores.min())):
        query = sketch.queries(endpoint, Exclusions.from_lists([[item]]))
        torch.testing.assert_close(query[0] @ sketch.table[item], expected, rtol=0, atol=1e-11)
    assert scores.max() > high


def test_the_level_is_where_the_kth_of_normal_scores_is() -> None:
    """64 queries' counts above it are nearly binomial, mean and variance K; their mean's deviation is sqrt(K / 64)."""
    k, embedding = 20, drawn(10_001, 64)
    sketch = HistorySketch.of(embedding, 1, k)
    scores = drawn(64, 64, seed=1) @ embedding[1:].T
    high = scores.mean(1) + sketch.level * scores.std(1, correction=0)
    above = float((scores > high[:, None]).double().sum(1).mean())
    assert abs(above - k) < 5 * math.sqrt(k / 64)


@pytest.mark.parametrize("channels", [16, 100, 128])
def test_codes_have_length_1_and_products_of_variance_1_over_r(channels: int) -> None:
    """A product is a mean of R signs. Its square has mean 1 / R and variance below 2 / R^2; pairs are uncorrelated."""
    items = 600
    codes = HistorySketch.of(drawn(items + 1, 4), channels).table[1:, 4:]
    products = codes @ codes.T
    torch.testing.assert_close(products.diagonal(), torch.ones(items, dtype=torch.float64), rtol=0, atol=1e-12)
    pairs = products[tuple(torch.triu_indices(items, items, 1))]
    assert abs(float(pairs.mean())) < 5 / math.sqrt(channels * len(pairs))
    assert abs(float(pairs.square().mean()) * channels - 1) < 5 * math.sqrt(2 / len(pairs))


def test_a_longer_catalogue_keeps_its_codes() -> None:
    embedding = drawn(300, 4)
    short, long, other = (
        HistorySketch.of(one, 24, seed=seed) for one, seed in ((embedding[:130], 1), (embedding, 1), (embedding, 2))
    )
    assert torch.equal(short.table, long.table[:130])
    assert not torch.equal(long.table, other.table)
    assert not long.table[0, 4:].any(), "padding has no code"


def test_items_that_are_gone_count_for_nothing() -> None:
    embedding = drawn(41, 6)
    present = torch.tensor([one for one in range(41) if one not in (7, 12)])
    endpoints, histories = drawn(len(HISTORIES), 6, seed=1), Exclusions.from_lists(HISTORIES)
    gone = embedding.clone()
    gone[[7, 12]] = torch.nan
    sketch, without = HistorySketch.of(gone), HistorySketch.of(embedding[present])
    torch.testing.assert_close(sketch.mean, without.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(sketch.covariance, without.covariance, rtol=0, atol=1e-14)
    assert sketch.level == without.level
    left = [[item for item in history if item not in (7, 12)] for history in HISTORIES]
    found = sketch.queries(endpoints, histories)
    assert torch.equal(found, sketch.queries(endpoints, Exclusions.from_lists(left)))
    assert found.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_a_dtype_and_on_a_device(device: str, dtype: torch.dtype) -> None:
    """Against float64 of the same numbers.

    A channel sums n weights below W, each times 1 / sqrt(R). With u half the dtype's eps, rounding the weights and n
    partial sums loses at most (n + 2) u of n W / sqrt(R). A weight loses 2^-23 of W for each of its 32 products and
    of the 500 rows in the moments.
    """
    embedding, endpoints = drawn(501, 32).to(dtype), drawn(len(HISTORIES), 32, seed=1).to(dtype)
    histories = Exclusions.from_lists(HISTORIES)
    exact = HistorySketch.of(embedding.double(), 64).queries(endpoints.double(), histories)
    found = HistorySketch.of(embedding.to(device), 64).queries(endpoints.to(device), histories.to(device))
    assert found.dtype == dtype
    assert found.device.type == device
    most, n = float((endpoints.double() @ embedding.double().T).abs().max()), max(map(len, HISTORIES))
    bound = n * most * ((n + 2) * torch.finfo(dtype).eps / 2 + (32 + 500) * 2**-23) / math.sqrt(64)
    assert float((found.cpu().double() - exact).abs().max()) < bound


def test_histories_by_numbers_of_32_bits() -> None:
    """As the engine has them."""
    sketch, endpoints, histories = (
        HistorySketch.of(drawn(41, 6)),
        drawn(len(HISTORIES), 6),
        Exclusions.from_lists(HISTORIES),
    )
    narrow = Exclusions(histories.ids.int(), histories.offsets.int())
    assert torch.equal(sketch.queries(endpoints, narrow), sketch.queries(endpoints, histories))


def test_histories_longer_than_what_is_gathered_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, endpoints, histories = drawn(41, 6), drawn(len(HISTORIES), 6), Exclusions.from_lists(HISTORIES)
    whole = HistorySketch.of(embedding).queries(endpoints, histories)
    monkeypatch.setattr("fave_fast.sketch._PAIRS", 2)
    torch.testing.assert_close(HistorySketch.of(embedding).queries(endpoints, histories), whole, rtol=0, atol=1e-12)


def test_one_item_or_no_query() -> None:
    sketch = HistorySketch.of(drawn(2, 4), 8)
    assert sketch.queries(drawn(1, 4), Exclusions.from_lists([[1]])).isfinite().all()
    assert sketch.queries(drawn(0, 4), Exclusions.from_lists([])).shape == (0, 12)


def test_what_cannot_be_sketched_is_named() -> None:
    for rows, channels, k, message in (
        (1, 8, 20, "the number of items is 0"),
        (5, 0, 20, "channels is 0"),
        (5, 8, 0, "k is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HistorySketch.of(drawn(rows, 4), channels, k)
    sketch, histories = HistorySketch.of(drawn(5, 4), 8), Exclusions.from_lists([[1], [2]])
    with pytest.raises(ValueError, match=r"float64 \[1, 4\] on cpu; expected torch.float64 \[2, 4\] on cpu"):
        sketch.queries(drawn(1, 4), histories)
    with pytest.raises(ValueError, match=r"float32 \[2, 4\] on cpu; expected torch.float64"):
        sketch.queries(drawn(2, 4).float(), histories)
