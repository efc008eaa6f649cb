"""Requests between processes of this machine through shared memory."""

from __future__ import annotations

import errno
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from test_sharded import Ranks

from fave_fast import mailbox
from fave_fast.graphs import Histories
from fave_fast.mailbox import Mailbox, Posted
from fave_fast.ops.registry import why_no_extension

pytestmark = pytest.mark.skipif(why_no_extension() is not None, reason=str(why_no_extension()))
BATCH, ITEMS = 5, 33


def requests(seed: int) -> list[Posted]:
    """Among them the smallest and the largest that fit."""
    source = np.random.default_rng(seed)
    sizes = [(0, 0), (1, 0), (1, ITEMS), (BATCH, ITEMS)]
    sizes += [(int(source.integers(1, BATCH + 1)), int(source.integers(0, ITEMS + 1))) for _ in range(30)]
    made = []
    for users, items in sizes:
        bounds = np.sort(source.integers(0, items + 1, max(users - 1, 0)))
        offsets = np.concatenate(([0], bounds, [items])[: users + 1]) if users else np.zeros(1, np.int64)
        ids = source.integers(0, 2**31, items, dtype=np.int32)
        made.append(Posted(int(source.integers(1, 600)), Histories(ids, offsets), bool(source.integers(2))))
    return made


def plain(request: Posted | None) -> Any:
    if request is None:
        return None
    ids, offsets = request.histories
    return request.batch, ids.tolist(), offsets.tolist(), request.exclude


def exchange(rank: int, seed: int, count: int) -> object:
    group = dist.new_group(backend="gloo")
    opened = Mailbox.open(BATCH, ITEMS, group)
    assert opened is not None
    opened._count = count
    if rank == 0:
        opened._words[0] = count
    dist.barrier(group)
    seen = []
    for request in requests(seed):
        if rank == 0:
            opened.post(request)
        seen.append(plain(request if rank == 0 else opened.next(until=lambda: False)))
        dist.barrier(group)  # all have read it
    return seen


@pytest.mark.parametrize(("ranks", "count"), [(1, 0), (2, 0), (3, 2**32 - 17)])
def test_requests_arrive_as_they_were_posted(
    ranks: int, count: int, tmp_path: Path, processes: ForkServerContext
) -> None:
    group = Ranks(processes, ranks, tmp_path / "store", exchange, 7, count)
    expected = [plain(request) for request in requests(7)]
    for rank in range(ranks):
        assert group.result(rank) == expected
    assert len({str(one) for one in expected}) == len(expected)


def look_often(rank: int) -> object:
    opened = Mailbox.open(BATCH, ITEMS, dist.group.WORLD)
    assert opened is not None
    times = iter([False] * 60 + [True])  # long enough to spin no longer
    found = opened.next(until=lambda: next(times))
    return found, list(times)


def test_waiting_ends_for_another_reason(tmp_path: Path, processes: ForkServerContext) -> None:
    assert Ranks(processes, 1, tmp_path / "store", look_often).result(0) == (None, [])


def full(file: int, start: int, size: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def without(rank: int, folder: Path, loses: str) -> object:
    mailbox._MEMORY = folder
    if loses == "another file":
        mailbox._make = lambda size, make=mailbox._make: (make(size)[0], b"elsewhere")  # type: ignore[index,assignment,misc]
    elif loses == "no room":
        mailbox.os.posix_fallocate = full  # type: ignore[attr-defined]
    elif rank == 1:  # "one of them"
        mailbox._map = lambda made, size: None
    opened = Mailbox.open(BATCH, ITEMS, dist.group.WORLD)
    return opened, list(folder.iterdir())


@pytest.mark.parametrize("loses", ["another file", "no room", "one of them"])
def test_there_is_none_where_memory_is_not_shared(loses: str, tmp_path: Path, processes: ForkServerContext) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    group = Ranks(processes, 2, tmp_path / "store", without, folder, loses)
    for rank in range(2):
        opened, left = group.result(rank)
        assert opened is None
        assert rank > 0 or left == []
