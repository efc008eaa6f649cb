from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fave_fast import checkpoint as checkpoints
from fave_fast.batching import MicroBatcher
from fave_fast.engine import History, ItemId, Recommendation, Recommender
from fave_fast.errors import Closed, InputError, Overloaded
from fave_fast.ops.score_topk import MAX_K

PATIENCE = 60.0  # seconds until a test gives up; no test waits for time to pass
HOUR_US = 3_600_000_000


def answer_to(history: History, k: int, exclude_history: bool) -> Recommendation:
    """A list that tells what was asked; of any K > k, the first k are the list of k."""
    first = 1000 * int(history[0])
    scores = [-float(rank) for rank in range(k)]
    return Recommendation([first + rank for rank in range(k)], scores, int(exclude_history), False)


class Stub:
    """An engine that writes down its calls; each waits to be let through where `held`."""

    def __init__(self, *, held: bool = False, most: int = 10**9, end: BaseException | None = None) -> None:
        self.calls: list[tuple[list[int], int, bool]] = []
        self.threads: list[threading.Thread] = []
        self.denied: list[Iterable[ItemId] | None] = []
        self._held, self._most, self._end = held, most, end
        self._entered, self._allowed = threading.Semaphore(0), threading.Semaphore(0)

    def recommend(
        self,
        histories: Sequence[History],
        k: int = 20,
        exclude_history: bool = True,
        deny: Iterable[ItemId] | None = None,
    ) -> list[Recommendation]:
        self.calls.append(([int(history[0]) for history in histories], k, exclude_history))
        self.threads.append(threading.current_thread())
        self.denied.append(deny)
        self._entered.release()
        if self._held:
            assert self._allowed.acquire(timeout=PATIENCE)
        if self._end is not None:
            raise self._end
        if len(histories) > self._most:
            raise MemoryError(f"{len(histories)} histories")
        for history in histories:
            if "bad" in history:
                raise InputError(f"history {history[0]} is bad")
        return [answer_to(history, k, exclude_history) for history in histories]

    def wait_for_call(self) -> None:
        assert self._entered.acquire(timeout=PATIENCE)

    def let_through(self, calls: int = 1000) -> None:
        self._allowed.release(calls)


@pytest.fixture
def held() -> Iterator[Stub]:
    stub = Stub(held=True)
    yield stub
    stub.let_through()


def busy(stub: Stub, **options: Any) -> tuple[MicroBatcher, Future[Recommendation]]:
    """A batcher whose engine works on history 0 until it is let through."""
    batcher = MicroBatcher(stub, **options)
    first = batcher.submit([0])
    stub.wait_for_call()
    return batcher, first


def result(future: Future[Recommendation]) -> Recommendation:
    return future.result(PATIENCE)


def test_what_waits_while_the_engine_works_is_a_batch(held: Stub) -> None:
    batcher, first = busy(held, max_batch=4)
    waiting = [batcher.submit([number, 7]) for number in range(1, 7)]
    assert batcher.statistics.waiting == 6
    held.let_through()
    assert result(first) == answer_to([0], 20, True)
    assert [result(future) for future in waiting] == [answer_to([number, 7], 20, True) for number in range(1, 7)]
    batcher.close()
    assert held.calls == [([0], 20, True), ([1, 2, 3, 4], 20, True), ([5, 6], 20, True)]
    found = batcher.statistics
    assert (found.requests, found.answered, found.waiting, found.batches) == (7, 7, 0, 3)
    assert found.batch_sizes == {1: 1, 2: 1, 4: 1}
    assert sum(found.waits_us.values()) == 7
    assert found.longest_wait_us <= max(found.waits_us)


def test_a_history_is_copied(held: Stub) -> None:
    batcher, _ = busy(held)
    history: list[ItemId] = [3]
    array = np.array([5])
    waiting = [batcher.submit(history), batcher.submit(array)]
    history[0] = array[0] = 4
    held.let_through()
    assert [result(future) for future in waiting] == [answer_to([3], 20, True), answer_to([5], 20, True)]
    batcher.close()


def test_a_longer_usual_list_than_the_kernels_take(held: Stub) -> None:
    batcher, _ = busy(held, k=2 * MAX_K)
    waiting = [batcher.submit([1], k=5), batcher.submit([2]), batcher.submit([3], k=MAX_K)]
    held.let_through()
    assert [len(result(future).items) for future in waiting] == [5, 2 * MAX_K, MAX_K]
    batcher.close()
    assert held.calls[1:] == [([1, 3], MAX_K, True), ([2], 2 * MAX_K, True)]


def test_options_share_a_call_where_answers_stay_exact(held: Stub) -> None:
    batcher, _ = busy(held, k=20, exclude_history=False, deny=iter(["x"]))
    asked = [
        (5, True),
        (None, None),
        (20, True),
        (64, True),
        (33, True),
        (MAX_K, True),
        (MAX_K + 1, True),
        (1, False),
        (21, True),
    ]
    waiting = [batcher.submit([at], k=k, exclude_history=exclude) for at, (k, exclude) in enumerate(asked)]
    held.let_through()
    for at, (k, exclude) in enumerate(asked):
        assert result(waiting[at]) == answer_to([at], 20 if k is None else k, bool(exclude))
    batcher.close()
    assert held.calls[1:] == [
        ([0, 2], 20, True),
        ([1, 7], 20, False),
        ([3, 4], 64, True),
        ([5], MAX_K, True),  # the kernels' largest; longer lists are another backend's, with other rounding
        ([6], MAX_K + 1, True),
        ([8], 21, True),
    ]
    assert set(map(tuple, held.denied)) == {("x",)}  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_queue": 0}, {"k": 0}, {"max_wait_us": -1}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(options))} is .*; expected a whole number of at least"):
        MicroBatcher(Stub(), **options)  # type: ignore[arg-type]


def test_a_request_for_no_items_is_refused_at_once() -> None:
    with MicroBatcher(Stub()) as batcher:
        for ask in (batcher.submit, batcher.recommend):
            with pytest.raises(InputError, match="k is 0; expected a whole number of at least 1"):
                ask([1], k=0)
        assert batcher.statistics.requests == 0


def test_a_full_queue_refuses_at_once(held: Stub) -> None:
    batcher, first = busy(held, max_queue=2)
    waiting = [batcher.submit([1]), batcher.submit([2])]
    with pytest.raises(Overloaded, match="2 requests wait, and max_queue is 2; expected"):
        batcher.submit([3])
    assert waiting[0].cancel()
    waiting.append(batcher.submit([4]))  # in the place of the cancelled one
    with pytest.raises(Overloaded):
        batcher.recommend([5])
    held.let_through()
    assert [result(future).items[0] for future in (first, *waiting[1:])] == [0, 2000, 4000]
    batcher.close()
    assert held.calls[1:] == [([2, 4], 20, True)]
    found = batcher.statistics
    assert (found.requests, found.answered, found.cancelled, found.refused) == (4, 3, 1, 2)


def test_a_cancelled_request_never_runs(held: Stub) -> None:
    batcher, first = busy(held)
    waiting = [batcher.submit([number]) for number in (1, 2, 3)]
    assert waiting[1].cancel()
    assert waiting[1].cancel()
    assert futures.wait([waiting[1]], PATIENCE).done == {waiting[1]}
    assert not first.cancel()  # it has begun
    held.let_through()
    assert result(first) == answer_to([0], 20, True)
    assert result(waiting[2]) == answer_to([3], 20, True)
    batcher.close()
    assert held.calls[1:] == [([1, 3], 20, True)]
    assert batcher.statistics.cancelled == 1


def test_a_bad_request_gets_its_own_error_and_harms_nobody(held: Stub) -> None:
    batcher, _ = busy(held)
    waiting = [batcher.submit([at, "bad"] if at in (3, 9) else [at]) for at in range(16)]
    held.let_through()
    for at, future in enumerate(waiting):
        if at in (3, 9):
            with pytest.raises(InputError, match=f"^history {at} is bad$"):
                result(future)
        else:
            assert result(future) == answer_to([at], 20, True)
    batcher.close()
    assert (batcher.statistics.answered, batcher.statistics.failed) == (15, 2)
    errors = [waiting[at].exception() for at in (3, 9)]
    assert errors[0] is not errors[1]


def test_a_batch_that_is_too_much_is_taken_in_parts(held: Stub) -> None:
    held._most = 3
    batcher, _ = busy(held)
    waiting = [batcher.submit([at]) for at in range(8)]
    held.let_through()
    assert [result(future) for future in waiting] == [answer_to([at], 20, True) for at in range(8)]
    batcher.close()
    assert batcher.statistics.failed == 0


def test_too_few_answers_are_no_answers() -> None:
    class Short(Stub):
        def recommend(self, *arguments: Any, **options: Any) -> list[Recommendation]:
            return []

    with MicroBatcher(Short()) as batcher, pytest.raises(RuntimeError, match="0 answers to 1 histories"):
        result(batcher.submit([1]))


def test_closing_answers_what_waits(held: Stub) -> None:
    batcher, first = busy(held)
    second = batcher.submit([1])
    held.let_through()
    batcher.close()
    assert first.done()
    assert second.done()
    assert result(second) == answer_to([1], 20, True)
    batcher.close()
    batcher.close(drain=False)
    for ask in (batcher.submit, batcher.recommend):
        with pytest.raises(Closed, match="is closed; expected"):
            ask([2])
    assert batcher.statistics.refused == 2


def test_closing_without_draining_refuses_what_waits(held: Stub) -> None:
    batcher, first = busy(held)
    second, third = batcher.submit([1]), batcher.submit([2])
    third.cancel()
    closing = threading.Thread(target=batcher.close, args=(False,))
    closing.start()
    with pytest.raises(Closed, match="while the request waited"):
        result(second)
    held.let_through()
    closing.join(PATIENCE)
    assert result(first) == answer_to([0], 20, True)
    assert held.calls == [([0], 20, True)]
    assert (batcher.statistics.failed, batcher.statistics.cancelled) == (1, 1)


def test_a_second_close_may_stop_the_drain_of_the_first(held: Stub) -> None:
    batcher, first = busy(held)
    second = batcher.submit([1])
    closings = [threading.Thread(target=batcher.close, args=(drain,)) for drain in (True, False)]
    closings[0].start()
    while batcher._closed is None:
        assert not first.done()
    closings[1].start()
    with pytest.raises(Closed):
        result(second)
    held.let_through()
    for closing in closings:
        closing.join(PATIENCE)
        assert not closing.is_alive()


def test_the_end_of_the_worker_reaches_everybody(caplog: pytest.LogCaptureFixture) -> None:
    end = SystemExit("enough")
    stub = Stub(held=True, end=end)
    batcher, first = busy(stub)
    waiting = [batcher.submit([number]) for number in range(5)]
    waiting[2].cancel()
    stub.let_through()
    for future in (first, *waiting[:2], *waiting[3:]):
        assert future.exception(PATIENCE) is end
    batcher.close()
    assert len(stub.calls) == 1
    with pytest.raises(Closed, match="worker ended by an error") as refusal:
        batcher.submit([1])
    assert refusal.value.__cause__ is end
    assert (batcher.statistics.failed, batcher.statistics.cancelled) == (5, 1)
    assert "worker ended by an error" in caplog.text


def test_the_end_of_the_worker_in_a_callback_leaves_answers(caplog: pytest.LogCaptureFixture) -> None:
    def end(_: Future[Recommendation]) -> None:
        raise KeyboardInterrupt

    stub = Stub(held=True)
    batcher, first = busy(stub)
    first.add_done_callback(end)
    second = batcher.submit([1])
    stub.let_through()
    assert result(first) == answer_to([0], 20, True)
    assert isinstance(second.exception(PATIENCE), KeyboardInterrupt)
    batcher.close()
    assert batcher.statistics.answered == 1


def test_company_is_waited_for_until_the_batch_is_full() -> None:
    stub = Stub()
    with MicroBatcher(stub, max_batch=3, max_wait_us=HOUR_US) as batcher:
        given_up = batcher.submit([9])
        given_up.cancel()
        waiting = [batcher.submit([number]) for number in range(3)]
        assert [result(future).items[0] for future in waiting] == [0, 1000, 2000]
        last = batcher.submit([3])
    assert result(last).items[0] == 3000  # closing waits for no company
    assert stub.calls == [([0, 1, 2], 20, True), ([3], 20, True)]


def test_nobody_waits_for_company_for_ever() -> None:
    with MicroBatcher(Stub(), max_wait_us=1) as batcher:
        assert result(batcher.submit([1])) == answer_to([1], 20, True)
        assert batcher.recommend([2]) == answer_to([2], 20, True)


def test_a_caller_who_gives_up_cancels(held: Stub) -> None:
    batcher, _ = busy(held)
    with pytest.raises(TimeoutError):
        batcher.recommend([1], timeout=0)
    assert batcher.statistics.waiting == 0
    held.let_through()
    assert batcher.recommend([2], timeout=PATIENCE) == answer_to([2], 20, True)
    batcher.close()
    assert [call[0] for call in held.calls] == [[0], [2]]


class Requests(RuleBasedStateMachine):
    """Any order of submissions, cancellations and calls: who waits, what a call holds, and what each future says."""

    BATCH, QUEUE = 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.stub = Stub(held=True)
        self.batcher = MicroBatcher(self.stub, max_batch=self.BATCH, max_queue=self.QUEUE)
        self.asked: list[tuple[int, bool, bool, Future[Recommendation]]] = []
        self.waiting: list[int] = []
        self.taken: list[int] = []  # by the worker, and not answered
        self.cancelled: set[int] = set()
        self.refused = 0

    def next_call(self) -> None:
        if not self.taken:
            self.taken, self.waiting = self.waiting[: self.BATCH], self.waiting[self.BATCH :]
        if self.taken:
            self.stub.wait_for_call()

    @rule(k=st.sampled_from((1, 20, 40)), exclude=st.booleans(), bad=st.sampled_from((False, False, True)))
    def submit(self, k: int, exclude: bool, bad: bool) -> None:
        number = len(self.asked)
        history: list[ItemId] = [number, "bad"] if bad else [number]
        if len(self.waiting) == self.QUEUE:
            with pytest.raises(Overloaded):
                self.batcher.submit(history)
            self.refused += 1
            return
        self.asked.append((k, exclude, bad, self.batcher.submit(history, k=k, exclude_history=exclude)))
        self.waiting.append(number)
        if not self.taken:
            self.next_call()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.asked:
            return
        number = data.draw(st.integers(0, len(self.asked) - 1))
        if number in self.waiting:
            self.waiting.remove(number)
            self.cancelled.add(number)
        assert self.asked[number][3].cancel() == (number in self.cancelled)

    @precondition(lambda self: self.taken)
    @rule()
    def finish_a_call(self) -> None:
        numbers, k, exclude = self.stub.calls[-1]
        assert set(numbers) <= set(self.taken)
        assert k == max(self.asked[number][0] for number in numbers)
        assert {self.asked[number][1] for number in numbers} == {exclude}
        self.stub.let_through(1)
        if len(numbers) == 1 or not any(self.asked[number][2] for number in numbers):
            for number in numbers:
                self.asked[number][3].exception(PATIENCE)
                self.taken.remove(number)
        self.next_call()

    @invariant()
    def who_waits(self) -> None:
        assert self.batcher.statistics.waiting == len(self.waiting)
        for number in (*self.waiting, *self.taken):
            assert not self.asked[number][3].done()

    def teardown(self) -> None:
        self.stub.let_through()
        self.batcher.close()
        for number, (k, exclude, bad, future) in enumerate(self.asked):
            if number in self.cancelled:
                assert future.cancelled()
            elif bad:
                assert str(future.exception(0)) == f"history {number} is bad"
            else:
                assert future.result(0) == answer_to([number], k, exclude)
        found = self.batcher.statistics
        assert found.requests == len(self.asked) == found.answered + found.failed + found.cancelled
        assert (found.cancelled, found.refused) == (len(self.cancelled), self.refused)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def until_idle(batcher: MicroBatcher) -> None:
    while batcher._wake_at != 1:
        assert batcher._worker.is_alive()


def test_a_caller_alone_needs_no_other_thread(held: Stub) -> None:
    """The others wait meanwhile, and are the worker's next batch."""
    batcher = MicroBatcher(held)
    until_idle(batcher)
    answers: list[Recommendation] = []
    caller = threading.Thread(target=lambda: answers.append(batcher.recommend([0], k=3)))
    caller.start()
    held.wait_for_call()
    waiting = [batcher.submit([number]) for number in (1, 2)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    while batcher._closed is None:
        assert len(held.calls) == 1
    assert len(held.calls) == 1
    held.let_through()
    for thread in (caller, closing):
        thread.join(PATIENCE)
    assert answers == [answer_to([0], 3, True)]
    assert [result(future).items[0] for future in waiting] == [1000, 2000]
    assert held.threads == [caller, batcher._worker]
    assert held.calls == [([0], 3, True), ([1, 2], 20, True)]
    assert batcher.statistics.batch_sizes == {1: 1, 2: 1}


def test_a_caller_alone_gets_errors_and_the_batcher_goes_on() -> None:
    stub = Stub()
    with MicroBatcher(stub) as batcher:
        for _ in range(3):
            until_idle(batcher)
            with pytest.raises(InputError, match="history 1 is bad"):
                batcher.recommend([1, "bad"])
        stub._end = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            batcher.recommend([1])
        stub._end = None
        assert result(batcher.submit([1])) == answer_to([1], 20, True)
        assert set(stub.threads[:-1]) == {threading.current_thread()}
        assert (batcher.statistics.failed, batcher.statistics.answered) == (4, 1)


def test_callbacks_may_submit_and_close_but_not_wait(held: Stub) -> None:
    batcher, first = busy(held)
    nested: list[Future[Recommendation]] = []
    errors: list[BaseException] = []

    def again(_: Future[Recommendation]) -> None:
        nested.append(batcher.submit([5]))
        try:
            batcher.recommend([6])
        except RuntimeError as error:
            errors.append(error)
        batcher.close()

    first.add_done_callback(again)
    held.let_through()
    result(first)
    batcher.close()
    assert result(nested[0]) == answer_to([5], 20, True)
    assert "expected submit" in str(errors[0])


def test_asyncio(held: Stub) -> None:
    async def ask(batcher: MicroBatcher) -> list[Any]:
        tasks = [asyncio.ensure_future(asyncio.wrap_future(batcher.submit([number]))) for number in range(1, 4)]
        tasks[1].cancel()
        await asyncio.wait([tasks[1]], timeout=PATIENCE)
        held.let_through()
        return await asyncio.gather(*tasks, return_exceptions=True)

    batcher, _ = busy(held)
    answers = asyncio.run(ask(batcher))
    batcher.close()
    assert [answers[0], answers[2]] == [answer_to([1], 20, True), answer_to([3], 20, True)]
    assert isinstance(answers[1], asyncio.CancelledError)
    assert held.calls[1:] == [([1, 3], 20, True)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_refused(held: Stub) -> None:
    batcher, first = busy(held)
    batcher.submit([1])
    with batcher._lock:  # as if another thread were inside
        child = os.fork()
        if child == 0:
            try:
                batcher.submit([2])
            except Closed as error:
                batcher.close()
                os._exit(0 if "forked" in str(error) else 1)
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.let_through()
    assert result(first) == answer_to([0], 20, True)
    batcher.close()
    assert batcher.statistics.answered == 2


PROGRAM = """
import threading
from fave_fast.batching import MicroBatcher

class Engine:
    entered, allowed = threading.Event(), threading.Event()

    def recommend(self, histories, k, exclude_history, deny):
        self.entered.set()
        self.allowed.wait()
        raise ValueError("too late")

batcher = MicroBatcher(Engine())
first = batcher.submit([1])
first.add_done_callback(lambda future: print("first", future.exception(), flush=True))
Engine.entered.wait()

def refused(future):
    print("second", future.exception(), flush=True)
    Engine.allowed.set()

batcher.submit([2]).add_done_callback(refused)
"""


def test_the_end_of_the_program_waits_for_the_call_in_progress_and_refuses_the_rest() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.splitlines() == ["second the program ended while the request waited", "first too late"]
    assert "Error" not in done.stderr


def assert_close(found: Recommendation, expected: Recommendation) -> None:
    """The model runs in fp64, far below fp32's rounding, so that a score is one of two neighbours in fp32."""
    assert (found.items, found.unknown, found.popular) == (expected.items, expected.unknown, expected.popular)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=2**-23, atol=0)


def test_many_threads_get_the_answers_they_would_get_alone(tiny_checkpoint: Path) -> None:
    kept = checkpoints.load(tiny_checkpoint)
    recommender = Recommender(kept, dtype=torch.float64)
    deny = [103, 120]
    draw = np.random.default_rng(0)
    asked = [
        (draw.integers(99, 127, draw.integers(0, 12)).tolist(), int(draw.integers(1, 45)), bool(draw.integers(2)))
        for _ in range(96)
    ]
    alone = [recommender.recommend([history], k, exclude, deny)[0] for history, k, exclude in asked]
    found: list[Recommendation | None] = [None] * len(asked)
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait(PATIENCE)
        for at in range(first, len(asked), 8):
            history, k, exclude = asked[at]
            if at % 3:
                found[at] = batcher.recommend(np.array(history, dtype=np.int64), k=k, exclude_history=exclude)
            else:
                found[at] = result(batcher.submit(history, k=k, exclude_history=exclude))

    with MicroBatcher(recommender, max_batch=16, deny=deny) as batcher:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        with pytest.raises(InputError) as direct:
            recommender.recommend([[101, 1.5]])  # type: ignore[list-item]
        with pytest.raises(InputError) as batched:
            result(batcher.submit([101, 1.5]))  # type: ignore[list-item]
    assert str(batched.value) == str(direct.value)
    for answer, expected in zip(found, alone, strict=True):
        assert answer is not None
        assert_close(answer, expected)
    assert batcher.statistics.answered == len(asked)
