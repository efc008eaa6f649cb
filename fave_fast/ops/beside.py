"""Work beside the current stream: what follows does not need it yet, and the GPU has room for both.

Kernels of a training step are chains of small programs that leave most of an H200 idle. In a CUDA graph's capture what
goes beside becomes a branch of the graph; on a CPU, and where nothing else is asked for, it is done in its turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Wait = Callable[[], None]
"""Lets the stream that is current when it is called wait for a piece of work."""


class Beside:
    """Work of one pass on a second stream; who reads what was made there calls `join` before, and `finish` ends it.

    A capture knows the second stream from the first `work` on: a `join` before does nothing.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        """On `stream`, else in the current one."""
        self._stream = stream
        self._begun = False
        self._read: list[Tensor] = []

    @contextlib.contextmanager
    def work(self, *read: Tensor) -> Iterator[None]:
        """What is launched within runs beside, behind what the current stream holds so far.

        Its backward pass does so, too: autograd runs it where the forward pass ran, and waits where the two meet, for
        all that an op has launched there until it returned.

        Args:
            read: tensors of the current stream that are read there, and do not change; kept until `finish`, or others
                would get their memory before.
        """
        self._read += read
        with self._within(wait=True):
            yield

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """As `work`, but behind what ran beside before alone: for what reads nothing of this pass, but parameters."""
        with self._within(wait=not self._begun):
            yield

    @contextlib.contextmanager
    def _within(self, wait: bool) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        if wait:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._begun = True
        with torch.cuda.stream(self._stream):
            yield

    def so_far(self) -> Wait:
        """What waits for the work until now, and for none that comes later."""
        if not self._begun or self._stream is None:
            return lambda: None
        stream, done = self._stream, self._stream.record_event()
        return lambda: torch.cuda.current_stream(stream.device).wait_event(done)

    def join(self) -> None:
        """Let the current stream wait for what runs beside it."""
        if self._begun and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def finish(self) -> None:
        """`join`, after which nothing reads what `work` was told, backward passes included."""
        self.join()
        self._begun = False
        self._read.clear()
