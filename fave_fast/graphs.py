"""The one step on a GPU as CUDA graphs: numbered histories on the host in, lists on the host out, by one launch.

A graph holds everything of a request: the reading of the histories from the host's memory, input path and encoder,
top-K with exclusions, the writing of the lists into the host's memory, and the word that says so. On Hopper each of its
kernels is launched while the one before it runs. There is one graph for each batch size of `BATCHES`; a request takes
the smallest that holds it, its other users being empty. One that none holds is answered in parts, one after another,
by graphs that encode as the whole would be encoded. The kernels are those that run uncaptured: so are the bits.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fave_fast.ops import Exclusions, score_topk
from fave_fast.ops.byte_table import ByteTable
from fave_fast.ops.encoder import MAX_PLANNED, EncoderWeights, InputPath, Plan, encode_ids, planned_rows
from fave_fast.ops.encoder import OP as ENCODER
from fave_fast.ops.score_topk import OP as SCORE_TOPK
from fave_fast.ops.score_topk import beyond_kernels, workspace_bytes
from fave_fast.ops.step_cpu import NativeStep
from fave_fast.ops.tiles import Sizes
from fave_fast.ops.tuning import launches_overlap, multiprocessors
from fave_fast.profiling import ranged
from fave_fast.submit import Completion, Submission

if TYPE_CHECKING:
    from fave_fast import _C

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_ITEMS_EACH, _MORE_ITEMS = 64, 1024  # and as many again for each of the first _SMALL
# On Hopper, the backend of the encoder for batches of up to so many histories: eight blocks a history, two, one program
# a history, and above, four tiles of histories a multiprocessor. Graphs hold the numbers, so that a request and its
# graph agree.
ENCODERS = ((8, "cpp"), (64, "pair"), (256, "triton"), (sys.maxsize, "tile"))
_SMALL = 64


Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
OnStep = Callable[[float, float], None]  # hears the seconds of encoder and top K


class Histories(NamedTuple):
    """Numbered histories end to end, oldest first: ids int32 [T] from 1 to N, and where each begins, int64 [B + 1]."""

    ids: npt.NDArray[np.int32]
    offsets: Ints


class Part(NamedTuple):
    """Some neighbouring histories of a request, and the graph that takes them.

    Attributes:
        batch: of the graph.
        begin: the first history.
        end: behind the last.
    """

    batch: int
    begin: int
    end: int

    def cut(self, histories: Histories) -> Histories:
        """Its own of a request's histories, with offsets from 0."""
        offsets = histories.offsets[self.begin : self.end + 1]
        return Histories(histories.ids[offsets[0] : offsets[-1]], offsets - offsets[0])


def batches_up_to(largest: int) -> list[int]:
    """The batch sizes to capture for requests of up to `largest` histories."""
    return [*(size for size in BATCHES if size < largest), largest]


def items_held(batch: int) -> int:
    """How many items in all the graph of `batch` histories holds, spread as they come.

    All of them are excluded from the lists, though only the last L of a history are read: one history of a thousand
    items is no reason to take a graph for sixteen, nor are 64 of ML-100k's hundred one to take a slower encoder's.
    Every request carries as many words as its graph holds, so that larger ones hold less for each.
    """
    return _ITEMS_EACH * (batch + min(batch, _SMALL)) + _MORE_ITEMS


def smallest_batch(batches: Sequence[int], users: int, items: int) -> int | None:
    """Of ascending `batches` the first whose graph holds so many histories and items, or None."""
    spread = items - _MORE_ITEMS
    least = -(-spread // (2 * _ITEMS_EACH))
    if least > _SMALL:
        least = -(-spread // _ITEMS_EACH) - _SMALL
    least = max(users, least)
    at = bisect_left(batches, least)
    return batches[at] if at < len(batches) else None


def parts_of(offsets: Ints, batches: Sequence[int], encoder_backend: Callable[[int], str]) -> list[Part] | None:
    """A request in as few parts as graphs can answer it in, each for the smallest that holds it.

    Only graphs take part whose encoder is that of the whole: where it cuts a request must not show in the lists.

    Args:
        offsets: int64 [B + 1], where each history begins and the last ends.
        batches: of the graphs, ascending.
        encoder_backend: which encoder so many histories take, as `Step.encoder_backend`.

    Returns:
        The parts in order, which hold each history once; None where a history fits none of those graphs.
    """
    users = len(offsets) - 1
    usable = [batch for batch in batches if encoder_backend(batch) == encoder_backend(users)]
    if not usable:
        return None
    most, begin = usable[-1], 0
    parts: list[Part] = []
    while begin < users:
        # The largest graph holds what any holds: a part as long as it takes leaves the least to the others.
        within = int(np.searchsorted(offsets, offsets[begin] + items_held(most), side="right")) - 1
        end = min(begin + most, max(within, begin + 1))
        batch = smallest_batch(usable, end - begin, int(offsets[end] - offsets[begin]))
        if batch is None:
            return None
        parts.append(Part(batch, begin, end))
        begin = end
    return parts


def end_to_end(lists: Iterable[tuple[Floats, Ints]]) -> tuple[Floats, Ints]:
    """The lists of several parts as those of one request: scores float32 [B, K] and item numbers int64 [B, K]."""
    scores, items = zip(*lists, strict=True)
    return np.concatenate(scores), np.concatenate(items)


@dataclass(frozen=True)
class Step:
    """From packed item numbers on a device to lists: f of eq. (25), then the top K of the whole catalogue."""

    weights: EncoderWeights
    path: InputPath
    backend: str
    table_bytes: ByteTable | None = None  # of `table`, for the top-K
    only_kernels: ClassVar[bool] = True  # that begin and end it: what is launched beside them may start early

    @property
    def table(self) -> Tensor:
        """The catalogue [N + 1, D]."""
        return self.weights.model.item_embedding.weight.detach()

    @cached_property
    def native(self) -> NativeStep | None:
        """The same by one call into C++, where that is what runs here; it keeps the catalogue that it was made of.

        None with `table_bytes`, which that call does not take.

        Raises:
            BackendError: the step's backend cannot run here.
        """
        return NativeStep.of(self.weights, self.path, self.backend) if self.table_bytes is None else None

    def encoder_backend(self, users: int) -> str:
        """`backend`; where that is auto, those of ENCODERS on a GPU that has them.

        Each kernel gives a history the same bits in any batch, but they differ in the last ones: who wants them equal
        between batches of any size names `triton`.
        """
        if self.backend == "auto" and not os.environ.get("FAVE_FAST_BACKEND") and self.table.device.type == "cuda":
            for most, backend in ENCODERS:
                if users <= most and backend in self._encoders:
                    return backend
        return self.backend

    @cached_property
    def _encoders(self) -> frozenset[str]:
        """The encoder's backends that run this model here."""
        refusals = ENCODER.refusals(self.table.device, self.table.dtype) | self.weights.beyond
        return frozenset(backend for backend, reason in refusals.items() if reason is None)

    def why_not_captured(self, k: int) -> str | None:
        """Why no CUDA graph can hold this step with lists of `k`, or None.

        Raises:
            BackendError: the step's backend cannot run here.
        """
        table = self.table
        # Of as many histories as a graph has at most: what takes them takes fewer, if not the other way round.
        beyond = beyond_kernels(Sizes(BATCHES[-1], table.shape[1], k, len(table) - 1), table.device)
        for op, reasons in ((ENCODER, self.weights.beyond), (SCORE_TOPK, beyond)):
            if op.choose(self.backend, table.device, table.dtype, reasons).backend == "reference":
                return f"{op.name} runs by its reference, which waits for the device"
        return None

    def plan(self, users: int) -> Plan | None:
        """Memory for which of so many histories share a program of the encoder, or None where each has its own.

        With a multiprocessor for each they may as well run alone.
        """
        device = self.table.device
        by_triton = device.type == "cuda" and self.backend in ("auto", "triton") and "triton" in self._encoders
        if not by_triton or not multiprocessors(device) < users <= MAX_PLANNED:
            return None
        return Plan.empty(users, planned_rows(self.weights.model.config.max_length), device)

    @ranged("fave/step")
    def __call__(
        self,
        ids: Tensor,
        offsets: Tensor,
        exclude: Exclusions | None,
        k: int,
        deny: Tensor | None = None,
        *,
        plan: Plan | None = None,
        endpoint: Tensor | None = None,
        out: tuple[Tensor, Tensor] | None = None,
        workspace: Tensor | None = None,
        overlap: bool = False,
        on_step: OnStep | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores float32 [B, K] and ids int64 [B, K], as `score_topk`; arguments as there and in `encode_ids`.

        `plan` is memory for the plan of these histories, from `plan(B)`; without it the step takes its own. `on_step`
        hears the seconds of encoder and top K: of launching them where that is a GPU.
        """
        plan = plan or self.plan(len(offsets) - 1)
        if plan is not None:
            plan.refill(offsets, overlap)
        started = time.perf_counter()
        endpoint = encode_ids(
            self.weights, self.path, ids, offsets, plan=plan, out=endpoint,
            backend=self.encoder_backend(len(offsets) - 1), overlap=overlap,
        )  # fmt: skip
        encoded = time.perf_counter()
        best = score_topk(
            endpoint, self.table, k, exclude, deny,
            out=out, workspace=workspace, table_bytes=self.table_bytes, backend=self.backend, overlap=overlap,
        )  # fmt: skip
        if on_step is not None:
            on_step(encoded - started, time.perf_counter() - encoded)
        return best


class _Request:
    """A graph's part of the buffers, on host or device: where histories begin, where exclusions begin, ids of both."""

    def __init__(self, words: Tensor, batch: int, items: int) -> None:
        ids = 2 * (batch + 1)
        self.words = words[: ids + items]
        self.offsets, self.exclude_offsets = self.words[: batch + 1], self.words[batch + 1 : ids]
        self.ids = self.words[ids:]


class _Response:
    """Ids int64 [B, K], then scores float32 [B, K], in one piece of memory, on host or device."""

    def __init__(self, words: Tensor, batch: int, k: int) -> None:
        ids = 2 * batch * k
        self.words = words[: ids + batch * k]
        self.ids = self.words[:ids].view(torch.int64).view(batch, k)
        self.scores = self.words[ids:].view(torch.float32).view(batch, k)


class CapturedStep:
    """One batch size: its graph, and what that reads and writes on the host.

    Attributes:
        batch: the batch size.
        runs: of graphs for a request.
    """

    runs: ClassVar[int] = 1

    def __init__(self, submission: Submission, request: _Request, response: _Response, lock: threading.Lock) -> None:
        self.batch = len(request.offsets) - 1
        self._submission, self._lock = submission, lock
        self._offsets = request.offsets.numpy()
        self._exclude_offsets = request.exclude_offsets.numpy()
        self._ids = request.ids.numpy()
        self._best = response.ids.numpy()
        self._scores = response.scores.numpy()
        line = submission.completion.line
        self._request = None if line is None else self._native(line)

    @ranged("fave/step")
    def run(self, histories: Histories, exclude: bool) -> tuple[Floats, Ints]:
        """Scores float32 [B, K] and item numbers int64 [B, K], 0 where a list ends early.

        Args:
            histories: what `StepGraphs.fitting` was asked for.
            exclude: leave each history's own items out.

        Raises:
            RuntimeError: CUDA failed.
            TimeoutError: it did not answer.
        """
        ids, offsets = histories
        if self._request is not None:
            return self._request.run(ids, offsets, exclude)
        users, total = len(offsets) - 1, len(ids)
        with self._lock:
            self._ids[:total] = ids
            self._offsets[: users + 1] = offsets
            self._offsets[users + 1 :] = total
            self._exclude_offsets[:] = self._offsets if exclude else 0
            self._submission.run()
            return self._scores[:users].copy(), self._best[:users].copy()

    def _native(self, line: _C.Line) -> _C.Request:
        from fave_fast import _C

        return _C.Request(
            line,
            self._submission.handle,
            offsets=self._offsets.ctypes.data,
            exclude_offsets=self._exclude_offsets.ctypes.data,
            ids=self._ids.ctypes.data,
            scores=self._scores.ctypes.data,
            best=self._best.ctypes.data,
            batch=len(self._best),
            items=len(self._ids),
            k=self._best.shape[1],
            timeout=self._submission.timeout,
        )


class CapturedParts:
    """A request in parts, each for a graph; other threads' requests may run between two of them.

    Attributes:
        parts: in the order of the histories.
        runs: of graphs for the request.
    """

    def __init__(self, graphs: Mapping[int, CapturedStep], parts: Sequence[Part]) -> None:
        """`graphs` by batch size."""
        self.parts, self.runs = parts, len(parts)
        self._graphs = graphs

    def run(self, histories: Histories, exclude: bool) -> tuple[Floats, Ints]:
        """As `CapturedStep.run`; `histories` are what `StepGraphs.split` was asked for."""
        return end_to_end(self._graphs[part.batch].run(part.cut(histories), exclude) for part in self.parts)


class StepGraphs:
    """Captured graphs of one step for every batch size of `batches`, and the buffers that they share.

    Several threads may run them; one runs at a time.

    Attributes:
        k: K of the lists.
        batches: the batch sizes, ascending.
    """

    def __init__(self, step: Step, k: int, batches: Sequence[int] = BATCHES, timeout: float = 10.0) -> None:
        """Capture, the largest first; waits for the device. `timeout` as in `Submission`.

        Raises:
            BackendError: the step's backend cannot run here.
        """
        self.k, self.batches = k, tuple(sorted(batches))
        self._step, self._timeout = step, timeout
        self._lock = threading.Lock()
        table = step.table
        device, most = table.device, self.batches[-1]
        words = (2 * (most + 1) + items_held(most), 3 * most * k)
        self._request_host, self._response_host = (torch.zeros(n, dtype=torch.int32).pin_memory() for n in words)
        self._request = torch.zeros(words[0], dtype=torch.int32, device=device)
        # The last kernel writes the lists where the host reads them: the copying behind it took up to 6 us of a request
        # of 512 (H200). A collective's step may end with a copy, which has to stay on the device.
        self._response = self._response_host
        if not step.only_kernels:
            self._response = torch.zeros(words[1], dtype=torch.int32, device=device)
        self._endpoint = torch.zeros(most, table.shape[1], dtype=table.dtype, device=device)
        sizes = [workspace_bytes(self._endpoint[:b], table, k, items_held(b), step.table_bytes) for b in self.batches]
        self._workspace = torch.empty(max(sizes), dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._completion = Completion(self._stream)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._pool = torch.cuda.graph_pool_handle()
        self._plans: list[Plan | None] = []  # the graphs write them at every run, outside of the pool
        self._captured = {batch: self._capture(batch) for batch in reversed(self.batches)}

    def batch_of(self, histories: Histories) -> int | None:
        """The batch of the smallest graph that takes these histories, or None."""
        return smallest_batch(self.batches, len(histories.offsets) - 1, len(histories.ids))

    def fitting(self, histories: Histories) -> CapturedStep | None:
        """The smallest graph that takes these histories, or None."""
        batch = self.batch_of(histories)
        return None if batch is None else self.of(batch)

    def split(self, histories: Histories) -> CapturedParts | None:
        """For histories that no graph takes: several graphs, or None where one history fits none of them.

        Lists are, to the bit, those of the kernels for all histories at once: to them a batch makes no difference.
        """
        parts = parts_of(histories.offsets, self.batches, self._step.encoder_backend)
        return None if parts is None else CapturedParts(self._captured, parts)

    def of(self, batch: int) -> CapturedStep:
        """The graph of `batch`, one of `batches`."""
        return self._captured[batch]

    def _capture(self, batch: int) -> CapturedStep:
        from fave_fast.kernels.submit import carry

        host, request = (_Request(words, batch, items_held(batch)) for words in (self._request_host, self._request))
        response_host, response = (_Response(words, batch, self.k) for words in (self._response_host, self._response))
        pdl = self._step.only_kernels and launches_overlap(self._step.table.device)
        answer = () if self._step.only_kernels else (response.words, response_host.words)
        exclude = Exclusions(request.ids, request.exclude_offsets)
        endpoint = self._endpoint[:batch]

        def work() -> None:
            self._step(
                request.ids, request.offsets, exclude, self.k,
                plan=plan, endpoint=endpoint, out=(response.scores, response.ids), workspace=self._workspace,
                overlap=self._step.only_kernels,
            )  # fmt: skip

        with torch.cuda.stream(self._stream), torch.no_grad():
            # Taken here: memory that another thread's kernels have yet to read may be free on the stream outside.
            plan = self._step.plan(batch)
            self._plans.append(plan)
            carry(host.words, request.words, pdl=False)
            work()  # compiles what is not compiled yet, on the histories of no request
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate or synchronize meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                carry(host.words, request.words, pdl=pdl)
                work()
                self._completion.signal(*answer, early=pdl)
        return CapturedStep(Submission(graph, self._completion, self._timeout), host, response_host, self._lock)
