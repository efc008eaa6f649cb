"""Softmax attention over histories, and its value with its tangent, each under reverse mode.

A history's n items are rows oldest first; q, k and v are its rows' projections, one slice of C = D / H channels a head.
With S = q k^T / sqrt(C) over the pairs that may attend, P = softmax(S) by row:

    o = P v.

Given the tangents dq, dk, dv, with T = (dq k^T + q dk^T) / sqrt(C), mu = rowsum(P T) and R = P (T - mu), products of
equal shapes being elementwise:

    do = R v + P dv.

Backward, from g (with respect to o) and e (with respect to do). R = J T with the softmax's Jacobian J = diag(P) - P P^T
of each row, and J is symmetric: what T receives is J applied to what R receives. So with W = e v^T, nu = rowsum(P W):

    gT = P (W - nu)
    gP = X,  X = g v^T + e dv^T + W (T - mu) - nu T      (the last two terms: R as a function of P)
    gS = P (X - rowsum(P X))
    gv = P^T g + R^T e          gdv = P^T e
    gq = (gS k + gT dk) / sqrt(C)        gdq = gT k / sqrt(C)
    gk = (gS^T q + gT^T dq) / sqrt(C)    gdk = gT^T q / sqrt(C).

Without tangents e = 0 leaves the usual gradients. Rotary position embedding turns q, k and their tangents first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fave_fast.ops.registry import Implementation, Op, not_interpreted, triton_kernels, uncompiled
from fave_fast.ops.tuning import Shapes, tile_shapes
from fave_fast.precision import widened

Tables = tuple[Tensor, Tensor]
# Items that a tile of 16 rows holds. Where tables end there kernels have no larger tile, and a program is one warp of
# few registers: 17 find a place on a multiprocessor where the backward pass had 4, so that the 2,048 programs of 512
# histories go through at once and not in four waves. Under longer tables the same history may have other last bits.
SHORT = 16


def rotary_tables(ages: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, channels / 2] of rotary position embedding at integer `ages` [L], base 10,000.

    Ages count back from the newest item (age 0), so that the angles of an item do not depend on padding.
    """
    half = channels // 2
    inverse = 10_000.0 ** -(torch.arange(half, device=ages.device, dtype=torch.float32) / half)
    angles = ages.float()[:, None] * inverse
    return angles.cos(), angles.sin()


def rotary_by_age(longest: int, channels: int, device: torch.device | str | None = None) -> Tables:
    """`rotary_tables` [longest, channels / 2] with row a for age a."""
    return rotary_tables(torch.arange(longest, device=device), channels)


def refuse_forward_mode(op: str, *tensors: Tensor) -> None:
    """Raise where a tensor carries a forward-mode tangent or is inside a `torch.func` transform.

    Raises:
        NotImplementedError: PyTorch would drop the tangent, or take it for zero, without a word.
    """
    for tensor in tensors:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if wrapped or forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{op} has no forward-mode derivative and runs in no torch.func transform: its dual form takes and "
                "returns tangents explicitly"
            )


@dataclass(frozen=True)
class Newest:
    """Where the newest items of B histories are among all rows, and whose newest item a row is."""

    rows: Tensor  # int64 [B]
    owners: Tensor  # int32 [rows]; -1 of other rows


def newest_of(offsets: Tensor, total: int) -> Newest:
    """Of packed histories' offsets [B + 1]; of a history without items some row before it, or row 0."""
    rows = (offsets[1:] - 1).clamp_min(0)
    owners = torch.full((total,), -1, dtype=torch.int32, device=rows.device)
    owners.index_copy_(0, rows, torch.arange(len(rows), dtype=torch.int32, device=rows.device))
    return Newest(rows, owners)


@dataclass(frozen=True)
class Histories:
    """Where the histories lie among the rows, and what may attend to what.

    Attributes:
        bounds: offsets [B + 1] of packed histories, or lengths [B] of padded ones.
        padded_length: L of histories that are padded on the left, None of packed ones.
        heads: H.
        tables: of `rotary_by_age`, or None.
        causal: whether an item attends only to itself and older ones.
        last: whether there is one query a history, its newest item.
    """

    bounds: Tensor
    padded_length: int | None
    heads: int
    tables: Tables | None
    causal: bool
    last: bool

    def __len__(self) -> int:
        return len(self.bounds) - (self.padded_length is None)

    @property
    def longest(self) -> int | None:
        """No history has more items; None where nothing says so."""
        return self.padded_length if self.tables is None else len(self.tables[0])

    def grid(self) -> tuple[Tensor, Tensor]:
        """Row of each place of a left-padded grid int64 [B, L], and whether an item is there; waits for the device."""
        if self.padded_length is None:
            lengths, ends = self.bounds.diff(), self.bounds[1:]
            length = max(1, int(lengths.max())) if len(self) else 1
        else:
            lengths, length = self.bounds, self.padded_length
            ends = torch.arange(1, len(lengths) + 1, device=lengths.device) * length
        ages = torch.arange(length - 1, -1, -1, device=lengths.device)
        present = ages < lengths[:, None]
        return torch.where(present, ends[:, None] - 1 - ages, 0), present


@uncompiled
def attention(
    qkv: Tensor,
    bounds: Tensor,
    heads: int,
    rotary: Tables | None = None,
    *,
    causal: bool = False,
    q: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every item over its history, differentiable in reverse mode.

    Args:
        qkv: packed [total, 3 D], or padded on the left [B, L, 3 D]: queries, keys and values side by side.
        bounds: int32 or int64: offsets [B + 1] from 0 to total of packed histories; lengths [B] of padded ones.
        heads: H; D / H is even.
        rotary: tables of `rotary_by_age` with at least as many rows as the longest history has items, or None.
        causal: whether an item attends only to itself and older ones.
        q: [B, D]: queries of the newest items alone; `qkv` then has 2 D channels, keys and values.
        backend: auto, reference or triton.

    Returns:
        [total, D] or [B, L, D] with zeros at padding; with `q` [B, D], zeros for a history without items.

    Raises:
        ValueError: shapes, dtypes, devices or bounds that do not fit.
        BackendError: the backend cannot run here.
        NotImplementedError: under forward-mode differentiation or in a `torch.func` transform.
    """
    (o,) = _attend((qkv,), () if q is None else (q,), bounds, heads, rotary, causal, backend)
    return o


@uncompiled
def attention_dual(
    qkv: Tensor,
    dqkv: Tensor,
    bounds: Tensor,
    heads: int,
    rotary: Tables | None = None,
    *,
    causal: bool = False,
    q: Tensor | None = None,
    dq: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` and its derivative along the tangents `dqkv` (and `dq`), shaped as what they belong to.

    Both results are differentiable in reverse mode with respect to values and tangents.
    """
    if (q is None) != (dq is None):
        raise ValueError("q and dq go together: one is given and the other is not")
    queries = () if q is None or dq is None else (q, dq)
    o, do = _attend((qkv, dqkv), queries, bounds, heads, rotary, causal, backend)
    return o, do


def _attend(
    stacked: tuple[Tensor, ...],
    queries: tuple[Tensor, ...],
    bounds: Tensor,
    heads: int,
    rotary: Tables | None,
    causal: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    op = "attention" if len(stacked) == 1 else "attention_dual"
    refuse_forward_mode(op, *stacked, *queries)
    qkv = stacked[0]
    padded_length = qkv.shape[1] if qkv.dim() == 3 else None
    histories = Histories(bounds, padded_length, heads, rotary, causal, last=bool(queries))
    _check(stacked, queries, histories)
    run = OP.resolve(backend, qkv.device, qkv.dtype)
    flat = tuple(part.reshape(-1, part.shape[-1]) for part in stacked)
    results = run(flat, queries, histories)
    return results if queries else tuple(o.view(*qkv.shape[:-1], o.shape[-1]) for o in results)


def _check(stacked: tuple[Tensor, ...], queries: tuple[Tensor, ...], histories: Histories) -> None:
    qkv, bounds = stacked[0], histories.bounds
    parts = 2 if queries else 3
    if qkv.dim() not in (2, 3) or qkv.shape[-1] % (parts * 2 * histories.heads) != 0:
        raise ValueError(
            f"qkv is {list(qkv.shape)}; expected [total, {parts} D] or [B, L, {parts} D], D a multiple of 2 * heads = "
            f"{2 * histories.heads}"
        )
    if bounds.dim() != 1 or bounds.dtype not in (torch.int32, torch.int64) or bounds.device != qkv.device:
        raise ValueError(
            f"bounds are {bounds.dtype} {list(bounds.shape)} on {bounds.device}; expected int32 or int64 of one "
            f"dimension on {qkv.device}"
        )
    users = len(histories)
    if users < 0 or (histories.padded_length is not None and users != len(qkv)):
        raise ValueError(f"bounds have {len(bounds)} entries; expected offsets [B + 1], or lengths [{len(qkv)}]")
    for one in stacked:
        if one.shape != qkv.shape or one.dtype != qkv.dtype or one.device != qkv.device:
            raise ValueError(f"dqkv is {one.dtype} {list(one.shape)} on {one.device}; expected the like of qkv")
    wanted = (users, qkv.shape[-1] // parts)
    for one in queries:
        if one.shape != wanted or one.dtype != qkv.dtype or one.device != qkv.device:
            raise ValueError(f"q is {one.dtype} {list(one.shape)} on {one.device}; expected {qkv.dtype} {list(wanted)}")
    if bounds.device.type == "cpu":  # elsewhere a look at the values would make the host wait
        check_values(histories, qkv.shape[0])


def check_values(histories: Histories, total: int) -> None:
    """Look at the bounds of `total` rows of packed histories, or of padded ones, which waits for the device.

    Raises:
        ValueError: bounds that do not fit, or a history that is longer than the rotary tables.
    """
    bounds, longest = histories.bounds, histories.padded_length
    lengths = bounds if longest is not None else bounds.diff()
    if longest is not None:
        if bool(((bounds < 0) | (bounds > longest)).any()):
            raise ValueError(f"a length is not within 0 to {longest}")
    elif int(bounds[0]) != 0 or int(bounds[-1]) != total or bool((lengths < 0).any()):
        raise ValueError(f"offsets do not rise from 0 to the number of rows, {total}")
    if histories.tables is not None and len(lengths) and int(lengths.max()) > len(histories.tables[0]):
        raise ValueError(
            f"a history has {int(lengths.max())} items; the rotary tables reach {len(histories.tables[0])}"
        )


def reference(stacked: tuple[Tensor, ...], queries: tuple[Tensor, ...], histories: Histories) -> tuple[Tensor, ...]:
    """Plain PyTorch: (qkv,) or (qkv, dqkv) of rows [rows, 3 D] -> (o,) or (o, do) [rows, D]; or by `queries`."""
    rows, present = histories.grid()
    heads = histories.heads

    def split(x: Tensor, parts: int) -> tuple[Tensor, ...]:  # [B, L or 1, parts D] -> parts of [B, H, L or 1, C]
        batch, length, width = x.shape
        return tuple(x.view(batch, length, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4))

    def turn(x: Tensor, ages: Tensor) -> Tensor:
        return x if histories.tables is None else _turn(x, *(table[ages] for table in histories.tables))

    ages = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
    asked = ages[-1:] if queries else ages
    allowed = present[:, None, None, :] | ~present.any(1)[:, None, None, None]
    if histories.causal and not queries:
        allowed = (allowed & (ages[None, :] >= ages[:, None])) | (ages[None, :] == ages[:, None])
    parts = []
    for index, one in enumerate(stacked):
        grid = one[rows]
        q, k, v = (*split(queries[index][:, None], 1), *split(grid, 2)) if queries else split(grid, 3)
        parts.append((turn(q, asked), turn(k, ages), v))
    results = softmax_attention(parts, allowed)
    there = present.any(1) if queries else present
    outputs = []
    for result in results:
        o = result.transpose(1, 2).flatten(2)  # [B, L or 1, D]
        o = o.squeeze(1) if queries else o
        if queries or histories.padded_length is not None:
            outputs.append((o * there[..., None]).reshape(-1, o.shape[-1]))
        else:
            outputs.append(o[there])
    return tuple(outputs)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = widened(x)
    a, b = wide.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def softmax_attention(parts: list[tuple[Tensor, Tensor, Tensor]], allowed: Tensor) -> tuple[Tensor, ...]:
    """Plain PyTorch: [(q, k, v)] or [(q, k, v), (dq, dk, dv)], each [..., L, C] -> (o,) or (o, do), by the formulas."""
    q, k, v = parts[0]
    scale = q.shape[-1] ** -0.5

    def product(x: Tensor, y: Tensor) -> Tensor:
        scaled: Tensor = widened(x @ y.transpose(-1, -2)) * scale
        return scaled

    p = product(q, k).masked_fill(~allowed, -torch.inf).softmax(-1)
    narrow = p.to(v.dtype)
    o: Tensor = narrow @ v
    if len(parts) == 1:
        return (o,)
    dq, dk, dv = parts[1]
    t = product(dq, k) + product(q, dk)
    r = p * (t - (p * t).sum(-1, keepdim=True))
    return o, r.to(v.dtype) @ v + narrow @ dv


Run = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Histories], tuple[Tensor, ...]]


def views(stacked: tuple[Tensor, ...], queries: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(q, k, v) and, for the dual form, (dq, dk, dv): [rows, D] views with channels contiguous."""
    result: list[Tensor] = []
    for index, one in enumerate(stacked):
        result += (queries[index], *one.chunk(2, dim=1)) if queries else one.chunk(3, dim=1)
    return tuple(result)


def _shapes(kernel: str, dual: bool, histories: Histories, like: Tensor) -> Shapes:
    from fave_fast.kernels.attention import tier

    variant = kernel + ("_dual" if dual else "") + ("_short" if tier(histories.longest) == SHORT else "")
    return tile_shapes("attention", variant, like.device)


def forward_into(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], histories: Histories) -> None:
    """Run the kernel on `views`, into `outputs` [rows of q, D]."""
    from fave_fast.kernels.attention import attention_forward

    shapes = _shapes("forward", len(inputs) == 6, histories, outputs[0])
    attention_forward(
        inputs, outputs, histories.bounds, histories.tables, histories.padded_length, histories.longest,
        histories.heads, histories.causal, histories.last, shapes,
    )  # fmt: skip


def backward_into(
    inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...], gradients: tuple[Tensor, ...], histories: Histories
) -> None:
    """Run the backward kernel: gradients of `views` from those of the outputs, into `gradients`, strided as inputs."""
    from fave_fast.kernels.attention import attention_backward

    g = upstream[0]
    # Only histories of more than 64 items write to it; the others leave it untouched.
    stats = torch.empty(len(g), histories.heads, 5, dtype=torch.float32, device=g.device)
    shapes = _shapes("backward", len(inputs) == 6, histories, g)
    attention_backward(
        inputs, upstream, gradients, stats, histories.bounds, histories.tables, histories.padded_length,
        histories.longest, histories.heads, histories.causal, histories.last, shapes,
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    """The kernels under autograd. Without `setup_context` and `jvp`: forward mode and torch.func raise."""

    @staticmethod
    def forward(ctx: Any, histories: Histories, dual: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = tuple(one.contiguous() for one in tensors)
        ctx.histories, ctx.dual = histories, dual
        ctx.save_for_backward(*tensors)
        inputs = _Attention.inputs(tensors, dual)
        q = inputs[0]
        outputs = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(1 + dual))
        if len(histories):
            forward_into(inputs, outputs, histories)
        return outputs

    @staticmethod
    def inputs(tensors: tuple[Tensor, ...], dual: bool) -> tuple[Tensor, ...]:
        count = 1 + dual
        return views(tensors[:count], tensors[count:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients = tuple(torch.empty_like(one) for one in tensors)
        if len(ctx.histories):
            backward_into(
                _Attention.inputs(tensors, ctx.dual),
                tuple(one.contiguous() for one in upstream),
                _Attention.inputs(gradients, ctx.dual),
                ctx.histories,
            )
        return None, None, *gradients


def _run_triton(stacked: tuple[Tensor, ...], queries: tuple[Tensor, ...], histories: Histories) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = cast(Any, _Attention).apply(histories, len(stacked) == 2, *stacked, *queries)
    return result


OP: Op[Run] = Op(
    "attention",
    (
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("reference", reference),
    ),
)
