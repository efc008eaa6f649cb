"""The one step captured as CUDA graphs: the bits of the uncaptured one, whatever else is asked meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from fave_fast.checkpoint import Checkpoint
from fave_fast.config import Config, FlowConfig, ModelConfig
from fave_fast.data import IdMap
from fave_fast.engine import Recommender
from fave_fast.graphs import BATCHES, ENCODERS, Histories, Step, items_held
from fave_fast.model import FAVE

pytestmark = pytest.mark.gpu
ITEMS = 3000
LENGTHS = [1, 50, 9, 8, 120, 16, 17, 33, 2, 64]  # two longer than the model reads


def checkpoint(**flow: Any) -> Checkpoint:
    torch.manual_seed(0)
    config = replace(Config(), model=ModelConfig(delta=0.3), flow=FlowConfig(**flow))
    weights = FAVE(config.model, ITEMS).state_dict()
    weights["item_embedding.weight"] *= 20  # peaked attention
    none = torch.zeros(0, dtype=torch.int64)
    popularity = torch.arange(ITEMS + 1)
    ids = IdMap.from_ids(range(1, ITEMS + 1))
    return Checkpoint(config, weights, ids, IdMap.from_ids([]), popularity, {}, none, none, none.new_zeros(1))


def recommender(backend: str = "auto", table_bytes: bool = False, **flow: Any) -> Recommender:
    return Recommender(checkpoint(**flow), device="cuda", dtype="bf16", backend=backend, table_bytes=table_bytes)


def histories(count: int, seed: int = 0) -> Histories:
    source = np.random.default_rng(seed)
    lengths = source.permutation(np.resize(LENGTHS, count))
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return Histories(source.integers(1, ITEMS + 1, offsets[-1], dtype=np.int32), offsets)


def of_length(length: int, count: int) -> Histories:
    offsets = np.arange(count + 1, dtype=np.int64) * length
    return Histories(np.random.default_rng(0).integers(1, ITEMS + 1, offsets[-1], dtype=np.int32), offsets)


def one(some: Histories, user: int) -> Histories:
    start, end = some.offsets[user : user + 2]
    return Histories(some.ids[start:end], np.array([0, end - start]))


@pytest.fixture(scope="module")
def warm() -> Recommender:
    result = recommender("triton")
    result.warmup()
    return result


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63, 132, 133, 512])
@pytest.mark.parametrize("exclude", [True, False])
def test_captured_is_uncaptured(warm: Recommender, count: int, exclude: bool) -> None:
    some = histories(count)
    got = warm.best_items(*some, 20, exclude)
    assert warm.batches["captured"] > 0
    want = recommender("triton").best_items(*some, 20, exclude)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("some", "graphs"),
    [
        pytest.param(histories(513), 2, id="513"),
        pytest.param(histories(700), 2, id="700"),
        pytest.param(histories(2000), 4, id="2000"),
        pytest.param(of_length(106, 512), 2, id="512 of 106 items"),
    ],
)
@pytest.mark.parametrize("exclude", [True, False])
def test_what_no_graph_holds_is_uncaptured_in_several(
    warm: Recommender, some: Histories, graphs: int, exclude: bool
) -> None:
    before = Counter(warm.batches)
    got = warm.best_items(*some, 20, exclude)
    assert warm.batches - before == {"captured": graphs}
    want = recommender("triton").best_items(*some, 20, exclude)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_parts_take_the_encoder_of_the_whole() -> None:
    """By default the last two histories alone would be for another kernel, whose last bits differ."""
    served = recommender()
    served.warmup()
    some = histories(BATCHES[-1] + 2)
    got = served.best_items(*some)
    assert served.batches == {"captured": 2}
    for mine, other in zip(got, recommender().best_items(*some), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_list_is_the_same_in_any_batch(warm: Recommender) -> None:
    some = histories(300)
    scores, items = warm.best_items(*some)
    for user in (0, 1, 4, 150, 299):
        alone = warm.best_items(*one(some, user))
        np.testing.assert_array_equal(alone[0][0], scores[user])
        np.testing.assert_array_equal(alone[1][0], items[user])
    again = warm.best_items(*some)
    np.testing.assert_array_equal(again[1], items)


@pytest.mark.parametrize("batch", [8, 64, 512])
def test_small_batches_by_the_fastest_kernel_agree_within_rounding(batch: int) -> None:
    """By default few histories may take another kernel than many do; its scores differ by its rounding."""
    fast, fixed = recommender(), recommender("triton")
    fast.warmup()
    some = histories(batch)
    scores, items = fast.best_items(*some)
    assert fast.batches == {"captured": 1}
    half = batch // 2 + 1  # by the same kernel
    assert len({next(name for most, name in ENCODERS if users <= most) for users in (half, batch)}) == 1
    again = fast.best_items(some.ids[: some.offsets[half]], some.offsets[: half + 1])
    np.testing.assert_array_equal(again[0], scores[:half])
    np.testing.assert_array_equal(again[1], items[:half])
    # Endpoints are rounded to bf16 (2^-9 of their size each way) and differ by the networks' own rounding, some eight
    # times that (tests/test_encoder.py bounds it); a score is an inner product of them.
    want = fixed.best_items(*some)[0]
    np.testing.assert_allclose(scores, want, atol=2**-5 * np.abs(want).max())


def test_excluded_items_never_appear(warm: Recommender) -> None:
    some = histories(512, seed=3)
    _, items = warm.best_items(*some)
    for user in range(512):
        seen = some.ids[some.offsets[user] : some.offsets[user + 1]]
        assert not np.isin(items[user], seen).any()
        assert len(set(items[user].tolist())) == 20


def test_what_no_graph_holds_is_counted(warm: Recommender) -> None:
    some = histories(3)
    ids = some.ids[: some.offsets[1]].tolist()
    before = dict(warm.batches)
    first = warm.best_items(*some, 20)
    longer = warm.best_items(*some, 30)
    np.testing.assert_array_equal(longer[1][:, :20], first[1])
    shorter = warm.best_items(*some, 5)
    np.testing.assert_array_equal(shorter[1], first[1][:, :5])
    denied = warm.recommend([ids], deny=[int(first[1][0, 0])])[0]
    assert denied.items == longer[1][0, 1:21].tolist()
    warm.recommend([ids], seed=5)
    most = items_held(BATCHES[-1])
    long = np.resize(some.ids[: some.offsets[1]], most + 1)
    large = Histories(np.concatenate((long, some.ids)), np.concatenate(([0], len(long) + some.offsets)))
    np.testing.assert_array_equal(warm.best_items(*large)[1][1:], first[1])
    new = {reason: count - before.get(reason, 0) for reason, count in warm.batches.items()}
    assert new == {
        "captured": 2,
        "k above the captured one": 1,
        "denied items": 1,
        "samples or a seed of its own": 1,
        "more histories or items than captured": 1,
    }


def test_nothing_is_allocated_after_warm_up(warm: Recommender) -> None:
    warm.best_items(*histories(64))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for count in BATCHES:
        warm.best_items(*histories(count))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("table_bytes", [False, True])
def test_items_come_and_go_without_a_new_capture(table_bytes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("fave_fast.ops.score_topk"), "BYTES_LEAST_ITEMS", 1)
    served, plain = recommender("triton", table_bytes), recommender("triton")
    rows = torch.randn(3, 128)
    for each in (served, plain):
        each.add_items([5000], rows[:1])  # the table moves, and has room from now on
    served.warmup()
    graphs = served._graphs
    some = histories(9)
    for change in (
        lambda each: each.add_items([5001, 7], rows[1:]),
        lambda each: each.remove_items([5000, 8]),
        lambda each: each.swap(replace(checkpoint(), weights={k: 1.1 * v for k, v in checkpoint().weights.items()})),
    ):
        for each in (served, plain):
            change(each)
        for mine, other in zip(served.best_items(*some), plain.best_items(*some), strict=True):
            np.testing.assert_array_equal(mine, other)
    assert served._graphs is graphs
    served.add_items(range(10_000, 12_000), torch.randn(2000, 128))  # more than there is room for
    assert served._graphs is not graphs
    served.best_items(*some)
    assert set(served.batches) == {"captured"}
    assert served._bytes is None or served._bytes.counts[0] > 0


def test_graphs_take_memory_on_their_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free on another stream may still be read there, by kernels that another thread has launched."""
    streams, plan = [], Step.plan

    def noted(step: Step, users: int) -> Any:
        streams.append(torch.cuda.current_stream())
        return plan(step, users)

    monkeypatch.setattr(Step, "plan", noted)
    served = recommender()
    served.warmup(batches=(1, 256))
    assert served._graphs is not None
    assert streams
    assert set(streams) == {served._graphs._stream}


def test_graphs_keep_what_they_write_alive() -> None:
    """A capture gives unused memory back; what an earlier graph writes must not be part of it."""
    served = recommender()
    served.warmup(batches=(256, 512))
    some = histories(512, seed=7)
    want = served.best_items(*some)
    torch.cuda.empty_cache()
    # As much as there is room for in the smallest blocks, which is where a freed plan's memory went.
    taken = [torch.full((1 << 10,), -1, dtype=torch.int32, device="cuda") for _ in range(4096)]
    got = served.best_items(*some)
    torch.cuda.synchronize()
    assert all(np.array_equal(mine, other) for mine, other in zip(got, want, strict=True))
    assert all(bool((block == -1).all()) for block in taken)


def test_many_callers_get_their_own_lists(warm: Recommender) -> None:
    asked = [histories(count, seed=count) for count in (1, 3, 8, 40, 200, 600)]  # the last by two graphs
    want = [warm.best_items(*some) for some in asked]
    wrong: list[int] = []

    def ask(first: int) -> None:
        for at in range(60):
            which = (first + at) % len(asked)
            got = warm.best_items(*asked[which])
            if not all(np.array_equal(mine, other) for mine, other in zip(got, want[which], strict=True)):
                wrong.append(which)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("flow", [{"prior": "gaussian"}, {"anchor_at_inference": "uniform", "rho": 0.5}])
def test_every_prior(flow: dict[str, Any]) -> None:
    served = recommender("triton", **flow)
    served.warmup(batches=(4,))
    some = histories(4)
    want = recommender("triton", **flow).best_items(*some)
    np.testing.assert_array_equal(served.best_items(*some)[1], want[1])
