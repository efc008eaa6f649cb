"""Cross-entropy over the catalogue, eq. (12), without a [B, N] matrix in memory; and its sampled form.

Measured on one NVIDIA H200 (torch 2.11, Triton 3.6): loss and both gradients in microseconds, bfloat16, B = 512,
D = 128, and what is allocated on the way at a million items (`python -m bench.cross_entropy`):

                              N = 12,101   100,000   1,000,000
    triton, here                      44       150       1,188      252 MiB (the table's gradient is 244)
    PyTorch, torch.compile           105       339       3,098    1,953
    PyTorch, eager                   189       875       7,792    5,862
    reference, in chunks               -         -      14,414      468
    cut-cross-entropy 25.1.1       1,142     2,364      19,867      488
    Liger-Kernel 0.8.5             7,946   102,605     284,827      488

The libraries are made for many rows of wide vectors over fewer classes: with 512 rows of 128 Liger-Kernel works through
the batch in chunks of a few rows. Neither could be captured in a CUDA graph, so their times hold launches too, which at
a million items no longer matters. cut-cross-entropy gives other bits in each run, and three to five times PyTorch's
error in the endpoint's gradient. So the kernels are our own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fave_fast.ops.beside import Beside
from fave_fast.ops.registry import Implementation, Op, interpreting, not_interpreted, triton_kernels, uncompiled
from fave_fast.ops.table_gradient import TableGradient
from fave_fast.ops.tiles import whole_rows
from fave_fast.ops.tuning import Shapes, tile_shapes
from fave_fast.precision import widened
from fave_fast.profiling import ranged

MAX_SCORES = 1 << 26  # 256 MiB of float32; autograd keeps about four times that
_CHUNK_SCORES = 1 << 24
_KERNEL_WIDTHS = (16, 32, 64, 128, 256)


class Pairs(NamedTuple):
    """Items that are no candidates of rows.

    Attributes:
        rows: int64 [P]; one from B on is nobody.
        items: int64 [P]; 0 is none.
    """

    rows: Tensor
    items: Tensor


_Run = Callable[[Tensor, Tensor, Tensor, Pairs | None, TableGradient | None], Tensor]


@ranged("fave/loss")
def cross_entropy(
    endpoint: Tensor,
    table: Tensor,
    targets: Tensor,
    left_out: Pairs | None = None,
    *,
    gradient: TableGradient | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean over rows of log sum_j exp(e . t_j) - e . t_target, j over the items 1 to N; differentiable once.

    Args:
        endpoint: [B, D] floating point. Under autocast both factors are taken in its dtype.
        table: [N + 1, D], same dtype and device; row 0 is the padding, no candidate, and gets a gradient of zero.
        targets: [B] int64, from 1 to N.
        left_out: what j leaves out, row by row, but for the row's target. For the kernels it is made a bit an item.
        gradient: of `shared` as the table is: where the kernels leave its gradient, not rounded. That is computed on
            its second stream, and so is the loss, from what the gradients need.
        backend: auto, reference (scores in memory up to 2^26 of them, else computed again in the backward pass) or
            triton (16-bit; no score in memory, and the same bits in every run).

    Returns:
        A scalar, float32 (float64 of float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; or, on the CPU, a target that is no item.
        BackendError: the backend cannot run here.
    """
    loss: Tensor = _cross_entropy(endpoint, table, targets, left_out, gradient, backend)
    return loss


@uncompiled
def _cross_entropy(
    endpoint: Tensor,
    table: Tensor,
    targets: Tensor,
    left_out: Pairs | None,
    gradient: TableGradient | None,
    backend: str,
) -> Tensor:
    device = endpoint.device.type
    narrowed = torch.is_autocast_enabled(device)
    if narrowed:
        table = table.to(torch.get_autocast_dtype(device))
    _check(endpoint, table, targets, narrowed)
    for name, one in zip(Pairs._fields, left_out or (), strict=False):
        if one.dim() != 1 or one.dtype != torch.int64 or one.device != endpoint.device:
            raise ValueError(
                f"left_out's {name} are {one.dtype} {list(one.shape)} on {one.device}; expected int64 [P] on "
                f"{endpoint.device}"
            )
    d = endpoint.shape[1]
    beyond = {} if d in _KERNEL_WIDTHS else {"triton": f"its kernels take D of {_KERNEL_WIDTHS}, not {d}"}
    run = OP.resolve(backend, endpoint.device, table.dtype, beyond)
    with torch.autocast(device, enabled=False):
        loss: Tensor = run(endpoint, table, targets, left_out, gradient)
        return loss


def sampled_cross_entropy(
    endpoint: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor | None = None
) -> Tensor:
    """`cross_entropy` with its sum over the catalogue estimated from negatives; memory B x S (x D if drawn by row).

    The target is summed as it is, and each negative that is not the target with weight 1 / (S q): the expected sum is
    the whole catalogue's. Plain PyTorch, differentiable.

    Args:
        endpoint: [B, D] floating point.
        table: [N + 1, D], same dtype and device.
        targets: [B] int64, from 1 to N.
        negatives: int64 [S] for all rows or [B, S], from 1 to N, drawn with replacement.
        log_q: log-probability of each negative's draw, shaped as `negatives`; by default uniform over the N items.

    Returns:
        A scalar, float32 (float64 of float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    _check(endpoint, table, targets)
    shared = negatives.dim() == 1
    if not shared and negatives.shape[:1] != targets.shape:
        raise ValueError(f"negatives are {list(negatives.shape)}; expected [S] or [{len(targets)}, S]")
    if log_q is not None and log_q.shape != negatives.shape:
        raise ValueError(f"log_q is {list(log_q.shape)}; expected {list(negatives.shape)} as the negatives")
    items = table[negatives]
    scores = widened(F.linear(endpoint, items) if shared else torch.einsum("bd,bsd->bs", endpoint, items))
    drawn = -math.log(len(table) - 1) if log_q is None else log_q
    scores = scores - drawn - math.log(negatives.shape[-1])
    scores = scores.masked_fill(negatives == targets[:, None], -torch.inf)
    wanted = (widened(endpoint) * widened(table[targets])).sum(1, keepdim=True)
    loss: Tensor = (torch.cat((wanted, scores), 1).logsumexp(1) - wanted[:, 0]).mean()
    return loss


def _check(endpoint: Tensor, table: Tensor, targets: Tensor, narrowed: bool = False) -> None:
    """`narrowed`: by autocast, so that the endpoint may be of another dtype yet."""
    if endpoint.dim() != 2 or table.dim() != 2 or endpoint.shape[1] != table.shape[1] or len(table) < 2:
        raise ValueError(
            f"endpoint {list(endpoint.shape)} and table {list(table.shape)}; expected [B, D] and [N + 1, D] with an "
            f"item"
        )
    differ = endpoint.dtype != table.dtype and not narrowed
    if differ or not endpoint.is_floating_point() or endpoint.device != table.device:
        raise ValueError(
            f"endpoint is {endpoint.dtype} on {endpoint.device} and table {table.dtype} on {table.device}; expected "
            f"one floating-point dtype on one device"
        )
    if targets.shape != endpoint.shape[:1] or targets.dtype != torch.int64 or targets.device != endpoint.device:
        raise ValueError(
            f"targets are {targets.dtype} {list(targets.shape)} on {targets.device}; expected int64 "
            f"{list(endpoint.shape[:1])} on {endpoint.device}"
        )
    if targets.device.type == "cpu" and bool(((targets < 1) | (targets >= len(table))).any()):
        raise ValueError(f"a target is outside the catalogue; expected ids from 1 to {len(table) - 1}")


def _run(
    endpoint: Tensor, table: Tensor, targets: Tensor, left_out: Pairs | None, gradient: TableGradient | None
) -> Tensor:
    endpoint = endpoint.to(table.dtype)
    if len(endpoint) * (len(table) - 1) <= MAX_SCORES:
        scores = widened(F.linear(endpoint, table[1:]))
        if left_out is not None:
            scores = scores.masked_fill(_mask(left_out, targets, 1, len(table)), -torch.inf)
        loss: Tensor = F.cross_entropy(scores, targets - 1)
        return loss
    chunked: Tensor = cast(Any, _Chunked).apply(endpoint, table, targets, left_out)
    return chunked


def _run_triton(
    endpoint: Tensor, table: Tensor, targets: Tensor, left_out: Pairs | None, gradient: TableGradient | None
) -> Tensor:
    loss: Tensor = cast(Any, _Fused).apply(endpoint, table, targets, left_out, gradient)
    return loss


def _mask(left_out: Pairs, targets: Tensor, first: int, stop: int) -> Tensor:
    """Which of the items from `first` to `stop`, not included, are no candidates: bool [B, stop - first]."""
    rows, items = left_out
    count, width = len(targets), stop - first
    here = (rows < count) & (items >= first) & (items < stop)
    here &= targets[rows.where(here, 0)] != items
    places = (rows * width + items - first).where(here, count * width)
    mask = torch.zeros(count * width + 1, dtype=torch.bool, device=targets.device)
    return mask.index_fill_(0, places, True)[:-1].view(count, width)


class _Chunked(torch.autograd.Function):
    """Plain PyTorch, the items a chunk at a time; scores are computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, endpoint: Tensor, table: Tensor, targets: Tensor, left_out: Pairs | None) -> Tensor:
        log_sum = torch.full(targets.shape, -torch.inf, device=targets.device, dtype=widened(endpoint[:0]).dtype)
        for first, items in _chunks(endpoint, table):
            scores = widened(F.linear(endpoint, items))
            if left_out is not None:
                scores.masked_fill_(_mask(left_out, targets, first, first + len(items)), -torch.inf)
            log_sum = torch.logaddexp(log_sum, scores.logsumexp(1))
        ctx.save_for_backward(endpoint, table, targets, log_sum)
        ctx.left_out = left_out
        return (log_sum - (widened(endpoint) * widened(table[targets])).sum(1)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        endpoint, table, targets, log_sum = ctx.saved_tensors
        scale = grads[0] / len(endpoint)
        by_endpoint = torch.zeros_like(endpoint, dtype=log_sum.dtype)
        by_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        rows = torch.arange(len(endpoint), device=endpoint.device)
        for first, items in _chunks(endpoint, table):
            weights = (widened(F.linear(endpoint, items)) - log_sum[:, None]).exp_()
            if ctx.left_out is not None:
                weights.masked_fill_(_mask(ctx.left_out, targets, first, first + len(items)), 0.0)
            column = targets - first
            here = (column >= 0) & (column < len(items))
            weights[rows, column.clamp(0, len(items) - 1)] -= here.to(weights.dtype)
            narrow = (weights * scale).to(items.dtype)
            by_endpoint += narrow @ items
            if by_table is not None:
                by_table[first : first + len(items)] = narrow.T @ endpoint
        return by_endpoint.to(endpoint.dtype), by_table, None, None


def _chunks(endpoint: Tensor, table: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First id and rows of each chunk of items."""
    width = max(1, _CHUNK_SCORES // max(1, len(endpoint)))
    for first, stop in itertools.pairwise([*range(1, len(table), width), len(table)]):
        yield first, table[first:stop]


class _Fused(torch.autograd.Function):
    """The kernels; what they keep for the backward pass is one number a row, and the bits of what is left out."""

    @staticmethod
    def forward(
        ctx: Any,
        endpoint: Tensor,
        table: Tensor,
        targets: Tensor,
        left_out: Pairs | None,
        gradient: TableGradient | None,
    ) -> Tensor:
        from fave_fast.kernels import cross_entropy as kernels

        ctx.wide = endpoint.dtype  # of its gradient, which autograd would round to the products' dtype and back
        endpoint, table, targets = whole_rows(endpoint.to(table.dtype)), whole_rows(table), targets.contiguous()
        shapes = _shapes("forward", endpoint)
        length, spans = _spans(endpoint, table, shapes)
        highest, total = torch.empty(2, spans, len(endpoint), device=endpoint.device)
        log_sum, losses = torch.empty(2, len(endpoint), device=endpoint.device)
        bits = None
        if left_out is not None:
            words = -(-(len(table) - 1) // 32)
            bits = torch.zeros(len(endpoint), words, dtype=torch.int32, device=endpoint.device)
            kernels.mark(*(one.contiguous() for one in left_out), targets, bits, len(table) - 1)
        kernels.forward(
            endpoint, table, targets, bits, highest, total, log_sum, losses, span_tiles=length, **_sizes(shapes)
        )
        ctx.save_for_backward(endpoint, table, targets, bits, log_sum)
        ctx.gradient = gradient
        with _behind(gradient).work(losses):
            loss: Tensor = losses.mean()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from fave_fast.kernels import cross_entropy as kernels

        endpoint, table, targets, bits, log_sum = ctx.saved_tensors
        grad = grads[0].contiguous()
        by_endpoint = by_table = None
        if ctx.needs_input_grad[1]:
            shapes, gradient = _shapes("by_items", endpoint), ctx.gradient
            # First, though the chain waits for the rows' part: behind that, this ends late. A step of Beauty took 725
            # to 731 us so, and takes 710 to 716 (H200).
            by_table = torch.empty_like(table) if gradient is None else gradient.empty()
            read = [one for one in (endpoint, table, targets, bits, log_sum, grad) if one is not None]
            with _behind(gradient).work(*read):
                kernels.backward_table(endpoint, table, targets, bits, log_sum, grad, by_table, **_sizes(shapes))
            if gradient is not None:
                gradient.fill(by_table)
                by_table = None
        if ctx.needs_input_grad[0]:
            shapes = _shapes("by_rows", endpoint)
            length, spans = _spans(endpoint, table, shapes)
            parts = torch.empty(spans, *endpoint.shape, device=endpoint.device)
            by_endpoint = torch.empty_like(endpoint, dtype=ctx.wide)
            kernels.backward_queries(
                endpoint, table, targets, bits, log_sum, grad, parts, by_endpoint, span_tiles=length, **_sizes(shapes)
            )
        return by_endpoint, by_table, None, None, None


def _behind(gradient: TableGradient | None) -> Beside:
    return Beside() if gradient is None else gradient.behind


def _shapes(kernel: str, endpoint: Tensor) -> Shapes:
    wide = "_wide" if endpoint.shape[1] > 128 else ""
    return tile_shapes("cross_entropy", kernel + wide, endpoint.device)


def _sizes(shapes: Shapes) -> Shapes:
    return {name: value for name, value in shapes.items() if name != "spans"}


def _spans(endpoint: Tensor, table: Tensor, shapes: Shapes) -> tuple[int, int]:
    """Tiles of items that one program takes, and how many programs that makes a row block.

    Pinned with the tile shapes, not taken from the GPU at hand: the spans' sums are rounded one by one.
    """
    tiles = -(-(len(table) - 1) // shapes["T"])
    row_blocks = -(-len(endpoint) // shapes["M"])
    length = -(-tiles // max(1, min(tiles, shapes["spans"] // row_blocks)))
    return length, -(-tiles // length)


def _kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = triton_kernels(device, dtype)
    if reason is None and dtype == torch.float32 and not interpreting():
        return "its kernels are for bfloat16 and float16; float32 products without tensor cores are cuBLAS's"
    return reason


OP: Op[_Run] = Op(
    "cross_entropy",
    (
        Implementation("triton", _run_triton, _kernels, not_interpreted),
        Implementation("reference", _run),
    ),
)
