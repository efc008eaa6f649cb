"""Tasks on several processes at once, none begun that cannot end in time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

Perform = Callable[[Any, float], Iterator[dict[str, Any]]]
_PATIENCE = 5.0  # seconds that a process has to go
_GRACE = 15.0  # seconds that a task may take to end once its time is over


@dataclass
class Report:
    """How it went: every task is in one of these."""

    done: list[Any] = field(default_factory=list)
    failed: list[tuple[Any, str]] = field(default_factory=list)  # with the reason
    not_started: list[Any] = field(default_factory=list)


def run_all(
    tasks: Sequence[Any],
    perform: Perform,
    jobs: int,
    deadline: float,
    *,
    expected: Callable[[Any], float | None],
    on_result: Callable[[Any, dict[str, Any]], None],
    on_end: Callable[[Any, float], None],
    gpus: Sequence[str] = (),
    grace: float = _GRACE,
) -> Report:
    """Run `perform(task, deadline)` for all tasks in `jobs` processes, each of which takes one task after the other.

    Args:
        tasks: in order; one that would end too late is passed over for a shorter one.
        perform: a function of a module; yields results, which are handed on as they come.
        jobs: processes at once.
        deadline: by `time.monotonic()`, which processes of a machine share. Whoever still runs `grace` seconds later
            is ended.
        expected: the seconds that a task takes, None where nobody knows: then it is begun.
        on_result: called with each result.
        on_end: called with each task that ended well and the seconds it took, its process's start included.
        gpus: what CUDA_VISIBLE_DEVICES is in the processes, in turn.
        grace: seconds.
    """
    waiting, report = list(tasks), Report()
    slots = [_Slot(perform, gpus[number % len(gpus)] if gpus else None) for number in range(jobs)]
    try:
        while True:
            begun = [slot for slot in slots if slot.idle and slot.take(_next(waiting, deadline, expected))]
            for slot in begun:  # all have started by now: they import at once
                slot.hand_over(deadline)
            busy = {slot.connection: slot for slot in slots if not slot.idle}
            if not busy:
                report.not_started = waiting
                return report
            ready = wait(list(busy), max(deadline + grace - time.monotonic(), 0))
            for connection in ready:
                _receive(busy[connection], report, on_result, on_end)
            if not ready:
                for slot in busy.values():
                    report.failed.append((slot.task, f"still ran {grace:.0f} s after the time was over: ended"))
                    slot.stop()
    finally:
        for slot in slots:
            slot.ask_to_go()
        for slot in slots:
            slot.stop()


def _next(waiting: list[Any], deadline: float, expected: Callable[[Any], float | None]) -> Any:
    left = deadline - time.monotonic()
    for number, task in enumerate(waiting):
        if left > (expected(task) or 0):
            return waiting.pop(number)
    return None


def _receive(
    slot: _Slot,
    report: Report,
    on_result: Callable[[Any, dict[str, Any]], None],
    on_end: Callable[[Any, float], None],
) -> None:
    try:
        kind, value = slot.connection.recv()
    except (EOFError, ConnectionResetError):
        report.failed.append((slot.task, slot.died()))
        return
    if kind == "result":
        on_result(slot.task, value)
    elif kind == "end":
        on_end(slot.task, time.monotonic() - slot.began)
        report.done.append(slot.task)
        slot.task = None
    else:
        report.failed.append((slot.task, value))
        slot.task = None
        slot.stop()  # what failed may have left the GPU's context unusable


class _Slot:
    """Room for one process at a time, started when it is first needed."""

    def __init__(self, perform: Perform, gpu: str | None) -> None:
        self._options = perform, gpu
        self._process: SpawnProcess | None = None
        self.connection: Connection
        self.task: Any = None
        self.began = 0.0

    @property
    def idle(self) -> bool:
        return self.task is None

    def take(self, task: Any) -> bool:
        """Have a process for `task`; None is no task."""
        if task is None:
            return False
        self.task, self.began = task, time.monotonic()
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs, *self._options), daemon=True)
            self._process.start()
            theirs.close()
        return True

    def hand_over(self, deadline: float) -> None:
        """Give the process its task."""
        with contextlib.suppress(BrokenPipeError):  # it died: receiving says so
            self.connection.send((self.task, deadline))

    def died(self) -> str:
        """Why the process is gone, in words."""
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode
        self.stop()
        return f"its process ended with exit code {code}"

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is None:
            return
        self.ask_to_go()
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()
        self._process, self.task = None, None

    def ask_to_go(self) -> None:
        """Have the process end, if there is one, without waiting for it."""
        if self._process is not None:
            self.connection.close()  # one that waits for a task sees that
            if not self.idle:
                self._process.terminate()


def _work(connection: Connection, perform: Perform, gpu: str | None) -> None:
    """The life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the first process ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with contextlib.suppress(EOFError, ConnectionError):  # the first process is gone
        while True:
            task, deadline = connection.recv()
            try:
                for result in perform(task, deadline):
                    connection.send(("result", result))
            except BrokenPipeError:
                raise
            except Exception as error:
                connection.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
                return
            connection.send(("end", None))
