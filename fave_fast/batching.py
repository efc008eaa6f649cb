"""MicroBatcher: single requests from many threads, or from asyncio, answered by few calls of one `Recommender`.

While the engine works, requests wait; what waits when it is done goes in as one batch. So batches grow with the load
by themselves, and a request that comes alone is never held back (unless `max_wait_us` says so). A caller of `recommend`
who finds nobody else asks the engine in their own thread: 2 us more than asking it directly, where the worker's way,
with its two thread switches, takes 35 to 88 (two threads that pass a lock to and fro take 17 to 49 there; two virtual
cores, `python -m bench.batching`).

What shares a call: requests that agree in `exclude_history` and whose k are of one class: up to the batcher's own k, or
else between the same powers of two. The call asks for the largest k among them and each gets its first k items. That is
exact: the order of a list (score down, then number up) has no ties, so the best k of the best K are the best k. And it
is cheap: longer lists keep nobody off the CUDA graphs that were captured for the batcher's k, cost nobody more than
twice the length asked for, and beyond what the kernels take (`score_topk.MAX_K`, a power of two) drag nobody to another
backend with other rounding.

When a call fails, its requests are asked for again in halves, down to one by one, so that a bad request gets the error
it would get alone and its neighbours their answers: about 2 log2(batch) calls more for one bad request. Looking at each
id before batching would cost every good request as much as mapping it does, and would find only the errors that it
knows of.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Protocol

import numpy as np

from fave_fast.catalogue import History, ItemId
from fave_fast.engine import Recommendation
from fave_fast.errors import Closed, InputError, Overloaded
from fave_fast.ops.score_topk import MAX_K

_EXIT_SECONDS = 5.0  # that the end of the program waits for the call in progress
_NEVER = sys.maxsize

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a `MicroBatcher` asks of its recommender."""

    def recommend(
        self,
        histories: Sequence[History],
        k: int = ...,
        exclude_history: bool = ...,
        deny: Iterable[ItemId] | None = ...,
    ) -> list[Recommendation]:
        """As `Recommender.recommend`."""


@dataclass(frozen=True)
class Statistics:
    """What a `MicroBatcher` did so far. A request counts as one of the outcomes before its future has it."""

    requests: int  # accepted
    answered: int
    failed: int  # got an exception
    cancelled: int  # before their turn
    refused: int  # `Overloaded` or `Closed` at submit; not among the requests
    waiting: int  # at this moment, those in the engine not counted
    batches: int  # answered calls of the engine
    batch_sizes: Mapping[int, int]  # requests of a call -> answered calls
    waits_us: Mapping[int, int]  # upper bound, a power of two -> requests whose turn came after at most so long
    longest_wait_us: float
    total_wait_us: float


class _Request(Future[Recommendation]):
    """A future that leaves the queue as soon as it is cancelled."""

    def __init__(self, owner: MicroBatcher, history: History, k: int, exclude_history: bool) -> None:
        super().__init__()
        self.owner = owner
        self.history = history
        self.k = k
        self.exclude_history = exclude_history
        self.submitted = time.perf_counter_ns()
        self.started = False

    @property
    def kind(self) -> tuple[bool, int]:
        usual = min(self.owner.k, MAX_K)
        return self.exclude_history, usual if self.k <= usual else 1 << (self.k - 1).bit_length()

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled and self.owner._withdraw(self):
            self.start()
        return cancelled

    def start(self) -> bool:
        """Once, by whoever took the request off the queue; False if it was cancelled, which whoever waits now hears."""
        self.started = True
        return self.set_running_or_notify_cancel()


class MicroBatcher:
    """One worker thread that answers single requests by calls of one recommender, many requests a call.

        with MicroBatcher(Recommender.from_pretrained("model.pt", device="cuda")) as batcher:
            answer = batcher.recommend(["item-17", "item-4"])
            future = batcher.submit(["item-9"], k=5)
            print(answer.items, future.result().items)

    Every method may be called from any thread. In asyncio:

        answer = await asyncio.wrap_future(batcher.submit(history))

    where cancelling the task cancels the request. Callbacks of a future run in the worker (`add_done_callback`): while
    they do, nobody is answered.

    Answers are those of `Recommender.recommend` for the history alone, as exactly as that gives a history the same
    answer in any batch. A future that is cancelled before its turn never runs. Closing answers what waits, or refuses
    it, and waits for the worker; the end of the program and an end of the worker by an error leave no future open
    either. After a fork the child's copy is closed and answers nothing; futures made before are the parent's.
    """

    def __init__(
        self,
        recommender: Engine,
        *,
        max_batch: int = 64,
        max_wait_us: int = 0,
        max_queue: int = 1024,
        k: int = 20,
        exclude_history: bool = True,
        deny: Iterable[ItemId] | None = None,
    ) -> None:
        """Start the worker.

        Args:
            recommender: only its `recommend` is used, by one thread at a time.
            max_batch: requests of one call, at most.
            max_wait_us: microseconds that a request waits for company, at most, while fewer than `max_batch` wait.
            max_queue: requests that may wait; one more is refused.
            k: length of the lists, K, where a request names none; `Recommender.warmup` should be for this or more.
            exclude_history: never recommend an item of the user's own history, where a request does not say.
            deny: original ids that nobody gets; unknown ones change nothing.

        Raises:
            InputError: k, max_batch or max_queue below 1, or max_wait_us below 0.
        """
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_wait_us", max_wait_us, 0),
            ("max_queue", max_queue, 1),
            ("k", k, 1),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; expected a whole number of at least {least}")
        self.recommender = recommender
        self.max_batch, self.max_wait_us, self.max_queue = max_batch, max_wait_us, max_queue
        self.k, self.exclude_history = k, exclude_history
        self.deny = None if deny is None else tuple(deny)
        self._reset()
        self._worker = threading.Thread(target=self._work, name="fave_fast.MicroBatcher", daemon=True)
        self._worker.start()
        _open.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: OrderedDict[_Request, None] = OrderedDict()  # a cancelled one leaves the middle at no cost
        self._wake_at = _NEVER  # how many must wait for the worker to be woken; 1: it is idle
        self._engaged = False  # a caller's thread uses the engine
        self._closed: str | None = None  # the reason
        self._error: BaseException | None = None  # that ended the worker
        self._counts: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._waits: Counter[int] = Counter()
        self._longest_wait = self._total_wait = 0  # ns

    def submit(
        self, history: History, *, k: int | None = None, exclude_history: bool | None = None
    ) -> Future[Recommendation]:
        """Ask for the K best next items of one history; never waits.

        Args:
            history: original item ids, oldest first; copied. Arrays of whole numbers are the fastest.
            k: length of the list; None: the batcher's.
            exclude_history: None: the batcher's.

        Returns:
            The answer to come, or the exception that `Recommender.recommend` raises for this history alone.

        Raises:
            InputError: k below 1.
            Overloaded: `max_queue` requests wait.
            Closed: the batcher is closed, or its worker ended by an error, which is the cause.
        """
        request = _Request(self, _copied(history), *self._options(k, exclude_history))
        with self._lock:
            if self._closed is not None or len(self._waiting) >= self.max_queue:
                self._counts["refused"] += 1
                raise self._refusal()
            self._counts["requests"] += 1
            self._waiting[request] = None
            if len(self._waiting) >= self._wake_at:
                self._wake_at = _NEVER
                self._changed.notify()
        return request

    def recommend(
        self,
        history: History,
        *,
        k: int | None = None,
        exclude_history: bool | None = None,
        timeout: float | None = None,
    ) -> Recommendation:
        """The K best next items of one history, waited for; a request that is given up is cancelled.

        Without a timeout and `max_wait_us`, a caller who finds the worker idle calls the engine in their own thread.

        Args:
            history: as in `submit`, as are k and exclude_history.
            k: length of the list.
            exclude_history: never recommend an item of the history.
            timeout: seconds to wait, at most.

        Raises:
            TimeoutError: no answer within `timeout`.
            InputError: as `Recommender.recommend`.
            Overloaded: as `submit`.
            Closed: as `submit`; or the batcher was closed without draining.
            RuntimeError: the caller is a future's callback, which would wait for itself.
        """
        if threading.current_thread() is self._worker:
            raise RuntimeError("recommend was called by the batcher's worker, in a callback; expected submit there")
        if timeout is None and self.max_wait_us == 0:
            history, options = _copied(history), self._options(k, exclude_history)
            answer = self._recommend_here(history, *options)
            if answer is not None:
                return answer
        future = self.submit(history, k=k, exclude_history=exclude_history)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    @property
    def statistics(self) -> Statistics:
        """A snapshot."""
        with self._lock:
            counts = self._counts
            return Statistics(
                requests=counts["requests"],
                answered=counts["answered"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                refused=counts["refused"],
                waiting=len(self._waiting),
                batches=self._batch_sizes.total(),
                batch_sizes=MappingProxyType(dict(sorted(self._batch_sizes.items()))),
                waits_us=MappingProxyType({1 << bits: count for bits, count in sorted(self._waits.items())}),
                longest_wait_us=self._longest_wait / 1e3,
                total_wait_us=self._total_wait / 1e3,
            )

    @property
    def closed(self) -> bool:
        """Whether requests are refused for good: it was closed, or its worker ended by an error."""
        return self._closed is not None

    def close(self, drain: bool = True) -> None:
        """Take no more requests, and return when none is open. Again, or from several threads, is no error.

        Args:
            drain: answer what waits; False: it gets `Closed`, and only the call in progress is finished.
        """
        refused: list[_Request] = []
        with self._lock:
            self._closed = self._closed or "the batcher is closed"
            if not drain:
                refused = self._take(len(self._waiting))
            self._changed.notify()
        self._fail(refused, Closed("the batcher was closed, without draining, while the request waited"))
        if threading.current_thread() is not self._worker:  # a callback of a future may close
            self._worker.join()
        _open.discard(self)

    def __enter__(self) -> MicroBatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _options(self, k: int | None, exclude_history: bool | None) -> tuple[int, bool]:
        k = self.k if k is None else k
        if k < 1:
            raise InputError(f"k is {k}; expected a whole number of at least 1")
        return k, self.exclude_history if exclude_history is None else exclude_history

    def _recommend_here(self, history: History, k: int, exclude_history: bool) -> Recommendation | None:
        """The answer by this thread; None where the worker is not idle."""
        engaged, outcome = False, "failed"
        try:
            with self._lock:
                if self._wake_at != 1 or self._waiting or self._closed is not None:
                    return None
                self._wake_at, self._engaged = _NEVER, True
                engaged = True
            (answer,) = self.recommender.recommend([history], k, exclude_history, self.deny)
            outcome = "answered"
            return answer
        finally:
            if engaged:
                self._disengage(outcome)

    def _disengage(self, outcome: str) -> None:
        with self._lock:
            self._counts["requests"] += 1
            self._counts[outcome] += 1
            self._batch_sizes[1] += outcome == "answered"
            self._waits[0] += 1
            self._wake_at, self._engaged = 1, False
            if self._waiting or self._closed is not None:
                self._wake_at = _NEVER
                self._changed.notify()

    def _refusal(self) -> Exception:
        if self._closed is None:
            return Overloaded(
                f"{len(self._waiting)} requests wait, and max_queue is {self.max_queue}; expected to be asked again "
                "later, or by fewer callers, or a larger max_queue or max_batch"
            )
        refusal = Closed(f"{self._closed}; expected a request before that, or a new MicroBatcher")
        refusal.__cause__ = self._error
        return refusal

    def _withdraw(self, request: _Request) -> bool:
        """Take a cancelled request off the queue, if it is still there."""
        with self._lock:
            if request not in self._waiting:
                return False
            del self._waiting[request]
            self._counts["cancelled"] += 1
            return True

    def _take(self, count: int) -> list[_Request]:
        """The `count` oldest off the queue; the lock is held."""
        return [self._waiting.popitem(last=False)[0] for _ in range(count)]

    def _work(self) -> None:
        batch: list[_Request] = []
        try:
            while batch := self._next():
                self._answer(batch)
                batch.clear()  # while this thread waits, it keeps no answer alive
        except BaseException as error:
            _log.critical("the micro-batcher's worker ended by an error", exc_info=error)
            with self._lock:
                self._closed, self._error = "the batcher's worker ended by an error", error
                batch += self._take(len(self._waiting))
            self._fail(batch, error)

    def _next(self) -> list[_Request]:
        """The next batch, waited for; none when the batcher is closed and nothing waits."""
        with self._lock:
            while (pause := self._pause()) != 0:
                self._wake_at = _NEVER if self._engaged else self.max_batch if self._waiting else 1
                self._changed.wait(pause)
            self._wake_at = _NEVER
            return self._take(min(len(self._waiting), self.max_batch))

    def _pause(self) -> float | None:
        """Seconds until a batch may start; None: until somebody calls."""
        if self._engaged:
            return None
        if self._closed is not None or len(self._waiting) >= self.max_batch:
            return 0
        if not self._waiting or self.max_wait_us == 0:
            return 0 if self._waiting else None
        oldest = next(iter(self._waiting))
        waited = time.perf_counter_ns() - oldest.submitted
        return max(0, self.max_wait_us * 1000 - waited) / 1e9

    def _answer(self, batch: list[_Request]) -> None:
        alive = [request for request in batch if request.start()]
        now = time.perf_counter_ns()
        waits = [now - request.submitted for request in alive]
        with self._lock:
            self._counts["cancelled"] += len(batch) - len(alive)
            self._waits.update([(wait // 1000).bit_length() for wait in waits])
            self._longest_wait = max(self._longest_wait, *waits, 0)
            self._total_wait += sum(waits)
        groups: dict[tuple[bool, int], list[_Request]] = {}
        for request in alive:
            groups.setdefault(request.kind, []).append(request)
        for group in groups.values():
            self._call(group)

    def _call(self, group: list[_Request]) -> None:
        """Answer requests of one kind; where that fails, each half by itself."""
        k = max(request.k for request in group)
        histories = [request.history for request in group]
        try:
            answers = self.recommender.recommend(histories, k, group[0].exclude_history, self.deny)
            if len(answers) != len(group):
                raise RuntimeError(f"the recommender gave {len(answers)} answers to {len(group)} histories")
        except Exception as error:
            if len(group) == 1:
                self._fail(group, error)
                del group  # which the error's trace would hold, and the request the error
                return
            answers = None
        if answers is None:
            middle = len(group) // 2
            self._call(group[:middle])
            self._call(group[middle:])
            return
        with self._lock:
            self._counts["answered"] += len(group)
            self._batch_sizes[len(group)] += 1
        for request, answer in zip(group, answers, strict=True):
            request.set_result(_first(answer, request.k))

    def _fail(self, requests: Iterable[_Request], error: BaseException) -> None:
        for request in requests:
            if not request.started and not request.start():
                outcome = "cancelled"
            elif request.done():
                continue
            else:
                outcome = "failed"
            with self._lock:
                self._counts[outcome] += 1
            if outcome == "failed":
                request.set_exception(error)


def _copied(history: History) -> History:
    return history.copy() if isinstance(history, np.ndarray) else tuple(history)


def _first(answer: Recommendation, k: int) -> Recommendation:
    if len(answer.items) <= k:
        return answer
    return answer._replace(items=answer.items[:k], scores=answer.scores[:k])


_open: weakref.WeakSet[MicroBatcher] = weakref.WeakSet()


def _end() -> None:
    """The program ends: nobody is left who could wait for an answer but threads that end with it."""
    for batcher in list(_open):
        with batcher._lock:
            batcher._closed = batcher._closed or "the program ends"
            refused = batcher._take(len(batcher._waiting))
            batcher._changed.notify()
        batcher._fail(refused, Closed("the program ended while the request waited"))
        batcher._worker.join(_EXIT_SECONDS)


def _forked() -> None:
    """In a child, which has no worker: its locks may be held by threads that are not there."""
    for batcher in list(_open):
        batcher._reset()
        batcher._closed = "the batcher belongs to the process that this one was forked from"
    _open.clear()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
