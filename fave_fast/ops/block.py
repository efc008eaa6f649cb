"""A pre-norm transformer block on packed histories, and its value with its tangent, each under reverse mode.

    h = x + drop(attention(norm(x) Wqkv^T) Wo^T)          y = h + drop(gelu(norm(h) W1^T) W2^T)

attention as in `fave_fast.ops.attention`, gelu(a) = a Phi(a) with the normal distribution Phi and its density phi.
The tangents of the parts, with c the (LayerNorm: centred) row, r = (mean(c^2) + eps)^(-1/2) and the gain's factor left
out, are

    norm:  n = r c           dn = r (dc - r^2 m c), m = mean(c dc)
    gelu:  u = a Phi(a)      du = (Phi(a) + a phi(a)) da,

and their gradients, from p with respect to n or u and s with respect to dn or du,

    norm:  gdc = r s - r^3 k c, k = mean(s c)
           gc = r p - r^3 (m s + k dc + w c), w = mean(p c + s dc) - 3 r^2 m k
    gelu:  gda = s (Phi(a) + a phi(a))
           ga = p (Phi(a) + a phi(a)) + s phi(a) (2 - a^2) da.

The gc line: dn holds c directly, in m, and in r, and d r / d c = -r^3 c / D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fave_fast.ops.attention import (
    Histories,
    Newest,
    Tables,
    backward_into,
    check_values,
    forward_into,
    newest_of,
    refuse_forward_mode,
    views,
)
from fave_fast.ops.attention import reference as attend
from fave_fast.ops.beside import Beside
from fave_fast.ops.registry import Implementation, Op, not_interpreted, triton_kernels, uncompiled
from fave_fast.ops.tuning import Shapes, multiprocessors, tile_shapes
from fave_fast.precision import widened


class BlockWeights(NamedTuple):
    """A block's parameters, all contiguous. With biases its norms are LayerNorms, without RMSNorms.

    All are of the rows' dtype or all of float32. Beside rows of 16 bits the latter are what is trained: products are of
    the matrices in the rows' dtype, and gradients of float32.
    """

    attention_gain: Tensor  # [D]
    attention_bias: Tensor | None  # [D]
    qkv: Tensor  # [3 D, D]
    attention_out: Tensor  # [D, D]
    ffn_gain: Tensor  # [D]
    ffn_bias: Tensor | None  # [D]
    ffn_in: Tensor  # [hidden, D]
    ffn_out: Tensor  # [D, hidden]

    @property
    def eps(self) -> float:
        """What the norms add to the mean square: 1e-6 in RMSNorm, 1e-5 in LayerNorm."""
        return 1e-6 if self.attention_bias is None else 1e-5

    @property
    def norms(self) -> tuple[Tensor | None, ...]:
        """Gain and bias, or None, of both norms."""
        return self.attention_gain, self.attention_bias, self.ffn_gain, self.ffn_bias

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Those of the products."""
        return self.qkv, self.attention_out, self.ffn_in, self.ffn_out

    def with_norms(
        self, gain: Tensor | None, bias: Tensor | None, ffn_gain: Tensor | None, ffn_bias: Tensor | None
    ) -> BlockWeights:
        """These matrices with other `norms`."""
        assert gain is not None
        assert ffn_gain is not None
        return self._replace(attention_gain=gain, attention_bias=bias, ffn_gain=ffn_gain, ffn_bias=ffn_bias)

    def with_matrices(self, qkv: Tensor, attention_out: Tensor, ffn_in: Tensor, ffn_out: Tensor) -> BlockWeights:
        """These norms with other `matrices`."""
        return self._replace(qkv=qkv, attention_out=attention_out, ffn_in=ffn_in, ffn_out=ffn_out)


class _Sums:
    """Shares of the norms' gradients that programs have written, two norms a block, by the number of programs."""

    def __init__(self, places: int, parts: int) -> None:
        self.places, self.parts = places, parts
        self.shares: dict[int, Tensor] = {}
        self.written: dict[int, int] = {}

    def room(self, place: int, d: int, programs: int, device: torch.device) -> Tensor:
        """Memory [1 or 2, d, programs] of a norm's gain and bias."""
        if programs not in self.shares:
            self.shares[programs] = torch.empty(self.places, self.parts, d, programs, device=device)
        self.written[place] = programs
        return self.shares[programs][place]

    def totals(self) -> list[Tensor]:
        """The gradients [d], norm by norm, in a launch for each number of programs: a launch a norm took 4 us each."""
        sums = {programs: shares.sum(-1) for programs, shares in self.shares.items()}
        found = [sums[self.written[place]][place].unbind(0) for place in range(self.places)]
        return [one for parts in found for one in parts]


@dataclass(frozen=True)
class Place:
    """A block's place in a network, whose blocks narrow their weights and finish their gradients together."""

    index: int
    weights: BlockWeights  # with matrices as the products want them
    sums: _Sums
    behind: Beside  # where the matrices' gradients are computed


def together(
    weights: list[BlockWeights], narrow: list[BlockWeights], behind: Beside | None = None
) -> list[tuple[BlockWeights, Place]]:
    """The weights to give to `block`, and the places, of all the blocks of a network.

    All blocks are to be run once.

    Args:
        weights: block by block.
        narrow: the same, of `narrowed`.
        behind: where the gradients of the weights are computed; to be finished before they are read.
    """
    behind = behind or Beside()
    sums = _Sums(2 * len(weights), 1 if weights[0].attention_bias is None else 2)
    given = [one for each in weights for one in (*each.norms, *each.matrices) if one is not None]
    through: Iterator[Tensor] = iter(cast(Any, _Together).apply(sums, behind, *given))
    result = []
    for index, (each, products) in enumerate(zip(weights, narrow, strict=True)):
        norms = [None if one is None else next(through) for one in each.norms]
        matrices = itertools.islice(through, len(each.matrices))
        changed = each.with_norms(*norms).with_matrices(*matrices)
        result.append((changed, Place(index, products, sums, behind)))
    return result


class _Together(torch.autograd.Function):
    """Parameters as they are. Their gradients are there when all blocks' are; of norms sums of what blocks wrote."""

    @staticmethod
    def forward(ctx: Any, sums: _Sums, behind: Beside, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.sums, ctx.behind = sums, behind
        ctx.norms = [one.dtype if one.dim() == 1 else None for one in given]
        ctx.set_materialize_grads(False)
        return tuple(one.view_as(one) for one in given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.sums.written:
            return None, None, *grads
        with ctx.behind.work(*ctx.sums.shares.values()):
            totals = iter(ctx.sums.totals())
        return (
            None,
            None,
            *(grad if dtype is None else next(totals).to(dtype) for dtype, grad in zip(ctx.norms, grads, strict=True)),
        )


def narrowed(weights: list[BlockWeights], dtype: torch.dtype) -> list[BlockWeights]:
    """The weights of any number of blocks with matrices in `dtype`, without gradients, in two launches.

    `torch._foreach_copy_` takes 64 k elements a program: 15 us for the 0.8 M of four blocks, on 13 multiprocessors.
    """
    matrices = [one.detach() for each in weights for one in each.matrices]
    if matrices[0].dtype == dtype:
        return weights
    flat = torch.cat([one.flatten() for one in matrices]).to(dtype)
    parts = torch.split(flat, [one.numel() for one in matrices])
    narrow = [part.view_as(one) for part, one in zip(parts, matrices, strict=True)]
    return [each.with_matrices(*narrow[4 * index : 4 * index + 4]) for index, each in enumerate(weights)]


@dataclass(frozen=True)
class BlockDropout:
    """Dropout from a counter-based generator: the mask is a function of seed, layer, place and element, kept nowhere.

    Masks repeat after 2^32 elements.

    Attributes:
        p: probability of a zero, from 0 up to, not including, 1; others are multiplied by 1 / (1 - p).
        seed: [1] int64 on the block's device; to be changed between steps, in place where a CUDA graph reads it.
        layer: which block it is; blocks of equal seed and layer get equal masks.
    """

    p: float
    seed: Tensor
    layer: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"p is {self.p}; expected at least 0 and below 1")
        if self.seed.shape != (1,) or self.seed.dtype != torch.int64:
            raise ValueError(f"seed is {self.seed.dtype} {list(self.seed.shape)}; expected int64 [1]")

    def factors(self, second: bool, rows: int, d: int) -> Tensor:
        """0 or 1 / (1 - p), float32 [rows, d]: what multiplies the block's first or second residual branch."""
        low, high = self.seed & _WORD, (self.seed >> 32) & _WORD
        key = _mix(_mix(low ^ (2 * self.layer + second)) ^ high)
        step = _mix(key ^ 0x9E3779B9) | 1
        position = torch.arange(rows * d, device=self.seed.device) & _WORD
        bits = _mix((position * step + key) & _WORD)
        return ((bits >= self.threshold()).float() / (1 - self.p)).view(rows, d)

    def threshold(self) -> int:
        """An element is kept where its 32 bits are at least this."""
        return min(round(self.p * 2**32), _WORD)


_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """`_mix` of the kernels on uint32 values in int64, whose overflow keeps the low 32 bits that matter."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


@uncompiled
def block(
    x: Tensor,
    weights: BlockWeights,
    offsets: Tensor,
    heads: int,
    rotary: Tables | None = None,
    *,
    causal: bool = False,
    last_only: bool = False,
    dropout: BlockDropout | None = None,
    place: Place | None = None,
    backend: str = "auto",
) -> Tensor:
    """One block over packed histories, differentiable in reverse mode with respect to x and the weights.

    Args:
        x: [total, D], a history's rows oldest first, each history of at least one row where `last_only`.
        weights: of x's device.
        offsets: [B + 1] int32 or int64, from 0 to total.
        heads: H; D / H is even.
        rotary: tables of `rotary_by_age` that reach the longest history, or None.
        causal: whether an item attends only to itself and older ones.
        last_only: compute the newest row of each history alone.
        dropout: None outside training.
        place: of `together`, with these weights; by default the block is by itself.
        backend: auto, reference or triton.

    Returns:
        [total, D], or [B, D] with `last_only`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        BackendError: the backend cannot run here.
        NotImplementedError: under forward-mode differentiation or in a `torch.func` transform.
    """
    histories = Histories(offsets, None, heads, rotary, causal, last_only)
    return _apply("block", (x,), weights, histories, dropout, place, backend)[0]


@uncompiled
def block_dual(
    x: Tensor,
    dx: Tensor,
    weights: BlockWeights,
    offsets: Tensor,
    heads: int,
    rotary: Tables | None = None,
    *,
    causal: bool = False,
    last_only: bool = False,
    dropout: BlockDropout | None = None,
    place: Place | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`block` and its derivative along the tangent `dx` [total, D] of x; the dropout masks are the value's.

    Both results are differentiable in reverse mode with respect to x, dx and the weights.
    """
    histories = Histories(offsets, None, heads, rotary, causal, last_only)
    y, dy, *_ = _apply("block_dual", (x, dx), weights, histories, dropout, place, backend)
    return y, dy


@uncompiled
def last_block(
    x: tuple[Tensor, ...],
    weights: BlockWeights,
    offsets: Tensor,
    heads: int,
    rotary: Tables | None = None,
    *,
    causal: bool = False,
    dropout: BlockDropout | None = None,
    place: Place | None = None,
    newest: Newest | None = None,
    backend: str = "auto",
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`block` of (x,), or `block_dual` of (x, dx), with `last_only`: the results, and the newest rows of x, [B, D].

    These rows' gradients join the residual stream's; of rows selected from x itself they would be a tensor as large as
    x, filled and added, 13 us of 25,600 rows (H200). `newest`: of `newest_of`, where it is known.
    """
    histories = Histories(offsets, None, heads, rotary, causal, last=True)
    op = "block" if len(x) == 1 else "block_dual"
    *results, rows = _apply(op, x, weights, histories, dropout, place, backend, newest)
    return tuple(results), rows


def _apply(
    op: str,
    x: tuple[Tensor, ...],
    weights: BlockWeights,
    histories: Histories,
    dropout: BlockDropout | None,
    place: Place | None,
    backend: str,
    newest: Newest | None = None,
) -> tuple[Tensor, ...]:
    given = [one for one in weights if one is not None]
    refuse_forward_mode(op, *x, *given)
    _check(x, weights, histories)
    if dropout is not None and dropout.p == 0:
        dropout = None
    run = OP.resolve(backend, x[0].device, x[0].dtype)
    return run(x, weights, histories, dropout, place, newest)


def _check(x: tuple[Tensor, ...], weights: BlockWeights, histories: Histories) -> None:
    first = x[0]
    if first.dim() != 2 or first.shape[1] % (2 * histories.heads) != 0:
        raise ValueError(f"x is {list(first.shape)}; expected [total, D], D a multiple of {2 * histories.heads}")
    d, hidden = first.shape[1], len(weights.ffn_in)
    shapes = [(d,), (d,), (3 * d, d), (d, d), (d,), (d,), (hidden, d), (d, hidden)]
    if (weights.attention_bias is None) != (weights.ffn_bias is None):
        raise ValueError("one norm has a bias and the other none; expected two norms of one kind")
    named = zip(BlockWeights._fields, weights, shapes, strict=True)
    dtype = torch.float32 if weights.qkv.dtype == torch.float32 and first.itemsize == 2 else first.dtype
    wanted = [(name, one, shape, dtype) for name, one, shape in named if one is not None]
    wanted += [("dx", one, tuple(first.shape), first.dtype) for one in x[1:]]
    for name, one, shape, dtype in wanted:
        if one.shape != shape or one.dtype != dtype or one.device != first.device:
            raise ValueError(
                f"{name} is {one.dtype} {list(one.shape)} on {one.device}; expected {dtype} {list(shape)} on "
                f"{first.device}"
            )
    bounds = histories.bounds
    if bounds.dim() != 1 or len(bounds) == 0 or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets are {bounds.dtype} {list(bounds.shape)}; expected int32 or int64 [B + 1]")
    if bounds.device != first.device:
        raise ValueError(f"offsets are on {bounds.device} and x on {first.device}; expected one device")
    if bounds.device.type == "cpu":  # elsewhere a look at the values would make the host wait
        check_values(histories, len(first))


def norm_dual(x: tuple[Tensor, ...], gain: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Plain PyTorch: RMSNorm (LayerNorm with a bias) of x [..., D] and, where x has a second tensor, its tangent."""
    wide = [widened(one) for one in x]
    if bias is not None:
        wide = [one - one.mean(-1, keepdim=True) for one in wide]
    c = wide[0]
    r = torch.rsqrt(c.square().mean(-1, keepdim=True) + eps)
    results = [c * r * gain if bias is None else c * r * gain + bias]
    if len(wide) == 2:
        m = (c * wide[1]).mean(-1, keepdim=True)
        results.append((wide[1] - c * (r * r * m)) * r * gain)
    return tuple(one.to(x[0].dtype) for one in results)


def normed(
    x: tuple[Tensor, ...], gain: Tensor, bias: Tensor | None, eps: float, count: int, dtype: torch.dtype, *,
    behind: Beside | None = None, backend: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    """`norm_dual` of the first `count` rows of x [rows, D], in `dtype`; differentiable once with the triton backend.

    In plain PyTorch the tangent and its gradients were some 60 launches. `behind`: where the gradients of gain and bias
    are added up; to be finished before they are read.

    Raises:
        BackendError: the backend cannot run here.
    """
    beyond = {} if gain.dtype == dtype else {"triton": f"its kernels take a gain of {dtype}, not {gain.dtype}"}
    run = NORM.resolve(backend, x[0].device, x[0].dtype, beyond)
    return run(x, gain, bias, eps, count, dtype, behind or Beside())


def _norm_reference(
    x: tuple[Tensor, ...],
    gain: Tensor,
    bias: Tensor | None,
    eps: float,
    count: int,
    dtype: torch.dtype,
    behind: Beside,
) -> tuple[Tensor, ...]:
    return norm_dual(tuple(one[:count].to(dtype) for one in x), gain, bias, eps)


def gelu_dual(a: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Plain PyTorch: GELU of a and, where a has a second tensor, its tangent."""
    if len(a) == 1:
        return (F.gelu(a[0]),)
    wide = widened(a[0])
    below, density = 0.5 + 0.5 * torch.erf(wide * 0.5**0.5), torch.exp(-0.5 * wide.square()) * 0.3989422804014327
    return (wide * below).to(a[0].dtype), ((below + wide * density) * a[1]).to(a[0].dtype)


def linear_dual(x: tuple[Tensor, ...], weight: Tensor) -> tuple[Tensor, ...]:
    """X weight^T of value and tangent [rows, D] in one matrix product."""
    return F.linear(torch.cat(x), weight).chunk(len(x))


def reference(
    x: tuple[Tensor, ...],
    weights: BlockWeights,
    histories: Histories,
    dropout: BlockDropout | None,
    place: Place | None = None,
    newest: Newest | None = None,
) -> tuple[Tensor, ...]:
    """Plain PyTorch on (x,) or (x, dx), with casts of its own: gradients go through them.

    With `histories.last` the newest rows of x are one result more.
    """
    d = x[0].shape[1]
    weights = weights.with_matrices(*(one.to(x[0].dtype) for one in weights.matrices))

    def dropped(branch: tuple[Tensor, ...], second: bool) -> tuple[Tensor, ...]:
        if dropout is None:
            return branch
        factor = dropout.factors(second, len(branch[0]), d).to(x[0].dtype)
        return tuple(one * factor for one in branch)

    n = norm_dual(x, weights.attention_gain, weights.attention_bias, weights.eps)
    residual = x
    if histories.last:
        rows = (newest or newest_of(histories.bounds, len(x[0]))).rows
        residual = tuple(one[rows] for one in x)
        queries = linear_dual(tuple(one[rows] for one in n), weights.qkv[:d])
        o = attend(linear_dual(n, weights.qkv[d:]), queries, histories)
    else:
        o = attend(linear_dual(n, weights.qkv), (), histories)
    branch = dropped(linear_dual(o, weights.attention_out), False)
    h = tuple(one + two for one, two in zip(residual, branch, strict=True))
    n = norm_dual(h, weights.ffn_gain, weights.ffn_bias, weights.eps)
    branch = dropped(linear_dual(gelu_dual(linear_dual(n, weights.ffn_in)), weights.ffn_out), True)
    y = tuple(one + two for one, two in zip(h, branch, strict=True))
    return (*y, residual[0]) if histories.last else y


_Mask = tuple[Tensor, int, int, float]  # seed, first of two streams, threshold, scale


def _shapes(kernel: str, dual: bool, like: Tensor) -> Shapes:
    # float32 products are ordinary multiply-adds with both operands in registers: large tiles spill by the kilobyte.
    narrow = like.dtype == torch.float32 and kernel != "norm_backward"
    return tile_shapes("block", f"{kernel}_fp32" if narrow else f"{kernel}_dual" if dual else kernel, like.device)


def _parts(rows: int, shapes: Shapes, device: torch.device) -> int:
    """Programs that share the hidden units of `BM` rows: of 1, 2 and 4 what leaves the fewest places idle.

    Two programs find a place on a multiprocessor, and each norms its rows again. Of 25,600 rows the 200 programs of a
    value take 47 us, and shared out 54; of 5,120 rows 40 programs take 33 us and 160 take 18 (H200, 3096ed9). No unit's
    bits depend on it.
    """
    places, programs = 2 * multiprocessors(device), -(-rows // shapes["BM"])
    return min((1, 2, 4), key=lambda parts: -(-programs * parts // places) / parts)


class _Rows:
    """Value, or value and tangent, in one buffer [1 or 2, rows, width], so that one product takes both."""

    def __init__(self, like: Tensor, count: int, rows: int, width: int) -> None:
        self.buffer = torch.empty(count, rows, width, dtype=like.dtype, device=like.device)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(self.buffer.unbind(0))

    @property
    def flat(self) -> Tensor:
        return self.buffer.flatten(0, 1)


@dataclass(frozen=True)
class _Block:
    """The launches of one block, forward and backward."""

    weights: BlockWeights
    histories: Histories
    dropout: BlockDropout | None
    dual: bool
    d: int
    wide: torch.dtype  # of the weights' gradients
    place: Place | None
    newest: Newest | None  # where the histories are asked for theirs

    def _mask(self) -> _Mask | None:
        if self.dropout is None:
            return None
        return self.dropout.seed, 2 * self.dropout.layer, self.dropout.threshold(), 1 / (1 - self.dropout.p)

    def _norms(self) -> tuple[tuple[Tensor, Tensor | None, float], tuple[Tensor, Tensor | None, float]]:
        w = self.weights
        return (w.attention_gain, w.attention_bias, w.eps), (w.ffn_gain, w.ffn_bias, w.eps)

    def _views(self, projected: Tensor, queries: Tensor | None) -> tuple[Tensor, ...]:
        return views(tuple(projected.unbind(0)), () if queries is None else tuple(queries.unbind(0)))

    def forward(self, x: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(y,) or (y, dy) and, where `last`, the newest rows of x; and the tensors that `backward` needs."""
        from fave_fast.kernels import block as kernels

        w, d = self.weights, self.d
        norm, ffn_norm = self._norms()
        count, total = len(x), len(x[0])
        shapes = _shapes("norm_linear", self.dual, x[0])
        residual, queries = x, None
        weight = w.qkv
        if self.newest is not None:
            rows = self.newest.rows
            residual = tuple(one.index_select(0, rows) for one in x)
            queries = _Rows(x[0], count, len(rows), d)
            kernels.norm_linear(residual, norm, weight[:d], queries.parts, shapes)
            weight = weight[d:]
        projected = _Rows(x[0], count, total, len(weight))
        kernels.norm_linear(x, norm, weight, projected.parts, shapes)
        o, h, y = (_Rows(x[0], count, len(residual[0]), d) for _ in range(3))
        inputs = self._views(projected.buffer, None if queries is None else queries.buffer)
        forward_into(inputs, o.parts, self.histories)
        kernels.tail(
            o.parts, residual, (w.attention_out, w.ffn_in, w.ffn_out), ffn_norm, self._mask(), h.parts, y.parts,
            _shapes("tail", self.dual, x[0]),
        )  # fmt: skip
        saved = (projected.buffer, o.buffer, h.buffer) + (() if queries is None else (queries.buffer,))
        return y.parts if self.newest is None else (*y.parts, residual[0]), saved

    def backward(
        self,
        x: tuple[Tensor, ...],
        saved: tuple[Tensor, ...],
        upstream: tuple[Tensor, ...],
        of_newest: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Gradients of x (and dx) and, in their order, of the weights."""
        w, d = self.weights, self.d
        projected, o, h = saved[:3]
        queries = None if self.newest is None else saved[3]
        gh, go, ffn = self._feed_forward_backward(h, upstream)
        g_projected = torch.empty_like(projected)
        g_queries = None if queries is None else torch.empty_like(queries)
        backward_into(self._views(projected, queries), go.parts, self._views(g_projected, g_queries), self.histories)
        g_out = self._product(ffn.pop("gz"), o.flatten(0, 1))
        if of_newest is not None:  # after the products above, which are not to see it
            if self.dropout is None:  # gh itself is what they read
                self._behind.join()
            gh.parts[0].add_(of_newest)
        gn = self._linear(g_projected, w.qkv if queries is None else w.qkv[d:])
        newest = None
        if g_queries is not None and self.newest is not None:
            newest = (self.newest.owners, self._linear(g_queries, w.qkv[:d]).parts)
        gx, n, g_norm = self._norm_backward(gn, x, 0, gh.parts, newest, None, None)
        g_qkv = torch.empty(w.qkv.shape, dtype=self.wide, device=w.qkv.device)
        if g_queries is not None and self.newest is not None:
            with self._behind.work(n.buffer):
                newest_n = n.buffer.index_select(1, self.newest.rows).flatten(0, 1)
            self._product(g_queries.flatten(0, 1), newest_n, g_qkv[:d])
        self._product(g_projected.flatten(0, 1), n.flat, g_qkv[3 * d - g_projected.shape[2] :])
        g_gain, g_bias = ffn["norm"]
        return gx.parts, (*g_norm, g_qkv, g_out, g_gain, g_bias, ffn["in"], ffn["out"])

    def _feed_forward_backward(self, h: Tensor, upstream: tuple[Tensor, ...]) -> tuple[_Rows, _Rows, dict[str, Any]]:
        """Gradients of h and of the attention's output, and of the feed-forward's weights."""
        from fave_fast.kernels import block as kernels

        w, d = self.weights, self.d
        count, rows, _ = h.shape
        mask, hidden = self._mask(), len(w.ffn_in)
        u, ga = (_Rows(h, count, rows, hidden) for _ in range(2))
        # Without a mask and a tangent the upstream gradient itself is what the weights' product needs.
        gz = _Rows(h, count, rows, d) if self.dual or mask is not None else None
        shapes = _shapes("gelu_backward", self.dual, h)
        kernels.gelu_backward(
            tuple(h.unbind(0)), self._norms()[1], upstream, (w.ffn_in, w.ffn_out), mask, u.parts, ga.parts,
            None if gz is None else gz.parts, {**shapes, "PARTS": _parts(rows, shapes, h.device)},
        )  # fmt: skip
        g_out = self._product(upstream[0] if gz is None else gz.flat, u.flat)
        gn = self._linear(ga.buffer, w.ffn_in)
        attention_gz = None if mask is None else _Rows(h, count, rows, d)
        gh, n, g_norm = self._norm_backward(gn, tuple(h.unbind(0)), 1, upstream, None, mask, attention_gz)
        attention_gz = attention_gz or gh
        go = self._linear(attention_gz.buffer, w.attention_out)
        return gh, go, {"norm": g_norm, "in": self._product(ga.flat, n.flat), "out": g_out, "gz": attention_gz.flat}

    @property
    def _behind(self) -> Beside:
        return Beside() if self.place is None else self.place.behind

    def _product(self, gradient: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """A matrix's gradient, of those of its results [rows, N] and of what it was applied to [rows, K]: [N, K].

        Nothing waits for it before all blocks are done: 17 products of a step take 170 us of 25,600 rows, 80 of 4,600,
        on a part of the multiprocessors (H200, 65d3909).
        """
        if out is None:
            out = torch.empty(gradient.shape[1], x.shape[1], dtype=self.wide, device=x.device)
        with self._behind.work(gradient, x):
            if gradient.dtype == self.wide:
                torch.mm(gradient.t(), x, out=out)
            elif gradient.device.type == "cuda":
                torch.mm(gradient.t(), x, out_dtype=self.wide, out=out)
            else:
                torch.mm(gradient.t().to(self.wide), x.to(self.wide), out=out)
        return out

    def _linear(self, x: Tensor, weight: Tensor) -> _Rows:
        """The product of x [1 or 2, rows, K] and weight [K, D], value and tangent as rows of one."""
        from fave_fast.kernels import block as kernels

        y = _Rows(x, x.shape[0], x.shape[1], weight.shape[1])
        kernels.linear(x.flatten(0, 1), weight, y.flat, _shapes("linear", False, x))
        return y

    def _norm_backward(
        self,
        gn: _Rows,
        x: tuple[Tensor, ...],
        which: int,
        residual: tuple[Tensor, ...],
        newest: tuple[Tensor, tuple[Tensor, ...]] | None,
        mask: _Mask | None,
        gz: _Rows | None,
    ) -> tuple[_Rows, _Rows, tuple[Tensor | None, Tensor | None]]:
        """Gradients of x, norm(x) again, gradients of the norm's parameters unless they are added up later."""
        from fave_fast.kernels import block as kernels

        norm, d = self._norms()[which], self.d
        shapes = _shapes("norm_backward", self.dual, x[0])
        programs = -(-len(x[0]) // shapes["BM"])
        # The programs last: a sum over contiguous numbers takes 3 us, one over 400 rows of 256 took 15.
        place, device = self.place, x[0].device
        if place is None:
            sums = torch.empty(2, d, programs, dtype=torch.float32, device=device)
        else:
            sums = place.sums.room(2 * place.index + which, d, programs, device)
        gx, n = (_Rows(x[0], len(x), len(x[0]), d) for _ in range(2))
        kernels.norm_backward(
            gn.parts, x, norm, residual, newest, mask, gx.parts, n.parts, None if gz is None else gz.parts, sums, shapes
        )
        if place is not None:
            return gx, n, (None, None)
        if norm[1] is None:
            return gx, n, (sums[0].sum(1).to(self.wide), None)
        gain, bias = sums.sum(2).to(self.wide)
        return gx, n, (gain, bias)


class _BlockFunction(torch.autograd.Function):
    """The kernels under autograd. Without `setup_context` and `jvp`: forward mode and torch.func raise."""

    @staticmethod
    def forward(
        ctx: Any,
        histories: Histories,
        dropout: BlockDropout | None,
        place: Place | None,
        newest: Newest | None,
        dual: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x = tuple(one.contiguous() for one in tensors[: 1 + dual] if one is not None)
        weights = BlockWeights(*(one if one is None else one.contiguous() for one in tensors[1 + dual :]))  # type: ignore[arg-type]
        wide = weights.qkv.dtype
        (weights,) = narrowed([weights], x[0].dtype) if place is None else (place.weights,)
        ctx.block = (histories, dropout, dual, x[0].shape[1], wide, place, newest)
        launches = _Block(weights, *ctx.block)
        outputs, saved = launches.forward(x)
        ctx.set_materialize_grads(False)
        ctx.count = len(saved)
        ctx.save_for_backward(*saved, *x, *weights)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        histories, _, dual = ctx.block[:3]
        tensors = ctx.saved_tensors
        saved, rest = tensors[: ctx.count], tensors[ctx.count :]
        x, weights = rest[: 1 + dual], BlockWeights(*rest[1 + dual :])
        launches = _Block(weights, *ctx.block)
        shape = (len(histories) if histories.last else len(x[0])), x[0].shape[1]
        given = tuple(x[0].new_zeros(shape) if one is None else one.contiguous() for one in upstream[: 1 + dual])
        gx, gradients = launches.backward(x, saved, given, upstream[1 + dual] if histories.last else None)
        return None, None, None, None, None, *gx, *gradients


class _Norm(torch.autograd.Function):
    """The kernels under autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        count: int,
        dtype: torch.dtype,
        behind: Beside,
        gain: Tensor,
        bias: Tensor | None,
        *x: Tensor,
    ) -> tuple[Tensor, ...]:
        from fave_fast.kernels import block as kernels

        x = tuple(one.contiguous() for one in x)
        y = tuple(torch.empty(count, one.shape[1], dtype=dtype, device=one.device) for one in x)
        kernels.norm(x, (gain, bias, eps), y, tile_shapes("block", "norm", gain.device))
        ctx.save_for_backward(gain, bias, *x)
        ctx.eps, ctx.behind = eps, behind
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        from fave_fast.kernels import block as kernels

        gain, bias, *x = ctx.saved_tensors
        shapes = tile_shapes("block", "norm", gain.device)
        count, d = upstream[0].shape
        gx = tuple(torch.empty_like(one) for one in x)
        for one in gx:
            if count < len(one):
                one[count:].zero_()
        parts = 1 if bias is None else 2
        sums = torch.empty(parts, d, -(-count // shapes["BM"]), dtype=torch.float32, device=gain.device)
        grads = tuple(one.contiguous() for one in upstream)
        kernels.norm_backward(grads, tuple(x), (gain, bias, ctx.eps), None, None, None, gx, None, None, sums, shapes)
        with ctx.behind.work(sums):
            of_gain, of_bias = (*sums.sum(2), None)[:2]
        return None, None, None, None, of_gain, of_bias, *gx


Normalise = Callable[[tuple[Tensor, ...], Tensor, Tensor | None, float, int, torch.dtype, Beside], tuple[Tensor, ...]]


def _norm_triton(
    x: tuple[Tensor, ...],
    gain: Tensor,
    bias: Tensor | None,
    eps: float,
    count: int,
    dtype: torch.dtype,
    behind: Beside,
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = cast(Any, _Norm).apply(eps, count, dtype, behind, gain, bias, *x)
    return result


NORM: Op[Normalise] = Op(
    "norm",
    (
        Implementation("triton", _norm_triton, triton_kernels, not_interpreted),
        Implementation("reference", _norm_reference),
    ),
)
Run = Callable[
    [tuple[Tensor, ...], BlockWeights, Histories, BlockDropout | None, Place | None, Newest | None], tuple[Tensor, ...]
]


def _run_triton(
    x: tuple[Tensor, ...],
    weights: BlockWeights,
    histories: Histories,
    dropout: BlockDropout | None,
    place: Place | None,
    newest: Newest | None,
) -> tuple[Tensor, ...]:
    if len(x[0]) == 0:
        return reference(x, weights, histories, dropout)
    if histories.last and newest is None:
        newest = newest_of(histories.bounds, len(x[0]))
    function = cast(Any, _BlockFunction)
    result: tuple[Tensor, ...] = function.apply(histories, dropout, place, newest, len(x) == 2, *x, *weights)
    return result


OP: Op[Run] = Op(
    "block",
    (
        Implementation("triton", _run_triton, triton_kernels, not_interpreted),
        Implementation("reference", reference),
    ),
)
