"""Real ranks on this machine, by gloo: lists of one process, to the bit, and errors instead of hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext, ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graphs import ITEMS, checkpoint, histories

from fave_fast import checkpoint as checkpoints
from fave_fast.engine import Recommendation, Recommender
from fave_fast.errors import InputError, RankLost
from fave_fast.graphs import CapturedStep, Floats, Histories, Ints, StepGraphs
from fave_fast.ops import Exclusions
from fave_fast.ops.registry import why_no_extension, why_no_triton
from fave_fast.sharded import (
    ShardedRecommender,
    ShardedStep,
    ShardedTable,
    _Asked,
    even_sizes,
    newest_items,
    pack_keys,
    unpack_keys,
)

PATIENCE = 60.0  # seconds until a test gives up

ASKS: list[dict[str, Any]] = [
    {"histories": [[101, 103, 105]]},
    {"histories": [[101, 103], [], ["never"], [124, 113, 102, "never", 101]], "k": 5},
    {"histories": [[101 + at % 24 for at in range(30)], [117]], "k": 30, "exclude_history": False},
    {"histories": [[101 + 2 * at for at in range(11)], [105, 117]], "k": 24},
    {"histories": [[109], [110, 111]], "k": 4, "deny": [101, 112, 124, "never"]},
    {"histories": [[]], "k": 3, "deny": [101, 102]},
    {"histories": [[109], [110, 111], [101]], "k": 6, "n_samples": 3, "seed": 5, "batch_size": 2},
]
SHARDS: list[tuple[list[int] | None, int]] = [
    ([24], 1),
    (None, 2),
    ([23, 1], 2),
    (None, 3),
    ([3, 20, 1], 3),
    ([0, 24, 0], 3),
]

needs_extension = pytest.mark.skipif(why_no_extension() is not None, reason=f"no extension: {why_no_extension()}")


def run_rank(
    rank: int, ranks: int, store: Path, work: Callable[..., object], pipe: Connection, arguments: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        result = work(rank, *arguments)
    except Exception as error:
        result = error
    pipe.send(result)


class Ranks:
    """So many processes that do `work(rank, *arguments)`."""

    def __init__(
        self, context: BaseContext, ranks: int, store: Path, work: Callable[..., object], *arguments: Any
    ) -> None:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        self.pipes = [pipe for pipe, _ in pipes]
        self.processes = [
            context.Process(target=run_rank, args=(rank, ranks, store, work, pipes[rank][1], arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()
        for _, pipe in pipes:
            pipe.close()

    def result(self, rank: int) -> Any:
        """What the rank returned or raised; None of one that ended without a word."""
        assert self.pipes[rank].poll(PATIENCE), f"rank {rank} hangs"
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return None


def asked(recommender: Recommender) -> list[list[Recommendation]]:
    return [recommender.recommend(**ask) for ask in ASKS]


@pytest.fixture(scope="module")
def twins(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items 13 to 18 are equal to items 1 to 6, and four items are zero: ties within and between all shards."""
    kept = checkpoints.load(tiny_checkpoint)
    table = kept.weights["item_embedding.weight"].clone()
    table[13:19] = table[1:7]
    table[[8, 9, 20, 23]] = 0.0
    path = tmp_path_factory.mktemp("twins") / "model.pt"
    checkpoints.save(replace(kept, weights={**kept.weights, "item_embedding.weight": table}), path)
    return path


def answer_all(rank: int, path: Path, sizes: list[int] | None, dtype: str) -> object:
    recommender = ShardedRecommender(checkpoints.load(path), sizes=sizes, dtype=dtype, backend="cpp", timeout=PATIENCE)
    if rank > 0:
        recommender.follow()
        return "followed"
    answers = asked(recommender)
    recommender.close()
    recommender.close()
    return answers


@needs_extension
@pytest.mark.parametrize(("sizes", "ranks", "dtype"), [*((*shards, "fp32") for shards in SHARDS), (None, 2, "bf16")])
def test_lists_are_those_of_one_process(
    sizes: list[int] | None, ranks: int, dtype: str, twins: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    group = Ranks(processes, ranks, tmp_path / "store", answer_all, twins, sizes, dtype)
    found = group.result(0)
    assert found == asked(Recommender.from_pretrained(twins, dtype=dtype, backend="cpp"))
    assert any(len(set(one.scores)) < len(one.scores) for answers in found for one in answers)
    assert [group.result(rank) for rank in range(1, ranks)] == ["followed"] * (ranks - 1)


def refuse(rank: int, path: Path) -> object:
    kept = checkpoints.load(path)
    found = []
    for sizes in ([24], [25, -1], [12, 11]):
        with pytest.raises(InputError, match="expected 2 from 0 that add up to 24 items") as caught:
            ShardedRecommender(kept, sizes=sizes)
        found.append(str(caught.value))
    recommender = ShardedRecommender(kept, timeout=PATIENCE)
    if rank > 0:
        with pytest.raises(RuntimeError, match="rank 1 was asked; expected rank 0"):
            recommender.recommend([[101]])
        recommender.follow()
        return found
    for change in (lambda: recommender.add_items([1], [[0.0] * 16]), lambda: recommender.remove_items([101])):
        with pytest.raises(InputError, match="does not change"):
            change()
    for whole in (lambda: recommender.encode([[101]]), recommender.embeddings):
        with pytest.raises(InputError, match="gives lists alone"):
            whole()
    with pytest.raises(RuntimeError, match="rank 0 asks"):
        recommender.follow()
    with pytest.raises(InputError, match="k is 0"):
        recommender.recommend([[101]], 0)
    after = recommender.recommend([[101]], 2)
    recommender.close()
    with pytest.raises(RuntimeError, match="the recommender is closed"):
        recommender.recommend([[101]])
    return len(after[0].items)


def test_misuse_is_named_and_harms_nothing(tiny_checkpoint: Path, tmp_path: Path, processes: ForkServerContext) -> None:
    group = Ranks(processes, 2, tmp_path / "store", refuse, tiny_checkpoint)
    assert group.result(0) == 2
    assert len(group.result(1)) == 3


def ask_often(recommender: Recommender) -> None:
    """A signal takes a moment to arrive; what is asked before that is answered."""
    for _ in range(100_000):
        recommender.recommend([[101]])


def lose_a_rank(rank: int, path: Path, signal_number: int, timeout: float, pids: Path) -> object:
    recommender = ShardedRecommender(checkpoints.load(path), timeout=timeout)
    if rank > 0:
        (pids / str(rank)).write_text(str(os.getpid()))
        recommender.follow()
        return "followed"
    recommender.recommend([[101]])
    os.kill(int((pids / "1").read_text()), signal_number)
    messages = []
    for _ in range(2):
        with pytest.raises(RankLost) as caught:
            ask_often(recommender)
        messages.append(str(caught.value))
    recommender.close()
    return messages


@pytest.mark.parametrize(("how", "timeout"), [(signal.SIGKILL, PATIENCE), (signal.SIGSTOP, 2.0)])
def test_a_rank_that_dies_or_hangs_is_an_error_on_the_others(
    how: int, timeout: float, tiny_checkpoint: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    group = Ranks(processes, 3, tmp_path / "store", lose_a_rank, tiny_checkpoint, how, timeout, tmp_path)
    found = group.result(0)
    if how == signal.SIGSTOP:
        os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    assert isinstance(found, list), found
    assert found[0] == found[1]
    assert f"a rank ended, or said nothing for {timeout:g} s, while" in found[0]
    assert isinstance(group.result(2), RankLost)
    assert group.result(1) is None


def test_even_sizes() -> None:
    assert [even_sizes(10, ranks) for ranks in (1, 3, 12)] == [[10], [4, 3, 3], [1] * 10 + [0, 0]]


SCORES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, -np.inf, 1.0])
IDS = st.integers(0, 2**31 - 2) | st.integers(0, 3)


@given(st.lists(st.tuples(SCORES, IDS), min_size=1, max_size=40))
def test_keys_order_as_lists_do_and_lose_nothing(pairs: Sequence[tuple[float, int]]) -> None:
    scores = torch.tensor([score for score, _ in pairs], dtype=torch.float32)
    ids = torch.tensor([number for _, number in pairs])
    keys = pack_keys(scores, ids)
    found_scores, found_ids = unpack_keys(keys)
    assert torch.equal(found_scores.view(torch.int32), scores.view(torch.int32))
    assert torch.equal(found_ids, ids)
    best = keys.sort(descending=True, stable=True).indices.tolist()
    ordered = [(-pairs[at][0], pairs[at][1]) for at in best]
    assert ordered == sorted(ordered)


class OnHost(CapturedStep):
    """In a graph's place: its step, run by all ranks."""

    def __init__(self, step: ShardedStep, batch: int, k: int) -> None:
        self._step, self.batch, self._k = step, batch, k

    def run(self, histories: Histories, exclude: bool) -> tuple[Floats, Ints]:
        ids, offsets = map(torch.from_numpy, histories)
        assert len(offsets) - 1 <= self.batch
        scores, items = self._step(ids, offsets, Exclusions(ids, offsets) if exclude else None, self._k)
        return scores.numpy(), items.numpy()


class GraphsOnHost(StepGraphs):
    def __init__(self, step: ShardedStep, k: int) -> None:
        self.k, self.batches, self._step = k, (1, 4), step
        self._captured = {batch: OnHost(step, batch, k) for batch in self.batches}


def on_host(path: Path, shared: bool) -> ShardedRecommender:
    """A recommender that takes its own graphs for captured; `shared`: their requests go by shared memory."""
    recommender = ShardedRecommender(checkpoints.load(path), backend="cpp", timeout=PATIENCE)
    step = recommender._sharded_step(recommender.config.flow.seed, recommender.config.model.max_length)
    recommender._on_gpu, recommender._graphs = True, GraphsOnHost(step, 7)
    if shared:
        recommender._open_mailbox(4)
        assert recommender._mailbox is not None
    return recommender


def answer_in_parts(rank: int, path: Path, shared: bool) -> object:
    recommender = on_host(path, shared)
    if rank > 0:
        recommender.follow()
        return "followed"
    answers = [recommender.recommend(NINE, 5), recommender.recommend(NINE[:3], 7), recommender.recommend(NINE, 9)]
    answers.append(recommender.recommend(NINE[:1], 7, exclude_history=False))
    recommender.close()
    return answers, dict(recommender.batches)


NINE = [[101 + at, 124 - at, 105] for at in range(9)]


@needs_extension
@pytest.mark.parametrize("shared", [True, False])
def test_all_ranks_answer_a_request_in_parts(
    shared: bool, twins: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    group = Ranks(processes, 2, tmp_path / "store", answer_in_parts, twins, shared)
    found = group.result(0)
    assert isinstance(found, tuple), found
    one = Recommender(checkpoints.load(twins), backend="cpp")
    expected = [one.recommend(NINE, 5), one.recommend(NINE[:3], 7), one.recommend(NINE, 9)]
    expected.append(one.recommend(NINE[:1], 7, exclude_history=False))
    # Of 4, 4 and 1 histories; of 3; of 1.
    assert found == (expected, {"captured": 5, "k above the captured one": 1})
    assert group.result(1) == "followed"


def lose_the_first(rank: int, path: Path) -> object:
    recommender = on_host(path, shared=True)
    if rank > 0:
        recommender.follow()
        return "followed"
    recommender.recommend([[101]])
    os._exit(1)


@needs_extension
def test_who_watches_shared_memory_hears_of_the_first_rank_s_end(
    twins: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    group = Ranks(processes, 2, tmp_path / "store", lose_the_first, twins)
    found = group.result(1)
    assert isinstance(found, RankLost)
    assert "while a request was passed on" in str(found)


GPU_ASKS = [(1, True), (3, True), (4, False), (64, True), (65, True)]  # histories; the last are more than a graph holds


def ask_numbers(recommender: Recommender) -> list[tuple[Any, Any]]:
    return [recommender.best_items(*histories(count, seed=count), 20, exclude) for count, exclude in GPU_ASKS]


def lose_a_follower(rank: int, path: Path, pids: Path) -> object:
    recommender = on_host(path, shared=True)
    if rank > 0:
        (pids / str(rank)).write_text(str(os.getpid()))
        recommender.follow()
        return "followed"
    recommender.recommend([[101]])
    os.kill(int((pids / "1").read_text()), signal.SIGKILL)
    for listener in recommender._listeners[:1]:
        listener.join(PATIENCE)
    messages = []
    for _ in range(2):
        with pytest.raises(RankLost) as caught:
            recommender.recommend([[101]])
        messages.append(str(caught.value))
    recommender.close()
    return messages


@needs_extension
def test_a_rank_that_died_is_known_before_it_is_asked(
    twins: Path, tmp_path: Path, processes: ForkServerContext
) -> None:
    group = Ranks(processes, 3, tmp_path / "store", lose_a_follower, twins, tmp_path)
    found = group.result(0)
    assert isinstance(found, list), found
    assert found[0] == found[1]
    assert "while nothing was asked; expected all ranks to live" in found[0]
    assert isinstance(group.result(2), RankLost)


def answer_on_gpus(rank: int, sizes: list[int] | None, table_bytes: bool) -> object:
    recommender = ShardedRecommender(
        checkpoint(), sizes=sizes, device=f"cuda:{rank}", dtype="bf16", backend="triton", timeout=PATIENCE,
        table_bytes=table_bytes,
    )  # fmt: skip
    if rank > 0:
        recommender.follow()
        return "followed"
    one_by_one = ask_numbers(recommender)
    assert recommender.warmup(batches=(1, 4, 64)) > 0
    assert recommender._mailbox is not None  # the ranks are on one host
    captured = ask_numbers(recommender)
    denied = recommender.recommend([[101, 102]], deny=[103])
    recommender.close()
    return one_by_one, captured, denied, dict(recommender.batches)


@pytest.mark.gpu
@pytest.mark.parametrize("table_bytes", [False, True])
@pytest.mark.parametrize(("ranks", "sizes"), [(1, None), (2, None), (2, [ITEMS - 5, 5]), (2, [0, ITEMS]), (4, None)])
def test_gpus_give_the_lists_of_one_captured_or_not(
    ranks: int, sizes: list[int] | None, table_bytes: bool, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    group = Ranks(multiprocessing.get_context("spawn"), ranks, tmp_path / "store", answer_on_gpus, sizes, table_bytes)
    found = group.result(0)
    assert isinstance(found, tuple), found
    one = Recommender(checkpoint(), device="cuda", dtype="bf16", backend="triton")
    expected = ask_numbers(one)
    one_by_one, captured, denied, batches = found
    for lists in (one_by_one, captured):
        for mine, other in zip(lists, expected, strict=True):
            for part in range(2):
                np.testing.assert_array_equal(mine[part], other[part])
    assert denied == one.recommend([[101, 102]], deny=[103])
    assert batches == {
        "not warmed up": 5,
        "captured": 6,
        "denied items": 1,
    }
    assert [group.result(rank) for rank in range(1, ranks)] == ["followed"] * (ranks - 1)


def lose_a_gpu(rank: int, signal_number: int, captured: bool, pids: Path) -> object:
    recommender = ShardedRecommender(checkpoint(), device=f"cuda:{rank}", dtype="bf16", backend="triton", timeout=5.0)
    if rank > 0:
        (pids / str(rank)).write_text(str(os.getpid()))
        recommender.follow()
        return "followed"
    if captured:
        recommender.warmup(batches=(1,))
    recommender.recommend([[101]])
    os.kill(int((pids / "1").read_text()), signal_number)
    with pytest.raises(RankLost) as caught:
        ask_often(recommender)
    return str(caught.value)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gpu_that_is_lost_is_an_error(how: int, captured: bool, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    context = multiprocessing.get_context("spawn")
    group = Ranks(context, 2, tmp_path / "store", lose_a_gpu, how, captured, tmp_path)
    assert "a rank ended, or said nothing for 5 s, while" in str(group.result(0))
    group.processes[1].kill()


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), width=st.integers(1, 7), spare=st.integers(0, 3))
def test_the_newest_items_are_exchanged(lengths: list[int], width: int, spare: int) -> None:
    """By the places that the encoder gets, it finds the items that it reads, whatever else stands in the memory."""
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    ids = torch.arange(100, 100 + sum(lengths) + spare + 1, dtype=torch.int32)
    newest, places = newest_items(ids, offsets, width)
    assert newest.shape == (len(lengths) * width,)
    table = torch.cat((torch.zeros(1, dtype=newest.dtype), newest))
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        first = max(start, end - width)
        assert table[places[first:end].long()].tolist() == ids[first:end].tolist()
        assert places[start:first].eq(0).all()
    assert sorted(newest[newest > 0].tolist()) == sorted(
        ids[at].item()
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        for at in range(max(start, end - width), end)
    )


@given(tokens=st.integers(0, 1200), denied=st.integers(0, 3))
def test_a_request_arrives_as_it_was_sent(tokens: int, denied: int) -> None:
    sent = _Asked(
        1, torch.arange(tokens), torch.tensor([0, tokens]), torch.arange(denied), 7, True, False, range(3, 5), 4
    )
    first, rest = sent.messages()
    assert (len(first), len(rest)) == (512, _Asked.missing(first))
    got = _Asked.of(first, rest)
    assert all(torch.equal(getattr(got, name), getattr(sent, name)) for name in ("ids", "offsets", "denied"))
    plain = ("kind", "k", "exclude", "deny", "seeds", "batch")
    assert [getattr(got, name) for name in plain] == [getattr(sent, name) for name in plain]


@pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_kernels_do_what_the_operations_do(data: st.DataObject) -> None:
    """Around the exchanges, to the bit: staging of rows, local numbers, keys and their merging."""
    from fave_fast.kernels import sharded as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    first, rows, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6)), data.draw(st.sampled_from((2, 6)))
    table = torch.randn(rows, d, generator=source)
    table[torch.rand(rows, d, generator=source) < 0.3] = -0.0
    shard = ShardedTable(table, first, 20, None, 1.0)  # type: ignore[arg-type]
    lengths, width = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)), data.draw(st.integers(1, 6))
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    ids = torch.randint(0, 20, (sum(lengths) + 1,), generator=source, dtype=torch.int32)
    newest, places = newest_items(ids, offsets, width)
    local = shard.local(newest)
    expected = torch.where(local[:, None] > 0, table.view(torch.int32)[local], 0)
    staged = torch.full((1 + len(newest), d), -7, dtype=torch.int32, device=device)
    found = torch.zeros(len(ids), dtype=torch.int32, device=device)
    on_device = [part.to(device) for part in (ids, offsets, table.view(torch.int32))]
    kernels.stage(*on_device, staged, found, first=first, width=width)
    assert torch.equal(staged.cpu(), torch.cat((torch.zeros(1, d, dtype=torch.int32), expected)))
    assert torch.equal(found.cpu(), places)
    numbers = torch.empty_like(on_device[0])
    kernels.local_numbers(on_device[0], numbers, first=first, rows=rows)
    assert torch.equal(numbers.cpu(), shard.local(ids))

    ranks, batch, k = (data.draw(st.integers(1, most)) for most in (3, 3, 9))
    scores = torch.randint(-2, 3, (ranks, batch, k), generator=source).float()
    scores[torch.rand(scores.shape, generator=source) < 0.2] = -0.0
    scores[torch.rand(scores.shape, generator=source) < 0.2] = -torch.inf
    listed = torch.arange(1, scores.numel() + 1).view(scores.shape)[:, torch.randperm(batch, generator=source)]
    listed = torch.where(scores == -torch.inf, 0, listed)
    every = torch.stack(
        [pack_keys(s, torch.where(i > 0, i + first - 1, 0)) for s, i in zip(scores, listed, strict=True)]
    )
    keys = torch.empty_like(every, device=device)
    for rank in range(ranks):
        kernels.pack_keys(scores[rank].to(device), listed[rank].to(device), keys[rank], first=first)
    assert torch.equal(keys.cpu(), every)
    best = unpack_keys(every.transpose(0, 1).flatten(1).topk(k, dim=1).values)
    merged = torch.full((batch, k), torch.nan, device=device), torch.full((batch, k), -7, device=device)
    kernels.merge(keys, *merged)
    assert torch.equal(merged[0].cpu().view(torch.int32), best[0].view(torch.int32))
    assert torch.equal(merged[1].cpu(), best[1])
