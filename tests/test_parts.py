"""A request that no graph holds, in parts for several: where it is cut, and what its callers get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fave_fast import checkpoint as checkpoints
from fave_fast.engine import Recommender
from fave_fast.graphs import (
    BATCHES,
    ENCODERS,
    CapturedStep,
    Floats,
    Histories,
    Ints,
    Step,
    StepGraphs,
    items_held,
    parts_of,
    smallest_batch,
)


def of_lengths(lengths: Sequence[int]) -> Histories:
    """Histories whose items are all different."""
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return Histories(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets)


def one_encoder(users: int) -> str:
    return "triton"


def hoppers_encoders(users: int) -> str:
    """As `auto` has on Hopper."""
    return next(backend for most, backend in ENCODERS if users <= most)


def holds(batch: int, lengths: Sequence[int]) -> bool:
    return len(lengths) <= batch and sum(lengths) <= items_held(batch)


def fewest(lengths: Sequence[int], batch: int) -> int | None:
    """Of all ways to cut, the fewest parts that the graph of `batch` holds."""
    counts: list[int | None] = [0]
    for end in range(1, len(lengths) + 1):
        before = [counts[begin] for begin in range(end) if holds(batch, lengths[begin:end])]
        counts.append(min((count + 1 for count in before if count is not None), default=None))
    return counts[-1]


@given(
    # Graphs of up to 12 histories hold 1,152 to 2,560 items: either may be what is too many.
    lengths=st.lists(st.integers(1, 100) | st.integers(400, 1800), min_size=1, max_size=40),
    sizes=st.sets(st.integers(1, 12), min_size=1),
    small=st.integers(0, 12),
)
@example(lengths=[2560, 1, 2560], sizes={12}, small=0)
@example(lengths=[2561], sizes={12}, small=0)
@example(lengths=[1] * 13, sizes={1, 12}, small=1)
@example(lengths=[1] * 13, sizes={1, 2}, small=2)
def test_parts_are_the_fewest_that_graphs_of_the_same_encoder_hold(
    lengths: list[int], sizes: set[int], small: int
) -> None:
    def encoder(users: int) -> str:
        return "cpp" if users <= small else "triton"

    histories, batches = of_lengths(lengths), sorted(sizes)
    usable = [batch for batch in batches if encoder(batch) == encoder(len(lengths))]
    parts = parts_of(histories.offsets, batches, encoder)
    if parts is None:
        assert usable == [] or max(lengths) > items_held(usable[-1])
        return
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == len(lengths)
    assert len(parts) == fewest(lengths, usable[-1])
    for part in parts:
        inside = lengths[part.begin : part.end]
        assert part.batch == min(batch for batch in usable if holds(batch, inside))
        ids, offsets = part.cut(histories)
        assert np.diff(offsets).tolist() == inside
        assert (offsets[0], offsets[-1]) == (0, len(ids))
    np.testing.assert_array_equal(np.concatenate([part.cut(histories).ids for part in parts]), histories.ids)


@given(users=st.integers(1, 600), items=st.integers(1, 50_000))
@example(users=64, items=items_held(64))
@example(users=64, items=items_held(64) + 1)
@example(users=1, items=items_held(512))
@example(users=1, items=items_held(512) + 1)
def test_the_smallest_batch_is_the_first_that_holds_a_request(users: int, items: int) -> None:
    expected = next((batch for batch in BATCHES if users <= batch and items <= items_held(batch)), None)
    assert smallest_batch(BATCHES, users, items) == expected


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([50] * 700, [(512, 0, 512), (256, 512, 700)]),
        ([50] * 2000, [(512, 0, 512), (512, 512, 1024), (512, 1024, 1536), (512, 1536, 2000)]),
        ([106] * 512, [(512, 0, 357), (256, 357, 512)]),  # as many items as in ML-100k
        ([50] * 514, [(512, 0, 512), (2, 512, 514)]),
        ([106] * 64, [(64, 0, 64)]),
        ([37_888, 1, 37_888], [(512, 0, 1), (1, 1, 2), (512, 2, 3)]),
        ([1, 37_889], None),
    ],
)
def test_what_is_captured_by_default(lengths: list[int], expected: list[tuple[int, int, int]] | None) -> None:
    assert parts_of(of_lengths(lengths).offsets, BATCHES, one_encoder) == expected


def test_the_rest_of_a_large_request_keeps_its_encoder() -> None:
    assert parts_of(of_lengths([50] * 514).offsets, BATCHES, hoppers_encoders) == [(512, 0, 512), (512, 512, 514)]
    assert parts_of(of_lengths([50] * 514).offsets, (1, 8), hoppers_encoders) is None


def test_a_small_request_that_is_cut_keeps_its_encoder() -> None:
    """Together these are for the small batches' encoder, whose graphs hold none of them."""
    assert parts_of(of_lengths([5000] * 8).offsets, BATCHES, hoppers_encoders) is None
    assert parts_of(of_lengths([5000] * 8).offsets, BATCHES, one_encoder) == [(512, 0, 7), (32, 7, 8)]


class Echo(CapturedStep):
    """In a graph's place: lists that say which items a history has, and how many."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def run(self, histories: Histories, exclude: bool) -> tuple[Floats, Ints]:
        assert holds(self.batch, np.diff(histories.offsets).tolist())
        starts, ends = histories.offsets[:-1], histories.offsets[1:]
        items = np.stack((histories.ids[starts], histories.ids[ends - 1], ends - starts), 1).astype(np.int64)
        return -items.astype(np.float32), items


class EchoGraphs(StepGraphs):
    def __init__(self, step: Step) -> None:
        self.k, self.batches, self._step = 3, BATCHES, step
        self._captured = {batch: Echo(batch) for batch in BATCHES}


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([3, 1], {"captured": 1}),
        ([1 + at % 60 for at in range(700)], {"captured": 2}),
        ([20_000, 7, 20_000, 1], {"captured": 2}),
        ([40_000], {"more histories or items than captured": 1}),
    ],
)
def test_a_caller_sees_one_request(
    lengths: list[int], batches: dict[str, int], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = Recommender(checkpoints.load(tiny_checkpoint))
    monkeypatch.setattr(recommender, "_on_gpu", True)
    monkeypatch.setattr(recommender, "_graphs", EchoGraphs(recommender._step(recommender.config.flow.seed)))
    ids, offsets = of_lengths(lengths)
    if "captured" in batches:
        scores, items = recommender.best_items(ids, offsets, 2)
        expected = np.stack((offsets[:-1] + 1, offsets[1:]), 1)
        np.testing.assert_array_equal(items, expected)
        np.testing.assert_array_equal(scores, -expected)
        assert (scores.dtype, items.dtype) == (np.float32, np.int64)
    else:
        recommender.best_items(1 + ids % 24, offsets, 2)
    assert recommender.batches == batches
