"""Work on second streams: what a training step's streams wait for, and that this is found out where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fave_fast.config import Config, ModelConfig
from fave_fast.data import IdMap, Interactions
from fave_fast.model import FAVE
from fave_fast.ops.beside import Beside
from fave_fast.ops.registry import interpreting, why_no_triton
from fave_fast.steps import FusedSteps
from fave_fast.train import make_optimiser
from tests.streams import Stream, Streams

ITEMS, USERS, L = 24, 8, 6
interpreted = pytest.mark.skipif(
    why_no_triton() is not None or not interpreting(), reason="its kernels are to be interpreted"
)


def beside(stream: Stream) -> Beside:
    return Beside(stream)  # type: ignore[arg-type]


def races(work: Callable[[Streams], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    streams = Streams()
    with streams.watched(monkeypatch):
        work(streams)
    return streams.races


def doubled_beside(streams: Streams, wait: Callable[[Beside], object]) -> Tensor:
    """A tensor made on another stream and read on this one after `wait`."""
    other = beside(streams.stream("other"))
    one = torch.ones(4)
    with other.work(one):
        two = one * 2
    wait(other)
    return two + 1


def test_who_reads_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert races(lambda streams: doubled_beside(streams, Beside.join), monkeypatch) == []
    assert races(lambda streams: doubled_beside(streams, Beside.finish), monkeypatch) == []
    assert races(lambda streams: doubled_beside(streams, lambda other: other.so_far()()), monkeypatch) == []
    (race,) = races(lambda streams: doubled_beside(streams, lambda other: None), monkeypatch)
    assert "add.Tensor on main reads what may be being written by aten.mul.Tensor" in race


def test_so_far_waits_for_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(streams: Streams) -> None:
        other, one = beside(streams.stream("other")), torch.ones(4)
        with other.work(one):
            first = one * 2
        known = other.so_far()
        with other.work():
            second = one * 3
        known()
        assert len(streams.races) == 0
        _ = first + 1
        assert len(streams.races) == 0
        _ = second + 1

    assert len(races(work, monkeypatch)) == 1


def test_work_comes_after_what_was_here_and_ahead_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(streams: Streams, ahead: bool) -> None:
        other = beside(streams.stream("other"))
        with other.work():
            pass
        one = torch.ones(4)
        with other.ahead() if ahead else other.work(one):
            _ = one * 2

    assert races(lambda streams: work(streams, False), monkeypatch) == []
    assert len(races(lambda streams: work(streams, True), monkeypatch)) == 1


@pytest.mark.parametrize("told", [True, False])
def test_what_is_read_beside_keeps_its_memory(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(streams: Streams) -> None:
        other, one = beside(streams.stream("other")), torch.ones(4)
        with other.work(*([one] if told else [])):
            two = one * 2
        del one
        _ = torch.zeros(4)  # where `one` was, if that is gone
        other.finish()
        _ = torch.zeros(4) + two

    found = races(work, monkeypatch)
    assert len(found) == (0 if told else 1)
    assert told or "zeros.default on main may take the memory of aten.ones.default" in found[0]


@pytest.mark.parametrize("waits", [True, False])
def test_memory_of_a_second_stream_is_not_reused_before_this_one_has_read_it(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(streams: Streams) -> None:
        other, one = beside(streams.stream("other")), torch.ones(4)
        with other.work(one):
            two = one * 2
        other.join()
        three = two + 1
        del two
        with other.work() if waits else other.ahead():
            _ = one * 4
        other.join()
        _ = three + 1

    assert len(races(work, monkeypatch)) == (0 if waits else 1)


def test_a_backward_pass_runs_where_its_forward_pass_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(streams: Streams, join: bool) -> None:
        other, one = beside(streams.stream("other")), torch.ones(4, requires_grad=True)
        with other.work(one):
            two = one.exp()
        other.join()
        three = two.sin()
        before = dict(streams.ops)
        three.sum().backward()
        assert streams.ops["other"] > before["other"]
        assert streams.ops["main"] > before["main"]
        if join:
            other.join()
        assert one.grad is not None
        _ = one.grad + 1

    assert races(lambda streams: work(streams, True), monkeypatch) == []
    assert len(races(lambda streams: work(streams, False), monkeypatch)) == 1


@interpreted
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {"model": {"blocks": 1, "source_block": -1}}),
        (1, {"model": {"blocks": 3}, "loss": {"target": "unseen"}}),
        (1, {"model": {"dropout": 0.0, "embedding_dropout": 0.0, "norm": "layer"}, "loss": {"source": "dense"}}),
        (1, {"model": {"conditioning": "token"}}),
        (2, {}),
        (2, {"flow": {"tangent": "learned"}}),
    ],
)
def test_a_step_s_streams_do_not_race(stage: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a step nor with the next one; in bfloat16, as on a GPU, though the interpreter multiplies badly."""
    model = ModelConfig(
        d=16, blocks=2, heads=2, ffn_mult=2, max_length=L, dropout=0.2, embedding_dropout=0.2, delta=0.1
    )
    config = Config(model=model).override({"train": {"batch_size": USERS}, **changes}, "test")
    rng = np.random.default_rng(0)
    items = rng.integers(1, ITEMS + 1, USERS * 9).astype(np.int32)
    starts = np.arange(USERS) * 9
    ids = IdMap(np.arange(1, ITEMS + 1))
    data = Interactions(items, np.append(starts, len(items)), ids, IdMap(np.arange(USERS)), None, "made", ())
    torch.manual_seed(0)
    network = FAVE(config.model, ITEMS).train()
    network.item_embedding.weight.requires_grad_(stage == 1)
    optimiser = make_optimiser(network, 0.001, 0.0, captured=True)
    streams = Streams()
    sides = [streams.stream("beside"), streams.stream("behind")]
    monkeypatch.setenv("FAVE_FAST_BACKEND", "triton")  # the cross-entropy's too
    monkeypatch.setattr("fave_fast.steps._LEAST_STEP", 8)
    monkeypatch.setattr(FusedSteps, "_lanes", lambda _, captured: tuple(beside(one) for one in sides))
    steps = FusedSteps(data, config, network, optimiser, stage, torch.bfloat16, backend="triton")
    update = steps._adam.take

    def seen(addresses: Tensor | None) -> None:
        # The kernels are given gradients by their addresses, which do not say what lies there.
        streams.uses([one.grad for one in steps._adam.parameters if one.grad is not None], "Adam")
        update(addresses)

    monkeypatch.setattr(steps._adam, "take", seen)
    with streams.watched(monkeypatch):
        for seed in range(2):
            steps.take(starts, starts + rng.integers(1, 9, USERS), seed)
    assert min(streams.ops["beside"], streams.ops["behind"]) > 20
    assert streams.races == []
