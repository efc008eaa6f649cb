from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast.config import DataConfig
from fave_fast.data import (
    IdMap,
    Interactions,
    Split,
    Windows,
    drop_repeats,
    gather_histories,
    history_exclusions,
    k_core,
    load_interactions,
    split,
    training_popularity,
)
from fave_fast.errors import CheckpointError, DataError

few = settings(max_examples=50, deadline=None)
INT64 = st.integers(-(2**63), 2**63 - 1)
# Texts that UTF-8 can hold, and texts that look like numbers without being canonical ones.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4),
    st.sampled_from(["01", "+1", "-0", " 1", "1.0", "9223372036854775808", "٣", "é", "e\u0301", "\U0001f600", "1\n"]),
)
SEQUENCES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), min_size=1, max_size=8)


def flat(sequences: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    items = np.array([item for sequence in sequences for item in sequence], dtype=np.int32)
    return items, np.cumsum([0, *map(len, sequences)], dtype=np.int64)


def dataset(sequences: list[list[int]], times: list[list[float]] | None = None) -> Interactions:
    items, offsets = flat(sequences)
    return Interactions(
        items=items,
        offsets=offsets,
        item_ids=IdMap.from_ids(range(1, 7)),
        user_ids=IdMap.from_ids(range(len(sequences))),
        times=None if times is None else np.array([time for row in times for time in row]),
        name="toy",
        decisions=(),
    )


# ids


@few
@given(st.lists(st.one_of(INT64, TEXTS), max_size=12))
def test_id_map_finds_each_id_and_survives_tensors(ids: list[int | str]) -> None:
    table = IdMap.from_ids(ids)
    positions = table.index(ids)
    assert [str(table.id_at(position)) for position in positions] == [str(value) for value in ids]
    assert len(table) == len({str(value) for value in ids})
    assert IdMap.from_ids(list(reversed(ids))) == table
    assert IdMap.from_tensors(table.to_tensors()) == table
    assert table.take(np.arange(len(table))) == table.ids


@few
@given(st.lists(INT64, min_size=1, max_size=12))
def test_numbers_are_kept_as_numbers_and_sorted_by_value(ids: list[int]) -> None:
    for form in (ids, [str(value) for value in ids], np.array(ids)):
        table = IdMap.from_ids(form)
        assert table.ids == sorted(set(ids))
        np.testing.assert_array_equal(table.index(form), [sorted(set(ids)).index(value) for value in ids])


@pytest.mark.parametrize("ids", [[5, 7, 8], [-(2**63), 3 - 2**63], [2**63 - 4, 2**63 - 1], [0]])
def test_numbers_that_lie_close_are_found_and_no_others(ids: list[int]) -> None:
    """Differences beyond 64 bits among them."""
    asked = list(range(-12, 13))
    asked += [edge + step for edge, sign in ((-(2**63), 1), (2**63 - 1, -1)) for step in range(0, 6 * sign, sign)]
    expected = [ids.index(value) if value in ids else -1 for value in asked]
    np.testing.assert_array_equal(IdMap.from_ids(ids).index(asked), expected)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([10, "9", 8.0, np.int32(7), np.float64(6)], [6, 7, 8, 9, 10]),
        (["10", "9", "a"], ["10", "9", "a"]),
        ([1, "01"], ["01", "1"]),
        (["-0", "0"], ["-0", "0"]),
        ([2**63, 1], ["1", "9223372036854775808"]),
        (["\U0001f600", "\uffff"], ["\uffff", "\U0001f600"]),
        ([], []),
    ],
)
def test_canonical_ids(ids: list[object], kept: list[int | str]) -> None:
    assert IdMap.from_ids(ids).ids == kept


def test_one_id_in_three_spellings() -> None:
    for table in (IdMap.from_ids([12, 13]), IdMap.from_ids([12, "x"])):
        np.testing.assert_array_equal(
            table.index(["12", 12, 12.0, "012", "12.0", 99, 2**70]), [0, 0, 0, -1, -1, -1, -1]
        )
    np.testing.assert_array_equal(IdMap.from_ids([]).index([1, 2]), [-1, -1])


@pytest.mark.parametrize("bad", [True, 1.5, None, "", float("nan"), float("inf"), [1], b"x", np.bool_(True)])
def test_what_cannot_be_an_id_is_refused(bad: object) -> None:
    with pytest.raises(DataError, match="expected a whole number or a text"):
        IdMap.from_ids([1, bad])
    with pytest.raises(DataError, match="expected a whole number or a text"):
        IdMap.from_ids([1]).index([bad])


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match="UTF-8"):
        IdMap.from_ids(["\ud800"])


def test_id_map_loads_with_weights_only(tmp_path: Path) -> None:
    for table in (IdMap.from_ids([3, 1]), IdMap.from_ids(["é", "z"])):
        torch.save(table.to_tensors(), tmp_path / "ids.pt")
        assert IdMap.from_tensors(torch.load(tmp_path / "ids.pt", weights_only=True)) == table


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"ints": torch.tensor([2, 1])},
        {"ints": torch.tensor([1, 1])},
        {"ints": torch.tensor([1.0])},
        {"ints": torch.tensor([[1]])},
        {"ints": torch.tensor([1]), "more": torch.tensor([1])},
        {"utf8": torch.tensor([97], dtype=torch.uint8)},
        {"utf8": torch.tensor([97, 98], dtype=torch.uint8), "offsets": torch.tensor([0, 1])},
        {"utf8": torch.tensor([97, 98], dtype=torch.uint8), "offsets": torch.tensor([0, 2, 1, 2])},
        {"utf8": torch.tensor([97, 98], dtype=torch.uint8), "offsets": torch.tensor([-1, 2])},
        {"utf8": torch.tensor([], dtype=torch.uint8), "offsets": torch.tensor([], dtype=torch.int64)},
        {"utf8": torch.tensor([98, 97], dtype=torch.uint8), "offsets": torch.tensor([0, 1, 2])},
        {"utf8": torch.tensor([255], dtype=torch.uint8), "offsets": torch.tensor([0, 1])},
        {"utf8": torch.tensor([0xC3, 0xA9], dtype=torch.uint8), "offsets": torch.tensor([0, 1, 2])},
    ],
)
def test_damaged_id_tensors_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match="id map"):
        IdMap.from_tensors(tensors)


# filters


@few
@given(SEQUENCES, st.integers(1, 4))
def test_k_core_equals_removing_one_by_one(sequences: list[list[int]], k: int) -> None:
    rows = [(user, item) for user, sequence in enumerate(sequences) for item in sequence]
    left = list(range(len(rows)))
    while True:
        poor = next(
            (at for at in left for side in (0, 1) if sum(rows[b][side] == rows[at][side] for b in left) < k), None
        )
        if poor is None:
            break
        left.remove(poor)
    np.testing.assert_array_equal(np.flatnonzero(k_core(*flat(sequences), k)), left)


@few
@given(SEQUENCES)
def test_drop_repeats_keeps_first_meetings(sequences: list[list[int]]) -> None:
    expected = [item not in sequence[:at] for sequence in sequences for at, item in enumerate(sequence)]
    np.testing.assert_array_equal(drop_repeats(*flat(sequences)), expected)


# windows and batches


@few
@given(SEQUENCES, st.data())
def test_windows_enumerate_every_history_and_target(sequences: list[list[int]], data: st.DataObject) -> None:
    items, offsets = flat(sequences)
    ends = np.array([data.draw(st.integers(0, len(sequence))) for sequence in sequences])
    windows = Windows(offsets, offsets[:-1] + ends)
    starts, targets = windows.positions(np.arange(len(windows)))
    found = [(items[a:b].tolist(), int(items[b])) for a, b in zip(starts, targets, strict=True)]
    assert found == [
        (sequence[:at], sequence[at]) for sequence, end in zip(sequences, ends, strict=True) for at in range(1, end)
    ]
    order = np.array(data.draw(st.permutations(range(len(windows)))), dtype=np.int64)
    np.testing.assert_array_equal(windows.positions(order)[1], targets[order])


@few
@given(SEQUENCES, st.integers(1, 12), st.data())
def test_batches_equal_naive_padding(sequences: list[list[int]], length: int, data: st.DataObject) -> None:
    items, _ = flat(sequences)
    pairs = st.tuples(st.integers(0, len(items)), st.integers(0, len(items))).map(sorted)
    bounds = np.array(data.draw(st.lists(pairs, max_size=6)), dtype=np.int64).reshape(-1, 2)
    rows = [items[a:b].tolist() for a, b in bounds]
    width = max([1, *(min(len(row), length) for row in rows)])
    padded = [[0] * (width - len(row[-length:])) + row[-length:] for row in rows]
    histories = gather_histories(items, bounds[:, 0], bounds[:, 1], length)
    assert histories.dtype == np.int64
    assert histories.shape == (len(rows), width)
    assert histories.tolist() == padded
    ids, offsets = history_exclusions(items, bounds[:, 0], bounds[:, 1])
    assert (ids.dtype, offsets.dtype) == (np.int64, np.int64)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == rows


# splits


@few
@given(SEQUENCES)
def test_leave_one_out_equals_naive(sequences: list[list[int]]) -> None:
    data = dataset(sequences)
    if not any(len(sequence) >= 4 for sequence in sequences):
        if not any(len(sequence) == 3 for sequence in sequences):
            with pytest.raises(DataError, match="expected longer histories"):
                split(data, DataConfig())
        return
    result = split(data, DataConfig())
    train, val, test, popularity = [], [], [], np.zeros(7, dtype=np.int64)
    for start, sequence in zip(data.offsets, sequences, strict=False):
        end = len(sequence) - 2 if len(sequence) >= 3 else len(sequence)
        train.append(start + end)
        popularity += np.bincount(sequence[:end], minlength=7)
        if len(sequence) >= 3:
            val.append(start + len(sequence) - 2)
            test.append(start + len(sequence) - 1)
    check(result, train, val, test)
    np.testing.assert_array_equal(training_popularity(data, result), popularity)
    short = sum(len(sequence) < 3 for sequence in sequences)
    assert any(words.startswith(f"{short} users with fewer than 3") for words in result.decisions) == (short > 0)
    unseen = int((popularity[1:] == 0).sum())
    assert any(words.startswith(f"{unseen} of 6 items never seen") for words in result.decisions) == (unseen > 0)


def check(result: Split, train: list[int], val: list[int], test: list[int]) -> None:
    np.testing.assert_array_equal(result.train_end, train)
    np.testing.assert_array_equal(result.val, val)
    np.testing.assert_array_equal(result.test, test)


@few
@given(SEQUENCES, st.sampled_from([0.1, 0.25, 0.4]), st.sampled_from([0.1, 0.3, 0.5]), st.data())
def test_global_time_equals_naive(sequences: list[list[int]], val: float, test: float, data: st.DataObject) -> None:
    draw = {n: st.lists(st.integers(0, 12), min_size=n, max_size=n).map(sorted) for n in range(1, 10)}
    times = [data.draw(draw[len(sequence)]) for sequence in sequences]
    ordered = sorted(time for row in times for time in row)
    first = ordered[-max(1, round(len(ordered) * (val + test)))]
    second = ordered[-max(1, round(len(ordered) * test))]
    train: list[int] = []
    found: dict[int, list[int]] = {first: [], second: []}
    windows = start = 0
    for row in times:
        train.append(start + sum(time < first for time in row))
        windows += max(train[-1] - start - 1, 0)
        for low, high in ((first, second), (second, 13)):
            inside = [at for at, time in enumerate(row) if low <= time < high]
            if inside and inside[0] > 0:
                found[low].append(start + inside[0])
        start += len(row)
    config = DataConfig(split="global-time", val_fraction=val, test_fraction=test)
    if first == second or not (windows and found[first] and found[second]):
        with pytest.raises(DataError, match="the split leaves no"):
            split(dataset(sequences, times), config)
        return
    result = split(dataset(sequences, times), config)
    check(result, train, found[first], found[second])
    missing = len(sequences) - len(found[second])
    assert any(words == f"{missing} of {len(sequences)} users without a test target" for words in result.decisions) == (
        missing > 0
    )


def test_global_time_by_hand() -> None:
    times = [[1, 2, 3, 8], [1, 4, 9, 10], [8, 9, 9, 10], [5, 6, 7, 8]]
    data = dataset([[1, 2, 3, 4]] * 4, times)
    result = split(data, DataConfig(split="global-time", val_fraction=0.25, test_fraction=0.25))
    # Of 16 stamps the last 8 begin at the first 8 and the last 4 at a 9, of which there are three: all five are test.
    check(result, [3, 6, 8, 15], [3, 15], [6, 9])
    assert "up to 9" in result.description


def test_global_time_needs_times() -> None:
    with pytest.raises(DataError, match="no timestamps were kept"):
        split(dataset([[1, 2, 3, 4]]), DataConfig(split="global-time"))


# benchmark data


def baseline_ranks(data: Interactions, result: Split, *, markov: bool, masked: bool) -> np.ndarray:
    """Rank of each test target; ties go to the lower id."""
    popularity = training_popularity(data, result).astype(np.float64)
    starts = data.offsets[np.searchsorted(data.offsets, result.test, side="right") - 1]
    _, ends = Windows(data.offsets, result.train_end).positions(np.arange(len(Windows(data.offsets, result.train_end))))
    follows: dict[int, list[int]] = {}
    for before, after in zip(data.items[ends - 1].tolist(), data.items[ends].tolist(), strict=True):
        follows.setdefault(before, []).append(after)
    ranks = []
    share = popularity.max() + 1
    for start, target in zip(starts, result.test, strict=True):
        scores = popularity.copy()
        if markov:
            scores += share * np.bincount(follows.get(int(data.items[target - 1]), [0]), minlength=len(scores))
        scores[0] = -1
        if masked:
            scores[data.items[start:target]] = -1
        item = data.items[target]
        ranks.append(1 + (scores > scores[item]).sum() + (scores[1:item] == scores[item]).sum())
    return np.array(ranks)


@pytest.mark.parametrize(
    ("name", "markov", "masked", "expected"),
    [
        ("ml-100k", False, False, (8.378, 3.084)),
        ("ml-100k", False, True, (12.831, 5.553)),
        ("ml-100k", True, False, (17.815, 7.241)),
        ("ml-100k", True, True, (22.694, 9.670)),
        ("beauty", False, False, (1.950, 0.730)),
        ("beauty", False, True, (2.030, 0.759)),
        ("beauty", True, False, (8.188, 4.675)),
        ("beauty", True, True, (8.223, 4.784)),
    ],
)
def test_baselines_are_reproduced(
    data_dir: Path, name: str, markov: bool, masked: bool, expected: tuple[float, float]
) -> None:
    data = load_interactions(data_dir / f"{name}.npz")
    ranks = baseline_ranks(data, split(data, DataConfig()), markov=markov, masked=masked)
    found = 100 * np.mean(ranks <= 20), 100 * np.mean(np.where(ranks <= 20, 1 / np.log2(ranks + 1), 0))
    # The published figures have three decimals.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.0005 + 1e-9)


def test_ml_100k_is_the_same_from_both_files(data_dir: Path) -> None:
    from_text = load_interactions(data_dir / "ml-100k.inter", keep_times=True)
    from_npz = load_interactions(data_dir / "ml-100k.npz", keep_times=True)
    assert (from_npz.num_users, from_npz.num_items, from_npz.num_interactions) == (943, 1349, 99287)
    for name in ("items", "offsets", "times"):
        np.testing.assert_array_equal(getattr(from_text, name), getattr(from_npz, name))
    assert (from_text.item_ids, from_text.user_ids) == (from_npz.item_ids, from_npz.user_ids)
    assert any("49277 rows are earlier" in words for words in from_text.decisions)


def test_five_core_of_ml_100k(data_dir: Path) -> None:
    filtered = load_interactions(data_dir / "ml-100k-nofilter.npz", min_count=5)
    ready = load_interactions(data_dir / "ml-100k.npz")
    np.testing.assert_array_equal(filtered.items, ready.items)
    np.testing.assert_array_equal(filtered.offsets, ready.offsets)
    assert filtered.decisions[-1] == "5-core: 0 users, 333 items and 713 interactions removed"
