"""Named ranges for profilers, and the trace that `--profile DIR` of the commands writes.

With FAVE_FAST_NVTX=1, read when the package is imported, the parts of a step are ranges of NVTX (Nsight Systems and
Nsight Compute show and filter by them) and of `torch.profiler`: `fave/step` around a serving or training step, in it
`fave/input`, `fave/encoder`, `fave/topk`, `fave/rank`, `fave/loss` and `fave/jvp`. Without it a function is left as it
is, so that nothing is called in vain. Where kernels read the input path themselves (serving), it is part of
`fave/encoder`. A CUDA graph's replay is one launch: its parts' ranges appear when it is captured, and only `fave/step`
around each replay. Likewise a step on a CPU that is one call into C++.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from fave_fast.errors import InputError

_logger = logging.getLogger(__name__)
SWITCH = "FAVE_FAST_NVTX"
TRACED_STEPS = 20  # steps or batches in a trace: more would not be looked at, and a trace of thousands is gigabytes

_on = os.environ.get(SWITCH, "") not in ("", "0")
_nvtx: Any = None
if _on:
    try:
        _nvtx = importlib.import_module("nvtx")
    except ImportError:
        _logger.warning("%s is set and the package nvtx is not installed: torch.profiler alone sees the ranges", SWITCH)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def ranged(name: str) -> Callable[[_Function], _Function]:
    """A decorator: calls are a range called `name` if FAVE_FAST_NVTX is set, else the function is returned as it is."""
    return _wrapped(name) if _on else lambda function: function


def _wrapped(name: str) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a compiler would break its graph here
                return function(*args, **kwargs)
            with _Range(name):
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


class _Range:
    def __init__(self, name: str) -> None:
        self._name, self._record = name, torch.profiler.record_function(name)

    def __enter__(self) -> None:
        if _nvtx is not None:
            _nvtx.push_range(self._name)
        self._record.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._record.__exit__(kind, error, at)
        if _nvtx is not None:
            _nvtx.pop_range()


class Trace:
    """A `torch.profiler` trace of a command's first steps, written to `folder/name.trace.json` for Perfetto or Chrome.

    A context manager; `step` is called after each step or batch. With `folder` None it does nothing.
    """

    def __init__(self, folder: str | None, name: str, skip: int = 0) -> None:
        """`skip`: steps that warm up and are left out.

        Raises:
            InputError: the folder cannot be made or is a file.
        """
        self.path: Path | None = None
        self._profile: torch.profiler.profile | None = None
        if folder is None:
            return
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--profile {folder}: cannot be a folder: {error.strerror}") from None
        self.path = path = Path(folder) / f"{name}.trace.json"

        def schedule(step: int) -> torch.profiler.ProfilerAction:
            if step < skip:
                return torch.profiler.ProfilerAction.NONE
            if step < skip + TRACED_STEPS - 1:
                return torch.profiler.ProfilerAction.RECORD
            last = step == skip + TRACED_STEPS - 1
            return torch.profiler.ProfilerAction.RECORD_AND_SAVE if last else torch.profiler.ProfilerAction.NONE

        self._profile = torch.profiler.profile(
            schedule=schedule, on_trace_ready=lambda made: made.export_chrome_trace(str(path))
        )

    def __enter__(self) -> Trace:
        if self._profile is not None and self.path is not None:
            self.path.unlink(missing_ok=True)
            self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, at)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """A step is done."""
        if self._profile is not None:
            self._profile.step()

    def notes(self) -> list[str]:
        """What became of it, for the person at the terminal; nothing where no trace was asked for."""
        if self.path is None:
            return []
        if not self.path.is_file():
            return [f"no trace in {self.path}: the command ended before the first step that it was to hold"]
        ranges = "" if _on else f"; with {SWITCH}=1 its parts have names"
        return [f"a trace of up to {TRACED_STEPS} steps is in {self.path} (Perfetto opens it){ranges}"]
