from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast.config import DataConfig
from fave_fast.data import Interactions, Split, split, training_popularity
from fave_fast.errors import ConfigError
from fave_fast.synthetic import Planted, PlantedConfig, best_hit_rate, generate

few = settings(max_examples=50, deadline=None)
SMALL = PlantedConfig(users=20000, items=24, interests=4, min_length=3, max_length=6, neighbours=2, successors=2)
K = 4


@st.composite
def configs(draw: st.DrawFn) -> PlantedConfig:
    interests = draw(st.integers(2, 5))
    items = draw(st.integers(4 * interests, 40))
    neighbours = draw(st.integers(1, interests - 1))
    return PlantedConfig(
        users=draw(st.integers(1, 12)),
        items=items,
        interests=interests,
        min_length=4,  # leave-one-out then leaves a training window
        max_length=draw(st.integers(4, items // interests * (1 + neighbours))),
        stay=draw(st.floats(0.05, 0.95)),
        recall=draw(st.floats(0, 0.9)),
        successors=draw(st.integers(1, 3)),
        decay=draw(st.floats(0.1, 1)),
        background=draw(st.floats(0.05, 1)),
        neighbours=neighbours,
        bridge=draw(st.floats(0, 0.9)),
        skew=draw(st.floats(0, 2)),
    )


SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def small() -> tuple[Planted, Interactions, Split]:
    planted, data = generate(SMALL, 7)
    return planted, data, split(data, DataConfig())


@few
@given(configs(), SEEDS)
def test_probabilities_sum_to_one_and_leave_out_seen_items(config: PlantedConfig, seed: int) -> None:
    planted, data = generate(config, seed)
    history = data.history(seed % config.users)
    for n in range(min(len(history), config.max_length - 1) + 1):
        p = planted.next_probabilities(history[:n])
        assert p.shape == (config.items + 1,)
        assert p.dtype == np.float64
        assert p.min() >= 0
        # N + 1 quotients with one rounding each, and as many additions: an error of at most 2 (N + 1) eps.
        assert abs(p.sum() - 1) <= 2 * len(p) * np.finfo(np.float64).eps
        assert not p[0]
        assert not p[history[:n]].any()
        if n < len(history):
            assert p[history[n]] > 0


@few
@given(configs(), SEEDS)
def test_data_are_well_formed_and_nobody_meets_an_item_twice(config: PlantedConfig, seed: int) -> None:
    _, data = generate(config, seed)
    lengths = np.diff(data.offsets)
    assert data.num_users == config.users
    assert data.num_items == config.items
    assert data.items.dtype == np.int32
    assert data.offsets[-1] == len(data.items)
    assert lengths.min() >= config.min_length
    assert lengths.max() <= config.max_length
    assert data.name == "synthetic"
    assert data.item_ids.ids == list(range(1, config.items + 1))
    for user in range(config.users):
        items = data.history(user)
        assert len(set(items.tolist())) == len(items)
        assert items.min() >= 1
        assert items.max() <= config.items


def by_the_words(planted: Planted, history: list[int]) -> dict[int, float]:
    """p(next | history), item by item, from the module's docstring."""
    c = planted.config
    preference = [c.decay**rank for rank in range(c.successors)]
    result = dict.fromkeys(range(1, c.items + 1), 0.0)
    for source, weight in ((history[-1], 1 - c.recall), (history[-2], c.recall)):
        group = planted.groups[source]
        near = planted.neighbours[group].tolist()
        followers = planted.successors[source].tolist()
        for item in result:
            p = 0.0
            if planted.groups[item] == group:
                p += c.stay * c.background * planted.popularity[item]
                if item in followers:
                    p += c.stay * (1 - c.background) * preference[followers.index(item)] / sum(preference)
            elif planted.groups[item] in near:
                bridge = planted.bridges[source][near.index(planted.groups[item])]
                into = c.bridge * (item == bridge) + (1 - c.bridge) * planted.popularity[item]
                p += (1 - c.stay) / c.neighbours * into
            result[item] += weight * p
    left = {item: p for item, p in result.items() if item not in history}
    return {item: p / sum(left.values()) for item, p in left.items()}


@few
@given(configs(), SEEDS)
def test_probabilities_are_what_the_docstring_says(config: PlantedConfig, seed: int) -> None:
    planted, data = generate(config, seed)
    history = data.history(0)[: config.max_length - 1]
    found = planted.next_probabilities(history)
    # Sums and products of positive numbers, fewer than 4 N + 20 roundings on either side.
    bound = (8 * config.items + 40) * np.finfo(np.float64).eps
    for item, p in by_the_words(planted, history.tolist()).items():
        assert found[item] == pytest.approx(p, rel=bound)


def test_popularity_and_structure_keep_to_their_groups() -> None:
    planted, _ = generate(replace(SMALL, items=26), 3)
    sizes = np.bincount(planted.groups[1:])
    assert sorted(sizes.tolist()) == [6, 6, 7, 7]
    # Up to 7 quotients with one rounding each, and their sum.
    np.testing.assert_allclose(np.bincount(planted.groups[1:], planted.popularity[1:]), 1, rtol=14 * 2**-52)
    for item in range(1, 27):
        group = planted.groups[item]
        assert set(planted.groups[planted.successors[item]]) == {group}
        assert item not in planted.successors[item]
        assert planted.groups[planted.bridges[item]].tolist() == planted.neighbours[group].tolist()
        assert group not in planted.neighbours[group]


def test_next_items_occur_as_often_as_the_probabilities_say(small: tuple[Planted, Interactions, Split]) -> None:
    planted, data, _ = small
    after: dict[tuple[int, ...], Counter[int]] = {}
    for user in range(data.num_users):
        items = data.history(user).tolist()
        for n in range(3):
            after.setdefault(tuple(items[:n]), Counter())[items[n]] += 1
    statistic = mean = variance = 0.0
    for history, counts in after.items():
        p = planted.next_probabilities(np.array(history, dtype=np.int32))
        n, cells = counts.total(), np.flatnonzero(p)
        assert set(counts) <= set(cells.tolist())
        observed = np.array([counts[item] for item in cells.tolist()])
        statistic += float(((observed - n * p[cells]) ** 2 / (n * p[cells])).sum())
        # Pearson's statistic of a multinomial with m cells, exactly, however small they are: mean m - 1, variance
        # 2 (m - 1) + (sum of 1 / p - m^2 - 2 m + 2) / n. Given how often each history occurs, they are uncorrelated.
        m = len(cells)
        mean += m - 1
        variance += 2 * (m - 1) + ((1 / p[cells]).sum() - m * m - 2 * m + 2) / n
    # A sum of hundreds of statistics, so near normal: five standard deviations are passed once in 1.7 million seeds.
    assert abs(statistic - mean) <= 5 * math.sqrt(variance)


def test_lengths_do_not_depend_on_items(small: tuple[Planted, Interactions, Split]) -> None:
    _, data, _ = small
    counts = np.bincount(np.diff(data.offsets))[3:]
    # Binomial(U, 1/4): five standard deviations.
    assert np.all(np.abs(counts - data.num_users / 4) <= 5 * math.sqrt(data.num_users * 3 / 16))


def test_same_seed_same_data_and_another_seed_other_data() -> None:
    config = replace(SMALL, users=50)
    (one, a), (two, b), (other, c) = (generate(config, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.items, b.items)
    np.testing.assert_array_equal(a.offsets, b.offsets)
    np.testing.assert_array_equal(one.transitions, two.transitions)
    assert not np.array_equal(one.transitions, other.transitions)
    assert not np.array_equal(a.items, c.items)


def histories(data: Interactions, parts: Split) -> list[np.ndarray]:
    users = np.searchsorted(data.offsets, parts.test, side="right") - 1
    return [data.items[data.offsets[user] : at] for user, at in zip(users, parts.test, strict=True)]


def test_best_hit_rate_is_the_mean_of_the_largest_probabilities(small: tuple[Planted, Interactions, Split]) -> None:
    planted, data, parts = small
    # More users than are worked on at a time; the last part is not full.
    sums = [np.sort(planted.next_probabilities(history))[-K:].sum() for history in histories(data, parts)]
    # Both sum 20,000 values of at most 1, with one rounding each, after N roundings a row.
    bound = 2 * (len(sums) + 2 * SMALL.items) * np.finfo(np.float64).eps
    assert best_hit_rate(planted, data, parts, K) == pytest.approx(100 * np.mean(sums), rel=bound)
    assert best_hit_rate(planted, data, parts, SMALL.items) == pytest.approx(100, rel=bound)


def test_the_oracle_gets_what_is_promised_and_popularity_less(small: tuple[Planted, Interactions, Split]) -> None:
    planted, data, parts = small
    popularity = training_popularity(data, parts)
    oracle = popular = 0
    expected = 0.0
    for history, target in zip(histories(data, parts), data.items[parts.test], strict=True):
        p = planted.next_probabilities(history)
        candidates = popularity.copy()
        candidates[history] = -1
        others = np.argsort(-candidates)[:K]
        oracle += target in np.argsort(-p)[:K]
        popular += target in others
        expected += p[others].sum()
    users = len(parts.test)
    best = best_hit_rate(planted, data, parts, K)
    # Given the histories, hits are independent and 0 or 1: by Hoeffding's inequality the mean of U of them strays this
    # far with a probability below 2 exp(-2 U bound^2) = 1e-6.
    bound = 100 * math.sqrt(math.log(2e6) / (2 * users))
    assert abs(100 * oracle / users - best) <= bound
    assert abs(100 * popular / users - 100 * expected / users) <= bound
    assert 100 * expected / users < best - bound


@few
@given(configs(), SEEDS, st.integers(1, 6))
def test_no_list_expects_more_than_the_best(config: PlantedConfig, seed: int, k: int) -> None:
    planted, data = generate(config, seed)
    parts = split(data, DataConfig())
    rng = np.random.default_rng(seed)
    sums = []
    for history in histories(data, parts):
        chosen = rng.choice(config.items, size=min(k, config.items), replace=False) + 1
        sums.append(planted.next_probabilities(history)[chosen].sum())
    # Roundings as above: they may lift a list that is itself the best.
    slack = 1 + 2 * (len(sums) + 2 * config.items) * np.finfo(np.float64).eps
    assert 100 * np.mean(sums) <= best_hit_rate(planted, data, parts, k) * slack


def test_the_defaults_leave_something_to_learn() -> None:
    planted, data = generate(PlantedConfig(), 0)
    parts = split(data, DataConfig())
    best = best_hit_rate(planted, data, parts, 20)
    popularity = training_popularity(data, parts)
    popular = np.mean([np.isin(t, np.argsort(-popularity)[:20]) for t in data.items[parts.test]])
    assert 60 <= best <= 85
    assert 100 * popular < best / 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("users", 0),
        ("items", 19),
        ("interests", 1),
        ("min_length", 2),
        ("min_length", 31),
        ("max_length", 10**6),
        ("stay", 0.0),
        ("stay", 1.0),
        ("stay", math.nan),
        ("recall", 1.0),
        ("recall", -0.1),
        ("successors", 0),
        ("successors", 400),
        ("decay", 0.0),
        ("decay", 1.1),
        ("background", 0.0),
        ("background", 1.1),
        ("neighbours", 0),
        ("neighbours", 400),
        ("bridge", 1.0),
        ("skew", -1.0),
        ("skew", math.inf),
    ],
)
def test_bad_values_are_refused(field: str, value: float) -> None:
    # Histories that are too long or begin too late are named as max_length's fault, as both bounds are its range.
    name = "max_length" if (field, value) == ("min_length", 31) else field
    with pytest.raises(ConfigError, match=rf"synthetic\.{name} is .*; expected |synthetic\.items is 19; expected"):
        replace(PlantedConfig(), **{field: value})


def test_bad_histories_and_cutoffs_are_refused(small: tuple[Planted, Interactions, Split]) -> None:
    planted, data, parts = small
    for history in ([0], [25], [[1, 2]]):
        with pytest.raises(ValueError, match="expected a flat array of items from 1 to 24"):
            planted.next_probabilities(np.array(history))
    with pytest.raises(ValueError, match="history of 24 items"):
        planted.next_probabilities(np.arange(1, 25))
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        best_hit_rate(planted, data, parts, 0)
