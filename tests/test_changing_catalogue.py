"""A recommender whose catalogue changes while it serves."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fave_fast import checkpoint as checkpoints
from fave_fast.checkpoint import Checkpoint
from fave_fast.engine import ItemId, Recommendation, Recommender
from fave_fast.errors import InputError
from fave_fast.ops.registry import why_no_extension

HISTORIES: list[list[ItemId]] = [[101], [103, 102, 101], [124, 101, 124, 110, 105, 101], [], [104, 900]]


@pytest.fixture(scope="module")
def kept(tiny_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(tiny_checkpoint)


def embedding_of(kept: Checkpoint, item: int) -> torch.Tensor:
    return kept.weights["item_embedding.weight"][item - 100]


def as_version(answers: list[Recommendation], version: int) -> list[Recommendation]:
    return [answer._replace(version=version) for answer in answers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_an_added_item_is_recommended_and_known(kept: Checkpoint, dtype: torch.dtype) -> None:
    recommender = Recommender(kept, dtype=dtype)
    before = recommender.recommend(HISTORIES, 24)
    best = before[0].items[0]
    # Twice the best item's embedding: first where that item's score is positive.
    assert before[0].scores[0] > 0
    assert recommender.add_items([900], 2 * embedding_of(kept, int(best))[None]) == 1
    after = recommender.recommend(HISTORIES, 25)
    assert after[0].items == [900, *before[0].items]
    assert after[0].scores[1:] == before[0].scores
    assert (before[4].unknown, after[4].unknown) == (1, 0)
    assert after[4].items != before[4].items
    assert 900 not in after[4].items
    assert after[3].items[-1] == 900  # never trained on: the least popular
    assert {answer.version for answer in after} == {1}


def test_a_changed_embedding_moves_the_item_alone(kept: Checkpoint) -> None:
    recommender = Recommender(kept, dtype=torch.float64)
    (before,) = recommender.recommend([[101]], 24)
    recommender.add_items([before.items[0]], torch.zeros(1, kept.config.model.d))
    (after,) = recommender.recommend([[101]], 24)
    scores = dict(zip(after.items, after.scores, strict=True))
    assert scores.pop(before.items[0]) == 0
    assert before.items[1:] == list(scores)


def test_a_removed_item_never_appears(kept: Checkpoint) -> None:
    recommender = Recommender(kept, dtype=torch.float64)
    before = recommender.recommend(HISTORIES, 24)
    gone = {101, before[0].items[0], before[3].items[0]}
    recommender.remove_items(sorted(gone))  # type: ignore[type-var]
    after = recommender.recommend(HISTORIES, 24)
    assert not gone & {item for answer in after for item in answer.items}
    assert after[0].popular  # its only item is not known any more
    assert after[0].unknown == 1
    assert after[3].items == [item for item in before[3].items if item not in gone]
    with pytest.raises(InputError, match="item 101 cannot be removed"):
        recommender.remove_items([101])
    recommender.add_items([101], embedding_of(kept, 101)[None])
    assert not recommender.recommend([[101]])[0].popular


def test_what_changes_later_is_as_if_it_had_been_so(kept: Checkpoint) -> None:
    """Items that were taken out and in again, in a table that had to move, answer as the untouched catalogue does."""
    recommender, untouched = Recommender(kept), Recommender(kept)
    more = torch.randn(30, kept.config.model.d)
    recommender.add_items(range(200, 230), more)
    recommender.remove_items([110, *range(200, 230)])
    version = recommender.add_items([110], embedding_of(kept, 110)[None])
    assert version == 3
    assert recommender.recommend(HISTORIES, 24) == as_version(untouched.recommend(HISTORIES, 24), 3)


def test_swap_serves_the_other_checkpoint(kept: Checkpoint) -> None:
    weights = {name: weight * 1.3 for name, weight in kept.weights.items()}
    other = replace(kept, weights=weights)
    recommender = Recommender(kept)
    recommender.add_items([900], torch.ones(1, kept.config.model.d))
    assert recommender.swap(other) == 2
    assert recommender.recommend(HISTORIES) == as_version(Recommender(other).recommend(HISTORIES), 2)
    narrow = replace(kept.config, model=replace(kept.config.model, delta=0.5))
    with pytest.raises(InputError, match="another model"):
        recommender.swap(replace(kept, config=narrow))


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([900], torch.zeros(2, 16), r"embeddings are \[2, 16\]; expected \[1, 16\]"),
        ([900], torch.full((1, 16), torch.nan), "NaN or infinity"),
        ([900, 900], torch.zeros(2, 16), "item 900 stands twice"),
    ],
)
def test_bad_additions_change_nothing(kept: Checkpoint, ids: list[ItemId], rows: torch.Tensor, message: str) -> None:
    recommender = Recommender(kept)
    with pytest.raises(InputError, match=message):
        recommender.add_items(ids, rows)
    assert recommender.recommend(HISTORIES) == Recommender(kept).recommend(HISTORIES)


def test_a_list_knows_one_version(kept: Checkpoint) -> None:
    """Requests in several threads while items come and go: every answer is that of its version, to the last bit."""
    changes = 20
    more = torch.randn(changes, kept.config.model.d, generator=torch.Generator().manual_seed(1))

    def change(recommender: Recommender, at: int) -> None:
        item = 900 + at // 3
        if at % 3 == 2:
            recommender.remove_items([item])
        else:  # in, then with another embedding
            recommender.add_items([item], more[at][None])

    alone = Recommender(kept)
    expected = [alone.recommend(HISTORIES, 24)]
    for at in range(changes):
        change(alone, at)
        expected.append(alone.recommend(HISTORIES, 24))

    recommender = Recommender(kept)
    found: list[list[Recommendation]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            found.append(recommender.recommend(HISTORIES, 24))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for at in range(changes):
        seen = len(found)
        change(recommender, at)
        while len(found) < seen + 2 and any(thread.is_alive() for thread in threads):
            done.wait(1e-3)
    done.set()
    for thread in threads:
        thread.join()
    assert len({answers[0].version for answers in found}) > 3
    for answers in found:
        assert answers == expected[answers[0].version]


@pytest.mark.skipif(why_no_extension() is not None, reason=str(why_no_extension()))
def test_the_table_in_bytes_follows_every_change(kept: Checkpoint) -> None:
    more = torch.randn(60, kept.config.model.d)
    other = replace(kept, weights={name: 1.5 * weight for name, weight in kept.weights.items()})
    plain, in_bytes = Recommender(kept), Recommender(kept, table_bytes=True)
    for change in (
        lambda each: each.add_items(range(200, 260), 2 * more),  # the table moves
        lambda each: each.add_items([101, 300], more[:2]),
        lambda each: each.remove_items([102, 230]),
        lambda each: each.swap(other),
    ):
        for each in (plain, in_bytes):
            change(each)
        assert in_bytes.recommend(HISTORIES, 30) == plain.recommend(HISTORIES, 30)
    assert in_bytes._bytes is not None
    in_bytes._bytes.require(in_bytes._table)
    assert (plain.fallback_share, in_bytes.fallback_share) == (0, 0)
