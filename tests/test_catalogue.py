from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fave_fast.catalogue import Catalogue
from fave_fast.data import IdMap, canonical_id
from fave_fast.engine import _Gate
from fave_fast.errors import DataError, InputError


def catalogue(ids: list[int | str]) -> Catalogue:
    return Catalogue.of(IdMap.from_ids(ids), np.arange(len(ids) + 1))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 12), min_size=1, max_size=5, unique=True)), max_size=8)
)
def test_a_catalogue_is_what_was_added_and_not_removed(changes: list[tuple[bool, list[int]]]) -> None:
    """Against a plain dict of id -> number; a number, once given, belongs to its id for ever."""
    now = catalogue([3, 5, 8])
    numbers, alive = {3: 1, 5: 2, 8: 3}, {3, 5, 8}
    for at, (add, ids) in enumerate(changes):
        if add:
            for item in ids:
                numbers.setdefault(item, len(numbers) + 1)
            alive |= set(ids)
            now, found = now.with_items(ids)
            assert found.tolist() == [numbers[item] for item in ids]
        elif set(ids) <= alive:
            alive -= set(ids)
            now, found = now.without_items(ids)
            assert found.tolist() == [numbers[item] for item in ids]
        else:
            with pytest.raises(InputError, match="does not hold it"):
                now.without_items(ids)
            continue
        assert now.version <= at + 1
        every = list(range(13))
        assert now.numbers(every).tolist() == [numbers[item] if item in alive else 0 for item in every]
        assert now.ids(np.array(list(numbers.values()))) == list(numbers)
        assert len(now) == len(numbers) == len(now.popularity) - 1


def test_ids_of_both_kinds_and_repeats() -> None:
    now, numbers = catalogue(["a", "b"]).with_items(["c", 7])
    assert numbers.tolist() == [3, 4]
    assert now.numbers(["7", 7, "c", "b", "x"]).tolist() == [4, 4, 3, 2, 0]
    assert now.ids(np.array([4, 1])) == [7, "a"]
    for twice in (["d", "d"], [9, "9"]):
        with pytest.raises(InputError, match="stands twice"):
            now.with_items(twice)
    with pytest.raises(DataError):
        now.with_items([1.5])  # type: ignore[list-item]


KINDS: dict[str, list[int | str]] = {
    "near each other": [3, 4, 6, 9],
    "far apart": [-(2**63), -5, 10**12, 2**63 - 1],
    "texts": ["a", "b", "7", "\u00e9", "item 1"],
    "none": [],
}
STRANGE: list[int | str] = [0, 5, 7, 2**63, -(2**63) - 1, "3", "07", "c", "-5", "\u0000"]


@pytest.mark.parametrize("by_numpy", [False, True])
@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(list(KINDS)), st.booleans(), st.booleans())
def test_histories_are_numbered_id_by_id(
    by_numpy: bool, data: st.DataObject, kind: str, removes: bool, adds: bool
) -> None:
    """Against a plain dict; lists and tuples of ids that the catalogue has, had, never had, or writes otherwise."""
    ids = KINDS[kind]
    now = catalogue(ids)
    numbers = {str(item): at + 1 for at, item in enumerate(now.trained.ids)}
    if adds:
        now, _ = now.with_items(["c", 5])
        numbers |= {"c": len(ids) + 1, "5": len(ids) + 2}
    if removes and ids:
        now, _ = now.without_items([ids[0]])
        del numbers[str(ids[0])]
    if by_numpy:
        now.__dict__["_numbering"] = None
    row = st.lists(st.sampled_from([*ids, *STRANGE]), max_size=6)
    histories = data.draw(st.lists(st.one_of(row, row.map(tuple)), max_size=4))
    found, offsets, unknown = now.number(histories)
    expected = [
        [numbers[str(canonical_id(item))] for item in one if str(canonical_id(item)) in numbers] for one in histories
    ]
    assert (found.dtype, offsets.dtype, unknown.dtype) == (np.int32, np.int64, np.int64)
    assert [found[a:b].tolist() for a, b in pairwise(offsets.tolist())] == expected
    assert offsets[0] == 0
    assert offsets[-1] == len(found)
    assert unknown.tolist() == [len(one) - len(numbered) for one, numbered in zip(histories, expected, strict=True)]


@pytest.mark.parametrize("ids", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("bad", [1.5, True, None, "", b"a"])
def test_what_is_no_id_is_refused_in_any_history(ids: list[int | str], bad: object) -> None:
    with pytest.raises(DataError, match="expected a whole number or a text"):
        catalogue(ids).number([ids[:1], [*ids[:1], bad]])  # type: ignore[list-item]


def test_a_change_waits_for_requests_and_goes_before_later_ones() -> None:
    gate = _Gate()
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def request() -> None:
        with gate.shared:
            inside.set()
            assert leave.wait(10)
            order.append("request")

    def change() -> None:
        with gate.alone:
            order.append("change")

    def later() -> None:
        with gate.shared:
            order.append("later")

    first = threading.Thread(target=request)
    first.start()
    assert inside.wait(10)
    second = threading.Thread(target=change)
    second.start()
    while not gate.waiting:
        pass
    third = threading.Thread(target=later)
    third.start()
    leave.set()
    for thread in (first, second, third):
        thread.join(10)
    assert order == ["request", "change", "later"]
    assert (gate.inside, gate.waiting, gate.closed) == (0, 0, False)
