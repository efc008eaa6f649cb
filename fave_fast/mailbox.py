"""Requests from rank 0 to the other ranks of its host, one at a time, through shared memory that they watch.

A socket wakes a waiting process: gloo's broadcast of 4 KiB took 310 us between two processes of a virtual machine with
two cores, a tenth of what a GPU needs for fifty million items. A word of shared memory is seen within a microsecond by
whoever spins on it.

    mailbox = Mailbox.open(batch, items, group)      # all ranks
    mailbox.post(request)                            # rank 0
    request = mailbox.next(until=work.is_completed)  # the others
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from fave_fast.graphs import Histories
from fave_fast.ops.registry import why_no_extension

_HEADER = 6  # words of 8 bytes: the count of requests, a token that tells this memory from other, four numbers
_MEMORY = Path("/dev/shm")
# A rank that waits spins for so long; then it looks about twenty times a millisecond; then once.
_SPINS, _LOOKS = 2e-3, 1.0
_OFTEN, _SELDOM = 5e-5, 1e-3  # seconds between two looks


class Posted(NamedTuple):
    """A request for a captured graph.

    Attributes:
        batch: of the graph.
        histories: numbers of the whole catalogue.
        exclude: leave each history's own items out.
    """

    batch: int
    histories: Histories
    exclude: bool


class Mailbox:
    """Room for one request. Rank 0 may post the next one when all others have answered this one."""

    def __init__(self, memory: mmap.mmap) -> None:
        """Over memory that all ranks map, which holds zeros but for the token."""
        self._words: Any = np.frombuffer(memory, np.int64)
        self._flag: int = self._words.ctypes.data
        self._count = 0

    @classmethod
    def open(cls, batch: int, items: int, group: dist.ProcessGroup) -> Mailbox | None:
        """The same mailbox on all ranks of `group`; a collective.

        Args:
            batch: histories that a request may have.
            items: items that they may have in all.
            group: of CPUs.

        Returns:
            None, on all ranks, where they do not share memory or one is without the extension.
        """
        size = 8 * (_HEADER + batch + 1 + (items + 1) // 2)
        said = [_make(size) if dist.get_rank(group) == 0 else None]
        mine = said[0]
        every = [False] * dist.get_world_size(group)
        try:
            dist.broadcast_object_list(said, 0, group)
            memory = _map(said[0], size)
            dist.all_gather_object(every, memory is not None, group)
        finally:
            if mine is not None:
                mine[0].unlink()  # it lives on as long as it is mapped, and no longer
        return cls(memory) if memory is not None and all(every) else None

    def post(self, request: Posted) -> None:
        """Give the others a request."""
        from fave_fast import _C

        (ids, offsets), words = request.histories, self._words
        payload = words[_HEADER:]
        payload[: len(offsets)] = offsets
        payload[len(offsets) :].view(np.int32)[: len(ids)] = ids
        words[2:_HEADER] = request.batch, len(offsets), len(ids), request.exclude
        self._count = self._after()
        _C.raise_flag(self._flag, self._count)

    def next(self, until: Callable[[], bool]) -> Posted | None:
        """The next request, waited for; None as soon as `until` is true."""
        from fave_fast import _C

        began = time.monotonic()
        while not until():
            idle = time.monotonic() - began
            try:
                _C.wait_flag(self._flag, self._after(), 0, _SPINS / 4 if idle < _SPINS else 0.0)
            except TimeoutError:
                if idle >= _SPINS:
                    time.sleep(_OFTEN if idle < _LOOKS else _SELDOM)
                continue
            self._count = self._after()
            return self._read()
        return None

    def _after(self) -> int:
        return (self._count + 1) % (1 << 32)

    def _read(self) -> Posted:
        batch, bounds, items, exclude = self._words[2:_HEADER].tolist()
        payload = self._words[_HEADER:]
        ids = payload[bounds:].view(np.int32)[:items]
        return Posted(batch, Histories(ids.copy(), payload[:bounds].copy()), bool(exclude))


def _make(size: int) -> tuple[Path, bytes] | None:
    """A new file of `size` zeros but for a token, in memory where the system has such a place; and the token."""
    token = secrets.token_bytes(8)
    try:
        number, name = tempfile.mkstemp(prefix="fave-fast-", dir=_MEMORY if _MEMORY.is_dir() else None)
    except OSError:
        return None
    path = Path(name)
    try:
        with os.fdopen(number, "r+b") as file:
            os.posix_fallocate(number, 0, size)  # else a write to mapped memory would end the process where it is full
            file.seek(8)
            file.write(token)
    except OSError:
        path.unlink()
        return None
    return path, token


def _map(made: tuple[Path, bytes] | None, size: int) -> mmap.mmap | None:
    """The file's memory, if it is here and the file that rank 0 has made."""
    if made is None or why_no_extension() is not None:
        return None
    path, token = made
    try:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):  # another host's path, or another file
        return None
    return memory if memory[8:16] == token else None
