"""One step of training, from a batch of windows to changed weights, as each device runs it best.

`ReferenceSteps` gathers left-padded histories on the host and runs the reference network. `FusedSteps` keeps the log on
the GPU, packs histories there, runs the network through the ops and replays the whole step (pack, losses, backward,
clip, Adam) from a CUDA graph: one for each `_Shape` of a batch that comes up more than once. The host only says where
the batch's windows lie, and never waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fave_fast import losses
from fave_fast.config import Config
from fave_fast.data import Interactions, gather_histories
from fave_fast.fused import Network, rotary_of
from fave_fast.model import FAVE
from fave_fast.ops.adam import ClippedAdam
from fave_fast.ops.attention import SHORT
from fave_fast.ops.beside import Beside
from fave_fast.ops.input_modulation import KERNEL_CHANNELS
from fave_fast.ops.packed import pack_windows
from fave_fast.ops.registry import Implementation, Op, triton_kernels
from fave_fast.profiling import ranged
from fave_fast.ranks import ALONE, Ranks

Positions = npt.NDArray[np.int64]

_Captured = tuple[torch.cuda.CUDAGraph, Tensor, Tensor]  # its loss, and what Adam reads at each replay
_LEAST_STEP = 256  # rows between two graphs, at least


class _Shape(NamedTuple):
    """What a step's kernels and memory depend on: of two batches of one shape, one graph serves both."""

    rows: int
    fillers: int
    longest: int  # no history has more items


class Steps(Protocol):
    """What the trainer asks of a way to take steps."""

    def take(self, starts: Positions, targets: Positions, seed: int) -> Tensor:
        """One step on the windows items[start:target] -> items[target]; the loss, a scalar on the device.

        Its value is good until the next step. `seed` decides what the fused path draws by its own generators.
        """


class TotalLoss(nn.Module):
    """An objective's total loss as a module that holds all passes through the network, a tangent's included.

    That is what DistributedDataParallel can wrap: forward mode through a wrapped network fails.
    """

    def __init__(self, model: FAVE, config: Config, objective: losses.Objective, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.config, self.objective, self.dtype = model, config, objective, dtype

    def forward(self, history: Tensor, targets: Tensor, share: losses.Share | None) -> Tensor:
        """History int64 [B, L] left-padded with 0, targets int64 [B]; `share`: where these are a rank's part."""
        with torch.autocast(history.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            network = losses.ReferenceNetwork(self.model, history, None, share)
            return self.objective(network, self.config, targets, None).total


@dataclass
class ReferenceSteps:
    """Steps of the reference network, on any device and by any number of ranks, which share each batch."""

    data: Interactions
    config: Config
    model: FAVE
    optimiser: torch.optim.Adam
    stage: int
    dtype: torch.dtype
    backend: str = "auto"  # of nothing here
    ranks: Ranks = ALONE
    objective: losses.Objective | None = None  # None: the stage's

    def __post_init__(self) -> None:
        weights = self.config.loss
        matching = weights.rec if self.stage == 1 else weights.match
        some_unused = min(matching, weights.alpha, weights.beta) == 0
        total = TotalLoss(self.model, self.config, self.objective or losses.OBJECTIVES[self.stage - 1], self.dtype)
        self._total = self.ranks.averaged(total, some_unused)

    @ranged("fave/step")
    def take(self, starts: Positions, targets: Positions, seed: int) -> Tensor:
        """As `Steps`; all draws come from PyTorch's global generator. The mean of all ranks' losses is the batch's."""
        device = self.model.item_embedding.weight.device
        rows, part = self.ranks.share(len(starts))
        starts, targets = starts[rows], targets[rows]
        history = gather_histories(self.data.items, starts, targets, self.config.model.max_length)
        ids = torch.from_numpy(history).to(device)
        wanted = torch.from_numpy(self.data.items[targets].astype(np.int64)).to(device)
        share = _share(self.ranks, part)
        total: Tensor = self._total(ids, wanted, share)
        if share is not None:
            total = total * (self.ranks.count * part)  # gradients are averaged as if the shares were equal
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return total.detach()


@dataclass
class FusedSteps:
    """Steps through the ops, on a CUDA device from graphs. Elsewhere each is launched as it comes: for tests.

    Several ranks share each batch; the exchange of gradients is a part of the graph. Each captures when it has to: a
    captured exchange meets one that is launched.
    """

    data: Interactions
    config: Config
    model: FAVE
    optimiser: torch.optim.Adam
    stage: int
    dtype: torch.dtype
    backend: str = "auto"
    capture: bool = True
    ranks: Ranks = ALONE
    objective: losses.Objective | None = None  # None: the stage's
    _graphs: dict[_Shape, _Captured | None] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        device = self.model.item_embedding.weight.device
        self._adam = ClippedAdam(self.optimiser, self.config.train.clip, self.backend)
        self._items = torch.from_numpy(self.data.items.copy()).to(device)  # a log's arrays may be read-only
        self._tables = rotary_of(self.config.model, device)
        self._capturing = self.capture and device.type == "cuda"
        if self._capturing:
            # Where each window starts and ends, and the seed: what the graphs read.
            whole = range(self.config.train.batch_size)
            size = len(whole[self.ranks.share(len(whole))[0]])
            self._input = torch.zeros(2 * size + 1, dtype=torch.int64, device=device)
            # Of the chain of kernels, of what it will wait for, and of what the update alone reads.
            self._stream, self._beside, self._behind = (
                torch.cuda.Stream(device, priority=one)  # type: ignore[no-untyped-call]
                for one in (-2, -1, 0)
            )
            self._pool = torch.cuda.graph_pool_handle()

    @ranged("fave/step")
    def take(self, starts: Positions, targets: Positions, seed: int) -> Tensor:
        """As `Steps`. Lambda and dropout come from `seed`, the rest from PyTorch's generator of the device.

        The mean of all ranks' losses is the batch's.
        """
        device = self._items.device
        whole = len(starts) == self.config.train.batch_size
        mine, part = self.ranks.share(len(starts))
        starts, targets = starts[mine], targets[mine]
        shape = self._shape(targets - starts)
        host = torch.from_numpy(np.concatenate((starts, targets, [seed])))
        if not self._capturing or not whole or part == 0:
            return self._step(host.to(device), shape, part, None)[0]
        self._input.copy_(host.pin_memory(), non_blocking=True)
        if shape not in self._graphs:
            self._graphs[shape] = None
            return self._aside(shape, part)
        held = self._graphs[shape]
        if held is None:
            graph, addresses = torch.cuda.CUDAGraph(), self._adam.addresses()
            # Of several ranks NCCL's watchdog asks after its events from a thread of its own all the while.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                loss, gradients = self._step(self._input, shape, part, addresses)
            self._adam.bind(addresses, gradients)
            held = self._graphs[shape] = graph, loss, addresses
        held[0].replay()
        return held[1]

    @property
    def _tokens(self) -> int:
        """Rows that a history has beside its items'."""
        return int(self.config.model.conditioning == "token")

    def _shape(self, lengths: Positions) -> _Shape:
        """Of a batch of windows of these lengths, which may go beyond L."""
        longest = self.config.model.max_length
        lengths = np.minimum(lengths, longest)
        if self._tables is not None:
            short = SHORT - self._tokens
            longest = short if lengths.max(initial=0) <= short < longest else longest
        return _Shape(*rounded_rows(int(lengths.sum()), longest), longest)

    def _aside(self, shape: _Shape, part: float) -> Tensor:
        """A step launched as it comes, on a stream of its own as capturing wants it."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            loss = self._step(self._input, shape, part, None)[0]
        here.wait_stream(self._stream)
        return loss

    def _step(
        self, given: Tensor, shape: _Shape, part: float, addresses: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and the gradients, where `part` of the batch is here; `addresses` as `ClippedAdam.take` wants it."""
        count = len(given) // 2
        starts, targets, seed = given[:count], given[count:-1], given[-1:]
        beside, behind = self._lanes(addresses is not None)
        with beside.work(given):  # until the network reads it; meanwhile the targets are looked up, and noise is drawn
            packed = pack_windows(
                self._items, starts, targets, shape.longest, shape.rows, shape.fillers, backend=self.backend
            )
        share, tables = _share(self.ranks, part), self._tables
        if tables is not None:
            ages = shape.longest + self._tokens
            tables = tables[0][:ages], tables[1][:ages]
        network = Network(
            self.model, packed, seed, self.dtype, self.backend, tables=tables, share=share, beside=beside, behind=behind
        )
        objective = self.objective or losses.OBJECTIVES[self.stage - 1]
        wanted = self._items.index_select(0, targets).long()
        with torch.autocast(given.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            found = objective(network, self.config, wanted, None)
        source_known = beside.so_far()
        with behind.work():  # what was computed here is known there
            pass
        found.backward(1.0 if share is None else part)
        with behind.ahead(), torch.no_grad():
            source_known()
            total = found.total.detach()  # of one loss, that itself
            if share is not None:
                total = total * (part * self.ranks.count)
        beside.finish()
        behind.finish()
        if share is not None:
            self._sum_gradients()
        gradients = [one.grad for one in self._adam.parameters]
        self._adam.take(addresses)
        self.optimiser.zero_grad(set_to_none=True)
        return total, gradients

    def _lanes(self, captured: bool) -> tuple[Beside, Beside]:
        """What runs beside a step's chain of kernels, and behind it, in streams of their own where it is captured.

        The kernels of a step that is launched as it comes wait for the host, one after the other.
        """
        return (Beside(self._beside), Beside(self._behind)) if captured else (Beside(), Beside())

    def _sum_gradients(self) -> None:
        """Over ranks, in one exchange."""
        moved = [(one, one.grad) for one in self._adam.parameters if one.grad is not None]
        moved.sort(key=lambda pair: pair[0].numel() % 4 != 0)  # Adam reads 16 bytes at a time where parts begin at such
        flat = self.ranks.sum(torch.cat([gradient.flatten() for _, gradient in moved]))
        parts = torch.split(flat, [one.numel() for one, _ in moved])
        for (one, gradient), summed in zip(moved, parts, strict=True):
            one.grad = summed.view_as(gradient)


def _share(ranks: Ranks, part: float) -> losses.Share | None:
    """What losses are to know of a batch that several ranks share, of which `part` is here."""
    return losses.Share(part, ranks.sum) if ranks.count > 1 else None


def rounded_rows(total: int, max_length: int) -> tuple[int, int]:
    """Rows of a batch whose histories have `total` items, and its fillers, of 1 to `max_length` rows each.

    Steps of a sixteenth of a power of two: at most an eighth of the rows are fillers', and few graphs are needed.
    """
    if max_length == 1:
        return total, 0
    step = max(_LEAST_STEP, 2 ** (total.bit_length() - 5))
    if total % step == 0:
        return total, 0
    fillers = -(-step // (max_length - 1))
    return -(-(total + fillers) // step) * step, fillers


def _on_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"its steps are captured in CUDA graphs, and the model is on {device.type}"
    return triton_kernels(device, dtype)


def _in_bf16(device: torch.device, dtype: torch.dtype) -> str | None:
    # Whole trainings of both stages agreed with the reference's in bf16. In fp32, of 512 histories of 50 items on an
    # H200, a step of stage 2 takes 62 ms and the reference's 43, for its kernels' products are multiply-adds.
    return None if dtype == torch.bfloat16 else "trainings in other dtypes than bf16 take captured steps by name alone"


OP: Op[type[ReferenceSteps] | type[FusedSteps]] = Op(
    "training_step",
    (
        Implementation("triton", FusedSteps, _on_cuda, _in_bf16),
        Implementation("reference", ReferenceSteps),
    ),
)


def steps_for(
    device: torch.device, dtype: torch.dtype, backend: str, d: int
) -> type[ReferenceSteps] | type[FusedSteps]:
    """How steps of a model of D = `d` are taken on `device`: fused, or by the reference network.

    Raises:
        BackendError: the backend cannot run here.
    """
    if device.type != "cuda" or not OP.offers(backend):  # backends of the catalogue's operations alone
        return ReferenceSteps
    beyond = {} if d in KERNEL_CHANNELS else {"triton": f"its kernels take D of {KERNEL_CHANNELS}, not {d}"}
    return OP.resolve(backend, device, dtype, beyond)
