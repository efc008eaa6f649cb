"""Attention over histories and its dual form against an fp64 oracle, forward and backward."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fave_fast.errors import BackendError
from fave_fast.ops.attention import SHORT, Histories, attention, attention_dual, reference, rotary_by_age

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = [1, 0, 16, 17, 50]
SHORT_LENGTHS = [1, 0, 16, 9]


@dataclass
class Case:
    """Histories of `lengths` as packed rows, with everything that forward and backward read."""

    lengths: list[int]
    heads: int = 2
    channels: int = 16
    dtype: torch.dtype = torch.float32
    rotary: bool = True
    causal: bool = False
    last: bool = False
    dual: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        d, total, users = self.heads * self.channels, sum(self.lengths), len(self.lengths)
        shapes = [(total, (2 if self.last else 3) * d)] * (1 + self.dual) + [(users, d)] * (self.last * (1 + self.dual))
        self.inputs = [torch.randn(shape, dtype=torch.float64).to(self.dtype).to(DEVICE) for shape in shapes]
        rows = users if self.last else total
        self.upstream = [torch.randn(rows, d).to(self.dtype).to(DEVICE) for _ in range(1 + self.dual)]
        self.offsets = torch.tensor([0, *self.lengths], device=DEVICE).cumsum(0)
        self.tables = rotary_by_age(max(*self.lengths, 1), self.channels, DEVICE) if self.rotary else None

    def outcome(self, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs, then gradients of all inputs, through the public call."""
        inputs = [one.to(dtype or self.dtype).requires_grad_() for one in self.inputs]
        outputs = self.call(inputs, self.offsets, backend)
        upstream = [one.to(outputs[0].dtype) for one in self.upstream]
        return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]

    def call(self, inputs: list[Tensor], bounds: Tensor, backend: str) -> tuple[Tensor, ...]:
        options = {"causal": self.causal, "backend": backend}
        if self.last:
            options |= {"q": inputs[1 + self.dual]} | ({"dq": inputs[3]} if self.dual else {})
        if self.dual:
            return attention_dual(inputs[0], inputs[1], bounds, self.heads, self.tables, **options)
        return (attention(inputs[0], bounds, self.heads, self.tables, **options),)

    def oracle(self) -> list[Tensor]:
        """As `outcome`, in fp64: the value formula by torch.func.jvp, and autograd through both."""
        inputs = [one.double().requires_grad_() for one in self.inputs]
        values = inputs[0::2] if self.dual else inputs
        histories = Histories(self.offsets, None, self.heads, self.tables, self.causal, self.last)

        def value(*parts: Tensor) -> Tensor:
            (o,) = reference(parts[:1], parts[1:], histories)
            return o

        outputs = [value(*values)]
        if self.dual:
            outputs = list(torch.func.jvp(value, tuple(values), tuple(inputs[1::2])))
        gradients = torch.autograd.grad(outputs, inputs, [one.double() for one in self.upstream])
        return [*outputs, *gradients]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def check(*cases: Case) -> None:
    """All outputs and gradients: at most twice PyTorch's error; of several cases, the roots of their mean squares."""
    squares = []
    for case in cases:
        want = case.oracle()
        ours, plain = case.outcome("triton"), case.outcome("reference")
        assert all(got.isfinite().all() for got in ours)
        squares.append(
            [[error(got, exact) ** 2 for got, exact in zip(some, want, strict=True)] for some in (ours, plain)]
        )
    for index, (got, peer) in enumerate(torch.tensor(squares).mean(0).sqrt().T.tolist()):
        assert got <= 2 * peer, f"{index}: {got} {peer}"


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("rotary", "causal", "heads", "channels", "dtype"),
    [
        (True, False, 2, 32, torch.float32),
        (True, True, 1, 20, torch.float32),
        (False, False, 3, 8, torch.float16),
    ],
)
def test_values_and_gradients(
    dual: bool, last: bool, rotary: bool, causal: bool, heads: int, channels: int, dtype: torch.dtype
) -> None:
    if causal and last:
        pytest.skip("the newest item sees everything")
    check(Case(LENGTHS, heads, channels, dtype, rotary, causal, last, dual))


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_histories_of_one_small_tile(dual: bool, last: bool, dtype: torch.dtype) -> None:
    assert max(SHORT_LENGTHS) <= SHORT < max(LENGTHS)
    check(Case(SHORT_LENGTHS, 2, 32, dtype, True, False, last, dual))


@pytest.mark.parametrize("causal", [False, True])
def test_long_history(causal: bool) -> None:
    check(Case([71, 3], 1, 16, torch.float32, True, causal))


@pytest.mark.parametrize("lengths", [[71, 3], [200]])
def test_long_history_last(lengths: list[int]) -> None:
    # One query over 200 keys: an error that all its probabilities share does not average out.
    check(Case(lengths, 4, 32, last=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("users", [1, 2, 3, 63, 132, 513])
def test_odd_shapes(dtype: torch.dtype, causal: bool, last: bool, users: int) -> None:
    generator = torch.Generator().manual_seed(users)
    lengths = torch.randint(1, 51, (users,), generator=generator).tolist()
    lengths[0], lengths[-1] = 50, 200
    # A softmax's sum is rounded once a row and head: of one row, equally exact code errs by more or less by chance.
    draws = 8 if users <= 3 else 1
    for dual in (False, True):
        check(*(Case(lengths, 4, 32, dtype, True, causal, last, dual, seed) for seed in range(draws)))


def padded(case: Case, inputs: list[Tensor], length: int) -> tuple[list[Tensor], Tensor]:
    """The rows of packed inputs, padded on the left with NaN, and which places hold rows."""
    lengths = torch.tensor(case.lengths, device=DEVICE)
    present = torch.arange(length - 1, -1, -1, device=DEVICE) < lengths[:, None]
    result = []
    for one in inputs[: 1 + case.dual]:
        grid = one.new_full((len(lengths), length, one.shape[1]), torch.nan)
        grid[present] = one
        result.append(grid)
    return result + inputs[1 + case.dual :], present


@pytest.mark.parametrize("last", [False, True])
def test_bits_do_not_depend_on_the_batch(last: bool) -> None:
    case = Case([5, 33, 0, 18], 2, 32, last=last)
    whole = case.outcome("triton")
    assert all(torch.equal(a, b) for a, b in zip(whole, case.outcome("triton"), strict=True))

    grids, present = padded(case, case.inputs, 35)
    grids = [one.requires_grad_() for one in grids]
    outputs = case.call(grids, torch.tensor(case.lengths, device=DEVICE), "triton")
    upstream = case.upstream
    if not last:
        upstream = [torch.zeros_like(o) for o in outputs]
        for wide, narrow in zip(upstream, case.upstream, strict=True):
            wide[present] = narrow
    gradients = torch.autograd.grad(outputs, grids, upstream)
    for packed, other in zip(whole, [*outputs, *gradients], strict=True):
        if other.dim() == 2:
            assert torch.equal(packed, other)
        else:
            assert torch.equal(packed, other[present])
            assert not other[~present].any()

    for user in (1, 3):
        rows = slice(int(case.offsets[user]), int(case.offsets[user + 1]))
        alone = Case([case.lengths[user]], 2, 32, last=last)
        alone.tables = case.tables
        alone.inputs = [one[rows] if one.shape[1] > 64 else one[user : user + 1] for one in case.inputs]
        alone.upstream = [one[user : user + 1] if last else one[rows] for one in case.upstream]
        for one, many in zip(alone.outcome("triton"), whole, strict=True):
            assert torch.equal(one, many[user : user + 1] if len(many) == len(case.lengths) else many[rows])


def test_order_of_users_changes_no_bit() -> None:
    case = Case([3, 17, 9], 1, 16, dual=False)
    o = case.outcome("triton")[0].split(case.lengths)
    case.inputs = [torch.cat(case.inputs[0].split(case.lengths)[::-1])]
    case.lengths = case.lengths[::-1]
    case.offsets = torch.tensor([0, *case.lengths], device=DEVICE).cumsum(0)
    (turned,) = case.call(case.inputs, case.offsets, "triton")
    assert all(torch.equal(a, b) for a, b in zip(o, reversed(turned.split(case.lengths)), strict=True))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_is_refused(backend: str, compiled: bool) -> None:
    case = Case([2, 3], 1, 16, dual=False)

    def along(qkv: Tensor) -> Tensor:
        call = lambda x: case.call([x], case.offsets, backend)[0]  # noqa: E731
        return torch.func.jvp(call, (qkv,), (torch.ones_like(qkv),))[1]

    if compiled:
        along = torch.compile(along, backend="eager")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|disable"):
        along(case.inputs[0])
    if not compiled:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="attention has no forward-mode"):
            case.call([forward_ad.make_dual(case.inputs[0], torch.ones_like(case.inputs[0]))], case.offsets, backend)


def test_dual_has_a_tangent() -> None:
    case = Case([4, 6], 1, 16)
    _, do = case.call(case.inputs, case.offsets, "triton")
    assert (do.abs().amax(1) > 0).all()


def test_no_users_and_no_items() -> None:
    empty = torch.zeros(0, 96, device=DEVICE, requires_grad=True)
    for offsets in ([0], [0, 0]):
        o = attention(empty, torch.tensor(offsets, device=DEVICE), 2, backend="triton")
        assert o.shape == (0, 32)
        o.sum().backward()


def test_refusals() -> None:
    case = Case([2, 3], 2, 16, dual=False)
    qkv, offsets = case.inputs[0], case.offsets
    with pytest.raises(ValueError, match="expected \\[total, 3 D\\]"):
        attention(qkv[:, :-1], offsets, 2)
    with pytest.raises(ValueError, match="bounds are"):
        attention(qkv, offsets.float(), 2)
    with pytest.raises(ValueError, match="bounds have 3 entries"):
        attention(qkv[None], offsets, 2)
    with pytest.raises(ValueError, match="dqkv is"):
        attention_dual(qkv, qkv[:-1], offsets, 2)
    with pytest.raises(ValueError, match="q is"):
        attention(qkv[:, :64], offsets, 2, q=qkv[:, :32])
    with pytest.raises(ValueError, match="go together"):
        attention_dual(qkv[:, :64], qkv[:, :64], offsets, 2, q=qkv[:2, :32])
    with pytest.raises(BackendError, match="no such backend for this op"):
        attention(qkv, offsets, 2, backend="cpp")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="do not rise"):
            attention(qkv, offsets.flip(0), 2)
        with pytest.raises(ValueError, match="a length is not within"):
            attention(qkv[None], torch.tensor([6]), 2)
        with pytest.raises(ValueError, match="tables reach 2"):
            attention(qkv, offsets, 2, rotary_by_age(2, 16))


@pytest.mark.gpu
def test_graph_replay() -> None:
    case = Case([50, 3, 17, 120], 4, 32, torch.bfloat16)
    inputs = [one.requires_grad_() for one in case.inputs]

    def step() -> list[Tensor]:
        outputs = case.call(inputs, case.offsets, "triton")
        # Detached: the leaves' nodes would live on and belong to the stream of their first use.
        return [*(one.detach() for one in outputs), *torch.autograd.grad(outputs, inputs, case.upstream)]

    want = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for one in got:
        one.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    length, last_users = 50, 3
    users = 2**31 // (3 * 128 * length) + 1000
    torch.manual_seed(0)
    qkv = torch.randn(users * length, 384, device=DEVICE, dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    tables = rotary_by_age(length, 32, DEVICE)

    def run(rows: Tensor) -> list[Tensor]:
        rows = rows.detach().requires_grad_()
        o = attention(rows, torch.arange(len(rows) // length + 1, device=DEVICE) * length, 4, tables, backend="triton")
        return [o, *torch.autograd.grad(o, rows, rows.detach()[:, :128].contiguous())]

    tail = slice(-last_users * length, None)
    assert all(torch.equal(a[tail], b) for a, b in zip(run(qkv), run(qkv[tail]), strict=True))
