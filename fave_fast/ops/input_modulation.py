"""The network's input E, eqs. (8), (9) and the anchor of (14), and its tangent for L_cons of eq. (22).

    E = LayerNorm(dropout(e)) + lambda * (x_t + z),   z = TimeEmb(t) + TimeEmb(r - t)

with e the embeddings of a history's items. Histories are packed (ids [total] and offsets [B + 1], nothing between
them) or padded on the left (ids [B, L], 0 is padding); E has the shape of the ids and D channels. A position whose id
is 0 gets zeros and passes no gradient on. The age of a position counts back from the newest, which has age 0.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fave_fast.ops import philox
from fave_fast.ops.beside import Beside
from fave_fast.ops.registry import Implementation, Op, not_interpreted, triton_kernels
from fave_fast.ops.table_gradient import TableGradient
from fave_fast.ops.tuning import launches_overlap, tile_shapes
from fave_fast.precision import widened
from fave_fast.profiling import ranged


@dataclass(frozen=True)
class Times:
    """t and r of eq. (8), and TimeEmb: a sinusoid of `scale` * t, then hidden, SiLU and out, one for both times."""

    t: Tensor  # [B], floating point
    r: Tensor  # [B]
    hidden_weight: Tensor  # [D, D]
    hidden_bias: Tensor  # [D]
    out_weight: Tensor  # [D, D]
    out_bias: Tensor  # [D]
    scale: float = 999.0


@dataclass(frozen=True)
class Anchor:
    """x_0 = m * e_k of eq. (14) in place of x_t: for inference, without gradients."""

    ages: Tensor  # int64 [B]: k, counted back from the newest item
    keep: Tensor  # m, [D] or [B, D]


@dataclass(frozen=True)
class Draws:
    """The key of what is drawn: on the device, so that a captured graph draws anew once `seed` is written."""

    seed: Tensor  # int64 [1]
    users: Tensor  # int64 [B]: what is drawn for a user is the same in any batch


@dataclass(frozen=True)
class Drawn:
    """Lambda ~ N(delta, delta) for every position and channel, from `Draws`."""

    delta: float


@dataclass(frozen=True)
class Shared:
    """One lambda for all users, by age."""

    values: Tensor  # [at least the longest history, D], the newest position last


class HasTimeEmbedding(Protocol):
    """A network with TimeEmb of eq. (8)."""

    time_embedding: nn.Module


class _ById(NamedTuple):
    """The rows of E in the order of their items, equal ones in theirs.

    Attributes:
        ids: [total], ascending.
        order: int64 [total], which row each is.
    """

    ids: Tensor
    order: Tensor

    @classmethod
    def of(cls, ids: Tensor, count: int) -> _ById:
        """Of ids below `count`, of any shape."""
        # As narrow as they fit: a pass over the keys for each 8 bits. 56 us for 204,800 ids of 32 bits, 91 of 64.
        narrow = next(one for one in (torch.int16, torch.int32, torch.int64) if count <= torch.iinfo(one).max)
        return cls(*ids.reshape(-1).to(narrow).sort(stable=True))


@dataclass(frozen=True)
class _Call:
    """One call's arguments, checked."""

    ids: Tensor
    offsets: Tensor | None
    table: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    x_t: Tensor | Anchor
    dx_t: Tensor | None
    time: Times | Tensor
    lam: Tensor | float | Drawn | Shared
    draws: Draws | None
    dropout: float
    dtype: torch.dtype
    out: Tensor | None
    dout: Tensor | None
    workspace: Tensor | None
    beside: Beside
    gradient: TableGradient | None

    @property
    def count(self) -> int:
        return len(self.ids) if self.offsets is None else len(self.offsets) - 1


_Run = Callable[[_Call], tuple[Tensor, Tensor | None]]

# Backward kernels of which a warp a user fills the GPU where there are so many: forward and backward of 2,048 histories
# of 50 items take 150 us on one H200 for 212 by the tiles of fewer, of 4,096 228 for 361 (931fc41).
_BY_USERS, _MANY_USERS = ("rows_backward", "times_backward", "table_gradient"), 2048

KERNEL_CHANNELS = (16, 32, 64, 128, 256)


@ranged("fave/input")
def input_modulation(
    ids: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    x_t: Tensor | Anchor,
    time: Times | Tensor,
    lam: Tensor | float | Drawn | Shared,
    *,
    offsets: Tensor | None = None,
    draws: Draws | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    beside: Beside | None = None,
    gradient: TableGradient | None = None,
    backend: str = "auto",
) -> Tensor:
    """E of eq. (9), differentiable in table, norm, x_t and the weights of `time`.

    Sums are float32 whatever the dtypes. Gradients are the same bits in every run, and E of a history is the same bits
    in any batch. Transforms of `torch.func` do not pass through the kernels and raise: see `input_modulation_dual`.

    Args:
        ids: int32 or int64, [total] with `offsets`, else [B, L]; from 0 to N, which is not checked on a GPU.
        table: [N + 1, D] item embeddings, D a power of two from 16 to 256 for the kernels.
        norm_weight: [D], of the LayerNorm.
        norm_bias: [D].
        x_t: [B, D], or an anchor.
        time: t, r and TimeEmb, or z itself: [D] or [B, D], not differentiated.
        lam: lambda: one number, or a tensor of E's shape, or `Shared`, or `Drawn`; not differentiated.
        offsets: int64 [B + 1], where each packed history begins, and the end.
        draws: needed for `Drawn` and for dropout.
        dropout: a channel of an embedding is 0 with this probability, before the LayerNorm.
        eps: the LayerNorm's epsilon.
        dtype: of E, and of the operands in TimeEmb's products; by default the table's.
        out: E's memory. With it, or without gradients, nothing else is kept.
        workspace: float32 [B, D] for z, where `time` is `Times`; allocated by default.
        beside: for what the pass can do without for a while: the ids' sort, and the gradients of TimeEmb and of the
            norm; to be finished before those are read.
        gradient: of `shared` as the table is: where its gradient is left.
        backend: auto, reference or triton.

    Returns:
        E, ids.shape + (D,).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `out` where gradients are wanted.
        BackendError: the backend cannot run here.
    """
    call = _Call(
        ids, offsets, table, norm_weight, norm_bias, eps, x_t, None, time, lam, draws, dropout,
        dtype or table.dtype, out, None, workspace, beside or Beside(), gradient,
    )  # fmt: skip
    _check(call)
    return _resolve(backend, call)(call)[0]


@ranged("fave/input")
def input_modulation_dual(
    ids: Tensor,
    table: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    x_t: Tensor,
    dx_t: Tensor,
    time: Times,
    lam: Tensor | float | Drawn | Shared,
    *,
    offsets: Tensor | None = None,
    draws: Draws | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
    beside: Beside | None = None,
    gradient: TableGradient | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """E, and its derivative along (dx_t, dt = 1, dr = 0): dE = lambda * (dx_t + dz / dt); one pass over the rows.

    Both are differentiable, dE in dx_t and the weights of `time`. Arguments are those of `input_modulation`, with dx_t
    [B, D] the direction of x_t, out the memory of E and of dE, and workspace float32 [2, B, D].

    Returns:
        E and dE, ids.shape + (D,) each.

    Raises:
        ValueError: as for `input_modulation`.
        BackendError: the backend cannot run here.
    """
    first, second = out or (None, None)
    call = _Call(
        ids, offsets, table, norm_weight, norm_bias, eps, x_t, dx_t, time, lam, draws, dropout,
        dtype or table.dtype, first, second, workspace, beside or Beside(), gradient,
    )  # fmt: skip
    _check(call)
    value, tangent = _resolve(backend, call)(call)
    assert tangent is not None
    return value, tangent


@torch.no_grad()
def constant_time_features(model: HasTimeEmbedding) -> Tensor:
    """Z [D] at t = 0 and r = 1, where eq. (25) needs it: float32, computed in float64 from the weights as they are."""
    embedding = copy.deepcopy(model.time_embedding).double()
    device = next(embedding.parameters()).device
    features: Tensor = embedding(torch.tensor([0.0, 1.0], dtype=torch.float64, device=device))
    return features.sum(0).float()


def _resolve(backend: str, call: _Call) -> _Run:
    d = call.table.shape[1]
    beyond = {} if d in KERNEL_CHANNELS else {"triton": f"its kernels take D of {KERNEL_CHANNELS}, not {d}"}
    return OP.resolve(backend, call.table.device, call.table.dtype, beyond)


def _fits(name: str, tensor: Tensor, call: _Call, shapes: list[list[int]], dtypes: tuple[torch.dtype, ...]) -> None:
    problem = list(tensor.shape) not in shapes or (dtypes and tensor.dtype not in dtypes)
    if problem or tensor.device != call.table.device:
        kinds = "/".join(str(dtype) for dtype in dtypes) or "floating point"
        wanted = " or ".join(map(str, shapes))
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {kinds} {wanted} "
            f"on {call.table.device}"
        )


def _check(call: _Call) -> None:
    whole = (torch.int32, torch.int64)
    if call.table.dim() != 2 or not call.table.is_floating_point():
        raise ValueError(f"table is {call.table.dtype} {list(call.table.shape)}; expected floating point [N + 1, D]")
    d, rank = call.table.shape[1], 2 if call.offsets is None else 1
    if call.ids.dim() != rank or call.ids.dtype not in whole or call.ids.device != call.table.device:
        expected = "[B, L], or [total] with offsets,"
        raise ValueError(
            f"ids are {call.ids.dtype} {list(call.ids.shape)} on {call.ids.device}; expected int32 or int64 {expected} "
            f"on {call.table.device}"
        )
    if call.offsets is not None and len(call.offsets) == 0:
        raise ValueError("offsets are empty; expected [B + 1]")
    count, shape = call.count, [*call.ids.shape, d]
    if call.offsets is not None:
        _fits("offsets", call.offsets, call, [[count + 1]], (torch.int64,))
    for name, tensor in (("norm_weight", call.norm_weight), ("norm_bias", call.norm_bias)):
        _fits(name, tensor, call, [[d]], ())
    if isinstance(call.x_t, Anchor):
        _fits("anchor ages", call.x_t.ages, call, [[count]], (torch.int64,))
        _fits("anchor keep", call.x_t.keep, call, [[d], [count, d]], ())
    else:
        _fits("x_t", call.x_t, call, [[count, d]], ())
    if call.dx_t is not None:
        _fits("dx_t", call.dx_t, call, [[count, d]], ())
        if isinstance(call.x_t, Anchor) or not isinstance(call.time, Times):
            raise ValueError("a tangent needs x_t as a tensor, and times")
    _check_times(call, count, d)
    _check_draws(call, count, shape)
    for name, out in (("out", call.out), ("out of the tangent", call.dout)):
        if out is not None:
            _fits(name, out, call, [shape], (call.dtype,))
            if _wanted(call):
                raise ValueError(f"{name} is given, and gradients are wanted; call under torch.no_grad()")
    constant = [call.time] if isinstance(call.time, Tensor) else [call.time.t, call.time.r]
    constant += [call.lam] if isinstance(call.lam, Tensor) else []
    if isinstance(call.x_t, Anchor):
        constant.append(call.table)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constant):
        raise ValueError("times, z, lambda and the table of an anchor are not differentiated; detach them")


def _check_times(call: _Call, count: int, d: int) -> None:
    time = call.time
    if not isinstance(time, Times):
        _fits("z", time, call, [[d], [count, d]], ())
        return
    for name, tensor, shape in (
        ("t", time.t, [count]),
        ("r", time.r, [count]),
        ("hidden_weight", time.hidden_weight, [d, d]),
        ("hidden_bias", time.hidden_bias, [d]),
        ("out_weight", time.out_weight, [d, d]),
        ("out_bias", time.out_bias, [d]),
    ):
        _fits(name, tensor, call, [shape], ())
    if call.workspace is not None:
        shape = [count, d] if call.dx_t is None else [2, count, d]
        _fits("workspace", call.workspace, call, [shape], (torch.float32,))


def _check_draws(call: _Call, count: int, shape: list[int]) -> None:
    d = shape[-1]
    if isinstance(call.lam, Tensor):
        _fits("lam", call.lam, call, [shape], ())
    elif isinstance(call.lam, Shared):
        longest = call.ids.shape[1] if call.offsets is None else 1
        if call.lam.values.dim() != 2 or len(call.lam.values) < longest:
            raise ValueError(f"shared lambda is {list(call.lam.values.shape)}; expected [at least {longest}, {d}]")
        _fits("shared lambda", call.lam.values, call, [[len(call.lam.values), d]], ())
    if not 0 <= call.dropout < 1:
        raise ValueError(f"dropout is {call.dropout}; expected a number from 0 up to, not including, 1")
    if call.draws is not None:
        _fits("seed", call.draws.seed, call, [[1]], (torch.int64,))
        _fits("users", call.draws.users, call, [[count]], (torch.int64,))
    elif isinstance(call.lam, Drawn) or call.dropout > 0:
        raise ValueError("lambda or a dropout mask is to be drawn, and draws is None")


def _parameters(call: _Call) -> tuple[Tensor | None, ...]:
    """What is differentiated: table, norm_weight, norm_bias, x_t, dx_t and the four weights of TimeEmb."""
    time, x_t = call.time, call.x_t
    weights: tuple[Tensor | None, ...] = (None,) * 4
    if isinstance(time, Times):
        weights = (time.hidden_weight, time.hidden_bias, time.out_weight, time.out_bias)
    return (
        call.table, call.norm_weight, call.norm_bias, None if isinstance(x_t, Anchor) else x_t, call.dx_t, *weights
    )  # fmt: skip


def _wanted(call: _Call) -> bool:
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in _parameters(call))


def _owners_and_ages(call: _Call) -> tuple[Tensor, Tensor]:
    """The user of each position, and the position's age; both of the ids' shape."""
    users = torch.arange(call.count, device=call.ids.device)
    if call.offsets is None:
        length = call.ids.shape[1]
        ages = torch.arange(length - 1, -1, -1, device=call.ids.device)
        return users[:, None].expand_as(call.ids), ages.expand_as(call.ids)
    owners = users.repeat_interleave(call.offsets.diff(), output_size=len(call.ids))
    return owners, call.offsets[1:][owners] - 1 - torch.arange(len(call.ids), device=call.ids.device)


def _run_reference(call: _Call) -> tuple[Tensor, Tensor | None]:
    owners, ages = _owners_and_ages(call)
    padding = (call.ids == 0)[..., None]
    embedded = F.embedding(call.ids, call.table)
    if call.dropout > 0 and call.draws is not None:
        users = call.draws.users[owners]
        kept = philox.dropout_factors(call.draws.seed, users, ages, call.table.shape[1], call.dropout)
        embedded = embedded * kept.to(embedded.dtype)
    normed = F.layer_norm(embedded, call.norm_weight.shape, call.norm_weight, call.norm_bias, call.eps)
    lam = _reference_lambda(call, owners, ages)
    x_t = _reference_anchor(call) if isinstance(call.x_t, Anchor) else call.x_t
    dz = None
    if not isinstance(call.time, Times):
        z = call.time
    elif call.dx_t is None:
        z = _time_features(call.time, call.time.t)
    else:
        time = call.time
        pair: tuple[Tensor, ...] = torch.func.jvp(
            lambda t: _time_features(time, t), (time.t,), (torch.ones_like(time.t),)
        )
        z, dz = pair
    value = normed + lam * (x_t + z)[owners]
    value = _stored(value.masked_fill(padding, 0).to(call.dtype), call.out)
    if call.dx_t is None or dz is None:
        return value, None
    tangent = (lam * (call.dx_t + dz)[owners]).masked_fill(padding, 0).to(call.dtype)
    return value, _stored(tangent, call.dout)


def _stored(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None else out.copy_(value)


def _reference_anchor(call: _Call) -> Tensor:
    assert isinstance(call.x_t, Anchor)
    if call.offsets is None:
        places = call.ids.shape[1] - 1 - call.x_t.ages
        items = call.ids.gather(1, places[:, None])[:, 0]
    else:
        items = call.ids[call.offsets[1:] - 1 - call.x_t.ages]
    return call.table[items] * call.x_t.keep


def _reference_lambda(call: _Call, owners: Tensor, ages: Tensor) -> Tensor:
    """Lambda of E's shape, or one number, in the table's dtype."""
    lam = call.lam
    if isinstance(lam, Drawn) and call.draws is not None:
        wide = torch.float64 if call.table.dtype == torch.float64 else torch.float32
        normal = philox.normals(call.draws.seed, call.draws.users[owners], ages, call.table.shape[1], wide)
        return (lam.delta + lam.delta * normal).to(call.table.dtype)
    if isinstance(lam, Shared):
        return lam.values[len(lam.values) - 1 - ages]
    if isinstance(lam, Tensor):
        return lam
    assert not isinstance(lam, Drawn)
    return torch.full((), float(lam), dtype=call.table.dtype, device=ages.device)


def _time_features(time: Times, t: Tensor) -> Tensor:
    """Z of eq. (8), [B, D], as `fave_fast.model.TimeEmbedding` computes it."""

    def embed(t: Tensor) -> Tensor:
        wide = widened(t)
        half = len(time.hidden_weight) // 2
        exponents = torch.arange(half, device=t.device, dtype=wide.dtype) / half
        angles = wide[:, None] * (time.scale * 10_000.0**-exponents)
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1).to(time.hidden_weight.dtype)
        return F.linear(F.silu(F.linear(waves, time.hidden_weight, time.hidden_bias)), time.out_weight, time.out_bias)

    return embed(t) + embed(time.r - t)


def _run_triton(call: _Call) -> tuple[Tensor, Tensor | None]:
    if _wanted(call):
        both: tuple[Tensor, ...] | Tensor = cast(Any, _Fused).apply(call, *_parameters(call))
        return (both, None) if isinstance(both, Tensor) else (both[0], both[1])
    return _launch(call)


def _lambda_arguments(call: _Call, kernels: Any) -> tuple[Tensor | None, int, float, Tensor | None, Tensor | None]:
    """Lambda's tensor, where it comes from, delta, and the key of the draws."""
    seed, users = (call.draws.seed, call.draws.users.contiguous()) if call.draws is not None else (None, None)
    lam = call.lam
    if isinstance(lam, Tensor):
        return lam.contiguous(), kernels.GIVEN, 0.0, seed, users
    if isinstance(lam, Shared):
        return lam.values.contiguous(), kernels.SHARED, 0.0, seed, users
    if isinstance(lam, Drawn):
        return None, kernels.DRAWN, float(lam.delta), seed, users
    return None, kernels.CONSTANT, float(lam), seed, users


def _shapes(kernel: str, call: _Call) -> dict[str, int]:
    """Tile shapes: a float32 product needs more room than one of 16 bits, and drawing more programs."""
    variant = kernel
    if kernel.startswith("times") and call.dtype == torch.float32:
        variant += "_fp32"
    elif kernel == "rows" and isinstance(call.lam, Drawn):
        variant += "_drawn" if call.dx_t is None else "_drawn_dual"
    elif kernel in _BY_USERS and call.count >= _MANY_USERS:
        variant += "_many"
    return tile_shapes("input_modulation", variant, call.table.device)


def _launch(call: _Call) -> tuple[Tensor, Tensor | None]:
    from fave_fast.kernels import input_modulation as kernels

    d, device = call.table.shape[1], call.table.device
    out = torch.empty(*call.ids.shape, d, dtype=call.dtype, device=device) if call.out is None else call.out
    dout = call.dout
    if call.dx_t is not None and dout is None:
        dout = torch.empty_like(out)
    if out.numel() == 0:
        return out, dout
    anchor = call.x_t if isinstance(call.x_t, Anchor) else None
    x_t = None if isinstance(call.x_t, Anchor) else call.x_t.contiguous()
    dx_t, keep = _whole(call.dx_t), None if anchor is None else anchor.keep.contiguous()
    inputs = (*_rows_arguments(call), call.norm_bias.contiguous(), call.eps, x_t, keep)
    lam = _lambda_arguments(call, kernels)
    dz = None
    if isinstance(call.time, Times):
        space = call.workspace
        if space is None:
            parts = 1 if call.dx_t is None else 2
            space = torch.empty(parts, call.count, d, dtype=torch.float32, device=device)
        z, dz = (space.view(call.count, d), None) if call.dx_t is None else (space[0], space[1])
        # Nothing may come between this launch and the next one, which may begin before this one ends.
        _launch_times(call, call.time, z, dz)
    else:
        z = call.time.contiguous()
    kernels.launch_rows(
        *inputs, None if anchor is None else anchor.ages.contiguous(), z, dx_t, dz, *lam, call.dropout, out, dout,
        count=call.count, overlap=_overlaps(call), shapes=_shapes("rows", call),
    )  # fmt: skip
    return out, dout


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _rows_arguments(call: _Call) -> tuple[Tensor | None, ...]:
    """Ids, offsets, table and the norm's weight, as the kernels read them."""
    return _whole(call.ids), _whole(call.offsets), _whole(call.table), _whole(call.norm_weight)


def _times_arguments(time: Times) -> tuple[Tensor, ...]:
    """t, r, hidden's weight and bias, out's weight, as the kernels read them."""
    parts = (time.t, time.r, time.hidden_weight, time.hidden_bias, time.out_weight)
    return tuple(part.contiguous() for part in parts)


def _overlaps(call: _Call) -> bool:
    """Whether the pass over the rows may begin while z is being computed."""
    return isinstance(call.time, Times) and launches_overlap(call.table.device)


def _launch_times(call: _Call, time: Times, z: Tensor, dz: Tensor | None) -> None:
    from fave_fast.kernels import input_modulation as kernels

    kernels.launch_times(
        *_times_arguments(time), time.out_bias.contiguous(), z, dz,
        scale=time.scale, product=call.dtype, overlap=_overlaps(call), shapes=_shapes("times", call),
    )  # fmt: skip


class _Fused(torch.autograd.Function):
    """The kernels under autograd. Without `setup_context` the transforms of `torch.func` refuse it, as they must: it
    has no forward-mode derivative, and a tangent lost in silence would train something else.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: Tensor | None) -> Any:
        ctx.call = call
        held: list[object] = [*parameters, call.ids, call.offsets]
        held += [call.lam.values if isinstance(call.lam, Shared) else call.lam]
        held += [] if call.draws is None else [call.draws.seed, call.draws.users]
        held += [call.time.t, call.time.r] if isinstance(call.time, Times) else []
        # Held to be told of changes in place, which is what would make the second draw another one.
        ctx.save_for_backward(*(part for part in held if isinstance(part, Tensor)))
        value, tangent = _launch(call)
        ctx.by_id = None
        if ctx.needs_input_grad[1]:
            with call.beside.work(call.ids):
                ctx.by_id = _ById.of(call.ids, len(call.table))
        return value if tangent is None else (value, tangent)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, dgrad: Tensor | None = None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return None, *_backward(ctx.call, ctx.by_id, ctx.needs_input_grad[1:], grad.contiguous(), dgrad)


def _backward(
    call: _Call, by_id: _ById | None, needed: tuple[bool, ...], grad: Tensor, dgrad: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of `_parameters`, None where none is needed; `by_id` is of a table that needs one."""
    from fave_fast.kernels import input_modulation as kernels

    count, d, device = call.count, call.table.shape[1], call.table.device
    call.beside.join()  # the ids' sort
    norm_needed = needed[1] or needed[2]
    norm_part = torch.empty(count, 2 * d, device=device) if by_id is not None or norm_needed else None
    row_grad = torch.empty_like(grad, dtype=call.table.dtype) if by_id is not None else None
    shift_grad = torch.empty(count, d, device=device)
    dshift_grad = None if dgrad is None else torch.empty_like(shift_grad)
    if count > 0:
        kernels.launch_rows_backward(
            *_rows_arguments(call), call.eps, *_lambda_arguments(call, kernels), call.dropout, grad, _whole(dgrad),
            shift_grad, dshift_grad, norm_part, row_grad, shapes=_shapes("rows_backward", call),
        )  # fmt: skip
    read = [one for one in (shift_grad, dshift_grad, norm_part) if one is not None]
    norm_grads: tuple[Tensor | None, ...] = (None, None)
    with call.beside.work(*read):
        time_grads = _times_backward(call, any(needed[5:]), shift_grad, dshift_grad)
        if norm_part is not None and norm_needed:
            norm_grads = summed(norm_part, call.norm_weight.dtype).tensor_split(2)
    table_grad = None
    if by_id is not None and row_grad is not None:
        add = functools.partial(_add_by_id, call, by_id, row_grad)
        if call.gradient is None:
            table_grad = add(torch.zeros_like(call.table, memory_format=torch.contiguous_format))
        else:
            call.gradient.add(add)
    x_grad, dx_grad = (
        part.to(like.dtype) if wanted and part is not None and like is not None else None
        for part, like, wanted in zip((shift_grad, dshift_grad), _parameters(call)[3:5], needed[3:5], strict=True)
    )
    return table_grad, *norm_grads, x_grad, dx_grad, *time_grads


def _add_by_id(call: _Call, by_id: _ById, row_grad: Tensor, total: Tensor) -> Tensor:
    """`total` with the rows' gradients added by id, in the rows' order: no atomics, the same bits in every run."""
    from fave_fast.kernels import input_modulation as kernels

    shapes = _shapes("table_gradient", call)
    ids, order = by_id
    edges = torch.empty(-(-len(ids) // shapes["chunk"]), 2, total.shape[1], device=ids.device)
    if len(edges) > 0:
        kernels.launch_table_gradient(ids, order, row_grad, total, edges, shapes=shapes)
    return total


def _times_backward(call: _Call, needed: bool, grad: Tensor, dgrad: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of TimeEmb's four weights."""
    from fave_fast.kernels import input_modulation as kernels

    time, d = call.time, call.table.shape[1]
    if not needed or not isinstance(time, Times):
        return (None,) * 4
    shapes = _shapes("times_backward", call)
    blocks = -(-call.count // shapes["users"])
    part = torch.empty(blocks, 2 * d * d + 2 * d, device=grad.device)
    if blocks > 0:
        kernels.launch_times_backward(
            *_times_arguments(time), grad, dgrad, part, scale=time.scale, product=call.dtype, shapes=shapes,
        )  # fmt: skip
    total = summed(part, time.hidden_weight.dtype)
    hidden, out, hidden_bias, out_bias = total.tensor_split((d * d, 2 * d * d, 2 * d * d + d))
    return hidden.view(d, d), hidden_bias, out.view(d, d), out_bias


def summed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the rows of part [P, C] as [C], in two steps of fixed order."""
    from fave_fast.kernels import input_modulation as kernels

    if len(part) == 0:
        return part.new_zeros(part.shape[1], dtype=dtype)
    shapes = tile_shapes("input_modulation", "sums", part.device)
    while len(part) > shapes["span"]:
        fewer = torch.empty(-(-len(part) // shapes["span"]), part.shape[1], device=part.device)
        kernels.launch_sums(part, fewer, span=shapes["span"], shapes=shapes)
        part = fewer
    total = torch.empty(1, part.shape[1], dtype=dtype, device=part.device)
    kernels.launch_sums(part, total, span=shapes["span"], shapes=shapes)
    return total[0]


OP: Op[_Run] = Op(
    "input_modulation",
    (
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("reference", _run_reference),
    ),
)
