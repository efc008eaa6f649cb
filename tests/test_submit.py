"""Submitting a graph and waiting for its flag; without a GPU, the wait alone and what is refused."""

from __future__ import annotations

import ctypes.util
import threading

import numpy as np
import pytest
import torch

from fave_fast.ops.registry import why_no_extension
from fave_fast.submit import Completion, Submission

pytestmark = pytest.mark.skipif(why_no_extension() is not None, reason=str(why_no_extension()))


def test_the_wait_ends_when_the_flag_is_raised() -> None:
    from fave_fast import _C

    flag, waiting = np.zeros(1, np.uint32), threading.Event()

    def raise_it() -> None:
        waiting.wait()
        _C.raise_flag(flag.ctypes.data, 2**32 - 1)

    thread = threading.Thread(target=raise_it)
    thread.start()
    waiting.set()  # if the wait held the GIL, the thread would never get there
    _C.wait_flag(flag.ctypes.data, 2**32 - 1, 0, 60.0)
    thread.join()
    _C.wait_flag(flag.ctypes.data, 2**32 - 1, 0, 0.0)


def test_a_flag_that_nobody_raises_times_out() -> None:
    from fave_fast import _C

    flag = np.full(1, 7, np.uint32)
    with pytest.raises(TimeoutError, match="raised the flag to 8 in"):
        _C.wait_flag(flag.ctypes.data, 8, 0, 0.01)


@pytest.mark.skipif(ctypes.util.find_library("cuda") is not None, reason="there is a driver")
def test_without_a_driver_the_launch_says_so() -> None:
    from fave_fast import _C

    with pytest.raises(RuntimeError, match=r"driver cannot be loaded: libcuda\.so\.1"):
        _C.launch_graph(1, 0)


class Doubler:
    """A captured request: twice what is in pinned memory, back into pinned memory."""

    def __init__(self, signal: bool = True, size: int = 1000) -> None:
        self.stream = torch.cuda.Stream()
        self.completion = Completion(self.stream)
        self.given = torch.zeros(size).pin_memory()
        self.result = torch.full((size,), torch.nan).pin_memory()
        self.middle = torch.empty(size, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.work()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.work()
            if signal:
                self.completion.signal()
        self.submission = Submission(graph, self.completion)

    def work(self) -> None:
        self.middle.copy_(self.given, non_blocking=True)
        self.middle.mul_(2)
        self.result.copy_(self.middle, non_blocking=True)


@pytest.mark.gpu
def test_what_a_run_wrote_is_there_when_it_returns() -> None:
    one, two = Doubler(), Doubler(size=100_000)
    assert one.completion.why_not is None
    for turn in range(1, 300):
        for request in (one, two):
            request.given.fill_(turn)
            request.submission.run()
            assert bool((request.result == 2 * turn).all())


@pytest.mark.gpu
def test_a_thread_without_a_context_runs_too() -> None:
    request = Doubler()
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            request.given.fill_(5)
            request.submission.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert not failures
    assert bool((request.result == 10).all())


@pytest.mark.gpu
def test_a_graph_without_a_signal_raises_instead_of_hanging() -> None:
    with pytest.raises(RuntimeError, match="does not raise it last"):
        Doubler(signal=False).submission.run()


@pytest.mark.gpu
def test_without_the_extension_pytorch_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fave_fast.submit.why_no_extension", lambda: "it is not there")
    request = Doubler()
    assert request.completion.why_not == "it is not there"
    request.given.fill_(3)
    request.submission.run()
    assert bool((request.result == 6).all())
