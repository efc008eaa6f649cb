"""Several processes at one training or evaluation, as `torchrun` starts them: a rank is one of them.

Tensors on CPUs go through gloo, those on GPUs through NCCL. NCCL's peers do not notice that a process died and wait for
minutes, so that each rank also keeps a receive from each other one pending: gloo fails it at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fave_fast.errors import FailedElsewhere, InputError

DONE, _INTERRUPTED = 0, 1  # a rank's last word to the others
_FOREVER = timedelta(days=1000)
_NOTICING = 2.0  # seconds, at most, from an error of a peer's death to the knowledge of it

_logger = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)


def is_first() -> bool:
    """Whether this process speaks for its launch: it is the only one, or rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def local_number() -> int | None:
    """Which of this machine's ranks this process is, from 0; None where it is the only one of its launch."""
    return int(os.environ.get("LOCAL_RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def unfinished() -> bool:
    """Whether this process joined others and did not leave them as it should."""
    return dist.is_available() and dist.is_initialized()


@dataclass(frozen=True)
class Ranks:
    """All processes at one job, seen from one of them. With several, all call the same methods in the same order."""

    number: int = 0  # this one
    count: int = 1
    watch: _Watch | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.number == 0

    def share(self, total: int) -> tuple[slice, float]:
        """Rows of a batch of `total` that are this rank's, and what share of it they are.

        Every count-th row, so that ranks have like lengths where the batch is sorted by length. A rank without any gets
        row 0 and the share 0: it has to take part.
        """
        size = len(range(self.number, total, self.count))
        return (slice(self.number, None, self.count), size / total) if size else (slice(0, 1), 0.0)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; on a GPU the host does not wait for it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks."""
        return self.sum(tensor.clone()) / self.count if self.count > 1 else tensor

    def ask_any(self, *flags: bool) -> Callable[[], list[bool]]:
        """For each flag whether it is set on any rank: asked now, answered when the result is called.

        The exchange goes on by itself in between; gloo's takes 0.4 ms between two processes of a virtual machine.
        """
        if self.count == 1:
            return lambda: list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(raised, dist.ReduceOp.MAX, async_op=True)
        assert work is not None

        def answer() -> list[bool]:
            work.wait()
            return [bool(one) for one in raised]

        return answer

    def stacked(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors, of one shape and on the CPU: [count, ...]."""
        if self.count == 1:
            return tensor[None]
        every = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(every, tensor)
        return torch.stack(every)

    def averaged(self, module: nn.Module, unused: bool) -> nn.Module:
        """`module` with gradients that a backward pass averages over ranks; `unused`: some parameters may get none.

        Parameters that are frozen later must be so before.
        """
        if self.count == 1:
            return module
        return DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=unused)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends well on all ranks or on none, and in which no rank waits for another.

        Raises:
            InputError: this rank's own, where it is the first one with an error.
            FailedElsewhere: another rank's.
            SystemExit: as in the block.
        """
        own: InputError | SystemExit | None = None
        try:
            yield
        except (InputError, SystemExit) as error:
            own = error
        if self.count > 1:
            said: list[str | None] = [None] * self.count
            dist.all_gather_object(said, None if own is None else str(own))
            failed = [number for number, words in enumerate(said) if words is not None]
            if failed and self.watch is not None:
                self.watch.leave()
            if failed and failed[0] != self.number and not isinstance(own, SystemExit):
                own = FailedElsewhere(f"rank {failed[0]}: {said[failed[0]]}")
        if own is not None:
            raise own


ALONE = Ranks()


def hear(peer: int, group: dist.ProcessGroup) -> int:
    """Another rank's last word, waited for: `group` is of gloo, which knows at once that a process ended.

    Raises:
        RuntimeError: it ended without one.
    """
    word = torch.zeros(1, dtype=torch.uint8)
    dist.recv(word, src=peer, group=group)
    return int(word)


def say(word: int, peer: int, group: dist.ProcessGroup) -> None:
    """A last word to another rank that may be gone already."""
    with contextlib.suppress(RuntimeError):
        dist.send(torch.tensor([word], dtype=torch.uint8), dst=peer, group=group)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """All ranks of this launch, as torchrun's environment variables name them; without those, this process alone.

    A rank that ends before the others makes them end, too, within seconds, with a line that says so.
    """
    if local_number() is None:
        yield ALONE
        return
    # Which device is not known yet. What is on no GPU never meets NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")
    watch = _Watch(dist.get_rank(), dist.get_world_size())
    try:
        yield Ranks(watch.number, watch.count, watch)
    except KeyboardInterrupt:
        watch.say(_INTERRUPTED)
        raise
    except RuntimeError:
        watch.look()  # is a peer's end the reason?
        raise
    watch.leave()


class _Watch:
    """Ends this process when another rank ends before it should."""

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count
        self._group = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._peers = [peer for peer in range(count) if peer != number]
        self._threads = [threading.Thread(target=self._wait_for, args=(peer,), daemon=True) for peer in self._peers]
        self._gone = False
        for thread in self._threads:
            thread.start()

    def _wait_for(self, peer: int) -> None:
        try:
            word = hear(peer, self._group)
        except RuntimeError:
            _logger.error(
                "error: rank %d of %d ended before the run did, so rank %d ends, too: rank %d's last lines or the "
                "launcher's report say why", peer, self.count, self.number, peer,
            )  # fmt: skip
            _end(1)
        if word == _INTERRUPTED:
            _end(130)

    def say(self, word: int) -> None:
        """A last word to the others."""
        for peer in self._peers:
            say(word, peer, self._group)

    def look(self) -> None:
        """Give the threads the time to notice that a peer is gone, which ends this process."""
        for thread in self._threads:
            thread.join(_NOTICING / len(self._threads))

    def leave(self) -> None:
        """End together with the others: when all have come here."""
        if self._gone:
            return
        self._gone = True
        self.say(DONE)
        for thread in self._threads:
            thread.join()
        dist.destroy_process_group()


def _end(code: int) -> NoReturn:
    """At once: the main thread may wait for a GPU that waits for who is gone."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(code)
