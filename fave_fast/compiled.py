"""`OneStep` under `torch.compile`: the rung between plain PyTorch and the engine's kernels.

The compiler writes its own kernels and captures them in CUDA graphs of its own; none of ours takes part.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fave_fast.one_step import OneStep

Mode = Literal["default", "max-autotune", "reduce-overhead"]


@dataclass(frozen=True)
class _Bucket:
    """Memory of one batch size, at addresses that stay: a captured graph reads and writes them."""

    inputs: Tensor  # int64 [B (L + E)], on the host: histories, then what they exclude, for one copy
    history: Tensor  # [B, L] of `inputs`
    exclude: Tensor  # [B, E] of `inputs`
    device_inputs: Tensor
    device_history: Tensor
    device_exclude: Tensor
    scores: Tensor  # float32 [B, K], on the host
    ids: Tensor  # int64 [B, K], on the host

    @classmethod
    def allocate(cls, size: int, step: OneStep, excluded: int, device: torch.device) -> _Bucket:
        pinned = device.type == "cuda"
        split = size * step.length
        inputs = torch.zeros(split + size * excluded, dtype=torch.int64, pin_memory=pinned)
        device_inputs = inputs.to(device, copy=True)
        views = [
            part.view(size, width)
            for whole in (inputs, device_inputs)
            for part, width in ((whole[:split], step.length), (whole[split:], excluded))
        ]
        for view in views[2:]:
            torch._dynamo.mark_static_address(view)
        scores = torch.empty(size, step.k, pin_memory=pinned)
        ids = torch.empty(size, step.k, dtype=torch.int64, pin_memory=pinned)
        return cls(inputs, views[0], views[1], device_inputs, views[2], views[3], scores, ids)


class CompiledOneStep:
    """`OneStep`, compiled for a few batch sizes, for the one thread that warms it up: the compiler's graphs are its."""

    def __init__(self, step: OneStep, excluded: int, mode: Mode = "max-autotune", *, backend: str = "inductor") -> None:
        """Nothing is compiled yet.

        Args:
            step: what to compile, on its device.
            excluded: E, the most exclusions that a row may have.
            mode: of `torch.compile`.
            backend: of `torch.compile`; another than inductor takes no mode.
        """
        self.step, self.excluded = step, excluded
        self._device = step.table.device
        self._deny = torch.zeros(step.num_items + 1, dtype=torch.bool, device=self._device)
        torch._dynamo.mark_static_address(self._deny)
        self._run = torch.compile(
            step, dynamic=False, fullgraph=True, backend=backend, mode=mode if backend == "inductor" else None
        )
        self._buckets: dict[int, _Bucket] = {}
        self._thread: int | None = None

    @property
    def buckets(self) -> tuple[int, ...]:
        """The batch sizes that are compiled, ascending."""
        return tuple(self._buckets)

    def deny(self, denied: Tensor) -> None:
        """Take bool [N + 1], True for items that nobody gets from now on.

        Raises:
            ValueError: another shape or dtype.
        """
        if denied.shape != self._deny.shape or denied.dtype != torch.bool:
            raise ValueError(f"denied is {denied.dtype} {list(denied.shape)}; expected bool {list(self._deny.shape)}")
        self._deny.copy_(denied)

    def warmup(self, buckets: Iterable[int]) -> None:
        """Compile for batches of these sizes, the largest first.

        On an H200 reduce-overhead took 5 to 16 s a size and max-autotune had not finished one after 44 s (torch 2.11, 4
        blocks, 12,101 items, five such processes on 16 cores).

        Raises:
            ValueError: a size below 1.
            RuntimeError: another thread warmed up before.
        """
        self._check_thread()
        sizes = {*self._buckets, *buckets}
        if min(sizes, default=1) < 1:
            raise ValueError(f"a bucket is {min(sizes)}; expected at least 1")
        # Dynamo refuses a ninth version of one function by default, whichever module asks for it.
        with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.accumulated_recompile_limit):
            for size in sorted(sizes - set(self._buckets), reverse=True):
                bucket = _Bucket.allocate(size, self.step, self.excluded, self._device)
                for _ in range(3):  # one compiles, one warms up, one captures
                    self._answer(bucket)
                self._buckets[size] = bucket
        self._buckets = dict(sorted(self._buckets.items()))

    def __call__(self, history: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        """Lists for int64 [B, L] and [B, E] on the CPU, both padded with 0; see `OneStep.forward`.

        Returns:
            Scores [B, K] float32 and ids [B, K] int64 on the CPU, in memory that the next call writes to.

        Raises:
            ValueError: a shape that does not fit, or a batch above all buckets.
            RuntimeError: another thread warmed up.
        """
        self._check_thread()
        count = len(history)
        expected = ((count, self.step.length), (count, self.excluded))
        if (history.shape, exclude.shape) != expected:
            raise ValueError(
                f"history is {list(history.shape)} and exclude {list(exclude.shape)}; expected {list(expected[0])} "
                f"and {list(expected[1])}"
            )
        bucket = next((bucket for size, bucket in self._buckets.items() if size >= count), None)
        if bucket is None:
            raise ValueError(f"the batch is {count}; expected at most {max(self._buckets, default=0)}, as warmed up")
        bucket.history[:count].copy_(history)
        bucket.exclude[:count].copy_(exclude)
        self._answer(bucket)
        return bucket.scores[:count], bucket.ids[:count]

    def _check_thread(self) -> None:
        """Elsewhere the compiler's graph manager fails an assertion, or captures again."""
        thread = threading.get_ident()
        self._thread = self._thread or thread
        if thread != self._thread:
            raise RuntimeError(f"called by thread {thread}; expected {self._thread}, which warmed up")

    @torch.no_grad()
    def _answer(self, bucket: _Bucket) -> None:
        bucket.device_inputs.copy_(bucket.inputs, non_blocking=True)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        scores, ids = self._run(bucket.device_history, bucket.device_exclude, self._deny)
        bucket.scores.copy_(scores, non_blocking=True)
        bucket.ids.copy_(ids, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
