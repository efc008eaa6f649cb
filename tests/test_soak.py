from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import soak
from fave_fast import checkpoint as checkpoints
from fave_fast.engine import Recommendation, Recommender

FAULTS: dict[str, Callable[[Recommendation], Recommendation]] = {
    "off by": lambda answer: answer._replace(scores=[answer.scores[0] * 1.001, *answer.scores[1:]]),
    "rises": lambda answer: answer._replace(scores=answer.scores[::-1]),
    "is better by": lambda answer: answer._replace(items=answer.items[1:], scores=answer.scores[1:]),
    "twice": lambda answer: answer._replace(items=[answer.items[1], *answer.items[1:]]),
    "not there": lambda answer: answer._replace(items=["never", *answer.items[1:]]),
    "to be left out": lambda answer: answer._replace(items=[101, *answer.items[1:]]),
    "too long": lambda answer: answer._replace(items=[*answer.items, 124], scores=[*answer.scores, -9.0]),
    "counts unknown": lambda answer: answer._replace(unknown=7),
    "most popular": lambda answer: answer._replace(popular=True),
}


@pytest.fixture(scope="module")
def kept(tiny_checkpoint: Path) -> checkpoints.Checkpoint:
    return checkpoints.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def reference(kept: checkpoints.Checkpoint) -> soak.Reference:
    return soak.Reference(kept, torch.float32, torch.device("cpu"), bitwise=True)


ASK = soak.Ask([101, 103, "never"], 5, True, (110,), probe=0)


def test_right_answers_pass_in_every_version(kept: checkpoints.Checkpoint, reference: soak.Reference) -> None:
    recommender = Recommender(kept)
    catalogue = soak.first_catalogue(recommender, reference)
    new, embeddings = catalogue.universe.ids[catalogue.universe.trained], np.full((2, kept.config.model.d), 0.5)
    asks = [
        ASK,
        soak.Ask([], 30, True, ()),
        soak.Ask([105, new, 105], 30, False, (102,)),
        soak.Ask([105], 40, True, ()),
    ]
    for change in ("none", "add", "remove", "add"):
        if change == "add":
            version = recommender.add_items([new, 105], embeddings.astype(np.float32))
            catalogue = catalogue.added(version, [new, 105], embeddings)
        elif change == "remove":
            catalogue = catalogue.removed(recommender.remove_items([105]), [105])
        answers = [recommender.recommend([ask.history], ask.k, ask.exclude_history, ask.deny)[0] for ask in asks]
        assert {answer.version for answer in answers} == {catalogue.version}
        reference.check(catalogue, asks, answers)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_found(kept: checkpoints.Checkpoint, reference: soak.Reference, fault: str) -> None:
    recommender = Recommender(kept)
    catalogue = soak.first_catalogue(recommender, reference)
    (answer,) = recommender.recommend([ASK.history], ASK.k, ASK.exclude_history, ASK.deny)
    if fault == "is better by":
        (answer,) = recommender.recommend([ASK.history], ASK.k + 1, ASK.exclude_history, ASK.deny)
    with pytest.raises(AssertionError, match=fault):
        reference.check(catalogue, [ASK], [FAULTS[fault](answer)])


def test_other_bits_are_found(kept: checkpoints.Checkpoint, reference: soak.Reference) -> None:
    recommender = Recommender(kept)
    catalogue = soak.first_catalogue(recommender, reference)
    (answer,) = recommender.recommend([ASK.history], ASK.k, ASK.exclude_history, ASK.deny)
    reference.check(catalogue, [ASK], [answer])
    nudged = answer._replace(
        scores=[float(np.nextafter(np.float32(answer.scores[0]), np.float32(9))), *answer.scores[1:]]
    )
    with pytest.raises(AssertionError, match="other bits"):
        reference.check(catalogue, [ASK], [nudged])


def test_an_item_does_not_stand_before_its_lower_twin() -> None:
    twin = soak.random_checkpoint(40)
    reference = soak.Reference(twin, torch.float32, torch.device("cpu"), bitwise=False)
    recommender = Recommender(twin)
    catalogue = soak.first_catalogue(recommender, reference)
    ask = soak.Ask([catalogue.ids[3]], 40, True, ())
    (answer,) = recommender.recommend([ask.history], ask.k)
    reference.check(catalogue, [ask], [answer])
    place = answer.items.index(catalogue.ids[8])
    assert answer.items[place + 1] == catalogue.ids[9]
    items = list(answer.items)
    items[place : place + 2] = items[place : place + 2][::-1]
    with pytest.raises(AssertionError, match=r"lacks|out of order"):
        reference.check(catalogue, [ask], [answer._replace(items=items)])


def test_growth_is_of_the_least() -> None:
    def grown(*host: float) -> float:
        series = [soak.Memory(float(at), value) for at, value in enumerate(host)]
        return soak.growth(series, 2.0)["host"]

    assert grown(0, 50, 100, 150, 101, 100, 170, 102, 100, 180, 101) == 0
    assert grown(0, 50, 100, 100, 100, 120, 120, 120, 140, 140, 140) == 40
