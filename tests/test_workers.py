from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench import workers

SOON = 120.0  # seconds, far more than these tasks take


def act(task: str, deadline: float) -> Iterator[dict[str, Any]]:
    """What a task called `task` does."""
    if task == "raises":
        raise ValueError("no\ngood")
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    yield {"task": task, "process": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    if task == "stays":
        threading.Event().wait()
    yield {"task": task, "left": deadline - time.monotonic()}


class Run:
    """`run_all` with what it called kept."""

    def __init__(self, tasks: list[str], jobs: int, seconds: float = SOON, **options: Any) -> None:
        self.results: list[dict[str, Any]] = []
        self.ends: dict[str, float] = {}
        options = {"expected": lambda task: None, **options}
        self.report = workers.run_all(
            tasks,
            act,
            jobs,
            time.monotonic() + seconds,
            on_result=lambda task, result: self.results.append(result),
            on_end=self.ends.__setitem__,
            **options,
        )


def test_every_task_is_done_by_as_many_processes_as_asked() -> None:
    run = Run(["a", "b", "c", "d"], jobs=2, gpus=["3", "5"])
    assert sorted(run.report.done) == sorted(run.ends) == ["a", "b", "c", "d"]
    assert (run.report.failed, run.report.not_started) == ([], [])
    first = [result for result in run.results if "process" in result]
    assert sorted(result["task"] for result in first) == ["a", "b", "c", "d"]
    assert len({(result["process"], result["gpu"]) for result in first}) <= 2
    assert {result["gpu"] for result in first} <= {"3", "5"}
    assert all(0 < result["left"] < SOON for result in run.results if "left" in result)


def test_failures_are_named_and_the_rest_goes_on() -> None:
    run = Run(["raises", "dies", "a"], jobs=1)
    assert run.report.done == ["a"]
    assert run.report.failed == [
        ("raises", "ValueError: no good"),
        ("dies", f"its process ended with exit code {-signal.SIGKILL}"),
    ]


def test_what_cannot_end_in_time_is_not_begun() -> None:
    run = Run(["long", "short", "unknown"], jobs=1, expected={"long": SOON + 1, "short": 0.0, "unknown": None}.get)
    assert run.report.done == ["short", "unknown"]
    assert run.report.not_started == ["long"]


@pytest.mark.parametrize("expected", [None, 0.0])
def test_nothing_is_begun_after_the_time(expected: float | None) -> None:
    run = Run(["a"], jobs=1, seconds=-1.0, expected=lambda task: expected)
    assert (run.results, run.report.not_started) == ([], ["a"])


def test_a_task_that_stays_is_ended() -> None:
    expected = {"stays": None, "after": math.inf}
    run = Run(["stays", "after"], jobs=1, seconds=1.0, expected=expected.get, grace=0)
    assert run.report.failed == [("stays", "still ran 0 s after the time was over: ended")]
    assert run.report.not_started == ["after"]
    assert run.ends == {}
