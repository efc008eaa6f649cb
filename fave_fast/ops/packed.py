"""Histories of a training step: out of the log into packed rows, and into the loss over a decoder's outputs.

And the decoder's hidden layers: of PyTorch some ten launches forward and as many backward, 55 us and more (H200).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fave_fast.ops.attention import Newest, newest_of
from fave_fast.ops.beside import Beside
from fave_fast.ops.input_modulation import KERNEL_CHANNELS, summed
from fave_fast.ops.registry import Implementation, Op, not_interpreted, triton_kernels
from fave_fast.ops.table_gradient import TableGradient
from fave_fast.ops.tuning import Shapes, tile_shapes
from fave_fast.precision import widened
from fave_fast.profiling import ranged

_MOST_HISTORIES = 1 << 14  # that one program adds up the lengths of
_MOST_ITEMS = 1 << 12  # of a history
_MOST_ROWS = 1 << 12  # each of which is compared with all


@dataclass(frozen=True)
class Packed:
    """B histories end to end, oldest item first, then F fillers without items that make up a fixed number of rows."""

    ids: Tensor  # int64 [rows]; 0 in fillers
    offsets: Tensor  # int64 [B + F + 1], rising from 0 to rows
    owners: Tensor  # int64 [rows]: which history a row belongs to
    users: Tensor  # int64 [B + F]: the keys of what is drawn
    newest: Newest  # of B + F histories
    count: int  # B
    longest: int  # no history has more rows


@dataclass(frozen=True)
class Picked:
    """What is read of outputs [B, width], a row at a time: first at the histories' own items, then at those drawn.

    Attributes:
        places: int64 [2 rows], in the flattened outputs; 0 where nothing is read.
        errors: float32, or float64 of such outputs, [2 rows]: y - 1 at own items, y at drawn ones, 0 where it is not
            counted: in fillers, and where the drawn item is one of the history.
        squares: the sum of their squares, a scalar of the same dtype.
        counted: how many are counted, likewise.
    """

    places: Tensor
    errors: Tensor
    squares: Tensor
    counted: Tensor


@ranged("fave/input")
def pack_windows(
    items: Tensor, starts: Tensor, ends: Tensor, max_length: int, rows: int, fillers: int, *, backend: str = "auto"
) -> Packed:
    """The last `max_length` items of items[start:end] for each history; on the tensors' device, without waiting for it.

    Args:
        items: integers [M].
        starts: int64 [B].
        ends: int64 [B], beyond starts.
        max_length: L.
        rows: of the result. What the histories leave is shared out among the fillers, 1 to L rows each.
        fillers: F.
        backend: auto, reference or triton (two launches).

    Raises:
        BackendError: the backend cannot run here.
    """
    run = PACK_WINDOWS.resolve(backend, items.device, torch.float32, _beyond(len(starts) + fillers, max_length))
    return run(items, starts, ends, max_length, rows, fillers)


def pick(outputs: Tensor, packed: Packed, drawn: Tensor, *, backend: str = "auto") -> Picked:
    """What L_src with sampled items (eq. 13) reads of a decoder's outputs; no gradients.

    Args:
        outputs: [B, width] floating point, contiguous; column i is item i's.
        packed: the histories.
        drawn: int64 [rows]: an item for each row.
        backend: auto, reference or triton (one launch).

    Raises:
        BackendError: the backend cannot run here.
    """
    refused = _beyond(len(packed.users), packed.longest)
    run = PICK.resolve(backend, outputs.device, outputs.dtype, refused)
    return run(outputs.detach(), packed, drawn)


class DecoderWeights(NamedTuple):
    """Of D's two hidden layers."""

    first: Tensor  # [D, D]
    first_bias: Tensor  # [D]
    second: Tensor  # [D, D]
    second_bias: Tensor  # [D]


def decoder_hidden(
    source: Tensor,
    weights: DecoderWeights,
    pad: int,
    dtype: torch.dtype,
    *,
    behind: Beside | None = None,
    backend: str = "auto",
) -> Tensor:
    """tanh(tanh(E_u W1^T + b1) W2^T + b2), as the outputs' product wants it; differentiable once.

    Args:
        source: E_u [B, D].
        weights: of source's dtype.
        pad: columns beside: one of ones, for biases, and zeros; a power of two.
        dtype: of the result. Where it has 16 bits the triton backend multiplies in tf32.
        behind: where the weights' gradients are added up; to be finished before they are read.
        backend: auto, reference or triton.

    Returns:
        [B, D + pad].

    Raises:
        BackendError: the backend cannot run here.
    """
    d, beyond = source.shape[1], {}
    if d not in KERNEL_CHANNELS:
        beyond["triton"] = f"its kernels take D of {KERNEL_CHANNELS}, not {d}"
    elif source.dtype != torch.float32:
        beyond["triton"] = f"its kernels take float32, not {source.dtype}"
    run = DECODER_HIDDEN.resolve(backend, source.device, source.dtype, beyond)
    return run(source, weights, pad, dtype, behind or Beside())


def rows_of(table: Tensor, ids: Tensor, *, gradient: TableGradient | None = None, backend: str = "auto") -> Tensor:
    """Rows of a table [N + 1, D] for a batch's ids int64 [B], [B, D]; differentiable once, row 0 a padding's.

    Of up to 3,072 ids PyTorch adds the gradients up in four programs, 14 us for 512; the triton backend in one each,
    without atomics. With `gradient`, of `shared` as the table is, it leaves them there.

    Raises:
        BackendError: the backend cannot run here.
    """
    d, beyond = table.shape[1], {}
    if d not in KERNEL_CHANNELS:
        beyond["triton"] = f"its kernels take D of {KERNEL_CHANNELS}, not {d}"
    elif table.dtype != torch.float32 or len(ids) > _MOST_ROWS:
        beyond["triton"] = f"its kernels take up to {_MOST_ROWS} float32 rows, not {len(ids)} of {table.dtype}"
    return ROWS_OF.resolve(backend, table.device, table.dtype, beyond)(table, ids, gradient)


def padded_weights(
    weight: Tensor, bias: Tensor, pad: int, dtype: torch.dtype, *, behind: Beside | None = None, backend: str = "auto"
) -> Tensor:
    """Weights [N, D] and, as a column more, biases [N], in `dtype` and with zeros up to N of whole 8 and D + pad.

    N + 1 = 12,102 columns of 16 bits got kernels for rows of whole 4 bytes: 20 us forward, 14 and 12 backward, and the
    biases' gradient, a sum of its own, 20 (H200, B = 512). Differentiable once. `behind`: where their gradients are
    computed, to be finished before they are read; the result's may be computed there, too.

    Raises:
        BackendError: the backend cannot run here.
    """
    return PADDED_WEIGHTS.resolve(backend, weight.device, dtype)(weight, bias, pad, dtype, behind or Beside())


def _beyond(histories: int, longest: int) -> dict[str, str]:
    if histories <= _MOST_HISTORIES and longest <= _MOST_ITEMS:
        return {}
    most = f"{_MOST_HISTORIES} histories of {_MOST_ITEMS} items"
    return {"triton": f"its kernels take up to {most}, not {histories} of {longest}"}


def _pack_reference(items: Tensor, starts: Tensor, ends: Tensor, max_length: int, rows: int, fillers: int) -> Packed:
    lengths = (ends - starts).clamp_max(max_length)
    count = len(starts)
    rest = rows - lengths.sum()
    place = torch.arange(fillers, device=starts.device)
    lengths = torch.cat((lengths, (rest + place) // max(fillers, 1)))
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    row = torch.arange(rows, device=starts.device)
    owners = torch.searchsorted(offsets[1:], row, right=True)
    last = F.pad(ends, (0, fillers))[owners] - offsets[1:][owners]
    real = owners < count
    ids = torch.where(real, items[torch.where(real, last + row, 0)], 0).long()
    users = torch.arange(count + fillers, device=starts.device)
    return Packed(ids, offsets, owners, users, newest_of(offsets, rows), count, max_length)


def _pack_triton(items: Tensor, starts: Tensor, ends: Tensor, max_length: int, rows: int, fillers: int) -> Packed:
    from fave_fast.kernels import packed as kernels

    histories = len(starts) + fillers
    ids, owners, offsets, users = (starts.new_empty(n) for n in (rows, rows, histories + 1, histories))
    newest = Newest(torch.empty_like(users), torch.empty_like(ids, dtype=torch.int32))
    kernels.pack_windows(
        items, starts.contiguous(), ends.contiguous(), offsets, ids, owners, users, newest.rows, newest.owners,
        longest=max_length,
    )  # fmt: skip
    return Packed(ids, offsets, owners, users, newest, len(starts), max_length)


def places_of(packed: Packed, ids: Tensor, width: int) -> Tensor:
    """Where outputs [B, width] have each row's history and item, flattened, int64 [rows]; 0 in fillers."""
    return torch.where(packed.owners < packed.count, packed.owners * width + ids, 0)


def own_items(packed: Packed, width: int) -> Tensor:
    """Which of outputs [B, width] are at a history's own items; bool. Column 0, the padding's, means nothing."""
    own = torch.zeros(packed.count * width, dtype=torch.bool, device=packed.ids.device)
    return own.index_fill_(0, places_of(packed, packed.ids, width), True).view(-1, width)


def _pick_reference(outputs: Tensor, packed: Packed, drawn: Tensor) -> Picked:
    width = outputs.shape[1]
    real, others = packed.owners < packed.count, places_of(packed, drawn, width)
    counts = torch.cat((real, real & ~own_items(packed, width).flatten()[others]))
    places = torch.cat((places_of(packed, packed.ids, width), others))
    errors = widened(outputs.flatten().index_select(0, places))
    errors[: len(drawn)] -= 1
    errors.masked_fill_(~counts, 0)
    return Picked(places, errors, errors.square().sum(), counts.sum(dtype=errors.dtype))


def _pick_triton(outputs: Tensor, packed: Packed, drawn: Tensor) -> Picked:
    from fave_fast.kernels import packed as kernels

    rows, histories = len(packed.ids), len(packed.users)
    places = torch.empty(2 * rows, dtype=torch.int64, device=outputs.device)
    errors = torch.empty(2 * rows, dtype=torch.float32, device=outputs.device)
    sums = torch.empty(2, histories, dtype=torch.float32, device=outputs.device)
    kernels.pick(
        outputs, packed.ids, packed.offsets, drawn, places, errors, sums, count=packed.count, longest=packed.longest
    )
    squares, counted = sums.sum(1).unbind()
    return Picked(places, errors, squares, counted)


def _decoder_reference(source: Tensor, weights: DecoderWeights, pad: int, dtype: torch.dtype, behind: Beside) -> Tensor:
    one = F.linear(source, weights.first, weights.first_bias).tanh()
    two = F.linear(one, weights.second, weights.second_bias).tanh()
    return torch.cat((two, torch.ones_like(two[:, :1]), two.new_zeros(len(two), pad - 1)), 1).to(dtype)


class _Decoder(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(ctx: Any, pad: int, dtype: torch.dtype, behind: Beside, source: Tensor, *weights: Tensor) -> Tensor:
        from fave_fast.kernels import packed as kernels

        source, weights = source.contiguous(), tuple(one.contiguous() for one in weights)
        one, two = torch.empty(2, *source.shape, device=source.device)
        out = torch.empty(len(source), source.shape[1] + pad, dtype=dtype, device=source.device)
        kernels.decoder(source, *weights, one, two, out, shapes=_decoder_shapes("forward", source))
        ctx.save_for_backward(source, weights[0], weights[2], one, two)
        ctx.behind = behind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from fave_fast.kernels import packed as kernels

        source, first, second, one, two = ctx.saved_tensors
        shapes, d = _decoder_shapes("backward", source), source.shape[1]
        source_grad = torch.empty_like(source)
        part = torch.empty(-(-len(source) // shapes["users"]), 2 * d * d + 2 * d, device=source.device)
        grad = grads[0].contiguous()
        kernels.decoder_backward(source, first, second, one, two, grad, source_grad, part, shapes=shapes)
        with ctx.behind.work(part):
            total = summed(part, source.dtype)
        one_grad, two_grad, one_bias, two_bias = total.tensor_split((d * d, 2 * d * d, 2 * d * d + d))
        return None, None, None, source_grad, one_grad.view(d, d), one_bias, two_grad.view(d, d), two_bias


class _RowsOf(torch.autograd.Function):
    """The kernel under autograd."""

    @staticmethod
    def forward(ctx: Any, gradient: TableGradient | None, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.gradient = table.shape, gradient
        return table.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from fave_fast.kernels import packed as kernels

        ids, grad = ctx.saved_tensors[0].contiguous(), grads[0].contiguous()

        def add(total: Tensor) -> Tensor:
            if len(ids):
                kernels.add_rows(ids, grad, total)
            return total

        if ctx.gradient is None:
            return None, add(torch.zeros(ctx.table, device=ids.device)), None
        ctx.gradient.add(add)
        return None, None, None


class _Padded(torch.autograd.Function):
    """The kernel under autograd."""

    @staticmethod
    def forward(ctx: Any, pad: int, dtype: torch.dtype, behind: Beside, weight: Tensor, bias: Tensor) -> Tensor:
        from fave_fast.kernels import packed as kernels

        rows, d = weight.shape
        padded = torch.empty(-(-rows // 8) * 8, d + pad, dtype=dtype, device=weight.device)
        kernels.pad(weight.contiguous(), bias.contiguous(), padded, back=False)
        ctx.rows, ctx.d, ctx.wide, ctx.behind = rows, d, weight.dtype, behind
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from fave_fast.kernels import packed as kernels

        with ctx.behind.work(*grads):
            weight = torch.empty(ctx.rows, ctx.d, dtype=ctx.wide, device=grads[0].device)
            bias = torch.empty(ctx.rows, dtype=ctx.wide, device=grads[0].device)
            kernels.pad(weight, bias, grads[0].contiguous(), back=True)
        return None, None, None, weight, bias


def _rows_reference(table: Tensor, ids: Tensor, gradient: TableGradient | None) -> Tensor:
    return F.embedding(ids, table, padding_idx=0)


def _rows_triton(table: Tensor, ids: Tensor, gradient: TableGradient | None) -> Tensor:
    rows: Tensor = cast(Any, _RowsOf).apply(gradient, table, ids)
    return rows


def _padded_reference(weight: Tensor, bias: Tensor, pad: int, dtype: torch.dtype, behind: Beside) -> Tensor:
    return F.pad(torch.cat((weight, bias[:, None]), 1).to(dtype), (0, pad - 1, 0, -len(weight) % 8))


def _padded_triton(weight: Tensor, bias: Tensor, pad: int, dtype: torch.dtype, behind: Beside) -> Tensor:
    padded: Tensor = cast(Any, _Padded).apply(pad, dtype, behind, weight, bias)
    return padded


def _decoder_shapes(kernel: str, source: Tensor) -> Shapes:
    return tile_shapes("decoder", kernel, source.device)


def _decoder_triton(source: Tensor, weights: DecoderWeights, pad: int, dtype: torch.dtype, behind: Beside) -> Tensor:
    out: Tensor = cast(Any, _Decoder).apply(pad, dtype, behind, source, *weights)
    return out


Decode = Callable[[Tensor, DecoderWeights, int, torch.dtype, Beside], Tensor]
Rows = Callable[[Tensor, Tensor, TableGradient | None], Tensor]
PadWeights = Callable[[Tensor, Tensor, int, torch.dtype, Beside], Tensor]
Pack = Callable[[Tensor, Tensor, Tensor, int, int, int], Packed]
Pick = Callable[[Tensor, Packed, Tensor], Picked]

PACK_WINDOWS: Op[Pack] = Op(
    "pack_windows",
    (
        Implementation("triton", _pack_triton, triton_kernels, not_interpreted),
        Implementation("reference", _pack_reference),
    ),
)
PICK: Op[Pick] = Op(
    "pick",
    (
        Implementation("triton", _pick_triton, triton_kernels, not_interpreted),
        Implementation("reference", _pick_reference),
    ),
)
ROWS_OF: Op[Rows] = Op(
    "rows_of",
    (
        Implementation("triton", _rows_triton, triton_kernels, not_interpreted),
        Implementation("reference", _rows_reference),
    ),
)
PADDED_WEIGHTS: Op[PadWeights] = Op(
    "padded_weights",
    (
        Implementation("triton", _padded_triton, triton_kernels, not_interpreted),
        Implementation("reference", _padded_reference),
    ),
)
DECODER_HIDDEN: Op[Decode] = Op(
    "decoder_hidden",
    (
        Implementation("triton", _decoder_triton, triton_kernels, not_interpreted),
        Implementation("reference", _decoder_reference),
    ),
)
